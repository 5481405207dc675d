"""Lloyd's rounds over all points, with exact nearest centres in each."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans import _nearest
from kclib.kmeans._fit_progress import Progress
from kclib.kmeans._settings import FLAT, KMeans, Options

ROUND_SHARE = 0.15  # of the work that is left, for a round: how many there will be is not known


def fit(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    centres: np.ndarray,
    guess: np.ndarray | None,
    options: Options,
    progress: Progress,
) -> KMeans:
    """Improve centres by Lloyd's rounds until one gains no more than `tol`, and label the points exactly.

    An empty centre is moved to the worst served point, after every assignment.

    Parameters
    ----------
    points, sample_weight, centres : numpy.ndarray
        As in `_fitting.fit`, checked and framed.
    guess : numpy.ndarray, optional
        int32 ``(n,)``: a centre near each point.
    options : Options
    progress : Progress
    """
    reach, n_threads = None if len(centres) <= FLAT else options.reach, options.threads
    rounds = Rounds(options, len(centres), progress)
    for _ in range(options.max_iter):
        part = progress.part(ROUND_SHARE * progress.left)
        near = reach if guess is not None else None  # a guess for want of a better is looked up in full
        assigned = _nearest.nearest(points, centres, guess=guess, reach=near, n_threads=n_threads, done=part)
        if progress.stopped:
            guess = assigned.labels
            break
        centres, assigned = filled(points, sample_weight, centres, assigned, n_threads)
        guess = assigned.labels
        if not rounds.another(total(assigned.errors, sample_weight)):
            break
        centres = means(points, sample_weight, guess, centres, n_threads)
    part = progress.part(progress.left)
    assigned = _nearest.nearest(points, centres, guess=guess, n_threads=n_threads, done=part)
    labels, errors, exact = merged(centres, assigned.labels), assigned.errors, not progress.stopped
    if exact:
        centres, assigned = filled(
            points, sample_weight, centres, _nearest.Assignment(labels, errors), n_threads
        )
        labels, errors = assigned.labels, assigned.errors
    else:
        centres, labels = used(centres, labels)
    progress.inertia = total(errors, sample_weight)
    progress(progress.left)
    return KMeans(centres, labels, progress.inertia, rounds.made, rounds.converged, exact=exact)


@dataclass
class Rounds:
    """Lloyd's rounds: how many were made, and whether another one is worth it."""

    options: Options
    n_clusters: int
    progress: Progress
    made: int = 0
    converged: bool = False
    before: float = math.inf

    def another(self, inertia: float) -> bool:
        """Note the inertia of an assignment; tell whether the centres shall be moved once more."""
        self.progress.inertia = inertia
        self.converged = self.before - inertia <= self.options.tolerance(self.n_clusters) * inertia
        if self.converged or self.progress.stopped or self.made >= self.options.max_iter:
            return False
        self.before, self.made = inertia, self.made + 1
        return True


def memory(n: int, d: int, n_clusters: int, n_threads: int) -> int:
    """Return about how many bytes a fit takes at most, beside the points."""
    per_point = 4 * (2 * d + 10)  # a framed copy, the cells' copies, orders, labels and errors
    per_centre = 4 * (12 * d + 16) + 4 * n_threads * (d + 6)
    return n * per_point + n_clusters * per_centre + (64 << 20)


def total(errors: np.ndarray, sample_weight: np.ndarray | None) -> float:
    """Return the weighted sum of squared distances, in float64."""
    if sample_weight is None:
        return float(errors.sum(dtype=np.float64))
    return float(np.multiply(errors, sample_weight, dtype=np.float64).sum())


def means(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    labels: np.ndarray,
    centres: np.ndarray,
    n_threads: int,
) -> np.ndarray:
    """Return each cluster's weighted mean, float32 ``(K, d)``; one without weight stays."""
    order, starts = _nearest.by_label(labels, len(centres))
    result = np.empty_like(centres)
    sample_weight = np.ones(0, np.float32) if sample_weight is None else sample_weight
    parts = min(64, len(centres))
    edges = np.searchsorted(starts, np.linspace(0, len(points), parts + 1))
    edges[0], edges[-1] = 0, len(centres)
    threads.side_by_side(
        lambda i: _means(points, sample_weight, order, starts, centres, edges[i], edges[i + 1], result),
        parts,
        n_threads,
    )
    return result


@njit(nogil=True, cache=True)
def _means(points, sample_weight, order, starts, centres, first, last, result):
    d = points.shape[1]
    sums = np.empty(d, np.float64)
    for j in range(first, last):
        sums[:] = 0
        mass = 0.0
        for row in order[starts[j] : starts[j + 1]]:
            weight = np.float64(sample_weight[row]) if len(sample_weight) > 0 else 1.0
            mass += weight
            for k in range(d):
                sums[k] += weight * np.float64(points[row, k])
        for k in range(d):
            result[j, k] = sums[k] / mass if mass > 0 else centres[j, k]


def merged(centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels in which the first of equal centres has the points of all of them."""
    if not pd.DataFrame(centres).duplicated().any():
        return labels
    _, first, same = np.unique(centres, axis=0, return_index=True, return_inverse=True)
    return first[same.reshape(-1)][labels].astype(np.int32)


def filled(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    centres: np.ndarray,
    assigned: _nearest.Assignment,
    n_threads: int,
) -> tuple[np.ndarray, _nearest.Assignment]:
    """Move centres that no point chose to the worst served points, until none is left.

    Each move lowers the inertia, so this ends; it gives up centres only when every point lies on one.
    """
    labels, errors = assigned.labels, assigned.errors
    while len(empty := unused(centres, labels)):
        worst = _worst(points, errors, sample_weight, len(empty))
        if not len(worst):
            centres, labels = used(centres, labels)
            break
        moved, centres = empty[: len(worst)], centres.copy()
        centres[moved] = points[worst]
        challenge = _nearest.nearest(points, centres[moved], n_threads=n_threads)
        better = challenge.errors < errors
        labels = np.where(better, moved[challenge.labels], labels).astype(np.int32)
        errors = np.where(better, challenge.errors, errors)
        labels[worst], errors[worst] = moved, 0  # whatever rounding made of the search
    return centres, _nearest.Assignment(labels, errors)


def unused(centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the centres that no point has, int64 ``(m,)``."""
    return np.flatnonzero(np.bincount(labels, minlength=len(centres)) == 0)


def used(centres: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres that some point has, and the labels, int32 ``(n,)``, numbered anew."""
    kept = np.bincount(labels, minlength=len(centres)) > 0
    return centres[kept], (np.cumsum(kept, dtype=np.int32) - np.int32(1))[labels]


def distinct(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return those of the rows whose points no row before them has."""
    _, first = np.unique(points[rows], axis=0, return_index=True)
    return rows[np.sort(first)]


def _worst(
    points: np.ndarray, errors: np.ndarray, sample_weight: np.ndarray | None, count: int
) -> np.ndarray:
    """Return up to `count` rows of distinct points that lie on no centre, those that cost most first."""
    loss = errors
    if sample_weight is not None:  # points without weight come last, but before an empty cluster
        loss = errors * np.maximum(sample_weight, 1e-6 * sample_weight[sample_weight > 0].min())
    rows = np.argpartition(-loss, min(4 * count, len(loss) - 1))[: 4 * count]
    rows = rows[errors[rows] > 0]
    return distinct(points, rows[np.argsort(-loss[rows], kind="stable")])[:count]
