"""One tree for every K: a fine codebook whose clusters are merged by Ward's criterion."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kclib._util import checks
from kclib.kmeans import _fitting, _lloyd, _nearest, _settings, _starting
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._settings import KMeans, Options

_START = 0.4  # share of the work
_SAMPLE = 1 << 14  # points from which a cut's inertia is estimated


@dataclass(frozen=True)
class Codebook:
    """K representatives, found on the leaves of a tree.

    Attributes
    ----------
    centres : numpy.ndarray
        float32 ``(K, d)``, all distinct.
    counts : numpy.ndarray
        int64 ``(K,)``: points of each cluster.
    leaves : numpy.ndarray
        int32 ``(L,)``: the cluster of each leaf; ``leaves[tree.labels]`` is the cluster of each point.
    inertia : float
        An estimate, from up to 16,384 points, of the weighted sum of squared distances of all points to
        their nearest centres.
    """

    centres: np.ndarray
    counts: np.ndarray
    leaves: np.ndarray
    inertia: float


@dataclass(frozen=True)
class Tree:
    """Clusterings of the same points for every K, each in a fraction of a second.

    Attributes
    ----------
    labels : numpy.ndarray
        int32 ``(n,)``: the leaf of each point.
    counts : numpy.ndarray
        int64 ``(L,)``: points of each leaf.
    """

    labels: np.ndarray
    counts: np.ndarray
    _framed: _fitting.Framed
    _leaves: _starting.Leaves
    _within: float  # framed inertia of the points around their leaves

    @property
    def n_leaves(self) -> int:
        """Number of leaves, the largest K of a cut."""
        return len(self.counts)

    def cut(self, n_clusters: int) -> Codebook:
        """Return a codebook of K centres: the tree's clusters, improved by rounds over the leaves.

        Fewer come back where fewer centres already serve every leaf as well.

        Raises
        ------
        InvalidValueError
            K below 1 or above the number of leaves.
        """
        n_clusters = checks.check_whole("n_clusters", n_clusters, 1, self.n_leaves, "the number of leaves")
        framed = self._leaves.cut(n_clusters)
        framed = replace(framed, inertia=self._estimated(framed))
        counts = np.bincount(framed.labels, self.counts, len(framed.centres)).astype(np.int64)
        found = self._framed.frame.out_of(framed)
        return Codebook(found.centres, counts, found.labels, found.inertia)

    def _estimated(self, framed: KMeans) -> float:
        """Return the inertia of exact labels: that by leaves, times how much less some points show."""
        sample, weight = self._sample
        guess, n_threads = framed.labels[self.labels[sample]], self._framed.options.threads
        points = self._framed.points[sample]
        exact = _nearest.nearest(points, framed.centres, guess=guess, n_threads=n_threads).errors
        by_leaf = _nearest.errors(points, framed.centres, guess, n_threads=n_threads)
        less = _lloyd.total(exact, weight) / (_lloyd.total(by_leaf, weight) or 1.0)
        return float(less * (self._within + self._leaves.total * framed.inertia))

    def fit(
        self,
        n_clusters: int,
        *,
        max_iter: int | None = None,
        progress: Callable[[FitStep], object] | None = None,
    ) -> KMeans:
        """Return a clustering of all points, with exact labels, that starts from the cut.

        Parameters
        ----------
        n_clusters : int
            1 to n; above the leaves, centres are started inside the clusters of a cut.
        max_iter : int, optional
            Most rounds over all points; by default as many as the tree was made with. One round takes a
            fraction of a second and lowers the inertia most.
        progress : callable, optional
            As in `fit`.
        """
        n_clusters = _settings.check_k(n_clusters, len(self.labels))
        framed, report = self._framed, Progress(progress)
        if max_iter is not None:
            framed = replace(framed, options=replace(framed.options, max_iter=max_iter))
        done = report.part(_START)
        start = self._leaves.start(framed.points, framed.sample_weight, n_clusters, done)
        return framed.fit(*start, report)

    @cached_property
    def _sample(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of some points, and their sample weights."""
        n, sample_weight = len(self.labels), self._framed.sample_weight
        rows = np.random.default_rng(self._framed.options.seed).choice(n, min(n, _SAMPLE), replace=False)
        rows.sort()
        return rows, None if sample_weight is None else sample_weight[rows]


def tree(
    points: np.ndarray,
    *,
    leaves: int = 8192,
    sample_weight: np.ndarray | None = None,
    max_iter: int = 25,
    tol: float | None = None,
    reach: float | None = 1.6,
    seed: int = 0,
    n_threads: int | None = None,
    progress: Callable[[FitStep], object] | None = None,
) -> Tree:
    """Make one tree that answers every K: a fine k-means, merged by Ward's criterion.

    A cut at K, improved on the leaves, is within a few per cent of a fit and takes some milliseconds. A fit
    that starts from it has a lower inertia than one that starts from k-means++.

    Parameters
    ----------
    points : array, tensor, DataFrame or KernelBank
        float32 ``(n, d)``, finite.
    leaves : int
        Clusters of the fine k-means; as many as there are distinct points, if these are fewer.
    sample_weight, max_iter, tol, reach, seed, n_threads
        As in `fit`, for the leaves and for `Tree.fit`.
    progress : callable, optional
        Called with each `FitStep`. A true answer ends the work at once; what was made is a tree still.

    Raises
    ------
    InvalidValueError
        points, sample_weight or an option out of range.
    NotEnoughMemoryError
    """
    leaves = checks.check_whole("leaves", leaves, 1)
    options = Options(max_iter, tol, reach, seed, n_threads)
    points = _settings.checked_points(points)
    sample_weight = _settings.checked_sample_weight(sample_weight, len(points))
    leaves = min(leaves, len(points))
    _fitting.check_memory(_lloyd.memory(*points.shape, leaves, options.threads), len(points), leaves)
    report = Progress(progress)
    framed = _fitting.Framed.of(points, sample_weight, options)
    means, labels = _fine(framed, leaves, report)
    made = _starting.Leaves.of(means, labels, sample_weight, options, report.part(0.0))
    errors = _nearest.errors(framed.points, means, labels, n_threads=options.threads)
    report(report.left)
    counts = np.bincount(labels, minlength=len(means))
    return Tree(labels, counts, framed, made, _lloyd.total(errors, sample_weight))


def _fine(framed: _fitting.Framed, leaves: int, report: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of the leaves and the leaf of each point."""
    points, sample_weight, options = framed.points, framed.sample_weight, framed.options
    means, labels = _starting.codebook(points, sample_weight, leaves, options, report.part(_START))
    report.unit = framed.frame.inertia_unit
    found = _lloyd.fit(points, sample_weight, means, labels, options, report)
    return _lloyd.means(points, sample_weight, found.labels, found.centres, options.threads), found.labels
