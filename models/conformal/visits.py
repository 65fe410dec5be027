"""Prediction sets for what follows the visits to a state: exact at the n-th visit, whatever the law of the chain.

By the strong Markov property what follows the visits to a state a is independent and identically distributed: the next
states have law P(a, .), and so have scores of them. Those seen after the first n visits calibrate the set that is drawn
up at the next visit,

    q = the ceil((n + 1)(1 - alpha))-th smallest score after a visit to a;  +inf where n + 1 < 1 / alpha

This holds at visits, which are stopping times. At a date fixed beforehand the number of visits is itself random and
depends on what followed them, and the guarantee is approximate; `markov_p_value` and `hmm_state_set` are exact there.

References:
    Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715 (Mondrian sets).
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee, explain_infinite

__all__ = ["VisitSet", "visit_conformal"]

GUARANTEE = Guarantee(
    "exact",
    "P(score of what follows <= threshold) >= 1 - alpha at every visit to the state; asymptotic at a fixed date",
    "the states are a homogeneous Markov chain, and the score depends on the state and what follows it alone",
)


class VisitSet(eqx.Module):
    """The set is what has a score of at most the threshold.

    Attributes:
        threshold: +inf where the state was visited too rarely: `why_infinite` says so.
        num_visits: how often it was, with what followed seen: each is a calibration score.
        num_needed: how often it takes for a finite threshold.
        guarantee: what the set promises, and when.
    """

    threshold: Float[Array, ""]
    num_visits: Int[Array, ""]
    num_needed: Int[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)

    def why_infinite(self) -> str:
        """In words, why the threshold is +inf; empty where it is not. Not for `jit`.

        Example:
            >>> import jax.numpy as jnp
            >>> from bayesinf.models.conformal import visit_conformal
            >>> visit_conformal(jnp.array([0, 1, 0]), jnp.ones(3), 1, alpha=0.2).why_infinite()
            'it takes 4 calibration scores, got 1'
        """
        return explain_infinite(self.threshold, self.num_visits, self.num_needed)


def visit_conformal(
    states: Int[Array | np.ndarray, " n"],
    scores: Float[Array | np.ndarray, " n"],
    current_state: Int[Array, ""] | int | np.integer,
    alpha: Float[Array, ""] | float,
) -> VisitSet:
    """The threshold for the score of what follows the current state, from its earlier visits.

    Args:
        states: x_t of n steps of which the next one was seen.
        scores: of what followed: a fixed function of x_t and x_{t+1}, or y_{t+1}, not fitted to this series.
        current_state: the state now.
        alpha: the probability of missing what follows that is allowed.

    Returns:
        The set: scores of at most `threshold`.

    Raises:
        ValueError: `alpha` is not in (0, 1), the lengths differ, or a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import visit_conformal
        >>> states = jnp.array([0, 1, 0, 1, 0, 0, 1, 0])
        >>> scores = jnp.array([0.3, 5.0, 0.1, 6.0, 0.2, 0.4, 4.0, 0.9])
        >>> round(float(visit_conformal(states, scores, 0, alpha=0.2).threshold), 4)
        0.9
        >>> float(visit_conformal(states, scores, 1, alpha=0.2).threshold)           # only three visits
        inf

    References:
        Vovk, Gammerman and Shafer (2005), doi:10.1007/b106715.
    """
    errors.check_fraction("alpha", alpha)
    scores = jnp.asarray(scores)
    if len(states) != len(scores):
        raise ValueError(f"states and scores must be of one length, got {len(states)} and {len(scores)}")
    errors.check_not_nan("scores", scores)
    is_visit = jnp.asarray(states) == current_state
    num_visits = is_visit.sum()
    # alpha is itself rounded: (n + 1)(1 - alpha) within that of a whole number is this number
    eps = 4 * jnp.finfo(scores.dtype).eps
    alpha = jnp.asarray(alpha, scores.dtype)
    rank = jnp.ceil((num_visits + 1) * (1 - alpha) - eps * (num_visits + 1)).astype(int)
    num_needed = jnp.ceil(1 / (alpha + eps)).astype(int) - 1  # from there on rank <= n
    ordered = jnp.append(jnp.sort(jnp.where(is_visit, scores, jnp.inf)), jnp.inf)
    return VisitSet(ordered[jnp.maximum(rank, 1) - 1], num_visits, num_needed, GUARANTEE)
