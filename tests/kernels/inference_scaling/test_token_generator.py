"""Texts of a tiny transformer, drawn in steps: their law by enumeration, and their weights by reading them again."""

import dataclasses
from collections import defaultdict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bayesinf import resampling
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.inference_scaling import Potential, Resample, TokenGenerator, next_token, token_generator
from bayesinf.kernels.inference_scaling.sweep import draw_reference, run_sweep
from bayesinf.models.language import CharTokenizer, Transformer

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = Transformer.random(3, vocab_size=5, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=16)
PROMPT = jnp.array([0, 3, 1])
STOP, END = 3, 4
ROUNDING = 1e-4  # of log probabilities and sums of a few of them, in float32
FAVOURS = jnp.array([0.0, 1.0, -1.0, 0.5, -jnp.inf])


def make(**changes):
    options = {"max_steps": 2, "max_tokens_per_step": 2, "stop_tokens": [STOP], "end_tokens": [END]}
    return TokenGenerator(**({"model": MODEL} | options | changes))


def favour(state, log_probs):
    """Depends on the token before: a text that has begun with 1 may end, others may not."""
    return jnp.where(state.tokens[:, :1] == 1, 0.3 * FAVOURS.at[END].set(2.0), FAVOURS)


def forbid(state, log_probs):
    """Nothing may follow a 1."""
    newest = jnp.take_along_axis(state.tokens, jnp.maximum(state.lengths - 1, 0)[:, None], axis=1)
    return jnp.where((state.lengths[:, None] > 0) & (newest == 1), -jnp.inf, 0.0)


def run(generator, num_particles, num_steps=2, seed=0):
    """The state after some steps, and the sum of log_ratio."""

    @eqx.filter_jit
    def go(generator, key):
        state = generator.init(key, PROMPT, num_particles)
        total = jnp.zeros(num_particles)
        for t in range(num_steps):
            state, info = generator.step(jax.random.fold_in(key, t), state)
            total = total + info.log_ratio
        return state, total

    return go(generator, jax.random.key(seed))


@eqx.filter_jit
def read_all(model, texts):
    return jax.nn.log_softmax(jax.vmap(model)(texts))


def enumerate_texts(sample, num_steps=2, num_tokens=2, max_tokens=99):
    """All texts with log p and log q, where sample(text, log_model) gives those of the next token."""
    found, going = {}, [((), 0, 0, 0.0, 0.0)]
    while going:
        padded = np.zeros((max(256, len(going)), PROMPT.size + 6), int)  # of one shape for one program
        for row, (text, *_) in zip(padded, going, strict=False):
            row[: PROMPT.size + len(text)] = [*PROMPT.tolist(), *text]
        log_models = read_all(MODEL, jnp.asarray(padded))
        longer = []
        for (text, step, place, log_p, log_q), read in zip(going, np.asarray(log_models, np.float64), strict=False):
            next_p, next_q = sample(text, read[PROMPT.size + len(text) - 1])
            for token in np.flatnonzero(next_q > -np.inf):
                new = (*text, int(token))
                ratios = log_p + next_p[token], log_q + next_q[token]
                is_last = token in (STOP, END) or place + 1 == num_tokens
                at = (step + 1, 0) if is_last else (step, place + 1)
                if token == END or at[0] == num_steps or len(new) == max_tokens:
                    found[new] = ratios
                else:
                    longer.append((new, *at, *ratios))
        going = longer
    return found


def normalised(log_probs):
    return log_probs - np.logaddexp.reduce(log_probs)


def cut(log_probs, top_p):
    order = np.argsort(-log_probs)
    mass = np.cumsum(np.exp(log_probs[order]))
    kept = order[: np.searchsorted(mass, top_p) + 1]
    return normalised(np.where(np.isin(np.arange(5), kept), log_probs, -np.inf))


def cut_small(log_probs, min_p):
    return normalised(np.where(log_probs >= log_probs.max() + np.log(min_p), log_probs, -np.inf))


def twisted(text, log_probs, twist):
    state = token_generator.TokenState(*[None] * 8)._replace(
        tokens=jnp.array([[*text, -1]]), lengths=jnp.array([len(text)])
    )
    return normalised(log_probs + np.asarray(jnp.broadcast_to(twist(state, None), (1, 5)))[0])


def hot(log_model):
    return normalised(log_model / 1.7)


