import signal
import subprocess
import sys

import faiss
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from kclib import kmeans as module
from kclib.errors import InvalidValueError
from kclib.kmeans import kmeans

GRIDS = arrays(
    np.float32, st.tuples(st.integers(1, 40), st.integers(1, 9)), elements=st.integers(-2, 2).map(float)
)


@pytest.fixture
def threads():
    before = faiss.omp_get_max_threads()
    yield (1, 2, 2)
    faiss.omp_set_num_threads(before)


def heavy_tailed(n, d=9, seed=0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, d)) * draw.lognormal(-3, 1.5, size=(n, 1))).astype(np.float32)


def assert_is_a_partition(points, n_clusters, result):
    distinct = len(np.unique(points, axis=0))
    assert result.centres.shape == (min(n_clusters, distinct), points.shape[1])
    assert (result.centres.dtype, result.labels.dtype) == (np.float32, np.int32)
    assert (np.bincount(result.labels, minlength=len(result.centres)) > 0).all()
    assert len(np.unique(result.centres, axis=0)) == len(result.centres)
    distances = cdist(points.astype(np.float64), result.centres.astype(np.float64))
    own = distances[np.arange(len(points)), result.labels]
    rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(points.astype(np.float64), axis=1)
    assert (own <= (1 + 1e-5) * distances.min(1) + rounding).all()
    assert result.inertia == pytest.approx(np.square(own).sum(), rel=1e-4, abs=np.square(rounding).sum())


def test_two_pairs_on_a_line_are_found_with_their_means_and_inertia():
    result = kmeans(np.array([[0.0], [2.0], [10.0], [14.0]]), 2)
    assert sorted(result.centres.ravel()) == [1, 12]
    assert result.centres[result.labels].ravel().tolist() == [1, 1, 12, 12]
    assert result.inertia == 1 + 1 + 4 + 4


def test_one_cluster_is_the_mean():
    points = heavy_tailed(100)
    result = kmeans(points, 1)
    np.testing.assert_allclose(result.centres[0], points.mean(0, dtype=np.float64), rtol=1e-5)
    assert result.inertia == pytest.approx(len(points) * points.var(0, dtype=np.float64).sum(), rel=1e-5)


@given(GRIDS, st.data())
@settings(deadline=None, max_examples=40)
def test_any_k_on_points_with_many_duplicates_is_a_partition(points, data):
    n_clusters = data.draw(st.integers(1, len(points)))
    assert_is_a_partition(points, n_clusters, kmeans(points, n_clusters))


