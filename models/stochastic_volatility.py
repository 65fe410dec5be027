"""Stochastic volatility: a log-variance that wanders.

    x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_t | x_{t-1} ~ N(mu + phi (x_{t-1} - mu), sigma^2)
    y_t | x_t ~ N(0, exp(x_t)),   or with heavy tails  y_t = exp(x_t / 2) e_t,  e_t of Student's t

References:
    Kim, Shephard and Chib (1998), doi:10.1111/1467-937X.00050.
    Harvey, Ruiz and Shephard (1994), doi:10.2307/2297980 (heavy tails).
    Pitt and Shephard (1999), doi:10.1080/01621459.1999.10474153 (the guided proposal).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["StochasticVolatility", "mode_given_return"]


class StochasticVolatility(StateSpaceModel):
    """Returns y_t whose log-variance x_t is a stationary autoregression.

        x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_t | x_{t-1} ~ N(mu + phi (x_{t-1} - mu), sigma^2)
        y_t = exp(x_t / 2) e_t,   e_t ~ N(0, 1), or Student's t with nu degrees of freedom

    For a guided filter, x_t is proposed from a Gaussian at the mode of its law given x_{t-1} and y_t, with the scale of
    the transition: as the observation density is log-concave in x, weights are then bounded.

    Attributes:
        mean: mu, the mean log-variance.
        persistence: phi in (-1, 1).
        scale: sigma > 0.
        degrees_of_freedom: nu > 0 of heavy tails; None for Gaussian returns.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.97, scale=0.2)
        >>> xs, ys = bi.models.simulate(jax.random.key(0), model, num_steps=100)
        >>> ys.shape
        (100,)

    References:
        Kim, Shephard and Chib (1998), doi:10.1111/1467-937X.00050.
        Pitt and Shephard (1999), doi:10.1080/01621459.1999.10474153 (the guided proposal).
        Harvey, Ruiz and Shephard (1994), doi:10.2307/2297980 (heavy tails).
    """

    mean: Float[Array, ""] = eqx.field(converter=errors.as_array("mean"))
    persistence: Float[Array, ""] = eqx.field(converter=errors.as_array("persistence"))
    scale: Float[Array, ""] = eqx.field(converter=errors.as_array("scale"))
    degrees_of_freedom: Float[Array, ""] | None = eqx.field(
        default=None, converter=errors.as_array("degrees_of_freedom", is_optional=True, is_floating=True)
    )

    def __check_init__(self):
        errors.check_positive("scale", self.scale)
        if self.degrees_of_freedom is not None:
            errors.check_positive("degrees_of_freedom", self.degrees_of_freedom)
        if errors.is_concrete(self.persistence) and not np.all(np.abs(np.asarray(self.persistence)) < 1):
            raise ValueError(f"persistence must lie in (-1, 1), got {self.persistence}: x has no stationary law else")

    def initial(self):
        return dist.Normal(self.mean, self._initial_scale())

    def transition(self, x_prev: Float[Array, ""], t: Int[Array, ""]):
        return dist.Normal(self._predict(x_prev), self.scale)

    def observation(self, x: Float[Array, ""], t: Int[Array, ""]):
        if self.degrees_of_freedom is None:
            return dist.Normal(0.0, jnp.exp(0.5 * x))
        return dist.StudentT(self.degrees_of_freedom, 0.0, jnp.exp(0.5 * x))

    def initial_proposal(self, y: Float[Array, ""]):
        scale = self._initial_scale()
        return dist.Normal(self._mode(self.mean, scale, y), scale)

    def proposal(self, x_prev: Float[Array, ""], y: Float[Array, ""], t: Int[Array, ""]):
        return dist.Normal(self._mode(self._predict(x_prev), self.scale, y), self.scale)

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return -jnp.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def _mode(self, mean: Array, scale: Array, y: Array) -> Array:
        return mode_given_return(mean, scale, y, self.degrees_of_freedom)

    def _initial_scale(self) -> Array:
        return self.scale / jnp.sqrt(1.0 - self.persistence**2)

    def _predict(self, x_prev: Array) -> Array:
        return self.mean + self.persistence * (x_prev - self.mean)


def mode_given_return(mean: Array, scale: Array, y: Array, degrees_of_freedom: Array | None = None) -> Array:
    """The mode in x of N(x; mean, scale^2) p(y | x) with y = exp(x / 2) e; the mean where y is missing.

    For Gaussian e it solves w exp(w) = z for w = x - c, where c = mean - scale^2 / 2 and z = scale^2 y^2 exp(-c) / 2.
    For Student's t it is approached by Newton steps, and kept to (mean - scale^2 / 2, mean + nu scale^2 / 2): within,
    p(y | x) grows no faster than the Gaussian of that scale at the mode allows, and weights are bounded.

    References:
        Iacono and Boyd (2017), doi:10.1007/s10444-017-9530-3 (the start).
    """
    is_missing = jnp.isnan(y)
    c = mean - 0.5 * scale**2
    y = jnp.where(is_missing, 0.0, y)
    if degrees_of_freedom is not None:
        return jnp.where(is_missing, mean, _mode_of_heavy_tails(mean, scale, y, degrees_of_freedom))
    z = 0.5 * (scale * y) ** 2 * jnp.exp(-c)
    w = jnp.log1p(z)
    w = w * (1.0 - jnp.log1p(w) / (2.0 + w))
    for _ in range(2):  # Newton, from a good start; any other point would do for a proposal
        w = (w**2 + z * jnp.exp(-w)) / (w + 1.0)
    return jnp.where(is_missing, mean, c + w)


def _mode_of_heavy_tails(mean: Array, scale: Array, y: Array, nu: Array) -> Array:
    """Newton's method for slope = -1/2 + (nu + 1) u / 2 in x = mean + scale^2 slope, u = y^2 / (y^2 + nu exp(x))."""
    slope = jnp.zeros_like(mean + y)
    log_ratio = jnp.log(nu) - 2.0 * jnp.log(jnp.where(y == 0.0, 1.0, jnp.abs(y)))  # of nu to y^2
    for _ in range(4):
        u = jnp.where(y == 0.0, 0.0, jax.nn.sigmoid(-(mean + scale**2 * slope) - log_ratio))
        excess = -0.5 + 0.5 * (nu + 1.0) * u - slope
        slope = slope + excess / (1.0 + 0.5 * (nu + 1.0) * scale**2 * u * (1.0 - u))
        slope = jnp.clip(slope, -0.5, 0.5 * nu)
    return mean + scale**2 * slope
