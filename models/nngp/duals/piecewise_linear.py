"""Continuous piecewise linear activations: shifted and clipped ReLU, soft threshold, hard tanh, and any other.

    phi(x) = A + B x + sum_k d_k (s_k x - t_k)_+,       s_k = +-1,  t_k >= 0

with each kink as a rectifier that points away from zero, so that only tails enter. For h = a / sqrt q, k = b / sqrt p,
w = sqrt(1 - rho^2), k' = (k - rho h) / w, h' = (h - rho k) / w, L = P(X > h, Y > k), S the normal survival function and
N the normal density,

    E (u - a)_+ (v - b)_+ = sqrt(qp) [(rho + hk) L - k N(h) S(k') - h N(k) S(h') + w N(h) N(k')]

References:
    Price, Adam, Nait Saada and Tanner (2024), arXiv:2402.16184 (sparse activations and their initialisation).
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.nngp.duals.bivariate_normal import bivariate_survival, conditional, normal_density
from bayesinf.models.nngp.duals.dual import Dual, root

__all__ = ["PiecewiseLinear", "piecewise_linear", "shifted_relu", "soft_threshold"]

Floats = Float[Array, "..."]
Scalar = Real[ArrayLike, ""]


class PiecewiseLinear(Dual):
    """The continuous function with these slopes between these knots.

    Attributes:
        knots: where the slope changes; increasing.
        slopes: one more than knots; from left to right.
        intercept: phi(0).
    """

    knots: Float[Array, " knots"] = eqx.field(converter=as_floating("knots"))
    slopes: Float[Array, " pieces"] = eqx.field(converter=as_floating("slopes"))
    intercept: Float[Array, ""] = eqx.field(converter=as_floating("intercept"), default=0.0)

    def __check_init__(self):
        if self.knots.ndim != 1 or self.knots.size < 1:
            raise ValueError(f"knots must be a non-empty vector, got shape {self.knots.shape}; monomial(1) has none")
        if self.slopes.shape != (self.knots.size + 1,):
            raise ValueError(
                f"slopes must have shape ({self.knots.size + 1},), one more than knots, got {self.slopes.shape}"
            )
        if self.intercept.shape != ():
            raise ValueError(f"intercept must be a scalar, got shape {self.intercept.shape}")
        for name, values in (("knots", self.knots), ("slopes", self.slopes), ("intercept", self.intercept)):
            errors.check_finite(name, values)
        if errors.is_concrete(self.knots) and not np.all(np.diff(np.asarray(self.knots)) > 0):
            raise ValueError(f"knots must be increasing, got {np.asarray(self.knots)}")

    def phi(self, x: Floats) -> Floats:
        intercept, slope, *kinks = self._parts(x)
        return _apply(intercept, slope, kinks, x)

    def covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        intercept, slope, size, sign, knot = self._parts(c)
        pair = _Pair(q, p, c)

        def add(total, kinks):
            (size_u, sign_u, knot_u), (size_v, sign_v, knot_v) = kinks
            return total + size_u * size_v * pair.rectified(sign_u * sign_v, knot_u, knot_v), None

        def add_mean(total, kink):
            size, sign, knot = kink
            mean = _mean_rectified(root(q), knot) + _mean_rectified(root(p), knot)
            cross = sign * c * (ndtr(-_ratio(knot, root(q))) + ndtr(-_ratio(knot, root(p))))
            return total + size * (intercept * mean + slope * cross), None

        total = jnp.broadcast_to(intercept**2 + slope**2 * c, pair.shape)
        total, _ = jax.lax.scan(add_mean, total, (size, sign, knot))
        return jax.lax.scan(add, total, _pairs(size, sign, knot))[0]

    def slope_covariance(self, q: Floats, p: Floats, c: Floats) -> Floats:
        _, slope, size, sign, knot = self._parts(c)
        pair = _Pair(q, p, c)

        def add(total, kinks):
            (size_u, sign_u, knot_u), (size_v, sign_v, knot_v) = kinks
            both = sign_u * sign_v
            return total + size_u * size_v * both * pair.exceed(both, knot_u, knot_v), None

        def add_mean(total, kink):
            size, sign, knot = kink
            tails = ndtr(-_ratio(knot, root(q))) + ndtr(-_ratio(knot, root(p)))
            return total + slope * size * sign * tails, None

        total = jnp.broadcast_to(slope**2, pair.shape)
        total, _ = jax.lax.scan(add_mean, total, (size, sign, knot))
        return jax.lax.scan(add, total, _pairs(size, sign, knot))[0]

    def curvature(self, q: Floats, p: Floats, c: Floats) -> Floats:
        intercept, slope, size, sign, knot = self._parts(c)
        pair = _Pair(q, p, c)
        sd, rest = pair.sd_u, pair.sd_v * pair.width  # of u, and of v given u

        def add(total, kink):
            size_u, sign_u, knot_u = kink
            mean = jnp.where(q <= 0, 0.0, c / jnp.where(q <= 0, 1.0, q)) * sign_u * knot_u

            def add_given(inner, kink):
                size, sign, knot = kink
                return inner + size * _mean_rectified(rest, knot - sign * mean), None

            inner = jnp.broadcast_to(intercept + slope * mean, pair.shape)
            inner, _ = jax.lax.scan(add_given, inner, (size, sign, knot))
            mass = jnp.where(q <= 0, 0.0, normal_density(_ratio(knot_u, sd)) / jnp.where(q <= 0, 1.0, sd))
            return total + size_u * mass * inner, None

        return jax.lax.scan(add, jnp.zeros(pair.shape, c.dtype), (size, sign, knot))[0]

    def v(self, q: Real[ArrayLike, "..."]) -> Floats:
        """Piece by piece: on each phi is linear, and the moments of a normal law on an interval are elementary."""
        q = jnp.asarray(q, jnp.result_type(q, 1.0))
        start, slope, low, high, sd = self._pieces(q)
        mass = ndtr(-low) - ndtr(-high)
        first = sd * (normal_density(low) - normal_density(high))
        second = q[..., None] * (mass + low * normal_density(low) - high * normal_density(high))
        return jnp.sum(start**2 * mass + 2.0 * start * slope * first + slope**2 * second, axis=-1)

    def vdot(self, q: Real[ArrayLike, "..."]) -> Floats:
        q = jnp.asarray(q, jnp.result_type(q, 1.0))
        _, slope, low, high, _ = self._pieces(q)
        return jnp.sum(slope**2 * (ndtr(-low) - ndtr(-high)), axis=-1)

    def _parts(self, like: Floats) -> tuple[Floats, ...]:
        """A, B, and d, s, t of every kink."""
        knots, slopes = self.knots.astype(like.dtype), self.slopes.astype(like.dtype)
        is_left = knots < 0
        slope = slopes[jnp.sum(is_left)]
        sign = jnp.where(is_left, -1.0, 1.0).astype(like.dtype)
        return self.intercept.astype(like.dtype), slope, jnp.diff(slopes), sign, jnp.abs(knots)

    def _pieces(self, q: Floats) -> tuple[Floats, ...]:
        """Of every piece: the value of its line at zero, its slope, and its ends in standard deviations."""
        knots, slopes = self.knots.astype(q.dtype), self.slopes.astype(q.dtype)
        at_knots = self.phi(knots)
        start = jnp.concatenate([at_knots[:1] - slopes[:1] * knots[:1], at_knots - slopes[1:] * knots])
        sd = root(q)[..., None]
        ends = jnp.clip(_ratio(knots, sd), -60.0, 60.0)
        edge = jnp.full((*q.shape, 1), 60.0, q.dtype)
        return start, slopes, jnp.concatenate([-edge, ends], -1), jnp.concatenate([ends, edge], -1), sd


class _Pair:
    """Expectations of rectified u and v above thresholds, for all pairs of signs."""

    def __init__(self, q: Floats, p: Floats, c: Floats):
        self.sd_u, self.sd_v = root(q), root(p)
        self.shape = jnp.broadcast_shapes(q.shape, p.shape, c.shape)
        scale = self.sd_u * self.sd_v
        is_zero = scale <= 0
        scale, c = jnp.where(is_zero, 1.0, scale), jnp.where(is_zero, 0.0, c)
        gap = (scale - jnp.abs(c)) / scale
        gap = jnp.where(gap <= 8.0 * jnp.finfo(gap.dtype).eps, 0.0, gap)  # as in `angle`
        self.rho = jnp.sign(c) * (1.0 - gap)
        self.width = root(gap * (2.0 - gap))

    def exceed(self, sign: Floats, a: Floats, b: Floats) -> Floats:
        """P(u > a, sign v > b) for a, b >= 0."""
        h, k = _ratio(a, self.sd_u), _ratio(b, self.sd_v)
        return bivariate_survival(h, k, sign * self.rho, self.width)

    def rectified(self, sign: Floats, a: Floats, b: Floats) -> Floats:
        """E (u - a)_+ (sign v - b)_+ for a, b >= 0."""
        h, k = _ratio(a, self.sd_u), _ratio(b, self.sd_v)
        rho, width = sign * self.rho, self.width
        beyond_k, beyond_h = conditional(h, k, rho, width), conditional(k, h, rho, width)
        both = (rho + h * k) * bivariate_survival(h, k, rho, width)
        edges = -k * normal_density(h) * ndtr(-beyond_k) - h * normal_density(k) * ndtr(-beyond_h)
        corner = width * normal_density(h) * normal_density(beyond_k)
        return self.sd_u * self.sd_v * (both + edges + corner)


def _ratio(knot: Floats, sd: Floats) -> Floats:
    """The quotient knot / sd; 60 standard deviations stand for infinity."""
    is_zero = sd <= 0
    return jnp.where(is_zero, jnp.where(knot == 0, 0.0, jnp.sign(knot) * 60.0), knot / jnp.where(is_zero, 1.0, sd))


def _mean_rectified(sd: Floats, threshold: Floats) -> Floats:
    """E (x - threshold)_+ of x ~ N(0, sd^2)."""
    h = _ratio(threshold, sd)
    return sd * normal_density(h) - threshold * ndtr(-h)


def _apply(intercept: Floats, slope: Floats, kinks: list[Floats], x: Floats) -> Floats:
    size, sign, knot = (kink.reshape(kink.shape + (1,) * x.ndim) for kink in kinks)
    return intercept + slope * x + jnp.sum(size * jnp.maximum(sign * x - knot, 0.0), axis=0)


def _pairs(size: Floats, sign: Floats, knot: Floats) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    """All ordered pairs of kinks."""
    i, j = jnp.divmod(jnp.arange(size.size**2), size.size)
    return (size[i], sign[i], knot[i]), (size[j], sign[j], knot[j])


def piecewise_linear(
    knots: Real[ArrayLike, " knots"] | Sequence[float],
    slopes: Real[ArrayLike, " pieces"] | Sequence[float],
    *,
    intercept: Real[ArrayLike, ""] = 0.0,
) -> PiecewiseLinear:
    """The dual of the continuous function with these slopes between these knots.

    Args:
        knots: where the slope changes; increasing.
        slopes: one more than knots; from left to right.
        intercept: phi(0).

    Raises:
        ValueError: the shapes do not match, or the knots do not increase.

    Example:
        >>> from bayesinf.models import nngp
        >>> hard_tanh = nngp.piecewise_linear([-1.0, 1.0], [0.0, 1.0, 0.0])
        >>> round(float(hard_tanh.v(1.0)), 4)
        0.5161
    """
    return PiecewiseLinear(knots, slopes, intercept)


def shifted_relu(tau: Scalar, clip: Scalar | None = None) -> PiecewiseLinear:
    """The dual of max(x - tau, 0), which is zero with probability Phi(tau / sqrt q).

    Args:
        tau: shift.
        clip: the height, above zero, at which it stays; None lets it grow.
    """
    _check_clip(clip)
    start: Array = as_floating("tau")(tau)
    knots = start[None] if clip is None else jnp.stack([start, start + jnp.asarray(clip, start.dtype)])
    intercept = jnp.maximum(-start, 0.0) if clip is None else jnp.clip(-start, 0.0, clip)
    return PiecewiseLinear(knots, jnp.array([0.0, 1.0, 0.0])[: knots.size + 1], intercept)


def soft_threshold(tau: Scalar, clip: Scalar | None = None) -> PiecewiseLinear:
    """The dual of sign(x) max(|x| - tau, 0), which is zero where |x| <= tau.

    Args:
        tau: threshold, above zero.
        clip: the height, above zero, at which it stays on either side; None lets it grow.

    Raises:
        ValueError: tau or clip is not positive.
    """
    errors.check_positive("tau", tau)
    _check_clip(clip)
    start: Array = as_floating("tau")(tau)
    right = start[None] if clip is None else jnp.stack([start, start + jnp.asarray(clip, start.dtype)])
    slopes = [1.0, 0.0, 1.0] if clip is None else [0.0, 1.0, 0.0, 1.0, 0.0]
    return PiecewiseLinear(jnp.concatenate([-right[::-1], right]), slopes)


def _check_clip(clip: Scalar | None) -> None:
    if clip is not None:
        errors.check_positive("clip", clip)
