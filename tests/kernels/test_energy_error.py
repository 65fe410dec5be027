"""Warm-up by the energy error: the step size that it finds has the bias that was allowed, by closed forms."""

import dataclasses

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.energy_error import Observed, _kinetic, _scheme

SPECTRUM = np.array([0.5, 1.0, 1.0, 2.0, 3.0, 4.0])
TARGET = bi.Target(lambda x, spectrum: -0.5 * jnp.sum(spectrum * x**2), jnp.asarray(SPECTRUM))
FRICTION = 1.5

KERNELS = {
    "LMC": (kernels.LMC(TARGET, 0.1), 0.05),
    "RandomizedMidpoint": (kernels.RandomizedMidpoint(TARGET, 0.1), 0.002),
    "ParallelMidpoint": (kernels.ParallelMidpoint(TARGET, 0.1, num_nodes=2), 0.001),
    "KineticLangevin": (kernels.KineticLangevin(TARGET, 0.1, FRICTION), 0.05),
    "RandomizedMidpointKinetic": (kernels.RandomizedMidpointKinetic(TARGET, 0.1, FRICTION), 0.0002),
    "OBABO": (kernels.Splitting("OBABO", TARGET, 0.1, FRICTION), 0.02),
    "BUB": (kernels.Splitting("BUB", TARGET, 0.1, FRICTION), 0.02),
    "UBU": (kernels.Splitting("UBU", TARGET, 0.1, FRICTION), 0.02),
    "BAOAB": (kernels.Splitting("BAOAB", TARGET, 0.1, FRICTION), 0.02),
    "ABOBA": (kernels.Splitting("ABOBA", TARGET, 0.1, FRICTION), 0.02),
}
WITHOUT_BIAS = ("BAOAB", "ABOBA")  # on Gaussians; theirs is told by OBABO's


def at(name, h):
    return dataclasses.replace(KERNELS[name][0], step_size=h)


def scheme(name, h, lam):
    match name:
        case "LMC":
            return closed_forms.lmc(h, lam)
        case "RandomizedMidpoint":
            return closed_forms.randomized_midpoint(h, lam)
        case "ParallelMidpoint":
            return closed_forms.parallel_midpoint(h, lam, 2, 3)
        case "KineticLangevin":
            return closed_forms.kinetic(h, lam, FRICTION, 1.0)
        case "RandomizedMidpointKinetic":
            return closed_forms.randomized_midpoint_kinetic(h, lam, FRICTION, 1.0)
    return closed_forms.splitting(name, h, lam, FRICTION, 1.0)


def energy_variance(name, h, spectrum):
    """The mean over the directions of the exact variance of tau lam^2 (x'^2 - x^2) / 4 in the chain's own law."""
    tau = h**2 / 2 if hasattr(KERNELS[name][0], "friction") else h
    variances = []
    for lam in spectrum:
        linear = scheme(name, h, lam)
        covariance = closed_forms.stationary(linear)
        s = covariance[0, 0]
        rho = sum(w * A @ covariance for w, A, _ in linear)[0, 0] / s
        variances.append((tau * lam) ** 2 / 4 * (lam * s) ** 2 * (1 - rho**2))
    return np.mean(variances)


def root(name, spectrum):
    """The step size at which the exact energy variance is what the warm-up aims at."""

    def excess(h):
        return energy_variance(name, h, spectrum) / float(_scheme(at(name, h), KERNELS[name][1]).variance) - 1

    largest = 0.01
    while excess(largest) < 0:
        largest *= 1.1
    return brentq(excess, 0.9 * largest, largest)


def mean_bias(name, h, spectrum):
    return np.mean(kernels.gaussian_error(at(name, h), spectrum).variance_bias)


