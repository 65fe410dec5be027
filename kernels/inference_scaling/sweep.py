"""One run of a population in process, as one compiled loop: choose who goes on, generate, score, weigh.

With a reference the run is conditional on it: slot 0 retraces the reference, whatever the others do, and the free
ancestors are drawn independently, among them the reference's prefixes. From a reference that follows the posterior,
the final line drawn by the weights follows it too, for every number of particles.

References:
    Andrieu, Doucet, Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import resampling, weights
from bayesinf.kernels.inference_scaling.generator import StepGenerator, StepInfo
from bayesinf.kernels.inference_scaling.population import (
    Population,
    Record,
    found,
    inherit,
    keep_places,
    stack_records,
    weigh,
)
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.selection import Selection

__all__ = ["Reference", "Sweep", "begin_step", "draw_reference", "log_g_of", "run_sweep"]


class Reference(NamedTuple):
    """A finished answer.

    Attributes:
        state: the generator's, of a population whose first particle it is.
        log_ratio: log p - log q of each of its steps.
        num_steps: that it took.
    """

    state: PyTree
    log_ratio: Float[Array, " t"]
    num_steps: Int[Array, ""]


class Sweep(NamedTuple):
    """A run.

    Attributes:
        state: the generator's, at the end.
        population: the particles, at the end.
        records: of every step; zeros after the last.
        num_steps: how many were taken.
    """

    state: PyTree
    population: Population
    records: Record
    num_steps: Int[Array, ""]


def begin_step(
    key: Key[Array, ""],
    selection: Any,
    population: Population,
    t: Int[Array, ""],
    max_steps: int,
    is_conditional: bool = False,
) -> tuple[Population, Int[Array, " N"], Bool[Array, ""], Key[Array, ""]]:
    """Who goes on at step t: what they start from, the ancestors, whether they were chosen, and the key to move by."""
    key_choose, key_move = jax.random.split(jax.random.fold_in(key, t))
    if is_conditional:
        choice = _choose_with_reference(key_choose, selection, population)
    else:
        choice = selection.choose(key_choose, population, t, max_steps)
    own = jnp.arange(population.is_done.shape[0], dtype=jnp.int32)
    is_first = t == 0
    ancestors = jnp.where(is_first, own, choice[0])
    log_carried = jnp.where(is_first, population.log_weights, choice[1])
    is_resampled = choice[2] & ~is_first
    # the free ancestors of a conditional run are independent whatever the scheme
    scheme = "multinomial" if is_conditional else getattr(selection, "scheme", "multinomial")
    population = inherit(population, ancestors, log_carried, is_resampled, scheme)
    return population, ancestors, is_resampled, key_move


@partial(jax.jit, static_argnames="num_particles")
def run_sweep(
    key: Key[Array, ""],
    generator: StepGenerator,
    potential: AbstractPotential,
    selection: Selection,
    prompt: PyTree,
    num_particles: int,
    budget: Int[Array, ""],
    reference: Reference | None = None,
) -> Sweep:
    """A run until all particles have finished or died, or the budget is spent."""
    key_start, key_steps = jax.random.split(key)
    state = generator.init(key_start, prompt, num_particles)
    population = found(potential, num_particles)

    def step(state: PyTree, population: Population, t: Array) -> tuple[PyTree, Population, Record]:
        is_conditional = reference is not None
        population = population._replace(features=selection.describe(state))
        begun = begin_step(key_steps, selection, population, t, generator.max_steps, is_conditional)
        population, ancestors, is_resampled, key_move = begun
        # whether or not any row moves: through a conditional all of a cache would be copied
        state = generator.gather(state, ancestors)
        state, info = generator.step(key_move, state)
        if reference is not None:
            state, info = _retrace(generator, reference, state, info, t)
        log_scores = potential.scores(state)
        _check_scores(log_scores, num_particles)
        population, record = weigh(population, potential, log_scores, info, ancestors, is_resampled)
        return state, population, record

    def go_on(carry: Any) -> Array:
        t, num_tokens, _, population, _ = carry
        is_alive = ~weights.is_degenerate(population.log_weights)
        return (t < generator.max_steps) & ~jnp.all(population.is_done) & is_alive & (num_tokens < budget)

    def body(carry: Any) -> Any:
        t, num_tokens, state, population, records = carry
        state, population, record = step(state, population, t)
        records = jax.tree.map(lambda rows, row: rows.at[t].set(row), records, record)
        return t + 1, num_tokens + jnp.sum(record.num_tokens, dtype=jnp.int32), state, population, records

    zero = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(step, state, population, zero)[2]
    start = (zero, zero, state, population, stack_records(shapes, generator.max_steps))
    num_steps, _, state, population, records = jax.lax.while_loop(go_on, body, start)
    return Sweep(state, population, records, num_steps)


@jax.jit
def draw_reference(
    key: Key[Array, ""], generator: StepGenerator, potential: AbstractPotential, sweep: Sweep
) -> tuple[Reference, Float[Array, ""]]:
    """A finished answer drawn by the final weights, and the log of its G under this potential.

    The potential may have other exponents than that of the run, not other scores.
    """
    population, records = sweep.population, sweep.records
    log_weights = jnp.where(population.is_done, population.log_weights, -jnp.inf)
    last = resampling.iid(key, log_weights, 1)[0]
    ts = jnp.arange(records.ess.shape[0])

    def back(index: Array, row: Any) -> tuple[Array, tuple[Array, Array]]:
        # what comes after the last step is passed over
        t, ancestors, log_ratio, is_done = row
        is_used = t < sweep.num_steps
        here = jnp.where(is_used, log_ratio[index], 0.0)
        return jnp.where(is_used, ancestors[index], index), (here, is_used & ~is_done[index])

    rows = (ts, records.ancestors, records.log_ratio, records.is_done)
    _, (log_ratio, is_open) = jax.lax.scan(back, last, rows, reverse=True)
    # it was unfinished after all its steps but the last one
    reference = Reference(generator.gather(sweep.state, last[None]), log_ratio, jnp.sum(is_open) + 1)
    return reference, log_g_of(potential, population, last)


def log_g_of(potential: AbstractPotential, population: Population, index: Int[Array, ""] | int) -> Float[Array, ""]:
    """Log G of an answer, with the exponents of this potential, whatever those of the run were."""
    parts = zip(potential.factors, population.potentials, strict=True)
    return sum((factor.raised(state.log_spent)[index] for factor, state in parts), jnp.zeros(()))


def _check_scores(log_scores: tuple[Array, ...], num_particles: int) -> None:
    for scores in log_scores:
        if scores.shape != (num_particles,):
            raise ValueError(
                f"a score must be one number for each of {num_particles} particles, of shape ({num_particles},), "
                f"got shape {scores.shape}"
            )


def _choose_with_reference(key: Key[Array, ""], selection: Any, population: Population) -> tuple[Array, Array, Array]:
    num = population.log_weights.shape[0]
    is_resampled = weights.ess(population.log_weights) <= selection.ess_threshold * num

    def choose() -> tuple[Array, Array]:
        free = resampling.iid(key, population.log_weights, num - 1)
        # slot 0 keeps the reference, and the others, who are exchangeable, their places
        return keep_places(jnp.concatenate([jnp.zeros(1, jnp.int32), free])), jnp.full(num, -jnp.log(num))

    own = jnp.arange(num, dtype=jnp.int32)
    ancestors, log_carried = jax.lax.cond(is_resampled, choose, lambda: (own, population.log_weights))
    return ancestors, log_carried, is_resampled


def _retrace(
    generator: StepGenerator, reference: Reference, state: PyTree, info: StepInfo, t: Array
) -> tuple[PyTree, StepInfo]:
    """Slot 0 as the reference was after step t."""
    state = generator.place(state, generator.prefix(reference.state, t + 1))
    return state, StepInfo(
        info.log_ratio.at[0].set(reference.log_ratio[t]),
        info.num_tokens.at[0].set(0),
        info.is_done.at[0].set(t + 1 >= reference.num_steps),
    )
