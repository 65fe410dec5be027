"""Resampling: which particles have offspring.

Every scheme maps (key, log weights of N particles, number n of offspring) to n indices, with exactly
E[number of copies of i] = n W_i. The indices are drawn by inverting the cumulative weights,

    systematic    at (j + u) / n, one u:             |copies - n W_i| < 1; the cheapest, and the default
    stratified    at (j + u_j) / n:                  |copies - n W_i| < 2; independent strata
    multinomial   at n sorted independent uniforms:  independent copies, in sorted order
    residual      floor(n W_i) copies, the rest independently with the remaining weights
    ssp           floor(n W_i) copies, plus one with probability n W_i - floor(n W_i), negatively associated
    killing       n = N; each i stays with probability w_i / max w, else an independent index takes its place

or, for the algorithms that need exchangeable indices (conditional SMC), independently and unsorted by `iid`.

Weights are summed and inverted in float64 whatever the precision of the program, with uniforms of 52 bits in the open
interval: in float32 a million particles would lose copies, and small weights would be off by per cents. A particle of
weight zero is never drawn. Where no weight is positive there is no answer: concrete weights raise, traced ones give
the indices 0, 1, 2, ..., and `weights.is_degenerate` tells.

References:
    Douc, Cappé and Moulines (2005), doi:10.1109/ISPA.2005.195385.
    Gerber, Chopin and Whiteley (2019), doi:10.1214/18-AOS1746 (ssp).
    Chauvet (2012), doi:10.1016/j.jspi.2011.12.003 (ordered pivotal sampling by intervals).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, weights

__all__ = [
    "SCHEMES",
    "gather",
    "iid",
    "killing",
    "multinomial",
    "resample",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]


def resample(
    key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int, method: str = "systematic"
) -> Int[Array, " n"]:
    """Indices of the offspring, by the scheme named `method`.

    Args:
        key: PRNG key or seed.
        log_weights: shape (N,), unnormalised; NaN and +inf are weights of zero.
        num_samples: n >= 1.
        method: one of `SCHEMES`.

    Returns:
        n indices in [0, N), int32.

    Raises:
        ValueError: no weight is positive (concrete weights only), or an argument has the wrong shape or type.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.resample(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 4).tolist()
        [0, 0, 2, 3]
    """
    errors.check_choice("method", method, SCHEMES)
    return SCHEMES[method](key, log_weights, num_samples)


def gather(tree: PyTree, indices: Int[Array, "..."]) -> PyTree:
    """The rows `indices` of every leaf.

    Args:
        tree: a pytree of arrays with a leading axis of particles.
        indices: any shape; clipped to the leading axis.

    Returns:
        The pytree with the axes of `indices` in place of the leading one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.gather({"x": jnp.array([10.0, 20.0, 30.0])}, jnp.array([2, 2]))["x"].tolist()
        [30.0, 30.0]
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), tree)


