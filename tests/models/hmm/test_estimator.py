"""The estimator of scikit-learn's kind: it says what the model says, of sequences one below the other."""

import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.datasets import earthquakes
from bayesinf.models import HiddenMarkovModel, hmm

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

EPS = float(jnp.finfo(jnp.result_type(float)).eps)
COUNTS = np.asarray(earthquakes().counts, float)


def series_of(seed, lengths, d=None):
    """Sequences of two Gaussian regimes, one below the other."""
    rng = np.random.default_rng(seed)
    mean = np.array([-2.0, 2.0]) if d is None else np.array([[-2.0, 0.0], [2.0, 1.0]])
    states = np.concatenate([np.cumsum(rng.random(n) < 0.1) % 2 for n in lengths])
    return mean[states] + rng.normal(size=(sum(lengths), *mean.shape[1:]))


@pytest.fixture(scope="module")
def fitted():
    lengths = [50, 1, 50]
    X = series_of(0, lengths, d=2)
    X[3], X[10, 1] = np.nan, np.nan
    return hmm.HMMEstimator(2, n_starts=3).fit(X, lengths), X, lengths


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e3 * EPS, atol=1e3 * EPS)


def test_of_several_sequences_it_says_what_the_model_says_of_each(fitted):
    estimator, X, lengths = fitted
    parts = np.split(X, np.cumsum(lengths)[:-1])
    model = estimator.model_
    close(estimator.score(X, lengths), sum(float(model.log_prob(part)) for part in parts))
    smoothed = np.concatenate([np.exp(model.smooth(part).log_smoothed) for part in parts])
    close(estimator.predict_proba(X, lengths), smoothed)
    total, proba = estimator.score_samples(X, lengths)
    close(total, estimator.score(X, lengths))
    close(proba, smoothed)
    close(estimator.filter_proba(X, lengths), np.concatenate([np.exp(model.filter(p).log_filtered) for p in parts]))
    best = [model.viterbi(part) for part in parts]
    log_joint, states = estimator.decode(X, lengths)
    close(log_joint, sum(float(path.log_joint) for path in best))
    assert states.tolist() == estimator.predict(X, lengths).tolist() == np.concatenate([p.path for p in best]).tolist()
    expected, states = estimator.decode(X, lengths, algorithm="map")
    assert states.tolist() == smoothed.argmax(1).tolist()
    close(expected, smoothed.max(1).sum())
    ahead = estimator.forecast(X, 3, lengths)
    assert ahead.shape == (3, 3, 2)
    for i, part in enumerate(parts):
        close(ahead[i], estimator.forecast(part, 3))
        last = np.exp(model.filter(part).log_filtered[-1])
        close(ahead[i, 1], last @ np.linalg.matrix_power(np.asarray(model.transition, float), 2))


def test_only_the_filter_does_not_look_ahead(fitted):
    estimator, X, lengths = fitted
    one = X.copy()
    one[35:40] = np.nan  # nothing but the future tells of these
    other = one.copy()
    other[40:50] *= -1
    close(estimator.filter_proba(other, lengths)[:40], estimator.filter_proba(one, lengths)[:40])
    assert np.abs(estimator.predict_proba(other, lengths) - estimator.predict_proba(one, lengths))[:40].max() > 0.1


def test_parameters_have_the_names_of_hmmlearn(fitted):
    estimator, X, lengths = fitted
    close(estimator.startprob_.sum(), 1.0)
    close(estimator.transmat_.sum(1), 1.0)
    assert np.abs(estimator.means_[estimator.means_[:, 0].argsort()] - [[-2, 0], [2, 1]]).max() < 1.0
    close(estimator.covars_, np.asarray(estimator.model_.emission.scale_tril) ** 2)
    assert estimator.monitor_.converged
    assert np.all(np.diff(estimator.monitor_.history) > -1e3 * EPS * 300)
    assert len(estimator.monitor_.objectives) == 3
    again = hmm.HMMEstimator(2, n_starts=3).fit(X, lengths)
    assert np.array_equal(again.means_, estimator.means_)


