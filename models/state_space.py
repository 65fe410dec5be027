"""State-space models: three laws, from which every filter, smoother and sampler is derived.

    x_0 ~ initial(),   x_t | x_{t-1} ~ transition(x_{t-1}, t)  (t >= 1),   y_t | x_t ~ observation(x_t, t)  (t >= 0)

y_0 is observed, and every series has T rows. A row of y that is NaN is missing: it says nothing about x_t. A law is a
numpyro distribution, or a pair of functions (sample(key) -> x, log_prob(x) -> scalar); an observation whose sampler is
None can be filtered, and not simulated.
"""

import abc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, Key, PyTree
from numpyro.distributions.batch_util import promote_batch_shape

from bayesinf import errors
from bayesinf.models.square_root import drop_missing, gaussian_log_prob

__all__ = [
    "StateSpaceModel",
    "check_model",
    "check_observations",
    "check_series",
    "log_joint",
    "log_likelihood",
    "log_prob",
    "observation_log_prob",
    "rows_outside_support",
    "sample",
    "sample_each",
    "sample_many",
    "simulate",
]

Law = Any  # a numpyro distribution, or a (sample, log_prob) pair


class StateSpaceModel(eqx.Module):
    """A state-space model; parameters are fields, and so pytree leaves.

    Subclasses define `initial`, `transition` and `observation`. They may also define

        proposal(x_prev, y, t), initial_proposal(y)   the laws from which a guided filter moves its particles,
        lookahead(x_prev, y, t)                       log of a first-stage weight, for auxiliary filters,
        log_transition_bound(t)                       sup over x, x' of the log transition density,
        log_initial_ratio(x, y), log_move_ratio(x_prev, x, y, t)    log p/q of a state drawn by a proposal q, where
                                                      neither has a density of its own,
        summarize(log_weights, xs)                    what filters estimate, instead of mean and sd of the state.

    What changes from call to call belongs into the fields: numbers that a method reads from its module are those of the
    first call, as everywhere in JAX.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> class RandomWalk(bi.models.StateSpaceModel):
        ...     scale: float
        ...     def initial(self): return dist.Normal(0.0, 1.0)
        ...     def transition(self, x_prev, t): return dist.Normal(x_prev, self.scale)
        ...     def observation(self, x, t): return dist.Poisson(jax.numpy.exp(x))
        >>> xs, ys = bi.models.simulate(jax.random.key(0), RandomWalk(0.1), num_steps=10)
        >>> xs.shape, ys.shape
        ((10,), (10,))
    """

    # whether states hold what the observations said, so that nothing but `proposal` can draw them
    is_data_driven: ClassVar[bool] = False

    @abc.abstractmethod
    def initial(self) -> Law:
        """The law of x_0."""

    @abc.abstractmethod
    def transition(self, x_prev: PyTree, t: Int[Array, ""]) -> Law:
        """The law of x_t given x_{t-1}, for t >= 1."""

    @abc.abstractmethod
    def observation(self, x: PyTree, t: Int[Array, ""]) -> Law:
        """The law of y_t given x_t, for t >= 0."""


def sample(key: Key[Array, ""], law: Law) -> PyTree:
    """One draw."""
    return law[0](key) if isinstance(law, tuple) else law.sample(key)


def log_prob(law: Law, x: PyTree) -> Float[Array, ""]:
    """The log density at x, summed over the components of x where the law is over independent components."""
    if isinstance(law, tuple):
        return law[1](x)
    if type(law) is dist.MultivariateNormal and not law.batch_shape:  # without a LAPACK call for every pair of states
        return gaussian_log_prob(jnp.asarray(x) - law.loc, jnp.asarray(law.scale_tril))
    return jnp.sum(jnp.asarray(law.log_prob(x)))


def sample_many(key: Key[Array, ""], law: Law, num: int) -> PyTree:
    """Independent draws, with a leading axis."""
    if isinstance(law, tuple):
        return jax.vmap(law[0])(jax.random.split(key, num))
    return law.sample(key, (num,))


def sample_each(key: Key[Array, ""], law_of: Callable[..., Law], xs: PyTree) -> PyTree:
    """One draw from `law_of(x)` for every x along the leading axis of `xs`, from one key where the law allows.

    A single batched draw is several times faster than one key a particle, but only for laws whose sampler is
    elementwise in its batch; the others get a key each.
    """
    num = jax.tree.leaves(xs)[0].shape[0]
    if _draws_in_batches(law_of(jax.tree.map(lambda leaf: leaf[0], xs))):
        return promote_batch_shape(jax.vmap(law_of)(xs)).sample(key)
    return jax.vmap(lambda k, x: sample(k, law_of(x)))(jax.random.split(key, num), xs)


