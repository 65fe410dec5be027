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
        turns = _logistics(key_turn, state.position)
        step = combine((jnp.sqrt(2 * self.step_size), noise))
        # a logistic variable lies below z g with probability 1 / (1 + exp(-z g))
        step = jax.tree.map(lambda z, g, t: jnp.where(t < z * g, z, -z), step, state.evaluation.grad, turns)
        position = combine((1, state.position), (1, step))
        proposed = LangevinState(position, self.target.evaluate(position, order=1))

        log_back = sum(
            jnp.sum(jax.nn.softplus(-d * g) - jax.nn.softplus(d * g_new))
            for d, g, g_new in zip(
                *map(jax.tree.leaves, (step, state.evaluation.grad, proposed.evaluation.grad)), strict=True
            )
        )
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity + log_back
        return accept(key_accept, log_ratio, proposed, state, num_gradients=1)


def _logistics(key: Key[Array, ""], like: PyTree) -> PyTree:
    """Independent standard logistic variables in the structure of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [jax.random.logistic(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )
