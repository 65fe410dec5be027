"""Particle Gibbs: the parameters and the path of a state-space model, in turn.

    x_{0:T-1} ~ conditional SMC of p(x_{0:T-1} | theta, y), with x_{0:T-1} as reference
    theta     ~ any kernel of p(theta | x_{0:T-1}, y), proportional to p(theta) p(x_{0:T-1}, y | theta), at the new path

leaves the joint posterior p(theta, x_{0:T-1} | y) invariant for every number of particles N >= 2. Given a path the
parameters' density needs no particles and is evaluated at all T steps at once, so that gradient kernels are cheap.

With `interweave` a third step moves theta given the path's standardised innovations z (see `innovations`), and the path
with it,

    theta     ~ any kernel of p(theta | z, y), proportional to p(theta) p(y | x(theta, z)),    x_{0:T-1} = x(theta, z)

which leaves the same law invariant and mixes where theta given the path is too narrow: parameters of a transition with
little noise, a level of a persistent state.

References:
    Andrieu, Doucet, Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
    Lindsten, Jordan, Schon (2014), https://jmlr.org/papers/v15/lindsten14a.html.
    Yu and Meng (2011), doi:10.1198/jcgs.2011.203main (interweaving).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import captured, current
from bayesinf.kernel import Kernel
from bayesinf.kernels.backward import backward_sample
from bayesinf.kernels.conditional_smc import REFRESHMENTS, ConditionalSMC
from bayesinf.kernels.filter_steps import PROPOSALS
from bayesinf.kernels.foreign import rebindable
from bayesinf.kernels.innovations import innovations, path_of
from bayesinf.kernels.particle_filter import particle_filter
from bayesinf.kernels.parts import (
    PartsState,
    attach,
    common_target_acceptance,
    detach,
    first_step_size,
    merge_infos,
    scale_steps,
)
from bayesinf.kernels.path_kernel import PathState
from bayesinf.kernels.posterior import constrain_beside
from bayesinf.models.state_space import StateSpaceModel, check_series, log_joint, log_likelihood
from bayesinf.target import Target

__all__ = ["ParticleGibbs", "ParticleGibbsInfo"]


class ParticleGibbsInfo(NamedTuple):
    """What one sweep tells: of the parameters' moves, as in `Info`, and of the path's.

    Attributes:
        update_rate: share of the time steps at which the path left the reference.
        log_evidence: log Zhat(theta) of the conditional filter.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    update_rate: Float[Array, ""]
    log_evidence: Float[Array, ""]
    num_invalid: Int[Array, ""]


