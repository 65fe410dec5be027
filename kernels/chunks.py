"""Long loops, driven from the host in chunks of one compiled program: a progress bar, and Ctrl-C returns what exists.

How many iterations a chunk makes is an argument of the program: whatever the chunks, which are paced by the clock, the
numbers are those of a single loop. Under `jax.jit` or `jax.vmap` there is no host between the iterations, and the loop
is a plain scan.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from bayesinf import errors
from bayesinf.progress import Progress

__all__ = ["iterate", "warn_of_interruption"]

_MAX_ROWS = 256  # that a chunk may keep, the same for every length of a run: another one compiles nothing
_MAX_BYTES = 2**26
_SECONDS = 0.5  # that a chunk should take: so long Ctrl-C may have to wait


def iterate(
    body: Callable[[Any, Any, Key[Array, ""], Any], tuple[Any, Any]],
    fixed: Any,
    state: Any,
    key: Key[Array, ""],
    num_iterations: int,
    progress: bool,
    phase: str = "learning",
) -> tuple[Any, Any]:
    """Runs `state, kept = body(fixed, state, fold_in(key, i - 1), i)` for i = 1.., and stacks what is kept.

    When interrupted it warns and returns what there is: fewer rows, and the state after the last of them.

    Args:
        body: a function that stays the same from call to call; every new one compiles anew.
        fixed: what it needs and does not change.
        state: where it starts.
        key: PRNG key.
        num_iterations: how many, at least 1.
        progress: whether to show a bar.
        phase: what the bar says.

    Returns:
        The last state, and what was kept with a leading axis of iterations.

    Raises:
        KeyboardInterrupt: interrupted before the first chunk was done.
    """
    if not errors.is_concrete((fixed, state, key)):
        return _run_whole(body, fixed, state, key, num_iterations)
    capacity = _capacity(body, fixed, state, key)
    kept: list[Any] = []
    done, size = 0, 1
    bar = Progress(num_iterations, is_shown=progress)
    try:
        while done < num_iterations:
            num = min(size, num_iterations - done)
            clock = time.perf_counter()
            numbers = jnp.asarray(done, jnp.int32), jnp.asarray(num, jnp.int32)
            after, rows = jax.block_until_ready(_run_chunk(body, capacity, fixed, state, key, *numbers))
            # on the host: to cut and to join rows on the device would compile for every number of them
            rows = jax.tree.map(lambda leaf, num=num: np.asarray(leaf)[:num].copy(), rows)
            state, done = after, done + num
            kept.append(rows)
            seconds = (time.perf_counter() - clock) / num
            size = int(np.clip(_SECONDS / max(seconds, 1e-9), 1, min(capacity, 8 * size)))
            bar.update(num, phase, None, None)
    except KeyboardInterrupt:
        if not kept:
            raise
        warn_of_interruption(done, num_iterations)
    finally:
        bar.close()
    return state, jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *kept)


def warn_of_interruption(done: int, planned: int, what: str = "iterations", *, stacklevel: int = 4) -> None:
    """Tells that a result is that of a part of the run."""
    message = f"interrupted after {done} of {planned} {what}: the result is that of these"
    warnings.warn(message, errors.SamplingWarning, stacklevel=stacklevel)


@partial(jax.jit, static_argnums=(0, 1))
def _run_chunk(
    body: Any, capacity: int, fixed: Any, state: Any, key: Key[Array, ""], begin: Int[Array, ""], num: Int[Array, ""]
) -> tuple[Any, PyTree]:
    """Iterations begin + 1 to begin + num, and room for `capacity` of them."""
    shapes = jax.eval_shape(lambda state: _step(body, fixed, key, state, begin)[1], state)
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

    def put(i, carry):
        state, rows = carry
        state, new = _step(body, fixed, key, state, begin + i)
        return state, jax.tree.map(lambda leaf, row: leaf.at[i].set(row), rows, new)

    return jax.lax.fori_loop(0, num, put, (state, rows))


@partial(jax.jit, static_argnums=(0, 4))
def _run_whole(body: Any, fixed: Any, state: Any, key: Key[Array, ""], num_iterations: int) -> tuple[Any, PyTree]:
    return jax.lax.scan(partial(_step, body, fixed, key), state, jnp.arange(num_iterations))


@partial(jax.jit, static_argnums=0)  # so that it is traced once, for its shapes and for the loop
def _step(body: Any, fixed: Any, key: Key[Array, ""], state: Any, i: Int[Array, ""]) -> tuple[Any, PyTree]:
    return body(fixed, state, jax.random.fold_in(key, i), i + 1)


def _capacity(body: Any, fixed: Any, state: Any, key: Key[Array, ""]) -> int:
    """Iterations that a chunk may keep."""
    row = jax.eval_shape(lambda fixed, state: _step(body, fixed, key, state, jnp.zeros((), jnp.int32))[1], fixed, state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return int(np.clip(_MAX_BYTES // max(size, 1), 1, _MAX_ROWS))
