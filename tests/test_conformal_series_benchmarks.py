"""The experiment with EnbPI and SPCI at its smallest: what it finds is true, and it writes it down."""

import csv

import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM

sequences = pytest.importorskip("benchmarks.conformal.sequences", reason="an sdist has no benchmarks")


def test_errors_that_depend_on_their_past_are_covered_by_narrower_sets(tmp_path, monkeypatch, compile_fast):
    monkeypatch.setattr(sequences, "SERIES", {"non-stationary": sequences.non_stationary})
    rows = sequences.main(tmp_path, num_steps=500, methods=("enbpi", "spci"))
    assert (tmp_path / "sequences.png").stat().st_size > 10_000
    with open(tmp_path / "sequences.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == ["enbpi", "spci"]
    width = {row["method"]: row["width"] for row in rows}
    assert width["spci"] < width["enbpi"]
    for row in rows:  # neighbouring steps depend on each other: as if there were a third as many
        num = row["num_test"] // 3
        assert scipy.stats.binomtest(round(row["coverage"] * num), num, 0.9).pvalue > FALSE_ALARM


def test_simulated_errors_follow_their_recursion():
    noise = np.random.default_rng(0).standard_normal((4_000, 50))
    x = sequences.autoregression(noise)
    variances = x[-1].var(ddof=1), x[0].var(ddof=1)
    for variance in variances:  # of 50 independent series, in their stationary law at both ends
        chi2 = scipy.stats.chi2(49).cdf(49 * variance * (1 - 0.9**2))
        assert min(chi2, 1 - chi2) > FALSE_ALARM


def test_a_csv_of_electricity_is_read(tmp_path):
    columns = ["period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer"]
    with open(tmp_path / "e.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[t % 48, t, 1, 2, 3, t] for t in range(17_760 + 96)])
    x, y = sequences.elec2(str(tmp_path / "e.csv"))
    assert x.shape == (12, 4)
    assert (np.unique(y % 48) == np.arange(18, 24)).all()
    assert y.min() >= 17_760
