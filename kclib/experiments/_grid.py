"""Plan, run and report a profile's sweep: models, data, scopes, K, methods and seeds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from kclib import datasets, evaluation
from kclib._util import files, progress_bars
from kclib._util.progress_bars import tqdm
from kclib.clustering._scopes import grouping
from kclib.datasets import _loader
from kclib.errors import InvalidValueError
from kclib.experiments import _pool, _reports
from kclib.experiments._cell import Cell, Source, Subject, clustering_key, forget
from kclib.experiments._pool import Workers
from kclib.experiments._profiles import Grid, Profile
from kclib.experiments._reports import Failure
from kclib.kmeans import _fitting
from kclib.store import Entry, Store

# Seconds of clustering 1,634,496 kernels at K = 4,096 on 2 cores; they grow with the number of kernels, and
# with K from there on, by these powers (docs/kmeans-vgg16-fashion.json): where the store has none of these.
_SECONDS, _N, _K, _BY_N, _BY_K = 1.1, 1_634_496, 4096, 0.83, 0.65
_PROBE = 128  # images that are evaluated to know the rate where the store has none
_LATEST = 5  # evaluations of the store that tell the rate: a machine is not as busy today as it was last week
_IMPORTS = 400 << 20  # bytes that a process takes before it has a model
_LOG = logging.getLogger(__name__)
_ORIGIN = ["made", "versions", "commit", "machine", "model", "weights", "data", "images_hash"]


@dataclass(frozen=True)
class Task:
    """One cell of a sweep.

    Attributes
    ----------
    source : Source
    cell : Cell
    key : dict
        Of its entry in the store.
    stored : bool
        Whether the store has it, whole, and it is not to be computed again.
    seconds : float
        What it will take, about; 0 if it is stored.
    memory : int
        Bytes that a process will take for it, about; 0 if it is stored.
    again : bool
        Whether it is computed even if the store has it.
    """

    source: Source
    cell: Cell
    key: dict
    stored: bool
    seconds: float = 0.0
    memory: int = 0
    again: bool = False

    def __str__(self) -> str:
        cell = self.cell
        what = f"scope {cell.scope}, K = {cell.k:,}, {cell.method}, seed {cell.seed}"
        return f"{self.source.model} on {self.source.data}: {'dense' if cell == Cell() else what}"


def plan(grid: Grid, store: Store, *, estimated: bool = True, rerun: bool = False) -> list[Task]:
    """Return the cells of a sweep, the longest first.

    Times are those of cells like it in the store, where there are some: seconds an image of this model,
    lately, and seconds of clustering these kernels at the nearest K. Else a few images are evaluated to know,
    and clustering takes what `make bench` measured.

    Parameters
    ----------
    grid : Grid
    store : Store
    estimated : bool
        Whether time and memory of what is missing are wanted; else both are 0, and nothing is evaluated.
    rerun : bool
        Whether what is stored is to be computed again; each entry is kept until its cell is begun.

    Raises
    ------
    KclibError
        Any model or data set that cannot be had, or a level that none of them can have.
    """
    planned, options = [], (grid.folder, grid.limit, grid.precision, grid.device, str(store.root))
    forget()  # files may be others than at the last plan
    for model in grid.models:
        for data in grid.data:
            source = Source(model, data, *options)
            subject = source.load()
            cells = subject.cells(grid.clusters, grid.scopes, grid.methods, grid.seeds)
            keys = [subject.key_of(cell) for cell in cells]
            tasks = [
                Task(source, cell, key, stored=not rerun and store.get(key) is not None, again=rerun)
                for cell, key in zip(cells, keys, strict=True)
            ]
            planned += _estimated(subject, tasks) if estimated else tasks
    return sorted(planned, key=lambda task: -task.seconds)


def run(tasks: Sequence[Task], workers: Workers, *, progress: bool = True) -> list[Failure]:
    """Compute what is not stored and return what failed; every finished cell is in the store at once.

    What the store no longer has at the end, because someone removed or damaged it meanwhile, is computed once
    more.

    Parameters
    ----------
    tasks : sequence of Task
        From `plan`.
    workers : Workers
    progress : bool

    Raises
    ------
    StorageError
        The store cannot be written to.
    """
    missing = [x for x in tasks if not x.stored]
    for task in missing[:1]:  # in place of failing in each
        files.check_output(Store(task.source.root).path(task.key), ours=True)
    failed = _run(missing, len(tasks), workers, progress)
    if gone := _gone(tasks, failed):
        _LOG.warning("%s: gone from the store, or damaged; computed again.", "; ".join(map(str, gone)))
        failed += _run([replace(x, stored=False, again=False) for x in gone], len(tasks), workers, progress)
        failed += [
            Failure(str(x), "its result is gone from the store again", "") for x in _gone(gone, failed)
        ]
    return failed


def table(tasks: Sequence[Task], store: Store) -> pd.DataFrame:
    """Return what is stored of a sweep's cells: `Subject.table` of each model and data set in turn.

    Cells of a model and data set whose dense cell is missing are left out: drops are against it.
    """
    by_source = {}
    for task in tasks:
        by_source.setdefault(task.source, []).append(task)
    tables = [_table(source, tasks, store) for source, tasks in by_source.items()]
    return pd.concat([x for x in tables if len(x)] or [pd.DataFrame()], ignore_index=True)


def report(
    profile: Profile, tasks: Sequence[Task], store: Store, failures: Sequence[Failure], out: Path
) -> Path:
    """Write what is stored of a sweep into the profile's report and return the path of its index page.

    What a batch wrote there is kept.
    """
    folder, results = files.expanded(out) / profile.name, table(tasks, store)
    missing, about = len(tasks) - len(results), _levels(profile) | _origin(results)
    picture = _reports.picture(results) if len(results) else ""
    old = _reports.read(folder, profile.name)  # so late because a batch may be at it
    described = replace(
        old,
        note=old.note or profile.note,
        failures=tuple(failures),
        missing=f"{missing:,} of {len(tasks):,} cells" if missing else "",
        results=results if len(results) else None,
        picture=picture,
        provenance={name: text for name, text in (old.provenance | about).items() if text},
    )
    return _reports.write(folder, described)


def report_stored(profile: Profile, out: Path) -> None:
    """Write what the store has of a profile's sweep, if it has one, into the profile's report.

    Nothing is computed; failures of cells that are stored by now are dropped.
    """
    if profile.sweep is None:
        return
    store = Store()
    tasks = plan(profile.sweep, store, estimated=False)
    if any(task.stored for task in tasks):
        missing = {str(task) for task in tasks if not task.stored}
        failures = _reports.read(files.expanded(out) / profile.name, profile.name).failures
        report(profile, tasks, store, [x for x in failures if x.what in missing], out)


def summary(tasks: Sequence[Task], workers: Workers) -> str:
    """Return in one sentence what a plan takes."""
    missing = [task for task in tasks if not task.stored]
    side = min(workers.n_jobs, len(missing))
    text = f"{len(tasks):,} cells, {len(tasks) - len(missing):,} of them stored"
    if not missing:
        return f"{text}; nothing is left to compute."
    seconds = max(sum(x.seconds for x in missing) / side, max(x.seconds for x in missing))
    most = sum(sorted((x.memory for x in missing), reverse=True)[:side])
    time = tqdm.format_interval(round(seconds))
    unit = "minutes:seconds" if seconds < 3600 else "hours:minutes:seconds"
    text += f"; the rest takes about {time} ({unit}) with {side} at a time"
    return f"{text}, in {most / 2**30:.1f} GiB."


def as_table(tasks: Sequence[Task]) -> pd.DataFrame:
    """Return a plan for readers: a row a cell, with ``stored``, ``seconds`` and ``GiB``, as estimated."""
    rows = [
        {"model": str(x.source.model), "data": x.source.data}
        | asdict(x.cell)
        | {"stored": x.stored, "seconds": round(x.seconds, 1), "GiB": round(x.memory / 2**30, 2)}
        for x in tasks
    ]
    return pd.DataFrame(rows)


def check_runs(subject: Subject) -> None:
    """Raise a `KclibError` if every cell of a subject would fail: its model does not run on its images."""
    if not (subject.data.labels >= 0).any():
        raise InvalidValueError(f"{subject.data.name} has no images of known class; it needs one.")
    evaluation.evaluate(
        subject.model,
        _few(subject.data, 1),
        precision=subject.precision,
        device=subject.device,
        progress=False,
    )


class Rates:
    """What cells of a subject take, from those that the store has."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.evaluations = self._those(
            "evaluation", weights=subject.key["weights"], precision=subject.precision
        )
        self.clusterings = self._those("clustering", kernels=subject.bank.fingerprint)

    def seconds(self, cell: Cell) -> float:
        """Return about how long a cell takes."""
        clustering = 0.0 if cell == Cell() else self._clustering(cell)
        return clustering + self._an_image * len(self.subject.data)

    def memory(self, cell: Cell) -> int:
        """Return about how many bytes a process takes for a cell."""
        bank, network = self.subject.bank, self.subject.model.network
        dense = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
        images = self.subject.data.images
        held = getattr(images, "nbytes", 0)
        groups = [] if cell == Cell() else grouping(bank, cell.scope).values()
        largest = max((sum(layer.n_kernels for layer in layers) for layers in groups), default=0)
        k = min(cell.k, largest)
        fit = _fitting.memory(largest, bank.points.shape[1], k) if largest else 0
        # The network, the one with other kernels, the copy that runs; the bank, and what stands for it.
        return _IMPORTS + 3 * dense + held + 2 * bank.kernels.nbytes + fit

    @cached_property
    def _an_image(self) -> float:
        if len(self.evaluations):
            latest = self.evaluations.sort_values("made").tail(_LATEST)
            return float((latest.evaluate_seconds / latest.images).median())
        return _probed(self.subject)

    def _clustering(self, cell: Cell) -> float:
        n = len(self.subject.bank)
        seconds, k, like = _SECONDS * (n / _N) ** _BY_N, _K, self.clusterings
        like = like[like.method == cell.method] if len(like) else like
        if len(like):
            nearest = like.iloc[np.argmin(abs(np.log(like.k.astype(float) / cell.k)))]
            seconds, k = float(nearest.seconds), int(nearest.k)
        return seconds * (max(cell.k, _K) / max(k, _K)) ** _BY_K

    def _those(self, kind: str, **values: str) -> pd.DataFrame:
        rows = self.subject.store.table(kind)
        if not len(rows):
            return rows
        return rows[np.logical_and.reduce([rows[name] == value for name, value in values.items()])]


