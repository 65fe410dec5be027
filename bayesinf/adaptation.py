"""Warm-up: tunes a kernel's step size and metric while the chain runs, each chain for itself or all together.

A warm-up is three pure functions that the driver calls inside its compiled loop,

    init(kernel, position) -> state,   update(state, step, position, info) -> state,   apply(kernel, state) -> kernel,

so it is resumed, checkpointed and vmapped like the chain. `prepare` is called once before, on the host; `observe` is
there for warm-ups that need more of a step than its info, and `pool` for what chains learn from one another. `StepSize`
serves every kernel that names a `target_acceptance`; `Window` is Stan's schedule for kernels with a metric as well.
Both are assembled from BlackJAX's dual averaging, Welford estimator and window schedule (`windows`).

References:
    Nesterov (2009), doi:10.1007/s10107-007-0149-x; Hoffman and Gelman (2014), arXiv:1111.4246 (dual averaging).
    Stan reference manual, "Adaptation" (windows).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors, pooling
from bayesinf.kernel import Kernel
from bayesinf.windows import Tuned, Windows, strong

__all__ = ["StepSize", "Tuned", "Warmup", "Window", "default_warmup", "has_metric", "share_step_size"]


class Warmup(eqx.Module):
    """Abstract warm-up of `num_warmup` steps; concrete ones are final, pytrees, and pure but for `prepare`."""

    def prepare(self, kernel: Any, positions: PyTree, num_warmup: int) -> Any:
        """The kernel that the run begins with, given all starting positions; on the host, once. Here: as it is."""
        return kernel

    @abc.abstractmethod
    def init(self, kernel: Any, position: PyTree) -> Any:
        """The state before the first step: a `Tuned`, or what else has a `step_size`."""

    def observe(self, kernel: Any, before: Any, after: Any, info: Any) -> Any:
        """What `update` is told of a step of `kernel` between two of its states. Here: its info."""
        return info

    @abc.abstractmethod
    def update(self, state: Any, step: Int[Array, ""], position: PyTree, info: Any) -> Any:
        """The state after warm-up step number `step`."""

    def pooling_steps(self) -> set[int]:
        """The numbers of steps after which `pool` is called. Here: none."""
        return set()

    def pool(self, states: Any, step: int) -> Any:
        """The states of all chains after `step` steps, from all that they know; leaves have a leading axis of chains.

        On the host, between two chunks that end there. Here: as they are.
        """
        return states

    def apply(self, kernel: Any, state: Any) -> Any:
        """The kernel with the parameters of `state`."""
        kernel = kernel.with_step_size(state.step_size)
        if state.inverse_mass_matrix is None:
            return kernel
        return kernel.with_metric(state.inverse_mass_matrix)

    def is_metric_new(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether `update` changes more than the step size at this step. Here: True, which is always right."""
        return True


class StepSize(Warmup):
    """Dual averaging of the step size towards a target acceptance rate.

        x_{t+1} = mu - sqrt(t) / gamma * sum_{i<=t} (target - alpha_i) / (t + t0),   log step = x
        xbar_t = t^-kappa x_t + (1 - t^-kappa) xbar_{t-1},   at the end log step = xbar

    with alpha_t the acceptance rate of step t, mu = log(10 * step size of the kernel), gamma = 0.05, t0 = 10 and
    kappa = 0.75. Where a kernel has several step sizes, each follows its own of the `acceptance_rates` of the info.

    Args:
        num_warmup: number of steps, at least 1; that of the run.
        target_acceptance: in (0, 1).
        is_pooled: find one step size for all chains, by averaging every 50 steps what they have found. Static.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.adaptation import StepSize
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.01)
        >>> draws = bi.sample(
        ...     0, kernel, jnp.zeros((4, 2)), num_samples=10, num_warmup=500, warmup=StepSize(500, 0.7), progress=False
        ... )
        >>> bool(jnp.all(draws.tuned.step_size > 0.1))
        True

    References:
        Hoffman and Gelman (2014), Journal of Machine Learning Research 15, arXiv:1111.4246, section 3.2.
    """

    num_warmup: Int[Array, ""] = eqx.field(converter=errors.as_array("num_warmup"))
    target_acceptance: Float[Array, ""] = eqx.field(converter=errors.as_array("target_acceptance"))
    is_pooled: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        errors.check_fraction("target_acceptance", self.target_acceptance)
        if not jnp.issubdtype(self.num_warmup.dtype, jnp.integer):
            raise ValueError(f"num_warmup must be a whole number, got {self.num_warmup}")
        if errors.is_concrete(self.num_warmup) and int(self.num_warmup) < 1:
            raise ValueError(f"num_warmup must be at least 1, got {int(self.num_warmup)}")

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        dtype = ravel_pytree(position)[0].dtype
        step_size = jnp.asarray(kernel.step_size, dtype)
        return self._begin(step_size)

    def restart(self, tuned: Tuned) -> Tuned:
        """Begins anew, at the average of the step sizes so far."""
        _, _, final = _dual_averaging(self.target_acceptance)
        begun = self._begin(final(tuned.averaging))
        return tuned._replace(step_size=begun.step_size, averaging=begun.averaging)

    def _begin(self, step_size: Float[Array, "..."]) -> Tuned:
        init, _, _ = _dual_averaging(self.target_acceptance)
        averaging = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, step_size.shape), init(step_size))
        return Tuned(step_size, averaging=strong(averaging))

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Any) -> Tuned:
        _, advance, final = _dual_averaging(self.target_acceptance)
        rate = info.acceptance_rate
        if state.step_size.ndim:
            rate = getattr(info, "acceptance_rates", rate)
        averaging = advance(state.averaging, rate)
        is_last = step == self.num_warmup - 1
        step_size = jnp.where(is_last, final(averaging), jnp.exp(averaging.log_step_size))
        moved = state._replace(step_size=step_size, averaging=averaging)
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), moved, state)

    def pooling_steps(self) -> set[int]:
        return pooling.every(int(self.num_warmup)) if self.is_pooled else set()

    def pool(self, states: Tuned, step: int) -> Tuned:
        return share_step_size(states)


