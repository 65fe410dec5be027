"""Activations with one kink, at zero: ReLU, leaky ReLU and the absolute value.

With s = sqrt(qp) and theta = arccos(c / s), for ReLU

    k = (s sin theta + (pi - theta) c) / 2 pi,      kdot = (pi - theta) / 2 pi,      v = q / 2

and for slope a below zero, phi(x) = max(x, 0) + a min(x, 0), (1 - a)^2 times these plus a c, or plus a.

References:
    Cho and Saul (2009), Kernel methods for deep learning.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.nngp.duals.angles import angle
from bayesinf.models.nngp.duals.dual import Dual, root

__all__ = ["Rectifier", "abs_", "leaky_relu", "relu"]

Floats = Float[Array, "..."]


class Rectifier(Dual):
    """phi(x) = max(x, 0) + slope min(x, 0).

    Attributes:
        slope: below zero; 0 is ReLU, -1 the absolute value.
    """

    slope: Float[Array, ""] = eqx.field(converter=as_floating("slope"))

    def __check_init__(self):
        if self.slope.shape != ():
            raise ValueError(f"slope must be a scalar, got shape {self.slope.shape}")
        errors.check_finite("slope", self.slope)

    def phi(self, x: Floats) -> Floats:
        return jnp.where(x > 0, x, self.slope.astype(x.dtype) * x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        slope = self.slope.astype(c.dtype)
        scale = jnp.sqrt(q) * jnp.sqrt(p)
        theta, sine = angle(scale, c)
        return (1.0 - slope) ** 2 * (scale * sine + (math.pi - theta) * c) / (2.0 * math.pi) + slope * c

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        slope = self.slope.astype(c.dtype)
        theta, _ = angle(root(q) * root(p), c)
        return (1.0 - slope) ** 2 * (math.pi - theta) / (2.0 * math.pi) + slope

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        slope = self.slope.astype(c.dtype)
        _, sine = angle(root(q) * root(p), c)
        ratio = jnp.where(q <= 0, 0.0, root(p) / jnp.sqrt(jnp.where(q <= 0, 1.0, q)))
        return (1.0 - slope) ** 2 * ratio * sine / (2.0 * math.pi)

    def v(self, q: Real[ArrayLike, "..."]) -> Floats:
        return self.vdot(q) * q

    def vdot(self, q: Real[ArrayLike, "..."]) -> Floats:
        return jnp.full_like(q, 0.5 * (1.0 + self.slope**2), dtype=jnp.result_type(q, 1.0))


def relu() -> Rectifier:
    """The dual of max(x, 0).

    Example:
        >>> from bayesinf.models import nngp
        >>> float(nngp.relu().v(2.0))
        1.0
    """
    return Rectifier(0.0)


def leaky_relu(slope: Real[ArrayLike, ""] = 0.01) -> Rectifier:
    """The dual of max(x, 0) + slope min(x, 0).

    Args:
        slope: below zero.
    """
    return Rectifier(slope)


def abs_() -> Rectifier:
    """The dual of |x|."""
    return Rectifier(-1.0)
