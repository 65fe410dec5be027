"""Covariance functions of Gaussian processes; `kernel_algebra` has their sums, products and multiples.

All are pytrees: their parameters are leaves, and a leading axis of the parameters is a batch of processes.

    RBF                 v exp(-r^2 / 2)
    Matern12            v exp(-r)
    Matern32            v (1 + a) exp(-a),              a = sqrt(3) r
    Matern52            v (1 + a + a^2 / 3) exp(-a),    a = sqrt(5) r
    RationalQuadratic   v (1 + r^2 / (2 alpha))^(-alpha)
    Periodic            v exp(-2 sum_i sin^2(pi (x_i - y_i) / p) / l_i^2)
    Linear              v <x / l, y / l>
    Constant            v

with r = |(x - y) / l|. Inputs are (n,) or (n, d). Distances are sums of squared differences, not of squares, so nearby
points stay apart in float32, and every gradient is finite at r = 0.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, chapter 4.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from bayesinf import errors
from bayesinf.models.kernel_algebra import Combinable, Constant, Product, Sum, as_covariance, diagonal, gram

__all__ = [
    "RBF",
    "Constant",
    "Covariance",
    "Linear",
    "Matern12",
    "Matern32",
    "Matern52",
    "Periodic",
    "Product",
    "RationalQuadratic",
    "Sum",
    "as_covariance",
    "diagonal",
    "gram",
]


class Covariance(Combinable):
    """A covariance function; `+` and `*` with another, or with a number, give a new one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> kernel = 2.0 * gp.RBF(0.5) + gp.Linear()
        >>> kernel(jnp.array([0.0, 1.0])).shape
        (2, 2)
        >>> kernel.diagonal(jnp.array([0.0, 1.0])).tolist()
        [2.0, 3.0]
    """

    def __call__(self, X1: ArrayLike, X2: ArrayLike | None = None) -> Float[Array, "... n m"]:
        """The matrix k(x_i, y_j); of X1 with itself where X2 is None."""
        X1 = _as_rows("X1", X1)
        X2 = X1 if X2 is None else _as_rows("X2", X2)
        if X2.shape[1] != X1.shape[1]:
            raise ValueError(f"X2 must have {X1.shape[1]} columns, those of X1, got {X2.shape[1]}")
        return self.evaluate(X1, X2)

    @abc.abstractmethod
    def evaluate(self, X1: Float[Array, "n d"], X2: Float[Array, "m d"]) -> Float[Array, "... n m"]:
        """The matrix k(x_i, y_j) of inputs in rows."""

    @abc.abstractmethod
    def diagonal(self, X: ArrayLike) -> Float[Array, "... n"]:
        """The variances k(x_i, x_i)."""


class _Scaled(Covariance):
    """Inputs divided by length scales, and a variance."""

    lengthscale: Float[Array, "..."] = eqx.field(
        default=1.0, converter=errors.as_array("lengthscale", is_floating=True)
    )
    variance: Float[Array, "..."] = eqx.field(default=1.0, converter=errors.as_array("variance", is_floating=True))

    def __check_init__(self):
        errors.check_positive("lengthscale", self.lengthscale)
        errors.check_nonnegative("variance", self.variance)

    def _inverse_scale(self, X: Array) -> Array:
        """1 / l, to be multiplied with rows of X."""
        shape = self.lengthscale.shape
        if shape and shape[-1] not in (1, X.shape[-1]):
            raise ValueError(
                f"lengthscale must be a scalar, or have a last axis of length 1 or {X.shape[-1]}, the number of input "
                f"columns; got shape {shape}. A batch of B processes has lengthscales of shape (B, 1)"
            )
        return 1.0 / jnp.where(self.lengthscale > 0, self.lengthscale, 1.0)

    def _positive(self) -> tuple[Array, ...]:
        """Parameters that must be positive, of the shape of a batch."""
        return (self.lengthscale if self.lengthscale.ndim == 0 else jnp.min(self.lengthscale, axis=-1),)

    def _amplitude(self) -> Array:
        """The variance; -1, which every solver refuses, where traced parameters are not positive."""
        is_ok = jnp.asarray(True)
        for parameter in self._positive():
            is_ok = is_ok & (parameter > 0)
        return jnp.where(is_ok, self.variance, -1.0)

    def diagonal(self, X):
        X = _as_rows("X", X)
        self._inverse_scale(X)  # whose shape it checks
        amplitude = self._amplitude()
        return jnp.broadcast_to(amplitude[..., None], (*amplitude.shape, X.shape[0]))


class _Stationary(_Scaled):
    """v f(r^2)."""

    @abc.abstractmethod
    def correlation(self, squared: Float[Array, "..."]) -> Float[Array, "..."]:
        """The correlation at squared distance r^2."""

    def evaluate(self, X1, X2):
        return _wide(self._amplitude()) * self.correlation(_squared_distance(X1, X2, self._inverse_scale(X1)))


class RBF(_Stationary):
    """Squared exponential: k = v exp(-r^2 / 2); paths are analytic.

    Attributes:
        lengthscale: l > 0; a scalar, or of shape (d,) one for each column (ARD); (B, 1) or (B, d) for a batch.
        variance: v >= 0; a scalar, or (B,) for a batch.

    Raises:
        ValueError: a parameter is negative, or the length scales do not fit the inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> kernel = gp.RBF(jnp.array([1.0, 10.0]))
        >>> round(float(kernel(jnp.zeros((1, 2)), jnp.array([[0.0, 10.0]]))[0, 0]), 3)
        0.607
    """

    def correlation(self, squared):
        return jnp.exp(-0.5 * squared)


class Matern12(_Stationary):
    """Exponential: k = v exp(-r), of an Ornstein-Uhlenbeck process in one dimension; paths are continuous.

    Attributes:
        lengthscale, variance: as of `RBF`.
    """

    def correlation(self, squared):
        return jnp.exp(-_root(squared))


class Matern32(_Stationary):
    """Matérn of smoothness 3/2: k = v (1 + a) exp(-a), a = sqrt(3) r; paths have one derivative.

    Attributes:
        lengthscale, variance: as of `RBF`.
    """

    def correlation(self, squared):
        a = math.sqrt(3.0) * _root(squared)
        return (1.0 + a) * jnp.exp(-a)


class Matern52(_Stationary):
    """Matérn of smoothness 5/2: k = v (1 + a + a^2 / 3) exp(-a), a = sqrt(5) r; paths have two derivatives.

    Attributes:
        lengthscale, variance: as of `RBF`.
    """

    def correlation(self, squared):
        a = math.sqrt(5.0) * _root(squared)
        return (1.0 + a + a**2 / 3.0) * jnp.exp(-a)


class RationalQuadratic(_Stationary):
    """A scale mixture of RBF: k = v (1 + r^2 / (2 alpha))^(-alpha).

    Attributes:
        lengthscale, variance: as of `RBF`.
        alpha: > 0; a scalar, or (B,) for a batch.
    """

    alpha: Float[Array, "..."] = eqx.field(default=1.0, converter=errors.as_array("alpha", is_floating=True))

    def __check_init__(self):
        errors.check_positive("alpha", self.alpha)

    def _positive(self):
        return (*super()._positive(), self.alpha)

    def correlation(self, squared):
        alpha = _wide(jnp.where(self.alpha > 0, self.alpha, 1.0))
        return jnp.exp(-alpha * jnp.log1p(0.5 * squared / alpha))


class Periodic(_Scaled):
    """Exactly periodic: k = v exp(-2 sum_i sin^2(pi (x_i - y_i) / p) / l_i^2).

    Attributes:
        lengthscale: l > 0, without unit; shapes as of `RBF`.
        variance: v >= 0.
        period: p > 0; a scalar, or (B,) for a batch.
    """

    period: Float[Array, "..."] = eqx.field(default=1.0, converter=errors.as_array("period", is_floating=True))

    def __check_init__(self):
        errors.check_positive("period", self.period)

    def evaluate(self, X1, X2):
        period = jnp.where(self.period > 0, self.period, 1.0)[..., None, None, None]
        sines = jnp.sin(math.pi * (X1[:, None, :] - X2[None, :, :]) / period)
        scaled = sines * _per_column(self._inverse_scale(X1))
        return _wide(self._amplitude()) * jnp.exp(-2.0 * jnp.sum(scaled**2, axis=-1))

    def _positive(self):
        return (*super()._positive(), self.period)


class Linear(_Scaled):
    """Bayesian linear regression through the origin: k = v <x / l, y / l>.

    Attributes:
        lengthscale, variance: as of `RBF`.
    """

    def evaluate(self, X1, X2):
        inverse = self._inverse_scale(X1)
        inverse = inverse[..., None, :] if inverse.ndim else inverse
        return _wide(self._amplitude()) * ((X1 * inverse) @ (X2 * inverse).mT)

    def diagonal(self, X):
        X = _as_rows("X", X)
        inverse = self._inverse_scale(X)
        inverse = inverse[..., None, :] if inverse.ndim else inverse
        return self._amplitude()[..., None] * jnp.sum((X * inverse) ** 2, axis=-1)


def _as_rows(name: str, X: Any) -> Array:
    X = jnp.asarray(X)
    if X.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (n,) or (n, d), got {X.shape}")
    X = X.astype(jnp.result_type(X, 1.0))
    return X[:, None] if X.ndim == 1 else X


def _wide(parameter: Array) -> Array:
    """A batch of parameters against matrices."""
    return parameter[..., None, None]


def _per_column(inverse: Array) -> Array:
    """A batch of length scales against differences of shape (n, m, d)."""
    return inverse[..., None, None, :] if inverse.ndim else inverse


@jax.jit  # the differences are fused into their sum, and are never in memory
def _squared_distance(X1: Array, X2: Array, inverse: Array) -> Array:
    return jnp.sum(((X1[:, None, :] - X2[None, :, :]) * _per_column(inverse)) ** 2, axis=-1)


def _root(squared: Array) -> Array:
    """The distance, with derivative zero at zero."""
    is_zero = squared == 0
    root: Callable = jnp.sqrt
    return jnp.where(is_zero, 0.0, root(jnp.where(is_zero, 1.0, squared)))
