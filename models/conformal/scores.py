"""Scores: how badly a point fits what was predicted; larger is stranger.

For a real y, with a centre and a scale, quantiles, or a distribution function F that were predicted without it,

    signed (y - centre) / scale,   absolute |y - centre| / scale,   quantile max(lower - y, y - upper),   |F(y) - 1/2|

and for one of K labels with predicted probabilities pi, where pi_(1) >= ... >= pi_(K) and the label has rank r,

    LAC 1 - pi_(r),    APS pi_(1) + ... + pi_(r-1) + u pi_(r),    RAPS the same + penalty max(r - num_free, 0)

Any function of a point will do for coverage, so long as it was not fitted to the calibration points more than to the
test point; sets are small where it is good. APS needs a uniform u of its own for every point: with u = 1 throughout,
and probabilities that are nearly 0 or 1, scores are tied at 1 and sets hold every label.

References:
    Romano, Patterson and Candès (2019), https://arxiv.org/abs/1905.03222 (quantiles).
    Chernozhukov, Wüthrich and Zhu (2021), doi:10.1073/pnas.2107794118 (|F - 1/2|).
    Sadinle, Lei and Wasserman (2019), doi:10.1080/01621459.2017.1395341 (LAC).
    Romano, Sesia and Candès (2020), https://arxiv.org/abs/2006.02544 (APS).
    Angelopoulos, Bates, Malik and Jordan (2021), https://arxiv.org/abs/2009.14193 (RAPS).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bayesinf import errors

__all__ = ["absolute_residual", "aps", "lac", "pit_score", "quantile_residual", "raps", "residual"]


def residual(
    y: Float[ArrayLike, "..."], centre: Real[ArrayLike, "..."], scale: Real[ArrayLike, "..."] = 1.0
) -> Float[Array, "..."]:
    """The signed residual (y - centre) / scale: for intervals with a promise at either end.

    Args:
        y: what was observed; NaN is missing.
        centre: what was predicted.
        scale: how far off that may be, positive.

    Returns:
        Scores, of the shapes broadcast together.

    Example:
        >>> from bayesinf.models import conformal
        >>> float(conformal.residual(1.0, 2.0, 0.5))
        -2.0
    """
    errors.check_positive("scale", scale)
    return (jnp.asarray(y) - centre) / scale


def absolute_residual(
    y: Float[ArrayLike, "..."], centre: Real[ArrayLike, "..."], scale: Real[ArrayLike, "..."] = 1.0
) -> Float[Array, "..."]:
    """The absolute residual |y - centre| / scale: for intervals around the centre, as wide as the scale says.

    Args:
        y: what was observed; NaN is missing.
        centre: what was predicted.
        scale: how far off that may be, positive.

    Returns:
        Scores, of the shapes broadcast together.

    Example:
        >>> from bayesinf.models import conformal
        >>> float(conformal.absolute_residual(1.0, 2.0, 0.5))
        2.0
    """
    return jnp.abs(residual(y, centre, scale))


def quantile_residual(
    y: Float[ArrayLike, "..."], lower: Real[ArrayLike, "..."], upper: Real[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """How far y is outside of a predicted interval, negative inside: max(lower - y, y - upper).

    Args:
        y: what was observed; NaN is missing.
        lower, upper: predicted quantiles, such as those of levels alpha / 2 and 1 - alpha / 2.

    Returns:
        Scores, of the shapes broadcast together.

    Example:
        >>> from bayesinf.models import conformal
        >>> float(conformal.quantile_residual(1.0, -1.0, 3.0)), float(conformal.quantile_residual(4.0, -1.0, 3.0))
        (-2.0, 1.0)

    References:
        Romano, Patterson and Candès (2019), https://arxiv.org/abs/1905.03222.
    """
    y = jnp.asarray(y)
    return jnp.maximum(lower - y, y - upper)


def pit_score(
    cdf: Float[ArrayLike, "..."],
    *,
    cdf_before: Float[ArrayLike, "..."] | None = None,
    u: Float[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """How far y is in the tails of the law predicted for it, |F(y) - 1/2|, between 0 and 1/2.

    Where y has atoms, F(y) is drawn between its value before y and that at y, F(y-) + u (F(y) - F(y-)).

    Args:
        cdf: F(y).
        cdf_before: F(y-), P(Y < y), where y may be equal to an atom.
        u: uniforms in [0, 1], to go with it.

    Returns:
        Scores.

    Raises:
        ValueError: of cdf_before and u only one is given.

    Example:
        >>> from bayesinf.models import conformal
        >>> float(conformal.pit_score(0.75)), float(conformal.pit_score(1.0, cdf_before=0.5, u=0.5))
        (0.25, 0.25)

    References:
        Chernozhukov, Wüthrich and Zhu (2021), doi:10.1073/pnas.2107794118.
    """
    if (cdf_before is None) != (u is None):
        raise ValueError("cdf_before and u, which draws between it and cdf, go together; give both, or neither")
    if cdf_before is None or u is None:
        return jnp.abs(jnp.asarray(cdf) - 0.5)
    return jnp.abs(jnp.asarray(cdf_before) + u * (jnp.asarray(cdf) - cdf_before) - 0.5)


def lac(probs: Float[Array, "*b k"], label: Int[ArrayLike, "..."] | None = None) -> Float[Array, "..."]:
    """One minus the predicted probability; gives the smallest sets on average, where the probabilities are right.

    Args:
        probs: of K labels, shape (..., K).
        label: of each point; all K labels unless given.

    Returns:
        Scores of the labels, or of all, shape (..., K).

    Raises:
        ValueError: a row is no law, or label is out of range; values are not looked at under `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> conformal.lac(jnp.array([0.5, 0.25, 0.25])).tolist(), float(conformal.lac(jnp.array([0.5, 0.5]), 1))
        ([0.5, 0.75, 0.75], 0.5)

    References:
        Sadinle, Lei and Wasserman (2019), doi:10.1080/01621459.2017.1395341.
    """
    _check_probs(probs)
    return _of_label(1.0 - probs, label)


def aps(
    probs: Float[Array, "*b k"], u: Float[ArrayLike, "..."], label: Int[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    """The probability of all likelier labels, and the share u of the label's own.

    If the probabilities are right, that is uniform given x: sets hold about 1 - alpha at every x, not on average alone.

    Args:
        probs: of K labels, shape (..., K).
        u: uniforms in [0, 1], one for each point, drawn for calibration and test points alike. With 1 sets are larger.
        label: of each point; all K labels unless given.

    Returns:
        Scores of the labels, or of all, shape (..., K).

    Raises:
        ValueError: a row is no law, u is outside of [0, 1], or label is out of range; values are not looked at under
            `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> conformal.aps(jnp.array([0.25, 0.5, 0.25]), 0.5).tolist()
        [0.625, 0.25, 0.875]

    References:
        Romano, Sesia and Candès (2020), https://arxiv.org/abs/2006.02544.
    """
    return raps(probs, u, label, penalty=0.0)


def raps(
    probs: Float[Array, "*b k"],
    u: Float[ArrayLike, "..."],
    label: Int[ArrayLike, "..."] | None = None,
    *,
    penalty: Real[ArrayLike, ""] = 0.01,
    num_free: Int[ArrayLike, ""] = 5,
) -> Float[Array, "..."]:
    """APS with a penalty on every label after the first few: smaller sets where there are many labels.

    Args:
        probs: of K labels, shape (..., K).
        u: uniforms in [0, 1], one for each point, drawn for calibration and test points alike.
        label: of each point; all K labels unless given.
        penalty: for each rank beyond num_free, not negative.
        num_free: how many labels go without it.

    Returns:
        Scores of the labels, or of all, shape (..., K).

    Raises:
        ValueError: a row is no law, u is outside of [0, 1], or label is out of range; values are not looked at under
            `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> conformal.raps(jnp.array([0.25, 0.5, 0.25]), 0.5, penalty=1.0, num_free=1).tolist()
        [1.625, 0.25, 2.875]

    References:
        Angelopoulos, Bates, Malik and Jordan (2021), https://arxiv.org/abs/2009.14193.
    """
    errors.check_nonnegative("penalty", penalty)
    _check_probs(probs)
    if errors.is_concrete(u) and not np.all((np.asarray(u) >= 0) & (np.asarray(u) <= 1)):
        raise ValueError(f"u must be uniforms in [0, 1], one for each point, got {np.asarray(u)}")
    order = jnp.argsort(-probs, axis=-1)
    place = jnp.argsort(order, axis=-1)  # of each label among the sorted, from zero
    ordered = jnp.take_along_axis(probs, order, -1)
    before = jnp.take_along_axis(jnp.cumsum(ordered, -1) - ordered, place, -1)
    excess = jnp.maximum(place + 1 - num_free, 0)
    return _of_label(before + jnp.asarray(u)[..., None] * probs + penalty * excess, label)


def _check_probs(probs: Array) -> None:
    """Rows of probabilities; skipped while traced."""
    if not errors.is_concrete(probs) or not probs.size:
        return
    values = np.asarray(probs)
    slack = values.shape[-1] * float(jnp.finfo(values.dtype).eps) ** 0.5
    off = np.abs(np.sum(values, -1, dtype=float) - 1)
    if not (np.all(values >= -slack) and np.all(off <= slack)):
        worst = values.reshape(-1, values.shape[-1])[np.argmax(np.where(np.isnan(off), np.inf, off))]
        raise ValueError(
            f"probs must hold probabilities that sum to 1 in every row, got {worst}; of logits take jax.nn.softmax"
        )


def _of_label(scores: Array, label: ArrayLike | None) -> Array:
    if label is None:
        return scores
    label = jnp.asarray(label)
    if label.shape != scores.shape[:-1]:
        raise ValueError(f"label must have the shape {scores.shape[:-1]} of probs but its last, got {label.shape}")
    num = scores.shape[-1]
    if errors.is_concrete(label) and np.any((np.asarray(label) < 0) | (np.asarray(label) >= num)):
        raise ValueError(f"label must be in [0, {num}), as probs has columns, got {np.asarray(label)}")
    return jnp.take_along_axis(scores, label[..., None], -1)[..., 0]
