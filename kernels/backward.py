"""Backward sampling: where a particle may have come from, and smoothed paths drawn from a stored filter.

Given the cloud (X_{t-1}^l, W_{t-1}^l) and a state x at time t, the backward kernel draws

    J ~ Cat( W_{t-1}^l m_t(X_{t-1}^l, x),  l = 1..N )

with m_t the transition density, also where the filter moved its particles by another proposal. By method:

    "exact"   the categorical law itself, by a two-level inverse of its cumulative sum; N densities for every x.
    "mcmc"    one independent Metropolis-Hastings step from the ancestor of x with proposals from W_{t-1}: a constant
              cost for every x. It leaves the backward law invariant and its start is a draw from it, so estimates stay
              consistent; each step breaks up part of the genealogy, more where m_t is flat in its first argument.
    "reject"  proposals from W_{t-1}, accepted by m_t over its bound; the same law as "exact", one density a proposal,
              at a cost that depends on how much m_t overlaps with W_{t-1} (`rejection`).
    "auto"    exact while that takes at most 2**22 densities a time step (N = 2048 for a whole population, any number of
              particles for a single path), else mcmc.

References:
    Godsill, Doucet and West (2004), doi:10.1198/016214504000000151.
    Bunch and Godsill (2013), doi:10.1109/TSP.2012.2224868 (the Metropolis-Hastings step).
    Dau and Chopin (2023), doi:10.1214/23-EJS2173.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, resampling, weights
from bayesinf.kernels.genealogy import history_of
from bayesinf.kernels.particle_filter import FilterResult, History
from bayesinf.kernels.rejection import Counts, draw_by_rejection
from bayesinf.models.state_space import StateSpaceModel, log_prob

__all__ = ["BACKWARD_METHODS", "BackwardCounts", "backward_sample", "draw_backward", "draw_counted"]

BACKWARD_METHODS = ("auto", "exact", "mcmc", "reject")

_AUTO_DENSITIES = 2**22  # what "auto" spends on the exact law at one time step
_TILE = 2**20  # densities held in memory at once


class BackwardCounts(NamedTuple):
    """What the backward draws of `backward_sample` cost, at each of its L times.

    Attributes:
        num_proposals: indices that backward draws proposed on the way to t, accepted or not; none for "exact".
        num_exact: backward draws on the way to t that looked at all particles; for "reject", those that were not served
            in time.
    """

    num_proposals: Int[Array, " t"]
    num_exact: Int[Array, " t"]


def backward_sample(
    key: errors.KeyLike,
    model: StateSpaceModel,
    filtered: FilterResult,
    num_paths: int,
    method: str = "auto",
    *,
    return_counts: bool = False,
    throw: bool = True,
) -> PyTree:
    """Draws smoothed paths from a stored particle filter: forward filtering, backward sampling.

    Given the filter's particles the paths are independent, each from the filter's approximation of the law of
    x_0..x_{T-1} given all data. Tracing ancestors instead would give the same few particles at early times.

    Args:
        key: PRNG key or seed.
        model: the model that was filtered.
        filtered: of `particle_filter(..., store="full")`; or "window", for the last steps alone.
        num_paths: how many paths.
        method: "exact", "mcmc", "reject" or "auto"; see `draw_backward`.
        return_counts: whether to tell what the draws cost.
        throw: whether to raise if the filter lost its weights; else its last particles stand for what is not known.

    Returns:
        States with leading axes (num_paths, L), L = T or the window; with `return_counts` the pair of these and a
        `BackwardCounts`.

    Raises:
        ValueError: `filtered` is a batch of filters, or did not store its history.
        DegenerateWeightsError: the filter lost all its weights (not while traced).

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.97, scale=0.2)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(jax.random.key(1), model, ys, num_particles=200, store="full")
        >>> bi.kernels.backward_sample(jax.random.key(2), model, filtered, num_paths=10).shape
        (10, 50)

    References:
        Godsill, Doucet and West (2004), doi:10.1198/016214504000000151.
    """
    errors.check_count("num_paths", num_paths)
    errors.check_choice("method", method, BACKWARD_METHODS)
    history = history_of(filtered, is_whole=False)
    if throw and errors.is_concrete(filtered.log_evidence) and not np.all(np.isfinite(filtered.log_evidence)):
        raise errors.DegenerateWeightsError("The filter lost all its weights: there is nothing to smooth.", filtered)
    paths, counts = _sample_paths(errors.as_key(key), model, history, filtered.ess.shape[-1], num_paths, method)
    return (paths, counts) if return_counts else paths


@partial(jax.jit, static_argnums=(3, 4, 5))
def _sample_paths(
    key: Array, model: StateSpaceModel, history: History, num_steps: int, num_paths: int, method: str
) -> tuple[PyTree, "BackwardCounts"]:
    start = num_steps - history.log_weights.shape[0]  # the time of the first row
    key_last, key_steps = jax.random.split(key)
    particles, log_weights, ancestors = history
    last = resampling.iid(key_last, log_weights[-1], num_paths)
    x_last = resampling.gather(jax.tree.map(lambda leaf: leaf[-1], particles), last)

    def step(carry, now):
        x, index = carry
        particles_prev, log_weights_prev, ancestors, t = now
        key_t = jax.random.fold_in(key_steps, t)
        ancestors = ancestors[index]
        drawn, costs = draw_counted(key_t, model, particles_prev, log_weights_prev, x, t, ancestors, 1, method)
        index = drawn[:, 0]
        x = resampling.gather(particles_prev, index)
        return (x, index), (x, costs)

    before = jax.tree.map(lambda leaf: leaf[:-1], (particles, log_weights))
    steps = (*before, ancestors[1:], jnp.arange(start + 1, num_steps))
    _, (paths, costs) = jax.lax.scan(step, (x_last, last), steps, reverse=True)
    paths = jax.tree.map(lambda path, x: jnp.swapaxes(jnp.concatenate([path, x[None]]), 0, 1), paths, x_last)
    return paths, BackwardCounts(*(jnp.pad(cost, (1, 0)) for cost in costs))


def draw_backward(
    key: Key[Array, ""],
    model: StateSpaceModel,
    particles_prev: PyTree,
    log_weights_prev: Float[Array, " N"],
    particles: PyTree,
    t: Int[Array, ""],
    ancestors: Int[Array, " n"],
    num_draws: int = 1,
    method: str = "auto",
) -> Int[Array, "n m"]:
    """Draws `num_draws` independent backward indices for every particle at time t.

        J_i^1, ..., J_i^m  ~  Cat( W_{t-1}^l m_t(X_{t-1}^l, X_t^i),  l = 1..N )

    or, for "mcmc", one Metropolis-Hastings step towards that law; see `bayesinf.kernels.backward`.

    Args:
        key: PRNG key.
        model: its transition law is m_t.
        particles_prev: states at t - 1, with leading axis N.
        log_weights_prev: their log weights, unnormalised.
        particles: states at t, with leading axis n; any number of them, from this population or not.
        t: the time of `particles`, t >= 1.
        ancestors: shape (n,), where each particle came from: the start of the Metropolis-Hastings step, given the
            ancestor independent over draws, and the answer of any method for a particle that nothing at t - 1 could
            have moved to.
        num_draws: m >= 1.
        method: "exact", "mcmc", "reject" or "auto".

    Returns:
        Indices in [0, N), int32, of shape (n, m).

    Raises:
        ValueError: `method` is unknown, or `num_draws` no whole number of at least 1, or "reject" has no bound.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=0.0, persistence=0.9, scale=0.1)
        >>> before = jnp.array([-1.0, 0.0, 1.0])  # from which 0.9 is reached with mean -0.9, 0, 0.9
        >>> now, ancestors = jnp.array([0.9, 0.01]), jnp.array([2, 1])
        >>> bi.kernels.draw_backward(
        ...     jax.random.key(0), model, before, jnp.zeros(3), now, jnp.array(1), ancestors, num_draws=4
        ... ).tolist()
        [[2, 2, 2, 2], [1, 1, 1, 1]]

    References:
        Dau and Chopin (2023), doi:10.1214/23-EJS2173.
    """
    return draw_counted(key, model, particles_prev, log_weights_prev, particles, t, ancestors, num_draws, method)[0]


def draw_counted(
    key: Key[Array, ""],
    model: StateSpaceModel,
    particles_prev: PyTree,
    log_weights_prev: Float[Array, " N"],
    particles: PyTree,
    t: Int[Array, ""],
    ancestors: Int[Array, " n"],
    num_draws: int = 1,
    method: str = "auto",
) -> tuple[Int[Array, "n m"], Counts]:
    """`draw_backward`, and what it cost."""
    errors.check_choice("method", method, BACKWARD_METHODS)
    errors.check_count("num_draws", num_draws)
    num, num_prev = ancestors.shape[0], log_weights_prev.shape[0]
    if method == "auto":
        method = "exact" if num * num_prev <= _AUTO_DENSITIES else "mcmc"
    particles_prev, log_weights_prev, particles, ancestors = jax.lax.stop_gradient(
        (particles_prev, weights.clean(log_weights_prev), particles, ancestors)
    )
    none, all_of_them = jnp.zeros((), jnp.int32), jnp.asarray(num * num_draws, jnp.int32)
    if method == "mcmc":
        indices = _draw_mcmc(key, model, particles_prev, log_weights_prev, particles, ancestors, t, num_draws)
        return indices, Counts(num_proposals=all_of_them, num_exact=none)

    draw_row = _exact_row(model, particles_prev, log_weights_prev, t)
    if method == "reject":

        def draw_exact(keys: Array, rows: Int[Array, " b"]) -> Int[Array, " b"]:
            x = resampling.gather(particles, rows)
            return jax.vmap(lambda key, x, ancestor: draw_row(key, x, ancestor, 1)[0])(keys, x, ancestors[rows])

        return draw_by_rejection(key, model, particles_prev, log_weights_prev, particles, t, num_draws, draw_exact)

    rows = (jax.random.split(key, num), particles, ancestors)
    batch_size = max(1, min(num, _TILE // num_prev))
    indices = jax.lax.map(lambda row: draw_row(*row, num_draws), rows, batch_size=batch_size)
    return indices, Counts(num_proposals=none, num_exact=all_of_them)


def _exact_row(
    model: StateSpaceModel, particles_prev: PyTree, log_weights_prev: Float[Array, " N"], t: Int[Array, ""]
) -> Callable[..., Int[Array, " m"]]:
    """Draws from the categorical law of one particle."""
    num_prev = log_weights_prev.shape[0]
    width = math.isqrt(num_prev - 1) + 1  # of a block, about sqrt(N)
    num_blocks = -(-num_prev // width)
    padding = num_blocks * width - num_prev

    def draw_row(key: Array, x: PyTree, ancestor: Array, num_draws: int) -> Array:
        log_transition = jax.vmap(lambda x_prev: log_prob(model.transition(x_prev, t), x))(particles_prev)
        log_masses = weights.clean(log_weights_prev + log_transition)
        largest = jnp.max(log_masses)
        is_possible = jnp.isfinite(largest)
        masses = jnp.exp(log_masses - jnp.where(is_possible, largest, 0.0))
        blocks = jnp.pad(masses, (0, padding)).reshape(num_blocks, width)
        # first the block and then the place in it: of N masses only about 2 sqrt(N) are cumulated, in float64
        with jax.enable_x64(True):
            u_block, u_place = resampling.uniform64(key, (2, num_draws))
            block = resampling.invert64(jnp.sum(blocks, 1), u_block)
            place = jax.vmap(resampling.invert64)(blocks[block], u_place)
        return jnp.where(is_possible, block * width + place, ancestor)

    return draw_row


def _draw_mcmc(key, model, particles_prev, log_weights_prev, particles, ancestors, t, num_draws):
    """One step for every draw, all from the ancestor."""
    key_propose, key_accept = jax.random.split(key)
    shape = (ancestors.shape[0], num_draws)
    proposed = resampling.iid(key_propose, log_weights_prev, shape[0] * shape[1]).reshape(shape)

    def density(index, x):
        return log_prob(model.transition(resampling.gather(particles_prev, index), t), x)

    log_current = jax.vmap(density)(ancestors, particles)[:, None]
    log_proposed = jax.vmap(jax.vmap(density, (0, None)))(proposed, particles)
    u = jax.random.uniform(key_accept, shape, log_proposed.dtype)
    return jnp.where(jnp.log(u) < log_proposed - log_current, proposed, ancestors[:, None])
