"""Partial programs: optimal and nested by enumeration of small trees, and PAC on programs with known mistakes."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models.conformal import (
    keep_nodes,
    nested_keeps,
    pac_threshold,
    parse_program,
    program_score,
    program_sets,
    show_program,
)


def random_tree(rng, n):
    parents = np.array([-1, *(rng.integers(0, v) for v in range(1, n))])
    return parents, rng.exponential(size=n)


def partial_trees(parents, max_holes):
    """Every set of nodes with the parents of its nodes, and at most so many holes."""
    n = len(parents)
    for bits in product([False, True], repeat=n):
        kept = np.array(bits)
        if all(kept[parents[v]] for v in range(1, n) if kept[v]):
            num_holes = sum(not kept[v] and (v == 0 or kept[parents[v]]) for v in range(n))
            if num_holes <= max_holes:
                yield kept


def best_by_enumeration(parents, costs, tau, max_holes, forced):
    found = [
        (len(parents) - kept.sum(), costs[kept].sum())
        for kept in partial_trees(parents, max_holes)
        if costs[kept].sum() <= tau and np.all(kept | ~forced)
    ]
    return min(found)


@pytest.mark.parametrize("max_holes", [1, 2, 3])
def test_what_is_kept_is_the_most_that_can_be(max_holes):
    rng = np.random.default_rng(max_holes)
    for _ in range(25):
        parents, costs = random_tree(rng, rng.integers(1, 9))
        forced = np.zeros(len(parents), bool)
        for tau in (0.0, 0.5, 1.5, 3.0, 6.0, 50.0):
            kept = keep_nodes(parents, costs, tau, max_holes, forced)
            assert any(np.array_equal(kept, one) for one in partial_trees(parents, max_holes))
            assert np.all(kept | ~forced)
            expected = best_by_enumeration(parents, costs, tau, max_holes, forced)
            assert (len(parents) - kept.sum(), costs[kept].sum()) == pytest.approx(expected)
            forced = kept


def test_levels_are_nested_and_would_not_be_by_themselves():
    rng = np.random.default_rng(0)
    taus, num_crossed = np.linspace(0.0, 8.0, 15), 0
    for _ in range(40):
        parents, costs = random_tree(rng, 9)
        rows = nested_keeps(parents, costs, taus, 2)
        assert np.all(rows[1:] | ~rows[:-1])
        assert np.all(rows[-1]) == (costs.sum() <= taus[-1])
        alone = np.array([keep_nodes(parents, costs, tau, 2) for tau in taus])
        num_crossed += np.any(~alone[1:] & alone[:-1])
    assert num_crossed > 0  # so that the constraint is needed


NAMES, NUMBERS = ("a", "b", "c"), ("0", "1", "2")


def random_expression(rng, depth):
    kind = rng.integers(0, 4) if depth else rng.integers(0, 2)
    if kind == 0:
        return str(rng.choice(NAMES))
    if kind == 1:
        return str(rng.choice(NUMBERS))
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return f"f({left}, {right})" if kind == 2 else f"({left} + {right})"


def mistaken(rng, truth):
    """A prediction that has leaves wrong, each with a probability that is known, and costs that tell of it."""
    letters, costs_of_leaves = [], []
    for letter in truth:
        if letter in NAMES + NUMBERS:
            chance = rng.beta(0.5, 6.0)
            others = [name for name in (NAMES if letter in NAMES else NUMBERS) if name != letter]
            letters.append(str(rng.choice(others)) if rng.uniform() < chance else letter)
            costs_of_leaves.append(-np.log1p(-chance))
        else:
            letters.append(letter)
    predicted = parse_program("".join(letters))
    is_leaf = np.array([label.startswith(("Constant", "Name")) and "'f'" not in label for label in predicted.labels])
    costs = np.full(len(is_leaf), 0.01)
    costs[is_leaf] = costs_of_leaves
    return predicted, costs


def test_the_error_is_too_high_as_rarely_as_promised():
    """Thresholds of many calibrations, their errors from a large pool of other programs."""
    rng = np.random.default_rng(1)
    taus = np.append(np.linspace(0.0, 1.0, 12), [2.0, 100.0])
    scores = np.empty(400)
    for i in range(len(scores)):
        truth = f"a = {random_expression(rng, 2)}"
        predicted, costs = mistaken(rng, truth)
        scores[i] = program_score(predicted, parse_program(truth), costs, taus, 2)
    eps, delta, n = 0.2, 0.1, 60
    pool = np.sort(scores)
    assert len(np.unique(pool)) > 8
    failed = []
    for _ in range(500):  # with replacement: independent draws from the law that puts 1 / 400 on each
        threshold = float(pac_threshold(jnp.asarray(rng.choice(scores, n)), eps, delta).threshold)
        failed.append(np.mean(pool > threshold) > eps)
    assert scipy.stats.binomtest(int(sum(failed)), len(failed), delta, alternative="greater").pvalue > FALSE_ALARM
    assert np.mean(pool == -100.0) > 0.1  # programs that are right at every level


def test_what_fits():
    predicted, truth = parse_program("if a: b = f(1)"), parse_program("if a: b = g(2, 3)")
    kept = np.ones(len(predicted.labels), bool)
    assert not program_sets._fits(predicted, kept, truth)
    assert show_program(predicted, kept) == "if a:\n    b = f(1)"
    call = next(v for v, label in enumerate(predicted.labels) if label.startswith("Call"))
    kept[call:] = False
    assert program_sets._fits(predicted, kept, truth)
    assert show_program(predicted, kept) == "if a:\n    b = __"
    assert program_sets._fits(predicted, np.zeros(len(kept), bool), parse_program("pass"))
    assert show_program(predicted, np.zeros(len(kept), bool)) == "__"
    assert not program_sets._fits(predicted, kept, parse_program("if a: b = 1\nelse: c = 1"))
    right = parse_program("if   a:  b = f(1)  # as predicted")
    assert program_score(predicted, right, np.ones(len(kept)), np.array([0.0, 100.0]), 1) == -100.0


def test_holes_given_to_the_wrong_child_are_found_out(monkeypatch):
    monkeypatch.setattr(program_sets, "_split", lambda before, child, h, r: (0, 0))
    with pytest.raises(AssertionError):
        test_what_is_kept_is_the_most_that_can_be(1)


@pytest.mark.usefixtures("unchecked")
def test_bad_trees_are_named():
    with pytest.raises(ValueError, match="parents must be -1 for the first node"):
        keep_nodes(np.array([-1, 2, 0]), np.ones(3), 1.0, 1)
    with pytest.raises(ValueError, match="costs must be 2 numbers, none negative"):
        keep_nodes(np.array([-1, 0]), np.array([1.0, -1.0]), 1.0, 1)
    with pytest.raises(ValueError, match="taus must ascend"):
        nested_keeps(np.array([-1, 0]), np.ones(2), np.array([2.0, 1.0]), 1)
    with pytest.raises(ValueError, match="max_holes must be at least 1, got 0"):
        keep_nodes(np.array([-1, 0]), np.ones(2), 1.0, 0)
