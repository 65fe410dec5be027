"""SPCI on autoregressive residuals, whose conditional quantiles are known: r_t given r_{t-1} is N(phi r_{t-1}, 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal
from bayesinf.models.conformal import conditional_quantiles, quantile_forest
from bayesinf.models.conformal.residual_sets import narrowest

pytestmark = pytest.mark.usefixtures("compile_fast")

PHI = 0.9
ORACLE = 2 * scipy.stats.norm.ppf(0.95)
FOREST = conformal.QuantileForest(0, window=3, num_trees=10, refit_every=25, num_features=3)
KERNEL = conformal.KernelQuantiles(shares=(0.05, 0.1, 0.25, float("inf")), decays=(0.0, 0.8))
QUANTILES = {"kernel": KERNEL, "forest": FOREST}


def autoregression(key, num, phi=PHI):
    noise = jax.random.normal(key, (num,))
    return jax.lax.scan(lambda r, e: (phi * r + e,) * 2, noise[0] / np.sqrt(1 - phi**2), noise)[1]


def many(quantile, num_calibration, num_runs=24, num_test=50, horizon=1):
    """Coverage and mean width of independent runs, and the widths of EnbPI's interval of the same residuals."""

    def run(key):
        residuals = autoregression(key, num_calibration + num_test)
        found = conformal.spci(residuals, num_calibration, 0.1, quantile=quantile, horizon=horizon, num_betas=1)
        plain = narrowest(jnp.sort(residuals[:num_calibration]), num_calibration, 0.1, 1)
        return found.coverage, found.width.mean(), plain[1] - plain[0]

    return np.array(jax.lax.map(run, jax.random.split(jax.random.key(7), num_runs), batch_size=12), float)


@pytest.mark.parametrize("name", QUANTILES)
def test_intervals_given_the_past_are_narrower_and_still_cover(name):
    coverage, width, plain = many(QUANTILES[name], 400)
    assert scipy.stats.ttest_rel(width, plain, alternative="less").pvalue < FALSE_ALARM
    # as many as are right at first order: what is known of 400 residuals may cost a share of 1 / sqrt(400)
    assert scipy.stats.ttest_1samp(coverage, 0.9 - 1 / 20, alternative="less").pvalue > FALSE_ALARM
    assert scipy.stats.ttest_1samp(coverage, 0.9 + 1 / 20, alternative="greater").pvalue > FALSE_ALARM


@pytest.mark.slow
def test_with_more_residuals_the_width_nears_that_of_the_known_law():
    few, more = many(KERNEL, 200)[1] / ORACLE, many(KERNEL, 2_000)[1] / ORACLE
    assert scipy.stats.ttest_rel(more, few, alternative="less").pvalue < FALSE_ALARM
    assert abs(more.mean() - 1) < abs(few.mean() - 1)


@pytest.mark.parametrize("name", QUANTILES)
@pytest.mark.parametrize("horizon", [1, 3])
def test_no_set_looks_at_residuals_that_are_not_yet_known(name, horizon):
    residuals = autoregression(jax.random.key(0), 140)

    def run(residuals):
        found = conformal.spci(residuals, 100, 0.2, quantile=QUANTILES[name], horizon=horizon)
        return np.stack([found.lower, found.upper])

    other = 50.0 * jax.random.normal(jax.random.key(1), (20,))  # of which another bandwidth would be chosen
    same = (run(residuals) == run(residuals.at[120:].set(other))).all(0)
    assert same[: 20 + horizon].all()
    assert not same[20 + horizon :].all()


@pytest.mark.parametrize("name", QUANTILES)
def test_residuals_of_the_future_are_found_out(name, monkeypatch):
    """The step's own residual among those that its set is made of."""
    residuals = autoregression(jax.random.key(0), 140)

    def run(residuals):
        return np.asarray(conformal.spci(residuals, 100, 0.2, quantile=QUANTILES[name]).width)

    with monkeypatch.context() as patch:
        patch.setattr(conditional_quantiles, "_is_past", lambda place, u, horizon: place <= u)
        patch.setattr(quantile_forest, "_is_past", lambda times, t, horizon: times <= t)
        jax.clear_caches()
        leaky = run(residuals), run(residuals.at[120].set(50.0))
    jax.clear_caches()
    honest = run(residuals), run(residuals.at[120].set(50.0))
    assert leaky[0][20] != leaky[1][20]
    assert honest[0][20] == honest[1][20]


