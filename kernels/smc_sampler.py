"""SMC sampler: a population carried from the prior to the posterior by tempering the likelihood.

    pi_t  proportional to  p(x) L(x)^{lambda_t},     0 = lambda_0 < lambda_1 < ... < lambda_n = 1

    x_0^i ~ p;   for t = 1, ..., n:   w_i = L(x_{t-1}^i)^{lambda_t - lambda_{t-1}},
                                      resample by w, and move by a kernel that leaves pi_t invariant
    Zhat = prod_t mean_i w_i

With fixed temperatures, moves and step size E[Zhat] = Z = int p L for every number of particles. Adaptive temperatures
make each step as long as the effective sample size allows,

    lambda_t = max{lambda <= 1: ESS(L^{lambda - lambda_{t-1}}) >= ess_target N},

found by bisection on the logarithm of the increment, on which ESS falls monotonically. Where fewer particles than that
have a positive likelihood the increment is the least possible, which only drops the others. Adaptive runs are
consistent, with a bias of order 1 / N.

References:
    Del Moral, Doucet and Jasra (2006), doi:10.1111/j.1467-9868.2006.00553.x.
    Jasra, Stephens, Doucet and Tsagaris (2011), doi:10.1111/j.1467-9469.2010.00723.x (adaptive temperatures).
    Dau and Chopin (2022), doi:10.1111/rssb.12475 (waste-free).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors, weights
from bayesinf.captured import current
from bayesinf.kernels.lineage import Lineage, found, relative_variance
from bayesinf.kernels.mutation import Mutation, as_mutation, each
from bayesinf.kernels.posterior import Posterior, as_posterior

__all__ = ["SMCResult", "next_temperature", "smc_sampler", "warn_of_trouble"]

LOG_RANGE = 80.0  # increments are sought from exp(-80) of the way to 1 on: normal numbers in float32
LEAST_ACCEPTANCE = 0.01


class SMCResult(NamedTuple):
    """What an SMC sampler found; n temperatures, N particles.

    A call with concrete arguments returns arrays of exactly n rows; a traced one `max_temperatures` rows, of which the
    first `num_steps` count.

    Attributes:
        particles: draws from the posterior in the prior's own space, leading axis N.
        positions: the same, unconstrained: what chains of the same target may start from.
        log_weights: normalised; equal, as the last step resamples. -inf if all weights vanished.
        log_evidence: log Zhat; -inf if all weights vanished, NaN if lambda = 1 was not reached.
        log_evidence_variance: estimate of var(Zhat) / Z^2, to first order the variance of log Zhat (see `lineage`);
            NaN for other resampling than multinomial. From few particles, or few chains of waste-free, it is rough
            and may be negative.
        log_evidence_increments: log mean w at each temperature.
        temperatures: lambda_1 to lambda_n.
        ess: effective sample size before each resampling.
        acceptance_rates: mean over particles and moves at each temperature.
        step_sizes: after the moves at each temperature; None where none is tuned.
        num_moves: moves of each particle at each temperature.
        num_gradients: gradient evaluations of all particles at each temperature.
        num_invalid: draws from the prior whose log likelihood was NaN or +inf; they count as weights of zero.
        num_steps: n.
    """

    particles: PyTree
    positions: PyTree
    log_weights: Float[Array, " n"]
    log_evidence: Float[Array, ""]
    log_evidence_variance: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    temperatures: Float[Array, " t"]
    ess: Float[Array, " t"]
    acceptance_rates: Float[Array, " t"]
    step_sizes: Float[Array, " t"] | None
    num_moves: Int[Array, " t"]
    num_gradients: Int[Array, " t"]
    num_invalid: Int[Array, ""]
    num_steps: Int[Array, ""]


def smc_sampler(
    key: errors.KeyLike,
    prior: Any,
    log_likelihood: Callable[..., Any] | None,
    mutation: Any,
    *,
    num_particles: int,
    data: PyTree = None,
    ess_target: Float[Array, ""] | float = 0.5,
    temperatures: Float[Array, " t"] | Sequence[float] | None = None,
    num_moves: int | str = "auto",
    max_moves: int = 100,
    waste_free: bool = False,
    tune: bool | str = True,
    resampling: str = "multinomial",
    batch_size: int | None = None,
    max_temperatures: int = 1_000,
    throw: bool = True,
) -> SMCResult:
    """Draws from a posterior, and its evidence, by tempering.

    Runs one compiled loop; new data, prior parameters, step sizes, temperatures and ess_target of the same shape
    compile nothing. It may be jitted, and vmapped over keys, data and priors. It shows no bar, and Ctrl-C does not end
    it.

    Args:
        key: PRNG key or seed.
        prior: proper, and a NumPyro distribution, a pytree of them, a pair (sample, log_prob) on an unconstrained
            space, or `Target.from_numpyro(model, ...)`.
        log_likelihood: `log_likelihood(values)`, or `log_likelihood(values, data)` where `data` is given, with values
            as drawn from the prior; returns a scalar, or a vector of terms, which are summed. None where the prior is a
            model with observed sites: they are the likelihood. A new function compiles anew.
        mutation: a function of a target that returns a kernel, such as `functools.partial(MALA, step_size=0.1)`, or a
            kernel, which is rebound to each pi_t. It must leave its target invariant: of one that is known not to, as
            LMC, a SamplingWarning tells.
        num_particles: N.
        data: a pytree of arrays.
        ess_target: in (0, 1); the share of N at which adaptive temperatures keep the effective sample size.
        temperatures: lambda_1 < ... < lambda_n = 1, instead of adaptive ones.
        num_moves: moves of each particle at each temperature, or "auto" (see `mutation`).
        max_moves: the most that "auto" makes.
        waste_free: keep all moves of N / (num_moves + 1) chains instead of the last of N chains.
        tune: whether the kernel's step size follows its target acceptance and its metric, where it has one, the
            variances of the particles; "dense" for their covariance.
        resampling: one of `bayesinf.resampling.SCHEMES`. Only "multinomial" has a variance estimate; "systematic" has a
            little less variance.
        batch_size: particles evaluated at once, to bound memory; None for all.
        max_temperatures: the most that adaptive tempering may take.
        throw: whether to raise when no weight is left, or lambda = 1 is not reached.

    Returns:
        An SMCResult.

    Raises:
        DegenerateWeightsError: no draw from the prior has a positive likelihood, or lambda = 1 was not reached within
            `max_temperatures` (not while traced); its `result` is the SMCResult.
        ValueError: an argument is out of its range or of the wrong kind.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> def log_likelihood(rate, counts):
        ...     return dist.Poisson(rate).log_prob(counts)
        >>> mala = functools.partial(bi.kernels.MALA, step_size=0.1)
        >>> result = bi.kernels.smc_sampler(
        ...     0, dist.Gamma(2.0, 1.0), log_likelihood, mala, num_particles=1_000, data=jnp.array([3, 5, 4]))
        >>> bool(abs(result.particles.mean() - 14 / 4) < 0.2)
        True

    References:
        Chopin and Papaspiliopoulos (2020), doi:10.1007/978-3-030-47845-2, chapter 17.
    """
    key = errors.as_key(key)
    errors.check_count("max_temperatures", max_temperatures)
    posterior = as_posterior(current(prior), log_likelihood, data)
    moved = as_mutation(
        mutation,
        posterior.powered(jnp.ones(())),
        num_particles,
        num_moves=num_moves,
        max_moves=max_moves,
        waste_free=waste_free,
        tune=tune,
        resampling=resampling,
        batch_size=batch_size,
    )
    if temperatures is None:
        errors.check_fraction("ess_target", ess_target)
        if errors.is_concrete(ess_target) and np.asarray(ess_target) * num_particles <= 1:
            raise ValueError(
                f"ess_target * num_particles must exceed 1, the least effective sample size, got {ess_target} * "
                f"{num_particles}; take more particles"
            )
        ladder = None
    else:
        ladder = _check_ladder(temperatures)
        max_temperatures = ladder.shape[0]
    result = _run(key, posterior, moved, ladder, ess_target, num_particles, max_temperatures)
    if errors.is_concrete(result):
        result = _trim(result)
        if throw:
            _raise_if_failed(result, num_particles)
            warn_of_trouble(result.num_invalid, result.acceptance_rates[-1:])
    return result


class _Carry(NamedTuple):
    positions: PyTree
    log_likelihood: Float[Array, " n"]
    temperature: Float[Array, ""]
    lineage: Lineage
    step_size: Float[Array, ""] | None
    variance: Float[Array, ""]
    is_lost: Array
    num_steps: Int[Array, ""]
    records: dict[str, Any]


@partial(jax.jit, static_argnums=(5, 6))
def _run(
    key: Array,
    posterior: Posterior,
    mutation: Mutation,
    ladder: Array | None,
    ess_target: Any,
    num_particles: int,
    max_temperatures: int,
) -> SMCResult:
    def evaluate(positions: PyTree) -> Array:
        return each(lambda position: jnp.sum(posterior.log_likelihood(position)), mutation.batch_size, positions)

    def step(carry: _Carry) -> _Carry:
        t = carry.num_steps
        if ladder is None:
            temperature = next_temperature(carry.log_likelihood, carry.temperature, ess_target)
        else:
            temperature = ladder[t].astype(carry.temperature.dtype)
        log_weights, log_mean = weights.normalize((temperature - carry.temperature) * carry.log_likelihood)
        variance = relative_variance(carry.lineage, mutation.by_chain(log_weights))

        positions, lineage, moves = mutation.renew(
            jax.random.fold_in(key, t + 1),
            posterior.powered(temperature),
            carry.positions,
            log_weights,
            carry.lineage,
            carry.step_size,
        )
        told = {
            "log_evidence_increments": log_mean,
            "temperatures": temperature,
            "ess": weights.ess(log_weights),
            "acceptance_rates": moves.acceptance_rate,
            "step_sizes": moves.step_size,
            "num_moves": moves.num_moves,
            "num_gradients": moves.num_gradients,
        }
        records = jax.tree.map(lambda rows, row: rows.at[t].set(row.astype(rows.dtype)), carry.records, told)
        is_lost = weights.is_degenerate(log_weights)
        log_likelihood = evaluate(positions)
        return _Carry(
            positions, log_likelihood, temperature, lineage, moves.step_size, variance, is_lost, t + 1, records
        )

    def goes_on(carry: _Carry) -> Array:
        return (carry.temperature < 1.0) & ~carry.is_lost & (carry.num_steps < max_temperatures)

    positions = jax.vmap(posterior.prior.draw)(jax.random.split(jax.random.fold_in(key, 0), num_particles))
    log_likelihood = evaluate(positions)
    num_invalid = weights.num_invalid(log_likelihood)
    dtype = log_likelihood.dtype
    step_size = mutation.step_size
    records = {
        "log_evidence_increments": jnp.zeros(max_temperatures, dtype),
        "temperatures": jnp.full(max_temperatures, jnp.nan, dtype),
        "ess": jnp.full(max_temperatures, jnp.nan, dtype),
        "acceptance_rates": jnp.full(max_temperatures, jnp.nan),
        "step_sizes": None if step_size is None else jnp.full(max_temperatures, jnp.nan, step_size.dtype),
        "num_moves": jnp.zeros(max_temperatures, jnp.int32),
        "num_gradients": jnp.zeros(max_temperatures, jnp.int32),
    }
    zero = jnp.zeros((), dtype)
    lineage = found(num_particles // mutation.chain_length, dtype)
    start = _Carry(
        positions,
        weights.clean(log_likelihood),
        zero,
        lineage,
        step_size,
        zero,
        jnp.zeros((), bool),
        jnp.zeros((), jnp.int32),
        records,
    )
    last = jax.lax.while_loop(goes_on, step, start)

    log_evidence = weights.compensated_sum(last.records["log_evidence_increments"])
    is_whole = last.is_lost | (last.temperature >= 1.0)
    log_weight = jnp.where(last.is_lost, -jnp.inf, -jnp.log(jnp.asarray(num_particles, dtype)))
    return SMCResult(
        particles=jax.vmap(posterior.prior.constrain)(last.positions),
        positions=last.positions,
        log_weights=jnp.full(num_particles, log_weight),
        log_evidence=jnp.where(is_whole, log_evidence, jnp.nan),
        log_evidence_variance=jnp.where(is_whole & ~last.is_lost, last.variance, jnp.nan),
        num_invalid=num_invalid,
        num_steps=last.num_steps,
        **last.records,
    )


def next_temperature(
    log_likelihood: Float[Array, " n"], temperature: Float[Array, ""], ess_target: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The largest temperature up to 1 at which equally weighted particles keep an ESS of ess_target * N."""
    rest = 1.0 - temperature
    least = jnp.asarray(ess_target * log_likelihood.shape[0], log_likelihood.dtype)

    def keeps(log_increment: Array) -> Array:
        return weights.ess(jnp.exp(log_increment) * log_likelihood) >= least

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        is_kept = keeps(middle)
        return jnp.where(is_kept, middle, low), jnp.where(is_kept, high, middle)

    bounds = jnp.log(rest) - LOG_RANGE, jnp.log(rest)
    num_halvings = 10 + jnp.finfo(log_likelihood.dtype).nmant
    low, _ = jax.lax.fori_loop(0, num_halvings, halve, bounds)
    # at least one unit in the last place, so that the loop ends whatever the likelihood
    found = jnp.maximum(temperature + jnp.exp(low), jnp.nextafter(temperature, jnp.ones_like(temperature)))
    return jnp.where(keeps(jnp.log(rest)), 1.0, jnp.minimum(found, 1.0))


