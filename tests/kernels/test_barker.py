"""Barker's proposal; the contract and the invariance are tested with all kernels."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value


def test_proposals_follow_the_gradient_with_the_stated_probability():
    """At the wall of an exponential law every proposal to the left is behind it, so that the accepted ones are seen."""
    slope, h = 1.7, 0.3
    target = bi.Target(lambda x: slope * x)  # improper, the proposal alone is looked at
    kernel = kernels.Barker(target, h)
    states, info = jax.vmap(kernel.step, in_axes=(0, None))(
        jax.random.split(jax.random.key(0), 50_000), kernel.init(jnp.asarray(0.0))
    )
    z = np.linspace(-8, 8, 20_001) * np.sqrt(2 * h)
    # the density of a proposal is 2 N(z; 0, 2h) / (1 + exp(-slope z)); its ratio of acceptance is one here
    density = 2 * np.exp(-(z**2) / (4 * h)) / np.sqrt(4 * np.pi * h) / (1 + np.exp(-slope * z))
    assert np.trapezoid(density, z) == pytest.approx(1.0)
    moments = [np.trapezoid(density * z**k, z) for k in (1, 2, 3)]
    np.testing.assert_allclose(info.acceptance_rate, 1.0, atol=1e-5)
    d = np.asarray(states.position, np.float64)
    assert mean_p_value(np.stack([d, d**2, d**3], axis=1), np.array(moments)) > FALSE_ALARM


def test_small_steps_are_those_of_mala():
    """To first order in h the drift is h grad log pi and the variance 2h."""
    h, target = 1e-3, closed_forms.gaussian()
    start = jnp.array([2.0, 1.0], jnp.float32)
    kernel = kernels.Barker(target, h)
    states, _ = jax.vmap(kernel.step, in_axes=(0, None))(
        jax.random.split(jax.random.key(1), 200_000), kernel.init(start)
    )
    change = np.asarray(states.position - start, np.float64)
    se = np.sqrt(2 * h / 200_000)
    grad = np.asarray(target.evaluate(start, order=1).grad)
    assert np.all(np.abs(change.mean(0) - h * grad) < 5 * se + 10 * h**1.5)


def test_one_gradient():
    kernel = kernels.Barker(closed_forms.counted(), 0.1)
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 1
    assert int(kernel.step(jax.random.key(0), state)[1].num_gradients) == 1


def test_a_wrong_scale_is_forgiven():
    """Ten times too large a step for one coordinate stops MALA; Barker goes on."""
    scale = jnp.array([0.01, 1.0])
    target = bi.Target(lambda x, scale: -0.5 * jnp.sum((x / scale) ** 2), scale)
    rates = {}
    for name in ("MALA", "Barker"):
        kernel = getattr(kernels, name)(target, 0.01)
        draws = bi.sample(0, kernel, jnp.zeros((8, 2)), num_samples=200, progress=False, throw=False)
        rates[name] = draws.stats["acceptance_rate"].mean()
    assert rates["MALA"] < 0.01 < 0.05 < rates["Barker"]


@pytest.mark.parametrize("step_size", [0.0, -0.1, jnp.nan, jnp.inf])
def test_bad_step_size(step_size):
    with pytest.raises(ValueError, match="step_size must be finite and positive"):
        kernels.Barker(closed_forms.quartic(), step_size)
