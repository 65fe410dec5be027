"""Runs in process, beside a chain whose evidence and posterior are known by dynamic programming.

Unbiased evidences, conditional runs that leave the posterior as it is, exchanges that leave every chain's law as it is,
and the faults of published code: each planted, and seen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf import weights
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.errors import SamplingWarning
from bayesinf.kernels.inference_scaling import (
    DVTS,
    Beam,
    DiscreteChain,
    Entropic,
    FKSteering,
    Gibbs,
    Independent,
    Islands,
    ParallelTempering,
    Potential,
    Published,
    Resample,
    SoftValue,
    TokenGenerator,
    infer,
    methods,
    population,
    sweep,
)
from bayesinf.kernels.inference_scaling.infer import NO_BUDGET
from bayesinf.kernels.inference_scaling.methods import exchange, run_tempered, swap
from bayesinf.kernels.inference_scaling.population import found, keep_places
from bayesinf.kernels.inference_scaling.sweep import draw_reference
from bayesinf.models.language import CharTokenizer, Transformer

REASON = "an sdist has no benchmarks"
chains = pytest.importorskip("benchmarks.inference_scaling.reasoning_chain", reason=REASON)

KINDS = ("step", "value", "terminal", "odds")
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp", "killing")
NUM_STEPS, NUM_FORMS = 4, 2


def chain(is_variable=True, is_guided=True):
    """Three branches, four steps, no symmetry; short answers are common, and proposals differ from the model."""
    return chains.ReasoningChain(
        jnp.array([0.5, 0.3, 0.2]),
        jnp.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]),
        jnp.array([0.1, 0.4, 0.25]) * is_variable,
        NUM_STEPS,
        NUM_FORMS,
        jnp.array([[0.3, 0.3, 0.4], [0.4, 0.3, 0.3], [0.25, 0.4, 0.35]]) if is_guided else None,
    )


def verifier(scale=1.5):
    # of one precision, so that the logits are the same numbers in programs of the other one
    return chains.Verifier(scale * jax.random.normal(jax.random.key(7), (NUM_STEPS, 3, NUM_FORMS), jnp.float32))


def potential(kind="step", **options):
    return Potential(verifier(), kind=kind, **options)


def run(key, generator, potential, selection, num_particles, reference=None):
    """`run_sweep` without its own cache of programs, so that what a test plants is compiled."""
    potential = selection.prepare(potential)
    return sweep.run_sweep.__wrapped__(
        key, generator, potential, selection, None, num_particles, jnp.asarray(NO_BUDGET, jnp.int32), reference
    )


exact_law = jax.jit(chains.exact)


def answers(state):
    return jnp.take_along_axis(state.branches, state.num_steps[:, None] - 1, axis=1)[:, 0]


def shares(log_weights, state):
    """The weight of every answer."""
    return jnp.zeros(3).at[answers(state)].add(jnp.exp(log_weights))


# programs are shared by tests; the name of what a test plants makes it another function for the cache


@functools.partial(jax.jit, static_argnames="planted")
def evidence_ratios(keys, generator, potential, selection, planted):
    """Zhat / Z, times the weight of every answer and 1; and the exact law of answers."""
    truth = chains.exact(generator, potential)

    def one(key):
        result = run(key, generator, potential, selection, 8)
        ratio = jnp.exp(result.population.log_evidence - truth.log_evidence)
        return ratio * jnp.append(shares(result.population.log_weights, result.state), 1.0)

    return jax.vmap(one)(keys), truth.answers


def evidence_p_value(generator, potential, selection, num_runs=8_000, planted=""):
    """Of E[Zhat / Z] = 1, and E[Zhat f] / Z = P(answer) for all three."""
    keys = jax.random.split(jax.random.key(0), num_runs)
    samples, answers = evidence_ratios(keys, generator, potential, selection, planted)
    return mean_p_value(samples, np.append(answers, 1.0))


class TestTheTruth:
    def test_recursion_is_enumeration(self):
        """Every path of the smallest chain, weighed one by one."""
        generator, product = chain(), potential("odds") * potential("value") ** 0.7
        log_g, log_h = (np.asarray(table) for table in chains.log_factors(product))
        ends = np.zeros((NUM_STEPS, 3))

        def visit(t, last, weight):
            row = generator.initial if t == 0 else generator.transition[last]
            for s in range(3):
                for u in range(NUM_FORMS):
                    here = weight * float(row[s]) / NUM_FORMS * np.exp(log_g[t, s, u])
                    stop = 1.0 if t + 1 == NUM_STEPS else float(generator.stopping[s])
                    ends[t, s] += here * stop * np.exp(log_h[t, s, u])
                    if stop < 1.0:
                        visit(t + 1, s, here * (1.0 - stop))

        visit(0, 0, 1.0)
        truth = exact_law(generator, product)
        np.testing.assert_allclose(truth.log_evidence, np.log(ends.sum()), atol=1e-5)
        np.testing.assert_allclose(truth.ends, ends / ends.sum(), atol=1e-6)

    def test_exact_draws_follow_it(self):
        assert posterior_p_value(starts()) > FALSE_ALARM

    def test_another_chain_is_told_apart(self):
        other = dataclasses.replace(chain(), stopping=jnp.array([0.1, 0.3, 0.25]))
        assert posterior_p_value(starts(other)) < FALSE_ALARM


# Posterior draws: conditional runs


def cells(references):
    """First branch, first form, last branch and length of each answer, as one number."""
    state = references.state
    last = jnp.take_along_axis(state.branches[:, 0], references.num_steps[:, None] - 1, axis=1)[:, 0]
    index = (state.branches[:, 0, 0], state.forms[:, 0, 0], last, references.num_steps - 1)
    return np.ravel_multi_index([np.asarray(leaf) for leaf in index], (3, NUM_FORMS, 3, NUM_STEPS))


def cell_law(generator, potential):
    law = np.zeros((3, NUM_FORMS, 3, NUM_STEPS))
    for s in range(3):
        start = dataclasses.replace(generator, initial=generator.initial * (jnp.arange(3) == s))
        truth = exact_law(start, potential)
        mass = float(jnp.exp(truth.log_evidence))
        for u in range(NUM_FORMS):
            first = forms_first(start, potential, s, u)
            law[s, u] = np.asarray(first).T
        np.testing.assert_allclose(law[s].sum(), mass, rtol=1e-4)
    return law.reshape(-1) / law.sum()


@jax.jit
def forms_first(generator, potential, branch, form):
    """Unnormalised law of (length, end), of paths that begin with this branch and form."""
    blocked = jnp.full((3, NUM_FORMS), -jnp.inf).at[branch, form].set(0.0)
    tables = [table.at[0].add(mask) for table, mask in zip(chains.log_factors(potential), (blocked, 0.0), strict=True)]
    truth = chains.exact_from(generator, *tables)
    return jnp.exp(truth.log_evidence) * truth.ends


def posterior_p_value(references, generator=None, target=None):
    """Chi-square of the answers against the exact posterior."""
    law = cell_law(chain() if generator is None else generator, potential() if target is None else target)
    counts = np.bincount(cells(references), minlength=law.size)
    assert counts[law == 0].sum() == 0
    return merged_chi_square(counts[law > 0], law[law > 0] * counts.sum())


def merged_chi_square(counts, expected):
    """With the rare cells in one."""
    is_rare = expected < 10
    if np.any(is_rare):
        counts = np.append(counts[~is_rare], counts[is_rare].sum())
        expected = np.append(expected[~is_rare], expected[is_rare].sum())
    return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def starts(generator=None, target=None, num=15_000, seed=3):
    generator, target = chain() if generator is None else generator, potential() if target is None else target
    return exact_draws(jax.random.split(jax.random.key(seed), num), generator, target)


@jax.jit
def exact_draws(keys, generator, target):
    return jax.vmap(lambda key: chains.exact_draw(key, generator, target))(keys)


@functools.partial(jax.jit, static_argnames=("num_particles", "planted"))
def moved_by_a_sweep(keys, references, generator, target, selection, num_particles, planted):
    def one(key, reference):
        key_run, key_draw = jax.random.split(key)
        result = run(key_run, generator, target, selection, num_particles, reference)
        return draw_reference(key_draw, generator, target, result)[0]

    return jax.vmap(one)(keys, references)


def after_one_sweep(generator, target, num_particles, ess_threshold, num=15_000, planted=""):
    """References after a conditional run from exact draws of the posterior."""
    keys, before = jax.random.split(jax.random.key(5), num), starts(generator, target, num)
    return moved_by_a_sweep(keys, before, generator, target, Resample(ess_threshold), num_particles, planted)


@functools.partial(jax.jit, static_argnames="planted")
def squares_without_variance(keys, generator, target, selection, planted):
    """Zhat^2 (1 - V) / Z^2."""
    truth = chains.exact(generator, target)

    def one(key):
        people = run(key, generator, target, selection, 32).population
        ratio = jnp.exp(people.log_evidence - truth.log_evidence)
        return ratio**2 * (1.0 - population.relative_variance(people))

    return jax.vmap(one)(keys)


def variance_p_value(selection, planted=""):
    """Of E[Zhat^2 (1 - V)] = Z^2, V being the variance that each run estimates of itself; NaN where there is none."""
    keys = jax.random.split(jax.random.key(3), 8_000)
    samples = squares_without_variance(keys, chain(), potential(), selection, planted)
    return np.nan if np.isnan(samples).any() else mean_p_value(samples, 1.0)


class TestEvidence:
    @pytest.mark.parametrize("selection", [Resample(1.0), Resample(0.5), Entropic(1.0)])
    def test_its_variance_is_estimated_without_bias(self, selection):
        assert variance_p_value(selection) > FALSE_ALARM

    def test_its_variance_is_not_known_for_other_schemes(self, monkeypatch):
        assert np.isnan(variance_p_value(Resample(1.0, scheme="systematic")))
        # planted: the estimate for multinomial resampling, which is even negative here
        descend = population.lineages.descend
        monkeypatch.setattr(
            population.lineages, "descend", lambda lineage, parents, scheme: descend(lineage, parents, "multinomial")
        )
        assert variance_p_value(Resample(1.0, scheme="systematic"), "multinomial lineages") < FALSE_ALARM

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_filter_is_unbiased(self, kind):
        for is_variable in (False, True):
            for ess_threshold in (0.5, 1.0):
                generator, selection = chain(is_variable), Resample(ess_threshold)
                assert evidence_p_value(generator, potential(kind), selection) > FALSE_ALARM, (
                    is_variable,
                    ess_threshold,
                )

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_with_every_scheme(self, scheme):
        assert evidence_p_value(chain(), potential("odds"), Resample(1.0, scheme=scheme)) > FALSE_ALARM

    @pytest.mark.parametrize(
        "selection",
        [
            Resample(0.7, every=2),
            Entropic(0.5),
            Entropic(1.0, scheme="systematic"),
            Independent(),
            *(FKSteering(1.0, spread) for spread in ("difference", "max", "sum")),
        ],
        ids=["every-other", "entropic", "entropic-always", "independent", "difference", "max", "sum"],
    )
    def test_with_every_selection(self, selection):
        target = potential("value") ** 0.5 * potential("step")
        assert evidence_p_value(chain(), target, selection) > FALSE_ALARM

    def test_without_a_proposal(self):
        assert evidence_p_value(chain(is_guided=False), potential(), Resample()) > FALSE_ALARM

    @pytest.mark.parametrize("votes", ["reward", "equal"])
    def test_votes_are_of_answers_of_the_model(self, votes):
        """Though they were drawn from a proposal: E[vote (f - E f)] = 0 under p, with or without the reward."""
        target, selection = potential("terminal"), Independent(votes)
        result = jax.jit(lambda key: run(key, chain(), target, selection, 20_000))(jax.random.key(0))
        truth = exact_law(chain(), target ** (1.0 if votes == "reward" else 0.0))
        apart = jax.nn.one_hot(answers(result.state), 3) - truth.answers

        def p_value(population):
            return mean_p_value(20_000 * jnp.exp(selection.log_votes(population))[:, None] * apart, np.zeros(3))

        assert p_value(result.population) > FALSE_ALARM
        # planted: votes that take draws of the proposal for the model's
        blind = jnp.zeros_like(result.population.log_ratio)
        assert p_value(result.population._replace(log_ratio=blind)) < FALSE_ALARM

    def test_islands_and_their_variance(self):
        """The mean over islands, within the variance that it states; and answers by the islands' weights."""
        generator, target, num = chain(), potential("odds"), 400
        islands = Islands(Resample(1.0, scheme="multinomial"), num_islands=num)
        runs = islands.run(jax.random.key(1), generator, target, None, 8, jnp.asarray(NO_BUDGET, jnp.int32))
        truth = exact_law(generator, target)
        z = np.expm1(runs.log_evidence - float(truth.log_evidence)) / np.sqrt(runs.log_evidence_variance)
        assert 2 * scipy.stats.norm.sf(abs(z)) > FALSE_ALARM
        ratios = np.exp(runs.log_run_weights + np.log(num) + runs.log_evidence - float(truth.log_evidence))
        found_shares = np.stack([shares(s.population.log_weights, s.state) for s in runs.sweeps])
        assert mean_p_value(ratios[:, None] * found_shares, truth.answers) > FALSE_ALARM
        # the variance that is stated is the one that is seen, within a factor of two
        seen = np.var(ratios, ddof=1) / num
        assert 0.5 < runs.log_evidence_variance / seen < 2.0

    def test_distance_to_the_posterior_falls_as_the_root_of_the_particles(self):
        """E|P_N - P| falls as N^{-1/2}: to a half for four times the particles; 0.6 or less is asked for."""
        generator, target = chain(), potential()
        truth = exact_law(generator, target).answers

        def distances(num_particles, num_runs=1_000):
            @jax.jit
            def one(key):
                result = run(key, generator, target, Resample(), num_particles)
                return 0.5 * jnp.sum(jnp.abs(shares(result.population.log_weights, result.state) - truth))

            return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), num_runs), batch_size=500))

        few, more, most = distances(16), distances(64), distances(256)
        for wide, narrow in ((few, more), (more, most)):
            gap = 0.6 * wide - narrow
            assert scipy.stats.ttest_1samp(gap, 0.0, alternative="less").pvalue > FALSE_ALARM
            # and the test has the power to tell a distance that does not fall
            assert scipy.stats.ttest_1samp(0.6 * wide - wide, 0.0, alternative="less").pvalue < FALSE_ALARM


