"""Laws of weight matrices: pseudo-iid ones all have the same Gaussian process in the limit, at different speeds.

    iid           N(0, 1/n)
    orthogonal    sqrt(max(m, n) / n) U,  U uniform with orthonormal rows or columns
    low_rank      sqrt(m / (r n)) C P,  C of r orthonormal columns, P of standard normal entries
    block_sparse  k blocks on the diagonal of variance k / n, rows and columns permuted at random
    sparse        N(0, 1 / (n (1 - s))) with probability 1 - s, else zero

for m x n matrices whose entries have variance 1/n. Rows and columns are exchangeable and entries uncorrelated, with
fourth moments like those of independent ones. The effective width is what remains: r, n / k or n (1 - s).

References:
    Nait Saada, Naderi and Tanner (2024), arXiv:2310.16597.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bayesinf import errors

__all__ = ["WeightLaw", "block_sparse", "iid", "low_rank", "orthogonal", "sparse"]


class WeightLaw(eqx.Module):
    """A law of m x n matrices whose entries have mean zero and variance 1/n."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        """A matrix with m rows, one for each unit, and n columns, one for each unit of the layer before."""


class _Iid(WeightLaw):
    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        return jax.random.normal(key, (m, n), dtype) * n**-0.5


class _Orthogonal(WeightLaw):
    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        tall = jax.random.normal(key, (max(m, n), min(m, n)), dtype)
        q, r = jnp.linalg.qr(tall)
        q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)  # uniform only with these signs
        return (max(m, n) / n) ** 0.5 * (q if m >= n else q.T)


class _LowRank(WeightLaw):
    fraction: float = eqx.field(static=True)

    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        key_columns, key_factor = jax.random.split(key)
        rank = max(1, round(self.fraction * min(m, n)))
        columns, _ = jnp.linalg.qr(jax.random.normal(key_columns, (m, rank), dtype))
        return (m / (rank * n)) ** 0.5 * columns @ jax.random.normal(key_factor, (rank, n), dtype)


class _BlockSparse(WeightLaw):
    num_blocks: int = eqx.field(static=True)

    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        k = self.num_blocks
        if m % k or n % k:
            raise ValueError(f"num_blocks must divide the width, got {k} blocks for a matrix of shape ({m}, {n})")
        key_entries, key_rows, key_columns = jax.random.split(key, 3)
        blocks = jax.random.normal(key_entries, (k, m // k, n // k), dtype) * (k / n) ** 0.5
        matrix = jax.scipy.linalg.block_diag(*blocks)
        return matrix[jax.random.permutation(key_rows, m)][:, jax.random.permutation(key_columns, n)]


class _Sparse(WeightLaw):
    sparsity: float = eqx.field(static=True)

    def sample(self, key: Key[Array, ""], m: int, n: int, dtype: Any = None) -> Float[Array, "m n"]:
        key_entries, key_mask = jax.random.split(key)
        keep = 1.0 - self.sparsity
        entries = jax.random.normal(key_entries, (m, n), dtype) * (n * keep) ** -0.5
        return jnp.where(jax.random.bernoulli(key_mask, keep, (m, n)), entries, 0.0)


def iid() -> WeightLaw:
    """Independent normal entries."""
    return _Iid()


def orthogonal() -> WeightLaw:
    """Uniform orthogonal matrices, of orthonormal rows or columns where they are not square."""
    return _Orthogonal()


def low_rank(fraction: float = 0.25) -> WeightLaw:
    """Products of an orthonormal and a normal factor.

    Args:
        fraction: of the smaller side, in (0, 1]: the rank.

    Raises:
        ValueError: it is not.
    """
    if fraction != 1.0:
        errors.check_fraction("fraction", fraction)
    return _LowRank(float(fraction))


def block_sparse(num_blocks: int) -> WeightLaw:
    """Normal blocks, in rows and columns that are permuted at random.

    Args:
        num_blocks: a divisor of every width; a share 1 / num_blocks of entries is not zero.

    Raises:
        ValueError: it is no whole number above zero, or, later, divides no width.
    """
    return _BlockSparse(errors.check_count("num_blocks", num_blocks))


def sparse(sparsity: float) -> WeightLaw:
    """Normal entries, zero at random.

    Args:
        sparsity: the probability of a zero, in (0, 1).

    Raises:
        ValueError: it is not.
    """
    errors.check_fraction("sparsity", sparsity)
    return _Sparse(float(sparsity))
