"""Pairs of kernels by distance: histograms of all pairs, streamed in blocks, with their sampling error."""

from dataclasses import dataclass

import numpy as np

from kclib._util import checks, progress_bars, threads
from kclib._util.compiled import njit
from kclib.errors import InvalidValueError
from kclib.kernels import Kernels, bank_of
from kclib.similarity import distances
from kclib.similarity.distances import Distance

_ROWS, _OTHERS = 256, 512  # pairs measured at a time by a thread: they stay in its cache
_SHIFT = 14  # of a float's bits: what is left, exponent and nine bits of mantissa, numbers a cell


@dataclass(frozen=True)
class PairHistogram:
    """Pairs of kernels by distance.

    Attributes
    ----------
    edges : numpy.ndarray
        float64 ``(b + 1,)``, ascending.
    counts : numpy.ndarray
        int64 ``(b,)``: pairs in each bin; as in `numpy.histogram`, only the last includes its right edge.
    pairs : int
        Pairs measured, inside the edges or not.
    error : numpy.ndarray
        float64 ``(b,)``: standard error of `shares` from sampling kernels; 0 where all were measured.
    """

    edges: np.ndarray
    counts: np.ndarray
    pairs: int
    error: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Share of all measured pairs in each bin, float64 ``(b,)``, 0 to 1."""
        return self.counts / max(self.pairs, 1)


def pair_histogram(
    points: np.ndarray,
    edges: np.ndarray,
    *,
    distance: str = "euclidean",
    drawn_from: int | None = None,
    n_threads: int | None = None,
    progress: bool = False,
) -> PairHistogram:
    """Count all pairs of points by distance, a block at a time.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``. Those that the distance cannot compare (`Distance.comparable`) form no pairs.
    edges : numpy.ndarray
        ascending ``(b + 1,)``, at least 0.
    distance : str
        One of `distances.named_distances`.
    drawn_from : int, optional
        How many kernels the points were drawn from, without replacement; for n there is no sampling error. By
        default, very many.
    n_threads : int, optional
    progress : bool
        Whether to show a progress bar when it takes longer than two seconds.

    Raises
    ------
    UnknownNameError, InvalidValueError
        Fewer than two points to compare; edges that do not ascend from 0 or more; `drawn_from` too small.
    """
    named = distances.named(distance)
    if drawn_from is not None and drawn_from < len(points):
        raise InvalidValueError(
            f"drawn_from is {drawn_from}; {len(points)} points cannot be drawn from so few."
        )
    prepared = named.prepared(points)
    met = _met(prepared, edges, named, n_threads, progress)
    unseen = 1 - len(points) / drawn_from if drawn_from else 1.0
    return _histogram(edges, met, len(prepared) * (len(prepared) - 1) // 2, [slice(None)], [unseen])


def layer_histograms(
    bank: Kernels, rows: np.ndarray, edges: np.ndarray, *, distance: str = "euclidean"
) -> dict[str, PairHistogram]:
    """Return the `pair_histogram` of each layer's sampled kernels, by layer name.

    `rows` are the sampled rows of the bank; layers with fewer than two of them to compare are left out.
    """
    result, named, bank = {}, distances.named(distance), bank_of(bank)
    rows = bank.checked(rows)
    for layer in bank.layers:
        points = bank.points[layer.of(rows)]
        if named.comparable(points).sum() > 1:
            result[layer.name] = pair_histogram(points, edges, distance=distance, drawn_from=layer.n_kernels)
    return result


def within_and_across(
    bank: Kernels, rows: np.ndarray, edges: np.ndarray, *, distance: str = "euclidean"
) -> dict[str, PairHistogram]:
    """Return histograms of the sampled pairs ``within a layer`` and ``across layers``.

    `rows` are rows of the bank sampled layer by layer. Their standard errors are those of a stratified
    sample: only how kernels of one layer differ counts.
    """
    named, bank = distances.named(distance), bank_of(bank)
    drawn = np.sort(bank.checked(rows))
    rows = drawn[named.comparable(bank.points[drawn])]
    every = _met(named.prepared(bank.points[rows]), edges, named, None, False)
    within = _Met(np.zeros_like(every.rows), np.zeros_like(every.pairs))
    strata, unseen, pairs = [], [], 0
    for layer in bank.layers:
        part = slice(*np.searchsorted(rows, (layer.rows.start, layer.rows.stop)))
        n = part.stop - part.start
        if n > 1:
            mine = _met(named.prepared(bank.points[rows[part]]), edges, named, None, False)
            within.rows[part] = mine.rows
            within = _Met(within.rows, within.pairs + mine.pairs)
        pairs += n * (n - 1) // 2
        strata.append(part)
        unseen.append(1 - len(layer.of(drawn)) / layer.n_kernels)
    total = len(rows) * (len(rows) - 1) // 2
    across = _Met(every.rows - within.rows, every.pairs - within.pairs)
    return {
        "within a layer": _histogram(edges, within, pairs, strata, unseen),
        "across layers": _histogram(edges, across, total - pairs, strata, unseen),
    }


@dataclass(frozen=True)
class _Met:
    """How many others lie in each bin of distance."""

    rows: np.ndarray  # int32 (n, b), from each point: every pair stands twice
    pairs: np.ndarray  # int64 (b,): once


def _histogram(edges, met: _Met, pairs: int, strata, unseen) -> PairHistogram:
    """Return the histogram, with its standard error.

    It is that of a U-statistic of order two (Hoeffding 1948): what single kernels add to the sum, by strata,
    with the share of each stratum that was not looked at.
    """
    variance = np.zeros(met.rows.shape[1])
    for part, share in zip(strata, unseen, strict=True):
        mine = met.rows[part]
        if len(mine) > 1:
            variance += len(mine) * mine.var(axis=0, ddof=1) * share
    return PairHistogram(np.asarray(edges, float), met.pairs, pairs, np.sqrt(variance) / max(pairs, 1))


def _met(
    prepared: np.ndarray, edges: np.ndarray, named: Distance, n_threads: int | None, progress: bool
) -> _Met:
    checks.floats("edges", edges)  # refuses what is no numbers; its float32 would merge near edges
    edges = np.asarray(edges, float)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all() or edges[0] < 0:
        raise InvalidValueError("edges must be at least two distances, ascending from 0 or more.")
    prepared, unit = distances.framed(prepared)
    edges = edges / unit
    thresholds = named.to_squared(edges).astype(np.float32)
    thresholds[-1] = np.nextafter(thresholds[-1], np.float32(np.inf))  # the last bin includes its right edge
    # Rounding puts some pairs a little above the largest distance there is.
    thresholds[edges > named.largest] = np.inf
    thresholds[-1] = np.inf if edges[-1] >= named.largest else thresholds[-1]
    thresholds = np.append(thresholds, np.float32(np.inf))
    cells = _cells(thresholds)
    turns, signs = named.orbit(prepared.shape[1])
    rows = np.zeros((len(prepared), len(edges) - 1), np.int32)
    others = np.ascontiguousarray(prepared.T)
    dims = (0,) * len(others)  # its length is the compiler's to know: the loop over them is unrolled
    starts = range(0, len(prepared), _ROWS)
    pairs = np.zeros((len(starts), len(edges) - 1), np.int64)

    def measure(i: int) -> None:
        part = slice(starts[i], min(len(prepared), starts[i] + _ROWS))
        queries = np.stack([sign * prepared[part][:, turn] for turn, sign in zip(turns, signs, strict=True)])
        _count(queries, others, part.start, thresholds, cells, dims, rows[part], pairs[i])

    with progress_bars.of_shares("pairs", progress) as bar:
        threads.side_by_side(measure, len(starts), threads.threads(n_threads), bar.update)
    return _Met(rows, pairs.sum(axis=0))


def _cells(thresholds: np.ndarray) -> np.ndarray:
    """Return how many thresholds lie at or below the smallest float of each cell, int16."""
    smallest = (np.arange(1 << (31 - _SHIFT), dtype=np.int32) << _SHIFT).view(np.float32)
    return np.searchsorted(thresholds[:-1], smallest, side="right").astype(np.int16)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _count(queries, others, first, thresholds, cells, dims, rows, pairs):
    """Add to rows, (m, b), the others, (d, n), by squared distance from each query, (t, m, d).

    And to pairs, (b,), those that come later: seen from its two ends, rounding may tell a distance apart.
    """
    (t, m, d), n, b = queries.shape, others.shape[1], len(pairs)
    least, query = np.empty(_OTHERS, np.float32), np.empty(d, np.float32)
    before, after = np.zeros((m, b + 2), np.int32), np.zeros((m, b + 2), np.int32)  # and outside the edges
    for start in range(0, n, _OTHERS):
        size = min(_OTHERS, n - start)
        for i in range(m):
            for turn in range(t):
                for k in range(d):
                    query[k] = queries[turn, i, k]
                for j in range(size):
                    squared = np.float32(0)
                    for k in range(len(dims)):
                        difference = query[k] - others[k, start + j]
                        squared += difference * difference
                    least[j] = squared if turn == 0 else min(least[j], squared)
            itself = min(max(first + i - start, 0), size)
            _sort(least[:itself], thresholds, cells, before[i])
            _sort(least[itself + (first + i - start >= 0) : size], thresholds, cells, after[i])
    rows += before[:, 1 : b + 1] + after[:, 1 : b + 1]
    for i in range(m):
        pairs += after[i, 1 : b + 1]


@njit(nogil=True, cache=True)
def _sort(squared, thresholds, cells, tally):
    bits = squared.view(np.int32)
    for j in range(len(squared)):
        place = cells[bits[j] >> _SHIFT]
        while squared[j] >= thresholds[place]:
            place += 1
        tally[place] += 1
