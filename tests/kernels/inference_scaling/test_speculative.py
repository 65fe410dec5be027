"""Speculative sampling with several drafts: the law is the target's, by enumeration."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.inference_scaling import (
    TokenModel,
    accept_drafts,
    draft_acceptance,
    residual_log_probs,
    spectr_ratio,
    speculative,
    speculative_sample,
)

X64 = jax.config.read("jax_enable_x64")
ROUNDING = 1e-12 if X64 else 1e-5


def pair_of_laws(seed, size=5):
    """Two laws that are far from each other; every other pair has tokens that only one of them can say."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(size, 0.6)), rng.dirichlet(np.full(size, 0.6))
    if seed % 2:
        p[0], q[1] = 0.0, 0.0
    return p / p.sum(), q / q.sum()


def logs(*laws):
    with np.errstate(divide="ignore"):
        return [jnp.log(jnp.asarray(law)) for law in laws]


def output_law(p, q, ratio, residual, num_drafts):
    """Of the algorithm as it is written: each draft in turn, then the residual."""
    accepted = np.minimum(p, q / ratio)
    rejection = 1 - accepted.sum()
    return sum(rejection**i * accepted for i in range(num_drafts)) + rejection**num_drafts * residual


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_the_law_of_one_token_is_the_targets(num_drafts):
    for seed in range(12):
        p, q = pair_of_laws(seed)
        log_p, log_q = logs(p, q)
        ratio = spectr_ratio(log_p, log_q, num_drafts)
        residual = np.exp(np.asarray(residual_log_probs(log_p, log_q, ratio, num_drafts), np.float64))
        law = output_law(p, q, float(ratio), residual, num_drafts)
        np.testing.assert_allclose(law, q, rtol=0, atol=ROUNDING)
        assert np.all(law[q == 0] == 0)

        beta = np.minimum(p, q / float(ratio)).sum()
        assert 1 - (1 - beta) ** num_drafts == pytest.approx(float(ratio) * beta, abs=ROUNDING)
        if num_drafts == 1:  # Leviathan et al.
            rest = np.maximum(q - p, 0)
            np.testing.assert_allclose(residual, rest / rest.sum(), rtol=0, atol=20 * ROUNDING)
        else:  # two mistakes that are easily made, each off by far more than rounding
            plain = q - np.minimum(p, q / float(ratio))
            assert np.abs(output_law(p, q, float(ratio), plain / plain.sum(), num_drafts) - q).max() > 1e-3
            first = np.maximum(q - p, 0)
            assert np.abs(output_law(p, q, 1.0, first / first.sum(), num_drafts) - q).max() > 1e-3


def best_acceptance(p, q, num_drafts):
    """The most that any coupling of k drafts with q can accept: a linear program."""
    drafts = list(itertools.product(range(p.size), repeat=num_drafts))
    cost = [-float(x in draft) for draft in drafts for x in range(p.size)]
    rows = np.kron(np.eye(len(drafts)), np.ones(p.size))
    columns = np.kron(np.ones(len(drafts)), np.eye(p.size))
    masses = np.concatenate([[np.prod(p[list(draft)]) for draft in drafts], q])
    return -scipy.optimize.linprog(cost, A_eq=np.concatenate([rows, columns]), b_eq=masses).fun


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_acceptance_is_close_to_the_best(num_drafts):
    for seed in range(6):
        p, q = pair_of_laws(seed, size=4)
        ratio = float(spectr_ratio(*logs(p, q), num_drafts))
        acceptance = 1 - (1 - np.minimum(p, q / ratio).sum()) ** num_drafts
        best = best_acceptance(p, q, num_drafts)
        assert (1 - (1 - 1 / num_drafts) ** num_drafts) * best - ROUNDING <= acceptance <= best + ROUNDING


def test_what_is_drawn_follows_the_algorithm():
    p, q = pair_of_laws(3)
    log_p, log_q = logs(p, q)

    def draw(key):
        key_draft, key_accept = jax.random.split(key)
        drafts = jax.random.categorical(key_draft, log_p, shape=(3,))
        return accept_drafts(key_accept, log_p, log_q, drafts)

    num = 100_000
    tokens, index = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), num))
    counts = np.bincount(tokens, minlength=q.size)
    assert scipy.stats.chisquare(counts[q > 0], num * q[q > 0]).pvalue > FALSE_ALARM
    beta = np.minimum(p, q / float(spectr_ratio(log_p, log_q, 3))).sum()
    law = np.array([(1 - beta) ** 3, *[(1 - beta) ** i * beta for i in range(3)]])
    assert scipy.stats.chisquare(np.bincount(np.asarray(index) + 1, minlength=4), num * law).pvalue > FALSE_ALARM


