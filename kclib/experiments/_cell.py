"""Evaluate clusterings of a model as cells of an experiment: a scope, K, a method and a seed each.

`sweep` evaluates the cells of a grid one after the other. Clusterings and answers are kept in the store;
`Source` says where a worker finds the model and the images.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pandas as pd

from kclib import clustering, compression, datasets, kernels, loading, models
from kclib._util import checks, files
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, Group, _clustering
from kclib.clustering._scopes import largest
from kclib.compression import byte_counts
from kclib.errors import InvalidValueError
from kclib.evaluation import _accuracy
from kclib.evaluation._cells import Cells
from kclib.experiments import _provenance
from kclib.experiments._profiles import ModelSource
from kclib.kernels import KernelBank
from kclib.kernels._bank import Kernels, bank_of
from kclib.models import _model
from kclib.store import VERSIONS, Entry, Store

# What a representative stands for beside itself: options of `clustering.cluster`.
METHODS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        "plain": {},
        "scaled": {"scaled": True},
        "turned": {"turned": True},
        "scaled-turned": {"scaled": True, "turned": True},
    }
)


@dataclass(frozen=True)
class Cell:
    """One clustering to evaluate; by default none, the dense model.

    Attributes
    ----------
    scope : {"layer", "global", "dense"}
    k : int
        Clusters a group, as asked for.
    method : str
        One of `_cell.METHODS`.
    seed : int
        Of the clustering.
    """

    scope: str = "dense"
    k: int = 0
    method: str = "dense"
    seed: int = 0


@dataclass(frozen=True)
class Subject(Cells):
    """A model and images whose cells are clusterings; the attributes are those of `Cells`."""

    seconds: ClassVar[str] = "evaluate_seconds"

    @cached_property
    def bank(self) -> kernels.KernelBank:
        """The kernels of the model, taken out once."""
        return kernels.extract(self.model.network)

    @cached_property
    def key(self) -> dict:
        """What the answers of all cells depend on; the model's name stands for the code that is not seen."""
        return {
            "kind": "evaluation",
            "model": self.model.name,
            "weights": models.fingerprint(self.model.network),
            "input": _accuracy.input_fingerprint(self.model, self.data),
            "images_hash": self.data.fingerprint,
            "precision": self.precision,
        }

    def cells(
        self,
        ks: Iterable[int],
        scopes: Iterable[str] = ("layer", "global"),
        methods: Iterable[str] = ("plain",),
        seeds: Iterable[int] = (0,),
    ) -> list[Cell]:
        """Return the cells of a grid, the dense model first; a K above a scope's largest group is left out.

        Raises
        ------
        InvalidValueError, UnknownNameError
            No K fits the model, K below 1, an unknown scope or method.
        """
        ks = [checks.check_whole("n_clusters", k, 1) for k in checks.several("ks", ks)]
        seeds = [checks.check_seed(seed) for seed in checks.several("seeds", seeds)]
        scopes, methods = checks.several("scopes", scopes), checks.several("methods", methods)
        for method in methods:
            checks.check_known("method", method, METHODS)
        scopes = list(scopes)
        most = {scope: largest(self.bank, scope) for scope in scopes}
        fitting = [(s, k) for s in scopes for k in ks if k <= most[s]]
        if not fitting:
            raise InvalidValueError(
                f"no K of {ks} is at most the {len(self.bank)} kernels of {self.model.name}."
            )
        clustered = [
            Cell(scope, k, method, seed) for method in methods for seed in seeds for scope, k in fitting
        ]
        return [Cell(), *dict.fromkeys(clustered)]

    def key_of(self, cell: Cell) -> dict:
        """Return what a cell's answers depend on, as the store has it."""
        version = {} if cell == Cell() else {"clustering": VERSIONS["clustering"]}
        return self.key | asdict(cell) | version

    def entry(
        self, cell: Cell, *, wait: bool = True, progress: bool = False, n_threads: int | None = None
    ) -> Entry | None:
        """Return a cell's entry; what is missing of it is computed and stored.

        None if another process is at it, and `wait` is false.
        """
        key = self.key_of(cell)
        return self.store.once(key, lambda: self._computed(key, cell, progress, n_threads), wait=wait)

    def table(self, cells: Sequence[Cell], entries: Sequence[Entry]) -> pd.DataFrame:
        """Return one row a cell; the first is the dense model, which drops are against.

        Returns
        -------
        pandas.DataFrame
            ``scope``, ``k`` (asked for; 0 for dense), ``method``, ``seed``, ``clusters`` (stored in all),
            ``kernels_removed``, ``bytes_removed`` (convolutions, fp32 codebook), ``bytes_removed_fp16``,
            ``model_bytes_removed`` (whole model, fp32 codebook) in percent; ``bytes`` of the convolutions;
            ``inertia``; ``top1``, ``top1_low``, ``top1_high``, ``top5`` in percent; ``drop``, ``drop_low``,
            ``drop_high`` in points; ``p_value``; ``cluster_seconds``, ``evaluate_seconds``; and what a row
            can be told and compared by in other tables: ``model``, ``weights``, ``data``, ``images_hash``,
            ``precision``, ``images`` (how many) and ``right`` (which are answered rightly, a bit each:
            `numpy.packbits`); ``made``, ``versions``, ``commit``, ``machine`` (`_provenance.stamp`).
        """
        dense, rows = self.answers(entries[0]), []
        for cell, entry in zip(cells, entries, strict=True):
            numbers = {name: value for name, value in entry.row.items() if name != "classes"}
            about = {name: entry.key[name] for name in ("model", "weights", "images_hash", "precision")}
            compared = self.compared(entry, dense) | about | {"data": self.data.name}
            rows.append(asdict(cell) | byte_counts.DENSE | numbers | compared)
        return pd.DataFrame(rows)

    def _computed(self, key: dict, cell: Cell, progress: bool, n_threads: int | None) -> Entry:
        model, row = self.model, {"bytes": byte_counts.convolution_bytes(self.model.network)}
        if cell != Cell():
            result, seconds = stored_clustering(
                self.bank, cell.k, scope=cell.scope, method=cell.method, seed=cell.seed,
                store=self.store, progress=progress, n_threads=n_threads,
            )  # fmt: skip
            row = byte_counts.removed(model.network, result) | {"cluster_seconds": seconds}
            model = compression.replaced(model, result)
        row |= _provenance.stamp() | {"data": self.data.name}
        return self.evaluated(key, model, row, progress=progress)


