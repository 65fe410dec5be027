"""A*-decoding: the most promising unfinished answer is continued, wherever it is.

    f = g + h,    h = the reward of the answer so far,    g(child) = g(parent) + max(0, h(child) - h(parent))

From a queue ordered by f the best answer is taken and continued k times; it ends at the first complete answer that is
taken, or when the tokens are spent. Of equals the complete one is taken, else the longest, else the oldest: where a
score tells nothing apart, depth first comes to an end before breadth first does. h is asked for at every step: a reward
of complete answers alone, 0 before, leaves nothing to take.

A search: it has no evidence, and its answers weigh their rewards. g counts the increases of h alone, as published; the
constants of the paper were not at hand, and f is put together from its description.

References:
    Chatziveroglou (2025), 'A*-Decoding', https://arxiv.org/abs/2505.13672.
"""

import heapq
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Key

from bayesinf import errors
from bayesinf.kernels.inference_scaling.methods import Runs
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.run_requests import OutageError, RunRequests, ScoreError
from bayesinf.kernels.inference_scaling.selection import Independent, Selection
from bayesinf.kernels.inference_scaling.text_tree import Node, Tree

__all__ = ["AStar"]


class AStarVotes(Independent):
    """Answers weigh their rewards; the best is the one of the largest."""

    has_evidence = False
    rule = "argmax"


class AStar(eqx.Module):
    """A*-decoding; on the host. Its `num_particles` is the number of first steps, and no more.

    Attributes:
        width: k, continuations of an answer that is taken. Static.
        num_goals: how many complete answers end the search. Static.
    """

    width: int = eqx.field(static=True, default=4)
    num_goals: int = eqx.field(static=True, default=1)
    num_populations = 1

    def __check_init__(self):
        errors.check_count("width", self.width)
        errors.check_count("num_goals", self.num_goals)

    @property
    def selection(self) -> Selection:
        return AStarVotes()

    def start(
        self, key: Key[Array, ""], requests: RunRequests, potential: AbstractPotential, num_particles: int, budget: int
    ) -> "AStarRun":
        return AStarRun(self, key, requests, potential, num_particles, budget)


class AStarRun:
    """A search."""

    def __init__(
        self, method: AStar, key: Any, requests: RunRequests, potential: AbstractPotential, num_first: int, budget: int
    ):
        self.method, self.requests, self.num_first, self.budget = method, requests, num_first, budget
        self.tree = Tree(requests, potential)
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        self.goals: list[Node] = []

    async def run(self) -> None:
        """Until the goals are reached, nothing is left, or the budget is spent."""
        # of equals the complete first, then the longest, which is nearest to its end, then the oldest
        count = itertools.count()
        queue: list[tuple[tuple[float, bool, int, int], float, Node]] = []

        async def expand(parent: Node | None, cost: float, num: int) -> None:
            prefix = () if parent is None else parent.prefix
            height = 0.0 if parent is None else math.exp(parent.log_reward)
            steps = await self.requests.draw(prefix, num, int(self.rng.integers(2**31)))
            eves = [i if parent is None else parent.eve for i in range(num)]
            for node in await self.tree.grow(parent, steps, eves, 0.0):
                if not np.isfinite(node.log_reward):
                    node.log_weight = -np.inf  # of what has failed or has no reward, nothing is expected
                    continue
                h = _exp(node.log_reward)
                g = cost + max(0.0, h - height)
                order = -(g + h), not node.is_done, -node.depth, next(count)
                heapq.heappush(queue, (order, g, node))
            self.requests.on_step(self)

        await expand(None, 0.0, self.num_first)
        if all(node.is_failed for node in self.tree.nodes):
            raise OutageError(self.requests.failures[-1])
        while queue and len(self.goals) < self.method.num_goals:
            _, cost, node = heapq.heappop(queue)
            if node.is_done:
                self.goals.append(node)
            elif self.tree.num_tokens < self.budget:
                await expand(node, cost, self.method.width)

    def runs(self) -> Runs:
        """What has been found."""
        return Runs([self.tree.result()], np.zeros(1), np.nan, np.nan, [])


def _exp(log_reward: float) -> float:
    try:
        return math.exp(log_reward)
    except OverflowError:
        raise ScoreError(
            f"A* adds rewards, and a log reward of {log_reward:.4g} is too large for that; subtract a constant from "
            "the scores, or take a smaller exponent"
        ) from None
