"""Scale mixtures of Gaussian processes: any law of the scale, integrated out by deterministic quadrature.

    s ~ H,    f | s ~ GP(0, s k),    y | f ~ N(f + m, diag(noise)),    or N(f + m, s diag(noise)) with scaled noise

    p(y) = int p(y | e^u) H(e^u) e^u du  =  sum_j w_j p(y | s_j)

by Gauss-Legendre nodes on u = log s, between the points where the integrand has fallen by 50 in the logarithm; a grid
finds them, so that posteriors of any width, and priors of several modes, are met. With the noise scaled one Cholesky
factor serves every s. Else it is one eigendecomposition, of D^{-1/2} K D^{-1/2} with D = diag(noise), after which each
s costs O(n). Importance sampling from the prior of s, as is common, has an effective sample size of tens among 1,000
draws for some hundreds of data.

References:
    Lee, Yun, Yang, Kim and Lee (2022), arXiv:2107.01408.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Float

from bayesinf import errors
from bayesinf.models.gp.covariances import diagonal, gram
from bayesinf.models.gp.dense import dense
from bayesinf.models.gp.process import Process, joint_tril, marginal_scale, mean_elsewhere
from bayesinf.models.gp.spectral import ScaledMatrix, eigh
from bayesinf.models.gp.student_t import scale_free

__all__ = ["ScaleMixtureGP"]

REACH = 70.0  # of the search in u: scales from 4e-31 to 2.5e30, where squares of them are numbers
GRID = 513
DEPTH = 50.0
LEAST = -1e30


class ScaleMixtureGP(Process):
    """A Gaussian process whose scale has any law on the positive numbers.

    Densities have second derivatives in everything. With the noise not scaled those of third order in the kernel are
    refused, as are second ones of draws and predictions. Inside of a `jax.lax.scan` or `jax.lax.map`, of which JAX's
    second derivatives forget custom rules, nothing is refused, and what would be is wrong.

    Args:
        mixing: H, a NumPyro distribution of one positive number, such as `HalfCauchy`.
        kernel, X, mean: as of `GP`; one process (a batch is made by `jax.vmap`).
        noise: variance of the noise, positive.
        noise_scaled: whether the noise is scaled with s too; `StudentTProcess` is that with `InverseGamma`.
        nodes: of the quadrature.

    Raises:
        ValueError: mixing is no such law, the noise is missing, or as of `GP`.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesinf.models import gp
        >>> X = jnp.arange(5.0)
        >>> process = gp.ScaleMixtureGP(dist.HalfCauchy(1.0), gp.RBF(1.0), X, noise=0.1)
        >>> scales, log_weights = process.scale_posterior(10.0 * jnp.sin(X))
        >>> bool(jnp.sum(scales * jnp.exp(log_weights)) > 10.0)
        True

    References:
        Lee, Yun, Yang, Kim and Lee (2022), arXiv:2107.01408.
    """

    pytree_data_fields: tuple[str, ...] = ("mixing", "values", "vectors")
    pytree_aux_fields: tuple[str, ...] = ("noise_scaled", "nodes")

    values: Any
    vectors: Any

    def __init__(
        self,
        mixing: dist.Distribution,
        kernel: Any,
        X: Any,
        noise: Any,
        *,
        mean: Any = 0.0,
        noise_scaled: bool = False,
        nodes: int = 256,
        validate_args: Any = None,
    ):
        if not isinstance(mixing, dist.Distribution) or mixing.event_shape or mixing.batch_shape:
            raise ValueError(f"mixing must be a NumPyro distribution of one positive number, got {mixing!r}")
        lower = getattr(mixing.support, "lower_bound", None)
        if mixing.is_discrete or lower is None or (errors.is_concrete(lower) and np.any(np.asarray(lower) < 0)):
            raise ValueError(
                "mixing must be a continuous law on positive numbers, such as HalfCauchy, got "
                f"{type(mixing).__name__}, whose support is {mixing.support}"
            )
        self.mixing, self.noise_scaled = mixing, bool(noise_scaled)
        self.nodes = errors.check_count("nodes", nodes, minimum=8)
        if noise is None:
            raise ValueError("noise must be a variance, got None; a process without is ScaleMixtureGP(noise=1e-6)")
        errors.check_positive("noise", noise)
        self._prepare(kernel, X, mean, noise, dense())
        if self.loc.ndim > 1:
            raise ValueError(
                f"kernel, mean and noise must be those of one process, got batch shape {self.loc.shape[:-1]}; make a "
                "batch under jax.vmap"
            )
        self.values = self.vectors = None
        if not noise_scaled:
            self.values, self.vectors = eigh(self._whitened())
        super().__init__((), self.loc.shape[-1:], validate_args=validate_args)

    def scale_posterior(self, y: ArrayLike) -> tuple[Float[Array, " j"], Float[Array, " j"]]:
        """Nodes s_j and their normalised log weights: a quadrature rule for the law of s given y."""
        residual = self._check_data("y", y) - self.loc
        scales, log_terms = self._quadrature(residual)
        return scales, log_terms - logsumexp(log_terms)

    @property
    def _noise(self) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.noise, self.loc.dtype), self.loc.shape)

    @property
    def _unit(self) -> Array:
        """c: one noise for all data stays outside of K, so that under a vmap over it one decomposition serves all."""
        noise = jnp.asarray(self.noise, self.loc.dtype)
        return noise if noise.ndim == 0 else jnp.ones_like(noise[0])

    def _whitened(self) -> Array:
        """K' = c D^{-1/2} K D^{-1/2}: s K + D = D^{1/2} (s K' / c + I) D^{1/2}."""
        K, root = gram(self.kernel, self.X), jnp.sqrt(self._noise)
        return K if jnp.asarray(self.noise).ndim == 0 else K / root[:, None] / root

    @property
    def _scaled(self) -> ScaledMatrix:
        return ScaledMatrix(self._whitened(), self.values, self.vectors)

    def _variance(self, of_normal: Array) -> Array:
        mean = jnp.asarray(self.mixing.mean, of_normal.dtype)
        return mean * of_normal if self.noise_scaled else mean * (of_normal - self._noise) + self._noise

    def _log_prob(self, residual: Array) -> Array:
        flat = residual.reshape(-1, residual.shape[-1])
        found = jax.lax.map(lambda row: logsumexp(self._quadrature(row)[1]), flat)
        # traced noise is not refused; the eigenvalues are then NaN
        return jnp.where(jnp.isneginf(self.factor.log_ok), -jnp.inf, found.reshape(residual.shape[:-1]))

    def _sample(self, key: Any, sample_shape: tuple[int, ...]) -> Array:
        key_scale, key_normals = jax.random.split(key)
        scales = jnp.asarray(self.mixing.sample(key_scale, sample_shape))
        if self.noise_scaled:
            return jnp.sqrt(scales)[..., None] * self._correlated(key_normals, sample_shape)
        normals = jax.random.normal(key_normals, (math.prod(sample_shape), *self.loc.shape), self.loc.dtype)
        scales = scales.reshape(-1).astype(self.loc.dtype) / self._unit
        drawn = self._scaled.sqrt_matvec(scales, normals)
        return jnp.sqrt(self._noise) * drawn.reshape((*sample_shape, *self.loc.shape))

    def _quadrature(self, residual: Array) -> tuple[Array, Array]:
        """Nodes s_j, and log of w_j p(r | s_j) H(s_j) s_j."""
        log_likelihood = self._log_likelihood(residual)
        points, log_rule = (jnp.asarray(part, self.loc.dtype) for part in _legendre(self.nodes))

        def log_terms(u: Array, is_constant: bool = False) -> Array:
            return log_likelihood(u, is_constant) + _log_prior(self.mixing, u)

        low, high = _window(partial(log_terms, is_constant=True), *_reach(self.mixing, self.loc.dtype))
        u = 0.5 * (low + high) + 0.5 * (high - low) * points
        return jnp.exp(u), log_terms(u) + log_rule + jnp.log(0.5 * (high - low))

    def _log_likelihood(self, residual: Array) -> Any:
        if self.noise_scaled:
            log_scale, quadratic = scale_free(self.factor, residual, ())
            n = residual.shape[-1]
            return lambda u, is_constant=False: log_scale - 0.5 * n * u - 0.5 * quadratic * jnp.exp(-u)
        scaled, unit, root = self._scaled, self._unit, jnp.sqrt(self._noise)
        log_scale = jnp.sum(jnp.log(root))

        def log_likelihood(u: Array, is_constant: bool = False) -> Array:
            return scaled.log_densities(jnp.exp(u) / unit, residual / root, is_constant=is_constant) - log_scale

        return log_likelihood

    def _condition(self, residual: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        flat = residual.reshape(-1, residual.shape[-1])
        # not a loop: in one second derivatives would be wrong rather than refused, and the result is as large
        found = jax.jit(jax.vmap(lambda row: self._condition_one(row, Xs, noise, full_cov)))(flat)
        return jax.tree.map(lambda part: part.reshape((*residual.shape[:-1], *part.shape[1:])), found)

    def _condition_one(self, residual: Array, Xs: Array, noise: Array, full_cov: bool) -> tuple[Array, ...]:
        """Log weights (j,), means (j, m) and scales (j, m) or factors (j, m, m)."""
        scales, log_terms = self._quadrature(residual)
        log_weights = log_terms - logsumexp(log_terms)
        if self.noise_scaled:
            mean, spread = self._predict(residual, Xs, full_cov)
            means = jnp.broadcast_to(mean, (self.nodes, *mean.shape))
            wide = jnp.sqrt(scales).reshape(-1, *(1,) * spread.ndim)
            return log_weights, means, wide * (joint_tril(spread, noise) if full_cov else marginal_scale(spread, noise))

        scaled, unit, root = self._scaled, self._unit, jnp.sqrt(self._noise)
        cross = gram(self.kernel, self.X, Xs) / root[:, None]
        solved = scaled.solve(scales / unit, residual / root)
        means = mean_elsewhere(self.mean_function, Xs) + scales[:, None] * (solved @ cross)
        forms = scaled.forms(scales / unit, cross, full=full_cov)
        if full_cov:
            s = scales[:, None, None]
            return log_weights, means, joint_tril(s * (gram(self.kernel, Xs) - s * forms), noise)
        s = scales[:, None]
        return log_weights, means, marginal_scale(s * (diagonal(self.kernel, Xs) - s * forms), noise)

    def _law(self, arrays: tuple[Array, ...], full_cov: bool) -> dist.Distribution:
        log_weights, means, scales = arrays
        log_weights = jnp.maximum(log_weights, LEAST)  # NumPyro refuses -inf
        if full_cov:
            parts: dist.Distribution = dist.MultivariateNormal(means, scale_tril=scales)
            return dist.MixtureSameFamily(dist.Categorical(logits=log_weights), parts)
        parts = dist.Normal(jnp.swapaxes(means, -1, -2), jnp.swapaxes(scales, -1, -2))
        logits = jnp.broadcast_to(log_weights[..., None, :], parts.batch_shape)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)


def _log_prior(mixing: dist.Distribution, u: Array) -> Array:
    """Log density of u = log s; -inf outside the support, where NumPyro's densities need not be."""
    s = jnp.exp(u)
    support: Any = mixing.support
    is_inside = support(s)
    inside = jnp.where(is_inside, s, _any_inside(mixing, s))
    return jnp.where(is_inside, mixing.log_prob(inside) + u, -jnp.inf)


