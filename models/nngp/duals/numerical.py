"""The dual of any smooth activation, by its Hermite expansion.

    a_n(q) = E phi(sqrt(q) z) h_n(z),       E phi(u) phi(v) = sum_n a_n(q) a_n(p) rho^n,      rho = c / sqrt(qp)

with h_n the orthonormal Hermite polynomials and z ~ N(0, 1) (Mehler's formula). Coefficients cost one rule for every
input, by the trapezoid, which converges geometrically for such integrals; each pair of inputs then costs a polynomial.
Left out are sum_{n >= terms} a_n^2 rho^n, less than E phi^2 - sum_{n < terms} a_n^2: nothing to rounding for GELU or a
sine, 1e-12 for tanh near unit variance with 128 terms, and of order terms^{-3/2} where phi has a kink, for which
`piecewise_linear` is exact.

References:
    Daniely, Frostig and Singer (2016), arXiv:1602.05897.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.nngp.duals.dual import Dual, root

__all__ = ["Numerical", "numerical"]

Floats = Float[Array, "..."]


def _as_pytree(phi: Any) -> Any:
    """A function that passes through `jit`; modules of arrays do already."""
    return phi if isinstance(phi, eqx.Module) or not callable(phi) else Partial(phi)


def _check_scalar(phi: Any) -> None:
    """That phi takes numbers of JAX, traced ones too, and returns one."""
    try:
        found = jax.eval_shape(phi, jax.ShapeDtypeStruct((), jnp.result_type(float)))
    except (TypeError, jax.errors.JAXTypeError) as error:
        name = getattr(getattr(phi, "func", phi), "__name__", repr(phi))
        first = str(error).splitlines()[0]
        raise ValueError(f"phi must be a function of jax.numpy, such as jnp.tanh; {name} fails: {first}") from error
    if getattr(found, "shape", None) != ():
        raise ValueError(f"phi must return one number, got {found}")


class Numerical(Dual):
    """A function of one variable, by `terms` coefficients of its Hermite expansion.

    Attributes:
        function: smooth, and differentiable by JAX; a pytree, whose arrays may be parameters.
        terms: how many coefficients.
    """

    function: Callable[[Array], Array] = eqx.field(converter=_as_pytree)
    terms: int = eqx.field(static=True)

    def __check_init__(self):
        errors.check_arguments("phi", self.function, "x")
        errors.check_count("terms", self.terms)
        _check_scalar(self.function)

    def phi(self, x: Floats) -> Floats:
        return self.function(x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return self._mehler(0, 0, q, p, c)

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return self._mehler(1, 1, q, p, c)

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return self._mehler(2, 0, q, p, c)

    def v(self, q: Real[ArrayLike, "..."]) -> Floats:
        return self._mean_square(0, q)

    def vdot(self, q: Real[ArrayLike, "..."]) -> Floats:
        return self._mean_square(1, q)

    def _mehler(self, order_u: int, order_v: int, q: Floats, p: Floats, c: Floats) -> Floats:
        """E of derivatives of phi, of these orders, at u and v."""
        scale = root(q) * root(p)
        rho = jnp.where(scale <= 0, 0.0, c / jnp.where(scale <= 0, 1.0, scale))
        coefficients = self._coefficients(order_u, q), self._coefficients(order_v, p)

        def horner(total, pair):
            return total * rho + pair[0] * pair[1], None

        zero = jnp.zeros(jnp.broadcast_shapes(q.shape, p.shape, c.shape), rho.dtype)
        return jax.lax.scan(horner, zero, coefficients, reverse=True)[0]

    def _coefficients(self, order: int, q: Floats) -> Float[Array, "terms ..."]:
        """a_n(q) of a derivative of phi."""
        nodes, step = self._nodes(q.dtype)
        weighted = step * _normal(nodes) * self._derivative(order, root(q)[..., None] * nodes)

        def recur(previous, n):
            before, polynomial = previous
            after = (nodes * polynomial - jnp.sqrt(n) * before) / jnp.sqrt(n + 1.0)
            return (polynomial, after), jnp.sum(weighted * polynomial, axis=-1)

        start = jnp.zeros_like(nodes), jnp.ones_like(nodes)
        return jax.lax.scan(recur, start, jnp.arange(self.terms, dtype=nodes.dtype))[1]

    def _mean_square(self, order: int, q: Real[ArrayLike, "..."]) -> Floats:
        q = jnp.asarray(q, jnp.result_type(q, 1.0))
        nodes, step = self._nodes(q.dtype)
        values = self._derivative(order, root(q)[..., None] * nodes)
        return jnp.sum(step * _normal(nodes) * values**2, axis=-1)

    def _derivative(self, order: int, x: Floats) -> Floats:
        function: Any = lambda y: jnp.asarray(self.function(y), y.dtype)  # noqa: E731
        for _ in range(order):
            function = jax.grad(function)
        return jnp.vectorize(function)(x)

    def _nodes(self, dtype: Any) -> tuple[Floats, float]:
        """A grid over what the last polynomial reaches with weight above rounding, finer than half its waves."""
        reach = 13.0 if dtype == jnp.float64 else 9.0
        step = min(0.125, 1.0 / math.sqrt(self.terms))
        return jnp.arange(-math.ceil(reach / step), math.ceil(reach / step) + 1, dtype=dtype) * step, step


def _normal(x: Floats) -> Floats:
    return jnp.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def numerical(phi: Callable[[Array], Array], *, terms: int = 128) -> Numerical:
    """The dual of any smooth function of one variable.

    Kinks cost accuracy: that of relu is off by 2e-4, where `piecewise_linear` is exact. Functions that jump are off by
    some percent, however many the terms.

    Args:
        phi: maps a scalar to a scalar, finite everywhere, and JAX differentiates it twice.
        terms: of the Hermite expansion; more for functions that bend sharply within a standard deviation.

    Raises:
        ValueError: `phi` is no function of JAX of one scalar, or `terms` not a whole number above zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import nngp
        >>> tanh = nngp.numerical(jnp.tanh)
        >>> round(float(tanh.v(1.0)), 4)
        0.3943
    """
    return Numerical(phi, terms)
