"""Conditional PaRIS against the exact smoothing law, its planted bugs, and the roll-out estimator."""

from functools import lru_cache
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from planted import parisian as planted
from ppg_models import (
    PARAMETERS,
    TOTALS,
    Scalar,
    assert_published,
    exact_paths,
    mean_and_error,
    problem,
    smooth,
    spread_and_error,
)

import bayesinf as bi
from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import AdditiveFunctional, ParisianGibbs, backward_sample, paris, particle_filter, ppg

BATCH = 5000  # what is compiled: any number of replicates is a number of these


@eqx.filter_jit
def _sweep_batch(kernel, keys, paths):
    def one(key, path):
        state, info = kernel.step(key, kernel.init(path))
        return state.position, info.estimate

    return jax.vmap(one)(keys, paths)


_step = eqx.filter_jit(lambda kernel, key, state: kernel.step(key, state))


def _sweep(kernel, key, paths):
    """New paths and estimates, of independent replicates."""
    keys = jax.random.split(key, len(paths))
    slices = [slice(i, i + BATCH) for i in range(0, len(paths), BATCH)]
    batches = [_sweep_batch(kernel, keys[part], paths[part]) for part in slices]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)


def stationarity(kernel_class, name, num_particles, num_backward, *, num, ys=None, **options):
    """P-values of E[estimate] and of E[new path] after one sweep from exact draws of the smoothing law."""
    model, ys_fixed, smoothed = problem(name, 50) if ys is None else ys
    key_paths, key_sweeps = jax.random.split(jax.random.key(20240611))
    kernel = kernel_class(model, ys_fixed, TOTALS, num_particles, num_backward, **options)
    paths, estimates = _sweep(kernel, key_sweeps, exact_paths(key_paths, smoothed, num))
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


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        *(
            (name, *case)
            for name in ("OW", "PPG1d")
            for case in (
                ((2, 1), {"method": "exact"}),
                ((4, 2), {"method": "mcmc"}),
                ((4, 2), {"method": "exact", "proposal": "guided"}),
            )
        ),
    ],
)
def test_an_exact_path_gives_unbiased_estimates_and_an_exact_path(name, size, options):
    # of this many, a variance that is off by a twentieth is seen
    p_values = stationarity(ParisianGibbs, name, *size, num=20_000, **options)
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


@pytest.mark.usefixtures("run_fast")
def test_missing_rows_are_integrated_out():
    name, ys = "PPG1d", np.array(problem("PPG1d", 50)[1])
    ys[[0, 3, 20, 21, 22, 50]] = np.nan
    p_values = stationarity(ParisianGibbs, name, 4, 2, num=10_000, ys=_with_data(name, ys), method="mcmc")
    assert min(p_values.values()) > FALSE_ALARM, p_values


def _with_data(name, ys):
    return Scalar(**PARAMETERS[name]), jnp.asarray(ys), smooth(np.asarray(ys, np.float64), **PARAMETERS[name])


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("bug", "name", "num"),
    [
        (planted.UnweightedBackward, "OW", 5_000),
        (planted.ShiftedBackward, "OW", 5_000),
        (planted.UnweightedAverage, "PPG1d", 5_000),
        (planted.ReferenceNotInserted, "OW", 5_000),
        (planted.ReferenceExcludedAtTheEnd, "OW", 5_000),
        pytest.param(planted.SystematicParisian, "OW", 40_000, marks=pytest.mark.slow),
    ],
)
def test_stationarity_is_lost_by_every_planted_bug(bug, name, num):
    p_values = stationarity(bug, name, 4, 2, num=num, method="exact")
    assert min(p_values.values()) < FALSE_ALARM, p_values


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize("name", ["OW", "PPG1d"])
def test_the_planted_class_without_its_bug_passes(name):
    p_values = stationarity(ParisianGibbs, name, 4, 2, num=40_000, method="exact")
    assert min(p_values.values()) > FALSE_ALARM, p_values


# ---- the roll-out ----


@eqx.filter_jit
def _run_paris(keys, model, ys, num_particles):
    def one(key):
        return paris(key, model, ys, TOTALS, num_particles=num_particles, method="exact").estimate

    return jax.lax.map(one, keys, batch_size=500)


