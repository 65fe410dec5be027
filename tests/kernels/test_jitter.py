"""Random step sizes; the contract and the invariance are tested with all kernels."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance, mean_p_value

TARGET = bi.Target(lambda x: jnp.sum(3.0 * x - jnp.exp(x)))
MALA = kernels.MALA(TARGET, 0.5)
KEY = jax.random.key(0)


def test_the_factor_is_drawn_from_its_law():
    """Of a walk on a flat target it can be read off: moves are sqrt(2 h s) xi."""
    kernel = kernels.Jitter(kernels.LMC(bi.Target(lambda x: 0.0 * jnp.sum(x)), 0.5), dist.Uniform(0.5, 4.0))
    state = kernel.init(jnp.zeros(2_000))
    moves = jax.vmap(lambda key: kernel.step(key, state)[0].position)(jax.random.split(KEY, 2_000))
    # the mean square of 2000 moves of one step tells the factor to 3%, less than the law of the factor resolves
    factors = np.mean(np.square(moves), axis=1)
    assert scipy.stats.kstest(factors, scipy.stats.uniform(0.5, 3.5).cdf).pvalue > FALSE_ALARM


def test_the_factor_says_nothing_of_the_noise():
    """One key for both would make large factors go with moves to one side."""
    kernel = kernels.Jitter(kernels.LMC(bi.Target(lambda x: 0.0 * x), 0.5), dist.Uniform(0.1, 1.9))
    state = kernel.init(jnp.zeros(()))
    moves = np.asarray(jax.vmap(lambda key: kernel.step(key, state)[0].position)(jax.random.split(KEY, 50_000)))
    assert mean_p_value(np.stack([moves, moves**3], axis=1), 0.0) > FALSE_ALARM
    assert mean_p_value(moves**2, 1.0) > FALSE_ALARM


def test_every_chain_draws_its_own():
    kernel = kernels.Jitter(kernels.LMC(TARGET, 1e-3), dist.Uniform(0.1, 10.0))
    states = jax.vmap(kernel.init)(jnp.zeros((2, 4_000)))
    moved, _ = jax.vmap(kernel.step)(jax.random.split(KEY), states)
    sizes = np.std(moved.position, axis=1)
    assert abs(np.log(sizes[0] / sizes[1])) > 0.1


def exact(key):
    return jnp.log(jnp.sum(jax.random.exponential(key, (2, 3)), axis=1))


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.Repeat(kernels.Jitter(kernels.GHMC(TARGET, 0.5), dist.LogNormal(0.0, 0.7)), 2),
        # given the factor the proposal is that of LMC
        kernels.Metropolize(kernels.Jitter(kernels.LMC(TARGET, 0.5), dist.LogNormal(0.0, 0.7))),
    ],
    ids=["velocities", "adjusted"],
)
def test_a_wide_factor_leaves_the_law_invariant(kernel):
    report = exact_start_invariance(0, kernel, exact, num_chains=50_000, num_steps=6, prepare=kernel.refresh)
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_warm_up_tunes_what_is_multiplied():
    kernel = kernels.Jitter(kernels.MALA(TARGET, 1e-3), dist.LogNormal(0.0, 0.5))
    draws = bi.sample(0, kernel, jnp.zeros((4, 5)), num_samples=500, num_warmup=500, progress=False)
    assert abs(draws.stats["acceptance_rate"].mean() - 0.574) < 0.06
    assert kernels.Jitter(kernels.HMC(TARGET, 0.1)).has_metric


def test_new_factors_compile_nothing():
    laws = (dist.Uniform(0.8, 1.2), dist.Uniform(0.5, 2.0))
    assert closed_forms.num_programs([kernels.Jitter(MALA, law) for law in laws], jnp.zeros(2)) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.Jitter(kernels.Gibbs({0: kernels.LMC(TARGET, 1.0)})), "with a step size, got Gibbs"),
        (lambda: kernels.Jitter(MALA, 0.2), "distribution must be a NumPyro distribution, got float"),
        (lambda: kernels.Jitter(MALA, dist.Normal(1.0, 0.1)), r"continuous on \(0, inf\), got Normal"),
        (lambda: kernels.Jitter(MALA, dist.Uniform(-0.1, 2.0)), r"continuous on \(0, inf\), got Uniform"),
        (lambda: kernels.Jitter(MALA, dist.Poisson(3.0)), r"continuous on \(0, inf\), got Poisson"),
        (lambda: kernels.Jitter(MALA, dist.Uniform(jnp.ones(2), 2.0)), r"one of scalars, got shape \(2,\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
