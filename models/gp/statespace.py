"""Gaussian processes of time in O(n), for any order and spacing of the times, with missing data.

The state x of the process (`sde`) is filtered. What is carried is not its covariance P_t but what the data have taken
off the stationary one, D_t = P - P_t, for which the noise of the transitions is never formed:

    s_t = h^T P h + noise_t - h^T D h,   g = (P - D) h / s_t,   v = y_t - h^T m
    m <- A_{t+1} (m + g v),   D <- A_{t+1} (D + s_t g g^T) A_{t+1}^T
    log p(y) = sum_t log N(v_t; 0, s_t)

D is a sum of squares, and stays accurate however close two times are; the differences A P A^T - P of other forms lose
all digits where it matters. These are also the steps of the Cholesky factor of a semiseparable matrix: v_t / sqrt(s_t)
is L^{-1} y, and run the other way they give L z, that is paths. Derivatives are those of the scan, with each step
computed anew on the way back.

References:
    Hartikainen and Särkkä (2010), doi:10.1109/MLSP.2010.5589113.
    Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316 (in parallel).
    Foreman-Mackey, Agol, Ambikasaran and Angus (2017), doi:10.3847/1538-3881/aa9332 (semiseparable).
"""

import math
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.gp.covariances import diagonal, gram
from bayesinf.models.gp.parallel_filter import filter_in_parallel
from bayesinf.models.gp.sde import LinearSDE, as_sde
from bayesinf.models.gp.solver import Factor, Solver, check_jitter, raise_noise

__all__ = ["StateSpace", "StateSpaceFactor", "statespace"]


def statespace(*, parallel: bool | str = "auto", order: int = 7, jitter: float | None = None) -> "StateSpace":
    """The O(n) solver for inputs in one dimension: Matérn, periodic and constant kernels, their sums and products.

    NaN among the data is missing, and integrated out. The cost of a step is d^3 for a state of length d: 1, 2, 3 for
    the three Matérn kernels, 2 order + 1 for a periodic one, sums of them for sums and products for products.

    Args:
        parallel: whether the density is computed by an associative scan, in O(log n) steps of several times the work;
            "auto" does so on accelerators. It takes much longer to compile.
        order: terms of the Fourier series of `Periodic`; 7 are exact to 1e-7 for length scales from 1 on, and shorter
            ones need more.
        jitter: as of `dense`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> times = jnp.array([0.0, 0.3, 2.0])
        >>> fast = gp.GP(gp.Matern32(1.0), times, noise=0.1, solver=gp.statespace())
        >>> exact = gp.GP(gp.Matern32(1.0), times, noise=0.1)
        >>> y = jnp.array([0.5, 0.4, -1.0])
        >>> bool(abs(fast.log_prob(y) - exact.log_prob(y)) < 1e-4)
        True
    """
    if not isinstance(parallel, bool):
        errors.check_choice("parallel", parallel, ("auto",))
        parallel = jax.default_backend() != "cpu"
    return StateSpace(parallel, errors.check_count("order", order), jitter)


class StateSpace(Solver):
    """What `statespace` returns."""

    takes_missing: ClassVar[bool] = True

    parallel: bool = eqx.field(static=True)
    order: int = eqx.field(static=True)
    jitter: float | None = eqx.field(static=True)

    def __check_init__(self):
        check_jitter(self.jitter)

    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> "StateSpaceFactor":
        if X.ndim > 2 or (X.ndim == 2 and X.shape[1] != 1):
            raise ValueError(f"X must be times, of shape (n,) or (n, 1), for solver=statespace(); got {X.shape}")
        times = X.reshape(-1)
        # on the host where it can be: XLA takes seconds to fold the sorting of a long constant
        xp: Any = np if errors.is_concrete(times) else jnp
        order = xp.argsort(xp.asarray(times))
        times = xp.asarray(times)[order]
        gaps = jnp.asarray(xp.diff(times, prepend=times[:1]))
        sde = as_sde(kernel, gaps, self.order)
        variance = diagonal(kernel, X[:1]).astype(sde.stationary.dtype)
        noise, log_valid = raise_noise(jnp.broadcast_to(variance, times.shape), noise, self.jitter)
        if noise.ndim > 1:
            raise ValueError(f"noise must be a number or (n,) for solver=statespace(), got {noise.shape}; use jax.vmap")
        sde, log_ok = _sde_or_zero(sde, log_valid)
        order, times = jnp.asarray(order), jnp.asarray(times)
        return StateSpaceFactor(sde, noise[order], order, times, log_ok, self.order, self.parallel)


