"""Backward sampling: the exact law of every index, and smoothing that is unbiased against the exact smoother."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import errors, kernels, resampling
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import backward, backward_sample, draw_backward, particle_filter, rejection
from bayesinf.kernels.backward import draw_counted
from bayesinf.models import LinearGaussian, StateSpaceModel, kalman_filter, rts_smoother

REPLICATES = 20_000
T3 = jnp.asarray(3)

compiled = jax.jit(draw_backward, static_argnums=(7, 8))


class Drift(StateSpaceModel):
    """A walk whose steps depend on a regime: a pytree for a state, and no symmetry in time."""

    def initial(self):
        return lambda key: {"regime": jnp.asarray(0), "x": jax.random.normal(key)}, lambda x: 0.0

    def transition(self, x_prev, t):
        law = dist.Normal(0.8 * x_prev["x"] + x_prev["regime"], 0.5 + 0.1 * t)
        log_regimes = jnp.log(jnp.array([[0.9, 0.1], [0.3, 0.7]]))[x_prev["regime"]]

        def sample(key):
            key_regime, key_x = jax.random.split(key)
            return {"regime": jax.random.categorical(key_regime, log_regimes), "x": law.sample(key_x)}

        return sample, lambda x: law.log_prob(x["x"]) + log_regimes[x["regime"]]

    def observation(self, x, t):
        return dist.Normal(x["x"], 1.0)

    def log_transition_bound(self, t):
        return jnp.log(0.9) + dist.Normal(0.0, 0.5 + 0.1 * t).log_prob(0.0)


def cloud(num, key):
    key_x, key_regime = jax.random.split(key)
    return {
        "regime": jax.random.bernoulli(key_regime, 0.5, (num,)).astype(jnp.int32),
        "x": jax.random.normal(key_x, (num,)),
    }


PREVIOUS, NOW = cloud(23, jax.random.key(0)), cloud(3, jax.random.key(1))
LOG_WEIGHTS = (jax.random.normal(jax.random.key(2), (23,)) + 50).at[3].set(-jnp.inf).at[7].set(jnp.nan)


def log_law(previous, log_weights, now, t=T3):
    """Log of the unnormalised backward law, (n, N), by the formula."""

    def pair(x, x_prev):
        mean, sd = 0.8 * x_prev["x"] + x_prev["regime"], 0.5 + 0.1 * t
        move = jnp.array([[0.9, 0.1], [0.3, 0.7]])[x_prev["regime"], x["regime"]]
        return dist.Normal(mean, sd).log_prob(x["x"]) + jnp.log(move)

    log_m = jax.vmap(lambda x: jax.vmap(lambda x_prev: pair(x, x_prev))(previous))(now)
    return jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights) + log_m


def chi_square(indices, p):
    observed = np.bincount(indices, minlength=len(p))
    assert np.all(observed[p == 0] == 0)
    expected = len(indices) * p / p.sum()
    is_common = expected >= 5
    observed = np.append(observed[is_common], observed[~is_common].sum())
    expected = np.append(expected[is_common], expected[~is_common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return scipy.stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)


@partial(jax.jit, static_argnums=1)
def draw(keys, method, log_weights=LOG_WEIGHTS):
    log_p = log_law(PREVIOUS, log_weights, NOW)

    def one(key):
        key_ancestor, key_draw = jax.random.split(key)
        ancestors = jax.vmap(lambda key, w: resampling.iid(key, w, 1)[0])(jax.random.split(key_ancestor, 3), log_p)
        indices = draw_backward(key_draw, Drift(), PREVIOUS, log_weights, NOW, T3, ancestors, 2, method)
        return indices, ancestors

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("method", ["exact", "mcmc", "reject"])
def test_indices_have_the_backward_law(method):
    """For mcmc the ancestors are drawn from the law, as a filter that resamples draws them: the step preserves it."""
    indices, ancestors = map(np.asarray, draw(jax.random.split(jax.random.key(5), REPLICATES), method))
    assert indices.shape == (REPLICATES, 3, 2)
    assert indices.dtype == np.int32
    log_p = np.asarray(log_law(PREVIOUS, LOG_WEIGHTS, NOW), np.float64)
    for i in range(3):
        p = np.exp(log_p[i] - log_p[i].max())
        for j in range(2):
            assert chi_square(indices[:, i, j], p) > FALSE_ALARM
        if method != "mcmc":  # the two draws are independent
            pairs = indices[:, i, 0] * 23 + indices[:, i, 1]
            assert chi_square(pairs, np.outer(p, p).ravel()) > FALSE_ALARM
        else:  # given the ancestor; and they do leave it
            assert np.mean(indices[:, i, 0] != ancestors[:, i]) > 0.02


def test_a_draw_without_weights_or_with_the_transition_of_another_time_is_rejected():
    keys = jax.random.split(jax.random.key(5), REPLICATES)
    indices = np.asarray(draw(keys, "exact")[0])[:, 0, 0]
    for wrong in (log_law(PREVIOUS, jnp.zeros(23), NOW), log_law(PREVIOUS, LOG_WEIGHTS, NOW, t=0)):
        p = np.exp(np.asarray(wrong, np.float64)[0])
        p[[3, 7]] = 0
        assert chi_square(indices, p) < FALSE_ALARM


def test_rows_in_several_tiles_have_the_law_of_their_own_row(monkeypatch):
    monkeypatch.setattr(backward, "_TILE", 20_000)
    previous, now = cloud(300, jax.random.key(3)), cloud(2_003, jax.random.key(4))
    previous = resampling.gather(previous, jnp.argsort(previous["x"]))
    log_weights = jax.random.normal(jax.random.key(5), (300,))
    ancestors = jnp.zeros(2_003, jnp.int32)
    indices = draw_backward(jax.random.key(6), Drift(), previous, log_weights, now, T3, ancestors, 1, "exact")[:, 0]
    p = np.exp(np.asarray(log_law(previous, log_weights, now), np.float64))
    cumulative = np.insert(np.cumsum(p, axis=1) / p.sum(1, keepdims=True), 0, 0.0, axis=1)

    def p_value(rows):
        """Of the ranks being uniform, and independent of the particle's position."""
        lower, upper = cumulative[rows, indices], cumulative[rows, indices + 1]
        ranks = lower + np.random.default_rng(0).random(2_003) * (upper - lower)
        return min(scipy.stats.kstest(ranks, "uniform").pvalue, mean_p_value((ranks - 0.5) * now["x"], 0.0))

    assert p_value(np.arange(2_003)) > FALSE_ALARM
    assert p_value(np.roll(np.arange(2_003), 1)) < FALSE_ALARM


