"""TTS-VAR's selection: diversity while it is too early to score, scores after that.

    t in cluster_steps     of each of k clusters of the particles' features the one nearest to its mean, N / k times
    t otherwise            by the weights, as a particle filter

The clusters keep what is different; the weights then find what is good. Particles that were chosen by clusters start
from equal weights, so that there is no evidence.

References:
    Chen et al. (2025), TTS-VAR, https://arxiv.org/abs/2507.18537.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.inference_scaling.diversity import diverse_ancestors
from bayesinf.kernels.inference_scaling.population import Population, keep_places
from bayesinf.kernels.inference_scaling.selection import Choice, Resample, Selection, equal_weights

__all__ = ["Diverse"]


class Diverse(Selection):
    """At some steps representatives of clusters go on, at the others who is drawn by weight.

    Attributes:
        features: a function of the generator's state to an array (N, F), such as `first_component` of its patches.
        resample: the choice at the other steps.
        num_survivors: k, how many different particles clusters leave. Static.
        cluster_steps: before which steps, counted from 0, clusters choose. Static.

    Raises:
        ValueError: a step that is not after the first, more survivors than particles, or features of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.kernels.inference_scaling import DiscreteChain, Diverse, Potential
        >>> rows = [[0.9, 0.1, 0], [0.1, 0.9, 0], [0, 0, 1]]
        >>> walk = DiscreteChain([0.1, 0.1, 0.8], rows, max_steps=4)                   # most begin, and go on, with "c"
        >>> even = Potential(lambda state: jnp.ones(state.last.shape), kind="step")
        >>> letters = lambda state: 1.0 * (state.last[:, None] == jnp.arange(3))
        >>> method = Diverse(letters, num_survivors=3, cluster_steps=(1,))
        >>> result = bi.kernels.infer(0, walk, even, method=method, num_particles=60)
        >>> sum(text.startswith("c") for text in result.texts)                          # a third of them
        20

    References:
        Chen et al. (2025), https://arxiv.org/abs/2507.18537.
    """

    features: Callable[..., Any] = eqx.field(converter=as_pytree)
    resample: Resample = eqx.field(default_factory=Resample)
    num_survivors: int = eqx.field(static=True, default=4, kw_only=True)
    cluster_steps: tuple[int, ...] = eqx.field(static=True, default=(1,), kw_only=True)

    def __check_init__(self):
        if not callable(self.features):
            raise ValueError(
                f"features must be a function of the generator's state, got {type(self.features).__name__}"
            )
        errors.check_count("num_survivors", self.num_survivors)
        for step in self.cluster_steps:
            errors.check_count("cluster_steps", step)

    def describe(self, state: PyTree) -> Float[Array, "N f"]:
        features = jnp.asarray(self.features(state))
        if features.ndim != 2:
            raise ValueError(f"features must return an array of shape (N, F), got {features.shape}")
        return features

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        features = population.features
        if features is None:
            raise ValueError("Diverse compares features of a generator that runs in process; this one has none")
        num = population.log_weights.shape[0]
        key_clusters, key_weights = jax.random.split(key)

        def by_clusters() -> Choice:
            ancestors = keep_places(diverse_ancestors(key_clusters, features, self.num_survivors, num))
            return ancestors, equal_weights(population, ancestors), jnp.ones((), bool)

        is_time = jnp.isin(t, jnp.asarray(self.cluster_steps, t.dtype))
        return jax.lax.cond(is_time, by_clusters, lambda: self.resample.choose(key_weights, population, t, max_steps))

    def check(self, num_particles: int) -> None:
        errors.check_count("num_particles", num_particles, minimum=self.num_survivors)
