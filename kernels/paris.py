"""PaRIS, the particle-based rapid incremental smoother: additive functionals smoothed online in O(N) memory.

For h(x_{0:T-1}) = h_0(x_0) + sum_t h_t(x_{t-1}, x_t), a particle filter carries with each particle the statistic

    tau_0^i = h_0(X_0^i)
    tau_t^i = (1/M) sum_{j=1..M} [tau_{t-1}^{J_t^{i,j}} + h_t(X_{t-1}^{J_t^{i,j}}, X_t^i)]
    J_t^{i,j} ~ Cat(W_{t-1}^l p(X_t^i | X_{t-1}^l), l = 1..N)

and sum_i W_t^i tau_t^i estimates E[h(x_{0:t}) | y_{0:t}] at every t. Bias and variance are O(1/N); the variance grows
like T when M >= 2 and like T^2 when M = 1, and M = 2 has almost all of the benefit. The bias of `ppg` vanishes faster.

References:
    Olsson and Westerborn (2017), doi:10.3150/16-BEJ801.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import captured, current
from bayesinf.kernels.backward import BACKWARD_METHODS, draw_counted
from bayesinf.kernels.cloud import Cloud, scan_steps
from bayesinf.kernels.particle_filter import (
    check_proposal,
    check_threshold,
    choose_ancestors,
    cure_of_vanished,
    propagate,
    propagate_initial,
    reweigh,
    warn_of_invalid,
    weigh,
    weigh_initial,
)
from bayesinf.kernels.rejection import Counts
from bayesinf.models.state_space import StateSpaceModel, check_model, check_observations, sample
from bayesinf.resampling import SCHEMES, gather
from bayesinf.weights import compensated_sum, ess, normalize

__all__ = ["AdditiveFunctional", "ParisResult", "paris"]


def _as_pytree(function: Any) -> Any:
    """A function that may travel through jit as an argument: a pytree whose code is static."""
    is_pytree = isinstance(function, eqx.Module | jax.tree_util.Partial)
    return function if is_pytree or not callable(function) else jax.tree_util.Partial(captured(function))


class AdditiveFunctional(eqx.Module):
    """h(x_{0:T-1}) = initial(x_0) + sum_{t >= 1} increment(x_{t-1}, x_t, t).

    Both terms return pytrees of one structure and shape, so that several functionals are smoothed at once. A function
    is compiled once; to give it arrays that change, pass `jax.tree_util.Partial(function, arrays)`.

    Attributes:
        initial: a function of x_0.
        increment: a function of x_{t-1}, x_t and t.

    Example:
        >>> import bayesinf as bi
        >>> moments = bi.kernels.AdditiveFunctional(
        ...     initial=lambda x0: {"sum": x0, "lagged": 0.0 * x0},
        ...     increment=lambda x_prev, x, t: {"sum": x, "lagged": x_prev * x},
        ... )
        >>> moments.increment(2.0, 3.0, 1)
        {'sum': 3.0, 'lagged': 6.0}
    """

    initial: Callable[..., Any] = eqx.field(converter=_as_pytree)
    increment: Callable[..., Any] = eqx.field(converter=_as_pytree)

    def __check_init__(self):
        errors.check_arguments("initial", self.initial, "x_0")
        errors.check_arguments("increment", self.increment, "x_prev, x, t")


class ParisResult(NamedTuple):
    """What `paris` returns.

    Attributes:
        estimate: of E[h(x_{0:T-1}) | y_{0:T-1}], of the functional's structure.
        estimates: of E[h(x_{0:t}) | y_{0:t}] for every t; leading axis T.
        log_evidence: log Zhat of the filter; Zhat is unbiased for p(y_{0:T-1}).
        ess: effective sample size of the filter's weights at every t.
        num_invalid: how many log weights were NaN or +inf at t; they count as weights of zero.
        num_proposals: indices that backward draws proposed on the way to t, accepted or not; none for "exact".
        num_exact: backward draws on the way to t that looked at all particles; for "reject", those that were not served
            in time.
    """

    estimate: PyTree
    estimates: PyTree
    log_evidence: Float[Array, ""]
    ess: Float[Array, " t"]
    num_invalid: Int[Array, " t"]
    num_proposals: Int[Array, " t"]
    num_exact: Int[Array, " t"]


def paris(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    functional: AdditiveFunctional,
    *,
    num_particles: int,
    num_backward: int = 2,
    method: str = "auto",
    proposal: str = "bootstrap",
    resampling: str = "multinomial",
    ess_threshold: Float[Array, ""] | float = 1.0,
    throw: bool = True,
) -> ParisResult:
    """Smooths an additive functional online, with PaRIS.

    Args:
        key: PRNG key or seed.
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        functional: what is smoothed.
        num_particles: N >= 1.
        num_backward: M >= 1 backward draws a particle; 2 is the choice of the paper.
        method: how backward draws are made: "exact", at N^2 densities a step; "mcmc", at a constant cost for each;
            "reject", exact too, at a cost that depends on the model; or "auto", exact up to 2048 particles.
        proposal: "bootstrap", or "guided" by the model's own `initial_proposal` and `proposal`.
        resampling: one of `bayesinf.resampling.SCHEMES`; independent draws at every step are those of the paper.
        ess_threshold: resample where ess <= ess_threshold * N; 1 means always.
        throw: whether to raise if the weights vanish.

    Returns:
        A ParisResult.

    Raises:
        DegenerateWeightsError: all weights vanished at some step; its `result` is the ParisResult.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> result = bi.kernels.paris(jax.random.key(1), model, ys, total, num_particles=100)
        >>> result.estimate.shape, result.estimates.shape
        ((), (50,))

    References:
        Olsson and Westerborn (2017), doi:10.3150/16-BEJ801.
    """
    errors.check_count("num_particles", num_particles)
    errors.check_count("num_backward", num_backward)
    errors.check_choice("method", method, BACKWARD_METHODS)
    errors.check_choice("resampling", resampling, SCHEMES)
    check_threshold(ess_threshold)
    check_functional(functional)
    ys = check_observations(model, ys)
    check_proposal(model, proposal)
    result = _run(
        errors.as_key(key),
        model,
        ys,
        current(functional),
        ess_threshold,
        num_particles,
        num_backward,
        method,
        proposal,
        resampling,
    )
    if throw and errors.is_concrete(result) and not np.isfinite(result.log_evidence):
        step = int(np.argmax(np.asarray(result.ess) == 0))
        raise errors.DegenerateWeightsError(
            f"At time step {step} no particle of {num_particles} can explain the observation: all weights are zero. "
            f"{cure_of_vanished(model, ys, proposal)}; throw=False returns what there is.",
            result,
        )
    if throw and errors.is_concrete(result):
        warn_of_invalid(np.asarray(result.num_invalid), "time step")
    return result


@partial(jax.jit, static_argnames=("num_particles", "num_backward", "method", "proposal", "resampling"))
def _run(
    key, model, ys, functional, ess_threshold, num_particles, num_backward, method, proposal, resampling
) -> ParisResult:
    check_model(model)
    check_terms(functional, model)
    key_start, key_steps = jax.random.split(key)
    y_0 = gather(ys, jnp.zeros((), jnp.int32))
    particles = propagate_initial(key_start, model, y_0, num_particles, proposal)
    log_increments = weigh_initial(model, particles, y_0, proposal)
    log_weights, *counts = reweigh(jnp.full_like(log_increments, -jnp.log(num_particles)), log_increments)
    start = Cloud(particles, log_weights)
    tau_0 = start_statistics(functional, start)

    def step(carry, row):
        (cloud_prev, tau), (t, keys, y) = carry, row
        ancestors, log_carried, _ = choose_ancestors(
            keys[0], cloud_prev.log_weights, ess_threshold=ess_threshold, resampling=resampling
        )
        parents = gather(cloud_prev.particles, ancestors)
        particles = propagate(keys[1], model, parents, y, t, proposal)
        log_weights, *counts = reweigh(log_carried, weigh(model, parents, particles, y, t, proposal))
        J, costs = draw_counted(
            keys[2], model, cloud_prev.particles, cloud_prev.log_weights, particles, t, ancestors, num_backward, method
        )
        cloud = Cloud(particles, log_weights)
        tau = update_statistics(functional, tau, cloud_prev, cloud, J, t)
        return (cloud, tau), (weighted_mean(cloud, tau), *counts, ess(log_weights), costs)

    zero = jnp.zeros((), jnp.int32)
    kept_0 = (weighted_mean(start, tau_0), *counts, ess(log_weights), Counts(zero, zero))
    _, kept = scan_steps(step, (start, tau_0), kept_0, key_steps, 3, ys)
    estimates, increments, num_invalid, ess_each, costs = kept
    estimate = jax.tree.map(lambda leaf: leaf[-1], estimates)
    return ParisResult(estimate, estimates, compensated_sum(increments), ess_each, num_invalid, *costs)


# ---- the statistics, shared with the Parisian kernel ----


def start_statistics(functional: AdditiveFunctional, cloud: Cloud) -> PyTree:
    """tau_0^i = h_0(X_0^i), in the dtype of the weights."""
    return _as_statistics(jax.vmap(functional.initial)(cloud.particles), cloud)


def update_statistics(
    functional: AdditiveFunctional,
    tau: PyTree,
    cloud_prev: Cloud,
    cloud: Cloud,
    J: Int[Array, "N m"],
    t: Int[Array, ""],
) -> PyTree:
    """tau_t^i, the mean over j of tau_{t-1}^{J^{i,j}} + h_t(X_{t-1}^{J^{i,j}}, X_t^i)."""

    def increments(x, parents):
        return jax.vmap(lambda j: functional.increment(gather(cloud_prev.particles, j), x, t))(parents)

    h = _as_statistics(jax.vmap(increments)(cloud.particles, J), cloud)
    return jax.tree.map(lambda old, new: jnp.mean(old + new, axis=1), gather(tau, J), h)


def weighted_mean(cloud: Cloud, tau: PyTree) -> PyTree:
    """sum_i W_t^i tau_t^i; NaN where no weight is positive."""
    log_weights, log_mean = normalize(cloud.log_weights)
    weights = jnp.where(jnp.isfinite(log_mean), jnp.exp(log_weights), jnp.nan)
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), tau)


def check_functional(functional: Any) -> None:
    """An AdditiveFunctional."""
    if not isinstance(functional, AdditiveFunctional):
        raise ValueError(
            f"functional must be an AdditiveFunctional(initial, increment), got {type(functional).__name__}"
        )


def check_terms(functional: AdditiveFunctional, model: StateSpaceModel) -> None:
    """That both terms are real, of one structure and shape, for the states of the model; for tracing."""
    x = jax.eval_shape(lambda key: sample(key, model.initial()), jax.random.key(0))
    terms = {
        "initial": jax.eval_shape(functional.initial, x),
        "increment": jax.eval_shape(functional.increment, x, x, jnp.ones((), jnp.int32)),
    }
    shapes = {name: jax.tree.map(lambda leaf: leaf.shape, term) for name, term in terms.items()}
    if shapes["initial"] != shapes["increment"]:
        raise ValueError(
            "functional.initial and functional.increment must return pytrees of one structure and shape, got the "
            f"shapes {shapes['initial']} and {shapes['increment']}"
        )
    for name, term in terms.items():
        leaves = jax.tree.leaves(term)
        if not leaves or any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
            raise ValueError(f"functional.{name} must return real numbers, got {term}")


def _as_statistics(values: PyTree, cloud: Cloud) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, cloud.log_weights.dtype), values)
