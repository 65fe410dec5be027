"""Elliptical slice sampling: its law, where it ends, what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance, mean_p_value

MEAN = jnp.array([1.0, -2.0])
TRIL = jnp.array([[1.0, 0.0], [0.6, 0.5]])


def gumbel(x, y):
    """Of y - sum x a Gumbel law: skewed, and it couples the coordinates."""
    z = y - jnp.sum(x)
    return -z - jnp.exp(-z)


def run(kernel, start, num_steps, num_chains=1, key=0):
    def chain(key):
        def move(state, t):
            state, info = kernel.step(jax.random.fold_in(key, t), state)
            return state, (state.position, info)

        return jax.lax.scan(move, kernel.init(start), jnp.arange(num_steps))[1]

    positions, infos = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(key), num_chains))
    return np.asarray(positions), infos


@pytest.mark.parametrize("tril", [TRIL, jnp.array([1.5, 0.2])], ids=["dense", "diagonal"])
def test_posterior_of_a_gaussian_likelihood(tril):
    """y | x ~ N(x_0 + x_1, 0.7^2) has a Gaussian posterior: means and all second moments, at stationarity."""
    kernel = kernels.EllipticalSlice(lambda x, y: -0.5 * ((y - jnp.sum(x)) / 0.7) ** 2, MEAN, tril, jnp.asarray(1.5))
    factor = np.asarray(tril if tril.ndim == 2 else jnp.diag(tril), np.float64)
    prior = factor @ factor.T
    gain = prior @ np.ones(2) / (np.ones(2) @ prior @ np.ones(2) + 0.49)
    mean = np.asarray(MEAN) + gain * (1.5 - np.sum(MEAN))
    covariance = prior - np.outer(gain, prior @ np.ones(2))

    x = run(kernel, MEAN, 40, num_chains=8_000)[0][:, -1].astype(np.float64) - mean
    products = np.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], axis=1)
    expected = np.array([0.0, 0.0, covariance[0, 0], covariance[0, 1], covariance[1, 1]])
    assert mean_p_value(np.concatenate([x, products], axis=1), expected) > FALSE_ALARM


class ForgottenMean(kernels.EllipticalSlice):
    """Turns the ellipse about the origin, though the prior has a mean."""

    def step(self, key, state):
        moved, info = kernels.EllipticalSlice(
            lambda x, data: data[0].logdensity(x), 0.0, self.prior_tril, (self.likelihood,)
        ).step(key, state)
        return moved, info


@pytest.mark.parametrize("kind", [kernels.EllipticalSlice, ForgottenMean])
def test_prior_is_invariant_only_with_its_mean(kind):
    """Under a flat likelihood; a wrong twin is found out."""

    def draw(key):
        return MEAN + TRIL @ jax.random.normal(key, (2,))

    kernel = kind(lambda x: 0.0 * jnp.sum(x), MEAN, TRIL)
    p_value = exact_start_invariance(0, kernel, draw, num_chains=5_000, num_steps=2).p_value
    assert (p_value > FALSE_ALARM) == (kind is kernels.EllipticalSlice)


def log_gammas(x):
    """x_0 and x_1 - x_0 independent logarithms of Gamma(3) variables."""
    return 3.0 * x[1] - jnp.exp(x[0]) - jnp.exp(x[1] - x[0])


def relative(x, target):
    """A density over that of N(0, I)."""
    return target.logdensity(x) + 0.5 * jnp.sum(x**2)


def slice_on(target, size=1):
    return kernels.EllipticalSlice(relative, 0.0, jnp.ones(size), target)


class StaleSlice(kernels.EllipticalSlice):
    """Goes on with the likelihood of where it was, though another kernel has moved the chain."""

    is_memoryless = False


GAMMAS = bi.Target(log_gammas)
MALA = kernels.MALA(GAMMAS, 0.5)


@pytest.mark.parametrize(
    ("kernel", "is_right"),
    [
        (kernels.Cycle([slice_on(GAMMAS, 2), MALA], target=GAMMAS), True),
        (kernels.Gibbs({(0,): slice_on, (1,): MALA}), True),
        (kernels.Gibbs({(0,): lambda target: StaleSlice(relative, 0.0, jnp.ones(1), target), (1,): MALA}), False),
    ],
    ids=["Cycle", "Gibbs", "stale"],
)
def test_in_a_composition_it_sees_where_the_others_have_moved(kernel, is_right):
    def draw(key):
        first, second = jnp.log(jax.random.exponential(key, (2, 3)).sum(axis=1))
        start = jnp.stack([first, first + second])
        return list(start) if isinstance(kernel, kernels.Gibbs) else start

    p_value = exact_start_invariance(0, kernel, draw, num_chains=10_000, num_steps=10).p_value
    assert (p_value > FALSE_ALARM) == is_right


@pytest.mark.parametrize("elsewhere", [-jnp.inf, jnp.nan, jnp.inf])
def test_a_likelihood_of_one_point_ends_there(elsewhere):
    """The bracket shrinks to nothing, or ends at once; BlackJAX alone would go on for ever, or move to the NaN.

    The mean is far away, so that the point itself is not met again: (0.1 - 1000) + 1000 is not 0.1.
    """
    point = jnp.full(2, 0.1)
    kernel = kernels.EllipticalSlice(
        lambda x, point: jnp.where(jnp.all(x == point), 0.0, elsewhere), 1_000.0, jnp.ones(2), point
    )
    positions, infos = run(kernel, point, 5)
    np.testing.assert_array_equal(positions[0], np.tile(point, (5, 1)))
    assert not np.any(infos.is_accepted)
    if np.isneginf(elsewhere):
        assert not np.any(infos.is_divergent)
        assert 10 < np.max(infos.num_evaluations) < 1_000
    else:
        assert np.all(infos.is_divergent)
        assert np.all(infos.num_evaluations == 1)


def test_a_height_that_rounds_to_the_likelihood_ends():
    """A number of this size is known to 64: log u is lost, and no point is strictly higher than the present one."""
    depth = 64 / jnp.finfo(float).eps
    kernel = kernels.EllipticalSlice(lambda x: -depth * (1 + 1_000 * jnp.sum(x**2)), 0.0, jnp.ones(2))
    positions, infos = run(kernel, jnp.zeros(2), 5)
    np.testing.assert_array_equal(positions, 0.0)
    assert np.max(infos.num_evaluations) < 10_000


def test_a_region_without_density_is_never_entered_and_nan_is_counted():
    """On the half where it is finite, the law is the truncated prior's, whichever of the two the other half is."""
    means = []
    for outside in (-jnp.inf, jnp.nan):
        kernel = kernels.EllipticalSlice(
            lambda x, outside: jnp.where(x > 0, 0.0, outside), 0.0, jnp.ones(1), jnp.asarray(outside)
        )
        positions, infos = run(kernel, jnp.asarray(1.0), 30, num_chains=8_000)
        assert positions.min() > 0
        assert np.any(infos.is_divergent) == np.isnan(outside)
        x = positions[:, -1].astype(np.float64)
        means.append(mean_p_value(np.stack([x, x**2], axis=1), np.array([np.sqrt(2 / np.pi), 1.0])))
    assert min(means) > FALSE_ALARM


