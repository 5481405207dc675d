"""Ward's merges of weighted points, in order of what they cost: a clustering for every K (numba)."""

from dataclasses import dataclass

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit
from kclib.kmeans._inner_loops import TILE


@dataclass(frozen=True)
class Merges:
    """A binary tree over L leaves; the first merge costs the least.

    Attributes
    ----------
    pairs : numpy.ndarray
        int32 ``(L - 1, 2)``: the two nodes that a merge joins. Leaves are nodes 0 to L - 1, and merge t makes
        node L + t, as in `scipy.cluster.hierarchy.linkage`.
    heights : numpy.ndarray
        float64 ``(L - 1,)``, ascending: how much each merge raises the inertia.
    """

    pairs: np.ndarray
    heights: np.ndarray

    def cut(self, k: int) -> np.ndarray:
        """Return the cluster of each leaf once K clusters are left, int32 ``(L,)``."""
        return _cut(self.pairs, k)


def merges(points: np.ndarray, mass: np.ndarray) -> Merges:
    """Merge the pair of clusters that raises the inertia least, again and again (Ward 1963).

    By nearest-neighbour chains (Murtagh 1983, *A survey of recent advances in hierarchical clustering
    algorithms*): L² steps and memory for L points, for distances are computed from centres when needed.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(L, d)``.
    mass : numpy.ndarray
        ``(L,)``, at least 0, not all 0. Points without any are merged first.
    """
    mass = np.asarray(mass, np.float64) / mass.max()
    mass = np.maximum(mass, max(1e-6 * mass[mass > 0].min(), 1e-30))
    pairs, heights = _chained(points, mass, (0,) * points.shape[1])
    return _sorted(pairs, heights)


def _sorted(pairs: np.ndarray, heights: np.ndarray) -> Merges:
    """Return merges in order of their heights; nodes are numbered anew."""
    n_leaves = len(pairs) + 1
    order = np.argsort(_rising(pairs, heights), kind="stable")  # a child is made before its parent
    number = np.arange(2 * n_leaves - 1)
    number[n_leaves + order] = np.arange(n_leaves, 2 * n_leaves - 1)
    return Merges(np.sort(number[pairs[order]], axis=1).astype(np.int32), heights[order])


@njit(nogil=True, cache=True)
def _rising(pairs, heights):
    """Raise heights to those of the children where rounding made them lower; return them."""
    n_leaves = len(pairs) + 1
    for t in range(len(pairs)):
        for child in pairs[t]:
            if child >= n_leaves:
                heights[t] = max(heights[t], heights[child - n_leaves])
    return heights


@njit(nogil=True, cache=True)
def _cut(pairs, k):
    n_leaves = len(pairs) + 1
    made = n_leaves - k
    cluster = np.full(n_leaves + max(made, 0), -1, np.int32)
    count = 0
    for node in range(n_leaves + made - 1, n_leaves - 1, -1):
        if cluster[node] < 0:
            cluster[node], count = count, count + 1
        for child in pairs[node - n_leaves]:
            cluster[child] = cluster[node]
    for leaf in range(n_leaves):
        if cluster[leaf] < 0:
            cluster[leaf], count = count, count + 1
    return cluster[:n_leaves]


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _chained(points, mass, dims):
    """Return merges in the order in which chains find them.

    Clusters at hand lie in the first places of `tiles`; the last one takes the place of one that is merged.
    A chain goes on only to a nearer neighbour than the one it came from, so it ends whatever rounding does.
    """
    n = len(points)
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
        top = chain[length - 1]
        before = place[chain[length - 2]] if length > 1 else -1
        where, least = _neighbour(place[top], before, steps[length - 1], left, tiles, weight, x, score, dims)
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