def sweep(
    model: models.Model,
    data: datasets.ImageSet,
    ks: Iterable[int],
    *,
    scopes: Iterable[str] = ("layer", "global"),
    methods: Iterable[str] = ("plain",),
    seeds: Iterable[int] = (0,),
    precision: str = "fp32",
    device: str = "cpu",
    store: Store | None = None,
) -> pd.DataFrame:
    """Evaluate the dense model and its clusterings at each scope and K, one after the other.

    Parameters
    ----------
    model : Model
    data : ImageSet
    ks : iterable of int
        Clusters a group. In scope ``layer`` a layer with fewer kernels keeps all of them; a K
        above a scope's largest group is not run there.
    scopes : iterable of {"layer", "global"}
    methods : iterable of str
        What representatives stand for: `_cell.METHODS`.
    seeds : iterable of int
    precision, device : str
        As in `evaluation.evaluate`.
    store : Store, optional
        Where finished clusterings and evaluations are looked for and kept; the default store if None.

    Returns
    -------
    pandas.DataFrame
        As `Subject.table`.

    Raises
    ------
    InvalidValueError, UnknownNameError
        No K fits the model, K below 1, an unknown scope or method.

    Examples
    --------
    >>> import kclib, tempfile, torch
    >>> from kclib.store import Store
    >>> pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    >>> images = kclib.ImageSet("noise", pictures, torch.arange(12) % 2, ("shirt", "coat"), fingerprint="1")
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = kclib.sweep(network, images, [2, 6], scopes=["layer"], store=Store(folder))
    >>> table[["scope", "k", "kernels_removed"]]
       scope  k  kernels_removed
    0  dense  0         0.000000
    1  layer  2        91.666667
    2  layer  6        75.000000
    """
    model, data = _model.as_model(model), datasets.as_image_set(data)
    subject = Subject(model, data, store or Store(), precision, device)
    cells = subject.cells(ks, scopes, methods, seeds)
    with tqdm(cells, desc="accuracy sweep", unit="cell") as bar:
        return subject.table(cells, [subject.entry(cell) for cell in bar])


def stored(
    model: models.Model,
    data: datasets.ImageSet,
    n_clusters: int,
    *,
    scope: str = "layer",
    seed: int = 0,
    precision: str = "fp32",
    device: str = "cpu",
    store: Store | None = None,
) -> tuple[Clustering, _accuracy.Evaluation, _accuracy.Evaluation]:
    """Return a clustering, and what the network answers before and after it; none of it is computed twice.

    Parameters
    ----------
    model, data, precision, device, store
        As in `sweep`, whose cells of the same K these are.
    n_clusters, scope, seed
        As in `clustering.cluster`.
    """
    subject = Subject(
        _model.as_model(model), datasets.as_image_set(data), store or Store(), precision, device
    )
    options = {"scope": scope, "seed": seed}
    result, _ = stored_clustering(subject.bank, n_clusters, store=subject.store, **options)
    cells = Cell(), Cell(k=n_clusters, method="plain", **options)
    before, after = (subject.answers(subject.entry(cell, progress=True)) for cell in cells)
    return result, before, after


