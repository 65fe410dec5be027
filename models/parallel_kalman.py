"""Kalman filter and Rauch-Tung-Striebel smoother in O(log T) parallel steps, by associative scans in square-root form.

Of the covariances every step of the filter is an element (A, U, Z): given x_{t-1}, the state has covariance U U^T and a
mean that moves with A, and y_t tells of x_{t-1} with information Z Z^T. An earlier element i and a later j combine to

    N = tria(U_i^T Z_j, I),   G = tria(Z_j^T U_i, I),   T = I - U_i N^{-T} N^{-1} U_i^T Z_j Z_j^T
    A = A_j T A_i,   U = tria(A_j U_i N^{-T}, U_j),   Z = tria(A_i^T Z_j G^{-T}, Z_i)

where tria(M) is a square factor of M M^T, and T = (I + C_i J_j)^{-1} with C = U U^T, J = Z Z^T.

The means depart from the paper. Once covariances, and so the gains K_t, are known, they follow an affine recursion,

    m_t = (I - K_t C) (A m_{t-1} + b) + K_t (y_t - d)

which is a scan of its own, made twice: the second on what the first leaves over by rounding. The information vectors
of the paper would cancel against the means where these are large, which a sequential filter's residuals do not.

References:
    Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316.
    Yaghoobi, Corenflos, Hassan and Särkkä (2022), arXiv:2207.00426 (square-root form).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

from bayesinf.models.square_root import condition, drop_missing, triangularize, update

__all__ = ["filter_in_parallel", "smooth_in_parallel"]


def filter_in_parallel(model: Any, ys: Float[Array, "t k"]) -> tuple[Array, Array, Array, Array, Array]:
    """What the sequential filter of a `LinearGaussian` finds at every t.

    Args:
        model: a `LinearGaussian`.
        ys: observations; NaN components are missing.

    Returns:
        Increments of the log evidence, filtered means and factors, predicted means and factors.
    """
    C, d, R_tril = model.observation_matrix, model.observation_offset, model.observation_tril
    first_tril = triangularize(model.initial_tril).astype(ys.dtype)
    is_missing = jnp.isnan(ys)
    C_kept, R_kept = jax.vmap(lambda row: drop_missing(row, C, R_tril))(is_missing)

    # the laws of x_t given y_0..y_t, up to a rotation of their factors, and those of x_{t+1} that follow from them
    start = condition(first_tril, C_kept[0], R_kept[0]).tril
    factors = _filtered_factors(model, start, C_kept[1:], R_kept[1:])
    moved = jax.vmap(
        lambda tril: triangularize(jnp.concatenate([model.transition_matrix @ tril, model.transition_tril], axis=1))
    )(factors[:-1])
    predicted_trils = jnp.concatenate([first_tril[None], moved])

    gains = jax.vmap(lambda tril, C, R_tril: condition(tril, C, R_tril).gain)(predicted_trils, C_kept, R_kept)
    contractions = model.transition_matrix - gains @ C_kept @ model.transition_matrix
    contractions = contractions.at[0].set(0.0)

    def predict(means):
        later = means[:-1] @ model.transition_matrix.T + model.transition_offset
        return jnp.concatenate([model.initial_mean[None].astype(means.dtype), later])

    means = jnp.zeros((len(ys), first_tril.shape[0]), ys.dtype)
    for _ in range(2):
        predicted = predict(means)
        # zeros stand in for missing data before they meet anything: gradients stay finite
        residuals = jnp.where(is_missing, 0.0, jnp.where(is_missing, 0.0, ys) - (predicted @ C.T + d))
        defects = predicted + jnp.einsum("tdk,tk->td", gains, residuals) - means
        means = means + _affine_scan(contractions, defects)

    # one step of the sequential filter from each of them: the factors are Cholesky's, and so are their derivatives
    predicted_means = predict(means)
    means, trils, increments = jax.vmap(lambda mean, tril, y: update(mean, tril, C, d, R_tril, y))(
        predicted_means, predicted_trils, ys
    )
    return increments, means, trils, predicted_means, predicted_trils


def smooth_in_parallel(
    gains: Float[Array, "s d d"],
    trils: Float[Array, "s d d"],
    filtered_means: Float[Array, "t d"],
    predicted_means: Float[Array, "t d"],
    last_tril: Float[Array, "d d"],
) -> tuple[Array, Array]:
    """Smoothed means, and factors of the smoothed covariances, of T = s + 1 states.

        S_t = tria(G_t S_{t+1}, D_t),   E[x_t | y] - m_t = G_t (E[x_{t+1} | y] - m_{t+1} + m_{t+1} - m_{t+1|t})

    Args:
        gains, trils: G_t and D_t of x_t | x_{t+1}, y_0..y_t, for t < T - 1.
        filtered_means, predicted_means: m_t and m_{t|t-1}.
        last_tril: factor of the last filtered covariance.
    """

    def combine(later, now):
        (G_j, D_j), (G_i, D_i) = later, now
        return G_i @ G_j, _compress(jnp.concatenate([G_i @ D_j, D_i], axis=-1))

    zero = jnp.zeros_like(last_tril)[None]
    gains = jnp.concatenate([gains, zero])
    trils = jnp.concatenate([trils, last_tril[None]])
    _, factors = jax.lax.associative_scan(combine, (gains, trils), reverse=True)
    news = jnp.einsum("tij,tj->ti", gains[:-1], filtered_means[1:] - predicted_means[1:])
    news = jnp.concatenate([news, jnp.zeros_like(news[:1])]) if len(news) else jnp.zeros_like(filtered_means)
    return filtered_means + _affine_scan(gains, news, reverse=True), factors


def _filtered_factors(model: Any, start: Array, C: Array, R_tril: Array) -> Array:
    """Square factors of the filtered covariances, from that at t = 0 and the observations of t >= 1."""
    A, d = model.transition_matrix, start.shape[0]

    def element(C, R_tril):
        """Of x_t | x_{t-1}, y_t; by no decomposition that a singular Q would leave without a derivative."""
        Q_tril = model.transition_tril
        S_tril = triangularize(jnp.concatenate([C @ Q_tril, R_tril], axis=1))
        gain = cho_solve((S_tril, True), C @ Q_tril @ Q_tril.T).T
        tril = _compress(jnp.concatenate([Q_tril - gain @ C @ Q_tril, gain @ R_tril], axis=1))
        information = solve_triangular(S_tril, C @ A, lower=True).T
        wide = jnp.pad(information, ((0, 0), (0, max(d - information.shape[1], 0))))
        return A - gain @ C @ A, tril, wide if wide.shape[1] == d else _compress(wide)

    def combine(earlier, later):
        (A_i, U_i, Z_i), (A_j, U_j, Z_j) = earlier, later
        identity = jnp.broadcast_to(jnp.eye(d, dtype=U_i.dtype), U_i.shape)
        UZ = U_i.mT @ Z_j
        N = _triangularize(jnp.concatenate([UZ, identity], axis=-1))
        G = _triangularize(jnp.concatenate([UZ.mT, identity], axis=-1))
        UN = _solve(N, U_i.mT).mT
        T = identity - UN @ (_solve(N, UZ) @ Z_j.mT)
        U = _compress(jnp.concatenate([A_j @ UN, U_j], axis=-1))
        Z = _compress(jnp.concatenate([A_i.mT @ _solve(G, Z_j.mT).mT, Z_i], axis=-1))
        return A_j @ T @ A_i, U, Z

    zero = jnp.zeros_like(start)[None]
    elements = jax.vmap(element)(C, R_tril)
    firsts = (zero, start[None], zero)
    elements = jax.tree.map(lambda first, rest: jnp.concatenate([first, rest]), firsts, elements)
    return jax.lax.associative_scan(combine, elements)[1]


def _affine_scan(matrices: Array, offsets: Array, reverse: bool = False) -> Array:
    """x_t = M_t x_{t-1} + c_t with x_{-1} = 0; from the last to the first if reversed."""

    def combine(before, after):
        (M_i, c_i), (M_j, c_j) = before, after
        return M_j @ M_i, jnp.einsum("...ij,...j->...i", M_j, c_i) + c_j

    return jax.lax.associative_scan(combine, (matrices, offsets), reverse=reverse)[1]


_triangularize = jnp.vectorize(triangularize, signature="(n,m)->(n,n)")


def _solve(tril: Array, matrix: Array) -> Array:
    return jax.lax.linalg.triangular_solve(tril, matrix, left_side=True, lower=True)


@jax.custom_jvp
def _compress(matrix: Array) -> Array:
    """A square L with L L^T = M M^T, of any rank.

    A rotation Q of M that keeps its row space gives the first derivative of L L^T when it is held fixed, L = M Q, and
    needs no inverse: that of a Cholesky factor does not exist where M M^T is singular, as information always is that
    comes from fewer observations than states. Second derivatives would be wrong, and are refused.
    """
    return jnp.linalg.qr(matrix.mT, mode="r").mT


@_compress.defjvp
def _compress_jvp(primals, tangents):
    rotation, upper = jnp.linalg.qr(primals[0].mT)
    return upper.mT, tangents[0] @ _first_order_only(rotation)


@jax.custom_jvp
def _first_order_only(rotation: Array) -> Array:
    return rotation


@_first_order_only.defjvp
def _refuse(primals, tangents):
    raise ValueError("method='associative' has first derivatives only; take method='sequential' for second ones")
