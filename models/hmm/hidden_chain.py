"""What hidden Markov models and hidden semi-Markov models share: a chain of states that emit, and its data.

    state ~ initial, then transition from the one before;    y_t | x_t = k ~ emission_k

The two differ in when the chain moves: at every step, or where a stay of its own duration ends.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.observations import Observations, observe, score
from bayesinf.models.hmm.parameters import parameters_of, with_parameters
from bayesinf.models.hmm.recursion import log_or_never
from bayesinf.target import Target

__all__ = ["HiddenChainModel", "PathDraw"]


class PathDraw(NamedTuple):
    """A path given the data, and what of it the parameters are drawn from.

    Attributes:
        path: states of every series; -1 after the end.
        log_evidence: log p(y) of all series together.
        moves: how often each state followed each.
        durations: how many stays lasted 1, ..., D steps in each state; None where stays have no law of their own.
    """

    path: Int[Array, "b t"]
    log_evidence: Float[Array, ""]
    moves: Float[Array, "k k"]
    durations: Float[Array, "k d"] | None


class HiddenChainModel(eqx.Module):
    """A hidden chain with emissions and conjugate priors: abstract.

    Attributes:
        emission: the laws of observations, with K states.
        initial: probabilities of x_0, shape (K,).
        transition: rows of probabilities of the next state, shape (K, K).
        initial_prior, transition_prior: concentrations of their Dirichlet laws.
    """

    emission: Emission
    initial: Float[Array, " k"]
    transition: Float[Array, "k k"]
    initial_prior: Float[Array, "..."]
    transition_prior: Float[Array, "..."]

    def __init__(
        self, emission: Emission, initial: Any, transition: Any, initial_prior: Any, transition_prior: Any, stay: float
    ):
        """Where `transition` is None the chain stays with probability `stay`, and all others are equally likely."""
        if not isinstance(emission, Emission):
            raise ValueError(
                f"emission must be an Emission, such as models.hmm.Gaussian, got {type(emission).__name__}"
            )
        num = emission.num_states
        leave = (1.0 - stay) / (num - 1) if num > 1 else 0.0
        every = np.full((num, num), leave) + (1.0 - num * leave) * np.eye(num)
        self.emission = emission
        self.initial = _probabilities("initial", np.full(num, 1.0 / num) if initial is None else initial, (num,))
        self.transition = _probabilities("transition", every if transition is None else transition, (num, num))
        self.initial_prior = _concentrations("initial_prior", initial_prior, (num,))
        self.transition_prior = _concentrations("transition_prior", transition_prior, (num, num))

    @property
    @abc.abstractmethod
    def can_follow(self) -> Bool[Array, "k k"]:
        """Which transitions have a prior, and are learnt; the others stay what they are."""

    @abc.abstractmethod
    def filter(self, ys: Any, *, covariates: Any = None, mask: Any = None, lengths: Any = None) -> Any:
        """What the data so far tell of the state; with `log_evidence` of every series."""

    @abc.abstractmethod
    def draw_path(self, key: Key[Array, ""], data: Observations) -> PathDraw:
        """A path given the data and the parameters."""

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
        """Log probabilities of the next state."""
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

    def _log_prior(self) -> Float[Array, ""]:
        """Of the chain and of the emission."""
        xlogy = jax.scipy.special.xlogy
        chain = jnp.sum(xlogy(self.initial_prior - 1.0, self.initial))
        rows = xlogy(jnp.where(self.can_follow, self.transition_prior - 1.0, 0.0), self.transition)
        return chain + jnp.sum(rows) + self.emission.log_prior()

    def _target(
        self,
        data: Observations,
        priors: Mapping[str, dist.Distribution],
        log_evidence: Callable[[Any, Observations], Float[Array, ""]],
    ) -> Target:
        """The posterior of the parameters that have a prior here or in `priors`."""
        own = parameters_of(self)
        if unknown := set(priors) - set(own):
            raise ValueError(f"priors must be of {sorted(own)}, got one of {sorted(unknown)}")
        laws: dict[str, Any] = {"initial": dist.Dirichlet(jnp.broadcast_to(self.initial_prior, own["initial"].shape))}
        shapes = {name: value.shape for name, value in own.items()}
        prior = jnp.broadcast_to(self.transition_prior, shapes["transition"])
        columns = [np.flatnonzero(row) for row in np.asarray(self.can_follow)]
        is_whole = all(len(row) == len(columns) for row in columns)
        if is_whole:
            laws["transition"] = dist.Dirichlet(prior)
        elif "transition" in priors:
            raise ValueError("priors must not be of 'transition', some of which are zero: it has transition_prior")
        elif len({len(row) for row in columns}) > 1:
            raise ValueError(
                f"transition must have as many nonzero probabilities in every row, got {self.transition}; with others "
                "take HMMGibbs"
            )
        elif len(columns[0]) > 1:  # probabilities that are zero have no density
            moves = jnp.take_along_axis(prior, jnp.asarray(columns), axis=1)
            laws["moves"], shapes["moves"] = dist.Dirichlet(moves), moves.shape
        laws |= priors
        for site, law in laws.items():
            shape = shapes[site]
            if law.event_shape != shape[len(shape) - law.event_dim :]:
                raise ValueError(f"priors[{site!r}] must be a law of rows of shape {shape}, got {law.event_shape}")

        def joint(ys: Array, features: Array | None, is_seen: Array, lengths: Array) -> None:
            drawn = {}
            for site, law in laws.items():
                batch_shape = shapes[site][: len(shapes[site]) - law.event_dim]
                drawn[site] = numpyro.sample(site, law.expand(batch_shape).to_event(len(batch_shape)))
            if "moves" in drawn:
                moves = drawn.pop("moves")
                rows = jnp.arange(len(columns))[:, None]
                transition = jnp.zeros_like(own["transition"]).at[rows, jnp.asarray(columns)].set(moves)
                drawn["transition"] = numpyro.deterministic("transition", transition)
            given = Observations(ys, features, is_seen, lengths, None)
            numpyro.factor("log_evidence", log_evidence(with_parameters(self, drawn), given))

        return Target.from_numpyro(joint, data.ys, data.features, data.is_seen, data.lengths)


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
