"""Run notebooks in order by papermill, under a profile of parameters, into a folder of reports."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import papermill
import yaml
from tqdm.auto import tqdm
from traitlets.config import Config

from kclib import reports
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    MissingFileError,
    NotebookError,
    UnknownNameError,
)
from kclib.reports import Chapter

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# Sockets in the file system: kernels of batches that run side by side could race for TCP ports.
_KERNEL = Config({"KernelManager": {"transport": "ipc" if os.name == "posix" else "tcp"}})


@dataclass(frozen=True)
class Profile:
    """What a batch runs.

    Attributes
    ----------
    name : str
    note : str
        For the reader of the report: what this profile leaves out, and what was changed for this run.
    folder : Path
        Where the notebooks are.
    parameters : mapping of str to mapping
        Parameters by notebook file stem, in the order they run.
    seconds : mapping of str to float
        Expected seconds a notebook, for the time left.
    """

    name: str
    note: str
    folder: Path
    parameters: Mapping[str, Mapping[str, object]]
    seconds: Mapping[str, float]


def profile_names(folder: Path = NOTEBOOKS) -> tuple[str, ...]:
    """Return the profiles beside the notebooks."""
    return tuple(sorted(path.stem for path in (folder / "profiles").glob("*.yaml")))


def load_profile(name: str, *, changes: Mapping[str, object] | None = None) -> Profile:
    """Read a profile by name, or from the path of a YAML file.

    Its keys: ``note``, ``parameters`` (for every notebook that has them), ``notebooks`` (from file stem
    to that notebook's own ``parameters`` and expected ``seconds``), and ``folder`` (relative to the file; the
    project's notebooks by default).

    Parameters
    ----------
    changes : mapping, optional
        Parameters that replace the profile's, in every notebook that has them.

    Raises
    ------
    UnknownNameError
        No such profile, or a parameter that no notebook (or not that notebook) has.
    DamagedFileError, MissingFileError
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else NOTEBOOKS / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise UnknownNameError("profile", name, profile_names())
    content = _read_yaml(path)
    folder = (path.parent / content["folder"]).resolve() if "folder" in content else NOTEBOOKS
    shared, changes = content.get("parameters") or {}, dict(changes or {})
    parameters, seconds, every = {}, {}, set()
    for stem, entry in content["notebooks"].items():
        known = _parameters(folder / f"{stem}.ipynb")
        own = (entry or {}).get("parameters") or {}
        _check_names(own, known, f"parameter of {stem}")
        parameters[stem] = {k: v for k, v in (shared | own | changes).items() if k in known}
        seconds[stem] = float((entry or {}).get("seconds", 60))
        every |= set(known)
    _check_names(shared | changes, sorted(every), "parameter")
    note = content.get("note", "")
    if changes:
        note += " Changed for this run: " + ", ".join(f"{k} = {v}" for k, v in changes.items()) + "."
    return Profile(path.stem, note, folder, parameters, seconds)


def run(profile: Profile, out: Path) -> Path:
    """Execute a profile's notebooks, each in a process of its own, and return the path of the index page.

    Under ``out/<profile>/`` each notebook leaves its executed ``.ipynb`` and an ``.html`` for readers;
    ``index.html`` is written anew after each, so an interrupted batch leaves its finished part readable.

    Raises
    ------
    NotebookError
        A notebook failed; it is kept with its error, the later ones did not run, and the index says so.
    """
    folder = Path(out) / profile.name
    chapters = [Chapter(stem, "not run") for stem in profile.parameters]
    index = reports.write_index(folder, profile.name, profile.note, chapters)
    bar = tqdm(
        total=sum(profile.seconds.values()),
        desc=f"batch {profile.name}",
        bar_format="{desc}{percentage:3.0f} %|{bar}| {elapsed} elapsed, about {remaining} left",
    )
    with bar:
        for i, stem in enumerate(profile.parameters):
            bar.set_description(f"batch {profile.name}, {i + 1} of {len(chapters)}: {stem}")
            try:
                chapters[i] = _run_one(profile, stem, folder)
            except KeyboardInterrupt:
                chapters[i] = replace(chapters[i], status="interrupted")
                raise
            finally:
                reports.write_index(folder, profile.name, profile.note, chapters)
            if chapters[i].status != "done":
                raise NotebookError(
                    f"notebook {stem} failed ({chapters[i].error}); its executed copy with the error is "
                    f"{folder / stem}.ipynb, and {index} says what was finished."
                )
            bar.update(profile.seconds[stem])
    return index


def _run_one(profile: Profile, stem: str, folder: Path) -> Chapter:
    """Execute one notebook and render it; a failure is a status, not an exception."""
    source, target = profile.folder / f"{stem}.ipynb", folder / f"{stem}.ipynb"
    parameters = dict(profile.parameters[stem])
    if "report_dir" in _parameters(source):
        parameters.setdefault("report_dir", str(folder.resolve()))
    start, error = time.perf_counter(), ""
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            cwd=profile.folder,
            start_timeout=120,
            progress_bar={"desc": stem, "position": 1, "leave": False},
            config=_KERNEL,
            kernel_name="python3",  # this environment's, whatever the file was last saved with
            language="python",
        )
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    except RuntimeError as failure:  # nbclient: the kernel died, or never started
        error = str(failure)
    if not target.is_file():
        return Chapter(stem, "failed", error=error)
    notebook = nbformat.read(target, as_version=4)
    if not error and reports.read_headline(notebook) is None:
        error = "it ended without its headline, so its last cell did not run"
    return reports.render(notebook, folder, stem, seconds=time.perf_counter() - start, error=error)


def _read_yaml(path: Path) -> dict:
    """Read a profile and check its form."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DamagedFileError(f"profile {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("notebooks"), dict):
        raise InvalidValueError(f"profile {path} must be a mapping with the key 'notebooks', a mapping too.")
    _check_names(content, ("note", "folder", "parameters", "notebooks"), f"key of profile {path.name}")
    _check_mapping(content.get("parameters"), f"parameters of profile {path.name}")
    for stem, entry in content["notebooks"].items():
        _check_mapping(entry, f"{stem} in profile {path.name}")
        _check_names(entry or {}, ("parameters", "seconds"), f"key of {stem} in profile {path.name}")
        _check_mapping((entry or {}).get("parameters"), f"parameters of {stem} in profile {path.name}")
        if not isinstance((entry or {}).get("seconds", 60), (int, float)):
            raise InvalidValueError(f"seconds of {stem} in profile {path.name} must be a number.")
    return content


def _check_mapping(value: object, what: str) -> None:
    if value is not None and not isinstance(value, dict):
        raise InvalidValueError(f"{what} must be a mapping of names to values, not {value!r}.")


def _check_names(names: Iterable[str], known: Sequence[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, str(name), known)


def _parameters(notebook: Path) -> tuple[str, ...]:
    if not notebook.is_file():
        raise MissingFileError(f"notebook {notebook} does not exist.")
    try:
        return tuple(papermill.inspect_notebook(notebook))
    except nbformat.reader.NotJSONError as error:
        raise DamagedFileError(f"{notebook} is not a whole notebook: {error}") from error
