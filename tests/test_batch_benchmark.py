"""The experiments with batches and with risk curves at their smallest: what they find is true, and is written down."""

import csv

import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM

batch = pytest.importorskip("benchmarks.conformal.batch", reason="an sdist has no benchmarks")
risk_curves = pytest.importorskip("benchmarks.conformal.risk_curves", reason="an sdist has no benchmarks")


def at_least(row):
    num_held = round(row["held"] * row["num_runs"])
    return scipy.stats.binomtest(num_held, row["num_runs"], 1 - row["alpha"], alternative="less").pvalue


def test_sets_for_batches_hold_and_those_for_points_do_not():
    rows = batch.sets("simultaneous", 950, batch.BATCH, 60)
    of_batch, of_points = ([row for row in rows if row["method"] == method] for method in ("batch", "split"))
    assert all(at_least(row) > FALSE_ALARM for row in of_batch)
    assert at_least(of_points[0]) < FALSE_ALARM
    assert [row["num_infinite"] for row in of_batch] == [0, 60, 60]  # it takes 900, 1,900 and 9,900 points


@pytest.mark.slow
def test_all_bounds_hold_and_are_drawn(tmp_path, compile_fast):
    rows = batch.main(tmp_path, num_runs=40)
    assert (tmp_path / "batch.png").stat().st_size > 10_000
    with open(tmp_path / "batch.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 6 + 6 + 12 + 12
    for row in rows:
        if row["method"].startswith("batch"):
            assert at_least(row) > FALSE_ALARM, row
    size = {(row["setting"], row["method"]): row["size"] for row in rows if row["experiment"] == "mean"}
    assert size["beta(2, 5)", "batch, quantiles"] < 0.8 * size["beta(2, 5)", "batch, ranks"]


@pytest.mark.slow
def test_risk_curves_reach_their_limit(tmp_path, compile_fast):
    rows = risk_curves.main(tmp_path, states=(2, 3), lengths=(16, 1_024), num_runs=2_000)
    assert (tmp_path / "risk_curves.png").stat().st_size > 10_000
    for row in rows:
        if row["question"] == "estimation" and row["n"] == 1_024:
            # five standard errors, and what a constant that is not 1/2 adds, of the order of K^2 / n
            assert (
                abs(row["risk"] - row["limit"]) < 5 * row["standard_error"] + row["limit"] * row["K"] ** 2 / 1_024 * 5
            )
    largest = {(row["K"], row["n"], row["rule"]): row["risk"] for row in rows if row["question"] == "prediction"}
    assert all(np.isfinite(risk) and risk > 0 for risk in largest.values())
    assert {rule for K, _, rule in largest if K == 2} == {"add", "average", "minimax"}
    assert {rule for K, _, rule in largest if K == 3} == {"add", "average"}
