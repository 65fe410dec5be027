"""Whittle's numbers and the law of tails against all paths; p-values that are exact class by class, and uniform."""

from collections import defaultdict
from fractions import Fraction
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models.conformal import log_whittle, markov, markov_p_value, tail_law

ROUNDING = 1e-9 if jnp.result_type(float) == jnp.float64 else 1e-4


def all_paths(num_states, length):
    return np.array(list(product(range(num_states), repeat=length)), np.int32)


def counts_of(paths, num_states):
    counts = np.zeros((len(paths), num_states, num_states))
    for before, after in zip(paths.T[:-1], paths.T[1:], strict=True):
        counts[np.arange(len(paths)), before, after] += 1
    return counts


def classes(paths, num_states):
    """The paths that are equally likely: the numbers of them by first state, last state and counts."""
    found = defaultdict(list)
    for i, (path, counts) in enumerate(zip(paths, counts_of(paths, num_states), strict=True)):
        found[path[0], path[-1], counts.tobytes()].append(i)
    return found


def whittle_error(num_states, length):
    """The largest relative error of W over all counts that a path of this length has, by enumeration of the paths."""
    paths = all_paths(num_states, length)
    groups = list(classes(paths, num_states).values())
    members = paths[[group[0] for group in groups]]
    counts = jnp.asarray(counts_of(members, num_states))
    found = jax.jit(jax.vmap(lambda c, u, v: log_whittle(c, u, v)))(counts, members[:, 0], members[:, -1])
    return np.max(np.abs(np.exp(found) / [len(group) for group in groups] - 1))


