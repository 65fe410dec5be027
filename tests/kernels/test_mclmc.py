"""Microcanonical Langevin: its bias against known covariances, its path weights, and BlackJAX's own warm-up."""

import functools
from typing import NamedTuple

import blackjax
import closed_forms
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc.integrators import IntegratorState

import bayesinf as bi
from bayesinf import kernels
from bayesinf.adaptation import StepSize, default_warmup
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.mclmc import MCLMCInfo

FACTOR = jnp.array([[0.1, 0.0, 0.0], [1.0, 2.0, 0.0], [-3.0, 4.0, 10.0]])
INVERSE = jnp.asarray(np.linalg.inv(np.asarray(FACTOR, np.float64)), float)  # products are cheaper than many solves


def gaussian(x, inverse):
    z = inverse @ x
    return -0.5 * z @ z


@functools.partial(jax.jit, static_argnums=1)
def second_moments(step_size, num_steps=600, num_chains=600):
    """Of every chain, the mean of z z^T over a run from an exact start, z = FACTOR^-1 x, whose covariance is I."""
    # a Gaussian that the diagonal metric does not make round
    kernel = kernels.MCLMC(bi.Target(gaussian, INVERSE), step_size, 2.0, jnp.array([0.01, 5.0, 125.0]))

    def chain(key):
        key_start, key_steps = jax.random.split(key)

        def move(carry, t):
            state, total = carry
            state, info = kernel.step(jax.random.fold_in(key_steps, t), state)
            z = INVERSE @ state.position
            return (state, total + jnp.outer(z, z)), info.is_divergent

        start = kernel.init(FACTOR @ jax.random.normal(key_start, (3,)))
        (_, total), is_divergent = jax.lax.scan(move, (start, jnp.zeros((3, 3))), jnp.arange(num_steps))
        return total[jnp.triu_indices(3)] / num_steps, jnp.any(is_divergent)

    return jax.vmap(chain)(jax.random.split(jax.random.key(1), num_chains))


def test_bias_vanishes_with_the_step_size():
    """No bias is seen at small steps, to half a percent; at large ones it is, and stays below a tenth."""
    expected = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    small, is_divergent = second_moments(0.4)
    assert not np.any(is_divergent)
    assert mean_p_value(np.asarray(small, np.float64), expected) > FALSE_ALARM
    large, _ = second_moments(2.0)
    assert mean_p_value(np.asarray(large, np.float64), expected) < FALSE_ALARM
    assert np.all(np.abs(np.mean(large, axis=0) - expected) < 0.1)


def test_a_step_is_blackjaxs():
    """With the same key, metric, L and step size; and its energy change is that of its log work."""
    metric = jnp.array([0.5, 2.0, 1.0])
    target = bi.Target(lambda x: -jnp.sum(jnp.cosh(x) - 0.3 * x) - 0.2 * x[0] * x[1])
    ours = kernels.MCLMC(target, 1.5, 3.0, metric)
    theirs = blackjax.mclmc(target.logdensity, L=3.0, step_size=1.5, inverse_mass_matrix=metric)
    state = ours.init(jnp.array([0.5, -1.0, 0.2]))
    our_step, their_step = eqx.filter_jit(ours.step), jax.jit(theirs.step)
    for t in range(3):
        start = IntegratorState(state.position, state.direction, *state.evaluation)
        moved, told = their_step(jax.random.key(t), start)
        before, (state, info) = state, our_step(jax.random.key(t), state)
        np.testing.assert_allclose(state.position, moved.position, rtol=1e-5)
        np.testing.assert_allclose(state.direction, moved.momentum, rtol=1e-5)
        assert abs(info.energy_change) > 1e-3
        potential = before.evaluation.logdensity - state.evaluation.logdensity
        for change in (told.energy_change, potential - info.log_work):
            np.testing.assert_allclose(info.energy_change, change, atol=1e-5)


def test_log_work_weighs_paths():
    target = bi.Target(lambda x: closed_forms.quartic().logdensity(x["a"]) - 0.5 * (x["b"] - 0.3 * x["a"]) ** 2)
    kernel = kernels.MCLMC(target, 0.5, 2.0)
    p_value = closed_forms.work_p_value(kernel, lambda x: {"a": x[0], "b": x[1]}, num_chains=50_000)
    assert p_value > FALSE_ALARM


def test_a_gradient_that_is_not_finite_is_a_divergence():
    """The move is undone, and the chain goes on in another direction."""
    kernel = kernels.MCLMC(bi.Target(lambda x: cliff(x[0]) - 0.5 * jnp.sum(x**2)), 0.3, 1.0)
    at_the_edge = kernel.init(jnp.array([0.499, 0.0]))._replace(direction=jnp.array([1.0, 0.0]))
    state, info = kernels.MCLMC(kernel.target, 0.3, 100.0).step(jax.random.key(0), at_the_edge)
    assert bool(info.is_divergent)
    np.testing.assert_array_equal(state.position, at_the_edge.position)
    np.testing.assert_array_equal(state.direction, 0.0)  # one is drawn by the next step

    with pytest.warns(bi.errors.SamplingWarning, match="not finite"):
        draws = bi.sample(0, kernel, jnp.zeros((4, 2)), num_samples=300, progress=False)
    assert draws["x"][..., 0].max() < 0.5
    assert 0.5 < draws.stats["is_accepted"].mean() < 1
    assert np.all(np.std(draws["x"][:, -100:], axis=1) > 0.1)


