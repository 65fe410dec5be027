"""Exact p-values for the end of a path of a Markov chain whose law is unknown.

Paths with the same first state and the same transition counts F are equally likely under every homogeneous Markov chain
and every mixture of them, so that given F the last states have a law free of parameters. The number of paths from u to
v with counts F is, by the BEST theorem,

    W(F, u, v) = tau_v(F) F_v.! prod_{i != v} (F_i. - 1)! / prod_ij F_ij!

over the states i that are left, if the flow F_i. - F_.i = 1{i = u} - 1{i = v} is balanced, and 0 otherwise. tau_v(F) is
the weight of spanning trees directed to v, a minor of the graph's Laplacian: Whittle's cofactor. It is computed here by
elimination without a subtraction, so that it is exact to rounding, and exactly 0 where it is 0. With R the
transitions of a tail (a_0, ..., a_h = v),

    P(x_{N-h}, ..., x_N = a_0, ..., a_h | F, x_1) = W(F - R, x_1, a_0) / W(F, x_1, v)

References:
    Whittle (1955), doi:10.1111/j.2517-6161.1955.tb00196.x.
    Diaconis and Freedman (1980), doi:10.1214/aop/1176994767.
    Nettasinghe, Chatterjee, Tipireddy and Halappanavar (2023), https://arxiv.org/abs/2305.17200 (blocks of a path).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Int, Num

from bayesinf import errors
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.markov_chain import add_constant, check_states, transition_counts

__all__ = ["MarkovPValue", "log_whittle", "markov_p_value", "tail_law"]

Score = Callable[[Int[Array, " h_plus_1"], Float[Array, "k k"]], Float[Array, ""]]
Whole = Int[Array, ""] | int | np.integer

GROUPS = ("type", "block")
ASSUMES = "the states are a homogeneous Markov chain, or a mixture of such chains, of any law"


class MarkovPValue(eqx.Module):
    """Whether the end of a path looks like the ends of paths with the same transition counts.

    Attributes:
        p: the p-value, or p-values; small where the end has a high score.
        guarantee: what it promises.
    """

    p: Float[Array, ""]
    guarantee: Guarantee = eqx.field(static=True)


def log_whittle(counts: Num[Array | np.ndarray, "k k"], first: Whole, last: Whole) -> Float[Array, ""]:
    """Log of the number of paths from `first` to `last` with given transition counts.

    Args:
        counts: F, whole numbers.
        first: the first state u.
        last: the last state v.

    Returns:
        log W(F, u, v); -inf where there is no such path.

    Raises:
        ValueError: a state is not one of 0..K-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import log_whittle
        >>> counts = jnp.array([[1, 2], [1, 0]])                # of 00101, 01001 and nothing else
        >>> round(float(jnp.exp(log_whittle(counts, 0, 1))), 4)
        2.0
        >>> float(log_whittle(counts, 1, 1))
        -inf

    References:
        Whittle (1955), doi:10.1111/j.2517-6161.1955.tb00196.x.
    """
    counts = jnp.asarray(counts, float)
    num_states = counts.shape[0]
    check_states("first", first, num_states)
    check_states("last", last, num_states)
    is_first, is_last = jax.nn.one_hot(first, num_states), jax.nn.one_hot(last, num_states)
    is_balanced = jnp.all(counts.sum(1) - counts.sum(0) == is_first - is_last) & jnp.all(counts >= 0)
    counts = jnp.where(is_balanced, counts, 0.0)
    left = counts.sum(1)
    log_orders = gammaln(jnp.where(is_last > 0, left + 1, jnp.maximum(left, 1))).sum() - gammaln(counts + 1).sum()
    return jnp.where(is_balanced, _log_trees(counts, last) + log_orders, -jnp.inf)


def tail_law(
    counts: Num[Array | np.ndarray, "k k"], last: Whole, horizon: int
) -> tuple[Int[Array, "r h_plus_1"], Float[Array, " r"]]:
    """The law of the last states of a path drawn uniformly from those with the same first state and counts.

    Args:
        counts: F of a path that ends in `last`; its first state follows from them.
        last: the last state.
        horizon: h, how many transitions back from the end.

    Returns:
        All K^h tails (a_0, ..., a_h = last), and their log probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models.conformal import tail_law
        >>> from bayesinf.models.markov_chain import transition_counts
        >>> tails, log_probabilities = tail_law(transition_counts(jnp.array([0, 0, 1, 0, 1]), 2), last=1, horizon=1)
        >>> tails.tolist(), [round(p, 4) for p in jnp.exp(log_probabilities).tolist()]
        ([[0, 1], [1, 1]], [1.0, 0.0])
    """
    errors.check_count("horizon", horizon)
    return _tail_law(jnp.asarray(counts, float), jnp.asarray(last), horizon)


def markov_p_value(
    states: Int[Array | np.ndarray, " n"],
    num_states: int,
    score: Score | None = None,
    *,
    horizon: int = 1,
    group: str = "type",
    key: errors.KeyLike | None = None,
) -> MarkovPValue:
    """The p-value of the last `horizon` transitions of a path, exact for every chain and every length.

    To predict, append a candidate to the path: the candidates with p > alpha are a set that holds the next states with
    probability 1 - alpha. As the last state follows from first state and counts, what is judged is how it was reached.

    Args:
        states: the path, values in 0..K-1, at least `horizon` + 1 of them.
        num_states: K.
        score: `score(tail, counts)` of the last h + 1 states and the K x K transition counts of the whole path; high is
            strange. Minus the log probability of the tail, with transitions estimated by (F_ij + 1/2) / (F_i. + K/2),
            where it is left out. NaN counts as stranger than what was observed; where that is NaN itself, p is 1.
        horizon: h.
        group: "type", over all paths with the same first state and counts, or "block", over the orders of the blocks
            that end where the last state is visited, for h = 1: fewer paths, hence less power.
        key: for ties, which are broken at random: p is uniform. Without one they count against rejection.

    Returns:
        p, with P(p <= alpha) = alpha with a key and <= alpha without.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models.conformal import markov_p_value
        >>> states = jnp.array([0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1])
        >>> found = markov_p_value(states, 2)
        >>> round(float(found.p), 3)
        1.0
        >>> print(found.guarantee)
        exact: P(p <= alpha) <= alpha, if the states are a homogeneous Markov chain, ..., of any law

    References:
        Diaconis and Freedman (1980), doi:10.1214/aop/1176994767.
    """
    horizon = errors.check_count("horizon", horizon)
    errors.check_choice("group", group, GROUPS)
    states = jnp.asarray(states)
    if len(states) <= horizon:
        raise ValueError(f"states must hold more than horizon={horizon} states, got {len(states)}")
    if group == "block" and horizon > 1:
        raise ValueError(f"group='block' is for horizon=1, got {horizon}; use group='type'")
    check_states("states", states, num_states)
    counts = transition_counts(states, num_states)
    if group == "type":
        tails, log_weights = tail_law(counts, states[-1], horizon)
        weights = jnp.exp(log_weights)
        observed = jnp.ravel_multi_index(tuple(states[-horizon - 1 : -1]), (num_states,) * horizon, mode="clip")
    else:
        tails = jnp.column_stack([states[:-1], jnp.full(len(states) - 1, states[-1])])
        is_end = (states[1:] == states[-1]) & (
            jnp.cumsum(states == states[-1])[1:] > 1
        )  # the first visit ends no block
        weights, observed = share(is_end), jnp.asarray(len(tails) - 1)
    scores = jax.vmap(lambda tail: (score or _log_rarity)(tail, counts))(tails)
    p = weighted_p_value(scores, weights, observed, key)
    return MarkovPValue(p, Guarantee("exact", "P(p <= alpha) " + ("<= alpha" if key is None else "= alpha"), ASSUMES))


# what hmm_sets and hmm_ends share


def sequences(num_values: int, length: int) -> Int[np.ndarray, "s length"]:
    """All sequences of a length, the last element running fastest."""
    return np.indices((num_values,) * length, dtype=np.int32).reshape(length, -1).T


def share(is_member: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Equal weights of the members; all on the last element if there is no other."""
    is_member = is_member.at[-1].set(True)
    return is_member / is_member.sum()


