"""Conditional PaRIS against the exact smoothing law, its planted bugs, and the roll-out estimator."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import parisian as planted
from ppg_models import TOTALS, exact_paths, problem

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import ParisianGibbs

BATCH = 5000


@eqx.filter_jit
def _sweep(kernel, keys, paths):
    """New paths and estimates, of independent replicates."""

    def one(row):
        key, path = row
        state, info = kernel.step(key, kernel.init(path))
        return state.position, info.estimate

    return jax.lax.map(one, (keys, paths), batch_size=BATCH)


def stationarity(kernel_class, name, num_particles, num_backward, *, num, ys=None, **options):
    """P-values of E[estimate] and of E[new path] after one sweep from exact draws of the smoothing law."""
    model, ys_fixed, smoothed = problem(name, 50) if ys is None else ys
    key_paths, key_sweeps = jax.random.split(jax.random.key(20240611))
    kernel = kernel_class(model, ys_fixed, TOTALS, num_particles, num_backward, **options)
    paths, estimates = _sweep(kernel, jax.random.split(key_sweeps, num), exact_paths(key_paths, smoothed, num))
    second = (np.asarray(paths, np.float64) - smoothed.mean) ** 2
    return {
        "estimate": mean_p_value(estimates, smoothed.totals),
        "path": mean_p_value(paths, smoothed.mean),
        "spread of the path": mean_p_value(second, np.diag(smoothed.cov)),
    }


def test_the_fixed_problems_are_those_of_the_published_table():
    # Kalman filter and smoother, computed elsewhere
    for name, totals, log_evidence in (
        ("OW", (0.44561021, 4.81564536, 3.50349103), -70.89868222),
        ("PPG1d", (1.79054101, 129.59137616, 109.54469942), -66.95964360),
    ):
        smoothed = problem(name, 50)[2]
        np.testing.assert_allclose(smoothed.totals, totals, rtol=1e-7)
        np.testing.assert_allclose(smoothed.log_evidence, log_evidence, rtol=1e-9)


SIZES = [(2, 1), (4, 2), (10, 2), (2, 2), (4, 1), (10, 1)]


@pytest.mark.parametrize("name", ["OW", "PPG1d"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((2, 1), {"method": "exact"}),
        ((4, 2), {"method": "exact"}),
        ((4, 2), {"method": "mcmc"}),
        ((4, 2), {"method": "exact", "proposal": "guided"}),
    ],
)
def test_an_exact_path_gives_unbiased_estimates_and_an_exact_path(name, size, options):
    p_values = stationarity(ParisianGibbs, name, *size, num=10_000, **options)
    assert min(p_values.values()) > FALSE_ALARM, p_values


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "mcmc"])
@pytest.mark.parametrize("num_backward", [1, 2])
@pytest.mark.parametrize("num_particles", [2, 4, 10])
@pytest.mark.parametrize("name", ["OW", "PPG1d"])
def test_an_exact_path_gives_unbiased_estimates_and_an_exact_path_at_every_size(
    name, num_particles, num_backward, method
):
    p_values = stationarity(ParisianGibbs, name, num_particles, num_backward, num=50_000, method=method)
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_missing_rows_are_integrated_out():
    name, ys = "PPG1d", np.array(problem("PPG1d", 50)[1])
    ys[[0, 3, 20, 21, 22, 50]] = np.nan
    p_values = stationarity(ParisianGibbs, name, 4, 2, num=10_000, ys=_with_data(name, ys), method="exact")
    assert min(p_values.values()) > FALSE_ALARM, p_values


def _with_data(name, ys):
    from ppg_models import PARAMETERS, Scalar, smooth

    return Scalar(**PARAMETERS[name]), jnp.asarray(ys), smooth(np.asarray(ys, np.float64), **PARAMETERS[name])


@pytest.mark.parametrize(
    ("bug", "name", "num"),
    [
        (planted.UnweightedBackward, "OW", 5_000),
        (planted.ShiftedBackward, "OW", 5_000),
        (planted.UnweightedAverage, "PPG1d", 5_000),
        (planted.ReferenceNotInserted, "OW", 5_000),
        (planted.ReferenceExcludedAtTheEnd, "OW", 5_000),
        (planted.SystematicParisian, "OW", 40_000),
    ],
)
def test_stationarity_is_lost_by_every_planted_bug(bug, name, num):
    p_values = stationarity(bug, name, 4, 2, num=num, method="exact")
    assert min(p_values.values()) < FALSE_ALARM, p_values
