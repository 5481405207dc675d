import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from partitions import heavy_tailed
from scipy.spatial.distance import cdist

from kclib._util.threads import blocks
from kclib.kmeans import _nearest

KINDS = [
    "normal",
    "heavy tailed",
    "grid",
    "on centres",
    "zeros",
    "far from the origin",
    "crowd",
    "far outliers",
]


def points_and_centres(kind, n, d, k, seed=0):
    draw = np.random.default_rng(seed)
    if kind == "grid":
        return (draw.integers(-2, 3, (rows, d)).astype(np.float32) for rows in (n, k))
    if kind == "normal":
        return (draw.normal(size=(rows, d)).astype(np.float32) for rows in (n, k))
    if kind == "crowd":
        return ((1 + 1e-4 * draw.normal(size=(rows, d))).astype(np.float32) for rows in (n, k))
    points, centres = heavy_tailed(n, d, seed), heavy_tailed(k, d, seed + 1)
    if kind == "on centres":
        points = centres[draw.integers(0, k, n)]
    elif kind == "zeros":
        points[:] = 0
    elif kind == "far from the origin":
        points, centres = points + np.float32(30), centres + np.float32(30)
    elif kind == "far outliers":
        points[draw.integers(0, n, 2)] = [[1e4], [-1e6]]
        centres[draw.integers(0, k)] = 1e5
    return points, centres


def least_and_own_distances(points, centres, labels):
    least, own = np.empty(len(points)), np.empty(len(points))
    for part in blocks(len(points)):
        for rows in np.array_split(np.arange(part.start, part.stop), 16):
            distances = cdist(points[rows].astype(np.float64), centres.astype(np.float64))
            least[rows], own[rows] = distances.min(1), distances[np.arange(len(rows)), labels[rows]]
    return least, own


def rounding(points):
    return 4 * np.finfo(np.float32).eps * np.linalg.norm(points.astype(np.float64), axis=1)


def assert_nearest(points, centres, found):
    assert (found.labels.dtype, found.errors.dtype) == (np.int32, np.float32)
    assert found.labels.shape == found.errors.shape == (len(points),)
    least, own = least_and_own_distances(points, centres, found.labels)
    assert (own <= (1 + 1e-5) * least + rounding(points)).all()
    assert (np.abs(np.sqrt(found.errors.astype(np.float64)) - own) <= 1e-5 * own + rounding(points)).all()


