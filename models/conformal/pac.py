"""Probably approximately correct (PAC) prediction sets: an error rate that holds for the calibration that was drawn.

A conformal set has its coverage on average over calibration sets too. Here the threshold tau is such that

    P( P(score > tau | calibration) <= eps ) >= 1 - delta

over independent calibration scores s_1, ..., s_n: with F the binomial distribution function,

    k = max { k : F(k; n, eps) <= delta },   tau = s_(n - k);   +inf if there is no such k

at most k calibration scores are above tau. Monotone sets of one number, {y : s(x, y) <= tau}, are all this needs of a
model: those of labels, of intervals, of programs.

References:
    Wilks (1941), doi:10.1214/aoms/1177731788.
    Park, Bastani, Matni and Lee (2020), https://arxiv.org/abs/2001.00106.
    Khakhar, Mell and Bastani (2023), https://arxiv.org/abs/2302.08703.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee, explain_infinite

__all__ = ["PACThreshold", "pac_count", "pac_threshold"]

GUARANTEE = Guarantee(
    "exact",
    "P(score > threshold | calibration) <= eps, with probability >= 1 - delta over calibration sets",
    "calibration and test scores are independent and identically distributed",
)


class PACThreshold(eqx.Module):
    """The set is what has a score of at most the threshold.

    Attributes:
        threshold: +inf where there are too few calibration scores: `why_infinite` says so.
        num_scores: how many there are.
        num_needed: how many it takes for a finite threshold.
        guarantee: what it promises.
    """

    threshold: Float[Array, ""]
    num_scores: Int[Array, ""]
    num_needed: Int[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why the threshold is +inf; empty where it is not. Not for `jit`.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models.conformal import pac_threshold
            >>> pac_threshold(jnp.arange(20.0), eps=0.1, delta=0.05).why_infinite()
            'it takes 29 calibration scores, got 20'
        """
        return explain_infinite(self.threshold, self.num_scores, self.num_needed)


def pac_count(n: int, eps: float, delta: float) -> int:
    """How many of n calibration points may be missed: the largest k with P(Binomial(n, eps) <= k) <= delta.

    Args:
        n: number of calibration scores.
        eps: the error rate that is allowed.
        delta: the probability of a higher one that is allowed.

    Returns:
        k, or -1 where n is too small for any: n < log(delta) / log(1 - eps).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from bayesinf.models.conformal import pac_count
        >>> pac_count(500, eps=0.1, delta=0.05), pac_count(28, eps=0.1, delta=0.05)
        (38, -1)

    References:
        Wilks (1941), doi:10.1214/aoms/1177731788.
    """
    errors.check_count("n", n)
    errors.check_fraction("eps", eps)
    errors.check_fraction("delta", delta)
    return int(np.searchsorted(scipy.stats.binom(n, eps).cdf(np.arange(n + 1)), delta, side="right")) - 1


def pac_threshold(cal: Float[Array | np.ndarray, " n"], eps: float, delta: float) -> PACThreshold:
    """The threshold of scores with an error rate of at most eps, with confidence 1 - delta.

    Args:
        cal: calibration scores, high where the truth is strange.
        eps: the error rate that is allowed, known before compilation.
        delta: the probability of a higher one that is allowed, known before compilation.

    Returns:
        The threshold.

    Raises:
        ValueError: an argument is out of its range, or a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import pac_threshold
        >>> float(pac_threshold(jnp.arange(1.0, 501.0), eps=0.1, delta=0.05).threshold)
        462.0

    References:
        Park, Bastani, Matni and Lee (2020), https://arxiv.org/abs/2001.00106.
    """
    errors.check_not_nan("cal", cal)
    ordered = jnp.append(jnp.sort(jnp.asarray(cal)), jnp.inf)
    n = len(cal)
    rank = n - pac_count(n, eps, delta)
    needed = int(np.ceil(np.log(delta) / np.log1p(-eps) * (1 - 1e-12)))  # P(no miss of n) = (1 - eps)^n <= delta
    counts = jnp.asarray(n), jnp.asarray(needed)
    return PACThreshold(ordered[rank - 1], *counts, GUARANTEE)
