"""Accuracy against an equal budget of tokens, of every method, where the score means one thing or the other.

The chain of `reasoning_chain`: T = 20 steps, M = 8 branches, U = 64 forms, and 500 problems, each with a verifier of
its own. Every method generates at most n T tokens, one a step: n answers, or populations that share them. Two regimes:

    step     scores say whether a step is right, logits +-1 with noise of 2.5; a wrong branch stays wrong
    value    scores guess the probability of a right answer, with noise of 2.5 in logits and wrong branches that fool
             the verifier at every step; one step in fifty finds back

A method takes the last score as its reward, and odds as its weights, as published, unless its name says otherwise. In
the regime of values the filter and those after it take the scores as values, which is what they are.

    python -m benchmarks.inference_scaling.budget
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array

from bayesinf import weights
from bayesinf.kernels.inference_scaling import METHODS, Gibbs, Islands, ParallelTempering, Potential, Selection
from bayesinf.kernels.inference_scaling.methods import exchange, run_tempered
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.sweep import Reference, Sweep, draw_reference, run_sweep
from benchmarks.inference_scaling.reasoning_chain import (
    ReasoningChain,
    Verifier,
    constant_error,
    step_verifier,
    value_verifier,
)

RESULTS = Path(__file__).parent / "results"
UNLIMITED = np.int32(2**31 - 1)
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
    """A method, and what its scores are taken for; None for what fits the regime."""

    method: Any
    options: dict[str, str] | None
    rule: str


def contenders() -> dict[str, Contender]:
    """All of `METHODS` that run in process, and a search that multiplies the scores."""
    last = {"kind": "odds"}
    values = {"kind": "value"}
    options = {
        "best_of_n": last,
        "weighted_best_of_n": last,
        "majority": last,
        "beam": last,
        "dvts": last,
        "svdd": last,
        "particle_filter_published": last,
        "twisted_smc": values,
        "fk_steering": values,
    }
    listed = {}
    for name, build in METHODS.items():
        if name in ("cascade", "a_star"):  # of the host, one program for a step and not for all problems at once
            continue
        method = build()
        rule = "argmax" if name == "best_of_n" else getattr(method, "selection", method).rule
        listed[name] = Contender(method, options.get(name), rule)
    listed["dvts_product"] = Contender(METHODS["dvts"](), {"kind": "odds", "aggregate": "prod"}, "weighted_majority")
    return listed


Runs = tuple[Sweep, Array, Array]


def populations(key: Array, method: Any, chain: ReasoningChain, potential: AbstractPotential, budget: int) -> Runs:
    """The populations whose answers count, stacked; their log weights; and the tokens of all."""
    limit = jnp.asarray(UNLIMITED)
    selection = method if isinstance(method, Selection) else method.selection
    potential = selection.prepare(potential)
    num = budget // getattr(method, "num_populations", 1)
    if isinstance(method, Selection):
        only = jax.tree.map(lambda leaf: leaf[None], run_sweep(key, chain, potential, method, None, num, limit))
        return only, jnp.zeros(1), cost(only)
    if isinstance(method, Islands):
        keys = jax.random.split(key, method.num_islands)
        stacked = jax.vmap(lambda key: run_sweep(key, chain, potential, selection, None, num, limit))(keys)
        return stacked, weights.normalize(stacked.population.log_evidence)[0], cost(stacked)
    if isinstance(method, Gibbs):
        return _gibbs(key, method, chain, potential, num)
    if isinstance(method, ParallelTempering):
        return _tempering(key, method, chain, potential, num)
    raise ValueError(f"method must be one of METHODS, got {type(method).__name__}")


def _gibbs(key: Array, method: Gibbs, chain: ReasoningChain, potential: AbstractPotential, num: int) -> Runs:
    """`Gibbs.run` without its budget, to be mapped over problems."""
    key_first, key_sweeps = jax.random.split(key)

    def sweep(key: Array, reference: Reference | None) -> tuple[Reference, Sweep]:
        key_run, key_draw = jax.random.split(key)
        limit = jnp.asarray(UNLIMITED)
        done = run_sweep(key_run, chain, potential, method.selection, None, num, limit, reference)
        return draw_reference(key_draw, chain, potential, done)[0], done

    reference, first = sweep(key_first, None)
    keys = jax.random.split(key_sweeps, method.num_sweeps - 1)
    _, later = jax.lax.scan(lambda reference, key: sweep(key, reference), reference, keys)
    # all but the first count, which is the burn-in by default
    return later, jnp.zeros(len(keys)), cost(first) + cost(later)


def _tempering(
    key: Array, method: ParallelTempering, chain: ReasoningChain, potential: AbstractPotential, num: int
) -> Runs:
    """`ParallelTempering.run`, likewise."""
    key_first, key_sweeps = jax.random.split(key)

    def sweep(key: Array, references: Reference | None, parity: Any) -> tuple[Reference, Sweep]:
        key_run, key_exchange = jax.random.split(key)
        arguments = (chain, potential, method.selection, None, num, jnp.asarray(UNLIMITED), method.betas, references)
        done = run_tempered(key_run, *arguments)
        return exchange(key_exchange, chain, potential, done, method.betas, parity), done

    references, first = sweep(key_first, None, 0)
    js = jnp.arange(1, method.num_sweeps)
    keys = jax.random.split(key_sweeps, js.shape[0])
    _, later = jax.lax.scan(lambda refs, row: sweep(row[0], refs, row[1] % 2), references, (keys, js))
    coldest = jax.tree.map(lambda leaf: leaf[:, 0], later)
    return coldest, jnp.zeros(len(keys)), cost(first) + cost(later)


def cost(sweeps: Sweep) -> Array:
    """Tokens that were generated."""
    return jnp.sum(sweeps.records.num_tokens)


def is_right(log_votes: Array, log_rewards: Array, answers: Array) -> dict[str, Array]:
    """Whether each rule finds answer 0; of equal ones the first that was written, as in `Inference.best`."""
    totals = jnp.zeros(NUM_BRANCHES).at[answers].add(jnp.exp(log_votes - jnp.max(log_votes)))
    chosen = {"weighted_majority": jnp.argmax(totals[answers]), "argmax": jnp.argmax(log_rewards)}
    return {rule: answers[index] == 0 for rule, index in chosen.items()}


@partial(jax.jit, static_argnames=("options", "budget"))
def solve(
    keys: Array,
    method: Any,
    chain: ReasoningChain,
    verifiers: Verifier,
    options: tuple[tuple[str, str], ...],
    budget: int,
) -> tuple[dict[str, Array], Array]:
    """Whether each rule solves each problem, and what it cost."""
    selection = method if isinstance(method, Selection) else method.selection

    def one(arguments: tuple[Array, Verifier]) -> tuple[dict[str, Array], Array]:
        key, verifier = arguments
        potential = Potential(verifier, **dict(options))
        sweeps, log_run_weights, num_tokens = populations(key, method, chain, potential, budget)
        log_votes = jax.vmap(selection.log_votes)(sweeps.population) + log_run_weights[:, None]
        answers = jax.vmap(lambda state: state.last[1])(sweeps.state)
        leaves = (log_votes, sweeps.population.log_reward, answers)
        return is_right(*(leaf.reshape(-1) for leaf in leaves)), num_tokens

    return jax.lax.map(one, (keys, verifiers), batch_size=min(len(keys), 250))


def is_possible(method: Any, budget: int) -> bool:
    """Whether the budget allows two answers of every population, and whole groups."""
    num = budget // getattr(method, "num_populations", 1)
    return num >= 2 and num % getattr(method, "width", 1) == 0


def main(
    folder: Path = RESULTS,
    budgets: Sequence[int] = (8, 16, 32, 64),
    num_problems: int = 500,
    names: Sequence[str] | None = None,
) -> list[dict]:
    """Runs everything, writes budget.png and budget.csv, and returns the rows of the table."""
    rows: list[dict] = []
    for regime_name, regime in regimes().items():
        key_problems, key_runs = jax.random.split(jax.random.key(2025))
        build = partial(regime.verifier, chain=regime.chain)
        verifiers = jax.jit(jax.vmap(build))(jax.random.split(key_problems, num_problems))
        keys = jax.random.split(key_runs, num_problems)
        for name, contender in contenders().items():
            if names is not None and name not in names:
                continue
            for budget in budgets:
                if not is_possible(contender.method, budget):
                    continue
                options = tuple((contender.options or {"kind": regime.kind}).items())
                right, num_tokens = solve(keys, contender.method, regime.chain, verifiers, options, budget)
                for rule, values in right.items():
                    share = float(np.mean(values))
                    rows.append(
                        {
                            "regime": regime_name,
                            "method": name,
                            "rule": rule,
                            "is_own_rule": rule == contender.rule,
                            "budget": budget * NUM_STEPS,
                            "num_tokens": float(np.mean(num_tokens)),
                            "num_problems": num_problems,
                            "accuracy": share,
                            "half_width": half_width(share, num_problems),
                        }
                    )
            print(
                regime_name,
                name,
                [
                    round(r["accuracy"], 3)
                    for r in rows
                    if r["is_own_rule"] and (r["regime"], r["method"]) == (regime_name, name)
                ],
                flush=True,
            )
    save(folder, "budget", draw(rows), rows)
    return rows


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
    main(parser.parse_args().results)
