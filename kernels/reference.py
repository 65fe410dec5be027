"""BlackJAX's HMC and NUTS, on the targets of this library.

They are the reference that every other kernel is held against. What differs from BlackJAX: a kernel is a pytree (new
data, step sizes or metrics of the same shape compile nothing), the state shares its evaluation with other kernels on
the target, and a log density of +inf and a negative kinetic energy are divergences (BlackJAX would accept them with
certainty and never leave).

BlackJAX is imported inside functions: importing it starts the XLA backend.

References:
    Duane, Kennedy, Pendleton, Roweth (1987), doi:10.1016/0370-2693(87)91197-X (HMC).
    Hoffman and Gelman (2014), arXiv:1111.4246; Betancourt (2017), arXiv:1701.02434 (multinomial NUTS).
    Cabezas et al. (2024), arXiv:2402.10797 (BlackJAX).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Kernel, is_finite, select
from bayesinf.kernels.langevin import LangevinState
from bayesinf.kernels.vectors import as_position, differ
from bayesinf.target import Target, as_target

__all__ = ["HMC", "NUTS", "HMCInfo", "NUTSInfo"]


class HMCInfo(NamedTuple):
    """What one HMC step tells.

    Attributes:
        acceptance_rate, is_accepted, num_gradients, log_work: as in `Info`.
        is_divergent: whether the energy error passed 1000, or the log density or gradient was not finite.
        energy: of the proposal.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: Float[Array, ""]
    energy: Float[Array, ""]


