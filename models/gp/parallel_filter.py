"""The filter of a Gaussian process of time in O(log n) parallel steps, by an associative scan.

An element (A, b, C, eta, J) says of a run of times how its last state depends on the state before it: mean A x + b,
covariance C, and what its data say of x, as an information vector eta and matrix J. An earlier element 1 and a later 2
combine with M = (I + C1 J2)^{-1} to

    A = A2 M A1,   b = A2 M (b1 + C1 eta2) + b2,   C = A2 M C1 A2^T + C2
    eta = A1^T M^T (eta2 - J2 b1) + eta1,          J = A1^T M^T J2 A1 + J1

References:
    Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bayesinf.models.gp.sde import LinearSDE

__all__ = ["filter_in_parallel"]


@jax.jit
def filter_in_parallel(
    sde: LinearSDE, noise: Float[Array, " n"], data: Float[Array, " n"], is_missing: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """What is new in every observation, and its variance: y_t - E[y_t | y_0..y_{t-1}].

    Args:
        sde: the state space, transitions into each time.
        noise: variances.
        data: zero where missing.
        is_missing: whether they are.
    """
    h, P, A = sde.observation, sde.stationary, sde.transitions
    d = h.shape[0]
    A = A.at[0].set(0.0)  # the first state comes from the stationary law
    Q = P - A @ P @ A.mT
    Qh = Q @ h
    weight = jnp.where(is_missing, 0.0, 1.0 / jnp.where(is_missing, 1.0, Qh @ h + noise))
    gain = Qh * weight[:, None]
    keep = jnp.eye(d, dtype=h.dtype) - gain[:, :, None] * h
    hA = jnp.einsum("i,tij->tj", h, A)
    elements = (
        keep @ A,
        gain * data[:, None],
        keep @ Q,
        hA * (weight * data)[:, None],
        weight[:, None, None] * hA[:, :, None] * hA[:, None, :],
    )

    def combine(earlier, later):
        A1, b1, C1, eta1, J1 = earlier
        A2, b2, C2, eta2, J2 = later
        identity = jnp.broadcast_to(jnp.eye(d, dtype=h.dtype), C1.shape)
        AM = _times_inverse(A2, identity + C1 @ J2)
        AN = _times_inverse(A1.mT, identity + J2 @ C1)  # M^T
        return (
            AM @ A1,
            _apply(AM, b1 + _apply(C1, eta2)) + b2,
            AM @ C1 @ A2.mT + C2,
            _apply(AN, eta2 - _apply(J2, b1)) + eta1,
            AN @ J2 @ A1 + J1,
        )

    _, means, covariances, _, _ = jax.lax.associative_scan(combine, elements)
    before = jnp.concatenate([jnp.zeros((1, d), means.dtype), means[:-1]])
    spread = jnp.concatenate([jnp.zeros((1, d, d), means.dtype), covariances[:-1]])
    predicted = A @ spread @ A.mT + Q
    news = data - _apply(A, before) @ h
    return news, jnp.where(is_missing, 1.0, jnp.einsum("i,tij,j->t", h, predicted, h) + noise)


def _apply(matrices: Array, vectors: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrices, vectors)


def _times_inverse(left: Array, matrix: Array) -> Array:
    """Left matrix^{-1}, written out in one and two dimensions: many small calls of LAPACK are slow."""
    d = matrix.shape[-1]
    if d == 1:
        return left / matrix
    if d == 2:
        a, b, c, e = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
        adjugate = jnp.stack([jnp.stack([e, -b], axis=-1), jnp.stack([-c, a], axis=-1)], axis=-2)
        return left @ adjugate / (a * e - b * c)[..., None, None]
    if d == 3:
        rows = [matrix[..., i, :] for i in range(3)]
        columns = [jnp.cross(rows[1], rows[2]), jnp.cross(rows[2], rows[0]), jnp.cross(rows[0], rows[1])]
        determinant = jnp.sum(rows[0] * columns[0], axis=-1)
        return left @ jnp.stack(columns, axis=-1) / determinant[..., None, None]
    return jnp.linalg.solve(matrix.mT, left.mT).mT
