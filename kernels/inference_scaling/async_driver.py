"""Inference-time scaling with a generator that is elsewhere: the driver on the host.

The methods, the numbers and the result are those of `infer`. What differs is that steps are waited for: many requests
are under way at once, some fail, the run may be stopped and gone on with, and it need not wait at every step:

    barrier        all have their step before anyone is chosen
    speculative    who has a score begins the next step at once, while the budget is sure to last; what is not chosen is
                   wasted if it has come, else cancelled, and then what a server wrote of it is in no count of tokens
    cascade        nobody waits: the particle cascade, whose evidence is unbiased

Requests that fail cost their particles alone; a server is asked for those of a failed request one by one. A share of
failures that does not depend on what would have been written makes the evidence too small by it, and leaves the
posterior of the answers as it is.
"""

import asyncio
import contextlib
import dataclasses
import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bayesinf import errors
from bayesinf.kernels.inference_scaling.a_star import AStar
from bayesinf.kernels.inference_scaling.cascade import Cascade
from bayesinf.kernels.inference_scaling.generator import StepGenerator
from bayesinf.kernels.inference_scaling.infer import NO_BUDGET, named_method, population_size, prepare_potential
from bayesinf.kernels.inference_scaling.inference import Inference, TokenCount, last_line
from bayesinf.kernels.inference_scaling.outcome import collect, judge
from bayesinf.kernels.inference_scaling.potential import AbstractPotential, Potential
from bayesinf.kernels.inference_scaling.run_file import RunFile, read_run
from bayesinf.kernels.inference_scaling.run_requests import OutageError, RunRequests, ScoreError
from bayesinf.kernels.inference_scaling.selection import Resample, Selection
from bayesinf.kernels.inference_scaling.text_generator import TextGenerator, as_text_generator
from bayesinf.kernels.inference_scaling.text_methods import check_method, collect_runs, run_text_method
from bayesinf.kernels.inference_scaling.text_sweep import TextSweep

__all__ = ["Event", "infer_async", "infer_on_host"]

BARRIERS = ("barrier", "speculative", "cascade")


class Event(NamedTuple):
    """What happened in a run: one more step.

    Attributes:
        name: of the population.
        num_steps: that it has taken; of methods without populations, of all answers.
        num_done: finished answers.
        num_tokens: that it has generated.
        num_failures: particles that failed requests have cost, in all.
        partial: a function that gives the Inference of the run so far.
    """

    name: str
    num_steps: int
    num_done: int
    num_tokens: int
    num_failures: int
    partial: Callable[[], Inference]


