"""Carbon dioxide at Mauna Loa: years ahead by a state-space Gaussian process in O(n), with missing weeks.

    y(t) = level + slope t + trend(t) + season(t) + climate(t) + weather(t) + noise

    trend      Matérn 5/2, of decades
    season     periodic with a period of a year, times Matérn 3/2: its shape drifts
    climate    Matérn 3/2, of years
    weather    Matérn 1/2, of weeks

The years after 1981, 1986, 1991 and 1996 are forecast, five each, from the weeks before. Twelve parameters are learnt
by marginal likelihood, L-BFGS, from the same weeks: for the first origin from one start, for the others from where the
one before ended. 100 weeks left out at random among those before 1982 are filled in. Weeks without a measurement
are NaN, and the likelihood integrates them out. Beside it the same with the parameters of the first origin throughout,
and a rule by hand: the same week of the last year that is known, plus the mean growth of its last five years for every
year between, with the standard deviation of the errors that this rule made before 1982, for each number of years ahead.

Coverage is that of central intervals, of weeks whose errors depend on each other: four origins are few, and no standard
errors are given. All in float64.

    pip install statsmodels                             # for its data, weekly, 1958 to 2001
    python -m benchmarks.gp.co2                         # minutes

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 5.4.3.
    Keeling and Whorf (2004), Scripps CO2 Program, by way of statsmodels (the data).
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from bayesinf.models import gp
from bayesinf.models.gp.lbfgs import Minimum, minimise
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
FULL, FROZEN, RULE = "learnt anew", "learnt in 1981", "last year and growth"
ORIGINS, NUM_YEARS = (1982.0, 1987.0, 1992.0, 1997.0), 5
START = {
    "level": 330.0,
    "slope": 1.0,
    "trend_scale": np.log(30.0),
    "trend_length": np.log(50.0),
    "season_scale": np.log(3.0),
    "season_length": np.log(1.0),
    "season_decay": np.log(50.0),
    "climate_scale": np.log(0.7),
    "climate_length": np.log(1.0),
    "weather_scale": np.log(0.3),
    "weather_length": np.log(0.1),
    "noise_scale": np.log(0.2),
}


def load() -> tuple[np.ndarray, np.ndarray]:
    """Times in years, as 1958.24, and parts per million, NaN where missing."""
    try:
        from statsmodels.datasets import co2
    except ImportError as error:
        raise SystemExit(f"{error}: the data come with statsmodels, pip install statsmodels") from error
    table = co2.load_pandas().data
    days = (table.index - table.index[0]).days.to_numpy(float)
    first = table.index[0]
    return first.year + (first.day_of_year - 1 + days) / 365.25, table["co2"].to_numpy(float)


def natural(theta: dict[str, Any]) -> dict[str, Any]:
    """Parameters as the model has them; scales and lengths are learnt as logarithms."""
    return {name: value if name in ("level", "slope") else jnp.exp(value) for name, value in theta.items()}


def process(theta: dict[str, Any], times: jax.Array) -> gp.GP:
    """The model at these times."""
    p = natural(theta)
    season = gp.Periodic(p["season_length"], p["season_scale"] ** 2, 1.0) * gp.Matern32(p["season_decay"])
    kernel = (
        gp.Matern52(p["trend_length"], p["trend_scale"] ** 2)
        + season
        + gp.Matern32(p["climate_length"], p["climate_scale"] ** 2)
        + gp.Matern12(p["weather_length"], p["weather_scale"] ** 2)
    )
    solver = gp.statespace(order=4, parallel=False)
    line = lambda t: p["level"] + p["slope"] * (t - 1970.0)  # noqa: E731
    return gp.GP(kernel, times, mean=line, noise=p["noise_scale"] ** 2, solver=solver)


@partial(jax.jit, static_argnames="num_steps")
def learn(start: dict[str, Any], times: jax.Array, y: jax.Array, num_steps: int) -> Minimum:
    """All parameters by marginal likelihood; the past alone is passed, that no step is spent on the future."""
    start = jax.tree.map(lambda value: jnp.asarray(value, times.dtype), start)
    return minimise(lambda theta: -process(theta, times).log_prob(y), start, num_steps)


@jax.jit
def forecast(theta: dict, times: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of a new measurement at all times, given those that are not NaN."""
    law = process(theta, times).condition(y, times, noise=jnp.exp(2.0 * theta["noise_scale"]))
    return law.mean, jnp.sqrt(law.variance)


