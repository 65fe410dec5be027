"""A hidden Markov model as a state-space model, for particle methods."""

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Int, Key, PyTree

from bayesinf.models.hmm.model import HiddenMarkovModel
from bayesinf.models.state_space import Law, StateSpaceModel

__all__ = ["HMMStateSpace"]


class HMMStateSpace(StateSpaceModel):
    """The state-space model whose states are those of a hidden Markov model.

    There is no need to approximate what `hmm_filter` finds exactly: it is for checking particle methods against it, and
    for being extended by what makes exact filtering impossible. Where regimes drive other states, take
    `ConditionallyDiscrete`, which filters them exactly.

    Attributes:
        hmm: a hidden Markov model whose emission takes no covariates.

    Raises:
        ValueError: the emission takes covariates, or the series' own past.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.datasets import earthquakes
        >>> model = bi.models.HiddenMarkovModel(bi.models.hmm.Poisson(jnp.array([15.0, 26.0])))
        >>> ys = jnp.asarray(earthquakes().counts, float)
        >>> filtered = bi.kernels.particle_filter(0, bi.models.hmm.HMMStateSpace(model), ys, num_particles=1000)
        >>> bool(abs(filtered.log_evidence - model.log_prob(ys)) < 2.0)
        True
    """

    hmm: HiddenMarkovModel

    def __check_init__(self):
        emission = self.hmm.emission
        if emission.needs_covariates or getattr(emission, "num_lags", 0):
            raise ValueError(f"hmm must emit without covariates and lags, got {type(emission).__name__} with them")

    def initial(self):
        return dist.Categorical(logits=self.hmm.log_initial)

    def transition(self, x_prev: PyTree, t: Int[Array, ""]):
        return dist.Categorical(logits=self.hmm.log_transition[x_prev])

    def observation(self, x: PyTree, t: Int[Array, ""]) -> Law:
        emission = self.hmm.emission

        def draw(key: Key[Array, ""]) -> Array:
            return emission.sample(key, x[None])[0]

        def density(y: Array) -> Array:
            is_nan = jnp.isnan(y)
            is_missing = jnp.all(is_nan) if emission.takes_partial else jnp.any(is_nan)
            row = jnp.where(is_missing, emission.filler, y)
            return jnp.where(is_missing, 0.0, emission.log_prob(row[None])[0, x])

        return draw, density
