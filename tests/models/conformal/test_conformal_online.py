"""Online methods: what they promise holds for every sequence, also for those made to break it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models.conformal import (
    ACI,
    AgACI,
    ConformalPID,
    DtACI,
    Window,
    aci,
    conformal_quantile,
    p_value,
    run_online,
)

pytestmark = pytest.mark.usefixtures("compile_fast")

NUM_STEPS = 3_000
TIMES = np.arange(NUM_STEPS)
NOISE = np.random.default_rng(0).standard_normal(NUM_STEPS)
SERIES = {
    "explosive": 1.01**TIMES,
    "vanishing": 0.99**TIMES,
    "switching": np.abs(NOISE) * np.where(TIMES // 500 % 2, 10.0, 0.1),
    "waiting": np.where(TIMES % 100 == 99, 1e6, 0.0) + np.abs(NOISE),
    "quiet": np.abs(NOISE),
}
METHODS = [ACI(0.1), AgACI(0.1), DtACI(0.1), ConformalPID(0.1)]


def excess(found, alpha):
    return abs(1 - float(np.mean(np.asarray(found.is_covered))) - alpha)


class Clipped(ACI):
    """Confines the level, as MAPIE does, to what some finite set has."""

    def threshold(self, state, window):
        return window.threshold(jnp.clip(state.level, 1 / (window.num_scores + 1), 1.0))

    def step(self, state, score, window):
        moved = super().step(state, score, window)
        return moved._replace(level=jnp.clip(moved.level, 0.0, 1.0))


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_bound_of_aci_holds_for_every_series(name, alpha):
    for gamma in (0.002, 0.01, 0.05, 0.2, 1.0):
        found = run_online(ACI(alpha, gamma=gamma), jnp.asarray(SERIES[name]), window=100)
        bound = (max(alpha, 1 - alpha) + gamma) / (gamma * NUM_STEPS)
        assert excess(found, alpha) <= bound + 1e-5  # of the level's rounding
        levels = found.states.level
        assert float(levels.min()) >= -gamma - 1e-4
        assert float(levels.max()) <= 1 + gamma + 1e-4


def test_levels_that_are_clipped_break_the_bound():
    found = run_online(Clipped(0.1, gamma=0.05), jnp.asarray(SERIES["explosive"]), window=100)
    assert excess(found, 0.1) > 5 * (0.9 + 0.05) / (0.05 * NUM_STEPS)


class Proportional(ConformalPID):
    """Without the integral that stops what adds up."""

    def threshold(self, state, window):
        return state.base


@pytest.mark.parametrize("name", SERIES)
def test_the_bound_of_pid_holds_for_every_series(name):
    for saturation in (0.1, 0.5, 2.0):
        method = ConformalPID(0.1, saturation=saturation)
        bound = (np.pi / 2 * saturation * (NUM_STEPS + 1) / np.log(NUM_STEPS + 1) + 1) / NUM_STEPS
        found = run_online(method, jnp.asarray(SERIES[name]), window=100)
        assert excess(found, 0.1) <= bound


def test_a_forgotten_integral_breaks_the_bound():
    bound = (np.pi / 2 * 0.5 * (NUM_STEPS + 1) / np.log(NUM_STEPS + 1) + 1) / NUM_STEPS
    assert excess(run_online(Proportional(0.1), jnp.asarray(SERIES["explosive"]), window=100), 0.1) > bound


def regret(found, method, scores, size):
    """How much more the levels lost than the best of theirs, and what exponential weights allow at most."""
    weights = np.exp(np.asarray(found.states.log_weights, np.float64))
    levels = np.asarray(found.states.levels, np.float64)
    window, p = Window.empty(size, scores.dtype), []
    push = jax.jit(lambda window, score: (window.push(score), window.p_value(score)))
    for score in scores:
        window, last = push(window, score)
        p.append(float(last))
    p = np.array(p)[:, None]
    alpha = float(method.alpha)

    def loss(level):
        return alpha * (p - level) - np.minimum(0.0, p - level)

    lost, each = loss((weights * levels).sum(1, keepdims=True)).sum(), loss(levels)
    return lost - each.sum(0).min(), weights, each


def test_the_regret_of_dtaci_is_within_its_bound():
    """e^-x <= 1 - x + x^2 / 2 for losses that are not negative, and what is shared at every step."""
    scores = jnp.asarray(SERIES["switching"][:1_500])
    method = DtACI(0.1, gammas=jnp.array([0.01, 0.05, 3.0]))
    found = run_online(method, scores, window=100)
    lost, weights, each = regret(found, method, scores, 100)
    eta, sigma = float(method.eta), 0.5 / float(method.horizon)
    bound = (np.log(3) - len(scores) * np.log1p(-sigma)) / eta + eta / 2 * np.sum(weights * each**2)
    assert lost <= bound * (1 + 1e-4)
    wrong = np.exp(eta * np.cumsum(each, 0))  # weights that grow with the loss
    wrong /= wrong.sum(1, keepdims=True)
    assert np.sum(wrong * each) - each.sum(0).min() > bound


def test_the_regret_of_agaci_is_small():
    """Within what the second-order bound of the best expert allows, of the order of sqrt(log(g) V)."""
    scores = jnp.asarray(SERIES["switching"][:1_500])
    found = run_online(AgACI(0.1), scores, window=100)
    lost, _, each = regret(found, AgACI(0.1), scores, 100)
    best = each.sum(0).argmin()
    allowed = 4 * np.sqrt(np.log(8) * float(found.state.squares[best])) + 4
    assert lost <= allowed
    even = each.mean(1).sum() - each.sum(0).min()
    assert lost < even  # and better than weights that learn nothing


@pytest.mark.parametrize("method", [AgACI, DtACI])
def test_several_of_one_gamma_are_one(method):
    scores = jnp.asarray(SERIES["switching"])
    found = run_online(method(0.1, gammas=jnp.full(3, 0.02)), scores, window=50)
    one = run_online(ACI(0.1, gamma=0.02), scores, window=50)
    levels = jnp.sum(jnp.exp(found.states.log_weights) * found.states.levels, 1)
    agree = np.mean(np.asarray(found.is_covered == one.is_covered))
    np.testing.assert_allclose(levels, one.states.level, atol=5e-3)
    assert agree > 0.995  # rounding moves the average across a rank now and then


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_series_that_drifts_is_covered(method):
    """Where a threshold that is fixed at the beginning fails."""
    scores = jnp.asarray(np.abs(NOISE) * np.linspace(1, 8, NUM_STEPS))
    past, scores = scores[:200], scores[200:]
    if isinstance(method, ConformalPID):
        method = eqx.tree_at(lambda one: one.start, method, past.max())
    found = run_online(method, scores, past=past)
    assert abs(float(found.coverage) - 0.9) < 0.02  # of 2,800 steps a standard error is 0.006
    assert float(jnp.mean(scores <= conformal_quantile(past, 0.1))) < 0.7


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_loop_of_ones_own_is_the_driver_in_any_pieces(method):
    scores = jnp.asarray(SERIES["switching"][480:540]).at[7].set(jnp.nan)
    whole = run_online(method, scores, window=20)
    state, window, thresholds = method.init(), Window.empty(20, scores.dtype), []
    for score in scores:
        thresholds.append(float(method.threshold(state, window)))
        if not jnp.isnan(score):
            state, window = method.step(state, score, window), window.push(score)
    np.testing.assert_allclose(whole.thresholds, thresholds, rtol=1e-4)
    first = run_online(method, scores[:25], window=20)
    second = run_online(method, scores[25:], after=first)
    pieces = jnp.concatenate([first.thresholds, second.thresholds])
    np.testing.assert_array_equal(pieces, whole.thresholds)
    assert round(59 * float(whole.coverage), 3) == float(jnp.sum(whole.is_covered))


def test_windows_by_their_definition():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 9, 60) * 1.0
    scores[rng.integers(0, 60, 8)] = np.nan
    scores[20:24] = np.inf, -np.inf, np.inf, 3.0
    window = Window.empty(13)
    levels = jnp.array([-0.1, 0.05, 0.1, 0.3, 0.7, 1.0])
    look = jax.jit(lambda window: (window.threshold(levels), window.p_value(jnp.arange(-1.0, 10.0)), window.spread()))
    push = jax.jit(lambda window, score: window.push(score))
    for t in range(61):
        seen = scores[:t][~np.isnan(scores[:t])][-13:]
        assert int(window.num_scores) == len(seen)
        thresholds, p, spread = look(window)
        np.testing.assert_array_equal(thresholds, conformal_quantile(jnp.asarray(seen), levels))
        np.testing.assert_allclose(p, p_value(jnp.asarray(seen), jnp.arange(-1.0, 10.0)), rtol=1e-6)
        finite = seen[np.isfinite(seen)]
        assert float(spread) == (np.ptp(finite) if len(finite) else 0)
        if t < 60:
            window = push(window, scores[t])


def test_methods_are_data_to_the_compiler():
    """vmap over step sizes and levels; and the other name of ACI."""
    scores = jnp.asarray(SERIES["quiet"][:200])
    gammas = jnp.array([0.01, 0.1])
    many = jax.vmap(lambda gamma: run_online(aci(0.1, gamma=gamma), scores, window=20).thresholds)(gammas)
    for row, gamma in zip(many, gammas, strict=True):
        np.testing.assert_array_equal(row, run_online(ACI(0.1, gamma=gamma), scores, window=20).thresholds)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\)"):
        ACI(1.5)
    with pytest.raises(ValueError, match="gammas must have shape"):
        DtACI(0.1, gammas=0.1)
    with pytest.raises(ValueError, match="saturation must be finite and positive"):
        ConformalPID(0.1, saturation=0.0)
    with pytest.raises(ValueError, match=r"scores must have shape \(T,\)"):
        run_online(ACI(0.1), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="window must be at least 1"):
        run_online(ACI(0.1), jnp.zeros(3), window=0)
