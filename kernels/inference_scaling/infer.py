"""Inference-time scaling: many answers of a generative model, and a score, made into one posterior of answers.

    p(x | prompt) G(x) / Z,    Z = E_p[G(x)]

with p the model's law of answers x = x_{1:T}, and G the product of what a `Potential` makes of the scores. All methods
are given the same budget, counted in tokens that are generated, and are one call.

References:
    Puri et al. (2025), 'A probabilistic inference approach to inference-time scaling of LLMs using particle-based Monte
        Carlo methods', https://arxiv.org/abs/2502.01618.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels.inference_scaling.a_star import AStar
from bayesinf.kernels.inference_scaling.cascade import Cascade
from bayesinf.kernels.inference_scaling.generator import StepGenerator
from bayesinf.kernels.inference_scaling.inference import Inference, last_line
from bayesinf.kernels.inference_scaling.methods import Gibbs, Islands, ParallelTempering, as_runs, run_single
from bayesinf.kernels.inference_scaling.outcome import collect, failure_of, judge
from bayesinf.kernels.inference_scaling.potential import AbstractPotential
from bayesinf.kernels.inference_scaling.selection import (
    DVTS,
    Beam,
    BestOfN,
    Entropic,
    FKSteering,
    Independent,
    Published,
    Resample,
    Selection,
    SoftValue,
)
from bayesinf.kernels.inference_scaling.sweep import run_sweep
from bayesinf.kernels.inference_scaling.text_generator import TextGenerator

__all__ = ["METHODS", "infer", "infer_batch", "named_method", "population_size", "prepare_potential"]

METHODS: dict[str, Callable[[], Any]] = {
    "best_of_n": BestOfN,
    "weighted_best_of_n": Independent,
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
    "cascade": Cascade,
    "a_star": AStar,
}
DEFAULT_PARTICLES = 16
NO_BUDGET = np.iinfo(np.int32).max  # tokens are counted in 32 bits


def infer(
    key: errors.KeyLike,
    generator: Any,
    potential: Any,
    prompt: PyTree = None,
    *,
    method: str | Any = "particle_filter",
    num_particles: int | None = None,
    budget: int | None = None,
    answer: Callable[[str], str] = last_line,
    throw: bool = True,
    **options: Any,
) -> Inference:
    """Answers to a prompt, steered by a potential.

    Args:
        key: PRNG key or seed.
        generator: what writes, a `StepGenerator`, or a `TextGenerator` such as a server.
        potential: what makes an answer good, a `Potential` or a product of several.
        prompt: what the generator's `init` takes.
        method: one of `METHODS`, or an object that says more, such as `selection.Beam(width=8)`, `methods.Gibbs(8)`.
        num_particles: N, of every population. By default as many as the budget allows, or 16 without one.
        budget: tokens that may be generated, by all populations. A step begins only while there are some left.
        answer: of a text, the answer in it; by default what is boxed, or the last line.
        throw: raise where scores are none, or all particles died; else warn.
        **options: `barrier`, `save`, `resume` and `on_event` of `infer_async`, which runs generators of texts, the
            methods "cascade" and "a_star", and whatever has one of these options, on the host.

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
        >>> result.best(), round(result.log_evidence)
        ('bbbbbb', -2)

    References:
        Puri et al. (2025), https://arxiv.org/abs/2502.01618.
    """
    began = time.perf_counter()
    key = errors.as_key(key)
    name, chosen = named_method(method)
    if options or isinstance(generator, TextGenerator) or hasattr(chosen, "start"):
        # that driver makes use of what is below
        from bayesinf.kernels.inference_scaling.async_driver import infer_on_host

        return infer_on_host(
            key, generator, potential, prompt, (name, chosen), num_particles, budget, answer, throw, **options
        )
    generator, potential = prepare_potential(name, chosen, generator, potential)
    num_particles = population_size(generator, chosen, num_particles, budget)
    selection = chosen if isinstance(chosen, Selection) else chosen.selection
    tokens = jnp.asarray(NO_BUDGET if budget is None else min(budget, NO_BUDGET), jnp.int32)
    prompt = generator.encode(prompt)
    if isinstance(chosen, Selection):
        runs = run_single(key, generator, potential, chosen, prompt, num_particles, tokens)
    else:
        runs = chosen.run(key, generator, potential, prompt, num_particles, tokens)
    result = collect(name, selection, runs, generator, prompt, answer, began)
    return judge(result, num_particles, budget, throw)


def infer_batch(
    key: errors.KeyLike,
    generator: StepGenerator,
    potential: AbstractPotential | Sequence[AbstractPotential],
    prompts: Sequence[Any],
    *,
    method: str | Selection = "particle_filter",
    num_particles: int | None = None,
    budget: int | None = None,
    answer: Callable[[str], str] = last_line,
    throw: bool = True,
) -> list[Inference]:
    """`infer` for several prompts in one compiled loop; the i-th result is that of the key fold_in(key, i).

    Args:
        key, generator, method, num_particles, answer, throw: as of `infer`; methods of one population alone.
        potential: one for all prompts, or a list of as many, that differ in the arrays which they hold.
        prompts: as many as are wanted; encoded, they must have one shape.
        budget: of every prompt.

    Returns:
        A list of results. Their wall time is that of all together.

    Raises:
        ValueError: as of `infer`; or prompts or potentials do not stack.
        PotentialError, DegenerateWeightsError: as of `infer`, for the first prompt that failed; `.result` is the list.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.kernels.inference_scaling import DiscreteChain, Potential, infer_batch
        >>> walk = DiscreteChain([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], max_steps=6)
        >>> likes_b = Potential(lambda state: jnp.where(state.last == 1, 0.9, 0.1), kind="step")
        >>> results = infer_batch(0, walk, [likes_b, likes_b**0.0], [None, None], num_particles=200)
        >>> [result.best() for result in results]
        ['bbbbbb', 'aaaaaa']
    """
    began = time.perf_counter()
    key = errors.as_key(key)
    name, method = named_method(method)
    if not isinstance(method, Selection):
        raise ValueError(f"method must be of one population for a batch of prompts, got {name}; call infer for each")
    num_prompts = errors.check_count("len(prompts)", len(prompts))
    potentials = [potential] * num_prompts if isinstance(potential, AbstractPotential) else list(potential)
    if len(potentials) != num_prompts:
        raise ValueError(f"potential must be one, or a list of {num_prompts}, one a prompt, got {len(potentials)}")
    prepared = [prepare_potential(name, method, generator, one) for one in potentials]
    generator = prepared[0][0]
    num_particles = population_size(generator, method, num_particles, budget)
    tokens = jnp.asarray(NO_BUDGET if budget is None else min(budget, NO_BUDGET), jnp.int32)

    encoded = [generator.encode(prompt) for prompt in prompts]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_prompts))
    stacked = (_stack("potential", [one for _, one in prepared]), _stack("prompts", encoded))
    sweeps = _run_batch(keys, generator, stacked[0], method, stacked[1], num_particles, tokens)
    results = []
    for i in range(num_prompts):
        sweep = jax.tree.map(lambda leaf, i=i: leaf[i], sweeps)
        results.append(collect(name, method, as_runs(method, sweep), generator, encoded[i], answer, began))
    judged = [judge(result, num_particles, budget, False) for result in results]
    for result in judged:
        if throw and (error := failure_of(result, num_particles)) is not None:
            raise error[0](f"{error[1]}: throw=False returns what there is.", judged)
    return judged


_run_batch = jax.jit(jax.vmap(run_sweep, in_axes=(0, None, 0, None, 0, None, None)), static_argnames=("num_particles",))


def _stack(name: str, trees: list[Any]) -> Any:
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must have one structure and shape to be run together: {error}") from error


def prepare_potential(name: str, method: Any, generator: Any, potential: Any) -> tuple[Any, AbstractPotential]:
    """The generator and the potential as functions read their surroundings now, and as the method spreads values."""
    generator, potential = current((generator, potential))
    _check(generator, potential)
    if name == "twisted_smc" and not any(factor.kind == "value" for factor in potential.factors):
        raise ValueError("twisted_smc needs a potential with a part of kind='value', the twist; got none")
    selection = method if isinstance(method, Selection) else method.selection
    return generator, selection.prepare(potential)


def named_method(method: Any) -> tuple[str, Any]:
    """The name of a method, and the method."""
    if isinstance(method, tuple):
        return method
    if isinstance(method, str):
        errors.check_choice("method", method, tuple(METHODS))
        return method, METHODS[method]()
    if not isinstance(method, Selection) and not hasattr(method, "selection"):
        raise ValueError(f"method must be a name, a Selection or one of methods, got {type(method).__name__}")
    return type(method).__name__, current(method)


def _check(generator: Any, potential: Any) -> None:
    if not isinstance(generator, StepGenerator | TextGenerator):
        raise ValueError(f"generator must be a StepGenerator or TextGenerator, got {type(generator).__name__}")
    if not isinstance(potential, AbstractPotential):
        cure = "wrap the score: Potential(score, kind=...)"
        raise ValueError(f"potential must be a Potential, got {type(potential).__name__}; {cure}")


def population_size(generator: Any, method: Any, num: int | None, budget: int | None) -> int:
    """N, as asked for or as the budget allows; raises where the two do not go together."""
    per_answer = generator.max_steps * generator.max_tokens_per_step * getattr(method, "num_populations", 1)
    if budget is not None:
        errors.check_count("budget", budget)
        num_at_once = (num or 1) * getattr(method, "num_at_once", 1)
        if budget < generator.max_tokens_per_step * num_at_once:
            raise ValueError(
                f"budget must allow one step of {num_at_once} particles, of up to {generator.max_tokens_per_step} "
                f"tokens each, got {budget}; raise it, or take fewer particles"
            )
    affordable = DEFAULT_PARTICLES if budget is None else max(budget // per_answer, 1)
    width = getattr(method, "width", 1)
    found = max(affordable // width, 1) * width if num is None else num
    if isinstance(method, Selection):
        method.check(found)
    return errors.check_count("num_particles", found)
