"""Quantile regression forests: a tree says which past points are like a new one, not only what their mean is.

    w_i(x) = mean over trees of 1{ x_i and x in the same leaf } / #{ j : x_j in that leaf }

and the quantiles at x are those of y_i so weighted. Each tree is fitted to a Poisson bootstrap, greedily: a node is
split where the sum of squares about the two means falls most, at one of a few quantiles of one of a few features, drawn
for each node. Shapes are static: a tree of depth d has 2^d leaves, and a node that is not split sends all to its left.

References:
    Meinshausen (2006), Quantile regression forests, Journal of Machine Learning Research 7, 983-999.
    Xu and Xie (2023), https://arxiv.org/abs/2212.03463 (for residuals of a series).
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Real

from bayesinf import errors
from bayesinf.models.conformal.conditional_quantiles import ConditionalQuantiles
from bayesinf.models.conformal.residual_sets import narrowest_weighted

__all__ = ["Forest", "QuantileForest"]


class Forest(eqx.Module):
    """A fitted forest, of B trees of depth d.

    Attributes:
        features, thresholds: of each node, level by level: left where x <= threshold; shape (B, 2^d - 1).
        leaves: of the training points, shape (B, n).
        is_row: which of them are there, shape (n,).
    """

    features: Int[Array, "b nodes"]
    thresholds: Float[Array, "b nodes"]
    leaves: Int[Array, "b n"]
    is_row: Bool[Array, " n"]

    def weights(self, x: Float[Array, " f"], is_row: Bool[Array, " n"] | None = None) -> Float[Array, " n"]:
        """How much each training point counts at x; they sum to one.

        Args:
            x: one point.
            is_row: which training points there are; those of the fit unless given.

        Returns:
            Weights, not negative; a tree without a point in the leaf of x does not count.
        """
        is_row = self.is_row if is_row is None else is_row
        leaf = jax.vmap(_find_leaf, in_axes=(0, 0, None))(self.features, self.thresholds, x)
        is_same = (self.leaves == leaf[:, None]) & is_row
        size = jnp.sum(is_same, 1, keepdims=True)
        shares = jnp.where(is_same, 1.0 / jnp.maximum(size, 1), 0.0)
        return jnp.sum(shares, 0) / jnp.maximum(jnp.sum(size > 0), 1)


class QuantileForest(ConditionalQuantiles):
    """A quantile regression forest on the last few residuals, fitted again every few steps.

    Between two fits new residuals fall into the leaves there are, so that each interval is of all residuals so far.

    Attributes:
        key: PRNG key or seed.
        window: how many past residuals are looked at.
        num_trees: B.
        max_depth: d; a tree has 2^d leaves.
        num_bins: of equal count of each feature, between which splits are tried.
        min_leaf: the least weight of the bootstrap sample on either side of a split; well above 2 / alpha, or few
            leaves hold enough points for a finite interval.
        num_features: drawn for each node; a third of the window, at least one, unless given.
        refit_every: steps between fits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> x = jax.random.uniform(jax.random.key(0), (300, 1))
        >>> y = jnp.where(x[:, 0] > 0.5, 10.0, 0.0)
        >>> forest = conformal.QuantileForest(jax.random.key(1)).fit(x, y)
        >>> round(float(forest.weights(jnp.array([0.9])) @ y), 3)
        10.0
    """

    key: Key[Array, ""] = eqx.field(converter=errors.as_key)
    window: int = eqx.field(static=True, default=10)
    num_trees: int = eqx.field(static=True, default=20)
    max_depth: int = eqx.field(static=True, default=4)
    num_bins: int = eqx.field(static=True, default=16)
    min_leaf: int = eqx.field(static=True, default=30)
    num_features: int | None = eqx.field(static=True, default=None)
    refit_every: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        for name in ("window", "num_trees", "max_depth", "min_leaf", "refit_every"):
            errors.check_count(name, getattr(self, name))
        errors.check_count("num_bins", self.num_bins, minimum=2)
        if self.num_features is not None:
            errors.check_count("num_features", self.num_features)

    def fit(self, x: Float[Array, "n f"], y: Float[Array, " n"], is_row: Bool[Array, " n"] | None = None) -> Forest:
        """A forest of y given x.

        Args:
            x: features, finite.
            y: finite.
            is_row: which of the points to use; all unless given.

        Returns:
            Forest.
        """
        is_row = jnp.ones(y.shape, bool) if is_row is None else is_row
        key_counts, key_trees = jax.random.split(self.key)
        counts = jax.random.poisson(key_counts, 1.0, (self.num_trees, *y.shape))
        return self.fit_counted(key_trees, x, y, is_row, counts)

    @eqx.filter_jit
    def fit_counted(
        self,
        key: Key[Array, ""],
        x: Float[Array, "n f"],
        y: Float[Array, " n"],
        is_row: Bool[Array, " n"],
        counts: Int[Array, "b n"],
    ) -> Forest:
        """The forest of given bootstrap counts, one row for each tree."""
        levels = jnp.arange(1, self.num_bins) / self.num_bins
        edges = jnp.nanquantile(jnp.where(is_row[:, None], x, jnp.nan), levels, axis=0).T
        num_features = max(1, x.shape[1] // 3) if self.num_features is None else min(self.num_features, x.shape[1])
        grow = partial(
            _grow, x=x, y=y, edges=edges, depth=self.max_depth, least=self.min_leaf, num_features=num_features
        )
        weights = jnp.where(is_row, counts, 0).astype(y.dtype)
        features, thresholds, leaves = jax.vmap(grow)(jax.random.split(key, self.num_trees), weights)
        return Forest(features, thresholds, leaves, is_row)

    def bounds(
        self,
        residuals: Float[Array, " t"],
        num_calibration: int,
        alpha: Real[ArrayLike, ""],
        *,
        num_betas: int,
        horizon: int,
    ) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        if num_calibration <= self.window + horizon:
            raise ValueError(
                f"window must be below num_calibration - horizon = {num_calibration - horizon}, got {self.window}"
            )
        return _sweep(self, residuals, jnp.asarray(alpha), num_calibration, num_betas, horizon)


@eqx.filter_jit
def _sweep(
    quantile: QuantileForest, residuals: Array, alpha: Array, start: int, num_betas: int, horizon: int
) -> tuple[Array, Array]:
    """The ends for each time from `start` on, in blocks that share a forest."""
    num = residuals.shape[0]
    times = jnp.arange(num)
    lags = times[:, None] - horizon - jnp.arange(quantile.window)
    x = residuals[jnp.maximum(lags, 0)]
    x = jnp.where(jnp.isnan(x), jnp.nanmedian(residuals[:start]), x)
    can_be_used = (lags[:, -1] >= 0) & ~jnp.isnan(residuals)
    y = jnp.where(can_be_used, residuals, 0.0)
    order = jnp.argsort(residuals)

    def block(first: Array) -> tuple[Array, Array]:
        fitted = eqx.tree_at(lambda one: one.key, quantile, jax.random.fold_in(quantile.key, first))
        forest = fitted.fit(x, y, can_be_used & _is_past(times, first, horizon))

        def ends(t: Array) -> tuple[Array, Array]:
            w = forest.weights(x[t], can_be_used & _is_past(times, t, horizon))
            return narrowest_weighted(residuals[order], w[order], alpha, num_betas)

        return jax.lax.map(ends, jnp.minimum(first + jnp.arange(quantile.refit_every), num - 1))

    lower, upper = jax.lax.map(block, jnp.arange(start, num, quantile.refit_every))
    return lower.ravel()[: num - start], upper.ravel()[: num - start]


def _is_past(times: Array, t: Array, horizon: int) -> Array:
    """Whether the residual of each time is known when the set at t is made."""
    return times <= t - horizon


def _grow(
    key: Key[Array, ""],
    weights: Array,
    *,
    x: Array,
    y: Array,
    edges: Array,
    depth: int,
    least: int,
    num_features: int,
) -> tuple[Array, Array, Array]:
    """One tree: features and thresholds of its nodes, and the leaf of every point."""
    width, num_edges = edges.shape
    bins = jax.vmap(lambda column, cuts: jnp.searchsorted(cuts, column), in_axes=(1, 0), out_axes=1)(x, edges)
    y = y - jnp.sum(weights * y) / jnp.maximum(jnp.sum(weights), 1.0)
    node = jnp.zeros(y.shape, jnp.int32)
    features, thresholds = [], []
    for level, key_level in enumerate(jax.random.split(key, depth)):
        num_nodes = 2**level

        def left_sums(values: Array, node: Array = node, num_nodes: int = num_nodes) -> Array:
            """Of the points of each node that fall left of each edge of each feature, and of all at the end."""
            zeros = jnp.zeros((num_nodes, width, num_edges + 1), values.dtype)
            sums = zeros.at[node[:, None], jnp.arange(width), bins].add(values[:, None])
            return jnp.cumsum(sums, -1)

        mass, total = left_sums(weights), left_sums(weights * y)
        left, right = mass[..., :-1], mass[..., -1:] - mass[..., :-1]
        sum_left, sum_right = total[..., :-1], total[..., -1:] - total[..., :-1]
        gain = sum_left**2 / jnp.maximum(left, 1.0) + sum_right**2 / jnp.maximum(right, 1.0)
        whole = total[..., -1:] ** 2 / jnp.maximum(mass[..., -1:], 1.0)
        # the features that are drawn are those with the largest of independent uniforms
        draw = jax.random.uniform(key_level, (num_nodes, width))
        is_drawn = draw >= jnp.sort(draw, -1)[:, -num_features][:, None]
        is_split = (left >= least) & (right >= least) & is_drawn[..., None] & (gain > whole)
        gain = jnp.where(is_split, gain, -jnp.inf).reshape(num_nodes, -1)
        best = jnp.argmax(gain, -1)
        feature, edge = best // num_edges, best % num_edges
        threshold = jnp.where(jnp.max(gain, -1) > -jnp.inf, edges[feature, edge], jnp.inf)
        features.append(feature.astype(jnp.int32))
        thresholds.append(threshold)
        goes_right = jnp.take_along_axis(x, feature[node][:, None], 1)[:, 0] > threshold[node]
        node = 2 * node + goes_right
    return jnp.concatenate(features), jnp.concatenate(thresholds), node


def _find_leaf(features: Array, thresholds: Array, x: Array) -> Array:
    node, first, num_nodes = jnp.zeros((), jnp.int32), 0, 1
    while first < features.shape[0]:
        node, first, num_nodes = (
            2 * node + (x[features[first + node]] > thresholds[first + node]),
            first + num_nodes,
            2 * num_nodes,
        )
    return node
