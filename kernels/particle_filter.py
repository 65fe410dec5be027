"""The particle filter: bootstrap and guided, with adaptive resampling.

    x_0^i ~ q_0(. ; y_0),        w_0^i = g_0(x_0^i) p_0(x_0^i) / q_0(x_0^i)
    a_t^i ~ W_{t-1}, or a_t^i = i with the weight carried on where the effective sample size is high
    x_t^i ~ q_t(x, . ; y_t),     w_t^i = (what is carried) g_t(x_t^i) m_t(x, x_t^i) / q_t(x, x_t^i)

with x = x_{t-1}^{a_t^i} the parent, m_t the transition and g_t the observation density. The bootstrap filter moves
particles by m_t itself, a guided one by the model's `proposal`. The product over t of sum_i w_t^i, with weights
normalised at t - 1, is an unbiased estimate of the evidence p(y_0..y_{T-1}) for every number of particles, scheme of
resampling and threshold.

References:
    Gordon, Salmond and Smith (1993), doi:10.1049/ip-f-2.1993.0015.
    Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038 (guided proposals).
    Del Moral, Doucet and Jasra (2012), doi:10.3150/10-BEJ335 (adaptive resampling).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.captured import captured
from bayesinf.models.state_space import (
    StateSpaceModel,
    check_model,
    check_observations,
    log_prob,
    observation_log_prob,
    rows_outside_support,
    sample_each,
    sample_many,
)
from bayesinf.resampling import SCHEMES, gather, resample

__all__ = [
    "FilterResult",
    "History",
    "Moments",
    "check_proposal",
    "check_threshold",
    "choose_ancestors",
    "particle_filter",
    "propagate",
    "propagate_initial",
    "reweigh",
    "warn_of_invalid",
    "weigh",
    "weigh_initial",
]

PROPOSALS = ("bootstrap", "guided")
STORES = ("summary", "none", "full")


class Moments(NamedTuple):
    """Mean and standard deviation of every component of the state."""

    mean: PyTree
    sd: PyTree


class History(NamedTuple):
    """The whole run of a filter of N particles: what smoothing needs.

    Attributes:
        particles: states, leading axes (T, N).
        log_weights: normalised, (T, N).
        ancestors: where each particle came from at t - 1, (T, N); its own index at t = 0.
    """

    particles: PyTree
    log_weights: Float[Array, "t n"]
    ancestors: Int[Array, "t n"]


class FilterResult(NamedTuple):
    """What a particle filter found.

    Attributes:
        log_evidence: log of an unbiased estimate of p(y_0..y_{T-1}); -inf where the filter lost all its weights.
        log_evidence_increments: estimates of log p(y_t | y_0..y_{t-1}).
        ess: effective sample size of the weights at every t.
        is_resampled: whether the particles were resampled on the way to t.
        num_invalid: how many log weights were NaN or +inf at t; they count as weights of zero.
        estimates: E[functional(x_t) | y_0..y_t], leading axis T; None for store="none". NaN where no weight is left.
        particles: the states at T - 1, leading axis N.
        log_weights: their normalised log weights.
        history: for store="full", else None.
    """

    log_evidence: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    num_invalid: Int[Array, " t"]
    estimates: PyTree
    particles: PyTree
    log_weights: Float[Array, " n"]
    history: History | None


def particle_filter(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    *,
    num_particles: int,
    proposal: str = "bootstrap",
    resampling: str = "systematic",
    ess_threshold: Float[Array, ""] | float = 0.5,
    store: str = "summary",
    functional: Callable[[PyTree], PyTree] | None = None,
    throw: bool = True,
) -> FilterResult:
    """Filters the series `ys` with a population of particles.

    Runs one compiled scan; new data or parameters of the same shape compile nothing. It may be jitted, vmapped over
    keys, models and data, and differentiated: the gradient passes through states and weights, not through the choice of
    ancestors, so that the gradient of log_evidence is biased.

    Args:
        key: PRNG key or seed.
        model: a state-space model.
        ys: observations with leading axis T; NaN where missing (see `state_space.observation_log_prob`).
        num_particles: N.
        proposal: "bootstrap" moves particles by the transition, "guided" by `model.proposal` and, where the model has
            one, `model.initial_proposal`.
        resampling: one of `bayesinf.resampling.SCHEMES`.
        ess_threshold: resample where ess <= ess_threshold * N; 1 means always, 0 never.
        store: "summary" keeps an estimate for every t, "none" only the evidence and ess, "full" also the whole history.
        functional: of one state; its filter expectations are the estimates. By default mean and sd of the state, as
            `Moments`. A new function compiles anew.
        throw: whether to raise when no weight is left.

    Returns:
        A FilterResult.

    Raises:
        DegenerateWeightsError: at some t all weights were zero (not while traced); its `result` is the FilterResult.
        ValueError: an argument is out of its range, or the model lacks the proposal asked for.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.97, scale=0.2)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=100)
        >>> filtered = bi.kernels.particle_filter(jax.random.key(1), model, ys, num_particles=500)
        >>> filtered.estimates.mean.shape
        (100,)

    References:
        Chopin and Papaspiliopoulos (2020), doi:10.1007/978-3-030-47845-2, chapter 10.
    """
    key = errors.as_key(key)
    ys = check_observations(model, ys)
    errors.check_count("num_particles", num_particles)
    errors.check_choice("resampling", resampling, SCHEMES)
    errors.check_choice("store", store, STORES)
    check_proposal(model, proposal)
    check_threshold(ess_threshold)
    if functional is not None:
        errors.check_arguments("functional", functional, "x")
    result = _filter(key, model, ys, ess_threshold, num_particles, proposal, resampling, store, captured(functional))
    if throw and errors.is_concrete(result):
        _raise_if_degenerate(result, model, ys, num_particles, proposal)
    return result


@partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _filter(key, model, ys, ess_threshold, num_particles, proposal, resampling, store, functional) -> FilterResult:
    check_model(model)
    first, rest = jax.tree.map(lambda leaf: leaf[0], ys), jax.tree.map(lambda leaf: leaf[1:], ys)
    num_steps = jax.tree.leaves(ys)[0].shape[0]

    def record(particles, log_weights, log_mean, num_invalid, is_resampled, ancestors):
        """Everything that is kept of one time step."""
        return (
            (log_mean, weights.ess(log_weights), is_resampled, num_invalid),
            None if store == "none" else _estimate(functional, particles, log_weights),
            History(particles, log_weights, ancestors) if store == "full" else None,
        )

    def step(carry, now):
        particles_prev, log_weights_prev = carry
        y, t = now
        key_choose, key_move = jax.random.split(jax.random.fold_in(key, t))
        ancestors, log_carried, is_resampled = choose_ancestors(
            key_choose, log_weights_prev, ess_threshold=ess_threshold, resampling=resampling
        )
        parents = jax.lax.cond(is_resampled, gather, lambda tree, _: tree, particles_prev, ancestors)
        particles = propagate(key_move, model, parents, y, t, proposal)
        log_weights, *counts = reweigh(log_carried, weigh(model, parents, particles, y, t, proposal))
        return (particles, log_weights), record(particles, log_weights, *counts, is_resampled, ancestors)  # type: ignore[call-arg]

    particles = propagate_initial(jax.random.fold_in(key, 0), model, first, num_particles, proposal)
    log_increments = weigh_initial(model, particles, first, proposal)
    log_weights, *counts = reweigh(jnp.full_like(log_increments, -jnp.log(num_particles)), log_increments)
    start = record(particles, log_weights, *counts, jnp.zeros((), bool), jnp.arange(num_particles, dtype=jnp.int32))  # type: ignore[call-arg]
    last, records = jax.lax.scan(step, (particles, log_weights), (rest, jnp.arange(1, num_steps)))
    records = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, records)

    (increments, ess, is_resampled, num_invalid), estimates, history = records
    log_evidence = weights.compensated_sum(increments)
    return FilterResult(log_evidence, increments, ess, is_resampled, num_invalid, estimates, *last, history)


def choose_ancestors(
    key: Key[Array, ""],
    log_weights: Float[Array, " n"],
    *,
    ess_threshold: Float[Array, ""] | float,
    resampling: str = "systematic",
) -> tuple[Int[Array, " n"], Float[Array, " n"], Bool[Array, ""]]:
    """Who has offspring, if the effective sample size is at most ess_threshold * N; else everyone has one.

    Args:
        key: PRNG key.
        log_weights: normalised log weights.
        ess_threshold: in [0, 1].
        resampling: the scheme.

    Returns:
        (ancestors, log_carried, is_resampled): indices, and the normalised log weights that the offspring start from.
    """
    n = log_weights.shape[0]
    is_resampled = weights.ess(log_weights) <= ess_threshold * n
    # where all weights are zero they must stay so: a fresh start with equal ones would hide it
    equal = jnp.where(weights.is_degenerate(log_weights), -jnp.inf, jnp.full_like(log_weights, -jnp.log(n)))
    ancestors, log_carried = jax.lax.cond(
        is_resampled,
        lambda: (resample(key, log_weights, n, resampling), equal),
        lambda: (jnp.arange(n, dtype=jnp.int32), log_weights),
    )
    return ancestors, log_carried, is_resampled


def propagate_initial(
    key: Key[Array, ""], model: StateSpaceModel, y: PyTree, num_particles: int, proposal: str = "bootstrap"
) -> PyTree:
    """The particles at t = 0."""
    return sample_many(key, _initial_law(model, y, proposal), num_particles)


def weigh_initial(
    model: StateSpaceModel, particles: PyTree, y: PyTree, proposal: str = "bootstrap"
) -> Float[Array, " n"]:
    """Log weights of particles at t = 0, drawn by `propagate_initial` or not."""

    def weigh_one(x):
        log_weight = observation_log_prob(model, x, y, jnp.zeros((), int))
        if proposal == "guided":
            log_weight += log_prob(model.initial(), x) - log_prob(_initial_law(model, y, proposal), x)
        return log_weight

    return jax.vmap(weigh_one)(particles)


def propagate(
    key: Key[Array, ""],
    model: StateSpaceModel,
    parents: PyTree,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str = "bootstrap",
) -> PyTree:
    """The particles at t >= 1, one for every parent, in the dtype of the parents."""
    moved = sample_each(key, lambda x_prev: _move_law(model, x_prev, y, t, proposal), parents)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, parents)


def weigh(
    model: StateSpaceModel,
    parents: PyTree,
    particles: PyTree,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str = "bootstrap",
) -> Float[Array, " n"]:
    """Log weight increments of particles at t >= 1, given the parents that they moved from."""

    def weigh_one(x_prev, x):
        log_weight = observation_log_prob(model, x, y, t)
        if proposal == "guided":
            log_weight += log_prob(model.transition(x_prev, t), x) - log_prob(model.proposal(x_prev, y, t), x)  # type: ignore[attr-defined]
        return log_weight

    return jax.vmap(weigh_one)(parents, particles)


def check_proposal(model: StateSpaceModel, proposal: str) -> None:
    """A known proposal, and one that the model has."""
    errors.check_choice("proposal", proposal, PROPOSALS)
    if proposal == "guided" and not hasattr(model, "proposal"):
        raise ValueError(
            f"proposal='guided' needs a method proposal(x_prev, y, t) of the model {type(model).__name__}, which has "
            "none; define it, or use proposal='bootstrap'"
        )


def check_threshold(ess_threshold: Any) -> None:
    """A share of the particles, where it is known."""
    if isinstance(ess_threshold, str) or ess_threshold is None:
        raise ValueError(f"ess_threshold must lie in [0, 1], a share of num_particles, got {ess_threshold!r}")
    if errors.is_concrete(ess_threshold) and not np.all(
        (np.asarray(ess_threshold) >= 0) & (np.asarray(ess_threshold) <= 1)
    ):
        raise ValueError(f"ess_threshold must lie in [0, 1], a share of num_particles, got {ess_threshold}")


def _initial_law(model: Any, y: PyTree, proposal: str) -> Any:
    if proposal == "guided" and hasattr(model, "initial_proposal"):
        return model.initial_proposal(y)
    return model.initial()


def _move_law(model: Any, x_prev: PyTree, y: PyTree, t: Array, proposal: str) -> Any:
    return model.proposal(x_prev, y, t) if proposal == "guided" else model.transition(x_prev, t)


def reweigh(log_carried: Array, log_increments: Array) -> tuple[Array, Array, Array]:
    """The normalised log weights, the log of their sum before, and how many increments were invalid."""
    log_weights = log_carried + weights.clean(log_increments).astype(log_carried.dtype)
    log_normalized, log_mean = weights.normalize(log_weights)
    return log_normalized, log_mean + jnp.log(log_weights.shape[0]), weights.num_invalid(log_increments)


def _estimate(functional: Callable | None, particles: PyTree, log_weights: Array) -> PyTree:
    w = jnp.where(weights.is_degenerate(log_weights), jnp.nan, jnp.exp(log_weights))

    def average(values):
        return jnp.tensordot(w, values.astype(jnp.result_type(values, w)), axes=1)

    if functional is not None:
        values = jax.vmap(functional)(particles)
        if not jax.tree.leaves(values):
            raise ValueError("functional must return at least one number, got None; is a return missing?")
        return jax.tree.map(average, values)
    mean = jax.tree.map(average, particles)
    sd = jax.tree.map(lambda leaf, m: jnp.sqrt(average((leaf - m) ** 2)), particles, mean)
    return Moments(mean, sd)


def _raise_if_degenerate(
    result: FilterResult, model: StateSpaceModel, ys: PyTree, num_particles: int, proposal: str
) -> None:
    """Raises if no weight was left at some time, on the host; for a batch of filters, if any lost all its weights."""
    is_lost = np.isneginf(np.asarray(result.log_evidence_increments))
    num_invalid = np.asarray(result.num_invalid)
    if is_lost.any():
        t = int(np.argmax(is_lost))
        if num_invalid[t] == num_particles:
            raise errors.DegenerateWeightsError(
                f"At time step {t} the log weights of all {num_particles} particles were NaN or +inf: the densities of "
                "the model are not finite there; check its laws and parameters.",
                result,
            )
        raise errors.DegenerateWeightsError(
            f"At time step {t} no particle of {num_particles} can explain the observation: all weights are zero. "
            f"{cure_of_vanished(model, ys, proposal)}; throw=False returns log_evidence = -inf.",
            result,
        )
    warn_of_invalid(num_invalid, "time step")


def cure_of_vanished(model: StateSpaceModel, ys: PyTree, proposal: str) -> str:
    """What to do where all weights vanished."""
    rows = rows_outside_support(model, ys) if errors.is_concrete((model, ys)) else []
    if rows:
        return f"Rows {rows[:5]} of ys lie outside the support of model.observation: check the data"
    cure = "proposal='guided'" if proposal == "bootstrap" else "a wider proposal"
    return f"Try more particles, {cure}, or an observation law with heavier tails"


def warn_of_invalid(num_invalid: np.ndarray, what: str) -> None:
    """Warns of weights that are none; `what` is the axis of the counts."""
    if num_invalid.any():
        warnings.warn(
            f"{num_invalid.sum()} log weights were NaN or +inf and were counted as weights of zero, first at {what} "
            f"{int(np.argmax(num_invalid > 0))}; the densities of the model are not finite there",
            errors.SamplingWarning,
            stacklevel=4,
        )
