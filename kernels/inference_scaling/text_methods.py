"""The methods that need more than one population, on the host: islands, particle Gibbs, parallel tempering.

The same as in process, with populations that run at the same time where they do not wait for each other. A method is
resumed by being run again: the sweeps that were saved are found by their names, and go on from where they were.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from bayesinf import errors, resampling, weights
from bayesinf.kernels.inference_scaling.methods import (
    Gibbs,
    Islands,
    ParallelTempering,
    Runs,
    evidence_of,
    if_finished,
    pool,
    swap,
)
from bayesinf.kernels.inference_scaling.population import relative_variance
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.selection import Selection
from bayesinf.kernels.inference_scaling.sweep import log_g_of
from bayesinf.kernels.inference_scaling.text_generator import Prefix
from bayesinf.kernels.inference_scaling.text_sweep import TextSweep, run_all

__all__ = ["MakeSweep", "check_method", "collect_runs", "run_text_method"]

MakeSweep = Callable[..., TextSweep]
"""make(name, key, potential, selection, budget, reference=None): a sweep, as far as it was saved."""


async def run_text_method(
    key: Key[Array, ""], method: Any, make: MakeSweep, potential: AbstractPotential, budget: int
) -> None:
    """Runs all sweeps of a method; `collect_runs` makes of them what they found, at any time."""
    if isinstance(method, Selection):
        await make("run", key, potential, method, budget).run()
    elif isinstance(method, Islands):
        keys = jax.random.split(key, method.num_islands)
        shared = budget // method.num_islands
        islands = [make(f"island {k}", keys[k], potential, method.selection, shared) for k in range(len(keys))]
        await run_all([island.run() for island in islands])
    elif isinstance(method, Gibbs):
        await _run_chains(key, method, make, [potential], None, budget)
    elif isinstance(method, ParallelTempering):
        powers = [potential**beta for beta in method.betas]
        await _run_chains(key, method, make, powers, method.betas, budget)
    else:
        raise ValueError(f"{type(method).__name__} runs in process alone; take a method of `METHODS`")


async def _run_chains(
    key: Key[Array, ""],
    method: Gibbs | ParallelTempering,
    make: MakeSweep,
    powers: list[AbstractPotential],
    betas: Array | None,
    budget: int,
) -> None:
    """Conditional sweeps, of one chain or of one at each power."""
    num = len(powers)
    references: Sequence[Prefix | None] = [None] * num
    spent = 0
    for j, key_sweep in enumerate(jax.random.split(key, method.num_sweeps)):
        key_run, key_draw, key_swap = jax.random.split(key_sweep, 3)
        share = (budget - spent) // num
        if share <= 0:
            break
        keys = jax.random.split(key_run, num)
        sweeps = [
            make(f"sweep {j}, chain {m}", keys[m], powers[m], method.selection, share, references[m])
            for m in range(num)
        ]
        await run_all([sweep.run() for sweep in sweeps])
        spent += sum(sweep.num_tokens for sweep in sweeps)
        following = _next_references(key_draw, key_swap, sweeps, powers[0], betas, j % 2)
        if following is None:
            break
        references = following


def _next_references(
    key_draw: Key[Array, ""],
    key_swap: Key[Array, ""],
    sweeps: Sequence[TextSweep],
    potential: AbstractPotential,
    betas: Array | None,
    parity: int,
) -> list[Prefix] | None:
    """An answer of every chain, after neighbours were offered an exchange; None where a chain has none."""
    keys = jax.random.split(key_draw, len(sweeps))
    drawn = [_draw_reference(key, sweep, potential) for key, sweep in zip(keys, sweeps, strict=True)]
    found = [pair for pair in drawn if pair is not None]
    if len(found) < len(sweeps):
        return None
    order = range(len(found)) if betas is None else swap(key_swap, betas, jnp.array([g for _, g in found]), parity)
    return [found[int(m)][0] for m in order]


def _draw_reference(key: Key[Array, ""], sweep: TextSweep, potential: AbstractPotential) -> tuple[Prefix, float] | None:
    """A finished answer drawn by the final weights, if there is one, and the log of its G under this potential."""
    population = sweep.population
    log_weights = jnp.where(jnp.asarray(population.is_done & ~sweep.is_failed), population.log_weights, -jnp.inf)
    if bool(weights.is_degenerate(log_weights)):
        return None
    last = int(resampling.iid(key, log_weights, 1)[0])
    return sweep.prefixes[last], float(log_g_of(potential, population, last))


def collect_runs(method: Any, sweeps: dict[str, TextSweep]) -> Runs:
    """What the sweeps of a method have found so far."""
    done = {name: sweep.result() for name, sweep in sweeps.items()}
    results = list(done.values())
    if isinstance(method, Islands):
        log_w, log_mean = weights.normalize(jnp.stack([s.population.log_evidence for s in results]))
        variances = jnp.stack([relative_variance(s.population) for s in results])
        variance = float(jnp.sum(jnp.exp(2 * log_w) * variances))
        return Runs(results, np.asarray(log_w), *if_finished(results, float(log_mean), variance), [])
    if isinstance(method, Gibbs | ParallelTempering):
        kept = [sweep for name, sweep in done.items() if name.endswith("chain 0")]
        others = [sweep for name, sweep in done.items() if not name.endswith("chain 0")]
        return pool(kept, kept[0], method.burn_in, others)
    evidence, variance = evidence_of(results[0]) if method.has_evidence else (float("nan"), float("nan"))
    return Runs(results, np.zeros(1), evidence, variance, [])


def check_method(method: Any, num_particles: int) -> None:
    """Raises if so few particles do not fit."""
    if isinstance(method, Gibbs | ParallelTempering):
        errors.check_count("num_particles", num_particles, minimum=2)