def _any_inside(mixing: dist.Distribution, s: Array) -> Array:
    upper = getattr(mixing.support, "upper_bound", None)
    lower = getattr(mixing.support, "lower_bound", 0.0)
    return jnp.ones_like(s) if upper is None else jnp.full_like(s, 0.5) * (lower + upper)


def _reach(mixing: dist.Distribution, dtype: Any) -> tuple[Array, Array]:
    """Between which u the search is made: nodes do not straddle the edges of a support, where densities jump."""
    lower = jnp.asarray(getattr(mixing.support, "lower_bound", 0.0), dtype)
    upper = jnp.asarray(getattr(mixing.support, "upper_bound", jnp.inf), dtype)
    low, high = (jnp.where(bound > 0, jnp.log(jnp.where(bound > 0, bound, 1.0)), -jnp.inf) for bound in (lower, upper))
    # NumPyro's densities may square s, as InverseGamma does: in float32 from 4e-19 to 2e18
    reach = min(REACH, 0.48 * math.log(float(jnp.finfo(dtype).max)))
    return jnp.clip(low, -reach, reach), jnp.clip(high, -reach, reach)


def _window(log_terms: Any, low: Array, high: Array) -> tuple[Array, Array]:
    """Where the terms are within DEPTH of the largest, found on ever finer grids, a cell more on either side."""
    for _ in range(4):
        grid = jnp.linspace(low, high, GRID)
        values = log_terms(jax.lax.stop_gradient(grid))
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        is_near = values >= jnp.max(values) - DEPTH
        first, last = jnp.argmax(is_near), GRID - 1 - jnp.argmax(is_near[::-1])
        low, high = grid[jnp.maximum(first - 1, 0)], grid[jnp.minimum(last + 1, GRID - 1)]
    return low, high


def _legendre(num: int) -> tuple[np.ndarray, np.ndarray]:
    points, rule = np.polynomial.legendre.leggauss(num)
    return points, np.log(rule)
