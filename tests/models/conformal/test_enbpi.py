"""EnbPI: the exact coverage law of two order statistics, residuals against a loop, and what breaks without them."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import conformal
from bayesinf.models.conformal.residual_sets import narrowest, narrowest_weighted

module = importlib.import_module("bayesinf.models.conformal.enbpi")  # the package has the function by that name

pytestmark = pytest.mark.usefixtures("compile_fast")


def fit_mean(x, y, weights):
    return jnp.sum(weights * y) / jnp.sum(weights)


def predict_mean(mean, x):
    return jnp.full(x.shape[0], mean)


def fit_nothing(x, y, weights):
    return jnp.zeros(())


def fit_ridge(x, y, weights):
    scatter = (x.T * weights) @ x + 1e-2 * jnp.eye(x.shape[1])
    return jnp.linalg.solve(scatter, (x.T * weights) @ y)


def predict_linear(params, x):
    return x @ params


def count_window(num_runs, num_train, alpha, *, leaks=False):
    """How many of independent runs cover their one test step, with errors known to be iid and nothing fitted."""

    def run(key):
        errors = jax.random.exponential(key, (num_train + 1,))
        window = conformal.window.fill(errors[: num_train + leaks], num_train)
        lower, upper = narrowest(window.ordered, window.num_scores, alpha, 1)
        return (errors[-1] >= lower) & (errors[-1] <= upper)

    return int(jnp.sum(jax.vmap(run)(jax.random.split(jax.random.key(0), num_runs))))


@pytest.mark.parametrize(("num_train", "alpha"), [(19, 0.1), (30, 0.37), (7, 0.13), (4, 0.1)])
def test_the_middle_interval_covers_iid_errors_exactly_as_often_as_said(num_train, alpha):
    num_runs = 20_000
    k = int(conformal.conformal_rank(num_train, alpha))
    covered = count_window(num_runs, num_train, alpha)
    assert scipy.stats.binomtest(covered, num_runs, k / (num_train + 1)).pvalue > FALSE_ALARM
    assert k / (num_train + 1) >= 1 - alpha


def test_a_window_that_holds_the_step_itself_is_found_out():
    num_runs, num_train, alpha = 20_000, 19, 0.37
    k = int(conformal.conformal_rank(num_train, alpha))
    covered = count_window(num_runs, num_train, alpha, leaks=True)
    assert scipy.stats.binomtest(covered, num_runs, k / (num_train + 1)).pvalue < FALSE_ALARM


def test_a_series_of_iid_errors_is_covered_on_average_as_two_order_statistics_are():
    """The mean over steps is exact though neighbouring windows overlap; runs are independent."""
    num_train, alpha = 39, 0.2

    def run(key):
        y = jax.random.normal(key, (num_train + 60,))
        x = jnp.zeros((num_train + 60, 1))
        parts = (x[:num_train], y[:num_train], x[num_train:], y[num_train:])
        return conformal.enbpi(1, fit_nothing, predict_mean, *parts, alpha, num_betas=1).coverage

    coverage = jax.vmap(run)(jax.random.split(jax.random.key(2), 1_000))
    k = int(conformal.conformal_rank(num_train, alpha))
    assert mean_p_value(coverage, k / (num_train + 1)) > FALSE_ALARM


def test_each_step_sees_what_came_before_it_and_nothing_else():
    y = jax.random.normal(jax.random.key(0), (80,))
    x = jnp.zeros((80, 1))

    def run(y):
        return conformal.enbpi(1, fit_mean, predict_mean, x[:50], y[:50], x[50:], y[50:], 0.3, window=20, num_betas=1)

    low, high = run(y.at[65].set(-100.0)), run(y.at[65].set(100.0))
    same = np.asarray(low.lower == high.lower) & np.asarray(low.upper == high.upper)
    assert same[: 65 - 50 + 1].all()
    assert not same[65 - 50 + 1 :].all()


def test_residuals_and_centre_are_those_of_a_loop_over_the_fits():
    rng = np.random.default_rng(0)
    x, y, x_new = rng.normal(size=(25, 3)), rng.normal(size=25), rng.normal(size=(4, 3))
    key = jax.random.key(3)
    fits = conformal.bootstrap_ensemble(
        key, fit_ridge, predict_linear, jnp.asarray(x), jnp.asarray(y), num_bootstrap=7, block_length=3
    )
    counts = np.stack([module._draw_blocks(one, num=25, block_length=3) for one in jax.random.split(key, 7)])
    assert (counts.sum(1) == 25).all()
    params = np.stack([np.linalg.solve((x.T * c) @ x + 1e-2 * np.eye(3), (x.T * c) @ y) for c in counts.astype(float)])
    without = [params[counts[:, i] == 0] for i in range(25)]
    expected = [y[i] - np.mean(without[i] @ x[i]) if len(without[i]) else np.nan for i in range(25)]
    np.testing.assert_allclose(fits.residuals, expected, rtol=2e-3, atol=1e-4)
    centre = np.mean([[np.mean(few @ one) for few in without if len(few)] for one in x_new], 1)
    np.testing.assert_allclose(fits.centre(jnp.asarray(x_new)), centre, rtol=2e-3, atol=1e-4)


def overfit_coverage(num_runs=150):
    def run(key):
        x = jax.random.normal(jax.random.fold_in(key, 0), (140, 25))
        y = jax.random.normal(jax.random.fold_in(key, 1), (140,))
        parts = (x[:60], y[:60], x[60:], y[60:])
        options = {"block_length": 1, "num_betas": 1}  # a choice among several costs coverage with 60 residuals
        return conformal.enbpi(key, fit_ridge, predict_linear, *parts, 0.2, **options).coverage

    return np.asarray(jax.vmap(run)(jax.random.split(jax.random.key(5), num_runs)), float)


def in_sample(fit, predict, key, x, y, num_bootstrap, block_length):
    params, shares, _ = fit_by_blocks(fit, predict, key, x, y, num_bootstrap, block_length)
    fitted = shares @ jax.vmap(lambda one: predict(one, x))(params)
    return params, shares, y - fitted


fit_by_blocks = module._fit


def test_leave_one_out_residuals_cover_where_the_fit_has_many_parameters(monkeypatch):
    """25 coefficients for 60 points: fits without a point err as much on it as all do on a new one, or more."""

    def p_value_of_too_few(coverage):
        return scipy.stats.ttest_1samp(coverage, 0.8, alternative="less").pvalue

    assert p_value_of_too_few(overfit_coverage()) > FALSE_ALARM
    monkeypatch.setattr(module, "_fit", in_sample)
    assert p_value_of_too_few(overfit_coverage()) < FALSE_ALARM


def test_the_centre_is_the_mean_over_the_points_that_were_seen():
    """Of a fit that returns how often each point was drawn; a missing point has no fits without it."""
    y = jnp.where(jnp.arange(40) % 3 == 0, jnp.nan, 1.0)
    fits = conformal.bootstrap_ensemble(
        0, lambda x, y, weights: weights, lambda params, x: jnp.zeros(x.shape[0]), y, y, num_bootstrap=6
    )
    is_out = np.asarray(fits.params)[:, ~np.isnan(y)] == 0
    num_out = is_out.sum(0)
    expected = (is_out[:, num_out > 0] / num_out[num_out > 0]).mean(1)
    np.testing.assert_allclose(fits.shares, expected, rtol=1e-5)
    assert np.ptp(expected) > 0.01


def test_missing_values_slide_nothing_and_are_not_fitted():
    y = jax.random.normal(jax.random.key(0), (60,)).at[jnp.array([3, 50])].set(jnp.nan)
    x = jnp.arange(60.0)[:, None]
    found = conformal.enbpi(1, fit_mean, predict_mean, x[:40], y[:40], x[40:], y[40:], 0.2, num_bootstrap=50)
    assert jnp.isfinite(found.width).all()
    assert (found.lower[10], found.upper[10]) == (found.lower[11], found.upper[11])
    fits = conformal.bootstrap_ensemble(1, fit_mean, predict_mean, x[:40], y[:40], num_bootstrap=50)
    assert np.flatnonzero(np.isnan(fits.residuals)).tolist() == [3]
    filled = conformal.bootstrap_ensemble(1, fit_mean, predict_mean, x[:40], y[:40].at[3].set(1e6), num_bootstrap=50)
    assert jnp.abs(filled.params - fits.params).max() > 1e3  # as it would have been


@pytest.mark.parametrize(
    ("num", "alpha", "num_betas"),
    [(3, 0.1, 1), (30, 0.37, 1), (199, 0.1, 1), (19, 0.1, 5), (199, 0.05, 5), (99, 0.12, 3)],
)
def test_equal_weights_are_no_weights(num, alpha, num_betas):
    residuals = jnp.sort(jax.random.exponential(jax.random.key(num), (num,)))
    plain = narrowest(residuals, num, alpha, num_betas)
    padded = jnp.append(residuals, jnp.array([7.0, 8.0]))  # of weight zero
    weighted = narrowest_weighted(padded, jnp.where(jnp.arange(num + 2) < num, 0.25, 0.0), alpha, num_betas)
    assert [float(end) for end in plain] == [float(end) for end in weighted]


def test_the_narrowest_of_several_is_narrower_where_errors_are_skewed():
    residuals = jnp.sort(jax.random.exponential(jax.random.key(0), (500,)))
    middle, best = narrowest(residuals, 500, 0.2, 1), narrowest(residuals, 500, 0.2, 5)
    assert best[1] - best[0] < 0.9 * (middle[1] - middle[0])
    weights = jnp.where(jnp.arange(500) < 400, 1.0, 1e-6)
    assert narrowest_weighted(residuals, weights, 0.2, 5)[1] < best[1]


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    x, y = jnp.zeros((10, 1)), jnp.zeros(10)
    for message, arguments, options in [
        ("x_test must have a leading axis of the 4", (x, y, x, y[:4], 0.1), {}),
        ("x must have a leading axis of the 9", (x, y[:9], x, y, 0.1), {}),
        ("alpha must lie in", (x, y, x, y, 1.5), {}),
        ("block_length must be at most the 10", (x, y, x, y, 0.1), {"block_length": 11}),
        ("num_bootstrap must be at least 2", (x, y, x, y, 0.1), {"num_bootstrap": 1}),
    ]:
        with pytest.raises(ValueError, match=message):
            conformal.enbpi(0, fit_mean, predict_mean, *arguments, **options)
    with pytest.raises(ValueError, match="fit must be called as fit"):
        conformal.enbpi(0, predict_mean, predict_mean, x, y, x, y, 0.1)
