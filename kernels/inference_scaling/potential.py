"""What a score of an unfinished answer means, and the weight that follows from it.

A score r_t says something of the first t steps of an answer. Particles of x_{1:t} target p(x_{1:t}) G_1 ... G_t with

    step        r_t = P(step t is right), in [0, 1]            G_t = r_t: the answer is right if all its steps are
    value       r_t > 0 guesses the final reward r_T           G_t = r_t / r_{t-1}, r_0 = 1: the product is r_T
    terminal    r_T >= 0 rewards the complete answer           G_t = 1 before the end, and r_T there
    odds        r_t in [0, 1], of the whole answer so far      G_t = r_t / (1 - r_t), as published by Puri et al.

More than one score may make the reward: A_t is the product, least, or last one of r_1 ... r_t (`aggregate`), and is in
the weights, not in the ranking alone:

    step, value     G_t = A_t / A_{t-1}, A_0 = 1    terminal    G_T = A_T    the product is A_T; odds are of r_t alone

With the product for steps and the last score for the others, the defaults, these are the weights above. Steps with the
last score telescope: they are values.

A finished answer gets no further weight. That is what the user must say, and cannot be guessed from numbers: telescoped
probabilities of steps forget all steps but the last, products of values count the early ones many times over, and odds
target the product of all odds, not the final reward.

The reward by which complete answers are ranked is A_T, of odds too.

References:
    Puri et al. (2025), https://arxiv.org/abs/2502.01618 (odds, and the aggregates).
    Zhao et al. (2024), https://arxiv.org/abs/2404.17546 (values as twists).
    Singhal et al. (2025), https://arxiv.org/abs/2501.06848 (difference, max and sum).
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree

__all__ = [
    "AbstractPotential",
    "Potential",
    "PotentialProduct",
    "PotentialState",
    "log_odds",
    "with_spread",
    "without_scores",
]

# what G_t is made of by default: the aggregate A_t of the scores up to t
AGGREGATES = {"step": "prod", "value": "last", "terminal": "last", "odds": "last"}
MEANINGS = (
    "'step' (the probability that the last step is right), 'value' (a guess of the final reward), 'terminal' (the "
    "reward of a finished answer) or 'odds' (the probability that all so far is right)"
)
SPREADS = ("difference", "max", "sum")
# odds of a certain answer are infinite; the published code clips scores too
SMALLEST_DOUBT = 1e-6


class PotentialState(NamedTuple):
    """What a potential remembers of each particle.

    Attributes:
        log_aggregate: log A_t, of the scores so far; 0 before the first.
        log_spent: the sum of log G so far.
        log_spread: the largest, or the sum, of log A_s so far, for values that are spread in this way.
    """

    log_aggregate: Float[Array, " N"]
    log_spent: Float[Array, " N"]
    log_spread: Float[Array, " N"]


class AbstractPotential(eqx.Module):
    """One potential or a product of several; `a * b` multiplies their weights, `a ** beta` raises them to a power."""

    @property
    @abstractmethod
    def factors(self) -> tuple["Potential", ...]:
        """The potentials of which this is the product."""

    def __mul__(self, other: "AbstractPotential") -> "PotentialProduct":
        if not isinstance(other, AbstractPotential):
            raise TypeError(f"a potential is multiplied by another one, got {type(other).__name__}; wrap it: Potential")
        return PotentialProduct(self.factors + other.factors)

    @abstractmethod
    def __pow__(self, exponent: Float[Array, ""] | float) -> "AbstractPotential":
        """The potential whose log weights are `exponent` times these."""

    def start(self, num_particles: int) -> tuple[PotentialState, ...]:
        """The memory before the first step."""
        zeros = jnp.zeros(num_particles)
        lowest = jnp.full(num_particles, -jnp.inf)
        return tuple(PotentialState(zeros, zeros, lowest if f.spread == "max" else zeros) for f in self.factors)

    def scores(self, state: PyTree) -> tuple[Float[Array, " N"], ...]:
        """The scores of the generator's particles, of every factor."""
        return tuple(factor.log_scores(factor.score(state)) for factor in self.factors)

    def weigh(
        self,
        states: tuple[PotentialState, ...],
        log_scores: tuple[Float[Array, " N"], ...],
        was_done: Bool[Array, " N"],
        is_done: Bool[Array, " N"],
    ) -> tuple[tuple[PotentialState, ...], Float[Array, " N"]]:
        """Log G_t of every particle, 0 for those that had finished before, and what is to be remembered.

        Args:
            states: what was remembered of the parents.
            log_scores: as from `scores`; NaN where a score is none.
            was_done: which particles had finished before this step.
            is_done: which have now.

        Returns:
            (states, log_weights); NaN where a score is.
        """
        results = [
            factor.weigh_one(state, log_score, was_done, is_done)
            for factor, state, log_score in zip(self.factors, states, log_scores, strict=True)
        ]
        return tuple(state for state, _ in results), sum((log_g for _, log_g in results), jnp.zeros(was_done.shape))

    def log_reward(self, states: tuple[PotentialState, ...]) -> Float[Array, " N"]:
        """The log of the product of the aggregated scores, by which answers are ranked."""
        parts = [factor.raised(state.log_aggregate) for factor, state in zip(self.factors, states, strict=True)]
        return sum(parts[1:], parts[0])


