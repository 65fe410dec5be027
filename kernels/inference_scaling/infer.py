"""Inference-time scaling: many answers of a generative model, and a score, made into one posterior of answers.

    p(x | prompt) G(x) / Z,    Z = E_p[G(x)]

with p the model's law of answers x = x_{1:T}, and G the product of what a `Potential` makes of the scores. All methods
are given the same budget, counted in tokens that are generated, and are one call.

References:
    Puri et al. (2025), 'A probabilistic inference approach to inference-time scaling of LLMs using particle-based Monte
        Carlo methods', https://arxiv.org/abs/2502.01618.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels.inference_scaling.generator import StepGenerator
from bayesinf.kernels.inference_scaling.inference import Inference, TokenCount, last_line, trace_used
from bayesinf.kernels.inference_scaling.methods import Gibbs, Islands, ParallelTempering, Runs, run_single
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.selection import (
    DVTS,
    Beam,
    Entropic,
    FKSteering,
    Independent,
    Published,
    Resample,
    Selection,
    SoftValue,
)

__all__ = ["METHODS", "infer"]

METHODS: dict[str, Callable[[], Any]] = {
    "best_of_n": lambda: Independent("reward"),
    "weighted_best_of_n": lambda: Independent("reward"),
    "majority": lambda: Independent("equal"),
    "beam": Beam,
    "dvts": DVTS,
    "particle_filter": Resample,
    "particle_filter_published": Published,
    "entropic": Entropic,
    "twisted_smc": Resample,
    "particle_gibbs": Gibbs,
    "parallel_tempering": ParallelTempering,
    "islands": Islands,
    "svdd": SoftValue,
    "fk_steering": FKSteering,
}
DEFAULT_PARTICLES = 16
NO_BUDGET = np.iinfo(np.int32).max


def infer(
    key: errors.KeyLike,
    generator: StepGenerator,
    potential: AbstractPotential,
    prompt: PyTree = None,
    *,
    method: str | Any = "particle_filter",
    num_particles: int | None = None,
    budget: int | None = None,
    answer: Callable[[str], str] = last_line,
    throw: bool = True,
) -> Inference:
    """Answers to a prompt, steered by a potential.

    Args:
        key: PRNG key or seed.
        generator: what writes.
        potential: what makes an answer good.
        prompt: what the generator's `init` takes.
        method: one of `METHODS`, or an object that says more, such as `selection.Beam(width=8)`, `methods.Gibbs(8)`.
        num_particles: N, of every population. By default as many as the budget allows, or 16 without one.
        budget: tokens that may be generated, by all populations. A step begins only while there are some left.
        answer: of a text, the answer in it; by default what is boxed, or the last line.
        throw: raise where scores are none, or all particles died; else warn.

    Returns:
        The answers, their weights, and what they cost.

    Raises:
        ValueError: an unknown method, a number of particles that does not go with it, a budget below one step.
        PotentialError: scores were NaN or out of range; `.result` is the Inference, where they weigh zero.
        DegenerateWeightsError: all particles died; `.result` is the Inference until then.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.kernels.inference_scaling import Potential, DiscreteChain
        >>> walk = DiscreteChain([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], max_steps=6)         # six letters of "ab"
        >>> likes_b = Potential(lambda state: jnp.where(state.last == 1, 0.9, 0.1), kind="step")
        >>> result = bi.kernels.infer(0, walk, likes_b, num_particles=200)
        >>> result.best(), round(result.log_evidence, 1)
        ('bbbbbb', -2.3)

    References:
        Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    """
    began = time.perf_counter()
    key = errors.as_key(key)
    name, method = _named(method)
    generator, potential = current((generator, potential))
    _check(generator, potential)
    selection = method if isinstance(method, Selection) else method.selection
    potential = selection.prepare(potential)
    if name == "twisted_smc" and not any(factor.kind == "value" for factor in potential.factors):
        raise ValueError("twisted_smc needs a potential with a part of kind='value', the twist; got none")
    num_populations = getattr(method, "num_populations", 1)
    num_particles = _population_size(generator, method, num_populations, num_particles, budget)
    tokens = jnp.asarray(NO_BUDGET if budget is None else budget, jnp.int32)
    prompt = generator.encode(prompt)

    arguments = (generator, potential, prompt, num_particles, tokens)
    if isinstance(method, Selection):
        runs = run_single(key, generator, potential, method, prompt, num_particles, tokens)
    else:
        runs = method.run(key, *arguments)
    result = _collect(name, selection, runs, generator, prompt, answer, began)
    return _judge(result, num_particles, budget, throw)


def _named(method: Any) -> tuple[str, Any]:
    if isinstance(method, str):
        errors.check_choice("method", method, tuple(METHODS))
        return method, METHODS[method]()
    if not isinstance(method, Selection) and not (hasattr(method, "run") and hasattr(method, "selection")):
        raise ValueError(f"method must be a name, a Selection, or have run and selection, got {type(method).__name__}")
    return type(method).__name__, method


def _check(generator: Any, potential: Any) -> None:
    if not isinstance(generator, StepGenerator):
        raise ValueError(f"generator must be a StepGenerator, got {type(generator).__name__}")
    if not isinstance(potential, AbstractPotential):
        cure = "wrap the score: Potential(score, kind=...)"
        raise ValueError(f"potential must be a Potential, got {type(potential).__name__}; {cure}")


def _population_size(generator: Any, method: Any, num_populations: int, num: int | None, budget: int | None) -> int:
    per_answer = generator.max_steps * generator.max_tokens_per_step
    if budget is not None:
        errors.check_count("budget", budget)
        num_at_once = (num or 1) * getattr(method, "num_at_once", 1)
        if budget < generator.max_tokens_per_step * num_at_once:
            raise ValueError(
                f"budget must allow one step of {num_at_once} particles, of up to {generator.max_tokens_per_step} "
                f"tokens each, got {budget}; raise it, or take fewer particles"
            )
    if num is None:
        num = DEFAULT_PARTICLES if budget is None else max(budget // (per_answer * num_populations), 1)
        width = getattr(method, "width", 1)
        num = max(num // width, 1) * width
    if isinstance(method, Selection):
        method.check(num)
    return errors.check_count("num_particles", num)


def _collect(
    name: str, selection: Selection, runs: Runs, generator: Any, prompt: Any, answer: Callable, began: float
) -> Inference:
    """The result, on the host."""
    sweeps = runs.sweeps
    host = jax.device_get([(s.population, s.records, s.num_steps) for s in sweeps])
    longest = max(int(num_steps) for _, _, num_steps in host)
    texts = [text for s in sweeps for text in generator.decode(s.state)]
    is_done = np.concatenate([np.asarray(population.is_done) for population, _, _ in host])
    log_votes = np.concatenate(
        [np.asarray(selection.log_votes(s.population)) + w for s, w in zip(sweeps, runs.log_run_weights, strict=True)]
    ).astype(float)
    log_votes = np.where(is_done, log_votes, -np.inf)
    with np.errstate(divide="ignore"):
        log_votes = log_votes - np.logaddexp.reduce(log_votes) if np.any(np.isfinite(log_votes)) else log_votes

    def stacked(field: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(records, field))[:longest] for _, records, _ in host])

    num_steps = np.array([int(n) for _, _, n in host])
    num_tokens, ancestors = stacked("num_tokens"), stacked("ancestors")
    used = trace_used(ancestors, num_steps)
    in_others = [np.asarray(s.records.num_tokens) for s in runs.others]
    generated = int(num_tokens.sum()) + sum(int(n.sum()) for n in in_others)
    length = generator.num_prompt_tokens(prompt)
    num_runs = len(sweeps) + len(runs.others)
    num = ancestors.shape[2]
    return Inference(
        method=name,
        rule="argmax" if name == "best_of_n" else selection.rule,
        texts=texts,
        answers=[answer(text) if done else None for text, done in zip(texts, is_done, strict=True)],
        log_votes=log_votes,
        log_rewards=np.concatenate([np.asarray(p.log_reward) for p, _, _ in host]).astype(float),
        is_done=is_done,
        log_evidence=runs.log_evidence,
        log_evidence_variance=runs.log_evidence_variance,
        ess=stacked("ess"),
        is_resampled=stacked("is_resampled"),
        ancestors=ancestors,
        log_weights=stacked("log_weights"),
        num_tokens=num_tokens,
        num_steps=num_steps,
        num_invalid=int(stacked("num_invalid").sum()),
        tokens=TokenCount(
            generated, generated - int(num_tokens[used].sum()), length * num_runs, length * num_runs * (num - 1)
        ),
        num_calls=int((num_tokens > 0).sum()) + sum(int((n > 0).sum()) for n in in_others),
        wall_time=time.perf_counter() - began,
        status="complete",
    )


def _judge(result: Inference, num_particles: int, budget: int | None, throw: bool) -> Inference:
    """The result with its status; raises, or warns, where it should not be trusted."""
    error: type[errors.BayesinfError] | None = None
    message = ""
    # populations end at different steps, and rows after the last are no weights
    ends = [rows[last - 1] for rows, last in zip(result.log_weights, result.num_steps, strict=True) if last > 0]
    if ends and not np.any(np.isfinite(ends)):
        error = errors.DegenerateWeightsError
        step = int(result.num_steps.max())
        message = (
            f"All {num_particles} particles died at step {step}: every score of a step was zero, or none. Take more "
            "particles, a softer potential (potential ** 0.5), or look at the scores of result.texts"
        )
    elif result.num_invalid:
        error = errors.PotentialError
        message = (
            f"{result.num_invalid} scores were NaN or out of the range of their kind, and weighed zero; return "
            "probabilities for kind 'step' and 'odds', values >= 0 for the others, or logs with is_log=True"
        )
    if error is not None:
        result = dataclasses.replace(result, status=message)
        if throw:
            raise error(f"{message}: throw=False returns what there is.", result)
        warnings.warn(message, errors.SamplingWarning, stacklevel=3)
        return result
    num_open = int(np.sum(~result.is_done))
    if num_open:
        message = f"the budget of {budget} tokens was spent with {num_open} of {len(result.texts)} answers unfinished"
        result = dataclasses.replace(result, status=message)
        warnings.warn(f"{message}; they have no weight", errors.SamplingWarning, stacklevel=3)
    return result
