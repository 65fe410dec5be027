"""The experiments with Parisian particle Gibbs at their smallest: what they find is true, and they write it down."""

import csv

import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM

REASON = "an sdist has no benchmarks"
bias = pytest.importorskip("benchmarks.ppg.bias", reason=REASON)
learning_lgssm = pytest.importorskip("benchmarks.ppg.learning_lgssm", reason=REASON)
learning_chaotic_rnn = pytest.importorskip("benchmarks.ppg.learning_chaotic_rnn", reason=REASON)


def assert_written(folder, name, rows):
    assert (folder / f"{name}.png").stat().st_size > 10_000
    with open(folder / f"{name}.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["estimator"] for row in written] == [row["estimator"] for row in rows]


def test_the_truth_is_the_published_one():
    np.testing.assert_allclose(bias.truth(bias.series(51)), [129.59137616, 109.54469942], rtol=1e-5)


@pytest.mark.slow
def test_the_roll_out_has_no_visible_bias_where_paris_has(tmp_path):
    num_runs = 200
    sizes = {"num_particles": (20,), "num_particles_paris": (20,), "budget": 160}
    rows = bias.main(tmp_path, num_steps=21, **sizes, num_runs=num_runs)
    assert_written(tmp_path, "bias", rows)
    for functional in bias.FUNCTIONALS:
        p_values = {
            (row["estimator"], row["num_sweeps"], row["burn_in"]): 2
            * scipy.stats.t(row["num_runs"] - 1).sf(abs(row["bias"]) / row["sd"] * np.sqrt(row["num_runs"]))
            for row in rows
            if row["functional"] == functional
        }
        assert p_values["ppg", 8, 4] > FALSE_ALARM
        assert p_values["paris", 1, 0] < FALSE_ALARM


@pytest.mark.slow  # to compile
def test_a_linear_model_is_learnt(tmp_path):
    (row,) = learning_lgssm.main(
        tmp_path, ("ppg",), num_states=1, num_steps=40, budget=20, num_iterations=100, num_runs=2, step_size=0.1
    )
    assert_written(tmp_path, "learning_lgssm", [row])
    ys, start = learning_lgssm.simulate(1, 40), learning_lgssm.beginning(1)
    log_likelihood, maximum = learning_lgssm.maximize(start, ys)
    at_start = np.array([0.5, 0.0, 0.0])
    assert 0.0 <= row["gap"] < 0.2 * float(log_likelihood(maximum) - log_likelihood(at_start))
    assert row["distance"] < 0.5 * np.linalg.norm(at_start - maximum)


@pytest.mark.slow  # to compile
def test_a_chaotic_network_is_learnt(tmp_path):
    rows = learning_chaotic_rnn.main(
        tmp_path, ("gibbs",), num_steps=20, budget=16, num_iterations=30, num_runs=2, num_particles=200, num_filters=4
    )
    assert_written(tmp_path, "learning_chaotic_rnn", rows)
    found = {row["estimator"]: row["log_likelihood"] for row in rows}
    assert found["gibbs"] > found["start"] + 1.0
