"""Smoothing without bias: two conditional PaRIS chains, one step apart, that meet.

    X_0, Y_0 ~ paths of a filter;   X_1 ~ K(X_0, .);   (X_{l+1}, Y_l) ~ coupled K((X_l, Y_{l-1}), .)

each chain alone being that of `ParisianGibbs`, with estimates h(X_l). Once the paths have met, X_l = Y_{l-1}, they stay
together, and

    H = 1/(m - k + 1) sum_{l=k}^{m} h(X_l) + sum_{l > k} min(1, (l - k)/(m - k + 1)) (h(X_l) - h(Y_{l-1}))

has E[H] = E[h(x_{0:T-1}) | y] exactly, so that replicates may be averaged and their spread is an honest error. The
coupling: particles in the same slot move by the same random numbers, ancestors and backward draws of both chains are
equal with the largest probability that there is. Chains meet soon only with enough particles: try a few numbers.

References:
    Jacob, Lindsten and Schön (2020), doi:10.1080/01621459.2018.1548856, arXiv:1701.02002.
    Jacob, O'Leary and Atchadé (2020), doi:10.1111/rssb.12336 (the time average).
"""

import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from bayesinf import errors, resampling, weights
from bayesinf.captured import current
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.additive import AdditiveFunctional, start_statistics, update_statistics, weighted_mean
from bayesinf.kernels.cloud import Cloud
from bayesinf.kernels.conditional_smc import finish_sweep
from bayesinf.kernels.filter_steps import cure_of_vanished
from bayesinf.kernels.parisian_gibbs import ParisianGibbs
from bayesinf.kernels.path_kernel import PathState, first_paths
from bayesinf.models.state_space import StateSpaceModel, log_prob
from bayesinf.resampling import gather

__all__ = ["UnbiasedResult", "couple", "unbiased_smoother"]

_TILE = 2**20  # densities held in memory at once


class UnbiasedResult(NamedTuple):
    """What `unbiased_smoother` returns.

    Attributes:
        estimate: the mean of H over the replicates.
        standard_error: of that mean, by the spread of the replicates; NaN for a single one.
        replicates: H of each; leading axis R.
        meeting_time: the first l with X_l = Y_{l-1}; leading axis R.
        is_met: whether they met within `max_sweeps`; H of those that did not is NaN, and the estimate with it.
        is_lost: whether all weights of a sweep vanished, after which a replicate is given up: it did not meet either.
    """

    estimate: PyTree
    standard_error: PyTree
    replicates: PyTree
    meeting_time: Int[Array, " r"]
    is_met: Bool[Array, " r"]
    is_lost: Bool[Array, " r"]


def unbiased_smoother(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    functional: AdditiveFunctional,
    *,
    num_particles: int,
    num_replicates: int,
    burn_in: int = 3,
    num_sweeps: int = 10,
    num_backward: int = 2,
    max_sweeps: int = 1_000,
    proposal: str = "bootstrap",
    throw: bool = True,
) -> UnbiasedResult:
    """Smooths an additive functional without bias, with an error from independent replicates.

    One compiled call, which shows no bar and which Ctrl-C cannot end: try a few replicates first.

    Args:
        key: PRNG key or seed.
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        functional: what is smoothed.
        num_particles: N >= 2: enough that chains meet within a few sweeps.
        num_replicates: R >= 1.
        burn_in: k >= 1; about the time at which most chains have met.
        num_sweeps: m >= k sweeps at least.
        num_backward: M >= 1 backward draws a particle.
        max_sweeps: after which a replicate is given up; to leave it out would be a bias.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        throw: whether to raise if a replicate was given up.

    Returns:
        An UnbiasedResult.

    Raises:
        DegenerateWeightsError: all weights of some sweep vanished; its `result` is the UnbiasedResult.
        SamplingError: chains did not meet within `max_sweeps`; the error's `draws` is the UnbiasedResult.
        ValueError: an argument is out of its range.

    Warns:
        SamplingWarning: the median meeting time is longer than three times `num_sweeps`.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.7, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=10)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> found = bi.kernels.unbiased_smoother(1, model, ys, total, num_particles=32, num_replicates=4)
        >>> found.estimate.shape, found.meeting_time.shape
        ((1,), (4,))

    References:
        Jacob, Lindsten and Schön (2020), doi:10.1080/01621459.2018.1548856.
    """
    errors.check_count("num_replicates", num_replicates)
    errors.check_count("burn_in", burn_in)
    errors.check_count("num_sweeps", num_sweeps)
    errors.check_count("max_sweeps", max_sweeps)
    if not burn_in <= num_sweeps <= max_sweeps:
        raise ValueError(f"burn_in <= num_sweeps <= max_sweeps is needed, got {burn_in}, {num_sweeps} and {max_sweeps}")
    kernel = ParisianGibbs(model, ys, current(functional), num_particles, num_backward, "exact", proposal)
    key_paths, key_chains = jax.random.split(errors.as_key(key))
    paths = jax.vmap(lambda key: first_paths(kernel, key, 1, throw=False))(
        jax.random.split(key_paths, 2 * num_replicates)
    )
    pairs = jax.tree.map(lambda leaf: leaf[:, 0].reshape(2, num_replicates, *leaf.shape[2:]), paths)
    bounds = jnp.asarray([burn_in, num_sweeps, max_sweeps])
    replicates, meeting_time, is_lost = _meet(kernel, jax.random.split(key_chains, num_replicates), pairs, bounds)
    is_met = meeting_time <= max_sweeps
    estimate = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), replicates)
    spread = jax.tree.map(
        lambda leaf: (
            jnp.std(leaf, axis=0, ddof=1) / jnp.sqrt(num_replicates)
            if num_replicates > 1
            else jnp.full_like(leaf[0], jnp.nan)
        ),
        replicates,
    )
    result = UnbiasedResult(estimate, spread, replicates, meeting_time, is_met, is_lost)
    if throw and errors.is_concrete(is_lost) and np.any(is_lost):
        raise errors.DegenerateWeightsError(
            f"In {int(np.sum(np.asarray(is_lost)))} of {num_replicates} pairs of chains no particle of {num_particles} "
            f"can explain some observation: all weights are zero. {cure_of_vanished(model, kernel.ys, proposal)}; "
            "throw=False returns what there is.",
            result,
        )
    if throw and errors.is_concrete(is_met) and not np.all(is_met):
        raise errors.SamplingError(
            f"{int(np.sum(~np.asarray(is_met)))} of {num_replicates} pairs of chains did not meet within {max_sweeps} "
            "sweeps: take more particles; the result until then is in error.draws, and throw=False returns it",
            result,
        )
    if throw and errors.is_concrete(meeting_time) and float(np.median(np.asarray(meeting_time))) > 3 * num_sweeps:
        warnings.warn(
            f"half of the pairs met after {float(np.median(np.asarray(meeting_time))):.0f} sweeps or later, with "
            f"num_sweeps={num_sweeps}: the estimate is unbiased, and of large variance. Take more particles, and "
            "burn_in and num_sweeps of several times the meeting time",
            errors.SamplingWarning,
            stacklevel=2,
        )
    return result