class ParticleGibbs(Kernel):
    """Particle Gibbs on positions {"theta": parameters, "path": x_{0:T-1}}.

    Args:
        build: `build(theta)` returns the StateSpaceModel.
        log_prior: the log prior density of theta, a function of theta; or a `Target`, such as
            `Target.from_numpyro(prior_model)`: theta is then the dict of its unconstrained values, and `build` is given
            the constrained ones.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N >= 2, the reference among them.
        parameter_kernel: what moves theta: a function of a target that returns a kernel, such as
            `functools.partial(MALA, step_size=0.05)`, or a kernel, which is rebound. Its step size is tuned by warm-up.
            The function may return a kernel of BlackJAX too, which is built anew on the target of every sweep.
            The `data` of that target are (the prior as a Target, ys, path), from which a kernel of one's own may draw
            conjugate parameters exactly.
        refresh: how the path is refreshed, see `ConditionalSMC`.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        interweave: whether theta is also moved given the innovations; needs Gaussian initial and transition laws.
        innovation_kernel: what moves theta then; by default `parameter_kernel`.

    Example:
        >>> import functools
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> def prior():
        ...     numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("persistence", dist.Beta(20.0, 1.5))
        ...     numpyro.sample("scale", dist.HalfNormal(0.5))
        >>> def build(theta):
        ...     return bi.models.StochasticVolatility(**theta)
        >>> _, ys = bi.models.simulate(0, bi.models.StochasticVolatility(-0.5, 0.95, 0.2), num_steps=100)
        >>> mala = functools.partial(bi.kernels.MALA, step_size=0.01)
        >>> kernel = bi.kernels.ParticleGibbs(build, bi.Target.from_numpyro(prior), ys, parameter_kernel=mala)
        >>> draws = bi.sample(1, kernel, kernel.initial(2, num_chains=2), num_samples=50, num_warmup=50, progress=False)
    """

    is_sequential: ClassVar[bool] = True

    build: Callable[[PyTree], StateSpaceModel] = eqx.field(static=True)
    prior: Target
    ys: PyTree
    parts: tuple[Any, ...]  # the kernels of theta, on targets that have no data yet
    num_particles: int = eqx.field(static=True)
    refresh: str = eqx.field(static=True)
    proposal: str = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[[PyTree], StateSpaceModel],
        log_prior: Callable[[PyTree], Any] | Target,
        ys: PyTree,
        num_particles: int = 64,
        *,
        parameter_kernel: Callable[[Target], Kernel] | Kernel,
        refresh: str = "ancestor",
        proposal: str = "bootstrap",
        interweave: bool = False,
        innovation_kernel: Callable[[Target], Kernel] | Kernel | None = None,
    ):
        if not callable(build):
            raise ValueError(f"build must be a function theta -> StateSpaceModel, got {type(build).__name__}")
        self.build = captured(build)
        self.prior = log_prior if isinstance(log_prior, Target) else Target(log_prior)
        self.ys = check_series(ys)
        kernels = [rebindable("parameter_kernel", parameter_kernel, Target(_GivenPath(build), ()))]
        if interweave:
            second = parameter_kernel if innovation_kernel is None else innovation_kernel
            kernels.append(rebindable("innovation_kernel", second, Target(_GivenInnovations(build), ())))
        self.parts = tuple(kernels)
        self.num_particles = errors.check_count("num_particles", num_particles, minimum=2)
        self.refresh, self.proposal = refresh, proposal
        errors.check_choice("refresh", refresh, REFRESHMENTS)
        errors.check_choice("proposal", proposal, PROPOSALS)

    def init(self, position: PyTree) -> PartsState:
        """The state at `position`, a dict of "theta" and "path"."""
        if not isinstance(position, dict) or set(position) != {"theta", "path"}:
            raise ValueError(f'position must be a dict of "theta" and "path", got {_describe(position)}')
        errors.check_floating("position['theta']", position["theta"])
        theta = jax.tree.map(jnp.asarray, position["theta"])
        path = self._sweeper(theta).init(position["path"]).position
        memory = tuple(detach(part.with_target(self._target(i, path)).init(theta)) for i, part in enumerate(self.parts))
        return PartsState({"theta": theta, "path": path}, memory)

    def step(self, key: Key[Array, ""], state: PartsState) -> tuple[PartsState, ParticleGibbsInfo]:
        key_path, *keys = jax.random.split(key, 1 + len(self.parts))
        theta, path = state.position["theta"], state.position["path"]
        swept, path_info = self._sweeper(theta).step(key_path, PathState(path))
        path = swept.position

        memory, infos, num_starting = [], [], 0
        for i, (part, key_part) in enumerate(zip(self.parts, keys, strict=True)):
            fixed = path if i == 0 else innovations(self._model(theta), path)
            kernel = part.with_target(self._target(i, fixed))
            before, cost = attach(kernel, state.memory[i], theta, None)
            after, info = kernel.step(key_part, before)
            theta = after.position
            path = path if i == 0 else path_of(self._model(theta), fixed)
            memory.append(detach(after))
            infos.append(info)
            num_starting += cost

        merged = merge_infos(infos, self.parts, num_starting)
        info = ParticleGibbsInfo(
            acceptance_rate=merged.acceptance_rate,
            is_accepted=merged.is_accepted,
            is_divergent=merged.is_divergent | path_info.is_divergent,
            num_gradients=merged.num_gradients,
            update_rate=path_info.acceptance_rate,
            log_evidence=path_info.log_evidence,
            num_invalid=path_info.num_invalid,
        )
        return PartsState({"theta": theta, "path": path}, tuple(memory)), info

    def initial(self, key: errors.KeyLike, num_chains: int = 4, *, theta: PyTree = None) -> PyTree:
        """Starting positions with a leading chain axis; the path of each from a particle filter at its theta.

        Args:
            key: PRNG key or seed.
            num_chains: number of chains.
            theta: starting parameters with a leading chain axis, needed where the prior is not from NumPyro; by
                default `prior.init`.

        Raises:
            InitializationError: for some theta all weights of the filter vanished.
        """
        key_theta, key_path = jax.random.split(errors.as_key(key))
        if theta is None:
            if self.prior.model is None:
                raise ValueError(
                    "theta is needed to draw starting points from a log_prior that is not Target.from_numpyro(...): "
                    "pass starting parameters with a leading chain axis"
                )
            theta = self.prior.init(key_theta, num_chains)
        theta = jax.tree.map(jnp.asarray, theta)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(theta)}
        if lengths != {(errors.check_count("num_chains", num_chains),)}:
            raise ValueError(f"theta must have a leading axis of num_chains={num_chains} in every leaf")

        paths, is_ok = _draw_path_for_each(current(self), jax.random.split(key_path, num_chains), theta)
        if errors.is_concrete(is_ok) and not np.all(is_ok):
            chain = int(np.flatnonzero(~np.asarray(is_ok))[0])
            start = jax.tree.map(lambda leaf: leaf[chain], theta)
            raise errors.InitializationError(
                f"all weights of the particle filter vanished at the parameters {self.prior.constrain(start)} of chain "
                f"{chain}: pass better ones as theta=, or take more particles"
            )
        return {"theta": theta, "path": paths}

    def constrain(self, position: PyTree) -> PyTree:
        """The parameters by name as `build` gets them, and "path"; {"theta", "path"} where they have no names."""
        return constrain_beside(self.prior, position, "path", "the states")

    def with_step_size(self, step_size: Any) -> "ParticleGibbs":
        return eqx.tree_at(lambda kernel: kernel.parts, self, tuple(scale_steps(self.parts, step_size)))

    @property
    def step_size(self) -> Array:
        return first_step_size(self.parts)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return common_target_acceptance(self.parts)

    def _model(self, theta: PyTree) -> StateSpaceModel:
        return self.build(self.prior.constrain(theta))

    def _sweeper(self, theta: PyTree) -> ConditionalSMC:
        return ConditionalSMC(self._model(theta), self.ys, self.num_particles, self.refresh, self.proposal)

    def _target(self, i: int, fixed: PyTree) -> Target:
        """The law of theta given the path (i = 0) or given the innovations (i = 1)."""
        logdensity = (_GivenPath, _GivenInnovations)[i](self.build)
        return Target(logdensity, (self.prior, self.ys, fixed))


