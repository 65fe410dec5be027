"""Conditional sequential Monte Carlo: a Markov kernel on the paths of a state-space model.

Given a reference path zeta_{0:T-1}, a particle filter is run in which slot 0 is held to the reference,

    X_t^0 = zeta_t,    A_t^i ~ Cat(W_{t-1}),  X_t^i ~ p(x_t | X_{t-1}^{A_t^i}),  i = 1..N-1,

with N - 1 free particles whose ancestors are independent draws, and a new path is drawn from what it leaves behind.
The law p(x_{0:T-1} | y_{0:T-1}) is invariant for every N >= 2. How the path is refreshed decides how fast it mixes:

    "ancestor"  the reference picks a new parent, A_t^0 ~ Cat(W_{t-1}^l p(zeta_t | X_{t-1}^l)), and the path is traced
                back from B_{T-1} ~ Cat(W_{T-1}) through the ancestors;
    "backward"  B_t ~ Cat(W_t^l p(X_{t+1}^{B_{t+1}} | X_t^l)) from the last step to the first;
    "none"      the genealogy alone: the early part of a long path is then never refreshed.

The first two have the same law for Markov models and mix in O(log T) sweeps at a fixed N; the last needs N of order T.

References:
    Andrieu, Doucet, Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x.
    Lindsten, Jordan, Schon (2014), https://jmlr.org/papers/v15/lindsten14a.html (ancestor sampling).
    Whiteley (2010), discussion of the first, doi:10.1111/j.1467-9868.2009.00736.x (backward sampling).
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Kernel, select
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.backward import backward_sample
from bayesinf.kernels.filter_steps import check_proposal
from bayesinf.kernels.particle_filter import particle_filter
from bayesinf.models.state_space import (
    StateSpaceModel,
    check_model,
    check_observations,
    check_series,
    log_prob,
    sample,
)
from bayesinf.resampling import gather
from bayesinf.weights import clean, compensated_sum, is_degenerate, log_mean_exp, num_invalid

__all__ = [
    "REFRESHMENTS",
    "ConditionalSMC",
    "PathInfo",
    "PathState",
    "check_path",
    "draw_last",
    "draw_line",
    "draw_parent",
    "finish_sweep",
    "first_paths",
]

REFRESHMENTS = ("ancestor", "backward", "none")


class PathState(NamedTuple):
    """A path x_{0:T-1}: every leaf has leading axis T."""

    position: PyTree


class PathInfo(NamedTuple):
    """What one sweep over a path tells.

    Attributes:
        acceptance_rate: share of the time steps at which the path left the reference.
        is_accepted: whether it left the reference anywhere.
        is_divergent: whether all weights vanished at some step; the path was then kept.
        num_gradients: 0.
        is_updated: at which steps the path left the reference; its mean over sweeps should be well above 0 for all t.
        log_evidence: log Zhat of the conditional filter; 1 / Zhat has mean 1 / p(y) when the reference is exact.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    is_updated: Bool[Array, " t"]
    log_evidence: Float[Array, ""]
    num_invalid: Int[Array, ""]


class ConditionalSMC(Kernel):
    """Conditional SMC on paths: leaves p(x_{0:T-1} | y_{0:T-1}) invariant.

    Attributes:
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N >= 2, the reference among them; enough of them that `info.is_updated` is true half the time or
            more at every step.
        refresh: "ancestor", "backward" or "none".
        proposal: "bootstrap", or "guided" by the model's own `initial_proposal` and `proposal`.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> kernel = bi.kernels.ConditionalSMC(model, ys, num_particles=32)
        >>> paths = kernel.initial(jax.random.key(1), num_chains=4)
        >>> state, info = kernel.step(jax.random.key(2), kernel.init(paths[0]))
        >>> state.position.shape, info.is_updated.shape
        ((50,), (50,))
    """

    is_sequential: ClassVar[bool] = True

    model: StateSpaceModel
    ys: PyTree = eqx.field(converter=check_series)
    num_particles: int = eqx.field(static=True, default=64)
    refresh: str = eqx.field(static=True, default="ancestor")
    proposal: str = eqx.field(static=True, default="bootstrap")

    def __check_init__(self):
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_choice("refresh", self.refresh, REFRESHMENTS)
        check_proposal(self.model, self.proposal)
        check_observations(self.model, self.ys)
        check_model(self.model)

    def init(self, position: PyTree) -> PathState:
        return PathState(check_path(self.model, self.ys, position))

    def initial(self, key: errors.KeyLike, num_chains: int = 4) -> PyTree:
        """Starting paths, with a leading chain axis: backward draws from one free particle filter.

        Raises:
            DegenerateWeightsError: all weights of the filter vanished.
        """
        return first_paths(self, key, num_chains)

    def step(self, key: Key[Array, ""], state: PathState) -> tuple[PathState, PathInfo]:
        model, reference = self.model, state.position
        key_start, key_move, key_last = jax.random.split(key, 3)
        x_0, y_0 = gather((reference, self.ys), jnp.zeros((), jnp.int32))
        start = clouds.start(key_start, model, y_0, self.num_particles, self.proposal, x_0)

        def move(cloud, row):
            t, keys, (x, y) = row
            parent = jnp.zeros((), jnp.int32)
            if self.refresh == "ancestor":
                parent = draw_parent(keys[2], model, cloud, x, t)
            cloud, ancestors = clouds.move(keys[:2], model, cloud, y, t, self.proposal, x, parent)
            return cloud, (cloud, ancestors)

        own = jnp.arange(self.num_particles, dtype=jnp.int32)
        _, (cloud, ancestors) = clouds.scan_steps(move, start, (start, own), key_move, 3, (reference, self.ys))
        if self.refresh == "backward":
            key_last, key_back = jax.random.split(key_last)
            indices = draw_line(key_back, model, cloud, draw_last(key_last, cloud.log_weights))
        else:
            indices = clouds.trace_indices(draw_last(key_last, cloud.log_weights), ancestors)
        return finish_sweep(state, cloud, indices)


