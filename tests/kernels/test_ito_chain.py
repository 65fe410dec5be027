"""Ito chains against closed forms of their moments; Rademacher signs against fair coins."""

import functools
import math

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.ito_chain import signs

ETA, NUM_CHAINS = 0.2, 100_000


def run(kernel, num_steps, start):
    """The positions of independent chains after some steps."""
    return closed_forms.run(kernel, start, num_steps, NUM_CHAINS).position


def constant(value):
    """A diffusion that does not depend on the position."""
    return lambda x: value


# a drift b(x) = -A x and a diffusion that mixes the coordinates

A = np.array([[1.0, -0.8], [0.3, 0.6]])
SIGMA = np.array([[1.0, 0.4], [-0.5, 0.7]])


def fourth_moments(kurtosis, sigma=SIGMA, num_steps=3):
    """Mean, second and fourth central moments after some steps from (1, -1), for components of this excess kurtosis.

    The chain is a sum of independent noises, so that its cumulants are sums.
    """
    power, mean = np.eye(2) - ETA * A, np.array([1.0, -1.0])
    covariance, cumulant = np.zeros((2, 2)), np.zeros((2,) * 4)
    for k in range(num_steps):
        L = np.linalg.matrix_power(power, k) @ sigma * np.sqrt(ETA)
        covariance += L @ L.T
        cumulant += kurtosis * np.einsum("ai,bi,ci,di->abcd", L, L, L, L)
    pairings = [
        np.einsum(f"{p},{q}->abcd", covariance, covariance) for p, q in (("ab", "cd"), ("ac", "bd"), ("ad", "bc"))
    ]
    return np.linalg.matrix_power(power, num_steps) @ mean, covariance, cumulant + sum(pairings)


