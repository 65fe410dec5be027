"""Warm-up: what it finds, and that it is BlackJAX's own window adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf.adaptation import StepSize, Window, default_warmup

SCALES = jnp.array([0.1, 1.0, 10.0])
TARGET = bi.Target(lambda x, scales: -0.5 * jnp.sum((x / scales) ** 2), SCALES)


def test_window_learns_the_metric():
    kernel = bi.kernels.NUTS(TARGET, step_size=1.0)
    draws = bi.sample(0, kernel, jnp.zeros((4, 3)), num_samples=200, num_warmup=1_000, progress=False)
    learnt = np.sqrt(np.asarray(draws.tuned.inverse_mass_matrix))
    assert learnt.shape == (4, 3)
    # the last window holds 500 draws: their standard deviation has a relative error near 1/sqrt(1000) times the
    # square root of the autocorrelation time, and five of those are 0.35 at most
    assert np.all(np.abs(np.log(learnt / SCALES)) < 0.35)
    assert draws.stats["tree_depth"].mean() < 4
    assert 0.6 < draws.stats["acceptance_rate"].mean() < 0.97


def test_window_updates_are_blackjaxs():
    """Step by step on the same positions and acceptance rates as BlackJAX's assembled window adaptation."""
    from blackjax.adaptation.window_adaptation import base, build_schedule

    with pytest.warns(DeprecationWarning, match="window_adaptation"):
        init, update, final = base(is_mass_matrix_diagonal=True, target_acceptance_rate=0.8)
    num = 60
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.normal(size=(num, 3)) * SCALES, float)
    rates = jnp.asarray(rng.beta(8, 2, size=num), float)  # of mean 0.8: step sizes stay of the order of one

    kernel = bi.kernels.NUTS(TARGET, step_size=0.7)
    ours, window = Window(num, 0.8), None
    window = ours.init(kernel, jnp.zeros(3))
    theirs = init(jnp.zeros(3), jnp.asarray(0.7))
    for step, stage in enumerate(build_schedule(num)):
        info = bi.Info(rates[step], jnp.array(True), jnp.array(False), jnp.array(1, jnp.int32))
        window = ours.update(window, jnp.asarray(step), positions[step], info)
        theirs = update(theirs, stage, positions[step], rates[step])
        if step < num - 1:
            assert np.allclose(window.step_size, theirs.step_size, rtol=1e-4, atol=0.0)
        assert np.allclose(window.inverse_mass_matrix, theirs.inverse_mass_matrix, rtol=1e-5)
    step_size, metric = final(theirs)
    assert np.allclose(window.step_size, step_size, rtol=1e-4, atol=0.0)
    assert np.allclose(window.inverse_mass_matrix, metric, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "num_warmup", "expected"),
    [
        (bi.kernels.MALA(TARGET, 0.1), 100, StepSize),
        (bi.kernels.NUTS(TARGET, 0.1), 100, Window),
        (bi.kernels.NUTS(TARGET, 0.1), 10, StepSize),
        (bi.kernels.NUTS(TARGET, 0.1), 0, type(None)),
        (bi.kernels.LMC(TARGET, 0.1), 100, type(None)),
    ],
)
def test_default_suits_the_kernel(kernel, num_warmup, expected):
    assert type(default_warmup(kernel, num_warmup)) is expected


def test_another_target_rate_can_be_asked_for():
    kernel = bi.kernels.MALA(TARGET, 0.01)
    warmup = StepSize(1_000, 0.9)
    draws = bi.sample(0, kernel, jnp.zeros((16, 3)), num_samples=500, num_warmup=1_000, warmup=warmup, progress=False)
    assert abs(draws.stats["acceptance_rate"].mean() - 0.9) < 0.05


def test_kernels_inside_others_are_tuned():
    kernel = bi.kernels.Repeat(bi.kernels.MALA(TARGET, 0.0001), 3)
    draws = bi.sample(0, kernel, jnp.zeros((8, 3)), num_samples=300, num_warmup=1_000, progress=False)
    assert abs(draws.stats["acceptance_rate"].mean() - 0.574) < 0.06


def test_tuned_values_keep_their_dtype():
    kernel = bi.kernels.NUTS(TARGET, step_size=1.0)
    position = jnp.zeros(3, jnp.float32)
    warmup = Window(20)
    state = warmup.init(kernel, position)
    info = bi.Info(jnp.array(0.5), jnp.array(True), jnp.array(False), jnp.array(1, jnp.int32))
    moved = warmup.update(state, jnp.asarray(5), position, info)
    assert jax.tree.map(lambda leaf: leaf.dtype, moved) == jax.tree.map(lambda leaf: leaf.dtype, state)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, jnp.nan])
def test_rate_must_lie_between_zero_and_one(value):
    with pytest.raises(ValueError, match="target_acceptance must lie in"):
        StepSize(10, value)
    with pytest.raises(ValueError, match="target_acceptance must lie in"):
        Window(20, value)


@pytest.mark.usefixtures("unchecked")
def test_steps_are_counted_in_whole_numbers():
    with pytest.raises(ValueError, match=r"num_warmup must be a whole number, got 10\.5"):
        StepSize(10.5, 0.8)
    with pytest.raises(ValueError, match="num_warmup must be at least 1"):
        StepSize(0, 0.8)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("is_pooled", [False, True])
def test_the_metric_is_renewed_where_its_window_ends(is_dense, is_pooled):
    """What is applied at the window ends alone makes the same chain, bit for bit, as applying it after every step."""

    class EveryStep(Window):
        def is_metric_new(self, step):
            return True

    target = bi.Target(lambda x: -0.5 * jnp.sum((x / jnp.array([1.0, 10.0])) ** 2) - 0.1 * x[0] * x[1])
    kernel = bi.kernels.Precondition(bi.kernels.MALA(target, 0.5), jnp.eye(2) if is_dense else None)
    draws = [
        bi.sample(
            0,
            kernel,
            jnp.zeros((2, 2)),
            num_samples=5,
            num_warmup=160,
            warmup=warmup(160, 0.574, is_dense=is_dense, is_pooled=is_pooled),
            progress=False,
        )
        for warmup in (Window, EveryStep)
    ]
    np.testing.assert_array_equal(draws[0]["x"], draws[1]["x"])
    assert not np.array_equal(draws[0].tuned.inverse_mass_matrix, np.ones_like(draws[0].tuned.inverse_mass_matrix))
