import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from partitions import heavy_tailed
from scipy.spatial.distance import cdist
from sklearn.datasets import make_blobs

from kclib.kmeans._seeding import shares, split


def run(points, cells, counts, sample_weight=None, *, rounds=5, trials=3, seed=0, n_threads=2, done=None):
    points = np.asarray(points, np.float32)
    sample_weight = None if sample_weight is None else np.asarray(sample_weight, np.float32)
    return split(
        points, sample_weight, np.asarray(cells, np.int32), np.asarray(counts),
        rounds=rounds, trials=trials, seed=seed, n_threads=n_threads, done=done,
    )  # fmt: skip


def cells_and_counts(n, n_cells, seed=0):
    draw = np.random.default_rng(seed)
    cells = draw.integers(0, n_cells, n)
    return cells, draw.integers(1, np.maximum(np.bincount(cells, minlength=n_cells), 1), endpoint=True)


def assert_labels_stay_in_their_cells(cells, counts, centres, labels):
    assert (centres.dtype, labels.dtype) == (np.float32, np.int32)
    assert (len(centres), len(labels)) == (np.sum(counts), len(cells))
    assert np.isfinite(centres).all()
    owners = np.repeat(np.arange(len(counts)), counts)
    np.testing.assert_array_equal(owners[labels], cells)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=25)
def test_shares_sum_to_k_with_at_least_one_a_cell_and_at_most_its_size(cells, data):
    inertias, sizes = np.array([x[0] for x in cells]), np.array([x[1] for x in cells])
    n_clusters = data.draw(st.integers(np.count_nonzero(sizes), sizes.sum()))
    result = shares(inertias, sizes, n_clusters, 9)
    assert result.sum() == n_clusters
    assert ((result >= np.minimum(sizes, 1)) & (result <= sizes)).all()


@pytest.mark.parametrize("d", [1, 9])
def test_shares_follow_the_power_of_the_inertia(d):
    assert shares(np.array([1.0, 2 ** ((d + 2) / d)]), np.array([99, 99]), 30, d).tolist() == [10, 20]


def test_what_a_full_cell_cannot_take_goes_to_the_others():
    assert shares(np.array([1e9, 1.0, 1.0]), np.array([5, 99, 99]), 25, 9).tolist() == [5, 10, 10]


