import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from partitions import heavy_tailed, restored, uneven

from kclib import kmeans
from kclib.errors import InvalidValueError
from kclib.kmeans.symmetric import fit, transforms

COMBINATIONS = [
    {"scaled": scaled, "turned": turned} for scaled, turned in itertools.product([False, True], repeat=2)
]
EACH = pytest.mark.parametrize("how", COMBINATIONS, ids=["neither", "turned", "scaled", "both"])
GRIDS = arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 9])),
    elements=st.integers(-2, 2).map(float),
)


def copies(n_shapes, n, scaled, turned, side=3, seed=0):
    """Return kernels made of a few shapes, by every turn and by lengths of both signs if wanted."""
    draw = np.random.default_rng(seed)
    shapes = draw.normal(size=(n_shapes, side * side))
    which = np.arange(n) % n_shapes
    kernels = shapes[which]
    if turned:
        kernels = np.take_along_axis(kernels, transforms(side)[draw.integers(0, 8, n)], axis=1)
    if scaled:
        kernels *= draw.choice([-1, 1], (n, 1)) * draw.lognormal(sigma=2, size=(n, 1))
    return kernels.astype(np.float32), which


def faces(kernel):
    """Return a square kernel flipped and rotated in all ways."""
    return [np.rot90(face, quarter) for face in (kernel, np.flip(kernel, 1)) for quarter in range(4)]


def squared_distances(points, centres, scaled, turned):
    """Return those of every kernel to every centre, in float64, the best of all turns and scales."""
    points, side = points.astype(np.float64), math.isqrt(points.shape[1])
    result = np.full((len(points), len(centres)), np.inf)
    for j, centre in enumerate(centres.astype(np.float64)):
        for face in faces(centre.reshape(side, side))[: None if turned else 1]:
            member = face.ravel()
            best = (points @ member / (member @ member))[:, None] if scaled else 1
            result[:, j] = np.minimum(result[:, j], np.square(points - best * member).sum(1))
    return result


def assert_is_a_partition(points, n_clusters, result, scaled, turned, sample_weight=None):
    n, d = points.shape
    assert result.centres.shape == (len(result.centres), d)
    assert 1 <= len(result.centres) <= n_clusters
    dtypes = (result.centres.dtype, result.labels.dtype, result.transforms.dtype, result.scales.dtype)
    assert dtypes == (np.float32, np.int32, np.uint8, np.float32)
    assert result.labels.shape == result.transforms.shape == result.scales.shape == (n,)
    assert (np.bincount(result.labels, minlength=len(result.centres)) > 0).all()
    if scaled:
        np.testing.assert_allclose(np.linalg.norm(result.centres, axis=1), 1, rtol=1e-5)
    else:
        assert (result.scales == 1).all()
    if not turned:
        assert (result.transforms == 0).all()
    own = np.square(points.astype(np.float64) - restored(result)).sum(1)
    least = squared_distances(points, result.centres, scaled, turned).min(1)
    squares = np.square(points.astype(np.float64)).sum(1)
    assert (own <= least + 4e-6 * (squares + least)).all()
    sample_weight = np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64)
    assert result.inertia == pytest.approx(
        sample_weight @ own, rel=1e-4, abs=1e-6 * (sample_weight @ squares)
    )
    if len(result.centres) < n_clusters:
        assert sample_weight @ own <= 1e-6 * (sample_weight @ squares)


def assert_same_bits(one, other):
    for name in ("centres", "labels", "transforms", "scales"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.inertia, one.iterations, one.converged) == (other.inertia, other.iterations, other.converged)


@pytest.mark.parametrize("side", [2, 3, 5])
def test_the_transforms_are_the_group_of_the_square(side):
    turns = transforms(side)
    assert turns.shape == (8, side * side)
    assert turns[0].tolist() == list(range(side * side))
    group = {tuple(turn) for turn in turns.tolist()}
    assert len(group) == 8
    assert all(sorted(turn) == sorted(turns[0]) for turn in group)
    assert {tuple(a[b]) for a in turns for b in turns} == group
    kernel = np.random.default_rng(0).normal(size=(side, side))
    assert {kernel.ravel()[turn].tobytes() for turn in turns} == {face.tobytes() for face in faces(kernel)}


