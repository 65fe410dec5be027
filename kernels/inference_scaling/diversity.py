"""Selection by diversity: of N unfinished samples those survive that represent the others (TTS-VAR).

    features (N, F)  ->  k clusters by k-means  ->  of each cluster the sample nearest to its mean

Where images are still too coarse to be scored, their structure can be compared: TTS-VAR describes each by the first
principal component of its patches' features, which `first_component` computes, here along one direction for all of
them, so that the numbers of different images can be compared and no sign is left open.

k-means starts from the seeds of k-means++, drawn with probability proportional to the squared distance from those there
are, and takes the best of several starts. Clusters are disjoint, so that the survivors are different samples; where
there are fewer different samples than clusters, the farthest of the others fill up. Ties are broken by chance.

It is a search: what survives does not depend on weights, and an evidence means nothing after it.

References:
    Chen et al. (2025), TTS-VAR, arXiv:2507.18537.
    Arthur and Vassilvitskii (2007), k-means++, SODA, 1027-1035.
    Lloyd (1982), doi:10.1109/TIT.1982.1056489.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayesinf import errors

__all__ = ["Clusters", "diverse_ancestors", "first_component", "kmeans"]


class Clusters(NamedTuple):
    """What k-means found.

    Attributes:
        centroids: the means, shape (k, F).
        labels: the cluster of each sample, shape (N,).
        inertia: the sum of squared distances from their centroids.
    """

    centroids: Float[Array, "k f"]
    labels: Int[Array, " N"]
    inertia: Float[Array, ""]


def kmeans(
    key: errors.KeyLike,
    features: Float[Array, "N f"],
    num_clusters: int,
    *,
    num_iterations: int = 30,
    num_restarts: int = 8,
) -> Clusters:
    """k-means with a fixed number of Lloyd's iterations, from seeds of k-means++; may be jitted and vmapped.

    Args:
        key: PRNG key or seed.
        features: N samples.
        num_clusters: k, at most N. A cluster may be empty where samples coincide.
        num_iterations: of each start.
        num_restarts: starts, of which the one with the least inertia is returned.

    Returns:
        Clusters.

    Raises:
        ValueError: more clusters than samples, or features that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import kmeans
        >>> found = kmeans(0, jnp.array([[0.0], [0.2], [5.0], [5.2], [5.4]]), 2)
        >>> sorted(round(float(x), 2) for x in found.centroids[:, 0])
        [0.1, 5.2]

    References:
        Arthur and Vassilvitskii (2007), SODA, 1027-1035.
    """
    key, features = errors.as_key(key), _check_features(features)
    num_clusters = _check_number("num_clusters", num_clusters, features)
    num_iterations = errors.check_count("num_iterations", num_iterations)
    num_restarts = errors.check_count("num_restarts", num_restarts)
    return _kmeans(key, features, num_clusters, num_iterations, num_restarts)


def diverse_ancestors(
    key: errors.KeyLike,
    features: Float[Array, "N f"],
    num_survivors: int,
    num_particles: int | None = None,
) -> Int[Array, " n"]:
    """Ancestors of the next population: of each of `num_survivors` clusters the sample nearest to its mean.

    Args:
        key: PRNG key or seed.
        features: of N samples.
        num_survivors: k, at most N.
        num_particles: the size n >= k of the next population, in which every survivor has n / k offspring, up to
            rounding: a population that should shrink, in a program of fixed shapes, shrinks in the number of different
            samples. k by default.

    Returns:
        n indices in [0, N), sorted, int32.

    Raises:
        ValueError: more survivors than samples or offspring, or features that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import diverse_ancestors
        >>> diverse_ancestors(0, jnp.array([[0.0], [0.2], [5.0], [5.2], [5.4]]), 2, 6)[3:].tolist()
        [3, 3, 3]

    References:
        Chen et al. (2025), arXiv:2507.18537.
    """
    key, features = errors.as_key(key), _check_features(features)
    k = _check_number("num_survivors", num_survivors, features)
    n = k if num_particles is None else errors.check_count("num_particles", num_particles)
    if n < k:
        raise ValueError(f"num_particles must be at least num_survivors={k}, got {n}")
    # in an order of their own ties are broken by chance: of two samples in a cluster both are as near to the mean
    key_order, key_clusters = jax.random.split(key)
    order = jax.random.permutation(key_order, features.shape[0]).astype(jnp.int32)
    survivors = order[_represent(features[order], kmeans(key_clusters, features[order], k))]
    return jnp.sort(survivors)[jnp.arange(n) * k // n]


def first_component(tokens: Float[Array, "N p c"]) -> Float[Array, "N p"]:
    """Every token's coordinate along the direction in which all tokens of all samples vary most.

    Args:
        tokens: features of P tokens, or patches, of each of N samples, in C channels.

    Returns:
        Coordinates, less their mean: features of the samples, for `diverse_ancestors`.

    Raises:
        ValueError: they are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import first_component
        >>> first_component(jnp.array([[[3.0, 1.0], [5.0, 1.0]]])).tolist()
        [[-1.0, 1.0]]
    """
    tokens = _check_finite("tokens", tokens, 3)
    centred = tokens - jnp.mean(tokens, axis=(0, 1))
    _, vectors = jnp.linalg.eigh(jnp.einsum("npc,npd->cd", centred, centred))
    first = vectors[:, -1]
    return centred @ (first * jnp.where(first[jnp.argmax(jnp.abs(first))] < 0, -1.0, 1.0))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _kmeans(key: Array, features: Array, num_clusters: int, num_iterations: int, num_restarts: int) -> Clusters:
    mean = jnp.mean(features, axis=0)
    centred = features - mean  # distances lose no digits to an offset

    def improve(centroids: Array, _: Any) -> tuple[Array, None]:
        labels, _ = _assign(centred, centroids)
        members = jax.nn.one_hot(labels, num_clusters, dtype=centred.dtype)
        sizes = jnp.sum(members, axis=0)[:, None]
        # an empty cluster stays where it is
        return jnp.where(sizes > 0, members.T @ centred / jnp.maximum(sizes, 1.0), centroids), None

    def start(key: Array) -> Clusters:
        centroids, _ = jax.lax.scan(improve, _seed(key, centred, num_clusters), length=num_iterations)
        labels, squares = _assign(centred, centroids)
        return Clusters(centroids, labels, jnp.sum(squares))

    starts = jax.vmap(start)(jax.random.split(key, num_restarts))
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(starts.inertia)], starts)
    return best._replace(centroids=best.centroids + mean)


def _seed(key: Array, features: Array, num: int) -> Array:
    """k-means++: seeds among the samples."""

    def add(nearest: Array, key: Array) -> tuple[Array, Array]:
        # in the beginning all distances are the same; where all are zero any sample will do
        chosen = features[jax.random.categorical(key, jnp.log(jnp.where(jnp.any(nearest > 0), nearest, 1.0)))]
        return jnp.minimum(nearest, jnp.sum((features - chosen) ** 2, axis=1)), chosen

    _, seeds = jax.lax.scan(add, jnp.full(features.shape[0], jnp.finfo(features.dtype).max), jax.random.split(key, num))
    return seeds


def _assign(features: Array, centroids: Array) -> tuple[Array, Array]:
    """The nearest centroid of each sample, and its squared distance."""
    squares = jnp.sum(features**2, 1)[:, None] - 2.0 * features @ centroids.T + jnp.sum(centroids**2, 1)
    return jnp.argmin(squares, axis=1).astype(jnp.int32), jnp.maximum(jnp.min(squares, axis=1), 0.0)


@jax.jit
def _represent(features: Array, clusters: Clusters) -> Array:
    """A sample of each cluster, the nearest to its mean; for empty clusters one of the others, all different."""
    k = clusters.centroids.shape[0]
    distances = jnp.sum((features - clusters.centroids[clusters.labels]) ** 2, axis=1)
    is_member = clusters.labels == jnp.arange(k)[:, None]
    nearest = jnp.argmin(jnp.where(is_member, distances, jnp.inf), axis=1).astype(jnp.int32)
    is_empty = ~jnp.any(is_member, axis=1)

    def take(apart: Array, index: Array) -> Array:
        """Squared distances to the nearest of those that are taken; -1 for these."""
        return jnp.minimum(apart, jnp.sum((features - features[index]) ** 2, axis=1)).at[index].set(-1.0)

    def keep(apart: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        index, is_empty = row
        return jnp.where(is_empty, apart, take(apart, index)), None

    def fill(apart: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        index, is_empty = row
        index = jnp.where(is_empty, jnp.argmax(apart).astype(jnp.int32), index)
        return take(apart, index), index

    apart, _ = jax.lax.scan(keep, jnp.full(features.shape[0], jnp.inf, features.dtype), (nearest, is_empty))
    _, survivors = jax.lax.scan(fill, apart, (nearest, is_empty))
    return survivors


def _check_features(features: Array) -> Array:
    return _check_finite("features", features, 2)


def _check_finite(name: str, values: Array, ndim: int) -> Array:
    values = errors.as_array(name, is_floating=True)(values)
    if values.ndim != ndim or 0 in values.shape:
        raise ValueError(f"{name} must have {ndim} axes, none of them empty, got shape {values.shape}")
    if errors.is_concrete(values) and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got {np.sum(~np.isfinite(values))} that are not")
    return values


def _check_number(name: str, num: int, features: Array) -> int:
    num = errors.check_count(name, num)
    if num > features.shape[0]:
        raise ValueError(f"{name} must be at most the number of samples {features.shape[0]}, got {num}")
    return num
