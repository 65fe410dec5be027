"""Errors, and the checks of arguments that raise them.

Three places (STYLE): while tracing, shapes and counts raise ValueError; the driver checks values on the host before a
loop; inside compiled loops failures are counted and raised once, by the driver, with the partial result attached.
Values are checked only when they are concrete: under `jit` or `vmap` a value is unknown and the check is skipped.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key, PyTree, UInt32

__all__ = [
    "BayesinfError",
    "CheckpointError",
    "DegenerateWeightsError",
    "GenerationError",
    "InitializationError",
    "KeyLike",
    "PotentialError",
    "SamplingError",
    "SamplingWarning",
    "as_array",
    "as_arrays",
    "as_key",
    "as_number",
    "check_arguments",
    "check_choice",
    "check_count",
    "check_finite",
    "check_floating",
    "check_fraction",
    "check_nonnegative",
    "check_not_nan",
    "check_positive",
    "check_positive_scalar",
    "is_concrete",
]


KeyLike = Key[Array, ""] | UInt32[Array, " words"] | int | np.integer
"""What every function takes as a key: a typed key, a raw one, or a seed."""


class BayesinfError(RuntimeError):
    """Base of the errors raised at run time.

    Attributes:
        result: what had been computed before the failure, or None.
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class SamplingError(BayesinfError):
    """A run of `sample` failed; `draws` holds the partial `Draws`.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=1e6)
        >>> try:
        ...     draws = bi.sample(0, kernel, jnp.zeros((1, 2)), num_samples=100, progress=False)
        ... except bi.errors.SamplingError as error:
        ...     draws = error.draws
        >>> draws.status
        'chains [0] never moved in 100 steps'
    """

    @property
    def draws(self) -> Any:
        return self.result


class InitializationError(BayesinfError):
    """No starting point with a finite log density and gradient: none was found, or the one given has none."""


class DegenerateWeightsError(BayesinfError):
    """All particle weights vanished; `result` holds the result until then, which `throw=False` returns."""


class GenerationError(BayesinfError):
    """No request for a step was answered, such as where a server is absent; `result` holds the run until then."""


class PotentialError(BayesinfError):
    """Scores of unfinished answers were NaN or out of their range; `result` holds the run, in which they weigh zero."""


class CheckpointError(BayesinfError):
    """A checkpoint cannot be continued: damaged, written by another run, or of a longer one."""


class SamplingWarning(UserWarning):
    """A run ended, but its draws should be looked at before they are used."""


def is_concrete(tree: PyTree) -> bool:
    """Whether every array of `tree` has a value now, that is, none is being traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def as_key(key: Any) -> Key[Array, ""]:
    """A typed PRNG key from a typed key, a raw `PRNGKey` array, or an integer seed in [0, 2**32).

    Larger seeds are refused because without 64-bit mode JAX folds them onto small ones: key(2**40) is key(0).

    Args:
        key: one of the three.

    Returns:
        A typed key, scalar.

    Raises:
        ValueError: it is none of the three, or several keys.

    Example:
        >>> import jax
        >>> from bayesinf import errors
        >>> bool(errors.as_key(3) == jax.random.key(3))
        True
    """
    if isinstance(key, bool | float | complex | str):
        raise ValueError(f"key must be a jax.random.key or an integer seed, got {key!r}; use jax.random.key(0)")
    if isinstance(key, int | np.integer):
        if not 0 <= int(key) < 2**32:
            raise ValueError(f"key as an integer seed must lie in [0, 2**32), got {key}; larger seeds collide in JAX")
        return jax.random.key(int(key))
    if isinstance(key, np.ndarray):
        key = jnp.asarray(key)
    if not isinstance(key, jax.Array):
        raise ValueError(f"key must be a jax.random.key or an integer seed, got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim != 1:
            raise ValueError(
                f"key must be one typed key or a raw uint32 key, got dtype {key.dtype} and shape {key.shape}"
            )
        return jax.random.wrap_key_data(key)
    if key.shape != ():
        raise ValueError(f"key must be a single key, got an array of keys of shape {key.shape}; pass one of them")
    return key


def as_array(name: str, *, is_optional: bool = False, is_floating: bool = False) -> Callable[[Any], Any]:
    """A converter for the field `name`: to an array, of floating point if asked, or None where it may be left out."""

    def convert(value: Any) -> Any:
        if value is None and is_optional:
            return None
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be a number or an array of numbers, got {value!r}") from error
        return array.astype(jnp.result_type(array, 1.0)) if is_floating else array

    return convert


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """The pytree with every leaf an array."""

    def convert(path: Any, leaf: Any) -> Array:
        try:
            return jnp.asarray(leaf)
        except (TypeError, ValueError) as error:
            where = name + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array of numbers, got {type(leaf).__name__}: {error}") from error

    return jax.tree_util.tree_map_with_path(convert, tree)


def as_number(name: str, value: Any) -> float:
    """One number known now, as a Python float."""
    try:
        if np.ndim(value) == 0 and not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be one number known before compilation, got {value!r}")


def check_arguments(name: str, function: Callable[..., Any], arguments: str) -> None:
    """A function that can be called with these arguments, named and separated by commas."""
    if not callable(function):
        raise ValueError(f"{name} must be a function {name}({arguments}), got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of another language: it does not tell
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise ValueError(f"{name} must be called as {name}({arguments}), but it has {signature}: {error}") from error


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    """A static whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number known before compilation, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """One of the strings in `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Strictly between 0 and 1 in every element; skipped while traced."""
    if not is_concrete(value):
        return
    array = np.asarray(value)
    if array.dtype.kind not in "fiuV" or not np.all((array > 0) & (array < 1)):  # V: the floating types of ml_dtypes
        raise ValueError(f"{name} must lie in (0, 1), got {value}")


