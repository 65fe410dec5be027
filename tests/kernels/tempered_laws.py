"""Laws whose powers and bridges can be drawn from exactly.

banana      x / scale the logarithm of a Gamma(3) variable, y_i | x ~ N(x^2 / 4, exp(x / 2)); its power beta has
            x / scale the logarithm of a Gamma((5 beta + 1) / 2, beta) variable, y_i | x ~ N(x^2 / 4, exp(x / 2) / beta)
counts      log rate ~ log Gamma(2, 1) a priori, counts ~ Poisson(rate); prior times likelihood^beta has
            rate ~ Gamma(2 + beta sum(counts), 1 + beta n)

The betas are numbers for which the shapes of the Gamma laws are whole, as sums of exponentials compile in a tenth of
the time of `jax.random.loggamma`: of the banana 0.2, 0.6, 1, 3; of the counts 0.25, 0.5, 0.75, 1.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from state_space_laws import log_gamma

import bayesinf as bi

SCALE = jnp.asarray(1.2)
COUNTS = jnp.array([3.0, 5.0, 4.0])
PRIOR = dist.Gamma(2.0, 1.0)


def banana(position, scale):
    x, y = position["x"] / scale, position["y"]
    return 3.0 * x - jnp.exp(x) - 0.5 * jnp.sum(jnp.exp(-x / 2) * (y - x**2 / 4) ** 2) - y.size * x / 4


BANANA = bi.Target(banana, SCALE)


def whole(shape):
    assert abs(shape - round(shape)) < 1e-5
    return round(shape)


def draw_banana(key, beta=1.0):
    """Two coordinates of y."""
    key_x, key_y = jax.random.split(key)
    x = log_gamma(key_x, whole(2.5 * beta + 0.5)) - jnp.log(beta)
    y = x**2 / 4 + jnp.exp(x / 4) / jnp.sqrt(beta) * jax.random.normal(key_y, (2,))
    return {"x": SCALE * x, "y": y}


def log_prior(log_rate):
    """With the Jacobian of the logarithm."""
    return PRIOR.log_prob(jnp.exp(log_rate)) + log_rate


def log_rate_posterior(log_rate, counts):
    return log_prior(log_rate) + jnp.sum(dist.Poisson(jnp.exp(log_rate)).log_prob(counts))


RATE = bi.Target(log_rate_posterior, COUNTS)


def draw_log_rate(key, beta=1.0):
    return log_gamma(key, whole(2 + beta * sum(COUNTS.tolist()))) - jnp.log(1.0 + beta * COUNTS.size)


def log_evidence():
    """Of the counts under the prior."""
    shape, rate = 2.0 + jnp.sum(COUNTS), 1.0 + COUNTS.size
    log_factorials = jnp.sum(jax.scipy.special.gammaln(COUNTS + 1))
    return jax.scipy.special.gammaln(shape) - shape * jnp.log(rate) - log_factorials
