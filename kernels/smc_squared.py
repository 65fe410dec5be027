"""SMC^2: parameters and states of a state-space model, observation by observation, a particle filter in each theta.

    theta^i ~ p,   for t = 0, ..., T-1:
        one step of the filter of theta^i, which estimates p(y_t | y_{0..t-1}, theta^i) by Zhat_t^i
        w_i <- w_i Zhat_t^i
        where ESS <= ess_threshold N:   resample the theta^i with their filters, and move them `num_moves` times by
            theta' = theta + L xi,   u' the random numbers of a filter of theta' over y_{0..t},   accepted with
            probability min(1, p(theta') Zhat_{0..t}(theta', u') / (p(theta) Zhat_{0..t}(theta, u)))

This is exact for every number of state particles, as the target of (theta, u) has the margin p(theta | y_{0..t}) (see
`nested_filters`); an accepted theta' brings its filter with it. L L^T = 2.38^2 / d S, with S the weighted covariance of
the theta, shrunk to their variances before y_t was weighed in by the weight of 5 of them: regular for few, too.

Where moves are accepted at a rate below `least_acceptance`, the filters get twice as many particles: each theta a new
filter over y_{0..t}, with random numbers u', and

    w_i <- w_i Zhat'_{0..t}(theta^i, u') / Zhat_{0..t}(theta^i, u)

With fixed `walk_tril` and `num_particles`, and ess_threshold = 1, E[Zhat] = Z for every N. What is chosen by looking at
the population costs a bias of order 1 / N.

It is an SMC sampler of the pairs (theta, u), and so its variance can be estimated from the ancestors of the theta (see
`lineage`), the noise of their filters included.

References:
    Chopin, Jacob and Papaspiliopoulos (2013), doi:10.1111/j.1467-9868.2012.01046.x.
    Roberts, Gelman and Gilks (1997), doi:10.1214/aoap/1034625254 (2.38).
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.captured import current
from bayesinf.kernels.chunks import warn_of_interruption
from bayesinf.kernels.filter_steps import warn_of_invalid
from bayesinf.kernels.lineage import relative_variance
from bayesinf.kernels.nested_filters import NestedFilters, Records, Run, advance, grow, start
from bayesinf.kernels.online_filter import FilterState
from bayesinf.kernels.posterior import Model, as_prior, check_proper
from bayesinf.models.state_space import StateSpaceModel, check_observations, check_series
from bayesinf.progress import Progress
from bayesinf.resampling import SCHEMES

__all__ = ["SMCSquaredResult", "smc_squared"]

HARDLY_EVER = 0.01  # an acceptance rate that calls for a warning


class SMCSquaredResult(NamedTuple):
    """What SMC^2 found; T observations, N draws of theta.

    Attributes:
        particles: parameters from their posterior given all observations, in the prior's own space, leading axis N.
        positions: the same, unconstrained.
        log_weights: normalised; they are to be used, unless the last step resampled.
        log_evidence: log Zhat; -inf if all weights vanished.
        log_evidence_variance: estimate of var(Zhat) / Z^2, to first order the variance of log Zhat (see `lineage`);
            NaN for other resampling of the parameters than multinomial. From few parameters it is rough and may be
            negative.
        log_evidence_increments: estimates of log p(y_t | y_{0..t-1}).
        ess: effective sample size of the weights given y_{0..t}.
        is_resampled: whether the parameters were then resampled and moved.
        acceptance_rates: of these moves; NaN where there were none.
        num_state_particles: of each filter, after step t.
        num_invalid: how many log weights of states were NaN or +inf, over all filters and moves; they count as weights
            of zero.
        filters: FilterStates with leading axis N, from which `ParticleFilter.step` of each model goes on. With
            `log_weights` they stand for p(theta, x_{T-1} | y).
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
    num_state_particles: Int[Array, " t"]
    num_invalid: Int[Array, " t"]
    filters: FilterState