LAWS = {
    "the model": ({}, lambda x, m: (m, m)),
    "hot": ({"temperature": 1.7}, lambda x, m: (hot(m), hot(m))),
    "hot, corrected": ({"temperature": 1.7, "correct": True}, lambda x, m: (m, hot(m))),
    "top_p": ({"top_p": 0.7}, lambda x, m: (cut(m, 0.7), cut(m, 0.7))),
    "hot top_p, corrected": ({"top_p": 0.7, "temperature": 1.7, "correct": True}, lambda x, m: (m, cut(hot(m), 0.7))),
    "min_p": ({"min_p": 0.4}, lambda x, m: (cut_small(m, 0.4), cut_small(m, 0.4))),
    "twisted": ({"twist": favour}, lambda x, m: (m, twisted(x, m, favour))),
    "hot twisted": ({"twist": favour, "temperature": 1.7}, lambda x, m: (hot(m), twisted(x, hot(m), favour))),
}


def texts_of(state):
    return [tuple(row[:n]) for row, n in zip(state.tokens.tolist(), state.lengths.tolist(), strict=True)]


def law_p_value(generator, law, num_particles=20_000):
    """Of the texts drawn, beside their enumeration; 0 where one was drawn that cannot be."""
    state, _ = run(generator, num_particles)
    expected = {text: num_particles * np.exp(log_q) for text, (_, log_q) in enumerate_texts(law).items()}
    counts = defaultdict(int)
    for text in texts_of(state):
        counts[text] += 1
    if set(counts) - set(expected):
        return 0.0
    rare = [text for text in expected if expected[text] < 5]
    cells = [(counts[text], expected[text]) for text in expected if expected[text] >= 5]
    cells += [(sum(counts[text] for text in rare), sum(expected[text] for text in rare))] if rare else []
    observed, means = np.array(cells).T
    return stats.chisquare(observed, means * observed.sum() / means.sum()).pvalue


@pytest.mark.parametrize("name", LAWS)
def test_texts_have_the_law_that_enumeration_gives(name):
    options, law = LAWS[name]
    assert law_p_value(make(**options), law) > FALSE_ALARM


@pytest.mark.parametrize(
    ("drawn", "claimed"), [("hot", "the model"), ("the model", "top_p"), ("top_p", "the model"), ("twisted", "hot")]
)
def test_another_law_is_found(drawn, claimed):
    assert law_p_value(make(**LAWS[drawn][0]), LAWS[claimed][1]) < FALSE_ALARM


@pytest.mark.parametrize("name", LAWS)
def test_ratios_are_those_of_enumeration(name):
    options, law = LAWS[name]
    state, total = run(make(**options), 200)
    found = enumerate_texts(law)
    exact = np.array([found[text] for text in texts_of(state)])
    np.testing.assert_allclose(total, exact[:, 0] - exact[:, 1], atol=ROUNDING)
    np.testing.assert_allclose(jnp.sum(state.log_probs, axis=1), exact[:, 0], atol=ROUNDING)
    if not options.get("correct") and "twist" not in options:
        assert np.all(total == 0.0)


def test_corrected_weights_have_mean_one():
    _, total = run(make(temperature=1.7, correct=True), 20_000)
    assert mean_p_value(np.exp(total), 1.0) > FALSE_ALARM


def test_texts_that_a_twist_leaves_nothing_weigh_nothing():
    state, total = run(make(twist=forbid), 2_000)
    is_lost = [1 in text[:-1] for text in texts_of(state)]
    np.testing.assert_array_equal(np.isneginf(total), is_lost)
    assert any(is_lost)
    assert np.all(np.isfinite(total[~np.array(is_lost)]))


@eqx.filter_jit
def resampled_run(generator, key, ancestors):
    """Steps with a resampling after each, in one compiled loop."""
    state = generator.init(key, PROMPT, 6)

    def turn(t, carry):
        state, spent, total = carry
        state, info = generator.step(jax.random.fold_in(key, t), state)
        total = (total + info.log_ratio)[ancestors[t]]
        return generator.gather(state, ancestors[t]), spent + jnp.sum(info.num_tokens), total

    return jax.lax.fori_loop(0, ancestors.shape[0], turn, (state, 0, jnp.zeros(6)))


