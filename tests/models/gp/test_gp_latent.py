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
            if whiten:
                gp.gp_latent("both", gp.RBF(jnp.array([[0.5], [1.0]])), X[:5], num_outputs=3)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert trace["outputs"]["value"].shape == (3, 5)
    assert trace["plated"]["value"].shape == (2, 5)
    if whiten:
        assert trace["both"]["value"].shape == (2, 3, 5)


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


NEW = jnp.array([0.5, 2.2, 6.0])


def conditional(kernel, f, mean=0.3):
    """Means and covariance of f* given f, by dense algebra."""
    S, cross, own = (np.asarray(kernel(a, b), np.float64) for a, b in ((X, X), (NEW, X), (NEW, NEW)))
    weights = np.linalg.solve(S, cross.T).T
    return mean + (np.asarray(f, np.float64) - mean) @ weights.T, own - weights @ cross.T


@pytest.mark.parametrize("full_cov", [False, True])
def test_draws_at_new_inputs_have_the_conditional_law(full_cov):
    """By whitened residuals, whose first and second moments are known; of 20,000 draws about three functions each."""
    kernel = gp.Matern12(1.0)
    process = gp.GP(kernel, X, mean=0.3, solver=gp.dense(jitter=0.0))
    f = process.sample(jax.random.key(0), (20_000, 3))
    new = np.asarray(gp.predict_latent(1, process, f, NEW, full_cov=full_cov), np.float64)
    assert new.shape == (20_000, 3, 3)
    means, covariance = conditional(kernel, f)
    covariance = covariance if full_cov else np.diag(np.diag(covariance))
    white = (new - means).reshape(-1, 3) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    moments = np.concatenate([white, (white[:, :, None] * white[:, None, :]).reshape(-1, 9)], axis=1)
    assert mean_p_value(moments[:, :3], np.zeros(3)) > FALSE_ALARM
    assert mean_p_value(moments[:, 3:], np.eye(3).ravel()) > FALSE_ALARM


def test_blocks_of_new_inputs_are_filled_whatever_their_number():
    """Where nothing is left to draw, at the inputs themselves, every block has the function itself."""
    process = gp.GP(gp.Matern12(1.0), X)
    f = process.sample(jax.random.key(0), (2, 3))
    for block in (7, 20, 64):
        new = gp.predict_latent(1, process, f, X, block=block)
        jitter = float(jnp.finfo(f.dtype).eps) ** 0.5
        assert np.max(np.abs(new - f)) < 8 * (2 * jitter) ** 0.5  # standard deviations of what the jitter leaves open
    assert np.array_equal(gp.predict_latent(1, process, f, X, block=20), gp.predict_latent(1, process, f, X))


def test_every_draw_of_parameters_has_a_process_of_its_own():
    """Against the same draws one by one; the first functions are wide, the others rough."""
    lengthscales = jnp.array([0.3, 1.0, 4.0])

    def build(parameters):
        return gp.GP(gp.Matern12(parameters["length"]), X, mean=parameters["mean"])

    parameters = {"length": lengthscales, "mean": jnp.array([0.0, 1.0, 2.0])}
    f = jnp.broadcast_to(Y, (3, 2, 20))  # two outputs each
    new = gp.predict_latent(0, build, f, NEW, parameters, full_cov=True)
    assert new.shape == (3, 2, 3)
    keys = jax.random.split(jax.random.key(0), 3)
    for i in range(3):
        process = build(jax.tree.map(lambda leaf, i=i: leaf[i], parameters))
        expected = gp.predict_latent(keys[i], process, f[i], NEW, full_cov=True)
        assert np.allclose(new[i], expected, atol=1e-4)


def test_a_draw_without_a_factor_is_nan_and_the_others_are_not():
    def build(length):
        return gp.GP(lambda A, B: jnp.cos(length * (A[:, None] - B[None, :]) ** 2), X)  # a kernel for length zero alone

    new = gp.predict_latent(0, build, jnp.ones((2, 20)), NEW, jnp.array([0.0, 3.0]))
    assert np.all(np.isfinite(new[0]))
    assert np.all(np.isnan(new[1]))


