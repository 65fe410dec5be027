"""Laws of durations and their M-steps, and EM of hidden semi-Markov models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, geweke_joint
from bayesinf.models import HiddenMarkovModel, HiddenSemiMarkovModel, hmm
from bayesinf.models.hmm import semi_markov_model
from bayesinf.models.hmm.semi_markov_paths import draw_stays

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

EPS = float(jnp.finfo(jnp.result_type(float)).eps)
PROBS = np.array([[0.0, 0.1, 0.4, 0.5, 0.0], [0.3, 0.3, 0.2, 0.1, 0.1]])
DURATIONS = {
    "categorical": hmm.CategoricalDuration(PROBS),
    "categorical with prior": hmm.CategoricalDuration(PROBS, prior=2.0),
    "negative binomial": hmm.NegativeBinomialDuration(np.array([6.0, 1.5]), np.array([0.7, 0.4]), max_duration=20),
}


def model_of(name):
    emission = hmm.Gaussian(np.array([-1.0, 2.0]), np.array([1.0, 0.7]))
    return HiddenSemiMarkovModel(emission, DURATIONS[name], initial_prior=1.5, transition_prior=3.0)


def test_the_negative_binomial_law_is_that_of_scipy():
    law = DURATIONS["negative binomial"]
    found = np.exp(np.asarray(law.log_prob(), np.float64))
    for k in range(2):
        pmf = scipy.stats.nbinom(float(law.shape[k]), float(law.stop[k])).pmf(np.arange(20))
        np.testing.assert_allclose(found[k], pmf / pmf.sum(), rtol=1000 * EPS)


def test_a_shape_of_one_is_the_geometric_law_and_a_large_one_is_poisson():
    law = hmm.NegativeBinomialDuration(np.array([1.0, 1e4]), np.array([0.3, 1e4 / (1e4 + 5.0)]), max_duration=80)
    found = np.exp(np.asarray(law.log_prob(), np.float64))
    np.testing.assert_allclose(found[0], scipy.stats.geom(0.3).pmf(np.arange(1, 81)), rtol=1e4 * EPS, atol=1e-10)
    np.testing.assert_allclose(found[1], scipy.stats.poisson(5.0).pmf(np.arange(80)), atol=5e-4)


@pytest.mark.parametrize("name", DURATIONS)
def test_the_m_step_is_the_maximum(name):
    """No parameters nearby or far away have a larger objective."""
    rng = np.random.default_rng(0)
    law = DURATIONS[name]
    size = law.log_prob().shape
    counts = jnp.asarray(50 * rng.dirichlet(np.full(size[1], 2.0), 2)) * (law.log_prob() > -jnp.inf)

    def objective(law):
        return float(jnp.sum(jnp.where(counts > 0, counts * law.log_prob(), 0.0)) + law.log_prior())

    best = law.maximize(counts)
    top = objective(best)
    slack = 200 * EPS * abs(top) + 1e-6  # of the grid
    others = [law]
    for size in (1e-2, 1e-1, 1.0):
        for seed in range(8):
            noise = np.random.default_rng(seed).normal(size=law.log_prob().shape) * size
            if name == "negative binomial":
                logit = jnp.log(best.stop) - jnp.log1p(-best.stop)
                moved = {"shape": best.shape * np.exp(noise[:, 0]), "stop": jax.nn.sigmoid(logit + noise[:, 1])}
            else:
                probs = best.probs * np.exp(noise)
                moved = {"probs": probs / probs.sum(1, keepdims=True)}
            others.append(dataclasses.replace(best, **moved))
    assert max(map(objective, others)) < top + slack
    assert min(map(objective, others)) < top - 1.0


def test_the_m_step_of_a_sample_finds_its_law():
    """Up to the error of estimation, by the likelihood ratio."""
    truth = DURATIONS["negative binomial"]
    drawn = jax.random.categorical(jax.random.key(0), truth.log_prob(), shape=(20_000, 2))
    counts = jax.nn.one_hot(drawn, 20).sum(0)
    best = truth.maximize(counts)
    gain = 2 * jnp.sum(counts * (best.log_prob() - truth.log_prob()))
    assert float(gain) > -1e-2
    assert scipy.stats.chi2(4).sf(float(gain)) > FALSE_ALARM


def test_a_state_that_nobody_stays_in_keeps_its_law():
    for law in (DURATIONS["categorical"], DURATIONS["negative binomial"]):
        counts = jnp.zeros(law.log_prob().shape).at[0, 1].set(5.0)
        moved = law.maximize(counts)
        np.testing.assert_allclose(moved.log_prob()[1], law.log_prob()[1])
        assert not np.allclose(moved.log_prob()[0], law.log_prob()[0])


@pytest.mark.parametrize("name", DURATIONS)
def test_em_climbs_to_a_stationary_point(name):
    model = model_of(name)
    ys = np.stack([model.simulate(seed, 80)[1] for seed in range(2)])
    ys[0, 10:13] = np.nan
    lengths = np.array([80, 60])
    fitted = model.fit(0, ys, lengths=lengths, num_starts=2, max_iterations=300, tolerance=1e-5)
    history = np.asarray(fitted.history)
    history = history[~np.isnan(history)]
    rounding = 100 * EPS * abs(history[-1])
    assert np.all(np.diff(history) > -rounding)
    assert history[-1] > history[0] + 0.1
    assert bool(fitted.is_converged)
    again = fitted.model.log_prob(ys, lengths=lengths).sum() + fitted.model.log_prior()
    np.testing.assert_allclose(float(again), float(fitted.objectives.max()), rtol=1e-5)
    assert bool(jnp.all(jnp.diag(fitted.model.transition) == 0.0))

    def total(emission):
        moved = dataclasses.replace(fitted.model, emission=emission)
        return moved.log_prob(ys, lengths=lengths).sum() + moved.log_prior()

    gradient = jax.grad(total)(fitted.model.emission)
    assert float(jnp.max(jnp.abs(gradient.mean))) < 0.3
    assert float(jnp.max(jnp.abs(gradient.scale_tril))) < 0.3

    # on the simplex of first states the gradient is the same for all that are possible
    def of_initial(initial):
        moved = dataclasses.replace(fitted.model, initial=initial)
        return moved.log_prob(ys, lengths=lengths).sum() + moved.log_prior()

    slope = jax.grad(of_initial)(fitted.model.initial)
    assert abs(float(slope[0] - slope[1])) < 0.3


@pytest.mark.slow
def test_em_of_durations_is_that_of_the_law_it_came_from():
    """By the likelihood ratio: of the durations alone, which have four free parameters."""
    truth = model_of("negative binomial")
    ys = np.stack([truth.simulate(seed, 300)[1] for seed in range(8)])
    model = dataclasses.replace(truth, initial_prior=jnp.ones(()), transition_prior=jnp.ones(()))
    fitted = model.fit(0, ys, num_starts=1, tolerance=1e-3)
    gain = 2 * (fitted.log_evidence - model.log_prob(ys).sum())
    assert float(gain) > 0
    # durations, means, scales, and the first state
    assert scipy.stats.chi2(4 + 4 + 1).sf(float(gain)) > FALSE_ALARM


def test_of_geometric_durations_it_is_an_ordinary_model():
    duration = hmm.NegativeBinomialDuration(np.ones(2), np.array([0.4, 0.2]), max_duration=100)
    emission = hmm.Gaussian(np.array([-1.0, 2.0]), np.ones(2))
    ordinary = HiddenMarkovModel(emission, [0.5, 0.5], [[0.6, 0.4], [0.2, 0.8]])
    semi = HiddenSemiMarkovModel(emission, duration, [0.5, 0.5])
    _, ys = ordinary.simulate(0, 50)
    np.testing.assert_allclose(float(semi.log_prob(ys)), float(ordinary.log_prob(ys)), rtol=max(1e-8, 100 * EPS))
    np.testing.assert_allclose(
        jnp.exp(semi.smooth(ys).log_smoothed), np.exp(ordinary.smooth(ys).log_smoothed), atol=max(1e-7, 1000 * EPS)
    )


def test_simulated_stays_have_their_durations():
    model = model_of("categorical")
    states = np.asarray(model.simulate(1, 20_000)[0])
    ends = np.flatnonzero(np.diff(states)) + 1
    stays = np.diff(np.r_[0, ends])  # without the last, which is cut
    of = states[np.r_[0, ends[:-1]]]
    for k in range(2):
        counts = np.bincount(stays[of == k], minlength=6)[1:6]
        expected = counts.sum() * PROBS[k]
        assert np.all(counts[expected == 0] == 0)
        assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > FALSE_ALARM


def test_paths_given_the_data_agree_with_the_smoother():
    model = model_of("categorical")
    _, ys = model.simulate(2, 40)
    drawn = model.sample_posterior(0, ys, 4000)
    expected = np.exp(np.asarray(model.smooth(ys).log_smoothed, np.float64))[:, 1]
    hits = np.asarray(drawn.path).sum(0)
    p_values = [scipy.stats.binomtest(int(n), 4000, min(p, 1.0)).pvalue for n, p in zip(hits, expected, strict=True)]
    assert min(p_values) * 40 > FALSE_ALARM


OTHERS = ([1, 2], [0, 2], [0, 1])  # the columns that are not on the diagonal
GIBBS = HiddenSemiMarkovModel(
    hmm.Poisson(np.array([1.0, 4.0, 9.0]), hmm.GammaPrior(4.0, 1.0)),
    hmm.CategoricalDuration(
        np.array([[0.2, 0.5, 0.3], [0.0, 0.5, 0.5], [0.6, 0.3, 0.1]]), prior=np.array([1.0, 3.0, 2.0])
    ),
    initial_prior=2.0,
    transition_prior=np.array([[1.0, 2.0, 3.0], [1.5, 1.0, 1.0], [2.0, 3.0, 1.0]]),
)


def geweke_of_gibbs(num_chains):
    """Parameters and data drawn forwards, and by alternating data and a step; two series, one of which ends early."""
    size, lengths = (2, 6), np.array([6, 4])

    def prior(key):
        keys = jax.random.split(key, 4)
        transition = jnp.zeros((3, 3))
        for i, columns in enumerate(OTHERS):
            row = jax.random.dirichlet(jax.random.fold_in(keys[0], i), GIBBS.transition_prior[i, jnp.array(columns)])
            transition = transition.at[i, jnp.array(columns)].set(row)
        probs = jax.random.dirichlet(keys[2], jnp.asarray(GIBBS.duration.prior), (3,))
        short = jax.random.dirichlet(jax.random.fold_in(keys[2], 1), jnp.asarray(GIBBS.duration.prior)[1:])
        return {
            "initial": jax.random.dirichlet(keys[1], jnp.full(3, 2.0)),
            "transition": transition,
            "duration.probs": probs.at[1].set(jnp.append(0.0, short)),
            "rate": jax.random.gamma(keys[3], 4.0, (3,)),
        }

    def simulate(key, values):
        model = hmm.with_parameters(GIBBS, values)
        ys = jnp.stack([model.simulate(one, size[1])[1] for one in jax.random.split(key, 2)])
        return jnp.where(jnp.arange(size[1]) < lengths[:, None], ys, 0.0)

    def transition(key, values, ys):
        kernel = hmm.HMMGibbs(GIBBS, ys, lengths=lengths)
        return kernel.step(key, kernel.init(values))[0].position

    return geweke_joint(0, prior, simulate, transition, num_chains=num_chains, num_rounds=3)


def test_gibbs_sampling_leaves_the_joint_law_alone():
    geweke_of_gibbs(4_000).raise_if_rejected()


@pytest.mark.slow
def test_a_last_stay_that_ends_with_the_series_is_found_out(monkeypatch):
    def cut(*args):
        path, is_start, rest = draw_stays(*args)
        return path, is_start, 0 * rest

    monkeypatch.setattr(semi_markov_model, "draw_stays", cut)
    assert geweke_of_gibbs(4_000).p_value < FALSE_ALARM


def test_stays_are_counted_with_what_remains_of_the_last():
    """Where the data show the path, by hand: 2 2 | 0 0 0 | 1 1 1 (at least), and a series that ends within a stay."""
    duration = hmm.CategoricalDuration(np.full((3, 4), 0.25), prior=0.5)
    model = HiddenSemiMarkovModel(hmm.Categorical(np.eye(3)), duration)
    ys = np.array([[2, 2, 0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1]], float)
    kernel = hmm.HMMGibbs(model, ys, lengths=np.array([8, 3]))
    drawn = jax.vmap(lambda key: model.draw_path(key, kernel.data))(jax.random.split(jax.random.key(0), 4_000))
    assert np.array_equal(np.asarray(drawn.path[0]), ys)
    np.testing.assert_array_equal(
        np.asarray(drawn.moves), np.broadcast_to([[0, 1, 0], [0, 0, 0], [1, 0, 0]], (4000, 3, 3))
    )
    durations = np.asarray(drawn.durations)
    np.testing.assert_array_equal(durations[:, 2], np.broadcast_to([0, 1, 0, 0], (4000, 4)))
    for state, seen in ((0, [0, 0, 1, 0]), (1, [0, 0, 0, 0])):  # the last stay has 3 steps or 4, as likely
        last = durations[:, state] - seen
        assert np.all(last[:, :2] == 0)
        assert np.all(last.sum(1) == 1)
        assert scipy.stats.binomtest(int(last[:, 2].sum()), 4000, 0.5).pvalue > FALSE_ALARM


def test_the_target_is_evidence_and_priors():
    model = GIBBS
    ys = model.simulate(0, 30)[1].astype(float).at[4].set(jnp.nan)
    target = model.target(
        ys, {"rate": dist.Gamma(4.0, 1.0), "duration.probs": dist.Dirichlet(jnp.array([1.0, 3.0, 2.0]))}
    )
    moves = jnp.array([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    values = {
        "initial": jnp.array([0.2, 0.3, 0.5]),
        "moves": moves,
        "rate": jnp.array([2.0, 5.0, 8.0]),
        "duration.probs": jnp.array([[0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]]),
    }
    position = target.unconstrain(values)
    simplex, positive = dist.constraints.simplex, dist.constraints.positive
    constraints = {"initial": simplex, "moves": simplex, "rate": positive, "duration.probs": simplex}
    jacobian = sum(
        jnp.sum(dist.biject_to(c).log_abs_det_jacobian(position[name], values[name])) for name, c in constraints.items()
    )
    transition = jnp.array([[0.0, 0.3, 0.7], [0.6, 0.0, 0.4], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(target.constrain(position)["transition"], transition, atol=100 * EPS)
    named = {name: value for name, value in values.items() if name != "moves"} | {"transition": transition}
    prior = np.asarray(model.transition_prior)
    expected = (
        hmm.with_parameters(model, named).log_prob(ys)
        + dist.Dirichlet(jnp.full(3, 2.0)).log_prob(values["initial"])
        + sum(dist.Dirichlet(prior[i, prior_columns]).log_prob(moves[i]) for i, prior_columns in enumerate(OTHERS))
        + dist.Gamma(4.0, 1.0).log_prob(values["rate"]).sum()
        + dist.Dirichlet(jnp.array([1.0, 3.0, 2.0])).log_prob(values["duration.probs"]).sum()
        + jacobian
    )
    found, gradient = jax.jit(jax.value_and_grad(target.logdensity))(position)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_bad_input_is_named(unchecked):
    gibbs = dataclasses.replace(
        GIBBS, duration=hmm.NegativeBinomialDuration(np.ones(3), np.full(3, 0.5), max_duration=5)
    )
    with pytest.raises(ValueError, match="NegativeBinomialDuration has no conjugate prior"):
        hmm.HMMGibbs(gibbs, np.zeros(5))
    with pytest.raises(ValueError, match="priors must not be of 'transition'"):
        GIBBS.target(np.zeros(5), {"transition": dist.Dirichlet(np.ones(3))})
    uneven = dataclasses.replace(GIBBS, transition=np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]))
    with pytest.raises(ValueError, match="as many nonzero probabilities in every row"):
        uneven.target(np.zeros(5), {})
    emission = hmm.Gaussian(np.array([-1.0, 2.0]), np.ones(2))
    with pytest.raises(ValueError, match="duration must be a Duration"):
        HiddenSemiMarkovModel(emission, np.ones((2, 3)) / 3)
    with pytest.raises(ValueError, match="duration must be of 2 states"):
        HiddenSemiMarkovModel(emission, hmm.CategoricalDuration(np.ones((3, 2)) / 2))
    with pytest.raises(ValueError, match="emission must be an Emission"):
        HiddenSemiMarkovModel("gaussian", DURATIONS["categorical"])
    with pytest.raises(ValueError, match="probs must hold probabilities that sum to 1"):
        hmm.CategoricalDuration(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"stop must lie in \(0, 1\)"):
        hmm.NegativeBinomialDuration(np.ones(2), np.array([0.5, 1.0]), max_duration=5)
    with pytest.raises(ValueError, match="max_duration must be at least 1"):
        hmm.NegativeBinomialDuration(np.ones(2), np.array([0.5, 0.5]), max_duration=0)
