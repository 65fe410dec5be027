"""Who goes on: groups, beams and finished answers, the order of copies, and that choices by weight are unbiased."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.inference_scaling import (
    DVTS,
    Beam,
    BestOfN,
    Entropic,
    FKSteering,
    Independent,
    Potential,
    Published,
    Resample,
    SoftValue,
)
from bayesinf.kernels.inference_scaling.population import found, keep_places


def population(log_weights, log_reward=None, is_done=None):
    num = len(log_weights)
    log_weights = jnp.asarray(log_weights, float)
    log_weights = log_weights - jax.scipy.special.logsumexp(log_weights)
    start = found(Potential(lambda state: state, kind="step"), num)
    return start._replace(
        log_weights=log_weights,
        log_reward=log_weights if log_reward is None else jnp.asarray(log_reward, float),
        is_done=jnp.zeros(num, bool) if is_done is None else jnp.asarray(is_done),
    )


def choose(selection, state, key=0, t=1, max_steps=10):
    return _choose(selection, jax.random.key(key), state, jnp.asarray(t), max_steps)


@partial(jax.jit, static_argnums=4)
def _choose(selection, key, state, t, max_steps):
    return selection.choose(key, state, t, max_steps)


def test_every_ancestor_keeps_its_place():
    draw = np.random.default_rng(0)
    for _ in range(50):
        ancestors = draw.integers(0, 9, 9) if draw.random() < 0.5 else draw.choice(9, 9, p=np.eye(9)[2] * 0.7 + 0.3 / 9)
        kept = np.asarray(jax.jit(keep_places)(jnp.asarray(ancestors, jnp.int32)))
        assert sorted(kept) == sorted(ancestors)
        np.testing.assert_array_equal(kept[kept], kept)


@pytest.mark.parametrize(
    "selection", [Resample(1.0), Resample(1.0, scheme="multinomial"), FKSteering(1.0), Entropic(1.0)]
)
def test_choices_by_weight_are_unbiased(selection):
    """E[sum_i W'_i f(a_i)] = sum_i W_i f(i) for the weights W' that the offspring start from."""
    state = population(np.log([0.5, 0.05, 0.2, 0.25]))
    f = jnp.array([1.0, -2.0, 0.5, 3.0])

    def estimate(key):
        ancestors, log_carried, is_resampled = selection.choose(key, state, jnp.asarray(1), 10)
        return jnp.sum(jnp.exp(log_carried) * f[ancestors]), is_resampled

    estimates, is_resampled = jax.vmap(estimate)(jax.random.split(jax.random.key(0), 20_000))
    assert is_resampled.all()
    assert mean_p_value(estimates, float(jnp.sum(jnp.exp(state.log_weights) * f))) > FALSE_ALARM
    # planted: offspring of an entropic choice that start from equal weights, as published
    if isinstance(selection, Entropic):
        ancestors = jax.vmap(lambda key: selection.choose(key, state, jnp.asarray(1), 10)[0])(
            jax.random.split(jax.random.key(0), 20_000)
        )
        assert mean_p_value(f[ancestors].mean(axis=1), float(jnp.sum(jnp.exp(state.log_weights) * f))) < FALSE_ALARM


@pytest.mark.parametrize(
    "selection", [Resample(1.0), FKSteering(1.0), Entropic(1.0), Published(), Beam(2), DVTS(2), SoftValue(width=2)]
)
def test_who_goes_on_stays_in_its_place(selection):
    """So that of a large cache the rows of the others alone are written."""
    state = population(np.log(np.random.default_rng(1).dirichlet(np.ones(16))))
    for key in range(20):
        ancestors, log_carried, _ = choose(selection, state, key)
        np.testing.assert_array_equal(ancestors[ancestors], ancestors)
        assert len(set(ancestors.tolist())) < 16
        # what an offspring starts from depends on its ancestor alone
        assert len(set(zip(ancestors.tolist(), log_carried.tolist(), strict=True))) == len(set(ancestors.tolist()))


def test_steering_by_differences_is_the_filter_of_values():
    value = Potential(lambda state: state, "value")
    assert FKSteering().prepare(value).spread == "difference"
    assert FKSteering().prepare(Potential(lambda state: state, "value", spread="max")).spread == "max"
    assert FKSteering(spread="sum").prepare(value).spread == "sum"
    state = population(np.log([0.9, 0.05, 0.03, 0.02]))
    for one, other in zip(choose(FKSteering(), state), choose(Resample(), state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_particles_are_resampled_when_few_hold_the_weight():
    even, uneven = population(np.zeros(8)), population(np.log([0.9] + [0.1 / 7] * 7))
    assert not choose(Resample(), even)[2]
    assert choose(Resample(), uneven)[2]
    assert not choose(Resample(every=3), uneven, t=2)[2]
    assert choose(Resample(every=3), uneven, t=3)[2]
    ancestors, log_carried, _ = choose(Resample(), even)
    np.testing.assert_array_equal(ancestors, np.arange(8))
    np.testing.assert_array_equal(log_carried, even.log_weights)


def test_annealing_ends_half_way():
    """Late choices are by W itself, and all offspring start from equal weights."""
    uneven = population(np.log([0.9] + [0.1 / 7] * 7))
    early, late = (choose(Entropic(scheme="systematic"), uneven, t=t) for t in (1, 5))
    assert np.ptp(np.asarray(early[1])) > 0.1
    np.testing.assert_allclose(late[1], -np.log(8), rtol=1e-5)
    assert len(set(np.asarray(early[0]).tolist())) > len(set(np.asarray(late[0]).tolist()))


def test_independent_answers_vote_by_reward_or_alike():
    state = population(np.zeros(3), np.log([0.5, 0.2, 0.1]))
    ancestors, log_carried, is_chosen = choose(Independent(), state)
    assert not is_chosen
    np.testing.assert_array_equal(ancestors, np.arange(3))
    np.testing.assert_array_equal(log_carried, state.log_weights)
    np.testing.assert_allclose(np.exp(Independent("reward").log_votes(state)), np.array([5, 2, 1]) / 8, rtol=1e-5)
    np.testing.assert_allclose(np.exp(Independent("equal").log_votes(state)), 1 / 3, rtol=1e-5)
    assert BestOfN().rule == "argmax"


def test_a_beam_keeps_the_best_and_finished_ones_once():
    reward = np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.5])
    counts = np.bincount(np.asarray(choose(Beam(2), population(np.zeros(8), reward))[0]), minlength=8)
    np.testing.assert_array_equal(counts, [0, 2, 0, 2, 0, 2, 2, 0])
    is_done = np.array([False, True, False, False, False, False, False, False])
    counts = np.bincount(np.asarray(choose(Beam(2), population(np.zeros(8), reward, is_done))[0]), minlength=8)
    assert counts[1] == 1
    assert sorted(counts[[3, 5, 6]]) == [2, 2, 3]
    all_done = np.ones(8, bool)
    counts = np.bincount(np.asarray(choose(Beam(4), population(np.zeros(8), reward, all_done))[0]), minlength=8)
    assert set(np.flatnonzero(counts)) == {1, 3}


def test_groups_do_not_meet():
    reward = np.array([0.1, 0.9, 0.3, 0.8, np.nan, 0.2, 0.1, 0.15])
    np.testing.assert_array_equal(choose(DVTS(4), population(np.zeros(8), reward))[0], [1] * 4 + [5] * 4)
    np.testing.assert_array_equal(choose(SoftValue(0.0), population(np.zeros(8), reward))[0], [1] * 4 + [5] * 4)
    state = population(np.zeros(8), jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2, 0.0, 0.5, 0.25, 0.25])))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: SoftValue(1.0).choose(key, state, jnp.asarray(1), 10)[0])(keys)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 3])
    expected = np.array([0.1, 0.4, 0.3, 0.2, 0.0, 0.5, 0.25, 0.25])
    found = np.concatenate([jax.nn.one_hot(drawn[:, 0], 8)[:, :4], jax.nn.one_hot(drawn[:, 4], 8)[:, 4:]], axis=1)
    assert mean_p_value(found[:, [0, 1, 2, 5, 6]], expected[[0, 1, 2, 5, 6]]) > FALSE_ALARM
    assert not found[:, 4].any()
    np.testing.assert_allclose(np.exp(SoftValue(1.0).log_votes(state)), expected / 2, rtol=1e-5)


def test_the_published_choice_is_by_odds_of_the_last_score():
    state = population(np.zeros(2), np.log([0.9, 0.5]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: Published().choose(key, state, jnp.asarray(1), 10)[0])(keys)
    assert mean_p_value(1.0 * (drawn == 0).mean(axis=1), 0.9) > FALSE_ALARM  # odds 9 : 1
    assert mean_p_value(jnp.mean(drawn == 0, axis=1), 0.7) < FALSE_ALARM


def test_a_dead_population_stays_dead():
    dead = population(np.zeros(4))._replace(log_weights=jnp.full(4, -jnp.inf))
    for selection in (Resample(), Entropic(), FKSteering(), Beam(2), DVTS(2), SoftValue(), Published()):
        log_carried = jax.jit(lambda selection: choose(selection, dead)[1])(selection)  # eagerly it is refused
        assert np.isneginf(np.asarray(log_carried)).all(), selection


def test_who_is_dead_is_not_brought_back():
    """Where fewer are alive than go on, the offspring of the others weigh nothing."""
    state = population(np.zeros(4))._replace(log_weights=jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf]))
    for selection in (Beam(2), DVTS(2), SoftValue(width=2)):
        ancestors, log_carried, _ = choose(selection, state)
        np.testing.assert_array_equal(np.isneginf(np.asarray(log_carried)), np.asarray(ancestors) != 0)


def test_what_has_died_has_no_vote_whatever_it_was_scored_afterwards():
    """A value of 0 ends a particle; that of a later step may be high."""
    reward = np.log([0.1, 0.9, 0.3, 0.8])
    state = population(np.zeros(4), reward)._replace(log_weights=jnp.log(jnp.array([0.5, 0.0, 0.5, 0.0])))
    for selection in (Independent(), BestOfN(), Beam(2), DVTS(2), SoftValue(width=2), SoftValue(0.0, 2), Published()):
        votes = np.exp(np.asarray(selection.log_votes(state)))
        np.testing.assert_array_equal(votes > 0, [True, False, True, False], err_msg=str(selection))
    for selection in (Beam(2), DVTS(2), SoftValue(width=2), Published()):
        assert set(np.asarray(choose(selection, state)[0]).tolist()) <= {0, 2}
    # votes that are alike are of answers, and not of their scores
    np.testing.assert_allclose(np.exp(Independent("equal").log_votes(state)), 0.25, rtol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_particles must be a multiple of width=4, got 6"):
        Beam(4).check(6)
    with pytest.raises(ValueError, match="num_particles must be at least 4, got 2"):
        DVTS(4).check(2)
    with pytest.raises(ValueError, match="votes must be one of"):
        Independent("odds")
    with pytest.raises(ValueError, match="ess_threshold must lie in"):
        Resample(2.0)
    with pytest.raises(ValueError, match="scheme must be one of"):
        Resample(scheme="multi")
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        SoftValue(-1.0)
    with pytest.raises(ValueError, match="potential must have a part of kind='value'"):
        FKSteering().prepare(Potential(lambda state: state, "step"))
