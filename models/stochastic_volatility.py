"""Stochastic volatility: a log-variance that wanders.

    x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_t | x_{t-1} ~ N(mu + phi (x_{t-1} - mu), sigma^2)
    y_t | x_t ~ N(0, exp(x_t))

References:
    Kim, Shephard and Chib (1998), doi:10.1111/1467-937X.00050.
    Pitt and Shephard (1999), doi:10.1080/01621459.1999.10474153 (the guided proposal).
"""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["StochasticVolatility"]


class StochasticVolatility(StateSpaceModel):
    """Returns y_t whose log-variance x_t is a stationary autoregression.

        x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_t | x_{t-1} ~ N(mu + phi (x_{t-1} - mu), sigma^2)
        y_t | x_t ~ N(0, exp(x_t))

    For a guided filter, x_t is proposed from a Gaussian at the mode of its law given x_{t-1} and y_t, with the scale of
    the transition: as the observation density is log-concave in x, weights are then bounded.

    Attributes:
        mean: mu, the mean log-variance.
        persistence: phi in (-1, 1).
        scale: sigma > 0.

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
    """

    mean: Float[Array, ""] = eqx.field(converter=errors.as_array("mean"))
    persistence: Float[Array, ""] = eqx.field(converter=errors.as_array("persistence"))
    scale: Float[Array, ""] = eqx.field(converter=errors.as_array("scale"))

    def __check_init__(self):
        errors.check_positive("scale", self.scale)
        if errors.is_concrete(self.persistence) and not np.all(np.abs(np.asarray(self.persistence)) < 1):
            raise ValueError(f"persistence must lie in (-1, 1), got {self.persistence}: x has no stationary law else")

    def initial(self):
        return dist.Normal(self.mean, self._initial_scale())

    def transition(self, x_prev: Float[Array, ""], t: Int[Array, ""]):
        return dist.Normal(self._predict(x_prev), self.scale)

    def observation(self, x: Float[Array, ""], t: Int[Array, ""]):
        return dist.Normal(0.0, jnp.exp(0.5 * x))

    def initial_proposal(self, y: Float[Array, ""]):
        scale = self._initial_scale()
        return dist.Normal(_mode(self.mean, scale, y), scale)

    def proposal(self, x_prev: Float[Array, ""], y: Float[Array, ""], t: Int[Array, ""]):
        return dist.Normal(_mode(self._predict(x_prev), self.scale, y), self.scale)

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return -jnp.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def _initial_scale(self) -> Array:
        return self.scale / jnp.sqrt(1.0 - self.persistence**2)

    def _predict(self, x_prev: Array) -> Array:
        return self.mean + self.persistence * (x_prev - self.mean)


def _mode(mean: Array, scale: Array, y: Array) -> Array:
    """The mode of N(x; mean, scale^2) N(y; 0, exp(x)) in x; the mean where y is missing.

    It solves w exp(w) = z for w = x - c, where c = mean - scale^2 / 2 and z = scale^2 y^2 exp(-c) / 2.

    References:
        Iacono and Boyd (2017), doi:10.1007/s10444-017-9530-3 (the start).
    """
    is_missing = jnp.isnan(y)
    c = mean - 0.5 * scale**2
    z = 0.5 * (scale * jnp.where(is_missing, 0.0, y)) ** 2 * jnp.exp(-c)
    w = jnp.log1p(z)
    w = w * (1.0 - jnp.log1p(w) / (2.0 + w))
    for _ in range(2):  # Newton, from a good start; any other point would do for a proposal
        w = (w**2 + z * jnp.exp(-w)) / (w + 1.0)
    return jnp.where(is_missing, mean, c + w)
