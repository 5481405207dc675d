"""Reports: what a batch and a sweep found, as a folder of pages that one can read offline."""

import base64
import copy
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

from kclib import plots
from kclib._util import files
from kclib.errors import DamagedFileError, MissingFileError, reason
from kclib.experiments import tables
from kclib.experiments._mime import HEADLINE, WIDGET

_LINES = 200  # of printed text that a page shows of one output
_STYLES = {"light": "default", "dark": "github-dark"}  # of Pygments, for code
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
        Its answer; what went wrong.
    main : bool
        Whether its headline opens the report.
    thumbnail, thumbnail_alt : str
        A ``data:`` URL of a PNG, and what is seen on it; or empty.
    seconds : float
        Wall time; 0 if it left no executed notebook.
    traceback : str
        Of the error, if there is one.
    parameters : mapping of str to object
        What it was run with.
    question : str
        Its title.
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
    question: str = ""
    thumbnail_alt: str = ""


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


def to_html(
    notebook: NotebookNode,
    chapter: Chapter,
    *,
    before: Chapter | None = None,
    after: Chapter | None = None,
) -> str:
    """Return a notebook's page: its question, its answer, then how it came about, with folded code.

    Progress bars and widgets are left out; the page needs nothing from the network.

    Parameters
    ----------
    notebook : NotebookNode
        Executed; unchanged.
    chapter : Chapter
        Of this notebook.
    before, after : Chapter, optional
        What the page links to as the previous and the next one.
    """
    readable = copy.deepcopy(notebook)
    readable.metadata.pop("widgets", None)  # the state of widgets that are not shown
    for cell in readable.cells:
        if cell.cell_type == "code":
            cell.outputs = [_cut(o) for o in cell.outputs if not _is_noise(o)]
    _describe_pictures(readable)
    _drop_title(readable)
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    body, _ = exporter.from_notebook_node(readable)
    values = {"chapter": chapter, "before": before, "after": after}
    return _page("page", body=body, highlighting=_highlighting(), **values)


def read_question(notebook: NotebookNode) -> str:
    """Return the question that a notebook begins with: its title."""
    title = re.match(r"# (.+)", notebook.cells[0].source) if notebook.cells else None
    return title[1].strip() if title else ""


def _drop_title(notebook: NotebookNode) -> None:
    """Remove the title, which the page shows above the answer."""
    if read_question(notebook):
        notebook.cells[0].source = notebook.cells[0].source.partition("\n")[2]


def _describe_pictures(notebook: NotebookNode) -> None:
    """Give the pictures that have no alternative text the heading that they are under."""
    heading = read_question(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.MULTILINE) or [heading])[-1]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                about = output.metadata.setdefault("image/png", NotebookNode())
                about.setdefault("alt", f"Picture: {heading}")


def _highlighting() -> str:
    """Return the style of code, on light and on dark ground."""
    light, dark = (HtmlFormatter(style=x).get_style_defs(".highlight") for x in _STYLES.values())
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _sorter() -> str:
    """Return the script that lets readers sort pandas' tables by any column."""
    script = resources.files("kclib.experiments").joinpath("tables.js").read_text(encoding="utf-8")
    return f"<script>\n{script}</script>"


def _is_noise(output: NotebookNode) -> bool:
    return WIDGET in output.get("data", ()) or output.get("name") == "stderr"


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


def read_headline(notebook: NotebookNode) -> str | None:
    """Return the headline an executed notebook recorded, or None if it never came so far."""
    return _recorded(notebook).get("text")


def render(notebook: NotebookNode, folder: Path, chapter: Chapter, among: Sequence[Chapter] = ()) -> Chapter:
    """Write a notebook's page into `folder`; return its chapter with question, headline and thumbnail.

    Parameters
    ----------
    notebook : NotebookNode
        Executed.
    folder : Path
    chapter : Chapter
    among : sequence of Chapter
        The chapters that have pages, in their order, for the links to the previous and the next.
    """
    said, (thumbnail, alt) = _recorded(notebook), _thumbnail(notebook)
    chapter = replace(
        chapter,
        question=read_question(notebook),
        headline=said.get("text", ""),
        main=said.get("main", False),
        thumbnail=thumbnail,
        thumbnail_alt=alt,
    )
    before, after = _neighbours(chapter, among)
    with files.replacing(folder / f"{chapter.stem}.html") as temporary:
        temporary.write_text(to_html(notebook, chapter, before=before, after=after), encoding="utf-8")
    return chapter


