"""Parisian particle Gibbs (PPG): smoothed expectations whose bias decays geometrically.

One sweep is a conditional particle filter with reference zeta (slot 0) that carries PaRIS statistics,

    J_t^{i,j} ~ Cat(W_{t-1}^l p(X_t^i | X_{t-1}^l)),   j = 1..M, for every i, the reference among them
    tau_t^i = (1/M) sum_j [tau_{t-1}^{J} + h_t(X_{t-1}^{J}, X_t^i)],       estimate = sum_i W_{T-1}^i tau_{T-1}^i
    B_{T-1} ~ Cat(W_{T-1}),  B_{t-1} = J_t^{B_t, 1},  zeta'_t = X_t^{B_t}

and hands zeta' to the next. If zeta has the smoothing law then so has zeta', and E[estimate] is exactly the smoothed
expectation, for every N >= 2 and M >= 1. The roll-out estimator averages the sweeps k0 < l <= k; its bias is of order
kappa^k0 / N, with kappa in (0, 1) the rate at which the reference is forgotten, and a sweep's variance is of order 1/N.

Against one PaRIS run of k N particles it trades bias for about 1 / (1 - k0/k) in variance: the gain is where estimates
are averaged, as in stochastic approximation and over parallel replicates.

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), State and parameter learning with PARIS particle
        Gibbs, ICML, https://arxiv.org/abs/2301.00900.
    Olsson and Westerborn (2017), doi:10.3150/16-BEJ801 (PaRIS).
"""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels import cloud as clouds
from bayesinf.kernels.additive import (
    AdditiveFunctional,
    check_functional,
    check_terms,
    start_statistics,
    update_statistics,
    weighted_mean,
)
from bayesinf.kernels.backward import BACKWARD_METHODS, draw_counted
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.conditional_smc import draw_last, finish_sweep
from bayesinf.kernels.filter_steps import check_proposal, cure_of_vanished, warn_of_invalid
from bayesinf.kernels.path_kernel import PathKernel, PathState, first_paths
from bayesinf.kernels.rejection import Counts
from bayesinf.models.state_space import StateSpaceModel
from bayesinf.resampling import gather

__all__ = ["PPGResult", "ParisianGibbs", "ParisianInfo", "ppg", "roll_out"]


