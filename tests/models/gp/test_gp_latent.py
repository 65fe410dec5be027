"""Latent processes: their sites and targets, and the evidence that an SMC sampler finds with their kernels (A13)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp

X = jnp.linspace(0.0, 4.0, 20)
Y = jnp.sin(2.0 * X)
NOISE = 0.1


def log_likelihood(f, y):
    return jnp.sum(dist.Normal(f, NOISE**0.5).log_prob(y))


LATENT = gp.latent_target(gp.Matern12(1.0), X, log_likelihood, Y, mean=0.3)


def test_a_whitened_site_is_the_site_itself():
    """The same function has the same joint density, but for the Jacobian of R, log|S| / 2."""

    def model(whiten):
        f = gp.gp_latent("f", gp.Matern32(1.5), X, mean=0.3, whiten=whiten)
        numpyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=Y)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(True)
    z, f = trace["f_normals"]["value"], trace["f"]["value"]
    whitened, _ = log_density(model, (True,), {}, {"f_normals": z})
    plain, _ = log_density(model, (False,), {}, {"f": f})
    tril = gp.GP(gp.Matern32(1.5), X).factor.tril
    jacobian = jnp.sum(jnp.log(jnp.diagonal(tril)))
    np.testing.assert_allclose(whitened - plain, jacobian, rtol=1e-3)


@pytest.mark.parametrize("whiten", [True, False])
def test_outputs_plates_and_batches(whiten):
    def model():
        gp.gp_latent("outputs", gp.RBF(1.0), X[:5], whiten=whiten, num_outputs=3)
        with numpyro.plate("series", 2):
            gp.gp_latent("plated", gp.RBF(jnp.array([[0.5], [1.0]])), X[:5], whiten=whiten)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert trace["outputs"]["value"].shape == (3, 5)
    assert trace["plated"]["value"].shape == (2, 5)


def test_in_a_plate_of_one_law_every_function_is_its_own():
    def model():
        with numpyro.plate("series", 2):
            return gp.gp_latent("f", gp.RBF(1.0), X[:5])

    f = handlers.seed(model, 0)()
    assert f.shape == (2, 5)
    assert np.all(f[0] != f[1])


def test_the_target_is_the_posterior_in_whitened_coordinates():
    z = jnp.linspace(-1.0, 1.0, LATENT.dim)
    f = LATENT.to_function(z)
    expected = log_likelihood(f, Y) - 0.5 * jnp.sum(z**2)
    np.testing.assert_allclose(LATENT.target.logdensity(z), expected, rtol=1e-5)
    tril = jnp.linalg.cholesky(gp.Matern12(1.0)(X) + 1e-3 * jnp.eye(20))
    np.testing.assert_allclose(f, 0.3 + tril @ z, atol=0.05)
    assert LATENT.to_function(jnp.zeros((2, 3, LATENT.dim))).shape == (2, 3, 20)


def rest(z, target):
    """The posterior without its prior, what elliptical slice sampling asks for."""
    return target.logdensity(z) + 0.5 * jnp.sum(z**2)


def slice_on(target):
    return kernels.EllipticalSlice(rest, 0.0, jnp.ones(LATENT.dim), target)


MOVES = {
    "EllipticalSlice": slice_on,
    "PCNLangevin": functools.partial(kernels.PCNLangevin, step_size=0.2),
    "MarginalGradient": functools.partial(kernels.MarginalGradient, step_size=0.3),
}


@pytest.mark.parametrize(
    "name",
    ["PCNLangevin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("EllipticalSlice", "MarginalGradient"))],
)
def test_evidence_of_a_gaussian_likelihood_is_the_exact_one(name):
    """A13: the mean of Zhat / Z over independent runs is 1, to its own standard error."""
    S = np.asarray(gp.GP(gp.Matern12(1.0), X, mean=0.3).factor.covariance, np.float64) + NOISE * np.eye(20)
    exact = float(dist.MultivariateNormal(0.3, jnp.asarray(S)).log_prob(Y))

    def run(key):
        return kernels.smc_sampler(
            key,
            LATENT.prior,
            gp.latent_log_likelihood,
            MOVES[name],
            data=LATENT,
            num_particles=400,
            temperatures=jnp.array([0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0]),
            num_moves=8,
            tune=False,
        ).log_evidence

    found = jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(0), 24))
    found = np.asarray(found, np.float64)
    assert mean_p_value(np.exp(found - exact)[:, None], np.ones(1)) > FALSE_ALARM
    assert abs(np.mean(found) - exact) < 0.3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gp.latent_target(gp.RBF(jnp.ones((2, 1))), X, log_likelihood, Y), "those of one process"),
        (lambda: gp.latent_target(gp.RBF(), X, 3.0), "log_likelihood must be a function"),
        (lambda: gp.latent_target(gp.RBF(), X, lambda: 0.0), "log_likelihood must be called as"),
        (lambda: handlers.seed(gp.gp_latent, 0)("f", gp.RBF(), X, num_outputs=0), "num_outputs must be at least 1"),
        (lambda: kernels.PCN(LATENT.target, -1.0), "step_size must be finite and positive"),
        (lambda: kernels.PCN(LATENT.target, 1.0, jnp.zeros((2, 2))), "prior_mean must have shape"),
        (lambda: kernels.PCNLangevin(LATENT.target, 1.0, 0.0, jnp.ones((2, 3))), "prior_tril must be a scalar, or"),
        (lambda: kernels.MarginalGradient(LATENT.target, 1.0, 0.0, jnp.ones((2, 2))), "prior_tril must be lower"),
        (lambda: kernels.PCN(LATENT.target, 1.0, 0.0, -1.0), "the diagonal of prior_tril must be finite and positive"),
        (
            lambda: kernels.PCN(LATENT.target, 1.0, jnp.zeros(3)).init(jnp.zeros(20)),
            "prior_mean must be over the ravel",
        ),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
