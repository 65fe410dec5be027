"""One step of a population of unfinished answers: what every driver and every method does with weights.

    w_t^i = W_carried^i  p(x_t^i | .) / q(x_t^i | .)  G_t(x_{1:t}^i)
    W_t^i = w_t^i / sum_j w_t^j,    Zhat = prod_t sum_j w_t^j

The weights, the resampling and the variance of the evidence are those of the particle filter. A finished particle is
absorbing: it keeps its weight, takes part in resampling, and is never weighed again, so that an answer is not favoured
for being short or long.

References:
    Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    Lee and Whiteley (2018), doi:10.1093/biomet/asy028 (the variance).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bayesinf import weights
from bayesinf.kernels import lineage as lineages
from bayesinf.kernels.filter_steps import reweigh
from bayesinf.kernels.inference_scaling.generator import StepInfo
from bayesinf.kernels.inference_scaling.potential import AbstractPotential, PotentialState
from bayesinf.resampling import gather

__all__ = [
    "Population",
    "Record",
    "found",
    "inherit",
    "keep_places",
    "relative_variance",
    "stack_records",
    "weigh",
]


class Population(NamedTuple):
    """The particles, as the methods see them.

    Attributes:
        log_weights: normalised.
        log_reward: of the scores so far, by which answers are ranked.
        log_ratio: log p - log q of all steps so far; 0 where they came from the model.
        is_done: which have finished.
        potentials: what the potential remembers of each.
        log_evidence: log Zhat so far.
        lineage: the ancestors at the start, for the variance of log Zhat.
        features: of the particles, while those who go on are chosen, for methods that compare them; else None.
    """

    log_weights: Float[Array, " N"]
    log_reward: Float[Array, " N"]
    log_ratio: Float[Array, " N"]
    is_done: Bool[Array, " N"]
    potentials: tuple[PotentialState, ...]
    log_evidence: Float[Array, ""]
    lineage: lineages.Lineage
    features: Float[Array, "N f"] | None = None


class Record(NamedTuple):
    """What is kept of a step.

    Attributes:
        ancestors: the index, before the step, of the particle that each continues.
        log_weights: normalised, after the step.
        log_rewards: of the answers so far.
        log_ratio: log p - log q of the step.
        num_tokens: what the step cost.
        is_done: which have finished.
        log_evidence: log Zhat, of the steps so far.
        ess: of the weights after the step.
        is_resampled: whether the ancestors were drawn, or chosen, before it.
        num_invalid: how many scores were none.
    """

    ancestors: Int[Array, " N"]
    log_weights: Float[Array, " N"]
    log_rewards: Float[Array, " N"]
    log_ratio: Float[Array, " N"]
    num_tokens: Int[Array, " N"]
    is_done: Bool[Array, " N"]
    log_evidence: Float[Array, ""]
    ess: Float[Array, ""]
    is_resampled: Bool[Array, ""]
    num_invalid: Int[Array, ""]


def found(potential: AbstractPotential, num_particles: int) -> Population:
    """The population before the first step."""
    equal = jnp.full(num_particles, -jnp.log(num_particles))
    return Population(
        equal,
        jnp.zeros(num_particles),
        jnp.zeros(num_particles),
        jnp.zeros(num_particles, bool),
        potential.start(num_particles),
        jnp.zeros(()),
        lineages.found(num_particles, equal.dtype),
    )


def inherit(
    population: Population,
    ancestors: Int[Array, " N"],
    log_carried: Float[Array, " N"],
    is_resampled: Bool[Array, ""],
    scheme: str = "multinomial",
) -> Population:
    """The population that continues these particles, which the scheme chose, with the log weights to start from."""
    descended = lineages.descend(population.lineage, ancestors, scheme)
    return Population(
        log_carried,
        population.log_reward[ancestors],
        population.log_ratio[ancestors],
        population.is_done[ancestors],
        gather(population.potentials, ancestors),
        population.log_evidence,
        jax.tree.map(lambda new, old: jnp.where(is_resampled, new, old), descended, population.lineage),
    )


def weigh(
    population: Population,
    potential: AbstractPotential,
    log_scores: tuple[Float[Array, " N"], ...],
    info: StepInfo,
    ancestors: Int[Array, " N"],
    is_resampled: Bool[Array, ""],
) -> tuple[Population, Record]:
    """The population after a step of its generator, which `info` tells of, and the record of it.

    Args:
        population: as from `inherit`.
        potential: what scores mean.
        log_scores: of the particles after the step.
        info: of the step.
        ancestors, is_resampled: what was given to `inherit`.
    """
    was_done = population.is_done
    is_done = was_done | info.is_done
    potentials, log_g = potential.weigh(population.potentials, log_scores, was_done, is_done)
    log_ratio = jnp.where(was_done, 0.0, info.log_ratio)
    # what is already impossible has weight zero whatever its score, and a score of it that is none is not counted
    is_dead = jnp.isneginf(population.log_weights)
    log_weights, log_sum, num_invalid = reweigh(population.log_weights, jnp.where(is_dead, 0.0, log_g + log_ratio))
    log_evidence = population.log_evidence + log_sum
    log_reward = potential.log_reward(potentials)
    num_tokens = jnp.where(was_done, 0, info.num_tokens).astype(jnp.int32)
    record = Record(
        ancestors,
        log_weights,
        log_reward,
        log_ratio,
        num_tokens,
        is_done,
        log_evidence,
        weights.ess(log_weights),
        is_resampled,
        num_invalid,
    )
    log_ratio = population.log_ratio + log_ratio
    after = Population(log_weights, log_reward, log_ratio, is_done, potentials, log_evidence, population.lineage)
    return after, record


def keep_places(ancestors: Int[Array, " N"]) -> Int[Array, " N"]:
    """The same ancestors, ordered so that every one of them keeps its own place: a[a[i]] = a[i].

    Particles are exchangeable, so their order is free; in this one only the rows of those that died are written.
    """
    num = ancestors.shape[0]
    counts = jnp.zeros(num, jnp.int32).at[ancestors].add(1)
    is_dead = counts == 0
    # the j-th copy beyond the first ones goes to the j-th free place
    ends = jnp.cumsum(jnp.maximum(counts - 1, 0))
    place = jnp.cumsum(is_dead) - 1
    copies = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    own = jnp.arange(num, dtype=jnp.int32)
    return jnp.where(is_dead, jnp.minimum(copies, num - 1), own)


def stack_records(record: Record, num_steps: int) -> Record:
    """Room for the records of so many steps."""
    return jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), record)


def relative_variance(population: Population) -> Any:
    """An estimate of var(Zhat) / Z^2, exact on average for multinomial resampling; NaN after any other."""
    return lineages.relative_variance(population.lineage, population.log_weights)