class Potential(AbstractPotential):
    """A score of unfinished answers, and what it means.

    Attributes:
        score: a function of the generator's state to scores of shape (N,); of a generator of texts, a function of the
            prompt and a list of texts to as many numbers, which may be a coroutine.
        exponent: beta, to which the potential is raised.
        kind: "step", "value", "terminal" or "odds"; there is no default. Static. A value of 0 is the end of a particle,
            whatever the final reward would have been.
        aggregate: how the scores of an answer become one reward A: "prod", "min", "last", or "model", for which a
            scorer of texts is shown the whole answer as a single step. By default the product for steps, else the last
            one. The posterior is p A / Z with it, but for odds, where it is for the ranking alone. Static.
        spread: how a value is spread over the steps. Static.
            "difference": G_t = r_t / r_{t-1}. "max": G_t = max_{s <= t} r_s, "sum": G_t = r_1 ... r_t, and at the end
            what makes the product of all r_T; both push harder, early on. By the largest a value of 0 kills at the
            first step and at the last alone.
        is_log: whether scores are logarithms, such as beta times a reward of any sign. Static.

    Raises:
        ValueError: no kind, an unknown kind, aggregate or spread, or one that does not go with the kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import Potential
        >>> verifier = Potential(lambda state: state["p_right"], kind="step")
        >>> short = Potential(lambda state: -0.1 * state["length"], kind="value", is_log=True)
        >>> both = verifier * short**2.0
        >>> state = {"p_right": jnp.array([0.5]), "length": jnp.array([4.0])}
        >>> is_not, is_done = jnp.array([False]), jnp.array([True])
        >>> states, log_g = both.weigh(both.start(1), both.scores(state), is_not, is_done)
        >>> round(float(log_g[0]), 4)                                               # log 0.5 - 2 * 0.4
        -1.4931

    References:
        Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    """

    score: Callable[..., Any] = eqx.field(converter=as_pytree)
    kind: str = eqx.field(static=True, default="")  # none: without one there is an error that says what there is
    aggregate: str | None = eqx.field(static=True, default=None)
    spread: str = eqx.field(static=True, default="difference", kw_only=True)
    is_log: bool = eqx.field(static=True, default=False, kw_only=True)
    exponent: Float[Array, ""] = eqx.field(
        converter=errors.as_array("exponent", is_floating=True), default=1.0, kw_only=True
    )

    def __check_init__(self):
        if not callable(self.score):
            raise ValueError(f"score must be a function of the generator's state, got {type(self.score).__name__}")
        if not self.kind:
            raise ValueError(f"kind must say what the score means, got none; take {MEANINGS}")
        errors.check_choice("kind", self.kind, tuple(AGGREGATES))
        if self.aggregate is not None:
            errors.check_choice("aggregate", self.aggregate, ("prod", "min", "last", "model"))
        errors.check_choice("spread", self.spread, SPREADS)
        if self.spread != "difference" and self.kind != "value":
            raise ValueError(f"spread={self.spread!r} is for values, got kind={self.kind!r}; leave it out")
        errors.check_nonnegative("exponent", self.exponent)

    @property
    def factors(self) -> tuple["Potential", ...]:
        return (self,)

    def __pow__(self, exponent: Float[Array, ""] | float) -> "Potential":
        errors.check_nonnegative("exponent", exponent)
        return eqx.tree_at(lambda p: p.exponent, self, self.exponent * exponent)

    def log_scores(self, scores: Any) -> Float[Array, " N"]:
        """The logs of scores; NaN where a score is out of its range."""
        scores = jnp.asarray(scores, float)
        upper = 1.0 if self.kind in ("step", "odds") else jnp.inf
        if self.is_log:
            # odds and steps are probabilities, and their logs at most 0; a value may be anything but +inf
            is_score = (scores <= 0.0) if upper == 1.0 else (scores < jnp.inf)
            return jnp.where(is_score, scores, jnp.nan)
        is_score = (scores >= 0.0) & (scores <= upper) & (scores < jnp.inf)
        return jnp.log(jnp.where(is_score, scores, jnp.nan))

    def weigh_one(
        self,
        state: PotentialState,
        log_score: Float[Array, " N"],
        was_done: Bool[Array, " N"],
        is_done: Bool[Array, " N"],
    ) -> tuple[PotentialState, Float[Array, " N"]]:
        """`weigh` of this potential alone."""
        aggregate = self.aggregate or AGGREGATES[self.kind]
        before = state.log_aggregate
        after = {"prod": before + log_score, "min": jnp.minimum(before, log_score)}.get(aggregate, log_score)
        spread = state.log_spread

        if self.kind == "odds":
            log_g = log_odds(log_score)
        elif self.kind == "terminal":
            log_g = jnp.where(is_done, after, 0.0)
        elif self.spread == "difference":
            # what was once impossible is dead, and -inf less -inf is not a number
            log_g = after - jnp.where(jnp.isneginf(before), 0.0, before)
        else:
            spread = jnp.maximum(spread, after) if self.spread == "max" else spread + after
            log_g = jnp.where(is_done, after - state.log_spent, spread)

        log_g = jnp.where(was_done, 0.0, log_g)
        state = PotentialState(
            jnp.where(was_done, before, after),
            state.log_spent + log_g,
            jnp.where(was_done, state.log_spread, spread),
        )
        return state, self.raised(log_g)

    def raised(self, log_values: Float[Array, " N"]) -> Float[Array, " N"]:
        """Times the exponent; anything to the power of 0, zero too, is 1."""
        return jnp.where(self.exponent == 0.0, 0.0, self.exponent * log_values)


