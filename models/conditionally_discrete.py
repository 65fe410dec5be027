"""A hidden Markov chain of regimes that drives an outer process: the regimes are integrated out.

    r_0 ~ regime_initial(),    r_t | r_{t-1} ~ regime_transition(u_{t-1}, t)[r_{t-1}]      r_t in 0..K-1
    u_0 | r_0 ~ outer_initial(r_0),    u_t | u_{t-1}, r_t ~ outer_transition(u_{t-1}, r_t, t)
    y_t | u_t, r_t ~ observation((u_t, r_t), t)

Given the path u and the observations, the law of r_t is that of the filter of a hidden Markov model whose emissions are
u_t and y_t. Where u_t is drawn from, the regimes are averaged over: sum_k p(r_t = k | past) p(u_t | u_{t-1}, k).

References:
    Doucet, de Freitas, Murphy and Russell (2000), https://arxiv.org/abs/1301.3853.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import weights
from bayesinf.models.nested import Nested, NestedModel
from bayesinf.models.state_space import Law, log_prob, observation_log_prob, sample

__all__ = ["ConditionallyDiscrete", "DiscreteBelief"]


class DiscreteBelief(NamedTuple):
    """The probabilities of the regimes, as logarithms: one that underflows today may be the only one left tomorrow."""

    log_probabilities: Float[Array, " k"]

    @property
    def probabilities(self) -> Float[Array, "*particles k"]:
        """The probabilities, of one belief or of those of all particles; zeros where no regime explains the data."""
        return jnp.exp(self.log_probabilities)


class ConditionallyDiscrete(NestedModel):
    """An outer process of any kind, driven by a hidden Markov chain of K regimes.

    Subclasses define the five methods below; parameters are fields. A model is one on `Nested(outer, inner)`, the inner
    state a regime of type int32, for every algorithm of state-space models; `Marginalized(model)` is the same
    with the regimes integrated out, at K times the cost of a density.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> class SwitchingVolatility(bi.models.ConditionallyDiscrete):
        ...     means: jax.Array                              # of the log volatility, by regime
        ...     stay: float
        ...     def regime_initial(self): return jnp.array([0.5, 0.5])
        ...     def regime_transition(self, u_prev, t):
        ...         return jnp.array([[self.stay, 1 - self.stay], [1 - self.stay, self.stay]])
        ...     def outer_initial(self, r): return dist.Normal(self.means[r], 0.5)
        ...     def outer_transition(self, u_prev, r, t):
        ...         return dist.Normal(self.means[r] + 0.9 * (u_prev - self.means[r]), 0.2)
        ...     def observation(self, x, t): return dist.Normal(0.0, jnp.exp(x.outer / 2))
        >>> model = SwitchingVolatility(jnp.array([-2.0, 1.0]), 0.95)
        >>> xs, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(
        ...     1, bi.models.Marginalized(model), ys, num_particles=100, proposal="guided")
        >>> filtered.estimates.inner.shape
        (50, 2)

    References:
        Doucet, de Freitas, Murphy and Russell (2000), https://arxiv.org/abs/1301.3853.
    """

    @abc.abstractmethod
    def regime_initial(self) -> Float[Array, " k"]:
        """The probabilities of r_0."""

    @abc.abstractmethod
    def regime_transition(self, u_prev: PyTree, t: Int[Array, ""]) -> Float[Array, "k k"]:
        """The probabilities of r_t, a row for every r_{t-1}."""

    @abc.abstractmethod
    def outer_initial(self, r: Int[Array, ""]) -> Law:
        """The law of u_0 given r_0."""

    @abc.abstractmethod
    def outer_transition(self, u_prev: PyTree, r: Int[Array, ""], t: Int[Array, ""]) -> Law:
        """The law of u_t given u_{t-1} and r_t."""

    def initial(self):
        return _nested(self._initial(), self.outer_initial)

    def transition(self, x_prev: Nested, t: Int[Array, ""]):
        log_p = self._transition(x_prev.outer, t)[x_prev.inner]
        return _nested(log_p, lambda r: self.outer_transition(x_prev.outer, r, t))

    def predict_outer_initial(self) -> Law:
        return _mixture(self._initial(), self.outer_initial)

    def predict_outer(self, u_prev: PyTree, belief: DiscreteBelief, t: Int[Array, ""]) -> Law:
        return _mixture(self._predict(u_prev, belief, t), lambda r: self.outer_transition(u_prev, r, t))

    def believe_initial(self, u: PyTree) -> DiscreteBelief:
        return _weigh(self._initial(), lambda r: log_prob(self.outer_initial(r), u))

    def believe(self, u_prev: PyTree, belief: DiscreteBelief, u: PyTree, t: Int[Array, ""]) -> DiscreteBelief:
        return _weigh(self._predict(u_prev, belief, t), lambda r: log_prob(self.outer_transition(u_prev, r, t), u))

    def predict_observation(self, u: PyTree, belief: DiscreteBelief, t: Int[Array, ""]) -> Law:
        def draw(key: Key[Array, ""]) -> PyTree:
            key_regime, key_y = jax.random.split(key)
            r = self.draw_inner(key_regime, belief)
            return sample(key_y, self.observation(Nested(u, r), t))

        def density(y: PyTree) -> Array:
            return _sum_over(belief.log_probabilities, lambda r: observation_log_prob(self, Nested(u, r), y, t))

        return draw, density

    def update(self, u: PyTree, belief: DiscreteBelief, y: PyTree, t: Int[Array, ""]) -> DiscreteBelief:
        return _weigh(belief.log_probabilities, lambda r: observation_log_prob(self, Nested(u, r), y, t))

    def draw_inner(self, key: Key[Array, ""], belief: DiscreteBelief) -> Int[Array, ""]:
        return _draw_regime(key, belief.log_probabilities)

    def average(self, log_weights: Float[Array, " n"], beliefs: DiscreteBelief) -> Float[Array, " k"]:
        return weights.average(log_weights, beliefs.probabilities)

    def _initial(self) -> Array:
        p = jnp.asarray(self.regime_initial(), float)
        if p.ndim != 1:
            raise ValueError(f"model.regime_initial() must return a vector of K probabilities, got shape {p.shape}")
        return jnp.log(p)

    def _predict(self, u_prev: PyTree, belief: DiscreteBelief, t: Int[Array, ""]) -> Array:
        return weights.log_sum_exp(belief.log_probabilities[:, None] + self._transition(u_prev, t), axis=0)

    def _transition(self, u_prev: PyTree, t: Int[Array, ""]) -> Array:
        num = self._initial().shape[0]
        p = jnp.asarray(self.regime_transition(u_prev, t), float)
        if p.shape != (num, num):
            raise ValueError(
                f"model.regime_transition(u_prev, t) must return probabilities of shape {(num, num)}, to fit "
                f"regime_initial(), got shape {p.shape}"
            )
        return jnp.log(p)


def _draw_regime(key: Key[Array, ""], log_p: Array) -> Int[Array, ""]:
    return jax.random.categorical(key, log_p).astype(jnp.int32)


def _nested(log_p: Array, outer: Callable[[Array], Law]) -> Law:
    """The joint law of a regime and of the outer state given it."""

    def draw(key: Key[Array, ""]) -> Nested:
        key_regime, key_outer = jax.random.split(key)
        r = _draw_regime(key_regime, log_p)
        return Nested(sample(key_outer, outer(r)), r)

    return draw, lambda x: log_p[x.inner] + log_prob(outer(x.inner), x.outer)


def _mixture(log_p: Array, outer: Callable[[Array], Law]) -> Law:
    """The law of the outer state, averaged over the regimes."""
    draw, _ = _nested(log_p, outer)
    return lambda key: draw(key).outer, lambda u: _sum_over(log_p, lambda r: log_prob(outer(r), u))


def _each(log_p: Array, log_density: Callable[[Array], Array]) -> Array:
    """Log p_r density(r) of every regime."""
    return weights.clean(log_p + jax.vmap(log_density)(jnp.arange(log_p.shape[0], dtype=jnp.int32)))


def _sum_over(log_p: Array, log_density: Callable[[Array], Array]) -> Array:
    return weights.log_sum_exp(_each(log_p, log_density))


def _weigh(log_p: Array, log_density: Callable[[Array], Array]) -> DiscreteBelief:
    """The law of the regimes given what has this density; -inf where no regime explains it."""
    return DiscreteBelief(weights.normalize(_each(log_p, log_density))[0])
