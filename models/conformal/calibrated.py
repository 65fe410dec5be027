"""Calibration scores, sorted once, and the thresholds and p-values that they give new points.

    q(alpha) = the conformal quantile of the calibration scores,   P(s(x, y) <= q(alpha)) >= 1 - alpha

Weighted for a shifted law of x; by group (Mondrian), with the promise in each of them.

References:
    Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715 (Mondrian).
    Tibshirani, Barber, Candès and Ramdas (2019), https://arxiv.org/abs/1904.06019 (weights).
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Real

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

__all__ = ["Calibrated", "calibrate"]


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
    return Calibrated(*sort_scores(s, w, g), promise(w is not None, g is not None))


def promise(is_weighted: bool, is_grouped: bool, relation: str = ">=") -> Guarantee:
    """What sets of calibration scores promise, with or without weights and groups."""
    where, within = (" | group", " within each group") if is_grouped else ("", "")
    assumes = f"calibration and test points are exchangeable{within}"
    if is_weighted:
        assumes = f"points are independent{within}, and the weights are the likelihood ratios of their laws"
    return Guarantee("exact", f"P(y in set{where}) {relation} 1 - alpha", assumes)


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