class StateSpaceFactor(Factor):
    """The state space between sorted times.

    Attributes:
        sde: transitions into each time from that before.
        noise: at the sorted times, shape (n,).
        order: which data belong to them.
        times: sorted, shape (n,).
        log_ok: 0, or -inf where a parameter is negative or NaN, and the state space one without noise of its own.
        num_terms: of Fourier series. Static.
        parallel: whether densities are computed by an associative scan. Static.
    """

    sde: LinearSDE
    noise: Float[Array, " n"]
    order: Int[Array, " n"]
    times: Float[Array, " n"]
    log_ok: Float[Array, ""]
    num_terms: int = eqx.field(static=True)
    parallel: bool = eqx.field(static=True)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.sde.transitions, self.noise)

    @property
    def num_normals(self) -> int:
        return self.noise.shape[0]

    def log_prob(self, columns: Float[Array, "n s"]) -> Float[Array, " s"]:
        def one(column: Array) -> Array:
            is_missing = jnp.isnan(column)
            column = jnp.where(is_missing, 0.0, column)
            if self.parallel:
                news, spread = filter_in_parallel(self.sde, self.noise, column, is_missing)
            else:
                news, spread = _filter(self.sde, self.noise, column, is_missing)
            return jnp.where(jnp.isneginf(self.log_ok), -jnp.inf, _log_normal(news, spread, is_missing))

        rows = columns[self.order].T
        return one(rows[0])[None] if len(rows) == 1 else jax.lax.map(one, rows)

    def sqrt_matvec(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        return jnp.zeros_like(columns).at[self.order].set(_color(self.sde, self.noise, columns))

    def whiten(self, columns: Float[Array, "n s"]) -> Float[Array, "n s"]:
        return _whiten(self.sde, self.noise, columns[self.order], jnp.zeros(self.order.shape, bool))

    def innovations(self, columns: Float[Array, "n s"]) -> tuple[Float[Array, "n s"], Float[Array, "n s"]]:
        """Given the data at earlier times; these are the rows before where the times are sorted."""
        if errors.is_concrete(self.order) and np.any(np.diff(np.asarray(self.order)) < 0):
            raise ValueError(
                "X must be sorted by time to take the data one by one with solver=statespace(), got others"
            )

        def one(column: Array) -> tuple[Array, Array]:
            is_missing = jnp.isnan(column)
            news, spread = _filter(self.sde, self.noise, jnp.where(is_missing, 0.0, column), is_missing)
            log_scale = jnp.where(jnp.isneginf(self.log_ok), jnp.inf, 0.5 * jnp.log(spread))  # as of `dense`
            return jnp.where(is_missing, 0.0, news / jnp.sqrt(spread)), log_scale

        told = jax.lax.map(one, columns[self.order].T)
        whitened, log_scales = (jnp.zeros_like(columns).at[self.order].set(rows.T) for rows in told)
        return whitened, log_scales

    def predict(self, columns: Any, kernel: Any, X: Any, Xs: Any, full_cov: bool) -> tuple[Array, Array]:
        if full_cov:
            return self._predict_jointly(columns, kernel, X, Xs)
        new = Xs.reshape(-1)
        times = jnp.concatenate([self.times, new])
        order = jnp.argsort(times)
        sde = as_sde(kernel, jnp.diff(times[order], prepend=times[order[:1]]), self.num_terms)
        noise = jnp.concatenate([self.noise, jnp.ones_like(new)])[order]
        back = jnp.argsort(order)[self.times.shape[0] :]

        def one(column: Array) -> tuple[Array, Array]:
            data = jnp.concatenate([column, jnp.full(new.shape, jnp.nan, column.dtype)])[order]
            is_missing = jnp.isnan(data)
            mean, variance = _smooth(sde, noise, jnp.where(is_missing, 0.0, data), is_missing)
            return mean[back], variance[back]

        means, variances = jax.lax.map(one, columns[self.order].T)
        # the same for every column, unless they miss different data
        return means.T, variances[0] if len(variances) == 1 else variances

    def _predict_jointly(self, columns: Array, kernel: Any, X: Array, Xs: Array) -> tuple[Array, Array]:
        """By m columns K(X, Xs), in O(n m)."""
        is_alike = jnp.all(jnp.isnan(columns) == jnp.isnan(columns[:, :1]), axis=0)
        if errors.is_concrete(is_alike) and not np.all(np.asarray(is_alike)):
            raise ValueError(
                "y must miss the same times in every series with full_cov=True, since one covariance serves all; "
                "condition on them one by one"
            )
        is_missing = jnp.isnan(columns[:, 0])[self.order]
        whiten = partial(_whiten, self.sde, self.noise, is_missing=is_missing)
        whitened = whiten(jnp.where(jnp.isnan(columns), 0.0, columns)[self.order])
        cross = whiten(gram(kernel, X, Xs)[self.order])
        mean = jnp.where(is_alike, cross.T @ whitened, jnp.nan)  # where it is not known yet
        return mean, gram(kernel, Xs) - cross.T @ cross


def _sde_or_zero(sde: LinearSDE, log_valid: Array) -> tuple[LinearSDE, Array]:
    """The state space and 0; or one of zeros and -inf where it is not finite, or `log_valid` is -inf."""
    is_ok = jnp.isfinite(log_valid) & jnp.all(jnp.isfinite(sde.transitions)) & jnp.all(jnp.isfinite(sde.stationary))
    transitions, stationary = (jnp.where(is_ok, part, 0.0) for part in (sde.transitions, sde.stationary))
    safe = LinearSDE(transitions, stationary, sde.observation)
    return safe, jnp.where(is_ok, 0.0, -jnp.inf).astype(log_valid.dtype)


def _log_normal(news: Array, spread: Array, is_missing: Array) -> Array:
    terms = news**2 / spread + jnp.log(spread) + math.log(2 * math.pi)
    return -0.5 * jnp.sum(jnp.where(is_missing, 0.0, terms))


def _gain(taken: Array, sde: LinearSDE, noise: Array, is_missing: Array) -> tuple[Array, Array]:
    """The gain g and the variance s of one observation; both as if it had none where it is missing."""
    h, P = sde.observation, sde.stationary
    left = P @ h - taken @ h
    spread = jnp.where(is_missing, 1.0, h @ left + noise)
    return jnp.where(is_missing, 0.0, left / spread), spread


def _learn(taken: Array, gain: Array, spread: Array) -> Array:
    return taken + spread * gain[:, None] * gain[None, :]


def _start(shape: tuple[int, ...], dtype: Any, inputs: Any) -> tuple[Array, Array]:
    """Means of zero, and nothing taken; in a `shard_map` they vary over devices as the inputs do, as scans ask for."""
    zero = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(inputs):
        zero = jnp.where(jnp.ravel(leaf)[0] == 0, zero, zero)
    return jnp.broadcast_to(zero, shape), jnp.broadcast_to(zero, (shape[0], shape[0]))


@jax.jit
def _filter(sde: LinearSDE, noise: Array, data: Array, is_missing: Array) -> tuple[Array, Array]:
    """What is new in every observation, and its variance."""
    d = sde.observation.shape[0]

    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry, now):
        mean, taken = carry
        A, noise, y, is_missing = now
        mean, taken = A @ mean, A @ taken @ A.T
        gain, spread = _gain(taken, sde, noise, is_missing)
        new = y - sde.observation @ mean
        return (mean + gain * new, _learn(taken, gain, spread)), (new, spread)

    start = _start((d,), data.dtype, (sde, noise, data, is_missing))
    return jax.lax.scan(step, start, (sde.transitions, noise, data, is_missing))[1]


