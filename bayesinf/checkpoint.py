"""Checkpoints: a folder from which an interrupted run is continued bit for bit.

    run/state.npz           the carry of every chain after the last finished chunk, and where the run stood
    run/draws-000000.npz    the draws of each chunk

A chunk's draws are written before the state that counts them, and every file is written beside its place and renamed,
so whenever the process dies at most one chunk is lost and nothing is half written.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors

__all__ = ["Checkpoint", "fingerprint"]


class Checkpoint:
    """The checkpoint folder of one run.

    Args:
        folder: created if it does not exist.
        identity: `fingerprint` of all that determines the draws; a folder with another one is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str):
        self._folder = Path(folder)
        self.identity = identity
        self._num_chunks = 0
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"checkpoint must be a folder, and {self._folder} is a file")
        self._folder.mkdir(parents=True, exist_ok=True)

    def save(self, carry: PyTree, position: dict[str, int], chunk: dict[str, np.ndarray] | None) -> None:
        """Adds a chunk of draws (None during warm-up) and replaces the state."""
        if chunk is not None:
            self._write(f"draws-{self._num_chunks:06d}.npz", chunk)
            self._num_chunks += 1
        arrays = {f"carry-{i}": np.asarray(leaf) for i, leaf in enumerate(_plain_leaves(carry))}
        numbers = {name: np.asarray(value) for name, value in position.items()}
        meta = {"identity": np.asarray(self.identity), "num_chunks": np.asarray(self._num_chunks)}
        self._write("state.npz", {**arrays, **numbers, **meta})

    def load(self, like: PyTree) -> tuple[PyTree, dict[str, int], list[dict[str, np.ndarray]]] | None:
        """(carry, position, chunks) of a run to be continued; None if nothing has been saved.

        Args:
            like: a carry of the same structure, such as the one a fresh run starts from.
        """
        path = self._folder / "state.npz"
        if not path.exists():
            return None
        saved = self._read(path)
        if str(saved.pop("identity", "")) != self.identity:
            raise errors.CheckpointError(
                f"checkpoint {self._folder} was written by another run (other key, model, kernel, data, initial "
                "points, num_warmup, thin, constrain, collect, reducers, dtype or version of JAX); give another "
                "folder, or delete this one"
            )
        self._num_chunks = int(saved.pop("num_chunks"))
        leaves = [saved.pop(f"carry-{i}") for i in range(len(_plain_leaves(like)))]
        carry = _restore(like, leaves)
        chunks = [self._read(self._folder / f"draws-{i:06d}.npz") for i in range(self._num_chunks)]
        return carry, {name: int(value) for name, value in saved.items()}, chunks

    def _write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        partial = self._folder / f".{name}.{os.getpid()}"
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._folder / name)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise errors.CheckpointError(
                f"checkpoint file {path} cannot be read: {error}; delete the folder"
            ) from error


def fingerprint(program: Any, *parts: PyTree) -> str:
    """A digest of all that determines the draws: a jaxpr, with its constants, and the arrays of pytrees.

    The jaxpr tells of everything that is no array: functions and what they close over, words, counts.
    """
    digest = hashlib.sha256()
    # names of functions stand in it with their addresses
    digest.update(re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
    for constant in _constants(program):
        _add(digest, constant)
    for part in parts:
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            digest.update(jax.tree_util.keystr(path).encode())
            if isinstance(leaf, jax.Array | np.ndarray | int | float):
                _add(digest, leaf)
    return digest.hexdigest()


def _add(digest: Any, leaf: Any) -> None:
    array = np.asarray(_plain(leaf))
    digest.update(f"{array.dtype}{array.shape};".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _constants(program: Any) -> Iterator[Any]:
    """The arrays that a jaxpr closes over, and those within it."""
    if isinstance(program, list | tuple):
        for item in program:
            yield from _constants(item)
    elif hasattr(program, "jaxpr"):
        yield from (leaf for leaf in program.consts if isinstance(leaf, jax.Array | np.ndarray))
        yield from _constants(program.jaxpr)
    elif hasattr(program, "eqns"):
        for equation in program.eqns:
            yield from (v.val for v in equation.invars if isinstance(getattr(v, "val", None), jax.Array | np.ndarray))
            yield from _constants(list(equation.params.values()))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_leaves(tree: PyTree) -> list[Any]:
    return [_plain(leaf) for leaf in jax.tree.leaves(tree)]


def _restore(like: PyTree, arrays: list[np.ndarray]) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    restored = [
        jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else jnp.asarray(array)
        for leaf, array in zip(leaves, arrays, strict=True)
    ]
    return jax.tree.unflatten(treedef, restored)
