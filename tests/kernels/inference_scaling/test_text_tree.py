"""A tree of answers as generations of a population: its weights and ancestors by hand."""

import asyncio

import numpy as np
from chain_texts import POTENTIAL, ChainTexts

from bayesinf.kernels.inference_scaling import TextStep, failed_step
from bayesinf.kernels.inference_scaling.run_requests import RunRequests
from bayesinf.kernels.inference_scaling.text_tree import Tree

# scores: a 0.9, b 0.2, c 0.6, and half of it for a letter that is repeated
FIRST = [TextStep("a", 1), TextStep("b", 1), TextStep("c", 1, is_done=True), failed_step("lost")]
SECOND = [TextStep("b", 2), TextStep("a", 2, log_ratio=np.log(2.0))]
WEIGHTS = np.array(
    [
        [0.9, 0.2, 0.6, 0.0],
        [0.9 * 0.2, 0.9 * 0.45 * 2.0, 0.6, 0.0],  # b has no children, c had finished
        [0.6, 0.0, 0.0, 0.0],  # what ended
    ]
)


def test_generations_have_the_weights_of_their_nodes():
    requests = RunRequests(ChainTexts(), POTENTIAL, "go")

    async def body():
        tree = Tree(requests, POTENTIAL)
        a, *_ = await tree.grow(None, FIRST, range(4), 0.0)
        await tree.grow(a, SECOND, [0, 0], a.log_weight)
        return tree

    tree = asyncio.run(body())
    sweep = tree.result()
    records = sweep.records
    normalized = WEIGHTS / WEIGHTS.sum(axis=1, keepdims=True)
    eps = 16 * np.finfo(records.log_weights.dtype).eps
    np.testing.assert_allclose(np.exp(records.log_weights), normalized, rtol=eps)
    np.testing.assert_allclose(records.ess, 1.0 / np.sum(normalized**2, axis=1), rtol=eps)
    np.testing.assert_allclose(np.exp(records.log_evidence), WEIGHTS.sum(axis=1) / 4, rtol=eps)
    assert records.ancestors.tolist() == [[0, 1, 2, 3], [0, 0, 2, 3], [2, 2, 2, 2]]
    assert records.num_tokens.tolist() == [[1, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0]]
    assert tree.num_answers == 1
    assert [step.text for step in sweep.state[0]] == ["c"]
    assert requests.failures == ["lost"]
