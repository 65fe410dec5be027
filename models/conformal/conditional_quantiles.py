"""Quantiles of what comes next given the recent past, by residuals that followed a similar past.

At the time u = t - h, where h is the horizon, the past r_u, r_{u-1}, ... is compared with that of every v <= u - h,
which was followed by r_{v+h}:

    D(u, v) = sum_{j >= 0} rho^j (r_{u-j} - r_{v-j})^2 = (r_u - r_v)^2 + rho D(u - 1, v - 1)
    w(v) = exp( -D(u, v) / (2 b^2) ),    b^2 = D(u, v') / 4, v' the ceil(c u)-th nearest: a share c lies within 2 b

and the set is an interval between the residuals r_{v+h} so weighted. The recursion makes lags of any number cost O(T)
a step: rho says how long the past is. The share c and rho are those with the least pinball loss over the later half of
the calibration residuals; c = inf, equal weights, is among them, so that where the past tells nothing the intervals are
those of EnbPI with all residuals kept.

References:
    Nadaraya (1964), doi:10.1137/1109020.
    Xu and Xie (2023), https://arxiv.org/abs/2212.03463 (conditional quantiles of residuals).
"""

import abc
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.conformal.residual_sets import narrowest_weighted

__all__ = ["ConditionalQuantiles", "KernelQuantiles", "kernel_quantile"]


class ConditionalQuantiles(eqx.Module):
    """An estimator of conditional quantiles, for `spci`."""

    @abc.abstractmethod
    def bounds(
        self,
        residuals: Float[Array, " t"],
        num_calibration: int,
        alpha: Real[ArrayLike, ""],
        *,
        num_betas: int,
        horizon: int,
    ) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        """Ends of intervals for residuals from `num_calibration` on, each from those `horizon` steps before or more."""


class KernelQuantiles(ConditionalQuantiles):
    """Quantiles of residuals weighted by how similar their past was, also by the name of `kernel_quantile`.

    Attributes:
        shares: c, of the residuals within two bandwidths, in (0, 1), or inf for equal weights; shape (s,).
        decays: rho, how fast the weight of older lags falls, in [0, 1); 0 looks at the last residual alone; shape (r,).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> noise = jax.random.normal(jax.random.key(0), (600,))
        >>> residuals = jax.lax.scan(lambda r, e: (0.9 * r + e, 0.9 * r + e), 0.0, noise)[1]
        >>> quantile = conformal.KernelQuantiles()
        >>> lower, upper = quantile.bounds(residuals, 500, 0.1, num_betas=1, horizon=1)
        >>> bool((upper - lower).mean() < 0.8 * 3.29 / jnp.sqrt(1 - 0.9**2))           # of the marginal law
        True
    """

    shares: Float[Array, " s"] = eqx.field(converter=jnp.asarray, default=(0.03, 0.06, 0.12, 0.25, 0.5, float("inf")))
    decays: Float[Array, " r"] = eqx.field(converter=jnp.asarray, default=(0.0, 0.4, 0.8, 0.95))

    def __check_init__(self):
        for name in ("shares", "decays"):
            values = getattr(self, name)
            if values.ndim != 1 or values.shape[0] == 0:
                raise ValueError(f"{name} must have shape (n,) with n >= 1, got {values.shape}")
        if not errors.is_concrete((self.shares, self.decays)):
            return
        if not jnp.all((self.shares > 0) & ((self.shares < 1) | jnp.isinf(self.shares))):
            raise ValueError(f"shares must lie in (0, 1), or be inf, got {self.shares}")
        if not jnp.all((self.decays >= 0) & (self.decays < 1)):
            raise ValueError(f"decays must lie in [0, 1), got {self.decays}")

    def bounds(
        self,
        residuals: Float[Array, " t"],
        num_calibration: int,
        alpha: Real[ArrayLike, ""],
        *,
        num_betas: int,
        horizon: int,
    ) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        share, decay = self.choose(residuals[:num_calibration], alpha, horizon=horizon)
        lower, upper = _sweep(residuals, share[None], decay, alpha, num_calibration, num_betas, horizon)
        return lower[:, 0], upper[:, 0]

    def choose(
        self, residuals: Float[Array, " n"], alpha: Real[ArrayLike, ""], *, horizon: int = 1
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share and the decay with the least pinball loss of both ends over the later half of the residuals.

        Args:
            residuals: of calibration, in order.
            alpha: the level.
            horizon: how many steps ahead.

        Returns:
            (share, decay).
        """
        start = residuals.shape[0] // 2
        truth = residuals[start:, None]

        def loss(decay: Array) -> Array:
            lower, upper = _sweep(residuals, self.shares, decay, alpha, start, 1, horizon)
            level = jnp.asarray(alpha, residuals.dtype) / 2
            below = jnp.where(truth < lower, lower - truth, 0.0)
            above = jnp.where(truth > upper, truth - upper, 0.0)
            each = level * (upper - lower) + below + above  # the two pinball losses, less what no choice changes
            return jnp.nansum(each, 0)

        losses = jax.lax.map(loss, self.decays)
        best = jnp.unravel_index(jnp.argmin(losses), losses.shape)
        return self.shares[best[1]], self.decays[best[0]]


kernel_quantile = KernelQuantiles


@partial(jax.jit, static_argnums=(4, 5, 6))
def _sweep(
    residuals: Array, shares: Array, decay: Array, alpha: ArrayLike, start: int, num_betas: int, horizon: int
) -> tuple[Array, Array]:
    """The ends for each time from `start` on and each share, shape (T - start, shares)."""
    num = residuals.shape[0]
    place = jnp.arange(num)
    spread = 2.0 * jnp.nanvar(residuals[:start])  # what two values that are not known differ by
    followed = jnp.concatenate([residuals[horizon:], jnp.full(horizon, jnp.nan, residuals.dtype)])
    order = jnp.argsort(followed)

    def compare(distances: Array, u: Array) -> Array:
        difference = (residuals[u] - residuals) ** 2
        shifted = jnp.concatenate([jnp.full(1, spread / (1.0 - decay), residuals.dtype), distances[:-1]])
        return jnp.where(jnp.isnan(difference), spread, difference) + decay * shifted

    def step(distances: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
        u = t - horizon
        distances = compare(distances, u)
        is_known = _is_past(place, u, horizon) & ~jnp.isnan(followed)
        num_known = jnp.sum(is_known)
        nearest = jnp.sort(jnp.where(is_known, distances, jnp.inf))

        def ends(share: Array) -> tuple[Array, Array]:
            rank = jnp.clip(jnp.ceil(jnp.where(jnp.isinf(share), 1.0, share) * num_known), 1, num).astype(jnp.int32)
            width = jnp.maximum(nearest[rank - 1] / 4.0, jnp.finfo(residuals.dtype).tiny)
            w = jnp.exp(-0.5 * jnp.where(is_known, distances, 0.0) / width)
            w = jnp.where(is_known, jnp.where(jnp.isinf(share), 1.0, w), 0.0)
            return narrowest_weighted(followed[order], w[order], alpha, num_betas)

        return distances, jax.vmap(ends)(shares)

    before = jnp.full(num, spread / (1.0 - decay), residuals.dtype)
    before = jax.lax.fori_loop(0, start - horizon, lambda u, distances: compare(distances, u), before)
    return jax.lax.scan(step, before, jnp.arange(start, num))[1]


def _is_past(place: Array, u: Array, horizon: int) -> Array:
    """Whether what followed each place is known at time u."""
    return place + horizon <= u
