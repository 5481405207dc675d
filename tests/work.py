"""Tasks for the tests of work side by side, importable by the processes that do it."""

import os
import signal
import sys
import time
from pathlib import Path

from threadpoolctl import threadpool_info

_under_way = []


def do(task, wait, n_threads):
    """Do what a task ``(folder, name)`` is named for; each call appends a line to the file of its name."""
    folder, name = task
    path = Path(folder) / name
    again = path.exists()
    with open(path, "a") as file:
        file.write(f"{wait} {n_threads} {max([x['num_threads'] for x in threadpool_info()], default=1)}\n")
    action = name.split("-")[0]
    if action == "raises":
        raise ZeroDivisionError(f"{name} was divided\nby zero")
    if action == "exits":
        sys.exit(3)
    if action == "dies" or (action == "dies_once" and not again):
        os.kill(os.getpid(), signal.SIGKILL)
    return wait or action != "elsewhere"


def count(task, wait, n_threads):
    """Fail by telling how many are counted at once, in threads of one process."""
    _under_way.append(task)
    n = len(_under_way)
    time.sleep(0.2)
    _under_way.remove(task)
    raise ValueError(n)


def calls(folder) -> dict[str, list[str]]:
    """Return the lines of each task that was called."""
    return {path.name: path.read_text().splitlines() for path in Path(folder).iterdir()}