@pytest.mark.parametrize("name", KERNELS)
def test_aim_is_the_bias_on_a_round_gaussian(name):
    """By closed forms alone: exact for three, to leading order in the step for the others."""
    bias = KERNELS[name][1]
    found = abs(mean_bias(name, root(name, [1.0]), [1.0]))
    if name in WITHOUT_BIAS:
        assert found < 1e-9
        found = mean_bias("OBABO", root(name, [1.0]), [1.0])
    if name in ("LMC", "OBABO", *WITHOUT_BIAS):
        np.testing.assert_allclose(found, bias, rtol=1e-4)
    else:
        # the next order: of the step size, which is largest for the randomized midpoint, b = z^3 / 6
        assert bias / (1 + root(name, [1.0])) < found < bias * (1 + root(name, [1.0]) / 4)


@pytest.mark.parametrize("a", [1e-3, 0.03, 0.0999, 0.1001, 1.0, 30.0])
def test_phi_is_told_to_all_digits(a):
    """For every friction times step size a, by the series or not."""
    phi = _kinetic(kernels.Splitting("BAOAB", TARGET, 0.1, a / 0.1))[3]
    np.testing.assert_allclose(phi, 2 * (a + np.expm1(-a)) / a**2, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_mean_bias_over_directions_is_at_most_the_one_allowed(name):
    h = root(name, SPECTRUM)
    next_order = h * SPECTRUM.max() if name == "RandomizedMidpoint" else 0.0  # of b = z^3 / 6 (1 + z + ...)
    assert abs(mean_bias(name, h, SPECTRUM)) <= KERNELS[name][1] * (1 + next_order)


@pytest.mark.parametrize("name", KERNELS)
def test_warmup_finds_it(name):
    """The mean over chains of what each has found, in units of the energy variance, is the exact one."""
    kernel, bias = KERNELS[name]
    num_warmup = 2_000
    draws = bi.sample(
        1, kernel, jnp.ones((64, SPECTRUM.size)), num_samples=1, num_warmup=num_warmup, progress=False,
        warmup=kernels.EnergyError(num_warmup, bias),
    )  # fmt: skip
    found = np.asarray(draws.tuned.step_size, np.float64)
    ratios = (found / root(name, SPECTRUM)) ** _scheme(kernel, bias).order
    assert np.std(ratios) < 0.5
    assert mean_p_value(ratios[:, None], np.ones(1)) > FALSE_ALARM


@pytest.mark.parametrize(("name", "step_size"), [("OBABO", 1e-3), ("OBABO", 3.0), ("BAOAB", 10.0), ("LMC", 30.0)])
def test_start_may_be_far_off(name, step_size):
    """Also where the kernel is unstable at first, which throws the chain far out of the bulk."""
    kernel = at(name, jnp.asarray(step_size))
    warmup = kernels.EnergyError(1_000, KERNELS[name][1])
    draws = bi.sample(
        0, kernel, jnp.ones((16, SPECTRUM.size)), num_samples=1, num_warmup=1_000, warmup=warmup, progress=False
    )
    assert np.all(np.abs(np.log(np.asarray(draws.tuned.step_size) / root(name, SPECTRUM))) < 0.2)


def test_a_step_that_was_lost_halves_the_step_size_at_first():
    warmup, kernel = kernels.EnergyError(1_000, 0.05), KERNELS["OBABO"][0]
    lost = Observed(jnp.asarray(0.0), jnp.asarray(6.0), jnp.asarray(True))
    state = warmup.update(warmup.init(kernel, jnp.zeros(2)), jnp.asarray(0), jnp.zeros(2), lost)
    np.testing.assert_allclose(state.step_size, kernel.step_size / 2, rtol=1e-5)


@pytest.mark.parametrize("factor", [[0.1, 1.0, 7.0], [[0.1, 0.0, 0.0], [0.5, 1.0, 0.0], [2.0, -3.0, 7.0]]])
def test_precondition_moves_in_other_coordinates(factor):
    """With the scale of the target a warm-up of the preconditioned kernel is that of the round one, step by step."""
    factor = jnp.asarray(factor)
    tril = jnp.diag(factor) if factor.ndim == 1 else factor

    def logdensity(x, tril):
        z = jax.scipy.linalg.solve_triangular(tril, x, lower=True)
        return -0.5 * z @ z

    def run(kernel, start):
        warmup = kernels.EnergyError(50, 0.05, metric="given")
        return bi.sample(0, kernel, start, num_samples=1, num_warmup=50, warmup=warmup, progress=False).tuned.step_size

    plain = run(kernels.LMC(bi.Target(logdensity, jnp.eye(3)), 0.1), jnp.ones((2, 3)))
    kernel = kernels.Precondition(kernels.LMC(bi.Target(logdensity, tril), 0.1), factor)
    scaled = run(kernel, jnp.ones((2, 3)) @ tril.T)
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)


