"""Covariances as triangular factors, and Gaussian conditioning on them without ever squaring.

A covariance is L L^T with L lower triangular and of non-negative diagonal. Forming L L^T would halve the digits; every
operation here is one QR decomposition instead, so covariances stay positive in float32 over any number of steps.

References:
    Kailath, Sayed and Hassibi (2000), Linear Estimation, chapter 12.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

__all__ = ["Conditional", "condition", "drop_missing", "gaussian_log_prob", "triangularize", "update"]


class Conditional(NamedTuple):
    """What `condition` gives: Cov(z) and the law x | z ~ N(m + gain (z - E z), tril tril^T)."""

    marginal_tril: Float[Array, "k k"]
    gain: Float[Array, "d k"]
    tril: Float[Array, "d d"]


def triangularize(matrix: Float[Array, "n m"]) -> Float[Array, "n n"]:
    """The lower triangular L with L L^T = M M^T and a non-negative diagonal, for M with m >= n."""
    upper = jnp.linalg.qr(matrix.T, mode="r")
    return jnp.where(jnp.diagonal(upper)[:, None] < 0, -upper, upper).T


def condition(tril: Float[Array, "d d"], matrix: Float[Array, "k d"], noise_tril: Float[Array, "k k"]) -> Conditional:
    """Conditions x ~ N(m, tril tril^T) on z = matrix x + noise, noise ~ N(0, noise_tril noise_tril^T)."""
    k = matrix.shape[0]
    zeros = jnp.zeros((tril.shape[0], k), tril.dtype)
    joint = triangularize(jnp.block([[matrix @ tril, noise_tril], [tril, zeros]]))
    marginal_tril = joint[:k, :k]
    gain = solve_triangular(marginal_tril, joint[k:, :k].T, lower=True, trans=1).T
    return Conditional(marginal_tril, gain, joint[k:, k:])


def drop_missing(
    is_missing: Bool[Array, " k"], matrix: Float[Array, "k d"], noise_tril: Float[Array, "k k"]
) -> tuple[Float[Array, "k d"], Float[Array, "k k"]]:
    """An observation z = matrix x + noise whose missing components are replaced by independent standard normals.

    Set to zero in the data, these components leave the law of x as it is and add -log(2 pi) / 2 each to the density,
    which `gaussian_log_prob` leaves out.
    """
    keep = jnp.where(is_missing, 0.0, 1.0).astype(noise_tril.dtype)[:, None]
    noise = triangularize(jnp.concatenate([keep * noise_tril, jnp.diag(1.0 - keep[:, 0])], axis=1))
    return keep * matrix, noise


def gaussian_log_prob(
    residual: Float[Array, " k"], tril: Float[Array, "k k"], is_missing: Bool[Array, " k"] | None = None
) -> Float[Array, ""]:
    """Log N(residual; 0, tril tril^T); components dropped by `drop_missing` have residual 0 and do not count."""
    whitened = solve_triangular(tril, residual, lower=True)
    num = residual.shape[0] if is_missing is None else jnp.sum(~is_missing)
    log_scale = jnp.sum(jnp.log(jnp.diagonal(tril)))
    return -0.5 * jnp.sum(whitened**2) - log_scale - 0.5 * num * math.log(2 * math.pi)


def update(
    mean: Float[Array, " d"],
    tril: Float[Array, "d d"],
    matrix: Float[Array, "k d"],
    offset: Float[Array, "..."],
    noise_tril: Float[Array, "k k"],
    y: Float[Array, " k"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, ""]]:
    """Mean and factor of x | y for x ~ N(mean, tril tril^T), y = matrix x + offset + noise, and log p(y).

    Components of y that are NaN are missing.
    """
    is_missing = jnp.isnan(y)
    matrix_kept, noise_kept = drop_missing(is_missing, matrix, noise_tril)
    marginal_tril, gain, tril = condition(tril, matrix_kept, noise_kept)
    # zeros stand in for missing data before they meet anything: gradients stay finite
    residual = jnp.where(is_missing, 0.0, jnp.where(is_missing, 0.0, y) - (matrix @ mean + offset))
    return mean + gain @ residual, tril, gaussian_log_prob(residual, marginal_tril, is_missing)
