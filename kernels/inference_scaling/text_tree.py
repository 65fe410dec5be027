"""Answers that grow as a tree, each at its own pace, and that tree as the generations of a population.

A node is one step of an answer. Methods without a barrier have no populations; for the result, generation t holds the
nodes at depth t and the answers that had finished before. Where nodes were left behind at the greatest depth, one more
generation is of those alone that ended. Generations of different sizes are filled up with copies of their first node,
of weight zero.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf import weights
from bayesinf.kernels.inference_scaling.population import Record, found
from bayesinf.kernels.inference_scaling.potential import AbstractPotential, without_scores
from bayesinf.kernels.inference_scaling.run_requests import RunRequests
from bayesinf.kernels.inference_scaling.sweep import Sweep
from bayesinf.kernels.inference_scaling.text_generator import Prefix, TextStep, next_power

__all__ = ["Node", "Tree"]


@dataclasses.dataclass(eq=False)
class Node:
    """A step of an answer.

    Attributes:
        parent: the node before; None at depth 1.
        prefix: the answer as far as this step.
        eve: which of the first nodes it descends from.
        potentials: what the potential remembers of it.
        log_weight: that counts for the result.
        log_reward: of the answer so far.
        is_done: whether it is complete.
        is_failed: whether its step could not be had.
        is_invalid: whether a score of it was none.
        is_cut: whether it was left unfinished, the budget being spent.
    """

    parent: "Node | None"
    prefix: Prefix
    eve: int
    potentials: Any
    log_weight: float
    log_reward: float
    is_done: bool
    is_failed: bool
    is_invalid: bool
    is_cut: bool = False

    @property
    def depth(self) -> int:
        return 1 if self.parent is None else self.parent.depth + 1


class Tree:
    """The nodes so far, in the order of their arrival."""

    def __init__(self, requests: RunRequests, potential: AbstractPotential):
        self.requests, self.potential = requests, without_scores(potential)
        self.nodes: list[Node] = []
        self.num_tokens = 0
        self._root = self.potential.start(1)

    async def grow(
        self, parent: Node | None, steps: Sequence[TextStep], eves: Sequence[int], log_weight: float
    ) -> list[Node]:
        """The nodes of steps that arrived together, scored; their log weights are `log_weight` + log G + log p/q."""
        self.requests.lose(steps)
        before = () if parent is None else parent.prefix
        drawn = [step for step in steps if step.failure is None]
        scored = iter((await self.requests.scores([(*before, step) for step in drawn])).T)
        nodes = [
            self._node(parent, step, eve, log_weight, None if step.failure is not None else next(scored))
            for step, eve in zip(steps, eves, strict=True)
        ]
        self.nodes += nodes
        self.num_tokens += sum(step.num_tokens for step in steps)
        return nodes

    def _node(self, parent: Node | None, step: TextStep, eve: int, log_weight: float, scores: Any) -> Node:
        is_failed = scores is None
        before = () if parent is None else parent.prefix
        depth = 1 if parent is None else parent.depth + 1
        is_done = is_failed or step.is_done or depth >= self.requests.generator.max_steps
        potentials = self._root if parent is None else parent.potentials
        if is_failed:
            return Node(parent, before, eve, potentials, -np.inf, -np.inf, is_done, is_failed, False)
        weighed = _weigh_one(self.potential, potentials, jnp.asarray(scores, float), jnp.asarray(is_done))
        potentials, log_g, log_reward = weighed[0], float(weighed[1]), float(weighed[2])
        is_invalid = bool(np.isnan(log_g) or log_g == np.inf)
        log_weight = -np.inf if is_invalid else log_weight + log_g + step.log_ratio
        return Node(parent, (*before, step), eve, potentials, log_weight, log_reward, is_done, is_failed, is_invalid)

    def result(self) -> Sweep:
        """The generations."""
        generations = self._generations() or [[]]
        num = max(2, *(len(generation) for generation in generations))
        log_weights, ess, log_sums = _normalize([[node.log_weight for node in g] for g in generations], num)
        log_evidence = (log_sums - np.log(max(len(generations[0]), 1))).astype(ess.dtype)
        rows: list[Record] = []
        before: dict[int, int] = {}
        for t, generation in enumerate(generations):
            place = {id(node): i for i, node in enumerate(generation)}
            own = np.arange(num, dtype=np.int32)
            if t:
                found_at = [before[id(n)] if id(n) in before else before[id(n.parent)] for n in generation]
                own = np.array((found_at + [found_at[0] if found_at else 0] * num)[:num], np.int32)
            fresh = [n.depth == t + 1 and not n.is_failed for n in generation]
            rows.append(_record(generation, fresh, own, log_weights[t], (log_evidence[t], ess[t])))
            before = place
        population = found(self.potential, num)
        last = rows[-1]
        eves = [node.eve for node in generations[-1]]
        is_done = [node.is_done and not node.is_failed for node in generations[-1]]
        population = population._replace(
            log_weights=jnp.asarray(last.log_weights),
            log_reward=jnp.asarray(last.log_rewards),
            is_done=jnp.asarray(_fill(is_done, False, num, bool)),
            lineage=population.lineage._replace(eves=jnp.asarray(_fill(eves, 0, num, np.int32))),
        )
        prefixes = [node.prefix for node in generations[-1]]
        prefixes += [()] * (num - len(prefixes))
        records = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return Sweep(prefixes, population, records, jnp.asarray(len(generations), jnp.int32))

    @property
    def num_answers(self) -> int:
        """How many of the particles of the result are answers; those after them fill it up."""
        return len((self._generations() or [[]])[-1])

    def _generations(self) -> list[list[Node]]:
        deepest = max((node.depth for node in self.nodes), default=0)
        ends = [node for node in self.nodes if node.is_done or node.is_cut]
        found = [
            [n for n in self.nodes if n.depth == t] + [n for n in ends if n.depth < t] for t in range(1, deepest + 1)
        ]
        last = [node for node in ends if not node.is_failed]
        if found and (
            set(map(id, last)) == set(map(id, found[-1])) or not any(np.isfinite(n.log_weight) for n in last)
        ):
            return found
        return [*found, last] if last else found


@jax.jit
def _weigh_one(potential: AbstractPotential, states: Any, scores: Any, is_done: Any) -> Any:
    log_scores = tuple(f.log_scores(score[None]) for f, score in zip(potential.factors, scores, strict=True))
    states, log_g = potential.weigh(states, log_scores, jnp.zeros(1, bool), is_done[None])
    return states, log_g[0], potential.log_reward(states)[0]


def _normalize(rows: list[list[float]], num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of log weights in rows, filled up to `num`: normalised, their effective sample sizes, the logs of their sums."""
    # programs for powers of two: trees have any shape
    room = np.full((next_power(len(rows)), next_power(num)), -np.inf)
    for row, values in zip(room, rows, strict=False):
        row[: len(values)] = values
    log_weights, ess, log_sums = jax.device_get(_normalize_rows(jnp.asarray(room, float)))
    return log_weights[: len(rows), :num], ess[: len(rows)], log_sums[: len(rows)]


