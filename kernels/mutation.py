"""Resample and move: how a weighted population becomes one of equal weights on the same target.

    standard      N parents are drawn from the N weighted particles; each makes `num_moves` moves, and its last is kept
    waste-free    N / P parents are drawn, P = num_moves + 1; each makes P - 1 moves, and all N positions are kept

by any kernel that leaves the target invariant (an unadjusted one biases all that follows).

Number of moves. "auto" moves until the particles have forgotten their parents: until the correlation over the
population between where a particle is and where it started is below 1/4 in every component, at most `max_moves` times.

Step size. After every move h becomes h exp(2 (mean acceptance - target acceptance)), for kernels that have a
`target_acceptance`: 2 is a bit more than the inverse slope of acceptance against log h, so that h settles in a few
moves, and follows the targets as they narrow. The mean is over the whole population.

Metric. A kernel that has one, such as `Precondition`, HMC and NUTS, moves by the variances S_ii of the particles that
it starts from, or with tune="dense" by their covariance, whose correlations are shrunk by n / (n + 5), so that it is
regular for few particles too.

These choices look at the particles, which costs a bias of the order of 1 / N. With a fixed number of moves and
`tune=False` evidence estimates are unbiased for every N.

References:
    Gilks and Berzuini (2001), doi:10.1111/1467-9868.00280 (resample-move).
    Dau and Chopin (2022), doi:10.1111/rssb.12475 (waste-free).
    Beskos, Jasra, Kantas and Thiery (2016), doi:10.1214/15-AAP1113 (adaptive SMC is consistent).
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf import errors, weights
from bayesinf.adaptation import has_metric
from bayesinf.captured import captured
from bayesinf.kernel import Kernel, refreshed
from bayesinf.kernels.foreign import as_kernel
from bayesinf.kernels.lineage import Lineage, descend
from bayesinf.kernels.parts import check_untied
from bayesinf.resampling import SCHEMES, gather, resample
from bayesinf.target import Target

__all__ = ["Moves", "Mutation", "as_mutation", "each", "equal_weights"]

CORRELATION = 0.25
GAIN = 2.0


class Moves(NamedTuple):
    """What was done to a population.

    Attributes:
        step_size: the one to use next; None where none is tuned.
        acceptance_rate: mean over particles and moves.
        num_moves: of every particle.
        num_gradients: of all particles together.
    """

    step_size: Float[Array, ""] | None
    acceptance_rate: Float[Array, ""]
    num_moves: Int[Array, ""]
    num_gradients: Int[Array, ""]


class Mutation(eqx.Module):
    """Resampling and moves; see the module.

    Attributes:
        kernel: what moves a particle, to be rebound; None if there is only a factory.
        factory: `factory(target) -> kernel`, for kernels that cannot be rebound. Static, as are all that follow.
        num_moves: moves of a particle; None for as many as it takes.
        max_moves: the most that it may take.
        waste_free: whether all positions are kept.
        tune: whether the step size and the metric are tuned; "dense" for a metric with correlations.
        resampling: the scheme.
        batch_size: particles moved at once; None for all.
    """

    kernel: Any
    factory: Callable[..., Any] | None = eqx.field(static=True, converter=captured)
    num_moves: int | None = eqx.field(static=True)
    max_moves: int = eqx.field(static=True)
    waste_free: bool = eqx.field(static=True)
    tune: bool | str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    @property
    def chain_length(self) -> int:
        """P: how many particles in a row share a parent."""
        return self.num_moves + 1 if self.waste_free else 1  # type: ignore[operator]

    @property
    def step_size(self) -> Float[Array, ""] | None:
        """Where the tuning begins; None where there is nothing to tune."""
        if not self.tune or getattr(self.kernel, "target_acceptance", None) is None:
            return None
        return jax.lax.convert_element_type(self.kernel.step_size, jnp.result_type(self.kernel.step_size))

    def bind(self, target: Target, step_size: Float[Array, ""] | None, metric: Float[Array, "..."] | None) -> Any:
        """The kernel on a target."""
        if self.kernel is None:
            return as_kernel(self.factory(target))  # type: ignore[misc]
        kernel = self.kernel.with_target(target)
        kernel = kernel if step_size is None else kernel.with_step_size(step_size)
        return kernel if metric is None else kernel.with_metric(metric)

    def metric(self, positions: PyTree) -> Float[Array, "..."] | None:
        """The variances of a population, or with tune="dense" its covariance; None where there is no metric to tune."""
        if not self.tune or self.kernel is None or not has_metric(self.kernel):
            return None
        flat = jax.vmap(lambda position: ravel_pytree(position)[0])(positions)
        variances = jnp.var(flat, axis=0)
        is_flat = ~((variances > 0) & jnp.isfinite(variances))  # in one coordinate all particles are the same
        variances = jnp.where(is_flat, 1.0, variances)
        if self.tune != "dense":
            return variances
        num, dim = flat.shape
        covariance = jnp.where(is_flat | is_flat[:, None], 0.0, jnp.cov(flat, rowvar=False, bias=True))
        least = 10 * dim * float(jnp.finfo(flat.dtype).eps)  # what a Cholesky factor needs
        shrinkage = max(5 / (num + 5), least)
        shrunk = (1 - shrinkage) * covariance.reshape(dim, dim)
        return jnp.fill_diagonal(shrunk, variances, inplace=False)

    def renew(
        self,
        key: Key[Array, ""],
        target: Target,
        positions: PyTree,
        log_weights: Float[Array, " n"],
        lineage: Lineage,
        step_size: Float[Array, ""] | None,
    ) -> tuple[PyTree, Lineage, Moves]:
        """Resamples the particles by their normalised log weights, and moves them on the target."""
        key_resample, key_move = jax.random.split(key)
        num_parents = log_weights.shape[0] // self.chain_length
        parents = resample(key_resample, log_weights, num_parents, self.resampling)
        lineage = descend(lineage, parents // self.chain_length, self.resampling)
        positions, moves = self._move(key_move, target, gather(positions, parents), step_size)
        return positions, lineage, moves

    def by_chain(self, log_weights: Float[Array, " n"]) -> Float[Array, " m"]:
        """The log of the total weight of the particles that share a parent."""
        if self.chain_length == 1:
            return log_weights
        return jax.nn.logsumexp(jnp.reshape(log_weights, (-1, self.chain_length)), axis=1)

    def _move(self, key: Key[Array, ""], target: Target, start: PyTree, step_size: Any) -> tuple[PyTree, Moves]:
        num = jax.tree.leaves(start)[0].shape[0]
        metric = self.metric(start)
        kernel = self.bind(target, step_size, metric)
        states = each(kernel.init, self.batch_size, start)
        key_refresh, key = jax.random.split(key)
        keys = jax.random.split(key_refresh, num)
        states = each(lambda key, state: refreshed(kernel, key, state), self.batch_size, keys, states)
        num_starting = num if getattr(getattr(states, "evaluation", None), "grad", None) is not None else 0

        def move(k: Array, carry: tuple[Any, Moves]) -> tuple[Any, Moves]:
            states, moves = carry
            kernel = self.bind(target, moves.step_size, metric)
            keys = jax.random.split(jax.random.fold_in(key, k), num)
            states, infos = each(kernel.step, self.batch_size, keys, states)
            rate = jnp.mean(infos.acceptance_rate).astype(moves.acceptance_rate.dtype)
            h = moves.step_size
            if h is not None:
                scale = jnp.exp(GAIN * (rate - kernel.target_acceptance))
                h = h * jnp.where(jnp.isfinite(scale), scale, 1.0).astype(h.dtype)
            num_gradients = moves.num_gradients + jnp.sum(infos.num_gradients, dtype=jnp.int32)
            return states, Moves(h, moves.acceptance_rate + rate, moves.num_moves + 1, num_gradients)

        zero = jnp.zeros((), jnp.int32)
        carry = states, Moves(step_size, jnp.zeros(()), zero, jnp.asarray(num_starting, jnp.int32))
        if self.waste_free:

            def move_and_keep(carry: tuple[Any, Moves], k: Array) -> tuple[tuple[Any, Moves], PyTree]:
                carry = move(k, carry)
                return carry, carry[0].position

            (_, moves), path = jax.lax.scan(move_and_keep, carry, jnp.arange(self.num_moves))
            # a parent and its moves side by side: particle i has parent number i // P
            positions = jax.tree.map(
                lambda first, rest: jnp.swapaxes(jnp.concatenate([first[None], rest]), 0, 1).reshape(
                    -1, *first.shape[1:]
                ),
                start,
                path,
            )
        else:

            def goes_on(carry: tuple[Any, Moves]) -> Array:
                states, moves = carry
                if self.num_moves is not None:
                    return moves.num_moves < self.num_moves
                is_near = largest_correlation(start, states.position) > CORRELATION
                return (moves.num_moves == 0) | (is_near & (moves.num_moves < self.max_moves))

            states, moves = jax.lax.while_loop(goes_on, lambda carry: move(carry[1].num_moves, carry), carry)
            positions = states.position
        return positions, moves._replace(acceptance_rate=moves.acceptance_rate / moves.num_moves)


def equal_weights(log_weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Normalised log weights after a resampling; where all weights are zero they stay so, or it would not show."""
    log_weight = jnp.where(weights.is_degenerate(log_weights), -jnp.inf, -jnp.log(log_weights.shape[0]))
    return jnp.full_like(log_weights, log_weight)


