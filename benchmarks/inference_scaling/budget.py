"""Accuracy against an equal budget of tokens, of every method, where the score means one thing or the other.

The chain of `reasoning_chain`: T = 20 steps, M = 8 branches, U = 64 forms, and 500 problems, each with a verifier of
its own. Every method generates at most n T tokens, one a step: n answers, or populations that share them. Two regimes:

    step     scores say whether a step is right, logits +-1 with noise of 2.5; a wrong branch stays wrong
    value    scores guess the probability of a right answer, with noise of 2.5 in logits and wrong branches that fool
             the verifier at every step; one step in fifty finds back

A method takes the last score as its reward, and odds as its weights, as published, unless its name says otherwise. In
the regime of values the filter and those after it take the scores as values, which is what they are.

The cascade and A*-decoding run on the host, a step at a time, on fewer of the problems; the cascade begins with half
as many answers as the budget would pay for.

    python -m benchmarks.inference_scaling.budget
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array

from bayesinf.errors import SamplingWarning
from bayesinf.kernels.inference_scaling import METHODS, FKSteering, Potential, infer
from benchmarks.inference_scaling.reasoning_chain import (
    ReasoningChain,
    Verifier,
    constant_error,
    step_verifier,
    value_verifier,
)

RESULTS = Path(__file__).parent / "results"
RIGHT = "0"
NUM_STEPS, NUM_BRANCHES, NUM_FORMS = 20, 8, 64


class Regime(NamedTuple):
    """What the scores are, and what the filters take them for."""

    chain: ReasoningChain
    verifier: Callable[..., Verifier]
    kind: str


def regimes() -> dict[str, Regime]:
    """By name."""
    sizes = (NUM_BRANCHES, NUM_STEPS, NUM_FORMS)
    return {
        "step": Regime(constant_error(*sizes, 0.109), partial(step_verifier, strength=1.0, sigma=2.5), "odds"),
        "value": Regime(constant_error(*sizes, 0.109, 0.02), partial(value_verifier, sigma=2.5, fooled=1.5), "value"),
    }


class Contender(NamedTuple):
    """A method.

    Attributes:
        method: the object.
        options: what its scores are taken for; None for what fits the regime.
        rule: by which its best answer is chosen.
        is_on_host: whether it runs step by step on the host.
    """

    method: Any
    options: dict[str, str] | None
    rule: str
    is_on_host: bool = False


def contenders() -> dict[str, Contender]:
    """All of `METHODS`, and a search that multiplies the scores."""
    last = {"kind": "odds"}
    values = {"kind": "value"}
    options = {
        "best_of_n": last,
        "weighted_best_of_n": last,
        "majority": last,
        "beam": last,
        "dvts": last,
        "svdd": last,
        "a_star": last,
        "particle_filter_published": last,
        "twisted_smc": values,
        "fk_steering": values,
    }
    listed = {}
    for name, build in METHODS.items():
        method = build()
        rule = getattr(method, "selection", method).rule
        listed[name] = Contender(method, options.get(name), rule, hasattr(method, "start"))
    # as published; by differences it is the particle filter of values
    listed["fk_steering"] = listed["fk_steering"]._replace(method=FKSteering(spread="max"))
    listed["dvts_product"] = Contender(METHODS["dvts"](), {"kind": "odds", "aggregate": "prod"}, "weighted_majority")
    return listed


def solve(
    keys: Array, contender: Contender, chain: ReasoningChain, verifiers: Verifier, options: dict[str, str], budget: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Whether each rule solves each problem, and what it cost, for as many answers as the budget pays for."""
    # A*-decoding has a number of first steps of its own, and the cascade room to grow
    num = None if contender.is_on_host else budget // getattr(contender.method, "num_populations", 1)
    right: dict[str, list[bool]] = {rule: [] for rule in ("weighted_majority", "argmax")}
    num_tokens = []
    for i, key in enumerate(keys):
        potential = Potential(jax.tree.map(lambda leaf, i=i: leaf[i], verifiers), **options)
        with warnings.catch_warnings():  # what was not finished is not right
            warnings.simplefilter("ignore", SamplingWarning)
            result = infer(
                key,
                chain,
                potential,
                method=contender.method,
                num_particles=num,
                budget=budget * chain.max_steps,
                throw=False,
            )
        for rule, found in right.items():
            found.append(result.best(rule) == RIGHT)
        num_tokens.append(result.tokens.generated)
    return {rule: np.array(found) for rule, found in right.items()}, np.array(num_tokens)


def is_possible(method: Any, budget: int) -> bool:
    """Whether the budget allows two answers of every population, and whole groups."""
    if hasattr(method, "start"):
        return True
    num = budget // getattr(method, "num_populations", 1)
    return num >= 2 and num % getattr(method, "width", 1) == 0


