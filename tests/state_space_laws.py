"""Exact draws for kernels on state-space models.

PATHS: given fixed data a linear Gaussian model has an exact posterior of the path. All chains then share one data set,
so that an error adds up over the steps; over random data the same error may average out.

Learnt: for parameters and path together no posterior is known, and none is needed: `geweke_joint` tests by the joint
law of (parameters, path) and data, with skewed priors and a skewed observation.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import bayesinf as bi
from bayesinf import kernels, models

NUM_STEPS = 4
PATHS = models.LinearGaussian.scalar(0.9, 0.5, 1.0, 0.5)
SERIES = jnp.array([0.3, 1.6, 1.1, -0.9])[:, None]


def draw_path(key):
    return models.sample_posterior(key, PATHS, SERIES, 1)[0]


class Learnt(models.StateSpaceModel):
    """States of unknown level and scale, theta = (level, log scale), seen through an exponential."""

    theta: jax.Array = eqx.field(converter=jnp.asarray)

    def initial(self):
        return dist.Normal(self.theta[0], jnp.exp(self.theta[1]))

    def transition(self, x_prev, t):
        return dist.Normal(self.theta[0] + 0.7 * (x_prev - self.theta[0]), jnp.exp(self.theta[1]))

    def observation(self, x, t):
        return dist.Normal(jnp.exp(x / 2), 0.5)


def log_prior(theta):
    """The level is the logarithm of a Gamma(2) variable, the scale is e^-2 times a Gamma(4) variable."""
    log_gamma = theta[1] + 2.0
    return 2.0 * theta[0] - jnp.exp(theta[0]) + 4.0 * log_gamma - jnp.exp(log_gamma)


def log_gamma(key, shape):
    """Of a whole-numbered shape: compiles in a tenth of the time of `jax.random.loggamma`."""
    return jnp.log(jnp.sum(jax.random.exponential(key, (shape,))))


def draw_parameters_and_path(key):
    key_level, key_scale, key_path = jax.random.split(key, 3)
    theta = jnp.stack([log_gamma(key_level, 2), log_gamma(key_scale, 4) - 2.0])
    return {"theta": theta, "path": bi.models.simulate(key_path, Learnt(theta), NUM_STEPS)[0]}


def draw_series(key, position):
    path = position["path"]
    return jnp.exp(path / 2) + 0.5 * jax.random.normal(key, path.shape)


def particle_gibbs(ys, kind=kernels.ParticleGibbs, **options):
    moves = functools.partial(kernels.MALA, step_size=0.05)
    return kind(Learnt, log_prior, ys, 3, parameter_kernel=moves, **options)


def transition(build):
    """One step of the kernel `build(ys)`, as `geweke_joint` wants it."""

    def step(key, position, ys):
        kernel = build(ys)
        return kernel.step(key, kernel.init(position))[0].position

    return step
