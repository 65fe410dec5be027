"""Networks of finite width: draws of them, and how far from Gaussian they are.

One hidden layer of n units, f = n^{-1/2} sum_j v_j phi(u_j), has the density

    p(f) = N(f; 0, s^2) (1 + kappa / 24 He_4(f / s)) + O(n^{-2}),      He_4(x) = x^4 - 6 x^2 + 3

with excess kurtosis kappa = (3 / n) (E phi^4 / (E phi^2)^2 - 1), which is 15 / n for ReLU. Deep networks without biases
whose activation is positively homogeneous have exactly

    kappa = 3 (prod_l (1 + r / n_l) - 1),       r = E phi^4 / (E phi^2)^2 - 1,  which is 5 for ReLU

References:
    Antognini (2019), arXiv:1908.10030.
    Yaida (2020), arXiv:1910.00019.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bayesinf import errors
from bayesinf.models.nngp.covariance import check_inputs
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.duals.rectifiers import Rectifier, relu
from bayesinf.models.nngp.finite_layers import Plan, forward
from bayesinf.models.nngp.kernel import NNGP, NetworkKernel
from bayesinf.models.nngp.layers import Dense, check_dual
from bayesinf.models.nngp.layers import Sequence as Layers
from bayesinf.models.nngp.weights import WeightLaw, iid

__all__ = ["edgeworth_log_density", "excess_kurtosis", "sample_features", "sample_network"]


def sample_network(
    key: errors.KeyLike,
    kernel: NNGP | NetworkKernel,
    X: Real[ArrayLike, "n ..."],
    *,
    width: int,
    law: WeightLaw | None = None,
    num_outputs: int = 1,
) -> Float[Array, "n outputs"]:
    """The outputs of a random network of finite width, whose covariance tends to `kernel(X)`.

    The weights that multiply the inputs, and those that make the outputs, are independent normal ones, those between
    hidden layers follow `law`; of a convolution every offset of the filter has a matrix of its own. Layer norm takes
    off the mean of the units, which is zero in the limit.

    Args:
        key: PRNG key or seed.
        kernel: an `NNGP`, with any `residual` but "ode", or a kernel of layers made by `serial`, all but `flow`.
        X: inputs, (n, d), sequences (n, time, d) or images (n, height, width, channels).
        width: units in every hidden layer; of a convolution, its channels.
        law: of the weights between hidden layers; `iid()` where it is None.
        num_outputs: outputs of one network, which share its hidden layers. Layers that end in a residual connection,
            `recurrent` or `layer_norm` have as many units as they are wide, of which the first are given.

    Raises:
        ValueError: the kernel has no network of finite depth, or is the tangent kernel, or shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import nngp
        >>> kernel = nngp.NNGP(nngp.relu(), depth=2, w_var=2.0, b_var=0.1)
        >>> nngp.sample_network(0, kernel, jnp.ones((5, 3)), width=64, law=nngp.sparse(0.5)).shape
        (5, 1)
        >>> kernel = nngp.serial(
        ...     nngp.conv(3, stride=2), nngp.activation(nngp.relu()), nngp.average_pool(2), nngp.flatten(), nngp.dense()
        ... )
        >>> nngp.sample_network(0, kernel, jnp.ones((5, 8, 8, 3)), width=16, num_outputs=10).shape
        (5, 10)
    """
    errors.check_count("num_outputs", num_outputs)
    if isinstance(kernel, NetworkKernel):
        inputs = _checked(kernel, X, width)
        plan = Plan(width, num_outputs, _as_law(law), reads_inputs=True, gives_outputs=True)
        outputs = forward(kernel.network, errors.as_key(key), inputs, plan)
        if outputs.shape[1] < num_outputs:
            raise ValueError(
                f"num_outputs must be at most {outputs.shape[1]}, the units of the last layer, got {num_outputs}; "
                "take a greater width, or end the layers in dense()"
            )
        return outputs[:, :num_outputs]
    key_hidden, key_weights, key_biases = jax.random.split(errors.as_key(key), 3)
    units = _hidden(key_hidden, kernel, X, width, law)
    scale = jnp.sqrt(kernel.last_w_var).astype(units.dtype)
    weights = jax.random.normal(key_weights, (num_outputs, width), units.dtype) * width**-0.5
    if kernel.residual is not None:
        return scale * units @ weights.T
    return scale * _affine(kernel, kernel.dual.phi(units), weights, key_biases)


def sample_features(
    key: errors.KeyLike,
    kernel: NNGP | NetworkKernel,
    X: Real[ArrayLike, "n ..."],
    *,
    width: int,
    law: WeightLaw | None = None,
) -> Float[Array, "n features"]:
    """What the last layer of a random network is given: given these m features F its outputs are exactly Gaussian.

        f | F ~ N(0, s (b + w F F^T / m))       with w_var w, b_var b and last_w_var s of the kernel

    Arguments and errors as of `sample_network`; the kernel is an `NNGP` without residual connections, where m is the
    width, or its layers end in `dense(w, b)`, where s is 1.
    """
    if isinstance(kernel, NetworkKernel):
        match kernel.network:
            case Layers(layers=(*before, Dense())) if before:
                inputs = _checked(kernel, X, width)
                plan = Plan(width, width, _as_law(law), reads_inputs=True)
                return forward(Layers(tuple(before)), errors.as_key(key), inputs, plan)
        raise ValueError("kernel must end in dense(), after other layers; sample_network takes others")
    if getattr(kernel, "residual", None) is not None:
        raise ValueError(f"kernel must have residual=None, got {kernel.residual!r}; sample_network takes others")
    units = _hidden(errors.as_key(key), kernel, X, width, law)
    return kernel.dual.phi(units)


def _as_law(law: Any) -> WeightLaw:
    if law is None:
        return iid()
    if not isinstance(law, WeightLaw):
        raise ValueError(f"law must be one of nngp's, such as nngp.orthogonal(), got {law!r}")
    return law


def _checked(kernel: NetworkKernel, X: Real[ArrayLike, "n ..."], width: int) -> Array:
    """Inputs that the kernel takes: what is no kernel is no network either, and is refused in the same words."""
    _check_head(kernel)
    errors.check_count("width", width)
    inputs = check_inputs("X", X)
    jax.eval_shape(kernel.diagonal, inputs)
    return inputs


def _check_head(kernel: NNGP | NetworkKernel) -> None:
    if kernel.head != "nngp":
        raise ValueError(
            f'kernel must have head="nngp", the covariance of the outputs of a network, got {kernel.head!r}'
        )


def _hidden(key: Array, kernel: NNGP, X: Real[ArrayLike, "n ..."], width: int, law: WeightLaw | None) -> Array:
    """Units before the last activation; of a residual network, after the last block."""
    if not isinstance(kernel, NNGP):
        raise ValueError(f"kernel must be an NNGP, or layers put together by serial(), got {type(kernel).__name__}")
    _check_head(kernel)
    if kernel.residual == "ode":
        raise ValueError('kernel must have finite depth, got residual="ode"; "scaled" with many blocks is close')
    errors.check_count("width", width)
    inputs = check_inputs("X", X)
    inputs = inputs.reshape(inputs.shape[0], -1)
    law = _as_law(law)
    key_first, key_bias, key_layers = jax.random.split(key, 3)
    first = jax.random.normal(key_first, (width, inputs.shape[1]), inputs.dtype) * inputs.shape[1] ** -0.5
    units = _affine(kernel, inputs, first, key_bias)
    scale = kernel.depth**-0.5 if kernel.residual == "scaled" else 1.0

    def layer(units: Array, key: Array) -> tuple[Array, None]:
        key_weights, key_bias = jax.random.split(key)
        weights = law.sample(key_weights, width, width, units.dtype)
        moved = _affine(kernel, kernel.dual.phi(units), weights, key_bias)
        return (moved if kernel.residual is None else units + scale * moved), None

    num_layers = kernel.depth - 1 if kernel.residual is None else kernel.depth
    return jax.lax.scan(layer, units, jax.random.split(key_layers, num_layers))[0]


def _affine(kernel: NNGP, x: Array, weights: Array, key_bias: Array) -> Array:
    """Weights of variance w_var and biases of variance b_var, out of unit weights."""
    biases = jax.random.normal(key_bias, (weights.shape[0],), x.dtype)
    w_scale, b_scale = jnp.sqrt(kernel.w_var).astype(x.dtype), jnp.sqrt(kernel.b_var).astype(x.dtype)
    return w_scale * x @ weights.T + b_scale * biases


def excess_kurtosis(
    width: int | Sequence[int],
    depth: int | None = None,
    *,
    dual: Dual | None = None,
    variance: Real[ArrayLike, ""] = 1.0,
) -> Float[Array, ""]:
    """E f^4 / (E f^2)^2 - 3 of one output of a network with independent normal weights and no biases.

    Args:
        width: of the hidden layers: one number, or one for each.
        depth: how many hidden layers; None for as many as there are widths. Only ReLU, leaky ReLU and the absolute
            value have a closed form beyond one.
        dual: of the activation; ReLU where it is None.
        variance: of the units before the activation, which matters where it is not homogeneous.

    Returns:
        Exact at any width.

    Raises:
        ValueError: a count is less than 1, or the activation has no closed form at this depth.

    Example:
        >>> from bayesinf.models import nngp
        >>> round(float(nngp.excess_kurtosis(128, depth=3)), 4)
        0.3655
    """
    dual = relu() if dual is None else dual
    check_dual(dual)
    given = len(width) if isinstance(width, Sequence) else None
    depth = errors.check_count("depth", (given or 1) if depth is None else depth)
    if given not in (None, depth):
        raise ValueError(f"width must be one number, or one for each of {depth} hidden layers, got {width}")
    errors.check_positive_scalar("variance", variance)
    widths = list(width) if isinstance(width, Sequence) else [width] * depth
    for one in widths:
        errors.check_count("width", one)
    if isinstance(dual, Rectifier):
        ratio = 6.0 * (1.0 + dual.slope**4) / (1.0 + dual.slope**2) ** 2 - 1.0
    elif len(widths) == 1:
        ratio = _fourth_moment(dual, variance) / jnp.asarray(dual.v(variance)) ** 2 - 1.0
    else:
        raise ValueError(f"dual must be positively homogeneous, such as relu(), for depth > 1, got {dual}")
    return 3.0 * jnp.expm1(sum(jnp.log1p(ratio / one) for one in widths))


def _fourth_moment(dual: Dual, variance: Real[ArrayLike, ""]) -> Array:
    """E phi(u)^4, by the trapezoid, which kinks cost 1e-7."""
    x = jnp.arange(-12 * 1024, 12 * 1024 + 1) / 1024.0
    density = jnp.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    return jnp.sum(density * dual.phi(jnp.sqrt(jnp.asarray(variance, x.dtype)) * x) ** 4) / 1024.0


def edgeworth_log_density(
    f: Real[ArrayLike, "..."], variance: Real[ArrayLike, "..."], excess_kurtosis: Real[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """The log density of an output of a wide network, to first order in 1 / width.

        log N(f; 0, s^2) + log(1 + kappa / 24 He_4(f / s))

    Args:
        f: outputs.
        variance: s^2 > 0, such as `kernel.diagonal(x)`.
        excess_kurtosis: kappa in [0, 4), beyond which the second factor is no longer positive.

    Returns:
        Of the broadcast shape.

    Raises:
        ValueError: the variance is not positive, or kappa out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import nngp
        >>> gaussian = nngp.edgeworth_log_density(5.0, 1.0, 0.0)
        >>> finite = nngp.edgeworth_log_density(5.0, 1.0, nngp.excess_kurtosis(100))
        >>> round(float(finite - gaussian), 2)  # tails are heavier
        1.38
    """
    errors.check_positive("variance", variance)
    errors.check_nonnegative("excess_kurtosis", excess_kurtosis)
    if errors.is_concrete(excess_kurtosis) and not jnp.all(jnp.asarray(excess_kurtosis) < 4.0):
        raise ValueError(
            f"excess_kurtosis must be less than 4, where the expansion is a density, got {excess_kurtosis}; "
            "for narrower networks average N(0, variance given the features) over sample_features"
        )
    z2 = jnp.asarray(f) ** 2 / variance
    hermite = z2**2 - 6.0 * z2 + 3.0
    return -0.5 * (z2 + jnp.log(2.0 * math.pi * jnp.asarray(variance))) + jnp.log1p(excess_kurtosis / 24.0 * hermite)
