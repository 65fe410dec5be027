"""Vector fields on point clouds: the spectrum of the sphere, equivariance, exact densities, calibration."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, multivariate_normal, special_ortho_group

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import gp


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def fibonacci(n):
    height = 1.0 - (2.0 * np.arange(n) + 1.0) / n
    angle = np.pi * (1.0 + 5.0**0.5) * np.arange(n)
    radius = np.sqrt(1.0 - height**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


SPHERE = fibonacci(400)
FLOW = np.cross([0.3, -0.5, 1.0], SPHERE)  # a turn of the sphere
SEEN, HELD = np.arange(0, 400, 4), np.arange(2, 400, 4)


@pytest.fixture(scope="module")
def laplacian():
    with jax.enable_x64(True):
        return gp.connection_laplacian(SPHERE, dim=2, num_eigenpairs=40)


def test_the_spectrum_of_the_sphere():
    """A15: l (l + 1) - 1, of multiplicity 2 (2 l + 1), to its 2 %."""
    found = gp.connection_laplacian(fibonacci(1500), dim=2, num_eigenpairs=17).eigenvalues
    np.testing.assert_allclose(found[:16], np.repeat([1.0, 5.0], [6, 10]), rtol=0.02)
    assert found[16] > 10.0


def test_the_spectrum_does_not_depend_on_the_density_of_the_points():
    """A circle with four times as many points on one side: squares of whole numbers, to the 2 % of A15."""
    uniform = np.linspace(0.0, 2.0 * np.pi, 600, endpoint=False)
    angles = uniform + 0.6 * np.sin(uniform)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = gp.connection_laplacian(circle, dim=1, num_neighbors=4, num_eigenpairs=5).eigenvalues
    np.testing.assert_allclose(found, [0.0, 1.0, 1.0, 4.0, 4.0], rtol=0.02, atol=1e-6)


def test_the_spectrum_of_the_flat_torus():
    """In R^4: m^2 + n^2, each twice for each wave. A lattice whose points are all alike, so that waves are exact.

    The graph's own eigenvalues are known to rounding, and theirs are below those of the torus by (lambda - 1) s^2 / 4
    for weights that fall as a Gaussian of variance s^2, to second order; the next one is bounded by (lambda s^2)^2.
    """
    n, k = 1597, 8
    angles = 2.0 * np.pi * np.stack([np.arange(n) / n, np.arange(n) * 987 % n / n], axis=1)
    torus = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = np.asarray(gp.connection_laplacian(torus, dim=2, num_neighbors=k, num_eigenpairs=26).eigenvalues)
    squared = np.sum((torus - torus[0]) ** 2, axis=1)
    near = np.argsort(squared)[1 : k + 1]
    width = np.mean(squared[near])
    weights = np.exp(-2.0 * squared[near] / width)
    waves = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-4, 5)), axis=-1).reshape(-1, 2)
    of_waves = 4.0 * (1.0 - np.cos(waves @ angles[near].T)) @ weights / np.sum(weights * squared[near])
    np.testing.assert_allclose(found, np.repeat(np.sort(of_waves), 2)[:26], atol=1e-10)
    expected, variance = np.repeat([1.0, 2.0, 4.0], 8), width / 4.0
    bound = (expected - 1.0) * variance / 4.0 + (expected * variance) ** 2
    assert np.all(np.abs(found[2:] / expected - 1.0) < bound)


def test_the_spectrum_of_points_at_random():
    """Without relaxed points 26 % too low. The bound of 10 % is a judgement: four times what was seen at this size."""
    points = np.random.default_rng(4).normal(size=(2000, 3))
    points /= np.linalg.norm(points, axis=1)[:, None]
    found = gp.connection_laplacian(points, dim=2, num_eigenpairs=6).eigenvalues
    assert abs(np.mean(found) - 1.0) < 0.1


def test_the_spectrum_of_a_sphere_that_is_seen_unevenly():
    """Nine times as many points at one pole as at the other. On average over the six fields, which differ by O(h^2)."""
    share = 1.0 - (2.0 * np.arange(1500) + 1.0) / 1500
    height = (np.sqrt(1.64 + 1.6 * share) - 1.0) / 0.8  # of density 1 + 0.8 height
    flat = fibonacci(1500)[:, :2]
    radius = np.sqrt((1.0 - height**2) / np.sum(flat**2, axis=1))
    points = np.concatenate([radius[:, None] * flat, height[:, None]], axis=1)
    found = gp.connection_laplacian(points, dim=2, num_eigenpairs=6).eigenvalues
    np.testing.assert_allclose(np.mean(found), 1.0, rtol=0.02)  # that of the even sphere: a judgement


def test_predictions_turn_with_the_points():
    turn = special_ortho_group(3, seed=1).rvs()
    points = np.random.default_rng(2).normal(size=(200, 3)) * [1.0, 1.5, 2.0]
    points /= np.linalg.norm(points / [1.0, 1.5, 2.0], axis=1)[:, None]  # an ellipsoid
    vectors = np.cross([0.3, -0.5, 1.0], points)

    def law(points, vectors):
        kernel = gp.ConnectionMatern(gp.connection_laplacian(points, dim=2, num_eigenpairs=20), 1.5, 0.7, 2.0)
        posterior = gp.VectorField(kernel, 0.1).condition(SEEN[:50], vectors[SEEN[:50]])
        return posterior.mean(HELD[:50]), posterior.covariance(HELD[:50])

    mean, covariance = law(points, vectors)
    turned_mean, turned_covariance = law(points @ turn.T, vectors @ turn.T)
    np.testing.assert_allclose(turned_mean, mean @ turn.T, atol=1e-7)
    np.testing.assert_allclose(turned_covariance, turn @ covariance @ turn.T, atol=1e-7)


@pytest.mark.parametrize("nu", [1.5, math.inf])
def test_evidence_and_posterior_are_those_of_the_dense_process(laplacian, nu):
    kernel = gp.ConnectionMatern(laplacian, nu, 0.7, 2.0)
    index = np.r_[SEEN[:10], HELD[:3]]
    F = np.asarray(kernel.features(index)).reshape(26, -1)
    K = F @ F.T
    frames = np.asarray(laplacian.frames)
    y = np.einsum("tDd,tD->td", frames[index[:10]], FLOW[index[:10]]).ravel()
    field = gp.VectorField(kernel, 0.1)
    S = K[:20, :20] + 0.1 * np.eye(20)
    evidence = field.log_evidence(index[:10], FLOW[index[:10]])
    np.testing.assert_allclose(evidence, multivariate_normal(cov=S).logpdf(y), rtol=1e-9)
    gain = np.linalg.solve(S, K[:20, 20:]).T
    posterior = field.condition(index[:10], FLOW[index[:10]])
    mean = np.einsum("tDd,td->tD", frames[HELD[:3]], (gain @ y).reshape(3, 2))
    np.testing.assert_allclose(posterior.mean(HELD[:3]), mean, atol=1e-9)
    T = frames[HELD[0]]
    expected = T @ (K[20:, 20:] - gain @ K[:20, 20:])[:2, :2] @ T.T
    np.testing.assert_allclose(posterior.covariance(HELD[:1])[0], expected, atol=1e-9)


def test_the_variance_is_that_of_a_component(laplacian):
    """|F_i|^2 is twice the variance on average over the sphere, and nearly over points spread evenly: to A15's 2 %."""
    features = gp.ConnectionMatern(laplacian, 1.5, 0.5, 3.0).features(np.arange(400))
    np.testing.assert_allclose(jnp.mean(jnp.sum(features**2, axis=(1, 2))), 6.0, rtol=0.02)


