"""The neural signature kernel: infinitely wide residual networks driven by paths.

    dZ = sum_c (A_c phi(Z) + b_c) dx^c,     A_c ~ N(0, a_var / N),  b_c ~ N(0, b_var),  Z_0 ~ N(0, start_var)

with weights shared over time. As the width N goes to infinity, the covariance K(s, t) of Z at time s of a path x and
time t of a path y solves

    d^2 K / ds dt = (a_var E phi(u) phi(v) + b_var) <x'(s), y'(t)>,      K(0, t) = K(s, 0) = start_var
    (u, v) ~ N(0, [[K_xx(s, s), K(s, t)], [K(s, t), K_yy(t, t)]])

The scheme of order 1 is the kernel of the network's own Euler scheme, without error; that of order 2 is Heun's, from
row to row, with the trapezoid along them. Rows are cumulative sums, so times of y are done in parallel. With the
identity in place of phi, and variances 1, 0 and 1, it is the signature kernel; that of straight lines then has half the
error of the stencil (K_10 + K_01) (1 + p/2 + p^2/12) - K_00 (1 - p^2/12), which cannot go along rows in parallel.

References:
    Cirone, Lemercier and Salvi (2023), arXiv:2303.17671.
    Salvi, Cass, Foster, Lyons and Yang (2021), doi:10.1137/20M1366794.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.kernel_algebra import Combinable
from bayesinf.models.nngp.covariance import check_inputs
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.layers import check_dual

__all__ = ["NeuralSignature"]

Paths = Real[ArrayLike, "n time d"]


class NeuralSignature(Combinable):
    """The kernel of paths (n, time, d), linear between their points.

    Attributes:
        dual: of the activation.
        a_var: of the weights, times the width; > 0.
        b_var: of the biases; >= 0.
        start_var: of the first state; >= 0.
        order: 1 or 2, of the scheme; 2 errs by the square of the steps.
        refine: into how many steps each piece of a path is cut; at least 1.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import nngp
        >>> kernel = nngp.NeuralSignature(nngp.monomial(1), a_var=1.0, b_var=0.0, start_var=1.0, refine=64)
        >>> line = jnp.array([[[0.0], [1.0]]])
        >>> round(float(kernel(line)[0, 0]), 3)  # the Bessel function I_0(2)
        2.28
    """

    dual: Dual
    a_var: Float[Array, ""] = eqx.field(converter=errors.as_array("a_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(converter=errors.as_array("b_var", is_floating=True))
    start_var: Float[Array, ""] = eqx.field(converter=errors.as_array("start_var", is_floating=True))
    order: Literal[1, 2] = eqx.field(static=True, default=2)
    refine: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_dual(self.dual)
        errors.check_positive_scalar("a_var", self.a_var)
        errors.check_nonnegative("b_var", self.b_var)
        errors.check_nonnegative("start_var", self.start_var)
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}")
        errors.check_count("refine", self.refine)

    def __call__(
        self, X1: Real[ArrayLike, "n1 time1 d"], X2: Real[ArrayLike, "n2 time2 d"] | None = None
    ) -> Float[Array, "n1 n2"]:
        """The matrix of K at the ends of the paths.

        Args:
            X1: paths; at least two points each.
            X2: other paths, of any length; None for X1 itself.

        Raises:
            ValueError: these are no paths, or of different dimensions.
        """
        left = _steps("X1", X1)
        right = left if X2 is None else _steps("X2", X2)
        if left.shape[2] != right.shape[2]:
            raise ValueError(f"X2 must have paths in {left.shape[2]} dimensions, those of X1, got {right.shape[2]}")
        matrix = _cross(self, left, right)
        if X2 is not None:
            return matrix
        index = jnp.arange(left.shape[0])
        return matrix.at[index, index].set(_own(self, left)[:, -1])

    def diagonal(self, X: Paths) -> Float[Array, " n"]:
        """K of every path with itself; arguments and errors as of a call."""
        return _own(self, _steps("X", X))[:, -1]

    def _refined(self, steps: Array) -> Array:
        return jnp.repeat(steps / self.refine, self.refine, axis=1)

    def _force(self, q: Array, p: Array, row: Array) -> Array:
        """A_var E phi(u) phi(v) + b_var."""
        return self.a_var.astype(row.dtype) * self.dual.k(q, p, row) + self.b_var.astype(row.dtype)


def _steps(name: str, X: Real[ArrayLike, "..."]) -> Array:
    """Increments of paths."""
    paths = check_inputs(name, X)
    if paths.ndim != 3 or paths.shape[1] < 2:
        raise ValueError(f"{name} must be paths (n, time, d) of at least two points, got shape {paths.shape}")
    return jnp.diff(paths, axis=1)


def _after(row: Array, source: Array) -> Array:
    """The next row: what came in from all cells to the left is added to this one."""
    return row.at[..., 1:].add(jnp.cumsum(source, axis=-1))


def _along(force: Array) -> Array:
    """Means over the sides of cells."""
    return 0.5 * (force[..., :-1] + force[..., 1:])


@jax.jit
def _own(kernel: NeuralSignature, steps: Array) -> Float[Array, "n times"]:
    """K_xx(t, t) of every path at all times, from the triangle below the diagonal."""
    steps = kernel._refined(steps)
    n, count = steps.shape[:2]
    start = jnp.full((n, count + 1), kernel.start_var, steps.dtype)
    times = jnp.arange(count + 1)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        row, own = carry  # K(i, j) for j <= i, and K(j, j) for j <= i; beyond it what is there does not enter
        products = jnp.einsum("nd,njd->nj", steps[:, i], steps)
        before = jnp.where(times[:-1] < i, products, 0.0)
        here = jnp.take(products, i, axis=1)
        variance = jnp.take(own, i, axis=1)[:, None]
        force = kernel._force(variance, own, row)
        corner = jnp.take(force, i, axis=1)

        def corners(after: Array, cell: Array) -> Array:
            """K(i+1, i+1) from K(i+1, i) = K(i, i+1), and what the cell (i, i) adds."""
            return 2.0 * jnp.take(after, i, axis=1) - variance[:, 0] + here * cell

        below = _along(force) if kernel.order == 2 else force[:, :-1]
        after = _after(row, before * below)
        last = corners(after, corner)
        if kernel.order == 2:
            above = _along(kernel._force(last[:, None], own, after))
            after = _after(row, before * 0.5 * (below + above))
            side = kernel._force(last, variance[:, 0], jnp.take(after, i, axis=1))
            last = corners(after, 0.25 * (corner + 2.0 * side + kernel._force(last, last, last)))
        is_next = times == i + 1
        return (jnp.where(is_next, last[:, None], after), jnp.where(is_next, last[:, None], own)), None

    return jax.lax.scan(step, (start, start), jnp.arange(count))[0][1]


@jax.jit
def _cross(kernel: NeuralSignature, left: Array, right: Array) -> Float[Array, "n1 n2"]:
    """K_xy at the ends of all pairs of paths."""
    q, p = _own(kernel, left), _own(kernel, right)[None]
    left, right = kernel._refined(left), kernel._refined(right)
    start = jnp.full((left.shape[0], *p.shape[1:]), kernel.start_var, p.dtype)

    def step(row: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
        increment, variance, next_variance = given
        products = jnp.einsum("nd,mjd->nmj", increment, right)
        force = kernel._force(variance[:, None, None], p, row)
        below = _along(force) if kernel.order == 2 else force[..., :-1]
        after = _after(row, products * below)
        if kernel.order == 2:
            above = _along(kernel._force(next_variance[:, None, None], p, after))
            after = _after(row, products * 0.5 * (below + above))
        return after, None

    return jax.lax.scan(step, start, (left.swapaxes(0, 1), q.T[:-1], q.T[1:]))[0][..., -1]
