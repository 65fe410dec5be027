"""The filter and smoother by associative scans: what the sequential ones find, values and derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear_gaussian import problem

from bayesinf.models import LinearGaussian, autoregression_plus_noise, kalman_filter, local_linear_trend, rts_smoother

EPS = float(jnp.finfo(float).eps)
RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5


@partial(jax.jit, static_argnums=2)
def both(model, ys, method):
    """Everything that filter and smoother tell."""
    return *kalman_filter(model, ys, method=method), *rts_smoother(model, ys, method=method)


def overdetermined():
    """Fewer states than observations, in a start that is known exactly."""
    C = jnp.array([[1.0], [0.5], [-2.0]])
    model = LinearGaussian(jnp.ones(1), jnp.zeros((1, 1)), 0.9 * jnp.eye(1), jnp.eye(1), C, 0.7 * jnp.eye(3))
    return model, jnp.array([[1.0, jnp.nan, -2.0], [0.3, 0.1, 1.0], [jnp.nan] * 3, [0.4, 0.0, -1.0]])


def singular():
    """Of a transition covariance of rank 1, with 3 states."""
    model = autoregression_plus_noise(jnp.array([0.9, -0.6, 0.3]), 0.8, 0.5)
    return model, jnp.array([0.3, 1.2, jnp.nan, 0.4, -0.9, -1.5, 0.1])[:, None]


CASES = {
    "missing": problem,
    "overdetermined": overdetermined,
    "singular": singular,
    "single row": lambda: (problem()[0], problem()[1][:1]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_scans_find_what_the_sequential_methods_find(case):
    model, ys = CASES[case]()
    for found, expected in zip(both(model, ys, "associative"), both(model, ys, "sequential"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=RTOL, atol=RTOL)


def log_evidence(model, ys, method):
    return kalman_filter(model, ys, method=method).log_evidence


@pytest.mark.slow
def test_derivatives_are_those_of_the_sequential_methods():
    def wave(model, ys, method):
        """A function of everything that is told, with no symmetry."""
        return sum(jnp.sum(jnp.cos(a + jnp.arange(a.size).reshape(a.shape))) for a in both(model, ys, method))

    cases = [(wave, *problem()), (log_evidence, *singular())]
    for function, model, ys in cases:
        found, expected = (
            jax.jit(jax.grad(partial(function, ys=ys, method=method)))(model)
            for method in ("associative", "sequential")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert jnp.all(jnp.isfinite(a))
            np.testing.assert_allclose(a, b, rtol=100 * RTOL, atol=100 * RTOL)


def test_second_derivatives_are_refused():
    def function(persistence, method):
        return log_evidence(LinearGaussian.scalar(persistence, 0.5), jnp.ones((4, 1)), method)

    assert jnp.isfinite(jax.jit(jax.hessian(partial(function, method="sequential")))(0.5))
    with pytest.raises(ValueError, match="method='associative' has first derivatives only; take method='sequential'"):
        jax.hessian(partial(function, method="associative"))(0.5)


def test_many_models_in_one_call():
    ys = jnp.array([0.4, -1.0, jnp.nan, 2.0])[:, None]
    persistences = jnp.array([0.2, 0.9])
    found, expected = (
        jax.vmap(lambda a, method=method: log_evidence(LinearGaussian.scalar(a, 0.5), ys, method))(persistences)
        for method in ("associative", "sequential")
    )
    np.testing.assert_allclose(found, expected, rtol=RTOL)


STEPS = 1_000
S, U, R = 0.1, 0.01, 1.0  # scales of the level, the slope and the observations


def textbook(ys, mean, scale):
    """Filtered means, covariances and the increments of the log evidence, in float64 and by covariances."""
    A, Q, P = np.array([[1.0, 1.0], [0.0, 1.0]]), np.diag([S**2, U**2]), scale**2 * np.eye(2)
    means, covariances, increments = [], [], []
    for t, y in enumerate(np.asarray(ys, np.float64)[:, 0]):
        if t > 0:
            mean, P = A @ mean, A @ P @ A.T + Q
        V, residual = P[0, 0] + R**2, y - mean[0]
        increments.append(-0.5 * (np.log(2 * np.pi * V) + residual**2 / V))
        mean, P = mean + P[:, 0] / V * residual, P - np.outer(P[:, 0], P[:, 0]) / V
        means.append(mean)
        covariances.append(P)
    return np.array(means), np.array(covariances), np.array(increments)


@pytest.mark.parametrize(("level", "scale"), [(0.0, 1.0), (1e3, 1.0), (1e5, 1.0), (0.0, 1e3)])
def test_long_series_in_float32(level, scale):
    """Errors are of the order of the rounding of the data themselves, however far the level is from zero."""
    rng = np.random.default_rng(0)
    start = np.array([level, 0.5])
    slopes = start[1] + np.cumsum(U * rng.standard_normal(STEPS))
    ys = level + np.cumsum(slopes + S * rng.standard_normal(STEPS)) + R * rng.standard_normal(STEPS)
    ys = jnp.asarray(ys, jnp.float32)[:, None]
    model = local_linear_trend(S, U, R, initial_scale=scale, initial_mean=jnp.asarray(start))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    found = kalman_filter(model, ys, method="associative")
    assert found.log_evidence.dtype == jnp.float32

    # the textbook's model is the one in float32: its scales are rounded to 6e-8, which moves no covariance by more
    means, covariances, increments = textbook(ys, start, scale)
    ulp = float(np.finfo(np.float32).eps) * max(np.abs(means).max(), 1.0)
    np.testing.assert_allclose(found.filtered_means, means, atol=8 * ulp)
    trils = np.asarray(found.filtered_trils, np.float64)
    np.testing.assert_allclose(trils @ trils.mT, covariances, rtol=1e-4, atol=1e-6)
    # an increment moves by the residual in units of its variance, here less than 6, times the error of the mean
    np.testing.assert_allclose(found.log_evidence_increments, increments, rtol=1e-5, atol=6 * 8 * ulp)
    np.testing.assert_allclose(
        found.log_evidence, np.asarray(found.log_evidence_increments, np.float64).sum(), rtol=2e-7
    )


def test_bad_methods_are_named():
    model, ys = problem()
    for function in (kalman_filter, rts_smoother):
        with pytest.raises(ValueError, match="method must be one of 'sequential', 'associative', got 'parallel'"):
            function(model, ys, method="parallel")