def warn_of_trouble(num_invalid: Any, acceptance_rates: Any) -> None:
    """Warns of invalid weights, and of moves that were hardly ever accepted; on the host."""
    total = int(np.sum(num_invalid))
    if total:
        warnings.warn(
            f"{total} log likelihoods were NaN or +inf and were counted as weights of zero; check the likelihood where "
            "the prior puts mass",
            errors.SamplingWarning,
            stacklevel=3,
        )
    if np.any(np.asarray(acceptance_rates) < LEAST_ACCEPTANCE):
        warnings.warn(
            f"the last moves were accepted at a rate below {LEAST_ACCEPTANCE}: the particles are copies of few, and "
            "stand for less than their number; take a smaller step size, or more moves to tune it",
            errors.SamplingWarning,
            stacklevel=3,
        )


def _check_ladder(temperatures: Any) -> Array:
    ladder = errors.as_array("temperatures")(temperatures)
    if ladder.ndim != 1 or ladder.shape[0] == 0 or not jnp.issubdtype(ladder.dtype, jnp.floating):
        raise ValueError(f"temperatures must be a vector of floating point, got {ladder.dtype} of shape {ladder.shape}")
    if errors.is_concrete(ladder):
        values = np.asarray(ladder)
        if not (values[0] > 0 and values[-1] == 1 and np.all(np.diff(values) > 0)):
            raise ValueError(f"temperatures must rise strictly from above 0 to exactly 1, got {values}")
    return ladder