def test_equal_and_disjoint_laws():
    p = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    # the root is flat there: what rounding makes of it, the drafts are accepted
    assert 1 - (1 - 1 / float(spectr_ratio(p, p, 4))) ** 4 == pytest.approx(1.0, abs=1e-6)
    token, index = accept_drafts(0, p, p, jnp.array([2, 0]))
    assert (int(token), int(index)) == (2, 0)
    left, right = logs(np.array([0.4, 0.6, 0.0]), np.array([0.0, 0.0, 1.0]))
    assert float(spectr_ratio(left, right, 4)) == pytest.approx(4.0, rel=1e-6)
    token, index = accept_drafts(0, left, right, jnp.array([0, 1]))
    assert (int(token), int(index)) == (2, -1)


# Two models of order two: the next token depends on the last two, and not in the same way.
RNG = np.random.default_rng(5)
SIZE = 3
TARGET = RNG.dirichlet(np.full(SIZE, 0.7), (SIZE, SIZE))
DRAFT = 0.5 * TARGET + 0.5 * RNG.dirichlet(np.full(SIZE, 0.7), (SIZE, SIZE))
PROMPT = jnp.array([0, 2])


def target(tokens, length):
    return jnp.log(jnp.asarray(TARGET))[tokens[length - 2], tokens[length - 1]]


def draft(tokens, length):
    return 3.0 + jnp.log(jnp.asarray(DRAFT))[tokens[length - 2], tokens[length - 1]]  # logits will do


def law_of_texts(num_tokens):
    """Of all texts, in the order of their numbers in base SIZE."""
    law = []
    for text in itertools.product(range(SIZE), repeat=num_tokens):
        before, mass = tuple(PROMPT.tolist()), 1.0
        for token in text:
            mass *= TARGET[*before, token]
            before = (before[1], token)
        law.append(mass)
    return np.array(law)


def text_p_value(num=30_000, num_tokens=4, models=(draft, target), **sizes):
    """That texts follow the target's law."""

    @jax.jit
    @jax.vmap
    def write(key):
        result = speculative_sample(key, *models, PROMPT, num_tokens=num_tokens, **sizes)
        return result.tokens, result.num_target_calls

    tokens, num_calls = write(jax.random.split(jax.random.key(1), num))
    numbers = np.asarray(tokens) @ SIZE ** np.arange(num_tokens)[::-1]
    counts = np.bincount(numbers, minlength=SIZE**num_tokens)
    return scipy.stats.chisquare(counts, num * law_of_texts(num_tokens)).pvalue, np.asarray(num_calls)


@pytest.mark.parametrize(("num_drafts", "draft_length"), [(1, 2), (3, 2), (4, 1), (2, 5)])
@pytest.mark.usefixtures("compile_fast")
def test_the_law_of_texts_is_the_targets(num_drafts, draft_length):
    p_value, num_calls = text_p_value(num_drafts=num_drafts, draft_length=draft_length)
    assert p_value > FALSE_ALARM
    assert num_calls.mean() < 4  # without drafts there is a call for each token


@pytest.mark.parametrize("mistake", ["bonus of the draft", "ratio 1", "residual without its factor", "all drafts stay"])
@pytest.mark.usefixtures("compile_fast")
def test_mistakes_are_seen_in_the_law_of_texts(mistake, monkeypatch):
    accept = speculative.accept_drafts

    def bonus(key, log_p, log_q, drafts, is_active):
        token, index = accept(key, log_p, log_q, drafts, is_active)
        of_draft = jax.random.categorical(key, log_p).astype(token.dtype)
        return jnp.where(jnp.any(is_active), token, of_draft), index

    def residual(log_p, log_q, ratio, num_drafts):
        rest = jnp.exp(log_q) - jnp.exp(jnp.minimum(log_p, log_q - jnp.log(ratio))) * (num_drafts > 0)
        return jnp.log(rest / rest.sum())

    def careless(key, log_p, log_q, drafts, is_active):
        """Drafts whose prefix was rejected count at the next position too."""
        return accept(key, log_p, log_q, drafts, jnp.broadcast_to(jnp.any(is_active), drafts.shape))

    planted: Any = {
        "bonus of the draft": ("accept_drafts", bonus),
        "ratio 1": ("spectr_ratio", lambda log_p, log_q, num_drafts: jnp.ones((), log_p.dtype)),
        "residual without its factor": ("residual_log_probs", residual),
        "all drafts stay": ("accept_drafts", careless),
    }
    module = speculative if planted[mistake][0] == "accept_drafts" else draft_acceptance
    monkeypatch.setattr(module, *planted[mistake])
    speculative._run.clear_cache()
    p_value, _ = text_p_value(num_drafts=3, draft_length=2)
    speculative._run.clear_cache()
    assert p_value < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_a_single_draft_is_accepted_as_often_as_two_laws_overlap():
    """And all drafts of the target's own are accepted: the tokens of a call are draft_length + 1."""
    log_p, log_q = logs(*pair_of_laws(2))
    models = (lambda tokens, length: log_p), (lambda tokens, length: log_q)
    run = jax.jit(
        jax.vmap(lambda key: speculative_sample(key, *models, PROMPT, num_tokens=1, num_drafts=1, draft_length=1))
    )
    accepted = np.asarray(run(jax.random.split(jax.random.key(3), 20_000)).num_accepted[:, 0], float)
    assert mean_p_value(accepted, np.minimum(*np.exp([log_p, log_q])).sum()) > FALSE_ALARM
    same = speculative_sample(0, target, target, PROMPT, num_tokens=50, num_drafts=2, draft_length=4)
    # in single precision the ratio is rounded up, and a draft may be lost to it once in ten million
    assert float(same.tokens_per_call) == 5.0
    assert int(same.num_target_calls) == 10


