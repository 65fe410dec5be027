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
        chain = jnp.array([[1.0 - tiny, tiny, 0.0], [tiny / 2, 1.0 - tiny, tiny / 2], [0.0, 2 * tiny, 1.0 - 2 * tiny]])
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


@pytest.mark.slow
@pytest.mark.parametrize("num_states", [2, 4])
def test_the_risk_of_every_row_is_within_a_tenth_of_its_limit_at_ten_thousand_steps(num_states):
    """6,000 runs: a tenth is then more than five standard errors."""
    chain = 0.5 * random_chain(num_states, 4) + 0.5 / num_states
    found = models.estimation_risk(2, chain, [10_000], num_runs=6_000)
    limit = (num_states - 1) / (2 * 10_000 * np.asarray(models.stationary_law(chain), float))
    assert np.all(5 * found.standard_error[0] < 0.1 * limit)
    np.testing.assert_allclose(found.mean[0] / limit, 1.0, atol=0.1)


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


def never_left_risk(num_steps, method):
    """n E KL over the paths whose last state was never left, of two states that are both left at a rate of 2 / n."""
    rate, lasted = 2.0 / num_steps, np.unique(np.geomspace(1, num_steps - 1, 400).astype(int))
    law = {"add": 0.5 / lasted, "minimax": np.minimum(0.5, 1 / (lasted * np.log(lasted + 1)))}[method]
    loss = rate * np.log(rate / law) + (1 - rate) * np.log((1 - rate) / (1 - law))
    path = rate * (1 - rate) ** (num_steps - 2)  # entered from either side, once
    return num_steps * np.trapezoid(path * loss, lasted)


def test_the_minimax_rule_is_the_one_of_the_enumeration():
    for lasted in (1, 2, 5, 40):
        states = jnp.array([1, 1, 1] + [0] * lasted)
        leave = min(0.5, 1 / (lasted * np.log(lasted + 1)))
        np.testing.assert_allclose(models.predict_next(states, 2, method="minimax"), [1 - leave, leave], rtol=1e-5)
        np.testing.assert_allclose(models.predict_next(1 - states, 2, method="minimax"), [leave, 1 - leave], rtol=1e-5)
    np.testing.assert_allclose(models.predict_next(jnp.zeros(9, int), 2, method="minimax"), [0.9, 0.1], rtol=1e-5)
    left = jnp.array([0, 1, 0, 0])
    np.testing.assert_array_equal(models.predict_next(left, 2, method="minimax"), models.predict_next(left, 2))


def test_the_risk_of_adding_one_half_grows_as_the_logarithm_and_the_minimax_one_slower():
    """Over n = 2^6, 2^12, 2^24, 2^48: log n doubles, and so do steps of the first; log log n has equal steps."""
    add, minimax = (
        np.diff([never_left_risk(2.0**k, method) for k in (6, 12, 24, 48)]) for method in ("add", "minimax")
    )
    np.testing.assert_allclose(add[1:] / add[:-1], 2.0, rtol=0.2)
    np.testing.assert_allclose(minimax[1:] / minimax[:-1], 1.0, rtol=0.2)


@pytest.mark.parametrize("method", ["add", "minimax"])
def test_worst_risks_are_those_in_the_text(method):
    """n E KL over a grid of chains of two states, by all types of paths of 16 steps."""
    num_steps = 16
    first, last, counts = all_types(num_steps)
    log_number = np.asarray(jax.jit(jax.vmap(log_whittle))(counts, first, last), float)
    stays, leaves = (np.asarray(counts)[np.arange(len(last)), last, i] for i in (last, 1 - last))
    leave = (leaves + 0.5) / (stays + leaves + 1)
    if method == "minimax":
        rarely = np.minimum(0.5, 1 / ((stays + 1) * np.log(stays + 2)))
        never = np.where(np.asarray(counts)[np.arange(len(last)), 1 - last, last] > 0, rarely, 1 / (num_steps + 1))
        leave = np.where(leaves > 0, leave, never)
    worst = 0.0
    for up in np.geomspace(0.05, 0.9, 12):
        for down in np.geomspace(0.05, 0.9, 12):
            chain = np.log([[1 - up, up], [down, 1 - down]])
            log_first = np.log(np.where(first == 0, down, up) / (up + down))
            probability = np.exp(log_number + log_first + np.sum(np.asarray(counts) * chain, axis=(1, 2)))
            truth = np.where(last == 0, up, down)
            loss = truth * np.log(truth / leave) + (1 - truth) * np.log((1 - truth) / (1 - leave))
            worst = max(worst, num_steps * float(probability @ loss))
    assert worst == pytest.approx(1.10, abs=0.01)


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
    rows = np.array([[0.9, 0.2], [0.1, 0.9]])
    for call in (
        lambda: models.stationary_law(rows),
        lambda: models.sample_chain(0, rows, 5),
        lambda: models.estimation_risk(0, rows, [10]),
        lambda: models.prediction_risk(0, rows, 10),
    ):
        with pytest.raises(ValueError, match="transition must hold rows of probabilities that sum to 1"):
            call()
    for call in (lambda: models.transition_counts([0, 2], 2), lambda: models.predict_next(jnp.array([0, -1]), 2)):
        with pytest.raises(ValueError, match=r"states must lie in 0\.\.1"):
            call()
    with pytest.raises(ValueError, match="method must not be 'minimax' with 3 states"):
        models.predict_next(jnp.array([0, 1]), 3, method="minimax")
    with pytest.raises(ValueError, match="method must be one of 'add', 'average', 'minimax', got 'best'"):
        models.predict_next(jnp.array([0, 1]), 2, method="best")
    with pytest.raises(ValueError, match=r"beta must be finite and positive, got 0\.0"):
        models.add_constant(jnp.eye(2), 0.0)
    with pytest.raises(ValueError, match="lengths must be at least 2, got 1"):
        models.estimation_risk(0, jnp.eye(2), [1])
