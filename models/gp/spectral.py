"""Functions of C = s K + I, for many s at once, by one eigendecomposition K = V diag(lam) V^T.

    w = 1 / (s lam + 1):    log det C = -sum log w,    C^{-1} = V W V^T,    C^{1/2} = V W^{-1/2} V^T,    W = diag(w)

An eigendecomposition has no derivative where eigenvalues are equal; these functions have all. So their derivatives in K
are those of Taylor polynomials about E = 0 with V held fixed, where V^T K V = diag(lam) + E:

    log det C   -sum log w + s sum_a w_a E_aa - s^2 sum_ab w_a E_ab^2 w_b / 2
    C^{-1}      W - s W E W + s^2 W E W E W
    C^{1/2}     diag(r) + s E_ab / (r_a + r_b),    r = w^{-1/2}

What is needed for many right-hand sides has the first derivative alone, and pays for E only when it is differentiated.
Derivatives in K of a higher order are refused; those in all else are not.

References:
    Higham (2008), Functions of Matrices, doi:10.1137/1.9780898717778, chapter 3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayesinf import errors

__all__ = ["ScaledMatrix", "eigh"]


class ScaledMatrix(eqx.Module):
    """s K + I for any s > 0. Where K is not semidefinite densities are 0 with gradient zero, and all else is NaN.

    Attributes:
        K: symmetric; what is differentiated.
        values, vectors: of `eigh(K)`; constants.
    """

    K: Float[Array, "n n"]
    values: Float[Array, " n"]
    vectors: Float[Array, "n n"]

    def log_densities(
        self, scales: Float[Array, " j"], r: Float[Array, " n"], *, is_constant: bool = False
    ) -> Float[Array, " j"]:
        """Log N(r; 0, s K + I) for every s; cheaper, and without derivatives in K, where that is held constant."""
        is_ok, values, E = self._expansion()
        E, r = None if is_constant else E, self.vectors.T @ r
        w = _inverse(values, scales)
        log_det, quadratic = -jnp.sum(jnp.log(w), axis=-1), _solve(E, w, scales, r) @ r
        if E is not None:
            log_det += scales * (w @ jnp.diagonal(E)) - 0.5 * scales**2 * jnp.sum((w @ E**2) * w, axis=-1)
        value = -0.5 * (log_det + quadratic + r.shape[-1] * math.log(2.0 * math.pi))
        return jnp.where(is_ok & ~jnp.isnan(value), value, -jnp.inf)

    def solve(self, scales: Float[Array, " j"], r: Float[Array, " n"]) -> Float[Array, "j n"]:
        """(s K + I)^{-1} r for every s."""
        is_ok, values, E = self._expansion()
        solved = _solve(E, _inverse(values, scales), scales, self.vectors.T @ r) @ self.vectors.T
        return jnp.where(is_ok, solved, jnp.nan)

    def forms(self, scales: Float[Array, " j"], B: Float[Array, "n m"], *, full: bool) -> Float[Array, "j ..."]:
        """B^T (s K + I)^{-1} B for every s, (j, m, m); or its diagonal, (j, m)."""
        return self._once(_joint_forms if full else _forms, scales, self.vectors.T @ B)

    def sqrt_matvec(self, scales: Float[Array, " j"], z: Float[Array, "j n"]) -> Float[Array, "j n"]:
        """(s_j K + I)^{1/2} z_j for every j."""
        return self._once(_roots, scales, z @ self.vectors) @ self.vectors.T

    def _expansion(self) -> tuple[Array, Array, Array | None]:
        """Whether K is semidefinite, its eigenvalues, and E; None where nothing can be differentiated."""
        is_ok = ~jnp.any(jnp.isnan(self.values))
        values = jnp.where(is_ok, self.values, 0.0)
        if errors.is_concrete(self.K):
            return is_ok, values, None
        # no rule of custom_jvp: second derivatives of a `scan` lose those that are inside
        K = jnp.where(is_ok, self.K, 0.0)
        E = self.vectors.T @ (K - jax.lax.stop_gradient(K)) @ self.vectors
        return is_ok, values, E * _differentiable(2, K, jnp.ones((), K.dtype))

    def _once(self, polynomial: Callable[..., Array], *arguments: Array) -> Array:
        return _differentiable_once(polynomial, self.K, self.values, self.vectors, *arguments)


def eigh(K: Float[Array, "... n n"]) -> tuple[Float[Array, "... n"], Float[Array, "... n n"]]:
    """Eigenvalues, those that are rounding set to zero and those below zero by more to NaN, and vectors; constants.

    Large scales would make a variance of what is rounding, and explain by it data that repeat inputs.
    """
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(K))
    vectors = jnp.where(jnp.isnan(vectors), 0.0, vectors)  # the values are NaN then
    tolerance = K.shape[-1] * jnp.finfo(K.dtype).eps * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.where(values < -10 * tolerance, jnp.nan, jnp.where(values < tolerance, 0.0, values)), vectors


def _inverse(values: Array, scales: Array) -> Array:
    return 1.0 / (scales[:, None] * values + 1.0)


def _solve(E: Array | None, w: Array, scales: Array, r: Array) -> Array:
    zeroth = w * r
    if E is None:
        return zeroth
    first = -scales[:, None] * w * (zeroth @ E)
    return zeroth + first - scales[:, None] * w * (first @ E)


def _forms(E: Array | None, values: Array, scales: Array, B: Array) -> Array:
    w = _inverse(values, scales)
    value = w @ B**2
    if E is None:
        return value
    weighted = w[..., None] * B
    return value - scales[:, None] * jnp.sum(weighted * jnp.einsum("ab,jbm->jam", E, weighted), axis=1)


def _joint_forms(E: Array | None, values: Array, scales: Array, B: Array) -> Array:
    w = _inverse(values, scales)
    value = jnp.einsum("am,ja,al->jml", B, w, B)
    if E is None:
        return value
    weighted = w[..., None] * B
    return value - scales[:, None, None] * jnp.einsum("jam,ab,jbl->jml", weighted, E, weighted)


def _roots(E: Array | None, values: Array, scales: Array, z: Array) -> Array:
    r = jnp.sqrt(scales[:, None] * values + 1.0)
    if E is None:
        return r * z
    return r * z + scales[:, None] * jnp.sum(E * z[:, None, :] / (r[:, :, None] + r[:, None, :]), axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_once(polynomial: Any, K: Array, values: Array, vectors: Array, *arguments: Array) -> Array:
    """A polynomial of order one where E = 0, with its derivatives."""
    del K, vectors
    return polynomial(None, values, *arguments)


@_differentiable_once.defjvp
def _differentiable_once_jvp(polynomial, primals, tangents):
    K, values, vectors, *arguments = primals
    K_dot, _, _, *arguments_dot = tangents
    E = _differentiable(0, K, jnp.zeros_like(vectors))
    E_dot = vectors.T @ K_dot @ vectors
    _, tangent = jax.jvp(lambda E, *rest: polynomial(E, values, *rest), (E, *arguments), (E_dot, *arguments_dot))
    return _differentiable_once(polynomial, *primals), tangent


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(times: int, K: Array, value: Array) -> Array:
    """The value, a constant that is refused after so many derivatives in K: they are not zero, and not known."""
    del times, K
    return value


@_differentiable.defjvp
def _differentiable_jvp(times, primals, tangents):
    if times == 0:
        raise ValueError(
            "a ScaleMixtureGP whose noise is not scaled must be differentiated at most twice in the parameters of its "
            "kernel, its draws and predictions once; noise_scaled=True and StudentTProcess have all derivatives"
        )
    return _differentiable(times - 1, *primals), jnp.zeros_like(tangents[1])
