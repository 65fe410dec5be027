"""Joint Markov chains over a function and its parameters, against their posterior in closed form or by quadrature.

A14: under a Gaussian likelihood parameters and function by `HyperGibbs`, and parameters alone by NUTS on the marginal
density, have the moments of quadrature. A10: with an inverse Gamma law on the scale they are those of the Student-t
process. Tests are of means over batches of chains, by p-values; R-hat is below 1.01.
"""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp

pytestmark = pytest.mark.slow

X = jnp.linspace(0.0, 3.0, 6)
Y = jnp.array([0.8, 1.5, 0.6, -0.7, -1.2, 0.3])
NOISE = 0.4
NUM_CHAINS, NUM_SAMPLES, NUM_WARMUP = 16, 2_400, 400
NUM_BATCHES = 4  # of each chain, long beside its autocorrelation
BARKER = functools.partial(kernels.Barker, step_size=0.5)


def sample(kernel, start, num_samples=NUM_SAMPLES):
    return bi.sample(
        1, kernel, start, num_samples=num_samples, num_warmup=NUM_WARMUP, constrain=kernel.constrain, progress=False
    )


def judge(draws, moments, truth):
    """That the means of `moments(draws)`, over batches of chains, are the truth."""
    assert np.all(np.asarray(draws.summary()["r_hat"], float) < 1.01)
    values = np.stack(moments({name: np.asarray(draws[name], np.float64) for name in draws.variables}), axis=-1)
    means = values.reshape(NUM_BATCHES * NUM_CHAINS, -1, values.shape[-1]).mean(axis=1)
    assert mean_p_value(means, truth) > FALSE_ALARM


# ---- A14: a length scale ----


def build(lengthscale):
    return gp.GP(gp.Matern52(lengthscale), X)


def log_likelihood(f, y):
    return jnp.sum(dist.Normal(f, NOISE**0.5).log_prob(y))


def correlations(lengthscales):
    """As of `build`, its jitter included."""
    scaled = np.sqrt(5.0) * np.abs(np.subtract.outer(np.asarray(X, float), np.asarray(X, float)))
    scaled = scaled / lengthscales[:, None, None]
    K = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return K + float(jnp.finfo(X.dtype).eps) ** 0.5 * np.eye(6)


@functools.cache
def quadrature():
    """Means of log l, its square, f, f^2, f_1 f_2 and of log l f, log l f^2 at one input."""
    x = np.linspace(-4.0, 4.0, 801)
    K, y = correlations(np.exp(0.5 * x)), np.asarray(Y, float)
    S = K + NOISE * np.eye(6)
    solved = np.linalg.solve(S, np.broadcast_to(y[:, None], (len(x), 6, 1)))[..., 0]
    log_p = -0.5 * x**2 - 0.5 * solved @ y - 0.5 * np.linalg.slogdet(S)[1]
    p = np.exp(log_p - log_p.max())
    mean = np.einsum("xij,xj->xi", K, solved)
    covariance = K - K @ np.linalg.solve(S, K)
    second = covariance + mean[:, :, None] * mean[:, None, :]
    square = np.diagonal(second, axis1=1, axis2=2)
    u = 0.5 * x
    columns = [u, u**2, *mean.T, *square.T, second[:, 1, 2], u * mean[:, 3], u * square[:, 3], u * second[:, 0, 5]]
    return np.array([p @ column for column in columns]) / p.sum()


def moments(draws):
    u, f = np.log(draws["theta"]), draws["f"]
    f = np.moveaxis(f, -1, 0)
    return [u, u**2, *f, *f**2, f[1] * f[2], u * f[3], u * f[3] ** 2, u * f[0] * f[5]]


@pytest.mark.parametrize("form", ["whitened", "centred", "surrogate", ("centred", "whitened")])
def test_function_and_length_scale_have_the_moments_of_quadrature(form):
    kernel = kernels.HyperGibbs(
        build,
        dist.LogNormal(0.0, 0.5),
        log_likelihood,
        Y,
        parameter_kernel=BARKER,
        form=form,
        auxiliary_variance=NOISE if form == "surrogate" else None,
    )
    judge(sample(kernel, kernel.initial(0, NUM_CHAINS)), moments, quadrature())