class _Pair(NamedTuple):
    """Two coupled chains: X_l and Y_{l-1}, the number l of the next sweep, and H so far."""

    paths: tuple[PyTree, PyTree]
    sweep: Int[Array, ""]
    meeting_time: Int[Array, ""]
    sums: PyTree
    is_lost: Bool[Array, ""]


@eqx.filter_jit
def _meet(kernel: ParisianGibbs, keys: Key[Array, " r"], pairs: PyTree, bounds: Int[Array, "3"]):
    """H of every replicate, the time of its meeting, and whether its weights vanished."""
    burn_in, num_sweeps, max_sweeps = bounds
    num_averaged = num_sweeps - burn_in + 1

    def run(row):
        key, pair = row
        x, y = (jax.tree.map(lambda leaf, i=i: leaf[i], pair) for i in (0, 1))
        first, info = kernel.step(jax.random.fold_in(key, 0), kernel.init(x))
        is_counted = (burn_in == 1).astype(jnp.result_type(*jax.tree.leaves(info.estimate)))
        sums = jax.tree.map(lambda leaf: is_counted * leaf / num_averaged, info.estimate)
        start = _Pair((first.position, y), jnp.asarray(1), max_sweeps + 1, sums, info.is_divergent)

        def goes_on(state: _Pair):
            is_over = (state.sweep > num_sweeps - 1) & (state.meeting_time <= state.sweep)
            return ~is_over & ~state.is_lost & (state.sweep < max_sweeps)

        def go_on(state: _Pair) -> _Pair:
            paths, estimates, is_lost = couple(kernel, jax.random.fold_in(key, state.sweep), *state.paths)
            l = state.sweep + 1  # noqa: E741  of X, as in the formula
            share = jnp.where((l >= burn_in) & (l <= num_sweeps), 1.0 / num_averaged, 0.0)
            excess = jnp.clip((l - burn_in) / num_averaged, 0.0, 1.0)
            has_met = state.meeting_time < l  # then the difference is zero but for rounding
            excess = jnp.where(has_met, 0.0, excess)
            sums = jax.tree.map(
                lambda s, h_x, h_y: s + share.astype(s.dtype) * h_x + excess.astype(s.dtype) * (h_x - h_y),
                state.sums,
                *estimates,
            )
            is_equal = jnp.stack([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, paths), strict=True)]).all()
            # where weights vanish both may be kept, and be equal
            meeting_time = jnp.where(is_equal & ~has_met & ~is_lost, l, state.meeting_time)
            return _Pair(paths, l, meeting_time, sums, is_lost)

        end = jax.lax.while_loop(goes_on, go_on, start)
        is_whole = (end.meeting_time <= max_sweeps) & ~end.is_lost
        return jax.tree.map(lambda leaf: jnp.where(is_whole, leaf, jnp.nan), end.sums), end.meeting_time, end.is_lost

    num = keys.shape[0]
    swapped = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), pairs)
    return jax.lax.map(run, (keys, swapped), batch_size=min(num, 16))


def couple(
    kernel: ParisianGibbs, key: Key[Array, ""], path_x: PyTree, path_y: PyTree
) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree], Bool[Array, ""]]:
    """One sweep of two chains of the same kernel: their new paths, their estimates, and whether weights vanished.

    Each alone is a sweep of `kernel`. Two equal paths stay equal, and have estimates that are equal up to rounding.
    Where all weights of either vanish its path is kept, and its estimate is NaN.
    """
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
    return (paths[0], paths[1]), (estimates[0], estimates[1]), is_lost


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
