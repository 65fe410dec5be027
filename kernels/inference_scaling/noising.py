"""How a diffusion model destroys its data: a linear stochastic differential equation.

    dx = a(t) x dt + sigma(t) dW,      x_t | x_0 ~ N(alpha_t x_0, v_t I),      alpha' = a alpha,  v' = 2 a v + sigma^2

The law q_t of x_t is undone by x from t = 1, mostly noise, to t = 0 along

    dx = (a(t) x - sigma(t)^2 grad log q_t(x)) dt + sigma(t) dW      (time runs backwards)

and what is to be expected of the data, given x_t, is Tweedie's formula

    E[x_0 | x_t] = (x_t + v_t grad log q_t(x_t)) / alpha_t.

References:
    Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole (2021), ICLR, arXiv:2011.13456.
    Efron (2011), doi:10.1198/jasa.2011.tm11181 (Tweedie's formula).
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from bayesinf import errors

__all__ = ["Noising", "VariancePreserving", "check_times"]


class Noising(eqx.Module):
    """The contract: four functions of time, and what follows from them."""

    @abstractmethod
    def rate(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """a(t)."""

    @abstractmethod
    def diffusion(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """sigma(t)."""

    @abstractmethod
    def log_scale(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Log alpha_t, the integral of a."""

    @abstractmethod
    def variance(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """v_t; 0 at t = 0."""

    def drift(self, x: PyTree, t: Float[Array, ""]) -> PyTree:
        """a(t) x."""
        return jax.tree.map(lambda leaf: self.rate(t) * leaf, x)

    def divergence(self, x: PyTree, t: Float[Array, ""]) -> Float[Array, ""]:
        """Of the drift: d a(t)."""
        return self.rate(t) * sum(leaf.size for leaf in jax.tree.leaves(x))


class VariancePreserving(Noising):
    """Data of unit variance keep it: a = -b(t) / 2, sigma^2 = b(t), with b rising linearly from t = 0 to t = 1.

        b(t) = b_0 + t (b_1 - b_0),      alpha_t = exp(-B_t / 2),  v_t = 1 - exp(-B_t),  B_t = int_0^t b

    It is the limit of the denoising diffusion probabilistic model (DDPM).

    Attributes:
        minimum: b_0 > 0.
        maximum: b_1 > 0.

    Example:
        >>> from bayesinf.kernels.inference_scaling import VariancePreserving
        >>> noising = VariancePreserving()
        >>> round(float(noising.variance(1.0)), 4)
        1.0
    """

    minimum: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.1)
    maximum: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=20.0)

    def __check_init__(self):
        errors.check_positive_scalar("minimum", self.minimum)
        errors.check_positive_scalar("maximum", self.maximum)

    def rate(self, t: Float[Array, ""] | float) -> Float[Array, ""]:
        return -0.5 * self._speed(t)

    def diffusion(self, t: Float[Array, ""] | float) -> Float[Array, ""]:
        return jnp.sqrt(self._speed(t))

    def log_scale(self, t: Float[Array, ""] | float) -> Float[Array, ""]:
        return -0.5 * (self.minimum * t + 0.5 * t**2 * (self.maximum - self.minimum))

    def variance(self, t: Float[Array, ""] | float) -> Float[Array, ""]:
        return -jnp.expm1(2.0 * self.log_scale(t))

    def _speed(self, t: Float[Array, ""] | float) -> Float[Array, ""]:
        return self.minimum + t * (self.maximum - self.minimum)


def check_times(times: Float[ArrayLike, " t"]) -> Float[Array, " t"]:
    """Times from noise to data."""
    falling = errors.as_array("times", is_floating=True)(times)
    if falling.ndim != 1 or falling.size < 2:
        raise ValueError(f"times must be a vector of two or more, from noise to data, got shape {falling.shape}")
    if errors.is_concrete(falling) and not np.all(np.diff(np.asarray(falling, float)) < 0):
        raise ValueError(f"times must fall from noise to data, got {np.asarray(falling)}")
    return falling
