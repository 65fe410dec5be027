"""Vecchia's approximation: every point given its m nearest ones before it.

    log p(y) = sum_i log N(y_i; a_i^T y_c(i), d_i),    a_i = S_cc^{-1} S_ci,    d_i = S_ii - S_ic a_i

with S = K + diag(noise) and c(i) at most m earlier points. It is the density of a Gaussian law whose precision has a
sparse factor, so draws are exact under it. It is exact where y_i needs no more of the past, such as for Matern12 in
one dimension without noise, and for m = n - 1. O(n m^3) time and O(n m^2) memory.

The order is max-min: each point is the one farthest from all before it, so that conditioning sets hold both far and
near ones. Order and neighbours are found once, on the host, by distances between the inputs, in O(n^2).

References:
    Vecchia (1988), doi:10.1111/j.2517-6161.1988.tb01729.x.
    Guinness (2018), doi:10.1080/00401706.2018.1437476 (orders).
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.gp.covariances import diagonal, gram
from bayesinf.models.gp.dense import cholesky_or_identity, solve
from bayesinf.models.gp.solver import Factor, Solver, check_jitter, raise_noise

__all__ = ["Vecchia", "VecchiaFactor", "vecchia"]


def vecchia(m: int = 30, *, order: str = "maxmin", jitter: float | None = None) -> "Vecchia":
    """Nearest-neighbour solver, for many points in a few dimensions; an approximation.

    Inputs must be known values, since neighbours are looked up on the host; parameters may be traced.

    Args:
        m: points that each is conditioned on.
        order: "maxmin", or "given" for that of X, as of sorted times.
        jitter: as of `dense`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> X, y = jnp.linspace(0.0, 9.0, 50), jnp.sin(jnp.linspace(0.0, 9.0, 50))
        >>> near, exact = (gp.GP(gp.Matern32(), X, noise=0.1, solver=s).log_prob(y) for s in (gp.vecchia(10), None))
        >>> bool(abs(near - exact) < 0.1)
        True
    """
    errors.check_choice("order", order, ("maxmin", "given"))
    return Vecchia(errors.check_count("m", m), order, jitter)


class Vecchia(Solver):
    """What `vecchia` returns."""

    m: int = eqx.field(static=True)
    order: str = eqx.field(static=True)
    jitter: float | None = eqx.field(static=True)

    def __check_init__(self):
        check_jitter(self.jitter)

    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> "VecchiaFactor":
        if not errors.is_concrete(X):
            raise ValueError(
                "X must be known values for solver=vecchia(), which looks up neighbours on the host; make the process "
                "outside vmap and jit over X, or close over X"
            )
        points = np.asarray(X).reshape(X.shape[0], -1)
        rank = _maxmin(points) if self.order == "maxmin" else np.arange(len(points))
        neighbours, is_used = _neighbours(points[rank], min(self.m, max(len(points) - 1, 1)))
        noise, log_valid = raise_noise(diagonal(kernel, X), noise, self.jitter)
        if noise.ndim > 1:
            raise ValueError(
                "kernel and noise must be those of one process for solver=vecchia(), got batch shape "
                f"{noise.shape[:-1]}; use jax.vmap"
            )
        ordered = X[rank]
        weights, variances, log_ok = _regress(
            kernel, ordered, noise[rank], ordered[neighbours], noise[rank][neighbours], jnp.asarray(is_used)
        )
        return VecchiaFactor(
            jnp.asarray(rank), jnp.asarray(neighbours), weights, variances, log_ok + log_valid, noise, self.m
        )


class VecchiaFactor(Factor):
    """Regressions of every point on those before it.

    Attributes:
        rank: the order, shape (n,).
        neighbours: which earlier points, in that order, shape (n, m).
        weights: a_i, 0 for those that are not used.
        variances: d_i.
        log_ok: 0, or -inf where a conditioning set has no positive definite covariance.
        noise: in the order of X.
        m: how many. Static.
    """

    rank: Int[Array, " n"]
    neighbours: Int[Array, "n m"]
    weights: Float[Array, "n m"]
    variances: Float[Array, " n"]
    log_ok: Float[Array, ""]
    noise: Float[Array, " n"]
    m: int = eqx.field(static=True)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> Any:
        return self.weights.dtype

    @property
    def num_normals(self) -> int:
        return self.variances.shape[0]

    def log_prob(self, columns: Float[Array, "n s"]) -> Float[Array, " s"]:
        is_ok = ~jnp.isneginf(self.log_ok)
        variances = jnp.where(is_ok, self.variances, 1.0)[:, None]
        terms = self._news(columns) ** 2 / variances + jnp.log(variances) + math.log(2 * math.pi)
        return jnp.where(is_ok, -0.5 * jnp.sum(terms, axis=0), -jnp.inf)

    def sqrt_matvec(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        def step(i: Array, drawn: Array) -> Array:
            mean = self.weights[i] @ drawn[self.neighbours[i]]
            return drawn.at[i].set(mean + jnp.sqrt(self.variances[i]) * columns[i])

        drawn = jax.lax.fori_loop(0, columns.shape[0], step, jnp.zeros_like(columns))
        return jnp.zeros_like(columns).at[self.rank].set(drawn)

    def whiten(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        return self._news(columns) / jnp.sqrt(self.variances)[:, None]

    def predict(self, columns: Any, kernel: Any, X: Any, Xs: Any, full_cov: bool) -> tuple[Array, Array]:
        """Every new point given its nearest data; the joint law of several is not approximated."""
        if full_cov:
            raise ValueError("full_cov must be False for solver=vecchia(): new points are predicted one by one")
        distances = jnp.sum((_rows(Xs)[:, None, :] - _rows(X)[None, :, :]) ** 2, axis=-1)
        _, nearest = jax.lax.top_k(-distances, min(self.m, X.shape[0]))
        is_used = jnp.ones(nearest.shape, bool)
        zero = jnp.zeros(Xs.shape[0], self.noise.dtype)
        weights, variances, _ = _regress(kernel, Xs, zero, X[nearest], self.noise[nearest], is_used)
        return jnp.einsum("km,kms->ks", weights, columns[nearest]), variances

    def _news(self, columns: Array) -> Array:
        """What each point adds to those before it, in that order."""
        ordered = columns[self.rank]
        return ordered - jnp.einsum("nm,nms->ns", self.weights, ordered[self.neighbours])


def _regress(
    kernel: Any, X: Array, noise: Array, near: Array, near_noise: Array, is_used: Bool[Array, "n m"]
) -> tuple[Array, Array, Array]:
    """Weights and variances of every row of X given the rows `near` it; one batched factorisation for all."""
    S = jax.vmap(lambda near: gram(kernel, near, near))(near)
    identity = jnp.eye(S.shape[-1], dtype=S.dtype)
    pairs = is_used[:, :, None] & is_used[:, None, :]
    S = jnp.where(pairs, S + identity * near_noise[:, None, :], identity)  # unused ones are independent of all
    cross = jax.vmap(lambda x, near: gram(kernel, x[None], near)[0])(X, near)
    cross = jnp.where(is_used, cross, 0.0)
    tril, log_ok = cholesky_or_identity(S)
    half = solve(tril, cross[:, :, None])
    weights = jax.scipy.linalg.solve_triangular(tril, half, lower=True, trans=1)[:, :, 0]
    variances = diagonal(kernel, X) + noise - jnp.sum(half[:, :, 0] ** 2, axis=-1)
    tiny = jnp.finfo(variances.dtype).tiny
    return weights, jnp.maximum(variances, tiny), jnp.min(log_ok)


def _rows(X: Array) -> Array:
    return X.reshape(X.shape[0], -1)


def _maxmin(points: np.ndarray) -> np.ndarray:
    """Each point the farthest from all before it, from the most central one on; O(n^2) on the host, once."""
    chosen = np.empty(len(points), int)
    chosen[0] = np.argmin(np.sum((points - points.mean(axis=0)) ** 2, axis=1))
    nearest = np.full(len(points), np.inf)
    for i in range(1, len(points)):
        nearest = np.minimum(nearest, np.sum((points - points[chosen[i - 1]]) ** 2, axis=1))
        nearest[chosen[i - 1]] = -1.0  # no distance is below that
        chosen[i] = np.argmax(nearest)
    return chosen


def _neighbours(points: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The m nearest of the points before each one, and which of these places are filled."""
    n = len(points)
    found, is_used = np.zeros((n, m), int), np.zeros((n, m), bool)
    for i in range(1, n):
        distances = np.sum((points[:i] - points[i]) ** 2, axis=1)
        near = np.argpartition(distances, m - 1)[:m] if i > m else np.arange(i)
        found[i, : len(near)], is_used[i, : len(near)] = near, True
    return found, is_used
