"""What functions read from outside belongs to their identity: new values are never answered with old programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesinf as bi
from bayesinf.captured import captured

SHIFT = 0.0
ARRAY = jnp.zeros(3)
NUMPY = np.zeros(3)
TABLE = {"shift": 0.0}


def helper(x):
    return x - SHIFT


def by_number(x):
    return -50.0 * jnp.sum((x - SHIFT) ** 2)


def by_array(x):
    return -50.0 * jnp.sum((x - ARRAY) ** 2) / 3


def by_numpy(x):
    return -50.0 * jnp.sum((x - NUMPY) ** 2) / 3


def by_table(x):
    return TABLE["shift"] * x


def by_helper(x):
    return -50.0 * jnp.sum(helper(x) ** 2)


def set_all(value):
    global SHIFT, ARRAY, NUMPY
    SHIFT, ARRAY, NUMPY = value, jnp.full(3, value), np.full(3, value)
    TABLE["shift"] = value


def mean(target, **options):
    kernel = bi.kernels.MALA(target, 0.005)
    return bi.sample(0, kernel, jnp.zeros(4), num_samples=300, num_warmup=100, progress=False, **options)["x"].mean()


@pytest.mark.parametrize("logdensity", [by_array, by_numpy, by_helper])
def test_a_posterior_follows_what_its_log_density_reads(logdensity):
    set_all(0.0)
    before = captured(logdensity)
    assert abs(mean(bi.Target(logdensity))) < 0.1
    assert captured(logdensity) == before
    set_all(3.0)
    assert captured(logdensity) != before
    assert abs(mean(bi.Target(logdensity)) - 3.0) < 0.1
    set_all(0.0)


def test_tables_and_numbers_are_read():
    for function in (by_number, by_table):
        before = captured(function)
        set_all(3.0)
        assert captured(function) != before
        set_all(0.0)
        assert captured(function) == before


def test_an_array_changed_in_place_is_refused():
    """JAX would go on with the values that the array had when it was put on the device."""
    data = np.zeros(3)

    def logdensity(x):
        return -50.0 * jnp.sum((x - data) ** 2) / 3

    assert abs(mean(bi.Target(logdensity))) < 0.1
    data[:] = 3.0
    with pytest.raises(ValueError, match="changed in place"):
        bi.Target(logdensity)
    data = data.copy()
    assert abs(mean(bi.Target(logdensity)) - 3.0) < 0.1


def test_closures_and_arguments_are_read():
    shift = 0.0

    def logdensity(x):
        return -50.0 * (x - shift) ** 2

    before = captured(logdensity)
    shift = 3.0
    assert captured(logdensity) != before
    assert captured(functools.partial(by_number, 1.0)) != captured(functools.partial(by_number, 2.0))


def test_numpyro_models_are_read():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 10.0))
        numpyro.sample("y", dist.Normal(x, 0.1), obs=ARRAY)

    for value in (0.0, 3.0):
        set_all(value)
        target = bi.Target.from_numpyro(model)
        draws = bi.sample(0, bi.kernels.MALA(target, 0.003), {"x": jnp.full(4, value)}, num_samples=200, progress=False)
        assert abs(draws["x"].mean() - value) < 0.1
    set_all(0.0)


def test_what_maps_the_draws_is_read():
    target = bi.Target(lambda x: -0.5 * x**2)

    def moved(x):
        return x + SHIFT

    plain = mean(target, constrain=moved)
    set_all(3.0)
    assert abs(mean(target, constrain=moved) - plain - 3.0) < 1e-3
    set_all(0.0)


def test_functionals_are_read():
    model = bi.models.StochasticVolatility(0.0, 0.9, 0.3)
    _, ys = bi.models.simulate(0, model, 5)

    def shifted(x):
        return x + SHIFT

    def smoothed():
        total = bi.kernels.AdditiveFunctional(shifted, lambda x_prev, x, t: 0.0 * x)
        return float(bi.kernels.paris(0, model, ys, total, num_particles=10).estimate)

    def filtered():
        return float(bi.kernels.particle_filter(0, model, ys, num_particles=10, functional=shifted).estimates[0])

    before = smoothed(), filtered()
    set_all(3.0)
    np.testing.assert_allclose([smoothed(), filtered()], np.array(before) + 3.0, rtol=1e-5)
    set_all(0.0)


def test_likelihoods_of_smc_samplers_are_read():
    def log_likelihood(x):
        return -0.5 * (x - SHIFT) ** 2

    def evidence():
        mala = functools.partial(bi.kernels.MALA, step_size=0.5)
        return float(
            bi.kernels.smc_sampler(0, dist.Normal(0.0, 1.0), log_likelihood, mala, num_particles=200).log_evidence
        )

    before = evidence()
    set_all(3.0)
    # Z = exp(-SHIFT^2 / 4) / sqrt(2)
    assert abs(evidence() - before + 9.0 / 4) < 0.5
    set_all(0.0)


def test_functions_that_read_nothing_and_callable_pytrees_are_left_alone():
    assert captured(jnp.sum) is jnp.sum
    target = bi.Target(lambda x: -0.5 * x**2)
    assert captured(target.constrain) == target.constrain
    assert captured(captured(by_number)) == captured(by_number)


def test_under_a_trace_nothing_is_compared():
    @jax.jit
    def at(value):
        return bi.Target(lambda x: -0.5 * (x - value) ** 2).logdensity(jnp.asarray(1.0))

    assert float(at(1.0)) == 0.0