@jax.custom_jvp
def cliff(x):
    """Zero, with a derivative of NaN beyond a half."""
    return 0.0 * x


cliff.defjvp(lambda primals, tangents: (cliff(*primals), jnp.where(primals[0] < 0.5, 0.0, jnp.nan) * tangents[0]))


class Replayed(NamedTuple):
    """A state of BlackJAX's protocol that walks through a table."""

    position: jax.Array
    momentum: jax.Array
    logdensity: jax.Array
    logdensity_grad: jax.Array


class Told(NamedTuple):
    energy_change: jax.Array
    nonans: jax.Array


def told(energy_change, is_lost=False):
    is_lost, zero = jnp.asarray(is_lost), jnp.asarray(0.0)
    return MCLMCInfo(1.0 - is_lost, ~is_lost, is_lost, jnp.asarray(2, jnp.int32), zero, energy_change)


@pytest.mark.parametrize("is_diagonal", [False, True])
def test_warmup_is_blackjaxs(is_diagonal):
    """On the same positions and energy changes as BlackJAX's own function."""
    from blackjax.adaptation.mclmc_adaptation import MCLMCAdaptationState, mclmc_find_L_and_step_size

    num_warmup, dim = 120, 4
    rng = np.random.default_rng(3)
    walk = np.zeros((num_warmup, dim))
    for t in range(1, num_warmup):
        walk[t] = 0.7 * walk[t - 1] + rng.normal(size=dim)
    # of variance 1 after the weights, so that both warm-ups go on from one step size when the metric is set
    table = jnp.asarray(
        walk * np.array([1.0, 2.0, 0.5, 1.0]) if not is_diagonal else walk / np.std(walk, axis=0), float
    )
    sizes = jnp.asarray(rng.normal(size=num_warmup), float)

    def energy_change(t, eps):
        return sizes[t] * 0.001 * eps**3

    def kernel(rng_key, state, logdensity_fn, inverse_mass_matrix, L, step_size):
        t = state.logdensity.astype(int)
        moved = state._replace(position=table[t], logdensity=state.logdensity + 1)
        return moved, Told(energy_change(t, step_size), jnp.asarray(True))

    start = Replayed(jnp.zeros(dim), jnp.ones(dim) / 2, jnp.asarray(0.0), jnp.zeros(dim))
    params = MCLMCAdaptationState(jnp.asarray(2.0), jnp.asarray(0.8), jnp.ones(dim))
    share = 0.1 if is_diagonal else 1 / 9
    _, theirs, num_steps = mclmc_find_L_and_step_size(
        kernel, 3 * num_warmup, start, jax.random.key(0), lambda x: 0.0, share, share, share,
        diagonal_preconditioning=is_diagonal, params=params,
    )  # fmt: skip
    assert num_steps == num_warmup

    warmup = kernels.MCLMCWarmup(num_warmup, is_diagonal=is_diagonal)
    ours = warmup.init(kernels.MCLMC(closed_forms.gaussian(), 0.8, 2.0), table[0])

    def move(state, t):
        return warmup.update(state, t, table[t], told(energy_change(t, state.step_size))), None

    ours, _ = jax.jit(lambda state: jax.lax.scan(move, state, jnp.arange(num_warmup)))(ours)
    # with a metric, BlackJAX keeps the step size in the units of the one before
    tolerance = 0.05 if is_diagonal else 1e-3
    np.testing.assert_allclose(ours.inverse_mass_matrix, theirs.inverse_mass_matrix, rtol=1e-3)
    np.testing.assert_allclose(ours.step_size, theirs.step_size, rtol=tolerance)
    np.testing.assert_allclose(ours.L, theirs.L, rtol=tolerance)


def test_steps_that_were_undone_bound_the_step_size_and_weigh_nothing():
    warmup = kernels.MCLMCWarmup(100)
    start = warmup.init(kernels.MCLMC(closed_forms.gaussian(), 0.8, 2.0), jnp.zeros(2))
    t = jnp.asarray(warmup.phases[0])
    state = warmup.update(start, t, jnp.ones(2), told(jnp.asarray(0.0), is_lost=True))
    assert state.moments.weight == start.moments.weight
    for _ in range(3):  # the energy hardly changes, which asks for far longer steps
        np.testing.assert_allclose(state.step_size, 0.8 * 0.8, rtol=1e-5)
        state = warmup.update(state, t, jnp.ones(2), told(jnp.asarray(1e-9)))
    assert state.moments.weight > 0


