"""Functions that are told apart by what they read.

A compiled program keeps what its functions found in closures, globals and objects while it was traced. JAX knows a
function by its identity alone: one that reads `y` from its module, or calls a helper that was since written anew, goes
on with the old one, and the posterior is silently another. `captured` makes what is read a part of the identity.

Everything that the user's own functions can reach is looked at: values in closures, defaults and globals, functions and
classes that they call, attributes of objects and of the user's modules. Of an installed library only closures are; the
rest is known by its identity. What a function changes itself while it is traced, such as a count of its calls, makes no
other function of it. What a helper under `jax.jit` reads is compared, but JAX answers from the helper's own cache.
"""

import dataclasses
import functools
import hashlib
import sys
import types
import warnings
import weakref
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

__all__ = ["as_pytree", "captured", "current", "original"]

# Equinox warns of arrays in the closure of a transformed function, such as `jax.grad(target.logdensity)`; here they
# are meant to be constants, and are compared
warnings.filterwarnings("ignore", r"\s*Possibly assigning a JAX-transformed callable as an attribute on\s+bayesinf\.")


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A callable or a plain object, and what it would read now; equal only if both are."""

    function: Any
    values: Hashable = dataclasses.field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = _glance(self.function)
        result = self.function(*args, **kwargs)
        if _glance(self.function) != before:
            _CHANGED_BY_ITSELF[_Captured(self.function, _look(self.function))] = self
        return result

    def __getattr__(self, name: str) -> Any:
        if name == "function" or name.startswith("__"):  # asked for by copies, before the fields are there
            raise AttributeError(name)
        return getattr(self.function, name)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An object known by its identity, and kept, so that no other one can take that over."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def captured(function: Any) -> Any:
    """The function, equal to itself only while all that it reads from outside is the same.

    Callable pytrees and their methods are left alone, being arguments with all that they hold, and so is what is not of
    the user's making.

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
    is_kernel = hasattr(function, "init") and hasattr(function, "step")  # a plain object
    if isinstance(function, type | eqx.Module | jax.tree_util.Partial) or not (callable(function) or is_kernel):
        return function
    # `functools.wraps` gives a transformed method the attributes of the method, `__self__` too
    is_plain = isinstance(function, types.FunctionType)
    if not is_plain and isinstance(getattr(function, "__self__", None), eqx.Module | types.ModuleType):
        return function
    values = _look(function)
    if values == _Same(function):
        return function
    now = _Captured(function, values)
    return _CHANGED_BY_ITSELF.get(now, now)


def as_pytree(function: Any) -> Any:
    """A function that may travel through jit as an argument: a pytree, whose code is static."""
    is_pytree = isinstance(function, eqx.Module | jax.tree_util.Partial)
    return function if is_pytree or not callable(function) else jax.tree_util.Partial(captured(function))


def original(function: Any) -> Any:
    """The function that `as_pytree` was given, for calls on the host."""
    while isinstance(function, jax.tree_util.Partial) and not (function.args or function.keywords):
        function = function.func
    return function.function if isinstance(function, _Captured) else function


def current(tree: Any) -> Any:
    """The tree with every captured function in it, static or not, captured anew: it may have been made long before.

    What reads the same as before is the same object, so that nothing compiles.
    """
    if isinstance(tree, _Captured):
        now = captured(tree.function)
        return tree if now == tree else now
    if isinstance(tree, jax.tree_util.Partial):
        parts = (tree.func, tree.args, tree.keywords)
        now = current(parts)
        return tree if now is parts else jax.tree_util.Partial(now[0], *now[1], **now[2])
    if isinstance(tree, dict | list | tuple):
        values = list(tree.values()) if isinstance(tree, dict) else list(tree)
        fresh = [current(value) for value in values]
        if all(new is old for new, old in zip(fresh, values, strict=True)):
            return tree
        if isinstance(tree, dict):
            return type(tree)(zip(tree, fresh, strict=True))
        return type(tree)(*fresh) if hasattr(tree, "_fields") else type(tree)(fresh)
    if isinstance(tree, type) or not dataclasses.is_dataclass(tree):
        return tree
    fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if hasattr(tree, f.name)}
    changed = {name: new for name, value in fields.items() if (new := current(value)) is not value}
    if not changed:
        return tree
    copy = object.__new__(type(tree))
    for name, value in (fields | changed).items():
        object.__setattr__(copy, name, value)
    return copy


