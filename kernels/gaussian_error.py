"""How wrong an unadjusted Langevin kernel is on a Gaussian: exactly, and before a single draw is made.

On pi = N(0, diag(1 / lam)) every scheme is a linear map with Gaussian noise, in each coordinate of the eigenbasis,

    z' = A_U z + n,   n ~ N(0, Q_U),         m' = E[A] m,     S' = E[A S A^T] + E[Q],    S = E[z z^T],

with z = x or (x, v), and U the random times of randomized midpoints (no U for the others). So the law of the chain,
stationary or after n steps from a point, has known moments, and

    W2^2 = |E x|^2 + sum_i (sd_i - lam_i^(-1/2))^2.

This is the Wasserstein distance itself where the law is Gaussian (LMC, the exponential integrator, splittings). The law
of a randomized midpoint is a mixture over U; then it is Gelbrich's lower bound, and `is_exact` is False.

A posterior is near a Gaussian with the spectrum of its Hessian; what is computed here is the part of the error that
comes from the spectrum, and none that comes from skewness or tails.

References:
    Gelbrich (1990), doi:10.1002/mana.19901470121.
    Wibisono (2018), arXiv:1802.08089 (the bias of LMC on Gaussians).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from bayesinf import errors
from bayesinf.kernels.kinetic import KineticLangevin, Splitting
from bayesinf.kernels.langevin import LMC
from bayesinf.kernels.parallel_midpoint import ParallelMidpoint
from bayesinf.kernels.precondition import Precondition
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint, RandomizedMidpointKinetic

__all__ = ["MOST_TIMES", "GaussianError", "LinearScheme", "gaussian_error", "linear_scheme", "parallel_midpoint_scheme"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS  # of the mean over U ~ Uniform(0, 1)
MOST_TIMES = 10_000  # of several midpoints, in all combinations


class GaussianError(NamedTuple):
    """The error of a kernel's law of x on a Gaussian of given spectrum.

    Attributes:
        w2: Wasserstein-2 distance to the target, or its Gelbrich lower bound; inf where there is no stationary law.
        is_exact: whether `w2` is the distance itself.
        variance: of x in each eigendirection.
        variance_bias: lam * variance - 1.
        mean_rate: spectral radius of the mean's map, the factor by which a step brings the mean closer.
        second_moment_rate: that of the second moments' map; the scheme is stable where it is below 1.
        statement: what `w2` is, in words.
    """

    w2: float
    is_exact: bool
    variance: Float[np.ndarray, " d"]
    variance_bias: Float[np.ndarray, " d"]
    mean_rate: float
    second_moment_rate: float
    statement: str

    @property
    def is_stable(self) -> bool:
        """Whether the chain has a stationary law."""
        return self.second_moment_rate < 1


class LinearScheme(NamedTuple):
    """One step on a Gaussian, for k random times (k = 1 where there is none) and d eigenvalues; s = 1 or 2.

    Attributes:
        weights: probabilities of the random times.
        A, Q: the maps and the covariances of their noises.
    """

    weights: Float[np.ndarray, " k"]
    A: Float[np.ndarray, "k d s s"]
    Q: Float[np.ndarray, "k d s s"]

    @property
    def is_gaussian(self) -> bool:
        """Whether a step keeps Gaussian laws Gaussian."""
        return len(self.weights) == 1

    def mean_map(self) -> Float[np.ndarray, "d s s"]:
        """E[A]."""
        return np.einsum("k,kdij->dij", self.weights, self.A)

    def second_moment_map(self) -> tuple[Float[np.ndarray, "d s2 s2"], Float[np.ndarray, "d s2"]]:
        """(E[A (x) A], vec E[Q])."""
        num, size = self.A.shape[1], self.A.shape[2] ** 2
        squared = np.einsum("k,kdij,kdlm->diljm", self.weights, self.A, self.A).reshape(num, size, size)
        return squared, np.einsum("k,kdij->dij", self.weights, self.Q).reshape(num, size)


def gaussian_error(
    kernel: Any,
    spectrum: ArrayLike | Sequence[Any],
    *,
    num_steps: int | None = None,
    start: ArrayLike | Sequence[Any] = 0.0,
) -> GaussianError:
    """The exact error of `kernel` on a Gaussian whose precision has the eigenvalues `spectrum`.

    Args:
        kernel: LMC, RandomizedMidpoint, ParallelMidpoint, KineticLangevin, RandomizedMidpointKinetic or Splitting, with
            concrete parameters; its target is not looked at.
        spectrum: d eigenvalues > 0 of the precision matrix, the Hessian of -log pi.
        num_steps: how many steps from a point; None for the stationary law.
        start: where the chain starts, relative to the mode and in the eigenvectors' coordinates; a scalar or shape
            (d,). Velocities start at rest. Not used for the stationary law.

    Raises:
        ValueError: the kernel has no closed form here, an eigenvalue is not positive, or `start` not a finite point.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import kernels
        >>> kernel = kernels.LMC(lambda x: -0.5 * jnp.sum(x**2), step_size=0.5)
        >>> error = kernels.gaussian_error(kernel, [1.0, 1.0])
        >>> [round(float(v), 4) for v in error.variance]  # 1 / (1 - h / 2)
        [1.3333, 1.3333]
    """
    lam = np.atleast_1d(_numbers("spectrum", spectrum))
    if lam.ndim != 1 or not lam.size:
        raise ValueError(f"spectrum must be a vector of at least one eigenvalue, got shape {lam.shape}")
    errors.check_positive("spectrum", lam)

    scheme = linear_scheme(kernel, lam)
    squared, noise = scheme.second_moment_map()
    mean_map = scheme.mean_map()
    mean_rate, second_moment_rate = _spectral_radius(mean_map), _spectral_radius(squared)
    what = f"{'W2' if scheme.is_gaussian else 'Gelbrich lower bound on W2'} of x"

    if num_steps is None:
        mean = np.zeros_like(lam)
        if second_moment_rate < 1:
            variance = np.linalg.solve(np.eye(squared.shape[-1]) - squared, noise[..., None])[:, 0, 0]
            statement = f"{what}, stationary law"
        else:
            variance = np.full_like(lam, np.inf)
            statement = f"unstable: second moments grow by {second_moment_rate:.3g} a step; take a smaller step size"
    else:
        errors.check_count("num_steps", num_steps, minimum=0)
        mean, variance = _transient(scheme, _starting_point(start, lam), num_steps)
        statement = f"{what} after {num_steps} steps from a point at rest"

    with np.errstate(over="ignore", invalid="ignore"):
        w2 = float(np.sqrt(np.sum(mean**2) + np.sum((np.sqrt(variance) - lam**-0.5) ** 2)))
    return GaussianError(
        w2 if np.isfinite(w2) else np.inf,
        scheme.is_gaussian,
        variance,
        lam * variance - 1,
        mean_rate,
        second_moment_rate,
        statement,
    )


def linear_scheme(kernel: Any, lam: Float[np.ndarray, " d"]) -> LinearScheme:
    """One step of `kernel` on N(0, diag(1 / lam)), as a linear map of x or (x, v) in each coordinate."""
    if not errors.is_concrete(kernel):
        raise ValueError("kernel must have concrete parameters; call this outside of jit")
    match kernel:
        case LMC():
            h = float(kernel.step_size)
            return _scheme([1.0], [1 - h * lam], [np.full_like(lam, 2 * h)])
        case RandomizedMidpoint():
            h = float(kernel.step_size)
            z, U = h * lam, _NODES[:, None]
            return _scheme(_WEIGHTS, 1 - z * (1 - z * U), 2 * h * (U * (1 - z) ** 2 + (1 - U)))
        case ParallelMidpoint():
            return parallel_midpoint_scheme(lam, float(kernel.step_size), kernel.num_nodes, kernel.num_sweeps)
        case KineticLangevin():
            h, g, u = _parameters(kernel)
            F, C, lag = _free_flow(h, g, u)
            kick = np.array([[lag, 0.0], [-np.expm1(-g * h) / g, 0.0]])
            A = F - u * lam[:, None, None] * kick
            return LinearScheme(np.ones(1), A[None], np.broadcast_to(C, A.shape)[None])
        case RandomizedMidpointKinetic():
            return _randomized_midpoint_kinetic(lam, *_parameters(kernel))
        case Splitting():
            return _splitting(kernel.word, lam, *_parameters(kernel))
        case Precondition():
            raise ValueError(
                "kernel is a Precondition, whose error is that of the kernel inside on the spectrum that it sees: pass "
                "kernel.kernel, and the eigenvalues of L^T H L with L its scale and H the Hessian of -log pi"
            )
    raise ValueError(
        "gaussian_error knows LMC, RandomizedMidpoint, ParallelMidpoint, KineticLangevin, RandomizedMidpointKinetic "
        f"and Splitting, got {type(kernel).__name__}; Metropolis-adjusted kernels have no bias to compute"
    )


def _starting_point(start: Any, lam: np.ndarray) -> np.ndarray:
    point = _numbers("start", start)
    if point.shape not in ((), lam.shape):
        raise ValueError(f"start must be a scalar or one number for each eigenvalue, {lam.shape}; got {point.shape}")
    if not np.all(np.isfinite(point)):
        raise ValueError(f"start must be finite, got {point}")
    return np.broadcast_to(point, lam.shape)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number or an array of numbers, got {values!r}") from error


def _transient(scheme: LinearScheme, start: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x after `num_steps` from the point `start` at rest."""
    squared, noise = scheme.second_moment_map()
    num, size = noise.shape
    # for a Gaussian law the covariance obeys the same map as the second moment, and no large squares are subtracted
    second = np.zeros_like(noise)
    second[:, 0] = 0.0 if scheme.is_gaussian else start**2
    affine = np.zeros((num, size + 1, size + 1))
    affine[:, :size, :size], affine[:, :size, size], affine[:, size, size] = squared, noise, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.linalg.matrix_power(scheme.mean_map(), num_steps)[:, 0, 0] * start
        last = np.linalg.matrix_power(affine, num_steps)[:, 0]
        variance = np.einsum("dj,dj->d", last[:, :size], second) + last[:, size]
        if not scheme.is_gaussian:
            variance = variance - mean**2
    return mean, np.where(np.isfinite(variance), np.maximum(variance, 0.0), np.inf)


