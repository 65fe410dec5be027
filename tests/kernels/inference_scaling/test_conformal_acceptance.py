"""Drafts that a conformal p-value refuses: how often, and what becomes of them."""

import asyncio
from functools import partial

import numpy as np
import pytest
import scipy.stats

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import ConformalAcceptance, Potential, TextGenerator, TextStep, failed_step
from bayesinf.models.conformal import p_value


class Numbers(TextGenerator):
    """Writes Gaussian numbers of the given mean."""

    max_steps, max_tokens_per_step = 2, 3

    def __init__(self, mean, mark="", is_done=False):
        self.mean, self.mark, self.is_done = mean, mark, is_done

    async def step(self, prompt, prefix, num_samples, seed):
        rng = np.random.default_rng(seed)
        return [TextStep(f"{self.mark}{rng.normal(self.mean)} ", 3, is_done=self.is_done) for _ in range(num_samples)]


def last_number(prompt, texts):
    return [float(text.split()[-1]) for text in texts]


def drawn(num, mean, both):
    both.draft.mean = mean
    return asyncio.run(both.step("go", (), num, 1))


def test_of_good_drafts_a_share_of_alpha_is_continued():
    # a new calibration for every draft, so that the law of the p-value is the one that the theorem is about
    rng = np.random.default_rng(0)
    continued = 0
    for _ in range(400):
        both = ConformalAcceptance(Numbers(0.0), Numbers(0.0, "and "), last_number, rng.normal(size=19), 0.2)
        asyncio.run(both.step("go", (), 1, int(rng.integers(2**31))))
        continued += both.num_continued
    # (1 + #{calibration >= s}) / 20 <= 0.2 for 4 of 20 ranks, all equally probable
    assert scipy.stats.binomtest(continued, 400, 0.2).pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(continued, 400, 0.4).pvalue < FALSE_ALARM


def test_strange_drafts_are_continued_by_the_target():
    calibration = np.random.default_rng(0).normal(size=99)
    both = ConformalAcceptance(Numbers(0.0), Numbers(0.0, "and "), last_number, calibration, 0.1)
    steps = drawn(50, 9.0, both)
    assert all(step.text.count(" and ") == 1 and step.num_tokens == 6 for step in steps)
    assert both.num_continued == 50
    steps = drawn(50, -9.0, both)
    assert all("and" not in step.text and step.num_tokens == 3 for step in steps)
    assert both.num_accepted == 50
    # what ends an answer cannot be continued: the target writes instead
    ends = ConformalAcceptance(Numbers(9.0, is_done=True), Numbers(0.0, "and "), last_number, calibration, 0.1)
    (step,) = asyncio.run(ends.step("go", (), 1, 1))
    assert step.text.startswith("and ")
    assert step.num_tokens == 6


def test_the_p_value_may_be_that_of_models_conformal():
    calibration = np.random.default_rng(0).normal(size=30)
    ours = ConformalAcceptance(Numbers(1.5), Numbers(0.0, "and "), last_number, calibration, 0.2)
    theirs = ConformalAcceptance(Numbers(1.5), Numbers(0.0, "and "), last_number, calibration, 0.2, p_value=p_value)
    assert drawn(40, 1.0, ours) == drawn(40, 1.0, theirs)
    assert 0 < ours.num_accepted < 40
    # half of the weight on the largest: what is below it looks ordinary
    heavy = partial(p_value, weights=np.where(calibration == calibration.max(), 30.0, 1.0))
    lenient = ConformalAcceptance(Numbers(1.0), Numbers(0.0), last_number, calibration, 0.2, p_value=heavy)
    drawn(40, 1.0, lenient)
    assert lenient.num_accepted > ours.num_accepted


def test_it_is_a_generator_as_others_are():
    async def slow(prompt, texts):
        await asyncio.sleep(0)
        return last_number(prompt, texts)

    both = ConformalAcceptance(Numbers(0.0), Numbers(0.0), slow, np.linspace(-2, 2, 20))
    likes = Potential(lambda prompt, texts: [0.5] * len(texts), kind="step")
    result = kernels.infer(0, both, likes, "go", num_particles=8, barrier="cascade")
    assert result.log_evidence == pytest.approx(2 * np.log(0.5), rel=1e-5)
    assert result.tokens.generated == 3 * (16 + both.num_continued)


def test_refused_drafts_are_continued_at_the_same_time():
    class Slow(Numbers):
        num_open = most = 0

        async def step(self, prompt, prefix, num_samples, seed):
            Slow.num_open += 1
            Slow.most = max(Slow.most, Slow.num_open)
            await asyncio.sleep(0.001)
            Slow.num_open -= 1
            return await super().step(prompt, prefix, num_samples, seed)

    both = ConformalAcceptance(Numbers(9.0), Slow(0.0), last_number, np.zeros(19))
    assert len(asyncio.run(both.step("go", (), 8, 0))) == 8
    assert Slow.most == 8


def test_failures_and_bad_arguments(unchecked):
    class Fails(Numbers):
        async def step(self, prompt, prefix, num_samples, seed):
            return [failed_step("gone")] * num_samples

    both = ConformalAcceptance(Numbers(9.0), Fails(0.0), last_number, np.zeros(19))
    assert asyncio.run(both.step("go", (), 1, 0))[0].failure == "gone"
    # what was drafted for nothing is counted
    assert asyncio.run(both.step("go", (), 1, 0))[0].num_tokens == 3
    # of drafts that were lost there is no score, and one that is none costs its draft alone
    lost = ConformalAcceptance(Fails(9.0), Numbers(0.0), lambda prompt, texts: 1 / 0, np.zeros(19))
    assert [step.failure for step in asyncio.run(lost.step("go", (), 2, 0))] == ["gone"] * 2
    some = ConformalAcceptance(Numbers(0.0), Numbers(0.0), lambda prompt, texts: [np.nan, -9.0], np.zeros(19))
    first, second = asyncio.run(some.step("go", (), 2, 0))
    assert first.failure == "the score of a draft is NaN"
    assert second.failure is None
    few = ConformalAcceptance(Numbers(0.0), Numbers(0.0), lambda prompt, texts: [1.0], np.zeros(19))
    with pytest.raises(ValueError, match="as many numbers as texts, 2, got 1"):
        asyncio.run(few.step("go", (), 2, 0))
    for scores, alpha, said in [
        (np.zeros(19), 1.0, "alpha must lie in"),
        (np.zeros(8), 0.1, "no draft would ever be continued"),
        (np.zeros((2, 2)), 0.1, "calibration_scores must be a row"),
        ([], 0.1, "calibration_scores must be a row"),
        ([np.nan] * 20, 0.1, "calibration_scores must be numbers"),
    ]:
        with pytest.raises(ValueError, match=said):
            ConformalAcceptance(Numbers(0.0), Numbers(0.0), last_number, scores, alpha)
