"""SMC^2 against quadrature over one parameter of a linear Gaussian model, whose filter given the parameter is Kalman's.

With fixed moves E[Zhat f] = Z E[f(theta, x_{T-1}) | y] and, with V the estimate of its relative variance,
E[Zhat^2 V] = var(Zhat) exactly, for every number of parameters and state particles.
"""

import importlib
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from ppg_models import smooth

import bayesinf as bi
from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.kernels import ParticleFilter, smc_squared
from bayesinf.kernels.nested_filters import NestedFilters
from bayesinf.models import LinearGaussian

NESTED = importlib.import_module("bayesinf.kernels.nested_filters")
LINEAGE = importlib.import_module("bayesinf.kernels.lineage")
YS = jnp.array([0.9, 1.8, jnp.nan, 2.0, 0.4])[:, None]
PRIOR = dist.Gamma(3.0, 3.0)
GRID = np.linspace(-4.5, 2.5, 701)  # of the logarithm of the parameter


def build(q, noise=1.0):
    """y_t = q x_t + noise: what the state is depends on the parameter."""
    return LinearGaussian.scalar(0.8, 0.6, q, noise, initial_scale=1.0)


def quadrature():
    """The log evidence, and the posterior mean of `functional`."""
    q = np.exp(GRID)
    found = [smooth(np.asarray(YS[:, 0]), 0.8, 0.6, x, 1.0, 1.0) for x in q]
    log_joint = np.asarray(PRIOR.log_prob(q), np.float64) + GRID + [one.log_evidence for one in found]
    density = np.exp(log_joint)
    x, xx = np.array([(one.mean[-1], one.cov[-1, -1] + one.mean[-1] ** 2) for one in found]).T
    moments = density @ np.stack([q, q**2, x, xx, q * x], axis=1) / density.sum()
    return np.log(density.sum() * (GRID[1] - GRID[0])), moments


LOG_EVIDENCE, MOMENTS = quadrature()


pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation


def moments_of(result):
    """The means of q, q^2, x, x^2 and q x over the parameters and their filters, x the last state."""
    w = jnp.exp(result.log_weights)
    x = result.filters.particles[..., 0]
    inner = jnp.exp(result.filters.log_weights)
    x, xx, q = jnp.sum(inner * x, 1), jnp.sum(inner * x**2, 1), result.particles
    return jnp.stack([jnp.sum(w * value) for value in (q, q**2, x, xx, q * x)])


def of(result):
    return result.log_evidence, result.log_evidence_variance, moments_of(result)


FIXED = {
    "num_parameters": 12,
    "num_particles": 3,
    "ess_threshold": 1.0,
    "num_moves": 1,
    "walk_tril": jnp.full((1, 1), 0.8),
}


ADAPTIVE = {"num_parameters": 300, "num_particles": 20}


class Replicate(eqx.Module):
    """key -> log Zhat; the name of a bug makes it another function for the caches of compiled ones."""

    bug: str = eqx.field(static=True, default="")
    is_adaptive: bool = eqx.field(static=True, default=False)

    def result(self, key):
        return smc_squared(key, build, PRIOR, YS, throw=False, **(ADAPTIVE if self.is_adaptive else FIXED))

    def __call__(self, key):
        return self.result(key).log_evidence

    def all(self, key):
        return of(self.result(key))


@partial(jax.jit, static_argnums=(0, 2))
def _replicate(run, keys, batch_size):
    return jax.lax.map(run.all, keys, batch_size=batch_size)


def replicate(bug="", num=10_000):
    return _replicate(Replicate(bug), jax.random.split(jax.random.key(1), num), 1_000)


def p_values(log_evidence, variance, moments):
    ratios = np.exp(np.asarray(log_evidence, np.float64) - LOG_EVIDENCE)
    return {
        "evidence": mean_p_value(ratios, 1.0),
        "variance": mean_p_value(ratios**2 * np.asarray(variance, np.float64) - (ratios - 1.0) ** 2, 0.0),
        "moments": mean_p_value(ratios[:, None] * np.asarray(moments, np.float64), MOMENTS),
    }


