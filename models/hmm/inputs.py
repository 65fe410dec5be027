"""What the functions of hidden Markov chains take, checked and brought into one form."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from bayesinf import errors

__all__ = ["Chain", "as_chain", "check_lengths", "check_row", "check_rows", "each", "over_series"]


class Chain(NamedTuple):
    """A hidden chain and the likelihoods of its states; leading axes of the last three are of several series.

    Attributes:
        log_init: log P(x_0).
        log_trans: log P(x_{t+1} | x_t), one matrix or one for every move.
        log_lik: log p(y_t | x_t), 0 where y_t is missing or after the end.
        is_real: whether t is before the end of the series.
    """

    log_init: Float[Array, " k"]
    log_trans: Float[Array, "k k"] | Float[Array, "s k k"]
    log_lik: Float[Array, "*b t k"]
    is_real: Bool[Array, "*b t"]


def as_chain(log_init: Any, log_trans: Any, log_lik: Any, mask: Any, lengths: Any) -> Chain:
    """Arrays of matching shapes with the missing and the padding taken out.

    Raises:
        ValueError: a shape does not fit, probabilities do not sum to one, a likelihood is NaN, or a length is out of
            range.
    """
    log_init, log_trans, log_lik = (
        errors.as_array(name, is_floating=True)(value)
        for name, value in (("log_init", log_init), ("log_trans", log_trans), ("log_lik", log_lik))
    )
    dtype = jnp.result_type(log_init, log_trans, log_lik)
    log_init, log_trans, log_lik = log_init.astype(dtype), log_trans.astype(dtype), log_lik.astype(dtype)
    if log_init.ndim != 1 or not log_init.size:
        raise ValueError(f"log_init must be a vector of K log probabilities, got shape {log_init.shape}")
    num_states = log_init.shape[0]
    if log_lik.ndim < 2 or log_lik.shape[-1] != num_states or not log_lik.shape[-2]:
        raise ValueError(f"log_lik must have shape (..., T, {num_states}), K from log_init, got {log_lik.shape}")
    num_steps = log_lik.shape[-2]
    if log_trans.shape not in ((num_states, num_states), (num_steps - 1, num_states, num_states)):
        raise ValueError(
            f"log_trans must have shape {(num_states, num_states)}, or {(num_steps - 1, num_states, num_states)} with "
            f"a matrix for every move of the T = {num_steps} rows of log_lik, got {log_trans.shape}"
        )
    check_rows("log_init", log_init)
    check_rows("log_trans", log_trans)
    is_observed = _mask(mask, log_lik.shape[:-1])
    is_real = _before_end(lengths, log_lik.shape[:-1])
    log_lik = _without(log_lik, is_observed, is_real)
    _check_likelihoods(log_lik)
    return Chain(log_init, log_trans, log_lik, is_real)


@jax.jit
def _without(log_lik: Array, is_observed: Array, is_real: Array) -> Array:
    return jnp.where((is_observed & is_real)[..., None], log_lik, 0.0)


def over_series(function: Any, log_lik: Array, *arrays: Array) -> Any:
    """function(log_lik, *arrays) of one series, or of each of several."""
    for _ in range(log_lik.ndim - 2):
        function = partial(each, function)
    return function(log_lik, *arrays)


def each(function: Any, *arrays: PyTree) -> Any:
    """The function of every element of the leading axes; of a single one without `vmap`.

    Loops over a batch of one are three times slower than those over the one.
    """
    if jax.tree.leaves(arrays)[0].shape[0] != 1:
        return jax.vmap(function)(*arrays)
    found = function(*jax.tree.map(lambda leaf: leaf[0], arrays))
    return jax.tree.map(lambda leaf: leaf[None], found)


def check_rows(name: str, log_p: Array) -> None:
    """Rows of log probabilities that sum to one; skipped while traced."""
    if not errors.is_concrete(log_p) or not log_p.size:
        return
    slack = log_p.shape[-1] * float(jnp.finfo(log_p.dtype).eps) ** 0.5
    values = np.asarray(log_p)  # inside a traced function even known arrays would be traced by jax's operations
    with np.errstate(invalid="ignore"):
        totals = np.logaddexp.reduce(values, axis=-1)
    if np.all(np.abs(totals) <= slack):
        return
    hint = ""
    if np.all(values >= 0) and np.allclose(np.sum(values, -1), 1.0, atol=slack):
        hint = "; these are probabilities: pass their logarithms"
    elif np.any(totals == -np.inf):
        hint = "; a state that is never left still needs a row: it stays where it is with probability one"
    worst = np.exp(totals).flat[np.argmax(np.where(np.isnan(totals), np.inf, np.abs(totals)))]
    raise ValueError(f"{name} must hold log probabilities whose exponentials sum to 1, got a sum of {worst:.6g}{hint}")


def check_lengths(lengths: Array, num_steps: int) -> None:
    """Of series within the rows that there are; skipped while traced."""
    if not errors.is_concrete(lengths):
        return
    values = np.asarray(lengths)
    if np.any((values < 1) | (values > num_steps)):
        raise ValueError(f"lengths must lie between 1 and T = {num_steps}, got {values}")


def check_row(log_lik: Array) -> None:
    """The log densities of one observation; skipped while traced, where NaN gives NaN."""
    if not errors.is_concrete(log_lik):
        return
    values = np.asarray(log_lik)
    if np.any(np.isnan(values) | (values == np.inf)):
        raise ValueError(
            f"log_lik must hold log densities below infinity, got {values}; where y_t is missing, pass zeros"
        )


def _mask(mask: Any, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return jnp.asarray(np.ones(shape, bool))
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask must be boolean, True where y_t is observed, got dtype {mask.dtype}")
    if mask.shape not in (shape, shape[-1:]):
        raise ValueError(f"mask must have shape {shape}, that of log_lik without its states, got {mask.shape}")
    return jnp.broadcast_to(mask, shape)


def _before_end(lengths: Any, shape: tuple[int, ...]) -> Array:
    if lengths is None:
        return jnp.asarray(np.ones(shape, bool))
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != shape[:-1]:
        raise ValueError(
            f"lengths must be whole numbers of shape {shape[:-1]}, one for every series of log_lik, got "
            f"{lengths.dtype} of shape {lengths.shape}"
        )
    check_lengths(lengths, shape[-1])
    return jnp.arange(shape[-1]) < lengths[..., None]


def _check_likelihoods(log_lik: Array) -> None:
    """Skipped while traced, where NaN gives NaN."""
    if not errors.is_concrete(log_lik):
        return
    values = np.asarray(log_lik)
    is_bad = np.any(np.isnan(values) | (values == np.inf), -1)
    if np.any(is_bad):
        where = np.argwhere(is_bad)[:5].squeeze(-1 if is_bad.ndim == 1 else ()).tolist()
        raise ValueError(
            f"log_lik must hold log densities below infinity, got NaN or inf at steps {where}; where y_t is missing, "
            "say so with mask, True where it is observed"
        )
