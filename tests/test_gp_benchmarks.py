"""The experiments with Gaussian processes at their smallest: what they measure is right, and they write it down."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models import nngp

REASON = "an sdist has no benchmarks"
uci = pytest.importorskip("benchmarks.gp.uci", reason=REASON)
digits = pytest.importorskip("benchmarks.gp.digits", reason=REASON)
finite_width = pytest.importorskip("benchmarks.gp.finite_width", reason=REASON)
co2 = pytest.importorskip("benchmarks.gp.co2", reason=REASON)

INSIDE = ["IG(2,2), noise inside", "IG(.5,.5), noise inside", "Burr, noise inside"]
OUTSIDE = ["IG(2,2), noise outside", "Burr, noise outside"]


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        yield


@jax.jit
def every(matrix, noise, y, y_new):
    """Evidence and NLL of all methods of one matrix."""
    X_new = uci.Computed(matrix).rows(len(y))[1]
    found = {}
    for name, (process, new_noise) in uci.processes(matrix, noise, y).items():
        nll = uci.score(process.condition(y, X_new, noise=new_noise), y_new)["nll"]
        found[name] = process.log_prob(y), nll
    return found


def assert_written(folder, name, num_rows):
    assert (folder / f"{name}.png").stat().st_size > 5_000
    with open(folder / f"{name}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == num_rows


def test_a_scale_that_is_wrong_costs_the_network_and_not_its_mixtures(double):
    """Of y with s = 25; no mixture has the evidence of its best scale, and the laws of s hardly differ."""
    X = np.random.default_rng(0).standard_normal((180, 3))
    matrix = nngp.NNGP(nngp.relu(), 1, 2.0, 0.1)(X)
    tril = np.linalg.cholesky(matrix + 0.01 * np.eye(180))
    y = jnp.asarray(5.0 * tril @ np.random.default_rng(1).standard_normal(180))
    found = every(matrix, 0.01, y[:140], y[140:])
    evidence, nll = ({name: float(pair[i]) for name, pair in found.items()} for i in range(2))
    assert all(evidence[uci.LEARNT] >= evidence[name] for name in (uci.FIXED, *INSIDE))
    for name in (*INSIDE, *OUTSIDE):
        # q / 2 of the quadratic form at s = 1 is 25 times its mean n / 2: hundreds of nats
        assert evidence[name] > evidence[uci.FIXED] + 100.0
        assert nll[name] < nll[uci.FIXED]


def test_the_law_of_the_scale_does_not_matter_for_hundreds_of_data(double):
    """A17's second clause: on the diabetes data IG and Burr differ by less than .02."""
    pytest.importorskip("sklearn")
    X, y, n, _ = uci.standardise(*uci.load("diabetes"), 0)
    matrix = nngp.NNGP(nngp.relu(), 1, 2.0, 0.1)(X)
    nll = {name: float(pair[1]) for name, pair in every(matrix, 0.5, jnp.asarray(y[:n]), jnp.asarray(y[n:])).items()}
    for names in (INSIDE, OUTSIDE):
        assert np.ptp([nll[name] for name in names]) < 0.02


def test_files_of_numbers_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_UCI", str(tmp_path))
    (tmp_path / "yacht.csv").write_text("a,b,target\n1,2,3\n4,5,6\n")
    (tmp_path / "energy.txt").write_text("1 2 3\n4  5 6\n\n")
    for name in ("yacht", "energy"):
        X, y = uci.load(name)
        np.testing.assert_array_equal(X, [[1, 2], [4, 5]])
        np.testing.assert_array_equal(y, [3, 6])
    with pytest.raises(SystemExit, match="kin8nm is none of boston"):
        uci.load("kin8nm")


@pytest.mark.slow  # it learns length scales
def test_a_table_is_written(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 2))
    rows = uci.main(tmp_path, ["toy"], 2, {"toy": (X, np.sin(X[:, 0]) + 0.1 * rng.standard_normal(40))})
    assert_written(tmp_path, "uci", 2 * len(uci.METHODS))
    assert all(np.isfinite(row["nll"]) for row in rows)
    assert "| RBF, lengths learnt |" in uci.markdown(rows)


