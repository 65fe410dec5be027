import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import ChaoticRNN
from bayesinf.models.state_space import log_prob, observation_log_prob

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
T1 = jnp.asarray(1)
W = np.array([[0.5, -1.2, 0.3], [0.1, 0.4, 2.0], [-0.7, 0.0, 0.9]])
MODEL = ChaoticRNN(jnp.asarray(W))
X_PREV, X = np.array([0.5, -1.0, 2.0]), np.array([0.45, -0.9, 1.8])
Y = np.array([0.6, -0.7, 2.9])


def move(x, W, gain=2.5, time_constant=0.025, time_step=0.001):
    return x + time_step / time_constant * (-x + gain * W @ np.tanh(x))


@jax.jit
def densities(model, y):
    return {
        "transition": log_prob(model.transition(jnp.asarray(X_PREV), T1), jnp.asarray(X)),
        "observation": observation_log_prob(model, jnp.asarray(X), y, T1),
        "initial": log_prob(model.initial(), jnp.asarray(X)),
        "bound": model.log_transition_bound(T1),
    }


def test_densities():
    found = densities(MODEL, jnp.asarray(Y))
    expected = {
        "transition": scipy.stats.norm(move(X_PREV, W), 0.1).logpdf(X).sum(),
        "observation": scipy.stats.t(2, X, 0.1).logpdf(Y).sum(),
        "initial": scipy.stats.norm.logpdf(X).sum(),
        "bound": 3 * scipy.stats.norm(0, 0.1).logpdf(0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=10 * RTOL, err_msg=name)


def test_missing_components_are_integrated_out():
    found = densities(MODEL, jnp.asarray(Y).at[1].set(jnp.nan))["observation"]
    np.testing.assert_allclose(found, scipy.stats.t(2, X, 0.1).logpdf(Y)[[0, 2]].sum(), rtol=10 * RTOL)
    assert densities(MODEL, jnp.full(3, jnp.nan))["observation"] == 0


def test_scores_are_finite_and_those_of_the_densities():
    y = jnp.asarray(Y).at[1].set(jnp.nan)
    score = jax.jit(jax.grad(lambda model: sum(densities(model, y).values())))(MODEL)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(score))
    guided = jax.grad(lambda model: log_prob(model.proposal(jnp.asarray(X_PREV), y, T1), jnp.asarray(X)))(MODEL)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(guided))
    # d/dW of log N(x; f, q^2 I) is (x - f) / q^2 times Delta gamma / tau tanh(x_prev)^T
    expected = np.outer((X - move(X_PREV, W)) / 0.01, 0.04 * 2.5 * np.tanh(X_PREV))
    np.testing.assert_allclose(score.coupling, expected, rtol=20 * RTOL)


def test_simulated_series_have_the_law_of_the_model():
    model = dataclasses.replace(MODEL, initial_scale=0.7, degrees_of_freedom=2.0)
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, model, 2)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    assert mean_p_value(xs[:, 0], 0.0) > FALSE_ALARM
    assert mean_p_value(xs[:, 0] ** 2, 0.49) > FALSE_ALARM
    q = xs[:, 1] - np.stack([move(x, W) for x in xs[:, 0]])
    assert mean_p_value(q, 0.0) > FALSE_ALARM
    assert mean_p_value(
        (q[:, :, None] * q[:, None, :])[:, *np.triu_indices(3)], 0.01 * np.eye(3)[np.triu_indices(3)]
    ) > (FALSE_ALARM)
    # the noise has no variance: its probabilities are compared
    u = scipy.stats.t(2).cdf((ys - xs) / 0.1)
    for level in (0.02, 0.3, 0.9):
        assert mean_p_value(u < level, level) > FALSE_ALARM


def test_guided_weights_are_bounded():
    """Each component of m g / q is at most twice the peak of g, wherever y is and what is missing of it."""
    peak = scipy.stats.t(2, 0, 0.1).logpdf(0) + np.log(2)

    @jax.jit
    @jax.vmap
    def log_weight(x, y):
        seen = observation_log_prob(MODEL, x, y, T1)
        moved = log_prob(MODEL.transition(jnp.asarray(X_PREV), T1), x)
        first = log_prob(MODEL.initial(), x) - log_prob(MODEL.initial_proposal(y), x)
        return seen + moved - log_prob(MODEL.proposal(jnp.asarray(X_PREV), y, T1), x), seen + first

    key_x, key_y = jax.random.split(jax.random.key(0))
    ys = X + 10.0 ** jnp.linspace(-2, 2, 2_000)[:, None] * jax.random.normal(key_y, (2_000, 3))
    xs = jnp.where(jnp.arange(2_000)[:, None] % 2 == 0, X, ys) + 0.2 * jax.random.normal(key_x, (2_000, 3))
    for log_weights in log_weight(xs, ys):
        assert jnp.max(log_weights) < 3 * peak + 1e-3
    for log_weights in log_weight(xs, ys.at[:, 1].set(jnp.nan)):
        assert jnp.max(log_weights) < 2 * peak + 1e-3
    # where all is missing the proposal is the transition itself
    np.testing.assert_allclose(log_weight(xs[:200:2], jnp.full((100, 3), jnp.nan))[0], 0.0, atol=10 * RTOL)


@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_evidence_is_unbiased(proposal):
    """Of a network of one rate, against the trapezium rule."""
    model = ChaoticRNN(
        jnp.array([[1.5]]), time_step=0.02, transition_scale=0.5, observation_scale=0.4, degrees_of_freedom=3.0
    )
    ys = np.array([0.7, np.nan, -2.0, 0.4])
    grid = np.linspace(-9.0, 9.0, 1_801)
    mass = scipy.stats.norm.pdf(grid) * 0.01
    for t, y in enumerate(ys):
        if t > 0:
            mean = grid + 0.8 * (-grid + 2.5 * 1.5 * np.tanh(grid))
            mass = scipy.stats.norm(mean, 0.5).pdf(grid[:, None]) @ mass * 0.01
        if not np.isnan(y):
            mass = mass * scipy.stats.t(3, grid, 0.4).pdf(y)

    def log_evidence(key):
        return bi.kernels.particle_filter(
            key, model, jnp.asarray(ys)[:, None], num_particles=32, proposal=proposal, store="none"
        ).log_evidence

    report = evidence_is_unbiased(0, log_evidence, np.log(mass.sum()), num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


def test_random_networks_have_entries_of_variance_one_over_d():
    model = ChaoticRNN.random(0, 200, gain=1.5)
    entries = np.asarray(model.coupling, np.float64).ravel()
    assert mean_p_value(entries**2, 1 / 200) > FALSE_ALARM
    assert model.gain == 1.5


def test_bad_parameters_are_named(unchecked):
    with pytest.raises(ValueError, match=r"coupling must have shape \(d, d\), got \(2, 3\)"):
        ChaoticRNN(jnp.ones((2, 3)))
    for name in ("time_constant", "transition_scale", "degrees_of_freedom"):
        with pytest.raises(ValueError, match=f"{name} must be finite and positive"):
            dataclasses.replace(MODEL, **{name: 0.0})
    with pytest.raises(ValueError, match=r"observation_scale must be a scalar"):
        dataclasses.replace(MODEL, observation_scale=jnp.ones(3))
    with pytest.raises(ValueError, match="num_states must be at least 1"):
        ChaoticRNN.random(0, 0)