def test_a_turned_and_negated_kernel_is_its_centre_turned_and_negated():
    kernel = np.arange(9.0).reshape(3, 3)
    points = np.stack([kernel.ravel(), 3 * np.rot90(kernel).ravel(), -np.flip(kernel, 0).ravel()])
    result = fit(points, 1, scaled=True, turned=True)
    assert len(result.centres) == 1
    assert np.abs(result.scales) / np.linalg.norm(kernel) == pytest.approx([1, 3, 1])
    assert np.sign(result.scales[1] * result.scales[0]) == 1
    assert np.sign(result.scales[2] * result.scales[0]) == -1
    assert len(set(result.transforms.tolist())) == 3
    np.testing.assert_allclose(restored(result), points, atol=1e-5)


@EACH
@given(GRIDS, st.data())
@settings(deadline=None, max_examples=25)
def test_any_k_on_kernels_that_are_often_alike_is_a_partition(how, points, data):
    n_clusters = data.draw(st.integers(1, len(points)))
    assert_is_a_partition(points, n_clusters, fit(points, n_clusters, **how), **how)


@EACH
@given(
    st.integers(1, 200), st.sampled_from([1, 4, 9, 25]), st.floats(0, 1), st.booleans(), st.integers(0, 99)
)
@settings(deadline=None, max_examples=25)
def test_labels_turns_and_scales_are_exact(how, n, d, share, weighted, seed):
    points, n_clusters = heavy_tailed(n, d, seed), 1 + round(share * (n - 1))
    sample_weight = uneven(n, seed) * (np.arange(n) % 3 > 0) if weighted and n > 1 else None
    result = fit(points, n_clusters, sample_weight=sample_weight, seed=seed, **how)
    assert_is_a_partition(points, n_clusters, result, **how, sample_weight=sample_weight)


@EACH
def test_many_clusters_are_a_partition(how):
    points = heavy_tailed(2000)
    result = fit(points, 300, **how)
    assert len(result.centres) == 300
    assert_is_a_partition(points, 300, result, **how)


@EACH
@pytest.mark.parametrize("side", [2, 3, 5])
def test_the_shapes_behind_the_kernels_are_found(how, side):
    points, which = copies(5, 400, side=side, **how)
    result = fit(points, 5, **how)
    assert result.inertia <= 1e-9 * np.square(points).sum()
    assert len(result.centres) == 5
    assert len(set(zip(which.tolist(), result.labels.tolist(), strict=True))) == 5
    np.testing.assert_allclose(restored(result), points, rtol=1e-4, atol=1e-5 * np.abs(points).max())


@EACH
def test_a_cluster_for_each_kernel_restores_them(how):
    points = heavy_tailed(60)
    result = fit(points, 60, **how)
    assert result.inertia <= 1e-9 * np.square(points).sum()
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    assert (np.abs(restored(result) - points) <= 1e-5 * lengths).all()


@EACH
def test_symmetries_that_a_few_shapes_have_serve_their_kernels_better(how):
    points = copies(8, 1000, **how)[0] + 0.05 * np.random.default_rng(1).normal(size=(1000, 9))
    plain = kmeans.fit(points, 8).inertia
    found = fit(points, 8, **how).inertia
    assert found <= (0.5 if any(how.values()) else 1.05) * plain


@EACH
@pytest.mark.parametrize("seed", [25, 30, 36])
def test_more_clusters_than_kernels_with_weight_leave_none_empty(how, seed):
    points = 100 + heavy_tailed(400, 4, seed)
    sample_weight = np.arange(400) < 28
    assert_is_a_partition(
        points, 200, fit(points, 200, sample_weight=sample_weight, **how), **how, sample_weight=sample_weight
    )


@pytest.mark.parametrize("n_clusters", [1, 20, 300])
def test_without_symmetries_it_is_ordinary_k_means(n_clusters):
    points = heavy_tailed(2000)
    mine, theirs = fit(points, n_clusters), kmeans.fit(points, n_clusters)
    assert len(mine.centres) == n_clusters
    assert mine.inertia == pytest.approx(theirs.inertia, rel=0.05)


