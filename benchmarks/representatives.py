"""Kinds of representatives: what may stand for a cluster of kernels, and the bytes that each kind takes."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

import kclib
from kclib import kmeans
from kclib._util import checks, progress_bars, threads
from kclib.clustering import Group
from kclib.clustering._clustering import origin_of
from kclib.clustering._scopes import grouping
from kclib.compression import _formats
from kclib.compression._counting import Count, orbit
from kclib.compression._packing import index_bytes
from kclib.kernels import Layer
from kclib.kernels._bank import Kernels, bank_of, rows_of
from kclib.kmeans import _lloyd, _nearest, _settings
from kclib.kmeans._rescaling import Frame

_HALF = np.dtype(np.float16)


@dataclass(frozen=True)
class Represented:
    """A bank's kernels and what stands for them.

    Attributes
    ----------
    kind : str
        A name in `KINDS`.
    clustering : Clustering
        ``compression.replaced(network, represented.clustering)`` is the network. Its scales are the decoded
        ones; the representatives that they multiply have unit length in the scaled kinds only.
    scale_bytes : int
        Bytes of all stored scales, with the tables that decode them.
    """

    kind: str
    clustering: kclib.Clustering
    scale_bytes: int = 0

    def n_bytes(self, precision: str = "fp16") -> int:
        """Return the stored bytes of the kernels: fixed-width indices, codebooks and scales.

        Parameters
        ----------
        precision : {"fp32", "fp16", "bf16", "int8", "int4"}
            Of the codebooks' values. Scales are stored alike beside each.

        Raises
        ------
        UnknownNameError
        """
        groups = self.clustering.groups
        counted = (Count(precision, orbit=orbit(x)).bytes(x.layers, x.n_clusters) for x in groups)
        return self.scale_bytes + int(sum(counted))


def cluster(
    bank: Kernels,
    n_clusters: int | Mapping[str, int],
    kind: str = "mean",
    *,
    scope: str | Mapping[str, str] = "layer",
    sample_weight: np.ndarray | None = None,
    scale_bits: int = 16,
    seed: int = 0,
    n_threads: int | None = None,
    progress: bool = True,
) -> Represented:
    """Cluster the kernels of `bank` with representatives of one kind.

    The same seed gives the same result for any number of threads.

    Parameters
    ----------
    bank, n_clusters, scope, seed, n_threads, progress
        As in `clustering.cluster`.
    kind : str
        - ``mean``: the (weighted) mean of its kernels.
        - ``medoid``: of its kernels the one nearest to their mean, to the bit (Kaufman and Rousseeuw 1990,
          *Finding Groups in Data*, chapter 2, after one step from k-means).
        - ``scaled``: a unit shape, and a signed length for each kernel (gain-shape quantization, Gersho and
          Gray 1992, *Vector Quantization and Signal Compression*, section 12.10).
        - ``symmetric``: a kernel that serves its 8 flips and rotations, at 3 more bits an index.
        - ``scaled-symmetric``: both.
        - ``layer-normalised``: the mean of kernels over their layer's root mean square, which is stored in
          fp16; of use where a scope joins layers.
        - ``filter-normalised``: the same for each filter, the kernels of one output channel. (A layer of the
          bank does not know its groups: in a grouped transposed convolution, filters at the same place in
          their groups share a number.)
    sample_weight : numpy.ndarray, optional
        ``(n,)``, in the rows of the bank, finite, at least 0: how much each kernel's squared error counts.
    scale_bits : int
        2 to 16: of a signed length in the scaled kinds. 16 is fp16; fewer are a place in a table of up to
        ``2**scale_bits`` fp16 values a group, found by k-means on the line.

    Returns
    -------
    Represented
        Unweighted inertia included, after all rounding of scales.

    Raises
    ------
    InvalidValueError, UnknownNameError
        As in `clustering.cluster`; an unknown kind; `scale_bits` out of range; scales that fp16 cannot hold.
    NotEnoughMemoryError
    """
    bank = bank_of(bank)
    checks.check_known("kind of representative", kind, KINDS)
    checks.check_whole("scale_bits", scale_bits, 2, 16)
    sample_weight = _settings.checked_sample_weight(sample_weight, len(bank))
    options = _Options(scope, sample_weight, int(scale_bits), seed, n_threads, progress)
    return Represented(kind, *KINDS[kind](bank, n_clusters, options))


@dataclass(frozen=True)
class _Options:
    scope: str | Mapping[str, str]
    sample_weight: np.ndarray | None
    scale_bits: int
    seed: int
    n_threads: int | None
    progress: bool

    def fit(self, bank: kclib.KernelBank, n_clusters, **how) -> kclib.Clustering:
        """Return the clustering of a bank, by the options' sample weights unless `how` has others."""
        shared = {
            name: getattr(self, name) for name in ("scope", "sample_weight", "seed", "n_threads", "progress")
        }
        return kclib.cluster(bank, n_clusters, **shared | how)

    def sample_weight_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the sample weights of some rows, None if all count alike."""
        return None if self.sample_weight is None else self.sample_weight[rows]


def _mean(bank: kclib.KernelBank, n_clusters, options: _Options, **how) -> tuple[kclib.Clustering, int]:
    return options.fit(bank, n_clusters, **how), 0


def _medoid(bank: kclib.KernelBank, n_clusters, options: _Options) -> tuple[kclib.Clustering, int]:
    found = options.fit(bank, n_clusters)
    with progress_bars.of_shares("medoids", options.progress) as bar:
        groups = tuple(_of_medoids(bank, group, options, _part(bar, group, bank)) for group in found.groups)
    return replace(found, groups=groups), 0


def _of_medoids(
    bank: kclib.KernelBank, group: Group, options: _Options, done: Callable[[float], None]
) -> Group:
    rows, n_threads = group.rows, threads.threads(options.n_threads)
    kernels = bank.points[rows]
    frame = Frame.of([kernels])
    points, means = frame.into(kernels), frame.into(group.codebook.reshape(group.n_clusters, -1))
    means = _lloyd.means(points, options.sample_weight_of(rows), group.indices, means, n_threads)
    errors = _nearest.errors(points, means, group.indices, n_threads=n_threads)
    nearest_first = np.lexsort((errors, group.indices))
    medoids = nearest_first[np.unique(group.indices[nearest_first], return_index=True)[1]]
    labels = _nearest.nearest(points, points[medoids], n_threads=n_threads, done=done).labels
    # Kernels that are the same may lie in two clusters, as near to one as to the other.
    labels = _lloyd.merged(kernels[medoids], labels)
    used, labels = np.unique(labels, return_inverse=True)
    codebook = bank.kernels[rows[medoids[used]]]
    return _settled(bank, replace(group, codebook=codebook, indices=labels.astype(np.int32)))


def _scaled(
    bank: kclib.KernelBank, n_clusters, options: _Options, *, turned: bool
) -> tuple[kclib.Clustering, int]:
    found = options.fit(bank, n_clusters, scaled=True, turned=turned)
    n_bytes = sum(index_bytes(layer.n_kernels, options.scale_bits) for layer in bank.layers)
    if options.scale_bits == 16:
        return _with_scales(bank, found, [_formats.half(group.scales) for group in found.groups]), n_bytes
    with progress_bars.of_shares("scales", options.progress) as bar:
        tables = [_table(bank, group, options, _part(bar, group, bank)) for group in found.groups]
    scales = [_looked_up(group.scales, table) for group, table in zip(found.groups, tables, strict=True)]
    return _with_scales(bank, found, scales), n_bytes + sum(table.size for table in tables) * _HALF.itemsize


def _table(
    bank: kclib.KernelBank, group: Group, options: _Options, done: Callable[[float], None]
) -> np.ndarray:
    """Return up to ``2**scale_bits`` values that a group's lengths are rounded to, float32, ascending."""
    found = kmeans.fit(
        group.scales[:, None],
        min(1 << options.scale_bits, len(group.scales)),
        sample_weight=options.sample_weight_of(group.rows),
        seed=options.seed,
        n_threads=options.n_threads,
        progress=lambda step: done(step.share),
    )
    return np.unique(_formats.half(found.centres))


