"""Metropolis adjustment; the contract and the invariance of the simple forms are tested with all kernels."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted.metropolis import NeverTurned

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance

QUARTIC = closed_forms.quartic()


def test_adjusted_lmc_is_mala():
    """Step for step, from the same keys."""
    mala, adjusted = kernels.MALA(QUARTIC, 0.7), kernels.Metropolize(kernels.LMC(QUARTIC, 0.7))
    one, two = mala.init(jnp.asarray(0.4)), adjusted.init(jnp.asarray(0.4))
    num_accepted = 0
    for t in range(20):
        one, told_one = mala.step(jax.random.key(t), one)
        two, told_two = adjusted.step(jax.random.key(t), two)
        np.testing.assert_allclose(one.position, two.position, rtol=1e-5)
        np.testing.assert_allclose(told_one.acceptance_rate, told_two.acceptance_rate, rtol=1e-4)
        np.testing.assert_allclose(told_one.log_work, told_two.log_work, rtol=1e-3, atol=1e-5)
        num_accepted += int(told_two.is_accepted)
    assert 0 < num_accepted < 20


ADJUSTED = {
    "BAOAB": lambda target: kernels.Metropolize(kernels.Splitting("BAOAB", target, 0.9, inverse_mass=0.7)),
    "exponential": lambda target: kernels.Metropolize(kernels.KineticLangevin(target, 0.7, inverse_mass=0.7)),
    "repeated": lambda target: kernels.Metropolize(kernels.Repeat(kernels.Splitting("ABOBA", target, 0.5), 2)),
    "GHMC": lambda target: kernels.GHMC(target, 0.9, inverse_mass=0.7),
    "MALT": lambda target: kernels.MALT(target, 0.9, num_steps=2, inverse_mass=0.7),
}


@pytest.mark.parametrize(
    "name", [name if name == "MALT" else pytest.param(name, marks=pytest.mark.slow) for name in ADJUSTED]
)
def test_walls_and_rejections_leave_the_law_invariant(name):
    """An exponential law: many steps end behind its wall, where the log density is -inf."""
    target = bi.Target(lambda x: jnp.where(x > 0, -1.3 * x, -jnp.inf))
    report = exact_start_invariance(
        3, ADJUSTED[name](target), lambda key: jax.random.exponential(key) / 1.3, num_chains=50_000, num_steps=6,
        prepare=getattr(ADJUSTED[name](target), "refresh", None),
    )  # fmt: skip
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_a_velocity_that_does_not_turn_back_is_found():
    kernel = NeverTurned(kernels.Splitting("OBABO", bi.Target(lambda x: 3.0 * x - jnp.exp(x)), 1.2, friction=0.3))
    report = exact_start_invariance(
        3, kernel, lambda key: jax.random.loggamma(key, 3.0), num_steps=20, prepare=kernel.refresh
    )
    assert report.p_value < FALSE_ALARM


@pytest.mark.parametrize(("name", "num_gradients"), [("BAOAB", 1), ("repeated", 2), ("GHMC", 1), ("MALT", 2)])
def test_gradients_are_counted(name, num_gradients):
    kernel = ADJUSTED[name](closed_forms.counted())
    state = kernel.init(jnp.ones(2))
    if name != "repeated":
        extra = name == "MALT"  # a scanned step stands once in the program
        assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == num_gradients - extra
    _, info = kernel.step(jax.random.key(0), state)
    assert int(info.num_gradients) == num_gradients


@pytest.mark.parametrize("name", ["GHMC", "MALT"])
def test_log_work_weighs_paths(name):
    assert closed_forms.work_p_value(ADJUSTED[name](QUARTIC)) > FALSE_ALARM


def test_evaluation_is_that_of_the_position():
    for kernel in (ADJUSTED["BAOAB"](QUARTIC), kernels.Metropolize(kernels.Splitting("UBU", QUARTIC, 0.5))):
        state = kernel.init(jnp.asarray(0.4))
        for t in range(5):
            state, _ = kernel.step(jax.random.key(t), state)
        np.testing.assert_allclose(
            state.evaluation.logdensity, QUARTIC.logdensity(state.position), rtol=1e-5, atol=1e-6
        )


def test_warm_up_reaches_its_rate():
    target = bi.Target(lambda x: -0.5 * x**2 + 0.3 * jnp.sin(2 * x))
    for kernel, rate in ((kernels.GHMC(target, 0.01), 0.95), (kernels.MALT(target, 0.01, 5), 0.651)):
        draws = bi.sample(0, kernel, jnp.zeros(8), num_samples=1_000, num_warmup=1_000, progress=False)
        assert abs(draws.stats["acceptance_rate"].mean() - rate) < 0.06


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (kernels.Splitting("BAO", QUARTIC, 0.1), r"Splitting\('BAO'\)"),
        (kernels.RandomizedMidpoint(QUARTIC, 0.1), "RandomizedMidpoint"),
        (kernels.MALA(QUARTIC, 0.1), "MALA"),
        (kernels.Repeat(kernels.MALA(QUARTIC, 0.1), 2), "Repeat"),
        (kernels.Cycle([kernels.LMC(QUARTIC, 0.1), kernels.LMC(QUARTIC, 0.2)]), "Cycle"),
    ],
)
def test_kernels_that_are_not_their_own_reverse_are_refused(kernel, what):
    with pytest.raises(ValueError, match=f"kernel must be an unadjusted kernel that is its own reverse .* got {what}"):
        kernels.Metropolize(kernel)
