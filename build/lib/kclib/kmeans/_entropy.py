"""k-means that pays for its indices: squared error and entropy-coded bits against each other (ECVQ)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kclib._util import checks, threads
from kclib._util.compiled import njit
from kclib.kmeans import _lloyd, _nearest, _settings
from kclib.kmeans._fit_progress import FitStep, Progress
from kclib.kmeans._fitting import fit as unpriced
from kclib.kmeans._inner_loops import square
from kclib.kmeans._rescaling import Frame
from kclib.kmeans._settings import Options


def counts(indices: np.ndarray, n_symbols: int) -> np.ndarray:
    """Return how often each of `n_symbols` occurs, int64 ``(n_symbols,)``."""
    return np.bincount(indices, minlength=n_symbols)


def entropy_bytes(frequencies: np.ndarray) -> float:
    """Return the bytes below which no code of independent symbols with these counts can come on average.

    The empirical entropy, -Σ n log2(n / N) / 8 (Shannon 1948, *A Mathematical Theory of Communication*).
    """
    used = frequencies[frequencies > 0]
    return float(-(used * np.log2(used / used.sum())).sum() / 8) if len(used) else 0.0


_START = 0.5  # share of the work that the unpriced clustering is
_PARTS = 64  # pieces of work, whatever the number of threads: same bits for any
_DEAR = 1e30  # a bit at this price outweighs any distance in the frame, and 30 of them fit into float32
_DEAREST = 1e200  # so for a price before it is divided by weights; sums of it fit into float64


@dataclass(frozen=True)
class Priced:
    """A partition of n points into K non-empty clusters whose indices cost bits.

    Attributes
    ----------
    centres : numpy.ndarray
        float32 ``(K, d)``, all distinct.
    labels : numpy.ndarray
        int32 ``(n,)``. Not always the nearest centre's: a frequent one is cheaper to name.
    inertia : float
        Weighted sum of squared distances of the points to their centres, summed in float64.
    bits : float
        What an ideal entropy code takes for all labels: their empirical entropy times n.
    price : float
        What a bit costs, in units of the inertia.
    iterations : int
        Rounds that lowered the cost.
    converged : bool
        Whether the last round lowered the cost by no more than `tol` of it. False if the rounds or the
        caller's patience ended before.
    """

    centres: np.ndarray
    labels: np.ndarray
    inertia: float
    bits: float
    price: float
    iterations: int = 0
    converged: bool = False

    @property
    def cost(self) -> float:
        """What is minimised: the inertia, and the price of the bits."""
        return self.inertia + self.price * self.bits


def fit(
    points: np.ndarray,
    n_clusters: int,
    *,
    price: float,
    weights: np.ndarray | None = None,
    max_iter: int = 25,
    tol: float | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    progress: Callable[[FitStep], object] | None = None,
) -> Priced:
    """Cluster points for the least sum of squared error and price of the bits that the indices take.

    Entropy-constrained vector quantization (Chou, Lookabaugh and Gray 1989, *Entropy-constrained vector
    quantization*): the least of Σ w |x - c|² - price · Σ log2 p, where p is the share of the points that have
    the point's index. Rounds follow an unpriced clustering (`_fitting.fit`). In each, a point takes the
    centre of least w |x - c|² - price · log2 p, exact to float32 rounding; centres that none took are
    dropped; shares and means follow. No round raises the cost. One cluster for all is the result if it costs
    less than what the rounds come to. The same seed gives the same bits for any thread count.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``, finite.
    n_clusters : int
        1 to n: centres to start from. The higher the price, the fewer come back.
    price : float
        What a bit costs, in squared units of the points (times those of the weights); finite, at least 0.
    weights : numpy.ndarray, optional
        ``(n,)``, finite, at least 0, not all 0: how much each point's squared distance counts. Each index
        counts alike, so a point of weight 0 takes the most frequent one, unless bits are free.
    max_iter : int
        Most rounds with the price.
    tol : float, optional
        Stop once a round lowers the cost by no more than this share of it; by default as in `_fitting.fit`.
    seed : int
    n_threads : int, optional
        All processors by default.
    progress : callable, optional
        As in `_fitting.fit`; `FitStep.inertia` has no price in it.

    Raises
    ------
    InvalidValueError
        K, points, price, weights, max_iter or tol out of range.
    NotEnoughMemoryError
    """
    price, report = checked_price(price), Progress(progress)
    options = Options(max_iter, tol, None, seed, n_threads)
    points = _settings.checked_points(points)
    weights = _settings.checked_weights(weights, len(points))

    def starting(step: FitStep) -> bool:
        report.inertia = step.inertia
        report(_START * step.share)
        return report.stopped

    start = unpriced(points, n_clusters, weights=weights, seed=seed, n_threads=n_threads, progress=starting)
    frame = Frame.of([points])
    report.unit = frame.inertia_unit
    market = _Market.of(frame.into(points), weights, price / frame.inertia_unit, options.threads)
    found = _improved(market, market.priced(frame.into(start.centres), start.labels), options, report)
    return replace(frame.out_of(found), price=price)


def checked_price(price: float) -> float:
    """Return a price as a float; raise InvalidValueError unless it is a finite number, at least 0."""
    return float(checks.check_real("price", price, lambda x: x >= 0, "a finite number, at least 0"))


@dataclass(frozen=True)
class _Market:
    """Framed points, and what a bit costs each, in its own squared distance."""

    points: np.ndarray
    weights: np.ndarray | None
    price: float
    prices: np.ndarray  # float32 (n,): the price over the weight
    n_threads: int

    @classmethod
    def of(cls, points, weights, price: float, n_threads: int) -> "_Market":
        price = min(price, _DEAREST)
        prices = np.full(len(points), price)
        if weights is not None and price > 0:
            prices = np.full(len(points), _DEAREST)
            np.divide(price, weights, out=prices, where=weights > 0, dtype=np.float64)
        return cls(points, weights, price, np.minimum(prices, _DEAR).astype(np.float32), n_threads)

    def priced(self, centres: np.ndarray, labels: np.ndarray) -> Priced:
        """Return a partition with what it costs, without unused and double centres."""
        centres, labels = _lloyd.used(centres, _lloyd.merged(centres, labels))
        inertia = _lloyd.total(
            _nearest.errors(self.points, centres, labels, n_threads=self.n_threads), self.weights
        )
        bits = 8 * entropy_bytes(counts(labels, len(centres)))
        return Priced(centres, labels, inertia, bits, self.price)

    def improved(self, found: Priced) -> Priced:
        """Return the partition after one round."""
        labels = self.assigned(found.centres, found.labels)
        centres = _lloyd.means(self.points, self.weights, labels, found.centres, self.n_threads)
        return self.priced(centres, labels)

    def alone(self) -> Priced:
        """Return the partition into one cluster, whose index takes no bits."""
        labels, centre = np.zeros(len(self.points), np.int32), self.points[:1]
        return self.priced(_lloyd.means(self.points, self.weights, labels, centre, self.n_threads), labels)

    def assigned(self, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the cheapest centre of each point, int32 ``(n,)``, by the shares of the present labels."""
        order, starts = _nearest.by_label(labels, len(centres))
        counts = np.diff(starts)
        lengths = np.log2(counts.max() / counts).astype(np.float32)  # beyond what the shortest index takes
        cost = starts + 8 * np.arange(len(starts))  # a cluster costs about as much as a few of its points
        edges = np.searchsorted(cost, np.linspace(0, cost[-1], _PARTS + 1))
        dims = (0,) * centres.shape[1]  # numba compiles for its length
        result = np.empty(len(labels), np.int32)

        def run(i: int) -> None:
            span = edges[i], edges[i + 1]
            _search(self.points, self.prices, centres, lengths, order, starts, *span, dims, result)

        threads.side_by_side(run, _PARTS, self.n_threads)
        return result


