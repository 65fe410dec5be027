"""The posteriors, of the kinds that posteriordb collects; each is written here as its NumPyro model.

    eight_schools      hierarchical normal, non-centred: a scale near zero, with heavy tails
    pumps              hierarchical gamma-Poisson: ten skewed rates, and a ridge between shape and rate
    stack_loss         regression with Student's errors: correlated coefficients, degrees of freedom hardly identified
    lasso              sparse regression: kinks where a coefficient is zero, one scale for all of them
    ar5                autoregression of order five: six correlated coefficients
    garch              GARCH(1, 1) of oil returns: a constraint that depends on another parameter, heaped at its edge
    gaussian_process   scales of a Gaussian process, the function summed out: skewed, few data
    mixture            two overlapping normals with ordered means

Every prior is proper, so that samplers which start from it are compared as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bayesinf import datasets

__all__ = ["POSTERIORS", "Posterior"]


class Posterior(NamedTuple):
    """A model, its data as `data(rng)` draws or looks them up, and the sites whose moments are compared."""

    model: Callable[..., None]
    data: Callable[[np.random.Generator], dict[str, np.ndarray]]
    sites: tuple[str, ...]


def eight_schools(effects, errors):
    """Rubin (1981), doi:10.3102/10769986006004377."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mean + scale * offset)
        numpyro.sample("effects", dist.Normal(theta, errors), obs=effects)


