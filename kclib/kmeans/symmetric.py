"""k-means in which a centre serves its whole orbit: its multiples, its flips and rotations, or both."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.errors import InvalidValueError
from kclib.kmeans import _lloyd, _nearest, _rescaling, _settings, _starting
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._settings import Options


@dataclass(frozen=True)
class SymmetricKMeans:
    """A partition of n kernels into K clusters of kernels that are alike up to a symmetry.

    Attributes
    ----------
    centres : numpy.ndarray
        float32 ``(K, d)``; of unit length if kernels are scaled.
    labels : numpy.ndarray
        int32 ``(n,)``.
    transforms : numpy.ndarray
        uint8 ``(n,)``: row of `transforms` that takes a kernel's centre to it; 0 everywhere if kernels are
        not turned.
    scales : numpy.ndarray
        float32 ``(n,)``: signed length that its turned centre is multiplied by; 1 everywhere if kernels are
        not scaled.
    inertia : float
        Weighted sum of squared distances of the kernels to their turned and scaled centres, in float64.
    iterations : int
    converged : bool
        As in `kmeans.KMeans`.
    """

    centres: np.ndarray
    labels: np.ndarray
    transforms: np.ndarray
    scales: np.ndarray
    inertia: float
    iterations: int
    converged: bool


def transforms(side: int) -> np.ndarray:
    """Return the 8 flips and rotations of the square, the group D4.

    Returns
    -------
    numpy.ndarray
        int64 ``(8, side * side)``: ``kernel.ravel()[row]`` is the turned kernel; the first turns nothing.
    """
    square = np.arange(side * side).reshape(side, side)
    turned = [np.rot90(face, quarter) for face in (square, square.T) for quarter in range(4)]
    return np.stack([face.ravel() for face in turned])


def fit(
    points: np.ndarray,
    n_clusters: int,
    *,
    scaled: bool = False,
    turned: bool = False,
    sample_weight: np.ndarray | None = None,
    max_iter: int = 25,
    tol: float | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    progress: Callable[[FitStep], object] | None = None,
) -> SymmetricKMeans:
    """Cluster kernels by the squared distance to the nearest member of a centre's orbit.

    The members of all orbits are searched (`_nearest.nearest`), so labels, turns and scales are exact. A
    centre is the mean of its kernels turned back to it; if kernels are scaled, it is the direction that
    carries most of their squared lengths, the leading eigenvector of their second moments (gain-shape
    quantization, Gersho and Gray 1992, *Vector Quantization and Signal Compression*, section 12.10).

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``, finite: kernels, row by row; square ones if turned.
    n_clusters : int
        1 to n. Fewer come back if fewer leave no kernel badly served.
    scaled : bool
        Whether a kernel is a signed multiple of its centre.
    turned : bool
        Whether a kernel is its centre flipped or rotated.
    sample_weight, max_iter, tol, seed, n_threads, progress
        As in `_fitting.fit`.

    Raises
    ------
    InvalidValueError
        K, points, sample_weight, max_iter or tol out of range; kernels that are not square.
    """
    options = Options(max_iter, tol, None, seed, n_threads)
    points, sample_weight = _checked(points, sample_weight, n_clusters, turned)
    n_clusters = int(n_clusters)
    frame = _rescaling.Frame.of([points], shifted=False)
    orbits = _Orbits.of(frame.into(points), sample_weight, scaled, turned)
    report = Progress(progress)
    report.unit = frame.inertia_unit
    centres = _start(orbits, n_clusters, options)
    rounds = _lloyd.Rounds(options, n_clusters, report)
    assigned = orbits.assigned(centres, None, options.threads)
    while True:
        report(_lloyd.ROUND_SHARE * report.left)
        centres, assigned = _filled(orbits, centres, assigned, options.threads)
        if not rounds.another(assigned.inertia):
            break
        centres = orbits.moved(centres, assigned, options.threads)
        assigned = orbits.assigned(centres, assigned.members, options.threads)
    report(report.left)
    turns = assigned.members % orbits.size % len(orbits.turns)
    result = SymmetricKMeans(
        centres, assigned.labels, turns.astype(np.uint8), assigned.scales, assigned.inertia, rounds.made,
        rounds.converged,
    )  # fmt: skip
    if not scaled:
        return frame.out_of(result)
    scales = np.ldexp(result.scales, frame.exponent)
    return replace(result, scales=scales, inertia=result.inertia * frame.inertia_unit)


@dataclass(frozen=True)
class _Assigned:
    members: np.ndarray  # int32 (n,): member of all orbits, centre by centre
    labels: np.ndarray  # int32 (n,)
    scales: np.ndarray  # float32 (n,)
    errors: np.ndarray  # float32 (n,): weighted squared distances
    inertia: float


@dataclass(frozen=True)
class _Orbits:
    """The kernels, and what a centre's orbit is: `turns`, and for each its negative if kernels are scaled."""

    points: np.ndarray
    shapes: np.ndarray  # unit kernels if scaled, the kernels themselves otherwise
    sample_weight: np.ndarray
    turns: np.ndarray
    scaled: bool

    @classmethod
    def of(cls, points, sample_weight, scaled: bool, turned: bool) -> "_Orbits":
        turns = transforms(math.isqrt(points.shape[1])) if turned else np.arange(points.shape[1])[None]
        shapes = points
        if scaled:
            # in float64: the squares of tiny kernels vanish in float32
            lengths = np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
            shapes = (points / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        sample_weight = np.ones(len(points), np.float32) if sample_weight is None else sample_weight
        return cls(points, shapes, sample_weight, turns, scaled)

    @property
    def size(self) -> int:
        """Members of an orbit."""
        return len(self.turns) * (1 + self.scaled)

    def members(self, centres: np.ndarray) -> np.ndarray:
        """Return the orbits, float32 ``(K * size, d)``, centre by centre."""
        turned = centres[:, self.turns]
        if self.scaled:
            turned = np.concatenate([turned, -turned], axis=1)
        return np.ascontiguousarray(turned.reshape(-1, centres.shape[1]))

    def assigned(self, centres: np.ndarray, guess: np.ndarray | None, n_threads: int) -> _Assigned:
        """Find the nearest member of all orbits, and the best scale."""
        members = self.members(centres)
        nearest = _nearest.nearest(self.shapes, members, guess=guess, n_threads=n_threads)
        scales, errors = np.ones(len(self.points), np.float32), np.empty(len(self.points), np.float32)
        for block in threads.blocks(len(self.points)):
            chosen = members[nearest.labels[block]]
            if self.scaled:
                scales[block] = (self.points[block] * chosen).sum(1)
            difference = self.points[block] - scales[block, None] * chosen
            errors[block] = self.sample_weight[block] * np.square(difference).sum(1)
        # The negative of a centre is only a way to find it: the sign is the scale's.
        negative = nearest.labels % self.size >= len(self.turns)
        return _Assigned(
            nearest.labels,
            nearest.labels // self.size,
            np.where(negative, -scales, scales),
            errors,
            float(errors.sum(dtype=np.float64)),
        )

    def moved(self, centres: np.ndarray, assigned: _Assigned, n_threads: int) -> np.ndarray:
        """Return the best centres for an assignment; one without weight stays."""
        backwards = np.argsort(self.turns, axis=1)
        turn = assigned.members % self.size % len(self.turns)
        aligned = np.take_along_axis(self.points, backwards[turn], axis=1)
        if not self.scaled:
            return _lloyd.means(aligned, self.sample_weight, assigned.labels, centres, n_threads)
        order, starts = _nearest.by_label(assigned.labels, len(centres))
        result = centres.copy()
        _directions(aligned, self.sample_weight, order, starts, result)
        return result


def _start(orbits: _Orbits, n_clusters: int, options: Options) -> np.ndarray:
    """Return centres of ordinary k-means of the kernels, each turned so that it leans the same way."""
    d = orbits.points.shape[1]
    lean = np.random.default_rng(0).normal(size=d).astype(np.float32)
    leaning = np.stack([orbits.shapes[:, turn] @ lean for turn in orbits.turns], axis=1)
    turn = np.abs(leaning).argmax(1) if orbits.scaled else leaning.argmax(1)
    aligned = np.take_along_axis(orbits.shapes, orbits.turns[turn], axis=1)
    sample_weight = orbits.sample_weight
    if orbits.scaled:
        aligned *= np.where(np.take_along_axis(leaning, turn[:, None], axis=1) < 0, -1, 1)
        sample_weight = sample_weight * np.square(orbits.points).sum(1)
        sample_weight = sample_weight / max(sample_weight.max(), np.finfo(np.float32).tiny)
    centres, _ = _starting.start(aligned, sample_weight if sample_weight.any() else None, n_clusters, options)
    if orbits.scaled:
        lengths = np.linalg.norm(centres, axis=1, keepdims=True)
        centres = np.where(lengths > 0, centres / np.where(lengths > 0, lengths, 1), np.eye(1, d))
    return centres.astype(np.float32)


def _filled(orbits, centres, assigned: _Assigned, n_threads: int) -> tuple[np.ndarray, _Assigned]:
    """Move centres that serve nobody to the worst served kernels; give them up if every kernel is met."""
    for _ in range(len(centres)):
        if not len(empty := _lloyd.unused(centres, assigned.labels)):
            return centres, assigned
        worst = np.argsort(-assigned.errors, kind="stable")[: len(empty)]
        least = 1e-10 * orbits.sample_weight[worst] * np.square(orbits.points[worst]).sum(1)
        worst = worst[assigned.errors[worst] > least]  # not what rounding leaves of a multiple
        if not len(worst):
            break
        centres = centres.copy()
        centres[empty[: len(worst)]] = orbits.shapes[worst]
        assigned = orbits.assigned(centres, assigned.members, n_threads)
    centres, labels = _lloyd.used(centres, assigned.labels)
    members = labels.astype(np.int64) * orbits.size + assigned.members % orbits.size
    return centres, replace(assigned, members=members.astype(np.int32), labels=labels)


@njit(nogil=True, cache=True)
def _directions(points, sample_weight, order, starts, centres):
    """Write the leading eigenvector of each cluster's second moments."""
    d = points.shape[1]
    for j in range(len(centres)):
        moments = np.zeros((d, d), np.float64)
        for row in order[starts[j] : starts[j + 1]]:
            for a in range(d):
                for b in range(a + 1):
                    moments[a, b] += np.float64(sample_weight[row]) * points[row, a] * points[row, b]
        if np.trace(moments) > 0:
            for a in range(d):
                for b in range(a):
                    moments[b, a] = moments[a, b]
            centres[j] = np.linalg.eigh(moments)[1][:, d - 1].astype(np.float32)


def _checked(points, sample_weight, n_clusters: int, turned: bool) -> tuple[np.ndarray, np.ndarray | None]:
    points = _settings.checked_points(points)
    if turned and math.isqrt(points.shape[1]) ** 2 != points.shape[1]:
        raise InvalidValueError(f"the kernels have {points.shape[1]} weights; they must be square.")
    _settings.check_k(n_clusters, len(points))
    return points, _settings.checked_sample_weight(sample_weight, len(points))
