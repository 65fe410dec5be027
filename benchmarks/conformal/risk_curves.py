"""What estimates of Markov chains lose: risk against the length of the path, for chains of 2, 4 and 8 states.

Loss is the Kullback-Leibler divergence, and is multiplied by the number of steps n, so that 1 / n is a level line.

    estimation    of all rows of one chain that mixes fast, by adding beta in {1/K, 1/2, 1} to counts; in the limit
                  sum_i (K - 1) / (2 pi_i), whatever beta
    prediction    of the row of the last state, by the rules of `predict_next`; the largest risk of chains that leave
                  every state with probability c / n, c in {1/2, 1, 2, 4, 8}, or are independent draws

The largest risk is over these chains alone, and a lower bound of the worst case.

    python -m benchmarks.conformal.risk_curves          # minutes

References:
    Hao, Orlitsky and Pichapati (2018), https://arxiv.org/abs/1810.11754.
    Han, Jana and Wu (2021), https://arxiv.org/abs/2106.13947.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bayesinf import models
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
STATES = (2, 4, 8)
LENGTHS = (16, 64, 256, 1_024)
COLORS = {"add": "#0072B2", "average": "#D55E00", "minimax": "#009E73"}  # Okabe and Ito's
STYLES = {2: "-", 4: "--", 8: ":"}
SLOWNESS = (0.5, 1.0, 2.0, 4.0, 8.0)


def mixing_chain(num_states: int) -> jnp.ndarray:
    """Rows drawn once, no entry near zero."""
    rows = np.random.default_rng(num_states).dirichlet(np.ones(num_states), num_states)
    return jnp.asarray(0.5 * rows + 0.5 / num_states, float)


def slow_chain(num_states: int, leave: float) -> jnp.ndarray:
    """Leaves every state with one probability, for any other."""
    others = (1 - np.eye(num_states)) / (num_states - 1)
    return jnp.asarray((1 - leave) * np.eye(num_states) + leave * others, float)


def estimation(num_states: int, lengths: Sequence[int], num_runs: int) -> list[dict]:
    """n times the sum of the risks of all rows."""
    chain = mixing_chain(num_states)
    limit = float(np.sum((num_states - 1) / (2 * np.asarray(models.stationary_law(chain), float))))
    rows = []
    for name, beta in (("1/K", 1 / num_states), ("1/2", 0.5), ("1", 1.0)):
        found = models.estimation_risk(0, chain, lengths, num_runs=num_runs, beta=beta)
        for i, n in enumerate(lengths):
            about = {"question": "estimation", "K": num_states, "n": n, "rule": f"beta={name}"}
            error = float(np.linalg.norm(found.standard_error[i]))
            rows.append(about | {"risk": n * float(found.mean[i].sum()), "standard_error": n * error, "limit": limit})
    return rows


def prediction(num_states: int, lengths: Sequence[int], num_runs: int) -> list[dict]:
    """n times the largest risk over chains, by each rule."""
    rows = []
    for rule in ("add", "average", *(("minimax",) if num_states == 2 else ())):
        for n in lengths:
            leaves = [*(c / n for c in SLOWNESS), (num_states - 1) / num_states]
            chains = [slow_chain(num_states, leave) for leave in leaves]
            found = [models.prediction_risk(1, one, n, method=rule, num_runs=num_runs) for one in chains]
            worst = max(found, key=lambda risk: float(risk.mean))
            about = {"question": "prediction", "K": num_states, "n": n, "rule": rule}
            risk, error = n * float(worst.mean), n * float(worst.standard_error)
            rows.append(about | {"risk": risk, "standard_error": error, "limit": ""})
    return rows


def main(
    folder: Path, states: Sequence[int] = STATES, lengths: Sequence[int] = LENGTHS, num_runs: int = 10_000
) -> list[dict]:
    """Runs everything, writes risk_curves.png and risk_curves.csv, and returns the rows of the table."""
    rows = []
    for num_states in states:
        rows += estimation(num_states, lengths, num_runs // 4)
        rows += prediction(num_states, lengths, num_runs)
    save(folder, "risk_curves", draw(rows, states), rows)
    return rows


def draw(rows: list[dict], states: Sequence[int]):
    """Estimation for each K on the left, prediction on the right."""
    figure, axes = plt.subplots(1, len(states) + 1, figsize=(3.6 * (len(states) + 1), 3.4), layout="constrained")
    for axis, num_states in zip(axes, states, strict=False):
        chosen = [row for row in rows if (row["question"], row["K"]) == ("estimation", num_states)]
        for rule, color in zip(dict.fromkeys(row["rule"] for row in chosen), COLORS.values(), strict=True):
            curve(axis, [row for row in chosen if row["rule"] == rule], color=color, label=rule)
        axis.axhline(chosen[0]["limit"], color="0.5", lw=0.8, label="limit")
        axis.set(title=f"estimation, K = {num_states}", xlabel="n")
        axis.legend(frameon=False, fontsize=8)
    for rule, color in COLORS.items():
        for num_states in states:
            chosen = [
                row for row in rows if (row["question"], row["K"], row["rule"]) == ("prediction", num_states, rule)
            ]
            if chosen:
                label = f"{rule}, K = {num_states}"
                curve(axes[-1], chosen, color=color, ls=STYLES.get(num_states, "-"), label=label)
    axes[-1].set(title="prediction, largest risk", xlabel="n", yscale="log", ylim=(0.7, 700))
    axes[-1].legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
    axes[0].set_ylabel("n times the risk (nats)")
    for axis in axes:
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def curve(axis, rows: list[dict], **style) -> None:
    n, risk, error = (np.array([row[name] for row in rows]) for name in ("n", "risk", "standard_error"))
    axis.errorbar(n, risk, 2 * error, marker="o", ms=3, lw=1.2, **style)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Risk curves of Markov chain estimation.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--num-runs", type=int, default=10_000, help="independent paths of each prediction")
    given = parser.parse_args()
    started = time.perf_counter()
    for row in main(given.results, num_runs=given.num_runs):
        limit = f", limit {row['limit']:.3f}" if row["limit"] else ""
        print(f"{row['question']}, K={row['K']}, n={row['n']}, {row['rule']}: ", end="")
        print(f"n x risk {row['risk']:.3f} +- {row['standard_error']:.3f}{limit}")
    print(f"{time.perf_counter() - started:.0f} s")
