"""Any kernel in better coordinates: a linear map takes the target to one that is rounder.

    x = x_0 + L z,      log pi_z(z) = log pi(x_0 + L z)

The kernel moves z and never sees x. The origin x_0 is where the chain is, so every step starts at z = 0: for kernels of
gradients, which know no origin, this is the same chain as with a fixed one; what is rejected stays bit for bit where it
was, and no rounding adds up over the steps. MALA becomes preconditioned MALA, HMC gets the mass matrix (L L^T)^-1, and
so on for every kernel.

References:
    Roberts and Stramer (2002), doi:10.1023/A:1023562417138 (preconditioned Langevin).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, refreshed, select
from bayesinf.kernels.parts import PartsState, SharedState, attach, check_target, check_untied, detach
from bayesinf.kernels.vectors import as_position, combine
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target

__all__ = ["Precondition"]


class Precondition(Wrapping):
    """A kernel in coordinates z = L^-1 (x - x_0); its step size is in units of z.

    Warm-up learns L from the chain, with the step size, where the kernel has a target acceptance rate: the standard
    deviations of the coordinates, or with `is_dense` the Cholesky factor of their covariance.

    Attributes:
        kernel: a kernel with a target, of gradients; not one that is tied to the origin. To adjust it, put the
            `Metropolize` inside.
        scale: L, over the position as `ravel_pytree` lays it out: its diagonal of shape (d,), positive, or a lower
            triangle of shape (d, d) with a positive diagonal. Ones if None.

    Raises:
        ValueError: the kernel has no target, or the scale is not of that form.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> scale = jnp.array([1.0, 100.0])
        >>> target = bi.Target(lambda x, scale: -0.5 * jnp.sum((x / scale) ** 2), scale)
        >>> kernel = bi.kernels.Precondition(bi.kernels.MALA(target, step_size=0.5), scale)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.zeros(2)))
        >>> bool(info.acceptance_rate > 0.1)
        True
    """

    kernel: Any
    scale: Float[Array, "..."] | None = eqx.field(converter=errors.as_array("scale", is_optional=True), default=None)

    def __check_init__(self):
        check_target(self.kernel)
        check_untied("kernel", self.kernel)
        if not hasattr(self.kernel.target, "evaluate"):
            raise ValueError(
                f"kernel must be on a Target, got {type(self.kernel).__name__} on {type(self.kernel.target).__name__}, "
                "which cannot be seen in other coordinates: write its terms in better ones"
            )
        if self.scale is None:
            return
        shape = jnp.shape(self.scale)
        if len(shape) not in (1, 2) or len(set(shape)) != 1:
            raise ValueError(f"scale must have shape (d,) or (d, d), got {shape}")
        errors.check_positive("scale" if len(shape) == 1 else "the diagonal of scale", _diagonal(self.scale))
        if len(shape) == 2 and errors.is_concrete(self.scale) and np.any(np.triu(self.scale, 1)):
            raise ValueError("scale must be lower triangular; use jnp.linalg.cholesky(covariance)")

    def init(self, position: PyTree) -> SharedState | PartsState:
        position = as_position(position)
        inner = self._at(position).init(jax.tree.map(jnp.zeros_like, position))
        if not hasattr(inner, "evaluation"):
            return PartsState(position, (detach(inner),))
        return SharedState(position, self._evaluation_of_x(inner.evaluation), (detach(inner),))

    def refresh(self, key: Key[Array, ""], state: SharedState | PartsState) -> SharedState | PartsState:
        """The state with a fresh velocity, where the kernel has one."""
        inner, _ = self._inner(state)
        return state._replace(memory=(detach(refreshed(self.kernel, key, inner)),))

    def step(self, key: Key[Array, ""], state: SharedState | PartsState) -> tuple[SharedState | PartsState, Any]:
        before, num_starting = self._inner(state)
        after, info = self._at(state.position).step(key, before)
        if num_starting:
            info = info._replace(num_gradients=info.num_gradients + num_starting)
        position = combine((1, state.position), (1, _times(self.scale, after.position)))
        memory = (detach(after),)
        if not hasattr(after, "evaluation"):
            return PartsState(position, memory), info
        # what stands still keeps its gradient, bit for bit
        has_moved = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(after.position)]))
        known = getattr(state, "evaluation", None)
        evaluation = self._evaluation_of_x(after.evaluation)
        if known is not None:
            evaluation = select(has_moved, evaluation, known)
        return SharedState(position, evaluation, memory), info

    def with_metric(self, covariance: Float[Array, "..."]) -> "Precondition":
        scale = jnp.sqrt(covariance) if covariance.ndim == 1 else jnp.linalg.cholesky(covariance)
        return Precondition(self.kernel, scale)

    @property
    def metric(self) -> Float[Array, "..."] | None:
        if self.scale is None:
            return None
        return self.scale**2 if self.scale.ndim == 1 else self.scale @ self.scale.T

    @property
    def has_metric(self) -> bool:
        return True

    def _at(self, position: PyTree) -> Any:
        """The kernel on the target seen from `position`."""
        return self.kernel.with_target(Target(_seen_from, (self.target, position, self.scale)))

    def _inner(self, state: SharedState | PartsState) -> tuple[Any, int]:
        """The kernel's state at z = 0, and the gradients that it cost."""
        known = getattr(state, "evaluation", None)
        if known is not None and known.grad is not None:
            known = Evaluation(known.logdensity, _times_transposed(self.scale, known.grad))
        origin = jax.tree.map(jnp.zeros_like, state.position)
        return attach(self._at(state.position), state.memory[0], origin, known)

    def _evaluation_of_x(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with the gradient by x, L^-T times the gradient by z."""
        if evaluation.grad is None or self.scale is None:
            return evaluation
        flat, unravel = ravel_pytree(evaluation.grad)
        scale = self.scale.astype(flat.dtype)
        if scale.ndim == 1:
            return Evaluation(evaluation.logdensity, unravel(flat / scale))
        solved = jax.scipy.linalg.solve_triangular(scale.T, flat)
        return Evaluation(evaluation.logdensity, unravel(solved))


def _seen_from(z: PyTree, data: tuple[Target, PyTree, Any]) -> Float[Array, ""]:
    target, position, scale = data
    return target.logdensity(combine((1, position), (1, _times(scale, z))))


def _times(scale: Any, z: PyTree) -> PyTree:
    """L z."""
    if scale is None:
        return z
    flat, unravel = ravel_pytree(z)
    if scale.shape[0] != flat.size:
        raise ValueError(f"scale must be over the ravelled position, of shape ({flat.size},), got shape {scale.shape}")
    scale = scale.astype(flat.dtype)
    return unravel(scale * flat if scale.ndim == 1 else scale @ flat)


def _times_transposed(scale: Any, grad: PyTree) -> PyTree:
    """L^T g."""
    if scale is None:
        return grad
    return _times(scale if scale.ndim == 1 else scale.T, grad)


def _diagonal(scale: Any) -> Any:
    return scale if jnp.ndim(scale) == 1 else jnp.diagonal(scale)
