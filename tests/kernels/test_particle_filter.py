"""The particle filter: the evidence and the filter are unbiased, against Kalman and against sums over all paths."""

import itertools
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from jaxtyping import Array

import bayesinf as bi
from bayesinf import errors, resampling
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.kernels import AdditiveFunctional, paris, particle_filter, ppg
from bayesinf.models import LinearGaussian, StateSpaceModel, kalman_filter
from bayesinf.models.state_space import rows_outside_support
from bayesinf.weights import Moments

MODEL = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.9, initial_mean=0.5)
YS = jnp.array([[1.0], [-0.4], [jnp.nan], [1.3]])


class LogEvidence(eqx.Module):
    """key -> log evidence; one compilation for all thresholds and parameters."""

    model: StateSpaceModel
    ys: Array
    ess_threshold: Array
    options: tuple = eqx.field(static=True)

    def __call__(self, key):
        options = {"num_particles": 8, "store": "none", **dict(self.options)}
        return particle_filter(key, self.model, self.ys, ess_threshold=self.ess_threshold, **options).log_evidence


@pytest.mark.parametrize(("scheme", "proposal"), [("systematic", "bootstrap"), ("killing", "guided")])
def test_evidence_is_unbiased_also_where_a_row_is_missing(scheme, proposal):
    exact = kalman_filter(MODEL, YS).log_evidence
    for threshold in (0.0, 0.5, 1.0):
        options = (("resampling", scheme), ("proposal", proposal))
        estimate = LogEvidence(MODEL, YS, jnp.asarray(threshold), options)
        report = evidence_is_unbiased(0, estimate, exact, num_replicates=4_000)
        report.raise_if_rejected()
        assert report.notes["effective replicates"] > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("scheme", resampling.SCHEMES)
@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_evidence_is_unbiased_with_many_replicates(scheme, proposal):
    exact = kalman_filter(MODEL, YS).log_evidence
    for threshold in (0.0, 0.5, 1.0):
        options = (("resampling", scheme), ("proposal", proposal))
        estimate = LogEvidence(MODEL, YS, jnp.asarray(threshold), options)
        evidence_is_unbiased(0, estimate, exact, num_replicates=100_000).raise_if_rejected()


class Regimes(StateSpaceModel):
    """Counts under one of three regimes, as (sample, log_prob) pairs on a pytree; the chain is not reversible."""

    log_initial: Array
    log_transition: Array
    rates: Array

    def _pair(self, logits):
        def sample(key):
            return {"regime": jax.random.categorical(key, logits)}

        return sample, lambda x: logits[x["regime"]]

    def initial(self):
        return self._pair(self.log_initial)

    def transition(self, x_prev, t):
        return self._pair(self.log_transition[x_prev["regime"]])

    def observation(self, x, t):
        return dist.Poisson(self.rates[x["regime"]] * (1 + 0.1 * t))

    # tilted towards the regime whose rate is next to the count
    def initial_proposal(self, y):
        return self._pair(jax.nn.log_softmax(self.log_initial - 0.2 * jnp.abs(self.rates - y)))

    def proposal(self, x_prev, y, t):
        return self._pair(jax.nn.log_softmax(self.log_transition[x_prev["regime"]] - 0.2 * jnp.abs(self.rates - y)))


REGIMES = Regimes(
    jnp.log(jnp.array([0.5, 0.3, 0.2])),
    jnp.log(jnp.array([[0.7, 0.25, 0.05], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4]])),
    jnp.array([0.5, 2.0, 6.0]),
)
COUNTS = jnp.array([0.0, 3.0, 2.0, 7.0, 1.0])


@lru_cache
def enumerate_paths():
    """Log evidence, and P(x_t = k | y_0..y_{T-1}) at the last t, by the sum over all paths."""
    initial, transition = np.exp(np.asarray(REGIMES.log_initial)), np.exp(np.asarray(REGIMES.log_transition))
    densities = scipy.stats.poisson(np.asarray(REGIMES.rates) * (1 + 0.1 * np.arange(5))[:, None]).pmf(
        np.asarray(COUNTS)[:, None]
    )
    totals = np.zeros(3)
    for path in itertools.product(range(3), repeat=5):
        moves = np.prod([transition[a, b] for a, b in itertools.pairwise(path)])
        totals[path[-1]] += initial[path[0]] * moves * np.prod([densities[t, k] for t, k in enumerate(path)])
    return np.log(totals.sum()), totals / totals.sum()


def is_regime(x):
    return jax.nn.one_hot(x["regime"], 3)


