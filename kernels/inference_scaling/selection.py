"""How the methods differ: which unfinished answers go on, and how often.

Every method runs the same loop: choose who goes on, generate a step of each, score, weigh. They choose

    Independent      everyone goes on                                        majority, weighted best of n
    BestOfN          everyone goes on                                        best of n, by the highest reward
    Resample         by W_t where few particles hold the weight              the particle filter, twisted or not
    FKSteering       the same, of values, spread over the steps as asked     FK steering
    Entropic         by W_t^{1/tau}, tau > 1 while early and uneven          entropic annealing, with weights corrected
    Published        by odds^{1/tau} of the last score, the finished too     Puri et al.'s code, as it is
    Beam             the N / M best, M times each
    DVTS             the best of each of N / M groups of M
    SoftValue        one of each group of M, by reward^{1/alpha}             SVDD

Where ancestors are drawn by weights, and carry on what those leave, or nobody is chosen at all, the evidence is
unbiased and the weighted answers follow the posterior as N grows. The others are searches: they have no evidence.

References:
    Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    Giannone et al. (2025), https://arxiv.org/abs/2510.05825 (entropic).
    Snell et al. (2024), https://arxiv.org/abs/2408.03314; Beeching et al. (2024), 'Scaling test-time compute with open
        models' (beam search and diverse verifier tree search).
    Li et al. (2024), https://arxiv.org/abs/2408.08252 (SVDD).
"""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors, resampling, weights
from bayesinf.kernels.filter_steps import check_threshold, choose_ancestors
from bayesinf.kernels.inference_scaling.population import Population, keep_places
from bayesinf.kernels.inference_scaling.potential import SPREADS, AbstractPotential, log_odds, with_spread

__all__ = [
    "DVTS",
    "Beam",
    "BestOfN",
    "Entropic",
    "FKSteering",
    "Independent",
    "Published",
    "Resample",
    "Selection",
    "SoftValue",
    "equal_weights",
]

Choice = tuple[Int[Array, " N"], Float[Array, " N"], Bool[Array, ""]]


class Selection(eqx.Module):
    """The contract of a selection.

    Attributes:
        has_evidence: whether log Zhat estimates the evidence.
        rule: by which the best answer is chosen, unless another is asked for.
    """

    has_evidence: ClassVar[bool] = False
    rule: ClassVar[str] = "weighted_majority"

    @abstractmethod
    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        """Who goes on at step t >= 1: ancestors, the log weights that they start from, whether anyone was chosen."""

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        """The log weights of the finished answers, normalised."""
        return population.log_weights

    def describe(self, state: PyTree) -> Float[Array, "N f"] | None:
        """Features of the generator's particles, by which they are compared; None where they are not."""
        return None

    def prepare(self, potential: AbstractPotential) -> AbstractPotential:
        """The potential as this method spreads it over the steps."""
        return potential

    def check(self, num_particles: int) -> None:
        """Raises if so many particles do not fit."""
        errors.check_count("num_particles", num_particles)


class Independent(Selection):
    """Everyone goes on: N independent answers.

    Votes are of answers of the model: where they were drawn from a proposal, each counts p / q times. The evidence is
    that of importance sampling, the mean of p / q G.

    Attributes:
        votes: what the answers weigh: "reward" their scores, "equal" all the same. Static.
    """

    votes: str = eqx.field(static=True, default="reward")
    has_evidence = True

    def __check_init__(self):
        errors.check_choice("votes", self.votes, ("reward", "equal"))

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        own = jnp.arange(population.log_weights.shape[0], dtype=jnp.int32)
        return own, population.log_weights, jnp.zeros((), bool)

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        log_votes = population.log_ratio + (_alive_reward(population) if self.votes == "reward" else 0.0)
        return weights.normalize(log_votes)[0]


class BestOfN(Independent):
    """N independent answers, of which the one with the highest reward is the best."""

    rule = "argmax"


class Resample(Selection):
    """Sequential Monte Carlo: ancestors are drawn by their weights.

    Attributes:
        ess_threshold: the share of N that the effective sample size must fall to.
        every: only before every so many steps. Static.
        scheme: of resampling; only of "multinomial" the variance of the evidence is known. Static.
    """

    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"), default=0.5)
    every: int = eqx.field(static=True, default=1)
    scheme: str = eqx.field(static=True, default="multinomial")
    has_evidence = True

    def __check_init__(self):
        check_threshold(self.ess_threshold)
        errors.check_count("every", self.every)
        errors.check_choice("scheme", self.scheme, tuple(resampling.SCHEMES))

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        threshold = jnp.where(t % self.every == 0, self.ess_threshold, 0.0)
        ancestors, log_carried, is_resampled = choose_ancestors(
            key, population.log_weights, ess_threshold=threshold, resampling=self.scheme
        )
        # all that are drawn by W start from equal weights, whatever their order
        return keep_places(ancestors), log_carried, is_resampled


