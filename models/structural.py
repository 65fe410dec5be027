"""Structural time series: a level that wanders, with or without a slope that does, as linear Gaussian models.

    local level:         mu_t = mu_{t-1} + N(0, s^2),                 y_t = mu_t + N(0, r^2)
    local linear trend:  mu_t = mu_{t-1} + nu_{t-1} + N(0, s^2),      nu_t = nu_{t-1} + N(0, u^2),   y_t as above

Neither is stationary: the law of the first state must be given. A vague one, of a scale large beside the data, does no
harm: filters are in square-root form.

References:
    Harvey (1990), doi:10.1017/CBO9781107049994.
    Durbin and Koopman (2012), doi:10.1093/acprof:oso/9780199641178.001.0001, chapters 2 and 3.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.linear_gaussian import LinearGaussian

__all__ = ["local_level", "local_linear_trend"]


def local_level(
    level_scale: Float[Array, ""] | float,
    observation_scale: Float[Array, ""] | float,
    *,
    initial_scale: Float[Array, ""] | float,
    initial_mean: Float[Array, ""] | float = 0.0,
) -> LinearGaussian:
    """A random walk plus noise.

        mu_t = mu_{t-1} + N(0, s^2),   y_t = mu_t + N(0, r^2)

    Args:
        level_scale: s > 0.
        observation_scale: r > 0.
        initial_scale: standard deviation of the first level, > 0.
        initial_mean: its mean.

    Returns:
        A `LinearGaussian` of one state.

    Raises:
        ValueError: a scale is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.local_level(0.5, 1.0, initial_scale=100.0)
        >>> smoothed = bi.models.rts_smoother(model, jnp.array([[1.0], [3.0], [2.0]]))
        >>> smoothed.means.shape
        (3, 1)

    References:
        Harvey (1990), doi:10.1017/CBO9781107049994.
    """
    scales = {"level_scale": level_scale, "observation_scale": observation_scale, "initial_scale": initial_scale}
    for name, scale in scales.items():
        errors.check_positive_scalar(name, scale)
    return LinearGaussian.scalar(1.0, level_scale, 1.0, observation_scale, initial_mean, initial_scale)


def local_linear_trend(
    level_scale: Float[Array, ""] | float,
    slope_scale: Float[Array, ""] | float,
    observation_scale: Float[Array, ""] | float,
    *,
    initial_scale: Float[Array, "..."] | float,
    initial_mean: Float[Array, "..."] | float = 0.0,
) -> LinearGaussian:
    """A level with a slope that both wander, plus noise; the state is (mu, nu).

        mu_t = mu_{t-1} + nu_{t-1} + N(0, s^2),   nu_t = nu_{t-1} + N(0, u^2),   y_t = mu_t + N(0, r^2)

    With s = 0 it is the smooth trend. Its transition is singular: the exact filter and smoother need no more than a
    first state that is not, but particle methods other than bootstrap filters weigh by a density that it has not.

    Args:
        level_scale: s >= 0.
        slope_scale: u > 0.
        observation_scale: r > 0.
        initial_scale: standard deviations of the first level and slope, > 0; shape (2,), or one number for both.
        initial_mean: their means, shape (2,), or one number for both.

    Returns:
        A `LinearGaussian` of two states.

    Raises:
        ValueError: a scale is out of its range, or of the wrong shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.local_linear_trend(0.1, 0.1, 0.5, initial_scale=jnp.array([10.0, 1.0]))
        >>> filtered = bi.models.kalman_filter(model, jnp.array([[1.0], [2.0], [3.0], [jnp.nan]]))
        >>> bool(filtered.filtered_means[-1, 0] > 3.5)  # the trend goes on
        True

    References:
        Harvey (1990), doi:10.1017/CBO9781107049994.
    """
    errors.check_positive_scalar("slope_scale", slope_scale)
    errors.check_positive_scalar("observation_scale", observation_scale)
    errors.check_positive("initial_scale", initial_scale)
    s = as_floating("level_scale")(level_scale)
    if s.shape != () or (errors.is_concrete(s) and not 0 <= float(s) < np.inf):
        raise ValueError(f"level_scale must be a scalar, finite and not negative, got {level_scale}")
    first = {}
    for name, value in {"initial_mean": initial_mean, "initial_scale": initial_scale}.items():
        value = as_floating(name)(value)
        if value.shape not in ((), (2,)):
            raise ValueError(f"{name} must be a scalar or have shape (2,), got {value.shape}")
        first[name] = jnp.broadcast_to(value, (2,))
    return LinearGaussian(
        initial_mean=first["initial_mean"],
        initial_tril=jnp.diag(first["initial_scale"]),
        transition_matrix=jnp.array([[1.0, 1.0], [0.0, 1.0]]),
        transition_tril=jnp.diag(jnp.stack([s, jnp.asarray(slope_scale, s.dtype)])),
        observation_matrix=jnp.array([[1.0, 0.0]]),
        observation_tril=jnp.reshape(as_floating("observation_scale")(observation_scale), (1, 1)),
    )
