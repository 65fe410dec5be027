"""Embedded hidden Markov models: the law of the indices by enumeration, invariance, one path by both methods."""

from itertools import product
from unittest.mock import patch

import equinox as eqx
import gamma_beta
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from planted.paths import CentredAtThePath, DensityOutsideTheSupport
from ppg_models import problem
from two_states import CHAIN_YS, Chain

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance, mean_p_value
from bayesinf.kernels import EmbeddedHMM, embedded_hmm
from bayesinf.kernels.embedded_hmm import draw_candidates, draw_indices

METHODS = ("sequential", "parallel")


class Pair(bi.models.StateSpaceModel):
    """A state of two parts, of which the second follows the first; laws as pairs of functions."""

    def _law(self, mean):
        laws = {"x": dist.Normal(mean["x"], 0.5), "v": dist.Laplace(mean["v"] + mean["x"], 0.7)}

        def sample(key):
            key_x, key_v = jax.random.split(key)
            return {"x": laws["x"].sample(key_x), "v": laws["v"].sample(key_v)}

        def log_prob(state):
            return sum(jnp.sum(law.log_prob(state[name])) for name, law in laws.items())

        return sample, log_prob

    def initial(self):
        return self._law({"x": jnp.zeros(()), "v": jnp.zeros(2)})

    def transition(self, x_prev, t):
        return self._law({"x": 0.9 * x_prev["x"], "v": 0.5 * x_prev["v"]})

    def observation(self, x, t):
        return dist.Normal(x["x"] + x["v"][0] * x["v"][1], 0.8)


# ---- the path through given candidates ----


@pytest.fixture(scope="module")
def small():
    """Three candidates at each of four times, and the probabilities of the 81 paths through them."""
    model, ys, _ = problem("PPG1d", 3)
    x = np.array([[0.3, 1.4, 0.9], [1.0, 2.2, 1.5], [1.6, 0.4, 0.9], [0.2, -0.9, 0.5]])
    law = scipy.stats.norm.logpdf
    a, q, b, r, P0 = (float(value) for value in (model.a, model.q, model.b, model.r, model.P0))
    paths = np.array(list(product(range(3), repeat=4)))
    states = x[np.arange(4), paths]
    log_p = law(states[:, 0], 0, np.sqrt(P0)) + law(np.asarray(ys), b * states, r).sum(1)
    log_p += law(states[:, 1:], a * states[:, :-1], q).sum(1)
    p = np.exp(log_p - log_p.max())
    return model, ys, jnp.asarray(x), p / p.sum()


def _p_value_of_indices(small, method, num=40_000):
    model, ys, candidates, p = small
    draw = jax.jit(jax.vmap(lambda key: draw_indices(key, model, ys, candidates, method)[0]))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(3), num))) @ [27, 9, 3, 1], minlength=81)
    rare = num * p < 5
    observed, expected = np.append(counts[~rare], counts[rare].sum()), np.append(p[~rare], p[rare].sum()) * num
    return scipy.stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("method", METHODS)
def test_indices_have_the_law_of_the_hidden_markov_model(small, method):
    assert _p_value_of_indices(small, method) > FALSE_ALARM


def test_maps_in_the_wrong_order_have_another(small):
    right = embedded_hmm._compose
    with patch.object(embedded_hmm, "_compose", lambda later, earlier: right(earlier, later)):
        assert _p_value_of_indices(small, "parallel") < FALSE_ALARM


def test_both_methods_draw_one_path_from_one_key():
    """Also after many steps in float32: the filter of both is the same to rounding."""
    model = Pair()
    paths, ys = bi.models.simulate(0, model, num_steps=600)
    candidates = draw_candidates(jax.random.key(1), paths, 6, jnp.asarray(0.3))
    draws = [
        jax.jit(jax.vmap(lambda key: draw_indices(key, model, ys, candidates, method)[0]))(  # noqa: B023
            jax.random.split(jax.random.key(2), 20)
        )
        for method in METHODS
    ]
    assert np.mean(np.asarray(draws[0]) != np.asarray(draws[1])) < 1e-3
    assert len(np.unique(draws[0])) == 6