def stored_clustering(
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

    Examples
    --------
    >>> import kclib, tempfile, torch
    >>> from kclib.experiments import stored_clustering
    >>> from kclib.store import Store
    >>> bank = kclib.extract(torch.nn.Conv2d(3, 8, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first, _ = stored_clustering(bank, 5, store=Store(folder))
    ...     again, _ = stored_clustering(bank, 5, store=Store(folder))  # computes nothing
    >>> first.n_clusters, bool((again.groups[0].indices == first.groups[0].indices).all())
    (5, True)
    """
    bank = bank_of(bank)
    store, key = store or Store(), clustering_key(bank, n_clusters, scope=scope, method=method, seed=seed)
    options = {"scope": scope, "seed": seed, "n_threads": n_threads, "progress": progress}

    def compute() -> Entry:
        start = time.perf_counter()
        result = clustering.cluster(bank, n_clusters, **options, **METHODS[method])
        return _clustering_entry(key, result, time.perf_counter() - start)

    entry = store.once(key, compute)
    return _from_entry(entry, bank), entry.row["seconds"]


def clustering_key(bank: KernelBank, n_clusters: int, *, scope: str, method: str, seed: int) -> dict:
    """Return what a clustering depends on, as the store has it.

    Raises
    ------
    UnknownNameError, InvalidValueError
        An unknown method; K or a seed that is no whole number.
    """
    checks.check_known("method", method, METHODS)
    k, seed = checks.check_whole("n_clusters", n_clusters, 1), checks.check_seed(seed)
    levels = {"scope": scope, "k": k, "method": method, "seed": seed}
    return {"kind": "clustering", "kernels": bank.fingerprint} | levels


@dataclass(frozen=True)
class Source:
    """Where the workers take a `Subject` from, each for itself.

    Attributes
    ----------
    model : ModelSource
    data : str
    folder : str
        What paths are relative to.
    limit : int
        Images; 0 takes all.
    precision, device : str
    root : str
        Folder of the store.
    """

    model: ModelSource
    data: str
    folder: str
    limit: int
    precision: str
    device: str
    root: str

    def load(self) -> Subject:
        """Return the subject, from memory if this process had it lately."""
        return _subject(self)


def forget() -> None:
    """Let what is loaded next come from its files again."""
    for remembered in (_subject, _loaded_model, _data):
        remembered.cache_clear()


def _clustering_entry(key: dict, result: Clustering, seconds: float) -> Entry:
    arrays = {}
    for i, group in enumerate(result.groups):
        arrays[f"{i}.codebook"] = group.codebook
        arrays[f"{i}.indices"] = group.indices.astype(np.min_scalar_type(group.n_clusters - 1))
        if group.scales is not None:
            arrays[f"{i}.scales"] = group.scales
        if group.turns is not None:
            arrays[f"{i}.turns"] = group.turns
    groups = [[x.name, [layer.name for layer in x.layers], x.inertia] for x in result.groups]
    row = {"clusters": result.n_clusters, "inertia": result.inertia, "seconds": seconds}
    return Entry(key, row | {"groups": groups, "notes": list(result.notes)}, arrays)


def _from_entry(entry: Entry, bank: KernelBank) -> Clustering:
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
        groups, entry.key["scope"], entry.key["seed"], tuple(entry.row["notes"]), _clustering.origin_of(bank)
    )


@lru_cache(maxsize=2)
def _subject(source: Source) -> Subject:
    model, data = _loaded_model(source.model, source.folder), _data(source.data, source.folder, source.limit)
    return Subject(model, data, Store(source.root), source.precision, source.device)


@lru_cache(maxsize=2)
def _loaded_model(source: ModelSource, folder: str) -> models.Model:
    return loading.load_model(source.name, weights=files.located(source.weights, Path(folder), is_path=True))


@lru_cache(maxsize=16)
def _data(name: str, folder: str, limit: int) -> datasets.ImageSet:
    where = files.located(name, Path(folder))
    images = datasets.load_data(where, limit=limit or None)
    return replace(images, name=images.name.replace(where, name, 1))
