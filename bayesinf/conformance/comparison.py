"""Two comparisons of laws, on which the tests of this package rest.

`law_has_moved` asks whether pairs (start, end), whose starts are exact draws, have ends of the same law. Every scalar x
is first mapped to v = 2 F(x) - 1 in [-1, 1] by the empirical distribution function F of fresh draws, and then the means
of Legendre polynomials of v are compared before and after. All is bounded, so that the t-tests hold for tails of any
weight; the pairing takes away the noise of the starts, so that slow kernels are tested as sharply as fast ones.
Products of two coordinates see what the marginals do not, random projections what the products do not, and a
Kolmogorov-Smirnov test against the fresh draws whatever remains of each law.

References:
    Neyman (1937), doi:10.1080/03461238.1937.10404821 (smooth tests).
    Gandy and Scott (2020), arXiv:2001.06465 (tests from exact draws).
"""

from itertools import combinations

import jax
import numpy as np
import scipy.stats
from jaxtyping import Float, PyTree
from numpy.polynomial import legendre

__all__ = ["columns", "law_has_moved", "pairs", "uniform_p_values"]

DEGREES = {"location": 1, "scale": 2, "skewness": 3, "tails": 4}
ALL_PAIRS = 8  # up to this many scalars every pair is compared, above it only neighbours and projections
NUM_PROJECTIONS = 3


def columns(tree: PyTree) -> dict[str, Float[np.ndarray, " n"]]:
    """Every scalar component of a pytree with a leading axis of n replicates, by name, in float64."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        values = np.asarray(leaf, np.float64)
        for index in np.ndindex(values.shape[1:]):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            named[name + suffix] = values[(slice(None), *index)]
    return named


def pairs(num: int) -> list[tuple[int, int]]:
    """All pairs of few scalars, neighbours of many."""
    return list(combinations(range(num), 2)) if num <= ALL_PAIRS else [(i, i + 1) for i in range(num - 1)]


def law_has_moved(starts: PyTree, ends: PyTree, fresh: PyTree) -> dict[str, float]:
    """P-values of the hypothesis that `ends` have the law of `starts`, by comparison.

    Args:
        starts: exact draws, arrays with a leading axis of n independent replicates.
        ends: the same pytree, what became of each start.
        fresh: exact draws, independent of both, with a leading axis of m.
    """
    starts_of, ends_of, fresh_of = columns(starts), columns(ends), columns(fresh)
    names = list(starts_of)
    before, after, reference = (np.stack(list(by_name.values()), -1) for by_name in (starts_of, ends_of, fresh_of))

    infinite = [
        name for name in names if not (np.isfinite(fresh_of[name]).all() and np.isfinite(starts_of[name]).all())
    ]
    if infinite:
        raise ValueError(
            f"the exact draws must be finite, but {', '.join(infinite)} of some are not; mend their sampler"
        )
    # a value that is not finite has no place in the law of finite draws
    strays = [name for name in names if not np.isfinite(ends_of[name]).all()]
    if strays:
        return {f"{name} is finite": 0.0 for name in strays}

    p_values: dict[str, float] = {}

    def compare(name: str, before: np.ndarray, after: np.ndarray, reference: np.ndarray) -> list[np.ndarray]:
        """Compares one scalar, and returns it as v, before, after and in the reference."""
        cdf = np.sort(reference)
        v_before, v_after, v_reference = (_to_uniform(cdf, x) for x in (before, after, reference))
        p_values[f"{name} law"] = float(scipy.stats.ks_2samp(v_after, v_reference, method="asymp").pvalue)  # pyright: ignore[reportAttributeAccessIssue]
        for word, degree in DEGREES.items():
            p_values[f"{name} {word}"] = _paired(_legendre(v_after, degree) - _legendre(v_before, degree))
        return [v_before, v_after, v_reference]

    transformed = [compare(name, before[:, i], after[:, i], reference[:, i]) for i, name in enumerate(names)]
    v_before, v_after, v_reference = (np.stack(vs, -1) for vs in zip(*transformed, strict=True))

    for i, j in pairs(len(names)):
        for first, second in ((1, 1), (1, 2), (2, 1)):
            change = _product(v_after, i, j, first, second) - _product(v_before, i, j, first, second)
            power_i, power_j = "^2" if first == 2 else "", "^2" if second == 2 else ""
            p_values[f"{names[i]}{power_i} x {names[j]}{power_j}"] = _paired(change)

    if len(names) > 1:
        # the directions are fixed: what is tested is the same for every key
        directions = np.random.default_rng(0).standard_normal((len(names), NUM_PROJECTIONS))
        for k, direction in enumerate(directions.T):
            compare(f"projection {k}", v_before @ direction, v_after @ direction, v_reference @ direction)
    return p_values


def uniform_p_values(name: str, u: Float[np.ndarray, " n"]) -> dict[str, float]:
    """P-values of the hypothesis that n independent values are uniform on [0, 1]."""
    p_values = {f"{name} law": float(scipy.stats.kstest(u, "uniform").pvalue)}
    for word, degree in DEGREES.items():
        z = np.sqrt(u.size * (2 * degree + 1)) * np.mean(_legendre(2 * u - 1, degree))
        p_values[f"{name} {word}"] = float(2 * scipy.stats.norm.sf(abs(z)))
    return p_values


def _to_uniform(cdf: np.ndarray, x: np.ndarray) -> np.ndarray:
    """2 F(x) - 1, F the empirical distribution function of sorted values, with ties halved."""
    order = np.argsort(x)
    x_sorted = x[order]  # in order, each search is near the last: two to three times as fast
    u = np.empty(x.size)
    u[order] = (np.searchsorted(cdf, x_sorted, "left") + np.searchsorted(cdf, x_sorted, "right")) / cdf.size
    return u - 1.0


def _legendre(v: np.ndarray, degree: int) -> np.ndarray:
    return legendre.legval(v, [0.0] * degree + [1.0])


def _product(v: np.ndarray, i: int, j: int, first: int, second: int) -> np.ndarray:
    return _legendre(v[:, i], first) * _legendre(v[:, j], second)


def _paired(change: np.ndarray) -> float:
    """The p-value of a t-test that the change has mean zero; what never changes has not moved."""
    if not np.any(change):
        return 1.0
    t = np.mean(change) / (np.std(change, ddof=1) / np.sqrt(change.size))
    return float(2 * scipy.stats.t.sf(abs(t), change.size - 1))