def weighted_p_value(
    scores: Float[Array, " r"], weights: Float[Array, " r"], observed: Whole, key: errors.KeyLike | None
) -> Float[Array, ""]:
    """P(score > observed) + u P(score = observed), u uniform, or 1 without a key; equal is what rounding makes of it.

    Compilers may evaluate a score twice, and differently in its last bits; a truth that is not level with itself would
    have a p-value of 0.
    """
    u = 1.0 if key is None else jax.random.uniform(errors.as_key(key))
    found = scores[observed]
    largest = jnp.max(jnp.abs(jnp.where(jnp.isfinite(scores), scores, 0.0)))
    rounding = 8.0 * float(jnp.finfo(scores.dtype).eps) * largest
    level = (scores == found) | (jnp.abs(scores - found) <= rounding)
    # of NaN nobody knows whether it is higher: it counts as if it were
    above = ~(scores <= found) & ~level
    return jnp.minimum(jnp.sum(weights, where=above) + u * jnp.sum(weights, where=level), 1.0)


def draw_predecessor(key: Array, counts: Float[Array, "k k"], last: Whole) -> Int[Array, ""]:
    """The last state but one of a path drawn uniformly from those with the same first state and counts."""
    _, log_probabilities = tail_law(counts, last, 1)
    return jax.random.categorical(key, log_probabilities)


