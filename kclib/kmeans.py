"""k-means for millions of small points and any K: a two-level split, then exact passes (faiss)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
from sklearn.cluster import kmeans_plusplus

from kclib.errors import InvalidValueError

# One exact pass costs n·K distances; rounds of it are worth their time up to about this many.
_EXACT_BUDGET = 2e10
_BLOCK = 1 << 17
_FLAT = 256  # up to this K one k-means serves as well as the split, and as fast


@dataclass(frozen=True)
class KMeans:
    """A partition of n points into K non-empty clusters.

    Attributes
    ----------
    centres : numpy.ndarray
        float32 ``(K, d)``, all distinct.
    labels : numpy.ndarray
        int32 ``(n,)``, the index of each point's nearest centre.
    inertia : float
        Sum of squared distances of the points to their centres, summed in float64.
    """

    centres: np.ndarray
    labels: np.ndarray
    inertia: float


def kmeans(
    points: np.ndarray,
    n_clusters: int,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> KMeans:
    """Cluster points by squared Euclidean distance.

    Up to a few hundred clusters: Lloyd's algorithm from k-means++ centres. Above, a coarse k-means makes
    about √K cells; K is shared out over them in proportion to inertia^(d / (d + 2)), the optimal point
    density of high-rate quantization (Gersho 1979); a small k-means runs in each. Rounds over all points
    follow while they are affordable, and a last exact assignment.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``, finite.
    n_clusters : int
        1 to n. Fewer come back only if there are fewer distinct points.
    seed : int
    progress : callable, optional
        Called with the share of the work done since the last call; the shares sum to 1.

    Raises
    ------
    InvalidValueError
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if not 1 <= n_clusters <= len(points):
        raise InvalidValueError(
            f"n_clusters is {n_clusters}; with {len(points)} kernels it must be 1 to {len(points)}."
        )
    if not np.isfinite(points).all():
        raise InvalidValueError("the points hold NaN or infinite values; they must be finite.")
    if 2 * n_clusters > len(points):
        distinct, labels = np.unique(points, axis=0, return_inverse=True)
        if len(distinct) <= n_clusters:
            if progress:
                progress(1.0)
            return KMeans(distinct, labels.reshape(-1).astype(np.int32), 0.0)
    shift, exponent = _frame(points)
    found = _kmeans(np.ldexp(points - shift, -exponent), n_clusters, seed, progress)
    centres = np.ldexp(found.centres, exponent) + shift
    return KMeans(centres, found.labels, float(np.ldexp(found.inertia, 2 * exponent)))


def _frame(points: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the shift ``(d,)`` and the power of two that bring points into float32's comfortable range.

    faiss computes distances as |x|² - 2xc + |c|², which overflows for huge points, vanishes for tiny ones
    and cancels for a tight crowd far from zero; kernels need no shift, and a power of two costs no bit.
    """
    mean = points.mean(0, dtype=np.float64)
    spread = points.std(0, dtype=np.float64)
    shift = np.where(np.square(mean).sum() > np.square(spread).sum(), mean, 0).astype(np.float32)
    largest = np.abs(points - shift).max()
    return shift, int(np.frexp(largest)[1])


def _kmeans(
    points: np.ndarray, n_clusters: int, seed: int, progress: Callable[[float], None] | None
) -> KMeans:
    rounds = int(np.clip(_EXACT_BUDGET / len(points) / n_clusters, 0, 5))
    report = _scaled(progress, 1 / (rounds + 2))
    centres = _split(points, n_clusters, seed, report)
    for _ in range(rounds):
        centres = means(points, nearest(points, centres, report), centres)
    return _filled(points, centres, report)


def nearest(
    points: np.ndarray, centres: np.ndarray, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """Return the index of each point's nearest centre, int32 ``(n,)``, by exhaustive search in blocks."""
    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(centres)
    labels = np.empty(len(points), np.int32)
    for start in range(0, len(points), _BLOCK):
        part = slice(start, start + _BLOCK)
        labels[part] = index.search(points[part], 1)[1][:, 0]
        if progress:
            progress(len(labels[part]) / len(points))
    return labels


def means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster, float32 ``(K, d)``; an empty cluster keeps its centre."""
    counts = np.bincount(labels, minlength=len(centres))[:, None]
    sums = np.stack([np.bincount(labels, column, minlength=len(centres)) for column in points.T], axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), centres).astype(np.float32)


def errors(points: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each point's squared distance to its centre, float32 ``(n,)``, in blocks."""
    result = np.empty(len(points), np.float32)
    for start in range(0, len(points), _BLOCK):
        part = slice(start, start + _BLOCK)
        result[part] = np.square(points[part] - centres[labels[part]]).sum(1)
    return result


def _scaled(progress: Callable[[float], None] | None, weight: float) -> Callable[[float], None]:
    """Return a function that passes on shares of a step as shares of the whole."""
    return (lambda share: progress(share * weight)) if progress else (lambda share: None)


def _split(points: np.ndarray, n_clusters: int, seed: int, progress: Callable[[float], None]) -> np.ndarray:
    """Return K starting centres from a coarse k-means and a small one in each of its cells."""
    if n_clusters <= _FLAT:
        centres = _lloyd(points, n_clusters, seed, start=_greedy_start(points, n_clusters, seed))
        progress(1.0)
        return centres
    n_cells = round(np.sqrt(n_clusters))
    coarse = _lloyd(points, n_cells, seed)
    labels = nearest(points, coarse)
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=n_cells)
    inertias = np.bincount(labels, errors(points, coarse, labels), minlength=n_cells)
    shares = _share(inertias, sizes, n_clusters, points.shape[1])
    cells = np.split(order, np.cumsum(sizes)[:-1])
    parts = []
    # Cells side by side, one thread each: faiss's own threads would wait for each other in small ones.
    with ThreadPoolExecutor(
        faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)
    ) as pool:
        for part in pool.map(lambda rows, k: _lloyd(points[rows], k, seed), cells, shares):
            parts.append(part)
            progress(len(part) / n_clusters)
    return np.concatenate(parts)


