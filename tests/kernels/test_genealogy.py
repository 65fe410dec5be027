"""Variance from one run, fixed lags, marginal smoothing and forecasts, against exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import (
    AdditiveFunctional,
    Paris,
    ParticleFilter,
    backward_sample,
    estimate_variance,
    evidence_variance,
    fixed_lag_smoother,
    marginal_smoother,
    paris,
    particle_filter,
    predict,
    tail_index,
    trace_paths,
)
from bayesinf.kernels.genealogy import trace_ancestors
from bayesinf.models import LinearGaussian, StateSpaceModel, kalman_filter, rts_smoother

MODEL = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.9, initial_mean=0.5)
FAR = 0.5 * float(jnp.finfo(jnp.result_type(float)).max)  # nothing explains it, in any precision
YS = jnp.array([[1.0], [-0.4], [jnp.nan], [1.3], [0.2], [0.9]])
EVERY_STEP = {"resampling": "multinomial", "ess_threshold": 1.0, "store": "full"}


def runs(num_particles, num, function, **options):
    """`function` of independent filters."""

    def run(key):
        return function(particle_filter(key, MODEL, YS, num_particles=num_particles, **(EVERY_STEP | options)))

    keys = jax.random.split(jax.random.key(0), num)
    return jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=min(num, 1000)))(keys)


@pytest.mark.parametrize("lag", [0, 1, 3, 20, None])
def test_ancestors_are_those_of_a_loop(lag):
    ancestors = np.array(jax.random.randint(jax.random.key(1), (7, 5), 0, 5), np.int32)
    ancestors[0] = np.arange(5)
    expected = np.empty_like(ancestors)
    for t in range(7):
        for i in range(5):
            index = i
            for s in range(t, max(t - (7 if lag is None else lag), 0), -1):
                index = ancestors[s, index]
            expected[t, i] = index
    np.testing.assert_array_equal(trace_ancestors(jnp.asarray(ancestors), lag), expected)


def test_the_variance_of_the_evidence_is_unbiased():
    """Exactly, for every number of particles: E[Zhat^2 (1 - V)] = Z^2."""
    exact = kalman_filter(MODEL, YS).log_evidence
    log_ratio, variance = runs(8, 20_000, lambda found: (found.log_evidence - exact, evidence_variance(found)))
    ratio = np.exp(np.asarray(log_ratio, np.float64))
    assert mean_p_value(ratio**2 * (1 - np.asarray(variance, np.float64)), 1.0) > FALSE_ALARM
    # one factor N / (N - 1) less, and it is seen
    wrong = 1 - (1 - np.asarray(variance, np.float64)) * 7 / 8
    assert mean_p_value(ratio**2 * (1 - wrong), 1.0) < FALSE_ALARM


@pytest.mark.parametrize("lag", [None, 4])
def test_the_variance_of_an_estimate_is_what_replicates_show(lag):
    exact = kalman_filter(MODEL, YS).filtered_means

    def look(found):
        return found.estimates.mean, estimate_variance(found, lag=lag), estimate_variance(found, lag=0)

    means, variances, without_relatives = runs(400, 2_000, look)
    # the bias of either is of order 1/N of it, below what 2000 replicates resolve
    assert mean_p_value((np.asarray(means) - exact) ** 2 - np.asarray(variances), 0.0) > FALSE_ALARM
    assert mean_p_value((np.asarray(means) - exact) ** 2 - np.asarray(without_relatives), 0.0) < FALSE_ALARM


def test_a_fixed_lag_waits_for_more_data():
    found = particle_filter(0, MODEL, YS, num_particles=50, **EVERY_STEP)
    np.testing.assert_allclose(fixed_lag_smoother(found, 0), found.estimates.mean, rtol=1e-5)
    means = runs(500, 400, lambda found: fixed_lag_smoother(found, 2))
    exact = [rts_smoother(MODEL, YS[: min(t + 3, 6)]).means[t] for t in range(6)]
    assert mean_p_value(means, np.asarray(exact)) > FALSE_ALARM
    whole = runs(500, 400, lambda found: fixed_lag_smoother(found, 5, lambda x: {"square": x[0] ** 2}))
    smoothed = rts_smoother(MODEL, YS)
    second = smoothed.means[:, 0] ** 2 + smoothed.covariances[:, 0, 0]
    assert mean_p_value(whole["square"], second) > FALSE_ALARM


def test_marginal_weights_are_those_of_the_dense_formula():
    found = particle_filter(0, MODEL, YS, num_particles=7, **EVERY_STEP)
    x = np.asarray(found.history.particles, np.float64)[..., 0]
    w = np.exp(np.asarray(found.history.log_weights, np.float64))
    expected = w.copy()
    for t in range(4, -1, -1):
        m = np.exp(-0.5 * ((x[t + 1][None, :] - 0.8 * x[t][:, None]) / 0.7) ** 2)
        expected[t] = w[t] * (m @ (expected[t + 1] / (w[t] @ m)))
    np.testing.assert_allclose(np.exp(marginal_smoother(MODEL, found)), expected, rtol=1e-3, atol=1e-6)


def test_marginal_smoothing_finds_the_smoother():
    def means(found):
        return jnp.einsum("tn,tnd->td", jnp.exp(marginal_smoother(MODEL, found)), found.history.particles)

    assert mean_p_value(runs(200, 200, means), rts_smoother(MODEL, YS).means) > FALSE_ALARM


def test_forecasts_have_the_predictive_law():
    filtered = kalman_filter(MODEL, YS)
    mean, variance = filtered.filtered_means[-1, 0], filtered.filtered_trils[-1, 0, 0] ** 2

    def forecast(key):
        key_filter, key_draw = jax.random.split(key)
        found = particle_filter(key_filter, MODEL, YS, num_particles=500)
        return predict(key_draw, MODEL, found, 3, num_draws=1)

    keys = jax.random.split(jax.random.key(2), 4_000)
    found = jax.jit(lambda keys: jax.lax.map(forecast, keys, batch_size=500))(keys)
    for step in range(3):
        mean, variance = 0.8 * mean, 0.64 * variance + 0.49
        assert mean_p_value(found.states[:, 0, step, 0], mean) > FALSE_ALARM
        assert mean_p_value((found.states[:, 0, step, 0] - mean) ** 2, variance) > FALSE_ALARM
        assert mean_p_value((found.observations[:, 0, step, 0] - mean) ** 2, variance + 0.81) > FALSE_ALARM


class Clock(StateSpaceModel):
    """Its state is the sum of all times so far."""

    def initial(self):
        return dist.Normal(0.0, 1e-6)

    def transition(self, x_prev, t):
        return dist.Normal(x_prev + t, 1e-6)

    def observation(self, x, t):
        return dist.Normal(x + t, 1e-6)


def test_time_goes_on_after_the_last_observation():
    ys = jnp.full(4, jnp.nan)
    whole = predict(0, Clock(), particle_filter(0, Clock(), ys, num_particles=3), 2, num_draws=5)
    np.testing.assert_allclose(whole.states, np.broadcast_to([10.0, 15.0], (5, 2)), atol=1e-3)
    np.testing.assert_allclose(whole.observations, np.broadcast_to([14.0, 20.0], (5, 2)), atol=1e-3)
    stream = ParticleFilter(Clock(), num_particles=3)
    state, _ = stream.init(0, ys[0])
    state, _ = stream.step(state, ys[1])
    np.testing.assert_allclose(predict(0, Clock(), state, 1).states, np.full((3, 1), 3.0), atol=1e-3)


def test_forecasts_go_on_from_smoothing_too():
    """PaRIS ends with the particles of a filter: its result and the state of its stream forecast alike."""
    ys, total = jnp.full(2, jnp.nan), AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    stream = Paris(Clock(), total, num_particles=3)
    state, _ = stream.init(0, ys[0])
    state, _ = stream.step(state, ys[1])
    whole = paris(0, Clock(), ys, total, num_particles=3)
    np.testing.assert_array_equal(whole.particles, state.filter.particles)
    np.testing.assert_array_equal(whole.log_weights, state.filter.log_weights)
    for smoothed in (whole, state):
        np.testing.assert_allclose(predict(0, Clock(), smoothed, 1).states, np.full((3, 1), 3.0), atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    summary = particle_filter(0, MODEL, YS, num_particles=4)
    for function in (evidence_variance, estimate_variance, lambda found: fixed_lag_smoother(found, 1)):
        with pytest.raises(ValueError, match="filtered must hold its history"):
            function(summary)
    with pytest.raises(ValueError, match="lag must be at least 0"):
        fixed_lag_smoother(particle_filter(0, MODEL, YS, num_particles=4, store="full"), -1)
    with pytest.raises(ValueError, match="filtered must be of particle_filter"):
        predict(0, MODEL, YS, 3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        predict(0, MODEL, summary, 0)
    alone = particle_filter(0, MODEL, YS, num_particles=1, store="full")
    for function in (evidence_variance, estimate_variance):
        with pytest.raises(ValueError, match="filtered must hold at least 2 particles, got 1"):
            function(alone)
        with pytest.raises(ValueError, match="filtered must hold at least 2 particles, got 1"):
            jax.jit(lambda history, function=function: function(alone._replace(history=history)))(alone.history)
    batch = jax.vmap(lambda key: particle_filter(key, MODEL, YS, num_particles=4, store="full"))(
        jax.random.split(jax.random.key(0), 3)
    )
    for function in (
        evidence_variance,
        estimate_variance,
        lambda found: fixed_lag_smoother(found, 1),
        lambda found: marginal_smoother(MODEL, found),
        lambda found: backward_sample(0, MODEL, found, 2),
        lambda found: trace_paths(0, found, 2),
        lambda found: predict(0, MODEL, found, 2),
    ):
        with pytest.raises(ValueError, match=r"filtered must be of one filter, got a batch of shape \(3,\); vmap this"):
            function(batch)
        assert jax.tree.leaves(jax.vmap(function)(batch))[0].shape[0] == 3
    with pytest.raises(ValueError, match="filtered must be a single filter outside of compiled functions"):
        tail_index(batch)
    lost = particle_filter(0, MODEL, YS.at[1].set(FAR), num_particles=4, throw=False)
    with pytest.raises(errors.DegenerateWeightsError, match="nothing to predict from"):
        predict(0, MODEL, lost, 3)