@pytest.mark.parametrize("sample_weight", [None, uneven(300)], ids=["alike", "weighted"])
def test_one_centre_of_scaled_kernels_is_their_leading_eigenvector(sample_weight):
    points = heavy_tailed(300)
    moments = (points.astype(np.float64).T * (1 if sample_weight is None else sample_weight)) @ points
    values, vectors = np.linalg.eigh(moments)
    result = fit(points, 1, scaled=True, sample_weight=sample_weight)
    assert abs(result.centres[0] @ vectors[:, -1]) == pytest.approx(1, abs=1e-5)
    assert result.inertia == pytest.approx(values[:-1].sum(), rel=1e-4)
    np.testing.assert_allclose(
        result.scales, points @ result.centres[0], rtol=1e-4, atol=1e-5 * np.abs(points).max()
    )


@pytest.mark.parametrize("turned", [False, True])
def test_each_centre_is_the_best_for_its_kernels(turned):
    points = heavy_tailed(1000)
    result = fit(points, 12, turned=turned, tol=0, max_iter=500)
    assert result.converged
    assert result.iterations < 500
    back = np.argsort(transforms(3), axis=1)[result.transforms]
    aligned = np.take_along_axis(points.astype(np.float64), back, axis=1)
    means = [aligned[result.labels == j].mean(0) for j in range(12)]
    np.testing.assert_allclose(result.centres, means, rtol=1e-4, atol=1e-5)


@EACH
def test_kernels_without_a_weight_have_scale_zero_if_scaled(how):
    points = heavy_tailed(60)
    points[::3] = 0
    result = fit(points, 7, **how)
    assert_is_a_partition(points, 7, result, **how)
    if how["scaled"]:
        assert (result.scales[::3] == 0).all()
    nothing = fit(np.zeros((20, 9)), 4, **how)
    assert (len(nothing.centres), nothing.inertia) == (1, 0)
    assert not restored(nothing).any()


@EACH
@pytest.mark.parametrize("factor", [2.0**-80, 2.0**60])
def test_how_large_the_kernels_are_makes_no_difference(how, factor):
    points = heavy_tailed(200)
    one, other = fit(points, 12, **how), fit(factor * points, 12, **how)
    np.testing.assert_array_equal(other.labels, one.labels)
    np.testing.assert_array_equal(other.transforms, one.transforms)
    np.testing.assert_allclose(restored(other), factor * restored(one), rtol=1e-4)
    assert other.inertia == pytest.approx(factor**2 * one.inertia, rel=1e-4, abs=0)


@EACH
def test_kernels_of_one_weight_are_clustered(how):
    points = np.array([[1.0], [1.0], [-1.0], [8.0], [-8.0], [0.0]])
    result = fit(points, 2, **how)
    assert_is_a_partition(points.astype(np.float32), 2, result, **how)
    if how["scaled"]:
        assert (len(result.centres), result.inertia) == (1, pytest.approx(0))


@pytest.mark.parametrize("scaled", [False, True])
def test_an_integer_weight_is_that_many_copies(scaled):
    points, counts = heavy_tailed(400), np.random.default_rng(0).integers(1, 4, 400)
    weighted = fit(points, 1, scaled=scaled, sample_weight=counts)
    copied = fit(points.repeat(counts, axis=0), 1, scaled=scaled)
    assert weighted.inertia == pytest.approx(copied.inertia, rel=1e-5)
    sign = np.sign((weighted.centres * copied.centres).sum())
    np.testing.assert_allclose(sign * weighted.centres, copied.centres, rtol=1e-4, atol=1e-6)


@EACH
def test_weights_that_are_all_alike_only_scale_the_inertia(how):
    points = heavy_tailed(400)
    plain, weighted = fit(points, 12, **how), fit(points, 12, sample_weight=np.full(400, 8.0), **how)
    np.testing.assert_array_equal(weighted.labels, plain.labels)
    np.testing.assert_allclose(weighted.centres, plain.centres, rtol=1e-5, atol=1e-6)
    assert weighted.inertia == pytest.approx(8 * plain.inertia, rel=1e-6)


@EACH
def test_kernels_that_weigh_more_are_served_better(how):
    points, heavy = heavy_tailed(1000), np.arange(1000) % 2 == 0

    def loss(sample_weight):
        return np.square(points - restored(fit(points, 12, sample_weight=sample_weight, **how)))[heavy].sum()

    assert loss(np.where(heavy, 100, 1)) < 0.95 * loss(None)


