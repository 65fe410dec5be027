"""The paths of all particles as a tree: what of the genealogy still has offspring, in memory O(T + N log N).

Particles without offspring are cut off, and then every ancestor that has lost its last one. What is left are the N
paths, which share nearly all of their nodes: further back than about N generations they are one. Kept in arrays of a
fixed capacity, with a stack of the places that are free,

    grow:  the parents X_{t-1}^{A_t^i} get a child each;  leaves without one are cut, and so on upwards;  X_t^i are put
           into free places.

References:
    Jacob, Murray and Rubenthaler (2015), doi:10.1007/s11222-013-9445-x.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from bayesinf import errors, resampling
from bayesinf.kernels.filter_steps import check_single

__all__ = ["PathTree", "default_capacity", "grow", "plant", "trace_paths"]


class PathTree(NamedTuple):
    """The paths of N particles as a tree in C places.

    Attributes:
        particles: states, leading axis C.
        parents: the place of the state before, (C,); -1 at time 0.
        num_children: how many states come from it, (C,).
        leaves: the places of the particles at the last time, (N,).
        free: the places that are free, in its first `num_free` entries, (C,).
        num_free: how many.
        is_overflowed: whether there was no room at some time: then the tree is worthless.
    """

    particles: PyTree
    parents: Int[Array, " c"]
    num_children: Int[Array, " c"]
    leaves: Int[Array, " n"]
    free: Int[Array, " c"]
    num_free: Int[Array, ""]
    is_overflowed: Bool[Array, ""]


def default_capacity(num_steps: int, num_particles: int, num_between: float = 1.0) -> int:
    """T + 4 N k (log N + 3), or the T N of the whole genealogy if those are fewer.

    With k = 1 it is about twice what is expected where the filter resamples at every second step; k, `num_between`, is
    how many steps go by from one resampling to the next.
    """
    room = num_steps + math.ceil(4 * num_particles * num_between * (math.log(num_particles) + 3))
    return min(room, num_steps * num_particles)


def plant(particles: PyTree, capacity: int) -> PathTree:
    """The tree at time 0: N roots, each a leaf."""
    num = jax.tree.leaves(particles)[0].shape[0]
    stored = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype).at[:num].set(leaf), particles)
    places = jnp.arange(capacity, dtype=jnp.int32)
    return PathTree(
        stored,
        jnp.full(capacity, -1, jnp.int32),
        jnp.zeros(capacity, jnp.int32),
        places[:num],
        jnp.roll(places, -num),
        jnp.asarray(capacity - num, jnp.int32),
        jnp.zeros((), bool),
    )


def grow(tree: PathTree, particles: PyTree, ancestors: Int[Array, " n"]) -> PathTree:
    """The tree with the particles of the next time, once what has no offspring is cut."""
    num = ancestors.shape[0]
    parents = tree.leaves[ancestors]
    tree = _prune(tree._replace(num_children=tree.num_children.at[parents].add(1)))
    is_overflowed = tree.is_overflowed | (tree.num_free < num)
    first = jnp.maximum(tree.num_free - num, 0)
    places = jax.lax.dynamic_slice(tree.free, (first,), (num,))
    return tree._replace(
        particles=jax.tree.map(lambda stored, new: stored.at[places].set(new), tree.particles, particles),
        parents=tree.parents.at[places].set(parents),
        num_children=tree.num_children.at[places].set(0),
        leaves=places,
        num_free=first,
        is_overflowed=is_overflowed,
    )


def _prune(tree: PathTree) -> PathTree:
    """Frees the leaves without children, and then every state that has lost its last one, generation by generation."""
    num, capacity = tree.leaves.shape[0], tree.parents.shape[0]
    own = jnp.arange(num, dtype=jnp.int32)

    def cut(carry):
        num_children, free, num_free, places, is_cut, owner = carry
        rank = jnp.cumsum(is_cut, dtype=jnp.int32) - 1
        free = free.at[jnp.where(is_cut, num_free + rank, capacity)].set(places, mode="drop")
        num_free = num_free + jnp.sum(is_cut, dtype=jnp.int32)
        parents = tree.parents[places]
        is_cut = is_cut & (parents >= 0)
        num_children = num_children.at[jnp.where(is_cut, parents, capacity)].add(-1, mode="drop")
        is_cut = is_cut & (num_children[parents] == 0)
        # of several children that are cut at once, one goes on to the parent
        owner = owner.at[jnp.where(is_cut, parents, capacity)].set(own, mode="drop")
        return num_children, free, num_free, parents, is_cut & (owner[parents] == own), owner

    start = (
        tree.num_children,
        tree.free,
        tree.num_free,
        tree.leaves,
        tree.num_children[tree.leaves] == 0,
        jnp.zeros(capacity, jnp.int32),
    )
    num_children, free, num_free, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[4]), cut, start)
    return tree._replace(num_children=num_children, free=free, num_free=num_free)


def trace_paths(key: errors.KeyLike, filtered: Any, num_paths: int) -> PyTree:
    """Paths traced back through the ancestors of a filter, from particles drawn by their last weights.

        B_{T-1} ~ Cat(W_{T-1}),    B_{t-1} = A_t^{B_t},    x_t = X_t^{B_t}

    Exact draws for N to infinity, which at early times are all the same few particles: `backward_sample` draws better
    ones where the transition has a density, and this is what there is where it has none.

    Args:
        key: PRNG key or seed.
        filtered: of `particle_filter(..., store="tree")`, or "full".
        num_paths: how many, at least 1.

    Returns:
        States with leading axes (num_paths, T).

    Raises:
        ValueError: `filtered` is a batch of filters, or stored neither its tree nor its whole history.
        DegenerateWeightsError: the filter lost all its weights (not while traced).

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.SIR(1_000, infection_rate=0.5, recovery_rate=0.2, initial_fraction=0.01)
        >>> _, ys = bi.models.simulate(0, model, num_steps=40)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=200, store="tree")
        >>> jax.tree.leaves(bi.kernels.trace_paths(2, filtered, num_paths=5))[0].shape[:2]
        (5, 40)

    References:
        Jacob, Murray and Rubenthaler (2015), doi:10.1007/s11222-013-9445-x.
    """
    errors.check_count("num_paths", num_paths)
    check_single(filtered)
    history, num_steps = getattr(filtered, "history", None), filtered.ess.shape[0]
    is_whole = isinstance(history, PathTree) or (history is not None and history.log_weights.shape[0] == num_steps)
    if not is_whole:
        raise ValueError("filtered must hold its paths; call particle_filter with store='tree', or 'full'")
    if errors.is_concrete(filtered.log_evidence) and not np.all(np.isfinite(filtered.log_evidence)):
        raise errors.DegenerateWeightsError("The filter lost all its weights: there are no paths.", filtered)
    return _trace(errors.as_key(key), history, filtered.log_weights, num_steps, num_paths)


@partial(jax.jit, static_argnums=(3, 4))
def _trace(key: Array, history: Any, log_weights: Array, num_steps: int, num_paths: int) -> PyTree:
    last = resampling.iid(key, log_weights, num_paths)
    if isinstance(history, PathTree):

        def climb(places, _):
            return history.parents[places], places

        _, places = jax.lax.scan(climb, history.leaves[last], length=num_steps, reverse=True)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf[places], 0, 1), history.particles)

    def back(index, row):
        particles, ancestors = row
        return ancestors[index], resampling.gather(particles, index)

    _, paths = jax.lax.scan(back, last, (history.particles, history.ancestors), reverse=True)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), paths)
