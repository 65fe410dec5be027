"""Covariance functions of time as linear stochastic differential equations: what makes a Gaussian process O(n).

    f(t) = h^T x(t),    x(t + D) = A(D) x(t) + N(0, P - A(D) P A(D)^T),    k(D) = h^T A(D) P h

with P the stationary covariance of the state x.

    Matern, smoothness p + 1/2     x = (f, f'/lambda, ..., f^(p)/lambda^p), lambda = sqrt(2p + 1) / l, and with the
                                   nilpotent N = F / lambda + I, A(D) = exp(-u) sum_{k <= p} (u N)^k / k!, u = lambda D
    Periodic                       a Fourier series of `order` terms; what is cut off is the tail of its coefficients
    Constant                       x = f, A = 1
    Sum, Product                   states side by side, and their Kronecker product

Scaled by lambda the state has a P that depends on nothing but the variance. The noise of a short interval is of order
D^{2p + 1} in f, and lost in the rounding of the difference; for a Matérn process it is an integral of squares,

    P - A(D) P A(D)^T = int_0^u A(s) b b^T A(s)^T ds,    b = (0, .., 0, b_p),    b_p^2 = v 2^{2p + 1} p!^2 / (2p)!

with the variance v, whose root by Gauss-Legendre quadrature has small relative errors for every D.

References:
    Hartikainen and Särkkä (2010), doi:10.1109/MLSP.2010.5589113.
    Solin and Särkkä (2014), Proceedings of AISTATS 33 (periodic).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf.models.gp.covariances import Constant, Matern12, Matern32, Matern52, Periodic, Product, Sum
from bayesinf.models.square_root import cholesky, triangularize

__all__ = ["LinearSDE", "as_sde", "noise_trils"]


class LinearSDE(NamedTuple):
    """A covariance function between given times.

    Attributes:
        transitions: A(D) for every interval D, shape (n, d, d).
        stationary: P, shape (d, d).
        observation: h, shape (d,).
    """

    transitions: Float[Array, "n d d"]
    stationary: Float[Array, "d d"]
    observation: Float[Array, " d"]


def as_sde(kernel: Any, intervals: Float[Array, " n"], order: int) -> LinearSDE:
    """The state space of a covariance function, with its transitions over the intervals.

    Args:
        kernel: made of Matern12, Matern32, Matern52, Periodic and Constant by sums, products and numbers; without a
            batch.
        intervals: D >= 0.
        order: terms of the Fourier series of `Periodic`.

    Raises:
        ValueError: it is another one, or a batch.
    """
    if isinstance(kernel, Sum):
        left, right = (as_sde(part, intervals, order) for part in (kernel.left, kernel.right))
        return LinearSDE(
            _blocks(left.transitions, right.transitions),
            _blocks(left.stationary, right.stationary),
            jnp.concatenate([left.observation, right.observation]),
        )
    if isinstance(kernel, Product):
        left, right = (as_sde(part, intervals, order) for part in (kernel.left, kernel.right))
        return LinearSDE(
            _kronecker(left.transitions, right.transitions),
            _kronecker(left.stationary, right.stationary),
            jnp.kron(left.observation, right.observation),
        )
    if isinstance(kernel, Constant):
        ones = jnp.ones((*intervals.shape, 1, 1), intervals.dtype)
        return LinearSDE(ones, _scalar("variance", kernel.variance)[None, None], jnp.ones(1, intervals.dtype))
    if isinstance(kernel, Periodic):
        return _periodic(kernel, intervals, order)
    for smoothness, kind in enumerate((Matern12, Matern32, Matern52)):
        if isinstance(kernel, kind):
            return _matern(kernel, smoothness, intervals)
    raise ValueError(
        "kernel must be made of Matern12, Matern32, Matern52, Periodic and Constant by + and * for solver=statespace(),"
        f" got {type(kernel).__name__}"
    )


def noise_trils(kernel: Any, intervals: Float[Array, " n"]) -> Float[Array, "n d d"]:
    """Triangular R with R R^T = P - A(D) P A(D)^T, the noise of the transition over every interval.

    Args:
        kernel: made of Matern12, Matern32 and Matern52 by sums and by products with numbers; without a batch.
        intervals: D >= 0.

    Raises:
        ValueError: it is another one, or a batch.
    """
    if isinstance(kernel, Sum):
        return _blocks(noise_trils(kernel.left, intervals), noise_trils(kernel.right, intervals))
    if isinstance(kernel, Product):
        for number, part in ((kernel.left, kernel.right), (kernel.right, kernel.left)):
            if isinstance(number, Constant):
                return jnp.sqrt(_scalar("variance", number.variance)) * noise_trils(part, intervals)
    for smoothness, kind in enumerate((Matern12, Matern32, Matern52)):
        if isinstance(kernel, kind):
            return _matern_noise(kernel, smoothness, intervals)
    raise ValueError(
        "kernel must be made of Matern12, Matern32 and Matern52 by sums and by products with numbers, got "
        f"{type(kernel).__name__}"
    )


# x = (f, f'/lambda, ...): of unit variance, and with d/du x = (N - I) x
STATIONARY = (
    np.eye(1),
    np.eye(2),
    np.array([[1.0, 0.0, -1.0 / 3.0], [0.0, 1.0 / 3.0, 0.0], [-1.0 / 3.0, 0.0, 1.0]]),
)


def _matern(kernel: Any, p: int, intervals: Array) -> LinearSDE:
    u = _in_lengths(kernel, p, intervals)
    stationary = _scalar("variance", kernel.variance) * jnp.asarray(STATIONARY[p], u.dtype)
    return LinearSDE(_matern_transitions(p, u), stationary, jnp.eye(1, p + 1, dtype=u.dtype)[0])


def _in_lengths(kernel: Any, p: int, intervals: Array) -> Array:
    length = _scalar("lengthscale", kernel.lengthscale)
    length = jnp.where(length > 0, length, 1.0)  # the diagonal of the kernel tells
    return intervals * (math.sqrt(2 * p + 1) / length)


def _matern_transitions(p: int, u: Array) -> Array:
    """A over intervals u = lambda D, shape (..., p + 1, p + 1)."""
    drift = np.eye(p + 1, k=1)
    drift[-1] = [-math.comb(p + 1, j) for j in range(p + 1)]
    nilpotent, power = drift + np.eye(p + 1), np.eye(p + 1)
    transitions = jnp.zeros((*u.shape, p + 1, p + 1), u.dtype)
    for k in range(p + 1):
        transitions = transitions + (u**k / math.factorial(k))[..., None, None] * jnp.asarray(power, u.dtype)
        power = power @ nilpotent
    return jnp.exp(-u)[..., None, None] * transitions


LONG = 4.0  # u beyond which the noise is a good part of P, and the difference keeps its digits
NODES, WEIGHTS = np.polynomial.legendre.leggauss(14)  # for exp(-2 s) times a polynomial: exact to 1e-16 up to LONG


def _matern_noise(kernel: Any, p: int, intervals: Array) -> Array:
    u = _in_lengths(kernel, p, intervals)
    short, long = jnp.minimum(u, LONG), jnp.maximum(u, LONG)
    weights = short[:, None] * jnp.asarray(WEIGHTS / 2, u.dtype)
    response = _matern_transitions(p, short[:, None] * jnp.asarray((NODES + 1) / 2, u.dtype))[..., -1]  # A(s) b
    columns = (response * jnp.sqrt(weights)[..., None]).mT
    b = math.sqrt(2.0 ** (2 * p + 1) * math.factorial(p) ** 2 / math.factorial(2 * p))

    A, P = _matern_transitions(p, long), jnp.asarray(STATIONARY[p], u.dtype)
    trils = jnp.where(
        (u <= LONG)[:, None, None], b * jax.vmap(triangularize)(columns), jax.vmap(cholesky)(P - A @ P @ A.mT)
    )
    return jnp.sqrt(_scalar("variance", kernel.variance)) * trils


def _periodic(kernel: Any, intervals: Array, order: int) -> LinearSDE:
    # coefficients of exp((cos t - 1) / l^2) by the trapezoidal rule, exponentially accurate for a periodic function
    num = 8 * (order + 1)
    t = 2 * np.pi * np.arange(num) / num
    length = _scalar("lengthscale", kernel.lengthscale)
    values = jnp.exp((np.cos(t) - 1.0) / jnp.where(length > 0, length, 1.0) ** 2)
    cosines = np.cos(np.arange(order + 1)[:, None] * t) * np.where(np.arange(order + 1) == 0, 1.0, 2.0)[:, None] / num
    coefficients = jnp.maximum(jnp.asarray(cosines, intervals.dtype) @ values.astype(intervals.dtype), 0.0)

    period = _scalar("period", kernel.period)
    angle = 2 * math.pi * intervals / jnp.where(period > 0, period, 1.0)
    transitions = jnp.ones((*intervals.shape, 1, 1), intervals.dtype)
    for j in range(1, order + 1):
        cos, sin = jnp.cos(j * angle), jnp.sin(j * angle)
        turn = jnp.stack([jnp.stack([cos, -sin], axis=-1), jnp.stack([sin, cos], axis=-1)], axis=-2)
        transitions = _blocks(transitions, turn)
    spread = jnp.concatenate([coefficients[:1], jnp.repeat(coefficients[1:], 2)])
    observation = jnp.asarray([1.0] + [1.0, 0.0] * order, intervals.dtype)
    return LinearSDE(transitions, _scalar("variance", kernel.variance) * jnp.diag(spread), observation)


def _scalar(name: str, parameter: Array) -> Array:
    if parameter.size != 1:
        raise ValueError(
            f"{name} must be one number for solver=statespace(), got shape {parameter.shape}; use jax.vmap"
        )
    return parameter.reshape(())


def _blocks(a: Array, b: Array) -> Array:
    """Block-diagonal matrices."""
    top = jnp.concatenate([a, jnp.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)], axis=-1)
    bottom = jnp.concatenate([jnp.zeros((*b.shape[:-1], a.shape[-1]), b.dtype), b], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _kronecker(a: Array, b: Array) -> Array:
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.reshape((*a.shape[:-2], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1]))
