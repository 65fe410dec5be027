"""Early stopping keeps its bound against whoever knows the level, saves steps, and is content with few audits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal

NUM_STEPS = 500


@jax.jit
def run(stopping, confidences, losses, is_audited):
    """The losses of each prompt, and where it stopped; losses (T, L) of stopping at each step, 0 at the last."""

    def step(state, given):
        confidence, loss, is_audited = given
        stop = stopping.stop(state, confidence)
        is_early = jnp.any(stopping.is_enough(state, confidence))
        lost = jnp.where(is_early, loss[stop], 0.0)
        return stopping.step(state, jnp.where(is_early & ~is_audited, jnp.nan, lost)), (lost, stop)

    state, (losses, stops) = jax.lax.scan(step, stopping.init(), (confidences, losses, is_audited))
    return losses, stops, state


def adversary(num_steps=NUM_STEPS):
    """Sure of itself at every step, and always wrong when stopped."""
    return jnp.ones((num_steps, 4)), jnp.ones((num_steps, 4)), jnp.ones(num_steps, bool)


def bound(stopping, num_steps=NUM_STEPS):
    reach = 1 + stopping.gamma * (1 / stopping.audit_rate - stopping.alpha) - stopping.start
    return float(stopping.alpha + reach / (stopping.gamma * num_steps))


@pytest.mark.parametrize(("alpha", "gamma", "start"), [(0.1, 0.02, 1.0), (0.3, 0.5, 0.2), (0.05, 0.01, 0.0)])
def test_the_bound_holds_for_every_sequence(alpha, gamma, start):
    stopping = conformal.EarlyStopping(alpha, gamma, start=start)
    losses, _, state = run(stopping, *adversary())
    assert float(losses.mean()) <= bound(stopping) * (1 + 1e-5)
    assert float(state.total_loss) == pytest.approx(float(losses.sum()))
    assert int(state.num_audited) == NUM_STEPS
    rng = np.random.default_rng(0)
    drifting = np.linspace(0, 1, NUM_STEPS)[:, None] * rng.uniform(size=(NUM_STEPS, 4))
    losses, _, _ = run(
        stopping, jnp.asarray(drifting), jnp.asarray(rng.uniform(size=(NUM_STEPS, 4)) < 0.7, float), adversary()[2]
    )
    assert float(losses.mean()) <= bound(stopping) * (1 + 1e-5)


class Clipped(conformal.EarlyStopping):
    """The level is kept within [0, 1], where full confidence always stops."""

    def step(self, state, loss):
        after = super().step(state, loss)
        return eqx.tree_at(lambda s: s.level, after, jnp.minimum(after.level, 1.0))


def test_a_clipped_level_breaks_the_bound():
    stopping = Clipped(0.1, 0.02)
    losses, _, _ = run(stopping, *adversary())
    assert float(losses.mean()) > bound(stopping) + 0.5


def prompts(key, num_steps):
    """Confidence grows with the steps; an answer at confidence c is wrong with probability (1 - c) / 2."""
    key_ease, key_wrong = jax.random.split(key)
    ease = jax.random.uniform(key_ease, (num_steps, 1), minval=0.5, maxval=3.0)
    confidences = 1 - jnp.exp(-ease * jnp.arange(1, 9) / 3)
    is_wrong = jax.random.uniform(key_wrong, (num_steps, 1)) < 0.5 * (1 - confidences)
    return confidences, is_wrong.astype(float)


def test_it_stops_early_and_the_mean_loss_is_what_was_allowed():
    """Where stopping at once loses more than alpha, and never stopping nothing, the level settles in between."""
    confidences, losses = prompts(jax.random.key(0), 20_000)
    stopping = conformal.EarlyStopping(0.1, gamma=0.005)
    lost, stops, _ = run(stopping, confidences, losses, jnp.ones(20_000, bool))
    assert float(losses[:, 0].mean()) > 0.15
    assert float(stops[5_000:].mean()) < 3.0
    # telescoping: between two times the mean loss is alpha, but for what the level moved
    assert abs(float(lost[5_000:].mean()) - 0.1) <= (1 + 0.005) / (0.005 * 15_000)


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_few_audits_keep_the_bound_in_expectation(rate):
    stopping = conformal.EarlyStopping(0.2, gamma=0.02, audit_rate=rate)

    def once(key):
        is_audited = jax.random.bernoulli(key, rate, (NUM_STEPS,))
        losses, _, state = run(stopping, *adversary()[:2], is_audited)
        return losses.mean(), state.num_audited

    means, num_audited = jax.vmap(once)(jax.random.split(jax.random.key(1), 2_000))
    assert float(num_audited.max()) <= NUM_STEPS
    test = scipy.stats.ttest_1samp(np.asarray(means, float), bound(stopping), alternative="greater")
    assert test.pvalue > FALSE_ALARM
    # whoever forgets that few are seen allows as many times more
    forgets = eqx.tree_at(lambda s: s.audit_rate, stopping, jnp.asarray(1.0))
    lost, _, _ = run(forgets, *adversary()[:2], jax.random.bernoulli(jax.random.key(2), rate, (NUM_STEPS,)))
    assert float(lost.mean()) > bound(stopping)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\), got 1"):
        conformal.EarlyStopping(1.0)
    with pytest.raises(ValueError, match=r"audit_rate must be at most 1, got 2"):
        conformal.EarlyStopping(0.1, audit_rate=2.0)
    with pytest.raises(ValueError, match="gamma must be finite and positive"):
        conformal.EarlyStopping(0.1, gamma=0.0)
    with pytest.raises(ValueError, match="start must be finite and not negative"):
        conformal.EarlyStopping(0.1, start=-0.5)
