"""Run notebooks in order by papermill, under a profile of parameters, into a folder of reports."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import filelock
import nbformat
import papermill
import psutil
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellTimeoutError
from traitlets.config import Config

from kclib._util import checks, files, limits, places, progress_bars, threads
from kclib._util.progress_bars import tqdm
from kclib.errors import KclibError, NotebookError, StorageError, reason
from kclib.experiments import _grid, _pictures, _profiles, _provenance, _reports
from kclib.experiments._profiles import Profile
from kclib.experiments._reports import Chapter
from kclib.models import _factories

_LONGEST = 70  # bytes of a folder's path, so that a socket's in it stays below what systems allow, 103 or 107
_START = 600  # seconds that a notebook's process may take to start, among many
_HEARD = 0.1  # seconds between questions whether a notebook has ended
_MEMORY = 4 << 30  # bytes that a notebook may take on the shipped model
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_LOG = logging.getLogger(__name__)


def run(profile: Profile, out: Path, jobs: int = 1) -> Path:
    """Execute a profile's notebooks, each in its own process, and return the path of the index page.

    Under ``out/<profile>/`` each notebook leaves its executed ``.ipynb`` and an ``.html`` for readers;
    ``index.html`` is written anew after each, so an interrupted batch leaves its finished part readable.
    What the store has of the profile's sweep is shown too. Any number of batches may run side by side, each
    into its own folder.

    Parameters
    ----------
    profile : Profile
    out : path
    jobs : int
        Notebooks side by side, which share the processors; the longest start first. Those that the profile
        runs alone, because they measure time, follow one by one.

    Raises
    ------
    InvalidValueError
        A number of jobs below 1.
    NotebookError
        Notebooks failed; each is kept with its error, the others ran, and the index says so.
    StorageError
        Another batch writes this report, or nothing can be written there.
    """
    jobs = checks.check_whole("jobs", jobs, 1)
    folder = (files.expanded(out) / profile.name).absolute()
    with _ours_alone(folder), _factories.own_modules(), places.environment(_limits(jobs)):
        return _run(profile, folder, jobs)


def fitting_jobs() -> int:
    """Return how many notebooks may well run side by side here: two, or one where memory is short."""
    return max(1, min(2, threads.threads(), limits.free() // _MEMORY))


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
    return {stem: took.get(stem, profile.seconds[stem]) for stem in profile.parameters}


def summary(profile: Profile, seconds: Mapping[str, float], jobs: int = 1) -> str:
    """Return in one sentence what a batch takes whose notebooks are `expected` to take so many seconds."""
    n, total = len(seconds), sum(_ends(stems, seconds, n) for stems, n in _groups(profile, seconds, jobs))
    unit = "minutes:seconds" if total < 3600 else "hours:minutes:seconds"
    time = tqdm.format_interval(round(total))
    return f"{n:,} notebook{'' if n == 1 else 's'} to run, in about {time} ({unit})."


def _limits(jobs: int) -> dict[str, str]:
    """Return the environment that gives each of some processes its share of the processors.

    Threads of PyTorch that outnumber the processors wait for each other, busily. What is set already stays.
    """
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, threads.threads() // jobs))}


def _groups(profile: Profile, seconds: Mapping[str, float], jobs: int) -> list[tuple[list[str], int]]:
    """Return which notebooks run side by side and how many of them at a time, in the order they start."""
    if jobs == 1:
        return [(list(seconds), 1)]
    longest_first = sorted(seconds, key=lambda stem: -seconds[stem])
    together = [stem for stem in longest_first if stem not in profile.alone]
    return [(together, jobs), ([stem for stem in seconds if stem in profile.alone], 1)]


def _ends(stems: list[str], seconds: Mapping[str, float], jobs: int) -> float:
    """Return when the last of some notebooks ends of which `jobs` run at a time."""
    ends = [0.0] * jobs
    for stem in stems:
        ends.sort()
        ends[0] += seconds[stem]
    return max(ends)


def _as_given(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of a notebook without the folder that a batch adds."""
    return {name: value for name, value in parameters.items() if name != "report_dir"}


