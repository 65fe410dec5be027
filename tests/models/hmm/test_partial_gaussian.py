"""Gaussian rows that are missing in part, with full covariances, against formulas with the components picked out."""

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, geweke_joint
from bayesinf.models import HiddenMarkovModel, hmm
from bayesinf.models.hmm import gaussian_emission
from bayesinf.models.hmm.partial_gaussian import complete_rows

pytestmark = pytest.mark.usefixtures("compile_fast")

EPS = float(jnp.finfo(jnp.result_type(float)).eps)
MEAN = np.array([[-1.0, 0.0, 1.0], [2.0, 1.0, -1.0]])
TRIL = np.array(
    [[[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.5, 0.9]], [[0.7, 0.0, 0.0], [0.2, 1.1, 0.0], [0.6, 0.1, 0.5]]]
)
EMISSIONS = {
    "full": hmm.Gaussian(MEAN, TRIL, covariance="full"),
    "tied": hmm.Gaussian(MEAN, TRIL[0], covariance="tied"),
}


def holed(num_rows, seed=0):
    """Rows of the model with all patterns of what is missing."""
    rng = np.random.default_rng(seed)
    ys = np.asarray(HiddenMarkovModel(EMISSIONS["full"]).simulate(seed, num_rows)[1], np.float64)
    patterns = np.array(list(product([False, True], repeat=3)))
    is_missing = patterns[rng.permutation(np.arange(num_rows) % 8)]
    return np.where(is_missing, np.nan, ys)


def covariances(emission):
    tril = np.broadcast_to(np.asarray(emission.scale_tril, np.float64), (2, 3, 3))
    return tril @ np.swapaxes(tril, -1, -2)


def dense(emission, ys):
    """Log densities of the marginal laws, shape (T, 2)."""
    out = np.zeros((len(ys), 2))
    for (t, y), (k, c) in product(enumerate(ys), enumerate(covariances(emission))):
        seen = ~np.isnan(y)
        if seen.any():
            out[t, k] = scipy.stats.multivariate_normal(MEAN[k][seen], c[np.ix_(seen, seen)]).logpdf(y[seen])
    return out


def m_step(emission, ys, weights):
    """Means and scatter of every state with the components picked out: conditional means, and their covariances."""
    means, scatters = [], []
    for k, c in enumerate(covariances(emission)):
        rows, spread = np.array(ys), np.zeros((3, 3))
        for t, y in enumerate(ys):
            s, m = np.flatnonzero(~np.isnan(y)), np.flatnonzero(np.isnan(y))
            gain = c[np.ix_(m, s)] @ np.linalg.inv(c[np.ix_(s, s)])
            rows[t, m] = MEAN[k][m] + gain @ (y[s] - MEAN[k][s])
            spread[np.ix_(m, m)] += weights[t, k] * (c[np.ix_(m, m)] - gain @ c[np.ix_(s, m)])
        means.append(np.average(rows, axis=0, weights=weights[:, k]))
        apart = rows - means[-1]
        scatters.append(spread + (weights[:, k, None] * apart).T @ apart)
    return np.array(means), np.array(scatters)


@pytest.mark.parametrize("name", EMISSIONS)
def test_the_density_is_that_of_what_is_seen(name):
    emission, ys = EMISSIONS[name], holed(32)
    model = HiddenMarkovModel(emission)
    np.testing.assert_allclose(model.log_lik(ys), dense(emission, ys), atol=200 * EPS, rtol=200 * EPS)
    pair = np.stack([ys, ys[::-1]])
    np.testing.assert_allclose(model.log_lik(pair)[1], dense(emission, ys[::-1]), atol=200 * EPS, rtol=200 * EPS)


def test_gradients_are_those_of_what_is_seen():
    emission, ys = EMISSIONS["full"], holed(16)

    def total(mean, tril):
        return HiddenMarkovModel(hmm.Gaussian(mean, tril, covariance="full")).log_lik(ys).sum()

    def picked(mean, tril):
        value = 0.0
        for y, k in product(ys, range(2)):
            s = np.flatnonzero(~np.isnan(y))
            if len(s):
                c = (tril[k] @ tril[k].T)[np.ix_(s, s)]
                value += jax.scipy.stats.multivariate_normal.logpdf(y[s], mean[k][s], c)
        return value

    found, expected = (jax.grad(f, argnums=(0, 1))(emission.mean, emission.scale_tril) for f in (total, picked))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e4 * EPS, atol=1e3 * EPS)
    np.testing.assert_allclose(found[1], np.tril(expected[1]) + np.triu(found[1], 1), rtol=1e4 * EPS, atol=1e3 * EPS)


