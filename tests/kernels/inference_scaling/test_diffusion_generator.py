"""Diffusion models as generators: the law at the end, Tweedie's formula, and the contract of a generator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from grid_operator import GRID, SPACING, Mixture, integral, move

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import DiffusionGenerator, VariancePreserving

SPEED = 9.0
NOISING = VariancePreserving(SPEED, SPEED)
DATA = Mixture((0.7, 0.3), (-1.2, 1.5), (0.5, 0.8))
NUM_STEPS = 60
END = 0.02
TIMES = jnp.linspace(1.0, END, NUM_STEPS + 1)


def generator(substeps=1, times=TIMES, shape=()):
    return DiffusionGenerator(DATA.score(NOISING), NOISING, times, shape=shape, substeps=substeps)


def discretised(num_steps):
    """The density of ancestral sampling with these steps, on the grid."""
    times = np.linspace(1.0, END, num_steps + 1)
    density = scipy.stats.norm.pdf(GRID, scale=np.sqrt(1 - np.exp(-SPEED)))
    for t, u in itertools.pairwise(times):
        alpha_t, alpha_u = np.exp(-SPEED * t / 2), np.exp(-SPEED * u / 2)
        v_t, v_u = 1 - alpha_t**2, 1 - alpha_u**2
        guess = (GRID + v_t * DATA.score_on_grid(t, NOISING)) / alpha_t
        # of x_u given x_0 = guess, and then x_t given x_u: precisions and precision times mean add
        step_variance = v_t - (alpha_t / alpha_u) ** 2 * v_u
        precision = 1 / v_u + (alpha_t / alpha_u) ** 2 / step_variance
        mean = (alpha_u * guess / v_u + (alpha_t / alpha_u) * GRID / step_variance) / precision
        density = move(density, mean, precision**-0.5)
    return density


def run(one, key, num_particles, prompt=None):
    key_init, key_steps = jax.random.split(jax.random.key(key))

    @jax.jit
    def generate():
        state = one.init(key_init, prompt, num_particles)
        return jax.lax.scan(lambda s, k: one.step(k, s), state, jax.random.split(key_steps, one.max_steps))

    return generate()


@pytest.mark.parametrize("substeps", [1, 5])
@pytest.mark.usefixtures("compile_fast")
def test_the_law_at_the_end(substeps):
    state, info = run(generator(substeps), 0, 20_000)
    density = discretised(NUM_STEPS)
    cumulated = np.concatenate([[0.0], np.cumsum(density)]) * SPACING
    edges = np.append(GRID, GRID[-1] + SPACING) - SPACING / 2

    def cdf(x):
        return np.interp(x, edges, cumulated)

    assert scipy.stats.kstest(np.asarray(state.x), cdf).pvalue > FALSE_ALARM
    # as sharp as that, a wrong law is told from the right one
    assert scipy.stats.kstest(np.asarray(state.x) * 1.05, cdf).pvalue < FALSE_ALARM
    assert np.all(info.is_done[-1])
    assert not np.any(info.is_done[:-1])
    assert np.all(info.num_tokens == substeps)
    assert not np.any(info.log_ratio)


def test_it_tends_to_the_data():
    """The error of the distribution function halves as the steps do, to that of the noise in the beginning."""
    exact = np.cumsum(DATA.density_on_grid(END, NOISING)) * SPACING
    errors = [np.abs(np.cumsum(discretised(num)) * SPACING - exact).max() for num in (60, 120)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.02


@pytest.mark.usefixtures("compile_fast")
def test_with_many_steps_the_law_is_the_mixture():
    """Two thousand steps down to t = 0: their error is below what 3_000 draws can tell."""
    state, _ = run(generator(100, jnp.linspace(1.0, 0.0, 2_001)), 3, 3_000)
    assert scipy.stats.kstest(np.asarray(state.x), DATA.cdf).pvalue > FALSE_ALARM


def test_what_is_to_be_expected_of_the_data():
    """Tweedie's formula against the integral of x_0 under its law given x_t."""
    state = generator().init(jax.random.key(1), None, 8)
    state, _ = generator().step(jax.random.key(2), state)
    for num_steps in (0, 1):
        before = generator().prefix(state, jnp.asarray(num_steps))
        t = float(TIMES[num_steps])
        alpha, v = np.exp(-SPEED * t / 2), 1 - np.exp(-SPEED * t)
        joint = DATA.density_on_grid(0.0, NOISING) * np.exp(
            -0.5 * (np.asarray(before.x, np.float64)[:, None] - alpha * GRID) ** 2 / v
        )
        expected = (joint * GRID).sum(1) / joint.sum(1)
        np.testing.assert_allclose(generator().denoised(before), expected, rtol=0, atol=2e-3)


@pytest.mark.usefixtures("compile_fast")
def test_the_contract_of_a_generator():
    one = DiffusionGenerator(
        lambda x, t, prompt: prompt * jnp.ones((2,)) - x, NOISING, TIMES[:5], shape=(2,), substeps=2
    )
    assert (one.max_steps, one.max_tokens_per_step) == (2, 2)
    begun = one.init(jax.random.key(0), 3.0, 6)
    once, info = one.step(jax.random.key(1), begun)
    assert info.num_tokens.tolist() == [2] * 6
    twice, info = one.step(jax.random.key(2), once)
    assert np.all(info.is_done)
    thrice, info = one.step(jax.random.key(3), twice)  # what has finished stays as it is
    assert info.num_tokens.tolist() == [0] * 6
    assert np.all(info.is_done)
    for left, right in [
        (thrice, twice),
        (one.prefix(twice, jnp.asarray(1)), once),
        (one.prefix(twice, jnp.asarray(0)), begun),
        (one.prefix(once, jnp.asarray(9)), once),
    ]:
        jax.tree.map(np.testing.assert_array_equal, left, right)
        assert jax.tree.map(jnp.result_type, left) == jax.tree.map(jnp.result_type, right)
    chosen = one.gather(twice, jnp.array([4, 4, 0]))
    np.testing.assert_array_equal(chosen.x, twice.x[jnp.array([4, 4, 0])])
    assert chosen.prompt == 3.0
    assert len(one.decode(chosen)) == 3
    # a mixed population: those that are ahead stay ahead
    is_behind = jnp.arange(6) < 3
    path = jnp.where(is_behind[:, None, None], once.path, twice.path)
    mixed = twice._replace(path=path, num_steps=jnp.where(is_behind, once.num_steps, twice.num_steps))
    mixed, info = one.step(jax.random.key(2), mixed)
    np.testing.assert_array_equal(mixed.path[3:], twice.path[3:])
    np.testing.assert_allclose(mixed.x, twice.x, rtol=1e-5, atol=1e-6)
    assert info.num_tokens.tolist() == [2, 2, 2, 0, 0, 0]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_generate_is_said():
    with pytest.raises(ValueError, match="times must fall"):
        generator(times=jnp.linspace(0.0, 1.0, 5))
    with pytest.raises(ValueError, match="multiple of substeps=7"):
        generator(substeps=7)
    one = DiffusionGenerator(lambda x, t: jnp.zeros(3), NOISING, TIMES, shape=(2,))
    begun = one.init(jax.random.key(1), None, 4)
    with pytest.raises(ValueError, match="score must return an array of the shape"):
        one.step(jax.random.key(0), begun)


def test_the_grid_is_fine_enough():
    assert integral(discretised(NUM_STEPS)) == pytest.approx(1.0, abs=1e-6)
