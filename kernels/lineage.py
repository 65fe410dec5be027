"""The variance of an evidence estimate from the one run that made it.

    V = 1 - (M / (M - 1))^{r + 1} sum_{e(i) != e(j)} W_i W_j

with W the normalised weights of M particles, e(i) the ancestor of particle i in the first population, and r the number
of resamplings so far. Particles of different ancestors are independent but for the resampling: what their products lose
against 1 is variance. For multinomial resampling

    E[Zhat^2 V] = var(Zhat)     exactly, for every M >= 2 (Theorem 1 of Lee and Whiteley),

so that V estimates var(Zhat) / Z^2 and, to first order, the variance of log Zhat; it is consistent for adaptive
tempering too (Du and Guyader). Other schemes have another variance, which this does not estimate: there V is NaN.

V tends to 1, and says nothing, once all particles have one ancestor: M should be some tens of times r.

References:
    Lee and Whiteley (2018), doi:10.1093/biomet/asy028.
    Du and Guyader (2021), doi:10.1214/20-AAP1611 (adaptive tempering).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Lineage", "descend", "found", "relative_variance"]


class Lineage(NamedTuple):
    """Where the particles come from.

    Attributes:
        eves: the ancestor of each in the first population.
        log_correction: (r + 1) log(M / (M - 1)).
    """

    eves: Int[Array, " m"]
    log_correction: Float[Array, ""]


def found(num: int, dtype: jnp.dtype) -> Lineage:
    """The lineage of `num` independent particles."""
    return Lineage(jnp.arange(num, dtype=jnp.int32), jnp.asarray(_log_correction(num), dtype))


def descend(lineage: Lineage, parents: Int[Array, " m"], scheme: str) -> Lineage:
    """The lineage after a resampling by the scheme, with the given parents."""
    log_correction = _log_correction(lineage.eves.shape[0]) if scheme == "multinomial" else jnp.nan
    return Lineage(lineage.eves[parents], lineage.log_correction + log_correction)


def relative_variance(lineage: Lineage, log_weights: Float[Array, " m"]) -> Float[Array, ""]:
    """V for particles of normalised log weights; may be negative where it is lost in its own noise."""
    of_eve = jnp.zeros_like(log_weights).at[lineage.eves].add(jnp.exp(log_weights))
    same = jnp.minimum(jnp.sum(of_eve**2), 1.0)
    # 1 - exp(log_correction) (1 - same), without the difference of nearly equal numbers
    return same - jnp.expm1(lineage.log_correction) * (1.0 - same)


def _log_correction(num: int) -> Float[Array, ""]:
    return -jnp.log1p(-1.0 / num)
