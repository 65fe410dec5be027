"""Adaptive conformal inference: the level is raised after a hit and lowered after a miss.

    alpha_{t+1} = alpha_t + gamma (alpha - miss_t),        miss_t = 1{ s_t > q(alpha_t) },   q the conformal quantile

The level is not confined to [0, 1]. At alpha_t <= 0 the set is everything and cannot miss, at alpha_t >= 1 it is empty
and cannot hit: that is what keeps alpha_t within gamma of [0, 1], and so, summing the recursion, for every sequence of
scores

    | (1/T) sum_t miss_t - alpha |  <=  (max(alpha, 1 - alpha) + gamma) / (gamma T).

Levels or sets that are clipped to something finite lose this. A small gamma follows slowly, a large one makes sets
jump; AgACI and DtACI run one such recursion for each of several gammas, and weigh their levels by the pinball loss

    l_t(a) = alpha (p_t - a) - min(0, p_t - a),        p_t the p-value of s_t: a misses where p_t <= a

of which the long-run minimiser is the level that misses as often as it should.

References:
    Gibbs and Candès (2021), https://arxiv.org/abs/2106.00170 (ACI).
    Zaffran, Dieuleveut, Féron, Goude and Josse (2022), https://arxiv.org/abs/2202.07282 (AgACI).
    Gibbs and Candès (2024), https://arxiv.org/abs/2208.08401 (DtACI).
    Wintenberger (2017), doi:10.1007/s10994-016-5592-6 (Bernstein online aggregation).
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.online import Online
from bayesinf.models.conformal.window import Window

__all__ = ["ACI", "ACIState", "AgACI", "AgACIState", "DtACI", "DtACIState", "aci"]

GAMMAS = tuple(0.001 * 2.0**power for power in range(8))


class ACIState(NamedTuple):
    """The level of the next set; below 0 and above 1 it may be."""

    level: Float[Array, ""]


class ACI(Online):
    """Adaptive conformal inference, also by the name of `aci`.

    Attributes:
        alpha: the share of misses aimed at, and the first level.
        gamma: how much a level moves, positive; about 0.005 to 0.05.

    Example:
        >>> from bayesinf.models import conformal
        >>> method, window = conformal.ACI(0.5, gamma=0.25), conformal.Window.empty(2)
        >>> state = method.init()
        >>> for score in (3.0, 1.0, 2.0):
        ...     print(float(state.level), float(method.threshold(state, window)))
        ...     state, window = method.step(state, score, window), window.push(score)
        0.5 inf
        0.625 3.0
        0.75 1.0

    References:
        Gibbs and Candès (2021), https://arxiv.org/abs/2106.00170.
    """

    guarantee: ClassVar[Guarantee] = Guarantee(
        "long-run", "|mean miss - alpha| <= (max(alpha, 1 - alpha) + gamma) / (gamma T)", "nothing"
    )

    alpha: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    gamma: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.01)

    def __check_init__(self):
        errors.check_fraction("alpha", self.alpha)
        errors.check_positive("gamma", self.gamma)

    def init(self) -> ACIState:
        return ACIState(self.alpha)

    def threshold(self, state: ACIState, window: Window) -> Float[Array, ""]:
        return window.threshold(state.level)

    def step(self, state: ACIState, score: Real[ArrayLike, ""], window: Window) -> ACIState:
        is_missed = score > self.threshold(state, window)
        return ACIState(state.level + self.gamma * (self.alpha - is_missed))


aci = ACI


class AgACIState(NamedTuple):
    """The levels of the next set, one for each gamma, and how they have done.

    Attributes:
        levels: shape (g,).
        log_weights: normalised, shape (g,).
        regrets: the sums of what each would have saved, corrected to second order.
        squares: the sums of the squares of it.
        largest: the largest of it.
    """

    levels: Float[Array, " g"]
    log_weights: Float[Array, " g"]
    regrets: Float[Array, " g"]
    squares: Float[Array, " g"]
    largest: Float[Array, " g"]


class AgACI(Online):
    """ACI of several gammas, their levels averaged by Bernstein online aggregation.

    The original averages the ends of intervals, after infinite ones are replaced by large numbers; here the levels are
    averaged, which are finite always. How the shares adapt has nothing to be tuned.

    Attributes:
        alpha: the share of misses aimed at, and the first level.
        gammas: of which the levels are averaged, shape (g,).

    References:
        Zaffran, Dieuleveut, Féron, Goude and Josse (2022), https://arxiv.org/abs/2202.07282.
    """

    guarantee: ClassVar[Guarantee] = Guarantee(
        "long-run",
        "mean pinball loss of the levels is that of the best gamma + O(sqrt(log log T / T)); none of the coverage",
        "nothing",
    )

    alpha: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    gammas: Float[Array, " g"] = eqx.field(converter=jnp.asarray, default=GAMMAS)

    def __check_init__(self):
        _check(self.alpha, self.gammas)

    def init(self) -> AgACIState:
        none = jnp.zeros_like(self.gammas)
        return AgACIState(*_start(self.alpha, self.gammas), none, none, none)

    def threshold(self, state: AgACIState, window: Window) -> Float[Array, ""]:
        return window.threshold(_mean(state))

    def step(self, state: AgACIState, score: Real[ArrayLike, ""], window: Window) -> AgACIState:
        p = window.p_value(score)
        mean = _mean(state)
        slope = jnp.where(p <= mean, 1.0 - self.alpha, -self.alpha)  # of the loss, at the level that was used
        saved = slope * (mean - state.levels)
        largest = jnp.maximum(state.largest, jnp.abs(saved))
        squares = state.squares + saved**2
        rate = _rate(largest, squares)
        correction = jnp.where(rate * saved > 0.5, largest, 0.0)
        regrets = state.regrets + jnp.where(
            jnp.any(rate * saved > 0.5),
            0.5 * (saved - rate * saved**2 + correction),
            saved - rate * saved**2,
        )
        log_weights = jax.nn.log_softmax(jnp.log(rate) + rate * regrets)
        return AgACIState(_move(self, state.levels, p), log_weights, regrets, squares, largest)


class DtACIState(NamedTuple):
    """The levels of the next set, one for each gamma, and their weights.

    Attributes:
        levels: shape (g,).
        log_weights: normalised, shape (g,).
    """

    levels: Float[Array, " g"]
    log_weights: Float[Array, " g"]


class DtACI(Online):
    """ACI of several gammas, their levels averaged by exponential weights that forget.

        w_i <- (1 - sigma) w_i exp(-eta l_t(a_i)) / (sum_j of these) + sigma / g

    Attributes:
        alpha: the share of misses aimed at, and the first level.
        gammas: of which the levels are averaged, shape (g,).
        horizon: I, the stretch of time over which it should do as well as the best gamma: sigma = 1 / (2 I), and eta
            from the mean square of the loss where p-values are uniform.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> scores = jnp.abs(jax.random.normal(jax.random.key(0), (2_000,))) * jnp.linspace(1.0, 5.0, 2_000)
        >>> found = conformal.run_online(conformal.DtACI(0.1), scores)
        >>> found.states.levels.shape, round(float(found.coverage), 1)
        ((2000, 8), 0.9)

    References:
        Gibbs and Candès (2024), https://arxiv.org/abs/2208.08401.
    """

    guarantee: ClassVar[Guarantee] = Guarantee(
        "long-run",
        "mean pinball loss of the levels over any I steps is that of the best gamma + O(sqrt(log(g I) / I)); the "
        "coverage tends to 1 - alpha if eta and sigma are let fall to 0",
        "nothing",
    )

    alpha: Float[Array, ""] = eqx.field(converter=jnp.asarray)
    gammas: Float[Array, " g"] = eqx.field(converter=jnp.asarray, default=GAMMAS)
    horizon: Real[Array, ""] = eqx.field(converter=jnp.asarray, default=500)

    def __check_init__(self):
        _check(self.alpha, self.gammas)
        errors.check_positive("horizon", self.horizon)

    @property
    def eta(self) -> Float[Array, ""]:
        """The rate of learning."""
        a = self.alpha
        mean_square = (a**2 * (1 - a) ** 3 + a**3 * (1 - a) ** 2) / 3  # of the loss, for uniform p
        return jnp.sqrt((jnp.log(2 * self.gammas.shape[0] * self.horizon) + 1) / (self.horizon * mean_square))

    def init(self) -> DtACIState:
        return DtACIState(*_start(self.alpha, self.gammas))

    def threshold(self, state: DtACIState, window: Window) -> Float[Array, ""]:
        return window.threshold(_mean(state))

    def step(self, state: DtACIState, score: Real[ArrayLike, ""], window: Window) -> DtACIState:
        p = window.p_value(score)
        log_weights = jax.nn.log_softmax(state.log_weights - self.eta * _pinball(self.alpha, p, state.levels))
        sigma = 0.5 / self.horizon
        shared = jnp.log(sigma / self.gammas.shape[0])
        return DtACIState(_move(self, state.levels, p), jnp.logaddexp(jnp.log1p(-sigma) + log_weights, shared))


def _check(alpha: Array, gammas: Array) -> None:
    errors.check_fraction("alpha", alpha)
    errors.check_positive("gammas", gammas)
    if gammas.ndim != 1:
        raise ValueError(f"gammas must have shape (g,), got {gammas.shape}; of one alone take ACI")


def _start(alpha: Array, gammas: Array) -> tuple[Array, Array]:
    return jnp.full_like(gammas, alpha), jnp.full_like(gammas, -jnp.log(gammas.shape[0]))


def _mean(state: AgACIState | DtACIState) -> Array:
    return jnp.sum(jnp.exp(state.log_weights) * state.levels)


def _move(method: AgACI | DtACI, levels: Array, p: Array) -> Array:
    return levels + method.gammas * (method.alpha - (p <= levels))


def _pinball(alpha: Array, p: Array, level: Array) -> Array:
    return alpha * (p - level) - jnp.minimum(0.0, p - level)


def _rate(largest: Array, squares: Array) -> Array:
    """How fast to learn: 1 until something was saved or lost, then what bounds the regret best."""
    is_any = squares > 0
    squares, largest = jnp.where(is_any, squares, 1.0), jnp.where(is_any, largest, 1.0)
    num = largest.shape[0]
    return jnp.where(is_any, jnp.minimum(1.0 / largest, jnp.sqrt(jnp.log(num + 0.0) / squares)), 1.0)
