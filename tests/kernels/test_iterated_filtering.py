"""Iterated filtering: one iteration against the exact filter of the perturbed model, many against the maximum."""

import importlib
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from ppg_models import Scalar, learning_series

import bayesinf as bi
from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import chunks, iterated_filtering, particle_filter
from bayesinf.kernels.perturbed import PerturbedModel

MODULE = importlib.import_module("bayesinf.kernels.iterated_filtering")


pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation


@pytest.fixture
def plant(monkeypatch):
    """Replaces a part, and makes what was compiled with the right one be forgotten."""

    def replace(owner, name, wrong):
        monkeypatch.setattr(owner, name, wrong)
        jax.clear_caches()

    yield replace
    monkeypatch.undo()
    jax.clear_caches()


# ---- one iteration, exactly ----

A, Q, R = 0.8, 0.5, 0.6
SIGMA_0, SIGMA, COOLING, START = 0.7, 0.5, 1e-30, 0.3
YS = jnp.array([3.0, 0.2, jnp.nan, 2.5, 3.0])


def unknown(x):
    raise AssertionError("a density of the transition was asked for")


class Drift(bi.models.StateSpaceModel):
    """x_0 ~ N(theta, 1), x_t = A x_{t-1} + theta + noise, y_t = x_t + noise; the law of x_t can only be simulated."""

    theta: Float[Array, ""]

    def initial(self):
        return dist.Normal(self.theta, 1.0)

    def transition(self, x_prev, t):
        return dist.Normal(A * x_prev + self.theta, Q).sample, unknown

    def observation(self, x, t):
        return dist.Normal(x, R)


class Guided(Drift):
    def transition(self, x_prev, t):
        return dist.Normal(A * x_prev + self.theta, Q)

    def initial_proposal(self, y):
        return dist.Normal(0.5 * (self.theta + jnp.where(jnp.isnan(y), self.theta, y)), 1.1)

    def proposal(self, x_prev, y, t):
        mean = A * x_prev + self.theta
        return dist.Normal(0.6 * mean + 0.4 * jnp.where(jnp.isnan(y), mean, y), 0.6)


def kalman():
    """Log evidence of the perturbed model, and E[theta_{T-1}, theta_{T-1}^2 | y]; the state is (theta, x)."""
    share = COOLING ** (np.arange(5) / (50 * 5))
    cov = np.full((2, 2), SIGMA_0**2) + np.diag([0.0, 1.0])
    mean, log_evidence = np.full(2, START), 0.0
    move = np.array([[1.0, 0.0], [1.0, A]])  # the new theta moves x
    for t, y in enumerate(np.asarray(YS, np.float64)):
        if t > 0:
            mean = move @ mean
            cov = move @ cov @ move.T + (share[t] * SIGMA) ** 2 + np.diag([0.0, Q**2])
        if not np.isnan(y):
            variance = cov[1, 1] + R**2
            log_evidence += scipy.stats.norm(mean[1], np.sqrt(variance)).logpdf(y)
            gain = cov[:, 1] / variance
            mean, cov = mean + gain * (y - mean[1]), cov - np.outer(gain, cov[1])
    return log_evidence, np.array([mean[0], cov[0, 0] + mean[0] ** 2])


LOG_EVIDENCE, MOMENTS = kalman()


class Iteration(eqx.Module):
    """key -> log Zhat and the moments of the swarm; the name of a bug makes it another function for the caches."""

    proposal: str = eqx.field(static=True)
    bug: str = eqx.field(static=True, default="")

    def __call__(self, key):
        found = iterated_filtering(
            key,
            Drift if self.proposal == "bootstrap" else Guided,
            jnp.asarray(START),
            YS,
            perturbation=SIGMA,
            initial_perturbation=SIGMA_0,
            num_particles=20,
            num_iterations=1,
            cooling=COOLING,
            proposal=self.proposal,
            throw=False,
        )
        return found.log_evidence[0], jnp.stack([jnp.mean(found.swarm), jnp.mean(found.swarm**2)])


@partial(jax.jit, static_argnums=0)
def _replicate(run, keys):
    return jax.lax.map(run, keys, batch_size=1_000)


def p_values(proposal, bug=""):
    """E[Zhat] = Z and E[Zhat mean_i f(theta^i)] = Z E[f(theta_{T-1}) | y], for every number of particles."""
    log_evidence, moments = _replicate(Iteration(proposal, bug), jax.random.split(jax.random.key(0), 10_000))
    ratios = np.exp(np.asarray(log_evidence, np.float64) - LOG_EVIDENCE)
    return {
        "evidence": mean_p_value(ratios, 1.0),
        "moments": mean_p_value(ratios[:, None] * np.asarray(moments, np.float64), MOMENTS),
    }


@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_an_iteration_filters_the_perturbed_model(proposal):
    found = p_values(proposal)
    assert min(found.values()) > FALSE_ALARM, found


