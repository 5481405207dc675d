"""k-means for millions of small points and any K: one fit, or a ladder of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil

from kclib._util import checks, threads
from kclib.errors import InvalidValueError, NotEnoughMemoryError
from kclib.kmeans import _lloyd, _nearest, _settings, _streaming
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._rescaling import Frame
from kclib.kmeans._settings import KMeans, Options

_A_CELL, _FEWEST_A_CELL = 128, 8  # clusters started in one cell of a ladder; fewer would start worse
_QUICK_A_CELL = 32
_IN_MEMORY = 1 << 23  # points that are clustered in memory
_START = 0.2  # share of the work that finding a start is


def fit(
    points: np.ndarray | Iterable,
    n_clusters: int,
    *,
    sample_weight: np.ndarray | None = None,
    init: np.ndarray | None = None,
    max_iter: int = 25,
    tol: float | None = None,
    reach: float | None = 1.6,
    seed: int = 0,
    n_threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[FitStep], object] | None = None,
) -> KMeans:
    """Cluster points by squared Euclidean distance.

    A start (`_lloyd.start`: k-means++, above a few hundred clusters in about √K cells), Lloyd's rounds over
    all points, and exact labels (`_nearest.nearest`). The same seed gives the same bits for any thread count.

    Parameters
    ----------
    points : array, tensor, DataFrame or KernelBank, or iterable of these
        float32 ``(n, d)``, finite; a memory-mapped array is read where it lies. More than eight million, or
        an iterable of several arrays, are streamed in blocks (`_streaming.fit`).
    n_clusters : int
        1 to n. Fewer come back only if there are fewer distinct points.
    sample_weight : numpy.ndarray, optional
        ``(n,)``, finite, at least 0, not all 0: how much each point's squared distance counts.
    init : numpy.ndarray, optional
        ``(K, d)``: centres to start from.
    max_iter : int
        Most rounds over all points.
    tol : float, optional
        Stop once a round lowers the inertia by no more than this share of it; by default 0.002 up to
        K = 256 and 0.01 above, where a round costs more.
    reach : float, optional
        How far the rounds above K = 256 look for a nearer centre, in root mean square radii of a cluster
        (`_nearest.nearest`); None for exact rounds, Lloyd's algorithm to the letter, at several times the
        cost.
        The final labels are exact either way.
    seed : int
    n_threads : int, optional
        All processors by default.
    device : str
        A torch device for the search of nearest centres; ``cpu`` takes the faster way for processors.
    progress : callable, optional
        Called with each `FitStep`. A true answer stops after the round at hand; the best so far is returned.

    Raises
    ------
    InvalidValueError
        K, points, sample_weight, init, max_iter or tol out of range.
    NotEnoughMemoryError
        The machine has less free memory than `memory` says it takes.
    """
    options = Options(max_iter, tol, reach, seed, n_threads)
    report = Progress(progress)
    points = _array(points)
    if not isinstance(points, np.ndarray) or is_streamed(len(points), device):
        return _streamed(points, n_clusters, sample_weight, init, device, options, report)
    points = _settings.checked_points(points)
    n_clusters = _settings.check_k(n_clusters, len(points))
    sample_weight = _settings.checked_sample_weight(sample_weight, len(points))
    check_memory(_lloyd.memory(*points.shape, n_clusters, options.threads), len(points), n_clusters)
    if 2 * n_clusters > len(points) and init is None:
        distinct, labels = np.unique(points, axis=0, return_inverse=True)
        if len(distinct) <= n_clusters:
            report.inertia = 0.0
            report(1.0)
            return KMeans(distinct, labels.reshape(-1).astype(np.int32), 0.0, 0, True)
    framed = Framed.of(points, sample_weight, options)
    if init is None:
        return framed.alone(n_clusters, report)
    return framed.fit(framed.frame.into(_checked_init(init, n_clusters, points.shape[1])), None, report)


@dataclass(frozen=True)
class Ladder:
    """Clusterings of the same points at several K, and any K between, quickly.

    Attributes
    ----------
    rungs : tuple of KMeans
        One for each K, ascending.
    """

    rungs: tuple[KMeans, ...]
    _framed: "Framed"

    @property
    def ks(self) -> tuple[int, ...]:
        """Number of clusters of each rung."""
        return tuple(len(rung.centres) for rung in self.rungs)

    def at(self, n_clusters: int, *, progress: Callable[[FitStep], object] | None = None) -> KMeans:
        """Return a clustering of any K: a rung, or one grown from a rung below, in one round at most.

        Raises
        ------
        InvalidValueError
            K below 1 or above the number of points.
        """
        _settings.check_k(n_clusters, len(self._framed.points))
        below = [rung for rung in self.rungs if len(rung.centres) <= n_clusters]
        if below and len(below[-1].centres) == n_clusters:
            return below[-1]
        options = replace(self._framed.options, max_iter=min(1, self._framed.options.max_iter))
        return replace(self._framed, options=options).grown(
            below, n_clusters, Progress(progress), a_cell=_QUICK_A_CELL
        )


def ladder(
    points: np.ndarray,
    ks: Iterable[int],
    *,
    sample_weight: np.ndarray | None = None,
    max_iter: int = 25,
    tol: float | None = None,
    reach: float | None = 1.6,
    seed: int = 0,
    n_threads: int | None = None,
    progress: Callable[[FitStep], object] | None = None,
) -> Ladder:
    """Cluster the same points at several K, each grown from the next smaller.

    The clusters of a rung are the cells in which the centres of the next rung are started. Rounds, exact
    labels and parameters are those of `fit`.

    Parameters
    ----------
    points, sample_weight, max_iter, tol, reach, seed, n_threads
    ks : iterable of int
        In any order; each 1 to n.
    progress : callable, optional
        Called with each `FitStep`; a true answer ends the ladder with the rung at hand.
    """
    ks = checked_ks(ks)
    options = Options(max_iter, tol, reach, seed, n_threads)
    points = _settings.checked_points(points)
    for k in ks:
        _settings.check_k(k, len(points))
    sample_weight = _settings.checked_sample_weight(sample_weight, len(points))
    check_memory(_lloyd.memory(*points.shape, ks[-1], options.threads), len(points), ks[-1])
    framed, rungs, stopped = Framed.of(points, sample_weight, options), [], False
    work = np.sqrt(np.array(ks, float)) + 20
    for k, part in zip(ks, work / work.sum(), strict=True):
        if stopped:
            break
        report = Progress(_scaled(progress, part))
        rung = framed.grown(rungs, k, report)
        stopped = report.stopped
        if not rungs or len(rung.centres) > len(rungs[-1].centres):
            rungs.append(rung)
    return Ladder(tuple(rungs), framed)


def checked_ks(ks: Iterable[int]) -> list[int]:
    """Return distinct numbers of clusters, ascending; raise InvalidValueError if there are none."""
    ks = list(ks) if isinstance(ks, Iterable) else []
    ks = [checks.check_whole("a number of clusters", k, 1) for k in ks]
    if not ks:
        raise InvalidValueError("there are no numbers of clusters; give at least one, in a list.")
    return sorted(set(ks))


def is_streamed(n: int, device: str) -> bool:
    """Tell whether so many points are read in blocks, rather than clustered in memory."""
    return n > _IN_MEMORY or device != "cpu"


def memory(n: int, d: int, n_clusters: int, n_threads: int | None = None) -> int:
    """Return about how many bytes `kmeans` takes at most, beside the points."""
    n_threads = threads.threads(n_threads)
    if is_streamed(n, "cpu"):
        return _streaming.memory(n, d, n_clusters, n_threads)
    return _lloyd.memory(n, d, n_clusters, n_threads)


def _streamed(points, n_clusters, sample_weight, init, device, options, report) -> KMeans:
    """Return a clustering of points that are read block by block."""
    parts = _streaming.Parts(points)
    n_clusters = _settings.check_k(n_clusters, parts.n)
    sample_weight = _settings.checked_sample_weight(sample_weight, parts.n)
    check_memory(_streaming.memory(parts.n, parts.d, n_clusters, options.threads), parts.n, n_clusters)
    if init is not None:
        init = parts.frame.into(_checked_init(init, n_clusters, parts.d))
    report.unit = parts.frame.inertia_unit
    framed = _streaming.fit(parts, n_clusters, sample_weight, init, options, device, report)
    return parts.frame.out_of(framed)


@dataclass(frozen=True)
class Framed:
    """Points in their frame, and how they are fitted; what is returned is out of the frame again."""

    points: np.ndarray
    sample_weight: np.ndarray | None
    frame: Frame
    options: Options

    @classmethod
    def of(cls, points: np.ndarray, sample_weight: np.ndarray | None, options: Options) -> "Framed":
        frame = Frame.of([points])
        return cls(frame.into(points), sample_weight, frame, options)

    def fit(self, centres: np.ndarray, guess: np.ndarray | None, report: Progress) -> KMeans:
        """Return the clustering that framed centres lead to."""
        report.unit = self.frame.inertia_unit
        return self.frame.out_of(
            _lloyd.fit(self.points, self.sample_weight, centres, guess, self.options, report)
        )

    def alone(self, k: int, report: Progress) -> KMeans:
        """Return a clustering that is started without the help of another."""
        return self.fit(
            *_lloyd.start(self.points, self.sample_weight, k, self.options, report.part(_START)), report
        )

    def grown(self, rungs: Sequence[KMeans], k: int, report: Progress, *, a_cell: int = _A_CELL) -> KMeans:
        """Return a clustering whose centres are started in the clusters of a smaller one, some in each."""
        coarse = [rung for rung in rungs if len(rung.centres) * a_cell <= k] or list(rungs[:1])
        few = not coarse or len(coarse[-1].centres) * _FEWEST_A_CELL > k
        if few or _lloyd.is_flat(len(self.points), k):
            return self.alone(k, report)
        cells = coarse[-1]
        centres = self.frame.into(cells.centres)
        errors = _nearest.errors(self.points, centres, cells.labels, n_threads=self.options.threads)
        assigned = _nearest.Assignment(cells.labels, errors)
        start = _lloyd.grow(
            self.points, self.sample_weight, assigned, len(centres), k, self.options, report.part(_START)
        )
        return self.fit(*start, report)


def _array(points: object) -> object:
    """Return points as an array where they are one, also as lists of numbers; several arrays as they are."""
    points = checks.array(points)
    if isinstance(points, (list, tuple)) and points and all(map(_is_row, points)):
        return _settings.checked_points([checks.array(x) for x in points])
    return points


def _is_row(value: object) -> bool:
    """Tell whether a value is a point, not several."""
    value = checks.array(value)
    return getattr(value, "ndim", None) == 1 or (
        isinstance(value, (list, tuple)) and np.asarray(value, object).ndim == 1
    )


def _scaled(progress, part: float):
    return (lambda step: progress(FitStep(step.share * part, step.inertia))) if progress else None


def _checked_init(init, n_clusters: int, d: int) -> np.ndarray:
    init = checks.floats("init", init).copy()
    if init.shape != (n_clusters, d) or not np.isfinite(init).all():
        raise InvalidValueError(f"init has shape {init.shape}; it must be ({n_clusters}, {d}), and finite.")
    return init


def check_memory(needed: int, n: int, n_clusters: int) -> None:
    """Raise NotEnoughMemoryError if so many bytes are not free."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemoryError(
            f"clustering {n:,} points into {n_clusters:,} clusters takes about {needed / 2**30:.1f} GiB "
            f"beside the points, and {free / 2**30:.1f} GiB are free."
        )
