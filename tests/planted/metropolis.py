"""Metropolis kernels that sample the wrong law."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import bayesinf as bi
from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, accept


class State(NamedTuple):
    position: Array
    evaluation: Evaluation


class RandomWalk(bi.Kernel):
    """Random-walk Metropolis on vectors, right as it stands; each bug below overrides one of its methods."""

    target: bi.Target
    step_size: Array = eqx.field(converter=jnp.asarray)

    def init(self, position):
        errors.check_floating("position", position)
        position = jnp.asarray(position)
        return State(position, self.target.evaluate(position))

    def keys(self, key):
        return jax.random.split(key)

    def propose(self, key, x):
        return x + self.step_size.astype(x.dtype) * jax.random.normal(key, x.shape, x.dtype)

    def log_ratio(self, proposed, current):
        return proposed.evaluation.logdensity - current.evaluation.logdensity

    def decide(self, key, proposed, current):
        return accept(key, self.log_ratio(proposed, current), proposed, current, num_gradients=0)

    def step(self, key, state) -> tuple[State, Info]:
        key_noise, key_accept = self.keys(key)
        position = self.propose(key_noise, state.position)
        return self.decide(key_accept, State(position, self.target.evaluate(position)), state)


class ShrunkLogRatio(RandomWalk):
    """Multiplies the log ratio by 0.95: samples a law that is too wide."""

    def log_ratio(self, proposed, current):
        return 0.95 * super().log_ratio(proposed, current)


class ExtraAcceptance(RandomWalk):
    """Accepts 2% of the proposals that should have been rejected."""

    def decide(self, key, proposed, current):
        key_decide, key_extra = jax.random.split(key)
        extra = jnp.where(jax.random.uniform(key_extra) < 0.02, jnp.inf, 0.0)
        return accept(key_decide, self.log_ratio(proposed, current) + extra, proposed, current, num_gradients=0)


class ReusedKey(RandomWalk):
    """Draws the noise and the acceptance from one key: large moves in the first coordinate are never taken."""

    def keys(self, key):
        return key, key


class DriftingProposal(RandomWalk):
    """Adds a drift of 0.05 to a proposal that the acceptance takes for symmetric."""

    def propose(self, key, x):
        return super().propose(key, x) + 0.05


class ForgottenGradient(bi.Kernel):
    """MALA whose reverse move uses the gradient of the current point."""

    target: bi.Target
    step_size: Array = eqx.field(converter=jnp.asarray)

    def init(self, position):
        return State(position, self.target.evaluate(position, order=1))

    def step(self, key, state):
        key_noise, key_accept = jax.random.split(key)
        x, h, grad = state.position, self.step_size, state.evaluation.grad
        noise = jax.random.normal(key_noise, x.shape, x.dtype)
        y = x + h * grad + jnp.sqrt(2 * h) * noise
        proposed = State(y, self.target.evaluate(y, order=1))
        back = x - y - h * grad  # should be the gradient at y
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        log_ratio += 0.5 * jnp.sum(noise**2) - jnp.sum(back**2) / (4 * h)
        return accept(key_accept, log_ratio, proposed, state, num_gradients=1)


def without_jacobian(target: bi.Target) -> bi.Target:
    """The target of log-coordinates with the Jacobian of exp left out: log pi(x) loses the term sum(x)."""
    return bi.Target(lambda x, wrapped: wrapped.logdensity(x) - jnp.sum(x), target)


class NeverTurned(bi.kernels.Metropolize):
    """Adjusted kinetic dynamics whose velocity goes on after a rejection as if nothing had happened."""

    def step(self, key, state):
        moved, info = super().step(key, state)
        memory = jax.tree.map(lambda new, old: jnp.where(info.is_accepted, new, old), moved.memory, state.memory)
        return moved._replace(memory=memory), info
