"""`sample(..., warmup=guaranteed(eps))`: parameters from the bound, and draws that are as good as it says."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_curvature import rotated

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value

SPECTRUM = np.array([1.0, 2.0, 5.0])


@pytest.mark.parametrize("name", ["LMC", "RandomizedMidpoint", "KineticLangevin", "RandomizedMidpointKinetic"])
def test_the_kernel_gets_the_parameters_of_the_guarantee(name):
    kernel = getattr(kernels, name)(rotated(SPECTRUM), step_size=1.0)
    start = jnp.array([[0.0, 0.0, 0.0], [3.0, -1.0, 2.0]])
    for warmup in (bi.guaranteed(0.3), bi.guaranteed(0.3, m=0.999, M=5.001)):
        tuned = warmup.prepare(kernel, start, 10_000)
        assert type(tuned) is type(kernel)
        # the gradient at the start is at least m times the way to the mode
        distance = np.linalg.norm(start[1]) + np.sqrt(np.sum(1 / SPECTRUM))
        m, M = (1.0, 5.0) if warmup.m is None else (0.999, 5.001)
        assert kernels.wasserstein_bound(
            tuned, m=m, M=M, dim=3, num_steps=10_000, initial_distance=distance
        ) <= 0.3 * np.sqrt(3 / m)


def test_draws_have_the_law_of_the_tuned_kernel():
    num_chains = 4_000
    kernel = kernels.LMC(rotated(SPECTRUM), step_size=1.0)  # unstable as it stands
    initial = jnp.zeros((num_chains, 3))
    warmup = bi.guaranteed(0.9, m=1.0, M=5.0)
    draws = bi.sample(0, kernel, initial, num_samples=1, num_warmup=200, warmup=warmup, progress=False, throw=False)
    x = np.asarray(draws["x"], np.float64).reshape(num_chains, 3)
    _, vectors = np.linalg.eigh(np.asarray(kernel.target.data, np.float64))
    tuned = warmup.prepare(kernel, initial, 200)
    truth = kernels.gaussian_error(tuned, SPECTRUM, num_steps=201)
    assert mean_p_value((x @ vectors) ** 2, truth.variance) > FALSE_ALARM
    assert mean_p_value((x @ vectors) ** 2, 1.2 * truth.variance) < FALSE_ALARM


def test_what_is_not_guaranteed_is_refused():
    target, start = rotated(SPECTRUM), jnp.zeros((2, 3))
    run = {"num_samples": 1, "num_warmup": 10, "progress": False}
    with pytest.raises(ValueError, match=r"needs num_warmup >= \d+ for LMC .*got 10"):
        bi.sample(0, kernels.LMC(target, 0.1), start, warmup=bi.guaranteed(0.1), **run)
    with pytest.raises(ValueError, match="for which a bound is known"):
        bi.sample(0, kernels.MALA(target, 0.1), start, warmup=bi.guaranteed(0.1), **run)
    wells = kernels.LMC(lambda x: -jnp.sum((x**2 - 1) ** 2), 0.1)
    with pytest.raises(ValueError, match="not log-concave"):
        bi.sample(0, wells, start, warmup=bi.guaranteed(0.1), **run)
    with pytest.raises(ValueError, match="together"):
        bi.guaranteed(0.1, m=1.0)
    with pytest.raises(ValueError, match="eps"):
        bi.guaranteed(0.0)
    with pytest.raises(ValueError, match="m must be finite and positive"):
        bi.guaranteed(0.1, m=-1.0, M=1.0)
    with pytest.raises(ValueError, match="M must be a scalar"):
        bi.guaranteed(0.1, m=1.0, M=jnp.ones(2))


@pytest.mark.usefixtures("unchecked")
def test_bounds_are_numbers():
    with pytest.raises(ValueError, match="m must be a number or an array of numbers, got 'small'"):
        bi.guaranteed(0.1, m="small", M=1.0)


def test_a_tolerance_that_the_start_meets_does_not_freeze_the_chain():
    kernel = kernels.LMC(rotated(SPECTRUM), step_size=1.0)
    tuned = bi.guaranteed(1.5).prepare(kernel, jnp.zeros((2, 3)), 1)
    assert float(tuned.step_size) > 0.05
