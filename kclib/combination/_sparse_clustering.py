"""Cluster a pruned bank: its zero kernels have a representative for themselves, which is zero."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kclib import clustering
from kclib._util import checks
from kclib.clustering import Clustering, Group, _scopes
from kclib.kernels import KernelBank, Layer
from kclib.kernels._bank import Kernels, bank_of, rows_of
from kclib.kmeans import _entropy, _settings


def cluster(
    bank: Kernels,
    n_clusters: int | Mapping[str, int],
    *,
    scope: str | Mapping[str, str] = "layer",
    sample_weight: np.ndarray | None = None,
    price: float = 0.0,
    seed: int = 0,
    n_threads: int | None = None,
    progress: bool = True,
) -> Clustering:
    """Cluster the kernels that are not zero, and let one further representative, zero, stand for the others.

    The kernels that are not zero are clustered by `clustering.cluster`. K counts their representatives only:
    a group with zero kernels has K + 1 representatives, and the last of them is zero. (K = 255 is thus the
    most for 8-bit indices.) A group keeps fewer than K if it has fewer kernels that are not zero, which
    `Clustering.notes` says. A group without zero kernels has K.

    Parameters
    ----------
    bank, n_clusters, scope, sample_weight, price, seed, n_threads, progress
        As in `clustering.cluster`. The price is that of bits which tell apart kernels that are not zero.

    Returns
    -------
    Clustering
        Zero kernels are exactly zero in it, at any precision that it is stored in.

    Raises
    ------
    InvalidValueError, UnknownNameError, NotEnoughMemoryError
        As in `clustering.cluster`; K may be up to the number of all kernels of a group, zero or not.
    """
    bank = bank_of(bank)
    _entropy.checked_price(price)
    checks.check_seed(seed)
    members = _scopes.grouping(bank, scope)
    asked = _scopes.wanted(members, n_clusters)
    sample_weight = _settings.checked_sample_weight(sample_weight, len(bank))
    alive = bank.kernels.any(axis=(1, 2))
    options = {"price": price, "seed": seed, "n_threads": n_threads, "progress": progress}
    options["sample_weight"] = None if sample_weight is None else sample_weight[alive]
    nonzero = _of_others(_others(bank, alive), members, asked, options)
    groups = tuple(
        _with_zero(name, layers, alive, nonzero.get(name, _empty(name, bank)))
        for name, layers in members.items()
    )
    notes = tuple(
        f"{name}: {group.n_clusters} clusters in place of {asked[name]}, "
        f"for its {len(group.indices)} kernels that are not zero have no more distinct ones."
        for name, group in nonzero.items()
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
    return KernelBank(bank.kernels[alive], tuple(layers), {})


def _of_others(
    bank: KernelBank, members: Mapping[str, tuple[Layer, ...]], asked: Mapping[str, int], options: dict
) -> dict[str, Group]:
    """Return the groups of kernels that are not zero, each of at most as many clusters as kernels."""
    counts = {layer.name: layer.n_kernels for layer in bank.layers}
    scope = {x.name: name for name, layers in members.items() for x in layers if x.name in counts}
    if not scope:
        return {}
    ks = {
        name: min(asked[name], sum(counts.get(x.name, 0) for x in members[name])) for name in scope.values()
    }
    return {group.name: group for group in clustering.cluster(bank, ks, scope=scope, **options).groups}


def _empty(name: str, bank: KernelBank) -> Group:
    return Group(name, (), np.empty((0, *bank.size), np.float32), np.empty(0, np.int32), 0.0)


def _with_zero(name: str, layers: tuple[Layer, ...], alive: np.ndarray, others: Group) -> Group:
    """Return the group of all kernels of its layers, from that of those that are alive."""
    nonzero = alive[rows_of(layers)]
    codebook, zero = others.codebook, _zero(others)
    if zero is None and not nonzero.all():
        zero = len(codebook)
        codebook = np.concatenate([codebook, np.zeros_like(codebook, shape=(1, *codebook.shape[1:]))])
    indices = np.full(len(nonzero), zero or 0, np.int32)
    indices[nonzero] = others.indices
    return replace(others, layers=layers, codebook=codebook, indices=indices)


def _zero(group: Group) -> int | None:
    """Return the index of the representative that is zero; opposite kernels may have one as their mean."""
    zeros = np.flatnonzero(~group.codebook.any(axis=(1, 2)))
    return int(zeros[0]) if len(zeros) else None