class TestConditionalRuns:
    @pytest.mark.parametrize("num_particles", [2, 5])
    def test_leave_the_posterior_as_it_is(self, num_particles):
        for ess_threshold in (0.5, 1.0):
            references = after_one_sweep(chain(), potential(), num_particles, ess_threshold)
            assert posterior_p_value(references) > FALSE_ALARM, ess_threshold

    def test_move(self):
        before, after = starts(), after_one_sweep(chain(), potential(), 5, 0.5)
        assert np.mean(cells(before) != cells(after)) > 0.25

    def test_with_values_and_equal_lengths(self):
        generator, target = chain(is_variable=False), potential("value")
        references = after_one_sweep(generator, target, 3, 1.0)
        assert posterior_p_value(references, generator, target) > FALSE_ALARM

    def test_a_reference_is_traced_back(self):
        """Its log ratios, number of steps and log G are those of what it says."""
        generator, target = chain(), potential("step") ** 0.5 * potential("odds")
        log_g, log_h = chains.log_factors(target)

        @jax.jit
        def one(key):
            key_run, key_draw = jax.random.split(key)
            result = run(key_run, generator, target, Resample(1.0), 8)
            return draw_reference(key_draw, generator, target, result)

        references, log_weights = jax.vmap(one)(jax.random.split(jax.random.key(0), 200))
        branches, forms, num_steps, is_done = (np.asarray(leaf)[:, 0] for leaf in references.state)
        assert np.all(is_done)
        np.testing.assert_array_equal(references.num_steps, num_steps)
        log_p, log_q = np.log(generator.transition), np.log(generator.proposal)
        for i, (row, ways, length) in enumerate(zip(branches, forms, num_steps, strict=True)):
            ratio = np.zeros(NUM_STEPS)
            ratio[1:length] = (log_p - log_q)[row[: length - 1], row[1:length]]
            np.testing.assert_allclose(references.log_ratio[i], ratio, atol=1e-5)
            ts = np.arange(length)
            log_weight = (
                np.sum(log_g[ts, row[:length], ways[:length]]) + log_h[ts[-1], row[length - 1], ways[length - 1]]
            )
            np.testing.assert_allclose(log_weights[i], log_weight, atol=1e-4)
        assert np.unique(num_steps).size > 2

    def test_what_all_particles_share_is_left_in_its_place(self):
        """A language model's cache of the prompt has no axis of particles."""
        tokenizer = CharTokenizer("abc;")
        generator = TokenGenerator(
            Transformer.random(0, vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2),
            max_steps=3,
            max_tokens_per_step=2,
            stop_tokens=tokenizer.tokens_with(";"),
            tokenizer=tokenizer,
            pad_prompt_to=4,
        )
        likes_a = Potential(lambda state: 0.2 + 0.2 * jnp.sum(state.tokens == 0, axis=1) / 6, kind="value")
        result = infer(0, generator, likes_a, "ab", method=Gibbs(num_sweeps=3, burn_in=0), num_particles=4)
        for before, after in ((0, 4), (4, 8)):
            # the first particle of a sweep is an answer of the one before
            assert result.texts[after] in result.texts[before : before + 4]


