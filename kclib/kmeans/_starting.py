"""Centres to start from: a fine codebook, merged by Ward's criterion, and many centres grown from few."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kclib.kmeans import _lloyd, _nearest, _seeding, _ward
from kclib.kmeans._fit_progress import Progress
from kclib.kmeans._settings import FLAT, KMeans, Options

_LEAVES, _LEAVES_A_CLUSTER = 8192, 256  # of the codebook that is merged: at most, and for few clusters
_A_CELL = 64  # clusters that are started in one cell, when there are too many for a cut
_LEAVES_IN_A_CELL = 12  # points a cluster that are merged there
_LOCAL_ROUNDS, _TRIALS = 5, 3
_FLAT_SAMPLE = 256  # points a cluster that the first few centres are drawn from


@dataclass(frozen=True)
class Leaves:
    """A fine codebook of points, and its merges.

    Attributes
    ----------
    means : numpy.ndarray
        float32 ``(L, d)``: each leaf's weighted mean.
    labels : numpy.ndarray
        int32 ``(n,)``: the leaf of each point.
    mass : numpy.ndarray
        float32 ``(L,)``: the sum of the sample weights of each leaf, as a share of the whole.
    total : float
        The whole.
    merges : Merges
    options : Options
    """

    means: np.ndarray
    labels: np.ndarray
    mass: np.ndarray
    total: float
    merges: _ward.Merges
    options: Options

    @classmethod
    def of(
        cls,
        means: np.ndarray,
        labels: np.ndarray,
        sample_weight: np.ndarray | None,
        options: Options,
        done: Callable[[float], object] | None = None,
    ) -> "Leaves":
        """Merge leaves."""
        mass = np.bincount(labels, sample_weight, len(means)).astype(np.float64)
        total = mass.sum()
        mass = (mass / total).astype(np.float32)
        return cls(means, labels, mass, total, _ward.merges(means, mass, done), options)

    def cut(self, n_clusters: int) -> KMeans:
        """Return a clustering of the leaves: the tree's clusters, improved by some rounds over the leaves."""
        labels = self.merges.cut(n_clusters)
        first = self.means[np.unique(labels, return_index=True)[1]]
        centres = _lloyd.means(self.means, self.mass, labels, first, self.options.threads)
        options = replace(self.options, max_iter=20 if n_clusters <= FLAT else 3, tol=1e-4)
        return _lloyd.fit(self.means, self.mass, centres, labels, options, Progress())

    def start(
        self,
        points: np.ndarray,
        sample_weight: np.ndarray | None,
        n_clusters: int,
        done: Callable[[float], object] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return K centres to start from, and a near one of each point.

        Those of a cut, or above half of the leaves, centres that are grown in the clusters of a cut.
        """
        half = len(self.means) // 2
        if n_clusters <= half or n_clusters <= len(self.means) == len(self.labels):
            found = self.cut(n_clusters)
            return found.centres, found.labels[self.labels]
        coarse = self.cut(max(1, min(half, n_clusters // _A_CELL)))
        return grow(
            points, sample_weight, coarse.centres, coarse.labels[self.labels], n_clusters, self.options, done,
            leaves=_LEAVES_IN_A_CELL,
        )  # fmt: skip


def start(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    n_clusters: int,
    options: Options,
    done: Callable[[float], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return K centres to start from, and a near one of each point."""
    many = 2 * n_clusters > _LEAVES
    n_leaves = max(_LEAVES // 8, n_clusters // 16) if many else _LEAVES_A_CLUSTER * n_clusters
    n_leaves = min(_LEAVES, n_leaves)
    heard = (_part(done, share) for share in ((0.2, 0.1, 0.7) if many else (0.7, 0.3, 0.0)))
    fine = codebook(points, sample_weight, n_leaves, options, next(heard))
    leaves = Leaves.of(*fine, sample_weight, options, next(heard))
    if done and done(0.0):
        return _runs(points, n_clusters)
    return leaves.start(points, sample_weight, n_clusters, next(heard))


def codebook(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    n_leaves: int,
    options: Options,
    done: Callable[[float], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of small clusters, float32 ``(L, d)``, and the cluster of each point.

    Distinct points, if there are no more than wanted. Otherwise k-means++ makes about √L cells, and then
    clusters in each.
    """
    if len(points) <= 2 * n_leaves:
        distinct, labels = np.unique(points, axis=0, return_inverse=True)
        if len(distinct) <= n_leaves:
            return distinct, labels.reshape(-1).astype(np.int32)
    cells = _flat(points, sample_weight, round(math.sqrt(n_leaves)), options)
    near = _nearest.near(points, cells, n_threads=options.threads, done=done)
    if done and done(0.0):
        return _runs(points, n_leaves)
    centres, labels = grow(points, sample_weight, cells, near, n_leaves, options, done)
    centres, labels = _lloyd.used(centres, labels)
    return _lloyd.means(points, sample_weight, labels, centres, options.threads), labels


def grow(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    cells: np.ndarray,
    labels: np.ndarray,
    n_clusters: int,
    options: Options,
    done: Callable[[float], object] | None = None,
    *,
    leaves: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return K centres made inside the clusters of a smaller clustering, and a near one of each point.

    K is shared out over them by `_seeding.shares`; `leaves` is that of `_seeding.split`.
    """
    errors = _nearest.errors(points, cells, labels, n_threads=options.threads)
    loss = errors if sample_weight is None else errors * sample_weight
    sizes = np.bincount(labels, minlength=len(cells))
    inertias = np.bincount(labels, loss, minlength=len(cells))
    counts = _seeding.shares(inertias, sizes, n_clusters, points.shape[1])
    return _seeding.split(
        points, sample_weight, labels, counts, rounds=_LOCAL_ROUNDS, trials=_TRIALS, leaves=leaves,
        seed=options.seed, n_threads=options.threads, done=done,
    )  # fmt: skip


def _runs(points: np.ndarray, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clusters of points that lie next to each other: what there is when nothing has been found."""
    labels = (np.arange(len(points)) * n_clusters // len(points)).astype(np.int32)
    return points[np.unique(labels, return_index=True)[1]], labels


def _part(done: Callable[[float], object] | None, part: float) -> Callable[[float], object] | None:
    """Return what hears of shares of a part."""
    return done and (lambda share: done(share * part))


def _flat(points, sample_weight, n_clusters: int, options: Options) -> np.ndarray:
    able = np.arange(len(points)) if sample_weight is None else np.flatnonzero(sample_weight)
    if len(able) < n_clusters:
        able = np.arange(len(points))
    size = min(len(able), max(_FLAT_SAMPLE * n_clusters, 4096))
    rows = np.sort(np.random.default_rng(options.seed).choice(able, size, replace=False))
    return _seeding.split(
        points[rows], None if sample_weight is None else sample_weight[rows],
        np.zeros(size, np.int32), np.array([n_clusters]),
        rounds=20, trials=2 + round(math.log(n_clusters)),  # greedy k-means++'s own choice
        sample=size, seed=options.seed, n_threads=options.threads,
    )[0]  # fmt: skip
