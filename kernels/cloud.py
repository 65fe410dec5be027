"""The conditional particle filter: one slot of the cloud is held to a reference path.

    X_t^0 = zeta_t,    A_t^i ~ Cat(W_{t-1}),  X_t^i ~ q_t(. | X_{t-1}^{A_t^i}),  i = 1..N-1

and weights as in the particle filter. The free ancestors are independent at every step: of sorted or stratified ones,
of which slot 0 is then overwritten, the particle in slot 0 would get too few. What the kernels on paths have in common.

References:
    Andrieu, Doucet, Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf.kernels.filter_steps import propagate, propagate_initial, weigh, weigh_initial
from bayesinf.models.state_space import StateSpaceModel
from bayesinf.resampling import gather, iid

__all__ = ["Cloud", "advance", "move", "scan_steps", "start", "trace_indices", "with_reference"]


class Cloud(NamedTuple):
    """Particles X_t^i, a pytree with leading axis N, and log w_t^i, not normalised."""

    particles: PyTree
    log_weights: Float[Array, " N"]


def start(
    key: Key[Array, ""], model: StateSpaceModel, y: PyTree, num_particles: int, proposal: str, reference: PyTree
) -> Cloud:
    """The cloud at time 0, with the reference in slot 0."""
    particles = with_reference(reference, propagate_initial(key, model, y, num_particles - 1, proposal))
    return Cloud(particles, weigh_initial(model, particles, y, proposal))


def move(
    keys: Key[Array, "2"],
    model: StateSpaceModel,
    cloud: Cloud,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str,
    reference: PyTree,
    parent: Int[Array, ""],
) -> tuple[Cloud, Int[Array, " N"]]:
    """The cloud at time t, with the reference, whose ancestor is `parent`, in slot 0; and all the ancestors."""
    key_ancestors, key_move = keys
    free = iid(key_ancestors, cloud.log_weights, cloud.log_weights.shape[0] - 1)
    ancestors = jnp.concatenate([parent[None].astype(free.dtype), free])
    return advance(key_move, model, cloud, y, t, proposal, reference, ancestors), ancestors


def advance(
    key: Key[Array, ""],
    model: StateSpaceModel,
    cloud: Cloud,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str,
    reference: PyTree,
    ancestors: Int[Array, " N"],
) -> Cloud:
    """The offspring of chosen ancestors, with the reference in slot 0; the free ones move by the same numbers of a key,
    whatever the ancestors.
    """
    parents = gather(cloud.particles, ancestors)
    free_parents = jax.tree.map(lambda leaf: leaf[1:], parents)
    particles = with_reference(reference, propagate(key, model, free_parents, y, t, proposal))
    log_weights = weigh(model, parents, particles, y, t, proposal).astype(cloud.log_weights.dtype)
    return Cloud(particles, log_weights)


def scan_steps(
    body: Callable[[Any, Any], tuple[Any, Any]], first: Any, kept: Any, key: Key[Array, ""], num_keys: int, series: Any
) -> tuple[Any, Any]:
    """Scans `body(carry, (t, keys, row))` over the rows t >= 1 of `series`; what it keeps is stacked onto `kept`.

    The keys of step t depend on `key` and t alone. They are made before the loop, where that is a single operation.
    """
    ts = jnp.arange(1, jax.tree.leaves(series)[0].shape[0])
    keys = jax.vmap(lambda t: jax.random.split(jax.random.fold_in(key, t), num_keys))(ts)
    rest = jax.tree.map(lambda leaf: leaf[1:], series)
    carry, kept_after = jax.lax.scan(body, first, (ts, keys, rest))
    return carry, jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), kept, kept_after)


def trace_indices(last: Int[Array, ""], ancestors: Int[Array, "t N"]) -> Int[Array, " t"]:
    """The line of particle `last`: B_{T-1} = last, B_{t-1} = A_t^{B_t}; the ancestors at t = 0 are not used."""

    def back(index, ancestors_t):
        parent = ancestors_t[index]
        return parent, parent

    _, before = jax.lax.scan(back, last, ancestors[1:], reverse=True)
    return jnp.concatenate([before, last[None]])


def with_reference(reference: PyTree, free: PyTree) -> PyTree:
    """The reference, in whose dtype particles live, and then the free particles."""
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs.astype(x.dtype)]), reference, free)
