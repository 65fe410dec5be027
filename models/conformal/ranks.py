"""The law of the ranks of a batch of test points among calibration points, which no other law enters. On the host.

With n calibration and m test scores that are exchangeable, r_j = 1 + #{i : S_i < j-th smallest test score} is uniform
on the C(n + m, m) vectors with 1 <= r_1 <= ... <= r_m <= n + 1. So with C(a, b) binomial coefficients

    C(n + m, m) P(r_z = k)            = C(k + z - 2, z - 1) C(n + m - k - z + 1, m - z)
    C(n + m, m) P(r_z = k, r_w = l)   = C(k + z - 2, z - 1) C(l - k + w - z - 1, w - z - 1) C(n + m - l - w + 1, m - w)
    P(sum_j (r_j - 1) = u)            = the null law of the Mann-Whitney statistic U

the first being beta-binomial. Whole numbers decide which rank reaches a level, so that it is never off by one.

References:
    Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    Mann and Whitney (1947), doi:10.1214/aoms/1177730491.
"""

from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from math import comb

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from bayesinf import errors

__all__ = ["batch_rank", "batch_rank_pair", "rank_pmf", "rank_sum_pmf"]


def rank_pmf(n: int, m: int, zeta: int) -> Float[np.ndarray, " n_plus_1"]:
    """The law of the rank of the zeta-th smallest of m test scores among n calibration scores.

    Args:
        n: number of calibration scores.
        m: number of test scores.
        zeta: which of the test scores, 1 to m from below.

    Returns:
        P(r_zeta = k) for k = 1, ..., n + 1.

    Example:
        >>> from bayesinf.models.conformal import rank_pmf
        >>> [round(p, 3) for p in rank_pmf(n=3, m=2, zeta=2).tolist()]
        [0.1, 0.2, 0.3, 0.4]

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    check_sizes(n, m, zeta)
    total = comb(n + m, m)
    return np.array([count / total for count in _counts(n, m, zeta)])  # of whole numbers: correctly rounded


def batch_rank(n: int, m: int, zeta: int, alpha: float) -> int:
    """The smallest k with P(r_zeta <= k) >= 1 - alpha: the calibration score that bounds the zeta-th test score.

    Args:
        n: number of calibration scores.
        m: number of test scores.
        zeta: which of the test scores, 1 to m from below; m bounds them all.
        alpha: the level, as written: 0.1 is one tenth.

    Returns:
        k, from 1 to n + 1, where n + 1 means that no calibration score is high enough.

    Example:
        >>> from bayesinf.models.conformal import batch_rank
        >>> batch_rank(n=200, m=100, zeta=90, alpha=0.1)
        188

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    check_sizes(n, m, zeta)
    needed = (1 - as_fraction("alpha", alpha)) * comb(n + m, m)
    for k, total in enumerate(accumulate(_counts(n, m, zeta)), 1):
        if total >= needed:
            return k
    raise AssertionError("the counts add up to less than there are")


