"""The driver: what it keeps, how it resumes, what it says when a run fails."""

import _thread
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import bayesinf as bi
from bayesinf.diagnostics import Moments
from bayesinf.errors import CheckpointError, InitializationError, SamplingError, SamplingWarning


def skewed(x):
    """Log of a gamma(3) variable and a normal whose mean depends on it: asymmetric and correlated."""
    return 3.0 * x["a"] - jnp.exp(x["a"]) - 0.5 * jnp.sum((x["b"] - x["a"]) ** 2)


TARGET = bi.Target(skewed)
KERNEL = bi.kernels.MALA(TARGET, step_size=0.3)
INITIAL = {"a": jnp.array([0.0, 0.5, 1.0]), "b": jnp.zeros((3, 2))}


def run(**options):
    options = {"num_samples": 50, "num_warmup": 30, "progress": False, **options}
    return bi.sample(7, options.pop("kernel", KERNEL), options.pop("initial", INITIAL), **options)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def whole():
    return run()


def test_shapes_and_statistics(whole):
    assert whole["a"].shape == (3, 50)
    assert whole["b"].shape == (3, 50, 2)
    assert whole.stats["acceptance_rate"].shape == (3, 50)
    assert whole.stats["num_gradients"].sum() == 150
    assert whole.status == "complete"
    assert np.allclose(
        whole.stats["logdensity"][1, 3], skewed({"a": whole["a"][1, 3], "b": whole["b"][1, 3]}), rtol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64])
def test_chunks_do_not_change_the_draws(whole, chunk_size):
    assert same(whole.samples, run(chunk_size=chunk_size).samples)


def test_thinning_keeps_every_third_draw():
    assert same(run(num_samples=10, thin=3)["b"], run(num_samples=30)["b"][:, 2::3])


def test_statistics_of_thinned_draws_cover_all_steps():
    thinned, every = run(num_samples=10, thin=3), run(num_samples=30)
    assert np.array_equal(thinned.stats["num_gradients"], np.full((3, 10), 3))
    expected = every.stats["acceptance_rate"].reshape(3, 10, 3).mean(axis=2)
    assert np.allclose(thinned.stats["acceptance_rate"], expected, atol=1e-6)


@pytest.mark.parametrize("chain_method", ["parallel", "sequential"])
def test_chain_methods_agree_to_rounding(whole, chain_method):
    draws = run(chain_method=chain_method, num_warmup=0, num_samples=5)
    assert np.allclose(draws["b"], run(num_warmup=0, num_samples=5)["b"], atol=1e-5)


@pytest.mark.parametrize("chain_method", ["parallel", "sequential"])
def test_many_chains_in_shares_agree_to_rounding(chain_method):
    initial = jax.tree.map(lambda leaf: jnp.repeat(leaf, 13, axis=0), INITIAL)  # 39 chains: no multiple of the threads
    options = {"initial": initial, "num_warmup": 0, "num_samples": 5}
    shared = run(chain_method=chain_method, **options)
    assert np.allclose(shared["b"], run(**options)["b"], atol=1e-5)


def test_chains_do_not_depend_on_how_many_there_are():
    one = run(initial=jax.tree.map(lambda leaf: leaf[:1], INITIAL), num_warmup=0, num_samples=5)
    assert np.allclose(one["b"][0], run(num_warmup=0, num_samples=5)["b"][0], atol=1e-5)


def test_new_data_and_step_size_compile_nothing():
    traces = itertools.count()  # a list would be read as a part of the function

    def logdensity(x, data):
        next(traces)
        return -0.5 * jnp.sum((x - data) ** 2)

    def go(data, step_size, num_samples):
        kernel = bi.kernels.MALA(bi.Target(logdensity, data), step_size)
        return bi.sample(0, kernel, jnp.zeros((2, 3)), num_samples=num_samples, num_warmup=10, progress=False)

    go(jnp.zeros(3), 0.1, 20)
    num_traces = next(traces)
    go(jnp.ones(3), 0.2, 35)
    assert next(traces) == num_traces + 1


