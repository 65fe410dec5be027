"""Particle Gibbs and parallel tempering on the host, against enumeration: sweeps and exchanges from exact draws."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chain_texts import END, LENGTH, POTENTIAL, ChainTexts, law, score

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import Gibbs, ParallelTempering, TextStep, infer_async
from bayesinf.kernels.inference_scaling.run_requests import RunRequests
from bayesinf.kernels.inference_scaling.text_methods import _next_references
from bayesinf.kernels.inference_scaling.text_sweep import TextSweep

SELECTION = Gibbs(ess_threshold=1.0).selection


def log_reward(text):
    return sum(np.log(score("", [text[: t + 1]])[0]) for t in range(len(text)))


def posterior(exponent):
    """The law p G^exponent of answers, and their log G."""
    answers = law()
    log_g = np.array([log_reward(text) for text in answers])
    probs = np.array(list(answers.values())) * np.exp((exponent - 1.0) * log_g)
    return list(answers), probs / probs.sum(), log_g


def as_reference(text):
    return tuple(TextStep(c, 1, is_done=c == END or t == LENGTH - 1) for t, c in enumerate(text))


def moved(num, exponent, betas, parity):
    """Answers of all chains after a sweep and an exchange, from exact draws of each chain's law, shape (num, m)."""
    target = POTENTIAL**exponent
    powers = [target] if betas is None else [target**beta for beta in betas]
    exact = [posterior(exponent * beta)[:2] for beta in ([1.0] if betas is None else betas)]
    rng = np.random.default_rng(3)
    rows = []

    async def body():
        for seed in range(num):
            key_run, key_draw, key_swap = jax.random.split(jax.random.key(seed), 3)
            requests = RunRequests(ChainTexts(), target, "go")
            sweeps = [
                TextSweep(key, requests, power, SELECTION, 2, 10**6, reference=as_reference(rng.choice(texts, p=probs)))
                for key, power, (texts, probs) in zip(
                    jax.random.split(key_run, len(powers)), powers, exact, strict=True
                )
            ]
            for sweep in sweeps:
                await sweep.run()
            exchanged = None if betas is None else jnp.array(betas)
            found = _next_references(key_draw, key_swap, sweeps, target, exchanged, parity)
            rows.append(["".join(step.text for step in prefix) for prefix in found])

    asyncio.run(body())
    return np.array(rows)


def p_value(texts, exponent):
    """That these are draws of p G^exponent: the counts of answers, and the mean of log G."""
    answers, probs, log_g = posterior(exponent)
    num = len(texts)
    seen = np.array([np.sum(texts == answer) for answer in answers])
    often = probs * num >= 5
    observed = np.append(seen[often], seen[~often].sum())
    expected = num * np.append(probs[often], probs[~often].sum())
    of_mean = scipy.stats.ttest_1samp([log_reward(text) for text in texts], probs @ log_g).pvalue
    return 2 * min(scipy.stats.chisquare(observed, expected).pvalue, of_mean)


def test_a_conditional_sweep_leaves_the_posterior_invariant():
    assert p_value(moved(200, 1.0, None, 0)[:, 0], 1.0) > FALSE_ALARM


def test_exchanges_leave_every_chain_as_it_is():
    # exponents of the potential's own count in an exchange, too
    exponent, betas = 3.0, (1.0, 0.4, 0.0)
    answers = moved(200, exponent, betas, 1)
    assert min(p_value(answers[:, m], exponent * beta) for m, beta in enumerate(betas)) * 3 > FALSE_ALARM


@pytest.mark.parametrize(
    ("method", "exponent"),
    [(Gibbs(6, burn_in=2), 1.0), (ParallelTempering(num_sweeps=6, burn_in=2), 3.0)],
    ids=["Gibbs", "tempering"],
)
def test_chains_find_the_posterior(method, exponent):
    num = 24

    async def body():
        made = ChainTexts(delays={"a": 5, "c": 2})
        target = POTENTIAL**exponent
        return [await infer_async(s, made, target, "go", method=method, num_particles=16) for s in range(num)]

    # the sweeps of one run depend on each other: the mean over runs is tested. All particles of a stationary sweep,
    # by their weights, have the posterior as their mean; of what the first sweep is off by, the burn-in leaves little
    results = asyncio.run(body())
    answers = list(law())

    def p_value_of(power):
        _, probs, log_g = posterior(power)
        means = np.array([[result.posterior.get(answer, 0.0) for answer in answers] for result in results])
        mode = np.argmax(probs)
        columns = [(means[:, mode], probs[mode]), (means @ log_g, probs @ log_g)]
        return len(columns) * min(scipy.stats.ttest_1samp(column, truth).pvalue for column, truth in columns)

    assert p_value_of(exponent) > FALSE_ALARM
    # the test has power: the law of another temperature is told from it
    assert p_value_of(exponent / 2) < FALSE_ALARM
    assert results[0].ess.shape[0] == method.num_sweeps - method.burn_in
