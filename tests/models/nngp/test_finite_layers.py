"""Finite networks of the kernel language: one by hand, and moments that are exact at any width or tend to those."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import nngp
from bayesinf.models.nngp.finite_layers import Plan, forward

W, B, NUM_OUTPUTS = 1.75, 0.1, 12
DARK = np.where(np.arange(7) % 2, 0.25, 1.0)  # every other row and column: a stride that begins one late sees it
IMAGES = np.sin(1.0 + np.arange(2 * 7 * 6 * 2) ** 1.25).reshape(2, 7, 6, 2) * np.outer(DARK, DARK[:6])[..., None]
IMAGES = jnp.asarray(IMAGES, jnp.float32)
SEQUENCES, POINTS = IMAGES[:, :2, 0], IMAGES[:, 0, 0]
RELU, ERF = nngp.activation(nngp.relu()), nngp.activation(nngp.erf())
DENSE, FLAT = nngp.dense(W, B), nngp.flatten()


class Whole(nngp.WeightLaw):
    """Matrices of small whole numbers, with which float32 makes no error."""

    def sample(self, key, m, n, dtype=None):
        return jax.random.randint(key, (m, n), -2, 3, jnp.int32).astype(dtype)


def conv_by_hand(image, filters, padding, stride):
    """sum_o W_o x_{sa+o}, with loops; filters of shape (3, 3, units, channels)."""
    if padding != "valid":
        image = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode={"same": "constant", "circular": "wrap"}[padding])
    rows, columns = ((number - 3) // stride + 1 for number in image.shape[:2])
    out = np.zeros((rows, columns, filters.shape[2]), np.float32)
    for i, j, di, dj in itertools.product(range(rows), range(columns), range(3), range(3)):
        out[i, j] += filters[di, dj] @ image[stride * i + di, stride * j + dj]
    return out


def pool_by_hand(image, size, stride):
    rows, columns = ((number - size) // stride + 1 for number in image.shape[:2])
    return np.array(
        [
            [
                image[stride * i : stride * i + size, stride * j : stride * j + size].sum((0, 1)) / size**2
                for j in range(columns)
            ]
            for i in range(rows)
        ],
        np.float32,
    )


@pytest.mark.parametrize(("padding", "stride", "pool_stride"), [("same", 2, 1), ("circular", 1, 2), ("valid", 2, 1)])
def test_a_tiny_network_by_hand(padding, stride, pool_stride):
    """To the last bit: whole numbers, a variance of 9 that the nine offsets take off, and a mean of four."""
    width, key = 3, jax.random.key(0)
    layers = nngp.conv(3, 9.0, padding=padding, stride=stride), RELU, nngp.average_pool(2, pool_stride), FLAT
    kernel = nngp.serial(*layers, nngp.dense(4.0))
    images = jnp.asarray(np.arange(2 * 7 * 6 * 2).reshape(2, 7, 6, 2) * 5 % 7 - 3, jnp.float32)
    found = forward(kernel.network, key, images, Plan(width, 2, Whole()))

    key_conv, *_, key_dense = jax.random.split(key, 5)
    keys = jax.random.split(jax.random.split(key_conv)[0], 9)
    filters = np.array([Whole().sample(key, width, 2, jnp.float32) for key in keys]).reshape(3, 3, width, 2)
    pooled = [
        pool_by_hand(np.maximum(conv_by_hand(image, filters, padding, stride), 0.0), 2, pool_stride)
        for image in np.asarray(images)
    ]
    last = np.asarray(Whole().sample(jax.random.split(key_dense)[0], 2, pooled[0].size, jnp.float32))
    expected = np.array([2.0 * last @ image.ravel() for image in pooled])
    assert np.all(np.any(expected, axis=1))
    np.testing.assert_array_equal(found, expected)


def test_repeated_blocks_by_hand():
    """To the last bit: every block has weights of its own."""
    width, key = 5, jax.random.key(1)
    block = nngp.residual(RELU, nngp.dense(4.0), scale=0.5)
    points = np.array([[1.0, -2.0], [0.0, 3.0]], np.float32)
    kernel = nngp.serial(nngp.dense(), nngp.repeat(3, block))
    found = forward(kernel.network, key, jnp.asarray(points), Plan(width, width, Whole()))

    key_dense, key_repeat = jax.random.split(key)
    units = points @ np.asarray(Whole().sample(jax.random.split(key_dense)[0], width, 2, jnp.float32)).T
    for key_block in jax.random.split(key_repeat, 3):
        key_dense = jax.random.split(key_block)[1]
        weights = np.asarray(Whole().sample(jax.random.split(key_dense)[0], width, width, jnp.float32))
        units = units + np.maximum(units, 0.0) @ weights.T
    np.testing.assert_array_equal(found, units)


def products(kernel, X, num, **options):
    """Of outputs at pairs of two inputs, in many networks one after the other, averaged over the outputs of each."""

    @jax.jit
    def draw(keys, kernel):
        def one(key):
            outputs = nngp.sample_network(key, kernel, X, num_outputs=NUM_OUTPUTS, **options)
            return (outputs @ outputs.T / NUM_OUTPUTS)[jnp.array([0, 0, 1]), jnp.array([0, 1, 1])]

        return jax.lax.map(one, keys)

    return np.asarray(draw(jax.random.split(jax.random.key(0), num), kernel), np.float64)


def entries(kernel, X):
    return np.asarray(kernel(X), np.float64)[[0, 0, 1], [0, 1, 1]]


EXACT = {  # one activation, or two places of time: the kernel is exact at any width
    "stride": ((nngp.conv(3, W, B, stride=2), RELU, FLAT, DENSE), IMAGES),
    "even filter": ((nngp.conv(2, W, B, padding="valid", stride=3), RELU, FLAT, DENSE), IMAGES),
    "pool": ((nngp.conv(3, W, B, padding="circular"), RELU, nngp.average_pool(3, 2), FLAT, DENSE), IMAGES),
    "global pool": ((nngp.conv(3, W, B, stride=2), ERF, nngp.global_pool(), DENSE), IMAGES),
    "pool of time": ((DENSE, RELU, nngp.average_pool(2, 1), FLAT, DENSE), IMAGES[:, :4, 0]),
    "recurrent": ((nngp.recurrent(nngp.erf(), W, B, input_var=0.5),), SEQUENCES),
    "residual": ((DENSE, nngp.residual(RELU, DENSE, scale=0.5)), POINTS),
    "residual of inputs": ((nngp.residual(DENSE, scale=0.5), DENSE, RELU, DENSE), POINTS),
    "conv at the end": ((nngp.conv(3, W, B, stride=2), ERF, nngp.conv(3, W, B), nngp.global_pool()), IMAGES),
}


QUICK = "stride", "pool", "recurrent", "residual"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXACT]
)
def test_second_moments_are_those_of_the_kernel(name):
    layers, X = EXACT[name]
    kernel = nngp.serial(*layers)
    assert mean_p_value(products(kernel, X, 8_000, width=NUM_OUTPUTS), entries(kernel, X)) > FALSE_ALARM


OTHERS = "orthogonal", "block_sparse", "low_rank"


@pytest.mark.parametrize("name", ["sparse", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_variances_of_deep_relu_networks_are_exact_for_all_laws(name):
    law = {"sparse": nngp.sparse(0.5), "block_sparse": nngp.block_sparse(2)}.get(name) or getattr(nngp, name)()
    layers = nngp.conv(3, W, B, stride=2), nngp.repeat(2, RELU, nngp.conv(3, W, B, padding="circular")), RELU
    kernel = nngp.serial(*layers, FLAT, DENSE, RELU, DENSE)
    draws = products(kernel, IMAGES, 1_500, width=NUM_OUTPUTS, law=law)
    assert mean_p_value(draws[:, [0, 2]], np.asarray(kernel.diagonal(IMAGES), np.float64)) > FALSE_ALARM


def test_layer_norm_makes_the_squares_of_the_units_add_up():
    kernel = nngp.serial(DENSE, nngp.layer_norm(0.0))
    units = nngp.sample_network(0, kernel, POINTS, width=32, num_outputs=32)
    np.testing.assert_allclose(np.mean(units, axis=1), 0.0, atol=8 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(np.mean(units**2, axis=1), 1.0, rtol=8 * np.finfo(np.float32).eps)


class Nothing(nngp.WeightLaw):
    def sample(self, key, m, n, dtype=None):
        return jnp.zeros((m, n), dtype)


@pytest.mark.parametrize(
    ("layers", "X", "is_between"),
    [
        ((nngp.conv(), RELU, FLAT, nngp.dense()), IMAGES, False),
        ((nngp.conv(), RELU, nngp.conv(), RELU, FLAT, nngp.dense()), IMAGES, True),
        ((nngp.dense(), nngp.repeat(2, RELU, nngp.dense())), POINTS, True),  # the last of them is the last layer
        ((nngp.dense(), nngp.repeat(1, RELU, nngp.dense())), POINTS, False),
    ],
)
def test_the_law_is_of_the_weights_between_hidden_layers(layers, X, is_between):
    """Where it gives zeros, the outputs are zero if and only if there are such weights."""
    outputs, expected = (
        nngp.sample_network(0, nngp.serial(*layers), X, width=4, law=law) for law in (Nothing(), nngp.iid())
    )
    np.testing.assert_array_equal(outputs, 0.0 * expected if is_between else expected)


def test_a_key_makes_one_function():
    """An input's output does not know of the inputs beside it, and all outputs share the hidden layers."""
    kernel = nngp.serial(*EXACT["pool"][0])
    both = nngp.sample_network(1, kernel, IMAGES, width=8)
    np.testing.assert_allclose(
        nngp.sample_network(1, kernel, IMAGES[1:], width=8), both[1:], rtol=64 * np.finfo(np.float32).eps
    )
    features = nngp.sample_features(1, kernel, IMAGES, width=8)
    assert features.shape == (2, 8 * 3 * 2)


