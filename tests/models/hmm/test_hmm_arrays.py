"""Exact inference in hidden chains against the enumeration of all paths, and where others lose probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chains import asymmetric, enumerate_paths

from bayesinf.conformance import FALSE_ALARM
from bayesinf.datasets import wti_crude_oil
from bayesinf.models import (
    hmm_filter,
    hmm_fixed_lag,
    hmm_forecast,
    hmm_sample,
    hmm_smoother,
    hmm_start,
    hmm_step,
    hmm_viterbi,
)

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

# rounding of what is compared: a few operations on numbers of size ten
CLOSE = 400 * float(jnp.finfo(jnp.result_type(float)).eps)
METHODS = ["scan", "blocked", "associative"]
CHAINS = [
    pytest.param(asymmetric(0, 6, 3), id="homogeneous"),
    pytest.param(asymmetric(1, 6, 3, is_varying=True), id="time-varying"),
    pytest.param(asymmetric(2, 1, 2), id="one step"),
    pytest.param(asymmetric(3, 8, 2, is_varying=True), id="two states"),
]


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chain", CHAINS)
def test_filter_and_smoother_are_the_laws_of_all_paths(chain, method):
    exact = enumerate_paths(*chain)
    filtered = hmm_filter(*chain, method=method)
    smoothed = hmm_smoother(*chain, method=method)
    close(filtered.log_evidence, exact.log_evidence)
    close(filtered.log_evidence_increments.sum(), exact.log_evidence)
    close(smoothed.log_evidence, exact.log_evidence)
    close(jnp.exp(smoothed.log_smoothed), exact.smoothed)
    is_varying = chain[1].ndim == 3
    close(smoothed.expected_transitions, exact.pairs if is_varying else exact.pairs.sum(0))
    for t in range(len(chain[2])):  # each prefix is a series of its own
        log_trans = chain[1][:t] if is_varying else chain[1]
        prefix = enumerate_paths(chain[0], log_trans, chain[2][: t + 1])
        close(jnp.exp(filtered.log_filtered[t]), prefix.smoothed[-1])
        unseen = enumerate_paths(chain[0], log_trans, np.r_[chain[2][:t], np.zeros((1, len(chain[0])))])
        close(jnp.exp(filtered.log_predicted[t]), unseen.smoothed[-1])


@pytest.mark.parametrize("lag", [0, 1, 3, 10])
@pytest.mark.parametrize("chain", CHAINS)
def test_fixed_lag_is_the_smoother_of_a_prefix(chain, lag):
    lagged = hmm_fixed_lag(*chain, lag)
    for t in range(len(chain[2])):
        end = min(t + lag, len(chain[2]) - 1)
        log_trans = chain[1][:end] if chain[1].ndim == 3 else chain[1]
        close(jnp.exp(lagged[t]), enumerate_paths(chain[0], log_trans, chain[2][: end + 1]).smoothed[t])


@pytest.mark.parametrize("chain", CHAINS)
def test_viterbi_is_the_best_of_all_paths(chain):
    exact = enumerate_paths(*chain)
    best = hmm_viterbi(*chain)
    close(best.log_joint, exact.log_joint.max())
    assert best.path.tolist() == exact.paths[exact.log_joint.argmax()].tolist()


@pytest.mark.parametrize("chain", CHAINS)
def test_sampled_paths_follow_the_law_of_all_paths(chain):
    exact = enumerate_paths(*chain)
    num = 20_000
    paths = np.asarray(hmm_sample(7, *chain, num))
    index = np.zeros(num, int)
    for t in range(paths.shape[1]):
        index = index * len(chain[0]) + paths[:, t]
    expected = num * np.exp(exact.log_joint - exact.log_evidence)
    counts = np.bincount(index, minlength=len(expected))
    is_rare = expected < 5
    counts = np.r_[counts[~is_rare], counts[is_rare].sum()]
    expected = np.r_[expected[~is_rare], expected[is_rare].sum()]
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > FALSE_ALARM


def test_forecast_is_the_filter_of_a_series_that_goes_on_unseen():
    log_init, log_trans, log_lik = asymmetric(4, 5, 3)
    filtered = hmm_filter(log_init, log_trans, np.r_[log_lik, np.zeros((3, 3))])
    forecast = hmm_forecast(filtered.log_filtered[4], log_trans, 3)
    close(jnp.exp(forecast), jnp.exp(filtered.log_filtered[5:]))
    every = hmm_forecast(filtered.log_filtered, np.broadcast_to(log_trans, (3, 3, 3)), 3)
    close(jnp.exp(every[4]), jnp.exp(forecast))


def test_a_stream_ends_where_the_filter_does():
    log_init, log_trans, log_lik = (jnp.asarray(x, float) for x in asymmetric(5, 40, 3))
    filtered = hmm_filter(log_init, log_trans, log_lik)
    belief = hmm_start(log_init, log_lik[0])
    belief, beliefs = jax.lax.scan(lambda b, row: (hmm_step(b, row, log_trans),) * 2, belief, log_lik[1:])
    close(beliefs.log_filtered, filtered.log_filtered[1:])
    close(beliefs.log_evidence_increment, filtered.log_evidence_increments[1:])
    close(belief.log_evidence, filtered.log_evidence)


def test_a_long_stream_in_float32_loses_no_evidence():
    log_trans = jnp.log(jnp.full((2, 2), 0.5, jnp.float32))
    log_lik = jnp.full(2, -0.1, jnp.float32)
    belief = hmm_start(log_trans[0], log_lik)
    belief, _ = jax.lax.scan(lambda b, _: (hmm_step(b, log_lik, log_trans), None), belief, length=99_999)
    naive, _ = jax.lax.scan(lambda total, _: (total + log_lik[0], None), log_lik[0], length=99_999)
    truth = float(log_lik[0]) * 100_000
    assert abs(float(belief.log_evidence) / truth - 1) < 1e-6 < abs(float(naive) / truth - 1)


@pytest.mark.parametrize("method", METHODS)
def test_missing_rows_are_integrated_out(method):
    log_init, log_trans, log_lik = asymmetric(6, 6, 3)
    mask = np.array([True, False, False, True, True, False])
    hidden = np.where(mask[:, None], log_lik, np.nan)  # what is not observed is not looked at
    exact = enumerate_paths(log_init, log_trans, np.where(mask[:, None], log_lik, 0.0))
    smoothed = hmm_smoother(log_init, log_trans, hidden, mask=mask, method=method)
    close(smoothed.log_evidence, exact.log_evidence)
    close(jnp.exp(smoothed.log_smoothed), exact.smoothed)


@pytest.mark.parametrize("is_varying", [False, True])
def test_a_ragged_batch_is_a_loop_over_its_series(is_varying):
    log_init, log_trans, _ = asymmetric(8, 7, 3, is_varying=is_varying)
    rng = np.random.default_rng(8)
    lengths = np.array([7, 1, 4])
    log_lik = rng.normal(-1.0, 2.0, (3, 7, 3))
    padded = np.where((np.arange(7) < lengths[:, None])[..., None], log_lik, np.nan)
    filtered = hmm_filter(log_init, log_trans, padded, lengths=lengths)
    smoothed = hmm_smoother(log_init, log_trans, padded, lengths=lengths)
    lagged = hmm_fixed_lag(log_init, log_trans, padded, 2, lengths=lengths)
    best = hmm_viterbi(log_init, log_trans, padded, lengths=lengths)
    drawn = hmm_sample(0, log_init, log_trans, padded, 5, lengths=lengths)
    for b, n in enumerate(lengths):
        short = log_init, log_trans[: n - 1] if is_varying else log_trans, log_lik[b, :n]
        one = hmm_smoother(*short)
        close(filtered.log_evidence[b], one.log_evidence)
        close(filtered.log_filtered[b, :n], hmm_filter(*short).log_filtered)
        close(smoothed.log_smoothed[b, :n], one.log_smoothed)
        transitions = smoothed.expected_transitions[b]
        close(transitions[: n - 1] if is_varying else transitions, one.expected_transitions)
        close(smoothed.expected_transitions[b].sum(), n - 1)
        close(jnp.exp(lagged[b, :n]), jnp.exp(hmm_fixed_lag(*short, 2)))
        alone = hmm_viterbi(*short)
        close(best.log_joint[b], alone.log_joint)
        assert best.path[b].tolist() == alone.path.tolist() + [-1] * (7 - n)
        assert np.all((np.asarray(drawn[b]) >= 0) == (np.arange(7) < n))


@pytest.mark.parametrize("method", METHODS)
def test_impossible_data_are_exactly_impossible(method):
    """dynamax's sequential filter says -1.386 here, its parallel one NaN."""
    log_init, log_trans, log_lik = asymmetric(9, 5, 2)
    log_lik[3] = -np.inf
    filtered = hmm_filter(log_init, log_trans, log_lik, method=method)
    assert filtered.log_evidence == -jnp.inf
    close(filtered.log_filtered[:3], hmm_filter(log_init, log_trans, log_lik[:3]).log_filtered)
    assert bool(jnp.all(filtered.log_filtered[3:] == -jnp.inf))
    smoothed = hmm_smoother(log_init, log_trans, log_lik, method=method)
    assert bool(jnp.all(smoothed.log_smoothed == -jnp.inf))
    assert bool(jnp.all(smoothed.expected_transitions == 0.0))
    assert hmm_viterbi(log_init, log_trans, log_lik) == (-jnp.inf, pytest.approx([-1] * 5))
    assert bool(jnp.all(hmm_sample(0, log_init, log_trans, log_lik, 3, method=method) == -1))
    gradient = jax.grad(lambda x: hmm_filter(log_init, log_trans, x, method=method).log_evidence)(jnp.asarray(log_lik))
    assert bool(jnp.all(gradient == 0.0))


