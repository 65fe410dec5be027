"""Recursive maximum likelihood and online EM: each increment against exact scores, and where long series lead."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from numpyro.distributions import constraints
from ppg_models import Scalar
from test_score import SHORT, THETA, build, exact_score

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import AdditiveFunctional, OnlineEM, RecursiveLikelihood, recursive_likelihood

YS = jnp.asarray(SHORT)


def follow(one, key, theta, ys):
    """What is told at every time."""
    state, info = one.init(key, theta, ys[0])
    _, infos = jax.lax.scan(lambda state, y: one.step(state, y), state, ys[1:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), info, infos)


def gradients(num_replicates, num_particles=100, **options):
    """Of every increment of the log likelihood after the first, at one theta, by independent runs."""
    one = RecursiveLikelihood(build, optimizer=optax.sgd(0.0), num_particles=num_particles, **options)

    def run(key):
        return follow(one, key, jnp.asarray(THETA), YS).gradient[1:]

    keys = jax.random.split(jax.random.key(num_particles), num_replicates)
    found = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=500))(keys)
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_increments_are_those_of_the_exact_score(proposal):
    exact = np.diff([exact_score(THETA, SHORT[: t + 1]) for t in range(8)], axis=0)
    # twice that of 2N minus that of N: the bias of O(1/N) is taken away
    few, many = (gradients(700, num_particles, proposal=proposal) for num_particles in (50, 100))
    assert mean_p_value(2 * many - few, exact) > FALSE_ALARM
    assert np.all((2 * many - few).std(0) / np.sqrt(700) < 0.05)


@pytest.mark.slow
def test_the_second_sum_takes_noise_away():
    """Against the difference of two estimates of the score, of which each has its own noise.

    The F-test is at the last time, where totals have most of it.
    """
    found = gradients(500)

    def plain(self, paris, info, filtered, free, memory, y, learn=recursive_likelihood._learn):
        state, told = learn(self, paris, info, filtered, free, memory, y)
        return state, told._replace(gradient=info.estimate)

    jax.clear_caches()
    with patch.object(recursive_likelihood, "_learn", plain):
        totals = gradients(500)
    jax.clear_caches()
    differences = np.diff(totals, axis=1)
    ratios = differences[:, -1].var(0, ddof=1) / found[:, -1].var(0, ddof=1)
    assert np.all(scipy.stats.f.sf(ratios, 499, 499) < FALSE_ALARM)


TRUTH = (0.7, 0.5)  # of a and q
# of an efficient estimator from 2000 observations, by the mean of 40 squares of exact scores of series of 250
EFFICIENT = np.array([0.0165, 0.0116])


def by_name(theta):
    return Scalar(theta["a"], theta["q"], 1.0, 0.3, 1.0)


def assert_found(one):
    """The parameters by which 8 series of 4000 were made, from a distant start."""

    def run(key):
        _, ys = bi.models.simulate(key, by_name({"a": TRUTH[0], "q": TRUTH[1]}), 4_000)
        theta = follow(one, key, {"a": jnp.asarray(0.2), "q": jnp.asarray(1.0)}, ys).theta
        return jnp.stack([jnp.mean(theta[name][2_000:]) for name in "aq"])

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8)))
    assert mean_p_value(found, np.array(TRUTH)) > FALSE_ALARM
    # averages of the last 2000 parameters are efficient in the limit (Polyak and Juditsky 1992)
    assert np.all(scipy.stats.chi2.sf(7 * found.var(0, ddof=1) / EFFICIENT**2, 7) > FALSE_ALARM)


@pytest.mark.slow
def test_a_long_series_leads_to_its_parameters():
    one = RecursiveLikelihood(
        by_name,
        # the information of an observation on the unconstrained a is about 0.1: of the first error a share of
        # exp(-0.1 * sum of the steps) is left, 1% after 2000
        optimizer=optax.sgd(lambda t: (t + 20.0) ** -0.6),
        num_particles=100,
        constraints={"a": constraints.interval(-1.0, 1.0), "q": constraints.positive},
    )
    assert_found(one)


MOMENTS = AdditiveFunctional(
    lambda x: jnp.stack([x**2, 0.7 * x**2, x**2]), lambda x_prev, x, t: jnp.stack([x**2, x_prev * x, x_prev**2])
)


def maximize(s):
    a = s[1] / s[2]
    return {"a": a, "q": jnp.sqrt(s[0] - a * s[1])}


@pytest.mark.slow
def test_online_em_finds_the_parameters_too():
    one = OnlineEM(by_name, MOMENTS, maximize, num_particles=100, num_waiting=50)
    assert_found(one)


def test_statistics_are_running_averages():
    """Of a statistic that is the time, whatever the path: (1 - gamma) S + gamma t, and theta follows after the wait."""
    clock = AdditiveFunctional(lambda x: 0.0 * x, lambda x_prev, x, t: 0.0 * x + t)
    one = OnlineEM(lambda theta: build(jnp.asarray(THETA)), clock, lambda s: s, num_particles=4, num_waiting=3)
    found = follow(one, jax.random.key(0), jnp.asarray(-1.0), YS)
    expected = [0.0]
    for t in range(1, 8):
        gamma = (t + 1) ** -0.6
        expected.append((1 - gamma) * expected[-1] + gamma * t)
    np.testing.assert_allclose(found.statistics, expected, rtol=1e-4)
    np.testing.assert_allclose(found.theta, [-1, -1, -1, *expected[3:]], rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match="optimizer must be one of optax"):
        RecursiveLikelihood(build, optimizer=0.1, num_particles=4)
    with pytest.raises(ValueError, match="num_particles"):
        RecursiveLikelihood(build, optimizer=optax.sgd(0.1), num_particles=0)
    with pytest.raises(ValueError, match="functional must be an AdditiveFunctional"):
        OnlineEM(build, lambda x: x, maximize, num_particles=4)
    with pytest.raises(ValueError, match=r"exponent must lie in \(0.5, 1\], got 2"):
        OnlineEM(build, MOMENTS, maximize, num_particles=4, exponent=2)
    with pytest.raises(ValueError, match="maximize must return parameters like theta"):
        OnlineEM(build, MOMENTS, maximize, num_particles=4).init(0, THETA, YS[0])
