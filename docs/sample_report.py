"""Write the sample that the site shows: the report of a full run, made small enough for the repository.

``python docs/sample_report.py [REPORT] [FOLDER]``; by default reports/full and docs/sample.
"""

import base64
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from kclib.errors import InvalidValueError, KclibError, MissingFileError
from kclib.experiments import _reports
from kclib.experiments._mime import WIDGET
from kclib.experiments._reports import Report

ROOT = Path(__file__).parent.parent
LARGEST = 5_000_000  # bytes of the whole sample
_WIDTHS, _COLOURS = (900, 750, 600), 64  # of pictures, in pixels
_LONGEST = 100_000  # characters of HTML: only an interactive map has more
_LEFT_OUT = "*An interactive map stands here in a report of your own (`make run`).*"


def write(report: Path, folder: Path) -> Path:
    """Write a report with small pictures and without interactive maps; return the path of its index.

    Pictures are as wide as the repository has room for.

    Raises
    ------
    MissingFileError
        There is no whole report.
    InvalidValueError
        The sample is too large however small its pictures are; it is removed.
    """
    found = _reports.read(report, report.name)
    if not found.chapters or any(chapter.status != "done" for chapter in found.chapters):
        raise MissingFileError(f"{report} has no whole report; make run PROFILE={report.name} makes one.")
    for width in _WIDTHS:
        shutil.rmtree(folder, ignore_errors=True)
        index = _written(report, found, folder, width)
        n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        if n_bytes <= LARGEST:
            print(f"{index}: {n_bytes:,} bytes in all, pictures of {width} pixels")
            return index
    shutil.rmtree(folder)
    raise InvalidValueError(f"the sample has {n_bytes:,} bytes; it must have at most {LARGEST:,}.")


def _written(report: Path, found: Report, folder: Path, width: int) -> Path:
    folder.mkdir(parents=True)
    for path in report.glob("*.csv"):
        shutil.copy(path, folder)
    for chapter in found.chapters:
        notebook = nbformat.read(report / f"{chapter.stem}.ipynb", as_version=4)
        nbformat.write(_small(notebook, width), folder / f"{chapter.stem}.ipynb")
    picture = base64.b64decode(found.picture.partition(",")[2])
    url = _reports.data_url(_reports.smaller(picture, width, _COLOURS)) if picture else ""
    _reports.write(folder, replace(found, picture=url))
    _reports.rebuild(folder, report.name)
    for path in folder.glob("*.ipynb"):  # the pages have all that is in them
        path.unlink()
    index = _reports.write(folder, _reports.read(folder, report.name))
    for page in folder.glob("*.html"):  # where it lay is of no use to others
        page.write_text(page.read_text().replace(str(report.resolve()), f"reports/{report.name}"))
    (folder / "report.json").unlink()  # from which a report is written anew: this one is not
    return index


def _small(notebook: NotebookNode, width: int) -> NotebookNode:
    """Return an executed notebook with small pictures and without what needs a running one."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [x for x in cell.outputs if WIDGET not in x.get("data", ())]
            cell.outputs = [_small_output(x, width) for x in kept]
    return notebook


def _small_output(output: NotebookNode, width: int) -> NotebookNode:
    data = output.get("data", {})
    if "image/png" in data:
        small = _reports.smaller(base64.b64decode(data["image/png"]), width, _COLOURS)
        data["image/png"] = base64.b64encode(small).decode()
        about = output.metadata.get("image/png", {})
        output.metadata["image/png"] = {name: about[name] for name in about if name == "alt"}
    if len(data.get("text/html", "")) > _LONGEST:
        output.data = NotebookNode({"text/markdown": _LEFT_OUT})
    return output


if __name__ == "__main__":
    given = [Path(x) for x in sys.argv[1:]]
    try:
        write(*given, *[ROOT / "reports" / "full", ROOT / "docs" / "sample"][len(given) :])
    except KclibError as error:
        sys.exit(f"sample: {error}")
