"""Exact prediction sets for the hidden states, and the observations, of a hidden Markov model of unknown law.

Known are states x_{1:T} with their observations y_{1:T} (a labelled calibration series), and for sets of states the
observations y_{T+1:T+h}. Every candidate x_{T+1:T+h} is appended to the series, N = T + h, and judged by a p-value.
Those with p > alpha are the set, which holds the truth with probability at least 1 - alpha at every T, whatever the law
of the model. Equally likely under every hidden Markov model, and every mixture of them, are

    "type":   all series with the same x_1, transition counts F of x and emission counts E: x is uniform on the paths
              with counts F, and y, given x, a draw without replacement from row x_t of E at every t;
    "block":  the orders of the blocks of (x_t, y_t) that end where (x_N, y_N) is visited, the first stretch staying in
              place; the group of the reference, of which the former is the larger and gives the smaller sets.

A series is scored by its end, with (P, B) estimated from F and E, which a rearrangement does not change:

    "joint":    -log P(x_{N-h+1:N} | x_{N-h}, y_{N-h+1:N})
    "filter":   sum_k 1 - P(x_{N-h+k} | x_{N-h}, y_{N-h+1:N-h+k})         (k = 1, ..., h), that of the reference
    "smooth":   sum_k 1 - P(x_{N-h+k} | x_{N-h}, y_{N-h+1:N})

    p = P(score > observed) + u P(score = observed)          over the law of the end; u uniform, or 1 without a key

Blocks must end at the anchor: cut where they begin, rearranged series end in another state than the observed one, and
nothing is guaranteed.

References:
    Nettasinghe, Chatterjee, Tipireddy and Halappanavar (2023), https://arxiv.org/abs/2305.17200.
    Diaconis and Freedman (1980), doi:10.1214/aop/1176994767.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.hmm_ends import draw_blocks, draw_end, law_of_ends, score_terms, spread
from bayesinf.models.conformal.markov import sequences, share, weighted_p_value
from bayesinf.models.markov_chain import add_constant, check_states, transition_counts

__all__ = ["ObservationSet", "StateSet", "hmm_observation_set", "hmm_state_set"]

SCORES = ("joint", "filter", "smooth")
OBSERVATION_SCORES = ("predictive", "joint")
GROUPS = ("type", "block")
MAX_TAILS = 10_000  # that are enumerated for one candidate
NUM_DRAWS = 999
ASSUMES = (
    "the states are a homogeneous Markov chain and the observations independent given them, each of a law of its "
    "state; or a mixture of such models"
)


class StateSet(eqx.Module):
    """The hidden states that may come next.

    Attributes:
        p: the p-value of every candidate.
        mask: which are in the set, p > alpha; it can be empty, and it can be all.
        candidates: the K^h sequences of states.
        guarantee: what the set promises.
    """

    p: Float[Array, " c"]
    mask: Bool[Array, " c"]
    candidates: Int[Array, "c h"]
    guarantee: Guarantee = eqx.field(static=True)


class ObservationSet(eqx.Module):
    """The observations that may come next.

    Attributes:
        p: of every candidate the largest p-value over the states that may have given it.
        mask: which are in the set, p > alpha.
        candidates: the M^h sequences of symbols.
        guarantee: what the set promises.
    """

    p: Float[Array, " c"]
    mask: Bool[Array, " c"]
    candidates: Int[Array, "c h"]
    guarantee: Guarantee = eqx.field(static=True)


def hmm_state_set(
    states: Int[Array | np.ndarray, " t"],
    obs: Int[Array | np.ndarray, " t"],
    obs_new: Int[Array | np.ndarray, " h"],
    num_states: int,
    num_symbols: int,
    alpha: Float[Array, ""] | float,
    *,
    score: str = "joint",
    group: str = "type",
    key: errors.KeyLike | None = None,
    num_draws: int | None = None,
) -> StateSet:
    """The set of hidden states behind the next observations, exact at every length of the series.

    Args:
        states: x_1, ..., x_T, values in 0..K-1: labelled, not decoded; of decoded states nothing is promised.
        obs: y_1, ..., y_T, values in 0..M-1.
        obs_new: y_{T+1}, ..., y_{T+h}; the cost grows as K^h (K M)^h.
        num_states: K.
        num_symbols: M.
        alpha: the probability of missing the truth that is allowed.
        score: "joint", "filter" or "smooth"; the same sets for h = 1, the first the smallest for more steps.
        group: "type", or "block" as in the reference.
        key: for ties, broken at random, so that coverage is 1 - alpha itself; without one they count for the
            candidate, and coverage is more.
        num_draws: Monte Carlo draws of the end of the series for every candidate, as exact as the enumeration; needs a
            key. All (K M)^h ends are enumerated where it is left out; 999 are drawn where these are too many, and for
            blocks with h > 1.

    Returns:
        The set.

    Raises:
        ValueError: an argument is out of its range, or draws are to be made without a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.conformal import hmm_state_set
        >>> states = jnp.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0])
        >>> obs = states.at[5].set(0)
        >>> found = hmm_state_set(states, obs, jnp.array([0]), 2, 2, alpha=0.2, key=jax.random.key(0))
        >>> found.candidates[found.mask].tolist()
        [[0]]
        >>> print(found.guarantee)
        exact: P(states in set) = 1 - alpha, if the states are a homogeneous Markov chain and ...

    References:
        Nettasinghe, Chatterjee, Tipireddy and Halappanavar (2023), https://arxiv.org/abs/2305.17200.
    """
    errors.check_choice("score", score, SCORES)
    errors.check_choice("group", group, GROUPS)
    _check_series(states, obs, obs_new, num_states, num_symbols)
    errors.check_fraction("alpha", alpha)
    horizon = len(obs_new)
    is_enumerable = (num_states * num_symbols) ** horizon <= MAX_TAILS if group == "type" else horizon == 1
    num_draws = _choose_draws(num_draws, is_enumerable, key)
    candidates = jnp.asarray(sequences(num_states, horizon))
    p = _p_values(
        jnp.asarray(states),
        jnp.asarray(obs),
        candidates,
        jnp.asarray(obs_new),
        key=None if key is None else errors.as_key(key),
        sizes=(num_states, num_symbols),
        score=score,
        group=group,
        num_draws=num_draws,
    )
    statement = "P(states in set) " + (">= 1 - alpha" if key is None else "= 1 - alpha")
    return StateSet(p, p > alpha, candidates, Guarantee("exact", statement, ASSUMES))


def hmm_observation_set(
    states: Int[Array | np.ndarray, " t"],
    obs: Int[Array | np.ndarray, " t"],
    num_states: int,
    num_symbols: int,
    alpha: Float[Array, ""] | float,
    *,
    horizon: int = 1,
    score: str = "predictive",
    key: errors.KeyLike | None = None,
    num_draws: int | None = None,
) -> ObservationSet:
    """The set of the next observations, whose states are unknown too.

    Pairs (x, y)_{T+1:T+h} are judged as by `hmm_state_set`, and y is in the set if it is with any x:

        p(y) = max_x p(x, y)

    The true pair has p > alpha with probability 1 - alpha, and so has p(y) at least. For h = 1 `visit_conformal` has no
    maximum to pay for, at the times of visits to a state.

    Args:
        states: x_1, ..., x_T, values in 0..K-1: labelled, not decoded.
        obs: y_1, ..., y_T, values in 0..M-1.
        num_states: K.
        num_symbols: M.
        alpha: the probability of missing the truth that is allowed.
        horizon: h; the cost grows as (K M)^(2 h).
        score: "predictive", -log P(y_{N-h+1:N} | x_{N-h}), or "joint", -log P(x_{N-h+1:N}, y_{N-h+1:N} | x_{N-h}).
        key: for ties, broken at random; without one they count for the candidate.
        num_draws: as of `hmm_state_set`.

    Returns:
        The set.

    Raises:
        ValueError: an argument is out of its range, or draws are to be made without a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.conformal import hmm_observation_set
        >>> states = jnp.tile(jnp.array([0, 1, 2]), 20)
        >>> found = hmm_observation_set(states, states, 3, 3, alpha=0.2, key=jax.random.key(0))
        >>> found.candidates[found.mask].tolist()
        [[0]]

    References:
        Diaconis and Freedman (1980), doi:10.1214/aop/1176994767.
    """
    errors.check_choice("score", score, OBSERVATION_SCORES)
    horizon = errors.check_count("horizon", horizon)
    _check_series(states, obs, np.zeros(horizon, np.int32), num_states, num_symbols)
    errors.check_fraction("alpha", alpha)
    num_draws = _choose_draws(num_draws, (num_states * num_symbols) ** horizon <= MAX_TAILS, key)
    candidates = jnp.asarray(sequences(num_symbols, horizon))
    judge = partial(
        _p_values,
        jnp.asarray(states),
        jnp.asarray(obs),
        jnp.asarray(sequences(num_states, horizon)),
        key=None if key is None else errors.as_key(key),
        sizes=(num_states, num_symbols),
        score="pair" if score == "joint" else score,
        group="type",
        num_draws=num_draws,
    )
    p = jax.lax.map(lambda new: judge(new).max(), candidates, batch_size=16)
    return ObservationSet(p, p > alpha, candidates, Guarantee("exact", "P(observations in set) >= 1 - alpha", ASSUMES))


@partial(jax.jit, static_argnames=("sizes", "score", "group", "num_draws"))
def _p_values(
    states: Array,
    obs: Array,
    candidates: Array,
    obs_new: Array,
    *,
    key: Any,
    sizes: tuple[int, int],
    score: str,
    group: str,
    num_draws: int | None,
) -> Float[Array, " c"]:
    """The p-value of every candidate; one u for all, so that their sets are nested in alpha."""
    num_states, num_symbols = sizes
    key_draws: Any
    key_draws, key_ties = (None, None) if key is None else jax.random.split(key)
    y, horizon = jnp.concatenate([obs, obs_new]), len(obs_new)

    def judge(candidate: Array) -> Array:
        x = jnp.concatenate([states, candidate])
        counts = transition_counts(x, num_states)
        emitted = jax.nn.one_hot(x, num_states).T @ jax.nn.one_hot(y, num_symbols)
        terms = score_terms(add_constant(counts), add_constant(emitted), horizon, score)
        end = jnp.concatenate([x[-horizon - 1 :], obs_new])  # x_{N-h}, ..., x_N, y_{N-h+1}, ..., y_N
        if num_draws is None and group == "type":
            weights = law_of_ends(counts, emitted, x[-1], horizon)
            scores = sum((spread(table, axes, horizon, x[-1]) for table, axes in terms), jnp.zeros(weights.shape))
            observed = jnp.ravel_multi_index((*end[:horizon], *obs_new), scores.shape, mode="clip")
            return weighted_p_value(scores.ravel(), weights.ravel(), observed, key_ties)
        if num_draws is None:
            is_visit = (x == x[-1]) & (y == y[-1])
            ends = jnp.stack([x[:-1], x[1:], y[1:]], axis=1)
            weights = share(is_visit[1:] & (jnp.cumsum(is_visit)[1:] > 1))  # the first visit ends no block
        else:
            draw = partial(draw_end, counts, emitted, x[-1]) if group == "type" else partial(draw_blocks, x, y)
            drawn = jax.vmap(partial(draw, horizon))(jax.random.split(key_draws, num_draws))
            ends = jnp.concatenate([drawn, end[None]])
            weights = jnp.full(num_draws + 1, 1 / (num_draws + 1))
        looked_up = (table[tuple(ends[:, axis] for axis in axes)] for table, axes in terms)
        scores = sum(looked_up, jnp.zeros(len(ends)))
        return weighted_p_value(scores, weights, len(ends) - 1, key_ties)

    return jax.vmap(judge)(candidates)


def _choose_draws(num_draws: int | None, is_enumerable: bool, key: errors.KeyLike | None) -> int | None:
    if num_draws is not None:
        num_draws = errors.check_count("num_draws", num_draws)
    elif not is_enumerable:
        num_draws = NUM_DRAWS
    if num_draws is not None and key is None:
        raise ValueError(
            "key must be given where the ends of the series are drawn, not enumerated: there are too many of them, or "
            "num_draws was given, or group='block' with several steps; use key=jax.random.key(0)"
        )
    return num_draws


def _check_series(
    states: Array | np.ndarray, obs: Array | np.ndarray, obs_new: Array | np.ndarray, num_states: int, num_symbols: int
) -> None:
    errors.check_count("num_states", num_states)
    errors.check_count("num_symbols", num_symbols)
    if len(states) != len(obs) or len(states) == 0 or len(obs_new) == 0:
        raise ValueError(
            "states and obs must be of one length, at least 1, and obs_new hold at least one observation, got "
            f"{len(states)}, {len(obs)} and {len(obs_new)}"
        )
    check_states("states", states, num_states)
    check_states("obs", obs, num_symbols)
    check_states("obs_new", obs_new, num_symbols)
