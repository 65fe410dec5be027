"""Additive functionals of a path, and the statistics of them that PaRIS carries with every particle.

    h(x_{0:T-1}) = h_0(x_0) + sum_t h_t(x_{t-1}, x_t)
    tau_0^i = h_0(X_0^i),    tau_t^i = (1/M) sum_{j=1..M} [tau_{t-1}^{J_t^{i,j}} + h_t(X_{t-1}^{J_t^{i,j}}, X_t^i)]

References:
    Olsson and Westerborn (2017), doi:10.3150/16-BEJ801.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.cloud import Cloud
from bayesinf.models.state_space import StateSpaceModel, sample
from bayesinf.resampling import gather
from bayesinf.weights import normalize

__all__ = [
    "AdditiveFunctional",
    "Statistics",
    "check_functional",
    "check_terms",
    "start_statistics",
    "update_statistics",
    "weighted_mean",
]


class AdditiveFunctional(eqx.Module):
    """h(x_{0:T-1}) = initial(x_0) + sum_{t >= 1} increment(x_{t-1}, x_t, t).

    Both terms return pytrees of one structure and shape, so that several functionals are smoothed at once. A function
    is compiled once; to give it arrays that change, pass `jax.tree_util.Partial(function, arrays)`.

    Attributes:
        initial: a function of x_0, or of x_0 and y_0.
        increment: a function of x_{t-1}, x_t and t, or of x_{t-1}, x_t, y_t and t.
        is_given_data: whether both terms are given the observation too. Static.

    Example:
        >>> import bayesinf as bi
        >>> moments = bi.kernels.AdditiveFunctional(
        ...     initial=lambda x0: {"sum": x0, "lagged": 0.0 * x0},
        ...     increment=lambda x_prev, x, t: {"sum": x, "lagged": x_prev * x},
        ... )
        >>> moments.increment(2.0, 3.0, 1)
        {'sum': 3.0, 'lagged': 6.0}
        >>> errors = bi.kernels.AdditiveFunctional(
        ...     lambda x, y: (y - x) ** 2, lambda x_prev, x, y, t: (y - x) ** 2, is_given_data=True
        ... )
    """

    initial: Callable[..., Any] = eqx.field(converter=as_pytree)
    increment: Callable[..., Any] = eqx.field(converter=as_pytree)
    is_given_data: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        errors.check_arguments("initial", self.initial, "x_0, y_0" if self.is_given_data else "x_0")
        arguments = "x_prev, x, y, t" if self.is_given_data else "x_prev, x, t"
        errors.check_arguments("increment", self.increment, arguments)

    def first_term(self, x: PyTree, y: PyTree) -> PyTree:
        """h_0, which may know y_0."""
        return self.initial(x, y) if self.is_given_data else self.initial(x)

    def term(self, x_prev: PyTree, x: PyTree, y: PyTree, t: Int[Array, ""]) -> PyTree:
        """h_t, which may know y_t."""
        return self.increment(x_prev, x, y, t) if self.is_given_data else self.increment(x_prev, x, t)

    def of_path(self, path: PyTree, ys: PyTree) -> PyTree:
        """h(x_{0:T-1}) of one path, with leading axis T."""
        first = self.first_term(*(jax.tree.map(lambda leaf: leaf[0], series) for series in (path, ys)))
        before = jax.tree.map(lambda leaf: leaf[:-1], path)
        after, rows = (jax.tree.map(lambda leaf: leaf[1:], series) for series in (path, ys))
        ts = jnp.arange(1, jax.tree.leaves(path)[0].shape[0])
        terms = jax.vmap(self.term)(before, after, rows, ts)
        return jax.tree.map(lambda a, b: a + jnp.sum(b, axis=0), first, terms)


class Statistics(NamedTuple):
    """The statistics tau^i of a population, as their weighted mean and what each differs by.

    Sums grow with the length of the series, differences do not: kept apart, neither rounds the other away, however long
    a stream goes on.

    Attributes:
        apart: tau^i - total, leading axis N.
        total: sum_i W^i tau^i.
        rounding: what `total` has lost to rounding so far, which the next step puts right.
    """

    apart: PyTree
    total: PyTree
    rounding: PyTree


def start_statistics(functional: AdditiveFunctional, cloud: Cloud, y: PyTree) -> Statistics:
    """tau_0^i = h_0(X_0^i), in the dtype of the weights."""
    tau = _as_statistics(jax.vmap(lambda x: functional.first_term(x, y))(cloud.particles), cloud)
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), tau)
    return _centred(cloud, tau, zeros, zeros)


def update_statistics(
    functional: AdditiveFunctional,
    statistics: Statistics,
    cloud_prev: Cloud,
    cloud: Cloud,
    J: Int[Array, "N m"],
    y: PyTree,
    t: Int[Array, ""],
) -> Statistics:
    """tau_t^i, the mean over j of tau_{t-1}^{J^{i,j}} + h_t(X_{t-1}^{J^{i,j}}, X_t^i)."""

    def increments(x, parents):
        return jax.vmap(lambda j: functional.term(gather(cloud_prev.particles, j), x, y, t))(parents)

    h = _as_statistics(jax.vmap(increments)(cloud.particles, J), cloud)
    tau = jax.tree.map(lambda old, new: jnp.mean(old + new, axis=1), gather(statistics.apart, J), h)
    return _centred(cloud, tau, statistics.total, statistics.rounding)


def weighted_mean(cloud: Cloud, statistics: Statistics) -> PyTree:
    """sum_i W_t^i tau_t^i; NaN where no weight is positive."""
    return jax.tree.map(lambda total, rest: total + rest, statistics.total, _mean(cloud, statistics.apart))


def _mean(cloud: Cloud, tau: PyTree) -> PyTree:
    log_weights, log_mean = normalize(cloud.log_weights)
    weights = jnp.where(jnp.isfinite(log_mean), jnp.exp(log_weights), jnp.nan)
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), tau)


def _centred(cloud: Cloud, tau: PyTree, total: PyTree, rounding: PyTree) -> Statistics:
    """The mean moved from tau to the total, by Kahan's sum; nothing where it is not finite."""
    means = jax.tree.map(lambda mean: jnp.where(jnp.isfinite(mean), mean, 0.0), _mean(cloud, tau))
    apart = jax.tree.map(jnp.subtract, tau, means)
    corrected = jax.tree.map(jnp.subtract, means, rounding)
    new = jax.tree.map(jnp.add, total, corrected)
    lost = jax.tree.map(lambda new, old, term: (new - old) - term, new, total, corrected)
    return Statistics(apart, new, lost)