@eqx.filter_jit
def _first_paths(keys, model, ys, num_particles):
    """Paths as PaRIS would draw them."""

    def one(key):
        key_filter, key_path = jax.random.split(key)
        options = {"num_particles": num_particles, "resampling": "multinomial", "ess_threshold": 1.0, "store": "full"}
        filtered = particle_filter(key_filter, model, ys, **options)
        return backward_sample(key_path, model, filtered, 1, "exact")[0]

    return jax.lax.map(one, keys, batch_size=500)


@eqx.filter_jit
def _run_ppg(keys, paths, model, ys, num_particles, num_sweeps, burn_in):
    def one(row):
        key, path = row
        options = {"num_particles": num_particles, "num_sweeps": num_sweeps, "burn_in": burn_in, "method": "exact"}
        result = ppg(key, model, ys, TOTALS, initial_path=path, **options)
        return result.estimate, result.estimates

    return jax.lax.map(one, (keys, paths), batch_size=500)


@lru_cache
def _paris_errors(num_particles, num):
    """Estimates of PaRIS for PPG1d less the exact totals."""
    model, ys, smoothed = problem("PPG1d", 50)
    estimates = _run_paris(jax.random.split(jax.random.key(num_particles), num), model, ys, num_particles)
    return np.asarray(estimates, np.float64) - smoothed.totals


def _z(samples):
    mean, error = mean_and_error(samples)
    return mean / error


@pytest.mark.slow
def test_the_bias_decays_geometrically_over_the_sweeps():
    num, tolerance = 15_000, 0.5
    model, ys, smoothed = problem("PPG1d", 50)
    errors_each = [_paris_errors(10, num + 1_000)[:, 1]]  # of the sum of squares
    paths = _first_paths(jax.random.split(jax.random.key(0), num), model, ys, 10)
    kernel = ParisianGibbs(model, ys, TOTALS, 10, 2, "exact")
    for i in range(4):
        paths, estimates = _sweep(kernel, jax.random.key(1 + i), paths)
        errors_each.append(np.asarray(estimates, np.float64)[:, 1] - smoothed.totals[1])
    # the first is that of PaRIS itself
    for error, published in zip(errors_each, (-26.1, -17.3, -11.8, -8.40, -6.17), strict=True):
        assert_published(mean_and_error(error), published, tolerance)
    # each sweep takes away at least a tenth of the bias, and leaves at least half
    for before, after in pairwise(errors_each[1:]):
        assert _z(after - 0.9 * before) > 5
        assert _z(after - 0.5 * before) < -5


@pytest.mark.slow
def test_the_roll_out_has_no_visible_bias_where_paris_has():
    model, ys, smoothed = problem("PPG1d", 50)
    key_paths, key_sweeps = jax.random.split(jax.random.key(2))
    num = 1_200
    paths = _first_paths(jax.random.split(key_paths, num), model, ys, 40)
    estimate, estimates = _run_ppg(jax.random.split(key_sweeps, num), paths, model, ys, 40, 10, 5)
    np.testing.assert_allclose(estimate, np.mean(np.asarray(estimates)[:, 5:], axis=1), rtol=1e-5)
    assert mean_p_value(estimate, smoothed.totals) > FALSE_ALARM
    error = np.asarray(estimate, np.float64)[:, 1] - smoothed.totals[1]  # of the sum of squares
    assert_published(mean_and_error(error), 0.0, 0.6)
    assert_published(spread_and_error(error), 3.9, 0.4)
    # PaRIS of as many particles
    assert mean_p_value(_paris_errors(40, 4_000), 0.0) < FALSE_ALARM


SIZES = {20: 8_000, 40: 4_000, 80: 5_000}  # replicates for each number of particles


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("num_particles", "published", "tolerance"),
    [
        pytest.param(20, -288, 12, marks=pytest.mark.slow),
        (40, -305, 25),
        pytest.param(80, -305, 50, marks=pytest.mark.slow),
    ],
)
def test_the_bias_of_paris_is_the_published_one(num_particles, published, tolerance):
    error = _paris_errors(num_particles, SIZES[num_particles])[:, 1]
    assert_published(mean_and_error(num_particles * error), published, tolerance)


@pytest.mark.slow
def test_the_bias_of_paris_is_of_order_one_over_the_number_of_particles():
    sizes = np.array(list(SIZES))
    bias, error = np.transpose([mean_and_error(_paris_errors(*size)[:, 1]) for size in SIZES.items()])
    # the slope is a contrast of log |bias|
    contrast = np.log(sizes) - np.mean(np.log(sizes))
    contrast /= np.sum(contrast**2)
    slope = contrast @ np.log(np.abs(bias)), np.linalg.norm(contrast * error / bias)
    assert_published(slope, -0.975, 0.125)


