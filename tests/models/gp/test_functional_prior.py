"""Priors of networks matched to processes: the distance, networks whose best parameters are known, and posteriors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy.stats import multivariate_normal, norm, t

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import gp, nngp
from bayesinf.models.gp.functional_prior import drawn_divergence

TRUTH = np.log([1.5, 0.6])  # variances of the weights of the two layers
GOAL = gp.BayesianNetwork(nngp.erf(), 1, 32, np.exp(TRUTH), [0.5, 0.3])


def inputs(key):
    return jax.random.uniform(key, (12, 2), minval=-2.0, maxval=2.0)


def start():
    return gp.BayesianNetwork(nngp.erf(), 1, 32, 1.0, 1.0)


def parameters(network):
    return jnp.concatenate([network.log_w_var, network.log_b_var])


EXPECTED = np.asarray(parameters(GOAL))


def test_the_distance_is_its_formula():
    with jax.enable_x64(True):
        A, B = (M @ M.T + np.eye(5) for M in np.random.default_rng(0).normal(size=(2, 5, 5)))
        root = scipy.linalg.sqrtm(A)
        expected = np.trace(A + B - 2.0 * scipy.linalg.sqrtm(root @ B @ root).real)
        found = gp.bures_distance(jnp.asarray(A), jnp.asarray(B))
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # jitter, sqrt(eps) of the variances


def test_the_gram_matrix_is_that_of_the_functions():
    """With one hidden layer at any width, over 4000 functions."""
    X = inputs(jax.random.key(3))[:3]
    f = np.asarray(jax.jit(jax.vmap(lambda key: GOAL.sample(key, X)))(jax.random.split(jax.random.key(4), 4000)))
    products = f[:, :, None] * f[:, None, :]
    z = (products.mean(axis=0) - GOAL.gram(X)) / (products.std(axis=0) / 4000**0.5)
    assert 2 * t(3999).sf(np.max(np.abs(z))) * 9 > FALSE_ALARM


def test_the_closed_form_finds_the_network_that_the_process_is_of():
    with jax.enable_x64(True):
        goal = gp.BayesianNetwork(nngp.erf(), 1, 32, np.exp(TRUTH), [0.5, 0.3])
        wide = gp.BayesianNetwork(nngp.erf(), 1, 32, np.ones(2), np.ones(2))
        kernel = nngp.serial(
            nngp.dense(jnp.exp(TRUTH[0]), 0.5), nngp.activation(nngp.erf()), nngp.dense(jnp.exp(TRUTH[1]), 0.3)
        )
        found = gp.match_prior(0, wide, kernel, inputs, num_functions=None)
        np.testing.assert_allclose(parameters(found.network), parameters(goal), atol=1e-4)


def kernel_of_goal():
    w, b = jnp.exp(GOAL.log_w_var), jnp.exp(GOAL.log_b_var)
    return nngp.serial(nngp.dense(w[0], b[0]), nngp.activation(nngp.erf()), nngp.dense(w[1], b[1]))


def test_the_divergence_of_draws_has_slope_zero_at_the_truth():
    """24 functions at 12 inputs, 300 times: without its correction it would pull the variances down."""
    wide = gp.BayesianNetwork(nngp.erf(), 1, 256, np.exp(TRUTH), [0.5, 0.3])  # Gaussian enough

    def one(key):
        return jax.grad(lambda n: drawn_divergence(key, n, kernel_of_goal(), inputs, 24))(wide)

    found = jax.jit(lambda keys: jax.lax.map(lambda key: parameters(one(key)), keys))(
        jax.random.split(jax.random.key(6), 300)
    )
    z = found.mean(axis=0) / (found.std(axis=0) / 300**0.5)
    assert 2 * t(299).sf(np.max(np.abs(z))) * EXPECTED.size > FALSE_ALARM


class Shifted(eqx.Module):
    """One value, normal about this mean."""

    mean: jax.Array

    def sample(self, key, X):
        return self.mean + jax.random.normal(key, X.shape[:1])


def test_the_critic_finds_the_distance():
    """Of N(4, 1) and N(0, 1): W = 4, where a linear critic is best, of the slope s that maximises s W - 10 (s - 1)^2.

    The gap it sees is s W at new draws. That it may be 2 % off besides is a judgement, of 300 steps.
    """
    found = gp.match_prior(
        3,
        Shifted(jnp.asarray(4.0)),
        gp.Constant(1.0),
        lambda key: jnp.zeros(1),
        method="wasserstein",
        num_functions=1000,
        num_steps=1,
        critic_steps=300,
        critic_width=32,
    )
    slope = 1 + 4 / 20
    deviation = slope * np.sqrt(2 / 1000)
    excess = abs(float(found.losses[0]) - slope * 4) - 0.02 * slope * 4
    assert 2 * norm.sf(excess / deviation) > FALSE_ALARM, found.losses
    assert found.network.mean < 4.0


SMALL = {"num_functions": 64, "num_steps": 60, "critic_steps": 30, "critic_width": 32}


@pytest.mark.parametrize("sizes", [SMALL, pytest.param({}, marks=pytest.mark.slow)], ids=["small", "default"])
def test_the_critic_finds_the_scale(sizes):
    """What the last layer's weights are multiplied with, from five times too large a variance.

    That the distance falls to a tenth is a judgement: the critic leaves noise of the order of its learning rate.
    """
    target = kernel_of_goal()
    far = gp.BayesianNetwork(nngp.erf(), 1, 32, [1.5, 3.0], [0.5, 1.5])
    found = gp.match_prior(1, far, target, inputs, method="wasserstein", **sizes)
    X = inputs(jax.random.key(9))
    distances = [float(gp.bures_distance(one.gram(X), GOAL.gram(X))) for one in (far, found.network)]
    assert found.losses.shape == (sizes.get("num_steps", 200),)
    assert distances[1] < 0.1 * distances[0], distances


def test_the_posterior_is_its_formula():
    X, y = np.asarray(inputs(jax.random.key(5))), np.ones(12, np.float32)
    weights = GOAL.sample_weights(0, X)
    residual = y - np.asarray(GOAL.evaluate(weights, X))
    expected = -0.5 * sum(float(jnp.sum(w**2)) for w in weights.values())
    expected += multivariate_normal(cov=0.2 * np.eye(12)).logpdf(residual)
    target = GOAL.target(X, y, noise=0.2)
    np.testing.assert_allclose(target.logdensity(weights), expected, rtol=1e-4)
    assert isinstance(target, bi.Target)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("dual must", lambda: gp.BayesianNetwork(jnp.tanh)),
        ("depth must", lambda: gp.BayesianNetwork(nngp.erf(), 0)),
        ("b_var must be finite", lambda: gp.BayesianNetwork(nngp.erf(), b_var=0.0)),
        ("w_var must be a number", lambda: gp.BayesianNetwork(nngp.erf(), 1, 32, np.ones(3))),
        ("y must have", lambda: GOAL.target(np.ones(4), np.ones(3), noise=1.0)),
        ("noise must", lambda: GOAL.target(np.ones(4), np.ones(4), noise=0.0)),
        ("method must", lambda: gp.match_prior(0, GOAL, gp.RBF(), inputs, method="mmd")),
        ("num_functions must", lambda: gp.match_prior(0, GOAL, gp.RBF(), inputs, num_functions=1)),
        (
            "num_functions must",
            lambda: gp.match_prior(0, GOAL, gp.RBF(), inputs, method="wasserstein", num_functions=None),
        ),
        ("sample_inputs must", lambda: gp.match_prior(0, GOAL, gp.RBF(), lambda: 0)),
        ("network must", lambda: gp.match_prior(0, nngp.erf(), gp.RBF(), inputs)),
    ],
)
def test_bad_arguments_are_named(message, make, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
