"""Control of a risk: the least cautious setting whose expected loss is, demonstrably, at most a target.

Loss L_i(lambda) in [0, B] of point i at the setting lambda; settings ascend from the boldest to the most cautious, as
the threshold of a set does. With R(lambda) the mean loss of n points, and from the most cautious end down,

    "crc"        the last lambda with  (n R(lambda) + B) / (n + 1) <= target            E[ L_{n+1}(lambda) ] <= target
    "ltt"        the last lambda with  p(lambda) <= 1 - level                           P( risk <= target ) >= level
    "dirichlet"  the last lambda with  P( sum_i W_i L_(i) + W_{n+1} B <= target ) >= level,    W ~ Dirichlet(1, ..., 1)

CRC with the loss 1{y not in set} is split conformal prediction. Its promise is of the mean over calibrations, so that
one calibration in two may be worse; the two others are of this calibration. p is the Hoeffding-Bentkus p-value of the
hypothesis that the risk exceeds the target,

    p = min( exp(-n h(min(R, target), target)),  e P( Binomial(n, target) <= ceil(n R) ) ),     h the relative entropy,

and fixed-sequence testing spends 1 - level once. The Dirichlet weights are the posterior of the gaps between the
ordered losses' probabilities, whatever their law; for losses of 0 and 1 the criterion is the Clopper-Pearson bound, for
others it is Gaffke's bound, whose frequentist coverage is conjectured and not proved.

References:
    Angelopoulos, Bates, Fisch, Lei and Schuster (2024), https://arxiv.org/abs/2208.02814 (CRC).
    Angelopoulos, Bates, Candès, Jordan and Lei (2025), doi:10.1214/24-AOAS1998 (learn then test).
    Snell and Griffiths (2025), https://arxiv.org/abs/2502.13228 (Dirichlet).
    Learned-Miller and Thomas (2020), https://arxiv.org/abs/1905.06208 (Gaffke's bound).
"""

from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee

__all__ = ["RiskThreshold", "hoeffding_bentkus", "risk_threshold"]


