"""Models that change with time: every method asks the laws of x_t and y_t for those of t, and of no other time.

    x_0 ~ N(c_0, q_0^2),   x_t = a_t x_{t-1} + c_t + q_t e_t,   y_t = b_t x_t + r_t z_t

with a row of (a, c, q, b, r) for each t, as covariates are fields that the laws index by t. The smoothing law is
Gaussian, and for a handful of particles exactly invariant, or the mean of what is weighed by the evidence.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from jaxtyping import Array, Float

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import (
    AdditiveFunctional,
    BlockedSMC,
    ConditionalSMC,
    EmbeddedHMM,
    ParisianGibbs,
    backward_sample,
    coupled_sweep,
    marginal_smoother,
    paris,
    particle_filter,
)
from bayesinf.kernels.innovations import innovations, path_of
from bayesinf.models.state_space import log_joint

ROWS = np.array(
    [
        # a, c, q, b, r
        [9.0, 0.3, 0.8, 1.0, 0.9],
        [0.9, 1.0, 0.4, -0.8, 0.5],
        [-0.7, -1.0, 1.0, 0.6, 1.0],
        [0.4, 0.5, 0.5, 1.2, 0.6],
        [1.1, -0.6, 0.7, -0.7, 0.8],
    ]
)
YS = np.array([0.8, -0.9, -1.4, 1.0, 0.9])
SHARES = np.array([1.0, -2.0, 0.5, 3.0, -1.0])  # what the functional takes of x_{t-1} x_t


class Changing(bi.models.StateSpaceModel):
    """The model above; proposals and lookaheads are the locally optimal ones."""

    rows: Float[Array, "t 5"] = eqx.field(converter=jnp.asarray)

    def initial(self):
        return dist.Normal(self.rows[0, 1], self.rows[0, 2])

    def transition(self, x_prev, t):
        a, c, q, _, _ = self.rows[t]
        return dist.Normal(a * x_prev + c, q)

    def observation(self, x, t):
        return dist.Normal(self.rows[t, 3] * x, self.rows[t, 4])

    def initial_proposal(self, y):
        return self._given(self.initial(), y, 0)

    def proposal(self, x_prev, y, t):
        return self._given(self.transition(x_prev, t), y, t)

    def lookahead(self, x_prev, y, t):
        law, (b, r) = self.transition(x_prev, t), self.rows[t, 3:]
        return dist.Normal(b * law.loc, jnp.sqrt(b**2 * law.scale**2 + r**2)).log_prob(y)

    def _given(self, law, y, t):
        b, r = self.rows[t, 3:]
        precision = 1.0 / law.scale**2 + b**2 / r**2
        return dist.Normal((law.loc / law.scale**2 + b * y / r**2) / precision, precision**-0.5)


MODEL = Changing(ROWS)
TOTAL = AdditiveFunctional(
    lambda x: jnp.stack([x, 0.0 * x]),
    lambda x_prev, x, t: jnp.stack([x, jnp.asarray(SHARES, x.dtype)[t] * x_prev * x]),
)


def _exact():
    """Prior mean and covariance of the path, and the same given y, with the log evidence."""
    num, (a, c, q, b, r) = len(YS), ROWS.T
    mixing, mean = np.zeros((num, num)), np.zeros(num)
    for t in range(num):
        if t:
            mixing[t], mean[t] = a[t] * mixing[t - 1], a[t] * mean[t - 1]
        mixing[t, t], mean[t] = q[t], mean[t] + c[t]
    prior, C = mixing @ mixing.T, np.diag(b)
    S = C @ prior @ C.T + np.diag(r**2)
    gain = np.linalg.solve(S, C @ prior).T
    log_evidence = scipy.stats.multivariate_normal(C @ mean, S).logpdf(YS)
    return (mean, prior), (mean + gain @ (YS - C @ mean), prior - gain @ C @ prior), log_evidence


PRIOR, (MEAN, COV), LOG_EVIDENCE = _exact()
SECOND = COV + np.outer(MEAN, MEAN)
TOTALS = np.array([MEAN.sum(), SHARES[1:] @ np.diag(SECOND, 1)])


def _moments(paths):
    """What determines a Gaussian law with this chain's dependence: means, squares, and neighbours' products."""
    return jnp.concatenate([paths, paths**2, paths[..., 1:] * paths[..., :-1]], axis=-1)


MOMENTS = np.concatenate([MEAN, np.diag(SECOND), np.diag(SECOND, 1)])


@eqx.filter_jit
def _replicate(run, keys):
    return jax.vmap(run)(keys)


def _p_value(run, num):
    """Of the means of what `run(key)` returns, pairs of replicates and truths."""
    found = _replicate(run, jax.random.split(jax.random.key(0), num))
    truths = {"moments": MOMENTS, "totals": TOTALS, "smoothed": MEAN, "last": MEAN[-1]}
    p_values = [mean_p_value(values, truths[name]) for name, values in found.items()]
    return min(p_values) * len(p_values)


def _draw_path(key):
    tril = jnp.asarray(np.linalg.cholesky(COV))
    return jnp.asarray(MEAN) + tril @ jax.random.normal(key, (len(YS),))


def _sweep(kernel):
    """One step of the kernel from an exact path."""

    def run(key):
        key_path, key_step = jax.random.split(key)
        state, info = kernel.step(key_step, kernel.init(_draw_path(key_path)))
        estimate = {"totals": info.estimate} if isinstance(kernel, ParisianGibbs) else {}
        return {"moments": _moments(state.position)} | estimate

    return run


def _coupled(key):
    """The second of two coupled chains, and the first's estimate."""
    kernel = ParisianGibbs(MODEL, YS, TOTAL, 3, 1)
    key_x, key_y, key = jax.random.split(key, 3)
    found = coupled_sweep(key, kernel, _draw_path(key_x), _draw_path(key_y))
    return {"moments": _moments(found.paths[1]), "totals": found.estimates[0]}