@pytest.mark.parametrize(("proposal", "scheme"), [("bootstrap", "ssp"), ("guided", "residual")])
def test_filter_of_a_pytree_is_unbiased_against_all_paths(proposal, scheme):
    """Zhat times the estimate of E[f(x_T)] has mean Z times it, for every number of particles."""
    log_evidence, filtered = enumerate_paths()

    def run(key):
        result = particle_filter(
            key, REGIMES, COUNTS, num_particles=6, proposal=proposal, resampling=scheme, functional=is_regime
        )
        return jnp.exp(result.log_evidence - log_evidence), result.estimates[-1]

    ratios, estimates = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=1000))(
        jax.random.split(jax.random.key(0), 10_000)
    )
    assert mean_p_value(ratios, 1.0) > FALSE_ALARM
    assert mean_p_value(ratios[:, None] * estimates, filtered) > FALSE_ALARM


def test_many_particles_find_the_kalman_filter():
    model = LinearGaussian(
        jnp.zeros(2),
        jnp.eye(2),
        jnp.array([[0.9, 0.3], [-0.2, 0.7]]),
        0.5 * jnp.eye(2),
        jnp.array([[1.0, 0.5]]),
        jnp.eye(1),
    )
    _, ys = bi.models.simulate(1, model, 10)
    exact = kalman_filter(model, ys)
    keys = jax.random.split(jax.random.key(0), 100)
    runs = jax.jit(jax.vmap(lambda key: particle_filter(key, model, ys, num_particles=2_000, proposal="guided")))(keys)
    # the bias of O(1/N) is far below the standard error
    assert mean_p_value(runs.estimates.mean, exact.filtered_means) > FALSE_ALARM
    sds = jnp.sqrt(jnp.sum(exact.filtered_trils**2, axis=2))
    np.testing.assert_allclose(runs.estimates.sd.mean(0), sds, rtol=1e-2)
    # the first one is exact for the optimal proposal
    np.testing.assert_allclose(runs.log_evidence_increments[:, 0], exact.log_evidence_increments[0], rtol=1e-4)
    assert mean_p_value(runs.log_evidence_increments[:, 1:], exact.log_evidence_increments[1:]) > FALSE_ALARM
    assert jnp.all(runs.num_invalid == 0)


def test_the_optimal_proposal_has_the_higher_ess():
    model = LinearGaussian.scalar(0.9, 1.0, 1.0, 0.1)
    _, ys = bi.models.simulate(0, model, 50)
    ess = {
        proposal: particle_filter(0, model, ys, num_particles=500, proposal=proposal, store="none").ess.mean()
        for proposal in ("bootstrap", "guided")
    }
    assert ess["guided"] > 1.5 * ess["bootstrap"]


def test_thresholds_say_when_to_resample():
    result = {
        threshold: particle_filter(2, MODEL, YS, num_particles=64, ess_threshold=threshold, store="full")
        for threshold in (0.0, 0.5, 1.0)
    }
    assert not result[0.0].is_resampled.any()
    assert result[1.0].is_resampled.tolist() == [False, True, True, True]
    for threshold, found in result.items():
        before = found.ess[:-1] <= threshold * 64
        assert found.is_resampled.tolist() == [False, *before.tolist()]
        kept = found.history.ancestors[~np.asarray(found.is_resampled)]
        np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(64), kept.shape))


def test_without_resampling_the_weights_are_those_of_importance_sampling():
    result = particle_filter(0, MODEL, YS, num_particles=16, ess_threshold=0.0, store="full")
    x = np.asarray(result.history.particles, np.float64)[..., 0]
    log_g = np.nan_to_num(scipy.stats.norm(x, 0.9).logpdf(np.asarray(YS)))  # 0 in the missing row
    log_w = log_g.sum(0)
    np.testing.assert_allclose(result.log_evidence, np.log(np.mean(np.exp(log_w))), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(result.log_weights), np.exp(log_w) / np.exp(log_w).sum(), rtol=1e-4)
    np.testing.assert_allclose(result.log_evidence_increments[2], 0.0, atol=1e-6)