@functools.partial(jax.jit, static_argnames="planted")
def moved_by_tempering(keys, generator, target, betas, parity, planted):
    def one(key):
        key_start, key_run, key_exchange = jax.random.split(key, 3)
        keys = jax.random.split(key_start, betas.shape[0])
        start = jax.vmap(lambda key, beta: chains.exact_draw(key, generator, target**beta))(keys, betas)
        budget = jnp.asarray(NO_BUDGET, jnp.int32)
        sweeps = run_tempered(key_run, generator, target, Resample(), None, 3, budget, betas, start)
        return exchange.__wrapped__(key_exchange, generator, target, sweeps, betas, parity)

    return jax.vmap(one)(keys)


class TestTempering:
    BETAS = jnp.array([1.0, 0.4, 0.0])

    def moved(self, target, parity=0, planted=""):
        """References of all chains after a sweep and an exchange, from exact draws of each chain's law."""
        keys = jax.random.split(jax.random.key(11), 10_000)
        return moved_by_tempering(keys, chain(), target, self.BETAS, parity, planted)

    def p_values(self, references, target):
        return [
            posterior_p_value(jax.tree.map(lambda leaf, m=m: leaf[:, m], references), chain(), target**beta)
            for m, beta in enumerate(self.BETAS)
        ]

    # exponents of the potential's own count in an exchange, too
    @pytest.mark.parametrize("exponent", [1.0, 3.0])
    def test_exchanges_leave_every_chain_as_it_is(self, exponent):
        target = potential() ** exponent
        for parity in (0, 1):
            assert min(self.p_values(self.moved(target, parity), target)) > FALSE_ALARM, parity

    def test_planted_exchanges_in_the_wrong_direction(self, monkeypatch):
        monkeypatch.setattr(methods, "swap", lambda key, betas, log_g, parity: swap(key, betas, -log_g, parity))
        assert min(self.p_values(self.moved(potential(), planted="direction"), potential())) < FALSE_ALARM

    def test_planted_exchanges_that_forget_exponents(self, monkeypatch):
        monkeypatch.setattr(methods, "swap", lambda key, betas, log_g, parity: swap(key, betas, log_g / 3.0, parity))
        target = potential() ** 3.0
        assert min(self.p_values(self.moved(target, planted="exponents"), target)) < FALSE_ALARM

    def test_neighbours_alone_swap(self):
        always = jnp.array([0.0, 100.0, 200.0, 300.0])
        betas = jnp.array([1.0, 0.5, 0.25, 0.0])
        assert swap(jax.random.key(0), betas, always * 1e3, 0).tolist() == [1, 0, 3, 2]
        assert swap(jax.random.key(0), betas, always * 1e3, 1).tolist() == [0, 2, 1, 3]
        impossible = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
        assert swap(jax.random.key(0), betas, impossible, 0).tolist() == [0, 1, 2, 3]

    def test_the_method_finds_the_answers(self):
        """All of a run: sweeps, exchanges, and what is pooled."""
        generator, target = chain(), potential("odds")
        method = ParallelTempering((1.0, 0.5), num_sweeps=30, burn_in=2)
        found_answers = np.array(
            [
                [
                    infer(seed, generator, target, method=method, num_particles=8).posterior.get(str(s), 0.0)
                    for s in range(3)
                ]
                for seed in range(8)
            ]
        )
        assert mean_p_value(found_answers, exact_law(generator, target).answers) > FALSE_ALARM


