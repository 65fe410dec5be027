"""Split conformal prediction: scores of points held out, turned into sets for new points.

    C(x) = { y : s(x, y) <= q },   q the conformal quantile of the calibration scores      P(y in C(x)) >= 1 - alpha

for any score s that was fitted on other data. Weighted for a shifted law of x; by group (Mondrian), with the promise in
each of them, as of every label or of every range of the predicted value.

References:
    Papadopoulos, Proedrou, Vovk and Gammerman (2002), doi:10.1007/3-540-36755-1_29.
    Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715 (Mondrian).
    Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), doi:10.1080/01621459.2017.1307116.
"""

from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.quantiles import ranked_p_value
from bayesinf.models.conformal.ranking import (
    Missing,
    check_missing,
    level_and_slack,
    rank,
    sort_scores,
    threshold_below,
)

__all__ = ["Calibrated", "Interval", "LabelSet", "calibrate", "interval", "label_set", "quantile_interval"]


class Interval(eqx.Module):
    """A closed interval for each test point; the whole line, or empty, where that is the set.

    Attributes:
        lower, upper: its ends; the interval is empty where lower > upper.
        guarantee: what it promises.
    """

    lower: Float[Array, "..."]
    upper: Float[Array, "..."]
    guarantee: Guarantee = eqx.field(static=True)

    def contains(self, y: Real[ArrayLike, "..."]) -> Bool[Array, "..."]:
        """Whether y is in it."""
        y = jnp.asarray(y)
        return (y >= self.lower) & (y <= self.upper)

    @property
    def width(self) -> Float[Array, "..."]:
        """Its length; 0 where it is empty."""
        return jnp.where(self.upper > self.lower, self.upper - self.lower, 0.0)


class LabelSet(eqx.Module):
    """A set of labels for each test point.

    Attributes:
        mask: which of the K labels are in it, shape (..., K).
        guarantee: what it promises.
    """

    mask: Bool[Array, "... k"]
    guarantee: Guarantee = eqx.field(static=True)

    @property
    def size(self) -> Int[Array, "..."]:
        """How many labels it holds; 0 is possible."""
        return jnp.sum(self.mask, -1, dtype=jnp.int32)


