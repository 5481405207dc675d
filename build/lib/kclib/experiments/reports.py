"""Reports: what a batch and a sweep found, as a folder of pages that one can read offline."""

import base64
import copy
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image

from kclib import plots
from kclib._util import files
from kclib.errors import DamagedFileError, MissingFileError, reason
from kclib.experiments import tables

_WIDGET = "application/vnd.jupyter.widget-view+json"
_LINES = 200  # of printed text that a page shows of one output
_FOLDED = """
{%- extends 'lab/index.html.j2' -%}
{%- block input_group -%}
<details class="folded-code"><summary>code</summary>{{ super() }}</details>
{%- endblock input_group -%}
"""
_STYLE = """<style>
.folded-code > summary { cursor: pointer; color: #777; font-size: 0.75rem; }
th[aria-sort] { cursor: pointer; }
th[aria-sort="ascending"]::after { content: " ▲"; }
th[aria-sort="descending"]::after { content: " ▼"; }
</style>"""


def sorter() -> str:
    """Return the style and the script that let readers sort pandas' tables by any column."""
    script = resources.files("kclib.experiments").joinpath("tables.js").read_text(encoding="utf-8")
    return f"{_STYLE}\n<script>\n{script}</script>"


def to_html(notebook: NotebookNode, *, title: str) -> str:
    """Return a page with folded code, without progress bars or widgets; it needs nothing from the network."""
    readable = copy.deepcopy(notebook)
    readable.metadata.pop("widgets", None)  # the state of widgets that are not shown
    for cell in readable.cells:
        if cell.cell_type == "code":
            cell.outputs = [_cut(o) for o in cell.outputs if not _is_noise(o)]
    exporter = HTMLExporter(raw_template=_FOLDED, exclude_input_prompt=True, exclude_output_prompt=True)
    for script in ("mathjax", "require_js", "jquery", "mermaid_js", "mermaid_layout_elk_js"):
        setattr(exporter, f"{script}_url", "")
    page, _ = exporter.from_notebook_node(readable, {"metadata": {"name": title}})
    head, end, rest = page.rpartition("</body>")
    return f"{head}{sorter()}{end}{rest}"


def _is_noise(output: NotebookNode) -> bool:
    return _WIDGET in output.get("data", ()) or output.get("name") == "stderr"


