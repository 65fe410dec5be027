"""A model of a latent function and its parameters, and exact draws of their posterior.

Priors and likelihood are skewed, and the likelihood is bounded: what a rejection test leaves of draws of the prior are
exact draws of the posterior.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bayesinf import kernels
from bayesinf.kernels import HyperGibbs
from bayesinf.kernels.latent_forms import FORMS
from bayesinf.kernels.posterior import Laws
from bayesinf.models import gp
from bayesinf.models.square_root import cholesky

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
    return jnp.array([0.3, 0.5, 0.8]) * (theta["scale"] / theta["shape"]) ** 2


def draw_prior(key):
    key_theta, key_f = jax.random.split(key)
    theta = Laws(PRIOR).draw(key_theta)
    process = build(Laws(PRIOR).constrain(theta))
    # written out: thousands at once are faster than by calls of LAPACK
    return {"theta": theta, "f": process.loc + cholesky(process.factor.covariance) @ jax.random.normal(key_f, (3,))}


def draw_data(key, position):
    shape = Laws(PRIOR).constrain(position["theta"])["shape"]
    return jnp.exp(position["f"]) * jax.random.gamma(key, shape, (3,)) / shape


@functools.cache
def draw_posterior(num=500_000):
    """The draws of the prior that are accepted with their likelihood over the largest, at f = log y and shape = 3."""

    @jax.jit
    def attempt(keys):
        drawn = jax.vmap(draw_prior)(keys)
        values = jax.vmap(Laws(PRIOR).constrain)(drawn["theta"])
        largest = log_likelihood(jnp.log(Y), Y, {"shape": 3.0})
        heights = jax.vmap(log_likelihood, (0, None, 0))(drawn["f"], Y, values) - largest
        return drawn, jnp.log(jax.random.uniform(jax.random.key(1), (num,))) < heights

    drawn, is_accepted = attempt(jax.random.split(jax.random.key(0), num))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(is_accepted)], drawn)


# on the scale of the prior, which is not far from that of the posterior
RANDOM_WALK = functools.partial(
    kernels.PCN, step_size=0.4, prior_mean=jnp.array([0.0, -0.3, 0.0]), prior_tril=jnp.array([0.5, 0.4, 1.8])
)
MALA = functools.partial(kernels.MALA, step_size=0.1)


def kernel_of(form, y=Y, prior=PRIOR, parameter_kernel=RANDOM_WALK, kind=HyperGibbs, **options):
    forms = (form,) if isinstance(form, str) else form
    noise = variance if any(FORMS[one].has_noise for one in forms) else None
    return kind(
        build,
        prior,
        log_likelihood,
        y,
        parameter_kernel=parameter_kernel,
        form=form,
        auxiliary_variance=noise,
        **options,
    )