def move_before_the_walk(self, before, t, law_of):
    """The state moves by the old parameters."""

    def draw(key):
        key_walk, key_state = jax.random.split(key)
        theta = self.walk(key_walk, before[0], self.perturbation, t)
        return theta, bi.models.state_space.sample(key_state, law_of(self.build(before[0]), before[1]))

    return draw, None


WALK, RESAMPLE, FIRST = PerturbedModel.walk, MODULE.resample, PerturbedModel.first


def walk_without_cooling(self, key, theta, sigma, t):
    return WALK(eqx.tree_at(lambda model: model.log_cooling, self, 0.0), key, theta, sigma, t)


def walk_cooled_between_iterations(self, key, theta, sigma, t):
    return WALK(self, key, theta, sigma, 0)


def first_after_the_state(self, key, theta, y, proposal):
    """x_0 by the parameter that is not yet perturbed."""
    walked, _ = FIRST(self, key, theta, y, proposal)
    return walked, bi.models.state_space.sample(jax.random.fold_in(key, 1), self.build(theta).initial())


BUGS = {
    "the state moves before the parameters": (PerturbedModel, "_move", move_before_the_walk),
    "x_0 is drawn before the parameters move": (PerturbedModel, "first", first_after_the_state),
    "no cooling": (PerturbedModel, "walk", walk_without_cooling),
    "no cooling within an iteration": (PerturbedModel, "walk", walk_cooled_between_iterations),
    "the last swarm is not resampled": (MODULE, "resample", lambda key, log_weights, num, scheme: jnp.arange(num)),
}
MAIN_BUGS = ("the state moves before the parameters", "no cooling within an iteration")


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug not in MAIN_BUGS)) for bug in BUGS])
def test_planted_bugs_are_rejected(bug, plant):
    plant(*BUGS[bug])
    found = p_values("bootstrap", bug)
    assert min(found.values()) < FALSE_ALARM, found


# ---- how the perturbations cool ----

T, L, N = 4, 3, 2_000


def named(theta):
    return Drift(theta["a"] + theta["x_0"] + jnp.sum(theta["b"]))


def blind(cooling=1e-8):
    """Of data that say nothing the swarm is a random walk, as no particle is better than another."""
    return iterated_filtering(
        0,
        named,
        {"a": 1.0, "b": jnp.ones(2), "x_0": 1.0},
        jnp.full(T, jnp.nan),
        perturbation={"a": 0.3, "b": jnp.array([0.0, 2.0]), "x_0": 0.0},
        initial_perturbation={"a": 0.1, "b": 0.0, "x_0": 5.0},
        num_particles=N,
        num_iterations=L,
        cooling=cooling,
    )


def schedule_p_values(found, cooling=1e-8):
    """Of the variances of the swarm, each a sum of squares of the perturbations on the way."""
    share = cooling ** (np.arange(L * T) / (50 * T)).reshape(L, T)
    first, later = np.sum(share[:, 0] ** 2), np.sum(share[:, 1:] ** 2)
    exact = {"a": 0.01 * first + 0.09 * later, "b": 4.0 * later, "x_0": 25.0 * first}
    columns = {"a": found.swarm["a"], "b": found.swarm["b"][:, 1], "x_0": found.swarm["x_0"]}
    statistics = {name: np.sum((np.asarray(columns[name], np.float64) - 1.0) ** 2) / exact[name] for name in exact}
    law = scipy.stats.chi2(N)
    return {name: 2 * min(law.cdf(value), law.sf(value)) for name, value in statistics.items()}


def test_perturbations_cool_within_and_between_iterations():
    found = blind()
    p_values = schedule_p_values(found)
    assert min(p_values.values()) > FALSE_ALARM, p_values
    assert np.all(found.swarm["b"][:, 0] == 1.0)
    assert found.trace["b"].shape == (L + 1, 2)
    np.testing.assert_allclose(found.theta["a"], np.mean(found.swarm["a"]), rtol=1e-4)


@pytest.mark.parametrize("bug", ["no cooling", "no cooling within an iteration"])
def test_perturbations_that_do_not_cool_are_seen(bug, plant):
    plant(*BUGS[bug])
    assert min(schedule_p_values(blind()).values()) < FALSE_ALARM


# ---- what it is for ----

SERIES = jnp.asarray(learning_series())
MAXIMUM = np.array([0.96672677, -1.20858203, -0.22631829])  # of (a, log q, log r), by Kalman filter and Newton
SPREAD = np.array([0.0388, 0.3604, 0.0986])  # asymptotic standard deviations


def build(theta):
    return Scalar(theta[0], jnp.exp(theta[1]), 1.0, jnp.exp(theta[2]), 1.0)


def log_likelihood(theta):
    model = bi.models.LinearGaussian.scalar(theta[0], jnp.exp(theta[1]), 1.0, jnp.exp(theta[2]), initial_scale=1.0)
    return bi.models.kalman_filter(model, SERIES[:, None]).log_evidence


