"""Vecchia, inducing points and eigenfunctions: the limits in which they are exact, and how fast they get there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.models import gp

RNG = np.random.default_rng(4)
X, PLANE = np.sort(RNG.uniform(0.0, 6.0, 40)), RNG.uniform(0.0, 1.0, (60, 2))
EXACT = gp.dense(jitter=0.0)


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def both(kernel, X, solver, noise=None, y=None):
    y = np.sin(3.0 * X).reshape(len(X), -1).sum(axis=1) if y is None else y
    return jax.jit(lambda: [gp.GP(kernel, X, noise=noise, solver=s).log_prob(y) for s in (solver, EXACT)])()


def laws_of(kernel, X, noise, y, new, solvers, full_cov=False):
    return jax.jit(
        lambda: [gp.GP(kernel, X, noise=noise, solver=s).condition(y, new, full_cov=full_cov) for s in solvers]
    )()


def test_vecchia_of_a_markov_process_needs_one_neighbour():
    """A12: Ornstein-Uhlenbeck without noise, in order of time."""
    found, expected = both(gp.Matern12(1.0), X, gp.vecchia(1, order="given", jitter=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_vecchia_of_all_neighbours_is_exact():
    """A12: value, gradient, prediction and draws."""
    solver = gp.vecchia(59, jitter=0.0)
    found, expected = both(gp.Matern32(0.3), PLANE, solver, noise=0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-9)

    def value(scale, solver):
        return gp.GP(gp.Matern32(scale), PLANE, noise=0.01, solver=solver).log_prob(PLANE[:, 0])

    slopes = [jax.jit(jax.grad(value), static_argnums=1)(0.3, s) for s in (solver, EXACT)]
    np.testing.assert_allclose(*slopes, rtol=1e-8)
    solvers = (gp.vecchia(60, jitter=0.0), EXACT)
    laws = laws_of(gp.Matern32(0.3), PLANE, 0.01, PLANE[:, 0], np.full((1, 2), 0.5), solvers)
    np.testing.assert_allclose(laws[0].mean, laws[1].mean, rtol=1e-8)
    np.testing.assert_allclose(laws[0].variance, laws[1].variance, rtol=1e-8)
    factor = jax.jit(
        lambda: gp.GP(gp.Matern32(0.3), PLANE, noise=0.01, solver=solver).factor.sqrt_matvec(jnp.eye(60))
    )()
    expected = gp.Matern32(0.3)(jnp.asarray(PLANE)) + 0.01 * jnp.eye(60)
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-9)


def divergence(m):
    """Of the exact law from the approximation, KL(N(0, S) | N(0, F F^T))."""
    solver = gp.vecchia(m, jitter=0.0)
    factor = jax.jit(
        lambda: gp.GP(gp.Matern32(0.3), PLANE, noise=0.01, solver=solver).factor.sqrt_matvec(jnp.eye(60))
    )()
    S = gp.Matern32(0.3)(jnp.asarray(PLANE)) + 0.01 * jnp.eye(60)
    inner = np.linalg.solve(factor, np.linalg.cholesky(S))
    return 0.5 * (np.sum(inner**2) - 60) - np.linalg.slogdet(inner)[1]


def test_vecchia_gets_better_with_every_neighbour():
    """Its divergence from the exact law cannot rise: the nearest ones are nested sets, and more of them tell more."""
    found = [divergence(m) for m in (1, 5, 25, 59)]
    assert np.all(np.diff(found) < 0)
    assert abs(found[-1]) < 1e-9


def test_inducing_points_bound_the_evidence_and_meet_it():
    """Below the log evidence for any Z, equal to it with Z = X; predictions are then exact too."""
    kernel = 1.5 * gp.RBF(0.8)
    for Z in (X[::8], X[::3]):
        bound, exact = both(kernel, X, gp.sgpr(Z, jitter=1e-12), noise=0.1)
        assert bound < exact
    met, exact = both(kernel, X, gp.sgpr(X, jitter=1e-12), noise=0.1)
    np.testing.assert_allclose(met, exact, rtol=1e-6)
    new = np.array([-0.5, 2.2, 7.0])
    for full_cov in (False, True):
        laws = laws_of(kernel, X, 0.1, np.sin(X), new, (gp.sgpr(X, jitter=1e-12), EXACT), full_cov)
        np.testing.assert_allclose(laws[0].mean, laws[1].mean, atol=1e-6)
        np.testing.assert_allclose(laws[0].variance, laws[1].variance, atol=1e-6)


def test_the_bound_is_that_of_titsias():
    kernel, Z, noise = gp.Matern32(0.8), X[::5], np.linspace(0.1, 0.3, 40)
    cross = np.asarray(kernel(jnp.asarray(X), jnp.asarray(Z)))
    Q = cross @ np.linalg.solve(np.asarray(kernel(jnp.asarray(Z))), cross.T)
    expected = scipy.stats.multivariate_normal(np.zeros(40), Q + np.diag(noise)).logpdf(np.sin(X))
    expected -= 0.5 * np.sum((1.0 - np.diag(Q)) / noise)
    found = gp.GP(kernel, X, noise=noise, solver=gp.sgpr(Z, jitter=0.0)).log_prob(np.sin(X))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [gp.RBF, gp.Matern52])
def test_eigenfunctions_converge_to_the_process(kind):
    kernel, errors = 2.0 * kind(0.8), []
    for m, boundary in ((10, 1.5), (40, 3.0), (160, 6.0)):
        found, expected = both(kernel, X, gp.hsgp(m, boundary=boundary), noise=0.1)
        errors.append(abs(found - expected))
    assert errors[0] > errors[1] > errors[2]
    # what the Matern spectrum (a^2 + w^2)^-3, a = sqrt(5) / l, has beyond the last frequency, against the noise
    a, w = np.sqrt(5.0) / 0.8, np.pi * 160 / (2 * 6.0 * 0.5 * (X[-1] - X[0]))
    tail = (a / w) ** 5 * 16 / (15 * np.pi)
    assert errors[2] < 0.5 * 40 * 2.0 * tail / 0.1


def test_walls_take_variance_from_the_ends_as_is_said():
    """The first reflection at the near wall, exp(-(2 margin)^2 / (2 l^2)); others are of its ninth power and less."""
    X = jnp.linspace(0.0, 1.0, 21)
    for boundary, length in ((1.5, 0.2), (1.5, 0.5), (1.0 + 2.5 * 0.4, 0.4)):
        matrix = gp.GP(gp.RBF(length), X, noise=0.1, solver=gp.hsgp(100, boundary=boundary)).factor.matrix
        share = np.exp(-((boundary - 1.0) ** 2) / (2.0 * length**2))
        assert abs(1.0 - float(jnp.sum(matrix[0] ** 2)) - share) < share**9 + 1e-4


def test_eigenfunctions_in_the_plane_predict():
    kernel, y = gp.RBF(jnp.array([0.5, 1.0])), np.sin(3.0 * PLANE[:, 0])
    laws = laws_of(kernel, PLANE, 0.05, y, PLANE[:3] + 0.01, (gp.hsgp((24, 14), boundary=6.0), EXACT))
    # the image of a point in the wall of the box is 5 lengths away; 60 data of noise 0.05 see it through a condition
    # number of at most 60 / 0.05
    bound = np.exp(-12.5) * 60 / 0.05
    np.testing.assert_allclose(laws[0].mean, laws[1].mean, atol=bound)
    np.testing.assert_allclose(laws[0].variance, laws[1].variance, atol=bound)


@pytest.mark.parametrize("solver", [gp.sgpr(X[::5]), gp.hsgp(20)], ids=["sgpr", "hsgp"])
def test_low_rank_draws_have_the_covariance_of_their_law(solver):
    process = jax.jit(lambda: gp.GP(gp.RBF(0.8), X, noise=0.1, solver=solver))()
    factor = process.factor.sqrt_matvec(jnp.eye(process.factor.num_normals))
    F = process.factor.matrix
    np.testing.assert_allclose(factor @ factor.T, F @ F.T + 0.1 * np.eye(40), atol=1e-12)
    assert process.sample(jax.random.key(0), (2,)).shape == (2, 40)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: jax.jit(lambda X: gp.GP(gp.RBF(), X, solver=gp.vecchia()).loc)(X), "X must be known values"),
        (lambda: gp.vecchia(order="random"), "order must be one of"),
        (lambda: gp.vecchia(0), "m must be at least 1"),
        (lambda: gp.GP(gp.RBF(), X, noise=0.1, solver=gp.vecchia()).condition(X, X, full_cov=True), "full_cov must be"),
        (lambda: gp.GP(gp.RBF(), X, noise=0.1, solver=gp.sgpr(PLANE)), "Z must have rows of the shape"),
        (lambda: gp.GP(gp.Linear(), X, noise=0.1, solver=gp.hsgp(5)), "kernel must be RBF or Matérn"),
        (lambda: gp.hsgp(5, boundary=1.0), "boundary must be above 1"),
        (lambda: gp.GP(gp.RBF(), X, solver=gp.hsgp((5, 5))), "m must be a number or 1 of them"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
