"""Student-t processes: a Gaussian process whose scale is unknown, integrated out in closed form.

    s ~ InverseGamma(a, b),    y | s ~ N(m, s S),    S = k(X, X) + diag(noise)

    log p(y) = log G(a + n/2) - log G(a) - n/2 log(2 pi b) - log|S| / 2 - (a + n/2) log(1 + q / (2 b)),
    q = (y - m)^T S^{-1} (y - m)

which is a multivariate t law of 2a degrees of freedom and shape (b / a) S. Given data s is InverseGamma(a + n/2,
b + q/2), and new values are t laws of 2a + n degrees of freedom about the mean of the Gaussian process, with its
covariance times (b + q/2) / (a + n/2). The noise is scaled with s: outliers of y and of f cannot be told apart.

References:
    Shah, Wilson and Ghahramani (2014), arXiv:1402.4306.
    Lee, Yun, Yang, Kim and Lee (2022), arXiv:2107.01408 (as a scale mixture of infinitely wide networks).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jaxtyping import Array

from bayesinf import errors
from bayesinf.models.gp.dense import dense
from bayesinf.models.gp.process import Process, from_columns, joint_tril, marginal_scale, to_columns

__all__ = ["StudentTProcess", "scale_free"]


class StudentTProcess(Process):
    """A Gaussian process, noise included, whose scale s has an inverse gamma law.

    Args:
        a: shape of the law of s, positive; 2a are the degrees of freedom.
        b: its scale, positive; a batch of processes has a and b of its shape.
        kernel, X, mean, noise, solver: as of `GP`; the variance of the noise is s times `noise`.

    Raises:
        ValueError: a or b is not positive, or as of `GP`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> X, y = jnp.arange(4.0), jnp.array([0.0, 0.1, 5.0, 0.2])  # an outlier
        >>> process = gp.StudentTProcess(2.0, 2.0, gp.RBF(1.0), X, noise=0.1)
        >>> gaussian = gp.GP(gp.RBF(1.0), X, noise=0.1)
        >>> bool(process.log_prob(y) > gaussian.log_prob(y))
        True
        >>> process.condition(y, jnp.array([1.5])).df.tolist()
        [8.0]

    References:
        Shah, Wilson and Ghahramani (2014), arXiv:1402.4306.
    """

    pytree_data_fields: tuple[str, ...] = ("a", "b")

    def __init__(
        self,
        a: Any,
        b: Any,
        kernel: Any,
        X: Any,
        *,
        mean: Any = 0.0,
        noise: Any = None,
        solver: Any = None,
        validate_args: Any = None,
    ):
        a, b = (errors.as_array(name, is_floating=True)(value) for name, value in (("a", a), ("b", b)))
        for name, value in (("a", a), ("b", b)):
            errors.check_positive(name, value)
        self._prepare(kernel, X, mean, noise, dense() if solver is None else solver, a.shape, b.shape)
        self.a, self.b = (jnp.broadcast_to(value, self.loc.shape[:-1]).astype(self.loc.dtype) for value in (a, b))
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    @property
    def _is_ok(self) -> Array:
        """Traced values of a and b are not refused."""
        return (self.a > 0) & (self.b > 0)

    def _variance(self, of_normal: Array) -> Array:
        a, b = self.a[..., None], self.b[..., None]
        return jnp.where(a > 1, b / jnp.where(a > 1, a - 1.0, 1.0), jnp.inf) * of_normal

    def _log_prob(self, residual: Array) -> Array:
        log_scale, quadratic = scale_free(self.factor, residual, self.batch_shape)
        half = 0.5 * jnp.sum(~jnp.isnan(residual), axis=-1)
        is_ok = self._is_ok
        a, b = (jnp.where(is_ok, value, 1.0) for value in (self.a, self.b))
        log_ratio = gammaln(a + half) - gammaln(a) - half * jnp.log(b)
        value = log_scale + log_ratio - (a + half) * jnp.log1p(0.5 * quadratic / b)
        return jnp.where(is_ok, value, -jnp.inf)

    def _log_news(self, whitened: Array, log_scales: Array, is_seen: Array) -> Array:
        # of s the data before know InverseGamma(a + number / 2, b + sum of squares / 2)
        count, square = jnp.asarray(is_seen, whitened.dtype), jnp.where(is_seen, whitened**2, 0.0)
        a = self.a[..., None] + 0.5 * (jnp.cumsum(count, axis=-1) - count)
        before = jnp.concatenate([jnp.zeros_like(square[..., :1]), square[..., :-1]], axis=-1)
        scale = jnp.sqrt((self.b[..., None] + 0.5 * jnp.cumsum(before, axis=-1)) / a)
        return dist.StudentT(2.0 * a, 0.0, scale).log_prob(whitened) - log_scales

    def _sample(self, key: Any, sample_shape: tuple[int, ...]) -> Array:
        key_scale, key_path = jax.random.split(key)
        scales = dist.InverseGamma(self.a, self.b).sample(key_scale, sample_shape)
        scales = jnp.where(self._is_ok, scales, jnp.nan)
        return jnp.sqrt(scales)[..., None] * self._correlated(key_path, sample_shape)

    def _condition(self, residual: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        _, quadratic = scale_free(self.factor, residual, self.batch_shape)
        half = 0.5 * jnp.sum(~jnp.isnan(residual), axis=-1)
        mean, spread = self._predict(residual, Xs, full_cov)
        root = jnp.sqrt((self.b + 0.5 * quadratic) / (self.a + half))
        root, df = (jnp.where(self._is_ok, value, jnp.nan) for value in (root, 2.0 * (self.a + half)))
        mean = jnp.where(self._is_ok[..., None], mean, jnp.nan)
        if full_cov:
            return df, mean, root[..., None, None] * joint_tril(spread, noise)
        return jnp.broadcast_to(df[..., None], mean.shape), mean, root[..., None] * marginal_scale(spread, noise)

    def _law(self, arrays: tuple[Array, ...], full_cov: bool) -> dist.Distribution:
        if not full_cov:
            return dist.StudentT(*arrays)
        df, mean, tril = arrays
        return dist.MultivariateStudentT(jnp.broadcast_to(df, mean.shape[:-1]), mean, tril)


def scale_free(factor: Any, residual: Array, batch_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Log N(0; 0, S) and r^T S^{-1} r: of these follow the densities under every multiple of S."""
    columns, shape = to_columns(residual, batch_shape)
    both = factor.log_prob(jnp.concatenate([columns, 0.0 * columns], axis=-1))  # what is missing stays missing
    value, at_zero = jnp.split(both, 2, axis=-1)
    # -inf where there is no factor: the quadratic form is then 0, and its derivative too
    is_ok = jnp.isfinite(at_zero)
    quadratic = 2.0 * (jnp.where(is_ok, at_zero, 0.0) - jnp.where(is_ok, value, 0.0))
    quadratic = jnp.maximum(quadratic, 0.0)
    found = (from_columns(value[..., None, :], shape)[..., 0] for value in (at_zero, quadratic))
    return tuple(found)  # type: ignore[return-value]