WIDTHS = np.array([0.3, 1.0, 2.0])
CORRELATED = np.diag(WIDTHS) @ np.array([[1.0, 0.8, 0.0], [0.8, 1.0, -0.5], [0.0, -0.5, 1.0]]) @ np.diag(WIDTHS)


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("name", "metric"),
    [("BAOAB", "diagonal"), pytest.param("BAOAB", "dense", marks=pytest.mark.slow), ("UBU", "dense")],
)
def test_the_metric_is_learnt_and_the_step_size_for_it(name, metric):
    """Each chain has a metric of its own; its step size is the root on the spectrum that it then sees."""
    precision = np.linalg.inv(CORRELATED if metric == "dense" else np.diag(WIDTHS**2))
    target = bi.Target(lambda x, precision: -0.5 * x @ precision @ x, jnp.asarray(precision))
    kernel = kernels.Precondition(at(name, 0.01).with_target(target))
    draws = bi.sample(
        3, kernel, jnp.full((64, 3), 0.1), num_samples=1, num_warmup=2_000, progress=False,
        warmup=kernels.EnergyError(2_000, KERNELS[name][1], metric=metric),
    )  # fmt: skip
    learnt = np.asarray(draws.tuned.inverse_mass_matrix, np.float64)
    covariances = learnt if metric == "dense" else learnt[:, :, None] * np.eye(3)
    ratios = []
    for covariance, step_size in zip(covariances, np.asarray(draws.tuned.step_size, np.float64), strict=True):
        spectrum = np.linalg.eigvals(covariance @ precision).real
        assert np.ptp(np.log(spectrum)) < np.ptp(np.log(np.linalg.eigvalsh(precision)))  # rounder than it was
        ratios.append((step_size / root(name, spectrum)) ** _scheme(kernel, KERNELS[name][1]).order)
    assert mean_p_value(np.asarray(ratios)[:, None], np.ones(1)) > FALSE_ALARM


def test_the_metric_is_renewed_where_its_window_ends():
    """What is applied at the window ends alone makes the same chain, bit for bit, as applying it after every step."""

    class EveryStep(kernels.EnergyError):
        def is_metric_new(self, step):
            return True

    kernel = kernels.Precondition(KERNELS["BAOAB"][0])
    draws = [
        bi.sample(0, kernel, jnp.ones((2, 6)), num_samples=5, num_warmup=160, progress=False, warmup=warmup)
        for warmup in (kernels.EnergyError(160, metric="dense"), EveryStep(160, metric="dense"))
    ]
    np.testing.assert_array_equal(draws[0]["x"], draws[1]["x"])
    assert not np.array_equal(draws[0].tuned.inverse_mass_matrix[0], np.eye(6))


