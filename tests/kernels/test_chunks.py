"""Long runs in chunks: the numbers are those of one loop, and Ctrl-C returns what exists."""

import _thread
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from ppg_models import TOTALS, Scalar, problem

from bayesinf import errors
from bayesinf.kernels import chunks, iterated_filtering, paris, ppg, ppg_replicates, score_ascent, score_climbing
from bayesinf.kernels import smc_squared as run_smc_squared
from bayesinf.kernels.chunks import iterate
from bayesinf.models import LinearGaussian, simulate

pytestmark = pytest.mark.usefixtures("compile_fast")


def add_noise(fixed, state, key, i):
    state = state + fixed * jax.random.normal(key) + i
    return state, {"state": state, "pair": (i, jnp.stack([state, -state]))}


def by_hand(num):
    state, rows = jnp.zeros(()), []
    for i in range(num):
        state, row = add_noise(jnp.ones(()), state, jax.random.fold_in(jax.random.key(0), i), i + 1)
        rows.append(row)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def run(num=40, progress=False):
    return iterate(add_noise, jnp.ones(()), jnp.zeros(()), jax.random.key(0), num, progress)


@pytest.mark.parametrize(("capacity", "seconds"), [(256, 0.5), (7, 100.0), (1, 0.0)])
def test_chunks_of_any_size_are_one_loop(monkeypatch, capacity, seconds):
    monkeypatch.setattr(chunks, "_MAX_ROWS", capacity)
    monkeypatch.setattr(chunks, "_SECONDS", seconds)
    for found in (run(), jax.jit(run, static_argnums=0)(40)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, by_hand(40))


def test_other_numbers_of_iterations_compile_nothing():
    traced = []

    def body(fixed, state, key, i):
        traced.append(1)
        return state + 1.0, state

    for num in (5, 37, 41):
        state, kept = iterate(body, (), jnp.zeros(()), jax.random.key(0), num, False)
        assert float(state) == num
        np.testing.assert_array_equal(kept, np.arange(num))
    assert len(traced) == 1


def stop_after(monkeypatch, module, name, num):
    """The user's Ctrl-C in call number num + 1."""
    right, calls = getattr(module, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > num:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(module, name, interrupted)


def test_interrupted_before_the_first_chunk_there_is_nothing_to_return(monkeypatch):
    stop_after(monkeypatch, chunks, "_run_chunk", 0)
    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize("progress", [False, True])
def test_interrupted_it_returns_what_exists(monkeypatch, progress):
    monkeypatch.setattr(chunks, "_MAX_ROWS", 5)
    stop_after(monkeypatch, chunks, "_run_chunk", 3)
    with pytest.warns(errors.SamplingWarning, match=r"interrupted after \d+ of 40 iterations"):
        state, kept = run(progress=progress)
    num = len(kept["state"])
    assert 3 <= num <= 15
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (state, kept), by_hand(num))


def test_a_real_signal_ends_a_run_without_a_bar():
    """Of some minutes, within seconds."""

    def work(fixed, state, key, i):
        return jax.lax.fori_loop(0, 20_000, lambda _, x: jnp.sin(x) + 1.0, state), i

    iterate(work, (), jnp.zeros(()), jax.random.key(0), 2, False)  # compiled
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(1.0, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    try:
        with pytest.warns(errors.SamplingWarning, match="interrupted after"):
            _, kept = iterate(work, (), jnp.zeros(()), jax.random.key(0), 1_000_000, False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < len(kept) < 1_000_000


# ---- the drivers ----

MODEL, YS, _ = problem("OW", 20)


def build(theta):
    return Scalar(theta[0], jnp.exp(theta[1]), 1.0, jnp.exp(theta[2]), 1.0)


THETA = jnp.asarray([0.5, 0.0, 0.0])
DRIVERS = {
    "paris": lambda progress: paris(0, MODEL, YS, TOTALS, num_particles=8, progress=progress),
    "ppg": lambda progress: ppg(0, MODEL, YS, TOTALS, num_particles=8, num_sweeps=12, burn_in=4, progress=progress),
    "ppg_replicates": lambda progress: ppg_replicates(
        0, MODEL, YS, TOTALS, num_replicates=6, num_particles=8, num_sweeps=4, burn_in=1, progress=progress
    ),
}


@pytest.mark.parametrize("name", DRIVERS)
def test_progress_changes_nothing(capsys, name):
    quiet = DRIVERS[name](False)
    assert capsys.readouterr().err == ""
    shown = DRIVERS[name](True)
    assert "100%" in capsys.readouterr().err
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), quiet, shown)


