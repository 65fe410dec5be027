"""Layers of finite width: what each layer of the kernel language does to the units of a network with random weights.

    dense          y_a = sqrt(w / C) W x_a + sqrt(b) B                            C units at every place a, or over all
    conv           y_a = sqrt(w / (|F| C)) sum_{o in F} W_o x_{sa+o} + sqrt(b) B  offsets F of the filter, stride s
    average_pool   y_a = mean_{o in F} x_{sa+o}
    recurrent      h_{s+1} = sqrt(w / n) W phi(h_s) + sqrt(u / d) U x_{s+1} + sqrt(b) B
    layer_norm     y_a = (x_a - mean x_a) / sqrt(var x_a + epsilon),              over the units at one place
    residual       y = x + scale f(x)

with B standard normal and W of variance one. Units are arrays (n, *places, units). With one hidden layer, and no
layer norm, the second moments of the outputs are those of the kernel at any width; else as widths go to infinity one
after the other.

References:
    Novak, Xiao, Lee, Bahri, Yang, Hron, Abolafia, Pennington and Sohl-Dickstein (2019), arXiv:1810.05148.
    Nait Saada, Naderi and Tanner (2024), arXiv:2310.16597 (laws of filters: a matrix of its own for every offset).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bayesinf.models.nngp.layers import Activation, Dense, Flow, Layer, LayerNorm, Repeat, Residual, Sequence
from bayesinf.models.nngp.spatial import AveragePool, Conv, Flatten, GlobalPool, Recurrent
from bayesinf.models.nngp.weights import WeightLaw, iid

__all__ = ["Plan", "forward"]

Units = Float[Array, "n ..."]


class Plan(NamedTuple):
    """How wide a layer is, and where in the network.

    Attributes:
        width: of hidden layers.
        num_units: that weights at the end of this layer make.
        law: of the weights between hidden layers.
        reads_inputs: whether its first weights multiply the inputs of the network; they are independent then.
        gives_outputs: whether its last weights make the outputs; they are independent then.
    """

    width: int
    num_units: int
    law: WeightLaw
    reads_inputs: bool = False
    gives_outputs: bool = False

    def weights(self, key: Key[Array, ""], m: int, n: int, dtype: Any) -> Float[Array, "m n"]:
        """A matrix of m rows, whose entries have variance 1 / n."""
        law = iid() if self.reads_inputs or self.gives_outputs else self.law
        return law.sample(key, m, n, dtype)


def forward(layer: Layer, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    """The units that a layer makes of units x, with weights drawn at random; that shapes fit is checked by its kernel.

    Raises:
        ValueError: the layer has no finite counterpart.
    """
    match layer:
        case Sequence():
            return _sequence(layer, key, x, plan)
        case Repeat():
            return _repeat(layer, key, x, plan)
        case Residual():
            branch = plan._replace(num_units=x.shape[-1], gives_outputs=False)
            return x + layer.scale.astype(x.dtype) * forward(layer.branch, key, x, branch)
        case Dense():
            return _dense(layer, key, x, plan)
        case Conv():
            return _conv(layer, key, x, plan)
        case Recurrent():
            return _recurrent(layer, key, x, plan)
        case Activation():
            return layer.dual.phi(x)
        case LayerNorm():
            variance = jnp.var(x, axis=-1, keepdims=True)
            centred = x - jnp.mean(x, axis=-1, keepdims=True)
            return centred * jax.lax.rsqrt(variance + layer.epsilon.astype(x.dtype))
        case AveragePool():
            return _average_pool(layer, x)
        case GlobalPool():
            return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        case Flatten():
            return x.reshape(x.shape[0], -1)
        case Flow():
            raise ValueError(
                "kernel must have a network of finite depth: flow() is the limit of infinitely many blocks; "
                "repeat(depth, residual(..., scale=depth**-0.5)) with a large depth is close"
            )
    raise ValueError(f"kernel must be made of nngp's own layers: no finite network is known of {type(layer).__name__}")


def _sequence(layer: Sequence, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    last = max((i for i, one in enumerate(layer.layers) if _has_weights(one)), default=-1)
    # what follows the last weights may need all of their units, as layer_norm does
    is_free = all(isinstance(one, AveragePool | GlobalPool) for one in layer.layers[last + 1 :])
    hidden = plan._replace(num_units=plan.width, gives_outputs=False)
    reads_inputs = plan.reads_inputs
    for i, (one, key_one) in enumerate(zip(layer.layers, jax.random.split(key, len(layer.layers)), strict=True)):
        own = plan if i == last and is_free else hidden
        x = forward(one, key_one, x, own._replace(reads_inputs=reads_inputs))
        reads_inputs = reads_inputs and not _has_weights(one)
    return x


def _repeat(layer: Repeat, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    keys = jax.random.split(key, layer.times)
    # all but the outputs have as many units as what is repeated, which makes one compiled step
    hidden = plan._replace(num_units=x.shape[-1], gives_outputs=False)
    num_hidden = layer.times - plan.gives_outputs
    x, _ = jax.lax.scan(lambda x, key: (forward(layer.layer, key, x, hidden), None), x, keys[:num_hidden])
    return forward(layer.layer, keys[-1], x, plan) if plan.gives_outputs else x


def _dense(layer: Dense, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    key_weights, key_biases = jax.random.split(key)
    weights = plan.weights(key_weights, plan.num_units, x.shape[-1], x.dtype)
    return _root(layer.w_var, x) * x @ weights.T + _biases(layer, key_biases, x, plan.num_units)


def _conv(layer: Conv, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    key_weights, key_biases = jax.random.split(key)
    num_offsets = layer.size**2
    filters = jax.vmap(lambda key: plan.weights(key, plan.num_units, x.shape[-1], x.dtype))(
        jax.random.split(key_weights, num_offsets)
    ).reshape(layer.size, layer.size, plan.num_units, x.shape[-1])
    biases = _biases(layer, key_biases, x, plan.num_units)
    if layer.padding != "valid":
        reach = layer.size // 2
        mode = "wrap" if layer.padding == "circular" else "constant"
        x = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode=mode)
    strides = layer.stride, layer.stride
    moved = jax.lax.conv_general_dilated(x, filters, strides, "VALID", dimension_numbers=("NHWC", "HWOI", "NHWC"))
    return _root(layer.w_var / num_offsets, x) * moved + biases


def _recurrent(layer: Recurrent, key: Key[Array, ""], x: Units, plan: Plan) -> Units:
    key_weights, key_biases, key_inputs = jax.random.split(key, 3)
    weights = plan._replace(reads_inputs=False, gives_outputs=False).weights(
        key_weights, plan.width, plan.width, x.dtype
    )
    inputs = plan._replace(gives_outputs=False).weights(key_inputs, plan.width, x.shape[-1], x.dtype)
    given = _root(layer.input_var, x) * x @ inputs.T + _biases(layer, key_biases, x, plan.width)
    given = jnp.moveaxis(given, 1, 0)

    def step(state: Array, given: Array) -> tuple[Array, None]:
        return _root(layer.w_var, x) * layer.dual.phi(state) @ weights.T + given, None

    return jax.lax.scan(step, given[0], given[1:])[0]


def _average_pool(layer: AveragePool, x: Units) -> Units:
    num_places = x.ndim - 2
    window, strides = ((1, *(number,) * num_places, 1) for number in (layer.size, layer.stride))
    total = jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.add, window, strides, "VALID")
    return total / layer.size**num_places


def _has_weights(layer: Layer) -> bool:
    match layer:
        case Sequence():
            return any(_has_weights(one) for one in layer.layers)
        case Repeat():
            return _has_weights(layer.layer)
        case _:
            return layer.ends_in_weights or isinstance(layer, Residual | Flow)


def _biases(layer: Dense | Conv | Recurrent, key: Key[Array, ""], x: Units, num_units: int) -> Float[Array, " units"]:
    return _root(layer.b_var, x) * jax.random.normal(key, (num_units,), x.dtype)


def _root(variance: Float[Array, ""], x: Units) -> Float[Array, ""]:
    return jnp.sqrt(variance.astype(x.dtype))
