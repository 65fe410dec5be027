"""Messages along a hidden Markov chain, by a scan, in blocks, or by an associative scan; no probability is floored.

    m_0 = start,    m_{t+1, j} = sum_i m_{t, i} exp(log_lik_{t, i}) exp(log_trans_{t, ij}) / c_t

Forwards m_t is p(x_t | y_{0:t-1}) and c_t = p(y_t | y_{0:t-1}); backwards, on the reversed series and with transposed
transitions, m_t is proportional to p(y_{t+1:T-1} | x_t).

Products of probabilities are quick, and wrong where one of them underflows that a later observation makes the only one
left: with regimes that are never left again, everything after an outlier would be explained by the wrong one. A scan
therefore works with probabilities and proves, step by step, that nothing was lost; where it cannot, the messages are
computed again from their logarithms. With tiny the smallest normal number, eps the rounding, K states, likelihoods
scaled to a largest of one and s_t = sum_i m_{t, i} lik_{t, i}, either of two proofs will do for a step from m_t whose
entries are right to rounding, zeros exact:

    Nothing underflowed. Every product m_{t, i} lik_{t, i} is at least tiny, and at least 2 sqrt(tiny) of s_t, or is
    zero exactly as one of its factors; and so large are all transitions, or zero. All further products are then normal
    numbers, and m_{t+1} is right to rounding, zeros exact.

    What underflowed does not matter. An underflow changes a number by tiny at most. Probabilities of a start, a
    likelihood, their product and its share of s_t move an entry of what is multiplied by the transitions by at most
    4 tiny / s_t + tiny, the transitions and products with them an entry of m_{t+1} by 2 K tiny, as K terms are added:
    together by less than 7 K tiny / min(s_t, 1). Where all entries of m_{t+1} are above 8 K tiny / (eps min(s_t, 1)),
    as in nearly all steps of nearly all series, that is less than their rounding.

Large entries of m_{t+1} alone are no proof: where s_t is small, what is left of m_t may have been lost, and scaled up.

The two other methods are for accelerators, where a step of a scan costs more than its arithmetic, and work with
logarithms throughout.

References:
    Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316 (the associative scan).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = [
    "METHODS",
    "Method",
    "choose_method",
    "log_messages",
    "log_normalize",
    "log_or_never",
    "log_scan",
    "log_total",
]

METHODS = ("auto", "scan", "blocked", "associative")
Method = Literal["auto", "scan", "blocked", "associative"]


def choose_method(method: Method, num_steps: int) -> Method:
    """What "auto" stands for: "scan" on a CPU; "blocked" for long series elsewhere.

    On a CPU the scan was the fastest of the three where they were measured, with T = 1e5 and K = 10.
    """
    if method != "auto":
        return method
    return "scan" if jax.default_backend() == "cpu" or num_steps < 256 else "blocked"


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def log_messages(
    log_start: Float[Array, " k"],
    log_trans: Float[Array, "k k"] | Float[Array, "s k k"],
    log_lik: Float[Array, "t k"],
    method: Method,
) -> Float[Array, "t k"]:
    """The logarithms of the messages; -inf throughout from where the data are impossible."""
    num_steps = log_lik.shape[0]
    if num_steps < 2:  # nothing to cut
        return _scan(log_start, log_trans, log_lik)
    run = {"scan": _scan, "blocked": _blocked, "associative": _associative}[choose_method(method, num_steps)]
    return run(log_start, log_trans, log_lik)


@log_messages.defjvp
def _log_messages_jvp(method: Method, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The derivative of the recursion in logarithms, which runs in both directions."""
    return log_messages(*primals, method), jax.jvp(log_scan, primals, tangents)[1]


