import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from banks import EACH, LARGEST, NAMES, bank_of, between, cloud
from hypothesis import given, settings
from scipy.spatial.distance import pdist
from torch import nn

from kclib import kernels, similarity
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.similarity import _histograms as similarity_histograms
from kclib.similarity import pair_histogram


def pairs_of(distance, points):
    return between(distance, points)[np.triu_indices(len(points), 1)]


def assert_counted(histogram, expected, edges):
    """Counts are numpy's, but that pairs within rounding of an edge may fall on either side."""
    for count, low, high in zip(histogram.counts, edges[:-1], edges[1:], strict=True):
        surely = (expected >= low + 1e-5) & (expected < high - 1e-5)
        perhaps = (expected >= low - 1e-5) & (expected < high + 1e-5)
        assert surely.sum() <= count <= perhaps.sum()
    assert histogram.counts.dtype == np.int64
    assert histogram.pairs == len(expected)


@EACH
@given(st.integers(2, 60), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=25)
def test_pairs_are_counted_as_scipy_and_numpy_do(distance, n, seed, geometric):
    points = cloud(n, seed)
    expected, top = pairs_of(distance, points), LARGEST.get(distance, 6)
    edges = np.geomspace(0.1 * top, top, 8) if geometric else np.linspace(0, top, 8)
    assert_counted(pair_histogram(points, edges, distance=distance), expected, edges)


@EACH
@pytest.mark.parametrize("n", [511, 512, 513, 1030])
def test_pairs_of_several_blocks_are_counted_as_scipy_does(distance, n):
    points, edges = cloud(n, 0), np.linspace(0, LARGEST.get(distance, 12), 40)
    assert_counted(pair_histogram(points, edges, distance=distance), pairs_of(distance, points), edges)


@EACH
def test_every_pair_is_counted_once_and_in_one_bin(distance):
    n, edges = 2500, np.linspace(0, LARGEST.get(distance, 20), 2000)
    histogram = pair_histogram(cloud(n, 0), edges, distance=distance)
    assert histogram.counts.sum() == histogram.pairs == n * (n - 1) // 2
    assert histogram.shares.sum() == pytest.approx(1)


@EACH
def test_counts_depend_neither_on_the_size_of_the_blocks_nor_on_the_threads(monkeypatch, distance):
    points, edges = cloud(600, 0), np.linspace(0, LARGEST.get(distance, 8), 20)
    whole = pair_histogram(points, edges, distance=distance)
    for rows, threads in ((7, 1), (64, 2), (256, 3), (1000, 1)):
        monkeypatch.setattr(similarity_histograms, "_ROWS", rows)
        other = pair_histogram(points, edges, distance=distance, n_threads=threads)
        np.testing.assert_array_equal(other.counts, whole.counts)
        np.testing.assert_array_equal(other.error, whole.error)


def test_memory_does_not_grow_with_the_pairs():
    points = cloud(6000, 0)
    tracemalloc.start()
    pair_histogram(points, [0, 1, 100], n_threads=2)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6000 * 6000 / 2  # half a byte a pair of rows


def test_pairs_by_hand():
    points = np.array([[0, 0], [3, 4], [0, 0], [6, 8]], np.float32)
    assert pair_histogram(points, [0, 1, 5.5, 11]).counts.tolist() == [1, 3, 2]
    assert pair_histogram(points, [1, 5.5]).counts.tolist() == [3]
    assert pair_histogram(points, [1, 5.5]).pairs == 6
    np.testing.assert_allclose(pair_histogram(points, [1, 5.5, 7]).shares, [0.5, 0])


def test_only_the_last_bin_includes_its_right_edge():
    points = np.array([[0, 0], [9, 0], [9, 0]], np.float32)  # 9, 9 and 0 apart
    cases = (([0, 9], [3]), ([0, 9, 10], [1, 2]), ([8, 9], [2]), ([9, 10], [2]), ([0, 8, 9], [1, 2]))
    for edges, counts in cases:
        assert pair_histogram(points, edges).counts.tolist() == counts
        np.testing.assert_array_equal(np.histogram([9, 9, 0], edges)[0], counts)


@pytest.mark.parametrize("distance", LARGEST)
def test_pairs_at_the_largest_distance_are_in_the_last_bin_that_reaches_it(distance):
    top, across = LARGEST[distance], cloud(300, 0)
    points = np.concatenate([across, -across]) if distance == "cosine" else np.eye(9, dtype=np.float32)
    edges = np.array([0, 0.5, 1]) * top
    histogram = pair_histogram(points, edges, distance=distance)
    assert histogram.counts.sum() == histogram.pairs