DEEP = {
    "recurrent": ((nngp.recurrent(nngp.erf(), W, B), ERF, DENSE), IMAGES[:, :4, 0]),
    "pools": (
        (nngp.conv(3, W, B), RELU, nngp.average_pool(2), nngp.conv(3, W, B), RELU, nngp.global_pool(), DENSE),
        IMAGES,
    ),
    "norm": ((DENSE, nngp.layer_norm(0.1), ERF, DENSE, nngp.layer_norm(), ERF, DENSE), POINTS),
    "blocks": (
        (nngp.conv(3, W, B, stride=2), nngp.repeat(2, nngp.residual(RELU, nngp.conv(3, W, B))), ERF, FLAT, DENSE),
        IMAGES[:, :4, :4],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DEEP))
def test_deep_networks_tend_to_the_kernel(name):
    """By two widths, up to 1 / width^2; given the features the covariance is known."""
    layers, X = DEEP[name]
    kernel = nngp.serial(*layers)

    def covariances(key, width):
        def one(key):
            features = nngp.sample_features(key, kernel, X, width=width)
            return (B + W / features.shape[1] * features @ features.T)[jnp.array([0, 0, 1]), jnp.array([0, 1, 1])]

        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, 1_000)), np.float64)

    narrow, wide = (covariances(jax.random.key(i), width) for i, width in enumerate((32, 64)))
    assert mean_p_value(2 * wide - narrow, entries(kernel, X)) > FALSE_ALARM


