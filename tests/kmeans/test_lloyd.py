import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from partitions import heavy_tailed
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from kclib.kmeans import Options, _lloyd, _nearest
from kclib.kmeans._fit_progress import Progress


def normal(n, d=9, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def options(**changed):
    return Options(**{"max_iter": 10, "tol": 0.0, "reach": None, "seed": 0, "n_threads": 2, **changed})


def fit(points, centres, sample_weight=None, guess=None, progress=None, **changed):
    return _lloyd.fit(points, sample_weight, centres, guess, options(**changed), Progress(progress))


def filled(points, centres, sample_weight=None):
    before = _nearest.nearest(points, centres, n_threads=2)
    return before, *_lloyd.filled(points, sample_weight, centres, before, 2)


def assert_labels_are_the_nearest(points, centres, labels):
    distances = cdist(points.astype(np.float64), centres.astype(np.float64))
    own = distances[np.arange(len(points)), labels]
    rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(points.astype(np.float64), axis=1)
    assert (own <= (1 + 1e-5) * distances.min(1) + rounding).all()


def test_means_are_weighted_and_a_cluster_without_weight_stays():
    points = np.array([[0, 0], [4, 8], [1, 1], [5, 5]], np.float32)
    centres = np.array([[9, 9], [7, 6], [5, 4], [3, 2]], np.float32)
    labels, sample_weight = np.array([0, 0, 2, 3], np.int32), np.array([1, 3, 2, 0], np.float32)
    weighted = _lloyd.means(points, sample_weight, labels, centres, 2)
    assert weighted.dtype == np.float32
    assert weighted.tolist() == [[3, 6], [7, 6], [1, 1], [3, 2]]
    assert _lloyd.means(points, None, labels, centres, 2).tolist() == [[2, 4], [7, 6], [1, 1], [5, 5]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", [1, 9, 49])
def test_means_of_many_points_are_those_of_float64(weighted, d):
    draw = np.random.default_rng(0)
    points, labels = 1000 + heavy_tailed(50_000, d), draw.integers(0, 3, 50_000).astype(np.int32)
    sample_weight = draw.lognormal(size=50_000).astype(np.float32) if weighted else None
    result = _lloyd.means(points, sample_weight, labels, np.zeros((3, d), np.float32), 2)
    mass = np.ones(50_000) if sample_weight is None else sample_weight.astype(np.float64)
    expected = [
        np.average(points[labels == j].astype(np.float64), axis=0, weights=mass[labels == j])
        for j in range(3)
    ]
    np.testing.assert_array_max_ulp(result, np.array(expected, np.float32), 1)


def test_means_have_the_same_bits_on_any_number_of_threads():
    points, labels = heavy_tailed(20_000), np.random.default_rng(0).integers(0, 500, 20_000).astype(np.int32)
    centres = np.zeros((500, 9), np.float32)
    one, *others = (_lloyd.means(points, None, labels, centres, count) for count in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other, one)


def test_the_total_is_weighted_and_summed_in_float64():
    errors = np.array([2, 3, 5], np.float32)
    assert _lloyd.total(errors, None) == 10
    assert _lloyd.total(errors, np.array([1, 0, 4], np.float32)) == 22
    many = np.ones(1 << 20, np.float32)
    many[0] = 1 << 25
    assert _lloyd.total(many, None) == _lloyd.total(many, np.ones_like(many)) == (1 << 25) + (1 << 20) - 1


def test_an_empty_centre_moves_to_the_worst_served_point():
    points = np.array([[0], [1], [10], [12]], np.float32)
    before, centres, found = filled(points, np.array([[0], [10], [99]], np.float32))
    assert before.errors.tolist() == [0, 1, 0, 4]
    assert centres.ravel().tolist() == [0, 10, 12]
    assert (found.labels.tolist(), found.errors.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 0])


def test_a_weight_says_which_point_is_worst_served():
    points, sample_weight = np.array([[0], [1], [10], [12]], np.float32), np.array([1, 5, 1, 1], np.float32)
    _, centres, found = filled(points, np.array([[0], [10], [99]], np.float32), sample_weight)
    assert centres.ravel().tolist() == [0, 10, 1]
    assert (found.labels.tolist(), found.errors.tolist()) == ([0, 2, 1, 1], [0, 0, 0, 4])


def test_a_point_without_weight_takes_a_centre_only_if_no_other_can():
    points, sample_weight = np.array([[0], [1], [90]], np.float32), np.array([1, 1, 0], np.float32)
    empty = np.array([[500], [600]], np.float32)
    _, centres, _ = filled(points, np.array([[0], *empty[:1]], np.float32), sample_weight)
    assert centres.ravel().tolist() == [0, 1]
    _, centres, found = filled(points, np.array([[0], *empty], np.float32), sample_weight)
    assert sorted(centres.ravel()) == [0, 1, 90]
    assert not found.errors.any()


@given(st.integers(1, 60), st.sampled_from([1, 2, 9]), st.integers(1, 80), st.booleans(), st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_no_empty_cluster_survives_unless_every_point_lies_on_a_centre(n, d, k, grid, seed):
    draw = np.random.default_rng(seed)
    points = draw.integers(-1, 2, (n, d)).astype(np.float32) if grid else heavy_tailed(n, d, seed)
    start = draw.integers(-3, 4, (k, d)).astype(np.float32)
    before, centres, found = filled(points, start)
    assert (np.bincount(found.labels, minlength=len(centres)) > 0).all()
    assert len(np.unique(centres, axis=0)) == len(centres)
    assert_labels_are_the_nearest(points, centres, found.labels)
    own = np.square(points.astype(np.float64) - centres[found.labels]).sum(1)
    np.testing.assert_allclose(found.errors, own, rtol=1e-5)
    n_empty = k - len(np.unique(before.labels))
    if n_empty and before.errors.any():
        assert found.errors.sum() < before.errors.sum()
    elif not n_empty:
        np.testing.assert_array_equal(centres, start)
    if len(centres) < k:
        assert len(centres) == len(np.unique(points, axis=0))
        assert not found.errors.any()


@pytest.mark.parametrize("max_iter", [1, 3, 10])
@pytest.mark.parametrize(("n", "d", "k"), [(500, 1, 5), (1500, 9, 20), (4000, 9, 300)])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_rounds_are_scikit_learns(max_iter, n, d, k, weighted):
    points, sample_weight = normal(n, d), None
    if weighted:
        sample_weight = np.random.default_rng(1).uniform(0.1, 5, n).astype(np.float32)
    ours = fit(points, points[:k], sample_weight, max_iter=max_iter)
    theirs = KMeans(k, init=points[:k], n_init=1, max_iter=max_iter, tol=0, algorithm="lloyd")
    theirs.fit(points.astype(np.float64), sample_weight=sample_weight)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    np.testing.assert_allclose(ours.centres, theirs.cluster_centers_, rtol=1e-5, atol=1e-6)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.iterations == max_iter


@pytest.mark.parametrize("k", [3, 40, 300])
@pytest.mark.parametrize("reach", [None, 1.6])
@pytest.mark.parametrize("max_iter", [0, 1, 10])
def test_a_fit_has_no_empty_cluster_and_exact_labels(k, reach, max_iter):
    points, sample_weight = (
        heavy_tailed(3000),
        np.random.default_rng(1).integers(0, 4, 3000).astype(np.float32),
    )
    result = fit(points, heavy_tailed(k, seed=5), sample_weight, reach=reach, max_iter=max_iter)
    assert (np.bincount(result.labels, minlength=k) > 0).all()
    assert len(np.unique(result.centres, axis=0)) == len(result.centres) == k
    assert_labels_are_the_nearest(points, result.centres, result.labels)
    own = np.square(points.astype(np.float64) - result.centres[result.labels]).sum(1)
    assert result.inertia == pytest.approx((own * sample_weight).sum(), rel=1e-5)
    assert result.iterations <= max_iter


@given(
    st.integers(1, 40), st.sampled_from([1, 2, 9]), st.integers(1, 40), st.integers(0, 3), st.integers(0, 99)
)
@settings(deadline=None, max_examples=25)
def test_a_fit_of_points_with_many_duplicates_and_ties_has_distinct_centres(n, d, k, max_iter, seed):
    draw = np.random.default_rng(seed)
    points, start = (draw.integers(-2, 3, (rows, d)).astype(np.float32) for rows in (n, k))
    result = fit(points, start, max_iter=max_iter)
    assert len(np.unique(result.centres, axis=0)) == len(result.centres)
    assert len(result.centres) == min(k, len(np.unique(points, axis=0)))
    assert (np.bincount(result.labels, minlength=len(result.centres)) > 0).all()
    assert_labels_are_the_nearest(points, result.centres, result.labels)


@pytest.mark.parametrize("max_iter", [0, 1, 10])
def test_labels_in_a_tight_crowd_are_exact_beside_an_outlier(max_iter):
    points = 1 + np.float32(1e-4) * normal(20_000)
    points[3] = 1e4
    result = fit(points, points[:64], max_iter=max_iter)
    assert_labels_are_the_nearest(points, result.centres, result.labels)


def test_without_rounds_the_centres_stay_and_the_labels_are_the_nearest():
    points = normal(500)
    result = fit(points, points[:10], max_iter=0)
    np.testing.assert_array_equal(result.centres, points[:10])
    assert_labels_are_the_nearest(points, result.centres, result.labels)
    assert (result.iterations, result.converged) == (0, False)


def test_rounds_end_by_themselves_at_a_fixed_point():
    points = normal(300)
    result = fit(points, points[:4], max_iter=200)
    assert result.converged
    assert result.iterations < 200
    again = _lloyd.means(points, None, result.labels, result.centres, 2)
    np.testing.assert_allclose(again, result.centres, atol=1e-6)


def test_rounds_end_when_they_gain_no_more_than_the_tolerance():
    points = normal(2000)
    inertias = [fit(points, points[:30], max_iter=rounds).inertia for rounds in range(12)]
    gains = [(a - b) / b for a, b in itertools.pairwise(inertias)]
    result = fit(points, points[:30], tol=0.01)
    assert result.converged
    assert gains[result.iterations - 1] <= 0.01 < min(gains[: result.iterations - 1])


@pytest.mark.parametrize("k", [20, 300])
@pytest.mark.parametrize("calls", [1, 100])
def test_a_fit_stops_when_told_to_and_says_that_its_labels_are_not_exact(k, calls):
    points, steps = normal(4000), []
    result = fit(
        points,
        points[:k],
        reach=1.6,
        max_iter=50,
        progress=lambda step: steps.append(step) or len(steps) >= calls,
    )
    assert (result.converged, result.exact) == (False, False)
    assert result.iterations < fit(points, points[:k], reach=1.6, max_iter=50).iterations
    own = np.square(points.astype(np.float64) - result.centres[result.labels]).sum(1)
    assert result.inertia == pytest.approx(own.sum(), rel=1e-5)
    assert sum(step.share for step in steps) == pytest.approx(1)


@pytest.mark.parametrize("k", [20, 300])
def test_a_caller_hears_of_all_the_work_and_of_the_falling_inertia(k):
    points, steps = normal(4000), []
    result = fit(points, points[:k], progress=steps.append, max_iter=5)
    assert sum(step.share for step in steps) == pytest.approx(1)
    heard = [step.inertia for step in steps]
    assert math.isnan(heard[0])
    known = [inertia for inertia in heard if not math.isnan(inertia)]
    assert known == sorted(known, reverse=True)
    assert known[-1] == result.inertia < known[0]


@pytest.mark.parametrize("reach", [None, 1.6])
@pytest.mark.parametrize("k", [20, 300])
def test_a_fit_has_the_same_bits_on_any_number_of_threads(k, reach):
    points = heavy_tailed(3000)
    one, *others = (fit(points, points[:k], reach=reach, n_threads=count) for count in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other.centres, one.centres)
        np.testing.assert_array_equal(other.labels, one.labels)
        assert other.inertia == one.inertia


def test_a_guess_changes_only_how_fast_a_fit_is():
    points = normal(3000)
    guess = _nearest.nearest(points, points[:300], n_threads=2).labels
    with_guess, without = (fit(points, points[:300], guess=g, max_iter=3) for g in (guess, None))
    np.testing.assert_array_equal(with_guess.labels, without.labels)
    np.testing.assert_array_equal(with_guess.centres, without.centres)
