"""A regime that switches and a Gaussian state that follows it: few enough regime paths to enumerate all of them.

    r_0 ~ INITIAL,   r_t | r_{t-1} ~ SWITCHES[r_{t-1}]
    x_t = PULL[r_t] x_{t-1} + LEVEL[r_t] + SCALE[r_t] e_t,   x_{-1} = 0,   y_t = x_t + NOISE z_t

Nothing in it is symmetric, as symmetry hides errors. Given the regimes all is Gaussian, so that the law of the regimes
given y, and that of the states given both, are known by linear algebra in float64.
"""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.stats
from jax.scipy.special import ndtri

from bayesinf.conformance import mean_p_value
from bayesinf.models import StateSpaceModel

INITIAL = np.array([0.2, 0.5, 0.3])
SWITCHES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.35, 0.05, 0.6]])
PULL, LEVEL, SCALE = np.array([0.9, 0.5, -0.4]), np.array([-1.0, 0.3, 1.2]), np.array([0.4, 0.7, 0.5])
NOISE = 1.0
SERIES = np.array([-0.6, 0.8, 1.5])

NUM_STEPS = len(SERIES)
REGIMES = np.array(list(product(range(len(INITIAL)), repeat=NUM_STEPS)))  # all paths of regimes, 27 of them


class Switching(StateSpaceModel):
    """The model above; a state is a dict of "regime" and "x"."""

    def _law(self, p, x_prev):
        log_p, thresholds = jnp.log(p), ndtri(jnp.cumsum(p)[:-1])

        def law_of_x(regime):
            mean = jnp.asarray(PULL)[regime] * x_prev + jnp.asarray(LEVEL)[regime]
            return mean, jnp.asarray(SCALE)[regime]

        def sample(key):
            of_regime, of_x = jax.random.normal(key, (2,))  # one call, as that is what takes time
            regime = jnp.sum(of_regime > thresholds, dtype=jnp.int32)
            mean, scale = law_of_x(regime)
            return {"regime": regime, "x": mean + scale * of_x}

        return sample, lambda x: log_p[x["regime"]] + dist.Normal(*law_of_x(x["regime"])).log_prob(x["x"])

    def initial(self):
        return self._law(jnp.asarray(INITIAL), jnp.zeros(()))

    def transition(self, x_prev, t):
        return self._law(jnp.asarray(SWITCHES)[x_prev["regime"]], x_prev["x"])

    def observation(self, x, t):
        return dist.Normal(x["x"], NOISE)


def _solve():
    """The probability of every path of regimes, the Gaussian law of x given it and y, and the log evidence."""
    log_joints, means, trils = [], [], []
    for path in REGIMES:
        log_prior = np.log(INITIAL[path[0]]) + np.sum(np.log(SWITCHES[path[:-1], path[1:]]))
        # (1 - B) x = level + scale e, with B the pulls below the diagonal
        mixing = np.linalg.inv(np.eye(NUM_STEPS) - np.diag(PULL[path[1:]], -1))
        mean, cov = mixing @ LEVEL[path], mixing @ np.diag(SCALE[path] ** 2) @ mixing.T
        of_series = cov + NOISE**2 * np.eye(NUM_STEPS)
        gain = np.linalg.solve(of_series, cov).T
        log_joints.append(log_prior + scipy.stats.multivariate_normal(mean, of_series).logpdf(SERIES))
        means.append(mean + gain @ (SERIES - mean))
        trils.append(np.linalg.cholesky(cov - gain @ cov))
    log_evidence = np.logaddexp.reduce(log_joints)
    return np.exp(log_joints - log_evidence), np.array(means), np.array(trils), float(log_evidence)


PROBABILITIES, MEANS, TRILS, LOG_EVIDENCE = _solve()
# of each regime at the last step, given all of y: what a filter estimates
LAST_REGIME = np.array([PROBABILITIES[REGIMES[:, -1] == regime].sum() for regime in range(len(INITIAL))])


def draw_path(key):
    """An exact draw of regimes and states given y."""
    key_path, key_noise = jax.random.split(key)
    index = jax.random.categorical(key_path, jnp.log(jnp.asarray(PROBABILITIES)))
    x = jnp.asarray(MEANS)[index] + jnp.asarray(TRILS)[index] @ jax.random.normal(key_noise, (NUM_STEPS,))
    return {"regime": jnp.asarray(REGIMES, jnp.int32)[index], "x": x}


def index_of(regimes):
    """The row of REGIMES, of paths of regimes with a trailing axis of time."""
    return regimes @ len(INITIAL) ** jnp.arange(NUM_STEPS - 1, -1, -1)


def path_p_value(paths):
    """The p-value that independent paths have the smoothing law: of their regimes, of the states and their squares."""
    index = np.asarray(index_of(paths["regime"]))
    expected = len(index) * PROBABILITIES
    is_common = expected >= 5

    def pooled(counts):
        return np.append(counts[is_common], counts[~is_common].sum())

    observed, expected = pooled(np.bincount(index, minlength=len(REGIMES))), pooled(expected)
    x = np.asarray(paths["x"], np.float64)
    squares = MEANS**2 + np.sum(TRILS**2, axis=2)
    return min(
        1.0,
        2 * scipy.stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue,
        2 * mean_p_value(np.hstack([x, x**2]), PROBABILITIES @ np.hstack([MEANS, squares])),
    )
