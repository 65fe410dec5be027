"""The benchmark of long series at its smallest: every row of it runs, in the precision that it is named after."""

import pytest

long_series = pytest.importorskip("benchmarks.bench_long_series", reason="an sdist has no benchmarks")


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize(
    "row", [name if name == "paris, mcmc" else pytest.param(name, marks=pytest.mark.slow) for name in long_series.CALLS]
)
def test_every_row_runs_in_its_precision(row, precision):
    seconds, gibibytes = long_series.measure(long_series.CALLS[row], precision, num_steps=20, num_particles=10)
    assert seconds > 0
    assert 0.05 < gibibytes < 2.0  # JAX alone is a tenth of that; a number in kB or bytes would be seen
