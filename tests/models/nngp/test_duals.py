"""Duals against brute-force quadrature, in both precisions, and their derivatives, also where inputs coincide."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_moments import expectation
from scipy.special import erf, ndtr

from bayesinf.models import nngp


class Case(NamedTuple):
    """A dual, with what NumPy says its activation and the slope of that are."""

    make: object
    phi: object
    slope: object
    kinks: tuple = ()


def normal(x):
    return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


def pieces(knots, slopes):
    return lambda x: np.asarray(slopes)[np.searchsorted(knots, x)]


CASES = {
    "relu": Case(nngp.relu, lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0), (0,)),
    "leaky_relu": Case(
        lambda: nngp.leaky_relu(0.25), lambda x: np.where(x > 0, x, x / 4), lambda x: np.where(x > 0, 1, 0.25), (0,)
    ),
    "abs": Case(nngp.abs_, np.abs, np.sign, (0,)),
    "erf": Case(nngp.erf, erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2))),
    "gelu": Case(nngp.gelu, lambda x: x * ndtr(x), lambda x: ndtr(x) + x * normal(x)),
    "sin": Case(nngp.sin, np.sin, np.cos),
    "cos": Case(nngp.cos, np.cos, lambda x: -np.sin(x)),
    "identity": Case(lambda: nngp.monomial(1), lambda x: x, np.ones_like),
    "cube": Case(lambda: nngp.monomial(3), lambda x: x**3, lambda x: 3 * x**2),
    "piecewise": Case(
        lambda: nngp.piecewise_linear([-1.0, 0.5, 2.0], [0.25, 1.0, -0.5, 0.25], intercept=0.5),
        lambda x: np.interp(x, [-101, -1, 0.5, 2, 102], [-25.5, -0.5, 1.0, 0.25, 25.25]),
        pieces([-1, 0.5, 2], [0.25, 1.0, -0.5, 0.25]),
        (-1, 0.5, 2),
    ),
    "shifted_relu": Case(
        lambda: nngp.shifted_relu(0.5), lambda x: np.maximum(x - 0.5, 0), lambda x: 1.0 * (x > 0.5), (0.5,)
    ),
    "shifted_left": Case(
        lambda: nngp.shifted_relu(-0.5, 2.0),
        lambda x: np.clip(x + 0.5, 0, 2),
        lambda x: 1.0 * (abs(x - 0.5) < 1),
        (-0.5, 1.5),
    ),
    "soft_threshold": Case(
        lambda: nngp.soft_threshold(1.0, 1.5),
        lambda x: np.sign(x) * np.clip(np.abs(x) - 1, 0, 1.5),
        lambda x: 1.0 * (np.abs(np.abs(x) - 1.75) < 0.75),
        (-2.5, -1, 1, 2.5),
    ),
    "soft_unclipped": Case(
        lambda: nngp.soft_threshold(0.5),
        lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
        lambda x: 1.0 * (np.abs(x) > 0.5),
        (-0.5, 0.5),
    ),
    "numerical_gelu": Case(
        lambda: nngp.numerical(lambda x: jax.nn.gelu(x, approximate=False)),
        lambda x: x * ndtr(x),
        lambda x: ndtr(x) + x * normal(x),
    ),
    "numerical_tanh": Case(lambda: nngp.numerical(jnp.tanh, terms=256), np.tanh, lambda x: 1 / np.cosh(x) ** 2),
}

# variances and covariances: independent, moderate, nearly and wholly dependent, of either sign and unequal scale
TRIPLES = np.array(
    [
        [1.0, 1.0, 0.25],
        [2.0, 0.5, -0.75],
        [4.0, 0.125, 0.0],
        [0.75, 0.75, 0.75 * (1 - 2.0**-10)],
        [1.5, 1.5, 1.5 * (1 - 2.0**-18)],
        [1.25, 1.25, 1.25],
        [1.25, 1.25, -1.25],
        [1.0, 0.25, 0.5],
        [1.0, 0.25, -0.5 * (1 - 2.0**-12)],
    ]
)


ROUNDING = {"float64": 1e-13, "float32": 1e-5}


@jax.jit
def values(dual, q, p, c):
    def gradient(*x):
        return jax.grad(dual.k, (0, 1, 2))(*x)

    return dual.k(q, p, c), dual.kdot(q, p, c), dual.v(q), dual.vdot(q), jax.vmap(gradient)(q, p, c)


@pytest.fixture(scope="module", params=list(CASES))
def computed(request):
    """The case, and its values in float64 and in float32."""
    case, found = CASES[request.param], {}
    for dtype in ROUNDING:
        with jax.enable_x64(dtype == "float64"):
            found[dtype] = values(case.make(), *(jnp.asarray(column, dtype) for column in TRIPLES.T))
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found[dtype]))
            found[dtype] = jax.tree.map(np.asarray, found[dtype])
    return case, found


def errors(found, expected):
    return np.max(np.abs(found - expected) / np.maximum(1.0, np.abs(expected)))


def test_covariances_equal_quadrature(computed):
    case, found = computed
    expected = [expectation(case.phi, case.phi, case.kinks, *triple) for triple in TRIPLES]
    for dtype, bound in ROUNDING.items():
        assert errors(found[dtype][0], expected) <= bound


def test_slopes_equal_quadrature(computed):
    case, found = computed
    expected = np.array([expectation(case.slope, case.slope, case.kinks, *triple) for triple in TRIPLES])
    for dtype, bound in ROUNDING.items():
        # the slope of a kinked activation is as ill-conditioned as the angle, whose cosine is rounded
        q, p, c = TRIPLES.T
        width = np.sqrt(np.maximum(1 - c**2 / (q * p), 0))
        slack = np.where(width == 0, 0, np.finfo(dtype).eps * 8 / np.where(width == 0, 1, width)) if case.kinks else 0
        assert np.all(np.abs(found[dtype][1] - expected) <= np.maximum(1, np.abs(expected)) * (bound + slack))


def test_variances_are_covariances_with_oneself(computed):
    case, found = computed
    for dtype, bound in ROUNDING.items():
        for moment, function in ((2, case.phi), (3, case.slope)):
            expected = [expectation(function, function, case.kinks, q, q, q) for q in TRIPLES[:, 0]]
            assert errors(found[dtype][moment], expected) <= bound


def test_derivatives_are_those_of_price(computed):
    """By central differences of the quadrature, and on the diagonal of the closed form of the variance."""
    case, found = computed
    for index in range(3):  # where the correlation is moderate, so that steps stay admissible
        triple, step = TRIPLES[index], 1e-4 * np.eye(3)
        for i in range(3):
            ahead, behind = (expectation(case.phi, case.phi, case.kinks, *(triple + s * step[i])) for s in (1, -1))
            # differences err by the third derivative times 1e-8 / 6, and by rounding over 1e-4
            assert abs(found["float64"][4][i][index] - (ahead - behind) / 2e-4) <= 1e-6 * max(1, abs(ahead))
            assert abs(found["float32"][4][i][index] - found["float64"][4][i][index]) <= 1e-5 * max(1, abs(ahead))
    coinciding = 5
    q = TRIPLES[coinciding, 0]
    ahead, behind = (expectation(case.phi, case.phi, case.kinks, *([q + s * 1e-4] * 3)) for s in (1, -1))
    for dtype in ROUNDING:
        along = sum(gradient[coinciding] for gradient in found[dtype][4])
        assert abs(along - (ahead - behind) / 2e-4) <= (1e-6 if dtype == "float64" else 1e-5) * max(1, abs(ahead))
        assert all(np.all(np.isfinite(gradient)) for gradient in found[dtype][4])


def test_second_derivatives_are_finite_where_inputs_coincide(computed):
    case, _ = computed
    x = jnp.float32(1.25)
    assert np.all(np.isfinite(curved(case.make(), x, x, x)))


@jax.jit
def curved(dual, *x):
    return jax.grad(lambda *x: sum(jax.grad(dual.k, (0, 1, 2))(*x)), (0, 1, 2))(*x)
