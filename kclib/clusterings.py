"""Clusterings found once and kept in the store, apart from what is evaluated with them."""

import time
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from kclib import checks, clustering
from kclib.clustering import Clustering, Group
from kclib.kernels import KernelBank, Kernels, bank_of
from kclib.store import Entry, Store

# What a representative stands for beside itself: options of `clustering.cluster`.
METHODS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        "plain": {},
        "scaled": {"scaled": True},
        "turned": {"turned": True},
        "scaled-turned": {"scaled": True, "turned": True},
    }
)


def cluster(
    bank: Kernels,
    n_clusters: int,
    *,
    scope: str = "layer",
    method: str = "plain",
    seed: int = 0,
    store: Store | None = None,
    n_threads: int | None = None,
    progress: bool = True,
) -> tuple[Clustering, float]:
    """Return the clustering of a bank, looked up if it was found before, and the seconds that took.

    Parameters
    ----------
    bank, n_clusters, scope, seed, n_threads, progress
        As in `clustering.cluster`.
    method : {"plain", "scaled", "turned", "scaled-turned"}
        Whether representatives stand for their multiples, and for their flips and rotations.
    store : Store, optional
        The default store if None.

    Raises
    ------
    UnknownNameError, InvalidValueError, NotEnoughMemoryError
        As in `clustering.cluster`; an unknown method.
    StorageError
    """
    bank = bank_of(bank)
    store, key = store or Store(), key_of(bank, n_clusters, scope=scope, method=method, seed=seed)
    options = {"scope": scope, "seed": seed, "n_threads": n_threads, "progress": progress}

    def compute() -> Entry:
        start = time.perf_counter()
        found = clustering.cluster(bank, n_clusters, **options, **METHODS[method])
        return _entry(key, found, time.perf_counter() - start)

    entry = store.once(key, compute)
    return _clustering(entry, bank), entry.row["seconds"]


def key_of(bank: KernelBank, n_clusters: int, *, scope: str, method: str, seed: int) -> dict:
    """Return what a clustering depends on, as the store has it.

    Raises
    ------
    UnknownNameError
        An unknown method.
    """
    checks.check_known("method", method, METHODS)
    levels = {"scope": scope, "k": n_clusters, "method": method, "seed": seed}
    return {"kind": "clustering", "kernels": bank.fingerprint} | levels


def _entry(key: dict, found: Clustering, seconds: float) -> Entry:
    arrays = {}
    for i, group in enumerate(found.groups):
        arrays[f"{i}.codebook"] = group.codebook
        arrays[f"{i}.indices"] = group.indices.astype(np.min_scalar_type(group.n_clusters - 1))
        if group.scales is not None:
            arrays[f"{i}.scales"] = group.scales
        if group.turns is not None:
            arrays[f"{i}.turns"] = group.turns
    groups = [[x.name, [layer.name for layer in x.layers], x.inertia] for x in found.groups]
    row = {"clusters": found.n_clusters, "inertia": found.inertia, "seconds": seconds}
    return Entry(key, row | {"groups": groups, "notes": list(found.notes)}, arrays)


def _clustering(entry: Entry, bank: KernelBank) -> Clustering:
    arrays = entry.arrays
    groups = tuple(
        Group(
            name,
            tuple(map(bank.layer, layers)),
            arrays[f"{i}.codebook"],
            arrays[f"{i}.indices"].astype(np.int32),
            inertia,
            arrays.get(f"{i}.scales"),
            arrays.get(f"{i}.turns"),
        )
        for i, (name, layers, inertia) in enumerate(entry.row["groups"])
    )
    return Clustering(
        groups, entry.key["scope"], entry.key["seed"], tuple(entry.row["notes"]), clustering.origin_of(bank)
    )
