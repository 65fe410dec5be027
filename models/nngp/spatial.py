"""Layers over places: convolution, read-outs of images, and recurrence over time.

    conv           K_{a,a'} <- b + (w / |B|) sum_{o in B} K_{sa+o, sa'+o}         offsets B of the filter, stride s
    average_pool   K_{a,a'} <- mean_{o,o' in B} K_{sa+o, sa'+o'}                memory n^2 P^2
    flatten        K <- mean_a K_{a,a}                                          memory n^2 P for P pixels
    global_pool    K <- mean_{a,a'} K_{a,a'}                                    memory n^2 P^2
    recurrent      K_{s+1} = b + w E phi(u_s) phi(v_s) + u <x_{s+1}, x'_{s+1}> / d,   the last K is what it gives

and Theta, of weights that are shared over places, the same sums of w Theta + K. Weights of a recurrent network are
shared over time; in its last state gradients at different lags do not correlate, so only equal times enter.

References:
    Novak, Xiao, Lee, Bahri, Yang, Hron, Abolafia, Pennington and Sohl-Dickstein (2019), arXiv:1810.05148.
    Arora, Du, Hu, Li, Salakhutdinov and Wang (2019), arXiv:1904.11955.
    Alemohammad, Wang, Balestriero and Baraniuk (2021), arXiv:2006.10246.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.nngp.covariance import Covariance
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.layers import Activation, Dense, Layer, Sequence, check_dual, check_variances

__all__ = [
    "AveragePool",
    "Conv",
    "Flatten",
    "GlobalPool",
    "Recurrent",
    "average_pool",
    "conv",
    "flatten",
    "global_pool",
    "recurrent",
]

Scalar = Real[ArrayLike, ""]
Floats = Float[Array, "..."]
Padding = Literal["same", "circular", "valid"]


class Conv(Layer):
    """A convolution with a square filter, channels to infinity."""

    w_var: Float[Array, ""] = eqx.field(converter=errors.as_array("w_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(converter=errors.as_array("b_var", is_floating=True))
    size: int = eqx.field(static=True)
    padding: Padding = eqx.field(static=True)
    stride: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_variances(self.w_var, self.b_var)
        errors.check_count("size", self.size)
        errors.check_count("stride", self.stride)
        errors.check_choice("padding", self.padding, ("same", "circular", "valid"))
        if self.padding != "valid" and self.size % 2 == 0:
            raise ValueError(f"size must be odd to keep the image with padding={self.padding!r}, got {self.size}")

    @property
    def ends_in_weights(self) -> bool:
        return True

    def propagate(self, state: Covariance) -> Covariance:
        if state.num_places != 2:
            raise ValueError(f"conv must be given images (n, height, width, channels), got {state.num_places + 2} axes")
        w, b = self.w_var.astype(state.c.dtype), self.b_var.astype(state.c.dtype)
        average = self._average if state.has_pairs else lambda x, copies: self._average(x, 1)
        q, p, c = (b + w * average(x, 2) for x in (state.q, state.p, state.c))
        t = None if state.t is None else c + w * average(state.t, 2)
        return state.replace(q=q, p=p, c=c, t=t, is_gaussian=True)

    def _average(self, x: Floats, copies: int) -> Floats:
        """The mean over offsets of the filter, which move the places of both images together."""
        axes = tuple(range(x.ndim - 2 * copies, x.ndim))
        if self.padding == "valid" and min(x.shape[axis] for axis in axes) < self.size:
            raise ValueError(f"size must not exceed the image, of {x.shape[-2:]}, got {self.size}")
        reach = self.size // 2
        if self.padding != "valid":
            widths = [(reach, reach) if axis in axes else (0, 0) for axis in range(x.ndim)]
            x = jnp.pad(x, widths, mode="wrap" if self.padding == "circular" else "constant")
        for parity in (0, 1):  # rows, then columns
            moved = axes[parity::2]
            total = jnp.zeros((), x.dtype)
            for offset in range(self.size):
                total = total + _window(x, moved, offset, self.size, self.stride)
            x = total / self.size
        return x


class AveragePool(Layer):
    """The average over windows of size x size places."""

    size: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __check_init__(self):
        errors.check_count("size", self.size)
        errors.check_count("stride", self.stride)

    @property
    def needs_pairs(self) -> bool:
        return True

    def propagate(self, state: Covariance) -> Covariance:
        if not state.num_places:
            raise ValueError("average_pool must be given images or sequences, got inputs without places")

        def average(x: Floats) -> Floats:
            for axis in range(x.ndim - 2 * state.num_places, x.ndim):  # the places of both inputs by themselves
                if x.shape[axis] < self.size:
                    raise ValueError(
                        f"size must not exceed the image, of {x.shape[-state.num_places :]}, got {self.size}"
                    )
                total = jnp.zeros((), x.dtype)
                for offset in range(self.size):
                    total = total + _window(x, (axis,), offset, self.size, self.stride)
                x = total / self.size
            return x

        q, p, c = (average(x) for x in (state.q, state.p, state.c))
        return state.replace(q=q, p=p, c=c, t=None if state.t is None else average(state.t))


class Flatten(Layer):
    """All units of all places side by side, for weights of their own."""

    def propagate(self, state: Covariance) -> Covariance:
        def mean(x: Floats) -> Floats:
            x = state.same_places(x)
            return jnp.mean(x, axis=tuple(range(x.ndim - state.num_places, x.ndim)))

        # units are no longer of one law, which an activation would need
        return _without_places(state, mean, is_gaussian=False)


class GlobalPool(Layer):
    """The average over all places."""

    @property
    def needs_pairs(self) -> bool:
        return True

    def propagate(self, state: Covariance) -> Covariance:
        def mean(x: Floats) -> Floats:
            return jnp.mean(x, axis=tuple(range(x.ndim - 2 * state.num_places, x.ndim)))

        return _without_places(state, mean, is_gaussian=state.is_gaussian)


class Recurrent(Layer):
    """A simple recurrent network, its last state before the activation."""

    dual: Dual
    w_var: Float[Array, ""] = eqx.field(converter=errors.as_array("w_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(converter=errors.as_array("b_var", is_floating=True))
    input_var: Float[Array, ""] = eqx.field(converter=errors.as_array("input_var", is_floating=True))

    def __check_init__(self):
        check_dual(self.dual)
        check_variances(self.w_var, self.b_var)
        errors.check_positive_scalar("input_var", self.input_var)

    @property
    def ends_in_weights(self) -> bool:
        return True

    def propagate(self, state: Covariance) -> Covariance:
        if state.num_places != 1:
            raise ValueError(f"recurrent must be given sequences (n, time, d), got {state.num_places + 2} axes")
        w, b, u = (x.astype(state.c.dtype) for x in (self.w_var, self.b_var, self.input_var))
        inputs = _without_places(state, lambda x: jnp.moveaxis(state.same_places(x), -1, 0), is_gaussian=False)
        recur = Sequence((Activation(self.dual), Dense(w, b)))

        def add_input(after: Covariance, given: Covariance) -> Covariance:
            q, p, c = (getattr(after, name) + u * getattr(given, name) for name in "qpc")
            # the tangent kernel counts the input's weights, as that of a dense layer
            t = None if after.t is None or given.t is None else after.t + u * (given.c + given.t)
            return after.replace(q=q, p=p, c=c, t=t)

        def step(before: Covariance, given: Covariance) -> tuple[Covariance, None]:
            return add_input(recur.propagate(before), given), None

        zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), inputs)
        start = add_input(Dense(w, b).propagate(zero), jax.tree.map(lambda x: x[0], inputs))
        rest = jax.tree.map(lambda x: x[1:], inputs)
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, rest)[0]


def _window(x: Floats, axes: tuple[int, ...], offset: int, size: int, stride: int) -> Floats:
    """What lies `offset` after the start of every window of `size` places, `stride` apart, along all axes together."""
    window = [slice(None)] * x.ndim
    for axis in axes:
        window[axis] = slice(offset, x.shape[axis] - size + 1 + offset, stride)
    return x[tuple(window)]


def _without_places(state: Covariance, read: Callable[[Floats], Floats], *, is_gaussian: bool) -> Covariance:
    q, p, c = (read(x) for x in (state.q, state.p, state.c))
    t = None if state.t is None else read(state.t)
    return Covariance(q, p, c, t, num_places=0, has_pairs=False, is_gaussian=is_gaussian)


def conv(
    size: int = 3, w_var: Scalar = 1.0, b_var: Scalar = 0.0, *, padding: Padding = "same", stride: int = 1
) -> Conv:
    """A convolution of images with a filter of size x size pixels.

    Args:
        size: of the filter; odd unless the padding is "valid".
        w_var: variance of the weights, times channels and pixels of the filter; > 0.
        b_var: variance of the biases; >= 0.
        padding: "same" puts zeros around the image, "circular" repeats it, "valid" makes it smaller.
        stride: of the filter, in both directions. It begins where it would without: with "same" and "circular" around
            the first pixel, then `stride` pixels on.

    Raises:
        ValueError: an argument is out of its range.
    """
    return Conv(w_var, b_var, size, padding, stride)


def average_pool(size: int = 2, stride: int | None = None) -> AveragePool:
    """The average over windows of size x size pixels, or of `size` times; what does not fill a window is left out.

    Pixels of one window are correlated: covariances are kept for all pairs of pixels, n^2 P^2 numbers, in all layers
    before it.

    Args:
        size: of a window.
        stride: from one window to the next; `size` if None.

    Raises:
        ValueError: an argument is less than 1.

    Example:
        >>> import jax
        >>> from bayesinf.models import nngp
        >>> kernel = nngp.serial(
        ...     nngp.conv(3, stride=2), nngp.activation(nngp.relu()), nngp.average_pool(2), nngp.flatten(), nngp.dense()
        ... )
        >>> kernel(jax.random.normal(jax.random.key(0), (5, 8, 8, 3))).shape
        (5, 5)
    """
    return AveragePool(size, size if stride is None else stride)


def flatten() -> Flatten:
    """All pixels side by side, before `dense`."""
    return Flatten()


def global_pool() -> GlobalPool:
    """The average over all pixels. Covariances are then kept for all pairs of pixels: n^2 P^2 numbers."""
    return GlobalPool()


def recurrent(dual: Dual, w_var: Scalar = 1.0, b_var: Scalar = 0.0, *, input_var: Scalar = 1.0) -> Recurrent:
    """A simple recurrent network of sequences (n, time, d), of which the last state goes on.

    Args:
        dual: of its activation.
        w_var: variance of the weights from state to state, times the width; > 0.
        b_var: variance of the biases; >= 0.
        input_var: variance of the weights from input to state, times d; > 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    return Recurrent(dual, w_var, b_var, input_var)
