"""Computable Wasserstein-2 guarantees for Langevin kernels on strongly log-concave targets.

For pi = exp(-f) on R^p with m I <= Hess f <= M I, the distance x_n of the n-th law from pi obeys a recursion

    x_{n+1} <= |a x_n + b|,     so that     x_n <= x* + |a|^n (x_0 - x*)_+,     x* = |a x* + b|,

with vectors a and b of nonnegative numbers that depend on the kernel, its parameters and (m, M, p) alone. Each is
derived from the diffusion itself, step by step in docs/guarantees.md; none is taken on trust. In short:

    LMC, h <= 1/M    gradient step and heat flow as descents of a free energy:
                     (1 + mh) x'^2 <= (1 - mh) x^2 + 2 M h^2 p, hence the bias sqrt(M h p / m)
    LMC, h < 2/M     synchronous coupling:
                     x' <= max(1 - mh, Mh - 1) x + M sqrt(p) (h^2 sqrt(M) / 2 + 2 sqrt(2) h^(3/2) / 3)
    the others       one step against the diffusion, which contracts by e^(-mh) in |x|, or for kinetic kernels, with
                     lambda = min(u m, gamma^2 - u M) / gamma, by e^(-lambda h) in (|x|^2 + |x + 2 v / gamma|^2)^(1/2);
                     for a randomized midpoint the error averaged over U adds to x, its fluctuation to x^2

They are sufficient and loose: on Gaussians the error at the end of the run is 10 to 10^5 times smaller, which
`gaussian_error` computes. They hold for every target with these (m, M), which must bound the Hessian everywhere, not
only where it was looked at.

References:
    Dalalyan and Karagulyan (2019), arXiv:1710.00095 (LMC by coupling; their 1.65 is recovered).
    Durmus, Majewski, Miasojedow (2019), JMLR 20(73) (LMC as a descent in the Wasserstein space).
    Cheng, Chatterji, Bartlett, Jordan (2018), arXiv:1707.03663.
    Dalalyan and Riou-Durand (2020), doi:10.3150/19-BEJ1178.
    Shen and Lee (2019), arXiv:1909.05503; Yu, Karagulyan, Dalalyan (2024), arXiv:2306.08494 (randomized midpoints).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from jaxtyping import ArrayLike

from bayesinf import errors
from bayesinf.kernels.kinetic import KineticLangevin
from bayesinf.kernels.langevin import LMC
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint, RandomizedMidpointKinetic

__all__ = ["Guarantee", "guarantee", "wasserstein_bound"]


class Guarantee(NamedTuple):
    """Parameters and a number of steps with which the Wasserstein-2 error is under a tolerance.

    Attributes:
        kernel: the class of the kernel.
        step_size, friction, inverse_mass: its parameters; the last two None for overdamped kernels.
        num_steps: how many steps are enough.
        num_gradients: what they cost.
        bound: on the W2 distance of x from the target after these steps.
        bias_term: what is left of the bound after infinitely many.
        contraction: the factor by which a step shrinks the rest.
        source: the argument that proves it.
        provenance: "derived" where the proof is written out in docs/guarantees.md.
    """

    kernel: type
    step_size: float
    friction: float | None
    inverse_mass: float | None
    num_steps: int
    num_gradients: int
    bound: float
    bias_term: float
    contraction: float
    source: str
    provenance: str = "derived"

    def build(self, target: Any) -> Any:
        """The kernel with these parameters on `target`."""
        if self.friction is None:
            return self.kernel(target, self.step_size)
        return self.kernel(target, self.step_size, friction=self.friction, inverse_mass=self.inverse_mass)


class Recursion(NamedTuple):
    """x_{n+1} <= |slope x_n + offset|, from x_0 = start."""

    slope: tuple[float, ...]
    offset: tuple[float, ...]
    start: float
    source: str

    @property
    def contraction(self) -> float:
        """|a|."""
        return math.hypot(*self.slope)

    @property
    def bias(self) -> float:
        """The fixed point x*; inf where there is none."""
        a, b = np.asarray(self.slope), np.asarray(self.offset)
        gap = (1 - self.contraction) * (1 + self.contraction)
        return float((a @ b + math.sqrt((a @ b) ** 2 + gap * (b @ b))) / gap) if gap > 0 else math.inf

    def after(self, num_steps: int) -> float:
        """The bound on x_n: the map is |a|-Lipschitz and increasing."""
        return self.bias + self.contraction**num_steps * max(self.start - self.bias, 0.0)

    def steps_to(self, tolerance: float) -> float:
        """The smallest n whose bound is within the tolerance; inf where none is."""
        bias, rate = self.bias, self.contraction
        if bias >= tolerance:
            return math.inf
        if self.start <= tolerance:
            return 0.0
        if rate == 0:
            return 1.0
        return float(math.ceil(math.log((self.start - bias) / (tolerance - bias)) / -math.log(rate)))


class Problem(NamedTuple):
    """What is known of the target, and how far away the chain starts."""

    m: float
    M: float
    p: int
    distance: float


def guarantee(
    kernel: type | str,
    *,
    m: ArrayLike,
    M: ArrayLike,
    dim: int,
    eps: ArrayLike,
    initial_distance: ArrayLike | None = None,
    friction: ArrayLike | None = None,
    inverse_mass: ArrayLike = 1.0,
) -> Guarantee:
    """The step size that needs the fewest steps for W2(law of x_n, pi) <= eps sqrt(dim / m), and that number.

    Args:
        kernel: LMC, RandomizedMidpoint, KineticLangevin or RandomizedMidpointKinetic, or its name.
        m, M: bounds of the Hessian of -log pi, everywhere: 0 < m <= M.
        dim: p, the number of coordinates.
        eps: error as a fraction of sqrt(dim / m), which is no less than the spread of pi around its mode.
        initial_distance: W2 from the starting law to pi; by default sqrt(dim / m), which holds for a start at the mode.
        friction: gamma, of a kinetic kernel; by default sqrt(u (m + M)), where the diffusion's contraction is fastest.
        inverse_mass: u, the scale of velocities. The chain is taken to start at rest, as `bi.sample` does.

    Raises:
        ValueError: a condition of the theorem is not met, or an argument is of the wrong kind; it is named.

    Example:
        >>> from bayesinf import kernels
        >>> found = kernels.guarantee(kernels.LMC, m=1.0, M=10.0, dim=5, eps=0.1)
        >>> found.num_steps, found.bound <= 0.1 * 5**0.5
        (5569, True)
        >>> kernels.guarantee("RandomizedMidpointKinetic", m=1.0, M=10.0, dim=5, eps=0.1).num_gradients
        444
    """
    names = {cls.__name__: cls for cls in _THEOREMS}
    cls: Any = names.get(kernel) if isinstance(kernel, str) else kernel
    if not isinstance(cls, type) or cls not in _THEOREMS:
        raise ValueError(f"kernel must be one of {', '.join(names)}, for which a bound is known; got {kernel!r}")
    eps = errors.as_number("eps", eps)
    errors.check_positive("eps", eps)
    problem = _problem(m, M, dim, initial_distance)
    g, u = None, None
    if cls in _KINETIC:
        u = errors.as_number("inverse_mass", inverse_mass)
        errors.check_positive("inverse_mass", u)
        g = math.sqrt(u * (problem.m + problem.M)) if friction is None else errors.as_number("friction", friction)
        errors.check_positive("friction", g)
    elif friction is not None:
        raise ValueError(f"friction is a parameter of kinetic kernels, got {friction} for {cls.__name__}; leave it out")
    parameters = () if g is None else (g, u)

    tolerance = eps * math.sqrt(problem.p / problem.m)
    h = _fastest(lambda h: min(r.steps_to(tolerance) for r in _THEOREMS[cls](problem, h, *parameters)), problem.M)
    if h is None:
        raise ValueError(f"eps = {eps} is out of reach of double precision for M / m = {problem.M / problem.m:.3g}")
    best = min(_THEOREMS[cls](problem, h, *parameters), key=lambda recursion: recursion.steps_to(tolerance))
    num_steps = int(best.steps_to(tolerance))
    return Guarantee(
        cls,
        h,
        g,
        u,
        num_steps,
        num_steps * (2 if cls in _TWICE else 1),
        best.after(num_steps),
        best.bias,
        best.contraction,
        best.source,
    )


def wasserstein_bound(
    kernel: Any, *, m: ArrayLike, M: ArrayLike, dim: int, num_steps: int, initial_distance: ArrayLike | None = None
) -> float:
    """An upper bound on W2(law of x_n, pi) for this kernel with its parameters; velocities start at rest.

    Args:
        kernel: LMC, RandomizedMidpoint, KineticLangevin or RandomizedMidpointKinetic; its target is not looked at.
        m, M, dim, initial_distance: as in `guarantee`.
        num_steps: n >= 0.

    Raises:
        ValueError: a condition of the theorem is not met; it is named.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import kernels
        >>> kernel = kernels.LMC(lambda x: -0.5 * jnp.sum(x**2), step_size=0.25)
        >>> round(kernels.wasserstein_bound(kernel, m=1.0, M=1.0, dim=4, num_steps=1_000), 3)
        1.0
    """
    errors.check_count("num_steps", num_steps, minimum=0)
    theorem = _THEOREMS.get(type(kernel))
    if theorem is None:
        names = ", ".join(cls.__name__ for cls in _THEOREMS)
        raise ValueError(f"kernel must be one of {names}, for which a bound is known; got {type(kernel).__name__}")
    if not errors.is_concrete(kernel):
        raise ValueError("kernel must have concrete parameters; call this outside of jit")
    problem = _problem(m, M, dim, initial_distance)
    parameters = (float(kernel.friction), float(kernel.inverse_mass)) if type(kernel) in _KINETIC else ()
    h = float(kernel.step_size)

    def at(h: float) -> list[Recursion]:
        return [recursion for recursion in theorem(problem, h, *parameters) if recursion.contraction < 1]

    if not at(h):
        limit = h
        while not at(limit):
            limit *= 0.9
        raise ValueError(
            f"{type(kernel).__name__} has no guaranteed contraction at step_size = {h:.4g} for m = {problem.m:.4g}, "
            f"M = {problem.M:.4g}: take step_size <= {limit:.3g}"
        )
    return min(recursion.after(num_steps) for recursion in at(h))


def _problem(m: ArrayLike, M: ArrayLike, dim: int, initial_distance: ArrayLike | None) -> Problem:
    low, high = errors.as_number("m", m), errors.as_number("M", M)
    errors.check_positive("m", low)
    errors.check_positive("M", high)
    errors.check_count("dim", dim)
    if low > high:
        raise ValueError(f"m must be at most M, got m = {low}, M = {high}")
    if initial_distance is None:
        return Problem(low, high, dim, math.sqrt(dim / low))  # p = E <grad f, x - mode> >= m E |x - mode|^2
    distance = errors.as_number("initial_distance", initial_distance)
    if not 0 <= distance < math.inf:
        raise ValueError(f"initial_distance must be finite and at least 0, got {distance}")
    return Problem(low, high, dim, distance)


def _fastest(steps_at: Callable[[float], float], M: float) -> float | None:
    """The step size with the fewest steps, the largest of equals: a scan of sizes, refined around the best."""
    grid = np.log(np.geomspace(1e-14, 10.0, 151) / M)
    steps = np.array([steps_at(math.exp(log_h)) for log_h in grid])
    best = len(steps) - 1 - int(np.argmin(steps[::-1]))
    if not np.isfinite(steps[best]):
        return None
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    refined = scipy.optimize.minimize_scalar(
        lambda log_h: min(steps_at(math.exp(log_h)), 1e300), bounds=around, method="bounded"
    )
    return math.exp(refined.x if refined.fun < steps[best] else grid[best])  # pyright: ignore[reportAttributeAccessIssue]


# The theorems. Each returns the recursions that hold at step size h; a contraction of 1 or more says nothing.


def _lmc(problem: Problem, h: float) -> list[Recursion]:
    m, M, p, distance = problem
    slope = max(1 - m * h, M * h - 1)
    offset = M * math.sqrt(p) * (0.5 * h**2 * math.sqrt(M) + 2 / 3 * math.sqrt(2) * h**1.5)
    found = [Recursion((slope,), (offset,), distance, "synchronous coupling; Dalalyan and Karagulyan (2019)")]
    if h * M <= 1:
        shrunk, added = math.sqrt((1 - m * h) / (1 + m * h)), math.sqrt(2 * M * h**2 * p / (1 + m * h))
        source = "descent of the free energy and Talagrand's inequality; after Durmus, Majewski, Miasojedow (2019)"
        found.append(Recursion((shrunk, 0.0), (0.0, added), distance, source))
    return found


def _randomized_midpoint(problem: Problem, h: float) -> list[Recursion]:
    m, M, p, distance = problem
    # |grad f(x)| and |grad f| along the diffusion from x: at most sqrt(M p) + M x_n in L2
    mean, spread = (M * h) ** 2 * h / 6, M * h**2 / math.sqrt(12)
    slope = (math.exp(-m * h) + mean * M, spread * M, 0.0)
    offset = (
        mean * math.sqrt(M * p) + (M * h) ** 2 * 4 / 15 * math.sqrt(2 * p * h),
        spread * math.sqrt(M * p),
        M * h * math.sqrt(p * h / 3),
    )
    return [Recursion(slope, offset, distance, "mean and fluctuation over U; after Yu, Karagulyan, Dalalyan (2024)")]


def _kinetic(problem: Problem, h: float, g: float, u: float) -> list[Recursion]:
    m, M, p, _ = problem
    _rate(problem, g, u)
    gone = -math.expm1(-g * h)
    lag = (g * h - gone) / g**2 if g * h > 1e-3 else 0.5 * h**2 * (1 - g * h / 3)
    norm = np.array([[1.0, 0.0], [1.0, 2 / g]])

    def stretch(curvature: float) -> float:
        A = np.array([[1 - u * curvature * lag, gone / g], [-u * curvature * gone / g, 1 - gone]])
        return float(np.linalg.norm(norm @ A @ np.linalg.inv(norm), 2))

    # A is affine in the curvature, so its norm is convex and largest at an end
    slope, offset = max(stretch(m), stretch(M)), u * M * math.sqrt(u * p) * h**2 / g
    source = "synchronous coupling; after Cheng et al. (2018), Dalalyan and Riou-Durand (2020)"
    return [Recursion((slope,), (offset,), _start_at_rest(problem, g, u), source)]


def _randomized_midpoint_kinetic(problem: Problem, h: float, g: float, u: float) -> list[Recursion]:
    _, M, p, _ = problem
    rate = _rate(problem, g, u)
    # |v| along the diffusion from (x, v) is at most speed + speed_slope x_n, and |grad f| at most sqrt(M p) + M x_n
    speed, speed_slope = math.sqrt(u * p), g / math.sqrt(2)
    mean = (u * M) ** 2 * h**4 / (12 * g)
    of_gradient = u * h**2 / math.sqrt(6)
    of_speed = 2 * u * M * h**2 / g * (1 / math.sqrt(12) + u * M * h**2 / (6 * math.sqrt(7)))
    slope = (math.exp(-rate * h) + mean * speed_slope, of_gradient * M + of_speed * speed_slope)
    offset = (mean * speed, of_gradient * math.sqrt(M * p) + of_speed * speed)
    source = "mean and fluctuation over U; after Shen and Lee (2019), Yu, Karagulyan, Dalalyan (2024)"
    return [Recursion(slope, offset, _start_at_rest(problem, g, u), source)]


def _rate(problem: Problem, g: float, u: float) -> float:
    """The contraction rate of the kinetic diffusion in |x|^2 + |x + 2 v / gamma|^2."""
    m, M, _, _ = problem
    if g**2 <= u * M:
        raise ValueError(
            f"kinetic bounds need friction^2 > inverse_mass * M, got friction = {g:.4g}, inverse_mass = {u:.4g}, "
            f"M = {M:.4g}; take friction = sqrt(inverse_mass * (m + M)) = {math.sqrt(u * (m + M)):.4g}"
        )
    return min(u * m / g, g - u * M / g)


def _start_at_rest(problem: Problem, g: float, u: float) -> float:
    """The distance at the start in that norm, the velocity being 0 against N(0, u I), independent of x."""
    return math.sqrt(2 * problem.distance**2 + 4 * u * problem.p / g**2)


_THEOREMS: dict[Any, Callable[..., list[Recursion]]] = {
    LMC: _lmc,
    RandomizedMidpoint: _randomized_midpoint,
    KineticLangevin: _kinetic,
    RandomizedMidpointKinetic: _randomized_midpoint_kinetic,
}
_KINETIC = (KineticLangevin, RandomizedMidpointKinetic)
_TWICE = (RandomizedMidpoint, RandomizedMidpointKinetic)
