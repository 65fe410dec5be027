"""The panel of sets for hidden Markov models at its smallest: it covers as asked for, and is written down."""

import csv

import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM

hmm_panel = pytest.importorskip("benchmarks.conformal.hmm_panel", reason="an sdist has no benchmarks")


def test_the_panel_covers_and_sets_by_type_are_smaller(tmp_path):
    num_runs = 200
    rows = hmm_panel.main(tmp_path, lengths=(50,), horizons=(1,), num_runs=num_runs)
    assert (tmp_path / "hmm_panel.png").stat().st_size > 10_000
    with open(tmp_path / "hmm_panel.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 3 * 15
    for method in hmm_panel.METHODS:
        num_held = sum(round(row["coverage"] * num_runs) for row in rows if row["method"] == method)
        assert scipy.stats.binomtest(num_held, 15 * num_runs, 0.8).pvalue > FALSE_ALARM
    sizes = [
        [row["size"] for row in rows if (row["method"], row["b"]) == (method, 0.9)] for method in ("type", "block")
    ]
    assert np.mean(sizes[0]) < np.mean(sizes[1])
