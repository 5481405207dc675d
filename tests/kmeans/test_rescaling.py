import numpy as np
import pytest

from kclib.kmeans import KMeans
from kclib.kmeans._rescaling import Frame

EPS = np.finfo(np.float32).eps


def normal(n=500, d=9):
    return np.random.default_rng(0).normal(size=(n, d))


POINTS = {
    "ordinary": 0.1 * normal(),
    "huge": 1e20 * normal(),
    "tiny": 1e-25 * normal(),
    "crowded": 1 + 1e-4 * normal(),
    "crowded and huge": 1e15 * (3 + normal()),
    "a crowd with an outlier": np.concatenate([1 + 1e-4 * normal(), [[1e4] * 9]]),
    "zeros": np.zeros((5, 9)),
    "one": np.full((1, 9), 7e-12),
}
POINTS = {kind: points.astype(np.float32) for kind, points in POINTS.items()}


def clustering(centres, inertia=1.0):
    return KMeans(centres, np.arange(len(centres), dtype=np.int32), inertia, 3, True)


@pytest.mark.parametrize("kind", POINTS)
def test_points_come_back_from_their_frame_within_rounding(kind):
    points = POINTS[kind]
    frame = Frame.of([points])
    framed = frame.into(points)
    assert framed.dtype == np.float32
    back = frame.out_of(clustering(framed))
    assert back.centres.dtype == np.float32
    assert (np.abs(back.centres - points) <= EPS * np.abs(points).max()).all()
    assert (back.labels.tolist(), back.iterations, back.converged) == (list(range(len(points))), 3, True)


@pytest.mark.parametrize("kind", POINTS)
def test_inertia_comes_back_in_the_units_of_the_points(kind):
    points = POINTS[kind]
    frame = Frame.of([points])
    framed = frame.into(points).astype(np.float64)
    inertia = np.square(framed - framed.mean(0)).sum()
    expected = np.square(points.astype(np.float64) - points.mean(0, dtype=np.float64)).sum()
    found = frame.out_of(clustering(framed[:1].astype(np.float32), inertia))
    assert isinstance(found.inertia, float)
    assert found.inertia == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("kind", ["huge", "tiny", "crowded", "crowded and huge"])
def test_squares_in_the_frame_neither_overflow_nor_vanish_nor_cancel(kind):
    framed = Frame.of([POINTS[kind]]).into(POINTS[kind])
    squares = np.square(framed).sum(1)
    assert (np.finfo(np.float32).tiny < squares).all()
    assert np.isfinite(squares.sum())
    assert np.square(framed.mean(0, dtype=np.float64)).sum() <= framed.var(0, dtype=np.float64).sum()


@pytest.mark.parametrize("kind", ["ordinary", "zeros"])
def test_ordinary_kernels_are_not_touched(kind):
    points = POINTS[kind]
    frame = Frame.of([points])
    found = clustering(points)
    assert frame.plain
    assert frame.into(points) is points
    assert frame.out_of(found) is found


@pytest.mark.parametrize("kind", ["huge", "tiny", "crowded", "crowded and huge", "one"])
def test_extreme_points_are_moved(kind):
    assert not Frame.of([POINTS[kind]]).plain


@pytest.mark.parametrize("kind", POINTS)
def test_points_in_parts_have_the_frame_of_the_whole(kind):
    points = np.tile(POINTS[kind], (100, 1))
    whole, parts = Frame.of([points]), Frame.of(iter(np.array_split(points, 7)))
    np.testing.assert_array_equal(parts.shift, whole.shift)
    assert parts.exponent == whole.exponent


@pytest.mark.parametrize("n_negative", [0, 1, 50])
def test_points_at_the_end_of_the_float_range_stay_finite(n_negative):
    points = np.full((100, 9), 3e38, np.float32)
    points[:n_negative] *= -1
    frame = Frame.of([points])
    framed = frame.into(points)
    assert np.isfinite(framed).all()
    np.testing.assert_allclose(frame.out_of(clustering(framed)).centres, points, rtol=1e-6)
