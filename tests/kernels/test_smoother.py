"""The estimates that learning makes by paths: their law at any number of particles, and what is handed on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppg_models import exact_paths, smooth
from test_score import SHORT, THETA, build, exact_score

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import learning, particle_filter, score_functional
from bayesinf.kernels.learning import Smoother

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

MODEL = build(jnp.asarray(THETA))
SCORE = score_functional(build, jnp.asarray(THETA))
SMOOTHED = smooth(SHORT, 0.5, np.exp(-0.2), 1.0, np.exp(0.1), 1.0)
EXACT = exact_score(THETA, SHORT)
FAR = jnp.asarray(SMOOTHED.mean + 6 * np.sqrt(np.diag(SMOOTHED.cov)))


def smoother(estimator, num_sweeps=1, burn_in=0, num_particles=8):
    return Smoother(jnp.asarray(SHORT), estimator, num_particles, num_sweeps, burn_in, 2, "auto", "bootstrap")


def runs(one, paths):
    """Independent estimates, one from every path."""

    @jax.jit
    def run(keys, paths):
        return jax.lax.map(lambda row: one(row[0], MODEL, SCORE, row[1]), (keys, paths), batch_size=500)

    return run(jax.random.split(jax.random.key(1), len(paths)), paths)


def test_gibbs_is_unbiased_from_exact_paths():
    """Whatever the number of sweeps and particles: each leaves the smoothing law invariant, and its path too."""
    found = runs(smoother("gibbs", num_sweeps=2, num_particles=4), exact_paths(jax.random.key(0), SMOOTHED, 8_000))
    assert mean_p_value(found.estimate, EXACT) > FALSE_ALARM
    assert mean_p_value(found.path, SMOOTHED.mean) > FALSE_ALARM
    # the score of the series without its last observation is another, and that is seen
    assert mean_p_value(found.estimate, exact_score(THETA, SHORT[:-1])) < FALSE_ALARM


def test_gibbs_forgets_where_it_started():
    """A path six standard deviations off: one sweep shows it, twenty do not, as each goes on from the one before."""
    start = jnp.broadcast_to(FAR, (4_000, *FAR.shape))
    assert mean_p_value(runs(smoother("gibbs", num_particles=4), start).estimate, EXACT) < FALSE_ALARM
    later = runs(smoother("gibbs", num_sweeps=20, burn_in=19, num_particles=4), start)
    assert mean_p_value(later.estimate, EXACT) > FALSE_ALARM
    assert mean_p_value(later.path, SMOOTHED.mean) > FALSE_ALARM
    # what it returns is of the path that it leaves
    values = jax.jit(jax.vmap(lambda path: SCORE.of_path(path, jnp.asarray(SHORT))))(later.path)
    np.testing.assert_allclose(later.estimate, values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ["gibbs", "ppg"])
def test_the_first_sweeps_are_not_averaged(estimator):
    """With the same key the mean of three sweeps is that of the first and of the two after it."""
    first, last, all_of_them = (
        runs(smoother(estimator, num_sweeps, burn_in), FAR[None]).estimate
        for num_sweeps, burn_in in ((1, 0), (3, 1), (3, 0))
    )
    np.testing.assert_allclose(all_of_them, (first + 2 * last) / 3, rtol=1e-4)
    assert not np.allclose(last, all_of_them, rtol=1e-2)


def test_backward_is_unbiased_once_weighed_by_the_evidence(monkeypatch):
    """Zhat / Z times the estimate has the score as its mean, at every N, if ancestors are independent draws."""
    plain = partial(particle_filter, resampling="multinomial", ess_threshold=1.0)
    monkeypatch.setattr(learning, "particle_filter", plain)
    found = runs(smoother("backward"), jnp.broadcast_to(FAR, (10_000, *FAR.shape)))
    ratio = np.exp(np.asarray(found.log_evidence, np.float64) - SMOOTHED.log_evidence)
    assert mean_p_value(ratio, 1.0) > FALSE_ALARM
    assert mean_p_value(ratio[:, None] * np.asarray(found.estimate), EXACT) > FALSE_ALARM
    # not weighed it is biased by O(1/N), and that is seen
    assert mean_p_value(found.estimate, EXACT) < FALSE_ALARM