def _probed(subject: Subject) -> float:
    """Return the seconds an image takes, from a few of them.

    They are evaluated twice and timed the second time: the first also makes threads and takes memory, which
    costs as much as hundreds of images.
    """
    few, options = _few(subject.data, _PROBE), {"precision": subject.precision, "device": subject.device}
    for _ in range(2):
        probe = evaluation.evaluate(subject.model, few, progress=False, **options)
    return probe.seconds / len(few)


def _few(data: datasets.ImageSet, n: int) -> datasets.ImageSet:
    known = _loader.known(data)
    return datasets.limited(known, min(n, len(known)))


def _run(missing: Sequence[Task], n_cells: int, workers: Workers, progress: bool) -> list[Failure]:
    """Compute cells and return what failed."""
    failed, n_stored = [], n_cells - len(missing)
    if not missing:
        return failed
    with tqdm(
        total=sum(x.seconds for x in missing), desc=f"sweep, {n_stored} of {n_cells} cells",
        bar_format="{desc} {percentage:3.0f} %|{bar}| {elapsed} elapsed, about {remaining} left{postfix}",
        disable=not progress,
    ) as bar, progress_bars.ticking(bar):  # fmt: skip
        compute = partial(_compute, progress=progress and not workers.apart)
        for done, outcome in enumerate(_pool.run(compute, missing, workers), n_stored + 1):
            task = missing[outcome.place]
            if outcome.error:
                failed.append(Failure(str(task), outcome.error, outcome.traceback))
            bar.set_description_str(f"sweep, {done} of {n_cells} cells", refresh=False)
            bar.set_postfix_str(f"{'failed' if outcome.error else 'done'}: {task}", refresh=False)
            bar.update(task.seconds)
    return failed


