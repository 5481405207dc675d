"""Cluster the kernels of a bank: in what scope (each layer, all layers, groups), and what comes of it."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from kclib import kmeans
from kclib._util import checks, threads
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank, Kernels, Layer, bank_of, rows_of
from kclib.kmeans import _entropy, _fit_progress, _fitting, _settings, symmetric

Fit = kmeans.KMeans | symmetric.SymmetricKMeans | _entropy.Priced


SCOPES = ("layer", "global", "mixed")

Scope = str | Mapping[str, str]


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

    def kernels(self, rows: slice) -> np.ndarray:
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
    bank: Kernels,
    n_clusters: int | Mapping[str, int],
    *,
    scope: str | Mapping[str, str] = "layer",
    scaled: bool = False,
    turned: bool = False,
    weights: np.ndarray | None = None,
    price: float = 0.0,
    seed: int = 0,
    n_threads: int | None = None,
    progress: bool = True,
) -> Clustering:
    """Cluster the kernels of `bank` by squared Euclidean distance.

    Groups are clustered side by side, the largest first. The same seed gives the same result for any number
    of threads.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
        Of a network, the kernels that `kernels.extract` takes by default.
    n_clusters : int or mapping of str to int
        Clusters a group. One number serves every group, and groups with fewer kernels keep all of
        theirs (said in `Clustering.notes`); a mapping names each group.
    scope : {"layer", "global"} or mapping of str to str
        A codebook for each layer, one for all, or from each layer's name to its group's name.
    scaled, turned : bool
        Whether a representative stands for its multiples, and for its flips and rotations (square kernels).
    weights : numpy.ndarray, optional
        ``(n,)`` in the rows of the bank, finite, at least 0, not all 0: how much a kernel's squared distance
        counts in what is minimised; in a group of zeros (not with a price), and in `Group.inertia`, all count
        alike.
    price : float
        What a bit of the entropy-coded indices costs, in squared distances. Above 0, each group is an
        entropy-constrained quantizer (Chou, Lookabaugh and Gray 1989; see `entropy.fit`), of fewer clusters
        where they are not worth their bits. Not for kernels that are scaled or turned.
    seed : int
    n_threads : int, optional
        All processors by default.
    progress : bool
        Whether to show a progress bar, with the memory it takes, the inertia and the time left, when it takes
        longer than two seconds.

    Raises
    ------
    InvalidValueError, UnknownNameError
        K below 1 or above the number of kernels; a layer or group that is missing or unknown; kernels to be
        turned that are not square; weights or a price out of range.
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
    """
    bank = bank_of(bank)
    members = grouping(bank, scope)
    asked = wanted(members, n_clusters)
    method = _method(bank, scaled, turned, _entropy.checked_price(price))
    points = {name: bank.points[rows_of(layers)] for name, layers in members.items()}
    shares = _shares(bank, members, weights, price)
    largest_first = sorted(members, key=lambda name: -len(points[name]))
    n_threads = threads.threads(n_threads)
    inside = 1 if len(members) >= n_threads else n_threads
    with _fit_progress.Fits(
        len(bank), _fitting.memory(*bank.points.shape, max(asked.values())), progress
    ) as bar:

        def fit(i: int) -> Fit:
            name = largest_first[i]
            k = min(asked[name], len(points[name]))
            report = bar.of(name, len(points[name]))
            return method(points[name], k, weights=shares[name], seed=seed, n_threads=inside, progress=report)

        found = dict(zip(largest_first, threads.side_by_side(fit, len(members), n_threads), strict=True))
    result = of_fits(bank, found, asked, scope=scope, scaled=scaled, turned=turned, seed=seed)
    if price:
        result = replace(result, notes=())  # fewer clusters are what a price is for
    return result if weights is None else with_inertia(result, bank)


def of_fits(
    bank: KernelBank,
    found: Mapping[str, Fit],
    wanted: Mapping[str, int],
    *,
    scope: str | Mapping[str, str],
    scaled: bool = False,
    turned: bool = False,
    seed: int = 0,
) -> Clustering:
    """Return fits of each group's kernels (rungs of a `kmeans.ladder`, say) as the clustering of a bank.

    Parameters
    ----------
    bank, scope, scaled, turned, seed
        As in `cluster`.
    found : mapping of str to KMeans, SymmetricKMeans or Priced
        By group.
    wanted : mapping of str to int
        Clusters that each group was asked for.
    """
    groups = tuple(
        _group(bank, name, layers, found[name], scaled, turned)
        for name, layers in grouping(bank, scope).items()
    )
    notes = tuple(
        f"{group.name}: {group.n_clusters} clusters in place of {wanted[group.name]}, "
        f"for its {len(group.indices)} kernels have no more distinct ones."
        for group in groups
        if group.n_clusters < wanted[group.name]
    )
    return Clustering(groups, scope if isinstance(scope, str) else "mapping", seed, notes, origin_of(bank))


def grouping(bank: KernelBank, scope: str | Mapping[str, str]) -> dict[str, tuple[Layer, ...]]:
    """Return the layers of each group, in bank order.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A layer that is missing or unknown; a scope that is neither ``layer`` nor ``global`` nor a mapping.
    """
    names = [layer.name for layer in bank.layers]
    if scope == "layer":
        scope = {name: name for name in names}
    elif scope == "global":
        scope = dict.fromkeys(names, "global")
    elif isinstance(scope, str):
        raise UnknownNameError("scope", scope, ("layer", "global"))
    if not isinstance(scope, Mapping) or not all(isinstance(group, str) for group in scope.values()):
        raise InvalidValueError(
            f"scope is {checks.said(scope)}; it must be layer, global, or group names by layer."
        )
    if wrong := set(scope) ^ set(names):
        raise InvalidValueError(
            "scope must give every layer of the bank a group; "
            f"not matching: {', '.join(sorted(map(str, wrong)))}."
        )
    groups: dict[str, tuple[Layer, ...]] = {}
    for layer in bank.layers:
        groups[scope[layer.name]] = (*groups.get(scope[layer.name], ()), layer)
    return groups


def largest(bank: KernelBank, scope: str | Mapping[str, str]) -> int:
    """Return the kernels of the largest group: the most clusters that one number for all can be.

    Raises
    ------
    InvalidValueError, UnknownNameError
        As `grouping`.
    """
    return max(sum(layer.n_kernels for layer in layers) for layers in grouping(bank, scope).values())


def wanted(
    members: Mapping[str, tuple[Layer, ...]], n_clusters: int | Mapping[str, int] | pd.Series
) -> dict[str, int]:
    """Return the clusters that each group of `grouping` is asked for, checked.

    Raises
    ------
    InvalidValueError
        K below 1 or above the number of kernels; a group that is missing or unknown.
    """
    counts = {name: sum(x.n_kernels for x in layers) for name, layers in members.items()}
    if isinstance(n_clusters, pd.Series):
        n_clusters = n_clusters.to_dict()
    if isinstance(n_clusters, Mapping):
        if wrong := set(n_clusters) ^ set(counts):
            raise InvalidValueError(
                f"n_clusters must name every group; not matching: {', '.join(sorted(map(str, wrong)))}."
            )
        return {
            name: checks.check_whole("n_clusters", k, 1, counts[name], f"the kernels of group {name}")
            for name, k in n_clusters.items()
        }
    most = max(counts.values())
    return dict.fromkeys(
        counts, checks.check_whole("n_clusters", n_clusters, 1, most, "the kernels of the largest group")
    )


def mixed(bank: KernelBank) -> dict[str, str]:
    """Return the scope in which consecutive layers of equal width (output channels) share a codebook."""
    runs: list[list[Layer]] = []
    for layer in bank.layers:
        if runs and _width(runs[-1][0]) == _width(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = [run[0].name if len(run) == 1 else f"{run[0].name}..{run[-1].name}" for run in runs]
    return {layer.name: name for name, run in zip(names, runs, strict=True) for layer in run}


def resolved(bank: KernelBank, scope: Scope) -> Scope:
    """Return a scope of `SCOPES`, or a mapping, as one that `cluster` knows."""
    if isinstance(scope, str) and scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    return mixed(bank) if scope == "mixed" else scope


def checked(clustering: Clustering) -> Clustering:
    """Return a clustering; raise an InvalidValueError if it is none."""
    if not isinstance(clustering, Clustering):
        raise InvalidValueError(
            f"the clustering is a {type(clustering).__name__}; it must be a Clustering, as cluster makes one."
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
    weight = np.square(bank.weights, dtype=np.float64).sum(axis=(1, 2))
    return [float(error[x.rows].sum() / (weight[x.rows].sum() or 1)) for x in bank.layers]


def kernel_errors(bank: KernelBank, clustering: Clustering, weights=None) -> np.ndarray:
    """Return each kernel's squared error, times its weight if there are any, float64 ``(n,)``."""
    if bank.layers != checked(clustering).layers:
        raise InvalidValueError(
            "the clustering is of other layers than the bank's; give the bank it was made of."
        )
    weights = _settings.checked_weights(weights, len(bank))
    squares = np.square(bank.weights - quantized(clustering), dtype=np.float64).sum(axis=(1, 2))
    return squares if weights is None else squares * weights


