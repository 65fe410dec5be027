"""The forward pass of a hidden Markov model: what the data so far tell of the state, and their evidence.

    p(x_t | y_{0:t-1}) = sum_i p(x_{t-1} = i | y_{0:t-1}) P(x_t | x_{t-1} = i)
    p(y_t | y_{0:t-1}) = sum_j p(x_t = j | y_{0:t-1}) p(y_t | x_t = j)
    p(x_t | y_{0:t}) = p(x_t | y_{0:t-1}) p(y_t | x_t) / p(y_t | y_{0:t-1})

References:
    Rabiner (1989), doi:10.1109/5.18626.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.hmm.inputs import Chain, as_chain, check_row, check_rows, over_series
from bayesinf.models.hmm.recursion import METHODS, Method, log_normalize, log_total
from bayesinf.models.hmm.statistics import forward

__all__ = ["HMMBelief", "HMMFiltered", "filter_chain", "hmm_filter", "hmm_start", "hmm_step"]


class HMMFiltered(NamedTuple):
    """What the data so far tell, of T steps and K states; leading axes are of several series.

    Attributes:
        log_evidence: log p(y_{0:T-1}); -inf exactly where no path of the chain explains the data.
        log_evidence_increments: log p(y_t | y_{0:t-1}); 0 where y_t is missing and after the end of the series.
        log_filtered: log p(x_t | y_{0:t}); after the end of a series they are forecasts; -inf throughout from where the
            data are impossible.
        log_predicted: log p(x_t | y_{0:t-1}).
    """

    log_evidence: Float[Array, "*b"]
    log_evidence_increments: Float[Array, "*b t"]
    log_filtered: Float[Array, "*b t k"]
    log_predicted: Float[Array, "*b t k"]


def hmm_filter(
    log_init: Float[ArrayLike, " k"],
    log_trans: Float[ArrayLike, "k k"] | Float[ArrayLike, "s k k"],
    log_lik: Float[ArrayLike, "*b t k"],
    *,
    mask: Bool[ArrayLike, "..."] | None = None,
    lengths: Int[ArrayLike, "..."] | None = None,
    method: Method = "auto",
) -> HMMFiltered:
    """Filters one series, or several of different lengths: the state given the data up to now, never those to come.

    No probability is floored, and none is lost to underflow: see `bayesinf.models.hmm.recursion`. The gradient of
    `log_evidence` is the expected statistics of the smoother, one pass backwards, and finite where the data are
    impossible.

    Args:
        log_init: log P(x_0), shape (K,).
        log_trans: log P(x_{t+1} = j | x_t = i) at row i and column j, shape (K, K), or (T - 1, K, K) where it depends
            on t.
        log_lik: log p(y_t | x_t), shape (T, K), or (..., T, K) of several series; -inf where a state cannot emit y_t.
        mask: True where y_t is observed, shape (..., T) or (T,); what `log_lik` holds elsewhere is not looked at.
        lengths: of the series where they differ, shape (...); rows of `log_lik` after the end are not looked at.
        method: "scan"; "blocked", in O(sqrt(T)) steps, or "associative", in O(log T), with K times the work and more:
            for accelerators; "auto" takes the first on a CPU, the fastest there at T = 1e5 and K = 10, and the second
            for series of 256 and more elsewhere, where nothing was measured.

    Returns:
        The filtered and predicted laws, and the log evidence with its increments.

    Raises:
        ValueError: a shape does not fit, probabilities do not sum to one, or a likelihood is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_init, log_trans = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> log_lik = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2]]))
        >>> filtered = models.hmm_filter(log_init, log_trans, log_lik)
        >>> [round(p, 3) for p in jnp.exp(filtered.log_filtered[-1]).tolist()]
        [0.919, 0.081]

    References:
        Rabiner (1989), doi:10.1109/5.18626.
    """
    errors.check_choice("method", method, METHODS)
    return filter_chain(as_chain(log_init, log_trans, log_lik, mask, lengths), method)


@partial(jax.jit, static_argnames="method")
def filter_chain(chain: Chain, method: Method) -> HMMFiltered:
    """`hmm_filter` of arguments that are checked."""

    def one(log_lik: Array, is_real: Array) -> HMMFiltered:
        passed = forward(chain.log_init, chain.log_trans, log_lik, is_real, method)
        log_filtered = log_normalize(passed.log_predicted + log_lik)
        return HMMFiltered(passed.log_evidence, passed.log_evidence_increments, log_filtered, passed.log_predicted)

    return over_series(one, chain.log_lik, chain.is_real)


class HMMBelief(NamedTuple):
    """Where the filter of a stream stands.

    Attributes:
        log_filtered: log p(x_t | y_{0:t}).
        log_evidence: log p(y_{0:t}).
        log_evidence_increment: log p(y_t | y_{0:t-1}).
        rounding: what `log_evidence` has lost to rounding so far, which the next step puts right.
    """

    log_filtered: Float[Array, " k"]
    log_evidence: Float[Array, ""]
    log_evidence_increment: Float[Array, ""]
    rounding: Float[Array, ""]


def hmm_start(log_init: Float[Array, " k"], log_lik: Float[Array, " k"]) -> HMMBelief:
    """The belief after the first observation of a stream.

    Args:
        log_init: log P(x_0), shape (K,).
        log_lik: log p(y_0 | x_0), shape (K,); zeros where y_0 is missing.

    Returns:
        The belief, for `hmm_step`.

    Raises:
        ValueError: the probabilities do not sum to one, or a likelihood is NaN. Under `jit` and `scan` no value is
            known: NaN makes the belief NaN, from there on.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> belief = models.hmm_start(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2])))
        >>> [round(p, 3) for p in jnp.exp(belief.log_filtered).tolist()]
        [0.8, 0.2]
    """
    check_rows("log_init", log_init)
    check_row(log_lik)
    zero = jnp.zeros((), jnp.result_type(log_init, log_lik))
    return _absorb(log_init, log_lik, zero, zero)


def hmm_step(belief: HMMBelief, log_lik: Float[Array, " k"], log_trans: Float[Array, "k k"]) -> HMMBelief:
    """The belief after one more observation of a stream.

    After T - 1 steps it is what `hmm_filter` finds of the whole series. It may be jitted, scanned, and vmapped over
    particles that each carry a belief.

    Args:
        belief: after y_{t-1}.
        log_lik: log p(y_t | x_t), shape (K,); zeros where y_t is missing.
        log_trans: log P(x_t = j | x_{t-1} = i) at row i and column j, shape (K, K).

    Returns:
        The belief after y_t; -inf throughout where y_t is impossible.

    Raises:
        ValueError: the probabilities do not sum to one, or a likelihood is NaN. Under `jit` and `scan` no value is
            known: NaN makes the belief NaN, from there on.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> log_trans = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
        >>> belief = models.hmm_start(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2])))
        >>> for log_lik in jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8]])):
        ...     belief = models.hmm_step(belief, log_lik, log_trans)
        >>> [round(p, 3) for p in jnp.exp(belief.log_filtered).tolist()]
        [0.559, 0.441]
    """
    check_rows("log_trans", log_trans)
    check_row(log_lik)
    log_predicted = log_total(belief.log_filtered[:, None] + log_trans, axis=0)
    return _absorb(log_predicted, log_lik, belief.log_evidence, belief.rounding)


def _absorb(log_predicted: Array, log_lik: Array, log_evidence: Array, rounding: Array) -> HMMBelief:
    log_joint = log_predicted + log_lik
    increment = log_total(log_joint)
    # Kahan's sum; of infinities there is no rounding
    corrected = increment - rounding
    total = log_evidence + corrected
    lost = jnp.where(jnp.isfinite(total), (total - log_evidence) - corrected, 0.0)
    return HMMBelief(log_normalize(log_joint), total, increment, lost)
