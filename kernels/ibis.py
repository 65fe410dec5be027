"""Iterated batch importance sampling (IBIS): a posterior that takes in its observations one after the other.

    pi_t  proportional to  p(x) prod_{s <= t} p(y_s | y_{0..s-1}, x)

    x^i ~ p;   for t = 0, ..., T-1:   w_i <- w_i p(y_t | y_{0..t-1}, x^i)
                                      where ESS <= ess_threshold N: resample, and move by a kernel invariant for pi_t

Every step estimates log p(y_t | y_{0..t-1}), the score of a one-step-ahead prediction, and their sum log p(y_{0..T-1}).
With ess_threshold = 1 (resampling and moving at every t) and fixed moves and step size E[Zhat] = Z for every number of
particles; with a lower threshold, whether to move depends on the particles, at a bias of order 1 / N.

One observation that says much about the parameters can leave few particles (see `ess`): there tempering by
`smc_sampler` is safer. A move costs all T terms of the likelihood, whatever t. Memory is N T.

References:
    Chopin (2002), doi:10.1093/biomet/89.3.539.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors, weights
from bayesinf.captured import current
from bayesinf.kernels.lineage import Lineage, found, relative_variance
from bayesinf.kernels.mutation import Moves, Mutation, as_mutation, each, equal_weights
from bayesinf.kernels.posterior import Posterior, as_posterior
from bayesinf.kernels.smc_sampler import warn_of_trouble

__all__ = ["IBISResult", "ibis"]


class IBISResult(NamedTuple):
    """What IBIS found; T observations, N particles.

    Attributes:
        particles: from the posterior given all observations, in the prior's own space, leading axis N.
        positions: the same, unconstrained.
        log_weights: normalised; they are to be used, unless the last step resampled.
        log_evidence: log Zhat; -inf if all weights vanished.
        log_evidence_variance: estimate of var(Zhat) / Z^2, to first order the variance of log Zhat (see `lineage`);
            NaN for other resampling than multinomial. From few particles, or few chains of waste-free, it is rough
            and may be negative.
        log_evidence_increments: estimates of log p(y_t | y_{0..t-1}).
        ess: effective sample size of the weights given y_{0..t}.
        is_resampled: whether the particles were then resampled and moved.
        acceptance_rates: of these moves; NaN where there were none.
        step_sizes: after step t; None where none is tuned.
        num_moves: moves of each particle.
        num_gradients: gradient evaluations of all particles.
        num_invalid: how many likelihood terms were NaN or +inf; they count as weights of zero.
    """

    particles: PyTree
    positions: PyTree
    log_weights: Float[Array, " n"]
    log_evidence: Float[Array, ""]
    log_evidence_variance: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    acceptance_rates: Float[Array, " t"]
    step_sizes: Float[Array, " t"] | None
    num_moves: Int[Array, " t"]
    num_gradients: Int[Array, " t"]
    num_invalid: Int[Array, " t"]


def ibis(
    key: errors.KeyLike,
    prior: Any,
    log_likelihood: Callable[..., Any] | None,
    mutation: Any,
    *,
    num_particles: int,
    data: PyTree = None,
    ess_threshold: Float[Array, ""] | float = 0.5,
    num_moves: int | str = "auto",
    max_moves: int = 100,
    waste_free: bool = False,
    tune: bool | str = True,
    resampling: str = "multinomial",
    batch_size: int | None = None,
    throw: bool = True,
) -> IBISResult:
    """Draws from a posterior, and the evidence of every beginning of the data, observation by observation.

    Runs one compiled loop, which shows no bar and which Ctrl-C cannot end.

    Args:
        key: PRNG key or seed.
        prior, mutation, num_particles, data, num_moves, max_moves, waste_free, tune, resampling, batch_size, throw: as
            in `smc_sampler`.
        log_likelihood: `log_likelihood(values)` or `log_likelihood(values, data)`; returns the vector of the T terms
            log p(y_t | y_{0..t-1}, values), in the order of time. None where the prior is a model with observed sites:
            then their elements are the observations, site after site.
        ess_threshold: in [0, 1]; resample and move where ess <= ess_threshold * N.

    Returns:
        An IBISResult.

    Raises:
        DegenerateWeightsError: at some t all weights were zero (not while traced); its `result` is the IBISResult.
        ValueError: an argument is out of its range or of the wrong kind.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> def log_likelihood(rate, counts):
        ...     return dist.Poisson(rate).log_prob(counts)
        >>> mala = functools.partial(bi.kernels.MALA, step_size=0.1)
        >>> result = bi.kernels.ibis(
        ...     0, dist.Gamma(2.0, 1.0), log_likelihood, mala, num_particles=1_000, data=jnp.array([3, 5, 4]))
        >>> result.log_evidence_increments.shape
        (3,)
    """
    key = errors.as_key(key)
    posterior = as_posterior(current(prior), log_likelihood, data)
    num_terms = jax.eval_shape(lambda k: posterior.log_likelihood(posterior.prior.draw(k)), key).shape[0]
    if errors.is_concrete(ess_threshold) and not 0 <= np.asarray(ess_threshold) <= 1:
        raise ValueError(f"ess_threshold must lie in [0, 1], a share of num_particles, got {ess_threshold}")
    moved = as_mutation(
        mutation,
        posterior.powered(jnp.ones(num_terms)),
        num_particles,
        num_moves=num_moves,
        max_moves=max_moves,
        waste_free=waste_free,
        tune=tune,
        resampling=resampling,
        batch_size=batch_size,
    )
    result = _run(key, posterior, moved, ess_threshold, num_particles)
    if throw and errors.is_concrete(result):
        _raise_if_degenerate(result, num_particles)
        rates = np.asarray(result.acceptance_rates)[np.asarray(result.is_resampled)]
        warn_of_trouble(result.num_invalid, rates[-1:])
    return result


class _Carry(NamedTuple):
    positions: PyTree
    terms: Float[Array, "n t"]
    log_weights: Float[Array, " n"]
    lineage: Lineage
    step_size: Float[Array, ""] | None


@partial(jax.jit, static_argnums=4)
def _run(key: Array, posterior: Posterior, mutation: Mutation, ess_threshold: Any, num_particles: int) -> IBISResult:
    def evaluate(positions: PyTree) -> Array:
        return each(posterior.log_likelihood, mutation.batch_size, positions)

    def renew(t: Array, carry: _Carry) -> tuple[_Carry, Moves]:
        is_seen = jnp.arange(carry.terms.shape[1]) <= t
        positions, lineage, moves = mutation.renew(
            jax.random.fold_in(key, t + 1),
            posterior.powered(is_seen.astype(carry.terms.dtype)),
            carry.positions,
            carry.log_weights,
            carry.lineage,
            carry.step_size,
        )
        log_weights = equal_weights(carry.log_weights)
        return _Carry(positions, evaluate(positions), log_weights, lineage, moves.step_size), moves

    def keep(_: Array, carry: _Carry) -> tuple[_Carry, Moves]:
        zero = jnp.zeros((), jnp.int32)
        return carry, Moves(carry.step_size, jnp.full((), jnp.nan), zero, zero)

    def step(carry: _Carry, t: Array) -> tuple[_Carry, tuple]:
        now = carry.terms[:, t]
        log_weights, log_mean = weights.normalize(carry.log_weights + weights.clean(now))
        carry = carry._replace(log_weights=log_weights)
        ess = weights.ess(log_weights)
        variance = relative_variance(carry.lineage, mutation.by_chain(log_weights))
        is_resampled = ess <= ess_threshold * num_particles
        carry, moves = jax.lax.cond(is_resampled, renew, keep, t, carry)
        increment = log_mean + jnp.log(num_particles)
        return carry, (increment, ess, is_resampled, moves, weights.num_invalid(now), variance)

    positions = jax.vmap(posterior.prior.draw)(jax.random.split(jax.random.fold_in(key, 0), num_particles))
    terms = evaluate(positions)
    equal = jnp.full(num_particles, -jnp.log(num_particles), terms.dtype)
    lineage = found(num_particles // mutation.chain_length, terms.dtype)
    start = _Carry(positions, terms, equal, lineage, mutation.step_size)
    last, (increments, ess, is_resampled, moves, num_invalid, variances) = jax.lax.scan(
        step, start, jnp.arange(terms.shape[1])
    )
    log_evidence = weights.compensated_sum(increments)
    return IBISResult(
        particles=jax.vmap(posterior.prior.constrain)(last.positions),
        positions=last.positions,
        log_weights=last.log_weights,
        log_evidence=log_evidence,
        log_evidence_variance=jnp.where(jnp.isneginf(log_evidence), jnp.nan, variances[-1]),
        log_evidence_increments=increments,
        ess=ess,
        is_resampled=is_resampled,
        acceptance_rates=moves.acceptance_rate,
        step_sizes=moves.step_size,
        num_moves=moves.num_moves,
        num_gradients=moves.num_gradients,
        num_invalid=num_invalid,
    )


def _raise_if_degenerate(result: IBISResult, num_particles: int) -> None:
    is_lost = np.isneginf(np.asarray(result.log_evidence_increments))
    if is_lost.any():
        t = int(np.argmax(is_lost))
        num_invalid = int(result.num_invalid[t])
        raise errors.DegenerateWeightsError(
            f"At observation {t} no particle of {num_particles} can explain the data so far: all weights are zero "
            f"({num_invalid} terms of the log likelihood are NaN or +inf there). Take more particles, a prior "
            "that covers the data, or smc_sampler, which tempers; throw=False returns log_evidence = -inf.",
            result,
        )
