"""Stochastic approximation EM, with expectations that smoothing provides: parameters of exponential families.

Where log p_theta(x, y) = <s(x, y), psi(theta)> - A(theta) with an additive statistic s, EM is to repeat
theta = maximize(E[s | y]), and with estimates Pi_l(s) of the expectation, under the parameters of the moment,

    S_l = (1 - gamma_l) S_{l-1} + gamma_l Pi_l(s),    theta_l = maximize(S_l)

with gamma_l = 1 while l <= num_exploring, and (l - num_exploring)^-kappa after. One sweep of Parisian particle Gibbs an
iteration suffices, as its path is handed on.

References:
    Delyon, Lavielle and Moulines (1999), doi:10.1214/aos/1018031103.
    Lindsten (2013), doi:10.1109/ICASSP.2013.6638872 (with conditional particle filters).
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.additive import AdditiveFunctional, check_functional
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.learning import Freely, LearningResult, Smoother, check_maximize, select_finite, settle
from bayesinf.models.state_space import StateSpaceModel, check_observations

__all__ = ["saem"]


class _Approximation(eqx.Module):
    """What an iteration needs that does not change."""

    smoother: Smoother
    build: Freely
    statistics: AdditiveFunctional
    maximize: Callable[[PyTree], PyTree] = eqx.field(converter=as_pytree)
    num_exploring: Int[Array, ""] = eqx.field(converter=jnp.asarray)
    exponent: Float[Array, ""] = eqx.field(converter=jnp.asarray)


def saem(
    key: errors.KeyLike,
    build: Callable[[PyTree], StateSpaceModel],
    theta: PyTree,
    ys: PyTree,
    statistics: AdditiveFunctional,
    maximize: Callable[[PyTree], PyTree],
    *,
    num_particles: int,
    num_iterations: int,
    num_exploring: int | None = None,
    exponent: float = 0.7,
    estimator: str = "ppg",
    num_sweeps: int = 1,
    burn_in: int = 0,
    num_backward: int = 2,
    method: str = "auto",
    proposal: str = "bootstrap",
    initial_path: PyTree = None,
    progress: bool = False,
    throw: bool = True,
) -> LearningResult:
    """Finds maximum likelihood parameters by stochastic approximation EM.

    Args:
        key: PRNG key or seed.
        build: `build(theta)` returns the StateSpaceModel.
        theta: where to start, a pytree of floating point arrays.
        ys: observations with leading axis T; NaN where missing.
        statistics: the sufficient statistics s(x, y) of path and data.
        maximize: of an expectation of `statistics`, gives the parameters that maximise E[log p_theta(x, y)], of the
            structure of `theta`.
        num_particles: N of every filter.
        num_iterations: how many.
        num_exploring: iterations with gamma = 1, in which theta finds its place; by default a fifth of them.
        exponent: kappa in (1/2, 1].
        estimator: "ppg", or "gibbs", "paris", "backward" to compare; see `bayesinf.kernels.learning`.
        num_sweeps: sweeps an iteration, for "ppg" and "gibbs".
        burn_in: how many of them are not averaged.
        num_backward: M >= 1 backward draws a particle, for "ppg" and "paris".
        method: how backward draws are made; see `paris`.
        proposal: "bootstrap", or "guided" by the model's own proposals.
        initial_path: the first reference, with leading axis T; by default drawn from a particle filter at `theta`.
        progress: whether to show a bar. With or without it, Ctrl-C returns what there is, with a warning.
        throw: whether to raise if at some iteration all weights vanished.

    Returns:
        A LearningResult, whose `theta` is an average over the last half of the iterations.

    Raises:
        DegenerateWeightsError: at some iteration all weights vanished; its `result` is the LearningResult.
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def build(scale):
        ...     return bi.models.LinearGaussian.scalar(0.9, scale, initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build(0.5), num_steps=50)
        >>> squares = bi.kernels.AdditiveFunctional(
        ...     lambda x: jnp.zeros(()), lambda x_prev, x, t: jnp.sum((x - 0.9 * x_prev) ** 2)
        ... )
        >>> found = bi.kernels.saem(
        ...     1, build, 1.0, ys, squares, lambda s: jnp.sqrt(s / 49), num_particles=20, num_iterations=20
        ... )
        >>> found.trace.shape
        (20,)

    References:
        Delyon, Lavielle and Moulines (1999), doi:10.1214/aos/1018031103.
    """
    errors.check_arguments("build", build, "theta")
    errors.check_arguments("maximize", maximize, "statistics")
    errors.check_count("num_iterations", num_iterations)
    if num_exploring is None:
        num_exploring = num_iterations // 5
    errors.check_count("num_exploring", num_exploring, minimum=0)
    if not 0.5 < exponent <= 1:
        raise ValueError(f"exponent must lie in (0.5, 1], got {exponent}")
    check_functional(statistics)
    smoother = Smoother(ys, estimator, num_particles, num_sweeps, burn_in, num_backward, method, proposal)
    freely = Freely(build, None)
    theta = freely.free(theta)
    model = build(theta)
    ys = check_observations(model, ys)
    key_path, key_steps = jax.random.split(errors.as_key(key))
    path = smoother.start(key_path, model, initial_path)
    sums = jax.tree.map(lambda term: jnp.zeros(term.shape), jax.eval_shape(statistics.of_path, path, ys))
    check_maximize(maximize, sums, theta)
    fixed = _Approximation(smoother, freely, statistics, maximize, num_exploring, exponent)
    (_, _, path), (trace, log_evidence, is_failed) = iterate(
        _approximate, fixed, (theta, sums, path), key_steps, num_iterations, progress
    )
    return settle(freely, trace, log_evidence, is_failed, path, throw=throw)


def _approximate(fixed: _Approximation, state, key, iteration):
    theta, sums, path = state
    found = fixed.smoother(key, fixed.build(theta), fixed.statistics, path)
    after = jnp.maximum(iteration - fixed.num_exploring, 1)
    gamma = after**-fixed.exponent
    new_sums = jax.tree.map(lambda old, new: ((1 - gamma) * old + gamma * new).astype(old.dtype), sums, found.estimate)
    new_theta = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), fixed.maximize(new_sums), theta)
    (theta, sums), is_failed = select_finite((found.estimate, new_theta), (new_theta, new_sums), (theta, sums))
    return (theta, sums, found.path), (theta, found.log_evidence, is_failed)
