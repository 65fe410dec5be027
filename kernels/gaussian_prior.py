"""Kernels that know the Gaussian part of a target: proposals that stay sensible however fine a function is resolved.

    pi(x) proportional to N(x; m, C) exp(l(x)),    C = L L^T,    w = L^{-1} (x - m),    g = L^T grad l(x)

    PCN               w' = ((2 - h) w + sqrt(8 h) xi) / (2 + h)                     no gradient
    PCNLangevin       w' = ((2 - h) w + 2 h g(x) + sqrt(8 h) xi) / (2 + h)
    MarginalGradient  x' ~ N(m + A (2/h (x - m) + grad l(x)), A + 2/h A^2),    A = (C^{-1} + 2/h I)^{-1}

each accepted with min(1, pi(x') q(x', x) / (pi(x) q(x, x'))). The first two are Crank-Nicolson steps of length h of
diffusions whose noise has the covariance C: acceptance does not fall with the dimension of x, where random walks come
to a halt. PCN is reversible under the prior, so its ratio is that of the likelihoods; it does not know the data, and
mixes badly where they are many. The third integrates out an auxiliary variable by which the gradient step is made: it
moves far where the data say little, and with the gradient where they say much. BlackJAX has it for a covariance that
is fixed when the kernel is built; here all are pytrees, with a target that may be tempered.

The target is that of the whole posterior; l follows by subtraction of the prior. A kernel may therefore be rebound to
another one with the same prior, as SMC samplers do, whose path leads from the prior to the posterior.

References:
    Cotter, Roberts, Stuart and White (2013), doi:10.1214/13-STS421 (pCN, pCNL).
    Titsias and Papaspiliopoulos (2018), doi:10.1111/rssb.12269, arXiv:1610.09641 (marginal gradient).
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Info, Kernel, accept
from bayesinf.kernels.langevin import LangevinState
from bayesinf.kernels.vectors import as_position
from bayesinf.target import Target, as_target

__all__ = ["PCN", "MarginalGradient", "PCNLangevin"]


def _check(kernel: Any) -> None:
    errors.check_positive_scalar("step_size", kernel.step_size)
    mean, tril = kernel.prior_mean, kernel.prior_tril
    if mean.ndim > 1:
        raise ValueError(f"prior_mean must have shape (d,) or be a scalar, got {mean.shape}")
    if tril.ndim > 2 or len(set(tril.shape)) > 1:
        raise ValueError(f"prior_tril must be a scalar, or have shape (d,) or (d, d), got {tril.shape}")
    errors.check_finite("prior_mean", mean)
    errors.check_finite("prior_tril", tril)
    errors.check_positive("the diagonal of prior_tril", tril if tril.ndim < 2 else jnp.diagonal(tril))
    if tril.ndim == 2 and errors.is_concrete(tril) and np.any(np.triu(tril, 1)):
        raise ValueError("prior_tril must be lower triangular; use jnp.linalg.cholesky(covariance)")


def _check_position(kernel: Any, position: PyTree) -> None:
    size = ravel_pytree(position)[0].size
    for name in ("prior_mean", "prior_tril"):
        shape = getattr(kernel, name).shape
        if any(length != size for length in shape):
            raise ValueError(f"{name} must be over the ravelled position, of length {size}, got shape {shape}")


def _whiten(tril: Array, flat: Array) -> Array:
    """L^{-1} x."""
    return solve_triangular(tril, flat, lower=True) if tril.ndim == 2 else flat / tril


def _color(tril: Array, white: Array) -> Array:
    """L w."""
    return tril @ white if tril.ndim == 2 else tril * white


def _color_back(tril: Array, flat: Array) -> Array:
    """L^T x."""
    return flat @ tril if tril.ndim == 2 else tril * flat


class _CrankNicolson(Kernel):
    """What `PCN` and `PCNLangevin` are made with; `order` is that of the derivatives they ask for."""

    order: ClassVar[int]

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    prior_mean: Float[Array, "..."] = eqx.field(default=0.0, converter=errors.as_array("prior_mean", is_floating=True))
    prior_tril: Float[Array, "..."] = eqx.field(default=1.0, converter=errors.as_array("prior_tril", is_floating=True))

    def __check_init__(self):
        _check(self)

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        _check_position(self, position)
        return LangevinState(position, self.target.evaluate(position, order=self.order))


class PCN(_CrankNicolson):
    """Preconditioned Crank-Nicolson: a random walk that leaves the Gaussian prior alone.

    Attributes:
        target: pi, one evaluation a step.
        step_size: h > 0; a step is a fraction beta = sqrt(8 h) / (2 + h) of a draw from the prior, and from h = 2 on it
            is an independent one.
        prior_mean: m, over the position as `ravel_pytree` lays it out: shape (d,), or one number for all.
        prior_tril: L, the Cholesky factor of C, of shape (d, d); or standard deviations, (d,) or one for all.

    Raises:
        ValueError: an argument is not of that form.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2) - jnp.sum(jnp.exp(x)))  # prior N(0, I)
        >>> draws = bi.sample(0, bi.kernels.PCN(target, 0.5), jnp.zeros((4, 3)), num_samples=200, progress=False)
        >>> draws["x"].shape
        (4, 200, 3)
    """

    target_acceptance: ClassVar[float | None] = 0.3

    order: ClassVar[int] = 0

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_move, key_accept = jax.random.split(key)
        flat, unravel = ravel_pytree(state.position)
        mean, tril = self.prior_mean.astype(flat.dtype), self.prior_tril.astype(flat.dtype)
        h = jnp.minimum(self.step_size, 2.0).astype(flat.dtype)  # beyond, steps would go back and forth

        white = _whiten(tril, flat - mean)
        noise = jax.random.normal(key_move, flat.shape, flat.dtype)
        moved = ((2.0 - h) * white + jnp.sqrt(8.0 * h) * noise) / (2.0 + h)
        position = unravel(mean + _color(tril, moved))
        proposed = LangevinState(position, self.target.evaluate(position))
        # reversible under the prior: what is left are the likelihoods
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        log_ratio = log_ratio + 0.5 * (jnp.sum(moved**2) - jnp.sum(white**2))
        return accept(key_accept, log_ratio, proposed, state, num_gradients=0)


class PCNLangevin(_CrankNicolson):
    """Preconditioned Crank-Nicolson Langevin: `PCN` that follows the gradient of the likelihood.

    Attributes:
        target: pi, one gradient a step.
        step_size: h > 0, of the diffusion's time; used up to 2.
        prior_mean, prior_tril: as of `PCN`.

    Raises:
        ValueError: an argument is not of that form.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2) - jnp.sum(jnp.exp(x)))  # prior N(0, I)
        >>> kernel = bi.kernels.PCNLangevin(target, step_size=0.5)
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 3)), num_samples=200, progress=False)
        >>> draws["x"].shape
        (4, 200, 3)
    """

    target_acceptance: ClassVar[float | None] = 0.574

    order: ClassVar[int] = 1

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_move, key_accept = jax.random.split(key)
        flat, unravel = ravel_pytree(state.position)
        mean, tril = self.prior_mean.astype(flat.dtype), self.prior_tril.astype(flat.dtype)
        h = jnp.minimum(self.step_size, 2.0).astype(flat.dtype)

        def centre(white: Array, grad: PyTree) -> Array:
            g = _color_back(tril, ravel_pytree(grad)[0]) + white  # L^T grad l = L^T grad log pi + w
            return ((2.0 - h) * white + 2.0 * h * g) / (2.0 + h)

        scale = jnp.sqrt(8.0 * h) / (2.0 + h)
        white = _whiten(tril, flat - mean)
        noise = jax.random.normal(key_move, flat.shape, flat.dtype)
        moved = centre(white, state.evaluation.grad) + scale * noise
        position = unravel(mean + _color(tril, moved))
        proposed = LangevinState(position, self.target.evaluate(position, order=1))
        # the noise that would bring the proposal back
        back = (white - centre(moved, proposed.evaluation.grad)) / scale
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        log_ratio = log_ratio + 0.5 * (jnp.sum(noise**2) - jnp.sum(back**2))
        return accept(key_accept, log_ratio, proposed, state, num_gradients=1)


class MarginalGradient(Kernel):
    """The marginal gradient sampler (mGRAD): each direction of the prior moves as far as prior and data let it.

    The covariance is decomposed once, when the kernel is built, C = U diag(c) U^T; a step costs two products with U.

    Attributes:
        target: pi, one gradient a step.
        step_size: h > 0, in units of the squared position.
        prior_mean: as of `PCN`.
        directions: U, shape (d, d); None where the prior has no correlations.
        variances: c, shape (d,), or one for all.

    Args:
        target, step_size, prior_mean, prior_tril: as of `PCN`.

    Raises:
        ValueError: an argument is not of that form.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2) - jnp.sum(jnp.exp(x)))  # prior N(0, I)
        >>> kernel = bi.kernels.MarginalGradient(target, step_size=0.5)
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 3)), num_samples=200, progress=False)
        >>> draws["x"].shape
        (4, 200, 3)
    """

    target_acceptance: ClassVar[float | None] = 0.574

    target: Target
    step_size: Float[Array, ""]
    prior_mean: Float[Array, "..."]
    prior_tril: Float[Array, "..."]
    directions: Float[Array, "d d"] | None
    variances: Float[Array, "..."]

    def __init__(
        self,
        target: Any,
        step_size: Any,
        prior_mean: Any = 0.0,
        prior_tril: Any = 1.0,
        directions: Any = None,
        variances: Any = None,
    ):
        self.target = as_target(target)
        self.step_size = errors.as_array("step_size")(step_size)
        self.prior_mean = errors.as_array("prior_mean", is_floating=True)(prior_mean)
        self.prior_tril = errors.as_array("prior_tril", is_floating=True)(prior_tril)
        _check(self)
        if variances is None:
            tril = self.prior_tril
            # by singular values of L: those of C would be known to half the digits
            directions, roots = jnp.linalg.svd(tril)[:2] if tril.ndim == 2 else (None, tril)
            variances = roots**2
        self.directions, self.variances = directions, variances

    def init(self, position: PyTree) -> LangevinState:
        position = as_position(position)
        _check_position(self, position)
        return LangevinState(position, self.target.evaluate(position, order=1))

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_move, key_accept = jax.random.split(key)
        flat, unravel = ravel_pytree(state.position)
        mean, c = self.prior_mean.astype(flat.dtype), self.variances.astype(flat.dtype)
        h = self.step_size.astype(flat.dtype)
        A = c * h / (h + 2.0 * c)
        scale = jnp.sqrt(A * (h + 4.0 * c) / (h + 2.0 * c))  # of A + 2/h A^2

        def centre(x: Array, grad: PyTree) -> Array:
            """Of the proposal, in the directions of the prior, where C grad l = C grad log pi + x - m."""
            slope = self._turn(ravel_pytree(grad)[0])
            return A * (2.0 / h * x + slope) + A / c * x

        x = self._turn(flat - mean)
        noise = jax.random.normal(key_move, flat.shape, flat.dtype)
        moved = centre(x, state.evaluation.grad) + scale * noise
        position = unravel(mean + self._turn_back(moved))
        proposed = LangevinState(position, self.target.evaluate(position, order=1))
        back = (x - centre(moved, proposed.evaluation.grad)) / scale
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        log_ratio = log_ratio + 0.5 * (jnp.sum(noise**2) - jnp.sum(back**2))
        return accept(key_accept, log_ratio, proposed, state, num_gradients=1)

    def _turn(self, flat: Array) -> Array:
        return flat if self.directions is None else flat @ self.directions.astype(flat.dtype)

    def _turn_back(self, turned: Array) -> Array:
        return turned if self.directions is None else self.directions.astype(turned.dtype) @ turned
