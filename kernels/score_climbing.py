"""Markovian score climbing: a variational family fitted by the inclusive Kullback-Leibler divergence.

Minimises KL(pi || q_lambda), whose gradient is -E_pi[grad_lambda log q_lambda(z)], along a Markov chain that leaves pi
invariant: conditional importance sampling with the family itself as proposal,

    z^1 = z_{l-1},  z^2, ..., z^S ~ q_lambda,   W^i proportional to pi(z^i) / q_lambda(z^i),   z_l = z^J,  J ~ Cat(W)
    lambda_l = lambda_{l-1} + gamma_l sum_i W^i grad_lambda log q_lambda(z^i)

The exclusive divergence of ordinary variational inference makes families too narrow; self-normalised importance
sampling without the memory z_{l-1} has a bias that does not vanish. For state-space models the chain is a conditional
particle filter and the sum a roll-out: `score_ascent(..., of="proposal")`.

References:
    Naesseth, Lindsten and Blei (2020), Markovian score climbing, NeurIPS, arXiv:2003.10374.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from bayesinf import errors, weights
from bayesinf.captured import captured, current
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.learning import Freely, LearningResult, check_optimizer, select_finite, settle
from bayesinf.models.state_space import log_prob, sample_many
from bayesinf.resampling import gather
from bayesinf.target import Target, as_target

__all__ = ["score_climbing"]


class _Climb(eqx.Module):
    """What an iteration needs that does not change."""

    target: Target
    family: Freely
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)
    is_rao_blackwellized: bool = eqx.field(static=True)


def score_climbing(
    key: errors.KeyLike,
    family: Callable[[PyTree], Any],
    parameters: PyTree,
    target: Target | Callable[[PyTree], Any],
    *,
    optimizer: optax.GradientTransformation,
    num_particles: int,
    num_iterations: int,
    initial: PyTree = None,
    constraints: Any = None,
    is_rao_blackwellized: bool = True,
    progress: bool = False,
    throw: bool = True,
) -> LearningResult:
    """Fits a family of laws to a target from outside: it covers the target rather than one of its modes.

    Args:
        key: PRNG key or seed.
        family: `family(parameters)` returns q_lambda: a numpyro distribution over positions, or a pair of functions
            (sample(key), log_prob(z)).
        parameters: where to start, a pytree of floating point arrays.
        target: a Target, or an unnormalised log density of positions.
        optimizer: of optax, with steps that fall to zero. It is given minus the gradient.
        num_particles: S >= 2, the chain's own position among them.
        num_iterations: how many steps.
        initial: the first position; by default a draw of the family.
        constraints: of NumPyro, by name where parameters are a dict, or one for all.
        is_rao_blackwellized: average the gradient over all S, rather than at the position that is kept.
        progress: whether to show a bar. With or without it, Ctrl-C returns what there is, with a warning.
        throw: whether to raise if at some iteration no position had weight.

    Returns:
        A LearningResult, whose `theta` are the parameters, averaged over the last half, and `path` the last position.
        Its `log_evidence` are logs of mean weights.

    Raises:
        DegenerateWeightsError: at some iteration all weights vanished; its `result` is the LearningResult.
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> found = bi.kernels.score_climbing(
        ...     0, lambda p: dist.Normal(p["mean"], jnp.exp(p["log_sd"])), {"mean": 0.0, "log_sd": 0.0},
        ...     lambda z: -0.5 * (z - 3.0) ** 2, optimizer=optax.adam(0.05), num_particles=10, num_iterations=500,
        ... )
        >>> bool(abs(found.theta["mean"] - 3.0) < 0.3)
        True

    References:
        Naesseth, Lindsten and Blei (2020), arXiv:2003.10374.
    """
    errors.check_arguments("family", family, "parameters")
    errors.check_count("num_particles", num_particles, minimum=2)
    errors.check_count("num_iterations", num_iterations)
    check_optimizer(optimizer)
    parameters = errors.as_arrays("parameters", parameters)
    freely = Freely(family, constraints)
    free = freely.free(parameters)
    key_start, key_steps = jax.random.split(errors.as_key(key))
    if initial is None:
        initial = jax.tree.map(lambda leaf: leaf[0], sample_many(key_start, family(parameters), 1))
    initial = errors.as_arrays("initial", initial)
    climb = _Climb(as_target(target), freely, captured(optimizer), num_particles, is_rao_blackwellized)
    state = (free, optimizer.init(free), initial)
    (_, _, position), kept = iterate(_climb, current(climb), state, key_steps, num_iterations, progress)
    trace, log_evidence, is_failed = kept
    return settle(freely, trace, log_evidence, is_failed, position, throw=throw)


def _climb(climb: _Climb, state, key, iteration):
    free, memory, position = state
    key_draw, key_choose = jax.random.split(key)
    law = climb.family(free)
    fresh = sample_many(key_draw, law, climb.num_particles - 1)
    zs = jax.tree.map(lambda z, zs: jnp.concatenate([z[None], zs.astype(z.dtype)]), position, fresh)
    log_q = jax.vmap(lambda z: log_prob(law, z))(zs)
    log_w = jax.vmap(climb.target.logdensity)(zs) - log_q
    log_weights, log_mean = weights.normalize(log_w)
    chosen = jax.random.categorical(key_choose, log_weights)
    shares = jnp.exp(log_weights) if climb.is_rao_blackwellized else jax.nn.one_hot(chosen, climb.num_particles)

    def mean_log_density(free):
        law = climb.family(free)
        # what has no weight may have no density either: its gradient must not be asked for
        safe = jax.tree.map(lambda z, kept: jnp.where(_like(shares > 0, z), z, kept), zs, gather(zs, chosen))
        return jnp.sum(shares * jax.vmap(lambda z: log_prob(law, z))(safe))

    gradient = jax.grad(mean_log_density)(free)
    updates, new_memory = climb.optimizer.update(jax.tree.map(jnp.negative, gradient), memory, free)
    moved = optax.apply_updates(free, updates)
    new = (moved, new_memory, gather(zs, chosen))
    state, is_failed = select_finite((gradient, log_mean, moved), new, state)
    return state, (state[0], log_mean, is_failed)


def _like(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))