def test_warmup_reaches_the_target_acceptance():
    """From a step size a hundred times too small, where every proposal is accepted."""
    kernel = bi.kernels.MALA(TARGET, step_size=0.003)
    initial = jax.tree.map(lambda leaf: jnp.repeat(leaf, 8, axis=0), INITIAL)
    draws = run(kernel=kernel, initial=initial, num_warmup=1_000, num_samples=500)
    assert abs(draws.stats["acceptance_rate"].mean() - 0.574) < 0.05
    assert draws.tuned.step_size.shape == (24,)


def test_without_warmup_the_step_size_stays():
    assert run(num_warmup=0).tuned is None


class Stop(Exception):
    pass


def stop_after(monkeypatch, num_chunks, error):
    """Makes the run fail with `error` when its chunk number `num_chunks` has been computed but not taken in."""
    from bayesinf.sampling import _Run

    take, seen = _Run.take, []

    def counted(self, *args, **kwargs):
        seen.append(None)
        if len(seen) > num_chunks:
            raise error
        return take(self, *args, **kwargs)

    monkeypatch.setattr(_Run, "take", counted)


@pytest.mark.parametrize("num_chunks", [1, 4, 7])
def test_resume_is_bitwise(tmp_path, monkeypatch, whole, num_chunks):
    with monkeypatch.context() as patch:
        stop_after(patch, num_chunks, Stop())
        with pytest.raises(Stop):
            run(checkpoint=tmp_path, chunk_size=10)
    resumed = run(checkpoint=tmp_path, chunk_size=13)
    assert same(whole.samples, resumed.samples)
    assert same(whole.stats, resumed.stats)
    assert same(whole.final_state, resumed.final_state)


def test_a_finished_run_is_extended(tmp_path):
    run(checkpoint=tmp_path, num_samples=20)
    assert same(run(checkpoint=tmp_path, num_samples=50).samples, run().samples)


def shifted(by):
    return bi.Target(lambda x: skewed({"a": x["a"] - by, "b": x["b"]}))


def powered(power):
    return bi.Target(lambda x: skewed(x) - x["a"] ** power)


ONE = jnp.ones(())
BAOAB = bi.kernels.Splitting("BAOAB", TARGET, 0.1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"kernel": bi.kernels.MALA(TARGET, step_size=0.31)}),
        ({}, {"initial": jax.tree.map(lambda leaf: leaf + 0.1, INITIAL)}),
        ({}, {"thin": 2}),
        ({}, {"num_warmup": 31}),
        ({}, {"constrain": lambda x: jax.tree.map(jnp.exp, x)}),
        ({}, {"collect": lambda state: state.position["a"]}),
        ({}, {"reducers": [Moments()]}),
        ({"kernel": bi.kernels.MALA(shifted(0.0), 0.3)}, {"kernel": bi.kernels.MALA(shifted(1.0), 0.3)}),
        ({"kernel": bi.kernels.MALA(shifted(ONE), 0.3)}, {"kernel": bi.kernels.MALA(shifted(2 * ONE), 0.3)}),
        ({"kernel": bi.kernels.MALA(powered(2), 0.3)}, {"kernel": bi.kernels.MALA(powered(4), 0.3)}),
        ({"kernel": BAOAB}, {"kernel": bi.kernels.Splitting("OBABO", TARGET, 0.1)}),
        ({"kernel": bi.kernels.Repeat(BAOAB, 2)}, {"kernel": bi.kernels.Repeat(BAOAB, 3)}),
    ],
)  # fmt: skip
def test_checkpoint_of_another_run_is_refused(tmp_path, first, second):
    run(checkpoint=tmp_path, **first)
    with pytest.raises(CheckpointError, match="another run"):
        run(checkpoint=tmp_path, **second)


def test_checkpoint_with_more_draws_is_refused(tmp_path):
    run(checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="more than num_samples"):
        run(checkpoint=tmp_path, num_samples=10)