def reread(generator, seed=0):
    """Errors of log_probs and of log_ratio of resampled texts that are read again from the beginning."""
    ancestors = jax.random.randint(jax.random.key(seed + 50), (5, 6), 0, 6)
    state, _, total = resampled_run(generator, jax.random.key(seed), ancestors)
    texts = jnp.concatenate([jnp.tile(PROMPT, (6, 1)), jnp.maximum(state.tokens, 0)], axis=1)
    is_own = jnp.arange(state.tokens.shape[1]) < state.lengths[:, None]

    def of_tokens(log_probs):
        return jnp.where(is_own, jnp.take_along_axis(log_probs, texts[:, PROMPT.size :, None], axis=2)[..., 0], 0.0)

    log_model = read_all(MODEL, texts)[:, PROMPT.size - 1 : -1]
    log_hot = jax.nn.log_softmax(log_model / 1.7)
    ratio = jnp.sum(of_tokens(log_model) - of_tokens(log_hot), axis=1)
    return max(float(np.max(np.abs(state.log_probs - of_tokens(log_model)))), float(np.max(np.abs(total - ratio))))


LONG = {"max_steps": 5, "max_tokens_per_step": 4, "temperature": 1.7, "correct": True}


def test_resampled_texts_are_weighed_as_when_they_are_read_again():
    assert max(reread(make(**LONG), seed) for seed in range(4)) < ROUNDING


class Stale(Transformer):
    """Leaves the cache as it is when particles are resampled."""

    def gather(self, cache, ancestors):
        return cache


class Forgetful(Transformer):
    """Takes its cache back to the beginning, but for its length."""

    def truncate(self, cache, lengths):
        return cache


def planted(what):
    return what(**{field.name: getattr(MODEL, field.name) for field in dataclasses.fields(MODEL)})


def test_a_stale_cache_is_found():
    assert max(reread(make(**LONG, model=planted(Stale)), seed) for seed in range(4)) > 100 * ROUNDING


class Whole(Transformer):
    """Gathers all rows of its cache, those too that stay where they are."""

    def gather(self, cache, ancestors):
        suffix, lengths = resampling.gather((cache.suffix, cache.lengths), ancestors)
        return cache._replace(suffix=suffix, lengths=lengths)


class Lazy(Transformer):
    """Overwrites the first row of those that are to change, and no other."""

    def gather(self, cache, ancestors):
        own = jnp.arange(ancestors.shape[0])
        is_first = own == jnp.argmax(ancestors != own)
        rows = resampling.gather(cache.suffix, jnp.where(is_first, ancestors, own))
        return cache._replace(suffix=rows, lengths=resampling.gather(cache.lengths, ancestors))


def filtered(model, seed):
    """A particle filter that resamples before every step, by the token that is written last."""
    generator = make(max_steps=6, end_tokens=(), model=model)
    potential = Potential(lambda state: jnp.exp(-0.4 * jnp.max(state.tokens, axis=1)), "step")
    prompt = generator.encode(PROMPT)
    return run_sweep(jax.random.key(seed), generator, potential, Resample(1.0), prompt, 8, jnp.asarray(10**6))


def test_rows_that_are_overwritten_in_place_are_those_that_a_whole_gather_gives():
    num_changes = 0
    for seed in range(2):
        sweep, whole = filtered(MODEL, seed), filtered(planted(Whole), seed)
        # duplicates and deaths, with the survivors in their places, at several steps
        ancestors = np.asarray(sweep.records.ancestors[: int(sweep.num_steps)])
        np.testing.assert_array_equal(np.take_along_axis(ancestors, ancestors, axis=1), ancestors)
        num_changes += np.sum(np.any(ancestors != np.arange(8), axis=1))
        np.testing.assert_array_equal(sweep.records.ancestors, whole.records.ancestors)
        np.testing.assert_array_equal(sweep.state.tokens, whole.state.tokens)
        np.testing.assert_array_equal(sweep.state.log_probs, whole.state.log_probs)
        np.testing.assert_array_equal(sweep.population.log_weights, whole.population.log_weights)
    assert num_changes >= 8


def test_a_row_that_stays_stale_is_seen():
    pairs = [(filtered(planted(model), seed).state.log_probs for model in (Lazy, Whole)) for seed in range(2)]
    assert max(float(np.max(np.abs(lazy - whole))) for lazy, whole in pairs) > 100 * ROUNDING


