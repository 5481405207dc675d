"""The report's experiment as cells: cluster, compress, evaluate at each scope and K, and keep each result."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import torch
from tqdm.auto import tqdm

from kclib import clustering, compression, datasets, evaluation, footprint, kernels, models, scopes
from kclib.errors import InvalidValueError
from kclib.evaluation import Evaluation
from kclib.store import Entry, Store

# Part of every key: raise it when the same inputs would give other results.
_METHOD = 2

# What the dense model has in place of a clustering's numbers.
DENSE = dict.fromkeys(
    ("kernels_removed", "bytes_removed", "bytes_removed_fp16", "model_bytes_removed"), 0.0
) | {"clusters": 0, "inertia": 0.0, "cluster_seconds": 0.0}


def run(
    model: models.Model,
    data: datasets.ImageSet,
    ks: Iterable[int],
    *,
    scopes: Iterable[str] = ("layer", "global"),
    seed: int = 0,
    precision: str = "fp32",
    device: str = "cpu",
    store: Store | None = None,
) -> pd.DataFrame:
    """Evaluate the dense model and its clusterings at each scope and K.

    Parameters
    ----------
    model : Model
    data : ImageSet
    ks : iterable of int
        Clusters a group. In scope ``layer`` a layer with fewer kernels keeps all of its own; a K
        above a scope's largest group is not run there.
    scopes : iterable of {"layer", "global"}
    seed : int
    precision, device : str
        As in `evaluation.evaluate`.
    store : Store, optional
        Where finished cells are looked for and kept; the default store if None.

    Returns
    -------
    pandas.DataFrame
        One row a cell, ``dense`` first: ``scope``, ``k`` (asked for; 0 for dense), ``clusters`` (stored
        in all), ``kernels_removed``, ``bytes_removed`` (convolutions, fp32 codebook), ``bytes_removed_fp16``,
        ``model_bytes_removed`` (whole model, fp32 codebook) in percent; ``inertia``; ``top1``,
        ``top1_low``, ``top1_high``, ``top5`` in percent; ``drop``, ``drop_low``, ``drop_high`` in
        points; ``p_value``; ``cluster_seconds``, ``evaluate_seconds``.

    Raises
    ------
    InvalidValueError, UnknownNameError
        No K fits the model, K below 1, an unknown scope.
    """
    store, ks = store or Store(), [int(k) for k in ks]
    bank = kernels.extract(model.network)
    key = {
        "method": _METHOD,
        "model": [model.name, models.fingerprint(model.network)],
        "input": input_fingerprint(model, data),
        "data": [data.name, data.fingerprint],
        "seed": seed,
        "precision": precision,
    }
    if ks and min(ks) < 1:
        raise InvalidValueError(f"n_clusters is {min(ks)}; every K must be at least 1.")
    cells = [("dense", 0)] + [(s, k) for s in scopes for k in ks if _fits(bank, s, k)]
    if len(cells) == 1:
        raise InvalidValueError(f"no K of {list(ks)} is at most the {len(bank)} kernels of {model.name}.")
    rows, dense = [], None
    for scope, k in tqdm(cells, desc="accuracy sweep", unit="cell"):
        cell = key | {"scope": scope, "k": k}
        entry = store.get(cell)
        if entry is None:
            entry = _compute(cell, model, bank, data, device)
            store.put(entry)
        result = _evaluation(entry, data)
        dense = dense or result
        rows.append(_row(entry, result, dense))
    return pd.DataFrame(rows)


def input_fingerprint(model: models.Model, data: datasets.ImageSet) -> str:
    """Return the SHA-256 of the first image as the network sees it: other preprocessing is another key."""
    first, _ = next(datasets.batches(datasets.select(data, torch.tensor([0])), model.preprocess, 1))
    return hashlib.sha256(first.contiguous().numpy()).hexdigest()


def _fits(bank: kernels.KernelBank, scope: str, k: int) -> bool:
    """Tell whether K is at most the largest group's kernels."""
    groups = scopes.grouping(bank, scope).values()
    return k <= max(sum(layer.n_kernels for layer in layers) for layers in groups)


def _compute(cell: dict, model: models.Model, bank, data: datasets.ImageSet, device: str) -> Entry:
    row = {"scope": cell["scope"], "k": cell["k"]}
    if cell["scope"] != "dense":
        start = time.perf_counter()
        result = clustering.cluster(bank, cell["k"], scope=cell["scope"], seed=cell["seed"])
        row["cluster_seconds"] = time.perf_counter() - start
        row |= removed(model.network, result)
        model = replace(model, network=compression.replaced(model.network, result))
    answers = evaluation.evaluate(model, data, precision=cell["precision"], device=device, progress=False)
    row["evaluate_seconds"] = answers.seconds
    arrays = {"predictions": answers.predictions, "labels": answers.labels, "in_top5": answers.in_top5}
    return Entry(cell, row | {"classes": list(answers.classes)}, arrays)


def removed(network: torch.nn.Module, result: clustering.Clustering) -> dict[str, float]:
    """Return a clustering's columns of the table that `run` returns: what it removes, and its inertia."""
    saved = footprint.savings(network, result)
    return {
        "clusters": result.n_clusters,
        "kernels_removed": 100 * saved.kernels,
        "bytes_removed": 100 * saved.bytes,
        "bytes_removed_fp16": 100 * saved.bytes_fp16,
        "model_bytes_removed": 100 * saved.model_bytes,
        "inertia": result.inertia,
    }


def _evaluation(entry: Entry, data: datasets.ImageSet) -> Evaluation:
    arrays = entry.arrays
    return Evaluation(
        arrays["predictions"],
        arrays["labels"],
        arrays["in_top5"].astype(bool),
        tuple(entry.row["classes"]),
        entry.row["evaluate_seconds"],
    )


def _row(entry: Entry, result: Evaluation, dense: Evaluation) -> dict:
    numbers = {name: value for name, value in entry.row.items() if name != "classes"}
    return DENSE | numbers | accuracy(result, dense)


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
