"""How alike kernels are: nearest neighbours against chance, layers described by layers."""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from kclib import kmeans
from kclib._util import checks, progress_bars
from kclib._util.progress_bars import tqdm
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank
from kclib.kernels._bank import Kernels, bank_of
from kclib.kmeans import _nearest
from kclib.similarity import _neighbours, distances, null_models

_FEWEST = 3  # kernels whose distances to the nearest say how alike they are


def near_zero(bank: Kernels, share: float = 0.01) -> np.ndarray:
    """Return which kernels are shorter than `share` of their layer's rms length, bool ``(n,)``."""
    bank = bank_of(bank)
    checks.check_real("share", share, lambda x: x >= 0, "a number, at least 0")
    lengths = np.linalg.norm(bank.points.astype(np.float64), axis=1)
    result = np.zeros(len(bank), bool)
    for layer in bank.layers:
        norms = lengths[layer.rows]
        result[layer.rows] = norms < share * np.sqrt(np.square(norms).mean())
    return result


def comparable(bank: Kernels, *, distance: str = "cosine", share: float = 0.01) -> KernelBank:
    """Return the layers of a bank of which a distance can compare three kernels or more.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
    distance : str
    share : float
        Kernels that are `near_zero` by it do not count.

    Raises
    ------
    InvalidValueError, UnknownNameError
        There is no such layer; an unknown distance; a share out of range.
    """
    bank = bank_of(bank)
    usable = distances.named(distance).comparable(bank.points) & ~near_zero(bank, share)
    counts = {layer.name: int(usable[layer.rows].sum()) for layer in bank.layers}
    kept = [name for name, n in counts.items() if n >= _FEWEST]
    if not kept:
        raise InvalidValueError(
            f"the layers have at most {max(counts.values())} kernels that {distance} distance can compare; "
            f"how alike they are takes at least {_FEWEST} in one layer."
        )
    return bank.only(*kept)


def nearest_distances(
    points: np.ndarray, *, distance: str = "euclidean", progress: bool = False
) -> np.ndarray:
    """Return each point's exact distance to its nearest other, float64 ``(m,)``, of those it can compare.

    `progress` shows a bar when it takes longer than two seconds.
    """
    named = distances.named(distance)
    prepared, unit = distances.framed(named.prepared(points))
    turns, signs = named.orbit(prepared.shape[1])
    with progress_bars.of_shares("nearest neighbours", progress) as bar:
        neighbours = _neighbours.nearest(prepared, turns=turns, signs=signs, progress=bar.update)
    return named.of_squared(neighbours.squared[:, 0].astype(np.float64) * unit**2)


