"""Arithmetic of log weights.

A log weight that is NaN or +inf is no weight: it counts as -inf everywhere here, and `num_invalid` says how many there
are. Where no weight is left, `log_mean_exp` and `log_sum_exp` are -inf, `ess` is 0 and `normalize` returns -inf
throughout, never NaN; the gradients of these are zero there.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from bayesinf import errors

__all__ = [
    "Moments",
    "average",
    "clean",
    "compensated_sum",
    "ess",
    "is_degenerate",
    "log_mean_exp",
    "log_sum_exp",
    "moments",
    "normalize",
    "num_invalid",
    "pareto_k",
]


def clean(log_weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log weights with NaN and +inf replaced by -inf.

    Args:
        log_weights: any shape.

    Returns:
        Log weights of the same shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> weights.clean(jnp.array([-1.0, jnp.nan, jnp.inf])).tolist()
        [-1.0, -inf, -inf]
    """
    log_weights = _as_floating("log_weights")(log_weights)
    return jnp.where(_is_weight(log_weights), log_weights, -jnp.inf)


def num_invalid(log_weights: Float[Array, "..."], axis: int = -1) -> Int[Array, "..."]:
    """How many log weights are NaN or +inf; -inf is an ordinary weight of zero.

    Args:
        log_weights: any shape.
        axis: the axis of particles.

    Returns:
        Counts, int32, without the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> int(weights.num_invalid(jnp.array([0.0, -jnp.inf, jnp.nan, jnp.inf])))
        2
    """
    return jnp.sum(~_is_weight(_as_floating("log_weights")(log_weights)), axis, dtype=jnp.int32)


def is_degenerate(log_weights: Float[Array, "..."], axis: int = -1) -> Bool[Array, "..."]:
    """Whether no weight is positive: every log weight is -inf, NaN or +inf.

    Args:
        log_weights: any shape.
        axis: the axis of particles.

    Returns:
        Booleans, without the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> weights.is_degenerate(jnp.array([[-jnp.inf, jnp.nan], [-jnp.inf, -1e30]])).tolist()
        [True, False]
    """
    return ~jnp.any(jnp.isfinite(_as_floating("log_weights")(log_weights)), axis)