def climb(key, num_iterations=60, cooling=0.02, **options):
    start = jnp.asarray([0.5, 0.0, 0.0])
    options = {"perturbation": 0.05, "num_particles": 300, "cooling": cooling} | options
    return iterated_filtering(key, build, start, SERIES, num_iterations=num_iterations, **options)


@pytest.mark.usefixtures("run_fast")
def test_it_finds_the_maximum():
    found = jax.jit(jax.vmap(climb))(jax.random.split(jax.random.key(0), 6))
    # what the maximum likelihood estimate leaves open is a standard deviation in each, and 3 / 2 of the log likelihood;
    # the noise of 60 iterations of 300 particles is less than half of that
    in_sds = (np.asarray(found.theta) - MAXIMUM) / SPREAD
    assert np.all(np.abs(in_sds.mean(0)) < 0.5), in_sds
    gaps = log_likelihood(jnp.asarray(MAXIMUM)) - jax.vmap(log_likelihood)(found.theta)
    assert np.mean(gaps) < 0.75, gaps
    assert log_likelihood(jnp.asarray([0.5, 0.0, 0.0])) < log_likelihood(jnp.asarray(MAXIMUM)) - 20
    # and what is left of the swarm is little
    assert np.all(np.asarray(found.swarm).std(axis=1) < 0.5 * SPREAD)


@pytest.mark.slow
def test_it_fits_an_epidemic():
    """Transitions of whole numbers, and rates that are constrained."""
    truth = {"beta": 0.6, "rho": 0.4}

    def epidemic(theta):
        return bi.models.SIR(2_000, theta["beta"], 0.25, 0.01, theta["rho"], 20.0)

    _, ys = bi.models.simulate(1, epidemic(truth), num_steps=40)
    start = {"beta": 0.4, "rho": 0.2}
    law = {"beta": constraints.positive, "rho": constraints.unit_interval}
    found = iterated_filtering(
        0, epidemic, start, ys, perturbation=0.1, num_particles=300, num_iterations=25, constraints=law, cooling=0.02
    )

    def honest(theta):
        return float(particle_filter(1, epidemic(theta), ys, num_particles=1_000).log_evidence)

    assert honest(start) < honest(truth) - 10
    assert honest(found.theta) > honest(truth) - 1.5
    assert np.all((found.swarm["rho"] > 0) & (found.swarm["rho"] < 1))
    np.testing.assert_allclose([found.trace["beta"][0], found.trace["rho"][0]], [0.4, 0.2], rtol=1e-5)


def test_nothing_is_compiled_again():
    first = climb(0, 2)
    before = chunks._run_chunk._cache_size()
    other = iterated_filtering(
        1, build, jnp.zeros(3), SERIES + 1.0, perturbation=0.1, num_particles=300, num_iterations=2, cooling=0.3
    )
    assert chunks._run_chunk._cache_size() == before
    assert np.all(first.theta != other.theta)


# ---- what goes wrong ----


def test_iterations_that_fail_change_nothing():
    far = SERIES.at[20].set(0.5 * float(jnp.finfo(SERIES.dtype).max))
    with pytest.raises(errors.DegenerateWeightsError, match="In 2 of 2 iterations all weights vanished") as caught:
        iterated_filtering(0, build, jnp.zeros(3), far, perturbation=0.1, num_particles=300, num_iterations=2)
    result = caught.value.result
    assert result.num_failed == 2
    assert np.all(np.isneginf(result.log_evidence))
    np.testing.assert_array_equal(result.trace, np.zeros((3, 3)))


BAD = {
    "perturbation must be finite and at least 0, got -0.1": {"perturbation": -0.1},
    "perturbation must be a number or a pytree like theta": {"perturbation": {"a": 0.1}},
    "initial_perturbation must be scalars or of the shapes": {"initial_perturbation": jnp.ones(2)},
    "perturbation must be positive for at least one": {"perturbation": 0.0},
    "perturbation must be an array of numbers": {"perturbation": "small"},
    r"cooling must lie in \(0, 1\]": {"cooling": 0.0},
    "cooling must be one number": {"cooling": "slow"},
    "num_particles must be at least 2": {"num_particles": 1},
    "num_iterations": {"num_iterations": 0},
    "proposal must be one of": {"proposal": "best"},
    r"proposal='guided' needs a method proposal.*Drift": {"proposal": "guided", "build": Drift},
    "resampling must be one of": {"resampling": "best"},
    "build must be called as": {"build": lambda: None},
    "model must be an instance of a StateSpaceModel": {"build": lambda theta: theta},
    "theta must be floating point": {"theta": 1},
    "theta must lie inside its constraints": {"theta": -1.0, "constraints": constraints.positive},
    "key": {"key": -1},
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(match):
    options = {"key": 0, "build": Guided, "theta": 1.0, "ys": YS, "perturbation": 0.1, "num_particles": 10}
    with pytest.raises(ValueError, match=match):
        iterated_filtering(**options | {"num_iterations": 1} | BAD[match])