def systematic(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Sorted indices: as many copies of i as points (j + u) / n, j = 0..n-1, lie in its part of the cumulative weights.

    One uniform u serves all n points, so |copies - n W_i| < 1. Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.systematic(0, jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 4).tolist()
        [0, 0, 2, 3]
    """
    return _draw(_systematic, key, log_weights, num_samples)


def stratified(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Sorted indices, as `systematic` with points (j + u_j) / n and independent uniforms u_0..u_(n-1).

    Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.stratified(0, jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 4).tolist()
        [0, 0, 2, 3]
    """
    return _draw(_stratified, key, log_weights, num_samples)


def multinomial(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Independent indices, each i with probability W_i, in sorted order.

    Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> indices = resampling.multinomial(0, jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 100).tolist()
        >>> indices == sorted(indices), set(indices)
        (True, {0, 2, 3})
    """
    return _draw(_multinomial, key, log_weights, num_samples)


def iid(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Independent indices, each i with probability W_i, in the order drawn, so that any of them may be singled out.

    Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> indices = resampling.iid(0, jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 100).tolist()
        >>> indices == sorted(indices), set(indices)
        (False, {0, 2, 3})
    """
    return _draw(_iid, key, log_weights, num_samples)


def residual(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """floor(n W_i) copies of each i, then independent indices with probabilities proportional to n W_i - floor(n W_i).

    Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.residual(0, jnp.array([0.0, -jnp.inf, 0.0, 0.0]), 6).tolist()
        [0, 0, 2, 2, 3, 3]
    """
    return _draw(_residual, key, log_weights, num_samples)


def ssp(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Srinivasan sampling process: floor(n W_i) copies of each i, and one more with probability n W_i - floor(n W_i).

    The process settles the fractions of n W_i pair by pair along the particles. Its law is that of one draw from every
    unit interval of their cumulative sum, where a particle lying across two intervals is not taken twice (Chauvet):
    that form needs no sequential loop. Arguments, result and errors are those of `resample`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.ssp(0, jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])), 4).tolist()
        [0, 0, 2, 3]

    References:
        Gerber, Chopin and Whiteley (2019), doi:10.1214/18-AOS1746.
        Chauvet (2012), doi:10.1016/j.jspi.2011.12.003.
    """
    return _draw(_ssp, key, log_weights, num_samples)


def killing(key: errors.KeyLike, log_weights: Float[Array, "..."], num_samples: int) -> Int[Array, " n"]:
    """Particle i stays in place i with probability w_i / max w, else an index with probabilities W takes its place.

    Arguments, result and errors are those of `resample`.

    Raises:
        ValueError: num_samples is not N.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import resampling
        >>> resampling.killing(0, jnp.array([0.0, 0.0, -jnp.inf, 0.0]), 4)[jnp.array([0, 1, 3])].tolist()
        [0, 1, 3]
    """
    log_weights = errors.as_array("log_weights", is_floating=True)(log_weights)
    if num_samples != log_weights.size:
        raise ValueError(
            f"num_samples must be the number of particles {log_weights.size} for killing, which keeps "
            f"each particle in its place, got {num_samples}; use systematic resampling to change their number"
        )
    return _draw(_killing, key, log_weights, num_samples)


SCHEMES: dict[str, Callable[..., Array]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
    "ssp": ssp,
    "killing": killing,
}


def uniform64(key: Key[Array, ""], shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
    """Uniforms in the open unit interval, odd multiples of 2**-53, as float64 arrays whatever the precision.

    Only to be used inside `with jax.enable_x64(True)`.
    """
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    with jax.enable_x64(True):
        return (high.astype(jnp.float64) * 2.0**20 + (low >> 12).astype(jnp.float64) + 0.5) * 2.0**-52


def invert64(masses: Float[Array, " n"], points: Float[Array, "..."]) -> Int[Array, "..."]:
    """The index of positive mass at which the cumulative masses, over their sum, pass each point in (0, 1).

    A parallel sum is flat at a mass of zero only up to rounding; where a point falls between, with probability 1e-16,
    largest mass takes its place. Only to be used inside `with jax.enable_x64(True)`.
    """
    return inverse64(masses)(points)


def inverse64(masses: Float[Array, " n"]) -> Callable[[Float[Array, "..."]], Int[Array, "..."]]:
    """`invert64` of these masses, as a function of the points: they are cumulated once."""
    with jax.enable_x64(True):
        sums = _cumulate(jnp.add, jnp.cumsum, masses.astype(jnp.float64))
        shares = sums / jnp.where(sums[-1] > 0, sums[-1], 1.0)
        largest = jax.lax.argmax(masses.astype(jnp.float32), 0, jnp.int32)

    def invert(points: Float[Array, "..."]) -> Int[Array, "..."]:
        with jax.enable_x64(True):
            indices = jnp.searchsorted(shares, points, side="right", method="scan")
            indices = jnp.minimum(indices, masses.shape[0] - 1)
            return jnp.where(masses[indices] > 0, indices, largest).astype(jnp.int32)

    return invert


def _draw(scheme: Callable[..., Array], key, log_weights: Array, num_samples: int) -> Array:
    num_samples = errors.check_count("num_samples", num_samples)
    log_weights = errors.as_array("log_weights", is_floating=True)(log_weights)
    if log_weights.ndim != 1 or log_weights.shape[0] == 0:
        raise ValueError(f"log_weights must have shape (N,) with N >= 1, got {log_weights.shape}; vmap for more axes")
    if errors.is_concrete(log_weights) and not np.any(np.isfinite(log_weights)):
        num_bad = np.sum(~np.isneginf(log_weights))
        raise ValueError(
            f"log_weights must hold a finite one, got {log_weights.shape[0]} of which {num_bad} are NaN or +inf and "
            "the others -inf; there is nothing to resample from"
        )
    return _core(scheme, errors.as_key(key), log_weights, num_samples)


@partial(jax.jit, static_argnums=(0, 3))
def _core(scheme: Callable[..., Array], key: Array, log_weights: Array, n: int) -> Array:
    log_weights = weights.clean(jax.lax.stop_gradient(log_weights))
    with jax.enable_x64(True):
        log_weights = log_weights.astype(jnp.float64)
        largest = jnp.max(log_weights)
        is_degenerate = ~jnp.isfinite(largest)
        w = jnp.exp(log_weights - jnp.where(is_degenerate, 0.0, largest))
        indices = scheme(key, w, n)
        fallback = jnp.arange(n, dtype=jnp.int32) % w.shape[0]
        return jnp.where(is_degenerate, fallback, indices.astype(jnp.int32))


# The schemes, in float64: w are the weights over the largest one.


def _systematic(key: Array, w: Array, n: int) -> Array:
    return _spread(w, jnp.ceil(_places(w, n) - uniform64(key)), n)


def _stratified(key: Array, w: Array, n: int) -> Array:
    places = _places(w, n)
    slot = jnp.clip(jnp.floor(places), 0, n - 1).astype(jnp.int32)
    return _spread(w, slot + (places > slot + uniform64(key, (n,))[slot]), n)


def _places(w: Array, n: int) -> Array:
    """The cumulative weights on [0, n]."""
    sums = _cumulate(jnp.add, jnp.cumsum, w)
    return sums * (n / sums[-1])


def _spread(w: Array, ends: Array, n: int) -> Array:
    """The owner of each of n slots, where index i owns those from ends[i - 1] up to ends[i].

    Writing the owners down where they begin takes a fraction of the time of a search. Indices without weight are left
    out: their ends differ from the ones before by rounding at most.
    """
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.clip(ends[:-1], 0, n).astype(jnp.int32)])
    index = jnp.arange(w.shape[0], dtype=jnp.int32)
    # of those that begin in one slot the last has copies
    owners = jnp.zeros(n, jnp.int32).at[jnp.where(w > 0, starts, n)].max(index, mode="drop")
    return _cumulate(jnp.maximum, jax.lax.cummax, owners)


def _cumulate(operation: Callable[..., Array], native: Callable[..., Array], x: Array) -> Array:
    """Cumulative sums or maxima; XLA's own are four times slower on a CPU."""
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.associative_scan(operation, x), default=native)


