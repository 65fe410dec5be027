"""Kernels of other libraries as parts of a composition: anything with `init(position)` and `step(key, state)`.

Their states cache what belongs to a position in fields of their own, which would go stale when another kernel moves the
chain. They are therefore started anew at the position of every step: sound for every kernel that remembers nothing but
what follows from its position (BlackJAX's HMC, NUTS, MALA, random walks, slices), at the price of one more evaluation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Key, PyTree

from bayesinf.kernel import Info, Kernel
from bayesinf.kernels.vectors import strong
from bayesinf.target import Target

__all__ = ["Foreign", "ForeignOn", "ForeignState", "as_kernel"]


class ForeignState(NamedTuple):
    """The position alone."""

    position: PyTree


class Foreign(Kernel):
    """A kernel given by two functions, such as a BlackJAX `SamplingAlgorithm`.

    Attributes:
        init_fn: `init(position) -> state`, a function of the position only. Static.
        step_fn: `step(key, state) -> (state, info)`. Static.
    """

    init_fn: Callable[..., Any] = eqx.field(static=True)
    step_fn: Callable[..., Any] = eqx.field(static=True)

    def init(self, position: PyTree) -> ForeignState:
        return ForeignState(jax.tree.map(strong, position))

    def step(self, key: Key[jax.Array, ""], state: ForeignState) -> tuple[ForeignState, Info]:
        inner = self.init_fn(state.position)
        after, told = self.step_fn(key, inner)
        position = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after.position, state.position)

        dtype = jnp.result_type(float)
        num_gradients = getattr(told, "num_integration_steps", 1) + 1 if hasattr(inner, "logdensity_grad") else 0
        info = Info(
            acceptance_rate=jnp.asarray(getattr(told, "acceptance_rate", 1.0), dtype),
            is_accepted=jnp.asarray(getattr(told, "is_accepted", True)),
            is_divergent=jnp.asarray(getattr(told, "is_divergent", False)),
            num_gradients=jnp.asarray(num_gradients, jnp.int32),
        )
        return ForeignState(position), info


class ForeignOn(Kernel):
    """A foreign kernel that is built anew on the target of every step, for targets that change between them.

    Attributes:
        target: what it is built on.
        make: `make(target)` returns the two functions. Static.
    """

    target: Target
    make: Callable[[Target], Any] = eqx.field(static=True)

    def init(self, position: PyTree) -> ForeignState:
        return as_kernel(self.make(self.target)).init(position)

    def step(self, key: Key[jax.Array, ""], state: ForeignState) -> tuple[ForeignState, Info]:
        return as_kernel(self.make(self.target)).step(key, state)


def as_kernel(part: Any) -> Any:
    """`part` if it is a pytree with the two methods, else its two functions as a kernel.

    Raises:
        ValueError: there is no `init` or no `step`.
    """
    if isinstance(part, type):
        raise ValueError(f"a kernel must be an object, got the class {part.__name__}; call it on a target")
    if not (callable(getattr(part, "init", None)) and callable(getattr(part, "step", None))):
        raise ValueError(f"a kernel has init(position) and step(key, state); got {type(part).__name__}")
    if isinstance(part, eqx.Module) and not isinstance(part, Kernel):
        raise ValueError(f"an equinox module that is a kernel must inherit from bayesinf.Kernel; {type(part)} does not")
    return part if isinstance(part, Kernel) else Foreign(part.init, part.step)
