"""Gibbs sampling: kernels on blocks of the position, each given the rest.

    for every block b:   x_b ~ K_b( . | x_b, x_rest),      K_b leaves pi(x_b | x_rest) invariant

The conditional density is the joint one with the rest held fixed, so it needs no derivation; gradients are taken with
respect to the block alone. As the rest has changed since a block's last step, its evaluation is made anew once in every
sweep (one gradient for a gradient kernel): give blocks several steps with `Repeat`.

References:
    Geman and Geman (1984), doi:10.1109/TPAMI.1984.4767596.
    Tierney (1994), doi:10.1214/aos/1176325750 (Metropolis within Gibbs).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Key, PyTree

from bayesinf.captured import captured
from bayesinf.kernel import Info, Kernel, refreshed
from bayesinf.kernels.foreign import as_kernel
from bayesinf.kernels.parts import (
    PartsState,
    attach,
    bind,
    check_untied,
    common_target_acceptance,
    detach,
    first_step_size,
    gather_parts,
    merge_infos,
    scale_steps,
)
from bayesinf.kernels.paths import Path, as_path, get, put
from bayesinf.kernels.vectors import strong
from bayesinf.target import Target, as_target

__all__ = ["Build", "Gibbs", "conditional"]


class Build(eqx.Module):
    """A block's kernel built anew from the conditional target of every sweep, by a function of that target. Static."""

    function: Callable[[Target], Any] = eqx.field(static=True, converter=captured)


class Gibbs(Kernel):
    """A sweep over blocks, in the order given.

    Args:
        blocks: from path to kernel. A path is a key of the position, or a tuple of keys and indices that leads into it.
            A kernel is one on the joint target, which is rebound to the conditional one of its block; or a function
            that is given the conditional `Target` and returns any kernel, BlackJAX's too. What no path leads to is
            held fixed.
        target: the joint target; by default the one that the kernels share.

    Raises:
        ValueError: there is no block, a kernel has no target, targets differ, or (from `init`) a path leads nowhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def logdensity(x):
        ...     return -0.5 * (x["mean"] ** 2 + jnp.sum((x["z"] - x["mean"]) ** 2))
        >>> target = bi.Target(logdensity)
        >>> mala = bi.kernels.MALA(target, step_size=0.5)
        >>> kernel = bi.kernels.Gibbs({"mean": mala, "z": bi.kernels.Repeat(mala, 5)})
        >>> state, info = kernel.step(jax.random.key(0), kernel.init({"mean": jnp.zeros(()), "z": jnp.zeros(3)}))
        >>> int(info.num_gradients)
        8
    """

    blocks: OrderedDict[Path, Any]
    target: Target | None

    def __init__(self, blocks: Mapping[Any, Any], target: Target | None = None):
        if not isinstance(blocks, Mapping) or not blocks:
            raise ValueError(f"blocks must be a dict from path to kernel with at least one entry, got {blocks!r}")
        paths = [as_path(path) for path in blocks]
        if len(set(paths)) < len(paths):
            raise ValueError(f"blocks must have different paths, got {paths}; for two kernels on a block use Cycle")
        if () in paths:
            raise ValueError("blocks must have paths of at least one key; for the whole position use the kernel itself")
        for path, part in zip(paths, blocks.values(), strict=True):
            check_untied(f"the block {path}", part)
        parts = [_as_block(path, part) for path, part in zip(paths, blocks.values(), strict=True)]
        parts, self.target = _gather(parts, target)
        self.blocks = OrderedDict(zip(paths, parts, strict=True))
        if self.target is None:
            raise ValueError("target is needed where every block is given by a function: pass target=")

    def init(self, position: PyTree) -> PartsState:
        position = jax.tree.map(strong, position)
        memory = []
        for path in self.blocks:
            kernel = self._kernel(path, position)
            memory.append(detach(kernel.init(get(position, path))))
        return PartsState(position, tuple(memory))

    def step(self, key: Key[Array, ""], state: PartsState) -> tuple[PartsState, Info]:
        position, memory, kernels, infos, num_starting = state.position, [], [], [], 0
        keys = jax.random.split(key, len(self.blocks))
        for path, own, key_block in zip(self.blocks, state.memory, keys, strict=True):
            kernel = self._kernel(path, position)
            before, cost = attach(kernel, own, get(position, path), None)
            after, info = kernel.step(key_block, before)
            position = put(position, path, after.position)
            memory.append(detach(after))
            kernels.append(kernel)
            infos.append(info)
            num_starting += cost
        return PartsState(position, tuple(memory)), merge_infos(infos, kernels, num_starting)

    def refresh(self, key: Key[Array, ""], state: PartsState) -> PartsState:
        memory = []
        keys = jax.random.split(key, len(self.blocks))
        for path, own, key_block in zip(self.blocks, state.memory, keys, strict=True):
            kernel = self._kernel(path, state.position)
            before, _ = attach(kernel, own, get(state.position, path), None)
            memory.append(detach(refreshed(kernel, key_block, before)))
        return state._replace(memory=tuple(memory))

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return all(getattr(part, "is_exact", True) for part in self.blocks.values())

    def with_step_size(self, step_size: Any) -> "Gibbs":
        parts = scale_steps(bind(list(self.blocks.values()), self.target), step_size)
        return Gibbs(dict(zip(self.blocks, parts, strict=True)), self.target)

    @property
    def step_size(self) -> Array:
        return first_step_size(list(self.blocks.values()))

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return common_target_acceptance(list(self.blocks.values()))

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "is_sequential", False) for part in self.blocks.values())

    def _kernel(self, path: Path, position: PyTree) -> Any:
        """The kernel of a block, on its conditional target."""
        target = conditional(self.target, path, position)  # type: ignore[arg-type]
        part = self.blocks[path]
        if not isinstance(part, Build):
            return part.with_target(target)
        kernel = as_kernel(part.function(target))
        check_untied(f"the block {path}", kernel)
        return kernel


def conditional(target: Target, path: Path, position: PyTree) -> Target:
    """The target of the block at `path` given the rest of `position`; its data are (joint target, rest)."""
    get(position, path)
    return Target(_Conditional(path), (target, put(position, path, None)))


@dataclass(frozen=True)
class _Conditional:
    """The joint log density as a function of one block; equal for equal paths, so it compiles once."""

    path: Path

    def __call__(self, block: PyTree, data: tuple[Target, PyTree]) -> Array:
        target, rest = data
        return target.logdensity(put(rest, self.path, block))


def _as_block(path: Path, part: Any) -> Any:
    if isinstance(part, Build):
        return part
    if hasattr(part, "step"):
        if not hasattr(part, "target"):
            raise ValueError(
                f"the kernel of block {path} has no target to condition on the rest; "
                "give a function that builds it from the conditional target"
            )
        return part
    if not callable(part):
        raise ValueError(f"block {path} must be a kernel or a function of the conditional target, got {part!r}")
    return Build(part)


def _gather(parts: list[Any], target: Target | None) -> tuple[list[Any], Target | None]:
    """The parts without their targets, and the joint target."""
    kernels = [part for part in parts if not isinstance(part, Build)]
    if not kernels:
        return parts, None if target is None else as_target(target)
    stripped, target = gather_parts("blocks", kernels, target)
    remaining = iter(stripped)
    return [part if isinstance(part, Build) else next(remaining) for part in parts], target
