"""Smoothing without bias: two conditional PaRIS chains, one step apart, that meet.

    X_0, Y_0 ~ paths of a filter;   X_1 ~ K(X_0, .);   (X_{l+1}, Y_l) ~ coupled K((X_l, Y_{l-1}), .)

each chain alone being that of `ParisianGibbs`, with estimates h(X_l). Once the paths have met, X_l = Y_{l-1}, they stay
together, and

    H = 1/(m - k + 1) sum_{l=k}^{m} h(X_l) + sum_{l > k} min(1, (l - k)/(m - k + 1)) (h(X_l) - h(Y_{l-1}))

has E[H] = E[h(x_{0:T-1}) | y] exactly, so that replicates may be averaged and their spread is an honest error. How the
two move together says `coupled_sweep`. Chains meet soon only with enough particles: try a few numbers.

References:
    Jacob, Lindsten and Schön (2020), doi:10.1080/01621459.2018.1548856, arXiv:1701.02002.
    Jacob, O'Leary and Atchadé (2020), doi:10.1111/rssb.12336 (the time average).
"""

import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels.additive import AdditiveFunctional
from bayesinf.kernels.coupled_sweep import couple
from bayesinf.kernels.filter_steps import cure_of_vanished
from bayesinf.kernels.parisian_gibbs import ParisianGibbs
from bayesinf.kernels.path_kernel import first_paths
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["UnbiasedResult", "unbiased_smoother"]


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
            paths, estimates, is_lost = couple(jax.random.fold_in(key, state.sweep), kernel, *state.paths)
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
