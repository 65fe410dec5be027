"""Coupled conditional PaRIS: one sweep of two chains with common random numbers, so that their paths may meet.

Each chain alone makes a sweep of `ParisianGibbs`; its new path is that of conditional SMC with backward sampling.
Together,

    X_t^i and Y_t^i move by the same random numbers, slot by slot;
    ancestors, backward draws and the last index are pairs (J, J') with J ~ Cat(W), J' ~ Cat(W') that are equal with the
    largest probability that there is, sum_l min(W^l, W'^l).

Two equal paths therefore stay equal, and two others become so the sooner, the more particles there are. That takes away
the bias in `unbiased_smoother`, and bounds how long a chain remembers where it began.

References:
    Jacob, Lindsten and Schön (2020), doi:10.1080/01621459.2018.1548856, arXiv:1701.02002.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, PyTree

from bayesinf import errors, resampling, weights
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.additive import start_statistics, update_statistics, weighted_mean
from bayesinf.kernels.cloud import Cloud
from bayesinf.kernels.conditional_smc import finish_sweep
from bayesinf.kernels.parisian_gibbs import ParisianGibbs
from bayesinf.kernels.path_kernel import PathState
from bayesinf.models.state_space import StateSpaceModel, log_prob
from bayesinf.resampling import gather

__all__ = ["CoupledSweep", "couple", "coupled_sweep"]

_TILE = 2**20  # densities held in memory at once


class CoupledSweep(NamedTuple):
    """What `coupled_sweep` returns, of the first chain and of the second.

    Attributes:
        paths: their new paths.
        estimates: of the functional; NaN where all weights vanished. Of equal paths equal up to rounding.
        is_lost: whether all weights of either vanished, whose path is then kept.
    """

    paths: tuple[PyTree, PyTree]
    estimates: tuple[PyTree, PyTree]
    is_lost: Bool[Array, ""]


def coupled_sweep(key: errors.KeyLike, kernel: ParisianGibbs, path: PyTree, other: PyTree) -> CoupledSweep:
    """One sweep of two chains of the same kernel, so coupled that they may meet and then stay together.

    Args:
        key: PRNG key or seed.
        kernel: the chains' kernel; backward draws are exact whatever its method.
        path: where the first chain is, with leading axis T.
        other: where the second is.

    Returns:
        A CoupledSweep.

    Raises:
        ValueError: `kernel` is no ParisianGibbs, or a path is none of its model.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(0, model, num_steps=20)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> kernel = bi.kernels.ParisianGibbs(model, ys, total, num_particles=64)
        >>> step = jax.jit(bi.kernels.coupled_sweep)
        >>> paths, num_sweeps = (jnp.full(20, -3.0), jnp.full(20, 1.0)), 0
        >>> while not jnp.array_equal(*paths):
        ...     paths, num_sweeps = step(jax.random.key(num_sweeps), kernel, *paths).paths, num_sweeps + 1
        >>> num_sweeps < 50
        True

    References:
        Jacob, Lindsten and Schön (2020), doi:10.1080/01621459.2018.1548856.
    """
    if not isinstance(kernel, ParisianGibbs):
        raise ValueError(f"kernel must be a ParisianGibbs, which both chains are of, got {type(kernel).__name__}")
    return couple(errors.as_key(key), kernel, kernel.init(path).position, kernel.init(other).position)


def couple(key: Key[Array, ""], kernel: ParisianGibbs, path_x: PyTree, path_y: PyTree) -> CoupledSweep:
    """`coupled_sweep`, of arguments that are known to be right."""
    model, num, proposal = kernel.model, kernel.num_particles, kernel.proposal
    functional = kernel.functional
    key_start, key_steps, key_last = jax.random.split(key, 3)
    both = (path_x, path_y)
    y_0 = gather(kernel.ys, jnp.zeros((), jnp.int32))

    def start(path: PyTree) -> Cloud:
        x_0 = gather(path, jnp.zeros((), jnp.int32))
        return clouds.start(key_start, model, y_0, num, proposal, x_0)

    def step(carry, row):
        (cloud_x, tau_x), (cloud_y, tau_y) = carry
        t, (key_choose, key_move, key_back), (row_x, row_y, y) = row
        ancestors_x, ancestors_y = _couple_ancestors(key_choose, cloud_x, cloud_y)
        new_x = clouds.advance(key_move, model, cloud_x, y, t, proposal, row_x, ancestors_x)
        new_y = clouds.advance(key_move, model, cloud_y, y, t, proposal, row_y, ancestors_y)
        J_x, J_y = _couple_backward(key_back, model, (cloud_x, cloud_y), (new_x, new_y), t, kernel.num_backward)
        tau_x = update_statistics(functional, tau_x, cloud_x, new_x, J_x, y, t)
        tau_y = update_statistics(functional, tau_y, cloud_y, new_y, J_y, y, t)
        return ((new_x, tau_x), (new_y, tau_y)), ((new_x, J_x[:, 0]), (new_y, J_y[:, 0]))

    start_x, start_y = start(path_x), start(path_y)
    first = tuple((cloud, start_statistics(functional, cloud, y_0)) for cloud in (start_x, start_y))
    own = jnp.arange(num, dtype=jnp.int32)
    kept = ((start_x, own), (start_y, own))
    last, kept = clouds.scan_steps(step, first, kept, key_steps, 3, (*both, kernel.ys))

    ends = _couple_indices(key_last, last[0][0].log_weights, last[1][0].log_weights, 1)
    paths, estimates, is_lost = [], [], jnp.zeros((), bool)
    for path, end, (cloud, parents), statistics in zip(both, ends, kept, last, strict=True):
        state, info = finish_sweep(PathState(path), cloud, clouds.trace_indices(end[0], parents))
        is_lost |= info.is_divergent
        paths.append(state.position)
        found = weighted_mean(*statistics)
        estimates.append(jax.tree.map(lambda leaf, info=info: jnp.where(info.is_divergent, jnp.nan, leaf), found))
    return CoupledSweep((paths[0], paths[1]), (estimates[0], estimates[1]), is_lost)


def _couple_ancestors(key: Key[Array, ""], cloud_x: Cloud, cloud_y: Cloud) -> tuple[Array, Array]:
    """Ancestors of both clouds; the reference in slot 0 is its own."""
    free = _couple_indices(key, cloud_x.log_weights, cloud_y.log_weights, cloud_x.log_weights.shape[0] - 1)
    x, y = (jnp.concatenate([jnp.zeros(1, indices.dtype), indices]) for indices in free)
    return x, y


def _couple_indices(key: Key[Array, ""], log_x: Array, log_y: Array, num: int) -> tuple[Array, Array]:
    """Pairs of draws from two categorical laws, equal with probability sum_i min(W_x^i, W_y^i)."""
    key_equal, key_common, key_x, key_y = jax.random.split(key, 4)
    w_x, w_y = (jnp.exp(weights.normalize(log_w)[0]) for log_w in (log_x, log_y))
    common = jnp.minimum(w_x, w_y)
    is_equal = jax.random.uniform(key_equal, (num,), w_x.dtype) < jnp.sum(common)

    def draw(key: Array, w: Array) -> Array:
        return resampling.iid(key, jnp.log(w), num)

    # where both laws are the same there is no rest, and what is drawn of it is not used; but rounding may ask for it
    is_same = jnp.all(w_x == w_y)
    both = draw(key_common, common)
    x, y = (draw(key, jnp.where(w > common, w - common, 0.0)) for key, w in ((key_x, w_x), (key_y, w_y)))
    is_equal = is_equal | is_same
    return jnp.where(is_equal, both, x), jnp.where(is_equal, both, y)


def _couple_backward(
    key: Key[Array, ""],
    model: StateSpaceModel,
    before: tuple[Cloud, Cloud],
    after: tuple[Cloud, Cloud],
    t: Any,
    num: int,
) -> tuple[Array, Array]:
    """Coupled backward draws of the particles in the same slot."""

    def log_masses(cloud: Cloud, x: PyTree) -> Array:
        log_m = jax.vmap(lambda x_prev: log_prob(model.transition(x_prev, t), x))(cloud.particles)
        return weights.clean(cloud.log_weights + log_m)

    def row(key, x, y):
        return _couple_indices(key, log_masses(before[0], x), log_masses(before[1], y), num)

    size = before[0].log_weights.shape[0]
    rows = (jax.random.split(key, size), after[0].particles, after[1].particles)
    return jax.lax.map(lambda args: row(*args), rows, batch_size=max(1, min(size, _TILE // (2 * size))))
