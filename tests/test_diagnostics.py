"""Streaming diagnostics against the statistics of the whole array."""

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.diagnostics import Moments, SplitRHat


def batches(draws, sizes):
    r_hat = SplitRHat()
    for part in np.split(draws, np.cumsum(sizes)[:-1], axis=1):
        r_hat.update(part)
    return r_hat.value()


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return rng.gamma(2.0, size=(4, 400, 3)) + np.array([0.0, 0.0, 1.0]) * np.arange(4)[:, None, None]


def test_equals_split_r_hat(draws):
    expected = [arviz_stats.rhat(draws[..., i], method="split") for i in range(3)]
    assert np.allclose(batches(draws, [100, 100, 150, 50]), expected, rtol=1e-10)
    assert batches(draws, [200, 200])[2] > 1.1


def test_sees_a_drift_within_the_chains():
    drifting = np.random.default_rng(1).normal(size=(4, 400, 1)) + np.linspace(0.0, 4.0, 400)[None, :, None]
    assert batches(drifting, [100] * 4)[0] > 1.3


def test_offset_does_not_lose_digits(draws):
    shifted = (draws + 1e6).astype(np.float64)
    assert np.allclose(batches(shifted, [150, 50, 200]), batches(draws, [150, 50, 200]), rtol=1e-6)


def test_a_long_run_is_kept_in_few_batches():
    draws = np.random.default_rng(3).gamma(2.0, size=(3, 4096, 1)) + np.linspace(0.0, 1.0, 4096)[None, :, None]
    r_hat = SplitRHat()
    for part in np.split(draws, 1024, axis=1):
        r_hat.update(part)
    counts = [count for count, _, _ in r_hat._batches]
    assert len(counts) < 128
    middle = min(np.cumsum(counts), key=lambda count: abs(count - 2048))
    assert abs(middle - 2048) <= 64
    assert np.allclose(r_hat.value(), batches(draws, [middle, 4096 - middle]), rtol=1e-10)


def test_nan_and_stuck_chains_are_never_a_pass():
    noise = np.random.default_rng(2).normal(size=(2, 40, 2))
    noise[0, 3, 0] = np.nan
    noise[:, :, 1] = [[1.0], [2.0]]
    value = batches(noise, [20, 20])
    assert np.isnan(value[0])
    assert np.isinf(value[1])
    assert not np.any(value < 1.01)


def test_too_little_says_nothing():
    r_hat = SplitRHat()
    assert r_hat.value() is None
    r_hat.update(np.zeros((2, 10, 1)))
    assert r_hat.value() is None


def test_moments_reduce_a_statistic():
    values = jax.random.gamma(jax.random.key(0), 2.0, (500, 3)) + 100.0
    moments = Moments(lambda draw: {"sum": draw.sum(), "first": draw[:1]})

    def body(state, value):
        return moments.update(state, value), None

    state, _ = jax.lax.scan(body, moments.init(values[0]), values)
    mean, variance = moments.result(state)
    sums = np.asarray(values, np.float64).sum(axis=1)
    assert np.allclose(mean["sum"], sums.mean(), rtol=1e-6)
    assert np.allclose(variance["sum"], sums.var(ddof=1), rtol=1e-3)
    assert mean["first"].shape == (1,)
    assert state.mean["sum"].dtype == jnp.result_type(float)