def test_small_weights_keep_their_share_in_float32():
    """A thousand particles hold 1e-4 of the mass between them: none of them is visible in a float32 sum of 1."""
    num = 1_001
    log_weights = jnp.where(jnp.arange(num) == 0, 0.0, jnp.log(1e-7)).astype(jnp.float32)
    previous = {"regime": jnp.zeros(num, jnp.int32), "x": jnp.zeros(num)}
    now = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], (1_000,)), NOW)
    ancestors = jnp.zeros(1_000, jnp.int32)
    for method in ("exact", "mcmc", "reject"):
        indices = compiled(jax.random.key(0), Drift(), previous, log_weights, now, T3, ancestors, 200, method)
        count = int(jnp.sum(indices > 0))
        assert scipy.stats.binomtest(count, 200_000, 1e-4 / (1 + 1e-4)).pvalue > FALSE_ALARM


class LowBound(Drift):
    """Says that its density is lower than it is."""

    def log_transition_bound(self, t):
        return super().log_transition_bound(t) - 3.0


@pytest.mark.parametrize(
    ("model", "num_rounds", "shrink"),
    [
        (Drift(), 0, 4),
        pytest.param(Drift(), 1, 4, marks=pytest.mark.slow),
        pytest.param(Drift(), 2, 2, marks=pytest.mark.slow),
        (Drift(), 32, 2),
        (LowBound(), 32, 4),
    ],
)
def test_rejection_keeps_the_law_whatever_it_is_forced_to(monkeypatch, model, num_rounds, shrink):
    """To draw from the categorical law, all or the rest; to gather early; to find out that its bound is none."""
    monkeypatch.setattr(rejection, "_ROUNDS", num_rounds)
    monkeypatch.setattr(rejection, "_SHRINK", shrink)
    ancestors, num_draws = jnp.zeros(3, jnp.int32), 64

    @jax.jit
    @jax.vmap
    def draw(key):
        return draw_counted(key, model, PREVIOUS, LOG_WEIGHTS, NOW, T3, ancestors, num_draws, "reject")

    indices, counts = draw(jax.random.split(jax.random.key(8), 200))
    p = np.exp(np.asarray(log_law(PREVIOUS, LOG_WEIGHTS, NOW), np.float64))
    p[:, [3, 7]] = 0
    for i in range(3):
        assert chi_square(np.asarray(indices[:, i]).ravel(), p[i]) > FALSE_ALARM
        assert chi_square(np.asarray(indices[:, i]).ravel(), p[i - 1]) < FALSE_ALARM
    if num_rounds == 0:
        assert np.all(counts.num_proposals == 0)
    if num_rounds == 0 or isinstance(model, LowBound):
        assert np.all(counts.num_exact == 3 * num_draws)
    elif num_rounds == 32:
        assert np.all(counts.num_exact == 0)
    else:
        assert np.all((counts.num_exact > 0) & (counts.num_exact < 3 * num_draws))