def _cut(output: NotebookNode) -> NotebookNode:
    """Return an output with the middle of very long printed text left out."""
    if output.output_type != "stream":
        return output
    lines = re.sub(r"[^\n]*\r(?!\n)", "", output.text).splitlines()
    if len(lines) > _LINES:
        left_out = len(lines) - _LINES
        note = f"... {left_out:,} lines are left out here; the executed notebook has them ..."
        lines[_LINES // 2 : _LINES // 2 + left_out] = [note]
    long = [line if len(line) <= 2000 else line[:2000] + " ..." for line in lines]
    return NotebookNode(output | {"text": "\n".join(long) + "\n"})


_HEADLINE = "application/vnd.kclib.headline+json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chapter:
    """One notebook of a report.

    Attributes
    ----------
    stem : str
        File name without its ending.
    status : {"done", "failed", "interrupted", "not run"}
    headline, error : str
    main : bool
        Whether its headline opens the report.
    thumbnail : str
        A ``data:`` URL of a PNG, or empty.
    seconds : float
        Wall time; 0 if it left no executed notebook.
    traceback : str
        Of the error, if there is one.
    parameters : mapping of str to object
        What it was run with.
    """

    stem: str
    status: str
    headline: str = ""
    main: bool = False
    error: str = ""
    thumbnail: str = ""
    seconds: float = 0.0
    traceback: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A cell of a sweep that could not be computed.

    Attributes
    ----------
    what : str
        Names the cell.
    error : str
        One line.
    traceback : str
    """

    what: str
    error: str
    traceback: str


@dataclass(frozen=True)
class Report:
    """What the index page shows.

    Attributes
    ----------
    name, note : str
    chapters : tuple of Chapter
    failures : tuple of Failure
    missing : str
        How many cells of the sweep the results lack, if they lack some.
    provenance : mapping of str to str
    results : pandas.DataFrame or None
        As `_cell.Subject.table`.
    picture : str
        A ``data:`` URL of a PNG of the results, or empty.
    """

    name: str
    note: str = ""
    chapters: tuple[Chapter, ...] = ()
    failures: tuple[Failure, ...] = ()
    missing: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)
    results: pd.DataFrame | None = None
    picture: str = ""


def headline(text: str, *, main: bool = False) -> None:
    """Show a notebook's answer in one sentence and record it for the index; its last cell calls this.

    Parameters
    ----------
    text : str
    main : bool
        Whether the report opens with it. If no notebook's is, the last one's does.
    """
    recorded = {"text": text, "main": main}
    display({_HEADLINE: recorded, "text/markdown": f"**{text}**", "text/plain": text}, raw=True)


def keep(made: pd.DataFrame | Figure, path: str | Path) -> Path:
    """Write a table as CSV, or a figure as PNG, whole or not at all, and return its path.

    Parameters
    ----------
    made : pandas.DataFrame or matplotlib.figure.Figure
        Of a table the index is left out; a figure has 150 dots an inch.
    path : path

    Raises
    ------
    StorageError
        It could not be written; an older file of this name is then still whole.
    """
    with files.replacing(path) as temporary:
        if isinstance(made, Figure):
            made.savefig(temporary, format="png", dpi=150)
        else:
            made.to_csv(temporary, index=False)
    return Path(path)


def read_headline(notebook: NotebookNode) -> str | None:
    """Return the headline an executed notebook recorded, or None if it never came so far."""
    return _recorded(notebook).get("text")


def render(notebook: NotebookNode, folder: Path, chapter: Chapter) -> Chapter:
    """Write a notebook's HTML for readers into `folder`; return its chapter with headline and thumbnail."""
    page = to_html(notebook, title=chapter.stem)
    with files.replacing(folder / f"{chapter.stem}.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    said = _recorded(notebook)
    main, text = said.get("main", False), said.get("text", "")
    return replace(chapter, headline=text, main=main, thumbnail=_thumbnail(notebook))


def read(folder: Path, name: str) -> Report:
    """Return the report that was written into a folder, or an empty one; what is damaged of it is logged."""
    described, results = folder / "report.json", folder / "results.parquet"
    found = Report(name)
    try:
        if described.is_file():
            about = json.loads(described.read_text(encoding="utf-8"))
            chapters = tuple(Chapter(**x) for x in about.pop("chapters"))
            failures = tuple(Failure(**x) for x in about.pop("failures"))
            found = Report(**(about | {"chapters": chapters, "failures": failures, "name": name}))
        if results.is_file():
            found = replace(found, results=pd.read_parquet(results))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("the report in %s is damaged (%s) and is begun anew.", folder, reason(error))
    return found


def write(folder: Path, report: Report) -> Path:
    """Write a report's index page, its table for programs, and what `read` reads; return the page's path."""
    about = asdict(replace(report, results=None))
    with files.replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps({k: v for k, v in about.items() if k != "results"}), encoding="utf-8")
    if report.results is None:
        for name in ("results.parquet", "results.csv"):  # of an earlier run
            (folder / name).unlink(missing_ok=True)
    else:
        with files.replacing(folder / "results.parquet") as temporary:
            report.results.to_parquet(temporary)
        with files.replacing(folder / "results.csv") as temporary:
            report.results.drop(columns="right", errors="ignore").to_csv(temporary, index=False)
    with files.replacing(folder / "index.html") as temporary:
        temporary.write_text(_page("index", report=report, table=_html(report.results)), encoding="utf-8")
    return folder / "index.html"


def rebuild(folder: Path, name: str) -> Path:
    """Write all pages of a report anew, from what `read` reads and the executed notebooks in its folder.

    Raises
    ------
    MissingFileError
        There is no report.
    """
    report = read(folder, name)
    if not report.chapters and report.results is None:
        raise MissingFileError(f"{folder} has no report; kclib batch or kclib sweep makes one.")
    chapters = []
    for chapter in report.chapters:
        path = folder / f"{chapter.stem}.ipynb"
        chapters.append(render(_read_notebook(path), folder, chapter) if path.is_file() else chapter)
    return write(folder, replace(report, chapters=tuple(chapters)))


def picture(results: pd.DataFrame) -> str:
    """Return accuracy against bytes removed as a ``data:`` URL: an axes for each model and data set.

    Of several seeds the first is drawn.

    Parameters
    ----------
    results : pandas.DataFrame
        As `_cell.Subject.table`, of any models and data sets.
    """
    subjects = list(results.groupby(["model", "data"], sort=False))
    figure, axes = plt.subplots(
        len(subjects), figsize=(7, 4.2 * len(subjects)), squeeze=False, layout="constrained"
    )
    for ((model, data), rows), ax in zip(subjects, axes.flat, strict=True):
        dense = rows.scope == "dense"
        rows = rows[dense | (rows.seed == rows.seed[~dense].min())]
        names = rows.scope.where(rows.method.isin(["dense", "plain"]), rows.scope + ", " + rows.method)
        plots.accuracy_curve(rows.assign(scope=names), x="bytes_removed", ax=ax)
        ax.set_title(f"{model} on {data}", fontsize=10)
    url = as_url(figure)
    plt.close(figure)
    return url


def as_url(figure: Figure) -> str:
    """Return a figure as a ``data:`` URL of a PNG, which a page holds in itself."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return _data_url(file.getvalue())


def write_page(path: Path, template: str, **values: object) -> None:
    """Write a page from one of this package's templates, by its name without ``.html.jinja``."""
    with files.replacing(path) as temporary:
        temporary.write_text(_page(template, **values), encoding="utf-8")


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _page(template: str, **values: object) -> str:
    loader = jinja2.PackageLoader("kclib.experiments", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(f"{template}.html.jinja").render(sorter=sorter(), **values)


def _html(results: pd.DataFrame | None) -> str:
    return (
        "" if results is None or not len(results) else tables.readable(results).to_html(index=False, border=0)
    )


def _read_notebook(path: Path) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # JSON that is no notebook can make its reader raise almost anything
        raise DamagedFileError(f"{path} is not a whole notebook ({reason(error)}).") from error


def _data(notebook: NotebookNode):
    """Yield (cell, MIME bundle) of every rich output."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                yield cell, output["data"]


def _recorded(notebook: NotebookNode) -> dict:
    found = [data[_HEADLINE] for _, data in _data(notebook) if _HEADLINE in data]
    return found[-1] if found else {}


def _thumbnail(notebook: NotebookNode, width: int = 480) -> str:
    """Return the picture of the cell tagged ``thumbnail``, else the first picture, made small."""
    pictures = [(cell, data["image/png"]) for cell, data in _data(notebook) if "image/png" in data]
    if not pictures:
        return ""
    tagged = [png for cell, png in pictures if "thumbnail" in cell.metadata.get("tags", ())]
    png = (tagged or [pictures[0][1]])[0]
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image.thumbnail((width, width))
    small = io.BytesIO()
    image.save(small, "PNG")
    return _data_url(small.getvalue())
