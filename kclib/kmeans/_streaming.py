"""k-means past one machine's memory: points in blocks, each a task for joblib or a torch device."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from joblib import Parallel, delayed

from kclib._util import checks
from kclib.errors import InvalidValueError
from kclib.kmeans import _lloyd, _nearest, _rescaling, _starting
from kclib.kmeans._fit_progress import Progress
from kclib.kmeans._settings import FLAT, KMeans, Options

_BLOCK = 1 << 19  # points in a block
# points that centres are started on: 64 a cluster, within these
_SAMPLE, _SAMPLE_MOST = 1 << 20, 1 << 22
_ON_DEVICE = 1 << 25  # scores a device holds at once
_WORST = 64  # badly served points that a block offers to empty clusters
_FAR = np.float32(1e6)  # beyond all framed points
_SAMPLE_SHARE = 0.2  # of the work


class Parts:
    """Points ``(n, d)`` in several arrays, read one after the other.

    Parameters
    ----------
    parts : array ``(n, d)``, or iterable of arrays ``(m, d)`` or of objects with `points` (kernel banks)
        Read several times: an iterator, which can be read once only, is refused.
    """

    def __init__(self, parts: np.ndarray | Iterable):
        if isinstance(parts, Iterator):
            raise InvalidValueError(
                "the points come from an iterator, which can be read only once; give a list, or an object "
                "that can be iterated again."
            )
        if not isinstance(parts, Iterable):
            raise InvalidValueError(
                f"the points are {checks.said(parts)}; they must be an array (n, d), or several."
            )
        self.parts = [parts] if isinstance(parts, np.ndarray) else parts
        self.n, self.d = 0, 0
        for block in self._raw():
            if block.ndim != 2 or self.d not in (0, block.shape[1]) or not block.shape[1]:
                raise InvalidValueError(
                    f"a part of the points has shape {block.shape}; every one must be (m, {self.d or 'd'})."
                )
            if not np.isfinite(block).all():
                raise InvalidValueError("the points hold NaN or infinite values; they must be finite.")
            self.n, self.d = self.n + len(block), block.shape[1]
        self.frame = _rescaling.Frame.of(self._raw()) if self.n else None

    def _raw(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            array = checks.array(part)
            for start in range(0, len(array), _BLOCK):
                yield checks.floats("the points", array[start : start + _BLOCK])

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows and the framed points of each block."""
        start = 0
        for block in self._raw():
            yield slice(start, start + len(block)), self.frame.into(block)
            start += len(block)

    def sample(self, size: int, sample_weight: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return about `size` framed points, and sample weights, that stand for all: a lightweight coreset.

        A point is drawn with a chance that is half uniform and half in proportion to its squared distance
        from the mean, so far ones are not missed (Bachem, Lucic and Krause 2018, *Scalable k-means
        clustering via lightweight coresets*).
        """
        mass, sums, squares = 0.0, np.zeros(self.d), 0.0
        for block, weight in self._weighted(sample_weight):
            mass += weight.sum(dtype=np.float64)
            sums += weight.astype(np.float64) @ block
            squares += _lloyd.total(np.square(block).sum(1), weight)
        mean = (sums / mass).astype(np.float32)
        spread = squares - mass * np.square(mean, dtype=np.float64).sum()
        draw, kept = np.random.default_rng(seed), []
        for block, weight in self._weighted(sample_weight):
            distance = np.square(block - mean).sum(1) / spread if spread > 0 else 1 / mass
            chance = np.ones(len(block)) if size >= self.n else size * weight * (0.5 / mass + 0.5 * distance)
            chosen = draw.random(len(block)) < chance
            kept.append((block[chosen], weight[chosen] / np.minimum(chance[chosen], 1)))
        points, sample_weight = (
            np.concatenate(column).astype(np.float32) for column in zip(*kept, strict=True)
        )
        return points, sample_weight

    def _weighted(self, sample_weight: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at, block in self:
            yield block, np.ones(len(block), np.float32) if sample_weight is None else sample_weight[at]


@dataclass(frozen=True)
class _Step:
    """What one block adds: its labels, and sums over its points."""

    labels: np.ndarray
    sums: np.ndarray  # float64 (K, d)
    mass: np.ndarray  # float64 (K,)
    inertia: float
    worst: np.ndarray  # float32 (m, d): the worst served points
    loss: np.ndarray  # float32 (m,)


def fit(
    parts: Parts,
    n_clusters: int,
    sample_weight: np.ndarray | None,
    init: np.ndarray | None,
    options: Options,
    device: str,
    progress: Progress,
) -> KMeans:
    """Cluster points that come in blocks: a fit of a sample, then rounds over all of them.

    Blocks are tasks of `joblib.Parallel`, on threads unless the caller has chosen another backend
    (``with joblib.parallel_config("dask")`` spreads them over a Dask cluster's workers); their sums are
    added in order, so the result is the same wherever they ran. With a `device` other than ``cpu`` a block's
    labels are found there by torch.

    Parameters
    ----------
    parts : Parts
    n_clusters, sample_weight, init
        As in `_fitting.fit`, checked; `init` framed.
    options : Options
    device : str
        A torch device.
    progress : Progress
    """
    checks.check_values(device)
    centres = init
    if init is None:
        centres = _from_sample(parts, n_clusters, sample_weight, options)
    progress(_SAMPLE_SHARE)
    labels, rounds = None, _lloyd.Rounds(options, n_clusters, progress)
    reach = None if n_clusters <= FLAT else options.reach
    run = _Pass(parts, sample_weight, options.threads, device, progress)
    for _ in range(options.max_iter):
        near = reach if labels is not None else None
        labels, step = run(centres, labels, near, _lloyd.ROUND_SHARE * progress.left)
        if not rounds.another(step.inertia):
            break
        centres = np.where(
            step.mass[:, None] > 0, step.sums / np.maximum(step.mass, 1e-300)[:, None], centres
        )
        centres = centres.astype(np.float32)
    while True:
        labels, step = run(centres, labels, None, progress.left / 2)
        labels = _lloyd.merged(centres, labels)
        if not len(empty := _lloyd.unused(centres, labels)):
            break
        worst = _distinct_worst(step, len(empty))
        if not len(worst):
            centres, labels = _lloyd.used(centres, labels)
            break
        centres = centres.copy()
        centres[empty[: len(worst)]] = worst
    progress.inertia = step.inertia
    progress(progress.left)
    how = "streamed" if device == "cpu" else device
    return KMeans(centres, labels, step.inertia, rounds.made, rounds.converged, how)


def memory(n: int, d: int, n_clusters: int, n_threads: int) -> int:
    """Return about how many bytes a fit takes at most, beside the points."""
    sample = _sample_size(n, n_clusters)
    held = 4 * d * sample + _lloyd.memory(sample, d, n_clusters, n_threads)
    blocks = 2 * n_threads * (min(n, _BLOCK) * 4 * (3 * d + 10) + 16 * n_clusters * (d + 1))
    return 12 * n + held + blocks  # labels, the ones before, sample weights


def _sample_size(n: int, n_clusters: int) -> int:
    return min(n, max(_SAMPLE, n_clusters, min(64 * n_clusters, _SAMPLE_MOST)))


def _from_sample(
    parts: Parts, n_clusters: int, sample_weight: np.ndarray | None, options: Options
) -> np.ndarray:
    """Return the centres of a fit of a sample; those that it cannot find lie where no point is."""
    size = _sample_size(parts.n, n_clusters)
    sample, mass = parts.sample(size, sample_weight, options.seed)
    start = _starting.start(sample, mass, min(n_clusters, len(sample)), options)
    centres = _lloyd.fit(sample, mass, *start, options, Progress()).centres
    missing = np.arange(n_clusters - len(centres), dtype=np.float32)[:, None]
    far = np.repeat(_FAR * (1 + missing), parts.d, axis=1)
    return np.concatenate([centres, far])


@dataclass(frozen=True)
class _Pass:
    """One pass over all blocks."""

    parts: Parts
    sample_weight: np.ndarray | None
    n_threads: int
    device: str
    progress: Progress

    def __call__(self, centres, guess, reach, share) -> tuple[np.ndarray, _Step]:
        labels = np.empty(self.parts.n, np.int32)
        sums, mass = np.zeros(centres.shape), np.zeros(len(centres))
        inertia, worst, loss, start = 0.0, [], [], 0
        tasks = (
            delayed(_block_step)(
                block,
                None if self.sample_weight is None else self.sample_weight[at],
                None if guess is None else guess[at],
                centres,
                reach,
                self.device,
            )
            for at, block in self.parts
        )
        pool = Parallel(
            n_jobs=self.n_threads, prefer="threads", return_as="generator", pre_dispatch="2*n_jobs"
        )
        for step in pool(tasks):
            labels[start : start + len(step.labels)] = step.labels
            start += len(step.labels)
            sums += step.sums
            mass += step.mass
            inertia += step.inertia
            worst.append(step.worst)
            loss.append(step.loss)
            self.progress(share * len(step.labels) / self.parts.n)
        return labels, _Step(labels, sums, mass, inertia, np.concatenate(worst), np.concatenate(loss))


def _block_step(block, sample_weight, guess, centres, reach, device) -> _Step:
    """Assign one block and sum up; runs wherever joblib sends it."""
    if device == "cpu":
        assigned = _nearest.nearest(block, centres, guess=guess, reach=reach, n_threads=1)
    else:
        labels = nearest_on_device(block, centres, device)
        assigned = _nearest.Assignment(labels, _nearest.errors(block, centres, labels, n_threads=1))
    sample_weight = np.ones(len(block), np.float32) if sample_weight is None else sample_weight
    k = len(centres)
    loss = assigned.errors * np.maximum(sample_weight, np.float32(1e-12))  # those without weight come last
    worst = np.argsort(-loss, kind="stable")[:_WORST]
    return _Step(
        assigned.labels,
        np.stack(
            [np.bincount(assigned.labels, x * sample_weight.astype(np.float64), k) for x in block.T], axis=1
        ),
        np.bincount(assigned.labels, sample_weight, k),
        _lloyd.total(assigned.errors, sample_weight),
        block[worst],
        loss[worst],
    )


def nearest_on_device(points: np.ndarray, centres: np.ndarray, device: str) -> np.ndarray:
    """Return each point's nearest centre, int32 ``(n,)``, by comparing all on a torch device.

    In float64 where the device has it, for products lose digits. Never more than 2²⁵ scores at once, whatever
    n and K.
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    centres_there = torch.from_numpy(np.require(centres, requirements="W")).to(device, dtype)
    halves = centres_there.square().sum(1) / 2
    parts = torch.from_numpy(np.require(points, requirements="W")).split(max(1, _ON_DEVICE // len(centres)))
    labels = [
        torch.addmm(halves, part.to(device, dtype), centres_there.T, alpha=-1).argmin(1).int().cpu()
        for part in parts
    ]
    return torch.cat(labels).numpy()


def _distinct_worst(step: _Step, count: int) -> Sequence[np.ndarray]:
    """Return up to `count` of the points that lie furthest from their centres, the worst first."""
    order = np.argsort(-step.loss, kind="stable")
    return step.worst[_lloyd.distinct(step.worst, order[step.loss[order] > 0])[:count]]
