"""Exact prediction sets for the hidden states of a hidden Markov model with observations of any kind.

As `hmm_sets`, for observations that need not be symbols. Given the first state and the transition counts of the states,
these are uniform on the paths with such counts; given the states, the observations of each state are exchangeable. A
candidate for the next states is judged by the end of the series, among M ends drawn from this law,

    a path backward from the last state, by Whittle's numbers
    for each of its states one of the observations that the series has in this state, none twice

with p = (#{score > observed} + u (1 + #{score = observed})) / (M + 1), exact for every M. The score is that of "joint",

    -log P(x_{N-h+1:N} | x_{N-h}, y_{N-h+1:N})

by transition probabilities and emission densities that are estimated from the whole series, the candidate included: no
rearrangement changes them. Where the densities are far from the truth the sets are large, and hold as promised.

References:
    Nettasinghe, Chatterjee, Tipireddy and Halappanavar (2023), https://arxiv.org/abs/2305.17200 (symbols, and blocks).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.hmm_sets import ASSUMES, StateSet
from bayesinf.models.conformal.markov import draw_predecessor, sequences, weighted_p_value
from bayesinf.models.markov_chain import add_constant, check_states, transition_counts

__all__ = ["continuous_state_set", "gaussian_log_likelihood"]

LogLikelihood = Callable[[Float[Array, "n ..."], Float[Array, "n k"]], Float[Array, "n k"]]


def gaussian_log_likelihood(obs: Float[Array, "n ..."], members: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Log densities of all observations by normal laws fitted to each state, independent between components.

    Each state is fitted with one observation more, that has the mean and variance of all, so that no variance vanishes.

    Args:
        obs: y_t.
        members: 1 where the state at t is k, else 0.

    Returns:
        Log density of every observation in every state.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import gaussian_log_likelihood
        >>> obs, members = jnp.array([-1.0, -1.2, 1.0, 1.1]), jnp.eye(2)[jnp.array([0, 0, 1, 1])]
        >>> gaussian_log_likelihood(obs, members).argmax(axis=1).tolist()
        [0, 0, 1, 1]
    """
    flat = obs.reshape(len(obs), -1)
    num = members.sum(0)[:, None] + 1
    mean = (members.T @ flat + flat.mean(0)) / num
    squares = jnp.square(flat[:, None] - mean)
    variance = (jnp.sum(members[:, :, None] * squares, axis=0) + flat.var(0)) / num
    return -0.5 * jnp.sum(squares / variance + jnp.log(2 * jnp.pi * variance), axis=-1)


def continuous_state_set(
    key: errors.KeyLike,
    states: Int[Array | np.ndarray, " t"],
    obs: Float[Array | np.ndarray, "t ..."],
    obs_new: Float[Array | np.ndarray, "h ..."],
    num_states: int,
    alpha: Float[Array, ""] | float,
    *,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    num_draws: int = 999,
) -> StateSet:
    """The set of hidden states behind the next observations, exact at every length of the series and for any emissions.

    Args:
        key: for the draws, and for ties.
        states: x_1, ..., x_T, values in 0..K-1: labelled, not decoded.
        obs: y_1, ..., y_T, numbers or vectors.
        obs_new: y_{T+1}, ..., y_{T+h}; the cost grows as K^h.
        num_states: K.
        alpha: the probability of missing the truth that is allowed.
        log_likelihood: `log_likelihood(obs, members)` of shape (N, K) from all N observations and the states' one-hot
            indicators; finite: where it is NaN, so is the score of a candidate, and its p-value is 1. It must not
            depend on the order of time.
        num_draws: M, of ends for every candidate.

    Returns:
        The set.

    Raises:
        ValueError: an argument is out of its range, or an observation is NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.conformal import continuous_state_set
        >>> states = jnp.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0] * 3)
        >>> obs = 4.0 * states + jax.random.normal(jax.random.key(0), (60,))
        >>> found = continuous_state_set(1, states, obs, jnp.array([-0.3]), 2, alpha=0.1)
        >>> found.candidates[found.mask].tolist()
        [[0]]

    References:
        Diaconis and Freedman (1980), doi:10.1214/aop/1176994767.
    """
    errors.check_count("num_states", num_states)
    errors.check_count("num_draws", num_draws)
    errors.check_fraction("alpha", alpha)
    if len(states) != len(obs) or len(states) == 0 or len(obs_new) == 0:
        raise ValueError(
            "states and obs must be of one length, at least 1, and obs_new hold at least one observation, got "
            f"{len(states)}, {len(obs)} and {len(obs_new)}"
        )
    check_states("states", states, num_states)
    errors.check_not_nan("obs", obs)
    errors.check_not_nan("obs_new", obs_new)
    candidates = jnp.asarray(sequences(num_states, len(obs_new)))
    y = jnp.concatenate([jnp.asarray(obs), jnp.asarray(obs_new)])
    judge = partial(_p_value, errors.as_key(key), jnp.asarray(states), y, num_states, log_likelihood, num_draws)
    p = jax.vmap(judge)(candidates)
    return StateSet(p, p > alpha, candidates, Guarantee("exact", "P(states in set) = 1 - alpha", ASSUMES))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _p_value(
    key: Array, states: Array, y: Array, num_states: int, log_likelihood: LogLikelihood, num_draws: int, head: Array
) -> Float[Array, ""]:
    key_draws, key_ties = jax.random.split(key)
    x, horizon = jnp.concatenate([states, head]), len(head)
    counts = transition_counts(x, num_states)
    log_transition = jnp.log(add_constant(counts))
    log_emission = log_likelihood(y, jax.nn.one_hot(x, num_states))

    def draw(key: Array) -> tuple[Array, Array]:
        left, is_free = counts, jnp.ones(len(x), bool)
        tail: list[Array] = [x[-1]]
        times: list[Array] = []
        for key_step in jax.random.split(key, horizon):
            key_state, key_time = jax.random.split(key_step)
            time = jax.random.categorical(key_time, jnp.where(is_free & (x == tail[0]), 0.0, -jnp.inf))
            previous = draw_predecessor(key_state, left, tail[0])
            left, is_free = left.at[previous, tail[0]].add(-1), is_free.at[time].set(False)
            tail, times = [previous, *tail], [time, *times]
        return jnp.stack(tail), jnp.stack(times)

    def score(tail: Array, times: Array) -> Array:
        log_density = log_emission[times]
        log_path = jnp.sum(log_transition[tail[:-1], tail[1:]]) + jnp.sum(log_density[jnp.arange(horizon), tail[1:]])
        log_forward = log_transition[tail[0]] + log_density[0]
        for log_now in log_density[1:]:
            log_forward = logsumexp(log_forward[:, None] + log_transition, axis=0) + log_now
        return logsumexp(log_forward) - log_path

    tails, times = jax.vmap(draw)(jax.random.split(key_draws, num_draws))
    tails = jnp.concatenate([tails, x[None, -horizon - 1 :]])
    times = jnp.concatenate([times, jnp.arange(len(x) - horizon, len(x))[None]])
    scores = jax.vmap(score)(tails, times)
    return weighted_p_value(scores, jnp.full(num_draws + 1, 1 / (num_draws + 1)), num_draws, key_ties)
