"""Ward's merges of weighted points, in order of what they cost: a clustering for every K (numba)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans._inner_loops import TILE


@dataclass(frozen=True)
class Merges:
    """A binary tree over L leaves.

    Attributes
    ----------
    pairs : numpy.ndarray
        int64 ``(L - 1, 2)``: the two nodes that a merge joins. Leaves are nodes 0 to L - 1, and merge t makes
        node L + t; a node is made before it is joined to another.
    heights : numpy.ndarray
        float64 ``(L - 1,)``: how much each merge raises the inertia; at least as much as those of its nodes.
    """

    pairs: np.ndarray
    heights: np.ndarray

    def cut(self, k: int) -> np.ndarray:
        """Return the cluster of each leaf once the cheapest merges leave K clusters, int32 ``(L,)``."""
        return cut(self.pairs, self.heights, k)


def merges(points: np.ndarray, mass: np.ndarray, done: Callable[[float], object] | None = None) -> Merges:
    """Merge the pair of clusters that raises the inertia least, again and again (Ward 1963).

    By nearest-neighbour chains (Murtagh 1983, *A survey of recent advances in hierarchical clustering
    algorithms*): L² steps and L memory for L points, for distances are computed from centres when needed.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(L, d)``.
    mass : numpy.ndarray
        float32 ``(L,)``, at least 0. Points without any are merged first.
    done : callable, optional
        Called now and then; once it answers true, what is left is merged in any order.
    """
    stop, dims = np.zeros(1, np.bool_), (0,) * points.shape[1]
    (found,) = threads.side_by_side(lambda _: chained(points, mass, dims, stop), 1, 1, done, stop)
    return Merges(*found)


@njit(nogil=True, cache=True)
def cut(pairs, heights, k):
    """Return what `Merges.cut` does."""
    n = len(pairs) + 1
    made = np.zeros(len(pairs), np.bool_)
    made[np.argsort(heights, kind="mergesort")[: n - k]] = True  # stable: a node before what it is joined to
    cluster, count = np.full(2 * n - 1, -1, np.int32), 0
    for node in range(2 * n - 2, -1, -1):
        if node >= n and not made[node - n]:
            continue
        if cluster[node] < 0:
            cluster[node], count = count, count + 1
        if node >= n:
            for child in pairs[node - n]:
                cluster[child] = cluster[node]
    return cluster[:n]


@njit(nogil=True, cache=True)
def _counted(mass):
    """Return masses above 0, at most 1: those without any have a millionth of the least."""
    largest, least = np.float32(0), np.float32(np.inf)
    for value in mass:
        largest = max(largest, value)
        if value > 0:
            least = min(least, value)
    if largest == 0:
        return np.ones(len(mass), np.float64)
    floor = max(1e-6 * np.float64(least) / largest, 1e-30)
    return np.maximum(mass.astype(np.float64) / largest, floor)


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def chained(points, mass, dims, stop):
    """Return what `Merges` holds.

    Clusters at hand lie in the first places of `tiles`; the last one takes the place of one that is merged.
    A chain goes on only to a nearer neighbour than the one it came from, so it ends whatever rounding does.
    """
    n, mass = len(points), _counted(mass)
    tiles = np.full(((n + TILE - 1) // TILE, len(dims), TILE), np.float32(np.inf), np.float32)
    weight = np.ones((len(tiles), TILE), np.float32)
    centres, masses = np.empty((2 * n, len(dims)), np.float64), np.empty(2 * n, np.float64)
    node, place = np.arange(n), np.arange(2 * n)
    for i in range(n):
        masses[i] = mass[i]
        for a in range(len(dims)):
            centres[i, a] = points[i, a]
        _put(i, i, centres, masses, tiles, weight, dims)
    pairs, heights = np.empty((n - 1, 2), np.int64), np.empty(n - 1, np.float64)
    chain, steps = np.empty(n + 1, np.int64), np.empty(n + 1, np.float32)
    x, score = np.empty(len(dims), np.float32), np.empty(TILE, np.float32)
    length, left, made = 0, n, 0
    while left > 1:
        if length == 0:
            chain[0], steps[0], length = node[0], np.float32(np.inf), 1
        if stop[0] and length == 1:
            chain[1], steps[1], length = node[1 if place[chain[0]] == 0 else 0], np.float32(0), 2
        top = chain[length - 1]
        before = place[chain[length - 2]] if length > 1 else -1
        where, least = before, np.float32(0)
        if not stop[0]:
            where, least = _neighbour(
                place[top], before, steps[length - 1], left, tiles, weight, x, score, dims
            )
        if where != before:
            chain[length], steps[length] = node[where], least
            length += 1
            continue
        other, new = chain[length - 2], n + made
        length -= 2
        pairs[made, 0], pairs[made, 1] = other, top
        masses[new] = masses[other] + masses[top]
        square = 0.0
        for a in range(len(dims)):
            square += (centres[other, a] - centres[top, a]) ** 2
            centres[new, a] = (masses[other] * centres[other, a] + masses[top] * centres[top, a]) / masses[
                new
            ]
        heights[made] = masses[other] * masses[top] / masses[new] * square
        for child in pairs[made]:  # what rounding made lower
            if child >= n:
                heights[made] = max(heights[made], heights[child - n])
        made += 1
        left -= 1
        here, gone = place[other], place[top]
        node[here], place[new] = new, here
        _put(here, new, centres, masses, tiles, weight, dims)
        if gone != left:
            node[gone], place[node[left]] = node[left], gone
            _put(gone, node[left], centres, masses, tiles, weight, dims)
        tiles[left // TILE, 0, left % TILE] = np.float32(np.inf)
    return pairs, heights


@njit(nogil=True, cache=True)
def _put(at, node, centres, masses, tiles, weight, dims):
    """Write a cluster into its place."""
    weight[at // TILE, at % TILE] = masses[node]
    for a in range(len(dims)):
        tiles[at // TILE, a, at % TILE] = centres[node, a]


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _neighbour(at, before, limit, left, tiles, weight, x, score, dims):
    """Return the place of the cluster that costs least to merge, if it is less than `limit`, and its cost.

    Otherwise the place before. At the start of a chain any neighbour is near enough.
    """
    tile_at, c_at = at // TILE, at % TILE
    for a in range(len(dims)):
        x[a] = tiles[tile_at, a, c_at]
    own = weight[tile_at, c_at]
    tiles[tile_at, 0, c_at] = np.float32(np.inf)
    where, least = before, limit
    for tile in range((left + TILE - 1) // TILE):
        hits = 0
        for c in range(TILE):
            total = np.float32(0)
            for a in range(len(dims)):
                difference = x[a] - tiles[tile, a, c]
                total += difference * difference
            score[c] = total * (own * weight[tile, c] / (own + weight[tile, c]))
        for c in range(TILE):
            hits += np.int32(score[c] < least)
        if hits > 0:
            for c in range(TILE):
                if score[c] < least:
                    least, where = score[c], tile * TILE + c
    tiles[tile_at, 0, c_at] = x[0]
    return where, least
