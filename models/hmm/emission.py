"""What the hidden states of a Markov model emit: the contract of emissions.

An emission holds the parameters of K laws as fields with a leading axis of states. What learns a model asks four things
of it: the log density of every row in every state, the parameters that maximise a weighted sum of these (the M-step of
EM), a start guessed from data, and, where Gibbs sampling is possible, a draw of the parameters given who emitted what.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors

__all__ = ["Emission", "as_prior", "draw_rows", "not_conjugate", "ratio", "spread_rows"]


class Emission(eqx.Module):
    """The laws of y_t given each of K states; subclass it for laws of your own.

    Attributes:
        filler: a value inside the support, which stands where nothing was observed.
    """

    filler: ClassVar[float] = 0.0

    @property
    def event_ndim(self) -> int:
        """How many axes one observation has."""
        return 0

    @property
    def takes_partial(self) -> bool:
        """Whether rows may be missing (NaN) in some components alone; elsewhere they are missing whole."""
        return False

    @property
    def needs_covariates(self) -> bool:
        """Whether the laws depend on covariates that the user gives."""
        return False

    def features(self, ys: Array, covariates: Array | None) -> Array | None:
        """What the laws of one series are given as covariates; NaN in a row makes it one that is not scored."""
        return covariates

    @property
    @abc.abstractmethod
    def num_states(self) -> int:
        """K."""

    @abc.abstractmethod
    def law(self, covariates: Array | None = None) -> dist.Distribution:
        """The laws of y, with batch shape (K,), or (T, K) given covariates of T rows."""

    @abc.abstractmethod
    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Emission":
        """The emission whose weighted log density, with the log prior, is largest; or no smaller than before.

        Args:
            ys: T rows, without missing ones but for components where `takes_partial`.
            weights: of every row for every state; 0 where a row is missing.
            covariates: T rows, where the emission takes them.
        """

    @abc.abstractmethod
    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Emission":
        """A random start for these data: a different one with every key."""

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "Emission":
        """The parameters given which state emitted which row, at random: weights are 0 or 1."""
        raise not_conjugate(self)

    def log_prior(self) -> Float[Array, ""]:
        """Log density of the parameters, up to a constant; 0 without a prior."""
        return jnp.zeros(())

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        """Log p(y_t | x_t = k); -inf outside the support.

        Args:
            ys: T rows, shape (T,) or (T, d).
            covariates: T rows, where the emission takes them.

        Returns:
            Shape (T, K).
        """
        law: Any = self.law(covariates)
        y = jnp.expand_dims(ys, 1)
        is_inside = law.support(y)
        inside = is_inside.reshape(is_inside.shape + (1,) * (y.ndim - is_inside.ndim))
        return jnp.where(is_inside, law.log_prob(jnp.where(inside, y, self.filler)), -jnp.inf)

    def sample(self, key: Key[Array, ""], states: Int[Array, " t"], covariates: Array | None = None) -> Array:
        """One observation from each of these states."""
        law = self.law(covariates)
        shape = states.shape if len(law.batch_shape) == 1 else ()
        every = law.sample(key, shape)  # (T, K, ...)
        return jax.vmap(lambda row, state: row[state])(every, states)


def as_prior(kind: Any) -> Callable[[Any], Any]:
    """A converter for the field `prior`: to a named tuple of this kind whose fields are arrays, or None."""

    def convert(prior: Any) -> Any:
        if prior is None:
            return None
        if not isinstance(prior, kind):
            raise ValueError(f"prior must be a {kind.__name__}{kind._fields}, got {prior!r}")
        fields = zip(kind._fields, prior, strict=True)
        return kind(*(errors.as_array(f"prior.{name}", is_floating=True)(value) for name, value in fields))

    return convert


def not_conjugate(emission: Emission) -> ValueError:
    """What to say where the parameters of an emission cannot be drawn given the states."""
    return ValueError(
        f"{type(emission).__name__} has no conjugate prior, or was given none: set its `prior`, or sample its "
        "parameters by gradients with the model's `target`"
    )


def ratio(numerator: Array, denominator: Array, otherwise: Array) -> Array:
    """Numerator / denominator, and `otherwise` where nothing was counted."""
    is_some = denominator > 0
    return jnp.where(is_some, numerator / jnp.where(is_some, denominator, 1.0), otherwise)


def draw_rows(
    key: Key[Array, ""], concentration: Float[Array, "k m"], is_free: Bool[Array, "k m"]
) -> Float[Array, "k m"]:
    """Rows of probabilities from Dirichlet laws, zero where they are not free; as `jax.random.dirichlet` if all are."""
    return jax.nn.softmax(jnp.where(is_free, jax.random.loggamma(key, concentration), -jnp.inf), axis=-1)


def spread_rows(
    key: Key[Array, ""], rows: Float[Array, "t d"], is_seen: Bool[Array, " t"], num: int
) -> Int[Array, " num"]:
    """Indices of rows that lie apart: each is drawn in proportion to its squared distance from those before.

    References:
        Arthur and Vassilvitskii (2007), k-means++: the advantages of careful seeding.
    """
    distance = jnp.where(is_seen, 1.0, 0.0)
    chosen: list[Array] = []
    for key_one in jax.random.split(key, num):
        index = jax.random.categorical(key_one, jnp.log(distance))
        apart = jnp.sum((rows - rows[index]) ** 2, axis=-1)
        # where all rows are the same, any one
        closest = apart if not chosen else jnp.minimum(apart, distance)
        closest = jnp.where(is_seen, closest, 0.0)
        distance = jnp.where(jnp.any(closest > 0), closest, jnp.where(is_seen, 1.0, 0.0))
        chosen.append(index)
    return jnp.stack(chosen)
