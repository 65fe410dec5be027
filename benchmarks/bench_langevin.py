"""Gradients per second of Langevin kernels: logistic regression with 1000 rows and 100 features, 128 chains.

The floor is a loop of bare gradients. Every row is one scan in one jit, over the same log density and the same starts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import has

import bayesinf as bi
from bayesinf import kernels

NUM_ROWS, NUM_FEATURES, NUM_CHAINS, NUM_STEPS = 1000, 100, 128, 100
STEP_SIZE = 1e-3


def logdensity(position, data):
    features, labels = data
    logits = features @ position
    return jnp.sum(labels * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(position**2)


def make_data():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(NUM_ROWS, NUM_FEATURES))
    probabilities = 1 / (1 + np.exp(-features @ rng.normal(size=NUM_FEATURES)))
    labels = rng.uniform(size=NUM_ROWS) < probabilities
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.float32)


@jax.jit
def run_gradients(data, positions):
    gradients = jax.vmap(jax.value_and_grad(logdensity), (0, None))

    def step(positions, _):
        values, grads = gradients(positions, data)
        return positions + STEP_SIZE * grads, jnp.mean(values)

    return jax.lax.scan(step, positions, length=NUM_STEPS)


@jax.jit
def run_chains(kernel, key, positions):
    def step(states, t):
        keys = jax.random.split(jax.random.fold_in(key, t), NUM_CHAINS)
        states, info = jax.vmap(kernel.step)(keys, states)
        return states, jnp.mean(info.acceptance_rate)

    states, rates = jax.lax.scan(step, jax.vmap(kernel.init)(positions), jnp.arange(NUM_STEPS))
    return states.position, jnp.mean(rates)


@jax.jit
def run_blackjax(data, key, positions):
    import blackjax

    algorithm = blackjax.mala(lambda position: logdensity(position, data), STEP_SIZE)

    def step(states, t):
        keys = jax.random.split(jax.random.fold_in(key, t), NUM_CHAINS)
        states, info = jax.vmap(algorithm.step)(keys, states)
        return states, jnp.mean(info.acceptance_rate)

    states, rates = jax.lax.scan(step, jax.vmap(algorithm.init)(positions), jnp.arange(NUM_STEPS))
    return states.position, jnp.mean(rates)


def bench_langevin(compare):
    data = make_data()
    positions = 0.1 * jax.random.normal(jax.random.key(1), (NUM_CHAINS, NUM_FEATURES))
    key = jax.random.key(2)

    target = bi.Target(logdensity, data)
    ours = {
        "LMC": kernels.LMC(target, step_size=STEP_SIZE),
        "MALA": kernels.MALA(target, step_size=STEP_SIZE),
        "BAOAB": kernels.Splitting("BAOAB", target, step_size=STEP_SIZE**0.5),
    }
    calls = {"bare value_and_grad": lambda: run_gradients(data, positions)}
    for name, kernel in ours.items():
        calls[f"bayesinf {name}"] = lambda kernel=kernel: run_chains(kernel, key, positions)
    if has("blackjax"):
        calls["blackjax mala"] = lambda: run_blackjax(data, key, positions)

    compare(
        f"{NUM_STEPS} steps of {NUM_CHAINS} chains, logistic regression, n={NUM_ROWS}, d={NUM_FEATURES}",
        calls,
        note=lambda median: f"{NUM_STEPS * NUM_CHAINS / median:.3g} gradients/s",
    )
