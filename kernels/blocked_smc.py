"""Blocked conditional SMC: a kernel on paths that refreshes them block by block, all blocks of a pass at once.

Given the states on either side, a block x_{s:u} of a Markov path does not depend on the rest of it:

    p(x_{s:u} | rest, y)  proportional to  prod_{t=s}^{u} m_t(x_{t-1}, x_t) g_t(x_t)  m_{u+1}(x_u, x_{u+1}),

with m_0(x_0) at the beginning of the series and no last factor at its end. Conditional SMC leaves this law invariant if
its particles start from x_{s-1}, not from the initial law, and its last weights have the factor m_{u+1}(x_u, x_{u+1}).

A pass holds every (L + 1)-th state fixed and refreshes the L states between each two of them. One fixed state is what
makes neighbours independent: blocks that touch, each refreshed given the old border of the other, would not leave the
law invariant. A second pass is shifted by half a block, so that what the first held fixed lies in the middle of a block
of the second; each is a Gibbs step, and p(x_{0:T-1} | y_{0:T-1}) is invariant under both. For a given number of
particles neither the share of states that are renewed nor the rate at which the chain mixes deteriorates with T, and
the depth of a step is that of two blocks.

References:
    Singh, Lindsten and Moulines (2017), doi:10.1093/biomet/asx051.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import select
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.conditional_smc import (
    REFRESHMENTS,
    draw_line,
    draw_parent,
)
from bayesinf.kernels.filter_steps import check_proposal
from bayesinf.kernels.path_kernel import PathKernel, PathState
from bayesinf.models.state_space import StateSpaceModel, log_prob
from bayesinf.resampling import gather
from bayesinf.weights import clean, is_degenerate, num_invalid

__all__ = ["BlockedInfo", "BlockedSMC"]


class BlockedInfo(NamedTuple):
    """What one step, of two passes, tells.

    Attributes:
        acceptance_rate: share of the time steps at which the path left the reference, in either pass.
        is_accepted: whether it left the reference anywhere.
        is_divergent: whether all weights of some block vanished; that block was then kept.
        num_gradients: 0.
        is_updated: at which steps the path left the reference; its mean over steps should be well above 0 for all t.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    is_updated: Bool[Array, " t"]
    num_invalid: Int[Array, ""]


class BlockedSMC(PathKernel):
    """Blocked conditional SMC on paths: leaves p(x_{0:T-1} | y_{0:T-1}) invariant.

    Attributes:
        model: the state-space model; its transition law has a density.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N >= 2 in every block, the reference among them.
        block_size: L >= 1 states between two that a pass holds fixed; longer than the model remembers, and as long as N
            particles refresh well.
        refresh: how the path of a block is drawn: "backward", "ancestor" or "none", see `ConditionalSMC`.
        proposal: "bootstrap", or "guided" by the model's own `initial_proposal` and `proposal`.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> kernel = bi.kernels.BlockedSMC(model, ys, num_particles=16, block_size=20)
        >>> paths = kernel.initial(jax.random.key(1), num_chains=4)
        >>> state, info = kernel.step(jax.random.key(2), kernel.init(paths[0]))
        >>> state.position.shape, info.is_updated.shape
        ((50,), (50,))
    """

    num_particles: int = eqx.field(static=True, default=32)
    block_size: int = eqx.field(static=True, default=32)
    refresh: str = eqx.field(static=True, default="backward")
    proposal: str = eqx.field(static=True, default="bootstrap")

    def _check_rest(self):
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_count("block_size", self.block_size)
        errors.check_choice("refresh", self.refresh, REFRESHMENTS)
        check_proposal(self.model, self.proposal)

    def step(self, key: Key[Array, ""], state: PathState) -> tuple[PathState, BlockedInfo]:
        num_steps = jax.tree.leaves(self.ys)[0].shape[0]
        # a block as long as the series leaves nothing to a second pass
        shifts = [0, (self.block_size + 1) // 2] if self.block_size < num_steps else [0]
        layout = _lay_out(num_steps, self.block_size, shifts)
        key_initial, key_blocks = jax.random.split(key)
        keys_initial = jax.random.split(key_initial, len(shifts))
        keys_blocks = jax.random.split(key_blocks, layout.starts.shape)

        def sweep(carry, row):
            """A pass; both are one program, which is compiled once."""
            path, is_updated = carry
            key_start, keys, blocks = row
            x, y = gather((path, self.ys), jnp.zeros((), jnp.int32))
            # the cloud at time 0, of which one block alone has need
            initial = clouds.start(key_start, self.model, y, self.num_particles, self.proposal, x)
            refreshed = jax.vmap(self._refresh_block, (0, 0, None))(keys, _cut(path, self.ys, blocks), initial)
            path = jax.tree.map(lambda leaf, new: leaf.at[blocks.times].set(new, mode="drop"), path, refreshed.path)
            is_updated = is_updated.at[blocks.times].max(refreshed.is_updated, mode="drop")
            return (path, is_updated), (refreshed.is_ok, refreshed.num_invalid)

        start = (state.position, jnp.zeros(num_steps, bool))
        (path, is_updated), (is_ok, num_invalid) = jax.lax.scan(sweep, start, (keys_initial, keys_blocks, layout))
        info = BlockedInfo(
            acceptance_rate=jnp.mean(is_updated, dtype=float),
            is_accepted=jnp.any(is_updated),
            is_divergent=~jnp.all(is_ok),
            num_gradients=jnp.zeros((), jnp.int32),
            is_updated=is_updated,
            num_invalid=jnp.sum(num_invalid, dtype=jnp.int32),
        )
        return PathState(path), info

    def _refresh_block(self, key: Key[Array, ""], block: "_Block", initial: clouds.Cloud) -> "_Refreshed":
        """One sweep of conditional SMC over a block, given what is on either side."""
        model, num_rows = self.model, jax.tree.leaves(block.path)[0].shape[0]
        key_move, key_last, key_back = jax.random.split(key, 3)
        key_moves = jax.random.split(key_move, (num_rows, 3))  # at once: each call of the generator is a large program
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.num_particles, *leaf.shape)), block.before)
        before = clouds.Cloud(copies, jnp.zeros_like(initial.log_weights))
        rows = jnp.arange(num_rows)

        def move(cloud, row):
            """The first cloud moves on from N copies of the state before the block, or is the initial one."""
            i, keys, (x, y) = row
            t = block.time + i
            parent = jnp.zeros((), jnp.int32)
            if self.refresh == "ancestor":
                parent = draw_parent(keys[2], model, cloud, x, t)
            moved, ancestors = clouds.move(keys[:2], model, cloud, y, t, self.proposal, x, parent)
            cloud = select(t == 0, initial, select(i < block.first, before, moved))  # a short block begins late
            return cloud, (cloud, ancestors)

        last, (cloud, ancestors) = jax.lax.scan(move, before, (rows, key_moves, (block.path, block.ys)))
        log_weights = _end(model, last, block)
        index = jax.random.categorical(key_last, clean(log_weights)).astype(jnp.int32)
        if self.refresh == "backward":
            indices = draw_line(key_back, model, cloud, index, block.time)
        else:
            indices = clouds.trace_indices(index, ancestors)

        is_ok = ~(jnp.any(is_degenerate(cloud.log_weights)) | is_degenerate(log_weights))
        is_inside = rows >= block.first
        return _Refreshed(
            path=select(is_ok, jax.vmap(gather)(cloud.particles, indices), block.path),
            is_updated=(indices != 0) & is_ok,
            is_ok=is_ok,
            num_invalid=jnp.sum(num_invalid(cloud.log_weights[:-1]) * is_inside[:-1]) + num_invalid(log_weights),
        )


