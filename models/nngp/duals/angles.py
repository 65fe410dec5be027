"""Arcus sine and cosine as polynomials, which compilers vectorise.

    asin(r) = r P(r^2) for 0 <= r <= 1/2,      asin(r) = pi/2 - 2 asin(sqrt((1 - r) / 2)) above

P is a Chebyshev series, of degree 13 in float64 and 6 in float32: within two units in the last place. On CPUs JAX's
own functions call the C library element by element, some fifty times slower, and they are most of the work of a
kernel matrix.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf.models.nngp.duals.dual import root

__all__ = ["angle", "arcsin"]

Floats = Float[Array, "..."]


def _series(degree: int) -> list[float]:
    """Chebyshev coefficients of asin(sqrt(y)) / sqrt(y) on [0, 1/4]."""
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    r = np.sqrt((nodes + 1.0) / 8.0)
    return np.polynomial.chebyshev.chebfit(nodes, np.arcsin(r) / r, degree).tolist()


DOUBLE, SINGLE = _series(13), _series(6)


def _half(r: Floats, y: Floats) -> Floats:
    """asin(r) for 0 <= r <= 1/2 and y = r^2, by Clenshaw's recurrence."""
    z = 8.0 * y - 1.0
    first, second = jnp.zeros_like(z), jnp.zeros_like(z)
    coefficients = DOUBLE if r.dtype == jnp.float64 else SINGLE
    for coefficient in coefficients[:0:-1]:
        first, second = coefficient + 2.0 * z * first - second, first
    return r * (coefficients[0] + z * first - second)


def arcsin(x: Floats) -> Floats:
    """asin(x) for |x| <= 1; of derivative zero at the ends."""
    size = jnp.abs(x)
    is_small = size <= 0.5
    y = jnp.where(is_small, size * size, 0.5 * (1.0 - size))
    half = _half(jnp.where(is_small, size, root(y)), y)
    return jnp.sign(x) * jnp.where(is_small, half, 0.5 * math.pi - 2.0 * half)


def angle(scale: Floats, c: Floats) -> tuple[Floats, Floats]:
    """The angle between two vectors of inner product c, the product of whose lengths is `scale`, and its sine.

    Where c is within rounding of +-scale the two are taken as parallel: an angle is the square root of that difference
    and would turn an error of 1e-16 into one of 1e-8, at every pair of equal inputs.

    Args:
        scale: at least zero; where it is zero the angle is pi/2.
        c: |c| <= scale.

    Returns:
        theta in [0, pi] and sin(theta), of zero derivative where the vectors are parallel.
    """
    is_zero = scale <= 0
    scale, size = jnp.where(is_zero, 1.0, scale), jnp.where(is_zero, 0.0, jnp.abs(c))
    size, gap = size / scale, (scale - size) / scale  # near zero the gap is exact, unlike 1 - size
    gap = jnp.where(gap <= 8.0 * jnp.finfo(gap.dtype).eps, 0.0, gap)
    sine = root(gap * (2.0 - gap))
    is_small = size <= 0.5
    y = jnp.where(is_small, size * size, 0.5 * gap)
    half = _half(jnp.where(is_small, size, root(y)), y)
    acute = jnp.where(is_small, 0.5 * math.pi - half, 2.0 * half)
    return jnp.where(c >= 0, acute, math.pi - acute), sine
