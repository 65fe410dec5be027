"""Stopping a computation early, with a promise about the long run: prompts come one by one, and nothing is assumed.

A model could stop after any of its layers, samples or reasoning steps. Before each it has a confidence c in [0, 1], and
stops where c >= lambda. What this loses, l_t in [0, 1], such as 1 where the early answer is worse than the full one, is
known of the prompts that are audited, by doing the rest of the work after all: each with probability p, whatever the
prompt. With A_t whether it was,

    lambda_{t+1} = max( 0, lambda_t + gamma (A_t l_t / p - alpha) )

Above 1 no confidence is enough, nothing is stopped and nothing lost, so lambda never exceeds 1 + gamma (1 / p - alpha),
and for every sequence of prompts, even of an adversary who knows lambda,

    E (1/T) sum_t l_t  <=  alpha + (1 + gamma (1 / p - alpha) - lambda_1) / (gamma T)

without the expectation where all are audited. Were lambda kept within [0, 1], full confidence would stop whatever has
happened, and nothing be promised. `risk_threshold` chooses lambda once, from calibration prompts that must be
exchangeable with those to come.

References:
    Feldman, Ringel, Bates and Romano (2023), https://arxiv.org/abs/2205.09095 (online control of a risk).
    Gibbs and Candès (2021), https://arxiv.org/abs/2106.00170.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee

__all__ = ["EarlyStopping", "EarlyStoppingState"]


class EarlyStoppingState(NamedTuple):
    """Where the level stands.

    Attributes:
        level: lambda, the confidence that is enough; above 1 none is.
        num_audited: of how many prompts the loss was seen.
        total_loss: the sum of these losses.
    """

    level: Float[Array, ""]
    num_audited: Int[Array, ""]
    total_loss: Float[Array, ""]


class EarlyStopping(eqx.Module):
    """How sure a computation must be to stop, learnt online.

    Attributes:
        alpha: the mean loss that is allowed, in (0, 1).
        gamma: how far the level moves, positive.
        audit_rate: p, the probability with which a loss is looked at, in (0, 1]. Draw it for each prompt apart.
        start: lambda_1 in [0, 1]; 1 stops only where the confidence is full.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> stopping = conformal.EarlyStopping(0.1, gamma=0.05)
        >>> state, num_steps = stopping.init(), []
        >>> for _ in range(200):                       # right from the fourth of eight steps on, at a confidence of 0.5
        ...     confidence = jnp.arange(1, 9) / 8
        ...     stop = int(stopping.stop(state, confidence))
        ...     state = stopping.step(state, 1.0 * (stop < 3))
        ...     num_steps.append(stop + 1)
        >>> num_steps[0], round(sum(num_steps[100:]) / 100, 1), round(float(state.total_loss / 200), 2)
        (8, 3.9, 0.04)

    References:
        Feldman, Ringel, Bates and Romano (2023), https://arxiv.org/abs/2205.09095.
    """

    guarantee: ClassVar[Guarantee] = Guarantee(
        "long-run",
        "E[mean loss] <= alpha + (1 + gamma (1 / audit_rate - alpha) - start) / (gamma T)",
        "losses are in [0, 1], none where nothing is stopped, and audits are drawn independently of all else",
    )

    alpha: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    gamma: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.02)
    audit_rate: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=1.0)
    start: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=1.0)

    def __check_init__(self):
        errors.check_fraction("alpha", self.alpha)
        errors.check_positive("gamma", self.gamma)
        errors.check_positive("audit_rate", self.audit_rate)
        errors.check_nonnegative("start", self.start)
        for name, value in (("audit_rate", self.audit_rate), ("start", self.start)):
            if errors.is_concrete(value) and bool(jnp.any(jnp.asarray(value) > 1)):
                raise ValueError(f"{name} must be at most 1, got {value}")

    def init(self) -> EarlyStoppingState:
        """What is known before the first prompt."""
        level = jnp.asarray(self.start, float)
        return EarlyStoppingState(level, jnp.zeros((), jnp.int32), jnp.zeros_like(level))

    def is_enough(self, state: EarlyStoppingState, confidence: Real[Array, "*l"] | float) -> Bool[Array, "*l"]:
        """Whether to stop at this confidence, which is in [0, 1]."""
        return jnp.asarray(confidence) >= state.level

    def stop(self, state: EarlyStoppingState, confidence: Real[Array, " l"]) -> Int[Array, ""]:
        """Where a prompt stops whose confidence before each of L steps is known: the last step if it never does."""
        is_enough = self.is_enough(state, confidence)
        return jnp.where(jnp.any(is_enough), jnp.argmax(is_enough), confidence.shape[0] - 1)

    def step(self, state: EarlyStoppingState, loss: Real[Array, ""] | float) -> EarlyStoppingState:
        """What is known after a prompt.

        Args:
            state: before it.
            loss: in [0, 1]; 0 where the computation went to its end, known without an audit; NaN where the prompt was
                stopped and not audited.
        """
        loss = jnp.asarray(loss, state.level.dtype)
        is_audited = ~jnp.isnan(loss)
        seen = jnp.where(is_audited, loss, 0.0)
        level = jnp.maximum(state.level + self.gamma * (seen / self.audit_rate - self.alpha), 0.0)
        return EarlyStoppingState(
            level.astype(state.level.dtype), state.num_audited + is_audited, state.total_loss + seen
        )