def parallel_midpoint_scheme(lam: np.ndarray, h: float, num_nodes: int, num_sweeps: int) -> LinearScheme:
    """One step of `ParallelMidpoint`: its sweeps, on coefficients of x and of the increments of W between the times.

    The moments are polynomials of degree 2 Q - 2 in each of the R times at most: Q Gauss-Legendre nodes are exact.
    """
    if num_sweeps**num_nodes > MOST_TIMES:
        raise ValueError(
            f"num_nodes must be smaller: the exact error of ParallelMidpoint is a mean over num_sweeps^num_nodes = "
            f"{num_sweeps}^{num_nodes} combinations of times, at most {MOST_TIMES}"
        )
    nodes, weights = np.polynomial.legendre.leggauss(num_sweeps)
    edges = np.arange(num_nodes) / num_nodes
    grid = np.stack(np.meshgrid(*[0.5 * (nodes + 1.0)] * num_nodes, indexing="ij"), -1).reshape(-1, num_nodes)
    times = edges + grid / num_nodes  # (k, r)
    probabilities = np.prod(np.stack(np.meshgrid(*[0.5 * weights] * num_nodes, indexing="ij"), -1), -1).ravel()
    parts = np.clip(times[:, :, None] - edges, 0.0, 1 / num_nodes)  # a_rj
    variances = 2 * h * np.diff(times, axis=1, prepend=0.0, append=1.0)

    z = h * lam[:, None, None]
    # x and W, at the times and at the end
    free = np.concatenate([np.ones((num_nodes + 1, 1)), np.tri(num_nodes + 1)], axis=1)
    scheme = []
    for a, variance in zip(parts, variances, strict=True):
        points = np.broadcast_to(free[0] * (np.arange(num_nodes + 2) == 0), (len(lam), num_nodes, num_nodes + 2))
        for _ in range(num_sweeps - 1):
            points = free[:-1] - z * (a @ points)
        end = free[-1] - z[..., 0] * points.mean(axis=1)
        scheme.append((end[:, 0], end[:, 1:] ** 2 @ variance))
    A, Q = zip(*scheme, strict=True)
    return _scheme(probabilities, np.stack(A), np.stack(Q))


