"""The particle filter: bootstrap, guided, auxiliary and fully adapted, with adaptive resampling; whole or in a stream.

    x_0^i ~ q_0(. ; y_0),        w_0^i = g_0(x_0^i) p_0(x_0^i) / q_0(x_0^i)
    a_t^i ~ V_t, V_t^i ~ W_{t-1}^i v_t(x_{t-1}^i);  or a_t^i = i, where the effective sample size of V_t is high
    x_t^i ~ q_t(x, . ; y_t),     w_t^i = (what is carried) g_t(x_t^i) m_t(x, x_t^i) / q_t(x, x_t^i)

with x = x_{t-1}^{a_t^i} the parent, m_t the transition and g_t the observation density; what is carried is
W_{t-1}^a / (N V_t^a), or W_{t-1}^i. By the proposal q and the lookahead v the filters are

    bootstrap        q = m, v = 1               guided           q = model.proposal, v = 1
    auxiliary        v = exp(model.lookahead)   fully adapted    q = p(x_t | x_{t-1}, y_t), v = p(y_t | x_{t-1})

The product over t of sum_i w_t^i is an unbiased estimate of the evidence p(y_0..y_{T-1}) for every number of particles,
scheme of resampling, threshold, proposal and lookahead.

References:
    Gordon, Salmond and Smith (1993), doi:10.1049/ip-f-2.1993.0015.
    Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038 (guided proposals).
    Pitt and Shephard (1999), doi:10.1080/01621459.1999.10474153 (auxiliary particle filters).
    Del Moral, Doucet and Jasra (2012), doi:10.3150/10-BEJ335 (adaptive resampling).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.captured import current
from bayesinf.kernels.filter_steps import cure_of_vanished, warn_of_invalid
from bayesinf.kernels.online_filter import FilterInfo, ParticleFilter, begin, keys_of, move_on
from bayesinf.kernels.path_tree import PathTree, default_capacity, grow, plant
from bayesinf.models.state_space import StateSpaceModel, check_observations

__all__ = ["FilterResult", "History", "particle_filter"]

STORES = ("summary", "none", "full", "window", "tree")


class History(NamedTuple):
    """The run of a filter of N particles, whole or its last L <= T steps: what smoothing needs.

    Attributes:
        particles: states, leading axes (L, N).
        log_weights: normalised, (L, N).
        ancestors: where each particle came from at t - 1, (L, N); its own index at t = 0.
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
        history: of all steps for store="full", of the last `window` ones for "window", a `PathTree` for "tree", else
            None.
    """

    log_evidence: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    num_invalid: Int[Array, " t"]
    estimates: PyTree
    particles: PyTree
    log_weights: Float[Array, " n"]
    history: History | PathTree | None


def particle_filter(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    *,
    num_particles: int,
    proposal: str = "bootstrap",
    resampling: str = "systematic",
    ess_threshold: Float[Array, ""] | float = 0.5,
    lookahead: bool = False,
    store: str = "summary",
    window: int | None = None,
    tree_capacity: int | None = None,
    functional: Callable[[PyTree], PyTree] | None = None,
    throw: bool = True,
) -> FilterResult:
    """Filters the series `ys` with a population of particles.

    Runs one compiled scan, which shows no bar; new data or parameters of the same shape compile nothing. For a series
    so long that one wants to watch it, `ParticleFilter` takes it in parts. It may be jitted, vmapped over
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
        lookahead: choose ancestors with an eye on y_t, by `model.lookahead(x_prev, y, t)`: an auxiliary filter, fully
            adapted where the proposal is "guided" and both of the model's are exact. Then it is the ess of these
            first-stage weights that decides.
        store: "summary" keeps an estimate for every t, "none" only the evidence and ess, "full" also the whole history,
            "window" that of the last steps, "tree" what has offspring at the end: paths in memory O(T + N log N).
        window: how many steps "window" keeps.
        tree_capacity: how many states "tree" has room for; T + 4 N (log N + 3) by default, enough for independent draws
            of ancestors at every step. Paths coalesce k times as slowly where every k-th step resamples: where the
            default is too small the filter runs once more, with the same key, in 4 N k (log N + 3) places (not while
            traced: then `history.is_overflowed` tells).
        functional: of one state; its filter expectations are the estimates. By default mean and sd of the state, as
            `weights.Moments`, or what `model.summarize` says. A new function compiles anew.
        throw: whether to raise when no weight is left.

    Returns:
        A FilterResult.

    Raises:
        DegenerateWeightsError: at some t all weights were zero (not while traced); its `result` is the FilterResult.
        SamplingError: the tree had no room in `tree_capacity` places (not while traced); the error's `draws` is the
            FilterResult.
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
    size = _check_store(store, window, tree_capacity, jax.tree.leaves(ys)[0].shape[0], num_particles)
    one = ParticleFilter(
        model,
        num_particles=num_particles,
        proposal=proposal,
        resampling=resampling,
        ess_threshold=ess_threshold,
        lookahead=lookahead,
        functional=functional,
    )
    result = _filter(current(one), key, ys, store, size)
    if store == "tree" and tree_capacity is None:
        # how often it resamples, and with it the room that its paths need, is known after a run
        while errors.is_concrete(result) and np.any(result.history.is_overflowed):
            num_steps = result.ess.shape[0]
            num_between = num_steps / (1 + int(np.sum(result.is_resampled)))
            size = max(
                default_capacity(num_steps, num_particles, num_between), min(2 * size, num_steps * num_particles)
            )
            result = _filter(current(one), key, ys, store, size)
    if throw and errors.is_concrete(result):
        _raise_if_degenerate(result, model, ys, num_particles, proposal)
        if isinstance(result.history, PathTree) and np.any(result.history.is_overflowed):
            raise errors.SamplingError(
                f"The tree of paths had no room in {size} places; pass a larger tree_capacity, or resample more often: "
                "throw=False returns what else there is.",
                result,
            )
    return result


