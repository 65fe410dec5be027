"""Batch predictive inference: one bound for many test points, held as often as asked, and what it costs.

    y = b1'x + (b2'x)^2 + |b3'x| z,   x ~ N(mu, 5 I) of 20 dimensions,   z ~ N(0, 1)

of constants of our own, after the reference. The centre is a kernel ridge regression on 200 points, the score |y -
centre|, and independent repetitions draw training, calibration and batch anew.

    quantile      200 calibration points, a batch of 100: sets that hold at 90 of them with probability 1 - alpha
    simultaneous  2,000 points, a batch of 100: sets that hold at all of them; alpha = 0.01 takes 9,900
    selection     points with y > 5, of a batch of 100 and 1,000 points to calibrate: more than eta false ones with
                  probability alpha at most, beside those with a prediction above 5
    mean          of 10 scores in [0, 1], after 40: from ranks, and from ranks that resemble the scores, beside
                  Hoeffding's inequality, which takes the mean of calibration for the true one

Split conformal sets stand beside the first two: they hold at 1 - alpha of points on average, which says nothing of one
batch.

    python -m benchmarks.conformal.batch                # seconds

References:
    Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bayesinf.models import conformal
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.1, 0.05, 0.01)
DIMENSION, NUM_TRAIN, BATCH, CUT = 20, 200, 100, 5.0
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"  # Okabe and Ito's
LAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "beta(.8, .5)": lambda rng, shape: rng.beta(0.8, 0.5, shape),
    "beta(1.2, 1.5)": lambda rng, shape: rng.beta(1.2, 1.5, shape),
    "beta(2, 5)": lambda rng, shape: rng.beta(2.0, 5.0, shape),
}


def regression(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and outcomes."""
    coefficients = np.random.default_rng(7).normal(size=(3, DIMENSION)) / np.sqrt(5 * DIMENSION)
    x = 0.5 + np.sqrt(5.0) * rng.normal(size=(num, DIMENSION))
    linear, square, scale = x @ coefficients.T[:, 0], x @ coefficients.T[:, 1], x @ coefficients.T[:, 2]
    return x, 2 * linear + 2 * square**2 + np.abs(scale) * rng.normal(size=num)


