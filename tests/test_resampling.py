"""Resampling: exact mean counts, bounded counts, zero weights never drawn, a million particles in float32."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf import resampling, weights
from bayesinf.conformance import FALSE_ALARM, mean_p_value

METHODS = {**resampling.SCHEMES, "iid": resampling.iid}
W = np.array([0.05, 0.2, 0.0, 0.33, 0.01, 0.41, 0.0])
LOG_W = jnp.log(jnp.asarray(W)) + 10.0  # unnormalised
NUMS = [4, 21]
REPLICATES = 30_000
CASES = [(name, num) for name in METHODS if name != "killing" for num in NUMS] + [("killing", len(W))]
LAST = dict(CASES)  # of every scheme, its largest number of offspring


def replicate(method, num):
    """One compiled function (log_weights) -> indices of many independent replicates."""
    keys = jax.random.split(jax.random.key(num), REPLICATES)
    function = jax.jit(jax.vmap(lambda key, log_weights: method(key, log_weights, num), (0, None)))
    return lambda log_weights: np.asarray(function(keys, log_weights))


@lru_cache
def replicates(name, num):
    return replicate(METHODS[name], num)


@lru_cache
def draws(name, num):
    return replicates(name, num)(LOG_W)


def counts_of(indices, num_particles=7):
    return np.stack([(indices == i).sum(1) for i in range(num_particles)], axis=1)


def count_p_value(indices, num, w=W):
    """Of E[count of i] = num W_i; 0 where a count that never varies is another."""
    counts = counts_of(indices, len(w))
    expected = num * w / w.sum()
    varies = counts.std(0) > 0
    if np.any(np.abs(counts[0] - expected)[~varies] > 1e-6):
        return 0.0
    return mean_p_value(counts[:, varies], expected[varies])


@pytest.mark.parametrize(("name", "num"), CASES)
def test_mean_counts_are_exact_and_zero_weights_never_drawn(name, num):
    indices = draws(name, num)
    assert indices.shape == (REPLICATES, num)
    assert indices.dtype == np.int32
    assert np.all(W[indices] > 0)
    assert count_p_value(indices, num) > FALSE_ALARM


def top_heavy(key, log_weights, num):  # points at the left ends of their strata
    return jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weights)), jnp.arange(num) / num, side="right")


def unnormalized(key, log_weights, num):  # cumulative weights that do not end at 1
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights)) * 0.98
    return jnp.clip(jnp.searchsorted(cumulative, (jnp.arange(num) + jax.random.uniform(key)) / num), 0, 5)


def rounded_up(key, log_weights, num):  # residual resampling that rounds up
    copies = jnp.ceil(num * jax.nn.softmax(log_weights))
    return jnp.searchsorted(
        jnp.cumsum(copies), jax.random.randint(key, (num,), 0, copies.sum().astype(int)), side="right"
    )


@pytest.mark.parametrize("wrong", [top_heavy, unnormalized, rounded_up])
def test_wrong_schemes_are_rejected(wrong):
    assert count_p_value(replicate(wrong, 7)(LOG_W), 7) < FALSE_ALARM


@pytest.mark.parametrize("num", NUMS)
@pytest.mark.parametrize(("name", "bound"), [("systematic", 1), ("ssp", 1), ("stratified", 2)])
def test_counts_are_within_their_bound(name, bound, num):
    assert np.all(np.abs(counts_of(draws(name, num)) - num * W / W.sum()) < bound)


@pytest.mark.parametrize("num", NUMS)
def test_residual_and_ssp_keep_the_whole_copies(num):
    for name in ("residual", "ssp"):
        assert np.all(counts_of(draws(name, num)) >= np.floor(num * W / W.sum()))


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual", "ssp"])
def test_whole_numbers_of_copies_are_not_random(name):
    indices = replicates(name, 21)(jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf, -jnp.inf, 0.0, -jnp.inf]))
    assert np.all(counts_of(indices) == [7, 0, 7, 0, 0, 7, 0])


def test_iid_indices_are_independent_and_not_sorted():
    first, second = draws("iid", 4)[:, :2].T
    joint = np.bincount(first * len(W) + second, minlength=len(W) ** 2)
    expected = REPLICATES * np.outer(W, W).ravel() / W.sum() ** 2
    assert chi_square(joint, expected) > FALSE_ALARM
    first, second = draws("multinomial", 4)[:, :2].T  # sorted: not exchangeable
    assert np.all(first <= second)
    assert chi_square(np.bincount(first * len(W) + second, minlength=len(W) ** 2), expected) < FALSE_ALARM


def test_multinomial_counts_have_multinomial_variances():
    counts = counts_of(draws("multinomial", 21))
    w = W / W.sum()
    squares = (counts - 21 * w) ** 2
    assert mean_p_value(squares[:, w > 0], (21 * w * (1 - w))[w > 0]) > FALSE_ALARM


def chi_square(observed, expected):
    assert np.all(observed[expected == 0] == 0)
    observed, expected = observed[expected > 0], expected[expected > 0]
    return scipy.stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)


def pivotal_law(fractions):
    """The exact law of the Srinivasan sampling process by its definition: which particles get one more copy."""
    law = {}

    def settle(open_one, rest, taken, probability):
        i, p = open_one
        if not rest:
            taken = frozenset(taken | ({i} if round(p) else set()))
            law[taken] = law.get(taken, 0.0) + probability
            return
        (j, q), rest = rest[0], rest[1:]
        total = p + q
        if total < 1:  # one of the two gets it all, the other nothing
            outcomes = [((i, total), set(), p / total), ((j, total), set(), q / total)]
        else:  # one of the two is taken, the other keeps what is over
            outcomes = [((j, total - 1), {i}, (1 - q) / (2 - total)), ((i, total - 1), {j}, (1 - p) / (2 - total))]
        for now_open, new, chance in outcomes:
            if chance > 1e-9:
                settle(now_open, rest, taken | new, probability * chance)

    settle(fractions[0], fractions[1:], set(), 1.0)
    return law


@pytest.mark.parametrize("num", NUMS)
def test_ssp_has_the_law_of_the_sequential_process(num):
    expected = num * W / W.sum()
    probabilities = np.zeros(2**7)
    for taken, probability in pivotal_law([(i, e % 1) for i, e in enumerate(expected) if e % 1]).items():
        probabilities[sum(2**i for i in taken)] += probability
    extra = counts_of(draws("ssp", num)) - np.floor(expected)
    codes = (extra @ 2 ** np.arange(7)).astype(int)
    assert chi_square(np.bincount(codes, minlength=2**7), REPLICATES * probabilities) > FALSE_ALARM
    independent = counts_of(draws("residual", num)) - np.floor(expected)  # the same means, another law
    codes = np.clip((independent @ 2 ** np.arange(7)).astype(int), 0, 2**7 - 1)
    assert np.bincount(codes, minlength=2**7)[probabilities == 0].sum() > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_million_equal_particles_keep_their_copies_in_float32(name):
    num = 1_000_000
    log_weights = jnp.zeros(num, jnp.float32)
    for seed in range(2):
        distinct = np.count_nonzero(np.bincount(METHODS[name](seed, log_weights, num)))
        if name in ("multinomial", "iid"):
            # occupied cells of n balls in n cells: mean n (1 - 1/e), variance n (1/e - 2/e^2)
            sd = np.sqrt(num * (np.exp(-1) - 2 * np.exp(-2)))
            assert abs(distinct - num * (1 - np.exp(-1))) < 6 * sd
        else:
            assert distinct == num


def test_systematic_is_exact_at_five_million_particles():
    indices = resampling.systematic(0, jnp.zeros(5_000_000, jnp.float32), 5_000_000)
    np.testing.assert_array_equal(indices, np.arange(5_000_000))


@pytest.mark.parametrize("name", ["systematic", "ssp", "residual", "stratified"])
def test_small_weights_keep_their_share_at_a_million_particles(name):
    num = 1_000_000
    # half of the particles share a hundredth of the mass: in float32 each of them weighs less than the sums resolve
    is_light = np.random.default_rng(0).random(num) < 0.5
    log_weights = jnp.where(is_light, jnp.log(jnp.float32(0.01)), 0.0)
    indices = np.asarray(METHODS[name](3, log_weights, num))
    share = num * 0.01 * is_light.sum() / (0.01 * is_light.sum() + (~is_light).sum())
    # as the light ones are scattered at random, no scheme varies more than independent draws
    assert abs(is_light[indices].sum() - share) < 6 * np.sqrt(share)


@pytest.mark.parametrize("name", METHODS)
def test_extreme_ratios_and_invalid_weights(name):
    indices = replicates(name, LAST[name])(jnp.array([jnp.nan, -1e30, 0.0, jnp.inf, -70.0, -jnp.inf, -1e-3]))
    assert set(np.unique(indices)) == {2, 6}
    only = jnp.where(jnp.arange(7) == 5, -1e4, -jnp.inf)
    assert np.all(replicates(name, LAST[name])(only) == 5)


def test_zero_weights_are_unreachable_at_every_point():
    masses = jnp.array([0.0, 1e-9, 0.0, 0.1, 0.2, 0.0, 0.3, 0.0, 0.0])
    with jax.enable_x64(True):
        sums = jnp.cumsum(masses) / jnp.sum(masses)
        points = jnp.concatenate([sums, jnp.nextafter(sums, 0), jnp.nextafter(sums, 1), jnp.array([0.0, 1.0])])
        assert jnp.all(masses[resampling.invert64(masses, points)] > 0)
        assert resampling.invert64(masses, jnp.array([0.0, 1.0 - 2.0**-53])).tolist() == [1, 6]


def test_zero_weights_are_unreachable_where_the_parallel_sum_is_not_flat():
    masses = jax.random.uniform(jax.random.key(0), (10_000,)) * (jax.random.uniform(jax.random.key(1), (10_000,)) < 0.5)
    with jax.enable_x64(True):
        masses = masses.astype(jnp.float64) / 3
        sums = jnp.cumsum(masses)
        points = jnp.nextafter(sums, 0) / sums[-1]  # below the end of a flat piece that rounding has tilted
        naive = jnp.searchsorted(sums / sums[-1], points, side="right")
        assert jnp.any(masses[naive] == 0)
        assert jnp.all(masses[resampling.invert64(masses, points)] > 0)


def test_uniforms_are_fine_and_open():
    with jax.enable_x64(True):
        u = np.asarray(resampling.uniform64(jax.random.key(0), (100_000,)))
    assert u.dtype == np.float64
    assert scipy.stats.kstest(u, "uniform").pvalue > FALSE_ALARM
    assert scipy.stats.kstest((u * 2**24) % 1, "uniform").pvalue > FALSE_ALARM  # what float32 does not resolve
    extremes = np.array([0, 2**32 - 1], np.uint32)
    values = (extremes * 2.0**20 + (extremes >> 12) + 0.5) * 2.0**-52
    assert values[0] > 0
    assert values[1] < 1


@pytest.mark.parametrize("name", METHODS)
def test_no_weight_left(name):
    none = jnp.array([-jnp.inf, jnp.nan, -jnp.inf, jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf])
    with pytest.raises(ValueError, match="log_weights must hold a finite one, got 7 of which 2 are NaN"):
        METHODS[name](0, none, 7)
    assert np.all(replicates(name, LAST[name])(none) == np.arange(LAST[name]) % 7)  # traced
    assert weights.is_degenerate(none)


@pytest.mark.parametrize("name", METHODS)
def test_jit_and_vmap_change_nothing(name):
    num = LAST[name]
    keys = jax.random.split(jax.random.key(num), REPLICATES)
    each = [METHODS[name](key, LOG_W, num) for key in keys[:3]]
    np.testing.assert_array_equal(draws(name, num)[:3], jnp.stack(each))


@pytest.mark.parametrize("name", ["systematic", "multinomial"])
def test_the_precision_of_the_program_changes_nothing(name):
    log_weights = jax.random.normal(jax.random.key(6), (30,), jnp.float32)
    indices = METHODS[name](0, log_weights, 30)
    with jax.enable_x64(not jax.config.jax_enable_x64):
        np.testing.assert_array_equal(METHODS[name](0, log_weights, 30), indices)


def test_gradients_do_not_pass_through_indices():
    gradient = jax.grad(lambda w: jnp.sum(resampling.gather(w**2, resampling.systematic(0, w, 5))))(jnp.arange(5.0))
    assert jnp.all(jnp.isfinite(gradient))


def test_gather_takes_rows_of_every_leaf():
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([10, 20, 30])}
    rows = resampling.gather(tree, jnp.array([2, 0, 0, 2]))
    np.testing.assert_array_equal(rows["a"], tree["a"][jnp.array([2, 0, 0, 2])])
    np.testing.assert_array_equal(rows["b"], [30, 10, 10, 30])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"method must be one of 'systematic', .* got 'sorted'"):
        resampling.resample(0, LOG_W, 4, "sorted")
    for num in (0, -1, True):
        with pytest.raises(ValueError, match="num_samples"):
            resampling.systematic(0, LOG_W, num)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(N,\)"):
        resampling.systematic(0, jnp.zeros((2, 3)), 4)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(N,\)"):
        resampling.systematic(0, jnp.zeros(0), 4)
    with pytest.raises(ValueError, match="num_samples must be the number of particles 7"):
        resampling.killing(0, LOG_W, 8)
    with pytest.raises(ValueError, match="integer seed"):
        resampling.systematic(-1, LOG_W, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", resampling.SCHEMES)
def test_lists_are_weights(method):
    assert resampling.resample(0, [0, -np.inf], 2, method).tolist() == [0, 0]
    with pytest.raises(ValueError, match="log_weights must be a number or an array of numbers, got 'heavy'"):
        resampling.resample(0, "heavy", 2, method)
