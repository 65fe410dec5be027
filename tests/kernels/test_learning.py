"""Score ascent and stochastic approximation EM against the exact maximum likelihood estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.distributions import constraints
from ppg_models import Scalar, assert_published, learning_series, mean_and_error

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import AdditiveFunctional, learning, saem, score_ascent

YS = jnp.asarray(learning_series())
MAXIMUM = np.array([0.96672677, -1.20858203, -0.22631829])  # of (a, log q, log r), by Kalman filter and Newton
SPREAD = jnp.asarray([0.0388, 0.3604, 0.0986])  # asymptotic standard deviations


def build(theta):
    return Scalar(theta[0], jnp.exp(theta[1]), 1.0, jnp.exp(theta[2]), 1.0)


def preconditioned():
    """Steps l^-0.6 diag(sd^2) score, of at most 0.2 in each coordinate."""
    return optax.chain(
        optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: leaf * SPREAD.astype(leaf.dtype) ** 2, updates)),
        optax.scale_by_schedule(lambda step: (step + 1.0) ** -0.6),
        optax.clip(0.2),
        optax.scale(-1.0),
    )


def ascend(num_chains=32, num_iterations=400, **options):
    """Errors of independent runs."""

    def run(key):
        options_all = {"optimizer": preconditioned(), "num_iterations": num_iterations, "throw": False} | options
        return score_ascent(key, build, jnp.asarray([0.5, 0.0, 0.0]), YS, **options_all).theta

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num_chains))) - MAXIMUM


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_particles": 20, "num_sweeps": 2, "burn_in": 1}, {"num_particles": 40}])
def test_ascent_by_parisian_gibbs_finds_the_maximum(options):
    found = ascend(**options)
    for errors_of_one, tolerance in zip(found.T, (0.005, 0.06, 0.01), strict=True):
        assert_published(mean_and_error(errors_of_one), 0.0, tolerance)


@pytest.mark.slow
def test_ascent_by_paris_with_few_particles_does_not():
    """What it is off by is the bias of each gradient, which no number of iterations removes: 0.11 in log r."""
    found = ascend(num_particles=10, estimator="paris")
    assert mean_p_value(found, 0.0) < FALSE_ALARM
    assert_published(mean_and_error(found[:, 2]), 0.11, 0.05)


SQUARES = AdditiveFunctional(
    lambda x, y: jnp.stack([jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x), (y - x) ** 2]),
    lambda x_prev, x, y, t: jnp.stack([x**2, x_prev * x, x_prev**2, (y - x) ** 2]),
    is_given_data=True,
)


def maximize(s):
    a = s[1] / s[2]
    return jnp.stack([a, 0.5 * jnp.log((s[0] - a * s[1]) / 100), 0.5 * jnp.log(s[3] / 101)])


@pytest.mark.slow
def test_stochastic_approximation_em_finds_the_maximum():
    def run(key, estimator):
        options = {"num_particles": 20, "num_iterations": 1_500, "num_exploring": 300, "throw": False}
        return saem(
            key, build, jnp.asarray([0.5, 0.0, 0.0]), YS, SQUARES, maximize, estimator=estimator, **options
        ).theta

    keys = jax.random.split(jax.random.key(0), 24)
    found = {
        name: np.asarray(jax.jit(jax.vmap(lambda key, name=name: run(key, name)))(keys)) - MAXIMUM
        for name in ("ppg", "paris")
    }
    for errors_of_one, tolerance in zip(found["ppg"].T, (0.005, 0.06, 0.01), strict=True):
        assert_published(mean_and_error(errors_of_one), 0.0, tolerance)
    # the bias of plain PaRIS at N = 20 is there to be seen
    assert_published(mean_and_error(found["paris"][:, 2]), 0.039, 0.015)


FAR = 0.5 * float(jnp.finfo(jnp.result_type(float)).max)  # nothing explains it, in any precision
SHORT = YS[:6]
FEW = {"num_particles": 8, "num_iterations": 3}


@pytest.mark.parametrize("estimator", learning.ESTIMATORS)
def test_every_estimator_points_up_where_the_slope_is_steep(estimator):
    """The noise of the observations is set a hundred times too small: the first step must raise it."""
    options = FEW | {"optimizer": optax.sgd(1e-4), "estimator": estimator, "num_iterations": 1}
    found = score_ascent(0, build, jnp.asarray([0.5, 0.0, -2.0]), SHORT, **options)
    assert found.trace[0, 2] > -2.0
    assert found.trace.shape == (1, 3)
    assert int(found.num_failed) == 0


def test_steps_are_those_of_the_optimiser_and_theta_is_the_average_of_the_last_half():
    start = jnp.asarray([0.5, 0.0, 0.0])
    once = score_ascent(0, build, start, SHORT, optimizer=optax.sgd(0.01), **FEW)
    twice = score_ascent(0, build, start, SHORT, optimizer=optax.sgd(0.02), **FEW)
    np.testing.assert_allclose(twice.trace[0] - start, 2 * (once.trace[0] - start), rtol=1e-4)
    np.testing.assert_allclose(once.theta, jnp.mean(once.trace[1:], axis=0), rtol=1e-5)


def test_constrained_parameters_move_where_they_are_free():
    def by_name(theta):
        return Scalar(theta["a"], theta["q"], 1.0, theta["r"], 1.0)

    free = score_ascent(0, build, jnp.asarray([0.5, 0.0, 0.0]), SHORT, optimizer=optax.sgd(0.01), **FEW)
    found = score_ascent(
        0,
        by_name,
        {"a": 0.5, "q": 1.0, "r": 1.0},
        SHORT,
        optimizer=optax.sgd(0.01),
        constraints={"q": constraints.positive, "r": constraints.positive},
        **FEW,
    )
    for i, name in enumerate("aqr"):
        expected = free.trace[:, i] if name == "a" else jnp.exp(free.trace[:, i])
        np.testing.assert_allclose(found.trace[name], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="theta must lie inside its constraints"):
        score_ascent(0, build, -jnp.ones(3), SHORT, optimizer=optax.sgd(0.1), constraints=constraints.positive, **FEW)
    unknown = {"b": constraints.positive}
    with pytest.raises(ValueError, match=r"constraints must be of names in theta, \['a'\], got \['b'\]"):
        score_ascent(0, by_name, {"a": 0.5}, SHORT, optimizer=optax.sgd(0.1), constraints=unknown, **FEW)


def test_progress_changes_nothing(capsys):
    options = {"num_particles": 8, "num_iterations": 20, "optimizer": optax.sgd(0.01)}
    start = jnp.asarray([0.5, 0.0, 0.0])
    quiet = score_ascent(0, build, start, SHORT, **options)
    shown = score_ascent(0, build, start, SHORT, progress=True, **options)
    np.testing.assert_allclose(quiet.trace, shown.trace, rtol=1e-5)
    assert "learning" in capsys.readouterr().err


def test_iterations_without_weights_change_nothing_and_raise_once():
    impossible = SHORT.at[3].set(FAR)
    start = jnp.asarray([0.5, 0.0, 0.0])
    options = FEW | {"optimizer": optax.adam(0.1), "initial_path": jnp.zeros(6)}
    with pytest.raises(errors.DegenerateWeightsError, match="In 3 of 3 iterations all weights vanished") as caught:
        score_ascent(0, build, start, impossible, **options)
    np.testing.assert_allclose(caught.value.result.trace, jnp.broadcast_to(start, (3, 3)), rtol=1e-6)
    quiet = score_ascent(0, build, start, impossible, throw=False, **options)
    assert int(quiet.num_failed) == 3


def test_statistics_are_averaged_after_the_exploration():
    """gamma is 1, 1, 1 with an exploration of three iterations, and 1, 1, 1/2 with one of one."""

    def tamed(s):
        return jnp.tanh(s[:3] / 20)

    start = jnp.asarray([0.5, 0.0, 0.0])
    found = saem(0, build, start, SHORT, SQUARES, tamed, num_exploring=3, **FEW)
    mixed = saem(0, build, start, SHORT, SQUARES, tamed, num_exploring=1, exponent=1.0, **FEW)
    np.testing.assert_allclose(mixed.trace[:2], found.trace[:2], rtol=1e-4)
    half = 0.5 * (jnp.arctanh(found.trace[1]) + jnp.arctanh(found.trace[2]))
    np.testing.assert_allclose(jnp.arctanh(mixed.trace[2]), half, rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"optimizer": 0.1}, "optimizer must be one of optax"),
        ({"estimator": "em"}, "estimator must be one of 'ppg'"),
        ({"num_particles": 1}, "num_particles must be at least 2"),
        ({"burn_in": 1}, "burn_in must be less than num_sweeps=1, got 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
    ],
)
def test_bad_arguments(change, match):
    options = FEW | {"optimizer": optax.sgd(0.1)} | change
    with pytest.raises(ValueError, match=match):
        score_ascent(0, build, jnp.zeros(3), SHORT, **options)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_saem():
    with pytest.raises(ValueError, match=r"maximize must return parameters like theta, of shapes \(3,\), got \(4,\)"):
        saem(0, build, jnp.zeros(3), SHORT, SQUARES, lambda s: s, **FEW)
    with pytest.raises(ValueError, match=r"exponent must lie in \(0.5, 1\]"):
        saem(0, build, jnp.zeros(3), SHORT, SQUARES, maximize, exponent=0.3, **FEW)