@partial(jax.jit, static_argnames="horizon")
def _tail_law(counts: Array, last: Array, horizon: int) -> tuple[Array, Array]:
    heads = sequences(counts.shape[0], horizon)
    tails = jnp.column_stack([heads, jnp.full(len(heads), last)])
    return tails, jax.nn.log_softmax(jax.vmap(partial(_log_paths_before, counts))(tails))


def _log_paths_before(counts: Float[Array, "k k"], tail: Int[Array, " h_plus_1"]) -> Float[Array, ""]:
    """Log W(F - R, ., a_0) up to a constant of F; by ratios, as log factorials of long paths lose float32's digits."""
    num_states, log_ratio = counts.shape[0], jnp.zeros(())
    for a, b in reversed(list(pairwise(tail))):
        is_there = counts[a, b] > 0
        left_else = jnp.maximum(counts[a].sum() - 1, 1)
        log_ratio += jnp.where(is_there, jnp.log(jnp.where(is_there, counts[a, b], 1.0) / left_else), -jnp.inf)
        step = jax.nn.one_hot(a, num_states)[:, None] * jax.nn.one_hot(b, num_states)
        counts = jnp.maximum(counts - step, 0.0)
    return log_ratio + _log_trees(counts, tail[0]) + jnp.log(jnp.maximum(counts[tail[0]].sum(), 1))


def _log_trees(counts: Float[Array, "k k"], root: Whole) -> Float[Array, ""]:
    """Log tau_root(F), over the states that are left: state by state, its ways in are joined to its ways out."""
    num_states = counts.shape[0]
    order = jnp.arange(num_states).at[root].set(num_states - 1).at[num_states - 1].set(root)
    ways = counts[order][:, order]
    is_left, log_total = ways.sum(1) > 0, jnp.zeros(())
    for i in range(num_states - 1):
        out = ways[0, 1:].sum()
        is_open = out > 0
        safe = jnp.where(is_open, out, 1.0)
        log_total += jnp.where(is_left[i], jnp.where(is_open, jnp.log(safe), -jnp.inf), 0.0)
        ways = ways[1:, 1:] + ways[1:, :1] * (ways[0, 1:] / safe)
    return log_total


def _log_rarity(tail: Int[Array, " h_plus_1"], counts: Float[Array, "k k"]) -> Float[Array, ""]:
    return -jnp.sum(jnp.log(add_constant(counts))[tail[:-1], tail[1:]])
