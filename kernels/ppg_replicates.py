"""Replicates of Parisian particle Gibbs: a confidence interval, and what shows whether to trust it.

    estimate = mean_r Pi_r,   interval by Student's t over the R independent roll-outs Pi_r
    trend_l = mean_r (estimate_{r,l} - Pi_r)               falls to zero where the start is forgotten
    autocorrelation_s, of the estimates of sweeps l and l + s after the burn-in, of order N^{-1/2} at s = 1

An interval from replicates covers the mean of Pi_r. That is the truth if what is left of the start, of order
kappa^burn_in / N, is small beside its width; the trend is the part of it that can be seen.

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels.additive import AdditiveFunctional
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.filter_steps import cure_of_vanished, warn_of_invalid
from bayesinf.kernels.parisian_gibbs import ParisianGibbs, roll_out
from bayesinf.kernels.path_kernel import first_paths
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["PPGReplicates", "ppg_replicates"]

_ROUNDING = 8.0  # units in the last place by which equal estimates may differ


class PPGReplicates(NamedTuple):
    """What `ppg_replicates` returns; R replicates of k sweeps.

    Attributes:
        estimate: the mean of the roll-outs.
        standard_error: of that mean.
        interval: its confidence interval; leading axis 2, lower and upper end.
        replicates: the roll-out of each; leading axis R.
        trend: how far sweep l is off the roll-out on average; leading axis k. Its early part is the bias that the
            burn-in takes away.
        trend_error: the standard error of the trend. A trend after the burn-in of many of these: take a longer one.
        autocorrelation: of the estimates of sweeps that are s = 1, 2, ... apart, after the burn-in; leading axis
            k - burn_in - 1. A value near 1 that does not fall: take more particles. NaN where the estimates do not vary
            by more than rounding, as of what is the same on all paths.
        update_rate: share of all sweeps that renewed the path at each time; below a half, take more particles.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
    """

    estimate: PyTree
    standard_error: PyTree
    interval: PyTree
    replicates: PyTree
    trend: PyTree
    trend_error: PyTree
    autocorrelation: PyTree
    update_rate: Float[Array, " t"]
    num_invalid: Int[Array, ""]


def ppg_replicates(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    functional: AdditiveFunctional,
    *,
    num_replicates: int,
    num_particles: int,
    num_sweeps: int,
    burn_in: int,
    num_backward: int = 2,
    method: str = "auto",
    proposal: str = "bootstrap",
    level: float = 0.95,
    progress: bool = False,
    throw: bool = True,
) -> PPGReplicates:
    """Smooths an additive functional by independent runs of `ppg`, with a confidence interval.

    Args:
        key: PRNG key or seed.
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        functional: what is smoothed.
        num_replicates: R >= 2.
        num_particles, num_sweeps, burn_in, num_backward, method, proposal: as of `ppg`; at least two sweeps are kept.
        level: of confidence, in (0, 1).
        progress: whether to show a bar. The run then comes back to the host now and then, and Ctrl-C returns the
            replicates that there are, with a warning; without, it is one compiled call, which Ctrl-C cannot end.
        throw: whether to raise if the weights vanish in some replicate.

    Returns:
        A PPGReplicates.

    Raises:
        DegenerateWeightsError: all weights of some sweep vanished; its `result` is the PPGReplicates, whose estimate is
            NaN.
        ValueError: an argument is out of its range.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.7, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=20)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x[0], lambda x_prev, x, t: x[0])
        >>> found = bi.kernels.ppg_replicates(
        ...     1, model, ys, total, num_replicates=4, num_particles=16, num_sweeps=6, burn_in=2
        ... )
        >>> found.interval.shape, found.trend.shape, found.autocorrelation.shape
        ((2,), (6,), (3,))

    References:
        Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
    """
    errors.check_count("num_replicates", num_replicates, minimum=2)
    errors.check_count("num_sweeps", num_sweeps)
    errors.check_count("burn_in", burn_in, minimum=0)
    errors.check_fraction("level", level)
    if burn_in > num_sweeps - 2:
        raise ValueError(f"burn_in must leave two of num_sweeps={num_sweeps} sweeps, got {burn_in}")
    kernel = ParisianGibbs(model, ys, current(functional), num_particles, num_backward, method, proposal)
    keys = jax.random.split(errors.as_key(key), num_replicates)
    plan = _Plan(kernel, keys, num_sweeps, burn_in)
    if progress:
        _, (runs, is_lost) = iterate(_replicate, plan, (), keys[0], num_replicates, True, "replicates")
        num_replicates = is_lost.shape[0]
    else:
        runs, is_lost = _run_all(plan)
    quantile = scipy.stats.t(num_replicates - 1).ppf(0.5 + 0.5 * level)
    root = np.sqrt(num_replicates)

    def error(leaf):
        return jnp.std(leaf, axis=0, ddof=1) / root

    estimate = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), runs.estimate)
    standard_error = jax.tree.map(error, runs.estimate)
    deviations = jax.tree.map(lambda each, one: each - one[:, None], runs.estimates, runs.estimate)
    result = PPGReplicates(
        estimate,
        standard_error,
        jax.tree.map(lambda m, s: jnp.stack([m - quantile * s, m + quantile * s]), estimate, standard_error),
        runs.estimate,
        jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), deviations),
        jax.tree.map(error, deviations),
        jax.tree.map(lambda leaf: _autocorrelation(leaf[:, burn_in:]), runs.estimates),
        jnp.mean(runs.update_rate, axis=0),
        jnp.sum(runs.num_invalid, dtype=jnp.int32),
    )
    if throw and errors.is_concrete(is_lost):
        if np.any(is_lost):
            raise errors.DegenerateWeightsError(
                f"In {int(np.sum(is_lost))} of {num_replicates} replicates no particle of {num_particles} can explain "
                f"some observation: all weights are zero. {cure_of_vanished(model, kernel.ys, proposal)}; throw=False "
                "returns what there is.",
                result,
            )
        warn_of_invalid(np.asarray(runs.num_invalid), "replicate")
    return result


class _Plan(eqx.Module):
    kernel: ParisianGibbs
    keys: Key[Array, " r"]
    num_sweeps: int = eqx.field(static=True)
    burn_in: int = eqx.field(static=True)


def _replicate(plan: _Plan, state: tuple[()], key: Key[Array, ""], number: Int[Array, ""]):
    """One run of `ppg`, by its own key, and whether all weights vanished in some sweep."""
    return state, _run(plan, plan.keys[number - 1])


@jax.jit
def _run_all(plan: _Plan):
    """One after the other."""
    return jax.lax.map(lambda key: _run(plan, key), plan.keys)


def _run(plan: _Plan, key: Key[Array, ""]):
    key_path, key_sweeps = jax.random.split(key)
    path = jax.tree.map(lambda leaf: leaf[0], first_paths(plan.kernel, key_path, 1, throw=False))
    start = plan.kernel.init(path)
    result, is_divergent = roll_out(key_sweeps, plan.kernel, start, plan.num_sweeps, plan.burn_in)
    return result, jnp.any(is_divergent)


def _autocorrelation(values: Float[Array, "r k ..."]) -> Float[Array, "s ..."]:
    """Of the sweeps of all replicates about their common mean, at every lag from 1."""
    mean = jnp.mean(values, axis=(0, 1))
    centred = values - mean
    variance = jnp.mean(centred**2, axis=(0, 1))
    # of rounding errors no correlation means anything
    is_varying = variance > (_ROUNDING * jnp.finfo(values.dtype).eps * mean) ** 2
    scale = jnp.where(is_varying, variance, 1.0)
    lags = range(1, values.shape[1])
    found = jnp.stack([jnp.mean(centred[:, lag:] * centred[:, :-lag], axis=(0, 1)) / scale for lag in lags])
    return jnp.where(is_varying, found, jnp.nan)
