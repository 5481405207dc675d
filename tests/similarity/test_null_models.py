import numpy as np
import pytest
from scipy import stats

from kclib.errors import UnknownNameError
from kclib.similarity import null_models

EACH = pytest.mark.parametrize("name", null_models.named_nulls)


def correlated(n=20_000, d=9, seed=0):
    """Return kernels of unequal means and variances whose neighbouring weights are alike."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(n, d)) @ (np.eye(d) + 0.9 * np.eye(d, k=1)) * np.linspace(0.5, 2, d)
    return (mixed + np.arange(d)).astype(np.float32)


def lengths(points):
    return np.linalg.norm(points, axis=1)


@EACH
def test_a_draw_has_the_shape_of_the_kernels_and_leaves_them_alone(name):
    points = correlated(50)
    before = points.copy()
    drawn = null_models.drawn(name, points)
    assert (drawn.shape, drawn.dtype) == (points.shape, np.float32)
    assert not np.array_equal(drawn, points)
    np.testing.assert_array_equal(points, before)


@EACH
def test_a_seed_gives_one_draw_and_another_seed_another(name):
    points = correlated(50)
    first, again, other = (null_models.drawn(name, points, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_shuffling_within_kernels_keeps_each_ones_weights_and_loses_their_places():
    points = correlated()
    drawn = null_models.drawn("shuffled within kernels", points)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.sort(points, axis=1))
    np.testing.assert_allclose(lengths(drawn), lengths(points), rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(axis=0), points.mean(), atol=0.1)  # the positions are alike now
    assert np.ptp(points.mean(axis=0)) > 7


def test_every_kernel_is_shuffled_in_its_own_way_and_every_order_is_as_likely():
    drawn = null_models.drawn("shuffled within kernels", np.tile(np.arange(3, dtype=np.float32), (6000, 1)))
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_shuffling_across_kernels_keeps_each_positions_weights_and_loses_their_company():
    points = correlated()
    drawn = null_models.drawn("shuffled across kernels", points)
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(points, axis=0))
    assert np.corrcoef(points, rowvar=False)[0, 1] > 0.6
    apart = np.corrcoef(drawn, rowvar=False)[~np.eye(9, dtype=bool)]
    assert np.abs(apart).max() < 5 / np.sqrt(len(points))
    assert not np.allclose(lengths(drawn), lengths(points), rtol=0.01)


def test_a_gaussian_keeps_mean_and_covariance_and_loses_the_rest():
    points = correlated()
    points[::2] = points[0]  # far from Gaussian: half of the kernels are the same
    drawn = null_models.drawn("Gaussian of the same covariance", points)
    np.testing.assert_allclose(drawn.mean(axis=0), points.mean(axis=0), atol=0.1)
    expected = np.cov(points, rowvar=False)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), expected, atol=0.05 * expected.max())
    assert np.abs(stats.kurtosis(drawn)).max() < 0.2
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_a_gaussian_of_kernels_that_vary_in_one_direction_stays_on_it():
    direction = np.array([3, 4, 0, 0], np.float32)
    points = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32) * direction
    drawn = null_models.drawn("Gaussian of the same covariance", points)
    np.testing.assert_allclose(drawn[:, 1], drawn[:, 0] * 4 / 3, atol=1e-4)
    assert drawn[:, 0].std() == pytest.approx(points[:, 0].std(), rel=0.15)


def test_a_null_model_that_is_none_is_refused():
    with pytest.raises(UnknownNameError, match="'shuffled'"):
        null_models.drawn("shuffled", correlated(5))