def guesses(quality, points, centres, seed=0):
    if quality == "none":
        return None
    if quality == "constant":
        return np.full(len(points), len(centres) // 2, np.int32)
    if quality == "random":
        return np.random.default_rng(seed).integers(0, len(centres), len(points)).astype(np.int32)
    return cdist(points, centres).argmin(1).astype(np.int32)


@pytest.mark.parametrize("quality", ["none", "nearest", "constant", "random"])
@given(
    st.sampled_from(KINDS),
    st.integers(1, 200),
    st.sampled_from([1, 2, 9, 25, 49]),
    st.integers(1, 150),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_the_nearest_centres_are_exact_whatever_the_guess(quality, kind, n, d, k, seed):
    points, centres = points_and_centres(kind, n, d, k, seed)
    guess = guesses(quality, points, centres, seed)
    assert_nearest(points, centres, _nearest.nearest(points, centres, guess=guess, n_threads=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [9, 49])
@pytest.mark.parametrize("k", [2, _nearest._COMPARED, _nearest._COMPARED + 1, 700])
def test_the_nearest_of_few_and_of_many_centres_are_exact_without_a_guess(kind, d, k):
    points, centres = points_and_centres(kind, 3000, d, k)
    assert_nearest(points, centres, _nearest.nearest(points, centres, n_threads=2))


@pytest.mark.parametrize("kind", KINDS)
def test_many_points_have_their_exact_nearest_of_few_centres(kind):
    points, centres = points_and_centres(kind, 20_000, 9, 20)
    assert_nearest(points, centres, _nearest.nearest(points, centres, n_threads=2))


@pytest.mark.parametrize("guessed", [False, True])
def test_the_nearest_of_thousands_of_centres_are_exact(guessed):
    points, centres = heavy_tailed(20_000), heavy_tailed(3000, seed=1)
    guess = 3 * _nearest.nearest(points, centres[::3], n_threads=2).labels if guessed else None
    assert_nearest(points, centres, _nearest.nearest(points, centres, guess=guess, n_threads=2))


def test_a_guess_of_which_nothing_is_left_after_centres_moved_is_mended():
    points = heavy_tailed(5000)
    before = heavy_tailed(400, seed=1)
    guess = _nearest.nearest(points, before, n_threads=2).labels
    after = before[np.random.default_rng(2).permutation(400)]
    assert_nearest(points, after, _nearest.nearest(points, after, guess=guess, n_threads=2))


def test_a_point_far_from_its_guess_finds_the_centre_it_lies_on():
    points, centres = np.array([[1e-3]], np.float32), np.array([[10], [0], [1e-3]], np.float32)
    found = _nearest.nearest(points, centres, guess=np.zeros(1, np.int32))
    assert (found.labels.tolist(), found.errors.tolist()) == ([2], [0])


def test_either_of_two_places_with_many_equal_centres_is_found():
    centres = np.repeat(np.array([[0.0], [5.0]], np.float32), 200, axis=0)
    found = _nearest.nearest(np.array([[4.0], [1.0], [0.0]], np.float32), centres)
    assert centres[found.labels].ravel().tolist() == [5, 0, 0]
    assert found.errors.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("k", "guessed", "reach"), [(20, 0, None), (300, 0, None), (300, 1, None), (300, 1, 1.0)]
)
def test_any_number_of_threads_finds_the_same_bits(k, guessed, reach):
    points, centres = heavy_tailed(40_000, 2), heavy_tailed(k, 2, seed=1)
    guess = guesses("random", points, centres) if guessed else None
    one, *others = (
        _nearest.nearest(points, centres, guess=guess, reach=reach, n_threads=count) for count in (1, 2, 3)
    )
    for other in others:
        np.testing.assert_array_equal(other.labels, one.labels)
        np.testing.assert_array_equal(other.errors, one.errors)


def test_a_short_reach_is_no_better_than_exact_and_no_worse_than_the_guess():
    points, centres = heavy_tailed(5000), heavy_tailed(500, seed=1)
    guess = 2 * _nearest.nearest(points, centres[::2], n_threads=2).labels
    found = _nearest.nearest(points, centres, guess=guess, reach=1.0, n_threads=2)
    least, own = least_and_own_distances(points, centres, found.labels)
    _, guessed = least_and_own_distances(points, centres, guess)
    assert (own <= (1 + 1e-5) * guessed + rounding(points)).all()
    assert np.square(least).sum() < np.square(own).sum() < np.square(guessed).sum()
    np.testing.assert_allclose(np.sqrt(found.errors), own, rtol=1e-4)


def test_a_reach_across_all_centres_is_exact():
    points, centres = points_and_centres("normal", 1000, 9, 300)
    guess = 2 * _nearest.nearest(points, centres[::2], n_threads=2).labels
    assert_nearest(points, centres, _nearest.nearest(points, centres, guess=guess, reach=1e3, n_threads=2))


@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_shares_of_the_work_sum_to_one(k, reach):
    points, centres = heavy_tailed(1000), heavy_tailed(k, seed=1)
    for guess in (None, guesses("nearest", points, centres)):
        shares = []
        _nearest.nearest(points, centres, guess=guess, reach=reach, done=shares.append)
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0


def test_rows_are_listed_label_by_label():
    order, starts = _nearest.by_label(np.array([2, 0, 2, 0, 4]), 6)
    assert (order.dtype, starts.dtype) == (np.int32, np.int64)
    assert (order.tolist(), starts.tolist()) == ([1, 3, 0, 2, 4], [0, 2, 2, 4, 4, 5, 5])


@given(st.lists(st.integers(0, 9)))
@settings(deadline=None, max_examples=25)
def test_each_label_lists_its_own_rows_in_ascending_order(labels):
    order, starts = _nearest.by_label(np.array(labels, np.int32), 10)
    for label in range(10):
        rows = [row for row, other in enumerate(labels) if other == label]
        assert order[starts[label] : starts[label + 1]].tolist() == rows


def test_errors_are_squared_distances_to_the_labelled_centres():
    points = np.array([[0, 0], [3, 4], [1, 1]], np.float32)
    centres = np.array([[0, 0], [1, 2]], np.float32)
    result = _nearest.errors(points, centres, np.array([1, 0, 1], np.int32))
    assert (result.dtype, result.tolist()) == (np.float32, [5, 25, 1])
