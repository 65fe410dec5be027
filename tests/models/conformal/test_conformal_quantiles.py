"""Thresholds and p-values: exact ranks, the law of the coverage given the calibration, ties, groups, weights."""

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models.conformal import conformal_quantile, conformal_rank, p_value

pytestmark = pytest.mark.usefixtures("compile_fast")

ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95)
NUM = 10_000


def exact_rank(n, alpha):
    return n + 1 - math.floor((n + 1) * Fraction(str(alpha)))


def distance_from(law, samples):
    return scipy.stats.kstest(np.asarray(samples, np.float64), law).pvalue


@pytest.mark.parametrize("dtype", [float, np.float32])
def test_ranks_are_those_of_the_decimal_level(dtype):
    for alpha in ALPHAS:
        found = conformal_rank(np.arange(2_000), dtype(alpha))
        assert found.tolist() == [exact_rank(n, alpha) for n in range(2_000)]


def test_naive_ranks_are_off():
    n = np.arange(2_000, dtype=np.float32)
    naive = [np.ceil((n + 1) * (1 - np.float32(alpha))).tolist() for alpha in ALPHAS]
    assert naive != [[exact_rank(k, alpha) for k in range(2_000)] for alpha in ALPHAS]


def test_ranks_of_more_scores_than_float32_can_count():
    """Where torch.quantile and float32 both give up."""
    for n in (2**24, 2**24 + 1, 2**24 + 3, 10**9 - 1):
        for alpha in ALPHAS:
            assert int(conformal_rank(n, alpha)) == exact_rank(n, alpha)


def test_any_level_is_a_level():
    scores = jnp.array([3.0, 1.0, 2.0])
    found = conformal_quantile(scores, jnp.array([-0.5, 0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0, 7.0, jnp.nan]))
    np.testing.assert_array_equal(found, [np.inf, np.inf, np.inf, 3, 2, 1, 1, -np.inf, -np.inf, np.inf])


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_too_few_scores_make_it_infinite(alpha):
    least = math.ceil(1 / Fraction(str(alpha)) - 1)
    for n in (0, least - 1, least):
        q = conformal_quantile(jnp.arange(1.0 * n), alpha)
        assert bool(jnp.isinf(q)) == (n + 1 < 1 / Fraction(str(alpha)))


def quantiles_of_uniforms(n, alpha, **options):
    scores = jax.random.uniform(jax.random.key(0), (NUM, n))
    return conformal_quantile(scores, alpha, **options)


@pytest.mark.parametrize(("n", "alpha"), [(20, 0.1), (99, 0.1), (10, 0.5)])
def test_coverage_given_the_calibration_is_beta(n, alpha):
    """Of a uniform score it is the threshold itself."""
    k = exact_rank(n, alpha)
    law = scipy.stats.beta(k, n + 1 - k)
    assert distance_from(law.cdf, quantiles_of_uniforms(n, alpha)) > FALSE_ALARM
    weighted = quantiles_of_uniforms(n, alpha, weights=jnp.full((NUM, n), 0.1), test_weight=0.1)
    assert distance_from(law.cdf, weighted) > FALSE_ALARM


def test_a_forgotten_test_point_is_found():
    n, alpha = 20, 0.1
    law = scipy.stats.beta(19, 2)
    scores = jnp.sort(jax.random.uniform(jax.random.key(0), (NUM, n)))
    assert distance_from(law.cdf, scores[:, math.ceil(n * (1 - alpha)) - 1]) < FALSE_ALARM
    no_mass_at_infinity = quantiles_of_uniforms(n, alpha, weights=jnp.ones((NUM, n)), test_weight=0.0)
    assert distance_from(law.cdf, no_mass_at_infinity) < FALSE_ALARM


def test_missing_scores_are_left_out():
    scores = jnp.array([5.0, jnp.nan, 1.0, 3.0, jnp.nan])
    weights = jnp.array([1.0, 7.0, 2.0, 1.0, 9.0])
    for alpha in (0.2, 0.3, 0.6):
        kept = ~jnp.isnan(scores)
        assert conformal_quantile(scores, alpha, missing="drop") == conformal_quantile(scores[kept], alpha)
        found = conformal_quantile(scores, alpha, weights=weights, missing="drop")
        assert found == conformal_quantile(scores[kept], alpha, weights=weights[kept])
    found = p_value(scores, jnp.array([2.0, jnp.nan]), missing="drop")
    np.testing.assert_array_equal(found, np.array([0.75, np.nan], np.float32))
    # nobody can look into what is traced
    assert jax.jit(conformal_quantile)(scores, 0.3) == conformal_quantile(scores, 0.3, missing="drop")


