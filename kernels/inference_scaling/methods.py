"""The methods that run in process: one population, islands of them, or sweeps that are conditional on a reference.

    single              one run of a selection
    islands             K runs that never meet, weighted by their evidences: E[(1/K) sum_k Zhat_k] = Z
    particle Gibbs      x^0 by a run, then x^{j+1} ~ P_N(x^j, .): the conditional run leaves the posterior invariant
    parallel tempering  M such chains on p(x) G(x)^{beta_m}; after each sweep neighbours swap references x, x' with
                        probability min(1, exp((beta_m - beta_{m+1})(log G(x') - log G(x))))

All particles of a sweep are used, by their weights, and not only the one that is drawn.

References:
    Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    Andrieu, Doucet, Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
    Vergé et al. (2015), doi:10.1007/s11222-013-9429-x (islands).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.kernels.inference_scaling.generator import StepGenerator
from bayesinf.kernels.inference_scaling.population import relative_variance
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.selection import Resample, Selection
from bayesinf.kernels.inference_scaling.sweep import Reference, Sweep, draw_reference, run_sweep

__all__ = [
    "Gibbs",
    "Islands",
    "ParallelTempering",
    "Runs",
    "as_runs",
    "evidence_of",
    "exchange",
    "if_finished",
    "pool",
    "run_single",
    "run_tempered",
    "swap",
]


class Runs(NamedTuple):
    """What a method did.

    Attributes:
        sweeps: the populations whose answers count.
        log_run_weights: of each, normalised.
        log_evidence, log_evidence_variance: NaN where the method has none.
        others: populations that were paid for, and whose answers do not count.
    """

    sweeps: list[Sweep]
    log_run_weights: np.ndarray
    log_evidence: float
    log_evidence_variance: float
    others: list[Sweep]


class Islands(eqx.Module):
    """Independent populations, each by the same selection, weighted by their evidences.

    Attributes:
        selection: of every island; it must have an evidence.
        num_islands: K. Static.
        mesh: over whose first axis the islands are spread; one device if None. Static.
    """

    selection: Selection = eqx.field(default_factory=Resample)
    num_islands: int = eqx.field(static=True, default=4)
    mesh: Any = eqx.field(static=True, default=None)

    def __check_init__(self):
        errors.check_count("num_islands", self.num_islands)
        if self.mesh is not None and self.num_islands % (size := self.mesh.devices.shape[0]):
            axis = self.mesh.axis_names[0]
            raise ValueError(
                f"num_islands must be a multiple of the {size} devices along the axis {axis!r} of mesh, "
                f"got {self.num_islands}"
            )
        if not self.selection.has_evidence:
            raise ValueError(
                f"selection must have an evidence to weigh islands by, got {type(self.selection).__name__}"
            )

    @property
    def num_populations(self) -> int:
        return self.num_islands

    num_at_once = num_populations

    def run(self, key: Key[Array, ""], generator, potential, prompt: PyTree, num_particles: int, budget: Array) -> Runs:
        keys = jax.random.split(key, self.num_islands)
        if self.mesh is not None:
            axis = jax.sharding.PartitionSpec(self.mesh.axis_names[0])
            keys = jax.device_put(keys, jax.sharding.NamedSharding(self.mesh, axis))
        shared = budget // self.num_islands
        stacked = _run_islands(keys, generator, potential, self.selection, prompt, num_particles, shared)
        sweeps = _unstack(stacked, self.num_islands)
        log_z = jnp.stack([s.population.log_evidence for s in sweeps])
        log_w, log_mean = weights.normalize(log_z)
        variances = jnp.stack([relative_variance(s.population) for s in sweeps])
        variance = jnp.sum(jnp.exp(2 * log_w) * variances)
        return Runs(sweeps, np.asarray(log_w), *if_finished(sweeps, float(log_mean), float(variance)), [])


class Gibbs(eqx.Module):
    """Particle Gibbs: sweeps that are conditional on an answer of the one before, which others may continue.

    Attributes:
        num_sweeps: with the first, which is a plain run. Static.
        burn_in: how many of them do not count. Static.
        ess_threshold: the share of N below which particles are resampled.
    """

    num_sweeps: int = eqx.field(static=True, default=4)
    burn_in: int = eqx.field(static=True, default=1)
    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"), default=0.5)

    def __check_init__(self):
        _check_sweeps(self.num_sweeps, self.burn_in)

    @property
    def num_populations(self) -> int:
        return self.num_sweeps

    @property
    def selection(self) -> Selection:
        return Resample(self.ess_threshold)

    def run(self, key: Key[Array, ""], generator, potential, prompt: PyTree, num_particles: int, budget: Array) -> Runs:
        errors.check_count("num_particles", num_particles, minimum=2)
        sweeps: list[Sweep] = []
        reference = None
        for j, key_sweep in enumerate(jax.random.split(key, self.num_sweeps)):
            key_run, key_draw = jax.random.split(key_sweep)
            left = budget - sum(int(jnp.sum(s.records.num_tokens)) for s in sweeps)
            if left <= 0:
                break
            sweep = run_sweep(key_run, generator, potential, self.selection, prompt, num_particles, left, reference)
            sweeps.append(sweep)
            if not bool(jnp.any(sweep.population.is_done & jnp.isfinite(sweep.population.log_weights))):
                break
            if j + 1 < self.num_sweeps:
                reference, _ = draw_reference(key_draw, generator, potential, sweep)
        return pool(sweeps, sweeps[0], self.burn_in, [])


class ParallelTempering(eqx.Module):
    """Particle Gibbs at several powers of the potential, of which neighbours exchange their references.

    Attributes:
        betas: the powers, falling from 1; the answers are those of the first.
        num_sweeps: of every chain, with the first, plain one. Static.
        burn_in: how many of them do not count. Static.
        ess_threshold: the share of N below which particles are resampled.
    """

    betas: Float[Array, " m"] = eqx.field(
        converter=errors.as_array("betas", is_floating=True), default=(1.0, 0.5, 0.25)
    )
    num_sweeps: int = eqx.field(static=True, default=4)
    burn_in: int = eqx.field(static=True, default=1)
    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"), default=0.5)

    def __check_init__(self):
        _check_sweeps(self.num_sweeps, self.burn_in)
        if errors.is_concrete(self.betas):
            betas = np.asarray(self.betas)
            if betas.ndim != 1 or betas.size < 2 or betas[0] != 1.0 or np.any(np.diff(betas) >= 0) or betas[-1] < 0:
                raise ValueError(f"betas must fall from 1 and be at least two, such as (1.0, 0.5), got {betas}")

    @property
    def num_populations(self) -> int:
        return self.num_sweeps * self.betas.shape[0]

    @property
    def num_at_once(self) -> int:
        return self.betas.shape[0]

    @property
    def selection(self) -> Selection:
        return Resample(self.ess_threshold)

    def run(self, key: Key[Array, ""], generator, potential, prompt: PyTree, num_particles: int, budget: Array) -> Runs:
        errors.check_count("num_particles", num_particles, minimum=2)
        num = self.betas.shape[0]
        kept: list[Sweep] = []
        others: list[Sweep] = []
        references = None
        for j, key_sweep in enumerate(jax.random.split(key, self.num_sweeps)):
            key_run, key_exchange = jax.random.split(key_sweep)
            share = (budget - sum(int(jnp.sum(s.records.num_tokens)) for s in kept + others)) // num
            if share <= 0:
                break
            stacked = run_tempered(
                key_run,
                generator,
                potential,
                self.selection,
                prompt,
                num_particles,
                share,
                self.betas,
                references,
            )
            chains = _unstack(stacked, num)
            kept.append(chains[0])
            others.extend(chains[1:])
            finished = stacked.population.is_done & jnp.isfinite(stacked.population.log_weights)
            if not bool(jnp.all(jnp.any(finished, axis=1))):
                break
            references = exchange(key_exchange, generator, potential, stacked, self.betas, j % 2)
        return pool(kept, kept[0], self.burn_in, others)


def run_single(
    key: Key[Array, ""],
    generator: StepGenerator,
    potential: AbstractPotential,
    selection: Selection,
    prompt: PyTree,
    num_particles: int,
    budget: Array,
) -> Runs:
    """One population."""
    return as_runs(selection, run_sweep(key, generator, potential, selection, prompt, num_particles, budget))


def as_runs(selection: Selection, sweep: Sweep) -> Runs:
    """One population as all there is."""
    evidence, variance = evidence_of(sweep) if selection.has_evidence else (float("nan"), float("nan"))
    return Runs([sweep], np.zeros(1), evidence, variance, [])


_run_islands = jax.jit(
    jax.vmap(run_sweep, in_axes=(0, None, None, None, None, None, None)), static_argnames=("num_particles",)
)


@partial(jax.jit, static_argnames="num_particles")
def run_tempered(
    key: Key[Array, ""],
    generator: StepGenerator,
    potential: AbstractPotential,
    selection: Selection,
    prompt: PyTree,
    num_particles: int,
    budget: Int[Array, ""],
    betas: Float[Array, " m"],
    references: Reference | None = None,
) -> Sweep:
    """One sweep of every chain, stacked: conditional on its reference, if there are any."""

    def run(key: Array, beta: Array, reference: Reference | None) -> Sweep:
        return run_sweep(key, generator, potential**beta, selection, prompt, num_particles, budget, reference)

    return jax.vmap(run)(jax.random.split(key, betas.shape[0]), betas, references)


@jax.jit
def exchange(
    key: Key[Array, ""],
    generator: StepGenerator,
    potential: AbstractPotential,
    sweeps: Sweep,
    betas: Float[Array, " m"],
    parity: Int[Array, ""] | int,
) -> Reference:
    """A reference of every chain, after the neighbours m, m + 1 with m = parity mod 2 were offered an exchange."""
    key_draw, key_swap = jax.random.split(key)
    keys = jax.random.split(key_draw, betas.shape[0])
    references, log_g = jax.vmap(draw_reference, in_axes=(0, None, None, 0))(keys, generator, potential, sweeps)
    order = swap(key_swap, betas, log_g, parity)
    return jax.tree.map(lambda leaf: leaf[order], references)


def swap(
    key: Key[Array, ""], betas: Float[Array, " m"], log_g: Float[Array, " m"], parity: Int[Array, ""] | int
) -> Int[Array, " m"]:
    """Whose reference each chain has afterwards."""
    log_ratio = (betas[:-1] - betas[1:]) * (log_g[1:] - log_g[:-1])
    is_offered = jnp.arange(log_ratio.shape[0]) % 2 == parity
    # an answer that is impossible in both chains has no ratio, and stays
    is_swapped = is_offered & (jnp.log(jax.random.uniform(key, log_ratio.shape)) < log_ratio)
    edge = jnp.zeros(1, bool)
    moves = jnp.concatenate([is_swapped, edge]).astype(int) - jnp.concatenate([edge, is_swapped]).astype(int)
    return jnp.arange(betas.shape[0]) + moves


def pool(sweeps: list[Sweep], first: Sweep, burn_in: int, others: list[Sweep]) -> Runs:
    """Equal weights of the sweeps after the burn-in, and the evidence of the first, which was unconditional.

    A sweep that was cut short by the budget has finished answers, the short ones, and weighs nothing beside whole ones.
    """
    is_whole = np.array([not _is_open(sweep) for sweep in sweeps])
    last_whole = int(np.max(np.flatnonzero(is_whole), initial=-1))
    start = min(burn_in, last_whole if last_whole >= 0 else len(sweeps) - 1)
    counted, is_whole = sweeps[start:], is_whole[start:]
    votes = is_whole if is_whole.any() else np.ones(len(counted), bool)
    log_w = np.where(votes, -np.log(votes.sum()), -np.inf)
    return Runs(counted, log_w, *evidence_of(first), [*sweeps[:start], *others])


def evidence_of(sweep: Sweep) -> tuple[float, float]:
    """Log Zhat of a run, and its variance."""
    return if_finished([sweep], float(sweep.population.log_evidence), float(relative_variance(sweep.population)))


def if_finished(sweeps: list[Sweep], log_evidence: float, variance: float) -> tuple[float, float]:
    """The two, or NaN where an answer of positive weight is unfinished: they would be those of the steps so far.

    Where all have died the estimate is 0, and has no relative variance.
    """
    if any(map(_is_open, sweeps)):
        return float("nan"), float("nan")
    return log_evidence, variance if np.isfinite(log_evidence) else float("nan")


def _is_open(sweep: Sweep) -> bool:
    """Whether an answer of positive weight is unfinished."""
    people = sweep.population
    return bool(np.any(~np.asarray(people.is_done) & np.isfinite(np.asarray(people.log_weights))))


def _unstack(tree: PyTree, num: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(num)]


def _check_sweeps(num_sweeps: int, burn_in: int) -> None:
    errors.check_count("num_sweeps", num_sweeps)
    errors.check_count("burn_in", burn_in, minimum=0)
    if burn_in >= num_sweeps:
        raise ValueError(f"burn_in must be below num_sweeps={num_sweeps}, got {burn_in}")
