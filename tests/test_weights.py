import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bayesinf import weights

NONE = jnp.array([-jnp.inf, jnp.nan, jnp.inf, -jnp.inf])


@pytest.fixture
def log_weights():
    return 5.0 * jax.random.normal(jax.random.key(0), (3, 40)) + jnp.array([[0.0], [500.0], [-500.0]])


def test_log_mean_exp_log_sum_exp_and_ess_are_their_formulas(log_weights):
    exact = np.asarray(log_weights, np.float64)
    np.testing.assert_allclose(
        weights.log_mean_exp(log_weights), scipy.special.logsumexp(exact, axis=1) - np.log(40), rtol=1e-5, atol=1e-5
    )
    for axis in (0, 1):
        expected = scipy.special.logsumexp(exact, axis=axis)
        np.testing.assert_allclose(weights.log_sum_exp(log_weights, axis), expected, rtol=1e-5, atol=1e-5)
    w = scipy.special.softmax(exact, axis=1)
    np.testing.assert_allclose(weights.ess(log_weights), 1 / (w**2).sum(1), rtol=1e-4)
    np.testing.assert_allclose(weights.ess(log_weights.T, axis=0), weights.ess(log_weights), rtol=1e-5)


def test_normalize_sums_to_one_and_gives_the_mean(log_weights):
    log_normalized, log_mean = weights.normalize(log_weights)
    np.testing.assert_allclose(jnp.exp(log_normalized).sum(1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(log_mean, weights.log_mean_exp(log_weights), rtol=1e-6)
    np.testing.assert_allclose(log_normalized + log_mean[:, None] + np.log(40), log_weights, rtol=1e-5, atol=1e-4)


def test_ess_of_equal_weights_is_their_number_at_any_scale():
    assert weights.ess(jnp.full(1_000_000, -700.0)) == 1_000_000
    assert weights.ess(jnp.array([0.0, -jnp.inf, 0.0])) == 2
    assert weights.ess(jnp.array([0.0, -200.0])) == 1


def test_nan_and_plus_infinity_are_no_weights_and_are_counted():
    log_weights = jnp.array([0.0, jnp.nan, jnp.inf, -jnp.inf, 0.0])
    assert weights.num_invalid(log_weights) == 2
    assert weights.ess(log_weights) == 2
    assert weights.log_mean_exp(log_weights) == pytest.approx(np.log(2 / 5))
    log_normalized, _ = weights.normalize(log_weights)
    np.testing.assert_allclose(jnp.exp(log_normalized), [0.5, 0, 0, 0, 0.5], rtol=1e-6)
    assert not weights.is_degenerate(log_weights)


def test_no_weight_left_gives_no_nan():
    assert weights.is_degenerate(NONE)
    assert weights.ess(NONE) == 0
    assert weights.log_mean_exp(NONE) == -jnp.inf
    assert weights.log_sum_exp(NONE) == -jnp.inf
    log_normalized, log_mean = weights.normalize(NONE)
    assert jnp.all(log_normalized == -jnp.inf)
    assert log_mean == -jnp.inf


@pytest.mark.parametrize(
    "function", [weights.ess, weights.log_mean_exp, weights.log_sum_exp, lambda x: weights.normalize(x)[1]]
)
@pytest.mark.parametrize("x", [NONE, jnp.array([0.0, -jnp.inf, jnp.nan, 1.0])])
def test_gradients_are_finite(function, x):
    gradient = jax.grad(function)(x)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.all(jnp.where(jnp.isfinite(x), True, gradient == 0))


def test_gradient_of_log_mean_exp_is_the_weight(log_weights):
    np.testing.assert_allclose(
        jax.grad(weights.log_mean_exp)(log_weights[0]), jax.nn.softmax(log_weights[0]), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("num", [1, 100_001])
def test_compensated_sum_is_exact_in_float32(num):
    rng = np.random.default_rng(num)
    x = (rng.standard_normal((num, 2)) * 10.0 ** rng.integers(-3, 5, (num, 2))).astype(np.float32)
    for function in (weights.compensated_sum, jax.jit(weights.compensated_sum)):
        total = function(jnp.asarray(x))
        assert total.dtype == jnp.float32
        np.testing.assert_allclose(total, x.astype(np.float64).sum(0), rtol=1e-7)


def test_compensated_sum_survives_cancellation_and_propagates_infinities():
    x = jnp.array([1e8, 1.0, -1e8, 1e-3], jnp.float32)
    assert weights.compensated_sum(x) == jnp.float32(1.001)
    assert weights.compensated_sum(jnp.array([1.0, -jnp.inf, 2.0])) == -jnp.inf
    assert jnp.isnan(weights.compensated_sum(jnp.array([1.0, jnp.nan])))
    np.testing.assert_array_equal(weights.compensated_sum(jnp.zeros((0, 2))), jnp.zeros(2))


def test_compensated_sum_is_differentiable_in_every_mode():
    def square(x):
        return weights.compensated_sum(x**2)

    x = jnp.arange(5.0)
    for gradient in (jax.grad(square), jax.jit(jax.grad(square)), jax.jacfwd(square)):
        np.testing.assert_allclose(gradient(x), 2 * x)
    np.testing.assert_allclose(jax.vmap(jax.grad(square))(jnp.stack([x, -x])), 2 * jnp.stack([x, -x]))


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_pareto_k_of_pareto_weights(k):
    log_weights = k * np.random.default_rng(0).standard_exponential(100_000) - 300
    # 949 tail values: the standard error of the fit is (1 + k) / sqrt(949)
    assert weights.pareto_k(log_weights) == pytest.approx(k, abs=5 * (1 + k) / np.sqrt(949))


def test_pareto_k_at_the_edges():
    assert weights.pareto_k(jnp.zeros(1000)) == -np.inf
    assert weights.pareto_k(jnp.where(jnp.arange(1000) < 10, 0.0, -jnp.inf)) == np.inf
    assert weights.pareto_k(jnp.array([])) == np.inf


@pytest.mark.usefixtures("unchecked")
def test_lists_are_weights_and_nothing_is_none():
    assert weights.ess([0, 0]) == 2
    assert weights.num_invalid([0.0, jnp.nan]) == 1
    assert not weights.is_degenerate([0.0, -jnp.inf])
    np.testing.assert_allclose(weights.normalize([0.0, 0.0])[0], -jnp.log(2), rtol=1e-6)
    for function in (weights.ess, weights.normalize, weights.log_mean_exp):
        with pytest.raises(ValueError, match=r"must hold at least one weight, got shape \(0,\)"):
            function(jnp.zeros(0))
    with pytest.raises(ValueError, match="log_weights must be a number or an array of numbers, got 'heavy'"):
        weights.ess("heavy")
