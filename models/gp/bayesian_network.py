"""A Bayesian neural network of finite width with independent normal weights, and its posterior as a target.

    h_0 = x / sqrt(D),    f_l = sqrt(w_l) W_l h_l + sqrt(b_l) B_l,    h_{l+1} = phi(f_l) / sqrt(width),    f = f_depth

All W and B are standard normal: the variances stand outside, so that they may be changed, or matched to a Gaussian
process by `match_prior`, while the weights keep their law. At infinite width f is a Gaussian process with the
covariance `gram`.

References:
    Neal (1996), doi:10.1007/978-1-4612-0745-0.
"""

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from bayesinf import errors
from bayesinf.models.gp.process import as_inputs
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.kernel import serial
from bayesinf.models.nngp.layers import Layer, activation, dense
from bayesinf.target import Target

__all__ = ["BayesianNetwork"]

Weights = dict[str, Array]


class BayesianNetwork(eqx.Module):
    """A fully connected network with one output, and its prior.

    Args:
        dual: of the activation, such as `nngp.relu()`; its own parameters are not learnt.
        depth: hidden layers, at least 1.
        width: units in each.
        w_var: variances of the weights, > 0; a number or (depth + 1,).
        b_var: variances of the biases, > 0; a number or (depth + 1,).

    Attributes:
        log_w_var: their logarithms, (depth + 1,).
        log_b_var: likewise.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.models import gp, nngp
        >>> X = jnp.linspace(-1.0, 1.0, 10)
        >>> network = gp.BayesianNetwork(nngp.erf(), depth=2, width=16)
        >>> target = network.target(X, jnp.sin(X), noise=0.01)
        >>> kernel = bi.kernels.MALA(target, step_size=1e-3)
        >>> start = target.init(0, num_chains=2, template=network.sample_weights(1, X))
        >>> draws = bi.sample(2, kernel, start, num_samples=10, progress=False)
        >>> network.evaluate(network.sample_weights(3, X), X).shape
        (10,)
    """

    dual: Dual
    depth: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    log_w_var: Float[Array, " layers"]
    log_b_var: Float[Array, " layers"]

    def __init__(self, dual: Any, depth: int = 1, width: int = 100, w_var: Any = 1.0, b_var: Any = 1.0):
        if not isinstance(dual, Dual):
            raise ValueError(f"dual must be that of an activation, such as nngp.relu(), got {dual!r}")
        self.dual, self.depth = dual, errors.check_count("depth", depth)
        self.width = errors.check_count("width", width)
        self.log_w_var, self.log_b_var = (self._logs(*pair) for pair in (("w_var", w_var), ("b_var", b_var)))

    def _logs(self, name: str, value: Any) -> Array:
        value = errors.as_array(name, is_floating=True)(value)
        errors.check_positive(name, value)
        if value.shape not in ((), (self.depth + 1,)):
            raise ValueError(f"{name} must be a number, or one for each of {self.depth + 1} layers, got {value.shape}")
        return jnp.broadcast_to(jnp.log(value), (self.depth + 1,))

    def gram(self, X: Any) -> Float[Array, "n n"]:
        """Covariances of the outputs at infinite width; with one hidden layer, at any width."""
        layers: list[Layer] = [dense(jnp.exp(self.log_w_var[0]), jnp.exp(self.log_b_var[0]))]
        for w, b in zip(self.log_w_var[1:], self.log_b_var[1:], strict=True):
            layers += [activation(jax.lax.stop_gradient(self.dual)), dense(jnp.exp(w), jnp.exp(b))]
        return serial(*layers)(_rows(X))

    def sample_weights(self, key: errors.KeyLike, X: Any) -> Weights:
        """Standard normals W_l and B_l, for inputs of the shape of X."""
        keys = jax.random.split(errors.as_key(key), (self.depth + 1, 2))
        X = _rows(X)
        sizes = [X.shape[1], *[self.width] * self.depth, 1]
        weights = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            weights[f"weights_{layer}"] = jax.random.normal(keys[layer, 0], (fan_out, fan_in), X.dtype)
            weights[f"biases_{layer}"] = jax.random.normal(keys[layer, 1], (fan_out,), X.dtype)
        return weights

    def evaluate(self, weights: Weights, X: Any) -> Float[Array, " n"]:
        """The output of the network with these weights, at n inputs."""
        h = _rows(X)
        phi = jax.lax.stop_gradient(self.dual).phi
        for layer in range(self.depth + 1):
            w, b = (jnp.exp(0.5 * logs[layer]).astype(h.dtype) for logs in (self.log_w_var, self.log_b_var))
            h = phi(h) if layer else h
            h = w / math.sqrt(h.shape[1]) * h @ weights[f"weights_{layer}"].T + b * weights[f"biases_{layer}"]
        return h[:, 0]

    def sample(self, key: errors.KeyLike, X: Any) -> Float[Array, " n"]:
        """A function of the prior, at n inputs."""
        return self.evaluate(self.sample_weights(key, X), X)

    def target(self, X: Any, y: Any, *, noise: ArrayLike) -> Target:
        """The posterior of W and B given y = f(X) + normal noise, for any kernel.

        Args:
            X: inputs, (n,) or (n, D).
            y: data, (n,).
            noise: variance of the noise, > 0.
        """
        X, y = _rows(X), errors.as_array("y", is_floating=True)(y)
        if y.shape != X.shape[:1]:
            raise ValueError(f"y must have shape {X.shape[:1]}, a number for each row of X, got {y.shape}")
        errors.check_finite("y", y)
        errors.check_positive_scalar("noise", noise)
        return Target(_log_posterior, (self, X, y, jnp.asarray(noise)))


def _log_posterior(weights: Weights, data: Any) -> Array:
    network, X, y, noise = data
    squares = sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights)), jnp.zeros((), X.dtype))
    residual = y - network.evaluate(weights, X)
    return -0.5 * (squares + jnp.sum(residual**2) / noise + y.size * jnp.log(2.0 * math.pi * noise))


def _rows(X: Any) -> Array:
    X = as_inputs("X", X)
    if X.ndim > 2:
        raise ValueError(f"X must have shape (n,) or (n, D), got {X.shape}")
    return X[:, None] if X.ndim == 1 else X
