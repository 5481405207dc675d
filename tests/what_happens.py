"""The page *What happens if*: a row a fault, written by the tests that try it (`make faults`).

A test takes the fixture `seen` and says to it what happens and what the user then sees, as it was seen. With
``WRITE_FAULTS=1`` in the environment the rows that are seen are written; else a test fails whose row the page
lacks.
"""

import os
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "what-happens-if.md"
WRITING = bool(os.environ.get("WRITE_FAULTS"))
KINDS = {
    "Outputs": "What `kclib compress -o`, `kclib results --csv`, `kclib export` and the like write to.",
    "Users": "Another account than the one that installed kclib, or a container.",
    "Disk": "What lies on disk is checked before it is believed.",
    "Surroundings": "Streams, folders and memory that a command finds, and paths of every kind.",
    "Your code": "What `package.module:factory` does.",
    "Numbers": "No value is made of another in silence.",
    "Notebooks": "Run by `kclib batch`, by papermill alone or in JupyterLab.",
    "Interruptions": "What was finished is kept.",
    "Arguments": "Exit code 2, and one sentence.",
}
_HEAD = """# What happens if

Every row was seen: the tests try the fault, and `make faults` writes this page from what they see.
A wrong input ends in exit code 2, a run of which a part failed in exit code 1, Ctrl-C in exit code 130.
In Python the same sentences are exceptions of `kclib.errors`.
"""


_TITLES = "| what happens | what the user sees |"


class Rows:
    """The rows of the page, by kind; what is seen anew takes the place of what the page says."""

    def __init__(self):
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        for line in page():
            if line.startswith("## "):
                rows = self.found.get(line.removeprefix("## "), {})
            elif line.startswith("| ") and line != _TITLES:
                happens, _, sees = line.removeprefix("| ").removesuffix(" |").partition(" | ")
                rows[happens] = sees

    def add(self, kind: str, happens: str, sees: str) -> None:
        """Keep a row, or raise an AssertionError if the page says otherwise."""
        if WRITING:
            self.found[kind][cell(happens)] = cell(sees)
        else:
            said = self.found[kind].get(cell(happens))
            assert said == cell(sees), f"the page says {said!r} of {happens!r}: WRITE_FAULTS=1 writes it anew"

    def write(self) -> None:
        """Write the page."""
        parts = [_HEAD]
        for kind, rows in filter(lambda x: x[1], self.found.items()):
            table = [_TITLES, "|---|---|"]
            lines = (f"| {x} | {y} |" for x, y in rows.items())
            parts.append("\n".join([f"## {kind}\n", KINDS[kind], "", *table, *lines, ""]))
        PAGE.write_text("\n".join(parts))


def cell(text: str) -> str:
    """Return text as a cell of the page's tables."""
    return " ".join(text.replace("|", "\\|").split())


def page() -> list[str]:
    """Return the page's lines."""
    return PAGE.read_text().splitlines() if PAGE.is_file() else []


def told(code: int, text: str, **names: object) -> str:
    """Return what a command says at its end and its exit code; paths by the names that readers are given."""
    for name, path in names.items():
        text = text.replace(str(path), name)
    lines = [x for x in text.splitlines() if x.startswith("kclib: ")]
    sentence = lines[-1] if lines else text.strip().splitlines()[-1]
    sentence = re.sub(r"[0-9a-f]{64}", "…", sentence)
    return f"`{sentence}` (exit code {code})"
