"""Priors of Bayesian networks matched to a Gaussian process: not weights are given a law, but functions.

At random inputs X, the functions of the network with parameters psi are brought near those of the process. With A and B
their covariances, and f and g their draws:

    "bures"         min |A|_tr + |B|_tr - 2 |A^{1/2} B^{1/2}|_*        the Wasserstein distance of N(0, A) and N(0, B)
    "wasserstein"   min over psi, max over critics c, of E c(g) - E c(f) - gamma E (|grad c| - 1)^2

|.|_* is the sum of the singular values, that of L_A^T L_B for any roots L. With A in closed form (a wide network)
nothing is random but X. With A and B estimated from S draws each, in the columns of F and G, the distance alone would
be least where A is too small: the estimates' own spread is counted as distance. What is minimised instead takes that
out, from a second pair F', G':

    ( |F^T F'|_* + |G^T G'|_* - 2 |F^T G|_* ) / S

Functions of network and process have mean zero. The Bures distance sees their covariances only; the critic sees all of
their law, and costs many times more.

References:
    Tran, Rossi, Milios and Filippone (2022), arXiv:2011.12829.
    Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville (2017), arXiv:1704.00028 (the penalty of the gradient).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.models.gp.covariances import as_covariance, gram
from bayesinf.models.gp.dense import cholesky_or_identity
from bayesinf.models.gp.lbfgs import minimise
from bayesinf.models.gp.process import as_inputs
from bayesinf.models.gp.solver import add_jitter

__all__ = ["PriorMatch", "bures_distance", "drawn_divergence", "match_prior"]


class PriorMatch(eqx.Module):
    """What `match_prior` returns.

    Attributes:
        network: the network with its parameters matched.
        losses: after each step; in closed form, the last alone. Of the critic what it sees of the Wasserstein distance:
            all of a difference of means, and often less of others, since it is trained from a start that is nearly
            linear, and the penalty keeps it there.
    """

    network: Any
    losses: Float[Array, " steps"]


def bures_distance(A: Float[Array, "n n"], B: Float[Array, "n n"]) -> Float[Array, ""]:
    """The squared Wasserstein-2 distance of N(0, A) and N(0, B); differentiable, with relative jitter.

    Raises:
        ValueError: they are not two covariances of one shape. Where traced, an indefinite one gives NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp
        >>> round(float(gp.bures_distance(4.0 * jnp.eye(3), jnp.eye(3))), 2)  # 3 (2 - 1)^2
        3.0
    """
    A, B = (errors.as_array(name, is_floating=True)(value) for name, value in (("A", A), ("B", B)))
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape != B.shape:
        raise ValueError(f"A and B must be covariances of one shape (n, n), got {A.shape} and {B.shape}")
    found = _spread(A) + _spread(B) - 2.0 * _nuclear(_root(A), _root(B))
    if errors.is_concrete(found) and jnp.isnan(found):
        raise ValueError("A and B must be positive semi-definite, got one that has no Cholesky factor")
    return found


def drawn_divergence(key: Array, network: Any, kernel: Any, sample_inputs: Any, num_functions: int) -> Float[Array, ""]:
    """What is minimised with draws, for each input; its gradient has mean zero where both laws are the same."""
    key_inputs, key_network, key_process = jax.random.split(key, 3)
    X = sample_inputs(key_inputs)
    F, F2 = jnp.split(_functions(key_network, network, X, 2 * num_functions), 2, axis=1)
    G, G2 = jnp.split(_process(key_process, kernel, X, 2 * num_functions), 2, axis=1)
    return (_nuclear(F, F2) + _nuclear(G, G2) - 2.0 * _nuclear(F, G)) / (num_functions * X.shape[0])


def match_prior(
    key: errors.KeyLike,
    network: Any,
    kernel: Any,
    sample_inputs: Callable[[Any], Any],
    *,
    method: str = "bures",
    num_functions: int | None = 128,
    num_steps: int = 200,
    learning_rate: float = 0.05,
    critic_steps: int = 200,
    critic_width: int = 200,
    critic_rate: float = 0.02,
    penalty: float = 10.0,
) -> PriorMatch:
    """The network whose functions are most like those of a Gaussian process.

    Args:
        key: PRNG key or seed.
        network: a `BayesianNetwork`, or any pytree with `sample(key, X) -> (n,)`, a function of its prior at X, and for
            the closed form `gram(X) -> (n, n)`. All its floating leaves are matched; they are not constrained, so
            variances are to be logarithms.
        kernel: covariance function of the process.
        sample_inputs: `sample_inputs(key) -> X`, (n,) or (n, D): where functions are compared.
        method: "bures" or "wasserstein".
        num_functions: S, drawn of network and process in each step; None with "bures" for the closed form, which takes
            eight draws of X and finds the minimum by L-BFGS.
        num_steps: of the network, at most.
        learning_rate: of Adam, decaying to zero ("bures"), or of RMSprop ("wasserstein").
        critic_steps: of the critic, a new one in each step, by Adagrad.
        critic_width: units in each of its two hidden layers.
        critic_rate: the learning rate of it.
        penalty: gamma, of the gradient.

    Raises:
        ValueError: an argument is out of its range or of the wrong shape, or the match ends in what is not finite.

    Example:
        >>> import jax
        >>> from bayesinf.models import gp, nngp
        >>> network = gp.BayesianNetwork(nngp.erf(), depth=1, width=64)
        >>> inputs = lambda key: jax.random.uniform(key, (10,), minval=-2.0, maxval=2.0)
        >>> matched = gp.match_prior(0, network, gp.RBF(1.0), inputs, num_functions=None).network
        >>> X = inputs(jax.random.key(1))
        >>> before, after = (gp.bures_distance(one.gram(X), gp.RBF(1.0)(X)) for one in (network, matched))
        >>> bool(after < 0.2 * before)
        True
    """
    key = errors.as_key(key)
    errors.check_choice("method", method, ("bures", "wasserstein"))
    if num_functions is None and method == "wasserstein":
        raise ValueError('num_functions must be a number for method="wasserstein"; the closed form is of "bures"')
    for name, count in (("num_steps", num_steps), ("critic_steps", critic_steps), ("critic_width", critic_width)):
        errors.check_count(name, count)
    for name, value in (("learning_rate", learning_rate), ("critic_rate", critic_rate), ("penalty", penalty)):
        errors.check_positive_scalar(name, value)
    kernel = as_covariance(kernel)
    errors.check_arguments("sample_inputs", sample_inputs, "key")
    X = as_inputs("sample_inputs(key)", sample_inputs(key))
    wanted, shape = ("gram", 2 * X.shape[:1]) if num_functions is None else ("sample", X.shape[:1])
    if not callable(getattr(network, wanted, None)):
        raise ValueError(f"network must have a method {wanted}, as a BayesianNetwork has, got {type(network).__name__}")
    found = jnp.shape(network.gram(X) if num_functions is None else network.sample(key, X))
    if found != shape:
        raise ValueError(f"network.{wanted} must return shape {shape} at {X.shape[0]} inputs, got {found}")
    draw = as_pytree(sample_inputs)
    if num_functions is None:
        matched, losses = _match_closed(key, network, kernel, draw, num_steps)
    elif method == "bures":
        errors.check_count("num_functions", num_functions, minimum=2)
        matched, losses = _match_bures(key, network, kernel, draw, num_functions, num_steps, jnp.asarray(learning_rate))
    else:
        errors.check_count("num_functions", num_functions, minimum=2)
        rates = (jnp.asarray(learning_rate), jnp.asarray(critic_rate), jnp.asarray(penalty))
        matched, losses = _match_critic(
            key, network, kernel, draw, num_functions, num_steps, critic_steps, critic_width, rates
        )
    if errors.is_concrete(losses) and not bool(jnp.isfinite(losses[-1])):
        raise ValueError(
            "kernel and network must give finite functions and positive definite covariances at all inputs, got a loss "
            f"of {losses[-1]}; a smaller learning_rate may help"
        )
    return PriorMatch(matched, losses)


@eqx.filter_jit
def _match_closed(key: Any, network: Any, kernel: Any, draw: Any, num_steps: int) -> tuple[Any, Array]:
    sets = [draw(one) for one in jax.random.split(key, 8)]
    free, fixed = eqx.partition(network, eqx.is_inexact_array)
    goals = [gram(kernel, X, X) for X in sets]

    def loss(free: Any) -> Array:
        network = eqx.combine(free, fixed)
        distances = [bures_distance(network.gram(X), goal) for X, goal in zip(sets, goals, strict=True)]
        return sum(distances, jnp.zeros(())) / sum((_spread(goal) for goal in goals), jnp.zeros(()))

    found = minimise(loss, free, num_steps)
    return eqx.combine(found.point, fixed), found.value[None]


@eqx.filter_jit
def _match_bures(
    key: Any, network: Any, kernel: Any, draw: Any, num_functions: int, num_steps: int, rate: Array
) -> tuple[Any, Array]:
    free, fixed = eqx.partition(network, eqx.is_inexact_array)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))  # type: ignore[arg-type]  # pyright: ignore

    def loss(free: Any, key: Array) -> Array:
        return drawn_divergence(key, eqx.combine(free, fixed), kernel, draw, num_functions)

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        free, state = carry
        value, grad = jax.value_and_grad(loss)(free, key)
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(free, updates), state), value

    (free, _), losses = jax.lax.scan(step, (free, optimizer.init(free)), jax.random.split(key, num_steps))
    return eqx.combine(free, fixed), losses


@eqx.filter_jit
def _match_critic(
    key: Any,
    network: Any,
    kernel: Any,
    draw: Any,
    num_functions: int,
    num_steps: int,
    critic_steps: int,
    critic_width: int,
    rates: tuple[Array, Array, Array],
) -> tuple[Any, Array]:
    free, fixed = eqx.partition(network, eqx.is_inexact_array)
    outer = optax.rmsprop(rates[0])  # type: ignore[arg-type]  # pyright: ignore
    inner = optax.adagrad(rates[1])  # type: ignore[arg-type]  # pyright: ignore

    def gap(critic: Any, free: Any, X: Array, key: Array) -> tuple[Array, Array, Array]:
        """E c(g) - E c(f), and the functions."""
        key_network, key_process = jax.random.split(key)
        F = _functions(key_network, eqx.combine(free, fixed), X, num_functions).T
        G = _process(key_process, kernel, X, num_functions).T
        return jnp.mean(_criticise(critic, G)) - jnp.mean(_criticise(critic, F)), F, G

    def critic_loss(critic: Any, free: Any, X: Array, key: Array) -> Array:
        key_gap, key_mix = jax.random.split(key)
        value, F, G = gap(critic, free, X, key_gap)
        mix = jax.random.uniform(key_mix, (num_functions, 1), F.dtype)
        slopes = jax.vmap(jax.grad(_criticise, argnums=1), (None, 0))(critic, mix * F + (1.0 - mix) * G)
        return -value + rates[2] * jnp.mean((jnp.sqrt(jnp.sum(slopes**2, axis=1) + 1e-12) - 1.0) ** 2)

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        free, state = carry
        key_inputs, key_start, key_critic, key_gap = jax.random.split(key, 4)
        X = draw(key_inputs)
        critic = _start_critic(key_start, X.shape[0], critic_width, X.dtype)

        def improve(carry: Any, key: Array) -> tuple[Any, None]:
            critic, state = carry
            updates, state = inner.update(jax.grad(critic_loss)(critic, free, X, key), state)
            return (optax.apply_updates(critic, updates), state), None

        keys = jax.random.split(key_critic, critic_steps)
        (critic, _), _ = jax.lax.scan(improve, (critic, inner.init(critic)), keys)
        value, grad = jax.value_and_grad(lambda free: gap(critic, free, X, key_gap)[0])(free)
        updates, state = outer.update(grad, state)
        return (optax.apply_updates(free, updates), state), value

    (free, _), losses = jax.lax.scan(step, (free, outer.init(free)), jax.random.split(key, num_steps))
    return eqx.combine(free, fixed), losses


def _start_critic(key: Array, n: int, width: int, dtype: Any) -> list[tuple[Array, Array]]:
    sizes = [n, width, width, 1]
    keys = jax.random.split(key, 3)
    pairs = zip(keys, sizes, sizes[1:], strict=False)
    return [(jax.random.normal(k, (i, o), dtype) * i**-0.5, jnp.zeros(o, dtype)) for k, i, o in pairs]


def _criticise(critic: list[tuple[Array, Array]], f: Float[Array, "... n"]) -> Float[Array, "..."]:
    for weights, biases in critic[:-1]:
        f = jax.nn.softplus(f @ weights + biases)
    weights, biases = critic[-1]
    return (f @ weights + biases)[..., 0]


def _functions(key: Array, network: Any, X: Array, num: int) -> Float[Array, "n s"]:
    return jax.vmap(lambda key: network.sample(key, X), out_axes=1)(jax.random.split(key, num))


def _process(key: Array, kernel: Any, X: Array, num: int) -> Float[Array, "n s"]:
    root = _root(gram(kernel, X, X))
    return root @ jax.random.normal(key, (X.shape[0], num), root.dtype)


def _root(covariance: Array) -> Array:
    """A Cholesky factor; NaN where there is none."""
    tril, log_ok = cholesky_or_identity(covariance + jnp.diag(add_jitter(jnp.diagonal(covariance), None, None)))
    return jnp.where(jnp.isneginf(log_ok), jnp.nan, tril)


def _spread(covariance: Array) -> Array:
    """The trace with its jitter."""
    variances = jnp.diagonal(covariance)
    return jnp.sum(variances + add_jitter(variances, None, None))


def _nuclear(F: Array, G: Array) -> Array:
    """|F^T G|_*, the trace of (F F^T G G^T)^{1/2}."""
    return jnp.sum(jnp.linalg.svd(F.T @ G, compute_uv=False))
