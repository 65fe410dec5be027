"""What inference-time scaling found: weighted answers, the evidence, and what it cost."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from bayesinf import errors

__all__ = ["RULES", "Inference", "TokenCount", "last_line", "trace_used"]

RULES = ("weighted_majority", "argmax", "sample")


@dataclasses.dataclass(frozen=True)
class TokenCount:
    """What a run cost, in tokens; the same count for every method.

    What a server generated for a request that was cancelled, or for an attempt that timed out or broke off, it does not
    tell, and it is not counted; `Inference.num_cancelled` is how many were cancelled.

    Attributes:
        generated: in all.
        wasted: of those, in lines that no final answer descends from.
        prompt: read. In process the prompt, once for each population: what was written is never read again. Of a
            server the prompt and the unfinished answer, of every request, as it counts them.
        cached: need not be read, because others had read the same. In process the prompt, of all particles but one.
            Of a server what it found in its cache, and what several samples of one request share.
    """

    generated: int
    wasted: int
    prompt: int
    cached: int


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
    """Weighted answers of one prompt.

    R populations (sweeps, islands, temperatures; one for most methods) of N particles, in T steps at most.

    Attributes:
        method: its name.
        rule: by which `best` chooses unless told otherwise.
        texts: what the R N particles wrote.
        answers: what was asked for, of each; None for those that did not finish.
        log_votes: normalised log weights of the R N texts; -inf for those that did not finish.
        log_rewards: the log of the aggregated scores, shape (R N,).
        is_done: which finished, shape (R N,).
        log_evidence: log E[G_1 ... G_T], the log of the mean weight of an answer of the model; NaN for searches.
        log_evidence_variance: an estimate of its variance; NaN where there is none.
        ess: effective sample sizes of the weights after every step, shape (R, T).
        is_resampled: whether particles were chosen before the step, shape (R, T).
        ancestors: the particle that each continued, shape (R, T, N).
        log_weights: normalised, after every step, shape (R, T, N).
        num_tokens: of every step, shape (R, T, N).
        num_steps: that were taken, shape (R,).
        num_invalid: how many scores were NaN, or out of their range, in all populations that were paid for.
        tokens: what it cost.
        num_calls: of the generator, one for every step of a particle.
        wall_time: in seconds, with compilation.
        status: "complete", or what went wrong.
        failures: why steps could not be had, of every particle that died of it.
        num_cancelled: requests of a speculative run that were cancelled before their reply had come: for those who were
            not chosen. Their tokens are not known, and not in `tokens`.
    """

    method: str
    rule: str
    texts: list[str]
    answers: list[str | None]
    log_votes: Float[np.ndarray, " n"]
    log_rewards: Float[np.ndarray, " n"]
    is_done: Bool[np.ndarray, " n"]
    log_evidence: float
    log_evidence_variance: float
    ess: Float[np.ndarray, "r t"]
    is_resampled: Bool[np.ndarray, "r t"]
    ancestors: Int[np.ndarray, "r t N"]
    log_weights: Float[np.ndarray, "r t N"]
    num_tokens: Int[np.ndarray, "r t N"]
    num_steps: Int[np.ndarray, " r"]
    num_invalid: int
    tokens: TokenCount
    num_calls: int
    wall_time: float
    status: str
    failures: list[str] = dataclasses.field(default_factory=list)
    num_cancelled: int = 0

    @property
    def posterior(self) -> dict[str, float]:
        """The probability of every answer, the most probable first."""
        total: dict[str, float] = {}
        for answer, vote in zip(self.answers, np.exp(self.log_votes), strict=True):
            if answer is not None and vote > 0:
                total[answer] = total.get(answer, 0.0) + float(vote)
        # where votes are equal, the answer that was first written is first
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def num_ancestors(self) -> Int[np.ndarray, "r t"]:
        """How many particles of each step have offspring at the end."""
        return trace_used(self.ancestors, self.num_steps).sum(axis=2)

    def best(self, rule: str | None = None, *, key: errors.KeyLike | None = None) -> str | None:
        """One answer.

        Args:
            rule: "weighted_majority", the answer of the largest total weight; "argmax", that of the text with the
                highest reward among those of positive weight, which over-optimises a noisy score; or "sample", drawn
                by the weights. By default that of the method. Of equals the first is taken.
            key: PRNG key or seed, for "sample".

        Returns:
            The answer, or None where no particle finished with a positive weight.

        Raises:
            ValueError: an unknown rule, or no key to sample with.
        """
        rule = self.rule if rule is None else rule
        errors.check_choice("rule", rule, RULES)
        if rule == "argmax":
            # what has died may have been scored highly afterwards
            alive = np.flatnonzero(self.is_done & np.isfinite(self.log_votes))
            rewards = np.where(np.isnan(self.log_rewards), -np.inf, self.log_rewards)[alive]
            return self.answers[alive[np.argmax(rewards)]] if alive.size else None
        posterior = self.posterior
        if not posterior:
            return None
        if rule == "weighted_majority":
            return next(iter(posterior))
        if key is None:
            raise ValueError("rule='sample' needs a key, got None; pass key=0 or a jax.random.key")
        probs = np.array(list(posterior.values()))
        return list(posterior)[int(jax.random.categorical(errors.as_key(key), jnp.log(probs)))]

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON, written to a file if one is named; `from_json` reads it.

        JSON has no infinity and no NaN: numbers that are not finite are null. Read back, null is -inf in the logs of
        votes, weights and rewards, which all mean no weight, and NaN elsewhere.
        """
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        text = json.dumps(fields, allow_nan=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, text: str | Path) -> "Inference":
        """The result that `to_json` wrote: its text, or the path of the file."""
        raw = json.loads(text.read_text() if isinstance(text, Path) else text)
        raw["tokens"] = TokenCount(**raw["tokens"])
        num_runs = len(raw["num_steps"])
        for name, dtype in _ARRAYS.items():
            raw[name] = np.array(raw[name], dtype)
            if not raw[name].size and name in _OF_STEPS:
                raw[name] = raw[name].reshape(num_runs, 0, *_OF_STEPS[name] * [len(raw["texts"]) // num_runs])
            if name.startswith("log_"):
                raw[name] = np.where(np.isnan(raw[name]), -np.inf, raw[name])
        for name in ("log_evidence", "log_evidence_variance"):
            raw[name] = np.nan if raw[name] is None else raw[name]
        return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw})

    def to_datatree(self) -> xr.DataTree:
        """Two groups: `answers`, over the particles, and `steps`, over runs, steps and particles."""
        answers = xr.Dataset(
            {
                "text": ("particle", np.array(self.texts, dtype=object)),
                "answer": ("particle", np.array(["" if a is None else a for a in self.answers], dtype=object)),
                "log_vote": ("particle", self.log_votes),
                "log_reward": ("particle", self.log_rewards),
                "is_done": ("particle", self.is_done),
            },
            attrs={name: getattr(self, name) for name in _OF_RUN} | dataclasses.asdict(self.tokens),
        )
        each, all_of = ("run", "step", "slot"), ("run", "step")
        steps = xr.Dataset(
            {
                "ess": (all_of, self.ess),
                "is_resampled": (all_of, self.is_resampled),
                "num_ancestors": (all_of, self.num_ancestors),
                "ancestors": (each, self.ancestors),
                "log_weights": (each, self.log_weights),
                "num_tokens": (each, self.num_tokens),
            }
        )
        return xr.DataTree.from_dict({"answers": answers, "steps": steps})

    def plot_genealogy(self, run: int = 0, ax: Any = None) -> Any:
        """The lines of descent of one population: those that reach the end dark, those that died light.

        Args:
            run: which population.
            ax: matplotlib axes; made if None.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(7, 3.5))[1] if ax is None else ax
        used = trace_used(self.ancestors, self.num_steps)[run]
        num = self.ancestors.shape[2]
        for t in range(int(self.num_steps[run])):
            for i in range(num):
                parent = self.ancestors[run, t, i]
                style = {"color": "C0", "lw": 1.2} if used[t, i] else {"color": "0.8", "lw": 0.6}
                ax.plot([t, t + 1], [parent, i], zorder=2 if used[t, i] else 1, **style)
            size = 60 * np.exp(self.log_weights[run, t]) * num / max(num / 8, 1)
            ax.scatter(np.full(num, t + 1), np.arange(num), s=size, color="C1", zorder=3)
        ax.set(xlabel="step", ylabel="particle", title=f"{self.method}: lines of descent, and weights")
        return ax


def trace_used(ancestors: Int[np.ndarray, "r t N"], num_steps: Int[np.ndarray, " r"]) -> Bool[np.ndarray, "r t N"]:
    """Which particles of each step have offspring at the last one."""
    used = np.zeros(ancestors.shape, bool)
    for run, last in enumerate(num_steps):
        alive = np.ones(ancestors.shape[2], bool)
        for t in range(int(last) - 1, -1, -1):
            used[run, t] = alive
            parents = ancestors[run, t][alive]
            alive = np.zeros_like(alive)
            alive[parents] = True
    return used


def last_line(text: str) -> str:
    r"""The answer in a text: what is in its last \boxed{...}, else its last line that is not empty.

    Example:
        >>> from bayesinf.kernels.inference_scaling import last_line
        >>> last_line("3 + 4 = 7\nso it is \\boxed{7}."), last_line("3 + 4\n= 7\n")
        ('7', '= 7')
    """
    start = text.rfind(r"\boxed{")
    if start >= 0:
        depth, begin = 1, start + len(r"\boxed{")
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


_ARRAYS: dict[str, type] = {
    "log_votes": float,
    "log_rewards": float,
    "is_done": bool,
    "ess": float,
    "is_resampled": bool,
    "ancestors": int,
    "log_weights": float,
    "num_tokens": int,
    "num_steps": int,
}
_OF_RUN = ("method", "log_evidence", "log_evidence_variance", "status", "num_calls", "num_cancelled", "num_invalid")
# how many axes come after those of populations and steps; in JSON those of an array without steps are lost
_OF_STEPS = {"ess": 0, "is_resampled": 0, "ancestors": 1, "log_weights": 1, "num_tokens": 1}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
