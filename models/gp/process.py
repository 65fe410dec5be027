"""Gaussian processes as NumPyro distributions over what is observed at n inputs.

    y ~ N(m(X), k(X, X) + diag(noise)),      f* | y ~ N(m* + K* S^{-1} (y - m), K** - K* S^{-1} K*^T)

The process is a pytree: it may be made in a model, or in any function under jit, vmap and grad, and be returned from
it. What is vmapped over becomes `batch_shape`. A covariance that is not positive definite has log density -inf with
gradient zero, so that samplers reject it, and draws and predictions that are NaN; where all values are known, making
the process raises instead.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning.
"""

import contextlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import constraints

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.models.gp.covariances import as_covariance, diagonal
from bayesinf.models.gp.dense import cholesky_or_identity, dense
from bayesinf.models.gp.solver import Factor, Solver

__all__ = [
    "GP",
    "Process",
    "as_inputs",
    "check_resolution",
    "from_columns",
    "joint_tril",
    "marginal_scale",
    "mean_at",
    "mean_elsewhere",
    "or_nan",
    "to_columns",
]


class Process(dist.Distribution):
    """What processes share: inputs, mean, noise, the factorised covariance, and their shapes.

    Class attributes:
        is_gaussian: whether its law is that of `loc` and `factor`, rather than a mixture of such.
    """

    is_gaussian: ClassVar[bool] = False

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as of its base
    support = constraints.real_vector  # type: ignore[assignment]  # pyright: ignore
    pytree_data_fields: tuple[str, ...] = ("kernel", "X", "mean_function", "noise", "factor", "loc", "solver")

    kernel: Any
    X: Array
    mean_function: Any
    noise: Array | None
    factor: Any
    loc: Array
    solver: Solver

    def _prepare(self, kernel: Any, X: Any, mean: Any, noise: Any, solver: Solver, *batches: tuple[int, ...]) -> None:
        if not isinstance(solver, Solver):
            raise ValueError(f"solver must be one of dense(), statespace(), vecchia(), sgpr(), hsgp(); got {solver!r}")
        self.kernel, self.X, self.solver = as_covariance(kernel), as_inputs("X", X), solver
        check_resolution("X", X, self.X.dtype)
        n = self.X.shape[0]
        self.noise = _as_noise(noise, n)
        self.mean_function = as_pytree(mean) if callable(mean) else errors.as_array("mean", is_floating=True)(mean)
        if not callable(mean):
            errors.check_finite("mean", self.mean_function)
        self.factor = solver.factorize(self.kernel, self.X, self.noise)
        loc = mean_at(self.mean_function, self.X, n)
        shape = jnp.broadcast_shapes(loc.shape[:-1], self.factor.batch_shape, *batches)
        self.loc = jnp.broadcast_to(loc, (*shape, n)).astype(jnp.result_type(loc, self.factor.dtype))
        _raise_if_singular(self.factor, self.X)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.loc.shape[:-1]

    @property
    def mean(self) -> Array:
        return self.loc

    @property
    def variance(self) -> Array:
        """Of each observation, shape (..., n), its noise included."""
        if self._num_mapped():
            return jax.vmap(lambda process: process.variance)(self)
        prior = diagonal(self.kernel, self.X)
        total = prior if self.noise is None else prior + self.noise
        return self._variance(jnp.broadcast_to(total, self.loc.shape).astype(self.loc.dtype))

    def _variance(self, of_normal: Array) -> Array:
        """Of each observation, given that at scale one."""
        raise NotImplementedError

    def _num_mapped(self) -> int:
        """Axes that a vmap has put before those that the process was made with."""
        return self.loc.ndim - 1 - len(self._batch_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Float[Array, "..."]:
        """Log density of `value`; shapes broadcast against `batch_shape`."""
        value = self._check_data("value", value)
        shape = jnp.broadcast_shapes(value.shape[:-1], self.batch_shape)
        if self._num_mapped():
            value = jnp.broadcast_to(value, (*shape, value.shape[-1]))
            axis = len(shape) - len(self.batch_shape)
            return jax.vmap(lambda process, y: process.log_prob(y), (0, axis), axis)(self, value)
        residual = jnp.broadcast_to(value - self.loc, (*shape, value.shape[-1]))
        return self._log_prob(residual)

    def log_conditionals(self, value: ArrayLike) -> Float[Array, "... n"]:
        """Log p(y_i | y_0, ..., y_{i-1}) of every row, from one factorisation; their sum is `log_prob`.

        They score one-step-ahead predictions, and are what `ibis` asks of a likelihood. With `solver=statespace()` the
        rows must be sorted by time; y_i that are missing have 0.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models import gp
            >>> process, y = gp.GP(gp.RBF(), jnp.arange(3.0), noise=0.1), jnp.array([0.5, 1.0, 0.0])
            >>> bool(abs(jnp.sum(process.log_conditionals(y)) - process.log_prob(y)) < 1e-5)
            True
        """
        value = self._check_data("value", value)
        shape = jnp.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = jnp.broadcast_to(value, (*shape, value.shape[-1]))
        if self._num_mapped():
            axis = len(shape) - len(self.batch_shape)
            return jax.vmap(lambda process, y: process.log_conditionals(y), (0, axis), axis)(self, value)
        residual = value - self.loc
        columns, batch = to_columns(residual, self.batch_shape)
        whitened, log_scales = (from_columns(rows, batch) for rows in self.factor.innovations(columns))
        is_missing = jnp.isnan(residual)
        return jnp.where(is_missing, 0.0, self._log_news(whitened, log_scales, ~is_missing))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Float[Array, "... n"]:
        """Draws of y, of shape (*sample_shape, *batch_shape, n)."""
        if self._num_mapped():
            keys = jax.random.split(key, self.loc.shape[0])
            axis = len(sample_shape)
            return jax.vmap(lambda process, key: process.sample(key, sample_shape), out_axes=axis)(self, keys)
        return self.loc + self._sample(key, sample_shape)

    def condition(self, y: ArrayLike, Xs: ArrayLike, noise: Any = None, full_cov: bool = False) -> dist.Distribution:
        """The law of the function at new inputs given data.

        Args:
            y: data at X.
            Xs: new inputs, (m,) or (m, d).
            noise: variances of the noise of new observations, a number or (m,); None for the function itself.
            full_cov: whether the law is the joint one of all m, rather than that of each.

        Returns:
            A distribution of batch shape (..., m), or with `full_cov` of event shape (m,).

        Raises:
            ValueError: shapes do not fit; or the mean is known at X only.
        """
        y, Xs = self._check_data("y", y), as_inputs("Xs", Xs)
        if Xs.shape[1:] != self.X.shape[1 + self._num_mapped() :]:
            raise ValueError(
                f"Xs must have rows of the shape of those of X, {self.X.shape[1 + self._num_mapped() :]}, got "
                f"{Xs.shape[1:]}"
            )
        noise = jnp.zeros(()) if noise is None else jnp.asarray(_as_noise(noise, Xs.shape[0]))
        return self._law(self._given(y, Xs, noise, full_cov), full_cov)

    def _given(self, y: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        """What `_law` makes a distribution of; arrays, since a distribution under vmap does not know its shape."""
        if self._num_mapped():
            if y.ndim > self.loc.ndim:
                raise ValueError(
                    f"y must have at most the axes {self.batch_shape} in front for processes made by vmap, got "
                    f"{y.shape[:-1]}; condition inside of the vmap, or a series at a time"
                )
            y = jnp.broadcast_to(y, (*self.batch_shape, y.shape[-1]))
            return jax.vmap(lambda process, y: process._given(y, Xs, noise, full_cov))(self, y)
        return self._condition(y - self.loc, Xs, noise, full_cov)

    def _log_prob(self, residual: Array) -> Array:
        raise NotImplementedError

    def _log_news(self, whitened: Array, log_scales: Array, is_seen: Array) -> Array:
        """The terms of `log_conditionals`, from what `Factor.innovations` tells."""
        raise ValueError(f"{type(self).__name__} has no log_conditionals in closed form; GP and StudentTProcess have")

    def _sample(self, key: Any, sample_shape: tuple[int, ...]) -> Array:
        raise NotImplementedError

    def _condition(self, residual: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        raise NotImplementedError

    def _law(self, arrays: tuple[Array, ...], full_cov: bool) -> dist.Distribution:
        raise NotImplementedError

    def _correlated(self, key: Any, sample_shape: tuple[int, ...]) -> Array:
        """Draws of N(0, S)."""
        shape = (*sample_shape, *self.batch_shape, self.factor.num_normals)
        columns, batch = to_columns(jax.random.normal(key, shape, self.factor.dtype), self.batch_shape)
        return from_columns(or_nan(self.factor, self.factor.sqrt_matvec(columns)), batch)

    def _predict(self, residual: Array, Xs: Array, full_cov: bool) -> tuple[Array, Array]:
        """Means (..., m), and variances or covariance, of f* given the residuals."""
        columns, batch = to_columns(residual, self.batch_shape)
        mean, spread = self.factor.predict(columns, self.kernel, self.X, Xs, full_cov)
        if spread.ndim > len(self.batch_shape) + (2 if full_cov else 1):  # series that miss different data
            spread = spread.reshape((*batch, *spread.shape[1:]))
        prior_mean = mean_elsewhere(self.mean_function, Xs)
        return prior_mean + from_columns(or_nan(self.factor, mean), batch), spread

    def _check_data(self, name: str, y: Any) -> Array:
        y = errors.as_array(name)(y)
        n = self.loc.shape[-1]
        if y.ndim == 0 or y.shape[-1] != n:
            raise ValueError(f"{name} must have a last axis of length {n}, one number for each row of X; got {y.shape}")
        if not self.solver.takes_missing:
            errors.check_not_nan(name, y, cure="leave missing ones out, or use solver=statespace() for a series")
        if errors.is_concrete(y) and np.any(np.isinf(np.asarray(y, float))):
            raise ValueError(f"{name} must not be infinite; no Gaussian law has such values")
        return y.astype(jnp.result_type(y, self.loc))


class GP(Process):
    """A Gaussian process observed at n inputs; a NumPyro distribution over the n numbers.

        y ~ N(m(X), k(X, X) + diag(noise))

    Noise below sqrt(eps) times the mean prior variance is raised to that, so that a factor exists (`dense(jitter=...)`
    sets the bound; 3e-4 in float32); any other model is kept exactly as it is.

    Args:
        kernel: a covariance function `k(X1, X2) -> (n1, n2)`, such as `RBF`, a network's, or one of tinygp.
        X: inputs, (n,), (n, d), or of whatever shape the kernel takes, with n in front.
        mean: a number, (n,), or a function of the inputs; a batch has an axis in front: (B, 1) or (B, n).
        noise: variance of the noise, a number or (n,), (B, 1), (B, n); None for a process observed without.
        solver: `dense()`, `statespace()`, `vecchia()`, `sgpr(Z)` or `hsgp(m)`.

    Raises:
        ValueError: shapes do not fit, there are no inputs, the noise is negative, or the covariance is not positive
            definite (where its values are known).

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from bayesinf.models import gp
        >>> X, y = jnp.linspace(0.0, 5.0, 20), jnp.sin(jnp.linspace(0.0, 5.0, 20))
        >>> def model(X, y):
        ...     lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        ...     numpyro.sample("y", gp.GP(gp.RBF(lengthscale), X, noise=0.01), obs=y)
        >>> process = gp.GP(gp.RBF(1.0), X, noise=0.01)
        >>> round(float(process.condition(y, jnp.array([2.5])).mean[0]), 2)  # sin(2.5) = 0.598
        0.6

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, chapter 2.
    """

    is_gaussian = True

    def __init__(
        self, kernel: Any, X: Any, *, mean: Any = 0.0, noise: Any = None, solver: Any = None, validate_args: Any = None
    ):
        self._prepare(kernel, X, mean, noise, dense() if solver is None else solver)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def _variance(self, of_normal: Array) -> Array:
        return of_normal

    def _log_prob(self, residual: Array) -> Array:
        columns, batch = to_columns(residual, self.batch_shape)
        return from_columns(self.factor.log_prob(columns)[..., None, :], batch)[..., 0]

    def _log_news(self, whitened: Array, log_scales: Array, is_seen: Array) -> Array:
        return dist.Normal(0.0, 1.0).log_prob(whitened) - log_scales

    def _sample(self, key: Any, sample_shape: tuple[int, ...]) -> Array:
        return self._correlated(key, sample_shape)

    def _condition(self, residual: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        mean, spread = self._predict(residual, Xs, full_cov)
        return mean, joint_tril(spread, noise) if full_cov else marginal_scale(spread, noise)

    def _law(self, arrays: tuple[Array, ...], full_cov: bool) -> dist.Distribution:
        mean, scale = arrays
        return dist.MultivariateNormal(mean, scale_tril=scale) if full_cov else dist.Normal(mean, scale)


def joint_tril(covariance: Float[Array, "... m m"], noise: Float[Array, "..."]) -> Float[Array, "... m m"]:
    """A Cholesky factor of a predictive covariance, whose diagonal is raised by rounding; NaN where there is none."""
    m = covariance.shape[-1]
    scale = jnp.mean(jnp.abs(jnp.diagonal(covariance, axis1=-2, axis2=-1)), axis=-1, keepdims=True)
    tiny = jnp.finfo(covariance.dtype).eps ** 0.5 * scale + jnp.finfo(covariance.dtype).eps
    added = jnp.maximum(jnp.broadcast_to(noise, (*covariance.shape[:-2], m)), tiny)
    tril, log_ok = cholesky_or_identity(covariance + jnp.eye(m, dtype=covariance.dtype) * added[..., None, :])
    return jnp.where(jnp.isneginf(log_ok)[..., None, None], jnp.nan, tril)


def marginal_scale(variances: Float[Array, "... m"], noise: Float[Array, "..."]) -> Float[Array, "... m"]:
    """Standard deviations; variances that rounding has made negative are zero."""
    total = jnp.maximum(variances, jnp.finfo(variances.dtype).tiny) + noise
    return jnp.sqrt(total)


def or_nan(factor: Factor, columns: Float[Array, "... n s"]) -> Float[Array, "... n s"]:
    """The columns, or NaN where the covariance has no factor: what stands in for it is good for gradients alone."""
    log_ok = getattr(factor, "log_ok", None)
    return columns if log_ok is None else jnp.where(jnp.isneginf(log_ok)[..., None, None], jnp.nan, columns)


def to_columns(values: Float[Array, "... n"], batch_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Values (*sample, *batch, n) as columns (*batch, n, s), and their shape before, without n."""
    values = jnp.broadcast_to(values, jnp.broadcast_shapes(values.shape, (*batch_shape, 1)))
    lead = values.shape[: values.ndim - 1 - len(batch_shape)]
    flat = values.reshape((-1, *values.shape[len(lead) :])) if lead else values[None]
    return jnp.moveaxis(flat, 0, -1), values.shape[:-1]


def from_columns(columns: Float[Array, "... n s"], shape: tuple[int, ...]) -> Float[Array, "... n"]:
    """The inverse of `to_columns`."""
    rows = jnp.moveaxis(columns, -1, 0)
    return rows.reshape((*shape, columns.shape[-2]))


def as_inputs(name: str, X: Any) -> Array:
    """Inputs as an array with n >= 1 rows, finite."""
    with jax.ensure_compile_time_eval() if errors.is_concrete(X) else contextlib.nullcontext():
        X = errors.as_array(name, is_floating=True)(X)  # what is known stays so under jit
    if X.ndim == 0 or 0 in X.shape:
        raise ValueError(f"{name} must have at least one row: shape (n,) or (n, d) with n >= 1; got {X.shape}")
    if errors.is_concrete(X) and not np.all(np.isfinite(np.asarray(X))):
        raise ValueError(f"{name} must be finite; drop the rows that are not")
    return X


def check_resolution(name: str, given: Any, dtype: Any) -> None:
    """That places on a line, which are kept in fewer digits than they were given in, are still told apart."""
    if not isinstance(given, np.ndarray) or given.size < 2 or given.size != len(given):
        return
    if given.dtype.itemsize <= np.dtype(dtype).itemsize:
        return
    values = np.unique(given)
    spacing = float(np.spacing(np.max(np.abs(values)).astype(dtype)))
    if np.median(np.diff(values)) < 2.0 * spacing:
        raise ValueError(
            f"{name} must be told apart in {np.dtype(dtype)}, which rounds them to multiples of {spacing:.3g}, got a "
            f"median gap of {np.median(np.diff(values)):.3g}; subtract an origin, such as {name}[0], or enable float64 "
            'by jax.config.update("jax_enable_x64", True)'
        )


def _as_noise(noise: Any, n: int, name: str = "noise") -> Any:
    if noise is None:
        return None
    noise = errors.as_array(name, is_floating=True)(noise)
    if noise.ndim and noise.shape[-1] not in (1, n):
        raise ValueError(
            f"{name} must be a variance, a number or of shape ({n},); got {noise.shape}. A batch of B processes has "
            f"(B, 1) or (B, {n})"
        )
    errors.check_nonnegative(name, noise)
    return noise


def mean_at(mean: Any, X: Array, n: int) -> Array:
    """The mean function at X, shape (..., n)."""
    value = jnp.asarray(mean(X)) if callable(mean) else mean
    if callable(mean) and n > 1 and value.shape == (n, 1):
        raise ValueError(f"mean must return one number for each input, shape ({n},), got a column, {value.shape}")
    if value.ndim and value.shape[-1] not in (1, n):
        raise ValueError(
            f"mean must be a number, a function of the inputs, or of shape (n,), and a function to predict elsewhere; "
            f"got shape {value.shape} for {n} inputs"
        )
    return jnp.broadcast_to(value, (*value.shape[:-1], n))


def mean_elsewhere(mean: Any, Xs: Array) -> Array:
    """The mean function at new inputs, shape (..., m); numbers that were given for those of X are of no use there."""
    if not callable(mean) and mean.ndim and mean.shape[-1] != 1:
        raise ValueError(
            f"mean must be a number, a function of the inputs, to predict elsewhere than at X; got {mean.shape}"
        )
    return mean_at(mean, Xs, Xs.shape[0])


def _raise_if_singular(factor: Factor, X: Array) -> None:
    log_ok = getattr(factor, "log_ok", None)
    if log_ok is None or not errors.is_concrete(log_ok) or not np.any(np.isneginf(np.asarray(log_ok))):
        return
    rows = np.asarray(X).reshape(X.shape[0], -1)
    first, counts = np.unique(rows, axis=0, return_counts=True)
    twice = f" X has {int(np.sum(counts - 1))} duplicated rows." if len(first) < len(rows) else ""
    raise ValueError(
        f"kernel must give a positive definite covariance, and at X it has no Cholesky factor in {factor.dtype}."
        f"{twice} "
        "Give noise, a larger solver=dense(jitter=...), or float64"
    )