def batch_rank_pair(n: int, m: int, zeta_low: int, zeta_high: int, alpha: float) -> tuple[int, int]:
    """The closest p and q with P(p <= r_low and r_high <= q) >= 1 - alpha.

    Args:
        n: number of calibration scores.
        m: number of test scores.
        zeta_low: the lower of the test scores that are to be bounded, from below.
        zeta_high: the upper one, from above; at least `zeta_low`. Time and memory grow as n^2.
        alpha: the level, as written.

    Returns:
        p and q: the (p - 1)-th calibration score, -inf for p = 1, is a lower bound, the q-th, +inf for q = n + 1, an
        upper one. Of equally close pairs the most probable.

    Example:
        >>> from bayesinf.models.conformal import batch_rank_pair
        >>> batch_rank_pair(n=200, m=40, zeta_low=10, zeta_high=30, alpha=0.1)
        (28, 170)

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    check_sizes(n, m, zeta_low)
    check_sizes(n, m, zeta_high)
    if zeta_low > zeta_high:
        raise ValueError(f"zeta_low must be at most zeta_high, got {zeta_low} and {zeta_high}")
    needed = float(1 - as_fraction("alpha", alpha))
    # P(p <= r_low, r_high <= q), from the joint law by summing over both
    joint = _pair_pmf(n, m, zeta_low, zeta_high)
    within = np.cumsum(np.cumsum(joint[::-1], axis=0)[::-1], axis=1)
    p, q = np.indices(within.shape)
    # rounding must not admit a pair that misses its level by a hair
    is_enough = (within >= needed * (1 + 1e-9)) & (p <= q)
    is_enough[0, n] = True
    width = np.where(is_enough, q - p, 2 * n + 2)
    best = np.flatnonzero(width == width.min())
    i, j = np.unravel_index(best[np.argmax(within.ravel()[best])], within.shape)
    return int(i) + 1, int(j) + 1


def rank_sum_pmf(n: int, m: int, h0: Int[np.ndarray, " n_plus_1"] | None = None) -> Float[np.ndarray, " s"]:
    """The law of sum_j h0(r_j), by adding the ranks one at a time.

    With p_k[j] the law of the sum of j ranks that are uniform on 1 <= r_1 <= ... <= r_j <= k,

        p_k[j](s) = (k - 1) / (k + j - 1) p_{k-1}[j](s) + j / (k + j - 1) p_k[j - 1](s - h0(k))

    Args:
        n: number of calibration scores.
        m: number of test scores.
        h0: whole numbers h0(1), ..., h0(n + 1), none negative; r - 1 if left out, for which this is the null law of the
            Mann-Whitney statistic.

    Returns:
        P(sum = s) for s = 0, 1, ..., m max(h0).

    Example:
        >>> from bayesinf.models.conformal import rank_sum_pmf
        >>> [round(p, 3) for p in rank_sum_pmf(n=2, m=2).tolist()]
        [0.167, 0.167, 0.333, 0.167, 0.167]

    References:
        Mann and Whitney (1947), doi:10.1214/aoms/1177730491.
    """
    check_sizes(n, m, m)
    h0 = np.arange(n + 1) if h0 is None else np.asarray(h0)
    if h0.shape != (n + 1,) or h0.dtype.kind not in "iu" or h0.min() < 0:
        raise ValueError(f"h0 must be {n + 1} whole numbers, none negative, got {h0.dtype} of shape {h0.shape}")
    law = np.zeros((m + 1, m * int(h0.max()) + 1))
    law[0, 0] = 1.0
    for k, value in enumerate(h0.tolist(), 1):
        for j in range(1, m + 1):
            law[j] *= (k - 1) / (k + j - 1)
            law[j, value:] += j / (k + j - 1) * law[j - 1, : law.shape[1] - value]
    return law[m]


def num_needed(m: int, alpha: float, *, num_above: int, num_below: int = 0) -> int:
    """The fewest calibration scores with which bounds are finite.

    They are where the `num_above` highest of all n + m scores are of the batch, or the `num_below` lowest, with
    probability alpha at most,

        P(the a highest are) = C(n + m - a, n) / C(n + m, n)

    For zeta-th smallest test scores that are bounded from above a = m - zeta + 1, from below zeta itself.
    """
    level = as_fraction("alpha", alpha)

    def is_enough(n: int) -> bool:
        share = comb(n + m - num_above, n)
        if num_below:
            share += comb(n + m - num_below, n) - comb(n + m - num_above - num_below, n)
        return share <= level * comb(n + m, n)

    most = 1
    while not is_enough(most):
        most *= 2
    return bisect_left(range(most + 1), True, lo=1, key=is_enough)


def check_sizes(n: int, m: int, zeta: int) -> None:
    """N and m at least 1, and zeta one of 1, ..., m."""
    errors.check_count("n", n)
    errors.check_count("m", m)
    if errors.check_count("zeta", zeta) > m:
        raise ValueError(f"zeta must be at most m={m}, the number of test scores, got {zeta}")


def as_fraction(name: str, level: float) -> Fraction:
    """The decimal number that was written, not the binary one nearest to it."""
    errors.check_fraction(name, level)
    return Fraction(repr(float(level)))


def _counts(n: int, m: int, zeta: int) -> Iterator[int]:
    """C(k + zeta - 2, zeta - 1) C(n + m - k - zeta + 1, m - zeta) for k = 1, ..., n + 1."""
    low, high = 1, comb(n + m - zeta, m - zeta)
    for k in range(1, n + 2):
        yield low * high
        low = low * (k + zeta - 1) // k
        high = high * (n - k + 1) // max(n + m - k - zeta + 1, 1)


def _pair_pmf(n: int, m: int, z: int, w: int) -> Float[np.ndarray, "n_plus_1 n_plus_1"]:
    """P(r_z = k, r_w = l) at [k - 1, l - 1]."""
    if z == w:
        return np.diag(rank_pmf(n, m, z))
    k, last = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    between = np.maximum(last - k, 0)
    log_joint = (
        _log_choose(k + z - 1, z - 1)
        + _log_choose(between + w - z - 1, w - z - 1)
        + _log_choose(n - last + m - w, m - w)
    )
    return np.where(last >= k, np.exp(log_joint - _log_choose(n + m, m)), 0.0)


def _log_choose(a: np.ndarray | int, b: int) -> np.ndarray | np.floating:
    return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