class RiskThreshold(eqx.Module):
    """The setting chosen by `risk_threshold`.

    Attributes:
        threshold: lambda; +inf if none on the grid will do, and then the most cautious action of all has to be taken:
            `why_infinite` says by how much they fail.
        index: its place on the grid; the length of the grid if there is none.
        criterion: at every lambda, what was compared: the adjusted risk ("crc"), the p-value ("ltt"), the posterior
            probability that the risk is within the target ("dirichlet").
        limit: what it was compared with.
        is_safe: whether each lambda passed.
        guarantee: what is promised.
    """

    threshold: Float[Array, ""]
    index: Int[Array, ""]
    criterion: Float[Array, " l"]
    limit: Float[Array, ""]
    is_safe: Bool[Array, " l"]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why no setting was safe; empty where one is. Not for `jit`.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models import conformal
            >>> conformal.risk_threshold(jnp.zeros((4, 2)), jnp.arange(2.0), 0.1).why_infinite()
            'at the most cautious setting the criterion is 0.2, and must be at most 0.1'
        """
        is_infinite = ~np.any(np.asarray(self.is_safe), -1)
        if not is_infinite.any():
            return ""
        last, limit = (np.asarray(x)[is_infinite].flat[0] for x in (self.criterion[..., -1], self.limit))
        side = "least" if self.guarantee is _POSTERIOR else "most"
        return f"at the most cautious setting the criterion is {last:.3g}, and must be at {side} {limit:.3g}"


def risk_threshold(
    losses: Real[Array, "n l"] | Bool[Array, "n l"],
    lambdas: Real[Array, " l"],
    target: Real[Array, ""] | float,
    *,
    method: Literal["crc", "ltt", "dirichlet"] = "crc",
    level: Real[Array, ""] | float = 0.95,
    bound: Real[Array, ""] | float = 1.0,
    correction: Literal["sequence", "bonferroni"] = "sequence",
    num_draws: int = 1_000,
    key: errors.KeyLike | None = None,
) -> RiskThreshold:
    """The least cautious setting that keeps the expected loss within the target.

    Args:
        losses: of n calibration points at L settings, in [0, bound]. For "crc" and "dirichlet" a loss that rises again
            with caution is replaced by the most that it reaches from there on.
        lambdas: the settings, ascending with caution, shape (L,).
        target: of the expected loss, positive.
        method: "crc", "ltt" or "dirichlet".
        level: with which "ltt" and "dirichlet" hold for this calibration.
        bound: B, the most that a loss can be.
        correction: of "ltt": "sequence" tests from the most cautious setting on until one fails; "bonferroni" tests all
            at (1 - level) / L, for losses that do not fall with caution.
        num_draws: of "dirichlet".
        key: PRNG key or seed, of "dirichlet".

    Returns:
        RiskThreshold.

    Raises:
        ValueError: shapes do not fit, lambdas do not ascend, a loss is outside of [0, bound], or the key is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> scores, lambdas = jnp.arange(1.0, 20.0), jnp.arange(25.0)
        >>> missed = scores[:, None] > lambdas                      # with this loss it is the conformal quantile
        >>> float(conformal.risk_threshold(missed, lambdas, 0.1).threshold)
        18.0
        >>> float(conformal.risk_threshold(missed, lambdas, 0.25, method="ltt", level=0.9).threshold)
        18.0
        >>> float(conformal.risk_threshold(missed, lambdas, 0.25, method="dirichlet", level=0.9, key=0).threshold)
        18.0

    References:
        Angelopoulos, Bates, Fisch, Lei and Schuster (2024), https://arxiv.org/abs/2208.02814.
    """
    errors.check_choice("method", method, ("crc", "ltt", "dirichlet"))
    errors.check_choice("correction", correction, ("sequence", "bonferroni"))
    errors.check_positive("target", target)
    errors.check_positive("bound", bound)
    errors.check_fraction("level", level)
    num_draws = errors.check_count("num_draws", num_draws)
    _check_grid(losses, lambdas, bound)
    losses = jnp.asarray(losses, float) / bound
    target = target / bound
    if method == "ltt":
        criterion = hoeffding_bentkus(_mean(losses), losses.shape[0], target)
        spent = (1 - level) / (losses.shape[1] if correction == "bonferroni" else 1)
        return _choose(lambdas, criterion, spent, criterion <= spent, correction, _PROBABLE)

    losses = jax.lax.cummax(losses, axis=1, reverse=True)
    if method == "dirichlet":
        if key is None:
            raise ValueError("method='dirichlet' draws weights and needs a key")
        criterion = _posterior(errors.as_key(key), losses, target, num_draws)
        return _choose(lambdas, criterion, level, criterion >= level, "sequence", _POSTERIOR)
    n = losses.shape[0]
    adjusted = (n * _mean(losses) + 1.0) / (n + 1)
    slack = 1.0 + 4.0 * float(jnp.finfo(adjusted.dtype).eps)  # the target 0.1 is meant to be reached by 1 in 10
    limit, is_safe = target * bound, adjusted <= target * slack
    return _choose(lambdas, adjusted * bound, limit, is_safe, "sequence", _IN_EXPECTATION)


def hoeffding_bentkus(risk: Float[Array, "*l"], num_points: int, target: Real[Array, ""] | float) -> Float[Array, "*l"]:
    """The p-value of the hypothesis that the mean of a loss in [0, 1] exceeds the target; valid at every n.

        p = min( exp(-n h(min(R, t), t)),  e P( Binomial(n, t) <= ceil(n R) ) )
        h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))

    Args:
        risk: R, means of n independent losses.
        num_points: n; static.
        target: t in (0, 1).

    Returns:
        p-values, at most 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> p = conformal.hoeffding_bentkus(jnp.array([0.0, 0.1]), 50, 0.1)
        >>> round(float(p[0]), 4), float(p[1])
        (0.0052, 1.0)

    References:
        Bates, Angelopoulos, Lei, Malik and Jordan (2021), doi:10.1145/3478535.
    """
    n = errors.check_count("num_points", num_points)
    errors.check_fraction("target", target)
    with jax.enable_x64(True):
        r, t = risk.astype(jnp.float64), jnp.asarray(target).astype(jnp.float64)
        a = jnp.minimum(r, t)
        hoeffding = jnp.exp(-n * (_entropy_term(a, t) + _entropy_term(1 - a, 1 - t)))
        j = jnp.arange(n, dtype=jnp.float64)
        steps = jnp.log((n - j) / (j + 1)) + jnp.log(t) - jnp.log1p(-t)
        log_pmf = n * jnp.log1p(-t) + jnp.concatenate([jnp.zeros(1, jnp.float64), jnp.cumsum(steps)])
        k = jnp.ceil(n * r * (1 - 4 * float(jnp.finfo(risk.dtype).eps)))  # the mean of whole numbers is one of them
        bentkus = jnp.e * jnp.cumsum(jnp.exp(log_pmf))[jnp.clip(k, 0, n).astype(jnp.int32)]
        return jnp.minimum(jnp.minimum(hoeffding, bentkus), 1.0).astype(risk.dtype)


def _entropy_term(a: Array, b: Array) -> Array:
    """A log(a / b), 0 where a is."""
    is_none = a <= 0
    return jnp.where(is_none, 0.0, a * jnp.log(jnp.where(is_none, 1.0, a) / b))


_IN_EXPECTATION = Guarantee(
    "exact", "E[loss of the next point] <= target, over calibration and test", "points are exchangeable"
)
_PROBABLE = Guarantee("exact", "P(risk <= target) >= level, over calibrations", "points are independent")
_POSTERIOR = Guarantee(
    "exact",
    "P(risk <= target | calibration losses) >= level",
    "points are independent; over calibrations it is proved for losses of 0 and 1, conjectured for others",
)


def _mean(losses: Array) -> Array:
    with jax.enable_x64(True):
        return jnp.mean(losses.astype(jnp.float64), 0).astype(losses.dtype)


@partial(jax.jit, static_argnums=3)
def _posterior(key: Array, losses: Array, target: Array, num_draws: int) -> Array:
    """At each setting, the share of Dirichlet weights under which the risk is within the target."""

    def draw(key: Array) -> Array:
        gaps = jax.random.exponential(key, (losses.shape[0] + 1,), losses.dtype)
        return jnp.matmul(gaps[:-1], losses, precision="highest") + gaps[-1] <= target * jnp.sum(gaps)

    is_within = jax.lax.map(draw, jax.random.split(key, num_draws), batch_size=min(num_draws, 128))
    return jnp.mean(is_within.astype(losses.dtype), 0)


def _choose(
    lambdas: Array,
    criterion: Array,
    limit: Array | float,
    is_safe: Array,
    correction: str,
    guarantee: Guarantee,
) -> RiskThreshold:
    if correction == "sequence":  # what lies beyond a failure is not reached
        is_safe = jax.lax.cumprod(is_safe.astype(jnp.int32), reverse=True) > 0
    is_any = jnp.any(is_safe)
    index = jnp.where(is_any, jnp.argmax(is_safe), lambdas.shape[0])
    lambdas = jnp.append(jnp.asarray(lambdas, float), jnp.inf)
    return RiskThreshold(lambdas[index], index, criterion, jnp.asarray(limit, criterion.dtype), is_safe, guarantee)


def _check_grid(losses: Array, lambdas: Array, bound: Real[Array, ""] | float) -> None:
    if losses.ndim != 2 or lambdas.shape != losses.shape[1:] or 0 in losses.shape:
        raise ValueError(
            "losses must have shape (n, L) for lambdas of shape (L,), neither empty, got "
            f"{losses.shape} and {lambdas.shape}"
        )
    if errors.is_concrete(lambdas) and not np.all(np.diff(np.asarray(lambdas)) > 0):
        raise ValueError("lambdas must ascend, from the boldest setting to the most cautious one")
    if not errors.is_concrete((losses, bound)):
        return
    values, most = np.asarray(losses), np.asarray(bound)
    if not np.all((values >= 0) & (values <= most)):
        raise ValueError(f"losses must lie in [0, bound], with bound={bound}; scale them, or give their bound")
