"""Deep kernel machines: closed forms of one layer, the Gaussian process at infinite width, and inducing inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayesinf.models import gp, nngp

RNG = np.random.default_rng(3)
X, NEW = RNG.normal(size=(8, 2)), RNG.normal(size=(3, 2))
Y = np.sin(2.0 * X)


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def identity(q, p, c):
    return c


def network(width_ratio, jitter=None):
    return gp.DeepKernelMachine(
        nngp.NNGP(nngp.relu(), 1, 2.0, 0.1), gp.GramKernel(nngp.relu(), 2.0, 0.1), 2, width_ratio, 0.1, jitter
    )


@pytest.mark.parametrize(("nu", "k", "y"), [(3.0, 1.5, 2.0), (0.5, 2.0, 0.7), (20.0, 0.1, 1.0), (1e6, 1.5, 1.2)])
def test_one_point_solves_its_quadratic_equation(nu, k, y):
    """A16: (nu - 1) G + y^2 - nu G^2 / K = 0."""
    fitted = gp.DeepKernelMachine(gp.Constant(k), identity, 1, nu, 0.0, 0.0).fit(np.zeros(1), np.array([y]))
    expected = k * (nu - 1 + np.sqrt((nu - 1) ** 2 + 4 * nu * y**2 / k)) / (2 * nu)
    assert fitted.is_converged
    np.testing.assert_allclose(fitted.grams, expected, rtol=1e-6)
    if nu == 1e6:  # (y^2 / K - 1) / nu from the Gaussian process, and so within 1 / nu of it where y^2 < 2 K
        np.testing.assert_allclose(fitted.grams, k, rtol=1e-6)


def test_one_layer_solves_its_riccati_equation():
    """A16: (nu - C) G + Y Y^T = nu G K^{-1} G."""
    nu, K = 4.0, np.asarray(gp.RBF(1.0)(jnp.asarray(X[:5])) + 0.1 * np.eye(5))
    kernel = gp.RBF(1.0) + gp.Product(gp.Constant(0.1), gp.RBF(1e-6))  # a ridge: its inputs are all far apart
    fitted = gp.DeepKernelMachine(kernel, identity, 1, nu, 0.0, 0.0).fit(X[:5], Y[:5])
    G = np.asarray(fitted.grams[0])
    np.testing.assert_allclose((nu - 2) * G + Y[:5] @ Y[:5].T, nu * G @ np.linalg.solve(K, G), atol=1e-6)


def test_wide_machines_are_the_gaussian_process_of_the_network():
    """A16: up to an error of order 1 / nu, which is known; means and variances.

    KL is half the squares of M off the diagonal, and the squares of its logarithms on it, so that to first order M is
    the gradient of the likelihood, which the Gaussian process has, over nu, or 2 nu on the diagonal. Means of this
    example are 1.06 / nu away, Gram matrices 2.05 / nu of their norm: 1e-6 at nu = 1e6, but for these constants.
    """
    process = gp.GP(nngp.NNGP(nngp.relu(), 3, 2.0, 0.1), X, noise=0.1, solver=gp.dense(jitter=0.0))
    law = process.condition(Y[:, 0], NEW)

    def errors(fitted):
        found = fitted.predict(NEW)
        return np.asarray([found.mean - law.mean, found.variance - law.variance])

    wide = network(1e6, jitter=0.0)
    fitted = wide.fit(X, Y[:, 0])
    assert fitted.is_converged
    slope = jax.grad(lambda raw: wide.objective(raw, X, Y[:, 0]))(jnp.zeros((2, 8, 8)))
    first = slope / 1e6 / (1.0 + np.eye(8))
    # (1/4) |M - M_best|^2 is at most what convergence leaves: ten times the rounding of the objective over 1 + 2 nu
    missing = np.sqrt(4 * 10 * np.finfo(float).eps)
    assert np.max(np.abs(first)) > 10 * missing
    np.testing.assert_allclose(fitted.raw, first, atol=missing)
    assert np.max(np.abs(errors(fitted))) < 1.1e-6
    near, far = (errors(network(nu, jitter=0.0).fit(X, Y[:, 0])) for nu in (1e5, 1e4))
    np.testing.assert_allclose(10.0 * near, far, atol=1e-2 * np.max(np.abs(far)))


def test_the_objective_is_its_formula():
    raw = 0.3 * RNG.normal(size=(2, 8, 8))
    machine = network(np.array([2.0, 5.0]), jitter=0.0)
    K, expected = np.asarray(machine.kernel(X)), 0.0
    for nu, one in zip([2.0, 5.0], raw, strict=True):
        root = np.linalg.cholesky(K) @ (np.tril(one, -1) + np.diag(np.exp(np.diag(one))))
        G = root @ root.T
        ratio = np.linalg.solve(K, G)
        expected -= nu * 0.5 * (np.trace(ratio) - np.linalg.slogdet(ratio)[1] - 8)
        q = jnp.diagonal(G)
        K = np.asarray(0.1 + 2.0 * nngp.relu().k(q[:, None], q, G))
    expected += sum(multivariate_normal(cov=K + 0.1 * np.eye(8)).logpdf(y) for y in Y.T)
    np.testing.assert_allclose(machine.objective(raw, X, Y), expected, rtol=1e-9)


def test_inducing_inputs_are_a_bound_that_is_reached():
    machine = network(1.5)
    exact, full, few = machine.fit(X, Y), machine.fit(X, Y, Z=X), machine.fit(X, Y, Z=X[:5])
    raw = 0.3 * RNG.normal(size=(2, 8, 8))
    np.testing.assert_allclose(machine.objective(raw, X, Y, Z=X), machine.objective(raw, X, Y), rtol=1e-5)
    assert few.objective < full.objective < exact.objective + 1e-5
    np.testing.assert_allclose(full.objective, exact.objective, rtol=1e-5)
    laws = full.predict(NEW, 0.1), exact.predict(NEW, 0.1)
    np.testing.assert_allclose(laws[0].mean, laws[1].mean, atol=1e-4)
    np.testing.assert_allclose(laws[0].variance, laws[1].variance, atol=1e-4)
    assert few.grams.shape == (2, 5, 5)
    assert laws[0].batch_shape == (3, 2)


def test_predictions_at_the_data_are_those_of_the_gram_matrices():
    """Through all layers, as new inputs, the data find the G_l that were fitted to them."""
    fitted = network(1.5).fit(X, Y[:, 0])
    q = jnp.diagonal(fitted.grams[-1])
    K = np.asarray(fitted.machine.kernel_of_gram(q[:, None], q, fitted.grams[-1]))
    gain = K @ np.linalg.inv(K + 0.1 * np.eye(8))
    found = fitted.predict(X)
    np.testing.assert_allclose(found.mean, gain @ Y[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.variance, np.diag(K - gain @ K), atol=1e-5)


def test_single_precision_finds_the_same():
    exact = network(1.5, jitter=1e-3).fit(X, Y[:, 0])
    with jax.enable_x64(False):
        single = network(1.5, jitter=1e-3).fit(X.astype(np.float32), Y[:, 0].astype(np.float32))
        assert single.raw.dtype == jnp.float32
        assert single.is_converged
        # relative to c + sum nu = 4, twice what convergence promises, of a rounding of 8 eps: that of sums over 8 rows
        np.testing.assert_allclose(single.objective, exact.objective, atol=4 * 2 * 10 * 8 * jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("dual must", lambda: gp.GramKernel(jnp.tanh)),
        ("kernel_of_gram must", lambda: gp.DeepKernelMachine(gp.RBF(), nngp.relu())),
        ("depth must", lambda: gp.DeepKernelMachine(gp.RBF(), identity, 0)),
        ("width_ratio must", lambda: gp.DeepKernelMachine(gp.RBF(), identity, 2, [1.0, 2.0, 3.0])),
        ("width_ratio must", lambda: gp.DeepKernelMachine(gp.RBF(), identity, 2, -1.0)),
        ("noise must", lambda: gp.DeepKernelMachine(gp.RBF(), identity, noise=-1.0)),
        ("Y must have", lambda: network(1.0).fit(X, Y[:4])),
        ("Y must be finite", lambda: network(1.0).fit(X, np.full(8, np.nan))),
        ("Z must have", lambda: network(1.0).fit(X, Y, Z=np.zeros((3, 1)))),
        ("raw must have", lambda: network(1.0).objective(jnp.zeros((1, 8, 8)), X, Y)),
        ("positive definite", lambda: gp.DeepKernelMachine(gp.Constant(1.0), identity, 1, 1.0, 0.0, 0.0).fit(X, Y)),
    ],
)
def test_bad_arguments_are_named(message, make, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