@jax.jit
def _whiten(sde: LinearSDE, noise: Array, columns: Array, is_missing: Array) -> Array:
    """L^{-1} of every column; 0 where data are missing."""
    d = sde.observation.shape[0]

    def step(carry, now):
        means, taken = carry
        A, noise, row, is_missing = now
        means, taken = A @ means, A @ taken @ A.T
        gain, spread = _gain(taken, sde, noise, is_missing)
        news = row - sde.observation @ means
        whitened = jnp.where(is_missing, 0.0, news / jnp.sqrt(spread))
        return (means + gain[:, None] * news, _learn(taken, gain, spread)), whitened

    start = _start((d, columns.shape[1]), columns.dtype, (sde, noise, columns, is_missing))
    return jax.lax.scan(step, start, (sde.transitions, noise, columns, is_missing))[1]


@jax.jit
def _color(sde: LinearSDE, noise: Array, normals: Array) -> Array:
    """L times every column."""
    d = sde.observation.shape[0]

    def step(carry, now):
        means, taken = carry
        A, noise, row = now
        means, taken = A @ means, A @ taken @ A.T
        gain, spread = _gain(taken, sde, noise, jnp.asarray(False))
        news = jnp.sqrt(spread) * row
        return (means + gain[:, None] * news, _learn(taken, gain, spread)), sde.observation @ means + news

    start = _start((d, normals.shape[1]), normals.dtype, (sde, noise, normals))
    return jax.lax.scan(step, start, (sde.transitions, noise, normals))[1]