@pytest.mark.parametrize("name", DRIVERS)
def test_an_interrupted_run_has_the_first_rows_of_the_whole(monkeypatch, name):
    whole = DRIVERS[name](False)
    monkeypatch.setattr(chunks, "_MAX_ROWS", 2)
    stop_after(monkeypatch, chunks, "_run_chunk", 2)
    with pytest.warns(errors.SamplingWarning, match="interrupted after"):
        found = DRIVERS[name](True)
    rows = {"paris": "estimates", "ppg": "estimates", "ppg_replicates": "replicates"}[name]
    some, all_of_them = getattr(found, rows), getattr(whole, rows)
    assert 2 <= len(some) < len(all_of_them)
    np.testing.assert_allclose(some, all_of_them[: len(some)], rtol=1e-3, atol=1e-3)
    if name == "paris":
        np.testing.assert_array_equal(found.estimate, some[-1])
        assert found.ess.shape == found.is_resampled.shape == (len(some),)
    if name == "ppg":  # the burn-in of four is not over
        assert np.all(np.isnan(found.estimate))


def test_a_shown_series_of_one_row():
    alone = paris(0, MODEL, YS[:1], TOTALS, num_particles=8, progress=True)
    np.testing.assert_array_equal(alone.estimates, paris(0, MODEL, YS[:1], TOTALS, num_particles=8).estimates)


LEARNERS = {
    "score_ascent": lambda: score_ascent(
        0, build, THETA, YS, optimizer=optax.sgd(0.01), num_particles=4, num_iterations=30, estimator="gibbs"
    ),
    "iterated_filtering": lambda: iterated_filtering(
        0, build, THETA, YS, num_particles=8, num_iterations=30, perturbation=0.02
    ),
    "score_climbing": lambda: score_climbing(
        0, lambda p: dist.Normal(p, 1.0), jnp.zeros(()), lambda z: -0.5 * (z - 3.0) ** 2,
        optimizer=optax.sgd(0.01), num_particles=4, num_iterations=30,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_learning_that_is_interrupted_without_a_bar_returns_what_exists(monkeypatch, name):
    whole = LEARNERS[name]()
    monkeypatch.setattr(chunks, "_MAX_ROWS", 3)
    stop_after(monkeypatch, chunks, "_run_chunk", 3)
    with pytest.warns(errors.SamplingWarning, match="interrupted after"):
        found = LEARNERS[name]()
    num = len(found.log_evidence)
    assert 3 <= num <= 9
    np.testing.assert_allclose(found.log_evidence, whole.log_evidence[:num], rtol=1e-3, atol=1e-3)


# ---- SMC^2 ----


def by_name(theta):
    return LinearGaussian.scalar(0.9, theta["scale"])


_, SERIES = simulate(0, by_name({"scale": 0.5}), num_steps=8)


def smc(ys=SERIES, **options):
    options = {"num_parameters": 12, "num_particles": 4, "ess_threshold": 1.0, "num_moves": 1} | options
    return run_smc_squared(1, by_name, {"scale": dist.HalfNormal(1.0)}, ys, **options)


@pytest.mark.parametrize("options", [{}, {"max_particles": 8, "least_acceptance": 0.9}])
def test_progress_of_smc_squared_changes_nothing(capsys, options):
    quiet = smc(**options)
    shown = smc(progress=True, **options)
    assert "100%" in capsys.readouterr().err
    keyless = (found._replace(filters=found.filters._replace(key=None)) for found in (quiet, shown))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *keyless)
    assert int(shown.num_state_particles[-1]) == options.get("max_particles", 4)


def test_smc_squared_that_is_interrupted_has_the_posterior_so_far(monkeypatch):
    """That of the shorter series, before its last resampling, which is not done."""
    shorter = smc(SERIES[:4], ess_threshold=0.0)
    stop_after(monkeypatch, sys.modules[run_smc_squared.__module__], "advance", 3)
    with pytest.warns(errors.SamplingWarning, match="interrupted after 4 of 8 observations"):
        found = smc(progress=True, ess_threshold=0.0)
    for name in ("log_weights", "log_evidence", "log_evidence_increments", "ess", "acceptance_rates", "num_invalid"):
        np.testing.assert_allclose(getattr(found, name), getattr(shorter, name), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.log_evidence_variance, shorter.log_evidence_variance, rtol=1e-4)
    np.testing.assert_allclose(found.particles["scale"], shorter.particles["scale"], rtol=1e-5)
