"""The protocol: simulation, batched draws, and densities of rows of which something is missing."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import StateSpaceModel
from bayesinf.models.state_space import (
    check_observations,
    check_series,
    observation_log_prob,
    sample_each,
    sample_many,
)

T0 = jnp.asarray(0)
COVARIANCE = np.array([[1.0, 0.6, -0.2], [0.6, 2.0, 0.5], [-0.2, 0.5, 1.5]])
TRIL = jnp.linalg.cholesky(jnp.asarray(COVARIANCE))


class Observed(StateSpaceModel):
    """A random walk seen through any law."""

    law: Callable = eqx.field(static=True)

    def initial(self):
        return dist.Normal(0.0, 1.0)

    def transition(self, x_prev, t):
        return dist.Normal(x_prev, 0.1)

    def observation(self, x, t):
        return self.law(x)


class Regimes(StateSpaceModel):
    """A pytree for a state: a regime and a level, as (sample, log_prob) pairs; counts of two kinds."""

    def initial(self):
        def sample(key):
            return {"regime": jax.random.bernoulli(key, 0.3).astype(jnp.int32), "level": jnp.zeros(2)}

        return sample, lambda x: jnp.where(x["regime"] == 1, jnp.log(0.3), jnp.log(0.7))

    def transition(self, x_prev, t):
        def sample(key):
            key_regime, key_level = jax.random.split(key)
            stay = jax.random.bernoulli(key_regime, 0.9)
            level = x_prev["level"] + jax.random.normal(key_level, (2,)) + x_prev["regime"] * t
            return {"regime": jnp.where(stay, x_prev["regime"], 1 - x_prev["regime"]), "level": level}

        return sample, lambda x: jnp.where(x["regime"] == x_prev["regime"], jnp.log(0.9), jnp.log(0.1))

    def observation(self, x, t):
        def sample(key):
            return {"a": x["level"][0] + jax.random.normal(key), "b": x["level"]}

        return sample, lambda y: dist.Normal(x["level"][0], 1.0).log_prob(y["a"]) + jnp.sum(y["b"])


def test_pytree_states_are_simulated():
    keys = jax.random.split(jax.random.key(0), 20_000)
    xs, ys = jax.jit(jax.vmap(lambda key: bi.models.simulate(key, Regimes(), 3)))(keys)
    assert xs["regime"].shape == (20_000, 3)
    assert xs["regime"].dtype == jnp.int32
    assert ys["b"].shape == (20_000, 3, 2)
    # P(regime_1 = 1) = 0.3 * 0.9 + 0.7 * 0.1, and the level has moved by sum of regime_{t-1} * t
    assert mean_p_value(xs["regime"][:, 1], 0.34) > FALSE_ALARM
    assert mean_p_value(ys["a"][:, 2], 0.3 + 2 * 0.34) > FALSE_ALARM
    np.testing.assert_array_equal(ys["b"], xs["level"])


def test_simulation_is_reproducible_and_longer_ones_continue_shorter_ones():
    model = bi.models.StochasticVolatility(-1.0, 0.9, 0.5)
    xs, ys = bi.models.simulate(3, model, 7)
    longer = bi.models.simulate(jax.random.key(3), model, 12)
    np.testing.assert_allclose(longer[0][:7], xs, rtol=1e-6)
    np.testing.assert_allclose(longer[1][:7], ys, rtol=1e-6)
    assert bi.models.simulate(3, model, 1)[0].shape == (1,)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        bi.models.simulate(3, model, 0)


LAWS = {
    "Normal": (lambda x: dist.Normal(x, 1 + x**2), lambda x: x),
    "Independent": (lambda x: dist.Normal(jnp.stack([x, 2 * x]), 0.5).to_event(1), lambda x: np.stack([x, 2 * x], -1)),
    "MultivariateNormal": (
        lambda x: dist.MultivariateNormal(x * jnp.ones(3), scale_tril=TRIL),
        lambda x: np.stack([x] * 3, -1),
    ),
    "batch": (lambda x: dist.Normal(x * jnp.arange(2.0), 1 + x**2), lambda x: x[:, None] * np.arange(2.0)),
    "expanded": (lambda x: dist.Normal(x, 0.5).expand([2]).to_event(1), lambda x: np.stack([x, x], -1)),
    "constant": (lambda x: dist.Laplace(3.0, 0.5), lambda x: 3.0 + 0 * x),
    "LogNormal": (lambda x: dist.LogNormal(x, 0.5), lambda x: np.exp(x + 0.125)),
    "Gamma": (lambda x: dist.Gamma(1 + x**2, 2.0), lambda x: (1 + x**2) / 2),
    "Mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.2, 0.8])), dist.Normal(x + jnp.array([0.0, 5.0]), 1)
        ),
        lambda x: x + 4,
    ),
    "pair": (lambda x: (lambda key: x + jax.random.uniform(key), None), lambda x: x + 0.5),
}


@pytest.mark.parametrize("name", LAWS)
def test_batched_draws_are_independent_draws_of_each_law(name):
    law_of, mean_of = LAWS[name]
    xs = jnp.array([0.5, -1.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 30_000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: sample_each(key, law_of, xs)))(keys), np.float64)
    assert mean_p_value(draws, mean_of(np.asarray(xs))) > FALSE_ALARM
    centred = draws.reshape(30_000, 3, -1) - mean_of(np.asarray(xs)).reshape(3, -1)
    assert mean_p_value(centred[:, 0] * centred[:, 1], 0.0) > FALSE_ALARM
    assert np.all(centred[:, 0].std(0) > 0)


def test_a_population_from_one_law():
    assert sample_many(jax.random.key(0), dist.Normal(jnp.zeros(2), 1.0).to_event(1), 5).shape == (5, 2)
    draws = sample_many(jax.random.key(0), Regimes().initial(), 5)
    assert draws["level"].shape == (5, 2)


def test_observations_without_a_sampler_are_filtered_and_not_simulated():
    model = Observed(lambda x: (None, lambda y: -0.5 * (y - x) ** 2))
    ys = jnp.array([0.1, 0.2])
    assert jnp.isfinite(bi.kernels.particle_filter(0, model, ys, num_particles=8).log_evidence)
    with pytest.raises(ValueError, match=r"model.observation\(x, t\) has no sampler.*None"):
        bi.models.simulate(0, model, 2)


def test_classes_are_observed_as_they_are_simulated():
    laws = {
        "Categorical": lambda x: dist.Categorical(logits=jnp.array([0.0, 1.0, -1.0]) * x),
        "OrderedLogistic": lambda x: dist.OrderedLogistic(x, jnp.array([-1.0, 0.5])),
        "Bernoulli": lambda x: dist.Bernoulli(logits=x),
    }
    for law in laws.values():
        model = Observed(law)
        xs, ys = bi.models.simulate(0, model, 6)
        expected = [law(x).log_prob(y) for x, y in zip(xs, ys, strict=True)]
        found = [observation_log_prob(model, x, jnp.asarray(y, float), T0) for x, y in zip(xs, ys, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert observation_log_prob(model, xs[0], jnp.asarray(0.5), T0) == -jnp.inf
        assert jnp.isfinite(bi.kernels.particle_filter(0, model, ys, num_particles=8).log_evidence)
    ys = np.array([True, False, True])
    assert jnp.isfinite(bi.kernels.particle_filter(0, Observed(laws["Bernoulli"]), ys, num_particles=8).log_evidence)


def test_several_arrays_need_a_pair():
    with pytest.raises(ValueError, match=r"ys must be one array.*got dict"):
        bi.kernels.particle_filter(0, Observed(lambda x: dist.Normal(x, 1.0)), {"y": jnp.zeros(2)}, num_particles=4)


def test_whole_missing_rows_say_nothing():
    laws = [
        lambda x: dist.Normal(x, 1.0),
        lambda x: dist.Poisson(jnp.exp(x)),
        lambda x: dist.Gamma(jnp.exp(x), 1.0),
        lambda x: (None, lambda y: jnp.log(y) - x),
    ]
    for law in laws:
        model = Observed(law)
        assert observation_log_prob(model, jnp.asarray(0.3), jnp.asarray(jnp.nan), T0) == 0
        gradient = jax.grad(lambda x, model=model: observation_log_prob(model, x, jnp.asarray(jnp.nan), T0))(0.3)
        assert gradient == 0
    missing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), {"a": jnp.zeros(()), "b": jnp.zeros(2)})
    assert observation_log_prob(Regimes(), {"regime": jnp.asarray(1), "level": jnp.zeros(2)}, missing, T0) == 0


def test_independent_components_are_left_out_one_by_one():
    x, y = jnp.asarray(0.3), jnp.array([1.0, jnp.nan, 3.0])
    locs, scales = np.array([0.3, 1.3, 2.3]), np.array([1.0, 2.0, 0.5])
    expected = scipy.stats.norm(locs, scales).logpdf(np.array([1.0, 0.0, 3.0]))[[0, 2]].sum()
    batch = lambda x: dist.Normal(x + jnp.arange(3.0), jnp.asarray(scales))  # noqa: E731
    for law in (batch, lambda x: batch(x).to_event(1)):
        np.testing.assert_allclose(observation_log_prob(Observed(law), x, y, T0), expected, rtol=1e-6)
    counts = observation_log_prob(Observed(lambda x: dist.Poisson(jnp.exp(x) * jnp.ones(3)).to_event(1)), x, y, T0)
    np.testing.assert_allclose(counts, scipy.stats.poisson(np.exp(0.3)).logpmf([1, 3]).sum(), rtol=1e-5)


@pytest.mark.parametrize("there", [[0, 1, 2], [0, 2], [1], []])
def test_components_of_a_multivariate_normal_are_integrated_out(there):
    y = np.array([0.5, -1.0, 2.0])
    data = jnp.full(3, jnp.nan).at[jnp.array(there, int)].set(y[there])
    model = Observed(lambda x: dist.MultivariateNormal(x * jnp.array([1.0, 2.0, 3.0]), scale_tril=TRIL))
    mean = 0.3 * np.array([1.0, 2.0, 3.0])
    law = scipy.stats.multivariate_normal
    expected = law(mean[there], COVARIANCE[np.ix_(there, there)]).logpdf(y[there]) if there else 0.0
    value, gradient = jax.value_and_grad(lambda x: observation_log_prob(model, x, data, T0))(jnp.asarray(0.3))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    precision = np.linalg.inv(COVARIANCE[np.ix_(there, there)])
    np.testing.assert_allclose(gradient, np.array([1.0, 2, 3])[there] @ precision @ (y - mean)[there], rtol=1e-5)


def test_a_part_of_a_row_is_refused_where_its_density_is_unknown():
    student = Observed(lambda x: dist.MultivariateStudentT(4.0, x * jnp.ones(3), TRIL))
    ys = jnp.zeros((4, 3)).at[2, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"ys must be NaN in a whole row or in none of it.*rows \[2\]"):
        check_observations(student, ys)
    check_observations(student, ys.at[2].set(jnp.nan))
    check_observations(Observed(lambda x: dist.Normal(x * jnp.ones(3), 1.0)), ys)
    # unknown while traced: an invalid weight rather than a silent loss
    assert jnp.isnan(observation_log_prob(student, jnp.asarray(0.0), ys[2], T0))
    assert observation_log_prob(student, jnp.asarray(0.0), jnp.full(3, jnp.nan), T0) == 0
    pair = {"a": jnp.zeros(4).at[1].set(jnp.nan), "b": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        check_observations(Regimes(), pair)
    state = {"regime": jnp.asarray(1), "level": jnp.zeros(2)}
    assert jnp.isnan(observation_log_prob(Regimes(), state, jax.tree.map(lambda leaf: leaf[1], pair), T0))


def test_rows_of_another_shape_than_the_law_are_refused():
    model = Observed(lambda x: dist.Normal(x * jnp.ones(2), 1.0))
    with pytest.raises(ValueError, match=r"ys must have rows of shape \(2,\)"):
        observation_log_prob(model, jnp.asarray(0.0), jnp.asarray(1.0), T0)


def test_series_are_checked():
    assert check_series(jnp.arange(3)).dtype == jnp.zeros(()).dtype
    assert check_series({"a": np.zeros(3), "b": np.zeros((3, 2))})["b"].shape == (3, 2)
    with pytest.raises(ValueError, match="one leading axis of time"):
        check_series({"a": jnp.zeros(3), "b": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match="at least one row"):
        check_series(jnp.zeros((0, 2)))
    with pytest.raises(ValueError, match="empty pytree"):
        check_series({})
    with pytest.raises(ValueError, match=r"rows \[1\] are infinite"):
        check_series(jnp.array([0.0, jnp.inf]))
    with pytest.raises(ValueError, match="ys must be numbers"):
        check_series(jnp.array([1j, 2.0]))
    assert check_series(jnp.array([True, False])).tolist() == [1.0, 0.0]


class Laws(StateSpaceModel):
    """A model of given laws, each a function of the arguments of its method."""

    first: Callable = eqx.field(static=True)
    move: Callable = eqx.field(static=True)
    observe: Callable = eqx.field(static=True)

    def initial(self):
        return self.first()

    def transition(self, x_prev, t):
        return self.move(x_prev)

    def observation(self, x, t):
        return self.observe(x)


def _normal(x=0.0):
    return dist.Normal(x, 1.0)


TOTAL = bi.kernels.AdditiveFunctional(lambda x: 0.0, lambda x_prev, x, t: 0.0)
USES = {
    "simulate": lambda model, ys: bi.models.simulate(0, model, 4),
    "particle_filter": lambda model, ys: bi.kernels.particle_filter(0, model, ys, num_particles=4),
    "paris": lambda model, ys: bi.kernels.paris(0, model, ys, TOTAL, num_particles=4),
    "ConditionalSMC": lambda model, ys: bi.kernels.ConditionalSMC(model, ys, 4),
    "ParisianGibbs": lambda model, ys: bi.kernels.ParisianGibbs(model, ys, TOTAL, 4),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("laws", "match"),
    [
        ((_normal, lambda x: None, _normal), r"model.transition\(x_prev, t\) must return .* got NoneType"),
        ((_normal, _normal, lambda x: 0.5), r"model.observation\(x, t\) must return .* got float"),
        ((lambda: 3, _normal, _normal), r"model.initial\(\) must return .* got int"),
        ((_normal, lambda x: _normal(jnp.stack([x, x])), _normal), r"must draw states of the shape"),
        ((lambda: dist.Delta(0), _normal, _normal), "which would be cut off"),
    ],
)
def test_laws_that_do_not_fit_are_named(use, laws, match):
    with pytest.raises(ValueError, match=match):
        USES[use](Laws(*laws), jnp.zeros(4))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("use", USES)
def test_a_class_is_no_model(use):
    with pytest.raises(ValueError, match="model must be an instance of a StateSpaceModel, got the class Laws"):
        USES[use](Laws, jnp.zeros(4))


@pytest.mark.parametrize(("of_law", "of_row"), [((2,), (2, 1)), ((2, 1), (2,)), ((3,), (1,)), ((1,), (3,))])
def test_rows_of_another_shape_are_refused(of_law, of_row):
    """Broadcasting would pair every component with every other one."""
    model = Laws(_normal, _normal, lambda x: dist.Normal(x, jnp.ones(of_law)).to_event(len(of_law)))
    with pytest.raises(ValueError, match="ys must have rows of shape"):
        bi.kernels.particle_filter(0, model, jnp.zeros((4, *of_row)), num_particles=4)


def test_a_single_number_may_lack_an_axis():
    scalar = Laws(_normal, _normal, _normal)
    vector = Laws(_normal, _normal, lambda x: dist.Normal(x[None], 1.0).to_event(1))
    ys = jnp.array([0.3, -0.2, 1.0])
    results = [
        bi.kernels.particle_filter(0, model, rows, num_particles=8).log_evidence
        for model in (scalar, vector)
        for rows in (ys, ys[:, None])
    ]
    np.testing.assert_allclose(results, results[0], rtol=1e-6)


def test_a_list_of_numbers_is_a_series():
    assert bi.kernels.particle_filter(0, Laws(_normal, _normal, _normal), [0.1, 0.2], num_particles=4).ess.shape == (2,)
    with pytest.raises(ValueError, match="ys must be an array of numbers, got str"):
        bi.kernels.particle_filter(0, Laws(_normal, _normal, _normal), "abc", num_particles=4)


def test_weights_that_are_none_are_counted_everywhere():
    def observe(x):
        return (lambda key: x, lambda y: jnp.where(jnp.abs(x) > 1, jnp.nan, -0.5 * (y - x) ** 2))

    model, ys = Laws(_normal, lambda x: dist.Normal(0.5 * x, 1.0), observe), jnp.zeros(6)
    total = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    with pytest.warns(bi.errors.SamplingWarning, match="counted as weights of zero, first at time step"):
        assert bi.kernels.paris(0, model, ys, total, num_particles=50).num_invalid.sum() > 0
    with pytest.warns(bi.errors.SamplingWarning, match="counted as weights of zero, first at sweep"):
        bi.kernels.ppg(0, model, ys, total, num_particles=50, num_sweeps=3, burn_in=1, initial_path=jnp.zeros(6))
    kernel = bi.kernels.ConditionalSMC(model, ys, 50)
    with pytest.warns(bi.errors.SamplingWarning, match="particle weights were NaN"):
        bi.sample(0, kernel, jnp.zeros((2, 6)), num_samples=3, progress=False)


@pytest.mark.parametrize("threshold", [-0.1, 5.0, float("nan"), "a"])
@pytest.mark.usefixtures("unchecked")
def test_thresholds_are_shares(threshold):
    for function in (
        partial(bi.kernels.particle_filter, num_particles=4),
        partial(bi.kernels.paris, functional=TOTAL, num_particles=4),
    ):
        with pytest.raises(ValueError, match=r"ess_threshold must lie in \[0, 1\]"):
            function(0, Laws(_normal, _normal, _normal), jnp.zeros(3), ess_threshold=threshold)


@pytest.mark.parametrize("value", [-0.3, float("nan"), float("inf")])
def test_scales_of_a_linear_model_are_checked(value):
    with pytest.raises(ValueError, match="observation_tril must be"):
        bi.models.LinearGaussian.scalar(0.5, 1.0, 1.0, value)


def test_a_list_of_any_numbers_is_a_series():
    found = check_series([np.float32(1.0), 2, None, 3.5])
    np.testing.assert_array_equal(found, [1.0, 2.0, np.nan, 3.5])
