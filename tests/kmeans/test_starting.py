import numpy as np
import pytest
from partitions import heavy_tailed
from scipy.spatial.distance import cdist

from kclib.kmeans import Options, _starting


def options(**changed):
    return Options(**{"max_iter": 25, "tol": None, "reach": 1.6, "seed": 0, "n_threads": None} | changed)


@pytest.mark.parametrize("k", [1, 20, 400])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_start_has_k_centres_and_near_ones(k, weighted, monkeypatch):
    monkeypatch.setattr(_starting, "_LEAVES", 512)
    points = heavy_tailed(3000)
    sample_weight = np.random.default_rng(1).integers(0, 4, 3000).astype(np.float32) if weighted else None
    centres, guess = _starting.start(points, sample_weight, k, options(seed=3))
    assert (centres.shape, centres.dtype) == ((k, 9), np.float32)
    own = np.square(points.astype(np.float64) - centres[guess]).sum()
    assert own <= 2 * np.square(cdist(points, centres).min(1)).sum()
    assert np.array_equal(_starting.start(points, sample_weight, k, options(seed=3, n_threads=1))[0], centres)
    if k > 1:
        assert not np.array_equal(_starting.start(points, sample_weight, k, options(seed=4))[0], centres)


def test_centres_are_started_on_points_with_weight_however_few_they_are():
    points, sample_weight = heavy_tailed(20_000), np.zeros(20_000, np.float32)
    sample_weight[[5, 70, 900]] = 1
    centres, _ = _starting.start(points, sample_weight, 3, options())
    np.testing.assert_allclose(cdist(points[[5, 70, 900]], centres).min(1), 0, atol=1e-6)
