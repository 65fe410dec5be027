"""Minimising a smooth function by L-BFGS, in one compiled loop.

It ends by the decrease that a Newton step promises, <g, H g> / 2, which has the unit of the function and does not
depend on how its arguments are scaled. No decrease can be seen that is below the rounding r of the function: at least
eps of its value, or of 1 where that is more, and more where values differ by more at points that are the last one with
its numbers moved by one rounding up or down. The search has converged where the promise is at most 10 r: it ends there,
or because the line search, misled by rounding, finds nothing lower.

References:
    Liu and Nocedal (1989), doi:10.1007/BF01589116.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.tree as ot
from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = ["Minimum", "minimise"]

FACTOR = 10.0  # of the rounding: the promise has that of the gradient in it, too


class Minimum(NamedTuple):
    """Where the search ended.

    Attributes:
        point: the last point.
        value: of the function there.
        decrease: what one more step promises.
        rounding: r, of the value.
        num_steps: steps made.
        is_converged: whether the decrease is at most 10 r, and not below zero.
    """

    point: PyTree
    value: Float[Array, ""]
    decrease: Float[Array, ""]
    rounding: Float[Array, ""]
    num_steps: Int[Array, ""]
    is_converged: Bool[Array, ""]


def minimise(loss: Callable[[PyTree], Array], start: PyTree, num_steps: int) -> Minimum:
    """A local minimum of `loss`; to be called under jit.

    Args:
        loss: a scalar of a pytree of floating arrays; +inf where it is not defined.
        start: where the search begins; the loss is finite there.
        num_steps: at most.
    """
    # every search tries the step of Newton first; fifty halvings reach from it to the rounding of the arguments
    direct, search = optax.scale_by_lbfgs(), optax.scale_by_zoom_linesearch(50, initial_guess_strategy="one")

    def promised(grad: PyTree, state: Any, point: PyTree) -> tuple[PyTree, Any, Array]:
        direction, state = direct.update(grad, state, point)
        return ot.scale(-1.0, direction), state, jnp.asarray(0.5 * ot.vdot(grad, direction))

    def is_unfinished(carry: Any) -> Array:
        _, _, value, _, decrease, count, is_stuck = carry
        return (count < num_steps) & (decrease > FACTOR * _least_rounding(value)) & ~is_stuck

    def step(carry: Any) -> Any:
        last, (state, was_searching), before, slope, _, count, _ = carry
        direction, state, _ = promised(slope, state, last)
        # the first step tries a length of one: the curvature is not known yet, and a small slope may lead far down
        length = jnp.where(count == 0, jnp.maximum(1.0, 1.0 / ot.norm(slope)), 1.0).astype(before.dtype)
        direction = ot.scale(length, direction)
        search_state: Any
        updates, search_state = search.update(direction, was_searching, last, value=before, grad=slope, value_fn=loss)
        point = optax.apply_updates(last, updates)
        value, grad = search_state.value, search_state.grad
        _, _, decrease = promised(grad, state, point)
        is_lower = value < before
        point, value, grad = jax.tree.map(
            lambda new, old: jnp.where(is_lower, new, old), (point, value, grad), (last, before, slope)
        )
        return point, (state, search_state), value, grad, decrease, count + 1, ~is_lower

    value, grad = jax.value_and_grad(loss)(start)
    carry = (
        start,
        (direct.init(start), search.init(start)),
        value,
        grad,
        jnp.where(ot.norm(grad) == 0, 0.0, jnp.inf).astype(value.dtype),
        jnp.zeros((), jnp.int32),
        ~jnp.isfinite(value),
    )
    point, _, value, _, decrease, count, _ = jax.lax.while_loop(is_unfinished, step, carry)
    rounding = jnp.maximum(_least_rounding(value), _seen_rounding(loss, point, value))
    # a promise below zero is of curvature that rounding has made negative, and tells nothing
    is_converged = (decrease >= -_least_rounding(value)) & (decrease <= FACTOR * rounding)
    return Minimum(point, value, decrease, rounding, count, is_converged)


def _least_rounding(value: Array) -> Array:
    return float(jnp.finfo(value.dtype).eps) * jnp.maximum(1.0, jnp.abs(value))


def _seen_rounding(loss: Callable[[PyTree], Array], point: PyTree, value: Array) -> Array:
    """The root mean square change of the loss over eight points within one rounding."""

    def change(key: Array) -> Array:
        signs = ot.random_like(key, point, jax.random.rademacher)
        moved = jax.tree.map(
            lambda x, sign: x * (1.0 + float(jnp.finfo(x.dtype).eps) * sign).astype(x.dtype), point, signs
        )
        return loss(moved) - value

    return jnp.sqrt(jnp.mean(jax.lax.map(change, jax.random.split(jax.random.key(0), 8)) ** 2))