@pytest.mark.parametrize("has_metric", [False, True])
def test_gains_fall_once_the_metric_is_set(has_metric):
    """log h moves by -log(1 + a (ratio - 1)) / q, with a = 0.2 until a quarter of the steps, or the last window."""
    warmup, kernel = kernels.EnergyError(1_000), KERNELS["OBABO"][0]
    kernel = kernels.Precondition(kernel) if has_metric else kernel
    last = 1_000 // 4 if not has_metric else int(warmup.windows.ends.max()) + 1
    assert last == (750 if has_metric else 250)
    state = warmup.init(kernel, jnp.zeros(6))
    observed = Observed(jnp.asarray(1.5), jnp.asarray(6.0), jnp.asarray(False))
    for step, gain in ((last - 1, 0.2), (last, 0.2), (last + 30, 3 / 45)):
        moved = warmup.update(state, jnp.asarray(step), jnp.ones(6), observed)
        np.testing.assert_allclose(moved.step_size / state.step_size, (1 + gain / 2) ** (-1 / 6), rtol=1e-6)


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_a_given_scale_is_where_the_metric_begins(metric):
    widths = jnp.array([0.01, 1.0, 10.0])
    scale = jnp.diag(widths) if metric == "dense" else widths
    target = bi.Target(lambda x: -0.5 * jnp.sum((x / widths) ** 2))
    kernel = kernels.Precondition(kernels.Splitting("BAOAB", target, 0.3), scale)
    given = np.asarray(scale**2)
    for warmup in (kernels.EnergyError(15, 0.02, metric=metric), kernels.EnergyError(300, 0.02, metric=metric)):
        np.testing.assert_allclose(warmup.init(kernel, jnp.zeros(3)).inverse_mass_matrix, given)
        num = int(warmup.num_warmup)
        draws = bi.sample(
            0, kernel, widths * jnp.ones((4, 3)), num_samples=200, num_warmup=num, warmup=warmup, progress=False
        )
        if num < 20:  # no window fits: it stays
            np.testing.assert_allclose(draws.tuned.inverse_mass_matrix, np.broadcast_to(given, (4, *given.shape)))
        assert np.all(np.abs(draws["x"]) < 10 * np.asarray(widths))
    if metric == "dense":
        with pytest.raises(ValueError, match="metric='diagonal' would drop the correlations"):
            kernels.EnergyError(100).prepare(kernel, jnp.zeros((2, 3)), 100)


@pytest.mark.parametrize("name", ["BAOAB", "KineticLangevin", "LMC"])
def test_an_unstable_step_size_is_halved_before_the_first_step(name):
    """BAOAB is stable below 2 / sqrt(4) on this spectrum, LMC below 2 / 4; a stable step size stays as it is."""
    limit = {"BAOAB": 1.0, "LMC": 0.5}.get(name, 1.0)
    starts = jnp.ones((4, SPECTRUM.size))
    for factor in (0.4, 20.0, 1e6):
        kernel = at(name, jnp.asarray(factor * limit))
        prepared = kernels.EnergyError(100).prepare(kernel, starts, 100)
        found = float(prepared.step_size)
        assert found == float(kernel.step_size) if factor < 1 else 0.25 * limit < found < 2 * limit


def test_the_metric_is_learnt_together():
    target = bi.Target(lambda x: -0.5 * jnp.sum((x / jnp.asarray(WIDTHS)) ** 2))
    kernel = kernels.Precondition(at("BAOAB", 0.01).with_target(target))
    warmup = kernels.EnergyError(500, 0.02, is_pooled=True)
    draws = bi.sample(0, kernel, jnp.full((64, 3), 0.1), num_samples=1, num_warmup=500, progress=False, warmup=warmup)
    metrics = np.asarray(draws.tuned.inverse_mass_matrix)
    np.testing.assert_array_equal(metrics, np.broadcast_to(metrics[0], metrics.shape))
    assert np.ptp(np.log(metrics[0] / WIDTHS**2)) < 0.1 * np.ptp(np.log(WIDTHS**2))
    assert len(np.unique(draws.tuned.step_size)) == 1


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="metric must be one of"):
        kernels.EnergyError(100, metric="full")
    for bias in (0.0, 1.0, jnp.nan):
        with pytest.raises(ValueError, match="bias must lie in"):
            kernels.EnergyError(100, bias)
    with pytest.raises(ValueError, match="num_warmup"):
        kernels.EnergyError(0)
    for kernel, name in [(kernels.MALA(TARGET, 0.1), "MALA"), (kernels.Splitting("ABO", TARGET, 0.1), "ABO")]:
        with pytest.raises(ValueError, match=f"knows LMC.*{name}"):
            bi.sample(
                0, kernel, jnp.ones((2, 6)), num_samples=1, num_warmup=9, warmup=kernels.EnergyError(9), progress=False
            )