def test_stores_agree():
    stores = {
        store: particle_filter(5, MODEL, YS, num_particles=32, store=store) for store in ("none", "summary", "full")
    }
    for result in stores.values():
        np.testing.assert_allclose(result.log_evidence, stores["none"].log_evidence, rtol=1e-6)
        np.testing.assert_allclose(result.particles, stores["none"].particles, rtol=1e-5)
    assert stores["none"].estimates is None
    assert stores["summary"].history is None
    history = stores["full"].history
    assert history.particles.shape == (4, 32, 1)
    w = jnp.exp(history.log_weights)
    np.testing.assert_allclose(w.sum(1), 1.0, rtol=1e-5)
    mean = jnp.einsum("tn,tnd->td", w, history.particles)
    for store in ("summary", "full"):
        assert isinstance(stores[store].estimates, Moments)
        np.testing.assert_allclose(stores[store].estimates.mean, mean, rtol=1e-5)
    np.testing.assert_array_equal(history.particles[-1], stores["full"].particles)


def test_jit_is_eager_and_vmap_is_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    persistences = jnp.array([0.2, 0.5, 0.9])
    series = jnp.stack([YS, 2 * YS, YS[::-1]])

    def run(key, a, ys):
        return particle_filter(key, LinearGaussian.scalar(a, 0.7), ys, num_particles=16)

    together = jax.jit(jax.vmap(run))(keys, persistences, series)
    for i in range(3):
        alone = run(keys[i], persistences[i], series[i])
        assert jax.tree.structure(alone) == jax.tree.structure(together)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b[i], a, rtol=2e-4, atol=1e-5)


class Counted(StateSpaceModel):
    """Counts how often it is traced."""

    scale: Array
    traces = 0

    def initial(self):
        Counted.traces += 1
        return dist.Normal(0.0, self.scale)

    def transition(self, x_prev, t):
        return dist.Normal(x_prev, self.scale)

    def observation(self, x, t):
        return dist.Normal(x, 1.0)


def test_new_data_parameters_and_thresholds_compile_nothing():
    particle_filter(0, Counted(jnp.asarray(1.0)), jnp.zeros(5), num_particles=4)
    traces = Counted.traces
    particle_filter(1, Counted(jnp.asarray(2.0)), jnp.ones(5), num_particles=4, ess_threshold=0.9)
    assert Counted.traces == traces > 0
    particle_filter(1, Counted(jnp.asarray(2.0)), jnp.ones(5), num_particles=5)
    assert Counted.traces > traces


def test_one_row_and_one_particle():
    result = particle_filter(0, MODEL, YS[:1], num_particles=1, store="full")
    log_g = MODEL.observation(result.particles[0], jnp.asarray(0)).log_prob(YS[0])
    np.testing.assert_allclose(result.log_evidence, log_g, rtol=1e-6)
    assert result.history.ancestors.tolist() == [[0]]


def test_all_data_missing():
    result = particle_filter(0, MODEL, jnp.full((5, 1), jnp.nan), num_particles=16, ess_threshold=1.0)
    np.testing.assert_allclose(result.log_evidence, 0.0, atol=1e-5)
    np.testing.assert_allclose(result.ess, 16, rtol=1e-6)


class Window(StateSpaceModel):
    """Observed exactly, up to a window: weights vanish where no particle is near; densities NaN beyond a limit."""

    limit: Array = eqx.field(converter=jnp.asarray, default=jnp.inf)

    def initial(self):
        return dist.Normal(0.0, 1.0)

    def transition(self, x_prev, t):
        return dist.Normal(x_prev, 1.0)

    def observation(self, x, t):
        return None, lambda y: jnp.where(jnp.abs(x) > self.limit, jnp.nan, jnp.where(jnp.abs(y - x) < 2, 0.0, -jnp.inf))


def test_lost_weights_are_reported_once_with_the_time():
    ys = jnp.array([0.0, 0.5, 60.0, 0.0, 0.0])
    with pytest.raises(errors.DegenerateWeightsError, match="At time step 2 no particle of 20") as caught:
        particle_filter(0, Window(), ys, num_particles=20)
    for result in (caught.value.result, particle_filter(0, Window(), ys, num_particles=20, throw=False)):
        assert result.log_evidence == -jnp.inf
        assert jnp.all(jnp.isfinite(result.log_evidence_increments[:2]))
        assert jnp.all(result.log_evidence_increments[2:] == -jnp.inf)
        assert result.ess[2:].tolist() == [0, 0, 0]
        assert jnp.all(jnp.isfinite(result.estimates.mean[:2]))
        assert jnp.all(jnp.isnan(result.estimates.mean[2:]))
    traced = jax.jit(lambda ys: particle_filter(0, Window(), ys, num_particles=20).log_evidence)(ys)
    assert traced == -jnp.inf


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_lost_weights_are_never_forgotten(threshold):
    ys = jnp.array([60.0, jnp.nan, 0.0])
    result = particle_filter(0, Window(), ys, num_particles=20, ess_threshold=threshold, throw=False)
    assert result.log_evidence == -jnp.inf
    assert result.ess.tolist() == [0, 0, 0]


