"""SGLD and SGHMC against the exact moments of their chains on a regression with all batches enumerated."""

import functools

import closed_forms
import jax
import jax.numpy as jnp
import minibatch_model as model
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value

NUM_STEPS, NUM_CHAINS = 12, 40_000
H_SGLD, H_SGHMC = 0.02, 0.1
FRICTION, INVERSE_MASS, VARIANCE = 2.0, 0.7, np.array([40.0, 8.0])


@functools.cache
def chains(name):
    """(n, ...) ends of independent chains; of position, and velocity where there is one."""
    centre = model.CENTRE if "centred" in name else None
    target = model.target(centre)
    if name.startswith("SGHMC"):
        variance = VARIANCE if centre is None else 0.0
        kernel = kernels.SGHMC(target, H_SGHMC, FRICTION, INVERSE_MASS, variance)
    else:
        kernel = kernels.SGLD(target, H_SGLD, *((0.5, 4.0) if "decay" in name else ()))
    ends = closed_forms.run(kernel, jnp.asarray(model.START, jnp.float32), NUM_STEPS, NUM_CHAINS)
    return np.concatenate([ends.position, getattr(ends, "velocity", ends.position[:, :0])], axis=1).astype(np.float64)


def p_value(ends, moments):
    """Of all first and second moments."""
    mean, second = moments
    size = ends.shape[1]
    upper = np.triu_indices(size)
    found = np.concatenate([ends, ends[:, upper[0]] * ends[:, upper[1]]], axis=1)
    return mean_p_value(found, np.concatenate([mean[:size], second[:size, :size][upper]]))


def sgld_moments(estimates, first, step_sizes, noise=2.0):
    steps = []
    for k, h in enumerate(step_sizes):
        gradients = [first] if k == 0 else estimates
        Q = noise * h * np.diag([1.0] * model.DIM + [0.0])
        steps.append(([model.sgld_map(gradient, h) for gradient in gradients], Q))
    return model.moments(steps, np.append(model.START, 1.0))


def sghmc_moments(estimates, variance, free=None):
    h, u = H_SGHMC, INVERSE_MASS
    free = u * -np.expm1(-2 * FRICTION * h) if free is None else free
    Q = np.diag(np.concatenate([np.zeros(2), free - h**2 * u**2 * variance * np.ones(2), [0.0]]))
    maps = [model.sghmc_map(gradient, h, FRICTION, u) for gradient in estimates]
    return model.moments([(maps, Q)] * NUM_STEPS, np.concatenate([model.START, np.zeros(2), [1.0]]))


FIXED = np.full(NUM_STEPS, H_SGLD)
DECAYING = H_SGLD * (1 + np.arange(NUM_STEPS) / 4.0) ** -0.5


@pytest.mark.parametrize(
    ("name", "centre", "step_sizes"),
    [("SGLD", None, FIXED), ("SGLD centred", model.CENTRE, FIXED), ("SGLD decay", None, DECAYING)],
)
def test_moments_of_sgld(name, centre, step_sizes):
    first = model.batch_gradient(model.MIDDLE, centre)
    estimates = model.batch_gradients(centre)
    assert p_value(chains(name), sgld_moments(estimates, first, step_sizes)) > FALSE_ALARM


def test_wrong_chains_are_told_from_sgld():
    first, estimates, exact = model.batch_gradient(model.MIDDLE), model.batch_gradients(), model.full_gradient()
    unscaled = model.batch_gradients(is_scaled=False)
    centred, wrong_sign = model.batch_gradients(model.CENTRE), model.batch_gradients(model.CENTRE, sign=-1.0)
    first_centred = model.batch_gradient(model.MIDDLE, model.CENTRE)
    wrong = {
        "SGLD": {
            "n/b forgotten": sgld_moments(unscaled, first, FIXED),
            "sqrt(h)": sgld_moments(estimates, first, FIXED, noise=1.0),
            "no noise of batches": sgld_moments([exact], first, FIXED),
            "with replacement": sgld_moments(model.with_replacement(), first, FIXED),
        },
        "SGLD centred": {
            "sign": sgld_moments(wrong_sign, first_centred, FIXED),
            "ignored": sgld_moments(estimates, first_centred, FIXED),
        },
        "SGLD decay": {
            "ignored": sgld_moments(estimates, first, FIXED),
            "one step late": sgld_moments(estimates, first, H_SGLD * (1 + np.arange(1, 13) / 4.0) ** -0.5),
        },
    }
    assert p_value(chains("SGLD centred"), sgld_moments(centred, first_centred, FIXED)) > FALSE_ALARM
    for name, laws in wrong.items():
        for bug, moments in laws.items():
            assert p_value(chains(name), moments) < FALSE_ALARM, bug


