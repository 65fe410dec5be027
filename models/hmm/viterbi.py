"""The most probable path of a hidden Markov model.

    delta_0(j) = log P(x_0 = j) + log p(y_0 | j)
    delta_t(j) = max_i [delta_{t-1}(i) + log P(x_t = j | x_{t-1} = i)] + log p(y_t | j)

and back from the best end along the states that attain the maxima.

References:
    Viterbi (1967), doi:10.1109/TIT.1967.1054010.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bayesinf import weights
from bayesinf.models.hmm.inputs import Chain, as_chain, over_series

__all__ = ["HMMPath", "hmm_viterbi"]


class HMMPath(NamedTuple):
    """A most probable path; leading axes are of several series.

    Attributes:
        log_joint: log p(path, y), -inf where the data are impossible.
        path: its states, int32; -1 after the end of a series, and throughout where the data are impossible.
    """

    log_joint: Float[Array, "*b"]
    path: Int[Array, "*b t"]


def hmm_viterbi(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "s k k"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
) -> HMMPath:
    """The path that is the most probable given the series; of several as probable, one.

    It is a point of the law of all paths: each state of it by itself need not be a probable one, see `hmm_smoother`,
    and it says nothing of what else is probable, see `hmm_sample`.

    Args:
        log_init: log P(x_0), shape (K,).
        log_trans: log P(x_{t+1} = j | x_t = i) at row i and column j, shape (K, K) or (T - 1, K, K).
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series.
        mask: True where y_t is observed, shape (..., T) or (T,).
        lengths: of the series where they differ, shape (...).

    Returns:
        The path and its joint log density with the data.

    Raises:
        ValueError: as of `hmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_init, log_trans = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.4, 0.6], [0.8, 0.2]]))
        >>> models.hmm_viterbi(log_init, log_trans, log_lik).path.tolist()
        [0, 0, 0]
    """
    return _viterbi(as_chain(log_init, log_trans, log_lik, mask, lengths))


@jax.jit
def _viterbi(chain: Chain) -> HMMPath:
    log_init, log_trans = chain.log_init, chain.log_trans
    is_varying = log_trans.ndim == 3

    def one(log_lik: Array, is_real: Array) -> HMMPath:
        def forward(delta: Array, data: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
            log_lik_t, is_real_t, log_trans_t = data
            scores = delta[:, None] + (log_trans if log_trans_t is None else log_trans_t)
            best = jnp.argmax(scores, axis=0).astype(jnp.int32)
            moved = jnp.max(scores, axis=0) + log_lik_t
            largest = jnp.max(moved)
            moved = moved - jnp.where(largest == -jnp.inf, 0.0, largest)
            # after the end the chain stands still
            return jnp.where(is_real_t, moved, delta), jnp.where(
                is_real_t, best, jnp.arange(len(best), dtype=jnp.int32)
            )

        data = log_lik[1:], is_real[1:], log_trans if is_varying else None
        last, best = jax.lax.scan(forward, log_init + log_lik[0], data)

        def backward(state: Array, best_t: Array) -> tuple[Array, Array]:
            return best_t[state], state

        end = jnp.argmax(last).astype(jnp.int32)
        first, later = jax.lax.scan(backward, end, best, reverse=True)
        path = jnp.concatenate([first[None], later])

        moves = jnp.arange(len(path) - 1) if is_varying else slice(None)
        log_moves = log_trans[moves, path[:-1], path[1:]] if is_varying else log_trans[path[:-1], path[1:]]
        log_seen = jnp.take_along_axis(log_lik, path[:, None], axis=1)[:, 0]
        terms = log_seen.at[0].add(log_init[path[0]]).at[1:].add(jnp.where(is_real[1:], log_moves, 0.0))
        log_joint = weights.compensated_sum(jnp.where(is_real, terms, 0.0))
        return HMMPath(log_joint, jnp.where(is_real & (log_joint != -jnp.inf), path, -1))

    return over_series(one, chain.log_lik, chain.is_real)