def observation_log_prob(model: StateSpaceModel, x: PyTree, y: PyTree, t: Int[Array, ""]) -> Float[Array, ""]:
    """Log p(y_t | x_t) of what is there of y_t: missing components are integrated out.

    That is exact for independent components (`to_event`, or a batch of laws) and for MultivariateNormal. No other law
    tells the density of a part of y: for those a row is missing as a whole, and a row of which only a part is missing
    has density NaN, an invalid weight (`check_observations` refuses it beforehand).
    """
    law = model.observation(x, t)
    if isinstance(law, tuple):
        missing = jnp.stack([jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(y)])
        partly = jnp.stack([jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(y)])
        # zeros stand in for what is missing, as their density is not used: the pair tells nothing of its support
        safe = jax.tree.map(lambda leaf: jnp.where(jnp.any(partly), 0.0, leaf), y)
        return jnp.where(jnp.all(missing), 0.0, jnp.where(jnp.any(partly), jnp.nan, log_prob(law, safe)))

    if not hasattr(y, "shape"):
        raise ValueError(
            f"ys must be one array where model.observation(x, t) is a distribution, got {type(y).__name__}; the law of "
            "several arrays is a pair (sample, log_prob)"
        )
    # a single number may lack an axis, or have one too many; anything else would be paired off with the wrong law
    if y.shape != law.shape() and not y.size == math.prod(law.shape()) == 1:
        raise ValueError(
            f"ys must have rows of shape {law.shape()}, the shape of model.observation(x, t), got {y.shape}"
        )
    y = y.reshape(law.shape())
    while isinstance(law, dist.Independent):
        law = law.base_dist
    is_missing = jnp.isnan(y)
    if isinstance(law, dist.MultivariateNormal):
        return jnp.sum(_partial_log_prob(law.loc, law.scale_tril, y, is_missing))
    event = tuple(range(-law.event_dim, 0))
    missing, partly = jnp.all(is_missing, event), jnp.any(is_missing, event)
    safe = jnp.where(jnp.expand_dims(partly, event), _inside(law, y), y)
    log_probs = _discrete_log_prob(law, safe) if law.support.is_discrete else law.log_prob(safe)  # pyright: ignore[reportOptionalMemberAccess]
    return jnp.sum(jnp.where(missing, 0.0, jnp.where(partly, jnp.nan, log_probs)))


def log_joint(model: StateSpaceModel, path: PyTree, ys: PyTree) -> Float[Array, ""]:
    """Log p(x_{0:T-1}, y_{0:T-1}), all steps at once; `path` and `ys` have a leading axis T."""
    first = jax.tree.map(lambda leaf: leaf[0], path)
    before, after = (jax.tree.map(lambda leaf: leaf[:-1], path), jax.tree.map(lambda leaf: leaf[1:], path))
    ts = jnp.arange(1, 1 + jax.tree.leaves(before)[0].shape[0])
    moves = jax.vmap(lambda x_prev, x, t: log_prob(model.transition(x_prev, t), x))(before, after, ts)
    return log_prob(model.initial(), first) + jnp.sum(moves) + log_likelihood(model, path, ys)


def log_likelihood(model: StateSpaceModel, path: PyTree, ys: PyTree) -> Float[Array, ""]:
    """Log p(y_{0:T-1} | x_{0:T-1}) of what is there of ys."""
    ts = jnp.arange(jax.tree.leaves(ys)[0].shape[0])
    return jnp.sum(jax.vmap(lambda x, y, t: observation_log_prob(model, x, y, t))(path, ys, ts))


def _discrete_log_prob(law: dist.Distribution, y: Array) -> Array:
    """The log probability of what is whole in y; laws of classes take nothing but integers."""
    whole = jnp.round(y)
    is_whole = jnp.all(y == whole, axis=tuple(range(-law.event_dim, 0)))
    return jnp.where(is_whole, law.log_prob(whole.astype(jnp.int32)), -jnp.inf)


@partial(jnp.vectorize, signature="(k),(k,k),(k),(k)->()")
def _partial_log_prob(mean: Array, tril: Array, y: Array, is_missing: Array) -> Array:
    """The Gaussian log density of the components that are there."""
    tril = jax.lax.cond(
        jnp.any(is_missing), lambda: drop_missing(is_missing, jnp.zeros_like(tril), tril)[1], lambda: tril
    )
    residual = jnp.where(is_missing, 0.0, jnp.where(is_missing, 0.0, y) - mean)
    return gaussian_log_prob(residual, tril, is_missing)