class WithCache(TokenModel):
    """The same chain as a model that sees every token once: it remembers those before."""

    table: jax.Array

    def init(self, prompt, capacity):
        return jnp.full(capacity, -1).at[: prompt.shape[0]].set(prompt)

    def extend(self, cache, tokens, position):
        # what stands after is forgotten: reading it would show
        cache = jnp.where(jnp.arange(cache.shape[0]) < position, cache, -1)
        cache = jax.lax.dynamic_update_slice(cache, tokens, (position,))
        here = position + jnp.arange(tokens.shape[0])
        return self.table[cache[here - 1], cache[here]], cache


@pytest.mark.usefixtures("compile_fast")
def test_a_cache_changes_nothing():
    sizes = {"num_tokens": 40, "num_drafts": 3, "draft_length": 3}
    plain = speculative_sample(7, draft, target, PROMPT, **sizes)
    models = [WithCache(jnp.log(jnp.asarray(table))) for table in (DRAFT, TARGET)]
    cached = speculative_sample(7, *models, PROMPT, **sizes)
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_array_equal(plain.num_accepted, cached.num_accepted)
    assert len(set(plain.tokens.tolist())) == SIZE


@pytest.mark.usefixtures("compile_fast")
def test_writing_stops_after_the_stop_token():
    sizes = {"num_drafts": 2, "draft_length": 3}
    run = jax.jit(
        jax.vmap(lambda key: speculative_sample(key, draft, target, PROMPT, num_tokens=3, stop_token=1, **sizes))
    )
    num = 20_000
    tokens = np.asarray(run(jax.random.split(jax.random.key(2), num)).tokens)
    is_after = np.cumsum(tokens == 1, axis=1) > 0
    assert np.all(tokens[is_after] == 1)
    texts = np.array(list(itertools.product(range(SIZE), repeat=3)))
    texts[np.cumsum(texts == 1, axis=1) > 0] = 1
    law = np.bincount(texts @ [9, 3, 1], law_of_texts(3), minlength=27)
    counts = np.bincount(tokens @ [9, 3, 1], minlength=27)
    assert np.all(counts[law == 0] == 0)
    assert scipy.stats.chisquare(counts[law > 0], num * law[law > 0]).pvalue > FALSE_ALARM
    alone = speculative_sample(
        0, draft, lambda tokens, length: jnp.log(jnp.array([0.0, 1.0, 0.0])), PROMPT, num_tokens=9, stop_token=1
    )
    assert int(alone.num_target_calls) == 1


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_sampled_is_said():
    with pytest.raises(ValueError, match="prompt must hold one token or more"):
        speculative_sample(0, draft, target, jnp.zeros(0, int), num_tokens=3)
    with pytest.raises(ValueError, match=r"prompt must be tokens in \[0, 3\)"):
        speculative_sample(0, draft, target, jnp.array([0, 3]), num_tokens=3)
    with pytest.raises(ValueError, match="one vocabulary"):
        speculative_sample(0, draft, lambda tokens, length: jnp.zeros(4), PROMPT, num_tokens=3)
    with pytest.raises(ValueError, match="target_model must be called"):
        speculative_sample(0, draft, lambda tokens: jnp.zeros(3), PROMPT, num_tokens=3)
    with pytest.raises(ValueError, match="temperature must be finite and positive"):
        speculative_sample(0, draft, target, PROMPT, num_tokens=3, temperature=0.0)
    with pytest.raises(ValueError, match=r"min_p must lie in \(0, 1\)"):
        speculative_sample(0, draft, target, PROMPT, num_tokens=3, min_p=1.0)
    with pytest.raises(ValueError, match="num_drafts must be at least 1"):
        speculative_sample(0, draft, target, PROMPT, num_tokens=3, num_drafts=0)
    with pytest.raises(ValueError, match="sum to 1"):
        accept_drafts(0, jnp.zeros(3), jnp.log(jnp.full(3, 1 / 3)), jnp.array([0]))
    with pytest.raises(ValueError, match="drafts must be tokens"):
        accept_drafts(0, *logs(*pair_of_laws(0)), jnp.array([5]))
    with pytest.raises(errors.SamplingError, match="held NaN") as raised:
        speculative_sample(0, draft, lambda tokens, length: jnp.full(3, -jnp.inf), PROMPT, num_tokens=3)
    assert raised.value.draws.tokens.shape == (3,)
