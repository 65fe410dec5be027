"""The linear Gaussian model against dense linear algebra, and against fixed numbers."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import LinearGaussian, kalman_filter, rts_smoother, sample_posterior
from bayesinf.models.state_space import log_prob, observation_log_prob

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5

OW = (0.7, 0.2, 1.0, 1.0)
PPG = (0.97, 0.60, 0.54, 0.33)
# sum of E x_t, of E x_t^2, of E x_t x_{t+1}, and the log evidence, to the digits given
TABLE = [
    (OW, 50, (0.44561021, 4.81564536, 3.50349103, -70.89868222), 1.1e-8),
    (OW, 100, (1.3000, 9.3299, 6.8320, -137.3246), 5.1e-5),
    (OW, 200, (0.0493, 18.2256, 13.2996, -272.7212), 5.1e-5),
    (OW, 400, (1.6918, 36.4658, 26.6732, -547.6110), 5.1e-5),
    (PPG, 50, (1.79054101, 129.59137616, 109.54469942, -66.95964360), 1.1e-8),
]


def series(last):
    t = np.arange(last + 1)
    return jnp.asarray(1.2 * np.sin(0.35 * t) + 0.6 * np.cos(1.7 * t + 0.4) + 0.3 * np.sin(0.11 * t**2))[:, None]


@pytest.mark.parametrize(("parameters", "last", "expected", "digits"), TABLE)
def test_fixed_numbers(parameters, last, expected, digits):
    model, ys = LinearGaussian.scalar(*parameters), series(last)
    means, covariances, crosses = (np.asarray(a, np.float64).squeeze() for a in rts_smoother(model, ys))
    found = (
        means.sum(),
        (means**2 + covariances).sum(),
        (means[1:] * means[:-1] + crosses).sum(),
        kalman_filter(model, ys).log_evidence,
    )
    np.testing.assert_allclose(found, expected, rtol=0 if jax.config.jax_enable_x64 else 1e-5, atol=max(digits, RTOL))


@lru_cache
def problem(num_steps=6):
    """A model with nothing symmetric about it, data of which some are missing, and their joint law in float64."""
    rng = np.random.default_rng(1)
    model = LinearGaussian(
        initial_mean=jnp.array([0.5, -1.0, 0.2]),
        initial_tril=jnp.array([[1.0, 0, 0], [0.3, 0.8, 0], [-0.2, 0.1, 0.5]]),
        transition_matrix=jnp.array([[0.9, 0.2, 0.0], [-0.3, 0.7, 0.1], [0.0, 0.4, 0.5]]),
        transition_tril=jnp.array([[0.4, 0, 0], [0.1, 0.3, 0], [0.05, -0.1, 0.6]]),
        observation_matrix=jnp.array([[1.0, 0.0, -0.5], [0.2, 0.9, 0.3]]),
        observation_tril=jnp.array([[0.5, 0], [0.35, 0.4]]),
        transition_offset=jnp.array([0.1, 0.0, -0.2]),
        observation_offset=jnp.array([1.0, -2.0]),
    )
    ys = rng.standard_normal((num_steps, 2)) + np.array([1.0, -2.0])
    ys[2] = np.nan
    ys[3, 1] = np.nan
    ys[5, 0] = np.nan
    return model, jnp.asarray(ys)


@lru_cache
def joint():
    """Mean and covariance of (x_0..x_{T-1}) given the data, and the log evidence, by one dense Gaussian."""
    model, ys = problem()
    m = {field.name: np.asarray(getattr(model, field.name), np.float64) for field in dataclasses.fields(model)}
    num_steps, d = len(ys), 3
    mean = np.zeros((num_steps, d))
    mixing = np.zeros((num_steps, d, num_steps, d))  # x = mean + mixing noise
    mean[0], mixing[0, :, 0] = m["initial_mean"], m["initial_tril"]
    for t in range(1, num_steps):
        mean[t] = m["transition_matrix"] @ mean[t - 1] + m["transition_offset"]
        mixing[t] = np.einsum("ij,jsk->isk", m["transition_matrix"], mixing[t - 1])
        mixing[t, :, t] += m["transition_tril"]
    mixing = mixing.reshape(num_steps * d, -1)
    prior, flat = mixing @ mixing.T, np.asarray(ys, np.float64).ravel()
    is_there = ~np.isnan(flat)
    C = scipy.linalg.block_diag(*[m["observation_matrix"]] * num_steps)[is_there]
    R = scipy.linalg.block_diag(*[m["observation_tril"] @ m["observation_tril"].T] * num_steps)[is_there][:, is_there]
    predicted = C @ mean.ravel() + np.tile(m["observation_offset"], num_steps)[is_there]
    S = C @ prior @ C.T + R
    gain = np.linalg.solve(S, C @ prior).T
    log_evidence = scipy.stats.multivariate_normal(predicted, S).logpdf(flat[is_there])
    return mean.ravel() + gain @ (flat[is_there] - predicted), prior - gain @ C @ prior, log_evidence


def test_filter_smoother_and_evidence_are_those_of_the_joint_gaussian():
    model, ys = problem()
    mean, cov, log_evidence = joint()
    filtered = kalman_filter(model, ys)
    np.testing.assert_allclose(filtered.log_evidence, log_evidence, rtol=RTOL)
    np.testing.assert_allclose(filtered.log_evidence_increments.sum(), log_evidence, rtol=RTOL)
    smoothed = rts_smoother(model, ys)
    blocks = cov.reshape(6, 3, 6, 3)
    np.testing.assert_allclose(smoothed.means.ravel(), mean, atol=20 * RTOL)
    for t in range(6):
        np.testing.assert_allclose(smoothed.covariances[t], blocks[t, :, t], atol=20 * RTOL)
    for t in range(5):
        np.testing.assert_allclose(smoothed.cross_covariances[t], blocks[t, :, t + 1], atol=20 * RTOL)
    # the last filtered law is the smoothed one, and trils are Cholesky factors
    np.testing.assert_allclose(filtered.filtered_means[-1], smoothed.means[-1], atol=RTOL)
    for trils in (filtered.filtered_trils, filtered.predicted_trils):
        assert np.all(np.triu(trils, 1) == 0)
        assert np.all(np.diagonal(trils, axis1=1, axis2=2) > 0)


def test_no_data_leaves_the_prior():
    model, ys = problem()
    filtered = kalman_filter(model, jnp.full_like(ys, jnp.nan))
    assert filtered.log_evidence == 0
    np.testing.assert_allclose(filtered.filtered_means, filtered.predicted_means)


def test_posterior_samples_have_the_joint_law():
    model, ys = problem()
    mean, cov, _ = joint()
    paths = np.asarray(sample_posterior(0, model, ys, 20_000), np.float64).reshape(20_000, -1) - mean
    assert mean_p_value(paths, np.zeros(18)) > FALSE_ALARM
    products = (paths[:, :, None] * paths[:, None, :])[:, *np.triu_indices(18)]
    assert mean_p_value(products, cov[np.triu_indices(18)]) > FALSE_ALARM


def test_simulated_series_have_the_joint_law():
    model, _ = problem()
    keys = jax.random.split(jax.random.key(3), 20_000)
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, model, 2)))(keys)
    A, Q = np.asarray(model.transition_matrix), np.asarray(model.transition_tril)
    P0 = np.asarray(model.initial_tril @ model.initial_tril.T)
    C, R = np.asarray(model.observation_matrix), np.asarray(model.observation_tril)
    mean_1 = A @ np.asarray(model.initial_mean) + np.asarray(model.transition_offset)
    predicted = C @ mean_1 + np.asarray(model.observation_offset)
    assert mean_p_value(ys[:, 1], predicted) > FALSE_ALARM
    P1 = A @ P0 @ A.T + Q @ Q.T
    centred = np.concatenate([xs[:, 0] - model.initial_mean, xs[:, 1] - mean_1, ys[:, 1] - predicted], axis=1)
    cov = np.block(
        [[P0, P0 @ A.T, P0 @ A.T @ C.T], [A @ P0, P1, P1 @ C.T], [C @ A @ P0, C @ P1, C @ P1 @ C.T + R @ R.T]]
    )
    products = (centred[:, :, None] * centred[:, None, :])[:, *np.triu_indices(8)]
    assert mean_p_value(products, cov[np.triu_indices(8)]) > FALSE_ALARM


@pytest.mark.parametrize("row", [0, 2, 3, 5])
def test_proposals_are_the_optimal_ones(row):
    """m(x | x_prev) g(y | x) = proposal(x) exp(lookahead), whatever is missing of y."""
    model, ys = problem()
    x_prev, x, y, t = jnp.array([0.3, -0.8, 1.1]), jnp.array([0.5, -0.2, 0.7]), ys[row], jnp.asarray(row)
    target = log_prob(model.transition(x_prev, t), x) + observation_log_prob(model, x, y, t)
    found = log_prob(model.proposal(x_prev, y, t), x) + model.lookahead(x_prev, y, t)
    np.testing.assert_allclose(found, target, rtol=RTOL, atol=10 * RTOL)
    ratios = [
        log_prob(model.initial(), z) + observation_log_prob(model, z, y, t) - log_prob(model.initial_proposal(y), z)
        for z in (x, x_prev)
    ]
    np.testing.assert_allclose(*ratios, rtol=RTOL, atol=10 * RTOL)


def test_transition_bound_is_the_density_at_its_mode():
    for model in (problem()[0], LinearGaussian.scalar(*OW)):
        x_prev, t = jnp.ones(model.initial_mean.shape), jnp.asarray(1)
        mode = model.transition(x_prev, t).mean
        np.testing.assert_allclose(
            model.log_transition_bound(t), log_prob(model.transition(x_prev, t), mode), rtol=RTOL
        )


def test_the_score_is_the_derivative_of_the_evidence():
    """Fisher: the gradient of the log evidence is the smoothed expectation of that of the joint density."""
    model, ys = problem()
    score = jax.grad(lambda model: kalman_filter(model, ys).log_evidence)(model)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(score))
    mean = joint()[0].reshape(6, 3)
    expected = np.linalg.solve(np.asarray(model.initial_tril @ model.initial_tril.T), mean[0] - model.initial_mean)
    np.testing.assert_allclose(score.initial_mean, expected, rtol=100 * RTOL)
    C = np.asarray(model.observation_matrix)
    R = np.asarray(model.observation_tril @ model.observation_tril.T)
    offset_score = np.zeros(2)
    for t in range(6):
        there = ~np.isnan(np.asarray(ys[t]))
        residual = (np.asarray(ys[t]) - C @ mean[t] - np.asarray(model.observation_offset))[there]
        offset_score[there] += np.linalg.solve(R[there][:, there], residual)
    np.testing.assert_allclose(score.observation_offset, offset_score, rtol=100 * RTOL)


def test_long_series_in_float32_stay_positive_and_reach_the_stationary_law():
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem()[0])
    _, ys = bi.models.simulate(0, model, 10_000)
    filtered = kalman_filter(model, ys)
    assert filtered.log_evidence.dtype == jnp.float32
    A, C = (np.asarray(m, np.float64) for m in (model.transition_matrix, model.observation_matrix))
    Q, R = (np.asarray(m, np.float64) for m in (model.transition_tril, model.observation_tril))
    P = scipy.linalg.solve_discrete_are(A.T, C.T, Q @ Q.T, R @ R.T)
    last = np.asarray(filtered.predicted_trils[-1], np.float64)
    np.testing.assert_allclose(last @ last.T, P, rtol=1e-4, atol=1e-5)
    exact = np.asarray(filtered.log_evidence_increments, np.float64).sum()
    np.testing.assert_allclose(filtered.log_evidence, exact, rtol=2e-7)


def test_scalar_start_is_stationary_by_default():
    np.testing.assert_allclose(LinearGaussian.scalar(*PPG).initial_tril, [[0.60 / np.sqrt(1 - 0.97**2)]], rtol=1e-6)
    assert LinearGaussian.scalar(1.0, 0.5, initial_scale=2.0, initial_mean=1.0).initial_tril[0, 0] == 2.0
    with pytest.raises(ValueError, match=r"persistence must lie in \(-1, 1\)"):
        LinearGaussian.scalar(1.0, 0.5)


def test_bad_models_and_data_are_named():
    model, ys = problem()
    with pytest.raises(ValueError, match=r"transition_tril must have shape \(3, 3\)"):
        dataclasses.replace(model, transition_tril=jnp.eye(2))
    with pytest.raises(ValueError, match="transition_tril must be lower triangular"):
        dataclasses.replace(model, transition_tril=jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"ys must be one array of shape \(T, 2\)"):
        kalman_filter(model, ys[:, 0])
    with pytest.raises(ValueError, match=r"ys must be finite.*rows \[1\]"):
        kalman_filter(model, ys.at[1, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="num_paths must be at least 1"):
        sample_posterior(0, model, ys, 0)


def test_filters_of_many_models_in_one_call():
    _, ys = problem()
    persistences = jnp.array([0.2, 0.5, 0.9])
    evidence = jax.vmap(lambda a: kalman_filter(LinearGaussian.scalar(a, 0.5), ys[:, :1]).log_evidence)(persistences)
    for a, found in zip(persistences, evidence, strict=True):
        exact = kalman_filter(LinearGaussian.scalar(float(a), 0.5), ys[:, :1]).log_evidence
        np.testing.assert_allclose(found, exact, rtol=RTOL)