@pytest.mark.parametrize(
    ("law", "peak"),
    [
        (lambda x: dist.Normal(x, 1 + x**2), dist.Normal(0.0, 1.0).log_prob(0.0)),
        (lambda x: dist.StudentT(3.0, x, 0.5), dist.StudentT(3.0, 0.0, 0.5).log_prob(0.0)),
        (lambda x: dist.Laplace(jnp.full(2, x), 2.0).to_event(1), 2 * dist.Laplace(0.0, 2.0).log_prob(0.0)),
        (
            lambda x: dist.MultivariateNormal(jnp.full(2, x), 4.0 * jnp.eye(2)),
            2 * dist.Normal(0.0, 2.0).log_prob(0.0),
        ),
    ],
)
def test_the_bound_is_the_highest_peak_of_a_location_family(law, peak):
    """Over the particles that have weight: the highest of all, at 0, or at 5 which has none, does not count."""

    class Model(Drift):
        def transition(self, x_prev, t):
            return law(x_prev)

    previous = jnp.array([0.0, 1.0, 5.0])
    found = rejection.log_bound(Model(), previous, jnp.array([0.0, 0.0, -jnp.inf]), T3)
    np.testing.assert_allclose(found, peak, rtol=1e-6)
    if law(0.0).shape() == ():
        without = rejection.log_bound(Model(), previous, jnp.array([-jnp.inf, 0.0, -jnp.inf]), T3)
        np.testing.assert_allclose(without, law(1.0).log_prob(1.0), rtol=1e-6)


def test_a_law_without_a_known_bound_is_named():
    class Model(StateSpaceModel):
        def initial(self):
            return dist.Gamma(2.0, 1.0)

        def transition(self, x_prev, t):
            return dist.Gamma(2.0, 2.0 / x_prev)

        def observation(self, x, t):
            return dist.Normal(x, 1.0)

    total = kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x)
    with pytest.raises(
        ValueError, match=r"method='reject' needs a method log_transition_bound\(t\) of the model Model"
    ):
        kernels.paris(0, Model(), jnp.zeros(3), total, num_particles=10, method="reject")


@pytest.mark.parametrize("method", ["exact", "mcmc", "reject"])
def test_where_nothing_could_have_come_from_the_ancestor_is_the_answer(method):
    now = {"regime": jnp.zeros(2, jnp.int32), "x": jnp.array([jnp.nan, 0.0])}
    ancestors = jnp.array([11, 12], jnp.int32)
    indices = compiled(jax.random.key(0), Drift(), PREVIOUS, LOG_WEIGHTS, now, T3, ancestors, 5, method)
    assert indices[0].tolist() == [11] * 5