def smc_squared(
    key: errors.KeyLike,
    build: Callable[[PyTree], StateSpaceModel],
    prior: Any,
    ys: PyTree,
    *,
    num_parameters: int,
    num_particles: int,
    max_particles: int | None = None,
    least_acceptance: Float[Array, ""] | float = 0.2,
    ess_threshold: Float[Array, ""] | float = 0.5,
    num_moves: int = 5,
    walk_tril: Float[Array, "d d"] | None = None,
    proposal: str = "bootstrap",
    resampling: str = "multinomial",
    filter_resampling: str = "systematic",
    filter_ess_threshold: Float[Array, ""] | float = 0.5,
    batch_size: int | None = None,
    progress: bool = False,
    throw: bool = True,
) -> SMCSquaredResult:
    """Draws parameters and states from their posterior, with the evidence of every beginning of the series.

    New data, priors or thresholds of the same shape compile nothing; a doubling of the state particles compiles anew,
    once. It may be jitted and vmapped where `max_particles` is None.

    Args:
        key: PRNG key or seed.
        build: `build(theta)` returns the StateSpaceModel.
        prior: of theta, what can be sampled: a NumPyro distribution or a pytree of them, a pair (sample, log_prob), or
            `Target.from_numpyro` of a model without observed sites.
        ys: observations with leading axis T; NaN where missing.
        num_parameters: N, how many draws of theta.
        num_particles: state particles of each filter, to begin with: enough that log Zhat has a variance of 1 to 3.
        max_particles: how many they may become; None for no more than `num_particles`.
        least_acceptance: double them where the moves are accepted at a lower rate.
        ess_threshold: in [0, 1]; resample and move the theta where ess <= ess_threshold * N.
        num_moves: of every theta, then.
        walk_tril: L, the Cholesky factor of the covariance of a move, over the unconstrained theta as `ravel_pytree`
            lays it out; by default it follows the population.
        proposal: of the filters, "bootstrap" or "guided" by the model's own proposals.
        resampling: of parameters, one of `bayesinf.resampling.SCHEMES`. Only "multinomial" has a variance estimate;
            "systematic" has a little less variance.
        filter_resampling: of the states of each filter, one of the same.
        filter_ess_threshold: in [0, 1]; a filter resamples its states where their ess is at most that share of them.
        batch_size: how many filters run at once; None for all.
        progress: whether to show a bar. The run then comes back to the host after every observation, and Ctrl-C returns
            the posterior given those so far, with a warning; without, it is one compiled call between doublings of the
            particles, which Ctrl-C cannot end.
        throw: whether to raise when no weight is left.

    Returns:
        An SMCSquaredResult.

    Raises:
        DegenerateWeightsError: at some t all weights were zero (not while traced); its `result` is the
            SMCSquaredResult.
        ValueError: an argument is out of its range or of the wrong kind.

    Example:
        >>> import numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> def build(theta):
        ...     return bi.models.LinearGaussian.scalar(0.9, theta["scale"])
        >>> _, ys = bi.models.simulate(0, build({"scale": 0.5}), num_steps=10)
        >>> prior = {"scale": dist.HalfNormal(1.0)}
        >>> result = bi.kernels.smc_squared(1, build, prior, ys, num_parameters=50, num_particles=20)
        >>> result.particles["scale"].shape, result.log_evidence_increments.shape
        ((50,), (10,))

    References:
        Chopin, Jacob and Papaspiliopoulos (2013), doi:10.1111/j.1467-9868.2012.01046.x.
    """
    key_start, key_renew, key_grow = jax.random.split(errors.as_key(key), 3)
    nested = NestedFilters(
        build=build,
        prior=_as_drawable(prior),
        ys=check_series(ys),
        walk_tril=walk_tril,
        ess_threshold=ess_threshold,
        filter_ess_threshold=filter_ess_threshold,
        least_acceptance=least_acceptance,
        num_parameters=errors.check_count("num_parameters", num_parameters, minimum=2),
        num_particles=errors.check_count("num_particles", num_particles),
        max_particles=num_particles if max_particles is None else errors.check_count("max_particles", max_particles),
        num_moves=errors.check_count("num_moves", num_moves),
        proposal=proposal,
        resampling=resampling,
        filter_resampling=filter_resampling,
        batch_size=batch_size if batch_size is None else errors.check_count("batch_size", batch_size),
    )
    _check(nested)
    run, end = start(nested, key_start), jnp.asarray(nested.num_steps)
    if not errors.is_concrete(run):
        if nested.num_particles < nested.max_particles:
            raise ValueError(
                "max_particles must be None while traced, where the shapes of the filters cannot change; got "
                f"{max_particles} with num_particles={num_particles}"
            )
        return _result(nested, advance(nested, key_renew, run, end))
    bar = Progress(nested.num_steps, is_shown=progress)
    try:
        while run.t < nested.num_steps:
            before = int(run.t)
            if run.needs_more:
                more = min(2 * nested.num_particles, nested.max_particles)
                larger = dataclasses.replace(nested, num_particles=more)
                run, nested = jax.block_until_ready(grow(larger, key_grow, run)), larger
            else:
                run = jax.block_until_ready(advance(nested, key_renew, run, run.t + 1 if progress else end))
            bar.update(int(run.t) - before, f"{nested.num_particles} state particles", None, None)
    except KeyboardInterrupt:
        pass
    finally:
        bar.close()
    result = _result(nested, run)
    if run.t < nested.num_steps:
        warn_of_interruption(int(run.t) + 1, nested.num_steps, "observations", stacklevel=3)
        result = _cut(result, run)
    if throw and errors.is_concrete(result):
        _raise_if_degenerate(result)
    return result