@pytest.mark.parametrize("num_states", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_whittle_counts_the_paths(num_states, length):
    assert whittle_error(num_states, length) < ROUNDING


def test_trees_from_the_last_state_are_found_out(monkeypatch):
    right = markov._log_trees
    monkeypatch.setattr(markov, "_log_trees", lambda counts, root: right(counts.T, root))
    assert whittle_error(3, 5) > 0.1


def test_what_no_path_has_is_impossible():
    paths = all_paths(3, 5)
    known = set(classes(paths, 3))
    first, last = (paths[:, 0] + 1) % 3, paths[:, -1]
    counts = counts_of(paths, 3)
    found = jax.jit(jax.vmap(log_whittle))(jnp.asarray(counts), first, last)
    expected = [(u, v, c.tobytes()) in known for u, v, c in zip(first, last, counts, strict=True)]
    np.testing.assert_array_equal(np.isneginf(found), np.logical_not(expected))
    two_cycles = jnp.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    assert np.isneginf(log_whittle(two_cycles, 0, 0))
    assert np.isneginf(log_whittle(jnp.array([[0, 0], [0, 3]]), 0, 0))


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_the_law_of_tails_is_that_of_all_paths(horizon):
    paths = all_paths(3, 7)
    groups = list(classes(paths, 3).values())
    members = paths[[group[0] for group in groups]]
    law = jax.jit(jax.vmap(lambda c, v: tail_law(c, v, horizon)))
    tails, log_probabilities = law(jnp.asarray(counts_of(members, 3)), members[:, -1])
    expected = np.zeros((len(groups), 3**horizon))
    for row, group in zip(expected, groups, strict=True):
        index = np.ravel_multi_index(tuple(paths[group, -horizon - 1 : -1].T), (3,) * horizon)
        np.add.at(row, index, 1 / len(group))
    np.testing.assert_allclose(np.exp(log_probabilities), expected, atol=ROUNDING)
    np.testing.assert_array_equal(tails[..., -1], np.broadcast_to(members[:, -1:], tails.shape[:2]))


def test_the_law_of_tails_of_a_long_path_keeps_its_digits():
    """Ratios of Whittle's numbers in exact arithmetic; differences of log factorials lose them in float32."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.choice(3, p=[0.7, 0.25, 0.05], size=1_000_000)) % 3
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (path[:-1], path[1:]), 1)
    last = path[-1]

    def trees(flow, root):
        i, j = (state for state in range(3) if state != root)
        leave = flow.sum(1) - np.diag(flow)
        return int(leave[i]) * int(leave[j]) - int(flow[i, j]) * int(flow[j, i])

    weights = []
    for a in range(3):
        before = counts.copy()
        before[a, last] -= 1
        orders = Fraction(int(counts[a, last]), 1 if a == last else int(counts[last].sum()))
        orders = orders / int(counts[a].sum()) if a == last else orders
        weights.append(orders * Fraction(trees(before, a), trees(counts, last)))
    assert sum(weights) == 1
    _, found = tail_law(counts, last, 1)
    np.testing.assert_allclose(np.exp(found), np.array(weights, float), rtol=2e-5)


def distinct(p, group):
    """P(p <= p_i) in a class of equally likely series, for every i of them."""
    values = p[group]
    return np.mean(values[None] <= values[:, None] + 1e-5, axis=1)


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_p_value_is_exact_in_every_class(horizon):
    paths = all_paths(3, 6)
    p = np.asarray(jax.jit(jax.vmap(lambda path: markov_p_value(path, 3, horizon=horizon).p))(paths))
    for group in classes(paths, 3).values():
        np.testing.assert_allclose(distinct(p, group), p[group], atol=1e-5)


def blocks_of(path):
    """What a rearrangement of blocks keeps: the first stretch, and the blocks that end in the last state."""
    visits = np.flatnonzero(path == path[-1])
    return tuple(path[: visits[0] + 1]), tuple(sorted(map(tuple, np.split(path, visits + 1)[1:-1])))


def test_a_p_value_by_blocks_is_exact_in_every_class():
    paths = all_paths(3, 6)
    p = np.asarray(jax.jit(jax.vmap(lambda path: markov_p_value(path, 3, group="block").p))(paths))
    groups = defaultdict(list)
    for i, path in enumerate(paths):
        groups[blocks_of(path)].append(i)
    for group in groups.values():
        np.testing.assert_allclose(distinct(p, group), p[group], atol=1e-5)
    assert len(np.unique(p.round(3))) > 4


@pytest.mark.parametrize("group", ["type", "block"])
def test_p_values_are_uniform_with_a_key_and_never_too_small_without(group):
    transition = jnp.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])

    def score(tail, counts):
        return jnp.where(tail[0] == tail[1], counts[0, 1], tail[0] * 1.0)

    @jax.jit
    @jax.vmap
    def replicate(key):
        key_path, key_ties = jax.random.split(key)

        def step(x, key_step):
            return (jax.random.categorical(key_step, jnp.log(transition[x])),) * 2

        path = jax.lax.scan(step, 0, jax.random.split(key_path, 60))[1]
        return markov_p_value(path, 3, score, group=group, key=key_ties).p, markov_p_value(
            path, 3, score, group=group
        ).p

    smoothed, careful = np.asarray(replicate(jax.random.split(jax.random.key(0), 10_000)), float)
    assert scipy.stats.kstest(smoothed, "uniform").pvalue > FALSE_ALARM
    assert np.all(careful >= smoothed - 1e-6)
    assert careful.mean() > smoothed.mean() + 0.05


def test_the_guarantee_says_what_is_promised():
    path = jnp.array([0, 1, 1, 0, 1])
    assert "P(p <= alpha) <= alpha" in str(markov_p_value(path, 2).guarantee)
    assert "P(p <= alpha) = alpha" in str(markov_p_value(path, 2, key=0).guarantee)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    path = jnp.array([0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"states must lie in 0\.\.0, got \[0 1 1 0 1\]"):
        markov_p_value(path, 1)
    with pytest.raises(ValueError, match="states must hold more than horizon=5 states, got 5"):
        markov_p_value(path, 2, horizon=5)
    with pytest.raises(ValueError, match="group must be one of 'type', 'block', got 'pair'"):
        markov_p_value(path, 2, group="pair")
    with pytest.raises(ValueError, match="group='block' is for horizon=1, got 2"):
        markov_p_value(path, 2, group="block", horizon=2)
    with pytest.raises(ValueError, match=r"last must lie in 0\.\.1, got 2"):
        log_whittle(jnp.eye(2), 0, 2)


@pytest.mark.parametrize("group", ["type", "block"])
def test_a_score_that_is_nan_rejects_nothing(group):
    path = jnp.array([0, 1, 1, 0, 1, 0, 0, 1])
    assert markov_p_value(path, 2, lambda tail, counts: jnp.nan + tail[0], group=group, key=0).p == 1.0
    # of other paths than what was observed, it counts as stranger
    before = path[-2]
    nan_elsewhere = markov_p_value(path, 2, lambda tail, counts: jnp.where(tail[0] == before, 0.0, jnp.nan))
    assert nan_elsewhere.p == 1.0


def test_scores_that_differ_by_rounding_are_level():
    """As where a compiler evaluates one of them twice; the truth is always level with itself."""
    with jax.enable_x64(False):
        one = np.float32(1.0)
        scores = jnp.array([one, np.nextafter(one, np.float32(2.0)), 1.0 - 1e-4, 1.0 + 1e-4, jnp.inf, -jnp.inf])
        weights = jnp.full(6, 1.0 / 6.0)
        found = [float(markov.weighted_p_value(scores, weights, i, None)) for i in range(6)]
    np.testing.assert_allclose(np.multiply(found, 6), [4.0, 4.0, 5.0, 2.0, 1.0, 6.0], rtol=1e-6)
