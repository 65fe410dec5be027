"""Score ascent: maximum likelihood of a state-space model by stochastic gradients that smoothing provides.

    theta_l = theta_{l-1} + gamma_l Pi_l(S),    Pi_l(S) an estimate of grad log p_theta(y) = E[grad log p(x, y) | y]

or any other step of an optimiser. With Parisian particle Gibbs the path of one iteration is the reference of the next:
under gamma_l = c / sqrt(l) the mean squared gradient falls as log l / sqrt(l), down to a floor that the bias of the
estimates decides; theirs falls geometrically in the sweeps of an iteration.

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900, section 4.
    Poyiadjis, Doucet and Singh (2011), doi:10.1093/biomet/asq062.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from bayesinf import errors
from bayesinf.captured import captured
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.learning import Freely, LearningResult, Smoother, check_optimizer, select_finite, settle
from bayesinf.kernels.score import check_law, score_functional
from bayesinf.models.state_space import StateSpaceModel, check_observations

__all__ = ["score_ascent"]


class _Ascent(eqx.Module):
    """What an iteration needs that does not change."""

    smoother: Smoother
    build: Freely
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    of: str = eqx.field(static=True)


def score_ascent(
    key: errors.KeyLike,
    build: Callable[[PyTree], StateSpaceModel],
    theta: PyTree,
    ys: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    num_particles: int,
    num_iterations: int,
    estimator: str = "ppg",
    num_sweeps: int = 1,
    burn_in: int = 0,
    num_backward: int = 2,
    method: str = "auto",
    proposal: str = "bootstrap",
    constraints: Any = None,
    initial_path: PyTree = None,
    of: str = "model",
    progress: bool = False,
    throw: bool = True,
) -> LearningResult:
    """Finds parameters of high likelihood by following the score.

    Args:
        key: PRNG key or seed.
        build: `build(theta)` returns the StateSpaceModel.
        theta: where to start, a pytree of floating point arrays.
        ys: observations with leading axis T; NaN where missing.
        optimizer: of optax, with steps that fall to zero, such as
            `optax.adam(optax.polynomial_schedule(0.05, 0.0, 1, num_iterations))`. It is given minus the score of the
            whole series.
        num_particles: N of every filter.
        num_iterations: how many steps.
        estimator: "ppg", or "gibbs", "paris", "backward" to compare; see `bayesinf.kernels.learning`.
        num_sweeps: sweeps an iteration, for "ppg" and "gibbs".
        burn_in: how many of them are not averaged; 0 does, as the path is handed on.
        num_backward: M >= 1 backward draws a particle, for "ppg" and "paris".
        method: how backward draws are made; see `paris`.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        constraints: of NumPyro, by name where theta is a dict, or one for all: steps are taken where there are none.
        initial_path: the first reference, with leading axis T; by default drawn from a particle filter at `theta`.
        of: "model" for the likelihood; "proposal" adapts the model's `proposal` instead, towards the smoothing law in
            the inclusive Kullback-Leibler divergence (Markovian score climbing with a state-space kernel).
        progress: whether to show a bar. With or without it, Ctrl-C returns what there is, with a warning.
        throw: whether to raise if at some iteration all weights vanished.

    Returns:
        A LearningResult, whose `theta` is an average over the last half of the iterations.

    Raises:
        DegenerateWeightsError: at some iteration all weights vanished; its `result` is the LearningResult.
        ValueError: an argument is out of its range, or the model lacks the proposal that `of` asks for.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from numpyro.distributions import constraints
        >>> import bayesinf as bi
        >>> def build(theta):
        ...     return bi.models.LinearGaussian.scalar(0.9, theta["scale"], initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build({"scale": 0.5}), num_steps=50)
        >>> found = bi.kernels.score_ascent(
        ...     1, build, {"scale": 1.0}, ys, optimizer=optax.adam(0.05), num_particles=20, num_iterations=20,
        ...     constraints={"scale": constraints.positive},
        ... )
        >>> found.trace["scale"].shape
        (20,)

    References:
        Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
    """
    errors.check_arguments("build", build, "theta")
    errors.check_count("num_iterations", num_iterations)
    check_optimizer(optimizer)
    theta = errors.as_arrays("theta", theta)
    freely = Freely(build, constraints)
    smoother = Smoother(ys, estimator, num_particles, num_sweeps, burn_in, num_backward, method, proposal)
    ascent = _Ascent(smoother, freely, captured(optimizer), of)
    free = freely.free(theta)
    check_law(of, build, theta)
    check_observations(build(theta), ys)
    key_path, key_steps = jax.random.split(errors.as_key(key))
    state = (free, optimizer.init(free), smoother.start(key_path, build(theta), initial_path))
    (_, _, path), (free, log_evidence, is_failed) = iterate(_climb, ascent, state, key_steps, num_iterations, progress)
    return settle(freely, free, log_evidence, is_failed, path, throw=throw)


def _climb(ascent: _Ascent, state, key, iteration):
    free, memory, path = state
    score = score_functional(ascent.build, free, of=ascent.of)
    found = ascent.smoother(key, ascent.build(free), score, path)
    descent = jax.tree.map(lambda leaf, like: -leaf.astype(like.dtype), found.estimate, free)
    updates, new_memory = ascent.optimizer.update(descent, memory, free)
    moved = optax.apply_updates(free, updates)
    (free, memory), is_failed = select_finite((found.estimate, moved), (moved, new_memory), (free, memory))
    return (free, memory, found.path), (free, found.log_evidence, is_failed)
