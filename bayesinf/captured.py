"""Functions that are told apart by what they have captured.

A compiled program keeps the values that its functions found in closures and globals while it was traced. JAX knows a
function by its identity alone: one that reads `y` from its module goes on using the old `y` after it has been assigned
anew, and the posterior is silently that of other data. `captured` makes the values a part of the function's identity.
"""

import dataclasses
import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

__all__ = ["captured"]


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A function, and the values that it would read now; equal only if both are."""

    function: Callable[..., Any]
    values: tuple[Any, ...] = dataclasses.field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An array that never changes: known by its identity, and kept, so that no other one can take that over."""

    array: jax.Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.array is self.array

    def __hash__(self) -> int:
        return id(self.array)


def captured(function: Any) -> Any:
    """The function, equal to itself only while the numbers and arrays that it reads from outside are the same.

    Closures and globals of the function are looked at, and those of functions of its own module that it calls.

    Raises:
        ValueError: it reads a numpy array that was changed in place.

    Example:
        >>> from bayesinf.captured import captured
        >>> shift = 1.0
        >>> def move(x): return x + shift
        >>> before = captured(move)
        >>> before == captured(move)
        True
        >>> shift = 2.0
        >>> before == captured(move)
        False
    """
    if isinstance(function, _Captured):
        return captured(function.function)
    if not isinstance(function, types.FunctionType | functools.partial):
        return function  # methods of pytrees and callable pytrees are arguments, with all that they hold
    values = tuple(_values(function, set(), getattr(_plain(function), "__globals__", None)))
    return _Captured(function, values) if values else function


def _values(value: Any, seen: set[int], module: dict[str, Any] | None) -> Iterator[Any]:
    """Hashable stand-ins for the numbers and arrays within a value, or read by a function."""
    if id(value) in seen:
        return
    if isinstance(value, bool | int | float | complex | str | np.generic):
        yield (type(value), value)
        return
    if isinstance(value, Tracer):
        return
    if isinstance(value, jax.Array):
        yield _Same(value)
        return
    if isinstance(value, np.ndarray):
        yield (value.dtype.str, value.shape, _digest(value))
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        inner: Any = (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        if module is None or value.__globals__ is not module:
            return
        inner = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        inner += [module[name] for name in sorted(_names(value.__code__)) if name in module]
    elif isinstance(value, dict | list | tuple):
        inner = list(value.values()) if isinstance(value, dict) else value
    elif isinstance(value, eqx.Module) and not isinstance(value, type):
        inner = jax.tree.leaves(value)
    else:
        return
    for item in inner:
        yield from _values(item, seen, module)


_KNOWN: dict[int, tuple[weakref.ref, bytes]] = {}


def _digest(array: np.ndarray) -> bytes:
    """Of the values; those of one array must stay, since JAX puts an array on the device once."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    reference, before = _KNOWN.get(id(array), (None, digest))
    if reference is not None and reference() is array and before != digest:
        raise ValueError(
            f"a numpy array of shape {array.shape} that a function reads from outside was changed in place, and JAX "
            "goes on with the old values; assign a new array, or pass it as data"
        )
    _KNOWN[id(array)] = (weakref.ref(array, functools.partial(_forget, id(array))), digest)
    return digest


def _forget(key: int, reference: weakref.ref) -> None:
    if _KNOWN.get(key, (None,))[0] is reference:
        del _KNOWN[key]


def _plain(function: Any) -> Any:
    return _plain(function.func) if isinstance(function, functools.partial) else function


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, or one defined in it, looks up in its module."""
    nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
