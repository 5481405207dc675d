"""Exact nearest neighbours among millions of small points, also up to symmetries, by a k-d tree (numba)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from kclib._util import checks, threads
from kclib._util.compiled import njit
from kclib.errors import InvalidValueError

_LEAF = 32  # points that one loop of vector instructions looks at
_FAN = 16  # boxes that one loop looks at: children of a node
_PART = 1024  # queries a piece of work
_EXPONENT = 50  # coordinates are scaled to below 2**50, so that squares neither overflow nor vanish
_FAR = np.finfo(np.float32).max


@dataclass(frozen=True)
class Neighbours:
    """The k nearest points of each query.

    Attributes
    ----------
    indices : numpy.ndarray
        int32 ``(m, k)``: rows of the points, nearest first; of equally near ones the smaller row.
    squared : numpy.ndarray
        float32 ``(m, k)``: squared Euclidean distances.
    """

    indices: np.ndarray
    squared: np.ndarray


def nearest(
    points: np.ndarray,
    *,
    k: int = 1,
    queries: np.ndarray | None = None,
    turns: np.ndarray | None = None,
    signs: np.ndarray | None = None,
    n_threads: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> Neighbours:
    """Return the k nearest points of each query, exact to float32 rounding.

    The distance of query q and point p is the least of ``||signs[i] * q[turns[i]] - p||`` over i, plain
    Euclidean by default. Distances are sums of squared differences, so those of close pairs lose no digits.

    A k-d tree (Friedman, Bentley and Finkel 1977, *An algorithm for finding best matches in logarithmic
    expected time*) is searched from a query's leaf up. It stands in the points' principal axes, where boxes
    are tightest; what rounding may lose on the way there is added to the bound.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``, finite.
    k : int
        Neighbours of each query: 1 to n - 1, or to n with queries.
    queries : numpy.ndarray, optional
        float32 ``(m, d)``, finite. By default the points are the queries, and none is its own neighbour.
    turns : numpy.ndarray, optional
        int64 ``(t, d)``: permutations of the coordinates, e.g. `symmetric.transforms`; default: none turns.
    signs : numpy.ndarray, optional
        float32 ``(t,)``: 1 or -1; default: ones.
    n_threads, progress
        As `n_threads` and `done` of `nearest.nearest`. The result is the same for any number of threads.

    Raises
    ------
    InvalidValueError
        Points or queries that are no finite ``(n, d)`` numbers, or of different widths; k out of range;
        turns or signs of a wrong shape, or other than permutations and ±1.
    """
    points = checks.points("points", points)
    asked = points if queries is None else checks.points("queries", queries, points.shape[1])
    most = len(points) - (queries is None)
    k = checks.check_whole("k", k, 1, most)
    turns, signs = _orbit(turns, signs, points.shape[1])
    shift = _EXPONENT - int(np.frexp(max(np.abs(points).max(), np.abs(asked).max(initial=0)))[1])
    tree = _Tree.of(np.ldexp(points, shift))
    slots = np.flatnonzero(tree.rows >= 0) if queries is None else np.full(len(asked), -1)
    order = tree.rows[slots]
    if queries is not None:  # one after the other they look at the same boxes, if in a k-d order as well
        order = cKDTree(tree.turned(np.ldexp(asked, shift)), leafsize=_LEAF).indices.astype(np.int32)
    indices, squared = np.empty((len(asked), k), np.int32), np.empty((len(asked), k), np.float32)
    parts = np.array_split(np.arange(len(order)), max(1, -(-len(order) // _PART)))

    def run(i: int) -> None:
        queries = order[parts[i]]
        images = signs[:, None] * np.ldexp(asked[queries], shift)[:, turns]
        turned = tree.turned(images)
        slack = np.float32(3e-7) * np.linalg.norm(turned, axis=-1)
        _search(
            images, turned, slack, slots[parts[i]], queries, tree.rows, tree.columns, tree.boxes, tree.least,
            (0,) * points.shape[1], indices, squared,
        )  # fmt: skip

    threads.side_by_side(run, len(parts), threads.threads(n_threads), progress)
    with np.errstate(over="ignore", under="ignore"):  # infinite or 0 is what float32 makes of such squares
        return Neighbours(indices, np.ldexp(squared, -2 * shift))


def _orbit(turns, signs, width: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(turns) if turns is not None else 1 if signs is None else np.size(signs)
    plain = np.tile(np.arange(width), (count, 1))
    turns = plain if turns is None else np.asarray(turns)
    signs = np.ones(count, np.float32) if signs is None else np.asarray(signs, np.float32)
    if not count or not np.array_equal(np.sort(turns), plain):
        raise InvalidValueError(f"turns must be permutations of {width} coordinates, one row each.")
    if signs.shape != (count,) or not (np.abs(signs) == 1).all():
        raise InvalidValueError(f"signs must be 1 or -1, one for each of {count} turns.")
    return turns, signs


@dataclass(frozen=True)
class _Tree:
    """Points in a k-d order, in leaves that vector instructions read, under nodes of `_FAN` children each.

    Nodes are numbered from the leaves up, each level padded to whole nodes with boxes infinitely far away.
    So node ``leaves + g`` has the children ``_FAN * g`` to ``_FAN * g + _FAN - 1``, and the last is the root.
    """

    rows: np.ndarray  # int32 (leaves * _LEAF,): the point in each slot; -1 is padding
    columns: np.ndarray  # float32 (leaves, d, _LEAF); padding is infinitely far away
    boxes: np.ndarray  # float32 (nodes, 2, d, _FAN): lower and upper corners of the children
    least: np.ndarray  # int32 (leaves + nodes,): the smallest row in each
    middle: np.ndarray  # float64 (d,)
    axes: np.ndarray  # float64 (d, d): principal axes, one a column

    @classmethod
    def of(cls, points: np.ndarray) -> "_Tree":
        middle = points.mean(0, dtype=np.float64)
        seen = points - middle
        axes = np.linalg.eigh(seen.T @ seen)[1]
        turned = (seen @ axes).astype(np.float32)
        sizes = np.array([len(points)])
        while sizes[-1] > _LEAF:  # as a balanced k-d tree of scipy's cuts them
            sizes = np.stack([sizes // 2, sizes - sizes // 2], axis=1).ravel()
        order = cKDTree(turned, leafsize=int(sizes[-1])).indices.astype(np.int32)
        rows = np.full((len(sizes) + -len(sizes) % _FAN, _LEAF), -1, np.int32)
        rows[: len(sizes)][np.arange(_LEAF) < sizes[:, None]] = order
        columns = np.where(rows[..., None] < 0, np.float32(np.inf), points[rows])
        columns = np.ascontiguousarray(columns.transpose(0, 2, 1))
        starts = np.cumsum(sizes) - sizes
        corners = np.minimum.reduceat(np.stack([turned, -turned], axis=1)[order], starts)
        corners = _levels(corners, np.inf) * np.array([[1], [-1]], np.float32)  # maxima, by negatives
        boxes = np.ascontiguousarray(corners.reshape(-1, _FAN, *corners.shape[1:]).transpose(0, 2, 3, 1))
        least = _levels(np.minimum.reduceat(order, starts), np.iinfo(np.int32).max)
        return cls(rows.ravel(), columns, boxes, least, middle, axes)

    def turned(self, points: np.ndarray) -> np.ndarray:
        """Return points ``(..., d)`` in the boxes' axes, float32."""
        return ((points - self.middle) @ self.axes).astype(np.float32)


