"""Hidden semi-Markov chains against the enumeration of all their stays, and against ordinary hidden Markov chains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import (
    hmm_filter,
    hmm_smoother,
    hmm_viterbi,
    hsmm_filter,
    hsmm_sample,
    hsmm_smoother,
    hsmm_viterbi,
)

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

# rounding of what is compared: a few operations on numbers of size ten
CLOSE = 400 * float(jnp.finfo(jnp.result_type(float)).eps)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=CLOSE, atol=CLOSE)


def chain_of(seed, num_steps, num_states, num_durations, *, is_self=False):
    """(log_init, log_trans, log_duration, log_lik) at random, without symmetry; with stays that follow each other."""
    rng = np.random.default_rng(seed)
    trans = rng.dirichlet(np.full(num_states, 0.7), num_states)
    if not is_self and num_states > 1:
        trans *= 1 - np.eye(num_states)
        trans /= trans.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_trans = np.log(trans)
    log_init = np.log(rng.dirichlet(np.full(num_states, 0.7)))
    log_duration = np.log(rng.dirichlet(np.full(num_durations, 0.7), num_states))
    return log_init, log_trans, log_duration, rng.normal(-1.0, 2.0, (num_steps, num_states))


class Enumerated(NamedTuple):
    log_evidence: float
    smoothed: np.ndarray
    starts: np.ndarray
    transitions: np.ndarray
    durations: np.ndarray
    best: tuple  # log joint, path and starts, of the most probable stays as far as they are seen
    laws: dict  # of (path, starts)


def enumerate_stays(log_init, log_trans, log_duration, log_lik) -> Enumerated:
    """By the definition: lists of (state, duration) whose last goes on to the end, or after it."""
    num_steps, num_states = log_lik.shape
    num_durations = log_duration.shape[1]
    found = []

    def extend(stays, t, log_p):
        if t >= num_steps:
            found.append((stays, log_p))
            return
        for k in range(num_states):
            log_move = log_init[k] if not stays else log_trans[stays[-1][0], k]
            for d in range(1, num_durations + 1):
                seen = log_lik[t : t + d, k].sum()
                extend([*stays, (k, d)], t + d, log_p + log_move + log_duration[k, d - 1] + seen)

    extend([], 0, 0.0)
    log_joint = np.array([log_p for _, log_p in found])
    log_evidence = np.logaddexp.reduce(log_joint)
    smoothed, starts = np.zeros((num_steps, num_states)), np.zeros((num_steps, num_states))
    transitions, durations = np.zeros((num_states, num_states)), np.zeros((num_states, num_durations))
    laws: dict = {}
    for stays, log_p in found:
        p, t, path, marks = np.exp(log_p - log_evidence), 0, [], []
        for i, (k, d) in enumerate(stays):
            smoothed[t : t + d, k] += p
            starts[t, k] += p
            durations[k, d - 1] += p
            if i:
                transitions[stays[i - 1][0], k] += p
            path += [k] * d
            marks += [True] + [False] * (d - 1)
            t += d
        seen = tuple(path[:num_steps]), tuple(marks[:num_steps])
        laws[seen] = np.logaddexp(laws.get(seen, -np.inf), log_p)
    (path, marks), log_best = max(laws.items(), key=lambda item: item[1])
    laws = {seen: np.exp(log_p - log_evidence) for seen, log_p in laws.items()}
    return Enumerated(log_evidence, smoothed, starts, transitions, durations, (log_best, path, marks), laws)


CHAINS = [
    pytest.param(chain_of(0, 6, 2, 3), id="two states"),
    pytest.param(chain_of(1, 5, 3, 2), id="three states"),
    pytest.param(chain_of(2, 5, 2, 7), id="durations beyond the series"),
    pytest.param(chain_of(3, 6, 2, 3, is_self=True), id="stays after stays in one state"),
    pytest.param(chain_of(4, 5, 3, 1), id="durations of one"),
    pytest.param(chain_of(5, 1, 2, 3), id="one step"),
    pytest.param(chain_of(6, 5, 1, 2), id="one state"),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_filter_and_smoother_are_the_laws_of_all_stays(chain):
    exact = enumerate_stays(*chain)
    filtered, smoothed = hsmm_filter(*chain), hsmm_smoother(*chain)
    close(filtered.log_evidence, exact.log_evidence)
    close(filtered.log_evidence_increments.sum(), exact.log_evidence)
    close(smoothed.log_evidence, exact.log_evidence)
    close(jnp.exp(smoothed.log_smoothed), exact.smoothed)
    close(jnp.exp(smoothed.log_starts), exact.starts)
    close(smoothed.expected_transitions, exact.transitions)
    close(smoothed.expected_durations, exact.durations)
    for t in range(len(chain[3])):  # each prefix is a series of its own
        close(jnp.exp(filtered.log_filtered[t]), enumerate_stays(*chain[:3], chain[3][: t + 1]).smoothed[-1])
        unseen = np.r_[chain[3][:t], np.zeros((1, len(chain[0])))]
        close(jnp.exp(filtered.log_predicted[t]), enumerate_stays(*chain[:3], unseen).smoothed[-1])


@pytest.mark.parametrize("chain", CHAINS)
def test_viterbi_is_the_best_of_all_stays(chain):
    log_best, path, marks = enumerate_stays(*chain).best
    best = hsmm_viterbi(*chain)
    close(best.log_joint, log_best)
    assert tuple(best.path.tolist()) == path
    assert tuple(best.is_start.tolist()) == marks


def test_the_last_stay_counts_with_all_durations_it_may_have():
    """The most probable stays with a duration for the last are others: it would have to choose one."""
    log_init, log_trans = np.log([0.5, 0.5]), np.array([[-np.inf, 0.0], [0.0, -np.inf]])
    with np.errstate(divide="ignore"):
        log_duration = np.log(np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.2, 0.2, 0.2, 0.2]]))
    log_lik = np.log(np.array([[0.4, 0.6], [0.4, 0.6]]))
    chain = log_init, log_trans, log_duration, log_lik
    exact = enumerate_stays(*chain)
    best = hsmm_viterbi(*chain)
    assert best.path.tolist() == list(exact.best[1]) == [1, 1]
    close(best.log_joint, np.log(0.5 * 0.36))


@pytest.mark.parametrize("chain", CHAINS[:4])
def test_sampled_paths_follow_the_law_of_all_stays(chain):
    laws = enumerate_stays(*chain).laws
    num = 20_000
    drawn = hsmm_sample(3, *chain, num)
    counts = dict.fromkeys(laws, 0)
    for path, marks in zip(np.asarray(drawn.path).tolist(), np.asarray(drawn.is_start).tolist(), strict=True):
        counts[tuple(path), tuple(marks)] += 1
    expected = num * np.array(list(laws.values()))
    observed = np.array(list(counts.values()))
    is_rare = expected < 5
    observed = np.r_[observed[~is_rare], observed[is_rare].sum()]
    expected = np.r_[expected[~is_rare], expected[is_rare].sum()]
    assert scipy.stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > FALSE_ALARM


def expanded(log_init, log_trans, log_duration, log_lik):
    """The chain of states and remaining durations, as an ordinary one of K D states."""
    num_states, num_durations = log_duration.shape
    trans = np.full((num_states, num_durations, num_states, num_durations), -np.inf)
    for k in range(num_states):
        for r in range(1, num_durations):
            trans[k, r, k, r - 1] = 0.0
        trans[k, 0] = log_trans[k][:, None] + log_duration
    size = num_states * num_durations
    start = (log_init[:, None] + log_duration).reshape(size)
    return start, trans.reshape(size, size), np.repeat(log_lik, num_durations, axis=1)


def test_it_is_the_ordinary_chain_of_states_and_remaining_durations():
    chain = chain_of(7, 60, 3, 5)
    ordinary = expanded(*chain)
    smoothed, wide = hsmm_smoother(*chain), hmm_smoother(*ordinary)
    close(smoothed.log_evidence, wide.log_evidence)
    close(jnp.exp(smoothed.log_smoothed), np.exp(wide.log_smoothed).reshape(60, 3, 5).sum(2))
    filtered, wide_filtered = hsmm_filter(*chain), hmm_filter(*ordinary)
    close(jnp.exp(filtered.log_filtered), np.exp(wide_filtered.log_filtered).reshape(60, 3, 5).sum(2))
    ended = np.asarray(wide.expected_transitions).reshape(3, 5, 3, 5)[:, 0]
    np.testing.assert_allclose(smoothed.expected_transitions, ended.sum(2), rtol=100 * CLOSE, atol=CLOSE)
    # where the duration of the last stay is known as well, the two best paths are of one probability
    log_lik = chain[3].copy()
    log_lik[-1, 1:] = -np.inf
    log_duration = np.where(np.arange(5) < 1, 0.0, -np.inf) * np.ones((3, 1))
    log_duration[1:] = chain[2][1:]
    certain = chain[0], chain[1], log_duration, log_lik
    close(hsmm_viterbi(*certain).log_joint, hmm_viterbi(*expanded(*certain)).log_joint)


def test_geometric_durations_are_those_of_an_ordinary_chain():
    """Stays of up to 60 steps leave out a ten thousandth of a ten thousandth of the shorter-lived state's."""
    stay, num_steps = np.array([0.6, 0.8]), 20
    times = np.arange(1, 61)
    log_duration = np.log(1 - stay)[:, None] + (times - 1) * np.log(stay)[:, None]
    log_duration -= np.logaddexp.reduce(log_duration, axis=1, keepdims=True)
    log_trans = np.array([[-np.inf, 0.0], [0.0, -np.inf]])
    log_lik = np.random.default_rng(0).normal(-1.0, 1.0, (num_steps, 2))
    ordinary = np.log([0.3, 0.7]), np.log([[0.6, 0.4], [0.2, 0.8]]), log_lik
    semi = np.log([0.3, 0.7]), log_trans, log_duration, log_lik
    slack = 10 * 0.8**60  # of the durations left out
    smoothed, expected = hsmm_smoother(*semi), hmm_smoother(*ordinary)
    assert abs(float(smoothed.log_evidence - expected.log_evidence)) < max(slack, CLOSE * 10)
    moves = np.asarray(expected.expected_transitions) * (1 - np.eye(2))
    np.testing.assert_allclose(smoothed.expected_transitions, moves, atol=max(10 * slack, CLOSE), rtol=CLOSE)
    assert hsmm_viterbi(*semi).path.tolist() == hmm_viterbi(*ordinary).path.tolist()