class FKSteering(Selection):
    """Feynman-Kac steering: values r_t, spread over the steps as asked, and resampling now and then.

    Differences, the default of `Potential`, make it the particle filter of values, which follows p r_t at every step:
    best where r_t is a fair guess of r_T. "max" and "sum" weigh a value at every later step again, and the last step
    takes it back: what that leaves grows thin with the steps. Where values are noise, and bounded so that the largest
    soon stays the same, "max" heeds the noise least, and is nearer to the posterior. In the paper only those steps are
    weighed before which there is resampling: let the generator's steps be these, by `DiffusionGenerator(substeps=...)`.

    Attributes:
        ess_threshold: the share of N that the effective sample size must fall to; 1 resamples always.
        spread: "difference", "max" or "sum", whatever the `Potential` says; None leaves it as that says. Static.
        every: resample before every so many steps; all of them are weighed. Static.

    References:
        Singhal et al. (2025), https://arxiv.org/abs/2501.06848.
    """

    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"), default=0.5)
    spread: str | None = eqx.field(static=True, default=None)
    every: int = eqx.field(static=True, default=1)
    has_evidence = True

    def __check_init__(self):
        check_threshold(self.ess_threshold)
        if self.spread is not None:
            errors.check_choice("spread", self.spread, SPREADS)
        errors.check_count("every", self.every)

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        return Resample(self.ess_threshold, self.every).choose(key, population, t, max_steps)

    def prepare(self, potential: AbstractPotential) -> AbstractPotential:
        if not any(factor.kind == "value" for factor in potential.factors):
            raise ValueError("potential must have a part of kind='value' for fk_steering, which spreads it; got none")
        return potential if self.spread is None else with_spread(potential, self.spread)


class Entropic(Selection):
    """Ancestors are drawn by W^{1/tau} and carry W^{1 - 1/tau}: fewer die early on, and the evidence stays unbiased.

        tau = max(1, (N / ess)(1 - t / T))  where ess <= ess_threshold N and t / T < 1/2, else 1

    The published method starts all from equal weights, which changes what is sampled.

    Attributes:
        ess_threshold: the share of N below which weights count as uneven.
        scheme: of resampling; only of "multinomial" the variance of the evidence is known. Static.
    """

    ess_threshold: Float[Array, ""] = eqx.field(converter=errors.as_array("ess_threshold"), default=0.5)
    scheme: str = eqx.field(static=True, default="multinomial")
    has_evidence = True

    def __check_init__(self):
        check_threshold(self.ess_threshold)
        errors.check_choice("scheme", self.scheme, tuple(resampling.SCHEMES))

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        num = population.log_weights.shape[0]
        ess = weights.ess(population.log_weights)
        progress = t / max_steps
        tau = jnp.where(progress < 0.5, jnp.maximum(1.0, (num / jnp.maximum(ess, 1.0)) * (1.0 - progress)), 1.0)
        is_dead = jnp.isneginf(population.log_weights)
        # W^{1/tau} as the weights W with a lookahead W^{1/tau - 1}
        log_lookahead = jnp.where(is_dead, 0.0, (1.0 / tau - 1.0) * jnp.where(is_dead, 0.0, population.log_weights))
        is_uneven = ess <= self.ess_threshold * num
        ancestors, log_carried, is_resampled = choose_ancestors(
            key,
            population.log_weights,
            ess_threshold=jnp.where(is_uneven, 1.0, 0.0),
            resampling=self.scheme,
            log_lookahead=log_lookahead,
        )
        # what an offspring starts from is its ancestor's alone, and goes with it to another place
        kept = keep_places(ancestors)
        return kept, log_carried.at[ancestors].set(log_carried)[kept], is_resampled


class Published(Selection):
    """The filter of Puri et al. as their code has it: odds of the last score, at every step, for finished answers too.

    An answer that is short is weighed again at every step that others need: of two with the same prior and reward,
    of 2 and of 8 steps, the short one gets 0.992 of the weight. For comparison; use `Resample`.

    Attributes:
        temperature: tau, of the odds.
    """

    temperature: Float[Array, ""] = eqx.field(converter=errors.as_array("temperature", is_floating=True), default=1.0)
    rule = "argmax"

    def __check_init__(self):
        errors.check_positive_scalar("temperature", self.temperature)

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        logits = self._log_odds(population) / self.temperature
        ancestors = resampling.resample(key, logits, logits.shape[0], "multinomial")
        ancestors = keep_places(ancestors)
        return ancestors, equal_weights(population, ancestors), jnp.ones((), bool)

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        return weights.normalize(self._log_odds(population) / self.temperature)[0]

    def _log_odds(self, population: Population) -> Array:
        return jnp.where(_is_dead(population), -jnp.inf, log_odds(population.log_reward))