def draw_parent(
    key: Key[Array, ""], model: StateSpaceModel, cloud: clouds.Cloud, x: PyTree, t: Int[Array, ""]
) -> Int[Array, ""]:
    """J ~ Cat(W^l p(x | X^l)) for a single state x at time t; slot 0 where nothing could have moved to x."""
    log_density = jax.vmap(lambda x_prev: log_prob(model.transition(x_prev, t), x))(cloud.particles)
    return jax.random.categorical(key, clean(cloud.log_weights + log_density)).astype(jnp.int32)


def draw_line(
    key: Key[Array, ""], model: StateSpaceModel, cloud: clouds.Cloud, last: Int[Array, ""], start: int | Array = 0
) -> Int[Array, " t"]:
    """B_{t-1} ~ Cat(W_{t-1}^l p(X_t^{B_t} | X_{t-1}^l)) from `last` on; the first cloud is that of time `start`."""
    ts = start + jnp.arange(1, cloud.log_weights.shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(ts)

    def back(index, row):
        t, key_t, cloud_prev, particles = row
        parent = draw_parent(key_t, model, cloud_prev, gather(particles, index), t)
        return parent, parent

    before = jax.tree.map(lambda leaf: leaf[:-1], cloud)
    after = jax.tree.map(lambda leaf: leaf[1:], cloud.particles)
    _, indices = jax.lax.scan(back, last, (ts, keys, before, after), reverse=True)
    return jnp.concatenate([indices, last[None]])


# ---- what the kernels on paths have in common ----


def first_paths(kernel: Any, key: errors.KeyLike, num_paths: int, *, throw: bool = True) -> PyTree:
    """Backward draws from one free particle filter; any paths at all if its weights vanish and nothing is to raise."""
    key_filter, key_back = jax.random.split(errors.as_key(key))
    options = {"num_particles": kernel.num_particles, "proposal": kernel.proposal, "throw": throw}
    filtered = particle_filter(key_filter, kernel.model, kernel.ys, store="full", **options)
    return backward_sample(key_back, kernel.model, filtered, num_paths, throw=throw)


def draw_last(key: Key[Array, ""], log_weights: Float[Array, "t N"]) -> Int[Array, ""]:
    """B_{T-1} ~ Cat(W_{T-1})."""
    return jax.random.categorical(key, clean(log_weights[-1])).astype(jnp.int32)


def finish_sweep(state: PathState, cloud: clouds.Cloud, indices: Int[Array, " t"]) -> tuple[PathState, PathInfo]:
    """The path X_t^{B_t} of a whole conditional filter, unless its weights vanished; slot 0 is the reference."""
    path = jax.vmap(gather)(cloud.particles, indices)
    is_ok = ~jnp.any(is_degenerate(cloud.log_weights))
    is_updated = (indices != 0) & is_ok
    log_evidence = compensated_sum(log_mean_exp(cloud.log_weights))
    info = PathInfo(
        acceptance_rate=jnp.mean(is_updated, dtype=cloud.log_weights.dtype),
        is_accepted=jnp.any(is_updated),
        is_divergent=~is_ok,
        num_gradients=jnp.zeros((), jnp.int32),
        is_updated=is_updated,
        log_evidence=log_evidence,
        num_invalid=num_invalid(cloud.log_weights.ravel()).astype(jnp.int32),
    )
    return PathState(select(is_ok, path, state.position)), info


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
