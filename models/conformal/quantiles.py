"""The two questions of conformal prediction: how large may a score be, and how strange is this one?

With scores s_1, ..., s_n of calibration and s of the test point, larger where a point is stranger,

    q = the k-th smallest of s_1, ..., s_n, +inf        k = ceil((n + 1)(1 - alpha))
    p = (1 + #{s_i >= s}) / (n + 1)                     s <= q exactly where p > alpha

If s_1, ..., s_n, s are exchangeable then P(s <= q) >= 1 - alpha, for every n and every law. The "+1" and the +inf are
the test point itself: without them the promise fails, and where n < 1 / alpha - 1 no finite q can keep it, so q is
+inf. Weights w_i, w of the test point replace counts by masses: of likelihood ratios, for a law of x that has shifted;
decaying in time, for one that drifts.

References:
    Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715.
    Tibshirani, Barber, Candès and Ramdas (2019), https://arxiv.org/abs/1904.06019 (weights).
    Barber, Candès, Ramdas and Tibshirani (2023), doi:10.1214/23-AOS2276 (weights that do not depend on the data).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.ranking import (
    Missing,
    check_missing,
    level_and_slack,
    mass_above,
    rank,
    sort_scores,
    threshold_below,
)

__all__ = ["conformal_quantile", "conformal_rank", "p_value"]


def conformal_rank(num_scores: Int[ArrayLike, "..."], alpha: Real[ArrayLike, "..."]) -> Int[Array, "..."]:
    """Which of the sorted scores is the conformal quantile, counted from one.

        k = ceil((n + 1)(1 - alpha)) = n + 1 - floor((n + 1) alpha)

    in double precision, where alpha is taken for the decimal that it was rounded from: 0.7 in float32 is 0.69999999,
    and ten times that is 7.

    Args:
        num_scores: n >= 0.
        alpha: the level; broadcasts against n.

    Returns:
        k in 0, ..., n + 1. Of n + 1 the quantile is +inf, of 0 it is -inf: levels of 0 and less, and of 1 and more.

    Example:
        >>> from bayesinf.models import conformal
        >>> [int(conformal.conformal_rank(n, 0.1)) for n in (8, 9, 99)]
        [9, 9, 90]
    """
    num_scores = jnp.asarray(num_scores)
    with jax.enable_x64(True):
        level, slack = level_and_slack(alpha)
        n_and_1 = num_scores.astype(jnp.float64) + 1
        num_above = jnp.floor(n_and_1 * (level + slack * jnp.abs(level)))
        k = n_and_1 - jnp.where(num_above > 0, num_above, 0.0)  # NaN is a level that allows nothing
        return jnp.maximum(k, 0).astype(num_scores.dtype)


def conformal_quantile(
    scores: Real[ArrayLike, "*b n"],
    alpha: Real[ArrayLike, "..."],
    *,
    weights: Real[ArrayLike, "*b n"] | None = None,
    test_weight: Real[ArrayLike, "..."] | None = None,
    missing: Missing = "raise",
) -> Float[Array, "..."]:
    """The threshold that the score of a new point exceeds with probability at most alpha.

        q = min { s_i :  sum_{s_j > s_i} w_j + w <= alpha (sum_j w_j + w) },    +inf where there is none

    which without weights is the ceil((n + 1)(1 - alpha))-th smallest score. P(s <= q) >= 1 - alpha if the scores of
    calibration and test are exchangeable, and at most 1 - alpha + 1 / (n + 1) if besides they are never tied; given the
    calibration scores it is Beta(k, n + 1 - k). With weights w(x) = dP_test / dP_calibration, known, it holds for the
    shifted law.

    Args:
        scores: shape (..., n).
        alpha: the level. Any real number: for 0 and less the threshold is +inf, for 1 and more it is -inf.
        weights: of the scores, not negative; all equal unless given.
        test_weight: of the test point, by default 1. For m test points of one calibration, shape (m,).
        missing: what to do with scores that are NaN: "raise", or "drop" to leave them out. Under `jit` nobody can
            look, and they are left out.

    Returns:
        Thresholds, of the leading shape of the scores broadcast with alpha and test_weight; +inf where there are too
        few scores, or the test point has too much of the weight.

    Raises:
        ValueError: a score is NaN, a weight is negative or not finite, or test_weight is given without weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> scores = jnp.arange(1.0, 20.0)
        >>> float(conformal.conformal_quantile(scores, 0.1)), float(conformal.conformal_quantile(scores, 0.01))
        (18.0, inf)
        >>> conformal.conformal_quantile(scores, 0.1, weights=jnp.ones(19), test_weight=jnp.array([1.0, 3.0])).tolist()
        [18.0, inf]

    References:
        Tibshirani, Barber, Candès and Ramdas (2019), https://arxiv.org/abs/1904.06019.
    """
    s = errors.as_array("scores", is_floating=True)(scores)
    check_missing(missing, scores=s)
    if s.ndim == 0:
        raise ValueError("scores must have an axis of calibration points, got a scalar")
    if weights is None:
        if test_weight is not None:
            raise ValueError("test_weight is relative to weights; give both, or neither")
        return _kth_smallest(s, conformal_rank(jnp.sum(~jnp.isnan(s), -1, dtype=jnp.int32), alpha))

    w, w_test = _check_weights(weights, test_weight)
    if w is None or w.shape != s.shape:
        raise ValueError(f"weights must have the shape {s.shape} of scores, got {jnp.shape(weights)}")
    with jax.enable_x64(True):
        level, slack = level_and_slack(alpha)
        return _weighted_quantile(s, w, level, slack, w_test.astype(jnp.float64))


def p_value(
    calibration_scores: Float[ArrayLike, " n"],
    test_score: Float[ArrayLike, "*m"],
    *,
    weights: Real[ArrayLike, " n"] | None = None,
    test_weight: Real[ArrayLike, "..."] | None = None,
    group: Int[ArrayLike, " n"] | None = None,
    test_group: Int[ArrayLike, "..."] | None = None,
    key: errors.KeyLike | None = None,
    missing: Missing = "raise",
) -> Float[Array, "*m"]:
    """How strange a score is among those of calibration: small where it is large.

        p = (w + sum_{s_i >= s} w_i) / (w + sum_i w_i)                             P(p <= alpha) <= alpha
        p = (sum_{s_i > s} w_i + U (w + sum_{s_i = s} w_i)) / (w + sum_i w_i)      P(p <= alpha) = alpha, with a key

    for every alpha, if calibration and test are exchangeable; with weights, if they are the likelihood ratios; with
    groups, within each group. U is uniform, drawn anew for every test score. O((n + m) log n).

    Args:
        calibration_scores: shape (n,).
        test_score: any shape. Of NaN the p-value is NaN.
        weights: of the calibration scores, not negative; all equal unless given.
        test_weight: of the test points, by default 1; broadcasts against test_score.
        group: of each calibration score, whole numbers: then a test score is compared within its own group alone.
        test_group: of each test point; broadcasts against test_score.
        key: PRNG key or seed for the smoothed p-value, which is exactly uniform even where scores are tied.
        missing: what to do with calibration scores that are NaN: "raise", or "drop" to leave them out. Under `jit`
            nobody can look, and they are left out.

    Returns:
        p-values of the shape of test_score; 1 where nothing is there to compare with, and conservative without a key.

    Raises:
        ValueError: a calibration score is NaN; a weight is negative or not finite; or of the pairs weights and
            test_weight, group and test_group, the second is given without the first, or the group without that of the
            test points.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> conformal.p_value(jnp.arange(7.0), jnp.array([6.5, 6.0, -1.0])).tolist()
        [0.125, 0.25, 1.0]
    """
    scores = errors.as_array("calibration_scores", is_floating=True)(calibration_scores)
    asked = errors.as_array("test_score", is_floating=True)(test_score)
    check_missing(missing, calibration_scores=scores)
    if scores.ndim != 1:
        raise ValueError(f"calibration_scores must have shape (n,), got {scores.shape}; vmap for more axes")
    if weights is None and test_weight is not None:
        raise ValueError("test_weight is relative to weights; give both, or neither")
    w, w_test = _check_weights(weights, test_weight)
    groups, asked_group = _check_groups(group, test_group)
    for name, column in (("weights", w), ("group", groups)):
        if column is not None and column.shape != scores.shape:
            raise ValueError(f"{name} must have the shape {scores.shape} of calibration_scores, got {column.shape}")
    return ranked_p_value(sort_scores(scores, w, groups), asked, w_test, asked_group, key)


def ranked_p_value(
    ordered: tuple[Array, Array | None, Array | None],
    test_score: Array,
    test_weight: Array,
    test_group: Array | None,
    key: errors.KeyLike | None,
    *,
    noise_shape: tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """`p_value` of what `sort_scores` has sorted; `noise_shape` is that of the uniforms, which may be shared."""
    shape = test_score.shape
    noise = jnp.ones(())
    if key is not None:
        noise = 1.0 - jax.random.uniform(errors.as_key(key), shape if noise_shape is None else noise_shape)  # in (0, 1]
    with jax.enable_x64(True):
        w = jnp.broadcast_to(test_weight.astype(jnp.float64), shape)
        asked = None if test_group is None else jnp.broadcast_to(test_group, shape)
        return _p_value(ordered, jax.lax.stop_gradient(test_score), w, asked, noise)


@jax.jit
def _p_value(
    ordered: tuple[Array, Array | None, Array | None], s: Array, w: Array, group: Array | None, u: Array
) -> Array:
    with jax.enable_x64(True):
        above, equal, total = mass_above(rank(*ordered), s, group)
        is_empty = total + w <= 0
        p = (above + u * (equal + w)) / jnp.where(is_empty, 1.0, total + w)
        return jnp.where(is_empty, 1.0, jnp.where(jnp.isnan(s), jnp.nan, p)).astype(s.dtype)


@partial(jax.jit, static_argnums=3)
def _weighted_quantile(scores: Array, weights: Array, level: Array, slack: float, test_weight: Array) -> Array:
    def threshold(scores: Array, weights: Array, level: Array, test_weight: Array) -> Array:
        scores, ordered, _ = sort_scores(scores, weights, None)
        return threshold_below(rank(scores, ordered), level, slack, test_weight, None)

    with jax.enable_x64(True):
        return jnp.vectorize(threshold, signature="(n),(n),(),()->()")(scores, weights, level, test_weight)


def _kth_smallest(scores: Array, k: Array) -> Array:
    """Of the scores and +inf, the test point's own; -inf where k is 0."""
    at_the_end = [(0, 0)] * (scores.ndim - 1) + [(0, 1)]
    ordered = jnp.sort(jnp.pad(jnp.where(jnp.isnan(scores), jnp.inf, scores), at_the_end, constant_values=jnp.inf))
    picked = jnp.vectorize(lambda row, place: row[place], signature="(n),()->()")(ordered, jnp.maximum(k - 1, 0))
    return jnp.where(k > 0, picked, -jnp.inf)


def _check_weights(weights: ArrayLike | None, test_weight: ArrayLike | None) -> tuple[Array | None, Array]:
    errors.check_nonnegative("weights", 0.0 if weights is None else weights)
    errors.check_nonnegative("test_weight", 0.0 if test_weight is None else test_weight)
    as_floating = errors.as_array("weights", is_optional=True, is_floating=True)
    return as_floating(weights), jnp.asarray(1.0) if test_weight is None else as_floating(test_weight)


def _check_groups(group: ArrayLike | None, test_group: ArrayLike | None) -> tuple[Array | None, Array | None]:
    if (group is None) != (test_group is None):
        raise ValueError("group, of the calibration scores, and test_group go together; give both, or neither")
    return (None, None) if group is None else (jnp.asarray(group), jnp.asarray(test_group))
