"""Replica exchange and its ladder; the contract and the invariance of the simple form are tested with all kernels."""

from functools import partial

import closed_forms
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
import tempered_laws as laws
from planted.tempering import ForgetsBeta, SwapsPositionsAlone, SwapsUphill

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, contract, exact_start_invariance, mean_p_value

KEY = jax.random.key(0)
POSITION = {"x": jnp.asarray(1.0), "y": jnp.array([0.3, -0.4])}
BETAS = [1.0, 0.6, 0.2]
MALA = kernels.MALA(laws.BANANA, 0.3)
RATE = kernels.MALA(laws.RATE, 0.1)


def extended(kernel, draw):
    """Draws the replicas, and velocities where there are any, from their laws."""
    betas = np.asarray(kernel._moving)[1:].tolist()

    def prepare(key, state):
        key_draw, key_refresh = jax.random.split(key)
        drawn = [draw(k, beta) for k, beta in zip(jax.random.split(key_draw, len(betas)), betas, strict=True)]
        positions = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
        order = int(state.evaluation.grad is not None)
        evaluations = jax.vmap(lambda position: kernel.target.evaluate(position, order))(positions)
        memory = state.memory._replace(positions=positions, evaluations=evaluations)
        return kernel.refresh(key_refresh, state._replace(memory=memory))

    return prepare


def invariance(kernel, draw, statistics=None):
    return exact_start_invariance(
        0, kernel, draw, num_chains=30_000, num_steps=6, prepare=extended(kernel, draw), statistics=statistics
    )


LADDERS = {
    "powers": (kernels.ReplicaExchange(MALA, BETAS), laws.draw_banana),
    "velocities": (kernels.ReplicaExchange(kernels.GHMC(laws.BANANA, 0.4), BETAS), laws.draw_banana),
    "no evaluation": (kernels.ReplicaExchange(kernels.Gibbs({"x": MALA, "y": MALA}), BETAS[:2]), laws.draw_banana),
    "prior": (kernels.ReplicaExchange(RATE, [1.0, 0.5, 0.25, 0.0], laws.PRIOR), laws.draw_log_rate),
    "density": (kernels.ReplicaExchange(RATE, [1.0, 0.5, 0.25], bi.Target(laws.log_prior)), laws.draw_log_rate),
}


@pytest.mark.parametrize(
    "name", [name if name == "prior" else pytest.param(name, marks=pytest.mark.slow) for name in LADDERS]
)
def test_the_law_of_all_replicas_is_left_invariant(name):
    report = invariance(*LADDERS[name], statistics=lambda state: state.memory.positions)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.parametrize("bug", [SwapsUphill, SwapsPositionsAlone, pytest.param(ForgetsBeta, marks=pytest.mark.slow)])
def test_bugs_are_found(bug):
    assert invariance(bug(MALA, BETAS), laws.draw_banana).p_value < FALSE_ALARM


@pytest.mark.slow
def test_with_a_prior_the_contract_holds():
    """An undone move is no reason not to exchange: what is undone must not depend on where the replicas are."""
    contract(LADDERS["prior"][0], jnp.asarray(1.0), skip=("divergence",))


def test_a_target_that_is_not_finite_moves_no_replica():
    kernel = LADDERS["powers"][0]
    start, _ = kernel.step(KEY, kernel.init(POSITION))
    broken = kernel.with_target(bi.Target(lambda x: jnp.nan * x["x"]))
    state, info = broken.step(jax.random.key(1), start)
    assert bool(info.is_divergent)
    before, after = (np.append(s.memory.positions["x"], s.position["x"]) for s in (start, state))
    np.testing.assert_array_equal(np.sort(before), np.sort(after))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_draw_where_the_target_is_not_finite_is_not_exchanged(value):
    """Above 1, where a third of the draws from the prior lie; below, the target is the prior and all pairs exchange."""
    prior = dist.Normal(0.5, 1.0)
    target = bi.Target(lambda x: jnp.where(x > 1, value, prior.log_prob(x)))
    kernel = kernels.ReplicaExchange(kernels.MALA(target, 1e-6), [1.0, 0.5, 0.0], prior)
    state, step = kernel.init(jnp.asarray(0.0)), eqx.filter_jit(kernel.step)
    is_divergent = []
    for t in range(20):
        state, info = step(jax.random.key(t), state)
        assert state.position <= 1
        assert state.memory.positions <= 1
        is_divergent.append(bool(info.is_divergent))
        assert bool(info.is_swapped[1]) == (t % 2 == 1 and not is_divergent[-1])
    assert 0 < sum(is_divergent) < 20


