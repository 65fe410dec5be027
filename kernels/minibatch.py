"""A log density that is a sum over data, and unbiased estimates of its gradient from a few rows.

    log pi(x) = log p(x) + sum_{i<n} l_i(x),       l_i(x) = log p(y_i | x)

Batches. The n rows are cut into b contiguous blocks of sizes m_1, ..., m_b that differ by at most one, and one row is
drawn from each:

    g(x) = grad log p(x) + sum_s m_s grad l_{i_s}(x),       i_s uniform on block s

(n / b times the sum over the batch, if b divides n). It is unbiased for every n and b and costs b random numbers, where
a permutation costs n. Its variance sum_s m_s^2 Var_s is that within the blocks: on average over the order of the rows
the variance of sampling without replacement, in no order above that of sampling with replacement if b divides n, zero
for b = n, and less where the rows are sorted by what makes them differ.

Control variates. With a centre x* near the mode, and G* = sum_i grad l_i(x*) computed once,

    g(x) = grad log p(x) + G* + sum_s m_s (grad l_{i_s}(x) - grad l_{i_s}(x*))

is unbiased for every x and x*. Its variance falls with |x - x*|^2 instead of growing with n^2 / b, at two gradients of
the batch instead of one; far from x* it may be the larger one.

References:
    Welling and Teh (2011), ICML 28, 681-688.
    Baker, Fearnhead, Fox and Nemeth (2019), doi:10.1007/s11222-018-9826-2 (control variates).
    Cochran (1977), Sampling Techniques, 3rd ed., chapter 5 (stratified sampling).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import captured
from bayesinf.kernel import Evaluation, is_finite
from bayesinf.kernels.vectors import as_position, combine, dot
from bayesinf.target import Target

__all__ = ["Centre", "Minibatch"]


class Centre(NamedTuple):
    """Where control variates are centred, and the gradient of the log likelihood of all the data there."""

    position: PyTree
    grad: PyTree


class Minibatch(eqx.Module):
    """A log density known by its prior and by one term for each row of the data; what `SGLD` and `SGHMC` sample.

    The data are pytree leaves: new ones of the same shape compile nothing. `dataclasses.replace(target, data=...)` and
    `replace(target, centre=...)` compute the gradient at the centre anew; `equinox.tree_at`, which replaces leaves
    behind the back of their module, does not.

    Args:
        log_prior: `log_prior(position)`, a scalar.
        log_likelihood: `log_likelihood(position, row)`, a scalar: the term of one row. It is vectorised over the batch.
        data: any pytree of arrays with a common leading axis n; a row is the pytree without it.
        batch_size: rows b of a batch, 1 <= b <= n. Static.
        centre: x*, a position near the mode, for control variates; None for the plain estimate. The attribute holds the
            gradient there too.

    Raises:
        ValueError: the data have no common leading axis, the batch is not of 1 to n rows, or the gradient at the centre
            is not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> y = jnp.arange(100.0)
        >>> def log_prior(x): return -0.5 * (x / 10) ** 2
        >>> def log_likelihood(x, y): return -0.5 * (y - x) ** 2
        >>> target = bi.kernels.Minibatch(log_prior, log_likelihood, y, batch_size=10)
        >>> centred = target.centred(target.mode(jnp.array(0.0)))
        >>> round(float(centred.centre.position), 2)
        49.5
        >>> keys = jax.random.split(jax.random.key(0), 500)
        >>> noise = [jnp.std(jax.vmap(t.estimate, (0, None))(keys, 48.0).grad) for t in (target, centred)]
        >>> bool(noise[1] < 0.01 * noise[0])
        True
    """

    log_prior: Callable[..., Any] = eqx.field(static=True)
    log_likelihood: Callable[..., Any] = eqx.field(static=True)
    data: PyTree
    batch_size: int = eqx.field(static=True)
    centre: Centre | None

    def __init__(
        self,
        log_prior: Callable[..., Any],
        log_likelihood: Callable[..., Any],
        data: PyTree,
        batch_size: int,
        centre: PyTree = None,
    ):
        errors.check_arguments("log_prior", log_prior, "position")
        errors.check_arguments("log_likelihood", log_likelihood, "position, row")
        self.log_prior, self.log_likelihood = captured(log_prior), captured(log_likelihood)
        self.data = errors.as_arrays("data", data)
        shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(self.data)}
        if len(shapes) != 1 or shapes <= {(), (0,)}:
            raise ValueError(
                "data must be arrays with one common leading axis of at least one row, got shapes "
                f"{jax.tree.map(jnp.shape, self.data)}"
            )
        self.batch_size = errors.check_count("batch_size", batch_size)
        if batch_size > self.num_rows:
            raise ValueError(f"batch_size must be at most the number of rows, {self.num_rows}, got {batch_size}")
        self.centre = None
        if centre is not None:
            position = as_position(centre.position if isinstance(centre, Centre) else centre)
            self.centre = Centre(position, _total_grad(self.log_likelihood, self.data, position))
            if errors.is_concrete(self.centre) and not is_finite(self.centre.grad):
                raise ValueError("centre must be where the gradient of the log likelihood is finite; it is not there")

    @property
    def num_rows(self) -> int:
        """The number n of rows of the data."""
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def full(self) -> Target:
        """The log density of all the data, for kernels that evaluate it exactly."""
        return Target(_Joint(self.log_prior, self.log_likelihood), self.data)

    def estimate(self, key: Key[Array, ""] | None, position: PyTree) -> Evaluation:
        """Unbiased estimates of the log density (without control variates) and its gradient, from one batch.

        Args:
            key: draws the batch; None takes the middle row of every block.
            position: x.
        """
        rows, sizes = self._draw(key)

        def batch(x: PyTree) -> Float[Array, ""]:
            terms = _terms(self.log_likelihood, x, rows)
            return jnp.sum(sizes.astype(terms.dtype) * terms)

        logdensity, grad = jax.value_and_grad(lambda x: _scalar("log_prior", self.log_prior(x)) + batch(x))(position)
        if self.centre is not None:
            _check_alike(self.centre.position, position)
            grad = combine((1, grad), (1, self.centre.grad), (-1, jax.grad(batch)(self.centre.position)))
        return Evaluation(logdensity, grad)

    @property
    def num_gradients(self) -> int:
        """Gradients of a batch that one estimate takes: 2 with control variates, else 1."""
        return 1 if self.centre is None else 2

    def centred(self, centre: PyTree) -> "Minibatch":
        """The same log density with control variates around `centre`; one pass over the data."""
        return Minibatch(self.log_prior, self.log_likelihood, self.data, self.batch_size, centre)

    def mode(self, start: PyTree, *, max_iterations: int = 100) -> PyTree:
        """A maximum of the density near `start`, by optax's L-BFGS on gradients of all the data.

        How near it comes decides how noisy control variates are, not whether they are right. Where so many passes over
        the data are too expensive, any other optimiser will do.

        Args:
            start: a position.
            max_iterations: the most that are made; it ends when the density no longer grows.

        Raises:
            ValueError: it came to no maximum: the gradient there is not finite, or not below a tenth of the first.
        """
        errors.check_count("max_iterations", max_iterations)
        position, last, first = _maximise(self.full, as_position(start), jnp.asarray(max_iterations))
        if errors.is_concrete(last) and not _is_mode(last, first):
            raise ValueError(
                f"start led to no maximum in {max_iterations} iterations: the log density went from "
                f"{first.logdensity:.4g} to {last.logdensity:.4g}, and its gradient did not vanish. Is the posterior "
                "proper? If so, start elsewhere, or find the mode by other means"
            )
        return position

    def _draw(self, key: Key[Array, ""] | None) -> tuple[PyTree, Int[np.ndarray, " b"]]:
        """One row of every block, and the sizes of the blocks."""
        edges = np.arange(self.batch_size + 1) * self.num_rows // self.batch_size
        starts, sizes = edges[:-1].astype(np.int32), np.diff(edges).astype(np.int32)
        offsets = sizes // 2 if key is None else jax.random.randint(key, sizes.shape, 0, sizes)
        index = starts + offsets

        def take(leaf: Array) -> Array:
            return leaf.at[index].get(mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)

        return jax.tree.map(take, self.data), sizes


@dataclass(frozen=True)
class _Joint:
    """The log density of all the data; equal for equal functions, so it compiles once."""

    log_prior: Callable[..., Any]
    log_likelihood: Callable[..., Any]

    def __call__(self, position: PyTree, data: PyTree) -> Float[Array, ""]:
        return _scalar("log_prior", self.log_prior(position)) + jnp.sum(_terms(self.log_likelihood, position, data))


def _terms(log_likelihood: Callable[..., Any], position: PyTree, rows: PyTree) -> Float[Array, " b"]:
    return jax.vmap(lambda row: _scalar("log_likelihood of one row", log_likelihood(position, row)))(rows)


def _scalar(name: str, value: Any) -> Float[Array, ""]:
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point scalar, got {jnp.result_type(value)} of shape {jnp.shape(value)}; sum "
            "over the coordinates"
        )
    return jnp.asarray(value)


@partial(jax.jit, static_argnums=0)
def _total_grad(log_likelihood: Callable[..., Any], data: PyTree, centre: PyTree) -> PyTree:
    return jax.grad(lambda x: jnp.sum(_terms(log_likelihood, x, data)))(centre)


@jax.jit
def _maximise(target: Target, start: PyTree, max_iterations: Int[Array, ""]) -> tuple[PyTree, Evaluation, Evaluation]:
    """L-BFGS on -log pi while it gains anything; where it ends, and the evaluations there and at the start."""
    import optax  # not needed by anything else, and slow to import

    optimizer = optax.lbfgs()

    def loss(x: PyTree) -> Float[Array, ""]:
        return -target.evaluate(x).logdensity

    value_and_grad = optax.value_and_grad_from_state(loss)

    def goes_on(carry: Any) -> Array:
        _, _, gain, count = carry
        return (count < max_iterations) & (gain > 0)

    def iterate(carry: Any) -> Any:
        x, state, _, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(x, updates), state, value - optax.tree.get(state, "value"), count + 1

    first = target.evaluate(start, order=1)
    carry = start, optimizer.init(start), jnp.ones_like(first.logdensity), jnp.zeros((), jnp.int32)
    position, *_ = jax.lax.while_loop(goes_on, iterate, carry)
    return position, target.evaluate(position, order=1), first


def _is_mode(last: Evaluation, first: Evaluation) -> bool:
    """Whether the gradient has fallen on the way, or the start was a mode already."""
    has_risen = last.logdensity > first.logdensity + 1
    is_steep = dot(last.grad, last.grad) > 0.01 * dot(first.grad, first.grad)
    return bool(is_finite(last) & ~(has_risen & is_steep))


def _check_alike(centre: PyTree, position: PyTree) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (centre, position)]
    if jax.tree.structure(centre) != jax.tree.structure(position) or shapes[0] != shapes[1]:
        raise ValueError(f"centre must be a position, of shapes {shapes[1]}, got shapes {shapes[0]}")
