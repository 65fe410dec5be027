"""The curvature of a target: extreme eigenvalues of the Hessian of -log pi, at given positions.

Only products of the Hessian with vectors are formed, by differentiating the gradient along the vector. Up to 1500
dimensions they are taken with all unit vectors and the matrix is diagonalised; above, ARPACK's Lanczos iteration finds
the two ends of the spectrum from some hundred products.

The bounds (m, M) of a guarantee must hold everywhere; what is found here holds where it was looked at.

References:
    Lehoucq, Sorensen, Yang (1998), doi:10.1137/1.9780898719628 (ARPACK).
    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147 (Hessian-vector products).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from bayesinf.kernels.vectors import as_position
from bayesinf.target import as_target

__all__ = ["Curvature", "curvature_spectrum", "estimate_curvature"]

_DENSE = 1_500


class Curvature(NamedTuple):
    """Bounds of the Hessian of -log pi over the positions.

    Attributes:
        m, M: the smallest and the largest eigenvalue anywhere.
        smallest, largest: those at each position.
    """

    m: float
    M: float
    smallest: Float[np.ndarray, " c"]
    largest: Float[np.ndarray, " c"]


def estimate_curvature(target: Any, positions: PyTree) -> Curvature:
    """The extreme eigenvalues of the Hessian of -log pi over some positions.

    Args:
        target: a Target, or a log density of the position.
        positions: with a leading axis of length c, as `Target.init` gives them.

    Raises:
        ValueError: the Hessian is not positive definite at a position (pi is not log-concave there), or not resolved at
            the precision of the positions, or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import kernels
        >>> found = kernels.estimate_curvature(lambda x: -0.5 * x[0] ** 2 - 4.0 * x[1] ** 2, jnp.zeros((1, 2)))
        >>> round(found.m, 3), round(found.M, 3)
        (1.0, 8.0)
    """
    target, positions = as_target(target), as_position(positions)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(positions)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(f"positions must have one leading axis of at least one position, got lengths {counts}")
    ends = [_ends(target, jax.tree.map(lambda leaf: leaf[i], positions)) for i in range(counts.pop()[0])]  # noqa: B023
    smallest, largest = np.array(ends).T
    dim = sum(leaf[0].size for leaf in jax.tree.leaves(positions))
    for i in range(len(smallest)):
        _check(smallest[i], largest[i], f"position {i}", _resolution(positions, dim))
    return Curvature(float(smallest.min()), float(largest.max()), smallest, largest)


def curvature_spectrum(target: Any, position: PyTree) -> Float[np.ndarray, " d"]:
    """All eigenvalues of the Hessian of -log pi at one position, ascending; d products and O(d^3) on the host.

    Raises:
        ValueError: as `estimate_curvature`.
    """
    target, position = as_target(target), as_position(position)
    spectrum = np.linalg.eigvalsh(_symmetric(_hessian(target, position)))
    _check(spectrum[0], spectrum[-1], "the position", _resolution(position, len(spectrum)))
    return spectrum


def _ends(target: Any, position: PyTree) -> tuple[float, float]:
    flat, _ = ravel_pytree(position)
    if flat.size <= _DENSE:
        spectrum = np.linalg.eigvalsh(_symmetric(_hessian(target, position)))
        return float(spectrum[0]), float(spectrum[-1])

    def multiply(vector: np.ndarray) -> np.ndarray:
        return _finite(_product(target, position, jnp.asarray(np.ravel(vector), flat.dtype)))

    operator = scipy.sparse.linalg.LinearOperator((flat.size, flat.size), matvec=multiply, dtype=np.float64)  # type: ignore[call-arg]
    start = np.random.default_rng(0).standard_normal(flat.size)
    try:
        low, high = (
            float(
                scipy.sparse.linalg.eigsh(
                    operator,
                    k=1,
                    which=end,
                    v0=start,
                    ncv=64,
                    tol=1e-2,  # pyright: ignore[reportArgumentType]
                    maxiter=200,
                    return_eigenvectors=False,
                )[0]
            )
            for end in ("SA", "LA")
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        raise ValueError(
            "the smallest curvature was not resolved: the condition number is too large for the precision of the "
            "positions; precondition the target, or use 64-bit positions"
        ) from error
    return low, high


def _check(smallest: float, largest: float, where: str, resolution: float) -> None:
    if smallest <= resolution * largest:
        why = (
            "pi is not log-concave there, and bounds for strongly log-concave targets do not apply"
            if smallest < -resolution * largest
            else "zero at this precision: a direction is flat, or the condition number too large for the dtype"
        )
        raise ValueError(
            f"the Hessian of -log pi at {where} has the eigenvalue {smallest:.3g} (largest {largest:.3g}): {why}. Look "
            "nearer to the mode, or reparametrise"
        )


def _resolution(tree: PyTree, dim: int) -> float:
    """Relative to the largest eigenvalue, what rounding can do to the smallest."""
    dtype = jnp.result_type(*jax.tree.leaves(tree))
    return float(jnp.finfo(dtype).eps) * np.sqrt(dim)


@jax.jit
def _product(target: Any, position: PyTree, vector: Float[Array, " d"]) -> Float[Array, " d"]:
    """Hess(-log pi) times a vector."""
    flat, unravel = ravel_pytree(position)
    gradient = jax.grad(lambda x: -target.evaluate(unravel(x)).logdensity)
    return jax.jvp(gradient, (flat,), (vector,))[1]


@jax.jit
def _hessian(target: Any, position: PyTree) -> Float[Array, "d d"]:
    flat, _ = ravel_pytree(position)
    units = jnp.eye(flat.size, dtype=flat.dtype)
    return jax.lax.map(lambda unit: _product(target, position, unit), units, batch_size=min(64, flat.size))


def _symmetric(matrix: Float[Array, "d d"]) -> Float[np.ndarray, "d d"]:
    values = _finite(matrix)
    return 0.5 * (values + values.T)


def _finite(values: Array) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError("the Hessian of -log pi is not finite at a position; start where the density is smooth")
    return array
