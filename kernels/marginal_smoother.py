"""Forward filtering, backward smoothing: weights of the filter's particles under the law given all data.

    W_{T-1|T-1}^i = W_{T-1}^i
    W_{t|T-1}^i = W_t^i sum_j W_{t+1|T-1}^j  m_{t+1}(X_t^i, X_{t+1}^j) / sum_l W_t^l m_{t+1}(X_t^l, X_{t+1}^j)

No random number enters: it is the mean, over all paths that backward sampling could draw, of what they say of each t.

References:
    Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bayesinf import weights
from bayesinf.kernels.genealogy import history_of
from bayesinf.kernels.particle_filter import FilterResult, History
from bayesinf.models.state_space import StateSpaceModel, log_prob

__all__ = ["marginal_smoother"]

_TILE = 2**20  # densities held in memory at once


def marginal_smoother(model: StateSpaceModel, filtered: FilterResult) -> Float[Array, "t n"]:
    """Log weights of the stored particles under the law of x_t given all data, for every t.

    At N^2 densities a time step; N x N of them are never held.

    Args:
        model: the model that was filtered.
        filtered: of `particle_filter(..., store="full")`; or "window", for the last steps alone.

    Returns:
        Normalised log weights of `filtered.history.particles`, shape (T, N). A particle that nothing at t + 1 could
        have come from has weight zero; -inf throughout where the filter lost all its weights.

    Raises:
        ValueError: `filtered` is a batch of filters, or did not store its history.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=30)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=300, store="full")
        >>> log_weights = bi.kernels.marginal_smoother(model, filtered)
        >>> means = jnp.einsum("tn,tnd->td", jnp.exp(log_weights), filtered.history.particles)
        >>> means.shape
        (30, 1)

    References:
        Doucet, Godsill and Andrieu (2000), doi:10.1023/A:1008935410038.
    """
    return _smooth(model, history_of(filtered, is_whole=False), filtered.ess.shape[-1])


@partial(jax.jit, static_argnums=2)
def _smooth(model: StateSpaceModel, history: History, num_steps: int) -> Array:
    particles, log_weights, _ = history
    num_stored, num = log_weights.shape
    batch_size = max(1, min(num, _TILE // num))

    def step(log_later, now):
        x_now, x_later, log_now, t = now

        def density(x: PyTree, x_next: PyTree) -> Array:
            return log_prob(model.transition(x, t), x_next)

        def log_total(x_next: PyTree) -> Array:
            """Log sum_l W_t^l m(X_t^l, x)."""
            return jax.nn.logsumexp(weights.clean(log_now + jax.vmap(density, (0, None))(x_now, x_next)))

        # what could have come from nowhere passes its weight on to nobody
        log_totals = jax.lax.map(log_total, x_later, batch_size=batch_size)
        log_shares = jnp.where(jnp.isfinite(log_totals), log_later - log_totals, -jnp.inf)

        def log_passed(x: PyTree) -> Array:
            return jax.nn.logsumexp(weights.clean(log_shares + jax.vmap(density, (None, 0))(x, x_later)))

        log_smoothed, _ = weights.normalize(log_now + jax.lax.map(log_passed, x_now, batch_size=batch_size))
        return log_smoothed, log_smoothed

    before, after = (
        jax.tree.map(lambda leaf, part=part: leaf[part], particles) for part in (slice(-1), slice(1, None))
    )
    steps = (before, after, log_weights[:-1], jnp.arange(num_steps - num_stored + 1, num_steps))
    _, smoothed = jax.lax.scan(step, log_weights[-1], steps, reverse=True)
    return jnp.concatenate([smoothed, log_weights[-1:]])
