"""Gaussian, Student-t and scale-mixture processes: against dense algebra, against quadrature, batches, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer.util import log_density

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp
from bayesinf.models.gp.scale_mixture import _log_prior, _reach

EXACT = gp.dense(jitter=0.0)
X = np.sort(np.random.default_rng(0).uniform(0.0, 5.0, 12))
Y = 3.0 * np.sin(X)
XS = np.array([0.33, 2.1, 7.0])


def rounding(num=1.0):
    """Of a computation of some hundred operations on numbers of this size."""
    return 2_000 * float(jnp.finfo(jnp.result_type(float)).eps) * num


def rbf(x, y, lengthscale=1.0):
    return np.exp(-0.5 * ((x[:, None] - y[None]) / lengthscale) ** 2)


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        yield


def test_density_prediction_and_gradient_are_those_of_dense_algebra(double):
    S = rbf(X, X) + 0.1 * np.eye(12)
    process = gp.GP(gp.RBF(1.0), X, mean=0.5, noise=0.1, solver=EXACT)
    expected = scipy.stats.multivariate_normal(np.full(12, 0.5), S)
    np.testing.assert_allclose(process.log_prob(Y), expected.logpdf(Y), rtol=1e-12)
    np.testing.assert_allclose(process.log_prob(np.stack([Y, -Y])), expected.logpdf(np.stack([Y, -Y])), rtol=1e-12)

    cross = rbf(XS, X)
    mean = 0.5 + cross @ np.linalg.solve(S, Y - 0.5)
    cov = rbf(XS, XS) - cross @ np.linalg.solve(S, cross.T)
    each = process.condition(Y, XS, noise=0.2)
    np.testing.assert_allclose(each.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(each.variance, np.diag(cov) + 0.2, rtol=1e-10)
    joint = process.condition(Y, XS, noise=0.2, full_cov=True)
    np.testing.assert_allclose(joint.covariance_matrix, cov + 0.2 * np.eye(3), rtol=1e-10)

    def value(lengthscale, noise, mean):
        return gp.GP(gp.RBF(lengthscale), X, mean=mean, noise=noise, solver=EXACT).log_prob(Y)

    def reference(lengthscale, noise, mean):
        S = gp.RBF(lengthscale)(jnp.asarray(X)) + noise * jnp.eye(12)
        return dist.MultivariateNormal(mean * jnp.ones(12), S).log_prob(Y)

    arguments = (1.0, 0.1, 0.5)
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*arguments) for f in (value, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    found, expected = (jax.jit(jax.hessian(f, (0, 1)))(*arguments) for f in (value, reference))
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-8)


def test_student_t_is_the_quadrature_over_its_scale(double):
    """A10: marginal, predictive, and the mixture of InverseGamma, against SciPy's quadrature."""
    a, b, S = 2.0, 3.0, rbf(X, X) + 0.1 * np.eye(12)
    process = gp.StudentTProcess(a, b, gp.RBF(1.0), X, noise=0.1, solver=EXACT)
    mixture = gp.ScaleMixtureGP(dist.InverseGamma(a, b), gp.RBF(1.0), X, 0.1, noise_scaled=True)
    cross = rbf(XS, X)
    mean = cross @ np.linalg.solve(S, Y)
    variance = 1.0 - np.sum(cross.T * np.linalg.solve(S, cross.T), axis=0)
    _, log_det = np.linalg.slogdet(S)
    quadratic = Y @ np.linalg.solve(S, Y)

    u = np.linspace(-12.0, 20.0, 40_001)  # exponentially accurate, as the integrand vanishes at both ends
    log_joint = scipy.stats.invgamma(a, scale=b).logpdf(np.exp(u)) + u
    log_joint += -0.5 * (log_det + 12 * (u + np.log(2 * np.pi)) + quadratic * np.exp(-u))
    log_evidence = scipy.special.logsumexp(log_joint) + np.log(u[1] - u[0])
    weights = np.exp(log_joint - scipy.special.logsumexp(log_joint))
    values = np.array([1.0, 0.0, -2.0])
    density = np.sqrt(np.exp(u)[:, None] * (variance + 0.2))
    predictive = np.log(weights @ scipy.stats.norm(mean, density).pdf(values))

    for found in (process, mixture):
        np.testing.assert_allclose(found.log_prob(Y), log_evidence, rtol=1e-10)
        np.testing.assert_allclose(found.condition(Y, XS, noise=0.2).log_prob(values), predictive, rtol=1e-10)
    joint = [found.condition(Y, XS, noise=0.2, full_cov=True).log_prob(values) for found in (process, mixture)]
    np.testing.assert_allclose(*joint, rtol=1e-10)
    scales, log_weights = mixture.scale_posterior(Y)
    posterior = scipy.stats.invgamma(a + 6, scale=b + quadratic / 2)
    np.testing.assert_allclose(np.sum(np.exp(log_weights) * scales), posterior.mean(), rtol=1e-10)


