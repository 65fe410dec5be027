"""Structural time series against the dense law of the series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.models import kalman_filter, local_level, local_linear_trend, rts_smoother

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
YS = np.array([1.0, 1.8, np.nan, 4.1, 4.9, np.nan])
THERE = ~np.isnan(YS)


def conditioned(mean, cov, r):
    """Mean and variances of the level given the data, and the log evidence."""
    S = cov[THERE][:, THERE] + r**2 * np.eye(THERE.sum())
    gain = np.linalg.solve(S, cov[THERE]).T
    found = mean + gain @ (YS - mean)[THERE], np.diag(cov - gain @ cov[THERE])
    return *found, scipy.stats.multivariate_normal(mean[THERE], S).logpdf(YS[THERE])


def check(model, expected):
    smoothed, ys = rts_smoother(model, jnp.asarray(YS)[:, None]), jnp.asarray(YS)[:, None]
    np.testing.assert_allclose(smoothed.means[:, 0], expected[0], rtol=20 * RTOL)
    np.testing.assert_allclose(smoothed.covariances[:, 0, 0], expected[1], rtol=50 * RTOL)
    np.testing.assert_allclose(kalman_filter(model, ys).log_evidence, expected[2], rtol=RTOL)


def test_local_level_is_a_random_walk_plus_noise():
    t = np.arange(6)
    cov = 2.0**2 + 0.7**2 * np.minimum.outer(t, t)
    check(local_level(0.7, 0.5, initial_scale=2.0, initial_mean=0.3), conditioned(np.full(6, 0.3), cov, 0.5))


@pytest.mark.parametrize("level_scale", [0.0, 0.4])
def test_local_linear_trend(level_scale):
    """mu_t = mu_0 + t nu_0 + (sum of level noises) + sum_s (t - s) times the slope noises of s = 1..t-1."""
    t = np.arange(6)
    waits = np.maximum(t[:, None] - t[None, 1:], 0)
    cov = 2.0**2 + 0.5**2 * np.outer(t, t) + level_scale**2 * np.minimum.outer(t, t) + 0.3**2 * waits @ waits.T
    model = local_linear_trend(
        level_scale, 0.3, 0.6, initial_scale=jnp.array([2.0, 0.5]), initial_mean=jnp.array([0.5, 1.0])
    )
    check(model, conditioned(0.5 + 1.0 * t, cov, 0.6))
    score = jax.jit(jax.grad(lambda model: kalman_filter(model, jnp.asarray(YS)[:, None]).log_evidence))(model)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(score))


def test_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match="level_scale must be finite and positive"):
        local_level(0.0, 1.0, initial_scale=1.0)
    with pytest.raises(ValueError, match="level_scale must be a scalar, finite and not negative, got -1"):
        local_linear_trend(-1.0, 1.0, 1.0, initial_scale=1.0)
    with pytest.raises(ValueError, match=r"initial_scale must be a scalar or have shape \(2,\), got \(3,\)"):
        local_linear_trend(1.0, 1.0, 1.0, initial_scale=jnp.ones(3))
