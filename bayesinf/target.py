"""Targets: a log density with its data, and what is known of its constraints and names.

The target owns the evaluation: every gradient kernel keeps `(position, evaluation)` in its state, so kernels on one
target share what is cached. The function is static and the data are pytree leaves, so a new data set of the same shape
compiles nothing.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.captured import captured, current
from bayesinf.kernel import Evaluation, is_finite
from bayesinf.numpyro_model import NumPyroModel

__all__ = ["Target", "as_target"]


class Target(eqx.Module):
    """An unnormalised log density on an unconstrained space.

        pi(x) proportional to exp(logdensity(x, data))

    Args:
        logdensity: `logdensity(position)`, or `logdensity(position, data)` when `data` is given; returns a scalar. Put
            arrays that change between runs into `data`, not into the function: then they never recompile.
        data: any pytree of arrays.

    Raises:
        ValueError: `logdensity` is no function, or `data` holds what is no array of numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x, y: -0.5 * jnp.sum((x - y) ** 2), jnp.ones(3))
        >>> float(target.evaluate(jnp.zeros(3), order=1).logdensity)
        -1.5
    """

    logdensity_fn: Callable[..., Any] = eqx.field(static=True)
    data: PyTree
    model: NumPyroModel | None = eqx.field(static=True)
    _labels: tuple[Any, ...] = eqx.field(static=True)

    def __init__(self, logdensity: Callable[..., Any], data: PyTree = None):
        self.data = errors.as_arrays("data", data)
        errors.check_arguments("logdensity", logdensity, "position" if data is None else "position, data")
        self.logdensity_fn = captured(logdensity)
        self.model = None
        self._labels = ((), ())

    @classmethod
    def from_numpyro(cls, model: Callable[..., Any], *args: Any, **kwargs: Any) -> "Target":
        """The joint log density of any NumPyro model with continuous latent sites, in unconstrained space.

        Positions are dicts from site name to unconstrained array; `constrain` maps them to the model's space and adds
        its deterministic sites. Array arguments are data (new ones of the same shape compile nothing); other
        arguments are part of the model, and so are arrays whose values decide about its shape, as in
        `num_groups = int(group.max()) + 1`: new ones compile anew. Names of plates become the dims of the draws.

        Args:
            model: a function of NumPyro primitives.
            *args, **kwargs: what the model is called with; observed data among them.

        Raises:
            ValueError: a latent site is discrete, or the model has no latent site (the sites are named), or it asks for
                the value of something that is known only while it runs.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist
            >>> import bayesinf as bi
            >>> def model(y):
            ...     scale = numpyro.sample("scale", dist.HalfNormal(2.0))
            ...     numpyro.sample("y", dist.Normal(0.0, scale), obs=y)
            >>> target = bi.Target.from_numpyro(model, jax.numpy.ones(5))
            >>> sorted(target.init(jax.random.key(0), num_chains=4))
            ['scale']
        """
        wrapped, data = NumPyroModel.build(model, args, kwargs)
        target = cls(wrapped, data)
        return _with(target, model=wrapped, _labels=wrapped.labels(data))

    def logdensity(self, position: PyTree) -> Float[Array, ""]:
        """Log pi(position), up to a constant."""
        value = self.logdensity_fn(position) if self.data is None else self.logdensity_fn(position, self.data)
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"logdensity must return a number, got {type(value).__name__}; is a return missing?"
            ) from error
        if value.shape != ():
            raise ValueError(f"logdensity must return a scalar, got shape {value.shape}; sum over observations")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"logdensity must return a floating-point number, got {value.dtype}")
        return value

    def evaluate(self, position: PyTree, order: int = 0) -> Evaluation:
        """The log density, and for order=1 its gradient, in one pass."""
        if order not in (0, 1):
            raise ValueError(f"order must be 0 or 1, got {order!r}; for more derivatives, jax.hessian of logdensity")
        if order == 0:
            return Evaluation(self.logdensity(position))
        return Evaluation(*jax.value_and_grad(self.logdensity)(position))

    def constrain(self, position: PyTree) -> PyTree:
        """The position in the model's own space, with its deterministic sites; the identity without a model."""
        return position if self.model is None else self.model.constrain(position, self.data)

    def unconstrain(self, values: PyTree) -> PyTree:
        """The inverse of `constrain` on the latent sites."""
        return values if self.model is None else self.model.unconstrain(values, self.data)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the dimensions of each variable of the constrained draws."""
        return {name: list(dims) for name, dims in self._labels[0]}

    @property
    def coords(self) -> dict[str, list[Any]]:
        """Coordinate values of each named dimension."""
        return {name: list(values) for name, values in self._labels[1]}

    def with_labels(self, dims: Mapping[str, Sequence[str]] = {}, coords: Mapping[str, Sequence[Any]] = {}) -> "Target":
        """The same target with names for the dimensions of its draws, over those known already."""
        merged_dims = {name: tuple(value) for name, value in {**self.dims, **dims}.items()}
        merged_coords = {name: tuple(np.asarray(value).tolist()) for name, value in {**self.coords, **coords}.items()}
        return _with(self, _labels=(tuple(merged_dims.items()), tuple(merged_coords.items())))

    def init(
        self,
        key: errors.KeyLike,
        num_chains: int = 4,
        *,
        template: PyTree = None,
        radius: float = 2.0,
        max_tries: int = 100,
    ) -> PyTree:
        """Starting points with a finite log density and gradient, uniform on [-radius, radius] in every coordinate.

        Args:
            key: PRNG key or seed.
            num_chains: length c of the leading axis of every returned leaf.
            template: a position of the right structure and shape; needed only when the target is not from NumPyro.
            radius: half the width of the box, in unconstrained space (Stan's default, 2).
            max_tries: draws per chain before giving up.

        Returns:
            A position whose leaves have a leading axis of chains, as `sample` takes it.

        Raises:
            ValueError: an argument is out of range, or `template` is needed and missing or not of floating point.
            InitializationError: some chain found no finite point; names the sites whose log density or gradient is
                not finite.
        """
        errors.check_count("num_chains", num_chains)
        errors.check_count("max_tries", max_tries)
        errors.check_positive("radius", radius)
        if template is None:
            if self.model is None:
                raise ValueError("template is needed to draw starting points: pass one position, such as jnp.zeros(3)")
            template = self.model.template(self.data)
        errors.check_floating("template", template)
        template = jax.tree.map(jnp.asarray, template)

        key, target = errors.as_key(key), current(self)
        positions, is_ok = _draw_starts(target, key, template, jnp.asarray(radius), num_chains)
        for attempt in range(1, max_tries):
            if np.all(is_ok):
                return positions
            fresh, is_fresh_ok = _draw_starts(
                target, jax.random.fold_in(key, attempt), template, jnp.asarray(radius), num_chains
            )
            positions = jax.tree.map(functools.partial(_where_chain, is_ok), positions, fresh)
            is_ok = is_ok | is_fresh_ok
        if np.all(is_ok):
            return positions
        chain = int(np.flatnonzero(~np.asarray(is_ok))[0])
        raise errors.InitializationError(
            f"no starting point with a finite log density and gradient in {max_tries} tries (chain {chain}). "
            + self.explain(jax.tree.map(lambda leaf: leaf[chain], positions))
        )

    def explain(self, position: PyTree) -> str:
        """Says what of the log density at `position` is not finite: the sites of a model, or the gradient's leaves."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPyro warns of values outside a support: that is what is said below
            evaluation = self.evaluate(position, order=1)
            sites = {} if self.model is None else self.model.site_log_probs(position, self.data)
        if bool(is_finite(evaluation)):
            return "The log density and its gradient are finite."
        bad = {name: value for name, value in sites.items() if not np.isfinite(value)}
        if bad:
            listed = ", ".join(f"{name!r} ({value})" for name, value in bad.items())
            return f"Sites whose log density is not finite: {listed}. Check their data, support and parameters."
        if not np.isfinite(evaluation.logdensity):
            return f"The log density is {float(evaluation.logdensity)}."
        leaves = jax.tree_util.tree_leaves_with_path(evaluation.grad)
        bad_leaves = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.all(np.isfinite(leaf))]
        return f"The log density is finite but its gradient is not, at position{', position'.join(bad_leaves)}."


