"""Keys and values of what a transformer has read: of a prompt once, of each particle's own tokens beside it.

A particle attends to the prompt and to its own tokens. The prompt's segment has no axis of particles; resampling moves
rows of the other segment alone, and of these only rows that change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bayesinf import resampling

__all__ = ["KeysValues", "LanguageCache", "copy_rows"]


class KeysValues(NamedTuple):
    """What attention reads in one layer: the keys with time last, the layout that scores are computed from fastest.

    Attributes:
        keys: (..., k, e, t) for k heads of size e.
        values: (..., k, t, e).
    """

    keys: Float[Array, "*n k e t"]
    values: Float[Array, "*n k t e"]


class LanguageCache(NamedTuple):
    """The cache of n particles that continue one prompt; what lies beyond a length is never read.

    Attributes:
        prompt: for every layer, keys and values of the prompt, shared by all particles.
        prompt_length: how many of them are the prompt's, the rest being padding.
        suffix: for every layer, keys and values of the particles' own tokens.
        lengths: how many tokens each particle has of its own.
    """

    prompt: tuple[KeysValues, ...]
    prompt_length: Int[Array, ""]
    suffix: tuple[KeysValues, ...]
    lengths: Int[Array, " n"]

    def gather(self, ancestors: Int[Array, " m"]) -> "LanguageCache":
        """The cache of m particles, the i-th of which is a copy of particle ancestors[i]."""
        suffix = copy_rows(self.suffix, ancestors)
        return self._replace(suffix=suffix, lengths=resampling.gather(self.lengths, ancestors))

    def place(self, other: "LanguageCache") -> "LanguageCache":
        """The cache with the first particle of `other`, of the same prompt, in its first place."""
        suffix = jax.tree.map(lambda leaf, new: leaf.at[0].set(new[0]), self.suffix, other.suffix)
        return self._replace(suffix=suffix, lengths=self.lengths.at[0].set(other.lengths[0]))

    def truncate(self, lengths: Int[Array, " n"]) -> "LanguageCache":
        """The cache as it was when the particles had these many tokens of their own, or fewer."""
        return self._replace(lengths=jnp.minimum(self.lengths, lengths))


def copy_rows(tree: PyTree, ancestors: Int[Array, " m"]) -> PyTree:
    """`resampling.gather` of rows that are large: those that stay where they are, are not copied.

    Where every row that is copied also stays in its place, as after a resampling that leaves survivors in their slots,
    rows are overwritten one by one, in place inside a compiled loop, at a cost in proportion to how many change. For
    all other ancestors it is `resampling.gather`.

    Args:
        tree: a pytree of arrays with a leading axis of n rows.
        ancestors: m indices of rows, clipped to [0, n).

    Returns:
        Rows ancestors[0], ..., ancestors[m-1] of every leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.language import copy_rows
        >>> copy_rows(jnp.array([10.0, 20.0, 30.0]), jnp.array([0, 0, 2])).tolist()
        [10.0, 10.0, 30.0]
    """
    num_rows = jax.tree.leaves(tree)[0].shape[0]
    if ancestors.shape[0] != num_rows:
        return resampling.gather(tree, ancestors)
    ancestors = jnp.clip(ancestors, 0, num_rows - 1)
    is_changed = ancestors != jnp.arange(num_rows)
    changed = jnp.nonzero(is_changed, size=num_rows, fill_value=0)[0]

    def copy(i: Array, tree: PyTree) -> PyTree:
        row = changed[i]

        def overwrite(leaf: Array) -> Array:
            source = jax.lax.dynamic_index_in_dim(leaf, ancestors[row], keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(leaf, source, row, axis=0)

        return jax.tree.map(overwrite, tree)

    # loops of no or one turn where a cond would do: what is carried through a loop stays where it is in memory
    is_in_place = jnp.all(ancestors[ancestors] == ancestors)
    tree = jax.lax.fori_loop(0, jnp.where(is_in_place, jnp.sum(is_changed), 0), copy, tree)
    return jax.lax.fori_loop(0, jnp.where(is_in_place, 0, 1), lambda _, tree: resampling.gather(tree, ancestors), tree)


def write(
    own: KeysValues, key: Array, value: Array, lengths: Int[Array, " n"], is_active: Bool[Array, " n"]
) -> KeysValues:
    """The keys and values (n, k, e) of one more token, written where each active particle ends."""
    num, size = own.values.shape[0], own.values.shape[2]
    where = jnp.where(is_active, lengths, size)  # out of bounds, which is dropped
    rows = jnp.arange(num)
    return KeysValues(
        own.keys.at[rows, :, :, where].set(key, mode="drop", unique_indices=True),
        own.values.at[rows, :, where].set(value, mode="drop", unique_indices=True),
    )


def write_many(own: KeysValues, key: Array, value: Array, lengths: Int[Array, " n"]) -> KeysValues:
    """The keys and values (n, m, k, e) of m more tokens, written where each particle ends."""
    rows = jnp.arange(own.values.shape[0])[:, None]
    where = lengths[:, None] + jnp.arange(key.shape[1])
    return KeysValues(
        own.keys.at[rows, :, :, where].set(key, mode="drop", unique_indices=True),
        own.values.at[rows, :, where].set(value, mode="drop", unique_indices=True),
    )