async def infer_async(
    key: errors.KeyLike,
    generator: TextGenerator | StepGenerator,
    potential: AbstractPotential,
    prompt: Any = None,
    *,
    method: str | Any = "particle_filter",
    num_particles: int | None = None,
    budget: int | None = None,
    barrier: str = "barrier",
    answer: Callable[[str], str] = last_line,
    throw: bool = True,
    save: str | Path | None = None,
    resume: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Inference:
    """`infer`, as a coroutine; cancelling it ends what is under way.

    Args:
        key: PRNG key or seed.
        generator: of texts; one that runs in process is taken as one.
        potential: what makes an answer good. Its score is called as score(prompt, texts) and returns as many numbers,
            or is a coroutine that does; each text is scored once. A score that blocks holds everything up.
        prompt: what is asked.
        method: as of `infer`; also "cascade" and "a_star", and their objects.
        num_particles: N, of every population.
        budget: tokens that may be generated. A step begins only while there are some left.
        barrier: "barrier", "speculative" or "cascade".
        answer: of a text, the answer in it.
        throw: raise where scores are none, all particles died, or nobody answers; else warn.
        save: a file that is written after every step, as JSON.
        resume: such a file, from which the run goes on; it is saved there too unless `save` says otherwise. The other
            arguments are those of the run that was saved; of the potential, the scores may be others.
        on_event: called after every step.

    Returns:
        The answers, their weights, and what they cost; `failures` says of what requests particles died.

    Raises:
        ValueError: an argument that does not fit, or an empty prompt.
        GenerationError: no request was answered; `.result` is the Inference until then, and `save` can be resumed.
        PotentialError: scores were NaN or out of range, or the score raised.
        DegenerateWeightsError: all particles died.
        CheckpointError: `resume` is of another run, or damaged.

    Example:
        >>> import asyncio
        >>> from bayesinf.kernels.inference_scaling import DiscreteChain, Potential, infer_async
        >>> walk = DiscreteChain([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], max_steps=6)
        >>> likes_b = Potential(lambda state: 0.1 + 0.8 * (state.last == 1), kind="step")
        >>> result = asyncio.run(infer_async(0, walk, likes_b, num_particles=100, barrier="speculative"))
        >>> result.best()
        'bbbbbb'

    References:
        Puri et al. (2025), https://arxiv.org/abs/2502.01618.
        Paige, Wood, Doucet, Teh (2014), https://arxiv.org/abs/1407.2864.
    """
    options = {"barrier": barrier, "save": save, "resume": resume, "on_event": on_event}
    run = _HostRun(key, generator, potential, prompt, method, num_particles, budget, answer, throw, **options)
    await run.run()
    return run.judged()


def infer_on_host(*args: Any, **options: Any) -> Inference:
    """`infer_async` from code that is not asynchronous, in an event loop of its own: it runs in notebooks too.

    Ctrl-C ends the requests and returns what there is; in a coroutine, so does its cancellation, which the coroutine
    then meets where it next waits.
    """
    run = _HostRun(*args, **options)
    loop_of: list[Any] = []
    failed: list[BaseException] = []
    has_loop, has_ended = threading.Event(), threading.Event()

    async def body() -> None:
        loop_of.append((asyncio.get_running_loop(), asyncio.current_task()))
        has_loop.set()
        await run.run()

    def work() -> None:
        try:
            asyncio.run(body())
        except BaseException as error:
            failed.append(error)
        finally:
            has_loop.set()
            has_ended.set()

    # in a running loop asyncio may take Ctrl-C for itself, and only ask the task for its end that waits here
    caller = _running_task()
    num_cancelled = 0 if caller is None else caller.cancelling()
    thread = threading.Thread(target=work, name="bayesinf-infer", daemon=True)
    thread.start()
    try:
        while not has_ended.wait(0.05):  # not Thread.join: a signal in it makes Python 3.11 take the thread for ended
            if caller is not None and caller.cancelling() > num_cancelled:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        has_loop.wait()
        for loop, task in loop_of:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the run has ended
                loop.call_soon_threadsafe(task.cancel)
        has_ended.wait()
        thread.join()
        if not run.has_begun:
            raise
        message = "interrupted"
        warnings.warn(f"{message}; the result is what there was", errors.SamplingWarning, stacklevel=3)
        return run.partial(message)
    if failed:
        raise failed[0]
    return run.judged()


def _running_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return None


class _HostRun:
    """One call of `infer_async`."""

    def __init__(
        self,
        key: errors.KeyLike,
        generator: Any,
        potential: AbstractPotential,
        prompt: Any,
        method: Any,
        num_particles: int | None,
        budget: int | None,
        answer: Callable[[str], str],
        throw: bool,
        *,
        barrier: str = "barrier",
        save: str | Path | None = None,
        resume: str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
    ):
        self.began = time.perf_counter()
        self.key = errors.as_key(key)
        errors.check_choice("barrier", barrier, BARRIERS)
        self.name, self.method = named_method(method)
        if barrier == "cascade" and not isinstance(self.method, Cascade):
            if not isinstance(self.method, Resample):
                raise ValueError(f"barrier='cascade' is a particle filter of its own, and not for method={self.name!r}")
            self.name, self.method = "cascade", Cascade()
        if barrier == "speculative" and hasattr(self.method, "start"):
            raise ValueError(
                f"barrier='speculative' is for methods with a barrier, got method={self.name!r}; leave it out"
            )
        generator, potential = prepare_potential(self.name, self.method, generator, potential)
        if isinstance(generator, StepGenerator):
            generator = as_text_generator(generator, prompt)
        generator.check(prompt)
        if isinstance(self.method, AStar) and num_particles is None:
            num_particles = self.method.width
        self.num = population_size(generator, self.method, num_particles, budget)
        check_method(self.method, self.num)
        self.generator, self.potential, self.prompt = generator, potential, prompt
        self.budget, self.answer, self.throw, self.barrier = budget, answer, throw, barrier
        self.requests = RunRequests(generator, potential, prompt)
        self.requests.on_step = self._after_step
        self.on_event = on_event
        self.sweeps: dict[str, TextSweep] = {}
        self.tree: Any = None
        self.outcome: tuple[type[errors.BayesinfError], str] | None = None
        self.file = self._open_file(save, resume)

    async def run(self) -> None:
        """Runs the method; what ended it before its time is kept for `judged`."""
        tokens = int(NO_BUDGET) if self.budget is None else self.budget
        try:
            async with self.generator.session():
                if hasattr(self.method, "start"):
                    self.tree = self.method.start(self.key, self.requests, self.potential, self.num, tokens)
                    await self.tree.run()
                else:
                    await run_text_method(self.key, self.method, self._make_sweep, self.potential, tokens)
        except OutageError as error:
            self.outcome = (
                errors.GenerationError,
                f"all requests of a step failed, and nobody is left; the last: {error}",
            )
        except ScoreError as error:
            self.outcome = (errors.PotentialError, str(error))
        finally:
            await self.requests.close()

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to return."""
        return bool(self.sweeps) or self.tree is not None

    def partial(self, status: str = "unfinished") -> Inference:
        """What there is."""
        runs = collect_runs(self.method, self.sweeps) if self.tree is None else self.tree.runs()
        result = collect(self.name, self.method_selection, runs, self.generator, self.prompt, self.answer, self.began)
        if self.tree is not None:
            kept = slice(self.tree.tree.num_answers)
            names = ("texts", "answers", "log_votes", "log_rewards", "is_done")
            result = dataclasses.replace(result, **{name: getattr(result, name)[kept] for name in names})
        ex, counted = self.requests, result.tokens
        tokens = TokenCount(
            counted.generated + ex.num_unused_tokens,
            counted.wasted + ex.num_unused_tokens,
            ex.num_prompt_tokens,
            ex.num_cached_tokens,
        )
        num_calls = result.num_calls + ex.num_unused_calls
        return dataclasses.replace(
            result,
            tokens=tokens,
            num_calls=num_calls,
            failures=list(ex.failures),
            num_cancelled=ex.num_cancelled,
            status=status,
        )

    def judged(self) -> Inference:
        """The result; raises, or warns, where it should not be trusted."""
        if self.outcome is not None:
            kind, message = self.outcome
            if self.throw:
                raise kind(f"{message}; .result is what there was before", self.partial(message))
            warnings.warn(message, errors.SamplingWarning, stacklevel=3)
            return self.partial(message)
        result = judge(self.partial("complete"), self.num, self.budget, self.throw)
        if result.failures and result.status == "complete":
            message = f"{len(result.failures)} particles died of requests that failed, the last: {result.failures[-1]}"
            warnings.warn(message, errors.SamplingWarning, stacklevel=3)
            result = dataclasses.replace(result, status=message)
        return result

    @property
    def method_selection(self) -> Selection:
        return self.method if isinstance(self.method, Selection) else self.method.selection

    def _make_sweep(
        self, name: str, key: Any, potential: Any, selection: Any, budget: int, reference: Any = None
    ) -> TextSweep:
        is_speculative = self.barrier == "speculative"
        sweep = TextSweep(
            key,
            self.requests,
            potential,
            selection,
            self.num,
            budget,
            is_speculative=is_speculative,
            reference=reference,
        )
        self.sweeps[name] = self.file.restore(name, sweep)
        return self.sweeps[name]

    def _after_step(self, population: Any) -> None:
        names = [name for name, sweep in self.sweeps.items() if sweep is population]
        self.file.write(self.sweeps, set(names))
        if self.on_event is None:
            return
        if names:
            steps, done = population.t, int(np.sum(np.asarray(population.population.is_done) & ~population.is_failed))
            name, num_tokens = names[0], population.num_tokens
        else:
            nodes, name, num_tokens = population.tree.nodes, self.name, population.tree.num_tokens
            steps, done = len(nodes), sum(node.is_done and not node.is_failed for node in nodes)
        self.on_event(Event(name, steps, done, num_tokens, len(self.requests.failures), self.partial))

    def _open_file(self, save: Any, resume: Any) -> RunFile:
        if (save or resume) and hasattr(self.method, "start"):
            raise ValueError(
                f"save and resume are for methods with a barrier, got method={self.name!r}; leave them out"
            )
        leaves, structure = jax.tree.flatten(self.method)
        identity = {
            "method": [self.name, _nameless(str(structure)), [np.asarray(leaf).tolist() for leaf in leaves]],
            "num_particles": self.num,
            "budget": self.budget,
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "prompt": _nameless(repr(self.prompt)),
            "barrier": self.barrier,
            "generator": self.generator.fingerprint(),
            "potential": [_described(factor) for factor in self.potential.factors],
        }
        saved = None if resume is None else read_run(Path(resume), identity)
        path = save if save is not None else resume
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"save must lie in a folder that exists, got {str(path)!r}; make its folder first")
        return RunFile(None if path is None else Path(path), identity, self.requests, saved)


def _nameless(text: str) -> str:
    """Without the addresses of objects, which are others in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _described(factor: Potential) -> dict[str, Any]:
    """What a score means; the score itself, which may be anything, has no name that outlives the process."""
    static = {name: getattr(factor, name) for name in ("kind", "aggregate", "spread", "is_log")}
    return static | {"exponent": float(factor.exponent)}
