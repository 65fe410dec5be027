"""Kernels of infinitely wide networks: matrices of covariances out of layers.

    K(x, x')     the covariance of the outputs of a network with random weights       (head="nngp")
    Theta(x, x') the kernel of its training by gradient descent                       (head="ntk")

A network with all its widths at infinity is a Gaussian process with covariance K.

References:
    Neal (1996), doi:10.1007/978-1-4612-0745-0.
    Lee, Bahri, Novak, Schoenholz, Pennington and Sohl-Dickstein (2018), arXiv:1711.00165.
    Matthews, Rowland, Hron, Turner and Ghahramani (2018), arXiv:1804.11271.
    Jacot, Gabriel and Hongler (2018), arXiv:1806.07572.
"""

from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.kernel_algebra import Combinable
from bayesinf.models.nngp.covariance import Covariance, Head, check_inputs, input_covariance
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.gram import fill
from bayesinf.models.nngp.layers import (
    Layer,
    Sequence,
    activation,
    as_layer,
    check_dual,
    check_variances,
    dense,
    flow,
    repeat,
    residual,
)

__all__ = ["NNGP", "NetworkKernel", "serial"]

Inputs = Real[ArrayLike, "n ..."]


class NetworkKernel(Combinable):
    """The kernel of a network, made by `serial`.

    Attributes:
        network: its layers.
        head: "nngp" or "ntk".
    """

    network: Layer
    head: Head = eqx.field(static=True)

    def __check_init__(self):
        errors.check_choice("head", self.head, ("nngp", "ntk"))

    def __call__(
        self, X1: Real[ArrayLike, "n1 ..."], X2: Real[ArrayLike, "n2 ..."] | None = None
    ) -> Float[Array, "n1 n2"]:
        """The matrix of K(x, x') for x of X1 and x' of X2.

        Args:
            X1: inputs (n, d), sequences (n, time, d) or images (n, height, width, channels).
            X2: other inputs of the same shape but for n; None for X1 itself.

        Raises:
            ValueError: shapes do not match each other or the layers, or inputs are NaN.
        """
        X1 = check_inputs("X1", X1)
        return _matrix(self.network, self.head, X1, None if X2 is None else check_inputs("X2", X2))

    def diagonal(self, X: Real[ArrayLike, "n ..."]) -> Float[Array, " n"]:
        """K(x, x) for x of X, in time proportional to n; arguments and errors as of a call."""
        return _diagonal(self.network, self.head, check_inputs("X", X))


