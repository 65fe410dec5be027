"""Metropolis adjustment of unadjusted kernels, whose path weight is known: any discretisation becomes exact.

An unadjusted kernel reports `log_work`, log r(z' -> z) - log q(z -> z'), the density of its own step backwards over
that of the step, where z is the position x, or x and the velocity v; backwards a velocity points the other way. Its
step is a proposal, taken with probability

    min(1, exp(log pi(z') - log pi(z) + log_work)),        log pi(x, v) = log pi(x) - |v|^2 / (2u),

and where it is not taken the velocity turns back, without which the kernel would be wrong.

    Metropolize(LMC)                     MALA
    Metropolize(Splitting("OBABO"))      generalised Hamiltonian Monte Carlo (Horowitz), `GHMC`
    MALT                                 fresh velocity, a trajectory of OBABO steps, one decision

References:
    Horowitz (1991), doi:10.1016/0370-2693(91)90812-5.
    Bou-Rabee and Vanden-Eijnden (2010), doi:10.1002/cpa.20306 (Metropolis adjustment of kinetic integrators).
    Riou-Durand and Vogrinc (2022), arXiv:2202.13230 (MALT).
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, Kernel, accept
from bayesinf.kernels.compose import Repeat
from bayesinf.kernels.kinetic import KineticState, Splitting, check_parameters, init_at_rest, refresh_velocity, turned
from bayesinf.kernels.langevin import MALA, LangevinState
from bayesinf.kernels.parts import attach, detach
from bayesinf.kernels.vectors import as_position, dot
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target, as_target

__all__ = ["GHMC", "MALT", "AdjustedState", "Metropolize"]


class AdjustedState(NamedTuple):
    """Position, the target's evaluation there, and what the adjusted kernel remembers besides, such as a velocity."""

    position: PyTree
    evaluation: Evaluation
    memory: Any


class Metropolize(Wrapping):
    """A kernel with its steps accepted or rejected, so that it leaves the target invariant at every step size.

    The kernel must say that it is its own reverse (`is_self_reverse`), as LMC, the exponential integrator and every
    splitting whose word is a palindrome are, and repetitions of them. A step that the kernel undid itself, because the
    target was not finite on its way, stays undone.

    Attributes:
        kernel: what proposes. Warm-up tunes its step size to the acceptance rate of MALA, or of GHMC if it has a
            velocity.

    Raises:
        ValueError: the kernel is not its own reverse.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.Metropolize(bi.kernels.Splitting("BAOAB", target, step_size=0.5))
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    is_exact: ClassVar[bool] = True  # type: ignore[misc]

    kernel: Any

    def __check_init__(self):
        if not getattr(self.kernel, "is_self_reverse", False):
            raise ValueError(
                "kernel must be an unadjusted kernel that is its own reverse (LMC, KineticLangevin, a Splitting whose "
                f"word is a palindrome, or a Repeat of one), got {_describe(self.kernel)}"
            )

    def init(self, position: PyTree) -> AdjustedState:
        inner = self.kernel.init(position)
        evaluation = inner.evaluation if hasattr(inner, "evaluation") else self.target.evaluate(inner.position)
        return AdjustedState(inner.position, evaluation, detach(inner))

    def refresh(self, key: Key[Array, ""], state: AdjustedState) -> AdjustedState:
        """The state with a fresh velocity, where the kernel has one."""
        if not hasattr(state.memory, "velocity"):
            return state
        drawn = refresh_velocity(key, KineticState(*state[:2], state.memory.velocity), self.inverse_mass)
        return state._replace(memory=state.memory._replace(velocity=drawn.velocity))

    def step(self, key: Key[Array, ""], state: AdjustedState) -> tuple[AdjustedState, Info]:
        key_move, key_accept = jax.random.split(key)
        before, num_starting = attach(self.kernel, state.memory, state.position, state.evaluation)
        after, told = self.kernel.step(key_move, before)
        evaluation = after.evaluation if hasattr(after, "evaluation") else self.target.evaluate(after.position)
        proposed = AdjustedState(after.position, evaluation, detach(after))
        stayed = state
        log_velocity = jnp.zeros_like(state.evaluation.logdensity)
        if hasattr(after, "velocity"):
            stayed = state._replace(memory=turned(state.memory))
            u = jnp.asarray(self.inverse_mass, log_velocity.dtype)
            log_velocity = (dot(before.velocity, before.velocity) - dot(after.velocity, after.velocity)) / (2 * u)
        return _decide(key_accept, told, proposed, stayed, log_velocity, told.num_gradients + num_starting)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return GHMC.target_acceptance if hasattr(self.kernel, "inverse_mass") else MALA.target_acceptance


class GHMC(Kernel):
    """Generalised Hamiltonian Monte Carlo: one OBABO step of kinetic Langevin dynamics, accepted or turned back.

        O   v = sqrt(eta) v + sqrt(u (1 - eta)) xi,    eta = e^(-gamma h),   half of the friction
        BAB one leapfrog step, taken with probability min(1, pi(x') N(v') / (pi(x) N(v)))
        O   the other half

    where it is not taken, the chain stays at x and v turns to -v. Velocities persist over steps, which is worth it only
    if turning back is rare: warm-up tunes the step size to an acceptance rate of 0.95.

    Attributes:
        target: what is sampled; one gradient a step.
        step_size: h > 0 of the leapfrog step.
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.GHMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.3)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    target_acceptance: ClassVar[float | None] = 0.95

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    friction: Float[Array, ""] = eqx.field(converter=errors.as_array("friction"), default=1.0)
    inverse_mass: Float[Array, ""] = eqx.field(converter=errors.as_array("inverse_mass"), default=1.0)

    def __check_init__(self):
        check_parameters(self)

    def init(self, position: PyTree) -> KineticState:
        """The state at `position` and at rest; `refresh` draws a velocity."""
        return init_at_rest(self.target, position)

    def refresh(self, key: Key[Array, ""], state: KineticState) -> KineticState:
        """The state with a fresh velocity from N(0, u I)."""
        return refresh_velocity(key, state, self.inverse_mass)

    def step(self, key: Key[Array, ""], state: KineticState) -> tuple[KineticState, Info]:
        adjusted = Metropolize(_obabo(self))
        moved, info = adjusted.step(key, AdjustedState(*state[:2], detach(state)))
        return KineticState(moved.position, moved.evaluation, moved.memory.velocity), info


