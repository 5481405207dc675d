"""Profiles: one YAML file says what a batch runs and what a sweep computes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from kclib._util import files
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, UnknownNameError, reason
from kclib.experiments.parameters import check_value

if TYPE_CHECKING:  # it and papermill take seconds, which those who read no profile need not wait
    from kclib.experiments._documents import Document

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
_SECONDS = 60.0  # that a notebook takes if its profile says nothing
_PATHS = ("weights", "report_dir")  # parameters whose values are paths; others may be folder:PATH


@dataclass(frozen=True)
class ModelSource:
    """A model of a sweep.

    Attributes
    ----------
    name : str
        One `loading.load_model` knows, or ``package.module:factory``.
    weights : str or None
        Path of a weights file in place of the model's own, as the profile has it.
    """

    name: str
    weights: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.weights})" if self.weights else self.name


@dataclass(frozen=True)
class Grid:
    """What a sweep computes: every combination of these.

    Attributes
    ----------
    models : tuple of ModelSource
    data : tuple of str
        Names `datasets.load_data` knows, as the profile has them.
    limit : int
        Images, drawn once at random; 0 takes all.
    scopes : tuple of {"layer", "global"}
    clusters : tuple of int
        K, clusters a codebook.
    methods : tuple of str
        Of `_cell.METHODS`.
    seeds : tuple of int
    precision : {"fp32", "bf16", "fp16"}
    device : str
    folder : str
        What paths in `models` and `data` are relative to: results are told apart by what the profile says,
        which is the same on every machine.
    """

    models: tuple[ModelSource, ...]
    data: tuple[str, ...]
    limit: int
    scopes: tuple[str, ...]
    clusters: tuple[int, ...]
    methods: tuple[str, ...] = ("plain",)
    seeds: tuple[int, ...] = (0,)
    precision: str = "fp32"
    device: str = "cpu"
    folder: str = "."


@dataclass(frozen=True)
class Profile:
    """What a batch runs and a sweep computes.

    Attributes
    ----------
    name : str
    note : str
        For the reader of the report: what this profile leaves out, and what was changed for this run.
    folder : Path
        Where the notebooks are.
    parameters : mapping of str to mapping
        Parameters by notebook file stem, in the order they run; empty if there is only a sweep.
    seconds : mapping of str to float
        Expected seconds a notebook, for the time left.
    timeouts : mapping of str to int or None
        Seconds that a cell of a notebook may run; None for no limit.
    sweep : Grid or None
    alone : frozenset of str
        Notebooks beside which no other runs, because they measure time.
    """

    name: str
    note: str
    folder: Path
    parameters: Mapping[str, Mapping[str, object]]
    seconds: Mapping[str, float]
    timeouts: Mapping[str, int | None]
    sweep: Grid | None = None
    alone: frozenset[str] = frozenset()


def names(folder: Path = NOTEBOOKS) -> tuple[str, ...]:
    """Return the profiles beside the notebooks."""
    return tuple(sorted(path.stem for path in (folder / "profiles").glob("*.yaml")))


def load(name: str, *, changes: Mapping[str, object] | None = None) -> Profile:
    """Read a profile by name, or from the path of a YAML file.

    ``profile.schema.json`` says what may be in it. Paths in it are relative to the file, also those among the
    notebooks' parameters: ``weights``, ``report_dir`` and ``folder:PATH``. ``~`` is the home folder.

    Parameters
    ----------
    changes : mapping, optional
        Parameters that replace the profile's, in every notebook that has them; the sweep stays as it is.
        Paths in them are relative to the folder where one works.

    Raises
    ------
    UnknownNameError
        No such profile, a key that profiles do not have, or a parameter that no notebook (or not that
        notebook) has.
    InvalidValueError
        A value that is not as the schema says; the sentence names the line.
    DamagedFileError
        The file is not YAML, repeats a key, or has aliases; a notebook is not whole.
    MissingFileError
    """
    from kclib.experiments._documents import Document

    path = files.expanded(name)
    if path.suffix not in (".yaml", ".yml"):
        if not names():
            raise MissingFileError(
                f"profile {name!r} and its notebooks come with the repository of kclib and not with the "
                "installed package; run in a checkout of it, or give the path of a YAML file."
            )
        if name not in names():
            raise UnknownNameError("profile", name, names())
        path = NOTEBOOKS / "profiles" / f"{name}.yaml"
    if not files.is_text(path):  # its folder may be part of the paths in it
        raise InvalidValueError(
            f"profile {str(path)!r} has a name that is not UTF-8, which a report cannot hold; rename it."
        )
    document = Document.read(path)
    document.check(_schema())
    content, changes = document.content, dict(changes or {})
    folder = (path.parent / files.expanded(content["folder"])).resolve() if "folder" in content else NOTEBOOKS
    notebooks = {stem: entry or {} for stem, entry in content.get("notebooks", {}).items()}
    known = {stem: _declared(document, folder, stem) for stem in notebooks}
    _check_parameters(document, notebooks, known, changes)
    shared, overrides = content.get("parameters") or {}, _located(changes, Path())
    given = {
        stem: _located(shared | (entry.get("parameters") or {}), path.parent) | overrides
        for stem, entry in notebooks.items()
    }
    note = content.get("note", "")
    if changes:
        note += " Changed for this run: " + ", ".join(f"{k} = {v}" for k, v in changes.items()) + "."
    return Profile(
        path.stem,
        note,
        folder,
        {stem: {k: v for k, v in given[stem].items() if k in known[stem]} for stem in notebooks},
        {stem: float(entry.get("seconds", _SECONDS)) for stem, entry in notebooks.items()},
        {stem: entry.get("timeout") for stem, entry in notebooks.items()},
        _grid(content["sweep"], path.parent) if "sweep" in content else None,
        frozenset(stem for stem, entry in notebooks.items() if entry.get("alone")),
    )


def declared(notebook: Path) -> dict[str, str]:
    """Return the names of a notebook's parameters and their types, as they are written."""
    if not notebook.is_file():
        raise MissingFileError(f"notebook {notebook} does not exist.")
    import papermill

    try:
        declarations = papermill.inspect_notebook(notebook)
        types = {name: about["inferred_type_name"] for name, about in declarations.items()}
        return {name: "" if text == "None" else text for name, text in types.items()}
    except Exception as error:  # JSON that is no notebook can make its reader raise almost anything
        raise DamagedFileError(f"{notebook} is not a whole notebook ({reason(error)}).") from error


