"""The driver on the host: its law against enumeration, what it saves, what fails, and what it is told."""

import asyncio
import dataclasses
import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chain_texts import (
    CHAIN,
    END,
    LENGTH,
    LETTERS,
    POTENTIAL,
    ChainTexts,
    HalfFails,
    estimates,
    law,
    next_letter,
    p_value_of_means,
    score,
)

from bayesinf import errors, kernels
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import (
    Beam,
    Gibbs,
    Inference,
    Islands,
    ParallelTempering,
    Potential,
    Resample,
    TextStep,
    as_text_generator,
    infer_async,
)
from bayesinf.kernels.inference_scaling.run_requests import RunRequests
from bayesinf.kernels.inference_scaling.text_methods import _draw_reference
from bayesinf.kernels.inference_scaling.text_sweep import TextSweep

RESAMPLE = Resample(1.0, scheme="multinomial")
EXCLUDED = {"wall_time"}


def run_many(num, generator=None, **options):
    async def body():
        made = generator or ChainTexts(delays={"a": 5, "c": 2})
        return [await infer_async(seed, made, POTENTIAL, "go", **options) for seed in range(num)]

    return asyncio.run(body())


def is_same(one, other):
    first, second = json.loads(one.to_json()), json.loads(other.to_json())
    return all(first[name] == second[name] or name in EXCLUDED for name in first)


@pytest.mark.parametrize(
    ("method", "barrier"),
    [
        (RESAMPLE, "barrier"),
        (Resample(0.7), "speculative"),
        ("particle_filter", "cascade"),
        (Islands(RESAMPLE, num_islands=2), "barrier"),
    ],
)
def test_evidence_and_posterior_are_unbiased(method, barrier):
    rows, truth = estimates(run_many(120, method=method, barrier=barrier, num_particles=8))
    assert p_value_of_means(rows, truth) > FALSE_ALARM
    # the test has power: an evidence that is twice too large is seen
    assert p_value_of_means(rows * 2.0, truth) < FALSE_ALARM


def test_speculation_that_copies_its_step_for_everyone_would_be_seen():
    # the extra copies of a chosen particle draw steps of their own
    generator = ChainTexts()
    asyncio.run(infer_async(0, generator, POTENTIAL, "go", method=RESAMPLE, num_particles=16, barrier="speculative"))
    assert any(num > 1 for _, num in generator.calls)
    assert sum(num for text, num in generator.calls if text == "") == 16


