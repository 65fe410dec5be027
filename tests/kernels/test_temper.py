"""Tempered kernels; the contract and the invariance of the simple form are tested with all kernels."""

from functools import partial

import closed_forms
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import tempered_laws as laws
from planted.tempering import UntemperedEvaluation

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance

KEY = jax.random.key(0)
POSITION = {"x": jnp.asarray(1.0), "y": jnp.array([0.3, -0.4])}


def but_slow(names, *slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def observed_counts(counts):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("counts", dist.Poisson(rate), obs=counts)


REFERENCES = {
    "prior": laws.PRIOR,
    "pair": (lambda key: jnp.log(laws.PRIOR.sample(key)), laws.log_prior),
    "density": bi.Target(laws.log_prior),
}


HMC = kernels.HMC(laws.BANANA, 0.5, num_integration_steps=2)
POWERS = {
    "MALA": (kernels.MALA(laws.BANANA, 0.6), 0.2),
    "sharper": (kernels.MALA(laws.BANANA, 0.1), 3.0),
    "velocities": (kernels.GHMC(laws.BANANA, 0.5), 0.6),
    "nest": (kernels.Temper(kernels.Gibbs({"x": kernels.MALA(laws.BANANA, 0.8), "y": HMC}), 0.5), 0.4),
    "coordinates": (kernels.Precondition(kernels.MALA(laws.BANANA, 0.5), jnp.array([1.0, 1.5, 1.5])), 0.2),
}


@pytest.mark.parametrize("name", but_slow(POWERS, "MALA", "sharper", "velocities", "nest"))
def test_the_power_is_left_invariant(name):
    inner, beta = POWERS[name]
    kernel = kernels.Temper(inner, beta)
    draw = partial(laws.draw_banana, beta=0.2 if name == "nest" else beta)
    report = exact_start_invariance(0, kernel, draw, num_chains=30_000, num_steps=4, prepare=kernel.refresh)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.parametrize("name", but_slow(REFERENCES, "prior", "pair"))
def test_prior_times_a_power_of_the_likelihood_is_left_invariant(name):
    kernel = kernels.Temper(kernels.MALA(laws.RATE, 0.3), 0.25, REFERENCES[name])
    report = exact_start_invariance(0, kernel, partial(laws.draw_log_rate, beta=0.25), num_chains=50_000, num_steps=5)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.slow
def test_the_prior_of_a_model_is_a_reference():
    target = bi.Target.from_numpyro(observed_counts, laws.COUNTS)
    kernel = kernels.Temper(kernels.MALA(target, 0.3), 0.25, target)
    report = exact_start_invariance(
        0, kernel, lambda key: {"rate": laws.draw_log_rate(key, 0.25)}, num_chains=50_000, num_steps=5
    )
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_an_evaluation_that_is_not_tempered_is_found():
    kernel = UntemperedEvaluation(kernels.MALA(laws.BANANA, 0.6), 0.2)
    report = exact_start_invariance(0, kernel, partial(laws.draw_banana, beta=0.2), num_chains=30_000, num_steps=4)
    assert report.p_value < FALSE_ALARM


@pytest.mark.parametrize("reference", [None, bi.Target(laws.log_prior)])
def test_the_state_holds_the_evaluation_of_the_target_itself(reference):
    """Also where another kernel has moved the chain in between."""
    target = laws.RATE
    plain = kernels.MALA(target, 0.1)
    kernel = kernels.Cycle([kernels.Temper(kernels.MALA(target, 0.5), 0.2, reference), plain])
    state, step = kernel.init(jnp.asarray(1.0)), eqx.filter_jit(kernel.step)
    for t in range(8):
        state, _ = step(jax.random.key(t), state)
        fresh = target.evaluate(state.position, order=1)
        np.testing.assert_allclose(state.evaluation.logdensity, fresh.logdensity, rtol=1e-4)
        np.testing.assert_allclose(state.evaluation.grad, fresh.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reference", [None, bi.Target(lambda x: -jnp.sum(x**2))])
def test_tempering_costs_no_gradient(reference):
    target = closed_forms.counted()
    tempered = kernels.Temper(kernels.MALA(target, 0.1), 0.3, reference)
    for kernel, num in (
        (tempered, 1),
        (kernels.Cycle([tempered, kernels.MALA(target, 0.1)]), 2),
        (kernels.Cycle([kernels.MALA(target, 0.1), tempered, kernels.Temper(kernels.LMC(target, 0.1), 0.7)]), 3),
    ):
        state = kernel.init(jnp.ones(2))
        assert closed_forms.num_evaluations(kernel.step, KEY, state) == num
        assert int(kernel.step(KEY, state)[1].num_gradients) == num


def test_a_rejected_move_changes_no_bit():
    kernel = kernels.Temper(kernels.MALA(laws.BANANA, 1e4), 0.3, bi.Target(lambda x: -0.1 * x["x"] ** 2))
    start = kernel.init(POSITION)
    state, info = kernel.step(KEY, start)
    assert not bool(info.is_accepted)
    jax.tree.map(np.testing.assert_array_equal, state, start)


def test_at_one_it_is_the_kernel_whatever_the_reference():
    """The reference is infinite below zero, where the target is not."""
    target, wall = bi.Target(lambda x: -0.5 * x**2), bi.Target(lambda x: jnp.where(x > 0, -x, -jnp.inf))
    plain = kernels.MALA(target, 0.8)
    tempered = kernels.Temper(plain, 1.0, wall)
    one, two = plain.init(jnp.asarray(0.3)), tempered.init(jnp.asarray(0.3))
    for t in range(10):
        one, _ = plain.step(jax.random.key(t), one)
        two, _ = tempered.step(jax.random.key(t), two)
        np.testing.assert_allclose(one.position, two.position, rtol=1e-6)


def test_log_work_weighs_paths():
    assert closed_forms.work_p_value(kernels.Temper(kernels.LMC(closed_forms.quartic(), 0.3), 0.4)) > FALSE_ALARM


def test_another_beta_compiles_nothing():
    mala = kernels.MALA(laws.BANANA, 0.1)
    built = [kernels.Temper(mala, beta) for beta in (0.1, 1, jnp.asarray(0.5))]
    assert closed_forms.num_programs(built, POSITION) == 1


def test_the_metric_is_that_of_the_power():
    """A standard normal to the power 1/100 has standard deviation 10."""
    inner = kernels.Precondition(kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.1))
    draws = bi.sample(
        0, kernels.Temper(inner, 0.01), jnp.zeros((4, 2)), num_samples=300, num_warmup=1_000, progress=False
    )
    assert np.all(np.abs(np.log(np.asarray(draws.tuned.inverse_mass_matrix) / 100.0)) < 1.0)
    assert np.all(np.asarray(draws.tuned.step_size) > 0.1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.Temper(kernels.MALA(laws.RATE, 0.1), 0.0), "beta must be finite and positive"),
        (lambda: kernels.Temper(kernels.MALA(laws.RATE, 0.1), jnp.ones(2)), r"beta must be a scalar, got shape \(2,\)"),
        (lambda: kernels.Temper(kernels.MALA(laws.RATE, 0.1), "cold"), "beta must be a number"),
        (lambda: kernels.Temper(kernels.Cycle([laws]), 0.5), "a kernel has init"),
        (lambda: kernels.Temper(laws, 0.5), "kernel must be a kernel with a target"),
        (lambda: kernels.Temper(kernels.MALA(laws.RATE, 0.1), 0.5, dist.Poisson(3.0)), "prior must be continuous"),
        (lambda: kernels.Temper(kernels.MALA(laws.RATE, 0.1), 0.5, 3.0), "prior must be a NumPyro distribution"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
