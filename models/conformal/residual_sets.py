"""Intervals between two residuals of the past, the narrowest of a few, and what series are covered by.

Of m past residuals in order, R_(0) = -inf < R_(1) <= ... <= R_(m) < R_(m+1) = +inf, any two k places apart hold the
next one with the same probability, if the m + 1 are exchangeable and never tied:

    P( R_(a) <= e <= R_(a+k) ) = k / (m + 1) >= 1 - alpha,      k = ceil((m + 1)(1 - alpha)),  a = 0, ..., m + 1 - k

so that a may be chosen for the width, as where the law is skewed. A choice by the same residuals costs coverage: of
Gaussian errors at alpha = 0.1 five intervals to choose from leave .887 with m = 100 and .895 with m = 300 (simulated,
standard error .0015). Here beta = a / (m + 1) is one of J values evenly inside (0, alpha); J = 1, the middle, is no
choice, and keeps the equality.

Weighted residuals count as their effective number, m = (sum w)^2 / sum w^2, and the same holds of masses in place of
counts; with equal weights the two agree.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.quantiles import conformal_rank

__all__ = ["SeriesSets", "narrowest", "narrowest_weighted"]

SLACK = 1e-5  # of sums of masses in single precision, relative to the level


class SeriesSets(eqx.Module):
    """Intervals for the steps of a series, each made of what was known before.

    Attributes:
        lower, upper: their ends; infinite where there were too few residuals.
        centre: what was predicted; the ends less the centre are residuals.
        residuals: of the test steps, y_t less the centre; NaN where y_t is missing.
        guarantee: what is promised.
    """

    lower: Float[Array, " t"]
    upper: Float[Array, " t"]
    centre: Float[Array, " t"]
    residuals: Float[Array, " t"]
    guarantee: Guarantee = eqx.field(static=True)

    def contains(self, y: Real[ArrayLike, "..."]) -> Bool[Array, "..."]:
        """Whether y is in the interval of its time."""
        y = jnp.asarray(y)
        return (y >= self.lower) & (y <= self.upper)

    @property
    def coverage(self) -> Float[Array, ""]:
        """The share of observed steps that were in their intervals."""
        is_in = (self.residuals >= self.lower - self.centre) & (self.residuals <= self.upper - self.centre)
        return jnp.sum(is_in) / jnp.sum(~jnp.isnan(self.residuals))

    @property
    def width(self) -> Float[Array, " t"]:
        """The lengths of the intervals."""
        return self.upper - self.lower


def narrowest(
    ordered: Float[Array, " w"], num: Int[ArrayLike, ""], alpha: Real[ArrayLike, ""], num_betas: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The narrowest of J intervals between residuals that are k places apart.

    Args:
        ordered: residuals, ascending; what follows the first `num` is not looked at.
        num: how many there are, m.
        alpha: the level.
        num_betas: J.

    Returns:
        (lower, upper); with too few residuals one of them is infinite, or both.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> residuals = jnp.array([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
        >>> [[round(float(end), 1) for end in conformal.narrowest(residuals, 7, 0.5, J)] for J in (1, 3)]
        [[0.1, 1.6], [0.0, 0.8]]
    """
    k = conformal_rank(jnp.asarray(num, jnp.int32), alpha)
    room = num + 1 - k
    lowest = room * jnp.arange(1, num_betas + 1) // (num_betas + 1)
    padded = jnp.concatenate([jnp.full(1, -jnp.inf, ordered.dtype), ordered, jnp.full(1, jnp.inf, ordered.dtype)])
    lower = padded[lowest]
    upper = jnp.where(lowest + k > num, jnp.inf, padded[lowest + k])
    best = jnp.argmin(upper - lower)
    return lower[best], upper[best]


def narrowest_weighted(
    ordered: Float[Array, " w"], weights: Float[Array, " w"], alpha: Real[ArrayLike, ""], num_betas: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The narrowest of J intervals between weighted residuals.

    Args:
        ordered: residuals, ascending; NaN last.
        weights: not negative; those of zero are not there.
        alpha: the level.
        num_betas: J.

    Returns:
        (lower, upper); with too few residuals of weight one of them is infinite, or both.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> residuals = jnp.array([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 9.9])
        >>> weights = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
        >>> [[round(float(end), 1) for end in conformal.narrowest_weighted(residuals, weights, 0.5, J)] for J in (1, 3)]
        [[0.1, 1.6], [0.0, 0.8]]
    """
    alpha = jnp.asarray(alpha, ordered.dtype)
    w = weights / jnp.maximum(jnp.max(weights), jnp.finfo(ordered.dtype).tiny)
    total = jnp.sum(w)
    num = total**2 / jnp.maximum(jnp.sum(w**2), 1.0)  # the largest is 1; 0 where there is none
    own = 1.0 / (num + 1.0)  # of the next residual itself, which may lie beyond all
    mass = jnp.cumsum(w) / jnp.maximum(total, 1.0) * (1.0 - own)
    below = jnp.concatenate([jnp.zeros(1, mass.dtype), mass[:-1]]) + own
    betas = alpha * jnp.arange(1, num_betas + 1) / (num_betas + 1)
    a = jnp.searchsorted(below, betas * (1.0 + SLACK), side="right")  # how many may be cut off below
    cut = jnp.where(a > 0, below[jnp.maximum(a - 1, 0)], 0.0)
    b = jnp.searchsorted(mass, 1.0 - alpha * (1.0 + SLACK) + cut, side="left")
    padded = jnp.concatenate([jnp.full(1, -jnp.inf, ordered.dtype), ordered])
    is_within = (b < ordered.shape[0]) & (total > 0)
    lower = jnp.where(total > 0, padded[a], -jnp.inf)
    upper = jnp.where(is_within, ordered[jnp.minimum(b, ordered.shape[0] - 1)], jnp.inf)
    best = jnp.argmin(upper - lower)
    return lower[best], upper[best]