def _run(profile: Profile, folder: Path, jobs: int) -> Path:
    seconds = expected(profile, folder.parent)
    print(summary(profile, seconds, jobs), file=sys.stderr)
    chapters = {stem: _planned(profile, stem) for stem in profile.parameters}
    begun = set()
    about = _provenance.stamp() | _hashes(profile)
    index = _write(folder, profile, list(chapters.values()), about)
    with tqdm(
        total=sum(seconds.values()),
        desc=f"batch {profile.name}",
        bar_format="{desc}{percentage:3.0f} %|{bar}| {elapsed} elapsed, about {remaining} left",
    ) as bar:

        def ended(stem: str, chapter: Chapter) -> None:
            chapters[stem] = chapter
            _write(folder, profile, list(chapters.values()), about)
            n_ended = sum(chapter.status != "not run" for chapter in chapters.values())
            bar.set_description(f"batch {profile.name}, {n_ended} of {len(chapters)} done")
            bar.update(seconds[stem])

        def start(stem: str, place: int) -> Chapter:
            begun.add(stem)
            return _run_one(profile, chapters[stem], folder, list(chapters.values()), place)

        try:
            with progress_bars.ticking(bar):
                for stems, n in _groups(profile, seconds, jobs):
                    _side_by_side(stems, n, start, ended)
        except KeyboardInterrupt:
            for stem in begun:
                if chapters[stem].status == "not run":
                    chapters[stem] = replace(chapters[stem], status="interrupted")
            _write(folder, profile, list(chapters.values()), about)
            raise
    _show_cells(profile, folder)
    _check(list(chapters.values()), folder, index)
    return index


def _side_by_side(
    stems: list[str],
    jobs: int,
    start: Callable[[str, int], Chapter],
    ended: Callable[[str, Chapter], None],
) -> None:
    """Run notebooks, `jobs` at a time, and hand over each when it has ended; an error ends those under way.

    `start` takes a notebook and its place among those under way; where there are several jobs it runs in a
    thread of its own.
    """
    if jobs == 1:
        for stem in stems:
            ended(stem, start(stem, 0))
        return
    waiting, running, free = list(stems), {}, list(range(jobs))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                while waiting and free:
                    stem, place = waiting.pop(0), free.pop(0)
                    running[pool.submit(start, stem, place)] = stem, place
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chapter = future.result()
                    stem, place = running.pop(future)
                    free.append(place)
                    ended(stem, chapter)
        finally:
            _end(running)


def _end(running: Mapping[Future, object]) -> None:
    """End the processes of notebooks under way, also of one that has none yet."""
    while wait(running, _HEARD).not_done:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ipykernel_launcher" in process.cmdline():
                    process.kill()


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


def _run_one(profile: Profile, chapter: Chapter, folder: Path, among: list[Chapter], place: int) -> Chapter:
    """Execute one notebook and render it; a failure is a status, not an exception."""
    home, target = profile.folder.absolute(), folder / f"{chapter.stem}.ipynb"
    source = home / f"{chapter.stem}.ipynb"
    target.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    parameters, timeout = dict(chapter.parameters), profile.timeouts.get(chapter.stem)
    if "report_dir" in _profiles.declared(source):
        parameters.setdefault("report_dir", str(folder.resolve()))
    start, error, traceback = time.perf_counter(), "", ""
    # The folder of one process is not another's, so that the notebook's own goes there; papermill would move
    # this one, whose threads are at other notebooks.
    began = ("import os", f"os.chdir({str(home)!r})")
    try:
        bar = {"desc": chapter.stem, "position": 1 + place, "leave": False} | progress_bars.as_lines(
            left=False
        )
        with _private() as config, contextlib.closing(ensure_event_loop()):  # which nbclient leaves open
            papermill.execute_notebook(
                source,
                target,
                parameters,
                start_timeout=_START,
                execution_timeout=timeout,
                progress_bar=bar,
                config=config,
                extra_arguments=[f"--IPKernelApp.exec_lines={line}" for line in (*began, _pictures.ENABLE)],
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
