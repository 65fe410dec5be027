"""EnbPI and SPCI where errors depend on their past: coverage, width and time.

Three simulations after the reference, of our own constants (a = 0.9 throughout, T steps, the first 80% to train):

    state-space       s_t = a s_{t-1} + sqrt(.1) z_t,  y_t = s_t + e_t, of x_t = (y_{t-1}, y_{t-2}),
                      e_t = a e_{t-1} + sqrt(.1) u_t
    non-stationary    y_t = g(t) h(x_t) + e_t,  g(t) = log(t') sin(2 pi t' / 12),  t' = 1 + t mod 12,
                      h(x) = (b'x + (b'x)^2)^(1/4)
    heteroskedastic   y_t = h(x_t) + (.1 + |x_t1|) z_t, of x_t autoregressive

and the ELEC2 series of electricity transfers, if its CSV is at the path in the environment variable ELEC2_CSV: it comes
with the code of the reference, and in the source archive of scikit-multiflow 0.4.1 on PyPI, as
src/skmultiflow/data/datasets/elec.csv. Rows from 17,760 on, half-hours 18 to 23 of each day; the transfer given both
prices and demands.

The centre is a bagged ridge regression on features and their squares. Widths are means over finite sets.

    python -m benchmarks.conformal.sequences            # minutes
    ELEC2_CSV=electricity.csv python -m benchmarks.conformal.sequences

References:
    Xu and Xie (2021), https://arxiv.org/abs/2010.09107 (EnbPI).
    Xu and Xie (2023), https://arxiv.org/abs/2212.03463 (SPCI, and the simulations).
"""

import argparse
import csv
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bayesinf.models import conformal
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.1
COLORS = {"enbpi": "#D55E00", "spci": "#0072B2", "spci-forest": "#009E73"}  # Okabe and Ito's
METHODS = {"enbpi": "EnbPI", "spci": "SPCI, neighbours", "spci-forest": "SPCI, forest"}


def autoregression(noise: np.ndarray, a: float = 0.9) -> np.ndarray:
    """x_t = a x_{t-1} + noise_t, from its stationary law, along the leading axis."""
    x = np.empty_like(noise)
    x[0] = noise[0] / np.sqrt(1 - a**2)
    for t in range(1, len(noise)):
        x[t] = a * x[t - 1] + noise[t]
    return x


