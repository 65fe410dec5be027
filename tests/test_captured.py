"""What functions read from outside belongs to their identity: new values are never answered with old programs."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesinf as bi
from bayesinf.captured import captured, current

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


def by_target(x):
    return TARGET.logdensity(x)


def by_helper(x):
    return -50.0 * jnp.sum(helper(x) ** 2)


TARGET = bi.Target(by_number)


def set_all(value):
    global SHIFT, ARRAY, NUMPY
    SHIFT, ARRAY, NUMPY = value, jnp.full(3, value), np.full(3, value)
    TABLE["shift"] = value


def mean(target, **options):
    kernel = bi.kernels.MALA(target, 0.005)
    return bi.sample(0, kernel, jnp.zeros(4), num_samples=300, num_warmup=100, progress=False, **options)["x"].mean()


@pytest.mark.parametrize("logdensity", [by_array, by_numpy, by_helper, by_target])
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
    for function in (jnp.sum, jax.nn.relu, jnp.exp):
        assert captured(function) == captured(function)
    assert captured(None) is None
    assert captured(dist.Normal) is dist.Normal
    target = bi.Target(lambda x: -0.5 * x**2)
    assert captured(target.constrain) == target.constrain
    assert captured(captured(by_number)) == captured(by_number)


class Settings:
    """An object of the user's, with what its methods read."""

    def __init__(self, shift):
        self.shift = shift

    def logdensity(self, x):
        return self.square(x - self.shift)

    def square(self, x):
        return -50.0 * x**2

    __call__ = logdensity


class Walk:
    """A user's kernel, plain: two methods and an attribute."""

    def __init__(self, target):
        self.target = target

    def init(self, position):
        return bi.kernels.MALA(self.target, 0.005).init(position)

    def step(self, key, state):
        return bi.kernels.MALA(self.target, 0.005).step(key, state)


LOWER, UPPER = None, 1.0
LINK = jnp.exp
PLACES = {"first": 0.0, "second": 1.0}
SETTINGS = Settings(0.0)


def by_none(x):
    return 0.0 * x + (3.0 if LOWER is None else 5.0)


def by_link(x):
    return LINK(x)


def by_places(x):
    return PLACES["first"] * x


def by_object(x):
    return SETTINGS.logdensity(x)


def by_default(x, shift=0.0):
    return x - shift


@jax.jit
def compiled(x):
    return helper(x)


def by_compiled(x):
    return compiled(x)


def same(x):
    return x


@pytest.mark.parametrize(
    ("function", "place", "name", "value"),
    [
        (by_helper, None, "helper", same),
        (by_link, None, "LINK", jnp.square),
        (by_none, None, "LOWER", 0.0),
        (by_places, None, "PLACES", {"second": 0.0, "first": 1.0}),
        (by_object, SETTINGS, "shift", 1.0),
        (by_object, Settings, "square", same),
        (SETTINGS.logdensity, SETTINGS, "shift", 1.0),
        (SETTINGS, SETTINGS, "shift", 1.0),
        (by_default, by_default, "__defaults__", (1.0,)),
        (by_compiled, None, "SHIFT", 1.0),
    ],
)
def test_whatever_a_function_can_reach_is_read(monkeypatch, function, place, name, value):
    before = captured(function)
    assert captured(function) == before
    monkeypatch.setattr(sys.modules[__name__] if place is None else place, name, value)
    assert captured(function) != before


def test_what_a_function_cannot_reach_is_not_read(monkeypatch):
    before = captured(by_none)
    monkeypatch.setattr(sys.modules[__name__], "UPPER", 5.0)
    assert captured(by_none) == before


def test_things_that_hold_each_other_are_read():
    table = {"value": 1.0}
    table["itself"] = table
    before = captured(lambda x: table["value"] * x)
    assert hash(before) == hash(captured(before.function))
    table["value"] = 2.0
    assert captured(before.function) != before


@pytest.mark.parametrize("as_kernel", [False, True])
def test_objects_that_change_are_sampled_as_they_are(as_kernel):
    settings = Settings(0.0)
    walk = Walk(bi.Target(settings))
    for value in (0.0, 3.0):
        settings.shift = value
        walk.target = bi.Target(settings)
        kernel = walk if as_kernel else bi.kernels.MALA(settings, 0.005)
        draws = bi.sample(0, kernel, jnp.full(4, value), num_samples=300, progress=False)
        assert abs(draws["x"].mean() - value) < 0.1


def test_what_was_made_before_a_change_is_used_as_it_is_now():
    """A target, a functional, a model and a kernel of plain parts are built once, and their globals assigned anew."""
    target = bi.Target(by_number)
    kernel = bi.kernels.Cycle([bi.kernels.MALA(target, 0.005), bi.kernels.MALA(target, 0.01)])
    total = bi.kernels.AdditiveFunctional(lambda x: x + SHIFT, lambda x_prev, x, t: 0.0 * x)
    volatility = bi.models.StochasticVolatility(0.0, 0.9, 0.3)
    half_line = bi.Target(lambda x: jnp.where(x > SHIFT, 0.0, -jnp.inf))

    def ask():
        draws = bi.sample(0, kernel, jnp.full(4, SHIFT), num_samples=300, progress=False)
        smoothed = bi.kernels.paris(0, volatility, jnp.zeros(4), total, num_particles=10).estimate
        starts = half_line.init(0, 4, template=jnp.zeros(()), radius=5.0)
        return draws["x"].mean(), float(smoothed), float(starts.min())

    set_all(0.0)
    before = ask()
    assert current(kernel) is kernel
    set_all(3.0)
    after = ask()
    assert abs(after[0] - before[0] - 3.0) < 0.1
    assert abs(after[1] - before[1] - 3.0) < 1e-4
    assert after[2] > 3.0
    set_all(0.0)


def test_the_gradient_of_a_target_is_read():
    """JAX's transformations take over the names of the method that they are given."""

    def ask():
        drift = jax.grad(bi.Target(by_number).logdensity)
        kernel = bi.kernels.ItoChain(drift, lambda x: jnp.sqrt(2.0), step_size=0.005)
        return captured(drift), bi.sample(0, kernel, jnp.full(4, SHIFT), num_samples=300, progress=False)["x"].mean()

    set_all(0.0)
    drift, before = ask()
    set_all(3.0)
    assert captured(drift) != drift
    assert abs(ask()[1] - before - 3.0) < 0.1
    set_all(0.0)


def test_under_a_trace_nothing_is_compared():
    @jax.jit
    def at(value):
        return bi.Target(lambda x: -0.5 * (x - value) ** 2).logdensity(jnp.asarray(1.0))

    assert float(at(1.0)) == 0.0


def test_a_function_that_counts_its_calls_is_traced_once():
    num_traces, calls = 0, []

    def count(x):
        nonlocal num_traces
        num_traces += 1
        calls.append(num_traces)
        return -0.5 * (x - SHIFT) ** 2

    def ask():
        draws = bi.sample(0, bi.kernels.MALA(bi.Target(count), 1.0), jnp.zeros(2), num_samples=200, progress=False)
        return draws["x"].mean()

    ask()
    before = num_traces
    ask()
    ask()
    assert num_traces == before
    set_all(3.0)
    assert ask() > 1.0
    assert num_traces > before
    set_all(0.0)
