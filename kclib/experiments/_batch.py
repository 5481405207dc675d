"""Run notebooks in order by papermill, under a profile of parameters, into a folder of reports."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import filelock
import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError
from traitlets.config import Config

from kclib._util import files, progress_bars
from kclib._util.progress_bars import tqdm
from kclib.errors import KclibError, NotebookError, StorageError, reason
from kclib.experiments import _grid, _pictures, _profiles, _provenance, _reports
from kclib.experiments._profiles import Profile
from kclib.experiments._reports import Chapter
from kclib.models import _factories

_LONGEST = 70  # bytes of a folder's path, so that a socket's in it stays below what systems allow, 103 or 107
_START = 600  # seconds that a notebook's process may take to start, among many
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_LOG = logging.getLogger(__name__)


def run(profile: Profile, out: Path) -> Path:
    """Execute a profile's notebooks, each in its own process, and return the path of the index page.

    Under ``out/<profile>/`` each notebook leaves its executed ``.ipynb`` and an ``.html`` for readers;
    ``index.html`` is written anew after each, so an interrupted batch leaves its finished part readable.
    What the store has of the profile's sweep is shown too. Any number of batches may run side by side, each
    into its own folder.

    Raises
    ------
    NotebookError
        Notebooks failed; each is kept with its error, the others ran, and the index says so.
    StorageError
        Another batch writes this report, or nothing can be written there.
    """
    folder = files.expanded(out) / profile.name
    with _ours_alone(folder), _factories.own_modules():
        return _run(profile, folder)


def expected(profile: Profile, out: Path) -> dict[str, float]:
    """Return about how many seconds each notebook takes.

    That is what it took in the last run of this report with the same parameters, or what the profile says.
    """
    folder = files.expanded(out) / profile.name
    took = {
        x.stem: x.seconds
        for x in _reports.read(folder, profile.name).chapters
        if x.status == "done" and _as_given(x.parameters) == _as_given(profile.parameters.get(x.stem, {}))
    }
    return {stem: took.get(stem, seconds) for stem, seconds in profile.seconds.items()}


def summary(seconds: Mapping[str, float]) -> str:
    """Return in one sentence what a batch takes whose notebooks are `expected` to take so many seconds."""
    n, total = len(seconds), sum(seconds.values())
    unit = "minutes:seconds" if total < 3600 else "hours:minutes:seconds"
    time = tqdm.format_interval(round(total))
    return f"{n:,} notebook{'' if n == 1 else 's'} to run, in about {time} ({unit})."


def _as_given(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of a notebook without the folder that a batch adds."""
    return {name: value for name, value in parameters.items() if name != "report_dir"}


def _run(profile: Profile, folder: Path) -> Path:
    seconds = expected(profile, folder.parent)
    print(summary(seconds), file=sys.stderr)
    chapters = [_planned(profile, stem) for stem in profile.parameters]
    about = _provenance.stamp() | _hashes(profile)
    index = _write(folder, profile, chapters, about)
    with tqdm(
        total=sum(seconds.values()),
        desc=f"batch {profile.name}",
        bar_format="{desc}{percentage:3.0f} %|{bar}| {elapsed} elapsed, about {remaining} left",
    ) as bar:
        for i, stem in enumerate(profile.parameters):
            bar.set_description(f"batch {profile.name}, {i + 1} of {len(chapters)}: {stem}")
            try:
                chapters[i] = _run_one(profile, chapters[i], folder, chapters)
            except KeyboardInterrupt:
                chapters[i] = replace(chapters[i], status="interrupted")
                raise
            finally:
                _write(folder, profile, chapters, about)
            bar.update(seconds[stem])
    _show_cells(profile, folder)
    _check(chapters, folder, index)
    return index


def _show_cells(profile: Profile, folder: Path) -> None:
    """Add what notebooks left in the store of the profile's sweep, unless it has none that can be read."""
    try:
        _grid.report_stored(profile, folder.parent)
    except KclibError as error:  # which the notebook that needed it has said already
        _LOG.warning("the report has no table of the sweep: %s", error)


