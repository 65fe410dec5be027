"""What every emission owes: its density, an M-step that is the maximum, draws that are the posterior, missing data."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM, geweke_joint
from bayesinf.models import hmm

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation

COVARIATES = np.random.default_rng(3).normal(size=(60, 2))
FULL = np.array([[[1.0, 0.0], [0.5, 0.8]], [[0.5, 0.0], [-0.6, 1.2]]])
GAUSSIAN = hmm.GaussianPrior(mean=0.5, strength=0.7, df=5.0, scatter=2.0)
GAMMA = hmm.GammaPrior(2.0, 0.3)
REGRESSION = hmm.RegressionPrior(precision=0.5, df=4.0, scatter=3.0)
LOGISTIC = hmm.NumPyroEmission(
    lambda p: dist.Logistic(p["loc"], p["scale"]),
    {"loc": np.array([-1.0, 2.0]), "scale": np.array([1.0, 0.5])},
    {"scale": dist.constraints.positive},
    num_steps=20,
)
EMISSIONS = {
    "numbers": hmm.Gaussian(np.array([-1.0, 2.0]), np.array([1.0, 0.5])),
    "diagonal": hmm.Gaussian(np.array([[-1.0, 0.0], [2.0, 1.0]]), np.array([[1.0, 0.5], [0.7, 2.0]]), GAUSSIAN),
    "full": hmm.Gaussian(np.array([[-1.0, 0.0], [2.0, 1.0]]), FULL, covariance="full"),
    "full with prior": hmm.Gaussian(np.array([[-1.0, 0.0], [2.0, 1.0]]), FULL, GAUSSIAN, covariance="full"),
    "tied": hmm.Gaussian(np.array([[-1.0, 0.0], [2.0, 1.0]]), FULL[0], GAUSSIAN, covariance="tied"),
    "poisson": hmm.Poisson(np.array([1.0, 6.0]), GAMMA),
    "poissons": hmm.Poisson(np.array([[1.0, 6.0], [2.0, 0.5]])),
    "categorical": hmm.Categorical(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), 1.5),
    "gamma": hmm.Gamma(np.array([2.0, 5.0]), np.array([1.0, 0.5])),
    "student": hmm.StudentT(np.array([3.0, 6.0]), np.array([0.0, 4.0]), np.array([1.0, 2.0])),
    "von Mises": hmm.VonMises(np.array([0.5, -2.0]), np.array([3.0, 8.0])),
    "regression": hmm.LinearRegression(np.array([[1.0, -1.0], [0.0, 2.0]]), np.zeros(2), np.ones(2), REGRESSION),
    "autoregression": hmm.LinearRegression(
        np.array([[0.9, -0.5], [-0.5, 0.2]]), np.zeros(2), np.array([1.0, 0.5]), REGRESSION, num_lags=2
    ),
    "mixture": hmm.Mixture(
        np.array([[0.3, 0.7], [0.6, 0.4]]), hmm.Gaussian(np.array([-3.0, 0.0, 2.0, 6.0]), np.ones(4), GAUSSIAN), 2.0
    ),
    "NumPyro": LOGISTIC,
}
CLOSED = sorted(set(EMISSIONS) - {"student", "mixture", "NumPyro"})  # whose M-step is the maximum, not a step to it
CONJUGATE = ["diagonal", "full with prior", "tied", "poisson", "categorical", "regression", "autoregression", "mixture"]


def given(name):
    return COVARIATES if EMISSIONS[name].needs_covariates else None


def simulated(name, num_steps=60, seed=0):
    model = hmm.HiddenMarkovModel(EMISSIONS[name], [0.4, 0.6], [[0.8, 0.2], [0.3, 0.7]])
    covariates = given(name)
    states, ys = model.simulate(seed, num_steps, covariates=None if covariates is None else covariates[:num_steps])
    return model, states, ys


REFERENCE = {
    "numbers": lambda y, k: scipy.stats.norm([-1.0, 2.0][k], [1.0, 0.5][k]).logpdf(y),
    "diagonal": lambda y, k: (
        scipy.stats.norm([[-1.0, 0.0], [2.0, 1.0]][k], [[1.0, 0.5], [0.7, 2.0]][k]).logpdf(y).sum(-1)
    ),
    "full": lambda y, k: scipy.stats.multivariate_normal([[-1.0, 0.0], [2.0, 1.0]][k], FULL[k] @ FULL[k].T).logpdf(y),
    "tied": lambda y, k: scipy.stats.multivariate_normal([[-1.0, 0.0], [2.0, 1.0]][k], FULL[0] @ FULL[0].T).logpdf(y),
    "poisson": lambda y, k: scipy.stats.poisson([1.0, 6.0][k]).logpmf(y),
    "categorical": lambda y, k: np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])[k][y.astype(int)]),
    "gamma": lambda y, k: scipy.stats.gamma([2.0, 5.0][k], scale=[1.0, 2.0][k]).logpdf(y),
    "student": lambda y, k: scipy.stats.t([3.0, 6.0][k], [0.0, 4.0][k], [1.0, 2.0][k]).logpdf(y),
    "von Mises": lambda y, k: scipy.stats.vonmises([3.0, 8.0][k], [0.5, -2.0][k]).logpdf(y),
    "mixture": lambda y, k: np.log(
        [[0.3, 0.7], [0.6, 0.4]][k] @ scipy.stats.norm(np.array([[-3.0, 0.0], [2.0, 6.0]])[k][:, None], 1.0).pdf(y)
    ),
    "NumPyro": lambda y, k: scipy.stats.logistic([-1.0, 2.0][k], [1.0, 0.5][k]).logpdf(y),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_log_density_is_that_of_scipy(name):
    _, _, ys = simulated(name)
    found = np.asarray(EMISSIONS[name].log_prob(ys), np.float64)
    y = np.asarray(ys, np.float64)
    expected = np.stack([REFERENCE[name](y, k) for k in range(2)], axis=1)
    eps = float(jnp.finfo(found.dtype if jnp.result_type(float) == jnp.float64 else jnp.float32).eps)
    np.testing.assert_allclose(found, expected, rtol=200 * eps, atol=200 * eps)


@pytest.mark.parametrize("name", ["poisson", "categorical", "gamma"])
def test_what_is_outside_the_support_is_impossible(name):
    assert bool(jnp.all(EMISSIONS[name].log_prob(jnp.array([-1.0, 7.5 if name != "gamma" else -0.5])) == -jnp.inf))


def objective(emission, ys, weights, features):
    return jnp.sum(weights * emission.log_prob(ys, features)) + emission.log_prior()


def perturbed(emission, key, size):
    """Every parameter elsewhere, inside its constraints: positive ones and probabilities by factors."""

    def move(path, leaf):
        name = jax.tree_util.keystr(path)
        if "prior" in name:
            return leaf
        noise = size * jax.random.normal(jax.random.fold_in(key, hash(name) % 1000), leaf.shape)
        if name == ".probs":
            moved = leaf * jnp.exp(noise)
            return moved / jnp.sum(moved, -1, keepdims=True)
        if "tril" in name and leaf.ndim >= 2 and leaf.shape[-1] == leaf.shape[-2] and emission.covariance != "diagonal":
            return jnp.tril(leaf * jnp.exp(noise) + noise * jnp.eye(leaf.shape[-1]) * 0.1)
        positive = any(word in name for word in ("scale", "rate", "concentration", "df"))
        return leaf * jnp.exp(noise) if positive else leaf + noise

    return jax.tree_util.tree_map_with_path(move, emission)


@pytest.mark.parametrize("name", CLOSED)
def test_the_m_step_is_the_maximum(name):
    """No parameters nearby or far away have a larger objective; with a term of the prior left out some have."""
    _, _, ys = simulated(name)
    emission = EMISSIONS[name]
    features = emission.features(ys, None if given(name) is None else jnp.asarray(given(name)))
    weights = jnp.asarray(np.random.default_rng(1).dirichlet([0.5, 0.5], len(ys)))
    if features is not None:
        is_seen = ~jnp.any(jnp.isnan(features), -1)
        features, weights = jnp.where(is_seen[:, None], features, 0.0), jnp.where(is_seen[:, None], weights, 0.0)
    value = jax.jit(lambda emission: objective(emission, ys, weights, features))
    best = emission.maximize(ys, weights, features)
    top = float(value(best))
    slack = 50 * float(jnp.finfo(jnp.result_type(float)).eps) * abs(top) + 1e-4  # the ridge of a millionth
    others = [value(perturbed(best, jax.random.key(i), size)) for i in range(8) for size in (1e-2, 1e-1, 1.0)]
    assert max(map(float, others)) < top + slack
    assert float(value(emission)) < top + slack
    assert min(map(float, others)) < top - 1.0


@pytest.mark.parametrize("name", EMISSIONS)
def test_em_climbs_to_a_stationary_point(name):
    model, _, ys = simulated(name)
    fitted = model.fit(0, ys, covariates=given(name), num_starts=2, max_iterations=300, tolerance=1e-5)
    history = np.asarray(fitted.history)
    history = history[~np.isnan(history)]
    assert len(history) == int(fitted.num_iterations)
    rounding = 100 * float(jnp.finfo(jnp.result_type(float)).eps) * abs(history[-1])
    assert np.all(np.diff(history) > -rounding)
    assert bool(fitted.is_converged)
    again = fitted.model.log_prob(ys, covariates=given(name)) + fitted.model.log_prior()
    np.testing.assert_allclose(float(again), float(fitted.objectives.max()), rtol=1e-5)
    assert float(fitted.objectives.max()) >= float(model.log_prob(ys, covariates=given(name)) + model.log_prior())
    # stationary: along the simplex for probabilities, everywhere for the rest
    free = {n: v for n, v in hmm.parameters_of(fitted.model).items() if n not in ("initial", "transition", "probs")}

    def total(values):
        moved = hmm.with_parameters(fitted.model, values)
        return moved.log_prob(ys, covariates=given(name)) + moved.log_prior()

    for n, gradient in jax.grad(total)(free).items():
        if "df" in n:  # flat, and EM is slow there
            continue
        scale = jnp.maximum(jnp.abs(free[n]), 0.1)  # per relative change
        assert float(jnp.max(jnp.abs(gradient * scale))) < 0.3, n


# of full and tied covariances test_partial_gaussian.py has the same with rows missing in part
LONG = ("full with prior", "tied", "regression")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CONJUGATE])
def test_gibbs_sampling_leaves_the_joint_law_alone(name):
    """Parameters, path and data drawn forwards, and by alternating data and a step; with products of parameters."""
    emission, num_steps = EMISSIONS[name], 8
    covariates = None if given(name) is None else jnp.asarray(COVARIATES[:num_steps])
    model = hmm.HiddenMarkovModel(emission, initial_prior=2.0, transition_prior=np.array([[3.0, 1.0], [1.0, 2.0]]))
    blank = jnp.full((1, num_steps), jnp.nan) if emission.event_ndim == 0 else jnp.full((1, num_steps, 2), jnp.nan)

    def prior(key):
        """The emission by a draw given data that are all missing, the chain from its Dirichlet laws."""
        key_emission, key_initial, key_rows = jax.random.split(key, 3)
        kernel = hmm.HMMGibbs(model, blank[0], covariates=covariates)
        drawn = kernel.step(key_emission, kernel.init(hmm.parameters_of(model)))[0].position
        return drawn | {
            "initial": jax.random.dirichlet(key_initial, jnp.full(2, 2.0)),
            "transition": jax.random.dirichlet(key_rows, model.transition_prior),
        }

    def simulate(key, values):
        return hmm.with_parameters(model, values).simulate(key, num_steps, covariates=covariates)[1]

    def transition(key, values, ys):
        kernel = hmm.HMMGibbs(model, ys, covariates=covariates)
        return kernel.step(key, kernel.init(values))[0].position

    report = geweke_joint(0, prior, simulate, transition, num_chains=5_000, num_rounds=3)
    report.raise_if_rejected()


def test_the_chain_is_drawn_given_its_moves():
    """Where the data show the path, the rows of the transition matrix have Dirichlet laws with its counts."""
    ys = np.array([[0, 1, 2, 2, 1, 1, 0, 1, 2], [2, 2, 2, 0, 0, 1, -1, -1, -1]], float)
    prior = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, 1.5], [0.7, 1.0, 1.0]])
    counts = np.array([[1.0, 3.0, 0.0], [1.0, 1.0, 2.0], [1.0, 1.0, 3.0]])
    model = hmm.HiddenMarkovModel(hmm.Categorical(np.eye(3)), transition_prior=prior, initial_prior=[1.0, 2.0, 3.0])
    kernel = hmm.HMMGibbs(model, ys, lengths=np.array([9, 6]))
    state = kernel.init(hmm.parameters_of(model))
    ends, _ = jax.vmap(lambda key: kernel.step(key, state))(jax.random.split(jax.random.key(0), 20_000))
    assert np.array_equal(np.asarray(ends.path[0]), ys)
    laws = {"transition": prior + counts, "initial": np.array([2.0, 2.0, 4.0])}
    for name, concentration in laws.items():
        total = concentration.sum(-1, keepdims=True)
        for index, c in np.ndenumerate(concentration):
            law = scipy.stats.beta(c, np.broadcast_to(total, concentration.shape)[index] - c)
            assert scipy.stats.kstest(np.asarray(ends.position[name])[:, *index], law.cdf).pvalue > FALSE_ALARM


def test_a_draw_of_the_prior_is_one():
    """Of a state that emits nothing; moments by closed form."""
    prior = hmm.GaussianPrior(mean=1.0, strength=2.0, df=8.0, scatter=3.0)
    for covariance, tril in (("diagonal", np.ones((2, 2))), ("full", FULL), ("tied", FULL[0])):
        emission = hmm.Gaussian(np.zeros((2, 2)), tril, prior, covariance=covariance)
        draw = jax.vmap(lambda key: emission.draw(key, jnp.zeros((3, 2)), jnp.zeros((3, 2))))  # noqa: B023
        drawn = draw(jax.random.split(jax.random.key(0), 20_000))
        tril = drawn.scale_tril[:, 0] if covariance != "tied" else drawn.scale_tril
        variance = tril[..., 0] ** 2 if covariance == "diagonal" else tril[:, 0, 0] ** 2
        df = 8.0 if covariance == "diagonal" else 7.0  # of a diagonal entry of an inverse-Wishart matrix of two rows
        law = scipy.stats.invgamma(df / 2, scale=3.0 / 2)
        assert scipy.stats.kstest(np.asarray(variance), law.cdf).pvalue > FALSE_ALARM
        z = (drawn.mean[:, 0, 0] - 1.0) * np.sqrt(2.0) / np.sqrt(variance)
        assert scipy.stats.kstest(np.asarray(z), "norm").pvalue > FALSE_ALARM


def test_guesses_differ_and_are_inside_the_support():
    for name, emission in EMISSIONS.items():
        _, _, ys = simulated(name)
        features = emission.features(ys, None if given(name) is None else jnp.asarray(given(name)))
        is_seen = jnp.ones(len(ys), bool) if features is None else ~jnp.any(jnp.isnan(features), -1)
        features = None if features is None else jnp.where(is_seen[:, None], features, 0.0)
        one, two = (emission.guess(jax.random.key(i), ys, is_seen, features) for i in range(2))
        assert not eqx.tree_equal(one, two), name
        assert bool(jnp.all(jnp.isfinite(one.log_prob(ys, features)))), name


def test_a_state_that_nobody_is_in_keeps_its_parameters():
    for name, emission in EMISSIONS.items():
        if emission.log_prior() != 0.0:
            continue
        _, _, ys = simulated(name)
        features = emission.features(ys, None)
        weights = jnp.zeros((len(ys), 2)).at[:, 0].set(1.0)
        moved = emission.maximize(ys, weights, features)
        for old, new in zip(jax.tree.leaves(emission), jax.tree.leaves(moved), strict=True):
            if old.ndim:
                np.testing.assert_allclose(new[1], old[1], rtol=1e-5)
                assert not np.allclose(new[0], old[0], rtol=1e-5) or name == "student"


def test_rows_missing_in_part():
    model = hmm.HiddenMarkovModel(hmm.Gaussian(np.array([[-1.0, 0.0], [2.0, 1.0]]), np.ones((2, 2))))
    ys = np.array([[0.0, 1.0], [np.nan, 2.0], [np.nan, np.nan], [1.0, 1.0]])
    expected = scipy.stats.norm([0.0, 1.0], 1.0).logpdf(2.0)
    np.testing.assert_allclose(model.log_lik(ys)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(model.log_lik(ys)[2], 0.0)
    # the M-step of a component is that of the rows where it is seen
    weights = jnp.full((4, 2), 0.5)
    moved = model.emission.maximize(jnp.asarray(ys), weights)
    np.testing.assert_allclose(moved.mean[0], [0.5, 4 / 3], rtol=1e-6)


def test_rows_that_cannot_be_missing_in_part_are_named(unchecked):
    law = hmm.NumPyroEmission(
        lambda p: dist.Normal(p["loc"], 1.0).to_event(1), {"loc": np.array([[-1.0, 0.0], [2.0, 1.0]])}
    )
    with pytest.raises(ValueError, match=r"missing in part, at \(series, step\) \[\[0, 1\]\]"):
        hmm.HiddenMarkovModel(law).log_lik(np.array([[0.0, 1.0], [np.nan, 2.0]]))


def test_bad_input_is_named(unchecked):
    gaussian = hmm.Gaussian(np.array([0.0, 1.0]), np.ones(2))
    with pytest.raises(ValueError, match="emission must be an Emission"):
        hmm.HiddenMarkovModel("gaussian")
    with pytest.raises(ValueError, match="transition must hold probabilities"):
        hmm.HiddenMarkovModel(gaussian, transition=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"ys must have shape \(T\)"):
        hmm.HiddenMarkovModel(gaussian).fit(0, np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="scale_tril must have shape"):
        hmm.Gaussian(np.zeros((2, 2)), np.ones(2))
    with pytest.raises(ValueError, match="covariates must have shape"):
        hmm.HiddenMarkovModel(EMISSIONS["regression"]).fit(0, np.zeros(5))
    with pytest.raises(ValueError, match="no conjugate prior"):
        hmm.HMMGibbs(hmm.HiddenMarkovModel(gaussian), np.zeros(5))
    with pytest.raises(ValueError, match="components must have K C states"):
        hmm.Mixture(np.full((2, 2), 0.5), gaussian)
    with pytest.raises(ValueError, match="priors must be of"):
        hmm.HiddenMarkovModel(gaussian).target(np.zeros(5), {"rate": dist.Gamma(1.0, 1.0)})
    assert dataclasses.replace(gaussian, mean=jnp.ones(2)).num_states == 2