def test_a_conditional_sweep_leaves_the_posterior_invariant():
    weights = law()
    answers, probs = list(weights), np.array(list(weights.values())) / sum(weights.values())
    rng = np.random.default_rng(3)
    counts = dict.fromkeys(answers, 0)

    async def sweep_once(seed):
        text = answers[rng.choice(len(answers), p=probs)]
        reference = tuple(TextStep(c, 1, is_done=c == END or t == LENGTH - 1) for t, c in enumerate(text))
        requests = RunRequests(ChainTexts(), POTENTIAL, "go")
        key_run, key_draw = jax.random.split(jax.random.key(seed))
        sweep = TextSweep(
            key_run, requests, POTENTIAL, Gibbs(ess_threshold=1.0).selection, 2, 10**6, reference=reference
        )
        await sweep.run()
        drawn, log_g = _draw_reference(key_draw, sweep, POTENTIAL)
        _, log_cube = _draw_reference(key_draw, sweep, POTENTIAL**3.0)
        assert abs(log_cube - 3.0 * log_g) < 1e-4
        after = "".join(step.text for step in drawn)
        expected = sum(np.log(score("", [after[: t + 1]])[0]) for t in range(len(after)))
        assert abs(log_g - expected) < 1e-4
        counts[after] += 1

    async def body():
        for seed in range(400):
            await sweep_once(seed)

    asyncio.run(body())
    often = probs * 400 >= 5
    seen = np.array(list(counts.values()))
    observed = np.append(seen[often], seen[~often].sum())
    expected = 400 * np.append(probs[often], probs[~often].sum())
    assert scipy.stats.chisquare(observed, expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("method", [Gibbs(6), ParallelTempering((1.0, 0.5), num_sweeps=6)])
def test_chains_find_the_posterior(method):
    # the sweeps of one run depend on each other: the mean over runs is tested, with the burn-in that is left a share
    results = run_many(12, method=method, num_particles=16)
    weights = law()
    mode = max(weights, key=weights.get)
    of_mode = np.array([result.posterior.get(mode, 0.0) for result in results])
    truth = weights[mode] / sum(weights.values())
    # self-normalised: a bias of 1/N at most is allowed for beside the noise
    assert abs(of_mode.mean() - truth) < 5 * of_mode.std(ddof=1) / np.sqrt(12) + truth / 16
    assert results[0].ess.shape[0] == 5


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


def test_the_finished_are_not_weighed_again():
    # two answers of the same prior and reward, of 1 and of 4 steps
    class TwoLengths(ChainTexts):
        async def step(self, prompt, prefix, num_samples, seed):
            rng = np.random.default_rng(seed)
            text = self.text(prefix)
            letters = ["b" if text else "ab"[rng.integers(2)] for _ in range(num_samples)]
            return [TextStep(letter, 1, is_done=letter == "a") for letter in letters]

    value = Potential(lambda prompt, texts: [0.9] * len(texts), kind="value")
    result = kernels.infer(0, TwoLengths(), value, "go", num_particles=400, method=Resample(1.0))
    assert scipy.stats.binomtest(round(400 * result.posterior["a"]), 400, 0.5).pvalue > FALSE_ALARM


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

    kernels.infer(0, ChainTexts(), Potential(slow_score), "go", num_particles=32)
    assert len(seen) == len(set(seen))
    seen.clear()
    kernels.infer(0, ChainTexts(), Potential(slow_score), "go", num_particles=32, barrier="cascade")
    assert len(seen) == len(set(seen))


def test_a_scorer_of_whole_answers_sees_one_step():
    class Paragraphs(ChainTexts):
        async def step(self, prompt, prefix, num_samples, seed):
            return [TextStep("a line\n\n", 2)] * num_samples

    seen = []
    whole = Potential(lambda prompt, texts: seen.extend(texts) or [0.5] * len(texts), "odds", "model")
    kernels.infer(0, Paragraphs(), whole, "go", num_particles=2)
    assert seen[1] == "a line\na line"


@pytest.mark.parametrize("barrier", ["barrier", "speculative"])
@pytest.mark.parametrize("method", [RESAMPLE, Gibbs(3), Islands(RESAMPLE, 2), ParallelTempering(num_sweeps=2)])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path, method, barrier):
    options = {"method": method, "num_particles": 6, "barrier": barrier}
    whole = kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options)
    path = tmp_path / "run.json"
    count = []

    def stop(event):
        count.append(event)
        if len(count) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options, save=path, on_event=stop)
    generator = ChainTexts(end="")
    rest = kernels.infer(5, generator, POTENTIAL, "go", **options, resume=path)
    # what was drawn before the stop is not drawn again, and is counted; not what was under way for nobody yet
    if barrier == "barrier":
        assert rest.tokens == whole.tokens
        assert rest.num_calls == whole.num_calls
    again = dataclasses.replace(rest, tokens=whole.tokens, num_calls=whole.num_calls)
    assert is_same(again, whole)
    assert sum(num for _, num in generator.calls) < whole.tokens.generated
    with pytest.raises(errors.CheckpointError, match="another key"):
        kernels.infer(6, ChainTexts(end=""), POTENTIAL, "go", **options, resume=path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        kernels.infer(5, ChainTexts(end=""), POTENTIAL, "go", **options, resume=path)


def test_a_run_in_process_goes_on_from_its_seeds(tmp_path):
    likes_a = Potential(lambda state: jnp.where(state.last == 0, 0.9, 0.2))
    path = tmp_path / "run.json"
    whole = kernels.infer(0, as_text_generator(CHAIN), likes_a, num_particles=6, method=RESAMPLE)

    def stop(event):
        if event.num_steps == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kernels.infer(0, CHAIN, likes_a, num_particles=6, method=RESAMPLE, save=path, on_event=stop)
    rest = kernels.infer(0, CHAIN, likes_a, num_particles=6, method=RESAMPLE, resume=path)
    assert rest.texts == whole.texts
    assert rest.log_evidence == whole.log_evidence


def test_in_process_generators_follow_the_same_law():
    # the driver in process and this one, on one chain: the same means
    def of_state(state):
        at = jnp.maximum(state.num_letters - 2, 0)
        before = jnp.where(state.num_letters > 1, jnp.take_along_axis(state.letters, at[:, None], 1)[:, 0], -1)
        return jnp.array([0.9, 0.2, 0.6])[state.last] * jnp.where(before == state.last, 0.5, 1.0)

    potential = Potential(of_state)
    jitted = [kernels.infer(s, CHAIN, potential, method=RESAMPLE, num_particles=4) for s in range(60)]
    rows, truth = estimates(jitted)
    assert p_value_of_means(rows, truth) > FALSE_ALARM
    host = [
        kernels.infer(s, CHAIN, potential, method=RESAMPLE, num_particles=4, barrier="barrier") for s in range(100, 140)
    ]
    assert p_value_of_means(estimates(host)[0], truth) > FALSE_ALARM


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


def test_an_outage_keeps_what_there_was_and_can_be_resumed(tmp_path):
    path = tmp_path / "run.json"
    down = ChainTexts(fails=lambda text, call: len(text) == 2, end="")
    with pytest.raises(errors.GenerationError, match="the line is dead") as caught:
        kernels.infer(0, down, POTENTIAL, "go", num_particles=2, save=path)
    assert sorted({len(text) for text in caught.value.result.texts}) == [2]
    assert caught.value.result.num_steps.tolist() == [2]
    with pytest.warns(errors.SamplingWarning, match="no step could be had"):
        kernels.infer(0, down, POTENTIAL, "go", num_particles=2, throw=False)
    whole = kernels.infer(0, ChainTexts(end=""), POTENTIAL, "go", num_particles=2)
    assert kernels.infer(0, ChainTexts(end=""), POTENTIAL, "go", num_particles=2, resume=path).texts == whole.texts
    for method in ("cascade", "a_star"):
        with pytest.raises(errors.GenerationError, match="the line is dead"):
            kernels.infer(0, ChainTexts(fails=lambda *_: True), POTENTIAL, "go", num_particles=2, method=method)


@pytest.mark.parametrize("barrier", ["barrier", "speculative", "cascade"])
def test_scores_that_are_none_raise_with_the_run(barrier):
    bad = Potential(lambda prompt, texts: [np.nan if text.endswith("b") else 0.5 for text in texts])
    with pytest.raises(errors.PotentialError, match="NaN or out of the range") as caught:
        kernels.infer(0, ChainTexts(), bad, "go", num_particles=8, barrier=barrier)
    assert caught.value.result.num_invalid > 0
    few = Potential(lambda prompt, texts: [0.5, 0.5, 0.5])
    with pytest.raises(errors.PotentialError, match="gave 3 numbers"):
        kernels.infer(0, ChainTexts(), few, "go", num_particles=8, barrier=barrier)

    def raises(prompt, texts):
        if len(texts[0]) > 1:
            raise ZeroDivisionError("of the scorer")
        return [0.5] * len(texts)

    with pytest.raises(errors.PotentialError, match="ZeroDivisionError: of the scorer") as caught:
        kernels.infer(0, ChainTexts(), Potential(raises), "go", num_particles=8, barrier=barrier)
    assert any(caught.value.result.texts)


def test_all_particles_dead():
    zero = Potential(lambda prompt, texts: [0.0] * len(texts))
    for barrier in ("barrier", "speculative", "cascade"):
        with pytest.raises(errors.DegenerateWeightsError):
            kernels.infer(0, ChainTexts(), zero, "go", num_particles=8, barrier=barrier)


def test_budget():
    for barrier in ("barrier", "speculative", "cascade"):
        with pytest.warns(errors.SamplingWarning, match="budget of 12 tokens"):
            result = kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=8, budget=12, barrier=barrier)
        assert 12 <= result.tokens.generated < 12 + 2 * 8
    with pytest.raises(ValueError, match="budget must allow one step"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=8, budget=7)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompt must be a text that is not empty"):
        kernels.infer(0, ChainTexts(), POTENTIAL, " ")
    with pytest.raises(ValueError, match="barrier must be one of"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", barrier="none")
    with pytest.raises(ValueError, match="not for method='Beam'"):
        kernels.infer(0, ChainTexts(), POTENTIAL, "go", method=Beam(2), barrier="cascade")
    with pytest.raises(ValueError, match="methods with a barrier"):
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


def test_speculation_counts_what_it_wastes():
    generator = ChainTexts()
    result = kernels.infer(0, generator, POTENTIAL, "go", num_particles=32, method=RESAMPLE, barrier="speculative")
    asked = sum(num for _, num in generator.calls)
    # what was cancelled before it came is not known, and not counted
    assert result.num_tokens.sum() < result.tokens.generated <= asked
    assert result.tokens.wasted >= result.tokens.generated - result.num_tokens.sum()


def test_events_have_the_run_so_far():
    events = []
    kernels.infer(0, ChainTexts(), POTENTIAL, "go", num_particles=4, on_event=lambda e: events.append((e, e.partial())))
    assert [event.num_steps for event, _ in events] == list(range(1, LENGTH + 1))
    assert [int(result.num_steps[0]) for _, result in events] == list(range(1, LENGTH + 1))
    assert next_letter("", np.random.default_rng(0)) in LETTERS
