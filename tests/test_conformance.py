"""The conformance suite on what is right, and on its own edges; what is wrong is in test_planted.py."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from planted import posteriors
from planted.metropolis import RandomWalk

import bayesinf as bi
from bayesinf.conformance import (
    FALSE_ALARM,
    ContractError,
    Report,
    contract,
    evidence_is_unbiased,
    exact_start_invariance,
    geweke_joint,
    mean_p_value,
    simulation_based_calibration,
)
from bayesinf.conformance.batches import batch_size
from bayesinf.conformance.comparison import law_has_moved

TARGET = bi.Target(lambda x: jnp.sum(3.0 * x - jnp.exp(x)))


def log_gamma(key):
    return jnp.log(jnp.sum(jax.random.exponential(key, (2, 3)), axis=1))


class Frozen(RandomWalk):
    def step(self, key, state):
        return state, super().step(key, state)[1]


def test_a_report_is_bonferroni_and_nan_is_a_rejection():
    report = Report("test", {"a": 0.5, "b": 0.01, "c": 0.2}, {"moved": 0.25})
    assert report.p_value == pytest.approx(0.03)
    assert report.worst == "b"
    assert report.raise_if_rejected() is report
    assert "p = 0.03 from 3 comparisons; smallest: b 0.01" in repr(report)
    assert "moved 0.25" in repr(report)
    undefined = Report("test", {"a": 1.0, "b": float("nan")})
    assert undefined.p_value == 0.0
    with pytest.raises(AssertionError, match="b 0"):
        undefined.raise_if_rejected()
    with pytest.raises(ValueError, match="made no comparison"):
        Report("test", {})


def test_mean_p_value_finds_one_wrong_component_of_many():
    samples = np.random.default_rng(0).exponential(size=(10_000, 5))
    assert mean_p_value(samples, 1.0) > FALSE_ALARM
    assert mean_p_value(samples + np.array([0, 0, 0.1, 0, 0]), 1.0) < FALSE_ALARM
    assert mean_p_value(np.where(samples > 5, np.nan, samples), 1.0) == 0.0


def test_tails_without_moments_raise_no_alarm_and_hide_no_shift():
    rng = np.random.default_rng(0)
    starts, fresh = rng.standard_cauchy((2, 20_000, 2))
    steps = rng.standard_cauchy((20_000, 2))
    invariant = 0.5 * (starts + steps)  # the Cauchy law is stable
    assert Report("", law_has_moved(starts, invariant, fresh)).p_value > FALSE_ALARM
    for moved in (invariant + 0.2, 1.3 * invariant, np.where(rng.random((20_000, 2)) < 0.05, 5.0, invariant)):
        assert Report("", law_has_moved(starts, moved, fresh)).p_value < FALSE_ALARM


def test_dependence_is_seen_where_the_marginals_are_right():
    starts, fresh, other = np.random.default_rng(0).exponential(size=(3, 20_000, 2))
    copula = np.stack([starts[:, 0], np.where(np.arange(20_000) % 10 == 0, starts[:, 0], other[:, 1])], -1)
    assert Report("", law_has_moved(starts, copula, fresh)).p_value < FALSE_ALARM
    assert Report("", law_has_moved(starts, np.stack([starts[:, 0], other[:, 1]], -1), fresh)).p_value > FALSE_ALARM


def test_values_that_are_not_finite_are_rejected():
    starts, fresh = np.random.default_rng(0).normal(size=(2, 1_000))
    ends = starts.copy()
    ends[3] = np.nan
    assert law_has_moved(starts, ends, fresh) == {" is finite": 0.0}


def test_law_has_moved_counts_discrete_ties_evenly():
    starts, fresh, ends = np.random.default_rng(0).poisson(2.0, size=(3, 20_000))
    assert Report("", law_has_moved(starts, ends, fresh)).p_value > FALSE_ALARM
    assert Report("", law_has_moved(starts, np.maximum(ends, 1), fresh)).p_value < FALSE_ALARM


@pytest.mark.parametrize(("num", "size"), [(100, 100), (40_000, 20_000), (50_000, 12_500), (20_011, 20_000)])
def test_batches_are_equal_where_they_can_be(num, size):
    assert batch_size(num, 20_000) == size


def test_a_kernel_that_never_moves_passes_and_is_told():
    report = exact_start_invariance(0, Frozen(TARGET, 0.7), log_gamma, num_chains=2_000)
    assert report.p_value > FALSE_ALARM
    assert report.notes["moved"] == 0.0


def test_invariance_takes_pytrees_further_statistics_and_a_preparation():
    target = bi.Target(lambda x: 3.0 * x["a"] - jnp.exp(x["a"]) - 0.5 * jnp.sum(x["b"] ** 2))

    def exact(key):
        key_a, key_b = jax.random.split(key)
        return {"a": log_gamma(key_a)[0], "b": jax.random.normal(key_b, (2,))}

    kernel = bi.kernels.MALA(target, 0.3)

    def displace(key, state):
        return kernel.init(jax.tree.map(lambda leaf: leaf + jax.random.uniform(key), state.position))

    report = exact_start_invariance(
        1, kernel, exact, num_chains=5_000, prepare=displace, statistics=lambda state: state.evaluation.grad["a"] ** 2
    )
    assert {"position.a law", "position.b[1] tails", "log density scale", "statistic law"} <= set(report.p_values)
    assert report.p_value < FALSE_ALARM  # what `displace` prepares is another law, which the kernel leaves


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(blackjax.mala(TARGET.logdensity, 0.4), id="mala"),
        pytest.param(blackjax.hmc(TARGET.logdensity, 0.4, jnp.ones(2), 4), id="hmc", marks=pytest.mark.slow),
    ],
)
def test_blackjax_kernels_pass_as_they_are(kernel):
    exact_start_invariance(2, kernel, log_gamma, num_chains=10_000, num_steps=5).raise_if_rejected()
    # they promise no common Info, recompile for new parameters, and mix precisions in 64-bit mode
    contract(kernel, jnp.array([1.0, 0.3]), skip={"info", "types", "leaves", "bad input"})


def test_skip_names_clauses():
    with pytest.raises(ValueError, match="skip must be one of 'protocol'"):
        contract(RandomWalk(TARGET, 0.7), jnp.zeros(2), skip={"colour"})


def test_what_is_no_kernel_is_told_so():
    with pytest.raises(ContractError, match="protocol: has no method init") as caught:
        contract(lambda key, state: state, jnp.zeros(2))
    assert set(caught.value.violations) == {"protocol"}


def test_evidence_with_skewed_weights():
    report = evidence_is_unbiased(0, posteriors.evidence, posteriors.LOG_EVIDENCE)
    assert report.p_value > FALSE_ALARM
    assert report.notes["mean ratio"] == pytest.approx(1.0, abs=0.05)
    assert report.notes["effective replicates"] < 9_000
    assert evidence_is_unbiased(0, posteriors.evidence, posteriors.LOG_EVIDENCE + 0.05).p_value < FALSE_ALARM


def test_evidence_of_an_exact_estimator_allows_rounding_and_nothing_more():
    rounding = float(jnp.finfo(jnp.zeros(()).dtype).eps)  # of the floating type in use

    def exact(key):
        return -50.0 + 10 * rounding * jax.random.normal(key)

    assert evidence_is_unbiased(0, exact, -50.0).p_value == 1.0
    assert evidence_is_unbiased(0, exact, -50.01).p_value < FALSE_ALARM
    assert evidence_is_unbiased(0, lambda key: jnp.zeros(()), 0.1).p_value == 0.0
    assert evidence_is_unbiased(0, lambda key: -jnp.inf * jnp.ones(()), 0.0).p_value == 0.0


def test_evidence_counts_minus_infinity_as_zero():
    def coin(key):
        return jnp.where(jax.random.bernoulli(key, 0.25), jnp.log(4.0), -jnp.inf)

    assert evidence_is_unbiased(0, coin, 0.0).p_value > FALSE_ALARM
    assert evidence_is_unbiased(0, coin, 0.2).p_value < FALSE_ALARM


def test_calibration_of_an_exact_posterior():
    report = simulation_based_calibration(
        0, posteriors.prior, posteriors.simulate, posteriors.posterior, quantities=posteriors.log_likelihood
    )
    assert report.p_value > FALSE_ALARM
    assert "rank of mu^2 x tau law" in report.p_values
    assert "rank of tau x level of y scale" in report.p_values


def test_calibration_of_a_discrete_posterior_with_few_draws():
    """Ties are broken at random: ranks among three draws of a coin are uniform too."""

    def posterior(key, y, num_draws):
        return jax.random.bernoulli(key, jnp.where(y == 1, 0.8, 0.2), (num_draws,)).astype(int)

    def prior(key):
        return jax.random.bernoulli(key).astype(int)

    def simulate(key, theta):
        return jnp.where(jax.random.bernoulli(key, 0.8), theta, 1 - theta)

    report = simulation_based_calibration(0, prior, simulate, posterior, num_draws=3)
    assert report.p_value > FALSE_ALARM


def test_geweke_of_a_right_transition():
    report = geweke_joint(0, posteriors.prior, posteriors.simulate, posteriors.transition)
    assert report.p_value > FALSE_ALARM
    assert {"theta.mu x y[0]", "theta.tau law", "y[2] tails"} <= set(report.p_values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_start_invariance(0, RandomWalk(TARGET, 1.0), log_gamma, num_chains=5), "num_chains"),
        (lambda: exact_start_invariance(0, RandomWalk(TARGET, 1.0), log_gamma, num_steps=0), "num_steps"),
        (lambda: exact_start_invariance(2**40, RandomWalk(TARGET, 1.0), log_gamma), "key"),
        (lambda: evidence_is_unbiased(0, lambda key: jnp.zeros(2), 0.0), "estimate_log_evidence must return a scalar"),
        (
            lambda: simulation_based_calibration(
                0, posteriors.prior, posteriors.simulate, lambda key, y, num_draws: posteriors.prior(key)
            ),
            "posterior_sampler must return num_draws = 100 draws",
        ),
        (
            lambda: geweke_joint(0, posteriors.prior, posteriors.simulate, posteriors.transition, num_rounds=0),
            "num_rounds",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_promised():
    """Over 200 keys the p-values of right code are not smaller than uniform ones."""
    kernel = bi.kernels.MALA(TARGET, 0.4)
    p_values = [exact_start_invariance(seed, kernel, log_gamma, num_chains=20_000).p_value for seed in range(200)]
    for level in (0.5, 0.1, 0.02):
        num = sum(p < level for p in p_values)
        assert scipy.stats.binom.sf(num - 1, 200, level) > FALSE_ALARM


def test_exact_draws_that_are_not_finite_are_no_proof():
    kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.5)
    with pytest.raises(ValueError, match="exact draws must be finite"):
        exact_start_invariance(0, kernel, lambda key: jnp.full(2, jnp.nan), num_chains=100, num_steps=1)
