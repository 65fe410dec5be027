"""Sums, products and multiples of covariance functions, of Gaussian processes and of infinitely wide networks alike.

    k1 + k2     of a sum of independent processes
    k1 * k2     elementwise; positive semidefinite by the theorem of Schur
    c + k, c k  with a number c >= 0, which stands for `Constant`: a random constant, or a multiple

A covariance function is any callable `k(X1, X2=None) -> (n1, n2)`, with `k.diagonal(X) -> (n,)` where that is cheaper;
`gram` and `diagonal` take tinygp's too, whose call with one argument is the diagonal.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 4.2.4.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayesinf import errors
from bayesinf.captured import as_pytree

__all__ = ["Combinable", "Constant", "Product", "Sum", "as_covariance", "diagonal", "gram"]


class Combinable(eqx.Module):
    """A covariance function that `+` and `*` combine with others, and with numbers.

    Example:
        >>> from bayesinf.models import gp, nngp
        >>> network = nngp.NNGP(nngp.relu(), depth=2, w_var=2.0, b_var=0.1)
        >>> kernel = 2.0 * network + gp.Linear() * network
        >>> type(kernel).__name__
        'Sum'
    """

    __array_ufunc__: ClassVar[None] = (
        None  # so that arrays of NumPy leave `*` to us, rather than make arrays of objects
    )

    @abc.abstractmethod
    def __call__(self, X1: Any, X2: Any = None, /) -> Float[Array, "... n m"]:
        """The matrix k(x_i, y_j); of X1 with itself where X2 is None."""

    def __add__(self, other: Any) -> "Sum":
        return Sum(self, other)

    def __radd__(self, other: Any) -> "Sum":
        return Sum(other, self)

    def __mul__(self, other: Any) -> "Product":
        return Product(self, other)

    def __rmul__(self, other: Any) -> "Product":
        return Product(other, self)


class Constant(Combinable):
    """A random constant: k(x, y) = v, for inputs of any shape.

    Attributes:
        variance: v >= 0, of any batch shape.
    """

    variance: Float[Array, "..."] = eqx.field(converter=errors.as_array("variance", is_floating=True))

    def __check_init__(self):
        errors.check_nonnegative("variance", self.variance)

    def __call__(self, X1: Any, X2: Any = None) -> Float[Array, "... n m"]:
        """The matrix of v, as many rows and columns as inputs."""
        rows, columns = _count("X1", X1), _count("X2", X1 if X2 is None else X2)
        return jnp.broadcast_to(self.variance[..., None, None], (*self.variance.shape, rows, columns))

    def diagonal(self, X: Any) -> Float[Array, "... n"]:
        """The variances v."""
        return jnp.broadcast_to(self.variance[..., None], (*self.variance.shape, _count("X", X)))


class Sum(Combinable):
    """k = k1 + k2: the process is a sum of independent ones.

    Attributes:
        left, right: covariance functions, or numbers, which stand for `Constant`.
    """

    left: Any = eqx.field(converter=lambda part: _as_part(part))
    right: Any = eqx.field(converter=lambda part: _as_part(part))

    def __call__(self, X1: Any, X2: Any = None) -> Float[Array, "... n m"]:
        """The matrix k(x_i, y_j); of X1 with itself where X2 is None."""
        return gram(self.left, X1, X2) + gram(self.right, X1, X2)

    def diagonal(self, X: Any) -> Float[Array, "... n"]:
        """The variances k(x_i, x_i)."""
        left, right = diagonal(self.left, X), diagonal(self.right, X)
        return _unless_negative(left, right, left + right)


class Product(Combinable):
    """k = k1 k2; with a number, a multiple.

    Attributes:
        left, right: covariance functions, or numbers, which stand for `Constant`.
    """

    left: Any = eqx.field(converter=lambda part: _as_part(part))
    right: Any = eqx.field(converter=lambda part: _as_part(part))

    def __call__(self, X1: Any, X2: Any = None) -> Float[Array, "... n m"]:
        """The matrix k(x_i, y_j); of X1 with itself where X2 is None."""
        return gram(self.left, X1, X2) * gram(self.right, X1, X2)

    def diagonal(self, X: Any) -> Float[Array, "... n"]:
        """The variances k(x_i, x_i)."""
        left, right = diagonal(self.left, X), diagonal(self.right, X)
        return _unless_negative(left, right, left * right)


def gram(kernel: Any, X1: Any, X2: Any = None) -> Float[Array, "... n m"]:
    """The matrix k(x_i, y_j) of any covariance function; of X1 with itself where X2 is None."""
    # a network knows that the matrix of one set of inputs is symmetric
    is_alone = X2 is None and isinstance(kernel, Combinable)
    matrix = jnp.asarray(kernel(X1) if is_alone else kernel(X1, X1 if X2 is None else X2))
    shape = jnp.shape(X1)[0], jnp.shape(X1 if X2 is None else X2)[0]
    if matrix.shape[-2:] != shape:
        raise ValueError(f"kernel must give a matrix of shape {shape}, one entry a pair of inputs, got {matrix.shape}")
    return matrix


def diagonal(kernel: Any, X: Any) -> Float[Array, "... n"]:
    """The variances k(x_i, x_i) of any covariance function."""
    if hasattr(kernel, "diagonal"):
        return jnp.asarray(kernel.diagonal(X))
    if hasattr(kernel, "evaluate_diag"):  # tinygp's
        return jax.vmap(kernel.evaluate_diag)(X)
    return jax.vmap(lambda x: kernel(x[None], x[None])[0, 0])(X)


def as_covariance(kernel: Any) -> Any:
    """A covariance function as a pytree: a plain function becomes one without leaves.

    Raises:
        ValueError: it cannot be called.
    """
    if not callable(kernel) or isinstance(kernel, type):
        raise ValueError(f"kernel must be a covariance function k(X1, X2), got {kernel!r}; for instance RBF(1.0)")
    return as_pytree(kernel)


def _unless_negative(left: Array, right: Array, value: Array) -> Array:
    """The value, or what is negative of the parts: no covariance, which another part would hide."""
    least = jnp.minimum(left, right)
    return jnp.where(least < 0, least, value)


def _count(name: str, X: Any) -> int:
    if jnp.ndim(X) == 0:
        raise ValueError(f"{name} must have inputs along its first axis, got shape ()")
    return int(jnp.shape(X)[0])


def _as_part(part: Any) -> Any:
    return as_covariance(part) if callable(part) else Constant(part)
