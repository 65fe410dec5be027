"""Gibbs sampling of a latent function and its parameters: the contract, laws and solvers it takes, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from latent_laws import MALA, X, draw_prior, kernel_of

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import contract
from bayesinf.kernels import HyperGibbs
from bayesinf.models import gp


@pytest.mark.parametrize("form", ["surrogate", pytest.param(("centred", "whitened"), marks=pytest.mark.slow)])
def test_contract(form):
    contract(kernel_of(form, parameter_kernel=MALA), draw_prior(jax.random.key(0)))


def simple_build(theta):
    return gp.GP(gp.Matern32(theta), jnp.linspace(0.0, 2.0, 5))


def normal_build(theta):
    covariance = simple_build(theta).factor.covariance
    return dist.MultivariateNormal(jnp.zeros(5), scale_tril=jnp.linalg.cholesky(covariance))


def statespace_build(theta):
    return gp.GP(gp.Matern32(theta), jnp.linspace(0.0, 2.0, 5), solver=gp.statespace())


def squares(f, y):
    return -0.5 * jnp.sum((y - f) ** 2)


def simple(build=simple_build, log_likelihood=squares, prior=None, **options):
    prior = dist.LogNormal(0.0, 0.5) if prior is None else prior
    return HyperGibbs(build, prior, log_likelihood, jnp.ones(5), **{"parameter_kernel": MALA, **options})


@pytest.mark.parametrize(
    ("form", "other"),
    [
        ("whitened", statespace_build),
        ("centred", normal_build),
        pytest.param("whitened", normal_build, marks=pytest.mark.slow),
        pytest.param("centred", statespace_build, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_one_law_in_two_ways_gives_one_chain(form, other):
    """By a multivariate normal law, and by the factor of a state space in order of time, which is Cholesky's."""

    def sweep(build):
        kernel = simple(build, form=form)
        state = kernel.init({"theta": jnp.asarray(0.2), "f": jnp.linspace(-0.5, 0.5, 5)})
        return jax.jit(lambda kernel, state: kernel.step(jax.random.key(3), state))(kernel, state)[0].position

    a, b = sweep(simple_build), sweep(other)
    # both raise K by a jitter of sqrt(eps), in float32 3e-4
    np.testing.assert_allclose(a["theta"], b["theta"], rtol=2e-2)
    np.testing.assert_allclose(a["f"], b["f"], atol=2e-2)


def test_a_covariance_without_a_factor_is_undone_and_counted():
    """Beyond a length scale of 1 it has none: the law is the prior cut off there, and no number is ever NaN."""

    def build(theta):
        covariance = jnp.eye(5) * jnp.where(theta < 1.0, 1.0, -1.0)
        return dist.MultivariateNormal(jnp.zeros(5), scale_tril=jnp.linalg.cholesky(covariance))

    for form in ("whitened", "centred", "surrogate"):
        noise = 0.5 if form == "surrogate" else None
        kernel = simple(build, form=form, auxiliary_variance=noise)
        start = {"theta": jnp.full((2,), -0.1), "f": jnp.zeros((2, 5))}
        with pytest.warns(bi.errors.SamplingWarning, match="not finite"):
            draws = bi.sample(0, kernel, start, num_samples=200, progress=False)
        assert np.all(draws["theta"] < 1.0)
        assert np.all(np.isfinite(draws["f"]))
        assert draws.stats["is_divergent"].sum() > 0


def test_warm_up_tunes_the_kernel_of_the_parameters_alone():
    kernel = simple(latent_kernel=functools.partial(kernels.PCNLangevin, step_size=0.5))
    start = kernel.initial(1, num_chains=2)
    draws = bi.sample(0, kernel, start, num_samples=20, num_warmup=30, constrain=kernel.constrain, progress=False)
    assert np.all(np.asarray(draws.tuned.step_size) != 0.1)
    assert kernel.with_step_size(0.7).latent_part.step_size == 0.5
    assert 0 < draws.stats["latent_acceptance_rate"].mean() < 1
    assert draws["theta"].min() > 0


def test_priors_of_models():
    """Unnamed parameters, and those of a NumPyro model with what it derives from them."""

    def prior():
        root = numpyro.sample("root", dist.HalfNormal(1.0))
        numpyro.deterministic("lengthscale", root**2)

    kernel = simple(lambda theta: simple_build(theta["lengthscale"] + 0.1), prior=bi.Target.from_numpyro(prior))
    position = jax.tree.map(lambda leaf: leaf[0], kernel.initial(0, num_chains=2))
    assert set(kernel.constrain(position)) == {"root", "lengthscale", "f"}


def observed_prior():
    theta = numpyro.sample("theta", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(theta, 1.0), obs=1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: simple(lambda: 0.0), r"build must be called as build\(theta\)"),
        (lambda: simple(lambda theta: theta), "build must return a models.gp.GP or a MultivariateNormal"),
        (
            lambda: simple(lambda theta: gp.GP(gp.RBF(theta), X, noise=0.1)),
            "with noise=None, the law of f, got one with",
        ),
        (lambda: simple(lambda theta: gp.StudentTProcess(2.0, 2.0, gp.RBF(theta), X)), "got StudentTProcess"),
        (lambda: simple(lambda theta: gp.GP(gp.RBF(theta * jnp.ones((2, 1))), X)), "the law of one vector f"),
        (
            lambda: simple(lambda theta: dist.MultivariateNormal(jnp.zeros(5), jnp.eye(5)).expand([3]).to_event(1)),
            r"the law of one vector f, got one of shape \(3, 5\)",
        ),
        (lambda: simple(log_likelihood=lambda f: 0.0), r"log_likelihood must be called as log_likelihood\(f, data\)"),
        (lambda: simple(log_likelihood=lambda f, y: f - y), "log_likelihood must return a floating-point scalar"),
        (lambda: simple(prior=lambda theta: 0.0), "prior must be a NumPyro distribution"),
        (lambda: simple(prior=bi.Target.from_numpyro(observed_prior)), "prior must be a model without observed sites"),
        (lambda: simple(form="ancillary"), "form must be one of 'centred', 'whitened', 'surrogate'"),
        (lambda: simple(form=()), "form must be one of"),
        (lambda: simple(form="surrogate"), "auxiliary_variance must be given"),
        (lambda: simple(auxiliary_variance=1.0), "auxiliary_variance must be None"),
        (lambda: simple(form="surrogate", auxiliary_variance=-1.0), "auxiliary_variance must be finite and positive"),
        (lambda: simple(form="surrogate", auxiliary_variance=jnp.ones(3)), "auxiliary_variance must be a number or of"),
        (lambda: simple(statespace_build, form="surrogate", auxiliary_variance=1.0), "needs a dense covariance"),
        (lambda: simple(parameter_kernel=kernels.MALA), "parameter_kernel=MALA needs more than a target"),
        (lambda: simple(latent_kernel=3.0), "latent_kernel must be a kernel with a target"),
        (lambda: simple().init(jnp.zeros(5)), 'position must be a dict of "theta" and "f"'),
        (lambda: simple().init({"theta": jnp.zeros(()), "f": jnp.zeros(3)}), "must have the shape"),
        (lambda: simple().initial(0, 2, theta=jnp.zeros(3)), "theta must have a leading axis of num_chains=2"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_start_without_a_factor_is_refused():
    kernel = simple(lambda theta: dist.MultivariateNormal(jnp.zeros(5), scale_tril=jnp.nan * jnp.eye(5)))
    with pytest.raises(bi.errors.InitializationError, match="no Cholesky factor"):
        kernel.initial(0, num_chains=2)
