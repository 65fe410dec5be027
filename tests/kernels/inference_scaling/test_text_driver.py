"""The driver on the host: its law against enumeration, what it saves, what fails, and what it is told."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chain_texts import (
    CHAIN,
    END,
    LENGTH,
    POTENTIAL,
    ChainTexts,
    estimates,
    law,
    p_value_of_means,
    score,
)

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import (
    Gibbs,
    Islands,
    ParallelTempering,
    Potential,
    Resample,
    TextStep,
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
