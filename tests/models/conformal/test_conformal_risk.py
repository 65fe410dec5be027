"""Control of a risk: its mean over calibrations, its probability over them, and its posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models.conformal import conformal_quantile, hoeffding_bentkus, risk_threshold

pytestmark = pytest.mark.usefixtures("compile_fast")

NUM = 4_000
LAMBDAS = jnp.linspace(0.0, 1.0, 101)


def missed(scores):
    """Of a uniform score the risk at lambda is 1 - lambda."""
    return (scores[:, None] > LAMBDAS) * 1.0


def overshoot(scores):
    """Of a uniform score the risk at lambda is (1 - lambda)^2."""
    return 2 * jnp.maximum(scores[:, None] - LAMBDAS, 0.0)


def thresholds(loss, n, target, **options):
    def one(key):
        scores = jax.random.uniform(key, (n,))
        return risk_threshold(loss(scores), LAMBDAS, target, **options).threshold

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM)), np.float64)


def exceeds(risks, target):
    """The p-value of a mean risk that is at most the target."""
    return scipy.stats.ttest_1samp(risks, target, alternative="greater").pvalue


def test_with_misses_it_is_the_conformal_quantile():
    scores = jax.random.uniform(jax.random.key(1), (40,))
    lambdas = jnp.sort(scores)
    for target in (0.05, 0.1, 0.3, 0.5):
        found = risk_threshold(scores[:, None] > lambdas, lambdas, target)
        assert found.threshold == conformal_quantile(scores, target)
    assert risk_threshold(scores[:, None] > lambdas, lambdas, 0.02).threshold == jnp.inf


def test_that_no_setting_is_safe_has_a_reason():
    losses = jnp.zeros((4, 101))
    reasons = {
        method: risk_threshold(losses, LAMBDAS, 0.1, method=method, key=0).why_infinite()
        for method in ("crc", "ltt", "dirichlet")
    }
    assert reasons["crc"] == "at the most cautious setting the criterion is 0.2, and must be at most 0.1"
    assert reasons["ltt"] == "at the most cautious setting the criterion is 0.656, and must be at most 0.05"  # 0.9^4
    assert reasons["dirichlet"].endswith("and must be at least 0.95")
    assert risk_threshold(losses, LAMBDAS, 0.3).why_infinite() == ""
    assert risk_threshold(2 * losses, LAMBDAS, 0.3, bound=2.0).why_infinite().endswith("0.4, and must be at most 0.3")


def test_the_expected_loss_is_within_the_target():
    assert exceeds(1 - np.minimum(thresholds(missed, 10, 0.2), 1), 0.2) > FALSE_ALARM
    wide = np.minimum(thresholds(overshoot, 10, 0.3, bound=2.0), 1)
    assert exceeds((1 - wide) ** 2, 0.3) > FALSE_ALARM


def test_a_forgotten_test_point_is_found():
    def one(key):
        risk = missed(jax.random.uniform(key, (10,))).mean(0)
        return LAMBDAS[jnp.argmax(risk <= 0.2)]

    found = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), NUM)), np.float64)
    assert exceeds(1 - found, 0.2) < FALSE_ALARM


def test_p_values_are_the_smaller_of_hoeffding_and_bentkus():
    n, target = 73, 0.12
    risk = np.arange(0, 30) / n
    a = np.minimum(risk, target)
    entropy = scipy.special.xlogy(a, a / target) + (1 - a) * np.log((1 - a) / (1 - target))
    bentkus = np.e * scipy.stats.binom.cdf(np.arange(30), n, target)
    truth = np.minimum(np.minimum(np.exp(-n * entropy), bentkus), 1)
    np.testing.assert_allclose(hoeffding_bentkus(jnp.asarray(risk), n, target), truth, rtol=1e-4)
    assert float(hoeffding_bentkus(jnp.array(1.0), n, target)) == 1.0


@pytest.mark.parametrize("correction", ["sequence", "bonferroni"])
def test_tested_thresholds_are_safe_with_their_level(correction):
    for loss, risk, bound in ((missed, lambda q: 1 - q, 1.0), (overshoot, lambda q: (1 - q) ** 2, 2.0)):
        found = np.minimum(thresholds(loss, 100, 0.2, method="ltt", level=0.9, bound=bound, correction=correction), 1)
        is_unsafe = risk(found) > 0.2 + 1e-6
        assert scipy.stats.binomtest(int(is_unsafe.sum()), NUM, 0.1, alternative="greater").pvalue > FALSE_ALARM
    on_average = np.minimum(thresholds(missed, 100, 0.2), 1)
    is_unsafe = 1 - on_average > 0.2 + 1e-6  # whose promise is another one
    assert scipy.stats.binomtest(int(is_unsafe.sum()), NUM, 0.1, alternative="greater").pvalue < FALSE_ALARM


def test_tested_thresholds_spend_the_level_once_or_share_it():
    risk = missed(jax.random.uniform(jax.random.key(4), (100,))).mean(0)
    p = np.asarray(hoeffding_bentkus(risk, 100, 0.2))
    losses = (jnp.arange(100)[:, None] < jnp.round(100 * risk)) * 1.0
    for level in (0.5, 0.8, 0.9, 0.99):
        for correction, spent in (("sequence", 1 - level), ("bonferroni", (1 - level) / len(LAMBDAS))):
            found = risk_threshold(losses, LAMBDAS, 0.2, method="ltt", level=level, correction=correction)
            assert int(found.index) == np.flatnonzero(p > spent)[-1] + 1


def test_the_posterior_of_misses_is_that_of_clopper_and_pearson():
    """sum of k of n + 1 Dirichlet weights, and the one of the bound: Beta(k + 1, n - k)."""
    n, target, num_draws = 20, 0.25, 20_000
    losses = jnp.asarray((np.arange(n)[:, None] >= np.arange(n)) * 1.0)[:, 2::2]
    k = np.asarray(losses.sum(0))
    found = risk_threshold(
        losses, jnp.arange(9.0), target, method="dirichlet", level=0.9, key=0, num_draws=num_draws
    ).criterion
    p_values = {}
    for shift in (0, 1):  # the second forgets the bound
        truth = scipy.stats.beta.cdf(target, np.maximum(k + 1 - shift, 1e-9), n - k + shift)
        hits = np.round(np.asarray(found, np.float64) * num_draws).astype(int)
        p_values[shift] = min(
            scipy.stats.binomtest(int(h), num_draws, float(p)).pvalue for h, p in zip(hits, truth, strict=True)
        )
    assert p_values[0] > FALSE_ALARM > p_values[1]


def test_dirichlet_thresholds_are_safe_with_their_level():
    def one(key):
        key_score, key_draw = jax.random.split(key)
        losses = missed(jax.random.uniform(key_score, (50,)))
        return risk_threshold(
            losses, LAMBDAS, 0.2, method="dirichlet", level=0.9, key=key_draw, num_draws=400
        ).threshold

    found = np.minimum(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 1_000)), 1)
    is_unsafe = 1 - found > 0.2 + 1e-6
    assert scipy.stats.binomtest(int(is_unsafe.sum()), 1_000, 0.1, alternative="greater").pvalue > FALSE_ALARM


def test_what_lies_beyond_a_failure_is_not_reached():
    losses = jnp.array([[0.9, 0.0, 0.9, 0.0]] * 200)
    lambdas = jnp.arange(4.0)
    assert float(risk_threshold(losses, lambdas, 0.1).threshold) == 3.0
    assert float(risk_threshold(losses, lambdas, 0.1, method="ltt").threshold) == 3.0
    assert float(risk_threshold(losses, lambdas, 0.1, method="ltt", correction="bonferroni").threshold) == 1.0
    none = risk_threshold(losses[:, :1], lambdas[:1], 0.1)
    assert (float(none.threshold), int(none.index)) == (np.inf, 1)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    losses, lambdas = jnp.zeros((5, 3)), jnp.arange(3.0)
    with pytest.raises(ValueError, match=r"losses must have shape \(n, L\)"):
        risk_threshold(losses, jnp.arange(2.0), 0.1)
    with pytest.raises(ValueError, match="lambdas must ascend"):
        risk_threshold(losses, -lambdas, 0.1)
    with pytest.raises(ValueError, match=r"losses must lie in \[0, bound\]"):
        risk_threshold(losses + 2, lambdas, 0.1)
    with pytest.raises(ValueError, match="method must be one of"):
        risk_threshold(losses, lambdas, 0.1, method="rcps")
    with pytest.raises(ValueError, match="needs a key"):
        risk_threshold(losses, lambdas, 0.1, method="dirichlet")
    with pytest.raises(ValueError, match="target must be finite and positive"):
        risk_threshold(losses, lambdas, 0.0)