@pytest.mark.slow
def test_evidence_is_unbiased():
    report = evidence_is_unbiased(0, Replicate(), LOG_EVIDENCE, num_replicates=100_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 10_000, report


def test_evidence_its_variance_and_moments_of_parameters_and_states_are_unbiased():
    found = p_values(*replicate())
    assert min(found.values()) > FALSE_ALARM, found


@pytest.mark.slow
def test_adaptive_runs_have_the_variance_that_each_of_them_estimates():
    # the bias of one is of order 1 / N, that of a mean over 200 runs of order 1 / sqrt(200 N): a third of it at N = 300
    found = p_values(*_replicate(Replicate(is_adaptive=True), jax.random.split(jax.random.key(2), 200), 20))
    assert min(found.values()) > FALSE_ALARM, found


@pytest.mark.slow
def test_there_is_no_variance_estimate_for_other_schemes():
    result = smc_squared(0, build, PRIOR, YS, **FIXED | {"resampling": "systematic"})
    assert np.isnan(result.log_evidence_variance)


# ---- planted bugs ----


@pytest.fixture
def plant(monkeypatch):
    """Replaces functions, and makes what was compiled with the right ones be forgotten."""

    def forget():
        for compiled in (NESTED.start, NESTED.advance, NESTED.grow):
            compiled.clear_cache()

    def replace(*bugs):
        for owner, name, wrong in bugs:
            monkeypatch.setattr(owner, name, wrong)
        forget()

    yield replace
    monkeypatch.undo()
    forget()


FIRST, NEXT, ANEW, CHOOSE = NestedFilters.first, NestedFilters.next, NestedFilters.anew, NESTED._choose


def first_that_remembers(self, key, position):
    state, *told = FIRST(self, key, position)
    return state._replace(rounding=jnp.zeros_like(state.rounding)), *told


def next_that_remembers(self, position, state):
    """The evidence before this observation, where rounding errors are kept."""
    after, *told = NEXT(self, position, state._replace(rounding=jnp.zeros_like(state.rounding)))
    return after._replace(rounding=state.log_evidence), *told


def density_before(self, positions, filters):
    return jax.vmap(self.prior.log_density)(positions) + filters.rounding


def anew_too_short(self, keys, positions, t):
    filters, num_invalid = ANEW(self, keys, positions, t - 1)
    return filters._replace(t=jnp.full_like(filters.t, t)), num_invalid


def keep_filters(is_new, new, old):
    return CHOOSE(is_new, [new[0], old[1], new[2]], old)


def without_inheritance(lineage, parents, scheme):
    return LINEAGE.descend(lineage, jnp.arange(parents.size), scheme)


BUGS = {
    # that of particles#73: the moves leave the posterior before y_t invariant
    "target off by one": [
        (NestedFilters, "first", first_that_remembers),
        (NestedFilters, "next", next_that_remembers),
        (NestedFilters, "log_density", density_before),
    ],
    "filters end before y_t": [(NestedFilters, "anew", anew_too_short)],
    "filters stay behind": [(NESTED, "_choose", keep_filters)],
    "no prior": [(NestedFilters, "log_density", lambda self, positions, filters: filters.log_evidence)],
    "ancestors not inherited": [(NESTED, "descend", without_inheritance)],
    "no correction for siblings": [(LINEAGE, "_log_correction", lambda num: jnp.zeros(()))],
}


MAIN_BUGS = ("target off by one", "filters stay behind", "ancestors not inherited")


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug not in MAIN_BUGS)) for bug in BUGS])
def test_planted_bugs_are_rejected(bug, plant):
    plant(*BUGS[bug])
    found = p_values(*replicate(bug))
    assert min(found.values()) < FALSE_ALARM, found


# ---- more state particles ----


def run_growing(key, least_acceptance):
    options = FIXED | {"num_parameters": 100, "num_particles": 2, "max_particles": 4}
    return smc_squared(key, build, PRIOR, YS, throw=False, least_acceptance=least_acceptance, **options)


def grown(num):
    """Runs in which the filters are doubled after the first observation, whatever happens."""
    results = [run_growing(key, 1.0) for key in range(num)]
    for result in results:
        assert result.num_state_particles.tolist() == [4, 4, 4, 4, 4]
    return tuple(np.stack(found) for found in zip(*[of(r) for r in results], strict=True))


@pytest.mark.usefixtures("unchecked")
def test_filters_grow_where_moves_are_hardly_accepted():
    never = run_growing(0, 0.0)
    assert never.num_state_particles.tolist() == [2, 2, 2, 2, 2]
    assert never.filters.log_weights.shape == (100, 2)
    rates = np.asarray(never.acceptance_rates)
    for least in (rates[:-1].min() + 1e-4, rates[:-1].max() - 1e-4):
        result = run_growing(0, least)
        t = int(np.argmax(rates < least))
        # until the first low rate nothing is different
        np.testing.assert_array_equal(result.acceptance_rates[: t + 1], rates[: t + 1])
        assert result.num_state_particles.tolist() == [2] * t + [4] * (5 - t)
        assert result.filters.log_weights.shape == (100, 4)
        assert np.all(np.asarray(result.filters.t) == 4)


