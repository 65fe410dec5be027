"""The error on Gaussians, against an independent implementation, known closed forms and simulation."""

import closed_forms
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value

H, G, U = 0.5, 1.5, 0.75
SPECTRUM = np.array([0.1, 0.5, 2.0])


def nowhere(x):
    return -0.5 * jnp.sum(x**2)


def case(name, target=nowhere, h=H):
    """The kernel, and its scheme by the test's own implementation."""
    if name == "LMC":
        return kernels.LMC(target, h), lambda lam: closed_forms.lmc(h, lam)
    if name == "RandomizedMidpoint":
        return kernels.RandomizedMidpoint(target, h), lambda lam: closed_forms.randomized_midpoint(h, lam)
    if name == "ParallelMidpoint":
        scheme = lambda lam: closed_forms.parallel_midpoint(h, lam, 3, 3)  # noqa: E731
        return kernels.ParallelMidpoint(target, h, num_nodes=3, num_sweeps=3), scheme
    if name == "KineticLangevin":
        return kernels.KineticLangevin(target, h, G, U), lambda lam: closed_forms.kinetic(h, lam, G, U)
    if name == "RandomizedMidpointKinetic":
        scheme = lambda lam: closed_forms.randomized_midpoint_kinetic(h, lam, G, U)  # noqa: E731
        return kernels.RandomizedMidpointKinetic(target, h, G, U), scheme
    return kernels.Splitting(name, target, h, G, U), lambda lam: closed_forms.splitting(name, h, lam, G, U)


RANDOMIZED = ("RandomizedMidpoint", "ParallelMidpoint", "RandomizedMidpointKinetic")
NAMES = ("LMC", "KineticLangevin", *RANDOMIZED, "BAOAB", "ABOBA", "OBABO", "OABAO", "UBU", "BUB", "ABO", "BABAOABAB")


@pytest.mark.parametrize("h", [2**-13, 0.5, 0.75])
@pytest.mark.parametrize("name", NAMES)
def test_stationary_law_agrees_with_the_closed_forms(name, h):
    kernel, scheme = case(name, h=h)
    error = kernels.gaussian_error(kernel, SPECTRUM)
    known = np.array([closed_forms.stationary(scheme(lam))[0, 0] for lam in SPECTRUM])
    # 1 - (contraction) loses digits on both sides, and the closed form of the free flow at small gamma t
    np.testing.assert_allclose(error.variance, known, rtol=1e-3 if h < 0.01 else 1e-12)
    np.testing.assert_allclose(error.variance_bias, SPECTRUM * error.variance - 1)
    np.testing.assert_allclose(error.w2, np.linalg.norm(np.sqrt(error.variance) - SPECTRUM**-0.5), atol=1e-14)
    assert error.is_stable
    assert error.is_exact == (name not in RANDOMIZED)
    assert ("lower bound" in error.statement) == (name in RANDOMIZED)


@pytest.mark.parametrize("name", NAMES)
def test_law_after_some_steps_agrees_with_the_closed_forms(name):
    kernel, scheme = case(name)
    start = np.array([1.3, -2.0, 0.4])
    for num_steps in (0, 1, 17):
        error = kernels.gaussian_error(kernel, SPECTRUM, num_steps=num_steps, start=start)
        squared = 0.0
        for lam, x, variance in zip(SPECTRUM, start, error.variance, strict=True):
            size = scheme(lam)[0][1].shape[0]
            mean, second = closed_forms.moments(scheme(lam), np.array([x, 0.0])[:size], num_steps)
            np.testing.assert_allclose(variance, second[0, 0] - mean[0] ** 2, rtol=1e-10, atol=1e-12)
            squared += mean[0] ** 2 + (np.sqrt(max(second[0, 0] - mean[0] ** 2, 0.0)) - lam**-0.5) ** 2
        np.testing.assert_allclose(error.w2**2, squared, rtol=1e-7)


def test_known_biases():
    z = H * SPECTRUM
    bias = {name: kernels.gaussian_error(case(name)[0], SPECTRUM).variance_bias for name in NAMES}
    np.testing.assert_allclose(bias["LMC"], 1 / (1 - z / 2) - 1)
    np.testing.assert_allclose(bias["RandomizedMidpoint"], (2 - 2 * z + z**2) / (2 - 2 * z + z**2 - z**3 / 3) - 1)
    np.testing.assert_allclose(bias["BAOAB"], 0.0, atol=1e-13)
    np.testing.assert_allclose(bias["ABOBA"], 0.0, atol=1e-13)
    np.testing.assert_allclose(bias["OBABO"], 1 / (1 - U * H**2 * SPECTRUM / 4) - 1)
    np.testing.assert_allclose(bias["OABAO"], -U * H**2 * SPECTRUM / 4)


