"""What a layer of an infinitely wide network is given and makes: the covariances of its units at pairs of inputs.

Units of one layer are independent Gaussian processes, all of one law, so a layer is what it does to

    q = K(x, x),   p = K(x', x'),   c = K(x, x'),   t = Theta(x, x')

for all pairs. Inputs may have places (the pixels of an image, the times of a sequence) with a covariance at each; c is
kept for equal places of x and x' only, or for all pairs of places if a later layer averages over them.
"""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf import errors

__all__ = ["Covariance", "check_inputs", "input_covariance"]

Head = Literal["nngp", "ntk"]
Floats = Float[Array, "..."]


class Covariance(eqx.Module):
    """Covariances of the units of one layer, for pairs of inputs.

    Attributes:
        q, p: covariances of left and of right inputs with themselves, (n1, 1, *places) and (1, n2, *places), or
            (n, *places) both where inputs are paired one by one; with `has_pairs` the places are there twice.
        c: covariances of left with right inputs, (n1, n2, *places) or (n, *places), or with the places twice.
        t: the neural tangent kernel, of the shape of c; None where it is not asked for.
        num_places: how many axes the places have: 0, 1 (sequences) or 2 (images).
        has_pairs: whether covariances are kept for all pairs of places.
        is_gaussian: whether the units are Gaussian given the inputs, as those of a dense layer are; those of an
            activation are not.
    """

    q: Floats
    p: Floats
    c: Floats
    t: Floats | None
    num_places: int = eqx.field(static=True)
    has_pairs: bool = eqx.field(static=True)
    is_gaussian: bool = eqx.field(static=True)

    def variances(self, left: Floats, right: Floats) -> tuple[Floats, Floats]:
        """Variances at the places of two of q and p, in shapes that broadcast with their covariance."""
        if not self.has_pairs:
            return left, right
        left, right = self.same_places(left), self.same_places(right)
        split = right.ndim - self.num_places
        ones = (1,) * self.num_places
        return left.reshape(left.shape + ones), right.reshape(right.shape[:split] + ones + right.shape[split:])

    def same_places(self, x: Floats) -> Floats:
        """Of covariances between all places, those of each with itself."""
        if not self.has_pairs:
            return x
        for _ in range(self.num_places):  # the diagonal becomes the last axis: rows, then columns
            first = x.ndim - 2 * self.num_places
            x = jnp.diagonal(x, axis1=first, axis2=first + self.num_places)
            if self.num_places == 2:  # (..., column, column', row): columns are neighbours now
                x = jnp.diagonal(x, axis1=first, axis2=first + 1)
                break
        return x

    def replace(self, **changes: Any) -> "Covariance":
        """The same with some attributes changed."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Covariance(**{**fields, **changes})


def check_inputs(name: str, X: object) -> Array:
    """Inputs as a floating array (n, d), (n, time, d) or (n, height, width, channels), without NaN.

    Raises:
        ValueError: they are not.
    """
    array = errors.as_array(name, is_floating=True)(X)
    if not 2 <= array.ndim <= 4:
        raise ValueError(
            f"{name} must have shape (n, d), (n, time, d) or (n, height, width, channels), got {array.shape}; "
            "numbers are X[:, None]"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    errors.check_not_nan(name, array)
    if errors.is_concrete(array) and np.any(np.isinf(np.asarray(array))):
        raise ValueError(f"{name} must be finite; scale the columns, and leave out what is not")
    return array


def input_covariance(
    X1: Floats, X2: Floats, *, head: Head, has_pairs: bool = False, is_paired: bool = False
) -> Covariance:
    """K(x, x') = <x, x'> / d, at every place; the tangent kernel of nothing is zero.

    Args:
        X1, X2: inputs that differ in their number only.
        head: whether to carry the tangent kernel.
        has_pairs: whether to keep covariances between different places.
        is_paired: X2 is X1, and each input is paired with itself only.
    """
    if X1.shape[1:] != X2.shape[1:]:
        raise ValueError(f"X2 must have inputs of shape {X1.shape[1:]}, those of X1, got {X2.shape[1:]}")
    num_places = X1.ndim - 2
    dtype = jnp.result_type(X1, X2)
    X1, X2 = X1.astype(dtype), X2.astype(dtype)
    scale = X1.shape[-1] ** -0.5
    X1, X2 = X1 * scale, X2 * scale
    here = "hw"[:num_places]
    there, both = ("uv"[:num_places], here + "uv"[:num_places]) if has_pairs else (here, here)
    q, p = (jnp.einsum(f"i{here}d,i{there}d->i{both}", X, X) for X in (X1, X2))
    if is_paired:
        c = q
    else:
        q, p = q[:, None], p[None]
        c = jnp.einsum(f"i{here}d,j{there}d->ij{both}", X1, X2)
    t = jnp.zeros_like(c) if head == "ntk" else None
    return Covariance(q, p, c, t, num_places, has_pairs, is_gaussian=False)
