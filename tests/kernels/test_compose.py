"""Cycle, Mixture, Repeat and Gibbs; the contract and the invariance of the simple ones are tested with all kernels."""

from functools import partial

import blackjax
import closed_forms
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, contract, exact_start_invariance

KEY = jax.random.key(0)


def logdensity(position, scale):
    """x / scale the logarithm of a Gamma(3) variable; y_i | x ~ N(x^2 / 4, exp(x / 2))."""
    x, y = position["x"] / scale, position["y"]
    return 3.0 * x - jnp.exp(x) - 0.5 * jnp.sum(jnp.exp(-x / 2) * (y - x**2 / 4) ** 2) - y.size * x / 4


SCALE = jnp.asarray(1.2)
TARGET = bi.Target(logdensity, SCALE)
POSITION = {"x": jnp.asarray(1.0), "y": jnp.array([0.3, -0.4])}
MALA = kernels.MALA(TARGET, 0.3)
HMC = kernels.HMC(TARGET, 0.3, num_integration_steps=2)
UBU = kernels.Splitting("UBU", TARGET, 0.1)
BAOAB = kernels.Splitting("BAOAB", TARGET, 0.1)


def exact_sampler(key):
    key_x, key_y = jax.random.split(key)
    x = jax.random.loggamma(key_x, 3.0)
    return {"x": SCALE * x, "y": x**2 / 4 + jnp.exp(x / 4) * jax.random.normal(key_y, (2,))}


NESTED = {
    "cycle of gibbs of repeat": kernels.Cycle([kernels.Gibbs({"x": kernels.Repeat(MALA, 2), "y": HMC}), MALA]),
    "mixture of repeat of gibbs": kernels.Mixture([kernels.Repeat(kernels.Gibbs({"y": MALA, ("x",): MALA}), 2), HMC]),
    "gibbs of mixture": kernels.Gibbs({"y": kernels.Mixture([MALA, HMC], [2, 1]), "x": MALA}),
    "gibbs of built": kernels.Gibbs({"x": partial(kernels.MALA, step_size=0.5), "y": HMC}),
}

WITH_MEMORY = {
    "cycle": kernels.Cycle([UBU, MALA, BAOAB]),
    "mixture": kernels.Mixture([UBU, MALA, BAOAB]),
    "gibbs": kernels.Gibbs({"x": UBU, "y": kernels.Repeat(BAOAB, 2)}),
    "cycle without evaluation": kernels.Cycle([UBU, UBU]),
}


