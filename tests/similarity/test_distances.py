import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.spatial import distance as scipys

from kclib import similarity
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.similarity import distances

NAMES = list(distances.named_distances)
EACH = pytest.mark.parametrize("name", NAMES)
SHAPES = ["cosine", "correlation", "scale-free"]  # those that look at shapes alone
KERNELS = arrays(np.float32, 9, elements=st.integers(-16, 16).map(lambda quarters: quarters / 4))
SCALES = st.floats(-6, 6).map(lambda power: 10.0**power)


def between(name, a, b):
    """Return the distance that searches and histograms find: the least over the orbit of one of the two."""
    named = similarity.named(name)
    first, second = named.prepare(np.stack([a, b])).astype(np.float64)
    turns, signs = named.orbit(len(a))
    squared = np.square(signs[:, None] * first[turns] - second).sum(axis=1).min()
    return float(named.of_squared(squared))


def has_shape(kernel):
    return np.ptp(kernel) > 0


def independent(name, a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "euclidean":
        return scipys.euclidean(a, b)
    if name == "cosine":
        return scipys.cosine(a, b)
    if name == "correlation":
        return 1 - abs(stats.pearsonr(a, b).statistic)
    if name == "scale-free":  # the height of a's triangle over the line of b, by cross and dot products
        along = np.dot(a, b) * b / np.dot(b, b)
        return np.linalg.norm(a - along) / np.linalg.norm(a)
    square = b.reshape(3, 3)
    turned = [np.rot90(face, quarter) for face in (square, np.fliplr(square)) for quarter in range(4)]
    return min(np.linalg.norm(a.reshape(3, 3) - face) for face in turned)


@EACH
@given(KERNELS, KERNELS)
@settings(deadline=None, max_examples=25)
def test_each_distance_agrees_with_an_independent_formula(name, a, b):
    assume(has_shape(a) and has_shape(b))
    assert between(name, a, b) == pytest.approx(independent(name, a, b), rel=1e-5, abs=2e-6)


def test_distances_by_hand():
    a, b = np.array([3, 0, 0, 0], np.float32), np.array([0, 4, 0, 0], np.float32)
    found = {name: between(name, a, b) for name in NAMES}
    # about their means: (3, -1, -1, -1) / √12 and (-1, 3, -1, -1) / √12, whose product is -1 / 3
    assert found == pytest.approx(
        {"euclidean": 5, "cosine": 1, "correlation": 2 / 3, "scale-free": 1, "symmetric": 1}
    )
    assert between("cosine", a, -a) == pytest.approx(2)
    assert between("scale-free", a, np.array([1, 1, 0, 0])) == pytest.approx(np.sin(np.pi / 4))


@EACH
@given(KERNELS, KERNELS)
@settings(deadline=None, max_examples=25)
def test_distance_is_symmetric_zero_of_itself_and_within_its_range(name, a, b):
    assume(has_shape(a) and has_shape(b))
    there, back = between(name, a, b), between(name, b, a)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-7)
    assert between(name, a, a) == 0
    assert 0 <= there <= similarity.named(name).largest * (1 + 1e-6)


# What may be done to one of two kernels without changing their distance.
UNCHANGED = {
    "cosine": {"scale"},
    "correlation": {"scale", "sign", "offset"},
    "scale-free": {"scale", "sign"},
    "symmetric": {"turns"},
    "euclidean": set(),
}
CHANGES = {
    "scale": lambda kernel: 3 * kernel,
    "sign": lambda kernel: -kernel,
    "offset": lambda kernel: kernel + 2,
    "turns": lambda kernel: np.rot90(kernel.reshape(3, 3)).ravel(),
    "flips": lambda kernel: np.flipud(kernel.reshape(3, 3)).ravel(),
}


@EACH
@given(KERNELS, KERNELS, SCALES, st.floats(-5, 5), st.integers(0, 3), st.booleans())
@settings(deadline=None, max_examples=25)
def test_distance_does_not_change_by_what_it_is_blind_to(name, a, b, scale, offset, quarter, flipped):
    assume(has_shape(a) and has_shape(b))
    other = b.astype(np.float64)
    if "offset" in UNCHANGED[name]:
        other = other + offset
    if "sign" in UNCHANGED[name] and flipped:
        other = -other
    if "scale" in UNCHANGED[name]:
        other = scale * other
    if "turns" in UNCHANGED[name]:
        face = np.rot90(other.reshape(3, 3), quarter)
        other = (face.T if flipped else face).ravel()
    expected = between(name, a, b)
    # Near 0, the sine of an angle is as exact as the angle, that is float32.
    assert between(name, a, other.astype(np.float32)) == pytest.approx(expected, rel=1e-4, abs=3e-5)


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_distance_changes_by_everything_else(name, change):
    a, b = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    blind = change in UNCHANGED[name] or (change == "flips" and name == "symmetric")
    changed = between(name, a, CHANGES[change](b)) != pytest.approx(between(name, a, b), rel=1e-3)
    assert changed == (not blind)


