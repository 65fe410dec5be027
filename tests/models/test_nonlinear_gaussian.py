"""Nonlinear drifts with Gaussian noise: against the linear model, against quadrature, and by exact identities."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jaxtyping import Array

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import LinearGaussian, NonlinearGaussian
from bayesinf.models.state_space import log_prob, observation_log_prob

RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5
T1 = jnp.asarray(3)
A, OFFSET = jnp.array([[0.9, 0.2, 0.0], [-0.3, 0.7, 0.1], [0.0, 0.4, 0.5]]), jnp.array([0.1, 0.0, -0.2])


class Bent(eqx.Module):
    """A drift with a parameter and with time in it."""

    bend: Array = eqx.field(converter=jnp.asarray)

    def __call__(self, x, t):
        return A @ x + OFFSET + self.bend * jnp.sin(x[::-1] + 0.3 * t)


def build(bend):
    return NonlinearGaussian(
        Bent(bend),
        initial_mean=jnp.array([0.5, -1.0, 0.2]),
        initial_tril=jnp.array([[1.0, 0, 0], [0.3, 0.8, 0], [-0.2, 0.1, 0.5]]),
        transition_tril=jnp.array([[0.4, 0, 0], [0.1, 0.3, 0], [0.05, -0.1, 0.6]]),
        observation_matrix=jnp.array([[1.0, 0.0, -0.5], [0.2, 0.9, 0.3]]),
        observation_tril=jnp.array([[0.5, 0], [0.35, 0.4]]),
        observation_offset=jnp.array([1.0, -2.0]),
    )


LINEAR = LinearGaussian(
    transition_matrix=A,
    transition_offset=OFFSET,
    **{
        field.name: getattr(build(0.0), field.name) for field in dataclasses.fields(build(0.0)) if field.name != "drift"
    },
)
X_PREV, X, Y = jnp.array([0.3, -0.8, 1.1]), jnp.array([0.5, -0.2, 0.7]), jnp.array([0.4, -1.9])


@jax.jit
def densities(model, y):
    """Of every law at one point."""
    return {
        "initial": log_prob(model.initial(), X),
        "transition": log_prob(model.transition(X_PREV, T1), X),
        "observation": observation_log_prob(model, X, y, T1),
        "initial_proposal": log_prob(model.initial_proposal(y), X),
        "proposal": log_prob(model.proposal(X_PREV, y, T1), X),
        "lookahead": model.lookahead(X_PREV, y, T1),
        "bound": model.log_transition_bound(T1),
    }


@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1)])
def test_proposals_are_the_optimal_ones(missing):
    """m(x | x_prev) g(y | x) = proposal(x) exp(lookahead), whatever is missing of y."""
    found = densities(build(0.7), Y.at[jnp.array(missing, int)].set(jnp.nan))
    np.testing.assert_allclose(
        found["proposal"] + found["lookahead"], found["transition"] + found["observation"], rtol=RTOL, atol=10 * RTOL
    )


def test_a_linear_drift_makes_the_linear_model():
    found, expected = densities(build(0.0), Y), densities(LINEAR, Y)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=RTOL, atol=RTOL, err_msg=name)


def test_densities():
    model = build(0.7)
    found = densities(model, Y)
    Q, R = (np.asarray(tril @ tril.T, np.float64) for tril in (model.transition_tril, model.observation_tril))
    x_prev, x = np.asarray(X_PREV, np.float64), np.asarray(X, np.float64)
    mean = np.asarray(A) @ x_prev + np.asarray(OFFSET) + 0.7 * np.sin(x_prev[::-1] + 0.9)
    np.testing.assert_allclose(found["transition"], scipy.stats.multivariate_normal(mean, Q).logpdf(x), rtol=10 * RTOL)
    np.testing.assert_allclose(found["bound"], scipy.stats.multivariate_normal(cov=Q).logpdf(np.zeros(3)), rtol=RTOL)
    mean = np.asarray(model.observation_matrix) @ x + np.asarray(model.observation_offset)
    np.testing.assert_allclose(found["observation"], scipy.stats.multivariate_normal(mean, R).logpdf(Y), rtol=10 * RTOL)


def test_simulated_noises_have_the_moments_of_the_model():
    model = build(0.7)

    @jax.jit
    @jax.vmap
    def draw(key):
        xs, ys = bi.models.simulate(key, model, 3)
        return xs[2] - model.drift(xs[1], jnp.asarray(2)), ys[2] - model.observation_matrix @ xs[2]

    q, r = (np.asarray(noise, np.float64) for noise in draw(jax.random.split(jax.random.key(0), 20_000)))
    assert mean_p_value(q, 0.0) > FALSE_ALARM
    assert mean_p_value(r, np.asarray(model.observation_offset)) > FALSE_ALARM
    noise = np.concatenate([q, r - np.asarray(model.observation_offset)], axis=1)
    cov = np.zeros((5, 5))
    cov[:3, :3] = model.transition_tril @ model.transition_tril.T
    cov[3:, 3:] = model.observation_tril @ model.observation_tril.T
    products = (noise[:, :, None] * noise[:, None, :])[:, *np.triu_indices(5)]
    assert mean_p_value(products, cov[np.triu_indices(5)]) > FALSE_ALARM


def growth(x, t):
    return x / 2 + 25 * x / (1 + x**2) + 8 * jnp.cos(1.2 * t)


ONE = jnp.ones((1, 1))
GROWTH = NonlinearGaussian(growth, jnp.zeros(1), 2.0 * ONE, 3.0 * ONE, ONE, 1.5 * ONE)
SERIES = jnp.array([[1.0], [9.0], [jnp.nan], [2.0]])


def growth_evidence():
    """By the trapezium rule, which converges exponentially fast for smooth integrands that vanish at both ends."""
    grid = np.linspace(-60.0, 60.0, 2_401)
    mass = np.exp(scipy.stats.norm(0, 2).logpdf(grid)) * (grid[1] - grid[0])
    for t, y in enumerate(np.asarray(SERIES, np.float64)[:, 0]):
        if t > 0:
            mean = grid / 2 + 25 * grid / (1 + grid**2) + 8 * np.cos(1.2 * t)
            mass = scipy.stats.norm(mean, 3).pdf(grid[:, None]) @ mass * (grid[1] - grid[0])
        if not np.isnan(y):
            mass = mass * scipy.stats.norm(grid, 1.5).pdf(y)
    return np.log(mass.sum())


@pytest.mark.parametrize(("proposal", "lookahead"), [("bootstrap", False), ("guided", True)])
def test_evidence_is_unbiased(proposal, lookahead):
    def log_evidence(key):
        return bi.kernels.particle_filter(
            key, GROWTH, SERIES, num_particles=16, proposal=proposal, lookahead=lookahead, store="none"
        ).log_evidence

    report = evidence_is_unbiased(0, log_evidence, growth_evidence(), num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


def test_gradients_are_finite_and_those_of_the_densities():
    y = Y.at[0].set(jnp.nan)

    @jax.jit
    @jax.grad
    def score(model):
        found = densities(model, y)
        return found["transition"] + found["observation"] + found["initial_proposal"]

    found = score(build(0.7))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    # d/d bend of log N(x; f, Q) is (df / d bend)^T Q^{-1} (x - f)
    x_prev, model = np.asarray(X_PREV, np.float64), build(0.7)
    slope = np.sin(x_prev[::-1] + 0.9)
    residual = np.asarray(X, np.float64) - (np.asarray(A) @ x_prev + np.asarray(OFFSET) + 0.7 * slope)
    Q = np.asarray(model.transition_tril @ model.transition_tril.T, np.float64)
    np.testing.assert_allclose(found.drift.bend, slope @ np.linalg.solve(Q, residual), rtol=10 * RTOL)
    guided = jax.grad(lambda model: densities(model, y)["proposal"] + densities(model, y)["lookahead"])(build(0.7))
    np.testing.assert_allclose(guided.drift.bend, found.drift.bend, rtol=100 * RTOL)


def test_what_a_function_reads_is_read_anew():
    shift = 1.0
    model = dataclasses.replace(GROWTH, drift=lambda x, t: x + shift)
    evidence = [bi.kernels.particle_filter(0, model, SERIES, num_particles=4).log_evidence]
    shift = 20.0
    evidence.append(bi.kernels.particle_filter(0, model, SERIES, num_particles=4).log_evidence)
    assert evidence[1] < evidence[0] - 10


def test_bad_models_are_named(unchecked):
    with pytest.raises(ValueError, match=r"transition_tril must have shape \(1, 1\), from initial_mean"):
        dataclasses.replace(GROWTH, transition_tril=jnp.eye(2))
    with pytest.raises(ValueError, match="observation_tril must be lower triangular"):
        dataclasses.replace(GROWTH, observation_tril=-ONE)
    with pytest.raises(ValueError, match=r"drift must be called as drift\(x, t\)"):
        dataclasses.replace(GROWTH, drift=lambda x: x)
    with pytest.raises(ValueError, match=r"drift\(x, t\) must return an array of shape \(1,\)"):
        dataclasses.replace(GROWTH, drift=lambda x, t: jnp.zeros(2))
    with pytest.raises(ValueError, match=r"drift must be a function drift\(x, t\), got float"):
        dataclasses.replace(GROWTH, drift=0.5)
