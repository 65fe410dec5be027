"""Gamma emissions: positive values, with a shape and a rate in every state.

    y_t | x_t = k ~ Gamma(concentration_k, rate_k)

The M-step solves log a - digamma(a) = log(mean of y) - mean of log y by Newton's method on 1 / a.

References:
    Minka (2002), Estimating a Gamma distribution.
"""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, ratio, spread_rows

__all__ = ["Gamma"]


class Gamma(Emission):
    """Gamma emissions.

    Attributes:
        concentration: shapes a, shape (K,), > 0.
        rate: rates b, shape (K,), > 0; the mean is a / b.

    Raises:
        ValueError: a parameter is not positive, or their shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.Gamma(concentration=jnp.array([1.0, 2.0]), rate=jnp.array([1.0, 1.0]))
        >>> jnp.round(emission.log_prob(jnp.array([1.0]))).tolist()
        [[-1.0, -1.0]]
    """

    filler: ClassVar[float] = 1.0

    concentration: Float[Array, " k"] = eqx.field(converter=errors.as_array("concentration", is_floating=True))
    rate: Float[Array, " k"] = eqx.field(converter=errors.as_array("rate", is_floating=True))

    def __check_init__(self):
        errors.check_positive("concentration", self.concentration)
        errors.check_positive("rate", self.rate)
        if self.rate.shape != self.concentration.shape or self.rate.ndim != 1:
            raise ValueError(
                f"concentration and rate must both have shape (K,), got {self.concentration.shape} and "
                f"{self.rate.shape}"
            )

    @property
    def num_states(self) -> int:
        return self.rate.shape[0]

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return dist.Gamma(self.concentration, self.rate)

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Gamma":
        y = jnp.where(ys > 0, ys, self.filler)  # others have no weight, or the data are impossible
        counts = jnp.sum(weights, axis=0)
        mean = ratio(y @ weights, counts, self.concentration / self.rate)
        mean_log = ratio(jnp.log(y) @ weights, counts, digamma(self.concentration) - jnp.log(self.rate))
        # a millionth keeps the shape finite where all values are the same
        a = _solve_shape(jnp.maximum(jnp.log(mean) - mean_log, 0.0) + 1e-6)
        is_some = counts > 0
        return dataclasses.replace(
            self,
            concentration=jnp.where(is_some, a, self.concentration),
            rate=jnp.where(is_some, a / mean, self.rate),
        )

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Gamma":
        log_y = jnp.log(jnp.where(ys > 0, ys, self.filler))
        every = jnp.where(is_seen, 1.0, 0.0)
        pooled = self.maximize(ys, jnp.broadcast_to(every[:, None], (len(ys), self.num_states)))
        mean = jnp.exp(log_y[spread_rows(key, log_y[:, None], is_seen, self.num_states)])
        return dataclasses.replace(pooled, rate=pooled.concentration / mean)


def _solve_shape(s: Array) -> Array:
    """A with log a - digamma(a) = s."""
    a = (3.0 - s + jnp.sqrt((s - 3.0) ** 2 + 24.0 * s)) / (12.0 * s)

    def newton(_: Array, a: Array) -> Array:
        gap = jnp.log(a) - digamma(a) - s
        return 1.0 / (1.0 / a + gap / (a**2 * (1.0 / a - polygamma(1, a))))

    return jax.lax.fori_loop(0, 4, newton, a)