def test_posteriors_of_fields_of_the_prior_are_calibrated(laplacian):
    """Residuals at a held-out point, whitened, are standard normal exactly: 300 fields, a chi-squared test."""
    field = gp.VectorField(gp.ConnectionMatern(laplacian, 1.5, 0.7), 0.1)
    frames = laplacian.frames

    @jax.jit
    @jax.vmap
    def squared(key):
        key_field, key_noise = jax.random.split(key)
        z = jax.random.normal(key_field, (40,))
        truth = jnp.einsum("tDd,td->tD", frames, field.kernel.features(jnp.arange(400)) @ z)
        noise = jnp.einsum("tDd,td->tD", frames, 0.1**0.5 * jax.random.normal(key_noise, (400, 2)))
        posterior = field.condition(SEEN, (truth + noise)[SEEN])
        T, at = frames[HELD[0]], HELD[:1]
        residual = T.T @ (truth[HELD[0]] - posterior.mean(at)[0])
        covariance = T.T @ posterior.covariance(at)[0] @ T
        inverse = jnp.array([[covariance[1, 1], -covariance[0, 1]], [-covariance[1, 0], covariance[0, 0]]])
        scale = covariance[0, 0] * covariance[1, 1] - covariance[0, 1] ** 2
        return residual @ inverse @ residual / scale

    total = float(jnp.sum(squared(jax.random.split(jax.random.key(0), 300))))
    assert 2 * min(chi2(600).sf(total), chi2(600).cdf(total)) > FALSE_ALARM


def test_a_fit_without_a_maximum_has_not_converged(laplacian):
    """A turn is of the first eigenvalue: the longer the length scale, the higher the evidence."""
    _, is_converged = gp.VectorField(gp.ConnectionMatern(laplacian), 1.0).fit(SEEN, FLOW[SEEN], num_steps=50)
    assert not is_converged


def test_draws_have_the_mean_and_covariance_of_the_posterior(laplacian):
    """Whitened draws at a point are standard normal: their mean and squares by chi-squared tests."""
    field = gp.VectorField(gp.ConnectionMatern(laplacian, 1.5, 0.7), 0.1)
    posterior, at = field.condition(SEEN[:10], FLOW[SEEN[:10]]), HELD[:1]
    T = np.asarray(laplacian.frames)[HELD[0]]
    residuals = np.asarray(posterior.sample(0, at, 2_000) - posterior.mean(at))[:, 0] @ T
    tril = np.linalg.cholesky(T.T @ np.asarray(posterior.covariance(at))[0] @ T)
    white = np.linalg.solve(tril, residuals.T)
    total = np.sum(white**2)
    assert 2 * min(chi2(4_000).sf(total), chi2(4_000).cdf(total)) > FALSE_ALARM
    assert chi2(2).sf(2_000 * np.sum(white.mean(axis=1) ** 2)) > FALSE_ALARM