@pytest.mark.parametrize("distance", ["cosine", "scale-free"])
def test_edges_beyond_the_largest_distance_are_bins_without_pairs(distance):
    edges = [0, 0.5, 1, 1.5, 2, 2.5, 3]
    counts = pair_histogram(np.eye(4, 9, dtype=np.float32), edges, distance=distance).counts
    assert counts.tolist() == [0, 0, 6, 0, 0, 0]


def test_cosine_distance_tells_same_shape_unrelated_and_opposite_whatever_the_scale():
    same, unrelated, opposite = np.eye(3, dtype=int)
    one = np.array([1, 2, 0])
    for other, expected in ((5 * one, same), ([-2, 1, 0], unrelated), (-0.1 * one, opposite)):
        points = np.array([one, other], np.float32)
        assert (
            pair_histogram(points, [0, 0.5, 1.5, 2], distance="cosine").counts.tolist() == expected.tolist()
        )


@EACH
def test_kernels_without_a_shape_form_no_pairs(distance):
    points = cloud(40, 0)
    points[[3, 17]] = 0
    points[20] = 1.5
    kept = points
    if distance in LARGEST:
        kept = np.delete(points, [3, 17, 20] if distance == "correlation" else [3, 17], axis=0)
    edges = np.linspace(0, LARGEST.get(distance, 12), 6)
    histogram = pair_histogram(points, edges, distance=distance)
    assert histogram.pairs == len(kept) * (len(kept) - 1) // 2
    np.testing.assert_array_equal(histogram.counts, pair_histogram(kept, edges, distance=distance).counts)


def test_a_histogram_leaves_its_arguments_alone():
    points, edges = cloud(40, 0), np.linspace(0, 5, 4)
    before = points.copy(), edges.copy()
    for distance in NAMES:
        pair_histogram(points, edges, distance=distance)
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(edges, before[1])


@pytest.mark.parametrize("edges", [[0], [], [0, 0], [0, 2, 1], [-1, 1], [0, np.nan]])
def test_edges_that_do_not_ascend_from_zero_or_more_are_refused(edges):
    with pytest.raises(InvalidValueError, match="edges must"):
        pair_histogram(cloud(3, 0), edges)


def test_unknown_distance_and_too_few_kernels_are_refused():
    with pytest.raises(UnknownNameError, match=r"'cosin'.*'cosine'"):
        pair_histogram(cloud(3, 0), [0, 1], distance="cosin")
    with pytest.raises(InvalidValueError, match=r"1 of 1 kernels.*euclidean"):
        pair_histogram(cloud(1, 0), [0, 1])
    zeros = np.vstack([cloud(1, 0), np.zeros((4, 9), np.float32)])
    with pytest.raises(InvalidValueError, match=r"1 of 5 kernels.*cosine.* 2"):
        pair_histogram(zeros, [0, 1], distance="cosine")
    with pytest.raises(InvalidValueError, match=r"15 weights; .* square"):
        pair_histogram(cloud(5, 0, 15), [0, 1], distance="symmetric")


