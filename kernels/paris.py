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

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import current
from bayesinf.kernels.additive import (
    AdditiveFunctional,
    Statistics,
    check_functional,
    check_terms,
    start_statistics,
    update_statistics,
    weighted_mean,
)
from bayesinf.kernels.backward import BACKWARD_METHODS, draw_counted
from bayesinf.kernels.chunks import iterate
from bayesinf.kernels.cloud import Cloud
from bayesinf.kernels.filter_steps import cure_of_vanished, warn_of_invalid
from bayesinf.kernels.online_filter import FilterInfo, FilterState, ParticleFilter, as_row, begin, move_on
from bayesinf.models.state_space import StateSpaceModel, check_model, check_observations
from bayesinf.weights import compensated_sum

__all__ = [
    "Paris",
    "ParisInfo",
    "ParisResult",
    "ParisState",
    "begin_paris",
    "move_paris_on",
    "paris",
    "paris_keys",
]


class ParisState(NamedTuple):
    """Where PaRIS stands after y_t: the filter, and the statistics tau of its particles."""

    filter: FilterState
    statistics: Statistics


class ParisInfo(NamedTuple):
    """What one step of PaRIS tells.

    Attributes:
        estimate: of E[h(x_{0:t}) | y_{0:t}], of the functional's structure; NaN where no weight is left.
        log_evidence_increment: an estimate of log p(y_t | y_0..y_{t-1}).
        ess: effective sample size of the weights.
        is_resampled: whether the particles were resampled on the way to t.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero.
        num_proposals: indices that backward draws proposed on the way to t, accepted or not; none for "exact".
        num_exact: backward draws on the way to t that looked at all particles; for "reject", those that were not served
            in time.
    """

    estimate: PyTree
    log_evidence_increment: Float[Array, ""]
    ess: Float[Array, ""]
    is_resampled: Bool[Array, ""]
    num_invalid: Int[Array, ""]
    num_proposals: Int[Array, ""]
    num_exact: Int[Array, ""]


class Paris(eqx.Module):
    """PaRIS of data that arrive one at a time: smooths an additive functional in a memory that does not grow.

    After `init` at y_0 and T - 1 steps it stands where `paris` of the whole series with the same key stands.

    Attributes:
        filter: the particle filter; an independent draw of ancestors at every step is the choice of the paper.
        functional: what is smoothed.
        num_backward: M >= 1 backward draws a particle.
        method: how backward draws are made, see `paris`.

    Raises:
        ValueError: a parameter is out of its range.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
        >>> stream = bi.kernels.Paris(model, total, num_particles=100)
        >>> state, info = stream.init(1, ys[0])
        >>> for y in ys[1:]:
        ...     state, info = stream.step(state, y)
        >>> whole = bi.kernels.paris(1, model, ys, total, num_particles=100)
        >>> bool(abs(info.estimate - whole.estimate) < 1e-3)
        True
    """

    filter: ParticleFilter
    functional: AdditiveFunctional
    num_backward: int = eqx.field(static=True)
    method: str = eqx.field(static=True)

    def __init__(
        self,
        model: StateSpaceModel,
        functional: AdditiveFunctional,
        *,
        num_particles: int,
        num_backward: int = 2,
        method: str = "auto",
        proposal: str = "bootstrap",
        resampling: str = "multinomial",
        ess_threshold: Float[Array, ""] | float = 1.0,
        lookahead: bool = False,
    ):
        self.filter = ParticleFilter(
            model,
            num_particles=num_particles,
            proposal=proposal,
            resampling=resampling,
            ess_threshold=ess_threshold,
            lookahead=lookahead,
        )
        self.functional = functional
        self.num_backward = errors.check_count("num_backward", num_backward)
        self.method = method
        errors.check_choice("method", method, BACKWARD_METHODS)
        check_functional(functional)

    def init(self, key: errors.KeyLike, y: PyTree) -> tuple[ParisState, ParisInfo]:
        """The particles and their statistics at t = 0.

        Args:
            key: PRNG key or seed.
            y: the first observation; NaN where missing.

        Returns:
            (state, info).
        """
        ys = check_observations(self.filter.model, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y))
        return begin_paris(current(self), errors.as_key(key), jax.tree.map(lambda leaf: leaf[0], ys))[:2]

    def step(self, state: ParisState, y: PyTree) -> tuple[ParisState, ParisInfo]:
        """The particles and their statistics at the next time.

        Args:
            state: of `init` or `step`.
            y: the next observation, like the first; NaN where missing.

        Returns:
            (state, info).
        """
        keys = paris_keys(state.filter.key, state.filter.t + 1)
        return move_paris_on(current(self), state, keys, as_row(y))[:2]


