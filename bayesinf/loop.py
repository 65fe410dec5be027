"""The compiled loop of `sample`, and how a chunk of it is carried out over the chains.

One function advances one chain by `num_draws` draws that are `thin` steps apart, beginning at an absolute step; all
three are arguments, so warm-up, sampling and the last short chunk share one executable. It is vmapped over the chains,
or carried out for one after the other: on a CPU every thread takes chains in turn, so that none waits for the slowest.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from bayesinf import adaptation
from bayesinf.kernel import Kernel, select

_MAX_CALLS = 32  # of one chain each; of more chains every thread takes one share

__all__ = ["Chain", "Collect", "Plan", "Runner", "program", "start"]


class Collect(eqx.Module):
    """What is kept of a state."""

    collect: Callable[[Any], PyTree] | None
    constrain: Callable[[PyTree], PyTree] | None

    def __call__(self, state: Any) -> PyTree:
        value = state.position if self.collect is None else self.collect(state)
        return value if self.constrain is None else self.constrain(value)


class Plan(NamedTuple):
    """What a run does; a pytree, and the same for every chain."""

    kernel: Any
    warmup: adaptation.Warmup | None
    collect: Collect
    reducers: tuple[Any, ...]


class Chain(NamedTuple):
    """The carry of a chain."""

    key: Key[Array, "..."]
    state: Any
    tuned: Any
    reduced: tuple[Any, ...]


def _tuned(plan: Plan, tuned: Any) -> tuple[PyTree, PyTree]:
    """The kernel with what was learnt, in two parts."""
    return _parted(plan, plan.kernel if plan.warmup is None else plan.warmup.apply(plan.kernel, tuned))


def _parted(plan: Plan, kernel: Any) -> tuple[PyTree, PyTree]:
    """The arrays of a kernel that were learnt, and all the rest, which is as it was given."""
    given = {id(leaf) for leaf in jax.tree.leaves(plan.kernel)}
    return eqx.partition(kernel, lambda leaf: eqx.is_array(leaf) and id(leaf) not in given)


def _step(
    plan: Plan, kernel: tuple[PyTree, PyTree], chain: Chain, t: Int[Array, ""], num_warmup: Int[Array, ""]
) -> tuple[Chain, PyTree, dict[str, Array]]:
    """Step number t of one chain with a kernel of two parts, the first part of the next kernel, and the statistics."""
    learnt, rest = kernel
    whole = eqx.combine(learnt, rest)
    state, info = whole.step(jax.random.fold_in(chain.key, t), chain.state)
    if plan.warmup is not None:
        warmup, tuned = plan.warmup, chain.tuned

        def learn(_: Any, known: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
            tuned, learnt = known
            told = warmup.observe(whole, chain.state, state, info)
            new = _like(warmup.update(tuned, t, state.position, told), tuned)
            return new, _like(_renewed(plan, whole, new, t), learnt)

        # a loop of one turn or none: unlike `cond` it copies nothing where it is passed by; whether it is warm-up is
        # the same for all chains, so that this holds for a batch of them too
        is_warmup = (t < num_warmup).astype(jnp.int32)
        tuned, learnt = jax.lax.fori_loop(0, is_warmup, learn, (tuned, learnt))
        chain = chain._replace(tuned=tuned)
    return chain._replace(state=state), learnt, _statistics(whole, state, info)


def _renewed(plan: Plan, present: Any, tuned: Any, t: Int[Array, ""]) -> PyTree:
    """The arrays of the kernel learnt up to and with step t, when `present` made that step."""
    is_metric_new = plan.warmup.is_metric_new(t)  # type: ignore[union-attr]
    if is_metric_new is True:
        return _tuned(plan, tuned)[0]
    # a metric may have to be factorised, and most steps change none
    return jax.lax.cond(
        is_metric_new,
        lambda: _tuned(plan, tuned)[0],
        lambda: _parted(plan, present.with_step_size(tuned.step_size))[0],
    )


def _like(new: PyTree, old: PyTree) -> PyTree:
    """The new values in the types of the old ones."""
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, old)


def _advance(
    plan: Plan,
    shapes: Any,
    capacity: int,
    chain: Chain,
    start: Int[Array, ""],
    num_draws: Int[Array, ""],
    thin: Int[Array, ""],
    num_warmup: Int[Array, ""],
) -> tuple[Chain, Any]:
    """`num_draws` <= capacity draws of one chain, `thin` steps apart, after absolute step `start`.

    Returns the chain and buffers of (value, statistics) of length capacity, filled up to num_draws.
    """
    learnt, rest = _tuned(plan, chain.tuned)

    def draw(chain: Chain, learnt: PyTree, t: Int[Array, ""]) -> tuple[Chain, PyTree, Any]:
        def one_step(i, carry):
            chain, learnt, total = carry
            chain, learnt, stats = _step(plan, (learnt, rest), chain, t + i, num_warmup)
            return chain, learnt, _accumulate(total, stats)

        chain, learnt, stats = jax.lax.fori_loop(0, thin, one_step, (chain, learnt, _zeros(shapes[1])))
        stats["acceptance_rate"] /= thin
        value = plan.collect(chain.state)
        reduced = tuple(
            select(t >= num_warmup, reducer.update(state, value), state)
            for reducer, state in zip(plan.reducers, chain.reduced, strict=True)
        )
        return chain._replace(reduced=reduced), learnt, (value, stats)

    def body(i, carry):
        chain, learnt, buffers = carry
        chain, learnt, kept = draw(chain, learnt, start + i * thin)
        return chain, learnt, jax.tree.map(lambda buffer, leaf: buffer.at[i].set(leaf), buffers, kept)

    chain, _, buffers = jax.lax.fori_loop(0, num_draws, body, (chain, learnt, _zeros(shapes, capacity)))
    return chain, buffers


def _zeros(shapes: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), shapes)


@eqx.filter_jit
def _advance_all(plan: Plan, shapes: Any, capacity: int, chains: Chain, *numbers: Array) -> tuple[Chain, Any]:
    return jax.vmap(lambda chain: _advance(plan, shapes, capacity, chain, *numbers))(chains)


@eqx.filter_jit
def _advance_in_turn(plan: Plan, shapes: Any, capacity: int, chains: Chain, *numbers: Array) -> tuple[Chain, Any]:
    return jax.lax.map(lambda chain: _advance(plan, shapes, capacity, chain, *numbers), chains)


@partial(jax.jit, static_argnums=2)
def _share(chains: Chain, first: Int[Array, ""], size: int) -> Chain:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), chains)


@eqx.filter_jit
def start(plan: Plan, key: Key[Array, ""], initial: PyTree) -> tuple[Chain, Any]:
    """Every chain before its first step, and the shapes of one draw and its statistics."""

    def begin(key, position):
        state = plan.kernel.init(position)
        tuned = None if plan.warmup is None else plan.warmup.init(plan.kernel, position)
        value = jax.eval_shape(lambda state: plan.collect(state), state)
        return Chain(key, state, tuned, tuple(reducer.init(value) for reducer in plan.reducers))

    num_chains = jax.tree.leaves(initial)[0].shape[0]
    keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(num_chains))
    chains = jax.vmap(begin)(keys, initial)
    one = jax.tree.map(lambda leaf: leaf[0], chains)
    zero = jnp.zeros((), jnp.int32)

    def one_draw(chain: Chain) -> Any:
        return plan.collect(chain.state), _step(plan, _tuned(plan, chain.tuned), chain, zero, zero)[2]

    return chains, jax.eval_shape(one_draw, one)


def program(plan: Plan, chains: Chain) -> Any:
    """What a run computes in one draw of one chain, as a jaxpr: it is another for another model, word or count."""

    def draw(plan: Plan, chain: Chain, t: Int[Array, ""]) -> Any:
        chain, _, stats = _step(plan, _tuned(plan, chain.tuned), chain, t, t)
        value = plan.collect(chain.state)
        reduced = [reducer.update(s, value) for reducer, s in zip(plan.reducers, chain.reduced, strict=True)]
        return chain, stats, value, reduced

    one = jax.tree.map(lambda leaf: leaf[0], chains)
    return eqx.filter_make_jaxpr(draw)(plan, one, jnp.zeros((), jnp.int32))[0]


def _statistics(kernel: Any, state: Any, info: Any) -> dict[str, Array]:
    """The fields of an info that are kept with each draw; other libraries' infos are cut down to their scalars."""
    fields = dict(info._asdict()) if hasattr(info, "_asdict") else {}
    is_ours = isinstance(kernel, Kernel)
    stats = {
        name: jax.tree.map(jnp.asarray, value)
        for name, value in fields.items()
        if jax.tree.leaves(value) and (is_ours or jnp.ndim(jax.tree.leaves(value)[0]) == 0)
    }
    if hasattr(state, "evaluation"):
        stats["logdensity"] = state.evaluation.logdensity
    defaults = {"acceptance_rate": 1.0, "is_accepted": True, "is_divergent": False, "num_gradients": 0}
    return {**{name: jnp.asarray(value) for name, value in defaults.items()}, **stats}