def _trim(result: SMCResult) -> SMCResult:
    """Without the rows that were not reached."""
    num = int(result.num_steps)
    names = ("log_evidence_increments", "temperatures", "ess", "acceptance_rates", "step_sizes")
    rows = {name: getattr(result, name) for name in (*names, "num_moves", "num_gradients")}
    # on the host: a slice on the device would compile for every number
    return result._replace(
        **{name: None if row is None else jnp.asarray(np.asarray(row)[:num]) for name, row in rows.items()}
    )


def _raise_if_failed(result: SMCResult, num_particles: int) -> None:
    if np.isneginf(result.log_evidence):
        if int(result.num_invalid) == num_particles:
            raise errors.DegenerateWeightsError(
                f"The log likelihood is NaN or +inf at all {num_particles} draws from the prior: check the likelihood "
                "and its data.",
                result,
            )
        raise errors.DegenerateWeightsError(
            f"All particle weights vanished: the log likelihood is -inf at all {num_particles} particles. Take a prior "
            "that covers the data, more particles, or a likelihood with wider support; throw=False returns "
            "log_evidence = -inf.",
            result,
        )
    if np.isnan(result.log_evidence):
        raise errors.DegenerateWeightsError(
            f"The temperature reached {float(result.temperatures[-1]):.3g}, not 1, in {int(result.num_steps)} steps: "
            "the likelihood varies too much over the particles. Raise max_temperatures or lower ess_target; look at "
            "the acceptance rates, as moves that stand still have this effect.",
            result,
        )