def test_rates_are_those_of_the_slowest_direction():
    error = kernels.gaussian_error(case("LMC")[0], SPECTRUM)
    np.testing.assert_allclose([error.mean_rate, error.second_moment_rate], [0.95, 0.95**2])
    # a randomized midpoint multiplies by 1 - z + U z^2
    z = H * SPECTRUM[0]
    error = kernels.gaussian_error(case("RandomizedMidpoint")[0], SPECTRUM)
    np.testing.assert_allclose(error.mean_rate, 1 - z + z**2 / 2)
    np.testing.assert_allclose(error.second_moment_rate, (1 - z) ** 2 + (1 - z) * z**2 + z**4 / 3)


@pytest.mark.parametrize(("name", "limit"), [("LMC", 1.0), ("RandomizedMidpoint", 0.798), ("BAOAB", 2 / np.sqrt(1.5))])
def test_an_unstable_kernel_is_said_to_be(name, limit):
    below = kernels.gaussian_error(case(name, h=0.999 * limit)[0], SPECTRUM)
    above = kernels.gaussian_error(case(name, h=1.001 * limit)[0], SPECTRUM)
    assert below.is_stable
    assert np.isfinite(below.w2)
    assert not above.is_stable
    assert np.isinf(above.w2)
    assert "unstable" in above.statement
    assert np.isfinite(kernels.gaussian_error(case(name, h=1.001 * limit)[0], SPECTRUM, num_steps=5, start=1.0).w2)
    assert np.isinf(kernels.gaussian_error(case(name, h=2 * limit)[0], SPECTRUM, num_steps=10**7, start=1.0).w2)


@pytest.mark.parametrize("name", ["LMC", "KineticLangevin", *RANDOMIZED, "BAOAB", "UBU"])
def test_agrees_with_simulation_and_a_wrong_step_size_does_not(name):
    kernel, _ = case(name, closed_forms.gaussian())
    num_steps = 4
    state = closed_forms.run(kernel, jnp.asarray(closed_forms.MEAN, jnp.float32), num_steps, 40_000)
    y = (np.asarray(state.position, np.float64) - closed_forms.MEAN) @ closed_forms.ROTATION

    def p_value(h):
        error = kernels.gaussian_error(kernel.with_step_size(h), closed_forms.EIGENVALUES, num_steps=num_steps)
        return mean_p_value(y**2, error.variance)

    assert p_value(H) > FALSE_ALARM
    assert p_value(2 * H) < FALSE_ALARM


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused():
    kernel = case("LMC")[0]
    with pytest.raises(ValueError, match="positive"):
        kernels.gaussian_error(kernel, [1.0, 0.0])
    with pytest.raises(ValueError, match="vector"):
        kernels.gaussian_error(kernel, np.eye(2))
    with pytest.raises(ValueError, match="at least one eigenvalue"):
        kernels.gaussian_error(kernel, [])
    with pytest.raises(ValueError, match="spectrum must be a number or an array of numbers, got 'flat'"):
        kernels.gaussian_error(kernel, "flat")
    with pytest.raises(ValueError, match="num_steps"):
        kernels.gaussian_error(kernel, SPECTRUM, num_steps=-1)
    with pytest.raises(ValueError, match="start must be a scalar or one number for each eigenvalue"):
        kernels.gaussian_error(kernel, SPECTRUM, num_steps=1, start=np.zeros(len(SPECTRUM) + 1))
    with pytest.raises(ValueError, match="start must be finite"):
        kernels.gaussian_error(kernel, SPECTRUM, num_steps=1, start=np.nan)
    with pytest.raises(ValueError, match="Metropolis-adjusted"):
        kernels.gaussian_error(kernels.MALA(nowhere, 0.1), SPECTRUM)
    with pytest.raises(ValueError, match=r"pass kernel\.kernel, and the eigenvalues of L\^T H L"):
        kernels.gaussian_error(kernels.Precondition(kernel), SPECTRUM)
    with pytest.raises(ValueError, match=r"num_sweeps\^num_nodes = 3\^9 combinations"):
        kernels.gaussian_error(kernels.ParallelMidpoint(nowhere, 0.1, num_nodes=9), SPECTRUM)
