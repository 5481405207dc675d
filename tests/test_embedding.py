import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import datasets, manifold

from kclib import embedding
from kclib.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")  # umap's import
POINTS = datasets.make_blobs(300, 9, centers=4, random_state=0)[0].astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def placed(store):
    return embedding.layout(POINTS, store=store)


@pytest.fixture
def fits(monkeypatch):
    """A umap that counts its fits and answers the number of the fit."""
    counted = []

    def fit(points):
        counted.append(points)
        return np.full((len(points), 2), len(counted), np.float64)

    monkeypatch.setitem(
        sys.modules, "umap", SimpleNamespace(UMAP=lambda **_: SimpleNamespace(fit_transform=fit))
    )
    return counted


def test_unit_points_have_length_one_and_keep_their_direction():
    assert embedding.unit(np.array([[3.0, 4.0], [-2.0, 0.0]])).tolist() == [[0.6, 0.8], [-1.0, 0.0]]
    scaled = embedding.unit(POINTS)
    assert np.allclose((scaled * POINTS).sum(1), np.linalg.norm(POINTS, axis=1), rtol=1e-5)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1)


def test_unit_leaves_zeros_alone():
    assert embedding.unit(np.zeros((2, 9), np.float32)).tolist() == [[0] * 9] * 2


def test_a_layout_keeps_neighbours_together(placed):
    assert (placed.shape, placed.dtype) == ((300, 2), np.float32)
    assert manifold.trustworthiness(POINTS, placed, n_neighbors=15) > 0.8
    shuffled = np.random.default_rng(0).permutation(placed)
    assert manifold.trustworthiness(POINTS, shuffled, n_neighbors=15) < 0.6


def test_a_stored_layout_is_not_fitted_again(placed, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # an import of it would fail
    assert np.array_equal(embedding.layout(POINTS, store=store), placed)
    with pytest.raises(ImportError):
        embedding.layout(POINTS, store=store, seed=1)


def test_the_same_seed_gives_the_same_bits(placed, tmp_path):
    assert embedding.layout(POINTS, store=Store(tmp_path)).tobytes() == placed.tobytes()


@pytest.mark.parametrize("change", [{"n_neighbors": 5}, {"min_dist": 0.2}, {"seed": 3}])
def test_other_settings_are_fitted_anew(fits, tmp_path, change):
    store = Store(tmp_path)
    first = embedding.layout(POINTS, store=store)
    other = embedding.layout(POINTS, store=store, **change)
    assert (first[0, 0], other[0, 0], len(fits)) == (1, 2, 2)


def test_points_of_equal_bytes_and_another_shape_are_fitted_anew(fits, tmp_path):
    store = Store(tmp_path)
    embedding.layout(POINTS, store=store)
    assert embedding.layout(POINTS.reshape(900, 3), store=store).shape == (900, 2)


def test_trustworthiness_is_scikit_learns_on_all_points(placed):
    expected = manifold.trustworthiness(POINTS, placed, n_neighbors=15)
    assert embedding.trustworthiness(POINTS, placed) == pytest.approx(expected)


def test_trustworthiness_draws_points_and_their_places_together():
    line = np.arange(200.0)[:, None] * [1, 1]
    assert embedding.trustworthiness(line, line, limit=50) == 1
