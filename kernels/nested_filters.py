"""Parameters, each with a particle filter of its own: what SMC^2 does with such a population.

The population is of (theta, u), u all random numbers of the filter of theta. Given y_0, ..., y_t it follows

    pi_t(theta, u)  proportional to  p(theta) psi_t(u) Zhat_{0..t}(theta, u)

with psi_t the law of u. Its margin in theta is p(theta | y_{0..t}), as the integral of psi_t Zhat_{0..t} over u is
p(y_{0..t} | theta). Three things are done to it: y_{t+1} is weighed in, it is resampled and moved on pi_t, and the
filters are replaced by larger ones on pi_t.

References:
    Chopin, Jacob and Papaspiliopoulos (2013), doi:10.1111/j.1467-9868.2012.01046.x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.captured import as_pytree
from bayesinf.kernels.lineage import Lineage, descend, found, relative_variance
from bayesinf.kernels.mutation import each, equal_weights
from bayesinf.kernels.online_filter import FilterState, ParticleFilter, begin, keys_of, move_on
from bayesinf.models.state_space import StateSpaceModel
from bayesinf.resampling import gather, resample

__all__ = ["NestedFilters", "Population", "Records", "Run", "advance", "grow", "start"]

PRIOR_WEIGHT = 5.0  # in parameters, of the variances that their covariance is shrunk to


class Population(NamedTuple):
    """N parameters and their filters, all at the same time.

    Attributes:
        positions: unconstrained parameters, leading axis N.
        log_weights: normalised.
        filters: states of a particle filter of each, leading axis N.
        lineage: from which of the first parameters each descends.
    """

    positions: PyTree
    log_weights: Float[Array, " n"]
    filters: FilterState
    lineage: Lineage


class Records(NamedTuple):
    """What is kept of every t; see `SMCSquaredResult`."""

    log_evidence_increments: Float[Array, " t"]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    acceptance_rates: Float[Array, " t"]
    num_state_particles: Int[Array, " t"]
    num_invalid: Int[Array, " t"]


class Run(NamedTuple):
    """Where a run stands: y_t is weighed in, and what follows from the weights is still to be done; at T it has ended.

    Attributes:
        t: the time.
        needs_more: whether it was done, moves were hardly accepted, and the filters need more particles to go on.
        population, records: as they are.
        variance: of Zhat_{0..t} / Z, from the weights before they are resampled.
    """

    t: Int[Array, ""]
    needs_more: Bool[Array, ""]
    population: Population
    records: Records
    variance: Float[Array, ""]


class NestedFilters(eqx.Module):
    """What does not change in a run, but for the number of state particles; see `smc_squared` for the attributes."""

    build: Callable[[PyTree], StateSpaceModel] = eqx.field(converter=as_pytree)
    prior: Any  # of `posterior.as_prior`
    ys: PyTree
    walk_tril: Float[Array, "d d"] | None = eqx.field(converter=errors.as_array("walk_tril", is_optional=True))
    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"))
    filter_ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("filter_ess_threshold"))
    least_acceptance: Float[Array, ""] = eqx.field(converter=errors.as_array("least_acceptance"))
    num_parameters: int = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)
    max_particles: int = eqx.field(static=True)
    num_moves: int = eqx.field(static=True)
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)
    filter_resampling: str = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """T."""
        return jax.tree.leaves(self.ys)[0].shape[0]

    def filter_of(self, position: PyTree) -> ParticleFilter:
        """The filter of one theta."""
        return ParticleFilter(
            self.build(self.prior.constrain(position)),
            num_particles=self.num_particles,
            proposal=self.proposal,
            resampling=self.filter_resampling,
            ess_threshold=self.filter_ess_threshold,
        )

    def first(self, key: Key[Array, ""], position: PyTree) -> tuple[FilterState, Array, Array]:
        """The filter of a theta at y_0, the log of its increment of the evidence, and how many weights were invalid."""
        state, info = begin(self.filter_of(position), key, self._row(0))
        return state, info.log_evidence_increment, info.num_invalid

    def next(self, position: PyTree, state: FilterState) -> tuple[FilterState, Array, Array]:
        """The same one observation later."""
        t = state.t + 1
        state, info = move_on(self.filter_of(position), state, keys_of(state.key, t), self._row(t))
        return state, info.log_evidence_increment, info.num_invalid

    def anew(
        self, keys: Key[Array, " n"], positions: PyTree, t: Int[Array, ""]
    ) -> tuple[FilterState, Int[Array, " n"]]:
        """Filters over y_0, ..., y_t, and over nothing beyond; and how many of their weights were invalid."""

        def filter_one(key: Array, position: PyTree) -> tuple[FilterState, Array]:
            def step(_: Any, carry: tuple[FilterState, Array]) -> tuple[FilterState, Array]:
                state, _, num_invalid = self.next(position, carry[0])
                return state, carry[1] + num_invalid

            state, _, num_invalid = self.first(key, position)
            return jax.lax.fori_loop(0, t, step, (state, num_invalid))

        return each(filter_one, self.batch_size, keys, positions)

    def take(self, t: Int[Array, ""], population: Population, records: Records) -> tuple[Population, Records]:
        """Moves all filters to y_t, and weighs it in."""
        filters, increments, num_invalid = each(
            lambda position, state: self.next(position, state),
            self.batch_size,
            population.positions,
            population.filters,
        )
        return self.weigh(t, population._replace(filters=filters), records, increments, num_invalid)

    def weigh(
        self, t: Int[Array, ""], population: Population, records: Records, increments: Array, num_invalid: Array
    ) -> tuple[Population, Records]:
        """Multiplies the weights by the increments of the evidence at y_t."""
        log_weights, log_mean = weights.normalize(population.log_weights + increments)
        records = records._replace(
            log_evidence_increments=records.log_evidence_increments.at[t].set(log_mean + jnp.log(self.num_parameters)),
            num_invalid=records.num_invalid.at[t].set(jnp.sum(num_invalid, dtype=jnp.int32)),
        )
        return population._replace(log_weights=log_weights), records

    def walk(self, population: Population) -> Float[Array, "d d"]:
        """L, the Cholesky factor of the covariance of the moves."""
        if self.walk_tril is not None:
            return self.walk_tril
        flat = _flattening(population.positions)[0](population.positions)
        is_whole = jnp.all(jnp.isfinite(flat), axis=1, keepdims=True)  # a draw at the edge of the prior is not
        flat = jnp.where(is_whole, flat, 0.0)
        before = jnp.var(flat, axis=0, where=is_whole)
        before = jnp.where(before > 0, before, 1.0)  # of what does not vary nothing is known
        w = jnp.exp(population.log_weights).astype(flat.dtype)
        centred = flat - w @ flat
        num = weights.ess(population.log_weights).astype(flat.dtype)
        covariance = (num * (w * centred.T) @ centred + PRIOR_WEIGHT * jnp.diag(before)) / (num + PRIOR_WEIGHT)
        return 2.38 / jnp.sqrt(flat.shape[1]) * jnp.linalg.cholesky(covariance)

    def log_prior(self, positions: PyTree) -> Float[Array, " n"]:
        """Log p(theta), where it is not constrained."""
        return weights.clean(jax.vmap(lambda position: self.prior.log_density(position))(positions))

    def log_density(self, positions: PyTree, filters: FilterState) -> Float[Array, " n"]:
        """Log p(theta) + log Zhat_{0..t}(theta, u), what the moves compare."""
        return (self.log_prior(positions) + filters.log_evidence).astype(filters.log_evidence.dtype)

    def renew(
        self, key: Key[Array, ""], t: Int[Array, ""], population: Population
    ) -> tuple[Population, Float[Array, ""], Int[Array, ""]]:
        """Resamples and moves on pi_t; also the acceptance rate, and how many weights were invalid."""
        num, dtype = self.num_parameters, population.log_weights.dtype
        key_resample, key_filters, key_moves = jax.random.split(key, 3)
        tril = self.walk(population)
        parents = resample(key_resample, population.log_weights, num, self.resampling)
        lineage = descend(population.lineage, parents, self.resampling)
        positions, filters = gather((population.positions, population.filters), parents)
        filters = filters._replace(key=jax.random.split(key_filters, num))  # copies go on independently
        flatten, unravel = _flattening(positions)

        def move(k: Array, carry: tuple) -> tuple:
            *now, rate, num_invalid = carry
            key_walk, key_filter, key_accept = jax.random.split(jax.random.fold_in(key_moves, k), 3)
            flat = flatten(now[0])
            proposed = unravel((flat + jax.random.normal(key_walk, flat.shape, flat.dtype) @ tril.T).astype(flat.dtype))
            proposed_filters, invalid = self.anew(jax.random.split(key_filter, num), proposed, t)
            # where the prior vanishes the model may be none: what its filter says does not matter
            invalid = jnp.where(jnp.isneginf(self.log_prior(proposed)), 0, invalid)
            there = [proposed, proposed_filters, self.log_density(proposed, proposed_filters)]
            log_ratio = there[2] - now[2]
            log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
            is_accepted = jnp.log(jax.random.uniform(key_accept, log_ratio.shape, dtype)) < log_ratio
            # what is accepted is theta with its random numbers: the filter that they make goes along
            return (
                *_choose(is_accepted, there, now),
                rate + _mean_rate(log_ratio),
                num_invalid + jnp.sum(invalid, dtype=jnp.int32),
            )

        carry = (
            positions,
            filters,
            self.log_density(positions, filters),
            jnp.zeros((), dtype),
            jnp.zeros((), jnp.int32),
        )
        positions, filters, _, rate, num_invalid = jax.lax.fori_loop(0, self.num_moves, move, carry)
        population = Population(positions, equal_weights(population.log_weights), filters, lineage)
        return population, rate / self.num_moves, num_invalid

    def _row(self, t: Any) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[t], self.ys)


@jax.jit
def start(self: NestedFilters, key: Key[Array, ""]) -> Run:
    """Draws from the prior, and weighs in y_0."""
    key_prior, key_filters = jax.random.split(key)
    num, num_steps = self.num_parameters, self.num_steps
    positions = jax.vmap(lambda key: self.prior.draw(key))(jax.random.split(key_prior, num))
    # by functions, not methods, here as elsewhere: JAX compares what it maps, and methods hold traced parameters
    filters, increments, num_invalid = each(
        lambda key, position: self.first(key, position), self.batch_size, jax.random.split(key_filters, num), positions
    )
    dtype = increments.dtype
    records = Records(
        log_evidence_increments=jnp.zeros(num_steps, dtype),
        ess=jnp.zeros(num_steps, dtype),
        is_resampled=jnp.zeros(num_steps, bool),
        acceptance_rates=jnp.full(num_steps, jnp.nan, dtype),
        num_state_particles=jnp.full(num_steps, self.num_particles, jnp.int32),
        num_invalid=jnp.zeros(num_steps, jnp.int32),
    )
    t = jnp.zeros((), jnp.int32)
    equal = jnp.full(num, -jnp.log(num), dtype)
    population = Population(positions, equal, filters, found(num, dtype))
    population, records = self.weigh(t, population, records, increments, num_invalid)
    return Run(t, jnp.zeros((), bool), population, records, jnp.zeros((), dtype))


@jax.jit
def advance(self: NestedFilters, key: Key[Array, ""], run: Run, until: Int[Array, ""]) -> Run:
    """Goes on to time `until`, T for the end, or to where the filters need more particles."""
    can_grow = self.num_particles < self.max_particles

    def step(run: Run) -> Run:
        t, population, records = run.t, run.population, run.records
        ess = weights.ess(population.log_weights)
        variance = relative_variance(population.lineage, population.log_weights)
        is_resampled = (ess <= self.ess_threshold * self.num_parameters) & (ess > 0)
        population, rate, num_invalid = jax.lax.cond(
            is_resampled,
            lambda population: self.renew(jax.random.fold_in(key, t), t, population),
            lambda population: (population, jnp.full((), jnp.nan, ess.dtype), jnp.zeros((), jnp.int32)),
            population,
        )
        records = records._replace(
            ess=records.ess.at[t].set(ess),
            is_resampled=records.is_resampled.at[t].set(is_resampled),
            acceptance_rates=records.acceptance_rates.at[t].set(rate),
            num_invalid=records.num_invalid.at[t].add(num_invalid),
        )
        is_last = t + 1 == self.num_steps
        # known to be false where it can be: under vmap a batched condition would run both branches
        needs_more = (rate < self.least_acceptance) & ~is_last if can_grow else run.needs_more
        population, records = jax.lax.cond(
            is_last | needs_more,
            lambda population, records: (population, records),
            lambda population, records: self.take(t + 1, population, records),
            population,
            records,
        )
        return Run(jnp.where(needs_more, t, t + 1), needs_more, population, records, variance)

    return jax.lax.while_loop(lambda run: (run.t < until) & ~run.needs_more, step, run)


@jax.jit
def grow(self: NestedFilters, key: Key[Array, ""], run: Run) -> Run:
    """Gives every theta a filter of as many particles as are asked for now, and goes on to the next observation."""
    t, old, records = run.t, run.population, run.records
    keys = jax.random.split(jax.random.fold_in(key, t), self.num_parameters)
    filters, num_invalid = self.anew(keys, old.positions, t)
    log_weights, log_mean = weights.normalize(old.log_weights + _log_exchange(filters, old.filters))
    is_after = jnp.arange(self.num_steps) >= t
    records = records._replace(
        # it has mean one, and without it Zhat would be biased
        log_evidence_increments=records.log_evidence_increments.at[t].add(log_mean + jnp.log(self.num_parameters)),
        num_state_particles=jnp.where(is_after, self.num_particles, records.num_state_particles),
        num_invalid=records.num_invalid.at[t].add(jnp.sum(num_invalid, dtype=jnp.int32)),
    )
    population = old._replace(log_weights=log_weights, filters=filters)
    population, records = self.take(t + 1, population, records)
    return run._replace(t=t + 1, needs_more=jnp.zeros((), bool), population=population, records=records)


def _log_exchange(new: FilterState, old: FilterState) -> Float[Array, " n"]:
    """The log weights of an exchange of filters; a parameter that had no weight gets none."""
    return weights.clean(new.log_evidence - old.log_evidence)


def _mean_rate(log_ratio: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.mean(jnp.exp(jnp.minimum(log_ratio, 0.0)))


def _choose(is_new: Bool[Array, " n"], new: PyTree, old: PyTree) -> PyTree:
    """Row by row the one or the other."""
    return jax.tree.map(lambda a, b: jnp.where(is_new.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _flattening(positions: PyTree) -> tuple[Callable[[PyTree], Array], Callable[[Array], PyTree]]:
    """What lays out the rows of a population as vectors, and what undoes it."""
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], positions))
    return jax.vmap(lambda position: ravel_pytree(position)[0]), jax.vmap(unravel)