class NUTSInfo(NamedTuple):
    """What one NUTS step tells.

    Attributes:
        acceptance_rate: mean over the trajectory, what the step size is tuned by.
        is_accepted: whether the chain moved.
        is_divergent: whether the energy error passed 1000, or the log density or gradient was not finite.
        num_gradients: leapfrog steps taken.
        log_work: as in `Info`.
        energy: of the state drawn.
        tree_depth: doublings of the trajectory; equal to `max_num_doublings` where it was cut short.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: Float[Array, ""]
    energy: Float[Array, ""]
    tree_depth: Int[Array, ""]


class HMC(Kernel):
    """Hamiltonian Monte Carlo with trajectories of a fixed number of leapfrog steps.

    Attributes:
        target: what is sampled; `num_integration_steps` gradients a step.
        step_size: h > 0 of the leapfrog scheme.
        inverse_mass_matrix: over the position as `ravel_pytree` lays it out, the matrix of shape (d, d) or its diagonal
            of shape (d,); ones if None.
        num_integration_steps: leapfrog steps, at least 1. Static.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.HMC(target, step_size=0.3, num_integration_steps=5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        5
    """

    target_acceptance: ClassVar[float | None] = 0.8

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    inverse_mass_matrix: Float[Array, "..."] | None = eqx.field(
        converter=errors.as_array("inverse_mass_matrix", is_optional=True), default=None
    )
    num_integration_steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        errors.check_count("num_integration_steps", self.num_integration_steps)
        _check_parameters(self)

    def init(self, position: PyTree) -> LangevinState:
        return _init(self, position)

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, HMCInfo]:
        from blackjax.mcmc import hmc

        start = hmc.HMCState(state.position, _wide(state.evaluation.logdensity), state.evaluation.grad)
        step: Any = hmc.build_kernel()
        end, told = step(key, start, _guarded(self.target), *_parameters(self, state), self.num_integration_steps)
        moved, is_ok, log_work = _settle(end, told.energy, state)
        info = HMCInfo(
            acceptance_rate=jnp.where(is_ok, jnp.minimum(told.acceptance_rate, 1.0), 0.0),
            is_accepted=told.is_accepted & is_ok,
            is_divergent=told.is_divergent | ~is_ok,
            num_gradients=jnp.asarray(told.num_integration_steps, jnp.int32),
            log_work=log_work,
            energy=told.energy,
        )
        return moved, info


class NUTS(Kernel):
    """The no-U-turn sampler: trajectories that stop where they turn back, drawn from by multinomial weights.

    Attributes:
        target: what is sampled.
        step_size: h > 0 of the leapfrog scheme; warm-up tunes it to an acceptance rate of 0.8.
        inverse_mass_matrix: over the position as `ravel_pytree` lays it out, the matrix of shape (d, d) or its diagonal
            of shape (d,); ones if None.
        max_num_doublings: a trajectory has at most 2**max_num_doublings - 1 leapfrog steps. Static.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.NUTS(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> bool(info.num_gradients < 2**10)
        True
    """

    target_acceptance: ClassVar[float | None] = 0.8
    is_sequential: ClassVar[bool] = True

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    inverse_mass_matrix: Float[Array, "..."] | None = eqx.field(
        converter=errors.as_array("inverse_mass_matrix", is_optional=True), default=None
    )
    max_num_doublings: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        errors.check_count("max_num_doublings", self.max_num_doublings)
        _check_parameters(self)

    def init(self, position: PyTree) -> LangevinState:
        return _init(self, position)

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, NUTSInfo]:
        from blackjax.mcmc import hmc, nuts

        start = hmc.HMCState(state.position, _wide(state.evaluation.logdensity), state.evaluation.grad)
        step: Any = nuts.build_kernel()
        end, told = step(key, start, _guarded(self.target), *_parameters(self, state), self.max_num_doublings)
        moved, is_ok, log_work = _settle(end, told.energy, state)
        info = NUTSInfo(
            acceptance_rate=jnp.where(is_ok, jnp.clip(told.acceptance_rate, 0.0, 1.0), 0.0),
            is_accepted=differ(moved.position, state.position),
            is_divergent=told.is_divergent | ~is_ok,
            num_gradients=jnp.asarray(told.num_integration_steps, jnp.int32),
            log_work=log_work,
            energy=told.energy,
            tree_depth=jnp.asarray(told.num_trajectory_expansions, jnp.int32),
        )
        return moved, info


def _check_parameters(kernel: HMC | NUTS) -> None:
    errors.check_positive_scalar("step_size", kernel.step_size)
    metric = kernel.inverse_mass_matrix
    if metric is None:
        return
    if jnp.ndim(metric) != 2:
        errors.check_positive("inverse_mass_matrix", metric)
    elif errors.is_concrete(metric) and not (
        np.all(np.isfinite(metric)) and np.allclose(metric, metric.T) and np.linalg.eigvalsh(metric)[0] > 0
    ):
        raise ValueError(f"inverse_mass_matrix must be symmetric and positive definite, got {metric}")


def _init(kernel: HMC | NUTS, position: PyTree) -> LangevinState:
    position = as_position(position)
    state = LangevinState(position, kernel.target.evaluate(position, order=1))
    _parameters(kernel, state)  # speaks of a metric of the wrong shape before the first step
    return state


def _parameters(kernel: HMC | NUTS, state: LangevinState) -> tuple[Array, Array]:
    """The step size and the metric, in the dtype of the position."""
    flat, _ = ravel_pytree(state.position)
    metric = kernel.inverse_mass_matrix
    if metric is None:
        metric = jnp.ones_like(flat)
    elif jnp.shape(metric) not in (flat.shape, 2 * flat.shape):
        raise ValueError(
            f"inverse_mass_matrix must be over the ravelled position, of shape {flat.shape} or {2 * flat.shape}, "
            f"got shape {jnp.shape(metric)}"
        )
    return jnp.asarray(kernel.step_size, flat.dtype), jnp.asarray(metric, flat.dtype)


def _guarded(target: Target) -> Callable[[PyTree], Float[Array, ""]]:
    """The log density with +inf turned into NaN, which BlackJAX takes for an infinite energy."""

    def logdensity(position: PyTree) -> Float[Array, ""]:
        value = target.logdensity(position)
        return _wide(jnp.where(value == jnp.inf, jnp.nan, value))

    return logdensity


def _wide(value: Array) -> Any:
    """In the default precision, which NUTS of BlackJAX assumes of energies whatever the precision of the position."""
    return jnp.asarray(value, jnp.result_type(float))


def _settle(
    end: Any, energy: Float[Array, ""], state: LangevinState
) -> tuple[LangevinState, Bool[Array, ""], Float[Array, ""]]:
    """The state after the step, whether it is to be trusted, and the log work of an invariant kernel.

    The kinetic energy in a dense metric is a sum of terms of both signs. Where they overflow, or cancel by rounding, it
    comes out negative, to -inf, and BlackJAX accepts a proposal of any log density with certainty.
    """
    logdensity = jnp.asarray(end.logdensity, state.evaluation.logdensity.dtype)
    proposed = LangevinState(end.position, Evaluation(logdensity, end.logdensity_grad))
    rounding = jnp.sqrt(jnp.finfo(energy.dtype).eps) * (1.0 + jnp.abs(end.logdensity))
    is_ok = is_finite(proposed.evaluation) & (energy + end.logdensity >= -rounding)
    settled = select(is_ok, proposed, state)
    return settled, is_ok, state.evaluation.logdensity - settled.evaluation.logdensity
