"""Covariance functions: their values, their algebra, gradients where points coincide, and those of other libraries."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bayesinf.models import gp
from bayesinf.models.gp.covariances import diagonal, gram

RNG = np.random.default_rng(1)
X1, X2 = jnp.asarray(RNG.normal(size=(5, 2))), jnp.asarray(RNG.normal(size=(4, 2)))
SCALES = np.array([0.7, 1.6])


def distance(A, B, scales):
    return np.sqrt(np.sum(((A[:, None] - B[None]) / scales) ** 2, axis=-1))


def matern(A, B, scales, smoothness):
    """The general formula, by Bessel functions."""
    a = np.sqrt(2 * smoothness) * distance(A, B, scales)
    safe = np.where(a == 0, 1.0, a)
    value = (
        2 ** (1 - smoothness) / scipy.special.gamma(smoothness) * safe**smoothness * scipy.special.kv(smoothness, safe)
    )
    return np.where(a == 0, 1.0, value)


KERNELS = {
    "RBF": (gp.RBF(jnp.asarray(SCALES), 2.0), lambda A, B: 2.0 * np.exp(-0.5 * distance(A, B, SCALES) ** 2)),
    "Matern12": (gp.Matern12(jnp.asarray(SCALES)), lambda A, B: matern(A, B, SCALES, 0.5)),
    "Matern32": (gp.Matern32(jnp.asarray(SCALES)), lambda A, B: matern(A, B, SCALES, 1.5)),
    "Matern52": (gp.Matern52(jnp.asarray(SCALES)), lambda A, B: matern(A, B, SCALES, 2.5)),
    "RationalQuadratic": (
        gp.RationalQuadratic(0.7, 1.0, 1.3),
        lambda A, B: (1 + distance(A, B, 0.7) ** 2 / (2 * 1.3)) ** -1.3,
    ),
    "Linear": (gp.Linear(2.0, 3.0), lambda A, B: 3.0 * A @ B.T / 4.0),
    "Constant": (gp.Constant(1.5), lambda A, B: np.full((len(A), len(B)), 1.5)),
    "sum of products": (
        2.0 * gp.RBF(0.7) * gp.Linear() + gp.Matern32(1.0) * 0.5 + 1.0,
        lambda A, B: 2.0 * np.exp(-0.5 * distance(A, B, 0.7) ** 2) * (A @ B.T) + 0.5 * matern(A, B, 1.0, 1.5) + 1.0,
    ),
}


@pytest.mark.parametrize("name", list(KERNELS))
def test_values_are_those_of_the_formulas(name):
    kernel, expected = KERNELS[name]
    bound = 1_000 * float(jnp.finfo(jnp.result_type(float)).eps)
    np.testing.assert_allclose(kernel(X1, X2), expected(np.asarray(X1), np.asarray(X2)), atol=bound)
    np.testing.assert_allclose(kernel.diagonal(X1), np.diag(expected(np.asarray(X1), np.asarray(X1))), atol=bound)


def test_periodic_kernel_on_the_line():
    x = jnp.linspace(0.0, 3.0, 7)
    expected = np.exp(-2.0 * np.sin(np.pi * np.subtract.outer(x, x) / 1.3) ** 2 / 0.8**2)
    np.testing.assert_allclose(
        gp.Periodic(0.8, 1.0, 1.3)(x), expected, atol=1_000 * float(jnp.finfo(jnp.result_type(float)).eps)
    )


@pytest.mark.parametrize("name", list(KERNELS))
def test_gradients_are_finite_where_points_coincide(name):
    twice = jnp.concatenate([X1, X1])

    def value(kernel, X):
        return jnp.sum(jnp.sin(kernel(X, X)))

    slopes = jax.jit(jax.grad(value, (0, 1)))(KERNELS[name][0], twice)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


def test_nearby_points_are_told_apart_in_float32():
    """At a distance of 1e-3 around 1e3; squares of the points alone are known to 0.06."""
    x = jnp.array([1000.0, 1000.0 + 2.0**-10], jnp.float32)
    with jax.enable_x64(False):
        found = 1.0 - gp.RBF(jnp.float32(2.0**-8))(x)[0, 1]
    np.testing.assert_allclose(found, 1.0 - np.exp(-0.5 / 16.0), rtol=1e-5)


def test_a_new_parameter_compiles_nothing():
    traces = []

    @jax.jit
    def value(kernel):
        traces.append(1)
        return kernel(X1)

    value(2.0 * gp.RBF(1.0))
    value(3.0 * gp.RBF(0.5))
    assert len(traces) == 1


@pytest.mark.skipif(importlib.util.find_spec("tinygp") is None, reason="needs tinygp")
def test_kernels_of_tinygp_pass_unchanged():
    """Their call with one argument is the diagonal; the density must not be that of a diagonal matrix."""
    import tinygp

    kernel = 2.0 * tinygp.kernels.Matern32(0.8)
    assert gram(kernel, X1, X1).shape == (5, 5)
    np.testing.assert_allclose(diagonal(kernel, X1), 2.0)
    x, y = X1[:, 0], X1[:, 1]
    found, expected = (gp.GP(k, x, noise=0.1).log_prob(y) for k in (kernel, 2.0 * gp.Matern32(0.8)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    batch = jax.vmap(lambda scale: gp.GP(tinygp.kernels.Matern32(scale), x, noise=0.1))(jnp.array([0.5, 0.8]))
    assert batch.condition(y, x).mean.shape == (2, 5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gp.RBF(-1.0), "lengthscale must be finite and positive"),
        (lambda: gp.RBF(1.0, -1.0), "variance must be finite and not negative"),
        (lambda: gp.Periodic(1.0, 1.0, 0.0), "period must be finite and positive"),
        (lambda: gp.RationalQuadratic(1.0, 1.0, 0.0), "alpha must be finite and positive"),
        (lambda: gp.RBF(jnp.ones(3))(X1), "lengthscale must be a scalar, or have a last axis of length 1 or 2"),
        (lambda: gp.RBF()(jnp.ones((2, 2, 2))), "X1 must have shape"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
