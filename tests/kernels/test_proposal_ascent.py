"""What `score_ascent(of="proposal")` finds: the exact optimum of the inclusive divergence in a linear Gaussian model.

With q_theta(x_t | x_{t-1}, y_t) = N(alpha x_{t-1} + beta y_t, s^2) and q_theta(x_0) = N(m, s_0^2) the divergence from
the smoothing law is least where alpha, beta and s^2 are those of the regression of x_t on (x_{t-1}, y_t) under that
law, and m, s_0 the mean and the standard deviation of x_0: moments that dense linear algebra gives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jaxtyping import Array, Float
from ppg_models import PARAMETERS, Scalar, assert_published, exact_paths, mean_and_error, problem, smooth

from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import ParisianGibbs, score_ascent, score_functional

LAST = 20
_, YS, SMOOTHED = problem("PPG1d", LAST)


class Adapted(Scalar):
    """The fixed model with a proposal of five parameters."""

    theta: Float[Array, "5"] = None

    def initial_proposal(self, y):
        return dist.Normal(self.theta[3], jnp.exp(self.theta[4]))

    def proposal(self, x_prev, y, t):
        return dist.Normal(self.theta[0] * x_prev + self.theta[1] * y, jnp.exp(self.theta[2]))


def build(theta):
    """Of theta = (alpha, beta, log s, m, log s_0)."""
    return Adapted(**PARAMETERS["PPG1d"], theta=theta)


class Moments(NamedTuple):
    """Sums over t >= 1 of products of u = (x_{t-1}, y_t) and x_t under a law of paths, and what is known of x_0."""

    uu: np.ndarray
    ux: np.ndarray
    xx: float
    mean_0: float
    variance_0: float

    def optimum(self):
        slopes = np.linalg.solve(self.uu, self.ux)
        variance = (self.xx - slopes @ self.ux) / LAST
        return np.array([*slopes, 0.5 * np.log(variance), self.mean_0, 0.5 * np.log(self.variance_0)])

    def gradient(self, theta):
        """Of the expectation of log q_theta."""
        slopes, variance, variance_0 = theta[:2], np.exp(2 * theta[2]), np.exp(2 * theta[4])
        residual = self.xx - 2 * slopes @ self.ux + slopes @ self.uu @ slopes
        off = self.mean_0 - theta[3]
        return np.array(
            [
                *(self.ux - self.uu @ slopes) / variance,
                residual / variance - LAST,
                off / variance_0,
                (self.variance_0 + off**2) / variance_0 - 1,
            ]
        )

    def fisher(self):
        """Minus the second derivatives of that expectation at its maximum."""
        theta = self.optimum()
        found = np.diag([0, 0, 2.0 * LAST, np.exp(-2 * theta[4]), 2.0])
        found[:2, :2] = self.uu / np.exp(2 * theta[2])
        return found


def moments(mean, cov, ys):
    second = cov + np.outer(mean, mean)
    crossed = mean[:-1] @ ys[1:]
    return Moments(
        uu=np.array([[np.trace(second[:-1, :-1]), crossed], [crossed, ys[1:] @ ys[1:]]]),
        ux=np.array([np.trace(second, offset=1), mean[1:] @ ys[1:]]),
        xx=np.trace(second[1:, 1:]),
        mean_0=mean[0],
        variance_0=cov[0, 0],
    )


EXACT = moments(SMOOTHED.mean, SMOOTHED.cov, np.asarray(YS, np.float64))
POOR = np.array([0.5, 0.3, 0.0, 1.0, 0.0])


def test_the_closed_form_is_the_optimum():
    def expected(theta):
        u = np.array([theta[0], theta[1]])
        residual = EXACT.xx - 2 * u @ EXACT.ux + u @ EXACT.uu @ u
        at_0 = (EXACT.variance_0 + (EXACT.mean_0 - theta[3]) ** 2) / np.exp(2 * theta[4])
        return -0.5 * residual / np.exp(2 * theta[2]) - LAST * theta[2] - 0.5 * at_0 - theta[4]

    np.testing.assert_allclose(EXACT.gradient(EXACT.optimum()), 0.0, atol=1e-9)
    for i, unit in enumerate(np.eye(5)):
        slope = (expected(POOR + 1e-5 * unit) - expected(POOR - 1e-5 * unit)) / 2e-5
        np.testing.assert_allclose(EXACT.gradient(POOR)[i], slope, rtol=1e-5)


@pytest.mark.usefixtures("compile_fast")
def test_the_gradient_is_unbiased_at_any_proposal():
    """A sweep of Parisian Gibbs from an exact path, with few particles that a poor proposal moves."""
    theta, num = jnp.asarray(POOR), 8_000
    kernel = ParisianGibbs(build(theta), YS, score_functional(build, theta, of="proposal"), 6, 2, proposal="guided")
    paths = exact_paths(jax.random.key(0), SMOOTHED, num)

    @jax.jit
    def run(keys, paths):
        return jax.lax.map(
            lambda row: kernel.step(row[0], kernel.init(row[1]))[1].estimate, (keys, paths), batch_size=500
        )

    found = run(jax.random.split(jax.random.key(1), num), paths)
    assert mean_p_value(found, EXACT.gradient(POOR)) > FALSE_ALARM
    # the law of the series without its last observation has other moments, and that is seen
    ys = np.asarray(YS, np.float64).copy()
    ys[-1] = np.nan
    shorter = smooth(ys, **PARAMETERS["PPG1d"])
    assert mean_p_value(found, moments(shorter.mean, shorter.cov, np.asarray(YS)).gradient(POOR)) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "num_runs"), [("ppg", 16), ("gibbs", 40)])
def test_ascent_finds_the_optimum_of_the_inclusive_divergence(estimator, num_runs):
    """By steps l^-0.8 of the natural gradient, the last of 0.003: what they leave is of that order.

    None of them is clipped: the noise is skewed, and the mean of what is cut off would be a bias. The
    locally optimal proposal, which knows no later data, has another slope.
    """
    scale = jnp.asarray(np.linalg.inv(EXACT.fisher()))
    optimizer = optax.chain(
        optax.stateless(lambda updates, _: scale.astype(updates.dtype) @ updates),
        optax.scale_by_schedule(lambda step: (step + 10.0) ** -0.8),
        optax.scale(-1.0),
    )

    def run(key):
        options = {"num_particles": 16, "num_iterations": 1_500, "proposal": "guided", "throw": False}
        options["estimator"] = estimator
        return score_ascent(key, build, jnp.asarray(POOR), YS, optimizer=optimizer, of="proposal", **options).theta

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), num_runs)), np.float64)
    optimum, tolerance = EXACT.optimum(), 0.02
    for values, exact in zip(found.T, optimum, strict=True):
        assert_published(mean_and_error(values), exact, tolerance)
    local = Scalar(**PARAMETERS["PPG1d"]).proposal(jnp.asarray(1.0), jnp.asarray(0.0), 1)
    assert abs(float(local.loc) - optimum[0]) > 3 * tolerance
