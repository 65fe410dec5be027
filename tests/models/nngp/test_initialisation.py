"""The edge of chaos by its definition and by tables, and sparse activations that stay stable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_moments import expectation
from scipy.special import erf
from scipy.stats import norm

from bayesinf.models import nngp


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def variance_map(f, kinks, w_var, b_var):
    return lambda q: b_var + w_var * expectation(f, f, kinks, q, q, q)


def derivative(f, x, step=1e-4):
    """Central differences of fourth order: f^(5) 1e-16 / 30, and rounding over 1e-4."""
    return (8 * (f(x + step) - f(x - step)) - (f(x + 2 * step) - f(x - 2 * step))) / (12 * step)


def test_rectifiers_and_erf_have_closed_forms():
    edge = nngp.edge_of_chaos(nngp.relu(), q_star=3.0)
    assert (float(edge.w_var), float(edge.b_var), float(edge.chi1), bool(edge.is_stable)) == (2.0, 0.0, 1.0, False)
    assert abs(nngp.edge_of_chaos(nngp.leaky_relu(0.5)).w_var - 2 / 1.25) <= 1e-15
    for q in (0.25, 1.0, 4.0):
        edge = nngp.edge_of_chaos(nngp.erf(), q_star=q)
        w_var = math.pi * math.sqrt(1 + 4 * q) / 4
        assert abs(edge.w_var - w_var) <= 1e-14
        assert abs(edge.b_var - (q - w_var * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)))) <= 1e-14
        assert edge.is_stable
        moved = variance_map(erf, (), float(edge.w_var), float(edge.b_var))
        assert abs(moved(q) - q) <= 1e-12
        assert abs(edge.v_prime - derivative(moved, q)) <= 1e-9


@jax.jit
def after_layers(dual, w_var, b_var, q):
    return jax.lax.fori_loop(0, 60, lambda _, q: b_var + w_var * dual.v(q), q)


@pytest.mark.parametrize("tau", [0.5, 1.25])
def test_sparse_activations_are_only_half_stable(tau):
    """V' = chi = 1 and V'' > 0: from below variances come back, from above they run away."""
    for dual, sides in ((nngp.shifted_relu(tau), 1), (nngp.soft_threshold(tau), 2)):
        edge = nngp.edge_of_chaos(dual)
        assert abs(edge.chi1 - 1) <= 1e-12
        assert abs(edge.v_prime - 1) <= 1e-9
        assert abs(edge.v_prime - edge.w_var * sides * norm.sf(tau)) <= 1e-12
        # V'' = w d/dq sides Phi(-tau / sqrt q)
        assert abs(edge.v_second - edge.w_var * sides * norm.pdf(tau) * tau / 2) <= 1e-9
        assert not edge.is_stable
        low, high = after_layers(dual, edge.w_var, edge.b_var, jnp.array([0.98, 1.02]))
        assert 0.98 < low < 1.0
        assert high > 1.02


TABLE = [  # Price et al.'s way, evaluated apart from this code: height, weights, biases for V'(1) = .5, .7, .9
    ("relu", 0.70, [(1.051, 4.125, 0.465), (1.447, 3.628, 0.393), (2.054, 3.389, 0.346)]),
    ("relu", 0.85, [(0.810, 8.507, 0.660), (1.170, 7.335, 0.595), (1.739, 6.791, 0.551)]),
    ("soft", 0.85, [(0.673, 8.670, 0.755), (1.002, 7.388, 0.699), (1.534, 6.800, 0.658)]),
]


@pytest.mark.parametrize(("kind", "sparsity", "rows"), TABLE)
def test_clipping_makes_them_stable(kind, sparsity, rows):
    for v_prime, row in zip((0.5, 0.7, 0.9), rows, strict=True):
        init = nngp.sparse_init(kind, sparsity, v_prime)
        # the table has three decimals
        assert np.allclose(
            (init.clip, init.w_var, init.b_var), row, rtol=0, atol=0.0006 + 5e-4 * np.array(row).max() / 8
        )
        edge = nngp.edge_of_chaos(init.dual)
        assert abs(edge.w_var - init.w_var) <= 1e-9
        assert abs(edge.b_var - init.b_var) <= 1e-9
        assert abs(edge.v_prime - v_prime) <= 1e-9
        assert edge.is_stable
        zeros = norm.cdf(init.tau) if kind == "relu" else norm.cdf(init.tau) - norm.cdf(-init.tau)
        assert abs(zeros - sparsity) <= 1e-12


def test_the_slope_by_differences_of_quadrature():
    init = nngp.sparse_init("soft", 0.7, 0.8)

    def phi(x):
        return np.sign(x) * np.clip(np.abs(x) - init.tau, 0, init.clip)

    kinks = [sign * (init.tau + step) for sign in (-1, 1) for step in (0, init.clip)]
    moved = variance_map(phi, kinks, init.w_var, init.b_var)
    assert abs(moved(1.0) - 1) <= 1e-12
    assert abs(derivative(moved, 1.0) - 0.8) <= 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.edge_of_chaos(nngp.relu(), q_star=0.0), "q_star"),
        (lambda: nngp.edge_of_chaos(nngp.cos()), "room for biases"),
        (lambda: nngp.edge_of_chaos(np.tanh), "dual must be"),
        (lambda: nngp.sparse_init("hard", 0.5), "kind"),
        (lambda: nngp.sparse_init("relu", 1.0), "sparsity"),
        (lambda: nngp.sparse_init("relu", 0.5, 1.0), "v_prime"),
    ],
)
def test_bad_arguments_are_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
