"""PaRIS: consistent, online, unbiased in its evidence, and linear in time."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ppg_models import TOTALS, problem, spread_and_error

from bayesinf import conformance, errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import AdditiveFunctional, Paris, marginal_smoother, paris, particle_filter
from bayesinf.kernels.additive import check_functional
from bayesinf.models import StochasticVolatility


@eqx.filter_jit
def _estimates(keys, model, ys, options):
    return jax.lax.map(lambda key: paris(key, model, ys, TOTALS, **options).estimate, keys, batch_size=100)


def _replicates(name, num, last=50, **options):
    model, ys, smoothed = problem(name, last)
    return np.asarray(_estimates(jax.random.split(jax.random.key(1), num), model, ys, options), np.float64), smoothed


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "mcmc"},
        pytest.param(
            {"method": "exact", "proposal": "guided", "resampling": "systematic", "ess_threshold": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_bias_vanishes_with_the_number_of_particles(options):
    # the bias is c / N + O(1 / N^2): what is left of it cancels in 2 E[N = 80] - E[N = 40]
    small, smoothed = _replicates("OW", 1_000, num_particles=40, **options)
    large, _ = _replicates("OW", 1_000, num_particles=80, **options)
    assert mean_p_value(2 * large - small, smoothed.totals) > FALSE_ALARM


@pytest.mark.parametrize("method", ["exact", "mcmc", "reject"])
def test_what_backward_draws_cost_is_told(method):
    model, ys, _ = problem("OW", 20)
    result = paris(0, model, ys, TOTALS, num_particles=30, num_backward=2, method=method)
    assert result.num_proposals[0] == result.num_exact[0] == 0
    proposals, exact = np.asarray(result.num_proposals[1:]), np.asarray(result.num_exact[1:])
    if method == "reject":
        assert np.all(proposals + exact >= 60)
        assert np.any(proposals > 60)
    else:
        assert np.all(proposals == (60 if method == "mcmc" else 0))
        assert np.all(exact == (60 if method == "exact" else 0))


def test_resampling_and_the_last_particles_are_those_of_the_filter():
    model, ys, _ = problem("OW", 20)
    options = {"num_particles": 30, "resampling": "systematic", "ess_threshold": 0.5}
    found = paris(0, model, ys, TOTALS, **options)
    assert found.is_resampled.shape == (21,)
    assert 0 < np.sum(found.is_resampled) < 20
    np.testing.assert_array_equal(found.is_resampled[1:], found.ess[:-1] <= 15)
    assert found.particles.shape == found.log_weights.shape == (30,)
    np.testing.assert_allclose(np.exp(found.log_weights).sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(1 / np.sum(np.exp(found.log_weights) ** 2), found.ess[-1], rtol=1e-4)


@pytest.mark.usefixtures("run_fast")
def test_few_particles_have_a_visible_bias():
    # so the test above has the power to see one
    small, smoothed = _replicates("OW", 1_000, num_particles=4, method="exact")
    assert mean_p_value(small, smoothed.totals) < FALSE_ALARM


@pytest.mark.parametrize("resampling", ["multinomial", "systematic"])
def test_the_evidence_is_unbiased(resampling):
    model, ys, smoothed = problem("OW", 50)

    def estimate(key):
        options = {"num_particles": 20, "num_backward": 1, "resampling": resampling, "ess_threshold": 0.7}
        return paris(key, model, ys, TOTALS, **options).log_evidence

    conformance.evidence_is_unbiased(3, estimate, smoothed.log_evidence, num_replicates=4_000).raise_if_rejected()


def test_online_estimates_are_those_of_the_shorter_series():
    model, ys, _ = problem("PPG1d", 50)
    options = {"num_particles": 30, "method": "exact"}
    result = paris(0, model, ys, TOTALS, **options)
    np.testing.assert_array_equal(result.estimate, result.estimates[-1])
    for num_rows in (1, 20):
        shorter = paris(0, model, ys[:num_rows], TOTALS, **options)
        np.testing.assert_allclose(result.estimates[num_rows - 1], shorter.estimate, rtol=1e-3, atol=1e-3)
        assert shorter.ess.shape == (num_rows,)


def test_structured_functionals_are_smoothed_at_once():
    model, ys, _ = problem("OW", 50)
    functional = AdditiveFunctional(
        initial=lambda x: {"sum": x, "pair": (x > 0, jnp.zeros((2, 2)))},
        increment=lambda x_prev, x, t: {"sum": x, "pair": (x > 0, jnp.full((2, 2), t))},
    )
    result = paris(0, model, ys, functional, num_particles=30)
    np.testing.assert_allclose(result.estimate["sum"], paris(0, model, ys, TOTALS, num_particles=30).estimate[0], 1e-4)
    np.testing.assert_allclose(result.estimate["pair"][1], np.full((2, 2), 50 * 51 / 2), rtol=1e-5)
    assert 0.0 < result.estimate["pair"][0] < 51.0


def test_missing_rows_say_nothing():
    model = problem("OW", 50)[0]
    result = paris(0, model, jnp.full(51, jnp.nan), TOTALS, num_particles=50)
    np.testing.assert_allclose(result.log_evidence, 0.0, atol=1e-4)
    np.testing.assert_allclose(result.ess, 50.0, rtol=1e-4)


def test_vmap_is_a_loop_and_new_data_compile_nothing():
    model, ys, _ = problem("OW", 50)
    traces = []

    def increment(x_prev, x, t):
        traces.append(1)
        return x

    functional = AdditiveFunctional(lambda x: x, increment)
    series = jnp.stack([ys, 2.0 * ys])
    alone = [paris(5, model, row, functional, num_particles=10, method="exact").estimate for row in series]
    count = len(traces)
    paris(6, problem("PPG1d", 50)[0], ys, functional, num_particles=10, method="exact", ess_threshold=0.5)
    assert len(traces) == count
    together = jax.vmap(lambda row: paris(5, model, row, functional, num_particles=10, method="exact").estimate)(series)
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


@eqx.filter_jit
def _smoothed_sums(keys, model, ys, num_particles):
    """Sums of the smoothed means by forward filtering and backward smoothing: PaRIS with every draw averaged over."""
    options = {"num_particles": num_particles, "resampling": "multinomial", "ess_threshold": 1.0, "store": "full"}

    def one(key):
        filtered = particle_filter(key, model, ys, **options)
        return jnp.sum(jnp.exp(marginal_smoother(model, filtered)) * filtered.history.particles)

    return jax.lax.map(one, keys, batch_size=250)


def _log_rate(estimates, last):
    """The log of the variance of the sum of the states per time step, and its standard error."""
    spread, error = spread_and_error(estimates)
    return 2 * np.log(spread) - np.log(last), 2 * error / spread


def _assert_ratio(numerator, denominator, *, above=0.0, below=np.inf):
    """The ratio of two variances lies within bounds, and too far within to do so by chance."""
    log_ratio, error = numerator[0] - denominator[0], np.hypot(numerator[1], denominator[1])
    margin = scipy.stats.norm.isf(FALSE_ALARM) * error
    with np.errstate(divide="ignore"):
        assert np.log(above) < log_ratio - margin, (np.exp(log_ratio), error)
        assert log_ratio + margin < np.log(below), (np.exp(log_ratio), error)


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    ("num_particles", "lengths", "excess"),
    [(20, (20, 80), 1.5), pytest.param(50, (50, 200), 3.0, marks=pytest.mark.slow)],  # the second is the published one
)
def test_two_backward_draws_make_the_variance_linear_in_time(num_particles, lengths, excess):
    short, long = lengths
    options = {"num_particles": num_particles, "method": "exact"}
    rate = {
        (last, num_backward): _log_rate(
            _replicates("OW", num, last, num_backward=num_backward, **options)[0][:, 0], last
        )
        for last, num_backward, num in ((short, 2, 1_500), (long, 2, 1_500), (long, 1, 600))
    }
    _assert_ratio(rate[long, 2], rate[short, 2], below=1.5)  # published: 0.038 / 0.042
    _assert_ratio(rate[long, 1], rate[long, 2], above=excess)  # published: 6.1


@pytest.mark.slow
def test_two_backward_draws_have_nearly_the_variance_of_all():
    """Against forward filtering and backward smoothing; the published ratio is 1.15 to 1.18."""
    model, ys, _ = problem("OW", 200)
    estimates, _ = _replicates("OW", 2_000, 200, num_particles=50, num_backward=2, method="exact")
    smoothed = _smoothed_sums(jax.random.split(jax.random.key(2), 2_000), model, ys, 50)
    _assert_ratio(_log_rate(estimates[:, 0], 200), _log_rate(smoothed, 200), below=1.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"num_backward": 0}, "num_backward must be at least 1"),
        ({"method": "best"}, "method must be one of"),
        ({"resampling": "best"}, "resampling must be one of"),
        ({"proposal": "best"}, "proposal must be one of"),
        ({"ys": jnp.zeros(0)}, "at least one row"),
    ],
)
def test_bad_input_is_refused_by_name(change, match):
    model, ys, _ = problem("OW", 50)
    arguments = {"key": 0, "ys": ys, "functional": TOTALS, "num_particles": 4} | change
    key, ys, functional = (arguments.pop(name) for name in ("key", "ys", "functional"))
    with pytest.raises(ValueError, match=match):
        paris(key, model, ys, functional, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_terms_of_a_functional_must_be_functions():
    with pytest.raises(ValueError, match=r"initial must be a function initial\(x_0\), got float"):
        AdditiveFunctional(initial=0.0, increment=lambda x_prev, x, t: x)
    with pytest.raises(ValueError, match="functional must be an AdditiveFunctional"):
        check_functional(lambda x: x)


@pytest.mark.parametrize(
    ("initial", "increment", "match"),
    [
        (
            lambda x: x,
            lambda x_prev, x, t: {"sum": x},
            r"one structure and shape, got the shapes \(\) and {'sum': \(\)}",
        ),
        (
            lambda x: x,
            lambda x_prev, x, t: jnp.stack([x, x]),
            r"one structure and shape, got the shapes \(\) and \(2,\)",
        ),
        (lambda x: None, lambda x_prev, x, t: None, "functional.initial must return real numbers, got None"),
        (lambda x: x, lambda x_prev, x, t: 1j * x, "functional.increment must return real numbers, got .*complex"),
    ],
)
def test_terms_of_a_functional_must_agree(initial, increment, match):
    model, ys, _ = problem("OW", 50)
    with pytest.raises(ValueError, match=match):
        paris(0, model, ys, AdditiveFunctional(initial, increment), num_particles=4)
    with pytest.raises(ValueError, match=r"increment must be called as increment\(x_prev, x, t\), but it has \(x\)"):
        AdditiveFunctional(initial, lambda x: x)


def test_vanished_weights_raise_with_the_result():
    model, ys, _ = problem("OW", 50)
    bad = ys.at[9].set(float(jnp.finfo(ys.dtype).max))  # its log density is -inf
    with pytest.raises(errors.DegenerateWeightsError, match="step 9") as caught:
        paris(0, model, bad, TOTALS, num_particles=5)
    assert np.all(np.isfinite(caught.value.result.estimates[:9]))
    assert np.all(np.isnan(caught.value.result.estimates[9:]))
    assert np.all(np.isnan(paris(0, model, bad, TOTALS, num_particles=5, throw=False).estimate))


@jax.jit
def _follow(stream, state, ys):
    return jax.lax.scan(lambda state, y: stream.step(state, y)[0:2], state, ys)


@pytest.mark.parametrize("increment", [0.1, -3.7])
def test_a_long_stream_adds_its_functional_without_loss(increment):
    """30,000 terms in float32, of which each partial sum would lose the last digits of each."""
    term = jnp.float32(increment)
    functional = AdditiveFunctional(lambda x0: term * x0**0, lambda x_prev, x, t: term * x**0)
    stream = Paris(StochasticVolatility(-1.0, 0.9, 0.3), functional, num_particles=3, method="mcmc")
    state, _ = stream.init(0, 0.3)
    _, infos = _follow(stream, state, jnp.full(29_999, jnp.nan))
    exact = float(term) * np.arange(2, 30_001)
    assert np.max(np.abs(np.asarray(infos.estimate, np.float64) / exact - 1)) < 2e-7


def test_what_all_particles_have_in_common_does_not_round_their_differences_away():
    """A transient at the start of a stream, such as scores at bad parameters have: afterwards it is forgotten."""

    def differences(transient):
        functional = AdditiveFunctional(lambda x0: x0 + transient, lambda x_prev, x, t: x * x_prev)
        stream = Paris(StochasticVolatility(-1.0, 0.9, 0.3), functional, num_particles=20, method="mcmc")
        state, _ = stream.init(0, 0.3)
        state, _ = _follow(stream, state, jnp.linspace(-1.0, 1.0, 300))
        return state.statistics.apart

    np.testing.assert_allclose(differences(1e8), differences(0.0), atol=1e-3)
    assert float(jnp.std(differences(0.0))) > 0.1


# ---- memory ----


def _growth(method, num_steps=1_000, num_particles=512):
    """Bytes that a time step adds to what the compiled program holds, its results included."""
    model, row = problem("OW", 50)[0], jnp.zeros((), jnp.result_type(float))

    def held(num_steps):
        def run(key, ys):
            return paris(key, model, ys, TOTALS, num_particles=num_particles, method=method, throw=False)

        ys = jax.ShapeDtypeStruct((num_steps,), row.dtype)
        memory = jax.jit(run).lower(jax.random.key(0), ys).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    return (held(2 * num_steps) - held(num_steps)) / num_steps, num_particles * row.dtype.itemsize


@pytest.mark.parametrize(
    "method", ["mcmc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("exact", "reject"))]
)
def test_nothing_is_kept_of_the_particles_of_a_time_step(method):
    """Keys and results are kept of every step, of the particles not as much as a single number each."""
    growth, one_number_each = _growth(method)
    assert growth < one_number_each


def test_particles_that_are_kept_are_seen_in_the_memory(monkeypatch):
    module = sys.modules[paris.__module__]

    def hoard(self, key, ys):
        """`_run` with the particles of all times, of which the last are returned."""
        start, info, _ = module.begin_paris(self, key, ys[0])

        def step(state, row):
            t, y = row
            state, info, _ = module.move_paris_on(self, state, module.paris_keys(start.filter.key, t), y)
            return state, (info, state.filter.particles)

        last, (infos, particles) = jax.lax.scan(step, start, (jnp.arange(1, len(ys)), ys[1:]))
        return module._gather_up(info, infos, last)._replace(particles=particles[jnp.argmax(ys) - 1])

    monkeypatch.setattr(module, "_run", hoard)
    growth, one_number_each = _growth("mcmc")
    assert growth >= one_number_each