class Calibrated(eqx.Module):
    """Sorted calibration scores, as `calibrate` makes them.

    Attributes:
        scores: ascending, within each group; shape (n,).
        weights: of the scores, or None.
        groups: of the scores, or None.
        guarantee: what sets made of them promise.
    """

    scores: Float[Array, " n"]
    weights: Float[Array, " n"] | None
    groups: Int[Array, " n"] | None
    guarantee: Guarantee = eqx.field(static=True)

    def threshold(
        self,
        alpha: Real[ArrayLike, "..."],
        *,
        test_weight: Real[ArrayLike, "..."] | None = None,
        test_group: Int[ArrayLike, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """The score that a test point exceeds with probability at most alpha; see `conformal_quantile`.

        Args:
            alpha: the level; broadcasts with the two others.
            test_weight: of the test points, by default 1.
            test_group: of the test points, if calibrated by group.

        Returns:
            Thresholds; +inf where the group has too few scores, or the test point too much weight: `why_infinite` says
            which.
        """
        test_weight, test_group = self.about_test(test_weight, test_group)
        with jax.enable_x64(True):
            level, slack = level_and_slack(alpha)
            return _threshold((self.scores, self.weights, self.groups), level, slack, test_weight, test_group)

    def p_value(
        self,
        test_score: Float[ArrayLike, "..."],
        *,
        test_weight: Real[ArrayLike, "..."] | None = None,
        test_group: Int[ArrayLike, "..."] | None = None,
        key: errors.KeyLike | None = None,
    ) -> Float[Array, "..."]:
        """`p_value` of test scores, smoothed with a key.

        Args:
            test_score: any shape.
            test_weight: of the test points, by default 1; broadcasts against the scores.
            test_group: of the test points, if calibrated by group; broadcasts against the scores.
            key: PRNG key or seed.

        Returns:
            p-values of the shape of test_score.
        """
        asked = errors.as_array("test_score", is_floating=True)(test_score)
        w, group = self.about_test(test_weight, test_group)
        return ranked_p_value((self.scores, self.weights, self.groups), asked, w, group, key)

    def why_infinite(
        self,
        alpha: Real[ArrayLike, "..."],
        *,
        test_weight: Real[ArrayLike, "..."] | None = None,
        test_group: Int[ArrayLike, "..."] | None = None,
    ) -> str:
        """In words, why a threshold is +inf, and its sets are everything; empty where none is. Not for `jit`.

        Args:
            alpha, test_weight, test_group: as of `threshold`.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models import conformal
            >>> conformal.calibrate(jnp.array([0.3, 1.2, 0.8])).why_infinite(0.1)
            'of 3 calibration scores no threshold is exceeded with probability 0.1 at most: it takes 9'
        """
        is_infinite = np.isposinf(np.asarray(self.threshold(alpha, test_weight=test_weight, test_group=test_group)))
        if not is_infinite.any():
            return ""
        level = float(np.min(np.broadcast_to(np.asarray(alpha), is_infinite.shape)[is_infinite]))
        if level <= 0:
            return f"alpha = {level:g} allows no miss at all"
        if self.weights is not None:
            return (
                f"the test point, and calibration scores that are infinite, have more than alpha = {level:g} of the "
                "weight, or the calibration scores have none"
            )
        is_known, of_group = ~np.isnan(np.asarray(self.scores)), ""
        if self.groups is not None:
            group = np.broadcast_to(np.asarray(test_group), is_infinite.shape)[is_infinite].flat[0]
            is_known, of_group = is_known & (np.asarray(self.groups) == group), f" in group {group}"
        needed = int(np.ceil(1 / level * (1 - 1e-6))) - 1
        if is_known.sum() >= needed:
            return f"of the calibration scores{of_group} more than the share {level:g} are infinite themselves"
        return (
            f"of {is_known.sum()} calibration scores{of_group} no threshold is exceeded with probability {level:g} at "
            f"most: it takes {needed}"
        )

    def reversed(self) -> "Calibrated":
        """The same of minus the scores."""
        return Calibrated(*sort_scores(-self.scores, self.weights, self.groups), self.guarantee)

    def about_test(
        self, test_weight: Real[ArrayLike, "..."] | None, test_group: Int[ArrayLike, "..."] | None
    ) -> tuple[Float[Array, "..."], Int[Array, "..."] | None]:
        """What is said of the test points, checked against what was said of calibration; weights are 1 unless given."""
        if test_weight is not None and self.weights is None:
            raise ValueError("test_weight is relative to weights, which calibrate was not given")
        if (test_group is None) != (self.groups is None):
            had = "without" if self.groups is None else "with"
            raise ValueError(f"test_group must be given exactly where calibrate was given groups; it was {had}")
        errors.check_nonnegative("test_weight", 1.0 if test_weight is None else test_weight)
        return jnp.asarray(1.0 if test_weight is None else test_weight, float), (
            None if test_group is None else jnp.asarray(test_group)
        )


def calibrate(
    scores: Float[ArrayLike, " n"],
    *,
    weights: Real[ArrayLike, " n"] | None = None,
    groups: Int[ArrayLike, " n"] | None = None,
    missing: Missing = "raise",
) -> Calibrated:
    """Calibration scores, sorted once, for `interval`, `label_set` and `PredictiveDistribution`.

    Args:
        scores: of points that the score was not fitted to, larger where stranger, shape (n,).
        weights: likelihood ratios dP_test / dP_calibration of the points, up to a factor, if the law of x has shifted;
            those of the test points go by `test_weight` then.
        groups: whole numbers: the promise is kept within each. Of few scores a group has infinite sets.
        missing: what to do with scores that are NaN: "raise", or "drop" to leave them out. Under `jit` nobody can
            look, and they are left out.

    Returns:
        Calibrated.

    Raises:
        ValueError: a score is NaN, a shape is another than that of the scores, or a weight is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> calibrated = conformal.calibrate(jnp.array([0.3, -1.2, 0.8, 2.0, -0.1]), groups=jnp.array([0, 0, 0, 0, 1]))
        >>> calibrated.threshold(0.25, test_group=jnp.array([0, 1])).tolist()
        [2.0, inf]
        >>> print(calibrated.guarantee)
        exact: P(y in set | group) >= 1 - alpha, if calibration and test points are exchangeable within each group
    """
    s = errors.as_array("scores", is_floating=True)(scores)
    check_missing(missing, scores=s)
    if s.ndim != 1:
        raise ValueError(f"scores must have shape (n,), got {s.shape}; vmap for more axes")
    errors.check_nonnegative("weights", 0.0 if weights is None else weights)
    w = errors.as_array("weights", is_optional=True, is_floating=True)(weights)
    g = errors.as_array("groups", is_optional=True)(groups)
    for name, column in (("weights", w), ("groups", g)):
        if column is not None and column.shape != s.shape:
            raise ValueError(f"{name} must have the shape {s.shape} of scores, got {column.shape}")
    return Calibrated(*sort_scores(s, w, g), _promise(w is not None, g is not None))


def interval(
    calibrated: Calibrated,
    centre: Float[ArrayLike, "..."],
    scale: Real[ArrayLike, "..."],
    alpha: Real[ArrayLike, "..."],
    *,
    kind: Literal["absolute", "signed"] = "absolute",
    test_weight: Real[ArrayLike, "..."] | None = None,
    test_group: Int[ArrayLike, "..."] | None = None,
) -> Interval:
    """The interval of the values whose residual is not too strange.

        "absolute"   centre +- scale q(alpha)                                              of |y - centre| / scale
        "signed"     [centre - scale q_-(alpha / 2), centre + scale q_+(alpha / 2)]        of (y - centre) / scale

    with q_- and q_+ the thresholds of minus the scores, and of the scores: the second kind may be skew, and promises
    alpha / 2 at either end.

    Args:
        calibrated: scores from `absolute_residual` or `residual`, as the kind says.
        centre: what is predicted, any shape.
        scale: the same that calibration scores were divided by, positive; 1.0 where they were not.
        alpha: the level, in (0, 1) to be of use.
        kind: "absolute" or "signed".
        test_weight: of the test points, if calibrated with weights.
        test_group: of the test points, if calibrated by group.

    Returns:
        Interval, of the shapes broadcast together.

    Raises:
        ValueError: kind is none of the two, or what is said of test points does not go with the calibration.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> calibrated = conformal.calibrate(conformal.absolute_residual(jnp.array([1.0, 2.0, 4.0]), 0.0))
        >>> found = conformal.interval(calibrated, jnp.array([0.0, 10.0]), 1.0, 0.25)
        >>> found.lower.tolist(), found.upper.tolist()
        ([-4.0, 6.0], [4.0, 14.0])
    """
    errors.check_choice("kind", kind, ("absolute", "signed"))
    errors.check_positive("scale", scale)
    middle = jnp.asarray(centre)
    about_test = {"test_weight": test_weight, "test_group": test_group}
    if kind == "absolute":
        reach = _stretch(calibrated.threshold(alpha, **about_test), scale)
        return _interval(middle - reach, middle + reach, calibrated.guarantee)
    below = _stretch(calibrated.reversed().threshold(alpha / 2, **about_test), scale)
    above = _stretch(calibrated.threshold(alpha / 2, **about_test), scale)
    return _interval(middle - below, middle + above, calibrated.guarantee)


def quantile_interval(
    calibrated: Calibrated,
    lower: Float[ArrayLike, "..."],
    upper: Float[ArrayLike, "..."],
    alpha: Real[ArrayLike, "..."],
    *,
    test_weight: Real[ArrayLike, "..."] | None = None,
    test_group: Int[ArrayLike, "..."] | None = None,
) -> Interval:
    """Conformalised quantile regression: predicted quantiles, moved out, or in, by as much as calibration asks.

        C(x) = [lower(x) - q, upper(x) + q]

    Args:
        calibrated: scores from `quantile_residual`.
        lower, upper: the predicted quantiles of the test points, any shape.
        alpha: the level, in (0, 1) to be of use.
        test_weight: of the test points, if calibrated with weights.
        test_group: of the test points, if calibrated by group.

    Returns:
        Interval, of the shapes broadcast together; empty where the ends have crossed.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> y = jnp.array([1.0, 2.0, 4.0])
        >>> calibrated = conformal.calibrate(conformal.quantile_residual(y, 0.0, 3.0))
        >>> found = conformal.quantile_interval(calibrated, jnp.array([0.0]), jnp.array([5.0]), 0.25)
        >>> found.lower.tolist(), found.upper.tolist()
        ([-1.0], [6.0])

    References:
        Romano, Patterson and Candès (2019), https://arxiv.org/abs/1905.03222.
    """
    q = calibrated.threshold(alpha, test_weight=test_weight, test_group=test_group)
    return _interval(jnp.asarray(lower) - q, jnp.asarray(upper) + q, calibrated.guarantee)


def label_set(
    calibrated: Calibrated,
    label_scores: Float[Array, "... k"],
    alpha: Real[ArrayLike, ""],
    *,
    test_weight: Real[ArrayLike, "..."] | None = None,
    test_group: Int[ArrayLike, "..."] | None = None,
    key: errors.KeyLike | None = None,
) -> LabelSet:
    """The labels whose score is not too strange: those with p > alpha.

    Args:
        calibrated: scores of the true labels, from `lac`, `aps` or `raps`.
        label_scores: of every label of the test points, shape (..., K), by the same function.
        alpha: the level, in (0, 1) to be of use.
        test_weight: of the test points, shape (...), if calibrated with weights.
        test_group: of the test points' labels, if calibrated by group, broadcast against label_scores: shape (..., 1)
            for groups of x, `jnp.arange(K)` for the promise in every label.
        key: PRNG key or seed: ties are broken at random, one uniform for each test point, and coverage is 1 - alpha
            exactly; without it at least that.

    Returns:
        LabelSet, with a mask of the shape of label_scores.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> key_u, key_new = jax.random.split(jax.random.key(0))
        >>> probs, labels = jnp.tile(jnp.array([0.6, 0.3, 0.1]), (40, 1)), jnp.arange(40) % 3
        >>> calibrated = conformal.calibrate(conformal.aps(probs, jax.random.uniform(key_u, 40), labels))
        >>> new = conformal.aps(probs[:1], jax.random.uniform(key_new, 1))
        >>> conformal.label_set(calibrated, new, 0.5).mask.tolist()
        [[True, True, False]]
    """
    weight = None if test_weight is None else jnp.asarray(test_weight)[..., None]
    if key is None:
        is_in = label_scores <= calibrated.threshold(alpha, test_weight=weight, test_group=test_group)
        return LabelSet(is_in, calibrated.guarantee)
    w, group = calibrated.about_test(weight, test_group)
    shape = (*label_scores.shape[:-1], 1)
    ordered = calibrated.scores, calibrated.weights, calibrated.groups
    p = ranked_p_value(ordered, label_scores, w, group, key, noise_shape=shape)
    return LabelSet(p > alpha, _promise(calibrated.weights is not None, calibrated.groups is not None, "="))


@partial(jax.jit, static_argnums=2)
def _threshold(
    ordered: tuple[Array, Array | None, Array | None],
    level: Array,
    slack: float,
    test_weight: Array,
    group: Array | None,
) -> Array:
    with jax.enable_x64(True):
        shapes = [jnp.shape(array) for array in (level, test_weight, group) if array is not None]
        shape = jnp.broadcast_shapes(*shapes)
        group = None if group is None else jnp.broadcast_to(group, shape)
        w = jnp.broadcast_to(test_weight.astype(jnp.float64), shape)
        return threshold_below(rank(*ordered), jnp.broadcast_to(level, shape), slack, w, group)


def _promise(is_weighted: bool, is_grouped: bool, relation: str = ">=") -> Guarantee:
    where, within = (" | group", " within each group") if is_grouped else ("", "")
    assumes = f"calibration and test points are exchangeable{within}"
    if is_weighted:
        assumes = f"points are independent{within}, and the weights are the likelihood ratios of their laws"
    return Guarantee("exact", f"P(y in set{where}) {relation} 1 - alpha", assumes)


def _stretch(threshold: Array, scale: ArrayLike) -> Array:
    """The threshold times the scale; infinite as it is where a scale has underflowed."""
    is_infinite = jnp.isinf(threshold)
    return jnp.where(is_infinite, threshold, jnp.where(is_infinite, 0.0, threshold) * scale)


def _interval(lower: Array, upper: Array, guarantee: Guarantee) -> Interval:
    lower, upper = jnp.broadcast_arrays(lower, upper)
    return Interval(lower, upper, guarantee)