def crowds(n, seed):
    """Return points of which some lie in crowds: the share of close pairs varies from sample to sample."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, 9)) * draw.choice([0.2, 1, 2], (n, 1))).astype(np.float32)


EDGES = np.linspace(0, 6, 7)


def spread(samples):
    """Return the standard deviation of the shares over samples, and the mean of the errors they tell."""
    return np.std([x.shares for x in samples], axis=0, ddof=1), np.mean([x.error for x in samples], axis=0)


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("distance", ["euclidean", "symmetric"])
def test_the_error_is_the_spread_of_the_shares_over_samples(distance, share):
    population, draw = crowds(int(200 / share), 0), np.random.default_rng(1)
    samples = [
        pair_histogram(
            draw.choice(population, 200, replace=False), EDGES, distance=distance, drawn_from=len(population)
        )
        for _ in range(200)
    ]
    found, told = spread(samples)
    np.testing.assert_allclose(told, found, rtol=0.25)


def test_without_a_population_the_error_is_that_of_one_without_end():
    points = crowds(100, 0)
    endless = pair_histogram(points, EDGES).error
    np.testing.assert_allclose(pair_histogram(points, EDGES, drawn_from=10**9).error, endless)
    np.testing.assert_allclose(pair_histogram(points, EDGES, drawn_from=400).error, endless * np.sqrt(3 / 4))


@EACH
def test_there_is_no_error_where_all_kernels_were_measured(distance):
    points, edges = cloud(50, 0), np.linspace(0, 1, 4)
    points[7] = 0  # measured as well, though it forms no pair
    assert pair_histogram(points, edges, distance=distance, drawn_from=50).error.tolist() == [0, 0, 0]


def test_the_error_halves_with_four_times_the_kernels():
    few, many = (
        np.mean([pair_histogram(crowds(n, seed), EDGES).error for seed in range(20)], axis=0)
        for n in (150, 600)
    )
    np.testing.assert_allclose(few / many, 2, rtol=0.15)


def layered():
    """Return a bank of a thousand and two thousand kernels of unlike lengths."""
    return bank_of(crowds(1000, 0), 2 * crowds(2000, 1))


@pytest.mark.parametrize("per_layer", [60, 500])
def test_the_errors_within_and_across_are_the_spread_over_stratified_samples(per_layer):
    bank = layered()
    samples = [
        similarity.within_and_across(bank, kernels.sample(bank, per_layer, seed=seed), 2 * EDGES)
        for seed in range(100)
    ]
    for name in ("within a layer", "across layers"):
        found, told = spread([sample[name] for sample in samples])
        np.testing.assert_allclose(told, found, rtol=0.3)


def test_strata_that_differ_only_from_each_other_leave_no_error():
    one, other = np.zeros((9, 9)), np.ones((9, 9))  # 0 apart within, 3 across
    both = similarity.within_and_across(bank_of(one, other), np.arange(0, 18, 2), np.array([0, 1, 4]))
    assert both["within a layer"].shares.tolist() == [1, 0]
    assert both["across layers"].shares.tolist() == [0, 1]
    assert both["within a layer"].error.tolist() == both["across layers"].error.tolist() == [0, 0]


@EACH
def test_all_kernels_of_a_bank_leave_no_error_within_or_across(distance):
    bank = bank_of(cloud(20, 0), np.vstack([cloud(20, 1), np.zeros((3, 9))]))
    both = similarity.within_and_across(bank, np.arange(len(bank)), np.linspace(0, 1, 4), distance=distance)
    assert both["within a layer"].error.tolist() == both["across layers"].error.tolist() == [0, 0, 0]


@pytest.fixture
def bank():
    return kernels.extract(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 1, 3), nn.Conv2d(2, 3, 3)))


def test_histogram_of_each_layer_is_of_its_own_sampled_rows(bank):
    rows, edges = np.array([17, 3, 8, 0, 13, 5]), np.linspace(0, 3, 6)
    histograms = similarity.layer_histograms(bank, rows, edges)
    assert list(histograms) == ["0", "2"]
    for name, mine, size in (("0", [0, 3, 5], 8), ("2", [13, 17], 6)):
        expected = pair_histogram(bank.points[mine], edges, drawn_from=size)
        assert_counted(histograms[name], pdist(bank.points[mine]), edges)
        np.testing.assert_allclose(histograms[name].error, expected.error)


def test_a_layer_with_fewer_than_two_kernels_to_compare_has_no_histogram():
    zeros = np.vstack([cloud(1, 0), np.zeros((5, 9))])
    bank, edges = bank_of(cloud(4, 1), zeros), np.array([0.0, 1, 2])
    assert list(similarity.layer_histograms(bank, np.arange(10), edges, distance="cosine")) == ["a"]
    assert list(similarity.layer_histograms(bank, np.arange(10), edges)) == ["a", "b"]


@EACH
def test_pairs_within_and_across_layers_are_told_apart(bank, distance):
    rows, edges = np.arange(len(bank)), np.linspace(0, LARGEST.get(distance, 3), 6)
    layers = bank.origin(rows)["layer"].to_numpy()
    same = (layers[:, None] == layers)[np.triu_indices(len(bank), 1)]
    expected = pairs_of(distance, bank.points)
    shuffled = np.random.default_rng(0).permutation(rows)
    both = similarity.within_and_across(bank, shuffled, edges, distance=distance)
    assert_counted(both["within a layer"], expected[same], edges)
    assert_counted(both["across layers"], expected[~same], edges)


def test_one_kernel_a_layer_has_pairs_across_layers_only(bank):
    both = similarity.within_and_across(bank, np.array([0, 8, 12]), np.array([0.0, 1, 9]))
    assert both["within a layer"].counts.tolist() == both["within a layer"].shares.tolist() == [0, 0]
    assert both["across layers"].counts.sum() == both["across layers"].pairs == 3


def test_kernels_without_a_shape_are_neither_within_nor_across():
    bank = bank_of(np.vstack([cloud(3, 0), np.zeros((2, 9))]), cloud(4, 1))
    both = similarity.within_and_across(bank, np.arange(9), np.array([0.0, 1, 2]), distance="cosine")
    assert (both["within a layer"].pairs, both["across layers"].pairs) == (3 + 6, 12)
