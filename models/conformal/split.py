"""Split conformal prediction: scores of points held out, turned into sets for new points.

    C(x) = { y : s(x, y) <= q },   q the conformal quantile of the calibration scores      P(y in C(x)) >= 1 - alpha

for any score s that was fitted on other data. Weighted for a shifted law of x; by group (Mondrian), with the promise in
each of them, as of every label or of every range of the predicted value.

References:
    Papadopoulos, Proedrou, Vovk and Gammerman (2002), doi:10.1007/3-540-36755-1_29.
    Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715 (Mondrian).
    Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), doi:10.1080/01621459.2017.1307116.
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.calibrated import Calibrated, promise
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.quantiles import ranked_p_value

__all__ = ["Interval", "LabelSet", "interval", "label_set", "quantile_interval"]


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
    return LabelSet(p > alpha, promise(calibrated.weights is not None, calibrated.groups is not None, "="))


def _stretch(threshold: Array, scale: ArrayLike) -> Array:
    """The threshold times the scale; infinite as it is where a scale has underflowed."""
    is_infinite = jnp.isinf(threshold)
    return jnp.where(is_infinite, threshold, jnp.where(is_infinite, 0.0, threshold) * scale)


def _interval(lower: Array, upper: Array, guarantee: Guarantee) -> Interval:
    lower, upper = jnp.broadcast_arrays(lower, upper)
    return Interval(lower, upper, guarantee)
