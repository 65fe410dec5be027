import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import StochasticVolatility
from bayesinf.models.state_space import log_prob, observation_log_prob

T1 = jnp.asarray(1)


@pytest.fixture
def model():
    return StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.5)


HEAVY = StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.5, degrees_of_freedom=3.0)


def test_simulated_series_have_the_moments_of_the_model(model):
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, model, 3)))(
        jax.random.split(jax.random.key(0), 50_000)
    )
    variance = 0.25 / (1 - 0.81)
    assert mean_p_value(xs, -1.0) > FALSE_ALARM
    assert mean_p_value((xs + 1) ** 2, variance) > FALSE_ALARM
    assert mean_p_value((xs[:, 2] + 1) * (xs[:, 1] + 1), 0.9 * variance) > FALSE_ALARM
    # log y^2 = x + log chi^2_1, in which the returns are symmetric
    assert mean_p_value(jnp.log(ys**2) - xs, -1.2703628454614782) > FALSE_ALARM
    assert mean_p_value(jnp.sign(ys), 0.0) > FALSE_ALARM


def test_densities(model):
    x, y = jnp.asarray(0.4), jnp.asarray(-1.3)
    np.testing.assert_allclose(
        observation_log_prob(model, x, y, T1), scipy.stats.norm(0, np.exp(0.2)).logpdf(-1.3), rtol=1e-6
    )
    found = log_prob(model.transition(jnp.asarray(0.2), T1), x)
    np.testing.assert_allclose(found, scipy.stats.norm(-1 + 0.9 * 1.2, 0.5).logpdf(0.4), rtol=1e-5)
    np.testing.assert_allclose(model.log_transition_bound(T1), scipy.stats.norm(0, 0.5).logpdf(0), rtol=1e-6)


@jax.jit
def log_weight(model, x, x_prev, y):
    """Of a guided particle, and of what it is drawn from, m(x | x_prev) g(y | x)."""
    target = log_prob(model.transition(x_prev, T1), x) + observation_log_prob(model, x, y, T1)
    return target - log_prob(model.proposal(x_prev, y, T1), x), target


@pytest.mark.parametrize("nu", [None, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("y", [0.0, 0.01, -0.8, 5.0, -40.0])
def test_guided_proposal_sits_at_the_mode_and_bounds_the_weights(y, nu):
    model = StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.5, degrees_of_freedom=nu)
    x_prev, y = jnp.asarray(-1.5), jnp.asarray(y)

    def log_target(x):
        return log_weight(model, x, x_prev, y)[1]

    law = model.proposal(x_prev, y, T1)
    slope, curvature = jax.grad(log_target)(law.mean), jax.grad(jax.grad(log_target))(law.mean)
    assert abs(slope / curvature) < 1e-2 * law.variance**0.5  # a Newton step from the mode
    grid = law.mean + jnp.linspace(-8.0, 8.0, 401) * jnp.sqrt(law.variance)
    log_weights = jax.vmap(lambda x: log_weight(model, x, x_prev, y)[0])(grid)
    assert jnp.max(log_weights) < log_weights[200] + 1e-3
    law = model.initial_proposal(y)
    assert law.variance == pytest.approx(0.25 / (1 - 0.81), rel=1e-5)


def test_heavy_tails_are_those_of_student():
    x, y = jnp.asarray(0.4), jnp.asarray(-1.3)
    expected = scipy.stats.t(3, 0, np.exp(0.2)).logpdf(-1.3)
    np.testing.assert_allclose(observation_log_prob(HEAVY, x, y, T1), expected, rtol=1e-6)
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, HEAVY, 1)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    u = scipy.stats.t(3).cdf(np.asarray(ys, np.float64) * np.exp(-0.5 * np.asarray(xs, np.float64)))
    for level in (0.01, 0.3, 0.9):
        assert mean_p_value(u < level, level) > FALSE_ALARM


@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_evidence_with_heavy_tails_is_unbiased(proposal):
    """Against the trapezium rule."""
    ys = np.array([0.3, 4.0, np.nan, -0.1])
    grid = np.linspace(-16.0, 14.0, 1_501)
    mass = scipy.stats.norm(-1.0, 0.5 / np.sqrt(1 - 0.81)).pdf(grid) * 0.02
    for t, y in enumerate(ys):
        if t > 0:
            mass = scipy.stats.norm(-1.0 + 0.9 * (grid + 1.0), 0.5).pdf(grid[:, None]) @ mass * 0.02
        if not np.isnan(y):
            mass = mass * scipy.stats.t(3, 0, np.exp(0.5 * grid)).pdf(y)

    def log_evidence(key):
        return bi.kernels.particle_filter(
            key, HEAVY, jnp.asarray(ys), num_particles=16, proposal=proposal, store="none"
        ).log_evidence

    report = evidence_is_unbiased(0, log_evidence, np.log(mass.sum()), num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


@pytest.mark.parametrize("nu", [None, 3.0])
def test_missing_returns_are_proposed_from_the_transition(nu):
    model = StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.5, degrees_of_freedom=nu)
    missing, x_prev = jnp.asarray(jnp.nan), jnp.asarray(0.3)
    assert model.proposal(x_prev, missing, T1).mean == model.transition(x_prev, T1).mean
    assert model.initial_proposal(missing).mean == model.mean
    gradient = jax.grad(lambda m: m.proposal(x_prev, missing, T1).mean)(model)
    assert all(jnp.isfinite(leaf) for leaf in jax.tree.leaves(gradient))


def test_impossible_parameters_are_named():
    with pytest.raises(ValueError, match=r"persistence must lie in \(-1, 1\), got 1"):
        StochasticVolatility(0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        StochasticVolatility(0.0, 0.5, 0.0)
    with pytest.raises(ValueError, match="degrees_of_freedom must be finite and positive, got inf"):
        StochasticVolatility(0.0, 0.5, 1.0, jnp.inf)
    jax.jit(lambda phi: StochasticVolatility(0.0, phi, 1.0).persistence)(2.0)  # unknown while traced
