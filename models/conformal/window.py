"""The last scores of a series, kept in order: what online methods take their thresholds from.

Leaving and entering shift what lies between, O(w) work without a sort, so that a window of a few hundred scores costs
microseconds a step inside a compiled loop.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bayesinf import errors
from bayesinf.models.conformal.quantiles import conformal_rank

__all__ = ["Window"]


class Window(eqx.Module):
    """The last w scores of a series; fewer at its beginning, when thresholds may be infinite.

    Attributes:
        ordered: the scores, ascending, then +inf where there are none yet; shape (w,).
        recent: the same in order of arrival, from the place `count` modulo w on.
        count: how many have come in all.

    Example:
        >>> from bayesinf.models import conformal
        >>> window = conformal.Window.empty(3)
        >>> for score in (5.0, 1.0, 3.0, 2.0):
        ...     window = window.push(score)
        >>> window.ordered.tolist(), float(window.p_value(2.5)), float(window.threshold(0.25))
        ([1.0, 2.0, 3.0], 0.5, 3.0)
    """

    ordered: Float[Array, " w"]
    recent: Float[Array, " w"]
    count: Int[Array, ""]

    @classmethod
    def empty(cls, size: int, dtype: jnp.dtype | None = None) -> "Window":
        """A window for `size` scores that holds none yet."""
        size = errors.check_count("size", size)
        scores = jnp.full(size, jnp.inf, dtype or jnp.result_type(float))
        return cls(scores, scores, jnp.zeros((), jnp.int32))

    @property
    def num_scores(self) -> Int[Array, ""]:
        """How many scores it holds."""
        return jnp.minimum(self.count, self.ordered.shape[0])

    def push(self, score: Real[Array, ""] | float) -> "Window":
        """The window with this score in it, and the oldest out; NaN is missing, and changes nothing."""
        size = self.ordered.shape[0]
        score = jnp.asarray(score, self.ordered.dtype)
        is_missing = jnp.isnan(score)
        place = jnp.arange(size)
        oldest = self.recent[self.count % size]  # +inf while the window is filling, as one of the places kept free
        leaves = jnp.searchsorted(self.ordered, oldest)
        left = jnp.where(place < leaves, self.ordered, jnp.append(self.ordered[1:], jnp.inf))
        enters = jnp.searchsorted(left, score)
        moved = jnp.where(place < enters, left, jnp.append(left[:1], left[:-1]))
        ordered = jnp.where(place == enters, score, moved)
        return Window(
            jnp.where(is_missing, self.ordered, ordered),
            jnp.where(is_missing, self.recent, self.recent.at[self.count % size].set(score)),
            self.count + jnp.where(is_missing, 0, 1),
        )

    def threshold(self, alpha: Real[Array, "*m"] | float) -> Float[Array, "*m"]:
        """`conformal_quantile` of the scores; +inf for levels of 0 and less, -inf for 1 and more.

        Args:
            alpha: any real numbers.

        Returns:
            Thresholds of the same shape.
        """
        k = conformal_rank(self.num_scores, alpha)
        found = jnp.append(self.ordered, jnp.inf)[jnp.maximum(k - 1, 0)]
        found = jnp.where(k > self.num_scores, jnp.inf, found)
        return jnp.where(k > 0, found, -jnp.inf)

    def p_value(self, score: Real[ArrayLike, "*m"]) -> Float[Array, "*m"]:
        """The conservative p-value, of which `score <= threshold(alpha)` says whether it exceeds alpha.

        Args:
            score: test scores.

        Returns:
            p-values of the same shape.
        """
        below = jnp.minimum(jnp.searchsorted(self.ordered, jnp.asarray(score)), self.num_scores)
        return (self.num_scores - below + 1) / (self.num_scores + 1)

    def spread(self) -> Float[Array, ""]:
        """The range of the finite scores; 0 of none."""
        is_finite = jnp.isfinite(self.ordered)
        largest = jnp.max(self.ordered, where=is_finite, initial=-jnp.inf)
        smallest = jnp.min(self.ordered, where=is_finite, initial=jnp.inf)
        return jnp.where(jnp.any(is_finite), largest - smallest, 0.0)


@partial(jax.jit, static_argnums=1)
def fill(past: Float[Array, " t"], size: int) -> Window:
    """The window after the scores of the past."""
    window = Window.empty(size, past.dtype)
    return jax.lax.scan(lambda window, score: (window.push(score), None), window, past)[0]
