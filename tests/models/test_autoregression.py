"""Autoregressions with noise against the dense law of the series."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import autoregression_plus_noise, kalman_filter, rts_smoother, sample_posterior
from bayesinf.models.state_space import log_prob

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
PHI, Q, R = np.array([0.9, -0.6, 0.3]), 0.8, 0.5
SERIES = np.array([0.3, 1.2, np.nan, 0.4, -0.9, -1.5, 0.1, np.nan, np.nan, np.nan, 0.8])
STEPS = len(SERIES)


def autocovariances(phi, num):
    """By the Lyapunov equation of the companion form, then by recursion."""
    p = len(phi)
    A = np.eye(p, k=-1)
    A[0] = phi
    found = list(scipy.linalg.solve_discrete_lyapunov(A, np.diag([Q**2] + [0.0] * (p - 1)))[0])
    while len(found) < num:
        found.append(np.dot(phi, found[-1 : -p - 1 : -1]))
    return np.array(found[:num])


@lru_cache
def dense():
    """Mean and covariance of x given the data, and the log evidence."""
    prior = scipy.linalg.toeplitz(autocovariances(PHI, STEPS))
    there = ~np.isnan(SERIES)
    S = prior[there][:, there] + R**2 * np.eye(there.sum())
    gain = np.linalg.solve(S, prior[there]).T
    log_evidence = scipy.stats.multivariate_normal(cov=S).logpdf(SERIES[there])
    return gain @ SERIES[there], prior - gain @ prior[there], log_evidence


def in_form(form, phi=PHI, q=Q, r=R):
    model = autoregression_plus_noise(jnp.asarray(phi), q, r, form=form)
    if form == "companion":
        return model, jnp.asarray(SERIES)[:, None]
    return model, jnp.pad(jnp.asarray(SERIES), (0, -STEPS % len(phi)), constant_values=jnp.nan).reshape(-1, len(phi))


@pytest.mark.parametrize("form", ["companion", "blocks"])
def test_filter_and_smoother_are_those_of_the_dense_law(form):
    model, ys = in_form(form)
    mean, cov, log_evidence = dense()
    np.testing.assert_allclose(kalman_filter(model, ys).log_evidence, log_evidence, rtol=RTOL)
    smoothed = rts_smoother(model, ys)
    if form == "companion":
        means, variances, lagged = smoothed.means[:, 0], smoothed.covariances[:, 0, 0], smoothed.covariances[2:, 0, 2]
        expected_lagged = np.diag(cov, 2)
        np.testing.assert_allclose(smoothed.cross_covariances[:, 0, 0], np.diag(cov, 1), atol=20 * RTOL)
    else:
        means, variances = smoothed.means.ravel(), np.diagonal(smoothed.covariances, axis1=1, axis2=2).ravel()
        lagged = smoothed.covariances[:3, 0, 2]
        expected_lagged = np.diag(cov, 2)[:9:3]
    np.testing.assert_allclose(means[:STEPS], mean, atol=20 * RTOL)
    np.testing.assert_allclose(variances[:STEPS], np.diag(cov), atol=20 * RTOL)
    np.testing.assert_allclose(lagged, expected_lagged, atol=20 * RTOL)


@pytest.mark.parametrize("phi", [[0.7], [1.2, -0.5], [0.9, -0.6, 0.3], [0.2, 0.1, -0.4, 0.3, 0.15]])
def test_the_start_is_stationary(phi):
    phi = np.array(phi)
    expected = scipy.linalg.toeplitz(autocovariances(phi, len(phi)))
    for form in ("companion", "blocks"):
        model, _ = in_form(form, phi)
        tril, A, L = (
            np.asarray(m, np.float64) for m in (model.initial_tril, model.transition_matrix, model.transition_tril)
        )
        np.testing.assert_allclose(tril @ tril.T, expected, rtol=20 * RTOL, atol=20 * RTOL)
        np.testing.assert_allclose(A @ expected @ A.T + L @ L.T, expected, rtol=20 * RTOL, atol=20 * RTOL)


def test_blocks_have_the_density_of_the_autoregression():
    """Given the block before, it is the product of one Gaussian a value: what particle smoothers weigh by."""
    model, _ = in_form("blocks")
    x = np.array([0.2, -0.5, 1.0, 0.7, 0.1, -0.4])
    expected = sum(scipy.stats.norm(np.dot(PHI, x[t - 3 : t][::-1]), Q).logpdf(x[t]) for t in range(3, 6))
    law = model.transition(jnp.asarray(x[:3]), jnp.asarray(1))
    np.testing.assert_allclose(log_prob(law, jnp.asarray(x[3:])), expected, rtol=10 * RTOL)


def test_the_companion_form_has_no_density():
    @jax.jit
    def density(model, x_prev, x):
        return log_prob(model.transition(x_prev, jnp.asarray(1)), x)

    model, _ = in_form("companion")
    assert not jnp.isfinite(density(model, jnp.array([1.0, -0.5, 0.2]), jnp.array([0.7, 1.0, -0.5])))


def test_posterior_samples_of_the_singular_form_are_consistent_and_right():
    model, ys = in_form("companion")
    mean, cov, _ = dense()
    paths = np.asarray(sample_posterior(0, model, ys, 20_000), np.float64)
    np.testing.assert_allclose(paths[:, 1:, 1:], paths[:, :-1, :-1], atol=100 * RTOL)
    x = paths[:, :, 0] - mean
    assert mean_p_value(x, 0.0) > FALSE_ALARM
    products = (x[:, :, None] * x[:, None, :])[:, *np.triu_indices(STEPS)]
    assert mean_p_value(products, cov[np.triu_indices(STEPS)]) > FALSE_ALARM


@pytest.mark.parametrize(("form", "proposal"), [("companion", "bootstrap"), ("blocks", "guided")])
def test_evidence_is_unbiased(form, proposal):
    model, ys = in_form(form)

    def log_evidence(key):
        return bi.kernels.particle_filter(
            key, model, ys, num_particles=32, proposal=proposal, store="none"
        ).log_evidence

    report = evidence_is_unbiased(0, log_evidence, dense()[2], num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


def test_the_score_is_that_of_the_dense_law():
    def dense_score(k, h=1e-4):
        """Central differences, of error h^2."""
        values = []
        for sign in (1, -1):
            phi = PHI + sign * h * np.eye(3)[k]
            there = ~np.isnan(SERIES)
            S = scipy.linalg.toeplitz(autocovariances(phi, STEPS))[there][:, there] + R**2 * np.eye(there.sum())
            values.append(scipy.stats.multivariate_normal(cov=S).logpdf(SERIES[there]))
        return (values[0] - values[1]) / (2 * h)

    expected = [dense_score(k) for k in range(3)]
    for form in ("companion", "blocks"):
        ys = in_form(form)[1]

        def log_evidence(phi, form=form, ys=ys):
            return kalman_filter(autoregression_plus_noise(phi, Q, R, form=form), ys).log_evidence

        np.testing.assert_allclose(jax.jit(jax.grad(log_evidence))(jnp.asarray(PHI)), expected, rtol=1e-3)


def test_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match=r"coefficients must be those of a stationary autoregression.*\(-1, 1\)"):
        autoregression_plus_noise(jnp.array([1.2, -0.1]), 1.0, 1.0)  # 1 - 1.2 + 0.1 < 0: a root inside the circle
    with pytest.raises(ValueError, match="coefficients must be those of a stationary"):
        autoregression_plus_noise(jnp.array([1.0]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"coefficients must have shape \(p,\)"):
        autoregression_plus_noise(0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match="observation_scale must be finite and positive"):
        autoregression_plus_noise(jnp.array([0.5]), 1.0, 0.0)
    with pytest.raises(ValueError, match="form must be one of 'companion', 'blocks', got 'block'"):
        autoregression_plus_noise(jnp.array([0.5]), 1.0, 1.0, form="block")
