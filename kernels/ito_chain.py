"""Ito chains: Markov chains that look like the Euler-Maruyama scheme, with any noise and an inexact drift.

    X_{k+1} = X_k + eta b(X_k) + eta^((1 + gamma) / 2) sigma(X_k) eps_k(X_k),      E eps = 0,  Cov eps = I

follows the diffusion  dZ = b(Z) dt + eta^(gamma / 2) sigma(Z) dW  at the times k eta. gamma = 0 is the scale of
diffusions (Langevin Monte Carlo, SGLD), gamma = 1 that of stochastic gradient descent, where eta multiplies the noise
too. The noise need not be normal and may depend on the position; b may be drawn anew in every step, as the gradient of
a minibatch is.

For gamma = 0 every noise whose third moments vanish gives weak order 1, as normals do: Rademacher signs, 32 of them to
a random word, are the cheapest. Skewed noise gives order 1/2. In fourth moments a chain shows its noise at order eta.

References:
    Ustimenko and Beznosikov (2024), arXiv:2310.06081 (the chain, and its distance from the diffusion).
    Kloeden and Platen (1992), doi:10.1007/978-3-662-12616-5, section 14.1 (simplified weak schemes).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.captured import captured
from bayesinf.kernel import Info, Kernel, is_finite, select
from bayesinf.kernels.vectors import as_position, combine, normals

__all__ = ["ItoChain", "ItoState", "signs"]


class ItoState(NamedTuple):
    """The position alone."""

    position: PyTree


class ItoChain(Kernel):
    """X' = X + eta b(X) + eta^((1 + gamma) / 2) sigma(X) eps.

    It has no target and samples whatever its drift and diffusion say. `num_gradients` counts evaluations of the drift.
    A move to where the position is not finite is undone and counted; a drift that is not finite where the chain already
    stands undoes every move from there.

    Attributes:
        drift: b, `drift(position)` or, where there are data, `drift(position, data)`; a pytree like the position. If it
            has a parameter named `key`, it is random, and given a fresh key by that name in every step. Static.
        diffusion: sigma, a function of the same arguments without a key, that returns a scalar, a pytree like the
            position (a diagonal), or a matrix of shape (d, d) over the position as `ravel_pytree` lays it out. Static.
        noise: eps: "gaussian", "rademacher" (signs), or a function `noise(key, position)` that returns a pytree like
            the position, of mean zero and covariance the identity. Static.
        step_size: eta > 0.
        exponent: gamma in [0, 1].
        data: any pytree of arrays for drift and diffusion; new ones of the same shape compile nothing.

    Raises:
        ValueError: an argument is not of these kinds, or (from `init`) what a function returns has the wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def drift(x, rate): return -rate * x
        >>> def diffusion(x, rate): return 1.0 + 0.1 * jnp.abs(x)
        >>> kernel = bi.kernels.ItoChain(drift, diffusion, "rademacher", step_size=0.01, data=jnp.array(2.0))
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 3)), num_samples=100, progress=False)
        >>> draws.num_chains
        4
    """

    is_exact: ClassVar[bool] = False

    drift: Callable[..., Any] = eqx.field(static=True, converter=captured)
    diffusion: Callable[..., Any] = eqx.field(static=True, converter=captured)
    noise: str | Callable[..., Any] = eqx.field(static=True, converter=captured, default="gaussian")
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"), kw_only=True)
    exponent: Float[Array, ""] = eqx.field(converter=errors.as_array("exponent"), kw_only=True, default=0.0)
    data: PyTree = eqx.field(converter=lambda data: errors.as_arrays("data", data), kw_only=True, default=None)

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)
        if errors.is_concrete(self.exponent) and not 0 <= float(self.exponent) <= 1:
            raise ValueError(f"exponent must lie in [0, 1], got {float(self.exponent)}")
        for name in ("drift", "diffusion"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a function of the position, got {getattr(self, name)!r}")
            _check_arguments(name, getattr(self, name), self.data is not None)
        if callable(self.noise):
            errors.check_arguments("noise", getattr(self.noise, "function", self.noise), "key, position")
        else:
            errors.check_choice("noise", self.noise, ("gaussian", "rademacher"))

    def init(self, position: PyTree) -> ItoState:
        position = as_position(position)
        like = jax.tree.map(jnp.shape, position)
        parts = jax.eval_shape(lambda key: self._parts(key, position), jax.random.key(0))
        for name, value in parts.items():
            if jax.tree.map(jnp.shape, value) != like:
                raise ValueError(
                    f"{name} must return a pytree like the position, with shapes {like}, got shapes "
                    f"{jax.tree.map(jnp.shape, value)}"
                )
        jax.eval_shape(lambda: _times(self.diffusion(*self._arguments(position)), position))
        return ItoState(position)

    def step(self, key: Key[Array, ""], state: ItoState) -> tuple[ItoState, Info]:
        eta, x = self.step_size, state.position
        parts = self._parts(key, x)
        sigma_eps = _times(self.diffusion(*self._arguments(x)), parts["noise"])
        scale = eta ** ((1 + self.exponent) / 2)
        position = combine((1, x), (eta, parts["drift"]), (scale, sigma_eps))

        is_ok = is_finite(position)
        rate = is_ok.astype(jnp.result_type(*jax.tree.leaves(x)))
        info = Info(rate, is_ok, ~is_ok, jnp.asarray(1, jnp.int32))
        return select(is_ok, ItoState(position), state), info

    def _parts(self, key: Key[Array, ""], x: PyTree) -> dict[str, PyTree]:
        """The drift b(x) and the noise eps."""
        if _takes_key(self.drift):
            key, key_drift = jax.random.split(key)
            drift = self.drift(*self._arguments(x), key=key_drift)
        else:
            drift = self.drift(*self._arguments(x))
        if self.noise == "gaussian":
            (noise,) = normals(key, x, 1)
        else:
            noise = signs(key, x) if self.noise == "rademacher" else self.noise(key, x)  # type: ignore[operator]
        return {"drift": drift, "noise": noise}

    def _arguments(self, x: PyTree) -> tuple[PyTree, ...]:
        return (x,) if self.data is None else (x, self.data)


def signs(key: Key[Array, ""], like: PyTree) -> PyTree:
    """Independent Rademacher signs, -1 or 1, in the structure and dtypes of `like`: 32 from each random word.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.kernels.ito_chain import signs
        >>> sorted(set(signs(jax.random.key(0), jnp.zeros(100)).tolist()))
        [-1.0, 1.0]
    """
    flat, unravel = ravel_pytree(like)
    words = jax.random.bits(key, (-(-flat.size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return unravel(2 * jnp.ravel(bits)[: flat.size].astype(flat.dtype) - 1)


def _times(sigma: Any, noise: PyTree) -> PyTree:
    """The noise times a scalar, a diagonal like it, or a matrix over its ravelled coordinates."""
    shapes, like = jax.tree.map(jnp.shape, sigma), jax.tree.map(jnp.shape, noise)
    if shapes == like:
        return jax.tree.map(lambda s, z: jnp.asarray(s, z.dtype) * z, sigma, noise)
    if shapes == ():
        return combine((sigma, noise))
    flat, unravel = ravel_pytree(noise)
    if shapes == (flat.size, flat.size):
        return unravel(jnp.asarray(sigma, flat.dtype) @ flat)
    raise ValueError(
        f"diffusion must return a scalar, a pytree like the position, with shapes {like}, or a matrix of shape "
        f"{(flat.size, flat.size)}; got shapes {shapes}"
    )


def _check_arguments(name: str, function: Any, has_data: bool) -> None:
    function = getattr(function, "function", function)  # as it was before it was captured
    if _takes_key(function):
        function = functools.partial(function, key=None)
    errors.check_arguments(name, function, "position, data" if has_data else "position")


def _takes_key(drift: Any) -> bool:
    return "key" in inspect.signature(getattr(drift, "function", drift)).parameters
