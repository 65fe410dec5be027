"""Sums and products of kernels of both kinds: those of Gaussian processes, and those of infinitely wide networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models import gp, nngp

X = jnp.asarray(np.sin(1.0 + np.arange(7 * 3) ** 1.25).reshape(7, 3), jnp.float32)
NETWORK = nngp.NNGP(nngp.relu(), 2, 1.75, 0.25)
LAYERS = nngp.serial(nngp.dense(2.0, 0.5), nngp.activation(nngp.erf()), nngp.dense())
STATIONARY = gp.RBF(0.7)

COMBINED = {
    "number times": (2.5 * NETWORK, lambda n, s, k: 2.5 * n),
    "times number": (NETWORK * jnp.asarray(2.5), lambda n, s, k: 2.5 * n),
    "number plus": (1.5 + NETWORK, lambda n, s, k: 1.5 + n),
    "array of NumPy times": (np.asarray(2.5) * NETWORK, lambda n, s, k: 2.5 * n),
    "network plus kernel": (NETWORK + STATIONARY, lambda n, s, k: n + k),
    "kernel times network": (STATIONARY * NETWORK, lambda n, s, k: k * n),
    "network times network": (NETWORK * LAYERS, lambda n, s, k: n * s),
    "all": (2.0 * (NETWORK + 0.5) * LAYERS + 3.0 * STATIONARY, lambda n, s, k: 2.0 * (n + 0.5) * s + 3.0 * k),
}


@pytest.mark.parametrize("name", list(COMBINED))
def test_combined_kernels_are_elementwise(name):
    kernel, expected = COMBINED[name]
    parts = [part(X, X[:4]) for part in (NETWORK, LAYERS, STATIONARY)]
    bound = 32 * np.finfo(np.float32).eps * np.max(np.abs(expected(*parts)))
    assert np.max(np.abs(kernel(X, X[:4]) - expected(*parts))) <= bound
    matrix = kernel(X)  # of equal inputs the diagonal is exact
    assert np.array_equal(np.diagonal(matrix), kernel.diagonal(X))
    assert np.max(np.abs(matrix[:, :4] - expected(*parts))) <= 10 * bound


def test_an_array_of_numpy_makes_a_batch_of_kernels():
    batch = np.array([1.0, 3.0]) * NETWORK
    assert isinstance(batch, gp.Product)
    assert np.allclose(batch(X), np.array([1.0, 3.0])[:, None, None] * NETWORK(X))
    assert gp.GP(batch, X, noise=0.1).log_prob(X[:, 0]).shape == (2,)


def test_multiples_of_a_kernel_of_images():
    images = jnp.asarray(np.sin(1.0 + np.arange(3 * 4 * 4 * 2) ** 1.25).reshape(3, 4, 4, 2), jnp.float32)
    network = nngp.serial(nngp.conv(3), nngp.activation(nngp.relu()), nngp.flatten(), nngp.dense())
    found = gp.GP(2.0 * network + 0.5, images, noise=0.1).factor.covariance
    assert np.allclose(found, 2.0 * network(images) + 0.5 + 0.1 * np.eye(3), rtol=1e-5)


def test_parameters_of_both_kinds_are_learnt_together():
    """The slope of the density along scale, of noise and of the variance of weights, against differences."""
    with jax.enable_x64(True):
        inputs, y = jnp.asarray(X, float), jnp.asarray(X[:, 0], float)

        @jax.jit
        def value(scale, w_var):
            network = nngp.NNGP(nngp.relu(), 2, w_var, 0.25)
            return gp.GP(scale * network + gp.Matern32(1.0), inputs, noise=0.1).log_prob(y)

        slopes = jax.grad(value, (0, 1))(2.0, 1.75)
        step = 1e-5
        assert abs(slopes[0] - (value(2.0 + step, 1.75) - value(2.0 - step, 1.75)) / (2 * step)) < 1e-6
        assert abs(slopes[1] - (value(2.0, 1.75 + step) - value(2.0, 1.75 - step)) / (2 * step)) < 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: -2.0 * NETWORK, "variance must be finite and not negative"),
        (lambda: NETWORK + "noise", "variance must be a number"),
        (lambda: NETWORK * gp.RBF, "kernel must be a covariance function"),
        (lambda: (NETWORK + STATIONARY)(X[:, 0]), r"X\[:, None\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
