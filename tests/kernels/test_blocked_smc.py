"""Blocked conditional SMC: its exact matrix on a small chain, invariance, rates that do not depend on the length."""

from itertools import pairwise, product

import equinox as eqx
import gamma_beta
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from planted.paths import ForgetsTheNext, StaleBorders
from ppg_models import PARAMETERS, Scalar, assert_published, exact_paths, mean_and_error, problem
from two_states import CHAIN_YS, INITIAL, LIKELIHOOD, TRANSITION, Chain

from bayesinf.conformance import FALSE_ALARM, exact_start_invariance
from bayesinf.kernels import BlockedSMC, ConditionalSMC
from bayesinf.kernels.blocked_smc import _bounds, _cut, _lay_out
from bayesinf.kernels.cloud import Cloud


@eqx.filter_jit
def _new_paths(kernel, keys, paths):
    def one(row):
        state, info = kernel.step(row[0], kernel.init(row[1]))
        return state.position, info

    return jax.lax.map(one, (keys, paths), batch_size=20_000)


# ---- on a chain of two states ----


def _log_joint(path, rows):
    p = INITIAL[path[0]] * np.prod([TRANSITION[a, b] for a, b in pairwise(path)])
    return p * np.prod([LIKELIHOOD[row, x] for row, x in zip(rows, path, strict=True)])


def _single_site_matrix():
    """Of N = 2 and blocks of one state at three times: first x_0 and x_2, then x_1; each a choice of two candidates."""
    paths = list(product([0, 1], repeat=3))

    def move(path, t, new):
        """The probability that x_t becomes `new`."""
        before = INITIAL if t == 0 else TRANSITION[path[t - 1]]
        after = np.ones(2) if t == 2 else TRANSITION[:, path[t + 1]]
        weights = LIKELIHOOD[t] * after
        old, other = path[t], 1 - path[t]
        leaves = before[other] * weights[other] / (weights[other] + weights[old])
        return leaves if new == other else 1.0 - leaves

    first, second = np.zeros((8, 8)), np.zeros((8, 8))
    for (i, old), (j, new) in product(enumerate(paths), repeat=2):
        if old[1] == new[1]:
            first[i, j] = move(old, 0, new[0]) * move(old, 2, new[2])
        if (old[0], old[2]) == (new[0], new[2]):
            second[i, j] = move(old, 1, new[1])
    pi = np.array([_log_joint(path, range(3)) for path in paths])
    return first @ second, pi / pi.sum()


@pytest.mark.parametrize("refresh", ["backward", pytest.param("none", marks=pytest.mark.slow)])
def test_the_matrix_of_single_sites_is_the_exact_one(refresh):
    matrix, pi = _single_site_matrix()
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(pi @ matrix, pi, atol=1e-12)
    num = 10_000
    starts = jnp.repeat(jnp.asarray(list(product([0, 1], repeat=3))), num, axis=0)
    kernel = BlockedSMC(Chain(), CHAIN_YS, 2, block_size=1, refresh=refresh)
    ends, _ = _new_paths(kernel, jax.random.split(jax.random.key(1), 8 * num), starts)
    for row, part in zip(matrix, (np.asarray(ends) @ [4, 2, 1]).reshape(8, num), strict=True):
        assert scipy.stats.chisquare(np.bincount(part, minlength=8), num * row).pvalue > FALSE_ALARM / 8


ROWS = [0, 1, 2, 1, 0, 2]


def _p_value_of_invariance(kernel, num=40_000):
    """That paths are exact after a step from exact ones, of all 64 there are."""
    paths = np.array(list(product([0, 1], repeat=len(ROWS))))
    pi = np.array([_log_joint(path, ROWS) for path in paths])
    pi /= pi.sum()
    key_start, key_step = jax.random.split(jax.random.key(2))
    starts = jnp.asarray(paths)[jax.random.categorical(key_start, jnp.log(pi), shape=(num,))]
    ends, _ = _new_paths(kernel, jax.random.split(key_step, num), starts)
    counts = np.bincount(np.asarray(ends) @ (2 ** np.arange(len(ROWS))[::-1]), minlength=len(paths))
    return scipy.stats.chisquare(counts, num * pi).pvalue


@pytest.mark.parametrize(
    ("refresh", "block_size", "num_particles"),
    [
        ("backward", 2, 2),
        pytest.param("ancestor", 3, 3, marks=pytest.mark.slow),
        pytest.param("none", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_the_law_of_a_chain_is_invariant(refresh, block_size, num_particles):
    kernel = BlockedSMC(Chain(), jnp.asarray(ROWS, float), num_particles, block_size, refresh)
    assert _p_value_of_invariance(kernel) > FALSE_ALARM


@pytest.mark.parametrize("wrong", [pytest.param(ForgetsTheNext, marks=pytest.mark.slow), StaleBorders])
def test_a_wrong_kernel_moves_the_law_of_a_chain(wrong):
    assert _p_value_of_invariance(wrong(Chain(), jnp.asarray(ROWS, float), 2, 2)) < FALSE_ALARM


# ---- on real states ----


@pytest.mark.slow
def test_a_skewed_law_of_positive_states_is_invariant():
    kernel = BlockedSMC(gamma_beta.GammaBeta(), gamma_beta.YS, 3, block_size=2)
    report = exact_start_invariance(0, kernel, gamma_beta.draw_path, num_chains=10_000, num_steps=3)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"proposal": "guided"}, {"refresh": "ancestor"}, {"refresh": "none"}])