def _randomized_midpoint_kinetic(lam: np.ndarray, h: float, g: float, u: float) -> LinearScheme:
    """The free flow over U h, the kick of the whole step, the free flow over the rest; see the kernel."""
    A, Q = [], []
    on_velocity, of_position = np.array([[0.0], [1.0]]), np.array([[1.0, 0.0]])
    kick = u * h * lam[:, None, None] * (on_velocity @ of_position)
    for U in _NODES:
        (F_a, C_a, lag), (F_d, C_d, _) = _free_flow(U * h, g, u), _free_flow((1 - U) * h, g, u)
        # the midpoint is the free flow's x less u lag lam x of the start
        kicked = np.eye(2) - kick
        A.append(F_d @ (kicked @ F_a + kick * (u * lag * lam)[:, None, None]))
        turned = F_d @ kicked
        Q.append(turned @ C_a @ np.swapaxes(turned, 1, 2) + C_d)
    return LinearScheme(_WEIGHTS, np.stack(A), np.stack(Q))


def _splitting(word: str, lam: np.ndarray, h: float, g: float, u: float) -> LinearScheme:
    A = np.broadcast_to(np.eye(2), (len(lam), 2, 2))
    Q = np.zeros_like(A)
    for letter in word:
        t = h / word.count(letter)
        piece, noise = np.broadcast_to(np.eye(2), A.shape).copy(), np.zeros((2, 2))
        if letter == "A":
            piece[:, 0, 1] = t
        elif letter == "B":
            piece[:, 1, 0] = -t * u * lam
        elif letter == "O":
            piece[:, 1, 1] = np.exp(-g * t)
            noise[1, 1] = -u * np.expm1(-2 * g * t)
        else:
            piece[:], noise, _ = _free_flow(t, g, u)
        A, Q = piece @ A, piece @ Q @ np.swapaxes(piece, 1, 2) + noise
    return LinearScheme(np.ones(1), A[None], Q[None])