def each(function: Callable[..., Any], batch_size: int | None, *args: PyTree) -> Any:
    """The function of every row of its arguments, `batch_size` rows at once."""
    if batch_size is None:
        return jax.vmap(function)(*args)
    return jax.lax.map(lambda row: function(*row), args, batch_size=batch_size)


def largest_correlation(before: PyTree, after: PyTree) -> Float[Array, ""]:
    """Over components, the largest correlation between two populations; 1 for a component that does not vary."""

    def one(x: Array, y: Array) -> Array:
        x, y = x - jnp.mean(x, axis=0), y - jnp.mean(y, axis=0)
        square = jnp.sum(x**2, axis=0) * jnp.sum(y**2, axis=0)
        is_flat = ~(square > 0)
        return jnp.max(jnp.where(is_flat, 1.0, jnp.sum(x * y, axis=0) / jnp.sqrt(jnp.where(is_flat, 1.0, square))))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(one, before, after))))


def as_mutation(
    mutation: Any,
    target: Target,
    num_particles: int,
    *,
    num_moves: int | str,
    max_moves: int,
    waste_free: bool,
    tune: bool | str,
    resampling: str,
    batch_size: int | None,
) -> Mutation:
    """A Mutation from what the user gave; `target` shows a factory what its kernels will be asked to sample."""
    errors.check_count("num_particles", num_particles, minimum=2)
    errors.check_count("max_moves", max_moves)
    errors.check_choice("resampling", resampling, SCHEMES)
    if batch_size is not None:
        errors.check_count("batch_size", batch_size)
    if not isinstance(tune, bool) and tune != "dense":
        raise ValueError(f"tune must be True, False or 'dense', got {tune!r}")
    if num_moves == "auto":
        if waste_free:
            raise ValueError("num_moves must be a number for waste_free=True, which keeps every move; got 'auto'")
    elif isinstance(num_moves, str):
        raise ValueError(f"num_moves must be a number or 'auto', got {num_moves!r}")
    else:
        errors.check_count("num_moves", num_moves)
        length = num_moves + 1
        if waste_free and (num_particles % length or num_particles // length < 2):
            raise ValueError(
                f"num_particles must be a multiple of num_moves + 1 = {length}, and at least {2 * length}, for "
                f"waste_free=True, got {num_particles}; it keeps num_moves + 1 positions of every chain"
            )
        if waste_free and resampling == "killing":
            raise ValueError("resampling='killing' keeps the number of particles, and waste_free=True does not")

    kernel = mutation if hasattr(mutation, "step") else mutation(target) if callable(mutation) else None
    if not (callable(getattr(kernel, "init", None)) and callable(getattr(kernel, "step", None))):
        raise ValueError(
            "mutation must be a function of a target that returns a kernel, such as "
            f"functools.partial(MALA, step_size=0.1), or a kernel with a target; got {mutation!r}"
        )
    check_untied("mutation", kernel)
    biased = _unadjusted(kernel)
    if biased:
        warnings.warn(
            f"{biased[0]} as a mutation leaves its target invariant only up to a bias of the step size, which the "
            "particles and the evidence inherit; adjust it with Metropolize, or take one that rejects, as MALA",
            errors.SamplingWarning,
            stacklevel=3,
        )
    can_rebind = isinstance(kernel, Kernel) and hasattr(kernel, "target")
    if not can_rebind and mutation is kernel:
        raise ValueError(
            f"mutation must have a target that can be replaced, got {type(kernel).__name__}; pass a function of a "
            "target that returns the kernel"
        )
    if tune == "dense" and not (can_rebind and has_metric(kernel)):
        raise ValueError(
            f"tune='dense' needs a kernel with a metric, and {type(kernel).__name__} has none; wrap it in "
            "kernels.Precondition"
        )
    return Mutation(
        kernel=kernel.with_target(target) if can_rebind else None,  # type: ignore[union-attr]
        factory=None if can_rebind else mutation,
        num_moves=None if num_moves == "auto" else int(num_moves),
        max_moves=max_moves,
        waste_free=waste_free,
        tune=tune,
        resampling=resampling,
        batch_size=batch_size,
    )


def _unadjusted(part: Any) -> list[str]:
    """The names of the kernels in `part`, itself or inside of it, that no Metropolis test corrects."""
    if isinstance(part, Kernel):
        if part.is_exact:
            return []
        inside = _unadjusted([getattr(part, field.name) for field in dataclasses.fields(part)])
        return inside or [type(part).__name__]
    if isinstance(part, Mapping):
        part = list(part.values())
    return [name for one in part for name in _unadjusted(one)] if isinstance(part, list | tuple) else []
