"""The transformer beside the same written down in float64, and its cache beside the transformer without one."""

import dataclasses
import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import STRETCHED, reference_logits, small_model

from bayesinf import resampling
from bayesinf.models.language import LanguageCache, Rotary, Transformer, cache, copy_rows, transformer

pytestmark = pytest.mark.usefixtures("compile_fast")

PROMPT = jnp.array([3, 1, 4, 1, 5])
ROUNDING = 1e-5  # of sums of some hundred float32 numbers of order one


@pytest.mark.parametrize(
    "changes",
    [{}, {"is_tied": False}, {"num_kv_heads": 6}, {"num_kv_heads": 1}, {"num_layers": 1, "rope_base": 50.0}],
    ids=str,
)
def test_logits_are_those_of_the_reference(changes):
    model = small_model(**changes)
    tokens = jnp.array([3, 1, 4, 1, 5, 9, 2, 6])
    np.testing.assert_allclose(eqx.filter_jit(model)(tokens), reference_logits(model, tokens), atol=ROUNDING)


def test_factors_slow_the_pairs_of_rotary_positions():
    model = dataclasses.replace(small_model(), rotary=STRETCHED)
    np.testing.assert_allclose(model(PROMPT), reference_logits(model, PROMPT), atol=ROUNDING)
    assert np.max(np.abs(model(PROMPT) - small_model()(PROMPT))) > 100 * ROUNDING


def test_scores_depend_on_differences_of_positions():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 8))
    rotary = Rotary(100.0)

    def scores(m, n):
        return np.sum(rotary(q, jnp.array([m])) * rotary(k, jnp.array([n])), axis=-1)

    np.testing.assert_allclose(scores(9, 4), scores(25, 20), atol=ROUNDING)
    assert np.max(np.abs(scores(9, 4) - scores(9, 5))) > 100 * ROUNDING


def test_probabilities_of_all_texts_sum_to_one():
    model = small_model(vocab_size=4)
    texts = jnp.array([[2, *text] for text in itertools.product(range(4), repeat=3)])
    np.testing.assert_allclose(
        jax.nn.logsumexp(jax.jit(jax.vmap(lambda text: model.log_prob(text)))(texts)), 0.0, atol=ROUNDING
    )


def test_log_prob_counts_the_tokens_in_the_mask():
    model = small_model()
    mask = jnp.array([True, False, False, True, True])
    log_prob, gradient = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: model.log_prob(PROMPT, mask)))(model)
    expected = jax.nn.log_softmax(reference_logits(model, PROMPT))
    np.testing.assert_allclose(log_prob, expected[2, 1] + expected[3, 5], atol=ROUNDING)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def continued_otherwise(model, all_ancestors=(None,), num_tokens=5):
    """The largest error of the cache's logits: four ragged particles, resampled, cut back, and continued."""
    prompt = PROMPT[:num_tokens].tolist()
    prefill = jax.jit(lambda tokens: model.prefill(tokens, num_tokens, num_particles=4, max_tokens=9))
    extend = jax.jit(lambda *arguments: model.extend(*arguments))
    gather = jax.jit(lambda read, ancestors: model.gather(read, ancestors))
    whole = jax.jit(jax.vmap(model))
    worst = 0.0
    for ancestors in all_ancestors:
        rng = np.random.default_rng(0)
        read, own = prefill(jnp.pad(PROMPT, (0, 3), constant_values=7)), [[] for _ in range(4)]
        for is_active in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], "turn", [1, 1, 0, 1], [0, 1, 1, 1]):
            if is_active == "turn":
                if ancestors is not None:
                    read, own = gather(read, jnp.array(ancestors)), [list(own[a]) for a in ancestors]
                read, own = model.truncate(read, jnp.array([1, 2, 2, 9])), [own[0][:1], own[1][:2], own[2][:2], own[3]]
                continue
            tokens = rng.integers(11, size=4)
            logits, read = extend(read, jnp.asarray(tokens), jnp.array(is_active, bool))
            for i in np.flatnonzero(is_active):
                own[i].append(int(tokens[i]))
            texts = [prompt + text for text in own]
            expected = whole(jnp.array([text + [0] * (12 - len(text)) for text in texts]))
            for i in np.flatnonzero(is_active):
                worst = max(worst, float(np.max(np.abs(logits[i] - expected[i, len(texts[i]) - 1]))))
    return worst


ANCESTORS = [None, (0, 1, 2, 3), (0, 0, 2, 2), (3, 1, 3, 3), (1, 2, 3, 0), (1, 0, 0, 2), (3, 3, 2, 1)]


def test_the_cache_changes_nothing():
    assert continued_otherwise(small_model(), ANCESTORS) < ROUNDING


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_padding_of_a_prompt_is_not_read(num_tokens):
    assert continued_otherwise(small_model(is_tied=False), num_tokens=num_tokens) < ROUNDING


