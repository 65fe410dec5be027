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
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.hmm.em import HMMFit, fit
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.filter import HMMFiltered, hmm_filter
from bayesinf.models.hmm.observations import Observations, evidence, observe, score
from bayesinf.models.hmm.parameters import parameters_of, with_parameters
from bayesinf.models.hmm.recursion import Method, log_or_never
from bayesinf.models.hmm.sample import hmm_sample
from bayesinf.models.hmm.smoother import HMMSmoothed, hmm_smoother
from bayesinf.models.hmm.viterbi import HMMPath, hmm_viterbi
from bayesinf.target import Target

__all__ = ["HiddenMarkovModel", "sticky"]


class HiddenMarkovModel(eqx.Module):
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

    emission: Emission
    initial: Float[Array, " k"]
    transition: Float[Array, "k k"]
    initial_prior: Float[Array, "..."]
    transition_prior: Float[Array, "..."]

    def __init__(
        self,
        emission: Emission,
        initial: Any = None,
        transition: Any = None,
        *,
        initial_prior: Any = 1.0,
        transition_prior: Any = 1.0,
    ):
        if not isinstance(emission, Emission):
            raise ValueError(
                f"emission must be an Emission, such as models.hmm.Gaussian, got {type(emission).__name__}"
            )
        num = emission.num_states
        stay = 0.9 if num > 1 else 1.0
        every = jnp.full((num, num), (1.0 - stay) / max(num - 1, 1)) + (
            stay - (1.0 - stay) / max(num - 1, 1)
        ) * jnp.eye(num)
        self.emission = emission
        self.initial = _probabilities("initial", jnp.full(num, 1.0 / num) if initial is None else initial, (num,))
        self.transition = _probabilities("transition", every if transition is None else transition, (num, num))
        self.initial_prior = _concentrations("initial_prior", initial_prior, (num,))
        self.transition_prior = _concentrations("transition_prior", transition_prior, (num, num))

    @property
    def num_states(self) -> int:
        """K."""
        return self.emission.num_states

    @property
    def log_initial(self) -> Float[Array, " k"]:
        """Log probabilities of x_0."""
        return log_or_never(self.initial)

    @property
    def log_transition(self) -> Float[Array, "k k"]:
        """Log probabilities of x_{t+1} given x_t."""
        return log_or_never(self.transition)

    def log_lik(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> Float[Array, "..."]:
        """Log p(y_t | x_t = k), shape (..., T, K): what the functions on arrays take; 0 where y_t is missing.

        Args:
            ys: one series of shape (T, ...), or several of shape (B, T, ...), in the shape of the emission's
                observations; NaN where missing.
            covariates: shape (T, p) or (B, T, p), for emissions that take them.
            mask: True where observed, shape (T,) or (B, T).
            lengths: of several series, shape (B,).
        """
        data = observe(self.emission, ys, covariates=covariates, mask=mask, lengths=lengths)
        log_lik = score(self.emission, data)
        return log_lik[0] if data.is_single else log_lik

    def log_prob(self, ys: Any, **given: Any) -> Float[Array, "..."]:
        """Log p(y_{0:T-1}) of every series, differentiable in the model's arrays; arguments as of `log_lik`."""
        return self.filter(ys, **given).log_evidence

    def log_prior(self) -> Float[Array, ""]:
        """Log density of the parameters under their conjugate priors, up to a constant."""
        xlogy = jax.scipy.special.xlogy
        chain = jnp.sum(xlogy(self.initial_prior - 1.0, self.initial))
        return chain + jnp.sum(xlogy(self.transition_prior - 1.0, self.transition)) + self.emission.log_prior()

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
            ValueError: an argument is out of its range, or a shape does not fit.
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
        num = self.num_states
        laws = {
            "initial": dist.Dirichlet(jnp.broadcast_to(self.initial_prior, (num,))),
            "transition": dist.Dirichlet(jnp.broadcast_to(self.transition_prior, (num, num))),
            **priors,
        }
        own = parameters_of(self)
        if unknown := set(laws) - set(own):
            raise ValueError(f"priors must be of {sorted(own)}, got one of {sorted(unknown)}")
        for name, law in laws.items():
            shape = own[name].shape
            if law.event_shape != shape[len(shape) - law.event_dim :]:
                raise ValueError(f"priors[{name!r}] must be a law of rows of shape {shape}, got {law.event_shape}")

        def joint(ys: Array, features: Array | None, is_seen: Array, lengths: Array) -> None:
            drawn = {}
            for name, law in laws.items():
                batch_shape = own[name].shape[: own[name].ndim - law.event_dim]
                drawn[name] = numpyro.sample(name, law.expand(batch_shape).to_event(len(batch_shape)))
            given = Observations(ys, features, is_seen, lengths, None)
            numpyro.factor("log_evidence", evidence(with_parameters(self, drawn), given, method))

        return Target.from_numpyro(joint, data.ys, data.features, data.is_seen, data.lengths)

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
        key_first, key_moves, key_ys = jax.random.split(errors.as_key(key), 3)
        first = jax.random.categorical(key_first, self.log_initial)

        def move(state: Array, key: Array) -> tuple[Array, Array]:
            state = jax.random.categorical(key, self.log_transition[state])
            return state, state

        _, later = jax.lax.scan(move, first, jax.random.split(key_moves, num_steps)[1:])
        states = jnp.concatenate([first[None], later]).astype(jnp.int32)
        given = None if covariates is None else jnp.asarray(covariates)
        return states, self.emission.sample(key_ys, states, given)


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


def _probabilities(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    p = errors.as_array(name, is_floating=True)(value)
    if p.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, K from the emission, got {p.shape}")
    if errors.is_concrete(p):
        values = np.asarray(p)
        if np.any(values < 0) or not np.allclose(values.sum(-1), 1.0, atol=float(jnp.finfo(p.dtype).eps) ** 0.5):
            raise ValueError(f"{name} must hold probabilities that sum to 1, got {values}")
    return p


def _concentrations(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    concentrations = errors.as_array(name, is_floating=True)(value)
    errors.check_positive(name, concentrations)
    if concentrations.shape not in ((), shape):
        raise ValueError(f"{name} must be a scalar or have shape {shape}, got {concentrations.shape}")
    return concentrations
