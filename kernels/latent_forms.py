"""What may be held fixed of a latent Gaussian f while its parameters theta move.

    f ~ N(m, K),   K = L L^T,   both of theta

    centred     f itself:                        p(theta | f) has the factor N(f; m, K)
    whitened    z = L^{-1} (f - m):              f moves with theta; z is N(0, I) whatever theta is
    surrogate   noisy data g ~ N(f, S) of f, and eta = R^{-1} (f - E[f | g]) with R R^T = Cov(f | g):
                                                 f moves with theta as far as g lets it; the factor is N(g; m, K + S)

In each f is a smooth, invertible map of what is fixed, and the factor is the density of what is fixed, so a kernel of

    p(theta | fixed)  proportional to  p(theta) factor(theta) p(y | f(theta, fixed), theta)

leaves p(theta, f | y) invariant. With B = I + L^T S^{-1} L = C C^T the surrogate map is f = m + L (B^{-1} L^T S^{-1}
(g - m) + C^{-T} eta): eigenvalues of B are at least 1, where R R^T = S - S (K + S)^{-1} S loses its digits.

References:
    Murray and Adams (2010), arXiv:1006.0868 (surrogate data).
    Papaspiliopoulos, Roberts and Sköld (2007), doi:10.1214/088342307000000014 (centred and not).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Key, PyTree

__all__ = ["FORMS", "Form", "LatentGaussian", "Triangle", "as_latent"]

_STACKED = (
    "stack functions into one, as MultivariateNormal(loc.reshape(-1), scale_tril=jnp.kron(jnp.eye(outputs), tril))"
)


class LatentGaussian(eqx.Module):
    """The law of f at one value of the parameters.

    Attributes:
        loc: m.
        factor: of K: `sqrt_matvec`, `whiten` and `log_prob` of columns; `tril` where it is dense.
        noise: the variances S of surrogate data; None without.
    """

    loc: Float[Array, " n"]
    factor: Any
    noise: Float[Array, " n"] | None = None

    @property
    def is_ok(self) -> Bool[Array, ""]:
        """Whether K has a factor; where not, `factor` is that of another matrix, of finite numbers."""
        return ~jnp.isneginf(jnp.asarray(getattr(self.factor, "log_ok", 0.0)))

    def color(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """The function that z stands for, m + L z."""
        return self.loc + self.factor.sqrt_matvec(z[:, None])[:, 0]

    def whiten(self, f: Float[Array, " n"]) -> Float[Array, " n"]:
        """The normals that f stands for, L^{-1} (f - m)."""
        return self.factor.whiten((f - self.loc)[:, None])[:, 0]

    def log_prob(self, f: Float[Array, " n"]) -> Float[Array, ""]:
        return self.factor.log_prob((f - self.loc)[:, None])[0]


class Triangle(eqx.Module):
    """A covariance by its Cholesky factor; the identity, and log_ok = -inf, where that is not finite."""

    tril: Float[Array, "n n"]
    log_ok: Float[Array, ""]

    def __init__(self, tril: Float[Array, "n n"]):
        is_ok = jnp.all(jnp.isfinite(tril))
        self.tril = jnp.where(is_ok, tril, jnp.eye(tril.shape[-1], dtype=tril.dtype))
        self.log_ok = jnp.where(is_ok, 0.0, -jnp.inf).astype(tril.dtype)

    def sqrt_matvec(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        return self.tril @ columns

    def whiten(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        return solve_triangular(self.tril, columns, lower=True)

    def log_prob(self, columns: Float[Array, "n s"]) -> Float[Array, " s"]:
        log_scale = jnp.sum(jnp.log(jnp.diagonal(self.tril))) + 0.5 * self.tril.shape[0] * math.log(2 * math.pi)
        return -0.5 * jnp.sum(self.whiten(columns) ** 2, axis=0) - log_scale


def as_latent(law: Any, noise: Any = None) -> LatentGaussian:
    """A `LatentGaussian` from a process, or from a multivariate normal law.

    Raises:
        ValueError: the law is neither, has noise of its own, or is one of several vectors, or `noise` does not fit it.
    """
    shape = law.shape() if isinstance(law, dist.Distribution) else ()
    if len(shape) > 1:
        raise ValueError(f"build must return the law of one vector f, got one of shape {shape}; {_STACKED}")
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    loc, factor = getattr(law, "loc", None), getattr(law, "factor", None)
    if isinstance(law, dist.MultivariateNormal):
        factor = law.scale_tril
    if loc is None or factor is None or not getattr(law, "is_gaussian", True):
        raise ValueError(
            f"build must return a models.gp.GP or a MultivariateNormal, the law of f, got {type(law).__name__}"
        )
    if getattr(law, "noise", None) is not None:
        raise ValueError(
            f"build must return a {type(law).__name__} with noise=None, the law of f, got one with noise, which is not "
            "that of f: give that of the data to log_likelihood; solver=dense(jitter=...) makes a factor exist"
        )
    loc = jnp.asarray(loc)
    if loc.ndim != 1 or (isinstance(factor, jax.Array) and factor.ndim != 2):
        raise ValueError(f"build must return the law of one vector f, got one of shape {loc.shape}; {_STACKED}")
    if noise is not None:
        noise = jnp.asarray(noise)
        if noise.shape not in ((), loc.shape):
            raise ValueError(f"auxiliary_variance must be a number or of the shape {loc.shape} of f, got {noise.shape}")
        noise = jnp.broadcast_to(noise, loc.shape).astype(loc.dtype)
    return LatentGaussian(loc, Triangle(factor) if isinstance(factor, jax.Array) else factor, noise)


class Form(NamedTuple):
    """How f is taken apart, and put together again at other parameters.

    Attributes:
        fix: `fix(key, latent, f)` is what is held fixed, drawn where it is random.
        place: `place(latent, fixed)` is f, and the log density of what is fixed.
        has_noise: whether it needs the variances S of surrogate data, and the matrix L.
    """

    fix: Callable[[Key[Array, ""], LatentGaussian, Array], PyTree]
    place: Callable[[LatentGaussian, PyTree], tuple[Array, Array]]
    has_noise: bool = False


def _fix_surrogate(key: Key[Array, ""], latent: LatentGaussian, f: Array) -> tuple[Array, Array]:
    noise: Any = latent.noise
    g = f + jnp.sqrt(noise) * jax.random.normal(key, f.shape, f.dtype)
    mean, tril, _ = _given_surrogate(latent, g)
    return g, tril.T @ (latent.whiten(f) - mean)


def _place_surrogate(latent: LatentGaussian, fixed: tuple[Array, Array]) -> tuple[Array, Array]:
    g, eta = fixed
    mean, tril, log_density = _given_surrogate(latent, g)
    return latent.color(mean + solve_triangular(tril, eta.astype(tril.dtype), lower=True, trans=1)), log_density


def _given_surrogate(latent: LatentGaussian, g: Array) -> tuple[Array, Array, Array]:
    """E[z | g], the factor C of the precision of z given g, and log N(g; m, K + S)."""
    scale: Any = jnp.sqrt(latent.noise)  # type: ignore[arg-type]
    A = latent.factor.tril / scale[:, None]
    r = (g - latent.loc) / scale
    tril = jnp.linalg.cholesky(jnp.eye(len(r), dtype=A.dtype) + A.T @ A)
    mean = cho_solve((tril, True), A.T @ r)
    # the quadratic form is a sum of squares; the difference of two would cancel where S is small
    quadratic = jnp.sum((r - A @ mean) ** 2) + jnp.sum(mean**2)
    log_scale = jnp.sum(jnp.log(scale)) + jnp.sum(jnp.log(jnp.diagonal(tril))) + 0.5 * len(r) * math.log(2 * math.pi)
    return mean, tril, -0.5 * quadratic - log_scale


FORMS: dict[str, Form] = {
    "centred": Form(lambda key, latent, f: f, lambda latent, f: (f, latent.log_prob(f))),
    "whitened": Form(
        lambda key, latent, f: latent.whiten(f), lambda latent, z: (latent.color(z), jnp.zeros_like(z[0]))
    ),
    "surrogate": Form(_fix_surrogate, _place_surrogate, has_noise=True),
}
