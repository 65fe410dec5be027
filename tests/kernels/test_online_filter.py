"""Filters and PaRIS of data that arrive one at a time are those of the whole series."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_particle_filter import Counted

from bayesinf.kernels import AdditiveFunctional, Paris, ParticleFilter, paris, particle_filter
from bayesinf.models import LinearGaussian, StochasticVolatility

MODEL = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.9, initial_mean=0.5)
FAR = 0.5 * float(jnp.finfo(jnp.result_type(float)).max)  # nothing explains it, in any precision
YS = jnp.array([[1.0], [-0.4], [jnp.nan], [1.3], [0.2]])
SUMS = AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x + 0.1 * t)


def stream(one, ys):
    state, info = one.init(3, ys[0])
    infos = [info]
    for y in ys[1:]:
        state, info = one.step(state, y)
        infos.append(info)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)


@pytest.mark.parametrize("options", [{}, {"proposal": "guided", "lookahead": True, "ess_threshold": 1.0}])
def test_a_stream_is_the_whole_filter(options):
    state, infos = stream(ParticleFilter(MODEL, num_particles=32, **options), YS)
    whole = particle_filter(3, MODEL, YS, num_particles=32, store="full", **options)
    assert int(state.t) == 4
    np.testing.assert_allclose(state.particles, whole.particles, rtol=1e-5)
    np.testing.assert_allclose(state.log_weights, whole.log_weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.log_evidence, whole.log_evidence, rtol=1e-6)
    np.testing.assert_allclose(infos.log_evidence_increment, whole.log_evidence_increments, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(infos.estimate.mean, whole.estimates.mean, rtol=1e-5)
    np.testing.assert_array_equal(infos.ancestors, whole.history.ancestors)
    np.testing.assert_array_equal(infos.is_resampled, whole.is_resampled)


def test_a_stream_is_the_whole_paris():
    state, infos = stream(Paris(MODEL, SUMS, num_particles=32), YS)
    whole = paris(3, MODEL, YS, SUMS, num_particles=32)
    np.testing.assert_allclose(infos.estimate, whole.estimates, rtol=1e-5)
    np.testing.assert_allclose(infos.ess, whole.ess, rtol=1e-4)
    np.testing.assert_allclose(state.filter.log_evidence, whole.log_evidence, rtol=1e-6)
    np.testing.assert_array_equal(infos.num_exact, whole.num_exact)


def test_a_long_stream_adds_its_evidence_without_loss():
    """1e5 increments, of which each partial sum would lose the last digits of each."""
    one = ParticleFilter(StochasticVolatility(-1.0, 0.9, 0.3), num_particles=2)
    state, _ = one.init(0, 0.3)

    def go_on(state, y):
        state, info = one.step(state, y)
        return state, info.log_evidence_increment

    state = state._replace(log_evidence=jnp.zeros_like(state.log_evidence))
    state, increments = jax.jit(lambda state: jax.lax.scan(go_on, state, jnp.full(100_000, 0.3)))(state)
    exact = math.fsum(np.asarray(increments, np.float64))
    assert abs(float(state.log_evidence) - exact) <= np.spacing(np.abs(np.asarray(state.log_evidence)))


def test_steps_compile_once():
    one = ParticleFilter(Counted(jnp.asarray(1.0)), num_particles=4)
    state, _ = one.init(0, 0.0)
    state, _ = one.step(state, 1.0)
    traces = Counted.traces
    for y in (2.0, np.nan, 3):
        state, info = one.step(state, y)
    other = ParticleFilter(Counted(jnp.asarray(2.0)), num_particles=4, ess_threshold=0.9)
    other.step(other.init(1, 0.0)[0], 1.0)
    assert Counted.traces == traces > 0
    assert int(state.t) == 4
    assert info.ancestors.shape == (4,)


def test_weights_that_vanish_are_told_and_stay():
    one = ParticleFilter(MODEL, num_particles=8)
    state, _ = one.init(0, YS[0])
    state, info = one.step(state, jnp.array([FAR]))
    assert float(info.ess) == 0
    assert float(state.log_evidence) == -np.inf
    state, info = one.step(state, YS[0])
    assert float(info.ess) == 0
    assert np.isnan(info.estimate.mean).all()
    assert float(state.log_evidence) == -np.inf


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match="ys must be finite"):
        ParticleFilter(MODEL, num_particles=4).init(0, jnp.array([jnp.inf]))
    with pytest.raises(ValueError, match="num_particles"):
        ParticleFilter(MODEL, num_particles=0)
    with pytest.raises(ValueError, match="functional must be an AdditiveFunctional"):
        Paris(MODEL, lambda x: x, num_particles=4)
    with pytest.raises(ValueError, match="method"):
        Paris(MODEL, SUMS, num_particles=4, method="fast")