@jax.jit
def _normalize_rows(
    log_weights: Float[Array, "t n"],
) -> tuple[Float[Array, "t n"], Float[Array, " t"], Float[Array, " t"]]:
    return weights.normalize(log_weights)[0], weights.ess(log_weights), weights.log_sum_exp(log_weights)


def _record(
    generation: list[Node],
    is_fresh: list[bool],
    ancestors: np.ndarray,
    log_weights: np.ndarray,
    sums: tuple[Any, Any],
) -> Record:
    num, dtype = len(ancestors), log_weights.dtype
    counted = [n.prefix[-1].num_tokens if fresh else 0 for n, fresh in zip(generation, is_fresh, strict=True)]
    ratios = [n.prefix[-1].log_ratio if fresh else 0.0 for n, fresh in zip(generation, is_fresh, strict=True)]
    fields: list[Any] = [
        ancestors,
        log_weights,
        _fill([node.log_reward for node in generation], -np.inf, num, dtype),
        _fill(ratios, 0.0, num, dtype),
        _fill(counted, 0, num, np.int32),
        _fill([node.is_done for node in generation], False, num, bool),
        *map(np.asarray, sums),
        np.asarray(True),
        np.asarray(sum(n.is_invalid and fresh for n, fresh in zip(generation, is_fresh, strict=True)), np.int32),
    ]
    return Record(*fields)


def _fill(values: list[Any], blank: Any, num: int, dtype: Any) -> np.ndarray:
    return np.array((values + [blank] * num)[:num], dtype)