def _gone(tasks: Sequence[Task], failed: Sequence[Failure]) -> list[Task]:
    """Return tasks that did not fail and whose results are not in the store."""
    told = {x.what for x in failed}
    return [x for x in tasks if str(x) not in told and Store(x.source.root).get(x.key) is None]


def _estimated(subject: Subject, tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with time and memory of what is missing, once it is known that they can run at all."""
    if all(task.stored for task in tasks):
        return list(tasks)
    check_runs(subject)
    rates = Rates(subject)
    return [
        x if x.stored else replace(x, seconds=rates.seconds(x.cell), memory=rates.memory(x.cell))
        for x in tasks
    ]


def _levels(profile: Profile) -> dict[str, str]:
    """Return what the sweep of a profile goes over, for readers."""
    levels = asdict(profile.sweep)
    levels |= {"models": profile.sweep.models}
    del levels["folder"]  # of this machine
    text = "; ".join(
        f"{k} {', '.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for k, v in levels.items()
    )
    return {"sweep": text}


def _origin(results: pd.DataFrame) -> dict[str, str]:
    """Return where results come from: when, by which versions and where each was computed, and of what."""
    rows = results.reindex(columns=_ORIGIN)  # an empty table has no columns yet
    made = sorted(rows.made)
    origin = {"sweep, made": " to ".join(dict.fromkeys([*made[:1], *made[-1:]]))}
    for name in ("versions", "commit", "machine"):
        origin[f"sweep, {name}"] = "; ".join(rows[name].unique())
    for what, name, digest in (("weights", "model", "weights"), ("images", "data", "images_hash")):
        pairs = rows[[name, digest]].drop_duplicates().itertuples(index=False)
        origin[f"{what}, SHA-256"] = ", ".join(" ".join(pair) for pair in pairs)
    return origin


def _table(source: Source, tasks: Sequence[Task], store: Store) -> pd.DataFrame:
    subject = source.load()
    entries: dict[Cell, Entry] = {task.cell: entry for task in tasks if (entry := store.get(task.key))}
    if Cell() not in entries:
        return pd.DataFrame()
    cells = sorted(entries, key=lambda x: (x != Cell(), x.method, x.seed, x.scope != "layer", x.scope, x.k))
    shown = subject.table(cells, [entries[cell] for cell in cells])
    return shown.assign(model=str(source.model))  # two weights of one model are two


def _forget(task: Task, subject: Subject) -> None:
    """Remove what the store has of a cell, its clustering included."""
    subject.store.path(task.key).unlink(missing_ok=True)
    if task.cell != Cell():
        subject.store.path(_clustering_key(subject, task.cell)).unlink(missing_ok=True)


def _compute(task: Task, wait: bool, n_threads: int, *, progress: bool) -> bool:
    """Compute a cell, unless another process is at it; runs wherever joblib sends it."""
    subject = task.source.load()
    if subject.key_of(task.cell) != task.key:  # a worker that outlives a sweep remembers files of before
        forget()
        subject = task.source.load()
    if subject.key_of(task.cell) != task.key:
        raise InvalidValueError(
            f"{task.source.model} on {task.source.data} is not the same on the machine of this worker; "
            "weights, images and packages must be."
        )
    if task.again:
        _forget(task, subject)
    return subject.entry(task.cell, wait=wait, n_threads=n_threads, progress=progress) is not None


def _clustering_key(subject: Subject, cell: Cell) -> dict:
    levels = {"scope": cell.scope, "method": cell.method, "seed": cell.seed}
    return clustering_key(subject.bank, cell.k, **levels)
