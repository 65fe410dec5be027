"""Nonlinear dynamics with additive Gaussian noise, observed linearly: any drift, and every optimal law in closed form.

    x_0 ~ N(m0, P0),   x_t = f(x_{t-1}, t) + q_t,  q_t ~ N(0, Q),   y_t = C x_t + d + r_t,  r_t ~ N(0, R)

Given x_{t-1}, (x_t, y_t) is Gaussian, so that p(x_t | x_{t-1}, y_t) and p(y_t | x_{t-1}) are known exactly.

References:
    Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038 (section II.D, example 3).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.models.gaussian import as_floating, check_fields, gaussian
from bayesinf.models.square_root import gaussian_log_prob, update
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["NonlinearGaussian"]


class NonlinearGaussian(StateSpaceModel):
    """Any drift with additive Gaussian noise, and linear observations; d states, k observations a step.

        x_0 ~ N(m0, P0),   x_t = f(x_{t-1}, t) + N(0, Q),   y_t = C x_t + d + N(0, R)

    `proposal` is x_t | x_{t-1}, y_t and `lookahead` is log p(y_t | x_{t-1}), both exact: a guided filter that looks
    ahead is fully adapted. Their factors do not depend on the particle and are computed once a step. For a linear f
    this is `LinearGaussian`, which has an exact filter.

    Attributes:
        drift: f, of x_{t-1} and t, the time of the new state. Parameters to be learnt are leaves of an equinox module,
            or the arguments of a `jax.tree_util.Partial(function, arrays)`; what a plain function reads is constant.
        initial_mean: m0, shape (d,).
        initial_tril: Cholesky factor of P0, shape (d, d).
        transition_tril: Cholesky factor of Q, shape (d, d).
        observation_matrix: C, shape (k, d).
        observation_tril: Cholesky factor of R, shape (k, k).
        observation_offset: d, shape (k,) or a scalar.

    Raises:
        ValueError: shapes do not fit together, values are not finite, a factor is not lower triangular with a diagonal
            that is not negative, or `drift(x, t)` is of another shape than x.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def drift(x, t): return x / 2 + 25 * x / (1 + x**2) + 8 * jnp.cos(1.2 * t)
        >>> one = jnp.ones((1, 1))
        >>> model = bi.models.NonlinearGaussian(drift, jnp.zeros(1), one, 3.0 * one, one, one)
        >>> xs, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(
        ...     1, model, ys, num_particles=100, proposal="guided", lookahead=True
        ... )
        >>> filtered.estimates.mean.shape
        (50, 1)

    References:
        Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038.
    """

    drift: Callable[..., Any] = eqx.field(converter=as_pytree)
    initial_mean: Float[Array, " d"] = eqx.field(converter=as_floating("initial_mean"))
    initial_tril: Float[Array, "d d"] = eqx.field(converter=as_floating("initial_tril"))
    transition_tril: Float[Array, "d d"] = eqx.field(converter=as_floating("transition_tril"))
    observation_matrix: Float[Array, "k d"] = eqx.field(converter=as_floating("observation_matrix"))
    observation_tril: Float[Array, "k k"] = eqx.field(converter=as_floating("observation_tril"))
    observation_offset: Float[Array, "..."] = eqx.field(default=0.0, converter=as_floating("observation_offset"))

    def __check_init__(self):
        d, k = self.initial_mean.shape[-1:], self.observation_matrix.shape[-2:-1]
        expected = {
            "initial_mean": (d,),
            "initial_tril": (d + d,),
            "transition_tril": (d + d,),
            "observation_matrix": (k + d,),
            "observation_tril": (k + k,),
            "observation_offset": (k, ()),
        }
        origin = (
            f"initial_mean of shape {self.initial_mean.shape} and observation_matrix of shape "
            f"{self.observation_matrix.shape}"
        )
        check_fields(self, expected, origin)
        errors.check_arguments("drift", self.drift, "x, t")
        moved = jax.eval_shape(lambda x: self.drift(x, jnp.ones((), jnp.int32)), self.initial_mean)
        if getattr(moved, "shape", None) != d:
            raise ValueError(f"drift(x, t) must return an array of shape {d}, as initial_mean, got {moved}")

    def initial(self):
        return gaussian(self.initial_mean, self.initial_tril)

    def transition(self, x_prev: Float[Array, " d"], t: Int[Array, ""]):
        return gaussian(self.drift(x_prev, t), self.transition_tril)

    def observation(self, x: Float[Array, " d"], t: Int[Array, ""]):
        return gaussian(self.observation_matrix @ x + self.observation_offset, self.observation_tril)

    def initial_proposal(self, y: Float[Array, " k"]):
        return gaussian(*self._update(self.initial_mean, self.initial_tril, y)[:2])

    def proposal(self, x_prev: Float[Array, " d"], y: Float[Array, " k"], t: Int[Array, ""]):
        return gaussian(*self._update(self.drift(x_prev, t), self.transition_tril, y)[:2])

    def lookahead(self, x_prev: Float[Array, " d"], y: Float[Array, " k"], t: Int[Array, ""]) -> Float[Array, ""]:
        return self._update(self.drift(x_prev, t), self.transition_tril, y)[2]

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return gaussian_log_prob(jnp.zeros_like(self.initial_mean), self.transition_tril)

    def _update(self, mean: Array, tril: Array, y: Array) -> tuple[Array, Array, Array]:
        return update(mean, tril, self.observation_matrix, self.observation_offset, self.observation_tril, y)