@pytest.mark.parametrize("name", EMISSIONS)
def test_the_m_step_is_that_of_the_expected_moments(name):
    emission, ys = EMISSIONS[name], holed(40)
    ys = ys[~np.isnan(ys).all(1)]
    weights = np.random.default_rng(1).dirichlet([1.0, 1.0], len(ys))
    means, scatters = m_step(emission, ys, weights)
    better = emission.maximize(jnp.asarray(ys), jnp.asarray(weights))
    np.testing.assert_allclose(better.mean, means, rtol=1e3 * EPS, atol=1e3 * EPS)
    number = weights.sum(0)[:, None, None]
    expected = scatters / number if name == "full" else np.broadcast_to(scatters.sum(0) / number.sum(), (2, 3, 3))
    slack = 1e-5 * np.nanvar(ys)  # what is always added is a millionth of that
    np.testing.assert_allclose(covariances(better), expected, rtol=1e4 * EPS, atol=slack)


def em(emission, tolerance=1e-4):
    ys = holed(240, seed=3)
    fitted = HiddenMarkovModel(emission).fit(0, ys, num_starts=1, max_iterations=400, tolerance=tolerance)
    history = np.asarray(fitted.history, np.float64)
    return fitted, ys, history[~np.isnan(history)]


@pytest.mark.parametrize("name", EMISSIONS)
def test_em_climbs_to_a_stationary_point(name):
    fitted, ys, history = em(EMISSIONS[name])
    assert np.all(np.diff(history) > -100 * EPS * abs(history[-1]))
    assert history[-1] > history[0] + 1.0

    def total(mean, tril):
        emission = dataclasses.replace(fitted.model.emission, mean=mean, scale_tril=tril)
        return dataclasses.replace(fitted.model, emission=emission).log_prob(ys)

    end = fitted.model.emission
    slopes = jax.grad(total, argnums=(0, 1))(end.mean, end.scale_tril)
    assert float(jnp.max(jnp.abs(slopes[0]))) < 0.5
    assert float(jnp.max(jnp.abs(jnp.tril(slopes[1])))) < 0.5


def test_an_m_step_without_the_covariances_of_what_is_missing_is_found_out(monkeypatch):
    """Means in the place of what is missing: states shrink, and the likelihood falls."""

    def careless(*given):
        rows, spread = complete_rows(*given)
        return rows, 0 * spread

    monkeypatch.setattr(gaussian_emission, "complete_rows", careless)
    jax.clear_caches()
    try:
        fitted = HiddenMarkovModel(EMISSIONS["full"]).fit(
            0, holed(240, seed=3), num_starts=1, max_iterations=3, tolerance=1e-4, throw=False
        )
    finally:
        monkeypatch.undo()
        jax.clear_caches()
    history = np.asarray(fitted.history, np.float64)
    assert np.nanmin(np.diff(history)) < -1.0


def test_a_mixture_takes_them_too():
    mixture = hmm.Mixture(np.array([[0.3, 0.7]]), EMISSIONS["full"])
    ys = holed(16)
    expected = np.logaddexp(*(dense(EMISSIONS["full"], ys) + np.log([0.3, 0.7])).T)
    np.testing.assert_allclose(HiddenMarkovModel(mixture).log_lik(ys)[:, 0], expected, atol=200 * EPS, rtol=200 * EPS)


def test_particles_see_what_is_there_of_a_row():
    ys = holed(8)
    space = hmm.HMMStateSpace(HiddenMarkovModel(EMISSIONS["full"]))
    found = [space.observation(jnp.asarray(1), jnp.asarray(0))[1](jnp.asarray(y)) for y in ys]
    np.testing.assert_allclose(found, dense(EMISSIONS["full"], ys)[:, 1], atol=200 * EPS, rtol=200 * EPS)


PRIOR = hmm.GaussianPrior(mean=0.5, strength=2.0, df=8.0, scatter=6.0)
IS_MISSING = np.array([[0, 1], [0, 0], [1, 0], [1, 1], [0, 1], [1, 0]], bool)


@pytest.mark.parametrize("name", EMISSIONS)
def test_gibbs_sampling_leaves_the_joint_law_alone(name):
    tril = np.array([[1.0, 0.0], [0.5, 0.8]])
    emission = hmm.Gaussian(
        np.zeros((2, 2)), np.stack([tril, tril]) if name == "full" else tril, PRIOR, covariance=name
    )
    model = HiddenMarkovModel(emission, initial_prior=2.0, transition_prior=np.array([[3.0, 1.0], [1.0, 2.0]]))

    def prior(key):
        key_emission, key_initial, key_rows = jax.random.split(key, 3)
        drawn = emission.draw(key_emission, jnp.zeros((1, 2)), jnp.zeros((1, 2)))
        return hmm.parameters_of(dataclasses.replace(model, emission=drawn)) | {
            "initial": jax.random.dirichlet(key_initial, jnp.full(2, 2.0)),
            "transition": jax.random.dirichlet(key_rows, model.transition_prior),
        }

    def simulate(key, values):
        ys = hmm.with_parameters(model, values).simulate(key, len(IS_MISSING))[1]
        return jnp.where(IS_MISSING, 0.0, ys)

    def transition(key, values, ys):
        kernel = hmm.HMMGibbs(model, jnp.where(IS_MISSING, jnp.nan, ys))
        return kernel.step(key, kernel.init(values))[0].position

    report = geweke_joint(0, prior, simulate, transition, num_chains=4_000, num_rounds=3)
    assert report.p_value > FALSE_ALARM, report
