"""The chaotic recurrent neural network, seen through heavy-tailed noise.

    x_0 ~ N(0, s^2 I),   x_t = x_{t-1} + (Delta / tau) (gamma W tanh(x_{t-1}) - x_{t-1}) + N(0, q^2 I)
    y_t = x_t + r e_t,   e_t of independent components, Student's t with nu degrees of freedom

References:
    Sompolinsky, Crisanti and Sommers (1988), doi:10.1103/PhysRevLett.61.259 (the network, and its chaos for gamma > 1).
    Campbell, Shi, Rainforth and Doucet (2021), arXiv:2110.13549 (the state-space model).
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), arXiv:2301.00900 (learning it).
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["ChaoticRNN"]

_POSITIVE = (
    "time_constant",
    "time_step",
    "transition_scale",
    "observation_scale",
    "degrees_of_freedom",
    "initial_scale",
)


class ChaoticRNN(StateSpaceModel):
    """A network of d rates x, by Euler steps with noise; every rate is observed with noise of Student's t.

        x_0 ~ N(0, s^2 I),   x_t = x_{t-1} + (Delta / tau) (gamma W tanh(x_{t-1}) - x_{t-1}) + N(0, q^2 I)
        y_t = x_t + r e_t,   e_t of independent components, Student's t with nu degrees of freedom

    The defaults are those of the literature. The law of x_t given x_{t-1} and y_t is of independent components, each
    with one mode near the prediction and one near y_t where these are far apart. A guided filter proposes each from an
    even mixture of the transition, and of the Gaussian that y_t leaves of it where r e_t is taken for a Gaussian whose
    variance is larger the farther off y_t is. As the transition is a part of it, weights are bounded.

    Attributes:
        coupling: W, shape (d, d).
        gain: gamma; for large d and W of independent entries of variance 1/d, rest is unstable for gamma > 1.
        time_constant: tau > 0.
        time_step: Delta > 0.
        transition_scale: q > 0.
        observation_scale: r > 0.
        degrees_of_freedom: nu > 0; for nu <= 2 the noise has no variance.
        initial_scale: s > 0.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.ChaoticRNN.random(0, num_states=5)
        >>> xs, ys = bi.models.simulate(1, model, num_steps=100)
        >>> xs.shape, ys.shape
        ((100, 5), (100, 5))

    References:
        Campbell, Shi, Rainforth and Doucet (2021), arXiv:2110.13549.
    """

    coupling: Float[Array, "d d"] = eqx.field(converter=as_floating("coupling"))
    gain: Float[Array, ""] = eqx.field(default=2.5, converter=as_floating("gain"))
    time_constant: Float[Array, ""] = eqx.field(default=0.025, converter=as_floating("time_constant"))
    time_step: Float[Array, ""] = eqx.field(default=0.001, converter=as_floating("time_step"))
    transition_scale: Float[Array, ""] = eqx.field(default=0.1, converter=as_floating("transition_scale"))
    observation_scale: Float[Array, ""] = eqx.field(default=0.1, converter=as_floating("observation_scale"))
    degrees_of_freedom: Float[Array, ""] = eqx.field(default=2.0, converter=as_floating("degrees_of_freedom"))
    initial_scale: Float[Array, ""] = eqx.field(default=1.0, converter=as_floating("initial_scale"))

    def __check_init__(self):
        shape = self.coupling.shape
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"coupling must have shape (d, d), got {shape}")
        for name in _POSITIVE:
            errors.check_positive_scalar(name, getattr(self, name))

    @classmethod
    def random(cls, key: errors.KeyLike, num_states: int = 5, **parameters: Any) -> "ChaoticRNN":
        """A network of random coupling, W_ij ~ N(0, 1/d).

        Args:
            key: PRNG key or seed.
            num_states: d, at least 1.
            parameters: the other attributes.
        """
        errors.check_count("num_states", num_states)
        coupling = jax.random.normal(errors.as_key(key), (num_states, num_states)) / math.sqrt(num_states)
        return cls(coupling, **parameters)

    def initial(self):
        return dist.Normal(jnp.zeros(self.coupling.shape[0]), self.initial_scale).to_event(1)

    def transition(self, x_prev: Float[Array, " d"], t: Int[Array, ""]):
        return dist.Normal(self._predict(x_prev), self.transition_scale).to_event(1)

    def observation(self, x: Float[Array, " d"], t: Int[Array, ""]):
        return dist.StudentT(self.degrees_of_freedom, x, self.observation_scale).to_event(1)

    def initial_proposal(self, y: Float[Array, " d"]):
        return self._guided(jnp.zeros(self.coupling.shape[0]), self.initial_scale, y)

    def proposal(self, x_prev: Float[Array, " d"], y: Float[Array, " d"], t: Int[Array, ""]):
        return self._guided(self._predict(x_prev), self.transition_scale, y)

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return -self.coupling.shape[0] * (jnp.log(self.transition_scale) + 0.5 * math.log(2 * math.pi))

    def _predict(self, x_prev: Array) -> Array:
        velocity = (self.gain * self.coupling @ jnp.tanh(x_prev) - x_prev) / self.time_constant
        return x_prev + self.time_step * velocity

    def _guided(self, mean: Array, scale: Array, y: Array) -> dist.Distribution:
        is_missing = jnp.isnan(y)
        nu, variance = self.degrees_of_freedom, scale**2
        residual = jnp.where(is_missing, mean, y) - mean
        # the weight of y in iterated least squares, r^2 over the variance it is taken to have
        trust = (nu + 1.0) / (nu + residual**2 / (variance + self.observation_scale**2))
        gain = jnp.where(is_missing, 0.0, variance * trust / (variance * trust + self.observation_scale**2))
        locs = jnp.stack([mean, mean + gain * residual], axis=-1)
        scales = scale * jnp.stack([jnp.ones_like(gain), jnp.sqrt(1.0 - gain)], axis=-1)
        even = dist.Categorical(probs=jnp.full_like(locs, 0.5))
        return dist.MixtureSameFamily(even, dist.Normal(locs, scales)).to_event(1)