@pytest.mark.parametrize(("name", "centre"), [("SGHMC", None), ("SGHMC centred", model.CENTRE)])
def test_moments_of_sghmc(name, centre):
    variance = VARIANCE if centre is None else 0.0
    assert p_value(chains(name), sghmc_moments(model.batch_gradients(centre), variance)) > FALSE_ALARM


def test_fresh_velocities_have_the_variance_of_the_inverse_mass():
    kernel = kernels.SGHMC(model.target(), H_SGHMC, FRICTION, INVERSE_MASS)
    start = kernel.init(jnp.zeros(2))
    states = jax.vmap(kernel.refresh, (0, None))(jax.random.split(jax.random.key(0), 10_000), start)
    assert mean_p_value(states.velocity**2, INVERSE_MASS) > FALSE_ALARM


def test_wrong_chains_are_told_from_sghmc():
    estimates = model.batch_gradients()
    u, g, h = INVERSE_MASS, FRICTION, H_SGHMC
    wrong = {
        "n/b forgotten": sghmc_moments(model.batch_gradients(is_scaled=False), VARIANCE),
        "noise of batches not subtracted": sghmc_moments(estimates, 0.0),
        "no noise of batches": sghmc_moments([model.full_gradient()], VARIANCE),
        "noise of first order": sghmc_moments(estimates, VARIANCE, free=2 * u * g * h),
        "half the noise": sghmc_moments(estimates, VARIANCE, free=u * -np.expm1(-g * h)),
    }
    for bug, moments in wrong.items():
        assert p_value(chains("SGHMC"), moments) < FALSE_ALARM, bug


def test_stationary_covariance_of_sgld():
    """Where all rows have one curvature, the noise does not depend on x, and the docstring's equation holds."""
    h, a = 0.1, 0.5
    offsets = [c[0] for _, c in model.batch_gradients()]
    maps = [np.array([[1 - h * a, h * c], [0.0, 1.0]]) for c in offsets]
    mean, second = model.moments([(maps, np.diag([2 * h, 0.0]))] * 2_000, np.array([0.0, 1.0]))
    variance = second[0, 0] - mean[0] ** 2
    np.testing.assert_allclose(2 * a * variance - h * a**2 * variance, 2 + h * np.var(offsets), rtol=1e-8)


@pytest.mark.parametrize("friction", [0.1, 2.0, 30.0])
def test_sghmc_is_stable_up_to_the_bound_of_its_docstring(friction):
    A, _ = model.full_gradient()
    M, h = np.linalg.eigvalsh(A)[-1], H_SGHMC
    bound = 2 * (1 + np.exp(-friction * h)) / (h**2 * M)  # of u
    radii = []
    for u in (0.999 * bound, 1.001 * bound):
        linear = model.sghmc_map((A, np.zeros(2)), h, friction, u)[:4, :4]
        radii.append(np.max(np.abs(np.linalg.eigvals(linear))))
    assert radii[0] < 1 < radii[1]


def test_info_tells_the_step_size_and_the_cost():
    for centre, cost in ((None, 1), (model.CENTRE, 2)):
        kernel = kernels.SGLD(model.target(centre), H_SGLD, decay=0.5, delay=4.0)
        state = kernel.init(jnp.zeros(2))
        for k in range(3):
            state, info = kernel.step(jax.random.key(k), state)
            np.testing.assert_allclose(info.step_size, DECAYING[k], rtol=1e-6)
            assert int(info.num_gradients) == cost
    assert int(state.num_steps) == 3


