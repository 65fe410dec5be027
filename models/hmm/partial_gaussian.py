"""Gaussian rows of which some components are missing: their density, and what the others say of them.

With s the components that are seen and m those that are missing,

    p(y_s) = N(y_s; mean_s, C_ss)
    y_m | y_s ~ N( mean_m + C_ms C_ss^{-1} (y_s - mean_s),  C_mm - C_ms C_ss^{-1} C_sm )

Which they are differs from row to row, but shapes may not: the rows and columns of C that are missing are replaced by
those of the identity, and the residuals there by zero. The Cholesky factor is then that of C_ss with ones between, and
what is missing adds nothing to the density.

References:
    Little and Rubin (2019), Statistical Analysis with Missing Data, doi:10.1002/9781119482260 (EM, section 11.2).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from bayesinf.models.square_root import cholesky, solve_lower

__all__ = ["complete_rows", "draw_missing", "is_partial", "partial_log_prob"]


def is_partial(ys: Float[Array, "t d"]) -> Bool[Array, ""]:
    """Whether a row is missing in part: elsewhere there is no need for a factorisation of every row."""
    is_missing = jnp.isnan(ys)
    return jnp.any(jnp.any(is_missing, 1) & ~jnp.all(is_missing, 1))


def partial_log_prob(
    ys: Float[Array, "t d"], mean: Float[Array, " d"], tril: Float[Array, "d d"]
) -> Float[Array, " t"]:
    """Log p of what is seen of every row; 0 of a row of which nothing is."""
    covariance = tril @ tril.T

    def one(y: Array) -> Array:
        is_seen = ~jnp.isnan(y)
        root = cholesky(_seen(covariance, is_seen))
        z = solve_lower(root, _residual(y, mean))
        log_det = jnp.sum(jnp.log(jnp.diag(root)))
        return -0.5 * (jnp.sum(z**2) + jnp.sum(is_seen) * math.log(2 * math.pi)) - log_det

    return jax.vmap(one)(ys)


def complete_rows(
    ys: Float[Array, "t d"], weights: Float[Array, " t"], mean: Float[Array, " d"], tril: Float[Array, "d d"]
) -> tuple[Float[Array, "t d"], Float[Array, "d d"]]:
    """The rows with the means of what is missing in its place, and the weighted sum of the covariances of that."""
    covariance = tril @ tril.T

    def one(y: Array) -> tuple[Array, Array]:
        return _given_seen(y, mean, covariance)

    rows, covariances = jax.vmap(one)(ys)
    return rows, jnp.einsum("t,tde->de", weights, covariances, precision="highest")


def draw_missing(
    key: Key[Array, ""], ys: Float[Array, "t d"], mean: Float[Array, "t d"], tril: Float[Array, "t d d"]
) -> Float[Array, "t d"]:
    """The rows with what is missing drawn given what is seen; every row has its own mean and Cholesky factor."""

    def one(y: Array, mean: Array, tril: Array, noise: Array) -> Array:
        row, covariance = _given_seen(y, mean, tril @ tril.T)
        is_missing = jnp.isnan(y)
        root = cholesky(_seen(covariance, is_missing))
        return jnp.where(is_missing, row + root @ noise, row)

    return jax.vmap(one)(ys, mean, tril, jax.random.normal(key, ys.shape, mean.dtype))


def _given_seen(y: Array, mean: Array, covariance: Array) -> tuple[Array, Array]:
    """The row with the means of what is missing, and the covariance of that: zero where one of the two is seen."""
    is_seen = ~jnp.isnan(y)
    root = cholesky(_seen(covariance, is_seen))
    across = jnp.where(is_seen, covariance, 0.0)  # C with the columns of what is seen
    gain = solve_lower(root, solve_lower(root, across.T), trans=True).T
    row = jnp.where(is_seen, jnp.where(is_seen, y, 0.0), mean + gain @ _residual(y, mean))
    is_both_missing = ~is_seen[:, None] & ~is_seen
    return row, jnp.where(is_both_missing, covariance - gain @ across.T, 0.0)


def _seen(covariance: Array, is_seen: Array) -> Array:
    return jnp.where(is_seen[:, None] & is_seen, covariance, jnp.eye(len(covariance), dtype=covariance.dtype))


def _residual(y: Array, mean: Array) -> Array:
    is_seen = ~jnp.isnan(y)
    return jnp.where(is_seen, jnp.where(is_seen, y, 0.0) - mean, 0.0)
