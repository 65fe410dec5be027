"""What a run on the host says to its generator and its scorer: what it asked for, what failed, and what it cost.

A request that fails leaves particles without a step; they get weight zero, and the run goes on. Scores are asked for
once for every unfinished answer, however many particles share it; answers that are ready for their scores at one
moment, of whatever request, are one call of the scorer.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.text_generator import Prefix, TextGenerator, TextStep, failed_step

__all__ = ["OutageError", "RunRequests", "ScoreError"]


COUNTS = ("num_prompt_tokens", "num_cached_tokens", "num_unused_tokens", "num_unused_calls", "num_cancelled")


class OutageError(Exception):
    """Every request of a step failed, and nobody is left."""


class ScoreError(Exception):
    """A scorer raised, or did not give a number for every text."""


class RunRequests:
    """The requests of one run, and their accounts.

    Attributes:
        failures: why steps could not be had, one for each particle.
        num_prompt_tokens, num_cached_tokens: of all requests.
        num_unused_tokens: generated for nobody: ahead of a choice that fell otherwise, or for a step that failed.
        num_unused_calls: the steps of the first kind.
        num_cancelled: requests that were cancelled before their reply had come; what they cost is not known.
    """

    def __init__(self, generator: TextGenerator, potential: AbstractPotential, prompt: Any):
        self.generator, self.potential, self.prompt = generator, potential, prompt
        self.failures: list[str] = []
        self.num_prompt_tokens = self.num_cached_tokens = self.num_unused_tokens = self.num_unused_calls = 0
        self.num_cancelled = 0
        self._scores: dict[Hashable, asyncio.Future[tuple[float, ...]]] = {}
        # what waits for the next call of the scorer, and the calls under way
        self._unscored: dict[Hashable, Prefix] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self.on_step: Callable[[Any], None] = lambda sweep: None

    async def draw(self, prefix: Prefix, num_samples: int, seed: int) -> list[TextStep]:
        """The next step, drawn `num_samples` times; failed ones among them."""
        try:
            steps = list(await self.generator.step(self.prompt, prefix, num_samples, seed))
            if len(steps) != num_samples:
                raise ValueError(f"asked for {num_samples} steps, got {len(steps)}")
        except Exception as error:  # whatever a generator raises costs the particles, not the run
            steps = [failed_step(f"{type(error).__name__}: {error}")] * num_samples
        self.num_prompt_tokens += sum(step.num_prompt_tokens for step in steps)
        self.num_cached_tokens += sum(step.num_cached_tokens for step in steps)
        return steps

    def lose(self, steps: Sequence[TextStep]) -> None:
        """Notes which of these, that particles were to take, could not be had."""
        failed = [step for step in steps if step.failure is not None]
        self.failures += [str(step.failure) for step in failed]
        self.num_unused_tokens += sum(step.num_tokens for step in failed)

    def waste(self, steps: Sequence[TextStep]) -> None:
        """Counts steps that no particle took."""
        self.num_unused_tokens += sum(step.num_tokens for step in steps)
        self.num_unused_calls += sum(step.failure is None for step in steps)

    def accounts(self) -> dict[str, Any]:
        """What has been counted, for a run that goes on from a file."""
        return {name: getattr(self, name) for name in ("failures", *COUNTS)}

    def restore(self, accounts: dict[str, Any]) -> None:
        """Goes on counting from there."""
        for name, value in accounts.items():
            setattr(self, name, value)

    async def scores(self, prefixes: Sequence[Prefix]) -> Float[np.ndarray, "f n"]:
        """The scores of these answers, a row for every factor of the potential."""
        loop = asyncio.get_running_loop()
        names = [self.generator.identity(prefix) for prefix in prefixes]
        for name, prefix in zip(names, prefixes, strict=True):
            if name not in self._scores:
                self._scores[name] = loop.create_future()
                if not self._unscored:
                    # it begins in the next turn of the event loop: by then all that are ready in this one have come
                    call = loop.create_task(self._score_waiting())
                    self._calls.add(call)
                    call.add_done_callback(self._calls.discard)
                self._unscored[name] = prefix
        futures = [self._scores[name] for name in names]
        # others wait for them too: who is cancelled must not cancel them
        found = [await asyncio.shield(future) for future in futures]
        return np.array(found, float).reshape(len(prefixes), len(self.potential.factors)).T

    async def close(self) -> None:
        """Ends the calls of the scorer that are under way."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _score_waiting(self) -> None:
        waiting, self._unscored = self._unscored, {}
        futures = {name: self._scores[name] for name in waiting}
        try:
            rows = [await self._ask(factor, list(waiting.values())) for factor in self.potential.factors]
        except BaseException as error:
            for name, future in futures.items():
                del self._scores[name]
                if isinstance(error, ScoreError):
                    future.set_exception(error)
                    future.exception()  # those who waited may be gone
                else:
                    future.cancel()
            if not isinstance(error, ScoreError):
                raise
            return
        for future, scores in zip(futures.values(), zip(*rows, strict=True), strict=True):
            future.set_result(scores)

    async def _ask(self, factor: Any, prefixes: list[Prefix]) -> list[float]:
        try:
            scores = await self.generator.scores(factor, self.prompt, prefixes)
            numbers = [float(score) for score in np.asarray(scores, float).reshape(-1)]
        except Exception as error:
            raise ScoreError(f"the score of kind {factor.kind!r} raised {type(error).__name__}: {error}") from error
        if len(numbers) != len(prefixes):
            raise ScoreError(
                f"the score of kind {factor.kind!r} gave {len(numbers)} numbers for {len(prefixes)} texts; it is "
                "called as score(prompt, texts), and returns one number for each text"
            )
        return numbers