def test_auto_is_exact_while_that_is_cheap(monkeypatch):
    arguments = (jax.random.key(0), Drift(), PREVIOUS, LOG_WEIGHTS, NOW, T3, jnp.zeros(3, jnp.int32), 4)
    exact, mcmc = (draw_backward(*arguments, method) for method in ("exact", "mcmc"))
    assert np.any(exact != mcmc)
    np.testing.assert_array_equal(draw_backward(*arguments, "auto"), exact)
    monkeypatch.setattr(backward, "_AUTO_DENSITIES", 3 * 23 - 1)
    np.testing.assert_array_equal(draw_backward(*arguments, "auto"), mcmc)


def test_unknown_methods_are_named():
    arguments = (jax.random.key(0), Drift(), PREVIOUS, LOG_WEIGHTS, NOW, T3, jnp.zeros(3, jnp.int32), 1)
    with pytest.raises(ValueError, match="method must be one of 'auto', 'exact', 'mcmc', 'reject', got 'gumbel'"):
        draw_backward(*arguments, "gumbel")
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        draw_backward(*arguments[:-1], 0)


MODEL = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.9, initial_mean=0.5)
YS = jnp.array([[1.0], [-0.4], [jnp.nan], [1.3], [2.0]])


@pytest.mark.parametrize(
    ("method", "proposal"),
    [
        ("exact", "guided"),
        ("mcmc", "bootstrap"),
        pytest.param("exact", "bootstrap", marks=pytest.mark.slow),
        pytest.param("mcmc", "guided", marks=pytest.mark.slow),
    ],
)
def test_smoothing_is_unbiased_for_few_particles(method, proposal):
    """Zhat f(path) has mean Z E[f(x) | y], for every N, where the filter draws its ancestors independently."""
    exact, log_evidence = rts_smoother(MODEL, YS), kalman_filter(MODEL, YS).log_evidence

    def run(key):
        key_filter, key_paths = jax.random.split(key)
        options = {"num_particles": 8, "resampling": "multinomial", "ess_threshold": 1.0, "proposal": proposal}
        filtered = particle_filter(key_filter, MODEL, YS, store="full", **options)
        paths = backward_sample(key_paths, MODEL, filtered, 4, method)[..., 0]
        ratio = jnp.exp(filtered.log_evidence - log_evidence)
        return ratio * paths.mean(0), ratio * (paths[:, 1:] * paths[:, :-1]).mean(0)

    means, products = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=1_000))(
        jax.random.split(jax.random.key(0), 10_000)
    )
    smoothed = np.asarray(exact.means, np.float64)[:, 0]
    assert mean_p_value(means, smoothed) > FALSE_ALARM
    crosses = smoothed[1:] * smoothed[:-1] + np.asarray(exact.cross_covariances)[:, 0, 0]
    assert mean_p_value(products, crosses) > FALSE_ALARM


def genealogies(history):
    """The paths of all particles alive at the end, by tracing ancestors: (N, T)."""

    def back(index, now):
        particles, ancestors = now
        return ancestors[index], particles[index]

    num = history.log_weights.shape[1]
    _, paths = jax.lax.scan(
        back, jnp.arange(num, dtype=history.ancestors.dtype), (history.particles, history.ancestors), reverse=True
    )
    return jnp.swapaxes(paths, 0, 1)


def test_variance_is_far_below_that_of_the_genealogy():
    model = LinearGaussian.scalar(0.7, 0.2, 1.0, 1.0)
    _, ys = bi.models.simulate(0, model, 100)
    options = {"resampling": "multinomial", "ess_threshold": 1.0}

    def run(key):
        key_filter, key_paths = jax.random.split(key)
        filtered = particle_filter(key_filter, model, ys, num_particles=50, store="full", **options)
        traced = jnp.exp(filtered.log_weights) @ genealogies(filtered.history)[..., 0].sum(1)
        sampled = [
            backward_sample(key_paths, model, filtered, 50, method)[..., 0].sum(1).mean()
            for method in ("exact", "mcmc")
        ]
        return jnp.stack([traced, *sampled])

    totals = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 200)), np.float64)
    variances = totals.var(0, ddof=1)
    for variance in variances[1:]:
        assert scipy.stats.f.sf(variances[0] / variance, 199, 199) < FALSE_ALARM
    # all of them aim at the same
    assert mean_p_value(totals[:, 1:] - totals[:, :1], 0.0) > FALSE_ALARM


