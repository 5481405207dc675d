"""Null models: what a layer's kernels would look like if their likeness were chance."""

from collections.abc import Callable, Mapping

import numpy as np

from kclib._util import checks


def shuffled_within(points: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Shuffle the weights of each kernel among themselves: its values and length stay, its picture goes."""
    return draw.permuted(points, axis=1)


def shuffled_across(points: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Shuffle each position's weights among kernels: positions keep their values, none its company."""
    return draw.permuted(points, axis=0)


def gaussian(points: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draw from the normal distribution of the same mean and covariance."""
    centre, covariance = points.mean(axis=0, dtype=np.float64), np.cov(points, rowvar=False)
    drawn = draw.multivariate_normal(centre, covariance, len(points), method="eigh")
    return drawn.astype(np.float32)


named_nulls: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "shuffled within kernels": shuffled_within,
    "shuffled across kernels": shuffled_across,
    "Gaussian of the same covariance": gaussian,
}


def drawn(name: str, points: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return one draw of a null model of kernels.

    Parameters
    ----------
    name : str
        One of `named_nulls`.
    points : numpy.ndarray
        float32 ``(n, d)``, at least two.
    seed : int

    Returns
    -------
    numpy.ndarray
        float32 ``(n, d)``.
    """
    checks.check_known("null model", name, named_nulls)
    checks.check_seed(seed)
    points = checks.points("the kernels", points)
    return named_nulls[name](points, np.random.default_rng(seed))
