"""Gaussian processes of tangent vector fields on a point cloud (RVGP).

Points x_1 .. x_n lie near a manifold of dimension d in R^D. Each has a frame T_i (D, d) of its tangent space, from the
differences to its neighbours, and neighbours a rotation O_ij, the orthogonal matrix nearest to T_i^T T_j. The
connection Laplacian of the neighbourhood graph

    (Lc u)_i = 2 d sum_j w_ij (u_i - O_ij u_j) / sum_j w_ij |z_i - z_j|^2

    w_ij = (h_i h_j)^{(d - 2) / 2} exp(-2 |x_i - x_j|^2 / (h_i h_j)),    h_i^2 the mean |x_i - x_j|^2 of the neighbours

has nearly the eigenvalues of that of the manifold, also where the density of the points varies: the power of h takes
out the density (it makes the energy of an edge that of a volume h^d), and the denominator the scale. No constant is
calibrated: for a weight of any shape w(r), int w (u(x + r) - u(x)) dr = Delta u int w |r|^2 dr / 2d to leading order.
The 2 in the exponent makes weights exp(-2 (d + 2) / d) at the end of the neighbourhood, small enough for its shape not
to show. What is left, for points spread evenly, is of order h^2: on a flat torus -s^2 |k|^2 / 4 of a wave k, with s^2 =
h^2 / 4.

Points drawn at random have neighbours on one side more than on the other. Fields adapt to that, and with z = x in the
denominator eigenvalues are about 1.6 / (effective number of neighbours) too low, by a quarter to a third for ten of
them, however many points there are. z are the points after they have been moved, along their tangent spaces, to the
means of their neighbours in a few sweeps: the correctors of homogenisation, by which displacements adapt as fields do.
Two percent are left where points are spread evenly or their density is smooth. Points at random leave more: with 800 on
a sphere single eigenvalues were up to 15 % off, their mean 2 %. On curves all must pass every gap: 300 at random on a
circle gave .2 to .4 and .6 to .9 in the place of two ones with eight neighbours, and .7 to 1.15 with twenty. With the
eigenpairs (lambda_k, u_k) the field is

    f(x_i) = T_i sum_k sqrt(S_k) z_k u_k(i),      z_k ~ N(0, 1)
    S_k proportional to (2 nu / l^2 + lambda_k)^{-nu - d/2}, or exp(-l^2 lambda_k / 2) for nu = inf
    v_i = T_i^T f(x_i) + noise

which does not depend on the frames chosen, and turns with the points. It is a linear model of m features: O(n m^2).

References:
    Peach, Vinao-Carl, Grossman, David, Mallas, Sharp, Malhotra, Vandergheynst and Gosztolai (2024), arXiv:2309.16746.
    Singer and Wu (2012), doi:10.1002/cpa.21395 (the connection Laplacian).
    Berry and Harlim (2016), doi:10.1016/j.acha.2015.01.001 (bandwidths that vary with the density).
    Borovitskiy, Terenin, Mostowsky and Deisenroth (2020), arXiv:2006.10160 (Matérn processes on manifolds).
    Gloria and Otto (2011), doi:10.1214/10-AOP571 (correctors, cut off at a finite length).
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.gp.dense import cholesky_or_identity, solve
from bayesinf.models.gp.lbfgs import minimise

__all__ = ["ConnectionLaplacian", "ConnectionMatern", "VectorField", "VectorFieldPosterior", "connection_laplacian"]

NUM_SWEEPS = 40  # the points come to rest over sqrt(40 / 2) steps to a neighbour; 0 is z = x


class ConnectionLaplacian(eqx.Module):
    """Frames and eigenpairs, from `connection_laplacian`.

    Attributes:
        frames: T_i, orthonormal columns.
        eigenvalues: lambda_k, in ascending order.
        vectors: u_k(i) in the coordinates of the frames, of mean square 1 over the manifold.
    """

    frames: Float[Array, "n D d"]
    eigenvalues: Float[Array, " m"]
    vectors: Float[Array, "n d m"]


def connection_laplacian(
    points: Any, *, dim: int, num_neighbors: int = 10, num_eigenpairs: int = 100
) -> ConnectionLaplacian:
    """The eigenpairs of the connection Laplacian of a point cloud, computed on the host in double precision.

    Fields are known at these points alone: put in the points to predict at, too.

    Args:
        points: (n, D), without duplicates.
        dim: d, of the manifold, at most D.
        num_neighbors: of each point, at least d; the frames take half as many more.
        num_eigenpairs: m, the smallest ones; features of the field, so 50 to 200 for fields that are smooth.

    Raises:
        ValueError: shapes or counts do not fit, points coincide, or the graph falls into pieces.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models import gp
        >>> angles = np.linspace(0.0, 2.0 * np.pi, 100, endpoint=False)
        >>> circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        >>> laplacian = gp.connection_laplacian(circle, dim=1, num_neighbors=4, num_eigenpairs=5)
        >>> [abs(round(float(x), 1)) for x in laplacian.eigenvalues]  # sines and cosines, along the tangent
        [0.0, 1.0, 1.0, 4.0, 4.0]
    """
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import eigsh

    points = np.asarray(points, float)
    if points.ndim != 2 or 0 in points.shape or not np.all(np.isfinite(points)):
        raise ValueError(f"points must be finite numbers of shape (n, D), got shape {points.shape}")
    n, ambient = points.shape
    errors.check_count("dim", dim)
    errors.check_count("num_neighbors", num_neighbors, minimum=dim)
    errors.check_count("num_eigenpairs", num_eigenpairs)
    if dim > ambient:
        raise ValueError(f"dim must be at most {ambient}, the columns of points, got {dim}")
    if n <= num_neighbors * 3 // 2:
        raise ValueError(f"num_neighbors must be less than two thirds of the {n} points, got {num_neighbors}")
    if num_eigenpairs >= n * dim:
        raise ValueError(f"num_eigenpairs must be less than n d = {n * dim}, got {num_eigenpairs}")

    rows, columns, squared, widths, frames = _neighbourhoods(points, dim, num_neighbors)
    area = widths[rows] * widths[columns]
    weights = (area / np.mean(area)) ** (0.5 * dim - 1.0) * np.exp(-2.0 * squared / area)
    num_pieces = connected_components(sp.coo_array((weights, (rows, columns)), shape=(n, n)))[0]
    if num_pieces > 1:
        raise ValueError(
            f"num_neighbors must join all points in one graph, got {num_pieces} pieces with {num_neighbors}; take more "
            "neighbours, or each piece alone"
        )

    left, _, right = np.linalg.svd(np.einsum("eDa,eDb->eab", frames[rows], frames[columns]))
    relaxed = _relax(points, frames, rows, columns, weights)
    measure = np.bincount(rows, weights * np.sum((relaxed[rows] - relaxed[columns]) ** 2, axis=1), n) / (2.0 * dim)
    local = np.arange(dim)
    blocks = -(left @ right) * weights[:, None, None]
    shape = blocks.shape
    row = np.broadcast_to(rows[:, None, None] * dim + local[:, None], shape).ravel()
    column = np.broadcast_to(columns[:, None, None] * dim + local, shape).ravel()
    matrix = sp.coo_array((blocks.ravel(), (row, column)), shape=(n * dim, n * dim)).tocsc()
    matrix = matrix + sp.diags_array(np.repeat(np.bincount(rows, weights, n), dim))
    scale = sp.diags_array(np.repeat(measure**-0.5, dim))
    matrix = (scale @ (0.5 * (matrix + matrix.T)) @ scale).tocsc()
    shift = -0.1 / np.mean(np.sum((points - points.mean(axis=0)) ** 2, axis=1))  # below all, so that none is singular
    start = np.random.default_rng(0).normal(size=n * dim)
    eigenvalues, vectors = eigsh(matrix, num_eigenpairs, sigma=shift, which="LM", v0=start)
    order = np.argsort(eigenvalues)
    vectors = vectors[:, order].reshape(n, dim, -1) * (np.sum(measure) / measure)[:, None, None] ** 0.5
    return ConnectionLaplacian(jnp.asarray(frames), jnp.asarray(eigenvalues[order]), jnp.asarray(vectors))


def _neighbourhoods(points: np.ndarray, dim: int, num_neighbors: int) -> tuple[np.ndarray, ...]:
    """Edges of the graph in both directions with their squared lengths, h, and the frames."""
    from scipy.spatial import KDTree

    n = len(points)
    distances, near = map(np.asarray, KDTree(points).query(points, num_neighbors * 3 // 2 + 1))
    if np.any(distances[:, 1] == 0.0):
        raise ValueError(f"points must differ from each other, got {int(np.sum(distances[:, 1] == 0.0))} that do not")
    frames = np.linalg.svd(points[near] - points[:, None], full_matrices=False)[2][:, :dim].transpose(0, 2, 1)
    here = np.repeat(np.arange(n), num_neighbors)
    there = near[:, 1 : num_neighbors + 1].ravel()
    rows, columns = np.unique(np.stack([np.r_[here, there], np.r_[there, here]]), axis=1)
    widths = np.sqrt(np.mean(distances[:, 1 : num_neighbors + 1] ** 2, axis=1))
    return rows, columns, np.sum((points[rows] - points[columns]) ** 2, axis=1), widths, frames


def _relax(points: np.ndarray, frames: np.ndarray, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> Any:
    """The points moved halfway to the means of their neighbours, again and again, along their tangent spaces."""
    import scipy.sparse as sp

    n = len(points)
    means = sp.csr_array((weights / np.bincount(rows, weights, n)[rows], (rows, columns)), shape=(n, n))
    for _ in range(NUM_SWEEPS):
        pull = np.einsum("nDd,nD->nd", frames, means @ points - points)
        points = points + 0.5 * np.einsum("nDd,nd->nD", frames, pull)
    return points


class ConnectionMatern(eqx.Module):
    """A Matérn field, as features of the points: K(i, j) = F_i F_j^T.

    Attributes:
        laplacian: what `connection_laplacian` returns.
        nu: smoothness > 0; inf for the squared exponential. Static.
        lengthscale: l > 0, in the unit of the points.
        variance: of each component of the field, on average over the manifold; > 0.
    """

    laplacian: ConnectionLaplacian
    nu: float = eqx.field(static=True, default=1.5)
    lengthscale: Float[Array, ""] = eqx.field(default=1.0, converter=errors.as_array("lengthscale", is_floating=True))
    variance: Float[Array, ""] = eqx.field(default=1.0, converter=errors.as_array("variance", is_floating=True))

    def __check_init__(self):
        if not isinstance(self.laplacian, ConnectionLaplacian):
            raise ValueError(f"laplacian must come from connection_laplacian, got {type(self.laplacian).__name__}")
        if not errors.as_number("nu", self.nu) > 0:
            raise ValueError(f"nu must be positive, got {self.nu}; math.inf is the squared exponential")
        errors.check_positive_scalar("lengthscale", self.lengthscale)
        errors.check_positive_scalar("variance", self.variance)

    @property
    def spectrum(self) -> Float[Array, " m"]:
        """S_k, which sum up to d times the variance."""
        eigenvalues, dim = self.laplacian.eigenvalues, self.laplacian.frames.shape[-1]
        length = self.lengthscale.astype(eigenvalues.dtype)
        if math.isinf(self.nu):
            log_density = -0.5 * length**2 * eigenvalues
        else:
            # relative to the density at zero, so that no power overflows; rounding leaves eigenvalues below zero
            log_density = -(self.nu + 0.5 * dim) * jnp.log1p(
                jnp.maximum(eigenvalues, 0.0) * length**2 / (2.0 * self.nu)
            )
        return dim * self.variance.astype(eigenvalues.dtype) * jax.nn.softmax(log_density)

    def features(self, index: Int[ArrayLike, " t"]) -> Float[Array, "t d m"]:
        """F_i of the points of these numbers, in the coordinates of their frames."""
        return self.laplacian.vectors[jnp.asarray(index)] * jnp.sqrt(self.spectrum)


class VectorField(eqx.Module):
    """Gaussian-process regression of a tangent vector field.

    Attributes:
        kernel: a `ConnectionMatern`.
        noise: variance of the noise of each tangent component, > 0.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models import gp
        >>> angles = np.linspace(0.0, 2.0 * np.pi, 100, endpoint=False)
        >>> circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        >>> wind = np.stack([-np.sin(angles), np.cos(angles)], axis=1)  # of speed 1, around the circle
        >>> laplacian = gp.connection_laplacian(circle, dim=1, num_neighbors=4, num_eigenpairs=20)
        >>> field = gp.VectorField(gp.ConnectionMatern(laplacian), noise=0.01)
        >>> posterior = field.condition(np.arange(0, 100, 10), wind[::10])
        >>> bool(np.max(np.abs(posterior.mean(np.array([5])) - wind[5])) < 0.1)
        True
    """

    kernel: ConnectionMatern
    noise: Float[Array, ""] = eqx.field(default=0.01, converter=errors.as_array("noise", is_floating=True))

    def __check_init__(self):
        if not isinstance(self.kernel, ConnectionMatern):
            raise ValueError(f"kernel must be a ConnectionMatern, got {type(self.kernel).__name__}")
        errors.check_positive_scalar("noise", self.noise)

    def log_evidence(self, index: Any, vectors: Any) -> Float[Array, ""]:
        """Log density of the tangent parts of the vectors seen, differentiable in all parameters.

        Args:
            index: numbers of the points observed, (t,).
            vectors: the vectors there, (t, D); what is normal to the manifold is ignored.
        """
        return _log_evidence(self, *self._check(index, vectors))

    def fit(self, index: Any, vectors: Any, *, num_steps: int = 100) -> tuple["VectorField", Bool[Array, ""]]:
        """The field whose length scale, variance and noise maximise the evidence, and whether L-BFGS has converged.

        It has not where there is no maximum: a turn of a sphere has a length scale without bound.

        Args:
            index, vectors: as of `log_evidence`.
            num_steps: at most.
        """
        errors.check_count("num_steps", num_steps)
        return _fit(self, *self._check(index, vectors), num_steps)

    def condition(self, index: Any, vectors: Any) -> "VectorFieldPosterior":
        """The law of the field given vectors; arguments as of `log_evidence`."""
        index, coordinates = self._check(index, vectors)
        tril, weights, _ = _regress(self, index, coordinates)
        return VectorFieldPosterior(self.kernel, tril, weights)

    def _check(self, index: Any, vectors: Any) -> tuple[Array, Array]:
        """The numbers, and the coordinates (t, d) of the vectors in the frames."""
        index = _check_index(self.kernel, index)
        vectors = errors.as_array("vectors", is_floating=True)(vectors)
        frames = self.kernel.laplacian.frames[index]
        if vectors.shape != frames.shape[:2]:
            raise ValueError(f"vectors must have shape {frames.shape[:2]}, one for each index, got {vectors.shape}")
        errors.check_finite("vectors", vectors)
        return index, jnp.einsum("tDd,tD->td", frames, vectors.astype(frames.dtype))


class VectorFieldPosterior(eqx.Module):
    """The field given data: weights z ~ N(weights, (L L^T)^{-1}) of the features.

    Attributes:
        kernel: of the field.
        tril: L.
        weights: the mean of z.
    """

    kernel: ConnectionMatern
    tril: Float[Array, "m m"]
    weights: Float[Array, " m"]

    def mean(self, index: Any) -> Float[Array, "t D"]:
        """The mean of the field at points, in R^D."""
        index = _check_index(self.kernel, index)
        return self._lift(index, self.kernel.features(index) @ self.weights)

    def covariance(self, index: Any) -> Float[Array, "t D D"]:
        """The covariance of the field at each point, of rank d."""
        index = _check_index(self.kernel, index)
        features = self.kernel.features(index)
        half = solve(self.tril, features.reshape(-1, features.shape[-1]).T).T.reshape(features.shape)
        lifted = jnp.einsum("tDd,tdm->tDm", self.kernel.laplacian.frames[index], half)
        return lifted @ lifted.mT

    def sample(self, key: errors.KeyLike, index: Any, num_samples: int = 1) -> Float[Array, "s t D"]:
        """Draws of the field at points, jointly."""
        index = _check_index(self.kernel, index)
        errors.check_count("num_samples", num_samples)
        normals = jax.random.normal(errors.as_key(key), (self.tril.shape[0], num_samples), self.tril.dtype)
        z = self.weights[:, None] + jax.scipy.linalg.solve_triangular(self.tril, normals, lower=True, trans=1)
        return jax.vmap(lambda one: self._lift(index, self.kernel.features(index) @ one))(z.T)

    def _lift(self, index: Array, coordinates: Array) -> Array:
        return jnp.einsum("tDd,td->tD", self.kernel.laplacian.frames[index], coordinates)


def _check_index(kernel: ConnectionMatern, index: Any) -> Array:
    index, n = jnp.asarray(index), kernel.laplacian.frames.shape[0]
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer) or index.shape[0] == 0:
        raise ValueError(f"index must be whole numbers of shape (t,), got {index.dtype} of shape {index.shape}")
    if errors.is_concrete(index) and not bool(jnp.all((index >= 0) & (index < n))):
        raise ValueError(f"index must lie in [0, {n}), the numbers of the points, got {index.min()} to {index.max()}")
    return index


@jax.jit
def _regress(field: VectorField, index: Array, coordinates: Array) -> tuple[Array, Array, Array]:
    """L L^T = I + F^T F / noise, the mean weights, and the log evidence; NaN and -inf of parameters below zero."""
    kernel = field.kernel
    is_ok = (kernel.lengthscale > 0) & (kernel.variance > 0) & (field.noise > 0)  # traced values are not refused
    length, variance, noise = (
        jnp.where(is_ok, scale, 1.0) for scale in (kernel.lengthscale, kernel.variance, field.noise)
    )
    features = ConnectionMatern(kernel.laplacian, kernel.nu, length, variance).features(index)
    F, y = features.reshape(-1, features.shape[-1]), coordinates.reshape(-1)
    noise = noise.astype(F.dtype)
    tril, log_ok = cholesky_or_identity(jnp.eye(F.shape[1], dtype=F.dtype) + F.T @ F / noise)
    half = solve(tril, (F.T @ y / noise)[:, None])
    weights = jax.scipy.linalg.solve_triangular(tril, half, lower=True, trans=1)[:, 0]
    log_scale = 2.0 * jnp.sum(jnp.log(jnp.diagonal(tril))) + y.size * jnp.log(2.0 * math.pi * noise)
    # |y - F w|^2 / noise + |w|^2, a sum of squares, rather than the difference that it equals
    quadratic = jnp.sum((y - F @ weights) ** 2) / noise + jnp.sum(weights**2)
    value = -0.5 * (quadratic + log_scale) + log_ok
    return jnp.where(is_ok, tril, jnp.nan), jnp.where(is_ok, weights, jnp.nan), jnp.where(is_ok, value, -jnp.inf)


def _log_evidence(field: VectorField, index: Array, coordinates: Array) -> Array:
    return _regress(field, index, coordinates)[2]


@eqx.filter_jit
def _fit(field: VectorField, index: Array, coordinates: Array, num_steps: int) -> tuple[VectorField, Array]:
    def at(logs: Array) -> VectorField:
        length, variance, noise = jnp.exp(logs)
        kernel = ConnectionMatern(field.kernel.laplacian, field.kernel.nu, length, variance)
        return VectorField(kernel, noise)

    def loss(logs: Array) -> Array:
        return -_log_evidence(at(logs), index, coordinates) / coordinates.size

    start = jnp.log(jnp.stack([field.kernel.lengthscale, field.kernel.variance, field.noise]))
    found = minimise(loss, start.astype(coordinates.dtype), num_steps)
    return at(found.point), found.is_converged