def simulate(key: errors.KeyLike, model: StateSpaceModel, num_steps: int) -> tuple[PyTree, PyTree]:
    """Draws states and observations from the model.

    Args:
        key: PRNG key or seed.
        model: a state-space model.
        num_steps: T >= 1; a longer series continues a shorter one of the same key.

    Returns:
        (xs, ys), each with leading axis T.

    Raises:
        ValueError: `num_steps` is no whole number of at least 1, or a method of `model` returns no law, or one without
            a sampler, or laws of x_0 and x_t that differ in shape.

    Example:
        >>> import bayesinf as bi
        >>> xs, ys = bi.models.simulate(0, bi.models.StochasticVolatility(-1.0, 0.97, 0.2), num_steps=50)
        >>> xs.shape, ys.shape
        ((50,), (50,))
    """
    errors.check_count("num_steps", num_steps)
    _check_instance(model)
    return _simulate(errors.as_key(key), model, num_steps)


@partial(jax.jit, static_argnums=2)
def _simulate(key: Array, model: StateSpaceModel, num_steps: int) -> tuple[PyTree, PyTree]:
    check_model(model)
    key_initial, key_steps, key_observe = jax.random.split(key, 3)
    x_0 = jax.tree.map(jnp.asarray, sample(key_initial, model.initial()))

    def move(x_prev, t):
        x = sample(jax.random.fold_in(key_steps, t), model.transition(x_prev, t))
        x = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), x, x_prev)
        return x, x

    def observe(x, t):
        law = _as_law("observation(x, t)", model.observation(x, t))
        return sample(jax.random.fold_in(key_observe, t), law)

    ts = jnp.arange(num_steps)
    _, xs = jax.lax.scan(move, x_0, ts[1:])
    xs = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x_0, xs)
    return xs, jax.vmap(observe)(xs, ts)


def check_model(model: StateSpaceModel) -> None:
    """That the laws of a model are laws, and that x_t is of the structure, shape and kind of x_{t-1}; for tracing."""
    x_0 = jax.eval_shape(lambda key: _arrays(sample(key, _as_law("initial()", model.initial()))), jax.random.key(0))
    if model.is_data_driven:
        return
    t = jnp.ones((), jnp.int32)

    def move(key: Key[Array, ""], x_prev: PyTree) -> PyTree:
        _as_law("observation(x, t)", model.observation(x_prev, t), is_drawn=False)
        return _arrays(sample(key, _as_law("transition(x_prev, t)", model.transition(x_prev, t))))

    x_1 = jax.eval_shape(move, jax.random.key(0), x_0)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, x) for x in (x_0, x_1)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"model.transition must draw states of the shape of model.initial, {shapes[0]}, got {shapes[1]}"
        )
    for old, new in zip(jax.tree.leaves(x_0), jax.tree.leaves(x_1), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating) and not jnp.issubdtype(old.dtype, jnp.floating):
            raise ValueError(
                f"model.initial draws states of type {old.dtype} and model.transition of {new.dtype}, which would be "
                "cut off; draw the first as floating point too, such as with dist.Delta(0.0)"
            )


def _check_instance(model: Any) -> None:
    if not isinstance(model, StateSpaceModel):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"model must be an instance of a StateSpaceModel, got {what}")


def _as_law(name: str, law: Any, is_drawn: bool = True) -> Law:
    is_pair = isinstance(law, tuple) and len(law) == 2 and callable(law[1])
    if is_pair and law[0] is None and is_drawn:
        raise ValueError(f"model.{name} has no sampler: its pair begins with None, where sample(key) is needed")
    is_pair = is_pair and (law[0] is None or callable(law[0]))
    if not is_pair and not (hasattr(law, "sample") and hasattr(law, "log_prob")):
        raise ValueError(
            f"model.{name} must return a numpyro distribution, or a pair of functions (sample(key), log_prob(x)), "
            f"got {type(law).__name__}"
        )
    return law


def _arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