class Restless(Potential):
    """A planted bug: finished answers are weighed again at every step."""

    def weigh_one(self, state, log_score, was_done, is_done):
        return super().weigh_one(state, log_score, jnp.zeros_like(was_done), is_done)


class Forgetful(Resample):
    """A planted bug, of the published steering code: where nobody is resampled, weights are dropped."""

    def choose(self, key, population, t, max_steps):
        ancestors, _, is_resampled = super().choose(key, population, t, max_steps)
        num = ancestors.shape[0]
        return ancestors, jnp.full(num, -jnp.log(num)), is_resampled


class Uncorrected(Entropic):
    """A planted bug, of the published entropic code: what is drawn by W^{1/tau} starts from equal weights."""

    def choose(self, key, population, t, max_steps):
        ancestors, log_carried, is_resampled = super().choose(key, population, t, max_steps)
        num = ancestors.shape[0]
        return ancestors, jnp.where(is_resampled, -jnp.log(num), log_carried), is_resampled


class TestFaultsOfPublishedCode:
    def test_finished_answers_that_are_weighed_again(self):
        assert evidence_p_value(chain(), Restless(verifier(), kind="step"), Resample()) < FALSE_ALARM

    def test_weights_that_are_dropped_where_nobody_is_resampled(self):
        assert evidence_p_value(chain(), potential(), Forgetful(0.5)) < FALSE_ALARM

    def test_entropic_draws_without_their_weights(self):
        assert evidence_p_value(chain(), potential("odds"), Uncorrected()) < FALSE_ALARM

    def test_increments_of_the_evidence_without_carried_weights(self, monkeypatch):
        def unweighted(log_carried, log_increments):
            log_weights, _ = weights.normalize(log_carried + log_increments)
            return log_weights, weights.log_mean_exp(log_increments), weights.num_invalid(log_increments)

        monkeypatch.setattr(population, "reweigh", unweighted)
        assert evidence_p_value(chain(), potential(), Resample(), 20_000, "unweighted increments") < FALSE_ALARM

    def test_a_reference_that_is_not_retained(self, monkeypatch):
        monkeypatch.setattr(sweep, "_retrace", lambda generator, reference, state, info, t: (state, info))
        assert posterior_p_value(after_one_sweep(chain(), potential(), 2, 1.0, planted="not retained")) < FALSE_ALARM

    def test_a_reference_read_one_step_ahead(self, monkeypatch):
        retrace = sweep._retrace

        def ahead(generator, reference, state, info, t):
            return retrace(generator, reference, state, info, jnp.minimum(t + 1, reference.num_steps - 1))

        monkeypatch.setattr(sweep, "_retrace", ahead)
        assert posterior_p_value(after_one_sweep(chain(), potential(), 2, 1.0, planted="read ahead")) < FALSE_ALARM


