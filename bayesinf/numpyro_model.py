"""A NumPyro model as pure functions of (position, data): the atoms of `Target.from_numpyro`.

NumPyro does the work (supports, bijections, Jacobians, dynamic supports); this file separates the array arguments,
which travel as data, from everything else, which is hashed with the model, so that new data never recompile. A model
may look at the values of an array while it is traced, as in `num_groups = int(group.max()) + 1`: then its arrays of
whole numbers, or if need be all of them, are hashed with the model too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    static: tuple[Any, ...]  # one entry an argument leaf; _ARRAY where it travels as data, _Constant where it does not

    @classmethod
    def build(cls, model: Callable[..., Any], args: tuple, kwargs: dict) -> tuple["NumPyroModel", tuple[Array, ...]]:
        """Splits the arguments and checks that the model has continuous latent sites."""
        if not callable(model):
            raise ValueError(f"model must be a function of NumPyro primitives, got {type(model).__name__}")
        leaves, treedef = jax.tree.flatten((args, kwargs))
        leaves = [_plain(leaf) for leaf in leaves]
        self, data = cls._split(captured(model), treedef, leaves)
        latent = {name: site for name, site in self._structure(data).items() if site.is_latent}
        discrete = [name for name, site in latent.items() if site.is_discrete]
        if discrete:
            raise ValueError(
                f"latent sites {discrete} are discrete, and a gradient kernel moves continuous sites only; "
                "sum them out of the model, or give it them as data"
            )
        if not latent:
            raise ValueError(f"model {getattr(model, '__name__', model)!r} has no latent site: nothing to infer")
        return self, data

    @classmethod
    def _split(
        cls, model: Callable[..., Any], treedef: Any, leaves: list[Any]
    ) -> tuple["NumPyroModel", tuple[Array, ...]]:
        """The model with as few constants as it can be traced with, and the other arrays."""
        arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray | jax.Array)]
        whole = [leaf for leaf in arrays if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
        for constants in ([], whole, arrays):
            known = {id(leaf) for leaf in constants if errors.is_concrete(leaf)}
            travels = [isinstance(leaf, np.ndarray | jax.Array) and id(leaf) not in known for leaf in leaves]
            data = tuple(leaf for leaf, moves in zip(leaves, travels, strict=True) if moves)
            static = tuple(
                _ARRAY if moves else _Constant(leaf) if id(leaf) in known else leaf
                for leaf, moves in zip(leaves, travels, strict=True)
            )
            self = cls(model, treedef, static)
            try:
                self._structure(data)
            except _VALUE_NEEDED as error:
                refusal = error
            else:
                return self, data
        raise ValueError(
            "model must be traceable: it asks for the value of something that is known only while it runs. Take "
            "lax.cond or jnp.where instead of if, and pass sizes as numbers, not computed by jnp from the data"
        ) from refusal

    def call(self, data: tuple[Array, ...]) -> tuple[tuple, dict]:
        """The model's (args, kwargs) with `data` put back."""
        arrays = iter(data)
        leaves = [
            next(arrays) if leaf is _ARRAY else leaf.array if isinstance(leaf, _Constant) else leaf
            for leaf in self.static
        ]
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
        latent = {name: values[name] for name, site in self._structure(data).items() if site.is_latent}
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

    def _structure(self, data: tuple[Array, ...]) -> dict[str, "_Site"]:
        return _structure_of(self, tuple((leaf.shape, leaf.dtype) for leaf in data))

    def site_log_probs(self, position: dict[str, Array], data: tuple[Array, ...]) -> dict[str, float]:
        """The log density of each site, latent and observed, summed over the site."""
        args, kwargs = self.call(data)
        substituted = handlers.substitute(self.model, data=self.constrain(position, data))
        _, trace = util.log_density(substituted, args, kwargs, {})
        sites = [(name, site) for name, site in trace.items() if site["type"] == "sample"]
        return {name: float(jnp.sum(site["fn"].log_prob(site["value"]))) for name, site in sites}

    def observed(self, data: tuple[Array, ...]) -> dict[str, Any]:
        """The observed sites and their values, on the host unless traced; for a factor they are empty."""
        sites = self._trace(data)
        return {
            name: np.asarray(site["value"]) if errors.is_concrete(site["value"]) else site["value"]
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
        for name, site in self._structure(data).items():
            if not (site.is_sample or site.is_deterministic):
                continue
            plates = {frame.dim: frame for frame in site.plates}
            names = []
            for axis in range(len(site.shape)):
                frame = plates.get(axis - len(site.shape) + site.event_dim)
                if frame is not None and frame.size == site.shape[axis]:
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


class _Site(NamedTuple):
    """What is known of a site without any number."""

    is_sample: bool
    is_deterministic: bool
    is_observed: bool
    is_discrete: bool
    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[Any, ...]

    @property
    def is_latent(self) -> bool:
        return self.is_sample and not self.is_observed


@functools.lru_cache(maxsize=256)
def _structure_of(model: NumPyroModel, data: tuple[tuple[tuple[int, ...], Any], ...]) -> dict[str, _Site]:
    """The sites in their order, given shapes and dtypes of the data; traced, so that nothing compiles."""
    found: dict[str, _Site] = {}

    def look(*data: Array) -> None:
        for name, site in model._trace(data).items():
            is_sample = site["type"] == "sample"
            found[name] = _Site(
                is_sample=is_sample,
                is_deterministic=site["type"] == "deterministic",
                is_observed=is_sample and site["is_observed"],
                is_discrete=is_sample and bool(site["fn"].support.is_discrete),
                shape=np.shape(site["value"]),
                event_dim=site["fn"].event_dim if is_sample else 0,
                plates=tuple(site.get("cond_indep_stack", ())),
            )

    jax.eval_shape(look, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in data))
    return found


@functools.lru_cache(maxsize=256)
def _shapes_of(model: NumPyroModel, data: tuple[tuple[tuple[int, ...], Any], ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of an unconstrained position, given those of the data."""

    def position(*data: Array) -> dict[str, Array]:
        return model.unconstrain({name: site.get("value") for name, site in model._trace(data).items()}, data)

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
_VALUE_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class _Constant:
    """An array that is a part of the model, known by its values."""

    def __init__(self, array: Any):
        self.array = np.array(array)
        self.array.flags.writeable = False
        self.content = (self.array.shape, self.array.dtype, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and other.content == self.content

    def __hash__(self) -> int:
        return hash(self.content)
