"""Kernels in other coordinates; the contract and the invariance of the simple form are tested with all kernels."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.adaptation import Window
from bayesinf.conformance import exact_start_invariance

TRIL = jnp.array([[1.0, 0.0], [-0.8, 0.6]])
MEAN = jnp.array([1.0, -2.0])


def banana(x, data):
    tril, mean = data
    z = jax.scipy.linalg.solve_triangular(tril, x - mean, lower=True)
    return 3.0 * z[0] - jnp.exp(z[0]) - 0.5 * (z[1] - z[0] ** 2) ** 2


TARGET = bi.Target(banana, (TRIL, MEAN))
ROUND = bi.Target(banana, (jnp.eye(2), jnp.zeros(2)))


@pytest.mark.parametrize(
    "build",
    [
        lambda target: kernels.MALA(target, 0.3),
        lambda target: kernels.RandomizedMidpoint(target, 0.1),
        lambda target: kernels.Splitting("UBU", target, 0.3),
        lambda target: kernels.HMC(target, 0.3, num_integration_steps=3),
    ],
    ids=["MALA", "RandomizedMidpoint", "UBU", "HMC"],
)
def test_it_is_the_kernel_on_the_rounder_target(build):
    """Step for step from the same keys, whether the coordinates are moved or the target."""
    plain, other = build(ROUND), kernels.Precondition(build(TARGET), TRIL)
    z = jnp.array([0.3, 0.2])
    one, two = plain.init(z), other.init(MEAN + TRIL @ z)
    for t in range(5):
        one, told_one = plain.step(jax.random.key(t), one)
        two, told_two = other.step(jax.random.key(t), two)
        np.testing.assert_allclose(MEAN + TRIL @ one.position, two.position, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(told_one.acceptance_rate, told_two.acceptance_rate, rtol=1e-2, atol=1e-4)


def test_velocities_and_nests_leave_the_law_invariant():
    inner = kernels.Metropolize(kernels.Splitting("UBU", TARGET, 0.5))
    kernel = kernels.Cycle([kernels.Precondition(inner, TRIL), kernels.Precondition(kernels.MALA(TARGET, 0.3), TRIL)])

    def exact(key):
        key_0, key_1 = jax.random.split(key)
        z_0 = jnp.log(jnp.sum(jax.random.exponential(key_0, (3,))))
        return MEAN + TRIL @ jnp.stack([z_0, z_0**2 + jax.random.normal(key_1)])

    def prepare(key, state):
        first = kernels.Precondition(inner, TRIL)
        fresh = first.refresh(key, first.init(state.position))
        return state._replace(memory=(state.memory[0]._replace(memory=fresh.memory), *state.memory[1:]))

    exact_start_invariance(0, kernel, exact, num_chains=40_000, num_steps=6, prepare=prepare).raise_if_rejected()


def test_the_cached_gradient_is_by_x_and_costs_nothing():
    target = closed_forms.counted()
    kernel = kernels.Cycle([kernels.Precondition(kernels.MALA(target, 0.1), TRIL), kernels.MALA(target, 0.1)])
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 2
    for t in range(4):
        state, info = kernel.step(jax.random.key(t), state)
        np.testing.assert_allclose(state.evaluation.grad, target.evaluate(state.position, 1).grad, rtol=1e-3)
    assert int(info.num_gradients) == 2


def test_a_rejected_move_changes_no_bit():
    kernel = kernels.Precondition(kernels.MALA(TARGET, 1e4), TRIL)
    start = kernel.init(jnp.array([0.1, 0.7]))
    state, info = kernel.step(jax.random.key(0), start)
    assert not bool(info.is_accepted)
    jax.tree.map(np.testing.assert_array_equal, state, start)


@pytest.mark.parametrize("is_dense", [False, True])
def test_warm_up_learns_the_scale(is_dense):
    """The coordinates differ by three orders of magnitude, and are correlated."""
    tril = jnp.array([[0.01, 0.0], [8.0, 6.0]])
    target = bi.Target(
        lambda x, tril: -0.5 * jnp.sum(jax.scipy.linalg.solve_triangular(tril, x, lower=True) ** 2), tril
    )
    kernel = kernels.Precondition(kernels.MALA(target, 1e-4))
    draws = bi.sample(
        0, kernel, jnp.zeros((4, 2)), num_samples=1_000, num_warmup=2_000, progress=False,
        warmup=Window(2_000, 0.574, is_dense=is_dense),
    )  # fmt: skip
    found = np.median(np.asarray(draws.tuned.inverse_mass_matrix), axis=0)
    covariance = np.asarray(tril @ tril.T)
    expected = covariance if is_dense else np.diag(covariance)
    assert np.all(np.abs(np.log(np.abs(found / expected))) < np.log(2.5))
    if is_dense:
        assert draws.summary()["r_hat"].max() < 1.05


def test_warm_up_of_the_metric_is_the_default():
    draws = bi.sample(
        0, kernels.Precondition(kernels.MALA(ROUND, 0.1)), jnp.zeros((2, 2)), num_samples=5, num_warmup=100,
        progress=False,
    )  # fmt: skip
    assert draws.tuned.inverse_mass_matrix.shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: kernels.Precondition(lambda x: x), "kernel must be a kernel with a target"),
        (lambda: kernels.Precondition(kernels.MALA(ROUND, 0.1), jnp.ones((2, 3))), r"scale must have shape \(d,\)"),
        (lambda: kernels.Precondition(kernels.MALA(ROUND, 0.1), jnp.array([1.0, 0.0])), "scale must be finite and pos"),
        (lambda: kernels.Precondition(kernels.MALA(ROUND, 0.1), jnp.ones((2, 2))), "lower triangular"),
        (lambda: kernels.Precondition(kernels.MALA(ROUND, 0.1), -jnp.eye(2)), "the diagonal of scale must be finite"),
        (lambda: kernels.Precondition(kernels.MALA(ROUND, 0.1), jnp.ones(3)).init(jnp.ones(2)), r"shape \(2,\), got"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
