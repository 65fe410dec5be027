"""Feynman-Kac correctors against quadrature, on mixtures of normals: what the scheme should give, and what it tends to.

What the particles estimate without bias, for every number of them, is the discretised law. Applied as an operator on a
grid it is known to many digits, so that no discretisation error hides in the statistical tests; and that it tends to
the law wanted, with an error that halves with the step, is tested without noise. The grid has the weights of each case
by their own formula.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from grid_operator import GRID, Mixture, integral, move

from bayesinf import errors
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.inference_scaling import VariancePreserving, feynman_kac_corrector

# The speed is constant, so that the noise of every step is wider than the grid's spacing; and slow enough for weights
# of finite variance in the steps below: h sigma^2 is an eighth of the least variance of a part, or less.
SPEED = 3.0
NOISING = VariancePreserving(SPEED, SPEED)
ONE = Mixture((0.7, 0.3), (-1.2, 1.8), (0.9, 0.75))
OTHER = Mixture((0.4, 0.6), (-1.5, 0.8), (0.8, 0.9))
NARROW = Mixture((0.7, 0.3), (-1.5, 2.0), (0.5, 0.3))
WIDE = 1.3
TWO_F = -SPEED * GRID  # 2 f
DIVERGENCE = -SPEED / 2


class Case(NamedTuple):
    """Models and exponents; and on the grid, of the scores: the velocity and the weights, by their own formula."""

    models: tuple[Mixture, ...]
    exponents: tuple[float, ...]
    weigh: object
    is_tilted: bool = False


CASES = {
    "annealed": Case((ONE,), (2.0,), lambda s, t: DIVERGENCE + 0.5 * SPEED * 2.0 * s[0] ** 2),
    "flattened": Case((ONE,), (0.6,), lambda s, t: -0.4 * DIVERGENCE - 0.5 * SPEED * 0.6 * 0.4 * s[0] ** 2),
    "product": Case((ONE, OTHER), (1.0, 1.0), lambda s, t: DIVERGENCE + SPEED * s[0] * s[1]),
    "guidance": Case((ONE, OTHER), (-0.5, 1.5), lambda s, t: 0.5 * SPEED * 1.5 * 0.5 * (s[0] - s[1]) ** 2),
    "reward": Case(
        (ONE,),
        (1.0,),
        lambda s, t: np.tanh(GRID) + (1.2 - t) * (1 - np.tanh(GRID) ** 2) * 0.5 * (SPEED * s[0] - TWO_F),
        is_tilted=True,
    ),
}


def log_tilt(x, t):
    """A reward that counts the more the less noise there is, and already at the beginning."""
    return (1.2 - t) * jnp.tanh(x)


def target_on_grid(case, t):
    """p_t, not normalised."""
    law = np.exp((1.2 - t) * np.tanh(GRID)) if case.is_tilted else 1.0
    for model, exponent in zip(case.models, case.exponents, strict=True):
        law = law * model.density_on_grid(t, NOISING) ** exponent
    return law


def discretised(case, num_steps, is_weighted=True):
    """E[Zhat], E[Zhat sum_i W_i 1(x_i < 0)] and E[Zhat sum_i W_i x_i] of the scheme."""
    density, h = target_on_grid(case, 1.0), 1.0 / num_steps
    for t in np.linspace(1.0, 0.0, num_steps + 1)[:-1]:
        scores = [model.score_on_grid(t, NOISING) for model in case.models]
        velocity = SPEED * sum(b * s for b, s in zip(case.exponents, scores, strict=True)) - 0.5 * TWO_F
        if case.is_tilted:
            velocity = velocity + 0.5 * SPEED * (1.2 - t) * (1 - np.tanh(GRID) ** 2)
        weighted = density * np.exp(h * case.weigh(scores, t)) if is_weighted else density
        density = move(weighted, GRID + h * velocity, np.sqrt(SPEED * h))
    return summary(density)


def summary(density):
    below = integral(np.where(GRID < 0, density, 0.5 * density * (GRID == 0)))
    return np.array([integral(density), below, integral(density * GRID)])


def run(key, case, num_steps, num_particles, **options):
    def initial_log_weight(x):
        log_target = sum(
            b * model.log_density(x, 1.0, NOISING) for b, model in zip(case.exponents, case.models, strict=True)
        )
        return log_target - dist.Normal(0.0, WIDE).log_prob(x)

    settings = {
        "drift": NOISING.drift,
        "divergence": NOISING.divergence,
        "diffusion": NOISING.diffusion,
        "times": jnp.linspace(1.0, 0.0, num_steps + 1),
        "initial": dist.Normal(0.0, WIDE),
        "initial_log_weight": initial_log_weight,
        "log_tilt": log_tilt if case.is_tilted else None,
        "num_particles": num_particles,
    }
    scores = [model.score(NOISING) for model in case.models]
    return feynman_kac_corrector(key, scores, case.exponents, **(settings | options))


def replicates(case, num, num_steps, num_particles, **options):
    """Of Zhat, Zhat times the weighted share below 0, and Zhat times the weighted mean; and Zhat^2 V."""

    def one(key):
        found = run(key, case, num_steps, num_particles, **options)
        scaled = jnp.exp(found.log_evidence + found.log_weights)
        estimates = jnp.stack([scaled, scaled * (found.particles < 0), scaled * found.particles], -1).sum(0)
        return estimates, estimates[0] ** 2 * found.log_evidence_variance

    estimates, variances = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num))
    return np.asarray(estimates, np.float64), np.asarray(variances, np.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_scheme_tends_to_the_product(name):
    case = CASES[name]
    exact = summary(target_on_grid(case, 0.0))
    coarse, fine = (discretised(case, num_steps) - exact for num_steps in (100, 200))
    # first order: errors halve, and what is left after extrapolation is small beside them
    assert np.all(np.abs(fine) < 0.6 * np.abs(coarse) + 1e-3 * exact[0])
    assert np.all(np.abs(2 * fine - coarse) < 0.3 * np.abs(fine) + 1e-3 * exact[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("compile_fast")
def test_particles_estimate_it_without_bias(name):
    case = CASES[name]
    expected = discretised(case, 40)
    estimates, _ = replicates(case, 1_000, 40, 64)
    for i in range(3):
        assert mean_p_value(estimates[:, i], expected[i]) > FALSE_ALARM
    # the opposite sign of the weights, and no weights at all, would be seen
    turned = discretised(case._replace(weigh=lambda s, t: -case.weigh(s, t)), 40)
    assert mean_p_value(estimates[:, 0], turned[0]) < FALSE_ALARM
    naive = discretised(case, 40, is_weighted=False)
    assert mean_p_value(estimates[:, 0], naive[0]) < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_a_forgotten_divergence_is_seen_and_another_scheme_is_as_good():
    case = CASES["annealed"]
    expected = discretised(case, 40)
    estimates, _ = replicates(case, 1_000, 40, 64, divergence=lambda x, t: 0.0)
    assert mean_p_value(estimates[:, 0], expected[0]) < FALSE_ALARM
    estimates, _ = replicates(case, 1_000, 40, 64, resampling="systematic", ess_threshold=0.9)
    for i in range(3):
        assert mean_p_value(estimates[:, i], expected[i]) > FALSE_ALARM


@pytest.mark.usefixtures("run_fast")
def test_the_variance_of_the_evidence_is_unbiased():
    """Exactly, where particles are resampled in every step: E[Zhat^2 V] = var(Zhat)."""
    case = CASES["product"]
    expected = discretised(case, 40)[0]
    estimates, variances = replicates(case, 1_500, 40, 256, ess_threshold=1.0)
    squares = (estimates[:, 0] - expected) ** 2
    assert mean_p_value(variances - squares, 0.0) > FALSE_ALARM
    assert mean_p_value(0.25 * variances - squares, 0.0) < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_scaling_the_score_alone_samples_another_law():
    """The density squared of two narrow modes; here the steps must be shorter."""
    case = Case((NARROW,), (2.0,), CASES["annealed"].weigh)
    exact, corrected, naive = (
        law[1] / law[0]
        for law in (
            summary(target_on_grid(case, 0.0)),
            discretised(case, 300),
            discretised(case, 300, is_weighted=False),
        )
    )
    assert abs(corrected - exact) < 0.01 < 0.05 < abs(naive - exact)

    estimates, _ = replicates(case, 200, 300, 128)
    assert mean_p_value(estimates[:, 1], discretised(case, 300)[1]) > FALSE_ALARM
    assert mean_p_value(estimates[:, 1] - naive * estimates[:, 0], 0.0) < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_particles_in_several_dimensions_are_independent_lines():
    """The evidence of a pytree of independent components is the product of theirs; divergences may be left out."""
    first, second = CASES["annealed"], Case((OTHER,), (2.0,), CASES["annealed"].weigh)
    expected = discretised(first, 40)[0] * discretised(second, 40)[0]

    def score(x, t):
        return {"a": ONE.score(NOISING)(x["a"], t), "b": jax.vmap(OTHER.score(NOISING), (0, None))(x["b"], t)}

    def initial_log_weight(x):
        log_target = 2 * ONE.log_density(x["a"], 1.0, NOISING) + 2 * OTHER.log_density(x["b"][0], 1.0, NOISING)
        return log_target - jnp.sum(dist.Normal(0.0, WIDE).log_prob(jnp.append(x["b"], x["a"])))

    def draw(key):
        a, b = WIDE * jax.random.normal(key, 2)
        return {"a": a, "b": b[None]}

    def evidence(key, **options):
        settings = {"drift": NOISING.drift, "diffusion": NOISING.diffusion, "times": jnp.linspace(1.0, 0.0, 41)}
        settings |= {"initial": (draw, None), "initial_log_weight": initial_log_weight, "num_particles": 64}
        return feynman_kac_corrector(key, score, 2.0, **settings, **options).log_evidence

    keys = jax.random.split(jax.random.key(3), 800)
    estimates = jnp.exp(jax.jit(jax.vmap(evidence))(keys))
    assert mean_p_value(estimates, expected) > FALSE_ALARM
    given = evidence(keys[0], divergence=NOISING.divergence)
    assert float(given) == pytest.approx(float(evidence(keys[0])), abs=1e-4)


def test_the_history_leads_to_the_result():
    found = run(1, CASES["product"], 15, 50, store="full", ess_threshold=0.9)
    history = found.history
    assert history.ancestors.shape == found.history.particles.shape == (16, 50)
    np.testing.assert_array_equal(history.particles[-1], found.particles)
    np.testing.assert_array_equal(history.log_weights[-1], found.log_weights)
    is_moved = np.any(np.asarray(history.ancestors) != np.arange(50), axis=1)
    np.testing.assert_array_equal(is_moved, found.is_resampled)
    assert 0 < is_moved.sum() < 15
    before = np.asarray(found.ess)[:-1] <= 0.9 * 50
    np.testing.assert_array_equal(is_moved[1:], before)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_sampled_is_said():
    case = CASES["product"]
    for options, message in [
        ({"times": jnp.linspace(0.0, 1.0, 5)}, "times must fall"),
        ({"times": jnp.ones(1)}, "two or more"),
        ({"drift": lambda x, t: jnp.zeros(2)}, "drift must return a pytree like x"),
        ({"diffusion": lambda t: jnp.ones(2)}, "diffusion must return a scalar"),
        ({"diffusion": 1.0}, "diffusion must be a function"),
        ({"divergence": lambda x, t: jnp.ones(3)}, "divergence must return a scalar"),
        ({"initial": jnp.zeros(3)}, "initial must be a law"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"resampling": "best"}, "resampling must be one of"),
        ({"ess_threshold": 2.0}, "ess_threshold must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(0, case, 5, **({"num_particles": 10} | options))
    for exponents, message in [
        ((1.0,), "one number for each of 2 score_fns"),
        ((1.0, -1.0), "positive sum"),
        (lambda t: t, "need the log densities"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(0, case._replace(exponents=exponents), 5, 10, initial_log_weight=None)
    with pytest.raises(errors.DegenerateWeightsError, match="10 of them NaN") as raised:
        run(0, case, 5, 10, log_tilt=lambda x, t: jnp.nan * x)
    assert np.all(np.isfinite(raised.value.result.particles))
