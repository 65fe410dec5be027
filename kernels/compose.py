"""Kernels made of kernels: one after the other, one at random, one several times.

    Cycle([K_1, ..., K_n])              K_1 K_2 ... K_n
    Mixture([K_1, ..., K_n], weights)   sum_i w_i K_i
    Repeat(K, n)                        K^n

Each leaves invariant what its parts leave invariant, and is a kernel again, so they nest; for blocks see `Gibbs`. Parts
of other libraries may be used too.

The target is kept once, by the composition, and its evaluation travels with the position from part to part: a cycle of
two gradient kernels costs what the two cost alone. What is a part's own, such as a velocity, stays with the part. An
evaluation that the next part needs and the last one did not leave behind is made anew and counted.

The Info of a composition: `acceptance_rate` is the mean over the parts that have a target acceptance, or over all if
none has; `is_accepted` and `is_divergent` say whether any part moved or diverged; `num_gradients` and `log_work` are
sums (`log_work` None unless every part has one).

Warm-up tunes a composition whose tunable parts have one target acceptance: the step size of the composition is that of
the first of them, and all keep their ratios. Otherwise `target_acceptance` is None and nothing is tuned.

References:
    Tierney (1994), doi:10.1214/aos/1176325750 (cycles and mixtures).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Info, Kernel
from bayesinf.kernels.foreign import as_kernel
from bayesinf.kernels.parts import (
    PartsState,
    SharedState,
    bind,
    common_target_acceptance,
    complete,
    first_step_size,
    gather_parts,
    merge_infos,
    plain_info,
    refresh_parts,
    scale_steps,
    start,
    step_part,
)
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target

__all__ = ["Cycle", "Mixture", "Repeat"]


class Cycle(Kernel):
    """One step of every kernel, in order.

    Args:
        kernels: at least one; those with a target must have the same.
        target: rebinds every kernel that has a target; by default the target they share.

    Raises:
        ValueError: there is no kernel, or their targets differ.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.Cycle([bi.kernels.MALA(target, 0.1), bi.kernels.MALA(target, 1.0)])
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        2
    """

    kernels: tuple[Any, ...]
    target: Target | None

    def __init__(self, kernels: Sequence[Any], target: Target | None = None):
        self.kernels, self.target = gather_parts("kernels", kernels, target)

    def init(self, position: PyTree) -> SharedState | PartsState:
        return start(bind(self.kernels, self.target), position)

    def step(self, key: Key[Array, ""], state: SharedState | PartsState) -> tuple[SharedState | PartsState, Info]:
        parts = bind(self.kernels, self.target)
        after, infos = state, []
        for i, key_part in enumerate(jax.random.split(key, len(parts))):
            after, info = step_part(parts, i, key_part, after)
            infos.append(info)
        after, num_completing = complete(self.target, after, state)
        return after, merge_infos(infos, parts, num_completing)

    def with_step_size(self, step_size: Any) -> "Cycle":
        return Cycle(scale_steps(bind(self.kernels, self.target), step_size), self.target)

    @property
    def step_size(self) -> Array:
        return first_step_size(self.kernels)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return common_target_acceptance(self.kernels)

    def refresh(self, key: Key[Array, ""], state: SharedState | PartsState) -> SharedState | PartsState:
        return refresh_parts(bind(self.kernels, self.target), key, state)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return all(getattr(part, "is_exact", True) for part in self.kernels)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "is_sequential", False) for part in self.kernels)

    @property
    def is_tied_to_target(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "is_tied_to_target", False) for part in self.kernels)


class Mixture(Kernel):
    """One step of one kernel, drawn anew in every step.

    Only the kernel drawn is evaluated, unless the draw differs within a batch: `vmap` over keys turns a branch into the
    evaluation of all branches, so a mixture asks to be run chain by chain on a CPU (`is_sequential`). Where chains must
    be vectorised, share the draw between them, which leaves each chain right:

        index = mixture.choose(key_index)
        states, infos = jax.vmap(mixture.step_part, in_axes=(None, 0, 0))(index, keys, states)

    Its `log_work` is that of the kernel drawn. It is tunable if all its kernels have one target acceptance.

    Args:
        kernels: at least one; those with a target must have the same.
        weights: positive, one for each kernel, not necessarily of sum 1; equal by default.
        target: rebinds every kernel that has a target; by default the target they share.

    Raises:
        ValueError: there is no kernel, their targets differ, or the weights are not one positive number for each.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> small, large = bi.kernels.MALA(target, 0.1), bi.kernels.MALA(target, 1.0)
        >>> kernel = bi.kernels.Mixture([small, large], [0.9, 0.1])
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    kernels: tuple[Any, ...]
    weights: Float[Array, " n"]
    target: Target | None

    def __init__(self, kernels: Sequence[Any], weights: Any = None, target: Target | None = None):
        self.kernels, self.target = gather_parts("kernels", kernels, target)
        self.weights = (
            jnp.ones(len(self.kernels)) if weights is None else errors.as_array("weights", is_floating=True)(weights)
        )
        if self.weights.shape != (len(self.kernels),):
            raise ValueError(
                f"weights must be one number for each kernel, of shape ({len(self.kernels)},), "
                f"got shape {self.weights.shape}"
            )
        errors.check_positive("weights", self.weights)

    def init(self, position: PyTree) -> SharedState | PartsState:
        return start(bind(self.kernels, self.target), position)

    def choose(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Draws which kernel makes the step."""
        return jax.random.categorical(key, jnp.log(self.weights))

    def step_part(
        self, index: Int[Array, ""], key: Key[Array, ""], state: SharedState | PartsState
    ) -> tuple[SharedState | PartsState, Info]:
        """One step of kernel number `index`."""
        parts = bind(self.kernels, self.target)

        def branch(i: int, key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
            moved, info = step_part(parts, i, key, state)
            moved, num_completing = complete(self.target, moved, state)
            return moved, merge_infos([info], [parts[i]], num_completing)

        branches = [partial(branch, i) for i in range(len(parts))]
        has_work = all(jax.eval_shape(one, key, state)[1].log_work is not None for one in branches)

        def alike(one: Callable[..., Any], key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
            moved, info = one(key, state)
            return moved, info if has_work else info._replace(log_work=None)

        return jax.lax.switch(index, [partial(alike, one) for one in branches], key, state)

    def step(self, key: Key[Array, ""], state: SharedState | PartsState) -> tuple[SharedState | PartsState, Info]:
        key_choose, key_step = jax.random.split(key)
        return self.step_part(self.choose(key_choose), key_step, state)

    def with_step_size(self, step_size: Any) -> "Mixture":
        return Mixture(scale_steps(bind(self.kernels, self.target), step_size), self.weights, self.target)

    @property
    def step_size(self) -> Array:
        return first_step_size(self.kernels)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        # the step of a kernel that is not tunable would be taken for a perfect one
        is_tunable = all(getattr(part, "target_acceptance", None) is not None for part in self.kernels)
        return common_target_acceptance(self.kernels) if is_tunable else None

    def refresh(self, key: Key[Array, ""], state: SharedState | PartsState) -> SharedState | PartsState:
        return refresh_parts(bind(self.kernels, self.target), key, state)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return all(getattr(part, "is_exact", True) for part in self.kernels)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_tied_to_target(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "is_tied_to_target", False) for part in self.kernels)


class Repeat(Wrapping):
    """Several steps of one kernel as one step; its state, target and step size are the kernel's.

    Attributes:
        kernel: what is repeated.
        num_steps: how often, at least 1. Static.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.Repeat(bi.kernels.MALA(target, step_size=0.5), num_steps=10)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        10
    """

    kernel: Any = eqx.field(converter=as_kernel)
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        errors.check_count("num_steps", self.num_steps)

    def init(self, position: PyTree) -> Any:
        return self.kernel.init(position)

    def step(self, key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
        def one(state: Any, key: Key[Array, ""]) -> tuple[Any, Info]:
            state, info = self.kernel.step(key, state)
            return state, plain_info(info)

        state, infos = jax.lax.scan(one, state, jax.random.split(key, self.num_steps))
        info = Info(
            jnp.mean(infos.acceptance_rate),
            jnp.any(infos.is_accepted),
            jnp.any(infos.is_divergent),
            jnp.sum(infos.num_gradients, dtype=jnp.int32),
            None if infos.log_work is None else jnp.sum(infos.log_work),
        )
        return state, info

    @property
    def is_self_reverse(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_self_reverse", False)
