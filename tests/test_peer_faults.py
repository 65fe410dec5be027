"""Faults that were found in other packages, each by name: ours has none of them, and would not pass with any of them.

`docs/peer_faults.md` tells of each. Every test states the law that must hold, and shows that a twin of our own code in
which the fault is planted does not obey it.
"""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
import switching_laws as switching
from jaxtyping import Array
from planted import peers
from planted.parisian import StaleParticleGibbs, SystematicConditionalSMC
from planted.peers import planted

from bayesinf import compiler, resampling, weights
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.kernels import (
    MALA,
    ConditionalSMC,
    ParticleGibbs,
    backward_sample,
    filter_steps,
    online_filter,
    particle_filter,
)
from bayesinf.kernels.smc_sampler import next_temperature
from bayesinf.models import LinearGaussian, StateSpaceModel, kalman_filter

# ---- kernels on paths, from exact starts ----


@eqx.filter_jit
def _after(kernel, keys, draw, num_steps):
    """Where independent chains from exact draws are after some steps."""

    def chain(key):
        key_start, key_steps = jax.random.split(key)

        def move(i, state):
            return kernel.step(jax.random.fold_in(key_steps, i), state)[0]

        return jax.lax.fori_loop(0, num_steps, move, kernel.init(draw(key_start))).position

    return jax.lax.map(chain, keys, batch_size=10_000)


class Level(StateSpaceModel):
    """An autoregression about an unknown level, seen in noise."""

    level: Array

    def initial(self):
        return dist.Normal(self.level, 0.4)

    def transition(self, x_prev, t):
        return dist.Normal(self.level + 0.8 * (x_prev - self.level), 0.4)

    def observation(self, x, t):
        return dist.Normal(x, 1.0)


LEVEL_YS = np.array([0.9, 1.4, 2.2, 0.3])


def _level_and_path():
    """Mean and covariance of (level, x_0, ..., x_3) given y, where the level is N(0, 1)."""
    lag = np.arange(4)[:, None] - np.arange(4)
    mixing = np.column_stack([np.ones(4), 0.4 * np.where(lag >= 0, 0.8 ** np.maximum(lag, 0), 0.0)])
    mixing = np.vstack([np.eye(1, 5), mixing])
    prior, seen = mixing @ mixing.T, np.eye(5)[1:]
    gain = np.linalg.solve(seen @ prior @ seen.T + np.eye(4), seen @ prior).T
    return gain @ LEVEL_YS, prior - gain @ seen @ prior


@pytest.mark.usefixtures("compile_fast")
def test_parameters_and_path_keep_their_correlation():
    """`particles`: x was drawn given the theta of the step before, while theta was drawn given the x of it."""
    mean, cov = _level_and_path()
    average = np.r_[0.0, np.full(4, 0.25)]
    exact = cov[0] @ average / np.sqrt(cov[0, 0] * (average @ cov @ average))
    assert exact > 0.65

    def draw(key):
        values = jnp.asarray(mean) + jnp.asarray(np.linalg.cholesky(cov)) @ jax.random.normal(key, (5,))
        return {"theta": values[0], "path": values[1:]}

    def p_value(kernel_class, num=4_000):
        kernel = kernel_class(
            Level, lambda level: -0.5 * level**2, LEVEL_YS, 4, parameter_kernel=partial(MALA, step_size=0.1)
        )
        after = _after(kernel, jax.random.split(jax.random.key(0), num), draw, 5)
        values = np.column_stack([after["theta"], after["path"]]).astype(np.float64)
        found = np.corrcoef(values[:, 0], values @ average)[0, 1]
        of_correlation = 2 * scipy.stats.norm.sf(abs(np.arctanh(found) - np.arctanh(exact)) * np.sqrt(num - 3))
        return min(1.0, 2 * of_correlation, 2 * mean_p_value(values, mean)), found

    assert p_value(ParticleGibbs)[0] > FALSE_ALARM
    stale, found = p_value(StaleParticleGibbs)
    assert stale < FALSE_ALARM
    assert found < exact - 0.1


@cache
def _switching_p_value(kernel_class, num=25_000, num_steps=6):
    kernel = kernel_class(switching.Switching(), switching.SERIES, 2, "none")
    keys = jax.random.split(jax.random.key(1), num)
    return switching.path_p_value(_after(kernel, keys, switching.draw_path, num_steps))


@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize(
    "wrong", [peers.SortedConditionalSMC, pytest.param(SystematicConditionalSMC, marks=pytest.mark.slow)]
)
def test_free_ancestors_are_not_sorted_before_slot_0_is_overwritten(wrong):
    """`particles`: the first of N sorted ancestors makes way for the reference, and it is always the smallest index."""
    assert _switching_p_value(ConditionalSMC) > FALSE_ALARM
    assert _switching_p_value(wrong) < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_the_reference_keeps_its_weight_where_resampling_is_skipped():
    """SSMProblems#24 asks which weight is right: what it has earned since the last resampling. Ours skips none."""
    assert _switching_p_value(ConditionalSMC) > FALSE_ALARM
    assert _switching_p_value(peers.ForgottenReferenceWeight) < FALSE_ALARM


