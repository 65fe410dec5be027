"""Hidden Markov models with parameters: filtering, smoothing, decoding, forecasting and simulating of data.

    x_0 ~ initial,    x_{t+1} | x_t = i ~ transition_i,    y_t | x_t = k ~ emission_k

A row of NaN in the data, or one outside `mask`, is missing, and integrated out.

References:
    Zucchini, MacDonald and Langrock (2016), Hidden Markov Models for Time Series, doi:10.1201/b20790.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors
from bayesinf.models.hmm.em import HMMFit, fit
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.filter import HMMFiltered, filter_chain, hmm_filter
from bayesinf.models.hmm.hidden_chain import HiddenChainModel, PathDraw
from bayesinf.models.hmm.inputs import as_chain
from bayesinf.models.hmm.observations import Observations, evidence, observe, score
from bayesinf.models.hmm.recursion import Method
from bayesinf.models.hmm.sample import hmm_sample, sample_paths
from bayesinf.models.hmm.smoother import HMMSmoothed, hmm_smoother
from bayesinf.models.hmm.viterbi import HMMPath, hmm_viterbi
from bayesinf.target import Target

__all__ = ["HiddenMarkovModel", "sticky"]


class HiddenMarkovModel(HiddenChainModel):
    """A hidden Markov model.

    Attributes:
        emission: the laws of observations, with K states.
        initial: probabilities of x_0, shape (K,); equal ones by default.
        transition: row i holds the probabilities of x_{t+1} given x_t = i, shape (K, K); by default it stays with
            probability 0.9.
        initial_prior: concentrations of the Dirichlet law of `initial`, scalar or shape (K,); 1 by default, a flat one.
        transition_prior: of the rows of `transition`, scalar or shape (K, K); 1 by default. `sticky` makes one that
            holds on to a state.

    Raises:
        ValueError: a shape does not fit, or probabilities do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.HiddenMarkovModel(bi.models.hmm.Poisson(jnp.array([15.0, 26.0])))
        >>> model.viterbi(jnp.array([14.0, 12.0, jnp.nan, 27.0, 31.0, 25.0])).path.tolist()
        [0, 0, 0, 1, 1, 1]
    """

    def __init__(
        self,
        emission: Emission,
        initial: Any = None,
        transition: Any = None,
        *,
        initial_prior: Any = 1.0,
        transition_prior: Any = 1.0,
    ):
        super().__init__(emission, initial, transition, initial_prior, transition_prior, stay=0.9)

    @property
    def can_follow(self) -> Bool[Array, "k k"]:
        return jnp.ones(self.transition.shape, bool)

    def log_prior(self) -> Float[Array, ""]:
        """Log density of the parameters under their conjugate priors, up to a constant."""
        return self._log_prior()

    def filter(
        self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None, method: Method = "auto"
    ) -> HMMFiltered:
        """What the data so far tell of the state, see `hmm_filter`; other arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hmm_filter(self.log_initial, self.log_transition, log_lik, lengths=lengths, method=method)

    def smooth(
        self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None, method: Method = "auto"
    ) -> HMMSmoothed:
        """What all data tell of the state, see `hmm_smoother`; other arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hmm_smoother(self.log_initial, self.log_transition, log_lik, lengths=lengths, method=method)

    def viterbi(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> HMMPath:
        """The most probable path, see `hmm_viterbi`; arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hmm_viterbi(self.log_initial, self.log_transition, log_lik, lengths=lengths)

    def sample_posterior(
        self,
        key: errors.KeyLike,
        ys: Any,
        num_samples: int,
        *,
        covariates: Any = None,
        mask: Any = None,
        lengths: Any = None,
    ) -> Int[Array, "..."]:
        """Paths given the data, shape (..., num_samples, T), see `hmm_sample`; other arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hmm_sample(key, self.log_initial, self.log_transition, log_lik, num_samples, lengths=lengths)

    def fit(
        self,
        key: errors.KeyLike,
        ys: Any,
        *,
        covariates: Any = None,
        mask: Any = None,
        lengths: Any = None,
        num_starts: int = 10,
        max_iterations: int = 500,
        tolerance: float = 1e-4,
        method: Method = "auto",
        throw: bool = True,
    ) -> HMMFit:
        """Learns the parameters by EM: of largest posterior density under the priors, of largest likelihood without.

        The first start is the model itself, the others are guessed from the data; all climb at once, in one compiled
        loop. New data of the same shape compile nothing.

        Args:
            key: a PRNG key or an integer seed.
            ys: one series of shape (T, ...), or several of shape (B, T, ...); NaN where missing.
            covariates: shape (T, p) or (B, T, p), for emissions that take them.
            mask: True where observed, shape (T,) or (B, T).
            lengths: of several series, shape (B,).
            num_starts: how many starts; 1 is the model itself alone.
            max_iterations: of every start.
            tolerance: a start has ended when an iteration raises its log density by less, or by less than rounding.
            method: of the passes, as of `hmm_filter`.
            throw: whether to raise where no start explains the data.

        Returns:
            The best end, and how it got there.

        Raises:
            ValueError: an argument is out of its range, a shape does not fit, or a concentration of a prior is below 1,
                where the posterior density has no maximum; `HMMGibbs` and `target` take it.
            InitializationError: no start explains the data; `result` holds the fit.

        Warns:
            SamplingWarning: the best start has not converged.

        Example:
            >>> import jax.numpy as jnp
            >>> import bayesinf as bi
            >>> from bayesinf.datasets import earthquakes
            >>> model = bi.models.HiddenMarkovModel(bi.models.hmm.Poisson(jnp.array([10.0, 30.0])))
            >>> fitted = model.fit(0, earthquakes().counts)
            >>> round(float(fitted.log_evidence), 2), jnp.round(jnp.sort(fitted.model.emission.rate)).tolist()
            (-341.88, [15.0, 26.0])

        References:
            Baum, Petrie, Soules and Weiss (1970), doi:10.1214/aoms/1177697196.
        """
        data = observe(self.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        return fit(
            key,
            self,
            data,
            num_starts=num_starts,
            max_iterations=max_iterations,
            tolerance=tolerance,
            method=method,
            throw=throw,
        )

    def target(
        self,
        ys: Any,
        priors: Mapping[str, dist.Distribution],
        *,
        covariates: Any = None,
        mask: Any = None,
        lengths: Any = None,
        method: Method = "auto",
    ) -> Target:
        """The posterior of the parameters with the path integrated out, for NUTS and any other kernel on a target.

        The probabilities of the chain have their Dirichlet priors; parameters of the emission that `priors` does not
        name stay what they are.

        Args:
            ys: one series of shape (T, ...), or several of shape (B, T, ...); NaN where missing.
            priors: NumPyro laws by the names of `parameters_of`; each stands for all the numbers of its parameter, or
                for rows of them where it is a law of vectors.
            covariates, mask, lengths: as of `log_lik`.
            method: of the passes, as of `hmm_filter`.

        Raises:
            ValueError: a prior is of no parameter, or has another shape.

        Example:
            >>> import jax.numpy as jnp
            >>> import numpyro.distributions as dist
            >>> import bayesinf as bi
            >>> from bayesinf.datasets import earthquakes
            >>> model = bi.models.HiddenMarkovModel(bi.models.hmm.Poisson(jnp.array([15.0, 26.0])))
            >>> target = model.target(earthquakes().counts, {"rate": dist.Gamma(2.0, 0.1)})
            >>> sorted(target.init(0, num_chains=4))
            ['initial', 'rate', 'transition']
        """
        data = observe(self.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        return self._target(data, priors, lambda model, given: evidence(model, given, method))

    def draw_path(self, key: Key[Array, ""], data: Observations) -> PathDraw:
        log_lik = score(self.emission, data)
        chain = as_chain(self.log_initial, self.log_transition, log_lik, None, data.lengths)
        filtered = filter_chain(chain, "auto")
        path = sample_paths(key, chain, filtered, 1)[:, 0]
        visits = jax.nn.one_hot(path, self.num_states, dtype=log_lik.dtype)  # none where the path is -1
        moves = jnp.einsum("bti,btj->ij", visits[:, :-1], visits[:, 1:], precision="highest")
        return PathDraw(path, jnp.sum(filtered.log_evidence), moves, None)

    def simulate(self, key: errors.KeyLike, num_steps: int, *, covariates: Any = None) -> tuple[Array, Array]:
        """A path of states and its observations.

        Args:
            key: a PRNG key or an integer seed.
            num_steps: T.
            covariates: shape (T, p), for emissions that take them.

        Returns:
            (states, ys), with leading axis T.

        Example:
            >>> import jax.numpy as jnp
            >>> import bayesinf as bi
            >>> model = bi.models.HiddenMarkovModel(bi.models.hmm.Poisson(jnp.array([15.0, 26.0])))
            >>> states, ys = model.simulate(0, num_steps=100)
            >>> states.shape, ys.shape
            ((100,), (100,))
        """
        num_steps = errors.check_count("num_steps", num_steps)
        given = None if covariates is None else jnp.asarray(covariates)
        return self._simulate(errors.as_key(key), num_steps, given)

    @eqx.filter_jit
    def _simulate(self, key: Key[Array, ""], num_steps: int, covariates: Array | None) -> tuple[Array, Array]:
        key_first, key_moves, key_ys = jax.random.split(key, 3)
        first = jax.random.categorical(key_first, self.log_initial)

        def move(state: Array, key: Array) -> tuple[Array, Array]:
            state = jax.random.categorical(key, self.log_transition[state])
            return state, state

        _, later = jax.lax.scan(move, first, jax.random.split(key_moves, num_steps)[1:])
        states = jnp.concatenate([first[None], later]).astype(jnp.int32)
        return states, self.emission.sample(key_ys, states, covariates)


def sticky(num_states: int, concentration: float = 1.0, stickiness: float = 10.0) -> Float[Array, "k k"]:
    """A prior of transitions that holds on to a state: as if each had been seen to stay `stickiness` times.

    Args:
        num_states: K.
        concentration: of every transition.
        stickiness: what is added for staying.

    Returns:
        Concentrations of Dirichlet laws, a row for every state.

    Example:
        >>> from bayesinf import models
        >>> models.hmm.sticky(2, 1.0, 9.0).tolist()
        [[10.0, 1.0], [1.0, 10.0]]

    References:
        Fox, Sudderth, Jordan and Willsky (2011), doi:10.1214/10-AOAS395.
    """
    return concentration + stickiness * jnp.eye(num_states)
