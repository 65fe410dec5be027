"""The dual of an activation: the covariance of what it makes of two Gaussian variables.

    k(q, p, c)    = E phi(u) phi(v),        (u, v) ~ N(0, [[q, c], [c, p]])
    kdot(q, p, c) = E phi'(u) phi'(v),      v(q) = k(q, q, q) = E phi(u)^2

One layer of an infinitely wide network maps the covariance c of its inputs to k. By Price's theorem

    dk/dc = E phi'(u) phi'(v),      dk/dq = E phi''(u) phi(v) / 2

which stay finite where u and v are the same variable. There the closed forms, differentiated as they are written, give
NaN; every k here carries Price's rule instead.

References:
    Price (1958), doi:10.1109/TIT.1958.1057444.
    Cho and Saul (2009), Kernel methods for deep learning.
    Lee, Bahri, Novak, Schoenholz, Pennington and Sohl-Dickstein (2018), arXiv:1711.00165.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

__all__ = ["Dual", "root"]

Reals = Real[ArrayLike, "..."]
Floats = Float[Array, "..."]


def root(x: Floats) -> Floats:
    """The square root of max(x, 0), of derivative zero where it is zero."""
    is_zero = x <= 0  # NaN stays NaN
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


class Dual(eqx.Module):
    """An activation and its Gaussian expectations.

    A subclass writes `phi` and the three expectations `covariance`, `slope_covariance` and `curvature`. They are given
    floating arrays that broadcast, with q, p >= 0 and |c| <= sqrt(qp), and may be called at either end of it.
    """

    @abc.abstractmethod
    def phi(self, x: Floats) -> Floats:
        """The activation, element by element."""

    @abc.abstractmethod
    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        """E phi(u) phi(v)."""

    @abc.abstractmethod
    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        """E phi'(u) phi'(v)."""

    @abc.abstractmethod
    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        """E phi''(u) phi(v), with point masses where phi has kinks."""

    def k(self, q: Reals, p: Reals, c: Reals) -> Floats:
        """E phi(u) phi(v).

        Args:
            q, p: variances, at least zero.
            c: covariances, of any shape that broadcasts with theirs. What rounding pushed beyond sqrt(qp) is clipped;
                derivatives pass through.

        Returns:
            Of the broadcast shape.
        """
        return _price(self, *_admissible(q, p, c))

    def kdot(self, q: Reals, p: Reals, c: Reals) -> Floats:
        """E phi'(u) phi'(v), which is dk/dc; arguments as of `k`."""
        return self.slope_covariance(*_admissible(q, p, c))

    def v(self, q: Reals) -> Floats:
        """E phi(u)^2 of u ~ N(0, q), for q >= 0."""
        return self.k(q, q, q)

    def vdot(self, q: Reals) -> Floats:
        """E phi'(u)^2 of u ~ N(0, q), for q >= 0."""
        return self.kdot(q, q, q)


def _admissible(q: Reals, p: Reals, c: Reals) -> tuple[Floats, Floats, Floats]:
    """The three in one floating dtype, with |c| <= sqrt(qp)."""
    dtype = jnp.result_type(q, p, c, 1.0)
    q, p, c = (jnp.asarray(x, dtype) for x in (q, p, c))
    bound = jnp.sqrt(q) * jnp.sqrt(p)
    excess = jax.lax.stop_gradient(jnp.clip(c, -bound, bound) - c)
    return q, p, c + excess


@eqx.filter_custom_jvp
def _price(dual: Dual, q: Floats, p: Floats, c: Floats) -> Floats:
    return dual.covariance(q, p, c)


@_price.def_jvp
def _price_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Floats, Floats]:
    dual, q, p, c = primals
    dual_dot, q_dot, p_dot, c_dot = tangents
    value = _price(dual, q, p, c)
    terms = []
    if jax.tree.leaves(dual_dot):  # the activation's own parameters
        moving, fixed = eqx.partition(dual, jax.tree.map(lambda t: t is not None, dual_dot, is_leaf=_is_none))
        terms.append(eqx.filter_jvp(lambda d: eqx.combine(d, fixed).covariance(q, p, c), (moving,), (dual_dot,))[1])
    if c_dot is not None:
        terms.append(dual.slope_covariance(q, p, c) * c_dot)
    if q_dot is not None:
        terms.append(0.5 * dual.curvature(q, p, c) * q_dot)
    if p_dot is not None:
        terms.append(0.5 * dual.curvature(p, q, c) * p_dot)
    return value, sum(terms, jnp.zeros_like(value))


def _is_none(x: Any) -> bool:
    return x is None
