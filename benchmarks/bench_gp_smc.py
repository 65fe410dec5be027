"""Tempered SMC over a latent Gaussian process: 1,000 particles of a function at 100 places, and its evidence.

The likelihood is normal, so that the evidence is known. All temper adaptively to half the effective sample size and
make ten moves of every particle at each temperature, of step sizes that are fixed. BlackJAX has MALA only of these
moves: its elliptical slice does not fit its tempering.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from conftest import has

from bayesinf import kernels
from bayesinf.models import gp

NUM_PARTICLES = 1_000 // int(os.environ.get("BENCH_GP_SCALE", "1"))
NUM_PLACES, NUM_MOVES, ESS_TARGET, NOISE = 100, 10, 0.5, 0.3
NUM_TO_AVERAGE = 8
STEP_SIZES = {"MALA": 0.03, "PCNLangevin": 0.1, "MarginalGradient": 0.1}


@pytest.fixture(scope="module")
def problem():
    """The latent target, its data inside, and the exact log evidence."""
    X = jnp.linspace(0.0, 10.0, NUM_PLACES)
    y = jnp.sin(X) + NOISE * jax.random.normal(jax.random.key(0), (NUM_PLACES,))
    latent = gp.latent_target(gp.Matern32(2.0), X, lambda f, y: jnp.sum(dist.Normal(f, NOISE).log_prob(y)), y)
    return latent, float(gp.GP(gp.Matern32(2.0), X, noise=NOISE**2).log_prob(y))


def rest(z, target):
    """The posterior without its prior."""
    return target.logdensity(z) + 0.5 * jnp.sum(z**2)


def elliptical_slice(target):
    return kernels.EllipticalSlice(rest, 0.0, jnp.ones(NUM_PLACES), target)


def ours(latent, move):
    def run(key, latent):
        result = kernels.smc_sampler(
            key,
            latent.prior,
            gp.latent_log_likelihood,
            move,
            data=latent,
            num_particles=NUM_PARTICLES,
            ess_target=ESS_TARGET,
            num_moves=NUM_MOVES,
            tune=False,
            resampling="systematic",
            max_temperatures=50,
        )
        return result.log_evidence, result.num_steps

    return functools.partial(jax.jit(run), latent=latent)


def of_blackjax(latent):
    import blackjax

    def run(key, latent):
        step_size = jnp.full(1, STEP_SIZES["MALA"])
        sampler = blackjax.adaptive_tempered_smc(
            lambda z: -0.5 * jnp.sum(z**2),
            lambda z: gp.latent_log_likelihood(z, latent),
            blackjax.mala.build_kernel(),
            blackjax.mala.init,
            {"step_size": step_size},
            blackjax.smc.resampling.systematic,
            ESS_TARGET,
            num_mcmc_steps=NUM_MOVES,
        )

        def move(carry):
            key, state, log_evidence, num_steps = carry
            key, key_step = jax.random.split(key)
            state, info = sampler.step(key_step, state)
            return key, state, log_evidence + info.log_likelihood_increment, num_steps + 1

        key, key_prior = jax.random.split(key)
        state = sampler.init(jax.random.normal(key_prior, (NUM_PARTICLES, NUM_PLACES)))
        start = (key, state, jnp.zeros(()), 0)
        *_, log_evidence, num_steps = jax.lax.while_loop(lambda carry: carry[1].tempering_param < 1.0, move, start)
        return log_evidence, num_steps

    return functools.partial(jax.jit(run), latent=latent)


def bench_smc(compare, problem):
    latent, exact = problem
    moves = {"EllipticalSlice": elliptical_slice}
    moves |= {name: functools.partial(getattr(kernels, name), step_size=size) for name, size in STEP_SIZES.items()}
    calls = {f"bayesinf {name}": ours(latent, move) for name, move in moves.items()}
    if has("blackjax"):
        calls["blackjax mala"] = of_blackjax(latent)
    keys = jax.random.split(jax.random.key(1), NUM_TO_AVERAGE)

    def note(name, medians):
        found, num_steps = (jnp.stack(values) for values in zip(*map(calls[name], keys), strict=True))
        errors, steps = found - exact, jnp.mean(num_steps)
        cost = 1e6 * medians[name] / (float(steps) * NUM_MOVES * NUM_PARTICLES)
        return (
            f"{cost:.2g} us a move, {float(steps):.1f} temperatures; "
            f"log evidence off by {float(jnp.mean(errors)):+.2f}, sd {float(jnp.std(errors, ddof=1)):.2f}"
        )

    title = f"tempered SMC, {NUM_PARTICLES:,} particles over a Gaussian process at {NUM_PLACES} places"
    compare(title, {name: functools.partial(call, keys[0]) for name, call in calls.items()}, rounds=7, note=note)
