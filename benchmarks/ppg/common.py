"""What the experiments with Parisian particle Gibbs share: intervals, colours, results on disk, and learning.

    m +- t_{R-1}(0.975) s / sqrt(R)

is the 95% confidence interval of a mean over R independent runs, with s their standard deviation.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.stats

from bayesinf.kernels import score_ascent

RESULTS = Path(__file__).parent / "results"

# Okabe and Ito's colours, which remain distinct without colour vision
COLORS = {"ppg": "#0072B2", "paris": "#D55E00", "backward": "#009E73", "gibbs": "#CC79A7"}
MARKERS = {"ppg": "o", "paris": "s", "backward": "^", "gibbs": "D"}
LABELS = {
    "ppg": "Parisian particle Gibbs",
    "paris": "PaRIS",
    "backward": "backward sampling",
    "gibbs": "particle Gibbs",
}
SHORT = {"ppg": "PPG", "paris": "PaRIS", "backward": "backward", "gibbs": "Gibbs"}


def arguments(description: str) -> argparse.Namespace:
    """--full and --results of the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="larger sizes, as in the literature: hours")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    return parser.parse_args()


def half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95% confidence interval of the mean over the leading axis."""
    num = len(values)
    return scipy.stats.t(num - 1).ppf(0.975) * np.std(values, axis=0, ddof=1) / np.sqrt(num)


def save(folder: Path, name: str, figure: Any, rows: list[dict[str, Any]]) -> None:
    """Writes `name`.png and `name`.csv, numbers to four digits."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float | np.floating) else v for k, v in row.items()})


def sizes(budget: int) -> dict[str, dict[str, int]]:
    """What each estimator does with `budget` particles a time step and iteration: sweeps times particles is equal.

    The two Gibbs samplers take two sweeps of half as many particles, and average both.
    """
    gibbs = {"num_particles": budget // 2, "num_sweeps": 2}
    return {
        "ppg": gibbs,
        "paris": {"num_particles": budget},
        "backward": {"num_particles": budget},
        "gibbs": gibbs,
    }


def learn(
    build: Callable,
    start: Any,
    ys: jax.Array,
    *,
    estimator: str,
    budget: int,
    num_iterations: int,
    num_runs: int,
    step_size: float,
    proposal: str = "bootstrap",
) -> tuple[np.ndarray, Any]:
    """Independent runs of score ascent by Adam, whose steps fall linearly to zero.

    Returns:
        The parameters after every iteration, shape (runs, iterations, parameters), and the average over the last half
        of the iterations, as a pytree with a leading axis of runs.
    """
    options = {"optimizer": optax.adam(optax.polynomial_schedule(step_size, 0.0, 1, num_iterations)), "throw": False}
    options |= {"num_iterations": num_iterations, "estimator": estimator, "proposal": proposal, "method": "exact"}

    @jax.jit
    def run_all(keys):
        def run(key):
            found = score_ascent(key, build, start, ys, **options, **sizes(budget)[estimator])
            trace = jax.vmap(lambda theta: jax.flatten_util.ravel_pytree(theta)[0])(found.trace)
            return trace, found.theta, found.num_failed

        return jax.vmap(run)(keys)

    trace, theta, num_failed = run_all(jax.random.split(jax.random.key(2023), num_runs))
    if np.any(num_failed):
        print(f"{estimator}: all weights vanished in {np.sum(num_failed)} of {num_runs * num_iterations} iterations")
    return np.asarray(trace, np.float64), theta