def two_modes(x):
    """0.3 N(-4, 1) + 0.7 N(4, 1/4), in both coordinates."""
    left = jnp.log(0.3) + jnp.sum(dist.Normal(-4.0, 1.0).log_prob(x))
    right = jnp.log(0.7) + jnp.sum(dist.Normal(4.0, 0.5).log_prob(x))
    return jnp.logaddexp(left, right)


def test_weights_of_modes_are_found_where_the_kernel_alone_is_lost():
    mala, start = kernels.MALA(bi.Target(two_modes), 0.1), jnp.full((16, 2), 4.0)
    run = partial(bi.sample, 0, initial=start, num_samples=3_000, num_warmup=1_000, progress=False)
    alone = np.mean(np.asarray(run(kernel=mala).samples) < 0, axis=(1, 2))
    assert np.all(alone == 0)

    ladder = [1.0, 0.5, 0.2, 0.08, 0.03]
    draws = run(kernel=kernels.ReplicaExchange(mala, ladder))
    share = np.mean(np.asarray(draws.samples)[..., 0] < 0, axis=1)
    assert mean_p_value(share, 0.3) > FALSE_ALARM  # over independent chains
    assert np.std(share) / np.sqrt(share.size) < 0.03
    # every replica has been tuned by itself
    np.testing.assert_allclose(np.mean(draws.stats["acceptance_rates"], axis=(0, 1)), 0.574, atol=0.07)
    assert draws.tuned.step_size.shape == (16, 5)
    assert draws.to_arviz()["sample_stats"]["swap_rates"].shape == (16, 3_000, 4)


@pytest.mark.parametrize("name", ["powers", "prior"])
def test_evaluations_go_with_their_positions(name):
    kernel, _ = LADDERS[name]
    evaluate = partial(kernel.target.evaluate, order=1)
    state, step = kernel.init(POSITION if name == "powers" else jnp.asarray(1.0)), eqx.filter_jit(kernel.step)
    num_swapped = 0
    for t in range(10):
        state, info = step(jax.random.key(t), state)
        num_swapped += int(jnp.sum(info.is_swapped))
        log_rates = np.diff(info.log_ratios) * -np.diff(kernel.betas)
        np.testing.assert_allclose(info.swap_rates, np.exp(np.minimum(log_rates, 0.0)), rtol=1e-4)
        cold, hot = evaluate(state.position), jax.vmap(evaluate)(state.memory.positions)
        for known, fresh in ((state.evaluation, cold), (state.memory.evaluations, hot)):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), known, fresh)
    assert num_swapped > 0


def test_pairs_take_turns_and_equal_neighbours_always_exchange():
    kernel = kernels.ReplicaExchange(kernels.MALA(laws.BANANA, 1e6), jnp.ones(4))
    state, step = kernel.init(POSITION), eqx.filter_jit(kernel.step)
    for t in range(4):
        state, info = step(jax.random.key(t), state)
        np.testing.assert_array_equal(info.swap_rates, 1.0)
        np.testing.assert_array_equal(info.is_swapped, [True, False, True] if t % 2 == 0 else [False, True, False])
        # the kernel rejects whatever it proposes, so that an exchange alone moves the chain
        assert bool(info.is_accepted) == (t % 2 == 0)


def test_pairs_of_one_turn_exchange_independently():
    """With the probabilities that are told; the kernel rejects whatever it proposes."""
    target = bi.Target(lambda x: -0.5 * x**2)
    kernel = kernels.ReplicaExchange(kernels.MALA(target, 1e6), [1.0, 0.6, 0.3, 0.1])
    state, hot = kernel.init(jnp.asarray(0.5)), jnp.array([1.9, 1.0, 2.8])
    evaluations = jax.vmap(partial(target.evaluate, order=1))(hot)
    state = state._replace(memory=state.memory._replace(positions=hot, evaluations=evaluations))
    _, infos = jax.jit(jax.vmap(lambda key: kernel.step(key, state)))(jax.random.split(KEY, 10_000))
    first, _, third = np.asarray(infos.is_swapped, float).T
    rates = np.exp([-0.4 * 0.5 * (1.9**2 - 0.5**2), -0.2 * 0.5 * (2.8**2 - 1.0**2)])
    found = np.stack([first, third, first * third], axis=1)
    assert mean_p_value(found, np.append(rates, np.prod(rates))) > FALSE_ALARM


