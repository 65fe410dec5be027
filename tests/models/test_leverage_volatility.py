"""Leverage: the states with a common shock have the law of the textbook's correlated shocks."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.models import LeverageVolatility
from bayesinf.models.state_space import log_prob, observation_log_prob, sample_many

MU, PHI, SIGMA, RHO, NU = -1.0, 0.9, 0.5, -0.7, 4.0
GAUSSIAN = LeverageVolatility(MU, PHI, SIGMA, RHO)
HEAVY = LeverageVolatility(MU, PHI, SIGMA, RHO, NU)
T1 = jnp.asarray(1)
RTOL = 1e-9 if jax.config.jax_enable_x64 else 2e-5


def later(x, e):
    """The law of x_{t+1} given x_t and the shock e_t of y_t, by textbook."""
    return scipy.stats.norm(MU + PHI * (x - MU) + RHO * SIGMA * e, SIGMA * np.sqrt(1 - RHO**2))


@pytest.mark.parametrize("model", [GAUSSIAN, HEAVY], ids=["Gaussian", "heavy"])
def test_the_common_shock_integrates_out_to_the_textbook(model):
    """p(y_t, x_{t+1} | x_t, g_t) by the trapezium rule over w_t, and in closed form."""
    x, y, x_next, log_g = 0.4, -1.7, 0.1, 0.0 if model is GAUSSIAN else 0.6
    grid = jnp.linspace(-9.0, 9.0, 601)

    @jax.jit
    @jax.vmap
    def integrand(w):
        state = jnp.stack([x, w] if model is GAUSSIAN else [x, w, log_g])
        # fresh parts of the next state are standard normal, and log Gamma: divided out
        fresh = jnp.array([x_next, 0.3] if model is GAUSSIAN else [x_next, 0.3, log_g])
        move = log_prob(model.transition(state, T1), fresh) - log_prob(model.initial(), fresh.at[0].set(MU))
        return jnp.exp(observation_log_prob(model, state, jnp.asarray(y), T1) + move - 0.5 * w**2)

    found = float(np.sum(np.asarray(integrand(grid), np.float64))) * 0.03 / np.sqrt(2 * np.pi)
    found *= scipy.stats.norm(0, SIGMA / np.sqrt(1 - PHI**2)).pdf(0)
    scale = np.exp(0.5 * (x - log_g))
    expected = scipy.stats.norm(0, scale).pdf(y) * later(x, y / scale).pdf(x_next)
    np.testing.assert_allclose(found, expected, rtol=50 * RTOL)


@pytest.mark.parametrize("model", [GAUSSIAN, HEAVY], ids=["Gaussian", "heavy"])
def test_simulated_series_have_the_correlation(model):
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, model, 2)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    x, variance = xs[..., 0], SIGMA**2 / (1 - PHI**2)
    assert mean_p_value(x, MU) > FALSE_ALARM
    assert mean_p_value((x - MU) ** 2, variance) > FALSE_ALARM
    eta = (x[:, 1] - MU - PHI * (x[:, 0] - MU)) / SIGMA
    e = ys * np.exp(-0.5 * x)
    if model is HEAVY:
        u = scipy.stats.t(NU).cdf(e)
        for level in (0.01, 0.3, 0.9):
            assert mean_p_value(u < level, level) > FALSE_ALARM
        e = e * np.exp(0.5 * xs[..., 2])
    assert mean_p_value(eta, 0.0) > FALSE_ALARM
    assert mean_p_value(eta**2, 1.0) > FALSE_ALARM
    assert mean_p_value(e**2, 1.0) > FALSE_ALARM
    assert mean_p_value(e[:, 0] * eta, RHO) > FALSE_ALARM
    assert mean_p_value(e[:, 1] * eta, 0.0) > FALSE_ALARM


@pytest.mark.parametrize("model", [GAUSSIAN, HEAVY], ids=["Gaussian", "heavy"])
def test_guided_weights_depend_on_the_log_variance_alone(model):
    """m g / q = N(x; m, s^2) p(y | x) / N(x; mode, s^2), whatever w and g are."""
    x_prev, x, w, log_g = jnp.array([0.3, -0.8, 0.2]), -0.6, 1.4, -0.5
    d = 2 if model is GAUSSIAN else 3
    b = RHO / np.sqrt(0.5 * (1 + RHO**2))
    s = SIGMA * np.sqrt(1 - b**2)

    @jax.jit
    def parts(y):
        state, before = jnp.array([x, w, log_g])[:d], x_prev[:d]
        proposal = model.proposal(before, y, T1)
        return (
            log_prob(model.transition(before, T1), state),
            observation_log_prob(model, state, y, T1),
            log_prob(proposal, state),
            bi.models.stochastic_volatility.mode_given_return(*model._predict(before), y, model.degrees_of_freedom),
        )

    for y in (-1.3, 0.0, 25.0, np.nan):
        move, seen, proposed, mode = (float(part) for part in parts(jnp.asarray(y)))
        center = MU + PHI * (0.3 - MU) + SIGMA * b * -0.8
        tails = scipy.stats.norm(0, np.exp(x / 2)) if model is GAUSSIAN else scipy.stats.t(NU, 0, np.exp(x / 2))
        expected = scipy.stats.norm(center, s).logpdf(x) - scipy.stats.norm(mode, s).logpdf(x)
        expected += 0.0 if np.isnan(y) else tails.logpdf(y)
        rounding = RTOL * (abs(move) + abs(seen) + abs(proposed))
        np.testing.assert_allclose(move + seen - proposed, expected, rtol=0, atol=rounding)
        if np.isnan(y):
            np.testing.assert_allclose(proposed, move, rtol=RTOL)


@pytest.mark.parametrize("model", [GAUSSIAN, HEAVY], ids=["Gaussian", "heavy"])
def test_transitions_and_proposals_are_drawn_by_their_densities(model):
    """E[p / q] = 1 for the density p of another law of the family with lighter tails, over draws of q."""
    d, y = (2, jnp.asarray(1.5)) if model is GAUSSIAN else (3, jnp.asarray(1.5))
    x_prev = jnp.array([0.3, -0.8, 0.2])[:d]

    def weights(key, drawn, other):
        return jnp.exp(jax.vmap(lambda x: log_prob(other, x) - log_prob(drawn, x))(sample_many(key, drawn, 20_000)))

    transition, proposal = model.transition(x_prev, T1), model.proposal(x_prev, y, T1)
    # the transition with another w in the state before is shifted by less than one scale
    shifted = model.transition(x_prev.at[1].add(0.5), T1)
    assert mean_p_value(weights(jax.random.key(0), transition, shifted), 1.0) > FALSE_ALARM
    closer = model.proposal(x_prev, 0.9 * y, T1)
    assert mean_p_value(weights(jax.random.key(1), proposal, closer), 1.0) > FALSE_ALARM


def test_transition_bound_is_the_density_at_its_mode():
    for model, peak in ((GAUSSIAN, jnp.zeros(2)), (HEAVY, jnp.zeros(3))):
        state = jnp.array([0.3, -0.8, 0.2])[: peak.size]
        b = RHO / np.sqrt(0.5 * (1 + RHO**2))
        peak = peak.at[0].set(MU + PHI * (0.3 - MU) + SIGMA * b * -0.8)
        law = model.transition(state, T1)
        np.testing.assert_allclose(model.log_transition_bound(T1), log_prob(law, peak), rtol=10 * RTOL)
        around = peak + 0.1 * jax.random.normal(jax.random.key(0), (100, peak.size))
        assert jnp.all(jax.vmap(lambda x, law=law: log_prob(law, x))(around) < model.log_transition_bound(T1))


YS = np.array([0.5, -3.0, np.nan, 0.4])


@lru_cache
def exact_log_evidence(is_heavy):
    """By the trapezium rule over x_t, and over log g_t of its law given e_t, with y as a part of the transition."""
    grid = np.linspace(-14.0, 11.0, 251)
    mass = scipy.stats.norm(MU, SIGMA / np.sqrt(1 - PHI**2)).pdf(grid) * 0.1
    for t, y in enumerate(YS):
        e = y * np.exp(-0.5 * grid)
        if not np.isnan(y):
            mass = mass * (scipy.stats.t(NU) if is_heavy else scipy.stats.norm).pdf(e) * np.exp(-0.5 * grid)
        if t == len(YS) - 1:
            return np.log(mass.sum())
        if np.isnan(y):
            matrix = scipy.stats.norm(MU + PHI * (grid - MU), SIGMA).pdf(grid[:, None])
        elif not is_heavy:
            matrix = later(grid, e).pdf(grid[:, None])
        else:
            matrix = 0.0
            for log_g in np.linspace(-18.0, 4.0, 111):
                law = scipy.stats.gamma(0.5 * (NU + 1), scale=2 / (NU + e**2))
                matrix = matrix + 0.2 * np.exp(log_g) * law.pdf(np.exp(log_g)) * later(
                    grid, e * np.exp(0.5 * log_g)
                ).pdf(grid[:, None])
        mass = matrix @ mass * 0.1


@pytest.mark.parametrize("model", [GAUSSIAN, HEAVY], ids=["Gaussian", "heavy"])
@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_evidence_is_unbiased(model, proposal):
    def log_evidence(key):
        return bi.kernels.particle_filter(
            key, model, jnp.asarray(YS), num_particles=24, proposal=proposal, store="none"
        ).log_evidence

    report = evidence_is_unbiased(0, log_evidence, exact_log_evidence(model is HEAVY), num_replicates=4_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 500


def test_gradients_are_finite():
    for model in (GAUSSIAN, HEAVY, dataclasses.replace(HEAVY, correlation=0.0)):
        d = 2 if model is GAUSSIAN else 3

        @jax.jit
        @jax.grad
        def score(model, y, d=d):
            x_prev, x = jnp.array([0.3, -0.8, 0.2])[:d], jnp.array([0.1, 0.2, -0.1])[:d]
            return (
                log_prob(model.transition(x_prev, T1), x)
                + observation_log_prob(model, x, y, T1)
                + log_prob(model.proposal(x_prev, y, T1), x)
                + log_prob(model.initial_proposal(y), x)
            )

        for y in (jnp.nan, 0.0, 1e3):
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(score(model, jnp.asarray(y))))


def test_impossible_parameters_are_named():
    with pytest.raises(ValueError, match=r"correlation must lie in \(-1, 1\), got -1"):
        LeverageVolatility(0.0, 0.5, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"persistence must lie in \(-1, 1\), got 1"):
        LeverageVolatility(0.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="degrees_of_freedom must be finite and positive, got inf"):
        LeverageVolatility(0.0, 0.5, 1.0, 0.0, jnp.inf)