def test_nuts_on_the_marginal_density_has_the_moments_of_quadrature():
    def model(y):
        lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", gp.GP(gp.Matern52(lengthscale), X, noise=NOISE), obs=y)

    target = bi.Target.from_numpyro(model, Y)
    start = target.init(0, NUM_CHAINS, radius=0.5)
    draws = bi.sample(
        1, kernels.NUTS(target, 0.5), start, num_samples=1_000, num_warmup=300, constrain=target.constrain,
        progress=False,
    )  # fmt: skip

    def alone(draws):
        u = np.log(draws["lengthscale"])
        return [u, u**2]

    judge(draws, alone, quadrature_without_jitter())


def quadrature_without_jitter():
    """Of the marginal: the noise is above the jitter, and takes its place."""
    x = np.linspace(-4.0, 4.0, 801)
    K = correlations(np.exp(0.5 * x)) - float(jnp.finfo(X.dtype).eps) ** 0.5 * np.eye(6) + NOISE * np.eye(6)
    y = np.asarray(Y, float)
    solved = np.linalg.solve(K, np.broadcast_to(y[:, None], (len(x), 6, 1)))[..., 0]
    log_p = -0.5 * x**2 - 0.5 * solved @ y - 0.5 * np.linalg.slogdet(K)[1]
    p = np.exp(log_p - log_p.max())
    return np.array([p @ (0.5 * x), p @ (0.5 * x) ** 2]) / p.sum()


# ---- A10: a scale, whose law given data is inverse Gamma, and of f Student's t ----

A, B = 3.0, 2.0


def student_moments():
    """Means of log s is left out; of s, 1 / s, f, f^2, s f, s f^2, f_1 f_2, in closed form."""
    K = correlations(np.ones(1))[0]
    S, y = K + NOISE * np.eye(6), np.asarray(Y, float)
    a, b = A + 3.0, B + 0.5 * y @ np.linalg.solve(S, y)
    mean, covariance = K @ np.linalg.solve(S, y), K - K @ np.linalg.solve(S, K)
    s, square = b / (a - 1), b**2 / ((a - 1) * (a - 2))
    seconds = s * covariance + np.outer(mean, mean)
    crossed = square * covariance[3, 3] + s * mean[3] ** 2
    return np.array([s, a / b, *mean, *np.diagonal(seconds), s * mean[3], crossed, seconds[1, 2]])


def scale_moments(draws):
    s, f = draws["s"], np.moveaxis(draws["f"], -1, 0)
    return [s, 1 / s, *f, *f**2, s * f[3], s * f[3] ** 2, f[1] * f[2]]


def scaled_log_likelihood(f, y, theta):
    return jnp.sum(dist.Normal(f, jnp.sqrt(theta["s"] * NOISE)).log_prob(y))


@pytest.mark.parametrize("form", ["whitened", "centred", "surrogate"])
def test_function_and_scale_are_those_of_the_student_t_process(form):
    kernel = kernels.HyperGibbs(
        lambda theta: gp.GP(theta["s"] * gp.Matern52(1.0), X),
        {"s": dist.InverseGamma(A, B)},
        scaled_log_likelihood,
        Y,
        parameter_kernel=BARKER,
        form=form,
        auxiliary_variance=(lambda theta: NOISE * theta["s"]) if form == "surrogate" else None,
    )
    judge(sample(kernel, kernel.initial(0, NUM_CHAINS)), scale_moments, student_moments())


def test_nuts_on_function_and_scale_is_that_of_the_student_t_process():
    def model(y):
        s = numpyro.sample("s", dist.InverseGamma(A, B))
        f = gp.gp_latent("f", s * gp.Matern52(1.0), X)
        numpyro.sample("y", dist.Normal(f, jnp.sqrt(s * NOISE)).to_event(1), obs=y)

    target = bi.Target.from_numpyro(model, Y)
    start = target.init(0, NUM_CHAINS, radius=0.5)
    draws = bi.sample(
        1, kernels.NUTS(target, 0.2), start, num_samples=1_000, num_warmup=300, constrain=target.constrain,
        progress=False,
    )  # fmt: skip
    judge(draws, scale_moments, student_moments())