@pytest.mark.slow
def test_conditional_smc_may_skip_resampling_if_the_reference_keeps_its_weight():
    assert _switching_p_value(peers.AdaptiveConditionalSMC) > FALSE_ALARM


# ---- resampling ----

MILLION = 1_000_000


def _distinct_p_value(indices):
    """Of the number of distinct ancestors of n draws from n equal weights."""
    num = len(indices)  # occupied cells of n balls in n cells: mean n (1 - 1/e), variance n (1/e - 2/e^2)
    z = (len(np.unique(indices)) - num * (1 - np.exp(-1))) / np.sqrt(num * (np.exp(-1) - 2 * np.exp(-2)))
    return float(2 * scipy.stats.norm.sf(abs(z)))


def _with_a_zero(bits):
    """`jax.random.bits` of which one in the middle is zero: in float32 uniforms of [0, 1) that happens by itself."""

    def drawn(key, shape=(), *args, **kwargs):
        values = bits(key, shape, *args, **kwargs)
        return values.at[..., values.shape[-1] // 2].set(0) if values.ndim else values

    return drawn


@pytest.mark.parametrize("name", ["multinomial", pytest.param("iid", marks=pytest.mark.slow)])
def test_a_uniform_of_zero_leaves_a_million_ancestors(name):
    """BlackJAX and cuthbert: -log(0) = inf makes all sorted uniforms 0 or NaN, and one or two particles survive."""
    method, log_weights = getattr(resampling, name), jnp.zeros(MILLION, jnp.float32)
    assert _distinct_p_value(method(0, log_weights, MILLION)) > FALSE_ALARM
    with planted(jax.random, bits=_with_a_zero(jax.random.bits)):
        assert _distinct_p_value(method(0, log_weights, MILLION)) > FALSE_ALARM

    uniforms = jax.random.uniform(jax.random.key(0), (MILLION + 1,), jnp.float32).at[MILLION // 2].set(0.0)
    survivors = peers.exponential_spacings(uniforms, jnp.full(MILLION, 1 / MILLION, jnp.float32))
    assert _distinct_p_value(survivors) < FALSE_ALARM
    assert len(np.unique(survivors)) <= 2


# ---- filters ----

SCALAR = LinearGaussian.scalar(0.8, 0.7, 1.0, 0.8, initial_mean=0.5)
SCALAR_YS = jnp.array([[1.0], [-0.4], [1.3], [0.1]])


class Guess(LinearGaussian):
    """Looks ahead with heavier tails than are right, and off by a factor."""

    def lookahead(self, x_prev, y, t):
        return 1.0 - jnp.sum(jnp.abs(y - 0.5 * x_prev))


def _evidence_p_value(model, ys, **options):
    """Of the filter's evidence having the exact one of a linear Gaussian model as its mean."""

    def log_evidence(key):
        return particle_filter(key, model, ys, num_particles=10, store="none", throw=False, **options).log_evidence

    exact = kalman_filter(model, ys).log_evidence
    return evidence_is_unbiased(0, log_evidence, exact, num_replicates=4_000).p_value


@pytest.mark.usefixtures("compile_fast")
def test_auxiliary_weights_divide_by_the_lookahead_at_the_parent():
    """pfjax: divided by the lookahead at the new particle, and dropped the constant of the first stage."""
    model = Guess.scalar(0.8, 0.7, 1.0, 0.8, initial_mean=0.5)
    p_value = partial(_evidence_p_value, model, SCALAR_YS, lookahead=True, ess_threshold=1.0)
    assert p_value() > FALSE_ALARM
    wrong = {"choose_ancestors": peers.equal_first_stage, "weigh_parts": peers.over_lookahead_at_the_new_particle}
    with planted(online_filter, **wrong):
        assert p_value() < FALSE_ALARM


def _regime_p_value(num=4_000):
    """Zhat times the estimated probability of every last regime has mean Z times the probability."""

    def one_hot(x):
        return jax.nn.one_hot(x["regime"], 3)

    def run(key):
        filtered = particle_filter(
            key, switching.Switching(), jnp.asarray(switching.SERIES), num_particles=10, functional=one_hot
        )
        return jnp.exp(filtered.log_evidence - switching.LOG_EVIDENCE) * filtered.estimates[-1]

    estimates = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), num))
    return mean_p_value(estimates, switching.LAST_REGIME)


