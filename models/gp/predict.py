"""Draws of a latent function carried to new inputs.

    f* | f ~ N(m* + K* S^{-1} (f - m), K** - K* S^{-1} K*^T),     S = k(X, X), as the solver has it

f are draws of a posterior at X, of whatever likelihood: given the function there, new values do not depend on the data,
so that a draw of f* for each draw of f is exact. What is asked of f* (probabilities of classes, rates of counts) is
then a mean over draws.

References:
    Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 3.3 (equation 3.9).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from bayesinf import errors
from bayesinf.models.gp.process import GP, as_inputs, joint_tril, marginal_scale, to_columns
from bayesinf.models.gp.statespace import StateSpace

__all__ = ["predict_latent"]

BLOCK = 1024


def predict_latent(
    key: errors.KeyLike,
    process: GP | Callable[[PyTree], GP],
    f: ArrayLike,
    Xs: ArrayLike,
    parameters: PyTree = None,
    *,
    full_cov: bool = False,
    block: int | None = None,
) -> Float[Array, "... m"]:
    """Draws of a function at new inputs, given draws of it at those of a process.

    Args:
        key: a key or an integer seed.
        process: `GP(kernel, X)`, without noise, as the prior of f was; or a function of one draw of `parameters` that
            makes it.
        f: the function at X, (..., n): any axes of draws, chains and outputs in front.
        Xs: new inputs, (m,) or (m, d).
        parameters: a pytree of arrays, one for each entry of the first axes of f: of shape (s, ...) for f of
            (s, ..., n), as of draws of lengthscales. One Cholesky factor a draw, one draw after the other. None where
            `process` is one law for all draws.
        full_cov: whether values at different new inputs are drawn together, as functions are; else each is drawn by
            itself, which is all that a mean over draws at each input needs, in memory that does not grow with m^2.
        block: how many new inputs at a time, where each is drawn by itself; besides the result, memory is that of
            n x block entries of the kernel. 1024 where it is None; with solver=statespace() all.

    Returns:
        f* at Xs, shape (..., m).

    Raises:
        ValueError: shapes do not fit; the process has noise or a batch; or the covariance is not positive definite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> process = gp.GP(gp.RBF(1.0), jnp.arange(4.0))
        >>> f = process.sample(jax.random.key(0), (500,))  # stands for the draws of a posterior
        >>> new = gp.predict_latent(1, process, f, jnp.array([1.5, 9.0]))
        >>> new.shape, bool(jnp.std(new[:, 0] - 0.5 * (f[:, 1] + f[:, 2])) < jnp.std(new[:, 1]))
        ((500, 2), True)
        >>> lengthscales = jnp.linspace(0.5, 2.0, 500)
        >>> gp.predict_latent(
        ...     2, lambda length: gp.GP(gp.RBF(length), jnp.arange(4.0)), f, jnp.array([1.5]), lengthscales).shape
        (500, 1)
    """
    key = errors.as_key(key)
    inputs: Array = as_inputs("Xs", Xs)
    functions: Array = errors.as_array("f", is_floating=True)(f)
    errors.check_not_nan("f", functions)
    if parameters is None:
        if not isinstance(process, GP):
            raise ValueError(f"process must be a GP, or a function of parameters that are given, got {process!r}")
        return _draw(
            key, _check(process, functions, inputs), functions, inputs, full_cov, _block(process, inputs, block)
        )

    errors.check_arguments("process", process, "parameters")
    leaves = jax.tree.leaves(parameters)
    if functions.ndim < 2 or not leaves or any(jnp.shape(leaf)[:1] != functions.shape[:1] for leaf in leaves):
        raise ValueError(
            f"parameters must have a first axis of the length of that of f, {functions.shape[:1]}, got "
            f"{[jnp.shape(leaf) for leaf in leaves]}; reshape chains and draws into one axis"
        )

    def one(given: tuple[Array, Array, PyTree]) -> Array:
        key, f, parameters = given
        law = process(parameters)
        if not isinstance(law, GP):
            raise ValueError(f"process must be a function that makes a GP, got {law!r}")
        return _draw(key, _check(law, f, inputs), f, inputs, full_cov, _block(law, inputs, block))

    # one at a time: a batch of factorisations would hold all their matrices
    return jax.lax.map(one, (jax.random.split(key, len(functions)), functions, jax.tree.map(jnp.asarray, parameters)))


def _check(process: GP, f: Array, Xs: Array) -> GP:
    if process.batch_shape or process.noise is not None:
        raise ValueError(
            "process must be one GP without noise, the prior of the function itself; got batch shape "
            f"{process.batch_shape} and noise {process.noise}"
        )
    n, row = process.X.shape[0], process.X.shape[1:]
    if f.ndim == 0 or f.shape[-1] != n:
        raise ValueError(f"f must have a last axis of length {n}, one number for each row of X; got {f.shape}")
    if Xs.shape[1:] != row:
        raise ValueError(f"Xs must have rows of the shape of those of X, {row}, got {Xs.shape[1:]}")
    return process


def _block(process: GP, Xs: Array, block: int | None) -> int:
    if block is not None:
        return errors.check_count("block", block)
    return Xs.shape[0] if isinstance(process.solver, StateSpace) else BLOCK


def _draw(key: Array, process: GP, f: Array, Xs: Array, full_cov: bool, block: int) -> Array:
    m = Xs.shape[0]
    rows, lead = to_columns(f - process.loc, ())[0].T, f.shape[:-1]  # (s, n)
    if full_cov:
        mean, covariance = process._predict(rows, Xs, True)
        normals = jax.random.normal(key, mean.shape, mean.dtype)
        return (mean + normals @ joint_tril(covariance, jnp.zeros(())).T).reshape((*lead, m))

    def draw(key: Array, Xs: Array) -> Array:
        mean, variance = process._predict(rows, Xs, False)
        return mean + marginal_scale(variance, jnp.zeros(())) * jax.random.normal(key, mean.shape, mean.dtype)

    if m <= block:
        return draw(key, Xs).reshape((*lead, m))
    count = -(-m // block)
    keys = jax.random.split(key, count)

    def fill(found: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        key, start = given
        # the last block is moved back to fit, here as in the update
        new = draw(key, jax.lax.dynamic_slice_in_dim(Xs, start, block))
        return jax.lax.dynamic_update_slice_in_dim(found, new, start, axis=1), None

    found = jnp.zeros((rows.shape[0], m), jnp.result_type(rows, process.loc))
    return jax.lax.scan(fill, found, (keys, jnp.arange(count) * block))[0].reshape((*lead, m))
