"""Conformal predictive systems: a whole distribution function for y that is calibrated at every finite sample size.

With signed scores s_i = (y_i - centre_i) / scale_i of calibration and s(y) = (y - centre) / scale of the test point,

    Q(y, tau) = ( #{s_i < s(y)} + tau (#{s_i = s(y)} + 1) ) / (n + 1),        tau ~ U(0, 1)

At the true y it is uniform, exactly, if calibration and test points are exchangeable: the probability integral
transform of a law that was not assumed. It is one minus the smoothed p-value. Weights and groups work as everywhere;
the latter make it uniform within every group.

References:
    Vovk, Shen, Manokhin and Xie (2019), doi:10.1007/s10994-018-5755-8.
    Vovk, Petej, Nouretdinov, Manokhin and Gammerman (2020), doi:10.1016/j.neucom.2019.10.110 (split).
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.calibrated import Calibrated
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.quantiles import ranked_p_value
from bayesinf.models.conformal.split import Interval, interval

__all__ = ["PredictiveDistribution", "predictive_distribution"]


class PredictiveDistribution(eqx.Module):
    """The predictive distributions of test points, from `predictive_distribution`.

    Attributes:
        calibrated: signed scores.
        centre, scale: of the test points.
        test_weight, test_group: of the test points, or None.
        guarantee: what the distribution functions promise.
    """

    calibrated: Calibrated
    centre: Float[Array, "..."]
    scale: Float[Array, "..."]
    test_weight: Float[Array, "..."] | None
    test_group: Int[Array, "..."] | None
    guarantee: Guarantee = eqx.field(static=True)

    def cdf(self, y: Real[ArrayLike, "..."], key: errors.KeyLike) -> Float[Array, "..."]:
        """Q(y, tau), with one tau for each test point.

        Args:
            y: broadcasts against the test points, which are the last axes.
            key: PRNG key or seed.

        Returns:
            Values in [0, 1]; uniform at the true y.
        """
        score = self._score(y)
        shape = jnp.broadcast_shapes(self.centre.shape, self.scale.shape)
        return 1.0 - self._p_value(score, key, shape)

    def bounds(self, y: Real[ArrayLike, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Q(y, 0) and Q(y, 1), between which the randomised value falls; 1 / (n + 1) apart where nothing is tied.

        Args:
            y: broadcasts against the test points.

        Returns:
            (lower, upper).
        """
        score = self._score(y)
        return 1.0 - self._p_value(score, None, ()), self._p_value(-score, None, (), is_reversed=True)

    def quantile(
        self, level: Real[ArrayLike, "..."], *, side: Literal["lower", "upper"] = "upper"
    ) -> Float[Array, "..."]:
        """A quantile that y exceeds, or falls short of, at most as often as the level says.

            "upper"   P(y <= quantile) >= level          "lower"   P(y < quantile) <= level

        Args:
            level: broadcasts against the test points.
            side: which of the two.

        Returns:
            Quantiles; +inf, or -inf, where n is too small for the level.
        """
        errors.check_choice("side", side, ("lower", "upper"))
        about_test = {"test_weight": self.test_weight, "test_group": self.test_group}
        if side == "lower":
            return interval(self.calibrated, self.centre, self.scale, 2 * level, kind="signed", **about_test).lower
        is_typed = isinstance(level, jax.Array | np.ndarray | np.generic)
        # the level was rounded before it is taken from 1
        rounding = 4 * float(jnp.finfo(jnp.result_type(level, 1.0) if is_typed else np.float64).eps)
        alpha = 2 * (1 - level + rounding)
        return interval(self.calibrated, self.centre, self.scale, alpha, kind="signed", **about_test).upper

    def interval(self, alpha: Real[ArrayLike, "..."]) -> Interval:
        """Between the lower quantile of level alpha / 2 and the upper one of 1 - alpha / 2: P(y in it) >= 1 - alpha.

        Args:
            alpha: the level.

        Returns:
            Interval.
        """
        about_test = {"test_weight": self.test_weight, "test_group": self.test_group}
        return interval(self.calibrated, self.centre, self.scale, alpha, kind="signed", **about_test)

    def crps(self, y: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
        """The continuous ranked probability score of the distributions at y, in closed form: small is good.

            CRPS = int ( F(z) - 1{z >= y} )^2 dz = E|Y - y| - E|Y - Y'| / 2

        with F the step function of the calibration scores alone, F(z) = sum_i w_i 1{s_i <= s(z)} / sum_i w_i, which
        lies between Q(z, 0) and Q(z, 1): these do not reach 0 and 1, and their integral is infinite.

        Args:
            y: broadcasts against the test points.

        Returns:
            Scores, in the units of y; +inf where the group has no calibration scores. O(n) for each.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models import conformal
            >>> calibrated = conformal.calibrate(conformal.residual(jnp.array([-1.0, 1.0]), 0.0))
            >>> conformal.predictive_distribution(calibrated, jnp.array([0.0, 5.0])).crps(0.0).tolist()
            [0.5, 4.5]

        References:
            Gneiting and Raftery (2007), doi:10.1198/016214506000001437.
        """
        calibrated = self.calibrated
        is_known = ~jnp.isnan(calibrated.scores)
        scores = jnp.where(is_known, calibrated.scores, 0.0)
        weights = jnp.where(is_known, 1.0 if calibrated.weights is None else calibrated.weights, 0.0)

        def one(score: Array, group: Array) -> Array:
            w = weights if calibrated.groups is None else jnp.where(calibrated.groups == group, weights, 0.0)
            total = jnp.sum(w)
            p = w / jnp.where(total > 0, total, 1.0)
            below = jnp.cumsum(p)[:-1]  # 0 or 1 between groups
            spread = jnp.sum(below * (1 - below) * jnp.diff(scores))
            return jnp.where(total > 0, jnp.sum(p * jnp.abs(scores - score)) - spread, jnp.inf)

        group = jnp.zeros((), int) if self.test_group is None else self.test_group
        return self.scale * jnp.vectorize(one)(self._score(y), group)

    def _score(self, y: ArrayLike) -> Array:
        return (jnp.asarray(y) - self.centre) / self.scale

    def _p_value(
        self, score: Array, key: errors.KeyLike | None, noise_shape: tuple[int, ...], *, is_reversed: bool = False
    ) -> Array:
        calibrated = self.calibrated.reversed() if is_reversed else self.calibrated
        test_weight, test_group = calibrated.about_test(self.test_weight, self.test_group)
        ordered = calibrated.scores, calibrated.weights, calibrated.groups
        return ranked_p_value(ordered, score, test_weight, test_group, key, noise_shape=noise_shape)


def predictive_distribution(
    calibrated: Calibrated,
    centre: Float[ArrayLike, "..."],
    scale: Real[ArrayLike, "..."] = 1.0,
    *,
    test_weight: Real[ArrayLike, "..."] | None = None,
    test_group: Int[ArrayLike, "..."] | None = None,
) -> PredictiveDistribution:
    """The conformal predictive distributions of test points.

    Args:
        calibrated: scores from `residual`.
        centre: what is predicted, any shape.
        scale: the same that calibration scores were divided by, positive.
        test_weight: of the test points, if calibrated with weights.
        test_group: of the test points, if calibrated by group.

    Returns:
        PredictiveDistribution, with `cdf`, `bounds`, `quantile` and `interval`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> calibrated = conformal.calibrate(conformal.residual(jnp.arange(7.0), 3.0))
        >>> found = conformal.predictive_distribution(calibrated, jnp.array([0.0, 10.0]))
        >>> found.quantile(0.875).tolist(), found.quantile(0.125, side="lower").tolist()
        ([3.0, 13.0], [-3.0, 7.0])
        >>> [bound.tolist() for bound in found.bounds(0.5)]
        [[0.5, 0.0], [0.625, 0.125]]
    """
    errors.check_positive("scale", scale)
    as_floating = errors.as_array("test_weight", is_optional=True, is_floating=True)
    group = None if test_group is None else jnp.asarray(test_group)
    calibrated.about_test(test_weight, group)
    within = " within every group" if calibrated.groups is not None else ""
    guarantee = Guarantee("exact", f"Q(y, tau) ~ U(0, 1){within}", calibrated.guarantee.assumes)
    centre, scale = jnp.asarray(centre), jnp.asarray(scale, float)
    return PredictiveDistribution(calibrated, centre, scale, as_floating(test_weight), group, guarantee)
