"""Conformal PID control: the threshold itself is steered, by the last miss and by the sum of all.

    q_{t+1} = b_{t+1} + r_t( sum_{i<=t} (miss_i - alpha) )
    b_{t+1} = b_t + eta_t (miss_t - alpha)                                               P: follows a quantile
    r_t(x) = K tan( x log(t + 1) / (C (t + 1)) ),   +inf and -inf beyond +-pi / 2        I: stops what has added up

eta_t and K are in units of the range of the scores in the window. Because the set is everything once misses have added
up to (pi / 2) C (t + 1) / log(t + 1) too many, for every sequence of finite scores

    | (1/T) sum_t miss_t - alpha |  <=  ( (pi / 2) C (T + 1) / log(T + 1) + 1 ) / T.

The D of the name, a forecast of the score, needs nothing here: pass the scores minus their forecasts.

References:
    Angelopoulos, Candès and Tibshirani (2023), https://arxiv.org/abs/2307.16895.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.online import Online
from bayesinf.models.conformal.window import Window

__all__ = ["ConformalPID", "ConformalPIDState"]


class ConformalPIDState(NamedTuple):
    """Where the control stands.

    Attributes:
        base: b_t, the followed quantile.
        num_missed: how many scores were missed.
        num_seen: how many there were.
    """

    base: Float[Array, ""]
    num_missed: Int[Array, ""]
    num_seen: Int[Array, ""]


class ConformalPID(Online):
    """Conformal PID control of the threshold.

    Attributes:
        alpha: the share of misses aimed at.
        step_size: of the proportional part, over the range of the window's scores, positive.
        integral_gain: K, over the same range, positive.
        saturation: C, positive; the larger, the later a set is everything or nothing.
        start: b_1, in units of the score; a large score of the past, or the first sets miss until the sum stops it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> scores = jnp.abs(jax.random.normal(jax.random.key(0), (2_000,))) * jnp.linspace(1.0, 5.0, 2_000)
        >>> past, method = scores[:100], conformal.ConformalPID(0.1, start=scores[:100].max())
        >>> found = conformal.run_online(method, scores[100:], past=past)
        >>> round(float(found.coverage), 1), bool(jnp.isfinite(found.thresholds).all())
        (0.9, True)

    References:
        Angelopoulos, Candès and Tibshirani (2023), https://arxiv.org/abs/2307.16895.
    """

    guarantee: ClassVar[Guarantee] = Guarantee(
        "long-run",
        "|mean miss - alpha| <= (pi / 2) saturation (1 + 1 / T) / log(T + 1) + 1 / T",
        "scores are finite",
    )

    alpha: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    step_size: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.02)
    integral_gain: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.1)
    saturation: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.5)
    start: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.0)

    def __check_init__(self):
        errors.check_fraction("alpha", self.alpha)
        for name in ("step_size", "integral_gain", "saturation"):
            errors.check_positive(name, getattr(self, name))

    def init(self) -> ConformalPIDState:
        none = jnp.zeros((), jnp.int32)
        return ConformalPIDState(self.start, none, none)

    def threshold(self, state: ConformalPIDState, window: Window) -> Float[Array, ""]:
        t = state.num_seen
        excess = state.num_missed - self.alpha * t
        angle = excess * jnp.log(t + 1.0) / (self.saturation * (t + 1.0))
        is_within = jnp.abs(angle) < jnp.pi / 2
        push = self.integral_gain * window.spread() * jnp.tan(jnp.where(is_within, angle, 0.0))
        return jnp.where(is_within, state.base + push, jnp.sign(angle) * jnp.inf)

    def step(self, state: ConformalPIDState, score: Real[ArrayLike, ""], window: Window) -> ConformalPIDState:
        is_missed = score > self.threshold(state, window)
        base = state.base + self.step_size * window.spread() * (is_missed - self.alpha)
        return ConformalPIDState(base, state.num_missed + is_missed, state.num_seen + 1)
