"""What the tests of k-means share: points as kernels have them, and what a partition must be."""

import math
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from kclib.kmeans.symmetric import transforms


def heavy_tailed(n, d=9, seed=0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, d)) * draw.lognormal(-3, 1.5, size=(n, 1))).astype(np.float32)


def uneven(n, seed=0):
    return np.random.default_rng(seed).lognormal(size=n).astype(np.float32)


def assert_is_a_partition(points, n_clusters, result, sample_weight=None):
    distinct = len(np.unique(points, axis=0))
    assert result.centres.shape == (min(n_clusters, distinct), points.shape[1])
    assert (result.centres.dtype, result.labels.dtype) == (np.float32, np.int32)
    assert (np.bincount(result.labels, minlength=len(result.centres)) > 0).all()
    assert len(np.unique(result.centres, axis=0)) == len(result.centres)
    distances = cdist(points.astype(np.float64), result.centres.astype(np.float64))
    own = distances[np.arange(len(points)), result.labels]
    rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(points.astype(np.float64), axis=1)
    assert (own <= (1 + 1e-5) * distances.min(1) + rounding).all()
    sample_weight = np.ones(len(points)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    least = sample_weight @ np.square(rounding)
    assert result.inertia == pytest.approx(sample_weight @ np.square(own), rel=1e-4, abs=least)


def assert_same_bits(one, other):
    np.testing.assert_array_equal(one.centres, other.centres)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert (one.inertia, one.iterations, one.converged) == (other.inertia, other.iterations, other.converged)


@contextmanager
def at_most(seconds):
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it does not end"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def restored(found):
    """Return the turned and scaled centre that stands for each point of a symmetric clustering."""
    turns = transforms(math.isqrt(found.centres.shape[1]))
    if not found.transforms.any():
        turns = np.arange(found.centres.shape[1])[None]
    turned = np.take_along_axis(found.centres[found.labels], turns[found.transforms], axis=1)
    return found.scales[:, None] * turned
