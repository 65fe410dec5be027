"""A proposal: which unadjusted kernel, with which parameters, for how many steps, reaches a tolerance on this target.

The target is replaced by the Gaussian of its mode and Hessian. There the error of every kernel is known exactly
(`gaussian_error`), so the step size and friction with the fewest gradients per relaxation time are searched, under

    W2(stationary law, pi) <= tolerance / 2 * spread,      spread^2 = E |x - mean|^2 = sum_i 1 / lam_i,
    2h is stable too,

and the number of steps n is the smallest found with W2(law of x_n, pi) <= tolerance * spread from a start at the mode.
The factor 2 in h is the margin for what the Gaussian does not see. It is a proposal, no guarantee: curvature away
from the mode, skewness and tails add to the error; for randomized midpoints the distance is Gelbrich's lower bound.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from bayesinf import errors
from bayesinf.kernels.curvature import curvature_spectrum
from bayesinf.kernels.gaussian_error import GaussianError, gaussian_error
from bayesinf.kernels.kinetic import KineticLangevin, Splitting
from bayesinf.kernels.langevin import LMC
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint, RandomizedMidpointKinetic
from bayesinf.kernels.vectors import as_position
from bayesinf.target import Target, as_target

__all__ = ["Candidate", "Plan", "plan"]

_LARGEST = 4096
_SEARCHED = 64  # eigenvalues that stand for the spectrum while parameters are searched
_OVERDAMPED = {"LMC": LMC, "RandomizedMidpoint": RandomizedMidpoint}
_KINETIC = {"KineticLangevin": KineticLangevin, "RandomizedMidpointKinetic": RandomizedMidpointKinetic}
_WORDS = ("BAOAB", "OBABO", "UBU")
_GRADIENTS = {"RandomizedMidpoint": 2, "RandomizedMidpointKinetic": 2}


class Candidate(NamedTuple):
    """One kernel at its best parameters.

    Attributes:
        name: its class, or its word.
        kernel: ready for `bi.sample`.
        num_steps: from the mode to within the tolerance.
        num_gradients: what they cost.
        relaxation: steps in which a mean falls by 1/e; draws some relaxation times apart are nearly independent.
        error: of its stationary law on the Gaussian.
    """

    name: str
    kernel: Any
    num_steps: int
    num_gradients: int
    relaxation: float
    error: GaussianError


class Plan(NamedTuple):
    """What `plan` proposes; `print` shows the comparison.

    Attributes:
        kernel: the proposal, on the target.
        num_steps: steps from the mode after which the law is within the tolerance: the warm-up to discard.
        position: the mode.
        spectrum: eigenvalues of the Hessian of -log pi there, ascending.
        spread: (E |x - mean|^2)^(1/2) of the Gaussian.
        tolerance: as asked, a fraction of `spread`.
        candidates: all kernels that reach the tolerance, those with the fewest gradients per relaxation time first.
    """

    kernel: Any
    num_steps: int
    position: PyTree
    spectrum: Float[np.ndarray, " d"]
    spread: float
    tolerance: float
    candidates: tuple[Candidate, ...]

    def initial(self, num_chains: int = 4) -> PyTree:
        """The mode, once for every chain."""
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains, *leaf.shape)), self.position)

    def __repr__(self) -> str:
        m, M = self.spectrum[0], self.spectrum[-1]
        lines = [
            f"plan for W2 <= {self.tolerance:g} x {self.spread:.4g} on the Gaussian at the mode: dimension "
            f"{len(self.spectrum)}, curvature {m:.3g} to {M:.3g}, condition number {M / m:.3g}",
            "kernel                       step size  friction    steps  gradients  relaxation      bias",
        ]
        for c in self.candidates:
            friction = f"{float(c.kernel.friction):.3g}" if hasattr(c.kernel, "friction") else "-"
            bias = f"{'' if c.error.is_exact else '>'}{c.error.w2 / self.spread:.2g}"
            lines.append(
                f"{c.name:<27}{float(c.kernel.step_size):>11.3g}{friction:>10}{c.num_steps:>9}{c.num_gradients:>11}"
                f"{c.relaxation:>12.1f}{bias:>10}"
            )
        return "\n".join(lines)


def plan(target: Any, tolerance: ArrayLike, *, position: PyTree = None, key: errors.KeyLike = 0) -> Plan:
    """Proposes an unadjusted kernel, its parameters and a number of steps for a tolerance.

    Args:
        target: a Target, or a log density of the position.
        tolerance: W2 error as a fraction of the spread of pi, in (0, 1).
        position: where the search for the mode starts; by default `target.init(key)`.
        key: of that start.

    Raises:
        ValueError: the mode was not found, or the Hessian there is not positive definite, or no kernel reaches the
            tolerance, or there are more than 4096 coordinates.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import kernels
        >>> scale = jnp.array([1.0, 0.1])
        >>> proposed = kernels.plan(lambda x: -0.5 * jnp.sum((x / scale) ** 2), 0.05, position=jnp.ones(2))
        >>> proposed.kernel.word
        'BAOAB'
    """
    errors.check_fraction("tolerance", tolerance)
    fraction = errors.as_number("tolerance", tolerance)
    target = as_target(target)
    if position is None:
        position = jax.tree.map(lambda leaf: leaf[0], target.init(key, num_chains=1))
    mode, spectrum = _find_mode(target, as_position(position))

    spread = float(np.sqrt(np.sum(1 / spectrum)))
    found = [_tune(target, name, spectrum, fraction) for name in (*_WORDS, *_KINETIC, *_OVERDAMPED)]
    candidates = sorted(filter(None, found), key=_cost)
    if not candidates:
        raise ValueError(
            f"no kernel reaches the tolerance {fraction:g} at condition number {spectrum[-1] / spectrum[0]:.3g}; "
            "precondition the target, or take a Metropolis-adjusted kernel such as MALA or NUTS"
        )
    best = candidates[0]
    return Plan(best.kernel, best.num_steps, mode, spectrum, spread, fraction, tuple(candidates))


def _cost(candidate: Candidate) -> tuple[float, float]:
    """Gradients per relaxation time, to a thousandth; among equals the bias."""
    gradients = candidate.relaxation * _GRADIENTS.get(candidate.name, 1)
    return round(float(np.log(gradients)), 3), candidate.error.w2


def _find_mode(target: Target, position: PyTree) -> tuple[PyTree, np.ndarray]:
    """The mode, by L-BFGS and Newton steps, and the spectrum there."""
    flat, unravel = ravel_pytree(position)
    if flat.size > _LARGEST:
        raise ValueError(f"plan diagonalises the Hessian, for at most {_LARGEST} coordinates; got {flat.size}")

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _negative(target, unravel(jnp.asarray(x, flat.dtype)))
        return float(value), np.asarray(gradient, np.float64)

    if not all(np.all(np.isfinite(part)) for part in value_and_gradient(np.asarray(flat, np.float64))):
        raise ValueError(
            f"position: the log density or its gradient is not finite there. {target.explain(position)} Start the "
            "search for the mode elsewhere"
        )
    result = scipy.optimize.minimize(
        value_and_gradient, np.asarray(flat, np.float64), jac=True, method="L-BFGS-B", options={"maxiter": 2_000}
    )
    mode = unravel(jnp.asarray(result.x, flat.dtype))
    spectrum = curvature_spectrum(target, mode)
    # the Newton decrement, at most this: how many standard deviations away the mode may be
    away = float(np.linalg.norm(value_and_gradient(result.x)[1]) / np.sqrt(spectrum[0]))
    if not away < 0.5 * np.sqrt(flat.size):
        raise ValueError(
            f"the search for the mode stopped {away:.2g} standard deviations away from it ({result.message}); give a "
            "position nearer to it"
        )
    return mode, spectrum


@jax.jit
def _negative(target: Target, position: PyTree) -> tuple[Float[Array, ""], Float[Array, " d"]]:
    evaluation = target.evaluate(position, order=1)
    return -evaluation.logdensity, -ravel_pytree(evaluation.grad)[0]


def _tune(target: Target, name: str, spectrum: np.ndarray, tolerance: float) -> Candidate | None:
    """The kernel of this name with the shortest relaxation; None where none is within the tolerance."""
    m, M = spectrum[0], spectrum[-1]
    few = spectrum[np.unique(np.linspace(0, len(spectrum) - 1, _SEARCHED).round().astype(int))]
    few_spread = np.sqrt(np.sum(1 / few))
    if name in _OVERDAMPED:
        sizes, frictions = np.geomspace(1e-6, 0.99, 121) / M, np.array([np.nan])
    else:
        sizes, frictions = np.geomspace(1e-4, 0.99, 41) / np.sqrt(M), np.geomspace(np.sqrt(m), 2 * np.sqrt(M + m), 9)

    best, shortest = None, np.inf
    for friction in frictions:
        for size in sizes[::-1]:  # the largest first; below it only the relaxation gets longer
            kernel = _build(target, name, size, friction)
            error = gaussian_error(kernel, few)
            if error.w2 <= 0.5 * tolerance * few_spread and _has_margin(kernel, few):
                relaxation = -1 / np.log(error.mean_rate)
                if relaxation < shortest:
                    best, shortest = kernel, relaxation
                break
    if best is None:
        return None

    spread = np.sqrt(np.sum(1 / spectrum))
    error = gaussian_error(best, spectrum)
    while error.w2 > 0.5 * tolerance * spread:  # the few eigenvalues were not quite the spectrum
        best = best.with_step_size(0.9 * best.step_size)
        error = gaussian_error(best, spectrum)
    num_steps = _steps_to(best, spectrum, float(tolerance * spread))
    return Candidate(
        name, best, num_steps, num_steps * _GRADIENTS.get(name, 1), float(-1 / np.log(error.mean_rate)), error
    )


def _build(target: Target, name: str, size: float, friction: float) -> Any:
    if name in _OVERDAMPED:
        return _OVERDAMPED[name](target, size)
    if name in _KINETIC:
        return _KINETIC[name](target, size, friction=friction)
    return Splitting(name, target, size, friction=friction)


def _has_margin(kernel: Any, spectrum: np.ndarray) -> bool:
    return gaussian_error(kernel.with_step_size(2 * kernel.step_size), spectrum).is_stable


def _steps_to(kernel: Any, spectrum: np.ndarray, tolerance: float) -> int:
    """The first n of a bisection at which the law of x_n, started at the mode, is within the tolerance."""

    def is_near(n: int) -> bool:
        return bool(gaussian_error(kernel, spectrum, num_steps=n).w2 <= tolerance)

    if is_near(0):
        return 0
    low, high = 0, 1
    while not is_near(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_near(middle) else (middle, high)
    return high
