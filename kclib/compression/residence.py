"""What a model takes in memory while it runs, seen from outside: a fresh process, watched as it works."""

import contextlib
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pandas as pd
import psutil
import torch

from kclib import models
from kclib.compression import _checkpoint, _container
from kclib.errors import KclibError
from kclib.models import _inference

_INTERVAL = 0.002  # seconds between two looks
_PAUSE = 0.15  # seconds of rest before, between and after what is measured
# glibc then gives freed memory back at once. By default it keeps some, how much depends on what came before.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Residence:
    """The resident memory of one process over time.

    Attributes
    ----------
    trace : pandas.DataFrame
        ``seconds`` since loading began, ``bytes`` above what the process had then, and ``phase``:
        ``loading``, ``loaded``, ``answering``, ``answered``.
    """

    trace: pd.DataFrame

    @property
    def model(self) -> int:
        """Bytes of the model: the median once it is loaded and has answered an image."""
        return int(self.trace.bytes[self.trace.phase == "answered"].median())

    @property
    def peak(self) -> int:
        """Most bytes at any look while it answered."""
        return int(self.trace.bytes[self.trace.phase == "answering"].max())


def measure(
    path: str | Path,
    *,
    architecture: str | None = None,
    resident: str = "packed",
    answers: int = 10,
    input_shape: tuple[int, int, int] | None = None,
) -> Residence:
    """Load a compressed model in a fresh process and let it answer one image, several times over.

    What Python, torch and its libraries take for themselves is there before: the process has already loaded
    the file, answered, and dropped the model, in the same way. It is looked at from outside every 2 ms. On
    Linux freed memory is given back before each rest: what is seen then is what is held.

    Parameters
    ----------
    path : path
        A file that `_checkpoint.save` wrote.
    architecture : str, optional
    resident : {"packed", "dense"}
        As in `_checkpoint.load`.
    answers : int
    input_shape : (int, int, int), optional
        Channels, height and width of the image; by default `models.input_shape` of the model.

    Raises
    ------
    KclibError
        As `_checkpoint.load`, or if the process fails.
    """
    options = {"architecture": architecture, "answers": answers, "input_shape": input_shape}
    return measure_each(path, [resident], **options)[resident]


def measure_each(
    path: str | Path,
    residents: Iterable[str] = ("packed", "dense"),
    *,
    architecture: str | None = None,
    answers: int = 10,
    input_shape: tuple[int, int, int] | None = None,
) -> dict[str, Residence]:
    """Measure a compressed model as `measure` does, kept in each of these ways.

    The processes start side by side, since that takes seconds, and are watched one after the other.
    """
    _container.inspect(path)
    with contextlib.ExitStack() as stack:
        started = {}
        for resident in residents:
            told = str(path), architecture or "", resident, str(answers), json.dumps(input_shape)
            started[resident] = stack.enter_context(_started(told))
        for child, _ in started.values():
            child.stdout.readline()  # it is warm
        return {resident: _watched(*each, path) for resident, each in started.items()}


@contextlib.contextmanager
def _started(told: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen, TextIO]]:
    """Yield a process that waits for a word to begin, and the file of its errors."""
    command = [sys.executable, "-m", "kclib.compression.residence", *told]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody empties would hold the process up
        subprocess.Popen(command, text=True, env=os.environ | _GIVE_BACK, stderr=errors, **pipes) as child,
    ):
        yield child, errors


def _watched(child: subprocess.Popen, errors: TextIO, path: str | Path) -> Residence:
    """Let a process begin, and look at it until it ends."""
    watched, looks = psutil.Process(child.pid), []
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(child.communicate, "go\n")
        while not said.done():
            if (held := _resident(watched)) is not None:
                looks.append((time.time(), held))
            time.sleep(_INTERVAL)
        out, _ = said.result()
    errors.seek(0)
    last = (errors.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    if child.returncode:
        raise KclibError(f"the process that was to run {path} failed: {last}")
    return _residence(looks, json.loads(out))


def _resident(process: psutil.Process) -> int | None:
    try:
        return process.memory_info().rss or None  # 0 once it has ended
    except psutil.Error:
        return None


def _residence(looks: list[tuple[float, int]], ends: dict[str, float]) -> Residence:
    """Put looks into the phases whose ends the process told."""
    trace = pd.DataFrame(looks, columns=["seconds", "bytes"])
    resting = trace.seconds.between(ends.get("rest", -math.inf), ends["begin"], inclusive="left")
    before = trace.bytes[resting].median()
    names = ["loading", "loaded", "answering", "answered"]
    edges = [ends[name] for name in ("begin", *names)]
    trace["phase"] = pd.cut(trace.seconds, edges, labels=names, right=False).astype(object)
    trace = trace.dropna(subset="phase").reset_index(drop=True)
    return Residence(trace.assign(seconds=trace.seconds - ends["begin"], bytes=trace.bytes - before))


def _run(
    path: str, architecture: str, resident: str, answers: int, shape: list[int] | None
) -> dict[str, float]:
    """Load, rest, answer, rest; return when each began or ended."""
    ends = {"begin": time.time()}
    model = _checkpoint.load(path, architecture=architecture or None, resident=resident)
    _give_back()
    ends["loading"] = time.time()
    time.sleep(_PAUSE)
    images = torch.zeros(
        1, *(shape or models.input_shape(model)), dtype=_inference.precision_of(model.network)
    )
    ends["loaded"] = time.time()
    for _ in range(answers):
        _inference.run(model.network, images)
    _give_back()
    ends["answering"] = time.time()
    time.sleep(_PAUSE)
    return ends | {"answered": time.time()}


def _give_back() -> None:
    """Free what is no longer held, so that it is not seen any more."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _main() -> None:
    torch.set_grad_enabled(False)
    path, architecture, resident, answers, shape = *sys.argv[1:4], int(sys.argv[4]), json.loads(sys.argv[5])
    _run(path, architecture, resident, 2, shape)
    print("warm", flush=True)
    sys.stdin.readline()
    _give_back()
    rest = {"rest": time.time()}
    time.sleep(_PAUSE)
    print(json.dumps(rest | _run(path, architecture, resident, answers, shape)))


if __name__ == "__main__":
    _main()
