"""What a run on the host asks for: requests and scores, their number and order, what fails, and who ends them."""

import asyncio
import signal
import threading

import numpy as np
import pytest
from chain_texts import LENGTH, LETTERS, POTENTIAL, ChainTexts, HalfFails, law, next_letter, score

from bayesinf import errors, kernels
from bayesinf.kernels.inference_scaling import (
    Beam,
    Gibbs,
    Inference,
    ParallelTempering,
    Potential,
    Resample,
    TextStep,
    infer_async,
)
from bayesinf.kernels.inference_scaling.run_requests import RunRequests, ScoreError

RESAMPLE = Resample(1.0, scheme="multinomial")


@pytest.mark.parametrize(
    "method",
    ["best_of_n", "majority", "beam", "dvts", "particle_filter_published", "entropic", "svdd", "cascade", "a_star"],
)
def test_every_method_accounts_for_its_tokens(method):
    generator = ChainTexts()
    result = kernels.infer(1, generator, POTENTIAL, "go", method=method, num_particles=8)
    assert result.best() in law()
    assert result.tokens.generated == sum(num for _, num in generator.calls) == result.num_calls
    assert result.tokens.prompt == 2 * len(generator.calls)
    assert result.status == "complete"


def test_duplicates_are_sent_once():
    generator = ChainTexts()
    result = kernels.infer(0, generator, POTENTIAL, "go", method=RESAMPLE, num_particles=32)
    of_length = [[call for call in generator.calls if len(call[0]) == t] for t in range(LENGTH)]
    assert of_length[0] == [("", 32)]
    for calls in of_length[1:]:
        texts = [text for text, _ in calls]
        assert len(texts) == len(set(texts))
    assert [sum(num for _, num in calls) for calls in of_length] == result.num_tokens[0].sum(axis=1).tolist()


def test_a_text_is_scored_once():
    seen = []

    async def slow_score(prompt, texts):
        await asyncio.sleep(0)
        seen.extend(texts)
        return score(prompt, texts)

    kernels.infer(0, ChainTexts(), Potential(slow_score, kind="step"), "go", num_particles=32)
    assert len(seen) == len(set(seen))
    seen.clear()
    kernels.infer(0, ChainTexts(), Potential(slow_score, kind="step"), "go", num_particles=32, barrier="cascade")
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("method", ["cascade", "a_star", "particle_filter"])
def test_what_is_ready_at_once_is_scored_at_once(method):
    calls = []
    counting = Potential(lambda prompt, texts: calls.append(texts) or score(prompt, texts), kind="step")
    generator = ChainTexts(end="")
    kernels.infer(0, generator, counting, "go", num_particles=32, method=method)
    assert sorted(calls[0]) == list(LETTERS)
    # a turn for each step of all; for each answer that is taken, unless all that follows is known
    assert len(calls) <= len(generator.calls) if method == "a_star" else len(calls) == LENGTH


def test_who_is_late_is_not_waited_for():
    seen = []
    counting = Potential(lambda prompt, texts: seen.extend(texts) or score(prompt, texts), kind="step")
    kernels.infer(0, ChainTexts(delays={"a": 50}, end=""), counting, "go", num_particles=32, method="cascade")
    lengths = [len(text) for text in seen]
    assert lengths != sorted(lengths)


def test_a_scorer_that_fails_fails_all_who_wait_for_it():
    async def raises(prompt, texts):
        await asyncio.sleep(0)
        raise ZeroDivisionError("of the scorer")

    async def body():
        requests = RunRequests(ChainTexts(), Potential(raises, kind="step"), "go")
        prefixes = [(TextStep("a", 1),), (TextStep("b", 1),)]
        waiting = [requests.scores(prefixes), requests.scores(prefixes[:1]), requests.scores(prefixes[1:])]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in found] == [ScoreError] * 3
        assert not requests._scores

    asyncio.run(body())


def test_who_is_cancelled_takes_no_score_from_others():
    async def slow(prompt, texts):
        await asyncio.sleep(0.01)
        return [0.5] * len(texts)

    async def body():
        requests = RunRequests(ChainTexts(), Potential(slow, kind="step"), "go")
        prefix = (TextStep("a", 1),)
        first = asyncio.create_task(requests.scores([prefix]))
        second = asyncio.create_task(requests.scores([prefix]))
        await asyncio.sleep(0.001)
        first.cancel()
        return await second

    assert asyncio.run(body()).tolist() == [[0.5]]


def test_a_scorer_of_whole_answers_sees_one_step():
    class Paragraphs(ChainTexts):
        async def step(self, prompt, prefix, num_samples, seed):
            return [TextStep("a line\n\n", 2)] * num_samples

    seen = []
    whole = Potential(lambda prompt, texts: seen.extend(texts) or [0.5] * len(texts), "odds", "model")
    kernels.infer(0, Paragraphs(), whole, "go", num_particles=2)
    assert seen[1] == "a line\na line"