def linear_p_values(x, moments):
    """Of mean, covariance and fourth moments."""
    mean, covariance, fourth = moments
    z = np.asarray(x, np.float64) - mean
    return {
        "mean": mean_p_value(z, 0.0),
        "covariance": mean_p_value(
            np.einsum("na,nb->nab", z, z).reshape(-1, 4)[:, [0, 1, 3]], covariance[[0, 0, 1], [0, 1, 1]]
        ),
        "fourth": mean_p_value(
            np.stack([z[:, 0] ** 4, z[:, 1] ** 4, z[:, 0] ** 2 * z[:, 1] ** 2, z[:, 0] ** 3 * z[:, 1]], 1),
            fourth[[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        ),
    }


@pytest.mark.parametrize(("noise", "kurtosis", "other"), [("gaussian", 0.0, -2.0), ("rademacher", -2.0, 0.0)])
def test_moments_of_a_linear_chain(noise, kurtosis, other):
    """The fourth moments tell the noises apart, mean and covariance do not."""
    kernel = kernels.ItoChain(
        lambda x, data: -data[0] @ x, lambda x, data: data[1], noise, step_size=ETA, data=(A, SIGMA)
    )
    x = run(kernel, 3, jnp.array([1.0, -1.0], jnp.float32))
    assert min(linear_p_values(x, fourth_moments(kurtosis)).values()) > FALSE_ALARM
    wrong = linear_p_values(x, fourth_moments(other))
    assert wrong["fourth"] < FALSE_ALARM < min(wrong["mean"], wrong["covariance"])
    # a matrix that is transposed, a step that is not a square root
    assert linear_p_values(x, fourth_moments(kurtosis, SIGMA.T))["covariance"] < FALSE_ALARM
    assert linear_p_values(x, fourth_moments(kurtosis, np.sqrt(ETA) * SIGMA))["covariance"] < FALSE_ALARM


def test_it_is_langevin_monte_carlo():
    def logdensity(x):
        return -0.25 * jnp.sum(x["a"] ** 4) - 0.5 * (x["b"] - x["a"][0]) ** 2

    lmc = kernels.LMC(bi.Target(logdensity), 0.1)
    kernel = kernels.ItoChain(jax.grad(logdensity), constant(math.sqrt(2)), step_size=0.1)
    x = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
    ours, theirs = kernel.init(x), lmc.init(x)
    for k in range(5):
        ours, info = kernel.step(jax.random.key(k), ours)
        theirs, _ = lmc.step(jax.random.key(k), theirs)
        for leaf in "ab":
            np.testing.assert_allclose(ours.position[leaf], theirs.position[leaf], rtol=1e-5)
    assert int(info.num_gradients) == 1


@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_moments_of_geometric_brownian_motion(noise, exponent):
    """X' = X (1 + eta b + s eps),  s = eta^((1 + gamma) / 2) sigma:  E X_K^p = x_0^p (E (1 + eta b + s eps)^p)^K."""
    b, sigma, num_steps, x_0 = 0.7, 0.5, 4, 1.3
    kernel = kernels.ItoChain(lambda x: b * x, lambda x: sigma * x, noise, step_size=ETA, exponent=exponent)
    x = np.asarray(run(kernel, num_steps, jnp.asarray(x_0, jnp.float32)), np.float64)

    def exact(s):
        m = 1 + ETA * b
        factors = np.array([m, m**2 + s**2, m**3 + 3 * m * s**2])
        return x_0 ** np.arange(1, 4) * factors**num_steps

    powers = x[:, None] ** np.arange(1, 4)
    assert mean_p_value(powers, exact(ETA ** ((1 + exponent) / 2) * sigma)) > FALSE_ALARM
    for wrong in (ETA * sigma, ETA ** ((1 + 0.5 - exponent) / 2) * sigma):
        assert mean_p_value(powers, exact(wrong)) < FALSE_ALARM


def test_an_inexact_drift_has_noise_of_its_own():
    """Independent of eps: variances add, eta^2 r^2 + eta."""
    r = 2.0

    def drift(x, *, key):
        return -x + r * jax.random.normal(key, x.shape)

    kernel = kernels.ItoChain(drift, constant(1.0), step_size=ETA)
    x = np.asarray(run(kernel, 3, jnp.asarray(1.0, jnp.float32)), np.float64)
    m = 1 - ETA
    total = sum(m ** (2 * k) for k in range(3))
    assert mean_p_value(x, m**3) > FALSE_ALARM
    assert mean_p_value((x - m**3) ** 2, total * (ETA**2 * r**2 + ETA)) > FALSE_ALARM
    # one key for both, the noise of the drift forgotten
    for wrong in ((ETA * r + ETA**0.5) ** 2, ETA):
        assert mean_p_value((x - m**3) ** 2, total * wrong) < FALSE_ALARM


def test_a_noise_of_the_users_own():
    """Skewed, and the more so the larger x: third moments follow."""

    def noise(key, x):
        # of mean 0 and variance 1: p - 1 with probability 1 - p or p, over sqrt(p (1 - p))
        p = jnp.where(x > 1, 0.1, 0.6)
        return (jax.random.bernoulli(key, p, x.shape) - p) / jnp.sqrt(p * (1 - p))

    kernel = kernels.ItoChain(lambda x: -x, constant(1.0), noise, step_size=ETA)
    for start, p in ((0.5, 0.6), (2.0, 0.1)):
        z = np.asarray(run(kernel, 1, jnp.asarray(start, jnp.float32)), np.float64) - (1 - ETA) * start
        powers = z[:, None] ** np.arange(1, 4)
        third = ETA**1.5 * (1 - 2 * p) / math.sqrt(p * (1 - p))
        assert mean_p_value(powers, np.array([0.0, ETA, third])) > FALSE_ALARM
        assert mean_p_value(powers, np.array([0.0, ETA, third + 0.5 * ETA**1.5])) < FALSE_ALARM


def test_scalar_diagonal_and_matrix_are_one_diffusion():
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[0.5]])}
    forms = [0.3, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.3), x), 0.3 * jnp.eye(3)]
    for noise in ("gaussian", "rademacher"):
        built = [kernels.ItoChain(lambda x: x, constant(form), noise, step_size=0.1) for form in forms]
        moved = [kernel.step(jax.random.key(0), kernel.init(x))[0].position for kernel in built]
        for other in moved[1:]:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), other, moved[0])


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_signs_of_any_length(size):
    for dtype in (jnp.float32, jnp.float16):
        drawn = signs(jax.random.key(0), {"a": jnp.zeros(size, dtype), "b": jnp.zeros((), dtype)})
        assert drawn["a"].shape == (size,)
        assert drawn["b"].shape == ()
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(drawn))
        assert set(np.unique(drawn["a"])) <= {-1.0, 1.0}