class Unknown(nngp.Layer):
    def propagate(self, state):
        return state


FLOW = nngp.serial(DENSE, nngp.flow(RELU, DENSE))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.sample_network(0, FLOW, POINTS, width=8), "finite depth: flow"),
        (lambda: nngp.sample_network(0, nngp.serial(DENSE, Unknown()), POINTS, width=8), "no finite network.*Unknown"),
        (lambda: nngp.sample_network(0, nngp.serial(DENSE, head="ntk"), POINTS, width=8), 'head="nngp"'),
        (lambda: nngp.sample_network(0, nngp.NNGP(nngp.relu(), 1, W, B, head="ntk"), POINTS, width=8), 'head="nngp"'),
        (lambda: nngp.sample_network(0, nngp.serial(DENSE, RELU), POINTS, width=8), "must end in dense"),
        (lambda: nngp.sample_network(0, nngp.serial(*EXACT["pool"][0]), POINTS, width=8), "must be given images"),
        (lambda: nngp.sample_network(0, nngp.serial(DENSE), POINTS, width=0), "width must be at least 1"),
        (
            lambda: nngp.sample_network(0, nngp.serial(*EXACT["residual"][0]), POINTS, width=8, num_outputs=9),
            "num_outputs must be at most 8",
        ),
        (lambda: nngp.sample_network(0, 2.0 * nngp.serial(DENSE), POINTS, width=8), "layers put together by serial"),
        (lambda: nngp.sample_features(0, nngp.serial(*EXACT["residual"][0]), POINTS, width=8), "must end in dense"),
        (lambda: nngp.sample_features(0, nngp.serial(DENSE), POINTS, width=8), "after other layers"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
