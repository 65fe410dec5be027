"""The driver on the host: its law against enumeration."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chain_texts import (
    CHAIN,
    POTENTIAL,
    ChainTexts,
    estimates,
    p_value_of_means,
)

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import (
    Islands,
    Potential,
    Resample,
    TextStep,
    infer_async,
)

RESAMPLE = Resample(1.0, scheme="multinomial")


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
    rows, truth = estimates(run_many(60, method=method, barrier=barrier, num_particles=8))
    assert p_value_of_means(rows, truth) > FALSE_ALARM
    # the test has power: an evidence that is twice too large is seen
    assert p_value_of_means(rows * 2.0, truth) < FALSE_ALARM


def test_speculation_that_copies_its_step_for_everyone_would_be_seen():
    # the extra copies of a chosen particle draw steps of their own
    generator = ChainTexts()
    asyncio.run(infer_async(0, generator, POTENTIAL, "go", method=RESAMPLE, num_particles=16, barrier="speculative"))
    assert any(num > 1 for _, num in generator.calls)
    assert sum(num for text, num in generator.calls if text == "") == 16


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

    potential = Potential(of_state, kind="step")
    jitted = [kernels.infer(s, CHAIN, potential, method=RESAMPLE, num_particles=4) for s in range(60)]
    rows, truth = estimates(jitted)
    assert p_value_of_means(rows, truth) > FALSE_ALARM
    host = [
        kernels.infer(s, CHAIN, potential, method=RESAMPLE, num_particles=4, barrier="barrier") for s in range(100, 140)
    ]
    assert p_value_of_means(estimates(host)[0], truth) > FALSE_ALARM
