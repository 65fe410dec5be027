"""Evidence of parameters of Gaussian processes: tempered SMC and IBIS against quadrature, and conditionals row by row.

The parameters are a length scale with a log-normal prior and a variance with a Gamma prior, the function is integrated
out by the process itself, and the exact evidence of every beginning of the data is a sum over a grid of both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp

TIMES = jnp.array([0.0, 0.4, 1.0, 1.3, 2.2])
Y = jnp.array([0.9, 1.4, -0.3, -0.2, 1.8])
NOISE = 0.2
PRIOR = {"lengthscale": dist.LogNormal(0.0, 0.8), "variance": dist.Gamma(2.0, 2.0)}


def process(theta, solver=None):
    return gp.GP(theta["variance"] * gp.Matern32(theta["lengthscale"]), TIMES, noise=NOISE, solver=solver)


@functools.cache
def exact_log_evidence(num=200):
    """Log p(y_0, ..., y_t) for every t, by the trapezoidal rule in quantiles of the prior's logarithms."""
    x = np.linspace(-5.0, 5.0, num)  # standard normal scores: the weights are those of a normal density
    lengthscales = np.exp(0.8 * x)[:, None]
    variances = scipy.stats.gamma(2.0, scale=0.5).ppf(scipy.stats.norm.cdf(x))[None, :]
    log_weights = (lambda w: w - np.logaddexp.reduce(w))(-0.5 * x**2)
    log_weights = log_weights[:, None] + log_weights[None, :]
    gaps = np.abs(np.subtract.outer(np.asarray(TIMES, float), np.asarray(TIMES, float)))
    scaled = np.sqrt(3.0) * gaps / lengthscales[..., None, None]
    y, found = np.asarray(Y, float), []
    for t in range(1, len(y) + 1):
        K = variances[..., None, None] * ((1 + scaled) * np.exp(-scaled))[..., :t, :t] + NOISE * np.eye(t)
        quadratic = np.einsum("i,...ij,j->...", y[:t], np.linalg.inv(K), y[:t])
        log_density = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * K)[1])
        found.append(np.logaddexp.reduce((log_weights + log_density).ravel()))
    return np.array(found)


def test_the_grid_is_fine_enough():
    np.testing.assert_allclose(exact_log_evidence(), exact_log_evidence(101), atol=1e-6)


# ---- conditionals ----

SOLVERS = {"dense": gp.dense(), "statespace": gp.statespace()}
KINDS = {
    "GP": lambda rows, solver: gp.GP(gp.Matern32(1.0), TIMES[:rows], mean=0.3, noise=NOISE, solver=solver),
    "StudentTProcess": lambda rows, solver: gp.StudentTProcess(
        1.5, 2.0, gp.Matern32(1.0), TIMES[:rows], mean=0.3, noise=NOISE, solver=solver
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_conditionals_are_the_densities_of_beginnings(kind, solver):
    whole = np.cumsum(KINDS[kind](5, SOLVERS[solver]).log_conditionals(Y))
    parts = [KINDS[kind](rows, gp.dense()).log_prob(Y[:rows]) for rows in range(1, 6)]
    np.testing.assert_allclose(whole, parts, rtol=1e-4)


def test_conditionals_of_missing_data_are_zero():
    y = Y.at[2].set(jnp.nan)
    one = gp.GP(gp.Matern32(1.0), TIMES, noise=NOISE, solver=gp.statespace())
    found = one.log_conditionals(y)
    assert found[2] == 0
    np.testing.assert_allclose(np.sum(found), one.log_prob(y), rtol=1e-4)


def test_conditionals_of_batches():
    """A batch by shape and one by vmap are the processes one by one."""
    scales = jnp.array([0.5, 2.0])
    alone = [gp.GP(gp.Matern32(scale), TIMES, noise=NOISE).log_conditionals(Y) for scale in scales]
    shaped = gp.GP(gp.Matern32(scales[:, None]), TIMES, noise=NOISE).log_conditionals(Y)
    mapped = jax.vmap(lambda scale: gp.GP(gp.Matern32(scale), TIMES, noise=NOISE))(scales).log_conditionals(Y)
    np.testing.assert_allclose(shaped, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mapped, alone, rtol=1e-4, atol=1e-5)


def test_without_a_factor_they_are_minus_infinity():
    @jax.jit
    def conditionals(sign):
        return gp.GP(lambda X1, X2: sign * jnp.eye(5), TIMES).log_conditionals(Y)

    assert np.all(np.isneginf(conditionals(-1.0)))
    assert np.all(np.isfinite(conditionals(1.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_negative_parameters_that_are_not_known_yet_have_conditionals_of_minus_infinity(kind):
    """The state space that stands in for what is none has a density of its own."""

    @jax.jit
    def conditionals(lengthscale, noise):
        prior = {} if kind == "GP" else {"a": 1.5, "b": 2.0}
        make = getattr(gp, kind)
        process = make(
            kernel=gp.Matern32(lengthscale), X=TIMES, noise=noise, solver=gp.statespace(parallel=False), **prior
        )
        return process.log_conditionals(Y)

    assert np.all(np.isneginf(conditionals(-1.0, 0.1)))
    assert np.all(np.isneginf(conditionals(1.0, -0.1)))
    assert np.all(np.isfinite(conditionals(1.0, 0.1)))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gp.GP(gp.RBF(), TIMES, solver=gp.vecchia(2)).log_conditionals(Y), "solver must be dense"),
        (lambda: gp.GP(gp.RBF(), TIMES, solver=gp.hsgp(8)).factor.whiten(Y[:, None]), "solver must be dense"),
        (lambda: gp.GP(gp.Matern32(), TIMES[::-1], solver=gp.statespace()).log_conditionals(Y), "X must be sorted"),
        (lambda: gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(), TIMES, 0.1).log_conditionals(Y), "closed form"),
    ],
)
def test_what_has_no_conditionals_says_so(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("solver", [gp.dense(), gp.statespace(), gp.vecchia(3)])
def test_whitening_undoes_colouring(solver):
    factor = gp.GP(gp.Matern32(1.0), TIMES[::-1], noise=NOISE, solver=solver).factor
    z = jnp.linspace(-1.0, 2.0, 10).reshape(5, 2)
    np.testing.assert_allclose(factor.whiten(factor.sqrt_matvec(z)), z, atol=1e-5)


# ---- evidence ----


def log_likelihood(theta, y):
    return process(theta).log_prob(y)


def log_terms(theta, y):
    return process(theta, gp.statespace()).log_conditionals(y)


def shifted_terms(theta, y):
    """Planted: each observation is scored by what is known after it."""
    return jnp.roll(log_terms(theta, y), 1)


MALA = functools.partial(kernels.MALA, step_size=0.3)
OPTIONS = {"num_particles": 24, "num_moves": 2, "tune": False, "data": Y}


def log_evidences(run, num=1_500):
    """Of independent runs."""
    keys = jax.random.split(jax.random.key(0), num)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=100))(keys), np.float64)