def test_earthquakes_and_their_criteria():
    """Rates and likelihood as hmmlearn finds them; the ridge of the likelihood is flat to a tenth of an event."""
    estimator = hmm.HMMEstimator(2, "poisson").fit(COUNTS[:, None])
    assert estimator.rates_.shape == (2, 1)
    np.testing.assert_allclose(np.sort(estimator.rates_[:, 0]), [15.42, 26.02], atol=0.1)
    score = estimator.score(COUNTS[:, None])
    np.testing.assert_allclose(score, -341.8787, atol=2e-3)
    np.testing.assert_allclose(estimator.aic(COUNTS[:, None]), -2 * score + 2 * 5, rtol=1e-6)
    np.testing.assert_allclose(estimator.bic(COUNTS[:, None]), -2 * score + np.log(107) * 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("emission", "X", "num_free"),
    [
        ("gaussian", "numbers", 3 + 4),
        ("student_t", "numbers", 3 + 6),
        ("gamma", "positive", 3 + 4),
        ("von_mises", "angles", 3 + 4),
        ("categorical", "categories", 3 + 4),
    ],
)
def test_every_emission_fits_and_counts_its_parameters(emission, X, num_free):
    numbers = series_of(5, [80])
    X = {
        "numbers": numbers,
        "positive": np.exp(numbers / 2),
        "angles": np.angle(np.exp(1j * numbers)),
        "categories": np.digitize(numbers, [-1.0, 1.0]).astype(float),
    }[X]
    estimator = hmm.HMMEstimator(2, emission, n_starts=2, tolerance=1e-2).fit(X)
    assert np.isfinite(estimator.score(X))
    np.testing.assert_allclose(estimator.aic(X) + 2 * estimator.score(X), 2 * num_free, rtol=1e-4)
    drawn, states = estimator.sample(20, random_state=3)
    assert drawn.shape == X[:20].shape
    assert states.shape == (20,)


@pytest.mark.parametrize(("covariance", "num_free"), [("diagonal", 3 + 8), ("full", 3 + 10), ("tied", 3 + 7)])
def test_covariances_of_gaussians(covariance, num_free):
    X = series_of(7, [80], d=2)
    estimator = hmm.HMMEstimator(2, covariance=covariance, n_starts=2, tolerance=1e-2).fit(X)
    shapes = {"diagonal": (2, 2), "full": (2, 2, 2), "tied": (2, 2)}
    assert estimator.covars_.shape == shapes[covariance]
    np.testing.assert_allclose(estimator.aic(X) + 2 * estimator.score(X), 2 * num_free, rtol=1e-4)
    law = estimator.model_.emission.law()
    if covariance != "diagonal":
        every = np.broadcast_to(estimator.covars_, (2, 2, 2))
        np.testing.assert_allclose(every, law.covariance_matrix, rtol=1e-4)


def test_an_emission_of_ones_own_is_the_first_start():
    emission = hmm.Poisson(np.array([10.0, 30.0]), hmm.GammaPrior(2.0, 0.1))
    estimator = hmm.HMMEstimator(2, emission, n_starts=1).fit(COUNTS)
    fitted = HiddenMarkovModel(emission).fit(0, COUNTS, num_starts=1)
    np.testing.assert_allclose(estimator.rates_, fitted.model.emission.rate, rtol=1e-5)


def test_priors_are_used():
    free = hmm.HMMEstimator(2, "poisson", n_starts=2).fit(COUNTS)
    held = hmm.HMMEstimator(2, "poisson", n_starts=2, transition_prior=hmm.sticky(2, 1.0, 1e4)).fit(COUNTS)
    assert np.diag(held.transmat_).min() > 0.99 > np.diag(free.transmat_).min()
    drawn = hmm.HMMEstimator(2, "poisson", n_starts=2, prior=hmm.GammaPrior(1e5, 5e3)).fit(COUNTS)
    assert np.abs(drawn.rates_ - 20.0).max() < 0.5