def log_total(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Log of the sum of exp(x); -inf, with zero gradients, where every x is -inf, and NaN where one is."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    is_none = largest == -jnp.inf
    shifted = jnp.where(is_none, -jnp.inf, x) - jnp.where(is_none, 0.0, largest)
    total = jnp.where(jnp.squeeze(is_none, axis), 1.0, jnp.sum(jnp.exp(shifted), axis))
    return jnp.log(total) + jnp.squeeze(largest, axis)


@jax.jit
def log_or_never(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log p; -inf, with a gradient of zero, where p is 0."""
    return jnp.where(p == 0, -jnp.inf, jnp.log(jnp.where(p == 0, 1.0, p)))


def log_normalize(log_p: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """The logarithms less that of their sum over the last axis; -inf throughout where all are."""
    return log_p - _finite(log_total(log_p))[..., None]


def _scan(log_start: Array, log_trans: Array, log_lik: Array) -> Array:
    lik = jnp.exp(log_lik - _finite(jnp.max(log_lik, -1, keepdims=True)))
    start, trans = jax.nn.softmax(log_start), jnp.exp(log_trans)
    tiny, eps, num_states = jnp.finfo(lik.dtype).tiny, jnp.finfo(lik.dtype).eps, len(start)
    predicted = _linear_scan(start, trans, lik)
    log_messages = jnp.concatenate([log_start[None], log_or_never(predicted)])
    before = jnp.concatenate([start[None], predicted[:-1]])[: len(predicted)]
    joint = before * lik[:-1]
    total = jnp.sum(joint, -1)
    # the second proof; false for NaN, which a sum of zero leaves behind
    is_large = jnp.min(predicted, -1) * jnp.minimum(total, 1.0) >= 8 * num_states * tiny / eps

    def is_certain(log_lik: Array) -> Bool[Array, ""]:
        """Whether every step has one of the two proofs."""
        floor = 2 * jnp.sqrt(tiny)
        is_kept = (joint >= tiny) & (joint >= floor * total[:, None])
        is_kept = jnp.all(is_kept | (before == 0) | (log_lik[:-1] == -jnp.inf), -1)
        is_trans_kept = jnp.all((trans >= floor) | (log_trans == -jnp.inf), (-2, -1))
        is_start_kept = jnp.all((start >= tiny) | (log_start == -jnp.inf))
        is_kept = is_kept & is_trans_kept & (is_start_kept | (jnp.arange(len(predicted)) > 0))
        return jnp.all(is_kept | is_large) & ~jnp.any(jnp.isnan(predicted))

    # A loop that runs once or never: under vmap a conditional would always pay for both branches, this only where one
    # of the series needs it. XLA moves out of a loop what does not depend on it, and would pay always: so all depends.
    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        same = log_lik + carry[0].astype(log_lik.dtype)  # plus zero
        exact = jax.lax.cond(is_certain(same), lambda: carry[1], lambda: log_scan(log_start, log_trans, same))
        return jnp.array(True), exact

    return jax.lax.while_loop(lambda carry: ~carry[0], again, (jnp.all(is_large), log_messages))[1]


def _linear_scan(start: Array, trans: Array, lik: Array) -> Float[Array, "s k"]:
    """All messages but the first, by products of probabilities; NaN after a sum of zero."""

    def step(message: Array, data: tuple[Array, Array | None]) -> tuple[Array, Array]:
        lik_t, trans_t = data
        joint = message * lik_t
        after = joint / jnp.sum(joint)
        # of several series a product of matrices, several times faster than a sum of products that XLA would fuse
        predicted = jnp.matmul(after, trans if trans_t is None else trans_t, precision="highest")
        return predicted, predicted

    return jax.lax.scan(step, start, (lik[:-1], trans if trans.ndim == 3 else None))[1]


def log_scan(log_start: Array, log_trans: Array, log_lik: Array) -> Array:
    """The messages by sums of logarithms, step by step: slower, certain, and differentiable in both directions."""

    def step(log_message: Array, data: tuple[Array, Array | None]) -> tuple[Array, Array]:
        log_lik_t, log_trans_t = data
        after = log_normalize(log_message + log_lik_t)
        predicted = log_total(after[:, None] + (log_trans if log_trans_t is None else log_trans_t), axis=0)
        return predicted, predicted

    _, predicted = jax.lax.scan(step, log_start, (log_lik[:-1], log_trans if log_trans.ndim == 3 else None))
    return jnp.concatenate([log_start[None], predicted])


def _associative(log_start: Array, log_trans: Array, log_lik: Array) -> Array:
    products = jax.lax.associative_scan(_multiply, log_lik[:-1, :, None] + log_trans)
    # products are known up to their scale; one move from the message before gives the scale of a scan
    before = jnp.concatenate([log_start[None], log_total(log_start[:, None] + products[:-1], axis=-2)])
    after = log_normalize(before + log_lik[:-1])
    return jnp.concatenate([log_start[None], log_total(after[:, :, None] + log_trans, axis=-2)])


def _blocked(log_start: Array, log_trans: Array, log_lik: Array) -> Array:
    """Products of all blocks at once, starts of the blocks one after the other, messages inside all blocks at once."""
    num_moves = log_lik.shape[0] - 1
    length = max(1, int(num_moves**0.5))
    num_blocks, rest = divmod(num_moves, length)

    # what does not fill a block goes first
    trans_rest = log_trans[:rest] if log_trans.ndim == 3 else log_trans
    first = log_scan(log_start, trans_rest, log_lik[: rest + 1])

    def cut(x: Array) -> Array:
        return x[rest:num_moves].reshape(num_blocks, length, *x.shape[1:])

    lik = cut(log_lik)
    trans = cut(log_trans) if log_trans.ndim == 3 else None

    def product(lik_block: Array, trans_block: Array | None) -> Array:
        def step(carry: Array, data: tuple[Array, Array | None]) -> tuple[Array, None]:
            lik_t, trans_t = data
            return _multiply(carry, lik_t[:, None] + (log_trans if trans_t is None else trans_t)), None

        identity = jnp.where(jnp.eye(log_start.shape[0], dtype=bool), 0.0, -jnp.inf).astype(log_lik.dtype)
        return jax.lax.scan(step, identity, (lik_block, trans_block))[0]

    def over(start: Array, block: Array) -> tuple[Array, Array]:
        return log_normalize(log_total(start[:, None] + block, axis=0)), start

    _, starts = jax.lax.scan(over, first[-1], jax.vmap(product)(lik, trans))

    def inside(start: Array, lik_block: Array, trans_block: Array | None) -> Array:
        # the last row of the likelihood is not used
        padded = jnp.concatenate([lik_block, lik_block[-1:]])
        return log_scan(start, log_trans if trans_block is None else trans_block, padded)[1:]

    messages = jax.vmap(inside)(starts, lik, trans)
    return jnp.concatenate([first, messages.reshape(-1, log_start.shape[0])])


def _multiply(x: Float[Array, "*s k k"], y: Float[Array, "*s k k"]) -> Float[Array, "*s k k"]:
    """Product of matrices of logarithms, scaled so that its largest entry is one."""
    product = log_total(x[..., :, :, None] + y[..., None, :, :], axis=-2)
    return product - _finite(jnp.max(product, (-2, -1), keepdims=True))


def _finite(x: Array) -> Array:
    """A shift that leaves -inf what it is."""
    return jnp.where(x == -jnp.inf, 0.0, x)
