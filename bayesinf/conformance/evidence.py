"""Unbiasedness of an estimator of the evidence: E[Zhat / Z] = 1, of Zhat itself and not of its logarithm."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, ArrayLike, Key

from bayesinf import errors
from bayesinf.conformance.batches import batch_size
from bayesinf.conformance.report import Report
from bayesinf.errors import KeyLike

__all__ = ["evidence_is_unbiased"]

BATCH = 1_000


def evidence_is_unbiased(
    key: KeyLike,
    estimate_log_evidence: Callable[[Key[Array, ""]], Array],
    log_evidence: ArrayLike,
    *,
    num_replicates: int = 10_000,
) -> Report:
    """Tests that exp of an estimated log evidence has the exact evidence as its mean.

        E[exp(log Zhat - log Z)] = 1

    Particle filters, annealed importance sampling and SMC samplers satisfy this for any number of particles; take few,
    and many replicates. The ratios are skewed to the right, so the test is a t-test with Hall's correction for
    skewness. Trust it while `notes["effective replicates"]`, n / (1 + relative variance), is in the hundreds; below
    that the mean hangs on rare large ratios, and more replicates or particles are needed. log Zhat = -inf is a fair
    estimate of 0. A deviation within the rounding of log Zhat, 16 eps max(1, |log Z|), is no bias.

    Args:
        key: PRNG key or seed.
        estimate_log_evidence: `estimate_log_evidence(key)` returns log Zhat, a scalar; compiled and vectorised.
        log_evidence: log Z, exact.
        num_replicates: n.

    Returns:
        A Report; `notes` has the mean ratio, the relative variance and the effective replicates.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf import conformance
        >>> def importance_sampling(key):    # of the integral of exp(-x^2 / 2), by 8 draws from a wider Gaussian
        ...     x = 1.5 * jax.random.normal(key, (8,))
        ...     log_weights = -0.5 * x**2 + 0.5 * (x / 1.5) ** 2 + jnp.log(1.5 * jnp.sqrt(2 * jnp.pi))
        ...     return jax.nn.logsumexp(log_weights) - jnp.log(8.0)
        >>> report = conformance.evidence_is_unbiased(0, importance_sampling, 0.5 * jnp.log(2 * jnp.pi))
        >>> report.p_value > conformance.FALSE_ALARM
        True

    References:
        Del Moral (2004), doi:10.1007/978-1-4684-9393-1 (unbiasedness).
        Hall (1992), doi:10.1111/j.2517-6161.1992.tb01872.x (the correction for skewness).
    """
    errors.check_count("num_replicates", num_replicates, minimum=100)
    keys = jax.random.split(errors.as_key(key), num_replicates)
    log_estimates = np.asarray(_replicate(estimate_log_evidence, keys))
    log_evidence = float(np.asarray(log_evidence))
    log_ratios = log_estimates.astype(np.float64) - log_evidence
    if log_ratios.shape != (num_replicates,):
        raise ValueError(f"estimate_log_evidence must return a scalar, got shape {log_ratios.shape[1:]}")
    if np.isnan(log_ratios).any() or np.isposinf(log_ratios).any():
        share = float(np.mean(~(log_ratios < np.inf)))
        return Report("evidence_is_unbiased", {"log evidence is finite": 0.0}, {"share NaN or inf": share})
    ratios = np.exp(log_ratios)
    relative_variance = float(np.var(ratios) / np.mean(ratios) ** 2) if ratios.any() else np.inf
    notes = {
        "mean ratio": float(np.mean(ratios)),
        "relative variance": relative_variance,
        "effective replicates": num_replicates / (1.0 + relative_variance),
    }
    rounding = 16 * float(jnp.finfo(log_estimates.dtype).eps) * max(1.0, abs(log_evidence))
    return Report("evidence_is_unbiased", {"mean of Zhat/Z": _skewed_mean_p_value(ratios, 1.0, rounding)}, notes)


@eqx.filter_jit
def _replicate(estimate: Callable[[Key[Array, ""]], Array], keys: Key[Array, " n"]) -> Array:
    return jax.lax.map(estimate, keys, batch_size=batch_size(keys.size, BATCH))


def _skewed_mean_p_value(samples: np.ndarray, truth: float, slack: float) -> float:
    """The p-value of Hall's transform of the t-statistic, which is normal up to O(1/n) where t is up to O(1/sqrt n)."""
    n, sd = samples.size, np.std(samples, ddof=1)
    gap = float(np.mean(samples)) - truth
    if abs(gap) <= slack:
        return 1.0
    if sd == 0.0 or not np.isfinite(sd):
        return 0.0
    skewness = float(np.mean((samples - np.mean(samples)) ** 3) / sd**3)
    s = (gap - np.sign(gap) * slack) / sd
    z = np.sqrt(n) * (s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n))
    return float(2 * scipy.stats.norm.sf(abs(z)))
