"""Steps of a language model: lines, or any other runs of tokens, of N particles at once.

A step draws tokens v_1, v_2, ... one after another until one of them is a stop token, or there are
`max_tokens_per_step`. With l(v) the model's log probabilities, every token is drawn from

    q0 ~ exp(l / temperature), cut down by min_p and then top_p,        q ~ q0 psi(v | what was written before)

where psi is a twist, 1 if there is none. The law that log_ratio = log p - log q is relative to is p = q0, that of the
model as it is sampled, or with `correct=True` p = exp(l), the model itself. Tokens that were cut off are never drawn:
then p is the model restricted to the texts that q0 can write, whose masses sum to less than one.

One forward pass of all particles serves each token, with a cache of what has been read. A particle that has reached the
end of its step waits for the others; steps of one length, without stop tokens, waste nothing.

References:
    Zhao, Brekelmans, Makhzani and Grosse (2024), doi:10.48550/arXiv.2404.17546 (twists).
    Holtzman et al. (2020), doi:10.48550/arXiv.1904.09751 (top_p).
    Nguyen et al. (2025), doi:10.48550/arXiv.2407.01082 (min_p).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, resampling
from bayesinf.captured import as_pytree
from bayesinf.kernels.inference_scaling.generator import StepGenerator, StepInfo
from bayesinf.kernels.inference_scaling.next_token import PADDING, as_tokens, check_tokens, draw_tokens, is_in, truncate
from bayesinf.kernels.inference_scaling.token_model import LanguageModel, missing_of

__all__ = ["TokenGenerator", "TokenState"]


class TokenState(NamedTuple):
    """What n particles have written.

    Attributes:
        tokens: -1 beyond a particle's length.
        lengths: how many tokens each has written.
        step_ends: the length after each step taken; 0 for those not yet taken.
        num_steps: how many steps each has taken.
        is_ended: whether the last token was an end token.
        log_probs: of each token under p; 0 beyond a particle's length.
        prompt_end: the prompt's last token, shared.
        cache: of the model; it has read all tokens but the last.
    """

    tokens: Int[Array, "n m"]
    lengths: Int[Array, " n"]
    step_ends: Int[Array, "n s"]
    num_steps: Int[Array, " n"]
    is_ended: Bool[Array, " n"]
    log_probs: Float[Array, "n m"]
    prompt_end: Int[Array, ""]
    cache: PyTree


Twist = Callable[[TokenState, Float[Array, "n v"]], Float[Array, "n v"]]


class TokenGenerator(StepGenerator):
    """Steps of a language model.

    A prompt is a text, if there is a tokenizer, or an array of tokens that negative numbers may pad; `encode` makes the
    one into the other, on the host, for use in a compiled function.

    Attributes:
        model: a `LanguageModel`, such as `models.language.Transformer`.
        max_steps: a particle is finished after this many steps.
        max_tokens_per_step: a step ends after this many tokens.
        max_tokens: a particle is finished after this many tokens: what the cache has room for. All that its steps could
            need, if left out.
        stop_tokens: end a step, such as all whose text ends a line. With none, all steps are of one length.
        end_tokens: end a step and the particle.
        temperature: tau > 0 of the proposal.
        top_p: in (0, 1); the proposal keeps the smallest set of most probable tokens that has at least this mass, with
            all that are as probable as its last.
        min_p: in (0, 1); the proposal keeps tokens of at least this part of the largest probability.
        correct: whether log_ratio is relative to the model itself; if not, temperature, top_p and min_p belong to the
            model. See above.
        twist: `twist(state, log_probs)` with the log probabilities (n, v) of q0; returns log psi (n, v), which may be
            -inf. A particle that psi leaves no token gets log_ratio -inf.
        tokenizer: has `encode(text)` and `decode(tokens)`.
        pad_prompt_to: prompts are padded to a multiple of this, so that those of one length share a program.

    Raises:
        ValueError: the model lacks a method, or a number is out of its range.

    Example:
        >>> import jax
        >>> from bayesinf.kernels.inference_scaling import TokenGenerator
        >>> from bayesinf.models.language import CharTokenizer, Transformer
        >>> tokenizer = CharTokenizer("0123456789+=;")
        >>> model = Transformer.random(0, vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2)
        >>> generator = TokenGenerator(
        ...     model, max_steps=4, max_tokens_per_step=8, stop_tokens=tokenizer.tokens_with(";"),
        ...     end_tokens=[tokenizer.end_token], tokenizer=tokenizer)
        >>> state = generator.init(jax.random.key(1), "12+34=", num_particles=3)
        >>> state, info = generator.step(jax.random.key(2), state)
        >>> len(generator.decode(state)), info.num_tokens.shape
        (3, (3,))

    References:
        Zhao, Brekelmans, Makhzani and Grosse (2024), doi:10.48550/arXiv.2404.17546.
    """

    model: LanguageModel
    max_steps: int = eqx.field(static=True)
    max_tokens_per_step: int = eqx.field(static=True)
    max_tokens: int | None = eqx.field(static=True, default=None, kw_only=True)
    stop_tokens: Int[Array, " k"] = eqx.field(converter=as_tokens, default=(), kw_only=True)
    end_tokens: Int[Array, " e"] = eqx.field(converter=as_tokens, default=(), kw_only=True)
    temperature: Float[Array, ""] = eqx.field(
        converter=errors.as_array("temperature", is_floating=True), default=1.0, kw_only=True
    )
    top_p: Float[Array, ""] | None = eqx.field(
        converter=errors.as_array("top_p", is_optional=True, is_floating=True), default=None, kw_only=True
    )
    min_p: Float[Array, ""] | None = eqx.field(
        converter=errors.as_array("min_p", is_optional=True, is_floating=True), default=None, kw_only=True
    )
    correct: bool = eqx.field(static=True, default=False, kw_only=True)
    twist: Twist | None = eqx.field(converter=as_pytree, default=None, kw_only=True)
    tokenizer: Any = eqx.field(static=True, default=None, kw_only=True)
    pad_prompt_to: int = eqx.field(static=True, default=32, kw_only=True)

    def __check_init__(self):
        if missing := missing_of(self.model):
            raise ValueError(f"model must have {missing[0]}, which {type(self.model).__name__} has not")
        for name in ("max_steps", "max_tokens_per_step", "pad_prompt_to"):
            errors.check_count(name, getattr(self, name))
        if self.max_tokens is not None:
            errors.check_count("max_tokens", self.max_tokens)
        errors.check_positive_scalar("temperature", self.temperature)
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                errors.check_fraction(name, getattr(self, name))
        for name in ("stop_tokens", "end_tokens"):
            check_tokens(name, getattr(self, name), self.model.vocab_size)
        if self.twist is not None:
            errors.check_arguments("twist", self.twist, "state, log_probs")

    def encode(self, prompt: Any) -> Int[Array, " p"]:
        """The prompt's tokens, padded by -1 to a multiple of `pad_prompt_to`; on the host, if it is a text.

        Args:
            prompt: a text, or tokens, negative ones at the end being padding.

        Returns:
            Tokens.

        Raises:
            ValueError: there are no tokens, or such as the model does not have, or there is no tokenizer for a text.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt is a text, which needs a tokenizer: TokenGenerator(..., tokenizer=...)")
            prompt = self.tokenizer.encode(prompt)
        tokens = as_tokens(prompt)
        if tokens.ndim != 1:
            raise ValueError(f"prompt must be one sequence of tokens, got an array of shape {tokens.shape}")
        if errors.is_concrete(tokens) and not np.any(np.asarray(tokens) >= 0):
            raise ValueError("prompt must hold at least one token, got none; begin with one that begins texts")
        check_tokens("prompt", tokens, self.model.vocab_size, minimum=PADDING)
        return jnp.pad(tokens, (0, -tokens.size % self.pad_prompt_to), constant_values=PADDING)

    def init(self, key: Key[Array, ""], prompt: Any, num_particles: int) -> TokenState:
        """The state of particles that have written nothing; the key is not used."""
        del key
        return _start(self, self.encode(prompt), errors.check_count("num_particles", num_particles))

    def step(self, key: Key[Array, ""], state: TokenState) -> tuple[TokenState, StepInfo]:
        """A step of all particles that are not finished, token by token."""
        is_active = ~self.is_done(state)
        num_particles, before = state.lengths.shape[0], state.lengths

        def is_unfinished(carry: tuple) -> Array:
            t, _, is_writing, _ = carry
            return jnp.any(is_writing) & (t < self.max_tokens_per_step)

        def write(carry: tuple) -> tuple:
            t, state, is_writing, log_ratio = carry
            state, token, ratio = self._write(jax.random.fold_in(key, t), state, is_writing)
            is_end = is_in(token, self.end_tokens)
            state = state._replace(is_ended=jnp.where(is_writing, is_end, state.is_ended))
            log_ratio = log_ratio + jnp.where(is_writing, ratio, 0.0)
            is_full = state.lengths >= state.tokens.shape[1]
            return t + 1, state, is_writing & ~(is_end | is_full | is_in(token, self.stop_tokens)), log_ratio

        start = jnp.zeros((), jnp.int32), state, is_active, jnp.zeros(num_particles, state.log_probs.dtype)
        _, state, _, log_ratio = jax.lax.while_loop(is_unfinished, write, start)

        rows = jnp.arange(num_particles)
        place = jnp.where(is_active, state.num_steps, self.max_steps)  # out of bounds, which is dropped
        state = state._replace(
            step_ends=state.step_ends.at[rows, place].set(state.lengths, mode="drop"),
            num_steps=state.num_steps + is_active,
        )
        return state, StepInfo(log_ratio, state.lengths - before, self.is_done(state))

    def gather(self, state: TokenState, ancestors: Int[Array, " n"]) -> TokenState:
        """The state of n particles, the i-th of which is a copy of particle ancestors[i]."""
        cache = self.model.gather(state.cache, ancestors)
        own = resampling.gather(state._replace(prompt_end=None, cache=None), ancestors)
        return own._replace(prompt_end=state.prompt_end, cache=cache)

    def place(self, state: TokenState, other: TokenState) -> TokenState:
        """The state with the first particle of `other`, of the same prompt, in its first place."""
        cache = self.model.place(state.cache, other.cache)
        own, new = (part._replace(prompt_end=None, cache=None) for part in (state, other))
        return super().place(own, new)._replace(prompt_end=state.prompt_end, cache=cache)

    def prefix(self, state: TokenState, num_steps: Int[Array, ""]) -> TokenState:
        """The state that these particles were in after their first `num_steps` steps; the state itself, if longer."""
        kept = jnp.clip(num_steps, 0, state.num_steps)
        last = jnp.take_along_axis(state.step_ends, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        lengths = jnp.where(kept > 0, last, 0)
        is_kept = jnp.arange(state.tokens.shape[1]) < lengths[:, None]
        return TokenState(
            tokens=jnp.where(is_kept, state.tokens, PADDING),
            lengths=lengths,
            step_ends=jnp.where(jnp.arange(self.max_steps) < kept[:, None], state.step_ends, 0),
            num_steps=kept,
            is_ended=state.is_ended & (kept == state.num_steps),
            log_probs=jnp.where(is_kept, state.log_probs, 0.0),
            prompt_end=state.prompt_end,
            # of what has been written, the last token has not been read, but the prompt's last has
            cache=self.model.truncate(state.cache, lengths),
        )

    def num_prompt_tokens(self, prompt: Int[Array, " p"]) -> int:
        """How many tokens an encoded prompt has, on the host."""
        return int(np.sum(np.asarray(prompt) >= 0))

    def decode(self, state: TokenState) -> list[str]:
        """What the particles have written, without end tokens, on the host."""
        if self.tokenizer is None:
            raise ValueError("decode needs a tokenizer: TokenGenerator(..., tokenizer=...); or read state.tokens")
        ends = set(np.asarray(self.end_tokens).tolist())
        rows = [row[:length].tolist() for row, length in zip(*map(np.asarray, state[:2]), strict=True)]
        return [self.tokenizer.decode([token for token in row if token not in ends]) for row in rows]

    def is_done(self, state: TokenState) -> Bool[Array, " n"]:
        """Whether each particle has ended, or has no step or no token left."""
        return state.is_ended | (state.num_steps >= self.max_steps) | (state.lengths >= state.tokens.shape[1])

    def _write(
        self, key: Key[Array, ""], state: TokenState, is_writing: Bool[Array, " n"]
    ) -> tuple[TokenState, Int[Array, " n"], Float[Array, " n"]]:
        """One more token of those that are writing: the state, the tokens, and log p - log q of each."""
        rows, size = jnp.arange(state.lengths.shape[0]), state.tokens.shape[1]
        newest = jnp.where(state.lengths > 0, state.tokens[rows, state.lengths - 1], state.prompt_end)
        logits, cache = self.model.extend(state.cache, newest, is_writing)
        state = state._replace(cache=cache)

        log_model = jax.nn.log_softmax(logits.astype(state.log_probs.dtype))
        log_sampled = truncate(log_model, self.temperature, self.top_p, self.min_p)
        log_p = log_model if self.correct else log_sampled
        log_q, is_lost = log_sampled, jnp.zeros(rows.shape, bool)
        if self.twist is not None:
            log_psi = self.twist(state, log_sampled).astype(log_sampled.dtype)
            twisted = jnp.where(log_sampled == -jnp.inf, -jnp.inf, log_sampled + log_psi)
            is_lost = jnp.max(twisted, axis=1) == -jnp.inf  # then any token will do: its weight is zero
            log_q = jax.nn.log_softmax(jnp.where(is_lost[:, None], log_sampled, twisted))

        token = draw_tokens(key, log_q)
        log_prob = log_p[rows, token]
        # one number where p is q, as two copies of it may be rounded differently; NaN stays NaN
        log_proposal = log_prob if log_q is log_p else log_q[rows, token]
        log_ratio = jnp.where(is_lost, -jnp.inf, log_prob - log_proposal)
        place = jnp.where(is_writing, state.lengths, size)  # out of bounds, which is dropped
        state = state._replace(
            tokens=state.tokens.at[rows, place].set(token, mode="drop"),
            log_probs=state.log_probs.at[rows, place].set(log_prob, mode="drop"),
            lengths=state.lengths + is_writing,
        )
        return state, token, log_ratio


@eqx.filter_jit
def _start(generator: TokenGenerator, tokens: Int[Array, " p"], num_particles: int) -> TokenState:
    max_tokens = generator.max_steps * generator.max_tokens_per_step
    if generator.max_tokens is not None:
        max_tokens = min(max_tokens, generator.max_tokens)
    length = jnp.sum(tokens >= 0)
    # the last token is left to be read by the particles, who need the logits of what follows it
    cache = generator.model.prefill(
        jnp.maximum(tokens, 0), length - 1, num_particles=num_particles, max_tokens=max_tokens
    )
    zeros = jnp.zeros(num_particles, jnp.int32)
    return TokenState(
        tokens=jnp.full((num_particles, max_tokens), PADDING, jnp.int32),
        lengths=zeros,
        step_ends=jnp.zeros((num_particles, generator.max_steps), jnp.int32),
        num_steps=zeros,
        is_ended=jnp.zeros(num_particles, bool),
        log_probs=jnp.zeros((num_particles, max_tokens), jnp.float32),
        prompt_end=tokens[length - 1],
        cache=cache,
    )
