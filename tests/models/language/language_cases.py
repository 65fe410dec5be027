"""A small model, and what a transformer computes, written down a second time: in float64, head by head."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bayesinf.models.language import Rotary, Transformer

SIZES = {"vocab_size": 11, "width": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "mlp_width": 20}


def small_model(seed=0, **changes):
    """Random, with norms that are not ones, so that one left out is seen."""
    model = Transformer.random(seed, **(SIZES | changes))
    keys = iter(jax.random.split(jax.random.key(seed + 100), 2 * len(model.blocks) + 1))

    def norms(m):
        return [m.norm] + [norm for block in m.blocks for norm in (block.attention_norm, block.mlp_norm)]

    changed = [(1 + 0.3 * jax.random.normal(next(keys), norm.shape)).astype(norm.dtype) for norm in norms(model)]
    return eqx.tree_at(norms, model, changed)


def reference_logits(model, tokens):
    """Logits after each token, with rotations as products of complex numbers."""

    def array(x):
        return np.asarray(x.astype(jnp.float32), np.float64)

    def normed(x, weight):
        return x / np.sqrt(np.mean(x**2) + model.norm_epsilon) * array(weight)

    def turned(x, position):
        half = len(x) // 2
        speed = np.array([model.rotary.base ** (-2 * i / len(x)) for i in range(half)])
        if model.rotary.factors is not None:
            speed = speed / np.array(model.rotary.factors)
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * speed)
        return np.concatenate([z.real, z.imag])

    stream = [array(model.embedding)[token] for token in tokens]
    for block in model.blocks:
        size = block.query.shape[0] // model.num_heads
        inputs = [normed(x, block.attention_norm) for x in stream]
        q = [(array(block.query) @ x).reshape(-1, size) for x in inputs]
        k = [(array(block.key) @ x).reshape(-1, size) for x in inputs]
        v = [(array(block.value) @ x).reshape(-1, size) for x in inputs]
        for t in range(len(stream)):
            heads = []
            for head in range(model.num_heads):
                shared = head * model.num_kv_heads // model.num_heads
                scores = [turned(q[t][head], t) @ turned(k[s][shared], s) / np.sqrt(size) for s in range(t + 1)]
                weights = np.exp(scores - np.max(scores))
                heads.append(sum(w * v[s][shared] for s, w in enumerate(weights / weights.sum())))
            stream[t] = stream[t] + array(block.output) @ np.concatenate(heads)
        for t, x in enumerate(stream):
            n = normed(x, block.mlp_norm)
            gate = array(block.gate) @ n
            stream[t] = x + array(block.down) @ (gate / (1 + np.exp(-gate)) * (array(block.up) @ n))
    head = model.embedding if model.head is None else model.head
    return np.array([array(head) @ normed(x, model.norm) for x in stream])


STRETCHED = Rotary(500.0, (1.0, 4.0))
