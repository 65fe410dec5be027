"""BlackJAX's HMC and NUTS as kernels."""

import subprocess
import sys

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM

KERNELS = {
    "HMC": lambda target, **more: kernels.HMC(target, 0.4, **{"num_integration_steps": 3, **more}),
    "NUTS": lambda target, **more: kernels.NUTS(target, 0.4, **{"max_num_doublings": 3, **more}),
}


def test_importing_the_kernels_imports_no_blackjax():
    code = "import bayesinf, sys; bayesinf.kernels.NUTS; assert 'blackjax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", KERNELS)
def test_log_work_weighs_paths(name):
    assert closed_forms.work_p_value(KERNELS[name](closed_forms.quartic()), num_chains=20_000) > FALSE_ALARM


@pytest.mark.parametrize("name", KERNELS)
def test_infinite_log_densities_are_divergences(name):
    """BlackJAX alone accepts a log density of +inf with certainty, and stays there for ever."""
    target = bi.Target(lambda x: jnp.where(x > 1.5, jnp.inf, -0.5 * x**2))
    kernel = KERNELS[name](target)

    def chain(key):
        def move(state, key):
            state, info = kernel.step(key, state)
            return state, (state.position, info)

        return jax.lax.scan(move, kernel.init(jnp.asarray(0.0)), jax.random.split(key, 200))[1]

    positions, info = jax.jit(chain)(jax.random.key(0))
    assert np.asarray(positions).max() <= 1.5
    assert 0 < np.asarray(info.is_divergent).sum() < 200
    assert not np.any(np.isneginf(info.energy))


@pytest.mark.parametrize("name", KERNELS)
def test_kinetic_energies_that_overflow_are_divergences(name):
    """In a dense metric their terms have both signs: BlackJAX alone accepts -inf with certainty, whatever is there."""
    weights = jnp.asarray([1.4, *8 * [1.0]])
    arrow = np.eye(9)
    arrow[0, 1:] = arrow[1:, 0] = -0.35  # the first term is -2.0 where each of the other eight is 0.5
    metric = jnp.asarray(arrow)
    largest = np.sqrt(np.finfo(metric.dtype).max)

    def cliff(x, slope):
        return jnp.where(jnp.any(x != 0), -1e30, 0.0) + slope * jnp.dot(weights, x - jax.lax.stop_gradient(x))

    def fall(slope):
        kernel = KERNELS[name](bi.Target(cliff, slope), inverse_mass_matrix=metric)
        return kernel.step(jax.random.key(0), kernel.init(jnp.zeros(9)))

    state, info = jax.vmap(fall)(jnp.geomspace(1e-2 * largest, 1e2 * largest, 400))
    assert np.any(np.isneginf(info.energy))  # the case occurs
    assert np.all(state.evaluation.logdensity == 0)
    assert np.all(info.is_divergent)
    assert np.all(info.acceptance_rate[np.isneginf(info.energy)] == 0)


@pytest.mark.parametrize("name", KERNELS)
def test_evaluation_is_that_of_the_position(name):
    kernel = KERNELS[name](closed_forms.gaussian())
    state, info = kernel.step(jax.random.key(1), kernel.init(jnp.ones(2)))
    assert bool(info.is_accepted)
    fresh = kernel.target.evaluate(state.position, order=1)
    np.testing.assert_allclose(state.evaluation.logdensity, fresh.logdensity, rtol=1e-5)
    np.testing.assert_allclose(state.evaluation.grad, fresh.grad, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_metric_is_laid_out_as_the_ravelled_position(name):
    """With the metric of the target a step is that of the isotropic target in scaled coordinates."""
    scale = {"a": jnp.asarray([0.1, 1.0]), "b": jnp.asarray(10.0)}

    def logdensity(x, scale):
        return -0.5 * sum(jnp.sum((x[name] / scale[name]) ** 2) for name in x)

    wide = KERNELS[name](bi.Target(logdensity, scale), inverse_mass_matrix=jnp.asarray([0.01, 1.0, 100.0]))
    unit = KERNELS[name](bi.Target(logdensity, jax.tree.map(jnp.ones_like, scale)))
    start = {"a": jnp.asarray([0.3, -0.4]), "b": jnp.asarray(0.5)}
    scaled, _ = wide.step(jax.random.key(0), wide.init(jax.tree.map(jnp.multiply, start, scale)))
    plain, _ = unit.step(jax.random.key(0), unit.init(start))
    for part in start:
        np.testing.assert_allclose(scaled.position[part] / scale[part], plain.position[part], rtol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_metric_of_a_wrong_shape(name):
    kernel = KERNELS[name](closed_forms.gaussian(), inverse_mass_matrix=jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"inverse_mass_matrix must be over .* of shape \(2,\) or \(2, 2\), got shape \(3,\)"
    ):
        kernel.init(jnp.ones(2))
    with pytest.raises(ValueError, match="inverse_mass_matrix must be finite and positive"):
        KERNELS[name](closed_forms.gaussian(), inverse_mass_matrix=jnp.asarray([1.0, -1.0]))


@pytest.mark.usefixtures("unchecked")
def test_bad_parameters():
    target = closed_forms.gaussian()
    for kernel in (kernels.HMC, kernels.NUTS):
        with pytest.raises(ValueError, match="step_size"):
            kernel(target, 0.0)
    with pytest.raises(ValueError, match="num_integration_steps"):
        kernels.HMC(target, 0.1, num_integration_steps=0)
    with pytest.raises(ValueError, match="max_num_doublings"):
        kernels.NUTS(target, 0.1, max_num_doublings=2.5)


def test_gradients_and_depth_are_counted():
    kernel = kernels.NUTS(closed_forms.gaussian(), 1e-3, max_num_doublings=4)
    _, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(2)))
    assert int(info.num_gradients) == 2**4 - 1
    assert int(info.tree_depth) == 4


@pytest.mark.parametrize("name", KERNELS)
def test_dense_metrics_are_learnt_and_checked(name):
    covariance = np.array([[1.0, 0.95], [0.95, 1.0]])
    precision = jnp.asarray(np.linalg.inv(covariance))
    target = bi.Target(lambda x, precision: -0.5 * x @ precision @ x, precision)
    warmup = bi.adaptation.Window(300, is_dense=True)
    draws = bi.sample(
        0, KERNELS[name](target), jnp.zeros((4, 2)), num_samples=300, num_warmup=300, warmup=warmup, progress=False
    )
    learnt = np.mean(draws.tuned.inverse_mass_matrix, axis=0)
    assert learnt.shape == (2, 2)
    assert 0.5 < learnt[0, 1] / np.sqrt(learnt[0, 0] * learnt[1, 1]) < 1
    given = KERNELS[name](target, inverse_mass_matrix=jnp.asarray(covariance))
    given.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="inverse_mass_matrix must be symmetric and positive definite"):
        KERNELS[name](target, inverse_mass_matrix=jnp.array([[1.0, 2.0], [2.0, 1.0]]))
