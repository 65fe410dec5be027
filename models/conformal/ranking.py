"""Scores in order: what lies above a score, and which score has how much above it.

    above(s) = sum_i w_i 1{s_i > s},          threshold(c) = min { s_i : above(s_i) <= c }

within a group where there are groups. Scores that are NaN are missing: they have no weight. One sort, then a binary
search for every question. Masses are sums in double precision, exact for counts, since a level such as 0.1 of 100
scores falls on a boundary and an error of rounding there would be an error of a whole rank.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bayesinf import errors

__all__ = [
    "Missing",
    "Ranked",
    "check_missing",
    "level_and_slack",
    "mass_above",
    "rank",
    "sort_scores",
    "threshold_below",
]

Missing = Literal["raise", "drop"]


class Ranked(NamedTuple):
    """Sorted scores and their cumulative weights; to be made and used inside one `with jax.enable_x64(True)`.

    Attributes:
        scores: ascending within a group, the missing ones last as +inf; one more +inf at the end.
        groups: ascending, one more at the end, or None.
        cumulative: the weight of those before each place, float64.
    """

    scores: Float[Array, " n_and_1"]
    groups: Int[Array, " n_and_1"] | None
    cumulative: Float[Array, " n_and_1"]


def check_missing(missing: str, **arrays: ArrayLike) -> None:
    """Refuses NaN unless they are to be left out; while traced they are left out, as nobody can look."""
    errors.check_choice("missing", missing, ("raise", "drop"))
    if missing == "raise":
        for name, values in arrays.items():
            errors.check_not_nan(name, values, cure="leave missing ones out, or have it done by missing='drop'")


def sort_scores(
    scores: Float[Array, " n"], weights: Real[Array, " n"] | None, groups: Int[Array, " n"] | None
) -> tuple[Float[Array, " n"], Real[Array, " n"] | None, Int[Array, " n"] | None]:
    """The three, by group and then by score, NaN last."""
    columns = [column for column in (groups, scores, weights) if column is not None]
    ordered = list(jax.lax.sort(columns, num_keys=1 + (groups is not None)))
    groups = None if groups is None else ordered.pop(0)
    return ordered.pop(0), None if weights is None else ordered.pop(0), groups


def rank(
    scores: Float[Array, " n"], weights: Real[Array, " n"] | None = None, groups: Int[Array, " n"] | None = None
) -> Ranked:
    """What is already sorted, ready to be asked. Only inside `with jax.enable_x64(True)`."""
    with jax.enable_x64(True):
        is_missing = jnp.isnan(scores)
        w = jnp.ones(scores.shape, jnp.float64) if weights is None else weights.astype(jnp.float64)
        cumulative = jnp.cumsum(jnp.where(is_missing, 0.0, jax.lax.stop_gradient(w)))
        return Ranked(
            jnp.append(jnp.where(is_missing, jnp.inf, scores), jnp.asarray(jnp.inf, scores.dtype)),
            None if groups is None else jnp.append(groups, jnp.asarray(jnp.iinfo(groups.dtype).max, groups.dtype)),
            jnp.concatenate([jnp.zeros(1, jnp.float64), cumulative]),
        )


def mass_above(
    ranked: Ranked, score: Float[Array, "*m"], group: Int[Array, "*m"] | None
) -> tuple[Float[Array, "*m"], Float[Array, "*m"], Float[Array, "*m"]]:
    """The weight of scores above, of scores equal, and of all in the group. Only inside `with jax.enable_x64(True)`."""
    with jax.enable_x64(True):
        low, high = _bounds(ranked, score.shape, group)
        n = ranked.cumulative.shape[0] - 1
        left = _first(n, lambda place: ranked.scores[place] >= score, low, high)
        right = _first(n, lambda place: ranked.scores[place] > score, left, high)
        end = ranked.cumulative[high]
        above = end - ranked.cumulative[right]
        return above, ranked.cumulative[right] - ranked.cumulative[left], end - ranked.cumulative[low]


def threshold_below(
    ranked: Ranked,
    level: Float[Array, "*m"],
    slack: float,
    test_weight: Float[Array, "*m"],
    group: Int[Array, "*m"] | None,
) -> Float[Array, "*m"]:
    """The smallest score with at most `level` of the mass above it, the test point counted as +inf.

    +inf where the test point alone is more, -inf where the level is 1 or more. Only inside `with jax.enable_x64(True)`.
    """
    with jax.enable_x64(True):
        low, high = _bounds(ranked, level.shape, group)
        end = ranked.cumulative[high]
        total = end - ranked.cumulative[low] + test_weight
        room = level * total + slack * jnp.abs(level) * total - test_weight
        n = ranked.cumulative.shape[0] - 1
        place = _first(n, lambda place: end - ranked.cumulative[place] <= room, low, high)
        found = jnp.where(place > low, ranked.scores[place - 1], -jnp.inf)
        return jnp.where((room >= 0) & (total > 0), found, jnp.inf).astype(ranked.scores.dtype)


def level_and_slack(alpha: Real[ArrayLike, "..."]) -> tuple[Float[Array, "..."], float]:
    """The level in float64, and by which share it may be off because of the type that it came in.

    0.1 of 100 is meant to be 10, and 0.7 in float32 times 10 to be 7, although it is 6.9999999. Only inside
    `with jax.enable_x64(True)`.
    """
    with jax.enable_x64(True):
        dtype = alpha.dtype if isinstance(alpha, jax.Array | np.ndarray | np.generic) else np.dtype(np.float64)
        slack = 4 * float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
        return jax.lax.stop_gradient(jnp.asarray(alpha).astype(jnp.float64)), slack


def _bounds(ranked: Ranked, shape: tuple[int, ...], group: Array | None) -> tuple[Array, Array]:
    """The places from which and before which the scores of a group stand."""
    n = ranked.cumulative.shape[0] - 1
    low, high = jnp.zeros(shape, jnp.int32), jnp.full(shape, n, jnp.int32)
    groups = ranked.groups
    if groups is None or group is None:
        return low, high
    first = _first(n, lambda place: groups[place] >= group, low, high)
    return first, _first(n, lambda place: groups[place] > group, first, high)


def _first(n: int, holds: Callable[[Int[Array, "*m"]], Bool[Array, "*m"]], low: Array, high: Array) -> Array:
    """The first of n places, in [low, high), where a condition holds that holds ever after; `high` if it never does."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        is_left = holds(middle) | (low >= high)
        return jnp.where(is_left, low, middle + 1), jnp.where(is_left, middle, high)

    return jax.lax.fori_loop(0, n.bit_length(), halve, (low, high))[0]
