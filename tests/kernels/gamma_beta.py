"""Gamma-beta counts: positive states, skewed and dependent, whose smoothing law is drawn from exactly.

    x_0 ~ Gamma(4, 2),   x_t = 2 x_{t-1} B_t,   B_t ~ Beta(a_{t-1} / 2, a_{t-1} / 2),   y_t ~ Poisson(x_t)

with a_t, b_t the shape and rate of x_t | y_{0:t} ~ Gamma(a_t, b_t), which follow a_t = a_{t-1} / 2 + y_t and
b_t = b_{t-1} / 2 + 1. Backwards x_{t-1} = x_t / 2 + G, G ~ Gamma(a_{t-1} / 2, b_{t-1}). The counts are such that all
shapes are whole: a Gamma variable is then a sum of exponential ones.

References:
    Smith and Miller (1986), A non-Gaussian state space model and application to prediction of records, JRSS B 48.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import betaln

import bayesinf as bi

COUNTS = [2, 1, 4, 3, 2]
SHAPES, RATES = [4.0 + COUNTS[0]], [3.0]
for count in COUNTS[1:]:
    SHAPES.append(SHAPES[-1] / 2 + count)
    RATES.append(RATES[-1] / 2 + 1)

YS = jnp.asarray(COUNTS, float)


def gamma(key, shape):
    """Of a whole-numbered shape of at most 8."""
    return jnp.sum(jnp.where(jnp.arange(8) < shape, jax.random.exponential(key, (8,)), 0.0))


class GammaBeta(bi.models.StateSpaceModel):
    def initial(self):
        log_prob = dist.Gamma(4.0, 2.0).log_prob
        return (lambda key: gamma(key, 4) / 2), lambda x: jnp.where(x > 0, log_prob(jnp.abs(x)), -jnp.inf)

    def transition(self, x_prev, t):
        half = jnp.asarray(SHAPES)[t - 1] / 2

        def sample(key):
            first, second = (gamma(key, half) for key in jax.random.split(key))
            return 2 * x_prev * first / (first + second)

        def log_prob(x):
            b = x / (2 * x_prev)
            is_inside = (b > 0) & (b < 1) & (x_prev > 0)
            b = jnp.where(is_inside, b, 0.5)
            log_density = (half - 1) * (jnp.log(b) + jnp.log1p(-b)) - betaln(half, half) - jnp.log(2 * jnp.abs(x_prev))
            return jnp.where(is_inside, log_density, -jnp.inf)

        return sample, log_prob

    def observation(self, x, t):
        return dist.Poisson(jnp.abs(x))


def draw_path(key):
    """Exactly from the smoothing law."""
    keys = jax.random.split(key, len(COUNTS))
    path = [gamma(keys[-1], SHAPES[-1]) / RATES[-1]]
    for t in range(len(COUNTS) - 2, -1, -1):
        path.insert(0, path[0] / 2 + gamma(keys[t], SHAPES[t] / 2) / RATES[t])
    return jnp.stack(path)