def differ(one, other):
    """Whether two states, continued with the same key, write and weigh differently."""
    return any(not np.array_equal(a, b) for a, b in zip(one[:6], other[:6], strict=True))


def prefixes_differ(generator):
    step = eqx.filter_jit(lambda generator, key, state: generator.step(key, state)[0])
    keys = jax.random.split(jax.random.key(1), 6)
    states = [generator.init(keys[0], PROMPT, 8)]
    for key in keys[:5]:
        states.append(step(generator, key, states[-1]))
    for t, state in enumerate(states):
        prefix = generator.prefix(states[-1], jnp.asarray(t))
        if differ(prefix, state) or differ(step(generator, keys[5], prefix), step(generator, keys[5], state)):
            return True
    return differ(generator.prefix(states[2], jnp.asarray(4)), states[2])


def test_a_prefix_is_the_state_of_earlier():
    assert not prefixes_differ(make(**LONG))
    assert prefixes_differ(make(**LONG, model=planted(Forgetful)))


def test_finished_particles_stay_as_they_are():
    generator = make(max_steps=3, max_tokens=4)
    state, _ = run(generator, 200, num_steps=3)
    again, info = generator.step(jax.random.key(9), state)
    assert np.all(info.is_done)
    assert not np.any(info.num_tokens)
    assert not np.any(info.log_ratio)
    assert not differ(state, again)
    ends = state.tokens[np.arange(200), state.lengths - 1] == END
    np.testing.assert_array_equal(state.is_ended, ends)
    assert np.all(ends | (state.lengths == 4) | (state.num_steps == 3))
    assert set(texts_of(state)) <= set(enumerate_texts(lambda x, m: (m, m), num_steps=3, max_tokens=4))


def test_steps_without_stop_tokens_are_of_one_length():
    generator = make(stop_tokens=(), end_tokens=(), max_steps=3, max_tokens_per_step=4)
    state, _ = run(generator, 10, num_steps=3)
    np.testing.assert_array_equal(state.step_ends, np.tile([4, 8, 12], (10, 1)))


def test_prompts_are_mapped_over():
    generator = make(pad_prompt_to=4)
    prompts = jnp.stack([generator.encode([0, 3, 1]), generator.encode([2])])

    def write(prompt):
        key = jax.random.key(2)
        return generator.step(key, generator.init(key, prompt, 5))[0]

    both = jax.jit(jax.vmap(write))(prompts)
    for i, prompt in enumerate(prompts):
        one = jax.jit(write)(prompt)
        np.testing.assert_array_equal(both.tokens[i], one.tokens)
        np.testing.assert_allclose(both.log_probs[i], one.log_probs, atol=ROUNDING)


def test_weights_and_settings_are_arguments():
    """New weights, temperature and stop tokens of the same shape do not compile anew."""
    traces = []

    @eqx.filter_jit
    def write(generator):
        traces.append(None)
        return generator.step(jax.random.key(0), generator.init(jax.random.key(0), PROMPT, 2))[0].tokens

    other = Transformer.random(8, vocab_size=5, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=16)
    write(make(top_p=0.9))
    write(make(top_p=0.5, temperature=2.0, stop_tokens=[2], model=other))
    assert len(traces) == 1


def test_the_nucleus_is_that_of_sorting():
    logits = 3.0 * jax.random.normal(jax.random.key(0), (50, 101))
    probs = jax.nn.softmax(logits).astype(jnp.float32)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        is_kept = next_token.in_nucleus(probs, jnp.asarray(top_p))
        for row, kept in zip(np.asarray(probs), np.asarray(is_kept), strict=True):
            ordered = np.sort(row)[::-1]
            size = np.searchsorted(np.cumsum(ordered, dtype=np.float64), top_p) + 1
            np.testing.assert_array_equal(kept, row >= ordered[min(size, ordered.size) - 1])


