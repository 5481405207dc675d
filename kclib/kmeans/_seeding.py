"""Small k-means in many cells at once: how centres are started, or grown from fewer of them (numba)."""

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans import _nearest, _ward
from kclib.kmeans._inner_loops import TILE, scanned


def shares(inertias: np.ndarray, sizes: np.ndarray, n_clusters: int, d: int) -> np.ndarray:
    """Share K out over cells in proportion to inertia^(d / (d + 2)): at least 1 a cell, at most its size.

    That is the optimal density of points in high-rate quantization (Gersho 1979, *Asymptotically optimal
    block quantization*). Cells without points get none.
    """
    wish = np.maximum(inertias, 1e-30) ** (d / (d + 2))
    low, high = np.minimum(sizes, 1), sizes
    result = low.copy()
    while (rest := n_clusters - result.sum()) > 0:
        room = np.where(result < high, wish, 0.0)
        if rest < np.count_nonzero(room):  # the last few go where the wish is largest
            result[np.argsort(-room, kind="stable")[:rest]] += 1
            continue
        step = np.floor(rest * room / room.sum()).astype(int)
        if not step.any():
            step = (room > 0).astype(int)
        result = np.minimum(result + step, high)
    return result


def split(
    points: np.ndarray,
    sample_weight: np.ndarray | None,
    cells: np.ndarray,
    counts: np.ndarray,
    *,
    rounds: int,
    trials: int = 1,
    leaves: int = 0,
    sample: int = 64,
    seed: int,
    n_threads: int,
    done=None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find centres and run a few rounds of Lloyd's algorithm in each cell on its own.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``.
    sample_weight : numpy.ndarray, optional
        float32 ``(n,)``.
    cells : numpy.ndarray
        int32 ``(n,)``: the cell of each point.
    counts : numpy.ndarray
        int ``(cells,)``: clusters wanted in each cell, at most its points.
    rounds : int
        Of Lloyd's algorithm.
    trials : int
        Draws that each centre of k-means++ is the best of.
    leaves : int
        Points a cluster that are merged by Ward's criterion, instead of k-means++; 0 for that.
    sample : int
        Points a cluster that the centres of a large cell are found on.
    seed, n_threads : int
    done : callable, optional
        Called with shares of the work. Once it answers true, the cells that are left are cut into runs of
        their points.

    Returns
    -------
    centres : numpy.ndarray
        float32 ``(counts.sum(), d)``, cell after cell.
    labels : numpy.ndarray
        int32 ``(n,)``: a centre near each point, not always the nearest.
    """
    order, starts = _nearest.by_label(cells, len(counts))
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    centres = np.empty((first[-1], points.shape[1]), np.float32)
    labels = np.empty(len(points), np.int32)
    sample_weight = np.ones(0, np.float32) if sample_weight is None else sample_weight
    cost = np.concatenate([[0], np.cumsum(np.diff(starts) * (counts + 4.0) + 50)])
    parts = min(256, len(counts))
    edges = np.searchsorted(cost, np.linspace(0, cost[-1], parts + 1))
    edges[0], edges[-1] = 0, len(counts)
    dims, stop = (0,) * points.shape[1], np.zeros(1, np.bool_)

    def run(i: int) -> None:
        _cells(
            points, sample_weight, order, starts, first, edges[i], edges[i + 1],
            rounds, trials, leaves, sample, seed, dims, centres, labels, stop,
        )  # fmt: skip

    threads.side_by_side(run, parts, n_threads, done, stop)
    return centres, labels


@njit(nogil=True, cache=True)
def _cells(
    points,
    sample_weight,
    order,
    starts,
    first,
    begin,
    end,
    rounds,
    trials,
    leaves,
    sample,
    seed,
    dims,
    centres,
    labels,
    stop,
):
    for cell in range(begin, end):
        rows = order[starts[cell] : starts[cell + 1]]
        k = first[cell + 1] - first[cell]
        if len(rows) == 0 or k == 0:
            continue
        cell_centres = centres[first[cell] : first[cell + 1]]
        if stop[0]:
            _runs(points, rows, first[cell], cell_centres, labels)
            continue
        np.random.seed(seed + cell)  # noqa: NPY002 - numba's own generator, one a thread
        chosen = rows if k == 1 else _sampled(rows, sample_weight, k, sample)
        x, w = _gathered(points, sample_weight, chosen, dims)
        local = np.zeros(len(chosen), np.int32)
        if k == 1:
            _means(x, w, local, cell_centres, np.zeros(len(chosen), np.float32), dims)
        else:
            if leaves > 0:
                _merged(x, w, cell_centres, leaves, dims, stop)
            else:
                _plus_plus(x, w, cell_centres, trials, dims)
            _lloyd(x, w, cell_centres, local, rounds, dims)
        if len(chosen) < len(rows):
            x, w = _gathered(points, sample_weight, rows, dims)
            local = np.zeros(len(rows), np.int32)
            _lloyd(x, w, cell_centres, local, 0, dims)
        for i, row in enumerate(rows):
            labels[row] = first[cell] + local[i]


@njit(nogil=True, cache=True)
def _runs(points, rows, first, centres, labels):
    """Cut a cell into runs of about as many points, with one of them as centre."""
    k = len(centres)
    for i, row in enumerate(rows):
        run = i * k // len(rows)
        labels[row] = first + run
        centres[run] = points[row]


@njit(nogil=True, cache=True)
def _sampled(rows, sample_weight, k, sample):
    """Return rows that have weight, at most about `sample` a cluster: a random one of each few."""
    if len(sample_weight) > 0:
        able = rows[sample_weight[rows] > 0]
        if len(able) >= k:
            rows = able
    stride = len(rows) // (sample * k)
    if stride < 2:
        return rows
    result = np.empty(len(rows) // stride, np.int32)
    for i in range(len(result)):
        result[i] = rows[i * stride + np.random.randint(stride)]  # noqa: NPY002
    return result


@njit(nogil=True, cache=True)
def _gathered(points, sample_weight, rows, dims):
    """Return some points, one coordinate after the other ``(d, m)``, and their sample weights."""
    x = np.empty((len(dims), len(rows)), np.float32)
    w = np.ones(len(rows), np.float32)
    for i, row in enumerate(rows):
        for a in range(len(dims)):
            x[a, i] = points[row, a]
        if len(sample_weight) > 0:
            w[i] = sample_weight[row]
    return x, w


@njit(nogil=True, cache=True)
def _merged(x, w, centres, leaves, dims, stop):
    """Write the means of the clusters that Ward's merges of some points leave, `leaves` points a cluster."""
    n, k = x.shape[1], len(centres)
    size = min(n, leaves * k)
    some, mass = np.empty((len(dims), size), np.float32), np.empty(size, np.float32)
    for i in range(size):
        first, end = i * n // size, (i + 1) * n // size
        at = first + np.random.randint(end - first)  # noqa: NPY002
        mass[i] = w[at]
        some[:, i] = x[:, at]
    pairs, heights = _ward.chained(some.T.copy(), mass, dims, stop)
    labels = _ward.cut(pairs, heights, k)
    for i in range(size):
        centres[labels[i]] = some[:, i]  # for clusters without weight
    _means(some, mass, labels, centres, np.zeros(size, np.float32), dims)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _plus_plus(x, w, centres, trials, dims):
    """Draw centres with k-means++ (Arthur and Vassilvitskii 2007), greedily: the best of a few draws each."""
    n, k = x.shape[1], len(centres)
    closest = np.full(n, np.float32(np.inf), np.float32)
    candidate, kept = np.empty(n, np.float32), np.empty(n, np.float32)
    mass = w.copy()
    total = np.float64(0)
    for i in range(n):
        total += mass[i]
    for j in range(k):
        least = np.float64(np.inf)
        for _ in range(trials if j > 0 else 1):
            chosen = _draw(mass, total * np.random.random())  # noqa: NPY002
            for i in range(n):
                distance = np.float32(0)
                for a in range(len(dims)):
                    distance += (x[a, i] - x[a, chosen]) ** 2
                candidate[i] = min(distance, closest[i])
            potential = np.float64(0)
            for i in range(n):
                potential += candidate[i] * w[i]
            if potential < least:
                least = potential
                kept, candidate = candidate, kept
                for a in range(len(dims)):
                    centres[j, a] = x[a, chosen]
        closest, kept = kept, closest
        total = least
        for i in range(n):
            mass[i] = closest[i] * w[i]


@njit(nogil=True, cache=True)
def _draw(mass, target):
    """Return the first index at which the running sum of mass passes the target."""
    n, block = len(mass), 64
    total = np.float64(0)
    for start in range(0, n, block):
        part = np.float64(0)
        for i in range(start, min(n, start + block)):
            part += mass[i]
        if total + part > target:
            for i in range(start, min(n, start + block)):
                total += mass[i]
                if total > target:
                    return i
        else:
            total += part
    return n - 1


@njit(nogil=True, cache=True)
def _lloyd(x, w, centres, labels, rounds, dims):
    n, k = x.shape[1], len(centres)
    errors = np.empty(n, np.float32)
    tiles = np.empty(((k + TILE - 1) // TILE, len(dims), TILE), np.float32)
    halves = np.empty((len(tiles), TILE), np.float32)
    score = np.empty(TILE, np.float32)
    for _ in range(rounds):
        changed = _assign(x, centres, tiles, halves, score, labels, errors, dims)
        _means(x, w, labels, centres, errors, dims)
        if not changed:
            return
    _assign(x, centres, tiles, halves, score, labels, errors, dims)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _assign(x, centres, tiles, halves, score, labels, errors, dims):
    """Label points with the nearest of the cell's centres, seen from its first; tell if a label changed."""
    k = len(centres)
    for j in range(len(tiles) * TILE):
        square = np.float32(0)
        for a in range(len(dims)):
            value = centres[j, a] - centres[0, a] if j < k else np.float32(0)
            tiles[j // TILE, a, j % TILE] = value
            square += value * value
        halves[j // TILE, j % TILE] = np.float32(0.5) * square if j < k else np.float32(np.inf)
    point = np.empty(len(dims), np.float32)
    changed = False
    for i in range(x.shape[1]):
        square = np.float32(0)
        for a in range(len(dims)):
            point[a] = x[a, i] - centres[0, a]
            square += point[a] * point[a]
        where = labels[i]
        best = halves[where // TILE, where % TILE]
        for a in range(len(dims)):
            best -= point[a] * tiles[where // TILE, a, where % TILE]
        for tile in range(len(tiles)):
            best, where = scanned(point, tiles, halves, tile, score, dims, best, where)
        changed = changed or labels[i] != where
        labels[i] = where
        errors[i] = max(square + 2 * best, np.float32(0))
    return changed


@njit(nogil=True, cache=True)
def _means(x, w, labels, centres, errors, dims):
    """Move centres to their points' weighted means, and those without points to the worst served one."""
    k = len(centres)
    sums, mass = np.zeros((k, len(dims)), np.float64), np.zeros(k, np.float64)
    for i in range(x.shape[1]):
        mass[labels[i]] += w[i]
        for a in range(len(dims)):
            sums[labels[i], a] += w[i] * np.float64(x[a, i])
    for j in range(k):
        if mass[j] > 0:
            for a in range(len(dims)):
                centres[j, a] = sums[j, a] / mass[j]
        else:
            worst = np.argmax(errors * w)
            errors[worst] = 0
            for a in range(len(dims)):
                centres[j, a] = x[a, worst]
