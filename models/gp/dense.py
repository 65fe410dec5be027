"""Exact Gaussian processes by one Cholesky decomposition: O(n^3) time, O(n^2) memory.

    log N(r; 0, S) = -|L^{-1} r|^2 / 2 - sum_i log L_ii - n log(2 pi) / 2,    S = K + diag(noise) = L L^T
    f* | y ~ N(K* S^{-1} r, K** - K* S^{-1} K*^T)

The derivative of the density is written out, d log N = tr(G dS) with G = (a a^T - S^{-1}) / 2, a = S^{-1} r, which is
cheaper than that of the decomposition. A matrix that is not positive definite has log density -inf and gradient zero.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, algorithm 2.1 and equation 5.9.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from bayesinf.models.gp.covariances import diagonal, gram
from bayesinf.models.gp.solver import Factor, Solver, check_jitter, raise_noise
from bayesinf.models.kernel_algebra import Combinable

__all__ = ["Dense", "DenseFactor", "cholesky_or_identity", "dense", "log_density", "solve"]


def dense(jitter: float | None = None) -> "Dense":
    """The exact solver, for up to some thousands of points.

    Args:
        jitter: the least variance of the noise, relative to the mean prior variance; sqrt(eps) if None.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> process = gp.GP(gp.RBF(), jnp.arange(3.0), noise=0.1, solver=gp.dense(jitter=0.0))
        >>> round(float(process.log_prob(jnp.zeros(3))), 4)
        -2.5023
    """
    return Dense(jitter)


class Dense(Solver):
    """What `dense` returns."""

    jitter: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_jitter(self.jitter)

    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> "DenseFactor":
        K = gram(kernel, X)
        # ours tell negative variances of parts, which the sum may hide
        variances = diagonal(kernel, X) if isinstance(kernel, Combinable) else jnp.diagonal(K, axis1=-2, axis2=-1)
        noise, log_valid = raise_noise(variances, noise, self.jitter)
        covariance = K + jnp.eye(K.shape[-1], dtype=K.dtype) * noise[..., None, :]
        tril, log_ok = cholesky_or_identity(covariance)
        return DenseFactor(covariance, tril, log_ok + log_valid)


class DenseFactor(Factor):
    """A covariance with its Cholesky factor.

    Attributes:
        covariance: S, shape (..., n, n).
        tril: L, or the identity where S is not positive definite.
        log_ok: 0, or -inf where it is not.
    """

    covariance: Float[Array, "... n n"]
    tril: Float[Array, "... n n"]
    log_ok: Float[Array, "..."]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.log_ok.shape

    @property
    def dtype(self) -> Any:
        return self.tril.dtype

    @property
    def num_normals(self) -> int:
        return self.tril.shape[-1]

    def log_prob(self, columns: Float[Array, "... n s"]) -> Float[Array, "... s"]:
        value = log_density(self.covariance, self.tril, columns)
        return jnp.where(jnp.isneginf(self.log_ok)[..., None], -jnp.inf, value)

    def sqrt_matvec(self, columns: Float[Array, "... n s"]) -> Float[Array, "... n s"]:
        return self.tril @ columns

    def whiten(self, columns: Float[Array, "... n s"]) -> Float[Array, "... n s"]:
        return solve(self.tril, columns)

    def innovations(self, columns: Float[Array, "... n s"]) -> tuple[Float[Array, "... n s"], Float[Array, "... n s"]]:
        log_scales = jnp.log(jnp.diagonal(self.tril, axis1=-2, axis2=-1))[..., None]
        # no scale is right where there is no factor: the density is then 0
        log_scales = jnp.where(jnp.isneginf(self.log_ok)[..., None, None], jnp.inf, log_scales)
        whitened = self.whiten(columns)
        return whitened, jnp.broadcast_to(log_scales, whitened.shape)

    def predict(self, columns: Any, kernel: Any, X: Any, Xs: Any, full_cov: bool) -> tuple[Array, Array]:
        whitened = solve(self.tril, columns)
        cross = solve(self.tril, gram(kernel, X, Xs))
        mean = cross.mT @ whitened
        if full_cov:
            return mean, gram(kernel, Xs) - cross.mT @ cross
        return mean, diagonal(kernel, Xs) - jnp.sum(cross**2, axis=-2)


@jax.custom_jvp
def cholesky_or_identity(matrix: Float[Array, "... n n"]) -> tuple[Array, Array]:
    """The Cholesky factor and 0; or the identity and -inf where there is none, with derivative zero."""
    tril = jnp.linalg.cholesky(matrix)
    is_ok = jnp.all(jnp.isfinite(tril), axis=(-2, -1))
    safe = jnp.where(is_ok[..., None, None], tril, jnp.eye(matrix.shape[-1], dtype=matrix.dtype))
    return safe, jnp.where(is_ok, 0.0, -jnp.inf).astype(matrix.dtype)


@cholesky_or_identity.defjvp
def _cholesky_jvp(primals, tangents):
    tril, log_ok = cholesky_or_identity(*primals)
    change = jnp.where(jnp.isneginf(log_ok)[..., None, None], 0.0, tangents[0])
    middle = solve(tril, solve(tril, 0.5 * (change + change.mT)).mT)
    lower = jnp.tril(middle) - 0.5 * jnp.eye(tril.shape[-1], dtype=tril.dtype) * middle
    return (tril, log_ok), (tril @ lower, jnp.zeros_like(log_ok))


@jax.custom_jvp
def log_density(
    covariance: Float[Array, "... n n"], tril: Float[Array, "... n n"], columns: Float[Array, "... n s"]
) -> Float[Array, "... s"]:
    """Log N(r; 0, S) for every column r, given both S and its factor; derivatives go through S alone."""
    whitened = solve(tril, columns)
    log_scale = jnp.sum(jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)), axis=-1)
    constant = 0.5 * tril.shape[-1] * math.log(2 * math.pi)
    return -0.5 * jnp.sum(whitened**2, axis=-2) - log_scale[..., None] - constant


@log_density.defjvp
def _log_density_jvp(primals, tangents):
    (covariance, tril, columns), (change, _, moves) = primals, tangents
    value = log_density(covariance, tril, columns)
    inverse_tril = solve(tril, jnp.broadcast_to(jnp.eye(tril.shape[-1], dtype=tril.dtype), tril.shape))
    # on CPUs a triangular solve takes a quarter of the time of the product with the transpose
    inverse = solve_triangular(tril, inverse_tril, lower=True, trans=1)
    solved = inverse_tril.mT @ (inverse_tril @ columns)
    quadratic = jnp.sum(solved * (change @ solved), axis=-2)
    trace = jnp.sum(inverse * change, axis=(-2, -1))
    return value, 0.5 * (quadratic - trace[..., None]) - jnp.sum(solved * moves, axis=-2)


def solve(tril: Array, columns: Array) -> Array:
    """L^{-1} of columns, in batches that broadcast."""
    batch = jnp.broadcast_shapes(tril.shape[:-2], columns.shape[:-2])
    tril = jnp.broadcast_to(tril, (*batch, *tril.shape[-2:]))
    return solve_triangular(tril, jnp.broadcast_to(columns, (*batch, *columns.shape[-2:])), lower=True)
