"""Warm-up of several chains together: what it finds, and that chunks, resumption and devices do not change it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf.adaptation import StepSize, Window
from bayesinf.conformance import FALSE_ALARM
from bayesinf.errors import CheckpointError
from bayesinf.pooling import geometric_mean, merge_welford

NUM_CHAINS, DIM = 16, 20
SCALES = jnp.geomspace(1.0, 100.0, DIM)
TARGET = bi.Target(lambda x, scales: -0.5 * jnp.sum((x / scales) ** 2), SCALES)
INITIAL = SCALES * jax.random.normal(jax.random.key(5), (NUM_CHAINS, DIM))
INFO = bi.Info(jnp.array(0.8), jnp.array(True), jnp.array(False), jnp.array(1, jnp.int32))


def learn(is_dense, is_pooled, num_warmup=150):
    """The metrics of chains whose positions are independent draws, and how many of them the window held."""
    warmup = Window(num_warmup, is_dense=is_dense, is_pooled=is_pooled)
    kernel = bi.kernels.NUTS(TARGET, 1.0)
    states = jax.vmap(lambda x: warmup.init(kernel, x))(INITIAL)
    update = jax.jit(jax.vmap(lambda state, t, x: warmup.update(state, t, x, INFO), in_axes=(0, None, 0)))
    for t in range(num_warmup):
        x = SCALES * jax.random.normal(jax.random.key(t), (NUM_CHAINS, DIM))
        states = update(states, jnp.asarray(t), x)
        if t + 1 in warmup.pooling_steps():
            states = jax.tree.map(jnp.asarray, warmup.pool(states, t + 1))
    return np.asarray(states.inverse_mass_matrix, np.float64), int(warmup.windows.ends[0] - warmup.windows.first + 1)


@pytest.mark.parametrize("is_dense", [False, True])
def test_pooled_metric_has_the_law_of_all_draws_together(is_dense):
    """Of N independent normals, (N - 1) S / sigma^2 is chi-squared with N - 1 degrees of freedom; pooled, N is 16 n."""
    p_values = []
    for is_pooled in (False, True):
        metrics, num = learn(is_dense, is_pooled)
        variances = np.diagonal(metrics, axis1=-2, axis2=-1) if is_dense else metrics
        size = num * NUM_CHAINS if is_pooled else num
        if is_pooled:
            assert np.all(variances == variances[0])
            variances = variances[:1]
        unshrunk = (variances - 1e-3 * 5 / (size + 5)) * (size + 5) / size
        p_values.append(scipy.stats.kstest(((size - 1) * unshrunk / SCALES**2).ravel(), "chi2", (size - 1,)).pvalue)
    assert min(p_values) > FALSE_ALARM


def test_chains_that_agree_tune_the_step_size_as_one_alone():
    """Over the whole schedule, where the averaging begins anew at the end of a window too."""
    pooled, alone = Window(150, is_pooled=True), Window(150)
    kernel = bi.kernels.NUTS(TARGET, 1.0)
    together = jax.vmap(lambda x: pooled.init(kernel, x))(jnp.zeros((2, DIM)))
    single = alone.init(kernel, jnp.zeros(DIM))
    update = jax.jit(jax.vmap(pooled.update, in_axes=(0, None, None, None)))
    rates = np.random.default_rng(0).beta(8, 2, size=150)
    for t in range(150):
        x, info = jax.random.normal(jax.random.key(t), (DIM,)), INFO._replace(acceptance_rate=jnp.asarray(rates[t]))
        together, single = update(together, jnp.asarray(t), x, info), alone.update(single, jnp.asarray(t), x, info)
        if t + 1 in pooled.pooling_steps():
            together = jax.tree.map(jnp.asarray, pooled.pool(together, t + 1))
        np.testing.assert_allclose(together.step_size, jnp.full(2, single.step_size), rtol=1e-4)


def test_merged_welford_is_that_of_the_union():
    """Of samples of different sizes and means."""
    from blackjax.adaptation.mass_matrix import welford_algorithm

    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(n, 3)) + 10 * n for n in (4, 7, 2)]
    for is_diagonal in (True, False):
        init, update, final = welford_algorithm(is_diagonal)
        states = []
        for sample in samples:
            state = init(3)
            for row in sample:
                state = update(state, jnp.asarray(row))
            states.append(jax.tree.map(jnp.asarray, state))
        covariance, size, mean = final(merge_welford(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)))
        union = np.concatenate(samples)
        expected = np.cov(union.T)
        np.testing.assert_allclose(covariance, np.diagonal(expected) if is_diagonal else expected, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(mean, union.mean(axis=0), rtol=1e-5)
        assert size == 13


def test_chains_that_stand_still_are_left_out():
    from blackjax.adaptation.mass_matrix import welford_algorithm

    init, update, _ = welford_algorithm(True)

    def learn(rows):
        state = init(2)
        for row in rows:
            state = update(state, jnp.asarray(row))
        return jax.tree.map(jnp.asarray, state)

    rng = np.random.default_rng(0)
    moving = [learn(rng.normal(size=(5, 2))) for _ in range(3)]
    still = learn(np.full((5, 2), 1e3))

    def merged(states):
        return merge_welford(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    jax.tree.map(np.testing.assert_array_equal, merged([*moving, still]), merged(moving))
    assert float(merged([still, still]).sample_size) == 10


@pytest.fixture(scope="module")
def metrics():
    """What NUTS has learnt in 150 steps, of which one window of 25 counts for the metric; alone and together."""
    found = {}
    for is_pooled in (False, True):
        kernel = bi.kernels.NUTS(TARGET, 1.0)
        found[is_pooled] = bi.sample(
            0, kernel, INITIAL, num_samples=1, num_warmup=150, warmup=Window(150, is_pooled=is_pooled), progress=False
        ).tuned
    return found


def test_pooled_metric_is_far_closer_to_the_truth(metrics):
    """Were it no closer than that of one chain, the ratio of the squared errors would be of F's law."""
    errors = {
        is_pooled: (np.asarray(tuned.inverse_mass_matrix) / SCALES**2 - 1) ** 2 for is_pooled, tuned in metrics.items()
    }
    ratio = np.mean(errors[True][0]) / np.mean(errors[False])
    assert scipy.stats.f.cdf(ratio, DIM, DIM * NUM_CHAINS) < FALSE_ALARM


