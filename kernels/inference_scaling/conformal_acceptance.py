"""Drafts of a small model that a large one continues where they look strange.

    s = score(prompt, text with the draft),    p = (1 + #{calibration scores >= s}) / (n + 1)
    p > alpha     the draft is the step
    p <= alpha    the target generator continues after the draft, and both are the step

Scores are large where a draft is strange, such as the perplexity of the target model. Of drafts that are exchangeable
with those of calibration at most a share alpha is continued. Nothing is compared between particles, so that none waits
for another. What is sampled is a law of its own, between the two models, and that law is p.

References:
    'ATTS' (2025), asynchronous test-time scaling by conformal prediction.
    Vovk, Gammerman, Shafer (2005), doi:10.1007/b106715 (the p-value).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from bayesinf import errors
from bayesinf.kernels.inference_scaling.text_generator import (
    Prefix,
    TextGenerator,
    TextStep,
    digest,
    failed_step,
)

__all__ = ["ConformalAcceptance"]


class ConformalAcceptance(TextGenerator):
    """Drafts, continued by a target generator where they are strange.

    Args:
        draft: writes first.
        target: continues what is refused.
        score: of a prompt and a list of texts to as many numbers, which may be a coroutine; large is strange.
        calibration_scores: of drafts that were good enough, shape (n,).
        alpha: the share of good drafts that may be continued all the same, in (0, 1).
        p_value: of the calibration scores and one score; the rank above if None. `models.conformal.p_value` does, and
            knows weights and groups: `p_value=functools.partial(p_value, weights=...)`.

    Attributes:
        num_accepted, num_continued: drafts so far.

    Example:
        >>> from bayesinf.kernels.inference_scaling import ConformalAcceptance, TextGenerator, TextStep
        >>> from bayesinf.models.conformal import p_value
        >>> class Writes(TextGenerator):
        ...     max_steps, max_tokens_per_step = 1, 1
        ...     def __init__(self, text): self.say = text
        ...     async def step(self, prompt, prefix, num_samples, seed):
        ...         return [TextStep(self.say, 1) for _ in range(num_samples)]
        >>> strange = lambda prompt, texts: [float(len(text)) for text in texts]
        >>> both = ConformalAcceptance(Writes("long draft"), Writes(", mended"), strange, [1.0] * 19, p_value=p_value)
        >>> import asyncio
        >>> asyncio.run(both.step("", (), 1, 0))[0].text
        'long draft, mended'
    """

    def __init__(
        self,
        draft: TextGenerator,
        target: TextGenerator,
        score: Callable[[Any, list[str]], Any],
        calibration_scores: Float[ArrayLike, " n"] | Sequence[float],
        alpha: float = 0.1,
        *,
        p_value: Callable[[Any, Any], Any] | None = None,
    ):
        self.draft, self.target, self.score, self.alpha = draft, target, score, alpha
        self.calibration_scores = np.asarray(calibration_scores, float)
        self.p_value = rank_p_value if p_value is None else p_value
        errors.check_fraction("alpha", alpha)
        if self.calibration_scores.ndim != 1 or not len(self.calibration_scores):
            shape = self.calibration_scores.shape
            raise ValueError(f"calibration_scores must be a row of numbers, at least one, got shape {shape}")
        if np.isnan(self.calibration_scores).any():
            raise ValueError("calibration_scores must be numbers, got NaN; leave those drafts out")
        smallest = 1 / (1 + len(self.calibration_scores))
        if alpha < smallest:
            raise ValueError(
                f"alpha={alpha} is below 1 / (n + 1) = {smallest:.3g}, the smallest p-value of {1 / smallest - 1:.0f} "
                "calibration scores: no draft would ever be continued; bring more of them"
            )
        self.max_steps = draft.max_steps
        self.max_tokens_per_step = draft.max_tokens_per_step + target.max_tokens_per_step
        self.num_accepted = self.num_continued = 0

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        async with self.draft.session(), self.target.session():
            yield

    def check(self, prompt: Any) -> None:
        self.draft.check(prompt)
        self.target.check(prompt)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {
            "draft": self.draft.fingerprint(),
            "target": self.target.fingerprint(),
            "alpha": self.alpha,
            "calibration_scores": digest([self.calibration_scores]),
        }

    async def step(self, prompt: Any, prefix: Prefix, num_samples: int, seed: int) -> list[TextStep]:
        drafts = list(await self.draft.step(prompt, prefix, num_samples, seed))
        drawn = [i for i, draft in enumerate(drafts) if draft.failure is None]
        if drawn:
            scores = self.score(prompt, [self.text((*prefix, drafts[i])) for i in drawn])
            scores = await scores if isawaitable(scores) else scores
            if len(scores) != len(drawn):
                raise ValueError(f"score must return as many numbers as texts, {len(drawn)}, got {len(scores)}")
            mended = [
                self._mend(prompt, prefix, drafts[i], float(score), (seed + 1 + i) % 2**31)
                for i, score in zip(drawn, scores, strict=True)
            ]
            for i, step in zip(drawn, await asyncio.gather(*mended), strict=True):
                drafts[i] = step
        return drafts

    async def _mend(self, prompt: Any, prefix: Prefix, draft: TextStep, score: float, seed: int) -> TextStep:
        if np.isnan(score):
            return failed_step("the score of a draft is NaN")._replace(num_tokens=draft.num_tokens)
        if float(self.p_value(self.calibration_scores, score)) > self.alpha:
            self.num_accepted += 1
            return draft
        self.num_continued += 1
        # after the end of an answer nothing follows: the target has its say by starting over
        kept = "" if draft.is_done else draft.text
        (more,) = await self.target.step(prompt, prefix if draft.is_done else (*prefix, draft), 1, seed)
        return more._replace(
            text=kept + more.text if more.failure is None else "",
            num_tokens=draft.num_tokens + more.num_tokens,
            log_prob=None,
            log_ratio=0.0,
            seed=None,
            num_prompt_tokens=draft.num_prompt_tokens + more.num_prompt_tokens,
            num_cached_tokens=draft.num_cached_tokens + more.num_cached_tokens,
        )


def rank_p_value(calibration_scores: Float[np.ndarray, " n"], score: float) -> float:
    """(1 + #{calibration scores >= score}) / (n + 1)."""
    return float((1 + np.sum(calibration_scores >= score)) / (1 + len(calibration_scores)))
