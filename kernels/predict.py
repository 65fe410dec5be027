"""Forecasts from a filter: what comes after the last observation, drawn from its particles.

    x_{T-1} ~ sum_i W_{T-1}^i delta(X_{T-1}^i),    x_t ~ p(x_t | x_{t-1}),    y_t ~ p(y_t | x_t),    t = T, T + 1, ...

References:
    Chopin and Papaspiliopoulos (2020), doi:10.1007/978-3-030-47845-2, chapter 10.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from bayesinf import errors, resampling
from bayesinf.kernels.filter_steps import check_single
from bayesinf.kernels.online_filter import FilterState
from bayesinf.kernels.paris import ParisResult, ParisState
from bayesinf.kernels.particle_filter import FilterResult
from bayesinf.models.state_space import StateSpaceModel, sample

__all__ = ["Forecast", "predict"]


class Forecast(NamedTuple):
    """Draws of what is to come, equally weighted; leading axes (draws, horizon).

    Attributes:
        states: x_T, ..., x_{T + horizon - 1}.
        observations: y_T, ..., y_{T + horizon - 1}.
    """

    states: PyTree
    observations: PyTree


def predict(
    key: errors.KeyLike,
    model: StateSpaceModel,
    filtered: FilterResult | FilterState | ParisResult | ParisState,
    horizon: int,
    *,
    num_draws: int | None = None,
) -> Forecast:
    """Draws future states and observations, given all that the filter has seen.

    Args:
        key: PRNG key or seed.
        model: the model that was filtered; inputs of its laws must reach as far as the horizon.
        filtered: of `particle_filter` or `paris`, or the state of a `ParticleFilter` or `Paris`.
        horizon: how many steps, at least 1.
        num_draws: how many draws; as many as particles by default.

    Returns:
        A Forecast; quantiles of its observations over the draws are predictive intervals.

    Raises:
        ValueError: `horizon` or `num_draws` is no whole number of at least 1, `filtered` is a batch of filters, or an
            observation law has no sampler.
        DegenerateWeightsError: the filter lost all its weights (not while traced).

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=50)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=500)
        >>> forecast = bi.kernels.predict(2, model, filtered, horizon=10)
        >>> jnp.quantile(forecast.observations, jnp.array([0.05, 0.95]), axis=0).shape
        (2, 10, 1)

    References:
        Chopin and Papaspiliopoulos (2020), doi:10.1007/978-3-030-47845-2.
    """
    errors.check_count("horizon", horizon)
    if isinstance(filtered, ParisState):
        filtered = filtered.filter
    if isinstance(filtered, FilterState):
        last = filtered.t
    elif isinstance(filtered, FilterResult | ParisResult):
        last = jnp.asarray(filtered.ess.shape[0] - 1)
    else:
        raise ValueError(
            "filtered must be of particle_filter or paris, or the state of ParticleFilter or Paris, got "
            f"{type(filtered).__name__}"
        )
    check_single(filtered)
    if num_draws is None:
        num_draws = filtered.log_weights.shape[0]
    errors.check_count("num_draws", num_draws)
    if errors.is_concrete(filtered.log_weights) and np.all(np.isneginf(np.asarray(filtered.log_weights))):
        raise errors.DegenerateWeightsError(
            "The filter lost all its weights: there is nothing to predict from.", filtered
        )
    particles, log_weights = filtered.particles, filtered.log_weights
    return _predict(errors.as_key(key), model, particles, log_weights, last, horizon, num_draws)


@partial(jax.jit, static_argnums=(5, 6))
def _predict(
    key: Array, model: StateSpaceModel, particles: PyTree, log_weights: Array, last: Int[Array, ""], horizon, num_draws
) -> Forecast:
    key_choose, key_draws = jax.random.split(key)
    start = resampling.gather(particles, resampling.resample(key_choose, log_weights, num_draws, "systematic"))

    def draw(key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
        def step(x_prev, t):
            key_move, key_observe = jax.random.split(jax.random.fold_in(key, t))
            x = sample(key_move, model.transition(x_prev, t))
            x = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), x, x_prev)
            return x, (x, sample(key_observe, model.observation(x, t)))

        return jax.lax.scan(step, x, last + 1 + jnp.arange(horizon))[1]

    return Forecast(*jax.vmap(draw)(jax.random.split(key_draws, num_draws), start))