def test_a_failure_costs_its_particles_alone():
    with pytest.warns(errors.SamplingWarning, match="requests that failed"):
        result = kernels.infer(0, HalfFails(), POTENTIAL, "go", num_particles=16, method="majority")
    assert result.failures[:8] == ["lost"] * 8
    assert "lost" in result.status
    dead = ~result.is_done
    assert np.sum(dead) == len(result.failures)
    assert np.all(np.isneginf(result.log_votes[dead]))
    assert np.all(np.isfinite(result.log_votes[~dead]))
    assert Inference.from_json(result.to_json()).failures == result.failures


@pytest.mark.parametrize(
    "method", ["particle_filter", "beam", "particle_filter_published", "svdd", "cascade", "a_star"]
)
def test_no_method_answers_with_the_dead(method):
    # beam search has all its particles in the second request
    failing = ChainTexts(fails=lambda text, call: call == (3 if method == "beam" else 2))
    with pytest.warns(errors.SamplingWarning, match="the line is dead"):
        result = kernels.infer(2, failing, POTENTIAL, "go", num_particles=32, method=method)
    assert set(result.answers) - {None} <= set(law())
    assert result.best() is not None
    assert len(result.failures) > 0


@pytest.mark.parametrize("barrier", ["barrier", "speculative", "cascade"])
def test_scores_that_are_none_raise_with_the_run(barrier):
    bad = Potential(lambda prompt, texts: [np.nan if text.endswith("b") else 0.5 for text in texts], kind="step")
    with pytest.raises(errors.PotentialError, match="NaN or out of the range") as caught:
        kernels.infer(0, ChainTexts(), bad, "go", num_particles=8, barrier=barrier)
    assert caught.value.result.num_invalid > 0
    large = Potential(lambda prompt, texts: [1.5 if text.endswith("b") else 0.5 for text in texts], kind="step")
    with pytest.raises(errors.PotentialError, match="NaN or out of the range") as caught:
        kernels.infer(0, ChainTexts(), large, "go", num_particles=8, barrier=barrier)
    result = caught.value.result
    assert any(result.texts)
    assert not any(text.endswith("b") for text in result.posterior)
    few = Potential(lambda prompt, texts: [0.5, 0.5, 0.5], kind="step")
    with pytest.raises(errors.PotentialError, match="gave 3 numbers"):
        kernels.infer(0, ChainTexts(), few, "go", num_particles=8, barrier=barrier)

    def raises(prompt, texts):
        if len(texts[0]) > 1:
            raise ZeroDivisionError("of the scorer")
        return [0.5] * len(texts)

    with pytest.raises(errors.PotentialError, match="ZeroDivisionError: of the scorer") as caught:
        kernels.infer(0, ChainTexts(), Potential(raises, kind="step"), "go", num_particles=8, barrier=barrier)
    assert any(caught.value.result.texts)


@pytest.mark.parametrize(
    ("method", "call"),
    [(Gibbs(2), 1), (ParallelTempering(num_sweeps=2), 1), (ParallelTempering(num_sweeps=2), 5)],
    ids=["burn-in", "cold burn-in", "hot chain"],
)
def test_a_score_that_is_none_in_a_population_without_a_vote(method, call):
    # one step an answer, one request a population: of this one alone an answer has no score
    class OneStrange(ChainTexts):
        max_steps = 1

        async def step(self, prompt, prefix, num_samples, seed):
            self.calls.append(num_samples)
            is_strange = len(self.calls) == call
            return [TextStep("x" if is_strange and i == 0 else "b", 1) for i in range(num_samples)]

    potential = Potential(lambda prompt, texts: [np.nan if text == "x" else 0.5 for text in texts], kind="step")
    with pytest.raises(errors.PotentialError, match="1 scores were NaN") as caught:
        kernels.infer(0, OneStrange(), potential, "go", method=method, num_particles=4)
    assert set(caught.value.result.texts) == {"b"}


def test_all_particles_dead():
    zero = Potential(lambda prompt, texts: [0.0] * len(texts), kind="step")
    for barrier in ("barrier", "speculative", "cascade"):
        with pytest.raises(errors.DegenerateWeightsError, match="particles died at step 1") as caught:
            kernels.infer(0, ChainTexts(), zero, "go", num_particles=8, barrier=barrier)
        result = caught.value.result
        assert result.tokens.generated == 8
        assert set(result.texts) <= {"", *LETTERS}
        assert result.best() is None


def test_budget():
    for barrier in ("barrier", "speculative", "cascade"):
        with pytest.warns(errors.SamplingWarning, match="budget of 12 tokens"):
            result = kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=8, budget=12, barrier=barrier)
        assert 12 <= result.tokens.generated < 12 + 2 * 8
    with pytest.raises(ValueError, match="budget must allow one step"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=8, budget=7)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_no_step_begins_that_the_budget_forbids(num_steps):
    # the budget is spent by so many steps of all, and not one is begun after them
    generator = ChainTexts(delays={"a": 9}, end="")
    options = {"num_particles": 8, "budget": max(8 * num_steps - 3, 8), "method": RESAMPLE, "barrier": "speculative"}
    with pytest.warns(errors.SamplingWarning, match="budget of"):
        result = kernels.infer(1, generator, POTENTIAL, "go", **options)
    assert result.num_steps.tolist() == [num_steps]
    assert max(len(text) for text, _ in generator.calls) == num_steps - 1