class _Block(NamedTuple):
    """A block, at the end of L rows, and the states on either side; rows before `first` belong to others."""

    time: Int[Array, ""]  # of the first row
    first: Int[Array, ""]
    path: PyTree
    ys: PyTree
    before: PyTree
    after: PyTree
    is_last: Bool[Array, ""]  # whether the series ends here


class _Refreshed(NamedTuple):
    """What became of a block."""

    path: PyTree
    is_updated: Bool[Array, " l"]
    is_ok: Bool[Array, ""]
    num_invalid: Int[Array, ""]


def _end(model: StateSpaceModel, cloud: clouds.Cloud, block: _Block) -> Float[Array, " N"]:
    """The last log weights, multiplied by m_{u+1}(x_u, x_{u+1}) where there is an x_{u+1}."""
    time = block.time + jax.tree.leaves(block.path)[0].shape[0]
    log_next = jax.vmap(lambda x: log_prob(model.transition(x, time), block.after))(cloud.particles)
    return cloud.log_weights + jnp.where(block.is_last, 0.0, log_next)


class _Layout(NamedTuple):
    """Where the blocks of a pass lie; each pass has as many, the last of them may be empty."""

    starts: Int[Array, "... k"]
    stops: Int[Array, "... k"]
    times: Int[Array, "... k l"]  # of their rows; T, which is none, for those of others


def _lay_out(num_steps: int, block_size: int, shifts: list[int]) -> _Layout:
    """The blocks of all passes, with a leading axis of these."""
    bounds = [_bounds(num_steps, block_size, shift) for shift in shifts]
    num = max(len(starts) for starts, _ in bounds)
    width = max(int(np.max(stops - starts)) for starts, stops in bounds)
    starts, stops = (
        np.stack([np.pad(ends, (0, num - len(ends)), constant_values=num_steps) for ends in which])
        for which in zip(*bounds, strict=True)
    )
    times = stops[..., None] - width + np.arange(width)
    times = np.where(times >= starts[..., None], times, num_steps)
    return _Layout(*(jnp.asarray(array, jnp.int32) for array in (starts, stops, times)))


def _cut(path: PyTree, ys: PyTree, blocks: _Layout) -> _Block:
    """The blocks of one pass, with a leading axis."""
    num_steps, width = jax.tree.leaves(ys)[0].shape[0], blocks.times.shape[-1]
    times = blocks.stops[:, None] - width + jnp.arange(width)
    return _Block(
        time=blocks.stops - width,
        first=width - (blocks.stops - blocks.starts),
        path=gather(path, times),  # which clips them
        ys=gather(ys, times),
        before=gather(path, blocks.starts - 1),
        after=gather(path, blocks.stops),
        is_last=blocks.stops == num_steps,
    )


def _bounds(num_steps: int, block_size: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """First times of the blocks, and those after their last: all but the times L - shift + k (L + 1), held fixed."""
    fixed = np.arange(block_size - shift, num_steps, block_size + 1)
    starts, stops = np.append(0, fixed + 1), np.append(fixed, num_steps)
    return starts[stops > starts], stops[stops > starts]