class Beam(Selection):
    """The N / M best go on, each in M copies; those that have finished are kept once, and leave room to the others.

    Attributes:
        width: M, which divides N. Static.
    """

    width: int = eqx.field(static=True, default=4)
    rule = "argmax"

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        num = population.log_weights.shape[0]
        num_kept = num // self.width
        reward = _alive_reward(population)
        kept = jnp.argsort(-reward, stable=True)[:num_kept].astype(jnp.int32)
        is_done = population.is_done[kept]
        # the finished first, one place each; the unfinished take turns in the others
        kept = kept[jnp.argsort(~is_done, stable=True)]
        num_done = jnp.sum(is_done)
        num_open = num_kept - num_done
        place = jnp.arange(num)
        turn = num_done + (place - num_done) % jnp.maximum(num_open, 1)
        index = jnp.where((place < num_done) | (num_open == 0), place % num_kept, turn)
        ancestors = keep_places(kept[index])
        return ancestors, equal_weights(population, ancestors), jnp.ones((), bool)

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        return weights.normalize(_alive_reward(population))[0]

    def check(self, num_particles: int) -> None:
        _check_groups(num_particles, "width", self.width)


class DVTS(Selection):
    """Diverse verifier tree search: N / M groups of M, of which the best child alone goes on, in M copies.

    Attributes:
        width: M, which divides N. Static.
    """

    width: int = eqx.field(static=True, default=4)

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        reward = _alive_reward(population).reshape(-1, self.width)
        best = jnp.argmax(reward, axis=1)
        ancestors = _whole_groups(best, self.width)
        return ancestors, equal_weights(population, ancestors), jnp.ones((), bool)

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        return weights.normalize(_alive_reward(population))[0]

    def check(self, num_particles: int) -> None:
        _check_groups(num_particles, "width", self.width)


class SoftValue(Selection):
    """Soft value-based decoding (SVDD): of each group's M children one goes on, drawn by reward^{1/alpha}.

    The groups do not meet: this is nested importance sampling, of N / M answers, and its bias stays as N / M grows.

    Attributes:
        alpha: the temperature; 0 takes the best, as the released code does.
        width: M, which divides N. Static.
    """

    alpha: Float[Array, ""] = eqx.field(converter=errors.as_array("alpha", is_floating=True), default=1.0)
    width: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        errors.check_nonnegative("alpha", self.alpha)

    def choose(self, key: Key[Array, ""], population: Population, t: Int[Array, ""], max_steps: int) -> Choice:
        logits = self._logits(population)
        drawn = jax.random.categorical(key, logits, axis=1)
        best = jnp.where(self.alpha > 0, drawn, jnp.argmax(logits, axis=1))
        ancestors = _whole_groups(best, self.width)
        return ancestors, equal_weights(population, ancestors), jnp.ones((), bool)

    def log_votes(self, population: Population) -> Float[Array, " N"]:
        logits = self._logits(population)
        of_best = jnp.where(jnp.arange(self.width) == jnp.argmax(logits, 1)[:, None], 0.0, -jnp.inf)
        log_votes = jnp.where(self.alpha > 0, weights.normalize(logits)[0], of_best)
        return (log_votes - jnp.log(logits.shape[0])).reshape(-1)

    def check(self, num_particles: int) -> None:
        _check_groups(num_particles, "width", self.width)

    def _logits(self, population: Population) -> Array:
        reward = _alive_reward(population).reshape(-1, self.width)
        return reward / jnp.where(self.alpha > 0, self.alpha, 1.0)


def _alive_reward(population: Population) -> Array:
    """The log rewards; of what has died, whatever it was scored afterwards, -inf."""
    return jnp.where(_is_dead(population), -jnp.inf, population.log_reward)


def _is_dead(population: Population) -> Array:
    return jnp.isneginf(population.log_weights) | jnp.isnan(population.log_reward)


def equal_weights(population: Population, ancestors: Int[Array, " N"]) -> Array:
    """Equal log weights of those that continue these ancestors; what was dead stays dead."""
    is_dead = jnp.isneginf(population.log_weights[ancestors])
    return jnp.where(is_dead, -jnp.inf, -jnp.log(ancestors.shape[0]))


def _whole_groups(best: Int[Array, " g"], width: int) -> Int[Array, " N"]:
    """The index of the best of each group, in all the places of the group."""
    first = jnp.arange(best.shape[0]) * width
    return jnp.repeat((first + best).astype(jnp.int32), width)


def _check_groups(num_particles: int, name: str, width: int) -> None:
    errors.check_count(name, width)
    errors.check_count("num_particles", num_particles, minimum=width)
    if num_particles % width:
        raise ValueError(f"num_particles must be a multiple of {name}={width}, got {num_particles}")
