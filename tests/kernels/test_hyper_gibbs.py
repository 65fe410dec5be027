"""Gibbs sampling of a latent function and its parameters: the law of both, from exact draws and over data.

Compared are single coordinates and products of two, of parameters and function together. Bugs are planted in the forms.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from latent_laws import PRIOR, RANDOM_WALK, build, draw_data, draw_posterior, draw_prior, kernel_of, log_likelihood

from bayesinf.conformance import FALSE_ALARM, Report, simulation_based_calibration
from bayesinf.conformance.comparison import law_has_moved
from bayesinf.kernels import HyperGibbs, Repeat, latent_forms
from bayesinf.kernels.latent_forms import FORMS, Form, as_latent
from bayesinf.kernels.posterior import Laws

NUM_CHAINS, NUM_STEPS = 10_000, 5


@eqx.filter_jit
def run(kernel, keys, starts):
    def chain(row):
        key, start = row

        def move(t, state):
            return kernel.step(jax.random.fold_in(key, t), state)[0]

        return jax.lax.fori_loop(0, NUM_STEPS, move, kernel.init(start)).position

    return jax.lax.map(chain, (keys, starts), batch_size=500)  # thousands of LAPACK's small matrices at once may hang


def p_value_of(kernel):
    """That exact draws have the same law after some steps."""
    exact = draw_posterior()
    starts = jax.tree.map(lambda leaf: leaf[:NUM_CHAINS], exact)
    fresh = jax.tree.map(lambda leaf: leaf[NUM_CHAINS:], exact)
    ends = run(kernel, jax.random.split(jax.random.key(2), NUM_CHAINS), starts)
    assert np.mean(np.asarray(ends["theta"]["scale"]) != starts["theta"]["scale"]) > 0.5
    assert np.mean(np.asarray(ends["f"][:, 1]) != starts["f"][:, 1]) > 0.9
    return Report("the law after some steps", law_has_moved(starts, ends, fresh)).p_value


@pytest.mark.parametrize("form", ["whitened", "centred", "surrogate"])
def test_law_is_invariant(form):
    assert p_value_of(kernel_of(form)) > FALSE_ALARM


# ---- planted bugs ----


def without_determinant(latent, f):
    """The quadratic form alone of N(f; m, K)."""
    return f, -0.5 * jnp.sum(latent.whiten(f) ** 2)


def law_of(latent):
    return dist.MultivariateNormal(latent.loc, scale_tril=latent.factor.tril)


def fix_noisier(key, latent, f):
    """Surrogate data of half the variance with which the parameters are then moved."""
    g, _ = FORMS["surrogate"].fix(key, as_latent(law_of(latent), latent.noise / 2), f)
    mean, tril, _ = latent_forms._given_surrogate(latent, g)
    return g, tril.T @ (latent.whiten(f) - mean)


def without_density_of_the_data(latent, fixed):
    """What the surrogate data say of the parameters is forgotten."""
    f, log_density = FORMS["surrogate"].place(latent, fixed)
    return f, 0.0 * log_density


def with_prior_twice(latent, z):
    """The density of f under its prior once more, as if z were f."""
    f = latent.color(z)
    return f, latent.log_prob(f)


class WithoutJacobian(Laws):
    """Parameters that are moved on the real line by their density on the support."""

    def log_density(self, position):
        values = self.constrain(position)
        return sum(law.log_prob(values[name]) for name, law in self.laws.items())


WRONG = {
    "no determinant": Form(FORMS["centred"].fix, without_determinant),
    "other variance": Form(fix_noisier, FORMS["surrogate"].place, has_noise=True),
    "no surrogate density": Form(FORMS["surrogate"].fix, without_density_of_the_data, has_noise=True),
    "prior twice": Form(FORMS["whitened"].fix, with_prior_twice),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_forms_are_found(name, monkeypatch):
    monkeypatch.setitem(FORMS, name, WRONG[name])
    assert p_value_of(kernel_of(name)) < FALSE_ALARM


def test_a_forgotten_jacobian_is_found():
    assert p_value_of(kernel_of("centred", prior=WithoutJacobian(PRIOR))) < FALSE_ALARM


class StaleLatent(HyperGibbs):
    """f is drawn at the parameters of the step before, and the parameters at the f of the step before."""

    def step(self, key, state):
        moved, info = super().step(key, state)
        again, _ = super().step(jax.random.fold_in(key, 1), state)
        return moved._replace(position={"theta": moved.position["theta"], "f": again.position["f"]}), info


def test_blocks_that_see_old_values_are_found():
    kernel = kernel_of("whitened", kind=StaleLatent)
    assert p_value_of(kernel) < FALSE_ALARM


# ---- over data: calibration ----


def crosses(position, y):
    """What belongs to parameters and function together."""
    theta, f = Laws(PRIOR).constrain(position["theta"]), position["f"]
    return {
        "scale x size of f": theta["scale"] * jnp.sum((f - 0.3) ** 2),
        "lengthscale x roughness": theta["lengthscale"] * jnp.abs(f[1] - f[2]),
        "shape x misfit": theta["shape"] * jnp.sum((f - jnp.log(y)) ** 2),
        "log joint density": log_likelihood(f, y, theta) + build(theta).log_prob(f),
    }


def four_walks(target):
    return Repeat(RANDOM_WALK(target), 4)


def calibration_of(form, num_simulations=800, num_draws=19, thin=15, num_burn_in=3):
    def posterior(key, y, num_draws):
        key_start, key_steps = jax.random.split(key)
        kernel = kernel_of(form, y, parameter_kernel=four_walks)

        def draw(state, i):
            def move(t, state):
                return kernel.step(jax.random.fold_in(key_steps, t), state)[0]

            state = jax.lax.fori_loop(i * thin, (i + 1) * thin, move, state)
            return state, state.position

        steps = jnp.arange(num_burn_in + num_draws)
        positions = jax.lax.scan(draw, kernel.init(draw_prior(key_start)), steps)[1]
        return jax.tree.map(lambda leaf: leaf[num_burn_in:], positions)

    options_of_test = {"num_simulations": num_simulations, "num_draws": num_draws, "quantities": crosses}
    return simulation_based_calibration(0, draw_prior, draw_data, posterior, **options_of_test)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["surrogate", ("centred", "whitened")], ids=["surrogate", "interwoven"])
def test_is_calibrated(form):
    """Draws 15 sweeps apart correlate by less than 0.03: measured over 16 data sets."""
    calibration_of(form).raise_if_rejected()
