"""Particle methods on a one-dimensional stochastic volatility model, 1000 steps and 1000 particles.

`particles` needs numpy below 2 and so an environment of its own: name its interpreter in PARTICLES_PYTHON.
"""

import os
import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from conftest import has

from bayesinf import kernels, models

NUM_STEPS, NUM_PARTICLES = 1000, 1000
MEAN, PERSISTENCE, SCALE = 0.0, 0.97, 0.2
STATIONARY_SCALE = SCALE / (1 - PERSISTENCE**2) ** 0.5


@pytest.fixture(scope="module")
def model():
    return models.StochasticVolatility(MEAN, PERSISTENCE, SCALE)


@pytest.fixture(scope="module")
def ys(model):
    return models.simulate(jax.random.key(0), model, NUM_STEPS)[1]


def per_step(name, medians):
    return f"{1e6 * medians[name] / NUM_STEPS:.3g} us a step"


@jax.jit
def run_blackjax(key, ys):
    from blackjax.smc import base, resampling

    key_initial, key_steps = jax.random.split(key)
    state = base.init(MEAN + STATIONARY_SCALE * jax.random.normal(key_initial, (NUM_PARTICLES,)), None)
    log_weights = dist.Normal(0.0, jnp.exp(0.5 * state.particles)).log_prob(ys[0])
    state = state._replace(weights=jax.nn.softmax(log_weights))

    def move(keys, xs, _):
        return MEAN + PERSISTENCE * (xs - MEAN) + SCALE * jax.vmap(jax.random.normal)(keys), None

    def step(state, t_and_y):
        t, y = t_and_y
        key = jax.random.fold_in(key_steps, t)
        weigh = lambda xs: dist.Normal(0.0, jnp.exp(0.5 * xs)).log_prob(y)  # noqa: E731
        state, info = base.step(key, state, move, weigh, resampling.systematic)
        return state, info.log_likelihood_increment

    _, increments = jax.lax.scan(step, state, (jnp.arange(1, NUM_STEPS), ys[1:]))
    return jnp.sum(increments) + jax.nn.logsumexp(log_weights) - jnp.log(NUM_PARTICLES)


def cuthbert_runner(ess_threshold):
    import cuthbert
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import systematic
    from cuthbertlib.resampling.adaptive import ess_decorator

    resample = systematic.resampling if ess_threshold == 1.0 else ess_decorator(systematic.resampling, ess_threshold)
    algorithm = particle_filter.build_filter(
        init_sample=lambda key: MEAN + STATIONARY_SCALE * jax.random.normal(key),
        propagate_sample=lambda key, x, y: MEAN + PERSISTENCE * (x - MEAN) + SCALE * jax.random.normal(key),
        log_potential=lambda x_prev, x, y: dist.Normal(0.0, jnp.exp(0.5 * x)).log_prob(y),
        n_filter_particles=NUM_PARTICLES,
        resampling_fn=resample,
    )

    @jax.jit
    def run(key, ys):
        key_initial, key_steps = jax.random.split(key)
        states = cuthbert.filter(algorithm, ys, algorithm.init_prepare(key=key_initial), key=key_steps)
        # it stacks the whole history; as only this is asked for, the compiler may drop the rest
        return states.log_normalizing_constant[-1]

    return run


PARTICLES_SCRIPT = f"""
import sys, time
import numpy as np
import particles
from particles import state_space_models
ys = np.array([float(value) for value in sys.stdin.read().split()])
model = state_space_models.StochVol(mu={MEAN}, rho={PERSISTENCE}, sigma={SCALE})
feynman_kac = state_space_models.Bootstrap(ssm=model, data=ys)
for _ in range(3):
    start = time.perf_counter()
    particles.SMC(fk=feynman_kac, N={NUM_PARTICLES}, resampling="systematic", ESSrmin=0.5, collect="off").run()
    seconds = time.perf_counter() - start
print(seconds)
"""


def run_particles(interpreter, ys):
    series = " ".join(map(str, ys.tolist()))
    command = [interpreter, "-c", PARTICLES_SCRIPT]
    return float(subprocess.run(command, input=series, capture_output=True, text=True, check=True).stdout)


def bench_filter(compare, model, ys):
    key = jax.random.key(1)

    def run_bayesinf(ess_threshold, store):
        return kernels.particle_filter(
            key, model, ys, num_particles=NUM_PARTICLES, ess_threshold=ess_threshold, store=store
        )

    calls = {
        "bayesinf particle_filter": lambda: run_bayesinf(0.5, "none"),
        "bayesinf particle_filter, resampling always": lambda: run_bayesinf(1.0, "none"),
        "bayesinf particle_filter, with filtered means": lambda: run_bayesinf(0.5, "summary"),
    }
    if has("blackjax"):
        calls["blackjax smc.base.step in a scan, resampling always"] = lambda: run_blackjax(key, ys)
    if has("cuthbert"):
        calls["cuthbert"] = partial(cuthbert_runner(0.5), key, ys)
        calls["cuthbert, resampling always"] = partial(cuthbert_runner(1.0), key, ys)
    if "PARTICLES_PYTHON" in os.environ:
        calls["particles (numpy)"] = lambda: run_particles(os.environ["PARTICLES_PYTHON"], ys)
    compare(
        f"bootstrap filter, stochastic volatility, T={NUM_STEPS}, N={NUM_PARTICLES}, systematic below ESS N/2",
        calls,
        note=per_step,
    )


def bench_smoothing(compare, model, ys):
    key = jax.random.key(1)
    total = kernels.AdditiveFunctional(initial=lambda x0: x0, increment=lambda x_prev, x, t: x)
    sweep = jax.jit(lambda kernel, key, state: kernel.step(key, state))

    def run_paris(method):
        return kernels.paris(key, model, ys, total, num_particles=NUM_PARTICLES, num_backward=2, method=method)

    calls = {f"bayesinf paris, 2 backward draws, {name}": partial(run_paris, name) for name in ("exact", "mcmc")}
    for refresh in ("none", "ancestor", "backward"):
        kernel = kernels.ConditionalSMC(model, ys, num_particles=NUM_PARTICLES, refresh=refresh)
        state = kernel.init(jnp.zeros(NUM_STEPS))
        calls[f"bayesinf ConditionalSMC, one sweep, {refresh}"] = partial(sweep, kernel, key, state)
    kernel = kernels.ParisianGibbs(model, ys, total, num_particles=NUM_PARTICLES, num_backward=2)
    calls["bayesinf ParisianGibbs, one sweep"] = partial(sweep, kernel, key, kernel.init(jnp.zeros(NUM_STEPS)))
    compare(f"smoothing, stochastic volatility, T={NUM_STEPS}, N={NUM_PARTICLES}", calls, rounds=3, note=per_step)