def test_the_target_predicts_by_its_own_process():
    z = jnp.linspace(-1.0, 1.0, 2 * LATENT.dim).reshape(2, LATENT.dim)
    process = gp.GP(gp.Matern12(1.0), X, mean=0.3)
    expected = gp.predict_latent(3, process, LATENT.to_function(z), NEW)
    assert np.allclose(LATENT.predict(3, z, NEW), expected, atol=1e-5)


def test_memory_of_predictions_does_not_grow_with_their_square():
    """Of 20,000 new inputs one by one: the result, their means and normals, and blocks of 20 x 1,024 entries."""
    process = gp.GP(gp.Matern12(1.0), X)

    def predict(f, Xs):
        return gp.predict_latent(0, process, f, Xs)

    shapes = jax.ShapeDtypeStruct((10, 20), X.dtype), jax.ShapeDtypeStruct((20_000,), X.dtype)
    analysis = jax.jit(predict).lower(*shapes).compile().memory_analysis()
    result = 10 * 20_000 * X.dtype.itemsize
    assert analysis.output_size_in_bytes == result
    assert analysis.temp_size_in_bytes < 2 * result + 40 * 20 * 1_024 * X.dtype.itemsize


def test_hyperparameters_without_a_factor_are_rejected():
    """The density is -inf there, rather than that of a function with another covariance."""

    def model():
        scale = numpyro.sample("scale", dist.Normal(0.0, 10.0))
        f = gp.gp_latent("f", lambda A, B: jnp.cos(scale * (A[:, None] - B[None, :]) ** 2), X)
        numpyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=Y)

    @jax.jit
    def density(scale):
        return log_density(model, (), {}, {"scale": scale, "f_normals": jnp.ones(20)})[0]

    assert np.isfinite(density(0.0))
    assert density(3.0) == -jnp.inf

    @jax.jit
    def of_target(scale):
        kernel = lambda A, B: jnp.cos(scale * (A[:, None] - B[None, :]) ** 2)  # noqa: E731
        latent = gp.latent_target(kernel, X, log_likelihood, Y)
        return latent.target.logdensity(jnp.ones(20)), latent.to_function(jnp.ones(20))

    assert np.isfinite(of_target(0.0)[0])
    assert of_target(3.0)[0] == -jnp.inf
    assert np.all(np.isnan(of_target(3.0)[1]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gp.predict_latent(0, 3.0, Y, NEW), "process must be a GP"),
        (lambda: gp.predict_latent(0, gp.GP(gp.RBF(), X, noise=0.1), Y, NEW), "process must be one GP without noise"),
        (lambda: gp.predict_latent(0, gp.GP(gp.RBF(), X), Y[:3], NEW), "f must have a last axis of length 20"),
        (lambda: gp.predict_latent(0, gp.GP(gp.RBF(), X), Y.at[0].set(jnp.nan), NEW), "f must not be NaN"),
        (lambda: gp.predict_latent(0, gp.GP(gp.RBF(), X), Y, jnp.ones((3, 2))), "Xs must have rows of the shape"),
        (lambda: gp.predict_latent(0, gp.GP(gp.RBF(), X), Y, NEW, block=0), "block must be at least 1"),
        (lambda: gp.predict_latent(0, lambda p: p, Y[None], NEW, jnp.ones(2)), "parameters must have a first axis"),
        (lambda: gp.predict_latent(0, lambda p: p, Y[None], NEW, jnp.ones(1)), "process must be a function that makes"),
        (lambda: gp.latent_target(gp.RBF(jnp.ones((2, 1))), X, log_likelihood, Y), "those of one process"),
        (lambda: gp.latent_target(gp.RBF(), X, 3.0), "log_likelihood must be a function"),
        (lambda: gp.latent_target(gp.RBF(), X, lambda: 0.0), "log_likelihood must be called as"),
        (lambda: handlers.seed(gp.gp_latent, 0)("f", gp.RBF(), X, num_outputs=0), "num_outputs must be at least 1"),
        (
            lambda: handlers.seed(gp.gp_latent, 0)("f", gp.RBF(jnp.ones((3, 1))), X, num_outputs=2, whiten=False),
            "num_outputs must be None with whiten=False",
        ),
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
