"""`infer`: every method by name, what the result tells, budgets, batches, and failures that keep what there is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import errors
from bayesinf.kernels.inference_scaling import (
    METHODS,
    DiscreteChain,
    Gibbs,
    Inference,
    Islands,
    ParallelTempering,
    Potential,
    Published,
    infer_batch,
    last_line,
)

# three letters, of which "c" ends the answer: lengths differ
CHAIN = DiscreteChain([0.5, 0.4, 0.1], [[0.6, 0.2, 0.2], [0.3, 0.5, 0.2], [0, 0, 1]], max_steps=5, end="c")
LIKES_B = Potential(lambda state: jnp.array([0.2, 0.9, 0.6])[state.last], kind="step")
NUM = 64


def run(method="particle_filter", potential=LIKES_B, **options):
    return bi.kernels.infer(0, CHAIN, potential, method=method, **{"num_particles": NUM} | options)


def is_answer(text):
    return len(text) == 5 or text.endswith("c")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_and_counts_what_it_cost(name):
    value = Potential(lambda state: jnp.array([0.2, 0.9, 0.6])[state.last], "value")
    result = run(name, value if name in ("fk_steering", "twisted_smc") else LIKES_B)
    assert result.status == "complete"
    assert result.is_done.all()
    assert all(is_answer(text) for text in result.texts)
    assert sum(result.posterior.values()) == pytest.approx(1.0)
    assert list(result.posterior.values()) == sorted(result.posterior.values(), reverse=True)
    assert result.best() in result.answers
    assert all(is_answer(result.best(rule, key=1)) for rule in ("weighted_majority", "argmax", "sample"))
    # a particle costs a token a step until it has finished
    assert 0 <= result.tokens.wasted < result.tokens.generated
    if name not in ("cascade", "a_star"):  # which have no populations of one size
        assert result.num_tokens.sum() <= NUM * 5 * result.ess.shape[0]
        np.testing.assert_array_equal(result.num_ancestors[:, -1], NUM)
    has_evidence = name not in ("particle_filter_published", "beam", "dvts", "svdd", "a_star")
    assert np.isfinite(result.log_evidence) == has_evidence


def test_tokens_are_counted_once():
    """Best of n wastes nothing and costs the letters that are read; a filter's lines that died are wasted."""
    independent = run("best_of_n")
    assert independent.tokens.generated == sum(map(len, independent.texts))
    assert independent.tokens.wasted == 0
    filtered = run(bi.kernels.inference_scaling.Resample(1.0))
    read = {}  # the tree of prefixes by slot: each node is paid for once
    for slot in range(NUM):
        index = slot
        for t in range(int(filtered.num_steps[0]) - 1, -1, -1):
            read[t, index] = int(filtered.num_tokens[0, t, index])
            index = filtered.ancestors[0, t, index]
    assert filtered.tokens.generated - filtered.tokens.wasted == sum(read.values())
    assert filtered.tokens.wasted > 0


def test_the_answer_is_what_the_rule_says():
    result = run()
    votes = np.exp(result.log_votes)
    total = {text: votes[[other == text for other in result.texts]].sum() for text in result.texts}
    assert result.best() == max(total, key=total.get)
    assert result.best("argmax") == result.answers[int(np.argmax(np.where(votes > 0, result.log_rewards, -np.inf)))]
    drawn = {result.best("sample", key=seed) for seed in range(20)}
    assert len(drawn) > 1
    assert result.best("sample", key=3) == result.best("sample", key=3)
    grouped = run(answer=lambda text: str(text.count("b")))
    assert set(grouped.posterior) <= set("012345")


@pytest.mark.parametrize("method", ["particle_gibbs", "weighted_best_of_n", "svdd"])
def test_no_rule_chooses_what_is_impossible(method):
    """Texts that begin with "b" die at their second letter, and have the highest score of all in the end."""

    def value(state):
        is_b = state.letters[:, 0] == 1
        return jnp.where(is_b & (state.num_letters == 2), 0.0, jnp.where(is_b & (state.num_letters > 2), 0.9, 0.3))

    result = run(method, Potential(value, "value"), num_particles=16)
    chosen = {result.best(rule) for rule in ("weighted_majority", "argmax")} | set(result.posterior)
    assert chosen
    assert not any(text.startswith("b") and len(text) > 1 for text in chosen)


def test_it_is_the_same_under_the_same_key():
    assert run().texts == run().texts
    assert bi.kernels.infer(1, CHAIN, LIKES_B, num_particles=NUM).texts != run().texts


