"""Gibbs sampling of a hidden Markov model: the path given the parameters, the parameters given the path.

    x_{0:T-1} ~ p(x | y, theta)  exactly, by filtering forwards and sampling backwards
    initial ~ Dirichlet(prior + [x_0]),    transition_i ~ Dirichlet(prior_i + counts of the moves from i)
    emission_k ~ its conjugate posterior given the rows with x_t = k

The law of (theta, path) given the data is invariant.

References:
    Chib (1996), doi:10.1016/0304-4076(95)01770-4.
    Scott (2002), doi:10.1198/016214502753479464.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf.kernel import Kernel
from bayesinf.models.hmm.filter import filter_chain
from bayesinf.models.hmm.inputs import as_chain
from bayesinf.models.hmm.model import HiddenMarkovModel
from bayesinf.models.hmm.observations import Observations, observe, score
from bayesinf.models.hmm.parameters import parameters_of, with_parameters
from bayesinf.models.hmm.sample import sample_paths

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
    """Gibbs sampling of the parameters of a hidden Markov model.

    The states have no names: where the priors are the same for all, so is the law of all permutations of them. Compare
    what does not depend on their order, or sort the draws.

    Attributes:
        model: whose priors they are; its emission needs a conjugate one. Its own parameters are where `initial` starts.
        data: the data, as the emission takes them.

    Args:
        model: the model.
        ys: one series of shape (T, ...), or several of shape (B, T, ...); NaN where missing.
        covariates, mask, lengths: as of `HiddenMarkovModel.log_lik`.

    Raises:
        ValueError: the emission has no conjugate prior, or a shape does not fit.

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

    model: HiddenMarkovModel
    data: Observations

    def __init__(
        self, model: HiddenMarkovModel, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None
    ):
        self.model = model
        data = observe(model.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        self.data = data._replace(is_single=None)
        rows, features = self._rows()
        weights = jax.ShapeDtypeStruct((len(rows), model.num_states), rows.dtype)
        jax.eval_shape(lambda key, w: model.emission.draw(key, rows, w, features), jax.random.key(0), weights)

    def initial(self, num_chains: int) -> dict[str, Array]:
        """The model's own parameters as the start of every chain."""
        values = parameters_of(self.model)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains, *leaf.shape)), values)

    def init(self, position: dict[str, Array]) -> HMMGibbsState:
        position = jax.tree.map(jnp.asarray, dict(position))
        with_parameters(self.model, position)  # refuses unknown names
        return HMMGibbsState(position, jnp.full(self.data.is_seen.shape, -1, jnp.int32))

    def step(self, key: Key[Array, ""], state: HMMGibbsState) -> tuple[HMMGibbsState, HMMGibbsInfo]:
        key_path, key_initial, key_transition, key_emission = jax.random.split(key, 4)
        model = with_parameters(self.model, state.position)
        log_lik = score(model.emission, self.data)
        chain = as_chain(model.log_initial, model.log_transition, log_lik, None, self.data.lengths)
        filtered = filter_chain(chain, "auto")
        log_evidence = jnp.sum(filtered.log_evidence)
        path = sample_paths(key_path, chain, filtered, 1)[:, 0]

        visits = jax.nn.one_hot(path, model.num_states, dtype=log_lik.dtype)  # none where the path is -1
        moves = jnp.einsum("bti,btj->ij", visits[:, :-1], visits[:, 1:], precision="highest")
        weights = jnp.where(self.data.is_seen[..., None], visits, 0.0).reshape(-1, model.num_states)
        rows, features = self._rows()
        drawn = parameters_of(
            HiddenMarkovModel(
                model.emission.draw(key_emission, rows, weights, features),
                jax.random.dirichlet(key_initial, jnp.sum(visits[:, 0], axis=0) + model.initial_prior),
                jax.random.dirichlet(key_transition, moves + model.transition_prior),
            )
        )
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
