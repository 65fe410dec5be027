"""The particle cascade: its rule by enumeration, and its variance."""

import asyncio

import numpy as np
import pytest
import scipy.stats
from chain_texts import POTENTIAL, ChainTexts, law

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import infer_async
from bayesinf.kernels.inference_scaling.cascade import num_children


class Uniform:
    """A generator whose next number is known."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999, 1.0, 1.5, 2.0, 3.7, 40.2])
@pytest.mark.parametrize(("arrival", "num_before"), [(1, 0), (5, 9), (30, 7)])
def test_weights_of_children_add_up(ratio, arrival, num_before):
    log_mean = 0.7
    log_weight = log_mean + np.log(ratio) if ratio else -np.inf
    # the mean over the uniform number, which is used below a ratio of 1 alone
    total = 0.0
    for u in (np.arange(1000) + 0.5) / 1000:
        num, log_child = num_children(log_weight, log_mean, arrival, num_before, 8, Uniform(u))
        total += num * np.exp(log_child) / 1000
    assert total == pytest.approx(ratio * np.exp(log_mean), abs=1e-3 * np.exp(log_mean))


def test_the_number_of_children_is_held():
    def children(ratio, arrival, num_before):
        return num_children(np.log(ratio), 0.0, arrival, num_before, 8, Uniform(0.5))[0]

    # k = 5: up while at most min(N, 4) have been made, down after
    assert (children(2.4, 5, 4), children(2.4, 5, 5)) == (3, 2)
    # no more than there is room for among N, and one in any case
    assert (children(2.4, 30, 5), children(2.4, 30, 6), children(2.4, 30, 8), children(2.4, 30, 9)) == (3, 2, 1, 1)
    assert children(1.0, 30, 9) == children(1.0 + 1e-12, 1, 0) == children(1.0 - 1e-12, 1, 0) == 1
    assert (children(0.4, 5, 0), children(0.6, 5, 0)) == (0, 1)


def test_weights_of_heavy_tails_do_not_multiply_the_population():
    """By the rule as published these 16 are thousands after twelve steps."""
    rng, size = np.random.default_rng(0), 16
    log_weights = np.zeros(size)
    for _ in range(12):
        log_weights = log_weights + 2.5 * rng.normal(size=len(log_weights))
        born: list[float] = []
        log_sum = -np.inf
        for arrival, log_weight in enumerate(log_weights, 1):
            log_sum = np.logaddexp(log_sum, log_weight)
            num, log_child = num_children(log_weight, log_sum - np.log(arrival), arrival, len(born), size, rng)
            born += [log_child] * num
        assert len(born) <= size + len(log_weights)
        log_weights = np.array(born)
    assert 0 < len(log_weights) <= 4 * size


def test_the_evidence_and_its_variance_are_unbiased():
    # what comes late is what weighs much: the order of arrival may depend on what was written
    async def body():
        made = ChainTexts(delays={"a": 9, "c": 3})
        return [await infer_async(s, made, POTENTIAL, "go", method="cascade", num_particles=6) for s in range(150)]

    results = asyncio.run(body())
    truth = sum(law().values())
    ratio = np.exp([result.log_evidence for result in results]) / truth
    assert scipy.stats.ttest_1samp(ratio, 1.0).pvalue > FALSE_ALARM
    assert scipy.stats.ttest_1samp(2 * ratio, 1.0).pvalue < FALSE_ALARM
    # E[Zhat^2 V] = var(Zhat), paired run by run
    v = np.array([result.log_evidence_variance for result in results])
    assert scipy.stats.ttest_1samp(ratio**2 * v - (ratio - 1.0) ** 2, 0.0).pvalue > FALSE_ALARM
    assert scipy.stats.ttest_1samp(9 * ratio**2 * v - (ratio - 1.0) ** 2, 0.0).pvalue < FALSE_ALARM
    assert {result.status for result in results} == {"complete"}
