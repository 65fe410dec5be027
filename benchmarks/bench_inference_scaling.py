"""The particle filter of a tiny language model: one compiled loop, the same loop in Python, and no filter at all.

64 particles of 48 tokens, in steps of 4 or of 1; none stops early, so that all generate as many. In Python each of
choosing, generating, scoring and weighing is compiled on its own, as far as the population's functions go.
"""

import jax
import jax.numpy as jnp
import pytest

from bayesinf.kernels.inference_scaling import Potential, Resample, TokenGenerator
from bayesinf.kernels.inference_scaling.population import found, inherit, weigh
from bayesinf.kernels.inference_scaling.sweep import run_sweep
from bayesinf.models.language import Transformer

NUM_PARTICLES, LENGTH = 64, 48


@pytest.fixture(params=[4, 1])
def generator(request):
    model = Transformer.random(0, vocab_size=64, width=64, num_layers=2, num_heads=4)
    return TokenGenerator(model, max_steps=LENGTH // request.param, max_tokens_per_step=request.param, pad_prompt_to=16)


def likes_even(state):
    is_even = (state.tokens >= 0) & (state.tokens % 2 == 0)
    return (1.0 + jnp.sum(is_even, axis=1)) / (2.0 + jnp.sum(state.tokens >= 0, axis=1))


PROMPT = tuple(range(16))


def fused(generator, potential, key):
    unlimited = jnp.asarray(2**31 - 1, jnp.int32)
    prompt = jnp.array(PROMPT)
    return run_sweep(key, generator, potential, Resample(), prompt, NUM_PARTICLES, unlimited).population.log_evidence


@jax.jit
def begin(generator, key):
    return generator.init(key, jnp.array(PROMPT), NUM_PARTICLES)


@jax.jit
def move(generator, key, state):
    return generator.step(key, state)


@jax.jit
def choose(key, population, t):
    return Resample().choose(key, population, t, LENGTH)


@jax.jit
def gather(generator, state, ancestors):
    return generator.gather(state, ancestors)


@jax.jit
def score_and_weigh(potential, population, state, info, ancestors, is_resampled):
    return weigh(population, potential, potential.scores(state), info, ancestors, is_resampled)[0]


def step_by_step(generator, potential, key):
    """The loop as a driver in Python has it: the host looks after every step at who is finished."""
    state, population = begin(generator, key), found(potential, NUM_PARTICLES)
    ancestors, log_carried = jnp.arange(NUM_PARTICLES, dtype=jnp.int32), population.log_weights
    is_resampled = jnp.zeros((), bool)
    for t in range(generator.max_steps):
        key_choose, key_move = jax.random.split(jax.random.fold_in(key, t))
        if t > 0:
            ancestors, log_carried, is_resampled = choose(key_choose, population, jnp.asarray(t))
            if bool(is_resampled):
                state = gather(generator, state, ancestors)
        population = inherit(population, ancestors, log_carried, is_resampled)
        state, info = move(generator, key_move, state)
        population = score_and_weigh(potential, population, state, info, ancestors, is_resampled)
        if bool(jnp.all(population.is_done)):
            break
    return population.log_evidence


@jax.jit
def only_sampling(generator, key):
    state = generator.init(key, jnp.array(PROMPT), NUM_PARTICLES)

    def step(t, state):
        return generator.step(jax.random.fold_in(key, t), state)[0]

    return jax.lax.fori_loop(0, generator.max_steps, step, state).tokens


def test_fused_loop(compare, generator):
    potential, keys = Potential(likes_even, kind="odds"), iter(jax.random.split(jax.random.key(0), 1000))
    num_tokens = NUM_PARTICLES * LENGTH
    compare(
        f"A filter of a tiny language model, 64 particles, 48 tokens in steps of {generator.max_tokens_per_step}",
        {
            "one compiled loop": lambda key: fused(generator, potential, key),
            "step by step in Python": lambda key: step_by_step(generator, potential, key),
            "sampling, no filter": lambda key: only_sampling(generator, key),
        },
        prepare=lambda: (next(keys),),
        note=lambda name, medians: (
            f"{num_tokens / medians[name]:.3g} tokens a second, "
            f"{medians[name] / medians['one compiled loop']:.2f} of the loop's time"
        ),
    )
