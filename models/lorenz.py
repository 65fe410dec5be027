"""The Lorenz models of 1963 and 1996, by Runge-Kutta steps with noise between them: chaos to be assimilated.

    1963:  x' = sigma (y - x),   y' = x (rho - z) - y,   z' = x y - beta z
    1996:  x_i' = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F,   i mod d

    x_t = Phi(x_{t-1}) + N(0, q^2 I),   y_t = C x_t + N(0, r^2 I)

with Phi the flow over one observation interval, by the classical Runge-Kutta method of order 4. The noise is added
once an interval, so that this is the model of discrete time, and not a discretised stochastic differential equation.

References:
    Lorenz (1963), doi:10.1175/1520-0469(1963)020<0130:DNF>2.0.CO;2.
    Lorenz and Emanuel (1998), doi:10.1175/1520-0469(1998)055<0399:OSFSWO>2.0.CO;2 (the model of 1996).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.nonlinear_gaussian import NonlinearGaussian

__all__ = ["Lorenz63Field", "Lorenz96Field", "RungeKutta", "lorenz63", "lorenz96"]


class Lorenz63Field(eqx.Module):
    """x' of the convection model of 1963, for states (x, y, z).

    Attributes:
        sigma: the Prandtl number.
        rho: the Rayleigh number over its critical value.
        beta: the aspect.
    """

    sigma: Float[Array, ""] = eqx.field(converter=as_floating("sigma"))
    rho: Float[Array, ""] = eqx.field(converter=as_floating("rho"))
    beta: Float[Array, ""] = eqx.field(converter=as_floating("beta"))

    def __call__(self, state: Float[Array, " 3"]) -> Float[Array, " 3"]:
        x, y, z = state
        return jnp.stack([self.sigma * (y - x), x * (self.rho - z) - y, x * y - self.beta * z])


class Lorenz96Field(eqx.Module):
    """x' of the model of 1996 for d >= 4 places on a circle.

    Attributes:
        forcing: F; waves are chaotic for F = 8.
    """

    forcing: Float[Array, ""] = eqx.field(converter=as_floating("forcing"))

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + self.forcing


class RungeKutta(eqx.Module):
    """The flow of x' = field(x) over `num_substeps` steps of the classical method of order 4; a drift.

    Attributes:
        field: the vector field, an equinox module.
        step_size: h > 0.
        num_substeps: how many, at least 1.
    """

    field: Callable[..., Any]
    step_size: Float[Array, ""] = eqx.field(converter=as_floating("step_size"))
    num_substeps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)
        errors.check_count("num_substeps", self.num_substeps)

    def __call__(self, x: Float[Array, " d"], t: Int[Array, ""]) -> Float[Array, " d"]:
        h = self.step_size

        def step(_, x):
            k1 = self.field(x)
            k2 = self.field(x + 0.5 * h * k1)
            k3 = self.field(x + 0.5 * h * k2)
            k4 = self.field(x + h * k3)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

        return jax.lax.fori_loop(0, self.num_substeps, step, x)


def lorenz96(
    num_states: int = 40,
    forcing: Float[Array, ""] | float = 8.0,
    *,
    step_size: Float[Array, ""] | float = 0.05,
    num_substeps: int = 1,
    transition_scale: Float[Array, ""] | float = 0.1,
    observation_scale: Float[Array, ""] | float = 1.0,
    observe_every: int = 2,
    initial_mean: Float[Array, "..."] | float | None = None,
    initial_scale: Float[Array, ""] | float = 1.0,
) -> NonlinearGaussian:
    """The Lorenz model of 1996, of which every k-th place is observed with noise.

        x_i' = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F,    y_t = (x_0, x_k, x_{2k}, ...) + N(0, r^2 I)

    Args:
        num_states: d, at least 4.
        forcing: F.
        step_size: h of the Runge-Kutta method; 0.05 stands for 6 hours of weather.
        num_substeps: Runge-Kutta steps between two observations.
        transition_scale: q > 0.
        observation_scale: r > 0.
        observe_every: k, at least 1.
        initial_mean: mean of x_0, shape (d,) or a scalar; by default the fixed point F, from which chaos sets in.
        initial_scale: standard deviation of x_0, > 0.

    Returns:
        A `NonlinearGaussian` with exact proposal and lookahead.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.lorenz96(num_states=8)
        >>> xs, ys = bi.models.simulate(0, model, num_steps=20)
        >>> xs.shape, ys.shape
        ((20, 8), (20, 4))

    References:
        Lorenz and Emanuel (1998), doi:10.1175/1520-0469(1998)055<0399:OSFSWO>2.0.CO;2.
    """
    errors.check_count("num_states", num_states, minimum=4)  # else neighbours coincide
    errors.check_count("observe_every", observe_every)
    drift = RungeKutta(Lorenz96Field(forcing), step_size, num_substeps)
    mean = forcing if initial_mean is None else initial_mean
    matrix = jnp.eye(num_states)[::observe_every]
    return _observed(drift, mean, initial_scale, transition_scale, matrix, observation_scale)


def lorenz63(
    sigma: Float[Array, ""] | float = 10.0,
    rho: Float[Array, ""] | float = 28.0,
    beta: Float[Array, ""] | float = 8.0 / 3.0,
    *,
    step_size: Float[Array, ""] | float = 0.01,
    num_substeps: int = 10,
    transition_scale: Float[Array, ""] | float = 0.1,
    observation_scale: Float[Array, ""] | float = 1.0,
    observation_matrix: Float[Array, "k 3"] | None = None,
    initial_mean: Float[Array, "..."] | float = 1.0,
    initial_scale: Float[Array, ""] | float = 1.0,
) -> NonlinearGaussian:
    """The Lorenz model of 1963, observed linearly with noise.

        x' = sigma (y - x),   y' = x (rho - z) - y,   z' = x y - beta z

    Args:
        sigma, rho, beta: its parameters; chaotic for 10, 28, 8/3.
        step_size: h of the Runge-Kutta method.
        num_substeps: Runge-Kutta steps between two observations.
        transition_scale: q > 0.
        observation_scale: r > 0.
        observation_matrix: C, shape (k, 3); by default x alone is observed.
        initial_mean: mean of the first state, shape (3,) or a scalar.
        initial_scale: its standard deviation, > 0.

    Returns:
        A `NonlinearGaussian` with exact proposal and lookahead.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import bayesinf as bi
        >>> xs, ys = bi.models.simulate(0, bi.models.lorenz63(), num_steps=20)
        >>> xs.shape, ys.shape
        ((20, 3), (20, 1))

    References:
        Lorenz (1963), doi:10.1175/1520-0469(1963)020<0130:DNF>2.0.CO;2.
    """
    drift = RungeKutta(Lorenz63Field(sigma, rho, beta), step_size, num_substeps)
    matrix = jnp.eye(3)[:1] if observation_matrix is None else as_floating("observation_matrix")(observation_matrix)
    return _observed(drift, initial_mean, initial_scale, transition_scale, matrix, observation_scale)


def _observed(drift, initial_mean, initial_scale, transition_scale, matrix, observation_scale) -> NonlinearGaussian:
    """With independent noises of equal scales."""
    scales = {
        "initial_scale": (initial_scale, matrix.shape[1]),
        "transition_scale": (transition_scale, matrix.shape[1]),
        "observation_scale": (observation_scale, matrix.shape[0]),
    }
    for name, (scale, _) in scales.items():
        errors.check_positive_scalar(name, scale)
    initial_tril, transition_tril, observation_tril = (scale * jnp.eye(size) for scale, size in scales.values())
    mean = as_floating("initial_mean")(initial_mean)
    if mean.shape not in ((), matrix.shape[1:]):
        raise ValueError(f"initial_mean must be a scalar or have shape {matrix.shape[1:]}, got {mean.shape}")
    mean = jnp.broadcast_to(mean, matrix.shape[1:])
    return NonlinearGaussian(drift, mean, initial_tril, transition_tril, matrix, observation_tril)
