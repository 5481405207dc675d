"""Pages for readers: a notebook's headline, its HTML without code, and the index of a batch."""

import base64
import copy
import io
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path

import jinja2
from IPython.display import display
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image

from kclib import files

_HEADLINE = "application/vnd.kclib.headline+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_PACKAGES = ("kclib", "torch", "torchvision", "faiss-cpu", "scikit-learn", "umap-learn", "numpy")


@dataclass(frozen=True)
class Chapter:
    """One notebook of a report.

    Attributes
    ----------
    stem : str
        File name without its ending.
    status : {"done", "failed", "interrupted", "not run"}
    headline, error : str
    thumbnail : str
        A ``data:`` URL of a PNG, or empty.
    seconds : float
        Wall time; 0 if it did not run.
    """

    stem: str
    status: str
    headline: str = ""
    error: str = ""
    thumbnail: str = ""
    seconds: float = 0.0


def headline(text: str) -> None:
    """Show a notebook's answer in one sentence and record it for the index; its last cell calls this."""
    display({_HEADLINE: {"text": text}, "text/markdown": f"**{text}**", "text/plain": text}, raw=True)


def read_headline(notebook: NotebookNode) -> str | None:
    """Return the headline an executed notebook recorded, or None if it never came so far."""
    found = [data[_HEADLINE]["text"] for _, data in _data(notebook) if _HEADLINE in data]
    return found[-1] if found else None


def render(notebook: NotebookNode, folder: Path, stem: str, *, seconds: float, error: str = "") -> Chapter:
    """Write a notebook's HTML for readers into `folder` and return its chapter."""
    page = to_html(notebook, title=stem)
    with files.replacing(folder / f"{stem}.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Chapter(
        stem,
        "failed" if error else "done",
        read_headline(notebook) or "",
        error,
        _thumbnail(notebook),
        seconds,
    )


def to_html(notebook: NotebookNode, *, title: str) -> str:
    """Return a page without code, progress bars or widgets, which needs nothing from the network."""
    readable = copy.deepcopy(notebook)
    readable.metadata.pop("widgets", None)  # the state of widgets that are not shown
    for cell in readable.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _is_noise(o)]
    exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    for script in ("mathjax", "require_js", "jquery", "mermaid_js", "mermaid_layout_elk_js"):
        setattr(exporter, f"{script}_url", "")
    return exporter.from_notebook_node(readable, {"metadata": {"name": title}})[0]


def write_index(folder: Path, name: str, note: str, chapters: Sequence[Chapter]) -> Path:
    """Write ``index.html`` into `folder` and return its path."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "index.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        name=name, note=note, chapters=chapters, provenance=_provenance(),
        failed=[c for c in chapters if c.status == "failed"],
    )  # fmt: skip
    with files.replacing(Path(folder) / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(folder) / "index.html"


def _data(notebook: NotebookNode):
    """Yield (cell, MIME bundle) of every rich output."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                yield cell, output["data"]


def _is_noise(output: NotebookNode) -> bool:
    return _WIDGET in output.get("data", ()) or output.get("name") == "stderr"


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
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def _provenance() -> dict[str, str]:
    """Return what a reader needs to make the report again."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": found.stdout.strip() or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
