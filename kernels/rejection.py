"""Backward draws by rejection: proposals from the weights, accepted by the transition density over its bound.

    J ~ Cat(W_{t-1}),   accepted with probability m_t(X_{t-1}^J, x) / sup_l m_t(X_{t-1}^l, x')

has the backward law of x whatever the bound, and asks for one density a proposal instead of N. How many proposals a
draw needs has a heavy tail: all that are not yet accepted propose in every round together, and as soon as few are left
they are gathered into a smaller batch; who is not served after some rounds is drawn from the categorical law itself. So
the cost is bounded, and the law is exact.

The bound is the highest peak of the transition laws from the N particles where these are of a location family (Normal,
Student's t, Laplace, Cauchy, logistic, with independent components or multivariate), else the model's
`log_transition_bound`. Should a density exceed it, all draws of that time step are made from the categorical law.

References:
    Douc, Garivier, Moulines and Olsson (2011), doi:10.1214/10-AAP735 (rejection in backward sampling).
    Dau and Chopin (2023), doi:10.1214/23-EJS2173 (why the number of proposals must be bounded).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import resampling
from bayesinf.models.state_space import StateSpaceModel, log_prob

__all__ = ["Counts", "draw_by_rejection", "log_bound"]

_NUM_LEVELS = 3  # batches, each a quarter of the one before; every level is compiled
_SHRINK = 4
_ROUNDS = 32  # of proposals, at each level
_BLOCK = 32  # draws made at once from the categorical law

_LOCATION_FAMILIES = (
    dist.Normal,
    dist.StudentT,
    dist.Laplace,
    dist.Cauchy,
    dist.Logistic,
    dist.MultivariateNormal,
    dist.MultivariateStudentT,
)


class Counts(NamedTuple):
    """What backward draws cost.

    Attributes:
        num_proposals: indices proposed, accepted or not.
        num_exact: draws from the categorical law itself, of N densities each.
    """

    num_proposals: Int[Array, ""]
    num_exact: Int[Array, ""]


class _Progress(NamedTuple):
    indices: Int[Array, " r"]
    is_done: Bool[Array, " r"]
    num_rounds: Int[Array, ""]
    num_proposals: Int[Array, ""]
    excess: Float[Array, ""]


def draw_by_rejection(
    key: Key[Array, ""],
    model: StateSpaceModel,
    particles_prev: PyTree,
    log_weights_prev: Float[Array, " N"],
    particles: PyTree,
    t: Int[Array, ""],
    num_draws: int,
    draw_exact: Callable[[Array, Int[Array, " b"]], Int[Array, " b"]],
) -> tuple[Int[Array, "n m"], Counts]:
    """Independent backward indices, `num_draws` for every particle.

    Args:
        key, model, particles_prev, log_weights_prev, particles, t, num_draws: as for `draw_backward`.
        draw_exact: of keys and numbers of particles, an index for each from its categorical law.

    Raises:
        ValueError: no bound is known.
    """
    num = jax.tree.leaves(particles)[0].shape[0]
    total = num * num_draws
    key_try, key_exact = jax.random.split(key)
    bound = log_bound(model, particles_prev, log_weights_prev, t)
    propose = _proposer(log_weights_prev)

    def one_round(rows: Int[Array, " r"], now: _Progress) -> _Progress:
        """One proposal for each of `rows` that is not done; number `total` stands for none."""
        key_propose, key_accept = jax.random.split(jax.random.fold_in(key_try, now.num_rounds))
        proposed = propose(key_propose, rows.shape[0])
        x_prev, x = resampling.gather(particles_prev, proposed), resampling.gather(particles, rows // num_draws)
        log_m = jax.vmap(lambda x_prev, x: log_prob(model.transition(x_prev, t), x))(x_prev, x)
        is_waiting = ~now.is_done.at[rows].get(mode="fill", fill_value=True)
        u = jax.random.uniform(key_accept, rows.shape, log_m.dtype)
        accepted = jnp.where(is_waiting & (jnp.log(u) < log_m - bound), rows, total)
        return _Progress(
            now.indices.at[accepted].set(proposed, mode="drop"),
            now.is_done.at[accepted].set(True, mode="drop"),
            now.num_rounds + 1,
            now.num_proposals + jnp.sum(is_waiting, dtype=jnp.int32),
            jnp.maximum(now.excess, jnp.max(jnp.where(is_waiting & ~jnp.isnan(log_m), log_m - bound, -jnp.inf))),
        )

    zero = jnp.zeros((), jnp.int32)
    now = _Progress(
        jnp.zeros(total, jnp.int32), jnp.zeros(total, bool), zero, zero, jnp.full((), -jnp.inf, bound.dtype)
    )
    size = total
    for level in range(_NUM_LEVELS):
        rows = _waiting(now, size)
        enough = 0 if level == _NUM_LEVELS - 1 else size // _SHRINK

        def goes_on(now: _Progress, level: int = level, enough: int = enough) -> Array:
            return (jnp.sum(~now.is_done) > enough) & (now.num_rounds < (level + 1) * _ROUNDS)

        now = jax.lax.while_loop(goes_on, partial(one_round, rows), now)
        size = max(size // _SHRINK, 1)

    # a bound that does not hold has favoured some: no draw that it decided about is kept
    tolerance = 1e-4 * (1 + jnp.abs(bound))  # of log densities in float32
    now = now._replace(is_done=now.is_done & (now.excess <= tolerance))
    num_exact = jnp.sum(~now.is_done, dtype=jnp.int32)

    def serve(now: _Progress) -> _Progress:
        rows = _waiting(now, min(_BLOCK, total))
        keys = jax.vmap(lambda row: jax.random.fold_in(key_exact, row))(rows)
        drawn = draw_exact(keys, jnp.minimum(rows // num_draws, num - 1))
        return now._replace(
            indices=now.indices.at[rows].set(drawn, mode="drop"), is_done=now.is_done.at[rows].set(True, mode="drop")
        )

    served = jax.lax.while_loop(lambda now: ~jnp.all(now.is_done), serve, now)
    return served.indices.reshape(num, num_draws), Counts(now.num_proposals, num_exact)


def log_bound(
    model: StateSpaceModel, particles_prev: PyTree, log_weights_prev: Float[Array, " N"], t: Int[Array, ""]
) -> Float[Array, ""]:
    """Log of what the transition density from any particle of positive weight is at most.

    Raises:
        ValueError: the law is of no location family, and the model has no `log_transition_bound`.
    """
    law = model.transition(jax.tree.map(lambda leaf: leaf[0], particles_prev), t)
    if _location(law) is not None:
        peaks = jax.vmap(lambda x_prev: _log_peak(model.transition(x_prev, t)))(particles_prev)
        return jnp.max(jnp.where(jnp.isfinite(log_weights_prev), peaks, -jnp.inf))
    if not hasattr(model, "log_transition_bound"):
        raise ValueError(
            f"method='reject' needs a method log_transition_bound(t) of the model {type(model).__name__}, the log of "
            "sup m_t(x_prev, x): the peak of its transition law is not known; define it, or take method='exact'"
        )
    return jnp.asarray(model.log_transition_bound(t))  # type: ignore[attr-defined]


def _location(law: Any) -> Any:
    """Where a law of a location family has its peak; None for the others."""
    while isinstance(law, dist.Independent):
        law = law.base_dist
    return law.loc if isinstance(law, _LOCATION_FAMILIES) else None


def _log_peak(law: Any) -> Float[Array, ""]:
    return log_prob(law, jnp.broadcast_to(_location(law), law.shape()))


def _proposer(log_weights: Float[Array, " N"]) -> Callable[[Array, int], Array]:
    """Independent indices from the weights, whose cumulative sum is made once."""
    largest = jnp.max(log_weights)
    masses = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    with jax.enable_x64(True):
        inverse = resampling.inverse64(masses)

    def propose(key: Array, size: int) -> Array:
        with jax.enable_x64(True):
            return inverse(resampling.uniform64(key, (size,)))

    return propose


def _waiting(now: _Progress, size: int) -> Int[Array, " r"]:
    """The numbers of the first `size` draws that are not done; beyond the end where there are fewer."""
    total = now.is_done.shape[0]
    return jnp.nonzero(~now.is_done, size=size, fill_value=total)[0].astype(jnp.int32)
