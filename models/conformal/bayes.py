"""Conformal Bayes: full conformal prediction by the posterior predictive density, from one set of posterior draws.

For a candidate y of a new point x the posterior given the data and (x, y) is the posterior given the data, reweighted,

    w_s(y) = W_s f(y | x, theta_s) / sum_r W_r f(y | x, theta_r)                          add one in
    sigma_i(y) = log sum_s w_s(y) f(y_i | x_i, theta_s),    i = 1, ..., n, and the new point as i = n + 1
    p(y) = #{ i <= n + 1 : sigma_i(y) <= sigma_{n+1}(y) } / (n + 1),    C = { y : p(y) > alpha }

sigma_i is the density of a point under a posterior that has seen it, so the n + 1 points are treated alike, and P(y in
C) >= 1 - alpha if they are exchangeable: also where prior and likelihood are wrong, when C is merely larger than it
need be. Nothing is fitted anew. What is not exact is the reweighting: its effective sample size is found at each
candidate, and is small where one more point would move the posterior much.

The sums over draws are one product of matrices, (candidates, draws) by (draws, n); nothing of the size of all three is
ever made. A term of less than 1e-38 of its point's largest is lost in single precision, which can only make the set
larger.

References:
    Fong and Holmes (2021), https://arxiv.org/abs/2106.06137.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from bayesinf import errors, weights
from bayesinf.models.conformal.guarantee import Guarantee

__all__ = ["ConformalBayes", "conformal_bayes", "predictive_scores"]


def predictive_scores(
    log_terms: Float[Array, " s *n"],
    log_weights: Float[Array, " s"] | None = None,
    *,
    kind: Literal["hpd", "pit"] = "hpd",
) -> Float[Array, "*n"]:
    """Scores of points under the predictive law of draws, or of weighted particles.

        "hpd"   -log sum_s W_s f(y | theta_s)           sets of highest predictive density
        "pit"   | sum_s W_s F(y | theta_s) - 1/2 |      central sets

    For split conformal prediction: sets made of them are valid whatever the posterior, if the calibration points were
    not among its data.

    Args:
        log_terms: of every draw at every point, log f(y | theta_s) for "hpd" and log F(y | theta_s) for "pit"; a
            leading axis of draws.
        log_weights: of the draws, unnormalised; all equal unless given.
        kind: "hpd" or "pit".

    Returns:
        Scores, larger where stranger, without the axis of draws; NaN where the terms of all draws are, of a missing
        point.

    Raises:
        ValueError: kind is none of the two, or the weights do not fit the draws.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> log_cdf = jnp.log(jnp.array([[0.5, 0.25], [1.0, 0.75]]))          # two draws, two points
        >>> conformal.predictive_scores(log_cdf, kind="pit").round(4).tolist()
        [0.25, 0.0]
    """
    errors.check_choice("kind", kind, ("hpd", "pit"))
    num_draws = log_terms.shape[0] if log_terms.ndim else 0
    log_w = _normalized(log_weights, num_draws)
    terms = log_terms + log_w.reshape(-1, *[1] * (log_terms.ndim - 1))
    log_mixed = weights.log_mean_exp(terms, axis=0) + jnp.log(num_draws)
    scores = -log_mixed if kind == "hpd" else jnp.abs(jnp.exp(log_mixed) - 0.5)
    return jnp.where(jnp.all(jnp.isnan(log_terms), 0), jnp.nan, scores)


class ConformalBayes(eqx.Module):
    """What `conformal_bayes` found, for m new points and g candidates.

    Attributes:
        candidates: ascending, shape (m, g).
        p_values: of each candidate.
        is_in: whether it is in the set, p > alpha.
        ess: the effective sample size of the reweighted draws at each candidate.
        log_weights: of the draws at the least and the greatest candidate in the set, normalised, shape (m, 2, draws);
            at the likeliest one where the set is empty.
        guarantee: what is promised.
    """

    candidates: Float[Array, "m g"]
    p_values: Float[Array, "m g"]
    is_in: Bool[Array, "m g"]
    ess: Float[Array, "m g"]
    log_weights: Float[Array, "m 2 s"]
    guarantee: Guarantee = eqx.field(static=True)

    @property
    def lower(self) -> Float[Array, " m"]:
        """The candidate before the first in the set, -inf if that is the first of all; +inf where the set is empty."""
        return _before_first(self.is_in, self.candidates, -jnp.inf)

    @property
    def upper(self) -> Float[Array, " m"]:
        """The candidate after the last in the set, +inf if that is the last of all; -inf where the set is empty."""
        return _before_first(self.is_in[:, ::-1], self.candidates[:, ::-1], jnp.inf)

    @property
    def ess_at_ends(self) -> Float[Array, " m"]:
        """The lesser of the effective sample sizes at the two ends of the set."""
        return jnp.min(weights.ess(self.log_weights), -1)

    def pareto_k(self) -> Float[np.ndarray, "m 2"]:
        """The tail indices of the weights at the two ends of each set, on the host: above 0.7 take more draws."""
        log_weights = np.asarray(self.log_weights)
        return np.array([[weights.pareto_k(end) for end in ends] for ends in log_weights])


def conformal_bayes(
    log_lik: Callable[[PyTree, PyTree, PyTree], Array],
    draws: PyTree,
    data: tuple[PyTree, PyTree],
    x_new: PyTree,
    candidates: Real[Array, "... g"],
    alpha: Real[Array, ""] | float,
    *,
    log_weights: Float[Array, " s"] | None = None,
    key: errors.KeyLike | None = None,
    batch_size: int | None = None,
) -> ConformalBayes:
    """Conformal sets around a Bayesian model, from draws of its posterior.

    Args:
        log_lik: `log_lik(theta, x, y)`, the log density of one point given one draw; a scalar.
        draws: a pytree with a leading axis of draws.
        data: (x, y) of the n points that the posterior was conditioned on, pytrees with a leading axis; x may be None.
        x_new: of m new points, like x; where x is None, None for one point.
        candidates: values of y to be tried, ascending, shape (g,), or (m, g) for a grid of each new point: labels, or a
            grid that covers the set. One of density zero under every draw is kept, as nothing speaks against it.
        alpha: the level, in (0, 1).
        log_weights: of the draws, unnormalised, as of importance sampling or SMC; all equal unless given.
        key: PRNG key or seed: p-values are smoothed, with one uniform for each new point.
        batch_size: new points taken at once; by default as many as keep the matrices below 2^24 numbers.

    Returns:
        ConformalBayes, with `p_values`, `is_in`, `lower`, `upper`, `ess`, `pareto_k()`.

    Raises:
        ValueError: a shape does not fit, alpha is not in (0, 1), or candidates do not ascend.

    Warns:
        SamplingWarning: the weights at the ends of a set rest on fewer than 100 draws; not under `jit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> y = jax.random.normal(jax.random.key(0), (30,))
        >>> theta = y.mean() + jax.random.normal(jax.random.key(1), (2_000,)) / jnp.sqrt(30.0)
        >>> log_lik = lambda theta, x, y: -0.5 * (y - theta) ** 2
        >>> found = conformal.conformal_bayes(log_lik, theta, (None, y), None, jnp.linspace(-6.0, 6.0, 241), 0.2)
        >>> bool(found.lower[0] < 0.0 < found.upper[0]), bool(found.ess_at_ends[0] > 500)
        (True, True)

    References:
        Fong and Holmes (2021), https://arxiv.org/abs/2106.06137.
    """
    errors.check_fraction("alpha", alpha)
    errors.check_arguments("log_lik", log_lik, "theta, x, y")
    x, y = data
    n = _length("y of data", y)
    if x is not None and _length("x of data", x) != n:
        raise ValueError(f"x of data must have the {n} rows of y, got {_length('x of data', x)}")
    if (x is None) != (x_new is None):
        raise ValueError("x_new must be given exactly where data have an x")
    num_new = 1 if x_new is None else _length("x_new", x_new)
    num_draws = _length("draws", draws)
    grid = jnp.broadcast_to(candidates, (num_new, candidates.shape[-1]))
    if errors.is_concrete(candidates) and not np.all(np.diff(np.asarray(candidates)) > 0):
        raise ValueError("candidates must ascend")
    log_w = _normalized(log_weights, num_draws)
    most = max(1, min(num_new, 2**24 // (grid.shape[-1] * (num_draws + n))))
    batch_size = most if batch_size is None else errors.check_count("batch_size", batch_size)
    noise = jnp.ones(num_new)
    if key is not None:
        noise = 1.0 - jax.random.uniform(errors.as_key(key), (num_new,))  # in (0, 1]
    p, is_in, ess, log_added, num_nan = _sets(log_lik, batch_size, draws, (x, y), (x_new, grid, noise), alpha, log_w)
    if errors.is_concrete(num_nan) and int(num_nan):
        raise ValueError(f"log_lik is NaN or +inf at {int(num_nan)} of the {n} points of data; leave missing ones out")
    relation = ">=" if key is None else "="
    guarantee = Guarantee(
        "exact",
        f"P(y in set) {relation} 1 - alpha",
        "data and new point are exchangeable, and the error of the reweighted draws is negligible: see ess",
    )
    found = ConformalBayes(grid, p, is_in, ess, log_added, guarantee)
    if errors.is_concrete(log_added):
        _warn_of_few(found)
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _sets(
    log_lik: Callable[[PyTree, PyTree, PyTree], Array],
    batch_size: int,
    draws: PyTree,
    data: tuple[PyTree, PyTree],
    new: tuple[PyTree, Array, Array],
    alpha: Array,
    log_w: Array,
) -> tuple[Array, ...]:
    """The p-values, what is in, effective sample sizes, the weights at the ends, and how many points are no good."""
    x, y = data
    dtype = jax.tree.leaves(y)[0].dtype
    log_rows = jax.vmap(lambda theta: jax.vmap(partial(log_lik, theta))(x, y))(draws)
    if log_rows.ndim != 2:
        raise ValueError(f"log_lik must return a scalar, got shape {log_rows.shape[2:]}")
    num_draws = log_rows.shape[0]
    largest = jnp.max(log_rows, 0)
    num_nan = jnp.sum(~(largest < jnp.inf))
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    rows = jnp.exp(log_rows - largest)  # the densities of a point, over the largest of them

    def one(new: tuple[PyTree, Array, Array]) -> tuple[Array, ...]:
        x_new, tried, u = new
        log_new = jax.vmap(lambda y: jax.vmap(lambda theta: log_lik(theta, x_new, y))(draws))(tried.astype(dtype))
        log_added, _ = weights.normalize(log_w + log_new)
        sigma = jnp.log(jnp.matmul(jnp.exp(log_added), rows, precision="highest")) + largest
        sigma_new = weights.log_mean_exp(log_added + log_new) + jnp.log(num_draws)
        # of density zero under every draw: then there is no posterior to tell the points apart by
        p = jnp.where(weights.is_degenerate(log_added), u, _p_values(sigma, sigma_new, u))
        is_in = p > alpha
        likeliest, is_any = jnp.argmax(p), jnp.any(is_in)
        first = jnp.where(is_any, jnp.argmax(is_in), likeliest)
        last = jnp.where(is_any, is_in.shape[0] - 1 - jnp.argmax(is_in[::-1]), likeliest)
        return p, is_in, weights.ess(log_added), log_added[jnp.stack([first, last])]

    return *jax.lax.map(one, new, batch_size=batch_size), num_nan


def _p_values(sigma: Array, sigma_new: Array, u: Array) -> Array:
    """The share of points, the new one among them, whose density is at most the new one's; of the ties, the share u.

    The densities of equal points are sums in another order: what differs by rounding alone is a tie.
    """
    rounding = 64 * jnp.finfo(sigma.dtype).eps
    gap = sigma - sigma_new[:, None]
    is_less = (gap < -rounding) | jnp.isneginf(sigma)
    is_tied = ~is_less & (gap <= rounding)
    return (jnp.sum(is_less, -1) + u * (jnp.sum(is_tied, -1) + 1)) / (sigma.shape[-1] + 1)


def _before_first(is_in: Array, candidates: Array, beyond: float) -> Array:
    """The candidate before the first that is in the set."""
    padded = jnp.pad(candidates, ((0, 0), (1, 0)), constant_values=beyond)
    end = jnp.take_along_axis(padded, jnp.argmax(is_in, -1)[:, None], -1)[:, 0]
    return jnp.where(jnp.any(is_in, -1), end, -beyond)


def _normalized(log_weights: Array | None, num_draws: int) -> Array:
    if log_weights is None:
        return jnp.full(num_draws, -np.log(num_draws))
    if log_weights.shape != (num_draws,):
        raise ValueError(f"log_weights must have shape ({num_draws},), one for each draw, got {log_weights.shape}")
    return weights.normalize(log_weights)[0]


def _length(name: str, tree: PyTree) -> int:
    sizes = [leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(tree)]
    if len(set(sizes)) != 1 or 0 in sizes:
        shapes = jax.tree.map(jnp.shape, tree)
        raise ValueError(f"{name} must have one leading axis in every leaf, of length 1 or more, got shapes {shapes}")
    return sizes[0]


def _warn_of_few(found: ConformalBayes) -> None:
    num_few = int(np.sum(np.asarray(found.ess_at_ends) < 100))
    if num_few:
        warnings.warn(
            f"at the ends of {num_few} of {found.ess.shape[0]} sets the reweighted draws are worth fewer than 100: the "
            "sets are not to be trusted there; take more draws, and look at pareto_k()",
            errors.SamplingWarning,
            stacklevel=3,
        )
