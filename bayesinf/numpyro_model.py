"""A NumPyro model as pure functions of (position, data): the atoms of `Target.from_numpyro`.

NumPyro does the work (supports, bijections, Jacobians, dynamic supports); this file separates the array arguments,
which travel as data, from everything else, which is hashed with the model, so that new data never recompile.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import init_to_uniform, util

from bayesinf import errors
from bayesinf.captured import captured

__all__ = ["NumPyroModel"]


@dataclasses.dataclass(frozen=True)
class NumPyroModel:
    """The static part of a model call: the function, the structure of its arguments, the arguments that are not arrays.

    Every method takes `data`, the tuple of array arguments in the order of the flattened call.
    """

    model: Callable[..., Any]
    treedef: Any
    static: tuple[Any, ...]  # one entry an argument leaf; _ARRAY where the leaf travels as data

    @classmethod
    def build(cls, model: Callable[..., Any], args: tuple, kwargs: dict) -> tuple["NumPyroModel", tuple[Array, ...]]:
        """Splits the arguments and checks that the model has continuous latent sites."""
        if not callable(model):
            raise ValueError(f"model must be a function of NumPyro primitives, got {type(model).__name__}")
        leaves, treedef = jax.tree.flatten((args, kwargs))
        leaves = [_plain(leaf) for leaf in leaves]
        is_array = [isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves]
        static = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
        data = tuple(leaf for leaf, array in zip(leaves, is_array, strict=True) if array)
        self = cls(captured(model), treedef, static)
        latent = self._latent(data)
        discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"latent sites {discrete} are discrete, and a gradient kernel moves continuous sites only; "
                "sum them out of the model, or give it them as data"
            )
        if not latent:
            raise ValueError(f"model {getattr(model, '__name__', model)!r} has no latent site: nothing to infer")
        return self, data

    def call(self, data: tuple[Array, ...]) -> tuple[tuple, dict]:
        """The model's (args, kwargs) with `data` put back."""
        arrays = iter(data)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in self.static]
        return jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, position: dict[str, Array], data: tuple[Array, ...]) -> Float[Array, ""]:
        """The joint log density at an unconstrained position, Jacobian included."""
        self.check(position, data)
        args, kwargs = self.call(data)
        return -util.potential_energy(self.model, args, kwargs, position)  # pyright: ignore[reportReturnType]

    def constrain(self, position: dict[str, Array], data: tuple[Array, ...]) -> dict[str, Array]:
        self.check(position, data)
        args, kwargs = self.call(data)
        return util.constrain_fn(self.model, args, kwargs, position, return_deterministic=True)

    def unconstrain(self, values: dict[str, Array], data: tuple[Array, ...]) -> dict[str, Array]:
        args, kwargs = self.call(data)
        latent = {name: values[name] for name in self._latent(data)}
        return util.unconstrain_fn(self.model, args, kwargs, latent)

    def template(self, data: tuple[Array, ...]) -> dict[str, Array]:
        """Zeros of the shape and dtype of an unconstrained position."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes(data))

    def check(self, position: Any, data: tuple[Array, ...]) -> None:
        """That a position has the latent sites, each of its shape; NumPyro would take another for what it is not.

        Raises:
            ValueError: names the sites that are missing, unknown or of another shape.
        """
        expected = {name: leaf.shape for name, leaf in self._shapes(data).items()}
        if not isinstance(position, Mapping):
            raise ValueError(f"position must be a dict of the sites {sorted(expected)}, got {type(position).__name__}")
        got = {name: jnp.shape(leaf) for name, leaf in position.items()}
        if got != expected:
            wrong = [f"{name!r} is missing" for name in sorted(expected.keys() - got.keys())]
            wrong += [f"{name!r} is no latent site" for name in sorted(got.keys() - expected.keys())]
            wrong += [
                f"{name!r} has shape {got[name]} instead of {expected[name]}"
                for name in sorted(got.keys() & expected.keys())
                if got[name] != expected[name]
            ]
            raise ValueError(
                f"position must hold the unconstrained latent sites: {', '.join(wrong)}; make one with "
                "target.init(key), or target.unconstrain(values)"
            )

    def _shapes(self, data: tuple[Array, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return _shapes_of(self, tuple((leaf.shape, leaf.dtype) for leaf in data))

    def site_log_probs(self, position: dict[str, Array], data: tuple[Array, ...]) -> dict[str, float]:
        """The log density of each site, latent and observed, summed over the site."""
        args, kwargs = self.call(data)
        substituted = handlers.substitute(self.model, data=self.constrain(position, data))
        _, trace = util.log_density(substituted, args, kwargs, {})
        sites = [(name, site) for name, site in trace.items() if site["type"] == "sample"]
        return {name: float(jnp.sum(site["fn"].log_prob(site["value"]))) for name, site in sites}

    def observed(self, data: tuple[Array, ...]) -> dict[str, np.ndarray]:
        """The observed sites and their values, which for a factor are empty."""
        sites = self._trace(data)
        return {
            name: np.asarray(site["value"])
            for name, site in sites.items()
            if site["type"] == "sample" and site["is_observed"]
        }

    def log_likelihood(self, values: dict[str, Any], data: tuple[Array, ...]) -> dict[str, Array]:
        """Pointwise log likelihood of every observed site, factors among them, at one constrained draw."""
        args, kwargs = self.call(data)
        trace = handlers.trace(handlers.substitute(handlers.seed(self.model, 0), data=values)).get_trace(
            *args, **kwargs
        )
        return {
            name: site["fn"].log_prob(site["value"])
            for name, site in trace.items()
            if site["type"] == "sample" and site["is_observed"]
        }

    def labels(self, data: tuple[Array, ...]) -> tuple[tuple, tuple]:
        """(dims, coords) from the plates around each site, as hashable tuples of pairs."""
        dims, coords = [], {}
        for name, site in self._trace(data).items():
            if site["type"] not in ("sample", "deterministic"):
                continue
            shape = np.shape(site["value"])
            event_dim = site["fn"].event_dim if site["type"] == "sample" else 0
            plates = {frame.dim: frame for frame in site.get("cond_indep_stack", [])}
            names = []
            for axis in range(len(shape)):
                frame = plates.get(axis - len(shape) + event_dim)
                if frame is not None and frame.size == shape[axis]:
                    names.append(frame.name)
                    coords[frame.name] = tuple(range(frame.size))
                else:
                    names.append(f"{name}_dim_{axis}")
            if any(label in coords for label in names):
                dims.append((name, tuple(names)))
        return tuple(dims), tuple(coords.items())

    def _trace(self, data: tuple[Array, ...]) -> dict[str, Any]:
        args, kwargs = self.call(data)
        # values by initialisation, as some laws, such as ImproperUniform, cannot be drawn from
        model = handlers.substitute(handlers.seed(self.model, 0), substitute_fn=init_to_uniform)
        return handlers.trace(model).get_trace(*args, **kwargs)

    def _latent(self, data: tuple[Array, ...]) -> dict[str, Any]:
        return {
            name: site
            for name, site in self._trace(data).items()
            if site["type"] == "sample" and not site["is_observed"]
        }


@functools.lru_cache(maxsize=256)
def _shapes_of(model: NumPyroModel, data: tuple[tuple[tuple[int, ...], Any], ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of an unconstrained position, given those of the data."""

    def position(*data: Array) -> dict[str, Array]:
        return model.unconstrain({name: site["value"] for name, site in model._latent(data).items()}, data)

    return jax.eval_shape(position, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in data))


def _plain(leaf: Any) -> Any:
    """An argument of a model: an array if it is one, else as it is, to be hashed with the model."""
    if hasattr(leaf, "columns"):
        raise ValueError(
            f"arguments of the model must be arrays or hashable, got a {type(leaf).__name__}; pass its columns as "
            "arrays, such as table['column'].to_numpy()"
        )
    if not isinstance(leaf, np.ndarray | jax.Array):
        try:
            hash(leaf)
            return leaf
        except TypeError as error:
            if not hasattr(leaf, "__array__"):
                raise ValueError(
                    f"arguments of the model must be arrays or hashable, got {type(leaf).__name__}"
                ) from error
            leaf = np.asarray(leaf)  # such as a column of a table
    return errors.as_array("an argument of the model")(leaf)


class _Array:
    """Marks the place of an array among the arguments of a model."""

    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()
