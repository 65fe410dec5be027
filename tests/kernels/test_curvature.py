"""Curvature, on targets whose Hessian is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.kernels import curvature


def rotated(spectrum, seed=0):
    """A Gaussian whose precision has these eigenvalues."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum), len(spectrum))))
    precision = jnp.asarray(rotation * np.asarray(spectrum) @ rotation.T)
    return bi.Target(lambda x, precision: -0.5 * x @ precision @ x, precision)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "Lanczos"])
@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_gaussians_have_the_ends_of_their_spectrum(dense, condition, monkeypatch):
    if not dense:
        monkeypatch.setattr(curvature, "_DENSE", 1)
    target = rotated(np.geomspace(0.3, 0.3 * condition, 120))
    found = kernels.estimate_curvature(target, jnp.zeros((1, 120)))
    np.testing.assert_allclose([found.m, found.M], [0.3, 0.3 * condition], rtol=1e-2)


def test_positions_are_pytrees_and_the_extremes_are_over_all_of_them():
    # Hess f = diag(3 a^2, 2): 3 at a = 1, 12 at a = 2
    target = bi.Target(lambda x: -0.25 * x["a"] ** 4 - jnp.sum(x["b"] ** 2))
    found = kernels.estimate_curvature(target, {"a": jnp.array([1.0, 2.0]), "b": jnp.zeros((2, 1))})
    np.testing.assert_allclose(found.smallest, [2, 2], rtol=1e-5)
    np.testing.assert_allclose(found.largest, [3, 12], rtol=1e-5)
    np.testing.assert_allclose([found.m, found.M], [2, 12], rtol=1e-5)
    position = {"a": jnp.asarray(2.0), "b": jnp.zeros(1)}
    np.testing.assert_allclose(curvature.curvature_spectrum(target, position), [2, 12], rtol=1e-5)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "Lanczos"])
def test_where_the_target_is_not_log_concave_it_is_said(dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(curvature, "_DENSE", 1)
    double_well = bi.Target(lambda x: -jnp.sum((x**2 - 1) ** 2))
    with pytest.raises(ValueError, match=r"position 1 has the eigenvalue -4 .*not log-concave"):
        kernels.estimate_curvature(double_well, jnp.stack([jnp.ones(70), jnp.zeros(70)]))


def test_what_cannot_be_resolved_is_refused():
    flat = bi.Target(lambda x: -0.5 * (x[0] - x[1]) ** 2)
    with pytest.raises(ValueError, match="flat"):
        kernels.estimate_curvature(flat, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="flat"):
        kernels.estimate_curvature(rotated([1e-9, 1.0]), jnp.zeros((1, 2), jnp.float32))
    with pytest.raises(ValueError, match="not finite"):
        kernels.estimate_curvature(lambda x: -jnp.sum(jnp.abs(x) ** 1.5), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="leading axis"):
        kernels.estimate_curvature(flat, jnp.zeros((0, 2)))
