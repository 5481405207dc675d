"""k-means for millions of small points and any K."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from kclib._util import checks, limits, threads
from kclib.errors import InvalidValueError, NotEnoughMemoryError
from kclib.kmeans import _lloyd, _settings, _starting, _streaming
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._rescaling import Frame
from kclib.kmeans._settings import KMeans, Options

_IN_MEMORY = 1 << 23  # points that are clustered in memory
_START = 0.2  # share of the work that finding a start is

QUALITIES = {"fast": (25, None), "best": (200, 1e-4)}  # rounds at most, and what each must gain


def fit(
    points: np.ndarray | Iterable,
    n_clusters: int,
    *,
    sample_weight: np.ndarray | None = None,
    init: np.ndarray | None = None,
    quality: str = "fast",
    max_iter: int | None = None,
    tol: float | None = None,
    reach: float | None = 1.6,
    seed: int = 0,
    n_threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[FitStep], object] | None = None,
) -> KMeans:
    """Cluster points by squared Euclidean distance.

    A start (`_starting.start`: a fine codebook, merged by Ward's criterion), Lloyd's rounds over all points,
    and exact labels (`_nearest.nearest`). The same seed gives the same bits for any thread count.

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
    quality : {"fast", "best"}
        ``best`` goes on where ``fast`` stops: less inertia, for several times the time.
    max_iter : int, optional
        Most rounds over all points; by default 25, and 200 for the best quality.
    tol : float, optional
        Stop once a round lowers the inertia by no more than this share of it; by default 0.001 up to
        K = 256 and 0.01 above, where a round costs more, and 0.0001 for the best quality.
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
        Called with each `FitStep`. A true answer stops at once; the best so far is returned (`KMeans.exact`).

    Raises
    ------
    InvalidValueError, UnknownNameError
        K, points, sample_weight, init, max_iter or tol out of range; an unknown quality.
    NotEnoughMemoryError
        The machine has less free memory than `memory` says it takes.
    """
    checks.check_known("quality", quality, QUALITIES)
    rounds, least = QUALITIES[quality]
    options = Options(
        rounds if max_iter is None else max_iter, least if tol is None else tol, reach, seed, n_threads
    )
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
        start = _starting.start(self.points, self.sample_weight, k, self.options, report.part(_START))
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


def _checked_init(init, n_clusters: int, d: int) -> np.ndarray:
    init = checks.floats("init", init).copy()
    if init.shape != (n_clusters, d) or not np.isfinite(init).all():
        raise InvalidValueError(f"init has shape {init.shape}; it must be ({n_clusters}, {d}), and finite.")
    return init


def check_memory(needed: int, n: int, n_clusters: int) -> None:
    """Raise NotEnoughMemoryError if so many bytes are not free."""
    free = limits.free()
    if needed > free:
        raise NotEnoughMemoryError(
            f"clustering {n:,} points into {n_clusters:,} clusters takes about {needed / 2**30:.1f} GiB "
            f"beside the points, and {free / 2**30:.1f} GiB are free."
        )
