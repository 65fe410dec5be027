"""Tokens a second of SmolLM2-135M by the fused loop, what reading a prompt costs, and what resampling adds.

    make bench-llm

A prompt of 64 tokens, then steps of 16 tokens; the best of five, so that others on the machine count least. Resampling
is timed with half of the particles copied after every step, row by row, and as a gather of the whole cache.
"""

import platform
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp

from bayesinf import resampling
from bayesinf.kernels.inference_scaling import TokenGenerator
from bayesinf.models.language import load_smollm2, smollm2_prompt

STEP, NUM_STEPS = 16, 8


def best(call, state, repeat=5):
    """The state after several calls, each given the one before, and the shortest time of one in seconds."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state))
        times.append(time.perf_counter() - start)
    return state, times[0], min(times[1:])


def main(dtype):
    start = time.perf_counter()
    model, tokenizer = load_smollm2(dtype=dtype)
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    print(
        f"{device.platform} ({kind}), jax {jax.__version__}, {dtype}; loaded in {time.perf_counter() - start:.1f} s\n"
    )
    generator = TokenGenerator(
        model, max_steps=NUM_STEPS, max_tokens_per_step=STEP, tokenizer=tokenizer, pad_prompt_to=64, temperature=0.8
    )
    prompt = generator.encode(smollm2_prompt("What is the sum of 17 and 25? Think step by step."))
    step = eqx.filter_jit(
        lambda generator, state: generator.step(jax.random.key(0), state)[0], donate="all-except-first"
    )
    rows = eqx.filter_jit(lambda a, cache: cache.gather(a), donate="all-except-first")
    whole = eqx.filter_jit(
        lambda a, cache: cache._replace(suffix=resampling.gather(cache.suffix, a)), donate="all-except-first"
    )

    print(
        "| particles | prefill (ms) | compile a step (s) | ms a token | tokens/s | copy half (ms) | gather all (ms) |"
    )
    print("|---|---|---|---|---|---|---|")
    for num in (1, 8, 32):
        state, _, prefill = best(lambda _: generator.init(jax.random.key(0), prompt, num), None)  # noqa: B023
        state, compiled, taken = best(lambda state: step(generator, state), state)
        half = jnp.arange(num) // 2 * 2
        cache, _, by_rows = best(lambda cache: rows(half, cache), state.cache)  # noqa: B023
        _, _, at_once = best(lambda cache: whole(half, cache), cache)  # noqa: B023
        print(
            f"| {num} | {1e3 * prefill:.0f} | {compiled:.1f} | {1e3 * taken / STEP:.0f} | {num * STEP / taken:.0f} "
            f"| {1e3 * by_rows:.0f} | {1e3 * at_once:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(jnp.dtype(sys.argv[1] if len(sys.argv) > 1 else "float32"))
