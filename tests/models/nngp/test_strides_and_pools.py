"""Strides and pools: against finite networks, whose first two moments with one hidden layer are exact at any width."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import nngp

W, B, WIDTH = 1.75, 0.25, 6
IMAGES = jnp.asarray(np.sin(1.0 + np.arange(2 * 7 * 6 * 2) ** 1.25).reshape(2, 7, 6, 2), jnp.float32)
PADS = {"same": {"mode": "constant"}, "circular": {"mode": "wrap"}}


def output(weights, image, padding, stride, pool, pool_stride):
    """A network of one hidden layer by XLA's convolution and window sum, with the factors of the tangent kernel."""
    filters, biases, last, bias = weights
    if padding != "valid":
        image = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), **PADS[padding])
    hidden = jax.lax.conv_general_dilated(
        image[None], filters, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    hidden = jax.nn.relu((W / (9 * 2)) ** 0.5 * hidden + B**0.5 * biases)
    hidden = jax.lax.reduce_window(
        hidden, 0.0, jax.lax.add, (pool, pool, 1), (pool_stride, pool_stride, 1), "VALID"
    ) / float(pool**2)
    last = last[: hidden.shape[0], : hidden.shape[1]]
    return (W / hidden.size) ** 0.5 * jnp.sum(last * hidden) + B**0.5 * bias


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def moments(key, padding, stride, pool, pool_stride):
    """Products of outputs, and of their gradients, at pairs of two images."""

    def one(key):
        keys = jax.random.split(key, 4)
        shapes = ((3, 3, 2, WIDTH), (WIDTH,), (7, 6, WIDTH), ())
        weights = tuple(jax.random.normal(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True))
        value = partial(output, padding=padding, stride=stride, pool=pool, pool_stride=pool_stride)
        outputs, slopes = zip(*(jax.value_and_grad(value)(weights, image) for image in IMAGES), strict=True)
        pairs = ((0, 0), (0, 1), (1, 1))
        tangents = [sum(jnp.sum(a * b) for a, b in zip(slopes[i], slopes[j], strict=True)) for i, j in pairs]
        return jnp.stack([outputs[i] * outputs[j] for i, j in pairs]), jnp.stack(tangents)

    return jax.lax.map(one, jax.random.split(key, 20_000), batch_size=500)


@pytest.mark.parametrize(
    ("padding", "stride", "pool", "pool_stride"),
    [
        ("same", 2, 2, 1),
        pytest.param("circular", 3, 2, 2, marks=pytest.mark.slow),  # to compile
        pytest.param("valid", 2, 1, 1, marks=pytest.mark.slow),
        pytest.param("same", 1, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_kernels_are_the_moments_of_finite_networks(padding, stride, pool, pool_stride):
    layers = (
        nngp.conv(3, W, B, padding=padding, stride=stride),
        nngp.activation(nngp.relu()),
        nngp.average_pool(pool, pool_stride),
        nngp.flatten(),
        nngp.dense(W, B),
    )
    for draws, head in zip(
        moments(jax.random.key(0), padding, stride, pool, pool_stride), ("nngp", "ntk"), strict=True
    ):
        expected = np.asarray(nngp.serial(*layers, head=head)(IMAGES), np.float64)[[0, 0, 1], [0, 1, 1]]
        assert mean_p_value(np.asarray(draws, np.float64), expected) > FALSE_ALARM


CONV, RELU, END = nngp.conv(3, W, B, stride=2), nngp.activation(nngp.relu()), (nngp.flatten(), nngp.dense(W, B))


def close(first, second):
    return np.max(np.abs(first - second)) <= 64 * np.finfo(np.float32).eps * np.max(np.abs(second))


def test_pools_of_one_pixel_change_nothing():
    """With them covariances are kept for all pairs of pixels, and without for equal pixels: two ways of one stride."""
    with_pairs = nngp.serial(CONV, RELU, nngp.average_pool(1), CONV, RELU, *END)
    assert close(with_pairs(IMAGES), nngp.serial(CONV, RELU, CONV, RELU, *END)(IMAGES))


def test_a_pool_of_everything_is_the_global_one():
    square = IMAGES[:, :6]
    found, expected = (
        nngp.serial(CONV, RELU, pool, *end)(square)
        for pool, end in ((nngp.average_pool(3), END), (nngp.global_pool(), END[1:]))
    )
    assert close(found, expected)
    sequences = IMAGES[:, :, 0]
    layers = nngp.dense(W, B), RELU
    found = nngp.serial(*layers, nngp.average_pool(7), *END)(sequences)
    assert close(found, nngp.serial(*layers, nngp.global_pool(), END[1])(sequences))


def test_a_stride_takes_every_other_place_of_the_whole():
    """Of a linear map: K of one pixel is that of a filter that sees no more than it does there."""
    by_stride = nngp.serial(nngp.conv(3, W, B, padding="circular", stride=2), nngp.flatten(), nngp.dense())(IMAGES)
    rows, columns = IMAGES.shape[1], IMAGES.shape[2]
    expected = np.zeros((2, 2))
    places = [(i, j) for i in range(0, rows, 2) for j in range(0, columns, 2)]
    for i, j in places:  # roll the place to the corner, and cut out what the filter sees
        seen = jnp.roll(IMAGES, (1 - i, 1 - j), (1, 2))[:, :3, :3]
        single = nngp.serial(nngp.conv(3, W, B, padding="valid"), nngp.flatten(), nngp.dense())(seen)
        expected += np.asarray(single) / len(places)
    assert close(by_stride, expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.conv(stride=0), "stride must be at least 1"),
        (lambda: nngp.conv(stride=1.5), "stride must be a whole number"),
        (lambda: nngp.average_pool(0), "size must be at least 1"),
        (lambda: nngp.serial(CONV, RELU, nngp.average_pool(9), *END)(IMAGES), "size must not exceed the image"),
        (
            lambda: nngp.serial(nngp.dense(), nngp.average_pool(2), nngp.dense())(jnp.ones((2, 3))),
            "images or sequences",
        ),
        (lambda: nngp.serial(CONV, nngp.residual(RELU, CONV), *END)(IMAGES), "branch must keep the places"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