@pytest.mark.filterwarnings("ignore:the budget")
def test_a_result_survives_json(tmp_path):
    result = run("islands")
    for read in (Inference.from_json(result.to_json()), None):
        if read is None:
            result.to_json(tmp_path / "result.json")
            read = Inference.from_json(tmp_path / "result.json")
        assert read.posterior == result.posterior
        assert read.tokens == result.tokens
        np.testing.assert_array_equal(read.ancestors, result.ancestors)
        np.testing.assert_array_equal(read.num_ancestors, result.num_ancestors)
    cut = run(potential=LIKES_B, budget=70, throw=False)
    assert np.isnan(cut.log_evidence)
    assert np.isneginf(cut.log_votes).any()

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    assert json.loads(cut.to_json(), parse_constant=refuse)["log_evidence"] is None
    read = Inference.from_json(cut.to_json())
    assert read.posterior == cut.posterior
    for name in ("log_votes", "log_rewards", "log_weights"):
        np.testing.assert_array_equal(getattr(read, name), getattr(cut, name))
    assert np.isnan(read.log_evidence)
    # of a run that ended before its first step
    none = dataclasses.replace(cut, num_steps=np.zeros(1, int), **{
        name: getattr(cut, name)[:, :0] for name in ("ess", "is_resampled", "ancestors", "log_weights", "num_tokens")
    })  # fmt: skip
    read = Inference.from_json(none.to_json())
    for name in ("ess", "is_resampled", "ancestors", "log_weights", "num_tokens", "num_ancestors"):
        assert getattr(read, name).shape == getattr(none, name).shape, name
    tree = result.to_datatree()
    assert tree["steps"]["ess"].shape == result.ess.shape
    assert tree["answers"]["text"].values.tolist() == result.texts


def test_the_genealogy_is_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    result = run()
    ax = result.plot_genealogy()
    assert len(ax.lines) == NUM * result.num_steps[0]
    dark = sum(line.get_color() == "C0" for line in ax.lines)
    assert dark == result.num_ancestors.sum()


def test_a_batch_is_each_prompt_alone():
    results = infer_batch(0, CHAIN, [LIKES_B, LIKES_B**2.0], [None, None], num_particles=NUM)
    for i, (result, potential) in enumerate(zip(results, [LIKES_B, LIKES_B**2.0], strict=True)):
        alone = bi.kernels.infer(jax.random.fold_in(jax.random.key(0), i), CHAIN, potential, num_particles=NUM)
        assert result.texts == alone.texts
        assert result.log_evidence == pytest.approx(alone.log_evidence, rel=1e-5)
    with pytest.raises(ValueError, match="potential must be one, or a list of 2"):
        infer_batch(0, CHAIN, [LIKES_B], [None, None])
    with pytest.raises(ValueError, match="of one population for a batch"):
        infer_batch(0, CHAIN, LIKES_B, [None], method="islands")


def test_a_budget_is_kept_and_shared():
    result = run(num_particles=None, budget=500)
    assert result.ess.shape[0] == 1
    assert result.log_weights.shape[-1] == 100  # of up to five tokens each
    assert result.tokens.generated <= 500
    assert run("particle_gibbs", num_particles=None, budget=500).log_weights.shape[-1] == 25  # four sweeps
    assert run("beam", num_particles=None, budget=72).log_weights.shape[-1] == 12  # whole groups of four
    with pytest.warns(errors.SamplingWarning, match="budget of 70 tokens was spent with .* answers unfinished"):
        cut = run(budget=70)
    assert NUM < cut.tokens.generated < 70 + NUM  # no step begins once it is spent
    assert np.isnan(cut.log_evidence)  # that of the steps so far would be another number
    assert np.isneginf(cut.log_votes[~cut.is_done]).all()
    assert all((answer is None) == (not done) for answer, done in zip(cut.answers, cut.is_done, strict=True))


def test_a_budget_larger_than_integers_is_none():
    plain, large = run(), run(budget=2**40)
    assert (large.texts, large.log_evidence) == (plain.texts, plain.log_evidence)
    (batched,) = infer_batch(0, CHAIN, LIKES_B, [None], num_particles=NUM, budget=2**40)
    assert batched.status == "complete"
    assert run(budget=2**40, barrier="barrier").status == "complete"


def test_unusable_scores_are_an_error_with_the_result():
    strange = Potential(lambda state: jnp.where(state.last == 1, 1.5, 0.5), kind="step")
    with pytest.raises(errors.PotentialError, match="scores were NaN or out of the range of their kind") as caught:
        run(potential=strange)
    assert "b" not in "".join(text for text, vote in zip(*votes_of(caught.value.result), strict=True) if vote > 0)
    with pytest.warns(errors.SamplingWarning, match="out of the range"):
        assert run(potential=strange, throw=False).status != "complete"


