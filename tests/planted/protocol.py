"""Kernels that sample the right law, or would, but break one clause of the contract."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import bayesinf as bi
from bayesinf.kernel import Info
from planted.metropolis import RandomWalk, State


class Nameless(NamedTuple):
    x: Array
    evaluation: object


class Bare(NamedTuple):
    acceptance_rate: Array
    is_accepted: Array
    num_gradients: Array


class NamelessState(RandomWalk):
    """Keeps the position under another name."""

    def init(self, position):
        return Nameless(*super().init(position))


class BareInfo(RandomWalk):
    """Says nothing of divergences, and the ratio where it should say the probability."""

    def step(self, key, state):
        state, info = super().step(key, state)
        return state, Bare(1.5 + info.acceptance_rate, info.is_accepted, info.num_gradients)


class JitteredInit(RandomWalk):
    """Starts near the position, not at it."""

    def init(self, position):
        return super().init(position + 1e-3)


class PromotedState(RandomWalk):
    """Draws its noise in the default dtype: in 64-bit mode a float32 chain becomes float64 after one step."""

    def step(self, key, state):
        key_noise, key_accept = jax.random.split(key)
        position = state.position + self.step_size * jax.random.normal(key_noise, state.position.shape)
        proposed = State(position, self.target.evaluate(position))
        log_ratio = self.log_ratio(proposed, state)
        is_accepted = jnp.log(jax.random.uniform(key_accept)) < log_ratio
        rate = jnp.exp(jnp.minimum(log_ratio, 0.0))
        is_accepted &= jnp.isfinite(log_ratio)
        info = Info(rate, is_accepted, ~jnp.isfinite(log_ratio), jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), proposed, state), info


class StaticStepSize(bi.Kernel):
    """Holds its step size where jit cannot see it: every new value compiles anew."""

    target: bi.Target
    step_size: float = eqx.field(static=True)

    def init(self, position):
        return RandomWalk(self.target, self.step_size).init(position)

    def step(self, key, state):
        return RandomWalk(self.target, self.step_size).step(key, state)


class PythonStepSize(StaticStepSize):
    """Holds its step size as a Python float, which equinox takes for static."""

    step_size: float


class IgnoredStepSize(RandomWalk):
    """Takes a step size and moves by another."""

    def propose(self, key, x):
        return x + jax.random.normal(key, x.shape, x.dtype)


class TracedOnce(RandomWalk):
    """Counts its steps in Python, and so only those that are traced or run eagerly."""

    calls: list = eqx.field(static=True, default_factory=lambda: Calls())

    def keys(self, key):
        self.calls.append(None)
        return jax.random.split(jax.random.fold_in(key, len(self.calls)))


class Calls(list):
    """A list that is its own hash, as a static field must be."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other):
        return self is other


class HostCounter(TracedOnce):
    """Keeps a step count on the host, which no saved state contains."""

    def keys(self, key):
        def count(_):
            self.calls.append(None)
            return np.uint32(len(self.calls))

        shape = jax.ShapeDtypeStruct((), jnp.uint32)
        number = jax.experimental.io_callback(count, shape, jax.random.key_data(key)[0], ordered=False)
        return jax.random.split(jax.random.fold_in(key, number))


class LaneMixing(RandomWalk):
    """Centres the noise by a hand-written batching rule that takes the mean over the chains."""

    def propose(self, key, x):
        @jax.custom_batching.custom_vmap
        def centred(noise):
            return noise - jnp.mean(noise)

        @centred.def_vmap
        def _(axis_size, in_batched, noise):
            return noise - jnp.mean(noise, axis=0), True

        return x + self.step_size.astype(x.dtype) * centred(jax.random.normal(key, x.shape, x.dtype))


class FixedKey(RandomWalk):
    """Draws from a key of its own."""

    def keys(self, key):
        return jax.random.split(jax.random.key(1))


class AcceptsNaN(RandomWalk):
    """Rejects by a comparison that NaN passes."""

    def decide(self, key, proposed, current):
        log_ratio = self.log_ratio(proposed, current)
        is_rejected = jnp.log(jax.random.uniform(key, dtype=log_ratio.dtype)) > log_ratio
        rate = jnp.where(jnp.isnan(log_ratio), 1.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
        info = Info(rate, ~is_rejected, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
        return jax.tree.map(
            lambda new, old: jnp.where(is_rejected, old, new).astype(old.dtype), proposed, current
        ), info


class TakesIntegers(RandomWalk):
    """Lets an integer position in, where it stays an integer for ever."""

    def init(self, position):
        position = jnp.asarray(position)
        return State(position, self.target.evaluate(position))


class Remembering(NamedTuple):
    position: Array
    evaluation: object
    last: Array | None


class LateField(RandomWalk):
    """Has no last position at the start, and one from the first step on."""

    def init(self, position):
        return Remembering(*super().init(position), None)

    def step(self, key, state):
        moved, info = super().step(key, State(state.position, state.evaluation))
        return Remembering(*moved, state.position), info
