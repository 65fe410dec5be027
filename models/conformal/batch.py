"""Batch predictive inference: one bound for a statistic of many test scores at once.

Of a batch of m test points the same calibration bounds the median, the maximum (a simultaneous set), the share that is
covered, the number of false selections, or the mean. With S_(1) <= ... <= S_(n) the sorted calibration scores, and
S_(n+1) the supremum of scores, ranks r that are uniform on their vectors (`ranks`), h a function of ranks that does not
depend on the scores and q with P(h(r) <= q) >= 1 - alpha,

    P( g(test scores) <= max { g(S_(r_1), ..., S_(r_m)) : h(r) <= q } ) >= 1 - alpha       for g monotone

For the zeta-th smallest test score h(r) = r_zeta, and the bound is the calibration score of that rank. For the mean
h(r) = sum_j h0(r_j), and the bound is found by dynamic programming over sums of ranks.

References:
    Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee, explain_infinite
from bayesinf.models.conformal.ranks import (
    as_fraction,
    batch_rank,
    batch_rank_pair,
    num_needed,
    rank_pmf,
    rank_sum_pmf,
)

__all__ = [
    "BatchBound",
    "BatchInterval",
    "BatchPValue",
    "BatchSelection",
    "batch_interval",
    "batch_mean_bound",
    "batch_p_value",
    "batch_quantile_bound",
    "batch_selection",
]

ASSUMES = "calibration and test scores are exchangeable"
_UNBOUNDED = "a score that the bound is made of is infinite itself; of a mean every score must be at most `sup`"
_ONE_SIDED = "the closest interval with this probability goes beyond all scores on one side, or they are infinite"


class BatchBound(eqx.Module):
    """An upper bound of a statistic of m test scores.

    Attributes:
        bound: +inf where there are too few calibration scores: `why_infinite` says so.
        num_scores: how many there are.
        num_needed: how many it takes for a finite bound; of a mean without `sup` none are enough, and it is 0.
        guarantee: what it promises.
    """

    bound: Float[Array, ""]
    num_scores: Int[Array, ""]
    num_needed: Int[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why the bound is +inf; empty where it is not. Not for `jit`.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models.conformal import batch_quantile_bound
            >>> batch_quantile_bound(jnp.arange(50.0), m=10, zeta=10, alpha=0.1).why_infinite()
            'it takes 90 calibration scores, got 50'
        """
        return explain_infinite(self.bound, self.num_scores, self.num_needed, _UNBOUNDED)


class BatchInterval(eqx.Module):
    """Where two order statistics of m test scores lie, both at once.

    Attributes:
        lower: below the lower one; -inf where there are too few calibration scores: `why_infinite` says so.
        upper: above the upper one; +inf where there are too few.
        num_scores: how many there are.
        num_needed: how many it takes for two finite ends.
        guarantee: what they promise.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    num_scores: Int[Array, ""]
    num_needed: Int[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why an end is infinite; empty where none is. Not for `jit`."""
        ends = np.where(np.isinf(np.asarray(self.lower)), np.inf, np.asarray(self.upper))
        return explain_infinite(ends, self.num_scores, self.num_needed, _ONE_SIDED)


