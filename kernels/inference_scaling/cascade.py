"""The particle cascade: sequential Monte Carlo without a barrier.

The k-th particle that arrives at step t, with weight w = v p/q G, is compared with those before it alone:

    wbar = mean of the weights of the first k arrivals,    r = w / wbar
    r < 1     one child of weight wbar with probability r, else none
    r >= 1    m children of weight w / m each:  m = floor(r) if C > min(N, k - 1) of the step are there already, else
              ceil(r), and no more than max(1, N - C)

so that the weights of the children add up to w on average, whatever wbar, m and the order of arrival. By induction from
the last step to the first

    Zhat = (1/N) sum of the weights of the finished answers,    E[Zhat] = Z

with N the number of particles that begin. The bound on m is not in the paper. Weights of heavy tails have records, and
those that come late are compared with a mean that is no longer theirs: without the bound 16 particles of a chain of
reasoning were 16,000 after eleven steps. What is not split now is split at a later step, where there is room. The
totals S_i of the answers that descend from the i-th beginner are uncorrelated, of mean Z: their sample variance over N
is an unbiased estimate of var(Zhat).

References:
    Paige, Wood, Doucet, Teh (2014), 'Asynchronous anytime sequential Monte Carlo', https://arxiv.org/abs/1407.2864.
"""

import math
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Key

from bayesinf.kernels.inference_scaling.methods import Runs
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.run_requests import OutageError, RunRequests
from bayesinf.kernels.inference_scaling.selection import Resample, Selection
from bayesinf.kernels.inference_scaling.text_sweep import run_all
from bayesinf.kernels.inference_scaling.text_tree import Node, Tree

__all__ = ["Cascade", "num_children"]


class Cascade(eqx.Module):
    """The particle cascade; on the host."""

    num_populations = 2  # the population grows and shrinks, and must end before the tokens do

    @property
    def selection(self) -> Selection:
        return Resample()

    def start(
        self, key: Key[Array, ""], requests: RunRequests, potential: AbstractPotential, num_particles: int, budget: int
    ) -> "CascadeRun":
        return CascadeRun(key, requests, potential, num_particles, budget)


class CascadeRun:
    """A run of the cascade."""

    def __init__(self, key: Any, requests: RunRequests, potential: AbstractPotential, num_particles: int, budget: int):
        self.requests, self.num_particles, self.budget = requests, num_particles, budget
        self.tree = Tree(requests, potential)
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        # of every step: arrivals, the log of the sum of their weights, and their children
        self.arrivals: dict[int, list[float]] = {}
        self.is_cut = False

    async def run(self) -> None:
        """Until all have finished, or the budget is spent."""
        await self._continue(None, self.num_particles, 0.0)
        alive = any(node.is_done and np.isfinite(node.log_weight) for node in self.tree.nodes)
        if self.requests.failures and not alive and all(n.is_failed for n in self.tree.nodes if n.is_done):
            raise OutageError(self.requests.failures[-1])

    async def _continue(self, parent: Node | None, num: int, log_weight: float) -> None:
        """`num` children, and theirs, each from the weight exp(log_weight)."""
        if self.tree.num_tokens >= self.budget:
            self.is_cut = True
            if parent is not None:
                parent.is_cut = True
            return
        prefix = () if parent is None else parent.prefix
        steps = await self.requests.draw(prefix, num, int(self.rng.integers(2**31)))

        eves = [i if parent is None else parent.eve for i in range(num)]
        nodes = await self.tree.grow(parent, steps, eves, log_weight)
        self.requests.on_step(self)
        families = [(node, *self._branch(node)) for node in nodes if not node.is_done]
        await run_all([self._continue(*family) for family in families if family[1]])

    def _branch(self, node: Node) -> tuple[int, float]:
        before = self.arrivals.setdefault(node.depth, [0, -np.inf, 0])
        before[0] += 1
        before[1] = np.logaddexp(before[1], node.log_weight)
        num, log_child = num_children(
            node.log_weight,
            before[1] - math.log(before[0]),
            int(before[0]),
            int(before[2]),
            self.num_particles,
            self.rng,
        )
        before[2] += num
        return num, log_child

    def runs(self) -> Runs:
        """What has been found."""
        totals = np.zeros(self.num_particles)
        finished = [node for node in self.tree.nodes if node.is_done and np.isfinite(node.log_weight)]
        largest = max((node.log_weight for node in finished), default=0.0)
        for node in finished:
            totals[node.eve] += math.exp(node.log_weight - largest)
        mean = float(totals.mean())
        evidence = largest + math.log(mean) if mean > 0 else -np.inf
        variance = float(totals.var(ddof=1) / self.num_particles / mean**2) if mean > 0 and len(totals) > 1 else np.nan
        if self.is_cut:
            # those that were cut off are missing in the sum
            evidence = variance = np.nan
        return Runs([self.tree.result()], np.zeros(1), evidence, variance, [])


def num_children(
    log_weight: float, log_mean: float, arrival: int, num_before: int, num_particles: int, rng: Any
) -> tuple[int, float]:
    """How many children the k-th arrival has, and their log weight.

    Args:
        log_weight: log w.
        log_mean: log wbar, of the arrivals with this one.
        arrival: k.
        num_before: C, children of the arrivals before.
        num_particles: N.
        rng: a NumPy generator, for the random choice.
    """
    if not np.isfinite(log_weight):
        return 0, -np.inf
    # equal weights have one child each, though rounding puts their ratio beside 1; the sum of the weights is w still
    ratio = math.exp(log_weight - log_mean)
    ratio = round(ratio) if abs(ratio - round(ratio)) < 1e-6 * ratio else ratio
    if ratio < 1:
        return (1, log_mean) if rng.random() < ratio else (0, -np.inf)
    num = math.floor(ratio) if num_before > min(num_particles, arrival - 1) else math.ceil(ratio)
    num = min(num, max(1, num_particles - num_before))
    return num, log_weight - math.log(num)
