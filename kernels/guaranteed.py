"""Warm-up by guarantee: parameters and length of the warm-up from a Wasserstein-2 bound, nothing learnt on the way.

Before the first step the curvature (m, M) of -log pi is measured at the starting positions, unless it is given, and
`guarantee` finds step size, friction and the number n of steps after which W2(law of x_n, pi) <= eps sqrt(p / m). How
far away a chain starts follows from its gradient, since the target is strongly log-concave:

    W2(delta_x, pi) <= |x - mode| + sqrt(p / m) <= |grad log pi(x)| / m + sqrt(p / m).

It is a proof where (m, M) hold everywhere; measured at some positions they are an estimate.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from bayesinf import errors
from bayesinf.adaptation import Tuned, Warmup
from bayesinf.kernels.curvature import estimate_curvature
from bayesinf.kernels.guarantees import guarantee

__all__ = ["Guaranteed", "guaranteed"]


_optional = partial(errors.as_array, is_optional=True, is_floating=True)


class Guaranteed(Warmup):
    """Sets a kernel's parameters by `guarantee`, before the first step.

    Attributes:
        eps: the tolerance, a fraction of sqrt(p / m).
        m, M: bounds of the Hessian of -log pi; None where they are measured at the starting positions.
    """

    eps: Float[Array, ""] = eqx.field(converter=errors.as_array("eps"))
    m: Float[Array, ""] | None = eqx.field(converter=_optional("m"), default=None)
    M: Float[Array, ""] | None = eqx.field(converter=_optional("M"), default=None)

    def __check_init__(self):
        errors.check_positive_scalar("eps", self.eps)
        if (self.m is None) != (self.M is None):
            raise ValueError("m and M must be given together, or neither")
        if self.m is not None:
            errors.check_positive_scalar("m", self.m)
            errors.check_positive_scalar("M", self.M)

    def prepare(self, kernel: Any, positions: PyTree, num_warmup: int) -> Any:
        """The kernel with the parameters of the guarantee.

        Raises:
            ValueError: no bound is known for the kernel, or the target is not log-concave at a starting position, or
                `num_warmup` is less than the number of steps that the guarantee needs.
        """
        if self.m is None or self.M is None:
            measured = estimate_curvature(kernel.target, positions)
            m, M = measured.m, measured.M
        else:
            m, M = float(self.m), float(self.M)
        one = jax.tree.map(lambda leaf: leaf[0], positions)
        dim = ravel_pytree(one)[0].size
        steepest = float(np.max(_slopes(kernel.target, positions)))

        found = guarantee(
            type(kernel), m=m, M=M, dim=dim, eps=self.eps, initial_distance=steepest / m + math.sqrt(dim / m)
        )
        if num_warmup < found.num_steps:
            raise ValueError(
                f"guaranteed(eps={float(self.eps):g}) needs num_warmup >= {found.num_steps} for "
                f"{type(kernel).__name__} with m = {m:.3g}, M = {M:.3g}, got {num_warmup}; raise num_warmup or eps"
            )
        parameters = {"step_size": found.step_size}
        if found.friction is not None and found.inverse_mass is not None:
            parameters |= {"friction": found.friction, "inverse_mass": found.inverse_mass}
        return dataclasses.replace(kernel, **parameters)

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        return Tuned(jnp.asarray(kernel.step_size, ravel_pytree(position)[0].dtype))

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Any) -> Tuned:
        return state

    def apply(self, kernel: Any, state: Tuned) -> Any:
        return kernel


def guaranteed(eps: ArrayLike, *, m: ArrayLike | None = None, M: ArrayLike | None = None) -> Guaranteed:
    """A warm-up for `sample` after which the law of every draw is within eps sqrt(p / m) of the target in W2.

    Args:
        eps: the tolerance, a fraction of sqrt(p / m).
        m, M: bounds of the Hessian of -log pi, everywhere, for the guarantee to be one; by default they are measured at
            the starting positions.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * x[0] ** 2 - x[1] ** 2)
        >>> kernel = bi.kernels.RandomizedMidpoint(target, step_size=1.0)  # its step size will be replaced
        >>> warmup = bi.guaranteed(eps=0.2)
        >>> draws = bi.sample(
        ...     0, kernel, jnp.zeros((4, 2)), num_samples=100, num_warmup=100, warmup=warmup, progress=False
        ... )
    """
    return Guaranteed(eps, m, M)  # type: ignore[arg-type]


@jax.jit
def _slopes(target: Any, positions: PyTree) -> Float[Array, " c"]:
    """|grad log pi| at each position."""
    gradients = jax.vmap(lambda position: target.evaluate(position, order=1).grad)(positions)
    return jnp.sqrt(sum(jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients)))
