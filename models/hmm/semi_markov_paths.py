"""Paths of hidden semi-Markov chains: the most probable one, and draws given the data.

The best path is of stays, and the last of them is as probable as its law makes it to last until the end or longer; with
a the steps that a stay has lasted,

    delta_t(k, 1) = max_i [e_{t-1}(i) + log trans_ik] + log p(y_t | k)
    delta_t(k, a + 1) = delta_{t-1}(k, a) + log p(y_t | k)
    e_t(k) = max_a [delta_t(k, a) + log law_k(a)],    and at the end max_{k, a} [delta(k, a) + log P(duration >= a)]

Draws go back along the chain of states and remaining durations, of `bayesinf.models.hmm.semi_markov`.

References:
    Guédon (2003), doi:10.1198/1061860032030 (the last stay goes on after the end).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from bayesinf import errors, weights
from bayesinf.models.hmm.inputs import over_series
from bayesinf.models.hmm.semi_markov import SemiChain, SemiPassed, as_semi_chain, semi_forward

__all__ = ["HSMMPath", "HSMMPaths", "draw_stays", "hsmm_sample", "hsmm_viterbi"]


class HSMMPath(NamedTuple):
    """A most probable path; leading axes are of several series.

    Attributes:
        log_joint: log p(path, y), -inf where the data are impossible.
        path: its states, int32; -1 after the end of a series, and throughout where the data are impossible.
        is_start: whether a stay begins.
    """

    log_joint: Float[Array, "*b"]
    path: Int[Array, "*b t"]
    is_start: Bool[Array, "*b t"]


class HSMMPaths(NamedTuple):
    """Paths drawn; leading axes are of several series.

    Attributes:
        path: states, int32; -1 after the end of a series, and throughout where the data are impossible.
        is_start: whether a stay begins.
    """

    path: Int[Array, "*b n t"]
    is_start: Bool[Array, "*b n t"]


def hsmm_viterbi(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"],
    log_duration: Float[ArrayLike, "k d"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
) -> HSMMPath:
    """The stays that are the most probable given the series; of several as probable, one.

    Args:
        log_init, log_trans, log_duration, log_lik: as of `hsmm_filter`.
        mask, lengths: as of `hsmm_filter`.

    Returns:
        The path, where its stays begin, and its joint log density with the data.

    Raises:
        ValueError: as of `hsmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])
        >>> log_duration = jnp.log(jnp.array([[0.0, 0.1, 0.9], [0.0, 0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]))
        >>> models.hsmm_viterbi(jnp.log(jnp.array([0.5, 0.5])), log_trans, log_duration, log_lik).path.tolist()
        [0, 0, 0, 1]

    References:
        Guédon (2003), doi:10.1198/1061860032030.
    """
    return _viterbi(as_semi_chain(log_init, log_trans, log_duration, log_lik, mask, lengths))


def hsmm_sample(
    key: errors.KeyLike,
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"],
    log_duration: Float[ArrayLike, "k d"],
    log_lik: Float[ArrayLike, "*b t k"],
    num_samples: int,
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
) -> HSMMPaths:
    """Independent paths from the law of the stays given the data.

    Args:
        key: a PRNG key or an integer seed.
        log_init, log_trans, log_duration, log_lik: as of `hsmm_filter`.
        num_samples: how many paths of every series.
        mask, lengths: as of `hsmm_filter`.

    Returns:
        Paths and where their stays begin, of shape (..., num_samples, T).

    Raises:
        ValueError: num_samples is below 1, or as of `hsmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])
        >>> log_duration = jnp.log(jnp.array([[0.0, 0.1, 0.9], [0.0, 0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]))
        >>> log_init = jnp.log(jnp.array([0.5, 0.5]))
        >>> drawn = models.hsmm_sample(0, log_init, log_trans, log_duration, log_lik, num_samples=1000)
        >>> drawn.path.shape, bool(abs((drawn.path[:, 2] == 0).mean() - 0.853) < 0.05)  # what the smoother says
        ((1000, 4), True)
    """
    key = errors.as_key(key)
    num_samples = errors.check_count("num_samples", num_samples)
    chain = as_semi_chain(log_init, log_trans, log_duration, log_lik, mask, lengths)
    shape = chain.log_lik.shape[:-2]
    return _sample(jax.random.split(key, shape) if shape else key, chain, num_samples)


@jax.jit
def _viterbi(chain: SemiChain) -> HSMMPath:
    log_init, log_trans, log_duration = chain.log_init, chain.log_trans, chain.log_duration
    # log P(duration >= a)
    log_survival = jax.lax.cumlogsumexp(log_duration, axis=1, reverse=True)
    num_durations = log_duration.shape[1]

    def one(log_lik: Array, is_real: Array) -> HSMMPath:
        def forward(carry: tuple[Array, Array], data: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array]]:
            delta, log_start = carry
            log_lik_t, is_real_t = data
            moved = jnp.concatenate([log_start[:, None], delta[:, :-1]], axis=1) + log_lik_t[:, None]
            largest = jnp.max(moved)
            moved = moved - jnp.where(largest == -jnp.inf, 0.0, largest)
            ended = moved + log_duration
            lasted = jnp.argmax(ended, axis=1).astype(jnp.int32)
            scores = jnp.max(ended, axis=1)[:, None] + log_trans
            before = jnp.argmax(scores, axis=0).astype(jnp.int32)  # the state before one that starts at t + 1
            after_end = jnp.where(is_real_t, moved, delta), jnp.where(is_real_t, jnp.max(scores, axis=0), log_start)
            return after_end, (lasted, before)

        begin = jnp.full_like(log_duration, -jnp.inf), log_init
        (last, _), (lasted, before) = jax.lax.scan(forward, begin, (log_lik, is_real))

        def backward(carry: tuple[Array, Array], data: tuple[Array, ...]) -> tuple[tuple, tuple[Array, Array]]:
            state, age = carry
            lasted_before, before_t, is_real_t = data  # of the step before t
            came_from = before_t[state]
            is_first = age == 0
            moved = jnp.where(is_first, came_from, state), jnp.where(is_first, lasted_before[came_from], age - 1)
            return jax.tree.map(lambda new, old: jnp.where(is_real_t, new, old), moved, carry), carry

        best = jnp.argmax(last + log_survival).astype(jnp.int32)
        end = best // num_durations, best % num_durations
        # nothing is before the first step
        data = jnp.roll(lasted, 1, axis=0), jnp.roll(before, 1, axis=0), is_real
        _, (path, age) = jax.lax.scan(backward, end, data, reverse=True)

        is_start = is_real & (age == 0)
        is_last = is_real & ~jnp.append(is_real[1:], False)
        is_end = is_real & ~is_last & jnp.append(age[1:] == 0, False)
        log_seen = jnp.take_along_axis(log_lik, path[:, None], axis=1)[:, 0]
        log_moves = jnp.append(log_init[path[:1]], log_trans[path[:-1], path[1:]])
        terms = [(is_real, log_seen), (is_start, log_moves), (is_end, log_duration[path, age])]
        terms.append((is_last, log_survival[path, age]))
        log_joint = weights.compensated_sum(jnp.concatenate([jnp.where(*term, 0.0) for term in terms]))
        is_known = log_joint != -jnp.inf
        return HSMMPath(log_joint, jnp.where(is_real & is_known, path, -1), is_start & is_known)

    return over_series(one, chain.log_lik, chain.is_real)


@partial(jax.jit, static_argnames="num_samples")
def _sample(keys: Array, chain: SemiChain, num_samples: int) -> HSMMPaths:
    def one(log_lik: Array, is_real: Array, key: Key[Array, ""]) -> HSMMPaths:
        passed = semi_forward(chain, log_lik, is_real, is_kept=True)
        path, is_start, _ = draw_stays(key, chain, passed, log_lik, num_samples)
        is_known = is_real & (passed.log_evidence != -jnp.inf)
        return HSMMPaths(jnp.where(is_known, path, -1), is_start & is_known)

    return over_series(one, chain.log_lik, chain.is_real, keys)


def draw_stays(
    key: Key[Array, ""], chain: SemiChain, passed: SemiPassed, log_lik: Float[Array, "t k"], num_samples: int
) -> tuple[Int[Array, "n t"], Bool[Array, "n t"], Int[Array, " n"]]:
    """Paths of one series that was passed with its messages kept: states, starts of stays, what remains of the last.

    Args:
        key: PRNG key.
        chain: the chain.
        passed: of the pass forwards.
        log_lik: of the series.
        num_samples: how many paths.
    """
    log_trans, log_duration = chain.log_trans, chain.log_duration
    num_durations = log_duration.shape[1]
    key_last, key_rest = jax.random.split(key)
    log_after = passed.log_messages + log_lik[:, :, None]
    last = jax.random.categorical(key_last, log_after[-1].reshape(-1), shape=(num_samples,))
    end = last // num_durations, last % num_durations  # the second is r - 1

    def back(carry: tuple[Array, Array], data: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array]]:
        state, rest = carry
        t, log_after_t = data
        # one more step remained of the same stay, or another stay ended
        longer = jnp.concatenate([log_after_t[:, 1:], jnp.full_like(log_after_t[:, :1], -jnp.inf)], axis=1)
        ended = log_after_t[:, :1] + log_trans[:, state] + log_duration[state, rest]
        choices = jnp.concatenate([longer[state, rest][None], ended])
        chosen = jax.random.categorical(jax.random.fold_in(key_rest, t), choices, axis=0)
        is_start = chosen > 0
        before = jnp.where(is_start, chosen - 1, state), jnp.where(is_start, 0, rest + 1)
        return before, (before[0], is_start)

    times = jnp.arange(log_lik.shape[0] - 1)
    _, (earlier, is_start) = jax.lax.scan(back, end, (times, log_after[:-1]), reverse=True)
    path = jnp.concatenate([earlier, end[0][None]]).T.astype(jnp.int32)
    is_start = jnp.concatenate([jnp.ones((1, num_samples), bool), is_start]).T
    return path, is_start, end[1]