MIXINGS = {
    "HalfCauchy": dist.HalfCauchy(2.0),
    "Uniform": dist.Uniform(0.5, 40.0),
    "two modes": dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.5, 0.5])), dist.LogNormal(jnp.array([-9.0, 3.0]), 0.3)
    ),
}


@pytest.mark.parametrize("mixing", list(MIXINGS))
def test_noise_outside_the_scale_is_the_quadrature_of_gaussians(double, mixing):
    """Value, gradient and prediction, of vector noise; the uniform law has edges, another two modes."""
    noise = np.linspace(0.05, 0.3, 12)
    low, high = (np.log(0.5), np.log(40.0)) if mixing == "Uniform" else (-25.0, 25.0)
    u, rule = np.polynomial.legendre.leggauss(800)
    u, rule = low + (high - low) * (u + 1) / 2, rule * (high - low) / 2
    law = MIXINGS[mixing]

    def log_terms(lengthscale):
        values, vectors = np.linalg.eigh(rbf(X, X, lengthscale) / np.sqrt(noise[:, None] * noise))
        spread = np.exp(u)[:, None] * values + 1.0
        log_det = np.sum(np.log(spread), axis=1) + np.sum(np.log(noise))
        quadratic = np.sum((vectors.T @ (Y / np.sqrt(noise))) ** 2 / spread, axis=1)
        return (
            -0.5 * (log_det + quadratic + 12 * np.log(2 * np.pi))
            + np.asarray(law.log_prob(np.exp(u)))
            + u
            + np.log(rule)
        )

    def value(lengthscale):
        return gp.ScaleMixtureGP(law, gp.RBF(lengthscale), X, noise).log_prob(Y)

    found, slope = jax.jit(jax.value_and_grad(value))(1.0)
    np.testing.assert_allclose(found, scipy.special.logsumexp(log_terms(1.0)), rtol=1e-10)
    ends = [scipy.special.logsumexp(log_terms(1.0 + step)) for step in (-1e-5, 1e-5)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-5, rtol=1e-6)

    process = gp.ScaleMixtureGP(law, gp.RBF(1.0), X, noise)
    weights = np.exp(log_terms(1.0) - scipy.special.logsumexp(log_terms(1.0)))
    means = [np.exp(v) * rbf(XS, X) @ np.linalg.solve(np.exp(v) * rbf(X, X) + np.diag(noise), Y) for v in u]
    np.testing.assert_allclose(process.condition(Y, XS).mean, weights @ np.array(means), rtol=1e-8)
    assert process.condition(Y, XS, noise=0.1, full_cov=True).event_shape == (3,)


EDGES = {
    "Uniform": lambda edge: dist.Uniform(0.1, edge),
    "Pareto": lambda edge: dist.Pareto(edge, 2.0),
    "HalfCauchy": lambda edge: dist.HalfCauchy(edge),
}


