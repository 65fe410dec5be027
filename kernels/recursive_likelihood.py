"""Recursive maximum likelihood: parameters that follow the data as they come in, by PaRIS.

    theta_t = theta_{t-1} + gamma_t  grad log p(y_t | y_{0:t-1}),
    grad log p(y_t | y_{0:t-1})  by  sum_i W_t^i tau_t^i - sum_i P_t^i (tau_t^i - grad log g_t(X_t^i))

with tau_t^i the statistics of the score, each term of which is taken at the parameters of its time, and P_t^i the
weights before y_t is weighed in. The second sum is an estimate of the score of y_{0:t-1} too; taken over the particles
of time t, most of its noise is that of the first.

References:
    Le Gland and Mevel (1997), doi:10.1109/CDC.1997.650696.
    Olsson and Westerborn Alenlov (2020), doi:10.1007/s11222-019-09913-z (PaRISian).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from bayesinf import errors
from bayesinf.captured import captured, current
from bayesinf.kernels.backward import BACKWARD_METHODS
from bayesinf.kernels.filter_steps import PROPOSALS
from bayesinf.kernels.learning import Freely, check_optimizer, select_finite
from bayesinf.kernels.online_filter import as_row
from bayesinf.kernels.paris import Paris, ParisState, begin_paris, move_paris_on, paris_keys
from bayesinf.kernels.score import score_functional
from bayesinf.models.state_space import StateSpaceModel, check_observations, observation_log_prob

__all__ = ["RecursiveInfo", "RecursiveLikelihood", "RecursiveState"]


class RecursiveState(NamedTuple):
    """PaRIS, the parameters where they are not constrained, and what the optimiser remembers."""

    paris: ParisState
    free: PyTree
    memory: PyTree


class RecursiveInfo(NamedTuple):
    """What one step tells.

    Attributes:
        theta: the parameters after y_t.
        gradient: the estimate of grad log p(y_t | y_{0:t-1}), in the parameters where they are not constrained.
        log_evidence_increment: an estimate of log p(y_t | y_{0:t-1}) at the parameters before.
        ess: effective sample size of the weights; 0 where all vanished, from which there is no way back.
    """

    theta: PyTree
    gradient: PyTree
    log_evidence_increment: Float[Array, ""]
    ess: Float[Array, ""]


class RecursiveLikelihood(eqx.Module):
    """Maximum likelihood of data that arrive one at a time, in a memory that does not grow.

    Attributes:
        build: `build(theta)` returns the StateSpaceModel.
        optimizer: of optax, such as `optax.sgd(lambda t: 0.1 * (t + 1.0) ** -0.6)`: steps gamma_t whose sum is infinite
            and whose squares are summable converge, a constant one follows parameters that drift. It is given minus the
            gradient.
        num_particles: N.
        num_backward: M >= 1 backward draws a particle.
        method: how backward draws are made, see `paris`.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        constraints: of NumPyro, by name where theta is a dict, or one for all: steps are taken where there are none.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import bayesinf as bi
        >>> def build(log_scale):
        ...     return bi.models.LinearGaussian.scalar(0.9, jnp.exp(log_scale), initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build(-0.5), num_steps=20)
        >>> stream = bi.kernels.RecursiveLikelihood(build, optimizer=optax.sgd(0.02), num_particles=50)
        >>> state, info = stream.init(1, 0.0, ys[0])
        >>> for y in ys[1:]:
        ...     state, info = stream.step(state, y)
        >>> info.theta.shape
        ()

    References:
        Olsson and Westerborn Alenlov (2020), doi:10.1007/s11222-019-09913-z.
    """

    build: Freely
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)
    num_backward: int = eqx.field(static=True)
    method: str = eqx.field(static=True)
    proposal: str = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[[PyTree], StateSpaceModel],
        *,
        optimizer: optax.GradientTransformation,
        num_particles: int,
        num_backward: int = 2,
        method: str = "auto",
        proposal: str = "bootstrap",
        constraints: Any = None,
    ):
        errors.check_arguments("build", build, "theta")
        check_optimizer(optimizer)
        errors.check_choice("method", method, BACKWARD_METHODS)
        errors.check_choice("proposal", proposal, PROPOSALS)
        self.build, self.optimizer = Freely(build, constraints), captured(optimizer)
        self.num_particles = errors.check_count("num_particles", num_particles)
        self.num_backward = errors.check_count("num_backward", num_backward)
        self.method, self.proposal = method, proposal

    def init(self, key: errors.KeyLike, theta: PyTree, y: PyTree) -> tuple[RecursiveState, RecursiveInfo]:
        """The state after y_0, which moves the parameters too.

        Args:
            key: PRNG key or seed.
            theta: where to start, a pytree of floating point arrays.
            y: the first observation; NaN where missing.

        Returns:
            (state, info).
        """
        theta = errors.as_arrays("theta", theta)
        free = self.build.free(theta)
        ys = check_observations(self.build.build(theta), jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y))
        return _begin(current(self), errors.as_key(key), free, jax.tree.map(lambda leaf: leaf[0], ys))

    def step(self, state: RecursiveState, y: PyTree) -> tuple[RecursiveState, RecursiveInfo]:
        """The state after the next observation.

        Args:
            state: of `init` or `step`.
            y: the next observation, like the first; NaN where missing.

        Returns:
            (state, info).
        """
        return _move_on(current(self), state, as_row(y))


def _smoother(self: RecursiveLikelihood, free: PyTree) -> Paris:
    return Paris(
        self.build(free),
        score_functional(self.build, free),
        num_particles=self.num_particles,
        num_backward=self.num_backward,
        method=self.method,
        proposal=self.proposal,
    )


@jax.jit
def _begin(self: RecursiveLikelihood, key, free, y) -> tuple[RecursiveState, RecursiveInfo]:
    paris, info, filtered = begin_paris(_smoother(self, free), key, y)
    return _learn(self, paris, info, filtered, free, self.optimizer.init(free), y)


@jax.jit
def _move_on(self: RecursiveLikelihood, state: RecursiveState, y) -> tuple[RecursiveState, RecursiveInfo]:
    keys = paris_keys(state.paris.filter.key, state.paris.filter.t + 1)
    paris, info, filtered = move_paris_on(_smoother(self, state.free), state.paris, keys, y)
    return _learn(self, paris, info, filtered, state.free, state.memory, y)


def _learn(self: RecursiveLikelihood, paris: ParisState, info, filtered, free, memory, y):
    now = paris.filter

    def observed(free, x):
        return observation_log_prob(self.build(free), x, y, now.t)

    slopes = jax.vmap(jax.grad(observed), (None, 0))(free, now.particles)
    weights, predicted = jnp.exp(now.log_weights), jnp.exp(filtered.log_predicted)

    def difference(tau, slope, like):
        found = jnp.tensordot(weights - predicted, tau, 1) + jnp.tensordot(predicted, slope.astype(tau.dtype), 1)
        return found.astype(like.dtype)

    gradient = jax.tree.map(difference, paris.statistics.apart, slopes, free)
    updates, new_memory = self.optimizer.update(jax.tree.map(jnp.negative, gradient), memory, free)
    moved = optax.apply_updates(free, updates)
    (free, memory), _ = select_finite((gradient, moved), (moved, new_memory), (free, memory))
    told = RecursiveInfo(self.build.constrain(free), gradient, info.log_evidence_increment, info.ess)
    return RecursiveState(paris, free, memory), told
