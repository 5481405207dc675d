"""Kernels, banks and distances that several tests measure with."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import pairwise_distances

from kclib.kernels import KernelBank, Layer
from kclib.kmeans.symmetric import transforms
from kclib.similarity import distances

NAMES = list(distances.named_distances)
EACH = pytest.mark.parametrize("distance", NAMES)
LARGEST = {"cosine": 2, "correlation": 1, "scale-free": 1}


def cloud(n, seed, d=9):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def bank_of(*layers):
    """Return a bank of layers "a", "b", ... given as their points ``(n, 9)``."""
    starts = np.cumsum([0, *map(len, layers)])
    named = tuple(
        Layer(name, (len(layer), 1, 3, 3), int(start))
        for name, layer, start in zip("abcdefgh", layers, starts, strict=False)
    )
    return KernelBank(np.concatenate(layers).reshape(-1, 3, 3).astype(np.float32), named, {})


def between(distance, points):
    """Return all distances of points ``(n, n)`` in float64, by scipy."""
    points = points.astype(np.float64)
    if distance == "symmetric":
        apart = [pairwise_distances(points[:, turn], points) for turn in transforms(3)]
        return np.minimum.reduce(apart)
    if distance == "correlation":
        return 1 - np.abs(1 - squareform(pdist(points, "correlation")))
    if distance == "scale-free":
        cosines = 1 - squareform(pdist(points, "cosine"))
        return np.sqrt(np.maximum(0, 1 - np.square(cosines)))
    return squareform(pdist(points, distance))
