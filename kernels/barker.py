"""Barker's proposal: a random walk whose steps are turned towards higher density, coordinate by coordinate.

    z_i ~ N(0, 2h),   y_i = x_i + z_i with probability 1 / (1 + exp(-z_i g_i)),  else x_i - z_i,   g = grad log pi(x)

A large gradient makes the direction certain but never the step long, where a Langevin step would jump out of the tails:
it tolerates step sizes that are wrong for some coordinates, at some efficiency where they are right. For small h it is
the step of MALA with the same h.

References:
    Livingstone and Zanella (2022), doi:10.1111/rssb.12482.
    Vogrinc, Livingstone and Zanella (2023), doi:10.1093/biomet/asac056 (scaling).
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Info, Kernel, accept
from bayesinf.kernels.langevin import LangevinState
from bayesinf.kernels.vectors import as_position, combine, normals
from bayesinf.target import Target, as_target

__all__ = ["Barker"]


class Barker(Kernel):
    """Metropolis-Hastings with Barker's proposal; exact for every h.

    With d = y - x the ratio of the proposal densities is  prod_i (1 + exp(-d_i g_i(x))) / (1 + exp(d_i g_i(y))).

    Attributes:
        target: what is sampled; one gradient a step.
        step_size: h > 0, in units of the Langevin diffusion's time: steps have standard deviation sqrt(2h).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.Barker(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    target_acceptance: ClassVar[float | None] = 0.574

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        return LangevinState(position, self.target.evaluate(position, order=1))

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_noise, key_turn, key_accept = jax.random.split(key, 3)
        (noise,) = normals(key_noise, state.position, 1)
        step = combine((jnp.sqrt(2 * self.step_size), noise))
        step = jax.tree.map(_turned, _uniforms(key_turn, step), step, state.evaluation.grad)
        position = combine((1, state.position), (1, step))
        proposed = LangevinState(position, self.target.evaluate(position, order=1))

        log_back = jax.tree.map(_log_back, step, state.evaluation.grad, proposed.evaluation.grad)
        change = proposed.evaluation.logdensity - state.evaluation.logdensity
        return accept(key_accept, change + sum(jax.tree.leaves(log_back)), proposed, state, num_gradients=1)


def _uniforms(key: Key[Array, ""], like: PyTree) -> PyTree:
    flat, unravel = ravel_pytree(like)
    return unravel(jax.random.uniform(key, flat.shape, flat.dtype))


def _turned(uniform: Array, z: Array, g: Array) -> Array:
    """The step z, with probability 1 / (1 + exp(-z g)), or -z."""
    small = jnp.exp(-jnp.abs(z * g))
    return jnp.where(uniform * (1 + small) < jnp.where(z * g > 0, 1, small), z, -z)


def _log_back(d: Array, g: Array, g_new: Array) -> Float[Array, ""]:
    """Sum of softplus(-d g) - softplus(d g_new), with one logarithm for each coordinate."""
    forth, back = d * g, d * g_new
    log_ratio = jnp.log((1 + jnp.exp(-jnp.abs(forth))) / (1 + jnp.exp(-jnp.abs(back))))
    return jnp.sum(jax.nn.relu(-forth) - jax.nn.relu(back) + log_ratio)
