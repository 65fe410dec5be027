"""Smoothing of a hidden Markov model: the state given data before and after it.

    P(x_t = i | y_{0:T-1}) is proportional to p(x_t = i | y_{0:t}) p(y_{t+1:T-1} | x_t = i)
    p(y_{t+1:T-1} | x_t = i) = sum_j P(x_{t+1} = j | x_t = i) p(y_{t+1} | x_{t+1} = j) p(y_{t+2:T-1} | x_{t+1} = j)

References:
    Rabiner (1989), doi:10.1109/5.18626.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.hmm.inputs import Chain, as_chain, over_series
from bayesinf.models.hmm.recursion import METHODS, Method, log_normalize, log_total
from bayesinf.models.hmm.statistics import expected_statistics, forward

__all__ = ["HMMSmoothed", "hmm_fixed_lag", "hmm_smoother"]


class HMMSmoothed(NamedTuple):
    """What all data tell, of T steps and K states; leading axes are of several series.

    Attributes:
        log_evidence: log p(y_{0:T-1}).
        log_smoothed: log P(x_t = i | y); after the end of a series they are forecasts; -inf throughout where the data
            are impossible.
        expected_transitions: sum over t of P(x_t = i, x_{t+1} = j | y), shape (K, K); of every t by itself, shape
            (T - 1, K, K), where transitions depend on t. Zero where the data are impossible.
    """

    log_evidence: Float[Array, "*b"]
    log_smoothed: Float[Array, "*b t k"]
    expected_transitions: Float[Array, "*b k k"] | Float[Array, "*b s k k"]


def hmm_smoother(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "s k k"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
    method: Method = "auto",
) -> HMMSmoothed:
    """The state at every time given the whole series, and the expected number of every transition.

    Args:
        log_init: log P(x_0), shape (K,).
        log_trans: log P(x_{t+1} = j | x_t = i) at row i and column j, shape (K, K) or (T - 1, K, K).
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series.
        mask: True where y_t is observed, shape (..., T) or (T,).
        lengths: of the series where they differ, shape (...).
        method: as of `hmm_filter`.

    Returns:
        The smoothed laws, the expected transitions and the log evidence.

    Raises:
        ValueError: as of `hmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_init, log_trans = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.8, 0.2]]))
        >>> smoothed = models.hmm_smoother(log_init, log_trans, log_lik)
        >>> [round(p, 3) for p in jnp.exp(smoothed.log_smoothed[:, 0]).tolist()]
        [0.9, 0.89, 0.9]
        >>> round(float(smoothed.expected_transitions.sum()), 3)
        2.0

    References:
        Rabiner (1989), doi:10.1109/5.18626.
    """
    errors.check_choice("method", method, METHODS)
    return _smooth(as_chain(log_init, log_trans, log_lik, mask, lengths), method)


def hmm_fixed_lag(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "s k k"],
    log_lik: Float[ArrayLike, "*b t k"],
    lag: int,
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
    method: Method = "auto",
) -> Float[Array, "*b t k"]:
    """The state at every time given the data up to `lag` steps later: log P(x_t | y_{0:min(t + lag, T - 1)}).

    With lag 0 it is the filter's answer, with lag T - 1 the smoother's. The work is `lag` passes over the series, each
    of all times at once.

    Args:
        log_init: log P(x_0), shape (K,).
        log_trans: log P(x_{t+1} = j | x_t = i) at row i and column j, shape (K, K) or (T - 1, K, K).
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series.
        lag: how many later observations are waited for, at least 0.
        mask: True where y_t is observed, shape (..., T) or (T,).
        lengths: of the series where they differ, shape (...).
        method: of the pass forwards, as of `hmm_filter`.

    Returns:
        Log probabilities in the shape of `log_lik`.

    Raises:
        ValueError: lag is negative, or as of `hmm_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_init, log_trans = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5], [0.8, 0.2]]))
        >>> lagged = models.hmm_fixed_lag(log_init, log_trans, log_lik, lag=1)
        >>> [round(p, 3) for p in jnp.exp(lagged[:, 0]).tolist()]
        [0.8, 0.89, 0.9]
    """
    errors.check_choice("method", method, METHODS)
    lag = errors.check_count("lag", lag, minimum=0)
    chain = as_chain(log_init, log_trans, log_lik, mask, lengths)
    return _fixed_lag(chain, min(lag, chain.log_lik.shape[-2] - 1), method)


@partial(jax.jit, static_argnames="method")
def _smooth(chain: Chain, method: Method) -> HMMSmoothed:
    def one(log_lik: Array, is_real: Array) -> HMMSmoothed:
        passed = forward(chain.log_init, chain.log_trans, log_lik, is_real, method)
        return HMMSmoothed(passed.log_evidence, *expected_statistics(passed, chain.log_trans, log_lik, is_real, method))

    return over_series(one, chain.log_lik, chain.is_real)


@partial(jax.jit, static_argnames=("lag", "method"))
def _fixed_lag(chain: Chain, lag: int, method: Method) -> Float[Array, "*b t k"]:
    def one(log_lik: Array, is_real: Array) -> Array:
        passed = forward(chain.log_init, chain.log_trans, log_lik, is_real, method)
        num_steps, num_states = log_lik.shape
        # row t + l is of the time l steps after t; after the end nothing is seen, and a message of nothing is moved by
        # any transition to itself
        seen = jnp.concatenate([log_lik, jnp.zeros((lag, num_states), log_lik.dtype)])
        is_varying = chain.log_trans.ndim == 3
        uniform = jnp.full((lag + 1, num_states, num_states), -jnp.log(num_states), log_lik.dtype)
        moves = jnp.concatenate([chain.log_trans, uniform]) if is_varying else chain.log_trans

        def back(message: Array, distance: Array) -> tuple[Array, None]:
            """From the state `distance` steps after t to the one before it, for all t."""
            ahead = jax.lax.dynamic_slice_in_dim(seen, distance, num_steps) + message
            move = jax.lax.dynamic_slice_in_dim(moves, distance - 1, num_steps) if is_varying else moves
            message = log_total(move + ahead[:, None, :])
            largest = jnp.max(message, -1, keepdims=True)
            return message - jnp.where(largest == -jnp.inf, 0.0, largest), None

        distances = jnp.arange(lag, 0, -1)
        message, _ = jax.lax.scan(back, jnp.zeros_like(log_lik), distances)
        return log_normalize(passed.log_predicted + log_lik + message)

    return over_series(one, chain.log_lik, chain.is_real)