def _looked_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the nearest entry of an ascending table for each value, float32 ``(n,)``."""
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    return table[np.searchsorted(middles, values)]


def _normalised(
    bank: kclib.KernelBank, n_clusters, options: _Options, *, owners: Callable[[Layer], np.ndarray]
) -> tuple[kclib.Clustering, int]:
    """Cluster kernels over the root mean square of all that have their owner (`owners` of each layer)."""
    owner, count = np.empty(len(bank), np.int64), 0
    for layer in bank.layers:
        owner[layer.rows] = count + owners(layer)
        count = int(owner[layer.rows].max()) + 1
    squares = np.einsum("nd,nd->n", bank.points, bank.points, dtype=np.float64)
    areas = np.bincount(owner) * bank.points.shape[1]
    scales = _formats.half(np.sqrt(np.bincount(owner, squares) / areas))[owner]
    divided = replace(bank, kernels=bank.kernels / np.where(scales > 0, scales, 1)[:, None, None])
    found = options.fit(divided, n_clusters, sample_weight=_sample_weight_over(bank, scales, options))
    found = _with_scales(bank, found, [scales[group.rows] for group in found.groups])
    found = replace(found, origin=origin_of(bank))
    return found, count * _HALF.itemsize


def _sample_weight_over(bank: kclib.KernelBank, scales: np.ndarray, options: _Options) -> np.ndarray:
    """Return how much errors of divided kernels count, so that they count as those of the kernels do.

    A group in which nothing would count, for it is all zero, keeps the sample weights of its kernels; one
    whose sample weights are zero counts all alike.
    """
    result = np.ones(len(bank), np.float32)
    squares = np.square(scales / (scales.max() or 1), dtype=np.float64)
    for layers in grouping(bank, options.scope).values():
        rows = rows_of(layers)
        given = _settings.counted(options.sample_weight_of(rows))
        over = squares[rows] if given is None else given * squares[rows]
        result[rows] = over if over.any() else result[rows] if given is None else given
    return result


def _whole(layer: Layer) -> np.ndarray:
    return np.zeros(layer.n_kernels, np.int64)


def _filters(layer: Layer) -> np.ndarray:
    """Return the output channel of each kernel of a layer, int64 ``(n,)``."""
    return np.indices(layer.shape[:2])[int(layer.transposed)].ravel()


KINDS: dict[str, Callable[..., tuple[kclib.Clustering, int]]] = {
    "mean": _mean,
    "medoid": _medoid,
    "scaled": functools.partial(_scaled, turned=False),
    "symmetric": functools.partial(_mean, turned=True),
    "scaled-symmetric": functools.partial(_scaled, turned=True),
    "layer-normalised": functools.partial(_normalised, owners=_whole),
    "filter-normalised": functools.partial(_normalised, owners=_filters),
}


def _with_scales(
    bank: kclib.KernelBank, found: kclib.Clustering, scales: list[np.ndarray]
) -> kclib.Clustering:
    """Return a clustering with these scales, float32 ``(n,)`` for each group."""
    groups = (replace(group, scales=own) for group, own in zip(found.groups, scales, strict=True))
    return replace(found, groups=tuple(_settled(bank, group) for group in groups))


def _settled(bank: kclib.KernelBank, group: Group) -> Group:
    """Return a group with the inertia that it has now."""
    rows, total = group.rows, 0.0
    for block in threads.blocks(len(rows)):
        total += np.square(bank.kernels[rows[block]] - group.kernels(block), dtype=np.float64).sum()
    return replace(group, inertia=float(total))


def _part(bar, group: Group, bank: kclib.KernelBank) -> Callable[[float], None]:
    """Return what is told of shares of a group's work, for a bar over the bank's."""

    def done(share: float) -> None:
        bar.update(min(share * len(group.indices) / len(bank), bar.total - bar.n))

    return done
