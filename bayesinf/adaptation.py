"""Warm-up: tunes a kernel's step size and metric while the chain runs, each chain for itself or all together.

A warm-up is three pure functions that the driver calls inside its compiled loop,

    init(kernel, position) -> state,   update(state, step, position, info) -> state,   apply(kernel, state) -> kernel,

so it is resumed, checkpointed and vmapped like the chain. `prepare` is called once before, on the host; `observe` is
there for warm-ups that need more of a step than its info, and `pool` for what chains learn from one another. `StepSize`
serves every kernel that names a `target_acceptance`; `Window` is Stan's schedule for kernels with a metric as well.
Both are assembled from BlackJAX's dual averaging, Welford estimator and window schedule.

References:
    Nesterov (2009), doi:10.1007/s10107-007-0149-x; Hoffman and Gelman (2014), arXiv:1111.4246 (dual averaging).
    Stan reference manual, "Adaptation" (windows).
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors, pooling
from bayesinf.kernel import Kernel, select

__all__ = ["StepSize", "Tuned", "Warmup", "Window", "default_warmup", "has_metric", "share_step_size"]


class Tuned(NamedTuple):
    """What a warm-up has found for one chain; `Draws.tuned` holds it with a leading axis of chains.

    Attributes:
        step_size: the step size to use next; a scalar, or one for each of several replicas.
        inverse_mass_matrix: the metric to use next, the covariance of the target, shape (p, p), or its diagonal, shape
            (p,), for p coordinates; None where only the step size is tuned.
        averaging: state of the dual averaging.
        estimator: state of the running covariance.
    """

    step_size: Float[Array, "..."]
    inverse_mass_matrix: Float[Array, "..."] | None = None
    averaging: PyTree = None
    estimator: PyTree = None


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
        if errors.is_concrete(self.num_warmup) and int(self.num_warmup) < 1:
            raise ValueError(f"num_warmup must be at least 1, got {int(self.num_warmup)}")

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        dtype = ravel_pytree(position)[0].dtype
        step_size = jnp.asarray(kernel.step_size, dtype)
        return Tuned(step_size, averaging=_start_averaging(self.target_acceptance, step_size))

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Any) -> Tuned:
        is_last = step == self.num_warmup - 1
        return _average(self.target_acceptance, state, info, is_last)

    def pooling_steps(self) -> set[int]:
        return pooling.every(int(self.num_warmup)) if self.is_pooled else set()

    def pool(self, states: Tuned, step: int) -> Tuned:
        return share_step_size(states)


class Window(Warmup):
    """Stan's window adaptation: the step size always, the metric in windows that double in length.

        metric = n / (n + 5) S + 5 / (n + 5) 10^-3 I

    with S the covariance of the n positions of a window, or its diagonal. At the end of a window the metric is set, and
    the averaging of the step size starts again. For kernels with a metric: HMC, NUTS, and `kernels.Precondition`.

    Args:
        num_warmup: number of steps, that of the run; of fewer than 20 no window fits, and only the step size is tuned.
        target_acceptance: in (0, 1).
        is_dense: learn the whole covariance rather than its diagonal. Static.
        is_pooled: learn one metric from the windows of all chains together, and one step size for all of them. With
            many chains a short warm-up then suffices. Static.

    Attributes:
        schedule: of every step, whether its position counts for the metric and whether a window ends; 0 or 1, shape
            (num_warmup, 2).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.adaptation import Window
        >>> warmup = Window(1_000, is_dense=True)  # for bi.sample(..., num_warmup=1_000, warmup=warmup)
        >>> jnp.flatnonzero(warmup.schedule[:, 1]).tolist()
        [99, 149, 249, 449, 949]
        >>> sorted(Window(150, is_pooled=True).pooling_steps())  # the window ends after 100 steps
        [50, 100, 150]

    References:
        Stan reference manual, "Adaptation".
    """

    schedule: Int[Array, "t 2"]
    target_acceptance: Float[Array, ""]
    is_dense: bool = eqx.field(static=True)
    is_pooled: bool = eqx.field(static=True)

    def __init__(
        self, num_warmup: int, target_acceptance: float = 0.8, *, is_dense: bool = False, is_pooled: bool = False
    ):
        from blackjax.adaptation.window_adaptation import build_schedule

        errors.check_count("num_warmup", num_warmup)
        self.schedule = jnp.asarray(np.asarray(build_schedule(num_warmup), np.int32).reshape(num_warmup, 2))
        self.target_acceptance = jnp.asarray(target_acceptance)
        errors.check_fraction("target_acceptance", self.target_acceptance)
        self.is_dense = is_dense
        self.is_pooled = is_pooled

    @property
    def num_warmup(self) -> int:
        return self.schedule.shape[0]

    def init(self, kernel: Any, position: PyTree) -> Tuned:
        flat, _ = ravel_pytree(position)
        init_metric, _, _ = _welford(self.is_dense)
        step_size = jnp.asarray(kernel.step_size, flat.dtype)
        estimator = _strong(init_metric(flat.size))
        metric = jnp.eye(flat.size, dtype=flat.dtype) if self.is_dense else jnp.ones_like(flat)
        return Tuned(step_size, metric, _start_averaging(self.target_acceptance, step_size), estimator)

    def update(self, state: Tuned, step: Int[Array, ""], position: PyTree, info: Any) -> Tuned:
        _, update_metric, end_window = _welford(self.is_dense)
        is_slow, is_window_end = self._row(step)

        averaged = _average(self.target_acceptance, state, info, step == self.num_warmup - 1)
        estimator = select(is_slow == 1, update_metric(state.estimator, position), state.estimator)
        if self.is_pooled:  # windows end in `pool`
            return averaged._replace(estimator=estimator)
        ended = end_window(estimator)
        # a new metric asks for a new step size: the averaging starts again from the present one
        averaging = _start_averaging(self.target_acceptance, averaged.step_size)
        restarted = Tuned(averaged.step_size, ended.inverse_mass_matrix, averaging, ended)
        return select(is_window_end == 1, restarted, averaged._replace(estimator=estimator))

    def is_metric_new(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        return (self._row(step)[1] == 1) & (not self.is_pooled)

    def pooling_steps(self) -> set[int]:
        if not self.is_pooled:
            return set()
        return pooling.every(self.num_warmup) | {int(step) + 1 for step in np.flatnonzero(self.schedule[:, 1])}

    def pool(self, states: Tuned, step: int) -> Tuned:
        states = share_step_size(states)
        if self.schedule[step - 1, 1] == 0:
            return states
        _, _, end_window = _welford(self.is_dense)
        one: Tuned = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), states)
        merged = pooling.merge_welford(states.estimator.wc_state)
        ended = _strong(end_window(one.estimator._replace(wc_state=jax.tree.map(jnp.asarray, merged))))
        averaging = _start_averaging(self.target_acceptance, one.step_size)
        restarted = Tuned(one.step_size, ended.inverse_mass_matrix, averaging, ended)
        restarted = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), restarted, one)
        return pooling.for_all_chains(restarted, states)

    def _row(self, step: Int[Array, ""]) -> Int[Array, " 2"]:
        return self.schedule[jnp.minimum(step, self.num_warmup - 1)]


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


def _start_averaging(target: Float[Array, ""], step_size: Float[Array, "..."]) -> PyTree:
    init, _, _ = _dual_averaging(target)
    return _strong(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, step_size.shape), init(step_size)))


def _average(target: Float[Array, ""], state: Tuned, info: Any, is_last: Array) -> Tuned:
    _, update, final = _dual_averaging(target)
    rate = (
        info.acceptance_rate if state.step_size.ndim == 0 else getattr(info, "acceptance_rates", info.acceptance_rate)
    )
    averaging = update(state.averaging, rate)
    step_size = jnp.where(is_last, final(averaging), jnp.exp(averaging.log_step_size))
    moved = Tuned(step_size, state.inverse_mass_matrix, averaging, state.estimator)
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), moved, state)


# BlackJAX is imported inside functions: importing it starts the XLA backend


def _dual_averaging(target: Float[Array, ""]) -> Any:
    from blackjax.adaptation.step_size import dual_averaging_adaptation

    return dual_averaging_adaptation(target)  # type: ignore[arg-type]


def _welford(is_dense: bool) -> Any:
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    return mass_matrix_adaptation(is_diagonal_matrix=not is_dense)


def _strong(tree: PyTree) -> PyTree:
    """Arrays without weak types, so that the loop's carry keeps its types."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), tree)
