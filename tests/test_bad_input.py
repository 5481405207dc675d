import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import tiny
import what_happens
from what_happens import told
from wrong_inputs import COMMAND_FILES, WRONG_COMMANDS, WRONG_INPUTS, Given

import kclib
from kclib import cli
from kclib.errors import KclibError
from kclib.store import Entry, Store

INNER = {"kclib.__main__", "kclib.cli", "kclib.errors", "kclib._util.checks"}  # what users do not call


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, one_thread):
    """A folder of its own, in which nothing may explode, with a store beside it."""
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("KCLIB_DATA", "")
    monkeypatch.delenv("KCLIB_DATA")
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    (tmp_path / "folder").mkdir()
    yield tmp_path / "folder"
    assert not (tmp_path / "folder" / "exploded").exists(), "code of a stranger ran"
    assert not list(tmp_path.glob("**/escaped"))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        pytest.param(*x[1:], id=f"{i}-{x[0].__module__[6:]}.{x[0].__qualname__}")
        for i, x in enumerate(WRONG_INPUTS)
    ],
)
def test_a_wrong_input_is_one_clear_sentence_of_a_typed_exception(folder, call, error, says):
    with pytest.raises(KclibError) as found:
        call(Given(folder))
    text = str(found.value)
    assert type(found.value) is error, text
    assert says in text
    assert re.fullmatch(r"[^\n]{20,600}[.?]", text), "one sentence, of a length that one reads"


@pytest.mark.parametrize(
    ("arguments", "says"), WRONG_COMMANDS, ids=lambda x: " ".join(x) if type(x) is list else ""
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(folder, monkeypatch, capsys, arguments, says, seen):
    Store().put(Entry({"kind": "evaluation", "scope": "layer", "k": 2}, {"images": 9}, {}))
    for name, text in COMMAND_FILES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["kclib", *(x.format(folder=folder) for x in arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, said = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert says.format(folder=folder) in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    sentences = re.findall(r"^kclib: .*\.$", said, re.MULTILINE)
    assert len(sentences) == 1 or "Usage:" in said
    if sentences:
        ending = re.sub("; known: .*`", "; known: …`", told(2, said, FOLDER=folder))
        seen("Arguments", command(arguments), re.sub(r" \((?!did|exit)[^`]*\)\.`", " (…).`", ending))


def command(arguments: list[str]) -> str:
    return f"`{' '.join(['kclib', *arguments]).format(folder='FOLDER')}`"


def test_each_row_of_the_page_of_faults_is_what_a_test_tells_it():
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
    known = {what_happens.cell(command(x)) for x, _ in WRONG_COMMANDS}
    rows = [x.split(" | ")[0].removeprefix("| ") for x in what_happens.page() if x.startswith("| ")]
    assert len(rows) > 80
    assert [x for x in rows if x != "what happens" and x not in known and x.strip("`") not in tests] == []


def test_with_debug_the_traceback_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kclib", "--debug", "sweep", "smok"])
    with pytest.raises(KclibError):
        cli.main()


def test_an_error_nobody_foresaw_is_one_sentence_too(monkeypatch, capsys):
    monkeypatch.setattr("kclib.store.Store.gc", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["kclib", "gc"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "kclib: ZeroDivisionError: division by zero. This should not happen; kclib --debug shows where.\n"
    )


def raising() -> list:
    """Return every public class, function and method that says what it raises."""
    found = []
    for name in sorted({x.name for x in pkgutil.walk_packages(kclib.__path__, "kclib.")} - INNER):
        module = importlib.import_module(name)
        own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
        own += [getattr(x, y) for x in own if inspect.isclass(x) for y in vars(x)]
        public = [x for x in own if not re.search(r"(^|\.)_", getattr(x, "__qualname__", "_"))]
        found += [x for x in public if re.search(r"\n *Raises\n", x.__doc__ or "")]
    return found


def test_whatever_says_what_it_raises_is_tried():
    """Others are tried too: those whose errors need no words beyond the package's own."""
    assert len(raising()) > 100
    tried = [x[0] for x in WRONG_INPUTS]
    assert len(set(tried)) > 170
    assert [f"{x.__module__}.{x.__qualname__}" for x in raising() if x not in tried] == []