def test_a_new_metric_keeps_the_length_of_steps():
    """It is eps (d / sum of the variances in units of the old metric)^(1/2): eps again if that was right."""
    warmup, old, variances = kernels.MCLMCWarmup(100), jnp.array([4.0, 0.5]), jnp.array([1.0, 3.0])
    state = warmup.init(kernels.MCLMC(closed_forms.gaussian(), 0.8, 2.0, old), jnp.zeros(2))
    for found, step_size in ((old, 0.8), (variances, 0.8 * np.sqrt(2 / (1 / 4 + 3 / 0.5)))):
        moments = state.moments._replace(weight=jnp.asarray(10.0), squares=10 * found)
        measured = warmup._measured(state._replace(moments=moments))
        np.testing.assert_allclose(measured.step_size, step_size, rtol=1e-5)
        np.testing.assert_allclose(measured.inverse_mass_matrix, found, rtol=1e-5)


@pytest.fixture(scope="module")
def tuned():
    scale = jnp.array([0.3, 1.0, 3.0, 1.0])
    target = bi.Target(lambda x, scale: -0.5 * jnp.sum((x / scale) ** 2), scale)
    kernel = kernels.MCLMC(target, 0.01, 1.0)

    def run(**more):
        options = {"num_samples": 300, "num_warmup": 1_200, "progress": False, **more}
        return bi.sample(0, kernel, 0.1 * jnp.ones((8, 4)), **options)

    return run, run(), scale


def test_sample_warms_it_up(tuned):
    """From a step size that is far too small; the energy variance is that asked for, the metric the variances."""
    _, draws, scale = tuned
    found = np.asarray(draws.tuned.inverse_mass_matrix / scale**2)
    assert np.all(np.abs(np.log(np.median(found, axis=0))) < 0.7)
    variance = np.mean(draws.stats["energy_change"] ** 2) / 4
    assert 5e-4 / 3 < variance < 3 * 5e-4
    assert np.all(draws.stats["num_gradients"] == 2)


@pytest.mark.slow
def test_bias_falls_by_the_cube_root_of_the_energy_variance():
    """On a round Gaussian about two percent of the variances at the default, and half of it at an eighth."""
    kernel = kernels.MCLMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 1.0, 3.0)
    found = []
    for share in (1, 8):
        draws = bi.sample(
            0, kernel, jax.random.normal(jax.random.key(1), (64, 100)), num_samples=1_500, num_warmup=1_500,
            warmup=kernels.MCLMCWarmup(1_500, 5e-4 / share), collect=lambda state: jnp.mean(state.position**2),
            progress=False,
        )  # fmt: skip
        found.append(1 - np.asarray(draws.samples, np.float64).mean(axis=1))  # of each chain
    assert 0.015 < np.mean(found[0]) < 0.025
    assert mean_p_value(found[0] - 2 * found[1], 0.0) > FALSE_ALARM


def test_chunks_do_not_change_the_warmup(tuned):
    run, draws, _ = tuned
    again = run(chunk_size=97)
    jax.tree.map(np.testing.assert_array_equal, (draws.samples, draws.tuned), (again.samples, again.tuned))


def test_default_warmup_is_its_own():
    kernel = kernels.MCLMC(closed_forms.gaussian(), 0.1, 1.0)
    assert type(default_warmup(kernel, 100)) is kernels.MCLMCWarmup
    assert default_warmup(kernel, 10) is None
    assert default_warmup(kernel, 0) is None
    assert type(default_warmup(kernels.MALA(closed_forms.gaussian(), 0.1), 100)) is StepSize


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    target = closed_forms.gaussian()
    for arguments, match in [((0.0, 1.0), "step_size"), ((1.0, jnp.inf), "L must be finite"), ((1.0, -1.0), "L must")]:
        with pytest.raises(ValueError, match=match):
            kernels.MCLMC(target, *arguments)
    with pytest.raises(ValueError, match="at least two coordinates"):
        kernels.MCLMC(lambda x: -(x**2), 1.0, 1.0).init(jnp.zeros(()))
    with pytest.raises(ValueError, match=r"of shape \(2,\), got shape \(3,\)"):
        kernels.MCLMC(target, 1.0, 1.0, jnp.ones(3)).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="num_warmup must be at least 20"):
        kernels.MCLMCWarmup(10)
    with pytest.raises(ValueError, match="energy_variance"):
        kernels.MCLMCWarmup(100, 0.0)
    repeated = kernels.Repeat(kernels.MCLMC(target, 1.0, 1.0), 2)
    with pytest.raises(ValueError, match="MCLMC alone, got Repeat"):
        bi.sample(0, repeated, jnp.zeros((2, 2)), num_samples=1, num_warmup=20, warmup=kernels.MCLMCWarmup(20))
