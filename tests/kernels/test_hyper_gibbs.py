"""Gibbs sampling of a latent function and its parameters: the joint law from exact draws, calibration, and what it refuses.

The model has skewed priors and a skewed likelihood that bounds: exact draws of the posterior are those of the prior that
a rejection test leaves. Single coordinates and products of two are compared, of parameters and function together.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import state_space_laws as laws

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, contract, exact_start_invariance, simulation_based_calibration
from bayesinf.kernels import HyperGibbs
from bayesinf.kernels.latent_forms import FORMS, Form, as_latent
from bayesinf.kernels.posterior import Laws
from bayesinf.models import gp

X = jnp.array([0.0, 0.6, 1.0])
Y = jnp.array([3.0, 1.2, 0.4])
PRIOR = {
    "lengthscale": dist.LogNormal(0.0, 0.5),
    "scale": dist.LogNormal(-0.3, 0.4),
    "shape": dist.Uniform(0.5, 3.0),
}


def build(theta):
    return gp.GP(theta["scale"] ** 2 * gp.Matern32(theta["lengthscale"]), X, mean=0.3)


def log_likelihood(f, y, theta):
    """Of Gamma variables of mean e^f."""
    return jnp.sum(dist.Gamma(theta["shape"], theta["shape"] * jnp.exp(-f)).log_prob(y))


def variance(theta):
    """A noise of surrogate data that moves with two parameters."""
    return jnp.array([0.3, 0.5, 0.8]) * theta["scale"] / theta["shape"]


def draw_prior(key):
    key_theta, key_f = jax.random.split(key)
    theta = Laws(PRIOR).draw(key_theta)
    return {"theta": theta, "f": build(Laws(PRIOR).constrain(theta)).sample(key_f)}


def draw_data(key, position):
    shape = Laws(PRIOR).constrain(position["theta"])["shape"]
    return jnp.exp(position["f"]) * jax.random.gamma(key, shape, (3,)) / shape


def draw_posterior(key, block=64):
    """The first draw of the prior that is accepted with its likelihood over the largest, at f = log y, shape = 3."""
    largest = log_likelihood(jnp.log(Y), Y, {"shape": 3.0})

    def attempt(carry):
        i, _, _ = carry
        key_draws, key_accept = jax.random.split(jax.random.fold_in(key, i))
        drawn = jax.vmap(draw_prior)(jax.random.split(key_draws, block))
        values = jax.vmap(Laws(PRIOR).constrain)(drawn["theta"])
        heights = jax.vmap(log_likelihood, (0, None, 0))(drawn["f"], Y, values) - largest
        is_accepted = jnp.log(jax.random.uniform(key_accept, (block,))) < heights
        first = jnp.argmax(is_accepted)
        return i + 1, jax.tree.map(lambda leaf: leaf[first], drawn), jnp.any(is_accepted)

    start = attempt((0, None, None))
    return jax.lax.while_loop(lambda carry: ~carry[2], attempt, start)[1]


RANDOM_WALK = partial(kernels.PCN, step_size=0.3, prior_tril=0.5)
MALA = partial(kernels.MALA, step_size=0.1)


def kernel_of(form, y=Y, prior=PRIOR, parameter_kernel=MALA, **options):
    forms = (form,) if isinstance(form, str) else form
    noise = variance if any(FORMS[one].has_noise for one in forms) else None
    return HyperGibbs(
        build,
        prior,
        log_likelihood,
        y,
        parameter_kernel=parameter_kernel,
        form=form,
        auxiliary_variance=noise,
        **options,
    )


def p_value_of(kernel, num_chains=10_000, num_steps=5):
    report = exact_start_invariance(1, kernel, draw_posterior, num_chains=num_chains, num_steps=num_steps)
    assert report.notes["moved"] > 0.9
    return report.p_value


@pytest.mark.parametrize("form", ["whitened", "centred", "surrogate"])
def test_law_is_invariant(form):
    assert p_value_of(kernel_of(form)) > FALSE_ALARM
