"""Autoregression of order p observed with noise, as a linear Gaussian model in one of two forms.

    x_t = phi_1 x_{t-1} + ... + phi_p x_{t-p} + N(0, q^2),   y_t = x_t + N(0, r^2),   x stationary

Companion form: the state (x_t, x_{t-1}, ..., x_{t-p+1}) has one new component a step. Block form: the state is of p
consecutive values (x_{ps}, ..., x_{ps+p-1}), all of them new, seen through p observations.

The stationary law of p consecutive values comes from the Levinson-Durbin recursion run backwards,

    kappa_k = a^k_k,   a^{k-1}_i = (a^k_i + kappa_k a^k_{k-i}) / (1 - kappa_k^2),   v_{k-1} = v_k / (1 - kappa_k^2)

from a^p = phi, v_p = q^2 to the laws x_k | x_{k-1}, ..., x_0 ~ N(sum_i a^k_i x_{k-i}, v_k) for k < p. x is stationary
if and only if every partial autocorrelation kappa_k lies in (-1, 1).

References:
    Durbin (1960), doi:10.2307/1401322.
    Barndorff-Nielsen and Schou (1973), doi:10.1016/0047-259X(73)90030-4 (partial autocorrelations and stationarity).
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from bayesinf import errors
from bayesinf.models.gaussian import as_floating
from bayesinf.models.linear_gaussian import LinearGaussian

__all__ = ["FORMS", "autoregression_plus_noise"]

FORMS = ("companion", "blocks")


def autoregression_plus_noise(
    coefficients: Float[Array, " p"],
    scale: Float[Array, ""] | float,
    observation_scale: Float[Array, ""] | float,
    *,
    form: str = "companion",
) -> LinearGaussian:
    """A stationary autoregression of order p, AR(p), observed with noise.

        x_t = phi_1 x_{t-1} + ... + phi_p x_{t-p} + N(0, q^2),   y_t = x_t + N(0, r^2)

    "companion" has the state (x_t, ..., x_{t-p+1}) and observations of shape (T, 1). For p > 1 its transition is
    singular: given x_{t-1} all components but one are known, so that x_t has no density. `kalman_filter`,
    `rts_smoother` and `sample_posterior` need none and are exact (predicted covariances are not singular, as r > 0),
    and bootstrap filters run; but guided filters, and whatever draws backward in time (`backward_sample`, `paris`,
    particle Gibbs), weigh particles by that density. `kalman_filter` has a finite gradient, `rts_smoother` has not.

    "blocks" is the same law of the series with a state of p new values a step, which has a density: every method works
    on it. Observations are of shape (ceil(T / p), p); what the last row lacks is missing:

        ys = jnp.pad(ys, (0, -len(ys) % p), constant_values=jnp.nan).reshape(-1, p)

    Args:
        coefficients: phi, shape (p,), of a stationary process.
        scale: q > 0.
        observation_scale: r > 0.
        form: "companion" or "blocks".

    Returns:
        A `LinearGaussian` of p states, which starts from the stationary law.

    Raises:
        ValueError: an argument is out of its range, or the process is not stationary.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> parameters = jnp.array([1.2, -0.5]), 1.0, 0.3
        >>> model = bi.models.autoregression_plus_noise(*parameters)
        >>> _, ys = bi.models.simulate(0, model, num_steps=100)
        >>> blocks = bi.models.autoregression_plus_noise(*parameters, form="blocks")
        >>> found = [bi.models.kalman_filter(m, y).log_evidence for m, y in [(model, ys), (blocks, ys.reshape(-1, 2))]]
        >>> bool(jnp.isclose(*found))
        True

    References:
        Durbin and Koopman (2012), doi:10.1093/acprof:oso/9780199641178.001.0001, chapter 3.
    """
    errors.check_choice("form", form, FORMS)
    errors.check_positive_scalar("scale", scale)
    errors.check_positive_scalar("observation_scale", observation_scale)
    phi = as_floating("coefficients")(coefficients)
    if phi.ndim != 1 or phi.size == 0:
        raise ValueError(f"coefficients must have shape (p,) with p >= 1, got {phi.shape}")
    p = phi.shape[0]
    # dtype of all that follows, also where the scales are of Python
    q, r = (jnp.asarray(value, jnp.result_type(phi, value)) for value in (scale, observation_scale))
    initial_tril = _stationary_tril(phi, q)
    make = _companion if form == "companion" else _blocks
    transition_matrix, transition_tril = make(phi, q)
    matrix = jnp.eye(p, dtype=phi.dtype)[: 1 if form == "companion" else p]
    return LinearGaussian(
        initial_mean=jnp.zeros_like(phi),
        initial_tril=initial_tril,
        transition_matrix=transition_matrix,
        transition_tril=transition_tril,
        observation_matrix=matrix,
        observation_tril=r * jnp.eye(matrix.shape[0], dtype=phi.dtype),
    )


def _companion(phi: Array, q: Array) -> tuple[Array, Array]:
    p = phi.shape[0]
    shift = jnp.eye(p, k=-1, dtype=phi.dtype)
    return shift.at[0].set(phi), jnp.zeros((p, p), phi.dtype).at[0, 0].set(q)


def _blocks(phi: Array, q: Array) -> tuple[Array, Array]:
    """B X_s = F X_{s-1} + q e, with B of the lags within a block and F of those into the one before."""
    p = phi.shape[0]
    lag = np.arange(p)[:, None] - np.arange(p)
    padded = jnp.concatenate([jnp.zeros(1, phi.dtype), phi, jnp.zeros(p, phi.dtype)])  # by lag, 0 beyond p
    B = jnp.eye(p, dtype=phi.dtype) - padded[np.maximum(lag, 0)]
    F = padded[p + lag]
    identity = jnp.eye(p, dtype=phi.dtype)
    return (
        solve_triangular(B, F, lower=True, unit_diagonal=True),
        q * solve_triangular(B, identity, lower=True, unit_diagonal=True),
    )


def _stationary_tril(phi: Array, q: Array) -> Array:
    """The factor of the covariance of p consecutive values; it is the same in either direction of time."""
    p = phi.shape[0]
    B = jnp.eye(p, dtype=phi.dtype)  # B x = sqrt(v) e, a row for each value given those before it
    a, v, scales, kappas = phi, q**2, [], []
    for k in range(p, 0, -1):
        kappa = a[-1]
        kappas.append(kappa)
        shrink = 1.0 - kappa**2
        a, v = (a[:-1] + kappa * a[:-1][::-1]) / shrink, v / shrink
        scales.append(jnp.sqrt(v))
        B = B.at[k - 1, : k - 1].set(-a[::-1])
    partial = jnp.stack(kappas[::-1])
    if errors.is_concrete(partial) and not np.all(np.abs(np.asarray(partial)) < 1):
        raise ValueError(
            f"coefficients must be those of a stationary autoregression, got {phi}: its partial autocorrelations "
            f"{partial} do not all lie in (-1, 1)"
        )
    return solve_triangular(B, jnp.diag(jnp.stack(scales[::-1])), lower=True, unit_diagonal=True)
