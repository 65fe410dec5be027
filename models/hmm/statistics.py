"""Evidence of a hidden Markov chain, and its derivative: the expected numbers of visits and of transitions.

With gamma_t(i) = P(x_t = i | y) and xi_t(i, j) = P(x_t = i, x_{t+1} = j | y), Fisher's identity says

    d log p(y) = sum_i gamma_0(i) d log_init_i + sum_{t, i} gamma_t(i) d log_lik_{t, i}
                 + sum_{t, i, j} xi_t(i, j) d log_trans_{t, ij}

so that a gradient costs one pass backwards, whose result is finite where the data are impossible, and where a
transition is.

References:
    Baum, Petrie, Soules and Weiss (1970), doi:10.1214/aoms/1177697196.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bayesinf import weights
from bayesinf.models.hmm.recursion import Method, log_messages, log_normalize, log_total

__all__ = ["Passed", "Statistics", "expected_statistics", "forward"]


class Passed(NamedTuple):
    """What one pass forwards tells of a series of T steps and K states.

    Attributes:
        log_evidence: log p(y_{0:T-1}).
        log_predicted: log p(x_t | y_{0:t-1}).
        log_evidence_increments: log p(y_t | y_{0:t-1}); 0 after the end of the series.
    """

    log_evidence: Float[Array, ""]
    log_predicted: Float[Array, "t k"]
    log_evidence_increments: Float[Array, " t"]


class Statistics(NamedTuple):
    """Expected statistics of the hidden chain given the whole series.

    Attributes:
        log_smoothed: log P(x_t = i | y); -inf throughout where the data are impossible.
        transitions: sum over t of P(x_t = i, x_{t+1} = j | y), in the shape of `log_trans`: of every t by itself where
            transitions depend on time.
    """

    log_smoothed: Float[Array, "t k"]
    transitions: Float[Array, "k k"] | Float[Array, "s k k"]


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def forward(
    log_init: Float[Array, " k"],
    log_trans: Float[Array, "k k"] | Float[Array, "s k k"],
    log_lik: Float[Array, "t k"],
    is_real: Bool[Array, " t"],
    method: Method,
) -> Passed:
    """One pass forwards; steps that are not real are after the end of the series, and their likelihoods are one."""
    log_predicted = log_messages(log_init, log_trans, log_lik, method)
    return _passed(log_predicted, log_lik, is_real)


@forward.defjvp
def _forward_jvp(method: Method, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Passed, Passed]:
    log_init, log_trans, log_lik, is_real = primals
    passed = forward(log_init, log_trans, log_lik, is_real, method)
    statistics = expected_statistics(passed, log_trans, log_lik, is_real, method)
    smoothed = jnp.exp(statistics.log_smoothed)
    log_evidence_dot = (
        _contract(smoothed[0], tangents[0])
        + _contract(statistics.transitions, tangents[1])
        + _contract(smoothed, tangents[2])
    )

    def rest(log_init: Array, log_trans: Array, log_lik: Array) -> Passed:
        return _passed(log_messages(log_init, log_trans, log_lik, method), log_lik, is_real)

    # compiled away where the derivative of the evidence alone is asked for
    _, rest_dot = jax.jvp(rest, primals[:3], tangents[:3])
    return passed, rest_dot._replace(log_evidence=log_evidence_dot)


def expected_statistics(
    passed: Passed, log_trans: Array, log_lik: Array, is_real: Bool[Array, " t"], method: Method
) -> Statistics:
    """The pass backwards, and what the two say together."""
    log_backward = _backward(log_trans, log_lik, method)
    log_smoothed = log_normalize(passed.log_predicted + log_lik + log_backward)
    log_smoothed = jnp.where(passed.log_evidence == -jnp.inf, -jnp.inf, log_smoothed)
    log_after = passed.log_predicted[:-1] + log_lik[:-1]
    log_ahead = log_lik[1:] + log_backward[1:]
    is_counted = is_real[1:] & (passed.log_evidence != -jnp.inf)
    if log_trans.ndim == 3:
        transitions = _pair_law(log_after, log_trans, log_ahead, is_counted)
    else:
        transitions = _sum_of_pairs(log_after, log_trans, log_ahead, is_counted)
    return Statistics(log_smoothed, transitions)


def _passed(log_predicted: Array, log_lik: Array, is_real: Array) -> Passed:
    log_evidence_increments = jnp.where(is_real, log_total(log_predicted + log_lik), 0.0)
    return Passed(weights.compensated_sum(log_evidence_increments), log_predicted, log_evidence_increments)


def _backward(log_trans: Array, log_lik: Array, method: Method) -> Array:
    """Log p(y_{t+1:T-1} | x_t), each up to a constant: messages of the reversed series."""
    reverse = log_trans[::-1] if log_trans.ndim == 3 else log_trans
    start = jnp.zeros_like(log_lik[0])
    return log_messages(start, jnp.swapaxes(reverse, -1, -2), log_lik[::-1], method)[::-1]


@jax.custom_jvp
def _sum_of_pairs(log_after: Array, log_trans: Array, log_ahead: Array, is_counted: Array) -> Array:
    """Sum over t of xi_t by one product of matrices; one by one where a product could underflow that matters."""
    dtype = log_trans.dtype
    after, ahead, trans = _scaled(log_after), _scaled(log_ahead), jnp.exp(log_trans)
    total = jnp.sum((after @ trans) * ahead, -1)
    is_certain = jnp.all(~is_counted | (total >= trans.size * jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps))
    share = jnp.where(is_counted, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    summed = trans * jnp.matmul((after * share[:, None]).T, ahead, precision="highest")

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:  # a loop that runs once or never, see `recursion`
        same = log_after + carry[0].astype(dtype)  # plus zero, so that XLA leaves it in the loop
        exact = _sum_one_by_one(same, log_trans, log_ahead, is_counted)
        return jnp.array(True), jnp.where(is_certain, carry[1], exact)

    return jax.lax.while_loop(lambda carry: ~carry[0], again, (is_certain, summed))[1]


@_sum_of_pairs.defjvp
def _sum_of_pairs_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    exact = partial(_sum_one_by_one, is_counted=primals[3])
    return _sum_of_pairs(*primals), jax.jvp(exact, primals[:3], tangents[:3])[1]


def _sum_one_by_one(log_after: Array, log_trans: Array, log_ahead: Array, is_counted: Array) -> Array:
    def step(total: Array, data: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _pair_law(data[0], log_trans, data[1], data[2]), None

    return jax.lax.scan(step, jnp.zeros_like(log_trans), (log_after, log_ahead, is_counted))[0]


def _pair_law(log_after: Array, log_trans: Array, log_ahead: Array, is_counted: Array) -> Array:
    """The law xi of a pair of neighbours; zero where it does not count or is impossible."""
    joint = log_after[..., :, None] + log_trans + log_ahead[..., None, :]
    total = log_total(joint.reshape(*joint.shape[:-2], log_trans.shape[-1] ** 2))
    is_possible = is_counted & (total != -jnp.inf)
    law = jnp.exp(joint - jnp.where(is_possible, total, 0.0)[..., None, None])
    return jnp.where(is_possible[..., None, None], law, 0.0)


def _contract(weight: Array, tangent: Array) -> Array:
    """Sum of the products; what has no weight counts for nothing, were its tangent infinite."""
    return jnp.sum(jnp.where(weight == 0, 0.0, weight * tangent))


def _scaled(log_p: Array) -> Array:
    largest = jnp.max(log_p, -1, keepdims=True)
    return jnp.exp(log_p - jnp.where(largest == -jnp.inf, 0.0, largest))
