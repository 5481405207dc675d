"""Two-dimensional maps of kernels (UMAP): neighbours and layouts, found once and kept in the store."""

import functools
import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn import manifold, metrics
from threadpoolctl import threadpool_limits

from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.errors import InvalidValueError
from kclib.similarity import _neighbours
from kclib.similarity import distances as similarity_distances
from kclib.store import Entry, Store

# What is compared, by the name of a map: the kernels, their shapes, or the kernels up to flips and rotations.
_named_maps = {"raw": "euclidean", "unit": "cosine", "symmetric": "symmetric"}
_FEWEST = 5  # kernels that UMAP can lay out
_BLOCK = 1 << 15  # kernels placed at a time; below ten thousand, UMAP takes thrice the rounds


@dataclass(frozen=True)
class Graph:
    """Kernels and their exact nearest neighbours: what every layout of them starts from.

    Attributes
    ----------
    kind : str
        One of `named_maps`.
    points : numpy.ndarray
        float32 ``(n, d)``: the kernels as they are compared.
    indices : numpy.ndarray
        int32 ``(n, k)``: each kernel itself, then its nearest neighbours; ties go to the first.
    distances : numpy.ndarray
        float32 ``(n, k)``.
    unit : float
        The unit of points and distances, a power of two; 1 except for very large or very small kernels.
    """

    kind: str
    points: np.ndarray
    indices: np.ndarray
    distances: np.ndarray
    unit: float = 1.0


def graph(
    points: np.ndarray, *, kind: str = "unit", n_neighbors: int = 15, store: Store | None = None
) -> Graph:
    """Find the nearest neighbours of kernels, as many as the widest layout will ask for.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``.
    kind : {"raw", "unit", "symmetric"}
        Compare kernels as they are, scaled to length 1, or as they are up to flips and rotations. Kernels of
        zeros have no shape and lie at the centre of a ``unit`` map's points.
    n_neighbors : int
        Neighbours, each kernel itself counted as one (as UMAP does), 2 to n; 1 for a kernel alone.
    store : Store, optional
        The default store if None.

    Raises
    ------
    UnknownNameError, InvalidValueError
        `n_neighbors` below 2 or above n; no kernels; kernels to be turned that are not square.
    """
    checks.check_known("kind of map", kind, _named_maps)
    points = checks.points("the kernels", points)
    n_neighbors = checks.check_whole("n_neighbors", n_neighbors, min(2, len(points)), len(points))
    store, named = store or Store(), similarity_distances.named(_named_maps[kind])
    prepared, unit = similarity_distances.framed(np.ascontiguousarray(named.prepare(points)))
    itself = np.arange(len(prepared), dtype=np.int32)[:, None]
    if n_neighbors == 1:
        return Graph(kind, prepared, itself, np.zeros((1, 1), np.float32), unit)
    key = {"kind": "neighbours", "points": _hash(prepared), "map": kind, "n_neighbors": n_neighbors}

    def compute() -> Entry:
        turns, signs = named.orbit(prepared.shape[1])
        neighbours = _neighbours.nearest(prepared, k=n_neighbors - 1, turns=turns, signs=signs)
        arrays = {
            "indices": np.hstack([itself, neighbours.indices]),
            "distances": np.hstack([np.zeros_like(itself, np.float32), np.sqrt(neighbours.squared)]),
        }
        return Entry(key, {"n": len(prepared)}, arrays)

    entry = store.once(key, compute)
    return Graph(kind, prepared, entry.arrays["indices"], entry.arrays["distances"], unit)


def layout(
    graph: Graph,
    *,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
    store: Store | None = None,
) -> np.ndarray:
    """Return a UMAP embedding (McInnes, Healy, Melville 2018) of a graph's kernels, float32 ``(n, 2)``.

    Fitted on one thread, for a seed's sake, and kept in `store` (the default store if None). Coordinates
    differ between machines; neighbourhoods do not. Fewer than five kernels, which UMAP cannot lay out, lie as
    far apart as two dimensions allow (classical scaling: Torgerson 1952, *Multidimensional Scaling: I. Theory
    and Method*).

    Parameters
    ----------
    graph : Graph
    n_neighbors : int
        How many of the graph's neighbours shape the map, 2 to all (UMAP takes at most n - 1); more show
        coarser structure.
    min_dist : float
        How close points may lie, 0 to 1.
    seed : int
    store : Store, optional
    """
    _check_settings(graph, n_neighbors, min_dist, seed)
    if len(graph.points) < _FEWEST:
        return _scaled(graph)
    store, nearest = store or Store(), _nearest(graph, n_neighbors)
    key = {
        "kind": "layout",
        "graph": [_hash(x) for x in (graph.points, *nearest)],
        "n_neighbors": n_neighbors,
        "min_dist": min_dist,
        "seed": seed,
    }
    if (start := _start(graph)) != "spectral":
        key["start"] = start

    def compute() -> Entry:
        placed = _fitted(graph, n_neighbors, min_dist, seed).embedding_.astype(np.float32)
        return Entry(key, {"n": len(placed)}, {"layout": placed})

    return store.once(key, compute).arrays["layout"]