def test_parameters_can_be_read_and_set():
    estimator = hmm.HMMEstimator(3, covariance="full")
    assert repr(estimator) == "HMMEstimator(n_components=3, covariance='full')"
    copy = hmm.HMMEstimator(**estimator.get_params())
    assert copy.get_params() == estimator.get_params()
    assert copy.set_params(n_components=4).n_components == 4
    with pytest.raises(ValueError, match=r"params must be of .* got \['n_component'\]"):
        copy.set_params(n_component=3)


def test_scikit_learn_clones_it():
    base = pytest.importorskip("sklearn.base")
    estimator = hmm.HMMEstimator(2, "poisson", n_starts=2, tolerance=1e-2)
    cloned = base.clone(estimator)
    assert cloned is not estimator
    assert cloned.get_params() == estimator.get_params()


@pytest.mark.slow  # every split is compiled
def test_scikit_learn_validates_it():
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    estimator = hmm.HMMEstimator(2, "poisson", n_starts=2, tolerance=1e-2)
    splits = selection.TimeSeriesSplit(3)
    scores = selection.cross_val_score(estimator, COUNTS[:, None], cv=splits)
    train, test = list(splits.split(COUNTS))[-1]
    own = base.clone(estimator).fit(COUNTS[train, None]).score(COUNTS[test, None])
    np.testing.assert_allclose(scores[-1], own, rtol=1e-5)
    search = selection.GridSearchCV(estimator, {"n_components": [1, 2]}, cv=splits).fit(COUNTS[:, None])
    assert search.best_params_ == {"n_components": 2}


@pytest.mark.parametrize(
    ("params", "X", "lengths", "message"),
    [
        ({}, np.zeros((2, 3, 4)), None, r"X must have shape \(n,\) or \(n, d\).*got \(2, 3, 4\)"),
        ({}, [], None, r"X must have shape \(n,\) or \(n, d\)"),
        ({}, ["a", "b"], None, "X must be an array of numbers"),
        ({}, np.zeros(5), [2, 2], "lengths must be whole numbers .* sum to the 5 rows of X"),
        ({}, np.zeros(5), [5, 0], "lengths must be whole numbers of at least 1"),
        ({}, np.zeros(5), 5, "lengths must be whole numbers"),
        ({"emission": "normal"}, np.zeros(5), None, "emission must be one of 'gaussian'"),
        ({"covariance": "diag"}, np.zeros((5, 2)), None, "covariance must be one of 'diagonal'"),
        ({"covariance": "full"}, np.zeros(5), None, r"mean must have shape \(K, d\)"),
        ({"emission": "gamma"}, np.ones((5, 2)), None, "X must have one column for Gamma"),
        ({"emission": "categorical"}, np.array([0.5, 1.0]), None, "X must hold whole numbers from 0"),
        ({"emission": "gamma", "prior": 1.0}, np.ones(5), None, "prior must be None for emission='gamma'"),
        ({"n_components": 0}, np.ones(5), None, "n_components must be at least 1"),
        ({"random_state": None}, np.ones(5), None, "random_state must be a whole number"),
        ({"n_components": 3, "emission": hmm.Poisson(np.ones(2))}, np.ones(5), None, "n_components=3 states, got 2"),
    ],
)
def test_bad_input_is_named(unchecked, params, X, lengths, message):
    with pytest.raises(ValueError, match=message):
        hmm.HMMEstimator(**params).fit(X, lengths)


def test_use_before_fit_and_other_columns_are_named(unchecked, fitted):
    with pytest.raises(ValueError, match="call fit"):
        hmm.HMMEstimator().predict(np.zeros(3))
    with pytest.raises(ValueError, match=r"X must have rows of shape \(2,\), as in fit, got \(3,\)"):
        fitted[0].predict(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="algorithm must be one of"):
        fitted[0].decode(np.zeros((4, 2)), algorithm="best")