def check_nonnegative(name: str, value: Any) -> None:
    """Finite and >= 0 in every element; skipped while traced."""
    if not is_concrete(value):
        return
    array = np.asarray(value)
    if array.dtype.kind not in "fiubV" or not np.all(np.isfinite(array) & (array >= 0)):  # V: those of ml_dtypes
        raise ValueError(f"{name} must be finite and not negative, got {array}")


def check_positive_scalar(name: str, value: Any) -> None:
    """One number, finite and > 0; while traced the shape alone is checked."""
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {shape}; for a kernel in each chain, vmap over kernels")
    check_positive(name, value)


def check_finite(name: str, value: Any) -> None:
    """Neither NaN nor infinite in any element, and says where; skipped while traced."""
    if not is_concrete(value):
        return
    is_bad = ~np.isfinite(np.asarray(value, dtype=float))
    if np.any(is_bad):
        where = np.argwhere(is_bad)[:5].squeeze(-1 if is_bad.ndim == 1 else ()).tolist()
        found = f"{int(is_bad.sum())} that are not, at {where}" if is_bad.ndim else str(value)
        raise ValueError(f"{name} must be finite, got {found}")


def check_not_nan(name: str, value: Any, *, cure: str = "leave missing ones out") -> None:
    """Refuses NaN, and says where; skipped while traced."""
    if not is_concrete(value):
        return
    is_nan = np.isnan(np.asarray(value, dtype=float))
    if np.any(is_nan):
        where = np.argwhere(is_nan)[:5].squeeze(-1 if is_nan.ndim == 1 else ()).tolist()
        raise ValueError(f"{name} must not be NaN, got {int(is_nan.sum())} that are, at {where}; {cure}")


def check_positive(name: str, value: Any) -> None:
    """Finite and > 0 in every element; skipped while traced."""
    if not is_concrete(value):
        return
    # jax fills pytrees with placeholders while it handles their structure; only numbers are judged
    if not hasattr(value, "dtype") and not isinstance(value, int | float):
        return
    array = np.asarray(value)
    if array.dtype.kind not in "fiuV":  # V: the floating types of ml_dtypes
        raise ValueError(f"{name} must be a real number, got {array}")
    if not (np.all(np.isfinite(array)) and np.all(array > 0)):
        raise ValueError(f"{name} must be finite and positive, got {array}")


def check_floating(name: str, tree: PyTree) -> None:
    """A non-empty pytree whose leaves are arrays of floating point."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got {tree!r}")
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise ValueError(f"{where} must be a floating-point array, got {type(leaf).__name__}") from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{where} must be floating point, got {dtype}; convert it with jnp.asarray(x, float)")
