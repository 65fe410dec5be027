"""Particle marginal Metropolis-Hastings: the parameters of a state-space model, with an estimated likelihood.

    theta' = theta + h L xi,   u' ~ K(u, .),   accept with probability
    min(1, p(theta') Zhat(theta', u') / (p(theta) Zhat(theta, u)))

where Zhat is the evidence that a particle filter with random numbers u finds. As E[Zhat(theta, u)] = p(y | theta) the
posterior p(theta | y) is left invariant for every number of particles; how often the chain moves depends on the
variance of log Zhat, which should be near 1 to 3.

K renews the random numbers of each time step with probability `renewal`, which leaves their law invariant. With
renewal < 1 the two estimates have most of their noise in common, and particles are sorted before they are resampled, so
that like random numbers go to like particles: fewer of them then do.

References:
    Andrieu, Doucet and Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
    Deligiannidis, Doucet and Pitt (2018), doi:10.1111/rssb.12280 (correlated).
    Tran, Kohn, Quiroz and Villani (2016), arXiv:1603.02485 (by blocks).
"""

import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt

from bayesinf import errors, weights
from bayesinf.captured import as_pytree
from bayesinf.kernel import Evaluation, Kernel, accept
from bayesinf.kernels.filter_steps import PROPOSALS
from bayesinf.kernels.online_filter import FilterState, ParticleFilter, begin, move_on
from bayesinf.kernels.vectors import as_position, normals
from bayesinf.models.state_space import StateSpaceModel, check_series
from bayesinf.resampling import SCHEMES, gather
from bayesinf.target import Target

__all__ = ["ParticleMarginal", "ParticleMarginalInfo", "ParticleMarginalState"]


class ParticleMarginalState(NamedTuple):
    """Parameters, log p(theta) + log Zhat(theta, u), and the seeds of u: one for each time step."""

    position: PyTree
    evaluation: Evaluation
    seeds: UInt[Array, " t"]


