"""Replicates of PPG: the interval covers as often as it says, and the diagnostics show what they ought to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ppg_models import TOTALS, problem, smooth

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels import AdditiveFunctional, ppg_replicates
from bayesinf.kernels.ppg_replicates import _autocorrelation

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


@pytest.mark.slow
def test_the_trend_shows_the_bias_that_the_burn_in_takes_away():
    """N = 10 on PPG1d: sum x^2 is 17.3 too low in the first sweep, as published, and 2.9 in the seventh."""
    model, ys, _ = problem("PPG1d", 50)
    options = {"num_replicates": 300, "num_particles": 10, "num_sweeps": 16, "burn_in": 8}
    found = ppg_replicates(1, model, ys, TOTALS, **options)
    trend, error = np.asarray(found.trend)[:, 1], np.asarray(found.trend_error)[:, 1]
    assert abs(trend[0] + 17.3) < 4.9 * error[0] + 2.5  # of the roll-out's own bias
    assert trend[0] < -5 * error[0]
    assert np.all(np.abs(trend[10:]) < 5 * error[10:])
    # lag-one correlation times the root of N is 1.78 in the published table
    assert abs(found.autocorrelation[0, 1] * np.sqrt(10) - 1.78) < 0.4


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
