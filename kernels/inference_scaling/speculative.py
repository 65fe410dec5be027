"""Speculative sampling with several drafts (SpecTr): a small model writes, and the law is the large one's.

At one position let X_1, ..., X_k be independent draws from the draft model's law p, and q the target's. With

    beta(rho) = sum_x min(p(x), q(x) / rho),      rho in [1, k] the root of  1 - (1 - beta)^k = rho beta

the drafts are tried in turn: X_i is accepted with probability min(1, q(X_i) / (rho p(X_i))), and where none is, the
token is drawn from

    r(x)  proportional to  q(x) - min(p(x), q(x) / rho) s,      s = sum_{i < k} (1 - beta)^i = p_acc / beta

with p_acc = 1 - (1 - beta)^k the chance that one is accepted. A token is x by acceptance with probability
min(p(x), q(x) / rho) s, so that its law is q exactly; r >= 0 needs s <= rho, which holds from the root on. And p_acc is
at least 1 - (1 - 1/k)^k of what any coupling of k drafts with q can reach. For k = 1, rho = 1 and r is proportional to
(q - p)_+: the speculative sampling of Leviathan et al.

Sequences of L tokens are verified position by position. Drafts that begin with the accepted tokens are still
independent draws from p at the next position: the rule applies again, with as many drafts as are left. Where all L
tokens of a draft were accepted, the target's law after them, which it computed along with the others, gives one more.

References:
    Sun, Suresh, Ro, Beirami, Jain and Yu (2023), SpecTr, NeurIPS, arXiv:2310.15141.
    Leviathan, Kalman and Matias (2023), ICML, arXiv:2211.17192 (k = 1).
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree, current

__all__ = [
    "SpeculativeResult",
    "TokenModel",
    "accept_drafts",
    "residual_log_probs",
    "spectr_ratio",
    "speculative_sample",
]


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
    _check_tokens("drafts", drafts, log_p.shape[0])
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


class TokenModel(eqx.Module):
    """A language model that remembers what it has read.

    Both methods are pure. A model without memory is a plain function `log_probs(tokens, length) -> (V,)`, of which only
    tokens[:length] may be read.
    """

    @abstractmethod
    def init(self, prompt: Int[Array, " t"], capacity: int) -> PyTree:
        """A cache that has read the prompt and has room for `capacity` tokens in all."""

    @abstractmethod
    def extend(
        self, cache: PyTree, tokens: Int[Array, " m"], position: Int[Array, ""]
    ) -> tuple[Float[Array, "m v"], PyTree]:
        """Reads m tokens as those at position, position + 1, ..., and forgets what stood there and after.

        Returns:
            (log_probs, cache): the law of the next token after each of them, and the cache, of unchanged shapes.
        """


class SpeculativeResult(NamedTuple):
    """What speculative sampling wrote, and at what cost.

    Attributes:
        tokens: what follows the prompt; after a stop token only this one.
        num_accepted: how many draft tokens each call of the target accepted; the call gave one token more. Of
            num_tokens rows, the first num_target_calls of which count.
        num_target_calls: calls of the target, each of num_drafts sequences of draft_length + 1 tokens.
        num_invalid: at how many positions a model's law held NaN, or no probability at all.
    """

    tokens: Int[Array, " t"]
    num_accepted: Int[Array, " t"]
    num_target_calls: Int[Array, ""]
    num_invalid: Int[Array, ""]

    @property
    def tokens_per_call(self) -> Float[Array, ""]:
        """Tokens for one call of the target: between 1, what it writes by itself, and draft_length + 1."""
        return 1.0 + jnp.sum(self.num_accepted) / self.num_target_calls


def speculative_sample(
    key: errors.KeyLike,
    draft_model: TokenModel | Callable[..., Any],
    target_model: TokenModel | Callable[..., Any],
    prompt: Int[Array, " t"],
    *,
    num_tokens: int,
    num_drafts: int = 4,
    draft_length: int = 4,
    stop_token: int | None = None,
    throw: bool = True,
) -> SpeculativeResult:
    """Writes with the law of the target model, in fewer calls of it.

    Each round the draft model writes `num_drafts` sequences of `draft_length` tokens, one token after the other, and
    the target reads all of them at once. It is one compiled loop; it may be jitted, and vmapped over keys and prompts.

    Args:
        key: PRNG key or seed.
        draft_model: a `TokenModel`, or a function `log_probs(tokens, length) -> (V,)`. Logits will do: they are
            normalised.
        target_model: the same, of the same vocabulary.
        prompt: at least one token, such as that of the beginning of a text.
        num_tokens: how many tokens are written.
        num_drafts: k.
        draft_length: L.
        stop_token: writing stops after this one.
        throw: whether to raise where a law is invalid.

    Returns:
        A SpeculativeResult.

    Raises:
        SamplingError: a model's law held NaN, or no probability at all (not while traced); the error's `draws` is the
            result.
        ValueError: the prompt is empty or not of tokens, the vocabularies differ, or a count is less than one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import speculative_sample
        >>> table = jax.random.normal(jax.random.key(0), (5, 5))
        >>> def target(tokens, length): return table[tokens[length - 1]]
        >>> def draft(tokens, length): return 0.5 * table[tokens[length - 1]]
        >>> result = speculative_sample(1, draft, target, jnp.array([0]), num_tokens=60, num_drafts=3)
        >>> result.tokens.shape, bool(result.tokens_per_call > 2)
        ((60,), True)

    References:
        Sun et al. (2023), arXiv:2310.15141, algorithms 2 and 3.
    """
    key = errors.as_key(key)
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt must hold one token or more, got shape {prompt.shape} of {prompt.dtype}; for several "
            "prompts vmap, for an empty one begin with the token of the beginning of a text"
        )
    counts = [("num_tokens", num_tokens), ("num_drafts", num_drafts), ("draft_length", draft_length)]
    sizes = tuple(errors.check_count(name, value) for name, value in counts)
    models = (_as_model("draft_model", draft_model), _as_model("target_model", target_model))
    _check_vocabularies(models, prompt)
    stop = -1 if stop_token is None else errors.check_count("stop_token", stop_token, minimum=0)
    result = _run(key, *models, prompt, jnp.asarray(stop, prompt.dtype), sizes)
    if throw and errors.is_concrete(result) and np.any(np.asarray(result.num_invalid)):
        raise errors.SamplingError(
            f"The law of a model held NaN, +inf, or no probability at all at {int(result.num_invalid)} positions: "
            "check the models on this prompt; throw=False returns what was written.",
            result,
        )
    return result


class _Writing(NamedTuple):
    """What is carried from round to round."""

    tokens: Int[Array, " c"]
    length: Int[Array, ""]
    draft_cache: PyTree
    target_cache: PyTree
    num_accepted: Int[Array, " t"]
    num_calls: Int[Array, ""]
    num_invalid: Int[Array, ""]
    is_stopped: Bool[Array, ""]


@partial(jax.jit, static_argnums=(5,))
def _run(key: Array, draft: Any, target: Any, prompt: Array, stop: Array, sizes: tuple[int, int, int]):
    num_tokens, num_drafts, draft_length = sizes
    num_prompt = prompt.shape[0]
    capacity = num_prompt + num_tokens + draft_length

    def write(state: _Writing) -> _Writing:
        key_draft, key_accept = jax.random.split(jax.random.fold_in(key, state.num_calls))
        begin = state.length - 1  # the last token is read anew: no cache has it if it was not a draft's
        last = state.tokens[begin]

        def feed(carry, key):
            cache, token, position = carry
            log_probs, cache = draft.extend(cache, token[None], position)
            log_probs = jax.nn.log_softmax(log_probs[0])
            token = jax.random.categorical(key, log_probs).astype(token.dtype)
            return (cache, token, position + 1), (token, log_probs)

        # the last token of a draft is read too, that the cache may have it, but what follows it is not used
        keys = jax.random.split(key_draft, (num_drafts, draft_length + 1))
        begun = (state.draft_cache, last, begin)
        (draft_caches, _, _), (drafts, log_p) = jax.vmap(lambda keys: jax.lax.scan(feed, begun, keys))(keys)
        read = jnp.concatenate([jnp.full((num_drafts, 1), last), drafts[:, :-1]], axis=1)
        log_q, target_caches = jax.vmap(target.extend, (None, 0, None))(state.target_cache, read, begin)
        log_q = jax.nn.log_softmax(log_q)

        def verify(carry, row):
            is_active, is_open = carry
            key, j = row
            one = jnp.argmax(is_active)  # any draft that begins with the accepted tokens
            laws = log_p[one, j], log_q[one, j]
            # after the last position there are no drafts, and the token is the target's own
            token, index = accept_drafts(key, *laws, drafts[:, j], is_active & (j < draft_length))
            is_invalid = is_open & jnp.any(jnp.isnan(laws[1]) | (jnp.isnan(laws[0]) & (j < draft_length)))
            is_accepted = is_open & (index >= 0)
            is_active = jnp.where(is_accepted, is_active & (drafts[:, j] == token), is_active)
            return (is_active, is_accepted), (token, is_accepted, is_open, is_invalid)

        rows = jax.random.split(key_accept, draft_length + 1), jnp.arange(draft_length + 1)
        start = jnp.ones(num_drafts, bool), jnp.ones((), bool)
        (is_active, _), (new, is_accepted, is_written, is_invalid) = jax.lax.scan(verify, start, rows)

        survivor = jnp.argmax(is_active)
        draft_cache, target_cache = jax.tree.map(lambda leaf: leaf[survivor], (draft_caches, target_caches))
        return _Writing(
            jax.lax.dynamic_update_slice(state.tokens, new, (state.length,)),
            state.length + jnp.sum(is_written, dtype=jnp.int32),
            draft_cache,
            target_cache,
            state.num_accepted.at[state.num_calls].set(jnp.sum(is_accepted, dtype=jnp.int32)),
            state.num_calls + 1,
            state.num_invalid + jnp.sum(is_invalid, dtype=jnp.int32),
            jnp.any(is_written & (new == stop)),
        )

    zero = jnp.zeros((), jnp.int32)
    start = _Writing(
        jnp.zeros(capacity, prompt.dtype).at[:num_prompt].set(prompt),
        zero + num_prompt,
        draft.init(prompt, capacity),
        target.init(prompt, capacity),
        jnp.zeros(num_tokens, jnp.int32),
        zero,
        zero,
        jnp.zeros((), bool),
    )
    last = jax.lax.while_loop(lambda s: (s.length < num_prompt + num_tokens) & ~s.is_stopped, write, start)
    tokens = last.tokens[num_prompt : num_prompt + num_tokens]
    is_after = jnp.cumsum(tokens == stop) > 0
    return SpeculativeResult(jnp.where(is_after, stop, tokens), last.num_accepted, last.num_calls, last.num_invalid)


class _Forgetful(TokenModel):
    """A function of all tokens as a model; its cache are the tokens."""

    log_probs: Callable[..., Any]

    def init(self, prompt: Int[Array, " t"], capacity: int) -> PyTree:
        return jnp.zeros(capacity, prompt.dtype).at[: prompt.shape[0]].set(prompt)

    def extend(self, cache, tokens, position):
        cache = jax.lax.dynamic_update_slice(cache, tokens, (position,))
        lengths = position + 1 + jnp.arange(tokens.shape[0])
        return jax.vmap(lambda length: self.log_probs(cache, length))(lengths), cache


def _as_model(name: str, model: Any) -> Any:
    if hasattr(model, "init") and hasattr(model, "extend"):
        return current(model)
    errors.check_arguments(name, model, "tokens, length")
    return _Forgetful(as_pytree(model))


def _check_vocabularies(models: tuple[Any, Any], prompt: Array) -> None:
    def law(model):
        return model.extend(model.init(prompt, prompt.shape[0]), prompt[-1:], jnp.asarray(prompt.shape[0] - 1))[0]

    draft, target = (eqx.filter_eval_shape(law, model).shape for model in models)
    if len(draft) != 2 or draft != target:
        raise ValueError(
            f"draft_model and target_model must return log probabilities of one vocabulary, got shapes {draft[1:]} and "
            f"{target[1:]}"
        )
    _check_tokens("prompt", prompt, draft[1])


def _check_tokens(name: str, tokens: Array, num: int) -> None:
    if errors.is_concrete(tokens) and np.any((np.asarray(tokens) < 0) | (np.asarray(tokens) >= num)):
        raise ValueError(f"{name} must be tokens in [0, {num}), got {np.asarray(tokens)}")


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
