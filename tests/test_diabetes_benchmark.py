"""The experiment with conformal Bayes at its smallest, on simulated patients: what it finds is true."""

import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM

diabetes = pytest.importorskip("benchmarks.conformal.diabetes", reason="an sdist has no benchmarks")


@pytest.mark.slow
def test_a_wrong_prior_costs_the_bayesian_interval_its_coverage(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3))
    y = x @ np.array([0.5, -0.3, 0.0]) + 0.8 * rng.standard_normal(200)
    rows = diabetes.main(tmp_path, num_splits=3, num_samples=200, data=(x, (y - y.mean()) / y.std()))
    assert (tmp_path / "diabetes.png").stat().st_size > 5_000
    covered = {(row["prior"], row["method"]): 0 for row in rows}
    for row in rows:
        covered[row["prior"], row["method"]] += round(60 * row["coverage"])
    total = 180
    for prior in (1.0, 0.02):
        assert scipy.stats.binomtest(covered[prior, "conformal Bayes"], total, 0.8).pvalue > FALSE_ALARM
    table = np.array([[covered[0.02, m], total - covered[0.02, m]] for m in ("Bayes", "conformal Bayes")])
    assert scipy.stats.fisher_exact(table, alternative="less").pvalue < FALSE_ALARM
