"""Several independent Gaussian processes of one law, as one Markov process: paths given data, and in between.

Each of r functions is f = h^T x with the state x of `sde`; u = (f_1, .., f_r). Data speak of u at m sorted points, by a
precision matrix and a vector each: their likelihood is exp(b_i^T u_i - u_i^T B_i u_i / 2). With the law of the states
before the data as mean m and root T,

    E E^T = I + V^T B V,    V = H T
    m <- m + T E^{-T} E^{-1} V^T (b - B H m),    T <- T E^{-T}

in which no covariance is formed, and B may be singular: all eigenvalues of E E^T are 1 or more. Then backwards, each
state is drawn given the next. A point before the first, or after the last, is an interval of infinite length away.

References:
    Frühwirth-Schnatter (1994), doi:10.1111/j.1467-9892.1994.tb00184.x.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf.models.gp.sde import as_sde, noise_trils
from bayesinf.models.square_root import cholesky, condition, solve_lower

__all__ = ["Moves", "draw_between", "draw_path", "moves_of"]


class Moves(NamedTuple):
    """x' = A x + R z over each of t intervals; A = 0 and R R^T = P over an infinite one.

    Attributes:
        transitions: A, shape (t, d, d).
        noise_trils: R, shape (t, d, d).
        observation: h, shape (d,).
    """

    transitions: Float[Array, "t d d"]
    noise_trils: Float[Array, "t d d"]
    observation: Float[Array, " d"]


@eqx.filter_jit
def moves_of(kernel: Any, intervals: Float[Array, " t"]) -> Moves:
    """The moves of a process over intervals.

    Args:
        kernel: made of Matern12, Matern32 and Matern52 by sums and by products with numbers; without a batch.
        intervals: D >= 0, or infinite.

    Raises:
        ValueError: it is another one, or a batch.
    """
    is_infinite = jnp.isinf(intervals)[:, None, None]
    finite = jnp.where(jnp.isinf(intervals), 0.0, intervals)
    trils = noise_trils(kernel, finite)
    sde = as_sde(kernel, finite, order=1)
    return Moves(
        jnp.where(is_infinite, 0.0, sde.transitions),
        jnp.where(is_infinite, cholesky(sde.stationary), trils),
        sde.observation,
    )


def draw_path(
    moves: Moves, precision: Float[Array, "m r r"], information: Float[Array, "m r"], normals: Float[Array, "m r d"]
) -> Float[Array, "m r d"]:
    """States at m points given data, a linear function of standard normals; their mean, where these are zero.

    Args:
        moves: over the m + 1 intervals that begin before the first point and end after the last.
        precision: B.
        information: b.
        normals: one for each number drawn.
    """
    num, d = normals.shape[1:]
    H = _copies(moves.observation[None, :], num)

    def forward(carry: Any, now: Any) -> tuple[Any, Any]:
        mean, tril = carry
        B, b, A, R = now
        A, R, V = _copies(A, num), _copies(R, num), H @ tril
        E = cholesky(jnp.eye(num * d, dtype=V.dtype) + V.T @ B @ V)
        news = V.T @ (b - B @ (H @ mean))
        mean = mean + tril @ solve_lower(E, solve_lower(E, news[:, None]), trans=True)[:, 0]
        law = condition(solve_lower(E, tril.T).T, A, R)
        return (A @ mean, law.marginal_tril), (mean, A @ mean, law.gain, law.tril)

    def backward(later: Any, now: Any) -> tuple[Any, Any]:
        mean, predicted, gain, tril, z = now
        x = mean + gain @ (later - predicted) + tril @ z
        return x, x

    start = jnp.zeros(num * d, normals.dtype), _copies(moves.noise_trils[0], num)
    steps = (precision, information, moves.transitions[1:], moves.noise_trils[1:])
    _, laws = jax.lax.scan(forward, start, steps)
    flat = normals.reshape(-1, num * d)
    return jax.lax.scan(backward, start[0], (*laws, flat), reverse=True)[1].reshape(normals.shape)


def draw_between(
    kernel: Any,
    grid: Float[np.ndarray, " m"],
    states: Float[Array, "s m r d"],
    new: Float[np.ndarray, " t"],
    normals: Float[Array, "t s r d"],
) -> Float[Array, "t s r d"]:
    """States at new points given those on a grid: each given the new one before it, or the grid's, and the grid's next.

    Args:
        kernel: of all processes.
        grid: sorted points.
        states: s draws of the processes there.
        new: sorted points; those of the grid are found again.
        normals: one for each number drawn.
    """
    left = np.searchsorted(grid, new, side="right") - 1
    is_first = np.diff(left, prepend=-2) != 0  # after its left neighbour, with no new point in between
    ends = np.concatenate([[-np.inf], grid, [np.inf]])
    before = np.where(is_first, new - ends[left + 1], np.diff(new, prepend=new[:1]))
    last = len(grid) - 1
    # what comes from beyond the ends is multiplied with zero
    places = jnp.asarray(np.maximum(left, 0)), jnp.asarray(np.minimum(left + 1, last)), jnp.asarray(is_first)
    gaps = jnp.asarray(before, states.dtype), jnp.asarray(ends[left + 2] - new, states.dtype)
    return _draw_between(kernel, gaps, jnp.moveaxis(states, 1, 0), places, normals)


@eqx.filter_jit
def _draw_between(kernel: Any, gaps: Any, states: Array, places: Any, normals: Array) -> Array:
    from_left, to_right = moves_of(kernel, gaps[0]), moves_of(kernel, gaps[1])

    def step(previous: Array, now: Any) -> tuple[Array, Array]:
        A, R, A_right, R_right, left, right, is_first, z = now
        predicted = jnp.where(is_first, states[left], previous) @ A.T
        law = condition(R, A_right, R_right)
        x = predicted + (states[right] - predicted @ A_right.T) @ law.gain.T + z @ law.tril.T
        return x, x

    moves = (from_left.transitions, from_left.noise_trils, to_right.transitions, to_right.noise_trils)
    return jax.lax.scan(step, jnp.zeros_like(states[0]), (*moves, *places, normals))[1]


def _copies(matrix: Array, num: int) -> Array:
    """The block-diagonal matrix with one matrix several times."""
    return jnp.kron(jnp.eye(num, dtype=matrix.dtype), matrix)