def plant(monkeypatch, mistake):
    attend_both, gather, write = transformer._attend_both, LanguageCache.gather, transformer.write
    if mistake == "the newest token does not see itself":
        planted = lambda q, shared, own, length, lengths: attend_both(q, shared, own, length, lengths - 1)  # noqa: E731
        monkeypatch.setattr(transformer, "_attend_both", planted)
    if mistake == "one token of padding is seen":
        planted = lambda q, shared, own, length, lengths: attend_both(q, shared, own, length + 1, lengths)  # noqa: E731
        monkeypatch.setattr(transformer, "_attend_both", planted)
    if mistake == "one token too many is seen":
        planted = lambda q, shared, own, length, lengths: attend_both(q, shared, own, length, lengths + 1)  # noqa: E731
        monkeypatch.setattr(transformer, "_attend_both", planted)
    if mistake == "positions start at the prompt's end":
        layer = Transformer._layer
        planted = lambda self, block, h, positions, attend: layer(  # noqa: E731
            self, block, h, positions - (PROMPT.size if h.shape[0] == 4 else 0), attend
        )
        monkeypatch.setattr(Transformer, "_layer", planted)
    if mistake == "rows stay stale":
        monkeypatch.setattr(LanguageCache, "gather", lambda self, a: gather(self, a)._replace(suffix=self.suffix))
    if mistake == "rows are overwritten before they are read":
        monkeypatch.setattr(cache, "copy_rows", copied_in_turn)
    if mistake == "those who wait are written to":
        monkeypatch.setattr(transformer, "write", lambda own, k, v, lengths, is_active: write(
            own, k, v, jnp.where(is_active, lengths, 0), jnp.ones_like(is_active)))  # fmt: skip


def copied_in_turn(tree, ancestors):
    for i in range(ancestors.shape[0]):
        tree = jax.tree.map(lambda leaf, i=i: leaf.at[i].set(leaf[ancestors[i]]), tree)
    return tree


MISTAKES = (
    "the newest token does not see itself",
    "one token of padding is seen",
    "one token too many is seen",
    "positions start at the prompt's end",
    "rows stay stale",
    "rows are overwritten before they are read",
    "those who wait are written to",
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(monkeypatch, mistake):
    plant(monkeypatch, mistake)
    assert continued_otherwise(small_model(), [(1, 2, 3, 0), (1, 0, 0, 2)]) > 100 * ROUNDING


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_are_gathered_for_all_ancestors(num_rows):
    tree = {"a": jnp.arange(3.0 * 2).reshape(3, 2), "b": jnp.arange(3)}
    copied = jax.jit(copy_rows)
    for ancestors in itertools.product(range(-1, 4), repeat=num_rows):
        ancestors = jnp.array(ancestors)
        expected = resampling.gather(tree, jnp.clip(ancestors, 0, 2))
        jax.tree.map(np.testing.assert_array_equal, copied(tree, ancestors), expected)


def test_prompts_of_several_lengths_share_a_program():
    model, traces = small_model(), []

    @jax.jit
    def read(tokens, num_tokens):
        traces.append(None)
        cache = model.prefill(tokens, num_tokens, num_particles=2, max_tokens=1)
        return model.extend(cache, jnp.array([1, 2]), jnp.ones(2, bool))[0]

    for num_tokens in (2, 3, 5):
        expected = model(jnp.append(PROMPT[:num_tokens], 1))[-1]
        np.testing.assert_allclose(read(PROMPT, num_tokens)[0], expected, atol=ROUNDING)
    assert len(traces) == 1


def test_the_prompt_is_not_copied_for_every_particle():
    """No array of a decoding step has the size of the prompt's keys times the number of particles."""
    num_particles, prompt_size, kv_heads, head_size = 7, 13, 2, 4
    model = small_model(width=24, num_heads=6, num_kv_heads=kv_heads)
    cache = model.prefill(jnp.zeros(prompt_size, int), 9, num_particles=num_particles, max_tokens=3)
    step = jax.jit(lambda *arguments: model.extend(*arguments))
    text = step.lower(cache, jnp.zeros(num_particles, int), jnp.ones(num_particles, bool)).compile().as_text()
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    sizes = {int(np.prod(shape)) for shape in shapes}
    assert prompt_size * kv_heads * head_size in sizes  # the prompt's keys themselves are seen
    assert num_particles * prompt_size * kv_heads * head_size not in sizes


def test_weights_choose_the_precision():
    tokens = jnp.array([3, 1, 4, 1, 5, 9, 2, 6])
    half = small_model(dtype=jnp.bfloat16)
    logits = eqx.filter_jit(half)(tokens)
    assert logits.dtype == jnp.float32
    exact = reference_logits(half, tokens)
    # each of some ten roundings in a row is relative, of at most 2^-9
    assert ROUNDING < np.max(np.abs(logits - exact)) < 10 * 2**-9 * np.max(np.abs(exact))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="width must be a multiple of 2 num_heads = 12, got 25"):
        small_model(width=25)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads = 6, got 4"):
        small_model(num_kv_heads=4)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        small_model(num_layers=0)
    model = small_model()
    with pytest.raises(ValueError, match="query and key must hold 4 and 2 heads of one even size, got 24 and 8 rows"):
        dataclasses.replace(model, num_heads=4)
    with pytest.raises(ValueError, match=r"rotary\.factors must be 2 numbers, got 3"):
        dataclasses.replace(model, rotary=Rotary(1e4, (1.0, 2.0, 3.0)))
