"""Layers of infinitely wide networks, which compose; a layer maps covariances to covariances.

    dense(w, b)       K <- b + w K,                             Theta <- K_new + w Theta
    activation(phi)   K <- E phi(u) phi(v),                     Theta <- E phi'(u) phi'(v) Theta
    residual(f)       K <- K + s^2 f(K),                        the same of Theta
    flow(f)           dK/dt = f(K) for a unit of time: infinitely many residual blocks of scale 1 / sqrt(depth)
    layer_norm()      K <- K / sqrt((q + eps)(p + eps)),        the same factor of Theta

Widths go to infinity one after the other; depth costs no compile time. Theta is the kernel of gradient descent in the
NTK parameterisation, whose factors sqrt(w / width) stand outside of the parameters.

References:
    Jacot, Gabriel and Hongler (2018), arXiv:1806.07572.
    Hayou and Yang (2023), arXiv:2302.00453 (residual networks, and their flow).
"""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.nngp.covariance import Covariance
from bayesinf.models.nngp.duals.dual import Dual

__all__ = [
    "Activation",
    "Dense",
    "Flow",
    "Layer",
    "LayerNorm",
    "Repeat",
    "Residual",
    "Sequence",
    "activation",
    "dense",
    "flow",
    "layer_norm",
    "repeat",
    "residual",
]

Scalar = Real[ArrayLike, ""]


class Layer(eqx.Module):
    """A part of a network."""

    @property
    def needs_pairs(self) -> bool:
        """Whether it needs covariances between different places of its inputs."""
        return False

    @property
    def ends_in_weights(self) -> bool:
        """Whether its last act are weights of its own, so that its outputs are uncorrelated with its inputs."""
        return False

    @abc.abstractmethod
    def propagate(self, state: Covariance) -> Covariance:
        """The covariances of its outputs."""