def _levels(values: np.ndarray, fill: float) -> np.ndarray:
    """Return values, then the minima of every `_FAN` of them, and so on until `_FAN` are left."""
    padding = np.full((-len(values) % _FAN, *values.shape[1:]), fill, values.dtype)
    values = np.concatenate([values, padding])
    if len(values) == _FAN:
        return values
    return np.concatenate([values, _levels(values.reshape(-1, _FAN, *values.shape[1:]).min(1), fill)])


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _search(images, turned, slack, slots, order, rows, columns, boxes, least, dims, indices, squared):
    """Write the neighbours of the queries `order`, of which `images` are the orbits."""
    stack = np.empty(_FAN * _FAN, np.int32)
    x, q = np.empty(len(dims), np.float32), np.empty(len(dims), np.float32)
    nearest, distance = np.empty(indices.shape[1], np.int32), np.empty(indices.shape[1], np.float32)
    scratch, several = np.empty(_LEAF, np.float32), images.shape[1] > 1
    leaves, root = len(columns), len(columns) + len(boxes) - 1
    for i in range(len(order)):
        nearest[:], distance[:] = np.iinfo(np.int32).max, _FAR
        for t in range(images.shape[1]):
            for k in range(len(dims)):
                x[k], q[k] = images[i, t, k], turned[i, t, k]
            limit = _limit(distance[-1], slack[i, t], dims)
            done = slots[i] // _LEAF if slots[i] >= 0 and t == 0 else _descend(q, boxes, leaves, dims)
            stack[0], top = done, 1
            while True:
                while top > 0:
                    top -= 1
                    node = stack[top]
                    # A point at distance 0 displaces another one only if its row is smaller.
                    if distance[-1] == 0 and least[node] > nearest[-1]:
                        continue
                    if node >= leaves:
                        top = _open(q, node - leaves, _FAN, boxes, limit, dims, stack, top)
                    elif _reached(x, node, columns, distance[-1], dims):
                        _keep(x, node, columns, rows, slots[i], several, dims, scratch, nearest, distance)
                        limit = _limit(distance[-1], slack[i, t], dims)
                if done == root:
                    break
                top = _open(q, done // _FAN, done % _FAN, boxes, limit, dims, stack, 0)
                done = leaves + done // _FAN
        indices[order[i]], squared[order[i]] = nearest, distance


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _limit(worst, slack, dims):
    """Return the square of a distance, longer by what turning both ends and adding up could have lost."""
    reach = np.sqrt(worst) * np.float32(1 + 2.4e-7 * (len(dims) + 4)) + slack
    return min(reach * reach, np.float32(_FAR))


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _to_box(x, boxes, node, c, dims):
    total = np.float32(0)
    for k in range(len(dims)):
        outside = x[k] - min(max(x[k], boxes[node, 0, k, c]), boxes[node, 1, k, c])
        total += outside * outside
    return total


# Added up in one order everywhere, so that equal distances are equal.
@njit(nogil=True, cache=True, fastmath=threads.FAST - {"reassoc"})
def _to_point(x, columns, leaf, c, dims):
    total = np.float32(0)
    for k in range(len(dims)):
        difference = columns[leaf, k, c] - x[k]
        total += difference * difference
    return total


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _descend(x, boxes, leaves, dims):
    """Return a leaf near a point: from the root on, the nearest child."""
    node = leaves + len(boxes) - 1
    while node >= leaves:
        least, child = np.float32(np.inf), 0
        for c in range(_FAN):
            distance = _to_box(x, boxes, node - leaves, c, dims)
            if distance < least:
                least, child = distance, c
        node = (node - leaves) * _FAN + child
    return node


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _open(x, node, but, boxes, limit, dims, stack, top):
    """Put a node's children within the limit on the stack, all but one; return its height."""
    near = np.int32(0)
    for c in range(_FAN):
        # int32 throughout, and no array written: so that vector instructions are wide and need no checks
        near = np.int32(near | np.int32((1 << c) * (_to_box(x, boxes, node, c, dims) <= limit)))
    near &= ~(1 << but)
    if near > 0:
        for c in range(_FAN - 1, -1, -1):  # the first ends on top: of equal points it has the smaller rows
            stack[top] = node * _FAN + c
            top += (near >> c) & 1
    return top


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _reached(x, leaf, columns, worst, dims):
    reached = False  # no number, and apart from `_keep`: so twice as fast
    for c in range(_LEAF):
        reached |= _to_point(x, columns, leaf, c, dims) <= worst
    return reached


@njit(nogil=True, cache=True, fastmath=threads.FAST)
def _keep(x, leaf, columns, rows, itself, several, dims, scratch, nearest, distance):
    """Sort the points of a leaf that are near enough into a query's neighbours, all but its own."""
    for c in range(_LEAF):
        scratch[c] = _to_point(x, columns, leaf, c, dims)
    for c in range(_LEAF):
        near, slot = scratch[c], leaf * _LEAF + c
        if near > distance[-1] or slot == itself:
            continue
        row, j = rows[slot], len(nearest) - 1
        if several:  # another image may have found it
            for other in range(j):
                if nearest[other] == row:
                    j = other
                    break
        if near > distance[j] or (near == distance[j] and row >= nearest[j]):
            continue
        while j > 0 and (near < distance[j - 1] or (near == distance[j - 1] and row < nearest[j - 1])):
            nearest[j], distance[j] = nearest[j - 1], distance[j - 1]
            j -= 1
        nearest[j], distance[j] = row, near
