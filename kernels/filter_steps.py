"""One step of a particle filter, in parts: who has offspring, where they move, what they weigh.

    a^i ~ V,   V^i proportional to W_{t-1}^i v_t(x_{t-1}^i)      or a^i = i, where the effective sample size is high
    x_t^i ~ q_t(x_{t-1}^{a^i}, . ; y_t)
    w_t^i = (W_{t-1}^a / (N V^a), or W_{t-1}^i)  g_t(x_t^i) m_t(x_{t-1}^a, x_t^i) / q_t(x_{t-1}^a, x_t^i)

with m_t the transition, g_t the observation density, q_t the proposal and v_t the lookahead, which is 1 in plain
filters. Shared by the particle filter, PaRIS and the kernels on paths.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.models.state_space import (
    StateSpaceModel,
    log_prob,
    observation_log_prob,
    rows_outside_support,
    sample_each,
    sample_many,
)
from bayesinf.resampling import resample

__all__ = [
    "PROPOSALS",
    "check_lookahead",
    "check_proposal",
    "check_single",
    "check_threshold",
    "choose_ancestors",
    "cure_of_vanished",
    "initial_law",
    "look_ahead",
    "propagate",
    "propagate_initial",
    "reweigh",
    "warn_of_invalid",
    "weigh",
    "weigh_initial",
    "weigh_parts",
]

PROPOSALS = ("bootstrap", "guided")


def choose_ancestors(
    key: Key[Array, ""],
    log_weights: Float[Array, " n"],
    *,
    ess_threshold: Float[Array, ""] | float,
    resampling: str = "systematic",
    log_lookahead: Float[Array, " n"] | None = None,
) -> tuple[Int[Array, " n"], Float[Array, " n"], Bool[Array, ""]]:
    """Who has offspring, if the effective sample size is at most ess_threshold * N; else everyone has one.

    With a lookahead v the offspring are drawn by V^i, proportional to W^i v^i, whose effective sample size it then is
    that decides, and start from the weight W^a / (N V^a): estimates are unbiased for every v > 0.

    Args:
        key: PRNG key.
        log_weights: normalised log weights.
        ess_threshold: in [0, 1].
        resampling: the scheme.
        log_lookahead: log v^i, or None for v = 1.

    Returns:
        (ancestors, log_carried, is_resampled): indices, and the log weights that the offspring start from, normalised
        where there is no lookahead.
    """
    n = log_weights.shape[0]
    if log_lookahead is None:
        log_first = log_weights
    else:
        log_first, _ = weights.normalize(log_weights + weights.clean(log_lookahead).astype(log_weights.dtype))
    is_resampled = weights.ess(log_first) <= ess_threshold * n
    # where all weights are zero they must stay so: a fresh start with equal ones would hide it
    equal = jnp.where(weights.is_degenerate(log_first), -jnp.inf, jnp.full_like(log_weights, -jnp.log(n)))

    def choose():
        ancestors = resample(key, log_first, n, resampling)
        if log_lookahead is None:
            return ancestors, equal
        log_ratio = log_weights[ancestors] - log_first[ancestors]
        return ancestors, jnp.where(jnp.isneginf(equal), equal, equal + log_ratio)

    ancestors, log_carried = jax.lax.cond(is_resampled, choose, lambda: (jnp.arange(n, dtype=jnp.int32), log_weights))
    return ancestors, log_carried, is_resampled


def look_ahead(
    model: StateSpaceModel, particles: PyTree, y: PyTree, t: Int[Array, ""], is_used: bool = True
) -> Float[Array, " n"] | None:
    """Log first-stage weights of the particles at t - 1, 0 where all of y_t is missing; None where not asked for."""
    if not is_used:
        return None
    is_missing = jnp.stack([jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(y)])
    log_lookahead = jax.vmap(lambda x_prev: model.lookahead(x_prev, y, t))(particles)  # type: ignore[attr-defined]
    return jnp.where(jnp.all(is_missing), 0.0, log_lookahead)


def propagate_initial(
    key: Key[Array, ""], model: StateSpaceModel, y: PyTree, num_particles: int, proposal: str = "bootstrap"
) -> PyTree:
    """The particles at t = 0."""
    return sample_many(key, initial_law(model, y, proposal), num_particles)


def weigh_initial(
    model: StateSpaceModel, particles: PyTree, y: PyTree, proposal: str = "bootstrap"
) -> Float[Array, " n"]:
    """Log weights of particles at t = 0, drawn by `propagate_initial` or not."""

    def weigh_one(x):
        log_weight = observation_log_prob(model, x, y, jnp.zeros((), int))
        if proposal == "guided":
            log_weight += _log_initial_ratio(model, x, y)
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
    log_observed, log_moves = weigh_parts(model, parents, particles, y, t, proposal)
    return log_observed + log_moves


def weigh_parts(
    model: StateSpaceModel,
    parents: PyTree,
    particles: PyTree,
    y: PyTree,
    t: Int[Array, ""],
    proposal: str = "bootstrap",
) -> tuple[Float[Array, " n"], Float[Array, " n"] | float]:
    """Log g_t, and log m_t / q_t, which is 0 where particles move by m_t itself."""
    log_observed = jax.vmap(lambda x: observation_log_prob(model, x, y, t))(particles)
    if proposal == "bootstrap":
        return log_observed, 0.0

    return log_observed, jax.vmap(lambda x_prev, x: _log_move_ratio(model, x_prev, x, y, t))(parents, particles)


def check_proposal(model: StateSpaceModel, proposal: str) -> None:
    """A known proposal, and one that the model has."""
    errors.check_choice("proposal", proposal, PROPOSALS)
    if proposal == "bootstrap" and getattr(model, "is_data_driven", False):
        raise ValueError(f"proposal must be 'guided' for a model of type {type(model).__name__}, got 'bootstrap'")
    if proposal == "guided" and not hasattr(model, "proposal"):
        raise ValueError(
            f"proposal='guided' needs a method proposal(x_prev, y, t) of the model {type(model).__name__}, which has "
            "none; define it, or use proposal='bootstrap'"
        )


def check_lookahead(model: StateSpaceModel, lookahead: bool) -> None:
    """Whether to look ahead, and that the model can."""
    if not isinstance(lookahead, bool):
        raise ValueError(f"lookahead must be True or False, got {lookahead!r}")
    if lookahead and not hasattr(model, "lookahead"):
        raise ValueError(
            f"lookahead=True needs a method lookahead(x_prev, y, t) of the model {type(model).__name__}, which has "
            "none; define it as the log of a guess of p(y_t | x_{t-1}), or leave lookahead=False"
        )


def check_single(filtered: Any) -> None:
    """What a single filter found, and not a batch of them as `jax.vmap` returns it."""
    batch = jnp.shape(filtered.log_weights)[:-1]
    if batch:
        raise ValueError(f"filtered must be of one filter, got a batch of shape {batch}; vmap this function too")


def check_threshold(ess_threshold: Any) -> None:
    """A share of the particles, where it is known."""
    if isinstance(ess_threshold, str) or ess_threshold is None:
        raise ValueError(f"ess_threshold must lie in [0, 1], a share of num_particles, got {ess_threshold!r}")
    if errors.is_concrete(ess_threshold) and not np.all(
        (np.asarray(ess_threshold) >= 0) & (np.asarray(ess_threshold) <= 1)
    ):
        raise ValueError(f"ess_threshold must lie in [0, 1], a share of num_particles, got {ess_threshold}")


def initial_law(model: Any, y: PyTree, proposal: str) -> Any:
    """What x_0 is drawn from."""
    if proposal == "guided" and hasattr(model, "initial_proposal"):
        return model.initial_proposal(y)
    return model.initial()


def _log_initial_ratio(model: Any, x: PyTree, y: PyTree) -> Array:
    if hasattr(model, "log_initial_ratio"):
        return model.log_initial_ratio(x, y)
    return log_prob(model.initial(), x) - log_prob(initial_law(model, y, "guided"), x)


def _log_move_ratio(model: Any, x_prev: PyTree, x: PyTree, y: PyTree, t: Array) -> Array:
    if hasattr(model, "log_move_ratio"):
        return model.log_move_ratio(x_prev, x, y, t)
    return log_prob(model.transition(x_prev, t), x) - log_prob(model.proposal(x_prev, y, t), x)


def _move_law(model: Any, x_prev: PyTree, y: PyTree, t: Array, proposal: str) -> Any:
    return model.proposal(x_prev, y, t) if proposal == "guided" else model.transition(x_prev, t)


def reweigh(log_carried: Array, log_increments: Array) -> tuple[Array, Array, Array]:
    """The normalised log weights, the log of their sum before, and how many increments were invalid."""
    log_weights = log_carried + weights.clean(log_increments).astype(log_carried.dtype)
    log_normalized, log_mean = weights.normalize(log_weights)
    return log_normalized, log_mean + jnp.log(log_weights.shape[0]), weights.num_invalid(log_increments)


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
