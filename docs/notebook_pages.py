"""Write the notebooks' pages: each as the last whole run of it left it, else as it is in the repository."""

import json
from pathlib import Path

from kclib.experiments._mime import HEADLINE, WIDGET

PROFILES = ("full", "smoke")  # the run that is preferred comes first
_EXPLORER = "*In JupyterLab an explorer opens here (`make lab`).*"


def write(root: Path, folder: Path) -> None:
    """Write a page for each notebook of the repository into a folder, in place of what is there."""
    folder.mkdir(exist_ok=True)
    names = {path.name for path in (root / "notebooks").glob("*.ipynb")}
    for old in folder.glob("*.ipynb"):
        if old.name not in names:
            old.unlink()
    for name in sorted(names):
        text = json.dumps(page(root, name), indent=1)
        path = folder / name
        if not path.is_file() or path.read_text() != text:  # else Sphinx would read it again
            path.write_text(text)


def page(root: Path, name: str) -> dict:
    """Return a notebook, with a sentence below its title that says where its outputs come from."""
    own = json.loads((root / "notebooks" / name).read_text())
    for profile in PROFILES:
        path = root / "reports" / profile / name
        if path.is_file() and is_whole(run := json.loads(path.read_text())):
            return _with_note(_without_widgets(run), _origin(run, own, profile))
    note = (
        "This page shows the notebook without its outputs, because there was no finished run of it when the "
        "page was made. `make run` runs it, and `make docs` then shows what came out."
    )
    return _with_note(own, note)


def is_whole(notebook: dict) -> bool:
    """Tell whether every code cell was run, and none ended in an error."""
    cells = [x for x in notebook["cells"] if x["cell_type"] == "code" and "".join(x["source"]).strip()]
    failed = any(y["output_type"] == "error" for x in cells for y in x["outputs"])
    return bool(cells) and not failed and all(x["execution_count"] for x in cells)


def _origin(run: dict, own: dict, profile: str) -> str:
    day = run["metadata"].get("papermill", {}).get("end_time", "")[:10]
    note = f"The outputs on this page are of a run of the profile `{profile}`{f' on {day}' if day else ''}."
    if profile == "smoke":
        note += " It takes a part of the images and of the values of K, so that it ends in minutes."
    return note + (" The notebook has changed since." if _code(run) != _code(own) else "")


def _code(notebook: dict) -> list[str]:
    """Return the code of all cells but those of parameters, which a run replaces."""
    return [
        "".join(x["source"])
        for x in notebook["cells"]
        if x["cell_type"] == "code"
        and not {"parameters", "injected-parameters"} & set(x["metadata"].get("tags", ()))
    ]


def _with_note(notebook: dict, note: str) -> dict:
    cell = {"cell_type": "markdown", "id": "origin", "metadata": {}, "source": f":::{{note}}\n{note}\n:::"}
    first, *rest = notebook["cells"]
    cells = [{**x, "metadata": {}} for x in (first, cell, *rest)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {**notebook, "cells": cells, "metadata": kernel}


def _without_widgets(notebook: dict) -> dict:
    """Leave out widgets, which need a kernel; progress bars go, an explorer leaves a sentence."""
    cells = []
    for cell in notebook["cells"]:
        outputs = [y for x in cell.get("outputs", ()) if (y := _without_widget(x))]
        cells.append({**cell, "outputs": outputs} if cell["cell_type"] == "code" else cell)
    return {**notebook, "cells": cells}


def _without_widget(output: dict) -> dict | None:
    data = output.get("data", {})
    if WIDGET in data:
        return (
            None
            if output["output_type"] == "display_data"
            else {**output, "data": {"text/markdown": _EXPLORER}}
        )
    return {**output, "data": {x: data[x] for x in data if x != HEADLINE}} if data else output
