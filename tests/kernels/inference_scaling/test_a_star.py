"""A*-decoding on a tree whose scores are known: what is taken, in which order, and when it ends."""

import pytest

from bayesinf import errors, kernels
from bayesinf.kernels.inference_scaling import AStar, Potential, TextGenerator, TextStep

# h of every answer; the children of an answer are it and one more letter
HEIGHTS = {
    "a": 0.5, "b": 0.6,
    "ba": 0.1, "bb": 0.2,
    "aa": 0.9, "ab": 0.3,
    "aaa": 0.7, "aab": 0.8,
}  # fmt: skip


class AllLetters(TextGenerator):
    """Its n samples are the first n letters."""

    max_steps, max_tokens_per_step = 3, 1

    def __init__(self):
        self.taken = []

    async def step(self, prompt, prefix, num_samples, seed):
        self.taken.append(self.text(prefix))
        return [TextStep("ab"[i], 1) for i in range(num_samples)]


VALUE = Potential(lambda prompt, texts: [HEIGHTS.get(text, 0.0) for text in texts], kind="value")


def test_the_most_promising_is_taken():
    # f: a 1.0, b 1.2; ba g .6 f .7, bb g .6 f .8; aa g .9 f 1.8, ab g .5 f .8; aab g .9 f 1.7, aaa g .9 f 1.6
    generator = AllLetters()
    result = kernels.infer(0, generator, VALUE, "go", method=AStar(width=2))
    assert generator.taken == ["", "b", "a", "aa"]
    assert result.best() == "aab"
    assert result.tokens.generated == result.num_calls == 8
    assert result.tokens.wasted == 8 - 4
    assert result.num_steps.tolist() == [3]
    # without g the second best would be bb (.2) before a (.5): never; without h nothing tells b from a
    more = kernels.infer(0, AllLetters(), VALUE, "go", method=AStar(width=2, num_goals=2))
    assert sorted(answer for answer in more.answers if answer is not None) == ["aaa", "aab"]


def test_of_equals_the_nearest_to_its_end_is_taken():
    """A score that tells nothing apart: straight to the end, where the oldest first would write all 2 + 4 + 8."""
    generator = AllLetters()
    even = Potential(lambda prompt, texts: [0.5 for text in texts], kind="value")
    result = kernels.infer(0, generator, even, "go", method=AStar(width=2))
    assert generator.taken == ["", "a", "aa"]
    assert result.best() == "aaa"
    assert result.tokens.generated == 6


def test_a_reward_of_complete_answers_alone_leaves_nothing_to_take():
    blind = Potential(lambda prompt, texts: [float(len(text) == 3) for text in texts], kind="terminal")
    with pytest.raises(errors.DegenerateWeightsError, match="All 2 particles died at step 1"):
        kernels.infer(0, AllLetters(), blind, "go", method=AStar(width=2))


def test_it_ends_with_the_budget():
    generator = AllLetters()
    with pytest.warns(errors.SamplingWarning, match="budget of 5 tokens"):
        result = kernels.infer(0, generator, VALUE, "go", method=AStar(width=2), num_particles=2, budget=5)
    assert generator.taken == ["", "b", "a"]
    assert result.best() is None
    assert "aa" in result.texts


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="width must be at least 1"):
        AStar(width=0)
