"""Particle marginal Metropolis-Hastings: invariance from exact starts, on the extended space and by its margin."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from planted.parisian import StaleMarginal
from ppg_models import smooth

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, contract, mean_p_value
from bayesinf.kernels import ParticleMarginal
from bayesinf.models import LinearGaussian
from bayesinf.resampling import iid

FAR = 0.5 * float(jnp.finfo(jnp.result_type(float)).max)  # nothing explains it, in any precision
YS = jnp.array([0.9, -1.1, jnp.nan, 2.0, 0.4])[:, None]
GRID = np.linspace(-4.0, 3.0, 2_001)  # of log q, whose prior is that of a Gamma(2) variable's logarithm


def build(theta):
    return LinearGaussian.scalar(0.8, jnp.exp(theta), 1.0, 0.7, initial_scale=1.0)


def log_prior(theta):
    return 2.0 * theta - jnp.exp(theta)


def exact_posterior():
    """Its density on the grid, and the evidence of the series there."""
    ys = np.asarray(YS[:, 0])
    log_evidence = np.array([smooth(ys, 0.8, np.exp(x), 1.0, 0.7, 1.0).log_evidence for x in GRID])
    density = np.exp(2.0 * GRID - np.exp(GRID) + log_evidence)
    return density / density.sum(), log_evidence


DENSITY, LOG_EVIDENCE = exact_posterior()
MEAN = DENSITY @ GRID
VARIANCE = DENSITY @ (GRID - MEAN) ** 2


def kernel_of(kernel_class=ParticleMarginal, **options):
    return kernel_class(build, log_prior, YS, 4, step_size=0.8, **options)


@eqx.filter_jit
def exact_states(kernel, key, num, pool):
    """Draws of (theta, u) from the extended target: theta from the posterior, u by its share of Zhat(theta, u)."""
    key_theta, key_seeds, key_choose = jax.random.split(key, 3)
    thetas = jnp.asarray(GRID)[iid(key_theta, jnp.log(jnp.asarray(DENSITY)), pool)]
    seeds = jax.random.bits(key_seeds, (pool, YS.shape[0]))
    log_evidence = jax.lax.map(lambda row: kernel._evaluate(*row)[1], (thetas, seeds), batch_size=5_000)
    exact = jnp.interp(thetas, jnp.asarray(GRID), jnp.asarray(LOG_EVIDENCE))
    chosen = iid(key_choose, log_evidence - exact, num)
    state = jax.vmap(kernel.init)(thetas[chosen])
    evaluation = state.evaluation._replace(logdensity=jax.vmap(log_prior)(thetas[chosen]) + log_evidence[chosen])
    return state._replace(evaluation=evaluation, seeds=seeds[chosen])


@eqx.filter_jit
def moved(kernel, states, key, num_steps):
    def chain(row):
        state, key = row

        def move(i, carry):
            state, accepted = carry
            state, info = kernel.step(jax.random.fold_in(key, i), state)
            return state, accepted + info.is_accepted

        return jax.lax.fori_loop(0, num_steps, move, (state, 0))

    num = states.position.shape[0]
    return jax.lax.map(chain, (states, jax.random.split(key, num)), batch_size=5_000)


def p_values(kernel, num=10_000, num_steps=4):
    """Of the mean and variance of theta after some steps from exact starts, and the share of accepted moves."""
    key_start, key_move = jax.random.split(jax.random.key(5))
    states, accepted = moved(kernel, exact_states(kernel, key_start, num, 20 * num), key_move, num_steps)
    thetas = np.asarray(states.position, np.float64)
    found = {"mean": mean_p_value(thetas, MEAN), "variance": mean_p_value((thetas - MEAN) ** 2, VARIANCE)}
    return found, float(accepted.sum()) / (num * num_steps)


def test_it_keeps_the_contract():
    contract(kernel_of(renewal=0.5), jnp.asarray(0.3))


@pytest.mark.parametrize("options", [{}, {"renewal": 0.3, "resampling": "stratified", "ess_threshold": 1.0}])
def test_the_posterior_is_invariant(options):
    found, share = p_values(kernel_of(**options))
    assert min(found.values()) > FALSE_ALARM, found
    assert share > 0.2  # and the chains move


def test_a_chain_that_renews_the_estimate_of_where_it_is_is_found():
    """Monte Carlo within Metropolis: the noise of a fresh denominator makes another posterior."""
    found, _ = p_values(kernel_of(StaleMarginal))
    assert min(found.values()) < FALSE_ALARM, found


def test_correlated_estimates_differ_less():
    """Sorted particles, and a tenth of the random numbers renewed: the noise of the ratio is a fraction."""
    _, ys = bi.models.simulate(3, LinearGaussian.scalar(0.8, 0.5, 1.0, 0.7, initial_scale=1.0), 100)
    theta = jnp.log(jnp.asarray(0.5))

    def spread(renewal):
        kernel = ParticleMarginal(build, log_prior, ys, 32, step_size=1e-6, renewal=renewal)

        def ratio(key):
            key_first, key_step = jax.random.split(key)
            state = kernel.init(theta)._replace(seeds=jax.random.bits(key_first, (100,)))
            state = state._replace(evaluation=kernel._evaluate(theta, state.seeds)[0])
            _, info = kernel.step(key_step, state)
            return info.log_evidence + log_prior(theta) - state.evaluation.logdensity

        return np.std(
            jax.jit(lambda keys: jax.lax.map(ratio, keys, batch_size=100))(jax.random.split(jax.random.key(0), 200))
        )

    assert spread(0.1) < 0.5 * spread(0.999)


def prior():
    numpyro.sample("scale", dist.Gamma(2.0, 1.0))


def test_sampling_with_constraints_and_warm_up():
    target = bi.Target.from_numpyro(prior)
    kernel = ParticleMarginal(partial(from_named, LinearGaussian.scalar), target, YS, 32)
    draws = bi.sample(0, kernel, target.init(1, 8), num_samples=1_500, num_warmup=300, progress=False)
    scale = draws.variables["scale"]
    assert scale.shape == (8, 1_500)
    exact = DENSITY @ np.exp(GRID)
    means = np.asarray(scale, np.float64).mean(1)  # chains are independent replicates
    z = (means.mean() - exact) / (means.std(ddof=1) / np.sqrt(8))
    assert 2 * scipy.stats.t(7).sf(abs(z)) > FALSE_ALARM
    assert 0.05 < draws.stats["acceptance_rate"].mean() < 0.5


def from_named(scalar, theta):
    return scalar(0.8, theta["scale"], 1.0, 0.7, initial_scale=1.0)


def test_impossible_data_are_a_rejection_and_a_bad_start_is_left():
    kernel = kernel_of()
    state = kernel.init(jnp.asarray(0.0))
    lost = state._replace(evaluation=state.evaluation._replace(logdensity=jnp.asarray(-jnp.inf)))
    after, info = kernel.step(jax.random.key(0), lost)
    assert bool(info.is_accepted)
    assert np.isfinite(after.evaluation.logdensity)
    hopeless = ParticleMarginal(build, log_prior, YS.at[0].set(FAR), 4, step_size=0.8)
    state = hopeless.init(jnp.asarray(0.0))
    assert np.isneginf(state.evaluation.logdensity)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match=r"renewal must lie in \(0, 1\], got 0.0"):
        kernel_of(renewal=0.0)
    with pytest.raises(ValueError, match="step_size"):
        ParticleMarginal(build, log_prior, YS, 4, step_size=-1.0)
    with pytest.raises(ValueError, match="build must be called as"):
        ParticleMarginal(lambda: None, log_prior, YS, 4)
    kernel = kernel_of(inverse_mass_matrix=jnp.ones(2))
    with pytest.raises(ValueError, match=r"inverse_mass_matrix must be over the ravelled position, of shape \(1,\)"):
        kernel.step(jax.random.key(0), kernel.init(jnp.asarray(0.0)))