class ParticleMarginalInfo(NamedTuple):
    """What one step tells.

    Attributes:
        acceptance_rate, is_accepted, num_gradients, log_work: as in `Info`.
        is_divergent: whether the log prior, or the evidence, was NaN or +inf.
        log_evidence: log Zhat of the proposal; the variance of these at one theta should be near 1 to 3.
        num_invalid: how many log weights of its filter were NaN or +inf; they count as weights of zero.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: Float[Array, ""]
    log_evidence: Float[Array, ""]
    num_invalid: Int[Array, ""]


class ParticleMarginal(Kernel):
    """Random-walk Metropolis-Hastings on parameters, whose likelihood a particle filter estimates.

    Args:
        build: `build(theta)` returns the StateSpaceModel.
        log_prior: the log prior density of theta, a function of theta; or a `Target`, such as
            `Target.from_numpyro(prior_model)`: theta is then the dict of its unconstrained values, and `build` is given
            the constrained ones.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N of the filter: enough that log Zhat has a variance of 1 to 3 at a likely theta.
        step_size: h > 0; warm-up tunes it.
        inverse_mass_matrix: L L^T, or its diagonal, over theta as `ravel_pytree` lays it out; ones if None. Warm-up
            sets it to the covariance of theta.
        renewal: in (0, 1], the probability with which the random numbers of a time step are renewed.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        resampling: one of `bayesinf.resampling.SCHEMES`.
        ess_threshold: resample where ess <= ess_threshold * N.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> def prior():
        ...     numpyro.sample("scale", dist.HalfNormal(1.0))
        >>> def build(theta):
        ...     return bi.models.LinearGaussian.scalar(0.9, theta["scale"])
        >>> _, ys = bi.models.simulate(0, build({"scale": 0.5}), num_steps=50)
        >>> target = bi.Target.from_numpyro(prior)
        >>> kernel = bi.kernels.ParticleMarginal(build, target, ys, num_particles=100)
        >>> draws = bi.sample(1, kernel, target.init(2, 2), num_samples=200, num_warmup=200, progress=False)

    References:
        Andrieu, Doucet and Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
    """

    is_sequential: ClassVar[bool] = True
    # that of a random walk in few dimensions with the noise of the estimate: Sherlock, Thiery, Roberts and Rosenthal
    # (2015), doi:10.1214/14-AOS1278, have 0.07 in many dimensions, and 0.2 to 0.3 in one to three
    target_acceptance: ClassVar[float | None] = 0.2

    build: Callable[[PyTree], StateSpaceModel]
    prior: Target
    ys: PyTree
    step_size: Float[Array, ""]
    inverse_mass_matrix: Float[Array, "..."] | None
    renewal: Float[Array, ""]
    ess_threshold: Float[Array, ""]
    num_particles: int = eqx.field(static=True)
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)
    is_correlated: bool = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[[PyTree], StateSpaceModel],
        log_prior: Callable[[PyTree], Any] | Target,
        ys: PyTree,
        num_particles: int = 256,
        *,
        step_size: Float[Array, ""] | float = 0.1,
        inverse_mass_matrix: Any = None,
        renewal: Float[Array, ""] | float = 1.0,
        proposal: str = "bootstrap",
        resampling: str = "systematic",
        ess_threshold: Float[Array, ""] | float = 0.5,
    ):
        errors.check_arguments("build", build, "theta")
        self.build = as_pytree(build)
        self.prior = log_prior if isinstance(log_prior, Target) else Target(log_prior)
        self.ys = check_series(ys)
        self.num_particles = errors.check_count("num_particles", num_particles)
        self.step_size = errors.as_array("step_size")(step_size)
        self.inverse_mass_matrix = errors.as_array("inverse_mass_matrix", is_optional=True)(inverse_mass_matrix)
        self.renewal = errors.as_array("renewal")(renewal)
        self.ess_threshold = errors.as_array("ess_threshold")(ess_threshold)
        self.proposal, self.resampling = proposal, resampling
        errors.check_positive_scalar("step_size", self.step_size)
        errors.check_choice("proposal", proposal, PROPOSALS)
        errors.check_choice("resampling", resampling, SCHEMES)
        if errors.is_concrete(self.renewal) and not np.all((self.renewal > 0) & (self.renewal <= 1)):
            raise ValueError(f"renewal must lie in (0, 1], got {renewal}")
        self.is_correlated = not (errors.is_concrete(self.renewal) and bool(np.all(self.renewal == 1)))

    def init(self, position: PyTree) -> ParticleMarginalState:
        position = as_position(position)
        num_steps = jax.tree.leaves(self.ys)[0].shape[0]
        # which they are matters little: each is soon renewed
        seeds = jax.random.bits(jax.random.key(0), (num_steps,))
        evaluation, _, _ = self._evaluate(position, seeds)
        return ParticleMarginalState(position, evaluation, seeds)

    def step(
        self, key: Key[Array, ""], state: ParticleMarginalState
    ) -> tuple[ParticleMarginalState, ParticleMarginalInfo]:
        key_move, key_renew, key_seeds, key_accept = jax.random.split(key, 4)
        position = self._propose(key_move, state.position)
        fresh = jax.random.bits(key_seeds, state.seeds.shape)
        seeds = fresh
        if self.is_correlated:
            is_renewed = jax.random.uniform(key_renew, state.seeds.shape) < self.renewal
            seeds = jnp.where(is_renewed, fresh, state.seeds)
        evaluation, log_evidence, num_invalid = self._evaluate(position, seeds)
        log_ratio = evaluation.logdensity - state.evaluation.logdensity
        # a start without weight is left at the first chance
        log_ratio = jnp.where(jnp.isneginf(state.evaluation.logdensity), jnp.inf, log_ratio)
        state, info = accept(
            key_accept, log_ratio, ParticleMarginalState(position, evaluation, seeds), state, num_gradients=0
        )
        return state, ParticleMarginalInfo(*info[:4], info.log_work, log_evidence, num_invalid)  # type: ignore[arg-type]

    def constrain(self, position: PyTree) -> PyTree:
        """The parameters as `build` gets them."""
        return self.prior.constrain(position)

    def with_step_size(self, step_size: Any) -> "ParticleMarginal":
        return eqx.tree_at(operator.attrgetter("step_size"), self, jnp.asarray(step_size))

    def with_metric(self, covariance: Any) -> "ParticleMarginal":
        where = operator.attrgetter("inverse_mass_matrix")
        return eqx.tree_at(where, self, jnp.asarray(covariance), is_leaf=lambda leaf: leaf is None)

    def _propose(self, key: Key[Array, ""], position: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(position)
        (noise,) = normals(key, flat, 1)
        metric = self.inverse_mass_matrix
        if metric is not None:
            if metric.shape not in (flat.shape, 2 * flat.shape):
                raise ValueError(
                    f"inverse_mass_matrix must be over the ravelled position, of shape {flat.shape} or "
                    f"{2 * flat.shape}, got shape {metric.shape}"
                )
            noise = jnp.sqrt(metric) * noise if metric.ndim == 1 else jnp.linalg.cholesky(metric) @ noise
        return unravel((flat + self.step_size * noise).astype(flat.dtype))

    def _evaluate(
        self, position: PyTree, seeds: UInt[Array, " t"]
    ) -> tuple[Evaluation, Float[Array, ""], Int[Array, ""]]:
        """Log p(theta) + log Zhat(theta, u), log Zhat alone, and the invalid weights on the way."""
        dtype = ravel_pytree(position)[0].dtype
        log_evidence, num_invalid = self._filter(self.build(self.prior.constrain(position)), seeds)
        log_prior = self.prior.logdensity(position)
        # where the prior vanishes the model may be none: what its filter says does not matter
        logdensity = jnp.where(jnp.isneginf(log_prior), -jnp.inf, log_prior + log_evidence).astype(dtype)
        return Evaluation(logdensity, None), log_evidence.astype(dtype), num_invalid

    def _filter(self, model: StateSpaceModel, seeds: UInt[Array, " t"]) -> tuple[Array, Array]:
        """The evidence that the filter with these random numbers finds."""
        one = ParticleFilter(
            model,
            num_particles=self.num_particles,
            proposal=self.proposal,
            resampling=self.resampling,
            ess_threshold=self.ess_threshold,
        )
        # the time is folded in, so that equal seeds of two steps are not equal random numbers
        keys = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.key(seed), t))(seeds, jnp.arange(seeds.size))
        first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], self.ys) for part in (0, slice(1, None)))
        state, info = begin(one, keys[0], first)

        def step(state, row):
            key, y = row
            state, info = move_on(one, self._sorted(state), jax.random.split(key), y)
            return state, (info.log_evidence_increment, info.num_invalid)

        _, (increments, num_invalid) = jax.lax.scan(step, state, (keys[1:], rest))
        increments = jnp.concatenate([info.log_evidence_increment[None], increments])
        return weights.compensated_sum(increments), info.num_invalid + jnp.sum(num_invalid, dtype=jnp.int32)

    def _sorted(self, state: FilterState) -> FilterState:
        """The particles in order of their first component."""
        if not self.is_correlated:
            return state
        first = jax.tree.leaves(state.particles)[0].reshape(self.num_particles, -1)[:, 0]
        order = jnp.argsort(first)
        return state._replace(particles=gather(state.particles, order), log_weights=state.log_weights[order])