@EACH
@given(st.lists(st.floats(0, 1), min_size=1))
@settings(deadline=None, max_examples=25)
def test_of_squared_and_to_squared_are_inverse(name, shares):
    named = similarity.named(name)
    values = np.array(shares) * min(named.largest, 1e3)
    squared = named.to_squared(values)
    np.testing.assert_allclose(named.of_squared(squared), values, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(named.to_squared(named.of_squared(squared)), squared, rtol=1e-6, atol=1e-12)
    assert (np.diff(named.to_squared(np.sort(values))) >= 0).all()


@EACH
def test_of_squared_keeps_the_digits_of_close_pairs(name):
    named, squared = similarity.named(name), np.array([1e-12, 1e-20])
    expected = {"cosine": squared / 2, "correlation": squared / 2}.get(name, np.sqrt(squared))
    np.testing.assert_allclose(named.of_squared(squared), expected, rtol=1e-9)
    np.testing.assert_allclose(named.to_squared(expected), squared, rtol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e10, 1e37])
def test_tiny_and_huge_weights_have_the_shape_of_others(name, scale):
    a, b = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    scaled = (scale * a.astype(np.float64)).astype(np.float32)
    # below 1e-38 float32 has few digits left
    tolerance = 1e-3 if scale == 1e-40 else 1e-5
    assert between(name, scaled, b) == pytest.approx(between(name, a, b), abs=tolerance)
    assert similarity.named(name).comparable(scaled[None]).all()


@EACH
def test_kernels_of_zeros_have_no_shape_to_compare_and_constant_ones_no_pattern(name):
    kernels = np.zeros((7, 9), np.float32)
    kernels[1], kernels[2], kernels[3] = 0.3, -1e-20, 1e20
    kernels[4], kernels[4, 2] = 0.3, np.nextafter(np.float32(0.3), np.float32(1))  # constant but for rounding
    kernels[5, 2] = 1e-30
    kernels[6] = 1 + 1e-3 * np.arange(9)
    shape, pattern = [False, *[True] * 6], [*[False] * 5, True, True]
    expected = {"cosine": shape, "scale-free": shape, "correlation": pattern}.get(name, [True] * 7)
    found = similarity.named(name).comparable(kernels)
    assert (found.dtype, found.tolist()) == (bool, expected)
    points = similarity.named(name).prepare(kernels)
    assert (points.dtype, points.shape) == (np.float32, kernels.shape)
    assert np.isfinite(points).all()


def test_prepared_shapes_have_length_one_and_patterns_mean_zero():
    kernels = np.random.default_rng(0).normal(3, 1, (50, 9)).astype(np.float32)
    for name in SHAPES:
        points = similarity.named(name).prepare(kernels).astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(similarity.named("correlation").prepare(kernels).mean(axis=1), 0, atol=1e-6)


def test_unit_scales_to_length_one_and_leaves_zeros_and_its_argument_alone():
    points = np.array([[3, 4], [-2, 0], [0, 0], [3e-30, 4e-30]], np.float32)
    before = points.copy()
    scaled = distances.unit(points)
    np.testing.assert_allclose(scaled, [[0.6, 0.8], [-1, 0], [0, 0], [0.6, 0.8]], rtol=1e-6)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(points, before)


@EACH
def test_preparing_does_not_change_the_kernels(name):
    kernels = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    before = kernels.copy()
    similarity.named(name).prepare(kernels)
    similarity.named(name).comparable(kernels)
    np.testing.assert_array_equal(kernels, before)


@EACH
def test_an_orbit_has_the_kernel_itself_first(name):
    turns, signs = similarity.named(name).orbit(9)
    assert (turns[0].tolist(), signs[0]) == (list(range(9)), 1)
    assert len(turns) == len(signs) == {"symmetric": 8, "correlation": 2, "scale-free": 2}.get(name, 1)
    assert signs.dtype == np.float32


def test_each_distance_says_what_it_is():
    for name, distance in distances.named_distances.items():
        assert similarity.named(name) is distance
        assert distance.name == name
        assert all((distance.formula, distance.reference, distance.unit))


def test_a_distance_that_is_none_and_kernels_that_cannot_be_turned_are_refused():
    with pytest.raises(UnknownNameError, match=r"'cosin'.*'cosine'\?"):
        similarity.named("cosin")
    with pytest.raises(InvalidValueError, match=r"the kernels have 15 weights; .* square"):
        similarity.named("symmetric").orbit(15)
