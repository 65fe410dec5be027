"""Split and cross-conformal sets, and predictive distributions: what they hold, and how often."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.models import conformal

pytestmark = pytest.mark.usefixtures("compile_fast")

NUM = 10_000


def share_p_value(hits, share, alternative="two-sided"):
    hits = np.asarray(hits)
    return scipy.stats.binomtest(int(hits.sum()), hits.size, share, alternative=alternative).pvalue


def keys(seed, num=NUM):
    return jax.random.split(jax.random.key(seed), num)


def noisy_line(key, n):
    """Heteroskedastic and skew: y = x + (1 + |x|)(e - 1), e exponential."""
    key_x, key_e = jax.random.split(key)
    x = jax.random.normal(key_x, (n,))
    return x, x + (1 + jnp.abs(x)) * (jax.random.exponential(key_e, (n,)) - 1)


# scores


@pytest.mark.parametrize(("penalty", "num_free"), [(0.0, 5), (0.3, 1), (0.05, 2)])
def test_adaptive_scores_by_their_definition(penalty, num_free):
    rng = np.random.default_rng(0)
    probs, u, label = rng.dirichlet(np.ones(5), 30), rng.uniform(size=30), rng.integers(0, 5, 30)
    every = conformal.raps(jnp.asarray(probs), u, penalty=penalty, num_free=num_free)
    for row, share, scores in zip(probs, u, every, strict=True):
        for k in range(5):
            rank = 1 + np.sum(row > row[k])
            truth = row[row > row[k]].sum() + share * row[k] + penalty * max(rank - num_free, 0)
            np.testing.assert_allclose(scores[k], truth, rtol=1e-5)
    own = conformal.raps(jnp.asarray(probs), u, label, penalty=penalty, num_free=num_free)
    np.testing.assert_array_equal(own, every[np.arange(30), label])


def test_pit_scores_are_uniform_for_counts():
    law = scipy.stats.poisson(1.3)
    y = law.rvs(NUM, random_state=0)
    u = np.random.default_rng(1).uniform(size=NUM)
    scores = 2 * conformal.pit_score(law.cdf(y), cdf_before=law.cdf(y - 1), u=u)
    assert scipy.stats.kstest(scores, "uniform").pvalue > FALSE_ALARM
    assert scipy.stats.kstest(2 * conformal.pit_score(law.cdf(y)), "uniform").pvalue < FALSE_ALARM


# split


@jax.jit
def split_intervals(keys):
    """Whether y is in, below and above each kind of interval; n = 29, alpha = 0.2."""

    def one(key):
        x, y = noisy_line(key, 30)
        scale = 1 + jnp.abs(x)
        absolute = conformal.calibrate(conformal.absolute_residual(y[1:], x[1:], scale[1:]))
        signed = conformal.calibrate(conformal.residual(y[1:], x[1:], scale[1:]))
        lower, upper = x - 1, x + 0.5
        quantile = conformal.calibrate(conformal.quantile_residual(y[1:], lower[1:], upper[1:]))
        found = [
            conformal.interval(absolute, x[0], scale[0], 0.2),
            conformal.interval(signed, x[0], scale[0], 0.2, kind="signed"),
            conformal.quantile_interval(quantile, lower[0], upper[0], 0.2),
        ]
        below, above = zip(*[(y[0] < one.lower, y[0] > one.upper) for one in found], strict=True)
        return jnp.stack([one.contains(y[0]) for one in found]), jnp.stack(below), jnp.stack(above)

    return jax.vmap(one)(keys)


def test_intervals_cover_exactly_as_often_as_ranks_say():
    """Of continuous scores the share is known: 24 of 30, and 3 of 30 at either end."""
    is_in, below, above = split_intervals(keys(2))
    for kind in range(3):
        assert share_p_value(is_in[:, kind], 0.8) > FALSE_ALARM
    assert share_p_value(below[:, 1], 0.1) > FALSE_ALARM
    assert share_p_value(above[:, 1], 0.1) > FALSE_ALARM
    assert share_p_value(above[:, 0], 0.1) < FALSE_ALARM  # the law is skew, and the first kind does not see it


def test_intervals_may_be_everything_or_nothing():
    calibrated = conformal.calibrate(jnp.array([1.0, 2.0, 3.0]))
    everything = conformal.interval(calibrated, jnp.zeros(2), 0.5, 0.1)
    assert bool(everything.contains(1e30).all())
    assert everything.width.tolist() == [np.inf, np.inf]
    nothing = conformal.interval(calibrated, jnp.zeros(2), 0.5, 1.0)
    assert not bool(nothing.contains(0.0).any())
    assert nothing.width.tolist() == [0.0, 0.0]
    inside = conformal.calibrate(jnp.array([-3.0, -2.0, -1.0]))  # every point was well inside
    crossed = conformal.quantile_interval(inside, jnp.array(0.0), jnp.array(1.0), 0.5)
    assert float(crossed.width) == 0.0
    assert not bool(crossed.contains(0.5))


def test_thresholds_of_groups_are_those_of_each_alone():
    rng = np.random.default_rng(3)
    scores, groups = rng.normal(size=40), rng.integers(0, 3, 40)
    weights, own = rng.uniform(size=40), rng.uniform(size=4)
    plain = conformal.calibrate(scores, groups=groups)
    weighted = conformal.calibrate(scores, groups=groups, weights=weights)
    asked = jnp.array([2, 0, 1, 5])
    for alpha in (0.1, 0.3):
        one = plain.threshold(alpha, test_group=asked)
        other = weighted.threshold(alpha, test_group=asked, test_weight=own)
        for place, group in enumerate(asked.tolist()):
            kept = groups == group
            assert one[place] == conformal.conformal_quantile(scores[kept], alpha)
            alone = conformal.conformal_quantile(
                scores[kept], alpha, weights=weights[kept], test_weight=jnp.asarray(own[place])
            )
            assert other[place] == alone
    p = weighted.p_value(jnp.zeros(4), test_group=asked, test_weight=own)
    direct = conformal.p_value(scores, jnp.zeros(4), weights=weights, test_weight=own, group=groups, test_group=asked)
    np.testing.assert_array_equal(p, direct)


@partial(jax.jit, static_argnames=("randomised", "smooth"))
def label_sets(keys, randomised, smooth):
    """Three labels; a classifier that is nearly certain, and often wrong: scores without u are tied at 1."""

    def one(key):
        key_x, key_y, key_u, key_p = jax.random.split(key, 4)
        guess = jax.random.randint(key_x, (20,), 0, 3)
        label = jnp.where(jax.random.bernoulli(key_y, 0.35, (20,)), (guess + 1) % 3, guess)
        probs = jax.nn.one_hot(guess, 3)
        u = jax.random.uniform(key_u, (20,)) if randomised else jnp.ones(20)
        calibrated = conformal.calibrate(conformal.aps(probs[1:], u[1:], label[1:]))
        scores = conformal.aps(probs[:1], u[:1])
        found = conformal.label_set(calibrated, scores, 0.2, key=key_p if smooth else None)
        return found.mask[0, label[0]]

    return jax.vmap(one)(keys)


def test_smoothed_label_sets_cover_exactly():
    assert share_p_value(label_sets(keys(4, 40_000), True, True), 0.8) > FALSE_ALARM


def test_label_sets_without_randomisation_hold_too_much():
    plain = label_sets(keys(4), False, False)
    assert share_p_value(plain, 0.8, "less") > FALSE_ALARM
    assert share_p_value(plain, 0.8) < FALSE_ALARM


def test_labels_are_covered_each():
    """Rare labels are missed by what covers on average."""

    def one(key):
        key_y, key_s = jax.random.split(key)
        label = jax.random.bernoulli(key_y, 0.3, (40,)).astype(int)
        scores = jax.random.exponential(key_s, (40, 2)) * jnp.array([1.0, 5.0])
        own = jnp.take_along_axis(scores, label[:, None], 1)[1:, 0]
        each = conformal.label_set(
            conformal.calibrate(own, groups=label[1:]), scores[:1], 0.2, test_group=jnp.arange(2)
        )
        average = conformal.label_set(conformal.calibrate(own), scores[:1], 0.2)
        return each.mask[0, label[0]], average.mask[0, label[0]], label[0]

    each, average, label = jax.jit(jax.vmap(one))(keys(5))
    for k in (0, 1):
        assert share_p_value(each[label == k], 0.8, "less") > FALSE_ALARM
    assert share_p_value(average[label == 1], 0.8, "less") < FALSE_ALARM


def test_promises_pass_through_transformations():
    scores = jax.random.normal(jax.random.key(0), (3, 20))
    calibrated = jax.jit(jax.vmap(conformal.calibrate))(scores)
    found = jax.vmap(lambda one: conformal.interval(one, 0.0, 1.0, 0.1))(calibrated)
    assert found.guarantee == conformal.calibrate(scores[0]).guarantee
    assert found.guarantee.kind == "exact"
    weighted = conformal.calibrate(scores[0], weights=jnp.ones(20), groups=jnp.zeros(20, int)).guarantee
    assert str(weighted) == (
        "exact: P(y in set | group) >= 1 - alpha, if points are independent within each group, and the weights are the "
        "likelihood ratios of their laws"
    )


# cross


def ridge_fits(x, y, is_kept):
    """Least squares with hardly any ridge, of the points that are kept, one fit for each row."""
    rows = x[:, None] * is_kept[:, :, None]
    gram = np.swapaxes(rows, -1, -2) @ rows + 1e-2 * np.eye(x.shape[-1])
    return np.linalg.solve(gram, np.swapaxes(rows, -1, -2) @ y[:, None, :, None])[..., 0]


def crossed(num):
    """Whether y of a new point is in each interval; 20 points, 15 coefficients, alpha = 0.2."""
    rng = np.random.default_rng(6)
    x, noise = rng.normal(size=(num, 21, 15)), rng.normal(size=(num, 21))
    y = x[..., 0] + noise
    x_new, y_new, x, y = x[:, 0], y[:, 0], x[:, 1:], y[:, 1:]
    folds = np.arange(20) % 5
    alone, by_fold = ridge_fits(x, y, 1.0 - np.eye(20)), ridge_fits(x, y, 1.0 * (folds != np.arange(5)[:, None]))
    residuals = np.abs(y - np.sum(x * alone, -1))
    by_folds = np.abs(y - np.sum(x * by_fold[:, folds], -1))
    in_sample = np.abs(y - np.sum(x * ridge_fits(x, y, np.ones((1, 20))), -1))

    @jax.vmap
    def contains(residuals, by_folds, in_sample, alone, by_fold, y_new):
        found = [
            conformal.jackknife_plus(residuals, alone, 0.2),
            conformal.cv_plus(by_folds, by_fold, jnp.asarray(folds), 0.2),
            conformal.jackknife_minmax(residuals, alone, 0.2),
            conformal.jackknife_plus(in_sample, alone, 0.2),
        ]
        return jnp.stack([one.contains(y_new) for one in found])

    predictions = [np.einsum("rfp,rp->rf", fits, x_new) for fits in (alone, by_fold)]
    return jax.jit(contains)(*map(jnp.asarray, (residuals, by_folds, in_sample, *predictions, y_new)))


def test_cross_intervals_cover():
    hits = crossed(2_000).T
    bounds = (0.6, 0.6 - np.sqrt(2 / 20), 0.8)
    for one, bound in zip(hits[:3], bounds, strict=True):
        assert share_p_value(one, bound, "less") > FALSE_ALARM
    assert share_p_value(hits[3], 0.6, "less") < FALSE_ALARM  # residuals of points that were fitted to


def test_the_ends_are_the_right_order_statistics():
    rng = np.random.default_rng(7)
    for n, alpha, k in ((9, 0.1, 9), (19, 0.1, 18), (20, 0.1, 19), (8, 0.1, 9)):
        residuals, predictions = rng.exponential(size=n), rng.normal(size=(4, n))
        found = conformal.jackknife_plus(jnp.asarray(residuals), jnp.asarray(predictions), alpha)
        above = np.sort(np.column_stack([predictions + residuals, np.full(4, np.inf)]))
        below = np.sort(np.column_stack([np.full(4, -np.inf), predictions - residuals]))
        np.testing.assert_allclose(found.upper, above[:, k - 1], rtol=1e-6)
        np.testing.assert_allclose(found.lower, below[:, n + 1 - k], rtol=1e-6)
        widest = conformal.jackknife_minmax(jnp.asarray(residuals), jnp.asarray(predictions), alpha)
        q = np.append(np.sort(residuals), np.inf)[k - 1]
        np.testing.assert_allclose(widest.upper, predictions.max(1) + q, rtol=1e-6)
        np.testing.assert_allclose(widest.lower, predictions.min(1) - q, rtol=1e-6)


def test_after_the_bootstrap_only_fits_without_the_point_count():
    rng = np.random.default_rng(8)
    n, num_fits = 12, 30
    y, fitted, predictions = rng.normal(size=n), rng.normal(size=(num_fits, n)), rng.normal(size=(3, num_fits))
    is_drawn = rng.uniform(size=(num_fits, n)) < 0.6
    is_drawn[:, 4] = True  # in every sample
    found = conformal.jackknife_after_bootstrap(*map(jnp.asarray, (y, fitted, is_drawn, predictions)), 0.2)
    kept = [i for i in range(n) if i != 4]
    residuals = np.array([abs(y[i] - fitted[~is_drawn[:, i], i].mean()) for i in kept])
    others = np.stack([predictions[:, ~is_drawn[:, i]].mean(1) for i in kept], 1)
    truth = conformal.jackknife_plus(jnp.asarray(residuals), jnp.asarray(others), 0.2)
    np.testing.assert_allclose(found.lower, truth.lower, rtol=1e-5)
    np.testing.assert_allclose(found.upper, truth.upper, rtol=1e-5)


def test_what_is_promised_is_said():
    residuals, predictions = jnp.ones(4), jnp.zeros(4)
    plus = conformal.jackknife_plus(residuals, predictions, 0.2)
    assert "1 - 2 alpha" in plus.guarantee.statement
    folds = conformal.cv_plus(residuals, predictions, jnp.arange(4), 0.2)
    assert "1 - 2 alpha - sqrt(2 / n)" in folds.guarantee.statement
    assert "2 alpha" not in conformal.jackknife_minmax(residuals, predictions, 0.2).guarantee.statement


# predictive distributions


@jax.jit
def transforms(keys):
    """Q(y, tau), Q(y, 1/2), the bounds, and the group, at the truth; rounded scores, in two groups of different law."""

    def one(key):
        key_y, key_group, key_tau = jax.random.split(key, 3)
        group = jax.random.bernoulli(key_group, 0.4, (20,)).astype(int)
        y = jnp.round(2 * jax.random.normal(key_y, (20,)) * (1 + group))
        calibrated = conformal.calibrate(conformal.residual(y[1:], 1.0, 2.0), groups=group[1:])
        found = conformal.predictive_distribution(calibrated, jnp.array(1.0), 2.0, test_group=group[0])
        bounds = found.bounds(y[0])
        return found.cdf(y[0], key_tau), 0.5 * (bounds[0] + bounds[1]), group[0]

    return jax.vmap(one)(keys)


def test_predictive_distributions_are_calibrated():
    found, middle, group = transforms(keys(9))
    for k in (0, 1):
        assert scipy.stats.kstest(np.asarray(found[group == k]), "uniform").pvalue > FALSE_ALARM
    assert scipy.stats.kstest(np.asarray(middle), "uniform").pvalue < FALSE_ALARM


def test_predictive_distributions_by_their_definition():
    scores = jnp.array([-1.0, 0.0, 0.0, 2.0])
    found = conformal.predictive_distribution(conformal.calibrate(scores), jnp.array([10.0, 20.0]), 2.0)
    lower, upper = found.bounds(jnp.array([10.0, 25.0]))
    np.testing.assert_allclose(lower, [0.2, 0.8], rtol=1e-6)
    np.testing.assert_allclose(upper, [0.8, 1.0], rtol=1e-6)
    tau = found.cdf(jnp.array([[10.0, 20.0]] * 500), 0)
    assert bool(((tau >= 0.2) & (tau <= 0.8)).all())
    assert float(tau[0, 0]) != float(tau[0, 1])
    for level, low, high in ((0.2, 8.0, 8.0), (0.4, 10.0, 10.0), (0.8, 14.0, 14.0), (0.1, -np.inf, 8.0)):
        assert found.quantile(level, side="lower")[0] == low
        assert found.quantile(level)[0] == high
        assert found.quantile(jnp.float32(level))[0] == high
    assert found.quantile(0.9)[0] == np.inf
    within = found.interval(0.4)
    assert (float(within.lower[0]), float(within.upper[0])) == (8.0, 14.0)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said():
    scores = jnp.arange(4.0)
    grouped = conformal.calibrate(scores, groups=jnp.zeros(4, int))
    with pytest.raises(ValueError, match="test_group must be given exactly where"):
        conformal.interval(grouped, 0.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="test_weight is relative to weights"):
        conformal.interval(conformal.calibrate(scores), 0.0, 1.0, 0.1, test_weight=1.0)
    with pytest.raises(ValueError, match="kind must be one of 'absolute', 'signed', got 'cqr'"):
        conformal.interval(conformal.calibrate(scores), 0.0, 1.0, 0.1, kind="cqr")
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        conformal.interval(conformal.calibrate(scores), 0.0, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"scores must have shape \(n,\)"):
        conformal.calibrate(scores[None])
    with pytest.raises(ValueError, match="groups must have the shape"):
        conformal.calibrate(scores, groups=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="label must have the shape"):
        conformal.lac(jnp.full((3, 2), 0.5), jnp.zeros(2, int))
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=r"label must be in \[0, 2\)"):
            conformal.aps(jnp.full((3, 2), 0.5), 0.5, jnp.array([0, 1, wrong]))
    for wrong in (jnp.ones((3, 2)), jnp.array([1.5, -0.5]), jnp.array([0.5, jnp.nan])):
        for score in (lambda probs: conformal.aps(probs, 0.5), lambda probs: conformal.raps(probs, 0.5), conformal.lac):
            with pytest.raises(ValueError, match="probs must hold probabilities that sum to 1"):
                score(wrong)
    for wrong in (-0.1, 1.1, jnp.nan):
        with pytest.raises(ValueError, match=r"u must be uniforms in \[0, 1\]"):
            conformal.aps(jnp.full((3, 2), 0.5), wrong)
    with pytest.raises(ValueError, match="cdf_before and u"):
        conformal.pit_score(0.5, u=0.5)
    with pytest.raises(ValueError, match=r"predictions must have shape \(..., n\)"):
        conformal.jackknife_plus(scores, jnp.zeros(3), 0.1)
    with pytest.raises(ValueError, match="folds must have the shape"):
        conformal.cv_plus(scores, jnp.zeros(2), jnp.zeros(3, int), 0.1)
    with pytest.raises(ValueError, match="fitted and is_drawn must have shape"):
        conformal.jackknife_after_bootstrap(scores, jnp.zeros((2, 4)), jnp.zeros((2, 3), bool), jnp.zeros(2), 0.1)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_crps_is_the_integral(is_weighted):
    """Of the squared distance of two step functions, between their jumps; by group, and with scores missing."""
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=30).round(1), rng.integers(0, 3, 30)
    scores[[3, 17]] = np.nan
    weights = rng.exponential(size=30) if is_weighted else None
    calibrated = conformal.calibrate(scores, weights=weights, groups=groups, missing="drop")
    centre, scale, group = np.array([0.0, 1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.5, 1.0]), np.array([0, 1, 2, 0])
    y = np.array([0.3, -4.0, -1.9, 9.0])
    found = conformal.predictive_distribution(calibrated, centre, scale, test_group=group)
    for i, score in enumerate(np.asarray(found.crps(y))):
        is_in = (groups == group[i]) & ~np.isnan(scores)
        points = centre[i] + scale[i] * scores[is_in]
        w = np.ones(is_in.sum()) if weights is None else weights[is_in]
        jumps = np.sort(np.append(points, y[i]))
        middle = (jumps[1:] + jumps[:-1]) / 2
        cdf = (w * (points <= middle[:, None])).sum(1) / w.sum()
        np.testing.assert_allclose(score, np.sum(np.diff(jumps) * (cdf - (middle >= y[i])) ** 2), rtol=1e-4)
        if weights is None:
            lower, upper = (np.asarray(bound) for bound in found.bounds(middle[:, None]))
            is_between = (lower[:, i] <= cdf + 1e-6) & (cdf <= upper[:, i] + 1e-6)
            assert np.all(is_between[np.diff(jumps) > 1e-3])  # not at ties
    empty = conformal.predictive_distribution(calibrated, 0.0, test_group=7)
    assert float(empty.crps(0.0)) == np.inf


def test_infinite_sets_have_a_reason():
    few = conformal.calibrate(np.arange(8.0))
    assert few.why_infinite(0.1) == (
        "of 8 calibration scores no threshold is exceeded with probability 0.1 at most: it takes 9"
    )
    assert float(few.threshold(0.1)) == np.inf
    enough = conformal.calibrate(np.arange(9.0))
    assert np.isfinite(enough.threshold(0.1))
    assert enough.why_infinite(0.1) == ""
    assert enough.why_infinite(0.0) == "alpha = 0 allows no miss at all"
    grouped = conformal.calibrate(np.arange(12.0), groups=np.arange(12) // 10)
    assert grouped.why_infinite(0.1, test_group=np.array([0, 1])).startswith("of 2 calibration scores in group 1")
    weighted = conformal.calibrate(np.arange(12.0), weights=np.ones(12))
    assert "more than alpha = 0.1 of the weight" in weighted.why_infinite(0.1, test_weight=5.0)
    impossible = conformal.calibrate(np.where(np.arange(40) < 8, np.inf, 0.0))  # as of a model that rules out what came
    assert impossible.why_infinite(0.1) == "of the calibration scores more than the share 0.1 are infinite themselves"
    assert impossible.why_infinite(0.25) == ""


@pytest.mark.usefixtures("unchecked")
def test_scores_that_are_nan_are_missing_or_refused():
    """Never ranked as if they were large, or small."""
    scores = np.array([0.5, np.nan, 2.0, 1.0])
    kept = scores[[0, 2, 3]]
    dropped = conformal.calibrate(scores, missing="drop")
    assert float(dropped.threshold(0.5)) == float(conformal.calibrate(kept).threshold(0.5))
    zeros, folds = np.zeros(4), np.zeros(4, int)
    for name, call in (
        ("scores", lambda **how: conformal.calibrate(scores, **how)),
        ("scores", lambda **how: conformal.conformal_quantile(scores, 0.5, **how)),
        ("calibration_scores", lambda **how: conformal.p_value(scores, 1.0, **how)),
        ("residuals", lambda **how: conformal.jackknife_plus(jnp.asarray(scores), jnp.asarray(zeros), 0.5, **how)),
        ("predictions", lambda **how: conformal.jackknife_minmax(jnp.asarray(zeros), jnp.asarray(scores), 0.5, **how)),
        (
            "residuals",
            lambda **how: conformal.cv_plus(jnp.asarray(scores), jnp.zeros(1), jnp.asarray(folds), 0.5, **how),
        ),
    ):
        with pytest.raises(ValueError, match=rf"{name} must not be NaN, got 1 that are, at \[1\].*missing='drop'"):
            call()
        call(missing="drop")
    with pytest.raises(ValueError, match="missing must be one of 'raise', 'drop', got 'skip'"):
        conformal.calibrate(scores, missing="skip")
    with pytest.raises(ValueError, match="y must not be NaN"):
        conformal.jackknife_after_bootstrap(
            jnp.asarray(scores), jnp.zeros((2, 4)), jnp.zeros((2, 4), bool), jnp.zeros(2), 0.5
        )
    for call in (
        lambda: conformal.pac_threshold(scores, 0.5, 0.5),
        lambda: conformal.batch_quantile_bound(scores, m=1, zeta=1, alpha=0.5),
    ):
        with pytest.raises(ValueError, match=r"cal must not be NaN, got 1 that are, at \[1\]; leave missing ones out"):
            call()
    with pytest.raises(ValueError, match="scores must not be NaN"):
        conformal.visit_conformal(np.zeros(4, int), scores, 0, 0.5)
    found = conformal.exchangeability_test(0, np.append(scores, [np.nan] * 50))
    assert np.isnan(found.p_values[1])
    assert not np.isnan(found.log_martingale).any()
    assert float(found.p) > 0.2  # NaN would be the lowest p-values there are
