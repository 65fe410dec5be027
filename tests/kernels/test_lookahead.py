"""Auxiliary and fully adapted filters: unbiased whatever is looked ahead at."""

from unittest.mock import patch

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.kernels import AdditiveFunctional, online_filter, paris, particle_filter
from bayesinf.models import LinearGaussian, StateSpaceModel, StochasticVolatility, kalman_filter, rts_smoother

MODEL = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.8, initial_mean=0.5)
YS = jnp.array([[1.0], [-0.4], [jnp.nan], [1.3], [0.1]])


class Crude(LinearGaussian):
    """Looks ahead with heavier tails, and off by a factor that must not matter; says nothing of missing rows."""

    def lookahead(self, x_prev, y, t):
        return 3.0 - jnp.sum(jnp.abs(y - 0.5 * x_prev))


CRUDE = Crude.scalar(0.8, 0.7, 1.0, 0.8, initial_mean=0.5)


class LogEvidence(eqx.Module):
    """key -> log evidence."""

    model: StateSpaceModel
    ess_threshold: Array
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True, default="systematic")

    def __call__(self, key):
        options = {"proposal": self.proposal, "resampling": self.resampling, "store": "none"}
        threshold = self.ess_threshold
        return particle_filter(
            key, self.model, YS, num_particles=8, ess_threshold=threshold, lookahead=True, **options
        ).log_evidence


@pytest.mark.parametrize(
    ("model", "proposal", "resampling"),
    [
        (CRUDE, "bootstrap", "systematic"),
        (CRUDE, "guided", "residual"),
        (MODEL, "bootstrap", "multinomial"),
        (MODEL, "guided", "killing"),
    ],
)
def test_evidence_is_unbiased(model, proposal, resampling):
    exact = kalman_filter(MODEL, YS).log_evidence
    for threshold in (0.5, 1.0):
        estimate = LogEvidence(model, jnp.asarray(threshold), proposal, resampling)
        report = evidence_is_unbiased(0, estimate, exact, num_replicates=4_000)
        report.raise_if_rejected()
        assert report.notes["effective replicates"] > 500


def forgets_the_correction(*args, log_lookahead=None, choose=online_filter.choose_ancestors, **kwargs):
    """Offspring all start from the same weight, as if they had been chosen by the weights alone."""
    ancestors, log_carried, is_resampled = choose(*args, log_lookahead=log_lookahead, **kwargs)
    equal = jnp.full_like(log_carried, -jnp.log(log_carried.shape[0]))
    return ancestors, jnp.where(is_resampled, equal, log_carried), is_resampled


def forgets_the_constant(*args, log_lookahead=None, choose=online_filter.choose_ancestors, **kwargs):
    """Offspring start from one over the lookahead: the mean of it that the first stage divided by is lost."""
    ancestors, log_carried, is_resampled = choose(*args, log_lookahead=log_lookahead, **kwargs)
    wrong = -jnp.log(log_carried.shape[0]) - log_lookahead[ancestors]
    return ancestors, jnp.where(is_resampled, wrong, log_carried), is_resampled


@pytest.mark.parametrize("wrong", [forgets_the_correction, forgets_the_constant])
def test_a_wrong_first_stage_is_found(wrong):
    exact = kalman_filter(MODEL, YS).log_evidence
    estimate = LogEvidence(CRUDE, jnp.asarray(1.0), "bootstrap")
    jax.clear_caches()
    with patch.object(online_filter, "choose_ancestors", wrong):
        assert evidence_is_unbiased(0, estimate, exact, num_replicates=4_000).p_value < FALSE_ALARM
    jax.clear_caches()


def test_fully_adapted_weights_are_equal():
    """What was known of y_t before x_t was drawn is all that there is to know: every offspring weighs the same."""
    found = particle_filter(
        0, MODEL, YS, num_particles=50, proposal="guided", lookahead=True, ess_threshold=1.0, store="full"
    )
    np.testing.assert_allclose(jnp.exp(found.history.log_weights[1:]), 1 / 50, rtol=2e-4)
    np.testing.assert_allclose(found.ess[1:], 50, rtol=1e-4)


@pytest.mark.usefixtures("run_fast")
def test_paris_looks_ahead_too():
    total = AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    exact = rts_smoother(MODEL, YS).means.sum()
    keys = jax.random.split(jax.random.key(1), 400)
    run = jax.jit(jax.vmap(lambda key: paris(key, CRUDE, YS, total, num_particles=400, lookahead=True).estimate))
    # the bias of O(1/N) is far below the standard error
    assert mean_p_value(run(keys), exact) > FALSE_ALARM


def test_missing_rows_are_not_looked_at():
    """The lookahead of NaN is NaN, and is not used."""
    found = particle_filter(0, CRUDE, YS, num_particles=20, lookahead=True, ess_threshold=1.0)
    assert np.all(np.isfinite(found.log_evidence_increments))
    np.testing.assert_allclose(found.log_evidence_increments[2], 0.0, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    volatility = StochasticVolatility(0.0, 0.9, 0.3)
    with pytest.raises(ValueError, match="lookahead=True needs a method lookahead"):
        particle_filter(0, volatility, jnp.zeros(3), num_particles=4, lookahead=True)
    with pytest.raises(ValueError, match="lookahead must be True or False, got 'yes'"):
        particle_filter(0, volatility, jnp.zeros(3), num_particles=4, lookahead="yes")
