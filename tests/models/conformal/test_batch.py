"""Ranks of a batch against enumeration and known laws; bounds that hold as often as said."""

from itertools import combinations_with_replacement
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal
from bayesinf.models.conformal import batch

NUM_RUNS = 20_000


def at_least(is_held, level):
    """The p-value of that something holds with probability `level` or more."""
    return scipy.stats.binomtest(int(np.sum(is_held)), len(is_held), level, alternative="less").pvalue


def exactly(is_held, level):
    return scipy.stats.binomtest(int(np.sum(is_held)), len(is_held), level).pvalue


def draw_batches(n, m, num_runs=NUM_RUNS, seed=0):
    scores = np.random.default_rng(seed).exponential(size=(num_runs, n + m))
    return jnp.asarray(scores[:, :n]), scores[:, n:]


def all_ranks(n, m):
    return np.array(list(combinations_with_replacement(range(1, n + 2), m)))


def test_ranks_are_those_of_all_vectors():
    n, m = 6, 4
    ranks = all_ranks(n, m)
    assert len(ranks) == comb(n + m, m)
    for zeta in range(1, m + 1):
        shares = np.bincount(ranks[:, zeta - 1], minlength=n + 2)[1:] / len(ranks)
        np.testing.assert_allclose(conformal.rank_pmf(n, m, zeta), shares, rtol=1e-14)
        np.testing.assert_array_equal(
            [conformal.batch_rank(n, m, zeta, alpha) for alpha in (0.9, 0.5, 0.1, 0.001)],
            [np.sum(np.cumsum(shares) < 1 - alpha - 1e-12) + 1 for alpha in (0.9, 0.5, 0.1, 0.001)],
        )
    h0 = np.array([0, 3, 1, 1, 5, 2, 7])
    shares = np.bincount(h0[ranks - 1].sum(1), minlength=4 * 7 + 1) / len(ranks)
    np.testing.assert_allclose(conformal.rank_sum_pmf(n, m, h0), shares, atol=1e-15)


@pytest.mark.parametrize(("n", "m"), [(3, 5), (20, 7), (8, 30)])
def test_the_sum_of_ranks_has_the_law_of_mann_and_whitney(n, m):
    law = conformal.rank_sum_pmf(n, m)
    rng = np.random.default_rng(0)
    for _ in range(10):
        cal, test = np.split(rng.permutation(n + m).astype(float), [n])
        statistic, expected = scipy.stats.mannwhitneyu(test, cal, method="exact", alternative="greater")
        assert law[round(statistic) :].sum() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "zeta"), [(200, 100, 90), (1000, 100, 100), (1000, 100, 90), (50, 1, 1)])
def test_one_rank_is_beta_binomial(n, m, zeta):
    expected = scipy.stats.betabinom(n, zeta, m - zeta + 1).pmf(np.arange(n + 1))
    np.testing.assert_allclose(conformal.rank_pmf(n, m, zeta), expected, rtol=1e-9, atol=1e-14)


def test_the_published_ranks():
    n, m, zeta = 200, 100, 90
    for alpha, rank, level in ((0.1, 188, 0.90204), (0.05, 190, 0.95068), (0.01, 194, 0.99351)):
        assert conformal.batch_rank(n, m, zeta, alpha) == rank
        assert conformal.rank_pmf(n, m, zeta)[:rank].sum() == pytest.approx(level, abs=1e-5)
    assert conformal.batch_rank(1000, 100, 90, 0.1) == 932
    assert conformal.batch_rank(1000, 100, 100, 0.1) == 1000
    assert conformal.rank_pmf(1000, 100, 100)[:1000].sum() == pytest.approx(1000 / 1100, rel=1e-13)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.3, 0.7])