def test_tempered_smc_over_parameters_has_the_exact_evidence():
    """E[Zhat] = Z for every number of particles, at fixed temperatures."""

    def run(key):
        return kernels.smc_sampler(
            key, PRIOR, log_likelihood, MALA, temperatures=jnp.array([0.1, 0.4, 1.0]), **OPTIONS
        ).log_evidence

    ratios = np.exp(log_evidences(run) - exact_log_evidence()[-1])
    assert mean_p_value(ratios[:, None], np.ones(1)) > FALSE_ALARM


@pytest.mark.parametrize("terms", [log_terms, shifted_terms])
def test_ibis_over_parameters_has_the_exact_evidence_of_every_beginning(terms):
    """With moves after every observation E[Zhat_t] = Z_t for every t."""

    def run(key):
        result = kernels.ibis(key, PRIOR, terms, MALA, ess_threshold=1.0, **OPTIONS)
        return jnp.cumsum(result.log_evidence_increments)

    ratios = np.exp(log_evidences(run) - exact_log_evidence())
    assert (mean_p_value(ratios, np.ones(5)) > FALSE_ALARM) == (terms is log_terms)


def test_the_evidence_of_counts_is_that_of_quadrature():
    """Parameters and whitened function together, under a likelihood that is not Gaussian."""
    X, counts = jnp.array([0.0, 0.7]), jnp.array([4, 1])

    def model(counts):
        lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 0.8))
        f = gp.gp_latent("f", gp.Matern12(lengthscale), X, mean=0.5)
        numpyro.sample("counts", dist.Poisson(jnp.exp(f)).to_event(1), obs=counts)

    nodes, log_weights = np.polynomial.hermite_e.hermegauss(40)
    log_weights = np.log(log_weights / np.sqrt(2 * np.pi))
    x, a, b = np.meshgrid(nodes, nodes, nodes, indexing="ij")
    jitter = float(jnp.finfo(jnp.float32 if X.dtype == jnp.float32 else jnp.float64).eps) ** 0.5
    rho, scale = np.exp(-0.7 / np.exp(0.8 * x)), np.sqrt(1 + jitter)
    rho = rho / (1 + jitter)
    f = 0.5 + scale * a, 0.5 + scale * (rho * a + np.sqrt(1 - rho**2) * b)
    log_density = sum(scipy.stats.poisson.logpmf(c, np.exp(value)) for c, value in zip((4, 1), f, strict=True))
    weights = log_weights[:, None, None] + log_weights[:, None] + log_weights
    exact = np.logaddexp.reduce((log_density + weights).ravel())

    def run(key):
        options = {"num_particles": 24, "num_moves": 2, "tune": False, "temperatures": jnp.array([0.1, 0.4, 1.0])}
        return kernels.smc_sampler(key, bi.Target.from_numpyro(model, counts), None, MALA, **options).log_evidence

    ratios = np.exp(log_evidences(run) - exact)
    assert mean_p_value(ratios[:, None], np.ones(1)) > FALSE_ALARM
