"""The Lorenz models against their formulas written out, and what their flows conserve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models import lorenz63, lorenz96
from bayesinf.models.lorenz import Lorenz63Field, Lorenz96Field, RungeKutta
from bayesinf.models.state_space import log_prob, observation_log_prob

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
T1 = jnp.asarray(1)


def classical_step(field, x, h):
    k1 = field(x)
    k2 = field(x + h * k1 / 2)
    k3 = field(x + h * k2 / 2)
    k4 = field(x + h * k3)
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


def field_96(x, forcing=8.0):
    d = len(x)
    return np.array([(x[(i + 1) % d] - x[i - 2]) * x[i - 1] - x[i] + forcing for i in range(d)])


def field_63(x, sigma=10.0, rho=28.0, beta=8 / 3):
    return np.array([sigma * (x[1] - x[0]), x[0] * (rho - x[2]) - x[1], x[0] * x[1] - beta * x[2]])


X_96, X_63 = np.array([1.0, -2.0, 5.0, 7.5, 0.3]), np.array([1.5, -2.0, 23.0])


@pytest.mark.parametrize(
    ("model", "field", "x", "h", "num"),
    [(lorenz96(5, num_substeps=2), field_96, X_96, 0.05, 2), (lorenz63(), field_63, X_63, 0.01, 10)],
)
def test_drifts_are_runge_kutta_steps_of_the_written_out_fields(model, field, x, h, num):
    expected = x
    for _ in range(num):
        expected = classical_step(field, expected, h)
    np.testing.assert_allclose(model.drift(jnp.asarray(x), T1), expected, rtol=10 * RTOL)


def test_what_the_fields_conserve():
    """Advection in the model of 1996 keeps energy, and the constant state F is a fixed point; so are those of 1963."""
    x = jnp.asarray(X_96)
    field = Lorenz96Field(0.0)
    np.testing.assert_allclose(jnp.dot(x, field(x)), -jnp.dot(x, x), rtol=RTOL)
    np.testing.assert_allclose(RungeKutta(Lorenz96Field(8.0), 0.05)(jnp.full(7, 8.0), T1), 8.0)
    side = np.sqrt(8 / 3 * 27)
    np.testing.assert_allclose(Lorenz63Field(10.0, 28.0, 8 / 3)(jnp.array([side, side, 27.0])), 0.0, atol=100 * RTOL)


def test_observed_are_every_kth_place_or_what_is_asked_for():
    model = lorenz96(7, observe_every=3, transition_scale=0.2, observation_scale=0.5, initial_scale=2.0)
    np.testing.assert_array_equal(model.observation(jnp.arange(7.0), T1).mean, [0.0, 3.0, 6.0])
    np.testing.assert_array_equal(model.initial_mean, np.full(7, 8.0))
    for tril, scale in ((model.transition_tril, 0.2), (model.observation_tril, 0.5), (model.initial_tril, 2.0)):
        np.testing.assert_allclose(tril, scale * np.eye(len(tril)))
    model = lorenz63(observation_matrix=jnp.array([[0.0, 1.0, -1.0]]), initial_mean=jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(model.observation(model.initial_mean, T1).mean, [-1.0])


def test_proposals_are_the_optimal_ones():
    model, x_prev = lorenz96(5, observation_scale=0.4, transition_scale=0.5), jnp.asarray(X_96)
    x = model.drift(x_prev, T1) + jnp.array([0.3, -0.2, 0.5, 0.1, -0.9])

    @jax.jit
    def both(y):
        found = log_prob(model.proposal(x_prev, y, T1), x) + model.lookahead(x_prev, y, T1)
        return found, log_prob(model.transition(x_prev, T1), x) + observation_log_prob(model, x, y, T1)

    for middle in (-0.3, jnp.nan):
        found, expected = both(x[::2] + jnp.array([0.1, middle, 0.2]))
        np.testing.assert_allclose(found, expected, rtol=10 * RTOL)


def test_parameters_can_be_learnt():
    """The gradient with respect to the forcing: by the field's linearity, exp(-t) damps a small disturbance of F."""

    def moved(forcing):
        return lorenz96(5, forcing, initial_mean=0.0).drift(jnp.zeros(5), T1)[0]

    # from rest all places move alike, x' = F - x: one step of order 4 of it
    h = 0.05
    np.testing.assert_allclose(jax.grad(moved)(8.0), h - h**2 / 2 + h**3 / 6 - h**4 / 24, rtol=10 * RTOL)

    def density(parameters):
        return log_prob(lorenz63(*parameters).transition(jnp.asarray(X_63), T1), jnp.asarray(X_63))

    scores = jax.jit(jax.grad(density))((10.0, 28.0, 8 / 3))
    assert all(jnp.isfinite(score) and score != 0 for score in scores)


def test_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match="num_states must be at least 4, got 3"):
        lorenz96(3)
    with pytest.raises(ValueError, match="observe_every must be at least 1"):
        lorenz96(observe_every=0)
    with pytest.raises(ValueError, match="num_substeps must be at least 1"):
        lorenz63(num_substeps=0)
    with pytest.raises(ValueError, match="step_size must be finite and positive"):
        lorenz96(step_size=-0.1)
    with pytest.raises(ValueError, match="transition_scale must be finite and positive"):
        lorenz96(transition_scale=0.0)
    with pytest.raises(ValueError, match=r"initial_mean must be a scalar or have shape \(5,\), got \(4,\)"):
        lorenz96(5, initial_mean=jnp.zeros(4))
