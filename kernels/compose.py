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
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, Kernel
from bayesinf.kernels.foreign import as_kernel
from bayesinf.target import Target, as_target

__all__ = ["Cycle", "Mixture", "PartsState", "Repeat", "SharedState"]


class SharedState(NamedTuple):
    """The state of a composition whose parts share a target.

    Attributes:
        position: where the chain is.
        evaluation: of the target, there.
        memory: what is each part's own.
    """

    position: PyTree
    evaluation: Evaluation
    memory: tuple[Any, ...]


class PartsState(NamedTuple):
    """The state of a composition that keeps no evaluation: the position, and what is each part's own."""

    position: PyTree
    memory: tuple[Any, ...]


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
        return _init(bind(self.kernels, self.target), position)

    def step(self, key: Key[Array, ""], state: SharedState | PartsState) -> tuple[SharedState | PartsState, Info]:
        parts = bind(self.kernels, self.target)
        after, infos = state, []
        for i, key_part in enumerate(jax.random.split(key, len(parts))):
            after, info = _step_part(parts, i, key_part, after)
            infos.append(info)
        after, num_completing = _complete(self.target, after, state)
        return after, merge_infos(infos, parts, num_completing)

    def with_step_size(self, step_size: Any) -> "Cycle":
        return Cycle(scale_steps(bind(self.kernels, self.target), step_size), self.target)

    @property
    def step_size(self) -> Array:
        return first_step_size(self.kernels)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return common_target_acceptance(self.kernels)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "is_sequential", False) for part in self.kernels)


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
        self.weights = jnp.ones(len(self.kernels)) if weights is None else jnp.asarray(weights, float)
        if self.weights.shape != (len(self.kernels),):
            raise ValueError(
                f"weights must be one number for each kernel, of shape ({len(self.kernels)},), "
                f"got shape {self.weights.shape}"
            )
        errors.check_positive("weights", self.weights)

    def init(self, position: PyTree) -> SharedState | PartsState:
        return _init(bind(self.kernels, self.target), position)

    def choose(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Draws which kernel makes the step."""
        return jax.random.categorical(key, jnp.log(self.weights))

    def step_part(
        self, index: Int[Array, ""], key: Key[Array, ""], state: SharedState | PartsState
    ) -> tuple[SharedState | PartsState, Info]:
        """One step of kernel number `index`."""
        parts = bind(self.kernels, self.target)

        def branch(i: int, key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
            moved, info = _step_part(parts, i, key, state)
            moved, num_completing = _complete(self.target, moved, state)
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

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return True


class Repeat(Kernel):
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
            return state, _plain(info)

        state, infos = jax.lax.scan(one, state, jax.random.split(key, self.num_steps))
        info = Info(
            jnp.mean(infos.acceptance_rate),
            jnp.any(infos.is_accepted),
            jnp.any(infos.is_divergent),
            jnp.sum(infos.num_gradients, dtype=jnp.int32),
            None if infos.log_work is None else jnp.sum(infos.log_work),
        )
        return state, info

    def with_target(self, target: Any) -> "Repeat":
        return Repeat(self.kernel.with_target(target), self.num_steps)

    def with_step_size(self, step_size: Any) -> "Repeat":
        return Repeat(self.kernel.with_step_size(step_size), self.num_steps)

    @property
    def target(self) -> Any:
        return self.kernel.target

    @property
    def step_size(self) -> Array:
        return self.kernel.step_size

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return getattr(self.kernel, "target_acceptance", None)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_sequential", False)


# parts and their target


def gather_parts(name: str, kernels: Sequence[Any], target: Target | None) -> tuple[tuple[Any, ...], Target | None]:
    """The parts without their targets, and the one target, which is kept by the composition alone."""
    if not isinstance(kernels, Sequence) or len(kernels) == 0:
        raise ValueError(f"{name} must be a sequence of at least one kernel, got {kernels!r}")
    parts = [as_kernel(part) for part in kernels]
    if target is None:
        targets = [part.target for part in parts if getattr(part, "target", None) is not None]
        target = targets[0] if targets else None
        if not all(_is_same(own, targets[0]) for own in targets):
            raise ValueError(
                f"{name} must sample one target, but theirs differ; "
                "build them on the same Target object, or pass target="
            )
    return tuple(_without_target(part) for part in parts), None if target is None else as_target(target)


def bind(parts: Sequence[Any], target: Target | None) -> list[Any]:
    """The parts, each with the target again."""
    return [part.with_target(target) if target is not None and hasattr(part, "target") else part for part in parts]


def _without_target(part: Any) -> Any:
    return part if getattr(part, "target", None) is None else eqx.tree_at(lambda p: p.target, part, None)


def _is_same(left: Target, right: Target) -> bool:
    """Whether two targets are one: the same function of the same data, as far as that is known now."""
    (left_leaves, left_def), (right_leaves, right_def) = jax.tree.flatten(left), jax.tree.flatten(right)
    return left_def == right_def and all(
        a is b or (errors.is_concrete((a, b)) and np.array_equal(a, b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


# states: position and evaluation are common, the rest is each part's memory


def detach(state: Any) -> Any:
    """A part's own memory: its state without the position, and with an evaluation emptied of its arrays.

    The empty evaluation still tells what the part needs: nothing, the log density, or the gradient.
    """
    if not hasattr(state, "evaluation"):
        return state._replace(position=None)
    return state._replace(position=None, evaluation=jax.tree.map(lambda _: (), state.evaluation))


def attach(part: Any, memory: Any, position: PyTree, known: Evaluation | None) -> tuple[Any, int]:
    """The part's state at `position`, and the gradients that it cost, given what is known of the target there."""
    if not hasattr(memory, "evaluation"):
        return memory._replace(position=position), 0
    evaluation, cost = _evaluation_like(memory.evaluation, part.target, position, known)
    return memory._replace(position=position, evaluation=evaluation), cost


def _evaluation_like(
    needed: Evaluation, target: Target, position: PyTree, known: Evaluation | None
) -> tuple[Evaluation, int]:
    """An evaluation at `position` with a gradient where `needed` has one, and the gradients that it cost."""
    if needed.grad is None:
        return Evaluation((target.evaluate(position) if known is None else known).logdensity), 0
    if known is None or known.grad is None:
        return target.evaluate(position, order=1), 1
    return known, 0


def _init(parts: Sequence[Any], position: PyTree) -> SharedState | PartsState:
    states = [part.init(position) for part in parts]
    position, memory = states[0].position, tuple(detach(state) for state in states)
    evaluations = [state.evaluation for state in states if hasattr(state, "evaluation")]
    if not evaluations:
        return PartsState(position, memory)
    return SharedState(position, max(evaluations, key=lambda evaluation: evaluation.grad is not None), memory)


def _step_part(parts: Sequence[Any], i: int, key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
    """The state of the composition after a step of part i; a PartsState where the part leaves no evaluation."""
    before, num_starting = attach(parts[i], state.memory[i], state.position, getattr(state, "evaluation", None))
    after, info = parts[i].step(key, before)
    memory = (*state.memory[:i], detach(after), *state.memory[i + 1 :])
    info = _plain(info)
    info = info._replace(num_gradients=info.num_gradients + num_starting)
    if hasattr(after, "evaluation"):
        return SharedState(after.position, after.evaluation, memory), info
    return PartsState(after.position, memory), info


def _complete(target: Target | None, state: Any, like: Any) -> tuple[Any, int]:
    """The state with an evaluation such as that of `like`, and the gradients that it cost."""
    if not hasattr(like, "evaluation"):
        return PartsState(state.position, state.memory), 0
    known = getattr(state, "evaluation", None)
    evaluation, cost = _evaluation_like(like.evaluation, target, state.position, known)  # type: ignore[arg-type]
    return SharedState(state.position, evaluation, state.memory), cost


# infos and step sizes


def _plain(info: Any) -> Info:
    return Info(
        info.acceptance_rate,
        info.is_accepted,
        info.is_divergent,
        jnp.asarray(info.num_gradients, jnp.int32),
        getattr(info, "log_work", None),
    )


def merge_infos(infos: Sequence[Any], parts: Sequence[Any], num_gradients: int = 0) -> Info:
    """The Info of a composition that took one step of each part, and spent `num_gradients` between them."""
    tuned = [i for i, part in zip(infos, parts, strict=True) if getattr(part, "target_acceptance", None) is not None]
    rates = [info.acceptance_rate for info in tuned or infos]
    works = [getattr(info, "log_work", None) for info in infos]
    dtype = jnp.result_type(float)
    return Info(
        jnp.mean(jnp.stack([jnp.asarray(rate, dtype) for rate in rates])),
        jnp.any(jnp.stack([info.is_accepted for info in infos])),
        jnp.any(jnp.stack([info.is_divergent for info in infos])),
        sum((info.num_gradients for info in infos), start=jnp.asarray(num_gradients, jnp.int32)),
        None if any(work is None for work in works) else jnp.sum(jnp.stack([jnp.asarray(w, dtype) for w in works])),
    )


def _tunable(parts: Sequence[Any]) -> list[Any]:
    return [part for part in parts if getattr(part, "target_acceptance", None) is not None]


def common_target_acceptance(parts: Sequence[Any]) -> float | None:
    """The target acceptance of all tunable parts, if they have one in common."""
    targets = {part.target_acceptance for part in _tunable(parts)}
    return targets.pop() if len(targets) == 1 else None


def first_step_size(parts: Sequence[Any]) -> Array:
    """The step size of the first tunable part."""
    for part in _tunable(parts):
        return part.step_size
    raise AttributeError("no part has a step size that is tuned by its acceptance rate")


def scale_steps(parts: Sequence[Any], step_size: Any) -> list[Any]:
    """The parts with step sizes in the same ratios, that of the first tunable one being `step_size`."""
    ratio = step_size / first_step_size(parts)
    tunable = _tunable(parts)
    return [
        part.with_step_size(part.step_size * ratio) if any(part is one for one in tunable) else part for part in parts
    ]
