"""A notebook as a page for readers, offline: code folded, long outputs cut, tables sortable."""

import copy
import re
from importlib import resources

from nbconvert import HTMLExporter
from nbformat import NotebookNode

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
    script = resources.files("kclib").joinpath("tables.js").read_text(encoding="utf-8")
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
