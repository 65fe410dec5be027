"""Warm-up of microcanonical Langevin Monte Carlo: BlackJAX's three phases, step by step inside the compiled loop.

    1, 2   step size      eps = (sum w r / sum w)^(-1/6),   r = xi / eps^6,   xi = Delta E^2 / (d V) + 10^-8
       2   metric         C = the variances of the positions, weighted by eps;     L = sqrt(d)
           step size      once more, with the new metric
       3   L              0.4 eps times the mean integrated autocorrelation time of the coordinates

Delta E^2 / d has mean proportional to eps^6, so r tells of the step size at which it is V from any other. The weights
w = exp(-(log xi)^2 / (2 9^2)) prefer steps near it, and are forgotten over about 75 steps; a step that was undone
bounds eps by 0.8 of its own. Without a metric, L = sqrt(sum of the variances) after phase 2.

What differs from BlackJAX: the chain need not stop for it, so that it is resumed and drawn like any other warm-up;
variances are added up without a difference of large squares; and when the metric is set, the step size is put into its
units, without which the chain would be thrown out of the bulk of a wide target.

References:
    Robnik, De Luca, Silverstein, Seljak (2023), arXiv:2212.08549, section 4.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from bayesinf import errors
from bayesinf.adaptation import Warmup
from bayesinf.kernel import select

__all__ = ["MCLMCTuned", "MCLMCWarmup"]

MEMORY = 150.0
TRUST = 1.5
LENGTH = 0.4  # L in units of the path between independent draws


class Search(NamedTuple):
    """Of the step size: the weights, what they weigh, and a bound from steps that were undone."""

    weight: Float[Array, ""]
    sum: Float[Array, ""]
    largest: Float[Array, ""]


class Moments(NamedTuple):
    """Weight, weighted mean and weighted sum of squared deviations of the positions."""

    weight: Float[Array, ""]
    mean: Float[Array, " d"]
    squares: Float[Array, " d"]


class MCLMCTuned(NamedTuple):
    """What the warm-up has found for one chain.

    Attributes:
        step_size, L: to use next.
        inverse_mass_matrix: to use next, shape (d,).
        search, moments: where the phases stand.
        path: the positions of the third phase.
    """

    step_size: Float[Array, ""]
    L: Float[Array, ""]
    inverse_mass_matrix: Float[Array, " d"]
    search: Search
    moments: Moments
    path: Float[Array, "t d"]


class MCLMCWarmup(Warmup):
    """Finds `step_size`, `L` and the metric of `kernels.MCLMC`, for each chain.

    Args:
        num_warmup: number of steps, at least 20, that of the run; three tenths of them go into each phase.
        energy_variance: V > 0, variance of the energy change of a step over the number of coordinates. The bias of the
            variances falls like V^(1/3).
        is_diagonal: learn a metric; else C stays the identity. Static.

    Raises:
        ValueError: an argument is out of range, or the kernel is not `kernels.MCLMC`.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> scale = jnp.array([1.0, 10.0, 100.0])
        >>> target = bi.Target(lambda x, scale: -0.5 * jnp.sum((x / scale) ** 2), scale)
        >>> kernel = bi.kernels.MCLMC(target, step_size=1.0, L=2.0)
        >>> draws = bi.sample(
        ...     0, kernel, jnp.ones((4, 3)), num_samples=10, num_warmup=600, progress=False,
        ...     warmup=bi.kernels.MCLMCWarmup(600, energy_variance=1e-4),
        ... )
        >>> draws.tuned.L.shape
        (4,)
    """

    SHORTEST: ClassVar[int] = 20

    energy_variance: Float[Array, ""]
    num_warmup: int = eqx.field(static=True)
    is_diagonal: bool = eqx.field(static=True)

    def __init__(self, num_warmup: int, energy_variance: ArrayLike = 5e-4, *, is_diagonal: bool = True):
        self.num_warmup = errors.check_count("num_warmup", num_warmup, minimum=self.SHORTEST)
        self.energy_variance = errors.as_array("energy_variance")(energy_variance)
        errors.check_positive_scalar("energy_variance", self.energy_variance)
        self.is_diagonal = is_diagonal

    @property
    def phases(self) -> tuple[int, int, int]:
        """The steps before which the step size alone, the metric, and the step size again have been found."""
        share = 0.3 if self.is_diagonal else 1 / 3
        first = second = round(share * self.num_warmup)
        again = round(second / 3) if self.is_diagonal else 0
        return first, first + second, first + second + again

    def prepare(self, kernel: Any, positions: PyTree, num_warmup: int) -> Any:
        if not hasattr(kernel, "L"):
            raise ValueError(f"warmup=MCLMCWarmup(...) is for kernels.MCLMC alone, got {type(kernel).__name__}")
        return kernel

    def init(self, kernel: Any, position: PyTree) -> MCLMCTuned:
        flat, _ = ravel_pytree(position)
        zero = jnp.zeros((), flat.dtype)
        metric = jnp.ones_like(flat) if kernel.inverse_mass_matrix is None else kernel.inverse_mass_matrix
        return MCLMCTuned(
            jnp.asarray(kernel.step_size, flat.dtype),
            jnp.asarray(kernel.L, flat.dtype),
            jnp.asarray(metric, flat.dtype),
            _start_search(flat.dtype),
            Moments(zero, jnp.zeros_like(flat), jnp.zeros_like(flat)),
            jnp.zeros((self.num_warmup - self.phases[-1], flat.size), flat.dtype),
        )

    def apply(self, kernel: Any, state: MCLMCTuned) -> Any:
        return dataclasses.replace(
            kernel, step_size=state.step_size, L=state.L, inverse_mass_matrix=state.inverse_mass_matrix
        )

    def update(self, state: MCLMCTuned, step: Int[Array, ""], position: PyTree, info: Any) -> MCLMCTuned:
        first, second, third = self.phases
        flat, _ = ravel_pytree(position)

        searched = self._search(state, info, flat.size)
        state = select(step < third, searched, state)
        weight = jnp.where((step >= first) & (step < second) & ~info.is_divergent, state.step_size, 0.0)
        state = state._replace(moments=_weigh(state.moments, weight, flat))
        state = select(step == second - 1, self._measured(state), state)

        # phases before the third write where the first of its positions will stand
        path = state.path.at[jnp.maximum(step - third, 0)].set(flat)
        state = state._replace(path=path)
        length = jax.lax.cond(step == self.num_warmup - 1, _decorrelating_length, lambda state: state.L, state)
        return state._replace(L=length)

    def _search(self, state: MCLMCTuned, info: Any, size: int) -> MCLMCTuned:
        """One more energy change, and the step size that all of them ask for."""
        eps, search = state.step_size, state.search
        largest = jnp.where(info.is_divergent, 0.8 * eps, search.largest)
        xi = jnp.square(info.energy_change) / (size * self.energy_variance) + 1e-8
        weight = jnp.exp(-0.5 * jnp.square(jnp.log(xi) / (6 * TRUST)))
        keep = (MEMORY - 1) / (MEMORY + 1)
        search = Search(keep * search.weight + weight, keep * search.sum + weight * xi / eps**6, largest)
        found = jnp.minimum((search.sum / search.weight) ** (-1 / 6), largest)
        return state._replace(step_size=found, search=search)

    def _measured(self, state: MCLMCTuned) -> MCLMCTuned:
        """What follows from the variances, where every coordinate has moved."""
        squares, weight = state.moments.squares, state.moments.weight
        is_known = jnp.all(squares > 0) & (weight > 0)
        variances = jnp.where(is_known, squares / jnp.where(is_known, weight, 1.0), 1.0)
        if not self.is_diagonal:
            return select(is_known, state._replace(L=jnp.sqrt(jnp.sum(variances))), state)
        length = jnp.sqrt(jnp.asarray(variances.size, variances.dtype))
        measured = state._replace(
            step_size=state.step_size * length / jnp.sqrt(jnp.sum(variances / state.inverse_mass_matrix)),
            L=length,
            inverse_mass_matrix=variances,
            search=_start_search(variances.dtype),
        )
        return select(is_known, measured, state)


def _start_search(dtype: Any) -> Search:
    zero = jnp.zeros((), dtype)
    return Search(zero, zero, jnp.full((), jnp.inf, dtype))


def _weigh(moments: Moments, weight: Float[Array, ""], x: Float[Array, " d"]) -> Moments:
    """The moments with one more position; a weight of zero changes nothing."""
    total = moments.weight + weight
    share = weight / jnp.where(total > 0, total, 1.0)
    mean = moments.mean + share * (x - moments.mean)
    return Moments(total, mean, moments.squares + weight * (x - moments.mean) * (x - mean))


def _decorrelating_length(state: MCLMCTuned) -> Float[Array, ""]:
    from blackjax.diagnostics import effective_sample_size

    times = state.path.shape[0] / effective_sample_size(state.path[None])
    is_known = jnp.isfinite(times)
    length = LENGTH * state.step_size * jnp.mean(times, where=is_known)
    return jnp.where(jnp.any(is_known), length, state.L).astype(state.L.dtype)