@pytest.mark.usefixtures("unchecked")
def test_evidence_its_variance_and_moments_are_unbiased_when_filters_grow():
    found = p_values(*grown(150))
    assert min(found.values()) > FALSE_ALARM, found


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_an_exchange_of_filters_without_weights_is_rejected(plant):
    plant((NESTED, "_log_exchange", lambda new, old: jnp.zeros_like(new.log_evidence)))
    found = p_values(*grown(150))
    assert min(found.values()) < FALSE_ALARM, found


# ---- adaptive runs ----


def sharp(q):
    """Noise so small that parameters must move, and filters need particles."""
    return build(q, 0.5)


_, SERIES = bi.models.simulate(3, sharp(1.0), num_steps=30)


# One compiled program serves most of these calls: only what is an array differs.
def run_once(key=0, ys=SERIES, rate=3.0, **options):
    options = {"num_parameters": 300, "num_particles": 50} | options
    return smc_squared(key, sharp, dist.Gamma(3.0, rate), ys, **options)


def test_an_adaptive_run_agrees_with_quadrature():
    result = run_once()
    q = np.linspace(0.02, 4.0, 400)
    log_evidence = jax.vmap(lambda x: bi.models.kalman_filter(sharp(x), SERIES).log_evidence)(jnp.asarray(q))
    density = np.exp(np.asarray(log_evidence + dist.Gamma(3.0, 3.0).log_prob(q), np.float64))
    exact = np.log(density.sum() * (q[1] - q[0]))
    mean = density @ q / density.sum()
    sd = np.sqrt(density @ (q - mean) ** 2 / density.sum())
    w = np.exp(np.asarray(result.log_weights, np.float64))
    # of a sd and of a relative error of about 1 / sqrt(300 / 2): six of them
    assert abs(w @ result.particles - mean) < 0.5 * sd
    assert abs(np.sqrt(w @ (result.particles - w @ result.particles) ** 2) / sd - 1) < 0.35
    assert abs(result.log_evidence - exact) < 5 * np.sqrt(result.log_evidence_variance)
    assert 0 < result.is_resampled.sum() < 30
    assert np.all(np.isnan(result.acceptance_rates) == ~result.is_resampled)
    np.testing.assert_allclose(result.log_evidence_increments.sum(), result.log_evidence, rtol=1e-4)
    np.testing.assert_allclose(result.positions, np.log(result.particles), rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_again():
    first = run_once()
    before = [program._cache_size() for program in (NESTED.start, NESTED.advance)]
    other = run_once(1, ys=SERIES + 0.5, rate=2.0, ess_threshold=0.3, filter_ess_threshold=0.7)
    assert [program._cache_size() for program in (NESTED.start, NESTED.advance)] == before
    assert other.log_evidence != first.log_evidence


@pytest.mark.slow
def test_batches_give_the_same_run():
    whole, parts = run_once(), run_once(batch_size=130)
    np.testing.assert_allclose(whole.log_evidence, parts.log_evidence, rtol=1e-4)
    np.testing.assert_array_equal(whole.is_resampled, parts.is_resampled)


def test_filters_go_on():
    """The filters stand where the series ends, and copies of one parameter go on by random numbers of their own."""
    result = run_once()
    assert np.all(np.asarray(result.filters.t) == 29)
    assert len(np.unique(result.particles)) < 290

    def go_on(q, state):
        return ParticleFilter(sharp(q), num_particles=50).step(state, SERIES[0])

    states, infos = jax.vmap(go_on)(result.particles, result.filters)
    assert np.all(np.asarray(states.t) == 30)
    assert len(np.unique(infos.log_evidence_increment)) > 290


def test_the_covariance_of_the_moves():
    flat = np.random.default_rng(0).gamma(2.0, size=(40, 3)) @ np.array([[1.0, 0, 0], [5, 1, 0], [0, 0, 1e-4]])
    log_weights = np.log(np.random.default_rng(1).dirichlet(np.ones(40)))
    nested = NestedFilters(build, None, None, None, 0.5, 0.5, 0.2, 40, 2, 2, 1, "bootstrap", *2 * ["systematic"], None)

    def found(flat, log_weights):
        positions = {"a": jnp.asarray(flat[:, 0]), "b": jnp.asarray(flat[:, 1:])}
        tril = np.asarray(nested.walk(NESTED.Population(positions, jnp.asarray(log_weights), None, None)), np.float64)
        return tril @ tril.T * 3 / 2.38**2

    w = np.exp(log_weights)
    num = 1 / np.sum(w**2)
    expected = (num * np.cov(flat.T, aweights=w, bias=True) + 5 * np.diag(flat.var(0))) / (num + 5)
    np.testing.assert_allclose(found(flat, log_weights), expected, rtol=1e-3, atol=1e-9)
    one = np.where(np.arange(40) == 7, 0.0, -np.inf)  # a single survivor moves as the population was spread
    np.testing.assert_allclose(found(flat, one), 5 / 6 * np.diag(flat.var(0)), rtol=1e-3)
    same = flat * [0.0, 1.0, 1.0]
    assert np.all(np.linalg.eigvalsh(found(same, log_weights)) > 0)
    edge = np.where(np.arange(40)[:, None] == 7, np.inf, flat)
    there = np.where(np.arange(40) == 7, -np.inf, log_weights)
    assert np.all(np.isfinite(found(edge, there)))


# ---- what may be passed, and what goes wrong ----


def named_prior():
    numpyro.sample("q", dist.Gamma(3.0, 3.0))


@pytest.mark.slow
def test_a_numpyro_model_is_a_prior():
    prior = bi.Target.from_numpyro(named_prior)
    result = smc_squared(0, lambda theta: build(theta["q"]), prior, YS, num_parameters=50, num_particles=10)
    assert set(result.particles) == {"q"}
    assert abs(result.log_evidence - LOG_EVIDENCE) < 1.0  # of 50 parameters


def test_impossible_data_are_an_error():
    far = SERIES.at[20].set(0.5 * float(jnp.finfo(SERIES.dtype).max))
    with pytest.raises(errors.DegenerateWeightsError, match="At time step 20 no filter of 300 parameters") as caught:
        run_once(ys=far)
    quiet = run_once(ys=far, throw=False)
    for result in (caught.value.result, quiet):
        assert result.log_evidence == -np.inf
        assert np.all(np.isfinite(result.log_evidence_increments[:20]))
        assert np.isnan(result.log_evidence_variance)
        assert np.all(np.isneginf(result.log_weights))
        assert not result.is_resampled[20:].any()


@pytest.mark.slow
def test_moves_that_stand_still_warn():
    with pytest.warns(errors.SamplingWarning, match="copies of few"):
        run_once(walk_tril=jnp.full((1, 1), 1e6))


def test_proposals_outside_of_the_prior_are_rejected_silently():
    """Where the prior vanishes there is no model: here a negative scale."""

    def log_prior(q):
        return jnp.where((q > 0.5) & (q < 1.5), 0.0, -jnp.inf)

    def scaled(q):
        return LinearGaussian.scalar(0.8, jnp.where(q > 0.5, q, jnp.nan), 1.0, 1.0, initial_scale=1.0)

    prior = (lambda key: jax.random.uniform(key, minval=0.5, maxval=1.5), log_prior)
    result = smc_squared(0, scaled, prior, YS, **FIXED)
    assert np.all(np.asarray(result.num_invalid) == 0)
    assert np.all((result.particles > 0.5) & (result.particles < 1.5))


def observed_prior():
    named_prior()
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.0)


