import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from partitions import assert_is_a_partition, assert_same_bits, heavy_tailed, uneven
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from kclib.errors import InvalidValueError
from kclib.kmeans import _ward, fit, tree

GRIDS = arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 9])),
    elements=st.integers(-2, 2).map(float),
)


def cost(points, mass, labels):
    """Return the inertia of some clusters, from its definition."""
    result = 0.0
    for j in np.unique(labels):
        rows = np.flatnonzero(labels == j)
        mean = np.average(points[rows], axis=0, weights=mass[rows])
        result += (mass[rows] * np.square(points[rows] - mean).sum(1)).sum()
    return result


def raised(points, mass, one, other):
    """Return how much merging two clusters raises the inertia."""
    rows = np.array(one + other)
    apart = np.repeat([0, 1], [len(one), len(other)])
    return cost(points[rows], mass[rows], np.zeros(len(rows))) - cost(points[rows], mass[rows], apart)


@pytest.mark.parametrize("d", [1, 9, 25])
def test_merges_of_equal_masses_are_scipys(d):
    points = heavy_tailed(300, d)
    theirs = linkage(points.astype(np.float64), "ward")
    mine = _ward.merges(points, np.ones(300, np.float32))
    np.testing.assert_allclose(np.sqrt(2 * np.sort(mine.heights)), theirs[:, 2], rtol=1e-4)
    for k in (1, 2, 17, 150, 299, 300):
        assert adjusted_rand_score(mine.cut(k), fcluster(theirs, k, "maxclust")) == 1


def test_every_merge_of_weighted_points_costs_least():
    points, mass = heavy_tailed(40), uneven(40) + np.float32(0.1)
    mine = _ward.merges(points, mass)
    points, mass = points.astype(np.float64), mass.astype(np.float64)
    for k in range(40, 1, -1):
        before, after = mine.cut(k), mine.cut(k - 1)
        clusters = [np.flatnonzero(before == j).tolist() for j in range(k)]
        least = min(raised(points, mass, a, b) for i, a in enumerate(clusters) for b in clusters[:i])
        assert least * 0.999 <= cost(points, mass, after) - cost(points, mass, before) <= least * 1.001 + 1e-7


def test_points_without_mass_are_merged_first():
    points, mass = heavy_tailed(200), np.repeat([0, 1], 100).astype(np.float32)
    clusters = _ward.merges(points, mass).cut(90)
    assert len(np.unique(clusters)) == 90
    assert len(np.unique(clusters[100:])) >= 85


@given(GRIDS, st.booleans(), st.data())
@settings(deadline=None, max_examples=25)
def test_cuts_of_points_with_many_duplicates_count_every_point(points, weighted, data):
    sample_weight = uneven(len(points)) if weighted else None
    distinct = len(np.unique(points, axis=0))
    made = tree(points, leaves=data.draw(st.integers(1, 50)), sample_weight=sample_weight)
    k = data.draw(st.integers(1, made.n_leaves))
    found = made.cut(k)
    assert len(found.centres) == len(found.counts) <= k
    assert len(found.centres) == k or made.n_leaves < distinct
    labels = found.leaves[made.labels]
    np.testing.assert_array_equal(np.bincount(labels, minlength=len(found.centres)), found.counts)
    assert made.counts.sum() == found.counts.sum() == len(points)
    assert found.counts.min() > 0
    whole = made.fit(data.draw(st.integers(1, len(points))))
    assert_is_a_partition(points, len(whole.centres), whole, sample_weight)


def test_a_tree_of_all_points_has_the_inertia_of_its_labels():
    points = heavy_tailed(500)
    made = tree(points)
    assert made.n_leaves == 500
    found = made.cut(20)
    errors = np.square(points - found.centres[found.leaves[made.labels]]).sum(dtype=np.float64)
    assert found.inertia == pytest.approx(errors, rel=1e-5)
    assert made.cut(500).inertia == 0


