"""Plans: the proposal does on a Gaussian what it says, and it is a kernel that runs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from test_curvature import rotated

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value

SPECTRUM = np.geomspace(0.5, 50.0, 6)


@pytest.fixture(scope="module")
def proposed():
    return kernels.plan(rotated(SPECTRUM), 0.03, position=jnp.ones(6))


def test_the_spectrum_and_the_mode_are_found(proposed):
    np.testing.assert_allclose(proposed.spectrum, SPECTRUM, rtol=1e-3)
    np.testing.assert_allclose(proposed.position, 0.0, atol=1e-2)
    np.testing.assert_allclose(proposed.spread, np.sqrt(np.sum(1 / SPECTRUM)), rtol=1e-3)


def test_every_candidate_reaches_the_tolerance_and_does_not_with_far_fewer_steps(proposed):
    names = {candidate.name for candidate in proposed.candidates}
    assert names >= {"LMC", "RandomizedMidpoint", "KineticLangevin", "RandomizedMidpointKinetic", "BAOAB"}
    tolerance = 0.03 * np.sqrt(np.sum(1 / SPECTRUM))
    for candidate in proposed.candidates:
        w2 = [
            kernels.gaussian_error(candidate.kernel, SPECTRUM, num_steps=n).w2
            for n in (candidate.num_steps, candidate.num_steps // 2)
        ]
        assert w2[0] <= 1.001 * tolerance < w2[1], candidate.name
        assert kernels.gaussian_error(candidate.kernel, SPECTRUM).w2 <= 0.501 * tolerance


def test_the_kernels_of_second_order_are_proposed_first_and_overdamped_ones_last(proposed):
    assert isinstance(proposed.kernel, kernels.Splitting)
    assert proposed.candidates[0].kernel is proposed.kernel
    assert proposed.candidates[-1].name in ("LMC", "KineticLangevin", "RandomizedMidpoint")


def test_draws_have_the_variance_that_is_predicted(proposed):
    num_chains = 4_000
    draws = bi.sample(
        0,
        proposed.kernel,
        proposed.initial(num_chains),
        num_samples=1,
        num_warmup=proposed.num_steps - 1,
        progress=False,
        throw=False,
    )
    x = np.asarray(draws["x"], np.float64).reshape(num_chains, 6)
    precision = np.asarray(proposed.kernel.target.data, np.float64)
    _, vectors = np.linalg.eigh(precision)
    predicted = kernels.gaussian_error(proposed.kernel, proposed.spectrum, num_steps=proposed.num_steps)
    y = x @ vectors
    assert mean_p_value(y**2, predicted.variance) > FALSE_ALARM
    assert mean_p_value(y**2, 1.2 * predicted.variance) < FALSE_ALARM


def test_a_posterior_has_a_plan():
    def model(x, y=None):
        scale = numpyro.sample("scale", dist.Gamma(3.0, 3.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(slope * x, scale), obs=y)

    x = np.linspace(-1, 1, 30)
    y = 0.5 * x + 0.3 * np.random.default_rng(0).standard_normal(30)
    proposed = kernels.plan(bi.Target.from_numpyro(model, x, y), 0.05)
    assert set(proposed.position) == {"scale", "slope"}
    assert jax.tree.map(jnp.shape, proposed.initial(3)) == {"scale": (3,), "slope": (3,)}
    lines = str(proposed).splitlines()
    assert "condition number" in lines[0]
    assert len(lines) == 2 + len(proposed.candidates)
    state = proposed.kernel.init(proposed.position)
    assert bool(proposed.kernel.step(jax.random.key(0), state)[1].is_accepted)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="tolerance"):
        kernels.plan(rotated(SPECTRUM), 0.0, position=jnp.ones(6))
    with pytest.raises(ValueError, match="template"):
        kernels.plan(rotated(SPECTRUM), 0.1)
    with pytest.raises(ValueError, match="4096"):
        kernels.plan(rotated(SPECTRUM), 0.1, position=jnp.ones(5_000))
    with pytest.raises(
        ValueError, match=r"position: the log density or its gradient is not finite there\. .* elsewhere"
    ):
        kernels.plan(lambda x: jnp.sum(jnp.log(x) - x), 0.1, position=-jnp.ones(2))
    with pytest.raises(ValueError, match="Hessian"):
        kernels.plan(lambda x: -0.5 * (x[0] - x[1]) ** 2, 0.1, position=jnp.ones(2))
    with pytest.raises(ValueError, match=r"4\.2 standard deviations away"):
        kernels.plan(lambda x: 1e9 - 0.5 * jnp.sum((x - 3) ** 2), 0.1, position=jnp.zeros(2, jnp.float32))