class TestDwell:
    """Two answers of equal prior and equal final reward 0.9, of 2 and of 8 steps: half and half is the truth."""

    NUM, RUNS = 32, 2_000

    @staticmethod
    def generator():
        to_end, on = [[0, 0, 1.0], [0, 1.0, 0]], [0, 0, 1.0]
        # a then c, which ends; b to the last of the eight steps
        return DiscreteChain([0.5, 0.5, 0.0], [*to_end, on], max_steps=8, end="c")

    @staticmethod
    def rewards(kind):
        def score(state):
            return jnp.where(state.is_done, 0.9, 0.8)

        return Potential(score, kind=kind)

    def estimates(self, selection, kind):
        """The short answer's share, times Zhat / 0.9 where there is an evidence; and its plain share."""

        @jax.jit
        def one(key):
            result = run(key, self.generator(), self.rewards(kind), selection, self.NUM)
            is_short = result.state.num_letters == 2
            share = jnp.sum(jnp.where(is_short, jnp.exp(selection.log_votes(result.population)), 0.0))
            return share, share * jnp.exp(result.population.log_evidence) / 0.9

        return (np.asarray(x) for x in jax.vmap(one)(jax.random.split(jax.random.key(0), self.RUNS)))

    def published_share(self):
        """Of the published rule, exactly: who is short is a Markov chain of counts."""
        num = self.NUM
        counts = np.arange(num + 1)
        law = scipy.stats.binom.pmf(counts, num, 0.5)
        # from the second step to the seventh the short ones have odds 9, the others 4
        p = 9 * counts / (9 * counts + 4 * (num - counts))
        move = scipy.stats.binom.pmf(counts[None, :], num, p[:, None])
        return (law @ np.linalg.matrix_power(move, 6)) @ counts / num

    def test_published_weights_favour_the_short_answer(self):
        share, _ = self.estimates(Published(), "odds")
        assert mean_p_value(share, self.published_share()) > FALSE_ALARM
        assert abs(1 / (1 + (4 / 9) ** 6) - 0.992) < 5e-4  # what it tends to with the number of particles
        assert mean_p_value(share, 0.5) < FALSE_ALARM

    def test_ours_do_not(self):
        for selection in (Resample(), Resample(1.0), Entropic(1.0), FKSteering(1.0, "sum")):
            _, weighted = self.estimates(selection, "value")
            assert mean_p_value(weighted, 0.5) > FALSE_ALARM