def test_functions_written_anew_are_the_same_run(tmp_path):
    """As in a notebook run again, or a script started a second time."""
    options = {"checkpoint": tmp_path, "num_samples": 20}
    run(kernel=bi.kernels.MALA(shifted(0.5), 0.3), constrain=lambda x: x, **options)
    again = run(kernel=bi.kernels.MALA(shifted(0.5), 0.3), constrain=lambda x: x, **(options | {"num_samples": 30}))
    assert again.num_samples == 30


def test_damaged_checkpoint_is_named(tmp_path):
    run(checkpoint=tmp_path)
    (tmp_path / "state.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(CheckpointError, match=r"state\.npz"):
        run(checkpoint=tmp_path)


def test_interrupt_returns_what_exists(monkeypatch, whole):
    stop_after(monkeypatch, 5, KeyboardInterrupt())
    draws = run(chunk_size=10)  # three chunks of warm-up, two of draws
    assert draws.status == "interrupted"
    assert same(draws["b"], whole["b"][:, :20])


def test_a_real_signal_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    is_over = threading.Event()

    def interrupt():
        while not is_over.wait(4.0):  # again and again: Python drops a signal that comes in the middle of a callback
            _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        draws = run(num_samples=50_000_000)
    finally:
        is_over.set()
        signal.signal(signal.SIGINT, before)
    assert draws.status == "interrupted"
    assert 0 < draws.num_samples < 50_000_000


def test_reducers_without_draws(whole):
    draws = run(collect=lambda state: state.position, reducers=(Moments(),))
    mean, variance = draws.reduced[0]
    assert np.allclose(mean["b"], draws["b"].mean(axis=1), atol=1e-5)
    assert np.allclose(variance["b"], draws["b"].var(axis=1, ddof=1), rtol=1e-4)
    nothing = run(collect=lambda state: None)
    assert nothing.variables == {}
    assert nothing.num_samples == 50


def test_mesh_gives_the_same_draws(whole):
    mesh = jax.make_mesh((1,), ("chains",), axis_types=(jax.sharding.AxisType.Auto,))
    assert same(whole.samples, run(mesh=mesh).samples)


def test_chains_are_spread_over_devices():
    """On two of them, made of one processor: the same draws, bit for bit, and no talk between the devices."""
    script = (
        "import jax, jax.numpy as jnp, numpy as np, bayesinf as bi\n"
        "mesh = jax.make_mesh((2,), ('chains',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.5)\n"
        "run = lambda c, mesh: bi.sample(\n"
        "    0, kernel, jnp.ones((c, 3)), num_samples=20, num_warmup=20, progress=False, mesh=mesh)\n"
        "spread, whole = run(4, mesh), run(4, None)\n"
        "print(len(spread.final_state.position.sharding.device_set), np.array_equal(spread['x'], whole['x']))\n"
        "try:\n"
        "    run(3, mesh)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", script], env=os.environ | flags, capture_output=True, text=True)
    assert output.stdout.startswith("2 True"), output.stderr
    assert "3 chains are not a multiple of the 2 devices along its axis 'chains'" in output.stdout


def test_blackjax_kernels_run_here():
    algorithm = blackjax.rmh(lambda x: -0.5 * jnp.sum(x**2), blackjax.mcmc.random_walk.normal(jnp.ones(2)))
    draws = bi.sample(0, algorithm, jnp.zeros((2, 2)), num_samples=200, progress=False)
    assert draws["x"].shape == (2, 200, 2)
    assert 0.2 < draws.stats["acceptance_rate"].mean() < 0.9


def test_progress_shows_phase_acceptance_and_r_hat(capsys):
    run(progress=True, chunk_size=20)
    shown = capsys.readouterr().err
    assert "acceptance=" in shown
    assert "R-hat=" in shown
    assert "step/s" in shown


