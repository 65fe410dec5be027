"""What chains have learnt in warm-up, put together on the host: one step size and one metric for all.

It is done between two chunks of the compiled loop, at steps that the warm-up names, in float64 and in the order of the
chains: so that neither the length of a chunk, nor a resumed run, nor the devices that hold the chains change a bit of
what is pooled.

References:
    Chan, Golub, LeVeque (1983), doi:10.1080/00031305.1983.10483115 (sums of squares of several samples).
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

__all__ = ["every", "for_all_chains", "geometric_mean", "mean", "merge_welford"]

NUM_STEPS = 50  # between two poolings of a step size


def every(num_warmup: int) -> set[int]:
    """Steps at which step sizes are pooled, the last one of the warm-up among them."""
    return {*range(NUM_STEPS, num_warmup, NUM_STEPS), num_warmup}


def mean(tree: PyTree) -> PyTree:
    """Over the chains, in the dtypes of the leaves."""
    return jax.tree.map(lambda leaf: np.asarray(np.mean(np.asarray(leaf, np.float64), axis=0), leaf.dtype), tree)


def geometric_mean(values: Float[Array, "c ..."]) -> Float[np.ndarray, "..."]:
    """Over the chains."""
    return np.asarray(np.exp(np.mean(np.log(np.asarray(values, np.float64)), axis=0)), values.dtype)


def merge_welford(states: Any) -> Any:
    """The mean, sum of squared deviations and size of the union of the chains' samples.

        n = sum n_c,   m = sum n_c m_c / n,   M = sum M_c + sum n_c (m_c - m)(m_c - m)^T

    A chain that has not moved at all says nothing of the target, and is left out as long as others have.

    Args:
        states: states of BlackJAX's Welford estimator with a leading axis of chains, diagonal or dense.
    """
    means, squares, sizes = (np.asarray(leaf, np.float64) for leaf in (states.mean, states.m2, states.sample_size))
    has_moved = np.any(squares.reshape(len(squares), -1) != 0, axis=1)
    if np.any(has_moved):
        sizes = np.where(has_moved, sizes, 0.0)
    size = np.sum(sizes)
    center = sizes @ means / size
    apart = means - center
    between = sizes @ apart**2 if squares.ndim == 2 else (sizes[:, None] * apart).T @ apart
    merged = (center, np.sum(squares, axis=0) + between, size)
    return type(states)(*(np.asarray(new, old.dtype) for new, old in zip(merged, states, strict=True)))


def for_all_chains(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves of one chain for every chain of `like`, which has the structure of `tree` and a leading axis."""
    return jax.tree.map(lambda leaf, old: np.broadcast_to(np.asarray(leaf), old.shape), tree, like)
