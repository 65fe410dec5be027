"""Conformal Bayes on the diabetes data: what a wrong prior costs a Bayesian interval, and a conformal one does not.

    y ~ N(b_0 + b . x, tau^2),   b_j ~ Laplace(0, s),   s ~ Gamma(1, 1),   tau ~ HalfNormal(c)

of standardised y and x, 442 patients of which 70% are trained on, 50 splits, sets at alpha = 0.2. With c = 1 the prior
says little; with c = 0.02 it insists on a noise fifty times too small. The posterior is drawn by NUTS; the Bayesian
interval is that of the central quantiles of the predictive law, the conformal set `conformal_bayes` of the same draws.

Reported by the reference, coverage and length: Bayes .806, 1.84 and conformal Bayes .808, 1.87 with c = 1; Bayes .563,
1.15 and conformal Bayes .809, 1.87 with c = 0.02. The data come with scikit-learn, which must be installed.

    python -m benchmarks.conformal.diabetes             # minutes

References:
    Fong and Holmes (2021), https://arxiv.org/abs/2106.06137.
    Efron, Hastie, Johnstone and Tibshirani (2004), doi:10.1214/009053604000000067 (the data).
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesinf as bi
from bayesinf.models import conformal
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.2
NUM_GRID = 200


def regression(x, y, c):
    """The model; c is an argument, so that both priors are one compiled program."""
    scale = numpyro.sample("scale", dist.Gamma(1.0, 1.0))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 10.0))
    slopes = numpyro.sample("slopes", dist.Laplace(jnp.zeros(x.shape[1]), scale))
    tau = numpyro.sample("tau", dist.HalfNormal(c))
    numpyro.sample("y", dist.Normal(intercept + x @ slopes, tau), obs=y)


def log_lik(theta, x, y):
    """Of one patient, given one draw."""
    return dist.Normal(theta["intercept"] + theta["slopes"] @ x, theta["tau"]).log_prob(y)


def load() -> tuple[np.ndarray, np.ndarray]:
    """Covariates and outcomes, standardised."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def bayes_interval(key, draws, x_new):
    """Central quantiles of the predictive law, by one outcome of every draw."""
    mean = draws["intercept"][:, None] + draws["slopes"] @ x_new.T
    outcomes = mean + draws["tau"][:, None] * jax.random.normal(key, mean.shape)
    return jnp.quantile(outcomes, ALPHA / 2, axis=0), jnp.quantile(outcomes, 1 - ALPHA / 2, axis=0)


def main(folder: Path, num_splits: int = 50, num_samples: int = 500, data=None) -> list[dict]:
    """Runs both priors on all splits, writes diabetes.png and diabetes.csv, and returns the rows of the table."""
    x, y = load() if data is None else data
    grid = jnp.linspace(float(y.min()) - 2.0, float(y.max()) + 2.0, NUM_GRID)
    num_train = int(0.7 * len(y))
    rows = []
    for c in (1.0, 0.02):
        for split in range(num_splits):
            order = np.random.default_rng(split).permutation(len(y))
            train, test = order[:num_train], order[num_train:]
            arrays = jnp.asarray(x[train], float), jnp.asarray(y[train], float)
            target = bi.Target.from_numpyro(regression, *arrays, jnp.asarray(c))
            draws = bi.sample(
                split,
                bi.kernels.NUTS(target, step_size=0.1),
                target.init(split, num_chains=4),
                num_samples=num_samples,
                num_warmup=num_samples,
                constrain=target.constrain,
                progress=False,
            )
            flat = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(-1, *leaf.shape[2:]), dict(draws.samples))
            x_new, y_new = jnp.asarray(x[test], float), y[test]
            lower, upper = bayes_interval(jax.random.key(split), flat, x_new)
            begin = time.perf_counter()
            found = jax.block_until_ready(conformal.conformal_bayes(log_lik, flat, arrays, x_new, grid, ALPHA))
            seconds = time.perf_counter() - begin
            # the ends of a set are candidates outside of it; as many candidates as are in it measure its length
            inside = jnp.sum(found.is_in, axis=1) * (grid[1] - grid[0])
            ends = {"Bayes": (lower, upper, upper - lower), "conformal Bayes": (found.lower, found.upper, inside)}
            for method, (low, high, length) in ends.items():
                rows.append(
                    {
                        "prior": c,
                        "split": split,
                        "method": method,
                        "coverage": float(np.mean((np.asarray(low) <= y_new) & (y_new <= np.asarray(high)))),
                        "length": float(jnp.mean(length)),
                        "seconds": seconds if method == "conformal Bayes" else 0.0,
                    }
                )
    save(folder, "diabetes", draw(rows), rows)
    return rows


def draw(rows: list[dict]):
    """Coverage of the splits, by prior and method."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
    for axis, c in zip(axes, (1.0, 0.02), strict=True):
        for place, (method, color) in enumerate((("Bayes", "#D55E00"), ("conformal Bayes", "#0072B2"))):
            coverage = [row["coverage"] for row in rows if row["prior"] == c and row["method"] == method]
            axis.plot(np.linspace(place - 0.2, place + 0.2, len(coverage)), coverage, ".", color=color, ms=4)
            axis.plot([place - 0.3, place + 0.3], [np.mean(coverage)] * 2, color=color)
        axis.axhline(1 - ALPHA, color="0.5", lw=0.8, ls="--")
        axis.set_title(f"noise ~ HalfNormal({c:g})", fontsize=9)
        axis.set_xticks([0, 1], ["Bayes", "conformal Bayes"])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("coverage of a split")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Conformal Bayes on the diabetes data.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--splits", type=int, default=50)
    given = parser.parse_args()
    table = main(given.results, given.splits)
    for c in (1.0, 0.02):
        for method in ("Bayes", "conformal Bayes"):
            own = [row for row in table if row["prior"] == c and row["method"] == method]
            means = {name: np.mean([row[name] for row in own]) for name in ("coverage", "length", "seconds")}
            print(f"c = {c:g}, {method}: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
