"""Posteriors of Bayesian networks of finite width, beside the Gaussian process that they tend to.

    y_i = f(x_i) + N(0, 0.01),    f a network of erf units with 1 or 2 hidden layers, or the process with its covariance

given seven points. The posterior of a network is found in two ways, which have no line of code in common:

    by NUTS over all weights and biases (`gp.BayesianNetwork`), 8 chains;
    by draws of the hidden layers from their prior (`nngp.sample_features`), given which the function is a Gaussian
    process with an exact posterior, weighted by the marginal likelihood.

The second is exact in the limit too, and is the better the wider the network: weights tend to be equal. Distances are
root mean squares over 61 new inputs, of the mean, in standard deviations of the process, and of the logarithm of the
standard deviation; less what the noise of the estimates, known from eight independent parts of each, adds to them.

    python -m benchmarks.gp.finite_width                # ten minutes of a processor

References:
    Neal (1996), doi:10.1007/978-1-4612-0745-0.
    Antognini (2019), https://arxiv.org/abs/1908.10030 (corrections of order 1 / width).
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from arviz_stats.base import array_stats

import bayesinf as bi
from bayesinf.models import gp, nngp
from benchmarks.gp.computed import Computed
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
X = np.array([-2.0, -1.4, -0.6, 0.0, 0.5, 1.3, 1.8])
Y = np.sin(2.0 * X) + np.array([0.05, -0.1, 0.0, 0.1, -0.05, 0.05, -0.1])
X_NEW = np.linspace(-4.0, 4.0, 61)
NOISE = 0.01
W_VAR, B_VAR = 5.0, 1.0
NUM_PARTS = 8


class Moments(NamedTuple):
    """Of f at the new inputs, of independent parts of a run: arrays (parts, inputs); and the effective sample size."""

    mean: np.ndarray
    square: np.ndarray
    ess: float

    @property
    def law(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the standard deviation by all parts."""
        mean = self.mean.mean(axis=0)
        return mean, np.sqrt(self.square.mean(axis=0) - mean**2)