class ParisResult(NamedTuple):
    """What `paris` returns.

    Attributes:
        estimate: of E[h(x_{0:T-1}) | y_{0:T-1}], of the functional's structure.
        estimates: of E[h(x_{0:t}) | y_{0:t}] for every t; leading axis T.
        log_evidence: log Zhat of the filter; Zhat is unbiased for p(y_{0:T-1}).
        ess: effective sample size of the filter's weights at every t.
        is_resampled: whether the particles were resampled on the way to t.
        num_invalid: how many log weights were NaN or +inf at t; they count as weights of zero.
        num_proposals: indices that backward draws proposed on the way to t, accepted or not; none for "exact".
        num_exact: backward draws on the way to t that looked at all particles; for "reject", those that were not served
            in time.
        particles: the states at T - 1, leading axis N.
        log_weights: their normalised log weights.
    """

    estimate: PyTree
    estimates: PyTree
    log_evidence: Float[Array, ""]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    num_invalid: Int[Array, " t"]
    num_proposals: Int[Array, " t"]
    num_exact: Int[Array, " t"]
    particles: PyTree
    log_weights: Float[Array, " n"]


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
    lookahead: bool = False,
    progress: bool = False,
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
        lookahead: choose ancestors with an eye on y_t, by `model.lookahead`.
        progress: whether to show a bar. The run then comes back to the host now and then, and Ctrl-C returns what there
            is, with a warning; without, it is one compiled call, which Ctrl-C cannot end.
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
    ys = check_observations(model, ys)
    one = Paris(
        model,
        functional,
        num_particles=num_particles,
        num_backward=num_backward,
        method=method,
        proposal=proposal,
        resampling=resampling,
        ess_threshold=ess_threshold,
        lookahead=lookahead,
    )
    run = _run_shown if progress and jax.tree.leaves(ys)[0].shape[0] > 1 else _run
    result = run(current(one), errors.as_key(key), ys)
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


@jax.jit
def _run(self: Paris, key: Key[Array, ""], ys: PyTree) -> ParisResult:
    first, rest = jax.tree.map(lambda leaf: leaf[0], ys), jax.tree.map(lambda leaf: leaf[1:], ys)
    start, info, _ = begin_paris(self, key, first)
    # the keys of all steps are made at once, where that is a single operation
    keys = jax.vmap(partial(paris_keys, start.filter.key))(jnp.arange(1, jax.tree.leaves(ys)[0].shape[0]))
    last, infos = jax.lax.scan(lambda state, row: move_paris_on(self, state, *row)[:2], start, (keys, rest))
    return _gather_up(info, infos, last)


def _run_shown(self: Paris, key: Key[Array, ""], ys: PyTree) -> ParisResult:
    """The same, in chunks."""
    start, info, _ = begin_paris(self, key, jax.tree.map(lambda leaf: leaf[0], ys))
    last, infos = iterate(_follow, (self, ys), start, key, jax.tree.leaves(ys)[0].shape[0] - 1, True, "smoothing")
    return _gather_up(info, infos, last)


def _follow(
    fixed: tuple[Paris, PyTree], state: ParisState, key: Key[Array, ""], t: Int[Array, ""]
) -> tuple[ParisState, ParisInfo]:
    """PaRIS at time t; its keys are made of those of the state."""
    self, ys = fixed
    return move_paris_on(self, state, paris_keys(state.filter.key, t), jax.tree.map(lambda leaf: leaf[t], ys))[:2]


@jax.jit
def _gather_up(info: ParisInfo, infos: ParisInfo, last: ParisState) -> ParisResult:
    """The result, of what is known of time 0 and of the others."""
    infos = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), info, infos)
    estimate = jax.tree.map(lambda leaf: leaf[-1], infos.estimate)
    return ParisResult(
        estimate,
        infos.estimate,
        compensated_sum(infos.log_evidence_increment),
        infos.ess,
        infos.is_resampled,
        infos.num_invalid,
        infos.num_proposals,
        infos.num_exact,
        last.filter.particles,
        last.filter.log_weights,
    )


@jax.jit
def begin_paris(self: Paris, key: Key[Array, ""], y: PyTree) -> tuple[ParisState, ParisInfo, FilterInfo]:
    """`Paris.init`, of arguments that are known to be right, and what the filter tells."""
    check_model(self.filter.model)  # before the functional is asked for its terms at a state of it
    check_terms(self.functional, self.filter.model, y)
    filtered, info = begin(self.filter, key, y)
    cloud = Cloud(filtered.particles, filtered.log_weights)
    state = ParisState(filtered, start_statistics(self.functional, cloud, y))
    zero = jnp.zeros((), jnp.int32)
    return state, _describe(state, info, zero, zero), info


@jax.jit
def move_paris_on(
    self: Paris, state: ParisState, keys: Key[Array, "3"], y: PyTree
) -> tuple[ParisState, ParisInfo, FilterInfo]:
    """`Paris.step`, with the keys of the time that it comes to, and what the filter tells."""
    before = state.filter
    filtered, info = move_on(self.filter, before, keys[:2], y)
    J, costs = draw_counted(
        keys[2],
        self.filter.model,
        before.particles,
        before.log_weights,
        filtered.particles,
        filtered.t,
        info.ancestors,
        self.num_backward,
        self.method,
    )
    cloud_prev, cloud = (Cloud(now.particles, now.log_weights) for now in (before, filtered))
    tau = update_statistics(self.functional, state.statistics, cloud_prev, cloud, J, y, filtered.t)
    state = ParisState(filtered, tau)
    return state, _describe(state, info, *costs), info


def paris_keys(key: Key[Array, ""], t: Int[Array, ""]) -> Key[Array, "3"]:
    """Those of the filter at time t, and what draws backward."""
    key_filter, key_back = jax.random.split(jax.random.fold_in(key, t))
    return jnp.concatenate([jax.random.split(key_filter), key_back[None]])


def _describe(state: ParisState, info: FilterInfo, num_proposals: Array, num_exact: Array) -> ParisInfo:
    estimate = weighted_mean(Cloud(state.filter.particles, state.filter.log_weights), state.statistics)
    return ParisInfo(
        estimate,
        info.log_evidence_increment,
        info.ess,
        info.is_resampled,
        info.num_invalid,
        num_proposals,
        num_exact,
    )
