"""Markov chains: stationary laws, the risk of estimates against its limit, and of predictions by exact enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf import models
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import markov_chain
from bayesinf.models.conformal import log_whittle


def random_chain(num_states, seed):
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(num_states), size=num_states))


@pytest.mark.parametrize("num_states", [1, 2, 5, 10])
def test_the_stationary_law_is_left_as_it_is(num_states):
    chain = np.asarray(random_chain(num_states, 0), np.float64)
    values, vectors = np.linalg.eig(chain.T)
    expected = np.real(vectors[:, np.argmax(np.real(values))])
    np.testing.assert_allclose(models.stationary_law(jnp.asarray(chain)), expected / expected.sum(), rtol=2e-5)


def test_the_stationary_law_of_a_chain_that_hardly_moves_keeps_its_digits():
    """1 - P_ii of such a chain is nothing in float32; ways out, not what stays, decide."""
    for tiny in (1e-6, 1e-12, 1e-30):
        chain = jnp.array([[1.0, tiny, 0.0], [tiny / 2, 1.0, tiny / 2], [0.0, 2 * tiny, 1.0]])
        np.testing.assert_allclose(models.stationary_law(chain), np.array([2, 4, 1]) / 7, rtol=1e-5)


def test_paths_have_the_law_of_the_chain():
    chain = random_chain(3, 1)
    paths = jax.jit(jax.vmap(lambda key: models.sample_chain(key, chain, 4)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    law = np.asarray(models.stationary_law(chain), float)
    expected = np.einsum("i,ij,jk,kl->ijkl", law, *[np.asarray(chain, float)] * 3).ravel()
    seen = np.bincount(np.ravel_multi_index(tuple(np.asarray(paths).T), (3,) * 4), minlength=81)
    assert scipy.stats.chisquare(seen, 20_000 * expected / expected.sum()).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("num_states", "num_steps"), [(2, 3_000), (4, 6_000), pytest.param(8, 20_000, marks=pytest.mark.slow)]
)
def test_the_risk_of_an_estimate_is_that_of_the_limit(num_states, num_steps):
    """(K - 1) / (2 n pi_i): of maximum likelihood; the constant adds what falls as 1 / n^2."""
    chain = 0.5 * random_chain(num_states, 2) + 0.5 / num_states
    losses = markov_chain._estimation_losses(jax.random.key(0), chain, 0.5, (num_steps,), 600)[:, 0]
    limit = (num_states - 1) / (2 * num_steps * np.asarray(models.stationary_law(chain), float))
    assert mean_p_value(np.asarray(losses, float), limit) > FALSE_ALARM
    assert mean_p_value(np.asarray(losses, float), 1.5 * limit) < FALSE_ALARM
    found = models.estimation_risk(0, chain, [num_steps], num_runs=600)
    np.testing.assert_allclose(found.mean[0], losses.mean(0), rtol=1e-5)


def test_the_risk_falls_along_the_curve():
    found = models.estimation_risk(1, random_chain(3, 3), [50, 500, 5_000], num_runs=300)
    assert found.mean.shape == (3, 3)
    assert np.all(found.mean[:-1] > 3 * found.mean[1:])


def all_types(num_steps):
    """Every (first, last, counts) that a path of two states can have."""
    types = []
    for first in (0, 1):
        for last in (0, 1):
            for num_up in range(num_steps):
                num_down = num_up + first - last
                stays = num_steps - 1 - num_up - num_down
                if num_down >= 0 and stays >= 0:
                    types += [(first, last, [[z, num_up], [num_down, stays - z]]) for z in range(stays + 1)]
    first, last, counts = (np.array(column) for column in zip(*types, strict=True))
    return first, last, jnp.asarray(counts, float)


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.3), (0.1, 0.1)])
def test_simulated_risks_of_predictions_are_those_of_all_paths(up, down):
    first, last, counts = all_types(20)
    chain = jnp.array([[1 - up, up], [down, 1 - down]])
    log_number = jax.jit(jax.vmap(log_whittle))(counts, first, last)
    log_first = jnp.log(jnp.where(first == 0, down, up) / (up + down))
    probability = jnp.exp(log_number + log_first + jnp.sum(counts * jnp.log(chain), axis=(1, 2)))
    assert float(probability.sum()) == pytest.approx(1.0, rel=1e-4)
    predictions = jax.vmap(models.add_constant)(counts)[np.arange(len(last)), last]
    exact = float(jnp.sum(probability * markov_chain._divergence(chain[last], predictions)))
    losses = markov_chain._prediction_losses(jax.random.key(1), chain, "add", 20, 20_000)
    assert mean_p_value(np.asarray(losses, float), exact) > FALSE_ALARM
    careless = markov_chain._prediction_losses(jax.random.key(1), chain, "average", 20, 20_000)
    assert mean_p_value(np.asarray(careless, float), exact) < FALSE_ALARM
    found = models.prediction_risk(1, chain, 20, num_runs=20_000)
    np.testing.assert_allclose(found.mean, losses.mean(), rtol=1e-5)


def test_the_average_is_of_predictions_from_every_past():
    states = jnp.array([0, 2, 1, 1, 0, 1, 2, 1, 0, 1])
    pasts = [models.predict_next(states[start:], 3) for start in range(10)]
    np.testing.assert_allclose(models.predict_next(states, 3, method="average"), np.mean(pasts, axis=0), rtol=1e-5)


def test_predictions_are_laws():
    for states in ([0], [0, 0, 0], [2, 2, 1], [0, 1, 2, 0]):
        for method in ("add", "average"):
            law = models.predict_next(jnp.array(states), 3, method=method)
            assert np.all(law > 0)
            assert float(law.sum()) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(models.transition_counts(jnp.array([0, 1, 1, 0, 1]), 2), [[0, 2], [1, 1]])


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_chains_are_named():
    with pytest.raises(ValueError, match="method must be one of 'add', 'average', got 'best'"):
        models.predict_next(jnp.array([0, 1]), 2, method="best")
    with pytest.raises(ValueError, match=r"beta must be finite and positive, got 0\.0"):
        models.add_constant(jnp.eye(2), 0.0)
    with pytest.raises(ValueError, match="lengths must be at least 2, got 1"):
        models.estimation_risk(0, jnp.eye(2), [1])
