"""What the kernels on the paths of a state-space model have in common: arguments, states and where they may begin."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.kernel import Kernel
from bayesinf.kernels.backward import backward_sample
from bayesinf.kernels.particle_filter import particle_filter
from bayesinf.models.state_space import StateSpaceModel, check_model, check_observations, check_series, sample

__all__ = ["PathKernel", "PathState", "check_path", "first_paths"]


class PathState(NamedTuple):
    """A path x_{0:T-1}: every leaf has leading axis T."""

    position: PyTree


class PathKernel(Kernel):
    """Abstract kernel that leaves p(x_{0:T-1} | y_{0:T-1}) invariant; a final one has `step` and the fields it needs.

    Attributes:
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
    """

    is_sequential: ClassVar[bool] = True

    model: StateSpaceModel
    ys: PyTree = eqx.field(converter=check_series)

    def __check_init__(self):
        check_observations(self.model, self.ys)
        check_model(self.model)
        self._check_rest()

    @abc.abstractmethod
    def _check_rest(self) -> None:
        """Checks the other fields of the final kernel, whose own `__check_init__` would come before the one above."""

    def init(self, position: PyTree) -> PathState:
        return PathState(check_path(self.model, self.ys, position))

    def initial(self, key: errors.KeyLike, num_chains: int = 4) -> PyTree:
        """Starting paths, with a leading chain axis: backward draws from one free particle filter.

        Raises:
            DegenerateWeightsError: all weights of the filter vanished.
        """
        return first_paths(self, key, num_chains)


def first_paths(kernel: Any, key: errors.KeyLike, num_paths: int, *, throw: bool = True) -> PyTree:
    """Backward draws from one free particle filter; any paths at all if its weights vanish and nothing is to raise."""
    key_filter, key_back = jax.random.split(errors.as_key(key))
    options = {"num_particles": kernel.num_particles, "proposal": kernel.proposal, "throw": throw}
    filtered = particle_filter(key_filter, kernel.model, kernel.ys, store="full", **options)
    return backward_sample(key_back, kernel.model, filtered, num_paths, throw=throw)


def check_path(model: StateSpaceModel, ys: PyTree, path: PyTree) -> PyTree:
    """The path as arrays, if it is one of the model: T rows, each of the structure, shape and kind of a state."""
    path = errors.as_arrays("position", path)
    num_steps = jax.tree.leaves(ys)[0].shape[0]
    x = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, sample(jax.random.key(0), model.initial())))
    if jax.tree.structure(path) != jax.tree.structure(x):
        raise ValueError(
            f"position must be a path of states of structure {jax.tree.structure(x)}, got {jax.tree.structure(path)}"
        )
    for leaf, like in zip(jax.tree.leaves(path), jax.tree.leaves(x), strict=True):
        if leaf.shape != (num_steps, *like.shape):
            raise ValueError(
                f"position must be a path with the {num_steps} rows of ys, of shape {(num_steps, *like.shape)}, "
                f"got shape {leaf.shape}"
            )
        kind = jnp.floating if jnp.issubdtype(like.dtype, jnp.floating) else jnp.integer
        if not jnp.issubdtype(leaf.dtype, kind):
            raise ValueError(f"position must be {kind.__name__} point like the model's states, got {leaf.dtype}")
        if errors.is_concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            rows = np.unique(np.nonzero(~np.isfinite(np.asarray(leaf)))[0])[:5]
            raise ValueError(f"position must be a path of finite states, but rows {rows.tolist()} are not finite")
    return path
