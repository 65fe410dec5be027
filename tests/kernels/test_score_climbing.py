"""Markovian score climbing against optima that are known: the moments of the target."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.special
import scipy.stats
from ppg_models import assert_published, mean_and_error

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import score_climbing

SKEW = scipy.stats.skewnorm(5.0, 0.5, 2.0)  # of the paper's first experiment


def log_skew_normal(z):
    x = (z - 0.5) / 2.0
    return -0.5 * x**2 + jax.scipy.stats.norm.logcdf(5.0 * x)


def gaussian(parameters):
    return dist.Normal(parameters[0], jnp.exp(parameters[1]))


def natural(step):
    """Steps 0.5 l^-0.6, of the natural gradient of a Gaussian of unit scale."""
    return optax.sgd(lambda i: step * (i + 1.0) ** -0.6)


def fit(target, family, start, num_chains, num_iterations, **options):
    def run(key):
        more = {"optimizer": natural(0.5), "num_particles": 10, "throw": False} | options
        return score_climbing(key, family, start, target, num_iterations=num_iterations, **more).theta

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num_chains)), np.float64)


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("is_rao_blackwellized", "num_chains", "num_iterations"),
    [(True, 128, 8_000), pytest.param(False, 40, 50_000, marks=pytest.mark.slow)],  # the second as published
)
def test_the_optimum_has_the_moments_of_the_target(is_rao_blackwellized, num_chains, num_iterations):
    options = {"is_rao_blackwellized": is_rao_blackwellized}
    found = fit(log_skew_normal, gaussian, jnp.zeros(2), num_chains, num_iterations, **options)
    optimum = np.array([SKEW.mean(), SKEW.std()])
    np.testing.assert_allclose(optimum, [2.064780, 1.245577], rtol=1e-6)  # as published
    assert_published(mean_and_error(found[:, 0]), optimum[0], 0.02)
    assert_published(mean_and_error(np.exp(found[:, 1])), optimum[1], 0.02)


@pytest.fixture
def forgetful(monkeypatch):
    """Self-normalised importance sampling: the position is a fresh draw of the family every time."""
    module = sys.modules[score_climbing.__module__]

    def forget(climb, state, key, iteration, climb_on=module._climb):
        key_fresh, key = jax.random.split(key)
        free, memory, _ = state
        fresh = climb.family(free).sample(key_fresh)
        return climb_on(climb, (free, memory, fresh), key, iteration)

    monkeypatch.setattr(module, "_climb", forget)


@pytest.mark.usefixtures("forgetful")
def test_without_memory_the_family_is_too_narrow():
    found = fit(log_skew_normal, gaussian, jnp.zeros(2), 64, 8_000)
    assert mean_p_value(np.exp(found[:, 1]), SKEW.std()) < FALSE_ALARM
    assert_published(mean_and_error(np.exp(found[:, 1])), SKEW.std() - 0.047, 0.03)


MEAN = np.array([1.0, -1.0])
COV = np.array([[1.0, 0.8], [0.8, 1.0]])


def log_correlated(z):
    return -0.5 * (z - MEAN) @ jnp.asarray(np.linalg.inv(COV), z.dtype) @ (z - MEAN)


def product(parameters):
    return dist.Normal(parameters[0], jnp.exp(parameters[1])).to_event(1)


def fit_product(num_chains, num_iterations):
    """Errors of the two means, and the two standard deviations."""
    found = fit(log_correlated, product, jnp.zeros((2, 2)), num_chains, num_iterations)
    return found[:, 0] - MEAN, np.exp(found[:, 1])


@pytest.mark.slow
def test_a_product_family_has_the_marginals_of_a_correlated_target():
    """The exclusive divergence would give 0.600, and importance sampling without memory 0.847, for the sd of 1."""
    means, spreads = fit_product(64, 20_000)
    assert mean_p_value(means, 0.0) > FALSE_ALARM
    for spread in spreads.T:
        assert_published(mean_and_error(spread), 1.0, 0.03)


@pytest.mark.slow
@pytest.mark.usefixtures("forgetful")
def test_without_memory_a_product_family_has_the_published_optimum():
    """Of self-normalised importance sampling with ten draws: E sum_i W^i grad log q(z^i) = 0 at a scale of 0.847."""
    means, spreads = fit_product(64, 20_000)
    assert mean_p_value(means, 0.0) > FALSE_ALARM
    for spread in spreads.T:
        assert_published(mean_and_error(spread), 0.847, 0.01)


def test_the_published_optimum_of_importance_sampling_is_a_root():
    """In NumPy, of no code of ours: the mean gradient in log sd changes its sign between 0.827 and 0.867."""
    rng = np.random.default_rng(0)
    precision = np.linalg.inv(COV)
    for scale, sign in ((0.827, 1.0), (0.867, -1.0)):
        e = rng.standard_normal((200_000, 10, 2))
        log_w = 0.5 * (np.sum(e**2, -1) - scale**2 * np.sum(e @ precision * e, -1))
        gradient = np.sum(scipy.special.softmax(log_w, axis=1)[..., None] * (e**2 - 1), axis=(1, 2))
        mean, error = mean_and_error(sign * gradient)
        assert mean / error > scipy.stats.norm.isf(FALSE_ALARM)


def test_a_position_outside_the_family_is_kept_and_gives_no_nan():
    """The family lives on the positive half: weights of the other half are zero, and their gradients are not used."""

    def target(z):
        return jnp.where(z < 1.0, -jnp.inf, -z)

    found = score_climbing(
        0, lambda p: dist.LogNormal(p, 1.0), 0.0, target, optimizer=natural(0.5), num_particles=5, num_iterations=200,
        initial=2.0,
    )  # fmt: skip
    assert np.all(np.isfinite(found.trace))
    assert int(found.num_failed) == 0
    assert float(found.path) >= 1.0


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    options = {"optimizer": natural(0.5), "num_particles": 4, "num_iterations": 3}
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        score_climbing(0, gaussian, jnp.zeros(2), log_skew_normal, **options | {"num_particles": 1})
    with pytest.raises(ValueError, match="optimizer must be one of optax"):
        score_climbing(0, gaussian, jnp.zeros(2), log_skew_normal, **options | {"optimizer": 0.5})
    with pytest.raises(ValueError, match="family must be called as"):
        score_climbing(0, lambda: None, jnp.zeros(2), log_skew_normal, **options)
