"""The randomized midpoint with several midpoints, whose gradients are evaluated in parallel.

One long step is as accurate as many short ones if the gradient is known at R random times of it, and the path up to
those times is found by Picard sweeps, each of which takes R gradients at once. With U_r uniform on [(r-1)/R, r/R] and
one Brownian path W,

    X_r^0 = x,      X_r^q = x + h sum_j a_rj grad log pi(X_j^{q-1}) + sqrt(2) W(U_r h),    q = 1, ..., Q - 1,
    x'    = x + h/R sum_r grad log pi(X_r^{Q-1}) + sqrt(2) W(h),             a_rj = min(1/R, (U_r - (j-1)/R)_+)

R = 1, Q = 2 is `RandomizedMidpoint`. On N(0, 1/lam), with z = h lam, the stationary variance is off by a factor of

    1 + z^3 / 6             R = 1, Q = 2
    1 - z^2 (1 - 1/R^2)/6   R > 1, Q = 2: refused
    1 + z^2 / (3 R^2)       Q >= 3

to leading order: several nodes pay for z > 2 / R^2.

References:
    Shen and Lee (2019), arXiv:1909.05503, algorithm 2.
    Yu and Dalalyan (2024), arXiv:2402.14434.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, Kernel, keep_finite
from bayesinf.kernels.langevin import LangevinState
from bayesinf.kernels.vectors import as_position, normals
from bayesinf.target import Target, as_target

__all__ = ["ParallelMidpoint"]


class ParallelMidpoint(Kernel):
    """Parallelised randomized midpoint for overdamped Langevin dynamics.

    Worth it where R gradients in a batch cost little more than one: on accelerators, or for gradients that wait for
    memory. Not adjusted, and without a path weight.

    Attributes:
        target: what is sampled; (Q - 1) R + 1 gradients a step, in Q batches.
        step_size: h > 0, time of the diffusion.
        num_nodes: R >= 1 midpoints. Static.
        num_sweeps: Q, at least 3, or 2 if R = 1. Static.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.ParallelMidpoint(target, step_size=0.5, num_nodes=4)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        9
    """

    is_exact: ClassVar[bool] = False

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    num_nodes: int = eqx.field(static=True, default=4)
    num_sweeps: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)
        errors.check_count("num_nodes", self.num_nodes)
        errors.check_count("num_sweeps", self.num_sweeps, minimum=2)
        if self.num_nodes > 1 and self.num_sweeps == 2:
            raise ValueError(
                f"num_sweeps must be at least 3 for num_nodes={self.num_nodes}, got 2: the bias would be larger than "
                "with one node"
            )

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        return LangevinState(position, self.target.evaluate(position, order=1))

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_times, key_noise = jax.random.split(key)
        h, num = self.step_size, self.num_nodes
        edges = jnp.arange(num) / num
        times = edges + jax.random.uniform(key_times, (num,)) / num
        parts = jnp.clip(times[:, None] - edges, 0.0, 1 / num)  # a_rj
        lengths = jnp.diff(jnp.concatenate([jnp.zeros(1), times, jnp.ones(1)]))
        path = _brownian(jnp.sqrt(2 * h * lengths), normals(key_noise, state.position, num + 1))

        def nodes(drift: PyTree) -> Evaluation:
            points = jax.tree.map(lambda x, w, d: x + w[:-1] + d, state.position, path, drift)
            return jax.vmap(lambda x: self.target.evaluate(x, order=1))(points)

        evaluations = [nodes(jax.tree.map(lambda g: _weigh(h * times[:, None], g[None]), state.evaluation.grad))]
        for _ in range(self.num_sweeps - 2):
            evaluations.append(nodes(jax.tree.map(lambda g: _weigh(h * parts, g), evaluations[-1].grad)))
        mean_weights = jnp.full((1, num), h / num)
        position = jax.tree.map(
            lambda x, w, g: x + w[-1] + _weigh(mean_weights, g)[0], state.position, path, evaluations[-1].grad
        )
        proposed = LangevinState(position, self.target.evaluate(position, order=1))
        num_gradients = (self.num_sweeps - 1) * num + 1
        return keep_finite(
            proposed, state, num_gradients=num_gradients, evaluations=[*evaluations, proposed.evaluation]
        )


def _brownian(scales: Float[Array, " n"], noises: list[PyTree]) -> PyTree:
    """Sums of the increments `scales[i] * noises[i]` up to each i, with a leading axis."""

    def cumulate(*leaves: Array) -> Array:
        increments = jnp.stack(leaves) * scales.astype(leaves[0].dtype).reshape(-1, *[1] * leaves[0].ndim)
        return jnp.cumsum(increments, axis=0)

    return jax.tree.map(cumulate, *noises)


def _weigh(weights: Float[Array, "r n"], values: Array) -> Array:
    """Weighted sums over the leading axis, in the dtype of the values."""
    return jnp.tensordot(weights.astype(values.dtype), values, axes=1)