def _filtered(**options):
    """What is estimated after free filters, weighed by their evidence."""

    def run(key):
        key_filter, key_back = jax.random.split(key)
        filtered = particle_filter(
            key_filter, MODEL, YS, num_particles=6, store="full", functional=lambda x: x, **options
        )
        paths = backward_sample(key_back, MODEL, filtered, 6, "exact")
        smoothed = jnp.exp(marginal_smoother(MODEL, filtered)) * filtered.history.particles
        ratio = jnp.exp(filtered.log_evidence - LOG_EVIDENCE)
        return {
            "moments": ratio * jnp.mean(_moments(paths), axis=0),
            "smoothed": ratio * jnp.sum(smoothed, axis=1),
            "last": ratio * filtered.estimates[-1],
        }

    return run


def _paris(method):
    def run(key):
        options = {"num_particles": 6, "method": method, "proposal": "guided", "lookahead": True, "throw": False}
        found = paris(key, MODEL, YS, TOTAL, **options)
        return {"totals": jnp.exp(found.log_evidence - LOG_EVIDENCE) * found.estimate}

    return run


slow = pytest.mark.slow
CASES = {
    "ancestor": _sweep(ConditionalSMC(MODEL, YS, 3)),
    "backward, guided": _sweep(ConditionalSMC(MODEL, YS, 3, "backward", "guided")),
    "Parisian, exact": _sweep(ParisianGibbs(MODEL, YS, TOTAL, 3, 1, "exact")),
    "Parisian, mcmc, guided": _sweep(ParisianGibbs(MODEL, YS, TOTAL, 3, 2, "mcmc", "guided")),
    "Parisian, reject": _sweep(ParisianGibbs(MODEL, YS, TOTAL, 3, 1, "reject")),
    "coupled": _coupled,
    "blocks": _sweep(BlockedSMC(MODEL, YS, num_particles=3, block_size=2)),
    "embedded": _sweep(EmbeddedHMM(MODEL, YS, num_particles=3, method="sequential")),
    "embedded, parallel": _sweep(EmbeddedHMM(MODEL, YS, num_particles=3, method="parallel")),
    "filter, backward draws": _filtered(),
    "PaRIS, guided, looking ahead": _paris("exact"),
}
SLOW = {"Parisian, mcmc, guided", "Parisian, reject", "embedded, parallel"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[slow] * (name in SLOW)) for name in CASES])
def test_laws_are_those_of_their_time(name):
    assert _p_value(CASES[name], 20_000) > FALSE_ALARM


def test_a_model_of_other_rows_is_found():
    """All of the times one too late; for which the law above is not the smoothing law."""
    late = Changing(np.vstack([ROWS[:1], ROWS[2:], ROWS[-1:]]))
    assert _p_value(_sweep(ConditionalSMC(late, YS, 3)), 20_000) < FALSE_ALARM


def test_densities_and_innovations_are_those_of_their_time():
    path = np.array([0.4, 1.1, -0.3, 0.2, -1.0])
    mean, cov = PRIOR
    _, _, _, b, r = ROWS.T
    expected = scipy.stats.multivariate_normal(mean, cov).logpdf(path) + scipy.stats.norm(b * path, r).logpdf(YS).sum()
    np.testing.assert_allclose(log_joint(MODEL, jnp.asarray(path), jnp.asarray(YS)), expected, rtol=1e-5)
    z = innovations(MODEL, jnp.asarray(path))
    tril = np.linalg.cholesky(cov)
    np.testing.assert_allclose(z, np.linalg.solve(tril, path - mean), rtol=1e-4)
    np.testing.assert_allclose(path_of(MODEL, z), path, rtol=1e-4)


def test_several_series_with_covariates_of_their_own_are_filtered_at_once():
    """Each alone is what it is together with the other, missing rows at the end of the shorter one included."""
    models = Changing(np.stack([ROWS, ROWS[::-1]]))
    series = jnp.asarray(np.stack([YS, np.r_[YS[:3], np.nan, np.nan]]))
    keys = jax.random.split(jax.random.key(1), 2)

    def smooth(key, model, ys):
        return paris(key, model, ys, TOTAL, num_particles=20, method="exact", throw=False)

    together = jax.vmap(smooth)(keys, models, series)
    for i in range(2):
        alone = smooth(keys[i], Changing(models.rows[i]), series[i])
        np.testing.assert_allclose(together.estimates[i], alone.estimates, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(together.log_evidence[i], alone.log_evidence, rtol=1e-4)