class MALT(Kernel):
    """Metropolis-adjusted Langevin trajectories: a fresh velocity, L steps of OBABO, and one decision.

    Between Hamiltonian Monte Carlo (no friction) and GHMC (L = 1): the friction spares the choice of the length of the
    trajectory, since a long one forgets rather than returns, and a rejection turns nothing back.

    Attributes:
        target: what is sampled; L gradients a step.
        step_size: h > 0 of each leapfrog step; warm-up tunes it to an acceptance rate of 0.651, as for HMC.
        num_steps: L >= 1; h L should be a few 1 / sqrt(u m), m the smallest curvature of -log pi. Static.
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MALT(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.3, num_steps=5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        5
    """

    target_acceptance: ClassVar[float | None] = 0.651

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    num_steps: int = eqx.field(static=True, default=10)
    friction: Float[Array, ""] = eqx.field(converter=errors.as_array("friction"), default=1.0)
    inverse_mass: Float[Array, ""] = eqx.field(converter=errors.as_array("inverse_mass"), default=1.0)

    def __check_init__(self):
        errors.check_count("num_steps", self.num_steps)
        check_parameters(self)

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        return LangevinState(position, self.target.evaluate(position, order=1))

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_velocity, key_move = jax.random.split(key)
        adjusted = Metropolize(Repeat(_obabo(self), self.num_steps))
        resting = KineticState(*state, state.position)
        start = refresh_velocity(key_velocity, resting, self.inverse_mass)
        moved, info = adjusted.step(key_move, AdjustedState(*start[:2], detach(start)))
        # the velocity is drawn anew and forgotten: what is left is a reversible move of the position
        log_work = state.evaluation.logdensity - moved.evaluation.logdensity
        return LangevinState(moved.position, moved.evaluation), info._replace(log_work=log_work)


def _obabo(kernel: GHMC | MALT) -> Splitting:
    return Splitting("OBABO", kernel.target, kernel.step_size, kernel.friction, kernel.inverse_mass)


def _decide(
    key: Key[Array, ""],
    told: Any,
    proposed: AdjustedState,
    stayed: AdjustedState,
    log_velocity: Float[Array, ""],
    num_gradients: Array,
) -> tuple[AdjustedState, Info]:
    """Takes the step that the kernel proposes, or stays; a step that the kernel undid itself is no proposal."""
    change = proposed.evaluation.logdensity - stayed.evaluation.logdensity + log_velocity
    log_ratio = jnp.where(told.is_accepted, change + told.log_work.astype(change.dtype), -jnp.inf)
    state, info = accept(key, log_ratio, proposed, stayed, num_gradients=num_gradients)
    return state, info._replace(
        is_divergent=info.is_divergent | told.is_divergent,
        log_work=jnp.where(info.is_accepted, -change, jnp.zeros_like(change)),
    )


def _describe(kernel: Any) -> str:
    word = getattr(kernel, "word", None)
    return type(kernel).__name__ + ("" if word is None else f"({word!r})")