def predictions(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> np.ndarray:
    """Kernel ridge regression with all products of two features."""
    kernel = (1.0 + x @ x.T / DIMENSION) ** 2
    weights = np.linalg.solve(kernel + 5.0 * np.eye(len(x)), y - y.mean())
    return y.mean() + (1.0 + x_new @ x.T / DIMENSION) ** 2 @ weights


def repetitions(seed: int, num_cal: int, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres and outcomes of `num_cal` calibration points and a batch, shape (runs, num_cal + batch) each."""
    centres, outcomes = [], []
    for run in range(num_runs):
        x, y = regression(np.random.default_rng([seed, run]), NUM_TRAIN + num_cal + BATCH)
        centres.append(predictions(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:]))
        outcomes.append(y[NUM_TRAIN:])
    return np.array(centres), np.array(outcomes)


def over_runs(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """A function of one repetition, compiled, for each of them in turn."""
    return np.asarray(
        jax.jit(lambda args: jax.lax.map(lambda one: function(*one), args))(tuple(map(jnp.asarray, arrays)))
    )


def sets(name: str, num_cal: int, zeta: int, num_runs: int) -> list[dict]:
    """Whether sets hold at `zeta` points of the batch, of Batch PI and of split conformal prediction."""
    centres, outcomes = repetitions(zeta, num_cal, num_runs)
    scores = np.abs(outcomes - centres)
    cal, test = scores[:, :num_cal], np.sort(scores[:, num_cal:])
    rows = []
    for alpha in LEVELS:
        bounds = {
            "batch": over_runs(lambda s, a=alpha: conformal.batch_quantile_bound(s, BATCH, zeta, a).bound, cal),
            "split": over_runs(lambda s, a=alpha: conformal.conformal_quantile(s, a), cal),
        }
        for method, bound in bounds.items():
            about = {"experiment": name, "method": method, "setting": f"alpha={alpha}", "alpha": alpha}
            rows.append(about | share(test[:, zeta - 1] <= bound) | sizes(2 * bound))
    return rows


def selection(num_cal: int, alpha: float, num_runs: int) -> list[dict]:
    """How often more than eta are selected falsely, and how many are selected."""
    centres, outcomes = repetitions(1, num_cal, num_runs)
    is_null = outcomes <= CUT
    rows = []
    for eta in (0, 2, 4, 6, 8, 10):
        chosen = over_runs(
            lambda s, null, new, eta=eta: conformal.batch_selection(s, null, new, eta, alpha).is_selected,
            centres[:, :num_cal],
            is_null[:, :num_cal],
            centres[:, num_cal:],
        )
        for method, picked in (("batch", chosen), ("plug-in", centres[:, num_cal:] > CUT)):
            num_false = (picked & is_null[:, num_cal:]).sum(1)
            about = {"experiment": "selection", "method": method, "setting": f"eta={eta}", "alpha": alpha}
            rows.append(about | share(num_false <= eta) | sizes(picked.sum(1)))
    return rows


def means(num_cal: int, batch: int, alpha: float, num_runs: int) -> list[dict]:
    """Bounds of the mean of a batch of scores in [0, 1]."""
    rows = []
    for name, draw in LAWS.items():
        rng = np.random.default_rng(3)
        scores, other = draw(rng, (num_runs, num_cal + batch)), draw(rng, (500,))
        levels = np.quantile(other, (np.arange(num_cal) + 0.5) / num_cal)
        h0 = np.append(np.round(50 * levels), 50).astype(int)
        cal, truth = scores[:, :num_cal], scores[:, num_cal:].mean(1)

        def bound(s, h0=None):
            return conformal.batch_mean_bound(s, batch, alpha, h0=h0, sup=1.0).bound

        bounds = {
            "batch, ranks": over_runs(bound, cal),
            "batch, quantiles": over_runs(lambda s, h0=h0: bound(s, h0), cal),
            "Hoeffding": np.minimum(cal.mean(1) + np.sqrt(np.log(1 / alpha) / (2 * batch)), 1.0),
        }
        for method, found in bounds.items():
            about = {"experiment": "mean", "method": method, "setting": name, "alpha": alpha}
            rows.append(about | share(truth <= found) | sizes(found) | {"truth": float(truth.mean())})
    return rows


def share(is_held: np.ndarray) -> dict:
    """How often it is held, and the standard error of that."""
    held = float(np.mean(is_held))
    return {"num_runs": len(is_held), "held": held, "standard_error": float(np.sqrt(held * (1 - held) / len(is_held)))}


def sizes(values: np.ndarray) -> dict:
    """The mean of those that are finite, and how many are not; a truth only where there is one."""
    is_finite = np.isfinite(values)
    mean = float(values[is_finite].mean()) if is_finite.any() else float("inf")
    return {"size": mean, "num_infinite": int((~is_finite).sum()), "truth": ""}


def main(folder: Path, num_runs: int = 500) -> list[dict]:
    """Runs everything, writes batch.png and batch.csv, and returns the rows of the table."""
    rows = [
        *sets("quantile", 200, 90, num_runs),
        *sets("simultaneous", 2_000, BATCH, num_runs),
        *selection(1_000, 0.1, num_runs),
        *means(40, 10, 0.1, num_runs),
    ]
    save(folder, "batch", draw(rows), rows)
    return rows


def draw(rows: list[dict]):
    """How often each bound was held, above; its size, below."""
    figure, axes = plt.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    titles = {
        "quantile": "90 of 100 covered",
        "simultaneous": "all of 100 covered",
        "selection": "at most $\\eta$ false selections",
        "mean": "mean of 10 scores, $\\alpha=0.1$",
    }
    labels = ("width of the sets", "width of the sets", "points selected", "bound")
    for (top, bottom), (name, title), label in zip(axes.T, titles.items(), labels, strict=True):
        chosen = [row for row in rows if row["experiment"] == name]
        settings, methods = (list(dict.fromkeys(row[key] for row in chosen)) for key in ("setting", "method"))
        for method, color, marker in zip(methods, (BLUE, RED, GREEN), "osd", strict=False):
            own = [row for row in chosen if row["method"] == method]
            held, error, size = (np.array([row[key] for row in own]) for key in ("held", "standard_error", "size"))
            top.errorbar(settings, held, 2 * error, color=color, marker=marker, ms=4, lw=0, elinewidth=1, label=method)
            bottom.plot(settings, np.where(np.isfinite(size), size, np.nan), color=color, marker=marker, ms=4, lw=1)
        asked = {row["setting"]: 1 - row["alpha"] for row in chosen}
        top.plot(settings, list(asked.values()), color=GREY, marker="_", ms=18, lw=0, label="asked for")
        if name == "mean":
            truths = {row["setting"]: row["truth"] for row in chosen}
            bottom.plot(settings, list(truths.values()), color="k", marker="_", ms=18, lw=0, label="truth")
            bottom.legend(frameon=False, fontsize=8)
        top.set(title=title, ylim=(-0.03, 1.03), ylabel="share of batches")
        bottom.set(ylabel=label, ylim=(0, None))
        top.legend(frameon=False, fontsize=8)
        for axis in (top, bottom):
            axis.tick_params(axis="x", labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def report(rows: Sequence[dict]) -> None:
    for row in rows:
        held = f"held {row['held']:.3f} +- {row['standard_error']:.3f} of {1 - row['alpha']:.2f}"
        truth = f", truth {row['truth']:.3f}" if row["truth"] != "" else ""
        infinite = f", {row['num_infinite']} infinite" if row["num_infinite"] else ""
        print(
            f"{row['experiment']}, {row['setting']}, {row['method']}: {held}, size {row['size']:.3f}{truth}{infinite}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coverage and size of bounds for batches.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--num-runs", type=int, default=500, help="independent repetitions")
    given = parser.parse_args()
    started = time.perf_counter()
    report(main(given.results, given.num_runs))
    print(f"{time.perf_counter() - started:.0f} s")
