"""What a filter stores: a tree holds the paths of the whole genealogy in less memory, a window the last steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf import errors
from bayesinf.kernels import (
    backward_sample,
    evidence_variance,
    fixed_lag_smoother,
    marginal_smoother,
    particle_filter,
    trace_paths,
)
from bayesinf.kernels.path_tree import default_capacity
from bayesinf.models import LinearGaussian, StochasticVolatility, simulate

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

MODEL = StochasticVolatility(mean=-1.0, persistence=0.95, scale=0.3)
_, YS = simulate(0, MODEL, num_steps=60)


def run(store, ess_threshold=0.7, **options):
    return particle_filter(1, MODEL, YS, num_particles=30, ess_threshold=ess_threshold, store=store, **options)


@pytest.mark.parametrize("ess_threshold", [0.7, 1.0])
def test_the_tree_holds_the_paths_of_the_whole_genealogy(ess_threshold):
    tree, full = run("tree", ess_threshold), run("full", ess_threshold)
    np.testing.assert_array_equal(tree.log_evidence_increments, full.log_evidence_increments)
    paths = [trace_paths(2, filtered, num_paths=100) for filtered in (tree, full)]
    np.testing.assert_allclose(*paths, rtol=1e-5, atol=1e-6)  # of two programs, which round on their own


def alive(ancestors):
    """How many particles of a genealogy have offspring at the end, by going back step by step."""
    lines, num = np.arange(ancestors.shape[1]), 0
    for row in np.asarray(ancestors)[::-1]:
        lines = np.unique(lines)
        num += len(lines)
        lines = row[lines]
    return num


def test_it_holds_nothing_else():
    tree, full = run("tree").history, run("full").history
    assert tree.free.shape[0] - int(tree.num_free) == alive(full.ancestors)
    assert tree.free.shape[0] == default_capacity(60, 30)
    free = np.asarray(tree.free[: int(tree.num_free)])
    assert len(np.unique(free)) == len(free)  # no place is given away twice


def test_a_long_series_takes_a_place_a_step():
    model = LinearGaussian.scalar(0.9, 0.5)
    _, ys = simulate(0, model, num_steps=5_000)
    found = particle_filter(1, model, ys, num_particles=50, store="tree")
    tree = found.history
    assert tree.free.shape[0] < 5_000 + 4 * 50 * 7
    assert not tree.is_overflowed
    assert trace_paths(2, found, num_paths=3).shape == (3, 5_000, 1)


@pytest.mark.parametrize("throw", [True, False])
def test_a_tree_makes_room_where_paths_coalesce_slowly(throw):
    """A filter that resamples every tenth step or so needs about ten times the room, which a second run has."""
    model = StochasticVolatility(mean=-1.0, persistence=0.97, scale=0.2)
    _, ys = simulate(0, model, num_steps=800)
    options = {"num_particles": 50, "ess_threshold": 0.4, "throw": throw}
    tree, full = (particle_filter(1, model, ys, store=store, **options) for store in ("tree", "full"))
    assert 4 * int(np.sum(tree.is_resampled)) < 800
    assert default_capacity(800, 50) < tree.history.parents.shape[0] < 800 * 50
    np.testing.assert_array_equal(tree.log_evidence_increments, full.log_evidence_increments)
    paths = [trace_paths(2, filtered, num_paths=100) for filtered in (tree, full)]
    np.testing.assert_allclose(*paths, rtol=1e-5, atol=1e-6)


def test_a_short_series_takes_no_more_than_its_whole_genealogy():
    found = particle_filter(1, MODEL, YS[:3], num_particles=30, ess_threshold=0.0, store="tree")
    assert found.history.parents.shape == (90,)
    assert not found.history.is_overflowed


def test_while_traced_there_is_one_run_whose_tree_tells():
    """Where nothing is resampled nothing coalesces: the default has no room for it."""
    found = jax.jit(lambda: run("tree", ess_threshold=0.0))()
    assert found.history.is_overflowed


@pytest.mark.usefixtures("unchecked")
def test_a_tree_without_room_is_told_with_the_result():
    with pytest.raises(errors.SamplingError, match="no room in 100 places; pass a larger tree_capacity") as caught:
        run("tree", tree_capacity=100)
    np.testing.assert_array_equal(caught.value.draws.log_evidence, run("summary").log_evidence)
    with pytest.raises(ValueError, match="tree_capacity must be at least 30"):
        run("tree", tree_capacity=10)
    with pytest.raises(ValueError, match="goes with store='tree', got store='full'"):
        run("full", tree_capacity=100)
    with pytest.raises(ValueError, match="filtered must hold its paths"):
        trace_paths(0, run("summary"), num_paths=2)
    with pytest.raises(ValueError, match="call particle_filter with store='full'"):
        backward_sample(0, MODEL, run("tree"), num_paths=2)


@pytest.mark.parametrize("window", [1, 7, 59, 60, 80])
def test_a_window_is_the_end_of_the_whole(window):
    part, full = run("window", window=window), run("full")
    for a, b in zip(jax.tree.leaves(part[:-1]), jax.tree.leaves(full[:-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # another program: the last digit may differ
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[-window:], rtol=1e-5, atol=1e-6), part.history, full.history
    )


def test_a_window_is_smoothed_at_its_own_times():
    """The transition of this model depends on the time, and a window starts late."""

    class Drifting(LinearGaussian):
        def transition(self, x_prev, t):
            return super().transition(x_prev + 0.5 * t, t)

    one = jnp.ones((1, 1))
    model = Drifting(jnp.zeros(1), one, 0.9 * one, 0.5 * one, one, one)
    _, ys = simulate(0, model, num_steps=20)
    part, full = (
        particle_filter(1, model, ys, num_particles=40, store=store, window=window)
        for store, window in (("window", 6), ("full", None))
    )
    np.testing.assert_allclose(marginal_smoother(model, part), marginal_smoother(model, full)[-6:], atol=1e-4)
    np.testing.assert_allclose(fixed_lag_smoother(part, 3), fixed_lag_smoother(full, 3)[-6:], rtol=1e-5)
    paths, whole = (backward_sample(2, model, filtered, num_paths=50) for filtered in (part, full))
    np.testing.assert_array_equal(paths, whole[:, -6:])


@pytest.mark.usefixtures("unchecked")
def test_what_a_window_cannot_tell():
    with pytest.raises(ValueError, match="got the last 7 of 60 steps"):
        evidence_variance(run("window", window=7))
    with pytest.raises(ValueError, match="needs window, the number of steps to keep"):
        run("window")
    with pytest.raises(ValueError, match="window=3 goes with store='window'"):
        run("full", window=3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        run("window", window=0)