def _accumulate(total: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
    """Statistics of the steps between two draws: sums, any, and the last value for the rest."""
    merged = {**stats}
    for name in ("acceptance_rate", "num_gradients", "num_invalid"):
        if name in stats:
            merged[name] = (total[name] + stats[name]).astype(total[name].dtype)
    for name in ("is_accepted", "is_divergent"):
        merged[name] = total[name] | stats[name]
    return merged


class Runner(NamedTuple):
    """How a chunk is carried out over the chains."""

    plan: Plan
    shapes: Any
    capacity: int
    method: str
    num_warmup: Int[Array, ""]

    def advance(self, chains: Chain, start: int, num_draws: int, thin: int) -> tuple[Chain, Any]:
        """The chains after a chunk, and its draws and statistics on the host, (chain, draw, ...)."""
        numbers = (*(jnp.asarray(number, jnp.int32) for number in (start, num_draws, thin)), self.num_warmup)

        if self.method == "vectorized":
            chains, chunk = _advance_all(self.plan, self.shapes, self.capacity, chains, *numbers)
            return jax.block_until_ready(chains), jax.tree.map(
                lambda leaf: np.asarray(leaf)[:, :num_draws].copy(), chunk
            )

        num_chains = chains.key.shape[0]
        num_threads = min(num_chains, os.cpu_count() or 1) if self.method == "parallel" else 1
        num_shares = num_chains if num_chains <= _MAX_CALLS else num_threads
        bounds = np.linspace(0, num_chains, num_shares + 1).astype(int)

        def run(first: int, end: int) -> tuple[Chain, Any]:
            share = _share(chains, jnp.asarray(first), end - first)
            return jax.block_until_ready(_advance_in_turn(self.plan, self.shapes, self.capacity, share, *numbers))

        with ThreadPoolExecutor(num_threads if num_draws else 1) as pool:  # the first call, which compiles, alone
            done = list(pool.map(run, bounds[:-1].tolist(), bounds[1:].tolist()))
        chains = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[share for share, _ in done])
        chunk = jax.tree.map(
            lambda *leaves: np.concatenate([np.asarray(leaf)[:, :num_draws] for leaf in leaves]), *[c for _, c in done]
        )
        return chains, chunk
