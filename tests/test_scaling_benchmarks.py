"""The comparisons of methods at equal budgets, at their smallest: what they find is true, and they write it down."""

import csv
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import Independent, Resample

REASON = "an sdist has no benchmarks"
chains = pytest.importorskip("benchmarks.inference_scaling.reasoning_chain", reason=REASON)
budget = pytest.importorskip("benchmarks.inference_scaling.budget", reason=REASON)
addition = pytest.importorskip("benchmarks.inference_scaling.addition", reason=REASON)

pytestmark = pytest.mark.usefixtures("compile_fast")

NUM_STEPS, ERROR = 3, 0.3
# a verifier that sees what is right: at such logits odds decide, and none of them is clipped
SETTINGS = {
    "step": budget.Regime(
        chains.constant_error(4, NUM_STEPS, 2, ERROR), partial(chains.step_verifier, strength=10.0, sigma=0.0), "odds"
    )
}


def assert_written(folder, name, rows):
    assert (folder / f"{name}.png").stat().st_size > 10_000
    with open(folder / f"{name}.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == [row["method"] for row in rows]
    np.testing.assert_allclose(
        [float(row["accuracy"]) for row in written], [row["accuracy"] for row in rows], rtol=1e-3
    )


def test_accuracy_is_what_it_must_be_on_a_small_chain(tmp_path, capsys):
    """Two answers, each right with probability q: one of them is, by a verifier that knows; the first, by majority."""
    names = ("best_of_n", "majority")
    rows = budget.main(tmp_path, (2,), 200, names=names, settings=SETTINGS)
    assert_written(tmp_path, "budget", rows)
    right = (1 - ERROR) ** NUM_STEPS
    expected = {("majority", "weighted_majority"): right}
    for row in rows:
        q = expected.get((row["method"], row["rule"]), 1 - (1 - right) ** 2)
        num_right = round(row["accuracy"] * row["num_problems"])
        assert scipy.stats.binomtest(num_right, row["num_problems"], q).pvalue > FALSE_ALARM, row
        assert row["num_tokens"] == row["budget"] == 2 * NUM_STEPS
        assert row["is_own_rule"] == (
            row["rule"] == ("argmax" if row["method"] == "best_of_n" else "weighted_majority")
        )
        # the two laws are told apart
        other = right if q != right else 1 - (1 - right) ** 2
        assert scipy.stats.binomtest(num_right, row["num_problems"], other).pvalue < FALSE_ALARM
    table = capsys.readouterr().out.strip().splitlines()[-2:]
    assert table[0].startswith("| best of n | ." + f"{rows[0]['accuracy']:.3f}"[2:])


@pytest.mark.slow  # the host compiles a step for every number of children
def test_methods_of_the_host_find_what_they_must(tmp_path):
    num, right = 40, (1 - ERROR) ** NUM_STEPS
    rows = budget.main(tmp_path, (10,), num, num, names=("cascade", "a_star"), settings=SETTINGS)
    assert {(row["method"], row["num_problems"]) for row in rows} == {("cascade", num), ("a_star", num)}
    for row in rows:
        # a step begins only while tokens are left
        assert 0 < row["num_tokens"] < 10 * NUM_STEPS + 8
        num_right = round(row["accuracy"] * num)
        p_single = scipy.stats.binomtest(num_right, num, right, alternative="greater").pvalue
        if row["method"] == "a_star":
            # four children each, of which a verifier that knows takes the right ones, older ones first: the tokens
            # are enough for all children of the first four, and those of one of theirs
            least = (1 - ERROR**4) ** NUM_STEPS
            assert scipy.stats.binomtest(num_right, num, least, alternative="less").pvalue > FALSE_ALARM
            assert p_single < FALSE_ALARM
        # the cascade keeps a line that is right: it cannot be worse than one answer, and nothing right would be seen
        assert scipy.stats.binomtest(num_right, num, right, alternative="less").pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(0, num, right, alternative="less").pvalue < FALSE_ALARM


def test_solutions_are_sums():
    texts = np.asarray(addition.write(jax.random.key(0), 50))
    for row in texts:
        text = addition.TOKENIZER.decode(row[:-1].tolist())
        question, solution = text.split("=")
        first, second = map(int, question.split("+"))
        assert int(solution.split(";")[-1]) == first + second
        assert row[-1] == addition.TOKENIZER.end_token


class Dictated(eqx.Module):
    """A language model that writes one text, whatever it reads."""

    text: jax.Array
    vocab_size: ClassVar[int] = addition.TOKENIZER.vocab_size

    def prefill(self, tokens, num_tokens, *, num_particles, max_tokens):
        return jnp.zeros(num_particles, jnp.int32)

    def extend(self, cache, tokens, is_active):
        logits = 50.0 * jax.nn.one_hot(self.text[jnp.minimum(cache, self.text.size - 1)], self.vocab_size)
        return logits, cache + is_active

    def gather(self, cache, ancestors):
        return cache[ancestors]

    def place(self, cache, other):
        return cache.at[0].set(other[0])

    def truncate(self, cache, lengths):
        return jnp.minimum(cache, lengths)


@pytest.mark.parametrize("selection", [Resample(), Independent()])
def test_a_sum_is_right_if_its_last_line_is(selection):
    texts = addition.write(jax.random.key(1), 1)
    solution = texts[0, addition.PROMPT_LENGTH :]
    wrong_answer = solution.at[-2].set((solution[-2] + 1) % 10)
    wrong_step = solution.at[0].set((solution[0] + 1) % 10)
    for text, is_right in ((solution, True), (wrong_step, True), (wrong_answer, False)):
        generator = addition.generator_of(Dictated(text), 1.0)
        found = addition.solve(jax.random.split(jax.random.key(2), 1), texts, generator, selection, 3)
        assert float(found["one_answer"][0]) == is_right
        assert bool(found["weighted_majority"][0]) == is_right
        assert int(found["tokens"][0]) == 3 * addition.SOLUTION_LENGTH


@pytest.mark.slow  # it trains
def test_addition_is_written_down(tmp_path):
    sizes = {"num_particles": (4, 8), "num_problems": 4, "temperatures": (1.0, 2.0), "num_iterations": 3}
    rows = addition.main(tmp_path, **sizes)
    assert_written(tmp_path, "addition", rows)
    assert all(0 < row["num_tokens"] <= row["num_particles"] * addition.SOLUTION_LENGTH for row in rows)