@jax.jit
def _result(self: NestedFilters, run: Run) -> SMCSquaredResult:
    positions, log_weights, filters, _ = run.population
    particles = jax.vmap(lambda position: self.prior.constrain(position))(positions)
    log_evidence = weights.compensated_sum(run.records.log_evidence_increments)
    variance = jnp.where(jnp.isneginf(log_evidence), jnp.nan, run.variance)
    return SMCSquaredResult(particles, positions, log_weights, log_evidence, variance, *run.records, filters)


def _cut(result: SMCSquaredResult, run: Run) -> SMCSquaredResult:
    """Of a run that was interrupted at time t: y_t is weighed in, and what follows from the weights is not done yet."""
    num = int(run.t) + 1
    rows = {name: jnp.asarray(np.asarray(getattr(result, name))[:num]) for name in Records._fields}
    rows["ess"] = rows["ess"].at[-1].set(weights.ess(result.log_weights))
    variance = relative_variance(run.population.lineage, result.log_weights)
    return result._replace(log_evidence_variance=variance, **rows)


def _as_drawable(prior: Any) -> Any:
    """A prior that can be sampled, and is nothing but a prior."""
    prior = as_prior(current(prior))
    if isinstance(prior, Model) and prior.observed:
        raise ValueError(
            f"prior must be a model without observed sites or factors, got one with {list(prior.observed)}; the "
            "observations are ys, and their law is that of build(theta)"
        )
    return prior


def _check(self: NestedFilters) -> None:
    """What can be known of the arguments before anything runs."""
    errors.check_arguments("build", self.build, "theta")
    for name in ("resampling", "filter_resampling"):
        errors.check_choice(name, getattr(self, name), SCHEMES)
    for name in ("ess_threshold", "filter_ess_threshold", "least_acceptance"):
        value = getattr(self, name)
        if errors.is_concrete(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if self.max_particles < self.num_particles:
        raise ValueError(
            f"max_particles must be at least num_particles={self.num_particles}, or None, got {self.max_particles}"
        )
    position = check_proper(self.prior)
    dim = sum(leaf.size for leaf in jax.tree.leaves(position))
    if self.walk_tril is not None and self.walk_tril.shape != (dim, dim):
        raise ValueError(
            f"walk_tril must be over the ravelled unconstrained theta, of shape {(dim, dim)}, got shape "
            f"{self.walk_tril.shape}"
        )

    def try_out(key: Key[Array, ""]) -> Array:
        check_observations(self.filter_of(self.prior.draw(key)).model, self.ys)
        return jnp.zeros(())

    jax.eval_shape(try_out, jax.random.key(0))


def _raise_if_degenerate(result: SMCSquaredResult) -> None:
    is_lost = np.isneginf(np.asarray(result.log_evidence_increments))
    if is_lost.any():
        t = int(np.argmax(is_lost))
        num = result.log_weights.shape[0]
        raise errors.DegenerateWeightsError(
            f"At time step {t} no filter of {num} parameters can explain the observation: all weights are zero "
            f"({int(result.num_invalid[t])} log weights of states are NaN or +inf there). Take more parameters or more "
            "state particles, a prior that covers the data, proposal='guided', or an observation law with heavier "
            "tails; throw=False returns log_evidence = -inf.",
            result,
        )
    warn_of_invalid(np.asarray(result.num_invalid), "time step")
    rates = np.asarray(result.acceptance_rates)[np.asarray(result.is_resampled)]
    if np.any(rates[-1:] < HARDLY_EVER):
        warnings.warn(
            f"the last moves were accepted at a rate below {HARDLY_EVER}: the parameters are copies of few, and stand "
            "for less than their number; raise num_particles, or let them grow by max_particles",
            errors.SamplingWarning,
            stacklevel=3,
        )