def main(
    folder: Path = RESULTS,
    budgets: Sequence[int] = (8, 16, 32, 64),
    num_problems: int = 500,
    num_problems_on_host: int = 50,
    names: Sequence[str] | None = None,
    settings: dict[str, Regime] | None = None,
) -> list[dict]:
    """Runs everything, writes budget.png and budget.csv, and returns the rows of the table.

    Args:
        folder: where they go.
        budgets: in answers of full length.
        num_problems: of each regime.
        num_problems_on_host: the first so many, for methods that run on the host, one step at a time.
        names: of methods; all if None.
        settings: regimes by name; `regimes()` if None.
    """
    rows: list[dict] = []
    for regime_name, regime in (regimes() if settings is None else settings).items():
        key_problems, key_runs = jax.random.split(jax.random.key(2025))
        build = partial(regime.verifier, chain=regime.chain)
        verifiers = jax.jit(jax.vmap(build))(jax.random.split(key_problems, num_problems))
        keys = jax.random.split(key_runs, num_problems)
        for name, contender in contenders().items():
            if names is not None and name not in names:
                continue
            num = min(num_problems, num_problems_on_host) if contender.is_on_host else num_problems
            began = time.perf_counter()
            mine: list[dict] = []
            for budget in budgets:
                if not is_possible(contender.method, budget):
                    continue
                options = contender.options or {"kind": regime.kind}
                right, num_tokens = solve(keys[:num], contender, regime.chain, verifiers, options, budget)
                for rule, values in right.items():
                    share = float(np.mean(values))
                    mine.append(
                        {
                            "regime": regime_name,
                            "method": name,
                            "rule": rule,
                            "is_own_rule": rule == contender.rule,
                            "budget": budget * regime.chain.max_steps,
                            "num_tokens": float(np.mean(num_tokens)),
                            "num_problems": num,
                            "accuracy": share,
                            "half_width": half_width(share, num),
                        }
                    )
            rows += mine
            shares = [round(r["accuracy"], 3) for r in mine if r["is_own_rule"]]
            print(regime_name, name, shares, f"{time.perf_counter() - began:.0f} s", flush=True)
    save(folder, "budget", draw(rows), rows)
    print(markdown(rows))
    return rows


def markdown(rows: list[dict]) -> str:
    """The tables of README.md: by the highest reward, by weighted majority."""
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for regime in dict.fromkeys(row["regime"] for row in rows):
        lines += [f"\n{regime}\n", f"| tokens | {' | '.join(map(str, budgets))} |", "|---" * (1 + len(budgets)) + "|"]
        here = [row for row in rows if row["regime"] == regime]
        for name in dict.fromkeys(row["method"] for row in here):
            found = {(r["budget"], r["rule"]): f"{r['accuracy']:.3f}".lstrip("0") for r in here if r["method"] == name}
            cells = [
                ", ".join(found[budget, rule] for rule in ("argmax", "weighted_majority") if (budget, rule) in found)
                for budget in budgets
            ]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def half_width(share: float, num: int) -> float:
    """Of the 95% interval of a share of independent problems (Agresti and Coull)."""
    centre = (share * num + 2) / (num + 4)
    return 1.96 * float(np.sqrt(centre * (1 - centre) / (num + 4)))


# Okabe and Ito's colours; what is like the filter is solid, searches are dashed, independent answers dotted
STYLES = {
    "particle_filter": ("#0072B2", "-", "o"),
    "particle_filter_published": ("#56B4E9", "-", "v"),
    "entropic": ("#009E73", "-", "^"),
    "twisted_smc": ("#CC79A7", "-", "s"),
    "fk_steering": ("#999999", "-", "D"),
    "particle_gibbs": ("#D55E00", "-", "<"),
    "parallel_tempering": ("#E69F00", "-", ">"),
    "islands": ("#000000", "-", "P"),
    "beam": ("#009E73", "--", "o"),
    "dvts": ("#D55E00", "--", "s"),
    "dvts_product": ("#E69F00", "--", "D"),
    "svdd": ("#CC79A7", "--", "^"),
    "best_of_n": ("#0072B2", ":", "o"),
    "weighted_best_of_n": ("#D55E00", ":", "s"),
    "majority": ("#999999", ":", "^"),
    "cascade": ("#000000", "--", "X"),
    "a_star": ("#56B4E9", "--", "*"),
}
TITLES = {"step": "scores say whether steps are right", "value": "scores guess the final reward"}


def draw(rows: list[dict]):
    """Accuracy by the methods' own rules, a column for each regime; by the weighted majority below."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), sharex=True, sharey=True, layout="constrained")
    for column, (regime, title) in zip(axes.T, TITLES.items(), strict=True):
        for axis, is_chosen in zip(
            column, (lambda r: r["is_own_rule"], lambda r: r["rule"] == "weighted_majority"), strict=True
        ):
            for name, (color, line, marker) in STYLES.items():
                mine = [r for r in rows if r["regime"] == regime and r["method"] == name and is_chosen(r)]
                if mine:
                    xs, ys, halves = ([r[k] for r in mine] for k in ("budget", "accuracy", "half_width"))
                    style = {"color": color, "ls": line, "marker": marker, "ms": 4.5, "lw": 1.3, "capsize": 2}
                    axis.errorbar(xs, ys, halves, **style, label=name.replace("_", " "))
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.25, lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title)
        column[1].set_xlabel("tokens")
    axes[0, 0].set_ylabel("accuracy, by each method's own rule")
    axes[1, 0].set_ylabel("accuracy, by weighted majority")
    ticks = sorted({r["budget"] for r in rows})
    axes[1, 0].set_xticks(ticks, [str(t) for t in ticks])
    axes[1, 0].minorticks_off()
    axes[1, 0].set_xlim(0.85 * ticks[0], 1.18 * ticks[-1])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def save(folder: Path, name: str, figure: Any, rows: list[dict]) -> None:
    """Writes `name`.png and `name`.csv, numbers to four digits."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--problems", type=int, default=500, help="of each regime")
    parser.add_argument("--problems-on-host", type=int, default=50, help="for the cascade and A*-decoding")
    arguments = parser.parse_args()
    main(arguments.results, num_problems=arguments.problems, num_problems_on_host=arguments.problems_on_host)
