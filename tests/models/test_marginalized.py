"""Rao-Blackwellised filters of one model seen from both sides: particles of regimes, and particles of what they drive.

The law of the regimes and of the Gaussian states given three observations is known by enumeration (`switching_laws`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import switching_laws as exact
from switching_models import Driven, Regimes

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import ParticleFilter, backward_sample, particle_filter, predict
from bayesinf.models import (
    ConditionallyDiscrete,
    ConditionallyLinearGaussian,
    LinearGaussian,
    Marginalized,
    hmm_filter,
    kalman_filter,
    simulate,
)

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

YS = jnp.asarray(exact.SERIES)[:, None]
EVIDENCE = np.exp(exact.LOG_EVIDENCE)
LAST_MEAN = float(exact.PROBABILITIES @ exact.MEANS[:, -1])


@partial(jax.jit, static_argnames=("num_particles", "proposal", "lookahead"))
def _runs(keys, model, ys, ess_threshold, **options):
    def run(key):
        return particle_filter(key, model, ys, ess_threshold=ess_threshold, throw=False, **options)

    return jax.vmap(run)(keys)


def runs(model, num_runs, ys=YS, ess_threshold=0.5, **options):
    """What independent filters of five particles found."""
    options = {"num_particles": 5, "proposal": "guided", "lookahead": False} | options
    return _runs(jax.random.split(jax.random.key(0), num_runs), model, ys, jnp.asarray(ess_threshold), **options)


def products(found, what):
    """Zhat, and Zhat times what the filter says at the end: of these the expectations are exact for every N."""
    evidence = np.exp(np.asarray(found.log_evidence, np.float64))
    if what is Regimes:
        regimes, mean = found.estimates.outer[:, -1], found.estimates.inner.mean[:, -1, 0]
    else:
        regimes, mean = found.estimates.inner[:, -1], found.estimates.outer.mean[:, -1]
    parts = np.column_stack([np.ones_like(evidence), regimes, mean]) * evidence[:, None]
    return np.delete(parts, 3, axis=1)  # the last of three probabilities says nothing new


TRUTH = EVIDENCE * np.array([1.0, *exact.LAST_REGIME[:2], LAST_MEAN])


@pytest.mark.parametrize("ess_threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("what", "outer_proposal", "lookahead"),
    [
        (Regimes, "transition", False),
        (Regimes, "optimal", False),
        (Regimes, "optimal", True),
        (Regimes, "guided", False),
        (Driven, "transition", False),
        (Driven, "guided", False),
    ],
)
def test_evidence_and_estimates_are_unbiased(what, outer_proposal, lookahead, ess_threshold):
    model = Marginalized(what(), outer_proposal)
    found = runs(model, 20_000, ess_threshold=ess_threshold, lookahead=lookahead)
    assert mean_p_value(products(found, what), TRUTH) > FALSE_ALARM


def test_the_joint_models_are_the_same():
    for what in (Regimes, Driven):
        found = runs(what(), 20_000, proposal="bootstrap", ess_threshold=0.5)
        assert mean_p_value(np.exp(found.log_evidence), EVIDENCE) > FALSE_ALARM


def test_less_is_drawn_and_less_varies():
    """Each of these weights is the mean of the one before, over what is no longer drawn."""
    both = np.exp(runs(Regimes(), 20_000, proposal="bootstrap").log_evidence)
    regimes = np.exp(runs(Marginalized(Regimes()), 20_000).log_evidence)
    neither = np.exp(runs(Marginalized(Regimes(), "optimal"), 20_000, lookahead=True).log_evidence)
    assert np.std(both) > 1.1 * np.std(regimes) > 1.1**2 * np.std(neither)


class Frozen(Regimes):
    """Regimes that never change: what dynamax's filter of switching models does."""

    def outer_transition(self, u_prev, t):
        return dist.Categorical(probs=jax.nn.one_hot(u_prev, 3))


class Twice(Regimes):
    """Takes in every observation twice."""

    def update(self, u, belief, y, t):
        return super().update(u, super().update(u, belief, y, t), y, t)


class Unweighted(Marginalized):
    """Forgets that regimes were drawn from another law than their own."""

    def log_move_ratio(self, x_prev, x, y, t):
        return jnp.zeros_like(x.log_ratio)


@pytest.mark.parametrize(
    "planted", [Marginalized(Frozen()), Marginalized(Twice()), Unweighted(Regimes(), "guided")], ids=str
)
def test_planted_mistakes_are_found(planted):
    assert mean_p_value(products(runs(planted, 20_000), Regimes), TRUTH) < FALSE_ALARM


