"""The law of the next token, cut down and drawn from.

    q0 ~ exp(l / temperature), cut down by min_p and then top_p

with l(v) a model's log probabilities: min_p leaves tokens of at least this part of the largest probability, top_p the
smallest set of most probable tokens that has at least this mass, with all that are as probable as its last.

References:
    Holtzman et al. (2020), doi:10.48550/arXiv.1904.09751 (top_p).
    Nguyen et al. (2025), doi:10.48550/arXiv.2407.01082 (min_p).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors

__all__ = ["PADDING", "as_tokens", "check_tokens", "draw_tokens", "in_nucleus", "is_in", "truncate"]

PADDING = -1


def truncate(
    log_model: Float[Array, "n v"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None = None,
    min_p: Float[Array, ""] | None = None,
) -> Float[Array, "n v"]:
    """Log probabilities of q0.

    Args:
        log_model: l, log probabilities or logits.
        temperature: above 0.
        top_p, min_p: in (0, 1); None for none.

    Returns:
        Log probabilities; -inf for what was cut off.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling.next_token import truncate
        >>> log_model = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
        >>> kept = jnp.exp(truncate(log_model, jnp.array(1.0), top_p=jnp.array(0.7)))
        >>> [round(share, 3) for share in kept[0].tolist()]
        [0.625, 0.375, 0.0]
    """
    log_probs = jax.nn.log_softmax(log_model / temperature.astype(log_model.dtype))
    if min_p is None and top_p is None:
        return log_probs
    if min_p is not None:
        least = jnp.max(log_probs, axis=1, keepdims=True) + jnp.log(min_p).astype(log_probs.dtype)
        log_probs = jax.nn.log_softmax(jnp.where(log_probs >= least, log_probs, -jnp.inf))
    if top_p is not None:
        log_probs = jax.nn.log_softmax(jnp.where(in_nucleus(jnp.exp(log_probs), top_p), log_probs, -jnp.inf))
    return log_probs


def draw_tokens(key: Key[Array, ""], log_probs: Float[Array, "n v"]) -> Int[Array, " n"]:
    """A token of each row: first a group of tokens, then one of the group.

    Exact, as drawing at once is, and of v tokens 2 sqrt(v) random numbers are needed instead of v; these would take
    longer than a small model does.
    """
    vocab_size = log_probs.shape[1]
    size = 1 << (vocab_size.bit_length() // 2)
    padded = jnp.pad(log_probs, ((0, 0), (0, -vocab_size % size)), constant_values=-jnp.inf)
    groups = padded.reshape(log_probs.shape[0], -1, size)
    key_group, key_token = jax.random.split(key)
    group = jax.random.categorical(key_group, jax.nn.logsumexp(groups, axis=2))
    chosen = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    token = group * size + jax.random.categorical(key_token, chosen)
    return jnp.minimum(token, vocab_size - 1).astype(jnp.int32)  # beyond only where all are NaN


def as_tokens(tokens: Any) -> Int[Array, " k"]:
    """A row of tokens."""
    return jnp.atleast_1d(jnp.asarray(tokens, jnp.int32)) if np.size(tokens) else jnp.zeros(0, jnp.int32)


def check_tokens(name: str, tokens: Any, vocab_size: int, minimum: int = 0) -> None:
    """Raises where one of them is none of the model's; what is traced passes."""
    if errors.is_concrete(tokens) and np.size(tokens):
        host = np.asarray(tokens)
        low, high = int(host.min()), int(host.max())
        if low < minimum or high >= vocab_size:
            wrong = low if low < minimum else high
            raise ValueError(f"{name} must be tokens in [0, {vocab_size}), which the model has, got {wrong}")


def is_in(tokens: Int[Array, " n"], some: Int[Array, " k"]) -> Bool[Array, " n"]:
    """Whether each token is one of some."""
    return jnp.any(tokens[:, None] == some, axis=1)


def in_nucleus(probs: Float[Array, "n v"], top_p: Float[Array, ""]) -> Bool[Array, "n v"]:
    """Which are at least c, the largest of the row for which the probabilities of at least c sum to at least top_p.

    In float32, whatever they come in; c by bisection on its bits, which are in the order of the numbers: sorting 50,000
    of them takes far longer than 31 sums.
    """
    probs = probs.astype(jnp.float32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        c = jax.lax.bitcast_convert_type(middle, jnp.float32)
        is_enough = jnp.sum(jnp.where(probs >= c[:, None], probs, 0.0), axis=1) >= top_p
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle - 1)

    high = jax.lax.bitcast_convert_type(jnp.max(probs, axis=1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return probs >= jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]
