"""Language models as what speculative sampling reads with: their law by enumeration, and texts that are unwritten."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import speculative, speculative_sample
from bayesinf.kernels.inference_scaling.token_model import as_token_model
from bayesinf.models.language import Transformer

pytestmark = pytest.mark.usefixtures("compile_fast")

SIZE = 3
PROMPT = jnp.array([0, 2])
SIZES = {"vocab_size": SIZE, "width": 8, "num_heads": 2}
SMALL, LARGE = (Transformer.random(layers, num_layers=layers, **SIZES) for layers in (1, 2))


class TokenByToken:
    """The transformer as a model that reads one token a pass."""

    def __init__(self, model):
        for name in ("vocab_size", "prefill", "extend", "gather", "place", "truncate"):
            setattr(self, name, getattr(model, name))


def law_of_pairs(model, temperature):
    """Of two tokens after the prompt, by enumeration."""
    log_first = jax.nn.log_softmax(model(PROMPT)[-1] / temperature)
    texts = jnp.array([[*PROMPT.tolist(), token] for token in range(SIZE)])
    log_second = jax.nn.log_softmax(jax.vmap(model)(texts)[:, -1] / temperature)
    law = np.exp(np.asarray(log_first[:, None] + log_second, np.float64)).reshape(-1)
    return law / law.sum()


def test_transformers_go_in_as_they_are():
    num = 20_000

    @jax.jit
    @jax.vmap
    def write(key):
        sizes = {"num_tokens": 2, "num_drafts": 2, "draft_length": 2}
        return speculative_sample(key, SMALL, LARGE, PROMPT, **sizes, temperature=0.8).tokens

    tokens = np.asarray(write(jax.random.split(jax.random.key(4), num)))
    counts = np.bincount(tokens @ [SIZE, 1], minlength=SIZE**2)
    assert scipy.stats.chisquare(counts, num * law_of_pairs(LARGE, 0.8)).pvalue > FALSE_ALARM
    # and other laws are told apart: the draft's, and that at another temperature
    for law in (law_of_pairs(SMALL, 0.8), law_of_pairs(LARGE, 1.0)):
        assert scipy.stats.chisquare(counts, num * law).pvalue < FALSE_ALARM


@pytest.mark.parametrize("model", [LARGE, TokenByToken(LARGE)], ids=["in one pass", "token by token"])
def test_one_text_is_unwritten_and_written_anew(model):
    """Laws after going back are those of reading the whole text, whatever stood there before."""
    reader = as_token_model("model", model)
    extend = jax.jit(lambda *arguments: reader.extend(*arguments))
    cache = reader.init(PROMPT, 7)
    text = PROMPT.tolist()
    for position, tokens in ((1, [2, 0, 1, 1]), (3, [1, 2]), (2, [1, 2, 2])):
        text = [*text[:position], *tokens]
        log_probs, cache = extend(cache, jnp.array(tokens), jnp.asarray(position))
        np.testing.assert_allclose(log_probs, LARGE(jnp.array(text))[position:], atol=1e-5)  # rounding of float32


def test_the_prompt_of_a_transformer_is_not_copied_for_every_draft():
    """No array of a compiled run has the size of the prompt's keys times the number of drafts."""
    prompt = jnp.tile(PROMPT, 15)[:29]
    sizes = (3, 5, 2)
    models = [as_token_model("model", model) for model in (SMALL, LARGE)]
    cut = (jnp.ones(()), None, None)
    run = speculative._run.lower(jax.random.key(0), *models, prompt, jnp.asarray(-1), cut, sizes).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", run.as_text())
    found = {int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes}
    assert 29 * 8 in found  # the prompt's keys themselves are seen
    assert 5 * 29 * 8 not in found
