"""Kernels around one other: what drivers and compositions ask of them is what they ask of the kernel inside."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
from jaxtyping import Array, Key

from bayesinf.kernel import Kernel, refreshed

__all__ = ["Wrapping"]

W = TypeVar("W", bound="Wrapping")


class Wrapping(Kernel):
    """Abstract kernel around one other; a final one has `init` and `step`, and overrides what differs.

    Target, step size, metric, velocity and the rate that warm-up tunes to are those of the kernel inside, which is
    rebound, never changed.

    Attributes:
        kernel: the kernel inside.
    """

    kernel: eqx.AbstractVar[Any]

    def with_target(self: W, target: Any) -> W:
        return dataclasses.replace(self, kernel=self.kernel.with_target(target))  # type: ignore[call-arg]

    def with_step_size(self: W, step_size: Any) -> W:
        return dataclasses.replace(self, kernel=self.kernel.with_step_size(step_size))  # type: ignore[call-arg]

    def with_metric(self: W, covariance: Any) -> W:
        return dataclasses.replace(self, kernel=self.kernel.with_metric(covariance))  # type: ignore[call-arg]

    def refresh(self, key: Key[Array, ""], state: Any) -> Any:
        """The state with a fresh velocity, where the kernel has one."""
        return refreshed(self.kernel, key, state)

    @property
    def target(self) -> Any:
        return self.kernel.target

    @property
    def step_size(self) -> Array:
        return self.kernel.step_size

    @property
    def inverse_mass(self) -> Array:
        return self.kernel.inverse_mass

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return getattr(self.kernel, "target_acceptance", None)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_exact", True)

    @property
    def metric(self) -> Any:
        return getattr(self.kernel, "metric", None)

    @property
    def has_metric(self) -> bool:
        return getattr(self.kernel, "has_metric", False)

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_sequential", False)

    @property
    def is_tied_to_target(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_tied_to_target", False)
