"""Replicates of PPG: the interval covers as often as it says, and the diagnostics show what they ought to."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ppg_models import TOTALS, assert_published, mean_and_error, problem, smooth

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import AdditiveFunctional, ParisianGibbs, ppg_replicates
from bayesinf.kernels.ppg_replicates import _autocorrelation, _Plan, _run_all

FEW = {"num_replicates": 8, "num_particles": 10, "num_sweeps": 8, "burn_in": 4}


def short_problem():
    model, ys, _ = problem("PPG1d", 50)
    parameters = {name: float(getattr(model, name)) for name in ("a", "q", "b", "r", "P0")}
    return model, ys[:6], smooth(np.asarray(ys[:6], np.float64), **parameters)


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_says():
    """150 intervals of 80% for three correlated functionals: counts for each by the binomial law."""
    model, ys, smoothed = short_problem()
    covers = np.zeros(3)
    for seed in range(150):
        found = ppg_replicates(seed, model, ys, TOTALS, **FEW, level=0.8)
        covers += (found.interval[0] < smoothed.totals) & (smoothed.totals < found.interval[1])
    p_values = [scipy.stats.binomtest(int(count), 150, 0.8).pvalue for count in covers]
    assert 3 * min(p_values) > FALSE_ALARM


def test_what_is_told_is_that_of_the_replicates():
    model, ys, _ = short_problem()
    found = ppg_replicates(0, model, ys, TOTALS, **FEW)
    each = np.asarray(found.replicates, np.float64)
    np.testing.assert_allclose(found.estimate, each.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.standard_error, each.std(0, ddof=1) / np.sqrt(8), rtol=1e-3)
    width = scipy.stats.t(7).ppf(0.975) * each.std(0, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found.interval[1] - found.interval[0], 2 * width, rtol=1e-3)
    np.testing.assert_allclose(found.trend[4:].mean(0), np.zeros(3), atol=1e-3)  # the roll-out is their mean
    assert found.autocorrelation.shape == (3, 3)
    assert found.update_rate.shape == (6,)
    other = ppg_replicates(0, model, ys, TOTALS, **FEW)
    np.testing.assert_array_equal(found.replicates, other.replicates)


def test_diagnostics_are_those_of_the_sweeps():
    """By NumPy, from the estimates of every sweep: the trend of all of them, the autocorrelation of those kept."""
    model, ys, _ = short_problem()
    found = ppg_replicates(0, model, ys, TOTALS, **FEW)
    runs, _ = _run_all(_Plan(ParisianGibbs(model, ys, TOTALS, 10), jax.random.split(jax.random.key(0), 8), 8, 4))
    sweeps = np.asarray(runs.estimates, np.float64)
    np.testing.assert_allclose(found.replicates, sweeps[:, 4:].mean(1), rtol=1e-4)
    deviations = sweeps - sweeps[:, 4:].mean(1, keepdims=True)
    np.testing.assert_allclose(found.trend, deviations.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.trend_error, deviations.std(0, ddof=1) / np.sqrt(8), atol=1e-4)
    kept = sweeps[:, 4:] - sweeps[:, 4:].mean((0, 1))
    expected = [np.mean(kept[:, lag:] * kept[:, :-lag], (0, 1)) / np.mean(kept**2, (0, 1)) for lag in (1, 2, 3)]
    np.testing.assert_allclose(found.autocorrelation, expected, atol=1e-3)
    np.testing.assert_allclose(found.update_rate, np.mean(runs.update_rate, axis=0), rtol=1e-5)


def test_what_is_the_same_on_all_paths_has_no_autocorrelation():
    """The number of time steps, and a sum over them that rounds in one way or another: only the states vary."""
    model, ys, _ = short_problem()

    def terms(x, t):
        return {"count": jnp.ones(()), "rounded": 0.1 * t, "none": jnp.zeros(()), "x": x}

    functional = AdditiveFunctional(lambda x: terms(x, 0.0), lambda x_prev, x, t: terms(x, t))
    found = ppg_replicates(0, model, ys, functional, **FEW)
    for name in ("count", "rounded", "none"):
        assert np.all(np.isnan(found.autocorrelation[name])), name
        assert np.all(found.standard_error[name] < 1e-6)
    assert np.all(np.abs(found.autocorrelation["x"]) <= 1.0)


def test_rounding_is_told_from_variation():
    """A signal of 1e-5 of its mean is one, in float32 too; errors in the last place are not."""
    signal = np.random.default_rng(0).normal(size=(3, 9))
    signal = np.cumsum(signal, axis=1).astype(jnp.zeros(()).dtype)
    centred = signal - signal.mean()
    expected = [np.mean(centred[:, lag:] * centred[:, :-lag]) / np.mean(centred**2) for lag in range(1, 9)]
    np.testing.assert_allclose(_autocorrelation(jnp.asarray(signal)), expected, atol=1e-4)
    small = jnp.asarray(3.0 + 1e-5 * signal)
    np.testing.assert_allclose(_autocorrelation(small), expected, atol=0.05)
    assert np.all(np.isnan(_autocorrelation(jnp.nextafter(jnp.full_like(small, 3.0), jnp.sign(small - 3.0) * 9.0))))


def test_it_may_be_compiled_and_mapped():
    model, ys, _ = short_problem()
    one = ppg_replicates(0, model, ys, TOTALS, **FEW)
    both = jax.jit(jax.vmap(lambda ys: ppg_replicates(0, model, ys, TOTALS, **FEW)))(jnp.stack([ys, ys]))
    np.testing.assert_allclose(both.interval[1], one.interval, rtol=1e-4)


# N, what is published of it: the bias of sum x^2 in the first sweep and its error, and the correlation of neighbours
PUBLISHED = {"num_particles": 20, "bias": (-7.90, 0.06), "correlation": 0.421}


@lru_cache
def independent_runs():
    """16 calls on PPG1d of 64 replicates each, of which all but the first sweeps are kept."""
    model, ys, _ = problem("PPG1d", 50)
    options = {"num_replicates": 64, "num_particles": PUBLISHED["num_particles"], "num_sweeps": 20, "burn_in": 12}
    return jax.tree.map(
        lambda *leaves: np.stack(leaves).astype(np.float64),
        *(ppg_replicates(seed, model, ys, TOTALS, **options) for seed in range(16)),
    )


@pytest.mark.slow
def test_the_trend_shows_the_bias_that_the_burn_in_takes_away():
    runs = independent_runs()
    trend = runs.trend[:, :, 1]
    bias, error = PUBLISHED["bias"]
    # the trend is about the roll-out: their sum is the mean estimate of the sweep
    first = trend[:, 0] + runs.estimate[:, 1] - problem("PPG1d", 50)[2].totals[1]
    p_value = 2 * scipy.stats.t(15).sf(abs(first.mean() - bias) / np.hypot(mean_and_error(first)[1], error))
    assert p_value > FALSE_ALARM
    assert mean_p_value(trend[:, 0], 0.0) < FALSE_ALARM
    # what is published falls by 0.69 a sweep, to less than a tenth of the standard error after the burn-in
    assert mean_p_value(trend[:, 12:], 0.0) > FALSE_ALARM


@pytest.mark.slow
def test_the_errors_that_are_told_are_those_that_are_made():
    """Between independent runs: their spread is what each of them said of itself, by an F-test."""
    runs = independent_runs()
    for values, told in ((runs.estimate, runs.standard_error), (runs.trend[:, 0], runs.trend_error[:, 0])):
        ratio = values.var(axis=0, ddof=1) / np.mean(told**2, axis=0)
        law = scipy.stats.f(15, 16 * 63)
        assert 2 * 3 * np.min([law.cdf(ratio), law.sf(ratio)]) > FALSE_ALARM, ratio


@pytest.mark.slow
def test_the_autocorrelation_is_the_published_one():
    """The rule of the research, a lag-one correlation that goes like the root of N, is tested of the kernel itself."""
    found = independent_runs().autocorrelation[:, 0, 1]
    assert_published(mean_and_error(found), PUBLISHED["correlation"], 0.1)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    model, ys, _ = short_problem()
    with pytest.raises(ValueError, match="num_replicates must be at least 2"):
        ppg_replicates(0, model, ys, TOTALS, **FEW | {"num_replicates": 1})
    with pytest.raises(ValueError, match="burn_in must leave two of num_sweeps=8 sweeps, got 7"):
        ppg_replicates(0, model, ys, TOTALS, **FEW | {"burn_in": 7})
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\)"):
        ppg_replicates(0, model, ys, TOTALS, **FEW, level=95.0)
    far = ys.at[2].set(0.5 * float(jnp.finfo(ys.dtype).max))
    with pytest.raises(errors.DegenerateWeightsError, match="In 8 of 8 replicates no particle") as caught:
        ppg_replicates(0, model, far, TOTALS, **FEW)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.all(np.isnan(leaf))), caught.value.result.estimate))
