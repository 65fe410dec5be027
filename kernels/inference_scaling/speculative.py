"""Speculative sampling with several drafts (SpecTr): a small model writes, and the law is the large one's.

Each round the draft model writes k sequences of L tokens, and the target reads all of them in one pass. They are
verified position by position, by the rule of `draft_acceptance`. Drafts that begin with the accepted tokens are still
independent draws from p at the next position: the rule applies again, with as many drafts as are left. Where all L
tokens of a draft were accepted, the target's law after them, which it computed along with the others, gives one more.

References:
    Sun, Suresh, Ro, Beirami, Jain and Yu (2023), SpecTr, NeurIPS, arXiv:2310.15141.
    Leviathan, Kalman and Matias (2023), ICML, arXiv:2211.17192 (k = 1).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors
from bayesinf.kernels.inference_scaling.draft_acceptance import accept_drafts
from bayesinf.kernels.inference_scaling.next_token import check_tokens, truncate
from bayesinf.kernels.inference_scaling.token_model import LanguageModel, TokenModel, as_token_model

__all__ = ["SpeculativeResult", "speculative_sample"]


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
    draft_model: LanguageModel | TokenModel | Callable[..., Any],
    target_model: LanguageModel | TokenModel | Callable[..., Any],
    prompt: Int[Array, " t"],
    *,
    num_tokens: int,
    num_drafts: int = 4,
    draft_length: int = 4,
    stop_token: int | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    top_p: Float[Array, ""] | float | None = None,
    min_p: Float[Array, ""] | float | None = None,
    throw: bool = True,
) -> SpeculativeResult:
    """Writes with the law of the target model, in fewer calls of it.

    Each round the draft model writes `num_drafts` sequences of `draft_length` tokens, one token after the other, and
    the target reads all of them at once. It is one compiled loop; it may be jitted, and vmapped over keys and prompts.
    It pays where one pass of the target over many tokens takes about as long as over one, as with a single text on an
    accelerator; many particles at once fill the machine already, and `TokenGenerator` is the way to write those.

    Args:
        key: PRNG key or seed.
        draft_model: a `LanguageModel` such as `models.language.Transformer`, a `TokenModel`, or a function
            `log_probs(tokens, length) -> (V,)`. Logits will do: they are normalised.
        target_model: the same, of the same vocabulary.
        prompt: at least one token, such as that of the beginning of a text.
        num_tokens: how many tokens are written.
        num_drafts: k.
        draft_length: L.
        stop_token: writing stops after this one.
        temperature, top_p, min_p: of both laws, as of `TokenGenerator`; the target's law is what they make of it.
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

        Language models, one of which has a layer more:

        >>> from bayesinf.models.language import Transformer
        >>> sizes = {"vocab_size": 20, "width": 16, "num_heads": 2}
        >>> small, large = (Transformer.random(layers, num_layers=layers, **sizes) for layers in (1, 2))
        >>> speculative_sample(0, small, large, jnp.array([3, 1]), num_tokens=8, temperature=0.7).tokens.shape
        (8,)

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
    models = (as_token_model("draft_model", draft_model), as_token_model("target_model", target_model))
    _check_vocabularies(models, prompt)
    stop = -1 if stop_token is None else errors.check_count("stop_token", stop_token, minimum=0)
    errors.check_positive_scalar("temperature", temperature)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None:
            errors.check_fraction(name, share)
    cut = [None if value is None else jnp.asarray(value, jnp.float32) for value in (temperature, top_p, min_p)]
    result = _run(key, *models, prompt, jnp.asarray(stop, prompt.dtype), cut, sizes)
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


@partial(jax.jit, static_argnums=(6,))
def _run(key: Array, draft: Any, target: Any, prompt: Array, stop: Array, cut: Any, sizes: tuple[int, int, int]):
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
            log_probs = truncate(log_probs, *cut)[0]
            token = jax.random.categorical(key, log_probs).astype(token.dtype)
            return (cache, token, position + 1), (token, log_probs)

        # the last token of a draft is read too, that the cache may have it, but what follows it is not used
        keys = jax.random.split(key_draft, (num_drafts, draft_length + 1))
        begun = (state.draft_cache, last, begin)
        (draft_caches, _, _), (drafts, log_p) = jax.vmap(lambda keys: jax.lax.scan(feed, begun, keys))(keys)
        read = jnp.concatenate([jnp.full((num_drafts, 1), last), drafts[:, :-1]], axis=1)
        log_q, target_caches = jax.vmap(target.extend, (None, 0, None))(state.target_cache, read, begin)
        log_q = jax.vmap(lambda log_probs: truncate(log_probs, *cut))(log_q)

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


def _check_vocabularies(models: tuple[Any, Any], prompt: Array) -> None:
    def law(model):
        return model.extend(model.init(prompt, prompt.shape[0]), prompt[-1:], jnp.asarray(prompt.shape[0] - 1))[0]

    draft, target = (eqx.filter_eval_shape(law, model).shape for model in models)
    if len(draft) != 2 or draft != target:
        raise ValueError(
            f"draft_model and target_model must return log probabilities of one vocabulary, got shapes {draft[1:]} and "
            f"{target[1:]}"
        )
    check_tokens("prompt", prompt, draft[1])
