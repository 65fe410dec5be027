"""From the arrays of a run to its result, on the host; and whether the result can be trusted."""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bayesinf import errors
from bayesinf.kernels.inference_scaling.inference import Inference, TokenCount, trace_used
from bayesinf.kernels.inference_scaling.methods import Runs
from bayesinf.kernels.inference_scaling.selection import Selection

__all__ = ["collect", "failure_of", "judge"]


def collect(
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
        rule=selection.rule,
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
        # of others too: the evidence is that of a burn-in sweep, and what counts went on from hot chains' answers
        num_invalid=sum(int(np.asarray(s.records.num_invalid).sum()) for s in (*sweeps, *runs.others)),
        tokens=TokenCount(
            generated, generated - int(num_tokens[used].sum()), length * num_runs, length * num_runs * (num - 1)
        ),
        num_calls=int((num_tokens > 0).sum()) + sum(int((n > 0).sum()) for n in in_others),
        wall_time=time.perf_counter() - began,
        status="complete",
    )


def judge(result: Inference, num_particles: int, budget: int | None, throw: bool) -> Inference:
    """The result with its status; raises, or warns, where it should not be trusted."""
    failure = failure_of(result, num_particles)
    if failure is not None:
        error, message = failure
        result = dataclasses.replace(result, status=message)
        if throw:
            raise error(f"{message}: throw=False returns what there is.", result)
        warnings.warn(message, errors.SamplingWarning, stacklevel=3)
        return result
    num_open = int(np.sum(~result.is_done))
    # what is unfinished for another reason, such as a request that failed, is told by who knows it
    if num_open and budget is not None and result.tokens.generated >= budget:
        message = f"the budget of {budget} tokens was spent with {num_open} of {len(result.texts)} answers unfinished"
        result = dataclasses.replace(result, status=message)
        warnings.warn(f"{message}; they have no weight", errors.SamplingWarning, stacklevel=3)
    return result


def failure_of(result: Inference, num_particles: int) -> tuple[type[errors.BayesinfError], str] | None:
    """What was wrong, and the error that says so."""
    # populations end at different steps, and rows after the last are no weights
    ends = result.log_weights[np.arange(len(result.num_steps)), result.num_steps - 1]
    if not np.any(np.isfinite(ends)):
        return errors.DegenerateWeightsError, (
            f"All {num_particles} particles died at step {int(result.num_steps.max())}: every score of a step was zero "
            "or none. Take more particles, a softer potential (potential ** 0.5), or look at the scores of result.texts"
        )
    if result.num_invalid:
        return errors.PotentialError, (
            f"{result.num_invalid} scores were NaN or out of the range of their kind, and weighed zero; return "
            "probabilities for kind 'step' and 'odds', values >= 0 for the others, or logs with is_log=True"
        )
    return None
