"""Paths of a hidden Markov model given the data: filter forwards, sample backwards.

    x_{T-1} ~ p(x_{T-1} | y_{0:T-1}),    P(x_t = i | x_{t+1} = j, y_{0:t}) is proportional to
    p(x_t = i | y_{0:t}) P(x_{t+1} = j | x_t = i)

References:
    Scott (2002), doi:10.1198/016214502753479464.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from bayesinf import errors
from bayesinf.models.hmm.filter import HMMFiltered, filter_chain
from bayesinf.models.hmm.inputs import Chain, as_chain, over_series
from bayesinf.models.hmm.recursion import METHODS, Method

__all__ = ["hmm_sample", "sample_paths"]


def hmm_sample(
    key: errors.KeyLike,
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "s k k"],
    log_lik: Float[ArrayLike, "*b t k"],
    num_samples: int,
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
    method: Method = "auto",
) -> Int[Array, "*b n t"]:
    """Independent paths from the law of x_{0:T-1} given y_{0:T-1}.

    Args:
        key: a PRNG key or an integer seed.
        log_init: log P(x_0), shape (K,).
        log_trans: log P(x_{t+1} = j | x_t = i) at row i and column j, shape (K, K) or (T - 1, K, K).
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series.
        num_samples: how many paths of every series.
        mask: True where y_t is observed, shape (..., T) or (T,).
        lengths: of the series where they differ, shape (...).
        method: of the pass forwards, as of `hmm_filter`.

    Returns:
        Paths, shape (..., num_samples, T), int32; -1 after the end of a series, and throughout where the data are
        impossible.

    Raises:
        ValueError: num_samples is below 1, or as of `hmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_init, log_trans = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.8, 0.2]]))
        >>> paths = models.hmm_sample(0, log_init, log_trans, log_lik, num_samples=1000)
        >>> paths.shape, bool(abs(paths[:, 1].mean() - 0.11) < 0.04)  # what the smoother says
        ((1000, 3), True)
    """
    key = errors.as_key(key)
    num_samples = errors.check_count("num_samples", num_samples)
    errors.check_choice("method", method, METHODS)
    chain = as_chain(log_init, log_trans, log_lik, mask, lengths)
    return sample_paths(key, chain, filter_chain(chain, method), num_samples)


@partial(jax.jit, static_argnames="num_samples")
def sample_paths(key: Key[Array, ""], chain: Chain, filtered: HMMFiltered, num_samples: int) -> Int[Array, "*b n t"]:
    """`hmm_sample` of a chain that has been filtered."""
    log_trans = chain.log_trans
    keys = jax.random.split(key, filtered.log_evidence.shape) if filtered.log_evidence.ndim else key

    def one(log_filtered: Array, is_real: Array, is_impossible: Array, key: Key[Array, ""]) -> Array:
        key_last, key_rest = jax.random.split(key)
        last = _draw(key_last, log_filtered[-1][:, None], jnp.zeros(num_samples, jnp.int32))

        def back(state: Array, data: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
            t, log_filtered_t, log_trans_t = data
            log_joint = log_filtered_t[:, None] + (log_trans if log_trans_t is None else log_trans_t)
            before = _draw(jax.random.fold_in(key_rest, t), log_joint, state)
            return before, before

        times = jnp.arange(log_filtered.shape[0] - 1)
        data = times, log_filtered[:-1], log_trans if log_trans.ndim == 3 else None
        _, earlier = jax.lax.scan(back, last, data, reverse=True)
        paths = jnp.concatenate([earlier, last[None]]).T
        return jnp.where(is_real & ~is_impossible, paths, -1)

    return over_series(one, filtered.log_filtered, chain.is_real, filtered.log_evidence == -jnp.inf, keys)


def _draw(key: Key[Array, ""], log_joint: Float[Array, "k m"], columns: Int[Array, " n"]) -> Int[Array, " n"]:
    """States from the given columns of a table of log weights, by inversion; one without weight is never drawn."""
    largest = jnp.max(log_joint, axis=0)
    table = jnp.cumsum(jnp.exp(log_joint - jnp.where(largest == -jnp.inf, 0.0, largest)), axis=0)
    u = 1.0 - jax.random.uniform(key, columns.shape, table.dtype)  # in (0, 1]
    return jnp.sum(table[:, columns] < u * table[-1, columns], axis=0, dtype=jnp.int32)
