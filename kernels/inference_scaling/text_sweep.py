"""One run of a population whose generator is elsewhere: the numbers by compiled functions, the rest by coroutines.

The choice of who goes on, the weights, the evidence and the lineage are those of the run in process; only the drawing
and the scoring of steps is waited for. Where there is a barrier, all particles have their step before anyone is chosen.
A speculative run does not wait: a particle that has its score begins its next step at once. If it is chosen, one of its
copies takes that step, which was drawn without knowledge of the choice, so that the law is the same; if it is not, the
request is cancelled, and what it had generated is wasted.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf.kernels.inference_scaling.generator import StepInfo
from bayesinf.kernels.inference_scaling.population import Population, Record, found, weigh
from bayesinf.kernels.inference_scaling.potential import AbstractPotential, without_scores
from bayesinf.kernels.inference_scaling.run_requests import OutageError, RunRequests
from bayesinf.kernels.inference_scaling.selection import Independent, Selection
from bayesinf.kernels.inference_scaling.sweep import Sweep, begin_step
from bayesinf.kernels.inference_scaling.text_generator import Prefix, TextStep

__all__ = ["TextSweep", "run_all"]


class TextSweep:
    """A population on the host.

    Attributes:
        prefixes: the unfinished answers.
        is_failed: which have died of a request that failed.
        population, records, t: as of the last step that is complete.
        num_tokens: that were generated, those for nobody among them.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        requests: RunRequests,
        potential: AbstractPotential,
        selection: Selection,
        num_particles: int,
        budget: int,
        *,
        is_speculative: bool = False,
        reference: Prefix | None = None,
    ):
        self.requests, self.selection, self.budget = requests, selection, budget
        self.is_speculative, self.reference = is_speculative, reference
        self.key_steps = jax.random.split(key)[1]
        self.potential = without_scores(potential)
        self.t, self.num_tokens = 0, 0
        self.prefixes: list[Prefix] = [()] * num_particles
        self.is_failed = np.zeros(num_particles, bool)
        self.population = _found(self.potential, num_particles)
        self.records: list[Record] = []
        self.max_steps = requests.generator.max_steps
        self._ahead: dict[int, asyncio.Task[list[TextStep]]] = {}

    @property
    def is_over(self) -> bool:
        is_alive = np.isfinite(np.asarray(self.population.log_weights)).any()
        is_open = not np.all(np.asarray(self.population.is_done))
        return not (self.t < self.max_steps and is_open and is_alive and self.num_tokens < self.budget)

    async def run(self) -> None:
        """Steps until all particles have finished or died, or the budget is spent."""
        try:
            while not self.is_over:
                await self._step()
                self.requests.on_step(self)
        finally:
            await self._forget_ahead()

    def result(self) -> Sweep:
        """What there is; the answers that died of a failure count as unfinished."""
        population = self.population._replace(is_done=self.population.is_done & ~self.is_failed)
        num = len(self.prefixes)
        template = self.records[0] if self.records else _blank_record(num)
        rows = jax.tree.map(lambda leaf: np.zeros((self.max_steps, *leaf.shape), leaf.dtype), template)
        for t, record in enumerate(self.records):
            for room, leaf in zip(rows, record, strict=True):
                room[t] = leaf
        return Sweep(list(self.prefixes), population, rows, jnp.asarray(self.t, jnp.int32))

    async def _step(self) -> None:
        begun = _begin(
            self.key_steps, self.selection, self.population, self.t, self.max_steps, self.reference is not None
        )
        population, ancestors, is_resampled, seeds = begun
        host_ancestors = np.asarray(ancestors)
        was_done, log_carried = np.asarray(population.is_done), np.asarray(population.log_weights)
        prefixes = [self.prefixes[a] for a in host_ancestors]
        is_failed = self.is_failed[host_ancestors]
        # the dead stay dead, but where every finished answer has a vote
        is_open = ~was_done & ~is_failed & (np.isfinite(log_carried) | isinstance(self.selection, Independent))
        slots = [int(i) for i in np.flatnonzero(is_open)]
        steps: dict[int, TextStep] = {}
        if self.reference is not None:
            steps[0] = self.reference[min(self.t, len(self.reference) - 1)]._replace(num_tokens=0)
            slots = [i for i in slots if i != 0]

        num = len(prefixes)
        raw = np.zeros((len(self.potential.factors), num))

        async def take(some: list[int], drawn: list[TextStep]) -> None:
            self.requests.lose(drawn)
            for i, step in zip(some, drawn, strict=True):
                steps[i] = step
                if step.failure is None:
                    prefixes[i] = (*prefixes[i], step)
            if self.is_speculative:
                await score(some)

        async def score(some: list[int]) -> None:
            alive = [i for i in some if steps[i].failure is None]
            raw[:, alive] = await self.requests.scores([prefixes[i] for i in alive])

        def is_hopeful(i: int) -> bool:
            pairs = zip(self.potential.factors, raw[:, i], strict=True)
            return not steps[i].is_done and all(value > 0 or factor.is_log for factor, value in pairs)

        if self.reference is not None:
            prefixes[0] = self.reference[: self.t + 1]
            raw[:, :1] = await self.requests.scores(prefixes[:1])
        await self._draw_all(slots, prefixes, host_ancestors, np.asarray(seeds), take, is_hopeful)
        if not self.is_speculative:
            await score(slots)

        died = np.array([i in steps and steps[i].failure is not None for i in range(num)])
        if slots and died[slots].all() and not np.any(was_done & np.isfinite(log_carried)):
            raise OutageError(self.requests.failures[-1])
        log_ratio = np.array([steps[i].log_ratio if i in steps else 0.0 for i in range(num)])
        # what was generated for a step that failed is counted with what nobody has
        num_tokens = np.array([steps[i].num_tokens if i in steps and not died[i] else 0 for i in range(num)], np.int32)
        is_done = np.array([i in steps and steps[i].is_done for i in range(num)]) | (self.t + 1 >= self.max_steps)
        info = StepInfo(jnp.asarray(log_ratio, float), jnp.asarray(num_tokens), jnp.asarray(is_done | died))
        is_failed = is_failed | died
        self.population, record = _weigh(
            population, self.potential, jnp.asarray(raw, float), info, ancestors, is_resampled, is_failed
        )
        record = jax.device_get(record)
        self.records.append(record)
        self.prefixes, self.is_failed = prefixes, is_failed
        self.num_tokens += int(record.num_tokens.sum()) + sum(steps[i].num_tokens for i in slots if died[i])
        self.t += 1

    async def _draw_all(
        self,
        slots: list[int],
        prefixes: list[Prefix],
        ancestors: np.ndarray,
        seeds: np.ndarray,
        take: Any,
        is_hopeful: Any,
    ) -> None:
        """Asks for the steps of these slots, and hands them over as they come."""
        requests: list[tuple[list[int], Any]] = []
        if not self.is_speculative:
            groups: dict[Any, list[int]] = {}
            for i in slots:
                groups.setdefault(self.requests.generator.identity(prefixes[i]), []).append(i)
            for group in groups.values():
                requests.append((group, self._draw(prefixes[group[0]], len(group), seeds[0, group[0]])))
        else:
            of_parent: dict[int, list[int]] = {}
            for i in slots:
                of_parent.setdefault(int(ancestors[i]), []).append(i)
            # those of nobody's parents are not waited for
            for parent in [p for p in self._ahead if p not in of_parent]:
                self._drop(self._ahead.pop(parent))
            for parent, (first, *rest) in of_parent.items():
                prefix = prefixes[first]
                ahead = self._ahead.pop(parent, None)
                requests.append(([first], ahead or self._draw(prefix, 1, seeds[0, parent])))
                if rest:
                    requests.append((rest, self._draw(prefix, len(rest), seeds[1, parent])))
        following = np.asarray(_seeds(self.key_steps, self.t + 1, len(prefixes))) if self.is_speculative else seeds

        # what this step will have cost in all at most, as it is known so far
        at_most = self.num_tokens + len(slots) * self.requests.generator.max_tokens_per_step

        async def serve(group: list[int], request: Any) -> None:
            nonlocal at_most
            steps = await request
            at_most += sum(step.num_tokens - self.requests.generator.max_tokens_per_step for step in steps)
            await take(group, steps)
            if not self.is_speculative or self.t + 1 >= self.max_steps:
                return
            for i, step in zip(group, steps, strict=True):
                # only where the next step is sure to begin within the budget
                if step.failure is None and is_hopeful(i) and at_most < self.budget:
                    draw = self._draw(prefixes[i], 1, following[0, i])
                    self._ahead[i] = asyncio.get_running_loop().create_task(draw)

        await run_all([serve(group, request) for group, request in requests])

    async def _draw(self, prefix: Prefix, num_samples: int, seed: Any) -> list[TextStep]:
        return await self.requests.draw(prefix, num_samples, int(seed))

    def _drop(self, task: asyncio.Task[list[TextStep]]) -> None:
        if task.done() and not task.cancelled():
            self.num_tokens += sum(step.num_tokens for step in task.result())
            self.requests.waste(task.result())
        self.requests.num_cancelled += task.cancel()

    async def _forget_ahead(self) -> None:
        tasks = list(self._ahead.values())
        self._ahead.clear()
        for task in tasks:
            self._drop(task)
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_all(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs them together; the first that raises ends the others."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in coroutines:
                tasks.create_task(coroutine)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


_found = jax.jit(found, static_argnums=1)


@partial(jax.jit, static_argnames=("max_steps", "is_conditional"))
def _begin(
    key: Key[Array, ""], selection: Selection, population: Population, t: Any, max_steps: int, is_conditional: bool
) -> tuple[Population, Int[Array, " N"], Bool[Array, ""], Array]:
    population, ancestors, is_resampled, key_move = begin_step(
        key, selection, population, jnp.asarray(t, jnp.int32), max_steps, is_conditional
    )
    return population, ancestors, is_resampled, _bits(key_move, ancestors.shape[0])


@partial(jax.jit, static_argnames="num")
def _seeds(key: Key[Array, ""], t: Any, num: int) -> Array:
    """The seeds that `_begin` gives to step t."""
    return _bits(jax.random.split(jax.random.fold_in(key, t))[1], num)


def _bits(key: Key[Array, ""], num: int) -> Array:
    # servers take positive 32-bit numbers
    return jax.random.bits(key, (2, num), jnp.uint32) >> 1


@jax.jit
def _weigh(
    population: Population,
    potential: AbstractPotential,
    scores: Float[Array, "f N"],
    info: StepInfo,
    ancestors: Int[Array, " N"],
    is_resampled: Bool[Array, ""],
    is_failed: Bool[Array, " N"],
) -> tuple[Population, Record]:
    # weight zero, and no reward: what the dead have for a score is not counted
    log_weights = jnp.where(is_failed, -jnp.inf, population.log_weights)
    log_scores = tuple(
        jnp.where(is_failed, jnp.nan, f.log_scores(row)) for f, row in zip(potential.factors, scores, strict=True)
    )
    population = population._replace(log_weights=log_weights)
    return weigh(population, potential, log_scores, info, ancestors, is_resampled)


def _blank_record(num: int) -> Record:
    many, one, dtype = np.zeros(num), np.zeros(()), jnp.zeros(()).dtype
    whole, truth = many.astype(np.int32), many.astype(bool)
    many, one = many.astype(dtype), one.astype(dtype)
    fields: list[Any] = [whole, many, many, many, whole, truth, one, one, np.zeros((), bool), np.zeros((), np.int32)]
    return Record(*fields)