def test_gradients_are_counted():
    target = closed_forms.counted()
    mala = kernels.MALA(target, 0.1)
    for kernel, num_in_program, num in (
        (kernels.ReplicaExchange(mala, BETAS), 1, 3),  # one, of three replicas at once
        (kernels.Cycle([kernels.ReplicaExchange(mala, BETAS), mala]), 2, 4),
        (kernels.ReplicaExchange(mala, [1.0, 0.3, 0.0], dist.Normal(jnp.zeros(2), 1.0).to_event(1)), 2, 3),
    ):
        state = kernel.init(jnp.ones(2))
        assert closed_forms.num_evaluations(kernel.step, KEY, state) == num_in_program
        assert int(kernel.step(KEY, state)[1].num_gradients) == num


def test_new_betas_and_step_sizes_compile_nothing():
    other = kernels.ReplicaExchange(MALA, [1.0, 0.5, 0.1], step_sizes=[0.1, 0.2, 0.3])
    assert closed_forms.num_programs([LADDERS["powers"][0], other], POSITION) == 1


def test_step_sizes():
    kernel = kernels.ReplicaExchange(MALA, [1.0, 0.25])
    np.testing.assert_allclose(kernel.step_size, [0.3, 0.6])
    np.testing.assert_allclose(kernel.with_step_size(0.1).step_size, [0.1, 0.2])
    np.testing.assert_allclose(kernel.with_step_size(jnp.array([0.1, 0.7])).step_size, [0.1, 0.7])
    cycle = kernels.Cycle([kernel, kernels.MALA(laws.BANANA, 0.6)]).with_step_size(0.1)
    np.testing.assert_allclose(cycle.kernels[0].step_size, [0.1, 0.2])
    np.testing.assert_allclose(cycle.kernels[1].step_size, 0.2)


NORMAL = dist.Normal(jnp.zeros(4), 1.0).to_event(1)


def concentrated(x):
    return dist.Normal(1.0, 0.3).log_prob(x).sum()


def test_a_suggested_ladder_refuses_evenly_and_the_barrier_is_the_same():
    """From a ladder with one crowded end."""
    mala = kernels.MALA(bi.Target(concentrated), 0.02)
    first = kernels.ReplicaExchange(mala, [1.0, 0.9, 0.8, 0.5, 0.2, 0.05, 0.0], NORMAL)
    run = partial(bi.sample, 0, initial=jnp.ones((8, 4)), num_samples=1_000, num_warmup=400, progress=False)
    told = run(kernel=first).stats
    ladder = kernels.suggest_betas(told["swap_rates"], first.betas)
    second = kernels.ReplicaExchange(mala, ladder.betas, NORMAL)
    told_again = run(kernel=second).stats
    again = kernels.suggest_betas(told_again["swap_rates"], second.betas)
    before, after = (np.mean(stats["swap_rates"], axis=(0, 1)) for stats in (told, told_again))
    assert np.ptp(after) < 0.2 * np.ptp(before)
    assert 0.85 < float(ladder.barrier / again.barrier) < 1.05  # a coarse ladder does not see all of it
    assert float(again.round_trip_rate) > 1.1 * float(ladder.round_trip_rate)
    # the density is normalised, and so is the reference
    for stats, kernel in ((told, first), (told_again, second)):
        log_evidence = [kernels.stepping_stone(chain, kernel.betas) for chain in stats["log_ratios"]]
        assert mean_p_value(np.exp(log_evidence), 1.0) > FALSE_ALARM


