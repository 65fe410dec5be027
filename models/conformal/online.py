"""Sets for a series, one step at a time, with a promise about the long run for every sequence of scores.

At time t the set is {y : s_t(y) <= q_t}, q_t from the scores of the past; then s_t is seen, and the method learns
whether it missed. Nothing is assumed of the scores: not exchangeable, not stationary, not even random. What is promised
in return is the share of misses over time, not the chance of one at a given time.

A method is a pytree with three pure functions, for a loop of one's own; `run_online` is that loop.

    init() -> state,    threshold(state, window) -> q_t,    step(state, score, window) -> state
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.window import Window, fill

__all__ = ["Online", "OnlineSets", "run_online"]


class Online(eqx.Module):
    """A method that learns its thresholds online. `threshold` and `step` are given the scores before time t."""

    guarantee: ClassVar[Guarantee]

    @abc.abstractmethod
    def init(self) -> PyTree:
        """What is known before the first score."""

    @abc.abstractmethod
    def threshold(self, state: PyTree, window: Window) -> Float[Array, ""]:
        """The set at time t is {y : s_t(y) <= threshold}: +inf is all, -inf is nothing."""

    @abc.abstractmethod
    def step(self, state: PyTree, score: Float[Array, ""], window: Window) -> PyTree:
        """What is known after s_t."""


class OnlineSets(eqx.Module):
    """What an online method did over a series.

    Attributes:
        thresholds: q_t, shape (T,); +inf and -inf where the sets were everything and nothing.
        is_covered: whether s_t <= q_t; False where the score is missing.
        is_observed: whether there was a score.
        states: of the method before each score, with a leading axis of time.
        state, window: after the last, to go on from.
        guarantee: what is promised.
    """

    thresholds: Float[Array, " t"]
    is_covered: Bool[Array, " t"]
    is_observed: Bool[Array, " t"]
    states: PyTree
    state: PyTree
    window: Window
    guarantee: Guarantee = eqx.field(static=True)

    @property
    def coverage(self) -> Float[Array, ""]:
        """The share of observed scores that were covered."""
        return jnp.sum(self.is_covered) / jnp.sum(self.is_observed)


def run_online(
    method: Online,
    scores: Float[Array, " t"],
    *,
    window: int = 200,
    past: Float[Array, " s"] | None = None,
    after: OnlineSets | None = None,
) -> OnlineSets:
    """An online method over a whole series of scores, in one compiled loop.

    Args:
        method: `ACI`, `AgACI`, `DtACI`, `ConformalPID`.
        scores: s_t of what was observed, larger where stranger, shape (T,); where NaN nothing is learnt.
        window: of how many past scores thresholds are made.
        past: scores from before, of calibration, of which the last `window` are used; without them the first sets are
            infinite.
        after: what was found for the series up to here, by the same method; it replaces `window` and `past`.

    Returns:
        OnlineSets.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> scores = jnp.abs(jax.random.normal(jax.random.key(0), (2_000,))) * jnp.linspace(1.0, 5.0, 2_000)
        >>> found = conformal.run_online(conformal.ACI(0.1, gamma=0.02), scores, window=100)
        >>> round(float(found.coverage), 2)
        0.9
        >>> print(found.guarantee)
        long-run: |mean miss - alpha| <= (max(alpha, 1 - alpha) + gamma) / (gamma T), if nothing
    """
    size = errors.check_count("window", window)
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (T,), got {scores.shape}; vmap for several series")
    if after is not None:
        return _run(method, scores, (after.state, after.window))
    past = jnp.zeros(0, scores.dtype) if past is None else past[-size:].astype(scores.dtype)
    return _run(method, scores, (method.init(), fill(past, size)))


@jax.jit
def _run(method: Online, scores: Array, start: tuple[PyTree, Window]) -> OnlineSets:
    def step(carry: tuple[PyTree, Window], score: Array) -> tuple[tuple[PyTree, Window], tuple]:
        state, window = carry
        threshold = method.threshold(state, window)
        learnt = method.step(state, score, window)
        is_observed = ~jnp.isnan(score)
        after = jax.tree.map(lambda old, new: jnp.where(is_observed, new, old), state, learnt)
        return (after, window.push(score)), (threshold, score <= threshold, is_observed, state)

    (state, window), (thresholds, is_covered, is_observed, states) = jax.lax.scan(step, start, scores)
    return OnlineSets(thresholds, is_covered, is_observed, states, state, window, method.guarantee)
