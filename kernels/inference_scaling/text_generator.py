"""What generates texts step by step, elsewhere and in its own time: the contract of generators on the host.

A generator draws the next steps of an unfinished answer,

    x_t ~ q(. | prompt, x_{1:t-1}),    log_ratio = log p(x_t | .) - log q(x_t | .)

as coroutines, so that many requests are under way at once. An unfinished answer is the tuple of its steps. After
resampling many particles share one: it is asked for once, with as many samples as there are copies.

`as_text_generator` makes one of a generator that runs in process, whose exact posteriors then test these drivers. Its
steps are drawn by seeds and can be drawn again, so that an answer is known by its seeds.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.captured import original
from bayesinf.kernels.inference_scaling.generator import StepGenerator
from bayesinf.kernels.inference_scaling.potential import Potential

__all__ = ["Prefix", "TextGenerator", "TextStep", "as_text_generator", "digest", "failed_step", "next_power"]


class TextStep(NamedTuple):
    """One step of an answer.

    Attributes:
        text: what it adds, with what separates it from the next one.
        num_tokens: that were generated for it.
        log_prob: log q of it; None where it is not known.
        log_ratio: log p - log q; 0 where the sampled law is the model's.
        is_done: whether the answer is complete with it.
        finish_reason: as the generator gives it: "stop", "length", "end".
        seed: by which it was drawn, and its place among the samples of that seed; None where it cannot be drawn again.
        num_prompt_tokens: that were read for it.
        num_cached_tokens: that need not be read, because others had been read with the same.
        failure: why there is no step; None where there is one.
    """

    text: str
    num_tokens: int
    log_prob: float | None = None
    log_ratio: float = 0.0
    is_done: bool = False
    finish_reason: str = "stop"
    seed: tuple[int, int] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    failure: str | None = None


Prefix = tuple[TextStep, ...]


def failed_step(reason: str) -> TextStep:
    """What stands for a step that could not be had."""
    return TextStep("", 0, finish_reason="failed", failure=reason)


class TextGenerator(ABC):
    """The contract of a generator of texts.

    Attributes:
        max_steps: after which every answer counts as finished.
        max_tokens_per_step: the most that a step of one answer costs.

    Example:
        >>> from bayesinf.kernels.inference_scaling import Potential, TextGenerator, TextStep, infer
        >>> class Counts(TextGenerator):
        ...     max_steps, max_tokens_per_step = 3, 1
        ...     async def step(self, prompt, prefix, num_samples, seed):
        ...         return [TextStep(f"{len(prefix) + 1} ", 1) for _ in range(num_samples)]
        >>> likes_short = Potential(lambda prompt, texts: [0.5 for text in texts], kind="step")
        >>> result = infer(0, Counts(), likes_short, "Count to three.", num_particles=2)
        >>> result.texts, round(result.log_evidence, 3)                                     # log 0.5^3
        (['1 2 3 ', '1 2 3 '], -2.079)
    """

    max_steps: int
    max_tokens_per_step: int

    @abstractmethod
    async def step(self, prompt: Any, prefix: Prefix, num_samples: int, seed: int) -> Sequence[TextStep]:
        """The next step of an answer, drawn `num_samples` times; an exception fails them all, `failed_step` one."""

    def check(self, prompt: Any) -> None:
        """Raises ValueError if the prompt cannot be answered."""
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"prompt must be a text that is not empty, got {prompt!r}; say what is asked")

    def text(self, prefix: Prefix) -> str:
        """What has been written so far."""
        return "".join(step.text for step in prefix)

    def fingerprint(self) -> dict[str, Any]:
        """What the law of the steps depends on, as JSON holds it; the runs of one generator are saved with it.

        A run is continued by generators with the same fingerprint alone: put in what makes another model of yours.
        """
        return {
            "type": type(self).__name__,
            "max_steps": self.max_steps,
            "max_tokens_per_step": self.max_tokens_per_step,
        }

    def identity(self, prefix: Prefix) -> Hashable:
        """Equal for unfinished answers that have the same next step in law, and the same score."""
        return self.text(prefix)

    async def scores(self, factor: Potential, prompt: Any, prefixes: list[Prefix]) -> Any:
        """What the score of a potential makes of them: as many numbers."""
        texts = [self.text(prefix) for prefix in prefixes]
        if factor.aggregate == "model":
            texts = [as_single_step(text) for text in texts]
        scores = original(factor.score)(prompt, texts)
        return await scores if isawaitable(scores) else scores

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """What must be open while steps are drawn, such as connections."""
        yield

    def decode(self, prefixes: Sequence[Prefix]) -> list[str]:
        """What has been written, of each."""
        return [self.text(prefix) for prefix in prefixes]

    def num_prompt_tokens(self, prompt: Any) -> int:
        """0: they are counted with the steps that read them."""
        return 0


def as_single_step(text: str) -> str:
    """The text without blank lines, which separate steps for many scorers."""
    return "\n".join(line for line in text.split("\n") if line.strip())


def as_text_generator(generator: StepGenerator, prompt: PyTree = None) -> TextGenerator:
    """A generator that runs in process as one of texts, for the methods of the host.

    Scores are functions of the generator's state, as they are in process.

    Args:
        generator: what writes.
        prompt: what its `init` takes.

    Example:
        >>> from bayesinf.kernels.inference_scaling import DiscreteChain, Potential, as_text_generator, infer
        >>> chain = DiscreteChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], max_steps=4)
        >>> likes_b = Potential(lambda state: 1.0 * (state.last == 1), kind="step")
        >>> infer(0, as_text_generator(chain), likes_b, num_particles=64).best()
        'bbbb'
    """
    return _InProcess(generator, prompt)


class _InProcess(TextGenerator):
    """Rows of the states of a StepGenerator, found by the seeds that they were drawn with."""

    def __init__(self, generator: StepGenerator, prompt: PyTree):
        if not isinstance(generator, StepGenerator):
            raise ValueError(f"generator must be a StepGenerator, got {type(generator).__name__}")
        self.generator, self.prompt = generator, generator.encode(prompt)
        self.max_steps, self.max_tokens_per_step = generator.max_steps, generator.max_tokens_per_step
        # the state in whose i-th row an answer is
        self.rows: dict[Hashable, tuple[PyTree, int]] = {}
        self.texts: dict[Hashable, str] = {(): ""}

    def check(self, prompt: Any) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        arrays = digest(jax.tree.leaves((self.generator, self.prompt)))
        return super().fingerprint() | {"type": type(self.generator).__name__, "arrays": arrays}

    def identity(self, prefix: Prefix) -> Hashable:
        return tuple(step.seed for step in prefix)

    def text(self, prefix: Prefix) -> str:
        self._row(prefix)
        return self.texts[self.identity(prefix)]

    async def step(self, prompt: Any, prefix: Prefix, num_samples: int, seed: int) -> list[TextStep]:
        # programs for a power of two of samples; the first of them do not depend on how many others are drawn
        is_first = not prefix
        num = next_power(num_samples)
        parent, row = self._row(prefix)
        before = self.texts[self.identity(prefix)]
        state, info = _step(jax.random.key(seed), self.generator, parent, row, num)
        texts = self.generator.decode(state)
        length = self.generator.num_prompt_tokens(self.prompt) if is_first else 0
        log_ratio, num_tokens, is_done = (np.asarray(leaf) for leaf in info)
        steps = []
        for i in range(num_samples):
            name = (*[step.seed for step in prefix], (seed, i))
            self.rows[name], self.texts[name] = (state, i), texts[i]
            steps.append(
                TextStep(
                    texts[i][len(before) :],
                    int(num_tokens[i]),
                    log_ratio=float(log_ratio[i]),
                    is_done=bool(is_done[i]),
                    seed=(seed, i),
                    num_prompt_tokens=length if i == 0 else 0,
                    num_cached_tokens=0 if i == 0 else length,
                )
            )
        return steps

    async def scores(self, factor: Potential, prompt: Any, prefixes: list[Prefix]) -> list[float]:
        return [float(_score(factor, *self._row(prefix))) for prefix in prefixes]

    def _row(self, prefix: Prefix) -> tuple[PyTree, int]:
        name = self.identity(prefix)
        if name not in self.rows:
            if not prefix:
                self.rows[name] = (self.generator.init(jax.random.key(0), self.prompt, 1), 0)
                return self.rows[name]
            if prefix[-1].seed is None:
                raise ValueError("a step without a seed was not drawn by this generator, and cannot be drawn again")
            # of a run that was saved: drawn again
            seed, i = prefix[-1].seed
            before = self.text(prefix[:-1])
            state, _ = _step(jax.random.key(seed), self.generator, *self._row(prefix[:-1]), next_power(i + 1))
            text = self.generator.decode(state)[i]
            if text[len(before) :] != prefix[-1].text:
                raise errors.CheckpointError(
                    f"step {len(prefix)} of a saved answer, {prefix[-1].text!r}, is {text[len(before) :]!r} when it is "
                    "drawn again: another version of JAX, precision or device draws otherwise; begin the run anew"
                )
            self.rows[name], self.texts[name] = (state, i), text
        return self.rows[name]


@jax.jit
def _score(factor: Potential, state: PyTree, row: Any) -> Any:
    # scores are functions of whole states, of which this row is one
    return jnp.asarray(factor.score(state))[row]


def digest(arrays: Sequence[Any]) -> str:
    """A name of these arrays, the same in every process."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def next_power(num: int) -> int:
    """The least power of two that is not below."""
    return 1 << (num - 1).bit_length()


def _draw(key: Any, generator: StepGenerator, state: PyTree, row: Any, num: int) -> tuple[PyTree, Any]:
    return generator.step(key, generator.gather(state, jnp.full(num, row, jnp.int32)))


_step = jax.jit(_draw, static_argnums=4)
