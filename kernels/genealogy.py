"""What the genealogy of a stored filter tells: the variance of its estimates from one run, and fixed-lag smoothing.

With E_t^i the ancestor of particle i at time t - lag (at time 0 for lag = None), and W_t the weights,

    var(Zhat) / Z^2                    by  1 - (N / (N-1))^{n+1} (1 - sum_e (sum_{i: E_T^i = e} W_T^i)^2)
    var(sum_i W_t^i f(X_t^i))          by  sum_e (sum_{i: E_t^i = e} W_t^i (f(X_t^i) - mean))^2
    E[f(X_{t - lag}) | y_0..y_t]       by  sum_i W_t^i f(X_{t - lag}^{E_t^i})

with n the number of times that particles were resampled. Zhat^2 times the first is an unbiased estimate of var(Zhat)
where ancestors are independent draws at every step; schemes with less noise have a smaller variance than it says. After
many steps all particles descend from a few, and with lag = None the second falls to zero: a lag of a few times the
memory of the model keeps it, at a bias that the forgetting of the model makes small.

References:
    Chan and Lai (2013), doi:10.1214/13-AOS1172.
    Lee and Whiteley (2018), doi:10.1093/biomet/asy028.
    Olsson and Douc (2019), doi:10.3150/18-BEJ1041 (the lag).
    Kitagawa and Sato (2001), doi:10.1007/978-1-4757-3437-9_9 (fixed-lag smoothing).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import captured
from bayesinf.kernels.filter_steps import check_single
from bayesinf.kernels.particle_filter import FilterResult, History
from bayesinf.resampling import gather

__all__ = ["estimate_variance", "evidence_variance", "fixed_lag_smoother", "history_of", "trace_ancestors"]


def evidence_variance(filtered: FilterResult) -> Float[Array, ""]:
    """The relative variance of the evidence estimate, about the variance of log_evidence, from one run.

    Args:
        filtered: of `particle_filter(..., store="full")`.

    Returns:
        An estimate of var(Zhat) / Z^2. It can be negative where it is small, and cannot see a variance above about 1:
        then a few particles at time 0 are the ancestors of all.

    Raises:
        ValueError: `filtered` is a batch of filters, did not store its history, or has a single particle, of which no
            spread can be seen.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=20)
        >>> filtered = bi.kernels.particle_filter(
        ...     1, model, ys, num_particles=1_000, resampling="multinomial", ess_threshold=1.0, store="full"
        ... )
        >>> bool(bi.kernels.evidence_variance(filtered) < 0.2)
        True

    References:
        Lee and Whiteley (2018), doi:10.1093/biomet/asy028.
    """
    history = history_of(filtered)
    _check_spread(history)
    return _evidence_variance(history, filtered.is_resampled)


def estimate_variance(
    filtered: FilterResult, functional: Callable[[PyTree], PyTree] | None = None, *, lag: int | None = None
) -> PyTree:
    """The variance of the filter's estimate of E[f(x_t) | y_0..y_t] at every t, from one run.

    Args:
        filtered: of `particle_filter(..., store="full")`.
        functional: f, of one state; the state itself by default.
        lag: how many steps back particles count as related; to the start if None.

    Returns:
        Variances of the structure of the estimates, with leading axis T.

    Raises:
        ValueError: `filtered` is a batch of filters, did not store its history, or has a single particle, or `lag` is
            no whole number of at least 0.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=500, store="full")
        >>> bi.kernels.estimate_variance(filtered, lag=10).shape
        (50, 1)

    References:
        Olsson and Douc (2019), doi:10.3150/18-BEJ1041.
    """
    history = history_of(filtered)
    _check_spread(history)
    _check_lag(lag)
    if functional is not None:
        errors.check_arguments("functional", functional, "x")
    return _estimate_variance(history, captured(functional), lag)


def fixed_lag_smoother(
    filtered: FilterResult, lag: int, functional: Callable[[PyTree], PyTree] | None = None
) -> PyTree:
    """E[f(x_t) | y_0..y_{min(t + lag, T - 1)}] at every t, from the ancestors of the particles.

    What a filter that waits for `lag` more observations knows. The longer the lag, the nearer to the smoothed mean, and
    the fewer are the ancestors that it is an average of.

    Args:
        filtered: of `particle_filter(..., store="full")`; or "window", for the last steps alone.
        lag: L >= 0; 0 is the filter.
        functional: f, of one state; the state itself by default.

    Returns:
        Estimates with leading axis T, or the window.

    Raises:
        ValueError: `filtered` is a batch of filters, or did not store its history, or `lag` is no whole number of
            at least 0.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=500, store="full")
        >>> bi.kernels.fixed_lag_smoother(filtered, 5).shape
        (50, 1)

    References:
        Kitagawa and Sato (2001), doi:10.1007/978-1-4757-3437-9_9.
    """
    history = history_of(filtered, is_whole=False)
    errors.check_count("lag", lag, minimum=0)
    if functional is not None:
        errors.check_arguments("functional", functional, "x")
    return _fixed_lag(history, captured(functional), lag)


@partial(jax.jit, static_argnums=1)
def trace_ancestors(ancestors: Int[Array, "t n"], lag: int | None) -> Int[Array, "t n"]:
    """E_t^i: the index at time max(t - lag, 0) of the ancestor of particle i of time t; at time 0 for None."""
    num = ancestors.shape[1]
    own = jnp.arange(num, dtype=ancestors.dtype)
    if lag == 0:
        return jnp.broadcast_to(own, ancestors.shape)
    # the ancestors 1, ..., lag steps back, of which those before time 0 stay there
    depth = 1 if lag is None else lag
    start = jnp.broadcast_to(own, (depth, num))

    def step(lines, ancestors_t):
        younger = lines if lag is None else jnp.concatenate([own[None], lines[:-1]])
        lines = younger[:, ancestors_t]
        return lines, lines[-1]

    _, traced = jax.lax.scan(step, start, ancestors[1:])
    return jnp.concatenate([own[None], traced])


@jax.jit
def _evidence_variance(history: History, is_resampled: Array) -> Array:
    roots = trace_ancestors(history.ancestors, None)[-1]
    num = roots.shape[0]
    masses = jax.ops.segment_sum(jnp.exp(history.log_weights[-1]), roots, num)
    inflation = (num / (num - 1)) ** (jnp.sum(is_resampled) + 1)
    return 1.0 - inflation * (1.0 - jnp.sum(masses**2))


@partial(jax.jit, static_argnums=(1, 2))
def _estimate_variance(history: History, functional: Callable | None, lag: int | None) -> PyTree:
    related = trace_ancestors(history.ancestors, lag)
    num = related.shape[1]
    values = history.particles if functional is None else jax.vmap(jax.vmap(functional))(history.particles)

    def variance(values, log_weights, related):
        w = jnp.exp(log_weights).reshape((-1,) + (1,) * (values.ndim - 1))
        parts = w * (values - jnp.sum(w * values, axis=0))
        return jnp.sum(jax.ops.segment_sum(parts, related, num) ** 2, axis=0)

    return jax.tree.map(lambda leaf: jax.vmap(variance)(leaf, history.log_weights, related), values)


@partial(jax.jit, static_argnums=(1, 2))
def _fixed_lag(history: History, functional: Callable | None, lag: int) -> PyTree:
    num_steps = history.log_weights.shape[0]
    values = history.particles if functional is None else jax.vmap(jax.vmap(functional))(history.particles)
    traced = trace_ancestors(history.ancestors, lag)
    # at time t + lag the ancestors at t are known; those of the last lag times are seen from the last one
    ends = jnp.minimum(jnp.arange(num_steps) + lag, num_steps - 1)
    log_weights = history.log_weights[ends]

    def lines(carry, row):
        """The indices at time t of the particles of the last time, for t from the last one down."""
        index, ancestors = carry, row
        return ancestors[index], index

    last = jnp.arange(traced.shape[1], dtype=traced.dtype)
    _, from_last = jax.lax.scan(lines, last, history.ancestors, reverse=True)
    is_inside = (jnp.arange(num_steps) + lag < num_steps)[:, None]
    indices = jnp.where(is_inside, traced[ends], from_last)

    def average(values):
        chosen = jax.vmap(gather)(values, indices)
        return jnp.einsum("tn,tn...->t...", jnp.exp(log_weights), chosen)

    return jax.tree.map(average, values)


def history_of(filtered: Any, *, is_whole: bool = True) -> History:
    """The history of a single filter that stored one, of all steps or, where that will do, of the last ones."""
    if not isinstance(filtered, FilterResult) or not isinstance(filtered.history, History):
        raise ValueError("filtered must hold its history; call particle_filter with store='full'")
    check_single(filtered)
    num_steps, num_stored = filtered.ess.shape[-1], filtered.history.log_weights.shape[-2]
    if is_whole and num_stored < num_steps:
        raise ValueError(
            f"filtered must hold its whole history, got the last {num_stored} of {num_steps} steps; call "
            "particle_filter with store='full'"
        )
    return filtered.history


def _check_spread(history: History) -> None:
    """A single particle shows none: its estimates would seem to have no variance at all."""
    if history.log_weights.shape[-1] < 2:
        raise ValueError(
            "filtered must hold at least 2 particles, got 1: the variance is estimated from their spread; call "
            "particle_filter with more, or compare runs with several keys"
        )


def _check_lag(lag: int | None) -> None:
    if lag is not None:
        errors.check_count("lag", lag, minimum=0)