class BatchSelection(eqx.Module):
    """Test points that are selected, few of them falsely.

    Attributes:
        is_selected: which.
        threshold: those with a higher score; +inf, and none is, where there are too few calibration points:
            `why_infinite` says so.
        num_scores: how many there are.
        num_needed: how many it takes for a finite threshold.
        guarantee: what the selection promises.
    """

    is_selected: Bool[Array, " m"]
    threshold: Float[Array, ""]
    num_scores: Int[Array, ""]
    num_needed: Int[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why the threshold is +inf and nothing selected; empty where it is not. Not for `jit`."""
        is_selectable = np.isneginf(np.asarray(self.threshold))  # no null was seen
        return explain_infinite(np.where(is_selectable, 0.0, self.threshold), self.num_scores, self.num_needed)


class BatchPValue(eqx.Module):
    """Whether a batch has higher scores than the calibration points.

    Attributes:
        p: small where the batch's zeta-th score is high.
        guarantee: what it promises.
    """

    p: Float[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)


def batch_quantile_bound(cal: Float[Array | np.ndarray, " n"], m: int, zeta: int, alpha: float) -> BatchBound:
    """An upper bound of the zeta-th smallest of m test scores.

        P(S^test_(zeta) <= S_(k)) >= 1 - alpha,   k = batch_rank(n, m, zeta, alpha)

    With zeta = m it bounds all of them, so that the sets {y : s(x_j, y) <= bound} hold at all m test points at once;
    with zeta = ceil((1 - delta) m) at a share 1 - delta of them; with m = zeta = 1 this is split conformal prediction.

    Args:
        cal: calibration scores.
        m: number of test points.
        zeta: 1 to m.
        alpha: the level, known before compilation.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import batch_quantile_bound
        >>> cal = jnp.arange(1.0, 201.0)
        >>> found = batch_quantile_bound(cal, m=100, zeta=90, alpha=0.1)
        >>> float(found.bound)
        188.0
        >>> print(found.guarantee)
        exact: P(zeta-th smallest of m test scores <= bound) >= 1 - alpha, if calibration and test scores ...

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    rank = batch_rank(len(cal), m, zeta, alpha)
    statement = "P(zeta-th smallest of m test scores <= bound) >= 1 - alpha"
    counts = jnp.asarray(len(cal)), jnp.asarray(num_needed(m, alpha, num_above=m - zeta + 1))
    return BatchBound(_ordered(cal)[rank], *counts, Guarantee("exact", statement, ASSUMES))


def batch_interval(
    cal: Float[Array | np.ndarray, " n"], m: int, zeta_low: int, zeta_high: int, alpha: float
) -> BatchInterval:
    """Bounds of two order statistics of m test scores at once, as the quartiles: closer than two bounds at alpha / 2.

    Args:
        cal: calibration scores.
        m: number of test points.
        zeta_low: the order statistic that is bounded from below, 1 to m.
        zeta_high: the one that is bounded from above, `zeta_low` to m.
        alpha: the level, known before compilation.

    Returns:
        P(lower <= zeta_low-th smallest and zeta_high-th smallest <= upper) >= 1 - alpha.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import batch_interval
        >>> found = batch_interval(jnp.arange(1.0, 201.0), m=40, zeta_low=10, zeta_high=30, alpha=0.1)
        >>> float(found.lower), float(found.upper)
        (27.0, 170.0)

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    p, q = batch_rank_pair(len(cal), m, zeta_low, zeta_high, alpha)
    ordered = _ordered(cal)
    statement = "P(lower <= zeta_low-th and zeta_high-th smallest of m test scores <= upper) >= 1 - alpha"
    needed = num_needed(m, alpha, num_above=m - zeta_high + 1, num_below=zeta_low)
    counts = jnp.asarray(len(cal)), jnp.asarray(needed)
    return BatchInterval(ordered[p - 1], ordered[q], *counts, Guarantee("exact", statement, ASSUMES))


def batch_mean_bound(
    cal: Float[Array | np.ndarray, " n"],
    m: int,
    alpha: float,
    *,
    h0: Int[np.ndarray, " n_plus_1"] | None = None,
    sup: Float[Array, ""] | float = np.inf,
) -> BatchBound:
    """An upper bound of the mean of m test scores.

    With the distribution of h(r) = sum_j h0(r_j), the level q is known before the scores are, and the bound is

        D[0, 0] = 0,   D[j, s] = max_r D[j - 1, s - h0(r)] + S_(r),   max_{s <= q} D[m, s] / m

    in O(m n q) operations. The bound holds for every h0, and is the closer the more h0(r) resembles S_(r): take
    quantiles of scores of other data, rounded to whole numbers.

    Args:
        cal: calibration scores.
        m: number of test points.
        alpha: the level, known before compilation.
        h0: n + 1 whole numbers that do not depend on `cal` or the test scores; r - 1 if left out.
        sup: an upper bound of all scores, of calibration and of the test points. Without one there is none of the
            mean: it is +inf as soon as one test score may be above all of calibration.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of its range, a score is NaN, or one is above `sup`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import batch_mean_bound
        >>> cal = jnp.linspace(0.0, 1.0, 50)
        >>> found = batch_mean_bound(cal, m=20, alpha=0.1, sup=1.0)
        >>> round(float(found.bound), 3)
        0.611

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    n = len(cal)
    errors.check_not_nan("cal", cal)
    if n and errors.is_concrete((cal, sup)) and not np.max(np.asarray(cal)) <= np.asarray(sup):
        raise ValueError(
            f"sup must be an upper bound of all scores, got {float(sup):g} and a score of {np.max(np.asarray(cal)):g} "
            "in cal; clip the scores of calibration and test points alike, or pass a bound that holds"
        )
    h0 = np.arange(n + 1) if h0 is None else np.asarray(h0)
    h0 = h0 - h0.min() if h0.size else h0  # m times the least adds nothing
    law = np.cumsum(rank_sum_pmf(n, m, h0))
    # a level that is met exactly is met, whatever the last digits of the sums
    q = int(np.searchsorted(law, float(1 - as_fraction("alpha", alpha)) * (1 - 1e-12)))
    bound = _largest_sum(jnp.append(jnp.sort(jnp.asarray(cal)), sup), jnp.asarray(h0), m, min(q, len(law) - 1)) / m
    statement = "P(mean of m test scores <= bound) >= 1 - alpha"
    return BatchBound(bound, jnp.asarray(n), jnp.asarray(0), Guarantee("exact", statement, ASSUMES))


def batch_selection(
    scores: Float[Array | np.ndarray, " n"],
    is_null: Bool[Array | np.ndarray, " n"],
    test_scores: Float[Array | np.ndarray, " m"],
    num_false: int,
    alpha: float,
) -> BatchSelection:
    """Selects test points with high scores, at most `num_false` of them falsely.

    With S the score of a calibration point that is null, and -inf of one that is not, the (m - eta)-th smallest S of
    the test points is at most S_(k) with probability 1 - alpha, and then no more than eta nulls have a score above.

    Args:
        scores: of calibration points, high where a point seems worth selecting.
        is_null: which calibration points should not be selected.
        test_scores: of the m test points.
        num_false: eta, 0 to m - 1: how many false selections are allowed.
        alpha: the probability of more of them that is allowed, known before compilation.

    Returns:
        The selection.

    Raises:
        ValueError: an argument is out of its range, or a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import batch_selection
        >>> scores = jnp.arange(1.0, 101.0)
        >>> found = batch_selection(scores, scores < 60.0, jnp.array([10.0, 50.0, 70.0, 90.0]), num_false=0, alpha=0.1)
        >>> found.is_selected.tolist()
        [False, False, True, True]

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    m = len(test_scores)
    errors.check_count("num_false", num_false, minimum=0)
    if num_false >= m:
        raise ValueError(f"num_false must be less than the {m} test points, got {num_false}")
    errors.check_not_nan("scores", scores)
    errors.check_not_nan("test_scores", test_scores)
    found = batch_quantile_bound(
        jnp.where(jnp.asarray(is_null), jnp.asarray(scores), -jnp.inf), m, m - num_false, alpha
    )
    assumes = "calibration and test points are exchangeable"
    guarantee = Guarantee("exact", "P(more than num_false nulls selected) <= alpha", assumes)
    is_selected = jnp.asarray(test_scores) > found.bound
    return BatchSelection(is_selected, found.bound, found.num_scores, found.num_needed, guarantee)


def batch_p_value(
    cal: Float[Array | np.ndarray, " n"], test: Float[Array | np.ndarray, " m"], zeta: int
) -> BatchPValue:
    """The p-value of a batch, against that it is exchangeable with the calibration points.

        p = P(r_zeta > t),   t = #{i : S_i < zeta-th smallest test score}

    Args:
        cal: calibration scores.
        test: scores of the batch.
        zeta: which of the batch's scores is compared, 1 to m: the median of a batch that has shifted, the largest where
            one point may have.

    Returns:
        p, with P(p <= alpha) <= alpha.

    Raises:
        ValueError: `zeta` is out of its range, or a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import batch_p_value
        >>> cal = jnp.arange(100.0)
        >>> round(float(batch_p_value(cal, jnp.array([95.5, 80.5, 70.5]), zeta=2).p), 3)
        0.105

    References:
        Lee, Tchetgen Tchetgen and Dobriban (2024), https://arxiv.org/abs/2409.13990.
    """
    errors.check_not_nan("cal", cal)
    errors.check_not_nan("test", test)
    tails = np.cumsum(rank_pmf(len(cal), len(test), zeta)[::-1])[::-1]  # P(r > t), t = 0, ..., n
    num_below = jnp.sum(jnp.asarray(cal) < jnp.sort(jnp.asarray(test))[zeta - 1])
    p = jnp.minimum(jnp.asarray(tails, float)[num_below], 1.0)
    return BatchPValue(p, Guarantee("exact", "P(p <= alpha) <= alpha", ASSUMES))


def _ordered(cal: Float[Array | np.ndarray, " n"]) -> Float[Array, " n_plus_2"]:
    """S_(0) = -inf, S_(1), ..., S_(n), S_(n+1) = inf."""
    errors.check_not_nan("cal", cal)
    return jnp.concatenate([jnp.array([-jnp.inf]), jnp.sort(jnp.asarray(cal)), jnp.array([jnp.inf])])


@partial(jax.jit, static_argnums=(2, 3))
def _largest_sum(scores: Array, h0: Array, m: int, q: int) -> Float[Array, ""]:
    """The largest sum of m of the scores, with repetition, whose h0 add up to at most q."""

    def add(best: Array, _: None) -> tuple[Array, None]:
        def at(s: Array) -> Array:
            rest = s - h0
            is_possible = (rest >= 0) & (best[rest] > -jnp.inf)
            return jnp.max(jnp.where(is_possible, best[rest] + scores, -jnp.inf))

        return jax.lax.map(at, jnp.arange(q + 1), batch_size=256), None

    best = jnp.full(q + 1, -jnp.inf).at[0].set(0.0)
    return jnp.max(jax.lax.scan(add, best, None, length=m)[0])
