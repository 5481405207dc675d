"""One tree for every K: a fine codebook whose clusters are merged by Ward's criterion."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kclib._util import checks
from kclib.kmeans import _fitting, _lloyd, _nearest, _settings, _ward
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._settings import KMeans, Options

_START = 0.4  # share of the work
_ROUNDS_OF_A_CUT = 3
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
    _framed: "_fitting.Framed"
    _means: np.ndarray  # float32 (L, d), framed: each leaf's weighted mean
    _mass: np.ndarray  # float64 (L,): sample weights of each leaf, which sum to 1
    _merges: "_ward.Merges"
    _within: float  # inertia of the points around their leaves
    _total: float  # sum of the sample weights

    @property
    def n_leaves(self) -> int:
        """Number of leaves, the largest K of a cut."""
        return len(self.counts)

    def cut(self, n_clusters: int) -> Codebook:
        """Return a codebook of K centres: the tree's clusters, improved by three rounds over the leaves.

        Fewer come back if fewer leaves no leaf badly served.

        Raises
        ------
        InvalidValueError
            K below 1 or above the number of leaves.
        """
        n_clusters = checks.check_whole("n_clusters", n_clusters, 1, self.n_leaves, "the number of leaves")
        framed = self._rounds(n_clusters)
        framed = replace(framed, inertia=self._estimated(framed))
        counts = np.bincount(framed.labels, self.counts, len(framed.centres)).astype(np.int64)
        found = self._framed.frame.out_of(framed)
        return Codebook(found.centres, counts, found.labels, found.inertia)

    def _rounds(self, n_clusters: int) -> KMeans:
        """Return a clustering of the leaves, framed."""
        clusters, weight = self._merges.cut(n_clusters), self._weight
        options = replace(self._framed.options, max_iter=_ROUNDS_OF_A_CUT, tol=0.0)
        centres = _lloyd.means(self._means, weight, clusters, _first(self._means, clusters), options.threads)
        return _lloyd.fit(self._means, weight, centres, clusters, options, Progress())

    def _estimated(self, framed: KMeans) -> float:
        """Return the inertia of exact labels: that by leaves, times how much less some points show."""
        sample, weight = self._sample
        guess, n_threads = framed.labels[self.labels[sample]], self._framed.options.threads
        points = self._framed.points[sample]
        exact = _nearest.nearest(points, framed.centres, guess=guess, n_threads=n_threads).errors
        by_leaf = _nearest.errors(points, framed.centres, guess, n_threads=n_threads)
        less = _lloyd.total(exact, weight) / (_lloyd.total(by_leaf, weight) or 1.0)
        return less * (self._within + self._total * framed.inertia)

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
        if n_clusters <= self.n_leaves:
            start = self._rounds(n_clusters)
            return framed.fit(start.centres, start.labels[self.labels], report)
        return framed.grown([], n_clusters, report)

    @cached_property
    def _sample(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of some points, and their sample weights."""
        n, sample_weight = len(self.labels), self._framed.sample_weight
        rows = np.random.default_rng(self._framed.options.seed).choice(n, min(n, _SAMPLE), replace=False)
        rows.sort()
        return rows, None if sample_weight is None else sample_weight[rows]

    @cached_property
    def _weight(self) -> np.ndarray:
        return self._mass.astype(np.float32)


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
        Called with each `FitStep`. A true answer ends the rounds of the fine k-means.

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
    weights = np.ones(len(labels), np.float32) if sample_weight is None else sample_weight
    mass = np.bincount(labels, weights, len(means))
    total = mass.sum()
    errors = _nearest.errors(framed.points, means, labels, n_threads=options.threads)
    made = Tree(
        labels, np.bincount(labels, minlength=len(means)), framed, means, mass / total,
        _ward.merges(means, mass), _lloyd.total(errors, sample_weight), total,
    )  # fmt: skip
    report(report.left)
    return made


def _fine(framed: "_fitting.Framed", leaves: int, report: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of the leaves and the leaf of each point."""
    points, sample_weight, options = framed.points, framed.sample_weight, framed.options
    if len(points) <= 2 * leaves:
        distinct, labels = np.unique(points, axis=0, return_inverse=True)
        if len(distinct) <= leaves:
            return distinct, labels.reshape(-1).astype(np.int32)
    report.unit = framed.frame.inertia_unit
    start = _lloyd.start(points, sample_weight, leaves, options, report.part(_START))
    found = _lloyd.fit(points, sample_weight, *start, options, report)
    means = _lloyd.means(points, sample_weight, found.labels, found.centres, options.threads)
    return means, found.labels


def _first(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the first point of each cluster."""
    return points[np.unique(labels, return_index=True)[1]]
