"""Blocks and cycles that forget what the other half did."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import bayesinf as bi
from bayesinf.kernel import Evaluation
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