@partial(jax.jit, static_argnums=(3, 4))
def _filter(self: ParticleFilter, key: Key[Array, ""], ys: PyTree, store: str, size: int) -> FilterResult:
    first, rest = jax.tree.map(lambda leaf: leaf[0], ys), jax.tree.map(lambda leaf: leaf[1:], ys)

    def record(info: FilterInfo):
        """What is kept of every time step."""
        return info[:4], None if store == "none" else info.estimate

    def step(carry, row):
        state, tree = carry
        state, info = move_on(self, state, *row)
        return (state, grow(tree, state.particles, info.ancestors) if store == "tree" else None), record(info)

    def step_stored(state, row):
        state, info = move_on(self, state, *row)
        return state, (record(info), History(state.particles, state.log_weights, info.ancestors))

    start, info = begin(self, key, first)
    tree: Any = plant(start.particles, size) if store == "tree" else None
    # the keys of all steps are made at once, where that is a single operation
    num_steps = jax.tree.leaves(ys)[0].shape[0]
    rows = (jax.vmap(partial(keys_of, key))(jnp.arange(1, num_steps)), rest)
    # the steps of which nothing is stored, and then the others; the first of all is `begin`
    num_stored = size if store in ("full", "window") else 0
    num_plain = max(num_steps - 1 - num_stored, 0)
    last, history = start, tree
    records = jax.tree.map(lambda leaf: leaf[None], record(info))
    if num_plain or not num_stored:
        plain_rows = jax.tree.map(lambda leaf: leaf[:num_plain], rows)
        carry, more = jax.lax.scan(step, (last, tree), plain_rows)
        last, history = carry
        records = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), records, more)
    if num_stored:
        stored_rows = jax.tree.map(lambda leaf: leaf[num_plain:], rows)
        last, kept = jax.lax.scan(step_stored, last, stored_rows)
        more, history = kept
        records = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), records, more)
        if num_stored == num_steps:
            first_row = History(start.particles, start.log_weights, info.ancestors)
            history = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first_row, history)

    (increments, ess, is_resampled, num_invalid), estimates = records
    return FilterResult(
        weights.compensated_sum(increments),
        increments,
        ess,
        is_resampled,
        num_invalid,
        estimates,
        last.particles,
        last.log_weights,
        history,
    )


def _check_store(store: str, window: int | None, tree_capacity: int | None, num_steps: int, num_particles: int) -> int:
    """How many steps, or states of a tree, are to be stored."""
    errors.check_choice("store", store, STORES)
    if window is not None and store != "window":
        raise ValueError(f"window={window} goes with store='window', got store={store!r}")
    if tree_capacity is not None and store != "tree":
        raise ValueError(f"tree_capacity={tree_capacity} goes with store='tree', got store={store!r}")
    if store == "window":
        if window is None:
            raise ValueError("store='window' needs window, the number of steps to keep, got None")
        return min(errors.check_count("window", window), num_steps)
    if store == "tree":
        if tree_capacity is None:
            tree_capacity = default_capacity(num_steps, errors.check_count("num_particles", num_particles))
        return errors.check_count("tree_capacity", tree_capacity, minimum=num_particles)
    return num_steps if store == "full" else 0


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
