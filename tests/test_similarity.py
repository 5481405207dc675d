import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.spatial.distance import cdist, pdist
from torch import nn

from kclib import kernels, similarity
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.similarity import pair_histogram

DISTANCES = st.sampled_from(["euclidean", "cosine"])


def cloud(n, seed, d=9):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def small_blocks(monkeypatch):
    """Make blocks of about two rows, and count them."""
    whole, seen = similarity.pairwise_distances_chunked, []

    def chunked(points, others=None, **options):
        width = len(points if others is None else others)
        for block in whole(points, others, **options | {"working_memory": 2.5 * 8 * width / 2**20}):
            seen.append(len(block))
            yield block

    monkeypatch.setattr(similarity, "pairwise_distances_chunked", chunked)
    return seen


@given(st.integers(2, 60), st.integers(0, 99), DISTANCES)
@settings(deadline=None, max_examples=30)
def test_pairs_within_a_set_are_counted_as_scipy_does(n, seed, distance):
    points = cloud(n, seed)
    expected = pdist(points.astype(np.float64), distance)
    edges = np.linspace(0, expected.max() * 0.9 + 1e-3, 8)
    counts = pair_histogram(points, edges, distance=distance)
    np.testing.assert_array_equal(counts, np.histogram(expected, edges)[0])
    assert counts.dtype == np.int64


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), DISTANCES)
@settings(deadline=None, max_examples=30)
def test_pairs_between_two_sets_are_counted_as_scipy_does(n, m, seed, distance):
    points, others = cloud(n, seed), cloud(m, seed + 100)
    expected = cdist(points.astype(np.float64), others.astype(np.float64), distance)
    edges = np.linspace(0, expected.max() + 1e-3, 8)
    counts = pair_histogram(points, edges, others=others, distance=distance)
    np.testing.assert_array_equal(counts, np.histogram(expected, edges)[0])
    assert counts.sum() == n * m


@pytest.mark.parametrize("distance", similarity.named_distances)
@pytest.mark.parametrize("others", [None, cloud(17, 1)])
def test_counts_do_not_depend_on_the_size_of_the_blocks(monkeypatch, distance, others):
    points, edges = cloud(33, 0), np.linspace(0, 8, 20)
    at_once = pair_histogram(points, edges, others=others, distance=distance)
    seen = small_blocks(monkeypatch)
    in_blocks = pair_histogram(points, edges, others=others, distance=distance)
    assert max(seen) == 2
    assert sum(seen) == 33
    np.testing.assert_array_equal(in_blocks, at_once)


def test_every_pair_of_a_set_too_large_for_one_block_is_counted():
    n = 3000
    assert n * n * 8 > 64 * 2**20
    assert pair_histogram(cloud(n, 0), [0, 100]).tolist() == [n * (n - 1) // 2]


def test_pairs_by_hand():
    points = np.array([[0, 0], [3, 4], [0, 0], [6, 8]], np.float32)
    assert pair_histogram(points, [0, 1, 5.5, 11]).tolist() == [1, 3, 2]
    assert pair_histogram(points, [1, 5.5]).tolist() == [3]


def test_cosine_distance_tells_same_shape_unrelated_and_opposite_whatever_the_scale():
    same, unrelated, opposite = np.eye(3, dtype=int)
    edges = [0, 0.5, 1.5, 2]
    one = np.array([[1, 2, 0]], np.float32)
    for other, expected in ((5 * one, same), ([[-2, 1, 0]], unrelated), (-0.1 * one, opposite)):
        counts = pair_histogram(one, edges, others=np.asarray(other, np.float32), distance="cosine")
        assert counts.tolist() == expected.tolist()


def test_kernel_of_zeros_counts_as_unrelated_to_all():
    points = np.array([[0, 0, 0], [1, 2, 3], [0, 0, 0]], np.float32)
    assert pair_histogram(points, [0, 0.99, 1.01, 2], distance="cosine").tolist() == [0, 3, 0]


def test_unknown_distance_and_a_single_kernel_are_refused():
    with pytest.raises(
        UnknownNameError, match=r"unknown distance 'cosin'; known: euclidean, cosine.*'cosine'"
    ):
        pair_histogram(cloud(3, 0), [0, 1], distance="cosin")
    with pytest.raises(InvalidValueError, match="1 kernel has no pairs; give at least 2"):
        pair_histogram(cloud(1, 0), [0, 1])


@pytest.fixture
def bank():
    return kernels.extract(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 1, 3), nn.Conv2d(2, 3, 3)))


def test_histogram_of_each_layer_is_of_its_own_sampled_rows(bank):
    rows, edges = np.array([17, 3, 8, 0, 13, 5]), np.linspace(0, 3, 6)
    histograms = similarity.layer_histograms(bank, rows, edges)
    assert list(histograms) == ["0", "2"]
    np.testing.assert_array_equal(histograms["0"], np.histogram(pdist(bank.points[[0, 3, 5]]), edges)[0])
    np.testing.assert_array_equal(histograms["2"], np.histogram(pdist(bank.points[[13, 17]]), edges)[0])


def test_pairs_within_and_across_layers_are_told_apart(bank):
    rows, edges = np.arange(len(bank)), np.linspace(0, 3, 6)
    layers = bank.origin(rows)["layer"].to_numpy()
    same = (layers[:, None] == layers)[np.triu_indices(len(bank), 1)]
    distances = pdist(bank.points)
    both = similarity.within_and_across(bank, rows, edges)
    np.testing.assert_array_equal(both["within a layer"], np.histogram(distances[same], edges)[0])
    np.testing.assert_array_equal(both["across layers"], np.histogram(distances[~same], edges)[0])


def test_one_kernel_a_layer_has_pairs_across_layers_only(bank):
    both = similarity.within_and_across(bank, np.array([0, 8, 12]), np.array([0.0, 1, 9]))
    assert np.array_equal(both["within a layer"], [0, 0])
    assert both["across layers"].sum() == 3


@given(st.integers(2, 12))
@settings(deadline=None, max_examples=11)
def test_unrelated_share_is_that_of_random_directions(d):
    edges = np.linspace(0, 2, 9)
    counts = pair_histogram(cloud(600, 0, d), edges, distance="cosine")
    np.testing.assert_allclose(similarity.unrelated_share(edges, d), counts / counts.sum(), atol=0.02)


def test_unrelated_directions_in_space_are_uniform_in_cosine():
    np.testing.assert_allclose(similarity.unrelated_share(np.array([0, 0.5, 1, 2]), 3), [0.25, 0.25, 0.5])