def as_target(target: Any) -> Any:
    """A target from a target or a function of the position; what kernels convert their `target` with."""
    if hasattr(target, "evaluate"):
        return target
    owner = getattr(target, "__self__", None)
    if isinstance(owner, Target) and getattr(target, "__name__", "") == "logdensity":
        return owner  # with its data as arguments
    if callable(target):
        return Target(target)
    raise ValueError(f"target must be a Target or a function of the position, got {type(target).__name__}")


def _with(target: Target, **fields: Any) -> Target:
    """A copy with some fields set; `dataclasses.replace` does not fit a hand-written __init__."""
    copy = object.__new__(Target)
    for field in dataclasses.fields(target):
        object.__setattr__(copy, field.name, fields.get(field.name, getattr(target, field.name)))
    return copy


@eqx.filter_jit
def _draw_starts(target: Target, key: Key[Array, ""], template: PyTree, radius: Array, num_chains: int):
    def draw(key):
        leaves, treedef = jax.tree.flatten(template)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.uniform(k, leaf.shape, leaf.dtype, -1.0, 1.0) * radius.astype(leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        position = jax.tree.unflatten(treedef, drawn)
        return position, is_finite(target.evaluate(position, order=1))

    return jax.vmap(draw)(jax.random.split(key, num_chains))


def _where_chain(is_ok: Array, old: Array, new: Array) -> Array:
    return jnp.where(jnp.reshape(is_ok, (-1,) + (1,) * (old.ndim - 1)), old, new)