def test_rewards_too_large_to_be_added_are_told():
    huge = Potential(lambda prompt, texts: [1000.0] * len(texts), kind="value", is_log=True)
    with pytest.raises(errors.PotentialError, match="log reward of 1000 is too large") as caught:
        kernels.infer(0, ChainTexts(), huge, "go", method="a_star", num_particles=2)
    assert any(caught.value.result.texts)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompt must be a text that is not empty"):
        kernels.infer(0, ChainTexts(), POTENTIAL, " ")
    with pytest.raises(ValueError, match="barrier must be one of"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", barrier="none")
    with pytest.raises(ValueError, match="not for method='Beam'"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method=Beam(2), barrier="cascade")
    with pytest.raises(ValueError, match="'speculative' is for methods with a barrier, got method='a_star'"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method="a_star", barrier="speculative")
    with pytest.raises(ValueError, match="save and resume are for methods with a barrier"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method="cascade", save="run.json")
    with pytest.raises(ValueError, match="multiple of width"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method="beam", num_particles=6)
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method="particle_gibbs", num_particles=1)


def test_it_runs_inside_a_running_loop():
    async def notebook():
        return kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=4)

    assert asyncio.run(notebook()).status == "complete"


def test_cancelling_ends_the_requests():
    generator = ChainTexts(delays=dict.fromkeys(LETTERS, 10**9))

    async def body():
        task = asyncio.create_task(infer_async(0, generator, POTENTIAL, "go", num_particles=4))
        while not generator.calls:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    assert generator.num_cancelled == 1


def test_interrupting_returns_what_there_is():
    generator = ChainTexts(end="")

    def interrupt(event):
        if event.num_steps == 2:
            generator.delays = dict.fromkeys(LETTERS, 10**9)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threads = set(threading.enumerate())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    try:
        with pytest.warns(errors.SamplingWarning, match="interrupted"):
            result = kernels.infer(0, generator, POTENTIAL, "go", num_particles=4, on_event=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == "interrupted"
    assert result.num_steps.tolist() == [2]
    assert not [thread for thread in threading.enumerate() if "infer" in thread.name and thread not in threads]


class Interrupted(ChainTexts):
    """After two steps its requests last for ever, and somebody interrupts."""

    def __init__(self, interrupt):
        super().__init__(end="")
        self.interrupt = interrupt

    def on_event(self, event):
        if event.num_steps == 2:
            self.delays = dict.fromkeys(LETTERS, 10**9)
            self.interrupt()


def interrupt_main():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("runs_in", ["a notebook", "asyncio.run"])
def test_interrupting_inside_a_running_loop(runs_in):
    """Notebooks raise KeyboardInterrupt in the cell; asyncio.run cancels its task, which waits and does not see it."""
    generator = Interrupted(interrupt_main)
    found = []

    async def cell():
        with pytest.warns(errors.SamplingWarning, match="interrupted"):
            found.append(kernels.infer(0, generator, POTENTIAL, "go", num_particles=4, on_event=generator.on_event))
        await asyncio.sleep(0)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if runs_in == "a notebook":
            loop = asyncio.new_event_loop()
            loop.run_until_complete(cell())
            loop.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert found[0].status == "interrupted"
    assert found[0].num_steps.tolist() == [2]
    assert generator.num_cancelled > 0


def test_speculation_counts_what_it_wastes():
    generator = ChainTexts()
    result = kernels.infer(0, generator, POTENTIAL, "go", num_particles=32, method=RESAMPLE, barrier="speculative")
    asked = sum(num for _, num in generator.calls)
    assert result.num_tokens.sum() < result.tokens.generated <= asked
    assert result.tokens.wasted >= result.tokens.generated - result.num_tokens.sum()


def test_what_is_cancelled_is_counted_in_requests():
    """What it cost is not known: there is no reply."""
    generator = ChainTexts(delays={"a": 9})
    result = kernels.infer(0, generator, POTENTIAL, "go", num_particles=32, method=RESAMPLE, barrier="speculative")
    # some are cancelled before they are sent
    assert result.num_cancelled >= generator.num_cancelled > 0
    assert result.tokens.generated <= sum(num for _, num in generator.calls) - generator.num_cancelled
    assert Inference.from_json(result.to_json()).num_cancelled == result.num_cancelled
    assert result.to_datatree()["answers"].attrs["num_cancelled"] == result.num_cancelled
    assert kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=32, method=RESAMPLE).num_cancelled == 0


def test_events_have_the_run_so_far():
    events = []
    kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=4, on_event=lambda e: events.append((e, e.partial())))
    assert [event.num_steps for event, _ in events] == list(range(1, LENGTH + 1))
    assert [int(result.num_steps[0]) for _, result in events] == list(range(1, LENGTH + 1))
    assert next_letter("", np.random.default_rng(0)) in LETTERS
