"""Where `sample` keeps draws while it runs: in memory, or in a zarr folder for runs that are larger.

Both take chunks of (value, statistics) with leading axes (chain, draw), at a position counted in draws, so that a
resumed run goes on where the last complete chunk ended.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.draws import Draws, statistics, variables

__all__ = ["Memory", "Zarr"]

_CHUNK_BYTES = 4 * 2**20  # of a file of the zarr folder
_MAX_DRAWS = 10_000  # of a file
_IDENTITY = "bayesinf_run"


class Memory:
    """Draws in arrays that are allocated once.

    Args:
        shapes: shapes and dtypes of one draw of one chain.
        num_chains: the leading axis.
        num_samples: draws to make room for.
    """

    def __init__(self, shapes: PyTree, num_chains: int, num_samples: int):
        num_bytes = num_chains * num_samples * sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes))
        try:
            self._arrays = jax.tree.map(lambda s: np.empty((num_chains, num_samples, *s.shape), s.dtype), shapes)
        except MemoryError as error:
            raise MemoryError(
                f"num_samples={num_samples} draws of {num_chains} chains take {num_bytes / 2**30:.1f} GiB; keep fewer "
                "with thin or collect, keep expectations with reducers, or write the draws to disk with store="
            ) from error

    def put(self, chunk: PyTree, start: int) -> None:
        """Writes a chunk at draws start, start + 1, ..."""
        for array, leaf in zip(jax.tree.leaves(self._arrays), jax.tree.leaves(chunk), strict=True):
            array[:, start : start + leaf.shape[1]] = leaf

    def get(self, num_draws: int) -> PyTree:
        """The first draws."""
        return jax.tree.map(lambda array: array[:, :num_draws], self._arrays)


class Zarr:
    """Draws in a zarr folder with the groups of ArviZ, which `xarray.open_datatree` reads lazily.

    The samples that it gives back are zarr arrays: a slice of them reads that slice; `np.asarray` reads everything.

    Args:
        folder: refused if it exists, unless `num_draws` says that it is to be continued.
        shapes: shapes and dtypes of one draw of one chain.
        num_chains: the leading axis.
        known: fields of `Draws` that are known beforehand; they give dimensions, coordinates and observed data.
        num_draws: what of the folder is kept; None for a new folder.
        identity: of the run, kept in the folder: only the run that began it goes on with it, or begins it anew where it
            came to no checkpoint. None for a run without a checkpoint.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        shapes: PyTree,
        num_chains: int,
        known: dict[str, Any],
        num_draws: int | None,
        identity: str | None = None,
    ):
        try:
            import zarr
        except ImportError as error:
            raise ImportError('store needs zarr, which is not installed: pip install "bayesinf[zarr]"') from error
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"store must be a folder, and {self._folder} is a file")
        is_there = self._folder.exists() and any(self._folder.iterdir())
        is_own = is_there and identity is not None and _identity(self._folder) == identity
        if num_draws is None and is_own:
            shutil.rmtree(self._folder)
        elif num_draws is None and is_there:
            raise ValueError(f"store must be a new folder, and {self._folder} exists; delete it or name another")
        if num_draws is not None and not is_there:
            raise ValueError(
                f"store must be the folder of the run that the checkpoint continues; {folder} is not there"
            )
        if num_draws is not None and not is_own:
            raise errors.CheckpointError(f"store {self._folder} was written by another run than the checkpoint")
        if num_draws is None:
            _lay_out(self._folder, shapes, num_chains, known)
        self._group: Any = zarr.open_group(self._folder, mode="r+")
        self._group.attrs[_IDENTITY] = identity
        self._treedef = jax.tree.structure(shapes)
        self._names = _names(shapes)
        self._draw = [f"{group}/draw" for group in ("posterior", "sample_stats") if "draw" in self._group[group]]
        num_kept = min((array.shape[1] for array in self._arrays()), default=0)
        if num_kept < (num_draws or 0):
            raise errors.CheckpointError(
                f"store {self._folder} holds {num_kept} of the {num_draws} draws that the checkpoint counts; it is an "
                "older copy, or damaged"
            )
        self._resize(num_draws or 0)

    def put(self, chunk: PyTree, start: int) -> None:
        """Writes a chunk at draws start, start + 1, ..."""
        stop = start + jax.tree.leaves(chunk)[0].shape[1]
        self._resize(stop)
        for array, leaf in zip(self._arrays(), jax.tree.leaves(chunk), strict=True):
            array[:, start:stop] = leaf
        for name in self._draw:
            self._group[name][start:stop] = np.arange(start, stop)

    def get(self, num_draws: int) -> PyTree:
        """The samples as zarr arrays, and the statistics, which are small, in memory."""
        self._resize(num_draws)
        samples, stats = jax.tree.unflatten(self._treedef, self._arrays())
        return samples, jax.tree.map(lambda array: np.asarray(array[:]), stats)

    def _arrays(self) -> list[Any]:
        return [self._group[name] for name in self._names]

    def _resize(self, num_draws: int) -> None:
        for name in (*self._names, *self._draw):
            array = self._group[name]
            axis = array.ndim > 1  # (chain, draw, ...) or (draw,)
            shape = (*array.shape[:axis], num_draws, *array.shape[axis + 1 :])
            if shape != array.shape:
                array.resize(shape)


def _identity(folder: Path) -> str | None:
    """The run that a folder says it belongs to; None for a folder of something else."""
    import zarr

    try:
        return str(zarr.open_group(folder, mode="r").attrs.get(_IDENTITY))
    except FileNotFoundError:
        return None


def _names(shapes: PyTree) -> list[str]:
    """Paths of the leaves of (samples, statistics) below the folder."""
    samples, stats = shapes
    return [f"posterior/{name}" for name in variables(samples)] + [f"sample_stats/{name}" for name in statistics(stats)]


def _lay_out(folder: Path, shapes: PyTree, num_chains: int, known: dict[str, Any]) -> None:
    """Groups, dimensions and coordinates as `Draws.to_arviz` makes them, for one draw that says nothing yet."""
    samples, stats = jax.tree.map(lambda s: np.zeros((num_chains, 1, *s.shape), s.dtype), shapes)
    encoding: dict[str, Any] = {"/posterior": {}, "/sample_stats": {}}
    for path, leaf in zip(_names(shapes), jax.tree.leaves((samples, stats)), strict=True):
        group, name = path.split("/", 1)
        per_file = max(1, _CHUNK_BYTES // max(leaf.nbytes, 1))
        encoding[f"/{group}"][name] = {"chunks": (num_chains, min(per_file, _MAX_DRAWS), *leaf.shape[2:])}
    tree = Draws(samples, stats, **known).to_arviz(log_likelihood=False)
    for name, group in encoding.items():
        if "draw" in tree[name].coords:  # not in a group without variables
            group["draw"] = {"chunks": (_MAX_DRAWS,)}
    # without consolidated metadata, which would be out of date if the process died
    tree.to_zarr(folder, mode="w-", encoding=encoding, consolidated=False, zarr_format=3)
