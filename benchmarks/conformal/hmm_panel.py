"""Sets for the hidden states of a two-state model: coverage and size over 135 settings, beside blocks.

    P = [[p, 1 - p], [1 - p, p]],   B = [[b, 1 - b], [1 - b, b]],   x_1 uniform,   alpha = 0.2

p in {.1, .3, .5, .7, .9}, b in {.5, .75, .9}, a labelled series of T in {50, 100, 200} steps, and sets for the states
behind the next T1 in {1, 2, 3} observations: the settings of the reference. Each has R independent series. "type" is
the set by all series with the same first state and counts, "block" the reference's group of orders of blocks, cut where
they end; the score is the reference's. "joint" is by type with another score, the default. All break ties at random, so
that each covers with probability 0.8 in every setting, and sizes compare.

    python -m benchmarks.conformal.hmm_panel            # one to two minutes

References:
    Nettasinghe, Chatterjee, Tipireddy and Halappanavar (2023), https://arxiv.org/abs/2305.17200.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bayesinf.models.conformal import hmm_state_set
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
ALPHA = 0.2
STAYS = (0.1, 0.3, 0.5, 0.7, 0.9)
RIGHTS = {0.5: "#0072B2", 0.75: "#009E73", 0.9: "#D55E00"}  # Okabe and Ito's colours
METHODS = {"joint": ("type", "joint"), "type": ("type", "filter"), "block": ("block", "filter")}
STYLES = {"joint": "-", "type": ":", "block": "--"}
NUM_DRAWS = 99  # of block orders, where there are too many to enumerate


@partial(jax.jit, static_argnames=("length", "horizon", "method", "num_runs"))
def run(key, stay, right, *, length: int, horizon: int, method: str, num_runs: int):
    """Whether the set holds the states, and its size relative to all candidates, in independent runs."""
    transition = jnp.array([[stay, 1 - stay], [1 - stay, stay]])
    emission = jnp.array([[right, 1 - right], [1 - right, right]])
    group, score = METHODS[method]
    num_draws = NUM_DRAWS if group == "block" and horizon > 1 else None

    def once(key):
        key_first, key_states, key_symbols, key_ties = jax.random.split(key, 4)

        def step(x, u):
            return jnp.where(u < transition[x, x], x, 1 - x), x

        first = jax.random.randint(key_first, (), 0, 2)
        _, x = jax.lax.scan(step, first, jax.random.uniform(key_states, (length + horizon,)))
        y = jnp.where(jax.random.uniform(key_symbols, x.shape) < emission[x, x], x, 1 - x)
        found = hmm_state_set(
            x[:length],
            y[:length],
            y[length:],
            2,
            2,
            ALPHA,
            score=score,
            group=group,
            key=key_ties,
            num_draws=num_draws,
        )
        index = jnp.ravel_multi_index(tuple(x[length:]), (2,) * horizon, mode="clip")
        return found.mask[index], found.mask.mean()

    return jax.vmap(once)(jax.random.split(key, num_runs))


def main(
    folder: Path,
    lengths: Sequence[int] = (50, 100, 200),
    horizons: Sequence[int] = (1, 2, 3),
    methods: Sequence[str] = tuple(METHODS),
    num_runs: int = 500,
) -> list[dict]:
    """Runs everything, writes hmm_panel.png and hmm_panel.csv, and returns the rows of the table."""
    rows = []
    for setting, (length, horizon, right, stay) in enumerate(product(lengths, horizons, RIGHTS, STAYS)):
        key = jax.random.fold_in(jax.random.key(2023), setting)  # the same series for every method
        for method in methods:
            options = {"length": length, "horizon": horizon, "method": method, "num_runs": num_runs}
            is_held, size = (np.asarray(found, np.float64) for found in run(key, stay, right, **options))
            about = {"T": length, "T1": horizon, "b": right, "p": stay, "method": method, "num_runs": num_runs}
            rows.append(about | {"coverage": is_held.mean(), "size": size.mean(), "sd_of_size": size.std(ddof=1)})
    save(folder, "hmm_panel", draw(rows, lengths, horizons), rows)
    return rows


def draw(rows: list[dict], lengths: Sequence[int], horizons: Sequence[int]):
    """Coverage and relative size against p, one panel for each T and T1."""
    shape = (len(lengths), len(horizons))
    figure, axes = plt.subplots(
        *shape,
        figsize=(3.3 * shape[1], 2.6 * shape[0] + 0.6),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for i, length in enumerate(lengths):
        for j, horizon in enumerate(horizons):
            axis = axes[i, j]
            axis.axhline(1 - ALPHA, color="0.6", lw=0.8)
            for guide in (0.75, 0.85):
                axis.axhline(guide, color="0.6", lw=0.8, ls=":")
            for right, color in RIGHTS.items():
                for method, style in STYLES.items():
                    setting = (length, horizon, right, method)
                    chosen = [row for row in rows if (row["T"], row["T1"], row["b"], row["method"]) == setting]
                    p, coverage, size = ([row[name] for row in chosen] for name in ("p", "coverage", "size"))
                    if method == "joint":
                        axis.plot(p, coverage, color=color, marker="o", ms=4, lw=0, label=f"coverage, $b={right}$")
                    axis.plot(p, size, color=color, ls=style, lw=1.4, label=f"size, $b={right}$, {method}")
            axis.set(ylim=(0, 1), xticks=STAYS)
            axis.set_title(f"$T={length}$, $T_1={horizon}$", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("$p$")
    figure.supylabel(r"coverage, and $E|C| / |S|^{T_1}$", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--num-runs", type=int, default=500, help="independent series of each setting")
    given = parser.parse_args()
    started = time.perf_counter()
    table = main(given.results, num_runs=given.num_runs)
    for method in METHODS:
        chosen = [row for row in table if row["method"] == method]
        coverage, size = (np.array([row[name] for row in chosen]) for name in ("coverage", "size"))
        print(f"{method}: coverage {coverage.mean():.4f}, {coverage.min():.3f} to {coverage.max():.3f}; ", end="")
        print(f"size {size.mean():.4f}")
        for horizon in (1, 2, 3):
            sizes = [size[[(r["T1"], r["b"]) == (horizon, right) for r in chosen]].mean() for right in RIGHTS]
            print(f"    T1={horizon}: size {sizes[0]:.3f} {sizes[1]:.3f} {sizes[2]:.3f}")
    block = [row["size"] for row in table if row["method"] == "block"]
    for method in ("joint", "type"):
        sizes = [row["size"] for row in table if row["method"] == method]
        print(f"{method} is smaller than block in {np.sum(np.less(sizes, block))} of {len(block)} settings")
    print(f"{len(table)} rows in {time.perf_counter() - started:.0f} s")
