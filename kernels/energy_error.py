"""Warm-up for kernels without a Metropolis test: the step size whose energy error tells of a bias that is allowed.

After every step from x to x', whatever the scheme, the energy error of a Verlet step between the two is known,

    e = -log pi(x') + log pi(x) + (g + g').(x' - x) / 2 + tau (|g'|^2 - |g|^2) / 4,     g = grad log pi,

with tau = h for overdamped kernels and h^2 u / 2 for kinetic ones; exp(-e) is the Metropolis ratio of LMC and of OBABO.
On N(0, 1/lam) it is tau lam^2 (x'^2 - x^2) / 4, of variance (tau lam)^2 (lam s)^2 (1 - rho^2) / 4, with s the variance
of the chain and rho the correlation of a step. So a bias b = lam s - 1 has its energy variance V(b):

    LMC                        4 b^3 / (1 + b)^2                                                       exact
    Splitting OBABO            4 b^3 / (1 + b)^2                                                       exact
    Splitting BUB              4 (3b)^3 phi
    Splitting UBU              4 (3b/2)^3 phi
    Splitting BAOAB, ABOBA     y^3 (1 + eta) (2 - y (1 + eta)),  y = b / (1 + b)                       exact
    KineticLangevin            (gamma h b)^3 phi / (2 (1 + b))
    RandomizedMidpoint         z^2 (1 - e^(-2z)) / 4,  b = z^3 / 3 / (2 - 2z + z^2 - z^3 / 3)
    ParallelMidpoint           z^2 (1 - e^(-2z)) / 4,  b = z^2 / (3 R^2) + ... <= its exact bias, z <= 1
    RandomizedMidpointKinetic  (24 gamma h b)^(3/2) phi / 16

to leading order in the step, where eta = e^(-gamma h) and phi = 2 (gamma h - 1 + eta) / (gamma h)^2; for UBU b is the
size of a bias that is negative. BAOAB and ABOBA have no bias in x on Gaussians; there b is that of OBABO at the same
step. The step size is then moved until the mean of e^2 / d is V(b),

    log h_{t+1} = log h_t - log(1 + a_t (e_t^2 / (d V(b)) - 1)) / q,    a_t = 0.2, from a quarter on 3 / (t - t_0 + 15)

with q the power of h that e^2 / V grows with: h is the root for a mean of e^2 / h^q over the last part of the warm-up.
Where the metric is learnt too, it is set at the ends of windows, which leave about a quarter of the steps to the step
size alone, and t_0 is the end of the last one.

A step size at which ten steps from the starts lose more than 10 d of log density is halved until they do not: an
unstable chain is soon so far out that no warm-up brings it back.

Far from the bulk, as after a start with an unstable step, e is larger by about

    R = |g|^2 (-(g' - g).(x' - x)) / (d |g' - g|^2),

which in the bulk is at most about 1; there e / R is taken, or the step size would be too small ever to return.

With several directions, V is a mean over them, and convex in b: the mean bias is at most b, that of one direction at
most b d^(1/p), where V is of the order b^p; again to leading order in the step. Off Gaussians the energy error sees
anharmonicity too, but it is no bound.

References:
    Roberts and Rosenthal (1998), doi:10.1111/1467-9868.00123 (the variance of the log ratio).
    Leimkuhler and Matthews (2013), doi:10.1093/amrx/abs010 (BAOAB).
    Robnik, De Luca, Silverstein, Seljak (2023), arXiv:2212.08549 (the energy variance as a target).
"""

from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from bayesinf import errors, pooling
from bayesinf.adaptation import Tuned, Warmup, has_metric, share_step_size
from bayesinf.kernel import Evaluation
from bayesinf.kernels.gaussian_error import MOST_TIMES, parallel_midpoint_scheme
from bayesinf.kernels.kinetic import KineticLangevin, Splitting
from bayesinf.kernels.langevin import LMC
from bayesinf.kernels.parallel_midpoint import ParallelMidpoint
from bayesinf.kernels.precondition import Precondition
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint, RandomizedMidpointKinetic
from bayesinf.kernels.vectors import combine, dot
from bayesinf.windows import Windows

__all__ = ["EnergyError"]