@pytest.mark.skipif(not jax.config.read("jax_enable_x64"), reason="needs float64")
def test_the_nucleus_of_float64_has_its_last_token():
    """It was compared with its own rounding to float32, and lost the token where that is larger."""
    probs = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(7), 200))
    is_kept = next_token.in_nucleus(probs, jnp.asarray(0.6))
    assert bool(jnp.all(jnp.sum(jnp.where(is_kept, probs, 0.0), axis=1) >= 0.6 - 1e-6))


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 100])
def test_tokens_are_drawn_by_their_probabilities(vocab_size):
    log_probs = np.log(np.random.default_rng(vocab_size).dirichlet(np.ones(vocab_size)))
    log_probs[vocab_size // 2 + 1 :: 3] = -np.inf
    log_probs = normalised(log_probs)
    many = jnp.tile(jnp.asarray(log_probs, jnp.float32), (50_000, 1))
    counts = np.bincount(next_token.draw_tokens(jax.random.key(5), many), minlength=vocab_size)
    assert not np.any(counts[np.isneginf(log_probs)])
    is_cell = 50_000 * np.exp(log_probs) >= 5
    if np.sum(is_cell) > 1:
        means = np.exp(log_probs[is_cell])
        assert stats.chisquare(counts[is_cell], means / means.sum() * counts[is_cell].sum()).pvalue > FALSE_ALARM


def test_texts_go_in_and_come_out():
    tokenizer = CharTokenizer("ab+;")
    generator = make(tokenizer=tokenizer, stop_tokens=tokenizer.tokens_with(";"))
    np.testing.assert_array_equal(generator.encode("a;b"), [0, 3, 1] + [-1] * 29)
    state, _ = run(generator, 20)
    expected = ["".join("ab+;"[token] for token in text if token != END) for text in texts_of(state)]
    assert generator.decode(state) == expected
    gathered = generator.gather(state, jnp.array([3, 3]))
    assert generator.decode(gathered) == [expected[3]] * 2
    assert resampling.gather(state.lengths, jnp.array([3, 3])).tolist() == gathered.lengths.tolist()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="prompt must hold at least one token, got none"):
        make().init(jax.random.key(0), [], 2)
    with pytest.raises(ValueError, match="prompt is a text, which needs a tokenizer"):
        make().init(jax.random.key(0), "ab", 2)
    with pytest.raises(ValueError, match=r"prompt must be tokens in \[0, 5\), which the model has, got 5"):
        make().encode([0, 5])
    with pytest.raises(ValueError, match=r"stop_tokens must be tokens in \[0, 5\), which the model has, got 7"):
        make(stop_tokens=[7])
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        make().init(jax.random.key(0), PROMPT, 0)
    with pytest.raises(ValueError, match="max_tokens_per_step must be at least 1, got 0"):
        make(max_tokens_per_step=0)
    with pytest.raises(ValueError, match="temperature must be finite and positive"):
        make(temperature=0.0)
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\)"):
        make(top_p=1.5)
    with pytest.raises(ValueError, match=r"twist must be called as twist\(state, log_probs\)"):
        make(twist=lambda state: 0.0)
    with pytest.raises(ValueError, match="model must have vocab_size, which int has not"):
        make(model=3)
    with pytest.raises(ValueError, match="decode needs a tokenizer"):
        make().decode(None)


def test_a_reference_is_put_in_its_place_with_its_cache():
    """Of a conditional run slot 0 is the reference, and what others write after its prefixes has the model's law."""
    generator = make(max_steps=4, max_tokens_per_step=2)
    potential = Potential(lambda state: jnp.exp(-0.3 * jnp.maximum(state.tokens[:, 0], 0)), "step")
    prompt = generator.encode(PROMPT)
    limit = jnp.asarray(10**6)
    plain = run_sweep(jax.random.key(0), generator, potential, Resample(), prompt, 6, limit)
    reference, _ = draw_reference(jax.random.key(1), generator, potential, plain)
    sweep = run_sweep(jax.random.key(2), generator, potential, Resample(1.0), prompt, 6, limit, reference)
    ancestors = np.asarray(sweep.records.ancestors[: int(sweep.num_steps)])
    assert np.any(ancestors[1:, 1:] == 0)  # others did go on from it
    np.testing.assert_array_equal(sweep.state.tokens[0], reference.state.tokens[0])
    for row, length, log_probs in zip(sweep.state.tokens, sweep.state.lengths, sweep.state.log_probs, strict=True):
        text = jnp.concatenate([jnp.asarray(PROMPT), row[: int(length)]])
        expected = jax.nn.log_softmax(generator.model(text[:-1]))[len(PROMPT) - 1 :]
        expected = jnp.take_along_axis(expected, text[len(PROMPT) :, None], axis=1)[:, 0]
        np.testing.assert_allclose(log_probs[: int(length)], expected, atol=ROUNDING)
