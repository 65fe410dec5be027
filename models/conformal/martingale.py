"""Has the law changed? Martingales that bet against exchangeability, and a guarantee at every time at once.

Of scores s_1, s_2, ... that arrive one by one, the smoothed p-values

    p_n = (#{i <= n : s_i > s_n} + u_n #{i <= n : s_i = s_n}) / n,      u_n uniform

are independent and uniform if the scores are exchangeable. A gambler who bets on each with densities f_n on [0, 1],
which depend on earlier p-values alone, has wealth M_n = f_1(p_1) ... f_n(p_n), a martingale, and by Ville's inequality

    P( sup_n M_n >= c ) <= 1 / c

so that one may look at every time, and stop at any. The bets:

    "power":    average over eps of prod_n eps p_n^(eps - 1): against p-values that crowd at 0
    "jumper":   f_n = 1 + eps (p_n - 1/2), eps in {-1, 0, 1}; a share of the wealth of each eps is spread evenly over
                all before every bet: against crowds at either end, also ones that come late

References:
    Vovk, Nouretdinov and Gammerman (2003), Testing exchangeability on-line, ICML.
    Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman (2021), https://arxiv.org/abs/2105.08669 (simple jumper).
    Ville (1939), Étude critique de la notion de collectif.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, Key

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee

__all__ = ["ExchangeabilityMartingale", "ExchangeabilityTest", "MartingaleState", "exchangeability_test"]

BETS = ("power", "jumper")
POWERS = (np.arange(50) + 0.5) / 50
SLOPES = np.array([-1.0, 0.0, 1.0])
GUARANTEE = Guarantee("exact", "P(sup_n M_n >= c) <= 1 / c for every c", "the scores are exchangeable")


class MartingaleState(NamedTuple):
    """The scores so far, and the wealth.

    Attributes:
        scores: in a buffer, +inf where none has come.
        num_scores: how many have come.
        log_wealths: of the bettors, one for each eps; the average of their wealths is the martingale.
        log_martingale: log M_n.
        log_max: log of the largest M so far.
        p_value: p_n of the last score; NaN where there is none, or no place for it, or it is missing.
    """

    scores: Float[Array, " capacity"]
    num_scores: Int[Array, ""]
    log_wealths: Float[Array, " e"]
    log_martingale: Float[Array, ""]
    log_max: Float[Array, ""]
    p_value: Float[Array, ""]


class ExchangeabilityTest(eqx.Module):
    """What a gambler makes of a series of scores.

    Attributes:
        p_values: p_n, independent and uniform if the scores are exchangeable.
        log_martingale: log M_n.
        guarantee: what is promised.
    """

    p_values: Float[Array, " n"]
    log_martingale: Float[Array, " n"]
    guarantee: Guarantee = eqx.field(static=True)

    @property
    def p(self) -> Float[Array, ""]:
        """The p-value of exchangeability over the whole series, min(1, 1 / sup M), by Ville's inequality."""
        return jnp.exp(-jnp.maximum(jnp.max(self.log_martingale), 0.0))

    def first_above(self, threshold: float) -> Int[Array, ""]:
        """The first n, from 0, with M_n >= threshold, or -1. A false alarm has probability at most 1 / threshold."""
        is_above = self.log_martingale >= jnp.log(threshold)
        return jnp.where(is_above.any(), jnp.argmax(is_above), -1)


