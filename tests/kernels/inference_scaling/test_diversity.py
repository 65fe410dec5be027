"""Selection by diversity: one of each cluster, whatever the order, and different samples where some coincide."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bayesinf.conformance import FALSE_ALARM
from bayesinf.kernels.inference_scaling import (
    DiscreteChain,
    Diverse,
    Potential,
    Resample,
    as_text_generator,
    diverse_ancestors,
    diversity,
    first_component,
    infer,
    kmeans,
)

SIZES = (30, 1, 3, 5, 1)
CENTRES = 100.0 * np.random.default_rng(0).standard_normal((len(SIZES), 3))
LABELS = np.repeat(np.arange(len(SIZES)), SIZES)
SEPARATED = CENTRES[LABELS] + np.random.default_rng(1).standard_normal((LABELS.size, 3))
KEYS = jax.random.split(jax.random.key(0), 50)


def survivors(features, num, keys=KEYS):
    features = jnp.asarray(features)
    return np.asarray(jax.jit(jax.vmap(lambda key: diverse_ancestors(key, features, num)))(keys))


def representatives():
    """Of the separated clusters, by their definition."""
    chosen = []
    for label in range(len(SIZES)):
        members = np.flatnonzero(label == LABELS)
        distances = np.sum((SEPARATED[members] - SEPARATED[members].mean(0)) ** 2, axis=1)
        chosen.append(members[np.argmin(distances)])
    return np.sort(chosen)


@pytest.mark.usefixtures("compile_fast")
def test_one_of_each_separated_cluster_survives_and_it_is_the_one_in_the_middle():
    expected = np.tile(representatives(), (KEYS.size, 1))
    np.testing.assert_array_equal(survivors(SEPARATED, 5), expected)
    order = np.random.default_rng(2).permutation(LABELS.size)
    np.testing.assert_array_equal(np.sort(order[survivors(SEPARATED[order], 5)]), expected)


@pytest.mark.usefixtures("compile_fast")
def test_seeds_that_are_drawn_blindly_miss_clusters(monkeypatch):
    def blind(key, features, num):
        return features[jax.random.choice(key, features.shape[0], (num,), replace=False)]

    monkeypatch.setattr(diversity, "_seed", blind)
    diversity._kmeans.clear_cache()
    chosen = survivors(SEPARATED, 5)
    diversity._kmeans.clear_cache()
    num_found = np.array([len(set(LABELS[row])) for row in chosen])
    assert np.any(num_found < 5)


@pytest.mark.usefixtures("compile_fast")
def test_the_order_of_samples_does_not_matter():
    """In law, where seeds and ties decide: of a cluster of two both are equally near."""
    features = np.random.default_rng(3).standard_normal((7, 2))
    order = np.array([3, 6, 0, 5, 1, 2, 4])
    keys = jax.random.split(jax.random.key(1), 2_000)
    rows = np.sort(survivors(features, 3, keys[:1_000])), np.sort(order[survivors(features[order], 3, keys[1_000:])])
    table = np.stack([np.bincount(row @ [49, 7, 1], minlength=343) for row in rows])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 1
    assert scipy.stats.chi2_contingency(table).pvalue > FALSE_ALARM


@pytest.mark.usefixtures("compile_fast")
def test_of_two_that_are_equally_near_either_may_survive():
    chosen = survivors(np.array([[0.0], [1.0], [8.0], [9.0]]), 2, jax.random.split(jax.random.key(2), 1_000))
    assert np.all((chosen[:, 0] < 2) & (chosen[:, 1] >= 2))
    assert scipy.stats.binomtest(int(np.sum(chosen[:, 0])), 1_000).pvalue > FALSE_ALARM


@pytest.mark.parametrize("num_clusters", [2, 3])
@pytest.mark.usefixtures("compile_fast")
def test_clusters_are_the_best_of_all(num_clusters):
    features = np.random.default_rng(4).standard_normal((8, 2)) + 50.0
    found = kmeans(0, jnp.asarray(features), num_clusters, num_restarts=30)

    def inertia(labels):
        parts = [features[np.array(labels) == label] for label in set(labels)]
        return sum(((part - part.mean(0)) ** 2).sum() for part in parts)

    best = min(map(inertia, itertools.product(range(num_clusters), repeat=8)))
    assert float(found.inertia) == pytest.approx(best, rel=1e-3)
    for c in range(num_clusters):
        np.testing.assert_allclose(found.centroids[c], features[np.asarray(found.labels) == c].mean(0), rtol=1e-5)


@pytest.mark.usefixtures("compile_fast")
def test_coinciding_samples_are_different_survivors():
    two = np.array([[0.0, 1.0]] * 4 + [[2.0, 5.0]] * 2)
    for num in (2, 4, 6):
        chosen = survivors(two, num)
        assert np.all(np.diff(chosen, axis=1) > 0)
        assert np.all(np.any(chosen < 4, axis=1) & np.any(chosen >= 4, axis=1))
    same = survivors(np.ones((5, 2)), 3)
    assert np.all(np.diff(same, axis=1) > 0)
    # the nearest of all samples, instead of those in the cluster, would be one sample for several clusters
    clusters = kmeans(0, jnp.asarray(two), 4)
    distances = np.sum((two[:, None] - np.asarray(clusters.centroids)) ** 2, axis=2)
    assert len(set(np.argmin(distances, axis=0))) < 4


@pytest.mark.usefixtures("compile_fast")
def test_all_one_and_repeated():
    np.testing.assert_array_equal(survivors(SEPARATED[:6], 6)[0], np.arange(6))
    middle = np.argmin(np.sum((SEPARATED - SEPARATED.mean(0)) ** 2, axis=1))
    assert survivors(SEPARATED, 1)[0].tolist() == [middle]
    repeated = diverse_ancestors(KEYS[0], jnp.asarray(SEPARATED), 5, 12)
    found, counts = np.unique(repeated, return_counts=True)
    np.testing.assert_array_equal(found, representatives())
    assert set(counts) == {2, 3}


def test_the_first_component_is_where_tokens_vary():
    rng = np.random.default_rng(5)
    direction = np.array([0.6, 0.0, 0.8])
    coordinates = rng.standard_normal((4, 6))
    tokens = 7.0 + coordinates[..., None] * direction + 1e-3 * rng.standard_normal((4, 6, 3))
    np.testing.assert_allclose(first_component(jnp.asarray(tokens)), coordinates - coordinates.mean(), atol=0.02)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_selected_is_said():
    with pytest.raises(ValueError, match="num_survivors must be at most the number of samples 3"):
        diverse_ancestors(0, jnp.ones((3, 2)), 4)
    with pytest.raises(ValueError, match="num_particles must be at least num_survivors=2"):
        diverse_ancestors(0, jnp.ones((3, 2)), 2, 1)
    with pytest.raises(ValueError, match="features must be finite, got 1"):
        kmeans(0, jnp.array([[1.0], [jnp.nan]]), 1)
    with pytest.raises(ValueError, match="tokens must have 3 axes"):
        first_component(jnp.ones((3, 2)))


class TestDiverse:
    """Clusters choose at their steps, weights at the others."""

    CHAIN = DiscreteChain([0.05, 0.05, 0.9], [[1, 0, 0], [0, 1, 0], [0, 0, 1]], max_steps=3)
    LETTERS = staticmethod(lambda state: 1.0 * (state.last[:, None] == jnp.arange(3)))
    LIKES_A = Potential(lambda state: jnp.array([0.9, 0.1, 0.1])[state.last], kind="step")

    def run(self, potential=LIKES_A, **options):
        method = Diverse(self.LETTERS, Resample(1.0, scheme="systematic"), num_survivors=3, **options)
        return infer(0, self.CHAIN, potential, method=method, num_particles=90)

    def test_clusters_choose_at_their_steps_alone(self):
        by_clusters = self.run(cluster_steps=(1, 2))
        assert [by_clusters.texts.count(letter * 3) for letter in "abc"] == [30, 30, 30]
        mixed = self.run(cluster_steps=(1,))
        assert abs(mixed.texts.count("aaa") - 90 * 9 / 11) <= 1  # after thirds, by weights of 9 : 1 : 1
        assert np.isnan(mixed.log_evidence)
        # without a step for clusters it is the filter by weights
        by_weights = infer(0, self.CHAIN, self.LIKES_A, method=Resample(1.0, scheme="systematic"), num_particles=90)
        never = self.run(cluster_steps=(5,))
        assert abs(never.texts.count("aaa") - by_weights.texts.count("aaa")) <= 3

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="cluster_steps must be at least 1, got 0"):
            Diverse(self.LETTERS, cluster_steps=(0,))
        with pytest.raises(ValueError, match="features must be a function"):
            Diverse(3.0)
        with pytest.raises(ValueError, match="num_particles must be at least 4, got 2"):
            infer(0, self.CHAIN, self.LIKES_A, method=Diverse(self.LETTERS), num_particles=2)
        with pytest.raises(ValueError, match=r"shape \(N, F\), got \(8,\)"):
            infer(0, self.CHAIN, self.LIKES_A, method=Diverse(lambda state: 1.0 * state.last), num_particles=8)
        with pytest.raises(ValueError, match="runs in process"):
            infer(0, as_text_generator(self.CHAIN), self.LIKES_A, method=Diverse(self.LETTERS), num_particles=8)