class Single(ConditionallyLinearGaussian):
    """One regime: a linear Gaussian model of two states and two observations."""

    same: LinearGaussian

    def outer_initial(self):
        return dist.Categorical(jnp.ones(1))

    def outer_transition(self, u_prev, t):
        return dist.Categorical(jnp.ones(1))

    def linear_initial(self, u):
        return self.same.initial_mean, self.same.initial_tril

    def linear_transition(self, u_prev, u, t):
        return self.same.transition_matrix, self.same.transition_offset, self.same.transition_tril

    def linear_observation(self, u, t):
        return self.same.observation_matrix, self.same.observation_offset, self.same.observation_tril


@pytest.mark.parametrize("outer_proposal", ["transition", "optimal"])
def test_a_single_regime_is_a_kalman_filter_also_where_components_are_missing(outer_proposal):
    same = LinearGaussian(
        initial_mean=jnp.array([1.0, -0.5]), initial_tril=jnp.array([[1.0, 0.0], [0.4, 0.7]]),
        transition_matrix=jnp.array([[0.8, 0.3], [-0.2, 0.9]]), transition_tril=jnp.array([[0.5, 0.0], [0.2, 0.3]]),
        observation_matrix=jnp.array([[1.0, 0.5], [0.0, 2.0]]), observation_tril=jnp.array([[0.6, 0.0], [0.1, 0.9]]),
        transition_offset=jnp.array([0.1, -0.2]), observation_offset=jnp.array([0.3, 0.0]),
    )  # fmt: skip
    _, ys = simulate(0, same, num_steps=12)
    ys = ys.at[3].set(jnp.nan).at[5, 1].set(jnp.nan).at[0, 0].set(jnp.nan)
    kalman = kalman_filter(same, ys)
    model = Marginalized(Single(same), outer_proposal)
    found = particle_filter(1, model, ys, num_particles=2, proposal="guided", lookahead=outer_proposal == "optimal")
    np.testing.assert_allclose(found.log_evidence, kalman.log_evidence, rtol=1e-4)
    np.testing.assert_allclose(found.estimates.inner.mean, kalman.filtered_means, rtol=1e-3, atol=1e-4)
    variance = np.sum(np.square(kalman.filtered_trils), axis=2)
    np.testing.assert_allclose(np.square(found.estimates.inner.sd), variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", [Regimes, Driven])
def test_what_is_missing_says_nothing(what):
    """The evidence of the first and last of three observations alone, by enumeration of the regimes."""
    ys = YS.at[1].set(jnp.nan)
    log_joints = []
    for path, probability in zip(exact.REGIMES, prior_of_regimes(), strict=True):
        mixing = np.linalg.inv(np.eye(3) - np.diag(exact.PULL[path[1:]], -1))
        mean, cov = mixing @ exact.LEVEL[path], mixing @ np.diag(exact.SCALE[path] ** 2) @ mixing.T
        cov = (cov + exact.NOISE**2 * np.eye(3))[::2, ::2]
        residual = (exact.SERIES - mean)[::2]
        quadratic = residual @ np.linalg.solve(cov, residual)
        log_joints.append(np.log(probability) - 0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * cov)[1]))
    found = runs(Marginalized(what()), 20_000, ys=ys)
    assert mean_p_value(np.exp(found.log_evidence), np.exp(np.logaddexp.reduce(log_joints))) > FALSE_ALARM


def prior_of_regimes():
    paths = exact.REGIMES
    return exact.INITIAL[paths[:, 0]] * np.prod(exact.SWITCHES[paths[:, :-1], paths[:, 1:]], axis=1)


def test_a_stream_is_the_filter():
    model = Marginalized(Regimes(), "optimal")
    options = {"num_particles": 20, "proposal": "guided", "lookahead": True}
    stream = ParticleFilter(model, **options)
    state, info = stream.init(jax.random.key(3), YS[0])
    for y in YS[1:]:
        state, info = stream.step(state, y)
    found = particle_filter(jax.random.key(3), model, YS, **options)
    np.testing.assert_allclose(state.log_evidence, found.log_evidence, rtol=1e-5)
    np.testing.assert_allclose(info.estimate.inner.mean, found.estimates.inner.mean[-1], rtol=1e-5)