def test_missing_rows_are_integrated_out():
    log_init, log_trans, log_duration, log_lik = chain_of(8, 6, 2, 3)
    mask = np.array([True, False, False, True, True, False])
    hidden = np.where(mask[:, None], log_lik, np.nan)
    exact = enumerate_stays(log_init, log_trans, log_duration, np.where(mask[:, None], log_lik, 0.0))
    smoothed = hsmm_smoother(log_init, log_trans, log_duration, hidden, mask=mask)
    close(smoothed.log_evidence, exact.log_evidence)
    close(jnp.exp(smoothed.log_smoothed), exact.smoothed)
    close(smoothed.expected_durations, exact.durations)


def test_a_ragged_batch_is_a_loop_over_its_series():
    parts = chain_of(9, 7, 3, 4)[:3]
    lengths = np.array([7, 1, 4])
    log_lik = np.random.default_rng(9).normal(-1.0, 2.0, (3, 7, 3))
    padded = np.where((np.arange(7) < lengths[:, None])[..., None], log_lik, np.nan)
    filtered = hsmm_filter(*parts, padded, lengths=lengths)
    smoothed = hsmm_smoother(*parts, padded, lengths=lengths)
    best = hsmm_viterbi(*parts, padded, lengths=lengths)
    drawn = hsmm_sample(0, *parts, padded, 5, lengths=lengths)
    for b, n in enumerate(lengths):
        short = *parts, log_lik[b, :n]
        one = hsmm_smoother(*short)
        close(filtered.log_evidence[b], one.log_evidence)
        close(filtered.log_filtered[b, :n], hsmm_filter(*short).log_filtered)
        close(jnp.exp(smoothed.log_smoothed[b, :n]), jnp.exp(one.log_smoothed))
        close(jnp.exp(smoothed.log_starts[b, :n]), jnp.exp(one.log_starts))
        assert bool(jnp.all(smoothed.log_starts[b, n:] == -jnp.inf))
        close(smoothed.expected_transitions[b], one.expected_transitions)
        close(smoothed.expected_durations[b], one.expected_durations)
        alone = hsmm_viterbi(*short)
        close(best.log_joint[b], alone.log_joint)
        assert best.path[b].tolist() == alone.path.tolist() + [-1] * (7 - n)
        assert best.is_start[b].tolist() == alone.is_start.tolist() + [False] * (7 - n)
        assert np.all((np.asarray(drawn.path[b]) >= 0) == (np.arange(7) < n))
        assert not np.any(np.asarray(drawn.is_start[b])[:, n:])


