"""Writes neural_tangents_values.json: kernels as neural-tangents 0.6.5 computes them, in float64.

It does not import under current JAX. In an environment of its own:

    pip install --no-deps neural-tangents==0.6.5
    pip install 'jax<0.4.24' 'jaxlib<0.4.24' 'numpy<2' 'scipy<1.13' frozendict
    python make_neural_tangents_values.py
"""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

for name in ("absl", "jax.experimental.jax2tf", "tensorflow", "tensorflow.keras", "tf2jax"):  # imported, never used
    sys.modules[name] = MagicMock()

import jax  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_enable_x64", True)

from neural_tangents import stax  # noqa: E402

W, B = 1.75, 0.25
ACTIVATIONS = {
    "relu": stax.Relu(),
    "leaky_relu": stax.LeakyRelu(0.125),
    "abs": stax.Abs(),
    "erf": stax.Erf(),
    "gelu": stax.Gelu(),
    "sin": stax.Sin(),
    "cos": stax.Cos(),
    "square": stax.Monomial(2),
}


def wave(*shape):
    """Inputs that need no random numbers."""
    return np.sin(1.0 + np.arange(np.prod(shape), dtype=float) ** 1.25).reshape(shape)


def dense(width=1):
    return stax.Dense(width, W_std=W**0.5, b_std=B**0.5)


def conv(padding):
    return stax.Conv(1, (3, 3), W_std=W**0.5, b_std=B**0.5, padding=padding)


def residual(block):
    return stax.serial(stax.FanOut(2), stax.parallel(block, stax.Identity()), stax.FanInSum())


NETWORKS = {
    f"dense_{name}": (stax.serial(dense(), phi, dense(), phi, dense(), phi, dense()), (4, 5))
    for name, phi in ACTIVATIONS.items()
}
NETWORKS |= {
    "residual": (stax.serial(dense(), *[residual(stax.serial(stax.Relu(), dense()))] * 3), (4, 5)),
    "layer_norm": (
        stax.serial(*[dense(), stax.LayerNorm(axis=-1, eps=1e-6), stax.Relu()] * 2, dense()),
        (4, 5),
    ),
}
for padding in ("SAME", "CIRCULAR", "VALID"):
    head = stax.serial(conv(padding), stax.Relu(), conv(padding), stax.Relu())
    for name, pool in {"flatten": stax.Flatten(), "pool": stax.GlobalAvgPool()}.items():
        NETWORKS[f"conv_{padding.lower()}_{name}"] = (stax.serial(head, pool, dense()), (3, 6, 5, 2))
NETWORKS["conv_residual"] = (
    stax.serial(conv("SAME"), residual(stax.serial(stax.Erf(), conv("SAME"))), stax.Erf(), stax.Flatten(), dense()),
    (3, 6, 5, 2),
)

values = {}
for name, ((_, _, kernel), shape) in NETWORKS.items():
    both = kernel(wave(*shape), None, ("nngp", "ntk"))
    values[name] = {head: np.asarray(getattr(both, head)).tolist() for head in ("nngp", "ntk")}
Path(__file__).with_name("neural_tangents_values.json").write_text(json.dumps(values, indent=1) + "\n")
