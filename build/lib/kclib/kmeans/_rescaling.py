"""The coordinates in which distances of points are computed safely in float32."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans._settings import KMeans


@dataclass(frozen=True)
class Frame:
    """The shift ``(d,)`` and the power of two that bring points into float32's comfortable range.

    Distances are computed from products, which overflow for huge points, vanish for tiny ones and cancel for
    a tight crowd far from zero. Kernels as networks have them need neither, and then nothing is copied.
    """

    shift: np.ndarray
    exponent: int

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], *, shifted: bool = True) -> "Frame":
        """Find the frame of points, float32 ``(n, d)``, that come in parts."""
        count, sums, squares, lowest, highest = _moments_of(parts)
        mean = sums / count
        spread = np.maximum(squares / count - np.square(mean), 0)
        crowded = shifted and np.square(mean).sum() > spread.sum()
        shift = np.where(crowded, mean, 0).astype(np.float32)
        largest = max(np.abs(edge - shift.astype(np.float64)).max() for edge in (lowest, highest))
        exponent = int(np.frexp(largest)[1])
        return cls(shift, exponent if not -10 <= exponent <= 10 else 0)

    @property
    def inertia_unit(self) -> float:
        """An inertia of framed points times this is that of the points."""
        return float(np.ldexp(1.0, 2 * self.exponent))

    @property
    def plain(self) -> bool:
        """Whether points are in range as they are."""
        return self.exponent == 0 and not self.shift.any()

    def into(self, points: np.ndarray) -> np.ndarray:
        """Return points in the frame; themselves if that changes nothing."""
        if self.plain:
            return points
        return np.ldexp(points, -self.exponent) - np.ldexp(self.shift, -self.exponent)

    def out_of(self, found: KMeans) -> KMeans:
        """Return a clustering of framed points as one of the points themselves."""
        if self.plain:
            return found
        centres = np.ldexp(found.centres + np.ldexp(self.shift, -self.exponent), self.exponent)
        return replace(found, centres=centres, inertia=found.inertia * self.inertia_unit)


def _moments_of(parts: Iterable[np.ndarray]) -> tuple:
    """Return how many points there are, their sums, sums of squares, and least and greatest coordinates."""
    found = []
    for points in parts:
        cuts = threads.blocks(len(points))
        found += threads.side_by_side(
            lambda i, points=points, cuts=cuts: (cuts[i].stop - cuts[i].start, *_moments(points[cuts[i]])),
            len(cuts),
            threads.threads(),
        )
    counts, sums, squares, lowest, highest = (np.stack(column) for column in zip(*found, strict=True))
    return counts.sum(), sums.sum(0), squares.sum(0), lowest.min(0), highest.max(0)


@njit(nogil=True, cache=True)
def _moments(points):
    d = points.shape[1]
    sums, squares = np.zeros(d, np.float64), np.zeros(d, np.float64)
    lowest, highest = np.full(d, np.inf, np.float32), np.full(d, -np.inf, np.float32)
    for i in range(len(points)):
        for k in range(d):
            value = np.float64(points[i, k])
            sums[k] += value
            squares[k] += value * value
            lowest[k] = min(lowest[k], points[i, k])
            highest[k] = max(highest[k], points[i, k])
    return sums, squares, lowest, highest
