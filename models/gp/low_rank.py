"""Gaussian processes of low rank, K ~ F F^T with F of k columns: O(n k^2) time.

    S = F F^T + D,   A = D^{-1/2} F,   B = I + A^T A = L L^T,   c = L^{-1} A^T D^{-1/2} r
    log N(r; 0, S) = -(n log(2 pi) + log|D| + |D^{-1/2} r|^2 - |c|^2) / 2 - sum log L_ii

`sgpr`, inducing points Z: F = K_xz L_zz^{-T}, and log p(y) is bounded from below by log N(r; 0, S) less
tr(D^{-1} (K - F F^T)) / 2. The bound is what `log_prob` is, and what may be maximised in Z.

`hsgp`, eigenfunctions of the Laplacian on a box: F = Phi diag(s)^{1/2}, s the spectral density of a stationary kernel
at the eigenvalues; by `numpyro.contrib.hsgp`.

References:
    Titsias (2009), Proceedings of AISTATS 5, 567-574 (the bound).
    Solin and Särkkä (2020), doi:10.1007/s11222-019-09886-w (the eigenfunctions).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from bayesinf import errors
from bayesinf.models.gp.covariances import RBF, Constant, Matern12, Matern32, Matern52, Product, diagonal, gram
from bayesinf.models.gp.dense import cholesky_or_identity, solve
from bayesinf.models.gp.solver import Factor, Solver, add_jitter, check_jitter, raise_noise

__all__ = ["HSGP", "SGPR", "LowRankFactor", "hsgp", "sgpr"]


def sgpr(Z: ArrayLike, *, jitter: float | None = None) -> "SGPR":
    """Inducing points; `log_prob` is Titsias' lower bound on the log evidence, not the log evidence.

    Args:
        Z: inducing inputs, (k,) or (k, d); a leaf, which may be differentiated.
        jitter: as of `dense`, for the noise and for k(Z, Z).

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> X = jnp.linspace(0.0, 6.0, 100)
        >>> bound, exact = (
        ...     gp.GP(gp.RBF(), X, noise=0.1, solver=s).log_prob(jnp.sin(X)) for s in (gp.sgpr(X[::12]), None))
        >>> bool(exact - 1.0 < bound) and bool(bound < exact + 1e-2)
        True
    """
    return SGPR(Z, jitter)


class SGPR(Solver):
    """What `sgpr` returns."""

    Z: Float[Array, "k ..."] = eqx.field(converter=errors.as_array("Z", is_floating=True))
    jitter: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_jitter(self.jitter)
        if 0 in jnp.shape(self.Z):
            raise ValueError(f"Z must have at least one row, shape (k,) or (k, d); got {jnp.shape(self.Z)}")
        errors.check_not_nan("Z", self.Z, cure="inducing inputs are places like those of X")

    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> "LowRankFactor":
        if self.Z.ndim == 0 or self.Z.shape[1:] != X.shape[1:]:
            raise ValueError(f"Z must have rows of the shape of those of X, {X.shape[1:]}, got shape {self.Z.shape}")
        variances = diagonal(kernel, X)
        inner = gram(kernel, self.Z)
        added = add_jitter(jnp.diagonal(inner, axis1=-2, axis2=-1), None, self.jitter)
        tril, log_ok = cholesky_or_identity(inner + jnp.eye(inner.shape[-1], dtype=inner.dtype) * added[..., None, :])

        noise, log_valid = raise_noise(variances, noise, self.jitter)
        factor = _factorize(_projected, (kernel, self.Z, tril), X, noise, is_projection=True, log_ok=log_ok + log_valid)
        rest = variances - jnp.sum(factor.matrix**2, axis=-1)
        return eqx.tree_at(lambda f: f.slack, factor, 0.5 * jnp.sum(rest / noise, axis=-1))


def hsgp(m: int | tuple[int, ...], *, boundary: float = 1.5, jitter: float | None = None) -> "HSGP":
    """Hilbert-space approximation for smooth stationary kernels in one to three dimensions.

    The approximation has its own law, of which log_prob is the exact density. Two things spoil it. Length scales l that
    are small beside the box want a large m. Long ones want a large box: functions are zero at its walls, which for RBF
    takes a share exp(-(boundary - 1)^2 w^2 / (2 l^2)) off the variance at the ends of inputs of width w, 4 % with the
    default and l = w / 5, but 61 % with l = w / 2. Predictions must stay inside the box.

    Args:
        m: eigenfunctions, a number or one for each dimension.
        boundary: half-width of the box over that of the inputs, above 1; 1 + 2.5 l / w leaves the 4 % above.
        jitter: as of `dense`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> X = jnp.linspace(0.0, 6.0, 100)
        >>> near, exact = (
        ...     gp.GP(gp.RBF(), X, noise=0.1, solver=s).log_prob(jnp.sin(X)) for s in (gp.hsgp(30), None))
        >>> bool(abs(near - exact) < 0.1)
        True
    """
    boundary = errors.as_number("boundary", boundary)
    if not boundary > 1.0:
        raise ValueError(
            f"boundary must be above 1, got {boundary}; 1.5 suits length scales up to a fifth of the inputs' width"
        )
    counts = m if isinstance(m, tuple) else (m,)
    return HSGP(tuple(errors.check_count("m", count) for count in counts), float(boundary), jitter)


class HSGP(Solver):
    """What `hsgp` returns."""

    m: tuple[int, ...] = eqx.field(static=True)
    boundary: float = eqx.field(static=True)
    jitter: float | None = eqx.field(static=True)

    def __check_init__(self):
        check_jitter(self.jitter)

    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> "LowRankFactor":
        from numpyro.contrib.hsgp import spectral_densities

        points = _columns(X)
        dim = points.shape[1]
        if len(self.m) not in (1, dim):
            raise ValueError(f"m must be a number or {dim} of them, one for each column of X, got {self.m}")
        m = list(self.m * dim if len(self.m) == 1 else self.m)
        low, high = jnp.min(points, axis=0), jnp.max(points, axis=0)
        centre, half = 0.5 * (low + high), self.boundary * 0.5 * (high - low)
        half = jnp.where(half > 0, half, 1.0)

        variance, base = _stationary(kernel)
        length = jnp.broadcast_to(base.lengthscale, (dim,))
        length = jnp.where(length > 0, length, 1.0)  # the density is -inf there

        def density(wave: Array) -> Array:
            if isinstance(base, RBF):
                return spectral_densities.spectral_density_squared_exponential(dim, wave, 1.0, length)
            nu = {Matern12: 0.5, Matern32: 1.5, Matern52: 2.5}[type(base)]
            return spectral_densities.spectral_density_matern(dim, nu, wave, 1.0, length)

        total = variance * base.variance
        total = jnp.where(total >= 0, total, 1.0)  # and there
        roots = jnp.sqrt(total * jax.vmap(density)(_waves(half, m)))

        noise, log_valid = raise_noise(diagonal(kernel, X), noise, self.jitter)
        return _factorize(_Eigenfunctions(tuple(m)), (centre, half, roots), X, noise, False, log_valid)


class LowRankFactor(Factor):
    """A covariance F F^T + D.

    Attributes:
        features: `features(X, data)` gives F. Static.
        data: of it.
        matrix: F at X, shape (..., n, k).
        noise: D, shape (..., n).
        tril: L, shape (..., k, k).
        slack: what the bound falls short of the log density of this law.
        log_ok: 0, or -inf where there is no factor.
        is_projection: whether k - F F^T is added to predictive variances. Static.
    """

    features: Callable[..., Array] = eqx.field(static=True)
    data: Any
    matrix: Float[Array, "... n k"]
    noise: Float[Array, "... n"]
    tril: Float[Array, "... k k"]
    slack: Float[Array, "..."]
    log_ok: Float[Array, "..."]
    is_projection: bool = eqx.field(static=True)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.tril.shape[:-2]

    @property
    def dtype(self) -> Any:
        return self.tril.dtype

    @property
    def num_normals(self) -> int:
        return self.matrix.shape[-1] + self.matrix.shape[-2]

    def log_prob(self, columns: Float[Array, "... n s"]) -> Float[Array, "... s"]:
        scaled = columns / jnp.sqrt(self.noise)[..., None]
        gap = jnp.sum(scaled**2, axis=-2) - jnp.sum(self._coefficients(columns) ** 2, axis=-2)
        log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(self.tril, axis1=-2, axis2=-1)), axis=-1)
        log_det = log_det + jnp.sum(jnp.log(self.noise), axis=-1) + columns.shape[-2] * math.log(2 * math.pi)
        value = -0.5 * (gap + log_det[..., None]) - self.slack[..., None]
        return jnp.where(jnp.isneginf(self.log_ok)[..., None], -jnp.inf, value)

    def sqrt_matvec(self, columns: Float[Array, "... k s"]) -> Float[Array, "... n s"]:
        k = self.matrix.shape[-1]
        return self.matrix @ columns[..., :k, :] + jnp.sqrt(self.noise)[..., None] * columns[..., k:, :]

    def predict(self, columns: Any, kernel: Any, X: Any, Xs: Any, full_cov: bool) -> tuple[Array, Array]:
        new = self.features(Xs, self.data)
        half = solve(self.tril, new.mT)
        mean = half.mT @ self._coefficients(columns)
        if full_cov:
            rest = gram(kernel, Xs) - new @ new.mT if self.is_projection else 0.0
            return mean, half.mT @ half + rest
        rest = diagonal(kernel, Xs) - jnp.sum(new**2, axis=-1) if self.is_projection else 0.0
        return mean, jnp.sum(half**2, axis=-2) + rest

    def _coefficients(self, columns: Array) -> Array:
        return solve(self.tril, self.matrix.mT @ (columns / self.noise[..., None]))


def _factorize(
    features: Callable[..., Array], data: Any, X: Array, noise: Array, is_projection: bool, log_ok: Array
) -> LowRankFactor:
    matrix = features(X, data)
    scaled = matrix / jnp.sqrt(noise)[..., None]
    inner = jnp.eye(matrix.shape[-1], dtype=matrix.dtype) + scaled.mT @ scaled
    tril, log_found = cholesky_or_identity(inner)
    return LowRankFactor(features, data, matrix, noise, tril, jnp.zeros_like(log_ok), log_ok + log_found, is_projection)


def _projected(X: Array, data: Any) -> Array:
    kernel, Z, tril = data
    return solve(tril, gram(kernel, Z, X)).mT


class _Eigenfunctions(NamedTuple):
    """Of the box, times the roots of the spectral density; hashable, as what is static must be."""

    m: tuple[int, ...]

    def __call__(self, X: Array, data: Any) -> Array:
        from numpyro.contrib.hsgp import laplacian

        centre, half, roots = data
        is_outside = jnp.any(jnp.abs(_columns(X) - centre) > half, axis=-1, keepdims=True)
        if errors.is_concrete(is_outside) and jnp.any(is_outside):
            raise ValueError(
                f"Xs must lie in the box of solver=hsgp(), from {centre - half} to {centre + half}, beyond which its "
                "functions mean nothing; make boundary larger"
            )
        found = laplacian.eigenfunctions(_columns(X) - centre, half[:, None], list(self.m)) * roots
        return jnp.where(is_outside, jnp.nan, found)


def _waves(half: Array, m: list[int]) -> Array:
    """Square roots of the eigenvalues, shape (k, d)."""
    from numpyro.contrib.hsgp import laplacian

    return laplacian.eigenindices(m, len(m)).T * math.pi / (2.0 * half)


def _columns(X: Array) -> Array:
    if X.ndim > 2:
        raise ValueError(f"X must have shape (n,) or (n, d) for solver=hsgp(), got {X.shape}")
    return X[:, None] if X.ndim == 1 else X


def _stationary(kernel: Any) -> tuple[Array, Any]:
    """A variance, and the RBF or Matérn kernel that it multiplies."""
    if isinstance(kernel, RBF | Matern12 | Matern32 | Matern52):
        return jnp.ones(()), kernel
    if isinstance(kernel, Product):
        for number, rest in ((kernel.left, kernel.right), (kernel.right, kernel.left)):
            if isinstance(number, Constant):
                variance, base = _stationary(rest)
                return variance * number.variance, base
    raise ValueError(f"kernel must be RBF or Matérn, or a multiple, for solver=hsgp(), got {type(kernel).__name__}")
