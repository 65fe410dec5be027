"""Conformal Bayes against full conformal prediction in closed form, and its coverage where the prior is wrong.

y_i ~ N(theta x_i, 1) with theta ~ N(0, s^2): the posterior with one more point in it is normal, and its predictive
densities order points by |y - theta_hat x| / sd, so p-values are known.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal

pytestmark = pytest.mark.usefixtures("compile_fast")

GRID = jnp.linspace(-6.0, 6.0, 121)


def log_lik(theta, x, y):
    return -0.5 * (y - theta * x) ** 2 - 0.5 * jnp.log(2 * jnp.pi)


def log_lik_of_mean(theta, x, y):
    return log_lik(theta, 1.0, y)


def full_conformal(x, y, x_new, candidates, prior_sd):
    """p-values by the posterior of all n + 1 points, and how near to a tie each is."""
    p, gaps = [], []
    for tried in candidates:
        xs, ys = np.append(x, x_new), np.append(y, tried)
        precision = xs @ xs + prior_sd**-2
        sd = np.sqrt(1 + xs**2 / precision)
        log_density = scipy.stats.norm.logpdf(ys, xs @ ys / precision * xs, sd)
        p.append(np.mean(log_density <= log_density[-1]))
        gaps.append(np.min(np.abs(log_density[:-1] - log_density[-1])))
    return np.array(p), np.array(gaps)


def regression(n=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return x, 0.7 * x + rng.normal(size=n)


def quadrature(x, y, prior_sd):
    """A grid of theta with the posterior as its weights: draws without Monte Carlo error."""
    precision = x @ x + prior_sd**-2
    theta = x @ y / precision + np.linspace(-8, 8, 2_001) / np.sqrt(precision)
    log_weights = -0.5 * np.sum((y - theta[:, None] * x) ** 2, 1) - 0.5 * (theta / prior_sd) ** 2
    return jnp.asarray(theta), jnp.asarray(log_weights)


@pytest.mark.parametrize("prior_sd", [0.1, 3.0])
def test_it_is_full_conformal_prediction(prior_sd):
    x, y = regression()
    theta, log_weights = quadrature(x, y, prior_sd)
    x_new = np.array([0.3, -2.0])
    data = (jnp.asarray(x), jnp.asarray(y))
    found = conformal.conformal_bayes(log_lik, theta, data, jnp.asarray(x_new), GRID, 0.2, log_weights=log_weights)
    for one, p in zip(x_new, found.p_values, strict=True):
        truth, gaps = full_conformal(x, y, one, np.asarray(GRID, np.float64), prior_sd)
        is_clear = gaps > 1e-3
        assert is_clear.mean() > 0.95
        np.testing.assert_allclose(p[is_clear], truth[is_clear], rtol=1e-5)


def test_draws_that_are_not_reweighted_are_found():
    """Scores by the posterior of the n points alone, as of a split that was not made."""
    x, y = regression()
    theta, log_weights = quadrature(x, y, 3.0)
    w = np.exp(log_weights - log_weights.max())
    truth, gaps = full_conformal(x, y, -2.0, np.asarray(GRID, np.float64), 3.0)

    def density(x, y):
        return w @ np.exp(-0.5 * (y - np.asarray(theta)[:, None] * x) ** 2)

    planted = [(np.sum(density(x, y) <= density(np.array([-2.0]), t)) + 1) / 13 for t in GRID]
    assert np.any(np.abs(planted - truth)[gaps > 1e-3] > 0.05)


def test_draws_of_the_posterior_come_near_it():
    x, y = regression()
    precision = x @ x + 3.0**-2
    theta = x @ y / precision + jax.random.normal(jax.random.key(1), (100_000,)) / np.sqrt(precision)
    found = conformal.conformal_bayes(log_lik, theta, (jnp.asarray(x), jnp.asarray(y)), jnp.array([0.3]), GRID, 0.2)
    truth, gaps = full_conformal(x, y, 0.3, np.asarray(GRID, np.float64), 3.0)
    is_clear = (gaps > 0.05) & (np.asarray(found.ess[0]) > 10_000)
    assert is_clear.sum() > 30
    np.testing.assert_allclose(found.p_values[0][is_clear], truth[is_clear], rtol=1e-5)
    assert float(found.pareto_k().max()) < 0.7


@partial(jax.jit, static_argnames="smooth")
def coverages(keys, smooth):
    """Whether a new point is in the Bayesian interval and in the conformal set, n = 50, alpha = 0.2; prior sd 0.02."""

    def one(key):
        key_y, key_theta, key_p = jax.random.split(key, 3)
        y = 1.5 + jax.random.normal(key_y, (51,))
        precision = 50 + 0.02**-2
        mean = jnp.sum(y[1:]) / precision
        theta = mean + jax.random.normal(key_theta, (200,)) / jnp.sqrt(precision)
        found = conformal.conformal_bayes(
            log_lik_of_mean, theta, (None, y[1:]), None, y[:1], 0.2, key=key_p if smooth else None
        )
        half = jax.scipy.stats.norm.ppf(0.9) * jnp.sqrt(1 + 1 / precision)
        return jnp.abs(y[0] - mean) <= half, found.is_in[0, 0], found.p_values[0, 0]

    return jax.vmap(one)(keys)


def test_coverage_where_the_prior_is_wrong():
    """The share is known: 41 of 51."""
    bayes, found, _ = coverages(jax.random.split(jax.random.key(2), 4_000), False)
    assert scipy.stats.binomtest(int(found.sum()), 4_000, 41 / 51).pvalue > FALSE_ALARM
    assert float(bayes.mean()) < 0.5


def test_smoothed_p_values_are_uniform():
    _, found, p = coverages(jax.random.split(jax.random.key(3), 4_000), True)
    assert scipy.stats.kstest(np.asarray(p, np.float64), "uniform").pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(int(found.sum()), 4_000, 0.8).pvalue > FALSE_ALARM
    _, _, plain = coverages(jax.random.split(jax.random.key(3), 4_000), False)
    counts = np.bincount(np.round(51 * np.asarray(plain, np.float64)).astype(int), minlength=52)
    assert counts[0] == 0
    assert scipy.stats.chisquare(counts[1:]).pvalue > FALSE_ALARM


def test_many_new_points_are_one_by_one_in_any_batches():
    x, y = map(jnp.asarray, regression())
    theta, log_weights = quadrature(np.asarray(x), np.asarray(y), 1.0)
    x_new = jnp.linspace(-2.0, 2.0, 5)
    options = {"log_weights": log_weights}
    found = conformal.conformal_bayes(log_lik, theta, (x, y), x_new, GRID, 0.3, **options)
    for batch_size in (1, 2):
        other = conformal.conformal_bayes(log_lik, theta, (x, y), x_new, GRID, 0.3, batch_size=batch_size, **options)
        np.testing.assert_allclose(other.p_values, found.p_values, atol=1e-6)
    jitted = jax.jit(lambda x_new: conformal.conformal_bayes(log_lik, theta, (x, y), x_new, GRID, 0.3, **options))(
        x_new
    )
    np.testing.assert_allclose(jitted.p_values, found.p_values, atol=1e-6)
    assert jitted.guarantee == found.guarantee
    own = conformal.conformal_bayes(log_lik, theta, (x, y), x_new, jnp.tile(GRID, (5, 1)), 0.3, **options)
    np.testing.assert_array_equal(own.p_values, found.p_values)


def test_the_ends_are_the_neighbours_outside():
    _, y = map(jnp.asarray, regression())
    theta = jnp.mean(y) + jax.random.normal(jax.random.key(4), (2_000,)) / jnp.sqrt(12.0)
    found = conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID, 0.3)
    is_in = np.flatnonzero(np.asarray(found.is_in[0]))
    assert float(found.lower[0]) == GRID[is_in[0] - 1]
    assert float(found.upper[0]) == GRID[is_in[-1] + 1]
    assert float(found.ess_at_ends[0]) == pytest.approx(float(found.ess[0, is_in[[0, -1]]].min()), rel=1e-4)
    short = conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID[60:64], 0.3)
    assert (float(short.lower[0]), float(short.upper[0])) == (-np.inf, np.inf)
    empty = conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID[-3:], 0.3)
    assert (float(empty.lower[0]), float(empty.upper[0])) == (np.inf, -np.inf)


def test_equal_points_are_ties():
    """Labels: the densities of points with the label that is tried are equal, up to the order of their sums."""
    y = jnp.asarray([0.0] * 20 + [1.0] * 10)
    logits = jax.random.normal(jax.random.key(5), (997,))
    found = conformal.conformal_bayes(
        lambda theta, x, y: jax.nn.log_sigmoid(jnp.where(y > 0, theta, -theta)) ,
        -0.7 + 0.3 * logits, (None, y), None, jnp.array([0.0, 1.0]), 0.2,
    )  # fmt: skip
    np.testing.assert_allclose(found.p_values[0], [1.0, 11 / 31], rtol=1e-5)


def test_what_no_draw_can_explain_is_kept_and_said():
    def uniform(theta, x, y):
        return jnp.where((y >= 0) & (y <= theta), -jnp.log(theta), -jnp.inf)

    y = jnp.linspace(0.1, 1.0, 20)
    theta = 1.0 + 0.1 * jax.random.uniform(jax.random.key(6), (500,))
    with pytest.warns(errors.SamplingWarning, match="at the ends of 1 of 1 sets"):
        found = conformal.conformal_bayes(uniform, theta, (None, y), None, jnp.array([0.5, 2.0]), 0.2)
    assert found.ess[0].tolist()[1] == 0.0
    assert found.is_in[0].tolist() == [True, True]


def test_no_warning_where_there_is_nothing_to_warn_of():
    _, y = map(jnp.asarray, regression())
    theta = jnp.mean(y) + jax.random.normal(jax.random.key(4), (2_000,)) / jnp.sqrt(12.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID, 0.3)


def test_predictive_scores_by_their_definition():
    rng = np.random.default_rng(7)
    theta, weights, y = rng.normal(size=5), rng.dirichlet(np.ones(5)), rng.normal(size=(2, 3))
    density = np.tensordot(weights, scipy.stats.norm.pdf(y - theta[:, None, None]), 1)
    cdf = np.tensordot(weights, scipy.stats.norm.cdf(y - theta[:, None, None]), 1)
    log_pdf = jnp.asarray(scipy.stats.norm.logpdf(y - theta[:, None, None]))
    log_cdf = jnp.asarray(scipy.stats.norm.logcdf(y - theta[:, None, None]))
    log_weights = jnp.asarray(np.log(weights) + 3.0)
    np.testing.assert_allclose(conformal.predictive_scores(log_pdf, log_weights), -np.log(density), rtol=1e-5)
    pit = conformal.predictive_scores(log_cdf, log_weights, kind="pit")
    np.testing.assert_allclose(pit, np.abs(cdf - 0.5), atol=1e-6)
    even = conformal.predictive_scores(log_pdf.at[:, 0, 0].set(jnp.nan))
    np.testing.assert_allclose(even[1], -np.log(np.mean(np.exp(log_pdf), 0))[1], rtol=1e-5)
    assert bool(jnp.isnan(even[0, 0]))


def test_split_sets_of_a_wrong_posterior_cover():
    """Scores of a posterior that is far off, on points that it has not seen."""

    def one(key):
        y = 1.0 + jax.random.normal(key, (30,))
        theta = jnp.linspace(-2.0, -1.9, 7)
        scores = conformal.predictive_scores(log_lik_of_mean(theta[:, None], None, y))
        return scores[0] <= conformal.conformal_quantile(scores[1:], 0.2)

    hits = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), 10_000))
    assert scipy.stats.binomtest(int(hits.sum()), 10_000, 0.8).pvalue > FALSE_ALARM


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    y, theta = jnp.arange(4.0), jnp.arange(3.0)
    with pytest.raises(ValueError, match="x of data must have the 4 rows of y, got 2"):
        conformal.conformal_bayes(log_lik, theta, (jnp.ones(2), y), jnp.ones(1), GRID, 0.2)
    with pytest.raises(ValueError, match="x_new must be given exactly where"):
        conformal.conformal_bayes(log_lik, theta, (None, y), jnp.ones(1), GRID, 0.2)
    with pytest.raises(ValueError, match="candidates must ascend"):
        conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, -GRID, 0.2)
    with pytest.raises(ValueError, match="log_lik is NaN"):
        conformal.conformal_bayes(log_lik_of_mean, theta, (None, y.at[1].set(jnp.nan)), None, GRID, 0.2)
    with pytest.raises(ValueError, match="log_lik must return a scalar"):
        conformal.conformal_bayes(lambda theta, x, y: jnp.ones(2), theta, (None, y), None, GRID, 0.2)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(3,\)"):
        conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID, 0.2, log_weights=y)
    with pytest.raises(ValueError, match="draws must have one leading axis"):
        conformal.conformal_bayes(log_lik_of_mean, {"a": theta, "b": y}, (None, y), None, GRID, 0.2)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\)"):
        conformal.conformal_bayes(log_lik_of_mean, theta, (None, y), None, GRID, 20.0)
    with pytest.raises(ValueError, match="kind must be one of 'hpd', 'pit'"):
        conformal.predictive_scores(jnp.zeros((3, 2)), kind="dcp")
