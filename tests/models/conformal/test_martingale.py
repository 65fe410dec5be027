"""Martingales against exchangeability: fair without a change, rich after one, and wrong bets are found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models.conformal import ExchangeabilityMartingale, exchangeability_test
from bayesinf.models.conformal.martingale import POWERS

BETS = ["jumper", "power"]


def follow(bet, num_runs, length, change=0.0, levels=None):
    """p-values and log martingales of independent series of scores, whose second half is shifted."""

    def run(key):
        key_scores, key_ties = jax.random.split(key)
        scores = jax.random.normal(key_scores, (length,)) + change * (jnp.arange(length) >= length // 2)
        scores = scores if levels is None else jnp.round(levels * scores)
        found = exchangeability_test(key_ties, scores, bet=bet)
        return found.p_values, found.log_martingale

    runs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num_runs))
    return tuple(np.asarray(leaf, float) for leaf in runs)


@pytest.mark.parametrize("levels", [None, 1.0])
def test_p_values_are_independent_and_uniform(levels):
    p, _ = follow("jumper", 5_000, 40, levels=levels)
    for n in (0, 1, 5, 39):
        assert scipy.stats.kstest(p[:, n], "uniform").pvalue > FALSE_ALARM
    for i, j in ((0, 1), (38, 39), (3, 30)):
        assert scipy.stats.spearmanr(p[:, i], p[:, j]).pvalue > FALSE_ALARM


@pytest.mark.parametrize("bet", BETS)
def test_alarms_are_as_rare_as_promised(bet):
    _, log_martingale = follow(bet, 5_000, 150)
    largest = np.exp(log_martingale.max(axis=1))
    for c in (1.5, 3.0, 10.0, 30.0):
        num_alarms = int(np.sum(largest >= c))
        assert scipy.stats.binomtest(num_alarms, 5_000, 1 / c, alternative="greater").pvalue > FALSE_ALARM
    if bet == "jumper":  # the wealth of power bets has no variance
        assert mean_p_value(np.exp(log_martingale[:, [4, 20]]), 1.0) > FALSE_ALARM


def test_power_bets_are_densities_of_beta_laws():
    martingale = ExchangeabilityMartingale("power")
    wealths = martingale.init(1).log_wealths
    for p in (1e-6, 0.1, 0.5, 1.0):
        bets = martingale._bet(wealths, jnp.asarray(p)) - wealths
        np.testing.assert_allclose(bets, scipy.stats.beta(POWERS, 1.0).logpdf(p), rtol=1e-4, atol=1e-4)


def test_a_jumper_bets_a_density():
    """One more bet has expectation one, by quadrature that is exact for polynomials, whatever the wealths were."""
    martingale = ExchangeabilityMartingale("jumper", 0.3)
    log_wealths = jnp.array([-2.0, 0.3, 1.0])
    nodes, shares = np.polynomial.legendre.leggauss(4)
    bets = jax.vmap(lambda p: martingale._bet(log_wealths, p))(jnp.asarray(0.5 * (nodes + 1)))
    expected = np.sum(0.5 * shares[:, None] * np.exp(bets), axis=0)
    jumped = 0.7 * np.exp(log_wealths) + 0.1 * np.exp(log_wealths).sum()
    np.testing.assert_allclose(expected, jumped, rtol=1e-5)
    assert expected.sum() == pytest.approx(float(np.exp(log_wealths).sum()), rel=1e-5)


@pytest.mark.parametrize("bet", BETS)
def test_a_change_is_found_soon_after(bet):
    _, log_martingale = follow(bet, 200, 400, change=1.5)
    is_alarm = log_martingale >= np.log(100.0)
    assert np.mean(is_alarm.any(axis=1)) > 0.95
    first = is_alarm.argmax(axis=1)[is_alarm.any(axis=1)]
    assert np.mean(first >= 200) > 0.95
    assert np.median(first) < 300


def test_p_values_without_random_ties_are_found_out():
    """Ties that count in full against the score make p-values too large, and the jumper rich where nothing changed."""
    scores = np.round(np.random.default_rng(0).normal(size=(200, 300)))
    careless = np.stack([np.mean(scores[:, : n + 1] >= scores[:, n : n + 1], axis=1) for n in range(300)], axis=1)
    martingale = ExchangeabilityMartingale()

    def follow_p(p):
        def step(log_wealths, p):
            log_wealths = martingale._bet(log_wealths, p)
            return log_wealths, jax.scipy.special.logsumexp(log_wealths)

        return jax.lax.scan(step, martingale.init(1).log_wealths, p)[1]

    largest = np.exp(np.asarray(jax.jit(jax.vmap(follow_p))(jnp.asarray(careless)), float)).max(axis=1)
    assert scipy.stats.binomtest(int(np.sum(largest >= 10)), 200, 0.1, alternative="greater").pvalue < FALSE_ALARM
    right = follow("jumper", 200, 300, levels=1.0)[1]
    num_alarms = int(np.sum(np.exp(right.max(axis=1)) >= 10))
    assert scipy.stats.binomtest(num_alarms, 200, 0.1, alternative="greater").pvalue > FALSE_ALARM


@pytest.mark.parametrize("bet", BETS)
def test_a_stream_is_the_whole_series_and_stops_where_it_is_full(bet):
    scores = jax.random.normal(jax.random.key(1), (30,))
    found = exchangeability_test(3, scores, bet=bet)
    martingale = ExchangeabilityMartingale(bet)
    step, state = jax.jit(lambda key, state, score: martingale.step(key, state, score)), martingale.init(30)
    for key, score, p, log_m in zip(
        jax.random.split(jax.random.key(3), 30), scores, found.p_values, found.log_martingale, strict=True
    ):
        state = step(key, state, score)
        np.testing.assert_allclose(state.p_value, p, rtol=1e-6)
        np.testing.assert_allclose(state.log_martingale, log_m, rtol=1e-4, atol=1e-5)
    full = step(jax.random.key(9), state, scores[0])
    assert np.isnan(full.p_value)
    np.testing.assert_array_equal(full.log_wealths, state.log_wealths)
    np.testing.assert_array_equal(full.scores, state.scores)
    np.testing.assert_allclose(found.p, np.exp(-max(state.log_max, 0.0)), rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_bad_bets_are_named():
    with pytest.raises(ValueError, match="bet must be one of 'power', 'jumper', got 'all'"):
        exchangeability_test(0, jnp.arange(3.0), bet="all")
    with pytest.raises(ValueError, match=r"jump must lie in \(0, 1\), got 2"):
        ExchangeabilityMartingale(jump=2.0)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ExchangeabilityMartingale().init(0)