def test_impossible_data_are_exactly_impossible():
    log_init, log_trans, log_duration, log_lik = chain_of(10, 5, 2, 3)
    log_lik[3] = -np.inf
    chain = log_init, log_trans, log_duration, log_lik
    filtered = hsmm_filter(*chain)
    assert filtered.log_evidence == -jnp.inf
    close(filtered.log_filtered[:3], hsmm_filter(*chain[:3], log_lik[:3]).log_filtered)
    assert bool(jnp.all(filtered.log_filtered[3:] == -jnp.inf))
    smoothed = hsmm_smoother(*chain)
    assert bool(jnp.all(smoothed.log_smoothed == -jnp.inf) & jnp.all(smoothed.log_starts == -jnp.inf))
    assert bool(jnp.all(smoothed.expected_transitions == 0.0) & jnp.all(smoothed.expected_durations == 0.0))
    best = hsmm_viterbi(*chain)
    assert best.log_joint == -jnp.inf
    assert bool(jnp.all(best.path == -1) & ~jnp.any(best.is_start))
    assert bool(jnp.all(hsmm_sample(0, *chain, 3).path == -1))
    arrays = tuple(jnp.asarray(x, float) for x in chain)
    for i in range(4):
        gradient = jax.grad(lambda x, i=i: hsmm_filter(*arrays[:i], x, *arrays[i + 1 :]).log_evidence)(arrays[i])
        assert bool(jnp.all(jnp.isfinite(gradient)))