class NNGP(Combinable):
    """The kernel of a fully connected network of `depth` hidden layers, or of a residual one of `depth` blocks.

        K_0 = b + w <x, x'> / d,        K_{l+1} = b + w E phi(u) phi(v),     (u, v) ~ N(0, K_l),      l < depth

    `residual="plain"` adds the right-hand side to K_l, "scaled" 1 / depth of it, and "ode" is the limit of "scaled" at
    infinite depth, dK/dt = b + w E phi(u) phi(v) for a unit of time, with `depth` steps of Runge-Kutta's fourth-order
    method. Inputs with places are flattened. Compilation takes the same time at any depth.

    Attributes:
        dual: of the activation, such as `relu()`.
        depth: at least 1.
        w_var: w > 0, the variance of weights times the width of what they multiply.
        b_var: b >= 0, the variance of biases.
        last_w_var: the variance of a last linear map without bias, which multiplies the kernel; > 0.
        residual: None, "plain", "scaled" or "ode".
        head: "nngp" for the covariance of the outputs, "ntk" for the tangent kernel.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import nngp
        >>> kernel = nngp.NNGP(nngp.relu(), depth=3, w_var=2.0, b_var=0.0)
        >>> matrix = kernel(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
        >>> [round(float(x), 4) for x in matrix[0]]
        [1.0, 0.6048]

    References:
        Lee et al. (2018), arXiv:1711.00165; Hayou and Yang (2023), arXiv:2302.00453 (residual networks).
    """

    dual: Dual
    depth: int = eqx.field(static=True)
    w_var: Float[Array, ""] = eqx.field(converter=errors.as_array("w_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(converter=errors.as_array("b_var", is_floating=True))
    last_w_var: Float[Array, ""] = eqx.field(converter=errors.as_array("last_w_var", is_floating=True), default=1.0)
    residual: Literal["plain", "scaled", "ode"] | None = eqx.field(static=True, default=None)
    head: Head = eqx.field(static=True, default="nngp")

    def __check_init__(self):
        check_dual(self.dual)
        errors.check_count("depth", self.depth)
        check_variances(self.w_var, self.b_var)
        errors.check_positive_scalar("last_w_var", self.last_w_var)
        if self.residual is not None:
            errors.check_choice("residual", self.residual, ("plain", "scaled", "ode"))
        errors.check_choice("head", self.head, ("nngp", "ntk"))

    @property
    def _is_ok(self) -> Array:
        return (self.w_var > 0) & (self.b_var >= 0) & (self.last_w_var > 0)

    def _amplitude(self) -> Array:
        """What multiplies the kernel; -1, which every Gaussian process refuses, where traced variances are negative."""
        return jnp.where(self._is_ok, self.last_w_var, -1.0)

    @property
    def network(self) -> Layer:
        """Its layers, but for the last linear map."""
        w_var, b_var = (jnp.where(self._is_ok, value, 1.0) for value in (self.w_var, self.b_var))
        first = dense(w_var, b_var)
        block = Sequence((activation(self.dual), first))
        match self.residual:
            case None:
                return Sequence((first, repeat(self.depth, block)))
            case "ode":
                return Sequence((first, flow(block, num_steps=self.depth)))
            case kind:
                scale = 1.0 if kind == "plain" else self.depth**-0.5
                return Sequence((first, repeat(self.depth, residual(block, scale=scale))))

    def __call__(
        self, X1: Real[ArrayLike, "n1 ..."], X2: Real[ArrayLike, "n2 ..."] | None = None
    ) -> Float[Array, "n1 n2"]:
        """The matrix of K(x, x') for x of X1 and x' of X2.

        Args:
            X1: inputs, (n, d).
            X2: other inputs of the same shape but for n; None for X1 itself.

        Raises:
            ValueError: shapes do not match, or inputs are NaN.
        """
        X1 = _flat(check_inputs("X1", X1))
        matrix = _matrix(self.network, self.head, X1, None if X2 is None else _flat(check_inputs("X2", X2)))
        return self._amplitude().astype(matrix.dtype) * matrix

    def diagonal(self, X: Real[ArrayLike, "n ..."]) -> Float[Array, " n"]:
        """K(x, x) for x of X, in time proportional to n; arguments and errors as of a call."""
        diagonal = _diagonal(self.network, self.head, _flat(check_inputs("X", X)))
        return self._amplitude().astype(diagonal.dtype) * diagonal


def serial(*layers: Layer, head: Head = "nngp") -> NetworkKernel:
    """The kernel of a network made of layers.

    Args:
        layers: such as `dense()`, `activation(relu())`, `conv()`; the last with Gaussian outputs.
        head: "nngp" for the covariance of the outputs, "ntk" for the tangent kernel.

    Returns:
        A kernel: `kernel(X1, X2=None)` and `kernel.diagonal(X)`.

    Raises:
        ValueError: what is given are no layers, or `head` is neither.

    Example:
        >>> import jax
        >>> from bayesinf.models import nngp
        >>> block = nngp.residual(nngp.activation(nngp.relu()), nngp.conv(3, w_var=2.0))
        >>> kernel = nngp.serial(
        ...     nngp.conv(3), nngp.repeat(4, block), nngp.activation(nngp.relu()), nngp.flatten(), nngp.dense()
        ... )
        >>> kernel(jax.random.normal(jax.random.key(0), (5, 8, 8, 3))).shape
        (5, 5)
    """
    return NetworkKernel(as_layer(layers), head)


def _flat(X: Array) -> Array:
    return X.reshape(X.shape[0], -1)


@partial(jax.jit, static_argnames="head")
def _matrix(network: Layer, head: Head, X1: Array, X2: Array | None) -> Array:
    def entries(left: Array, right: Array) -> Array:
        return _read(network.propagate(input_covariance(left, right, head=head, has_pairs=network.needs_pairs)))

    # on a CPU what stays in its cache is several times faster, and a symmetric matrix has half as much to compute
    block = 512 if jax.default_backend() == "cpu" else max(X1.shape[0], 0 if X2 is None else X2.shape[0])
    matrix = fill(entries, X1, X1 if X2 is None else X2, block, is_symmetric=X2 is None)
    if X2 is None:  # off the diagonal equal inputs are equal to rounding only
        index = jnp.arange(X1.shape[0])
        matrix = matrix.at[index, index].set(_diagonal(network, head, X1).astype(matrix.dtype))
    return matrix


@partial(jax.jit, static_argnames="head")
def _diagonal(network: Layer, head: Head, X: Array) -> Array:
    inputs = input_covariance(X, X, head=head, has_pairs=network.needs_pairs, is_paired=True)
    return _read(network.propagate(inputs))


def _read(state: Covariance) -> Array:
    if state.num_places:
        raise ValueError("layers must end without places: put flatten() and dense(), or global_pool(), at the end")
    if not state.is_gaussian:
        raise ValueError("layers must end in dense(): what an activation gives is no Gaussian process")
    return state.c if state.t is None else state.t
