"""The end of a labelled series, and what rearranging the series makes of it.

The end is x_{N-h}, ..., x_N with y_{N-h+1}, ..., y_N. It has a score, and a law given what a rearrangement leaves as it
is: under "type", with F the transition counts and E the emission counts,

    P(end) = W(F - R, x_1, x_{N-h}) / W(F, x_1, x_N)  *  a draw of y without replacement from row x_t of E at every t

R being the transitions of the end; under "block" it is the end of the blocks in an order at random. The sets are made
of both by `bayesinf.models.conformal.hmm_sets`, which has the references.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bayesinf.models.conformal.markov import draw_predecessor, tail_law

__all__ = ["Term", "draw_blocks", "draw_end", "law_of_ends", "normalized", "score_terms", "spread"]

# A score is a sum of terms: tables, each with the numbers of its variables among x_{N-h}, ..., x_N (0, ..., h) and
# y_{N-h+1}, ..., y_N (h + 1, ..., 2 h).
Term = tuple[Array, tuple[int, ...]]


def score_terms(transition: Float[Array, "k k"], emission: Float[Array, "k m"], horizon: int, score: str) -> list[Term]:
    """The score of an end as a sum of tables, by the rows of probabilities of the chain and of the symbols.

    Args:
        transition: P.
        emission: B.
        horizon: h.
        score: "joint", "filter" or "smooth" of states; "predictive" or "pair" of observations.
    """
    joints = [transition[:, None, :] * emission.T]  # P(x_k, y_1:k | x_0), axes (x_0, y_1, ..., y_k, x_k)
    for _ in range(1, horizon):
        joints.append((joints[-1] @ transition)[..., None, :] * emission.T)
    ys = tuple(range(horizon + 1, 2 * horizon + 1))
    if score == "filter":
        return [(1 - normalized(joint), (0, *ys[:k], k)) for k, joint in enumerate(joints, 1)]
    if score == "smooth":
        num_states, terms = len(transition), []
        after = jnp.ones((1, num_states))  # P(y_k+1:h | x_k), axes (y_k+1:h, x_k)
        for k in range(horizon, 0, -1):
            both = joints[k - 1][..., None, :] * after
            terms.append((1 - normalized(both.reshape(*joints[-1].shape)), (0, *ys, k)))
            after = ((emission.T[:, None, :] * after) @ transition.T).reshape(-1, num_states)
        return terms
    evidence = jnp.log(joints[-1].sum(-1))
    if score == "predictive":
        return [(-evidence, (0, *ys))]
    steps: list[Term] = [(-jnp.log(transition), (k, k + 1)) for k in range(horizon)]
    steps += [(-jnp.log(emission), (k, horizon + k)) for k in range(1, horizon + 1)]
    return steps if score == "pair" else [*steps, (evidence, (0, *ys))]


def normalized(joint: Float[Array, "..."]) -> Float[Array, "..."]:
    """Probabilities along the last axis."""
    return joint / joint.sum(-1, keepdims=True)


def spread(table: Array, axes: tuple[int, ...], horizon: int, last: Int[Array, ""]) -> Array:
    """The table over all variables but x_N, which is `last`, with length 1 where it does not depend on one."""
    if horizon in axes:
        table = jnp.take(table, last, axis=axes.index(horizon))
    places = [axis - (axis > horizon) for axis in axes if axis != horizon]
    order = np.argsort(places)
    return jnp.expand_dims(table.transpose(order), [axis for axis in range(2 * horizon) if axis not in places])


def law_of_ends(
    counts: Float[Array, "k k"], emitted: Float[Array, "k m"], last: Int[Array, ""], horizon: int
) -> Float[Array, "..."]:
    """P(x_{N-h:N-1}, y_{N-h+1:N} | x_1, F, E), over these variables."""
    num_states, num_symbols = emitted.shape
    _, log_law = tail_law(counts, last, horizon)
    law = jnp.exp(log_law).reshape((num_states,) * horizon + (1,) * horizon)
    over_end = partial(spread, horizon=horizon, last=last)
    for k in range(1, horizon + 1):
        left, total = over_end(emitted, (k, horizon + k)), over_end(emitted.sum(1), (k,))
        for j in range(1, k):  # what was drawn from the same row before
            same = over_end(jnp.eye(num_states), (j, k))
            left, total = left - same * over_end(jnp.eye(num_symbols), (horizon + j, horizon + k)), total - same
        law = law * jnp.maximum(left, 0) / jnp.maximum(total, 1)
    return law


def draw_end(
    counts: Float[Array, "k k"], emitted: Float[Array, "k m"], last: Int[Array, ""], horizon: int, key: Key[Array, ""]
) -> Int[Array, " end"]:
    """An end drawn from that law."""
    xs: list[Array] = [last]
    ys: list[Array] = []
    for key_step in jax.random.split(key, horizon):
        key_state, key_symbol = jax.random.split(key_step)
        previous = draw_predecessor(key_state, counts, xs[0])
        symbol = jax.random.categorical(key_symbol, jnp.log(emitted[xs[0]]))
        emitted = emitted.at[xs[0], symbol].add(-1)
        counts = counts.at[previous, xs[0]].add(-1)
        xs, ys = [previous, *xs], [symbol, *ys]
    return jnp.stack([*xs, *ys])


def draw_blocks(x: Int[Array, " n"], y: Int[Array, " n"], horizon: int, key: Key[Array, ""]) -> Int[Array, " end"]:
    """The end of the series after a rearrangement of its blocks at random; of these only the last h matter."""
    is_visit = (x == x[-1]) & (y == y[-1])
    (visits,) = jnp.nonzero(is_visit, size=len(x), fill_value=len(x) - 1)
    num_blocks = is_visit.sum() - 1  # the k-th ends at visits[k], k = 1, ..., n
    chosen = jnp.zeros((0,), int)
    for k, u in enumerate(jax.random.uniform(key, (horizon,))):
        block = 1 + jnp.minimum(jnp.floor(u * (num_blocks - k)).astype(int), num_blocks - k - 1)
        for other in jnp.sort(chosen):  # those left, in order
            block = block + (block >= other)
        chosen = jnp.append(chosen, block)
    # once they are used up the first stretch precedes, which ends at the first visit
    ends = jnp.where(jnp.arange(horizon) < num_blocks, visits[jnp.clip(chosen, 0)], visits[0])
    place, num_used, places = ends[0], jnp.ones((), int), [ends[0]]
    for _ in range(horizon):
        is_cut = is_visit[place - 1] & (place > 0)
        # whatever block precedes the last element wanted, it is an anchor
        place = jnp.where(is_cut, ends[jnp.minimum(num_used, horizon - 1)], place - 1)
        num_used = num_used + is_cut
        places.insert(0, place)
    found = jnp.stack(places)
    return jnp.concatenate([x[found], y[found[1:]]])
