"""Mixtures in every state, of any emissions.

    p(y_t | x_t = k) = sum_c probs_{kc} p_{kc}(y_t)

The components of all states are one emission of K C states, the C of state k next to each other; who of them emitted is
a second hidden variable, independent over time given the states.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission, ratio
from bayesinf.models.hmm.recursion import log_or_never, log_total

__all__ = ["Mixture"]


class Mixture(Emission):
    """Mixtures of C components in every state.

    Attributes:
        probs: of the components in every state, shape (K, C); rows sum to one.
        components: an emission of K C states; those of state k are k C, ..., (k + 1) C - 1.
        prior: concentrations of the Dirichlet law of every row of probs, scalar or shape (K, C); None for a flat one.

    Raises:
        ValueError: the components are not K C, or rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> components = hmm.Gaussian(jnp.array([-1.0, 1.0, 0.0, 5.0]), jnp.ones(4))
        >>> emission = hmm.Mixture(jnp.full((2, 2), 0.5), components)
        >>> emission.num_states, emission.log_prob(jnp.zeros(3)).shape
        (2, (3, 2))
    """

    probs: Float[Array, "k c"] = eqx.field(converter=errors.as_array("probs", is_floating=True))
    components: Emission
    prior: Array | None = eqx.field(
        default=None, converter=errors.as_array("prior", is_optional=True, is_floating=True)
    )

    def __check_init__(self):
        if self.probs.ndim != 2 or self.components.num_states != self.probs.size:
            raise ValueError(
                f"components must have K C states for probs of shape (K, C), got {self.components.num_states} states "
                f"and shape {self.probs.shape}"
            )
        if errors.is_concrete(self.probs):
            slack = float(jnp.finfo(self.probs.dtype).eps) ** 0.5
            if not bool(jnp.all(self.probs >= 0) & jnp.all(jnp.abs(self.probs.sum(-1) - 1) < slack)):
                raise ValueError(f"probs must hold rows of probabilities that sum to 1, got {self.probs}")

    @property
    def num_states(self) -> int:
        return self.probs.shape[0]

    @property
    def event_ndim(self) -> int:
        return self.components.event_ndim

    @property
    def takes_partial(self) -> bool:
        return self.components.takes_partial

    @property
    def needs_covariates(self) -> bool:
        return self.components.needs_covariates

    def features(self, ys: Array, covariates: Array | None) -> Array | None:
        return self.components.features(ys, covariates)

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        raise NotImplementedError("a mixture is drawn from by components, see sample")

    def log_prob(self, ys: Array, covariates: Array | None = None) -> Float[Array, "t k"]:
        return log_total(self._log_joint(ys, covariates))

    def sample(self, key: Key[Array, ""], states: Int[Array, " t"], covariates: Array | None = None) -> Array:
        key_component, key_y = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.probs[states]))
        return self.components.sample(key_y, states * self.probs.shape[1] + component, covariates)

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "Mixture":
        log_joint = self._log_joint(ys, covariates)
        total = log_total(log_joint)[..., None]
        share = jnp.where(total == -jnp.inf, 0.0, jnp.exp(log_joint - jnp.where(total == -jnp.inf, 0.0, total)))
        shared = weights[:, :, None] * share
        counts = jnp.sum(shared, axis=0)
        if self.prior is not None:
            counts = jnp.maximum(counts + self.prior - 1.0, 0.0)
        return dataclasses.replace(
            self,
            probs=ratio(counts, jnp.sum(counts, -1, keepdims=True), self.probs),
            components=self.components.maximize(ys, shared.reshape(len(ys), -1), covariates),
        )

    def guess(self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None) -> "Mixture":
        components = self.components.guess(key, ys, is_seen, covariates)
        return dataclasses.replace(
            self, probs=jnp.full_like(self.probs, 1 / self.probs.shape[1]), components=components
        )

    def draw(
        self, key: Key[Array, ""], ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None
    ) -> "Mixture":
        key_component, key_probs, key_rest = jax.random.split(key, 3)
        component = jax.random.categorical(key_component, self._log_joint(ys, covariates))  # of every state
        shared = weights[:, :, None] * jax.nn.one_hot(component, self.probs.shape[1], dtype=weights.dtype)
        prior = jnp.ones_like(self.probs) if self.prior is None else jnp.broadcast_to(self.prior, self.probs.shape)
        return dataclasses.replace(
            self,
            probs=jax.random.dirichlet(key_probs, jnp.sum(shared, axis=0) + prior),
            components=self.components.draw(key_rest, ys, shared.reshape(len(ys), -1), covariates),
        )

    def log_prior(self) -> Float[Array, ""]:
        own = 0.0 if self.prior is None else jnp.sum(jax.scipy.special.xlogy(self.prior - 1.0, self.probs))
        return self.components.log_prior() + own

    def _log_joint(self, ys: Array, covariates: Array | None) -> Float[Array, "t k c"]:
        log_lik = self.components.log_prob(ys, covariates).reshape(len(ys), *self.probs.shape)
        return log_lik + log_or_never(self.probs)