@pytest.mark.usefixtures("compile_fast")
def test_regimes_change():
    """dynamax `slds.rbpfilter`: carried the regimes of before, so that none ever changed."""
    assert _regime_p_value() > FALSE_ALARM
    with planted(online_filter, propagate=peers.frozen_regimes):
        assert _regime_p_value() < FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize("method", ["mcmc", pytest.param("exact", marks=pytest.mark.slow)])
def test_the_backward_kernel_moves_from_the_past_to_the_present(method):
    """cuthbert: its sampler by MCMC asked for the density of moving from the present to the past."""
    model = switching.Switching()
    law = jnp.asarray(np.eye(len(switching.REGIMES)))

    def p_value(backward_model, num=4_000):
        def run(key):
            key_filter, key_back = jax.random.split(key)
            options = {"store": "full", "resampling": "multinomial", "ess_threshold": 1.0}
            filtered = particle_filter(
                key_filter, model, switching.SERIES, num_particles=10, functional=lambda x: x["x"], **options
            )
            paths = backward_sample(key_back, backward_model, filtered, 10, method)
            ratio = jnp.exp(filtered.log_evidence - switching.LOG_EVIDENCE)
            return ratio * jnp.mean(law[switching.index_of(paths["regime"])], axis=0)

        frequencies = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), num)))
        is_common = switching.PROBABILITIES > 0.01  # the law of the others is too skewed for a t-test
        return mean_p_value(frequencies[:, is_common], switching.PROBABILITIES[is_common])

    assert p_value(model) > FALSE_ALARM
    assert p_value(peers.Swapped(model)) < FALSE_ALARM


PAIR = LinearGaussian(
    initial_mean=jnp.array([0.5, -0.5]),
    initial_tril=jnp.eye(2),
    transition_matrix=jnp.array([[0.8, 0.3], [0.0, 0.6]]),
    transition_tril=jnp.array([[0.6, 0.0], [0.2, 0.5]]),
    observation_matrix=jnp.eye(2),
    observation_tril=jnp.array([[0.8, 0.0], [0.4, 0.7]]),
)
WITH_GAPS = jnp.array([[jnp.nan, jnp.nan], [1.2, 0.4], [jnp.nan, 1.0], [jnp.nan, jnp.nan], [0.5, jnp.nan]])


@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize(
    "wrong", [peers.missing_taken_as_seen, pytest.param(peers.missing_taken_as_zero, marks=pytest.mark.slow)]
)
def test_what_is_missing_says_nothing(wrong):
    """particles#79: weights of a row that is missing were NaN, and all that followed with them."""
    assert _evidence_p_value(PAIR, WITH_GAPS) > FALSE_ALARM
    with planted(filter_steps, observation_log_prob=wrong):
        assert _evidence_p_value(PAIR, WITH_GAPS) < FALSE_ALARM


# ---- tempering ----


def test_the_next_temperature_has_the_effective_sample_size_asked_for():
    """blackjax#914: the exponent had the wrong sign in the search, which symmetric likelihoods do not show."""
    solve = jax.jit(lambda log_likelihood: next_temperature(log_likelihood, jnp.zeros(()), 0.5))

    def ess_found(log_likelihood, sign):
        temperature = solve(sign * log_likelihood)
        return float(weights.ess(temperature * log_likelihood))

    skewed = -10.0 * jax.random.exponential(jax.random.key(4), (500,)) ** 2
    half = 3.0 * jax.random.normal(jax.random.key(5), (250,))
    symmetric = jnp.concatenate([half, -half])
    assert abs(ess_found(skewed, 1.0) - 250.0) < 1.0
    assert abs(ess_found(symmetric, 1.0) - 250.0) < 1.0
    assert abs(ess_found(symmetric, -1.0) - 250.0) < 1.0  # hidden
    assert abs(ess_found(skewed, -1.0) - 250.0) > 100.0


# ---- the compiler ----


def test_the_compiler_adds_products_up_rightly():
    """jax#39103: jaxlib 0.10.2 is wrong from row 16,384 on in float64, and from row 32,768 on in float32."""
    rows = jax.random.normal(jax.random.key(0), (40_000, 3))
    matrix = jnp.array([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.7]])
    found = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    rows, matrix = np.asarray(rows, np.float64), np.asarray(matrix, np.float64)
    rounding = 10.0 * float(jnp.finfo(found.dtype).eps) * np.sum((abs(rows) @ abs(matrix).T) ** 2, 1)
    assert np.all(abs(found - np.sum((rows @ matrix.T) ** 2, 1)) <= rounding)


def test_a_compiler_that_is_known_to_be_wrong_is_named(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    compiler.warn_of_wrong_sums()  # this one is right, or the test above fails
    monkeypatch.setattr("jaxlib.__version__", "0.10.2")
    with pytest.warns(RuntimeWarning, match=r"jaxlib 0\.10\.2 .*39103.*install another.*=-reduce before"):
        compiler.warn_of_wrong_sums()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-reduce")
    compiler.warn_of_wrong_sums()
