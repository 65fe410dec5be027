"""Tiles make the whole matrix, in bounded memory, on one device and on two."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bayesinf.models import gp, nngp

KERNEL = nngp.NNGP(nngp.relu(), 3, 1.75, 0.25)
X = jnp.asarray(np.sin(1.0 + np.arange(37 * 3) ** 1.25).reshape(37, 3), jnp.float32)


def close(found, expected):
    """Of sums whose order may differ: the inner products of three features."""
    return np.max(np.abs(found - expected)) <= 32 * np.finfo(np.float32).eps * np.max(np.abs(expected))


@pytest.mark.parametrize("block", [8, 37])
def test_tiles_make_the_matrix(block):
    assert close(nngp.gram(KERNEL, X, block=block), KERNEL(X))
    assert close(nngp.gram(KERNEL, X[:11], X, block=block), KERNEL(X[:11], X))
    assert np.array_equal(np.diagonal(nngp.gram(KERNEL, X, block=block)), KERNEL.diagonal(X))


def test_large_matrices_of_a_kernel_are_whole():
    many = jnp.asarray(np.sin(1.0 + np.arange(600 * 2) ** 1.25).reshape(600, 2), jnp.float32)
    linear = nngp.serial(nngp.dense(2.0, 0.5))
    expected = 0.5 + many @ many.T
    assert close(linear(many), expected)
    assert close(linear(many, many[:5]), expected[:, :5])


def test_any_function_of_two_sets_of_inputs_is_a_kernel():
    assert close(nngp.gram(lambda X1, X2: X1 @ X2.T, X, block=10), X @ X.T)


def test_gradients_pass():
    weights = X @ X[::-1].T
    whole, tiled = (
        jax.grad(lambda kernel, X, make=make: jnp.sum(weights * make(kernel, X)), (0, 1))(KERNEL, X)
        for make in (lambda kernel, X: kernel(X), lambda kernel, X: nngp.gram(kernel, X, block=16))
    )
    for found, expected in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected))


@pytest.mark.parametrize("name", ["network", "combined", "kernel of a plain function"])
def test_memory_is_the_result_and_eight_tiles(name):
    """A block of 20,000 x 2,000 entries, 160 MB in float32, by the bound of the docstring: 8 tiles of 1 MB besides."""
    dtype = jnp.zeros(()).dtype
    kernel = {
        "network": KERNEL,
        "combined": 2.0 * KERNEL + gp.Linear(),
        "kernel of a plain function": lambda X1, X2: jnp.tanh(X1 @ X2.T) ** 2 + jnp.exp(X1 @ X2[:, ::-1].T),
    }[name]
    shapes = (jax.ShapeDtypeStruct((n, 5), dtype) for n in (20_000, 2_000))
    analysis = jax.jit(lambda X1, X2: nngp.gram(kernel, X1, X2)).lower(*shapes).compile().memory_analysis()
    assert analysis.output_size_in_bytes == 20_000 * 2_000 * dtype.itemsize
    assert analysis.temp_size_in_bytes <= 8 * 512 * 512 * dtype.itemsize


def test_one_device_by_name():
    mesh = jax.make_mesh((1,), ("rows",))
    found = nngp.gram(KERNEL, X, block=8, sharding=NamedSharding(mesh, PartitionSpec("rows")))
    assert close(found, KERNEL(X))


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from bayesinf.models import nngp
assert jax.device_count() == 2
kernel = nngp.NNGP(nngp.relu(), 3, 1.75, 0.25)
X = jax.random.normal(jax.random.key(0), (20, 3))
sharding = NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec("rows"))
for X2 in (None, X[:7]):
    found = nngp.gram(kernel, X, X2, block=4, sharding=sharding)
    assert found.sharding.is_equivalent_to(sharding, 2), found.sharding
    assert np.allclose(found, kernel(X, X2), rtol=1e-5)
"""


def test_rows_are_spread_over_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nngp.gram(KERNEL, X, block=0), "block"),
        (lambda: nngp.gram(KERNEL, X[:0]), "at least one input"),
        (lambda: nngp.gram(KERNEL, X.at[3, 1].set(jnp.nan)), "X1 must not be NaN"),
        (lambda: nngp.gram(3.0, X), "kernel"),
        (
            lambda: nngp.gram(KERNEL, X, sharding=NamedSharding(jax.make_mesh((1,), ("rows",)), PartitionSpec())),
            "spreads the first axis",
        ),
    ],
)
def test_bad_arguments_are_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
