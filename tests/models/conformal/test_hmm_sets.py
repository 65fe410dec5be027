"""Sets for a hidden Markov model: exact in every class of equally likely series, and over simulated ones."""

from collections import defaultdict
from functools import partial
from itertools import pairwise, permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models.conformal import hmm_ends, hmm_observation_set, hmm_sets, hmm_state_set

LEVELS = (0.05, 0.1, 0.2, 0.5)
# (probability to stay, probability that the symbol is the state) of models with two states and two symbols
SYMMETRIC = ((0.1, 0.5), (0.3, 0.75), (0.7, 0.9), (0.9, 0.9))
TRANSITION = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
EMISSION = jnp.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.3, 0.5], [0.1, 0.6, 0.2, 0.1]])


def symmetric(stay, right):
    return tuple(jnp.array([[p, 1 - p], [1 - p, p]]) for p in (stay, right))


def simulate(key, transition, emission, length):
    key_first, key_states, key_symbols = jax.random.split(key, 3)

    def step(x, key_step):
        following = jax.random.categorical(key_step, jnp.log(transition[x]))
        return following, x

    first = jax.random.randint(key_first, (), 0, len(transition))
    states = jax.lax.scan(step, first, jax.random.split(key_states, length))[1]
    return states, jax.random.categorical(key_symbols, jnp.log(emission[states]))


@partial(jax.jit, static_argnames=("length", "horizon", "judge", "num_runs"))
def p_values(transition, emission, *, length, horizon, judge, num_runs=20_000):
    """Of the true states of independent series, and the shares of candidates kept at alpha = 0.2."""

    def run(key):
        key_series, key_ties = jax.random.split(key)
        x, y = simulate(key_series, transition, emission, length + horizon)
        found = judge(x[:length], y[:length], y[length:], key_ties)
        truth = jnp.ravel_multi_index(tuple(x[length:]), (len(transition),) * horizon, mode="clip")
        return found.p[truth], found.mask.mean()

    return jax.vmap(run)(jax.random.split(jax.random.key(1), num_runs))


def assert_uniform(p):
    p = np.asarray(p, float)
    assert scipy.stats.kstest(p, "uniform").pvalue > FALSE_ALARM
    for alpha in LEVELS:
        assert scipy.stats.binomtest(int(np.sum(p > alpha)), len(p), 1 - alpha).pvalue > FALSE_ALARM


# every series of two states and two symbols, N long: those of one class are equally likely under every model


def all_series(length):
    series = np.array(list(product(range(2), repeat=2 * length)), np.int32)
    return series[:, :length], series[:, length:]


def truth_p_values(xs, ys, horizon, **options):
    def p_value(x, y):
        found = hmm_state_set(x[:-horizon], y[:-horizon], y[-horizon:], 2, 2, 0.2, **options)
        return found.p[jnp.ravel_multi_index(tuple(x[-horizon:]), (2,) * horizon, mode="clip")]

    return np.asarray(jax.jit(jax.vmap(p_value))(xs, ys))


def exactness_error(p, keys):
    """The largest |P(p <= p_i) - p_i| over series i, P uniform on the class of i."""
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    error = 0.0
    for group in groups.values():
        values = p[group]
        error = max(error, np.max(np.abs(np.mean(values[None] <= values[:, None] + 1e-5, axis=1) - values)))
    return error


def type_of(x, y):
    counts, emitted = np.zeros((2, 2), int), np.zeros((2, 2), int)
    np.add.at(counts, (x[:-1], x[1:]), 1)
    np.add.at(emitted, (x, y), 1)
    return x[0], counts.tobytes(), emitted.tobytes()


@pytest.mark.parametrize("score", ["filter", "smooth", "joint"])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_the_p_value_of_the_truth_is_exact_in_every_class(score, horizon):
    xs, ys = all_series(6)
    p = truth_p_values(xs, ys, horizon, score=score)
    assert exactness_error(p, map(type_of, xs, ys)) < 1e-5
    assert len(np.unique(p.round(3))) > 10


