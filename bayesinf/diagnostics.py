"""Streaming diagnostics: moments and split R-hat from batches, without keeping the draws.

    R-hat = sqrt( ((n-1)/n W + B/n) / W ),   B/n = variance of the means of the half-chains, W = their mean variance

References:
    Gelman and Rubin (1992), doi:10.1214/ss/1177011136; Gelman et al., Bayesian Data Analysis, 3rd ed., section 11.4.
    Chan, Golub, LeVeque (1983), doi:10.1080/00031305.1983.10483115 (merging of moments).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayesinf.captured import captured

__all__ = ["Moments", "MomentsState", "SplitRHat"]

_MAX_BATCHES = 128


class MomentsState(NamedTuple):
    """What `Moments` keeps of the values that it has seen.

    Attributes:
        count: their number, int32.
        mean: a pytree like one value.
        deviation: the sum of squared deviations from the mean, a pytree like one value.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    mean: PyTree
    deviation: PyTree


class Moments(eqx.Module):
    """Running mean and variance of a function of the draws: a reducer for runs that keep none (Welford's recursion).

        mean_n = mean_{n-1} + (x_n - mean_{n-1}) / n,   deviation_n = deviation_{n-1} + (x_n - mean_{n-1})(x_n - mean_n)

    For `sample(..., reducers=[Moments()])`, which gives its result for each chain in `Draws.reduced`.

    Args:
        statistic: function of one collected draw, any pytree of arrays; the draw itself by default.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.diagnostics import Moments
        >>> moments = Moments()
        >>> state = moments.init(jnp.array(0.0))
        >>> for value in (1.0, 2.0, 4.5):
        ...     state = moments.update(state, jnp.array(value))
        >>> mean, variance = moments.result(state)
        >>> float(mean), float(variance)
        (2.5, 3.25)

    References:
        Welford (1962), doi:10.1080/00401706.1962.10490022.
    """

    statistic: Callable[[PyTree], PyTree] = eqx.field(static=True, converter=captured, default=lambda draw: draw)

    def init(self, draw: PyTree) -> MomentsState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.statistic, draw))
        return MomentsState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(self, state: MomentsState, draw: PyTree) -> MomentsState:
        value = self.statistic(draw)
        count = state.count + 1
        mean = jax.tree.map(lambda m, v: m + (v - m) / count.astype(m.dtype), state.mean, value)
        deviation = jax.tree.map(
            lambda s, v, old, new: s + (v - old) * (v - new), state.deviation, value, state.mean, mean
        )
        return MomentsState(count, mean, deviation)

    def result(self, state: MomentsState) -> tuple[PyTree, PyTree]:
        """(mean, variance with n - 1), each a pytree like one value; the variance of a single value is NaN."""
        return state.mean, jax.tree.map(lambda s: s / (state.count - 1), state.deviation)


class SplitRHat:
    """Split R-hat of all components, fed with batches of draws.

        R-hat = sqrt( (n - 1) / n + (variance of the means of the half-chains) / (mean of their variances) )

    with n draws in a half-chain. Near 1 the chains agree; it is NaN where a draw is not finite, and +inf where chains
    are stuck at different points.

    Keeps mean and squared deviation of every component, chain and batch; of many batches neighbours are merged, so
    that memory and time do not grow with the run. The chains are split at the batch nearest to their middle, so a drift
    within the chains is seen as well as a difference between them. Runs on the host; batches are added up in float64.

    Example:
        >>> import numpy as np
        >>> from bayesinf.diagnostics import SplitRHat
        >>> rng = np.random.default_rng(0)
        >>> r_hat = SplitRHat()
        >>> for _ in range(2):  # of two chains, the second component does not mix
        ...     r_hat.update(rng.normal([[[0.0, 0.0]], [[0.0, 3.0]]], size=(2, 500, 2)))
        >>> (r_hat.value() < 1.01).tolist()
        [True, False]

    References:
        Gelman et al. (2013), Bayesian Data Analysis, 3rd ed., section 11.4.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._size = 0  # a batch of fewer draws takes in the next

    def update(self, draws: Float[np.ndarray, "c n d"]) -> None:
        """Takes in a batch: draws of shape (chains, draws, components); the number of draws may change."""
        if draws.shape[1] == 0:
            return
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite makes R-hat NaN, which says so
            mean = draws.mean(axis=1, dtype=np.float64)
            centred = draws - mean[:, None].astype(np.result_type(draws, np.float32))
            deviation = np.einsum("cnd,cnd->cd", centred, centred).astype(np.float64)
        self._batches.append((draws.shape[1], mean, deviation))
        if len(self._batches) > 1 and self._batches[-2][0] < self._size:
            self._batches[-2:] = [_merge(self._batches[-2:])]
        if len(self._batches) == _MAX_BATCHES:
            self._batches = [_merge(self._batches[i : i + 2]) for i in range(0, _MAX_BATCHES, 2)]
            self._size = max(count for count, _, _ in self._batches)

    def value(self) -> Float[np.ndarray, " d"] | None:
        """R-hat of every component, or None before two halves of at least two draws exist."""
        counts = np.cumsum([count for count, _, _ in self._batches])
        if len(counts) < 2:
            return None
        middle = 1 + int(np.argmin(np.abs(counts[:-1] - counts[-1] / 2)))
        halves = [_merge(self._batches[:middle]), _merge(self._batches[middle:])]
        if min(count for count, _, _ in halves) < 2:
            return None
        num = float(np.mean([count for count, _, _ in halves]))
        means = np.concatenate([mean for _, mean, _ in halves])
        within = np.concatenate([deviation / (count - 1) for count, _, deviation in halves]).mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt((num - 1) / num + means.var(axis=0, ddof=1) / within)


def _merge(batches: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[int, Any, Any]:
    counts = np.array([count for count, _, _ in batches], np.float64)
    means = np.stack([mean for _, mean, _ in batches])
    mean = np.tensordot(counts, means, axes=1) / counts.sum()
    between = np.tensordot(counts, np.square(means - mean), axes=1)
    return int(counts.sum()), mean, sum(deviation for _, _, deviation in batches) + between
