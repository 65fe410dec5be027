"""The free flow of kinetic Langevin dynamics, integrated exactly: friction and noise without a force.

Over a time t, with a = gamma t, eta = exp(-a), psi = (1 - eta) / gamma,

    dx = v dt,  dv = -gamma v dt + sqrt(2 gamma u) dW      gives      v_t = eta v_0 + n_v,   x_t = x_0 + psi v_0 + n_x,

    n_v ~ N(0, u (1 - eta^2)),      n_x | n_v ~ N(tanh(a/2) / gamma  n_v,  (2u / gamma^2) (a - 2 tanh(a/2))).

The conditional form needs no Cholesky factor and is never singular. It is the covariance C_xx = (u / gamma^2)
(2a - 3 + 4 eta - eta^2), C_xv = (u / gamma) (1 - eta)^2, C_vv = u (1 - eta^2) of the literature, whose C_xx has no
correct digit left in float32 below a = 0.01. Here the two differences that cancel, a - 2 tanh(a/2) ~ a^3 / 12 and
a - (1 - eta) ~ a^2 / 2, are summed as series for a < 0.3.

References:
    Chandrasekhar (1943), doi:10.1103/RevModPhys.15.1 (the joint law of position and velocity).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bayesinf.kernels.vectors import combine

__all__ = ["FreeFlow", "free_flow"]

_SMALL = 0.3
# (a - 2 tanh(a/2)) / (a^3 / 12) in powers of a^2, from the Taylor series of tanh
_BRIDGE = (1.0, -1 / 10, 17 / 1680, -31 / 30240, 691 / 6652800, -5461 / 518918400, 929569 / 871782912000)
# (a - 1 + exp(-a)) / (a^2 / 2) in powers of a: 2 (-1)^k / (k + 2)!
_LAG = (1.0, -1 / 3, 1 / 12, -1 / 60, 1 / 360, -1 / 2520, 1 / 20160, -1 / 181440, 1 / 1814400, -1 / 19958400)


class FreeFlow(NamedTuple):
    """The coefficients of the flow over one length of time.

    Attributes:
        decay: eta, what is left of a velocity.
        reach: psi, how far a unit velocity carries.
        lag: (t - psi) / gamma, how far a unit force held over the time carries; it changes the velocity by psi.
        velocity_scale: standard deviation of n_v.
        tilt: regression coefficient of n_x on n_v.
        position_scale: standard deviation of n_x given n_v.
    """

    decay: Float[Array, ""]
    reach: Float[Array, ""]
    lag: Float[Array, ""]
    velocity_scale: Float[Array, ""]
    tilt: Float[Array, ""]
    position_scale: Float[Array, ""]

    def noise(self, z_velocity: PyTree, z_position: PyTree) -> tuple[PyTree, PyTree]:
        """(n_x, n_v) from two standard normal pytrees."""
        n_v = combine((self.velocity_scale, z_velocity))
        return combine((self.position_scale, z_position), (self.tilt, n_v)), n_v

    def apply(self, position: PyTree, velocity: PyTree, noise: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Where the flow takes (x, v), given its noise."""
        n_x, n_v = noise
        return combine((1, position), (self.reach, velocity), (1, n_x)), combine((self.decay, velocity), (1, n_v))


def free_flow(time: Float[Array, ""], friction: Float[Array, ""], inverse_mass: Float[Array, ""]) -> FreeFlow:
    """The flow over `time` t >= 0 with friction gamma > 0 and velocities of variance u = `inverse_mass`."""
    a = friction * time
    is_small = a < _SMALL
    little, large = jnp.where(is_small, a, 0.0), jnp.where(is_small, 1.0, a)

    gone = -jnp.expm1(-a)  # 1 - eta
    bridge = jnp.where(is_small, _series(_BRIDGE, little**2) * little**3 / 12, large - 2 * jnp.tanh(large / 2))
    lag = jnp.where(is_small, _series(_LAG, little) * little**2 / 2, large + jnp.expm1(-large))
    return FreeFlow(
        decay=jnp.exp(-a),
        reach=gone / friction,
        lag=lag / friction**2,
        velocity_scale=jnp.sqrt(-jnp.expm1(-2 * a) * inverse_mass),
        tilt=jnp.tanh(a / 2) / friction,
        position_scale=jnp.sqrt(2 * inverse_mass * bridge) / friction,
    )


def _series(coefficients: tuple[float, ...], x: Float[Array, ""]) -> Float[Array, ""]:
    """The polynomial with these coefficients, lowest first."""
    total = jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
