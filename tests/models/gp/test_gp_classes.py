"""Classes by the latent target: posterior moments and predicted chances against quadrature in three dimensions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp

X, CLASSES, NEW = np.array([0.0, 0.4, 1.5]), np.array([1.0, 1.0, 0.0]), np.array([0.8, 3.0])
MEAN, VARIANCE = 0.5, 6.0
NUM = 20_000


def matern(a, b):
    r = 5**0.5 * np.abs(a[:, None] - b[None, :])
    return VARIANCE * (1 + r + r**2 / 3) * np.exp(-r)


TRIL = np.linalg.cholesky(matern(X, X))


def likelihood(f):
    """Of functions (..., 3)."""
    return np.prod(1.0 / (1.0 + np.exp(-(2 * CLASSES - 1) * f)), axis=-1)


def log_likelihood(f, classes):
    return jnp.sum(dist.Bernoulli(logits=f).log_prob(classes))


LATENT = gp.latent_target(
    VARIANCE * gp.Matern52(1.0), jnp.asarray(X), log_likelihood, jnp.asarray(CLASSES), mean=MEAN, solver=gp.dense(0.0)
)


def moments(f, new, chances):
    """Of the function at X and its products, the function at new inputs, its squares, and the chances there."""
    return np.concatenate([f, f * f, f * np.roll(f, 1, axis=-1), *new, chances], axis=-1)


@functools.cache
def exact_moments():
    """By the product rule of Gauss and Hermite over whitened values, and over each new one given the function."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    z = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    f = MEAN + z @ TRIL.T
    mass = np.prod(np.stack(np.meshgrid(weights, weights, weights, indexing="ij")), axis=0).ravel() * likelihood(f)
    gain = np.linalg.solve(matern(X, X), matern(X, NEW)).T
    new = MEAN + (f - MEAN) @ gain.T
    spread = np.sqrt(VARIANCE - np.sum(gain * matern(NEW, X), axis=1))
    chances = (1.0 / (1.0 + np.exp(-(new[..., None] + spread[:, None] * nodes)))) @ weights
    return mass @ moments(f, (new, new**2 + spread**2), chances) / mass.sum()


def exact_draws():
    """Draws of the prior, kept with the chance that is their likelihood; whitened."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(12 * NUM, 3))
    kept = z[rng.uniform(size=len(z)) < likelihood(MEAN + z @ TRIL.T)]
    assert len(kept) >= NUM
    return kept[:NUM]


def rest(z, target):
    """The posterior without its prior, what elliptical slice sampling asks for."""
    return target.logdensity(z) + 0.5 * jnp.sum(z**2)


MOVES = {
    "EllipticalSlice": kernels.EllipticalSlice(rest, 0.0, jnp.ones(3), LATENT.target),
    "PCNLangevin": kernels.PCNLangevin(LATENT.target, step_size=1.0),
    "MarginalGradient": kernels.MarginalGradient(LATENT.target, step_size=2.0),
}


@pytest.mark.parametrize("name", list(MOVES))
def test_moments_and_chances_are_those_of_quadrature(name):
    """After ten steps from exact draws; the classes differ in number, so that no error cancels by symmetry."""
    kernel = MOVES[name]

    @jax.jit
    def move(key, start):
        def step(carry, key):
            state, _ = jax.vmap(kernel.step)(jax.random.split(key, NUM), carry)
            return state, None

        return jax.lax.scan(step, jax.vmap(kernel.init)(start), jax.random.split(key, 10))[0].position

    start = jnp.asarray(exact_draws(), jnp.result_type(float))
    z = move(jax.random.key(1), start)
    assert jnp.mean(jnp.any(z != start, axis=1)) > 0.9
    f, new = (np.asarray(part, np.float64) for part in (LATENT.to_function(z), LATENT.predict(2, z, NEW)))
    found = moments(f, (new, new**2), 1.0 / (1.0 + np.exp(-new)))
    assert mean_p_value(found, exact_moments()) > FALSE_ALARM
