"""Few values that stand for many: scikit-learn's k-means on a line."""

import functools

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import ThreadpoolController

_TRIMS = 8  # a gap needs no more than one value, however wide it is


def palette(values: np.ndarray, n: int) -> np.ndarray:
    """Return the n values to which k-means leads, the same at each call and on any number of threads.

    Of two fits the better: one starts with k-means++, the other at values spread with the cube root of the
    density, as the optimum is (Panter and Dite 1951, *Quantization Distortion in Pulse-Count Modulation with
    Nonuniform Spacing of Levels*).

    Parameters
    ----------
    values : numpy.ndarray
        Finite ``(m,)``, at least one.
    n : int
        At least 1.

    Returns
    -------
    numpy.ndarray
        float64 ``(n,)``, ascending. Where there are no more distinct values than n it holds them all, and
        then repeats the last.
    """
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    if len(distinct) <= n:
        return np.pad(distinct, (0, n - len(distinct)), mode="edge")
    points, starts = distinct[:, None], (_spread(distinct, counts, n)[:, None], "k-means++")
    with _libraries().limit(limits=1, user_api="openmp"):  # sums in one order
        fits = [KMeans(n, init=x, n_init=1, tol=0, random_state=0).fit(points, None, counts) for x in starts]
    return np.sort(min(fits, key=lambda x: x.inertia_).cluster_centers_[:, 0])


def _spread(distinct: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """Return n values whose density is near the cube root of that of distinct ones, by their gaps."""
    load = np.cbrt(np.sqrt(counts[1:] * counts[:-1]) * np.diff(distinct) ** 2)
    for _ in range(_TRIMS):
        load = np.minimum(load, load.sum() / n)
    load = np.concatenate([[0], np.cumsum(load)])
    return np.interp(load[-1] * (np.arange(n) + 0.5) / n, load, distinct)


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