@given(st.integers(1, 120), st.sampled_from([1, 9, 49]), st.integers(0, 99), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_any_k_on_heavy_tailed_points_is_a_partition(n, d, seed, share):
    points, n_clusters = heavy_tailed(n, d, seed), 1 + round(share * (n - 1))
    result = kmeans(points, n_clusters, seed=seed)
    assert len(result.centres) == n_clusters
    assert_is_a_partition(points, n_clusters, result)


@pytest.mark.parametrize("n_clusters", [1, 5, 30, 60, 99, 100])
def test_far_outliers_have_centres_and_the_rest_does_not_starve(n_clusters):
    points = heavy_tailed(100)
    points[3], points[77] = 1e4, -1e6
    result = kmeans(points, n_clusters)
    assert_is_a_partition(points, n_clusters, result)
    if n_clusters >= 5:
        assert np.bincount(result.labels)[result.labels[[3, 77]]].tolist() == [1, 1]
        assert result.inertia < np.square(points[np.abs(points).max(1) < 1e3]).sum()


def test_as_many_clusters_as_distinct_points_lose_nothing():
    distinct = heavy_tailed(30)
    points = np.concatenate([distinct, distinct[::-1], distinct[:5]])
    for n_clusters in (30, 40, 65):
        result = kmeans(points, n_clusters)
        assert (len(result.centres), result.inertia) == (30, 0)
        np.testing.assert_array_equal(result.centres[result.labels], points)


@pytest.mark.parametrize("n_clusters", [1, 3, 20])
def test_all_zero_points_are_one_cluster(n_clusters):
    result = kmeans(np.zeros((20, 9)), n_clusters)
    assert (result.centres.tolist(), set(result.labels), result.inertia) == ([[0] * 9], {0}, 0)


@pytest.mark.parametrize("n_clusters", [4, 64, 2900])
def test_same_seed_gives_the_same_bits_on_one_thread_and_on_two(n_clusters, threads):
    points, results = heavy_tailed(5000), []
    for count in threads:
        faiss.omp_set_num_threads(count)
        results.append(kmeans(points, n_clusters, seed=7))
        assert faiss.omp_get_max_threads() == count
    assert kmeans(points, n_clusters, seed=8).inertia != results[0].inertia
    for other in results[1:]:
        np.testing.assert_array_equal(other.centres, results[0].centres)
        np.testing.assert_array_equal(other.labels, results[0].labels)
        assert other.inertia == results[0].inertia


def test_well_separated_blobs_are_recovered():
    points, truth = make_blobs(600, 9, centers=8, cluster_std=0.05, random_state=0)
    assert adjusted_rand_score(truth, kmeans(points, 8).labels) == 1


@pytest.mark.parametrize(
    ("points", "n_clusters"),
    [
        (make_blobs(2000, 9, centers=10, random_state=0)[0], 10),
        (heavy_tailed(3000), 100),
        (heavy_tailed(300), 200),
    ],
    ids=["blobs", "heavy tails", "more than half"],
)
def test_inertia_is_close_to_scikit_learns(points, n_clusters):
    theirs = KMeans(n_clusters, n_init=3, random_state=0).fit(points.astype(np.float64)).inertia_
    assert kmeans(points, n_clusters).inertia <= 1.05 * theirs


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=40)
def test_shares_sum_to_k_with_at_least_one_a_cell_and_at_most_its_size(cells, data):
    inertias, sizes = np.array([x[0] for x in cells]), np.array([x[1] for x in cells])
    n_clusters = data.draw(st.integers(np.count_nonzero(sizes), sizes.sum()))
    shares = module._share(inertias, sizes, n_clusters, 9)
    assert shares.sum() == n_clusters
    assert ((shares >= np.minimum(sizes, 1)) & (shares <= sizes)).all()


def test_shares_follow_the_power_of_the_inertia():
    assert module._share(np.array([1.0, 2 ** (11 / 9)]), np.array([99, 99]), 30, 9).tolist() == [10, 20]


@pytest.mark.parametrize("n_clusters", [1, 20, 150, 200])
def test_progress_shares_sum_to_one(n_clusters):
    shares = []
    kmeans(heavy_tailed(200), n_clusters, progress=shares.append)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("n_clusters", [0, -1, 5])
def test_k_outside_one_to_n_is_refused(n_clusters):
    with pytest.raises(InvalidValueError, match=f"n_clusters is {n_clusters}; with 4 kernels .* 1 to 4"):
        kmeans(np.eye(4), n_clusters)


def test_points_that_are_not_finite_are_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(InvalidValueError, match="NaN or infinite"):
            kmeans(np.array([[0.0], [value]]), 1)


def test_points_so_small_that_their_squares_vanish_are_still_told_apart():
    assert len(kmeans(1e-25 * heavy_tailed(100), 20).centres) == 20


def test_points_so_large_that_their_squares_overflow_do_not_end_the_process():
    code = """
import numpy as np
from kclib import errors, kmeans
try:
    assert len(kmeans.kmeans(1e20 * np.random.default_rng(0).normal(size=(100, 9)), 20).centres) == 20
except errors.InvalidValueError:
    pass"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("d", [9, 49])
def test_points_close_together_and_far_from_zero_are_a_partition(d):
    points = (1 + 1e-4 * np.random.default_rng(0).normal(size=(3000, d))).astype(np.float32)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it does not end"))
    signal.alarm(5)
    try:
        result = kmeans(points, 64)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert_is_a_partition(points, 64, result)
