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
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import select
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.filter_steps import check_proposal
from bayesinf.kernels.path_kernel import PathKernel, PathState
from bayesinf.models.state_space import (
    StateSpaceModel,
    log_prob,
)
from bayesinf.resampling import gather
from bayesinf.weights import clean, compensated_sum, is_degenerate, log_mean_exp, num_invalid

__all__ = [
    "REFRESHMENTS",
    "ConditionalSMC",
    "PathInfo",
    "draw_last",
    "draw_line",
    "draw_parent",
    "finish_sweep",
]

REFRESHMENTS = ("ancestor", "backward", "none")


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


class ConditionalSMC(PathKernel):
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

    num_particles: int = eqx.field(static=True, default=64)
    refresh: str = eqx.field(static=True, default="ancestor")
    proposal: str = eqx.field(static=True, default="bootstrap")

    def _check_rest(self):
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_choice("refresh", self.refresh, REFRESHMENTS)
        check_proposal(self.model, self.proposal)

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


# ---- what conditional filters have in common ----


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