def origin_of(bank: KernelBank) -> dict[str, str]:
    """Return the SHA-256 of each layer's kernels, by its name."""
    return {layer.name: digest(bank.weights[layer.rows]) for layer in bank.layers}


def digest(kernels: np.ndarray) -> str:
    """Return the SHA-256 of kernels, float32 ``(n, kh, kw)``."""
    return hashlib.sha256(np.ascontiguousarray(kernels)).hexdigest()


def _method(bank: KernelBank, scaled: bool, turned: bool, price: float) -> Callable[..., Fit]:
    if turned and bank.size[0] != bank.size[1]:
        raise InvalidValueError(
            f"kernels of {bank.size[0]}×{bank.size[1]} cannot be turned; they must be square."
        )
    if price and (scaled or turned):
        raise InvalidValueError(f"price is {price}; it must be 0 where kernels are scaled or turned.")
    if scaled or turned:
        return functools.partial(symmetric.fit, scaled=scaled, turned=turned)
    return functools.partial(_entropy.fit, price=price) if price else kmeans.fit


def _shares(bank: KernelBank, members: Mapping[str, tuple[Layer, ...]], weights, price: float) -> dict:
    """Check weights and return them by group; None for each if there are none, or all of its are 0."""
    weights = _settings.checked_weights(weights, len(bank))
    if weights is None:
        return dict.fromkeys(members)
    shares = {name: weights[rows_of(layers)] for name, layers in members.items()}
    if price and (empty := [name for name, share in shares.items() if not share.any()]):
        raise InvalidValueError(
            f"with a price, weights must not be all 0 in a group; they are in {', '.join(empty)}."
        )
    return {name: _settings.counted(share) for name, share in shares.items()}


def _group(
    bank: KernelBank, name: str, layers: tuple[Layer, ...], found: Fit, scaled: bool, turned: bool
) -> Group:
    codebook = found.centres.reshape(-1, *bank.size)
    scales, turns = found.scales if scaled else None, found.transforms if turned else None
    return Group(name, layers, codebook, found.labels, found.inertia, scales, turns)


def _width(layer: Layer) -> int:
    return layer.shape[1 if layer.transposed else 0]


def with_inertia(clustering: Clustering, bank: KernelBank) -> Clustering:
    """Return a clustering with its inertia against the kernels of a bank, all of them counted alike."""
    errors = kernel_errors(bank, clustering)
    groups = (replace(group, inertia=float(errors[group.rows].sum())) for group in clustering.groups)
    return replace(clustering, groups=tuple(groups))
