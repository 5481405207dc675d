"""Every combination of pruning, clustering and quantizing, evaluated; and whether their losses add up."""

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from kclib import datasets, evaluation, models, recovery
from kclib._util import checks, threads
from kclib._util.progress_bars import tqdm
from kclib.clustering._scopes import largest
from kclib.combination import _pruning
from kclib.combination._pipeline import Cluster, Given, Pipeline, Prune, Quantize, Train
from kclib.combination._stages import Stage
from kclib.compression import byte_counts
from kclib.evaluation import _accuracy
from kclib.evaluation._cells import Cells
from kclib.kernels import KernelBank
from kclib.models import _model
from kclib.store import Entry, Store
from kclib.training import Recipe

ORDERS = ("prune first", "cluster first")
# What a cell is: its levels, those of the dense model here.
_LEVELS = ("pruned", "sparsity", "clusters", "scope", "precision", "order", "seed")
_CELL = dict.fromkeys(_LEVELS) | {"sparsity": 0.0}
_GIVEN = ("pruned", "sparsity", "clustering", "precision", "order", "bytes", "ratio")


def cells(
    sparsities: Iterable[float] = (0, 0.3, 0.5, 0.7),
    clusters: Iterable[int | None] = (None, 64, 256, 4096),
    scopes: Iterable[str] = ("layer", "global"),
    precisions: Iterable[str | None] = (None, "fp16", "int8", "int4"),
    orders: Iterable[str] = ("prune first",),
    seeds: Iterable[int] = (0, 1, 2),
    *,
    pruned: Iterable[str] = ("kernels",),
    bank: KernelBank | None = None,
) -> list[dict]:
    """Return every combination of these levels once.

    Parameters
    ----------
    sparsities : iterable of float
        Shares of the kernels, filters or weights that are pruned (`_pipeline.Prune`); 0 for none.
    clusters, scopes
        K, and who shares a codebook (`_pipeline.Cluster`); None clusters nothing.
    precisions : iterable of str or None
        Of the codebooks, or of the kernels where none are clustered (`_pipeline.Quantize`), always last;
        None rounds nothing.
    orders : iterable of {"prune first", "cluster first"}
    seeds : iterable of int
        Of the clustering.
    pruned : iterable of {"kernels", "filters", "weights"}
        What is pruned, one of them in a cell. Single weights that are pruned first do not stay zero in
        representatives; clustered first, they are those of the codebooks.
    bank : KernelBank, optional
        Leaves out a K above the kernels of the largest group that its scope makes of this bank.

    Returns
    -------
    list of dict
        By ``pruned``, ``sparsity``, ``clusters``, ``scope``, ``precision``, ``order`` and ``seed``. What does
        not matter is None: what is pruned at a sparsity of 0, scope and seed where nothing is clustered,
        order but where something is pruned and clustered.
    """
    unique = {}
    names = ("pruned", "sparsities", "clusters", "scopes", "precisions", "orders", "seeds")
    levels = map(checks.several, names, (pruned, sparsities, clusters, scopes, precisions, orders, seeds))
    for kind, sparsity, k, scope, precision, order, seed in itertools.product(*levels):
        checks.check_known("kind of pruning", kind, _pruning.KINDS)
        checks.check_known("order", order, ORDERS)
        checks.check_share("sparsity", sparsity)
        order = order if sparsity and k is not None else None
        if k is None:
            scope, seed = None, None
        else:
            k, seed = checks.check_whole("clusters", k, 1), checks.check_seed(seed)
            if bank is not None and k > largest(bank, scope):
                continue
        values = kind if sparsity else None, float(sparsity), k, scope, precision, order, seed
        unique[values] = dict(zip(_CELL, values, strict=True))
    return list(unique.values())


def pipeline(cell: Mapping) -> Pipeline:
    """Return the steps that make a cell's network.

    Parameters
    ----------
    cell : mapping
        From `cells`, or a row of what `run` returns.
    """
    levels = {name: None if pd.isna(cell[name]) or cell[name] == "none" else cell[name] for name in _CELL}
    steps = [Prune(float(levels["sparsity"]), levels["pruned"])] if levels["sparsity"] else []
    if levels["clusters"] is not None:
        steps.append(Cluster(int(levels["clusters"]), levels["scope"]))
    if levels["order"] == "cluster first":
        steps.reverse()
    return Pipeline((*steps, *_rounding(levels["precision"])))


