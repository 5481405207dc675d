"""Clusterings of banks that are zero in part, as pruning leaves them: zero is a representative of its own."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kclib import clustering
from kclib._util import checks
from kclib.clustering import Clustering, Group
from kclib.kernels import KernelBank, Kernels, Layer, bank_of, rows_of
from kclib.kmeans import _entropy, _settings


def cluster(
    bank: Kernels,
    n_clusters: int | Mapping[str, int],
    *,
    scope: str | Mapping[str, str] = "layer",
    weights: np.ndarray | None = None,
    price: float = 0.0,
    seed: int = 0,
    n_threads: int | None = None,
    progress: bool = True,
) -> Clustering:
    """Cluster the kernels that are not all zero; one further representative, zero, stands for the rest.

    As `clustering.cluster`, but for this. K is that of the others: a group of K clusters and zero kernels has
    K + 1 representatives, the last of them zero (of indices of 8 bits, so, K = 255 makes most). A group that
    has fewer others than K gets as many (said in `Clustering.notes`); one without zero kernels gets no zero.

    Parameters
    ----------
    bank, n_clusters, scope, weights, price, seed, n_threads, progress
        As in `clustering.cluster`. A price is that of the bits that tell the others apart.

    Returns
    -------
    Clustering
        Zero kernels are exactly zero in it, at any precision that it is stored in.

    Raises
    ------
    InvalidValueError, UnknownNameError, NotEnoughMemoryError
        As there; K may be up to the number of all kernels of a group, zero or not.
    """
    bank = bank_of(bank)
    _entropy.checked_price(price)
    checks.check_seed(seed)
    members = clustering.grouping(bank, scope)
    asked = clustering.wanted(members, n_clusters)
    weights, alive = _settings.checked_weights(weights, len(bank)), bank.weights.any(axis=(1, 2))
    options = {"price": price, "seed": seed, "n_threads": n_threads, "progress": progress}
    options["weights"] = None if weights is None else weights[alive]
    found = _of_others(_others(bank, alive), members, asked, options)
    groups = tuple(
        _with_zero(name, layers, alive, found.get(name, _empty(name, bank)))
        for name, layers in members.items()
    )
    notes = tuple(
        f"{name}: {group.n_clusters} clusters in place of {asked[name]}, "
        f"for its {len(group.indices)} kernels that are not zero have no more distinct ones."
        for name, group in found.items()
        if group.n_clusters < asked[name] and not price
    )
    return Clustering(groups, scope if isinstance(scope, str) else "mapping", seed, notes)


def _others(bank: KernelBank, alive: np.ndarray) -> KernelBank:
    """Return the bank of the kernels that are not zero; its layers are lists of kernels, one input each."""
    layers, start = [], 0
    for layer in bank.layers:
        if n := int(np.count_nonzero(alive[layer.rows])):
            layers.append(replace(layer, shape=(n, 1, *bank.size), start=start))
            start += n
    return KernelBank(bank.weights[alive], tuple(layers), {})


def _of_others(
    bank: KernelBank, members: Mapping[str, tuple[Layer, ...]], asked: Mapping[str, int], options: dict
) -> dict[str, Group]:
    """Return the groups of kernels that are not zero, each of at most as many clusters as kernels."""
    here = {layer.name: layer.n_kernels for layer in bank.layers}
    scope = {x.name: name for name, layers in members.items() for x in layers if x.name in here}
    if not scope:
        return {}
    ks = {name: min(asked[name], sum(here.get(x.name, 0) for x in members[name])) for name in scope.values()}
    return {group.name: group for group in clustering.cluster(bank, ks, scope=scope, **options).groups}


def _empty(name: str, bank: KernelBank) -> Group:
    return Group(name, (), np.empty((0, *bank.size), np.float32), np.empty(0, np.int32), 0.0)


def _with_zero(name: str, layers: tuple[Layer, ...], alive: np.ndarray, others: Group) -> Group:
    """Return the group of all kernels of its layers, from that of those that are alive."""
    mine = alive[rows_of(layers)]
    codebook, zero = others.codebook, _zero(others)
    if zero is None and not mine.all():
        zero = len(codebook)
        codebook = np.concatenate([codebook, np.zeros_like(codebook, shape=(1, *codebook.shape[1:]))])
    indices = np.full(len(mine), zero or 0, np.int32)
    indices[mine] = others.indices
    return replace(others, layers=layers, codebook=codebook, indices=indices)


def _zero(group: Group) -> int | None:
    """Return the index of the representative that is zero; opposite kernels may have one as their mean."""
    found = np.flatnonzero(~group.codebook.any(axis=(1, 2)))
    return int(found[0]) if len(found) else None