def test_forecasts_draw_the_inner_states_first():
    """The mean of the next observation: the mean over the last regimes, states and the regimes that follow."""
    last, x = exact.REGIMES[:, -1], exact.MEANS[:, -1]
    after = exact.SWITCHES[last] @ np.column_stack([exact.PULL, exact.LEVEL])
    truth = exact.PROBABILITIES @ (after[:, 0] * x + after[:, 1])
    marginalized = Marginalized(Regimes())

    def run(key):
        filtered = particle_filter(key, marginalized, YS, num_particles=200, proposal="guided", throw=False)
        filtered = marginalized.complete(jax.random.fold_in(key, 1), filtered)
        ahead = predict(jax.random.fold_in(key, 2), marginalized.model, filtered, horizon=1)
        return ahead.observations[:, 0, 0].mean()

    means = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 500))
    assert mean_p_value(means, truth) > FALSE_ALARM  # the bias of 200 particles is far below the error of 500 runs


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_asked_is_said():
    model = Marginalized(Regimes())
    with pytest.raises(ValueError, match="proposal must be 'guided' for a model of type Marginalized, got 'bootstrap'"):
        particle_filter(0, model, YS, num_particles=10)
    with pytest.raises(ValueError, match="lookahead=True needs Marginalized"):
        particle_filter(0, model, YS, num_particles=10, proposal="guided", lookahead=True)
    with pytest.raises(ValueError, match="has no transition of its own"):
        simulate(0, model, num_steps=3)
    filtered = particle_filter(0, model, YS, num_particles=10, proposal="guided", store="full")
    with pytest.raises(ValueError, match="smooth the nested model itself"):
        backward_sample(0, model, filtered, num_paths=2, method="exact")
    with pytest.raises(ValueError, match="has no transition of its own"):
        predict(0, model, filtered, horizon=2)
    with pytest.raises(ValueError, match="model must be a ConditionallyLinearGaussian or ConditionallyDiscrete"):
        Marginalized(LinearGaussian.scalar(0.9, 0.5))
    with pytest.raises(ValueError, match="'optimal' needs outer states of finitely many values"):
        Marginalized(Driven(), "optimal")
    with pytest.raises(ValueError, match="needs a method outer_initial_proposal of the model Single"):
        Marginalized(Single(LinearGaussian.scalar(0.9, 0.5)), "guided")


class Misshapen(Regimes):
    def linear_transition(self, u_prev, u, t):
        return jnp.eye(1), jnp.zeros(2), jnp.eye(1)


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked():
    expected = (
        r"linear_transition\(u_prev, u, t\) must return a tuple of arrays of shapes \(\(1, 1\), \(1,\), \(1, 1\)\)"
    )
    with pytest.raises(ValueError, match=expected):
        particle_filter(0, Marginalized(Misshapen()), YS, num_particles=10, proposal="guided")


def test_impossible_data_are_a_clear_loss():
    far = YS.at[1].set(float(jnp.finfo(jnp.result_type(float)).max))
    with pytest.raises(errors.DegenerateWeightsError, match="At time step 1"):
        particle_filter(0, Marginalized(Regimes(), "optimal"), far, num_particles=10, proposal="guided")


class Absorbed(ConditionallyDiscrete):
    """A regime that is never left again; the outer state says nothing."""

    def regime_initial(self):
        return jnp.array([0.9, 0.1])

    def regime_transition(self, u_prev, t):
        return jnp.array([[0.9, 0.1], [0.0, 1.0]])

    def outer_initial(self, r):
        return dist.Normal(0.0, 1.0)

    def outer_transition(self, u_prev, r, t):
        return dist.Normal(u_prev, 1.0)

    def observation(self, x, t):
        return dist.Normal(jnp.where(x.inner == 1, 60.0, 0.0), 1.0)


def test_a_regime_that_underflows_is_not_lost():
    """An outlier speaks for the wrong regime by more than a number can hold; all that follows denies it.

    Beliefs held as probabilities explain the rest by that regime, and are off by its whole evidence.
    """
    ys = jnp.zeros(8).at[3].set(60.0)
    log_lik = jnp.stack([dist.Normal(level, 1.0).log_prob(ys) for level in (0.0, 60.0)], axis=1)
    model = Absorbed()
    exact_evidence = hmm_filter(
        jnp.log(model.regime_initial()), jnp.log(model.regime_transition(None, 0)), log_lik
    ).log_evidence
    found = particle_filter(0, Marginalized(model), ys, num_particles=4, proposal="guided")
    np.testing.assert_allclose(found.log_evidence, exact_evidence, rtol=1e-5)