def test_a_smooth_field_is_recovered_with_fitted_parameters(laplacian):
    """Held-out errors are below those of one observation, by a factor of four, a judgement; draws by z-scores."""
    flow = FLOW + np.cross(SPHERE**2 * [1.0, -2.0, 1.0], SPHERE)  # of a finite length scale
    seen = flow + 0.2 * np.random.default_rng(5).normal(size=FLOW.shape)
    field = gp.VectorField(gp.ConnectionMatern(laplacian), 1.0)
    fitted, is_converged = field.fit(SEEN, seen[SEEN])
    assert is_converged
    posterior = fitted.condition(SEEN, seen[SEEN])
    error = np.asarray(posterior.mean(HELD)) - flow[HELD]
    assert np.mean(error**2) < 0.2**2 / 4
    draws = posterior.sample(0, HELD[:5], 2000) - posterior.mean(HELD[:5])
    found = np.einsum("stD,stE->tDE", draws, draws) / 2000
    expected = np.asarray(posterior.covariance(HELD[:5]))
    variances = np.einsum("tDD->tD", expected)
    # a product of two normals has variance v_D v_E + c^2, at most twice v_D v_E; 45 entries
    deviation = np.sqrt(2.0 * variances[:, :, None] * variances[:, None, :] / 2000)
    z = np.max(np.abs(found - expected) / deviation)
    assert 45 * chi2(1).sf(z**2) > FALSE_ALARM


CIRCLE = np.stack([np.cos(np.arange(40) / 40 * 2 * np.pi), np.sin(np.arange(40) / 40 * 2 * np.pi)], axis=1)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("points must be finite", lambda _: gp.connection_laplacian(np.full((5, 2), np.nan), dim=1)),
        ("points must differ", lambda _: gp.connection_laplacian(np.r_[CIRCLE, CIRCLE], dim=1, num_eigenpairs=5)),
        ("dim must be at most", lambda _: gp.connection_laplacian(CIRCLE, dim=3)),
        ("one graph", lambda _: gp.connection_laplacian(np.r_[CIRCLE, CIRCLE + 9], dim=1, num_eigenpairs=5)),
        ("num_neighbors must", lambda _: gp.connection_laplacian(CIRCLE, dim=1, num_neighbors=39)),
        ("num_eigenpairs must", lambda _: gp.connection_laplacian(CIRCLE, dim=1)),
        ("laplacian must", lambda _: gp.ConnectionMatern(CIRCLE)),
        ("nu must", lambda laplacian: gp.ConnectionMatern(laplacian, -1.0)),
        ("lengthscale must", lambda laplacian: gp.ConnectionMatern(laplacian, 1.5, 0.0)),
        ("noise must", lambda laplacian: gp.VectorField(gp.ConnectionMatern(laplacian), 0.0)),
        ("index must lie", lambda laplacian: seen(laplacian, [400], FLOW[:1])),
        ("vectors must have", lambda laplacian: seen(laplacian, [0, 1], FLOW[:1])),
        ("vectors must be finite", lambda laplacian: seen(laplacian, [0], np.full((1, 3), np.nan))),
    ],
)
def test_bad_arguments_are_named(message, make, laplacian, unchecked):
    with pytest.raises(ValueError, match=message):
        make(laplacian)


def seen(laplacian, index, vectors):
    return gp.VectorField(gp.ConnectionMatern(laplacian)).condition(np.array(index), vectors)


def test_parameters_below_zero_that_are_not_known_yet(laplacian):
    """Evidence of minus infinity with slope zero, and a field that is NaN."""
    index = np.arange(5)
    vectors = np.ones((5, laplacian.frames.shape[1]))

    @jax.jit
    def answers(*parameters):
        def field(length, variance, noise):
            return gp.VectorField(gp.ConnectionMatern(laplacian, 1.5, length, variance), noise)

        value, slopes = jax.value_and_grad(lambda p: field(*p).log_evidence(index, vectors))(parameters)
        return value, slopes, field(*parameters).condition(index, vectors).mean(index)

    assert all(np.all(np.isfinite(found)) for found in answers(1.0, 1.0, 0.1))
    for bad in ((1.0, 1.0, -0.1), (1.0, -1.0, 0.1), (-1.0, 1.0, 0.1)):
        value, slopes, mean = answers(*bad)
        assert value == -jnp.inf
        assert slopes == (0.0, 0.0, 0.0)
        assert np.all(np.isnan(mean))


def test_single_precision(laplacian):
    exact = seen(laplacian, SEEN, FLOW[SEEN]).mean(HELD)
    with jax.enable_x64(False):
        single = seen(gp.connection_laplacian(SPHERE, dim=2, num_eigenpairs=40), SEEN, FLOW[SEEN]).mean(HELD)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, atol=1e-4)