def _share(inertias: np.ndarray, sizes: np.ndarray, n_clusters: int, d: int) -> np.ndarray:
    """Share K out over cells in proportion to inertia^(d/(d+2)): at least 1 a cell, at most its size."""
    wish = np.maximum(inertias, 1e-30) ** (d / (d + 2))
    low, high = np.minimum(sizes, 1), sizes
    shares = low.copy()
    while (rest := n_clusters - shares.sum()) > 0:
        room = np.where(shares < high, wish, 0.0)
        if rest < np.count_nonzero(room):  # the last few go where the wish is largest
            shares[np.argsort(-room, kind="stable")[:rest]] += 1
            continue
        step = np.floor(rest * room / room.sum()).astype(int)
        if not step.any():
            step = (room > 0).astype(int)
        shares = np.minimum(shares + step, high)
    return shares


def _greedy_start(points: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Return greedy k-means++ centres (Arthur and Vassilvitskii 2007) of a sample, 64 points a cluster."""
    draw = np.random.default_rng(seed)
    size = min(len(points), 64 * n_clusters)
    sample = points[np.sort(draw.choice(len(points), size, replace=False))]
    return kmeans_plusplus(sample, n_clusters, random_state=seed)[0]


def _lloyd(points: np.ndarray, n_clusters: int, seed: int, *, start: np.ndarray | None = None) -> np.ndarray:
    """Return centres of faiss's k-means, from `start` or from its own k-means++."""
    if n_clusters in (0, len(points)):
        return points[:n_clusters].copy()
    if n_clusters == 1:
        return points.mean(0, dtype=np.float64, keepdims=True).astype(np.float32)
    engine = faiss.Kmeans(
        points.shape[1],
        int(n_clusters),
        niter=10,
        seed=seed + 1,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        max_points_per_centroid=256,
    )
    engine.train(points, init_centroids=start)
    return engine.centroids


def _filled(points: np.ndarray, centres: np.ndarray, progress: Callable[[float], None]) -> KMeans:
    """Assign points exactly; move centres that nobody chose to the worst served points until none is left.

    Each move lowers the inertia, so this ends; it gives up centres only when every point lies on one.
    """
    labels = nearest(points, centres, progress)
    error = errors(points, centres, labels)
    centres = centres.copy()
    while True:
        empty = np.flatnonzero(np.bincount(labels, minlength=len(centres)) == 0)
        if not len(empty):
            break
        worst = np.argpartition(-error, min(4 * len(empty), len(error) - 1))[: 4 * len(empty)]
        worst = worst[error[worst] > 0]
        _, first = np.unique(points[worst], axis=0, return_index=True)
        worst = worst[np.sort(first)][: len(empty)]
        if not len(worst):
            kept = np.unique(labels)
            return _result(points, centres[kept], np.searchsorted(kept, labels).astype(np.int32))
        moved = empty[: len(worst)]
        centres[moved] = points[worst]
        challenger = moved[nearest(points, centres[moved])].astype(np.int32)
        challenger_error = errors(points, centres, challenger)
        better = challenger_error < error
        labels = np.where(better, challenger, labels)
        error = np.where(better, challenger_error, error)
        labels[worst], error[worst] = moved, 0  # whatever rounding made of the search
    return _result(points, centres, labels)


def _result(points: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> KMeans:
    inertia = float(errors(points, centres, labels).sum(dtype=np.float64))
    return KMeans(centres, labels, inertia)
