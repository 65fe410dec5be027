"""The tail index of a filter's weights, where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels import AdditiveFunctional, Paris, ParticleFilter, particle_filter, tail_index
from bayesinf.models import LinearGaussian, StateSpaceModel


class Pareto(StateSpaceModel):
    """Weights x^index at time 0, of x with tail 1 / x: a Pareto law of that index; and equal ones at time 1."""

    index: float

    def initial(self):
        return dist.Pareto(1.0, 1.0)

    def transition(self, x_prev, t):
        return dist.Pareto(1.0, 1.0)

    def observation(self, x, t):
        return None, lambda y: jnp.where(t == 0, self.index * jnp.log(x), 0.0)


@pytest.mark.parametrize("index", [0.3, 0.9])
def test_a_known_tail_is_found(index):
    found = particle_filter(0, Pareto(index), jnp.zeros(2), num_particles=20_000, ess_threshold=1.0, store="full")
    # the standard error of the index is (1 + k) / sqrt(number of tail weights), which are 3 sqrt(N)
    error = (1 + index) / np.sqrt(3 * np.sqrt(20_000))
    k = tail_index(found)
    assert abs(k[0] - index) < scipy.stats.norm.isf(FALSE_ALARM / 2) * error
    assert k[1] == -np.inf


def test_an_informative_observation_shows_and_a_better_proposal_cures_it():
    """The ess of a bootstrap filter that saw no particle near the data may look better than it is."""
    model = LinearGaussian.scalar(0.9, 1.0, 1.0, 0.02)
    ys = jnp.array([[0.3], [6.0], [-2.0]])
    options = {"num_particles": 2_000, "store": "full"}
    assert np.max(tail_index(particle_filter(0, model, ys, **options))) > 0.7
    adapted = particle_filter(0, model, ys, proposal="guided", lookahead=True, ess_threshold=1.0, **options)
    assert np.max(tail_index(adapted)[1:]) < 0.5


@pytest.mark.parametrize("is_smoother", [False, True])
def test_a_stream_tells_its_own_at_every_time(is_smoother):
    """Those of the whole filter with its history stored, one after the other."""
    model, ys = LinearGaussian.scalar(0.9, 1.0, 1.0, 0.1), jnp.array([[0.3], [3.0], [-2.0]])
    options = {"num_particles": 500, "resampling": "multinomial", "ess_threshold": 1.0}
    expected = tail_index(particle_filter(0, model, ys, store="full", **options))
    total = AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    stream = Paris(model, total, method="mcmc", **options) if is_smoother else ParticleFilter(model, **options)
    state, _ = stream.init(0, ys[0])
    found = [tail_index(state)]
    for y in ys[1:]:
        state, _ = stream.step(state, y)
        found.append(tail_index(state))
    assert np.ptp(expected) > 0.1
    if is_smoother:  # its keys are others after the first
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-2)
        np.testing.assert_array_equal(found[-1], tail_index(state.filter))
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-2)
    with pytest.raises(ValueError, match="a single filter outside of compiled functions"):
        jax.jit(tail_index)(state)


@pytest.mark.usefixtures("unchecked")
def test_a_filter_without_history_has_none():
    with pytest.raises(ValueError, match="call particle_filter with store='full'"):
        tail_index(particle_filter(0, LinearGaussian.scalar(0.9, 1.0), jnp.zeros((3, 1)), num_particles=30))
