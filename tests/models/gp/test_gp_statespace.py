"""The O(n) solver against dense algebra: values, gradients, predictions, paths, missing data."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.models import gp

RNG = np.random.default_rng(2)
TIMES = jnp.asarray(np.concatenate([RNG.uniform(0.0, 10.0, 38), [3.0, 3.0]]))  # neither sorted nor distinct
Y = jnp.sin(TIMES) + jnp.asarray(0.1 * RNG.normal(size=40))
EXACT = gp.dense(jitter=0.0)

KERNELS = {
    "Matern12": lambda scale: 2.0 * gp.Matern12(scale),
    "Matern32": lambda scale: gp.Matern32(scale),
    "Matern52": lambda scale: gp.Matern52(scale),
    "sum": lambda scale: gp.Matern32(scale) + 0.5 * gp.Matern12(2.0 * scale) + 1.0,
    "product with a periodic one": lambda scale: gp.Matern32(scale) * gp.Periodic(1.3, period=2.0 * scale),
}


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_grad(name, solver, y, lengthscale, noise, mean):
    def value(lengthscale, noise, mean):
        times = jnp.asarray(np.asarray(TIMES), jnp.float64)
        return gp.GP(KERNELS[name](lengthscale), times, mean=mean, noise=noise, solver=solver).log_prob(y)

    return jax.value_and_grad(value, (0, 1, 2))(lengthscale, noise, mean)


def parameters():
    return jnp.asarray(1.1), jnp.asarray(0.1), jnp.asarray(0.3)


@pytest.mark.parametrize("name", list(KERNELS))
def test_value_and_gradient_are_those_of_dense_algebra(name):
    """A11, at irregular and repeated times; the periodic kernel is cut off where double precision does not see it."""
    y = Y.astype(float)
    expected, slopes = value_and_grad(name, EXACT, y, *parameters())
    found, found_slopes = value_and_grad(name, gp.statespace(parallel=False, order=14), y, *parameters())
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(found_slopes, slopes, rtol=1e-8)


@pytest.mark.skipif(importlib.util.find_spec("tinygp") is None, reason="needs tinygp")
@pytest.mark.parametrize(
    ("name", "peer", "variance"),
    [("Matern12", "Exp", 2.0), ("Matern32", "Matern32", 1.0), ("Matern52", "Matern52", 1.0)],
)
def test_value_and_gradient_are_those_of_tinygp(name, peer, variance):
    """A11, of its quasiseparable solver, which is another algorithm in O(n) and wants times in order."""
    import tinygp

    order = np.argsort(TIMES)

    @jax.jit
    def quasiseparable(lengthscale, noise, mean):
        kernel = variance * getattr(tinygp.kernels.quasisep, peer)(scale=lengthscale)
        times = jnp.asarray(np.asarray(TIMES)[order], jnp.float64)
        process = tinygp.GaussianProcess(kernel, times, mean=mean, diag=noise * jnp.ones(40))
        return process.log_probability(Y.astype(float)[order])

    expected, slopes = jax.value_and_grad(quasiseparable, (0, 1, 2))(*parameters())
    found, found_slopes = value_and_grad(name, gp.statespace(parallel=False, order=14), Y.astype(float), *parameters())
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(found_slopes, slopes, rtol=1e-8)


@pytest.mark.parametrize(
    "name", ["Matern12", "Matern32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Matern52", "sum"))]
)
def test_the_associative_scan_is_the_sequential_one(name):
    """A11 in parallel, with missing data; the gradient of its value."""
    y = Y.astype(float).at[3].set(jnp.nan)
    expected, slopes = value_and_grad(name, gp.statespace(parallel=False), y, *parameters())
    found, found_slopes = value_and_grad(name, gp.statespace(parallel=True), y, *parameters())
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(found_slopes, slopes, rtol=1e-8)


@pytest.mark.parametrize("name", ["Matern52", "sum"])
def test_missing_data_are_left_out(name):
    y = Y.astype(float).at[jnp.array([0, 7])].set(jnp.nan)
    keep = np.isfinite(np.asarray(y))
    process = gp.GP(KERNELS[name](1.1), TIMES.astype(float), noise=0.1, solver=gp.statespace())
    rest = gp.GP(KERNELS[name](1.1), TIMES.astype(float)[keep], noise=0.1, solver=EXACT)
    np.testing.assert_allclose(process.log_prob(y), rest.log_prob(y[keep]), rtol=1e-10)
    new = jnp.array([-1.0, 3.0, 5.5, 12.0])
    for found, expected in (
        (process.condition(y, new), rest.condition(y[keep], new)),
        (process.condition(y, new, full_cov=True), rest.condition(y[keep], new, full_cov=True)),
    ):
        np.testing.assert_allclose(found.mean, expected.mean, atol=1e-10)
        np.testing.assert_allclose(found.variance, expected.variance, atol=1e-7)
    student = gp.StudentTProcess(2.0, 3.0, KERNELS[name](1.1), TIMES.astype(float), noise=0.1, solver=gp.statespace())
    expected = gp.StudentTProcess(2.0, 3.0, KERNELS[name](1.1), TIMES.astype(float)[keep], noise=0.1, solver=EXACT)
    np.testing.assert_allclose(student.log_prob(y), expected.log_prob(y[keep]), rtol=1e-10)


@pytest.mark.parametrize("kind", ["GP", "StudentTProcess"])
def test_series_that_miss_different_data(kind):
    """Predicted each by itself, in any shape; one joint covariance cannot serve them."""
    prior = {} if kind == "GP" else {"a": 2.0, "b": 3.0}
    times, new = TIMES.astype(float), jnp.array([5.5, 12.0])
    process = getattr(gp, kind)(kernel=gp.Matern32(1.1), X=times, noise=0.1, solver=gp.statespace(), **prior)
    y = jnp.stack([Y.astype(float).at[i : 5 * i].set(jnp.nan) for i in range(6)])
    one_by_one = [process.condition(row, new) for row in y]
    for shape in ((6,), (2, 3), (6, 1)):
        found = process.condition(y.reshape(*shape, 40), new)
        assert found.batch_shape == (*shape, 2)
        for name in ("mean", "variance"):
            expected = np.stack([getattr(law, name) for law in one_by_one]).reshape(*shape, 2)
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-10)

    with pytest.raises(ValueError, match="y must miss the same times"):
        process.condition(y, new, full_cov=True)
    traced = jax.jit(lambda y: process.condition(y, new, full_cov=True).mean)
    assert np.isnan(traced(y)).any(axis=1).tolist() == [False] + 5 * [True]
    alike = y.at[:, 3:9].set(jnp.nan)[:2].at[:, 1:3].set(0.5).at[1].add(1.0)
    found = process.condition(alike, new, full_cov=True)
    expected = [process.condition(row, new, full_cov=True).mean for row in alike]
    np.testing.assert_allclose(found.mean, np.stack(expected), rtol=1e-10)


def test_paths_have_the_covariance_of_the_process():
    """L of the filter is the Cholesky factor of the sorted covariance; so draws are exact."""
    process = gp.GP(KERNELS["Matern52"](1.1), TIMES.astype(float), noise=0.1, solver=gp.statespace())
    factor = process.factor.sqrt_matvec(jnp.eye(40))
    expected = gp.Matern52(1.1)(TIMES.astype(float)) + 0.1 * jnp.eye(40)
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-12)
    draws = process.sample(jax.random.key(0), (20_000,))
    products = np.asarray(draws[:, :1] * draws[:, :5])
    assert mean_p_value(products, np.asarray(expected[0, :5])) > FALSE_ALARM


def test_float32_on_a_dense_grid():
    """Ten thousand points at 1/1000 of the length scale, where forming the noise of a transition loses all digits."""
    n = 10_000
    times, noise = np.arange(n) / 1000.0, np.random.default_rng(3).normal(size=n)
    y = np.sin(times) + 0.3 * noise
    values = []
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            process = gp.GP(
                gp.Matern52(jnp.asarray(1.0, dtype)), jnp.asarray(times, dtype), noise=0.09, solver=gp.statespace()
            )
            values.append(float(process.log_prob(jnp.asarray(y, dtype))))
    # a sum of n terms of order one, each known to sqrt(n) roundings
    assert abs(values[0] - values[1]) < n * np.sqrt(n) * float(jnp.finfo(jnp.float32).eps)


def test_works_in_a_shard_map():
    """Parameters spread over devices: density and draws."""
    mesh = jax.make_mesh((1,), ("chains",), axis_types=(jax.sharding.AxisType.Auto,))

    def told(lengthscale):
        process = gp.GP(gp.Matern32(lengthscale), TIMES.astype(float), noise=0.1, solver=gp.statespace(parallel=False))
        return process.log_prob(Y), process.sample(jax.random.key(0))

    spec, scales = jax.sharding.PartitionSpec("chains"), jnp.array([0.5, 1.0])
    found = jax.jit(jax.shard_map(jax.vmap(told), mesh=mesh, in_specs=spec, out_specs=spec))(scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, jax.jit(jax.vmap(told))(scales))


def test_batches_are_made_by_vmap():
    def build(lengthscale):
        return gp.GP(gp.Matern32(lengthscale), TIMES.astype(float), noise=0.1, solver=gp.statespace())

    batch = jax.vmap(build)(jnp.array([0.5, 1.0]))
    expected = [build(lengthscale).log_prob(Y) for lengthscale in (0.5, 1.0)]
    np.testing.assert_allclose(batch.log_prob(Y), expected, rtol=1e-10)
    assert batch.sample(jax.random.key(0), (3,)).shape == (3, 2, 40)
    with pytest.raises(ValueError, match="y must have at most the axes"):
        batch.condition(jnp.zeros((3, 2, 40)), TIMES)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: gp.GP(gp.RBF(), TIMES, solver=gp.statespace()), "kernel must be made of Matern12"),
        (lambda: gp.GP(gp.Matern32(), jnp.ones((3, 2)), solver=gp.statespace()), "X must be times"),
        (lambda: gp.GP(gp.Matern32(jnp.ones((2, 1))), TIMES, solver=gp.statespace()), "lengthscale must be one number"),
        (lambda: gp.statespace(parallel="yes"), "parallel must be one of"),
        (lambda: gp.statespace(order=0), "order must be at least 1"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
