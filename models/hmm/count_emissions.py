"""Counts and categories: emissions whose maximum likelihood, posterior mode and posterior are closed forms.

y_t | x_t = k ~ Poisson(rate_k),    prior rate_k ~ Gamma(shape, rate)
y_t | x_t = k ~ Categorical(probs_k),    prior probs_k ~ Dirichlet(prior)
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, as_prior, not_conjugate, ratio, spread_rows
from bayesinf.models.hmm.recursion import log_or_never

__all__ = ["Categorical", "GammaPrior", "Poisson"]


class GammaPrior(NamedTuple):
    """The Gamma prior of rates, by shape and rate: as if shape - 1 events had been seen in `rate` observations."""

    shape: Any
    rate: Any


class Poisson(Emission):
    """Poisson emissions.

    Attributes:
        rate: shape (K,) for a series of counts; (K, d) for vectors of independent ones, whose rows may be missing in
            part.
        prior: a `GammaPrior`, or None.

    Raises:
        ValueError: a rate is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.Poisson(jnp.array([1.0, 5.0]))
        >>> jnp.round(emission.log_prob(jnp.array([0.0]))).tolist()
        [[-1.0, -5.0]]
    """

    rate: Float[Array, " k"] | Float[Array, "k d"] = eqx.field(converter=errors.as_array("rate", is_floating=True))
    prior: GammaPrior | None = eqx.field(default=None, converter=as_prior(GammaPrior))

    def __check_init__(self):
        if self.rate.ndim not in (1, 2):
            raise ValueError(f"rate must have shape (K,) or (K, d), got {self.rate.shape}")
        if errors.is_concrete(self.rate) and not np.all((np.asarray(self.rate) >= 0) & np.isfinite(self.rate)):
            raise ValueError(f"rate must be finite and not negative, got {self.rate}")

    @property
    def num_states(self) -> int:
        return self.rate.shape[0]

    @property
    def event_ndim(self) -> int:
        return self.rate.ndim - 1

    @property
    def takes_partial(self) -> bool:
        return self.event_ndim == 1

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return dist.Poisson(self.rate).to_event(self.event_ndim)

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        y = ys[:, None]
        is_missing = jnp.isnan(y)
        is_count = (y >= 0) & (y == jnp.round(y))
        count = jnp.where(is_count, y, 0.0)
        terms = jax.scipy.special.xlogy(count, self.rate) - self.rate - jax.scipy.special.gammaln(count + 1)
        terms = jnp.where(is_missing, 0.0, jnp.where(is_count, terms, -jnp.inf))
        return jnp.sum(terms, axis=tuple(range(2, terms.ndim)))

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Poisson":
        counts, sums = _totals(ys, weights)
        shape, rate = (1.0, 0.0) if self.prior is None else self.prior
        mode = ratio(jnp.maximum(sums + shape - 1.0, 0.0), counts + rate, self.rate.reshape(counts.shape))
        return dataclasses.replace(self, rate=mode.reshape(self.rate.shape))

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Poisson":
        rows = ys.reshape(ys.shape[0], -1)
        counts, sums = _totals(ys, jnp.where(is_seen, 1.0, 0.0)[:, None])
        center = ratio(sums, counts, jnp.ones_like(sums))[0]
        rows = jnp.where(jnp.isnan(rows), center, rows)
        # counts have a constant variance after a square root; a rate of zero would never be left
        chosen = rows[spread_rows(key, jnp.sqrt(rows), is_seen, self.num_states)]
        return dataclasses.replace(self, rate=(0.9 * chosen + 0.1 * center + 1e-3).reshape(self.rate.shape))

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "Poisson":
        if self.prior is None:
            raise not_conjugate(self)
        counts, sums = _totals(ys, weights)
        drawn = jax.random.gamma(key, sums + self.prior.shape) / (counts + self.prior.rate)
        return dataclasses.replace(self, rate=drawn.reshape(self.rate.shape))

    def log_prior(self) -> Float[Array, ""]:
        if self.prior is None:
            return jnp.zeros(())
        shape, rate = self.prior
        return jnp.sum(jax.scipy.special.xlogy(shape - 1.0, self.rate) - rate * self.rate)


class Categorical(Emission):
    """Categories 0, ..., M - 1.

    Attributes:
        probs: probabilities, shape (K, M).
        prior: concentrations of the Dirichlet law of every row, scalar or shape (M,) or (K, M); None for a flat one.

    Raises:
        ValueError: rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.Categorical(jnp.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]))
        >>> jnp.exp(emission.log_prob(jnp.array([2.0, 0.0]))).tolist()
        [[0.0, 0.5], [0.5, 0.25]]
    """

    probs: Float[Array, "k m"] = eqx.field(converter=errors.as_array("probs", is_floating=True))
    prior: Array | None = eqx.field(
        default=None, converter=errors.as_array("prior", is_optional=True, is_floating=True)
    )

    def __check_init__(self):
        if self.probs.ndim != 2:
            raise ValueError(f"probs must have shape (K, M), got {self.probs.shape}")
        if errors.is_concrete(self.probs):
            slack = float(jnp.finfo(self.probs.dtype).eps) ** 0.5
            if not bool(jnp.all(self.probs >= 0) & jnp.all(jnp.abs(self.probs.sum(-1) - 1) < slack)):
                raise ValueError(f"probs must hold rows of probabilities that sum to 1, got {self.probs}")

    @property
    def num_states(self) -> int:
        return self.probs.shape[0]

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return dist.CategoricalProbs(self.probs)

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        num = self.probs.shape[1]
        is_category = (ys >= 0) & (ys < num) & (ys == jnp.round(ys))
        p = self.probs.T[jnp.where(is_category, ys, 0).astype(jnp.int32)]
        return jnp.where(is_category[:, None], log_or_never(p), -jnp.inf)

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Categorical":
        counts = self._counts(ys, weights)
        if self.prior is not None:
            counts = jnp.maximum(counts + self.prior - 1.0, 0.0)
        return dataclasses.replace(self, probs=ratio(counts, counts.sum(-1, keepdims=True), self.probs))

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Categorical":
        shares = self._counts(ys, jnp.where(is_seen, 1.0, 0.0)[:, None])[0]
        # around the shares of the whole series
        concentration = 1.0 + shares / jnp.maximum(jnp.sum(shares), 1.0) * self.probs.shape[1]
        return dataclasses.replace(self, probs=jax.random.dirichlet(key, concentration, (self.num_states,)))

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "Categorical":
        prior = jnp.ones_like(self.probs) if self.prior is None else jnp.broadcast_to(self.prior, self.probs.shape)
        return dataclasses.replace(self, probs=jax.random.dirichlet(key, self._counts(ys, weights) + prior))

    def log_prior(self) -> Float[Array, ""]:
        return jnp.zeros(()) if self.prior is None else jnp.sum(jax.scipy.special.xlogy(self.prior - 1.0, self.probs))

    def _counts(self, ys: Array, weights: Array) -> Float[Array, "k m"]:
        which = jax.nn.one_hot(ys.astype(jnp.int32), self.probs.shape[1], dtype=weights.dtype)
        return jnp.matmul(weights.T, which, precision="highest")


def _totals(ys: Array, weights: Array) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    """Weight and weighted sum of every component, of what is seen."""
    rows = ys.reshape(ys.shape[0], -1)
    is_seen = ~jnp.isnan(rows)
    product = partial(jnp.matmul, weights.T, precision="highest")
    return product(is_seen.astype(weights.dtype)), product(jnp.where(is_seen, rows, 0.0))
