"""Networks of finite width against the moments that are exact at every width, and against the limit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from scipy.stats import norm

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import nngp

X = jnp.asarray([[1.0, 0.5, -0.5], [0.25, 1.0, 0.75]], jnp.float32)
LAWS = {
    "iid": nngp.iid(),
    "orthogonal": nngp.orthogonal(),
    "low_rank": nngp.low_rank(0.25),
    "block_sparse": nngp.block_sparse(8),
    "sparse": nngp.sparse(0.75),
}


@partial(jax.jit, static_argnames=("width", "num"))
def covariances(key, kernel, law, width, num):
    """Of the outputs given the hidden layers, in many networks one after the other."""

    def one(key):
        features = nngp.sample_features(key, kernel, X, width=width, law=law)
        return kernel.last_w_var * (kernel.b_var + kernel.w_var * features @ features.T / width)

    return jax.lax.map(one, jax.random.split(key, num))


def p_value(draws, expected):
    """Of the hypothesis that the mean is as expected, over all entries."""
    draws = np.asarray(draws, float).reshape(len(draws), -1)
    error = np.sqrt(draws.var(axis=0, ddof=1) / len(draws))
    z = (draws.mean(axis=0) - np.ravel(expected)) / error
    assert np.all(np.isfinite(z))
    return min(1.0, 2 * norm.sf(np.max(np.abs(z))) * z.size)


@pytest.mark.parametrize("name", ["relu", "erf", "piecewise"])
def test_one_hidden_layer_is_unbiased_at_any_width(name):
    dual = nngp.shifted_relu(0.5, 1.0) if name == "piecewise" else getattr(nngp, name)()
    kernel = nngp.NNGP(dual, 1, 1.5, 0.25, 0.5)
    assert p_value(covariances(jax.random.key(0), kernel, nngp.iid(), 16, 4000), kernel(X)) > FALSE_ALARM


@pytest.mark.parametrize("name", list(LAWS))
def test_all_laws_have_the_same_limit(name):
    """Of variances of ReLU networks at every width; of covariances up to 1 / width^2, by two widths."""
    kernel = nngp.NNGP(nngp.relu(), 2, 2.0, 0.25)
    key_narrow, key_wide = jax.random.split(jax.random.key(1))
    width, num = (32, 200) if name == "orthogonal" else (64, 800)  # factorisations take their time
    narrow = covariances(key_narrow, kernel, LAWS[name], width, num)
    wide = covariances(key_wide, kernel, LAWS[name], 2 * width, num)
    for draws in (narrow, wide):
        variances = jnp.diagonal(draws, axis1=1, axis2=2)
        assert p_value(variances, kernel.diagonal(X)) > FALSE_ALARM
    assert p_value(2 * wide - narrow, kernel(X)) > FALSE_ALARM


@pytest.mark.parametrize(("m", "n"), [(8, 4), (4, 8)])
def test_orthogonal_weights_of_any_shape(m, n):
    weights = np.asarray(nngp.orthogonal().sample(jax.random.key(5), m, n))
    inner = weights.T @ weights if m >= n else weights @ weights.T
    # entries have variance 1 / n: the squares of all of them add up to m
    assert np.allclose(inner, m / min(m, n) * np.eye(min(m, n)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAWS))
def test_wide_networks_of_all_laws(name):
    kernel = nngp.NNGP(nngp.relu(), 2, 2.0, 0.25)
    draws = covariances(jax.random.key(2), kernel, LAWS[name], 256, 1000)
    assert p_value(draws, kernel(X)) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "erf", "gelu"])
def test_twenty_thousand_networks_of_width_128(name):
    """A4: given the hidden layers outputs are Gaussian, so that only these are drawn.

    Of one hidden layer every entry is unbiased, and of ReLU networks of any depth the variances. What else deep
    networks have is biased by 1 / width, and by two widths only by 1 / width^2, 1e-4 beside standard errors of 1e-3.
    """
    kernel = nngp.NNGP(getattr(nngp, name)(), 1, 1.5, 0.25, 0.5)
    key_one, key_narrow, key_wide = jax.random.split(jax.random.key(6), 3)
    assert p_value(covariances(key_one, kernel, nngp.iid(), 128, 20_000), kernel(X)) > FALSE_ALARM
    deep = nngp.NNGP(kernel.dual, 3, 1.5, 0.25, 0.5)
    narrow = covariances(key_narrow, deep, nngp.iid(), 64, 20_000)
    wide = covariances(key_wide, deep, nngp.iid(), 128, 20_000)
    assert p_value(2 * wide - narrow, deep(X)) > FALSE_ALARM
    if name == "relu":
        assert p_value(jnp.diagonal(wide, axis1=1, axis2=2), deep.diagonal(X)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("depth", "width", "num"),
    [
        (1, 8, 6_000),
        (3, 32, 6_000),
        pytest.param(3, 8, 200_000, marks=pytest.mark.slow),  # of heavy tails
        *(pytest.param(*case, 20_000, marks=pytest.mark.slow) for case in ((1, 32), (1, 128), (3, 128))),
    ],
)
def test_excess_kurtosis_is_exact(depth, width, num):
    """A5: given the features f is Gaussian with variance v, so E f^4 = 3 E v^2, and E v is known."""
    kernel = nngp.NNGP(nngp.relu(), depth, 2.0, 0.0)
    variance = covariances(jax.random.key(3), kernel, nngp.iid(), width, num)[:, 0, 0]
    ratio = (variance / kernel.diagonal(X)[0]) ** 2
    assert p_value(3 * ratio - 3, nngp.excess_kurtosis(width, depth)) > FALSE_ALARM
    assert abs(nngp.excess_kurtosis(width, depth) / (3 * ((1 + 5 / width) ** depth - 1)) - 1) < 1e-5


def test_excess_kurtosis_of_other_activations():
    assert abs(float(nngp.excess_kurtosis([8, 16])) - 3 * ((1 + 5 / 8) * (1 + 5 / 16) - 1)) < 1e-5
    # |x|: E u^4 / (E u^2)^2 = 3
    assert abs(float(nngp.excess_kurtosis(10, dual=nngp.abs_())) - 0.6) < 1e-6
    cases = ((nngp.erf(), erf), (nngp.shifted_relu(0.5, 1.0), lambda x: np.clip(x - 0.5, 0, 1)))
    for dual, phi in cases:
        u = np.linspace(-12, 12, 2_400_001)
        weights = norm.pdf(u) * 1e-5
        square, fourth = (np.sum(weights * phi(1.5 * u) ** power) for power in (2, 4))
        expected = 3 / 32 * (fourth / square**2 - 1)
        assert abs(float(nngp.excess_kurtosis(32, dual=dual, variance=2.25)) / expected - 1) < 1e-5


@jax.jit
def outputs(key, kernel):
    return jax.lax.map(
        lambda key: nngp.sample_network(key, kernel, X, width=16, num_outputs=2), jax.random.split(key, 4000)
    )


@pytest.mark.parametrize("residual", [None, "plain", "scaled"])
def test_outputs_have_the_variance_of_the_kernel(residual):
    """Exactly, of ReLU networks, with biases and residual connections too."""
    kernel = nngp.NNGP(nngp.relu(), 3, 1.5, 0.25, 0.5, residual)
    draws = outputs(jax.random.key(4), kernel)
    assert draws.shape == (4000, 2, 2)
    assert p_value(draws**2, np.repeat(kernel.diagonal(X), 2)) > FALSE_ALARM
    assert p_value(draws, np.zeros(4)) > FALSE_ALARM


def test_the_edgeworth_density_has_these_moments():
    with jax.enable_x64(True):
        f = jnp.linspace(-30.0, 30.0, 60_001)
        density = jnp.exp(nngp.edgeworth_log_density(f, 2.0, 0.75))
        moments = [float(jnp.sum(f**m * density) * 1e-3) for m in (0, 2, 4)]
    assert np.allclose(moments, [1.0, 2.0, 4 * (3 + 0.75)], rtol=1e-12)


KERNEL = nngp.NNGP(nngp.relu(), 2, 2.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.sample_network(0, KERNEL, X, width=0), "width"),
        (lambda: nngp.sample_network(0, KERNEL, X, width=8, num_outputs=0), "num_outputs"),
        (
            lambda: nngp.sample_network(0, nngp.NNGP(nngp.relu(), 2, 2.0, 0.0, residual="ode"), X, width=8),
            "finite depth",
        ),
        (lambda: nngp.sample_network(0, 2.0 * KERNEL, X, width=8), "must be an NNGP, or layers"),
        (
            lambda: nngp.sample_features(0, nngp.NNGP(nngp.relu(), 2, 2.0, 0.0, residual="plain"), X, width=8),
            "residual",
        ),
        (lambda: nngp.sample_network(0, KERNEL, X, width=10, law=nngp.block_sparse(4)), "num_blocks"),
        (lambda: nngp.low_rank(0.0), "fraction"),
        (lambda: nngp.sparse(1.0), "sparsity"),
        (lambda: nngp.excess_kurtosis(8, 2, dual=nngp.erf()), "homogeneous"),
        (lambda: nngp.excess_kurtosis(0), "width"),
        (lambda: nngp.excess_kurtosis([8, 16], depth=3), "one for each of 3 hidden layers"),
        (lambda: nngp.excess_kurtosis([]), "one for each of 1 hidden layers"),
        (lambda: nngp.edgeworth_log_density(0.0, 1.0, 4.0), "less than 4"),
        (lambda: nngp.edgeworth_log_density(0.0, 0.0, 1.0), "variance"),
    ],
)
def test_bad_arguments_are_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