@pytest.mark.parametrize("noise_scaled", [False, True])
@pytest.mark.parametrize("name", list(EDGES))
def test_gradients_know_that_the_edges_of_a_law_move(double, name, noise_scaled):
    @jax.jit
    def value(edge):
        process = gp.ScaleMixtureGP(EDGES[name](edge), gp.RBF(1.0), X, 0.1, noise_scaled=noise_scaled)
        return process.log_prob(Y)

    step = 1e-4
    expected = (value(2.0 + step) - value(2.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(2.0), expected, rtol=1e-5)
    at_zero = jax.grad(lambda low: gp.ScaleMixtureGP(dist.Uniform(low, 3.0), gp.RBF(1.0), X, 0.1).log_prob(Y))(0.0)
    assert np.isfinite(at_zero)


LAWS = {"HalfCauchy": lambda edge: dist.HalfCauchy(edge), "Uniform": lambda edge: dist.Uniform(0.5, 40.0 * edge)}


@pytest.mark.parametrize("name", list(LAWS))
def test_second_derivatives_are_those_of_dense_gaussians(double, name):
    """In kernel, noise, mean and law of the scale, of two series; with duplicated inputs, so of equal eigenvalues."""
    x, data = np.repeat(X[:4], 2), np.stack([Y[:8], -Y[2:10]])
    points, rule = np.polynomial.legendre.leggauss(200)

    def parts(theta):
        return theta[0] * gp.RBF(theta[1]), theta[2] * jnp.linspace(0.5, 2.0, 8), theta[3], LAWS[name](theta[4])

    def value(theta):
        kernel, noise, mean, law = parts(theta)
        return jnp.sum(gp.ScaleMixtureGP(law, kernel, x, noise, mean=mean).log_prob(data))

    def reference(theta):
        kernel, noise, mean, law = parts(theta)
        low, high = (jnp.log(0.5), jnp.log(40.0 * theta[4])) if name == "Uniform" else (-15.0, 25.0)
        u, K = low + (high - low) * (points + 1) / 2, kernel(jnp.asarray(x))

        def log_terms(u):
            gaussian = dist.MultivariateNormal(mean * jnp.ones(8), jnp.exp(u) * K + jnp.diag(noise))
            return gaussian.log_prob(data) + law.log_prob(jnp.exp(u)) + u

        terms = jax.lax.map(log_terms, u) + jnp.log(rule * (high - low) / 2)[:, None]
        return jnp.sum(jax.scipy.special.logsumexp(terms, axis=0))

    theta = jnp.array([1.3, 1.0, 0.1, 0.2, 1.1])
    found, expected = (jax.jit(jax.hessian(f))(theta) for f in (value, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at most twice"):
        jax.make_jaxpr(jax.jacfwd(jax.hessian(value)))(theta)


def test_second_derivatives_with_the_noise_scaled(double):
    def value(lengthscale):
        return gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(lengthscale), X, 0.1, noise_scaled=True).log_prob(Y)

    slopes = [jax.jit(jax.grad(value))(1.0 + step) for step in (-1e-5, 1e-5)]
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(1.0), (slopes[1] - slopes[0]) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.1, np.linspace(0.05, 0.3, 12)])
def test_draws_and_predictions_of_a_mixture_have_derivatives(double, noise):
    """They held the eigendecomposition constant once."""

    def values(lengthscale):
        process = gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(lengthscale), X, noise)
        each, joint = process.condition(Y, XS), process.condition(Y, XS, full_cov=True)
        drawn = process.sample(jax.random.key(0), (2,))
        return each.mean, each.variance, joint.log_prob(jnp.ones(3)), drawn

    found = jax.jit(jax.jacfwd(values))(1.0)
    ends = [jax.jit(values)(1.0 + step) for step in (-1e-5, 1e-5)]
    for slope, low, high in zip(found, *ends, strict=True):
        np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-5, atol=1e-7)
    for i in (1, 3):
        with pytest.raises(ValueError, match="once"):
            jax.make_jaxpr(jax.hessian(lambda lengthscale: values(lengthscale)[i]))(1.0)  # noqa: B023


