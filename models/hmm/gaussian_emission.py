"""Gaussian emissions, with a variance of every component, a full covariance, or one covariance for all states.

    y_t | x_t = k ~ N(mean_k, C_k),    C_k = scale_tril_k scale_tril_k^T

With the conjugate prior mean_k | C_k ~ N(m, C_k / strength), C_k ~ inverse-Wishart(df, scatter) EM maximises the
posterior density and Gibbs sampling is exact; without it EM maximises the likelihood, which is unbounded where a state
shrinks onto one observation: a millionth of the variance of the data is always added. Components that are missing are
integrated out, in EM with their covariances given what was seen, and drawn in Gibbs sampling.

References:
    Gelman et al. (2013), Bayesian Data Analysis, section 3.6 (the normal-inverse-Wishart prior).
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, as_prior, not_conjugate, ratio, spread_rows
from bayesinf.models.hmm.partial_gaussian import complete_rows, draw_missing, is_partial, partial_log_prob

__all__ = ["Gaussian", "GaussianPrior"]

RIDGE = 1e-6


class GaussianPrior(NamedTuple):
    """The normal-inverse-Wishart prior, the same for every state; for single variances the inverse-gamma one.

    Attributes:
        mean: m, scalar or shape (d,).
        strength: how many observations the prior mean counts for, > 0.
        df: how many observations the prior scatter counts for, > d - 1.
        scatter: sum of squares of these, > 0: a scalar, which stands for every component, shape (d,), or (d, d).
    """

    mean: Any
    strength: Any
    df: Any
    scatter: Any


class Gaussian(Emission):
    """Gaussian emissions.

    Attributes:
        mean: shape (K,) for a series of numbers, (K, d) for vectors.
        scale_tril: standard deviations in the shape of `mean` for covariance="diagonal"; Cholesky factors, shape
            (K, d, d), for "full"; one, shape (d, d), for "tied".
        covariance: "diagonal", "full" or "tied". Rows may be missing in part: what is seen of them counts.
        prior: a `GaussianPrior`, or None.

    Raises:
        ValueError: a shape does not fit, or covariance is none of the three.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.Gaussian(mean=jnp.array([850.0, 1100.0]), scale_tril=jnp.array([130.0, 130.0]))
        >>> emission.log_prob(jnp.array([1000.0])).shape
        (1, 2)
    """

    mean: Float[Array, " k"] | Float[Array, "k d"] = eqx.field(converter=errors.as_array("mean", is_floating=True))
    scale_tril: Float[Array, "..."] = eqx.field(converter=errors.as_array("scale_tril", is_floating=True))
    prior: GaussianPrior | None = eqx.field(default=None, converter=as_prior(GaussianPrior))
    covariance: Literal["diagonal", "full", "tied"] = eqx.field(static=True, default="diagonal")

    def __check_init__(self):
        errors.check_choice("covariance", self.covariance, ("diagonal", "full", "tied"))
        if self.mean.ndim not in (1, 2) or (self.mean.ndim == 1 and self.covariance != "diagonal"):
            raise ValueError(
                f"mean must have shape (K, d), or (K,) with covariance='diagonal', got {self.mean.shape} with "
                f"covariance={self.covariance!r}"
            )
        d = self.mean.shape[-1]
        shapes = {"diagonal": self.mean.shape, "full": (*self.mean.shape, d), "tied": (d, d)}
        if self.scale_tril.shape != shapes[self.covariance]:
            raise ValueError(
                f"scale_tril must have shape {shapes[self.covariance]} for covariance={self.covariance!r} and a mean "
                f"of shape {self.mean.shape}, got {self.scale_tril.shape}"
            )
        if self.covariance == "diagonal":
            errors.check_positive("scale_tril", self.scale_tril)

    @property
    def num_states(self) -> int:
        return self.mean.shape[0]

    @property
    def event_ndim(self) -> int:
        return self.mean.ndim - 1

    @property
    def takes_partial(self) -> bool:
        return True

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        if self.covariance == "diagonal":
            return dist.Normal(self.mean, self.scale_tril).to_event(self.event_ndim)
        return dist.MultivariateNormal(self.mean, scale_tril=self._trils())

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        if self.covariance == "diagonal":
            y = ys[:, None]
            is_missing = jnp.isnan(y)
            z = (jnp.where(is_missing, self.mean, y) - self.mean) / self.scale_tril
            terms = -0.5 * (z**2 + math.log(2 * math.pi)) - jnp.log(self.scale_tril)
            return jnp.sum(jnp.where(is_missing, 0.0, terms), axis=tuple(range(2, terms.ndim)))

        def whole(ys: Array, mean: Array, tril: Array) -> Array:
            z = jax.scipy.linalg.solve_triangular(tril, (jnp.where(jnp.isnan(ys), 0.0, ys) - mean).T, lower=True)
            log_det = jnp.sum(jnp.log(jnp.diag(tril)))
            return -0.5 * (jnp.sum(z**2, axis=0) + len(mean) * math.log(2 * math.pi)) - log_det

        def one(mean: Array, tril: Array) -> Array:
            return jax.lax.cond(is_partial(ys), partial_log_prob, whole, *_of_one_dtype(ys, mean, tril))

        return jax.vmap(one, out_axes=1)(self.mean, self._trils())

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Gaussian":
        ys, mean = _columns(ys), _columns(self.mean)
        d = ys.shape[-1]
        strength, center, df, extra = self._prior(d)
        counts, sample_mean, scatter = self._moments(ys, weights, center)
        new_mean = ratio(counts * sample_mean + strength * center, counts + strength, mean)
        total = scatter + self._prior_scatter(counts, sample_mean)
        pooled = RIDGE * _pooled_variance(ys, weights)
        if self.covariance == "diagonal":
            number = counts + (df + 3 if self.prior else 0.0)
            variance = ratio(extra + total, number, _columns(self.scale_tril) ** 2)
            return self._replaced(new_mean, jnp.sqrt(variance + pooled))
        if self.covariance == "tied":
            number = jnp.sum(counts[:, 0]) + (df + d + 1 + self.num_states if self.prior else 0.0)
            old = self.scale_tril @ self.scale_tril.T
            covariance = ratio(extra + jnp.sum(total, axis=0), number, old)
        else:
            number = counts[:, :1, None] + (df + d + 2 if self.prior else 0.0)
            covariance = ratio(extra + total, number, self.scale_tril @ jnp.swapaxes(self.scale_tril, -1, -2))
        return self._replaced(new_mean, jnp.linalg.cholesky(covariance + jnp.diag(pooled)))

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Gaussian":
        ys = _columns(ys)
        every = jnp.where(is_seen, 1.0, 0.0)[:, None]
        counts, sums = _count(ys, every)
        center, variance = ratio(sums, counts, jnp.zeros_like(sums))[0], _pooled_variance(ys, every)
        rows = jnp.where(jnp.isnan(ys), center, ys)
        key_rows, key_scale = jax.random.split(key)
        mean = rows[spread_rows(key_rows, (rows - center) / jnp.sqrt(variance), is_seen, self.num_states)]
        # states may differ in their scale alone
        factor = jnp.exp(0.5 * jax.random.normal(key_scale, (self.num_states, 1)))
        if self.covariance == "diagonal":
            return self._replaced(mean, factor * jnp.sqrt(variance))
        apart = jnp.where(is_seen[:, None], rows - center, 0.0)
        tril = jnp.linalg.cholesky(apart.T @ apart / jnp.sum(every) + RIDGE * jnp.diag(variance))
        return self._replaced(mean, tril if self.covariance == "tied" else factor[..., None] * tril)

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "Gaussian":
        if self.prior is None:
            raise not_conjugate(self)
        key_scale, key_mean, key_rows = jax.random.split(key, 3)
        ys = _columns(ys)
        if self.covariance != "diagonal":
            state = jnp.argmax(weights, axis=1)
            given = _of_one_dtype(ys, self.mean[state], self._trils()[state])
            draw, whole = partial(draw_missing, key_rows), lambda ys, mean, _: jnp.where(jnp.isnan(ys), mean, ys)
            ys = jax.lax.cond(is_partial(ys), draw, whole, *given)
        strength, center, df, extra = self._prior(ys.shape[-1])
        counts, sample_mean, scatter = self._moments(ys, weights, center)
        number = counts + strength
        mean = (counts * sample_mean + strength * center) / number
        total = scatter + self._prior_scatter(counts, sample_mean)
        if self.covariance == "diagonal":
            scale = jnp.sqrt((extra + total) / (2 * jax.random.gamma(key_scale, (df + counts) / 2)))
            return self._replaced(mean + scale / jnp.sqrt(number) * jax.random.normal(key_mean, mean.shape), scale)
        if self.covariance == "tied":
            tril = _inverse_wishart(key_scale, df + jnp.sum(counts[:, 0]), extra + jnp.sum(total, axis=0))
        else:
            keys = jax.random.split(key_scale, self.num_states)
            tril = jax.vmap(_inverse_wishart)(keys, df + counts[:, 0], extra + total)
        noise = jnp.einsum(
            "...de,ke->kd" if tril.ndim == 2 else "kde,ke->kd", tril, jax.random.normal(key_mean, mean.shape)
        )
        return self._replaced(mean + noise / jnp.sqrt(number), tril)

    def log_prior(self) -> Float[Array, ""]:
        if self.prior is None:
            return jnp.zeros(())
        mean = _columns(self.mean)
        d = mean.shape[-1]
        strength, center, df, extra = self._prior(d)
        if self.covariance == "diagonal":
            variance = _columns(self.scale_tril) ** 2
            quadratic = (extra + strength * (mean - center) ** 2) / variance
            return -0.5 * jnp.sum((df + 3) * jnp.log(variance) + quadratic)
        trils = self._trils()
        z = jax.vmap(partial(jax.scipy.linalg.solve_triangular, lower=True))(trils, mean - center)
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(trils, axis1=-2, axis2=-1)), axis=-1)
        # trace(scatter C^-1); a tied covariance has its law once, though every state has it
        root = jax.vmap(lambda tril: jax.scipy.linalg.solve_triangular(tril, jnp.linalg.cholesky(extra), lower=True))(
            trils
        )
        inverse_wishart = -0.5 * ((df + d + 1) * log_det + jnp.sum(root**2, axis=(-2, -1)))
        once = inverse_wishart[0] if self.covariance == "tied" else jnp.sum(inverse_wishart)
        return once - 0.5 * jnp.sum(log_det + strength * jnp.sum(z**2, axis=-1))

    def _prior(self, d: int) -> tuple[Array, Array, Array, Array]:
        """Strength, mean, df and scatter; zeros that add nothing without a prior."""
        shape = (d,) if self.covariance == "diagonal" else (d, d)
        if self.prior is None:
            return jnp.zeros(()), jnp.zeros(d), jnp.zeros(()), jnp.zeros(shape)
        scatter = self.prior.scatter
        if scatter.ndim < 2 == len(shape):
            scatter = jnp.diag(jnp.broadcast_to(scatter, (d,)))
        return (
            self.prior.strength,
            jnp.broadcast_to(self.prior.mean, (d,)),
            self.prior.df,
            jnp.broadcast_to(scatter, shape),
        )

    def _moments(self, ys: Array, weights: Array, otherwise: Array) -> tuple[Array, Array, Array]:
        """Weights, means, and squares around these: of every component, shape (K, d), or matrices, shape (K, d, d).

        What is missing of a row adds its expectation given the rest, under the parameters as they are.
        """
        if self.covariance == "diagonal":
            counts, sums = _count(ys, weights)
            mean = ratio(sums, counts, jnp.broadcast_to(otherwise, sums.shape))
            apart = jnp.where(jnp.isnan(ys), 0.0, ys)[:, None] - mean
            squares = jnp.where(jnp.isnan(ys)[:, None], 0.0, weights[:, :, None] * apart**2)
            return counts, mean, jnp.sum(squares, axis=0)

        def whole(ys: Array, weight: Array, mean: Array, tril: Array) -> tuple[Array, Array]:
            return jnp.where(jnp.isnan(ys), mean, ys), jnp.zeros_like(tril)

        def one(weight: Array, mean: Array, tril: Array) -> tuple[Array, Array, Array]:
            given = _of_one_dtype(ys, weight, mean, tril)
            rows, spread = jax.lax.cond(is_partial(ys), complete_rows, whole, *given)
            count = jnp.full_like(mean, jnp.sum(weight))
            mean = ratio(jnp.matmul(weight, rows, precision="highest"), count, otherwise)
            apart = rows - mean
            return count, mean, spread + jnp.matmul((weight[:, None] * apart).T, apart, precision="highest")

        # one by one: covariances of all rows are held
        return jax.lax.map(lambda given: one(*given), (weights.T, self.mean, self._trils()))

    def _prior_scatter(self, counts: Array, sample_mean: Array) -> Array:
        """Squares of the means around that of the prior, of as many observations as it and they are worth."""
        strength, center, _, _ = self._prior(sample_mean.shape[-1])
        shrink, apart = strength * ratio(counts, counts + strength, jnp.zeros_like(counts)), sample_mean - center
        if self.covariance == "diagonal":
            return shrink * apart**2
        return shrink[:, :, None] * apart[:, :, None] * apart[:, None, :]

    def _trils(self) -> Float[Array, "k d d"]:
        return jnp.broadcast_to(self.scale_tril, (*self.mean.shape, self.mean.shape[-1]))

    def _replaced(self, mean: Array, scale_tril: Array) -> "Gaussian":
        return dataclasses.replace(
            self, mean=mean.reshape(self.mean.shape), scale_tril=scale_tril.reshape(self.scale_tril.shape)
        )


def _of_one_dtype(*arrays: Array) -> tuple[Array, ...]:
    """Branches must agree in what they return."""
    return tuple(array.astype(jnp.result_type(*arrays)) for array in arrays)


def _columns(x: Array) -> Array:
    """A series of numbers as one of vectors."""
    return x[:, None] if x.ndim == 1 else x


def _count(ys: Array, weights: Array) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    """How much weight of every component each state has, and its weighted sum."""
    is_seen = ~jnp.isnan(ys)
    product = partial(jnp.matmul, weights.T, precision="highest")
    return product(is_seen.astype(weights.dtype)), product(jnp.where(is_seen, ys, 0.0))


def _pooled_variance(ys: Array, weights: Array) -> Float[Array, " d"]:
    counts, sums = _count(ys, jnp.sum(weights, axis=1, keepdims=True))
    apart = jnp.where(jnp.isnan(ys), 0.0, ys - ratio(sums, counts, jnp.zeros_like(sums)))
    squares = jnp.sum(jnp.sum(weights, axis=1, keepdims=True) * apart**2, axis=0)
    return ratio(squares, counts[0], jnp.ones_like(squares))


def _inverse_wishart(key: Key[Array, ""], df: Array, scatter: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The Cholesky factor of a draw, by Bartlett's decomposition of the Wishart law of its inverse."""
    key_diagonal, key_below = jax.random.split(key)
    d = scatter.shape[-1]
    diagonal = jnp.sqrt(2 * jax.random.gamma(key_diagonal, (df - jnp.arange(d)) / 2))
    bartlett = jnp.diag(diagonal) + jnp.tril(jax.random.normal(key_below, (d, d)), -1)
    root = jax.scipy.linalg.solve_triangular(bartlett, jnp.linalg.cholesky(scatter).T, lower=True)  # C = root^T root
    return jnp.linalg.cholesky(root.T @ root)
