"""What compositions share: parts without their target, one evaluation for all, and what is each part's own.

The target is kept by the composition alone, and bound to a part when it steps; so data are not copied for every part,
and parts that came apart under a transformation cannot disagree. A part's state is taken apart into position,
evaluation and memory, and put together again where the next step finds the chain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, refreshed
from bayesinf.kernels.foreign import as_kernel
from bayesinf.target import Target, as_target

__all__ = [
    "PartsState",
    "SharedState",
    "attach",
    "bind",
    "check_target",
    "check_untied",
    "common_target_acceptance",
    "complete",
    "detach",
    "first_step_size",
    "gather_parts",
    "merge_infos",
    "plain_info",
    "refresh_parts",
    "scale_steps",
    "start",
    "step_part",
]


class SharedState(NamedTuple):
    """The state of a composition whose parts share a target.

    Attributes:
        position: where the chain is.
        evaluation: of the target, there.
        memory: what is each part's own, a tuple of as many; or of one part whatever it keeps.
    """

    position: PyTree
    evaluation: Evaluation
    memory: Any


class PartsState(NamedTuple):
    """The state of a composition that keeps no evaluation: the position, and what is each part's own."""

    position: PyTree
    memory: Any


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


def check_target(kernel: Any) -> None:
    """A kernel with a target that can be exchanged."""
    if getattr(kernel, "target", None) is None or not hasattr(kernel, "with_target"):
        raise ValueError(f"kernel must be a kernel with a target that can be exchanged, got {type(kernel).__name__}")


def check_untied(name: str, kernel: Any) -> None:
    """A kernel whose target may be another one in every step."""
    if getattr(kernel, "is_tied_to_target", False):
        raise ValueError(
            f"{name} must be a kernel whose target may change between its steps, got {type(kernel).__name__}, whose "
            "state holds draws of the target besides its position; put it outside, around the others"
        )


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
    if getattr(part, "is_memoryless", False):
        return part.init(position), 0
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


def start(parts: Sequence[Any], position: PyTree) -> SharedState | PartsState:
    """The state of a composition at `position`, with an evaluation if some part needs one."""
    states = [part.init(position) for part in parts]
    position, memory = states[0].position, tuple(detach(state) for state in states)
    evaluations = [state.evaluation for state in states if hasattr(state, "evaluation")]
    if not evaluations:
        return PartsState(position, memory)
    return SharedState(position, max(evaluations, key=lambda evaluation: evaluation.grad is not None), memory)


def step_part(parts: Sequence[Any], i: int, key: Key[Array, ""], state: Any) -> tuple[Any, Info]:
    """The state of the composition after a step of part i; a PartsState where the part leaves no evaluation."""
    before, num_starting = attach(parts[i], state.memory[i], state.position, getattr(state, "evaluation", None))
    after, info = parts[i].step(key, before)
    memory = (*state.memory[:i], detach(after), *state.memory[i + 1 :])
    info = plain_info(info)
    info = info._replace(num_gradients=info.num_gradients + num_starting)
    if hasattr(after, "evaluation"):
        return SharedState(after.position, after.evaluation, memory), info
    return PartsState(after.position, memory), info


def refresh_parts(parts: Sequence[Any], key: Key[Array, ""], state: Any) -> Any:
    """The state of the composition with the memory of every part drawn anew."""
    memory = []
    for part, own, key_part in zip(parts, state.memory, jax.random.split(key, len(parts)), strict=True):
        before, _ = attach(part, own, state.position, getattr(state, "evaluation", None))
        memory.append(detach(refreshed(part, key_part, before)))
    return state._replace(memory=tuple(memory))


def complete(target: Target | None, state: Any, like: Any) -> tuple[Any, int]:
    """The state with an evaluation such as that of `like`, and the gradients that it cost."""
    if not hasattr(like, "evaluation"):
        return PartsState(state.position, state.memory), 0
    known = getattr(state, "evaluation", None)
    evaluation, cost = _evaluation_like(like.evaluation, target, state.position, known)  # type: ignore[arg-type]
    return SharedState(state.position, evaluation, state.memory), cost


# infos and step sizes


def plain_info(info: Any) -> Info:
    """The fields that every Info has; what else a part tells is dropped."""
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
        # of several replicas, that of the first
        return part.step_size if jnp.ndim(part.step_size) == 0 else part.step_size[0]
    raise AttributeError("no part has a step size that is tuned by its acceptance rate")


def scale_steps(parts: Sequence[Any], step_size: Any) -> list[Any]:
    """The parts with step sizes in the same ratios, that of the first tunable one being `step_size`."""
    ratio = step_size / first_step_size(parts)
    tunable = _tunable(parts)
    return [
        part.with_step_size(part.step_size * ratio) if any(part is one for one in tunable) else part for part in parts
    ]