@pytest.mark.parametrize("sample_weight", [None, uneven(30_000)], ids=["alike", "weighted"])
@pytest.mark.parametrize("shift", [0, 100])
def test_the_inertia_of_a_cut_is_about_that_of_exact_labels(sample_weight, shift):
    points = shift + heavy_tailed(30_000)
    made = tree(points, leaves=1000, sample_weight=sample_weight)
    assert made.n_leaves == 1000
    for k in (10, 100, 1000):
        found, exact = made.cut(k), made.fit(k, max_iter=0)
        np.testing.assert_allclose(found.centres, exact.centres, rtol=1e-5, atol=1e-5)
        assert found.inertia == pytest.approx(exact.inertia, rel=0.02)
        assert_is_a_partition(points, k, exact, sample_weight)


def test_more_clusters_have_less_inertia():
    made = tree(heavy_tailed(20_000), leaves=2000)
    inertias = [made.cut(k).inertia for k in (1, 2, 5, 20, 100, 300, 1000, 2000)]
    assert (np.diff(inertias) < 0).all()


@pytest.mark.parametrize("k", [16, 64, 300, 1024])
def test_a_fit_from_the_tree_is_no_worse_than_one_alone(k):
    points = heavy_tailed(20_000)
    made, alone = tree(points, leaves=2048), fit(points, k).inertia
    assert made.fit(k).inertia <= 1.01 * alone
    assert made.fit(k, max_iter=1).inertia <= 1.03 * alone


@pytest.mark.parametrize("sample_weight", [None, uneven(5000)], ids=["alike", "weighted"])
def test_a_tree_has_the_same_bits_on_any_number_of_threads(sample_weight):
    points = heavy_tailed(5000)
    one, *others = (tree(points, leaves=700, sample_weight=sample_weight, n_threads=n) for n in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other.labels, one.labels)
        for k in (5, 100, 700):
            mine, theirs = other.cut(k), one.cut(k)
            np.testing.assert_array_equal(mine.centres, theirs.centres)
            np.testing.assert_array_equal(mine.counts, theirs.counts)
            np.testing.assert_array_equal(mine.leaves, theirs.leaves)
            assert mine.inertia == theirs.inertia
        for k in (5, 2000):
            assert_same_bits(other.fit(k), one.fit(k))


def test_points_without_weight_get_leaves_and_change_no_inertia():
    points, others = heavy_tailed(900), heavy_tailed(200, seed=1)
    sample_weight = np.repeat([1.0, 0.0], [900, 200])
    made = tree(np.concatenate([points, others]), leaves=1000, sample_weight=sample_weight)
    found = made.fit(30)
    assert_is_a_partition(np.concatenate([points, others]), 30, found, sample_weight)
    assert found.inertia <= 1.02 * tree(points).fit(30).inertia


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_a_tree_of_huge_or_tiny_points_is_that_of_plain_ones(factor):
    points = heavy_tailed(3000)
    plain, scaled = tree(points, leaves=500).cut(40), tree(factor * points, leaves=500).cut(40)
    assert scaled.inertia == pytest.approx(factor**2 * plain.inertia, rel=0.05)


def test_a_tree_is_told_what_it_cannot_do():
    made = tree(np.eye(4))
    for k in (0, 5, 2.0):
        with pytest.raises(InvalidValueError, match=f"n_clusters is {k}; .* 1 to 4"):
            made.cut(k)
        with pytest.raises(InvalidValueError, match=f"n_clusters is {k}; .* 1 to 4"):
            made.fit(k)
    with pytest.raises(InvalidValueError, match="leaves is 0"):
        tree(np.eye(4), leaves=0)
    with pytest.raises(InvalidValueError, match="sample_weight"):
        tree(np.eye(4), sample_weight=[1, 1, 1, -1])


def test_the_progress_of_a_tree_sums_to_one():
    steps = []
    tree(heavy_tailed(2000), leaves=300, progress=steps.append)
    assert sum(step.share for step in steps) == pytest.approx(1)