def test_weighted_thresholds_and_p_values_by_their_definition():
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 30):
        scores, weights = rng.integers(0, 6, n) * 1.0, rng.integers(0, 5, n) * 1.0
        tests, own = rng.integers(-1, 7, 20) * 1.0, rng.integers(0, 9, 20) * 1.0
        for alpha in (0.1, 0.25, 0.5):
            found = conformal_quantile(jnp.asarray(scores), alpha, weights=weights, test_weight=own)
            for q, w in zip(found, own, strict=True):
                room = Fraction(str(alpha)) * int(weights.sum() + w)
                fits = [s for s in np.unique(scores) if int(weights[scores > s].sum() + w) <= room]
                if weights.sum() + w == 0 or not fits:
                    assert q == np.inf
                elif int(weights.sum() + w) <= room:
                    assert q == -np.inf
                else:
                    assert q == min(s for s in fits if weights[scores == s].sum() > 0)
        p = p_value(jnp.asarray(scores), tests, weights=weights, test_weight=own)
        total = weights.sum() + own
        mass = (weights * (scores >= tests[:, None])).sum(1) + own
        np.testing.assert_allclose(p, np.where(total > 0, mass / np.where(total > 0, total, 1), 1), rtol=1e-6)


def test_p_values_and_thresholds_agree():
    rng = np.random.default_rng(2)
    scores, tests = jnp.asarray(rng.integers(0, 9, 39) * 1.0), jnp.asarray(rng.integers(-1, 10, 50) * 1.0)
    for alpha in (0.025, 0.05, 0.1, 0.3, 0.975):
        np.testing.assert_array_equal(p_value(scores, tests) > alpha, tests <= conformal_quantile(scores, alpha))


@partial(jax.jit, static_argnames=("smooth", "grouped"))
def tied_p_values(keys, smooth, grouped):
    """Of scores that take few values, in two groups of different law."""

    def one(key):
        key_score, key_group, key_p = jax.random.split(key, 3)
        groups = jax.random.bernoulli(key_group, 0.4, (16,)).astype(int)
        scores = jax.random.randint(key_score, (16,), 0, 4) + 2.0 * groups
        options = {"group": groups[1:], "test_group": groups[0]} if grouped else {}
        return p_value(scores[1:], scores[0], key=key_p if smooth else None, **options), groups[0]

    return jax.vmap(one)(keys)


def test_smoothed_p_values_are_uniform_within_groups():
    p, group = tied_p_values(jax.random.split(jax.random.key(3), NUM), True, True)
    for label in (0, 1):
        assert distance_from("uniform", p[group == label]) > FALSE_ALARM
    everywhere, _ = tied_p_values(jax.random.split(jax.random.key(4), NUM), True, False)
    assert distance_from("uniform", everywhere) > FALSE_ALARM


def test_p_values_that_are_not_smoothed_or_not_grouped_are_found():
    plain, _ = tied_p_values(jax.random.split(jax.random.key(3), NUM), False, False)
    assert distance_from("uniform", plain) < FALSE_ALARM
    mixed, group = tied_p_values(jax.random.split(jax.random.key(3), NUM), True, False)
    assert distance_from("uniform", mixed[group == 1]) < FALSE_ALARM


def test_conservative_p_values_are_conservative():
    plain, _ = tied_p_values(jax.random.split(jax.random.key(3), NUM), False, True)
    for alpha in ALPHAS:
        hits = int(np.sum(np.asarray(plain) <= np.float32(alpha)))
        assert scipy.stats.binomtest(hits, NUM, alpha, alternative="greater").pvalue > FALSE_ALARM


