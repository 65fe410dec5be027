"""Kernels of networks against neural-tangents' values, quadrature, finite differences, and one another."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_moments import expectation
from scipy.special import erf

from bayesinf.models import nngp

VALUES = json.loads(Path(__file__).with_name("neural_tangents_values.json").read_text())
W, B = 1.75, 0.25
DUALS = {
    "relu": nngp.relu,
    "leaky_relu": lambda: nngp.leaky_relu(0.125),
    "abs": nngp.abs_,
    "erf": nngp.erf,
    "gelu": nngp.gelu,
    "sin": nngp.sin,
    "cos": nngp.cos,
    "square": lambda: nngp.monomial(2),
}


def wave(*shape):
    return np.sin(1.0 + np.arange(np.prod(shape), dtype=float) ** 1.25).reshape(shape)


def network(name):
    """The layers of this library for a network of the fixture, and the shape of its inputs."""
    dense, relu = nngp.dense(W, B), nngp.activation(nngp.relu())
    kind, _, rest = name.partition("_")
    if kind == "dense":
        return (dense, nngp.repeat(3, nngp.activation(DUALS[rest]()), dense)), (4, 5)
    if kind == "residual":
        return (dense, nngp.repeat(3, nngp.residual(relu, dense))), (4, 5)
    if kind == "layer":
        return (dense, nngp.layer_norm(1e-6), relu, dense, nngp.layer_norm(1e-6), relu, dense), (4, 5)
    if rest == "residual":
        conv, act = nngp.conv(3, W, B), nngp.activation(nngp.erf())
        return (conv, nngp.residual(act, conv), act, nngp.flatten(), dense), (3, 6, 5, 2)
    padding, pool = rest.split("_")
    conv = nngp.conv(3, W, B, padding=padding)
    end = nngp.flatten() if pool == "flatten" else nngp.global_pool()
    return (conv, relu, conv, relu, end, dense), (3, 6, 5, 2)


def kernel_of(name, head, dtype, *rows):
    """Values of this library, and of neural-tangents."""
    with jax.enable_x64(dtype == "float64"):
        layers, shape = network(name)
        X = jnp.asarray(wave(*shape), dtype)
        found = np.asarray(nngp.serial(*layers, head=head)(*(X[r] for r in rows or (slice(None),))))
    assert found.dtype == dtype
    return found, np.array(VALUES[name][head])


SLOW = ("conv_valid_flatten", "conv_valid_pool", "conv_circular_pool", "dense_leaky_relu", "dense_cos")  # to compile


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VALUES])
def test_kernels_are_those_of_neural_tangents(name):
    found, expected = kernel_of(name, "nngp", "float64")
    assert np.max(np.abs(found - expected)) <= 1e-12 * np.max(expected)
    found, expected = kernel_of(name, "ntk", "float64")
    # the tangent kernel sees angles, and theirs between an image and itself err by the root of rounding
    slack = np.eye(len(expected)) * (10 * math.sqrt(np.finfo(float).eps) if name.startswith("conv") else 0)
    assert np.all(np.abs(found - expected) <= (1e-12 + slack) * np.max(expected))


@pytest.mark.parametrize("name", ["dense_relu", "dense_gelu", "residual", "layer_norm", "conv_same_pool"])
def test_single_precision_and_parts_of_the_matrix(name):
    found, expected = kernel_of(name, "ntk", "float32")
    assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(expected)
    layers, shape = network(name)
    X = jnp.asarray(wave(*shape), "float32")
    kernel = nngp.serial(*layers, head="ntk")
    assert np.array_equal(np.diagonal(found), kernel.diagonal(X))
    # two rows meet themselves off the diagonal, where angles err by the root of rounding
    slack = 10 * math.sqrt(np.finfo("float32").eps)
    assert np.max(np.abs(kernel(X[:2], X) - expected[:2])) <= slack * np.max(expected)


@pytest.mark.parametrize(("name", "head"), [("relu", "ntk"), ("erf", "nngp")])
def test_the_shorthand_is_the_network(name, head):
    X = jnp.asarray(wave(4, 5), "float32")
    kernel = nngp.NNGP(DUALS[name](), 3, W, B, head=head)
    expected = np.array(VALUES[f"dense_{name}"][head])
    assert np.max(np.abs(kernel(X) - expected)) <= 1e-4 * np.max(expected)
    scaled = nngp.NNGP(DUALS[name](), 3, W, B, 0.5, head=head)
    assert np.allclose(scaled(X), 0.5 * kernel(X), rtol=1e-6)
    assert np.array_equal(scaled.diagonal(X), np.diagonal(scaled(X)))
    assert np.allclose(kernel(X[:, :, None]), kernel(X), rtol=1e-6)


def test_a_residual_network_of_the_shorthand():
    X = jnp.asarray(wave(4, 5), "float32")
    kernel = nngp.NNGP(nngp.relu(), 3, W, B, residual="plain", head="ntk")
    expected = np.array(VALUES["residual"]["ntk"])
    assert np.max(np.abs(kernel(X) - expected)) <= 1e-4 * np.max(expected)


def test_infinite_depth_is_the_limit_of_scaled_blocks():
    """The error falls as 1 / depth, and variances grow by exp(w t / 2), exactly."""
    with jax.enable_x64(True):
        X = jnp.asarray([[1.0, 0.0], [0.25, 1.0]])
        flow = nngp.NNGP(nngp.relu(), 64, 1.0, 0.0, residual="ode")(X)
        start = 0.5 * jnp.sum(X**2, axis=1)
        assert np.max(np.abs(jnp.diagonal(flow) / start - math.exp(0.5))) <= 1e-9  # (1/128)^5 / 120 a step, 64 steps
        slopes = [
            depth * (nngp.NNGP(nngp.relu(), depth, 1.0, 0.0, residual="scaled")(X) - flow)[0, 1]
            for depth in (100, 1000)
        ]
        assert abs(slopes[0] / slopes[1] - 1) < 0.05
        assert abs(slopes[1]) > 1e-3


def test_the_tangent_flow_is_the_limit_too():
    with jax.enable_x64(True):
        X = jnp.asarray([[1.0, 0.0], [0.25, 1.0]])
        flow = nngp.NNGP(nngp.erf(), 32, 1.5, 0.25, residual="ode", head="ntk")(X)
        errors = [
            np.max(np.abs(nngp.NNGP(nngp.erf(), depth, 1.5, 0.25, residual="scaled", head="ntk")(X) - flow))
            for depth in (100, 1000)
        ]
    assert abs(errors[0] / errors[1] / 10 - 1) < 0.05


def test_a_recurrent_kernel_is_its_recursion():
    """By quadrature, with the tangent kernel as sum over times of products of slopes."""
    w, b, u = 1.5, 0.125, 0.75
    X = wave(2, 4, 3)
    inner = np.einsum("itd,jtd->tij", X, X) / 3

    def moments(f, K):
        return np.array([[expectation(f, f, (), K[i, i], K[j, j], K[i, j]) for j in range(2)] for i in range(2)])

    def slope(x):
        return 2 / np.sqrt(np.pi) * np.exp(-(x**2))

    K = b + u * inner[0]
    T = K
    for t in range(1, 4):
        after = b + u * inner[t] + w * moments(erf, K)
        T, K = after + w * moments(slope, K) * T, after
    for head, expected in (("nngp", K), ("ntk", T)):
        with jax.enable_x64(True):
            kernel = nngp.serial(nngp.recurrent(nngp.erf(), w, b, input_var=u), head=head)
            found = np.asarray(kernel(jnp.asarray(X)))
        assert np.max(np.abs(found - expected)) <= 1e-12


def test_gradients_are_finite_at_duplicated_inputs_and_right():
    X = jnp.asarray(wave(4, 3)[[0, 0, 2, 3]], "float32")
    weights = jnp.asarray(wave(4, 4), "float32")

    @jax.jit
    def total(kernel, X):
        return jnp.sum(weights.astype(X.dtype) * kernel(X, X))

    for head in ("nngp", "ntk"):
        gradient = jax.grad(total, (0, 1))(nngp.NNGP(nngp.relu(), 3, W, B, head=head), X)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    with jax.enable_x64(True):
        X, step = jnp.asarray(wave(4, 3)), 1e-5
        kernel = nngp.NNGP(nngp.relu(), 3, W, B)
        by_kernel, by_inputs = jax.grad(total, (0, 1))(kernel, X)
        ahead, behind = (total(nngp.NNGP(nngp.relu(), 3, W + s, B), X) for s in (step, -step))
        assert abs(by_kernel.w_var - (ahead - behind) / (2 * step)) <= 1e-6 * abs(by_kernel.w_var)
        move = jnp.asarray(wave(4, 3)[::-1])
        ahead, behind = (total(kernel, X + s * move) for s in (step, -step))
        along = jnp.sum(by_inputs * move)
        assert abs(along - (ahead - behind) / (2 * step)) <= 1e-6 * abs(along)


def test_depth_costs_no_programs():
    """One loop, whatever the depth: the compiled text does not grow."""
    X = jnp.asarray(wave(4, 3), "float32")
    sizes = [
        len(jax.jit(lambda X, depth=depth: nngp.NNGP(nngp.relu(), depth, W, B)(X)).lower(X).as_text())
        for depth in (10, 1000)
    ]
    assert abs(sizes[1] - sizes[0]) < 100


X = jnp.ones((3, 2))
RELU = nngp.activation(nngp.relu())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.dense(-1.0), "w_var"),
        (lambda: nngp.dense(1.0, -1.0), "b_var"),
        (lambda: nngp.NNGP(nngp.relu(), 0, 1.0, 0.0), "depth"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 0.0, 0.0), "w_var"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0, residual="skip"), "residual"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0, head="nkt"), "head"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0)(X, jnp.ones((3, 4))), r"X2 must have inputs of shape \(2,\)"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0)(jnp.ones(3)), r"X\[:, None\]"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0)(X.at[0, 0].set(jnp.nan)), "X1 must not be NaN"),
        (lambda: nngp.NNGP(nngp.relu(), 1, 1.0, 0.0).diagonal(jnp.ones((0, 2))), "X must not be empty"),
        (lambda: nngp.serial(RELU, nngp.dense())(X), "must follow dense"),
        (lambda: nngp.serial(nngp.dense(), RELU, RELU, nngp.dense())(X), "must follow dense"),
        (lambda: nngp.serial(nngp.dense(), RELU)(X), "must end in dense"),
        (lambda: nngp.serial(nngp.conv())(jnp.ones((2, 4, 4, 1))), "end without places"),
        (lambda: nngp.serial(nngp.conv())(X), "must be given images"),
        (lambda: nngp.serial(nngp.recurrent(nngp.erf()))(X), "must be given sequences"),
        (lambda: nngp.conv(2), "size must be odd"),
        (lambda: nngp.conv(padding="reflect"), "padding"),
        (lambda: nngp.serial(nngp.conv(5, padding="valid"))(jnp.ones((2, 4, 4, 1))), "must not exceed the image"),
        (lambda: nngp.residual(RELU), "must end in dense"),
        (lambda: nngp.serial(nngp.dense(), nngp.repeat(2, nngp.dense(), RELU), nngp.dense())(X), "to be repeated"),
        (lambda: nngp.repeat(0, nngp.dense()), "times"),
        (lambda: nngp.serial(), "layers"),
        (lambda: nngp.piecewise_linear([1.0, 0.0], [0.0, 1.0, 0.0]), "knots must be increasing"),
        (lambda: nngp.piecewise_linear([0.0, 1.0], [0.0, 1.0]), "slopes must have shape"),
        (lambda: nngp.soft_threshold(-1.0), "tau"),
        (lambda: nngp.shifted_relu(1.0, 0.0), "clip"),
        (lambda: nngp.monomial(0), "degree"),
        (lambda: nngp.numerical(jnp.tanh, terms=0), "terms"),
    ],
)
def test_bad_arguments_are_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
