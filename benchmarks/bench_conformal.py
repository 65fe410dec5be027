"""Conformal calibration at scale: a million scores in a thousand groups, from raw arrays to thresholds and sets.

A rival that loops over groups with NumPy stands beside it, with the same order statistics. Nothing is cached between
calls: each sorts anew.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models import conformal

NUM_SCORES, NUM_GROUPS, NUM_TEST, ALPHA = 1_000_000, 1_000, 100_000, 0.1


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.exponential(size=NUM_SCORES).astype(np.float32), rng.integers(0, NUM_GROUPS, NUM_SCORES)


def by_groups(scores, groups):
    """The thresholds of all groups."""
    calibrated = conformal.calibrate(scores, groups=groups)
    return calibrated.threshold(ALPHA, test_group=jnp.arange(NUM_GROUPS))


def numpy_by_groups(scores, groups):
    """Sorted by group once, then one order statistic in each."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(scores[order], np.cumsum(np.bincount(groups, minlength=NUM_GROUPS))[:-1])
    ranks = [int(np.ceil((len(part) + 1) * (1 - ALPHA) - 1e-9)) for part in parts]
    return np.array([np.partition(part, k - 1)[k - 1] for part, k in zip(parts, ranks, strict=True)])


def bench_a_million_scores_in_a_thousand_groups(compare, data):
    scores, groups = jnp.asarray(data[0]), jnp.asarray(data[1])
    test = scores[:NUM_TEST], groups[:NUM_TEST]
    calibrated = jax.block_until_ready(conformal.calibrate(scores, groups=groups))
    calls = {
        "bayesinf calibrate, and thresholds of all groups": partial(by_groups, scores, groups),
        "bayesinf p-values of 100,000 points, calibrated before": lambda: calibrated.p_value(
            test[0], test_group=test[1], key=0
        ),
        "bayesinf calibrate without groups, and a threshold": lambda: conformal.calibrate(scores).threshold(ALPHA),
        "numpy, a partition for each group": lambda: numpy_by_groups(*data),
    }
    compare(f"conformal calibration, {NUM_SCORES:,} scores in {NUM_GROUPS:,} groups", calls, rounds=5)
    np.testing.assert_allclose(by_groups(scores, groups), numpy_by_groups(*data), rtol=1e-6)


def bench_online_sets(compare, data):
    scores = jnp.asarray(data[0][:NUM_TEST])
    methods = {"ACI": conformal.ACI(ALPHA, gamma=0.02), "ConformalPID": conformal.ConformalPID(ALPHA)}
    compare(
        f"online sets, {NUM_TEST:,} steps with a window of 200",
        {f"bayesinf {name}": partial(conformal.run_online, method, scores) for name, method in methods.items()},
        rounds=3,
        note=lambda name, medians: f"{1e6 * medians[name] / NUM_TEST:.3g} us a step",
    )