def test_stepping_stones_from_exact_draws():
    betas = [1.0, 0.75, 0.5, 0.25, 0.0]

    def log_ratios(key):
        keys = jax.random.split(key, (5, 200))
        log_rates = [jax.vmap(partial(laws.draw_log_rate, beta=beta)) for beta in betas]
        drawn = jnp.stack([draw(row) for draw, row in zip(log_rates, keys, strict=True)])
        return (jax.vmap(jax.vmap(laws.RATE.logdensity))(drawn) - jax.vmap(jax.vmap(laws.log_prior))(drawn)).T

    found = jax.vmap(lambda key: kernels.stepping_stone(log_ratios(key), betas))(jax.random.split(KEY, 400))
    assert mean_p_value(jnp.exp(found - laws.log_evidence()), 1.0) > FALSE_ALARM
    assert scipy.stats.sem(np.exp(found - laws.log_evidence())) < 0.01


def test_monotone_interpolation_of_the_barrier():
    """Where the barrier is proportional to the temperature's logarithm, so is the ladder."""
    betas = 0.5 ** np.arange(6)
    ladder = kernels.suggest_betas(np.full((2, 3, 5), 0.4), betas, num_replicas=11)
    np.testing.assert_allclose(ladder.barrier, 3.0, rtol=1e-5)
    np.testing.assert_allclose(ladder.round_trip_rate, 1 / (2 + 2 * 5 * 0.6 / 0.4), rtol=1e-5)
    np.testing.assert_allclose(ladder.betas[::2], betas, rtol=1e-5)
    assert np.all(np.diff(ladder.betas) < 0)
    flat = kernels.suggest_betas([1.0, 1.0, 0.2], [1.0, 0.9, 0.8, 0.0])
    assert np.all(np.diff(flat.betas) < 0)
    assert 0.0 < float(flat.betas[2]) < float(flat.betas[1]) <= 0.81


def block(target):
    return kernels.ReplicaExchange(kernels.MALA(target, 0.1), BETAS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.ReplicaExchange(laws, BETAS), "kernel must be a kernel with a target"),
        (lambda: kernels.ReplicaExchange(MALA, 3.0), "betas must be a vector of at least two"),
        (lambda: kernels.ReplicaExchange(MALA, [0.9, 0.5]), "betas must begin with 1"),
        (lambda: kernels.ReplicaExchange(MALA, [1.0, 0.5, 0.6]), "betas must begin with 1, not rise"),
        (lambda: kernels.ReplicaExchange(MALA, [1.0, 0.0]), "only where a prior is given as reference"),
        (lambda: kernels.ReplicaExchange(RATE, [1.0, 0.5], laws.PRIOR), "betas must end with 0"),
        (lambda: kernels.ReplicaExchange(MALA, BETAS, 3.0), "prior must be a NumPyro distribution"),
        (lambda: kernels.ReplicaExchange(MALA, BETAS, step_sizes=[1.0]), r"shape \(3,\), got shape \(1,\)"),
        (lambda: kernels.ReplicaExchange(MALA, BETAS, step_sizes=[1.0, 0.0, 1.0]), "step_sizes must be finite"),
        (lambda: kernels.ReplicaExchange(MALA, [1.0, 0.0], laws.PRIOR).init(POSITION), "reference must draw positions"),
        (lambda: kernels.Gibbs({"x": LADDERS["powers"][0]}), r"the block \('x',\) must be a kernel whose target may"),
        (lambda: kernels.Gibbs({"x": block, "y": MALA}).init(POSITION), "whose target may change"),
        (lambda: kernels.Precondition(kernels.Repeat(LADDERS["powers"][0], 2)), "got Repeat"),
        (
            lambda: kernels.smc_sampler(0, laws.PRIOR, lambda rate: -rate, block, num_particles=10),
            "mutation must be a kernel whose target may change",
        ),
        (lambda: kernels.suggest_betas([0.5], [1.0, 0.5, 0.2]), r"swap_rates must have shape \(..., 2\)"),
        (lambda: kernels.suggest_betas([0.5, 1.2], [1.0, 0.5, 0.2]), "swap_rates must be probabilities"),
        (lambda: kernels.suggest_betas([0.5, 0.2], [1.0, 0.5, 0.5]), "falls strictly"),
        (lambda: kernels.stepping_stone(jnp.zeros((3, 2)), [1.0, 0.5]), "betas must end with 0"),
        (lambda: kernels.stepping_stone(jnp.zeros((3, 2)), [1.0, 0.5, 0.0]), "log_ratios must have shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