def by_rule(times: np.ndarray, y: np.ndarray, origin: float, learnt_until: float) -> tuple[np.ndarray, np.ndarray]:
    """The rule's mean and standard deviation at all times after the origin; NaN before."""

    def ahead(t: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At times t, given what is known at times `before`, and the years between."""
        known = ~np.isnan(y)
        years = np.ceil(np.maximum(t - before, 1e-9))
        growth = (at(before, known) - at(before - 5.0, known)) / 5.0
        return np.interp(t - years, times[known], y[known]) + years * growth, years

    def at(t: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The mean of the year that ends at t."""
        edges = np.searchsorted(times[known], np.stack([t - 1.0, t]))
        sums = np.concatenate([[0.0], np.cumsum(y[known])])
        return (sums[edges[1]] - sums[edges[0]]) / np.maximum(edges[1] - edges[0], 1)

    mean, years = ahead(times, np.full_like(times, origin))
    sd = np.full_like(times, np.nan)
    past = (times < learnt_until) & ~np.isnan(y)
    for k in range(1, NUM_YEARS + 1):
        late = times[past][times[past] > times[0] + 6.0 + k]
        guess, _ = ahead(late, late - k + 1e-6)
        errors = np.interp(late, times[past], y[past]) - guess
        sd[years == k] = np.sqrt(np.mean(errors**2))
    return np.where(times >= origin, mean, np.nan), sd


def measure(mean: np.ndarray, sd: np.ndarray, y: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """NLL, root mean square error and coverage of the weeks chosen."""
    where = where & ~np.isnan(y)
    z = (y[where] - mean[where]) / sd[where]
    covered = {
        f"coverage_{level}": float(np.mean(np.abs(z) < scipy.stats.norm.ppf(0.5 + level / 200))) for level in (50, 95)
    }
    nll = float(-np.mean(scipy.stats.norm.logpdf(y[where], mean[where], sd[where])))
    rmse = float(np.sqrt(np.mean((y[where] - mean[where]) ** 2)))
    return {"weeks": int(where.sum()), "nll": nll, "rmse": rmse, "sd": float(np.mean(sd[where])), **covered}


def main(
    folder: Path, data: Any = None, origins: Any = ORIGINS, num_steps: int = 60, num_gaps: int = 100
) -> list[dict]:
    """Learns, forecasts and fills in, writes co2.png and co2.csv, and returns the rows of the table."""
    times, y = load() if data is None else data
    gaps = np.random.default_rng(0).choice(np.flatnonzero((times < origins[0]) & ~np.isnan(y)), num_gaps, replace=False)
    is_gap = np.isin(np.arange(len(y)), gaps)
    given = np.where(is_gap, np.nan, y)
    rows: list[dict] = []
    pictures: dict = {}
    first: dict = {}
    with jax.enable_x64(True):
        theta: dict = START
        for origin in origins:
            known = np.where(times < origin, given, np.nan)
            past = times < origin
            found = learn(theta, jnp.asarray(times[past]), jnp.asarray(given[past]), num_steps)
            theta = found.point
            first = theta if origin == origins[0] else first
            print(f"{origin:g}: log likelihood {-found.value:.1f} after {found.num_steps} steps,", end=" ")
            print("converged," if found.is_converged else "not converged,", end=" ")
            print({name: round(float(value), 3) for name, value in natural(theta).items()}, flush=True)
            pictures[RULE, origin] = by_rule(times, known, origin, origins[0])
            for method, parameters in ((FULL, theta), (FROZEN, first)):
                law = forecast(parameters, jnp.asarray(times), jnp.asarray(known))
                pictures[method, origin] = tuple(np.asarray(part) for part in law)
            if origin == origins[0]:
                rows.append(
                    {"method": FULL, "origin": "filled in", "year": 0} | measure(*pictures[FULL, origin], y, is_gap)
                )
    for (method, origin), law in pictures.items():
        for year in range(NUM_YEARS):
            where = (times >= origin + year) & (times < origin + year + 1)
            rows.append({"method": method, "origin": int(origin), "year": year + 1} | measure(*law, y, where))
    rows.sort(key=lambda row: (FULL, FROZEN, RULE).index(row["method"]))
    save(folder, "co2", draw(times, y, rows, pictures), rows)
    return rows


def markdown(rows: list[dict]) -> str:
    """The table of README.md: means over origins, weighted by weeks."""
    lines = ["| | NLL | RMSE | mean sd | coverage of 50% | of 95% |", "|---|---|---|---|---|---|"]
    years = sorted({row["year"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        for year in years:
            own = [row for row in rows if (row["method"], row["year"]) == (method, year)]
            if own:
                weeks = [row["weeks"] for row in own]
                cells = [
                    f"{np.average([row[key] for row in own], weights=weeks):.2f}"
                    for key in ("nll", "sd", "coverage_50", "coverage_95")
                ]
                rmse = np.sqrt(np.average([row["rmse"] ** 2 for row in own], weights=weeks))
                title = f"year {year} ahead" if year else "weeks left out"
                lines.append(f"| {method}, {title} | {cells[0]} | {rmse:.2f} | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def draw(times: np.ndarray, y: np.ndarray, rows: list[dict], pictures: dict):
    """Forecasts of the full model, their errors, and coverage against the years ahead."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.8, 1.4, 1))
    colors = {FULL: "#0072B2", FROZEN: "#009E73", RULE: "#D55E00"}
    origins = sorted({origin for _, origin in pictures})
    axes[0].plot(times, y, ".", color="0.6", ms=1)
    for origin in origins:
        mean, sd = pictures[FULL, origin]
        ahead = (times >= origin) & (times < origin + NUM_YEARS)
        axes[0].fill_between(
            times[ahead], (mean - 2 * sd)[ahead], (mean + 2 * sd)[ahead], color=colors[FULL], alpha=0.3, lw=0
        )
        axes[0].plot(times[ahead], mean[ahead], color=colors[FULL], lw=0.8)
        for axis in axes[:2]:
            axis.axvline(origin, color="0.7", lw=0.6, ls=":")
        for method in (RULE, FULL):
            axes[1].plot(times[ahead], (y - pictures[method, origin][0])[ahead], color=colors[method], lw=0.7)
        for sign in (-2, 2):
            axes[1].plot(times[ahead], sign * sd[ahead], "k--", lw=0.7)
    axes[0].set(title="forecasts of five years, two standard deviations", ylabel="ppm", xlim=(origins[0] - 4, None))
    axes[0].set_ylim(np.nanmin(y[times > origins[0] - 4]) - 2, None)
    axes[1].set(title="errors, and two standard deviations (dashed)", ylabel="ppm")
    axes[1].set_xticks(origins, [f"{origin:g}" for origin in origins])
    for method, color in colors.items():
        for level, style in ((50, "s--"), (95, "o-")):
            years = range(1, NUM_YEARS + 1)
            covered = [
                np.mean([row[f"coverage_{level}"] for row in rows if (row["method"], row["year"]) == (method, k)])
                for k in years
            ]
            axes[2].plot(years, covered, style, color=color, ms=4, lw=1, label=method if level == 95 else None)
    for level in (0.5, 0.95):
        axes[2].axhline(level, color="0.5", lw=0.8, ls="--")
    axes[2].set(title="coverage of 95%, of 50% (dashed)", xlabel="years ahead", ylim=(0, 1.03))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(colors))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Carbon dioxide at Mauna Loa by a state-space Gaussian process.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    given = parser.parse_args()
    started = time.perf_counter()
    print(markdown(main(given.results)))
    print(f"{time.perf_counter() - started:.0f} s")
