"""Hidden semi-Markov models with parameters: states of any emission, whose stays have durations of their own law.

    state of the first stay ~ initial, of the next ~ transition from the one before;    duration ~ that of the state
    y_t | x_t = k ~ emission_k

A row of NaN in the data, or one outside `mask`, is missing, and integrated out. The durations of an ordinary hidden
Markov model are geometric: most likely is a stay of one step, in every state.

References:
    Guédon (2003), doi:10.1198/1061860032030 (EM with a last stay that goes on after the end).
    Yu (2010), doi:10.1016/j.artint.2009.11.011.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.duration import Duration
from bayesinf.models.hmm.em import HMMFit, climb_from_starts, maximize_chain
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.hidden_chain import HiddenChainModel, PathDraw
from bayesinf.models.hmm.inputs import over_series
from bayesinf.models.hmm.observations import Observations, observe, score
from bayesinf.models.hmm.semi_markov import (
    HSMMFiltered,
    HSMMSmoothed,
    SemiChain,
    hsmm_filter,
    hsmm_smoother,
    semi_forward,
    semi_statistics,
)
from bayesinf.models.hmm.semi_markov_paths import HSMMPath, HSMMPaths, draw_stays, hsmm_sample, hsmm_viterbi
from bayesinf.target import Target

__all__ = ["HiddenSemiMarkovModel"]


class HiddenSemiMarkovModel(HiddenChainModel):
    """A hidden semi-Markov model.

    Attributes:
        emission: the laws of observations, with K states.
        duration: the laws of durations, such as `NegativeBinomialDuration`, with K states.
        initial: probabilities of x_0, shape (K,); equal ones by default. A stay begins at time 0.
        transition: row i holds the probabilities of the state after a stay in i, shape (K, K); by default all others
            are equally likely. Where a state can follow itself, durations are of each of its stays.
        initial_prior: concentrations of the Dirichlet law of `initial`, scalar or shape (K,); 1 by default, a flat one.
        transition_prior: of the rows of `transition`, scalar or shape (K, K); 1 by default. It is of the transitions
            that are not zero, which those that are stay.

    Raises:
        ValueError: a shape does not fit, or probabilities do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import models
        >>> hmm = models.hmm
        >>> duration = hmm.NegativeBinomialDuration(jnp.array([9.0, 9.0]), jnp.array([0.75, 0.75]), max_duration=12)
        >>> model = models.HiddenSemiMarkovModel(hmm.Poisson(jnp.array([15.0, 26.0])), duration)
        >>> model.viterbi(jnp.array([14.0, 12.0, 27.0, 13.0, 31.0, 25.0, 24.0])).path.tolist()  # no stay of one step
        [0, 0, 0, 0, 1, 1, 1]
    """

    duration: Duration

    def __init__(
        self,
        emission: Emission,
        duration: Duration,
        initial: Any = None,
        transition: Any = None,
        *,
        initial_prior: Any = 1.0,
        transition_prior: Any = 1.0,
    ):
        if not isinstance(duration, Duration):
            raise ValueError(
                f"duration must be a Duration, such as models.hmm.CategoricalDuration, got {type(duration).__name__}"
            )
        super().__init__(emission, initial, transition, initial_prior, transition_prior, stay=0.0)
        num_laws = duration.log_prob().shape[0]
        if num_laws != self.num_states:
            raise ValueError(f"duration must be of {self.num_states} states, as the emission is, got {num_laws}")
        self.duration = duration

    @property
    def can_follow(self) -> Bool[Array, "k k"]:
        return self.transition > 0

    def log_prior(self) -> Float[Array, ""]:
        """Log density of the parameters under their conjugate priors, up to a constant."""
        return self._log_prior() + self.duration.log_prior()

    def filter(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> HSMMFiltered:
        """What the data so far tell of the state, see `hsmm_filter`; arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hsmm_filter(*self._laws(), log_lik, lengths=lengths)

    def smooth(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> HSMMSmoothed:
        """What all data tell of the state, see `hsmm_smoother`; arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hsmm_smoother(*self._laws(), log_lik, lengths=lengths)

    def viterbi(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> HSMMPath:
        """The most probable stays, see `hsmm_viterbi`; arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hsmm_viterbi(*self._laws(), log_lik, lengths=lengths)

    def sample_posterior(
        self,
        key: errors.KeyLike,
        ys: Any,
        num_samples: int,
        *,
        covariates: Any = None,
        mask: Any = None,
        lengths: Any = None,
    ) -> HSMMPaths:
        """Paths given the data, shape (..., num_samples, T), see `hsmm_sample`; other arguments as of `log_lik`."""
        log_lik = self.log_lik(ys, covariates=covariates, mask=mask, lengths=lengths)
        return hsmm_sample(key, *self._laws(), log_lik, num_samples, lengths=lengths)

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
        throw: bool = True,
    ) -> HMMFit:
        """Learns the parameters by EM, see `HiddenMarkovModel.fit`, which has the same arguments.

        All starts have the model's own durations and transitions, and emissions guessed from the data.

        Raises:
            ValueError: an argument is out of its range, a shape does not fit, or a concentration of a prior is below 1,
                where the posterior density has no maximum; `HMMGibbs` and `target` take it.
            InitializationError: no start explains the data; `result` holds the fit.

        Warns:
            SamplingWarning: the best start has not converged.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf import models
            >>> from bayesinf.datasets import earthquakes
            >>> hmm = models.hmm
            >>> duration = hmm.NegativeBinomialDuration(jnp.ones(2), jnp.array([0.1, 0.1]), max_duration=60)
            >>> model = models.HiddenSemiMarkovModel(hmm.Poisson(jnp.array([15.0, 26.0])), duration)
            >>> fitted = model.fit(0, earthquakes().counts, num_starts=1)
            >>> bool(fitted.log_evidence > model.log_prob(earthquakes().counts))
            True

        References:
            Guédon (2003), doi:10.1198/1061860032030.
        """
        data = observe(self.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        return climb_from_starts(
            key,
            self,
            data,
            _expect,
            _maximize,
            num_starts=num_starts,
            max_iterations=max_iterations,
            tolerance=tolerance,
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
    ) -> Target:
        """The posterior of the parameters with the stays integrated out, see `HiddenMarkovModel.target`.

        Transitions that are zero stay zero. Where others are learnt, every row of as many, these are the variable
        "moves", from left to right, and the whole matrix is a deterministic one, "transition".

        Args:
            ys, covariates, mask, lengths: as of `log_lik`.
            priors: NumPyro laws by the names of `parameters_of`, among them those of the durations.

        Raises:
            ValueError: a prior is of no parameter, or has another shape, or rows of `transition` differ in how many of
                their probabilities are zero.

        Example:
            >>> import jax.numpy as jnp
            >>> import numpyro.distributions as dist
            >>> from bayesinf import models
            >>> from bayesinf.datasets import earthquakes
            >>> hmm = models.hmm
            >>> duration = hmm.NegativeBinomialDuration(jnp.ones(2), jnp.array([0.1, 0.1]), max_duration=60)
            >>> model = models.HiddenSemiMarkovModel(hmm.Poisson(jnp.array([15.0, 26.0])), duration)
            >>> priors = {"rate": dist.Gamma(2.0, 0.1), "duration.stop": dist.Beta(1.0, 4.0)}
            >>> sorted(model.target(earthquakes().counts, priors).init(0, num_chains=4))
            ['duration.stop', 'initial', 'rate']
        """
        data = observe(self.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        return self._target(data, priors, _evidence)

    def draw_path(self, key: Key[Array, ""], data: Observations) -> PathDraw:
        chain = self._chain(data)
        num_states, num_durations = chain.log_duration.shape

        def one(log_lik: Array, is_real: Array, key: Array) -> tuple[Array, ...]:
            passed = semi_forward(chain, log_lik, is_real, is_kept=True)
            path, is_start, rest = (found[0] for found in draw_stays(key, chain, passed, log_lik, 1))
            num_steps = path.shape[0]
            starts = jnp.where(is_start, jnp.arange(num_steps), num_steps + rest)
            following = jax.lax.cummin(jnp.append(starts[1:], num_steps + rest), reverse=True)
            lasted = following - jnp.arange(num_steps)  # of the stays that begin here
            is_known = is_real & (passed.log_evidence > -jnp.inf)
            path = jnp.where(is_known, path, -1)
            is_start = is_start & is_known
            visits = jax.nn.one_hot(path, num_states, dtype=log_lik.dtype)
            begun = jnp.where(is_start[:, None], visits, 0.0)
            product = partial(jnp.matmul, precision="highest")  # of counts
            durations = product(begun.T, jax.nn.one_hot(lasted - 1, num_durations, dtype=log_lik.dtype))
            return path, passed.log_evidence, product(visits[:-1].T, begun[1:]), durations

        keys = jax.random.split(key, chain.log_lik.shape[:1])
        path, log_evidence, moves, durations = over_series(one, chain.log_lik, chain.is_real, keys)
        return PathDraw(path, jnp.sum(log_evidence), jnp.sum(moves, axis=0), jnp.sum(durations, axis=0))

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
            >>> from bayesinf import models
            >>> duration = models.hmm.CategoricalDuration(jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
            >>> emission = models.hmm.Poisson(jnp.array([15.0, 26.0]))
            >>> model = models.HiddenSemiMarkovModel(emission, duration, initial=jnp.array([1.0, 0.0]))
            >>> model.simulate(0, num_steps=8)[0].tolist()
            [0, 0, 0, 1, 1, 0, 0, 0]
        """
        num_steps = errors.check_count("num_steps", num_steps)
        given = None if covariates is None else jnp.asarray(covariates)
        return self._simulate(errors.as_key(key), num_steps, given)

    @eqx.filter_jit
    def _simulate(self, key: Key[Array, ""], num_steps: int, covariates: Array | None) -> tuple[Array, Array]:
        key_first, key_stays, key_ys = jax.random.split(key, 3)
        log_initial, log_transition, log_duration = self._laws()

        def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
            state, rest = carry
            key_state, key_duration = jax.random.split(key)
            is_new = rest == 0
            state = jnp.where(is_new, jax.random.categorical(key_state, log_transition[state]), state)
            duration = jax.random.categorical(key_duration, log_duration[state])  # less one
            return (state, jnp.where(is_new, duration, rest - 1)), state

        key_state, key_duration = jax.random.split(key_first)
        first = jax.random.categorical(key_state, log_initial)
        begin = first, jax.random.categorical(key_duration, log_duration[first])
        _, later = jax.lax.scan(step, begin, jax.random.split(key_stays, num_steps)[1:])
        states = jnp.concatenate([first[None], later]).astype(jnp.int32)
        return states, self.emission.sample(key_ys, states, covariates)

    def _laws(self) -> tuple[Float[Array, " k"], Float[Array, "k k"], Float[Array, "k d"]]:
        return self.log_initial, self.log_transition, self.duration.log_prob()

    def _chain(self, data: Observations) -> SemiChain:
        log_lik = score(self.emission, data)
        is_real = jnp.arange(log_lik.shape[1]) < data.lengths[:, None]
        log_initial, log_transition, log_duration = (law.astype(log_lik.dtype) for law in self._laws())
        return SemiChain(log_initial, log_transition, log_duration, log_lik, is_real)


def _evidence(model: HiddenSemiMarkovModel, data: Observations) -> Float[Array, ""]:
    chain = model._chain(data)

    def one(log_lik: Array, is_real: Array) -> Array:
        return semi_forward(chain, log_lik, is_real, is_kept=False).log_evidence

    return jnp.sum(over_series(one, chain.log_lik, chain.is_real))


def _expect(model: HiddenSemiMarkovModel, data: Observations) -> tuple[Float[Array, ""], HSMMSmoothed]:
    chain = model._chain(data)

    def one(log_lik: Array, is_real: Array) -> HSMMSmoothed:
        passed = semi_forward(chain, log_lik, is_real, is_kept=True)
        return semi_statistics(chain, passed, log_lik, is_real)

    smoothed = over_series(one, chain.log_lik, chain.is_real)
    return jnp.sum(smoothed.log_evidence), smoothed


def _maximize(model: HiddenSemiMarkovModel, data: Observations, rows: Any, smoothed: HSMMSmoothed) -> Any:
    visits = jnp.exp(smoothed.log_smoothed)
    better = maximize_chain(model, data, rows, visits, smoothed.expected_transitions)
    return dataclasses.replace(better, duration=model.duration.maximize(jnp.sum(smoothed.expected_durations, axis=0)))