def limit(depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of f at infinite width."""
    kernel = nngp.NNGP(nngp.erf(), depth, W_VAR, B_VAR)
    law = gp.GP(kernel, X[:, None], noise=NOISE).condition(Y, X_NEW[:, None])
    return np.asarray(law.mean), np.sqrt(np.asarray(law.variance))


def by_nuts(depth: int, width: int, num_samples: int, seed: int = 0) -> tuple[Moments, np.ndarray]:
    """A chain is a part; and some of the functions."""
    network = gp.BayesianNetwork(nngp.erf(), depth, width, W_VAR, B_VAR)
    target = network.target(X, Y, noise=NOISE)
    start = jax.vmap(lambda key: network.sample_weights(key, X))(jax.random.split(jax.random.key(seed), NUM_PARTS))
    draws = bi.sample(
        seed,
        bi.kernels.NUTS(target, step_size=0.05),
        start,
        num_samples=num_samples,
        num_warmup=num_samples // 2,
        warmup=bi.adaptation.Window(num_samples // 2, target_acceptance=0.95),  # narrow networks have bends
        progress=False,
    )
    functions = np.asarray(values(network, jax.tree.map(jnp.asarray, dict(draws.samples))), np.float64)
    ess = float(np.min(array_stats.ess(functions[:, :, ::10], chain_axis=0, draw_axis=1, method="mean")))
    shown = functions[:, :: max(1, num_samples // 3)].reshape(-1, len(X_NEW))
    return Moments(functions.mean(axis=1), (functions**2).mean(axis=1), ess), shown


@jax.jit
def values(network: gp.BayesianNetwork, weights: Any) -> jax.Array:
    """Functions of all draws of all chains, (chains, draws, inputs)."""
    return jax.vmap(jax.vmap(lambda w: network.evaluate(w, X_NEW)))(weights)


def by_features(depth: int, width: int, num_draws: int, seed: int = 0) -> Moments:
    """Draws of the prior are shared out among the parts, each of which has weights of its own."""
    found = posteriors(jax.random.split(jax.random.key(seed), num_draws), depth, width)
    log_weights, mean, variance = (np.asarray(part, np.float64) for part in found)
    weights = np.exp(log_weights - log_weights.max())
    ess = weights.sum() ** 2 / np.sum(weights**2)
    parts = weights.reshape(NUM_PARTS, -1, 1)
    parts = parts / parts.sum(axis=1, keepdims=True)
    mean, variance = (part.reshape(NUM_PARTS, -1, len(X_NEW)) for part in (mean, variance))
    return Moments((parts * mean).sum(axis=1), (parts * (variance + mean**2)).sum(axis=1), float(ess))


@partial(jax.jit, static_argnames=("depth", "width"))
def posteriors(keys: jax.Array, depth: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each draw of the hidden layers: its log marginal likelihood, and what it predicts."""
    kernel = nngp.NNGP(nngp.erf(), depth, W_VAR, B_VAR)
    inputs = jnp.concatenate([X, X_NEW])[:, None]

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        features = nngp.sample_features(key, kernel, inputs, width=width)
        matrix = Computed(B_VAR + W_VAR / width * features @ features.T)
        here, there = matrix.rows(len(X))
        process = gp.GP(matrix, here, noise=NOISE)
        law = process.condition(Y, there)
        return process.log_prob(Y), law.mean, law.variance

    return jax.lax.map(one, keys)


def distances(moments: Moments, truth: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Of the mean and of the standard deviation, without the noise of the estimate, and that noise."""
    mean, sd = truth
    parts = {
        "mean": (moments.mean - mean) / sd,
        "sd": 0.5 * np.log(moments.square - moments.mean**2) - np.log(sd),
    }
    overall = {"mean": (moments.law[0] - mean) / sd, "sd": np.log(moments.law[1]) - np.log(sd)}
    found = {}
    for name, part in parts.items():
        noise = np.mean(part.var(axis=0, ddof=1)) / len(part)
        found[name] = float(np.sqrt(max(np.mean(overall[name] ** 2) - noise, 0.0)))
        found[f"{name}_noise"] = float(np.sqrt(noise))
    return found


def main(
    folder: Path,
    depths: Sequence[int] = (1, 2),
    widths: Sequence[int] = (4, 16, 64),
    wider: Sequence[int] = (256,),
    num_samples: int = 500,
    num_draws: int = 20_000,
) -> list[dict]:
    """Runs everything, writes finite_width.png and finite_width.csv, and returns the rows of the table.

    Args:
        folder: where they go.
        depths: hidden layers.
        widths: units in each, for both methods.
        wider: for the second alone.
        num_samples: of a chain, after half as many to warm up.
        num_draws: of the hidden layers; a multiple of eight.
    """
    rows, pictures = [], {}
    for depth in depths:
        truth = limit(depth)
        for width in (*widths, *wider):
            found = {"features": by_features(depth, width, num_draws)}
            if width in widths:
                found["NUTS"], functions = by_nuts(depth, width, num_samples)
                pictures[depth, width] = found["NUTS"].law, functions, truth
            for method, moments in found.items():
                row = {"depth": depth, "width": width, "method": method, "ess": moments.ess}
                rows.append(row | distances(moments, truth))
                print(rows[-1], flush=True)
        save(folder, "finite_width", draw(rows, pictures), rows)  # deeper networks may take long
    return rows


def markdown(rows: list[dict]) -> str:
    """The table of README.md."""
    lines = [
        "| hidden layers, width | method | distance of the mean | of log sd | effective draws |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[name]:.3f} (noise {row[f'{name}_noise']:.3f})" for name in ("mean", "sd")]
        lines.append(f"| {row['depth']}, {row['width']} | {row['method']} | {' | '.join(cells)} | {row['ess']:.0f} |")
    return "\n".join(lines)


def draw(rows: list[dict], pictures: dict):
    """Posterior functions and bands of two standard deviations, and the distances against the width."""
    depths, widths = (list(dict.fromkeys(key[i] for key in pictures)) for i in range(2))
    shape = len(depths), len(widths) + 1
    figure, axes = plt.subplots(*shape, figsize=(3 * shape[1], 2.6 * shape[0]), layout="constrained", squeeze=False)
    for line, depth in zip(axes, depths, strict=True):
        for axis, width in zip(line, widths, strict=False):
            (mean, sd), functions, (exact_mean, exact_sd) = pictures[depth, width]
            axis.plot(X_NEW, functions.T, color="#56B4E9", lw=0.4, alpha=0.6)
            axis.fill_between(X_NEW, mean - 2 * sd, mean + 2 * sd, color="#0072B2", alpha=0.25, lw=0)
            axis.plot(X_NEW, mean, color="#0072B2", label=f"width {width}")
            for sign in (-2, 0, 2):
                axis.plot(X_NEW, exact_mean + sign * exact_sd, "k--", lw=0.9, label="infinite" if sign == 0 else None)
            axis.plot(X, Y, "k.", ms=5)
            axis.set(ylim=(-6, 6), title=f"{depth} hidden layer{'s' * (depth > 1)}, width {width}")
            axis.legend(frameon=False, fontsize=7, loc="lower right")
        for method, color in (("features", "#D55E00"), ("NUTS", "#0072B2")):
            own = [row for row in rows if (row["depth"], row["method"]) == (depth, method)]
            for name, style in (("mean", "o-"), ("sd", "s--")):
                known = [(row["width"], row[name]) for row in own if row[name] > 2 * row[f"{name}_noise"]]
                if known:
                    line[-1].loglog(
                        *zip(*known, strict=True), style, color=color, ms=4, lw=1, label=f"{name}, {method}"
                    )
        ends = np.array([min(row["width"] for row in rows), max(row["width"] for row in rows)])
        line[-1].loglog(ends, 2.0 / ends, color="0.6", lw=0.8, label="2 / width")
        line[-1].set(title="distance to infinite width", xlabel="width")
        line[-1].legend(frameon=False, fontsize=7)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Posteriors of finite networks beside their limit.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    given = parser.parse_args()
    started = time.perf_counter()
    print(markdown(main(given.results)))
    print(f"{time.perf_counter() - started:.0f} s")