@partial(jax.jit, static_argnames="how")
def shifted_p_values(keys, how):
    """Scores that grow with x, of which the law has shifted: N(0, 1) in calibration, N(1, 1) in test."""

    def one(key):
        key_x, key_noise, key_p = jax.random.split(key, 3)
        x = jax.random.normal(key_x, (30,)).at[0].add(1.0)
        scores = x + 0.5 * jax.random.normal(key_noise, (30,))
        ratio = jnp.exp(x - 0.5)
        options = {"weights": ratio[1:], "test_weight": ratio[0] if how == "right" else 0.0}
        return p_value(scores[1:], scores[0], key=key_p, **({} if how == "unweighted" else options))

    return jax.vmap(one)(keys)


def test_weights_make_up_for_a_shift():
    keys = jax.random.split(jax.random.key(5), NUM)
    assert distance_from("uniform", shifted_p_values(keys, "right")) > FALSE_ALARM
    for planted in ("unweighted", "no mass at infinity"):
        assert distance_from("uniform", shifted_p_values(keys, planted)) < FALSE_ALARM


def test_weighted_thresholds_cover_after_a_shift():
    def one(key):
        key_x, key_noise = jax.random.split(key)
        x = jax.random.normal(key_x, (30,)).at[0].add(1.0)
        scores = x + 0.5 * jax.random.normal(key_noise, (30,))
        ratio = jnp.exp(x - 0.5)
        weighted = conformal_quantile(scores[1:], 0.2, weights=ratio[1:], test_weight=ratio[0])
        return scores[0] <= jnp.stack([weighted, conformal_quantile(scores[1:], 0.2)])

    hits = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(6), NUM)).sum(0)
    assert scipy.stats.binomtest(int(hits[0]), NUM, 0.8, alternative="less").pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(int(hits[1]), NUM, 0.8, alternative="less").pvalue < FALSE_ALARM


def test_many_at_once_are_one_by_one():
    rng = np.random.default_rng(7)
    scores, weights = jnp.asarray(rng.normal(size=(3, 25))), jnp.asarray(rng.uniform(size=(3, 25)))
    alphas = jnp.array([[0.05], [0.2]])
    found = jax.jit(conformal_quantile)(scores, alphas)
    weighted = conformal_quantile(scores, alphas, weights=weights)
    assert found.shape == weighted.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert found[i, j] == conformal_quantile(scores[j], alphas[i, 0])
            assert weighted[i, j] == conformal_quantile(scores[j], alphas[i, 0], weights=weights[j])
    tests = jnp.asarray(rng.normal(size=(4, 5)))
    together = p_value(scores[0], tests)
    assert together.tolist() == [[float(p_value(scores[0], s)) for s in row] for row in tests]


def test_thresholds_have_gradients():
    """Those of the score that is the threshold, also beside missing and infinite ones."""
    scores = jnp.array([3.0, 1.0, jnp.nan, jnp.inf, 2.0])
    for options in ({}, {"weights": jnp.ones(5)}):
        gradient = jax.grad(lambda s, options=options: conformal_quantile(s, 0.45, **options))(scores)
        assert gradient.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        gradient = jax.grad(lambda s, options=options: conformal_quantile(s, 0.01, **options))(scores)
        assert not np.any(gradient[np.isfinite(scores)])


def test_uniforms_are_drawn_for_each_test_point():
    p = p_value(jnp.zeros(3), jnp.zeros(2_000), key=8)
    assert distance_from("uniform", p) > FALSE_ALARM
    assert mean_p_value(p, 0.5) > FALSE_ALARM


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    scores = jnp.arange(3.0)
    with pytest.raises(ValueError, match="scores must have an axis"):
        conformal_quantile(1.0, 0.1)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        conformal_quantile(scores, 0.1, weights=-scores)
    with pytest.raises(ValueError, match="weights must have the shape"):
        conformal_quantile(scores, 0.1, weights=jnp.ones(2))
    with pytest.raises(ValueError, match="test_weight is relative to weights"):
        conformal_quantile(scores, 0.1, test_weight=1.0)
    with pytest.raises(ValueError, match="test_weight is relative to weights"):
        p_value(scores, 1.0, test_weight=1.0)
    with pytest.raises(ValueError, match="go together"):
        p_value(scores, 1.0, group=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="group must have the shape"):
        p_value(scores, 1.0, group=jnp.zeros(2, int), test_group=0)
    with pytest.raises(ValueError, match=r"calibration_scores must have shape \(n,\)"):
        p_value(jnp.zeros((2, 2)), 1.0)
