"""Cross-conformal intervals: every point is both fitted to and calibrated on, none by a fit that has seen it.

With mu_{-i} fitted without point i, or without its fold, and R_i = |y_i - mu_{-i}(x_i)|,

    jackknife+   [ the floor(alpha (n + 1))-th smallest of mu_{-i}(x) - R_i,
                   the ceil((1 - alpha)(n + 1))-th smallest of mu_{-i}(x) + R_i ]           P >= 1 - 2 alpha
    minmax       [ min_i mu_{-i}(x) - q,  max_i mu_{-i}(x) + q ],   q of the R_i            P >= 1 - alpha

An end is infinite where alpha (n + 1) < 1. The fits treat points alike, whatever their order. The factor 2 is not
slack in the proof alone: there are laws with nearly that coverage; usual ones have 1 - alpha.

References:
    Barber, Candès, Ramdas and Tibshirani (2021), doi:10.1214/20-AOS1965.
    Kim, Xu and Barber (2020), https://arxiv.org/abs/2002.09025 (after the bootstrap).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.quantiles import conformal_quantile
from bayesinf.models.conformal.ranking import Missing, check_missing
from bayesinf.models.conformal.split import Interval

__all__ = ["cv_plus", "jackknife_after_bootstrap", "jackknife_minmax", "jackknife_plus"]

_ALIKE = "points are exchangeable, and the fit does not look at their order"


def jackknife_plus(
    residuals: Float[Array, " n"],
    predictions: Float[Array, "... n"],
    alpha: Real[Array, ""] | float,
    *,
    missing: Missing = "raise",
) -> Interval:
    """The jackknife+: P(y in interval) >= 1 - 2 alpha.

    Args:
        residuals: R_i = |y_i - mu_{-i}(x_i)|, shape (n,).
        predictions: mu_{-i}(x) for the test points, shape (..., n).
        alpha: the level; half of what may be missed.
        missing: what to do with residuals and predictions that are NaN: "raise", or "drop" to leave them out. Under
            `jit` nobody can look, and they are left out.

    Returns:
        Interval of shape (...).

    Raises:
        ValueError: shapes do not fit, or a residual or prediction is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> found = conformal.jackknife_plus(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 0.5, 0.25]), 0.25)
        >>> float(found.lower), float(found.upper)
        (-2.75, 3.25)
        >>> print(found.guarantee)
        exact: P(y in set) >= 1 - 2 alpha, if points are exchangeable, and the fit does not look at their order

    References:
        Barber, Candès, Ramdas and Tibshirani (2021), doi:10.1214/20-AOS1965.
    """
    _check_points("predictions", residuals, predictions)
    check_missing(missing, residuals=residuals, predictions=predictions)
    return _plus(residuals, predictions, alpha, Guarantee("exact", "P(y in set) >= 1 - 2 alpha", _ALIKE))


def cv_plus(
    residuals: Float[Array, " n"],
    predictions: Float[Array, "... f"],
    folds: Int[Array, " n"],
    alpha: Real[Array, ""] | float,
    *,
    missing: Missing = "raise",
) -> Interval:
    """CV+: the jackknife+ with one fit for each of a few folds of equal size.

    P(y in interval) >= 1 - 2 alpha - sqrt(2 / n); that of few folds is closer to 1 - 2 alpha.

    Args:
        residuals: |y_i - mu_{-fold(i)}(x_i)|, shape (n,).
        predictions: mu_{-f}(x) of each of F fits for the test points, shape (..., F).
        folds: the fold of each point, in 0, ..., F - 1, shape (n,).
        alpha: the level; half of what may be missed.
        missing: what to do with residuals and predictions that are NaN: "raise", or "drop" to leave them out. Under
            `jit` nobody can look, and they are left out.

    Returns:
        Interval of shape (...).

    Raises:
        ValueError: shapes do not fit, or a residual or prediction is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> folds = jnp.array([0, 0, 1, 1])
        >>> found = conformal.cv_plus(jnp.array([1.0, 2.0, 3.0, 0.5]), jnp.array([0.0, 0.5]), folds, 0.25)
        >>> float(found.lower), float(found.upper)
        (-2.5, 3.5)

    References:
        Barber, Candès, Ramdas and Tibshirani (2021), doi:10.1214/20-AOS1965, theorem 4.
    """
    if folds.shape != residuals.shape:
        raise ValueError(f"folds must have the shape {residuals.shape} of residuals, got {folds.shape}")
    check_missing(missing, residuals=residuals, predictions=predictions)
    statement = "P(y in set) >= 1 - 2 alpha - sqrt(2 / n)"
    guarantee = Guarantee("exact", statement, f"{_ALIKE}; folds of equal size")
    return _plus(residuals, predictions[..., folds], alpha, guarantee)


def jackknife_minmax(
    residuals: Float[Array, " n"],
    predictions: Float[Array, "... n"],
    alpha: Real[Array, ""] | float,
    *,
    missing: Missing = "raise",
) -> Interval:
    """The jackknife-minmax: P(y in interval) >= 1 - alpha, for wider intervals.

    Args:
        residuals: R_i = |y_i - mu_{-i}(x_i)|, shape (n,).
        predictions: mu_{-i}(x) for the test points, shape (..., n).
        alpha: the level.
        missing: what to do with residuals and predictions that are NaN: "raise", or "drop" to leave them out. Under
            `jit` nobody can look, and they are left out.

    Returns:
        Interval of shape (...).

    Raises:
        ValueError: shapes do not fit, or a residual or prediction is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> found = conformal.jackknife_minmax(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 0.5, 0.25]), 0.25)
        >>> float(found.lower), float(found.upper)
        (-3.0, 3.5)

    References:
        Barber, Candès, Ramdas and Tibshirani (2021), doi:10.1214/20-AOS1965.
    """
    _check_points("predictions", residuals, predictions)
    check_missing(missing, residuals=residuals, predictions=predictions)
    reach = conformal_quantile(residuals, alpha, missing="drop")
    lowest = jnp.min(predictions, -1, where=~jnp.isnan(predictions), initial=jnp.inf)
    highest = jnp.max(predictions, -1, where=~jnp.isnan(predictions), initial=-jnp.inf)
    is_all = jnp.isinf(reach)  # of nothing the least prediction is +inf, too
    guarantee = Guarantee("exact", "P(y in set) >= 1 - alpha", _ALIKE)
    return Interval(jnp.where(is_all, -reach, lowest - reach), jnp.where(is_all, reach, highest + reach), guarantee)


def jackknife_after_bootstrap(
    y: Float[Array, " n"],
    fitted: Float[Array, "b n"],
    is_drawn: Bool[Array, "b n"],
    predictions: Float[Array, "... b"],
    alpha: Real[Array, ""] | float,
) -> Interval:
    """The jackknife+ of a bagged fit, from the bootstrap fits that it is made of: no further fit is needed.

    mu_{-i} is the mean of those of the B fits whose sample does not hold point i; a point in all samples is left out.

    Args:
        y: of the points, shape (n,).
        fitted: what each fit says of the points, shape (B, n).
        is_drawn: whether the sample of each fit holds each point, shape (B, n).
        predictions: what each fit says of the test points, shape (..., B).
        alpha: the level; half of what may be missed.

    Returns:
        Interval of shape (...).

    Raises:
        ValueError: shapes do not fit, or a value is NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> y = jax.random.normal(jax.random.key(0), (30,))
        >>> samples = jax.random.randint(jax.random.key(1), (50, 30), 0, 30)       # the fit is a mean
        >>> is_drawn = (samples[:, :, None] == jnp.arange(30)).any(1)
        >>> means = y[samples].mean(1)
        >>> fitted = jnp.broadcast_to(means[:, None], (50, 30))
        >>> found = conformal.jackknife_after_bootstrap(y, fitted, is_drawn, means, 0.1)
        >>> bool(found.contains(0.0)), bool(found.contains(5.0))
        (True, False)

    References:
        Kim, Xu and Barber (2020), https://arxiv.org/abs/2002.09025.
    """
    if not (fitted.shape == is_drawn.shape == (predictions.shape[-1], *y.shape)):
        raise ValueError(
            f"fitted and is_drawn must have shape (B, n), and predictions (..., B), for y of shape {y.shape}; got "
            f"{fitted.shape}, {is_drawn.shape} and {predictions.shape}"
        )
    for name, values in (("y", y), ("fitted", fitted), ("predictions", predictions)):
        errors.check_not_nan(name, values)
    is_out = (~is_drawn).astype(predictions.dtype)
    num_out = jnp.sum(is_out, 0)
    share = jnp.where(num_out > 0, is_out / jnp.maximum(num_out, 1), jnp.nan)
    residuals = jnp.abs(y - jnp.sum(share * fitted, 0))
    statement = "P(y in set) >= 1 - 2 alpha"
    assumes = f"{_ALIKE}; and their number was drawn from a binomial law, as else it holds in the limit of many fits"
    return _plus(
        residuals, jnp.matmul(predictions, share, precision="highest"), alpha, Guarantee("exact", statement, assumes)
    )


def _plus(residuals: Array, predictions: Array, alpha: Real[Array, ""] | float, guarantee: Guarantee) -> Interval:
    lower = -conformal_quantile(residuals - predictions, alpha, missing="drop")
    upper = conformal_quantile(residuals + predictions, alpha, missing="drop")
    return Interval(lower, upper, guarantee)


def _check_points(name: str, residuals: Array, predictions: Array) -> None:
    if predictions.shape[-1:] != residuals.shape:
        raise ValueError(
            f"{name} must have shape (..., n), one for each of the {residuals.shape[0]} residuals, got "
            f"{predictions.shape}"
        )
