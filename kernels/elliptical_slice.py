"""Elliptical slice sampling: exact draws under a Gaussian prior, with nothing to tune and no gradient.

    pi(x) proportional to N(x; m, L L^T) exp(l(x))

A step draws nu ~ N(m, L L^T) and a height log y = l(x) + log u, and looks for a point of the ellipse

    x(theta) = m + (x - m) cos theta + (nu - m) sin theta

with l(x(theta)) > log y: theta is uniform on a bracket that shrinks towards theta = 0, the present point, with every
point refused. The ellipse has the law of the prior whatever theta is, so the prior need not be evaluated. Good where
the prior is about as informative as the likelihood; a likelihood that is much narrower makes for small moves.

The search is BlackJAX's. What differs: a kernel is a pytree; a log likelihood of NaN or +inf ends the step where it
began and is counted (BlackJAX would move to the NaN), which keeps detailed balance, since the moves between two points
lose the same angles in both directions; and a bracket in which no point differs from the present one, to rounding, ends
the step there (BlackJAX would search for ever).

References:
    Murray, Adams, MacKay (2010), arXiv:1001.0175.
    Nishihara, Murray, Adams (2014), arXiv:1210.7477 (any target, as a Gaussian times the rest).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Kernel, select
from bayesinf.kernels.vectors import as_position, differ
from bayesinf.target import Target

__all__ = ["EllipticalSlice", "EllipticalSliceInfo", "EllipticalSliceState"]


class EllipticalSliceState(NamedTuple):
    """Where the chain is, and the log likelihood there."""

    position: PyTree
    log_likelihood: Float[Array, ""]


class EllipticalSliceInfo(NamedTuple):
    """What one step tells.

    Attributes:
        acceptance_rate: 1 where the chain moved, else 0.
        is_accepted: whether it moved.
        is_divergent: whether a log likelihood was NaN or +inf; the chain then stayed.
        num_gradients: 0.
        num_evaluations: of the log likelihood.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    num_evaluations: Int[Array, ""]


class EllipticalSlice(Kernel):
    """Elliptical slice sampling of a Gaussian prior times a likelihood.

    Args:
        log_likelihood: `log_likelihood(position)`, or `log_likelihood(position, data)` when `data` is given; a scalar,
            -inf where there is no density.
        prior_mean: m, over the position as `ravel_pytree` lays it out: shape (d,), or one number for all.
        prior_tril: L, a lower triangle of shape (d, d) with a positive diagonal, the Cholesky factor of the prior's
            covariance; or of shape (d,) its standard deviations.
        data: any pytree of arrays; new values of the same shape compile nothing.

    Raises:
        ValueError: an argument is not of that form.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> prior_tril = jnp.linalg.cholesky(jnp.array([[1.0, 0.9], [0.9, 1.0]]))
        >>> kernel = bi.kernels.EllipticalSlice(
        ...     lambda x, counts: jnp.sum(counts * x - jnp.exp(x)), 0.0, prior_tril, data=jnp.array([3.0, 5.0])
        ... )
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 2)), num_samples=500, progress=False)
        >>> draws["x"].shape
        (4, 500, 2)
    """

    is_sequential: ClassVar[bool] = True
    is_memoryless: ClassVar[bool] = True

    likelihood: Target
    prior_mean: Float[Array, "..."]
    prior_tril: Float[Array, "..."]

    def __init__(
        self, log_likelihood: Callable[..., Any], prior_mean: ArrayLike, prior_tril: ArrayLike, data: PyTree = None
    ):
        errors.check_arguments("log_likelihood", log_likelihood, "position" if data is None else "position, data")
        self.likelihood = Target(log_likelihood, data)
        self.prior_mean = errors.as_array("prior_mean", is_floating=True)(prior_mean)
        self.prior_tril = errors.as_array("prior_tril", is_floating=True)(prior_tril)
        _check_prior(self.prior_mean, self.prior_tril)

    def init(self, position: PyTree) -> EllipticalSliceState:
        position = as_position(position)
        size = ravel_pytree(position)[0].size
        for name, shape in (("prior_mean", self.prior_mean.shape), ("prior_tril", self.prior_tril.shape)):
            if any(length != size for length in shape):
                raise ValueError(f"{name} must be over the ravelled position, of length {size}, got shape {shape}")
        return EllipticalSliceState(position, self.likelihood.logdensity(position))

    def step(self, key: Key[Array, ""], state: EllipticalSliceState) -> tuple[EllipticalSliceState, Any]:
        from blackjax.mcmc import elliptical_slice

        flat, unravel = ravel_pytree(state.position)
        mean, tril = self.prior_mean.astype(flat.dtype), self.prior_tril.astype(flat.dtype)

        def draw_prior(key: Key[Array, ""], position: PyTree) -> PyTree:
            noise = jax.random.normal(key, flat.shape, flat.dtype)
            return unravel(mean + (tril * noise if tril.ndim == 1 else tril @ noise))

        def is_present(position: PyTree) -> Bool[Array, ""]:
            other = ravel_pytree(position)[0]
            rounding = 2 * jnp.finfo(flat.dtype).eps * (jnp.abs(flat) + jnp.abs(mean))
            return jnp.all(jnp.abs(other - flat) <= rounding)

        def height(position: PyTree) -> Float[Array, ""]:
            """The log likelihood, but +inf at the present point: that ends the search, as NaN does."""
            position = _cast(position, state.position)
            return jnp.where(is_present(position), jnp.inf, self.likelihood.logdensity(position))

        search: Any = elliptical_slice.elliptical_proposal(height, draw_prior, mean)
        end, told = search(key, elliptical_slice.EllipSliceState(state.position, state.log_likelihood))

        proposed = EllipticalSliceState(_cast(end.position, state.position), end.logdensity)
        is_found = jnp.isfinite(proposed.log_likelihood)
        moved = select(is_found, proposed, state)
        is_accepted = differ(moved.position, state.position)
        info = EllipticalSliceInfo(
            acceptance_rate=is_accepted.astype(jnp.result_type(float)),
            is_accepted=is_accepted,
            is_divergent=~is_found & ~is_present(proposed.position),
            num_gradients=jnp.asarray(0, jnp.int32),
            num_evaluations=jnp.asarray(told.subiter, jnp.int32),
        )
        return moved, info


def _cast(position: PyTree, like: PyTree) -> PyTree:
    """In the dtypes of `like`: BlackJAX's angles are of the default precision, and so are its points."""
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), position, like)


def _check_prior(mean: Any, tril: Any) -> None:
    if mean.ndim > 1:
        raise ValueError(f"prior_mean must have shape (d,) or be a scalar, got {mean.shape}")
    if errors.is_concrete(mean) and not np.all(np.isfinite(mean)):
        raise ValueError(f"prior_mean must be finite, got {mean}")
    if tril.ndim not in (1, 2) or len(set(tril.shape)) != 1:
        raise ValueError(f"prior_tril must have shape (d,) or (d, d), got {tril.shape}")
    diagonal = tril if tril.ndim == 1 else jnp.diagonal(tril)
    errors.check_positive("prior_tril" if tril.ndim == 1 else "the diagonal of prior_tril", diagonal)
    if tril.ndim == 2 and errors.is_concrete(tril) and np.any(np.triu(tril, 1)):
        raise ValueError("prior_tril must be lower triangular; use jnp.linalg.cholesky(covariance)")
