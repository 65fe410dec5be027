"""Parameters and path together are calibrated: ranks of both, and of their products, over data from the model itself.

The model is that of `state_space_laws`: a level and a scale with skewed priors, four states, seen through an
exponential. Each of theta and path may have the right law while the pair has a wrong one; what then moves are the ranks
of products, which are compared for every pair of a parameter and a state, and for those named in `crosses`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_space_laws as laws
from planted.parisian import StaleParticleGibbs

from bayesinf.conformance import FALSE_ALARM, simulation_based_calibration
from bayesinf.kernels import Barker, ParticleFilter, ParticleGibbs, ParticleMarginal, Repeat
from bayesinf.kernels.online_filter import begin, move_on
from bayesinf.models.state_space import log_joint

NUM_DRAWS = 19
NUM_BURN_IN = 3  # in draws


def calibrate(start, step, look, *, thin, num_simulations):
    """Calibration of a chain that starts at a draw of the prior, whatever y is.

    Args:
        start: `start(position, ys)` is the first state.
        step: `step(key, state, ys)` is the next.
        look: `look(key, before, state, ys)` is theta and path at a state; before is for planted mistakes.
        thin: steps a draw, enough that two draws hardly correlate.
        num_simulations: data sets.
    """

    def posterior(key, ys, num_draws):
        key_start, key_steps, key_look = jax.random.split(key, 3)

        def move(t, state):
            return step(jax.random.fold_in(key_steps, t), state, ys)

        def draw(before, i):
            first = (NUM_BURN_IN + i) * thin
            state = jax.lax.fori_loop(first, first + thin, move, before)
            return state, look(jax.random.fold_in(key_look, i), before, state, ys)

        first = start(laws.draw_parameters_and_path(key_start), ys)
        warm = jax.lax.fori_loop(0, NUM_BURN_IN * thin, move, first)
        return jax.lax.scan(draw, warm, jnp.arange(num_draws))[1]

    return simulation_based_calibration(
        0,
        laws.draw_parameters_and_path,
        laws.draw_series,
        posterior,
        num_draws=NUM_DRAWS,
        num_simulations=num_simulations,
        quantities=crosses,
    )


def crosses(position, ys):
    """What belongs to parameters and path together."""
    theta, path = position["theta"], position["path"]
    return {
        "level x mean of the path": theta[0] * jnp.mean(path),
        "level x first state": theta[0] * path[0],
        "scale x spread of the path": jnp.exp(theta[1]) * jnp.std(path),
        "log joint density": laws.log_prior(theta) + log_joint(laws.Learnt(theta), path, ys),
    }


def p_value_of(found, is_product):
    """The p-value of the comparisons of products alone, or of single parameters and states alone."""
    chosen = [p for name, p in found.p_values.items() if (" x " in name) == is_product and "joint" not in name]
    return len(chosen) * min(chosen)


def gibbs(kind=ParticleGibbs, *, num_simulations=1_000, **options):
    """Calibration of particle Gibbs."""

    def kernel_on(ys):
        def moves(target):
            return Repeat(Barker(target, 0.2), 4)

        return kind(laws.Learnt, laws.log_prior, ys, 4, parameter_kernel=moves, **options)

    return calibrate(
        lambda position, ys: kernel_on(ys).init(position),
        lambda key, state, ys: kernel_on(ys).step(key, state)[0],
        lambda key, before, state, ys: state.position,
        thin=20,
        num_simulations=num_simulations,
    )


@pytest.mark.parametrize("refresh", ["ancestor", pytest.param("backward", marks=pytest.mark.slow)])
def test_particle_gibbs_is_calibrated(refresh):
    gibbs(refresh=refresh).raise_if_rejected()


@pytest.mark.slow
def test_blocks_that_see_old_values_are_found_by_the_products():
    """`particles`: the path was drawn given the parameters of the step before. Each alone has nearly its right law."""
    found = gibbs(StaleParticleGibbs, refresh="ancestor", num_simulations=2_000)
    assert p_value_of(found, is_product=True) < FALSE_ALARM
    assert p_value_of(found, is_product=True) < 1e-3 * p_value_of(found, is_product=False)


# ---- particle marginal Metropolis-Hastings, whose path is one of the filter's ----


class Remembering(laws.Learnt):
    """The same states, each with the path that has led to it."""

    def _with_path(self, law, path, t):
        def sample(key):
            x = law.sample(key)
            return {"now": x, "path": path.at[t].set(x)}

        return sample, lambda x: law.log_prob(x["now"])

    def initial(self):
        return self._with_path(super().initial(), jnp.zeros(laws.NUM_STEPS), 0)

    def transition(self, x_prev, t):
        return self._with_path(super().transition(x_prev["now"], t), x_prev["path"], t)

    def observation(self, x, t):
        return super().observation(x["now"], t)


def marginal_on(ys):
    return ParticleMarginal(Remembering, laws.log_prior, ys, 4, step_size=0.7, renewal=0.4)


def run_again(kernel, state):
    """The last particles of the filter whose random numbers are those of the state, and its log evidence."""
    one = ParticleFilter(
        kernel.build(state.position), num_particles=kernel.num_particles, ess_threshold=kernel.ess_threshold
    )
    keys = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.key(seed), t))(
        state.seeds, jnp.arange(state.seeds.size)
    )
    filtered, _ = begin(one, keys[0], kernel.ys[0])

    def step(filtered, row):
        key, y = row
        return move_on(one, kernel._sorted(filtered), jax.random.split(key), y)[0], None

    return jax.lax.scan(step, filtered, (keys[1:], kernel.ys[1:]))[0]


def path_of(key, state, ys):
    """A path by the last weights: with theta it has the joint law, for every number of particles."""
    filtered = run_again(marginal_on(ys), state)
    return filtered.particles["path"][jax.random.categorical(key, filtered.log_weights)]


def marginal(look, *, num_simulations=1_000):
    """Calibration of particle marginal Metropolis-Hastings."""
    return calibrate(
        lambda position, ys: marginal_on(ys).init(position["theta"]),
        lambda key, state, ys: marginal_on(ys).step(key, state)[0],
        look,
        thin=40,
        num_simulations=num_simulations,
    )


def test_the_filter_that_is_run_again_is_the_same():
    position = laws.draw_parameters_and_path(jax.random.key(0))
    kernel = marginal_on(laws.draw_series(jax.random.key(1), position))
    step = jax.jit(lambda key, state: kernel.step(key, state)[0])
    state = kernel.init(position["theta"])
    for i in range(3):
        state = step(jax.random.key(i), state)
    found = jax.jit(run_again)(kernel, state).log_evidence + laws.log_prior(state.position)
    np.testing.assert_allclose(found, state.evaluation.logdensity, rtol=1e-5)


def test_particle_marginal_is_calibrated_with_a_path_of_its_filter():
    def look(key, before, state, ys):
        return {"theta": state.position, "path": path_of(key, state, ys)}

    marginal(look).raise_if_rejected()


@pytest.mark.slow
def test_a_path_of_the_draw_before_is_found_by_the_products():
    """Parameters and path have exactly their right laws, each alone."""

    def look(key, before, state, ys):
        return {"theta": state.position, "path": path_of(key, before, ys)}

    found = marginal(look, num_simulations=2_000)
    assert p_value_of(found, is_product=True) < FALSE_ALARM
    assert p_value_of(found, is_product=False) > FALSE_ALARM