def test_impossible_by_durations_alone():
    """Both states last three steps; what speaks for a change after one cannot be."""
    with np.errstate(divide="ignore"):
        log_duration = np.log(np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        log_lik = np.log(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    log_trans = np.array([[-np.inf, 0.0], [0.0, -np.inf]])
    assert hsmm_filter(np.log([0.5, 0.5]), log_trans, log_duration, log_lik).log_evidence == -jnp.inf
    assert hsmm_viterbi(np.log([0.5, 0.5]), log_trans, log_duration, log_lik).log_joint == -jnp.inf


def test_what_is_far_below_the_smallest_number_is_not_lost():
    """An outlier speaks for the other state by more than a number holds, and the durations forbid it."""
    with np.errstate(divide="ignore"):
        log_duration = np.log(np.array([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]))
    log_trans = np.array([[-np.inf, 0.0], [0.0, -np.inf]])
    log_lik = np.zeros((8, 2))
    log_lik[1] = [-5000.0, 0.0]  # the first stay would be of the second state,
    log_lik[2] = [0.0, -9000.0]  # and it is not
    smoothed = hsmm_smoother(np.log([0.5, 0.5]), log_trans, log_duration, log_lik)
    assert abs(float(smoothed.log_evidence) / (-5000.0 + np.log(0.5)) - 1) < 1e-6
    close(jnp.exp(smoothed.log_smoothed[:, 0]), [1.0] * 4 + [0.0] * 4)


@pytest.mark.parametrize("chain", [CHAINS[0], CHAINS[2], CHAINS[3]])
def test_the_gradient_is_the_expected_statistics(chain):
    exact = enumerate_stays(*chain)
    arrays = tuple(jnp.asarray(x, float) for x in chain)
    gradients = jax.jit(jax.grad(lambda *x: hsmm_filter(*x).log_evidence, argnums=(0, 1, 2, 3)))(*arrays)
    for found, expected in zip(
        gradients, (exact.starts[0], exact.transitions, exact.durations, exact.smoothed), strict=True
    ):
        close(found, expected)
    direction = jnp.ones_like(arrays[3])
    _, along = jax.jvp(lambda x: hsmm_filter(*arrays[:3], x).log_evidence, (arrays[3],), (direction,))
    close(along, len(chain[3]))


def test_float32_does_not_drift():
    chain = chain_of(12, 1, 3, 6)[:3]
    log_lik = np.random.default_rng(0).normal(-2.0, 1.5, (30_000, 3)).astype(np.float32)
    single = hsmm_smoother(*(x.astype(np.float32) for x in chain), log_lik)
    with jax.enable_x64(True):
        double = hsmm_smoother(*(jnp.asarray(x, jnp.float64) for x in (*chain, log_lik)))
    assert abs(float(single.log_evidence) / float(double.log_evidence) - 1) < 1e-6
    np.testing.assert_allclose(jnp.exp(single.log_smoothed), np.exp(double.log_smoothed), atol=1e-4)
    np.testing.assert_allclose(single.expected_durations, double.expected_durations, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_trans": np.zeros((3, 2, 2))}, r"log_trans must have shape \(K, K\), the same at all times"),
        ({"log_duration": np.zeros((3, 2))}, r"log_duration must have shape \(2, D\).*got \(3, 2\)"),
        ({"log_duration": np.full((2, 2), 0.5)}, "log_duration.*these are probabilities: pass their logarithms"),
        ({"log_lik": np.full((4, 2), np.nan)}, "log_lik.*steps.*mask"),
        ({"lengths": np.array(9)}, "lengths must lie between 1 and T = 4"),
    ],
)
def test_bad_input_is_named(unchecked, change, message):
    good = {
        "log_init": np.log([0.5, 0.5]),
        "log_trans": np.log(np.full((2, 2), 0.5)),
        "log_duration": np.log(np.full((2, 2), 0.5)),
        "log_lik": np.zeros((4, 2)),
    }
    with pytest.raises(ValueError, match=message):
        hsmm_filter(**(good | change))
