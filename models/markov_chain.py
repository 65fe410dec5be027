"""Markov chains on a finite set: their stationary law, estimates of their transitions, and what these lose.

    add a constant      P^_ij = (N_ij + beta) / (N_i + K beta)

Loss is the Kullback-Leibler divergence KL(P_i. || P^_i.). Two questions are not the same:

Estimation asks for every row. A row that is visited n pi_i times has a risk of (K - 1) / (2 n pi_i) in the limit.

Prediction asks for the row of the last state x_n alone, and for all stationary chains at once, however slow. For K = 2
the least possible worst-case risk is of order log log n / n (Falahatgar et al.), for 3 <= K <= O(sqrt n) of order
(K^2 / n) log(n / K^2) (Han, Jana and Wu). `predict_next` has

    "add"       the row of the estimate with beta = 1/2
    "average"   the average of predictions by beta = 1/2 from the last t states alone, t = 1, ..., n, which comes from
                universal compression: for a stationary chain its risk is at most the redundancy of the code over n,
                of the order that is least for K >= 3 (Han, Jana and Wu)

    "minimax"   for K = 2 alone: as "add", but where the last state was never left. It is then left with probability
                1 / (n + 1) if the chain has never moved, and 1 / (l log(l + 1)), at most 1/2, after l visits to it

The last attains the least order for K = 2. Of the paths that entered the last state and stayed for l steps each l is
about as likely if both states are left at a rate of 1 / n, and a loss of about 1 / l, as of "add", sums to log n; of
1 / (l log l) to log log n. The order tells at no n that is met: over all chains of two states, by enumeration, the
worst n E KL for n = 16, 64, 256 is 1.10, 1.24, 1.40 of "add", and 1.10, 1.40, 1.63 of "minimax".

References:
    Falahatgar, Orlitsky, Pichapati and Suresh (2016), doi:10.1109/ISIT.2016.7541787.
    Hao, Orlitsky and Pichapati (2018), https://arxiv.org/abs/1810.11754.
    Han, Jana and Wu (2021), https://arxiv.org/abs/2106.13947.
    Grassmann, Taksar and Heyman (1985), doi:10.1287/opre.33.5.1107.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from bayesinf import errors

__all__ = [
    "Risk",
    "add_constant",
    "check_states",
    "check_transition",
    "estimation_risk",
    "predict_next",
    "prediction_risk",
    "sample_chain",
    "stationary_law",
    "transition_counts",
]

METHODS = ("add", "average", "minimax")


class Risk(NamedTuple):
    """Expected losses, by simulation.

    Attributes:
        mean: in nats.
        standard_error: of the mean.
    """

    mean: Array
    standard_error: Array


def transition_counts(states: Int[Array | np.ndarray, " n"], num_states: int) -> Float[Array, "k k"]:
    """How often each state follows each: F_ij = #{t : x_t = i, x_{t+1} = j}.

    Args:
        states: a path, values in 0..K-1.
        num_states: K.

    Returns:
        The counts, as floating-point numbers.

    Raises:
        ValueError: a state is not in 0..K-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import transition_counts
        >>> transition_counts(jnp.array([0, 1, 1, 0, 1]), 2).tolist()
        [[0.0, 2.0], [1.0, 1.0]]
    """
    check_states("states", states, num_states)
    one_hot = jax.nn.one_hot(states, num_states)
    return one_hot[:-1].T @ one_hot[1:]


def add_constant(counts: Num[Array | np.ndarray, "k m"], beta: Float[Array, ""] | float = 0.5) -> Float[Array, "k m"]:
    """Rows of probabilities from rows of counts, a constant added to each count.

        P^_ij = (N_ij + beta) / (N_i + M beta)

    Args:
        counts: N_ij, K rows of M counts: of transitions, or of symbols.
        beta: > 0; 1/2 is the estimate of Krichevsky and Trofimov, the mean under Jeffreys' prior.

    Returns:
        The probabilities.

    Raises:
        ValueError: `beta` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import add_constant
        >>> add_constant(jnp.array([[3, 0], [0, 0]])).tolist()
        [[0.875, 0.125], [0.5, 0.5]]
    """
    errors.check_positive("beta", beta)
    raised = jnp.asarray(counts) + beta
    return raised / raised.sum(1, keepdims=True)


def stationary_law(transition: Float[Array | np.ndarray, "k k"]) -> Float[Array, " k"]:
    """The stationary law of an irreducible chain, by elimination of states without a subtraction.

    Every entry is accurate to rounding, relative to itself, even in chains that hardly ever leave a state.

    Args:
        transition: P, rows of probabilities.

    Returns:
        pi with pi P = pi.

    Raises:
        ValueError: rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import stationary_law
        >>> [round(p, 4) for p in stationary_law(jnp.array([[0.9, 0.1], [0.3, 0.7]])).tolist()]
        [0.75, 0.25]

    References:
        Grassmann, Taksar and Heyman (1985), doi:10.1287/opre.33.5.1107.
    """
    check_transition(transition)
    ways, entries = jnp.asarray(transition), []
    for last in range(len(transition) - 1, 0, -1):
        # the last state's ways in, over its ways out to those left, are joined to these
        enter = ways[:last, last] / ways[last, :last].sum()
        ways = ways[:last, :last] + enter[:, None] * ways[last, :last]
        entries.append(enter)
    law = jnp.ones(1, ways.dtype)
    for enter in reversed(entries):
        law = jnp.append(law, law @ enter)
    return law / law.sum()


def sample_chain(
    key: errors.KeyLike,
    transition: Float[Array | np.ndarray, "k k"],
    num_steps: int,
    initial: Float[Array | np.ndarray, " k"] | None = None,
) -> Int[Array, " n"]:
    """A path of the chain.

    Args:
        key: PRNG key or seed.
        transition: P, rows of probabilities.
        num_steps: n.
        initial: the law of the first state, the stationary one if left out.

    Returns:
        x_1, ..., x_n.

    Raises:
        ValueError: `num_steps` is not positive, or rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import sample_chain
        >>> sample_chain(0, jnp.array([[0.0, 1.0], [1.0, 0.0]]), 4, jnp.array([1.0, 0.0])).tolist()
        [0, 1, 0, 1]
    """
    errors.check_count("num_steps", num_steps)
    check_transition(transition)
    key_first, key_path = jax.random.split(errors.as_key(key))
    transition = jnp.asarray(transition)
    first = jax.random.categorical(key_first, jnp.log(stationary_law(transition) if initial is None else initial))
    bounds = jnp.cumsum(transition, axis=1)

    def step(x: Array, u: Array) -> tuple[Array, Array]:
        return jnp.sum(u * bounds[x, -1] >= bounds[x, :-1]).astype(x.dtype), x

    return jax.lax.scan(step, first, jax.random.uniform(key_path, (num_steps,), transition.dtype))[1]


def predict_next(states: Int[Array | np.ndarray, " n"], num_states: int, *, method: str = "add") -> Float[Array, " k"]:
    """The estimated law of the next state of a path.

    Args:
        states: x_1, ..., x_n.
        num_states: K.
        method: "add", "average" or "minimax": see above.

    Returns:
        P^(x_{n+1} = j | x_1, ..., x_n), all positive.

    Raises:
        ValueError: `method` is none of these, or "minimax" where there are not two states, or a state is not in
            0..K-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import predict_next
        >>> states = jnp.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
        >>> [round(float(predict_next(states, 2, method=method)[0]), 3) for method in ("add", "average", "minimax")]
        [0.071, 0.138, 0.069]

    References:
        Falahatgar, Orlitsky, Pichapati and Suresh (2016), doi:10.1109/ISIT.2016.7541787.
        Han, Jana and Wu (2021), https://arxiv.org/abs/2106.13947.
    """
    _check_method(method, num_states)
    check_states("states", states, num_states)
    states = jnp.asarray(states)
    last = states[-1]
    if method == "minimax":
        counts = transition_counts(states, 2)
        num_visits = counts[last, last] + 1
        rarely = jnp.minimum(0.5, 1 / (num_visits * jnp.log(num_visits + 1)))
        never_left = jnp.where(counts[1 - last, last] > 0, rarely, 1 / (len(states) + 1))
        leave = jnp.where(counts[last, 1 - last] > 0, add_constant(counts)[last, 1 - last], never_left)
        return jnp.where(jnp.arange(2) == last, 1 - leave, leave)
    if method == "average":
        follows = jax.nn.one_hot(states[1:], num_states) * (states[:-1] == last)[:, None]
        counts = jnp.concatenate([jnp.zeros((1, num_states)), jnp.cumsum(follows[::-1], axis=0)])
        return add_constant(counts).mean(axis=0)
    return add_constant(transition_counts(states, num_states))[last]


def estimation_risk(
    key: errors.KeyLike,
    transition: Float[Array | np.ndarray, "k k"],
    lengths: Sequence[int],
    *,
    num_runs: int = 1_000,
    beta: float = 0.5,
) -> Risk:
    """The risk curve of an estimate of all rows: E KL(P_i. || P^_i.) for paths of several lengths.

    In the limit it is (K - 1) / (2 n pi_i).

    Args:
        key: PRNG key or seed.
        transition: P, rows of probabilities.
        lengths: of paths; those of one run are the beginnings of one path.
        num_runs: independent paths.
        beta: what is added to counts.

    Returns:
        Mean and standard error, of shape (lengths, K).

    Raises:
        ValueError: a length or number is not positive, or rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import estimation_risk, stationary_law
        >>> transition = jnp.array([[0.9, 0.1], [0.3, 0.7]])
        >>> found = estimation_risk(0, transition, [2_000], num_runs=500)
        >>> limit = 1 / (2 * 2_000 * stationary_law(transition))
        >>> bool(jnp.all(jnp.abs(found.mean[0] - limit) < 5 * found.standard_error[0]))
        True

    References:
        Hao, Orlitsky and Pichapati (2018), https://arxiv.org/abs/1810.11754.
    """
    check_transition(transition)
    transition = jnp.asarray(transition)
    lengths = tuple(errors.check_count("lengths", length, minimum=2) for length in lengths)
    losses = _estimation_losses(errors.as_key(key), transition, beta, lengths, errors.check_count("num_runs", num_runs))
    return _average(losses)


def prediction_risk(
    key: errors.KeyLike,
    transition: Float[Array | np.ndarray, "k k"],
    num_steps: int,
    *,
    method: str = "add",
    num_runs: int = 1_000,
) -> Risk:
    """The risk of a prediction: E KL(P_{x_n .} || P^(. | x_1, ..., x_n)) of a stationary path.

    Args:
        key: PRNG key or seed.
        transition: P, rows of probabilities.
        num_steps: n.
        method: of `predict_next`.
        num_runs: independent paths.

    Returns:
        Mean and standard error.

    Raises:
        ValueError: `method` is unknown, or a number is not positive, or rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import prediction_risk
        >>> found = prediction_risk(0, jnp.array([[0.9, 0.1], [0.3, 0.7]]), 100)
        >>> bool(0 < found.mean < 0.05)
        True

    References:
        Hao, Orlitsky and Pichapati (2018), https://arxiv.org/abs/1810.11754.
    """
    _check_method(method, len(transition))
    check_transition(transition)
    sizes = errors.check_count("num_steps", num_steps, minimum=2), errors.check_count("num_runs", num_runs)
    return _average(_prediction_losses(errors.as_key(key), jnp.asarray(transition), method, *sizes))


def check_states(name: str, values: Array | np.ndarray | int | np.integer, num_values: int) -> None:
    """Whole numbers in 0..num_values - 1; skipped while traced."""
    if errors.is_concrete(values) and not np.all((np.asarray(values) >= 0) & (np.asarray(values) < num_values)):
        raise ValueError(f"{name} must lie in 0..{num_values - 1}, got {np.asarray(values)}")


def check_transition(transition: Float[Array | np.ndarray, "k k"]) -> None:
    """Rows of probabilities; skipped while traced."""
    if not errors.is_concrete(transition):
        return
    rows = np.asarray(transition)
    # what stays may have been rounded to 1 where the ways out are tiny: they count, not it
    slack = len(rows) * float(np.finfo(rows.dtype).eps) ** 0.5
    if not np.all(rows >= 0) or np.any(np.abs(rows.sum(1) - 1) > slack):
        raise ValueError(f"transition must hold rows of probabilities that sum to 1, got {rows}")


def _check_method(method: str, num_states: int) -> None:
    errors.check_choice("method", method, METHODS)
    if method == "minimax" and num_states != 2:
        raise ValueError(f"method must not be 'minimax' with {num_states} states, it is for two; take 'average'")


@partial(jax.jit, static_argnums=(3, 4))
def _estimation_losses(key: Array, transition: Array, beta: Array, lengths: tuple[int, ...], num_runs: int) -> Array:
    def run(key: Array) -> Array:
        states = sample_chain(key, transition, max(lengths))
        counts = [transition_counts(states[:length], len(transition)) for length in lengths]
        return jnp.stack([_divergence(transition, add_constant(one, beta)) for one in counts])

    return jax.lax.map(run, jax.random.split(key, num_runs), batch_size=100)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _prediction_losses(key: Array, transition: Array, method: str, num_steps: int, num_runs: int) -> Array:
    def run(key: Array) -> Array:
        states = sample_chain(key, transition, num_steps)
        return _divergence(transition[states[-1]], predict_next(states, len(transition), method=method))

    return jax.lax.map(run, jax.random.split(key, num_runs), batch_size=100)


def _divergence(p: Array, q: Array) -> Array:
    """KL(p || q) along the last axis; 0 log 0 = 0."""
    return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0) / q), 0.0), axis=-1)


def _average(losses: Array) -> Risk:
    return Risk(losses.mean(0), losses.std(0, ddof=1) / jnp.sqrt(len(losses)))
