"""Rao-Blackwellised particle filters: the inner states of a nested model are integrated out, exactly.

    u_t^i ~ q(u_t | u_{0:t-1}^i, y_{0:t}),        w_t^i = (what is carried) p(y_t | u_{0:t}^i, y_{0:t-1}) p / q

with p(u_t | u_{0:t-1}, y_{0:t-1}) and p(y_t | u_{0:t}, y_{0:t-1}) from the exact filter of z given u that each particle
carries with it. E[Zhat] = Z as for every particle filter; var(Zhat) is never more than that of particles of (u, z) with
the same q for u, as the weight is the expectation of theirs.

The proposals q: "transition" is p(u_t | u_{0:t-1}, y_{0:t-1}) itself. "optimal" weighs every value of a u_t that has
finitely many by p(y_t | u_{0:t}, y_{0:t-1}); with lookahead=True this is the fully adapted filter, the mixture Kalman
filter for Gaussian z. "guided" is the model's own `outer_proposal`.

References:
    Doucet, de Freitas, Murphy and Russell (2000), https://arxiv.org/abs/1301.3853.
    Chen and Liu (2000), doi:10.1111/1467-9868.00246.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.models.nested import Nested, NestedModel
from bayesinf.models.state_space import Law, StateSpaceModel, log_prob, observation_log_prob, sample

__all__ = ["Marginal", "Marginalized"]

Filtered = TypeVar("Filtered", bound=Any)

OUTER_PROPOSALS = ("transition", "optimal", "guided")


class Marginal(NamedTuple):
    """A particle: an outer state, and what its path and the observations say of the inner one.

    Attributes:
        outer: u_t.
        predicted: the law of z_t given u_{0:t} and y_{0:t-1}.
        filtered: the law of z_t given y_t too.
        log_ratio: log p(u_t | u_{0:t-1}, y_{0:t-1}) - log q(u_t) of the proposal that it was drawn from.
    """

    outer: PyTree
    predicted: PyTree
    filtered: PyTree
    log_ratio: Float[Array, ""]


class Marginalized(StateSpaceModel):
    """A nested model with its inner states integrated out: filters of it draw the outer states alone.

    It goes wherever particles are moved by `proposal="guided"` and the transition density is not asked for:
    `particle_filter`, `ParticleFilter`, `ParticleMarginal`. The filter's estimates are `Nested`: of the outer state its
    mean and sd, or the probabilities of its values where they are finitely many; of the inner one mean and sd, or the
    probabilities of the regimes. `complete` draws the inner states, for forecasts.

    Attributes:
        model: a `ConditionallyLinearGaussian` or `ConditionallyDiscrete`.
        proposal: of the outer state, "transition", "optimal", or "guided" by `model.outer_initial_proposal(y)` and
            `model.outer_proposal(u_prev, belief, y, t)`, where `belief` is the law of z_{t-1}.

    Raises:
        ValueError: the model is not nested, or cannot have the proposal asked for.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> class LocalLevel(bi.models.ConditionallyLinearGaussian):
        ...     wander: jax.Array                             # of the log scale of the noise, a random walk
        ...     def outer_initial(self): return dist.Normal(0.0, 1.0)
        ...     def outer_transition(self, u_prev, t): return dist.Normal(u_prev, self.wander)
        ...     def linear_initial(self, u): return jnp.zeros(1), jnp.eye(1)
        ...     def linear_transition(self, u_prev, u, t): return jnp.eye(1), jnp.zeros(1), 0.3 * jnp.eye(1)
        ...     def linear_observation(self, u, t): return jnp.eye(1), jnp.zeros(1), jnp.exp(u) * jnp.eye(1)
        >>> model = LocalLevel(jnp.asarray(0.2))
        >>> xs, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(
        ...     1, bi.models.Marginalized(model), ys, num_particles=100, proposal="guided")
        >>> filtered.estimates.outer.mean.shape, filtered.estimates.inner.sd.shape
        ((50,), (50, 1))

    References:
        Doucet, de Freitas, Murphy and Russell (2000), https://arxiv.org/abs/1301.3853.
    """

    is_data_driven: ClassVar[bool] = True

    model: NestedModel
    outer_proposal: str = eqx.field(static=True, default="transition")

    def __check_init__(self):
        if not isinstance(self.model, NestedModel):
            raise ValueError(
                "model must be a ConditionallyLinearGaussian or ConditionallyDiscrete, whose inner states can be "
                f"integrated out, got {type(self.model).__name__}"
            )
        errors.check_choice("outer_proposal", self.outer_proposal, OUTER_PROPOSALS)
        name, law = type(self.model).__name__, self.model.predict_outer_initial()
        if self.outer_proposal == "optimal" and not _is_finite(law):
            raise ValueError(
                "outer_proposal='optimal' needs outer states of finitely many values, as of dist.Categorical, got "
                f"{type(law).__name__}; define outer_proposal of {name} and use 'guided', or use 'transition'"
            )
        if self.outer_proposal == "guided":
            for method in ("outer_initial_proposal", "outer_proposal"):
                if not hasattr(self.model, method):
                    raise ValueError(
                        f"outer_proposal='guided' needs a method {method} of the model {name}, which has none; define "
                        "it, or use 'transition'"
                    )

    def initial(self):
        """The law of the first particle where y_0 is missing."""

        def draw(key: Key[Array, ""]) -> Marginal:
            u = sample(key, self.model.predict_outer_initial())
            belief = self.model.believe_initial(u)
            return Marginal(u, belief, belief, jnp.zeros(()))

        return draw, lambda x: _refuse()

    def transition(self, x_prev: Marginal, t: Int[Array, ""]):
        return lambda key: _refuse(), lambda x: _refuse()

    def observation(self, x: Marginal, t: Int[Array, ""]):
        return self.model.predict_observation(x.outer, x.predicted, t)

    def initial_proposal(self, y: PyTree):
        own = self.model.outer_initial_proposal(y) if self.outer_proposal == "guided" else None  # type: ignore[attr-defined]
        first = jnp.zeros((), jnp.int32)
        return self._propose(self.model.predict_outer_initial(), own, self.model.believe_initial, y, first)

    def proposal(self, x_prev: Marginal, y: PyTree, t: Int[Array, ""]):
        u_prev, belief = x_prev.outer, x_prev.filtered

        def move(u: PyTree) -> PyTree:
            return self.model.believe(u_prev, belief, u, t)

        own = self.model.outer_proposal(u_prev, belief, y, t) if self.outer_proposal == "guided" else None  # type: ignore[attr-defined]
        return self._propose(self.model.predict_outer(u_prev, belief, t), own, move, y, t)

    def lookahead(self, x_prev: Marginal, y: PyTree, t: Int[Array, ""]) -> Float[Array, ""]:
        """Log p(y_t | u_{0:t-1}, y_{0:t-1}), summed over the values of u_t."""
        if self.outer_proposal != "optimal":
            raise ValueError("lookahead=True needs Marginalized(model, outer_proposal='optimal')")
        law = self.model.predict_outer(x_prev.outer, x_prev.filtered, t)
        _, log_prior, log_likelihood = self._enumerate(
            law, lambda u: self.model.believe(x_prev.outer, x_prev.filtered, u, t), y, t
        )
        return weights.log_sum_exp(log_prior + log_likelihood)

    def log_initial_ratio(self, x: Marginal, y: PyTree) -> Float[Array, ""]:
        return x.log_ratio

    def log_move_ratio(self, x_prev: Marginal, x: Marginal, y: PyTree, t: Int[Array, ""]) -> Float[Array, ""]:
        return x.log_ratio

    def summarize(self, log_weights: Float[Array, " n"], particles: Marginal) -> Nested:
        law = self.model.predict_outer_initial()
        if _is_finite(law):
            values = law.enumerate_support(expand=False)
            outer = weights.average(log_weights, 1.0 * (particles.outer[:, None] == values))
        else:
            outer = weights.moments(log_weights, particles.outer)
        return Nested(outer, self.model.average(log_weights, particles.filtered))

    def complete(self, key: errors.KeyLike, filtered: Filtered) -> Filtered:
        """What a filter found, its particles with inner states drawn: those of `self.model`, as for `predict`.

        Args:
            key: PRNG key or seed.
            filtered: of `particle_filter` without history, or the state of a `ParticleFilter`.

        Returns:
            The same with particles `Nested(outer, inner)`.
        """
        particles = filtered.particles
        keys = jax.random.split(errors.as_key(key), filtered.log_weights.shape[0])
        inner = jax.vmap(self.model.draw_inner)(keys, particles.filtered)
        return filtered._replace(particles=Nested(particles.outer, inner))

    def _propose(self, law: Law, own: Law | None, believe: Callable[[PyTree], PyTree], y: PyTree, t: Array) -> Law:
        """The law of a particle at time t whose outer state has the law `law`, drawn from `own` if there is one."""

        def choose(key: Key[Array, ""]) -> tuple[PyTree, Array]:
            if self.outer_proposal == "optimal":
                values, log_prior, log_likelihood = self._enumerate(law, believe, y, t)
                log_joint = weights.clean(log_prior + log_likelihood)
                is_lost = weights.is_degenerate(log_joint)  # then any value will do: its weight is zero
                index = jax.random.categorical(key, jnp.where(is_lost, 0.0, log_joint))
                return values[index], jnp.where(is_lost, 0.0, weights.log_sum_exp(log_joint) - log_likelihood[index])
            if own is None:
                return sample(key, law), jnp.zeros(())
            u = sample(key, own)
            return u, log_prob(law, u) - log_prob(own, u)

        def draw(key: Key[Array, ""]) -> Marginal:
            u, log_ratio = choose(key)
            predicted = believe(u)
            return Marginal(u, predicted, self.model.update(u, predicted, y, t), log_ratio)

        return draw, lambda x: _refuse()

    def _enumerate(
        self, law: Law, believe: Callable[[PyTree], PyTree], y: PyTree, t: Array
    ) -> tuple[Array, Array, Array]:
        """The values of u_t, the logs of their probabilities, and log p(y_t | u_{0:t}, y_{0:t-1}) of each."""
        values = law.enumerate_support(expand=False)

        def log_likelihood(u: Array) -> Array:
            return observation_log_prob(self, Marginal(u, believe(u), None, jnp.zeros(())), y, t)

        return values, law.log_prob(values), jax.vmap(log_likelihood)(values)


def _is_finite(law: Law) -> bool:
    return isinstance(law, dist.Distribution) and law.has_enumerate_support and not law.shape()


def _refuse() -> Any:
    raise ValueError(
        "a Marginalized model has no transition of its own, as its states hold what the observations said: simulate "
        "and smooth the nested model itself, and predict from that and `complete(key, filtered)`"
    )