def run(
    model: models.Model,
    data: datasets.ImageSet,
    cells: Iterable[dict],
    *,
    store: Store | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    progress: bool = True,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Make and evaluate the network of each cell, or look up what it answered.

    Cells that differ in their precision alone share one clustering.

    Parameters
    ----------
    model : Model
        Dense; unchanged.
    data : ImageSet
    cells : iterable of dict
        From `cells`.
    store : Store, optional
        Where finished cells are looked for and kept; the default store if None.
    precision, device : str
        As in `evaluation.evaluate`.
    progress : bool
    n_jobs : int
        Threads, which compute different cells; the result is the same for any number.

    Returns
    -------
    pandas.DataFrame
        One row a cell: those of `cells`, with "none" and missing numbers for None; ``clustering``, K and
        scope in words; ``bytes`` of all convolutions as `combination.Combined.n_bytes`, and ``ratio`` of the
        dense ones' to them; what `accuracy.accuracy` says, with paired intervals against the dense model;
        ``images``, their number, and ``right``, which are answered rightly, a bit each (`numpy.packbits`).

    Raises
    ------
    InvalidValueError, UnknownNameError
        As in the steps and in `evaluation.evaluate`.
    """
    model, data = _model.as_model(model), datasets.as_image_set(data)
    sheet = _Sheet(model, data, store or Store(), precision, device)
    wanted = [{name: cell[name] for name in _CELL} for cell in cells]
    groups = _by_clustering([_CELL, *wanted])
    n_cells, lock = sum(map(len, groups)), threading.Lock()
    with tqdm(total=n_cells, desc="combinations", unit="cell", delay=2, disable=not progress) as bar:

        def done() -> None:
            with lock:
                bar.update()

        parts = threads.side_by_side(lambda i: sheet.entries(groups[i], done), len(groups), n_jobs)
    entries = {_values(entry.key["cell"]): entry for part in parts for entry in part}
    dense, n_bytes = sheet.answers(entries[_values(_CELL)]), byte_counts.convolution_bytes(model.network)
    chosen = [entries[_values(cell)] for cell in wanted]
    rows = [
        _row(cell, entry, n_bytes) | sheet.compared(entry, dense)
        for cell, entry in zip(wanted, chosen, strict=True)
    ]
    return pd.DataFrame(rows).astype({"clusters": "Int64", "seed": "Int64"})


def trained(
    model: models.Model,
    data: datasets.ImageSet,
    table: pd.DataFrame,
    train: datasets.ImageSet,
    folder: str | Path,
    *,
    recipe: Recipe = recovery.RECIPE,
    precision: str = "fp32",
    device: str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Train some combinations, the dense model as teacher (`_pipeline.Train`), and evaluate them again.

    Parameters
    ----------
    model, data, precision, device, progress
        As in `run`.
    table : pandas.DataFrame
        Rows of what `run` returns.
    train : ImageSet
        Training images.
    folder : path
        Where the states of the trainings go, one for each recipe; the same call resumes.
    recipe : Recipe

    Returns
    -------
    pandas.DataFrame
        One row a combination, by the index of `table`: ``pruned``, ``sparsity``, ``clustering``,
        ``precision``, ``order``, ``bytes`` and ``ratio`` as given, bytes before training; ``untrained``, the
        points it lost; what `accuracy.accuracy` says of it trained.

    Raises
    ------
    InvalidValueError, DamagedFileError
        As `recovery.finetune`.
    """
    model, data, train = _model.as_model(model), datasets.as_image_set(data), datasets.as_image_set(train)
    options = {"precision": precision, "device": device, "progress": progress}
    dense, rows = evaluation.evaluate(model, data, **options), []
    bar = tqdm(table.iterrows(), desc="training", unit="network", total=len(table), disable=not progress)
    for _, row in bar:
        given = {"train": train, "folder": folder, "device": device, "progress": False}
        steps, seed = pipeline(row) >> Train(recipe), 0 if pd.isna(row.seed) else int(row.seed)
        network = steps.run(model, seed=seed, **given).model.network
        answers = evaluation.evaluate(replace(model, network=network), data, **options)
        before = {name: row[name] for name in _GIVEN} | {"untrained": row["drop"]}
        rows.append(before | _accuracy.accuracy(answers, dense))
    return pd.DataFrame(rows, table.index)


class _Sheet(Cells):
    """Compute the cells of a model and images, each a combination, and keep them in a store."""

    @cached_property
    def key(self) -> dict:
        """What all cells depend on."""
        return {
            "kind": "combination",
            "model": [self.model.name, models.fingerprint(self.model.network)],
            "input": _accuracy.input_fingerprint(self.model, self.data),
            "data": [self.data.name, self.data.fingerprint],
            "evaluated": self.precision,
        }

    def entries(self, cells: list[dict], done: Callable[[], None]) -> list[Entry]:
        """Return the entries of cells that differ only in their precision; each is stored once computed."""
        stage, result = None, []

        def compute() -> Entry:
            nonlocal stage
            stage = stage or self._before_rounding(cell)
            return self._computed(cell, stage)

        for cell in cells:
            result.append(self.store.once(self.key | {"cell": cell}, compute))
            done()
        return result

    def _before_rounding(self, cell: dict) -> Stage:
        stage, given = Stage.of(self.model), Given(self.model, seed=cell["seed"] or 0, progress=False)
        for step in pipeline(cell | {"precision": None}).steps:
            stage = step.after(stage, given)
        return stage

    def _computed(self, cell: dict, stage: Stage) -> Entry:
        for step in _rounding(cell["precision"]):
            stage = step.after(stage, Given(self.model))
        row = {"bytes": stage.n_bytes(stage.final())}
        return self.evaluated(self.key | {"cell": cell}, stage.model, row)


def _rounding(precision: str | None) -> tuple[Quantize, ...]:
    return () if precision is None else (Quantize(precision),)


def _values(cell: dict) -> tuple:
    return tuple(cell[name] for name in _CELL)


def _by_clustering(cells: list[dict]) -> list[list[dict]]:
    """Return the distinct cells in groups; those of a group differ only in their precision."""
    groups = {}
    for cell in {_values(cell): cell for cell in cells}.values():
        groups.setdefault(_values(cell | {"precision": None}), []).append(cell)
    return list(groups.values())


def _row(cell: dict, entry: Entry, n_bytes: int) -> dict:
    """Return the levels of a cell in words, and its bytes."""
    k = cell["clusters"]
    words = {name: cell[name] or "none" for name in ("pruned", "scope", "precision", "order")}
    words["clustering"] = "none" if k is None else f"{k} {cell['scope']}"
    return cell | words | {"bytes": entry.row["bytes"], "ratio": n_bytes / entry.row["bytes"]}