class ParisianInfo(NamedTuple):
    """What one sweep tells: the fields of `PathInfo`, and of its backward draws.

    Attributes:
        estimate: of the smoothed expectation, of the functional's structure; NaN where all weights vanished.
        num_proposals: indices that backward draws proposed on the way to t, accepted or not; none for "exact".
        num_exact: backward draws on the way to t that looked at all particles; for "reject", those that were not served
            in time.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    is_updated: Bool[Array, " t"]
    log_evidence: Float[Array, ""]
    num_invalid: Int[Array, ""]
    estimate: PyTree
    num_proposals: Int[Array, " t"]
    num_exact: Int[Array, " t"]


class ParisianGibbs(PathKernel):
    """Conditional PaRIS on paths: leaves p(x_{0:T-1} | y_{0:T-1}) invariant, and estimates an additive functional.

    Attributes:
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        functional: what is smoothed.
        num_particles: N >= 2, the reference among them.
        num_backward: M >= 1 backward draws a particle; with M = 1 the variance grows like T^2, from M = 2 like T.
        method: how backward draws are made, "exact", "mcmc", "reject" or "auto".
        proposal: "bootstrap", or "guided" for the model's own proposals.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> kernel = bi.kernels.ParisianGibbs(model, ys, total, num_particles=32)
        >>> state, info = kernel.step(jax.random.key(1), kernel.init(jnp.full(50, -1.0)))
        >>> state.position.shape, info.estimate.shape
        ((50,), ())
    """

    functional: AdditiveFunctional
    num_particles: int = eqx.field(static=True, default=64)
    num_backward: int = eqx.field(static=True, default=2)
    method: str = eqx.field(static=True, default="auto")
    proposal: str = eqx.field(static=True, default="bootstrap")

    def _check_rest(self):
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_count("num_backward", self.num_backward)
        errors.check_choice("method", self.method, BACKWARD_METHODS)
        check_proposal(self.model, self.proposal)
        check_functional(self.functional)
        check_terms(self.functional, self.model, jax.tree.map(lambda leaf: leaf[0], self.ys))

    def step(self, key: Key[Array, ""], state: PathState) -> tuple[PathState, ParisianInfo]:
        model, reference = self.model, state.position
        key_start, key_steps, key_last = jax.random.split(key, 3)
        x_0, y_0 = gather((reference, self.ys), jnp.zeros((), jnp.int32))
        start = clouds.start(key_start, model, y_0, self.num_particles, self.proposal, x_0)

        def step(carry, row):
            (cloud_prev, tau), (t, keys, (x, y)) = carry, row
            itself = jnp.zeros((), jnp.int32)  # where the reference comes from
            cloud, ancestors = clouds.move(keys[:2], model, cloud_prev, y, t, self.proposal, x, itself)
            J, costs = draw_counted(
                keys[2],
                model,
                cloud_prev.particles,
                cloud_prev.log_weights,
                cloud.particles,
                t,
                ancestors,
                self.num_backward,
                self.method,
            )
            tau = update_statistics(self.functional, tau, cloud_prev, cloud, J, y, t)
            return (cloud, tau), (cloud, J[:, 0], costs)

        first = (start, start_statistics(self.functional, start, y_0))
        own, zero = jnp.arange(self.num_particles, dtype=jnp.int32), jnp.zeros((), jnp.int32)
        kept = (start, own, Counts(num_proposals=zero, num_exact=zero))
        last, (cloud, parents, costs) = clouds.scan_steps(step, first, kept, key_steps, 3, (reference, self.ys))
        indices = clouds.trace_indices(draw_last(key_last, cloud.log_weights), parents)
        state, info = finish_sweep(state, cloud, indices)
        estimate = jax.tree.map(lambda leaf: jnp.where(info.is_divergent, jnp.nan, leaf), weighted_mean(*last))
        return state, ParisianInfo(*info, estimate, *costs)


class PPGResult(NamedTuple):
    """What `ppg` returns.

    Attributes:
        estimate: the roll-out estimate, the mean of `estimates` after the burn-in.
        estimates: the estimate of each sweep; leading axis k. Their trend shows the bias that is left.
        path: the path after the last sweep, a draw of the smoothing law up to what is left of the start: the
            `initial_path` with which a further run, or the next iteration of a learning algorithm, goes on.
        update_rate: share of the sweeps that renewed the path at each time; below a half, take more particles.
        log_evidence: log Zhat of each sweep's conditional filter, not an unbiased estimate.
        num_invalid: how many log weights of each sweep were NaN or +inf; they count as weights of zero.
    """

    estimate: PyTree
    estimates: PyTree
    path: PyTree
    update_rate: Float[Array, " t"]
    log_evidence: Float[Array, " k"]
    num_invalid: Int[Array, " k"]


def ppg(
    key: errors.KeyLike,
    model: StateSpaceModel,
    ys: PyTree,
    functional: AdditiveFunctional,
    *,
    num_particles: int,
    num_sweeps: int,
    burn_in: int,
    num_backward: int = 2,
    initial_path: PyTree = None,
    method: str = "auto",
    proposal: str = "bootstrap",
    progress: bool = False,
    throw: bool = True,
) -> PPGResult:
    """Smooths an additive functional by Parisian particle Gibbs.

        estimate = (k - k0)^{-1} sum_{l = k0 + 1}^{k} estimate_l

    Args:
        key: PRNG key or seed.
        model: the state-space model.
        ys: observations with leading axis T; NaN where missing.
        functional: what is smoothed.
        num_particles: N >= 2; enough of them that `update_rate` is above a half at every time.
        num_sweeps: k >= 1 sweeps.
        burn_in: k0 in [0, k); the bias decays geometrically in it. k / 2 is a good choice.
        num_backward: M >= 1 backward draws a particle.
        initial_path: the first reference, with leading axis T; by default drawn from a particle filter.
        method: how backward draws are made, "exact", "mcmc", "reject" or "auto"; see `paris`.
        proposal: "bootstrap", or "guided" by the model's own `initial_proposal` and `proposal`.
        progress: whether to show a bar. The run then comes back to the host now and then, and Ctrl-C returns what there
            is, with a warning: an estimate of NaN before the burn-in is over. Without, it is one compiled call, which
            Ctrl-C cannot end.
        throw: whether to raise if the weights vanish.

    Returns:
        A PPGResult.

    Raises:
        DegenerateWeightsError: all weights of some sweep vanished; its `result` is the PPGResult.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> result = bi.kernels.ppg(1, model, ys, total, num_particles=32, num_sweeps=10, burn_in=5)
        >>> result.estimate.shape, result.estimates.shape, result.path.shape
        ((), (10,), (50,))

    References:
        Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
    """
    errors.check_count("num_sweeps", num_sweeps)
    errors.check_count("burn_in", burn_in, minimum=0)
    if burn_in >= num_sweeps:
        raise ValueError(f"burn_in must be less than num_sweeps={num_sweeps}, got {burn_in}: no sweep would be left")
    key_initial, key_sweeps = jax.random.split(errors.as_key(key))
    kernel = ParisianGibbs(model, ys, current(functional), num_particles, num_backward, method, proposal)
    if initial_path is None:
        initial_path = jax.tree.map(lambda leaf: leaf[0], first_paths(kernel, key_initial, 1, throw=throw))
    state = kernel.init(initial_path)
    if progress:
        state, told = iterate(_sweep, kernel, state, key_sweeps, num_sweeps, True, "sweeping")
        result, is_divergent = _average(told, state, burn_in), told.is_divergent
    else:
        result, is_divergent = roll_out(key_sweeps, kernel, state, num_sweeps, burn_in)
    if throw and errors.is_concrete(is_divergent) and np.any(is_divergent):
        raise errors.DegenerateWeightsError(
            f"In {int(np.sum(is_divergent))} of {is_divergent.size} sweeps no particle of {num_particles} can explain "
            f"some observation: all weights are zero. {cure_of_vanished(model, kernel.ys, proposal)}; throw=False "
            "returns what there is.",
            result,
        )
    if throw and errors.is_concrete(result):
        warn_of_invalid(np.asarray(result.num_invalid), "sweep")
    return result


@partial(jax.jit, static_argnames=("num_sweeps", "burn_in"))
def roll_out(
    key: Key[Array, ""], kernel: ParisianGibbs, state: PathState, num_sweeps: int, burn_in: int
) -> tuple[PPGResult, Bool[Array, " k"]]:
    """`ppg` from a path, of arguments that are known to be right; and in which sweeps all weights vanished."""

    def sweep(state, i):
        return _sweep(kernel, state, jax.random.fold_in(key, i), i + 1)

    state, told = jax.lax.scan(sweep, state, jnp.arange(num_sweeps))
    return _average(told, state, burn_in), told.is_divergent


class _Told(NamedTuple):
    """What is kept of every sweep."""

    estimate: PyTree
    is_updated: Bool[Array, "..."]
    log_evidence: Float[Array, "..."]
    num_invalid: Int[Array, "..."]
    is_divergent: Bool[Array, "..."]


def _sweep(
    kernel: ParisianGibbs, state: PathState, key: Key[Array, ""], number: Int[Array, ""]
) -> tuple[PathState, _Told]:
    state, info = kernel.step(key, state)
    return state, _Told(info.estimate, info.is_updated, info.log_evidence, info.num_invalid, info.is_divergent)


@partial(jax.jit, static_argnums=2)
def _average(told: _Told, state: PathState, burn_in: int) -> PPGResult:
    estimate = jax.tree.map(lambda leaf: jnp.mean(leaf[burn_in:], axis=0), told.estimate)
    update_rate = jnp.mean(told.is_updated, axis=0, dtype=told.log_evidence.dtype)
    return PPGResult(estimate, told.estimate, state.position, update_rate, told.log_evidence, told.num_invalid)
