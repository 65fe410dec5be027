"""Where a hidden Markov chain will be: the filter's law, moved on without data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from bayesinf import errors
from bayesinf.models.hmm.inputs import check_rows
from bayesinf.models.hmm.recursion import log_total

__all__ = ["hmm_forecast"]


def hmm_forecast(
    log_filtered: Float[ArrayLike, "*b k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "h k k"],
    horizon: int,
) -> Float[Array, "*b h k"]:
    """The law of the next states: log P(x_{t+h} | y_{0:t}) for h = 1, ..., horizon.

    The law of the next observations is the mixture of the emissions with these weights.

    Args:
        log_filtered: log p(x_t | y_{0:t}), shape (..., K): a row, or all rows, of what `hmm_filter` found.
        log_trans: log P(x_{s+1} = j | x_s = i) at row i and column j, shape (K, K), or (horizon, K, K) of the moves to
            come.
        horizon: how many steps ahead.

    Returns:
        Log probabilities, shape (..., horizon, K); -inf throughout where `log_filtered` is.

    Raises:
        ValueError: horizon is below 1, a shape does not fit, or probabilities do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> forecast = models.hmm_forecast(jnp.log(jnp.array([0.8, 0.2])), log_trans, horizon=2)
        >>> [round(p, 3) for p in jnp.exp(forecast[:, 0]).tolist()]
        [0.74, 0.692]
    """
    horizon = errors.check_count("horizon", horizon)
    start: Array = errors.as_array("log_filtered", is_floating=True)(log_filtered)
    trans: Array = errors.as_array("log_trans", is_floating=True)(log_trans)
    num_states = start.shape[-1]
    if trans.shape not in ((num_states, num_states), (horizon, num_states, num_states)):
        raise ValueError(
            f"log_trans must have shape {(num_states, num_states)} or {(horizon, num_states, num_states)}, K from "
            f"log_filtered and a matrix for every step of the horizon, got {trans.shape}"
        )
    check_rows("log_trans", trans)

    def move(log_p: Array, trans_h: Array | None) -> tuple[Array, Array]:
        moved = log_total(log_p[..., :, None] + (trans if trans_h is None else trans_h), axis=-2)
        return moved, moved

    varying = trans if trans.ndim == 3 else None
    _, laws = jax.lax.scan(move, start.astype(jnp.result_type(start, trans)), varying, length=horizon)
    return jnp.moveaxis(laws, 0, -2)