def _neighbours(chapter: Chapter, among: Sequence[Chapter]) -> tuple[Chapter | None, Chapter | None]:
    """Return the chapters before and after one."""
    stems = [x.stem for x in among]
    if chapter.stem not in stems:
        return None, None
    place = stems.index(chapter.stem)
    before, after = among[max(0, place - 1) : place], among[place + 1 : place + 2]
    return (before[0] if before else None), (after[0] if after else None)


def read(folder: Path, name: str) -> Report:
    """Return the report that was written into a folder, or an empty one; what is damaged of it is logged."""
    described, results = folder / "report.json", folder / "results.parquet"
    report = Report(name)
    try:
        if described.is_file():
            about = json.loads(described.read_text(encoding="utf-8"))
            chapters = tuple(Chapter(**x) for x in about.pop("chapters"))
            failures = tuple(Failure(**x) for x in about.pop("failures"))
            report = Report(**(about | {"chapters": chapters, "failures": failures, "name": name}))
        if results.is_file():
            report = replace(report, results=pd.read_parquet(io.BytesIO(results.read_bytes())))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("the report in %s is damaged (%s) and is begun anew.", folder, reason(error))
    return report


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
            temporary.write_bytes(report.results.to_parquet())  # pyarrow takes no path but UTF-8
        with files.replacing(folder / "results.csv") as temporary:
            report.results.drop(columns="right", errors="ignore").to_csv(temporary, index=False)
    notebooks = {path.stem for path in folder.glob("*.ipynb")}
    page = _page("index", report=report, table=_html(report.results), notebooks=notebooks)
    with files.replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
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
    paths = {x.stem: folder / f"{x.stem}.ipynb" for x in report.chapters}
    notebooks = {stem: _read_notebook(path) for stem, path in paths.items() if path.is_file()}
    asked = {stem: read_question(notebook) for stem, notebook in notebooks.items()}
    named = [replace(x, question=asked.get(x.stem, x.question)) for x in report.chapters]
    pages = [x for x in named if x.stem in notebooks]
    chapters = [render(notebooks[x.stem], folder, x, pages) if x in pages else x for x in named]
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
    figure.savefig(file, format="png", dpi=200)  # twice as many as a page shows
    return data_url(file.getvalue())


def write_page(path: Path, template: str, **values: object) -> None:
    """Write a page from one of this package's templates, by its name without ``.html.jinja``."""
    with files.replacing(path) as temporary:
        temporary.write_text(_page(template, **values), encoding="utf-8")


def data_url(png: bytes) -> str:
    """Return a PNG as a URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _page(template: str, **values: object) -> str:
    loader = jinja2.PackageLoader("kclib.experiments", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(f"{template}.html.jinja").render(sorter=_sorter(), **values)


def _html(results: pd.DataFrame | None) -> str:
    return (
        "" if results is None or not len(results) else tables.readable(results).to_html(index=False, border=0)
    )


def _read_notebook(path: Path) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # JSON that is no notebook can make its reader raise almost anything
        raise DamagedFileError(f"{path} is not a whole notebook ({reason(error)}).") from error


def _recorded(notebook: NotebookNode) -> dict:
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    headlines = [data[HEADLINE] for data in shown if HEADLINE in data]
    return headlines[-1] if headlines else {}


def _thumbnail(notebook: NotebookNode, width: int = 576) -> tuple[str, str]:
    """Return the picture of the cell tagged ``thumbnail``, else the first, made small; and its text."""
    described = copy.deepcopy(notebook)
    _describe_pictures(described)
    pictures = [
        (cell, output)
        for cell in described.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    if not pictures:
        return "", ""
    tagged = [output for cell, output in pictures if "thumbnail" in cell.metadata.get("tags", ())]
    output = (tagged or [pictures[0][1]])[0]
    small = smaller(base64.b64decode(output.data["image/png"]), width)
    return data_url(small), output.metadata["image/png"].alt


def smaller(png: bytes, width: int, colours: int = 256) -> bytes:
    """Return a picture of at most so many pixels across, in so many colours."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((width, image.height))
    small = io.BytesIO()
    image.quantize(colours).save(small, "PNG", optimize=True)
    return small.getvalue()
