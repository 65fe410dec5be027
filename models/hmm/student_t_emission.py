"""Student-t emissions: heavy tails.

    y_t | x_t = k ~ loc_k + scale_k t(df_k);    u_{tk} = (df + 1) / (df + z_{tk}^2),    z = (y - loc) / scale

A t law is Gaussian given a precision u that is Gamma; one M-step takes its expectation u, then loc and scale as for
weighted Gaussians, then one step of Newton's method for log df on the t density itself, taken if it raises it.

References:
    Liu and Rubin (1995), ML estimation of the t distribution using EM and its extensions, Statistica Sinica 5.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, ratio, spread_rows

__all__ = ["StudentT"]


class StudentT(Emission):
    """Student-t emissions.

    Attributes:
        df: degrees of freedom, shape (K,), > 0.
        loc: shape (K,).
        scale: shape (K,), > 0.
        is_df_fixed: whether EM leaves `df` as it is.

    Raises:
        ValueError: df or scale is not positive, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.StudentT(df=jnp.array([1.0, 1.0]), loc=jnp.array([0.0, 1.0]), scale=jnp.array([1.0, 1.0]))
        >>> jnp.round(jnp.pi * jnp.exp(emission.log_prob(jnp.array([1.0]))), 3).tolist()
        [[0.5, 1.0]]
    """

    df: Float[Array, " k"] = eqx.field(converter=errors.as_array("df", is_floating=True))
    loc: Float[Array, " k"] = eqx.field(converter=errors.as_array("loc", is_floating=True))
    scale: Float[Array, " k"] = eqx.field(converter=errors.as_array("scale", is_floating=True))
    is_df_fixed: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        errors.check_positive("df", self.df)
        errors.check_positive("scale", self.scale)
        if not self.df.shape == self.loc.shape == self.scale.shape or self.loc.ndim != 1:
            raise ValueError(
                f"df, loc and scale must all have shape (K,), got {self.df.shape}, {self.loc.shape} and "
                f"{self.scale.shape}"
            )

    @property
    def num_states(self) -> int:
        return self.loc.shape[0]

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return dist.StudentT(self.df, self.loc, self.scale)

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "StudentT":
        y, df = ys[:, None], self.df
        counts = jnp.sum(weights, axis=0)
        precision = weights * (df + 1.0) / (df + ((y - self.loc) / self.scale) ** 2)
        loc = ratio(jnp.sum(precision * y, axis=0), jnp.sum(precision, axis=0), self.loc)
        pooled = ratio(jnp.sum(weights * (y - jnp.mean(y)) ** 2), jnp.sum(weights), jnp.ones(()))
        variance = ratio(jnp.sum(precision * (y - loc) ** 2, axis=0), counts, self.scale**2) + 1e-9 * pooled
        moved = dataclasses.replace(self, loc=loc, scale=jnp.sqrt(variance))
        return moved if self.is_df_fixed else moved._with_better_df(ys, weights)

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "StudentT":
        # ranks, as the largest values of heavy tails would be taken for states
        order = jnp.argsort(jnp.argsort(jnp.where(is_seen, ys, jnp.inf)))
        loc = ys[spread_rows(key, order[:, None] / len(ys), is_seen, self.num_states)]
        seen = jnp.where(is_seen, ys, jnp.nan)
        spread = jnp.nanpercentile(seen, 75) - jnp.nanpercentile(seen, 25)
        scale = jnp.broadcast_to(jnp.where(spread > 0, spread / 1.35, 1.0), loc.shape)
        return dataclasses.replace(self, loc=loc, scale=scale)

    def _with_better_df(self, ys: Array, weights: Array) -> "StudentT":
        squares = ((ys[:, None] - self.loc) / self.scale) ** 2

        def total(log_df: Array) -> Array:
            df = jnp.exp(log_df)
            terms = -0.5 * (df + 1.0) * jnp.log1p(squares / df)
            log_norm = gammaln(0.5 * (df + 1.0)) - gammaln(0.5 * df) - 0.5 * jnp.log(df * math.pi)
            return jnp.sum(weights * (terms + log_norm), axis=0)

        log_df, ones = jnp.log(self.df), jnp.ones_like(self.df)
        slope, curvature = jax.jvp(lambda x: jax.jvp(total, (x,), (ones,))[1], (log_df,), (ones,))
        # where it is not concave, uphill; at most by a factor e, and no further than 1000, where it is Gaussian
        step = jnp.where(curvature < 0, -slope / jnp.where(curvature < 0, curvature, 1.0), jnp.sign(slope))
        proposed = jnp.clip(log_df + jnp.clip(step, -1.0, 1.0), math.log(0.1), math.log(1e3))
        is_better = total(proposed) > total(log_df)
        return dataclasses.replace(self, df=jnp.where(is_better, jnp.exp(proposed), self.df))
