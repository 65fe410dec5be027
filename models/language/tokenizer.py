"""Text to tokens and back: byte-level pair encoding from a model's file, and characters for tiny models.

All tokenizers have `encode(text) -> list[int]` and `decode(tokens) -> str`; they run on the host.

References:
    Sennrich, Haddow and Birch (2016), doi:10.18653/v1/P16-1162 (byte-pair encoding).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bayesinf.models.language.packages import need

__all__ = ["CharTokenizer", "Tokenizer", "smollm2_prompt"]

CONTROL, USER_DEFINED = 3, 4  # gguf's types of tokens that text is not made of
MARKERS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class CharTokenizer:
    """A token for every character, and one more that ends a text.

    Attributes:
        characters: all that can be written, each once.

    Raises:
        ValueError: a character comes twice.

    Example:
        >>> from bayesinf.models.language import CharTokenizer
        >>> tokenizer = CharTokenizer("0123456789+=")
        >>> tokenizer.encode("1+1=2")
        [1, 10, 1, 11, 2]
        >>> tokenizer.decode([2, tokenizer.end_token])
        '2'
    """

    characters: str

    def __post_init__(self):
        if len(set(self.characters)) < len(self.characters) or not self.characters:
            raise ValueError(f"characters must be at least one, each once, got {self.characters!r}")

    @property
    def end_token(self) -> int:
        return len(self.characters)

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"text must be made of the characters {self.characters!r}, got {unknown[0]!r}")
        return [self.characters.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token] for token in tokens if token != self.end_token)

    def tokens_with(self, text: str) -> list[int]:
        """The tokens whose text contains `text`, such as all that end a line."""
        return [token for token, character in enumerate(self.characters) if text in character]


class Tokenizer:
    """Byte-level pair encoding, by the package `tokenizers`.

    Control tokens in a text, such as "<|im_end|>", are read as what they are: do not let others write them into a
    prompt, as `smollm2_prompt` sees to.

    Attributes:
        backend: a `tokenizers.Tokenizer`.
        end_token: ends a text; None where the file does not say.
        begin_token: begins a text, where the file says that texts are to be begun so; else None.

    Example:
        >>> import bayesinf as bi
        >>> tokenizer = bi.models.language.Tokenizer.from_json("tokenizer.json")     # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("12 + 34"))                            # doctest: +SKIP
        '12 + 34'
    """

    def __init__(self, backend: Any, end_token: int | None = None, begin_token: int | None = None):
        self.backend, self.end_token, self.begin_token = backend, end_token, begin_token

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a GGUF file.

        Args:
            path: of the file.

        Returns:
            The tokenizer.

        Raises:
            ImportError: the packages `gguf` and `tokenizers` are not installed.
            ValueError: it is not a byte-level pair encoding, or splits words in a way that is not known.
        """
        reader = need("gguf").GGUFReader(str(path))

        def field(name: str, default: Any = None) -> Any:
            found = reader.get_field(f"tokenizer.ggml.{name}")
            return default if found is None else found.contents()

        if field("model") != "gpt2":
            raise ValueError(
                f"{path} must have a byte-level pair encoding, tokenizer.ggml.model 'gpt2', got {field('model')!r}; "
                "use Tokenizer.from_json of the model's tokenizer.json"
            )
        tokens, kinds = field("tokens"), np.asarray(field("token_type", []))
        merges = [tuple(merge.split(" ")) for merge in field("merges")]
        library = need("tokenizers")
        backend = library.Tokenizer(library.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        backend.pre_tokenizer = _pre_tokenizer(library, path, field("pre", "default"))
        backend.decoder = library.decoders.ByteLevel()
        for kind in (CONTROL, USER_DEFINED):
            added = [
                library.AddedToken(tokens[i], special=kind == CONTROL, normalized=False)
                for i in np.flatnonzero(kinds == kind)
            ]
            (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)(added)
        begin = field("bos_token_id") if field("add_bos_token", False) else None
        return cls(backend, field("eos_token_id"), begin)

    @classmethod
    def from_json(cls, path: str | Path, *, end_token: str | None = None) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, as Hugging Face writes it.

        Args:
            path: of the file.
            end_token: the text of the token that ends a text, such as "</s>".

        Returns:
            The tokenizer.

        Raises:
            ImportError: the package `tokenizers` is not installed.
            ValueError: there is no such end token.
        """
        backend = need("tokenizers").Tokenizer.from_file(str(path))
        end = None if end_token is None else backend.token_to_id(end_token)
        if end is None and end_token is not None:
            raise ValueError(f"end_token must be a token of {path}, got {end_token!r}")
        return cls(backend, end)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        begin = [] if self.begin_token is None else [self.begin_token]
        return begin + self.backend.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text without control tokens; an incomplete character at an end becomes U+FFFD."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=True)

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each token."""
        return self.backend.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=True)

    def tokens_with(self, text: str) -> list[int]:
        """The tokens whose text contains `text`, such as all that end a line."""
        return [token for token, piece in enumerate(self.pieces) if text in piece]


def smollm2_prompt(
    user: str, system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
) -> str:
    r"""A question to SmolLM2-Instruct as it was trained to read it, ending where its answer begins.

    Args:
        user: the question.
        system: what comes first.

    Returns:
        The prompt, to be given to `Tokenizer.encode`.

    Raises:
        ValueError: a text contains a marker of turns, by which it would speak for others.

    Example:
        >>> from bayesinf.models.language import smollm2_prompt
        >>> smollm2_prompt("What is 7 * 8?", system="Be brief.")
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 7 * 8?<|im_end|>\n<|im_start|>assistant\n'
    """
    turns = {"system": system, "user": user}
    for role, text in turns.items():
        if any(marker in text for marker in MARKERS):
            raise ValueError(f"{role} must not contain {MARKERS[0]} or {MARKERS[1]}, got {text!r}")
    return (
        "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns.items()) + "<|im_start|>assistant\n"
    )


def _pre_tokenizer(library: Any, path: str | Path, kind: str) -> Any:
    """What splits texts into words, by the names that llama.cpp has for it."""
    pre = library.pre_tokenizers
    bytes_and_words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("default", "gpt-2"):
        return bytes_and_words
    if kind == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), bytes_and_words])
    if kind == "llama-bpe":
        words = library.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        )
        return pre.Sequence([pre.Split(words, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(
        f"{path} splits words as {kind!r}; 'default', 'gpt-2', 'smollm' and 'llama-bpe' are known: "
        "use Tokenizer.from_json of the model's tokenizer.json"
    )
