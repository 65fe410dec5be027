"""Bad input, as a user without type checks gives it: errors by name, and -inf where values are not known yet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import bayesinf as bi
from bayesinf.models import gp, nngp

pytestmark = pytest.mark.usefixtures("unchecked")

X, Y = np.arange(6.0), np.sin(np.arange(6.0))
NEW = np.array([0.5, 2.5])
SOLVERS = {
    "dense": gp.dense(),
    "statespace": gp.statespace(),
    "vecchia": gp.vecchia(3),
    "sgpr": gp.sgpr(np.array([0.0, 2.0, 4.0])),
    "hsgp": gp.hsgp(8),
}
MIXING = dist.HalfCauchy(1.0)
NETWORK = nngp.NNGP(nngp.relu(), 2, 2.0, 0.1)


def indefinite(A, B):
    return jnp.cos(3.0 * (A[:, None] - B[None, :]) ** 2)


def lopsided(A, B):
    return jnp.ones((len(A), len(B) + 1))


def flat(A, B):
    return jnp.ones(len(A))


def machine(kernel=None, of_gram=None, **arguments):
    of_gram = gp.GramKernel(nngp.relu(), 2.0) if of_gram is None else of_gram
    return gp.DeepKernelMachine(gp.RBF() if kernel is None else kernel, of_gram, **arguments)


def log_likelihood(f, y):
    return -jnp.sum((f - y) ** 2)


USERS = {
    "GP": lambda kernel, X=X: gp.GP(kernel, X, noise=1e-3).log_prob(np.zeros(len(X))),
    "vecchia": lambda kernel, X=X: gp.GP(kernel, X, noise=1e-3, solver=gp.vecchia(3)).log_prob(np.zeros(len(X))),
    "sgpr": lambda kernel, X=X: gp.GP(kernel, X, noise=1e-3, solver=gp.sgpr(np.arange(3.0))).log_prob(np.zeros(len(X))),
    "StudentTProcess": lambda kernel, X=X: gp.StudentTProcess(1.0, 1.0, kernel, X, noise=1e-3),
    "ScaleMixtureGP": lambda kernel, X=X: gp.ScaleMixtureGP(MIXING, kernel, X, 1e-3),
    "gp_latent": lambda kernel, X=X: handlers.seed(gp.gp_latent, 0)("f", kernel, X),
    "latent_target": lambda kernel, X=X: gp.latent_target(kernel, X, log_likelihood, Y),
}


@pytest.mark.parametrize("user", list(USERS))
def test_kernels_that_are_none(user):
    with pytest.raises(ValueError, match="kernel must give a positive definite covariance"):
        USERS[user](indefinite)
    with pytest.raises(ValueError, match="kernel must give a matrix of shape"):
        USERS[user](lopsided)
    with pytest.raises(ValueError, match="kernel must be a covariance function"):
        USERS[user]("RBF")


@pytest.mark.parametrize("user", list(USERS))
def test_no_inputs(user):
    with pytest.raises(ValueError, match="X must have at least one row"):
        USERS[user](gp.RBF(), X[:0])


@pytest.mark.parametrize("name", list(SOLVERS))
def test_duplicated_inputs_in_single_precision(name):
    """Without noise too: the bound on it makes a factor, and values and slopes are finite."""
    with jax.enable_x64(False):
        twice = np.repeat(X[:3], 2).astype(np.float32)
        solver = gp.sgpr(np.array([0.0, 2.0, 4.0], np.float32)) if name == "sgpr" else SOLVERS[name]

        def value(lengthscale, y):
            process = gp.GP(gp.Matern32(lengthscale), twice, solver=solver)
            return process.log_prob(y) + jnp.sum(process.condition(y, twice).mean)

        found, slope = jax.jit(jax.value_and_grad(value))(jnp.float32(1.0), jnp.zeros(6, jnp.float32))
        assert np.isfinite(found)
        assert np.isfinite(slope)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_negative_scales_that_are_not_known_yet_are_minus_infinity(name):
    """And predictions NaN. A negative noise was raised to the jitter once, and the answer plausible."""

    def process(lengthscale, variance, noise):
        return gp.GP(variance * gp.Matern32(lengthscale), X, noise=noise, solver=SOLVERS[name])

    @jax.jit
    def answers(*parameters):
        value, slopes = jax.value_and_grad(lambda p: process(*p).log_prob(Y))(parameters)
        law = process(*parameters).condition(Y, NEW)
        return value, slopes, law.mean

    value, slopes, mean = answers(1.0, 1.0, 0.1)
    assert np.all(np.isfinite([value, *slopes, *mean]))
    for bad in ((1.0, 1.0, -0.1), (1.0, -0.01, 1.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (jnp.nan, 1.0, 0.1)):
        value, slopes, mean = answers(*bad)
        assert value == -jnp.inf
        assert np.all(np.isnan(mean))
        if np.isfinite(bad[0]):
            assert slopes == (0.0, 0.0, 0.0)


def test_negative_scales_of_mixtures_that_are_not_known_yet_are_minus_infinity():
    student = jax.jit(lambda a, b: gp.StudentTProcess(a, b, gp.RBF(), X, noise=0.1).log_prob(Y))
    assert np.isfinite(student(1.0, 1.0))
    assert student(-0.5, 1.0) == student(1.0, -0.5) == -jnp.inf  # gamma functions of -0.5 are numbers
    draws = jax.jit(lambda a: gp.StudentTProcess(a, 1.0, gp.RBF(), X, noise=0.1).sample(jax.random.key(0)))
    means = jax.jit(lambda a: gp.StudentTProcess(a, 1.0, gp.RBF(), X, noise=0.1).condition(Y, NEW).mean)
    for found in (draws, means):
        assert np.all(np.isfinite(found(1.0)))
        assert np.all(np.isnan(found(-0.5)))
    mixture = jax.jit(lambda noise: gp.ScaleMixtureGP(MIXING, gp.RBF(), X, noise).log_prob(Y))
    assert np.isfinite(mixture(0.1))
    assert mixture(-0.1) == -jnp.inf


@pytest.mark.parametrize(
    ("make", "solver"),
    [
        (lambda p: gp.Periodic(1.0, 1.0, p), gp.dense()),
        (lambda p: gp.Periodic(1.0, 1.0, p), gp.statespace()),
        (lambda p: gp.Periodic(p, 1.0, 3.0), gp.statespace()),
        (lambda p: gp.RationalQuadratic(1.0, 1.0, p), gp.dense()),
        (lambda p: gp.Linear(p), gp.dense()),
        (lambda p: gp.RBF(jnp.stack([p, 1.0])), gp.dense()),
        (lambda p: nngp.NNGP(nngp.relu(), 1, 2.0, p), gp.dense()),
        (lambda p: nngp.NNGP(nngp.sin(), 2, p, 1.0), gp.dense()),
        (lambda p: nngp.NNGP(nngp.erf(), 1, 2.0, 0.1, p), gp.dense()),
    ],
    ids=lambda value: "" if callable(value) else type(value).__name__,
)
def test_other_parameters_below_zero_are_minus_infinity_too(make, solver):
    """The kernels are even in most of them, or stay positive where a variance of biases is a little below zero."""
    places = X if isinstance(solver, type(gp.statespace())) else np.stack([X, X[::-1] ** 2], axis=1)
    value_and_slope = jax.jit(
        jax.value_and_grad(lambda p: gp.GP(make(p), places, noise=1.0, solver=solver).log_prob(Y))
    )
    assert np.all(np.isfinite(value_and_slope(1.0)))
    assert value_and_slope(-0.01) == (-jnp.inf, 0.0)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "hsgp"])
def test_what_is_negative_is_not_hidden_by_other_parts(name):
    @jax.jit
    @jax.value_and_grad
    def log_prob(parameters):
        length, variance = parameters
        kernels = variance * gp.Matern32(length) + 5.0 * gp.Matern12(2.0), gp.Matern32(length) * gp.Matern12(variance)
        return sum(gp.GP(kernel, X, noise=0.1, solver=SOLVERS[name]).log_prob(Y) for kernel in kernels)

    assert np.isfinite(log_prob((1.0, 1.0))[0])
    for bad in ((-1.0, 1.0), (1.0, -0.01), (-1.0, -1.0)):
        value, slopes = log_prob(bad)
        assert value == -jnp.inf
        assert slopes == (0.0, 0.0)


@pytest.mark.parametrize("Z", [None, X[:3]], ids=["exact", "inducing"])
def test_negative_parameters_of_deep_kernel_machines_are_minus_infinity(Z):
    raw = jnp.zeros((1, 3, 3) if Z is not None else (1, 6, 6))

    @jax.jit
    @jax.value_and_grad
    def objective(parameters):
        noise, width_ratio = parameters
        return machine(noise=noise, width_ratio=width_ratio).objective(raw, X, Y, Z=Z)

    assert np.isfinite(objective((0.1, 1.0))[0])
    for bad in ((-0.1, 1.0), (0.1, -1.0)):
        assert objective(bad) == (-jnp.inf, (0.0, 0.0))


def test_failed_factorisations_in_a_loop_are_rejected_and_counted():
    """A chain at the edge of what has a factor: it stays inside, and Info says how often it did not move."""

    def logdensity(scale):
        return gp.GP(lambda A, B: jnp.cos(scale * (A[:, None] - B[None, :]) ** 2), X, noise=1e-3).log_prob(Y)

    target = bi.Target(logdensity)
    kernel = bi.kernels.MALA(target, 0.5)
    state = jax.jit(lambda x: kernel.init(x))(
        jnp.asarray(1e-5)
    )  # nearly constant: nearly a kernel, and to rounding one
    assert np.isfinite(state.evaluation.logdensity)

    def step(state, key):
        state, info = kernel.step(key, state)
        return state, (state.evaluation.logdensity, info.is_accepted)

    _, (values, is_accepted) = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))(
        state, jax.random.split(jax.random.key(0), 50)
    )
    assert np.all(np.isfinite(values))
    assert np.sum(~is_accepted) >= 45


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": -0.1}, "noise must be finite and not negative"),
        ({"noise": np.ones(3)}, "noise must be a variance, a number or of shape"),
        ({"X": X[:0]}, "X must have at least one row"),
        ({"y": Y[:3]}, "y must have a last axis of length 6"),
        ({"y": Y[:, None]}, "y must have a last axis of length 6"),
        ({"y": "prices"}, "y must be a number or an array of numbers"),
        ({"y": np.full(6, np.inf)}, "y must not be infinite"),
        ({"Xs": np.zeros(0)}, "Xs must have at least one row"),
        ({"Xs": np.zeros((2, 3))}, "Xs must have rows of the shape of those of X"),
    ],
)
def test_data_that_do_not_fit_are_named_whatever_the_solver(name, changes, match):
    given = {"X": X, "noise": 0.1, "y": Y, "Xs": NEW, **changes}
    with pytest.raises(ValueError, match=match):
        gp.GP(gp.Matern32(), given["X"], noise=given["noise"], solver=SOLVERS[name]).condition(given["y"], given["Xs"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gp.RBF(1.0, -1.0), "variance must be finite and not negative"),
        (lambda: gp.RBF(0.0), "lengthscale must be finite and positive"),
        (lambda: gp.RBF()(np.ones((3, 2)), np.ones((3, 1))), "X2 must have 2 columns"),
        (lambda: gp.RBF()(np.ones((3, 2)), np.ones((3, 3))), "X2 must have 2 columns"),
        (lambda: gp.Linear()(np.ones((3, 2)), np.ones((3, 3))), "X2 must have 2 columns"),
        (lambda: gp.Constant(1.0)(3.0), "X1 must have inputs along its first axis"),
        (lambda: gp.StudentTProcess(-1.0, 1.0, gp.RBF(), X), "a must be finite and positive"),
        (lambda: gp.StudentTProcess(1.0, 0.0, gp.RBF(), X), "b must be finite and positive"),
        (lambda: gp.ScaleMixtureGP(dist.Normal(0.0, 1.0), gp.RBF(), X, 0.1), "continuous law on positive numbers"),
        (lambda: gp.ScaleMixtureGP(dist.Uniform(-1.0, 1.0), gp.RBF(), X, 0.1), "continuous law on positive numbers"),
        (lambda: gp.ScaleMixtureGP(dist.Poisson(1.0), gp.RBF(), X, 0.1), "continuous law on positive numbers"),
        (lambda: gp.ScaleMixtureGP(MIXING, gp.RBF(), X, -0.1), "noise must be finite and positive"),
        (lambda: gp.ScaleMixtureGP(MIXING, gp.RBF(), X, 0.1, nodes=0), "nodes must be at least 8"),
        (lambda: gp.latent_target(gp.RBF(), X, log_likelihood, Y).to_function(np.zeros(5)), "z must have a last axis"),
        (
            lambda: gp.latent_target(gp.RBF(), X, log_likelihood, Y).target.logdensity(jnp.zeros(5)),
            "z must have a last axis",
        ),
        (
            lambda: gp.latent_target(gp.RBF(), X, lambda f, y: f - y, Y).target.logdensity(jnp.zeros(6)),
            "must return a scalar",
        ),
        (lambda: gp.GP(gp.RBF(), X, mean=np.nan), "mean must be finite, got nan"),
        (lambda: gp.StudentTProcess(1.0, 1.0, gp.RBF(), X, mean=np.inf), "mean must be finite, got inf"),
        (
            lambda: gp.GP(gp.RBF(), X[:, None], mean=lambda X: X),
            r"one number for each input, shape \(6,\), got a column",
        ),
        (
            lambda: gp.bures_distance(np.eye(3), np.eye(2)),
            r"covariances of one shape \(n, n\), got \(3, 3\) and \(2, 2\)",
        ),
        (lambda: gp.bures_distance(np.ones(3), np.ones(3)), "covariances of one shape"),
        (lambda: gp.bures_distance(-np.eye(3), np.eye(3)), "must be positive semi-definite"),
        (lambda: machine(noise=np.ones(6)), r"noise must be one variance for all data, got shape \(6,\)"),
        (lambda: machine(gp.RBF(np.ones((2, 1)))).fit(X, Y), "kernel must be one covariance function, got a batch"),
        (lambda: machine(of_gram=lambda q, p, c: c[:1]).fit(X, Y), "kernel_of_gram must return the shape of c"),
        (lambda: machine().fit(X, np.full(6, np.inf)), "Y must be finite"),
        (lambda: nngp.sample_network(0, NETWORK, X[:, None], width=8, law="iid"), "law must be one of nngp's"),
        (lambda: nngp.sample_features(0, NETWORK, X[:, None], width=8, law=nngp.iid), "law must be one of nngp's"),
        (lambda: nngp.sample_features(0, gp.RBF(), X[:, None], width=8), "kernel must be an NNGP, or layers"),
        (lambda: nngp.numerical(np.tanh), "phi must be a function of jax.numpy, .*tanh fails"),
        (lambda: nngp.numerical(lambda x: jnp.ones(3)), "phi must return one number"),
        (lambda: nngp.leaky_relu(np.nan), "slope must be finite"),
        (lambda: nngp.piecewise_linear([0.0], [1.0, np.nan]), "slopes must be finite"),
        (lambda: gp.sgpr(np.zeros(0)), "Z must have at least one row"),
        (lambda: gp.sgpr(np.array([0.0, np.nan])), "Z must not be NaN"),
        (lambda: gp.GP(gp.RBF(), X, solver=gp.sgpr(np.ones((3, 2)))), "Z must have rows of the shape of those of X"),
        (lambda: gp.GP(gp.RBF(), X, noise=np.eye(6), solver=gp.vecchia(3)), "those of one process"),
        (lambda: gp.GP(gp.RBF(), X, solver=gp.hsgp(8)).condition(Y, [100.0]), "Xs must lie in the box"),
        (lambda: gp.hsgp(8, boundary="wide"), "boundary must be one number"),
        (lambda: gp.GP(gp.RBF(), X, solver=gp.statespace()), "kernel must be made of"),
        (lambda: NETWORK(np.full((3, 2), np.inf)), "X1 must be finite"),
        (lambda: NETWORK(np.ones((3, 2)), np.ones((3, 3))), "X2 must have inputs of shape"),
        (lambda: nngp.gram(NETWORK, np.ones((3, 2)), np.ones((3, 3))), "X2 must have inputs of shape"),
        (lambda: nngp.gram(NETWORK, np.full((3, 2), np.inf)), "X1 must be finite"),
        (lambda: nngp.gram(flat, X, block=2), "kernel must give a matrix of one entry a pair"),
        *((functools.partial(solver, jitter=-1.0), "jitter must be finite") for solver in (gp.dense, gp.statespace)),
        *((functools.partial(solver, 3, jitter=-1.0), "jitter must be finite") for solver in (gp.vecchia, gp.hsgp)),
        (lambda: gp.sgpr(X, jitter=-1.0), "jitter must be finite"),
    ],
)
def test_bad_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_places_that_single_precision_does_not_tell_apart_are_named():
    """Seconds since 1970, which float32 rounds to two minutes."""
    times = 1.6e9 + np.arange(20.0)
    with jax.enable_x64(False):
        for solver in (gp.statespace(), gp.dense()):
            with pytest.raises(ValueError, match="X must be told apart in float32"):
                gp.GP(gp.Matern12(5.0), times, noise=0.1, solver=solver)
            gp.GP(gp.Matern12(5.0), times - times[0], noise=0.1, solver=solver)
        model = gp.FunctionalTucker([gp.Matern12(5.0), gp.Matern12(5.0)], (1, 1))
        indices = np.stack([np.arange(20.0), times], axis=1)
        with pytest.raises(ValueError, match="indices\\[:, 1\\] must be told apart"):
            gp.TuckerGibbs(model, indices, np.zeros(20))
    with jax.enable_x64(True):
        assert gp.TuckerGibbs(model, indices, np.zeros(20)).grids[1].shape == (20,)
