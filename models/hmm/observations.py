"""Data of a hidden Markov model, with what is missing taken out."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.inputs import check_lengths, each
from bayesinf.models.hmm.recursion import Method
from bayesinf.models.hmm.statistics import forward

__all__ = ["Observations", "evidence", "observe", "score"]


class Observations(NamedTuple):
    """Data as the emissions take them: B series of T rows.

    Attributes:
        ys: shape (B, T, ...); what is missing is replaced by a value inside the support.
        features: what the laws are given as covariates, shape (B, T, p), or None.
        is_seen: whether the row is scored.
        lengths: of the series.
        is_single: whether the user gave one series, without the first axis.
    """

    ys: Array
    features: Array | None
    is_seen: Bool[Array, "b t"]
    lengths: Int[Array, " b"]
    is_single: bool | None


def observe(
    emission: Emission, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None
) -> Observations:
    """The data checked, with what is missing taken out.

    Args:
        emission: what the data are of.
        ys: one series of shape (T, ...), or several of shape (B, T, ...); NaN where missing.
        covariates: shape (T, p) or (B, T, p).
        mask: True where observed, shape (T,) or (B, T).
        lengths: of several series, shape (B,).

    Raises:
        ValueError: a shape does not fit, a length is out of range, a value or covariate is infinite, or a row is
            partly missing and the emission cannot integrate that out.
    """
    series: Array = errors.as_array("ys", is_floating=True)(ys)
    event_ndim = emission.event_ndim
    if series.ndim not in (event_ndim + 1, event_ndim + 2) or 0 in series.shape:
        event = ", d" * event_ndim
        raise ValueError(f"ys must have shape (T{event}), or (B, T{event}) of several series, got {series.shape}")
    is_single = series.ndim == event_ndim + 1
    given: Array | None = None if covariates is None else errors.as_array("covariates", is_floating=True)(covariates)
    if is_single:
        if lengths is not None:
            raise ValueError("lengths are of several series, of shape (B, T, ...); one series has all its rows")
        series, given = series[None], None if given is None else given[None]
    shape = series.shape[:2]
    is_real, series, is_nan = _take_out(series, _mask(mask, shape), _lengths(lengths, shape))
    _check_values(emission, series, is_nan)
    is_seen = ~jnp.all(is_nan, -1) if emission.takes_partial else ~jnp.any(is_nan, -1)
    features = each(emission.features, series, given)
    if features is not None:
        _check_features(features, is_real)
        is_seen = is_seen & ~jnp.any(jnp.isnan(features), -1)
        features = _where_rows(is_seen, features, 0.0)
    if not emission.takes_partial:
        series = _where_rows(is_seen, series, emission.filler)
    return Observations(series, features, is_seen, _lengths(lengths, shape), is_single)


@eqx.filter_jit
def score(emission: Emission, data: Observations) -> Float[Array, "b t k"]:
    """Log p(y_t | x_t = k); 0 where y_t is missing."""
    shape = data.is_seen.shape
    # rows of all series at once: under `vmap` a branch for rows missing in part would always be taken
    ys, features = data.ys, data.features
    rows = ys.reshape(-1, *ys.shape[2:])
    beside = None if features is None else features.reshape(-1, *features.shape[2:])
    return jnp.where(data.is_seen[..., None], emission.log_prob(rows, beside).reshape(*shape, -1), 0.0)


def evidence(model: Any, data: Observations, method: Method) -> Float[Array, ""]:
    """Log p(y) of all series together."""
    is_real = jnp.arange(data.is_seen.shape[1]) < data.lengths[:, None]

    def one(log_lik: Array, is_real: Array) -> Array:
        return forward(model.log_initial, model.log_transition, log_lik, is_real, method).log_evidence

    return jnp.sum(each(one, score(model.emission, data), is_real))


def _mask(mask: Any, shape: tuple[int, ...]) -> Array:
    is_observed = jnp.asarray(np.ones(shape, bool) if mask is None else mask)
    if is_observed.dtype != bool or is_observed.shape not in (shape, shape[1:]):
        raise ValueError(
            f"mask must be boolean, True where y_t is observed, of shape {shape[1:]} or {shape}, got "
            f"{is_observed.dtype} of shape {is_observed.shape}"
        )
    return is_observed


def _lengths(lengths: Any, shape: tuple[int, ...]) -> Array:
    if lengths is None:
        return jnp.asarray(np.full(shape[0], shape[1]))
    counts = jnp.asarray(lengths)
    if counts.shape != shape[:1] or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be whole numbers of shape {shape[:1]}, got {counts.dtype} of shape {counts.shape}"
        )
    check_lengths(counts, shape[1])
    return counts


@jax.jit
def _take_out(series: Array, is_observed: Array, counts: Array) -> tuple[Array, Array, Array]:
    """Which rows there are, NaN where there is none, and what is NaN of each row."""
    is_real = is_observed & (jnp.arange(series.shape[1]) < counts[:, None])
    series = _where_rows(is_real, series, jnp.nan)
    return is_real, series, jnp.isnan(series).reshape(*series.shape[:2], -1)


@jax.jit
def _where_rows(is_kept: Array, rows: Array, otherwise: Array | float) -> Array:
    return jnp.where(is_kept.reshape(is_kept.shape + (1,) * (rows.ndim - 2)), rows, otherwise)


def _check_features(features: Array, is_real: Array) -> None:
    if not errors.is_concrete((features, is_real)):
        return
    is_infinite = np.isinf(np.asarray(features)).reshape(*is_real.shape, -1).any(-1) & np.asarray(is_real)
    if is_infinite.any():
        raise ValueError(
            "covariates must be finite, or NaN where missing, got infinite values at (series, step) "
            f"{np.argwhere(is_infinite)[:5].tolist()}"
        )


def _check_values(emission: Emission, ys: Array, is_nan: Array) -> None:
    if not errors.is_concrete((ys, is_nan)):
        return
    if np.any(np.isinf(np.asarray(ys))):
        raise ValueError("ys must be finite, or NaN where missing, got infinite values")
    missing = np.asarray(is_nan)
    is_partial = missing.any(-1) & ~missing.all(-1)
    if not emission.takes_partial and np.any(is_partial):
        raise ValueError(
            f"ys has rows that are missing in part, at (series, step) {np.argwhere(is_partial)[:5].tolist()}; "
            f"{type(emission).__name__} integrates out rows that are missing whole: set these to NaN throughout"
        )
