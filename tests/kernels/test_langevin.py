"""LMC and MALA."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM


def test_lmc_has_its_exact_gaussian_law():
    h = 0.5
    scheme = lambda lam: closed_forms.lmc(h, lam)  # noqa: E731
    for lam in closed_forms.EIGENVALUES:
        np.testing.assert_allclose(lam * closed_forms.stationary(scheme(lam)), 1 / (1 - h * lam / 2))
    assert closed_forms.law_p_value(kernels.LMC(closed_forms.gaussian(), h), scheme) > FALSE_ALARM


@pytest.mark.parametrize("kernel", [kernels.LMC, kernels.MALA])
def test_log_work_weighs_paths(kernel):
    assert closed_forms.work_p_value(kernel(closed_forms.quartic(), 0.3)) > FALSE_ALARM


@pytest.mark.parametrize("kernel", [kernels.LMC, kernels.MALA])
def test_one_gradient_a_step(kernel):
    kernel = kernel(closed_forms.counted(), 0.1)
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 1
    assert int(kernel.step(jax.random.key(0), state)[1].num_gradients) == 1


def test_small_steps_far_from_the_origin_are_accepted():
    """At x = 1e3 in float32 the rounding of the proposal is a fiftieth of the step; it must not enter the ratio."""
    kernel = kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum((x - 1e3) ** 2)), step_size=1e-6)
    state = kernel.init(1e3 + jax.random.normal(jax.random.key(0), (50,), jnp.float32))
    step = jax.jit(jax.vmap(kernel.step, in_axes=(0, None)))
    _, info = step(jax.random.split(jax.random.key(1), 200), state)
    assert np.asarray(info.acceptance_rate).min() > 0.99


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_points_that_are_not_finite_are_not_entered(value):
    """Half of the line is forbidden; chains stay on the other half and count."""
    target = bi.Target(lambda x: jnp.where(x > 0, value, -0.5 * x**2))
    for kernel in (kernels.LMC(target, 0.5), kernels.MALA(target, 0.5)):
        step = jax.jit(jax.vmap(kernel.step, in_axes=(0, None)))
        start = kernel.init(jnp.asarray(-0.1))
        states, info = step(jax.random.split(jax.random.key(0), 500), start)
        assert np.all(np.asarray(states.position) <= 0)
        is_crossing = ~np.asarray(info.is_accepted) & np.asarray(states.position == start.position)
        assert is_crossing.any()
        # -inf is an ordinary rejection for MALA, and an undone move for LMC
        is_counted = np.asarray(info.is_divergent)
        if isinstance(kernel, kernels.LMC):
            np.testing.assert_array_equal(is_counted, is_crossing)
        else:
            assert is_counted.any() == (not np.isneginf(value))


@pytest.mark.parametrize("step_size", [0.0, -0.1, jnp.nan, jnp.inf])
@pytest.mark.parametrize("kernel", [kernels.LMC, kernels.MALA])
def test_bad_step_size(kernel, step_size):
    with pytest.raises(ValueError, match="step_size must be finite and positive"):
        kernel(closed_forms.quartic(), step_size)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["LMC", "MALA", "RandomizedMidpoint", "KineticLangevin", "HMC", "NUTS"])
def test_a_step_size_for_each_coordinate_is_refused(name):
    with pytest.raises(ValueError, match=r"step_size must be a scalar, got shape \(2,\)"):
        getattr(kernels, name)(closed_forms.quartic(), jnp.array([0.1, 0.2]))


def test_kernels_of_several_step_sizes_are_vmapped():
    target = bi.Target(lambda x: -0.25 * jnp.sum(x**4))
    many = jax.vmap(lambda step_size: kernels.MALA(target, step_size))(jnp.array([0.1, 0.2]))
    states = jax.vmap(lambda kernel: kernel.init(jnp.ones(2)))(many)
    moved, _ = jax.vmap(lambda kernel, key, state: kernel.step(key, state))(
        many, jax.random.split(jax.random.key(0)), states
    )
    assert moved.position.shape == (2, 2)


def test_bad_log_density_and_position():
    with pytest.raises(ValueError, match="scalar"):
        kernels.MALA(bi.Target(lambda x: -0.5 * x**2), 0.1).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"position must be floating point"):
        kernels.MALA(closed_forms.quartic(), 0.1).init(jnp.asarray(1))