def test_burr_is_a_law_with_its_tails():
    law = uci.Burr(2.0, 1.0)
    u, rule = np.polynomial.legendre.leggauss(400)
    density = np.exp(np.asarray(law.log_prob(jnp.exp(15.0 * u)), float) + 15.0 * u)
    np.testing.assert_allclose(15.0 * rule @ density, 1.0, rtol=1e-4)
    draws = law.sample(jax.random.key(0), (10_000,))
    # P(s > x) = 1 / (1 + x^2): of 10,000 draws .2 exceed 2, with a standard error of .004
    assert abs(float(jnp.mean(draws > 2.0)) - 0.2) < 5 * 0.004


def test_calibration_by_hand():
    """Two answers at .9, one of them right, and two at .6, both right."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    found = digits.measure(probabilities, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    np.testing.assert_allclose(found["confidence"], 0.75)
    np.testing.assert_allclose(found["ece"], (2 * abs(0.9 - 0.5) + 2 * abs(0.6 - 1.0)) / 4)
    np.testing.assert_allclose(found["nll"], -np.mean(np.log([0.9, 0.1, 0.6, 0.6])))


def test_distances_are_those_that_were_put_in():
    mean, sd = np.zeros(3), np.array([1.0, 2.0, 4.0])
    parts = np.tile(mean + 0.3 * sd, (8, 1))
    found = finite_width.distances(finite_width.Moments(parts, parts**2 + (1.5 * sd) ** 2, 1.0), (mean, sd))
    np.testing.assert_allclose(
        [found[name] for name in ("mean", "mean_noise", "sd", "sd_noise")], [0.3, 0.0, np.log(1.5), 0.0], atol=1e-7
    )


def test_the_rule_by_hand_knows_a_line_and_a_season():
    """To the rounding of a year to whole weeks: in the mean of a year, five years of it, and between two weeks."""
    times = 1960.0 + np.arange(0, 27 * 52) / 52.18
    y = 300.0 + 1.5 * (times - 1960.0) + 3.0 * np.sin(2 * np.pi * times)
    mean, sd = co2.by_rule(times, np.where(times < 1980.0, y, np.nan), 1980.0, 1980.0)
    ahead = (times >= 1980.0) & (times < 1985.0)
    bound = (1.5 + 3.0) / 52 + 0.006
    # the last days of a year fall behind the last week that is known, which then stands for them
    is_inside = times - np.ceil(times - 1980.0) <= np.max(times[times < 1980.0])
    assert np.sum(ahead & ~is_inside) < 5
    assert np.all(np.abs(mean - y)[ahead & is_inside] < bound)
    assert np.all(np.abs(mean - y)[ahead] < bound + (2 * np.pi * 3.0 + 1.5) / 52)
    assert np.all(sd[ahead] < bound)
    assert np.all(np.isnan(mean[times < 1980.0]))


@pytest.mark.slow  # two samplers
def test_two_ways_to_the_posterior_of_a_network_agree(tmp_path):
    rows = finite_width.main(tmp_path, (1,), (16,), (), num_samples=400, num_draws=8_000)
    assert_written(tmp_path, "finite_width", 2)
    first, second = rows
    for name in ("mean", "sd"):
        noise = np.hypot(first[f"{name}_noise"], second[f"{name}_noise"])
        assert abs(first[name] - second[name]) < 5 * noise
        assert first[name] > 5 * first[f"{name}_noise"]  # it is no Gaussian process


@pytest.mark.slow  # it learns twelve parameters
def test_a_series_is_forecast_and_written_down(tmp_path):
    times = 1960.0 + np.arange(0, 20 * 26) / 26
    noise = 0.2 * np.random.default_rng(0).standard_normal(len(times))
    y = 300.0 + 1.5 * (times - 1960.0) + 3.0 * np.sin(2 * np.pi * times) + noise
    y[::17] = np.nan
    rows = co2.main(tmp_path, (times, y), origins=(1972.0, 1975.0), num_steps=5, num_gaps=20)
    assert_written(tmp_path, "co2", 2 * 3 * co2.NUM_YEARS + 1)
    assert all(row["weeks"] for row in rows)
    assert "| learnt anew, year 1 ahead |" in co2.markdown(rows)


@pytest.mark.slow  # four runs of NUTS
def test_digits_are_classified_and_written_down(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 60)
    X = 2.0 * np.eye(12)[labels] + 0.3 * rng.standard_normal((60, 12))
    rows = digits.main(tmp_path, (X, labels), num_splits=1, num_train=40, num_test=20, num_samples=100)
    assert_written(tmp_path, "digits", 2 * len(digits.METHODS) * len(digits.LEVELS))
    clean = [row for row in rows if row["level"] == 0.0]
    assert all(row["accuracy"] > 0.5 for row in clean)