def test_a_step_by_step_draw_holds_no_table_of_all_transitions():
    model, ys, _ = problem("PPG1d", 255)
    candidates = jnp.zeros((256, 64))

    def memory(method):
        compiled = (
            jax.jit(lambda key: draw_indices(key, model, ys, candidates, method)).lower(jax.random.key(0)).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    table = 256 * 64**2 * candidates.dtype.itemsize
    assert memory("sequential") < table / 4
    assert memory("parallel") >= table


# ---- the kernel ----


@pytest.mark.parametrize(
    ("num_particles", "method"), [(2, "parallel"), pytest.param(8, "sequential", marks=pytest.mark.slow)]
)
def test_a_skewed_law_of_positive_states_is_invariant(num_particles, method):
    kernel = EmbeddedHMM(gamma_beta.GammaBeta(), gamma_beta.YS, num_particles, 1.0, method)
    report = exact_start_invariance(0, kernel, gamma_beta.draw_path, num_chains=10_000, num_steps=3)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.slow
def test_candidates_around_the_path_move_a_skewed_law():
    kernel = CentredAtThePath(gamma_beta.GammaBeta(), gamma_beta.YS, 8, 1.0)
    assert exact_start_invariance(0, kernel, gamma_beta.draw_path, num_chains=10_000).p_value < FALSE_ALARM


class Waiting(bi.models.StateSpaceModel):
    """Exponential states, by a law that does not check: its density goes on to grow on the left of 0."""

    def initial(self):
        return dist.Exponential(1.0, validate_args=False)

    def transition(self, x_prev, t):
        return dist.Exponential(1.0, validate_args=False)

    def observation(self, x, t):
        return dist.Normal(0.0, 1.0)


@pytest.mark.parametrize(("kind", "is_right"), [(EmbeddedHMM, True), (DensityOutsideTheSupport, False)])
def test_states_stay_in_the_support_of_their_laws(kind, is_right):
    kernel = kind(Waiting(), jnp.full(3, jnp.nan), 4, 2.0)

    @jax.jit
    def ends(kernel, key):
        path = jax.random.exponential(key, (3,))
        return kernel.step(jax.random.fold_in(key, 1), kernel.init(path))[0].position

    x = np.asarray(jax.vmap(lambda key: ends(kernel, key))(jax.random.split(jax.random.key(0), 20_000)))
    p_value = min(mean_p_value(x, 1.0), mean_p_value(x**2, 2.0))
    assert bool(np.all(x > 0) and p_value > FALSE_ALARM) == is_right


def test_warm_up_finds_a_step_size_for_all_times_or_for_each():
    model, ys, _ = problem("PPG1d", 19)
    ys = ys.at[10:].set(jnp.nan)  # nothing is seen of the second half, whose states are wider
    for step_size in (10.0, jnp.full(20, 10.0)):
        kernel = EmbeddedHMM(model, ys, 8, step_size)
        assert kernel.target_acceptance == 0.5
        draws = bi.sample(0, kernel, kernel.initial(1, 2), num_samples=400, num_warmup=400, progress=False)
        assert abs(draws.stats["acceptance_rate"].mean() - 0.5) < 0.05
    tuned = np.asarray(draws.tuned.step_size).mean(0)
    assert tuned.shape == (20,)
    assert tuned[11:].mean() > 1.5 * tuned[:9].mean()
    assert np.all(np.abs(draws.stats["is_updated"].mean((0, 1)) - 0.5) < 0.15)


def test_a_path_of_no_density_is_kept_and_counted():
    kernel = EmbeddedHMM(Waiting(), jnp.full(4, jnp.nan), 4, 0.1)
    path = jnp.array([1.0, 1.0, -9.0, 1.0])  # around -9 all candidates are impossible
    state, info = eqx.filter_jit(kernel.step)(jax.random.key(0), kernel.init(path))
    assert bool(info.is_divergent)
    assert not bool(info.is_accepted)
    np.testing.assert_array_equal(state.position, path)


class InvalidObservation(Waiting):
    def observation(self, x, t):
        return (lambda key: x), lambda y: jnp.where(x == 1.0, 0.0, jnp.nan)


@pytest.mark.parametrize("method", METHODS)
def test_densities_that_are_none_count_as_zero(method):
    kernel = EmbeddedHMM(InvalidObservation(), jnp.zeros(4), 3, 0.1, method)
    state, info = eqx.filter_jit(kernel.step)(jax.random.key(0), kernel.init(jnp.ones(4)))
    np.testing.assert_array_equal(state.position, jnp.ones(4))
    assert (int(info.num_invalid), bool(info.is_divergent)) == (4 * 2, False)


def test_a_single_row_works():
    model, ys, _ = problem("PPG1d", 0)
    for method in METHODS:
        kernel = EmbeddedHMM(model, ys, 4, 1.0, method)
        state, info = eqx.filter_jit(kernel.step)(jax.random.key(1), kernel.init(jnp.zeros(1)))
        assert (state.position.shape, info.is_updated.shape) == ((1,), (1,))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda model, ys: EmbeddedHMM(model, ys, 1), "num_particles must be at least 2"),
        (lambda model, ys: EmbeddedHMM(model, ys, 4, 0.0), "step_size must be finite and positive"),
        (lambda model, ys: EmbeddedHMM(model, ys, 4, jnp.ones(3)), "one number for each of the 51 rows"),
        (lambda model, ys: EmbeddedHMM(model, ys, 4, 1.0, "scan"), "method must be one of"),
        (lambda model, ys: EmbeddedHMM(Chain(), CHAIN_YS, 4), "states of floating point"),
        (lambda model, ys: EmbeddedHMM(model, ys, 4).init(jnp.zeros(50)), "51 rows of ys"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_by_name(make, match):
    model, ys, _ = problem("OW", 50)
    with pytest.raises(ValueError, match=match):
        make(model, ys)
