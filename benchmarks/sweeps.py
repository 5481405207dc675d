"""What a sweep costs beyond its cells, and what workers side by side win.

Cells a second of a sweep that is stored, the speed-up of two jobs over one, what the store and papermill cost
over plain calls, and whether a Dask cluster of this machine leaves the same table as loky.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import torch
from nbformat import v4

import kclib
from kclib import compression
from kclib._util import files
from kclib.compression import byte_counts
from kclib.experiments import _grid
from kclib.experiments._pool import Workers
from kclib.experiments._profiles import Grid, ModelSource
from kclib.store import Store

REPEATS = 3
CELLS = Grid(
    (ModelSource("vgg16-fashion"),), ("fashion-mnist",), limit=500, scopes=("layer", "global"),
    clusters=(16, 64, 256, 1024, 4096, 16384),
)  # fmt: skip
IMPORTS = "import torch\nfrom kclib import kernels, models"
WORK = "print(len(kclib.extract(kclib.load_model())))"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def swept(store: Store, workers: Workers) -> None:
    failed = _grid.run(_grid.plan(CELLS, store), workers, progress=False)
    assert not failed, failed


def plain(model: kclib.Model, data: kclib.ImageSet) -> None:
    """Do what the cells of a sweep do, by calls without a store."""
    bank = kclib.extract(model)
    kclib.evaluate(model, data, progress=False)
    for scope in CELLS.scopes:
        for k in CELLS.clusters:
            found = kclib.cluster(bank, k, scope=scope, progress=False)
            small = kclib.Model(model.name, compression.replaced(model, found), model.preprocess)
            kclib.evaluate(small, data, progress=False)
            byte_counts.removed(model, found)


def notebook(folder: Path) -> Path:
    cells = [v4.new_code_cell(IMPORTS), v4.new_code_cell(WORK)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "work.ipynb")
    return folder / "work.ipynb"


def main() -> None:
    model, data = kclib.load_model(), kclib.load_data(limit=CELLS.limit)
    rows = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    times = {"plain calls": [], "one job": [], "two jobs": [], "dask, two jobs": [], "stored": []}
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name for name in ("one", "two", "dask")}
        plain(model, data)  # warm up
        for i in range(REPEATS):  # in turn, so that a drifting machine slows all
            store = {name: Store(path / str(i)) for name, path in stores.items()}
            times["plain calls"].append(seconds(lambda: plain(model, data)))
            times["one job"].append(seconds(lambda x=store["one"]: swept(x, Workers(1))))
            times["two jobs"].append(seconds(lambda x=store["two"]: swept(x, Workers(2))))
            times["dask, two jobs"].append(seconds(lambda x=store["dask"]: swept(x, Workers(2, "dask"))))
            options = {"scopes": CELLS.scopes, "store": store["one"]}
            times["stored"].append(seconds(lambda o=options: kclib.sweep(model, data, CELLS.clusters, **o)))
        planned = {name: _grid.plan(CELLS, store[name], estimated=False) for name in store}
        timed = ["cluster_seconds", "evaluate_seconds", "made"]
        tables = {name: _grid.table(planned[name], store[name]).drop(columns=timed) for name in store}
        n = len(tables["one"])
        path = notebook(Path(folder))
        command = [sys.executable, "-c", f"{IMPORTS}\n{WORK}"]
        script = [
            seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(REPEATS)
        ]
        options = {"progress_bar": False, "kernel_name": "python3"}
        book = [seconds(lambda: papermill.execute_notebook(path, None, **options)) for _ in range(REPEATS)]
    middle = {name: statistics.median(found) for name, found in times.items()}
    rows |= {f"{name} (s)": x for name, x in middle.items()} | {
        "cells": n,
        "stored (cells/s)": n / middle["stored"],
        "two jobs over one": middle["one job"] / middle["two jobs"],
        "store over plain calls": middle["one job"] / middle["plain calls"],
        "papermill over a script (s)": statistics.median(book) - statistics.median(script),
        "script (s)": statistics.median(script),
        "dask equals loky": tables["dask"].equals(tables["two"]),
        "two jobs equal one": tables["two"].equals(tables["one"]),
    }
    print(
        "\n".join(
            f"{name:>28}  {x:.3g}" if isinstance(x, float) else f"{name:>28}  {x}" for name, x in rows.items()
        )
    )
    with files.replacing(Path("reports/bench/sweeps.json")) as temporary:
        temporary.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