def test_unusable_scores_of_populations_without_a_vote_are_counted():
    strange = Potential(lambda state: jnp.where(state.last == 1, jnp.nan, 0.5), kind="step")
    # the same sweeps, of which all count, or the last one alone
    with pytest.warns(errors.SamplingWarning, match="scores were NaN"):
        results = [run(Gibbs(3, burn_in), strange, throw=False) for burn_in in (0, 2)]
    assert results[0].num_invalid == results[1].num_invalid > 0
    method, key = ParallelTempering(num_sweeps=2), jax.random.key(0)
    runs = method.run(key, CHAIN, strange, CHAIN.encode(None), NUM, jnp.asarray(10**6))
    counts = [int(jnp.sum(sweep.records.num_invalid)) for sweep in (*runs.sweeps, *runs.others)]
    assert len(counts) == 6
    assert min(counts) > 0
    with pytest.raises(errors.PotentialError, match=f"{sum(counts)} scores were NaN"):
        run(method, strange)


def votes_of(result):
    return result.texts, np.exp(result.log_votes)


def test_a_dead_population_is_an_error_with_the_result():
    impossible = Potential(lambda state: jnp.where(state.num_letters >= 3, 0.0, 0.5) * (state.last != 2), kind="step")
    with pytest.raises(errors.DegenerateWeightsError, match=f"All {NUM} particles died at step 3") as caught:
        run(potential=impossible)
    result = caught.value.result
    assert result.ess[0, :2].all()
    assert result.best() is result.best("argmax") is None
    with pytest.warns(errors.SamplingWarning, match="died at step 3"):
        dead = run(potential=impossible, throw=False)
    assert dead.log_evidence == -np.inf
    assert np.isnan(dead.log_evidence_variance)


def test_a_changed_score_is_read_anew():
    weights = {"b": 0.9}

    def score(state):
        return jnp.where(state.last == 1, weights["b"], 0.5)

    potential = Potential(score, kind="step")
    before = run(potential=potential).log_evidence
    weights["b"] = 0.1
    assert run(potential=potential).log_evidence < before


def test_one_particle_is_enough():
    result = run(num_particles=1)
    assert len(result.texts) == 1
    assert np.isnan(result.log_evidence_variance)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="method must be one of 'best_of_n'"):
        run("bon")
    with pytest.raises(ValueError, match="method must be a name, a Selection"):
        run(3)
    with pytest.raises(ValueError, match="generator must be a StepGenerator or TextGenerator, got str"):
        bi.kernels.infer(0, "gpt", LIKES_B)
    with pytest.raises(ValueError, match="wrap the score"):
        bi.kernels.infer(0, CHAIN, lambda state: 0.5)
    with pytest.raises(ValueError, match="budget must allow one step of 64 particles"):
        run(budget=10)
    with pytest.raises(ValueError, match="num_particles must be a multiple of width=4, got 6"):
        run("beam", num_particles=6)
    with pytest.raises(ValueError, match="twisted_smc needs a potential"):
        run("twisted_smc")
    with pytest.raises(ValueError, match="rule='sample' needs a key"):
        run().best("sample")
    with pytest.raises(ValueError, match="rule must be one of"):
        run().best("mode")
    with pytest.raises(ValueError, match="betas must fall from 1"):
        ParallelTempering((0.5, 1.0))
    with pytest.raises(ValueError, match="burn_in must be below num_sweeps=2"):
        Gibbs(2, 2)
    with pytest.raises(ValueError, match="selection must have an evidence"):
        Islands(Published())
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        run("particle_gibbs", num_particles=1)
    with pytest.raises(ValueError, match="probabilities that sum to one"):
        DiscreteChain([0.5, 0.4], [[1, 0], [0, 1]], max_steps=2)
    with pytest.raises(ValueError, match="transition must have shape"):
        DiscreteChain([0.5, 0.5], [[1.0]], max_steps=2)
    with pytest.raises(ValueError, match="end must be letters of 'ab'"):
        DiscreteChain([0.5, 0.5], [[1, 0], [0, 1]], max_steps=2, end="z")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"cut off \boxed{3", r"cut off \boxed{3"),
        ("a\n\n  b \n\n", "b"),
        ("", ""),
    ],
)
def test_the_answer_of_a_text(text, expected):
    assert last_line(text) == expected
