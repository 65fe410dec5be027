"""Learning a hidden Markov model by expectation and maximisation, from several starts at once.

    E: gamma_t(k) = P(x_t = k | y),  xi_t(i, j) = P(x_t = i, x_{t+1} = j | y)  under the parameters so far
    M: initial ~ gamma_0,  transition_ij ~ sum_t xi_t(i, j),  emission = argmax sum gamma_t(k) log p(y_t | x_t = k)

each with the log density of its prior added. The log posterior density, or the likelihood under flat priors, never goes
down, and ends at a stationary point of it: which one is a matter of the start, hence several.

References:
    Baum, Petrie, Soules and Weiss (1970), doi:10.1214/aoms/1177697196.
    Dempster, Laird and Rubin (1977), doi:10.1111/j.2517-6161.1977.tb01600.x.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayesinf import errors
from bayesinf.models.hmm.emission import ratio
from bayesinf.models.hmm.inputs import each
from bayesinf.models.hmm.observations import Observations, score
from bayesinf.models.hmm.recursion import Method
from bayesinf.models.hmm.statistics import expected_statistics, forward

__all__ = ["HMMFit", "climb_from_starts", "fit", "maximize_chain"]


class HMMFit(NamedTuple):
    """What EM found.

    Attributes:
        model: the best of the starts, as they ended.
        log_evidence: its log p(y), of all series together.
        history: log p(y) plus the log prior before every iteration of this start; NaN after its last.
        num_iterations: how many it took.
        is_converged: whether its last iteration raised that by less than the tolerance.
        objectives: log p(y) plus the log prior where each start ended; starts that found the same optimum agree.
    """

    model: Any
    log_evidence: Float[Array, ""]
    history: Float[Array, " iterations"]
    num_iterations: Int[Array, ""]
    is_converged: Bool[Array, ""]
    objectives: Float[Array, " starts"]


class _Climb(NamedTuple):
    model: Any
    objective: Float[Array, ""]
    history: Float[Array, " iterations"]
    iteration: Int[Array, ""]
    is_done: Bool[Array, ""]
    is_converged: Bool[Array, ""]


def fit(
    key: errors.KeyLike,
    model: Any,
    data: Observations,
    *,
    num_starts: int,
    max_iterations: int,
    tolerance: float,
    method: Method,
    throw: bool,
) -> HMMFit:
    """What `HiddenMarkovModel.fit` does with data that are checked."""
    expect = jax.tree_util.Partial(_expect, method=method)
    return climb_from_starts(
        key,
        model,
        data,
        expect,
        _maximize,
        num_starts=num_starts,
        max_iterations=max_iterations,
        tolerance=tolerance,
        throw=throw,
    )


def climb_from_starts(
    key: errors.KeyLike,
    model: Any,
    data: Observations,
    expect: Callable[[Any, Observations], tuple[Float[Array, ""], Any]],
    maximize: Callable[[Any, Observations, Any, Any], Any],
    *,
    num_starts: int,
    max_iterations: int,
    tolerance: float,
    throw: bool,
) -> HMMFit:
    """EM of any model with an emission and a `log_prior`.

    Args:
        key: a PRNG key or an integer seed.
        model: the first start; the others have emissions guessed from the data.
        data: as `observe` has them.
        expect: expect(model, data) -> (log evidence, statistics). Both functions are compiled in: the same ones at
            every call.
        maximize: maximize(model, data, rows, statistics) -> model; rows are what emissions take, all series together.
        num_starts, max_iterations, tolerance, throw: as of `HiddenMarkovModel.fit`.
    """
    key = errors.as_key(key)
    num_starts = errors.check_count("num_starts", num_starts)
    max_iterations = errors.check_count("max_iterations", max_iterations)
    errors.check_positive("tolerance", tolerance)
    _check_modes(model)
    steps = expect, maximize
    found = _fit(key, model, data._replace(is_single=None), num_starts, max_iterations, jnp.asarray(tolerance), steps)
    if not errors.is_concrete(found.objectives):
        return found
    if not bool(jnp.isfinite(found.log_evidence)):
        if throw:
            raise errors.InitializationError(_why_impossible(model, data, found.log_evidence), found)
        return found
    if not bool(found.is_converged):
        warnings.warn(
            f"EM stopped after {max_iterations} iterations, before the log posterior rose by less than {tolerance}; "
            "raise max_iterations, or take the fit as it is",
            errors.SamplingWarning,
            stacklevel=4,
        )
    return found


def maximize_chain(
    model: Any, data: Observations, rows: Any, smoothed: Float[Array, "b t k"], transitions: Float[Array, "b k k"]
) -> Any:
    """The M-step of the chain and of the emission, which any model with the two has.

    Args:
        model: as it was.
        data: as `observe` has them.
        rows: what emissions take, all series together.
        smoothed: P(x_t = k | y).
        transitions: expected numbers.
    """
    first = jnp.maximum(jnp.sum(smoothed[:, 0], axis=0) + model.initial_prior - 1.0, 0.0)
    moves = jnp.maximum(jnp.sum(transitions, axis=0) + model.transition_prior - 1.0, 0.0)
    moves = jnp.where(model.can_follow, moves, 0.0)
    weights = jnp.where(data.is_seen[..., None], smoothed, 0.0).reshape(-1, smoothed.shape[-1])
    return dataclasses.replace(
        model,
        initial=ratio(first, jnp.sum(first), model.initial),
        transition=ratio(moves, jnp.sum(moves, axis=-1, keepdims=True), model.transition),
        emission=model.emission.maximize(rows[0], weights, rows[2]),
    )


@eqx.filter_jit
def _fit(key, model, data, num_starts, max_iterations, tolerance, steps):
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (data.ys, data.is_seen, data.features))

    def start(key: Array) -> Any:
        return dataclasses.replace(model, emission=model.emission.guess(key, rows[0], rows[1], rows[2]))

    starts = jax.tree.map(lambda leaf: leaf[None], eqx.filter(model, eqx.is_array))
    if num_starts > 1:
        guessed = eqx.filter(jax.vmap(start)(jax.random.split(key, num_starts - 1)), eqx.is_array)
        starts = jax.tree.map(lambda own, other: jnp.concatenate([own, other.astype(own.dtype)]), starts, guessed)
    static = eqx.filter(model, eqx.is_array, inverse=True)

    def climb(arrays: Any) -> tuple[Any, ...]:
        end = _climb(eqx.combine(arrays, static), data, rows, max_iterations, tolerance, steps)
        log_evidence = steps[0](end.model, data)[0]
        return eqx.filter(end.model, eqx.is_array), log_evidence, log_evidence + end.model.log_prior(), end[2:]

    ends, log_evidences, objectives, rest = each(climb, starts)
    best = jnp.argmax(jnp.where(jnp.isnan(objectives), -jnp.inf, objectives))
    chosen = jax.tree.map(lambda leaf: leaf[best], (ends, log_evidences, rest))
    history, num_iterations, _, is_converged = chosen[2]
    return HMMFit(eqx.combine(chosen[0], static), chosen[1], history, num_iterations, is_converged, objectives)


def _climb(model, data, rows, max_iterations, tolerance, steps) -> _Climb:
    expect, maximize = steps
    static = eqx.filter(model, eqx.is_array, inverse=True)

    def body(climb: _Climb) -> _Climb:
        model = eqx.combine(climb.model, static)
        log_evidence, statistics = expect(model, data)
        objective = log_evidence + model.log_prior()
        gain = objective - climb.objective
        rounding = 4 * jnp.finfo(objective.dtype).eps * jnp.abs(objective)
        is_converged = (gain <= jnp.maximum(tolerance, rounding)) & jnp.isfinite(objective)
        # NaN, or data that are impossible: nothing to learn from
        is_done = is_converged | ~jnp.isfinite(objective)
        better = eqx.filter(maximize(model, data, rows, statistics), eqx.is_array)
        return _Climb(
            jax.tree.map(lambda old, new: jnp.where(is_done, old, new.astype(old.dtype)), climb.model, better),
            objective,
            climb.history.at[climb.iteration].set(objective),
            climb.iteration + 1,
            is_done,
            is_converged,
        )

    dtype = jnp.result_type(model.initial, data.ys)
    history = jnp.full(max_iterations, jnp.nan, dtype)
    begin = _Climb(
        eqx.filter(model, eqx.is_array),
        jnp.asarray(-jnp.inf, dtype),
        history,
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
        jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(lambda climb: ~climb.is_done & (climb.iteration < max_iterations), body, begin)
    return end._replace(model=eqx.combine(end.model, static))


def _expect(model, data, *, method: Method) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    log_lik = score(model.emission, data)
    is_real = jnp.arange(log_lik.shape[1]) < data.lengths[:, None]

    def one(log_lik: Array, is_real: Array) -> tuple[Array, Array, Array]:
        passed = forward(model.log_initial, model.log_transition, log_lik, is_real, method)
        statistics = expected_statistics(passed, model.log_transition, log_lik, is_real, method)
        return passed.log_evidence, jnp.exp(statistics.log_smoothed), statistics.transitions

    log_evidence, smoothed, transitions = each(one, log_lik, is_real)
    return jnp.sum(log_evidence), (smoothed, transitions)


def _maximize(model, data, rows, statistics) -> Any:
    return maximize_chain(model, data, rows, *statistics)


def _check_modes(model) -> None:
    """Refuses priors whose density is unbounded where a probability is zero: there is no largest to climb to."""
    named = {"initial_prior": model.initial_prior}
    named["transition_prior"] = jnp.where(model.can_follow, model.transition_prior, 1.0)
    parts = {"emission": model.emission, "emission.components": getattr(model.emission, "components", None)}
    parts["duration"] = getattr(model, "duration", None)
    for part, law in parts.items():
        prior = getattr(law, "prior", None)
        # a tuple is of several parameters: that of a Gamma law has a shape, others have nothing of the kind
        values, field = (getattr(prior, "shape", None), ".shape") if isinstance(prior, tuple) else (prior, "")
        if values is not None:
            named[f"{part}.prior{field}"] = values
    for name, values in named.items():
        if errors.is_concrete(values) and np.any(np.asarray(values) < 1.0):
            raise ValueError(
                f"{name} must be at least 1 for fit, got {np.min(np.asarray(values)):g}: below, the posterior density "
                "is unbounded where a parameter is zero; raise it, or sample with HMMGibbs or the model's target"
            )


def _why_impossible(model, data: Observations, log_evidence: Array) -> str:
    is_impossible = np.asarray(jnp.all(score(model.emission, data) == -jnp.inf, axis=-1))
    name = type(model.emission).__name__
    if np.any(is_impossible):
        where = [tuple(map(int, index)) for index in np.argwhere(is_impossible)[:5]]
        values = [np.asarray(data.ys)[index].tolist() for index in where]
        return f"ys must be possible in one state of {name} at least; at (series, step) {where} are {values}"
    return (
        f"no start of EM has a finite log evidence, the best has {float(log_evidence)}: no path of states explains ys"
    )
