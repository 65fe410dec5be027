"""The contract of a kernel, checked clause by clause.

Exact comparisons are bitwise. Where the same arithmetic is compiled differently (eagerly, jitted, vectorised) rounding
may differ, and values are compared to the square root of the machine precision.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from bayesinf import errors
from bayesinf.errors import KeyLike
from bayesinf.target import Target

__all__ = ["CLAUSES", "ContractError", "contract"]

NUM_CHAINS = 8
NUM_STEPS = 6


class ContractError(AssertionError):
    """A kernel broke its contract; `violations` maps each violated clause to what was seen."""

    def __init__(self, name: str, violations: dict[str, str]):
        lines = "".join(f"\n  {clause}: {seen}" for clause, seen in violations.items())
        super().__init__(f"{name} violates its contract in {len(violations)} clause(s):{lines}")
        self.violations = violations


def contract(kernel: Any, position: PyTree, *, key: KeyLike = 0, skip: Collection[str] = ()) -> None:
    """Checks the protocol that every driver relies on.

        init(position) -> state,     step(key, state) -> (state, info)

    Clauses, by the name that an error reports:

        protocol       init and step exist; states have a `.position`; all of a state are arrays
        info           scalars acceptance_rate in [0, 1], is_accepted, is_divergent, num_gradients of the right types
        init           init(position) starts at `position`, and is a function
        types          structure, shapes and dtypes of the state do not change across a step, in 64-bit mode neither
        leaves         the kernel is a pytree of arrays: no number is static or a Python float
        one trace      new values of the same shapes compile nothing
        step size      `with_step_size` takes effect and compiles nothing
        jit, vmap      compiled and vectorised steps equal plain ones
        keys           no key is drawn from twice, as far as JAX can follow keys through the program
        reproducible   the same key gives the same bits, other keys give other moves
        resume         a state stored as NumPy arrays and loaded goes on bitwise as if nothing had happened
        divergence     a log density of NaN or +inf undoes the move and is counted, where the kernel has a target
        bad input      an integer position raises a ValueError that speaks of floating point

    Args:
        kernel: what to check.
        position: a point of positive density where the kernel can move.
        key: PRNG key or seed.
        skip: names of clauses that a foreign kernel does not promise.

    Raises:
        ContractError: some clauses are violated; an AssertionError that names them, with a dict `violations`.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf import conformance
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> conformance.contract(kernel, jnp.zeros(2))
    """
    for name in skip:
        errors.check_choice("skip", name, CLAUSES)
    subject = _Subject(kernel, position, errors.as_key(key))
    violations = {}
    for name, clause in CLAUSES.items():
        if name in skip:
            continue
        try:
            seen = "; ".join(clause(subject))
        except Exception as error:  # a clause that cannot be carried out is violated
            seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if seen:
            violations[name] = seen
            if name == "protocol":
                break  # nothing else can be asked
    if violations:
        raise ContractError(type(kernel).__name__, violations)


class _Subject:
    """A kernel under test, with steps that are compiled once and counted."""

    def __init__(self, kernel: Any, position: PyTree, key: Key[Array, ""]):
        self.kernel, self.position, self.key = kernel, position, key
        self.num_traces = 0

        def step(kernel, key, state):
            self.num_traces += 1
            return kernel.step(key, state)

        self.step = eqx.filter_jit(step)
        self.step_many = eqx.filter_jit(lambda kernel, keys, states: jax.vmap(kernel.step)(keys, states))

    @cached_property
    def start(self):
        return self.kernel.init(self.position)

    @cached_property
    def moved(self):
        """A state some steps away from the start, for clauses that should not be blind to what init sets."""
        return self.run(self.start, 0, NUM_STEPS)

    @cached_property
    def chains(self):
        """Keys and states of several chains, one step after the start."""
        keys = jax.random.split(self.key, NUM_CHAINS)
        states = [self.run(self.start, t, t + 1) for t in range(NUM_CHAINS)]
        return keys, states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def run(self, state, first: int, last: int):
        """Steps first, ..., last - 1 of one chain."""
        for t in range(first, last):
            state, _ = self.step(self.kernel, jax.random.fold_in(self.key, t), state)
        return state


def _protocol(subject: _Subject) -> Iterator[str]:
    for method in ("init", "step"):
        if not callable(getattr(subject.kernel, method, None)):
            yield f"has no method {method}"
            return
    state = subject.start
    if not hasattr(state, "position"):
        yield f"init returns a {type(state).__name__} without .position"
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array | np.ndarray):
            yield f"state{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array"
    result = subject.step(subject.kernel, subject.key, state)
    if not (isinstance(result, tuple) and len(result) == 2 and hasattr(result[0], "position")):
        yield f"step returns a {type(result).__name__} that is not a pair (state, info)"


def _info(subject: _Subject) -> Iterator[str]:
    _, info = subject.step(subject.kernel, subject.key, subject.start)
    kinds = {
        "acceptance_rate": jnp.floating,
        "is_accepted": jnp.bool_,
        "is_divergent": jnp.bool_,
        "num_gradients": jnp.integer,
    }
    for name, kind in kinds.items():
        value = getattr(info, name, None)
        if value is None:
            yield f"info has no {name}"
        elif jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), kind):
            yield f"info.{name} should be a scalar {kind.__name__}, is {jnp.result_type(value)}{list(jnp.shape(value))}"
        elif name == "acceptance_rate" and not 0.0 <= float(value) <= 1.0:
            yield f"info.acceptance_rate is {float(value)}"
        elif name == "num_gradients" and int(value) < 0:
            yield f"info.num_gradients is {int(value)}"


def _init(subject: _Subject) -> Iterator[str]:
    state = subject.start
    yield from _differences("init(position).position", state.position, subject.position)
    yield from _differences("a second init", subject.kernel.init(subject.position), state)


def _types(subject: _Subject) -> Iterator[str]:
    def before_and_after(position):
        before = jax.eval_shape(subject.kernel.init, position)
        return before, jax.eval_shape(lambda state: subject.kernel.step(subject.key, state)[0], before)

    yield from _type_changes("after a step ", *before_and_after(subject.position))
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            position = jax.tree.map(partial(_as_floating, dtype), subject.position)
            before, after = before_and_after(position)
            mode = f"in 64-bit mode at a {jnp.dtype(dtype).name} position "
            yield from _type_changes(mode, before, after)
            yield from _type_changes(mode + "init: ", position, before.position)


def _leaves(subject: _Subject) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(subject.kernel):
        if not isinstance(leaf, jax.Array | np.ndarray):
            yield f"kernel{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array"
    yield from _static_numbers("kernel", subject.kernel)


def _static_numbers(name: str, node: Any) -> Iterator[str]:
    """Numbers and arrays in static fields of the kernel and of the modules within it."""
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return
    for field in dataclasses.fields(node):
        value = getattr(node, field.name, None)
        if not field.metadata.get("static", False):
            yield from _static_numbers(f"{name}.{field.name}", value)
        elif isinstance(value, float | complex | np.ndarray | np.inexact | jax.Array):
            yield f"{name}.{field.name} is static and holds a number: every new value compiles anew"


def _one_trace(subject: _Subject) -> Iterator[str]:
    state = subject.moved
    before = subject.num_traces
    subject.step(jax.tree.map(_nudge, subject.kernel), subject.key, state)
    if subject.num_traces > before:
        yield "new values of the kernel's parameters and data, of the same shapes, were compiled anew"
    if before > 1:
        yield f"steps from init and from the state it led to were traced {before} times"


def _step_size(subject: _Subject) -> Iterator[str]:
    if not (hasattr(subject.kernel, "step_size") and hasattr(subject.kernel, "with_step_size")):
        return
    keys, states, stacked = subject.chains
    half = subject.kernel.with_step_size(0.5 * subject.kernel.step_size)
    traces = subject.num_traces
    subject.step(half, keys[0], states[0])
    if subject.num_traces > traces:
        yield "with_step_size(...) gives a kernel that was compiled anew"
    moves = [subject.step_many(kernel, keys, stacked)[0].position for kernel in (subject.kernel, half)]
    if not any(_differences("position", *moves)):
        yield "half the step size gives the same moves: it is ignored"


def _jit(subject: _Subject) -> Iterator[str]:
    state = subject.moved
    eager = subject.kernel.step(subject.key, state)
    yield from _differences("the eager step", eager, subject.step(subject.kernel, subject.key, state), is_exact=False)


def _vmap(subject: _Subject) -> Iterator[str]:
    keys, states, stacked = subject.chains
    together = subject.step_many(subject.kernel, keys, stacked)
    alone = [subject.step(subject.kernel, key, state) for key, state in zip(keys, states, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    yield from _differences("the vectorised step", together, expected, is_exact=False)


def _keys(subject: _Subject) -> Iterator[str]:
    with jax.debug_key_reuse(True):
        try:
            jax.jit(lambda key, state: subject.kernel.step(key, state)).lower(subject.key, subject.start)
        except jax.errors.KeyReuseError as error:
            yield f"a key is used twice: {str(error).splitlines()[0]}"


def _reproducible(subject: _Subject) -> Iterator[str]:
    yield from _differences("a second run", subject.run(subject.start, 0, NUM_STEPS), subject.moved)
    state = subject.start
    positions = [subject.run(state, NUM_STEPS * i, NUM_STEPS * (i + 1)).position for i in range(4)]
    if not any(any(_differences("position", position, positions[0])) for position in positions[1:]):
        yield f"four chains of {NUM_STEPS} steps with different keys ended at one position"


def _resume(subject: _Subject) -> Iterator[str]:
    through = subject.run(subject.start, 0, 2 * NUM_STEPS)
    half = subject.moved
    leaves, structure = jax.tree.flatten(half)
    loaded = [_restore(_to_numpy(leaf), leaf) for leaf in leaves]
    resumed = subject.run(jax.tree.unflatten(structure, loaded), NUM_STEPS, 2 * NUM_STEPS)
    yield from _differences("the resumed chain", resumed, through)


def _divergence(subject: _Subject) -> Iterator[str]:
    if not (isinstance(getattr(subject.kernel, "target", None), Target) and hasattr(subject.kernel, "with_target")):
        return
    state = subject.moved

    def constant(position, value):
        return value * (1.0 + 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(position)))

    for value in (jnp.nan, jnp.inf):
        broken = subject.kernel.with_target(Target(constant, value))
        moved, info = subject.step(broken, subject.key, state)
        yield from _differences(f"the position after a log density of {value}", moved.position, state.position)
        if not bool(info.is_divergent):
            yield f"a log density of {value} is not counted as divergent"


def _bad_input(subject: _Subject) -> Iterator[str]:
    integers = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), int), subject.position)
    try:
        subject.kernel.init(integers)
    except ValueError as error:
        if "floating" not in str(error):
            yield f"an integer position raises a ValueError that does not say it must be floating point: {error}"
    except Exception as error:
        yield f"an integer position raises {type(error).__name__}, not ValueError: {error}"
    else:
        yield "an integer position is accepted by init"


CLAUSES: dict[str, Callable[[_Subject], Iterator[str]]] = {
    "protocol": _protocol,
    "info": _info,
    "init": _init,
    "types": _types,
    "leaves": _leaves,
    "one trace": _one_trace,
    "step size": _step_size,
    "jit": _jit,
    "vmap": _vmap,
    "keys": _keys,
    "reproducible": _reproducible,
    "resume": _resume,
    "divergence": _divergence,
    "bad input": _bad_input,
}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _restore(stored: np.ndarray, like: Any) -> Array:
    array = jnp.asarray(stored)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else array


def _as_floating(dtype: Any, leaf: Any) -> Any:
    return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf


def _nudge(leaf: Any) -> Any:
    is_number = isinstance(leaf, float) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))
    return leaf * (1 + 2.0**-10) if is_number else leaf


def _type_changes(where: str, before: PyTree, after: PyTree) -> Iterator[str]:
    if jax.tree.structure(before) != jax.tree.structure(after):
        yield f"{where}the structure was {jax.tree.structure(before)}, is {jax.tree.structure(after)}"
        return
    paths = jax.tree_util.tree_leaves_with_path(before)
    for (path, old), new in zip(paths, jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            name = jax.tree_util.keystr(path)
            yield f"{where}{name} was {old.dtype}{list(old.shape)}, is {new.dtype}{list(new.shape)}"


def _differences(name: str, value: PyTree, expected: PyTree, *, is_exact: bool = True) -> Iterator[str]:
    """What differs between two pytrees: structure, shapes, bits (or for is_exact=False more than rounding)."""
    if jax.tree.structure(value) != jax.tree.structure(expected):
        yield f"{name} has structure {jax.tree.structure(value)}, expected {jax.tree.structure(expected)}"
        return
    paths = jax.tree_util.tree_leaves_with_path(value)
    for (path, leaf), other in zip(paths, jax.tree.leaves(expected), strict=True):
        a, b = _to_numpy(leaf), _to_numpy(other)
        tolerance = 0.0 if is_exact or a.dtype.kind != "f" else float(np.sqrt(np.finfo(a.dtype).eps))
        if a.shape != b.shape or not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=a.dtype.kind == "f"):
            gap = f"differs by up to {np.max(np.abs(a - b)):.3g}" if a.shape == b.shape and a.dtype.kind == "f" else ""
            yield f"{name}{jax.tree_util.keystr(path)} {gap or f'is {a.tolist()}, expected {b.tolist()}'}"