class TestSearches:
    def people(self, rewards, is_done):
        start = found(potential(), len(rewards))
        return start._replace(log_reward=jnp.log(jnp.array(rewards)), is_done=jnp.array(is_done))

    def test_beam_keeps_the_finished_once_and_shares_the_rest(self):
        people = self.people(
            [0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.05, 0.6], [True, False, False, True, False, False, False, True]
        )
        ancestors, _, _ = Beam(2).choose(jax.random.key(0), people, jnp.asarray(3), 8)
        # of the four best, 0 2 3 7, three have finished
        assert sorted(ancestors.tolist()) == [0, 2, 2, 2, 2, 2, 3, 7]

    def test_beam_of_finished_answers_counts_all_alike(self):
        people = self.people([0.9, 0.1, 0.8, 0.7], [True, False, True, True])
        ancestors, _, _ = Beam(2).choose(jax.random.key(0), people, jnp.asarray(3), 8)
        assert sorted(ancestors.tolist()) == [0, 0, 2, 2]

    def test_groups_do_not_meet(self):
        people = self.people([0.9, 0.1, 0.2, 0.3], [False] * 4)
        for selection in (DVTS(2), SoftValue(0.0, 2)):
            assert selection.choose(jax.random.key(0), people, jnp.asarray(1), 8)[0].tolist() == [0, 0, 3, 3]

    def test_soft_values_are_drawn_by_them(self):
        people = self.people([0.6, 0.2, 0.3, 0.3], [False] * 4)
        keys = jax.random.split(jax.random.key(0), 4_000)
        drawn = jax.vmap(lambda key: SoftValue(1.0, 2).choose(key, people, jnp.asarray(1), 8)[0])(keys)
        assert scipy.stats.binomtest(int(jnp.sum(drawn[:, 0] == 0)), 4_000, 0.75).pvalue > FALSE_ALARM

    def test_keep_places(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            drawn = rng.integers(0, 9, 9).astype(np.int32)
            kept = np.asarray(keep_places(jnp.asarray(drawn)))
            assert sorted(kept) == sorted(drawn)
            np.testing.assert_array_equal(kept[kept], kept)


class TestWhatIsCounted:
    def test_tokens_are_steps_of_open_answers(self):
        result = infer(0, chain(), potential(), num_particles=16)
        lengths = [text.count("\n") + 1 for text in result.texts]
        assert result.tokens.generated == result.num_tokens.sum() == result.num_calls
        assert result.tokens.generated >= max(lengths)
        independent = infer(0, chain(), potential(), method="majority", num_particles=16)
        assert independent.tokens.generated == sum(text.count("\n") + 1 for text in independent.texts)
        assert independent.tokens.wasted == 0

    def test_a_reference_costs_nothing(self):
        result = infer(0, chain(), potential(), method=Gibbs(num_sweeps=4, burn_in=0), num_particles=4)
        assert np.all(result.num_tokens[1:, :, 0] == 0)
        assert result.num_tokens[0, 0, 0] == 1
        np.testing.assert_array_equal(result.num_tokens[:, 0, 1:], 1)

    @pytest.mark.parametrize("method", ["particle_filter", "beam", "islands", "particle_gibbs", "parallel_tempering"])
    def test_a_budget_bounds_it(self, method):
        result = infer(0, chain(), potential(), method=method, budget=200)
        assert result.tokens.generated <= 200
        assert result.status == "complete"

    @pytest.mark.parametrize("method", [Gibbs(4, 1), ParallelTempering((1.0, 0.5), 4, 1)], ids=["gibbs", "tempering"])
    def test_a_sweep_that_was_cut_counts_for_nothing(self, method):
        """Its finished answers are the short ones."""
        whole = infer(0, chain(), potential(), method=method, num_particles=16)
        chains_of = 1 if isinstance(method, Gibbs) else 2
        budget = int(whole.tokens.generated) - 10 * chains_of
        with pytest.warns(SamplingWarning, match=f"budget of {budget} tokens was spent with"):
            cut = infer(0, chain(), potential(), method=method, num_particles=16, budget=budget)
        # the last of the three that count
        is_done = cut.is_done.reshape(3, 16)
        assert is_done[:2].all()
        assert is_done[2].any()
        assert not is_done[2].all()
        assert np.isneginf(cut.log_votes[32:]).all()
        assert cut.texts[:32] == whole.texts[:32]
        expected = whole.log_votes[:32] - np.logaddexp.reduce(whole.log_votes[:32])
        np.testing.assert_allclose(cut.log_votes[:32], expected, atol=1e-5)  # rounding

    def test_no_sweep_begins_with_less_than_a_token_for_each_chain(self):
        betas = (1.0, 0.5)
        spent = infer(0, chain(), potential(), method=ParallelTempering(betas, 1, 0), num_particles=8).tokens.generated
        method = ParallelTempering(betas, 2, 0)
        result = infer(0, chain(), potential(), method=method, num_particles=8, budget=spent + 1)
        assert result.tokens.generated == spent
        assert result.num_steps.shape == (1,)

    def test_a_first_sweep_that_was_cut_is_all_there_is(self):
        with pytest.warns(SamplingWarning, match="budget of 20 tokens was spent with"):
            cut = infer(0, chain(), potential(), method=Gibbs(4, 1), num_particles=16, budget=20)
        assert sum(cut.posterior.values()) == pytest.approx(1.0)

    def test_a_budget_below_a_step_of_every_island(self):
        with pytest.raises(ValueError, match="budget must allow one step of 8"):
            infer(0, chain(), potential(), method=Islands(num_islands=4), num_particles=2, budget=7)

    def test_a_population_that_dies_early_is_not_alive(self):
        """Islands die at different steps; rows after the last are no weights."""
        dies = Potential(lambda state: jnp.where(state.is_done | (state.branches[:, 0] == 0), 0.0, 1.0), kind="step")
        with pytest.warns(SamplingWarning, match="died"):
            result = infer(3, chain(), dies, method=Islands(num_islands=8), num_particles=1, throw=False)
        assert np.unique(result.num_steps).size > 1
        assert "died" in result.status

    def test_steering_is_spread_on_islands_too(self):
        target = potential("value")
        spread = infer(0, chain(), target, method=Islands(FKSteering(1.0, "max")), num_particles=8)
        plain = infer(0, chain(), target, method=Islands(FKSteering(1.0, "difference")), num_particles=8)
        assert not np.array_equal(spread.log_weights, plain.log_weights)

    def test_a_power_of_zero_ranks_impossible_answers(self):
        never = Potential(lambda state: jnp.zeros(state.num_steps.shape), kind="value")
        states = (never**0.0).start(1)
        is_not, is_done = jnp.array([False]), jnp.array([True])
        states, log_g = (never**0.0).weigh(states, (jnp.array([-jnp.inf]),), is_not, is_done)
        assert log_g.tolist() == [0.0]
        assert (never**0.0).log_reward(states).tolist() == [0.0]


class TestBadInput:
    def test_scores_of_another_shape(self, unchecked):
        column = Potential(lambda state: jnp.full((state.num_steps.shape[0], 1), 0.5), kind="step")
        for wrong, shape in ((column, r"\(16, 1\)"), (Potential(lambda state: 0.5, kind="step"), r"\(\)")):
            with pytest.raises(ValueError, match=f"one number for each of 16 particles.* got shape {shape}"):
                infer(0, chain(), wrong, num_particles=16)

    def test_steering(self, unchecked):
        for bad in ({"ess_threshold": 1.5}, {"spread": "min"}, {"every": 0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                FKSteering(**bad)

    def test_a_proposal_that_misses_a_transition(self):
        with pytest.raises(ValueError, match=r"got 0 at \[0, 1\]"):
            DiscreteChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], max_steps=3, proposal=[[1.0, 0.0], [0.5, 0.5]])