class ChosenWithHindsight(conformal.KernelQuantiles):
    """A bandwidth that is chosen by all residuals, those of the test steps among them."""

    def bounds(self, residuals, num_calibration, alpha, *, num_betas, horizon):
        share, decay = self.choose(residuals, alpha, horizon=horizon)
        chosen = conformal.KernelQuantiles(share[None], decay[None])
        return chosen.bounds(residuals, num_calibration, alpha, num_betas=num_betas, horizon=horizon)


@pytest.mark.parametrize(("kind", "is_honest"), [(conformal.KernelQuantiles, True), (ChosenWithHindsight, False)])
def test_the_bandwidth_is_chosen_on_calibration_residuals_alone(kind, is_honest):
    """Calibration residuals that do not depend on their past, test residuals that do, and the other way round."""
    quantile = kind(shares=(0.05, float("inf")), decays=(0.0,))
    independent = jax.random.normal(jax.random.key(4), (80,))
    swings = jnp.where(jnp.arange(400) % 2 == 0, 3.0, -3.0) + 0.1 * jax.random.normal(jax.random.key(5), (400,))
    others = 3.0 * jax.random.normal(jax.random.key(6), (400,))
    # of the set of the first test step nothing but calibration is known
    firsts = [
        float(conformal.spci(jnp.concatenate([independent, later]), 80, 0.2, quantile=quantile).width[0])
        for later in (swings, others)
    ]
    assert (firsts[0] == firsts[1]) == is_honest


def test_where_the_past_tells_nothing_all_residuals_count_alike():
    """With equal weights alone, sets are those of the order statistics of all residuals before."""
    residuals = jax.random.normal(jax.random.key(1), (60,))
    equal = conformal.KernelQuantiles(shares=(float("inf"),), decays=(0.0,))
    found = conformal.spci(residuals, 40, 0.2, quantile=equal, num_betas=1)
    for t in range(20):
        seen = residuals[1 : 40 + t]  # nothing is known of the past of the first
        expected = narrowest(jnp.sort(seen), seen.shape[0], 0.2, 1)
        assert [float(found.lower[t]), float(found.upper[t])] == [float(end) for end in expected]


def test_distances_are_sums_over_all_lags():
    """A decay of 0.8 and one neighbour against a loop."""
    residuals = np.asarray(autoregression(jax.random.key(2), 50), np.float64)
    decay, u = 0.8, 48

    def distance(v):
        lags = np.arange(v + 1)
        return np.sum(decay**lags * (residuals[u - lags] - residuals[v - lags]) ** 2) + decay ** (v + 1) * spread

    spread = 2 * np.var(residuals[:49]) / (1 - decay)
    distances = np.array([distance(v) for v in range(u)])
    share = jnp.asarray(0.2)
    width = np.sort(distances)[int(np.ceil(0.2 * u)) - 1] / 4
    weights = np.exp(-0.5 * distances / width)
    order = np.argsort(residuals[1:49])
    expected = conformal.narrowest_weighted(jnp.asarray(residuals[1:49][order]), jnp.asarray(weights[order]), 0.4, 3)
    found = conditional_quantiles._sweep(jnp.asarray(residuals), share[None], jnp.asarray(decay), 0.4, 49, 3, 1)
    np.testing.assert_allclose([float(found[0][0, 0]), float(found[1][0, 0])], [float(e) for e in expected], rtol=1e-5)


def test_missing_residuals_are_left_out_and_their_steps_have_sets():
    residuals = autoregression(jax.random.key(3), 160).at[jnp.array([20, 21, 110, 130])].set(jnp.nan)
    for quantile in QUANTILES.values():
        found = conformal.spci(residuals, 100, 0.2, quantile=quantile)
        assert not jnp.isnan(found.lower).any()
        assert jnp.isfinite(found.width).mean() > 0.9
        assert float(found.coverage) * 58 == pytest.approx(round(float(found.coverage) * 58), abs=1e-3)


