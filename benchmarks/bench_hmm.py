"""Hidden Markov models of 10 Gaussian states on a series of 100,000 numbers, in float64, beside hmmlearn and dynamax.

And on the same numbers as 1,000 sequences of 50 to 150.

All see the same series and the same parameters, and must find the same log likelihood. The first call of a row
compiles.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import has

import bayesinf as bi
from bayesinf import models

NUM_STEPS, NUM_STATES, NUM_ITERATIONS, NUM_SEQUENCES = 100_000, 10, 10, 1_000
TITLE = f"T={NUM_STEPS:,}, K={NUM_STATES}"


def parameters(num_states):
    """First states, transitions, means and scales; neighbouring states overlap."""
    transition = 0.9 * np.eye(num_states) + 0.1 / num_states
    mean = np.linspace(-1.0, 1.0, num_states) * (num_states - 1)
    return np.full(num_states, 1.0 / num_states), transition, mean, np.linspace(0.8, 1.6, num_states)


INITIAL, TRANSITION, MEAN, SCALE = parameters(NUM_STATES)


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(double):
    return models.HiddenMarkovModel(models.hmm.Gaussian(MEAN, SCALE), INITIAL, TRANSITION)


@pytest.fixture(scope="module")
def ys(model):
    return model.simulate(0, NUM_STEPS)[1]


def hmmlearn_model(implementation, num_states=NUM_STATES, **given):
    from hmmlearn.hmm import GaussianHMM

    other = GaussianHMM(num_states, "diag", implementation=implementation, init_params="", **given)
    other.startprob_, other.transmat_, mean, scale = parameters(num_states)
    other.means_, other.covars_ = mean[:, None], scale[:, None] ** 2
    return other


def agree(found, expected):
    """Of numbers around a hundred thousand, to ten digits."""
    assert abs(float(found) / float(expected) - 1) < 1e-10, (found, expected)


def bench_given_log_likelihoods(compare, model, ys):
    """What is done with arrays: the densities of the data are outside the clock."""
    log_lik = model.log_lik(ys)
    arrays = model.log_initial, model.log_transition, log_lik
    calls = {
        "bayesinf hmm_filter": partial(models.hmm_filter, *arrays),
        "bayesinf hmm_filter, blocked": partial(models.hmm_filter, *arrays, method="blocked"),
        "bayesinf hmm_filter, associative": partial(models.hmm_filter, *arrays, method="associative"),
        "bayesinf hmm_smoother, with expected transitions": partial(models.hmm_smoother, *arrays),
        "bayesinf hmm_viterbi": partial(models.hmm_viterbi, *arrays),
        "bayesinf hmm_sample, one path": partial(models.hmm_sample, 0, *arrays, 1),
    }
    if has("dynamax"):
        from dynamax import hidden_markov_model as dynamax

        given = jnp.asarray(INITIAL), jnp.asarray(TRANSITION), log_lik
        calls |= {
            "dynamax hmm_filter": partial(jax.jit(dynamax.hmm_filter), *given),
            "dynamax parallel_hmm_filter": partial(jax.jit(dynamax.parallel_hmm_filter), *given),
            "dynamax hmm_smoother": partial(jax.jit(dynamax.hmm_smoother), *given),
            "dynamax hmm_two_filter_smoother": partial(jax.jit(dynamax.hmm_two_filter_smoother), *given),
            "dynamax hmm_posterior_mode": partial(jax.jit(dynamax.hmm_posterior_mode), *given),
        }
    compare(f"in float64: hidden Markov chain given log likelihoods, {TITLE}", calls, rounds=5)
    if has("dynamax"):
        agree(calls["bayesinf hmm_filter"]().log_evidence, calls["dynamax hmm_filter"]().marginal_loglik)


def bench_from_the_data(compare, model, ys):
    """Densities included."""
    calls = {
        "bayesinf log_prob": lambda: model.log_prob(ys),
        "bayesinf smooth": lambda: model.smooth(ys),
        "bayesinf viterbi": lambda: model.viterbi(ys),
        "bayesinf gradient of log_prob": lambda: gradient(model.emission.mean, model, ys),
    }
    if has("hmmlearn"):
        X = np.asarray(ys)[:, None]
        for implementation in ("scaling", "log"):
            other = hmmlearn_model(implementation)
            # of a bare float `compare` would think that it is seconds
            calls[f"hmmlearn score, {implementation}"] = lambda other=other: np.asarray(other.score(X))
            calls[f"hmmlearn score_samples, {implementation}"] = partial(other.score_samples, X)
        calls["hmmlearn decode"] = partial(hmmlearn_model("log").decode, X)
    compare(f"in float64: Gaussian hidden Markov model, {TITLE}", calls, rounds=5)
    if has("hmmlearn"):
        for implementation in ("scaling", "log"):
            agree(calls["bayesinf log_prob"](), calls[f"hmmlearn score, {implementation}"]())


@jax.jit
def gradient(mean, model, ys):
    def log_prob(mean):
        return models.hmm.with_parameters(model, {"mean": mean}).log_prob(ys)

    return jax.grad(log_prob)(mean)


@pytest.mark.parametrize(("num_states", "length"), [(10, 100), (3, 20)])
def bench_many_sequences(compare, num_states, length):
    """One padded batch of different lengths; hmmlearn loops over sequences, and dynamax wants one length."""
    initial, transition, mean, scale = parameters(num_states)
    model = models.HiddenMarkovModel(models.hmm.Gaussian(mean, scale), initial, transition)
    lengths = np.random.default_rng(0).integers(length // 2, 3 * length // 2 + 1, NUM_SEQUENCES)
    stacked = np.asarray(model.simulate(0, int(lengths.sum()))[1])
    padded = np.full((NUM_SEQUENCES, lengths.max()), np.nan)
    padded[np.arange(lengths.max()) < lengths[:, None]] = stacked
    padded, stacked, lengths_of_ours = jnp.asarray(padded), stacked[:, None], jnp.asarray(lengths)

    def run_bayesinf():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bi.errors.SamplingWarning)
            options = {"num_starts": 1, "max_iterations": NUM_ITERATIONS, "tolerance": 1e-300}
            return model.fit(0, padded, lengths=lengths_of_ours, **options)

    calls = {
        "bayesinf log_prob": lambda: model.log_prob(padded, lengths=lengths_of_ours),
        "bayesinf smooth": lambda: model.smooth(padded, lengths=lengths_of_ours),
        "bayesinf viterbi": lambda: model.viterbi(padded, lengths=lengths_of_ours),
        "bayesinf fit": run_bayesinf,
    }
    if has("hmmlearn"):
        for implementation in ("scaling", "log"):
            other = hmmlearn_model(implementation, num_states)

            def run_hmmlearn(implementation=implementation):
                other = hmmlearn_model(implementation, num_states, n_iter=NUM_ITERATIONS, tol=-np.inf)
                return jnp.asarray(other.fit(stacked, lengths).means_)

            calls |= {
                f"hmmlearn score, {implementation}": lambda other=other: np.asarray(other.score(stacked, lengths)),
                f"hmmlearn score_samples, {implementation}": partial(other.score_samples, stacked, lengths),
                f"hmmlearn decode, {implementation}": partial(other.decode, stacked, lengths),
                f"hmmlearn fit, {implementation}": run_hmmlearn,
            }

    def note(name, medians):
        twin = {"log_prob": "score", "smooth": "score_samples", "viterbi": "decode", "fit": "fit"}
        theirs = f"hmmlearn {twin.get(name.removeprefix('bayesinf '))}, "
        found = [seconds for other, seconds in medians.items() if other.startswith(theirs)]
        return f"{min(found) / medians[name]:.3g} times as fast as hmmlearn's faster one" if found else ""

    title = f"in float64: {NUM_SEQUENCES:,} sequences, {lengths.sum():,} numbers, K={num_states}"
    compare(title, calls, rounds=3, note=note)
    if has("hmmlearn"):
        agree(calls["bayesinf log_prob"]().sum(), calls["hmmlearn score, log"]())


def bench_em(compare, model, ys):
    """From the parameters that made the data: none stops before its last iteration."""

    def run_bayesinf():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bi.errors.SamplingWarning)  # it does not converge, and is not to
            return model.fit(0, ys, num_starts=1, max_iterations=NUM_ITERATIONS, tolerance=1e-300)

    calls = {"bayesinf fit": run_bayesinf}
    if has("hmmlearn"):
        X = np.asarray(ys)[:, None]

        def run_hmmlearn(implementation):
            other = hmmlearn_model(implementation, n_iter=NUM_ITERATIONS, tol=-np.inf)
            return jnp.asarray(other.fit(X).means_)

        calls |= {f"hmmlearn fit, {name}": partial(run_hmmlearn, name) for name in ("scaling", "log")}
    if has("dynamax"):
        from dynamax.hidden_markov_model import DiagonalGaussianHMM

        other = DiagonalGaussianHMM(NUM_STATES, 1)
        params, props = other.initialize(
            initial_probs=jnp.asarray(INITIAL),
            transition_matrix=jnp.asarray(TRANSITION),
            emission_means=jnp.asarray(MEAN)[:, None],
            emission_scale_diags=jnp.asarray(SCALE)[:, None],
        )
        run = partial(other.fit_em, params, props, ys[:, None], num_iters=NUM_ITERATIONS, verbose=False)
        calls["dynamax fit_em, which compiles at every call"] = lambda: run()[1]
    compare(
        f"in float64: {NUM_ITERATIONS} iterations of EM, {TITLE}",
        calls,
        rounds=3,
        note=lambda name, medians: f"{1e3 * medians[name] / NUM_ITERATIONS:.3g} ms an iteration",
    )
    assert int(run_bayesinf().num_iterations) == NUM_ITERATIONS
