"""Online EM: parameters of exponential families that follow the data as they come in, by PaRIS.

    tau_t^i = mean_j [ (1 - gamma_t) tau_{t-1}^{J} + gamma_t s_t(X_{t-1}^{J}, X_t^i, y_t) ],    gamma_t = (t + 1)^-kappa
    theta_t = maximize( sum_i W_t^i tau_t^i )

with J the backward draws of PaRIS. sum_i W_t^i tau_t^i is a running average of the expected statistics of one step, in
which the past, smoothed under old parameters, is forgotten.

References:
    Cappe (2011), doi:10.1198/jcgs.2011.09109.
    Olsson and Westerborn (2017), doi:10.3150/16-BEJ801 (the smoother).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree, current
from bayesinf.kernels.additive import AdditiveFunctional, check_functional, weighted_mean
from bayesinf.kernels.backward import BACKWARD_METHODS
from bayesinf.kernels.cloud import Cloud
from bayesinf.kernels.filter_steps import PROPOSALS
from bayesinf.kernels.learning import check_maximize, select_finite
from bayesinf.kernels.online_filter import as_row
from bayesinf.kernels.paris import Paris, ParisState, begin_paris, move_paris_on, paris_keys
from bayesinf.models.state_space import StateSpaceModel, check_observations

__all__ = ["OnlineEM", "OnlineEMInfo", "OnlineEMState"]


class OnlineEMState(NamedTuple):
    """PaRIS, whose statistics are running averages, and the parameters."""

    paris: ParisState
    theta: PyTree


class OnlineEMInfo(NamedTuple):
    """What one step tells.

    Attributes:
        theta: the parameters after y_t.
        statistics: the running average of the expected statistics.
        log_evidence_increment: an estimate of log p(y_t | y_{0:t-1}) at the parameters before.
        ess: effective sample size of the weights; 0 where all vanished, from which there is no way back.
    """

    theta: PyTree
    statistics: PyTree
    log_evidence_increment: Float[Array, ""]
    ess: Float[Array, ""]


class OnlineEM(eqx.Module):
    """EM for data that arrive one at a time, in a memory that does not grow.

    Attributes:
        build: `build(theta)` returns the StateSpaceModel.
        statistics: the sufficient statistics of one step: the terms of an AdditiveFunctional. The initial term counts
            like a step.
        maximize: of expected statistics of one step, gives the parameters that maximise the expected log density.
        num_particles: N.
        num_backward: M >= 1 backward draws a particle.
        exponent: kappa in (1/2, 1]; 0.6 forgets the first parameters soon.
        num_waiting: observations during which the parameters stay, while the average forms.
        method: how backward draws are made, see `paris`.
        proposal: "bootstrap", or "guided" by the model's own proposals.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def build(scale):
        ...     return bi.models.LinearGaussian.scalar(0.9, scale, initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build(0.5), num_steps=20)
        >>> squares = bi.kernels.AdditiveFunctional(
        ...     lambda x: jnp.sum(x**2), lambda x_prev, x, t: jnp.sum((x - 0.9 * x_prev) ** 2)
        ... )
        >>> stream = bi.kernels.OnlineEM(build, squares, jnp.sqrt, num_particles=50, num_waiting=5)
        >>> state, info = stream.init(1, 1.0, ys[0])
        >>> for y in ys[1:]:
        ...     state, info = stream.step(state, y)
        >>> info.theta.shape
        ()

    References:
        Cappe (2011), doi:10.1198/jcgs.2011.09109.
    """

    build: Callable[[PyTree], StateSpaceModel]
    statistics: AdditiveFunctional
    maximize: Callable[[PyTree], PyTree]
    exponent: Float[Array, ""]
    num_waiting: Int[Array, ""]
    num_particles: int = eqx.field(static=True)
    num_backward: int = eqx.field(static=True)
    method: str = eqx.field(static=True)
    proposal: str = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[[PyTree], StateSpaceModel],
        statistics: AdditiveFunctional,
        maximize: Callable[[PyTree], PyTree],
        *,
        num_particles: int,
        num_backward: int = 2,
        exponent: float = 0.6,
        num_waiting: int = 50,
        method: str = "auto",
        proposal: str = "bootstrap",
    ):
        errors.check_arguments("build", build, "theta")
        errors.check_arguments("maximize", maximize, "statistics")
        check_functional(statistics)
        errors.check_choice("method", method, BACKWARD_METHODS)
        errors.check_choice("proposal", proposal, PROPOSALS)
        if errors.is_concrete(exponent) and not 0.5 < exponent <= 1:
            raise ValueError(f"exponent must lie in (0.5, 1], got {exponent}")
        self.build, self.statistics, self.maximize = as_pytree(build), statistics, as_pytree(maximize)
        self.exponent = jnp.asarray(exponent, float)
        self.num_waiting = jnp.asarray(errors.check_count("num_waiting", num_waiting, minimum=0))
        self.num_particles = errors.check_count("num_particles", num_particles)
        self.num_backward = errors.check_count("num_backward", num_backward)
        self.method, self.proposal = method, proposal

    def init(self, key: errors.KeyLike, theta: PyTree, y: PyTree) -> tuple[OnlineEMState, OnlineEMInfo]:
        """The state after y_0.

        Args:
            key: PRNG key or seed.
            theta: where to start, a pytree of floating point arrays.
            y: the first observation; NaN where missing.

        Returns:
            (state, info).
        """
        theta = errors.as_arrays("theta", theta)
        errors.check_floating("theta", theta)
        ys = check_observations(self.build(theta), jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y))
        return _begin(current(self), errors.as_key(key), theta, jax.tree.map(lambda leaf: leaf[0], ys))

    def step(self, state: OnlineEMState, y: PyTree) -> tuple[OnlineEMState, OnlineEMInfo]:
        """The state after the next observation.

        Args:
            state: of `init` or `step`.
            y: the next observation, like the first; NaN where missing.

        Returns:
            (state, info).
        """
        return _move_on(current(self), state, as_row(y))


class _Scaled(eqx.Module):
    """A term of a functional, times a number."""

    factor: Array
    term: Callable[..., PyTree]

    def __call__(self, *args):
        return jax.tree.map(lambda leaf: self.factor * leaf, self.term(*args))


def _smoother(self: OnlineEM, theta: PyTree, gamma: Array) -> Paris:
    s = self.statistics
    return Paris(
        self.build(theta),
        AdditiveFunctional(s.initial, _Scaled(gamma, s.increment), s.is_given_data),
        num_particles=self.num_particles,
        num_backward=self.num_backward,
        method=self.method,
        proposal=self.proposal,
    )


@jax.jit
def _begin(self: OnlineEM, key, theta, y) -> tuple[OnlineEMState, OnlineEMInfo]:
    paris, info, _ = begin_paris(_smoother(self, theta, jnp.ones(())), key, y)
    check_maximize(self.maximize, info.estimate, theta)
    return _learn(self, paris, info, theta)


@jax.jit
def _move_on(self: OnlineEM, state: OnlineEMState, y) -> tuple[OnlineEMState, OnlineEMInfo]:
    before, t = state.paris, state.paris.filter.t + 1
    gamma = ((t + 1.0) ** -self.exponent).astype(before.filter.log_weights.dtype)
    faded = before._replace(statistics=jax.tree.map(lambda leaf: (1.0 - gamma) * leaf, before.statistics))
    paris, info, _ = move_paris_on(_smoother(self, state.theta, gamma), faded, paris_keys(before.filter.key, t), y)
    return _learn(self, paris, info, state.theta)


def _learn(self: OnlineEM, paris: ParisState, info, theta):
    average = weighted_mean(Cloud(paris.filter.particles, paris.filter.log_weights), paris.statistics)
    found = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), self.maximize(average), theta)
    is_waiting = paris.filter.t < self.num_waiting
    found = jax.tree.map(lambda new, old: jnp.where(is_waiting, old, new), found, theta)
    theta, _ = select_finite((average, found), found, theta)
    return OnlineEMState(paris, theta), OnlineEMInfo(theta, average, info.log_evidence_increment, info.ess)