@pytest.mark.parametrize("d", [1, 9, 25, 49])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_cluster_in_a_cell_is_its_weighted_mean(d, weighted):
    points, cells = heavy_tailed(300, d), np.arange(300) % 7
    sample_weight = np.random.default_rng(1).uniform(0, 3, 300).astype(np.float32) if weighted else None
    centres, labels = run(points, cells, [1] * 7, sample_weight)
    expected = [
        np.average(points[cells == cell], axis=0, weights=sample_weight[cells == cell] if weighted else None)
        for cell in range(7)
    ]
    np.testing.assert_allclose(centres, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(labels, cells)


def test_centres_come_cell_after_cell():
    points = [[0], [10], [4], [12], [100]]
    centres, labels = run(points, [0, 2, 0, 2, 3], [1, 0, 2, 1], [1, 1, 3, 1, 1])
    assert (centres[0].tolist(), sorted(centres[1:3].ravel()), centres[3].tolist()) == ([3], [10, 12], [100])
    assert centres[labels].ravel().tolist() == [3, 10, 3, 12, 100]


@given(
    st.integers(1, 150),
    st.sampled_from([1, 9, 25, 49]),
    st.integers(1, 12),
    st.sampled_from(["none", "ones", "some zero", "all zero"]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_labels_of_points_stay_in_their_cells(n, d, n_cells, mass, duplicates, seed):
    draw = np.random.default_rng(seed)
    points = draw.integers(-1, 2, (n, d)) if duplicates else heavy_tailed(n, d, seed)
    cells = draw.integers(0, n_cells, n)
    sizes = np.bincount(cells, minlength=n_cells)
    counts = draw.integers(np.minimum(sizes, 1), sizes, endpoint=True)
    sample_weight = {
        "none": None,
        "ones": np.ones(n),
        "some zero": draw.integers(0, 3, n),
        "all zero": np.zeros(n),
    }
    centres, labels = run(points, cells, counts, sample_weight[mass], seed=seed)
    assert_labels_stay_in_their_cells(cells, counts, centres, labels)


@pytest.mark.parametrize("d", [1, 9, 25, 49])
@pytest.mark.parametrize("counts", [[2, 5, 20], [70, 130, 1]])
def test_distinct_points_have_the_nearest_of_their_cells_centres(d, counts):
    points, cells = heavy_tailed(3000, d), np.arange(3000) % 3
    centres, labels = run(points, cells, counts)
    assert_labels_stay_in_their_cells(cells, counts, centres, labels)
    distances = cdist(points.astype(np.float64), centres.astype(np.float64), "sqeuclidean")
    own = distances[np.arange(len(points)), labels]
    distances[np.repeat(np.arange(3), counts) != cells[:, None]] = np.inf
    extent = np.square(points.astype(np.float64)).sum(1).max()
    assert (own <= 1.0001 * distances.min(1) + 16 * np.finfo(np.float32).eps * extent).all()


@pytest.mark.parametrize("d", [1, 9, 25, 49])
def test_as_many_clusters_as_distinct_points_in_a_cell_are_these(d):
    distinct = heavy_tailed(40, d)
    rows = np.concatenate([np.arange(40), np.random.default_rng(0).integers(0, 40, 200)])
    cells = (rows >= 5).astype(int)
    centres, labels = run(distinct[rows], cells, [5, 35])
    np.testing.assert_array_equal(centres[labels], distinct[rows])


def test_more_clusters_than_distinct_points_still_lose_nothing():
    points = np.repeat([[1.0], [2.0], [9.0]], 10, axis=0)
    centres, labels = run(points, np.zeros(30), [8])
    assert len(centres) == 8
    np.testing.assert_array_equal(centres[labels], points)


@pytest.mark.parametrize("k", [1, 3])
def test_points_without_weight_draw_no_centre(k):
    crowd = np.random.default_rng(0).normal(size=(60, 9))
    points, sample_weight = np.concatenate([crowd, np.full((3, 9), 1e3)]), np.repeat([1, 0], [60, 3])
    centres, _ = run(points, np.zeros(63), [k], sample_weight)
    assert (np.linalg.norm(centres, axis=1) < 9).all()


def test_a_heavy_point_counts_as_often_as_its_weight():
    points = np.array([[0.0], [1.0], [2.0], [50.0], [51.0]])
    sample_weight = np.array([3, 1, 2, 1, 4])
    expected = run(np.repeat(points, sample_weight, axis=0), np.zeros(11), [2])[0]
    centres, _ = run(points, np.zeros(5), [2], sample_weight)
    np.testing.assert_allclose(sorted(centres.ravel()), sorted(expected.ravel()), rtol=1e-6)


@pytest.mark.parametrize("n", [400, 8000])
def test_well_separated_blobs_are_found_in_each_cell(n):
    points, truth = make_blobs(n, 9, centers=10, cluster_std=0.01, random_state=0)
    cells = (truth >= 4).astype(int)
    centres, labels = run(points, cells, [4, 6])
    assert len({*zip(truth.tolist(), labels.tolist(), strict=True)}) == 10
    assert np.linalg.norm(points - centres[labels], axis=1).max() < 0.1


def test_blobs_whose_points_take_turns_are_all_found():
    blob, draw = np.arange(4096) % 16, np.random.default_rng(0)
    points = draw.normal(size=(16, 9))[blob] + 0.01 * draw.normal(size=(4096, 9))
    centres, labels = run(points, np.zeros(4096), [16], trials=5, rounds=20)
    assert len(np.unique(labels)) == 16
    assert np.linalg.norm(points - centres[labels], axis=1).max() < 0.1


def test_rounds_of_lloyd_lower_the_inertia():
    points, (cells, counts) = heavy_tailed(5000), cells_and_counts(5000, 40)
    inertias = []
    for rounds in (0, 1, 5):
        centres, labels = run(points, cells, counts // 4 + 1, rounds=rounds)
        inertias.append(np.square(points - centres[labels]).sum())
    assert inertias[0] > inertias[1] > inertias[2]


@pytest.mark.parametrize("d", [1, 9, 49])
def test_same_seed_gives_the_same_bits_on_any_number_of_threads(d):
    points, (cells, counts) = heavy_tailed(3000, d), cells_and_counts(3000, 30)
    counts = counts // 4 + 1
    one, *others = (run(points, cells, counts, seed=7, n_threads=count) for count in (1, 2, 3))
    for centres, labels in others:
        np.testing.assert_array_equal(centres, one[0])
        np.testing.assert_array_equal(labels, one[1])
    assert not np.array_equal(run(points, cells, counts, seed=8)[0], one[0])


@pytest.mark.parametrize("n_cells", [1, 400])
def test_shares_of_the_work_sum_to_one(n_cells):
    done = []
    run(heavy_tailed(1000), np.arange(1000) % n_cells, [2] * n_cells, done=done.append)
    assert sum(done) == pytest.approx(1)
