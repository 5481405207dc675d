"""Options and results of a k-means fit, and checks of its arguments."""

from dataclasses import dataclass

import numpy as np

from kclib._util import checks
from kclib._util import threads as util_threads
from kclib.errors import InvalidValueError

FLAT = 256  # up to this K, centres are drawn from all points at once and rounds are exact


@dataclass(frozen=True)
class KMeans:
    """A partition of n points into K non-empty clusters.

    Attributes
    ----------
    centres : numpy.ndarray
        float32 ``(K, d)``, all distinct.
    labels : numpy.ndarray
        int32 ``(n,)``: the index of each point's nearest centre, exact to float32 rounding; see `exact`.
    inertia : float
        Weighted sum of squared distances of the points to their centres, summed in float64.
    iterations : int
        Times that the centres were moved to their points' means, over all points.
    converged : bool
        Whether the last of these lowered the inertia by no more than `tol` of it. False if the rounds or the
        caller's patience ended before.
    search : str
        How the labels were found: ``pruned`` (by the triangle inequality), ``streamed`` (likewise, block by
        block), or the name of a torch device (every centre compared there). All are exact.
    exact : bool
        Whether each label is the nearest centre; False if the caller stopped the search. Some labels then are
        of a centre near by, and fewer than K clusters may come back.
    """

    centres: np.ndarray
    labels: np.ndarray
    inertia: float
    iterations: int
    converged: bool
    search: str = "pruned"
    exact: bool = True


@dataclass(frozen=True)
class Options:
    """How a fit is made; the parameters of `_fitting.fit` beside the data."""

    max_iter: int
    tol: float | None
    reach: float | None
    seed: int
    n_threads: int | None

    def __post_init__(self):
        object.__setattr__(self, "max_iter", checks.check_whole("max_iter", self.max_iter, 0))
        if self.tol is not None:
            checks.check_real("tol", self.tol, lambda x: x >= 0, "a share of the inertia, at least 0")
        if self.reach is not None:
            checks.check_real("reach", self.reach, lambda x: x > 0, "above 0, or None for exact rounds")
        object.__setattr__(self, "seed", checks.check_seed(self.seed))
        if self.n_threads is not None:
            checks.check_whole("n_threads", self.n_threads, 1)

    def tolerance(self, n_clusters: int) -> float:
        """Return the share of the inertia that a round must gain; by default more where it costs more."""
        return self.tol if self.tol is not None else 1e-3 if n_clusters <= FLAT else 1e-2

    @property
    def threads(self) -> int:
        """Number of threads; all processors if not given."""
        return util_threads.threads(self.n_threads)


def check_k(n_clusters: int, n: int) -> int:
    """Return K as Python's own number; raise InvalidValueError unless it is a whole one from 1 to n."""
    return checks.check_whole("n_clusters", n_clusters, 1, n, "the number of kernels")


def checked_points(points) -> np.ndarray:
    """Return points as contiguous float32 ``(n, d)``; raise InvalidValueError if they are not finite."""
    points = checks.floats("the points", points)
    if points.ndim != 2 or not points.shape[1]:
        raise InvalidValueError(f"the points have shape {points.shape}; it must be (n, d).")
    if not all(np.isfinite(points[part]).all() for part in util_threads.blocks(len(points))):
        raise InvalidValueError("the points hold NaN or infinite values; they must be finite.")
    return points


def checked_sample_weight(sample_weight, n: int) -> np.ndarray | None:
    """Return sample weights as float32 ``(n,)``, or None as it is; InvalidValueError if out of range."""
    if sample_weight is None:
        return None
    sample_weight = checks.floats("sample_weight", sample_weight)
    if sample_weight.shape != (n,):
        raise InvalidValueError(f"sample_weight has shape {sample_weight.shape}; it must be ({n},).")
    if not np.isfinite(sample_weight).all() or sample_weight.min() < 0 or not sample_weight.any():
        raise InvalidValueError("sample_weight must be finite, at least 0, and not all 0.")
    return sample_weight


def counted(sample_weight: np.ndarray | None) -> np.ndarray | None:
    """Return the sample weights of a group, or None, so that all count alike, where all of them are 0."""
    return None if sample_weight is None or not sample_weight.any() else sample_weight


def required_sample_weight(sample_weight, n: int) -> np.ndarray:
    """Return sample weights as `checked_sample_weight` does; raise InvalidValueError also for None."""
    if sample_weight is None:
        raise InvalidValueError("sample_weight is None; give what errors cost (sensitivity.importance).")
    return checked_sample_weight(sample_weight, n)
