"""A particle filter of data that arrive one at a time; `particle_filter` runs the same steps over a whole series.

References:
    Chopin and Papaspiliopoulos (2020), doi:10.1007/978-3-030-47845-2, chapter 10.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.captured import captured, current
from bayesinf.kernels.filter_steps import (
    check_lookahead,
    check_proposal,
    check_threshold,
    choose_ancestors,
    look_ahead,
    propagate,
    propagate_initial,
    reweigh,
    weigh_initial,
    weigh_parts,
)
from bayesinf.models.state_space import StateSpaceModel, check_model, check_observations, observation_log_prob
from bayesinf.resampling import SCHEMES, gather

__all__ = ["FilterInfo", "FilterState", "ParticleFilter", "as_row", "begin", "keys_of", "move_on"]


class FilterState(NamedTuple):
    """Where a filter stands after y_t: what the next step needs, of a size that does not grow.

    Attributes:
        key: from which all steps draw.
        t: the time of the particles.
        particles: states, leading axis N.
        log_weights: normalised, (N,).
        log_evidence: log of an unbiased estimate of p(y_0..y_t).
        rounding: what the sum log_evidence has lost to rounding so far.
    """

    key: Key[Array, ""]
    t: Int[Array, ""]
    particles: PyTree
    log_weights: Float[Array, " n"]
    log_evidence: Float[Array, ""]
    rounding: Float[Array, ""]


class FilterInfo(NamedTuple):
    """What one step of a filter tells.

    Attributes:
        log_evidence_increment: an estimate of log p(y_t | y_0..y_{t-1}); -inf where all weights are zero.
        ess: effective sample size of the weights.
        is_resampled: whether the particles were resampled on the way to t.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
        estimate: E[functional(x_t) | y_0..y_t]; NaN where no weight is left.
        ancestors: where each particle came from at t - 1.
        log_predicted: normalised log weights of the particles before y_t is weighed in: with them they follow the
            predictive law of x_t.
    """

    log_evidence_increment: Float[Array, ""]
    ess: Float[Array, ""]
    is_resampled: Bool[Array, ""]
    num_invalid: Int[Array, ""]
    estimate: PyTree
    ancestors: Int[Array, " n"]
    log_predicted: Float[Array, " n"]


class ParticleFilter(eqx.Module):
    """A particle filter of data that arrive one at a time.

    After `init` at y_0 and T - 1 steps it stands where `particle_filter` of the whole series with the same key stands.
    Both methods are compiled once, and may be used inside compiled functions of one's own. They raise nothing for what
    they find: weights that are all zero show as `info.ess == 0`.

    Attributes:
        model: a state-space model.
        ess_threshold: resample where ess <= ess_threshold * N; 1 means always, 0 never.
        num_particles: N.
        proposal: "bootstrap" moves particles by the transition, "guided" by `model.proposal`.
        resampling: one of `bayesinf.resampling.SCHEMES`.
        lookahead: choose ancestors with an eye on y_t, by `model.lookahead`.
        functional: of one state; by default its mean and sd, as `weights.Moments`, or what the model's own `summarize`
            says.

    Raises:
        ValueError: a parameter is out of its range, or the model lacks the proposal or lookahead asked for.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.97, scale=0.2)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=100)
        >>> stream = bi.kernels.ParticleFilter(model, num_particles=500)
        >>> state, info = stream.init(jax.random.key(1), ys[0])
        >>> for y in ys[1:]:
        ...     state, info = stream.step(state, y)
        >>> int(state.t), info.estimate.mean.shape
        (99, ())
    """

    model: StateSpaceModel
    ess_threshold: Float[Array, ""]
    num_particles: int = eqx.field(static=True)
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)
    lookahead: bool = eqx.field(static=True)
    functional: Callable[[PyTree], PyTree] | None = eqx.field(static=True)

    def __init__(
        self,
        model: StateSpaceModel,
        *,
        num_particles: int,
        proposal: str = "bootstrap",
        resampling: str = "systematic",
        ess_threshold: Float[Array, ""] | float = 0.5,
        lookahead: bool = False,
        functional: Callable[[PyTree], PyTree] | None = None,
    ):
        check_threshold(ess_threshold)
        if functional is not None:
            errors.check_arguments("functional", functional, "x")
        self.model, self.ess_threshold = model, jnp.asarray(ess_threshold, float)
        self.num_particles = errors.check_count("num_particles", num_particles)
        self.proposal, self.resampling, self.lookahead = proposal, resampling, lookahead
        self.functional = captured(functional)
        errors.check_choice("resampling", resampling, SCHEMES)
        check_proposal(model, proposal)
        check_lookahead(model, lookahead)

    def init(self, key: errors.KeyLike, y: PyTree) -> tuple[FilterState, FilterInfo]:
        """The particles at t = 0, weighted by y_0.

        Args:
            key: PRNG key or seed.
            y: the first observation; NaN where missing.

        Returns:
            (state, info).
        """
        ys = check_observations(self.model, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y))
        return begin(current(self), errors.as_key(key), jax.tree.map(lambda leaf: leaf[0], ys))

    def step(self, state: FilterState, y: PyTree) -> tuple[FilterState, FilterInfo]:
        """The particles at the next time, weighted by y there.

        Args:
            state: of `init` or `step`.
            y: the next observation, like the first; NaN where missing.

        Returns:
            (state, info).
        """
        return move_on(current(self), state, keys_of(state.key, state.t + 1), as_row(y))


@jax.jit
def begin(self: ParticleFilter, key: Key[Array, ""], y: PyTree) -> tuple[FilterState, FilterInfo]:
    """`ParticleFilter.init`, of arguments that are known to be right."""
    check_model(self.model)
    particles = propagate_initial(jax.random.fold_in(key, 0), self.model, y, self.num_particles, self.proposal)
    log_increments = weigh_initial(self.model, particles, y, self.proposal)
    log_weights, increment, num_invalid = reweigh(
        jnp.full_like(log_increments, -jnp.log(self.num_particles)), log_increments
    )
    state = FilterState(key, jnp.zeros((), jnp.int32), particles, log_weights, increment, jnp.zeros_like(increment))
    own = jnp.arange(self.num_particles, dtype=jnp.int32)
    log_predicted = jnp.zeros_like(log_increments)
    if self.proposal == "guided":  # what there is without y_0: p_0 / q_0
        log_predicted = log_increments - jax.vmap(lambda x: observation_log_prob(self.model, x, y, state.t))(particles)
    return state, _describe(self, state, increment, jnp.zeros((), bool), num_invalid, own, log_predicted)


@jax.jit
def move_on(
    self: ParticleFilter, state: FilterState, keys: Key[Array, "2"], y: PyTree
) -> tuple[FilterState, FilterInfo]:
    """`ParticleFilter.step`, with the keys of the time that it comes to."""
    t = state.t + 1
    ancestors, log_carried, is_resampled = choose_ancestors(
        keys[0],
        state.log_weights,
        ess_threshold=self.ess_threshold,
        resampling=self.resampling,
        log_lookahead=look_ahead(self.model, state.particles, y, t, self.lookahead),
    )
    parents = jax.lax.cond(is_resampled, gather, lambda tree, _: tree, state.particles, ancestors)
    particles = propagate(keys[1], self.model, parents, y, t, self.proposal)
    log_observed, log_moves = weigh_parts(self.model, parents, particles, y, t, self.proposal)
    log_weights, increment, num_invalid = reweigh(log_carried, log_observed + log_moves)
    total = state.log_evidence + (increment + state.rounding)
    rounding = jnp.where(jnp.isfinite(total), (increment + state.rounding) - (total - state.log_evidence), 0.0)
    state = FilterState(state.key, t, particles, log_weights, total, rounding)
    return state, _describe(self, state, increment, is_resampled, num_invalid, ancestors, log_carried + log_moves)


def as_row(y: PyTree) -> PyTree:
    """One observation as arrays of floating point."""
    y = jax.tree.map(jnp.asarray, y)
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(float), y)


def keys_of(key: Key[Array, ""], t: Int[Array, ""]) -> Key[Array, "2"]:
    """What chooses the ancestors at time t, and what moves the particles."""
    return jax.random.split(jax.random.fold_in(key, t))


def _describe(
    self: ParticleFilter, state: FilterState, increment, is_resampled, num_invalid, ancestors, log_predicted
) -> FilterInfo:
    return FilterInfo(
        increment,
        weights.ess(state.log_weights),
        is_resampled,
        num_invalid,
        _estimate(self, state.particles, state.log_weights),
        ancestors,
        weights.normalize(log_predicted)[0],
    )


def _estimate(self: ParticleFilter, particles: PyTree, log_weights: Array) -> PyTree:
    if self.functional is not None:
        values = jax.vmap(self.functional)(particles)
        if not jax.tree.leaves(values):
            raise ValueError("functional must return at least one number, got None; is a return missing?")
        return weights.average(log_weights, values)
    summarize = getattr(self.model, "summarize", weights.moments)
    return summarize(log_weights, particles)