@EACH
@pytest.mark.parametrize("n_clusters", [12, 300])
def test_same_seed_gives_the_same_bits_on_any_number_of_threads(how, n_clusters):
    points, sample_weight = heavy_tailed(2000), uneven(2000)
    one, *others = (
        fit(points, n_clusters, sample_weight=sample_weight, seed=7, n_threads=n, **how) for n in (1, 2, 3)
    )
    for other in others:
        assert_same_bits(other, one)


@EACH
def test_rounds_end_as_told_and_never_make_it_worse(how):
    points, steps = heavy_tailed(6000), []
    none = fit(points, 12, max_iter=0, **how)
    assert (none.iterations, none.converged) == (0, False)
    two = fit(points, 12, max_iter=2, tol=0, **how)
    assert two.iterations == 2
    full = fit(points, 12, max_iter=20, tol=0, progress=steps.append, **how)
    at_once = fit(points, 12, max_iter=20, tol=0, progress=lambda step: True, **how)
    assert (at_once.iterations, at_once.converged) == (0, False)
    assert_is_a_partition(points, 12, at_once, **how)
    assert full.inertia <= two.inertia < none.inertia == at_once.inertia
    assert sum(step.share for step in steps) == pytest.approx(1)
    told = np.array([step.inertia for step in steps])
    assert math.isnan(told[0])
    assert told[-1] == full.inertia
    known = told[np.count_nonzero(np.isnan(told)) :]
    assert (np.diff(known) <= 1e-6 * known[:-1]).all()


@EACH
def test_what_the_caller_gives_stays_as_it_is(how):
    points, sample_weight = heavy_tailed(300), uneven(300)
    kept = points.copy(), sample_weight.copy()
    one = fit(points, 12, sample_weight=sample_weight, **how)
    np.testing.assert_array_equal(points, kept[0])
    np.testing.assert_array_equal(sample_weight, kept[1])
    points.flags.writeable = sample_weight.flags.writeable = False
    assert_same_bits(fit(points, 12, sample_weight=sample_weight, **how), one)


@pytest.mark.parametrize("d", [2, 6, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_that_are_not_square_cannot_be_turned(d, scaled):
    with pytest.raises(InvalidValueError, match=f"{d} weights; .*square"):
        fit(np.ones((5, d)), 2, scaled=scaled, turned=True)


@pytest.mark.parametrize("d", [2, 6, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_that_are_not_square_are_clustered_without_turns(d, scaled):
    points = heavy_tailed(300, d)
    result = fit(points, 12, scaled=scaled)
    centres, exact = result.centres.astype(np.float64), points.astype(np.float64)
    best = (exact @ centres.T) / np.square(centres).sum(1) if scaled else np.ones((300, 12))
    errors = np.square(exact[:, None] - best[:, :, None] * centres).sum(2)
    own = np.square(exact - restored(result)).sum(1)
    assert (own <= errors.min(1) + 4e-6 * np.square(exact).sum(1)).all()
    assert result.inertia == pytest.approx(own.sum(), rel=1e-4)
    assert result.inertia < 0.5 * np.square(exact - exact.mean(0)).sum()
    assert (result.transforms == 0).all()
    assert (result.scales == 1).all() == (not scaled)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"n_clusters": 0}, "n_clusters is 0; .* 1 to 4,"),
        ({"n_clusters": 5}, "n_clusters is 5; .* 1 to 4,"),
        ({"points": np.full((4, 4), np.nan)}, "NaN or infinite"),
        ({"points": np.ones(4)}, "the points have shape"),
        ({"sample_weight": np.ones(3)}, "sample_weight has shape"),
        ({"sample_weight": [1, 1, 1, -1]}, "sample_weight must be finite"),
        ({"sample_weight": np.zeros(4)}, "sample_weight must be finite"),
        ({"max_iter": -1}, "max_iter is -1"),
        ({"tol": np.nan}, "tol is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"n_threads": 0}, "n_threads is 0"),
    ],
)
def test_what_is_out_of_range_is_refused(changed, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        fit(**{"points": np.eye(4), "n_clusters": 2, **changed})
