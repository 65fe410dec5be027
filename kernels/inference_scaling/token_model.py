"""What a language model must be able to do: for many particles at once, or for one text that is written and unwritten.

A `LanguageModel` reads a token of each of N particles, and is what `TokenGenerator` steps are made with. A `TokenModel`
reads several tokens of one text in a pass, and goes back to where it was: what speculative sampling needs. The first is
made into the second by `as_token_model`, as is a plain function of all tokens.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree, current

__all__ = ["LanguageModel", "TokenModel", "as_token_model", "missing_of"]

METHODS = ("vocab_size", "prefill", "extend", "gather", "place", "truncate")


@runtime_checkable
class LanguageModel(Protocol):
    """What a TokenGenerator needs of a model; `models.language.Transformer` has it.

    The cache is a pytree of what N particles have read: the prompt, and tokens of their own. A model may also have
    `extend_many(cache, tokens (n, m)) -> (logits (n, m, v), cache)`, which reads m tokens of each in one pass: that is
    what makes it worth while to verify drafts.
    """

    @property
    def vocab_size(self) -> int:
        """The number of tokens, V."""
        ...

    def prefill(
        self, tokens: Int[Array, " p"], num_tokens: Int[Array, ""], *, num_particles: int, max_tokens: int
    ) -> PyTree:
        """The cache of particles that have read the first `num_tokens` of a prompt, at least 0 of them, and no more."""
        ...

    def extend(
        self, cache: PyTree, tokens: Int[Array, " n"], is_active: Bool[Array, " n"]
    ) -> tuple[Float[Array, "n v"], PyTree]:
        """Read one more token of each active particle: the logits of what follows, and the cache."""
        ...

    def gather(self, cache: PyTree, ancestors: Int[Array, " m"]) -> PyTree:
        """The cache of m particles, the i-th of which is a copy of particle ancestors[i]."""
        ...

    def place(self, cache: PyTree, other: PyTree) -> PyTree:
        """The cache with the first particle of `other`, of the same prompt, in its first place."""
        ...

    def truncate(self, cache: PyTree, lengths: Int[Array, " n"]) -> PyTree:
        """The cache as it was when the particles had read these many tokens of their own."""
        ...


class TokenModel(eqx.Module):
    """A language model of one text that remembers what it has read, and can go back.

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

        The position is at least that of the prompt's last token.

        Returns:
            (log_probs, cache): the law of the next token after each of them, and the cache, of unchanged shapes.
        """


class _OneText(TokenModel):
    """A `LanguageModel` with one particle."""

    model: Any

    def init(self, prompt: Int[Array, " t"], capacity: int) -> PyTree:
        # the prompt's last token is the first to be read anew
        start = prompt.shape[0] - 1
        cache = self.model.prefill(prompt, jnp.asarray(start), num_particles=1, max_tokens=capacity - start)
        return cache, jnp.asarray(start, jnp.int32)

    def extend(
        self, cache: PyTree, tokens: Int[Array, " m"], position: Int[Array, ""]
    ) -> tuple[Float[Array, "m v"], PyTree]:
        cache, start = cache
        cache = self.model.truncate(cache, (position - start)[None])
        if hasattr(self.model, "extend_many"):
            logits, cache = self.model.extend_many(cache, tokens[None])
            return logits[0], (cache, start)

        def read(cache: PyTree, token: Array) -> tuple[PyTree, Array]:
            logits, cache = self.model.extend(cache, token[None], jnp.ones(1, bool))
            return cache, logits[0]

        cache, logits = jax.lax.scan(read, cache, tokens)
        return logits, (cache, start)


class _Forgetful(TokenModel):
    """A function of all tokens as a model; its cache are the tokens."""

    log_probs: Callable[..., Any]

    def init(self, prompt: Int[Array, " t"], capacity: int) -> PyTree:
        return jnp.zeros(capacity, prompt.dtype).at[: prompt.shape[0]].set(prompt)

    def extend(self, cache, tokens, position):
        cache = jax.lax.dynamic_update_slice(cache, tokens, (position,))
        lengths = position + 1 + jnp.arange(tokens.shape[0])
        return jax.vmap(lambda length: self.log_probs(cache, length))(lengths), cache


def as_token_model(name: str, model: Any) -> Any:
    """A TokenModel of a LanguageModel or a function, or the model itself, as it reads its surroundings now."""
    if not missing_of(model):
        return _OneText(current(model))
    if hasattr(model, "init") and hasattr(model, "extend"):
        return current(model)
    errors.check_arguments(name, model, "tokens, length")
    return _Forgetful(as_pytree(model))


def missing_of(model: Any) -> list[str]:
    """What the model lacks of a `LanguageModel`."""
    return [name for name in METHODS if not hasattr(model, name)]