@pytest.mark.slow
def test_consecutive_estimates_correlate_like_one_over_the_root_of_the_number_of_particles():
    model, ys, smoothed = problem("PPG1d", 50)
    num = 10_000
    for num_particles, published in ((10, 1.78), (20, 1.88), (40, 1.75)):
        kernel = ParisianGibbs(model, ys, TOTALS, num_particles, 2, "exact")
        paths, first = _sweep(kernel, jax.random.key(1), exact_paths(jax.random.key(0), smoothed, num))
        _, second = _sweep(kernel, jax.random.key(2), paths)
        u, v = (scipy.stats.zscore(np.asarray(estimates, np.float64)[:, 1]) for estimates in (first, second))
        correlation = np.mean(u * v)
        error = np.std(u * v - correlation * (u**2 + v**2) / 2) / np.sqrt(num)  # by the delta method
        root = np.sqrt(num_particles)
        assert_published((correlation * root, error * root), published, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "published"), [("exact", 0.87), ("mcmc", 0.80)])
def test_the_first_state_is_refreshed_at_the_published_rate(method, published):
    """Backward draws by one Metropolis step from the ancestor keep more of the reference than exact ones."""
    model, ys, smoothed = problem("OW", 50)
    kernel = ParisianGibbs(model, ys, TOTALS, 10, 2, method)
    old = exact_paths(jax.random.key(6), smoothed, 40_000)
    new, _ = _sweep(kernel, jax.random.key(7), old)
    assert_published(mean_and_error(new[:, 0] != old[:, 0]), published, 0.01)


@pytest.mark.slow
def test_metropolis_steps_backward_cost_little_variance():
    """The published excess of the standard deviation over that of exact draws is one to six per cent."""
    model, ys, smoothed = problem("OW", 50)
    paths = exact_paths(jax.random.key(8), smoothed, 40_000)
    each = []
    for method in ("exact", "mcmc"):
        _, estimates = _sweep(ParisianGibbs(model, ys, TOTALS, 10, 2, method), jax.random.key(9), paths)
        each.append([spread_and_error(column) for column in np.asarray(estimates).T])
    for (exact, error_exact), (mcmc, error_mcmc) in zip(*each, strict=True):
        ratio = mcmc / exact
        assert_published((ratio, ratio * np.hypot(error_exact / exact, error_mcmc / mcmc)), 1.035, 0.035)


# ---- the functions ----


def test_sweeps_are_those_of_the_kernel_and_go_on_from_the_last_path():
    model, ys, _ = problem("OW", 50)
    options = {"num_particles": 8, "method": "exact"}
    path = jnp.zeros(51)
    result = ppg(7, model, ys, TOTALS, initial_path=path, num_sweeps=3, burn_in=1, **options)
    kernel = ParisianGibbs(model, ys, TOTALS, **options)
    _, key_sweeps = jax.random.split(jax.random.key(7))
    state, is_updated = kernel.init(path), []
    for i in range(3):
        state, info = _step(kernel, jax.random.fold_in(key_sweeps, i), state)
        np.testing.assert_allclose(result.estimates[i], info.estimate, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.log_evidence[i], info.log_evidence, rtol=1e-4)
        is_updated.append(info.is_updated)
    np.testing.assert_allclose(result.path, state.position, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.update_rate, np.mean(is_updated, axis=0), rtol=1e-6)
    np.testing.assert_allclose(result.estimate, np.mean(result.estimates[1:], axis=0), rtol=1e-5)


@pytest.mark.parametrize("method", ["exact", "mcmc", "reject"])
def test_what_the_backward_draws_of_a_sweep_cost_is_told(method):
    """The reference draws backward too: N M draws a step, and none on the way to the first."""
    model, ys, _ = problem("OW", 20)
    kernel = ParisianGibbs(model, ys, TOTALS, num_particles=30, num_backward=2, method=method)
    _, info = _step(kernel, jax.random.key(0), kernel.init(jnp.zeros(21)))
    assert info.num_proposals.shape == info.num_exact.shape == (21,)
    assert info.num_proposals[0] == info.num_exact[0] == 0
    proposals, exact = np.asarray(info.num_proposals[1:]), np.asarray(info.num_exact[1:])
    if method == "reject":
        assert np.all(proposals + exact >= 60)
        assert np.any(proposals > 60)
    else:
        assert np.all(proposals == (60 if method == "mcmc" else 0))
        assert np.all(exact == (60 if method == "exact" else 0))


