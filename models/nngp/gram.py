"""Kernel matrices tile by tile, in bounded memory, on one device or many.

A kernel matrix of n1 x n2 entries passes through many arrays of this size while it is computed. Tile by tile there is
one, the result, and a few tiles; of a symmetric matrix only one triangle is computed. For kernels of vectors the bound
is 8 tiles besides the result, at any depth and number of inputs: 20,000 x 2,000 entries in float32 take 160 MB, and not
more than 8 MB besides with tiles of 512 x 512. Tiles of images are larger, by the pixels or pairs of pixels that
`flatten` or a pool need.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors

__all__ = ["fill", "gram"]

Kernel = Callable[..., Any]


def gram(
    kernel: Kernel,
    X1: Real[ArrayLike, "n1 ..."],
    X2: Real[ArrayLike, "n2 ..."] | None = None,
    *,
    block: int | None = None,
    sharding: NamedSharding | None = None,
) -> Float[Array, "n1 n2"]:
    """The matrix of a kernel, in the memory of its result and at most 8 tiles of block x block entries.

    The bound is that of kernels of vectors, (n, d); for images it is multiplied by the pixels, or for pools by the
    pairs of pixels.

    Args:
        kernel: `kernel(X1, X2)` is a matrix; where it has `kernel.diagonal(X)`, this is the diagonal of
            `gram(kernel, X)`.
        X1: inputs, along the first axis.
        X2: other inputs; None for X1 itself, of which one triangle is computed.
        block: rows and columns of a tile; 512 where it is None.
        sharding: how the rows of the result are spread over devices, such as
            `NamedSharding(mesh, PartitionSpec("rows"))`; the number of rows is a multiple of that of devices.

    Returns:
        The matrix; differentiable, with one tile at a time made again.

    Raises:
        ValueError: `block` is no whole number above zero, or rows do not divide among the devices.

    Example:
        >>> import jax
        >>> from bayesinf.models import nngp
        >>> kernel = nngp.NNGP(nngp.relu(), depth=3, w_var=2.0, b_var=0.1)
        >>> nngp.gram(kernel, jax.random.normal(jax.random.key(0), (1000, 5)), block=256).shape
        (1000, 1000)
    """
    errors.check_arguments("kernel", kernel, "X1, X2")
    block = 512 if block is None else errors.check_count("block", block)
    left = _inputs("X1", X1)
    right = None if X2 is None else _inputs("X2", X2)
    if sharding is None:
        return _tiled(kernel, left, right, block)
    return _sharded(kernel, left, right, block, sharding)


def _inputs(name: str, X: object) -> Array:
    array: Array = errors.as_array(name, is_floating=True)(X)
    if array.ndim < 1 or array.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one input, got shape {array.shape}")
    errors.check_not_nan(name, array)
    if errors.is_concrete(array) and np.any(np.isinf(np.asarray(array))):
        raise ValueError(f"{name} must be finite")
    return array


@eqx.filter_jit
def _tiled(kernel: Kernel, X1: Array, X2: Array | None, block: int) -> Array:
    if X2 is not None:
        return fill(kernel, X1, X2, block, is_symmetric=False)
    return _with_diagonal(kernel, X1, fill(kernel, X1, X1, block, is_symmetric=True))


def fill(kernel: Kernel, X1: Array, X2: Array, block: int, *, is_symmetric: bool) -> Array:
    """The matrix tile by tile; `is_symmetric` computes one triangle, where X2 is X1."""
    rows, columns = min(block, X1.shape[0]), min(block, X2.shape[0])
    num_rows, num_columns = -(-X1.shape[0] // rows), -(-X2.shape[0] // columns)
    if num_rows == num_columns == 1:
        return kernel(X1, X2)
    corners = [(i, j) for i in range(num_rows) for j in range(i if is_symmetric else 0, num_columns)]

    @jax.checkpoint
    def tile(X1: Array, X2: Array, i: Array, j: Array) -> Array:
        # the last slices are moved back to fit, here as in the update below
        left = jax.lax.dynamic_slice_in_dim(X1, i * rows, rows)
        return kernel(left, jax.lax.dynamic_slice_in_dim(X2, j * columns, columns))

    def step(matrix: Array, corner: Array) -> tuple[Array, None]:
        i, j = corner
        entries = tile(X1, X2, i, j)
        matrix = jax.lax.dynamic_update_slice(matrix, entries, (i * rows, j * columns))
        if is_symmetric:
            matrix = jax.lax.dynamic_update_slice(matrix, entries.T, (j * columns, i * rows))
        return matrix, None

    one = jax.eval_shape(kernel, X1[:1], X2[:1])
    if one.shape != (1, 1):
        raise ValueError(f"kernel must give a matrix of one entry a pair of inputs, got {one.shape} for one pair")
    dtype = one.dtype
    matrix = jnp.zeros((X1.shape[0], X2.shape[0]), dtype)
    return jax.lax.scan(step, matrix, jnp.asarray(np.array(corners, np.int32)))[0]


def _with_diagonal(kernel: Kernel, X: Array, matrix: Array, first: Array | int = 0) -> Array:
    """The diagonal as the kernel has it; `first` is the column of that of the first row."""
    diagonal = getattr(kernel, "diagonal", None)
    if diagonal is None:
        return matrix
    index = jnp.arange(X.shape[0])
    return matrix.at[index, first + index].set(diagonal(X).astype(matrix.dtype))


def _sharded(kernel: Kernel, X1: Array, X2: Array | None, block: int, sharding: NamedSharding) -> Array:
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        raise ValueError(f"sharding must be a NamedSharding that spreads the first axis, got {sharding}")
    names = sharding.spec[0]
    count = int(np.prod([sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)]))
    if X1.shape[0] % count:
        raise ValueError(f"X1 must have a multiple of {count} rows, the number of devices, got {X1.shape[0]}")
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    arrays, rest = eqx.partition(kernel, eqx.is_array)
    arrays, columns = jax.device_put((arrays, X1 if X2 is None else X2), everywhere)
    rows = jax.device_put(X1, NamedSharding(sharding.mesh, PartitionSpec(names)))
    return _spread(arrays, rest, rows, columns, X2 is None, block, sharding.mesh, names)


@eqx.filter_jit
def _spread(
    arrays: Any, rest: Any, X1: Array, X2: Array, is_symmetric: bool, block: int, mesh: Any, names: Any
) -> Array:
    def local(arrays: Any, X1: Array, X2: Array) -> Array:
        kernel = eqx.combine(arrays, rest)
        matrix = fill(kernel, X1, X2, block, is_symmetric=False)
        return _with_diagonal(kernel, X1, matrix, jax.lax.axis_index(names) * len(X1)) if is_symmetric else matrix

    rows, everything = PartitionSpec(names), PartitionSpec()
    # the loops of a kernel begin with constants, which the check of what varies over devices takes for replicated
    specs = (everything, rows, everything)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(arrays, X1, X2)