# what is refused before the run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": -1}, "num_samples must be at least 0"),
        ({"num_samples": 2.5}, "num_samples must be a whole number"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"thin": 0}, "thin must be at least 1"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chain_method": "pmap"}, "chain_method must be one of 'auto', 'vectorized'"),
        ({"kernel": object()}, "kernel must be an object with init"),
        ({"kernel": bi.kernels.MALA}, "kernel must be an object with init.*got MALA"),
        ({"initial": {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}}, "initial must have one leading axis of chains"),
        ({"initial": {"a": jnp.zeros(()), "b": jnp.zeros(2)}}, "initial must have one leading axis of chains"),
        ({"initial": {"a": jnp.zeros(0), "b": jnp.zeros((0, 2))}}, "at least one chain"),
        ({"initial": {"a": jnp.zeros(3, int), "b": jnp.zeros((3, 2))}}, r"initial\['a'\] must be floating point"),
        ({"initial": {}}, "initial must hold at least one array"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize("key", [0.5, -1, 2**32, "0", None, True])
@pytest.mark.usefixtures("unchecked")
def test_bad_keys_are_named(key):
    with pytest.raises(ValueError, match="key"):
        bi.sample(key, KERNEL, INITIAL, num_samples=1, progress=False)


def test_all_forms_of_a_key_agree():
    typed = bi.sample(jax.random.key(7), KERNEL, INITIAL, num_samples=5, progress=False)
    raw = bi.sample(jax.random.PRNGKey(7), KERNEL, INITIAL, num_samples=5, progress=False)
    assert same(typed.samples, raw.samples)
    assert same(typed.samples, run(num_warmup=0, num_samples=5).samples)


def test_a_warmup_that_leaves_no_step_size_is_told_of():
    class Vanishing(bi.adaptation.StepSize):
        def update(self, state, step, position, info):
            return state._replace(step_size=jnp.where(step == 9, 0.0, state.step_size))

    options = {"num_samples": 100, "num_warmup": 10, "warmup": Vanishing(10, 0.5), "progress": False}
    with pytest.raises(SamplingError, match=r"warm-up left chains \[0, 1\] with a step size of 0"):
        bi.sample(0, bi.kernels.MALA(bi.Target(lambda x: -0.5 * x @ x), 0.1), jnp.zeros((2, 3)), **options)


def test_a_forgotten_axis_of_chains_shows_in_the_error():
    with pytest.raises(ValueError, match="matmul") as caught:
        bi.sample(0, bi.kernels.MALA(bi.Target(lambda x: -0.5 * x @ x), 0.1), jnp.zeros(5), num_samples=1)
    assert "taken for 5 chains, each at a position of shape ()" in caught.value.__notes__[-1]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_starting_point_is_named(value):
    with pytest.raises(InitializationError, match="chain 1 starts where"):
        run(initial={**INITIAL, "a": jnp.array([0.0, value, 1.0])})


# what is counted inside and raised once


def broken_beyond(x):
    """A standard normal whose log density is NaN beyond 1.5."""
    return jnp.where(jnp.all(x < 1.5), -0.5 * jnp.sum(x**2), jnp.nan)


def test_divergences_warn_once_with_their_share():
    kernel = bi.kernels.MALA(bi.Target(broken_beyond), step_size=0.5)
    with pytest.warns(SamplingWarning, match=r"draws \(.*%\) met") as caught:
        draws = bi.sample(0, kernel, jnp.zeros((2, 1)), num_samples=300, progress=False)
    assert len(caught) == 1
    assert np.all(np.isfinite(draws["x"]))
    assert np.all(draws["x"] < 1.5)


def test_a_lost_chain_raises_with_the_draws_attached():
    """Every move of the second chain fails; the first is fine."""
    target = bi.Target(lambda x: jnp.where((x[0] == 50.0) | (x[0] < 10.0), -0.5 * jnp.sum((x / 10.0) ** 2), jnp.nan))
    kernel = bi.kernels.MALA(target, step_size=0.01)
    initial = jnp.array([[0.0], [50.0]])
    with pytest.raises(SamplingError, match=r"chains \[1\] diverged at every one") as caught:
        bi.sample(0, kernel, initial, num_samples=500, chunk_size=200, progress=False)
    assert caught.value.draws.num_samples == 200
    quiet = bi.sample(0, kernel, initial, num_samples=500, chunk_size=200, progress=False, throw=False)
    assert "diverged" in quiet.status


def test_a_stuck_chain_raises():
    target = bi.Target(lambda x: jnp.where(x[0] == 50.0, 0.0, -jnp.inf))
    with pytest.raises(SamplingError, match="never moved"):
        bi.sample(0, bi.kernels.MALA(target, 0.01), jnp.array([[50.0]]), num_samples=200, progress=False)


@pytest.mark.parametrize("far", [False, True])
def test_moves_too_small_for_the_precision_are_none(far):
    centre, step_size = (1e8, 0.5) if far else (0.0, 1e-20)
    target = bi.Target(lambda x, centre: -0.5 * jnp.sum((x - centre) ** 2), jnp.asarray(centre, jnp.float32))
    start = jnp.full((2, 3), centre + 1.0, jnp.float32)
    with pytest.raises(SamplingError, match=r"chains \[0, 1\] never moved .*too small for the precision"):
        bi.sample(0, bi.kernels.MALA(target, step_size), start, num_samples=200, progress=False)


def test_a_log_density_that_is_rounded_is_warned_of():
    target = bi.Target(lambda x: jnp.float32(-1e7) - 0.5 * jnp.sum(x**2))
    with pytest.warns(SamplingWarning, match=r"-1e\+07 at the start, which float32 rounds to multiples of 1"):
        bi.sample(0, bi.kernels.MALA(target, 0.5), jnp.zeros((2, 2), jnp.float32), num_samples=5, progress=False)


def test_positions_may_be_empty_in_part():
    target = bi.Target(lambda x: -0.5 * jnp.sum(x["a"] ** 2) - jnp.sum(x["none"]))
    start = {"a": jnp.zeros((2, 1)), "none": jnp.zeros((2, 0))}
    draws = bi.sample(0, bi.kernels.MALA(target, 0.5), start, num_samples=5, progress=False)
    assert draws["none"].shape == (2, 5, 0)


def test_keys_of_another_generator_are_resumed(tmp_path):
    key = jax.random.key(0, impl="rbg")
    run = functools.partial(bi.sample, key, KERNEL, INITIAL, progress=False)
    run(num_samples=5, checkpoint=tmp_path)
    assert same(run(num_samples=10, checkpoint=tmp_path).samples, run(num_samples=10).samples)


def test_sample_is_not_for_traces():
    with pytest.raises(ValueError, match=r"cannot itself be under jax\.jit"):
        jax.jit(lambda x: bi.sample(0, KERNEL, x, num_samples=5))(INITIAL)


def test_paths_of_whole_numbers_are_sampled():
    class Switching(bi.models.StateSpaceModel):
        def initial(self):
            return dist.Bernoulli(0.5)

        def transition(self, x_prev, t):
            return dist.Bernoulli(jnp.where(x_prev == 1, 0.9, 0.2))

        def observation(self, x, t):
            return dist.Normal(2.0 * x, 1.0)

    kernel = bi.kernels.ConditionalSMC(Switching(), jnp.array([2.0, 1.8, 0.1]), 10)
    draws = bi.sample(0, kernel, kernel.initial(1, 2), num_samples=50, progress=False)
    assert draws["x"].shape == (2, 50, 3)
    assert set(np.unique(draws["x"])) <= {0, 1}


def test_files_are_no_folders(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="checkpoint must be a folder"):
        run(checkpoint=file)
    with pytest.raises(ValueError, match="store must be a folder"):
        run(store=file)


def test_invalid_weights_of_all_steps_are_counted():
    class Sometimes(bi.models.StochasticVolatility):
        def observation(self, x, t):
            return None, lambda y: jnp.where(x > 0, jnp.nan, -0.5 * (y - x) ** 2)

    kernel = bi.kernels.ConditionalSMC(Sometimes(0.0, 0.5, 1.0), jnp.zeros(4), 10)
    run = functools.partial(bi.sample, 0, kernel, jnp.full((1, 4), -0.5), progress=False)
    with pytest.warns(SamplingWarning, match="particle weights were NaN"):
        every, thinned = run(num_samples=20), run(num_samples=5, thin=4)
    assert thinned.stats["num_invalid"].sum() == every.stats["num_invalid"].sum() > 20


def test_a_chain_that_stood_still_in_a_short_run_is_warned_of():
    target = bi.Target(lambda x: jnp.where(x[0] == 50.0, 0.0, -jnp.inf))
    with pytest.warns(SamplingWarning, match=r"chains \[0\] never moved in 30 steps"):
        bi.sample(0, bi.kernels.MALA(target, 0.01), jnp.array([[50.0]]), num_samples=30, progress=False)


def test_names_that_collide_are_told():
    kernel = bi.kernels.MALA(bi.Target(lambda x: -(x["a"]["b"] ** 2) - x["a.b"] ** 2), 0.1)
    with pytest.raises(ValueError, match=r"two values are called 'a\.b'"):
        bi.sample(0, kernel, {"a": {"b": jnp.zeros(2)}, "a.b": jnp.zeros(2)}, num_samples=5, progress=False)


def test_no_samples_is_an_answer():
    draws = run(num_samples=0)
    assert draws["b"].shape == (3, 0, 2)


def test_quiet_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_the_identity_of_a_run_is_the_same_in_every_process(tmp_path):
    """Sets are ordered by the hashes of strings, which differ from process to process; a program must not be."""
    script = (
        "import jax.numpy as jnp, bayesinf as bi\n"
        "target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))\n"
        "kernel = bi.kernels.Cycle([bi.kernels.MALT(target, 0.1), bi.kernels.NUTS(target, 0.1, max_num_doublings=2)])\n"
        f"folder = {str(tmp_path)!r}\n"
        "draws = bi.sample(0, kernel, jnp.zeros((2, 3)), num_samples=5, checkpoint=folder, progress=False)\n"
        "print(draws['x'].sum())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert [output.returncode for output in outputs] == [0, 0], outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"warmup": 100}, "warmup must be a Warmup"),
        ({"warmup": bi.adaptation.StepSize(1000, 0.5)}, "for num_warmup=30 steps, it is for 1000"),
        ({"warmup": bi.adaptation.Window(30)}, r"needs a kernel with a metric, and MALA has none"),
        (
            {"warmup": bi.adaptation.StepSize(30, 0.5), "kernel": bi.kernels.LMC(bi.Target(jnp.sum), 0.1)},
            "tunes by the acceptance rate, and LMC has no target_acceptance",
        ),
        ({"reducers": "abc"}, "reducers must be a list"),
        ({"reducers": Moments()}, "reducers must be a list"),
        ({"constrain": 3}, "constrain must be a function"),
        ({"kernel": bi.kernels.MALA}, "got MALA"),
        ({"mesh": 2}, "mesh must be a jax.sharding.Mesh"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        run(**options)


def test_a_list_of_positions_is_an_array():
    kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.5)
    draws = bi.sample(0, kernel, [[0.0, 1.0], [1.0, 2.0], [3.0, 0.5]], num_samples=3, progress=False)
    assert draws["x"].shape == (3, 3, 2)


def test_a_chain_that_blows_up_again_and_again_is_a_failure():
    kernel = bi.kernels.LMC(bi.Target(lambda x: -jnp.sum(x**4)), 1.0)
    with pytest.raises(SamplingError, match="diverged at"):
        bi.sample(0, kernel, jnp.full((2, 3), 2.0), num_samples=200, progress=False)


def test_what_is_not_finite_is_named():
    def constrain(x):
        return {"fine": x, "broken": jnp.where(x > 0, jnp.inf, x)}

    kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * x**2), 0.5)
    with pytest.raises(SamplingError, match=r"draws of .broken. of chains .* are not finite"):
        bi.sample(0, kernel, jnp.zeros(2), num_samples=100, constrain=constrain, progress=False)
