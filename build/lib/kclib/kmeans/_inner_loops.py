"""The innermost loops of searches, for numba to put into each of them."""

import numpy as np

from kclib._util import threads
from kclib._util.compiled import njit

TILE = 64  # centres that one loop of vector instructions looks at


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def square(a, b, dims):
    """Return the squared distance of two points; numba compiles for the length of `dims`."""
    total = np.float32(0)
    for k in range(len(dims)):
        difference = a[k] - b[k]
        total += difference * difference
    return total


@njit(inline="always")  # a call a tile would cost half as much again as the scan
def scanned(x, tiles, halves, tile, score, dims, best, where):
    """Return the least |c|²/2 - xc and its place, of the centres c of one tile and what was found before.

    `tiles`, ``(tiles, d, TILE)``, has a centre in each column, `halves` their |c|²/2; `score` is room for a
    tile. Arrays are given whole, for cutting one takes time too.
    """
    hits = 0
    for c in range(TILE):
        value = halves[tile, c]
        for k in range(len(dims)):
            value -= x[k] * tiles[tile, k, c]
        score[c] = value
    for c in range(TILE):
        hits += np.int32(score[c] < best)
    if hits > 0:
        for c in range(TILE):
            if score[c] < best:
                best, where = score[c], tile * TILE + c
    return best, where