@pytest.mark.parametrize("method", METHODS)
def test_no_probability_is_floored(method):
    """A floor of 1e-15 makes this -34.1, as in dynamax's sequential filter."""
    with np.errstate(divide="ignore"):
        log_trans = np.log(np.array([[1.0, 1e-20], [1e-20, 1.0]]))
        log_lik = np.log(np.array([[1.0, 0.0], [0.0, 1.0]]))
    log_init = np.log([1.0, 1e-300 if jnp.result_type(float) == jnp.float64 else 1e-30])
    filtered = hmm_filter(log_init, log_trans, log_lik, method=method)
    assert abs(float(filtered.log_evidence) + 20 * np.log(10)) < 1e-4


SMALLEST = np.log(float(jnp.finfo(jnp.result_type(float)).tiny))  # -87.3, or -708.4


def lost_at_the_start():
    """Series where what underflows at first is scaled up after: large messages alone do not prove that it was kept."""
    step = float(jnp.finfo(jnp.result_type(float)).eps)
    with np.errstate(divide="ignore"):
        of_two, of_three = np.log([[0.9, 0.1], [0.1, 0.9]]), np.log(np.full((3, 3), 0.1) + 0.7 * np.eye(3))
        start = np.log([0.99, 0.01, 0.0])
    yield np.array([0.0, SMALLEST - 0.2]), of_two, np.array([[SMALLEST + 0.1, 0.0], [0.0, -3.0], [0.0, 0.0]])
    yield start, of_three, np.array([[SMALLEST - 0.1, SMALLEST + 5.4, 0.0], np.zeros(3), np.zeros(3)])
    # the message before is large too: 4 tiny / eps
    rare = SMALLEST - np.log(step) + np.log(5.0)
    with np.errstate(divide="ignore"):
        rarely = np.array([[np.log1p(-np.exp(rare)), rare + np.log(2.0)], [-np.inf, 0.0]])
    yield np.array([rare, 0.0]), rarely, np.array([[0.0, SMALLEST - 5.0], [1.5 * SMALLEST, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("method", METHODS)
def test_what_underflows_and_is_scaled_up_is_not_lost(method):
    for chain in lost_at_the_start():
        exact = enumerate_paths(*chain)
        smoothed = hmm_smoother(*chain, method=method)
        close(float(smoothed.log_evidence) / exact.log_evidence, 1.0)
        atol = CLOSE * abs(SMALLEST)  # probabilities are as right as logarithms of this size
        np.testing.assert_allclose(jnp.exp(smoothed.log_smoothed), exact.smoothed, atol=atol)
        predicted = hmm_filter(*chain, method=method).log_predicted
        unseen = enumerate_paths(chain[0], chain[1], np.r_[chain[2][:1], np.zeros((1, len(chain[0])))])
        np.testing.assert_allclose(jnp.exp(predicted[1]), unseen.smoothed[1], atol=atol)


def extremes(rng, shape, reach, *, share_never):
    """Logarithms over ranges of up to `reach`, many of them where products begin to underflow, and -inf."""
    log_p = -reach * rng.choice([0.001, 0.1, 1.0], (*shape[:-1], 1)) * rng.random(shape)
    edges = SMALLEST * rng.choice([0.0, 0.5, 1.0], shape) + rng.uniform(-5.0, 5.0, shape)
    log_p = np.where(rng.random((*shape[:-1], 1)) < 0.5, log_p, edges)
    log_p = np.where(rng.random(shape) < share_never, -np.inf, log_p)
    never = np.all(log_p == -np.inf, -1, keepdims=True)
    return np.where(never, 0.0, log_p - np.where(never, 0.0, np.max(log_p, -1, keepdims=True)))


def by_logarithms(log_init, log_trans, log_lik):
    """Log predicted laws and log evidence, by the definition and in float64."""
    message, evidence, messages = log_init, 0.0, []
    with np.errstate(divide="ignore", invalid="ignore"):
        for row in log_lik:
            messages.append(message)
            total = np.logaddexp.reduce(message + row)
            evidence += total
            if total == -np.inf:
                message = np.full_like(message, -np.inf)
            else:
                message = np.logaddexp.reduce((message + row - total)[:, None] + log_trans, axis=0)
    return np.stack(messages), evidence


@pytest.mark.parametrize("times", [1.0, 2.0, 10.0])
def test_a_scan_is_right_over_any_range(times):
    """Starts, transitions and likelihoods that a number cannot hold, and exact zeros."""
    rng = np.random.default_rng(int(times))
    num_steps, reach = 6, -times * SMALLEST
    for _ in range(300):
        chain = [extremes(rng, shape, reach, share_never=0.1) for shape in ((3,), (num_steps, 3))]
        # every other time moves are common, so that messages are large whatever was lost
        moves = rng.normal(size=(3, 3)) if rng.random() < 0.5 else extremes(rng, (3, 3), reach, share_never=0.1)
        chain.insert(1, moves)
        with np.errstate(divide="ignore"):
            chain[:2] = [log_p - np.logaddexp.reduce(log_p, -1, keepdims=True) for log_p in chain[:2]]
        chain = [np.asarray(jnp.asarray(log_p, float), np.float64) for log_p in chain]
        messages, evidence = by_logarithms(*chain)
        found = hmm_filter(*chain, method="scan")
        # a few roundings at every step, of numbers as large as a path's likelihood
        atol = 8 * num_steps * float(jnp.finfo(jnp.result_type(float)).eps) * 3 * num_steps * reach
        np.testing.assert_allclose(found.log_predicted, messages, rtol=0, atol=atol)
        np.testing.assert_allclose(found.log_evidence, evidence, rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_what_underflows_and_matters_is_not_lost(method):
    """A regime that is never left again, and an outlier that speaks for it by more than a number can hold.

    Products of probabilities explain all the rest by the wrong regime: they are off by the whole evidence.
    """
    with np.errstate(divide="ignore"):
        log_init, log_trans = np.log([0.5, 0.5]), np.log(np.array([[0.9, 0.1], [0.0, 1.0]]))
    log_lik = np.zeros((30, 2))
    log_lik[:, 1] = -200.0
    log_lik[5] = [-2000.0, 0.0]
    truth = enumerate_left_to_right(log_init, log_trans, log_lik)
    smoothed = hmm_smoother(log_init, log_trans, log_lik, method=method)
    assert abs(float(smoothed.log_evidence) / truth - 1) < 1e-5
    close(jnp.exp(smoothed.log_smoothed[:28, 0]), 1.0)
    many = hmm_filter(log_init, log_trans, np.stack([log_lik, np.zeros((30, 2))]), method=method)
    close(many.log_evidence / truth, [1.0, 0.0])


@pytest.mark.parametrize("method", METHODS)
def test_a_transition_too_rare_for_a_number_is_counted(method):
    """Its probability underflows, and the data leave no other: it happened once."""
    log_trans = np.array([[0.0, -800.0], [-800.0, 0.0]])
    with np.errstate(divide="ignore"):
        log_lik = np.log([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    smoothed = hmm_smoother(np.log([0.5, 0.5]), log_trans, log_lik, method=method)
    close(smoothed.log_evidence, np.log(0.5) - 800.0)
    close(smoothed.expected_transitions, [[1.0, 1.0], [0.0, 0.0]])


def enumerate_left_to_right(log_init, log_trans, log_lik):
    """Log evidence by the time of the only move: there are T paths from the first state, and one from the second."""
    num_steps = len(log_lik)
    terms = [log_init[1] + log_lik[:, 1].sum()]
    for stay in range(1, num_steps + 1):
        move = log_trans[0, 1] if stay < num_steps else 0.0
        terms.append(
            log_init[0] + (stay - 1) * log_trans[0, 0] + move + log_lik[:stay, 0].sum() + log_lik[stay:, 1].sum()
        )
    return np.logaddexp.reduce(terms)


@pytest.mark.parametrize("chain", CHAINS[:2])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_expected_statistics(chain, method):
    exact = enumerate_paths(*chain)
    arrays = tuple(jnp.asarray(x, float) for x in chain)

    def evidence(log_init, log_trans, log_lik):
        return hmm_filter(log_init, log_trans, log_lik, method=method).log_evidence

    of_init, of_trans, of_lik = jax.jit(jax.grad(evidence, argnums=(0, 1, 2)))(*arrays)
    close(of_init, exact.smoothed[0])
    close(of_lik, exact.smoothed)
    close(of_trans, exact.pairs if chain[1].ndim == 3 else exact.pairs.sum(0))
    # forward mode, and the covariance of the indicators as second derivative
    direction = jnp.ones_like(arrays[2])
    _, along = jax.jvp(lambda x: evidence(arrays[0], arrays[1], x), (arrays[2],), (direction,))
    close(along, len(chain[2]))
    hessian = jax.hessian(lambda x: evidence(arrays[0], arrays[1], x))(arrays[2])
    close(hessian[0, :, 0, :], np.diag(exact.smoothed[0]) - np.outer(exact.smoothed[0], exact.smoothed[0]))
    if chain[1].ndim == 3:
        close(hessian[1, :, 2, :], exact.pairs[1] - np.outer(exact.smoothed[1], exact.smoothed[2]))


def test_gradients_of_the_laws_are_those_of_enumeration():
    log_init, log_trans, log_lik = (jnp.asarray(x, float) for x in asymmetric(11, 4, 2))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))

    def loss(log_lik):
        return jnp.sum(weight * jnp.exp(hmm_smoother(log_init, log_trans, log_lik).log_smoothed))

    def shifted(t, k, by):
        exact = enumerate_paths(
            log_init, log_trans, np.asarray(log_lik, np.float64) + by * (np.eye(8)[2 * t + k].reshape(4, 2))
        )
        return np.sum(np.asarray(weight, np.float64) * exact.smoothed)

    gradient = jax.grad(loss)(log_lik)
    for t in range(4):
        numerical = (shifted(t, 0, 1e-5) - shifted(t, 0, -1e-5)) / 2e-5
        assert abs(float(gradient[t, 0]) - numerical) < max(1e-8, CLOSE)


def test_float32_does_not_drift():
    """Half a nat over 1e5 steps, in others; here a rounding of the whole."""
    rng = np.random.default_rng(0)
    log_init, log_trans, _ = asymmetric(12, 2, 4)
    log_lik = rng.normal(-2.0, 1.5, (100_000, 4)).astype(np.float32)
    found = hmm_filter(log_init.astype(np.float32), log_trans.astype(np.float32), log_lik).log_evidence
    with jax.enable_x64(True):
        truth = float(hmm_filter(*(jnp.asarray(x, jnp.float64) for x in (log_init, log_trans, log_lik))).log_evidence)
    assert abs(float(found) / truth - 1) < 1e-6


# of hmmlearn 0.3.3, GaussianHMM with implementation="log": the series of 1,005 returns of crude oil, and what follows
OIL = np.log([0.5, 0.3, 0.2]), np.log([[0.97, 0.02, 0.01], [0.03, 0.95, 0.02], [0.01, 0.04, 0.95]])
OIL_MEAN, OIL_SCALE = np.array([0.05, 0.0, -0.3]), np.array([1.2, 2.2, 4.0])
OIL_EVIDENCE, OIL_BEST = -2169.6855268398626, -2210.5429968231324
OIL_SMOOTHED = {
    0: [0.9423315728124, 0.05237941285303, 0.005289014334622],
    200: [0.1115600748675, 0.8789104769825, 0.00952944815017],
    500: [4.176138126122e-05, 0.2641000774477, 0.7358581611709],
    1004: [0.9530415651801, 0.04043705860163, 0.006521376218137],
}


@pytest.mark.parametrize("method", METHODS)
def test_evidence_and_smoothed_probabilities_are_those_of_hmmlearn(method):
    """Ten digits, by every method, of a long series and in float64."""
    ys = wti_crude_oil().returns
    log_lik = scipy.stats.norm(OIL_MEAN, OIL_SCALE).logpdf(ys[:, None])
    with jax.enable_x64(True):
        smoothed = hmm_smoother(*OIL, log_lik, method=method)
        assert hmm_filter(*OIL, log_lik, method=method).log_evidence == pytest.approx(OIL_EVIDENCE, rel=1e-10)
        assert smoothed.log_evidence == pytest.approx(OIL_EVIDENCE, rel=1e-10)
        for t, expected in OIL_SMOOTHED.items():
            np.testing.assert_allclose(jnp.exp(smoothed.log_smoothed[t]), expected, rtol=1e-10)
        best = hmm_viterbi(*OIL, log_lik)
    assert best.log_joint == pytest.approx(OIL_BEST, rel=1e-10)
    assert int(best.path.sum()) == 899


@pytest.mark.parametrize("implementation", ["log", "scaling"])
def test_all_smoothed_probabilities_are_those_of_the_hmmlearn_that_is_installed(implementation):
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    ys = wti_crude_oil().returns
    other = hmmlearn.GaussianHMM(3, "diag", implementation=implementation, init_params="")
    other.startprob_, other.transmat_ = np.exp(OIL[0]), np.exp(OIL[1])
    other.means_, other.covars_ = OIL_MEAN[:, None], OIL_SCALE[:, None] ** 2
    evidence, smoothed = other.score_samples(ys[:, None])
    assert evidence == pytest.approx(OIL_EVIDENCE, rel=1e-12)
    log_lik = scipy.stats.norm(OIL_MEAN, OIL_SCALE).logpdf(ys[:, None])
    with jax.enable_x64(True):
        for method in METHODS:
            found = jnp.exp(hmm_smoother(*OIL, log_lik, method=method).log_smoothed)
            np.testing.assert_allclose(found, smoothed, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_init": np.array([0.5, 0.5])}, "log_init.*these are probabilities: pass their logarithms"),
        ({"log_init": np.zeros((2, 2))}, "log_init must be a vector"),
        ({"log_trans": np.log([[0.5, 0.2], [0.5, 0.5]])}, r"log_trans.*sum to 1, got a sum of 0\.7"),
        ({"log_trans": np.zeros((3, 2, 2))}, r"log_trans must have shape \(2, 2\), or \(3, 2, 2\)|sum to 1"),
        ({"log_trans": np.zeros((5, 2, 2))}, r"log_trans must have shape \(2, 2\), or \(3, 2, 2\)"),
        ({"log_lik": np.zeros((4, 3))}, r"log_lik must have shape \(..., T, 2\)"),
        ({"log_lik": np.full((4, 2), np.nan)}, "log_lik.*steps.*mask"),
        ({"mask": np.ones(3, bool)}, r"mask must have shape \(4,\)"),
        ({"mask": np.ones(4)}, "mask must be boolean"),
        ({"lengths": np.array(9)}, "lengths must lie between 1 and T = 4"),
        ({"method": "fast"}, "method must be one of"),
    ],
)
def test_bad_input_is_named(unchecked, change, message):
    with np.errstate(divide="ignore"):
        good = {
            "log_init": np.log([0.5, 0.5]),
            "log_trans": np.log(np.full((2, 2), 0.5)),
            "log_lik": np.zeros((4, 2)),
        }
    with pytest.raises(ValueError, match=message):
        hmm_filter(**(good | change))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_likelihood_of_a_stream_that_is_none_is_named(value):
    """Unless it is traced, where nobody can look."""
    log_trans, log_lik = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([0.0, value])
    with pytest.raises(ValueError, match=r"log_lik must hold log densities below infinity.*pass zeros"):
        hmm_start(log_trans[0], log_lik)
    belief = hmm_start(log_trans[0], jnp.zeros(2))
    with pytest.raises(ValueError, match=r"log_lik must hold log densities below infinity.*pass zeros"):
        hmm_step(belief, log_lik, log_trans)
    if np.isnan(value):
        assert bool(jnp.isnan(jax.jit(hmm_step)(belief, log_lik, log_trans).log_evidence))
