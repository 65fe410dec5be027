"""Sets for hidden states behind numbers: coverage whatever the emissions, smaller where their densities are near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal, sample_chain

TRANSITION = jnp.array([[0.85, 0.15], [0.25, 0.75]])


def emit(key, states):
    """A skewed law in one state, two modes in the other: far from normal."""
    key_first, key_side, key_second = jax.random.split(key, 3)
    sides = jnp.where(jax.random.bernoulli(key_side, 0.5, states.shape), 2.0, -1.0)
    second = sides + 0.4 * jax.random.normal(key_second, states.shape)
    return jnp.where(states == 0, jax.random.exponential(key_first, states.shape), second)


def p_values(*, horizon, judge, num_runs):
    @jax.jit
    @jax.vmap
    def run(key):
        key_states, key_obs, key_set = jax.random.split(key, 3)
        x = sample_chain(key_states, TRANSITION, 40 + horizon)
        y = emit(key_obs, x)
        found = judge(key_set, x[:40], y[:40], y[40:])
        return found.p[jnp.ravel_multi_index(tuple(x[40:]), (2,) * horizon, mode="clip")], found.mask.mean()

    p, size = run(jax.random.split(jax.random.key(0), num_runs))
    return np.asarray(p, float), np.asarray(size, float)


def by_type(key, x, y, y_new):
    return conformal.continuous_state_set(key, x, y, y_new, 2, 0.2, num_draws=39)


def by_modes(obs, members):
    """Densities near the truth of the second state, though not fitted to it."""
    near = jnp.logaddexp(-3 * jnp.square(obs - 2.0), -3 * jnp.square(obs + 1.0))
    return jnp.stack([-jnp.where(obs < 0, 20.0, obs), near], axis=1)


def with_modes(key, x, y, y_new):
    return conformal.continuous_state_set(key, x, y, y_new, 2, 0.2, num_draws=39, log_likelihood=by_modes)


@pytest.mark.parametrize("horizon", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_p_values_of_the_truth_are_uniform_whatever_the_emissions(horizon):
    p, size = p_values(horizon=horizon, judge=by_type, num_runs=2_000)
    assert scipy.stats.kstest(p, "uniform").pvalue > FALSE_ALARM
    for alpha in (0.05, 0.1, 0.2, 0.5):
        assert scipy.stats.binomtest(int(np.sum(p > alpha)), len(p), 1 - alpha).pvalue > FALSE_ALARM
    p_near, size_near = p_values(horizon=horizon, judge=with_modes, num_runs=2_000)
    assert scipy.stats.kstest(p_near, "uniform").pvalue > FALSE_ALARM
    assert scipy.stats.ttest_ind(size_near, size, alternative="less").pvalue < FALSE_ALARM


def test_observations_of_any_state_are_found_out(monkeypatch):
    """Ends whose observations are drawn from all of the series, not from those of their states."""
    right = jax.random.categorical
    jax.clear_caches()
    monkeypatch.setattr(
        jax.random, "categorical", lambda key, logits: right(key, jnp.zeros_like(logits) if len(logits) > 2 else logits)
    )

    p, _ = p_values(horizon=1, judge=by_type, num_runs=2_000)
    assert scipy.stats.kstest(p, "uniform").pvalue < FALSE_ALARM
    jax.clear_caches()


def test_vectors_are_taken_and_a_lone_observation_has_a_variance():
    members = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    obs = jnp.arange(8.0).reshape(4, 2)
    found = conformal.gaussian_log_likelihood(obs, members)
    mean, variance = np.mean(obs, axis=0), np.var(obs, axis=0)
    first = (np.asarray(obs[0]) + mean) / 2
    spread = ((np.asarray(obs[0]) - first) ** 2 + variance) / 2
    expected = scipy.stats.norm(first, np.sqrt(spread)).logpdf(obs).sum(axis=1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    x = jnp.array([0, 1, 1, 0, 1, 0])
    series = jax.random.normal(jax.random.key(0), (8, 2))
    assert conformal.continuous_state_set(1, x, series[:6], series[6:], 2, 0.2).candidates.shape == (4, 2)


@pytest.mark.usefixtures("unchecked")
def test_bad_series_of_numbers_are_named():
    x, y = jnp.array([0, 1, 2]), jnp.zeros(3)
    with pytest.raises(ValueError, match=r"states must lie in 0\.\.1, got \[0 1 2\]"):
        conformal.continuous_state_set(0, x, y, y[:1], 2, 0.1)
    with pytest.raises(ValueError, match="states and obs must be of one length"):
        conformal.continuous_state_set(0, x, y[:2], y[:1], 3, 0.1)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        conformal.continuous_state_set(0, x, y, y[:1], 3, 0.1, num_draws=0)
    for name, obs, new in (("obs", y.at[1].set(jnp.nan), y[:1]), ("obs_new", y, jnp.array([jnp.nan]))):
        with pytest.raises(ValueError, match=f"{name} must not be NaN"):  # the set was empty, and said to be exact
            conformal.continuous_state_set(0, x, obs, new, 3, 0.1)


def test_a_density_that_is_nan_excludes_nothing():
    def nowhere(obs, members):
        return jnp.full(members.shape, jnp.nan)

    found = conformal.continuous_state_set(
        0, jnp.array([0, 1, 1]), jnp.zeros(3), jnp.zeros(1), 2, 0.1, log_likelihood=nowhere, num_draws=9
    )
    np.testing.assert_allclose(found.p, 1.0, rtol=1e-6)  # a sum of ten tenths
