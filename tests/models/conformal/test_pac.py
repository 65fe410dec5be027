"""PAC thresholds: the published counts, and the law of the error over calibration sets, which is a beta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal

CASES = ((100, 0.1, 0.05, 4), (500, 0.1, 0.05, 38), (1000, 0.1, 0.01, 78), (1000, 0.2, 0.05, 178))


@pytest.mark.parametrize(("n", "eps", "delta", "k"), CASES)
def test_the_published_counts_are_the_largest_allowed(n, eps, delta, k):
    assert conformal.pac_count(n, eps, delta) == k
    # the error above s_(n - k) is Beta(k + 1, n - k)
    assert scipy.stats.beta(k + 1, n - k).sf(eps) <= delta < scipy.stats.beta(k + 2, n - k - 1).sf(eps)


@pytest.mark.parametrize(("n", "eps", "delta", "k"), CASES[:2])
def test_the_error_is_too_high_as_rarely_as_promised(n, eps, delta, k):
    scores = np.random.default_rng(0).uniform(size=(5_000, n))
    thresholds = jax.jit(jax.vmap(lambda cal: conformal.pac_threshold(cal, eps, delta).threshold))(jnp.asarray(scores))
    errors = 1 - np.asarray(thresholds, float)
    assert scipy.stats.kstest(errors, scipy.stats.beta(k + 1, n - k).cdf).pvalue > FALSE_ALARM
    num_failed = int(np.sum(errors > eps))
    assert scipy.stats.binomtest(num_failed, len(errors), delta, alternative="greater").pvalue > FALSE_ALARM
    # a split conformal threshold holds on average alone
    on_average = 1 - np.sort(scores)[:, int(np.ceil((n + 1) * (1 - eps))) - 1]
    num_failed = int(np.sum(on_average > eps))
    assert scipy.stats.binomtest(num_failed, len(errors), delta, alternative="greater").pvalue < FALSE_ALARM


def test_ties_count_for_the_set():
    scores = jnp.asarray(np.random.default_rng(1).integers(0, 5, size=200).astype(float))
    found = conformal.pac_threshold(scores, 0.1, 0.05)
    assert np.sum(scores > found.threshold) <= conformal.pac_count(200, 0.1, 0.05) < np.sum(scores >= found.threshold)


def test_too_few_scores_give_an_infinite_threshold():
    """With n = 28 scores even the largest has an error above 0.1 with probability 0.9^28 > 0.05."""
    assert conformal.pac_threshold(jnp.arange(28.0), 0.1, 0.05).threshold == jnp.inf
    assert conformal.pac_threshold(jnp.arange(29.0), 0.1, 0.05).threshold == 28.0
    assert "with probability >= 1 - delta" in str(conformal.pac_threshold(jnp.arange(28.0), 0.1, 0.05).guarantee)


@pytest.mark.parametrize(("eps", "delta"), [(0.1, 0.05), (0.5, 0.25), (0.2, 0.01), (0.9, 0.5), (0.5, 0.125)])
def test_the_number_that_is_needed_is_the_least_with_a_finite_threshold(eps, delta):
    needed = int(conformal.pac_threshold(jnp.zeros(1), eps, delta).num_needed)
    for n in range(1, needed + 3):
        found = conformal.pac_threshold(jnp.arange(float(n)), eps, delta)
        assert (found.why_infinite() == "") == bool(jnp.isfinite(found.threshold)) == (n >= needed)
    assert conformal.pac_threshold(jnp.full(99, jnp.inf), eps, delta).why_infinite().endswith("is infinite itself")


@pytest.mark.usefixtures("unchecked")
def test_bad_levels_are_named():
    with pytest.raises(ValueError, match=r"eps must lie in \(0, 1\), got 0"):
        conformal.pac_threshold(jnp.arange(28.0), 0, 0.05)
    with pytest.raises(ValueError, match=r"delta must lie in \(0, 1\), got 1"):
        conformal.pac_count(10, 0.1, 1)
