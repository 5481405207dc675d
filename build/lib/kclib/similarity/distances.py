"""The family of distances between kernels: one small function each, with its formula and its source.

Every one is the Euclidean distance of prepared kernels, at its least over an orbit (the kernel itself, its
negative, its flips and rotations), read on a scale of its own. So one search serves all.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kclib._util import checks
from kclib.errors import InvalidValueError
from kclib.kmeans import symmetric

_RANGE = 20  # binary digits of the largest coordinate, above 1 or below it, that need no other unit
_FLAT = 1e-6  # a kernel that varies by less than this share of its length has no shape but rounding


@dataclass(frozen=True)
class Distance:
    """One way to say how unlike two kernels a and b are.

    Attributes
    ----------
    name, formula, reference : str
    unit : str
        What one unit of it is, for axes.
    largest : float
        Its largest value; infinite if it has none.
    prepare : callable
        From kernels ``(n, d)`` to the points that are compared, float32 ``(n, d)``; kernels that have no
        shape come out as zeros.
    orbit : callable
        From d to ``turns``, int64 ``(t, d)``, and ``signs``, float32 ``(t,)``: the distance is the least over
        ``signs[i] * a[turns[i]]``.
    of_squared, to_squared : callable
        From squared Euclidean distances of prepared points to the distance, and back.
    """

    name: str
    formula: str
    reference: str
    unit: str
    largest: float
    prepare: Callable[[np.ndarray], np.ndarray]
    orbit: Callable[[int], tuple[np.ndarray, np.ndarray]]
    of_squared: Callable[[np.ndarray], np.ndarray]
    to_squared: Callable[[np.ndarray], np.ndarray]

    @property
    def label(self) -> str:
        """Its name and unit, for an axis."""
        return f"{self.name} distance ({self.unit})"

    def comparable(self, points: np.ndarray) -> np.ndarray:
        """Return which kernels it can compare, bool ``(n,)``: a kernel of zeros has no direction."""
        return np.ones(len(points), bool) if math.isinf(self.largest) else self.prepare(points).any(axis=1)

    def prepared(self, points: np.ndarray) -> np.ndarray:
        """Return those it can compare, prepared, float32 ``(m, d)``.

        Raises
        ------
        InvalidValueError
            Fewer than two; points that are no finite ``(n, d)`` numbers.
        """
        points = checks.points("the kernels", points)
        kept = points[self.comparable(points)]
        if len(kept) < 2:
            raise InvalidValueError(
                f"{len(kept)} of {len(points)} kernels can be compared by {self.name} distance; "
                "give at least 2."
            )
        return np.ascontiguousarray(self.prepare(kept))


def named(name: str) -> Distance:
    """Return the distance called `name`."""
    checks.check_known("distance", name, named_distances)
    return named_distances[name]


def unit(points: np.ndarray) -> np.ndarray:
    """Return `points` ``(n, d)`` scaled to length 1, float32; all-zero rows stay zero."""
    # in float64: the squares of tiny kernels vanish in float32
    length = np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    return (points / np.where(length > 0, length, 1)).astype(np.float32)


def framed(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Return points ``(n, d)`` in a unit in which float32 holds their squares, and that unit, a power of two.

    It is 1, and they are the points themselves, unless these are huge or tiny.
    """
    exponent = int(np.frexp(np.abs(points).max(initial=0))[1])
    if abs(exponent) <= _RANGE:
        return points, 1.0
    return np.ldexp(points, -exponent), 2.0**exponent


def _centred_unit(points: np.ndarray) -> np.ndarray:
    shapes = unit(points).astype(np.float64)
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    centred[np.linalg.norm(centred, axis=1) < _FLAT] = 0
    return unit(centred)


def _as_they_are(points: np.ndarray) -> np.ndarray:
    return np.asarray(points, np.float32)


def _itself(d: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(d)[None], np.ones(1, np.float32)


def _either_sign(d: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.arange(d), (2, 1)), np.array([1, -1], np.float32)


def _turned(d: int) -> tuple[np.ndarray, np.ndarray]:
    side = math.isqrt(d)
    if side**2 != d:
        raise InvalidValueError(f"the kernels have {d} weights; the symmetric distance is for square ones.")
    return symmetric.transforms(side), np.ones(8, np.float32)


def _half(squared: np.ndarray) -> np.ndarray:
    return np.asarray(squared) / 2


def _double(distance: np.ndarray) -> np.ndarray:
    return 2 * np.asarray(distance)


def _sine(squared: np.ndarray) -> np.ndarray:
    return np.sqrt(squared * (1 - np.asarray(squared) / 4))


def _of_sine(sine: np.ndarray) -> np.ndarray:
    square = np.square(np.minimum(sine, 1))
    return 2 * square / (1 + np.sqrt(1 - square))  # 2 - 2 cos, without its cancellation


_FAMILY = (
    Distance(
        "euclidean", "|a - b|", "MacQueen 1967: what k-means makes small",
        "weight units", math.inf, _as_they_are, _itself, np.sqrt, np.square,
    ),
    Distance(
        "cosine", "1 - a·b / (|a| |b|)", "Dhillon and Modha 2001: spherical k-means",
        "0 same shape, 1 unrelated, 2 opposite", 2.0, unit, _itself, _half, _double,
    ),
    Distance(
        "correlation", "1 - |r(a, b)|, r Pearson's correlation of the weights",
        "Langfelder and Horvath 2008: unsigned networks of WGCNA",
        "0 same pattern up to offset, sign and length, 1 unrelated",
        1.0, _centred_unit, _either_sign, _half, _double,
    ),
    Distance(
        "scale-free", "sin of the angle between a and b, the least of |a/|a| - s b| over all s",
        "Conway, Hardin and Sloane 1996: chordal distance of lines",
        "0 same shape up to sign and length, 1 at right angles",
        1.0, unit, _either_sign, _sine, _of_sine,
    ),
    Distance(
        "symmetric", "least |a - g b| over the 8 flips and rotations g",
        "Son, Nah and Lee 2018: transform-invariant clustering",
        "weight units", math.inf, _as_they_are, _turned, np.sqrt, np.square,
    ),
)  # fmt: skip

named_distances: Mapping[str, Distance] = {distance.name: distance for distance in _FAMILY}
