"""The moves of a particle cloud: one step of a particle filter, free or conditional on a reference.

    A_t^i ~ Cat(W_{t-1}),   X_t^i ~ q_t(. | X_{t-1}^{A_t^i}),
    w_t^i = p(y_t | X_t^i) p(X_t^i | X_{t-1}^{A_t^i}) / q_t(X_t^i | X_{t-1}^{A_t^i})

with independent ancestors at every step. A conditional cloud holds slot 0 to a given state, whose parent is given too;
its ancestors must be independent: sorted or stratified ones, of which slot 0 is then overwritten, would bias what is
built on them. What PaRIS, conditional SMC and Parisian particle Gibbs have in common.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf.models.state_space import StateSpaceModel, log_prob, observation_log_prob, sample_each
from bayesinf.resampling import gather, iid

__all__ = ["PROPOSALS", "Cloud", "move", "scan_series", "start", "trace_indices"]

PROPOSALS = ("bootstrap", "guided")


class Cloud(NamedTuple):
    """Particles X_t^i, a pytree with leading axis N, and log w_t^i, not normalised."""

    particles: PyTree
    log_weights: Float[Array, " N"]


def start(
    key: Key[Array, ""], model: StateSpaceModel, y: PyTree, num_particles: int, proposal: str, reference: PyTree = None
) -> Cloud:
    """The cloud at time 0; `reference`, where given, is in slot 0."""
    law = model.initial_proposal(y) if proposal == "guided" else model.initial()
    particles = sample_each(key, lambda _: law, jnp.arange(num_particles - (reference is not None)))
    particles = _with_reference(reference, particles)

    def log_weight(x):
        log_likelihood = observation_log_prob(model, x, y, jnp.zeros((), jnp.int32))
        return log_likelihood + (log_prob(model.initial(), x) - log_prob(law, x) if proposal == "guided" else 0.0)

    return Cloud(particles, jax.vmap(log_weight)(particles))


def move(
    key: Key[Array, ""],
    model: StateSpaceModel,
    cloud: Cloud,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str,
    reference: PyTree = None,
    parent: Int[Array, ""] | None = None,
) -> tuple[Cloud, Int[Array, " N"]]:
    """The cloud at time t and its ancestors; `reference`, where given, is in slot 0 and has ancestor `parent`."""
    key_ancestors, key_move = jax.random.split(key)
    particles, log_weights = cloud

    def law(x_prev):
        return model.proposal(x_prev, y, t) if proposal == "guided" else model.transition(x_prev, t)

    def log_weight(x_prev, x):
        log_likelihood = observation_log_prob(model, x, y, t)
        if proposal == "bootstrap":
            return log_likelihood
        return log_likelihood + log_prob(model.transition(x_prev, t), x) - log_prob(law(x_prev), x)

    ancestors = iid(key_ancestors, log_weights, log_weights.shape[0] - (reference is not None))
    moved = sample_each(key_move, law, gather(particles, ancestors))
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, particles)
    moved = _with_reference(reference, moved)
    if reference is not None:
        ancestors = jnp.concatenate([parent[None].astype(ancestors.dtype), ancestors])
    parents = gather(particles, ancestors)  # not computed where the weights do not need them
    return Cloud(moved, jax.vmap(log_weight)(parents, moved).astype(log_weights.dtype)), ancestors


def scan_series(
    body: Callable[[Any, Any], tuple[Any, Any]], first: Any, kept_first: Any, series: Any
) -> tuple[Any, Any]:
    """Scans `body(carry, (t, row))` over the rows t >= 1 of `series`; what it keeps is stacked onto `kept_first`."""
    num_steps = jax.tree.leaves(series)[0].shape[0]
    rest = jax.tree.map(lambda leaf: leaf[1:], series)
    carry, kept = jax.lax.scan(body, first, (jnp.arange(1, num_steps), rest))
    return carry, jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), kept_first, kept)


def trace_indices(last: Int[Array, ""], ancestors: Int[Array, "s N"]) -> Int[Array, " t"]:
    """The line of particle `last`: B_{T-1} = last, B_{t-1} = A_t^{B_t}, for ancestors at t = 1, ..., T - 1."""

    def back(index, ancestors_t):
        parent = ancestors_t[index]
        return parent, parent

    _, before = jax.lax.scan(back, last, ancestors, reverse=True)
    return jnp.concatenate([before, last[None]])


def _with_reference(reference: PyTree, free: PyTree) -> PyTree:
    """The reference, in whose dtype particles live, and then the free particles."""
    if reference is None:
        return free
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs.astype(x.dtype)]), reference, free)