def check_functional(functional: Any) -> None:
    """An AdditiveFunctional."""
    if not isinstance(functional, AdditiveFunctional):
        raise ValueError(
            f"functional must be an AdditiveFunctional(initial, increment), got {type(functional).__name__}"
        )


def check_terms(functional: AdditiveFunctional, model: StateSpaceModel, y: PyTree) -> None:
    """That both terms are real, of one structure and shape, for the states of the model and a row y; for tracing."""
    x = jax.eval_shape(lambda key: sample(key, model.initial()), jax.random.key(0))
    data = (y,) if functional.is_given_data else ()
    # of the functions themselves, which are traced once, and not of methods, which are made anew by every call
    terms = {
        "initial": jax.eval_shape(functional.initial, x, *data),
        "increment": jax.eval_shape(functional.increment, x, x, *data, jnp.ones((), jnp.int32)),
    }
    shapes = {name: jax.tree.map(lambda leaf: leaf.shape, term) for name, term in terms.items()}
    if shapes["initial"] != shapes["increment"]:
        raise ValueError(
            "functional.initial and functional.increment must return pytrees of one structure and shape, got the "
            f"shapes {shapes['initial']} and {shapes['increment']}"
        )
    for name, term in terms.items():
        leaves = jax.tree.leaves(term)
        if not leaves or any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
            raise ValueError(f"functional.{name} must return real numbers, got {term}")


def _as_statistics(values: PyTree, cloud: Cloud) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, cloud.log_weights.dtype), values)