BAD = {
    "num_parameters must be at least 2": {"num_parameters": 1},
    "num_particles": {"num_particles": 0},
    "max_particles must be at least num_particles=4": {"max_particles": 2},
    r"least_acceptance must lie in \[0, 1\], got 2": {"least_acceptance": 2.0},
    r"ess_threshold must lie in \[0, 1\], got -1": {"ess_threshold": -1.0},
    r"filter_ess_threshold must lie in \[0, 1\]": {"filter_ess_threshold": 1.5},
    "ess_threshold must be a number": {"ess_threshold": "half"},
    "num_moves": {"num_moves": 0},
    r"walk_tril must be over the ravelled.*\(1, 1\), got shape \(2, 2\)": {"walk_tril": jnp.eye(2)},
    "proposal must be one of": {"proposal": "best"},
    "^resampling must be one of": {"resampling": "best"},
    "filter_resampling must be one of": {"filter_resampling": "best"},
    "batch_size": {"batch_size": 0},
    "build must be called as": {"build": lambda: None},
    "model must be an instance of a StateSpaceModel": {"build": lambda q: q},
    "prior must be a NumPyro distribution": {"prior": "normal"},
    "prior must be a model without observed sites": {"prior": bi.Target.from_numpyro(observed_prior)},
    "prior must be proper": {"prior": dist.ImproperUniform(dist.constraints.real, (), ())},
    "ys must have at least one row": {"ys": jnp.zeros((0, 1))},
    "ys must have rows of shape": {"ys": jnp.zeros((5, 2))},
    "key": {"key": -1},
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(match):
    options = {"key": 0, "build": build, "prior": PRIOR, "ys": YS, "num_parameters": 4, "num_particles": 4}
    with pytest.raises(ValueError, match=match):
        smc_squared(**options | BAD[match])


def test_filters_cannot_grow_while_traced():
    with pytest.raises(ValueError, match="max_particles must be None while traced"):
        jax.jit(lambda key: run_once(key, max_particles=100))(jax.random.key(0))
