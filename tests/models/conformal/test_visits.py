"""Sets after visits to a state: exact at the n-th visit of a chain whose states have laws of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models.conformal import visit_conformal


def at_a_visit(key, num_visits, alpha, is_pooled=False):
    """Whether the set at the visit after `num_visits` to state 0 holds, and its threshold."""
    key_states, key_scores = jax.random.split(key)
    stay = jnp.array([0.6, 0.9, 0.3])

    def step(x, key_step):
        following = jnp.where(jax.random.bernoulli(key_step, stay[x]), x, (x + 1) % 3)
        return following, x

    states = jax.lax.scan(step, 0, jax.random.split(key_states, 300))[1]
    # what follows, and how strange it is, depends on the state
    scores = jax.random.exponential(key_scores, (300,)) * jnp.array([1.0, 0.1, 0.2])[states]
    now = jnp.flatnonzero(states == 0, size=num_visits + 1, fill_value=-1)[-1]
    seen = jnp.where(jnp.arange(300) < now, states, -1)
    seen = jnp.where((seen >= 0) & is_pooled, 0, seen)
    found = visit_conformal(seen, scores, 0, alpha)
    return scores[now] <= found.threshold, found.num_visits, now


@pytest.mark.parametrize(("num_visits", "alpha"), [(19, 0.2), pytest.param(30, 0.1, marks=pytest.mark.slow), (7, 0.5)])
def test_the_set_at_a_visit_holds_as_often_as_its_rank_says(num_visits, alpha):
    run = jax.jit(jax.vmap(lambda key: at_a_visit(key, num_visits, alpha)))
    is_held, num_seen, now = run(jax.random.split(jax.random.key(0), 20_000))
    is_reached = np.asarray(now) > 0
    assert is_reached.mean() > 0.99
    assert np.all(np.asarray(num_seen)[is_reached] == num_visits)
    level = np.ceil((num_visits + 1) * (1 - alpha) - 1e-9) / (num_visits + 1)
    num_held, num_runs = int(np.sum(np.asarray(is_held)[is_reached])), int(is_reached.sum())
    assert scipy.stats.binomtest(num_held, num_runs, level).pvalue > FALSE_ALARM


def test_scores_of_other_states_are_found_out():
    run = jax.jit(jax.vmap(lambda key: at_a_visit(key, 19, 0.2, is_pooled=True)[0]))
    is_held = run(jax.random.split(jax.random.key(0), 2_000))
    assert scipy.stats.binomtest(int(is_held.sum()), 2_000, 0.8, alternative="less").pvalue < FALSE_ALARM


def test_few_visits_give_an_infinite_threshold():
    states, scores = jnp.array([0, 1, 0, 0, 0]), jnp.array([1.0, 9.0, 2.0, 3.0, 4.0])
    assert visit_conformal(states, scores, 0, 0.2).threshold == 4.0
    assert visit_conformal(states, scores, 0, 0.19).threshold == jnp.inf
    found = visit_conformal(states, scores, 2, 0.2)
    assert (found.threshold, found.num_visits) == (jnp.inf, 0)
    assert "at every visit" in str(found.guarantee)
    assert found.why_infinite() == "it takes 4 calibration scores, got 0"


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.25, 0.2, 0.1, 0.07, 0.05, 0.01])
def test_the_number_that_is_needed_is_the_least_with_a_finite_threshold(alpha):
    run = jax.jit(lambda n, alpha: visit_conformal(jnp.where(jnp.arange(120) < n, 0, 1), jnp.zeros(120), 0, alpha))
    needed = int(run(0, alpha).num_needed)
    assert needed == -(-100 // round(100 * alpha)) - 1
    for n in (needed - 1, needed):
        assert (run(n, alpha).why_infinite() == "") == bool(jnp.isfinite(run(n, alpha).threshold)) == (n == needed)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="states and scores must be of one length, got 2 and 3"):
        visit_conformal(jnp.arange(2), jnp.arange(3.0), 0, 0.1)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\)"):
        visit_conformal(jnp.arange(3), jnp.arange(3.0), 0, 1.0)
