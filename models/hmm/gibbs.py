"""Gibbs sampling of hidden Markov and semi-Markov models: the path given the parameters, these given the path.

    x_{0:T-1} ~ p(x | y, theta)  exactly, by filtering forwards and sampling backwards
    initial ~ Dirichlet(prior + [x_0]),    transition_i ~ Dirichlet(prior_i + counts of the moves from i)
    emission_k ~ its conjugate posterior given the rows with x_t = k
    duration_k ~ its conjugate posterior given how long the stays in k last, the last of them with its end drawn, too

The law of (theta, path) given the data is invariant.

References:
    Chib (1996), doi:10.1016/0304-4076(95)01770-4.
    Scott (2002), doi:10.1198/016214502753479464.
    Johnson and Willsky (2013), https://www.jmlr.org/papers/v14/johnson13a.html (durations).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf.kernel import Kernel
from bayesinf.models.hmm.emission import draw_rows
from bayesinf.models.hmm.hidden_chain import HiddenChainModel
from bayesinf.models.hmm.observations import Observations, observe
from bayesinf.models.hmm.parameters import parameters_of, with_parameters
from bayesinf.models.hmm.semi_markov_model import HiddenSemiMarkovModel

__all__ = ["HMMGibbs", "HMMGibbsInfo", "HMMGibbsState"]


class HMMGibbsState(NamedTuple):
    """Where the chain is.

    Attributes:
        position: the parameters, by name.
        path: of every series, from the step that drew these parameters; -1 after the end, and before the first step.
    """

    position: dict[str, Array]
    path: Int[Array, "b t"]


class HMMGibbsInfo(NamedTuple):
    """What a step did; every draw is exact, so that all are accepted.

    Attributes:
        acceptance_rate, is_accepted, is_divergent, num_gradients: as of every kernel.
        log_work: None.
        log_evidence: log p(y) under the parameters that the step began with.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: None
    log_evidence: Float[Array, ""]


class HMMGibbs(Kernel):
    """Gibbs sampling of the parameters of a hidden Markov model, or of a hidden semi-Markov model.

    The states have no names: where the priors are the same for all, so is the law of all permutations of them. Compare
    what does not depend on their order, or sort the draws.

    Attributes:
        model: whose priors they are; its emission, and its durations if it has them, need conjugate ones. Its own
            parameters are where `initial` starts.
        data: the data, as the emission takes them.

    Args:
        model: the model.
        ys: one series of shape (T, ...), or several of shape (B, T, ...); NaN where missing.
        covariates, mask, lengths: as of `HiddenMarkovModel.log_lik`.

    Raises:
        ValueError: the emission or the durations have no conjugate prior, or a shape does not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.models import hmm
        >>> from bayesinf.datasets import earthquakes
        >>> model = hmm.HiddenMarkovModel(hmm.Poisson(jnp.array([15.0, 26.0]), prior=hmm.GammaPrior(2.0, 0.1)))
        >>> kernel = hmm.HMMGibbs(model, earthquakes().counts)
        >>> draws = bi.sample(0, kernel, kernel.initial(num_chains=2), num_samples=200, progress=False)
        >>> rates = jnp.sort(draws.samples["rate"], axis=-1).mean((0, 1))
        >>> (5 * jnp.round(rates / 5)).tolist()                                     # to the nearest 5
        [15.0, 25.0]

    References:
        Chib (1996), doi:10.1016/0304-4076(95)01770-4.
    """

    model: HiddenChainModel
    data: Observations

    def __init__(
        self, model: HiddenChainModel, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None
    ):
        self.model = model
        data = observe(model.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        self.data = data._replace(is_single=None)
        rows, features = self._rows()
        weights = jax.ShapeDtypeStruct((len(rows), model.num_states), rows.dtype)
        key = jax.random.key(0)
        jax.eval_shape(lambda key, w: model.emission.draw(key, rows, w, features), key, weights)
        if isinstance(model, HiddenSemiMarkovModel):
            jax.eval_shape(model.duration.draw, key, model.duration.log_prob())

    def initial(self, num_chains: int) -> dict[str, Array]:
        """The model's own parameters as the start of every chain."""
        values = parameters_of(self.model)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains, *leaf.shape)), values)

    def init(self, position: dict[str, Array]) -> HMMGibbsState:
        position = jax.tree.map(jnp.asarray, dict(position))
        with_parameters(self.model, position)  # refuses unknown names
        return HMMGibbsState(position, jnp.full(self.data.is_seen.shape, -1, jnp.int32))

    def step(self, key: Key[Array, ""], state: HMMGibbsState) -> tuple[HMMGibbsState, HMMGibbsInfo]:
        key_path, key_initial, key_transition, key_emission, key_duration = jax.random.split(key, 5)
        model = with_parameters(self.model, state.position)
        path, log_evidence, moves, durations = model.draw_path(key_path, self.data)

        visits = jax.nn.one_hot(path, model.num_states, dtype=moves.dtype)  # none where the path is -1
        weights = jnp.where(self.data.is_seen[..., None], visits, 0.0).reshape(-1, model.num_states)
        rows, features = self._rows()
        can_follow = self.model.can_follow  # not that of the draw, which may underflow
        concentration = jnp.where(can_follow, moves + model.transition_prior, 1.0)
        drawn_model = dataclasses.replace(
            model,
            emission=model.emission.draw(key_emission, rows, weights, features),
            initial=jax.random.dirichlet(key_initial, jnp.sum(visits[:, 0], axis=0) + model.initial_prior),
            transition=draw_rows(key_transition, concentration, can_follow),
        )
        if isinstance(self.model, HiddenSemiMarkovModel):
            duration = self.model.duration.draw(key_duration, durations)
            drawn_model = dataclasses.replace(drawn_model, duration=duration)
        drawn = parameters_of(drawn_model)
        is_ok = log_evidence > -jnp.inf
        position = {
            name: jnp.where(is_ok, drawn[name], value).astype(value.dtype) if name in drawn else value
            for name, value in state.position.items()
        }
        info = HMMGibbsInfo(jnp.ones_like(log_evidence), is_ok, ~is_ok, jnp.zeros((), jnp.int32), None, log_evidence)
        return HMMGibbsState(position, path), info

    def _rows(self) -> tuple[Array, Array | None]:
        def flat(leaf: Array) -> Array:
            return leaf.reshape(-1, *leaf.shape[2:])

        return flat(self.data.ys), None if self.data.features is None else flat(self.data.features)
