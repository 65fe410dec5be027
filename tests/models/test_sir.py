"""The epidemic against sums over all its states, and the binomial law that it is made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import SIR
from bayesinf.models.binomial import binomial_log_prob
from bayesinf.models.state_space import log_prob, observation_log_prob, sample

EPS = float(jnp.finfo(float).eps)
RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
T1 = jnp.asarray(1)
N, BETA, GAMMA, START, RHO, K, B = 5, 1.5, 0.4, 0.3, 0.6, 2.0, 0.05
SMALL = SIR(N, BETA, GAMMA, START, RHO, K, B)
STATES = np.array([(s, i, new) for s in range(N + 1) for i in range(N + 1 - s) for new in range(N + 1)], float)

binomial = jax.jit(jax.vmap(binomial_log_prob))
slopes = jax.jit(jax.vmap(jax.value_and_grad(binomial_log_prob, argnums=2)))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 1_000, 1_000_000])
def test_the_binomial_law_at_any_size(n):
    for rate in (1e-5, 0.03, 0.7, 4.0):
        rate = float(jnp.asarray(rate))
        p = -np.expm1(-rate)
        k = np.unique(
            np.concatenate([scipy.stats.binom(n, p).ppf([1e-9, 0.01, 0.3, 0.5, 0.9, 1 - 1e-9]), [0, 1, n - 1, n]])
        )
        found = binomial(jnp.asarray(k), jnp.full(k.shape, float(n)), jnp.full(k.shape, rate))
        q = np.exp(-rate)
        choose = np.array([np.log(float(scipy.special.comb(n, int(a), exact=True))) for a in k]) if n <= 1_000 else None
        expected = scipy.stats.binom(n, p).logpmf(k) if choose is None else choose + k * np.log(p) - (n - k) * rate
        # p and q are rounded: that moves the deviances by the distance from the mean, times the rounding
        rounding = 8 * EPS * (np.abs(k - n * p) * (1 + 1 / q) + 1)
        np.testing.assert_array_less(np.abs(found - expected), rounding + RTOL * np.abs(expected))


def test_the_derivative_of_the_binomial_law():
    k, n, rate = jnp.array([0.0, 3.0, 7.0, 20.0]), jnp.full(4, 20.0), jnp.full(4, 0.3)
    found = slopes(k, n, rate)[1]
    np.testing.assert_allclose(found, k / np.expm1(0.3) - (n - k), rtol=10 * RTOL)


def test_what_cannot_happen():
    k, n, rate = jnp.array([(-1, 3, 0.5), (4, 3, 0.5), (0.5, 3, 0.5), (1, 3, 0), (1, 0, 0.5), (0, 0, 0), (0, 7, 0)]).T
    values, gradients = slopes(k, n, rate)
    np.testing.assert_array_equal(values, [-np.inf] * 5 + [0.0] * 2)
    assert jnp.all(jnp.isfinite(gradients))


@jax.jit
def log_probs(model):
    """Of the first state, and of every pair of states."""
    states = jnp.asarray(STATES)
    first = jax.vmap(lambda x: log_prob(model.initial(), x))(states)
    return first, jax.vmap(lambda a: jax.vmap(lambda x: log_prob(model.transition(a, T1), x))(states))(states)


def exact():
    """The same by scipy, from the definitions."""
    first, moves = np.zeros(len(STATES)), np.zeros((len(STATES),) * 2)
    for j, (s, i, new) in enumerate(STATES):
        if s + i == N and new == i:
            first[j] = scipy.stats.binom(N, START).pmf(i)
        for k, (s_prev, i_prev, _) in enumerate(STATES):
            if s + new == s_prev:
                infected = scipy.stats.binom(s_prev, -np.expm1(-BETA * i_prev / N)).pmf(new)
                moves[k, j] = infected * scipy.stats.binom(i_prev, -np.expm1(-GAMMA)).pmf(i_prev + new - i)
    return first, moves


def test_all_probabilities():
    first, moves = (np.exp(np.asarray(value, np.float64)) for value in log_probs(SMALL))
    expected = exact()
    np.testing.assert_allclose(first, expected[0], rtol=RTOL, atol=0)
    np.testing.assert_allclose(moves, expected[1], rtol=10 * RTOL, atol=0)  # impossible ones are exactly 0
    np.testing.assert_allclose(first.sum(), 1.0, rtol=RTOL)
    np.testing.assert_allclose(moves.sum(axis=1), 1.0, rtol=10 * RTOL)
    assert np.all(np.asarray(log_probs(SMALL)[1]) <= SMALL.log_transition_bound(T1))


def test_counts_are_negative_binomial():
    for new in (0.0, 3.0):
        mean = RHO * new + B
        for y in (0.0, 1.0, 6.0):
            found = observation_log_prob(SMALL, jnp.array([1.0, 4.0, new]), jnp.asarray(y), T1)
            np.testing.assert_allclose(found, scipy.stats.nbinom(K, K / (K + mean)).logpmf(y), rtol=10 * RTOL)
    assert observation_log_prob(SMALL, jnp.array([1.0, 4.0, 2.0]), jnp.asarray(jnp.nan), T1) == 0.0


def test_evidence_is_unbiased():
    """Against the sum over all paths of a population of five."""
    ys = np.array([1.0, 2.0, np.nan, 0.0])
    first, moves = exact()
    mass = first
    for t, y in enumerate(ys):
        if t > 0:
            mass = mass @ moves
        if not np.isnan(y):
            mean = RHO * STATES[:, 2] + B
            mass = mass * scipy.stats.nbinom(K, K / (K + mean)).pmf(y)

    def log_evidence(key):
        return bi.kernels.particle_filter(key, SMALL, jnp.asarray(ys), num_particles=12, store="none").log_evidence

    report = evidence_is_unbiased(0, log_evidence, np.log(mass.sum()), num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


def test_simulated_epidemics_have_the_moments_of_the_model():
    size = 200_000
    model = SIR(size, 0.8, 0.3, 0.1, 0.5, 3.0, 1.0)
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, model, 2)))(
        jax.random.split(jax.random.key(0), 5_000)
    )
    (s, i, new), y = np.moveaxis(np.asarray(xs, np.float64), -1, 0), np.asarray(ys, np.float64)
    np.testing.assert_array_equal(s, np.round(s))
    np.testing.assert_array_equal(s[:, 1] + new[:, 1], s[:, 0])
    p, r = -np.expm1(-0.8 * i[:, 0] / size), -np.expm1(-0.3)
    gone = i[:, 0] + new[:, 1] - i[:, 1]
    for found, n, chance in ((i[:, 0], size, 0.1), (new[:, 1], s[:, 0], p), (gone, i[:, 0], r)):
        z = (found - n * chance) / np.sqrt(n * chance * (1 - chance))
        assert mean_p_value(z, 0.0) > FALSE_ALARM
        assert mean_p_value(z**2, 1.0) > FALSE_ALARM
    mean = 0.5 * new + 1.0
    assert mean_p_value(y / mean, 1.0) > FALSE_ALARM
    assert mean_p_value((y - mean) ** 2 / (mean + mean**2 / 3.0), 1.0) > FALSE_ALARM


def test_gradients_are_finite():
    paths = jnp.array([(2.0, 3.0, 3.0), (1.0, 3.0, 1.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)])  # it dies out

    @jax.jit
    @jax.grad
    def score(model):
        moves = jax.vmap(lambda before, x: log_prob(model.transition(before, T1), x))(paths[:-1], paths[1:])
        drawn = sample(jax.random.key(0), model.transition(paths[0], T1))  # through which nothing passes
        return log_prob(model.initial(), paths[0]) + jnp.sum(moves) + jnp.sum(drawn)

    found = score(SMALL)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    # 1 infected of 2, then 0 of 1 and 0 of 1; 1 recovered of 3, then 3 of 3
    by_infection = 3 / N * (1 / np.expm1(3 * BETA / N) - 1) - 3 / N
    by_recovery = 1 / np.expm1(GAMMA) - 2 + 3 / np.expm1(GAMMA)
    np.testing.assert_allclose(found.infection_rate, by_infection, rtol=10 * RTOL)
    np.testing.assert_allclose(found.recovery_rate, by_recovery, rtol=10 * RTOL)


def test_bad_parameters_are_named():
    for name, value, message in (
        ("population", 10.5, "population must be a whole number from 1 to"),
        ("population", 1e16, "population must be a whole number from 1 to"),
        ("infection_rate", 0.0, "infection_rate must be finite and positive"),
        ("initial_fraction", 1.0, r"initial_fraction must lie in \(0, 1\)"),
        ("reporting_rate", 1.1, r"reporting_rate must lie in \(0, 1\], got 1.1"),
        ("background", 0.0, "background must be finite and positive"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **{name: value})