@pytest.mark.parametrize("block_size", [1, 3, 9, 30])
def test_the_smoothing_law_is_invariant(options, block_size):
    model, ys, _ = problem("PPG1d", 12)
    smoothed = problem("PPG1d", 12)[2]
    kernel = BlockedSMC(model, ys, 3, block_size, **options)
    exact_start_invariance(
        0, kernel, lambda key: exact_paths(key, smoothed, 1)[0], num_chains=50_000, num_steps=5
    ).raise_if_rejected()


def _update_rates(kernel_class, last, **options):
    """The share of times at which one step from an exact path renews it, for 100 paths; and that of paths, by time."""
    model, ys, smoothed = problem("OW", last)
    paths = exact_paths(jax.random.key(4), smoothed, 100)
    _, info = _new_paths(kernel_class(model, ys, 10, **options), jax.random.split(jax.random.key(5), 100), paths)
    return np.asarray(info.acceptance_rate), np.mean(info.is_updated, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["none", "backward"])
def test_the_update_rate_does_not_fall_with_the_length(refresh):
    short, _ = _update_rates(BlockedSMC, 49, block_size=10, refresh=refresh)
    long, by_time = _update_rates(BlockedSMC, 399, block_size=10, refresh=refresh)
    (rate, error), (other, other_error) = mean_and_error(short), mean_and_error(long)
    assert_published((rate - other, np.hypot(error, other_error)), 0.0, 0.1)
    assert by_time.min() > 0.3


def test_without_blocks_it_does():
    short, long = (_update_rates(ConditionalSMC, last, refresh="none")[0].mean() for last in (49, 399))
    assert long < 0.3 * short


# ---- the blocks ----


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("block_size", [1, 2, 5, 6, 30])
def test_blocks_are_apart_and_what_one_pass_holds_the_other_moves(num_steps, block_size):
    covered = []
    for shift in (0, (block_size + 1) // 2)[: 1 + (block_size < num_steps)]:
        starts, stops = _bounds(num_steps, block_size, shift)
        assert np.all((stops > starts) & (stops - starts <= block_size))
        np.testing.assert_array_equal(starts[1:], stops[:-1] + 1)  # one fixed state between two
        times = np.concatenate([np.arange(*pair) for pair in zip(starts, stops, strict=True)])
        assert set(np.setdiff1d(np.arange(num_steps), times)) <= set(
            range(block_size - shift, num_steps, block_size + 1)
        )
        covered.append(times)
    np.testing.assert_array_equal(np.unique(np.concatenate(covered)), np.arange(num_steps))


def test_a_series_shorter_than_a_block_and_a_single_row_work():
    model, ys, _ = problem("PPG1d", 50)
    for num_steps, block_size in ((1, 8), (2, 1)):
        kernel = BlockedSMC(model, ys[:num_steps], 8, block_size)
        _, info = _new_paths(kernel, jax.random.split(jax.random.key(0), 200), jnp.ones((200, num_steps)))
        assert info.is_updated.shape == (200, num_steps)
        assert np.all(np.mean(info.is_updated, 0) > 0.3)


def test_keys_of_a_block_are_used_once():
    model, ys, _ = problem("PPG1d", 9)
    for refresh in ("backward", "ancestor", "none"):
        kernel = BlockedSMC(model, ys, 4, 3, refresh)
        layout = jax.tree.map(lambda leaf: leaf[1], _lay_out(10, 3, [0, 2]))
        block = jax.tree.map(lambda leaf: leaf[1], _cut(jnp.zeros(10), ys, layout))
        initial = Cloud(jnp.zeros(4), jnp.zeros(4))
        with jax.debug_key_reuse(True):
            jax.jit(lambda *args: kernel._refresh_block(*args)).lower(jax.random.key(0), block, initial)  # noqa: B023


def test_vanished_weights_keep_their_block_alone_and_are_counted():
    class Bounded(Scalar):
        def observation(self, x, t):
            return (lambda key: x), lambda y: jnp.where(y < 5.0, 0.0, jnp.where(y < 15.0, -jnp.inf, jnp.nan))

    model = Bounded(**PARAMETERS["OW"])
    ys = jnp.zeros(12).at[5].set(10.0)
    path = 0.1 * jnp.arange(12.0)
    keys, paths = jax.random.split(jax.random.key(0), 1), path[None]
    # blocks 0-2, 4-6, 8-10; then 0, 2-4, 6-8, 10-11
    (ends,), info = _new_paths(BlockedSMC(model, ys, 8, 3), keys, paths)
    assert bool(info.is_divergent[0])
    assert int(info.num_invalid[0]) == 0
    moved = np.asarray(ends != path)
    np.testing.assert_array_equal(moved, info.is_updated[0])
    assert not moved[5]
    assert np.sum(moved) > 6
    _, info = _new_paths(BlockedSMC(model, 2 * ys, 8, 3), keys, paths)
    assert int(info.num_invalid[0]) == 8  # row 5 is moved in one pass


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda model, ys: BlockedSMC(model, ys, 1), "num_particles must be at least 2"),
        (lambda model, ys: BlockedSMC(model, ys, 4, 0), "block_size must be at least 1"),
        (lambda model, ys: BlockedSMC(model, ys, 4, 2.5), "block_size must be a whole number"),
        (lambda model, ys: BlockedSMC(model, ys, 4, 8, "smooth"), "refresh must be one of"),
        (lambda model, ys: BlockedSMC(model, ys, 4, proposal="optimal"), "proposal must be one of"),
        (lambda model, ys: BlockedSMC(model, ys, 4).init(jnp.zeros(50)), "51 rows of ys"),
        (lambda model, ys: BlockedSMC(Chain(), CHAIN_YS, 4, proposal="guided"), "proposal"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_by_name(make, match):
    model, ys, _ = problem("OW", 50)
    with pytest.raises(ValueError, match=match):
        make(model, ys)
