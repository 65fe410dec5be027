"""Compositions with one bug each: halves that forget the other one, and choices that look at where the chain is."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import bayesinf as bi
from bayesinf.kernel import Evaluation
from bayesinf.kernels.parts import attach
from planted.metropolis import RandomWalk, State


class CycleState(NamedTuple):
    position: Array
    evaluations: tuple[Evaluation, Evaluation]


class StaleCycle(bi.Kernel):
    """A cycle of two kernels, each of which judges its proposal by the evaluation of its own last visit."""

    first: RandomWalk
    second: RandomWalk

    def init(self, position):
        return CycleState(position, (self.first.target.evaluate(position), self.second.target.evaluate(position)))

    def step(self, key, state):
        key_first, key_second = jax.random.split(key)
        first, _ = self.first.step(key_first, State(state.position, state.evaluations[0]))
        second, info = self.second.step(key_second, State(first.position, state.evaluations[1]))
        return CycleState(second.position, (first.evaluation, second.evaluation)), info


class OldBlockGibbs(bi.Kernel):
    """Metropolis within Gibbs whose second block is updated given the old value of the first."""

    target: bi.Target
    step_size: Array = eqx.field(converter=jnp.asarray)

    def init(self, position):
        return RandomWalk(self.target, self.step_size).init(position)

    def step(self, key, state):
        key_first, key_second = jax.random.split(key)
        old = state.position

        def block(key, index):
            def conditional(x, old):
                return self.target.logdensity(old.at[index].set(x))

            kernel = RandomWalk(bi.Target(conditional, old), self.step_size)
            return kernel.step(key, kernel.init(old[index]))

        first, _ = block(key_first, 0)
        second, info = block(key_second, 1)
        position = jnp.stack([first.position, second.position])
        return State(position, self.target.evaluate(position)), info


class MixtureByPlace(bi.kernels.Mixture):
    """Chooses its kernel by where the chain is."""

    def step(self, key, state):
        return self.step_part((state.position[0] > 1.0).astype(jnp.int32), key, state)


class RepeatUntilAccepted(bi.kernels.Repeat):
    """Stops as soon as a proposal has been accepted."""

    def step(self, key, state):
        def one(t, carry):
            state, info = self.kernel.step(jax.random.fold_in(key, t), carry[0])
            return jax.tree.map(lambda new, old: jnp.where(carry[1].is_accepted, old, new), (state, info), carry)

        return jax.lax.fori_loop(1, self.num_steps, one, self.kernel.step(jax.random.fold_in(key, 0), state))


class JitterByPlace(bi.kernels.Jitter):
    """Takes longer steps the further out the chain is."""

    def step(self, key, state):
        factor = jnp.exp(0.5 * jnp.tanh(state.position[0]))
        return self.kernel.with_step_size(self.kernel.step_size * factor).step(key, state)


class UnscaledGradient(bi.kernels.Precondition):
    """Takes the gradient by x that it has kept for the one by z."""

    def _inner(self, state):
        origin = jax.tree.map(jnp.zeros_like, state.position)
        return attach(self._at(state.position), state.memory[0], origin, state.evaluation)
