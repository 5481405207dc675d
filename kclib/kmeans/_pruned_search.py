"""The search behind `_nearest.nearest`: the centres that a point need not look at (numba)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans._inner_loops import TILE, scanned, square

_BUNCH = 16  # tiles under one outer box
_SHELLS = 64  # distance classes that a cluster's candidates are sorted into
_PARTS, _A_PART = 256, 1024  # pieces of work that a pass is cut into, at most; points of one, at least


def pruned(
    points: np.ndarray,
    centres: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    reach: float | None,
    n_threads: int,
    done: Callable[[float], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, int32 ``(n,)``, and squared distances, float32 ``(n,)``; see `_nearest.nearest`.

    `order` and `starts` list the points by their guess, as `_nearest.by_label` does. Once `done` answers
    true, the guess is the label of all points that are left.
    """
    n, k = len(points), len(centres)
    tiles = _tiles(centres)
    # A cluster costs about as much as a few of its points; the parts should be alike.
    cost = starts + 8 * np.arange(k + 1)
    parts = max(1, min(_PARTS, n // _A_PART))
    edges = np.searchsorted(cost, np.linspace(0, cost[-1], parts + 1))
    labels, result = np.empty(n, np.int32), np.empty(n, np.float32)
    limit = np.float32(reach or 0)
    dims = (0,) * points.shape[1]  # numba compiles for its length
    stop = np.zeros(1, np.bool_)

    def run(i: int) -> None:
        _search(
            points, order, starts, centres, tiles.ids, tiles.rows, tiles.columns, tiles.turned,
            tiles.boxes, tiles.outer, edges[i], edges[i + 1], limit, dims, labels, result, stop,
        )  # fmt: skip

    threads.side_by_side(run, parts, n_threads, done, stop)
    return labels, result


@dataclass(frozen=True)
class _Tiles:
    """Centres in a k-d order, in tiles that vector instructions read, with their bounding boxes."""

    ids: np.ndarray  # int32 (tiles * TILE,): the centre in each place; the last is repeated as padding
    rows: np.ndarray  # float32 (tiles * TILE, d)
    columns: np.ndarray  # float32 (tiles, d, TILE); padding is infinitely far away
    turned: np.ndarray  # float32 (K, d): the centres in the boxes' axes
    boxes: np.ndarray  # float32 (2, d, tiles): lower and upper corners
    outer: np.ndarray  # float32 (2, d, tiles / _BUNCH)


def _tiles(centres: np.ndarray) -> _Tiles:
    """Lay out the centres. The boxes stand in the axes of greatest variance, where they are tightest."""
    k, d = centres.shape
    axes = np.linalg.eigh(np.cov(centres, rowvar=False).reshape(d, d))[1][:, ::-1]
    turned = np.ascontiguousarray(centres @ axes.astype(np.float32))
    ids = cKDTree(turned, leafsize=TILE // 2 + 1).indices.astype(np.int32)
    padding = -k % (TILE * _BUNCH)
    ids = np.pad(ids, (0, padding), mode="edge")
    rows = centres[ids]
    columns = rows.copy()
    columns[k:] = np.inf
    corners = turned[ids].reshape(-1, TILE, d)
    boxes = np.stack([corners.min(1).T, corners.max(1).T])
    bunches = boxes.reshape(2, d, -1, _BUNCH)
    return _Tiles(
        ids,
        rows,
        np.ascontiguousarray(columns.reshape(-1, TILE, d).transpose(0, 2, 1)),
        turned,
        boxes,
        np.stack([bunches[0].min(2), bunches[1].max(2)]),
    )


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _search(
    points, order, starts, centres, ids, rows, columns, turned, boxes, outer,
    first, last, reach, dims, labels, errors, stop,
):  # fmt: skip
    """Search for the points of guesses `first` to `last`."""
    room = len(ids) + TILE
    place, sorted_place = np.empty(room, np.int32), np.empty(room, np.int32)
    distance = np.empty(room, np.float32)
    tiles = np.empty((room // TILE, len(dims), TILE), np.float32)
    halves = np.empty((room // TILE, TILE), np.float32)
    low = np.empty(room // TILE, np.float32)
    near, inside = np.empty(outer.shape[2], np.float32), np.empty(_BUNCH, np.float32)
    scratch = np.empty(TILE, np.float32)
    for j in range(first, last):
        cell = order[starts[j] : starts[j + 1]]
        if stop[0]:
            for row in cell:
                labels[row], errors[row] = j, square(points[row], centres[j], dims)
            continue
        if len(cell) == 0:
            continue
        largest, mean = _radii(points, cell, centres[j], dims)
        # Twice the radius, and a little more than float32 could lose on the way and in turning the axes.
        limit = np.float32(2.002) * np.sqrt(largest) if reach <= 0 else reach * np.sqrt(mean)
        limit += np.float32(4e-6) * np.sqrt(_dot(centres[j], centres[j], dims)) + np.float32(1e-15)
        limit *= limit
        n = _candidates(
            centres[j], turned[j], limit, columns, boxes, outer, dims, near, inside, scratch, place, distance
        )
        _sort(place, distance, n, limit, sorted_place, low)
        _scan(
            points, cell, j, centres[j], ids, rows, sorted_place, n, low, dims,
            tiles, halves, scratch, labels, errors,
        )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _dot(a, b, dims):
    total = np.float32(0)
    for k in range(len(dims)):
        total += a[k] * b[k]
    return total


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _radii(points, cell, centre, dims):
    """Return the largest and the mean squared distance of the points to their guess."""
    largest, total = np.float32(0), np.float32(0)
    for row in cell:
        distance = np.float32(0)
        for k in range(len(dims)):
            distance += (points[row, k] - centre[k]) ** 2
        largest = max(largest, distance)
        total += distance
    return largest, total / np.float32(len(cell))


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _candidates(centre, turned, limit, columns, boxes, outer, dims, near, inside, scratch, place, distance):
    """List the centres within `limit` (squared) of one: their places in the k-d order, and how far."""
    n = 0
    _to_boxes(turned, outer, 0, dims, near)
    for bunch in range(len(near)):
        if near[bunch] > limit:
            continue
        _to_boxes(turned, boxes, bunch * _BUNCH, dims, inside)
        for i in range(_BUNCH):
            if inside[i] <= limit:
                tile = bunch * _BUNCH + i
                n = _from_tile(centre, limit, columns[tile], tile * TILE, dims, scratch, place, distance, n)
    return n


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _to_boxes(turned, boxes, first, dims, result):
    """Write the squared distances of a point to the boxes from `first` on."""
    for i in range(len(result)):
        total = np.float32(0)
        for k in range(len(dims)):
            below, above = boxes[0, k, first + i] - turned[k], turned[k] - boxes[1, k, first + i]
            outside = max(max(below, above), np.float32(0))
            total += outside * outside
        result[i] = total


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _from_tile(centre, limit, columns, first, dims, scratch, place, distance, n):
    """Append the centres of one tile that are within the limit; return the new length."""
    hits = 0
    for c in range(TILE):
        total = np.float32(0)
        for k in range(len(dims)):
            difference = columns[k, c] - centre[k]
            total += difference * difference
        scratch[c] = total
    for c in range(TILE):
        hits += np.int32(scratch[c] <= limit)
    if hits > 0:
        for c in range(TILE):
            if scratch[c] <= limit:
                place[n], distance[n] = first + c, scratch[c]
                n += 1
    return n


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _sort(place, distance, n, limit, sorted_place, low):
    """Sort candidates into shells of distance; `low` bounds the distances in each tile of them."""
    ends = np.zeros(_SHELLS + 1, np.int32)
    scale = np.float32(_SHELLS) / limit
    for i in range(n):
        ends[min(_SHELLS - 1, int(distance[i] * scale)) + 1] += 1
    for shell in range(_SHELLS):
        ends[shell + 1] += ends[shell]
    for i in range(n):
        shell = min(_SHELLS - 1, int(distance[i] * scale))
        sorted_place[ends[shell]] = place[i]
        ends[shell] += 1
    shell = 0
    for tile in range((n + TILE - 1) // TILE):
        while ends[shell] <= tile * TILE:
            shell += 1
        low[tile] = np.sqrt(shell / scale) * np.float32(0.9995)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _fill(tile, centre, rows, sorted_place, n, dims, tiles, halves):
    """Copy one tile of candidates, seen from the guess: small differences of small numbers lose no digits."""
    for c in range(TILE):
        i = tile * TILE + c
        total = np.float32(0)
        for k in range(len(dims)):
            difference = rows[sorted_place[i], k] - centre[k] if i < n else np.float32(0)
            tiles[tile, k, c] = difference
            total += difference * difference
        halves[tile, c] = np.float32(0.5) * total if i < n else np.float32(np.inf)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _scan(
    points, cell, guess, centre, ids, rows, sorted_place, n, low, dims, tiles, halves, score, labels, errors
):
    """Find the nearest candidate c of each point x: the least |c|²/2 - xc, both seen from the guess."""
    x = np.empty(len(dims), np.float32)
    filled = 0
    for row in cell:
        for k in range(len(dims)):
            x[k] = points[row, k] - centre[k]
        length = _dot(x, x, dims)
        radius = np.sqrt(length) * np.float32(1.0005)
        best, where, limit = np.float32(0), -1, 2 * radius
        for tile in range((n + TILE - 1) // TILE):
            if low[tile] > limit:
                break
            if tile == filled:
                _fill(tile, centre, rows, sorted_place, n, dims, tiles, halves)
                filled += 1
            least, at = scanned(x, tiles, halves, tile, score, dims, best, where)
            if least < best:
                best, where = least, at
                limit = radius + np.sqrt(max(length + 2 * best, np.float32(0))) * np.float32(1.0005)
        distance = max(length + 2 * best, np.float32(0))
        if distance < np.float32(0.125) * length:  # far nearer than the guess: the sums above lost its digits
            distance, where = _rescan(points[row], radius, rows, sorted_place, n, low, dims)
        labels[row] = ids[sorted_place[where]] if where >= 0 else guess
        errors[row] = distance


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _rescan(point, radius, rows, sorted_place, n, low, dims):
    """Find the nearest candidate by plain differences; return its squared distance and where it is listed."""
    best, where, limit = np.float32(np.inf), -1, 2 * radius
    for tile in range((n + TILE - 1) // TILE):
        if low[tile] > limit:
            break
        for i in range(tile * TILE, min(n, (tile + 1) * TILE)):
            distance = square(point, rows[sorted_place[i]], dims)
            if distance < best:
                best, where = distance, i
        limit = min(limit, radius + np.sqrt(best) * np.float32(1.0005))
    return best, where