def closeness(
    bank: Kernels, rows: np.ndarray, *, distance: str = "cosine", seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Return how much closer a layer's kernels lie to their nearest neighbours than null models say.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
    rows : numpy.ndarray
        Rows to look at, sampled or all; of each layer, real and null kernels are compared in equal number.
    distance : str
    seed : int
        Of the null models, and of the bootstrap.
    progress : bool

    Returns
    -------
    pandas.DataFrame
        One row a layer and null model: ``layer``; ``null``; ``kernels``; ``real``, ``chance``, median
        distances to the nearest neighbour; ``ratio``, chance / real, above 1 where real kernels are closer,
        infinite where most of them alone have a double, and NaN where most of both have;
        ``low``, ``high``, its 95 % interval (percentile bootstrap over kernels, 999 resamples; the null model
        is one draw). Layers with fewer than three kernels to compare are left out.
    """
    named, bank, result = distances.named(distance), bank_of(bank), []
    rows = bank.checked(rows)
    for layer in tqdm(
        bank.layers, desc="against chance", unit="layer", delay=2, leave=False, disable=not progress
    ):
        points = bank.points[layer.of(rows)]
        points = points[named.comparable(points)]
        if len(points) < _FEWEST:
            continue
        sets = [points, *(null_models.drawn(null, points, seed=seed) for null in null_models.named_nulls)]
        sets = _equally_many([some[named.comparable(some)] for some in sets], seed)
        if len(sets[0]) < _FEWEST:
            continue
        real, *chances = (nearest_distances(some, distance=distance) for some in sets)
        for null, chance in zip(null_models.named_nulls, chances, strict=True):
            result.append((layer.name, null, len(real), np.median(real), np.median(chance),
                           *_ratio(real, chance, seed)))  # fmt: skip
    return pd.DataFrame(
        result, columns=["layer", "null", "kernels", "real", "chance", "ratio", "low", "high"]
    )


def explained(
    bank: Kernels, n_clusters: int, *, shapes: bool = False, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Return how well one layer's codebook describes another layer's kernels.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
    n_clusters : int
        Of each codebook; layers with fewer kernels have as many as those.
    shapes : bool
        Whether kernels are scaled to length 1 first, so that strong and weak layers can be compared.
    seed : int
    progress : bool

    Returns
    -------
    pandas.DataFrame
        Indexed by the layer a codebook was made from, then ``all layers`` (one codebook of K for all) and
        ``all layers, as many in all`` (as many representatives as the layers' codebooks have together); a
        column a layer it describes; percent of the squared weight that is not lost.
    """
    bank = bank_of(bank)
    n_clusters = checks.check_whole("n_clusters", n_clusters, 1)
    points = distances.unit(bank.points) if shapes else bank.points
    parts = {layer.name: points[layer.rows] for layer in bank.layers}
    wanted = {name: (part, min(n_clusters, len(part))) for name, part in parts.items()}
    total = sum(k for _, k in wanted.values())
    wanted["all layers"] = (points, min(n_clusters, len(points)))
    wanted["all layers, as many in all"] = (points, total)
    table = {}
    for name, (part, k) in tqdm(
        wanted.items(), desc="layers by layers", unit="codebook", delay=2, leave=False, disable=not progress
    ):
        lost = _nearest.nearest(points, kmeans.fit(part, k, seed=seed).centres).errors
        table[name] = [_explained(points[layer.rows], lost[layer.rows]) for layer in bank.layers]
    return pd.DataFrame.from_dict(table, orient="index", columns=list(parts))


def closest(bank: Kernels, row: int, k: int, *, distance: str = "euclidean") -> tuple[np.ndarray, np.ndarray]:
    """Return the k kernels of the bank nearest to the kernel in `row`, itself left out, nearest first.

    Returns
    -------
    rows : numpy.ndarray
        int64 ``(k,)``.
    distances : numpy.ndarray
        float64 ``(k,)``.

    Raises
    ------
    InvalidValueError
        A row that is not in the bank, or whose kernel the distance cannot compare.
    """
    named, bank = distances.named(distance), bank_of(bank)
    (row,) = bank.checked([row])
    candidates = np.flatnonzero(named.comparable(bank.points))
    if row not in candidates:
        raise InvalidValueError(f"kernel {row} has no shape; {distance} distance needs one that has.")
    others = candidates[candidates != row]
    k = checks.check_whole("k", k, 1, len(others))
    prepared, unit = distances.framed(named.prepare(bank.points[np.append(row, others)]))
    turns, signs = named.orbit(prepared.shape[1])
    images = np.ascontiguousarray(signs[:, None] * prepared[0, turns])
    squared = _nearest.nearest(prepared[1:], images).errors  # a distance to the nearest image of the kernel
    found = np.argsort(squared, kind="stable")[:k]
    return others[found], named.of_squared(squared[found].astype(np.float64) * unit**2)


def _explained(points: np.ndarray, lost: np.ndarray) -> float:
    whole = np.square(points).sum(dtype=np.float64)
    return 100 * (1 - lost.sum(dtype=np.float64) / (whole or 1))


def _ratio(real: np.ndarray, chance: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Return the ratio of medians with its 95 % interval."""

    def of_medians(real, chance, axis):
        return np.median(chance, axis=axis) / np.median(real, axis=axis)

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        ratio = float(of_medians(real, chance, -1))
        if not np.isfinite(ratio):  # most kernels have a double: there is no smaller distance to compare
            return ratio, np.nan, np.nan
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # some resamples hold doubles alone
        ends = stats.bootstrap(
            (real, chance), of_medians, n_resamples=999, batch=max(1, 2**22 // len(real)),
            method="percentile", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return ratio, float(ends.low), float(ends.high)


def _equally_many(sets: list[np.ndarray], seed: int) -> list[np.ndarray]:
    draw, n = np.random.default_rng(seed), min(map(len, sets))
    return [some if len(some) == n else some[draw.choice(len(some), n, replace=False)] for some in sets]
