"""Stochastic volatility with leverage: a fall of the price raises the volatility that follows.

    x_{t+1} = mu + phi (x_t - mu) + sigma eta_t,   y_t = exp(x_t / 2) e_t,   corr(e_t, eta_t) = rho

Two shocks of correlation rho have a common part, here a state of its own: for w_t ~ N(0, 1), and a b = rho,

    e_t = a w_t + sqrt(1 - a^2) e'_t,   eta_t = b w_t + sqrt(1 - b^2) eta'_t,   a^2 = (1 + rho^2) / 2

which is the same law of all x and y. In (x_t, w_t) both the transition and the observation have densities. In the
states that come to mind first they have not: (x_t, x_{t+1}) and (x_t, eta_t) leave x_{t+1} known, so that nothing can
be drawn backward in time; (x_t, e_t) leaves y_t known. With y_{t-1} as a part of the transition x_t would be enough,
but such a model holds its data and cannot be simulated. The choice of a is smooth in rho, at 0 too, and a^2, b^2 < 1.

References:
    Harvey and Shephard (1996), doi:10.1080/07350015.1996.10524672.
    Yu (2005), doi:10.1016/j.jeconom.2004.08.002 (why it is the shock of the next state).
    Omori, Chib, Shephard and Nakajima (2007), doi:10.1016/j.jeconom.2006.07.008 (heavy tails).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.state_space import Law, StateSpaceModel
from bayesinf.models.stochastic_volatility import mode_given_return

__all__ = ["LeverageVolatility"]


class LeverageVolatility(StateSpaceModel):
    """Returns y_t whose shocks are correlated with the next log-variance x_{t+1}, with or without heavy tails.

        x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_{t+1} = mu + phi (x_t - mu) + sigma eta_t
        y_t = exp(x_t / 2) e_t / sqrt(g_t),   (e_t, eta_t) standard normal with correlation rho
        g_t = 1, or heavy tails: g_t ~ Gamma(nu / 2, nu / 2), so that e_t / sqrt(g_t) is Student's t

    States are arrays (x_t, w_t), or (x_t, w_t, log g_t) with heavy tails, where w_t is the common part of both shocks
    (see the module's docstring): every transition has a density. For a guided filter, x_t is proposed from a Gaussian
    at the mode of its law given the state before and y_t, as in `StochasticVolatility`, and w_t and g_t from their
    exact laws given x_t and y_t. So weights depend on x_t alone and are bounded; prefer this to the bootstrap filter,
    which draws w_t blindly.

    Attributes:
        mean: mu, the mean log-variance.
        persistence: phi in (-1, 1).
        scale: sigma > 0.
        correlation: rho in (-1, 1); negative for leverage.
        degrees_of_freedom: nu > 0 of heavy tails; None for Gaussian returns.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LeverageVolatility(mean=-1.0, persistence=0.97, scale=0.2, correlation=-0.6)
        >>> xs, ys = bi.models.simulate(0, model, num_steps=100)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=100, proposal="guided")
        >>> xs.shape, filtered.estimates.mean.shape
        ((100, 2), (100, 2))

    References:
        Harvey and Shephard (1996), doi:10.1080/07350015.1996.10524672.
        Omori, Chib, Shephard and Nakajima (2007), doi:10.1016/j.jeconom.2006.07.008.
    """

    mean: Float[Array, ""] = eqx.field(converter=as_floating("mean"))
    persistence: Float[Array, ""] = eqx.field(converter=as_floating("persistence"))
    scale: Float[Array, ""] = eqx.field(converter=as_floating("scale"))
    correlation: Float[Array, ""] = eqx.field(converter=as_floating("correlation"))
    degrees_of_freedom: Float[Array, ""] | None = eqx.field(
        default=None, converter=errors.as_array("degrees_of_freedom", is_optional=True, is_floating=True)
    )

    def __check_init__(self):
        errors.check_positive("scale", self.scale)
        if self.degrees_of_freedom is not None:
            errors.check_positive("degrees_of_freedom", self.degrees_of_freedom)
        for name in ("persistence", "correlation"):
            value = getattr(self, name)
            if errors.is_concrete(value) and not np.all(np.abs(np.asarray(value)) < 1):
                raise ValueError(f"{name} must lie in (-1, 1), got {value}")

    def initial(self):
        return self._law(self.mean, self._initial_scale())

    def transition(self, x_prev: Float[Array, " d"], t: Int[Array, ""]):
        return self._law(*self._predict(x_prev))

    def observation(self, x: Float[Array, " d"], t: Int[Array, ""]):
        a, _ = self._loadings()
        scale = jnp.exp(0.5 * (x[0] if self.degrees_of_freedom is None else x[0] - x[2]))
        return dist.Normal(scale * a * x[1], scale * jnp.sqrt(1.0 - a**2))

    def initial_proposal(self, y: Float[Array, ""]):
        return self._guided(self.mean, self._initial_scale(), y)

    def proposal(self, x_prev: Float[Array, " d"], y: Float[Array, ""], t: Int[Array, ""]):
        return self._guided(*self._predict(x_prev), y)

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        _, b = self._loadings()
        bound = -jnp.log(self.scale) - 0.5 * jnp.log(1.0 - b**2) - math.log(2 * math.pi)
        if self.degrees_of_freedom is None:
            return bound
        half = 0.5 * self.degrees_of_freedom
        return bound + _log_gamma_density(0.0, half, half)

    def _loadings(self) -> tuple[Array, Array]:
        """How much of either shock is common: a and b."""
        a = jnp.sqrt(0.5 * (1.0 + self.correlation**2))
        return a, self.correlation / a

    def _initial_scale(self) -> Array:
        return self.scale / jnp.sqrt(1.0 - self.persistence**2)

    def _predict(self, x_prev: Array) -> tuple[Array, Array]:
        """Mean and scale of the next log-variance."""
        _, b = self._loadings()
        mean = self.mean + self.persistence * (x_prev[0] - self.mean) + self.scale * b * x_prev[1]
        return mean, self.scale * jnp.sqrt(1.0 - b**2)

    def _law(self, mean: Array, scale: Array) -> Law:
        """The law of a state: x ~ N(mean, scale^2), and a fresh w and g."""
        zero, one = jnp.zeros_like(mean), jnp.ones_like(mean)
        if self.degrees_of_freedom is None:
            return dist.Normal(jnp.stack([mean, zero]), jnp.stack([scale, one])).to_event(1)
        half = 0.5 * self.degrees_of_freedom
        return _joint(mean, scale, lambda x: (half, half), lambda x, log_g: (zero, one))

    def _guided(self, mean: Array, scale: Array, y: Array) -> Law:
        """Draws x near its mode given y, then g | x, y and w | x, g, y exactly; both are fresh where y is missing."""
        is_missing = jnp.isnan(y)
        nu = self.degrees_of_freedom
        mode = mode_given_return(mean, scale, y, nu)
        a = jnp.where(is_missing, 0.0, self._loadings()[0])

        def standardized(x):
            return jnp.where(is_missing, 0.0, y) * jnp.exp(-0.5 * x)

        def common(x, log_g):
            return a * standardized(x) * jnp.exp(0.5 * log_g), jnp.sqrt(1.0 - a**2)

        if nu is None:
            return _joint(mode, scale, None, common)

        def precision(x):
            return 0.5 * (nu + jnp.where(is_missing, 0.0, 1.0)), 0.5 * (nu + standardized(x) ** 2)

        return _joint(mode, scale, precision, common)


def _joint(mean, scale, precision, common) -> Law:
    """The law of x ~ N(mean, scale^2), g | x ~ Gamma(*precision(x)) if there is one, w | x, g ~ N(*common(x, g))."""

    def sample(key):
        key_x, key_w, key_g = jax.random.split(key, 3)
        x = mean + scale * jax.random.normal(key_x, dtype=jnp.result_type(mean))
        log_g = jnp.zeros_like(x)
        if precision is not None:
            shape, rate = precision(x)
            log_g = jax.random.loggamma(key_g, shape, dtype=x.dtype) - jnp.log(rate)
        w_mean, w_scale = common(x, log_g)
        w = w_mean + w_scale * jax.random.normal(key_w, dtype=x.dtype)
        return jnp.stack([x, w] if precision is None else [x, w, log_g])

    def log_prob(state):
        x, w, log_g = state[0], state[1], 0.0 if precision is None else state[2]
        density = dist.Normal(mean, scale).log_prob(x) + dist.Normal(*common(x, log_g)).log_prob(w)
        return density if precision is None else density + _log_gamma_density(log_g, *precision(x))

    return sample, log_prob


def _log_gamma_density(log_g, shape, rate) -> Array:
    """Of the logarithm of a Gamma variable; it is largest at log(shape / rate)."""
    return shape * (jnp.log(rate) + log_g) - rate * jnp.exp(log_g) - gammaln(shape)