def params(default, everything):
    """All names, those outside of the default tier marked as slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in everything]


@pytest.mark.parametrize("name", params(("mixture of repeat of gibbs",), NESTED | WITH_MEMORY))
def test_contract(name):
    contract((NESTED | WITH_MEMORY)[name], POSITION)


@pytest.mark.parametrize("name", params(("cycle of gibbs of repeat", "gibbs of mixture"), NESTED))
def test_nested_compositions_leave_the_law_invariant(name):
    report = exact_start_invariance(1, NESTED[name], exact_sampler, num_chains=40_000, num_steps=4)
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_kernels_of_blackjax_are_parts():
    walk = blackjax.normal_random_walk(lambda x: logdensity(x, SCALE), jnp.full(3, 0.5))

    def nuts(conditional):
        return blackjax.nuts(conditional.logdensity, 0.4, jnp.ones(2), max_num_doublings=2)

    kernel = kernels.Cycle([kernels.Gibbs({"x": MALA, "y": nuts}), walk])
    report = exact_start_invariance(1, kernel, exact_sampler, num_chains=10_000, num_steps=2)
    assert report.raise_if_rejected().notes["moved"] > 0.9
    _, info = kernel.step(KEY, kernel.init(POSITION))
    assert int(info.num_gradients) >= 2 + 2
    assert info.log_work is None


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if name not in ("gibbs", "cycle without evaluation")])
def test_cached_evaluation_is_that_of_the_position(name):
    kernel = WITH_MEMORY[name]
    state, step = kernel.init(POSITION), eqx.filter_jit(kernel.step)
    for t in range(6):
        state, _ = step(jax.random.key(t), state)
        fresh = TARGET.evaluate(state.position, order=1)
        for cached, expected in zip(*map(jax.tree.leaves, (state.evaluation, fresh)), strict=True):
            np.testing.assert_allclose(cached, expected, rtol=1e-4, atol=1e-4)


def test_velocities_stay_with_their_part():
    """A cycle of two splittings is the two by turns, each with the velocity that it had left."""
    first, second = kernels.Splitting("BAOAB", TARGET, 0.1), kernels.Splitting("UBU", TARGET, 0.2)
    cycle = kernels.Cycle([first, second])
    state = cycle.init(POSITION)
    one, two = first.init(POSITION), second.init(POSITION)
    for t in range(3):
        keys = jax.random.split(jax.random.key(t))
        state, _ = cycle.step(jax.random.key(t), state)
        one, _ = first.step(keys[0], one)
        two, _ = second.step(keys[1], two._replace(position=one.position))
        one = one._replace(position=two.position, evaluation=TARGET.evaluate(two.position, order=1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), state.position, two.position)


COUNTED = closed_forms.counted()
C_MALA, C_LMC, C_UBU = kernels.MALA(COUNTED, 0.1), kernels.LMC(COUNTED, 0.1), kernels.Splitting("UBU", COUNTED, 0.1)


@pytest.mark.parametrize(
    ("kernel", "num_gradients"),
    [
        (kernels.Cycle([C_MALA, C_LMC]), 2),
        (kernels.Cycle([kernels.Cycle([C_MALA, C_LMC]), C_MALA]), 3),
        (kernels.Cycle([C_UBU, C_UBU]), 2),
        (kernels.Cycle([C_MALA, C_UBU]), 3),  # one more, where UBU ends
        (kernels.Cycle([C_UBU, C_MALA]), 3),
        (kernels.Gibbs({0: C_MALA, 1: C_MALA}), 4),  # each block once more, given the rest
        (kernels.Gibbs({0: kernels.Cycle([C_MALA, C_LMC])}), 3),
    ],
)
def test_no_gradient_is_taken_twice(kernel, num_gradients):
    position = (jnp.ones(()), jnp.ones(())) if isinstance(kernel, kernels.Gibbs) else jnp.ones(2)
    target = bi.Target(lambda x, data: data.logdensity(jnp.stack(x) if isinstance(x, tuple) else x), COUNTED)
    kernel = kernel.with_target(target)
    state = kernel.init(position)
    assert closed_forms.num_evaluations(kernel.step, KEY, state) == num_gradients
    assert int(kernel.step(KEY, state)[1].num_gradients) == num_gradients


def test_mixture_evaluates_the_kernel_drawn_and_no_other():
    calls = []

    def noted(x):
        jax.debug.callback(lambda _: calls.append(1), x[0])
        return -0.5 * jnp.sum(x**2)

    target = bi.Target(noted)
    kernel = kernels.Mixture([kernels.LMC(target, 0.1), kernels.RandomizedMidpoint(target, 0.1)], [1.0, 3.0])
    state, step = kernel.init(jnp.ones(2)), eqx.filter_jit(kernel.step)
    jax.effects_barrier()
    calls.clear()
    spent = sum(int(step(jax.random.key(t), state)[1].num_gradients) for t in range(50))
    jax.effects_barrier()
    assert 50 < spent < 100
    assert len(calls) == spent


def test_mixture_shares_its_draw_between_chains_on_request():
    kernel = kernels.Mixture([MALA, HMC])
    states = jax.vmap(kernel.init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), POSITION))
    keys = jax.random.split(KEY, 4)
    shared = jax.make_jaxpr(jax.vmap(kernel.step_part, in_axes=(None, 0, 0)))(jnp.asarray(0), keys, states)
    assert any(eqn.primitive.name == "cond" for eqn in shared.jaxpr.eqns)
    _, info = jax.vmap(kernel.step_part, in_axes=(None, 0, 0))(jnp.asarray(1), keys, states)
    np.testing.assert_array_equal(info.num_gradients, 2)


def test_mixture_draws_by_weight():
    kernel = kernels.Mixture([MALA, HMC, MALA], [1.0, 2.0, 5.0])
    draws = jax.vmap(kernel.choose)(jax.random.split(KEY, 20_000))
    observed = np.bincount(draws, minlength=3)
    assert scipy.stats.chisquare(observed, 20_000 * np.array([1, 2, 5]) / 8).pvalue > FALSE_ALARM


QUARTIC = closed_forms.quartic()


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.Cycle([kernels.LMC(QUARTIC, 0.2), kernels.MALA(QUARTIC, 0.5)]),
        kernels.Mixture([kernels.LMC(QUARTIC, 0.2), kernels.HMC(QUARTIC, 0.5, num_integration_steps=2)]),
        kernels.Repeat(kernels.LMC(QUARTIC, 0.2), 2),
    ],
    ids=["cycle", "mixture", "repeat"],
)
def test_log_work_weighs_paths(kernel):
    assert closed_forms.work_p_value(kernel) > FALSE_ALARM


def test_log_work_of_blocks():
    target = bi.Target(lambda x: -0.5 * x["a"] ** 2 - 0.5 * (x["b"] - x["a"] ** 2) ** 2)
    kernel = kernels.Gibbs({"b": kernels.LMC(target, 0.3), "a": kernels.MALA(target, 0.3)})
    assert closed_forms.work_p_value(kernel, position_of=lambda x: {"a": x[0], "b": x[1]}) > FALSE_ALARM


def test_info_of_compositions():
    cycle = kernels.Cycle([kernels.LMC(TARGET, 0.01), MALA])
    keys = jax.random.split(KEY)
    one, _ = kernels.LMC(TARGET, 0.01).step(keys[0], cycle.kernels[0].with_target(TARGET).init(POSITION))
    _, told = MALA.step(keys[1], one)
    _, info = cycle.step(KEY, cycle.init(POSITION))
    # the rate is that of what is tuned: LMC always moves
    np.testing.assert_allclose(info.acceptance_rate, told.acceptance_rate, rtol=1e-5)
    assert (
        kernels.Cycle([MALA, kernels.RandomizedMidpoint(TARGET, 0.1)]).step(KEY, cycle.init(POSITION))[1].log_work
        is None
    )


def test_step_sizes_keep_their_ratios():
    cycle = kernels.Cycle([kernels.LMC(TARGET, 7.0), kernels.MALA(TARGET, 0.1), kernels.MALA(TARGET, 0.4)])
    assert cycle.target_acceptance == 0.574
    np.testing.assert_allclose(cycle.step_size, 0.1)
    np.testing.assert_allclose([k.step_size for k in cycle.with_step_size(0.2).kernels], [7.0, 0.2, 0.8])
    gibbs = kernels.Gibbs({"y": cycle, "x": kernels.Repeat(kernels.MALA(TARGET, 1.0), 3)}).with_step_size(0.2)
    np.testing.assert_allclose(gibbs.step_size, 0.2)
    np.testing.assert_allclose(gibbs.blocks[("x",)].step_size, 2.0)


def test_a_kernel_around_one_other_runs_as_it_does():
    nuts = kernels.NUTS(TARGET, 0.5)
    for around in (kernels.Jitter, kernels.Precondition, lambda kernel: kernels.Repeat(kernel, 2)):
        assert around(nuts).is_sequential
        assert not around(MALA).is_sequential


def test_a_kernel_around_one_other_refreshes_its_velocity():
    kernel = kernels.Repeat(kernels.GHMC(TARGET, 0.3), 2)
    assert np.all(kernel.refresh(KEY, kernel.init(POSITION)).velocity["y"] != 0.0)


def test_what_is_tuned():
    assert kernels.Cycle([MALA, HMC]).target_acceptance is None  # 0.574 and 0.8
    assert kernels.Cycle([BAOAB]).target_acceptance is None
    assert not hasattr(kernels.Cycle([BAOAB]), "step_size")
    assert kernels.Gibbs({"x": HMC, "y": BAOAB}).target_acceptance == 0.8
    assert kernels.Mixture([MALA, MALA]).target_acceptance == 0.574
    assert kernels.Mixture([MALA, BAOAB]).target_acceptance is None
    assert kernels.Repeat(HMC, 3).target_acceptance == 0.8
    assert kernels.Cycle([MALA, kernels.NUTS(TARGET, 0.1)]).is_sequential
    assert not kernels.Cycle([MALA, HMC]).is_sequential


def test_the_target_is_kept_once():
    """A data set is not copied for every part."""
    cycle = kernels.Cycle([MALA, kernels.Gibbs({"x": kernels.Repeat(MALA, 2), "y": HMC})])
    assert sum(leaf is SCALE for leaf in jax.tree.leaves(cycle)) == 1
    same = bi.Target(logdensity, jnp.asarray(1.2))
    assert kernels.Cycle([MALA, kernels.MALA(same, 0.1)]).target is TARGET


def test_blocks_are_swept_in_the_order_given():
    kernel = kernels.Gibbs({"y": MALA, "x": MALA})
    leaves, structure = jax.tree.flatten(kernel)
    assert list(jax.tree.unflatten(structure, leaves).blocks) == [("y",), ("x",)]


def test_paths_lead_into_the_position():
    def nested(position, scale):
        return logdensity({"x": position["theta"][0], "y": position["theta"][1]["y"]}, scale)

    mala = kernels.MALA(bi.Target(nested, SCALE), 0.3)
    position = {"theta": (POSITION["x"], {"y": POSITION["y"]}), "fixed": jnp.ones(2)}
    flat = kernels.Gibbs({("theta", 0): mala, ("theta", 1, "y"): mala})
    inner = kernels.Gibbs({"theta": kernels.Gibbs({0: mala, (1, "y"): mala})})
    reference = kernels.Gibbs({"x": MALA, "y": MALA}).step(KEY, kernels.Gibbs({"x": MALA, "y": MALA}).init(POSITION))[0]
    moved, _ = flat.step(KEY, flat.init(position))
    np.testing.assert_allclose(moved.position["theta"][0], reference.position["x"])
    np.testing.assert_allclose(moved.position["theta"][1]["y"], reference.position["y"])
    np.testing.assert_array_equal(moved.position["fixed"], 1.0)
    again, _ = inner.step(KEY, inner.init(position))
    assert jax.tree.structure(again.position) == jax.tree.structure(position)


def test_warmup_tunes_a_composition():
    kernel = kernels.Gibbs({"x": kernels.MALA(TARGET, 1e-3), "y": kernels.MALA(TARGET, 1e-3)})
    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), POSITION)
    draws = bi.sample(0, kernel, start, num_samples=300, num_warmup=300, progress=False)
    assert 0.45 < draws.stats["acceptance_rate"].mean() < 0.7


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.Cycle([]), "kernels must be a sequence of at least one kernel"),
        (lambda: kernels.Mixture(MALA), "kernels must be a sequence"),
        (lambda: kernels.Cycle([MALA, 3]), "a kernel has init"),
        (lambda: kernels.Cycle([MALA, kernels.MALA(QUARTIC, 0.1)]), "must sample one target"),
        (lambda: kernels.Cycle([MALA, kernels.MALA(bi.Target(logdensity, 1.3), 0.1)]), "must sample one target"),
        (lambda: kernels.Mixture([MALA, MALA], [1.0]), r"weights .* of shape \(2,\), got shape \(1,\)"),
        (lambda: kernels.Mixture([MALA, MALA], [1.0, 0.0]), "weights must be finite and positive"),
        (lambda: kernels.Repeat(MALA, 0), "num_steps must be at least 1"),
        (lambda: kernels.Repeat(MALA, 1.5), "num_steps must be a whole number"),
        (lambda: kernels.Gibbs({}), "blocks must be a dict"),
        (lambda: kernels.Gibbs({(): MALA}), "at least one key"),
        (lambda: kernels.Gibbs({"x": 3}), "must be a kernel or a function"),
        (lambda: kernels.Gibbs({"x": blackjax.nuts(sum, 0.1, jnp.ones(1))}), "no target to condition on"),
        (lambda: kernels.Gibbs({"x": partial(kernels.MALA, step_size=0.1)}), "target is needed"),
        (lambda: kernels.Gibbs({"z": MALA}).init(POSITION), r"path \('z',\) leads nowhere: no 'z' .* \['x', 'y'\]"),
        (lambda: kernels.Gibbs({("x", "a"): MALA}).init(POSITION), "leads into the array"),
        (lambda: kernels.Gibbs({("y", 0): MALA}).init(POSITION), r"into the array at \('y',\) .* separate entries"),
        (lambda: kernels.Gibbs({("theta", 1): MALA}).init({"theta": (1.0,)}), "leads nowhere"),
        (lambda: kernels.Gibbs({"x": MALA, ("x",): MALA}), "blocks must have different paths"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