RATE = 0.2
FAR = 100.0  # R, where a chain is taken to be out of the bulk
_NUM_TRIED = 10  # steps from the start, after which an unstable step size shows
_MOST_HALVINGS = 60


class Scheme(NamedTuple):
    """What a kernel's energy error is measured by.

    Attributes:
        tau: of the Verlet step.
        variance: V(b).
        order: q.
    """

    tau: Float[Array, ""]
    variance: Float[Array, ""]
    order: float


class Observed(NamedTuple):
    """Of one step: e^2 / (d V(b)), q, and whether the step was undone or e is not finite."""

    ratio: Float[Array, ""]
    order: Float[Array, ""]
    is_lost: Bool[Array, ""]


class EnergyError(Warmup):
    """Tunes an unadjusted kernel: the step size so that variances are biased by a small share, and the metric.

    For LMC, RandomizedMidpoint, ParallelMidpoint, KineticLangevin, RandomizedMidpointKinetic, Splitting with the words
    BAOAB, ABOBA, OBABO, UBU and BUB, and `Precondition` of these, whose metric is learnt in windows as `Window` does.
    UBU and ABOBA spend two more gradients in every step of it, which `num_gradients` does not count.

    Args:
        num_warmup: number of steps, that of the run; some hundreds. Before them an unstable step size is halved.
        bias: b in (0, 1), the relative bias of the variances that is allowed, in the mean over the directions of a
            Gaussian.
        is_pooled: find one step size for all chains, the geometric mean of theirs, every 50 steps, and one metric.
        metric: what `Precondition` learns, "diagonal" or "dense"; "given" keeps the scale that it has.

    Attributes:
        windows: in which the metric is learnt; None if it is given.

    Raises:
        ValueError: an argument is out of range, or the kernel is none of these.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.Splitting("OBABO", target, step_size=0.01)
        >>> draws = bi.sample(
        ...     0, kernel, jnp.ones((4, 50)), num_samples=10, num_warmup=1_000, progress=False,
        ...     warmup=bi.kernels.EnergyError(1_000, bias=0.05),
        ... )
        >>> abs(float(draws.tuned.step_size.mean()) - 2 * (0.05 / 1.05) ** 0.5) < 0.02  # where 1 / (1 - h^2 / 4) = 1.05
        True
    """

    num_warmup: Int[Array, ""]
    bias: Float[Array, ""]
    is_pooled: bool = eqx.field(static=True)
    windows: Windows | None

    def __init__(self, num_warmup: int, bias: ArrayLike = 0.01, *, is_pooled: bool = False, metric: str = "diagonal"):
        errors.check_count("num_warmup", num_warmup)
        errors.check_choice("metric", metric, ("diagonal", "dense", "given"))
        self.num_warmup = jnp.asarray(num_warmup)
        self.bias = errors.as_array("bias")(bias)
        errors.check_fraction("bias", self.bias)
        self.is_pooled = is_pooled
        self.windows = None
        if metric != "given":
            options = {"is_dense": metric == "dense", "is_pooled": is_pooled}
            self.windows = Windows(num_warmup, num_last=max(50, num_warmup // 4), **options)

    def prepare(self, kernel: Any, positions: PyTree, num_warmup: int) -> Any:
        _scheme(kernel, self.bias)  # speaks of a kernel that it does not know
        given = kernel.metric
        if self.windows is not None and not self.windows.is_dense and given is not None and given.ndim == 2:
            raise ValueError(
                "metric='diagonal' would drop the correlations of the scale that the kernel has; pass metric='dense' "
                "to learn them anew, or metric='given' to keep them"
            )
        for _ in range(_MOST_HALVINGS):
            if _holds(kernel, positions) >= 0.75:
                break
            kernel = kernel.with_step_size(kernel.step_size / 2)
        return kernel

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        tuned = Tuned(jnp.asarray(kernel.step_size, ravel_pytree(position)[0].dtype))
        if self.windows is None or not has_metric(kernel):
            return tuned
        metric, estimator = self.windows.begin(kernel, position)
        return tuned._replace(inverse_mass_matrix=metric, estimator=estimator)

    def observe(self, kernel: Any, before: Any, after: Any, info: Any) -> Observed:
        scheme = _scheme(kernel, self.bias)
        e, size = _energy_error(kernel, scheme.tau, before, after)
        ratio = e**2 / (size * scheme.variance)
        is_lost = info.is_divergent | ~jnp.isfinite(ratio)
        return Observed(jnp.where(is_lost, 0.0, ratio), jnp.asarray(scheme.order), is_lost)

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Observed) -> Tuned:
        settled = self.num_warmup // 4
        if self.windows is not None and state.inverse_mass_matrix is not None:
            settled = jnp.maximum(settled, jnp.max(self.windows.ends) + 1)
        late = jnp.maximum(step - settled, 0)
        rate = 3 / (late + 3 / RATE)
        # a step that was lost counts like one far too long; none changes the step size by more than half
        ratio = jnp.where(info.is_lost, 10 * 2**info.order, info.ratio)
        factor = jnp.minimum(1 + rate * (ratio - 1), 2**info.order) ** (-1 / info.order)
        state = state._replace(step_size=state.step_size * factor.astype(state.step_size.dtype))
        if self.windows is None or state.inverse_mass_matrix is None:
            return state
        return self.windows.update(state, step, position, _as_it_is)

    def is_metric_new(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        return True if self.windows is None else self.windows.is_end(step)

    def pooling_steps(self) -> set[int]:
        if not self.is_pooled:
            return set()
        return pooling.every(int(self.num_warmup)) | (set() if self.windows is None else self.windows.pooling_steps())

    def pool(self, states: Tuned, step: int) -> Tuned:
        states = share_step_size(states)
        if self.windows is None or states.inverse_mass_matrix is None:
            return states
        return self.windows.pool(states, step, _as_it_is)


def _as_it_is(tuned: Tuned) -> Tuned:
    """What a new metric starts again: nothing, since the step size moves on from where it is."""
    return tuned


@jax.jit
def _holds(kernel: Any, positions: PyTree) -> Float[Array, ""]:
    """The share of chains that some steps do not throw out: whose log density does not fall below the bulk's."""

    def chain(key: Array, position: PyTree) -> Bool[Array, ""]:
        def step(t: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            state, info = kernel.step(jax.random.fold_in(key, t), carry[0])
            return state, carry[1] & ~info.is_divergent

        begun = kernel.init(position)
        state, is_ok = jax.lax.fori_loop(0, _NUM_TRIED, step, (begun, jnp.asarray(True)))
        dim = ravel_pytree(position)[0].size  # in the bulk the log density is dim / 2 below its peak
        return is_ok & (kernel.target.logdensity(state.position) > kernel.target.logdensity(begun.position) - 10 * dim)

    num_chains = jax.tree.leaves(positions)[0].shape[0]
    return jnp.mean(jax.vmap(chain)(jax.random.split(jax.random.key(0), num_chains), positions))


def _energy_error(kernel: Any, tau: Array, before: Any, after: Any) -> tuple[Float[Array, ""], int]:
    """e, and the number of coordinates; e is divided by R far from the bulk."""
    old, new = (_evaluation(kernel, state) for state in (before, after))
    moved = combine((1, after.position), (-1, before.position))
    change = dot(combine((0.5, old.grad), (0.5, new.grad)), moved)
    g, g_new = _gradient(kernel, old), _gradient(kernel, new)
    e = old.logdensity - new.logdensity + change + tau / 4 * (g_new @ g_new - g @ g)

    bent = g - g_new
    distance = (g @ g) * dot(combine((1, old.grad), (-1, new.grad)), moved) / (g.size * (bent @ bent))
    return e / jnp.where(distance > FAR, distance, 1.0), g.size


def _evaluation(kernel: Any, state: Any) -> Evaluation:
    """At the position of a state, where the kernel may not have needed it."""
    known = getattr(state, "evaluation", None)
    return kernel.target.evaluate(state.position, order=1) if known is None else known


def _gradient(kernel: Any, evaluation: Evaluation) -> Float[Array, " d"]:
    """The gradient in the coordinates that the kernel moves in."""
    flat, _ = ravel_pytree(evaluation.grad)
    while isinstance(kernel, Precondition):
        if kernel.scale is not None:
            scale = kernel.scale.astype(flat.dtype)
            flat = scale * flat if scale.ndim == 1 else scale.T @ flat
        kernel = kernel.kernel
    return flat


def _scheme(kernel: Any, bias: ArrayLike) -> Scheme:
    b = jnp.asarray(bias)
    while isinstance(kernel, Precondition):
        kernel = kernel.kernel
    match kernel:
        case LMC():
            return Scheme(kernel.step_size, 4 * b**3 / (1 + b) ** 2, 3)
        case ParallelMidpoint(num_sweeps=num) if num > 2:
            if kernel.num_sweeps**kernel.num_nodes > MOST_TIMES:
                raise ValueError(
                    f"EnergyError tunes ParallelMidpoint for num_sweeps^num_nodes of at most {MOST_TIMES}, got "
                    f"{kernel.num_sweeps}^{kernel.num_nodes}: its bias is not known for more; take fewer nodes"
                )
            z = _longest(b, kernel.num_nodes, kernel.num_sweeps)
            return Scheme(kernel.step_size, -(z**2) * jnp.expm1(-2 * z) / 4, 3)
        case RandomizedMidpoint() | ParallelMidpoint():
            z = (6 * b) ** (1 / 3)
            for _ in range(10):  # b = 0.1 is met to a millionth
                z = (3 * b * (2 - 2 * z + z**2 - z**3 / 3)) ** (1 / 3)
            return Scheme(kernel.step_size, -(z**2) * jnp.expm1(-2 * z) / 4, 3)
        case KineticLangevin():
            tau, a, _, phi = _kinetic(kernel)
            return Scheme(tau, (a * b) ** 3 * phi / (2 * (1 + b)), 3)
        case RandomizedMidpointKinetic():
            tau, a, _, phi = _kinetic(kernel)
            return Scheme(tau, (24 * a * b) ** 1.5 * phi / 16, 4.5)
        case Splitting(word="OBABO"):
            return Scheme(_kinetic(kernel)[0], 4 * b**3 / (1 + b) ** 2, 6)
        case Splitting(word="BUB" | "UBU"):
            tau, _, _, phi = _kinetic(kernel)
            return Scheme(tau, 4 * ((3 if kernel.word == "BUB" else 1.5) * b) ** 3 * phi, 6)
        case Splitting(word="BAOAB" | "ABOBA"):
            tau, _, eta, _ = _kinetic(kernel)
            y = b / (1 + b)
            return Scheme(tau, y**3 * (1 + eta) * (2 - y * (1 + eta)), 6)
    word = f"({kernel.word!r})" if isinstance(kernel, Splitting) else ""
    raise ValueError(
        "warmup=EnergyError(...) knows LMC, RandomizedMidpoint, ParallelMidpoint, KineticLangevin, "
        "RandomizedMidpointKinetic and Splitting with the words BAOAB, ABOBA, OBABO, UBU and BUB, got "
        f"{type(kernel).__name__}{word}"
    )


def _longest(b: Array, num_nodes: int, num_sweeps: int) -> Array:
    """The z = h lam up to which the exact bias of `ParallelMidpoint` stays below b; at most 1, or sweeps diverge."""
    log_z, log_bias = _bias_table(num_nodes, num_sweeps)
    return jnp.exp(jnp.interp(jnp.log(b), log_bias, log_z))


@cache  # every trace asks for it
def _bias_table(num_nodes: int, num_sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """Log z, and the log of the largest bias up to there."""
    grid = np.geomspace(1e-4, 1.0, 65)
    squared, noise = parallel_midpoint_scheme(grid, 1.0, num_nodes, num_sweeps).second_moment_map()
    with np.errstate(divide="ignore"):
        biases = grid * noise[:, 0] / np.maximum(1 - squared[:, 0, 0], 0.0) - 1
    return np.log(grid), np.log(np.maximum.accumulate(np.abs(biases) + 1e-12 * grid))  # so far, and growing


def _kinetic(kernel: Any) -> tuple[Array, Array, Array, Array]:
    """tau, gamma h, eta and phi."""
    h, a = kernel.step_size, kernel.friction * kernel.step_size
    # the series where the closed form cancels
    series = 1 - a / 3 + a**2 / 12 - a**3 / 60 + a**4 / 360
    closed = 2 * (a + jnp.expm1(-a)) / jnp.where(a > 0.1, a, 1.0) ** 2
    return h**2 * kernel.inverse_mass / 2, a, jnp.exp(-a), jnp.where(a > 0.1, closed, series)
