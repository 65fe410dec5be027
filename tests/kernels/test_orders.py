"""Orders of the discretisations: how their errors fall as the step is halved.

Strong order: all step sizes are driven by one Brownian path, given to the kernels in place of their random numbers, and
the root mean square of X_h(T) - X_{h/2}(T) falls like h^p. Weak order: so does the bias of the stationary variance.
Orders are multiples of 1/2, and an estimate is taken for the nearest one.
"""

import itertools
from types import SimpleNamespace

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels

FRICTION, INVERSE_MASS, END, NUM_PATHS = 1.5, 0.8, 2.0, 400
STEP_SIZES = 2.0 ** -np.arange(2, 7)
CELLS = 16  # of the finest step
NUM_CELLS = round(END / STEP_SIZES[-1]) * CELLS
KINETIC = {"friction": FRICTION, "inverse_mass": INVERSE_MASS}
TARGET = bi.Target(lambda x: 0.2 * jnp.cos(2 * x) - 0.5 * x**2)


def splitting(word):
    return lambda h: kernels.Splitting(word, TARGET, h, **KINETIC)


# by name: the kernel, its strong order, and its weak order on Gaussians, where BAOAB has no bias at all
ORDERS = {
    "LMC": (lambda h: kernels.LMC(TARGET, h), 1.0, 1.0),
    "RandomizedMidpoint": (lambda h: kernels.RandomizedMidpoint(TARGET, h), 1.0, 3.0),
    "KineticLangevin": (lambda h: kernels.KineticLangevin(TARGET, h, **KINETIC), 1.0, 1.0),
    "RandomizedMidpointKinetic": (lambda h: kernels.RandomizedMidpointKinetic(TARGET, h, **KINETIC), 1.5, 3.0),
    "BAOAB": (splitting("BAOAB"), 1.0, None),
    "OBABO": (splitting("OBABO"), 1.0, 2.0),
    "UBU": (splitting("UBU"), 2.0, 2.0),
    "BUB": (splitting("BUB"), 2.0, 2.0),
    "BU, no palindrome": (splitting("BU"), 1.0, None),
}
DEFAULT = ("RandomizedMidpointKinetic", "BAOAB", "UBU", "BU, no palindrome")


class Path:
    """A Brownian path W of every chain, and the free flow (X, V) from rest that it drives, in cells of time; float64.

    Shapes (NUM_CELLS + 1, NUM_PATHS).
    """

    def __init__(self):
        rng, cell = np.random.default_rng(7), END / NUM_CELLS
        self.w = np.cumsum(np.vstack([np.zeros(NUM_PATHS), np.sqrt(cell) * rng.normal(size=(NUM_CELLS, NUM_PATHS))]), 0)
        factor = np.linalg.cholesky(closed_forms.free_covariance(cell, FRICTION, INVERSE_MASS))
        decay, reach = closed_forms.decay_and_reach(cell, FRICTION)
        self.x, self.v = np.zeros((2, NUM_CELLS + 1, NUM_PATHS))
        for i, noise in enumerate(rng.normal(size=(NUM_CELLS, 2, NUM_PATHS))):
            n_x, n_v = factor @ noise
            self.x[i + 1], self.v[i + 1] = self.x[i] + reach * self.v[i] + n_x, decay * self.v[i] + n_v

    def increment(self, start, end):
        """The standard normals of W between cells, each of shape (..., NUM_PATHS)."""
        time = (end - start) * END / NUM_CELLS
        return [(_at(self.w, end) - _at(self.w, start)) / np.sqrt(time)]

    def flow(self, start, end):
        """The standard normals (z_v, z_x) with which the free flow goes over this time."""
        time = (end - start) * END / NUM_CELLS
        decay, reach = closed_forms.decay_and_reach(time, FRICTION)
        n_v = _at(self.v, end) - decay * _at(self.v, start)
        n_x = _at(self.x, end) - _at(self.x, start) - reach * _at(self.v, start)
        (c_xx, c_xv), (_, c_vv) = closed_forms.free_covariance(time, FRICTION, INVERSE_MASS)
        return [n_v / np.sqrt(c_vv), (n_x - c_xv / c_vv * n_v) / np.sqrt(c_xx - c_xv**2 / c_vv)]


def _at(values, cells):
    return np.take_along_axis(values, cells, axis=0)


@pytest.fixture(scope="module")
def path():
    return Path()


def random_numbers(path, kernel, h):
    """What every step of the kernel asks for, on this path: normals (step, number, path) and uniforms (step, path)."""
    length, rng = round(h / END * NUM_CELLS), np.random.default_rng(round(1 / h))
    start = np.broadcast_to(np.arange(0, NUM_CELLS, length)[:, None], (NUM_CELLS // length, NUM_PATHS))
    # a midpoint in the middle of a pair of cells, which is uniform but for rounding
    middle = 2 * rng.integers(length // 2, size=start.shape) + 1
    if isinstance(kernel, kernels.Splitting):
        letters, normals, now = [a for a in kernel.word if a in "OU"], [], start
        for letter in letters:
            z_v, z_x = path.flow(now, now + length // len(letters))
            normals += [z_v] if letter == "O" else [z_v, z_x]
            now = now + length // len(letters)
    else:
        draw = path.flow if hasattr(kernel, "friction") else path.increment
        has_midpoint = isinstance(kernel, kernels.RandomizedMidpoint | kernels.RandomizedMidpointKinetic)
        times = [start, start + middle, start + length] if has_midpoint else [start, start + length]
        normals = [z for begin, end in itertools.pairwise(times) for z in draw(begin, end)]
    return jnp.asarray(np.stack(normals, 1), float), jnp.asarray(middle / length, float)


@pytest.fixture
def run(monkeypatch):
    """Runs a kernel on given random numbers; the last position of every path."""
    given = SimpleNamespace(normals=None, uniform=None)

    def normals(key, like, num):
        assert given.normals.shape == (num,)
        return list(given.normals)

    for module in ("langevin", "kinetic", "randomized_midpoint"):
        monkeypatch.setattr(f"bayesinf.kernels.{module}.normals", normals)
    monkeypatch.setattr(jax.random, "uniform", lambda key: given.uniform)

    def one_step(kernel, state, given_normals, given_uniform):
        given.normals, given.uniform = given_normals, given_uniform
        return kernel.step(jax.random.key(0), state)[0]

    @jax.jit
    def run(kernel, normals, uniforms):
        states = jax.vmap(kernel.init)(jnp.full(NUM_PATHS, 0.7))
        step = jax.vmap(one_step, in_axes=(None, 0, 1, 0))
        return jax.lax.scan(lambda s, row: (step(kernel, s, *row), None), states, (normals, uniforms))[0].position

    return run


def order(step_sizes, differences):
    return np.polyfit(np.log(step_sizes), np.log(differences), 1)[0]


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS]
)
def test_strong_order(name, path, run):
    make, expected, _ = ORDERS[name]
    ends = [np.asarray(run(make(h), *random_numbers(path, make(h), h)), np.float64) for h in STEP_SIZES]
    differences = [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.pairwise(ends)]
    found = order(STEP_SIZES[:-1], differences)
    assert abs(found - expected) < 0.25


@pytest.mark.parametrize("name", [name for name, (*_, weak) in ORDERS.items() if weak])
def test_weak_order_on_gaussians(name):
    make, _, expected = ORDERS[name]
    step_sizes = 2.0 ** -np.arange(3, 7)
    biases = [abs(kernels.gaussian_error(make(h), [1.3]).variance_bias[0]) for h in step_sizes]
    found = order(step_sizes, biases)
    assert abs(found - expected) < 0.25
