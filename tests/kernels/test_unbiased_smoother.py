"""Coupled conditional PaRIS: the law of each chain, how often indices are equal, and no bias with few particles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ppg_models import TOTALS, exact_paths, mean_and_error, problem, smooth, spread_and_error

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import ConditionalSMC, ParisianGibbs, coupled_sweep, paris, unbiased_smoother
from bayesinf.kernels.coupled_sweep import _couple_indices
from bayesinf.kernels.unbiased_smoother import _meet


def test_indices_have_their_laws_and_are_equal_as_often_as_can_be():
    log_x = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 0.0]))
    log_y = jnp.log(jnp.asarray([0.1, 0.3, 0.4, 0.2])) + 7.0  # unnormalised
    draw = jax.jit(
        _couple_indices, static_argnums=3
    )  # of two equal laws nothing is left over, which eagerly is an error
    x, y = draw(jax.random.key(0), log_x, log_y, 200_000)
    assert mean_p_value(jax.nn.one_hot(x, 3), np.array([0.5, 0.3, 0.2])) > FALSE_ALARM
    assert int(jnp.max(x)) == 2  # a weight of zero is never drawn
    assert mean_p_value(jax.nn.one_hot(y, 4), np.array([0.1, 0.3, 0.4, 0.2])) > FALSE_ALARM
    assert mean_p_value(1.0 * (x == y), 0.1 + 0.3 + 0.2) > FALSE_ALARM
    same, again = draw(jax.random.key(1), log_x, log_x, 1_000)
    np.testing.assert_array_equal(same, again)


def short_problem():
    model, ys, _ = problem("PPG1d", 50)
    ys = ys[:6]
    parameters = {name: float(getattr(model, name)) for name in ("a", "q", "b", "r", "P0")}
    return model, ys, smooth(np.asarray(ys, np.float64), **parameters)


def test_each_chain_has_the_law_of_parisian_gibbs():
    """From two exact paths: both estimates are unbiased, both new paths exact."""
    model, ys, smoothed = short_problem()
    kernel = ParisianGibbs(model, ys, TOTALS, 4, 2)
    paths = exact_paths(jax.random.key(0), smoothed, 10_000).reshape(2, 5_000, 6)
    keys = jax.random.split(jax.random.key(1), 5_000)
    run = jax.jit(jax.vmap(lambda key, x, y: coupled_sweep(key, kernel, x, y)))
    new, estimates, is_lost = run(keys, *paths)
    assert not np.any(is_lost)
    for path, estimate in zip(new, estimates, strict=True):
        assert mean_p_value(estimate, smoothed.totals) > FALSE_ALARM
        assert mean_p_value(path, smoothed.mean) > FALSE_ALARM
        assert mean_p_value((np.asarray(path) - smoothed.mean) ** 2, np.diag(smoothed.cov)) > FALSE_ALARM
    together, same, _ = run(keys[:100], paths[0, :100], paths[0, :100])
    np.testing.assert_array_equal(*together)
    # the two sums are compiled apart, and may be rounded apart
    np.testing.assert_allclose(*same, rtol=1e3 * float(jnp.finfo(same[0].dtype).eps))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_a_coupled_sweep():
    model, ys, _ = short_problem()
    path = jnp.zeros(6)
    with pytest.raises(ValueError, match="kernel must be a ParisianGibbs, which both chains are of, got Conditional"):
        coupled_sweep(0, ConditionalSMC(model, ys, 4), path, path)
    with pytest.raises(ValueError, match="6 rows of ys"):
        coupled_sweep(0, ParisianGibbs(model, ys, TOTALS, 4, 2), path, path[:5])


def replicates(num_replicates, **options):
    model, ys, smoothed = short_problem()
    found = unbiased_smoother(2, model, ys, TOTALS, num_particles=8, num_replicates=num_replicates, **options)
    return found, smoothed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:half of the pairs met after")  # of a single sweep, on purpose
@pytest.mark.parametrize("options", [{"burn_in": 1, "num_sweeps": 1}, {}])  # the first has the largest correction
def test_there_is_no_bias_where_paris_has_one(options):
    found, smoothed = replicates(1_000, **options)
    assert mean_p_value(found.replicates, smoothed.totals) > FALSE_ALARM
    spread = np.asarray(found.replicates).std(0, ddof=1) / np.sqrt(1_000)
    np.testing.assert_allclose(found.standard_error, spread, rtol=1e-3)
    model, ys, _ = short_problem()
    keys = jax.random.split(jax.random.key(0), 4_000)
    plain = jax.jit(jax.vmap(lambda key: paris(key, model, ys, TOTALS, num_particles=8, throw=False).estimate))(keys)
    assert mean_p_value(plain, smoothed.totals) < FALSE_ALARM


def test_the_estimate_is_the_sum_that_the_docstring_states():
    """Sweep by sweep, and the sum written out as it stands there, to the last term that is not zero."""
    model, ys, smoothed = short_problem()
    kernel = ParisianGibbs(model, ys, TOTALS, 4, 2, "exact")
    pairs = exact_paths(jax.random.key(3), smoothed, 12).reshape(2, 6, 6)
    keys, k, m = jax.random.split(jax.random.key(4), 6), 2, 4
    found, times, _ = _meet(kernel, keys, pairs, jnp.asarray([k, m, 1_000]))
    both = jax.jit(lambda key, x, y: coupled_sweep(key, kernel, x, y))
    begin = jax.jit(lambda key, x: kernel.step(key, kernel.init(x)))
    assert int(jnp.max(times)) > m  # some meet late, and have terms beyond the average
    for i, key in enumerate(keys):
        first, info = begin(jax.random.fold_in(key, 0), pairs[0, i])
        x, y, h_x, h_y = first.position, pairs[1, i], {1: np.asarray(info.estimate, np.float64)}, {}
        last = max(m, int(times[i]))
        for l in range(1, last):  # noqa: E741  as in the formula
            (x, y), (estimate_x, estimate_y), _ = both(jax.random.fold_in(key, l), x, y)
            h_x[l + 1], h_y[l] = np.asarray(estimate_x, np.float64), np.asarray(estimate_y, np.float64)
        expected = sum(h_x[l] for l in range(k, m + 1)) / (m - k + 1)  # noqa: E741
        for l in range(k + 1, int(times[i]) + 1):  # noqa: E741
            expected = expected + min(1, (l - k) / (m - k + 1)) * (h_x[l] - h_y[l - 1])
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_published_meeting_times_and_errors():
    """OW, T = 50, N = 40, k = 3, m = 10: meetings after 9.3 sweeps on average, standard deviations 1.02, .41, .38."""
    model, ys, smoothed = problem("OW", 50)
    options = {"burn_in": 3, "num_sweeps": 10}
    found = unbiased_smoother(0, model, ys, TOTALS, num_particles=40, num_replicates=400, **options)
    assert mean_p_value(found.replicates, smoothed.totals) > FALSE_ALARM
    assert int(np.max(found.meeting_time)) <= 60
    mean, error = mean_and_error(found.meeting_time)
    # what is published is an estimate too, from 1,000 replicates, and rounded
    z = scipy.stats.norm.isf(FALSE_ALARM / 2)
    assert abs(mean - 9.3) < z * error * np.hypot(1, np.sqrt(0.4)) + 0.05
    for estimates, published in zip(np.asarray(found.replicates).T, (1.02, 0.41, 0.38), strict=True):
        spread, error = spread_and_error(estimates)
        assert abs(spread - published) < z * error * np.hypot(1, np.sqrt(0.4)) + 0.005


@pytest.mark.usefixtures("unchecked")
def test_pairs_that_do_not_meet_are_told_with_the_result():
    with pytest.raises(errors.SamplingError, match="did not meet within 1 sweeps: take more particles") as caught:
        replicates(3, burn_in=1, num_sweeps=1, max_sweeps=1)
    assert caught.value.draws.meeting_time.tolist() == [2, 2, 2]
    found, _ = replicates(3, burn_in=1, num_sweeps=1, max_sweeps=1, throw=False)
    assert np.all(np.isnan(found.replicates))
    assert not np.any(found.is_lost)
    with pytest.raises(ValueError, match="burn_in <= num_sweeps <= max_sweeps is needed, got 5, 3 and 1000"):
        replicates(3, burn_in=5, num_sweeps=3)


@pytest.mark.usefixtures("unchecked")
def test_weights_that_vanish_are_told_from_chains_that_do_not_meet():
    """One row that nothing explains: a replicate ends at once, and the cure is not more particles alone."""
    model, ys, _ = short_problem()
    impossible = ys.at[3].set(0.5 * float(jnp.finfo(ys.dtype).max))
    options = {"num_particles": 8, "num_replicates": 2}
    with pytest.raises(errors.DegenerateWeightsError, match="In 2 of 2 pairs of chains no particle of 8") as caught:
        unbiased_smoother(0, model, impossible, TOTALS, **options)
    assert "proposal='guided'" in str(caught.value)
    found = unbiased_smoother(0, model, impossible, TOTALS, throw=False, **options)
    for result in (found, caught.value.result):
        assert np.all(result.is_lost)
        assert not np.any(result.is_met)
        assert np.all(np.isnan(result.replicates))