def test_new_data_and_parameters_compile_nothing():
    traces = []

    def increment(x_prev, x, t):
        traces.append(1)
        return {"lagged": x_prev * x, "several": jnp.stack([x, x**2])}

    functional = AdditiveFunctional(lambda x: {"lagged": 0.0 * x, "several": jnp.stack([x, x**2])}, increment)
    options = {"num_particles": 5, "num_sweeps": 2, "burn_in": 1}
    first = ppg(0, problem("OW", 50)[0], problem("OW", 50)[1], functional, **options)
    count = len(traces)
    second = ppg(1, problem("PPG1d", 50)[0], 2 * problem("OW", 50)[1], functional, **options)
    same = AdditiveFunctional(functional.initial, functional.increment)
    ppg(2, problem("OW", 50)[0], problem("OW", 50)[1], same, **options)
    assert len(traces) == count
    assert first.estimates["several"].shape == (2, 2)
    assert not np.array_equal(first.estimate["lagged"], second.estimate["lagged"])


def test_a_functional_with_arrays_of_its_own_takes_new_ones():
    model, ys, _ = problem("OW", 50)

    def scaled(scale, x_prev, x, t):
        return scale * x

    def smoothed(scale):
        functional = AdditiveFunctional(lambda x: 0.0 * x, jax.tree_util.Partial(scaled, jnp.asarray(scale)))
        return ppg(0, model, ys, functional, num_particles=5, num_sweeps=2, burn_in=0).estimate

    np.testing.assert_allclose(smoothed(3.0), 3.0 * smoothed(1.0), rtol=1e-5)


def test_a_series_of_one_row():
    model, ys, _ = problem("OW", 50)
    result = ppg(0, model, ys[:1], TOTALS, num_particles=4, num_sweeps=3, burn_in=0)
    assert result.path.shape == (1,)
    np.testing.assert_array_equal(result.estimate[2], 0.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_particles": 1}, "num_particles must be at least 2"),
        ({"num_backward": 0}, "num_backward must be at least 1"),
        ({"num_sweeps": 0, "burn_in": 0}, "num_sweeps must be at least 1"),
        ({"burn_in": 3}, "burn_in must be less than num_sweeps"),
        ({"burn_in": -1}, "burn_in must be at least 0"),
        ({"method": "best"}, "method must be one of"),
        ({"proposal": "best"}, "proposal must be one of"),
        ({"initial_path": jnp.zeros(50)}, "51 rows of ys"),
    ],
)
def test_bad_input_is_refused_by_name(change, match):
    model, ys, _ = problem("OW", 50)
    arguments = {"functional": TOTALS, "num_particles": 4, "num_sweeps": 3, "burn_in": 1} | change
    with pytest.raises(ValueError, match=match):
        ppg(0, model, ys, arguments.pop("functional"), **arguments)


def test_impossible_observations_raise_once_with_the_result():
    ys = problem("OW", 50)[1]

    class Bounded(Scalar):
        def observation(self, x, t):
            return (lambda key: x), lambda y: jnp.where(jnp.abs(y) < 5.0, 0.0, -jnp.inf)

    bounded = Bounded(**PARAMETERS["OW"])
    bad = ys.at[7].set(10.0)
    options = {"num_particles": 4, "num_sweeps": 2, "burn_in": 0, "initial_path": jnp.zeros(51)}
    with pytest.raises(errors.DegenerateWeightsError, match="2 of 2 sweeps") as caught:
        ppg(0, bounded, bad, TOTALS, **options)
    assert np.all(np.isnan(caught.value.result.estimate))
    np.testing.assert_array_equal(caught.value.result.path, 0.0)
    result = ppg(0, bounded, bad, TOTALS, throw=False, **options)
    assert np.all(np.isneginf(result.log_evidence))


def test_vanished_weights_give_no_estimate_where_nothing_is_to_raise():
    model = bi.models.StochasticVolatility(-1.0, 0.9, 0.3)
    ys = jnp.array([jnp.finfo(jnp.result_type(float)).max, 1.0])  # its log density is -inf
    options = {"num_particles": 4, "num_sweeps": 2, "burn_in": 1}
    with pytest.raises(errors.DegenerateWeightsError):
        ppg(0, model, ys, TOTALS, **options)
    assert jnp.all(jnp.isnan(ppg(0, model, ys, TOTALS, **options, throw=False).estimate))