@jax.jit
def _smooth(sde: LinearSDE, noise: Array, data: Array, is_missing: Array) -> tuple[Array, Array]:
    """Means and variances of f given all data, by a filter and the adjoint recursion on its residuals.

        r <- A_{t+1}^T r_{t+1};   r_t = h v_t / s_t + (I - g h^T)^T r;   E = m + P_t r_t;   Var = P_t - P_t N_t P_t

    with N of r as covariance; it inverts no covariance of a state, which may be singular.
    """
    d = sde.observation.shape[0]
    h = sde.observation

    def step(carry, now):
        mean, taken = carry
        A, noise, y, is_missing = now
        mean, taken = A @ mean, A @ taken @ A.T
        gain, spread = _gain(taken, sde, noise, is_missing)
        new = y - h @ mean
        return (mean + gain * new, _learn(taken, gain, spread)), (mean, taken, gain, new, spread)

    start = _start((d,), data.dtype, (sde, noise, data, is_missing))
    _, (means, takens, gains, news, spreads) = jax.lax.scan(step, start, (sde.transitions, noise, data, is_missing))

    def back(carry, now):
        r, N, A_next = carry
        A, mean, taken, gain, new, spread, is_missing = now
        r, N = A_next.T @ r, A_next.T @ N @ A_next
        keep = jnp.eye(d, dtype=h.dtype) - gain[:, None] * h[None, :]
        weight = jnp.where(is_missing, 0.0, 1.0 / spread)
        r, N = h * weight * new + keep.T @ r, weight * h[:, None] * h[None, :] + keep.T @ N @ keep
        left = (sde.stationary - taken) @ h
        return (r, N, A), (h @ mean + left @ r, h @ left - left @ N @ left)

    end = (*start, start[1] + jnp.eye(d, dtype=data.dtype))
    steps = (sde.transitions, means, takens, gains, news, spreads, is_missing)
    return jax.lax.scan(back, end, steps, reverse=True)[1]
