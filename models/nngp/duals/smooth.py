"""Smooth activations with duals in closed form: erf, GELU, sine, cosine and monomials.

    erf      k = (2 / pi) asin(2c / sqrt((1 + 2q)(1 + 2p)))
    GELU     k = c/4 + c A / 2 pi + S / (2 pi D),    A = asin(c / sqrt(ab)),  D = sqrt(ab - c^2),
             a = 1 + q,  b = 1 + p,  S = qp + c^2 (1 - q/a - p/b)
    sine     k = exp(-(q + p)/2) sinh c,             cosine the same with cosh
    x^n      k = sum_j j! C(n, j)^2 ((n - j - 1)!!)^2 (qp)^((n-j)/2) c^j,   over j of the parity of n

References:
    Williams (1997), doi:10.1162/089976698300017412 (erf).
    Tsuchida, Pearce, van der Heide, Roosta and Gallagher (2021), arXiv:2002.08517 (GELU).
"""

import math
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayesinf import errors
from bayesinf.models.nngp.duals.angles import arcsin
from bayesinf.models.nngp.duals.dual import Dual

__all__ = ["Cosine", "Erf", "Gelu", "Monomial", "Sine", "cos", "erf", "gelu", "monomial", "sin"]

Floats = Float[Array, "..."]


class Erf(Dual):
    """phi(x) = erf(x)."""

    def phi(self, x: Floats) -> Floats:
        return jax.lax.erf(x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return (2.0 / math.pi) * arcsin(2.0 * c / (jnp.sqrt(1.0 + 2.0 * q) * jnp.sqrt(1.0 + 2.0 * p)))

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return (4.0 / math.pi) / jnp.sqrt(_determinant(2.0 * q, 2.0 * p, 2.0 * c))

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return -2.0 * c / (1.0 + 2.0 * q) * self.slope_covariance(q, p, c)


class Gelu(Dual):
    """phi(x) = x Phi(x), with Phi the normal distribution function; not its approximation by tanh."""

    def phi(self, x: Floats) -> Floats:
        return jax.nn.gelu(x, approximate=False)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        a, b = 1.0 + q, 1.0 + p
        bend = q * p + c**2 * (1.0 - q / a - p / b)
        angle = arcsin(c / (jnp.sqrt(a) * jnp.sqrt(b)))
        return 0.25 * c + (c * angle + bend / jnp.sqrt(_determinant(q, p, c))) / (2.0 * math.pi)

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        a, b = 1.0 + q, 1.0 + p
        rest = 1.0 - q / a - p / b
        determinant = _determinant(q, p, c)
        angle = arcsin(c / (jnp.sqrt(a) * jnp.sqrt(b)))
        bend = (q * p + c**2 * rest) / determinant
        return 0.25 + (angle + c * (1.0 + 2.0 * rest + bend) / jnp.sqrt(determinant)) / (2.0 * math.pi)

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        a, b = 1.0 + q, 1.0 + p
        determinant = _determinant(q, p, c)
        bend = q * p + c**2 * (1.0 - q / a - p / b)
        moved = p - c**2 / a**2 - 0.5 * c**2 / a - 0.5 * b * bend / determinant
        return moved / (math.pi * jnp.sqrt(determinant))


class Sine(Dual):
    """phi(x) = sin(x)."""

    def phi(self, x: Floats) -> Floats:
        return jnp.sin(x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        # exp(-(q + p)/2) sinh c without overflow, nor cancellation at small c
        size = jnp.where(c < 0, -c, c)
        return jnp.sign(c) * -0.5 * jnp.exp(size - 0.5 * (q + p)) * jnp.expm1(-2.0 * size)

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        mean = 0.5 * (q + p)
        return 0.5 * (jnp.exp(c - mean) + jnp.exp(-c - mean))

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return -self.covariance(q, p, c)


class Cosine(Dual):
    """phi(x) = cos(x)."""

    def phi(self, x: Floats) -> Floats:
        return jnp.cos(x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return Sine().slope_covariance(q, p, c)

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return Sine().covariance(q, p, c)

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return -self.covariance(q, p, c)


class Monomial(Dual):
    """phi(x) = x^degree.

    Attributes:
        degree: at least 1; 1 is the identity.
    """

    degree: int = eqx.field(static=True)

    def __check_init__(self):
        errors.check_count("degree", self.degree)

    def phi(self, x: Floats) -> Floats:
        return x**self.degree

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return _moment(self.degree, self.degree, q, p, c)

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        return self.degree**2 * _moment(self.degree - 1, self.degree - 1, q, p, c)

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        if self.degree == 1:
            return jnp.zeros_like(q * p * c)
        return self.degree * (self.degree - 1) * _moment(self.degree - 2, self.degree, q, p, c)


def _determinant(q: Floats, p: Floats, c: Floats) -> Floats:
    """(1 + q)(1 + p) - c^2, at least 1 whatever the rounding of large variances; derivatives pass through."""
    excess = q * p - c**2
    return 1.0 + q + p + excess + jax.lax.stop_gradient(jnp.maximum(excess, 0.0) - excess)


def _moment(m: int, n: int, q: Floats, p: Floats, c: Floats) -> Floats:
    """E u^m v^n, by Isserlis: j of the pairs are mixed. m and n are of the same parity."""
    total = jnp.zeros_like(q * p * c)
    for j in range(min(m, n), -1, -2):
        pairings = _odd_factorial(m - j) * _odd_factorial(n - j)
        count = math.factorial(j) * math.comb(m, j) * math.comb(n, j) * pairings
        total += count * q ** ((m - j) // 2) * p ** ((n - j) // 2) * c**j
    return total


def _odd_factorial(n: int) -> int:
    """(n - 1)!! = 1 * 3 * ... * (n - 1) for even n."""
    return reduce(lambda product, factor: product * factor, range(1, n, 2), 1)


def erf() -> Erf:
    """The dual of the error function, a sigmoid.

    Example:
        >>> from bayesinf.models import nngp
        >>> round(float(nngp.erf().v(0.5)), 6)  # (2 / pi) asin(1/2)
        0.333333
    """
    return Erf()


def gelu() -> Gelu:
    """The dual of x Phi(x), the Gaussian error linear unit."""
    return Gelu()


def sin() -> Sine:
    """The dual of a sine."""
    return Sine()


def cos() -> Cosine:
    """The dual of a cosine."""
    return Cosine()


def monomial(degree: int) -> Monomial:
    """The dual of x^degree.

    Args:
        degree: at least 1; 1 is the identity, of linear networks.

    Raises:
        ValueError: it is less, or not a whole number.
    """
    return Monomial(degree)
