"""A decoder-only transformer of the Llama type, with a cache for many continuations of one prompt.

    h <- h + W_o Attention(R W_q n, R W_k n, W_v n),      n = RMSNorm(h),
    h <- h + W_down (SiLU(W_gate n) * W_up n),            n = RMSNorm(h),

in every layer, and the logits W_head RMSNorm(h) at the end. R turns the pair (x_i, x_{i + e/2}) of a head of size e by
the angle position * base^(-2i/e), so that scores depend on positions through their differences alone; several heads of
queries share one of keys and values.

References:
    Touvron et al. (2023), doi:10.48550/arXiv.2302.13971 (Llama).
    Su et al. (2024), doi:10.1016/j.neucom.2023.127063 (rotary positions).
    Ainslie et al. (2023), doi:10.18653/v1/2023.emnlp-main.298 (grouped queries).
    Zhang and Sennrich (2019), doi:10.48550/arXiv.1910.07467 (RMSNorm).
    Shazeer (2020), doi:10.48550/arXiv.2002.05202 (the gated layer).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.language.cache import KeysValues, LanguageCache, write, write_many

__all__ = ["Block", "Rotary", "Transformer"]

Attend = Callable[[Array, Array, Array], Array]


class Block(eqx.Module):
    """The weights of one layer; matrices have a row for every output, heads one after the other."""

    attention_norm: Float[Array, " d"]
    query: Float[Array, "q d"]
    key: Float[Array, "kv d"]
    value: Float[Array, "kv d"]
    output: Float[Array, "d q"]
    mlp_norm: Float[Array, " d"]
    gate: Float[Array, "f d"]
    up: Float[Array, "f d"]
    down: Float[Array, "d f"]


class Rotary(NamedTuple):
    """Rotary positions: the angle of pair i at position t is t * base^(-2i/e) / factors[i].

    Attributes:
        base: what the slowest pair's wave length is of the order of.
        factors: one for each of the e/2 pairs, as models have that were stretched to longer texts; None for ones.
    """

    base: float = 10_000.0
    factors: tuple[float, ...] | None = None

    def __call__(self, x: Float[Array, "n h e"], positions: Int[Array, " n"]) -> Float[Array, "n h e"]:
        """Heads turned by their positions."""
        half = x.shape[-1] // 2
        frequencies = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.factors is not None:
            frequencies = frequencies / jnp.asarray(self.factors, jnp.float32)
        angles = (positions[:, None] * frequencies)[:, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Transformer(eqx.Module):
    """A language model of the Llama type; `random` makes one to train, `load_gguf` and `load_safetensors` read one.

    The weights' dtype, float32 or bfloat16, is that of the products; positions, sums of squares and the softmax are
    float32, as are the logits, which from bfloat16 have its eight bits.

    Attributes:
        embedding: a row for every token.
        blocks: the layers.
        norm: of the last RMSNorm.
        head: a row for every token; None where it is the embedding.
        num_heads: of queries.
        num_kv_heads: of keys and values; divides num_heads.
        rotary: base and factors of the positions' angles.
        norm_epsilon: added to mean squares.

    Raises:
        ValueError: numbers of heads and shapes of weights do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.language import Transformer
        >>> model = Transformer.random(0, vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2)
        >>> tokens = jnp.array([3, 1, 4, 1, 5])
        >>> model(tokens).shape
        (5, 11)

        Two continuations of a prompt of four tokens, whose last is read by both:

        >>> cache = model.prefill(tokens[:4], 3, num_particles=2, max_tokens=8)
        >>> logits, cache = model.extend(cache, jnp.array([1, 1]), jnp.array([True, True]))
        >>> bool(jnp.allclose(logits, model(tokens[:4])[-1], atol=1e-5))
        True
    """

    embedding: Float[Array, "v d"]
    blocks: tuple[Block, ...]
    norm: Float[Array, " d"]
    head: Float[Array, "v d"] | None
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    # static, so that no optimiser moves them
    rotary: Rotary = eqx.field(static=True, default=Rotary())
    norm_epsilon: float = eqx.field(static=True, default=1e-5)

    def __check_init__(self):
        errors.check_count("num_heads", self.num_heads)
        errors.check_count("num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        for i, block in enumerate(self.blocks):
            rows, kv_rows = block.query.shape[0], block.key.shape[0]
            if rows % (2 * self.num_heads) or kv_rows * self.num_heads != rows * self.num_kv_heads:
                raise ValueError(
                    f"blocks[{i}]: query and key must hold {self.num_heads} and {self.num_kv_heads} heads of one even "
                    f"size, got {rows} and {kv_rows} rows"
                )
        size = self.blocks[0].query.shape[0] // self.num_heads
        if self.rotary.factors is not None and len(self.rotary.factors) != size // 2:
            raise ValueError(f"rotary.factors must be {size // 2} numbers, got {len(self.rotary.factors)}")

    @classmethod
    def random(
        cls,
        key: errors.KeyLike,
        *,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        is_tied: bool = True,
        rope_base: float = 10_000.0,
        dtype: DTypeLike = jnp.float32,
    ) -> "Transformer":
        """A model with random weights: Gaussian, of standard deviation 1 / sqrt(inputs).

        Those of `output` and `down`, which add to h, are smaller by sqrt(2 num_layers), so that h keeps its size. The
        embedding's are as those of a head, whatever is tied: logits start of order one.

        Args:
            key: PRNG key or seed.
            vocab_size: number of tokens.
            width: d, a multiple of twice num_heads.
            num_layers: number of layers.
            num_heads: of queries.
            num_kv_heads: of keys and values; num_heads if left out.
            mlp_width: of the gated layer; 4 d if left out.
            is_tied: whether the head is the embedding.
            rope_base: of the rotary positions.
            dtype: of the weights.

        Returns:
            The model.
        """
        sizes = {"vocab_size": vocab_size, "width": width, "num_layers": num_layers, "num_heads": num_heads}
        for name, value in sizes.items():
            errors.check_count(name, value)
        if width % (2 * num_heads):
            raise ValueError(f"width must be a multiple of 2 num_heads = {2 * num_heads}, got {width}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        mlp_width = 4 * width if mlp_width is None else mlp_width
        kv_width = width // num_heads * num_kv_heads
        residual = 1.0 / math.sqrt(2 * num_layers)
        key_embedding, key_head, *keys = jax.random.split(errors.as_key(key), 2 + num_layers)

        def matrix(key: Array, rows: int, columns: int, scale: float = 1.0) -> Array:
            return (scale / math.sqrt(columns) * jax.random.normal(key, (rows, columns))).astype(dtype)

        def block(key: Array) -> Block:
            keys = jax.random.split(key, 7)
            ones = jnp.ones(width, dtype)
            return Block(
                attention_norm=ones,
                query=matrix(keys[0], width, width),
                key=matrix(keys[1], kv_width, width),
                value=matrix(keys[2], kv_width, width),
                output=matrix(keys[3], width, width, residual),
                mlp_norm=ones,
                gate=matrix(keys[4], mlp_width, width),
                up=matrix(keys[5], mlp_width, width),
                down=matrix(keys[6], width, mlp_width, residual),
            )

        return cls(
            embedding=matrix(key_embedding, vocab_size, width),
            blocks=tuple(block(key) for key in keys),
            norm=jnp.ones(width, dtype),
            head=None if is_tied else matrix(key_head, vocab_size, width),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            rotary=Rotary(rope_base),
        )

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    def __call__(self, tokens: Int[Array, " t"]) -> Float[Array, "t v"]:
        """The logits of what follows each token."""
        h, _ = self._read(tokens)
        return self._logits(h)

    def log_prob(self, tokens: Int[Array, " t"], mask: Bool[Array, " t"] | None = None) -> Float[Array, ""]:
        """Log p(tokens[1:] | tokens[0]), or the part of the sum that belongs to the tokens in `mask`.

        Args:
            tokens: shape (T,), of at least two; what pads them must be a token too, and masked.
            mask: which tokens count, such as an answer's but not its question's; the first never does.

        Returns:
            The sum of log p(tokens[t] | tokens[:t]).
        """
        log_probs = jax.nn.log_softmax(self(tokens[:-1]))
        log_probs = jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]
        return jnp.sum(log_probs if mask is None else jnp.where(mask[1:], log_probs, 0.0))

    def prefill(
        self, tokens: Int[Array, " p"], num_tokens: Int[Array, ""] | int, *, num_particles: int, max_tokens: int
    ) -> LanguageCache:
        """Read a prompt, once for all particles.

        Args:
            tokens: shape (P,), padded with any tokens.
            num_tokens: how many of them are the prompt, 0 to P; may be traced, so that prompts of several lengths
                share a program.
            num_particles: N, how many continue it.
            max_tokens: how many tokens each of them may read by `extend`.

        Returns:
            The cache of N particles that have read nothing of their own.
        """
        _, prompt = self._read(tokens)
        size = self.blocks[0].query.shape[0] // self.num_heads

        def empty(shared: KeysValues) -> KeysValues:
            shape = num_particles, self.num_kv_heads
            return KeysValues(
                jnp.zeros((*shape, size, max_tokens), shared.keys.dtype),
                jnp.zeros((*shape, max_tokens, size), shared.values.dtype),
            )

        lengths = jnp.zeros(num_particles, jnp.int32)
        return LanguageCache(prompt, jnp.asarray(num_tokens, jnp.int32), tuple(map(empty, prompt)), lengths)

    def extend(
        self, cache: LanguageCache, tokens: Int[Array, " n"], is_active: Bool[Array, " n"]
    ) -> tuple[Float[Array, "n v"], LanguageCache]:
        """Read one more token of every active particle.

        Args:
            cache: what they have read.
            tokens: shape (N,).
            is_active: shape (N,); the others' cache stays as it is, and their logits mean nothing. None of the active
                may have `max_tokens` tokens already.

        Returns:
            The logits (N, V) of what follows, and the cache.
        """
        positions = cache.prompt_length + cache.lengths
        h = self.embedding[tokens]
        suffix = []
        for block, shared, own in zip(self.blocks, cache.prompt, cache.suffix, strict=True):

            def attend(q: Array, k: Array, v: Array, shared=shared, own=own) -> Array:
                own = write(own, k, v, cache.lengths, is_active)
                suffix.append(own)
                return _attend_both(q, shared, own, cache.prompt_length, cache.lengths)

            h = self._layer(block, h, positions, attend)
        lengths = cache.lengths + is_active
        return self._logits(h), cache._replace(suffix=tuple(suffix), lengths=lengths)

    def extend_many(
        self, cache: LanguageCache, tokens: Int[Array, "n m"]
    ) -> tuple[Float[Array, "n m v"], LanguageCache]:
        """Read m more tokens of every particle, in one pass.

        Args:
            cache: what they have read.
            tokens: shape (N, m). No particle may have more than `max_tokens` with them.

        Returns:
            The logits (N, m, V) of what follows each of them, and the cache.
        """
        num, size = tokens.shape
        places = cache.lengths[:, None] + jnp.arange(size)
        h = self.embedding[tokens.reshape(-1)]
        suffix = []
        for block, shared, own in zip(self.blocks, cache.prompt, cache.suffix, strict=True):

            def attend(q: Array, k: Array, v: Array, shared=shared, own=own) -> Array:
                k, v = (x.reshape(num, size, *x.shape[1:]) for x in (k, v))
                own = write_many(own, k, v, cache.lengths)
                suffix.append(own)
                return _attend_ahead(q.reshape(num, size, *q.shape[1:]), shared, own, cache.prompt_length, places)

            h = self._layer(block, h, (cache.prompt_length + places).reshape(-1), attend)
        logits = self._logits(h).reshape(num, size, -1)
        return logits, cache._replace(suffix=tuple(suffix), lengths=cache.lengths + size)

    def gather(self, cache: LanguageCache, ancestors: Int[Array, " m"]) -> LanguageCache:
        """The cache of m particles, the i-th of which is a copy of particle ancestors[i]."""
        return cache.gather(ancestors)

    def place(self, cache: LanguageCache, other: LanguageCache) -> LanguageCache:
        """The cache with the first particle of `other`, of the same prompt, in its first place."""
        return cache.place(other)

    def truncate(self, cache: LanguageCache, lengths: Int[Array, " n"]) -> LanguageCache:
        """The cache as it was when the particles had read these many tokens of their own."""
        return cache.truncate(lengths)

    def _read(self, tokens: Int[Array, " t"]) -> tuple[Float[Array, "t d"], tuple[KeysValues, ...]]:
        h = self.embedding[tokens]
        caches = []

        def attend(q: Array, k: Array, v: Array) -> Array:
            caches.append(KeysValues(k.transpose(1, 2, 0), v.transpose(1, 0, 2)))
            return _attend_before(q, caches[-1])

        for block in self.blocks:
            h = self._layer(block, h, jnp.arange(tokens.shape[0]), attend)
        return h, tuple(caches)

    def _layer(self, block: Block, h: Float[Array, "n d"], positions: Int[Array, " n"], attend: Attend) -> Array:
        normed = _rms_norm(h, block.attention_norm, self.norm_epsilon)
        size = block.query.shape[0] // self.num_heads
        q, k, v = ((normed @ w.T).reshape(h.shape[0], -1, size) for w in (block.query, block.key, block.value))
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        q = q.reshape(h.shape[0], self.num_kv_heads, -1, size) / jnp.asarray(math.sqrt(size), q.dtype)
        h = h + attend(q, k, v).reshape(h.shape[0], -1) @ block.output.T
        normed = _rms_norm(h, block.mlp_norm, self.norm_epsilon)
        return h + (jax.nn.silu(normed @ block.gate.T) * (normed @ block.up.T)) @ block.down.T

    def _logits(self, h: Float[Array, "n d"]) -> Float[Array, "n v"]:
        head = self.embedding if self.head is None else self.head
        normed = _rms_norm(h, self.norm, self.norm_epsilon)
        return (normed @ head.T).astype(jnp.float32)


def _rms_norm(x: Float[Array, "n d"], weight: Float[Array, " d"], epsilon: float) -> Float[Array, "n d"]:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight


def _attend_before(q: Float[Array, "t k g e"], read: KeysValues) -> Float[Array, "t k g e"]:
    """Attention of every token to itself and those before."""
    t = jnp.arange(q.shape[0])
    scores = jnp.einsum("tkge,kes->tkgs", q, read.keys).astype(jnp.float32)
    scores = jnp.where((t <= t[:, None])[:, None, None], scores, -jnp.inf)
    return jnp.einsum("tkgs,kse->tkge", jax.nn.softmax(scores).astype(q.dtype), read.values)


def _attend_both(
    q: Float[Array, "n k g e"], shared: KeysValues, own: KeysValues, prompt_length: Array, lengths: Int[Array, " n"]
) -> Float[Array, "n k g e"]:
    """Attention of each particle's newest token, at `lengths`, to the prompt and to its own tokens."""
    return _attend_ahead(q[:, None], shared, own, prompt_length, lengths[:, None])[:, 0]


def _attend_ahead(
    q: Float[Array, "n m k g e"], shared: KeysValues, own: KeysValues, prompt_length: Array, places: Int[Array, "n m"]
) -> Float[Array, "n m k g e"]:
    """Attention of tokens of each particle at these places to the prompt, and to its own tokens up to each of them."""
    to_prompt = jnp.einsum("nmkge,kep->nmkgp", q, shared.keys).astype(jnp.float32)
    to_own = jnp.einsum("nmkge,nkes->nmkgs", q, own.keys).astype(jnp.float32)
    size = shared.keys.shape[-1]
    is_prompt = jnp.arange(size) < prompt_length
    is_own = jnp.arange(own.keys.shape[-1]) <= places[:, :, None, None, None]
    scores = jnp.concatenate([jnp.where(is_prompt, to_prompt, -jnp.inf), jnp.where(is_own, to_own, -jnp.inf)], axis=-1)
    probs = jax.nn.softmax(scores).astype(q.dtype)
    from_prompt = jnp.einsum("nmkgp,kpe->nmkge", probs[..., :size], shared.values)
    return from_prompt + jnp.einsum("nmkgs,nkse->nmkge", probs[..., size:], own.values)