def check_series(ys: PyTree) -> PyTree:
    """Observations as arrays of floating point with one common number of rows, at least one.

    Whole numbers (counts, classes, truth values) are converted; infinite values are refused.
    """
    if isinstance(ys, list | tuple) and all(isinstance(y, int | float | np.number) or y is None for y in ys):
        ys = np.asarray(ys, float)  # a list of numbers is a series, not a pytree of scalars; None is NaN
    ys = errors.as_arrays("ys", ys)
    leaves = jax.tree.leaves(ys)
    if not leaves:
        raise ValueError("ys must hold at least one array of observations, got an empty pytree")
    for leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0]:
            shapes = [leaf.shape for leaf in leaves[:5]]
            raise ValueError(f"ys must have one leading axis of time, got shapes {shapes} in {len(leaves)} arrays")
        if leaf.shape[0] == 0:
            raise ValueError("ys must have at least one row; the law of x_0 alone is model.initial()")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"ys must be numbers, got {leaf.dtype}")
        if errors.is_concrete(leaf) and np.any(np.isinf(np.asarray(leaf))):
            rows = np.unique(np.nonzero(np.isinf(np.asarray(leaf)))[0])[:5]
            raise ValueError(f"ys must be finite, or NaN where missing; rows {rows.tolist()} are infinite")
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(float), ys)


def check_observations(model: StateSpaceModel, ys: PyTree) -> PyTree:
    """`check_series`, and that the model can say the density of what is there of every row; on the host."""
    _check_instance(model)
    ys = check_series(ys)
    if not errors.is_concrete(ys):
        return ys
    masks = [np.isnan(np.asarray(leaf)) for leaf in jax.tree.leaves(ys)]
    if not any(np.any(mask) for mask in masks):
        return ys
    event_dim = _event_dim(model)
    if event_dim is None:
        masks = [np.concatenate([mask.reshape(mask.shape[0], -1) for mask in masks], axis=1)]
        event_dim = 1
    axes = tuple(range(-event_dim, 0))
    is_partial = np.any(masks[0], axes) & ~np.all(masks[0], axes)
    if np.any(is_partial):
        rows = np.unique(np.nonzero(is_partial)[0])[:5]
        raise ValueError(
            "ys must be NaN in a whole row or in none of it, as the law model.observation has no density for a part of "
            f"y, got rows {rows.tolist()}; use independent components (to_event), or a MultivariateNormal"
        )
    return ys


def rows_outside_support(model: StateSpaceModel, ys: PyTree) -> list[int]:
    """Rows of ys that no state explains, where the support of the observation law depends on no state; on the host."""
    x = sample(jax.random.key(0), model.initial())
    law = model.observation(x, jnp.zeros((), jnp.int32))
    while isinstance(law, dist.Independent):
        law = law.base_dist
    if isinstance(law, tuple) or isinstance(getattr(type(law), "support", None), property):
        return []

    def is_outside(y: Array, t: Array) -> Array:
        law = model.observation(x, t)
        y = y.reshape(law.shape())
        # of a law over vectors the support is one answer for all components, those that are missing among them
        return ~jnp.all(law.support(jnp.where(jnp.isnan(y), _inside(law, y), y)))

    return np.flatnonzero(jax.vmap(is_outside)(ys, jnp.arange(ys.shape[0]))).tolist()


def _event_dim(model: StateSpaceModel) -> int | None:
    """How many trailing axes of y are missing together or not at all; None for the whole row of a pair."""
    found = []

    def record(key):
        law = model.observation(sample(key, model.initial()), jnp.zeros((), jnp.int32))
        while isinstance(law, dist.Independent):
            law = law.base_dist
        found.append(_missing_together(law))

    jax.eval_shape(record, jax.random.key(0))
    return found[0]


def _missing_together(law: Law) -> int | None:
    if isinstance(law, tuple):
        return None
    return 0 if isinstance(law, dist.MultivariateNormal) else law.event_dim


# Laws whose sampler is elementwise in a batch shape that `promote_batch_shape` gets right, so that one key serves a
# whole population. Not LogNormal (all draws would share their noise), nor an expanded law (its axes would be mixed up).
_ELEMENTWISE = (dist.Normal, dist.MultivariateNormal, dist.Laplace, dist.Cauchy, dist.Logistic)


def _draws_in_batches(law: Law) -> bool:
    return _draws_in_batches(law.base_dist) if isinstance(law, dist.Independent) else type(law) in _ELEMENTWISE


def _inside(law: dist.Distribution, like: Array) -> Array:
    """A value inside the support, of the shape of `like`, to stand where data are missing: keeps gradients finite."""
    return jnp.broadcast_to(law.support.feasible_like(jnp.zeros(jnp.shape(like))), jnp.shape(like))  # pyright: ignore[reportOptionalMemberAccess]
