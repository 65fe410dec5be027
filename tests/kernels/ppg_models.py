"""Scalar linear Gaussian models with fixed data, whose smoothing law is known by dense linear algebra in float64.

x_0 ~ N(0, q^2 / (1 - a^2)),   x_t = a x_{t-1} + q e_t,   y_t = b x_t + r z_t
"""

from functools import lru_cache
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.special
import scipy.stats
from jaxtyping import Array, Float

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels import AdditiveFunctional


class Scalar(bi.models.StateSpaceModel):
    """The model above; P0, the variance of x_0, may be given instead. Proposals are the locally optimal ones."""

    a: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    q: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    b: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    r: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    P0: Float[Array, ""] = eqx.field(converter=jnp.asarray)

    def initial(self):
        return dist.Normal(0.0, jnp.sqrt(self.P0))

    def transition(self, x_prev, t):
        return dist.Normal(self.a * x_prev, self.q)

    def observation(self, x, t):
        return dist.Normal(self.b * x, self.r)

    def initial_proposal(self, y):
        return self._given(0.0, self.P0, y)

    def proposal(self, x_prev, y, t):
        return self._given(self.a * x_prev, self.q**2, y)

    def _given(self, mean, variance, y):
        posterior = 1.0 / (1.0 / variance + self.b**2 / self.r**2)
        return dist.Normal(posterior * (mean / variance + self.b * y / self.r**2), jnp.sqrt(posterior))


def scalar(a, q, b, r) -> dict[str, float]:
    return {"a": a, "q": q, "b": b, "r": r, "P0": q**2 / (1 - a**2)}


PARAMETERS = {"OW": scalar(0.7, 0.2, 1.0, 1.0), "PPG1d": scalar(0.97, 0.60, 0.54, 0.33)}


def series(last: int) -> np.ndarray:
    """y_0, ..., y_last, with no random numbers."""
    t = np.arange(last + 1)
    return 1.2 * np.sin(0.35 * t) + 0.6 * np.cos(1.7 * t + 0.4) + 0.3 * np.sin(0.11 * t**2)


def learning_series() -> np.ndarray:
    """101 observations of scalar(0.9, 0.6, 1, 0.7, P0=1)."""

    def normals(s):
        wave = np.abs(np.sin(12.9898 * (np.arange(101) + 1) + 78.233 * s)) * 43758.5453
        return scipy.special.ndtri(np.clip(wave - np.floor(wave), 1e-6, 1 - 1e-6))

    e, z = normals(1), normals(2)
    x = np.empty(101)
    x[0] = e[0]
    for t in range(1, 101):
        x[t] = 0.9 * x[t - 1] + 0.6 * e[t]
    return x + 0.7 * z


class Smoothed(NamedTuple):
    """The exact smoothing law N(mean, cov), E[sum x_t], E[sum x_t^2], E[sum x_t x_{t+1}], and the log evidence."""

    mean: np.ndarray
    cov: np.ndarray
    totals: np.ndarray
    log_evidence: float


def smooth(ys: np.ndarray, a: float, q: float, b: float, r: float, P0: float) -> Smoothed:
    """By the dense joint law of the path."""
    num = len(ys)
    # x = L e: x_0 = sqrt(P0) e_0, x_t = a x_{t-1} + q e_t
    lag = np.arange(num)[:, None] - np.arange(num)
    mixing = np.where(lag >= 0, a ** np.maximum(lag, 0), 0.0) * np.where(np.arange(num) == 0, np.sqrt(P0), q)
    prior = mixing @ mixing.T
    observed = ~np.isnan(ys)
    C = b * np.eye(num)[observed]
    S = C @ prior @ C.T + r**2 * np.eye(observed.sum())
    gain = np.linalg.solve(S, C @ prior).T
    mean, cov = gain @ ys[observed], prior - gain @ C @ prior
    second = cov + np.outer(mean, mean)
    totals = np.array([mean.sum(), np.trace(second), np.trace(second, offset=1)])
    _, logdet = np.linalg.slogdet(2 * np.pi * S)
    log_evidence = -0.5 * (logdet + ys[observed] @ np.linalg.solve(S, ys[observed]))
    return Smoothed(mean, cov, totals, float(log_evidence))


@lru_cache
def problem(name: str, last: int) -> tuple[Scalar, jax.Array, Smoothed]:
    """One of the fixed models, its data and its smoothing law."""
    ys = series(last)
    return Scalar(**PARAMETERS[name]), jnp.asarray(ys), smooth(ys, **PARAMETERS[name])


def exact_paths(key, smoothed: Smoothed, num: int) -> jax.Array:
    """Independent draws of the smoothing law."""
    tril = jnp.asarray(np.linalg.cholesky(smoothed.cov + 1e-13 * np.eye(len(smoothed.mean))))
    return jnp.asarray(smoothed.mean) + jax.random.normal(key, (num, len(smoothed.mean))) @ tril.T


def _increment(x_prev, x, t):
    return jnp.stack([x, x**2, x_prev * x])


TOTALS = AdditiveFunctional(initial=lambda x: jnp.stack([x, x**2, 0.0 * x]), increment=_increment)


# ---- comparison with published figures ----


def mean_and_error(replicates) -> tuple[float, float]:
    """The mean of independent replicates and its standard error."""
    values = np.asarray(replicates, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def spread_and_error(replicates) -> tuple[float, float]:
    """The standard deviation of independent replicates and its standard error, by the delta method."""
    values = np.asarray(replicates, np.float64)
    variance, error = mean_and_error((values - values.mean()) ** 2)
    return float(np.sqrt(variance)), float(0.5 * error / np.sqrt(variance))


def assert_published(found: tuple[float, float], published: float, tolerance: float) -> None:
    """The estimate is within the tolerance of the published figure, and too sharp to be so, or not, by chance."""
    estimate, error = found
    z = scipy.stats.norm.isf(FALSE_ALARM / 2)
    assert z * error < tolerance, f"too few replicates: a standard error of {error:.3g} for a tolerance of {tolerance}"
    assert abs(estimate - published) < tolerance, f"{estimate:.5g} +- {error:.2g}, published {published} +- {tolerance}"