def eight_schools_data(rng):
    return {
        "effects": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "errors": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def pumps(hours, failures):
    """Gaver and O'Muircheartaigh (1987), doi:10.1080/00401706.1987.10488178; hours are in thousands."""
    shape = numpyro.sample("shape", dist.Exponential(1.0))
    rate = numpyro.sample("rate", dist.Gamma(0.1, 1.0))
    with numpyro.plate("pump", 10):
        theta = numpyro.sample("theta", dist.Gamma(shape, rate))
        numpyro.sample("failures", dist.Poisson(theta * hours), obs=failures)


def pumps_data(rng):
    return {
        "hours": np.array([94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5]),
        "failures": np.array([5, 1, 5, 14, 3, 19, 1, 1, 4, 22]),
    }


def stack_loss(predictors, loss):
    """Brownlee (1965), Statistical Theory and Methodology in Science and Engineering, 2nd ed., page 454."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 50.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(5.0))
    freedom = numpyro.sample("freedom", dist.Gamma(2.0, 0.1))
    standard = (predictors - predictors.mean(0)) / predictors.std(0)
    location = intercept + standard @ slopes
    numpyro.sample("loss", dist.StudentT(freedom, location, scale).to_event(1), obs=loss)


def stack_loss_data(rng):
    air = [80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70]
    water = [27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20]
    acid = [89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91]
    loss = [42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15]
    return {"predictors": np.column_stack([air, water, acid]).astype(float), "loss": np.array(loss, float)}


def lasso(predictors, response):
    """Park and Casella (2008), doi:10.1198/016214508000000337; scales with the noise, as there."""
    spread = numpyro.sample("spread", dist.HalfCauchy(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    slopes = numpyro.sample("slopes", dist.Laplace(0.0, noise * spread).expand([5]).to_event(1))
    numpyro.sample("response", dist.Normal(predictors @ slopes, noise).to_event(1), obs=response)


def lasso_data(rng):
    predictors = rng.standard_normal((30, 5))
    predictors[:, 1] = 0.7 * predictors[:, 0] + 0.7 * predictors[:, 1]
    slopes = np.array([1.0, 0.0, 0.4, 0.0, 0.0])
    return {"predictors": predictors, "response": predictors @ slopes + 0.7 * rng.standard_normal(30)}


def ar5(series):
    constant = numpyro.sample("constant", dist.Normal(0.0, 10.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfCauchy(2.5))
    lags = jnp.stack([series[5 - lag : -lag] for lag in range(1, 6)], axis=1)
    numpyro.sample("series", dist.Normal(constant + lags @ slopes, noise).to_event(1), obs=series[5:])


def ar5_data(rng):
    series = np.zeros(300)
    for t in range(5, 300):
        series[t] = 0.3 + series[t - 5 : t] @ [0.1, -0.2, 0.1, -0.1, 0.7] + 0.5 * rng.standard_normal()
    return {"series": series[100:]}


def garch(returns, first):
    """Bollerslev (1986), doi:10.1016/0304-4076(86)90063-1; `first` is the variance of the first return."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    base = numpyro.sample("base", dist.HalfNormal(1.0))
    shock = numpyro.sample("shock", dist.Uniform(0.0, 1.0))
    memory = numpyro.sample("memory", dist.Uniform(0.0, 1.0 - shock))

    def advance(variance, deviation):
        return base + shock * deviation**2 + memory * variance, variance

    deviations = returns - mean
    _, variances = jax.lax.scan(advance, first, deviations, unroll=4)
    numpyro.sample("returns", dist.Normal(mean, jnp.sqrt(variances)).to_event(1), obs=returns)


def garch_data(rng):
    returns = datasets.wti_crude_oil().returns[150:350]
    return {"returns": returns, "first": np.asarray(returns[:20].var())}


def gaussian_process(inputs, outputs):
    """Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, equation 2.30."""
    length = numpyro.sample("length", dist.InverseGamma(4.0, 6.0))
    amplitude = numpyro.sample("amplitude", dist.HalfNormal(2.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    gram = amplitude**2 * jnp.exp(-0.5 * ((inputs[:, None] - inputs) / length) ** 2)
    covariance = gram + (noise**2 + 1e-4) * jnp.eye(len(inputs))
    numpyro.sample("outputs", dist.MultivariateNormal(jnp.zeros(len(inputs)), covariance), obs=outputs)


def gaussian_process_data(rng):
    inputs = np.sort(rng.uniform(-4.0, 4.0, 20))
    return {"inputs": inputs, "outputs": 1.5 * np.sin(1.3 * inputs) + 0.4 * rng.standard_normal(20)}


def mixture(values):
    share = numpyro.sample("share", dist.Beta(5.0, 5.0))
    first_and_log_gap = dist.Normal(jnp.array([-1.0, 1.0]), jnp.array([1.0, 0.5])).to_event(1)
    ordered = dist.TransformedDistribution(first_and_log_gap, dist.transforms.OrderedTransform())
    means = numpyro.sample("means", ordered)
    scales = numpyro.sample("scales", dist.HalfNormal(1.0).expand([2]).to_event(1))
    shares = dist.Categorical(probs=jnp.stack([share, 1.0 - share]))
    terms = dist.Normal(jnp.broadcast_to(means, (len(values), 2)), scales)
    numpyro.sample("values", dist.MixtureSameFamily(shares, terms).to_event(1), obs=values)


def mixture_data(rng):
    is_first = rng.random(150) < 0.4
    return {"values": np.where(is_first, rng.normal(-1.5, 0.6, 150), rng.normal(1.5, 0.9, 150))}


POSTERIORS = {
    "eight_schools": Posterior(eight_schools, eight_schools_data, ("mean", "scale", "theta")),
    "pumps": Posterior(pumps, pumps_data, ("shape", "rate", "theta")),
    "stack_loss": Posterior(stack_loss, stack_loss_data, ("intercept", "slopes", "scale", "freedom")),
    "lasso": Posterior(lasso, lasso_data, ("spread", "noise", "slopes")),
    "ar5": Posterior(ar5, ar5_data, ("constant", "slopes", "noise")),
    "garch": Posterior(garch, garch_data, ("mean", "base", "shock", "memory")),
    "gaussian_process": Posterior(gaussian_process, gaussian_process_data, ("length", "amplitude", "noise")),
    "mixture": Posterior(mixture, mixture_data, ("share", "means", "scales")),
}
