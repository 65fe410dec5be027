"""How many of n leave at a given rate: the binomial law of p = 1 - exp(-rate), to full precision at any n.

Differences of log-gamma functions lose all digits in float32 where n is a million. With the deviance
D(x, m) = x log(x / m) + m - x and the error d(n) of Stirling's formula for n!, the same probability is

    log P(k) = d(n) - d(k) - d(n - k) - D(k, n p) - D(n - k, n q) + log(n / (2 pi k (n - k))) / 2,   0 < k < n

References:
    Loader (2000), Fast and Accurate Computation of Binomial Probabilities.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

__all__ = ["binomial_log_prob", "sample_binomial"]

_TABLE = np.array(
    [0.0] + [math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi) for n in range(1, 16)]
)


def sample_binomial(key: Key[Array, ""], n: Float[Array, ""], rate: Float[Array, ""]) -> Float[Array, ""]:
    """How many of n leave, a whole number as floating point; no derivative passes through it."""
    n, rate = jax.lax.stop_gradient((n, rate))
    return jax.random.binomial(key, n, -jnp.expm1(-rate), dtype=jnp.result_type(n, rate))


def binomial_log_prob(k: Float[Array, ""], n: Float[Array, ""], rate: Float[Array, ""]) -> Float[Array, ""]:
    """Log probability that k of n leave, each with probability 1 - exp(-rate); -inf for what cannot happen."""
    is_possible = (k == jnp.round(k)) & (k >= 0) & (k <= n) & ((rate > 0) | (k == 0))
    is_inner = is_possible & (k > 0) & (k < n)
    # 1 of 2 stands in for what is not between: gradients stay finite
    x, total = jnp.where(is_inner, k, 1.0), jnp.where(is_inner, n, 2.0)
    safe_rate = jnp.where(rate > 0, rate, 1.0)
    p, q = -jnp.expm1(-safe_rate), jnp.exp(-safe_rate)
    inner = (
        _stirling_error(total)
        - _stirling_error(x)
        - _stirling_error(total - x)
        - _deviance(x, total * p)
        - _deviance(total - x, total * q)
        + 0.5 * jnp.log(total / (2 * math.pi * x * (total - x)))
    )
    outer = jnp.where(k == 0, -n * rate, n * jnp.log(p))  # none leave, or all
    return jnp.where(is_possible, jnp.where(is_inner, inner, outer), -jnp.inf)


def _stirling_error(n: Array) -> Array:
    """Log n! - log(sqrt(2 pi n) (n / e)^n) for whole n >= 1; a table, and the series from where it is exact."""
    table = jnp.asarray(_TABLE, n.dtype)[jnp.clip(n, 0, 15).astype(jnp.int32)]
    inverse = 1.0 / jnp.maximum(n, 15.0)
    square = inverse**2
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
    return jnp.where(n <= 15, table, series)


def _deviance(x: Array, m: Array) -> Array:
    """D(x, m) = m ((1 + u) log(1 + u) - u) with u = x / m - 1, by its series where u is small."""
    u = (x - m) / m
    is_small = jnp.abs(u) < 0.1
    small = jnp.where(is_small, u, 0.0)
    series = jnp.zeros_like(u)
    for j in range(15, 1, -1):  # sum over j of (-u)^j / (j (j - 1)), by Horner's rule
        series = 1.0 / (j * (j - 1)) - small * series
    large = jnp.where(is_small, 1.0, u)
    return m * jnp.where(is_small, small**2 * series, (1.0 + large) * jnp.log1p(large) - large)