class PotentialProduct(AbstractPotential):
    """The product of several potentials.

    Attributes:
        parts: the potentials.
    """

    parts: tuple[Potential, ...]

    @property
    def factors(self) -> tuple[Potential, ...]:
        return self.parts

    def __pow__(self, exponent: Float[Array, ""] | float) -> "PotentialProduct":
        return PotentialProduct(tuple(part**exponent for part in self.parts))


def log_odds(log_score: Float[Array, " N"]) -> Float[Array, " N"]:
    """Log r / (1 - r) of scores that are clipped, as published, away from 0 and 1."""
    log_score = jnp.clip(log_score, jnp.log(SMALLEST_DOUBT), jnp.log1p(-SMALLEST_DOUBT))
    return log_score - jnp.log(-jnp.expm1(log_score))


def with_spread(potential: AbstractPotential, spread: str) -> AbstractPotential:
    """The potential with the values in it spread over the steps in another way."""
    parts = tuple(dataclasses.replace(f, spread=spread) if f.kind == "value" else f for f in potential.factors)
    return parts[0] if isinstance(potential, Potential) else PotentialProduct(parts)


def without_scores(potential: AbstractPotential) -> AbstractPotential:
    """The potential with nothing to score by, for compiled functions that are given the scores."""
    parts = tuple(dataclasses.replace(f, score=_no_score) for f in potential.factors)
    return parts[0] if isinstance(potential, Potential) else PotentialProduct(parts)


def _no_score(state: PyTree) -> Array:
    raise NotImplementedError("the scores of this potential are computed elsewhere")
