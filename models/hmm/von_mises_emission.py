"""Von Mises emissions: angles.

    p(y_t | x_t = k) = exp(concentration_k cos(y_t - loc_k)) / (2 pi I_0(concentration_k))

The M-step takes loc as the direction of the mean of (cos y, sin y), and the concentration that solves
I_1(c) / I_0(c) = R, its length, by Newton's method.

References:
    Mardia and Jupp (1999), Directional Statistics, section 5.3.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, spread_rows

__all__ = ["VonMises"]


class VonMises(Emission):
    """Von Mises emissions.

    Attributes:
        loc: directions in radians, shape (K,).
        concentration: shape (K,), > 0; about one over the variance where it is large.

    Raises:
        ValueError: a concentration is not positive, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> emission = hmm.VonMises(loc=jnp.array([0.0, 3.0]), concentration=jnp.array([4.0, 1.0]))
        >>> bool(jnp.allclose(emission.log_prob(jnp.array([1.0])), emission.log_prob(jnp.array([1.0 + 2 * jnp.pi]))))
        True
    """

    loc: Float[Array, " k"] = eqx.field(converter=errors.as_array("loc", is_floating=True))
    concentration: Float[Array, " k"] = eqx.field(converter=errors.as_array("concentration", is_floating=True))

    def __check_init__(self):
        errors.check_positive("concentration", self.concentration)
        if self.loc.shape != self.concentration.shape or self.loc.ndim != 1:
            raise ValueError(
                f"loc and concentration must both have shape (K,), got {self.loc.shape} and {self.concentration.shape}"
            )

    @property
    def num_states(self) -> int:
        return self.loc.shape[0]

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return dist.VonMises(self.loc, self.concentration)

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        c = self.concentration
        log_norm = math.log(2 * math.pi) + jnp.log(jax.scipy.special.i0e(c)) + c
        return c * jnp.cos(ys[:, None] - self.loc) - log_norm

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "VonMises":
        counts, x, y = jnp.sum(weights, axis=0), jnp.cos(ys) @ weights, jnp.sin(ys) @ weights
        is_some = counts > 0
        length = jnp.hypot(x, y) / jnp.where(is_some, counts, 1.0)
        # a millionth keeps the concentration finite where all angles are the same, and positive where they cancel
        length = jnp.clip(length, 1e-6, 1 - 1e-6)
        return dataclasses.replace(
            self,
            loc=jnp.where(is_some, jnp.arctan2(y, x), self.loc),
            concentration=jnp.where(is_some, _solve_concentration(length), self.concentration),
        )

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "VonMises":
        every = jnp.where(is_seen, 1.0, 0.0)
        pooled = self.maximize(ys, jnp.broadcast_to(every[:, None], (len(ys), self.num_states)))
        points = jnp.stack([jnp.cos(ys), jnp.sin(ys)], axis=-1)
        chosen = ys[spread_rows(key, points, is_seen, self.num_states)]
        return dataclasses.replace(pooled, loc=chosen, concentration=jnp.maximum(pooled.concentration, 1.0))


def _solve_concentration(length: Array) -> Array:
    """C with I_1(c) / I_0(c) = length; from Best and Fisher's approximation."""
    c = length * (2.0 - length**2) / (1.0 - length**2)

    def newton(_: Array, c: Array) -> Array:
        a = jax.scipy.special.i1e(c) / jax.scipy.special.i0e(c)
        slope = 1.0 - a / c - a**2
        # the slope loses its digits where c is large; there one over (2 c^2) is exact to a third order
        slope = jnp.where(c > 50.0, 0.5 / c**2, slope)
        return jnp.maximum(c - (a - length) / slope, 0.5 * c)

    return jax.lax.fori_loop(0, 6, newton, c)
