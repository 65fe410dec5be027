"""Particle methods on a one-dimensional stochastic volatility model, 1000 steps and 1000 particles.

`particles` needs numpy below 2 and so an environment of its own: name its interpreter in PARTICLES_PYTHON.
"""

import os
import subprocess
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from conftest import has

from bayesinf import kernels, models, resampling

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


PARTICLES_HEADER = f"""
import sys, time
import numpy as np
import particles
from particles import collectors, mcmc, state_space_models

class Volatility(state_space_models.StochVol):
    def upper_bound_log_pt(self, t):
        return -np.log(self.sigma) - 0.5 * np.log(2 * np.pi)

    def add_func(self, t, xp, x):
        return x

ys = np.array([float(value) for value in sys.stdin.read().split()])
model = Volatility(mu={MEAN}, rho={PERSISTENCE}, sigma={SCALE})
feynman_kac = state_space_models.Bootstrap(ssm=model, data=ys)
"""
PARTICLES_FILTER = f"particles.SMC(feynman_kac, N={NUM_PARTICLES}, ESSrmin=0.5, collect='off').run()"
PARTICLES_PARIS = f"particles.SMC(feynman_kac, N={NUM_PARTICLES}, collect=[collectors.Paris(Nparis=2)]).run()"
# compiles what numba compiles, before a clock starts that runs once
PARTICLES_PARIS_WARM = """
few = state_space_models.Bootstrap(ssm=model, data=ys[:2])
particles.SMC(few, N=10, collect=[collectors.Paris(Nparis=2)]).run()
"""
PARTICLES_SWEEP = """
sweep = mcmc.CSMC(fk=feynman_kac, N=100, xstar=np.zeros(len(ys)))
sweep.run()
path = sweep.hist.extract_one_trajectory()
"""
PARTICLES_BACKWARD = PARTICLES_SWEEP.replace("extract_one_trajectory()", "backward_sampling_ON2(1)")


def run_particles(interpreter, ys, work, repetitions=3, warm=""):
    """The seconds of the last of a few repetitions, in a process of its own: `warm` or the first compile with numba."""
    timed = warm + f"for _ in range({repetitions}):\n    start = time.perf_counter()\n"
    timed += textwrap.indent(work.strip(), "    ") + "\nprint(time.perf_counter() - start)"
    series = " ".join(map(str, ys.tolist()))
    command = [interpreter, "-c", PARTICLES_HEADER + timed]
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
        calls["particles (numpy)"] = lambda: run_particles(os.environ["PARTICLES_PYTHON"], ys, PARTICLES_FILTER)
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


@jax.jit
def run_dense_paris(key, model, ys):
    """PaRIS whose backward draws are Gumbel maxima over an N x N array, as `jax.random.categorical` makes them."""

    def step(carry, row):
        xs, log_w, tau = carry
        t, y = row
        key_choose, key_move, key_back = jax.random.split(jax.random.fold_in(key, t), 3)
        parents = xs[resampling.systematic(key_choose, log_w, NUM_PARTICLES)]
        new = MEAN + PERSISTENCE * (parents - MEAN) + SCALE * jax.random.normal(key_move, parents.shape)
        log_masses = log_w + dist.Normal(MEAN + PERSISTENCE * (xs - MEAN), SCALE).log_prob(new[:, None])
        J = jax.random.categorical(key_back, log_masses[:, None, :], shape=(NUM_PARTICLES, 2))
        log_w = dist.Normal(0.0, jnp.exp(0.5 * new)).log_prob(y)
        return (new, log_w, jnp.mean(tau[J], axis=1) + new), None

    xs = MEAN + STATIONARY_SCALE * jax.random.normal(key, (NUM_PARTICLES,))
    start = (xs, dist.Normal(0.0, jnp.exp(0.5 * xs)).log_prob(ys[0]), xs)
    (_, log_w, tau), _ = jax.lax.scan(step, start, (jnp.arange(1, ys.shape[0]), ys[1:]))
    return jax.nn.softmax(log_w) @ tau


def bench_backward_draws(compare, model, ys):
    """A short series: one of the others takes seconds a step."""
    num_steps = 10
    ys, key = ys[:num_steps], jax.random.key(1)
    total = kernels.AdditiveFunctional(initial=lambda x0: x0, increment=lambda x_prev, x, t: x)

    def run_paris(method):
        return kernels.paris(key, model, ys, total, num_particles=NUM_PARTICLES, num_backward=2, method=method)

    calls = {f"bayesinf paris, {name}": partial(run_paris, name) for name in ("exact", "mcmc", "reject")}
    calls["dense Gumbel maxima, N x N"] = partial(run_dense_paris, key, model, ys)
    if "PARTICLES_PYTHON" in os.environ:
        python = os.environ["PARTICLES_PYTHON"]
        calls["particles Paris"] = lambda: run_particles(
            python, ys, PARTICLES_PARIS, repetitions=1, warm=PARTICLES_PARIS_WARM
        )

    def note(name, medians):
        exact, mcmc = (medians[name] / medians[f"bayesinf paris, {method}"] for method in ("exact", "mcmc"))
        return f"{1e3 * medians[name] / num_steps:.3g} ms a step; {exact:.3g} times exact, {mcmc:.3g} times mcmc"

    compare(f"PaRIS, T={num_steps}, N={NUM_PARTICLES}, 2 backward draws", calls, rounds=2, note=note)


def bench_conditional_smc(compare, model, ys):
    num, key = 100, jax.random.key(1)
    sweep = jax.jit(lambda kernel, key, state: kernel.step(key, state))
    built = {
        "bayesinf ConditionalSMC, ancestor": kernels.ConditionalSMC(model, ys, num, "ancestor"),
        "bayesinf ConditionalSMC, backward": kernels.ConditionalSMC(model, ys, num, "backward"),
        "bayesinf BlockedSMC, blocks of 50": kernels.BlockedSMC(model, ys, num_particles=num, block_size=50),
        "bayesinf EmbeddedHMM, 16 candidates": kernels.EmbeddedHMM(model, ys, num_particles=16, step_size=0.5),
    }
    calls = {name: partial(sweep, kernel, key, kernel.init(jnp.zeros(NUM_STEPS))) for name, kernel in built.items()}
    if "PARTICLES_PYTHON" in os.environ:
        python = os.environ["PARTICLES_PYTHON"]
        calls["particles CSMC, genealogy"] = lambda: run_particles(python, ys, PARTICLES_SWEEP)
        calls["particles CSMC, backward"] = lambda: run_particles(python, ys, PARTICLES_BACKWARD)

    def note(name, medians):
        return f"{medians[name] / medians['bayesinf ConditionalSMC, backward']:.3g} times ConditionalSMC, backward"

    compare(f"one sweep over a path, T={NUM_STEPS}, N={num}", calls, rounds=5, note=note)
