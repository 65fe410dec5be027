"""Kernels of other libraries as parts of a composition: anything with `init(position)` and `step(key, state)`.

Their states cache what belongs to a position in fields of their own, which would go stale when another kernel moves the
chain. They are therefore started anew at the position of every step: sound for every kernel that remembers nothing but
what follows from its position (BlackJAX's HMC, NUTS, MALA, random walks, slices), at the price of one more evaluation.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Key, PyTree

from bayesinf.kernel import Info, Kernel
from bayesinf.kernels.vectors import strong
from bayesinf.target import Target

__all__ = ["Foreign", "ForeignOn", "ForeignState", "as_kernel", "rebindable"]


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
    """A kernel that is built anew on the target of every step, for targets that change between them.

    Attributes:
        target: what it is built on.
        make: `make(target)` returns the two functions, or a kernel that remembers nothing. Static.
    """

    is_memoryless: ClassVar[bool] = True

    target: Target
    make: Callable[[Target], Any] = eqx.field(static=True)

    def init(self, position: PyTree) -> Any:
        return as_kernel(self.make(self.target)).init(position)

    def step(self, key: Key[jax.Array, ""], state: Any) -> tuple[Any, Any]:
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


def rebindable(name: str, part: Any, target: Target) -> Kernel:
    """A kernel on `target`, which can be rebound to another one in every step.

    Args:
        name: of the argument, for errors.
        part: a kernel with a target; or a function of a target that returns a kernel, BlackJAX's too.
        target: one such as it will be bound to; it needs no data yet.
    """
    if not isinstance(part, Kernel) and callable(part):
        make = part
        if _is_without_target(make):
            raise ValueError(f"{name} must be a kernel with a target, got the class {make.__name__}, which has none")
        try:
            part = make(target)
        except TypeError as error:
            if not isinstance(make, type):
                raise
            raise ValueError(
                f"{name}={make.__name__} needs more than a target ({error}); give its parameters too, such as "
                f"functools.partial({make.__name__}, step_size=0.05)"
            ) from error
        is_foreign = not isinstance(part, Kernel) and all(
            callable(getattr(part, method, None)) for method in ("init", "step")
        )
        if is_foreign or (getattr(part, "is_memoryless", False) and not hasattr(part, "target")):
            part = ForeignOn(target, make)
    if not isinstance(part, Kernel) or not hasattr(part, "target"):
        raise ValueError(
            f"{name} must be a kernel with a target, or a function of a target that returns one, such as "
            f"functools.partial(MALA, step_size=0.05); got {part!r}"
        )
    return part.with_target(target)


def _is_without_target(make: Any) -> bool:
    """Whether it is the class of a kernel that samples no target, as those on paths do."""
    if not isinstance(make, type) or not issubclass(make, Kernel):
        return False
    return "target" not in {field.name for field in fields(make)} and not hasattr(make, "target")