def walled(value):
    """A half line where the density is `value`, known from the prior; every batch sees it."""
    return kernels.Minibatch(
        lambda x: jnp.where(x > 0, value, -0.5 * x**2), lambda x, y: -0.5 * (x - y) ** 2, jnp.arange(-3.0, 0.0), 2
    )


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("build", [lambda t: kernels.SGLD(t, 0.1), lambda t: kernels.SGHMC(t, 0.3)])
def test_points_that_are_not_finite_are_not_entered(value, build):
    kernel = build(walled(value))
    start = kernel.init(jnp.asarray(-0.1))
    if hasattr(kernel, "refresh"):
        starts = jax.vmap(kernel.refresh, (0, None))(jax.random.split(jax.random.key(1), 500), start)
    else:
        starts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (500, *leaf.shape)), start)
    step = jax.jit(jax.vmap(kernel.step))
    states, info = step(jax.random.split(jax.random.key(0), 500), starts)
    assert np.all(np.asarray(states.position) <= 0)
    is_undone = np.asarray(states.position == start.position)
    assert 0.05 < is_undone.mean() < 0.95
    np.testing.assert_array_equal(is_undone, np.asarray(info.is_divergent))
    np.testing.assert_array_equal(is_undone, ~np.asarray(info.is_accepted))
    # what was undone is not stuck
    states, _ = step(jax.random.split(jax.random.key(2), 500), states)
    assert np.mean(np.asarray(states.position)[is_undone] != start.position) > 0.3
    # and counts as a step, or step sizes would decay more slowly where moves are undone
    if hasattr(states, "num_steps"):
        np.testing.assert_array_equal(states.num_steps, 2)


def test_a_row_that_is_not_finite_is_counted_when_it_is_drawn():
    data = jnp.array([1.0, 2.0, jnp.nan, 4.0])
    target = kernels.Minibatch(lambda x: -0.5 * x**2, lambda x, y: -0.5 * (x - y) ** 2, data, 2)
    kernel = kernels.SGLD(target, 0.01)
    start = kernel.init(jnp.asarray(0.0))._replace(gradient=jnp.asarray(0.0))
    _, info = jax.jit(jax.vmap(kernel.step, (0, None)))(jax.random.split(jax.random.key(0), 4_000), start)
    # one of the two rows of the second block
    assert mean_p_value(np.asarray(info.is_divergent, float), 0.5) > FALSE_ALARM


def test_a_run_that_diverges_fails():
    target = kernels.Minibatch(lambda x: jnp.log(x), lambda x, y: -x * y, jnp.ones(3), 2)
    kernel = kernels.SGLD(target, 0.1)
    with pytest.raises(bi.errors.SamplingError, match="diverged"):
        bi.sample(0, kernel, -jnp.ones(2), num_samples=200, progress=False)


@pytest.mark.parametrize("build", [lambda t: kernels.SGLD(t, 0.005), lambda t: kernels.SGHMC(t, 0.05, friction=4.0)])
def test_a_run_finds_the_posterior(build):
    """Its mean is that of the chain at every step size, since the gradient is affine."""
    target = model.target()
    kernel = build(target.centred(target.mode(jnp.zeros(2))))
    draws = bi.sample(1, kernel, jnp.zeros((200, 2)), num_samples=20, num_warmup=1_000, thin=50, progress=False)
    A, c = model.full_gradient()
    means = np.asarray(draws.samples).mean(axis=1)
    assert mean_p_value(means, np.linalg.solve(A, c)) > FALSE_ALARM
    assert mean_p_value(means, np.linalg.solve(A, c) + 0.1) < FALSE_ALARM


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    target = model.target()
    for kernel in (kernels.SGLD, kernels.SGHMC):
        with pytest.raises(ValueError, match=r"target must be a kernels.Minibatch, got Target; .* LMC"):
            kernel(target.full, 0.1)
        with pytest.raises(ValueError, match="step_size must be finite and positive"):
            kernel(target, -0.1)
        with pytest.raises(ValueError, match="position must be floating point"):
            kernel(target, 0.1).init(jnp.zeros(2, int))
    for decay in (-0.1, 1.1, jnp.nan):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\]"):
            kernels.SGLD(target, 0.1, decay)
    with pytest.raises(ValueError, match="delay must be finite and positive"):
        kernels.SGLD(target, 0.1, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"gradient_variance must be at most .* got 400"):
        kernels.SGHMC(target, 0.1, gradient_variance=jnp.array([1.0, 400.0]))
    with pytest.raises(ValueError, match="gradient_variance must be finite and not negative"):
        kernels.SGHMC(target, 0.1, gradient_variance=-1.0)
    kernel = kernels.SGHMC(target, 0.1, gradient_variance={"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="gradient_variance must be a number, or have the structure"):
        kernel.step(jax.random.key(0), kernel.init(jnp.zeros(2)))
