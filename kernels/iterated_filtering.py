"""Iterated filtering (IF2): maximum likelihood by filtering particles that carry parameters of their own.

    for l = 1, ..., L, on a swarm of theta^i, all equal at first:
        theta_0^i = theta^i + s_{l,0} sigma_0 xi,     x_0^i ~ p_{theta_0^i}(x_0)
        theta_t^i = theta_{t-1}^a + s_{l,t} sigma xi,   x_t^i ~ p_{theta_t^i}(x_t | x_{t-1}^a),   a = a_t^i
        weighed by p_{theta_t^i}(y_t | x_t^i) and resampled at every t, the last one too: the theta^i of l + 1

with theta unconstrained, and s_{l,t} = cooling^((l - 1 + t / T) / 50): in 50 iterations the perturbations fall to the
share `cooling` of what they were. Every iteration is one particle filter of the model of states (theta_t, x_t). The
swarm contracts to the maximum of the likelihood as the perturbations fall to zero.

Models need be simulated, and their observations to have a density, nothing else: no density of a transition, and no
gradient.

References:
    Ionides, Nguyen, Atchadé, Stoev and King (2015), doi:10.1073/pnas.1410597112.
    King, Nguyen and Ionides (2016), doi:10.18637/jss.v069.i12 (cooling by the fraction in 50 iterations).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.filter_steps import check_proposal, reweigh, warn_of_invalid, weigh_initial
from bayesinf.kernels.learning import Freely, select_finite
from bayesinf.kernels.online_filter import FilterState, ParticleFilter, keys_of, move_on
from bayesinf.kernels.perturbed import PerturbedModel
from bayesinf.models.state_space import StateSpaceModel, check_model, check_observations
from bayesinf.resampling import SCHEMES, gather, resample

__all__ = ["IteratedFilteringResult", "iterated_filtering"]

PERIOD = 50  # iterations in which the perturbations fall to `cooling`


class IteratedFilteringResult(NamedTuple):
    """What iterated filtering found in L iterations with N particles.

    Attributes:
        theta: the mean of the last swarm, where the parameters are not constrained.
        trace: the start, and these means after every iteration; leading axis L + 1.
        log_evidence: log Zhat of the perturbed model at every iteration. It is not that of theta: for that run a
            `particle_filter` of `build(theta)`.
        swarm: the last parameters, leading axis N.
        num_invalid: how many log weights were NaN or +inf in every iteration; they count as weights of zero.
        num_failed: iterations in which all weights vanished; they changed nothing.
    """

    theta: PyTree
    trace: PyTree
    log_evidence: Float[Array, " l"]
    swarm: PyTree
    num_invalid: Int[Array, " l"]
    num_failed: int | Array


def iterated_filtering(
    key: errors.KeyLike,
    build: Callable[[PyTree], StateSpaceModel],
    theta: PyTree,
    ys: PyTree,
    *,
    perturbation: PyTree,
    num_particles: int,
    num_iterations: int,
    initial_perturbation: PyTree = None,
    cooling: Float[Array, ""] | float = 0.5,
    proposal: str = "bootstrap",
    resampling: str = "systematic",
    constraints: Any = None,
    progress: bool = False,
    throw: bool = True,
) -> IteratedFilteringResult:
    """Finds parameters of high likelihood by filters whose particles carry perturbed parameters.

    One compiled loop over the iterations; new data, starts or perturbations of the same shape compile nothing.

    Args:
        key: PRNG key or seed.
        build: `build(theta)` returns the StateSpaceModel.
        theta: where to start, a pytree of floating point arrays.
        ys: observations with leading axis T; NaN where missing.
        perturbation: sigma >= 0, the standard deviation of a step of each parameter where it is not constrained, at
            first: a number, or a pytree like `theta`. 0.02 is a common choice; 0 for a parameter that stays as it is.
        num_particles: N of every filter.
        num_iterations: L.
        initial_perturbation: sigma_0 >= 0, before the first observation; by default `perturbation`. A parameter of the
            initial law alone is given one here, and 0 there: later perturbations of it would be noise.
        cooling: in (0, 1], the share of the perturbations that is left after 50 iterations.
        proposal: "bootstrap", or "guided" by the model's own proposals, which needs densities of transitions.
        resampling: one of `bayesinf.resampling.SCHEMES`.
        constraints: of NumPyro, by name where theta is a dict, or one for all.
        progress: whether to show a bar. With or without it, Ctrl-C returns what there is, with a warning.
        throw: whether to raise if at some iteration all weights vanished.

    Returns:
        An IteratedFilteringResult.

    Raises:
        DegenerateWeightsError: at some iteration all weights vanished (not while traced); its `result` is the
            IteratedFilteringResult.
        ValueError: an argument is out of its range or of the wrong kind.

    Example:
        >>> from numpyro.distributions import constraints
        >>> import bayesinf as bi
        >>> def build(theta):
        ...     return bi.models.LinearGaussian.scalar(0.9, theta["scale"], initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build({"scale": 0.5}), num_steps=20)
        >>> found = bi.kernels.iterated_filtering(
        ...     1, build, {"scale": 1.0}, ys, perturbation=0.02, num_particles=100, num_iterations=10,
        ...     constraints={"scale": constraints.positive},
        ... )
        >>> found.trace["scale"].shape, found.swarm["scale"].shape
        ((11,), (100,))

    References:
        Ionides, Nguyen, Atchadé, Stoev and King (2015), doi:10.1073/pnas.1410597112.
    """
    errors.check_arguments("build", build, "theta")
    errors.check_count("num_iterations", num_iterations)
    errors.check_count("num_particles", num_particles, minimum=2)
    errors.check_choice("resampling", resampling, SCHEMES)
    theta = errors.as_arrays("theta", theta)
    freely = Freely(build, constraints)
    free = freely.free(theta)
    ys = check_observations(build(theta), ys)
    check_model(build(theta))
    check_proposal(build(theta), proposal)
    sigma = _as_perturbation("perturbation", perturbation, free)
    sigma_0 = sigma
    if initial_perturbation is not None:
        sigma_0 = _as_perturbation("initial_perturbation", initial_perturbation, free)
    if errors.is_concrete((sigma, sigma_0)) and not any(map(np.any, jax.tree.leaves((sigma, sigma_0)))):
        raise ValueError("perturbation must be positive for at least one parameter: with 0 nothing is learnt")
    if errors.is_concrete(cooling) and not 0 < errors.as_number("cooling", cooling) <= 1:
        raise ValueError(f"cooling must lie in (0, 1], the share left after {PERIOD} iterations, got {cooling}")
    fixed = _Filtering(freely, sigma, sigma_0, cooling, ys, num_particles, proposal, resampling)

    swarm = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_particles, *leaf.shape)), free)
    swarm, kept = iterate(_filter_once, fixed, swarm, errors.as_key(key), num_iterations, progress)
    means, log_evidence, num_invalid, is_failed = kept
    means = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), free, means)
    trace = jax.vmap(freely.constrain)(means)
    last = freely.constrain(jax.tree.map(lambda leaf: leaf[-1], means))
    constrained = jax.vmap(freely.constrain)(swarm)
    result = IteratedFilteringResult(last, trace, log_evidence, constrained, num_invalid, jnp.sum(is_failed))
    if throw and errors.is_concrete(result):
        _raise_if_failed(result, np.asarray(is_failed))
    return result


class _Filtering(eqx.Module):
    """What an iteration needs that does not change."""

    build: Freely
    perturbation: PyTree
    initial_perturbation: PyTree
    cooling: Float[Array, ""] = eqx.field(converter=errors.as_array("cooling", is_floating=True))
    ys: PyTree
    num_particles: int = eqx.field(static=True)
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)


def _filter_once(self: _Filtering, swarm: PyTree, key: Key[Array, ""], iteration: Int[Array, ""]) -> tuple[PyTree, Any]:
    """One iteration: a filter of the perturbed model, from the swarm to the next one."""
    key_first, key_steps, key_last = jax.random.split(key, 3)
    first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], self.ys) for part in (0, slice(1, None)))
    num_steps = jax.tree.leaves(self.ys)[0].shape[0]
    log_cooling = jnp.log(self.cooling) / (PERIOD * num_steps)
    time = (iteration - 1.0) * num_steps
    model = PerturbedModel(self.build, self.perturbation, self.initial_perturbation, log_cooling, time)
    one = ParticleFilter(
        model,
        num_particles=self.num_particles,
        proposal=self.proposal,
        resampling=self.resampling,
        ess_threshold=1.0,
    )
    keys = jax.random.split(key_first, self.num_particles)
    particles = jax.vmap(lambda key, theta: model.first(key, theta, first, self.proposal))(keys, swarm)
    log_increments = weigh_initial(model, particles, first, self.proposal)
    equal = jnp.full_like(log_increments, -jnp.log(self.num_particles))
    log_weights, increment, num_invalid = reweigh(equal, log_increments)
    zero = jnp.zeros((), jnp.int32)
    state = FilterState(key_steps, zero, particles, log_weights, increment, jnp.zeros_like(increment))

    def step(state: FilterState, y: PyTree) -> tuple[FilterState, tuple[Array, Array]]:
        state, info = move_on(one, state, keys_of(key_steps, state.t + 1), y)
        return state, (info.log_evidence_increment, info.num_invalid)

    state, (increments, nums) = jax.lax.scan(step, state, rest)
    log_evidence = weights.compensated_sum(jnp.concatenate([increment[None], increments]))
    survivors = resample(key_last, state.log_weights, self.num_particles, self.resampling)
    swarm, is_failed = select_finite(log_evidence, gather(state.particles[0], survivors), swarm)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), swarm)
    return swarm, (mean, log_evidence, num_invalid + jnp.sum(nums, dtype=jnp.int32), is_failed)


def _as_perturbation(name: str, value: PyTree, free: PyTree) -> PyTree:
    """Standard deviations for every leaf of the unconstrained parameters."""
    if jax.tree.structure(value) == jax.tree.structure(0):
        value = jax.tree.map(lambda _: value, free)
    if jax.tree.structure(value) != jax.tree.structure(free):
        raise ValueError(
            f"{name} must be a number or a pytree like theta, {jax.tree.structure(free)}, got "
            f"{jax.tree.structure(value)}; 0 for a parameter that stays as it is"
        )
    sigma = errors.as_arrays(name, value)
    for one, leaf in zip(jax.tree.leaves(sigma), jax.tree.leaves(free), strict=True):
        if one.ndim > leaf.ndim or np.broadcast_shapes(one.shape, leaf.shape) != leaf.shape:
            raise ValueError(
                f"{name} must be scalars or of the shapes of the unconstrained theta, got {one.shape} for {leaf.shape}"
            )
        if errors.is_concrete(one) and not np.all(np.isfinite(one) & (np.asarray(one) >= 0)):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return sigma


def _raise_if_failed(result: IteratedFilteringResult, is_failed: np.ndarray) -> None:
    if is_failed.any():
        first = int(np.argmax(is_failed))
        at = jax.tree.map(lambda leaf: np.asarray(leaf[first]).tolist(), result.trace)
        raise errors.DegenerateWeightsError(
            f"In {int(is_failed.sum())} of {is_failed.size} iterations all weights vanished, first in iteration "
            f"{first + 1} at theta = {at}. Try more particles, smaller perturbations, another start, or an "
            "observation law with heavier tails; throw=False returns what there is, in which these iterations changed "
            "nothing.",
            result,
        )
    warn_of_invalid(np.asarray(result.num_invalid), "iteration")
