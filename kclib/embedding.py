"""Two-dimensional maps of kernels (UMAP), fitted once and kept in the store."""

import hashlib

import numpy as np
from sklearn import manifold

from kclib.store import Entry, Store


def unit(points: np.ndarray) -> np.ndarray:
    """Return `points` ``(n, d)`` scaled to length 1; all-zero rows stay zero."""
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(length > 0, length, 1)


def layout(
    points: np.ndarray,
    *,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
    store: Store | None = None,
) -> np.ndarray:
    """Return a UMAP embedding (McInnes, Healy, Melville 2018) of `points` ``(n, d)``, float32 ``(n, 2)``.

    Euclidean distances; pass `unit` points to compare shapes. Fitted on one thread, for a seed's sake,
    and kept in `store` (the default store if None). Coordinates differ between machines; neighbourhoods
    do not.
    """
    store = store or Store()
    key = {
        "umap": hashlib.sha256(np.ascontiguousarray(points)).hexdigest(),
        "shape": list(points.shape),
        "n_neighbors": n_neighbors,
        "min_dist": min_dist,
        "seed": seed,
    }
    if (entry := store.get(key)) is not None:
        return entry.arrays["layout"]
    import umap  # takes many seconds to import, so only where a fit is needed

    model = umap.UMAP(
        n_neighbors=n_neighbors, min_dist=min_dist, random_state=seed, n_jobs=1,
        tqdm_kwds={"desc": "UMAP", "leave": False}, verbose=False,
    )  # fmt: skip
    placed = model.fit_transform(points).astype(np.float32)
    store.put(Entry(key, {"n": len(points)}, {"layout": placed}))
    return placed


def trustworthiness(points: np.ndarray, layout: np.ndarray, *, limit: int = 2000, seed: int = 0) -> float:
    """Return how far neighbours on the map are neighbours in kernel space, 0 to 1.

    Venna and Kaski 2001, over 15 neighbours, on at most `limit` points drawn at random (its cost in memory
    grows with their square).
    """
    chosen = np.random.default_rng(seed).permutation(len(points))[:limit]
    return float(manifold.trustworthiness(points[chosen], layout[chosen], n_neighbors=15))
