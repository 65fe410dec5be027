"""Kernel matrices of infinitely wide networks: 2,000 inputs, four hidden layers, beside neural-tangents.

neural-tangents does not import under current JAX: NEURAL_TANGENTS_PYTHON is the interpreter of an environment that has
it, made as `tests/models/nngp/make_neural_tangents_values.py` says. It times itself, after a first call that compiles.
"""

import json
import os
import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models import nngp

NUM_INPUTS = int(os.environ.get("BENCH_NNGP_INPUTS", "2000"))
NUM_FEATURES, DEPTH = 10, 4
RIVAL = os.environ.get("NEURAL_TANGENTS_PYTHON")
INPUTS = np.sin(1.0 + np.arange(NUM_INPUTS * NUM_FEATURES) ** 1.25).reshape(NUM_INPUTS, NUM_FEATURES)

SERVER = """
import json, sys, time
from unittest.mock import MagicMock
for name in ("absl", "jax.experimental.jax2tf", "tensorflow", "tensorflow.keras", "tf2jax"):
    sys.modules[name] = MagicMock()
import jax, numpy as np
from neural_tangents import stax
num_inputs, num_features, depth = map(int, sys.argv[1:])
X = np.sin(1.0 + np.arange(num_inputs * num_features) ** 1.25).reshape(num_inputs, num_features).astype(np.float32)
activations = {"relu": stax.Relu(), "erf": stax.Erf(), "gelu": stax.Gelu()}
dense = stax.Dense(1, W_std=2.0**0.5, b_std=0.1**0.5)
kernels = {}
for line in sys.stdin:
    name, head = json.loads(line)
    if (name, head) not in kernels:
        kernel = stax.serial(dense, *[activations[name], dense] * depth)[2]
        kernels[name, head] = jax.jit(lambda X, kernel=kernel, head=head: kernel(X, None, head))
    start = time.perf_counter()
    matrix = jax.block_until_ready(kernels[name, head](X))
    print(json.dumps([time.perf_counter() - start, np.asarray(matrix[0, :5]).tolist()]), flush=True)
"""


@pytest.fixture(scope="module")
def rival():
    """Asks the other interpreter for a matrix: its seconds, and the first entries."""
    if RIVAL is None:
        yield None
        return
    arguments = [RIVAL, "-c", SERVER, *map(str, (NUM_INPUTS, NUM_FEATURES, DEPTH))]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(name, head):
            process.stdin.write(json.dumps([name, head]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("head", ["nngp", "ntk"])
@pytest.mark.parametrize("name", ["relu", "erf", "gelu"])
def bench_gram(compare, rival, name, head):
    X = jnp.asarray(INPUTS, jnp.float32)
    kernel = nngp.NNGP(getattr(nngp, name)(), DEPTH, 2.0, 0.1, head=head)
    calls = {"whole": lambda: kernel(X), "tiles of 512, one triangle": lambda: nngp.gram(kernel, X)}
    if rival is not None:
        calls["neural-tangents"] = lambda: rival(name, head)[0]

    def note(row, medians):
        return f"{medians[row] / medians['whole']:.2f} x whole"

    compare(f"{head} of {name}, n={NUM_INPUTS:,}, {DEPTH} hidden layers", calls, note=note)
    if rival is not None:  # off the diagonal, of whose angles theirs keeps half the digits
        assert np.allclose(kernel(X)[0, 1:5], rival(name, head)[1][1:], rtol=1e-3)


def bench_deep_networks(compare):
    """Depth costs time, and no compilation."""
    X = jnp.asarray(INPUTS[:500], jnp.float32)
    kernels = {f"depth {depth}": nngp.NNGP(nngp.relu(), depth, 2.0, 0.0) for depth in (4, 100)}
    compare("compile time and depth, n=500", {name: partial(kernel, X) for name, kernel in kernels.items()})


def bench_gradient(compare):
    """Value and gradient of the sum of the matrix with respect to the variances."""
    X = jnp.asarray(INPUTS, jnp.float32)
    kernel = nngp.NNGP(nngp.relu(), DEPTH, 2.0, 0.1)
    value = jax.jit(lambda kernel: jnp.sum(kernel(X)))
    gradient = jax.jit(jax.value_and_grad(lambda kernel: jnp.sum(kernel(X))))
    calls = {"value": lambda: value(kernel), "value and gradient": lambda: gradient(kernel)[0]}
    compare(f"gradients, n={NUM_INPUTS:,}", calls)