def log_mean_exp(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Log of the mean of exp(x); -inf where every x is -inf, NaN or +inf.

        log( (1/n) sum_i exp(x_i) ) = max x + log( (1/n) sum_i exp(x_i - max x) )

    Args:
        x: any shape; NaN and +inf count as -inf, and in n.
        axis: the axis of the mean.

    Returns:
        Log means, without the axis.

    Raises:
        ValueError: there are none to average.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> float(weights.log_mean_exp(jnp.array([1000.0, 1000.0])))
        1000.0
    """
    scaled, shift = _scale("x", x, axis)
    mean = jnp.mean(scaled, axis)
    is_positive = mean > 0
    return jnp.where(is_positive, jnp.log(jnp.where(is_positive, mean, 1.0)) + jnp.squeeze(shift, axis), -jnp.inf)


def log_sum_exp(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Log of the sum of exp(x); -inf where every x is -inf, NaN or +inf.

    Args:
        x: any shape; NaN and +inf count as -inf.
        axis: the axis of the sum.

    Returns:
        Log sums, without the axis.

    Raises:
        ValueError: there are none to add.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> round(float(jnp.exp(weights.log_sum_exp(jnp.log(jnp.array([1.0, 2.0, 0.0]))))), 3)
        3.0
    """
    return log_mean_exp(x, axis) + jnp.log(jnp.shape(x)[axis])


def normalize(log_weights: Float[Array, "..."], axis: int = -1) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The log weights shifted so that the weights sum to one, and the log of their mean before.

        log W_i = log w_i - log sum_j w_j,    log_mean = log( (1/n) sum_j w_j )

    Args:
        log_weights: any shape; unnormalised.
        axis: the axis of particles.

    Returns:
        (log_normalized, log_mean), the second without the axis; -inf throughout where no weight is positive.

    Raises:
        ValueError: there are no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> log_normalized, log_mean = weights.normalize(jnp.log(jnp.array([1.0, 3.0])))
        >>> [round(weight, 3) for weight in jnp.exp(log_normalized).tolist()], round(float(jnp.exp(log_mean)), 3)
        ([0.25, 0.75], 2.0)
    """
    log_weights = clean(log_weights)
    log_mean = log_mean_exp(log_weights, axis)
    log_total = jnp.where(jnp.isfinite(log_mean), log_mean, 0.0) + jnp.log(log_weights.shape[axis])
    return log_weights - jnp.expand_dims(log_total, axis), log_mean


def ess(log_weights: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Effective sample size (sum w)^2 / sum w^2, between 1 and n; 0 where no weight is positive.

    Args:
        log_weights: any shape; unnormalised.
        axis: the axis of particles.

    Returns:
        Effective sample sizes, without the axis.

    Raises:
        ValueError: there are no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> float(weights.ess(jnp.array([0.0, 0.0, -jnp.inf, jnp.nan])))
        2.0

    References:
        Kong, Liu and Wong (1994), doi:10.1080/01621459.1994.10476469.
    """
    scaled, _ = _scale("log_weights", log_weights, axis)
    squares = jnp.sum(scaled**2, axis)  # at least 1, unless there is no weight
    ratio = jnp.sum(scaled, axis) ** 2 / jnp.where(squares > 0, squares, 1.0)
    return jnp.minimum(ratio, scaled.shape[axis])


class Moments(NamedTuple):
    """Mean and standard deviation of every component of a state."""

    mean: PyTree
    sd: PyTree


def average(log_weights: Float[Array, " n"], values: PyTree) -> PyTree:
    """Weighted means over the leading axis of every leaf; NaN where no weight is positive.

    Args:
        log_weights: normalised, shape (n,).
        values: arrays with leading axis n.

    Returns:
        sum_i W_i values_i, a pytree of the same structure.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> round(float(weights.average(jnp.log(jnp.array([0.25, 0.75])), jnp.array([0.0, 1.0]))), 3)
        0.75
    """
    w = jnp.where(is_degenerate(log_weights), jnp.nan, jnp.exp(log_weights))
    return jax.tree.map(lambda leaf: jnp.tensordot(w, leaf.astype(jnp.result_type(leaf, w)), axes=1), values)


def moments(log_weights: Float[Array, " n"], values: PyTree) -> Moments:
    """Weighted means and standard deviations over the leading axis of every leaf; NaN where no weight is positive.

    Args:
        log_weights: normalised, shape (n,).
        values: arrays with leading axis n.

    Returns:
        Moments of the same structure; deviations are taken from the mean before they are squared.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> mean, sd = weights.moments(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 3.0]))
        >>> round(float(mean), 3), round(float(sd), 3)
        (2.0, 1.0)
    """
    mean = average(log_weights, values)
    squares = average(log_weights, jax.tree.map(lambda leaf, m: (leaf - m) ** 2, values, mean))
    return Moments(mean, jax.tree.map(jnp.sqrt, squares))


def compensated_sum(x: Float[Array, "t ..."]) -> Float[Array, "..."]:
    """The sum over the leading axis, accumulated in float64 whatever the precision of x.

    What a series of 1e5 log-evidence increments in float32 needs: each partial sum would be rounded at the size of the
    whole.

    Args:
        x: shape (T, ...).

    Returns:
        Sums, without the leading axis, in the dtype of x.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import weights
        >>> increments = jnp.concatenate([jnp.array([2.0**24]), jnp.ones(8)]).astype(jnp.float32)
        >>> float(weights.compensated_sum(increments)) - 2.0**24
        8.0
    """
    with jax.enable_x64(True):
        return jnp.sum(x.astype(jnp.float64), axis=0).astype(x.dtype)


def pareto_k(log_weights: Float[ArrayLike, " n"]) -> float:
    """The tail index of importance weights, by a generalised Pareto fit to the largest of them; on the host.

    Below 0.5 the estimate has finite variance, up to 0.7 it is usable, above it should not be trusted.

    Args:
        log_weights: n unnormalised log weights; infinite and NaN ones are weights of zero.

    Returns:
        k; -inf where the largest weights are all equal, so that there is no tail; +inf where fewer than 25 weights are
        positive, too few to see one, or where beside the largest the others vanish.

    Example:
        >>> import numpy as np
        >>> from bayesinf import weights
        >>> log_weights = 0.7 * np.random.default_rng(0).standard_exponential(20_000)  # Pareto weights of index 0.7
        >>> round(weights.pareto_k(log_weights), 1)
        0.7

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
    """
    from arviz_stats.base import array_stats

    values = np.asarray(log_weights, np.float64)
    values = values[np.isfinite(values)]
    if values.size < 25:
        return float("inf")
    try:
        with np.errstate(all="ignore"):
            k = float(array_stats.psislw(-values, r_eff=1)[1])  # it takes the logs of one over the weights
    except ValueError:  # all tail values are the same
        return float("-inf")
    return float("inf") if np.isnan(k) else k  # most of the tail is zero beside the largest weight


_as_floating = partial(errors.as_array, is_floating=True)


def _is_weight(log_weights: Array) -> Array:
    return log_weights < jnp.inf  # false for NaN too


def _scale(name: str, log_weights: Array, axis: int) -> tuple[Array, Array]:
    """The weights over the largest one, and the log of the largest one (0 if there is none)."""
    log_weights = clean(_as_floating(name)(log_weights))
    if 0 in log_weights.shape:
        raise ValueError(f"{name} must hold at least one weight, got shape {log_weights.shape}")
    shift = jax.lax.stop_gradient(jnp.max(log_weights, axis, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    return jnp.exp(log_weights - shift), shift