class ExchangeabilityMartingale(eqx.Module):
    """A martingale against exchangeability, score by score; a pytree with `init` and `step`.

    A step costs one comparison with every score before, and needs them all. Once the buffer is full there are no more
    bets: the wealth stays as it is, and p_n is NaN.

    Attributes:
        bet: "jumper" or "power".
        jump: of the jumper, the share of wealth that is spread anew at every step, in (0, 1).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax
        >>> from bayesinf.models.conformal import ExchangeabilityMartingale
        >>> martingale = ExchangeabilityMartingale()
        >>> state = martingale.init(capacity=100)
        >>> for n in range(100):                                                # ever higher: no exchangeable law
        ...     state = martingale.step(jax.random.key(n), state, float(n))
        >>> bool(state.log_martingale > 20)
        True

    References:
        Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman (2021), https://arxiv.org/abs/2105.08669.
    """

    bet: str = eqx.field(static=True, default="jumper")
    jump: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.01)

    def __check_init__(self):
        errors.check_choice("bet", self.bet, BETS)
        errors.check_fraction("jump", self.jump)

    def init(self, capacity: int) -> MartingaleState:
        """Before the first score, with room for `capacity` of them."""
        num_bettors = len(POWERS if self.bet == "power" else SLOPES)
        nothing = jnp.zeros(())
        scores = jnp.full(errors.check_count("capacity", capacity), jnp.inf)
        wealths = jnp.full(num_bettors, -jnp.log(num_bettors))
        return MartingaleState(scores, jnp.zeros((), int), wealths, nothing, nothing, jnp.full((), jnp.nan))

    def step(self, key: errors.KeyLike, state: MartingaleState, score: Float[Array, ""] | float) -> MartingaleState:
        """The state after one more score; NaN is missing, and nothing is bet on it."""
        capacity = len(state.scores)
        index = jnp.arange(capacity)
        is_room = (state.num_scores < capacity) & ~jnp.isnan(score)
        scores = jnp.where(is_room & (index == state.num_scores), score, state.scores)
        is_seen = index <= state.num_scores
        u = jax.random.uniform(errors.as_key(key))
        num_above, num_level = jnp.sum(is_seen & (scores > score)), jnp.sum(is_seen & (scores == score))
        # (0, 1]: 1 - u, as the draw may be 0, which no power survives
        p = (num_above + (1 - u) * num_level) / (state.num_scores + 1)
        p = jnp.where(is_room, p, jnp.nan)
        log_wealths = jnp.where(is_room, self._bet(state.log_wealths, jnp.where(is_room, p, 0.5)), state.log_wealths)
        log_martingale = logsumexp(log_wealths)
        log_max = jnp.maximum(state.log_max, log_martingale)
        num_scores = jnp.where(is_room, state.num_scores + 1, state.num_scores)
        return MartingaleState(scores, num_scores, log_wealths, log_martingale, log_max, p)

    def _bet(self, log_wealths: Array, p: Array) -> Array:
        if self.bet == "power":
            powers = jnp.asarray(POWERS, p.dtype)
            return log_wealths + jnp.log(powers) + (powers - 1) * jnp.log(p)
        share = jnp.log(self.jump / len(SLOPES)) + logsumexp(log_wealths)
        log_wealths = jnp.logaddexp(jnp.log1p(-self.jump) + log_wealths, share)
        return log_wealths + jnp.log1p(jnp.asarray(SLOPES, p.dtype) * (p - 0.5))


def exchangeability_test(
    key: errors.KeyLike, scores: Float[Array | np.ndarray, " n"], *, bet: str = "jumper", jump: float = 0.01
) -> ExchangeabilityTest:
    """Tests a whole series of scores for exchangeability, at every time at once.

    Scores must be computed in the same way for each: of a model fitted to other data, or symmetric in all the data so
    far. O(n^2) operations, O(n) memory.

    Args:
        key: for ties, which are broken at random.
        scores: in the order in which they came, large where an observation is strange; NaN is missing.
        bet: "jumper", or "power" where a change makes scores larger.
        jump: of the jumper, in (0, 1).

    Returns:
        p-values and martingale; `.p` is the p-value of the whole series.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.conformal import exchangeability_test
        >>> noise = jnp.abs(jax.random.normal(jax.random.key(0), (400,)))
        >>> bool(exchangeability_test(1, noise).p > 0.05)
        True
        >>> changed = exchangeability_test(1, noise.at[200:].multiply(2.0))
        >>> bool(changed.p < 0.001), bool(changed.first_above(1_000.0) > 200)
        (True, True)

    References:
        Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman (2021), https://arxiv.org/abs/2105.08669.
    """
    martingale = ExchangeabilityMartingale(bet, jump)
    scores = jnp.asarray(scores, float)
    keys = jax.random.split(errors.as_key(key), len(scores))
    p_values, log_martingale = _follow(martingale, keys, scores)
    return ExchangeabilityTest(p_values, log_martingale, GUARANTEE)


@eqx.filter_jit
def _follow(martingale: ExchangeabilityMartingale, keys: Key[Array, " n"], scores: Array) -> tuple[Array, Array]:
    def step(state: MartingaleState, given: tuple[Array, Array]) -> tuple[MartingaleState, tuple[Array, Array]]:
        state = martingale.step(given[0], state, given[1])
        return state, (state.p_value, state.log_martingale)

    return jax.lax.scan(step, martingale.init(len(scores)), (keys, scores))[1]
