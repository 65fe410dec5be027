"""The randomized midpoint with several nodes."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM


def test_one_node_is_the_randomized_midpoint():
    for h in (0.1, 0.7):
        one = closed_forms.stationary(closed_forms.parallel_midpoint(h, 1.3, 1, 2))
        np.testing.assert_allclose(one, closed_forms.stationary(closed_forms.randomized_midpoint(h, 1.3)))


@pytest.mark.parametrize(("num_nodes", "num_sweeps"), [(1, 2), (2, 3), (3, 4)])
def test_gaussian_law_is_exact(num_nodes, num_sweeps):
    kernel = kernels.ParallelMidpoint(closed_forms.gaussian(), 0.8, num_nodes, num_sweeps)
    scheme = lambda lam: closed_forms.parallel_midpoint(0.8, lam, num_nodes, num_sweeps)  # noqa: E731
    assert closed_forms.law_p_value(kernel, scheme, num_steps=15) > FALSE_ALARM


def test_a_law_with_another_number_of_sweeps_is_told_apart():
    kernel = kernels.ParallelMidpoint(closed_forms.gaussian(), 0.8, 2, 3)
    scheme = lambda lam: closed_forms.parallel_midpoint(0.8, lam, 2, 2)  # noqa: E731
    assert closed_forms.law_p_value(kernel, scheme, num_steps=15) < FALSE_ALARM


def test_one_step_has_its_exact_law():
    standard = bi.Target(lambda x: -0.5 * x**2)
    scheme = closed_forms.parallel_midpoint(0.9, 1.0, 2, 3, num_times=16)
    assert min(closed_forms.one_step_p_values(kernels.ParallelMidpoint(standard, 0.9, 2), scheme, 6.0)) > FALSE_ALARM


def test_the_bias_is_the_stated_one():
    def bias(z, *size):
        return closed_forms.stationary(closed_forms.parallel_midpoint(z, 1.0, *size))[0, 0] - 1

    z = 1e-3
    for R in (2, 3, 4):
        np.testing.assert_allclose(bias(z, R, 2), -(z**2) * (1 - 1 / R**2) / 6, rtol=10 * z)
        np.testing.assert_allclose(bias(z, R, 3), z**2 / (3 * R**2), rtol=10 * z)
    np.testing.assert_allclose(bias(z, 2, 4), z**2 / 12, rtol=10 * z)
    np.testing.assert_allclose(bias(0.02, 1, 2), 0.02**3 / 6, rtol=0.05)
    assert bias(0.5, 4, 3) < bias(0.5, 1, 2)


def test_gradients_are_counted_in_batches():
    kernel = kernels.ParallelMidpoint(closed_forms.counted(), 0.1, num_nodes=5, num_sweeps=4)
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 4  # batches
    assert int(kernel.step(jax.random.key(0), state)[1].num_gradients) == 16


def test_a_node_that_is_not_finite_undoes_the_move():
    target = bi.Target(lambda x: jnp.where(x > 0, jnp.nan, -0.5 * x**2))
    kernel = kernels.ParallelMidpoint(target, 0.5)
    start = kernel.init(jnp.asarray(-0.3))
    states, info = jax.vmap(kernel.step, in_axes=(0, None))(jax.random.split(jax.random.key(0), 200), start)
    is_undone = np.asarray(info.is_divergent)
    assert 0 < is_undone.sum() < 200
    assert np.all(states.position[is_undone] == start.position)
    assert np.all(np.asarray(states.position) <= 0)


@pytest.mark.usefixtures("unchecked")
def test_bad_parameters():
    target = closed_forms.quartic()
    with pytest.raises(ValueError, match="num_sweeps must be at least 3 for num_nodes=4, got 2"):
        kernels.ParallelMidpoint(target, 0.1, 4, 2)
    with pytest.raises(ValueError, match="num_sweeps must be at least 2"):
        kernels.ParallelMidpoint(target, 0.1, 1, 1)
    with pytest.raises(ValueError, match="num_nodes"):
        kernels.ParallelMidpoint(target, 0.1, 0)
    with pytest.raises(ValueError, match="step_size"):
        kernels.ParallelMidpoint(target, -0.1)
