"""Sets for the next observation of a filtered model: scores of y_t from what was known before it.

A particle filter, or the filter of a hidden Markov model, predicts y_t by a mixture, with weights W_i of the states x_i
that are predicted for time t, before y_t is weighed in:

    HPD    s_t = -log sum_i W_i g(y_t | x_i)                                    sets of highest predictive density
    PIT    F_t = sum_i W_i G(y_t | x_i),   s_t = |F_t - 1/2|                    central sets

F_t are uniform and independent if the model is right, and the particles many. Where it is wrong the sets {F_t within
1/2 +- (1 - alpha) / 2} miss too often or too seldom; the scores, fed to `run_online`, keep the long-run promise
whatever the model. Log weights after y_t was weighed in make every observation look likely: take `log_predicted`, of
the steps of a `ParticleFilter` or of `hmm_filter`.

References:
    Rosenblatt (1952), doi:10.1214/aoms/1177729394 (the transform).
    Diebold, Gunther and Tay (1998), doi:10.2307/2527342 (of forecasts).
    Gibbs and Candès (2021), https://arxiv.org/abs/2106.00170 (what the scores are for).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from bayesinf import errors, weights
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.split import Interval

__all__ = ["central_interval", "filtered_pit", "filtered_scores"]


def filtered_scores(log_weights: Float[Array, "*t n"], log_lik: Float[Array, "*t n"]) -> Float[Array, "*t"]:
    """The HPD scores of observations, minus the log of their predictive densities.

    Args:
        log_weights: of the states before y_t is weighed in, unnormalised; the last axis is of states.
        log_lik: log g(y_t | x_i), of the same states; NaN in all of them where y_t is missing.

    Returns:
        Scores, larger where stranger; +inf where no state can have made y_t, NaN where it is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> log_weights, log_lik = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.2, 0.6]]))
        >>> round(float(jnp.exp(-conformal.filtered_scores(log_weights, log_lik))[0]), 4)
        0.4
    """
    log_w = _normalize("log_lik", log_weights, log_lik)
    scores = -weights.log_sum_exp(log_w + log_lik)
    return jnp.where(jnp.all(jnp.isnan(log_lik), -1), jnp.nan, scores)


def filtered_pit(
    log_weights: Float[Array, "*t n"],
    cdf: Float[Array, "*t n"],
    *,
    cdf_before: Float[Array, "*t n"] | None = None,
    key: errors.KeyLike | None = None,
) -> Float[Array, "*t"]:
    """The probability integral transforms of observations under their predictive laws.

        F_t = F(y_t-) + U_t (F(y_t) - F(y_t-)),    F(y) = sum_i W_i G(y | x_i)

    Args:
        log_weights: of the states before y_t is weighed in, unnormalised; the last axis is of states.
        cdf: G(y_t | x_i), of the same states; NaN in all of them where y_t is missing.
        cdf_before: G(y_t- | x_i), P(Y < y_t): where observations are discrete, with a key.
        key: PRNG key or seed, of the uniforms.

    Returns:
        Values in [0, 1]; uniform where the model is right. `pit_score` makes scores of them.

    Raises:
        ValueError: of cdf_before and key only one is given, or shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> pit = conformal.filtered_pit(jnp.log(jnp.array([0.25, 0.75])), jnp.array([1.0, 0.5]))
        >>> round(float(pit), 4), round(float(conformal.pit_score(pit)), 4)
        (0.625, 0.125)
    """
    if (cdf_before is None) != (key is None):
        raise ValueError("cdf_before and key, which draws between it and cdf, go together; give both, or neither")
    w = jnp.exp(_normalize("cdf", log_weights, cdf))
    at = jnp.sum(w * cdf, -1)
    if cdf_before is None or key is None:
        return jnp.clip(at, 0.0, 1.0)
    before = jnp.sum(w * cdf_before, -1)
    return jnp.clip(before + jax.random.uniform(errors.as_key(key), at.shape) * (at - before), 0.0, 1.0)


def central_interval(
    cdf: Callable[[Array], Array],
    threshold: Real[Array, "*t"] | float,
    low: Real[Array, "*t"] | float,
    high: Real[Array, "*t"] | float,
    *,
    guarantee: Guarantee | None = None,
    num_steps: int = 50,
) -> Interval:
    """The set { y : |F(y) - 1/2| <= threshold } of a PIT score, by bisection.

    Args:
        cdf: F, of an array of the shape of the thresholds to values of that shape, not decreasing.
        threshold: as from `run_online`; 1/2 and more is everything, and below 0 nothing.
        low, high: where to look; an end that is not between them is infinite.
        guarantee: what the threshold promises, such as that of `run_online`.
        num_steps: halvings of [low, high].

    Returns:
        Interval, never narrower than the set by more than rounding.

    Example:
        >>> import jax
        >>> from bayesinf.models import conformal
        >>> found = conformal.central_interval(jax.scipy.stats.norm.cdf, 0.45, -10.0, 10.0)
        >>> round(float(found.lower), 2), round(float(found.upper), 2)
        (-1.64, 1.64)
    """
    num_steps = errors.check_count("num_steps", num_steps)
    q = jnp.asarray(threshold, float)
    low, high, q = jnp.broadcast_arrays(jnp.asarray(low, q.dtype), jnp.asarray(high, q.dtype), q)
    if errors.is_concrete((low, high)) and not bool(jnp.all(low < high)):
        raise ValueError("low must be below high")

    def halve(_: Array, ends: tuple[Array, ...]) -> tuple[Array, ...]:
        lower, lower_in, upper_in, upper = ends
        middle = 0.5 * (lower + lower_in)
        is_out = cdf(middle) < 0.5 - q
        lower, lower_in = jnp.where(is_out, middle, lower), jnp.where(is_out, lower_in, middle)
        middle = 0.5 * (upper_in + upper)
        is_out = cdf(middle) > 0.5 + q
        return lower, lower_in, jnp.where(is_out, upper_in, middle), jnp.where(is_out, middle, upper)

    lower, _, _, upper = jax.lax.fori_loop(0, num_steps, halve, (low, high, low, high))
    lower = jnp.where((q >= 0.5) | (cdf(low) >= 0.5 - q), -jnp.inf, lower)
    upper = jnp.where((q >= 0.5) | (cdf(high) <= 0.5 + q), jnp.inf, upper)
    if guarantee is None:
        guarantee = Guarantee("asymptotic", "P(y in set) -> 2 threshold", "F is the law of y in the limit")
    return Interval(jnp.where(q < 0, jnp.inf, lower), jnp.where(q < 0, -jnp.inf, upper), guarantee)


def _normalize(name: str, log_weights: Array, terms: Array) -> Array:
    if log_weights.shape != terms.shape:
        raise ValueError(f"{name} must have the shape {log_weights.shape} of log_weights, got {terms.shape}")
    return weights.normalize(log_weights)[0]