class Dense(Layer):
    """Weights of variance w_var / width and biases of variance b_var, at every place alike."""

    w_var: Float[Array, ""] = eqx.field(converter=errors.as_array("w_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(converter=errors.as_array("b_var", is_floating=True))

    def __check_init__(self):
        check_variances(self.w_var, self.b_var)

    @property
    def ends_in_weights(self) -> bool:
        return True

    def propagate(self, state: Covariance) -> Covariance:
        w, b = self.w_var.astype(state.c.dtype), self.b_var.astype(state.c.dtype)
        c = b + w * state.c
        t = None if state.t is None else c + w * state.t
        return state.replace(q=b + w * state.q, p=b + w * state.p, c=c, t=t, is_gaussian=True)


class Activation(Layer):
    """An activation, element by element."""

    dual: Dual

    def __check_init__(self):
        check_dual(self.dual)

    def propagate(self, state: Covariance) -> Covariance:
        check_gaussian("activation", state)
        left, right = state.variances(state.q, state.p)
        t = None if state.t is None else self.dual.kdot(left, right, state.c) * state.t
        c = self.dual.k(left, right, state.c)
        return state.replace(q=self._own(state, state.q), p=self._own(state, state.p), c=c, t=t, is_gaussian=False)

    def _own(self, state: Covariance, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Covariances of inputs with themselves."""
        return self.dual.k(*state.variances(x, x), x) if state.has_pairs else self.dual.v(x)


class LayerNorm(Layer):
    """Division by the standard deviation over the units, at every place."""

    epsilon: Float[Array, ""] = eqx.field(converter=errors.as_array("epsilon", is_floating=True))

    def __check_init__(self):
        errors.check_nonnegative("epsilon", self.epsilon)

    def propagate(self, state: Covariance) -> Covariance:
        check_gaussian("layer_norm", state)
        epsilon = self.epsilon.astype(state.c.dtype)

        def normalise(x: Float[Array, "..."], left: Float[Array, "..."], right: Float[Array, "..."]):
            left, right = state.variances(left, right)
            return x * jax.lax.rsqrt(left + epsilon) * jax.lax.rsqrt(right + epsilon)

        t = None if state.t is None else normalise(state.t, state.q, state.p)
        q, p = (normalise(x, x, x) for x in (state.q, state.p))
        return state.replace(q=q, p=p, c=normalise(state.c, state.q, state.p), t=t)


class Sequence(Layer):
    """Layers one after the other."""

    layers: tuple[Layer, ...]

    @property
    def needs_pairs(self) -> bool:
        return any(layer.needs_pairs for layer in self.layers)

    @property
    def ends_in_weights(self) -> bool:
        return self.layers[-1].ends_in_weights

    def propagate(self, state: Covariance) -> Covariance:
        for layer in self.layers:
            state = layer.propagate(state)
        return state


class Repeat(Layer):
    """The same kind of layer again and again, each with weights of its own."""

    layer: Layer
    times: int = eqx.field(static=True)

    @property
    def needs_pairs(self) -> bool:
        return self.layer.needs_pairs

    @property
    def ends_in_weights(self) -> bool:
        return self.layer.ends_in_weights

    def propagate(self, state: Covariance) -> Covariance:
        # reverse mode keeps one covariance a layer, and makes the rest again
        step = jax.checkpoint(lambda carry, _: (self._once(carry), None), prevent_cse=False)
        return jax.lax.scan(step, state, length=self.times)[0]

    def _once(self, state: Covariance) -> Covariance:
        after = self.layer.propagate(state)
        if jax.tree.structure(after) != jax.tree.structure(state) or after.c.shape != state.c.shape:
            raise ValueError(
                "layer must give covariances of the kind it is given, to be repeated: end it in weights, begin after "
                f"weights, and keep the places; got places {state.c.shape[2:]} in and {after.c.shape[2:]} out"
            )
        return after


class Residual(Layer):
    """x + scale * branch(x), for a branch that ends in weights."""

    branch: Layer
    scale: Float[Array, ""] = eqx.field(converter=errors.as_array("scale", is_floating=True))

    def __check_init__(self):
        check_branch(self.branch)

    @property
    def needs_pairs(self) -> bool:
        return self.branch.needs_pairs

    def propagate(self, state: Covariance) -> Covariance:
        return _add(state, self.scale.astype(state.c.dtype) ** 2, self.branch.propagate(state))


class Flow(Layer):
    """Infinitely many residual blocks of scale 1 / sqrt(depth): an ordinary differential equation, by Runge-Kutta."""

    branch: Layer
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_branch(self.branch)
        errors.check_count("num_steps", self.num_steps)

    @property
    def needs_pairs(self) -> bool:
        return self.branch.needs_pairs

    def propagate(self, state: Covariance) -> Covariance:
        h = 1.0 / self.num_steps

        def step(state, _):
            first = self.branch.propagate(state)
            second = self.branch.propagate(_add(state, 0.5 * h, first))
            third = self.branch.propagate(_add(state, 0.5 * h, second))
            fourth = self.branch.propagate(_add(state, h, third))
            for weight, slope in zip((1, 2, 2, 1), (first, second, third, fourth), strict=True):
                state = _add(state, h * weight / 6.0, slope)
            return state, None

        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, length=self.num_steps)[0]


def _add(state: Covariance, scale: Scalar, branch: Covariance) -> Covariance:
    """Covariances of a sum of two that are uncorrelated."""
    if branch.c.shape != state.c.shape:
        raise ValueError(f"branch must keep the places of its inputs, got {state.c.shape} in and {branch.c.shape} out")
    t = None if state.t is None or branch.t is None else state.t + scale * branch.t
    q, p, c = (getattr(state, name) + scale * getattr(branch, name) for name in "qpc")
    return state.replace(q=q, p=p, c=c, t=t)


def check_variances(w_var: Float[Array, "..."], b_var: Float[Array, "..."]) -> None:
    """A positive variance of weights, and one of biases that may be zero."""
    errors.check_positive_scalar("w_var", w_var)
    if b_var.shape != ():
        raise ValueError(f"b_var must be a scalar, got shape {b_var.shape}")
    errors.check_nonnegative("b_var", b_var)


def check_dual(dual: object) -> None:
    """A dual, not an activation."""
    if not isinstance(dual, Dual):
        raise ValueError(f"dual must be one of nngp's, such as nngp.relu(), got {dual!r}; or nngp.numerical(phi)")


def check_branch(branch: Layer) -> None:
    """A branch whose output is uncorrelated with its input."""
    if not isinstance(branch, Layer) or not branch.ends_in_weights:
        raise ValueError(
            "branch must end in dense() or conv(): without weights of its own its output is correlated with its input, "
            f"and covariances do not add; got {type(branch).__name__}"
        )


def check_gaussian(name: str, state: Covariance) -> None:
    """Units that are Gaussian."""
    if not state.is_gaussian:
        raise ValueError(f"{name} must follow dense() or conv(), whose outputs are Gaussian; put one before it")


def as_layer(layers: tuple[Any, ...]) -> Layer:
    """One layer out of several."""
    if not layers:
        raise ValueError("layers must not be empty")
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ValueError(f"layers must be layers, such as nngp.dense(), got {layer!r}")
    return layers[0] if len(layers) == 1 else Sequence(layers)


def dense(w_var: Scalar = 1.0, b_var: Scalar = 0.0) -> Dense:
    """Weights N(0, w_var / width) and biases N(0, b_var).

    Args:
        w_var: variance of the weights, times the width of what they multiply; > 0.
        b_var: variance of the biases; >= 0.

    Raises:
        ValueError: a variance is negative, or w_var zero.
    """
    return Dense(w_var, b_var)


def activation(dual: Dual) -> Activation:
    """An activation such as `relu()`, after `dense` or `conv`.

    Raises:
        ValueError: `dual` is no dual.
    """
    return Activation(dual)


def layer_norm(epsilon: Scalar = 1e-6) -> LayerNorm:
    """Layer normalisation, without scale and shift of its own, after `dense` or `conv`.

    Args:
        epsilon: added to variances; >= 0.
    """
    return LayerNorm(epsilon)


def repeat(times: int, *layers: Layer) -> Repeat:
    """These layers, `times` times, each time with new weights of the same law; compiles once.

    Args:
        times: at least 1.
        layers: beginning after weights and ending in weights.

    Raises:
        ValueError: `times` is less than 1, or there are no layers.
    """
    return Repeat(as_layer(layers), errors.check_count("times", times))


def residual(*layers: Layer, scale: Scalar = 1.0) -> Residual:
    """X + scale * f(x), for layers f that end in weights.

    Args:
        layers: ending in `dense` or `conv`.
        scale: 1 / sqrt(depth) keeps variances finite at any depth.

    Raises:
        ValueError: the last layer has no weights.
    """
    return Residual(as_layer(layers), scale)


def flow(*layers: Layer, num_steps: int = 16) -> Flow:
    """The limit of `depth` residual blocks of scale 1 / sqrt(depth), as depth goes to infinity.

    Args:
        layers: of one block, ending in `dense` or `conv`.
        num_steps: of Runge-Kutta's fourth-order method; 16 leave an error of about 1e-7 at unit variances.

    Raises:
        ValueError: the last layer has no weights, or `num_steps` is less than 1.
    """
    return Flow(as_layer(layers), num_steps)
