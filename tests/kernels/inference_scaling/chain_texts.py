"""A Markov chain that writes letters, as a generator of texts without JAX, and its exact laws by enumeration."""

import asyncio
import itertools

import numpy as np
import scipy.stats

from bayesinf.kernels.inference_scaling import DiscreteChain, Potential, TextGenerator, TextStep, failed_step

INITIAL = np.array([0.4, 0.35, 0.25])
TRANSITION = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
LETTERS, END, LENGTH = "abc", "c", 4
SCORES = {"a": 0.9, "b": 0.2, "c": 0.6}

CHAIN = DiscreteChain(INITIAL, TRANSITION, max_steps=LENGTH, end=END)


def score(prompt, texts):
    """Depends on the last letter, and on whether it repeats the one before."""
    return [SCORES[text[-1]] * (0.5 if text[-2:-1] == text[-1] else 1.0) for text in texts]


POTENTIAL = Potential(score, kind="step")


def law():
    """p(x) G(x) of every answer."""
    found = {}
    for length in range(1, LENGTH + 1):
        for letters in itertools.product(LETTERS, repeat=length):
            text = "".join(letters)
            if END in text[:-1] or (length < LENGTH and text[-1] != END):
                continue
            index = [LETTERS.index(letter) for letter in text]
            p = INITIAL[index[0]] * np.prod([TRANSITION[i, j] for i, j in itertools.pairwise(index)])
            found[text] = p * np.prod([score("", [text[: t + 1]])[0] for t in range(length)])
    return found


def next_letter(text, rng):
    row = TRANSITION[LETTERS.index(text[-1])] if text else INITIAL
    return LETTERS[rng.choice(3, p=row)]


class ChainTexts(TextGenerator):
    """The chain; some letters take longer than others.

    `fails` says of (prefix, call number) whether the request fails; `calls` has all that was asked for.
    """

    max_steps, max_tokens_per_step = LENGTH, 1

    def __init__(self, delays=None, fails=None, end=END):
        self.delays, self.fails, self.end = delays or {}, fails, end
        self.calls = []
        self.num_cancelled = 0

    async def step(self, prompt, prefix, num_samples, seed):
        text = self.text(prefix)
        self.calls.append((text, num_samples))
        if self.fails and self.fails(text, len(self.calls)):
            raise ConnectionError("the line is dead")
        rng = np.random.default_rng(seed)
        letters = [next_letter(text, rng) for _ in range(num_samples)]
        try:
            for _ in range(max(self.delays.get(letter, 0) for letter in letters)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return [
            TextStep(letter, 1, is_done=letter == self.end, num_prompt_tokens=2 * (i == 0))
            for i, letter in enumerate(letters)
        ]


class HalfFails(ChainTexts):
    """Every other sample of a request is missing."""

    async def step(self, prompt, prefix, num_samples, seed):
        steps = await super().step(prompt, prefix, num_samples, seed)
        return [failed_step("lost") if i % 2 else step for i, step in enumerate(steps)]


def estimates(results):
    """Of each result, Zhat, and Zhat times the posterior of first and last letters and lengths, and their means."""
    kinds = [lambda text: text[0], lambda text: text[-1], len]
    weights = law()
    groups = [(kind, value) for kind in kinds for value in sorted({kind(text) for text in weights})]

    def sums(of):
        return [sum(of.values()), *(sum(p for text, p in of.items() if kind(text) == value) for kind, value in groups)]

    assert all(set(result.posterior) <= set(weights) for result in results)
    rows = [[np.exp(result.log_evidence) * part for part in sums(result.posterior)] for result in results]
    return np.array(rows), np.array(sums(weights))


def p_value_of_means(rows, truth):
    """That these are the means, all of them at once."""
    p_values = [scipy.stats.ttest_1samp(column, mean).pvalue for column, mean in zip(rows.T, truth, strict=True)]
    return min(p_values) * len(p_values)
