import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import at_most, heavy_tailed
from scipy.spatial import cKDTree

from kclib.errors import InvalidValueError
from kclib.kmeans import symmetric
from kclib.similarity import _neighbours

KINDS = [
    "normal",
    "heavy tailed",
    "clustered",
    "grid",
    "zeros",
    "pairs",
    "ulps",
    "far from the origin",
    "outliers",
]
SIGNED = {"turns": np.tile(symmetric.transforms(3), (2, 1)), "signs": np.repeat([1, -1], 8)}


def drawn(kind, n, d, seed=0):
    draw = np.random.default_rng(seed)
    if kind == "grid":
        return draw.integers(-2, 3, (n, d)).astype(np.float32)
    if kind == "normal":
        return draw.normal(size=(n, d)).astype(np.float32)
    if kind == "clustered":
        centres = draw.normal(size=(5, d))
        return (centres[draw.integers(0, 5, n)] + 1e-3 * draw.normal(size=(n, d))).astype(np.float32)
    if kind == "ulps":
        centres = draw.normal(size=(8, d)).astype(np.float32)
        return (centres[draw.integers(0, 8, n)] * (1 + draw.integers(-3, 4, (n, d)) * 2.0**-23)).astype(
            np.float32
        )
    points = heavy_tailed(n, d, seed)
    if kind == "zeros":
        points[draw.random(n) < 0.5] = 0
    elif kind == "pairs":
        points = points[draw.integers(0, max(1, n // 2), n)]
    elif kind == "far from the origin":
        points += np.float32(30)
    elif kind == "outliers":
        points[draw.integers(0, n, 2)] = [[1e4], [-1e6]]
    return points


def squares(points, queries, turns=None, signs=None):
    """Compare everything with everything, in float64: ``(m, n)``."""
    turns = np.arange(points.shape[1])[None] if turns is None else turns
    signs = np.ones(len(turns)) if signs is None else signs
    points, queries = points.astype(np.float64), queries.astype(np.float64)
    result = np.full((len(queries), len(points)), np.inf)
    for turn, sign in zip(turns, signs, strict=True):
        for q, query in enumerate(sign * queries[:, turn]):
            np.minimum(result[q], np.square(query - points).sum(1), out=result[q])
    return result


def assert_nearest(found, points, k, queries=None, **orbit):
    """The distances are the k least; each is its row's; no row comes twice, or is the query's own."""
    asked = points if queries is None else queries
    exact = squares(points, asked, **orbit)
    if queries is None:
        np.fill_diagonal(exact, np.inf)
    assert (found.indices.dtype, found.squared.dtype) == (np.int32, np.float32)
    assert found.indices.shape == found.squared.shape == (len(asked), k)
    np.testing.assert_allclose(found.squared, np.sort(exact, axis=1)[:, :k], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(exact, found.indices, axis=1), found.squared, rtol=1e-5)
    assert (np.diff(np.sort(found.indices, axis=1), axis=1) > 0).all()
    nearer, same = np.diff(found.squared, axis=1) > 0, np.diff(found.squared, axis=1) == 0
    assert (nearer | same).all()
    assert (np.diff(found.indices, axis=1)[same] > 0).all()


@given(
    st.sampled_from(KINDS),
    st.integers(2, 500),
    st.sampled_from([1, 2, 9, 25]),
    st.sampled_from([1, 2, 15, 50]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_neighbours_are_those_of_comparing_all(kind, n, d, k, asked, seed):
    points, k = drawn(kind, n, d, seed), min(k, n - 1)
    queries = drawn(kind, n // 2, d, seed + 1) if asked else None
    assert_nearest(_neighbours.nearest(points, k=k, queries=queries, n_threads=2), points, k, queries)


@given(
    st.sampled_from(KINDS),
    st.integers(2, 300),
    st.sampled_from([1, 2, 15]),
    st.sampled_from(["turns", "signs", "both"]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_neighbours_up_to_a_symmetry_are_those_of_comparing_all_members_of_orbits(
    kind, n, k, given, asked, seed
):
    points, k = drawn(kind, n, 9, seed), min(k, n - 1)
    orbit = SIGNED if given == "both" else {given: SIGNED[given]}
    if given == "signs":
        orbit = {"signs": np.array([1, -1])}
    queries = drawn(kind, n, 9, seed + 1) if asked else None
    found = _neighbours.nearest(points, k=k, queries=queries, n_threads=2, **orbit)
    tiled = {"turns": np.tile(np.arange(9), (2, 1)), **orbit} if given == "signs" else orbit
    assert_nearest(found, points, k, queries, **tiled)


@pytest.mark.parametrize("kind", ["normal", "heavy tailed", "clustered", "far from the origin", "outliers"])
@pytest.mark.parametrize(("n", "d", "k"), [(20_000, 9, 1), (20_000, 2, 30), (5000, 25, 15), (3000, 49, 3)])
def test_neighbours_of_thousands_are_those_of_scipy(kind, n, d, k):
    points = drawn(kind, n, d)
    found = _neighbours.nearest(points, k=k, n_threads=2)
    exact, rows = cKDTree(points).query(points, k + 1, workers=2)
    # Doubles of a point may come before it in its list of the k + 1 nearest.
    own = rows == np.arange(n)[:, None]
    own[~own.any(1), -1] = True
    np.testing.assert_allclose(np.sqrt(found.squared), exact[~own].reshape(n, k), rtol=1e-5)
    assert (found.indices == rows[~own].reshape(n, k)).mean() > 0.999


def test_a_flipped_and_negated_kernel_is_a_neighbour_at_distance_zero():
    points = heavy_tailed(2000)
    points[1000:] = -points[:1000, symmetric.transforms(3)[5]]
    found = _neighbours.nearest(points, **SIGNED)
    assert found.indices[:, 0].tolist() == np.roll(np.arange(2000), 1000).tolist()
    assert not found.squared.any()
    assert _neighbours.nearest(points).squared.min() > 0


def test_distances_by_hand():
    points = np.array([[0, 0], [3, 4], [0, 1], [3, 4]], np.float32)
    found = _neighbours.nearest(points, k=2)
    assert found.indices.tolist() == [[2, 1], [3, 2], [0, 1], [1, 2]]
    assert found.squared.tolist() == [[1, 25], [0, 18], [1, 18], [0, 18]]
    turned = _neighbours.nearest(points, queries=[[-1, 0], [4, 3]], turns=[[0, 1], [1, 0]], signs=[1, -1])
    assert turned.indices.tolist() == [[2], [1]]
    assert turned.squared.tolist() == [[0], [2]]


def test_of_equally_near_points_the_smaller_rows_come_first():
    points = np.array([[1], [-1]], np.float32)[np.random.default_rng(0).integers(0, 2, 3000)]
    found = _neighbours.nearest(points, k=5, queries=[[0], [1], [-3]])
    plus, minus = np.flatnonzero(points > 0), np.flatnonzero(points < 0)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4], plus[:5].tolist(), minus[:5].tolist()]
    assert found.squared.tolist() == [[1] * 5, [0] * 5, [4] * 5]


@pytest.mark.parametrize("d", [1, 9])
def test_a_hundred_thousand_equal_points_take_no_time(d):
    points = np.ones((100_000, d), np.float32)
    with at_most(10):
        found = _neighbours.nearest(points, k=3)
    assert not found.squared.any()
    assert found.indices[[0, 1, 2, 3, -1]].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("exponent", [-55, 55])
def test_points_of_any_size_have_the_same_neighbours(exponent):
    points = heavy_tailed(3000)
    found, scaled = _neighbours.nearest(points), _neighbours.nearest(np.ldexp(points, exponent))
    np.testing.assert_array_equal(found.indices, scaled.indices)
    np.testing.assert_array_equal(np.ldexp(found.squared, 2 * exponent), scaled.squared)


def test_points_too_far_apart_for_a_square_are_infinitely_far():
    found = _neighbours.nearest(np.array([[-3e38], [3e38], [2e38]], np.float32))
    assert found.indices.tolist() == [[2], [2], [1]]
    assert np.isinf(found.squared).all()


@pytest.mark.parametrize(("k", "orbit"), [(1, {}), (15, {}), (3, SIGNED)])
def test_any_number_of_threads_finds_the_same_bits(k, orbit):
    points = heavy_tailed(5000)
    one, *others = (_neighbours.nearest(points, k=k, n_threads=count, **orbit) for count in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other.indices, one.indices)
        np.testing.assert_array_equal(other.squared, one.squared)


def test_the_order_of_queries_changes_nothing_and_neither_does_who_asks():
    points = heavy_tailed(5000)
    shuffled = np.random.default_rng(1).permutation(5000)
    found = _neighbours.nearest(points, k=4, queries=points[shuffled])
    assert found.indices[:, 0].tolist() == shuffled.tolist()
    own = _neighbours.nearest(points, k=3)
    np.testing.assert_array_equal(found.indices[:, 1:], own.indices[shuffled])
    np.testing.assert_array_equal(found.squared[:, 1:], own.squared[shuffled])


def test_no_array_of_the_caller_changes():
    points, queries = heavy_tailed(500), heavy_tailed(100, seed=1)
    before = points.copy(), queries.copy()
    for array in (points, queries, *SIGNED.values()):
        array.flags.writeable = False
    _neighbours.nearest(points, queries=queries, **SIGNED)
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(queries, before[1])


@pytest.mark.parametrize("n", [2, 5000])
def test_shares_of_the_work_sum_to_one(n):
    shares = []
    _neighbours.nearest(heavy_tailed(n), progress=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0


def test_a_single_point_is_the_neighbour_of_all_queries_and_none_ask_for_nothing():
    found = _neighbours.nearest([[2, 0]], queries=[[0, 0], [2, 1]])
    assert (found.indices.tolist(), found.squared.tolist()) == ([[0], [0]], [[4], [1]])
    assert _neighbours.nearest([[2, 0]], queries=np.empty((0, 2))).indices.shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": np.ones(4)}, "points have shape"),
        ({"points": np.ones((0, 4))}, "points have shape"),
        ({"points": np.ones((5, 0))}, "points have shape"),
        ({"points": [["a", "b"]]}, "points must be an array of real numbers"),
        ({"points": [[1, np.nan], [0, 0]]}, "points hold NaN"),
        ({"points": np.full((3, 4), 1e39)}, "points hold NaN or infinity"),
        ({"k": 0}, "k is 0"),
        ({"k": 5}, "k is 5"),
        ({"k": 6, "queries": np.ones((2, 4))}, "k is 6"),
        ({"queries": np.ones((2, 3))}, "queries have shape"),
        ({"queries": [[1, 2, 3, np.inf]]}, "queries hold"),
        ({"turns": [0, 1, 2, 3]}, "turns must be"),
        ({"turns": [[0, 1, 2]]}, "turns must be"),
        ({"turns": [[0, 1, 2, 2]]}, "turns must be"),
        ({"turns": np.empty((0, 4), int)}, "turns must be"),
        ({"signs": [[1], [-1]]}, "signs must be"),
        ({"signs": [1, 2]}, "signs must be"),
        ({"signs": [1, -1], "turns": [[0, 1, 2, 3]]}, "signs must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message):
    with pytest.raises(InvalidValueError, match=message):
        _neighbours.nearest(**{"points": np.ones((5, 4)), **change})
