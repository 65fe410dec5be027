"""The neural signature kernel against Bessel functions, its own order, and networks of finite width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import i0, j0
from scipy.stats import norm

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import nngp

LINES = np.array([[[0.0, 0.0], [1.0, 0.5]], [[0.0, 0.0], [0.25, -1.0]], [[0.5, 0.0], [1.25, 1.5]]])
SLOPES = LINES[:, 1] - LINES[:, 0]
PATHS = np.cumsum(np.sin(1.0 + np.arange(2 * 9 * 2.0) ** 1.25).reshape(2, 9, 2) / 2, axis=1)


def bessel(product):
    """I_0(2 sqrt z), which is J_0(2 sqrt -z) below zero."""
    root = 2 * np.sqrt(np.abs(product))
    return np.where(product >= 0, i0(root), j0(root))


@pytest.mark.parametrize(("order", "ratio"), [(1, 2.0), (2, 4.0)])
def test_straight_lines_have_bessel_functions(order, ratio):
    """A9: with 128 steps the second order errs by 2e-5 at most, relative to kernels above one."""
    exact = bessel(SLOPES @ SLOPES.T)
    with jax.enable_x64(True):
        errors = []
        for refine in (64, 128):
            kernel = nngp.NeuralSignature(nngp.monomial(1), 1.0, 0.0, 1.0, order, refine)
            matrix = kernel(jnp.asarray(LINES))
            assert np.array_equal(np.diagonal(matrix), kernel.diagonal(jnp.asarray(LINES)))
            errors.append(np.abs(np.asarray(matrix) - exact))
    assert np.all(np.abs(errors[0] / errors[1] / ratio - 1) < 0.05)
    if order == 2:
        assert np.all(errors[1] <= 2e-5 * np.maximum(1.0, exact))


def stencil(product, steps):
    """K_11 = (K_10 + K_01) (1 + p/2 + p^2/12) - K_00 (1 - p^2/12), that of the signature kernel alone."""
    p, K = product / steps**2, np.ones((steps + 1, steps + 1))
    for i in range(steps):
        for j in range(steps):
            K[i + 1, j + 1] = (K[i + 1, j] + K[i, j + 1]) * (1 + p / 2 + p**2 / 12) - K[i, j] * (1 - p**2 / 12)
    return K[-1, -1]


@pytest.mark.parametrize("product", [-1.0, 0.25, 1.0, 1.7, 2.0, 3.0])
def test_the_second_order_is_closer_than_the_published_stencil(product):
    """Everywhere; the own kernel too, of one line. At <a, b> = 1.7 the stencil errs by 1.2e-5 with 128 steps."""
    with jax.enable_x64(True):
        lines = jnp.array([[[0.0], [1.0]], [[0.0], [product]], [[0.0], [abs(product) ** 0.5]]])
        matrix = np.asarray(nngp.NeuralSignature(nngp.monomial(1), 1.0, 0.0, 1.0, 2, 32)(lines))
    assert abs(matrix[0, 1] - bessel(product)) < abs(stencil(product, 32) - bessel(product))
    assert abs(matrix[2, 2] - bessel(abs(product))) < abs(stencil(abs(product), 32) - bessel(abs(product)))


def test_orders_agree_in_the_limit():
    """Halved steps divide the error of the second order by four, and Richardson's limit of the first is near."""
    with jax.enable_x64(True):
        paths = jnp.asarray(PATHS)
        first = [nngp.NeuralSignature(nngp.relu(), 1.5, 0.25, 1.0, 1, refine)(paths) for refine in (32, 64)]
        second = [nngp.NeuralSignature(nngp.relu(), 1.5, 0.25, 1.0, 2, refine)(paths) for refine in (16, 32, 64)]
        limit = (4 * second[2] - second[1]) / 3
        falls = jnp.abs(second[0] - limit) / jnp.abs(second[1] - limit)
        assert jnp.all((falls > 3) & (falls < 5)), falls
        assert jnp.max(jnp.abs(2 * first[1] - first[0] - limit)) < 0.1 * jnp.max(jnp.abs(first[1] - limit))


def test_the_own_kernel_is_the_cross_kernel_with_itself():
    """The first order is symmetric cell by cell; in the second, rows and columns differ by its error."""
    with jax.enable_x64(True):
        paths = jnp.asarray(PATHS)
        kernel = nngp.NeuralSignature(nngp.erf(), 1.5, 0.25, 1.0, 1, 4)
        crossed = jnp.diagonal(kernel(paths, paths))
        assert jnp.max(jnp.abs(crossed / kernel.diagonal(paths) - 1)) <= 1e-13


@jax.jit
def network_covariances(key):
    """Mean products of states at the end, over many networks of 256 units, with Euler's steps along the paths."""
    width, steps = 256, jnp.diff(jnp.asarray(PATHS, jnp.float32), axis=1)

    def one(key):
        key_a, key_b, key_start = jax.random.split(key, 3)
        matrices = jax.random.normal(key_a, (2, width, width)) * (1.5 / width) ** 0.5
        biases = jax.random.normal(key_b, (2, width)) * 0.25**0.5
        start = jnp.tile(jax.random.normal(key_start, (width,)), (2, 1))

        def step(state, increment):
            moved = jnp.einsum("cuv,nv->ncu", matrices, jax.lax.erf(state)) + biases
            return state + jnp.einsum("nc,ncu->nu", increment, moved), None

        states = jax.lax.scan(step, start, steps.swapaxes(0, 1))[0]
        return states @ states.T / width

    return jax.lax.map(one, jax.random.split(key, 200))


def test_networks_of_finite_width_have_this_covariance():
    kernel = nngp.NeuralSignature(nngp.erf(), 1.5, 0.25, 1.0, order=1)
    draws = np.asarray(network_covariances(jax.random.key(0)), float)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    z = (draws.mean(axis=0) - kernel(jnp.asarray(PATHS, jnp.float32))) / error
    assert np.all(np.isfinite(z))
    assert 2 * norm.sf(np.max(np.abs(z))) * 3 > FALSE_ALARM, z


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.NeuralSignature(nngp.erf(), 0.0, 0.0, 1.0), "a_var"),
        (lambda: nngp.NeuralSignature(nngp.erf(), 1.0, 0.0, 1.0, order=3), "order"),
        (lambda: nngp.NeuralSignature(nngp.erf(), 1.0, 0.0, 1.0)(jnp.ones((3, 2))), "must be paths"),
        (lambda: nngp.NeuralSignature(nngp.erf(), 1.0, 0.0, 1.0)(jnp.ones((3, 1, 2))), "at least two points"),
        (lambda: nngp.NeuralSignature(nngp.erf(), 1.0, 0.0, 1.0)(jnp.ones((3, 4, 2)), jnp.ones((3, 4, 1))), "X2"),
    ],
)
def test_bad_arguments_are_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