def test_tuned_values_are_common(metrics):
    for leaf in jax.tree.leaves((metrics[True].step_size, metrics[True].inverse_mass_matrix)):
        assert np.all(np.asarray(leaf) == np.asarray(leaf)[0])
    assert len(np.unique(np.asarray(metrics[False].step_size))) == NUM_CHAINS


def test_pooled_step_size_reaches_the_target():
    """The acceptance rate of the common step size, over all chains, from a step size that is far too small."""
    kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 1e-3)
    draws = bi.sample(
        0, kernel, jnp.ones((32, 5)), num_samples=500, num_warmup=1_000, progress=False,
        warmup=StepSize(1_000, 0.574, is_pooled=True),
    )  # fmt: skip
    assert len(np.unique(np.asarray(draws.tuned.step_size))) == 1
    assert abs(draws.stats["acceptance_rate"].mean() - 0.574) < 0.05


def test_geometric_mean():
    values = jnp.array([[1.0, 2.0], [4.0, 8.0]])
    np.testing.assert_allclose(geometric_mean(values), [2.0, 4.0], rtol=1e-6)


KERNEL = bi.kernels.Precondition(bi.kernels.MALA(bi.Target(lambda x: -jnp.sum(jnp.cosh(x) + x)), 0.1))


def run(**options):
    options = {"num_samples": 20, "num_warmup": 120, "progress": False, **options}
    warmup = options.pop("warmup", Window(options["num_warmup"], 0.574, is_pooled=True))
    start = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
    return bi.sample(3, options.pop("kernel", KERNEL), start, warmup=warmup, **options)


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("chain_method", ["vectorized", "parallel"])
def test_chunks_do_not_change_the_draws(chain_method):
    whole = run(chain_method=chain_method)
    assert len(np.unique(np.asarray(whole.tuned.step_size))) == 1
    for chunk_size in (7, 25):
        again = run(chain_method=chain_method, chunk_size=chunk_size)
        assert same((whole.samples, whole.stats, whole.tuned), (again.samples, again.stats, again.tuned))


class Stop(Exception):
    pass


def test_pooling_compiles_the_loop_once(caplog):
    kernel = bi.kernels.MALA(bi.Target(lambda x: -jnp.sum(jnp.cosh(x) - x)), 0.1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(kernel=kernel, warmup=StepSize(120, 0.574, is_pooled=True))
    compiled = [
        record for record in caplog.records if "Finished XLA compilation of jit(_advance_all)" in record.message
    ]
    assert len(compiled) == 1


@pytest.mark.parametrize("num_chunks", [2, 4, 6])
def test_resume_is_bitwise(tmp_path, monkeypatch, num_chunks):
    """Stopped before and after the chains have learnt from one another."""
    from bayesinf.sampling import _Run

    take, seen = _Run.take, []

    def counted(self, *args, **kwargs):
        seen.append(None)
        if len(seen) > num_chunks:
            raise Stop
        return take(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "take", counted)
        with pytest.raises(Stop):
            run(checkpoint=tmp_path, chunk_size=25)
    whole, resumed = run(), run(checkpoint=tmp_path, chunk_size=13)
    assert same((whole.samples, whole.stats, whole.tuned), (resumed.samples, resumed.stats, resumed.tuned))


def test_another_pooling_is_another_run(tmp_path):
    kernel = KERNEL.kernel
    run(checkpoint=tmp_path, kernel=kernel, warmup=StepSize(120, 0.574))
    with pytest.raises(CheckpointError, match="another run"):
        run(checkpoint=tmp_path, kernel=kernel, warmup=StepSize(120, 0.574, is_pooled=True))


def test_unadjusted_kernels_pool_their_step_size():
    kernel = bi.kernels.Splitting("BAOAB", bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.1)
    draws = run(kernel=kernel, num_warmup=300, warmup=bi.kernels.EnergyError(300, 0.02, is_pooled=True))
    assert len(np.unique(np.asarray(draws.tuned.step_size))) == 1
    alone = run(kernel=kernel, num_warmup=300, warmup=bi.kernels.EnergyError(300, 0.02))
    assert len(np.unique(np.asarray(alone.tuned.step_size))) == 4


def test_devices_do_not_change_the_draws():
    script = (
        "import jax, jax.numpy as jnp, numpy as np, bayesinf as bi\n"
        "mesh = jax.make_mesh((2,), ('chains',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.5)\n"
        "warmup = bi.adaptation.StepSize(120, 0.574, is_pooled=True)\n"
        "run = lambda mesh: bi.sample(\n"
        "    0, kernel, jnp.ones((4, 3)), num_samples=20, num_warmup=120, warmup=warmup, progress=False, mesh=mesh)\n"
        "spread, whole = run(mesh), run(None)\n"
        "print(len(spread.tuned.step_size.sharding.device_set), np.array_equal(spread['x'], whole['x']))\n"
        "print(len(np.unique(np.asarray(spread.tuned.step_size))))\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", script], env=os.environ | flags, capture_output=True, text=True)
    assert output.stdout.split() == ["2", "True", "1"], output.stdout + output.stderr
