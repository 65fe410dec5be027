"""One token of a large model's law out of several drafts of a small one (SpecTr).

Let X_1, ..., X_k be independent draws from the draft model's law p, and q the target's. With

    beta(rho) = sum_x min(p(x), q(x) / rho),      rho in [1, k] the root of  1 - (1 - beta)^k = rho beta

the drafts are tried in turn: X_i is accepted with probability min(1, q(X_i) / (rho p(X_i))), and where none is, the
token is drawn from

    r(x)  proportional to  q(x) - min(p(x), q(x) / rho) s,      s = sum_{i < k} (1 - beta)^i = p_acc / beta

with p_acc = 1 - (1 - beta)^k the chance that one is accepted. A token is x by acceptance with probability
min(p(x), q(x) / rho) s, so that its law is q exactly; r >= 0 needs s <= rho, which holds from the root on. And p_acc is
at least 1 - (1 - 1/k)^k of what any coupling of k drafts with q can reach. For k = 1, rho = 1 and r is proportional to
(q - p)_+: the speculative sampling of Leviathan et al.

References:
    Sun, Suresh, Ro, Beirami, Jain and Yu (2023), SpecTr, NeurIPS, arXiv:2310.15141.
    Leviathan, Kalman and Matias (2023), ICML, arXiv:2211.17192 (k = 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.kernels.inference_scaling.next_token import check_tokens

__all__ = ["accept_drafts", "residual_log_probs", "spectr_ratio"]


def spectr_ratio(
    log_p: Float[Array, " v"], log_q: Float[Array, " v"], num_drafts: Int[Array, ""] | int
) -> Float[Array, ""]:
    """The root rho in [1, k] of 1 - (1 - beta(rho))^k = rho beta(rho), by bisection of log rho down to rounding.

    It is rounded upwards, where the residual law is not negative. Laws that have no token in common give k.

    Args:
        log_p: log probabilities of the draft model; -inf is allowed.
        log_q: those of the target.
        num_drafts: k >= 1.

    Returns:
        rho.

    Raises:
        ValueError: the two are not laws of one vocabulary, or k < 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import spectr_ratio
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
        >>> float(spectr_ratio(log_p, log_q, 1)), round(float(spectr_ratio(log_p, log_q, 2)), 2)
        (1.0, 1.43)

    References:
        Sun et al. (2023), arXiv:2310.15141, algorithm 2 and theorem 2.
    """
    log_p, log_q = _check_laws(log_p, log_q)
    if errors.is_concrete(num_drafts) and num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, got {num_drafts}")

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        # p_acc / beta <= rho; as a quotient it also tells where beta is 0
        is_above = _tries(_overlap(log_p, log_q, middle), num_drafts) <= jnp.exp(middle)
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    bounds = jnp.zeros((), log_p.dtype), jnp.log(jnp.asarray(num_drafts, log_p.dtype))
    _, high = jax.lax.fori_loop(0, 4 + jnp.finfo(log_p.dtype).nmant, halve, bounds)
    return jnp.exp(high)


def residual_log_probs(
    log_p: Float[Array, " v"],
    log_q: Float[Array, " v"],
    ratio: Float[Array, ""],
    num_drafts: Int[Array, ""] | int,
) -> Float[Array, " v"]:
    """Log of the law from which the token is drawn where no draft was accepted.

    Args:
        log_p: log probabilities of the draft model.
        log_q: those of the target.
        ratio: rho, of `spectr_ratio` or larger.
        num_drafts: k; for k = 0 the law is q.

    Returns:
        Log probabilities; q's where acceptance was certain, so that nothing is left.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import residual_log_probs
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
        >>> jnp.exp(residual_log_probs(log_p, log_q, jnp.array(1.0), 1)).tolist()
        [1.0, 0.0]
    """
    log_p, log_q = _check_laws(log_p, log_q)
    log_ratio = jnp.log(ratio)
    accepted = _tries(_overlap(log_p, log_q, log_ratio), num_drafts) * _least(log_p, log_q, log_ratio)
    rest = jnp.maximum(jnp.exp(log_q) - accepted, 0.0)
    total = jnp.sum(rest)
    log_rest = jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1.0)), -jnp.inf)
    return jnp.where(total > 0, log_rest - jnp.log(jnp.where(total > 0, total, 1.0)), log_q)


def accept_drafts(
    key: errors.KeyLike,
    log_p: Float[Array, " v"],
    log_q: Float[Array, " v"],
    drafts: Int[Array, " k"],
    is_active: Bool[Array, " k"] | None = None,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """One token of the target's law out of k drafts of the draft model's law.

    Args:
        key: PRNG key or seed.
        log_p: log probabilities of the draft model.
        log_q: those of the target.
        drafts: k independent draws from p.
        is_active: which of them count, chosen without regard to their values; all by default.

    Returns:
        (token, index): the token, whose law is q, and which draft was accepted, -1 for none.

    Raises:
        ValueError: the two are not laws of one vocabulary, or a draft is not a token.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import accept_drafts
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
        >>> token, index = accept_drafts(0, log_p, log_q, jnp.array([1, 0, 0]))
        >>> int(token)
        0
    """
    log_p, log_q = _check_laws(log_p, log_q)
    drafts = jnp.asarray(drafts)
    if drafts.ndim != 1 or not drafts.size:
        raise ValueError(f"drafts must hold k >= 1 tokens, got shape {drafts.shape}")
    check_tokens("drafts", drafts, log_p.shape[0])
    is_active = jnp.ones(drafts.shape, bool) if is_active is None else is_active
    key_accept, key_rest = jax.random.split(errors.as_key(key))

    num_drafts = jnp.sum(is_active)
    ratio = spectr_ratio(log_p, log_q, jnp.maximum(num_drafts, 1))
    log_accept = log_q[drafts] - log_p[drafts] - jnp.log(ratio)
    # of no NaN, which there is where neither model can say the draft, is anything accepted
    is_accepted = is_active & (jnp.log(jax.random.uniform(key_accept, drafts.shape, log_p.dtype)) < log_accept)
    rest = jax.random.categorical(key_rest, residual_log_probs(log_p, log_q, ratio, num_drafts))
    index = jnp.where(jnp.any(is_accepted), jnp.argmax(is_accepted), -1)
    token = jnp.where(index >= 0, drafts[index], rest)
    return token.astype(drafts.dtype), index.astype(jnp.int32)


def _check_laws(log_p: Any, log_q: Any) -> tuple[Array, Array]:
    log_p, log_q = (errors.as_array(name, is_floating=True)(law) for name, law in (("log_p", log_p), ("log_q", log_q)))
    if log_p.ndim != 1 or log_p.shape != log_q.shape:
        raise ValueError(f"log_p and log_q must be laws of one vocabulary, got shapes {log_p.shape} and {log_q.shape}")
    for name, law in (("log_p", log_p), ("log_q", log_q)):
        if errors.is_concrete(law) and not abs(total := np.sum(np.exp(np.asarray(law, np.float64))) - 1.0) < 1e-2:
            raise ValueError(
                f"{name} must be logs of probabilities that sum to 1, got {1 + total}; use jax.nn.log_softmax"
            )
    dtype = jnp.result_type(log_p, log_q)
    return log_p.astype(dtype), log_q.astype(dtype)


def _least(log_p: Array, log_q: Array, log_ratio: Array) -> Array:
    """min(p, q / rho)."""
    return jnp.exp(jnp.minimum(log_p, log_q - log_ratio))


def _overlap(log_p: Array, log_q: Array, log_ratio: Array) -> Array:
    """The chance beta that one draft is accepted."""
    return jnp.minimum(jnp.sum(_least(log_p, log_q, log_ratio)), 1.0)


def _tries(overlap: Array, num_drafts: Any) -> Array:
    """(1 - (1 - beta)^k) / beta = 1 + (1 - beta) + ... + (1 - beta)^(k - 1), also for beta = 0."""
    is_positive = overlap > 0
    beta = jnp.where(is_positive, overlap, 1.0)
    return jnp.where(is_positive, -jnp.expm1(num_drafts * jnp.log1p(-beta)) / beta, num_drafts)