def test_a_step_function_is_recovered_by_the_forest():
    x = jax.random.uniform(jax.random.key(0), (400, 3))
    y = jnp.where(x[:, 1] > 0.5, 5.0, -5.0)
    forest = conformal.QuantileForest(1, num_features=3, max_depth=1).fit(x, y)
    assert (forest.features == 1).all()
    bin_width = float(jnp.max(jnp.diff(jnp.sort(x[:, 1])))) + 1 / 16  # edges are quantiles of 16
    assert (jnp.abs(forest.thresholds - 0.5) < bin_width).all()
    for one, truth in (([0.1, 0.9, 0.2], 5.0), ([0.9, 0.1, 0.3], -5.0)):
        weights = forest.weights(jnp.array(one))
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
        assert abs(float(weights @ y) - truth) < 10 / 16 * 2


def test_trees_are_the_best_splits_of_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), rng.integers(-3, 4, 60).astype(float)
    counts = rng.poisson(1.0, (1, 60))
    quantile = conformal.QuantileForest(0, num_trees=1, max_depth=1, num_bins=8, min_leaf=5, num_features=2)
    x32 = jnp.asarray(x)
    forest = quantile.fit_counted(
        jax.random.key(0), x32, jnp.asarray(y), jnp.ones(60, bool), jnp.asarray(counts, jnp.int32)
    )
    best = (np.inf, None, None)
    for feature in range(2):
        for edge in np.quantile(np.asarray(x32)[:, feature], np.arange(1, 8) / 8):
            left, w = x[:, feature] <= edge, counts[0]
            if w[left].sum() < 5 or w[~left].sum() < 5:
                continue
            loss = sum(
                np.sum(w[side] * (y[side] - np.average(y[side], weights=w[side])) ** 2) for side in (left, ~left)
            )
            best = min(best, (loss, feature, edge))
    assert int(forest.features[0, 0]) == best[1]
    assert float(forest.thresholds[0, 0]) == pytest.approx(best[2], rel=1e-4)


def test_a_permutation_of_the_rows_and_their_counts_changes_nothing():
    rng = np.random.default_rng(2)
    x, y = jnp.asarray(rng.normal(size=(80, 3))), jnp.asarray(rng.integers(-9, 10, 80), float)
    counts = jnp.asarray(rng.poisson(1.0, (6, 80)), jnp.int32)
    quantile = conformal.QuantileForest(0, num_trees=6, min_leaf=3)
    shuffle = rng.permutation(80)
    key, all_rows = jax.random.key(1), jnp.ones(80, bool)
    plain = quantile.fit_counted(key, x, y, all_rows, counts)
    moved = quantile.fit_counted(key, x[shuffle], y[shuffle], all_rows, counts[:, shuffle])
    for one in x[:5] + 0.1:
        np.testing.assert_allclose(plain.weights(one)[shuffle], moved.weights(one), atol=1e-6)
        assert float(plain.weights(one).sum()) == pytest.approx(1.0, abs=1e-5)
    assert (jnp.abs(plain.weights(x[0]) - moved.weights(x[0])) > 1e-3).any()  # rows are told apart


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    residuals = jnp.arange(20.0)
    for message, arguments, options in [
        ("num_calibration must be at least 2 horizon", (residuals, 20, 0.1), {}),
        ("num_calibration must be at least 2 horizon", (residuals, 5, 0.1), {"horizon": 2}),
        ("alpha must lie in", (residuals, 10, 0.0), {}),
        ("window must be below", (residuals, 10, 0.1), {"quantile": conformal.QuantileForest(0)}),
    ]:
        with pytest.raises(ValueError, match=message):
            conformal.spci(*arguments, **options)
    with pytest.raises(ValueError, match="shares must lie in"):
        conformal.KernelQuantiles(shares=(2.0,))
    with pytest.raises(ValueError, match="decays must lie in"):
        conformal.KernelQuantiles(decays=(1.0,))
    with pytest.raises(ValueError, match="min_leaf must be at least 1"):
        conformal.QuantileForest(0, min_leaf=0)