def test_one_test_point_is_split_conformal_prediction(alpha):
    """ceil((n + 1)(1 - alpha)) in whole numbers: binary fractions are off by one, at n = 9 and alpha = 0.3."""
    tenths = round(10 * (1 - alpha))
    for n in range(1, 60):
        assert conformal.batch_rank(n, 1, 1, alpha) == -(-(n + 1) * tenths // 10)


@pytest.mark.parametrize(("n", "m", "low", "high"), [(6, 4, 1, 3), (5, 3, 2, 2), (7, 3, 1, 3)])
def test_a_pair_of_ranks_is_the_closest_of_all(n, m, low, high):
    ranks = all_ranks(n, m)

    def level(p, q):
        return np.mean((ranks[:, low - 1] >= p) & (ranks[:, high - 1] <= q))

    for alpha in (0.5, 0.2, 0.05):
        p, q = conformal.batch_rank_pair(n, m, low, high, alpha)
        assert level(p, q) >= 1 - alpha
        closer = [level(i, i + width) for width in range(q - p) for i in range(1, n + 2 - width)]
        assert not closer or max(closer) < 1 - alpha
        assert level(p, q) == max(level(i, i + q - p) for i in range(1, n + 2 - (q - p)))


@pytest.mark.parametrize(("zeta", "alpha"), [(90, 0.1), (50, 0.05), (100, 0.4)])
def test_a_bound_holds_as_often_as_its_rank_says(zeta, alpha):
    cal, test = draw_batches(200, 100, num_runs=4_000)
    bounds = jax.jit(jax.vmap(lambda cal: conformal.batch_quantile_bound(cal, 100, zeta, alpha).bound))(cal)
    level = conformal.rank_pmf(200, 100, zeta)[: conformal.batch_rank(200, 100, zeta, alpha)].sum()
    assert level >= 1 - alpha
    assert exactly(np.sort(test)[:, zeta - 1] <= bounds, level) > FALSE_ALARM
    one_lower = np.sort(cal)[:, conformal.batch_rank(200, 100, zeta, alpha) - 11]
    assert at_least(np.sort(test)[:, zeta - 1] <= one_lower, 1 - alpha) < FALSE_ALARM


def test_too_few_scores_give_an_infinite_bound():
    assert conformal.batch_quantile_bound(jnp.arange(9.0), 10, 10, 0.4).bound == jnp.inf  # 9 / 19 is less than 0.6
    found = conformal.batch_interval(jnp.arange(3.0), 10, 1, 10, 0.1)
    assert (found.lower, found.upper) == (-jnp.inf, jnp.inf)


@pytest.mark.parametrize(
    ("m", "zeta", "alpha"), [(10, 10, 0.1), (10, 10, 0.4), (10, 8, 0.1), (40, 3, 0.001), (1, 1, 0.3)]
)
def test_the_number_that_is_needed_is_the_least_with_a_finite_bound(m, zeta, alpha):
    needed = int(conformal.batch_quantile_bound(jnp.zeros(1), m, zeta, alpha).num_needed)
    assert conformal.batch_rank(needed, m, zeta, alpha) <= needed
    for n in range(1, needed):
        assert conformal.batch_rank(n, m, zeta, alpha) == n + 1
    enough, few = (conformal.batch_quantile_bound(jnp.arange(float(n)), m, zeta, alpha) for n in (needed, needed - 1))
    assert enough.why_infinite() == ""
    assert few.why_infinite() == f"it takes {needed} calibration scores, got {needed - 1}"
    infinite = conformal.batch_quantile_bound(jnp.full(needed, jnp.inf), m, zeta, alpha)
    assert "is infinite itself" in infinite.why_infinite()


@pytest.mark.parametrize(("m", "low", "high", "alpha"), [(4, 1, 4, 0.5), (5, 2, 3, 0.2), (3, 2, 2, 0.4)])
def test_two_finite_ends_need_what_enumeration_says(m, low, high, alpha):
    needed = int(conformal.batch_interval(jnp.zeros(1), m, low, high, alpha).num_needed)
    for n in (needed - 1, needed):
        ranks = all_ranks(n, m)
        level = np.mean((ranks[:, low - 1] >= 2) & (ranks[:, high - 1] <= n))
        assert (level >= 1 - alpha - 1e-12) == (n == needed)
    assert "calibration scores, got 1" in conformal.batch_interval(jnp.zeros(1), m, low, high, alpha).why_infinite()


def test_other_infinite_bounds_have_a_reason():
    assert "at most `sup`" in conformal.batch_mean_bound(jnp.arange(9.0), 3, 0.1).why_infinite()
    assert conformal.batch_mean_bound(jnp.arange(9.0), 3, 0.1, sup=9.0).why_infinite() == ""
    scores = jnp.arange(9.0)
    few = conformal.batch_selection(scores, scores < 99.0, scores[:4], 0, 0.1)
    assert (few.threshold, few.why_infinite()) == (jnp.inf, "it takes 36 calibration scores, got 9")
    no_null = conformal.batch_selection(jnp.arange(50.0), jnp.arange(50) < 0, scores[:4], 0, 0.1)
    assert (no_null.threshold, no_null.why_infinite()) == (-jnp.inf, "")
    several = jax.vmap(lambda cal: conformal.batch_quantile_bound(cal, 10, 10, 0.1))(jnp.zeros((3, 5)))
    assert several.why_infinite() == "it takes 90 calibration scores, got 5"


def test_two_quantiles_are_held_at_once_and_closer_than_by_two_bounds():
    cal, test = draw_batches(200, 40)
    found = jax.jit(jax.vmap(lambda cal: conformal.batch_interval(cal, 40, 10, 30, 0.1)))(cal)
    ordered = np.sort(test)
    is_held = (found.lower <= ordered[:, 9]) & (ordered[:, 29] <= found.upper)
    assert at_least(is_held, 0.9) > FALSE_ALARM
    p, q = conformal.batch_rank_pair(200, 40, 10, 30, 0.1)
    # the lower one from above is the 31st from below of the scores with their sign changed
    alone = [conformal.batch_rank(200, 40, zeta, 0.05) for zeta in (30, 31)]
    assert q - p < alone[0] - (200 + 2 - alone[1])


def enumerated_mean_bound(cal, m, alpha, h0, sup):
    ranks = all_ranks(len(cal), m)
    sums = h0[ranks - 1].sum(1)
    q = np.sort(sums)[int(np.ceil(len(sums) * (1 - alpha) - 1e-9)) - 1]
    scores = np.append(np.sort(cal), sup)
    return scores[ranks - 1].mean(1)[sums <= q].max()


@pytest.mark.parametrize("alpha", [0.4, 0.1])
@pytest.mark.parametrize("h0", [None, np.array([0, 4, 1, 9, 5, 5, 20]), np.array([3, 3, 4, 5, 6, 8, 15])])
def test_the_bound_of_the_mean_is_the_largest_over_all_ranks(alpha, h0):
    cal = np.random.default_rng(1).exponential(size=6)
    found = conformal.batch_mean_bound(cal, 4, alpha, h0=h0, sup=6.0).bound
    expected = enumerated_mean_bound(cal, 4, alpha, np.arange(7) if h0 is None else h0, 6.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert conformal.batch_mean_bound(cal, 4, alpha, h0=h0).bound >= found


def test_the_bound_of_the_mean_holds_and_ranks_that_resemble_the_scores_make_it_closer():
    n, m, alpha = 60, 10, 0.1
    rng = np.random.default_rng(2)
    scores = rng.beta(2, 5, size=(1_000, n + m))
    grid = np.round(100 * np.append(np.sort(rng.beta(2, 5, size=n)), 1.0)).astype(int)
    cal, means = jnp.asarray(scores[:, :n]), scores[:, n:].mean(1)
    by_rank, by_score = (
        np.asarray(
            jax.jit(
                lambda c, h0=h0: jax.lax.map(lambda s: conformal.batch_mean_bound(s, m, alpha, h0=h0, sup=1.0).bound, c)
            )(cal)
        )
        for h0 in (None, grid)
    )
    assert at_least(means <= by_rank, 1 - alpha) > FALSE_ALARM
    assert at_least(means <= by_score, 1 - alpha) > FALSE_ALARM
    assert by_score.mean() < 0.75 * by_rank.mean()


def test_few_nulls_are_selected():
    n, m, alpha = 200, 50, 0.2
    rng = np.random.default_rng(3)
    quality = rng.normal(size=(4_000, n + m))
    scores, is_null = quality + rng.normal(size=quality.shape), quality < 0.5

    def select(scores, is_null, test, num_false):
        return conformal.batch_selection(scores, is_null, test, num_false, alpha).is_selected

    run = jax.jit(jax.vmap(select, in_axes=(0, 0, 0, None)), static_argnums=3)
    num_selected = []
    for num_false in (0, 5):
        selected = np.asarray(run(scores[:, :n], is_null[:, :n], scores[:, n:], num_false))
        assert at_least((selected & is_null[:, n:]).sum(1) <= num_false, 1 - alpha) > FALSE_ALARM
        num_selected.append(selected.sum(1).mean())
    assert num_selected[1] > num_selected[0] > 1


@pytest.mark.parametrize("zeta", [1, 10, 19])
def test_a_p_value_of_a_batch_is_that_of_its_rank(zeta):
    cal, test = draw_batches(100, 19)
    p = np.asarray(jax.jit(jax.vmap(lambda c, t: conformal.batch_p_value(c, t, zeta).p))(cal, jnp.asarray(test)), float)
    values = np.cumsum(conformal.rank_pmf(100, 19, zeta)[::-1])
    for level in values[[2, 10, 50, 90]]:
        assert exactly(p <= level * (1 + 1e-5), min(level, 1.0)) > FALSE_ALARM
    above_all = conformal.batch_p_value(cal[0], jnp.asarray(test[0]) + cal[0].max(), zeta).p
    assert float(above_all) == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("zeta", [1, 5, 9])
def test_ties_make_a_p_value_conservative(zeta):
    """Scores of three values: equal ones count for the batch."""
    scores = np.random.default_rng(1).integers(0, 3, (4_000, 29)).astype(float)
    run = jax.jit(jax.vmap(lambda cal, test: conformal.batch_p_value(cal, test, zeta).p))
    p = np.asarray(run(jnp.asarray(scores[:, :20]), jnp.asarray(scores[:, 20:])))
    for level in (0.05, 0.1, 0.3):
        assert at_least(p > level, 1 - level) > FALSE_ALARM
    assert conformal.batch_p_value(jnp.zeros(20), jnp.zeros(9), zeta).p == pytest.approx(1.0)


def test_a_rank_that_counts_from_zero_is_found_out(monkeypatch):
    """The threshold one score lower, as where the test point itself is forgotten."""
    right = batch.batch_rank
    monkeypatch.setattr(batch, "batch_rank", lambda *arguments: right(*arguments) - 1)
    cal, test = draw_batches(9, 1)
    bounds = jax.vmap(lambda cal: conformal.batch_quantile_bound(cal, 1, 1, 0.1).bound)(cal)
    assert at_least(test[:, 0] <= bounds, 0.9) < FALSE_ALARM


@pytest.mark.usefixtures("unchecked")
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="zeta must be at most m=3, the number of test scores, got 4"):
        conformal.batch_rank(10, 3, 4, 0.1)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\), got 10"):
        conformal.batch_rank(10, 3, 3, 10)
    with pytest.raises(ValueError, match="h0 must be 4 whole numbers, none negative"):
        conformal.batch_mean_bound(jnp.arange(3.0), 2, 0.1, h0=np.array([0.5, 1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="num_false must be less than the 2 test points, got 2"):
        conformal.batch_selection(jnp.arange(3.0), jnp.arange(3) > 1, jnp.arange(2.0), 2, 0.1)
    with pytest.raises(ValueError, match="zeta_low must be at most zeta_high, got 3 and 2"):
        conformal.batch_rank_pair(10, 3, 3, 2, 0.1)
    with pytest.raises(ValueError, match="sup must be an upper bound of all scores, got 1 and a score of 5 in cal"):
        conformal.batch_mean_bound(jnp.arange(6.0), 2, 0.1, sup=1.0)
    with pytest.raises(ValueError, match="sup must be an upper bound of all scores, got nan"):
        conformal.batch_mean_bound(jnp.arange(6.0), 2, 0.1, sup=np.nan)


@pytest.mark.usefixtures("unchecked")
def test_scores_that_are_nan_are_named():
    good, bad = jnp.arange(9.0), jnp.arange(9.0).at[2].set(jnp.nan)
    for name, call in (
        ("cal", lambda: conformal.batch_mean_bound(bad, 2, 0.1)),
        ("cal", lambda: conformal.batch_p_value(bad, good, 1)),
        ("test", lambda: conformal.batch_p_value(good, bad, 1)),
        ("scores", lambda: conformal.batch_selection(bad, good > 4, good, 1, 0.1)),
        ("test_scores", lambda: conformal.batch_selection(good, good > 4, bad, 1, 0.1)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must not be NaN, got 1 that are, at \[2\]"):
            call()
