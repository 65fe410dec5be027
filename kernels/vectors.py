"""Positions as vectors: sums of scaled pytrees, inner products and normal draws, each in the dtype of the position.

Step sizes and frictions may be of another dtype than the position (a float64 parameter of a float32 chain in 64-bit
mode); they are cast leaf by leaf, so that what is evaluated is what the state carries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Key, PyTree

from bayesinf import errors

__all__ = ["as_position", "combine", "differ", "dot", "normals", "strong"]

Term = tuple[Any, PyTree]  # a scalar, and what it multiplies


def as_position(position: PyTree) -> PyTree:
    """A starting position as arrays of floating point, without weak types: a state keeps its types across steps."""
    errors.check_floating("position", position)
    return jax.tree.map(strong, position)


def strong(leaf: Any) -> Array:
    """The leaf as an array without a weak type."""
    return jax.lax.convert_element_type(leaf, jnp.result_type(leaf))


def combine(*terms: Term) -> PyTree:
    """The sum of `scalar * tree` over the terms, in the structure and dtypes of the first tree.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.vectors import combine
        >>> combine((1, {"x": jnp.ones(2)}), (-0.5, {"x": jnp.ones(2)}))["x"].tolist()
        [0.5, 0.5]
    """
    scalars, trees = zip(*terms, strict=True)

    def add(*leaves: Any) -> Array:
        dtype = jnp.result_type(leaves[0])
        return sum(jnp.asarray(a, dtype) * jnp.asarray(leaf, dtype) for a, leaf in zip(scalars, leaves, strict=True))  # type: ignore[return-value]

    return jax.tree.map(add, *trees)


def differ(left: PyTree, right: PyTree) -> Bool[Array, ""]:
    """Whether two pytrees of one structure differ in any number."""
    return jnp.any(jnp.stack([jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True)]))


def dot(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """The inner product of two pytrees of one structure."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)
    return sum(jax.tree.leaves(products))  # type: ignore[return-value]


def normals(key: Key[Array, ""], like: PyTree, num: int) -> list[PyTree]:
    """`num` independent standard normal pytrees of the structure of `like`, from one call of the generator."""
    flat, unravel = ravel_pytree(like)
    # the formula of `jax.random.normal`, but row by row: XLA then makes every number once, not wherever it is used
    lowest = jnp.nextafter(jnp.asarray(-1.0, flat.dtype), jnp.asarray(0.0, flat.dtype))
    uniforms = jax.random.uniform(key, (num, flat.size), flat.dtype, lowest, 1.0)
    return [unravel(jnp.asarray(jnp.sqrt(2.0), flat.dtype) * jax.lax.erf_inv(row)) for row in uniforms]
