"""Hidden semi-Markov chains: every stay in a state has a duration drawn from a law of its own.

    state of the first stay ~ init, of the next ~ trans from the one before;    duration in state k ~ law_k on 1, ..., D

With r_t the steps that remain of the stay, this one included, (x_t, r_t) is a Markov chain of K D states: it counts
down, and where r_t = 1 a new stay begins. Its messages cost O(K D + K^2) a step for this structure, in place of
O(K^2 D^2):

    m_t(k, r) = p(x_t = k, r_t = r | y_{0:t-1}),    w_t(k, r) = p(y_{t:T-1} | x_t = k, r_t = r)
    s_t(k) = sum_i m_{t-1}(i, 1) p(y_{t-1} | i) trans_ik,    b_t(k) = sum_r law_k(r) w_t(k, r)
    m_t(k, r) = m_{t-1}(k, r + 1) p(y_{t-1} | k) + s_t(k) law_k(r)
    w_t(k, 1) = p(y_t | k) sum_j trans_kj b_{t+1}(j),    w_t(k, r + 1) = p(y_t | k) w_{t+1}(k, r)

each up to a constant, and all in logarithms: nothing underflows. The first stay begins with the series; the last one
may go on after it, as long as its law says.

References:
    Yu (2010), doi:10.1016/j.artint.2009.11.011.
    Yu and Kobayashi (2006), doi:10.1109/TSP.2006.872540 (the chain of states and remaining durations).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bayesinf import errors, weights
from bayesinf.models.hmm.inputs import as_chain, check_rows, over_series
from bayesinf.models.hmm.recursion import log_normalize, log_total

__all__ = [
    "HSMMFiltered",
    "HSMMSmoothed",
    "SemiChain",
    "SemiPassed",
    "as_semi_chain",
    "hsmm_filter",
    "hsmm_smoother",
    "semi_forward",
    "semi_statistics",
]


class HSMMFiltered(NamedTuple):
    """What the data so far tell, of T steps and K states; leading axes are of several series.

    Attributes:
        log_evidence: log p(y_{0:T-1}); -inf exactly where no path explains the data.
        log_evidence_increments: log p(y_t | y_{0:t-1}); 0 where y_t is missing and after the end of the series.
        log_filtered: log p(x_t | y_{0:t}); after the end of a series they are forecasts; -inf throughout from where the
            data are impossible.
        log_predicted: log p(x_t | y_{0:t-1}).
    """

    log_evidence: Float[Array, "*b"]
    log_evidence_increments: Float[Array, "*b t"]
    log_filtered: Float[Array, "*b t k"]
    log_predicted: Float[Array, "*b t k"]


class HSMMSmoothed(NamedTuple):
    """What all data tell, of T steps, K states and durations up to D; leading axes are of several series.

    Attributes:
        log_evidence: log p(y_{0:T-1}).
        log_smoothed: log P(x_t = k | y); after the end of a series they are forecasts; -inf throughout where the data
            are impossible.
        log_starts: log P(a stay in k begins at t | y); -inf after the end of the series.
        expected_transitions: expected number of stays in i that end and are followed by one in j. Zero, as are the
            durations, where the data are impossible.
        expected_durations: expected number of stays of each duration; the last stay counts with its whole duration, of
            which the part after the end follows its law.
    """

    log_evidence: Float[Array, "*b"]
    log_smoothed: Float[Array, "*b t k"]
    log_starts: Float[Array, "*b t k"]
    expected_transitions: Float[Array, "*b k k"]
    expected_durations: Float[Array, "*b k d"]


def hsmm_filter(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"],
    log_duration: Float[ArrayLike, "k d"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
) -> HSMMFiltered:
    """Filters one series, or several of different lengths: the state given the data up to now, never those to come.

    For forecasts give the series rows at its end that `mask` says are not observed. The gradient is that of the
    recursion, and finite where data are impossible.

    Args:
        log_init: log P(x_0), shape (K,); a stay begins at time 0.
        log_trans: log probabilities of the next state, column j, where a stay in i ends, row i, shape (K, K); with
            -inf on the diagonal durations are those of `log_duration`, else of several stays in a row.
        log_duration: log probabilities of the durations 1, ..., D of a stay, shape (K, D).
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series; -inf where a state cannot emit y_t.
        mask: True where y_t is observed, shape (..., T) or (T,); what `log_lik` holds elsewhere is not looked at.
        lengths: of the series where they differ, shape (...); rows of `log_lik` after the end are not looked at.

    Returns:
        The filtered and predicted laws, and the log evidence with its increments.

    Raises:
        ValueError: a shape does not fit, probabilities do not sum to one, or a likelihood is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])  # two states take turns
        >>> log_duration = jnp.log(jnp.array([[0.0, 0.1, 0.9], [0.0, 0.1, 0.9]]))  # for two or three steps
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5]]))
        >>> filtered = models.hsmm_filter(jnp.log(jnp.array([0.5, 0.5])), log_trans, log_duration, log_lik)
        >>> [round(p, 3) for p in jnp.exp(filtered.log_filtered[:, 0]).tolist()]
        [0.8, 0.941, 0.853, 0.059]

    References:
        Yu (2010), doi:10.1016/j.artint.2009.11.011.
    """
    return _filter(as_semi_chain(log_init, log_trans, log_duration, log_lik, mask, lengths))


def hsmm_smoother(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"],
    log_duration: Float[ArrayLike, "k d"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
) -> HSMMSmoothed:
    """The state at every time given the whole series, where stays begin, and how long they last; in O(T K D) memory.

    Args:
        log_init, log_trans, log_duration, log_lik: as of `hsmm_filter`.
        mask, lengths: as of `hsmm_filter`.

    Returns:
        The smoothed laws, and the expected transitions and durations.

    Raises:
        ValueError: as of `hsmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])
        >>> log_duration = jnp.log(jnp.array([[0.0, 0.1, 0.9], [0.0, 0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]))
        >>> smoothed = models.hsmm_smoother(jnp.log(jnp.array([0.5, 0.5])), log_trans, log_duration, log_lik)
        >>> [round(p, 3) for p in jnp.exp(smoothed.log_smoothed[:, 0]).tolist()]
        [0.941, 0.941, 0.853, 0.059]
        >>> round(float(smoothed.expected_durations.sum()), 3)  # two stays: neither one nor three have four steps
        2.0

    References:
        Yu (2010), doi:10.1016/j.artint.2009.11.011.
    """
    return _smooth(as_semi_chain(log_init, log_trans, log_duration, log_lik, mask, lengths))


class SemiChain(NamedTuple):
    """A hidden semi-Markov chain and the likelihoods of its states; leading axes of the last two are of several series.

    Attributes:
        log_init: log P(x_0).
        log_trans: log probabilities of the state after i, row i.
        log_duration: log probabilities of 1, ..., D.
        log_lik: log p(y_t | x_t), 0 where y_t is missing or after the end.
        is_real: whether t is before the end of the series.
    """

    log_init: Float[Array, " k"]
    log_trans: Float[Array, "k k"]
    log_duration: Float[Array, "k d"]
    log_lik: Float[Array, "*b t k"]
    is_real: Bool[Array, "*b t"]


def as_semi_chain(log_init: Any, log_trans: Any, log_duration: Any, log_lik: Any, mask: Any, lengths: Any) -> SemiChain:
    """Arrays of matching shapes with the missing and the padding taken out.

    Raises:
        ValueError: as of `hsmm_filter`.
    """
    if jnp.ndim(log_trans) != 2:
        raise ValueError(f"log_trans must have shape (K, K), the same at all times, got {jnp.shape(log_trans)}")
    chain = as_chain(log_init, log_trans, log_lik, mask, lengths)
    log_duration = errors.as_array("log_duration", is_floating=True)(log_duration)
    num_states = chain.log_init.shape[0]
    if log_duration.ndim != 2 or log_duration.shape[0] != num_states or not log_duration.size:
        raise ValueError(
            f"log_duration must have shape ({num_states}, D), K from log_init and a column for each of the durations "
            f"1, ..., D, got {log_duration.shape}"
        )
    check_rows("log_duration", log_duration)
    dtype = jnp.result_type(chain.log_lik, log_duration)
    log_init, log_trans = chain.log_init.astype(dtype), chain.log_trans.astype(dtype)
    return SemiChain(log_init, log_trans, log_duration.astype(dtype), chain.log_lik.astype(dtype), chain.is_real)


class SemiPassed(NamedTuple):
    """What one pass forwards tells of a series.

    Attributes:
        log_evidence: log p(y_{0:T-1}).
        log_evidence_increments: log p(y_t | y_{0:t-1}).
        log_predicted: log p(x_t | y_{0:t-1}).
        log_starts: log P(a stay in k begins at t | y_{0:t-1}).
        log_ends: log P(a stay in k ends at t | y_{0:t}).
        log_messages: log P(x_t = k, r_t = r | y_{0:t-1}); without durations unless they are asked for.
    """

    log_evidence: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    log_predicted: Float[Array, "t k"]
    log_starts: Float[Array, "t k"]
    log_ends: Float[Array, "t k"]
    log_messages: Float[Array, "t k d"]


def semi_forward(
    chain: SemiChain, log_lik: Float[Array, "t k"], is_real: Bool[Array, " t"], *, is_kept: bool
) -> SemiPassed:
    """One pass forwards over a series of the chain; `is_kept` asks for its messages."""
    log_trans, log_duration = chain.log_trans, chain.log_duration

    def step(carry: tuple[Array, Array], log_lik_t: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        log_message, log_start = carry
        log_predicted = log_total(log_message)
        increment = log_total(log_predicted + log_lik_t)
        log_after = log_message + (log_lik_t - jnp.where(increment == -jnp.inf, 0.0, increment))[:, None]
        log_end = log_after[:, 0]
        next_start = log_total(log_end[:, None] + log_trans, axis=0)
        counted = jnp.concatenate([log_after[:, 1:], jnp.full_like(log_after[:, :1], -jnp.inf)], axis=1)
        moved = log_total(jnp.stack([counted, next_start[:, None] + log_duration]), axis=0)
        kept = log_message if is_kept else log_message[:, :0]
        return (moved, next_start), (increment, log_predicted, log_start, log_end, kept)

    begin = chain.log_init[:, None] + log_duration, chain.log_init
    increments, *rest = jax.lax.scan(step, begin, log_lik)[1]
    increments = jnp.where(is_real, increments, 0.0)
    return SemiPassed(_total(increments), increments, *rest)


def semi_statistics(
    chain: SemiChain, passed: SemiPassed, log_lik: Float[Array, "t k"], is_real: Bool[Array, " t"]
) -> HSMMSmoothed:
    """The pass backwards over a series of the chain, and what the two say together."""
    log_trans, log_duration = chain.log_trans, chain.log_duration
    is_possible = passed.log_evidence != -jnp.inf

    def step(carry: tuple[Array, ...], data: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        log_ahead, log_begin, transitions, durations = carry  # w and b of the next step
        log_lik_t, log_message, log_start, log_end, is_next_real, is_real_t = data
        log_follow = log_trans + log_begin
        transitions += _counted(is_next_real & is_possible, log_end[:, None] + log_follow)

        log_ahead = jnp.concatenate([log_total(log_follow)[:, None], log_ahead[:, :-1]], axis=1) + log_lik_t[:, None]
        log_joint = log_total(log_message + log_ahead)
        total = log_total(log_joint)
        shift = jnp.where(total == -jnp.inf, 0.0, total)
        log_ahead = log_ahead - shift
        log_begin = log_total(log_duration + log_ahead)
        stays = log_start[:, None] + log_duration + log_ahead
        durations += _counted(is_real_t & is_possible, stays)
        return (log_ahead, log_begin, transitions, durations), (log_joint - shift, log_start + log_begin)

    after_end = jnp.zeros_like(log_duration)  # whatever follows the series explains it
    begin = (after_end, after_end[:, 0], jnp.zeros_like(log_trans), jnp.zeros_like(log_duration))
    is_next_real = jnp.append(is_real[1:], False)
    data = log_lik, passed.log_messages, passed.log_starts, passed.log_ends, is_next_real, is_real
    (_, _, transitions, durations), (log_smoothed, log_starts) = jax.lax.scan(step, begin, data, reverse=True)
    log_smoothed = jnp.where(is_possible, log_normalize(log_smoothed), -jnp.inf)
    log_starts = jnp.where(is_possible & is_real[:, None], log_starts, -jnp.inf)
    return HSMMSmoothed(passed.log_evidence, log_smoothed, log_starts, transitions, durations)


@jax.jit
def _filter(chain: SemiChain) -> HSMMFiltered:
    def one(log_lik: Array, is_real: Array) -> HSMMFiltered:
        passed = semi_forward(chain, log_lik, is_real, is_kept=False)
        log_filtered = log_normalize(passed.log_predicted + log_lik)
        return HSMMFiltered(passed.log_evidence, passed.log_evidence_increments, log_filtered, passed.log_predicted)

    return over_series(one, chain.log_lik, chain.is_real)


@jax.jit
def _smooth(chain: SemiChain) -> HSMMSmoothed:
    def one(log_lik: Array, is_real: Array) -> HSMMSmoothed:
        return semi_statistics(chain, semi_forward(chain, log_lik, is_real, is_kept=True), log_lik, is_real)

    return over_series(one, chain.log_lik, chain.is_real)


def _counted(is_counted: Array, log_p: Array) -> Array:
    return jnp.where(is_counted, jnp.exp(jnp.where(is_counted, log_p, 0.0)), 0.0)


@jax.custom_jvp
def _total(increments: Float[Array, " t"]) -> Float[Array, ""]:
    """Their sum in float64, whose derivative is that of any sum."""
    return weights.compensated_sum(increments)


@_total.defjvp
def _total_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _total(primals[0]), jnp.sum(tangents[0])
