"""SPCI: intervals for a series whose errors depend on their past.

    C_t = f(x_t) + [ q(beta), q(1 - alpha + beta) ],    q(.) quantiles of r_t given r_{t-h}, r_{t-h-1}, ...

of residuals r_t = y_t - f(x_t) by leave-one-out fits, and beta of a few values the one that makes C_t narrowest.
Residuals that a model leaves are seldom independent: quantiles given their past are narrower than those of EnbPI where
it tells something, and hold at each time rather than on average alone. Coverage is 1 - alpha in the limit only. Where
there is doubt, feed the outcomes to `run_online`, which needs no assumption.

References:
    Xu and Xie (2023), https://arxiv.org/abs/2212.03463.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.conformal.conditional_quantiles import ConditionalQuantiles, KernelQuantiles
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.residual_sets import SeriesSets

__all__ = ["spci"]

ASYMPTOTIC = Guarantee(
    "asymptotic",
    "P(y_t in set | past) -> 1 - alpha",
    "residuals are stationary and mixing, and the quantiles consistent",
)


def spci(
    residuals: Float[Array, " t"],
    num_calibration: int,
    alpha: Real[ArrayLike, ""],
    *,
    quantile: ConditionalQuantiles | None = None,
    num_betas: int = 5,
    horizon: int = 1,
    centre: Float[Array, " m"] | None = None,
) -> SeriesSets:
    """Sequential predictive conformal inference on a series of residuals.

    Args:
        residuals: of T steps in order, shape (T,); NaN is missing. The first of them are by leave-one-out fits, as
            `bootstrap_ensemble(...).residuals`, the others by what those fits say of the test steps.
        num_calibration: how many were known beforehand; intervals are for the others.
        alpha: the level.
        quantile: `KernelQuantiles()` unless given, or a `QuantileForest`. Each time uses all residuals before it.
        num_betas: of how many intervals the narrowest is taken; 1 for the middle one.
        horizon: how many steps ahead: the set at t uses residuals up to t - horizon.
        centre: f(x) of the test steps, added to the ends; 0 unless given.

    Returns:
        SeriesSets, for T - num_calibration steps.

    Raises:
        ValueError: alpha is not in (0, 1), or counts do not fit the series.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> noise = jax.random.normal(jax.random.key(0), (1_000,))
        >>> residuals = jax.lax.scan(lambda r, e: (0.9 * r + e, 0.9 * r + e), 0.0, noise)[1]
        >>> found = conformal.spci(residuals, 700, 0.1)
        >>> marginal = 3.29 / jnp.sqrt(1 - 0.9**2)
        >>> bool(found.width.mean() < 0.7 * marginal), bool(abs(found.coverage - 0.9) < 0.05)
        (True, True)

    References:
        Xu and Xie (2023), https://arxiv.org/abs/2212.03463.
    """
    errors.check_fraction("alpha", alpha)
    num_betas, horizon = errors.check_count("num_betas", num_betas), errors.check_count("horizon", horizon)
    num_calibration = errors.check_count("num_calibration", num_calibration)
    if residuals.ndim != 1 or not 2 * horizon + 2 <= num_calibration < residuals.shape[0]:
        raise ValueError(
            f"num_calibration must be at least 2 horizon + 2 = {2 * horizon + 2} and leave steps of the series, got "
            f"{num_calibration} for residuals of shape {residuals.shape}"
        )
    quantile = KernelQuantiles() if quantile is None else quantile
    lower, upper = quantile.bounds(residuals, num_calibration, alpha, num_betas=num_betas, horizon=horizon)
    test = residuals[num_calibration:]
    centre = jnp.zeros_like(test) if centre is None else centre
    return SeriesSets(centre + lower, centre + upper, centre, test, ASYMPTOTIC)