def state_space(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A hidden autoregression, and errors that are one, too."""
    noise = np.sqrt(0.1) * rng.standard_normal((num + 2, 2))
    y = autoregression(noise).sum(1)
    return np.stack([y[1:-1], y[:-2]], 1), y[2:]


def non_stationary(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A seasonal factor that the regression does not know."""
    x = np.abs(rng.standard_normal((num, 5)))
    season = np.arange(num) % 12 + 1
    index = x @ np.linspace(0.2, 1.0, 5)
    signal = np.log(season) * np.sin(2 * np.pi * season / 12) * (index + index**2) ** 0.25
    return x, signal + autoregression(np.sqrt(0.1) * rng.standard_normal(num))


def heteroskedastic(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors as large as a slow feature says."""
    x = autoregression(np.sqrt(0.1) * rng.standard_normal((num, 3)))
    index = x @ np.array([0.5, 1.0, -0.5])
    return x, (np.abs(index) + index**2) ** 0.25 + (0.1 + np.abs(x[:, 0])) * rng.standard_normal(num)


def elec2(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and transfers; the CSV has half-hours 0 to 47, or the same divided by 47."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))[17_760:]
    columns = ("period", "nswprice", "nswdemand", "vicprice", "vicdemand", "transfer")
    if columns[0] not in rows[0]:  # scikit-multiflow's
        columns = tuple(f"feat_{i}" for i in range(1, 7))
    period = np.array([float(row[columns[0]]) for row in rows])
    period = np.round(period * 47) if period.max() <= 1 else period
    table = np.array([[float(row[name]) for name in columns[1:]] for row in rows])[(period > 17) & (period < 24)]
    return table[:, :-1], table[:, -1]


SERIES = {"state-space": state_space, "non-stationary": non_stationary, "heteroskedastic": heteroskedastic}


def features(x: jax.Array) -> jax.Array:
    """One, the features, and their squares."""
    return jnp.concatenate([jnp.ones((x.shape[0], 1)), x, x**2], 1)


def fit(x, y, weights):
    """Ridge regression."""
    design = features(x)
    scatter = (design.T * weights) @ design + 1e-2 * jnp.eye(design.shape[1])
    return jnp.linalg.solve(scatter, (design.T * weights) @ y)


def predict(params, x):
    """Its predictions."""
    return features(x) @ params


def sets(name: str, x: jax.Array, y: jax.Array, num_train: int, window: int) -> conformal.SeriesSets:
    """The sets of one method for the steps from `num_train` on."""
    if name == "enbpi":
        return conformal.enbpi(
            1, fit, predict, x[:num_train], y[:num_train], x[num_train:], y[num_train:], ALPHA, window=window
        )
    fits = conformal.bootstrap_ensemble(1, fit, predict, x[:num_train], y[:num_train])
    centre = fits.centre(x[num_train:])
    residuals = jnp.concatenate([fits.residuals, y[num_train:] - centre])
    quantile = conformal.QuantileForest(2, window=12) if name == "spci-forest" else None
    return conformal.spci(residuals, num_train, ALPHA, quantile=quantile, centre=centre)


def main(
    folder: Path, num_steps: int = 2_000, methods: Sequence[str] = tuple(METHODS), elec2_csv: str | None = None
) -> list[dict]:
    """Runs everything, writes sequences.png and sequences.csv, and returns the rows of the table."""
    series = {name: make(np.random.default_rng(2023), num_steps) for name, make in SERIES.items()}
    if elec2_csv:
        series["ELEC2"] = elec2(elec2_csv)
    rows, found = [], {}
    for name, (x, y) in series.items():
        num_train = int(0.8 * len(y))
        spread = np.std(x[:num_train], axis=0)
        x, y = jnp.asarray((x - x[:num_train].mean(0)) / spread, float), jnp.asarray(y, float)
        for method in methods:
            begin = time.perf_counter()
            result = jax.block_until_ready(
                sets(method, x, y, num_train, min(100 if name != "ELEC2" else 300, num_train))
            )
            seconds = time.perf_counter() - begin
            is_finite = jnp.isfinite(result.width)
            rows.append(
                {
                    "series": name,
                    "method": method,
                    "num_test": len(y) - num_train,
                    "coverage": float(result.coverage),
                    "width": float(jnp.mean(result.width, where=is_finite)),
                    "num_infinite": int(jnp.sum(~is_finite)),
                    "seconds": seconds,  # with compilation
                }
            )
            found[name, method] = result
    save(folder, "sequences", draw(found, list(series), methods), rows)
    return rows


def draw(found: dict, names: Sequence[str], methods: Sequence[str]):
    """The last hundred steps of each series, less the centre: what happened, and the ends of each method."""
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 2.2 * len(names)), layout="constrained", squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        for method in methods:
            result = found[name, method]
            for end in (result.lower, result.upper):
                axis.plot(np.asarray(end - result.centre)[-100:], color=COLORS[method], lw=1.2, drawstyle="steps-mid")
            axis.plot([], [], color=COLORS[method], label=METHODS[method])
        happened = np.asarray(found[name, methods[0]].residuals)[-100:]
        axis.plot(happened, ".", color="0.25", ms=4, label="what happened")
        axis.set_ylabel(f"{name}\ny less centre")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
    axes[-1, 0].set_xlabel("step of the last hundred")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="EnbPI and SPCI where errors depend on their past.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    for row in main(parser.parse_args().results, elec2_csv=os.environ.get("ELEC2_CSV")):
        print(row)