def test_densities_that_are_not_finite_are_counted():
    ys = jnp.zeros(4)
    with pytest.warns(errors.SamplingWarning, match="log weights were NaN"):
        result = particle_filter(0, Window(1.0), ys, num_particles=50)
    assert result.num_invalid.sum() > 0
    assert jnp.isfinite(result.log_evidence)
    with pytest.raises(
        errors.DegenerateWeightsError, match="At time step 0 the log weights of all 50 particles were NaN"
    ):
        particle_filter(0, Window(-1.0), ys, num_particles=50)


@pytest.mark.usefixtures("unchecked")
def test_functionals_are_told_what_is_missing():
    def run(functional):
        return particle_filter(0, Window(), jnp.zeros(3), num_particles=4, functional=functional)

    with pytest.raises(ValueError, match="functional must return at least one number, got None"):
        run(lambda x: None)
    with pytest.raises(ValueError, match=r"functional must be called as functional\(x\), but it has \(x, y\)"):
        run(lambda x, y: x)
    with pytest.raises(ValueError, match=r"functional must be a function functional\(x\), got float"):
        run(1.0)


class Counting(Window):
    def observation(self, x, t):
        return dist.Poisson(jnp.exp(x))


@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_rows_outside_the_support_are_named():
    ys = jnp.array([1.0, jnp.nan, -2.0, 0.0, 2.5])
    model, total = Counting(), AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    runs = [
        lambda: particle_filter(0, model, ys, num_particles=8),
        lambda: paris(0, model, ys, total, num_particles=8),
        lambda: ppg(0, model, ys, total, num_particles=8, num_sweeps=2, burn_in=1, initial_path=jnp.zeros(5)),
    ]
    for run in runs:
        with pytest.raises(errors.DegenerateWeightsError, match=r"Rows \[2, 4\] of ys lie outside the support"):
            run()
    assert rows_outside_support(Window(), ys) == []  # a pair tells nothing of its support
    partly = jnp.array([[0.0, 1.0], [jnp.nan, 1.0], [jnp.nan, jnp.nan]])  # of a law over vectors
    plane = LinearGaussian(jnp.zeros(2), jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.eye(2))
    assert rows_outside_support(plane, partly) == []


class Restless(Counted):
    def transition(self, x_prev, t):
        return dist.Normal(x_prev * jnp.ones(2), 1.0)


def test_bad_arguments_are_named():
    def run(model=MODEL, ys=YS, **options):
        return particle_filter(0, model, ys, **{"num_particles": 4, **options})

    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        run(num_particles=0)
    with pytest.raises(ValueError, match=r"ess_threshold must lie in \[0, 1\].*got 50"):
        run(ess_threshold=50.0)
    with pytest.raises(ValueError, match="ess_threshold"):
        run(ess_threshold=float("nan"))
    with pytest.raises(ValueError, match="resampling must be one of 'systematic'"):
        run(resampling="sorted")
    with pytest.raises(ValueError, match="store must be one of"):
        run(store="everything")
    with pytest.raises(ValueError, match="proposal must be one of 'bootstrap', 'guided'"):
        run(proposal="optimal")
    with pytest.raises(ValueError, match=r"needs a method proposal\(x_prev, y, t\) of the model Counted"):
        run(Counted(jnp.asarray(1.0)), jnp.zeros(3), proposal="guided")
    with pytest.raises(ValueError, match="transition must draw states of the shape"):
        run(Restless(jnp.asarray(1.0)), jnp.zeros(3))
    with pytest.raises(ValueError, match="rows of shape"):
        run(ys=jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"rows \[1\] are infinite"):
        run(ys=jnp.array([[0.0], [jnp.inf]]))
    with pytest.raises(ValueError, match="key"):
        particle_filter(-3, MODEL, YS, num_particles=4)


def test_the_gradient_of_the_evidence_is_finite_and_exact_without_resampling():
    """Importance sampling with common random numbers: the gradient is the derivative of the estimate."""

    def log_evidence(a):
        return particle_filter(0, LinearGaussian.scalar(a, 0.7), YS, num_particles=50, ess_threshold=0.0).log_evidence

    with jax.enable_x64(True):
        step = 1e-5
        difference = (log_evidence(0.5 + step) - log_evidence(0.5 - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(log_evidence)(0.5), difference, rtol=1e-5)
