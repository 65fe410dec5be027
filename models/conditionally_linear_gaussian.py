"""Linear Gaussian given an outer process: switching Kalman filters, dynamics that depend on a latent path.

    u_0 ~ outer_initial(),          u_t | u_{t-1} ~ outer_transition(u_{t-1}, t)
    z_0 | u_0 ~ N(m0, P0),          z_t = A z_{t-1} + b + N(0, Q),          y_t = C z_t + d + N(0, R)

where m0, P0 depend on u_0; A, b, Q on u_{t-1}, u_t and t; C, d, R on u_t and t. Given u all of it is Gaussian.

References:
    Chen and Liu (2000), doi:10.1111/1467-9868.00246 (mixture Kalman filters).
    Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038 (section IV).
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import weights
from bayesinf.models import square_root
from bayesinf.models.gaussian import gaussian
from bayesinf.models.nested import Nested, NestedModel
from bayesinf.models.state_space import Law, log_prob, sample

__all__ = ["ConditionallyLinearGaussian", "GaussianBelief"]


class GaussianBelief(NamedTuple):
    """N(mean, tril tril^T)."""

    mean: Float[Array, " d"]
    tril: Float[Array, "d d"]


class ConditionallyLinearGaussian(NestedModel):
    """Linear Gaussian states and observations, given an outer process of any kind.

    Subclasses define the five methods below; parameters are fields. A model is one on `Nested(outer, inner)` for every
    algorithm of state-space models; `Marginalized(model)` is the same with the inner states integrated out.

    Raises:
        ValueError: a method does not return the three (at time 0: two) arrays asked for, in shapes that fit.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> class Switching(bi.models.ConditionallyLinearGaussian):
        ...     stay: float                                   # two regimes: a calm level and a wild one
        ...     def outer_initial(self): return dist.Categorical(jnp.array([0.5, 0.5]))
        ...     def outer_transition(self, u_prev, t):
        ...         return dist.Categorical(jnp.where(jnp.arange(2) == u_prev, self.stay, 1 - self.stay))
        ...     def linear_initial(self, u): return jnp.zeros(1), jnp.eye(1)
        ...     def linear_transition(self, u_prev, u, t):
        ...         return 0.9 * jnp.eye(1), jnp.zeros(1), jnp.where(u == 0, 0.1, 1.0) * jnp.eye(1)
        ...     def linear_observation(self, u, t): return jnp.eye(1), jnp.zeros(1), 0.5 * jnp.eye(1)
        >>> xs, ys = bi.models.simulate(0, Switching(0.95), num_steps=50)
        >>> model = bi.models.Marginalized(Switching(0.95), outer_proposal="optimal")
        >>> filtered = bi.kernels.particle_filter(
        ...     1, model, ys, num_particles=50, proposal="guided", lookahead=True)
        >>> filtered.estimates.outer.shape, filtered.estimates.inner.mean.shape
        ((50, 2), (50, 1))

    References:
        Chen and Liu (2000), doi:10.1111/1467-9868.00246.
    """

    @abc.abstractmethod
    def outer_initial(self) -> Law:
        """The law of u_0."""

    @abc.abstractmethod
    def outer_transition(self, u_prev: PyTree, t: Int[Array, ""]) -> Law:
        """The law of u_t given u_{t-1}."""

    @abc.abstractmethod
    def linear_initial(self, u: PyTree) -> tuple[Array, Array]:
        """(m0, tril): mean of z_0, shape (d,), and Cholesky factor of its covariance, (d, d)."""

    @abc.abstractmethod
    def linear_transition(self, u_prev: PyTree, u: PyTree, t: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """(A, b, tril): shapes (d, d), (d,), (d, d), the last a factor of Q."""

    @abc.abstractmethod
    def linear_observation(self, u: PyTree, t: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """(C, d, tril): shapes (k, d), (k,), (k, k), the last a factor of R."""

    def initial(self):
        def draw(key: Key[Array, ""]) -> Nested:
            key_outer, key_inner = jax.random.split(key)
            u = sample(key_outer, self.outer_initial())
            return Nested(u, gaussian(*self._initial(u)).sample(key_inner))

        def density(x: Nested) -> Array:
            return log_prob(self.outer_initial(), x.outer) + log_prob(gaussian(*self._initial(x.outer)), x.inner)

        return draw, density

    def transition(self, x_prev: Nested, t: Int[Array, ""]):
        def law_of(u: PyTree) -> Law:
            A, b, tril = self._transition(x_prev.outer, u, t)
            return gaussian(A @ x_prev.inner + b, tril)

        outer = self.outer_transition(x_prev.outer, t)

        def draw(key: Key[Array, ""]) -> Nested:
            key_outer, key_inner = jax.random.split(key)
            u = sample(key_outer, outer)
            return Nested(u, law_of(u).sample(key_inner))

        return draw, lambda x: log_prob(outer, x.outer) + log_prob(law_of(x.outer), x.inner)

    def observation(self, x: Nested, t: Int[Array, ""]):
        C, d, tril = self._observation(x.outer, t, x.inner.shape[0])
        return gaussian(C @ x.inner + d, tril)

    def predict_outer_initial(self) -> Law:
        return self.outer_initial()

    def predict_outer(self, u_prev: PyTree, belief: GaussianBelief, t: Int[Array, ""]) -> Law:
        return self.outer_transition(u_prev, t)

    def believe_initial(self, u: PyTree) -> GaussianBelief:
        mean, tril = self._initial(u)
        return GaussianBelief(mean, square_root.triangularize(tril))

    def believe(self, u_prev: PyTree, belief: GaussianBelief, u: PyTree, t: Int[Array, ""]) -> GaussianBelief:
        A, b, tril = self._transition(u_prev, u, t)
        moved = square_root.triangularize(jnp.concatenate([A @ belief.tril, tril], axis=1))
        return GaussianBelief(A @ belief.mean + b, moved)

    def predict_observation(self, u: PyTree, belief: GaussianBelief, t: Int[Array, ""]) -> Law:
        C, d, tril = self._observation(u, t, belief.mean.shape[0])
        spread = square_root.triangularize(jnp.concatenate([C @ belief.tril, tril], axis=1))
        return gaussian(C @ belief.mean + d, spread)

    def update(self, u: PyTree, belief: GaussianBelief, y: Array, t: Int[Array, ""]) -> GaussianBelief:
        C, d, tril = self._observation(u, t, belief.mean.shape[0])
        mean, tril, _ = square_root.update(belief.mean, belief.tril, C, d, tril, y.reshape(C.shape[0]))
        return GaussianBelief(mean, tril)

    def draw_inner(self, key: Key[Array, ""], belief: GaussianBelief) -> PyTree:
        return sample(key, gaussian(belief.mean, belief.tril))

    def average(self, log_weights: Float[Array, " n"], beliefs: GaussianBelief) -> weights.Moments:
        mean, spread = weights.moments(log_weights, beliefs.mean)
        within = weights.average(log_weights, jnp.sum(beliefs.tril**2, axis=2))
        return weights.Moments(mean, jnp.sqrt(within + spread**2))

    def _initial(self, u: PyTree) -> Any:
        parts = self.linear_initial(u)
        d = jnp.shape(parts[0])[-1] if len(parts) == 2 and jnp.ndim(parts[0]) else 1
        return _as_parts("linear_initial(u)", parts, ((d,), (d, d)))

    def _transition(self, u_prev: PyTree, u: PyTree, t: Int[Array, ""]) -> Any:
        parts = self.linear_transition(u_prev, u, t)
        d = jnp.shape(parts[0])[-1] if jnp.ndim(parts[0]) else 1
        return _as_parts("linear_transition(u_prev, u, t)", parts, ((d, d), (d,), (d, d)))

    def _observation(self, u: PyTree, t: Int[Array, ""], d: int) -> Any:
        parts = self.linear_observation(u, t)
        k = jnp.shape(parts[0])[0] if jnp.ndim(parts[0]) else 1
        return _as_parts("linear_observation(u, t)", parts, ((k, d), (k,), (k, k)))


def _as_parts(name: str, parts: Any, shapes: tuple[tuple[int, ...], ...]) -> tuple[Array, ...]:
    """What a method of the user's returned, as arrays of the shapes that it must have; while tracing."""
    found = tuple(jnp.shape(part) for part in parts) if isinstance(parts, tuple) else type(parts).__name__
    if found != shapes:
        raise ValueError(f"model.{name} must return a tuple of arrays of shapes {shapes}, got {found}")
    dtype = jnp.result_type(float, *parts)
    return tuple(jnp.asarray(part, dtype) for part in parts)
