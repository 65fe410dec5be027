"""What scores are made into: the weight of every kind, its sum over an answer, products and powers, bad scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.kernels.inference_scaling import Potential, PotentialProduct

# four answers, finished after 4, 2, 3 and 1 steps; what is scored after the end must not matter
SCORES = np.array([[0.9, 0.8, 0.5, 0.7], [0.6, 0.2, 0.99, 0.01], [0.3, 0.4, 0.95, 0.5], [0.5, 0.1, 0.2, 0.3]])
LENGTHS = np.array([4, 2, 3, 1])


def run(potential, scores=SCORES, lengths=LENGTHS):
    """The log G of every step, shape (T, N), and the log rewards at the end."""
    states = potential.start(len(lengths))
    rows = []
    for t in range(scores.shape[1]):
        log_scores = tuple(factor.log_scores(scores[:, t]) for factor in potential.factors)
        states, log_g = potential.weigh(states, log_scores, jnp.asarray(t >= lengths), jnp.asarray(t + 1 >= lengths))
        rows.append(np.asarray(log_g))
    return np.array(rows), np.asarray(potential.log_reward(states))


def whole(function):
    """A function of the scores of each answer up to its end."""
    return np.array([function(row[:n]) for row, n in zip(SCORES, LENGTHS, strict=True)])


def score(state):
    return state


@pytest.mark.parametrize(
    ("options", "total", "reward"),
    [
        ({"kind": "step"}, np.prod, np.prod),
        ({"kind": "step", "aggregate": "min"}, np.min, np.min),
        ({"kind": "step", "aggregate": "last"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "value"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "value", "spread": "max"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "value", "spread": "sum"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "value", "aggregate": "model"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "value", "aggregate": "prod"}, np.prod, np.prod),
        ({"kind": "terminal"}, lambda r: r[-1], lambda r: r[-1]),
        ({"kind": "terminal", "aggregate": "min"}, np.min, np.min),
        ({"kind": "odds"}, lambda r: np.prod(r / (1 - r)), lambda r: r[-1]),
        ({"kind": "odds", "aggregate": "prod"}, lambda r: np.prod(r / (1 - r)), np.prod),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_the_product_of_the_weights_is_what_the_kind_says(options, total, reward):
    log_g, log_reward = run(Potential(score, **options))
    rounding = 100 * np.finfo(log_g.dtype).eps
    np.testing.assert_allclose(log_g.sum(axis=0), np.log(whole(total)), rtol=rounding, atol=rounding)
    np.testing.assert_allclose(log_reward, np.log(whole(reward)), rtol=rounding, atol=rounding)
    # the finished get no further weight
    assert not log_g[np.arange(4)[:, None] >= LENGTHS].any()


def test_values_are_spread_over_the_steps_as_asked():
    r = np.log(SCORES[0])
    for spread, expected in (
        ("difference", np.diff(r, prepend=0.0)),
        ("max", [*np.maximum.accumulate(r)[:3], r[3] - np.maximum.accumulate(r)[:3].sum()]),
        ("sum", [*np.cumsum(r)[:3], r[3] - np.cumsum(r)[:3].sum()]),
    ):
        log_g, _ = run(Potential(score, "value", spread=spread))
        np.testing.assert_allclose(log_g[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_terminal_scores_count_at_the_end_alone():
    scores = np.where(np.arange(4) + 1 < LENGTHS[:, None], np.nan, SCORES)  # the others need not even be scores
    log_g, log_reward = run(Potential(score, "terminal"), scores)
    expected = np.zeros((4, 4))
    expected[LENGTHS - 1, np.arange(4)] = np.log(whole(lambda r: r[-1]))
    np.testing.assert_allclose(log_g, expected, rtol=1e-5)
    np.testing.assert_allclose(log_reward, np.log(whole(lambda r: r[-1])), rtol=1e-5)


def test_products_and_powers_are_of_the_weights():
    step, value = Potential(score, "step"), Potential(score, "value")
    both = step * value**2.0
    assert isinstance(both, PotentialProduct)
    assert [factor.kind for factor in both.factors] == ["step", "value"]
    (log_step, reward_step), (log_value, reward_value) = run(step), run(value)
    log_both, reward_both = run(both)
    np.testing.assert_allclose(log_both, log_step + 2 * log_value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reward_both, reward_step + 2 * reward_value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(both**0.5)[0], 0.5 * log_both, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(step * step * value)[0], 2 * log_step + log_value, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_of_a_potential_to_the_power_of_zero():
    scores = np.array([[0.0, 0.5]])
    log_g, log_reward = run(Potential(score, "step") ** 0.0, scores, np.array([2]))
    assert not log_g.any()
    assert not log_reward.any()


@pytest.mark.parametrize("kind", ["step", "value", "odds"])
def test_a_score_of_zero_is_death_and_never_nan(kind):
    log_g, _ = run(Potential(score, kind), np.array([[0.0, 0.0, 0.5]]), np.array([3]))
    assert not np.isnan(log_g).any()
    assert log_g[0, 0] == -np.inf or kind == "odds"  # odds are clipped, as published


@pytest.mark.parametrize("kind", ["step", "value", "terminal", "odds"])
@pytest.mark.parametrize("is_log", [False, True])
def test_scores_out_of_range_are_nan(kind, is_log):
    potential = Potential(score, kind, is_log=is_log)
    bad = [np.nan, np.inf]
    bad += ([0.1] if is_log else [-0.1, 1.1]) if kind in ("step", "odds") else ([] if is_log else [-0.1])
    assert np.isnan(potential.log_scores(np.array(bad))).all()
    good = np.array([-3.0, -np.inf, 0.0] if is_log else [0.5, 0.0, 1.0])
    expected = good if is_log else [np.log(0.5), -np.inf, 0.0]
    np.testing.assert_allclose(potential.log_scores(good), expected, rtol=1e-6)


def test_a_score_without_a_meaning_is_refused():
    # what it could mean is told; telescoped steps and multiplied values are errors that nothing else would show
    with pytest.raises(ValueError, match="kind must say what the score means, got none") as caught:
        Potential(score)
    for kind in ("'step' (the prob", "'value' (a guess", "'terminal' (the rew", "'odds' (the prob"):
        assert kind in str(caught.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind must be one of 'step', 'value', 'terminal', 'odds', got 'prm'"):
        Potential(score, "prm")
    with pytest.raises(ValueError, match="aggregate must be one of"):
        Potential(score, "step", aggregate="mean")
    with pytest.raises(ValueError, match="spread='max' is for values, got kind='step'"):
        Potential(score, "step", spread="max")
    with pytest.raises(ValueError, match="score must be a function"):
        Potential(0.5, "step")
    with pytest.raises(ValueError, match="exponent must be finite and not negative"):
        Potential(score, "step") ** -1.0
    with pytest.raises(TypeError, match="wrap it"):
        Potential(score, "step") * 2.0
