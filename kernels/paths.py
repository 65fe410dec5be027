"""Parts of a pytree by the path that leads to them: keys of dicts, indices of tuples and lists, one after the other."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

__all__ = ["Path", "as_path", "get", "put"]

Path = tuple[Any, ...]


def as_path(path: Any) -> Path:
    """A path from a path or its only key."""
    return path if isinstance(path, tuple) else (path,)


def get(tree: PyTree, path: Path) -> PyTree:
    """What is at `path`.

    Raises:
        ValueError: the path leads nowhere, or into an array.
    """
    for depth, key in enumerate(path):
        if isinstance(tree, np.ndarray | jax.Array):
            raise ValueError(
                f"path {path} leads into the array at {path[:depth] or 'the top'} of the position, of shape "
                f"{tree.shape}; its parts can be blocks only where the position holds them as separate entries"
            )
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError) as error:
            keys = list(tree) if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(
                f"path {path} leads nowhere: no {key!r} at {path[:depth] or 'the top'} of the position, there is {keys}"
            ) from error
    return tree


def put(tree: PyTree, path: Path, part: PyTree) -> PyTree:
    """A copy of the tree with `part` at `path`."""
    if not path:
        return part
    key, *rest = path
    if isinstance(tree, Mapping):
        return type(tree)({**tree, key: put(tree[key], tuple(rest), part)})  # type: ignore[call-arg]
    items = [put(item, tuple(rest), part) if i == key % len(tree) else item for i, item in enumerate(tree)]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