def test_draws_of_a_mixture_have_its_covariance(double):
    process = gp.ScaleMixtureGP(dist.InverseGamma(6.0, 10.0), gp.RBF(1.0), X, np.linspace(0.05, 0.3, 12))  # E s = 2
    drawn = np.asarray(process.sample(jax.random.key(0), (20_000,)))
    for i, j in [(0, 0), (11, 11), (3, 4), (0, 11)]:
        expected = 2.0 * rbf(X, X)[i, j] + np.diag(np.linspace(0.05, 0.3, 12))[i, j]
        assert mean_p_value(drawn[:, i] * drawn[:, j], expected) > FALSE_ALARM


SINGLE = {
    **MIXINGS,
    "InverseGamma": dist.InverseGamma(2.0, 3.0),
    "Gamma": dist.Gamma(0.5, 0.5),
    "HalfNormal": dist.HalfNormal(2.0),
    "Pareto": dist.Pareto(1.0, 2.0),
}


@pytest.mark.parametrize("name", list(SINGLE))
def test_densities_of_scales_are_numbers_at_both_ends_of_the_search_in_single_precision(name):
    with jax.enable_x64(False):
        mixing = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), SINGLE[name])
        u = jnp.linspace(*_reach(mixing, jnp.float32), 500)
        values = np.asarray(_log_prior(mixing, u))
        assert not np.any(np.isnan(values) | np.isposinf(values))
        assert np.max(values) > np.asarray(mixing.log_prob(jnp.asarray(1.01)))[()] - 1.0  # on a grid of 0.2


def test_a_mixture_in_single_precision_is_that_in_double():
    """Squares of its scales overflowed once."""
    found = []
    for is_double in (False, True):
        with jax.enable_x64(is_double):
            mixing = dist.InverseGamma(jnp.asarray(2.0), jnp.asarray(3.0))
            process = gp.ScaleMixtureGP(mixing, gp.RBF(1.0), jnp.asarray(X, float), 0.1)
            found.append(float(jax.jit(process.log_prob)(jnp.asarray(Y, float))))
    assert abs(found[0] - found[1]) < 2_000 * np.finfo(np.float32).eps * abs(found[1])


def test_noises_share_one_eigendecomposition(double):
    """A grid of noises, values and gradients, is as its members made with one noise for every datum."""
    noises = jnp.array([0.05, 0.1, 0.4])
    law = dist.HalfCauchy(1.0)

    def value(noise, lengthscale):
        return gp.ScaleMixtureGP(law, gp.RBF(lengthscale), X, noise).log_prob(Y)

    over_noises = jax.vmap(jax.value_and_grad(value, argnums=(0, 1)), (0, None))
    eighs = [line for line in str(jax.make_jaxpr(over_noises)(noises, 1.0)).splitlines() if " eigh[" in line]
    assert len(eighs) == 1
    assert "f64[12,12]" in eighs[0]
    assert "f64[3,12,12]" not in eighs[0]
    found, slopes = jax.jit(over_noises)(noises, 1.0)
    each = jax.jit(jax.value_and_grad(lambda noise, scale: value(jnp.full(12, noise), scale), argnums=(0, 1)))
    for i, noise in enumerate(noises):
        expected, gradient = each(noise, 1.0)
        np.testing.assert_allclose(found[i], expected, rtol=1e-11)
        np.testing.assert_allclose([slope[i] for slope in slopes], gradient, rtol=1e-9)


def build(kind, lengthscale):
    if kind == "GP":
        return gp.GP(gp.RBF(lengthscale), jnp.asarray(X), mean=jnp.sin, noise=0.1)
    if kind == "StudentTProcess":
        return gp.StudentTProcess(2.0, 3.0, gp.RBF(lengthscale), jnp.asarray(X), mean=jnp.sin, noise=0.1)
    return gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(lengthscale), jnp.asarray(X), 0.1, mean=jnp.sin)


