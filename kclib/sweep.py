"""The report's experiment as cells: cluster, compress, evaluate at each scope and K, and keep each result."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from kclib import (
    checks,
    clustering,
    clusterings,
    compression,
    datasets,
    evaluation,
    footprint,
    kernels,
    models,
    provenance,
)
from kclib.bars import tqdm
from kclib.errors import InvalidValueError
from kclib.evaluation import Evaluation
from kclib.scopes import largest
from kclib.store import VERSIONS, Entry, Store

# What the dense model has in place of a clustering's numbers.
DENSE = dict.fromkeys(
    ("kernels_removed", "bytes_removed", "bytes_removed_fp16", "model_bytes_removed"), 0.0
) | {"clusters": 0, "inertia": 0.0, "cluster_seconds": 0.0}


@dataclass(frozen=True)
class Cell:
    """One clustering to evaluate; by default none, the dense model.

    Attributes
    ----------
    scope : {"layer", "global", "dense"}
    k : int
        Clusters a group, as asked for.
    method : str
        One of `clusterings.METHODS`.
    seed : int
        Of the clustering.
    """

    scope: str = "dense"
    k: int = 0
    method: str = "dense"
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """What cells are computed from, and where they are kept.

    Attributes
    ----------
    model : Model
        Dense; unchanged.
    data : ImageSet
    store : Store
    precision, device : str
        As in `evaluation.evaluate`.
    """

    model: models.Model
    data: datasets.ImageSet
    store: Store
    precision: str = "fp32"
    device: str = "cpu"

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
            "input": input_fingerprint(self.model, self.data),
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
            checks.check_known("method", method, clusterings.METHODS)
        scopes = list(scopes)
        most = {scope: largest(self.bank, scope) for scope in scopes}
        fitting = [(s, k) for s in scopes for k in ks if k <= most[s]]
        if not fitting:
            raise InvalidValueError(
                f"no K of {ks} is at most the {len(self.bank)} kernels of {self.model.name}."
            )
        found = [Cell(scope, k, method, seed) for method in methods for seed in seeds for scope, k in fitting]
        return [Cell(), *dict.fromkeys(found)]

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
            `numpy.packbits`); ``made``, ``versions``, ``commit``, ``machine`` (`provenance.stamp`).
        """
        answers = [_answers(entry) for entry in entries]
        rows = []
        for cell, entry, found in zip(cells, entries, answers, strict=True):
            numbers = {name: value for name, value in entry.row.items() if name != "classes"}
            about = {name: entry.key[name] for name in ("model", "weights", "images_hash", "precision")}
            about |= {"data": self.data.name, "right": np.packbits(found.correct).tobytes()}
            rows.append(asdict(cell) | DENSE | numbers | accuracy(found, answers[0]) | about)
        return pd.DataFrame(rows)

    def _computed(self, key: dict, cell: Cell, progress: bool, n_threads: int | None) -> Entry:
        model, row = self.model, {"bytes": footprint.convolution_bytes(self.model.network)}
        if cell != Cell():
            found, seconds = clusterings.cluster(
                self.bank, cell.k, scope=cell.scope, method=cell.method, seed=cell.seed,
                store=self.store, progress=progress, n_threads=n_threads,
            )  # fmt: skip
            row = removed(model.network, found) | {"cluster_seconds": seconds}
            model = compression.replaced(model, found)
        answers = evaluation.evaluate(
            model, self.data, precision=self.precision, device=self.device, progress=progress
        )
        row |= provenance.stamp() | {
            "data": self.data.name,
            "images": len(answers.correct),
            "top1": answers.top1.estimate,
            "top5": answers.top5.estimate,
            "evaluate_seconds": answers.seconds,
            "classes": list(answers.classes),
        }
        arrays = {"predictions": answers.predictions, "labels": answers.labels, "in_top5": answers.in_top5}
        return Entry(key, row, arrays)


def run(
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
        Clusters a group. In scope ``layer`` a layer with fewer kernels keeps all of its own; a K
        above a scope's largest group is not run there.
    scopes : iterable of {"layer", "global"}
    methods : iterable of str
        What representatives stand for: `clusterings.METHODS`.
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
    """
    model, data = models.as_model(model), datasets.as_image_set(data)
    subject = Subject(model, data, store or Store(), precision, device)
    cells = subject.cells(ks, scopes, methods, seeds)
    with tqdm(cells, desc="accuracy sweep", unit="cell") as bar:
        return subject.table(cells, [subject.entry(cell) for cell in bar])


def input_fingerprint(model: models.Model, data: datasets.ImageSet) -> str:
    """Return the SHA-256 of what answers depend on beside weights and images.

    That is the first image as the network sees it, the network as it prints itself, and its classes. Other
    code of a ``forward`` is not seen, nor are arguments that are not printed.
    """
    first, _ = next(datasets.batches(datasets.select(data, torch.tensor([0])), model.preprocess, 1))
    digest = hashlib.sha256(first.contiguous().numpy())
    printed = re.sub("0x[0-9a-f]+", "", repr(model.network))  # addresses differ from run to run
    digest.update(json.dumps([printed, model.classes]).encode())
    return digest.hexdigest()


def removed(network: torch.nn.Module, result: clustering.Clustering) -> dict[str, float]:
    """Return a clustering's columns of the table that `run` returns: what it removes, and its inertia."""
    saved = footprint.savings(network, result)
    return {
        "clusters": result.n_clusters,
        "kernels_removed": 100 * saved.kernels,
        "bytes": round(footprint.convolution_bytes(network) * (1 - saved.bytes)),
        "bytes_removed": 100 * saved.bytes,
        "bytes_removed_fp16": 100 * saved.bytes_fp16,
        "model_bytes_removed": 100 * saved.model_bytes,
        "inertia": result.inertia,
    }


def _answers(entry: Entry) -> Evaluation:
    arrays = entry.arrays
    right = arrays["predictions"], arrays["labels"], arrays["in_top5"].astype(bool)
    return Evaluation(*right, tuple(entry.row["classes"]), entry.row["evaluate_seconds"])


def accuracy(result: Evaluation, dense: Evaluation) -> dict[str, float]:
    """Return an evaluation's columns of the table that `run` returns."""
    lost, top1 = evaluation.drop(dense, result), result.top1
    return {
        "top1": top1.estimate,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5": result.top5.estimate,
        "drop": lost.points.estimate,
        "drop_low": lost.points.low,
        "drop_high": lost.points.high,
        "p_value": lost.p_value,
    }