def test_observations_drawn_with_replacement_are_found_out(monkeypatch):
    xs, ys = all_series(5)
    keys = list(map(type_of, xs, ys))
    assert exactness_error(truth_p_values(xs, ys, 2), keys) < 1e-5

    def careless(counts, emitted, last, horizon):
        law = jnp.exp(hmm_ends.tail_law(counts, last, horizon)[1]).reshape((2,) * horizon + (1,) * horizon)
        share = emitted / jnp.maximum(emitted.sum(1, keepdims=True), 1)
        for k in range(1, horizon + 1):
            law = law * hmm_ends.spread(share, (k, horizon + k), horizon, last)
        return law

    jax.clear_caches()
    monkeypatch.setattr(hmm_sets, "law_of_ends", careless)
    assert exactness_error(truth_p_values(xs, ys, 2), keys) > 0.01
    jax.clear_caches()


def test_the_p_value_by_blocks_is_exact_in_every_class():
    xs, ys = all_series(6)

    def blocks_of(x, y):
        pairs = 2 * x + y
        visits = np.flatnonzero(pairs == pairs[-1])
        return tuple(pairs[: visits[0] + 1]), tuple(sorted(map(tuple, np.split(pairs, visits + 1)[1:-1])))

    p = truth_p_values(xs, ys, 1, group="block")
    assert exactness_error(p, map(blocks_of, xs, ys)) < 1e-5
    assert len(np.unique(p.round(3))) > 3


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_drawn_blocks_end_as_all_their_orders_do(horizon):
    """The ends of a rearrangement, by enumeration of the orders of the blocks."""
    x = jnp.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    y = jnp.array([0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    pairs = np.asarray(2 * x + y)
    visits = np.flatnonzero(pairs == pairs[-1])
    stretch, *blocks, _ = np.split(pairs, visits + 1)
    expected = defaultdict(float)
    orders = list(permutations(blocks))
    for order in orders:
        expected[tuple(np.concatenate([stretch, *order])[-horizon - 1 :])] += 1 / len(orders)
    draws = jax.jit(jax.vmap(partial(hmm_ends.draw_blocks, x, y, horizon)))(jax.random.split(jax.random.key(0), 20_000))
    seen = defaultdict(int)
    for draw in np.asarray(draws):
        following = tuple(2 * draw[1 : horizon + 1] + draw[horizon + 1 :])
        seen[(int(draw[0]), *map(int, following))] += 1
    merged = defaultdict(float)
    for end, probability in expected.items():
        merged[(int(end[0]) // 2, *map(int, end[1:]))] += probability
    assert set(seen) == set(merged)
    tests = [scipy.stats.binomtest(seen[end], 20_000, min(share, 1.0)).pvalue for end, share in merged.items()]
    assert min(tests) > FALSE_ALARM


@pytest.mark.parametrize(("num_states", "horizon"), [pytest.param(2, 3, marks=pytest.mark.slow), (3, 2)])
def test_drawn_ends_have_the_law_that_is_enumerated(num_states, horizon):
    x, y = simulate(jax.random.key(2), TRANSITION[:num_states, :num_states], EMISSION[:num_states], 12)
    counts = hmm_sets.transition_counts(x, num_states)
    emitted = jax.nn.one_hot(x, num_states).T @ jax.nn.one_hot(y, 4)
    law = np.asarray(hmm_ends.law_of_ends(counts, emitted, x[-1], horizon), float)
    assert law.sum() == pytest.approx(1.0, abs=1e-5)
    draw = jax.jit(jax.vmap(partial(hmm_ends.draw_end, counts, emitted, x[-1], horizon)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(3), 20_000)))
    assert np.all(draws[:, horizon] == x[-1])
    seen = np.zeros(law.shape)
    np.add.at(seen, tuple(np.delete(draws, horizon, axis=1).T), 1)
    assert np.all(seen[law == 0] == 0)
    tests = [
        scipy.stats.binomtest(int(n), 20_000, min(p, 1.0)).pvalue
        for n, p in zip(seen[law > 0], law[law > 0], strict=True)
    ]
    assert min(tests) > FALSE_ALARM


def sets(horizon, num_states, num_symbols, is_smoothed=True, **options):
    def judge(x, y, y_new, key):
        key = key if is_smoothed else None
        return hmm_state_set(x, y, y_new, num_states, num_symbols, 0.2, key=key, **options)

    return judge


@pytest.mark.parametrize(
    "horizon", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_coverage_is_what_was_asked_for(horizon):
    judge, careful = sets(horizon, 2, 2), sets(horizon, 2, 2, is_smoothed=False)
    for stay, right in SYMMETRIC:
        assert_uniform(p_values(*symmetric(stay, right), length=50, horizon=horizon, judge=judge)[0])
    p = np.asarray(p_values(*symmetric(0.9, 0.9), length=50, horizon=horizon, judge=careful, num_runs=5_000)[0], float)
    for alpha in LEVELS:
        num_covered = int(np.sum(p > alpha))
        assert scipy.stats.binomtest(num_covered, len(p), 1 - alpha, alternative="less").pvalue > FALSE_ALARM


def test_coverage_with_three_states_and_four_symbols():
    p, size = p_values(TRANSITION, EMISSION, length=200, horizon=1, judge=sets(1, 3, 4))
    assert_uniform(p)
    assert np.mean(size) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("score", ["filter", "smooth", "joint"])
@pytest.mark.parametrize("horizon", [2, 3])
def test_coverage_with_three_states_and_longer_horizons(score, horizon):
    judge = sets(horizon, 3, 2, score=score)
    assert_uniform(p_values(TRANSITION, EMISSION[:, :2], length=100, horizon=horizon, judge=judge)[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"group": "block"}, {"group": "type"}])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_coverage_with_drawn_ends(options, horizon):
    judge = sets(horizon, 2, 2, num_draws=49, **options)
    assert_uniform(p_values(*symmetric(0.3, 0.75), length=50, horizon=horizon, judge=judge, num_runs=5_000)[0])


def cut_where_blocks_begin(x, y, y_new, key):
    """The cut of the reference's code, for one step: a rearranged series ends before a visit of the anchor."""

    def judge(candidate):
        xs, ys = jnp.append(x, candidate), jnp.append(y, y_new)
        transition = hmm_sets.add_constant(hmm_sets.transition_counts(xs, 2))
        emission = hmm_sets.add_constant(jax.nn.one_hot(xs, 2).T @ jax.nn.one_hot(ys, 2))
        score = 1 - hmm_ends.normalized(transition[:, None, :] * emission.T)
        is_visit = (xs == xs[-1]) & (ys == ys[-1])
        is_end = jnp.roll(is_visit, -1).at[-1].set(False) & (jnp.cumsum(is_visit) > 0)
        previous = jnp.concatenate([xs[:1], xs[:-1]])
        scores = score[previous, ys, xs]
        is_above = scores >= score[xs[-2], ys[-1], xs[-1]]
        return jnp.where(is_end.any(), jnp.sum(is_above & is_end) / jnp.maximum(is_end.sum(), 1), 1.0)

    p = jax.vmap(judge)(jnp.arange(2))
    return hmm_sets.StateSet(p, p > 0.2, jnp.arange(2)[:, None], hmm_sets.Guarantee("long-run", "nothing", "nothing"))


def test_blocks_that_begin_at_the_anchor_are_found_out():
    model = symmetric(0.1, 0.5)
    p, _ = p_values(*model, length=50, horizon=1, judge=cut_where_blocks_begin)
    num_covered = int(np.sum(np.asarray(p) > 0.2))
    assert scipy.stats.binomtest(num_covered, len(p), 0.7, alternative="less").pvalue < FALSE_ALARM
    right, _ = p_values(*model, length=50, horizon=1, judge=sets(1, 2, 2, group="block"), num_runs=4_000)
    assert_uniform(right)


@pytest.mark.parametrize("horizon", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sets_of_observations_cover(horizon):
    alpha, num_runs = 0.2, 4_000 if horizon == 1 else 1_000

    @partial(jax.jit, static_argnums=1)
    def covers(keys, score):
        def run(key):
            key_series, key_ties = jax.random.split(key)
            x, y = simulate(key_series, *symmetric(0.9, 0.9), 60 + horizon)
            found = hmm_observation_set(x[:60], y[:60], 2, 2, alpha, horizon=horizon, score=score, key=key_ties)
            index = jnp.ravel_multi_index(tuple(y[60:]), (2,) * horizon, mode="clip")
            return found.mask[index], found.mask.mean()

        return jax.vmap(run)(keys)

    for score in ("predictive", "joint"):
        is_covered, size = covers(jax.random.split(jax.random.key(4), num_runs), score)
        test = scipy.stats.binomtest(int(is_covered.sum()), num_runs, 1 - alpha, alternative="less")
        assert test.pvalue > FALSE_ALARM
        assert np.mean(size) < 0.9


@pytest.mark.parametrize("score", ["predictive", "joint"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_the_p_value_of_the_pair_is_exact_in_every_class(score, horizon):
    """A set of observations is one of pairs with the states left out: its p-value is the largest over the states."""
    xs, ys = all_series(5)
    score = {"joint": "pair"}.get(score, score)

    def p_values_of(x, y):
        heads = jnp.asarray(hmm_sets.sequences(2, horizon))
        options = {"key": None, "sizes": (2, 2), "score": score, "group": "type", "num_draws": None}
        p = hmm_sets._p_values(x[:-horizon], y[:-horizon], heads, y[-horizon:], **options)
        found = hmm_observation_set(
            x[:-horizon], y[:-horizon], 2, 2, 0.2, horizon=horizon, score="joint" if score == "pair" else score
        )
        index = [jnp.ravel_multi_index(tuple(z[-horizon:]), (2,) * horizon, mode="clip") for z in (x, y)]
        return p[index[0]], p.max() - found.p[index[1]]

    p, difference = jax.jit(jax.vmap(p_values_of))(xs, ys)
    assert exactness_error(np.asarray(p), map(type_of, xs, ys)) < 1e-5
    assert np.abs(difference).max() < 1e-5


def test_sets_are_nested_in_alpha_and_allow_all():
    x, y = simulate(jax.random.key(5), TRANSITION, EMISSION, 40)
    found = [hmm_state_set(x, y, y[:2], 3, 4, alpha, key=7) for alpha in (0.01, 0.2, 0.9)]
    assert found[0].candidates.shape == (9, 2)
    for wide, narrow in pairwise(found):
        assert np.all(wide.mask | ~narrow.mask)
        np.testing.assert_array_equal(wide.p, narrow.p)
    one = hmm_state_set(x[:1], y[:1], y[:1], 3, 4, 0.2)  # a series of one step says nothing
    assert np.all(one.mask)
    assert np.all(one.p == 1)


@pytest.mark.usefixtures("unchecked")
def test_bad_series_are_named():
    x = jnp.array([0, 1, 1, 0])
    with pytest.raises(ValueError, match="states and obs must be of one length, at least 1"):
        hmm_state_set(x, x[:2], x[:1], 2, 2, 0.1)
    with pytest.raises(ValueError, match=r"obs must lie in 0\.\.1, got \[1 2 2 1\]"):
        hmm_state_set(x, x + 1, x[:1], 2, 2, 0.1)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\), got 1.5"):
        hmm_state_set(x, x, x[:1], 2, 2, 1.5)
    with pytest.raises(ValueError, match="score must be one of 'joint', 'filter', 'smooth', got 'best'"):
        hmm_state_set(x, x, x[:1], 2, 2, 0.1, score="best")
    with pytest.raises(ValueError, match="key must be given where the ends of the series are drawn"):
        hmm_state_set(x, x, x[:2], 2, 2, 0.1, group="block")
    with pytest.raises(ValueError, match="score must be one of 'predictive', 'joint', got 'filter'"):
        hmm_observation_set(x, x, 2, 2, 0.1, score="filter")
