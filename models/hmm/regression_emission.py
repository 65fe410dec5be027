"""Linear regression in every state, on covariates or on the series' own past.

    y_t | x_t = k, z_t ~ N(intercept_k + coefficients_k . (y_{t-1}, ..., y_{t-l}, z_t), scale_k^2)

With l > 0 lags it is the Markov-switching autoregression; its first l rows, and those whose past is missing, are
conditioned on and not scored. With the prior scale^2 ~ inverse-gamma(df / 2, scatter / 2) and intercept and
coefficients N(0, scale^2 / precision) EM maximises the posterior density, and Gibbs sampling is exact.

References:
    Hamilton (1989), doi:10.2307/1912559.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, as_prior, not_conjugate, ratio

__all__ = ["LinearRegression", "RegressionPrior"]


class RegressionPrior(NamedTuple):
    """The conjugate prior of a regression, the same in every state.

    Attributes:
        precision: of intercept and coefficients, over that of the noise, > 0.
        df: how many observations the prior scatter counts for, > 0.
        scatter: sum of squares of these, > 0.
    """

    precision: Any
    df: Any
    scatter: Any


class LinearRegression(Emission):
    """Linear regression on covariates, on the last values of the series itself, or on both.

    Attributes:
        coefficients: shape (K, l + p): of y_{t-1}, ..., y_{t-l}, and then of the p covariates.
        intercept: shape (K,).
        scale: standard deviation of the noise, shape (K,), > 0.
        prior: a `RegressionPrior`, or None.
        num_lags: l.

    Raises:
        ValueError: a scale is not positive, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.LinearRegression(jnp.array([[1.0], [-1.0]]), jnp.zeros(2), jnp.ones(2))
        >>> emission.law(jnp.array([[3.0]])).mean.tolist()
        [[3.0, -3.0]]
        >>> autoregression = hmm.LinearRegression(jnp.array([[0.9], [0.1]]), jnp.zeros(2), jnp.ones(2), num_lags=1)
        >>> autoregression.features(jnp.array([1.0, 2.0, 3.0]), None)[:, 0].tolist()
        [nan, 1.0, 2.0]
    """

    coefficients: Float[Array, "k p"] = eqx.field(converter=errors.as_array("coefficients", is_floating=True))
    intercept: Float[Array, " k"] = eqx.field(converter=errors.as_array("intercept", is_floating=True))
    scale: Float[Array, " k"] = eqx.field(converter=errors.as_array("scale", is_floating=True))
    prior: RegressionPrior | None = eqx.field(default=None, converter=as_prior(RegressionPrior))
    num_lags: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        errors.check_count("num_lags", self.num_lags, minimum=0)
        errors.check_positive("scale", self.scale)
        num = self.scale.shape[:1]
        if self.scale.ndim != 1 or self.intercept.shape != num or self.coefficients.shape[:-1] != num:
            raise ValueError(
                "coefficients, intercept and scale must have shapes (K, num_lags + p), (K,) and (K,), got "
                f"{self.coefficients.shape}, {self.intercept.shape} and {self.scale.shape}"
            )
        if self.coefficients.shape[1] < self.num_lags:
            raise ValueError(
                f"coefficients must have a column for each of {self.num_lags} lags, got {self.coefficients.shape}"
            )

    @property
    def num_states(self) -> int:
        return self.scale.shape[0]

    @property
    def needs_covariates(self) -> bool:
        return self.coefficients.shape[1] > self.num_lags

    def features(self, ys: Array, covariates: Array | None) -> Array | None:
        expected = (len(ys), self.coefficients.shape[1] - self.num_lags)
        if covariates is None:
            covariates = jnp.zeros((len(ys), 0))
        if covariates.shape != expected:
            raise ValueError(
                f"covariates must have shape {expected}, T from ys and p from coefficients without the lags, got "
                f"{covariates.shape}"
            )
        padded = jnp.concatenate([jnp.full(self.num_lags, jnp.nan, ys.dtype), ys])
        lags = [padded[self.num_lags - 1 - j : len(padded) - 1 - j, None] for j in range(self.num_lags)]
        return jnp.concatenate([*lags, covariates], axis=1)

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        assert covariates is not None  # `features` makes them
        return dist.Normal(self.intercept + covariates @ self.coefficients.T, self.scale)

    def sample(self, key: Key[Array, ""], states: Int[Array, " t"], covariates: Array | None = None) -> Array:
        """One series; its first l values, which are conditioned on and not scored, are zeros."""
        noise = jax.random.normal(key, states.shape, self.scale.dtype)
        given = jnp.zeros((len(states), 0)) if covariates is None else covariates

        def step(past: Array, data: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
            t, state, noise, row = data
            mean = self.intercept[state] + self.coefficients[state] @ jnp.concatenate([past, row])
            y = jnp.where(t < self.num_lags, 0.0, mean + self.scale[state] * noise)
            return jnp.concatenate([y[None], past])[: self.num_lags], y

        return jax.lax.scan(step, jnp.zeros(self.num_lags), (jnp.arange(len(states)), states, noise, given))[1]

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "LinearRegression":
        design = _design(covariates)
        precision, df, scatter = (0.0, 0.0, 0.0) if self.prior is None else self.prior
        extra = 0.0 if self.prior is None else df + 2.0 + design.shape[1]
        ridge = 1e-6 * _variance(ys, weights)

        def one(weight: Array, old: Array, scale: Array) -> tuple[Array, Array]:
            beta = _solve(design, ys, weight, precision)[0]
            total = jnp.sum(weight)
            beta = jnp.where(total > 0, beta, old)
            squares = jnp.sum(weight * (ys - design @ beta) ** 2) + precision * jnp.sum(beta**2) + scatter
            return beta, jnp.sqrt(ratio(squares, total + extra, scale**2) + ridge)

        beta, scale = jax.vmap(one, in_axes=(1, 0, 0))(weights, self._stacked(), self.scale)
        return self._replaced(beta, scale)

    def guess(
        self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None
    ) -> "LinearRegression":
        # random halves of the rows, weighed softly, give regressions that differ
        shares = jax.random.dirichlet(key, jnp.full(self.num_states, 0.5), (len(ys),))
        return self.maximize(ys, jnp.where(is_seen[:, None], shares, 0.0), covariates)

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "LinearRegression":
        if self.prior is None:
            raise not_conjugate(self)
        prior, design = self.prior, _design(covariates)

        def one(key: Key[Array, ""], weight: Array) -> tuple[Array, Array]:
            key_scale, key_beta = jax.random.split(key)
            beta, tril = _solve(design, ys, weight, prior.precision)
            squares = jnp.sum(weight * (ys - design @ beta) ** 2) + prior.precision * jnp.sum(beta**2) + prior.scatter
            scale = jnp.sqrt(squares / (2.0 * jax.random.gamma(key_scale, (prior.df + jnp.sum(weight)) / 2.0)))
            noise = jax.scipy.linalg.solve_triangular(tril.T, jax.random.normal(key_beta, beta.shape))
            return beta + scale * noise, scale

        return self._replaced(*jax.vmap(one, in_axes=(0, 1))(jax.random.split(key, self.num_states), weights))

    def log_prior(self) -> Float[Array, ""]:
        if self.prior is None:
            return jnp.zeros(())
        precision, df, scatter = self.prior
        beta = self._stacked()
        quadratic = (precision * jnp.sum(beta**2, axis=1) + scatter) / self.scale**2
        return -0.5 * jnp.sum(quadratic + (df + 2.0 + beta.shape[1]) * jnp.log(self.scale**2))

    def _stacked(self) -> Array:
        return jnp.concatenate([self.intercept[:, None], self.coefficients], axis=1)

    def _replaced(self, beta: Array, scale: Array) -> "LinearRegression":
        return dataclasses.replace(self, intercept=beta[:, 0], coefficients=beta[:, 1:], scale=scale)


def _design(covariates: Array | None) -> Float[Array, "t q"]:
    assert covariates is not None
    return jnp.concatenate([jnp.ones_like(covariates[:, :1]), covariates], axis=1)


def _variance(ys: Array, weights: Array) -> Float[Array, ""]:
    every = jnp.sum(weights, axis=1)
    one = jnp.ones(())
    mean = ratio(jnp.sum(every * ys), jnp.sum(every), one)
    return ratio(jnp.sum(every * (ys - mean) ** 2), jnp.sum(every), one)


def _solve(design: Array, ys: Array, weight: Array, precision: Any) -> tuple[Float[Array, " q"], Float[Array, "q q"]]:
    """Weighted least squares with a ridge, and the Cholesky factor of its precision.

    Columns are scaled to length one first, and a rounding is added to the diagonal: collinear covariates, and a state
    with fewer rows than coefficients, get the shortest of the solutions, nearly.
    """
    gram = jnp.matmul((weight[:, None] * design).T, design, precision="highest") + precision * jnp.eye(design.shape[1])
    size = jnp.sqrt(jnp.diag(gram))
    size = jnp.where(size > 0, size, 1.0)
    jitter = 10 * design.shape[1] * jnp.finfo(design.dtype).eps
    tril = jnp.linalg.cholesky(gram / jnp.outer(size, size) + jitter * jnp.eye(len(size)))
    right = (weight * ys) @ design / size
    return jax.scipy.linalg.cho_solve((tril, True), right) / size, size[:, None] * tril
