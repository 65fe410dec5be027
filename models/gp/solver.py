"""What a Gaussian process asks of linear algebra: a density, a square root, and predictions.

A `Solver` says how; `factorize` does the work that does not depend on the data, once. What it returns, a `Factor`,
answers for any data. Data are columns: (..., n, s) for s series of n numbers under each of a batch of processes.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayesinf import errors

__all__ = ["Factor", "Solver", "add_jitter", "check_jitter", "raise_noise"]


class Factor(eqx.Module):
    """A covariance S = K + diag(noise) of n points, ready for use.

    `batch_shape` is that of the parameters, `num_normals` the number of independent normals that a draw is made of.
    """

    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def dtype(self) -> Any: ...

    @property
    @abc.abstractmethod
    def num_normals(self) -> int: ...

    @abc.abstractmethod
    def log_prob(self, columns: Float[Array, "... n s"]) -> Float[Array, "... s"]:
        """Log N(r; 0, S) of every column r."""

    @abc.abstractmethod
    def sqrt_matvec(self, columns: Float[Array, "... k s"]) -> Float[Array, "... n s"]:
        """R z for every column z of standard normals, with R R^T = S."""

    def whiten(self, columns: Float[Array, "... n s"]) -> Float[Array, "... n s"]:
        """R^{-1} r for every column r, the inverse of `sqrt_matvec`."""
        raise ValueError(f"solver must be dense(), statespace() or vecchia() to whiten by, got {type(self).__name__}")

    def innovations(self, columns: Float[Array, "... n s"]) -> tuple[Float[Array, "... n s"], Float[Array, "... n s"]]:
        """What each number of a column adds to those before it, in standard deviations, and their logarithm.

        Row i of the first is (r_i - E[r_i | r_0, ..., r_{i-1}]) / d_i, and of the second log d_i; both are 0 where r_i
        is missing.
        """
        raise ValueError(
            f"solver must be dense(), or statespace() of sorted times, to take the data one by one; got "
            f"{type(self).__name__}"
        )

    @abc.abstractmethod
    def predict(
        self, columns: Float[Array, "... n s"], kernel: Any, X: Array, Xs: Array, full_cov: bool
    ) -> tuple[Float[Array, "... m s"], Float[Array, "..."]]:
        """Mean of f(Xs) - m(Xs) given the residuals, and its variances (..., m), or covariance (..., m, m)."""


class Solver(eqx.Module):
    """How the linear algebra of a process is done; see `dense`, `statespace`, `vecchia`, `sgpr` and `hsgp`.

    Class attributes:
        takes_missing: whether NaN among the data is missing, rather than an error.
    """

    takes_missing: ClassVar[bool] = False

    @abc.abstractmethod
    def factorize(self, kernel: Any, X: Array, noise: Float[Array, "..."] | None) -> Factor:
        """The covariance of kernel and noise at X; noise is None, or variances of shape (), (..., 1) or (..., n)."""


def raise_noise(
    variances: Float[Array, "... n"], noise: Float[Array, "..."] | None, jitter: float | None
) -> tuple[Float[Array, "... n"], Float[Array, "..."]]:
    """The noise after `add_jitter`, and 0; or ones, and -inf where a variance of prior or noise is negative, or NaN.

    Values that are traced are not refused. Without this a negative noise would be raised to the jitter, and a negative
    prior variance be hidden by the noise.
    """
    given = jnp.zeros((), variances.dtype) if noise is None else noise
    is_ok = jnp.all(variances >= 0, axis=-1) & jnp.all(jnp.atleast_1d(given) >= 0, axis=-1)
    raised = jnp.where(is_ok[..., None], add_jitter(variances, noise, jitter), 1.0)
    return raised, jnp.where(is_ok, 0.0, -jnp.inf).astype(variances.dtype)


def check_jitter(jitter: float | None) -> None:
    """None, or a number that is not negative."""
    if jitter is not None:
        errors.check_nonnegative("jitter", jitter)


def add_jitter(
    variances: Float[Array, "... n"], noise: Float[Array, "..."] | None, jitter: float | None
) -> Float[Array, "... n"]:
    """The variances of the noise, raised to jitter times the mean prior variance where they are below it.

    A model whose noise is above that is left exactly as it is.
    """
    relative = float(jnp.finfo(variances.dtype).eps) ** 0.5 if jitter is None else jitter
    least = relative * jnp.mean(variances, axis=-1, keepdims=True)
    given = jnp.zeros_like(least) if noise is None else jnp.asarray(noise, variances.dtype)
    given = given[..., None] if given.ndim == 0 else given
    raised = jnp.maximum(given, least)
    return jnp.broadcast_to(raised, jnp.broadcast_shapes(raised.shape, variances.shape))