def test_signs_are_fair_and_independent():
    """Every bit of two and a half words: means, products of all pairs, and runs of five as one of 32 patterns."""
    drawn = np.asarray(jax.vmap(lambda key: signs(key, jnp.zeros(80)))(jax.random.split(jax.random.key(2), 20_000)))
    assert mean_p_value(drawn, 0.0) > FALSE_ALARM
    first, second = np.triu_indices(80, 1)
    products = drawn.T @ drawn / np.sqrt(len(drawn))  # standard normal in the limit, for independent signs
    p_values = 2 * scipy.stats.norm.sf(np.abs(products[first, second]))
    assert p_values.min() * p_values.size > FALSE_ALARM

    patterns = ((drawn[:, :80].reshape(-1, 5) > 0) @ 2 ** np.arange(5)).astype(int)
    assert scipy.stats.chisquare(np.bincount(patterns, minlength=32)).pvalue > FALSE_ALARM


def test_it_is_sampled_without_a_target():
    kernel = kernels.ItoChain(lambda x, a: -a * x, lambda x, a: 1.0, "rademacher", step_size=0.1, data=jnp.asarray(1.0))
    draws = bi.sample(0, kernel, jnp.zeros((200, 1)), num_samples=20, num_warmup=100, thin=60, progress=False)
    x = np.asarray(draws.samples)[..., 0]
    assert mean_p_value(x, 0.0) > FALSE_ALARM
    # rho = 1 - eta a:  the stationary variance is eta / (1 - rho^2)
    assert mean_p_value(x**2, 0.1 / (1 - 0.9**2)) > FALSE_ALARM


def test_new_data_compile_nothing():
    def drift(x, a):
        return -a * x

    def diffusion(x, a):
        return a

    built = [
        kernels.ItoChain(drift, diffusion, step_size=0.1 * a, exponent=0.1 * a, data=jnp.asarray(a)) for a in (1.0, 2.0)
    ]
    assert closed_forms.num_programs(built, jnp.ones(2)) == 1


def test_what_is_not_finite_is_undone():
    kernel = kernels.ItoChain(lambda x: jnp.where(x > 0, jnp.inf, 0.0), constant(1.0), step_size=0.1)
    for start, is_ok in ((-1.0, True), (1.0, False)):
        state, info = kernel.step(jax.random.key(0), kernel.init(jnp.asarray(start)))
        assert bool(info.is_accepted) == (not bool(info.is_divergent)) == is_ok == bool(state.position != start)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": 0.0}, "step_size must be finite and positive"),
        ({"exponent": 1.5}, r"exponent must lie in \[0, 1\]"),
        ({"noise": "uniform"}, "noise must be one of 'gaussian', 'rademacher'"),
        ({"drift": 1.0}, "drift must be a function"),
        ({"diffusion": 1.0}, "diffusion must be a function"),
        ({"drift": lambda x, rate: -rate * x}, r"drift must be called as drift\(position\), but it has \(x, rate\)"),
        ({"drift": lambda x, key: x, "data": 1.0}, r"drift must be called as drift\(position, data\)"),
        ({"noise": lambda key: 1.0}, r"noise must be called as noise\(key, position\)"),
        ({"diffusion": lambda: 1.0}, r"diffusion must be called as diffusion\(position\)"),
        ({"drift": lambda x: x[:1]}, r"drift must return a pytree like the position, with shapes \(2,\)"),
        ({"noise": lambda key, x: x[0]}, "noise must return a pytree like the position"),
        ({"diffusion": lambda x: jnp.ones((2, 3))}, r"a matrix of shape \(2, 2\); got shapes \(2, 3\)"),
    ],
)
def test_bad_arguments(change, message):
    given = {"drift": lambda x: -x, "diffusion": constant(1.0), "noise": "gaussian", "step_size": 0.1} | change
    with pytest.raises(ValueError, match=message):
        kernels.ItoChain(**given).init(jnp.zeros(2))