def test_evaluations_are_counted():
    """Under a flat likelihood the first point is taken."""
    _, infos = run(kernels.EllipticalSlice(lambda x: 0.0 * jnp.sum(x), MEAN, TRIL), MEAN, 10)
    assert np.all(infos.num_evaluations == 1)
    assert np.all(infos.num_gradients == 0)


def test_driver_refuses_a_bad_start():
    kernel = kernels.EllipticalSlice(lambda x: jnp.where(jnp.sum(x) > 5, jnp.nan, 0.0), 0.0, jnp.ones(2))
    with pytest.raises(bi.errors.InitializationError, match=r"chain 1 starts where .* The log likelihood is nan"):
        bi.sample(0, kernel, jnp.array([[0.0, 0.0], [3.0, 3.0]]), num_samples=5, progress=False)


def test_new_data_and_prior_compile_nothing():
    traces = itertools.count()

    def log_likelihood(x, y):
        next(traces)
        return gumbel(x, y)

    def go(y, mean, tril):
        kernel = kernels.EllipticalSlice(log_likelihood, mean, tril, y)
        return bi.sample(0, kernel, jnp.zeros((2, 2)), num_samples=20, progress=False)

    go(jnp.asarray(1.0), MEAN, TRIL)
    num_traces = next(traces)
    go(jnp.asarray(2.0), MEAN + 1, 2 * TRIL)
    assert next(traces) == num_traces + 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"log_likelihood": 3}, "log_likelihood must be a function"),
        ({"log_likelihood": lambda: 0.0}, r"log_likelihood must be called as log_likelihood\(position\)"),
        ({"prior_mean": jnp.zeros((2, 2))}, "prior_mean must have shape"),
        ({"prior_mean": jnp.array([0.0, jnp.nan])}, "prior_mean must be finite"),
        ({"prior_mean": jnp.zeros(3)}, "prior_mean must be over the ravelled position, of length 2"),
        ({"prior_tril": jnp.ones((2, 3))}, "prior_tril must have shape"),
        ({"prior_tril": jnp.ones((2, 2))}, "prior_tril must be lower triangular"),
        ({"prior_tril": -jnp.eye(2)}, "the diagonal of prior_tril must be finite and positive"),
        ({"prior_tril": jnp.ones(3)}, "prior_tril must be over the ravelled position, of length 2"),
    ],
)
def test_bad_arguments_are_named(changes, match):
    arguments = {"log_likelihood": lambda x: jnp.sum(x), "prior_mean": 0.0, "prior_tril": jnp.ones(2), **changes}
    with pytest.raises(ValueError, match=match):
        kernels.EllipticalSlice(**arguments).init(jnp.zeros(2))