def test_one_path_one_row_and_pytrees():
    _, ys = bi.models.simulate(0, Drift(), 6)
    filtered = particle_filter(0, Drift(), ys, num_particles=10, store="full", functional=lambda x: x["x"])
    paths = backward_sample(1, Drift(), filtered, 3)
    assert paths["regime"].shape == paths["x"].shape == (3, 6)
    particles = filtered.history.particles
    for path_x, path_regime in zip(paths["x"], paths["regime"], strict=True):
        for t in range(6):  # regime and position come from one particle
            match = (particles["x"][t] == path_x[t]) & (particles["regime"][t] == path_regime[t])
            assert match.any()
    alone = particle_filter(0, Drift(), ys[:1], num_particles=10, store="full", functional=lambda x: x["x"])
    assert backward_sample(1, Drift(), alone, 2)["x"].shape == (2, 1)


@pytest.mark.parametrize("method", ["exact", "mcmc", "reject", "auto"])
def test_what_the_draws_of_paths_cost_is_told(method):
    filtered = particle_filter(0, MODEL, YS, num_particles=20, store="full")
    paths, counts = backward_sample(1, MODEL, filtered, 7, method, return_counts=True)
    np.testing.assert_array_equal(paths, backward_sample(1, MODEL, filtered, 7, method))
    assert counts.num_proposals.shape == counts.num_exact.shape == (5,)
    assert counts.num_proposals[0] == counts.num_exact[0] == 0
    proposals, exact = np.asarray(counts.num_proposals[1:]), np.asarray(counts.num_exact[1:])
    if method == "reject":
        assert np.all(proposals + exact >= 7)
        assert np.any(proposals > 7)
    else:
        assert np.all(proposals == (7 if method == "mcmc" else 0))
        assert np.all(exact == (0 if method == "mcmc" else 7))


def test_paths_that_are_not_served_in_time_are_counted(monkeypatch):
    """No rounds of proposals are left, or a bound that does not hold: all draws looked at all particles."""
    _, ys = bi.models.simulate(0, Drift(), 6)
    filtered = particle_filter(0, Drift(), ys, num_particles=10, store="full", functional=lambda x: x["x"])
    _, counts = backward_sample(1, LowBound(), filtered, 64, "reject", return_counts=True)
    assert counts.num_exact.tolist() == [0] + 5 * [64]
    monkeypatch.setattr(rejection, "_ROUNDS", 0)
    _, counts = backward_sample(1, Drift(), filtered, 11, "reject", return_counts=True)
    assert counts.num_exact.tolist() == [0] + 5 * [11]
    assert counts.num_proposals.tolist() == 6 * [0]


def test_jit_and_vmap_change_nothing():
    filtered = particle_filter(0, MODEL, YS, num_particles=20, store="full")
    keys = jax.random.split(jax.random.key(1), 3)
    together = jax.jit(jax.vmap(lambda key: backward_sample(key, MODEL, filtered, 4)))(keys)
    for key, paths in zip(keys, together, strict=True):
        np.testing.assert_array_equal(backward_sample(key, MODEL, filtered, 4), paths)


def test_bad_arguments_are_named():
    filtered = particle_filter(0, MODEL, YS, num_particles=20)
    with pytest.raises(ValueError, match="call particle_filter with store='full'"):
        backward_sample(0, MODEL, filtered, 5)
    filtered = particle_filter(0, MODEL, YS, num_particles=20, store="full")
    with pytest.raises(ValueError, match="num_paths must be at least 1"):
        backward_sample(0, MODEL, filtered, 0)
    with pytest.raises(ValueError, match="method must be one of"):
        backward_sample(0, MODEL, filtered, 5, "gumbel")
    lost = filtered._replace(log_evidence=jnp.asarray(-jnp.inf))
    with pytest.raises(errors.DegenerateWeightsError, match="nothing to smooth"):
        backward_sample(0, MODEL, lost, 5)
