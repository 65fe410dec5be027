"""Microcanonical Langevin Monte Carlo: a particle of constant speed whose direction is bent by the gradient.

    dx = u dt,    du = (I - u u^T) (grad log pi(x) / (d - 1) dt + noise),    |u| = 1

leaves pi(x) times the uniform law of directions invariant. A step of size eps is half a partial refreshment of the
direction, a minimal-norm step of the deterministic part (two gradients), and the other half; the direction is forgotten
over a path of length about L. With a metric, the diagonal C, it runs in the coordinates C^(-1/2) x.

There is no Metropolis test: the law that is sampled differs from pi by O(eps^2), and no length of the run mends that.
What keeps the bias small is the change of the energy over a step,

    Delta E = -log pi(x') + log pi(x) + (change of kinetic energy),

whose variance a coordinate is of the order eps^6: warm-up takes the largest eps at which it is 5e-4. On isotropic
Gaussians the variances are then too small by about two percent. Where that is too much, ask `MCLMCWarmup` for less of
it, or take NUTS.

The step is BlackJAX's. What differs: a kernel is a pytree, and shares its evaluation with other kernels on the target.

References:
    Robnik, De Luca, Silverstein, Seljak (2023), arXiv:2212.08549.
    Robnik and Seljak (2023), arXiv:2303.18221 (the Langevin form).
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Kernel, select
from bayesinf.kernels.mclmc_warmup import MCLMCWarmup
from bayesinf.kernels.vectors import as_position
from bayesinf.target import Target, as_target

__all__ = ["MCLMC", "MCLMCInfo", "MCLMCState"]


class MCLMCState(NamedTuple):
    """Position, the target's evaluation there, and direction: a unit vector, or zero where one is to be drawn."""

    position: PyTree
    evaluation: Evaluation
    direction: PyTree


class MCLMCInfo(NamedTuple):
    """What one step tells.

    Attributes:
        acceptance_rate, is_accepted, is_divergent, num_gradients, log_work: as in `Info`.
        energy_change: Delta E of the step; 0 where it was undone.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: Float[Array, ""]
    energy_change: Float[Array, ""]


class MCLMC(Kernel):
    """Microcanonical Langevin Monte Carlo; biased by its step size.

    Attributes:
        target: what is sampled, of at least two coordinates; two gradients a step.
        step_size: eps > 0, the length of a step's path; of the order of sqrt(d) standard deviations / 4.
        L: > 0, the length over which the direction is forgotten; sqrt(d) standard deviations is a start, and warm-up
            finds both.
        inverse_mass_matrix: C, over the position as `ravel_pytree` lays it out; ones if None.

    Raises:
        ValueError: a parameter is not positive, or the position has one coordinate.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MCLMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=1.0, L=3.0)
        >>> draws = bi.sample(0, kernel, jnp.ones((4, 10)), num_samples=500, num_warmup=500, progress=False)
        >>> bool(jnp.all(draws.tuned.step_size > 1.0))
        True
    """

    is_exact: ClassVar[bool] = False

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    L: Float[Array, ""] = eqx.field(converter=errors.as_array("L"))
    inverse_mass_matrix: Float[Array, " d"] | None = eqx.field(
        converter=errors.as_array("inverse_mass_matrix", is_optional=True), default=None
    )

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)
        errors.check_positive_scalar("L", self.L)
        if self.inverse_mass_matrix is not None:
            errors.check_positive("inverse_mass_matrix", self.inverse_mass_matrix)

    def init(self, position: PyTree) -> MCLMCState:
        """The state at `position`; the first step draws a direction."""
        position = as_position(position)
        size = ravel_pytree(position)[0].size
        if size < 2:
            raise ValueError("position must have at least two coordinates: in one there is no direction to bend")
        if self.inverse_mass_matrix is not None and self.inverse_mass_matrix.shape != (size,):
            raise ValueError(
                f"inverse_mass_matrix must be the diagonal over the ravelled position, of shape ({size},), "
                f"got shape {self.inverse_mass_matrix.shape}"
            )
        return MCLMCState(position, self.target.evaluate(position, order=1), jax.tree.map(jnp.zeros_like, position))

    def step(self, key: Key[Array, ""], state: MCLMCState) -> tuple[MCLMCState, MCLMCInfo]:
        from blackjax.mcmc import integrators, mclmc

        flat, _ = ravel_pytree(state.position)
        metric = jnp.ones_like(flat) if self.inverse_mass_matrix is None else self.inverse_mass_matrix
        parameters = (jnp.asarray(value, flat.dtype) for value in (metric, self.L, self.step_size))

        known: Any = state.evaluation
        start = integrators.IntegratorState(state.position, state.direction, *known)
        step: Any = mclmc.build_kernel()
        end, told = step(key, start, self.target.logdensity, *parameters)

        is_ok = told.nonans  # the last gradient is in the direction, so that one that is not finite shows
        # what is undone goes on in a fresh direction, which leaves the law of directions as it is
        undone = state._replace(direction=jax.tree.map(jnp.zeros_like, state.direction))
        evaluation = Evaluation(end.logdensity, end.logdensity_grad)
        moved = select(is_ok, MCLMCState(end.position, evaluation, end.momentum), undone)
        info = MCLMCInfo(
            acceptance_rate=is_ok.astype(flat.dtype),
            is_accepted=is_ok,
            is_divergent=~is_ok,
            num_gradients=jnp.asarray(2, jnp.int32),
            log_work=jnp.where(is_ok, -told.kinetic_change, 0.0),
            energy_change=jnp.where(is_ok, told.energy_change, 0.0),
        )
        return moved, info

    def suited_warmup(self, num_warmup: int) -> Any:
        return MCLMCWarmup(num_warmup) if num_warmup >= MCLMCWarmup.SHORTEST else None