def _located(parameters: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return parameters with their paths, which are relative to a folder, as absolute ones."""
    return {name: files.located(x, folder, is_path=name in _PATHS) for name, x in parameters.items()}


def _schema() -> dict:
    return json.loads(
        resources.files("kclib.experiments").joinpath("profile.schema.json").read_text(encoding="utf-8")
    )


def _declared(document: "Document", folder: Path, stem: str) -> dict[str, str]:
    try:
        return declared(folder / f"{stem}.ipynb")
    except MissingFileError as error:
        raise MissingFileError(f"{document.where('notebooks', stem)}: {error}") from error


def _check_parameters(
    document: "Document", notebooks: Mapping, known: Mapping[str, Mapping[str, str]], changes: Mapping
) -> None:
    """Refuse parameters that the notebook, or every notebook, lacks or declares otherwise."""
    for stem, entry in notebooks.items():
        for name, value in (entry.get("parameters") or {}).items():
            where = document.where("notebooks", stem, "parameters", name)
            _check_known(f"parameter of {stem} in {where}", name, known[stem])
            _check_types(where, name, value, [known[stem]])
    every = sorted({name for names in known.values() for name in names})
    for name, value in (document.content.get("parameters") or {}).items() if notebooks else ():
        where = document.where("parameters", name)
        _check_known(f"parameter in {where}", name, every)
        _check_types(where, name, value, known.values())
    for name, value in changes.items():
        _check_known("parameter", name, every)
        _check_types("", name, value, known.values())


def _check_types(where: str, name: str, value: object, notebooks: Iterable[Mapping[str, str]]) -> None:
    """Refuse a value that is not of the type that a notebook declares."""
    for types in notebooks:
        try:
            check_value(name, value, types.get(name, ""))
        except InvalidValueError as error:
            raise InvalidValueError(f"{where}: {error}" if where else str(error)) from error


def _check_known(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, known)


def _grid(content: Mapping, folder: Path) -> Grid:
    """Return a sweep as its checked part of a profile describes it."""
    sources = [{"name": x} if isinstance(x, str) else x for x in content["models"]]
    models = tuple(dict.fromkeys(ModelSource(**x) for x in sources))
    options = {name: content[name] for name in ("precision", "device") if name in content}
    wholes = {name: tuple(map(int, content[name])) for name in ("clusters", "seeds") if name in content}
    names = {
        name: tuple(dict.fromkeys(content[name])) for name in ("data", "scopes", "methods") if name in content
    }
    options |= {"limit": int(content["limit"]), "folder": str(folder.absolute())}
    return Grid(models=models, **names, **wholes, **options)
