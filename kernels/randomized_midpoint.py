"""Randomized midpoint discretisations of Langevin dynamics: the gradient is taken at a random time of the step.

The increment of the diffusion holds an integral of the gradient along the path; evaluated at one uniform time U h it
is unbiased but for the error of the path up to there, which lifts the order of the bias from O(h) to O(h^3) on
Gaussians, at two gradients a step. U is drawn from the step's key, so every chain has its own: one shared by all would
leave each chain right but make their average noisier.

References:
    Shen and Lee (2019), arXiv:1909.05503.
    He, Balasubramanian, Erdogdu (2020), arXiv:2011.03176 (overdamped).
    Yu, Karagulyan, Dalalyan (2024), arXiv:2306.08494.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Info, Kernel, keep_finite
from bayesinf.kernels.kinetic import KineticState, check_parameters, init_at_rest, refresh_velocity, turned
from bayesinf.kernels.langevin import LangevinState
from bayesinf.kernels.ornstein_uhlenbeck import free_flow
from bayesinf.kernels.vectors import as_position, combine, normals
from bayesinf.target import Target, as_target

__all__ = ["RandomizedMidpoint", "RandomizedMidpointKinetic"]


class RandomizedMidpoint(Kernel):
    """Randomized midpoint for overdamped Langevin dynamics, dX = grad log pi(X) dt + sqrt(2) dW.

        x_U = x + U h grad log pi(x) + sqrt(2 U h) xi_1,                                 U ~ Uniform(0, 1)
        x'  = x +   h grad log pi(x_U) + sqrt(2 U h) xi_1 + sqrt(2 (1 - U) h) xi_2

    On N(0, 1/lam), with z = h lam, the stationary variance times lam is (2 - 2z + z^2) / (2 - 2z + z^2 - z^3 / 3);
    stable for z < 1.596. Not adjusted, and without a path weight.

    Attributes:
        target: what is sampled; two gradients a step.
        step_size: h > 0, time of the diffusion.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.RandomizedMidpoint(target, step_size=0.5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        2
    """

    is_exact: ClassVar[bool] = False

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        return LangevinState(position, self.target.evaluate(position, order=1))

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_time, key_noise = jax.random.split(key)
        h = self.step_size
        before = h * jax.random.uniform(key_time)
        after = h - before
        xi_1, xi_2 = normals(key_noise, state.position, 2)

        wandered = combine((1, state.position), (jnp.sqrt(2 * before), xi_1))
        midpoint = combine((1, wandered), (before, state.evaluation.grad))
        middle = self.target.evaluate(midpoint, order=1)
        position = combine((1, wandered), (jnp.sqrt(2 * after), xi_2), (h, middle.grad))
        proposed = LangevinState(position, self.target.evaluate(position, order=1))
        return keep_finite(proposed, state, num_gradients=2, evaluations=[middle, proposed.evaluation])


class RandomizedMidpointKinetic(Kernel):
    """Randomized midpoint for kinetic Langevin dynamics.

        dx = v dt,    dv = -gamma v dt + u grad log pi(x) dt + sqrt(2 gamma u) dW

    The free flow to the time U h, the whole kick of the step there, and the free flow on; the gradient of the kick is
    taken where the exponential integrator would be at that time:

        (x, v) -> free flow over U h -> (y, w),       x_U = y + u (U h - psi) / gamma grad log pi(x)
        w += u h grad log pi(x_U)   -> free flow over (1 - U) h -> (x', v')

    with psi = (1 - e^(-gamma U h)) / gamma. The noises of y and x' then have the joint law of Shen and Lee.

    Attributes:
        target: what is sampled; two gradients a step.
        step_size: h > 0, time of the diffusion.
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.RandomizedMidpointKinetic(target, step_size=0.5, friction=2.0)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        2
    """

    is_exact: ClassVar[bool] = False

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
        key_time, key_noise = jax.random.split(key)
        h, u = self.step_size, self.inverse_mass
        before = h * jax.random.uniform(key_time)
        first, second = (free_flow(time, self.friction, u) for time in (before, h - before))
        z_1, z_2, z_3, z_4 = normals(key_noise, state.position, 4)

        y, w = first.apply(state.position, state.velocity, first.noise(z_1, z_2))
        x_mid = combine((1, y), (u * first.lag, state.evaluation.grad))
        middle = self.target.evaluate(x_mid, order=1)
        w = combine((1, w), (u * h, middle.grad))
        position, velocity = second.apply(y, w, second.noise(z_3, z_4))
        proposed = KineticState(position, self.target.evaluate(position, order=1), velocity)
        return keep_finite(proposed, turned(state), num_gradients=2, evaluations=[middle, proposed.evaluation])