class Window(Warmup):
    """Stan's window adaptation: the step size always, the metric in windows that double in length.

        metric = n / (n + 5) S + 5 / (n + 5) 10^-3 I

    with S the covariance of the n positions of a window, or its diagonal. At the end of a window the metric is set, and
    the averaging of the step size starts again from what it has found. For kernels with a metric: HMC, NUTS, and
    `kernels.Precondition`.

    Args:
        num_warmup: number of steps, that of the run; of fewer than 20 no window fits, and only the step size is tuned.
        target_acceptance: in (0, 1).
        is_dense: learn the whole covariance rather than its diagonal. Until the first window ends the metric is that of
            the kernel, or its diagonal.
        is_pooled: learn one metric from the windows of all chains together, and one step size for all of them. With
            many chains a short warm-up then suffices.

    Attributes:
        step_sizes: how the step size is tuned.
        windows: where the windows lie.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.adaptation import Window
        >>> warmup = Window(1_000, is_dense=True)  # for bi.sample(..., num_warmup=1_000, warmup=warmup)
        >>> [step for step in warmup.windows.ends.tolist() if step >= 0]
        [99, 149, 249, 449, 949]
        >>> sorted(Window(150, is_pooled=True).pooling_steps())  # the window ends after 100 steps
        [50, 100, 150]

    References:
        Stan reference manual, "Adaptation".
    """

    step_sizes: StepSize
    windows: Windows

    def __init__(
        self, num_warmup: int, target_acceptance: float = 0.8, *, is_dense: bool = False, is_pooled: bool = False
    ):
        self.windows = Windows(num_warmup, is_dense=is_dense, is_pooled=is_pooled)
        self.step_sizes = StepSize(num_warmup, target_acceptance, is_pooled)  # type: ignore[arg-type]

    @property
    def num_warmup(self) -> Int[Array, ""]:
        return self.step_sizes.num_warmup

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        metric, estimator = self.windows.begin(kernel, position)
        return self.step_sizes.init(kernel, position)._replace(inverse_mass_matrix=metric, estimator=estimator)

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Any) -> Tuned:
        averaged = self.step_sizes.update(state, step, position, info)
        return self.windows.update(averaged, step, position, self.step_sizes.restart)

    def is_metric_new(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        return self.windows.is_end(step)

    def pooling_steps(self) -> set[int]:
        return self.step_sizes.pooling_steps() | self.windows.pooling_steps()

    def pool(self, states: Tuned, step: int) -> Tuned:
        return self.windows.pool(self.step_sizes.pool(states, step), step, self.step_sizes.restart)


def default_warmup(kernel: Any, num_warmup: int) -> Warmup | None:
    """The warm-up that suits a kernel; what `sample` uses unless told otherwise.

    Args:
        kernel: any kernel.
        num_warmup: number of steps, at least 0.

    Returns:
        The kernel's own (`suited_warmup`); `Window` for a kernel with a metric and at least 20 steps, else `StepSize`;
        None where there is nothing to tune, so that the steps are only discarded.

    Example:
        >>> import bayesinf as bi
        >>> from bayesinf.adaptation import default_warmup
        >>> target = bi.Target(lambda x: -0.5 * x @ x)
        >>> type(default_warmup(bi.kernels.MALA(target, 0.1), 500)).__name__
        'StepSize'
        >>> default_warmup(bi.kernels.LMC(target, 0.1), 500) is None
        True
    """
    target = getattr(kernel, "target_acceptance", None)
    own = kernel.suited_warmup(num_warmup) if isinstance(kernel, Kernel) and num_warmup else None
    if num_warmup == 0 or own is not None or target is None:
        return own
    if has_metric(kernel) and num_warmup >= 20:
        return Window(num_warmup, target)
    return StepSize(num_warmup, target)


def share_step_size(states: Tuned) -> Tuned:
    """The states of all chains with the geometric mean of their step sizes, and the mean of their averaging.

    Dual averaging is linear in the acceptance rates: between chains with a common step size it goes on as if each had
    seen the mean rate of all.
    """
    common = (pooling.geometric_mean(states.step_size), pooling.mean(states.averaging))
    step_size, averaging = pooling.for_all_chains(common, (states.step_size, states.averaging))
    return states._replace(step_size=step_size, averaging=averaging)


def has_metric(kernel: Any) -> bool:
    """Whether a kernel has a metric to tune."""
    return isinstance(kernel, Kernel) and kernel.has_metric


def _dual_averaging(target: Float[Array, ""]) -> Any:
    from blackjax.adaptation.step_size import dual_averaging_adaptation  # its import starts the XLA backend

    return dual_averaging_adaptation(target)  # type: ignore[arg-type]