class _Reader:
    """Turns values into hashable ones that are equal only if the values are.

    Args:
        own: globals of the function that is read; it is looked into wherever it was installed.
        has_arrays: numpy arrays by their values, not their identity.
    """

    def __init__(self, own: dict[str, Any] | None, has_arrays: bool = True):
        self.own, self.has_arrays = own, has_arrays
        self.seen: dict[int, Any] = {}  # by identity; kept, so that no identity is taken over

    def read(self, value: Any) -> Hashable:
        if value is None or isinstance(value, bool | int | str | bytes):
            return (type(value), value)
        if isinstance(value, float | complex):
            return (type(value), repr(value))  # NaN is itself, and 0.0 is not -0.0
        if isinstance(value, Tracer):
            return Tracer
        if isinstance(value, jax.Array | types.ModuleType | types.BuiltinFunctionType):
            return _Same(value)
        if isinstance(value, np.ndarray | np.generic):
            return (value.dtype.str, value.shape, _digest(value)) if self.has_arrays else _Same(value)
        if id(value) in self.seen:
            return "as before"
        self.seen[id(value)] = value
        inside = self.inside(value)
        return _Same(value) if inside is None else inside

    def read_all(self, values: Iterable[Any]) -> Hashable:
        return tuple([self.read(value) for value in values])

    def inside(self, value: Any) -> Hashable:
        """What makes a compound value what it is; None for what is known by its identity."""
        if isinstance(value, types.FunctionType):
            read = self.read_all(self.reads_of(value))
            return (_Same(value), read) if read else None
        if isinstance(value, types.MethodType):
            return self.read_all((value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            return self.read_all((value.func, value.args, value.keywords))
        if isinstance(value, dict):
            return (type(value), self.read_all(value), self.read_all(value.values()))
        if isinstance(value, list | tuple):
            return (type(value), self.read_all(value))
        if isinstance(value, set | frozenset):
            return (type(value), frozenset(map(self.read, value)))
        if isinstance(value, type):
            return (_Same(value), self.methods_of(value)) if self.is_own(value) else None
        leaves, treedef = jax.tree.flatten(value)
        if treedef != _LEAF:
            # functions in static fields are equal as they were captured; what they read now is looked at here
            return (treedef, self.read_all(leaves), self.read_all(_functions_in(value)), self.methods_of(type(value)))
        if hasattr(value, "__array__"):
            return self.read(np.asarray(value))
        if hasattr(value, "__wrapped__") and self.is_own(value):
            return (_Same(value), self.read(value.__wrapped__))
        if self.is_own(type(value)):
            return (_Same(value), self.methods_of(type(value)), self.read(getattr(value, "__dict__", None)))
        return (_Same(value), self.read(vars(value))) if isinstance(value, types.SimpleNamespace) else None

    def reads_of(self, function: types.FunctionType) -> list[Any]:
        """Closure of a function; of the user's own also defaults, globals, and attributes of modules among them."""
        values = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
        if not self.is_own(function):
            return values if "<locals>" in function.__code__.co_qualname else []  # not the name that it took over
        values += [value for value in (function.__defaults__, function.__kwdefaults__) if value]
        names = sorted(_names(function.__code__))
        values += [function.__globals__[name] for name in names if name in function.__globals__]
        modules = [value for value in values if isinstance(value, types.ModuleType) and not _is_library(value.__name__)]
        return values + [vars(module)[name] for module in modules for name in names if name in vars(module)]

    def methods_of(self, cls: type) -> Hashable:
        """The functions of a class and of those bases that are the user's."""
        bodies = [vars(base) for base in cls.__mro__ if self.is_own(base)]
        members = [
            getattr(member, "__func__", getattr(member, "fget", member)) for b in bodies for member in b.values()
        ]
        return self.read_all(member for member in members if isinstance(member, types.FunctionType))

    def is_own(self, thing: Any) -> bool:
        """Whether a function or class is the user's, not of an installed library."""
        return getattr(thing, "__globals__", self) is self.own or not _is_library(
            getattr(thing, "__module__", None) or ""
        )


def _functions_in(tree: Any) -> list[Any]:
    """The functions that a pytree of modules has captured."""
    if isinstance(tree, _Captured):
        return [tree.function]
    if isinstance(tree, dict | list | tuple):
        values = list(tree.values()) if isinstance(tree, dict) else list(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = [getattr(tree, field.name) for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
    else:
        return []
    return [function for value in values for function in _functions_in(value)]


def _look(function: Any) -> Hashable:
    return _Reader(_globals_of(function)).read(function)


def _glance(function: Any) -> Hashable:
    return _Reader(_globals_of(function), has_arrays=False).read(function)


_LEAF = jax.tree.structure(0)
_CHANGED_BY_ITSELF: weakref.WeakValueDictionary[_Captured, _Captured] = weakref.WeakValueDictionary()
_KNOWN: dict[int, tuple[weakref.ref, bytes]] = {}


def _digest(array: np.ndarray | np.generic) -> bytes:
    """Of the values; those of one array must stay, since JAX puts an array on the device once."""
    content = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    digest = hashlib.sha256(content).digest()
    if not isinstance(array, np.ndarray):
        return digest
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


def _globals_of(function: Any) -> dict[str, Any] | None:
    for name in ("func", "__func__", "__wrapped__"):
        if hasattr(function, name):
            return _globals_of(getattr(function, name))
    return getattr(function, "__globals__", None)


@functools.cache
def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root == "bayesinf":
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, or one defined in it, looks up in its module, or as attributes."""
    nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