KINDS = ["GP", "StudentTProcess", "ScaleMixtureGP"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_made_by_vmap_is_its_members(kind):
    """A process leaves vmap and jit with a batch shape, and every method minds it."""
    lengthscales = jnp.array([0.5, 1.0, 2.0])
    batch = jax.jit(jax.vmap(functools.partial(build, kind)))(lengthscales)
    assert (batch.batch_shape, batch.event_shape) == ((3,), (12,))
    ys = batch.sample(jax.random.key(0), (2,))
    assert ys.shape == (2, 3, 12)
    members = [build(kind, lengthscale) for lengthscale in lengthscales]
    expected = np.stack([member.log_prob(ys[:, i]) for i, member in enumerate(members)], axis=1)
    np.testing.assert_allclose(batch.log_prob(ys), expected, rtol=rounding(10.0), atol=rounding(100.0))
    expected = np.stack([member.condition(ys[0, i], jnp.asarray(XS)).mean for i, member in enumerate(members)])
    np.testing.assert_allclose(batch.condition(ys[0], jnp.asarray(XS)).mean, expected, rtol=1e-2, atol=1e-3)


def test_a_batch_of_parameters_is_its_members():
    """Scales of shape (B, 1) and variances of (B,)."""
    lengthscales, variances = jnp.array([0.5, 1.0]), jnp.array([1.0, 2.0])
    batch = gp.GP(gp.RBF(lengthscales[:, None], variances) + gp.Periodic(1.0, variances), X, noise=0.1)
    assert batch.batch_shape == (2,)
    for i in range(2):
        member = gp.GP(gp.RBF(lengthscales[i], variances[i]) + gp.Periodic(1.0, variances[i]), X, noise=0.1)
        np.testing.assert_allclose(batch.log_prob(Y)[i], member.log_prob(Y), rtol=rounding(100.0))
        np.testing.assert_allclose(
            batch.condition(Y, XS).variance[i], member.condition(Y, XS).variance, atol=rounding(100.0)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_works_in_a_plate_of_a_numpyro_model(kind):
    def model(ys):
        lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("series", 2):
            numpyro.sample("y", build(kind, lengthscale), obs=ys)

    ys = jnp.stack([jnp.asarray(Y), -jnp.asarray(Y)])
    found, _ = log_density(model, (ys,), {}, {"lengthscale": jnp.asarray(0.7)})
    prior = dist.LogNormal(0.0, 1.0).log_prob(0.7)
    np.testing.assert_allclose(found, jnp.sum(build(kind, 0.7).log_prob(ys)) + prior, rtol=rounding(10.0))
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(None)
    assert trace["y"]["value"].shape == (2, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_covariance_of_their_process(kind):
    """By second moments, or by what is known where those do not exist."""
    draws = np.asarray(build(kind, 1.0).sample(jax.random.key(1), (40_000,)), np.float64) - np.sin(X)
    S = rbf(X, X) + 0.1 * np.eye(12)
    if kind == "ScaleMixtureGP":  # its scale has no mean: signs of sums and differences are those of any scale
        scale = np.abs(scipy.stats.cauchy.rvs(size=400_000, random_state=0))
        correlation = np.mean(2 / np.pi * np.arcsin(scale * rbf(X, X)[0, 1] / (scale + 0.1)))
        error = 2 / np.sqrt(400_000)
        z = (np.mean(np.sign(draws[:, 0] * draws[:, 1])) - correlation) / np.hypot(error, 1 / np.sqrt(40_000))
        assert 2 * scipy.stats.norm.sf(abs(z)) > FALSE_ALARM
        return
    scale = 1.0 if kind == "GP" else 3.0 / (2.0 - 1.0)
    if kind == "StudentTProcess":  # the fourth moment does not exist: of d = y' S^-1 y / 12 the law is known, b / a F
        d = np.einsum("ij,jk,ik->i", draws, np.linalg.inv(S), draws) / 12
        assert scipy.stats.kstest(d, scipy.stats.f(12, 4, scale=1.5).cdf).pvalue > FALSE_ALARM
        return
    products = np.stack([draws[:, 0] * draws[:, j] for j in range(12)], axis=1)
    assert mean_p_value(products, scale * S[0]) > FALSE_ALARM


def test_noise_below_the_bound_is_raised_and_above_it_kept(double):
    """Duplicated inputs without noise have a density; a model with noise is not changed at all."""
    twice = np.array([0.0, 0.0, 1.0])
    assert np.isfinite(gp.GP(gp.RBF(), twice).log_prob(np.zeros(3)))
    expected = scipy.stats.multivariate_normal(np.zeros(3), rbf(twice, twice) + 1e-3 * np.eye(3)).logpdf(np.ones(3))
    np.testing.assert_allclose(gp.GP(gp.RBF(), twice, noise=1e-3).log_prob(np.ones(3)), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_gradients_at_duplicated_inputs(kind):
    with jax.enable_x64(False):
        Xf, Yf = jnp.repeat(jnp.asarray(X, jnp.float32), 2), jnp.repeat(jnp.asarray(Y, jnp.float32), 2)

        def value(lengthscale, x):
            kernel = gp.Matern32(lengthscale) + gp.Matern12(lengthscale) * gp.Matern52(lengthscale)
            if kind == "GP":
                return gp.GP(kernel, x, noise=1e-6).log_prob(Yf)
            if kind == "StudentTProcess":
                return gp.StudentTProcess(1.0, 1.0, kernel, x, noise=1e-6).log_prob(Yf)
            return gp.ScaleMixtureGP(dist.HalfCauchy(1.0), kernel, x, 1e-2).log_prob(Yf)

        found, slopes = jax.jit(jax.value_and_grad(value, (0, 1)))(jnp.float32(1.0), Xf)
        assert found.dtype == jnp.float32
        assert np.isfinite(found)
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_positive_definite_is_minus_infinity_without_a_gradient(kind):
    def value(factor):
        def kernel(A, B):
            return factor * jnp.cos(3.0 * (A[:, None] - B[None, :]) ** 2)  # a symmetric matrix, indefinite

        if kind == "GP":
            process = gp.GP(kernel, jnp.asarray(X), noise=1e-3)
        elif kind == "StudentTProcess":
            process = gp.StudentTProcess(1.0, 1.0, kernel, jnp.asarray(X), noise=1e-3)
        else:
            process = gp.ScaleMixtureGP(dist.HalfCauchy(1.0), kernel, jnp.asarray(X), 1e-3)
        return process.log_prob(jnp.asarray(Y))

    found, slope = jax.jit(jax.value_and_grad(value))(1.0)
    assert (found, slope) == (-jnp.inf, 0.0)
    with pytest.raises(ValueError, match="kernel must give a positive definite covariance"):
        value(1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kernel": 3.0}, r"kernel must be a covariance function k\(X1, X2\)"),
        ({"X": np.zeros(0)}, "X must have at least one row"),
        ({"X": np.array([0.0, np.nan])}, "X must be finite"),
        ({"noise": -1.0}, "noise must be finite and not negative"),
        ({"noise": np.ones(3)}, "noise must be a variance, a number or of shape"),
        ({"mean": np.ones(3)}, "mean must be a number"),
        ({"solver": "dense"}, "solver must be one of"),
        ({"y": np.ones(3)}, "y must have a last axis of length 2"),
        ({"y": np.array([1.0, np.nan])}, "y must not be NaN"),
        ({"Xs": np.ones((3, 2))}, "Xs must have rows of the shape of those of X"),
        ({"kernel": gp.RBF(np.ones(3))}, "lengthscale must be a scalar"),
        ({"mean": np.ones(2)}, "mean must be a number, a function"),
    ],
)
def test_bad_arguments_are_named(changes, match):
    given = {"kernel": gp.RBF(), "X": np.arange(2.0), "noise": 0.1, "y": np.ones(2), "Xs": np.arange(3.0), **changes}
    y, Xs = given.pop("y"), given.pop("Xs")
    with pytest.raises(ValueError, match=match):
        gp.GP(given.pop("kernel"), given.pop("X"), **given).condition(y, Xs)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_mixtures_are_named():
    with pytest.raises(ValueError, match="a must be finite and positive"):
        gp.StudentTProcess(-1.0, 1.0, gp.RBF(), np.arange(2.0), noise=0.1)
    with pytest.raises(ValueError, match="mixing must be a NumPyro distribution of one positive number"):
        gp.ScaleMixtureGP(3.0, gp.RBF(), np.arange(2.0), 0.1)
    with pytest.raises(ValueError, match="noise must be a variance, got None"):
        gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(), np.arange(2.0), None)


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "float64"])
def test_repeated_inputs_say_how_large_the_noise_is_whatever_the_scale(enabled):
    """Of pairs, sums are normal with s 2 K + noise and differences with noise alone, which no scale explains.

    The eigenvalues of K that are zero come out as rounding; times a scale without bound they did explain it.
    """
    x = np.linspace(0.0, 3.0, 4)
    twice, y = np.repeat(x, 2), np.sin(np.repeat(x, 2)) + np.tile([0.0, 0.1], 4)
    values, vectors = np.linalg.eigh(2.0 * rbf(x, x))
    sums, differences = (y[::2] + y[1::2]) / np.sqrt(2), (y[::2] - y[1::2]) / np.sqrt(2)
    u = np.linspace(-60.0, 60.0, 200_001)
    with jax.enable_x64(enabled):
        for noise in (1e-6, 1e-4, 1e-2):
            variances = np.exp(u)[:, None] * values + noise
            terms = -0.5 * np.sum(np.log(2 * np.pi * variances) + (vectors.T @ sums) ** 2 / variances, axis=1)
            terms += scipy.stats.halfcauchy.logpdf(np.exp(u)) + u
            expected = scipy.special.logsumexp(terms) + np.log(u[1] - u[0])
            expected += np.sum(scipy.stats.norm.logpdf(differences, scale=np.sqrt(noise)))
            found = gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(1.0), twice, noise).log_prob(y)
            np.testing.assert_allclose(found, expected, rtol=1e-10 if enabled else 1e-5)


@pytest.mark.parametrize("kind", ["GP", "StudentTProcess", "ScaleMixtureGP"])
def test_variances_are_those_of_each_observation(kind):
    noise = np.linspace(0.1, 0.5, 12)
    of_normal = 2.0 + noise
    process, expected = {
        "GP": lambda: (gp.GP(2.0 * gp.RBF(), X, noise=noise), of_normal),
        "StudentTProcess": lambda: (gp.StudentTProcess(3.0, 4.0, 2.0 * gp.RBF(), X, noise=noise), 2.0 * of_normal),
        "ScaleMixtureGP": lambda: (
            gp.ScaleMixtureGP(dist.InverseGamma(3.0, 4.0), 2.0 * gp.RBF(), X, noise),
            2.0 * 2.0 + noise,
        ),
    }[kind]()
    np.testing.assert_allclose(process.variance, expected, rtol=1e-6)
    batch = jax.vmap(lambda v: gp.GP(v * gp.RBF(), X, noise=noise))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(batch.variance, [1.0 + noise, 2.0 + noise], rtol=1e-6)


def test_the_variance_of_heavy_tails_is_infinite():
    assert np.all(np.isinf(gp.StudentTProcess(1.0, 1.0, gp.RBF(), X, noise=0.1).variance))