def _multinomial(key: Array, w: Array, n: int) -> Array:
    # n sorted uniforms are the first n of n + 1 cumulated exponentials over their total
    spacings = _cumulate(jnp.add, jnp.cumsum, -jnp.log1p(-uniform64(key, (n + 1,))))
    return invert64(w, spacings[:-1] / spacings[-1])


def _iid(key: Array, w: Array, n: int) -> Array:
    return invert64(w, uniform64(key, (n,)))


def _residual(key: Array, w: Array, n: int) -> Array:
    fractions, ends = _whole_copies(w, n)
    return _fill(w, ends, n, _iid(key, fractions, n))


def _ssp(key: Array, w: Array, n: int) -> Array:
    fractions, ends = _whole_copies(w, n)
    num_rest = n - ends[-1]
    last = w.shape[0] - 1
    upto = _cumulate(jnp.add, jnp.cumsum, fractions)
    upto = upto * (num_rest / jnp.where(num_rest > 0, upto[-1], 1.0))  # the particles' places on [0, num_rest)
    border = jnp.arange(1, n + 1)  # between interval k and the next
    across = jnp.minimum(jnp.searchsorted(upto, border, side="left", method="scan"), last)
    before = jnp.clip(border - jnp.where(across > 0, upto[across - 1], 0.0), 0.0, 1.0)  # its share in the interval
    after = jnp.clip(upto[across] - border, 0.0, 1.0)  # and in the next one
    carried = jnp.concatenate([jnp.zeros(1), after[:-1]])  # of the interval: the share that began in the last one
    carried_before = jnp.concatenate([jnp.zeros(1), before[:-1]])

    # Each interval draws one point. The particle reaching over from the last interval is out if it was taken there,
    # else it is taken with probability carried / (1 - carried_before); the other points are uniform.
    u_fresh, u_carried = uniform64(key, (2, n))
    fresh = carried + (1.0 - carried) * u_fresh
    takes_carried = u_carried * (1.0 - carried_before) < carried
    takes_across = fresh >= 1.0 - before
    # Is the particle across the next border taken? If the interval takes neither or one of the two that reach over its
    # ends, whatever happened before; if it would take both, only if the former was out: as in the interval before.
    interval = jnp.arange(n)
    decided = jax.lax.cummax(jnp.where(takes_across & takes_carried, -1, interval))
    is_taken = (decided >= 0) & takes_across[jnp.maximum(decided, 0)]
    was_taken = jnp.concatenate([jnp.zeros(1, bool), is_taken[:-1]])
    points = jnp.where(takes_carried & ~was_taken, 0.5 * carried, fresh)
    return _fill(w, ends, n, invert64(fractions, (interval + points) / jnp.maximum(num_rest, 1)))


def _killing(key: Array, w: Array, n: int) -> Array:
    key_stay, key_move = jax.random.split(key)
    return jnp.where(uniform64(key_stay, (n,)) < w, jnp.arange(n), _iid(key_move, w, n))


def _whole_copies(w: Array, n: int) -> tuple[Array, Array]:
    """The fractions of n W, and the cumulative sums of its whole parts."""
    expected = w * n / jnp.sum(w)
    copies = jnp.floor(expected * (1.0 + 2.0**-40))  # a whole number stays whole in spite of rounding
    return jnp.maximum(expected - copies, 0.0), _cumulate(jnp.add, jnp.cumsum, copies.astype(jnp.int32))


def _fill(w: Array, ends: Array, n: int, rest: Array) -> Array:
    """The whole copies, in order, and then the rest: its first entries."""
    slot = jnp.arange(n)
    num_whole = ends[-1]
    return jnp.where(slot < num_whole, _spread(w, ends, n), rest[jnp.maximum(slot - num_whole, 0)])