@contextlib.contextmanager
def _ours_alone(folder: Path) -> Iterator[None]:
    """Hold a report's folder against other batches in this block."""
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise StorageError(
            f"another batch is writing {folder}; wait until it is done, or give this one a folder of its own "
            "(--out)."
        ) from error
    except OSError as error:
        raise StorageError(f"{folder} could not be written: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _private() -> Iterator[Config]:
    """Yield the configuration of a notebook's process: it is reached by sockets in a folder of its own.

    TCP ports, and sockets in the notebooks' folder, are what those that start side by side would race for.
    The folder goes with this process, also if that is killed: the shell waits for the end of its input.
    """
    if os.name != "posix":
        yield Config()
        return
    try:
        parents = (tempfile.gettempdir(), "/tmp")
        short = next((x for x in parents if len(os.fsencode(x)) <= _LONGEST), parents[0])
        folder = tempfile.mkdtemp(prefix="kclib-", dir=short)
    except OSError as error:
        raise StorageError(
            f"no temporary folder could be made for the sockets of a notebook's process: {error.strerror}."
        ) from error
    command = ["sh", "-c", 'read _; rm -rf "$1"', "sh", folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}})


def _write(folder: Path, profile: Profile, chapters: list[Chapter], about: dict[str, str]) -> Path:
    """Write the report with these chapters; what a sweep has written there meanwhile is kept."""
    report = _reports.read(folder, profile.name)
    about = report.provenance | about
    return _reports.write(
        folder, replace(report, note=profile.note, chapters=tuple(chapters), provenance=about)
    )


def _check(chapters: list[Chapter], folder: Path, index: Path) -> None:
    """Raise an error that names the notebooks that failed, if there are some."""
    failed = [chapter for chapter in chapters if chapter.status == "failed"]
    if failed:
        several = "notebooks" if len(failed) > 1 else "notebook"
        names = "; ".join(f"{chapter.stem} failed ({chapter.error})" for chapter in failed)
        copies = ", ".join(f"{chapter.stem}.ipynb" for chapter in failed if chapter.seconds)
        where = f"executed copies with the errors are in {folder} ({copies}), and " if copies else ""
        raise NotebookError(f"{several} {names}: {where}{index} says what else was finished.")


def _planned(profile: Profile, stem: str) -> Chapter:
    """Return the chapter of a notebook that is to run."""
    notebook = nbformat.read(profile.folder / f"{stem}.ipynb", as_version=4)
    question = _reports.read_question(notebook)
    return Chapter(stem, "not run", parameters=profile.parameters[stem], question=question)


def _run_one(profile: Profile, chapter: Chapter, folder: Path, among: list[Chapter]) -> Chapter:
    """Execute one notebook and render it; a failure is a status, not an exception."""
    source, target = profile.folder / f"{chapter.stem}.ipynb", folder / f"{chapter.stem}.ipynb"
    target.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    parameters, timeout = dict(chapter.parameters), profile.timeouts.get(chapter.stem)
    if "report_dir" in _profiles.declared(source):
        parameters.setdefault("report_dir", str(folder.resolve()))
    start, error, traceback = time.perf_counter(), "", ""
    try:
        bar = {"desc": chapter.stem, "position": 1, "leave": False} | progress_bars.as_lines(left=False)
        with _private() as config:
            papermill.execute_notebook(
                source,
                target,
                parameters,
                cwd=profile.folder,
                start_timeout=_START,
                execution_timeout=timeout,
                progress_bar=bar,
                config=config,
                extra_arguments=[f"--IPKernelApp.exec_lines={_pictures.ENABLE}"],
                kernel_name="python3",  # this environment's, whatever the file was last saved with
                language="python",
            )
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {reason(failure.evalue)}"
        traceback = _COLOURS.sub("", "\n".join(failure.traceback))
    except CellTimeoutError:
        error = f"a cell ran longer than the {timeout} s that the profile gives it"
    except RuntimeError as failure:  # the process died, or never started
        error = reason(failure).replace("Kernel", "the notebook's process")
    except OSError as failure:  # papermill could not write all of it, such as on a full disk
        error = reason(failure)
        target.unlink(missing_ok=True)
    ended = replace(chapter, error=error, traceback=traceback, parameters=parameters)
    if not target.is_file():
        return replace(ended, status="failed")
    ended = replace(ended, seconds=time.perf_counter() - start)
    notebook = nbformat.read(target, as_version=4)
    if not error and _reports.read_headline(notebook) is None:
        ended = replace(ended, error="it ended without its headline, so its last cell did not run")
    ended = replace(ended, status="failed" if ended.error else "done")
    return _reports.render(notebook, folder, ended, among)


def _hashes(profile: Profile) -> dict[str, str]:
    """Return the SHA-256 of each notebook as it is before it runs."""
    sources = {stem: profile.folder / f"{stem}.ipynb" for stem in profile.parameters}
    return {"notebooks, SHA-256": ", ".join(f"{k} {files.sha256(path)}" for k, path in sources.items())}