@jax.jit
def _draw_path_for_each(kernel: ParticleGibbs, keys: Key[Array, " c"], theta: PyTree) -> tuple[PyTree, Array]:
    """A path from a particle filter at every theta, and whether its weights stayed positive."""

    def draw(row):
        key, theta = row
        key_filter, key_back = jax.random.split(key)
        options = {"num_particles": kernel.num_particles, "proposal": kernel.proposal}
        model = kernel._model(theta)
        filtered = particle_filter(key_filter, model, kernel.ys, store="full", **options)
        paths = backward_sample(key_back, model, filtered, 1)
        return jax.tree.map(lambda leaf: leaf[0], paths), jnp.isfinite(filtered.log_evidence)

    return jax.lax.map(draw, (keys, theta))


@dataclass(frozen=True)
class _GivenPath:
    """log p(theta) + log p(x_{0:T-1}, y_{0:T-1} | theta); equal for equal `build`, so it compiles once."""

    build: Callable[[PyTree], StateSpaceModel]

    def __call__(self, theta: PyTree, data: tuple[Target, PyTree, PyTree]) -> Array:
        prior, ys, path = data
        return prior.logdensity(theta) + log_joint(self.build(prior.constrain(theta)), path, ys)


@dataclass(frozen=True)
class _GivenInnovations:
    """log p(theta) + log p(y_{0:T-1} | x(theta, z), theta): the law of z does not depend on theta."""

    build: Callable[[PyTree], StateSpaceModel]

    def __call__(self, theta: PyTree, data: tuple[Target, PyTree, PyTree]) -> Array:
        prior, ys, z = data
        model = self.build(prior.constrain(theta))
        return prior.logdensity(theta) + log_likelihood(model, path_of(model, z), ys)


def _describe(position: Any) -> str:
    return f"the keys {sorted(position)}" if isinstance(position, dict) else type(position).__name__
