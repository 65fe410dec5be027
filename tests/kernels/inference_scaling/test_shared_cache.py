"""What is shared: the prompt is read once, the cache handed on, prompts run together, islands spread over devices."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.kernels.inference_scaling import (
    Gibbs,
    Potential,
    TokenGenerator,
    infer,
    infer_batch,
)
from bayesinf.models.language import Transformer

pytestmark = pytest.mark.usefixtures("compile_fast")

WIDTH, LAYERS = 16, 2
MODEL = Transformer.random(0, vocab_size=11, width=WIDTH, num_layers=LAYERS, num_heads=2)
LIKES_ONE = Potential(lambda state: 0.5 + 0.4 * (jnp.sum(state.tokens == 1, axis=1) % 2), kind="step")
READS = []


class Counted(Transformer):
    """Notes every reading of a prompt, while it runs."""

    def prefill(self, tokens, num_tokens, *, num_particles, max_tokens):
        jax.debug.callback(lambda num: READS.append(int(num)), num_tokens)
        return super().prefill(tokens, num_tokens, num_particles=num_particles, max_tokens=max_tokens)


class Writes:
    """Tokens as text, for what is no part of these tests."""

    @staticmethod
    def decode(tokens):
        return " ".join(map(str, tokens))


def make(model=MODEL, **options):
    options = {"max_steps": 4, "max_tokens_per_step": 2, "pad_prompt_to": 4} | options
    return TokenGenerator(model, tokenizer=Writes, **options)


@pytest.mark.parametrize(("method", "num_runs"), [("particle_filter", 1), (Gibbs(3, 0), 3)], ids=["filter", "gibbs"])
def test_the_prompt_is_read_once_and_not_by_every_particle(method, num_runs):
    counted = Counted(**{field.name: getattr(MODEL, field.name) for field in dataclasses.fields(MODEL)})
    READS.clear()
    result = infer(0, make(counted), LIKES_ONE, [1, 2, 3], method=method, num_particles=8)
    jax.effects_barrier()
    assert len(READS) == num_runs
    assert set(READS) == {2}  # of three tokens the last is left to the particles
    assert result.tokens.prompt == 3 * num_runs
    assert result.tokens.cached == 3 * num_runs * 7


def test_a_step_alone_gives_its_cache_on():
    """Donated, the state of a step is the memory of the next."""
    generator = make()
    state = generator.init(jax.random.key(0), generator.encode([1, 2]), 32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def handed_on(donated):
        step = jax.jit(lambda generator, key, state: generator.step(key, state)[0], donate_argnums=donated)
        return step.lower(generator, jax.random.key(0), state).compile().memory_analysis().alias_size_in_bytes / size

    assert handed_on(2) >= 0.99  # all but some scalars
    assert handed_on(()) == 0


def test_prompts_of_several_lengths_are_run_together():
    prompts = [[1, 2, 3], [4]]
    together = infer_batch(0, make(), LIKES_ONE, prompts, num_particles=8)
    for i, prompt in enumerate(prompts):
        alone = infer(jax.random.fold_in(jax.random.key(0), i), make(), LIKES_ONE, prompt, num_particles=8)
        assert together[i].texts == alone.texts
        np.testing.assert_allclose(together[i].log_weights, alone.log_weights, atol=1e-4)  # rounding of float32
    assert together[0].texts != together[1].texts


def test_islands_are_spread_over_devices():
    """On two of them, made of one processor: the same answers, and each device has its islands."""
    script = """
import jax, jax.numpy as jnp, numpy as np, bayesinf as bi
from bayesinf.kernels.inference_scaling import DiscreteChain, Islands, Potential, methods
mesh = jax.make_mesh((2,), ("islands",), axis_types=(jax.sharding.AxisType.Auto,))
chain = DiscreteChain([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], max_steps=6)
likes_b = Potential(lambda state: jnp.where(state.last == 1, 0.9, 0.1), kind="step")
devices = []
plain = methods._unstack
def unstack(tree, num):
    devices.append(len(tree.population.log_weights.sharding.device_set))
    return plain(tree, num)
methods._unstack = unstack
spread, whole = (
    bi.kernels.infer(0, chain, likes_b, method=Islands(num_islands=4, mesh=on), num_particles=8) for on in (mesh, None)
)
same = spread.texts == whole.texts and np.array_equal(spread.log_weights, whole.log_weights)
print(devices, same and spread.log_evidence == whole.log_evidence)
try:
    bi.kernels.infer(0, chain, likes_b, method=Islands(num_islands=3, mesh=mesh), num_particles=8)
except ValueError as error:
    print(error)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", script], env=os.environ | flags, capture_output=True, text=True)
    assert output.stdout.startswith("[2, 1] True"), output.stdout + output.stderr
    assert "num_islands must be a multiple of the 2 devices along the axis 'islands' of mesh, got 3" in output.stdout
