"""The linear Gaussian model, where everything is known in closed form: the oracle of every approximate method.

    x_0 ~ N(m0, P0),   x_t = A x_{t-1} + b + q_t,  q_t ~ N(0, Q),   y_t = C x_t + d + r_t,  r_t ~ N(0, R)

Covariances are given and kept as Cholesky factors, and filtered by QR decompositions (square-root form). Rows of y that
are NaN, and single components that are NaN, are missing and integrated out exactly. All is differentiable.

References:
    Kalman (1960), doi:10.1115/1.3662552.
    Rauch, Tung and Striebel (1965), doi:10.2514/3.3166.
    Frühwirth-Schnatter (1994), doi:10.1111/j.1467-9892.1994.tb00184.x (backward sampling).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bayesinf import errors, weights
from bayesinf.models.gaussian import as_floating, check_fields, gaussian
from bayesinf.models.parallel_kalman import filter_in_parallel, smooth_in_parallel
from bayesinf.models.square_root import condition, gaussian_log_prob, triangularize, update
from bayesinf.models.state_space import StateSpaceModel, check_series

__all__ = ["KalmanResult", "LinearGaussian", "SmootherResult", "kalman_filter", "rts_smoother", "sample_posterior"]

METHODS = ("sequential", "associative")


class LinearGaussian(StateSpaceModel):
    """Linear dynamics and observations with Gaussian noise; d states, k observations a step.

        x_0 ~ N(m0, P0),   x_t = A x_{t-1} + b + N(0, Q),   y_t = C x_t + d + N(0, R)

    The optional laws of a guided filter are the locally optimal ones: `proposal` is x_t | x_{t-1}, y_t, and `lookahead`
    is log p(y_t | x_{t-1}).

    Attributes:
        initial_mean: m0, shape (d,).
        initial_tril: Cholesky factor of P0, shape (d, d).
        transition_matrix: A, shape (d, d).
        transition_tril: Cholesky factor of Q, shape (d, d).
        observation_matrix: C, shape (k, d).
        observation_tril: Cholesky factor of R, shape (k, k).
        transition_offset: b, shape (d,) or a scalar.
        observation_offset: d, shape (k,) or a scalar.

    Raises:
        ValueError: shapes do not fit together, values are not finite, or a factor is not lower triangular with a
            diagonal that is not negative.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5, 1.0, 0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=20)
        >>> bi.models.kalman_filter(model, ys).filtered_means.shape
        (20, 1)
    """

    initial_mean: Float[Array, " d"] = eqx.field(converter=as_floating("initial_mean"))
    initial_tril: Float[Array, "d d"] = eqx.field(converter=as_floating("initial_tril"))
    transition_matrix: Float[Array, "d d"] = eqx.field(converter=as_floating("transition_matrix"))
    transition_tril: Float[Array, "d d"] = eqx.field(converter=as_floating("transition_tril"))
    observation_matrix: Float[Array, "k d"] = eqx.field(converter=as_floating("observation_matrix"))
    observation_tril: Float[Array, "k k"] = eqx.field(converter=as_floating("observation_tril"))
    transition_offset: Float[Array, "..."] = eqx.field(default=0.0, converter=as_floating("transition_offset"))
    observation_offset: Float[Array, "..."] = eqx.field(default=0.0, converter=as_floating("observation_offset"))

    def __check_init__(self):
        d, k = self.initial_mean.shape[-1:], self.observation_matrix.shape[-2:-1]
        expected = {
            "initial_mean": (d,),
            "initial_tril": (d + d,),
            "transition_matrix": (d + d,),
            "transition_tril": (d + d,),
            "observation_matrix": (k + d,),
            "observation_tril": (k + k,),
            "transition_offset": (d, ()),
            "observation_offset": (k, ()),
        }
        origin = (
            f"initial_mean of shape {self.initial_mean.shape} and observation_matrix of shape "
            f"{self.observation_matrix.shape}"
        )
        check_fields(self, expected, origin)

    @classmethod
    def scalar(
        cls,
        persistence: Float[Array, ""] | float,
        transition_scale: Float[Array, ""] | float,
        observation_factor: Float[Array, ""] | float = 1.0,
        observation_scale: Float[Array, ""] | float = 1.0,
        initial_mean: Float[Array, ""] | float = 0.0,
        initial_scale: Float[Array, ""] | float | None = None,
    ) -> "LinearGaussian":
        """One state and one observation: x_t = a x_{t-1} + N(0, q^2), y_t = c x_t + N(0, r^2); shapes (1,).

        Args:
            persistence: a.
            transition_scale: q.
            observation_factor: c.
            observation_scale: r.
            initial_mean: mean of x_0.
            initial_scale: standard deviation of x_0; by default the stationary one, q / sqrt(1 - a^2), for |a| < 1.
        """
        if initial_scale is None:
            a = as_floating("persistence")(persistence)
            if errors.is_concrete(a) and not abs(float(a)) < 1:
                raise ValueError(
                    f"persistence must lie in (-1, 1) for a stationary start, got {persistence}; give initial_scale"
                )
            initial_scale = transition_scale / jnp.sqrt(1.0 - a**2)

        def matrix(name: str, value: Any) -> Array:
            return as_floating(name)(value).reshape(1, 1)

        return cls(
            as_floating("initial_mean")(initial_mean).reshape(1),
            matrix("initial_scale", initial_scale),
            matrix("persistence", persistence),
            matrix("transition_scale", transition_scale),
            matrix("observation_factor", observation_factor),
            matrix("observation_scale", observation_scale),
        )

    def initial(self):
        return gaussian(self.initial_mean, self.initial_tril)

    def transition(self, x_prev: Float[Array, " d"], t: Int[Array, ""]):
        return gaussian(self._predict(x_prev), self.transition_tril)

    def observation(self, x: Float[Array, " d"], t: Int[Array, ""]):
        return gaussian(self._observe(x), self.observation_tril)

    def initial_proposal(self, y: Float[Array, " k"]):
        return gaussian(*self._update(self.initial_mean, self.initial_tril, y)[:2])

    def proposal(self, x_prev: Float[Array, " d"], y: Float[Array, " k"], t: Int[Array, ""]):
        return gaussian(*self._update(self._predict(x_prev), self.transition_tril, y)[:2])

    def lookahead(self, x_prev: Float[Array, " d"], y: Float[Array, " k"], t: Int[Array, ""]) -> Float[Array, ""]:
        return self._update(self._predict(x_prev), self.transition_tril, y)[2]

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return gaussian_log_prob(jnp.zeros_like(self.initial_mean), self.transition_tril)

    def _predict(self, x: Array) -> Array:
        return self.transition_matrix @ x + self.transition_offset

    def _observe(self, x: Array) -> Array:
        return self.observation_matrix @ x + self.observation_offset

    def _update(self, mean: Array, tril: Array, y: Array) -> tuple[Array, Array, Array]:
        return update(mean, tril, self.observation_matrix, self.observation_offset, self.observation_tril, y)


class KalmanResult(NamedTuple):
    """What `kalman_filter` finds: Gaussian laws of x_t, their covariances P as factors L with P = L L^T.

    Attributes:
        log_evidence: log p(y_0..y_{T-1}); a scalar.
        log_evidence_increments: log p(y_t | y_0..y_{t-1}), shape (T,); 0 where y_t is missing.
        filtered_means: of x_t given y_0..y_t, shape (T, d).
        filtered_trils: their factors, shape (T, d, d).
        predicted_means: of x_t given y_0..y_{t-1}, shape (T, d); at t = 0 that of x_0.
        predicted_trils: their factors, shape (T, d, d).
    """

    log_evidence: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    filtered_means: Float[Array, "t d"]
    filtered_trils: Float[Array, "t d d"]
    predicted_means: Float[Array, "t d"]
    predicted_trils: Float[Array, "t d d"]


class SmootherResult(NamedTuple):
    """What `rts_smoother` finds: Gaussian laws of x_t, and of neighbours, given all data.

    Attributes:
        means: of x_t, shape (T, d).
        covariances: of x_t, shape (T, d, d).
        cross_covariances: Cov(x_t, x_{t+1}) for t = 0..T-2, shape (T - 1, d, d).
    """

    means: Float[Array, "t d"]
    covariances: Float[Array, "t d d"]
    cross_covariances: Float[Array, "s d d"]


def kalman_filter(model: LinearGaussian, ys: Float[Array, "..."], *, method: str = "sequential") -> KalmanResult:
    """The exact law of x_t given y_0..y_t for every t, and the log evidence.

        S_t = C P_{t|t-1} C^T + R,    K_t = P_{t|t-1} C^T S_t^{-1}
        m_t = m_{t|t-1} + K_t (y_t - C m_{t|t-1} - d),    P_t = P_{t|t-1} - K_t S_t K_t^T
        m_{t+1|t} = A m_t + b,    P_{t+1|t} = A P_t A^T + Q
        log p(y_t | y_0..y_{t-1}) = log N(y_t; C m_{t|t-1} + d, S_t)

    Args:
        model: a linear Gaussian model.
        ys: observations, shape (T, k); NaN components are missing.
        method: "sequential", T steps one after the other; or "associative", O(log T) of them, in which several times
            the work is done in parallel: for accelerators and long series. First derivatives only.

    Returns:
        The filtered and predicted laws, and the log evidence with its increments.

    Raises:
        ValueError: model is no `LinearGaussian`, ys has the wrong shape or infinite entries, or method is neither.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(1.0, 1.0, observation_scale=1.0, initial_scale=1.0)
        >>> filtered = bi.models.kalman_filter(model, jnp.array([[2.0], [jnp.nan]]))  # y_1 is missing
        >>> [round(mean, 3) for mean in filtered.filtered_means[:, 0].tolist()]
        [1.0, 1.0]
        >>> [round(tril**2, 3) for tril in filtered.filtered_trils[:, 0, 0].tolist()]
        [0.5, 1.5]

    References:
        Kalman (1960), doi:10.1115/1.3662552.
        Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316 (in parallel).
    """
    errors.check_choice("method", method, METHODS)
    return _filter(model, _check(model, ys), method)


def rts_smoother(model: LinearGaussian, ys: Float[Array, "..."], *, method: str = "sequential") -> SmootherResult:
    """The exact law of every x_t, and of every pair of neighbours, given all data y.

        G_t = P_t A^T P_{t+1|t}^{-1},    E[x_t | y] = m_t + G_t (E[x_{t+1} | y] - m_{t+1|t})
        Cov(x_t | y) = P_t + G_t (Cov(x_{t+1} | y) - P_{t+1|t}) G_t^T,    Cov(x_t, x_{t+1} | y) = G_t Cov(x_{t+1} | y)

    with the laws of `kalman_filter`. Needs predicted covariances P_{t+1|t} that are not singular.

    Args:
        model: a linear Gaussian model.
        ys: observations, shape (T, k); NaN components are missing.
        method: as of `kalman_filter`.

    Returns:
        Means, covariances, and covariances of neighbours.

    Raises:
        ValueError: as of `kalman_filter`.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(1.0, 1.0, observation_scale=0.01, initial_scale=1.0)
        >>> smoothed = bi.models.rts_smoother(model, jnp.array([[1.0], [jnp.nan], [2.0]]))
        >>> [round(mean, 2) for mean in smoothed.means[:, 0].tolist()]  # what is missing lies in between
        [1.0, 1.5, 2.0]

    References:
        Rauch, Tung and Striebel (1965), doi:10.2514/3.3166.
        Särkkä and García-Fernández (2021), doi:10.1109/TAC.2020.2976316 (in parallel).
    """
    errors.check_choice("method", method, METHODS)
    return _smooth(model, _check(model, ys), method)


def sample_posterior(
    key: errors.KeyLike, model: LinearGaussian, ys: Float[Array, "..."], num_paths: int
) -> Float[Array, "p t d"]:
    """Exact independent draws of x_0..x_{T-1} given all data, by filtering forward and sampling backward.

        x_{T-1} ~ N(m_{T-1}, P_{T-1}),    x_t | x_{t+1} ~ N(m_t + G_t (x_{t+1} - m_{t+1|t}), P_t - G_t P_{t+1|t} G_t^T)

    with m, P of `kalman_filter` and G of `rts_smoother`. Needs predicted covariances that are not singular.

    Args:
        key: PRNG key or seed.
        model: a linear Gaussian model.
        ys: observations, shape (T, k); NaN components are missing.
        num_paths: how many, at least 1.

    Returns:
        Paths of shape (num_paths, T, d).

    Raises:
        ValueError: `num_paths` is no whole number of at least 1; or as of `kalman_filter`.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=20)
        >>> bi.models.sample_posterior(1, model, ys, num_paths=100).shape
        (100, 20, 1)

    References:
        Frühwirth-Schnatter (1994), doi:10.1111/j.1467-9892.1994.tb00184.x.
    """
    errors.check_count("num_paths", num_paths)
    return _sample(errors.as_key(key), model, _check(model, ys), num_paths)


def _check(model: LinearGaussian, ys) -> Array:
    if not isinstance(model, LinearGaussian):
        raise ValueError(f"model must be a LinearGaussian, got {type(model).__name__}")
    ys = check_series(ys)
    k = model.observation_matrix.shape[0]
    if not isinstance(ys, jax.Array) or ys.shape[1:] != (k,):
        shape = jax.tree.map(jnp.shape, ys)
        raise ValueError(f"ys must be one array of shape (T, {k}) to fit observation_matrix, got {shape}")
    return ys


@partial(jax.jit, static_argnums=2)
def _filter(model: LinearGaussian, ys: Array, method: str = "sequential") -> KalmanResult:
    dtype = jnp.result_type(*jax.tree.leaves(model))
    if method == "associative":
        found = filter_in_parallel(model, ys.astype(dtype))
        return KalmanResult(weights.compensated_sum(found[0]), *found)

    def step(predicted, y):
        mean, tril, increment = model._update(*predicted, y)  # type: ignore[call-arg]
        moved = triangularize(jnp.concatenate([model.transition_matrix @ tril, model.transition_tril], axis=1))
        return (model._predict(mean), moved), (increment, mean, tril, *predicted)

    start = (model.initial_mean, triangularize(model.initial_tril))
    _, (increments, *laws) = jax.lax.scan(step, jax.tree.map(lambda leaf: leaf.astype(dtype), start), ys.astype(dtype))
    return KalmanResult(weights.compensated_sum(increments), increments, *laws)


@jax.jit
def _backward(model: LinearGaussian, filtered: KalmanResult) -> tuple[Array, Array]:
    """Of x_t | x_{t+1}, y_0..y_t for t = 0..T-2: the gain on x_{t+1}, and the factor of its covariance."""
    laws = jax.vmap(lambda tril: condition(tril, model.transition_matrix, model.transition_tril))(
        filtered.filtered_trils[:-1]
    )
    return laws.gain, laws.tril


@partial(jax.jit, static_argnums=2)
def _smooth(model: LinearGaussian, ys: Array, method: str) -> SmootherResult:
    filtered = _filter(model, ys, method)
    gains, trils = _backward(model, filtered)
    if method == "associative":
        means, factors = smooth_in_parallel(
            gains, trils, filtered.filtered_means, filtered.predicted_means, filtered.filtered_trils[-1]
        )
        covariances = factors @ factors.mT
        return SmootherResult(means, covariances, gains @ covariances[1:])

    def step(later, now):
        later_mean, later_tril = later
        gain, tril, mean, predicted_mean = now
        mean = mean + gain @ (later_mean - predicted_mean)
        smoothed = triangularize(jnp.concatenate([gain @ later_tril, tril], axis=1))
        return (mean, smoothed), (mean, smoothed, gain @ later_tril @ later_tril.T)

    last = (filtered.filtered_means[-1], filtered.filtered_trils[-1])
    steps = (gains, trils, filtered.filtered_means[:-1], filtered.predicted_means[1:])
    _, (means, trils, crosses) = jax.lax.scan(step, last, steps, reverse=True)
    means, trils = (jnp.concatenate([a, b[None]]) for a, b in zip((means, trils), last, strict=True))
    return SmootherResult(means, trils @ trils.mT, crosses)


@partial(jax.jit, static_argnums=3)
def _sample(key: Array, model: LinearGaussian, ys: Array, num_paths: int) -> Array:
    filtered = _filter(model, ys)
    gains, trils = _backward(model, filtered)
    num_steps, d = filtered.filtered_means.shape
    noise = jax.random.normal(key, (num_steps, num_paths, d), filtered.filtered_means.dtype)

    def step(later, now):
        gain, tril, mean, predicted_mean, noise = now
        x = mean + (later - predicted_mean) @ gain.T + noise @ tril.T
        return x, x

    last = filtered.filtered_means[-1] + noise[-1] @ filtered.filtered_trils[-1].T
    steps = (gains, trils, filtered.filtered_means[:-1], filtered.predicted_means[1:], noise[:-1])
    _, paths = jax.lax.scan(step, last, steps, reverse=True)
    return jnp.swapaxes(jnp.concatenate([paths, last[None]]), 0, 1)