def _free_flow(t: float, g: float, u: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Map and covariance of the Ornstein-Uhlenbeck flow of (x, v) over t, and how far a unit force carries."""
    a, gone = g * t, -np.expm1(-g * t)
    if a < 1:  # the closed forms cancel; as integrals over [0, t] they do not
        lag = _integral(lambda s: -np.expm1(-g * s) / g, t)
        c_xx = 2 * g * u * _integral(lambda s: (np.expm1(-g * s) / g) ** 2, t)
    else:
        lag = (a - gone) / g**2
        c_xx = u / g**2 * (2 * (a - gone) - gone**2)
    C = np.array([[c_xx, u / g * gone**2], [u / g * gone**2, -u * np.expm1(-2 * a)]])
    return np.array([[1.0, gone / g], [0.0, 1 - gone]]), C, lag


def _integral(function: Callable[[np.ndarray], np.ndarray], t: float) -> float:
    return t * float(_WEIGHTS @ function(t * _NODES))


def _parameters(kernel: Any) -> tuple[float, float, float]:
    return float(kernel.step_size), float(kernel.friction), float(kernel.inverse_mass)


def _scheme(weights: Any, A: Any, Q: Any) -> LinearScheme:
    """A scheme of x alone, from scalars."""
    return LinearScheme(np.asarray(weights), np.asarray(A)[..., None, None], np.asarray(Q)[..., None, None])


def _spectral_radius(maps: Float[np.ndarray, "d s s"]) -> float:
    return float(np.abs(np.linalg.eigvals(maps)).max())