def placed(
    graph: Graph, others: np.ndarray, *, n_neighbors: int = 15, min_dist: float = 0.1, seed: int = 0
) -> np.ndarray:
    """Return where other kernels fall on a map of `graph`, float32 ``(m, 2)``, by UMAP's `transform`.

    Parameters
    ----------
    graph : Graph
        Of kind ``raw`` or ``unit``.
    others : numpy.ndarray
        float32 ``(m, d)``: any number of kernels, taken in blocks.
    n_neighbors, min_dist, seed
        As in `layout`.

    Raises
    ------
    InvalidValueError
        A symmetric graph: UMAP's search does not turn kernels; one of fewer than five.
    """
    if graph.kind == "symmetric":
        raise InvalidValueError("UMAP can place kernels on a raw or a unit map, not on a symmetric one.")
    _check_settings(graph, n_neighbors, min_dist, seed)
    if len(graph.points) < _FEWEST:
        raise InvalidValueError(
            f"the map has {len(graph.points)} kernels; UMAP places others on one of at least {_FEWEST}."
        )
    others = checks.points("the kernels", others, graph.points.shape[1])
    import pynndescent

    index = pynndescent.NNDescent(graph.points, n_neighbors=n_neighbors, random_state=seed, n_jobs=1)
    model = _fitted(graph, n_neighbors, min_dist, seed, index)
    prepare, result = (
        similarity_distances.named(_named_maps[graph.kind]).prepare,
        np.empty((len(others), 2), np.float32),
    )
    parts = np.array_split(np.arange(len(others)), max(1, len(others) // _BLOCK)) if len(others) else ()
    with tqdm(total=len(others), desc="placing", unit="kernel", unit_scale=True, delay=2, leave=False) as bar:
        for rows in parts:
            prepared = (prepare(others[rows]) / graph.unit).astype(np.float32)
            result[rows] = model.transform(np.ascontiguousarray(prepared))
            bar.update(len(rows))
    return result


def trustworthiness(graph: Graph, layout: np.ndarray, *, limit: int = 2000, seed: int = 0) -> float:
    """Return how far neighbours on the map are neighbours in kernel space, 0 to 1.

    Venna and Kaski 2001, over 15 neighbours (fewer than half the points where those are few), in the graph's
    own distance, on at most `limit` points drawn at random (its cost in memory grows with their square).
    Fewer than three points have no wrong neighbours: 1.
    """
    limit = checks.check_whole("limit", limit, 4)
    layout = checks.points("places on the map", layout, 2)
    if len(layout) != len(graph.points):
        raise InvalidValueError(
            f"the map has {len(layout)} places; the graph has {len(graph.points)} kernels."
        )
    if len(layout) < 3:
        return 1.0
    chosen = np.random.default_rng(seed).permutation(len(layout))[:limit]
    points = graph.points[chosen]
    turns, signs = similarity_distances.named(_named_maps[graph.kind]).orbit(points.shape[1])
    turned = (sign * points[:, turn] for turn, sign in zip(turns, signs, strict=True))
    apart = functools.reduce(np.minimum, (metrics.pairwise_distances(points, others) for others in turned))
    apart = np.minimum(apart, apart.T)  # rounding may tell the two directions apart
    n_neighbors = min(15, (len(chosen) - 1) // 2)
    return float(
        manifold.trustworthiness(apart, layout[chosen], n_neighbors=n_neighbors, metric="precomputed")
    )


def _check_settings(graph: Graph, n_neighbors: int, min_dist: float, seed: int) -> None:
    most = graph.indices.shape[1]
    checks.check_whole("n_neighbors", n_neighbors, min(2, most), most)
    checks.check_real("min_dist", min_dist, lambda x: 0 <= x <= 1, "from 0 to 1")
    checks.check_seed(seed)


def _fitted(graph: Graph, n_neighbors: int, min_dist: float, seed: int, *index):
    """Return a UMAP model that took its neighbours from the graph; with their index it can place others."""
    import umap  # takes many seconds to import, so only where a fit is needed

    nearest = _nearest(graph, n_neighbors)
    model = umap.UMAP(
        n_neighbors=nearest[0].shape[1], min_dist=min_dist, random_state=seed, n_jobs=1, init=_start(graph),
        precomputed_knn=(*nearest, *index), tqdm_kwds={"desc": "UMAP", "leave": False}, verbose=False,
    )  # fmt: skip
    with threadpool_limits(1), warnings.catch_warnings():
        # that without an index it cannot place others, that few are few, and that it starts elsewhere
        warnings.filterwarnings("ignore", "precomputed_knn|Spectral initialisation failed")
        return model.fit(graph.points)


def _start(graph: Graph) -> str:
    """Return where UMAP starts: among equal kernels, eigenvectors are drawn anew each time (by ARPACK)."""
    if graph.distances[:, 1].all():
        return "spectral"
    return "pca" if (graph.points != graph.points[0]).any() else "random"


def _scaled(graph: Graph) -> np.ndarray:
    """Return places ``(n, 2)`` of few kernels that keep their distances as well as a plane can."""
    n = len(graph.points)
    apart = np.zeros((n, n))
    np.put_along_axis(apart, graph.indices.astype(int), np.square(graph.distances, dtype=float), axis=1)
    apart = np.maximum(apart, apart.T)  # where fewer neighbours than kernels were asked for
    middle = np.eye(n) - 1 / n
    values, axes = np.linalg.eigh(middle @ apart @ middle / -2)
    places = np.zeros((n, 2), np.float32)
    for i, place in enumerate(np.argsort(-values)[:2]):
        axis = axes[:, place] * np.sign(axes[np.abs(axes[:, place]).argmax(), place])
        places[:, i] = axis * np.sqrt(max(values[place], 0))
    return places


def _nearest(graph: Graph, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    n_neighbors = min(n_neighbors, len(graph.points) - 1)
    return graph.indices[:, :n_neighbors].copy(), graph.distances[:, :n_neighbors].copy()


def _hash(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
