"""Fisher's and Louis's identities: on exact paths they hold exactly, and the estimates by particles follow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from ppg_models import Scalar, assert_published, exact_paths, learning_series, mean_and_error, smooth

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import observed_information, paris, ppg, score_ascent, score_functional
from bayesinf.models.state_space import StateSpaceModel, log_joint

SHORT = learning_series()[:8]
THETA = np.array([0.5, -0.2, 0.1])


def build(theta):
    return Scalar(theta[0], jnp.exp(theta[1]), 1.0, jnp.exp(theta[2]), 1.0)


def log_evidence(theta, ys):
    return smooth(ys, theta[0], np.exp(theta[1]), 1.0, np.exp(theta[2]), 1.0).log_evidence


def exact_score(theta, ys, h=1e-5):
    steps = h * np.eye(len(theta))
    return np.array([(log_evidence(theta + e, ys) - log_evidence(theta - e, ys)) / (2 * h) for e in steps])


def exact_information(theta, ys, h=1e-4):
    steps = h * np.eye(len(theta))
    return -np.array([(exact_score(theta + e, ys) - exact_score(theta - e, ys)) / (2 * h) for e in steps])


def test_the_exact_score_is_the_published_one():
    ys = learning_series()
    np.testing.assert_allclose(exact_score(np.array([0.5, 0.0, 0.0]), ys), [19.806, -16.449, -27.907], atol=2e-3)
    theta = np.array([0.9, np.log(0.6), np.log(0.7)])
    np.testing.assert_allclose(exact_score(theta, ys), [-7.875, -8.939, -3.082], atol=2e-3)


def paths_and_scores(num=20_000):
    """Exact draws of the path, and the score functional of each."""
    smoothed = smooth(SHORT, 0.5, np.exp(-0.2), 1.0, np.exp(0.1), 1.0)
    paths = exact_paths(jax.random.key(3), smoothed, num)
    functional = score_functional(build, jnp.asarray(THETA))
    ys = jnp.asarray(SHORT)
    return paths, jax.jit(jax.vmap(lambda path: functional.of_path(path, ys)))(paths)


def test_the_functional_of_exact_paths_has_the_score_as_its_mean():
    _, scores = paths_and_scores()
    assert mean_p_value(scores, exact_score(THETA, SHORT)) > FALSE_ALARM


def test_louis_identity_on_exact_paths():
    """Mean of -grad^2 log p(x, y) - (S - E S)(S - E S)^T is the observed information."""
    paths, scores = paths_and_scores()
    ys = jnp.asarray(SHORT)
    curvature = jax.hessian(lambda theta, path: log_joint(build(theta), path, ys))
    curvatures = jax.jit(lambda paths: jax.lax.map(lambda path: curvature(jnp.asarray(THETA), path), paths))(paths)
    centred = np.asarray(scores, np.float64) - exact_score(THETA, SHORT)
    found = -np.asarray(curvatures, np.float64) - centred[:, :, None] * centred[:, None, :]
    assert mean_p_value(found, exact_information(THETA, SHORT)) > FALSE_ALARM


def test_information_by_particles():
    """Replicates of the whole estimate; its bias of O(1/N) is far below the standard error."""
    ys = jnp.asarray(SHORT)

    def run(key):
        found = observed_information(key, build, jnp.asarray(THETA), ys, num_particles=500, num_paths=200)
        return found.score, found.information

    keys = jax.random.split(jax.random.key(0), 100)
    scores, information = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=20))(keys)
    assert mean_p_value(scores, exact_score(THETA, SHORT)) > FALSE_ALARM
    assert mean_p_value(information, exact_information(THETA, SHORT)) > FALSE_ALARM
    errors = np.std(information, axis=0) / np.sqrt(100)
    assert np.all(errors < 0.1 * np.max(exact_information(THETA, SHORT)))  # it would see a tenth


def _scores_by_particles(theta, num, num_sweeps):
    """Errors of roll-outs of the later half of the sweeps, and of PaRIS, with 20 particles."""
    ys, functional = jnp.asarray(learning_series()), score_functional(build, jnp.asarray(theta))
    options = {"num_particles": 20, "throw": False}

    def roll_out(key):
        sweeps = {"num_sweeps": num_sweeps, "burn_in": num_sweeps // 2}
        return ppg(key, build(jnp.asarray(theta)), ys, functional, **sweeps, **options).estimate

    def once(key):
        return paris(key, build(jnp.asarray(theta)), ys, functional, **options).estimate

    keys = jax.random.split(jax.random.key(1), num)
    each = [np.asarray(jax.jit(lambda k, f=f: jax.lax.map(f, k, batch_size=500))(keys)) for f in (roll_out, once)]
    return [found - exact_score(np.asarray(theta), learning_series()) for found in each]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theta", "num", "num_sweeps", "tolerances", "of_paris"),
    [
        ([0.5, 0.0, 0.0], 5_000, 4, (0.2, 0.25, 0.2), (-1.9, -1.1, 3.5)),
        (
            [0.96672677, -1.20858203, -0.22631829],
            12_000,
            8,
            (0.25, 0.25, 0.25),
            (-2.5, -0.5, 3.5),
        ),  # of most likelihood
    ],
)
def test_the_roll_out_gives_the_score_where_paris_is_biased(theta, num, num_sweeps, tolerances, of_paris):
    """N = 20: roll-outs are within 0.25 of the exact score, PaRIS is off by up to three."""
    rolled_out, once = _scores_by_particles(theta, num, num_sweeps)
    for i, tolerance in enumerate(tolerances):
        assert_published(mean_and_error(rolled_out[:, i]), 0.0, tolerance)
        assert_published(mean_and_error(once[:, i]), of_paris[i], 0.5)
    assert mean_p_value(once, 0.0) < FALSE_ALARM


class Shifted(StateSpaceModel):
    """A walk whose only proposal is its transition."""

    shift: jax.Array

    def initial(self):
        return dist.Normal(0.0, 1.0)

    def transition(self, x_prev, t):
        return dist.Normal(0.9 * x_prev, 0.5)

    def observation(self, x, t):
        return dist.Normal(x, 1.0)


class Tilted(Shifted):
    """Its proposal has a parameter of its own, and there is none for the start."""

    def proposal(self, x_prev, y, t):
        return dist.Normal(0.9 * x_prev + self.shift * y, 0.5)


def test_of_a_proposal_it_is_the_gradient_of_its_log_density():
    path, ys = jnp.asarray([0.1, -0.4, 0.3]), jnp.asarray([1.0, -0.5, 0.2])
    functional = score_functional(Tilted, 0.3, of="proposal")
    residual = path[1:] - 0.9 * path[:-1] - 0.3 * ys[1:]
    np.testing.assert_allclose(functional.of_path(path, ys), jnp.sum(residual / 0.25 * ys[1:]), rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match="theta must be floating point, got int"):
        score_functional(build, jnp.arange(3))
    with pytest.raises(ValueError, match="of must be one of 'model', 'proposal'"):
        score_functional(build, 1.0, of="path")
    with pytest.raises(ValueError, match=r"of='proposal' needs a method proposal\(x_prev, y, t\) of the model Shifted"):
        score_functional(Shifted, 1.0, of="proposal")
    options = {"optimizer": optax.sgd(0.1), "num_particles": 4, "num_iterations": 1, "of": "proposal"}
    with pytest.raises(ValueError, match=r"of='proposal' needs a method proposal\(x_prev, y, t\) of the model Shifted"):
        score_ascent(0, Shifted, 1.0, SHORT, **options)
    with pytest.raises(ValueError, match="build must be called as"):
        score_functional(lambda: None, 1.0)
    with pytest.raises(ValueError, match="num_paths must be at least 2"):
        observed_information(0, build, THETA, SHORT, num_particles=10, num_paths=1)