def _improved(market: _Market, found: Priced, options: Options, report: Progress) -> Priced:
    """Improve a partition round by round, while that lowers its cost by more than the tolerance."""
    iterations, converged = 0, False
    for _ in range(options.max_iter):
        if report.stopped:
            break
        after = market.improved(found)
        converged = found.cost - after.cost <= options.tolerance(len(found.centres)) * found.cost
        if after.cost < found.cost:
            found, iterations = after, iterations + 1
        report.inertia = found.inertia
        report(_lloyd.ROUND_SHARE * report.left)
        if converged:
            break
    # Equally frequent centres give way to none of each other, whatever a bit costs.
    found = min(found, market.alone(), key=lambda priced: priced.cost)
    report.inertia = found.inertia
    report(report.left)
    return replace(found, iterations=iterations, converged=converged)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _search(points, prices, centres, lengths, order, starts, first, last, dims, result):
    """Write the centre c of least |x - c|² + price · length, for the points x of centres `first` to `last`.

    A point at distance r of its present centre m, where its best so far costs b, can only do better within
    r + √b of m. So the centres around m are sorted by their distance to it once, for all of its points.
    """
    shortest = np.argmin(lengths)
    apart = np.empty(len(centres), np.float32)
    for j in range(first, last):
        mine = order[starts[j] : starts[j + 1]]
        reach, costs = _opening(points, prices, centres, lengths, mine, j, shortest, dims, result)
        for c in range(len(centres)):
            apart[c] = np.sqrt(square(centres[c], centres[j], dims)) * np.float32(0.9995)  # for rounding
        near = np.flatnonzero(apart <= reach)
        near = near[np.argsort(apart[near])]
        far, extra, rows = apart[near], lengths[near], centres[near]
        for place, row in enumerate(mine):
            radius, best = np.sqrt(square(points[row], centres[j], dims)), costs[place]
            limit = radius + np.sqrt(best)
            for i in range(len(near)):
                if far[i] > limit:
                    break
                cost = prices[row] * extra[i]
                if cost < best:
                    cost += square(points[row], rows[i], dims)
                    if cost < best:
                        best, result[row] = cost, near[i]
                        limit = radius + np.sqrt(best)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _opening(points, prices, centres, lengths, mine, j, shortest, dims, result):
    """Take the better of centre j and the most frequent one; return how far to look on, and the costs."""
    reach, costs = np.float32(0), np.empty(len(mine), np.float32)
    for place, row in enumerate(mine):
        distance = square(points[row], centres[j], dims)
        costs[place], result[row] = distance + prices[row] * lengths[j], j
        other = square(points[row], centres[shortest], dims)
        if other < costs[place]:
            costs[place], result[row] = other, shortest
        reach = max(reach, np.sqrt(distance) + np.sqrt(costs[place]))
    return reach, costs
