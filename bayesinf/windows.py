"""The windows of a warm-up: stretches that double in length, at the end of each of which a metric is learnt.

    metric = n / (n + 5) S + 5 / (n + 5) 10^-3 I

with S the covariance of the n positions of the window, or its diagonal. The schedule is Stan's: the first steps belong
to no window, since the chain is not yet where it should be, nor do the last ones, which tune the step size to the last
metric. Assembled from BlackJAX's schedule and Welford estimator.

References:
    Stan reference manual, "Adaptation".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import errors, pooling
from bayesinf.kernel import select

__all__ = ["Tuned", "Windows", "strong"]

_MOST = 32  # windows, of which each is as long as all before: so that every schedule has one shape


class Tuned(NamedTuple):
    """What a warm-up has found for one chain; `Draws.tuned` holds it with a leading axis of chains.

    Attributes:
        step_size: the step size to use next; a scalar, or one for each of several replicas.
        inverse_mass_matrix: the metric to use next, the covariance of the target, shape (p, p), or its diagonal, shape
            (p,), for p coordinates; None where only the step size is tuned.
        averaging: state of the averaging of the step size.
        estimator: state of the running covariance.
    """

    step_size: Float[Array, "..."]
    inverse_mass_matrix: Float[Array, "..."] | None = None
    averaging: PyTree = None
    estimator: PyTree = None


class Windows(eqx.Module):
    """When a metric is learnt, and from what.

    Args:
        num_warmup: number of steps; of fewer than 20 no window fits.
        is_dense: learn the whole covariance rather than its diagonal. Static.
        is_pooled: learn it from the windows of all chains together. Static.
        num_last: steps after the last window, unless `num_warmup` is short.

    Attributes:
        first: the first step of the first window.
        ends: the last step of each window, ascending, and -1 where there are no more.
    """

    first: Int[Array, ""]
    ends: Int[Array, " w"]
    is_dense: bool = eqx.field(static=True)
    is_pooled: bool = eqx.field(static=True)

    def __init__(self, num_warmup: int, *, is_dense: bool = False, is_pooled: bool = False, num_last: int = 50):
        from blackjax.adaptation.window_adaptation import build_schedule

        errors.check_count("num_warmup", num_warmup)
        schedule = np.asarray(build_schedule(num_warmup, final_buffer_size=num_last), np.int32).reshape(-1, 2)
        in_window, ends = (np.flatnonzero(column) for column in schedule.T)
        self.first = jnp.asarray(in_window[0] if len(in_window) else num_warmup, jnp.int32)
        self.ends = jnp.asarray(np.pad(ends, (0, _MOST - len(ends)), constant_values=-1), jnp.int32)
        self.is_dense = is_dense
        self.is_pooled = is_pooled

    def begin(self, kernel: Any, position: PyTree) -> tuple[Float[Array, "..."], PyTree]:
        """The metric that the kernel has, until a window ends, and an estimator that has seen nothing."""
        flat, _ = ravel_pytree(position)
        init, _, _ = _welford(self.is_dense)
        metric = jnp.ones_like(flat) if kernel.metric is None else jnp.asarray(kernel.metric, flat.dtype)
        if metric.ndim < 2 and self.is_dense:
            metric = jnp.diag(jnp.broadcast_to(metric, flat.shape))
        elif metric.ndim == 2 and not self.is_dense:
            metric = jnp.diagonal(metric)
        return metric, strong(init(flat.size))

    def is_end(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a chain sets its metric at this step; where it is learnt together, `pool` does."""
        return jnp.any(step == self.ends) & (not self.is_pooled)

    def update(self, tuned: Tuned, step: Int[Array, ""], position: PyTree, restart: Callable[[Tuned], Tuned]) -> Tuned:
        """`tuned` with the position of this step learnt, and at the end of a window with its metric.

        Args:
            tuned: with the step size and its averaging after this step.
            step: its number.
            position: where the chain is.
            restart: begins the averaging of the step size anew; a new metric asks for another.
        """
        _, learn, end = _welford(self.is_dense)
        is_inside = (step >= self.first) & (step <= jnp.max(self.ends))
        estimator = select(is_inside, learn(tuned.estimator, position), tuned.estimator)
        if self.is_pooled:
            return tuned._replace(estimator=estimator)
        ended = end(estimator)
        restarted = restart(tuned)._replace(inverse_mass_matrix=ended.inverse_mass_matrix, estimator=ended)
        return select(self.is_end(step), restarted, tuned._replace(estimator=estimator))

    def pooling_steps(self) -> set[int]:
        """Numbers of steps after which windows end for all chains together."""
        return {int(step) + 1 for step in np.asarray(self.ends) if step >= 0} if self.is_pooled else set()

    def pool(self, states: Tuned, step: int, restart: Callable[[Tuned], Tuned]) -> Tuned:
        """The states of all chains, which have one step size, with one metric for all if a window ends here."""
        if step not in self.pooling_steps():
            return states
        _, _, end = _welford(self.is_dense)
        one: Tuned = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), states)
        merged = pooling.merge_welford(states.estimator.wc_state)
        ended = strong(end(one.estimator._replace(wc_state=jax.tree.map(jnp.asarray, merged))))
        restarted = restart(one)._replace(inverse_mass_matrix=ended.inverse_mass_matrix, estimator=ended)
        restarted = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), restarted, one)
        return pooling.for_all_chains(restarted, states)


def strong(tree: PyTree) -> PyTree:
    """Arrays without weak types, so that the loop's carry keeps its types."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), tree)


def _welford(is_dense: bool) -> Any:
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation  # its import starts the XLA backend

    return mass_matrix_adaptation(is_diagonal_matrix=not is_dense)
