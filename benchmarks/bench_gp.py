"""Gaussian processes in float64: a series of 100,000 times, and an exact fit of 2,000 points; value and gradient.

Beside tinygp's quasiseparable solver and smolgp, and beside GPyTorch, GPJax and tinygp, where they are installed. All
see the same data and parameters, and must find the same log evidence. BENCH_GP_SCALE divides the sizes.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import has

from bayesinf.models import gp

SCALE = int(os.environ.get("BENCH_GP_SCALE", "1"))
NUM_TIMES, NUM_POINTS = 100_000 // SCALE, 2_000 // SCALE
LENGTHSCALE, NOISE = 1.0, 0.1


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def value_and_grad(log_evidence, X, y):
    """Of a function of lengthscale, noise, inputs and data; the latter are arguments, as in a fit."""
    compiled = jax.jit(jax.value_and_grad(log_evidence, (0, 1)))
    return partial(compiled, jnp.asarray(LENGTHSCALE), jnp.asarray(NOISE), X, y)


def agree(calls):
    values = {name: float(call()[0]) for name, call in calls.items()}
    expected = next(iter(values.values()))
    assert all(abs(value / expected - 1) < 1e-6 for value in values.values()), values


@pytest.mark.parametrize("smoothness", ["32", "52"])
def bench_series(compare, smoothness):
    rng = np.random.default_rng(0)
    X = jnp.asarray(np.sort(rng.uniform(0.0, NUM_TIMES / 10, NUM_TIMES)))
    y = jnp.sin(X) + 0.3 * jnp.asarray(rng.normal(size=NUM_TIMES))
    kernel = {"32": gp.Matern32, "52": gp.Matern52}[smoothness]

    def ours(lengthscale, noise, X, y):
        return gp.GP(kernel(lengthscale), X, noise=noise, solver=gp.statespace()).log_prob(y)

    calls = {"bayesinf statespace": value_and_grad(ours, X, y)}
    if has("tinygp"):
        import tinygp

        quasisep = getattr(tinygp.kernels.quasisep, f"Matern{smoothness}")

        def theirs(lengthscale, noise, X, y):
            return tinygp.GaussianProcess(quasisep(scale=lengthscale), X, diag=noise).log_probability(y)

        calls["tinygp quasisep"] = value_and_grad(theirs, X, y)
    if has("smolgp"):
        import smolgp

        def of_smolgp(lengthscale, noise, X, y):
            kernel = getattr(smolgp.kernels, f"Matern{smoothness}")(scale=lengthscale)
            return smolgp.GaussianProcess(kernel, X, noise=noise).log_probability(y)

        calls["smolgp"] = value_and_grad(of_smolgp, X, y)
    compare(f"Matérn {smoothness[0]}/2, {NUM_TIMES:,} irregular times: log evidence and gradient", calls, rounds=7)
    agree(calls)


def bench_exact(compare):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(NUM_POINTS, 8))
    y = np.sin(X.sum(axis=1)) + 0.3 * rng.normal(size=NUM_POINTS)
    Xj, yj = jnp.asarray(X), jnp.asarray(y)

    def ours(lengthscale, noise, X, y):
        return gp.GP(gp.RBF(lengthscale), X, noise=noise, solver=gp.dense(jitter=0.0)).log_prob(y)

    calls = {"bayesinf dense": value_and_grad(ours, Xj, yj)}
    if has("tinygp"):
        import tinygp

        def of_tinygp(lengthscale, noise, X, y):
            kernel = tinygp.transforms.Linear(1.0 / lengthscale, tinygp.kernels.ExpSquared())
            return tinygp.GaussianProcess(kernel, X, diag=noise).log_probability(y)

        calls["tinygp"] = value_and_grad(of_tinygp, Xj, yj)
    if has("gpjax"):
        import gpjax

        def of_gpjax(lengthscale, noise, X, y):
            prior = gpjax.gps.Prior(
                kernel=gpjax.kernels.RBF(lengthscale=lengthscale), mean_function=gpjax.mean_functions.Zero(), jitter=0.0
            )
            likelihood = gpjax.likelihoods.Gaussian(obs_stddev=jnp.sqrt(noise))
            return gpjax.objectives.conjugate_mll(prior * likelihood, gpjax.Dataset(X, y[:, None]))

        calls["gpjax"] = value_and_grad(of_gpjax, Xj, yj)
    if has("gpytorch"):
        calls["gpytorch, Cholesky"] = of_gpytorch(X, y)
    compare(f"RBF, {NUM_POINTS:,} points in 8 dimensions: exact log evidence and gradient", calls, rounds=7)
    agree(calls)


def of_gpytorch(X, y):
    import gpytorch
    import torch

    inputs, data = torch.tensor(X), torch.tensor(y)

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(inputs, data, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Model(likelihood).double()
    model.covar_module.lengthscale, likelihood.noise = LENGTHSCALE, NOISE
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)

    def call():
        model.zero_grad()
        with gpytorch.settings.fast_computations(False, False, False):
            value = evidence(model(inputs), data) * len(data)
            value.backward()
        return value.item(), model.covar_module.raw_lengthscale.grad.item()

    return lambda: tuple(map(np.asarray, call()))
