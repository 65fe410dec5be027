"""Randomized midpoint, overdamped and kinetic."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM

KERNELS = {
    "overdamped": lambda target: kernels.RandomizedMidpoint(target, 0.5),
    "kinetic": lambda target: kernels.RandomizedMidpointKinetic(target, 1.0, friction=1.5, inverse_mass=0.8),
}


def test_overdamped_has_its_exact_gaussian_law():
    h = 0.5
    scheme = lambda lam: closed_forms.randomized_midpoint(h, lam)  # noqa: E731
    for lam in closed_forms.EIGENVALUES:
        z = h * lam
        known = (2 - 2 * z + z**2) / (2 - 2 * z + z**2 - z**3 / 3)
        np.testing.assert_allclose(lam * closed_forms.stationary(scheme(lam)), known)
    assert closed_forms.law_p_value(KERNELS["overdamped"](closed_forms.gaussian()), scheme) > FALSE_ALARM


def test_kinetic_has_its_exact_gaussian_law():
    scheme = lambda lam: closed_forms.randomized_midpoint_kinetic(1.0, lam, 1.5, 0.8)  # noqa: E731
    assert closed_forms.law_p_value(KERNELS["kinetic"](closed_forms.gaussian()), scheme) > FALSE_ALARM


def test_one_step_has_its_exact_law():
    standard = bi.Target(lambda x: -0.5 * x**2)
    scheme = closed_forms.randomized_midpoint(0.5, 1.0)
    assert min(closed_forms.one_step_p_values(KERNELS["overdamped"](standard), scheme, 6.0)) > FALSE_ALARM
    scheme = closed_forms.randomized_midpoint_kinetic(1.0, 1.0, 1.5, 0.8)
    assert min(closed_forms.one_step_p_values(KERNELS["kinetic"](standard), scheme, 6.0)) > FALSE_ALARM


def test_kinetic_law_has_a_bias_of_third_order():
    g, u, lam = 1.3, 0.7, 1.1
    for h in (0.05, 0.1):
        bias = lam * closed_forms.stationary(closed_forms.randomized_midpoint_kinetic(h, lam, g, u))[0, 0] - 1
        np.testing.assert_allclose(bias, u**2 * lam**2 * h**3 / (24 * g), rtol=3 * h)


@pytest.mark.parametrize("name", KERNELS)
def test_two_gradients_and_no_path_weight(name):
    kernel = KERNELS[name](closed_forms.counted())
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 2
    _, info = kernel.step(jax.random.key(0), state)
    assert int(info.num_gradients) == 2
    assert info.log_work is None


@pytest.mark.parametrize("name", KERNELS)
def test_evaluation_is_that_of_the_new_position(name):
    kernel = KERNELS[name](closed_forms.gaussian())
    state, _ = kernel.step(jax.random.key(0), kernel.init(jnp.ones(2)))
    fresh = kernel.target.evaluate(state.position, order=1)
    np.testing.assert_allclose(state.evaluation.grad, fresh.grad, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_midpoint_that_is_not_finite_undoes_the_move(name):
    """The log density and its gradient are numbers at positions that are NaN, so that only the midpoint tells."""

    def logdensity(x):
        x = jnp.where(jnp.isnan(x), -1.0, x)
        return jnp.where(x > 0, jnp.nan, 1.0) * -0.5 * x**2

    target = bi.Target(logdensity)
    kernel = KERNELS[name](target)
    start = kernel.init(jnp.asarray(-0.05))
    if hasattr(start, "velocity"):
        start = start._replace(velocity=jnp.asarray(0.5))
    step = jax.jit(jax.vmap(kernel.step, in_axes=(0, None)))
    states, info = step(jax.random.split(jax.random.key(0), 200), start)
    is_undone = np.asarray(info.is_divergent)
    assert 0 < is_undone.sum() < 200
    assert np.all(np.asarray(states.position) <= 0)
    assert np.all(states.position[is_undone] == start.position)


def test_bad_parameters():
    target = closed_forms.quartic()
    with pytest.raises(ValueError, match="step_size"):
        kernels.RandomizedMidpoint(target, -1.0)
    with pytest.raises(ValueError, match="friction"):
        kernels.RandomizedMidpointKinetic(target, 0.1, friction=0.0)
    with pytest.raises(ValueError, match="inverse_mass"):
        kernels.RandomizedMidpointKinetic(target, 0.1, inverse_mass=jnp.nan)
