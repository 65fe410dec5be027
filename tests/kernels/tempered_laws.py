"""Laws whose powers and bridges can be drawn from exactly.

banana      x / scale the logarithm of a Gamma(3) variable, y_i | x ~ N(x^2 / 4, exp(x / 2)); its power beta has
            x / scale the logarithm of a Gamma((5 beta + 1) / 2, beta) variable, y_i | x ~ N(x^2 / 4, exp(x / 2) / beta)
counts      log rate ~ log Gamma(2, 1) a priori, counts ~ Poisson(rate); prior times likelihood^beta has
            rate ~ Gamma(2 + beta sum(counts), 1 + beta n)
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import bayesinf as bi

SCALE = jnp.asarray(1.2)
COUNTS = jnp.array([3.0, 5.0, 4.0])
PRIOR = dist.Gamma(2.0, 1.0)


def banana(position, scale):
    x, y = position["x"] / scale, position["y"]
    return 3.0 * x - jnp.exp(x) - 0.5 * jnp.sum(jnp.exp(-x / 2) * (y - x**2 / 4) ** 2) - y.size * x / 4


BANANA = bi.Target(banana, SCALE)


def draw_banana(key, beta=1.0):
    """Two coordinates of y."""
    key_x, key_y = jax.random.split(key)
    x = jax.random.loggamma(key_x, 2.5 * beta + 0.5) - jnp.log(beta)
    y = x**2 / 4 + jnp.exp(x / 4) / jnp.sqrt(beta) * jax.random.normal(key_y, (2,))
    return {"x": SCALE * x, "y": y}


def log_rate_posterior(log_rate, counts):
    """The Jacobian of the logarithm is in the prior."""
    rate = jnp.exp(log_rate)
    return PRIOR.log_prob(rate) + log_rate + jnp.sum(dist.Poisson(rate).log_prob(counts))


RATE = bi.Target(log_rate_posterior, COUNTS)


def draw_log_rate(key, beta=1.0):
    shape, rate = 2.0 + beta * jnp.sum(COUNTS), 1.0 + beta * COUNTS.size
    return jax.random.loggamma(key, shape) - jnp.log(rate)


def log_evidence(beta=1.0):
    """Of the counts under the prior, their likelihood to the power beta."""
    shape, rate = 2.0 + beta * jnp.sum(COUNTS), 1.0 + beta * COUNTS.size
    log_factorials = beta * jnp.sum(jax.scipy.special.gammaln(COUNTS + 1))
    return jax.scipy.special.gammaln(shape) - shape * jnp.log(rate) - log_factorials
