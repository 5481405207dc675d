"""Cluster the kernels of a bank: in what scope (each layer, all layers, groups), and what comes of it."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from kclib import kmeans
from kclib._util import checks, threads
from kclib.clustering._scopes import grouping, wanted
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer, extract
from kclib.kernels._bank import Kernels, bank_of, matched, rows_of
from kclib.kmeans import _entropy, _fit_progress, _fitting, _settings, symmetric

Fit = kmeans.KMeans | symmetric.SymmetricKMeans | _entropy.Priced


@dataclass(frozen=True)
class Group:
    """Layers that share one codebook.

    Attributes
    ----------
    name : str
    layers : tuple of Layer
    codebook : numpy.ndarray
        float32 ``(K, kh, kw)``: the representatives, all distinct.
    indices : numpy.ndarray
        int32 ``(n,)``: the representative of each kernel, in order of `layers`; none goes unused.
    inertia : float
        Sum of squared distances of the kernels to what stands for them.
    scales : numpy.ndarray, optional
        float32 ``(n,)``: what each kernel's representative is multiplied by; it is of unit length where
        kernels were scaled one by one.
    turns : numpy.ndarray, optional
        uint8 ``(n,)``: the row of `symmetric.transforms` that takes the representative to each kernel.
    """

    name: str
    layers: tuple[Layer, ...]
    codebook: np.ndarray
    indices: np.ndarray
    inertia: float
    scales: np.ndarray | None = None
    turns: np.ndarray | None = None

    @property
    def n_clusters(self) -> int:
        """Number of representatives."""
        return len(self.codebook)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the bank that hold the kernels, int64 ``(n,)``, in order of `indices`."""
        return rows_of(self.layers)

    def kernels(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return what stands for the kernels `rows` of this group, float32 ``(m, kh, kw)``."""
        result = self.codebook[self.indices[rows]]
        if self.turns is not None:
            flat = result.reshape(len(result), -1)
            turned = symmetric.transforms(result.shape[1])[self.turns[rows]]
            result = np.take_along_axis(flat, turned, axis=1).reshape(result.shape)
        if self.scales is not None:
            result = self.scales[rows, None, None] * result
        return result


@dataclass(frozen=True)
class Clustering:
    """A codebook per group of layers and an index per kernel.

    Attributes
    ----------
    groups : tuple of Group
    scope : str
        ``layer``, ``global`` or ``mapping``.
    seed : int
    notes : tuple of str
        One sentence for each group that has fewer clusters than asked for, and why.
    origin : mapping of str to str
        The SHA-256 of the kernels that were clustered, by layer; empty where these are not known.
    parts : tuple of Clustering
        Where several banks were clustered together, the clustering of each, in their order. Its layers have
        the bank's names, and its codebooks the representatives that the bank uses. Empty for a single bank.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3))
    >>> clusters = kclib.cluster(network, 4)
    >>> [(group.name, group.codebook.shape, group.indices.shape) for group in clusters.groups]
    [('0', (4, 3, 3), (8,)), ('1', (4, 3, 3), (64,))]
    >>> print(f"{clusters.kernels_removed:.1%} of {clusters.n_kernels} kernels removed")
    88.9% of 72 kernels removed
    """

    groups: tuple[Group, ...]
    scope: str
    seed: int
    notes: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    parts: tuple["Clustering", ...] = ()

    @property
    def n_clusters(self) -> int:
        """Number of representatives over all groups."""
        return sum(group.n_clusters for group in self.groups)

    @property
    def n_kernels(self) -> int:
        """Number of kernels they stand for."""
        return sum(len(group.indices) for group in self.groups)

    @property
    def kernels_removed(self) -> float:
        """Share of the kernels that need not be stored, 1 - K/N, in [0, 1)."""
        return 1 - self.n_clusters / self.n_kernels

    @property
    def inertia(self) -> float:
        """Sum of squared distances of all kernels to their representatives."""
        return sum(group.inertia for group in self.groups)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All clustered layers in the order of the bank."""
        return tuple(sorted((x for g in self.groups for x in g.layers), key=lambda x: x.start))


def cluster(
    bank: Kernels | list[Kernels] | tuple[Kernels, ...],
    n_clusters: int | Mapping[str, int],
    *,
    scope: str | Mapping[str, str] = "layer",
    scaled: bool = False,
    turned: bool = False,
    sample_weight: np.ndarray | None = None,
    price: float = 0.0,
    quality: str = "fast",
    seed: int = 0,
    n_threads: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Clustering:
    """Cluster the kernels of a bank, or of several banks together, by squared Euclidean distance.

    Groups are clustered side by side, the largest first. The same seed gives the same result for any number
    of threads. A group of more than eight million kernels is read in blocks, which are tasks of joblib:
    ``with joblib.parallel_config("dask"):`` spreads them over the workers of a Dask cluster.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module, or list of these
        Of a network, the kernels that `kernels.extract` takes by default. In a list, the layers of the first
        bank are called ``0/`` and their names, those of the second ``1/`` and so on; `Clustering.parts` has
        what each network is compressed by.
    n_clusters : int or mapping of str to int
        Clusters a group. One number serves every group, and groups with fewer kernels keep all of
        theirs (said in `Clustering.notes`); a mapping names each group.
    scope : {"layer", "global"} or mapping of str to str
        A codebook for each layer, one for all, or from each layer's name to its group's name. Kernels of
        several sizes cannot share a codebook: ``global`` has one for each size (``global 3×3``).
    scaled, turned : bool
        Whether a representative stands for its multiples, and for its flips and rotations (square kernels).
    sample_weight : numpy.ndarray, optional
        ``(n,)`` in the rows of the bank, or of all banks one after the other; finite, at least 0, not all 0:
        how much a kernel's squared distance counts in what is minimised. In a group of zeros (not with a
        price), and in `Group.inertia`, all count alike.
    price : float
        What a bit of the entropy-coded indices costs, in squared distances. Above 0, each group is an
        entropy-constrained quantizer (Chou, Lookabaugh and Gray 1989; see `entropy.fit`), of fewer clusters
        where they are not worth their bits. Not for kernels that are scaled or turned.
    quality : {"fast", "best"}
        As in `kmeans.fit`. Only fast for kernels that are scaled or turned, or with a price.
    seed : int
    n_threads : int, optional
        All processors by default.
    device : str or torch.device, optional
        Where nearest representatives are searched, such as ``cuda``; by default on the processors. Not for
        kernels that are scaled or turned, nor with a price.
    progress : bool
        Whether to show a progress bar, with the memory it takes, the inertia and the time left, when it takes
        longer than two seconds.

    Raises
    ------
    InvalidValueError, UnknownNameError
        K below 1 or above the number of kernels; a layer or group that is missing or unknown; kernels to be
        turned that are not square; a sample weight or price out of range; a list without banks; a bank
        without kernels; a device that is not there; an unknown quality, or the best of what has none.
    NotEnoughMemoryError

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3))
    >>> for scope in ("layer", "global"):
    ...     clusters = kclib.cluster(network, 16, scope=scope)
    ...     print(f"{scope}: {clusters.n_clusters} representatives, {clusters.kernels_removed:.1%} removed")
    layer: 32 representatives, 78.9% removed
    global: 16 representatives, 89.5% removed

    Two networks that share one codebook, each compressed by its part:

    >>> networks = [network, torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))]
    >>> clusters = kclib.cluster(networks, 16, scope="global")
    >>> [layer.name for layer in clusters.layers]
    ['0/0', '0/1', '1/0']
    >>> small = [kclib.compress(x, part) for x, part in zip(networks, clusters.parts)]
    """
    source = _Source.of(bank)
    members = source.grouping(scope)
    asked = wanted(members, n_clusters)
    device = _checked_device(device)
    method = _method(source.layers, scaled, turned, _entropy.checked_price(price), quality, device)
    shares = _shares(len(source), members, sample_weight, price)
    counts = {name: sum(x.n_kernels for x in layers) for name, layers in members.items()}
    largest_first = sorted(members, key=lambda name: -counts[name])
    # Blocks are tasks already; and joblib knows the caller's backend in the caller's thread only.
    n_streamed = sum(_fitting.is_streamed(counts[name], device) for name in members)
    n_threads = threads.threads(n_threads)
    inside = 1 if len(members) - n_streamed >= n_threads else n_threads
    widest = max(math.prod(layer.shape[2:]) for layer in source.layers)
    memory = _fitting.memory(len(source), widest, max(asked.values()))
    with _fit_progress.Fits(len(source), memory, progress) as bar:

        def fit(name: str, n_threads: int) -> Fit:
            return method(
                source.points(members[name]),
                min(asked[name], counts[name]),
                sample_weight=shares[name],
                seed=seed,
                n_threads=n_threads,
                progress=bar.of(name, counts[name]),
            )

        fits = [fit(name, n_threads) for name in largest_first[:n_streamed]]
        others = largest_first[n_streamed:]
        fits += threads.side_by_side(lambda i: fit(others[i], inside), len(others), n_threads)
    fits = dict(zip(largest_first, fits, strict=True))
    result = _of_members(members, fits, asked, scope, seed, scaled=scaled, turned=turned)
    if price:
        result = replace(result, notes=())  # fewer clusters are what a price is for
    if sample_weight is not None:
        result = replace(result, groups=tuple(_with_inertia(x, source.kernels) for x in result.groups))
    if source.banks:
        return replace(result, parts=tuple(_part(result, i, x) for i, x in enumerate(source.banks)))
    return replace(result, origin=_origin(source.kernels))


def of_fits(
    bank: KernelBank,
    fits: Mapping[str, Fit],
    wanted: Mapping[str, int],
    *,
    scope: str | Mapping[str, str],
    scaled: bool = False,
    turned: bool = False,
    seed: int = 0,
) -> Clustering:
    """Return fits of each group's kernels (from a `kmeans.tree`, say) as the clustering of a bank.

    Parameters
    ----------
    bank, scope, scaled, turned, seed
        As in `cluster`.
    fits : mapping of str to KMeans, SymmetricKMeans or Priced
        By group.
    wanted : mapping of str to int
        Clusters that each group was asked for.
    """
    result = _of_members(grouping(bank, scope), fits, wanted, scope, seed, scaled=scaled, turned=turned)
    return replace(result, origin=origin_of(bank))


def checked(clustering: Clustering) -> Clustering:
    """Return the clustering of one bank; raise an InvalidValueError if it is anything else."""
    if not isinstance(clustering, Clustering):
        raise InvalidValueError(
            f"the clustering is a {type(clustering).__name__}; it must be a Clustering, as cluster makes one."
        )
    if clustering.parts:
        raise InvalidValueError(
            f"the clustering is of {len(clustering.parts)} banks together; it must be that of one, such as "
            "the first of its parts, parts[0]."
        )
    return clustering


def quantized(clustering: Clustering) -> np.ndarray:
    """Return what stands for each kernel, float32 ``(n, kh, kw)``, in the rows of the bank."""
    rows = np.empty((clustering.n_kernels, *clustering.groups[0].codebook.shape[1:]), np.float32)
    for group in clustering.groups:
        start = 0
        for layer in group.layers:
            rows[layer.rows] = group.kernels(slice(start, start + layer.n_kernels))
            start += layer.n_kernels
    return rows


def by_use(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Return a group's representatives from most to least used.

    Returns
    -------
    codebook : numpy.ndarray
        float32 ``(K, kh, kw)``.
    counts : numpy.ndarray
        int64 ``(K,)``, the kernels that each stands for, descending.
    """
    counts = np.bincount(group.indices, minlength=group.n_clusters)
    order = np.argsort(-counts, kind="stable")
    return group.codebook[order], counts[order]


def error_share(bank: KernelBank, clustering: Clustering) -> list[float]:
    """Return each layer's squared error over its squared weight, 0 to 1, in the order of the bank."""
    error = kernel_errors(bank, clustering)
    weight = np.square(bank.kernels, dtype=np.float64).sum(axis=(1, 2))
    return [float(error[x.rows].sum() / (weight[x.rows].sum() or 1)) for x in bank.layers]


def kernel_errors(bank: KernelBank, clustering: Clustering, sample_weight=None) -> np.ndarray:
    """Return each kernel's squared error, times its sample weight if these are given, float64 ``(n,)``."""
    if bank.layers != checked(clustering).layers:
        raise InvalidValueError(
            "the clustering is of other layers than the bank's; give the bank it was made of."
        )
    sample_weight = _settings.checked_sample_weight(sample_weight, len(bank))
    squares = np.square(bank.kernels - quantized(clustering), dtype=np.float64).sum(axis=(1, 2))
    return squares if sample_weight is None else squares * sample_weight


def dense_kernels(network: nn.Module, clustering: Clustering) -> KernelBank:
    """Return the dense kernels of the layers that were clustered.

    Raises
    ------
    InvalidValueError
        The clustering comes from another architecture.
    """
    matched(network, checked(clustering).layers)
    bank = extract(network, size=clustering.groups[0].codebook.shape[1:])
    return bank.only(*(layer.name for layer in clustering.layers))


def origin_of(bank: KernelBank) -> dict[str, str]:
    """Return the SHA-256 of each layer's kernels, by its name."""
    return _origin(_Source.of(bank).kernels)


def digest(kernels: np.ndarray) -> str:
    """Return the SHA-256 of kernels, float32 ``(n, kh, kw)``."""
    return hashlib.sha256(np.ascontiguousarray(kernels)).hexdigest()


def with_inertia(clustering: Clustering, bank: KernelBank) -> Clustering:
    """Return a clustering with its inertia against the kernels of a bank, all of them counted alike."""
    kernels = _Source.of(bank).kernels
    return replace(clustering, groups=tuple(_with_inertia(group, kernels) for group in clustering.groups))


@dataclass(frozen=True)
class _Source:
    """The kernels to cluster, layer by layer, as they lie in one bank or in several.

    `banks` are the several, and empty for one.
    """

    layers: tuple[Layer, ...]
    kernels: Mapping[str, np.ndarray]  # of each layer, float32 (n, kh, kw)
    banks: tuple[KernelBank, ...] = ()

    @classmethod
    def of(cls, given: Kernels | list[Kernels] | tuple[Kernels, ...]) -> "_Source":
        """Return the kernels of a bank, or those of several, whose layers get the bank's number as prefix."""
        if not isinstance(given, (list, tuple)):
            bank = bank_of(given)
            if not bank.layers:
                raise InvalidValueError("the bank has no kernels; give the bank of a network that has some.")
            return cls(bank.layers, {x.name: bank.kernels[x.rows] for x in bank.layers})
        if not given:
            raise InvalidValueError("the list of banks is empty; give at least one bank.")
        banks, layers, kernels, start = tuple(map(bank_of, given)), [], {}, 0
        for i, bank in enumerate(banks):
            if not bank.layers:
                raise InvalidValueError(f"bank {i} of the list has no kernels; leave it out.")
            for layer in bank.layers:
                layers.append(replace(layer, name=_in_list(i, layer), start=start + layer.start))
                kernels[layers[-1].name] = bank.kernels[layer.rows]
            start += len(bank)
        return cls(tuple(layers), kernels, banks)

    def __len__(self) -> int:
        return sum(map(len, self.kernels.values()))

    def grouping(self, scope: str | Mapping[str, str]) -> dict[str, tuple[Layer, ...]]:
        """Return the layers of each group, whose kernels are all of one size."""
        sizes = {layer.name: _size(layer) for layer in self.layers}
        if scope == "global" and len(set(sizes.values())) > 1:
            scope = {name: f"global {size}" for name, size in sizes.items()}
        members = grouping(self, scope)
        for name, layers in members.items():
            if len(several := sorted({sizes[layer.name] for layer in layers})) > 1:
                raise InvalidValueError(
                    f"group {name} has kernels of {' and '.join(several)}; a group has kernels of one size."
                )
        return members

    def points(self, layers: Iterable[Layer]) -> np.ndarray:
        """Return a copy of some layers' kernels as points, float32 ``(n, kh * kw)``."""
        return np.concatenate([self.kernels[x.name].reshape(x.n_kernels, -1) for x in layers])


def _in_list(i: int, layer: Layer) -> str:
    return f"{i}/{layer.name}"


def _size(layer: Layer) -> str:
    return "×".join(map(str, layer.shape[2:]))


def _method(
    layers: Iterable[Layer], scaled: bool, turned: bool, price: float, quality: str, device: str
) -> Callable[..., Fit]:
    flat = [layer for layer in layers if layer.shape[2] != layer.shape[3]]
    if turned and flat:
        raise InvalidValueError(f"kernels of {_size(flat[0])} cannot be turned; they must be square.")
    if price and (scaled or turned):
        raise InvalidValueError(f"price is {price}; it must be 0 where kernels are scaled or turned.")
    if device != "cpu" and (scaled or turned or price):
        raise InvalidValueError(
            f"device is {device}; it must be cpu where kernels are scaled or turned, or bits have a price."
        )
    checks.check_known("quality", quality, _fitting.QUALITIES)
    if quality != "fast" and (scaled or turned or price):
        raise InvalidValueError(
            f"quality is {quality}; it must be fast where kernels are scaled or turned, or bits have a price."
        )
    if scaled or turned:
        return functools.partial(symmetric.fit, scaled=scaled, turned=turned)
    if price:
        return functools.partial(_entropy.fit, price=price)
    return functools.partial(kmeans.fit, quality=quality, device=device)


def _checked_device(device: str | torch.device | None) -> str:
    if device is None:
        return "cpu"
    checks.check_values(device)
    return str(device)


def _shares(n: int, members: Mapping[str, tuple[Layer, ...]], sample_weight, price: float) -> dict:
    """Check sample weights and return them by group: None for a group where they are not given or all 0."""
    sample_weight = _settings.checked_sample_weight(sample_weight, n)
    if sample_weight is None:
        return dict.fromkeys(members)
    shares = {name: sample_weight[rows_of(layers)] for name, layers in members.items()}
    if price and (empty := [name for name, share in shares.items() if not share.any()]):
        raise InvalidValueError(
            f"with a price, sample_weight must not be all 0 in a group; it is in {', '.join(empty)}."
        )
    return {name: _settings.counted(share) for name, share in shares.items()}


def _of_members(
    members: Mapping[str, tuple[Layer, ...]], fits: Mapping[str, Fit], wanted, scope, seed, *, scaled, turned
) -> Clustering:
    """Return the fits of groups as a clustering, without its origin."""
    groups = tuple(_group(name, layers, fits[name], scaled, turned) for name, layers in members.items())
    notes = tuple(
        f"{group.name}: {group.n_clusters} clusters in place of {wanted[group.name]}, "
        f"for its {len(group.indices)} kernels have no more distinct ones."
        for group in groups
        if group.n_clusters < wanted[group.name]
    )
    return Clustering(groups, scope if isinstance(scope, str) else "mapping", seed, notes)


def _group(name: str, layers: tuple[Layer, ...], fit: Fit, scaled: bool, turned: bool) -> Group:
    codebook = fit.centres.reshape(-1, *layers[0].shape[2:])
    scales, turns = fit.scales if scaled else None, fit.transforms if turned else None
    return Group(name, layers, codebook, fit.labels, fit.inertia, scales, turns)


def _part(joint: Clustering, i: int, bank: KernelBank) -> Clustering:
    """Return what of a clustering of several banks concerns bank `i`."""
    original = {_in_list(i, layer): layer for layer in bank.layers}
    groups = []
    for group in joint.groups:
        if not (layers := tuple(original[x.name] for x in group.layers if x.name in original)):
            continue
        chosen = np.repeat([x.name in original for x in group.layers], [x.n_kernels for x in group.layers])
        used, indices = np.unique(group.indices[chosen], return_inverse=True)
        scales, turns = (None if x is None else x[chosen] for x in (group.scales, group.turns))
        name = layers[0].name if joint.scope == "layer" else group.name
        indices = indices.reshape(-1).astype(np.int32)
        groups.append(Group(name, layers, group.codebook[used], indices, math.nan, scales, turns))
    part = Clustering(tuple(groups), joint.scope, joint.seed, origin=origin_of(bank))
    return with_inertia(part, bank)


def _with_inertia(group: Group, kernels: Mapping[str, np.ndarray]) -> Group:
    """Return a group with its inertia against the kernels of its layers, all of them counted alike."""
    inertia, start = 0.0, 0
    for layer in group.layers:
        rows = slice(start, start := start + layer.n_kernels)
        inertia += float(np.square(kernels[layer.name] - group.kernels(rows), dtype=np.float64).sum())
    return replace(group, inertia=inertia)


def _origin(kernels: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: digest(values) for name, values in kernels.items()}
