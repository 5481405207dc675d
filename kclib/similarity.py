"""How alike kernels are: histograms of pairwise distances, streamed in blocks."""

from collections.abc import Mapping

import numpy as np
from scipy import stats
from sklearn.metrics import pairwise_distances_chunked

from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank

# What each distance means, and its largest value (None: unbounded).
named_distances: Mapping[str, tuple[str, float | None]] = {
    "euclidean": ("length of the difference, in weight units", None),
    "cosine": ("1 - cosine of the angle: 0 same shape, 1 unrelated, 2 opposite sign", 2.0),
}


def pair_histogram(
    points: np.ndarray,
    edges: np.ndarray,
    *,
    others: np.ndarray | None = None,
    distance: str = "euclidean",
) -> np.ndarray:
    """Count pairs of points by distance, without ever holding an n×n matrix.

    Parameters
    ----------
    points : numpy.ndarray
        float32 ``(n, d)``.
    edges : numpy.ndarray
        ascending ``(b + 1,)``; pairs outside are not counted.
    others : numpy.ndarray, optional
        float32 ``(m, d)``: count the n·m pairs between the two sets; without it, the n(n-1)/2 pairs
        within `points`.
    distance : {"euclidean", "cosine"}
        See `named_distances`.

    Returns
    -------
    numpy.ndarray
        int64 ``(b,)``.

    Raises
    ------
    UnknownNameError, InvalidValueError
    """
    if distance not in named_distances:
        raise UnknownNameError("distance", distance, named_distances)
    if others is None and len(points) < 2:
        raise InvalidValueError(f"{len(points)} kernel has no pairs; give at least 2.")

    total, start = np.zeros(len(edges) - 1, dtype=np.int64), 0
    for block in pairwise_distances_chunked(points, others, metric=distance, working_memory=64):
        if others is None:  # a point's distance to itself is no pair
            own = np.arange(len(block))
            block[own, start + own] = np.nan
        start += len(block)
        total += np.histogram(block[np.isfinite(block)], edges)[0]
    return total // 2 if others is None else total  # each pair within was met from both sides


def within_and_across(
    bank: KernelBank, rows: np.ndarray, edges: np.ndarray, *, distance: str = "euclidean"
) -> dict[str, np.ndarray]:
    """Return the `pair_histogram` of sampled pairs ``within a layer`` and ``across layers``.

    `rows` are sampled rows of the bank; the pairs across layers are all pairs less those within.
    """
    every = pair_histogram(bank.points[rows], edges, distance=distance)
    within = sum(layer_histograms(bank, rows, edges, distance=distance).values(), start=np.zeros_like(every))
    return {"within a layer": within, "across layers": every - within}


def unrelated_share(edges: np.ndarray, d: int) -> np.ndarray:
    """Return the share of pairs of random directions in `d` dimensions in each bin of cosine distance.

    Half the cosine distance of two independent directions follows Beta((d-1)/2, (d-1)/2) (Muirhead 1982,
    theorem 1.5.7). What kernels of unrelated shape would show.
    """
    return np.diff(stats.beta.cdf(np.asarray(edges) / 2, (d - 1) / 2, (d - 1) / 2))


def layer_histograms(
    bank: KernelBank, rows: np.ndarray, edges: np.ndarray, *, distance: str = "euclidean"
) -> dict[str, np.ndarray]:
    """Return `pair_histogram` of each layer's sampled kernels, by layer name.

    `rows` are the sampled rows of the bank; layers with fewer than two of them are left out.
    """
    result = {}
    for layer in bank.layers:
        mine = rows[(rows >= layer.rows.start) & (rows < layer.rows.stop)]
        if len(mine) > 1:
            result[layer.name] = pair_histogram(bank.points[mine], edges, distance=distance)
    return result
