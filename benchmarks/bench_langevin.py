"""Speed of Langevin kernels: logistic regression with 1000 rows and 100 features, 128 chains.

Every row is one scan in one jit, over the same log density and the same starts. The bound of a kernel is the time of
its gradients and of its random numbers, each measured alone in the same run: what is left is the kernel's own doing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import has

import bayesinf as bi
from bayesinf import kernels

NUM_ROWS, NUM_FEATURES, NUM_CHAINS, NUM_STEPS = 1000, 100, 128, 100
STEP_SIZE = 1e-3
GRADIENTS, NORMALS, UNIFORMS = "bare value_and_grad", "bare normals", "bare uniforms"


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


def make_starts():
    return 0.1 * jax.random.normal(jax.random.key(1), (NUM_CHAINS, NUM_FEATURES))


@jax.jit
def run_gradients(data, positions):
    gradients = jax.vmap(jax.value_and_grad(logdensity), (0, None))

    def step(positions, _):
        values, grads = gradients(positions, data)
        return positions + STEP_SIZE * grads, jnp.mean(values)

    return jax.lax.scan(step, positions, length=NUM_STEPS)


@functools.partial(jax.jit, static_argnums=0)
def run_random(draw, key, positions):
    def step(positions, t):
        return positions + draw(jax.random.fold_in(key, t), positions.shape), None

    return jax.lax.scan(step, positions, jnp.arange(NUM_STEPS))[0]


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


@functools.partial(jax.jit, static_argnames=("num_inner", "keys_by_chain"))
def run_by_hand(data, key, positions, step_sizes, num_inner=1, keys_by_chain=True):
    """MALA on all chains at once, one after the other with each step size: what a patient user would write.

    With a key for each chain, draws do not depend on how many chains there are; one key for all costs less.
    """
    gradients = jax.vmap(jax.value_and_grad(logdensity), (0, None))

    def mala(carry, key, h):
        x, value, grad = carry
        if keys_by_chain:
            keys = jax.vmap(jax.random.split)(jax.random.split(key, NUM_CHAINS))
            noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys[:, 0])
            uniform = jax.vmap(jax.random.uniform)(keys[:, 1])
        else:
            key_noise, key_accept = jax.random.split(key)
            noise, uniform = jax.random.normal(key_noise, x.shape), jax.random.uniform(key_accept, value.shape)
        y = x + h * grad + jnp.sqrt(2 * h) * noise
        value_y, grad_y = gradients(y, data)
        scaled = jnp.sqrt(h / 2) * (grad + grad_y)
        log_ratio = value_y - value - jnp.sum(scaled * (noise + 0.5 * scaled), axis=1)
        is_accepted = jnp.log(uniform) < log_ratio
        keep = is_accepted[:, None]
        return jnp.where(keep, y, x), jnp.where(is_accepted, value_y, value), jnp.where(keep, grad_y, grad)

    def step(carry, t):
        key_t = jax.random.fold_in(key, t)
        for i, h in enumerate(step_sizes):
            for j in range(num_inner):
                carry = mala(carry, jax.random.fold_in(key_t, i * num_inner + j), h)
        return carry, None

    return jax.lax.scan(step, (positions, *gradients(positions, data)), jnp.arange(NUM_STEPS))[0][0]


def share_of_bound(costs, shown):
    """A note: gradients a second, and the bound over the time.

    `costs` are, by name, gradients of a step and its normals and uniforms for each coordinate.
    """

    def note(name, medians):
        if name not in costs:
            return shown(name, medians)
        bound = sum(num * medians[what] for num, what in zip(costs[name], (GRADIENTS, NORMALS, UNIFORMS), strict=True))
        rate = costs[name][0] * NUM_STEPS * NUM_CHAINS / medians[name]
        return f"{rate:.3g} gradients/s, {bound / medians[name]:.0%} of the bound"

    return note


def bench_langevin(compare):
    data, positions, key = make_data(), make_starts(), jax.random.key(2)
    target = bi.Target(logdensity, data)
    h = STEP_SIZE**0.5  # a kinetic step of the same length
    ours = {
        "LMC": (kernels.LMC(target, STEP_SIZE), 1, 1, 0),
        "MALA": (kernels.MALA(target, STEP_SIZE), 1, 1, 0),
        "Barker": (kernels.Barker(target, h), 1, 1, 1),
        "RandomizedMidpoint": (kernels.RandomizedMidpoint(target, STEP_SIZE), 2, 2, 0),
        "ParallelMidpoint, R=4, Q=3": (kernels.ParallelMidpoint(target, STEP_SIZE), 9, 5, 0),
        "KineticLangevin": (kernels.KineticLangevin(target, h), 1, 2, 0),
        "RandomizedMidpointKinetic": (kernels.RandomizedMidpointKinetic(target, h), 2, 4, 0),
        "BAOAB": (kernels.Splitting("BAOAB", target, h), 1, 1, 0),
        "OBABO": (kernels.Splitting("OBABO", target, h), 1, 2, 0),
        "UBU": (kernels.Splitting("UBU", target, h), 1, 4, 0),
        "BUB": (kernels.Splitting("BUB", target, h), 1, 2, 0),
        "GHMC": (kernels.GHMC(target, h), 1, 2, 0),
        "MALT, L=4": (kernels.MALT(target, h, num_steps=4), 4, 9, 0),
    }
    calls = {
        GRADIENTS: lambda: run_gradients(data, positions),
        NORMALS: lambda: run_random(jax.random.normal, key, positions),
        UNIFORMS: lambda: run_random(jax.random.uniform, key, positions),
    }
    for name, (kernel, *_) in ours.items():
        calls[f"bayesinf {name}"] = lambda kernel=kernel: run_chains(kernel, key, positions)
    costs = {f"bayesinf {name}": cost for name, (_, *cost) in ours.items()}
    if has("blackjax"):
        calls["blackjax mala"] = lambda: run_blackjax(data, key, positions)
        costs["blackjax mala"] = (1, 1, 0)

    def shown(name, medians):
        count, what = (1, "gradients") if name == GRADIENTS else (NUM_FEATURES, name.removeprefix("bare "))
        return f"{count * NUM_STEPS * NUM_CHAINS / medians[name]:.3g} {what}/s"

    compare(
        f"{NUM_STEPS} steps of {NUM_CHAINS} chains, logistic regression, n={NUM_ROWS}, d={NUM_FEATURES}",
        calls,
        note=share_of_bound(costs, shown),
    )


def bench_compositions(compare):
    data, positions, key = make_data(), make_starts(), jax.random.key(2)
    target = bi.Target(logdensity, data)
    small, large = jnp.float32(STEP_SIZE), jnp.float32(3 * STEP_SIZE)
    cycle = kernels.Cycle([kernels.MALA(target, small), kernels.MALA(target, large)])
    repeat = kernels.Repeat(kernels.MALA(target, small), 4)
    step_sizes = {"Cycle": ((small, large), 1), "Repeat": ((small,), 4)}
    calls, rivals = {}, {}
    for name, kernel in (("Cycle", cycle), ("Repeat", repeat)):
        for keys_by_chain, which in ((True, "a key for each chain"), (False, "one key for all")):
            by_hand = functools.partial(run_by_hand, data, key, positions, *step_sizes[name], keys_by_chain)
            calls[f"{name} by hand, {which}"] = by_hand
        calls[f"bayesinf {name}"] = functools.partial(run_chains, kernel, key, positions)
        rivals[f"bayesinf {name}"] = f"{name} by hand, a key for each chain"

    def note(name, medians):
        return f"{medians[name] / medians[rivals[name]] - 1:+.1%} against by hand" if name in rivals else ""

    compare(f"compositions, {NUM_STEPS} steps of {NUM_CHAINS} chains, the same regression", calls, rounds=21, note=note)
