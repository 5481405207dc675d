"""The README and the site's pages: links lead to files, code runs, names exist, tables are those of runs."""

import base64
import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks import tables
from kclib.errors import InvalidValueError, MissingFileError
from kclib.experiments import _reports
from kclib.experiments._mime import HEADLINE
from kclib.experiments._reports import Chapter, Report

ROOT = Path(__file__).parents[1]
PAGES = tables.pages()
CODE = {f"docs/{x}.md" for x in ("combine", "engine", "lose-less", "ship", "similarity")}
OWN = "docs/own-network.md"  # has a test of its own


def code(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [x for x in PAGES if name(x) in CODE], ids=name)
def test_its_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(code(page)), page.name, "exec"), {})
    assert capsys.readouterr().out or list(tmp_path.iterdir())


def test_no_other_page_has_code_of_its_own():
    (readme,) = code(ROOT / "README.md")
    others = {name(x): code(x) for x in PAGES if name(x) not in CODE | {OWN}}
    assert {key: blocks for key, blocks in others.items() if blocks} == {
        "README.md": [readme],
        "docs/start.md": [readme],
        "docs/api.md": ["import kclib\n"],
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_it_gives_are_there(page):
    for dotted in re.findall(r"`(kclib(?:\.\w+)+)", page.read_text()):
        path = dotted.split(".")
        if path[-1] in ("json", "py"):
            continue
        assert not any(part.startswith("_") for part in path), dotted
        found = importlib.import_module("kclib")
        for part in path[1:]:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_each_table_stands_on_one_page_as_its_run_says():
    texts = {page: page.read_text() for page in PAGES}
    marked = [x for text in texts.values() for x in re.findall(r"<!-- rows: (\w+) -->", text)]
    assert sorted(marked) == sorted(tables.ROWS)
    for page, text in texts.items():
        assert tables.rewritten(text) == text, page.name


def test_the_workflow_publishes_what_make_docs_builds():
    (steps,) = (
        x["steps"] for x in yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())["jobs"].values()
    )
    assert [x["run"] for x in steps if "run" in x] == [
        "make setup",
        ".venv/bin/kclib batch --profile smoke --no-open",
        "make docs",
    ]
    (path,) = (x["with"]["path"] for x in steps if "upload-pages" in x.get("uses", ""))
    assert f"sphinx -q -W --keep-going -j auto docs {path}\n" in (ROOT / "Makefile").read_text()


@pytest.fixture
def notebook_pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("notebook_pages")


def notebook(*outputs: dict, source: str = "1 + 1", executed: int | None = 1) -> dict:
    title = {"cell_type": "markdown", "id": "0", "metadata": {}, "source": ["# A question"]}
    cell = {
        "cell_type": "code",
        "id": "1",
        "metadata": {},
        "execution_count": executed,
        "outputs": list(outputs),
    }
    return {"cells": [title, cell | {"source": [source]}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def write(root: Path, folder: str, made: dict) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "01.ipynb").write_text(json.dumps(made))


def origin(page: dict) -> str:
    return page["cells"][1]["source"]


def test_a_notebooks_page_shows_the_fullest_whole_run(notebook_pages, tmp_path):
    write(tmp_path, "notebooks", notebook(executed=None))
    assert "without its outputs" in origin(notebook_pages.page(tmp_path, "01.ipynb"))
    write(tmp_path, "reports/smoke", notebook())
    assert "profile `smoke`" in origin(notebook_pages.page(tmp_path, "01.ipynb"))
    write(tmp_path, "reports/full", notebook())
    assert "profile `full`" in origin(notebook_pages.page(tmp_path, "01.ipynb"))
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    for broken in (notebook(error), notebook(executed=None)):
        write(tmp_path, "reports/full", broken)
        assert "profile `smoke`" in origin(notebook_pages.page(tmp_path, "01.ipynb"))


def test_a_notebooks_page_says_that_the_notebook_has_changed(notebook_pages, tmp_path):
    write(tmp_path, "notebooks", notebook(executed=None))
    write(tmp_path, "reports/smoke", notebook(source="1 + 2"))
    assert "has changed since" in origin(notebook_pages.page(tmp_path, "01.ipynb"))


def test_a_notebooks_page_has_pictures_and_no_widgets(notebook_pages, tmp_path):
    widget, picture = (
        {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"},
        {"image/png": "a"},
    )
    explorer = {"output_type": "execute_result", "data": widget, "metadata": {}, "execution_count": 1}
    bar, drawn = ({"output_type": "display_data", "data": x, "metadata": {}} for x in (widget, picture))
    write(tmp_path, "notebooks", notebook(executed=None))
    write(tmp_path, "reports/smoke", notebook(bar, explorer, drawn))
    shown = [x["data"] for x in notebook_pages.page(tmp_path, "01.ipynb")["cells"][2]["outputs"]]
    assert [list(x) for x in shown] == [["text/markdown"], ["image/png"]]
    assert "make lab" in shown[0]["text/markdown"]


def test_the_pages_of_notebooks_that_are_gone_go(notebook_pages, tmp_path):
    write(tmp_path, "notebooks", notebook(executed=None))
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "00.ipynb").write_text("{}")
    notebook_pages.write(tmp_path, tmp_path / "pages")
    assert [x.name for x in (tmp_path / "pages").iterdir()] == ["01.ipynb"]


@pytest.fixture
def sample_report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("sample_report")


@pytest.fixture
def full(tmp_path):
    """A report of a notebook with a wide picture and an interactive map."""
    file = io.BytesIO()
    Image.effect_noise((1800, 300), 90).save(file, "PNG")
    shown = (
        {"image/png": base64.b64encode(file.getvalue()).decode()},
        {"text/html": "<p>the map</p>" + "<br>" * 100_000},
        {HEADLINE: {"text": "They are 42.", "main": True}, "text/plain": "They are 42."},
    )
    outputs = [{"output_type": "display_data", "data": x, "metadata": {}} for x in shown]
    write(tmp_path, "full", notebook(*outputs))
    (tmp_path / "full" / "found.csv").write_text("k\n42\n")
    chapter = Chapter("01", "done", seconds=3.0)
    _reports.write(tmp_path / "full", Report("full", chapters=(chapter,)))
    return tmp_path / "full"


def test_the_sample_is_a_report_with_small_pictures_and_without_interactive_maps(
    sample_report, full, tmp_path
):
    index = sample_report.write(full, tmp_path / "sample")
    assert {x.name for x in index.parent.iterdir()} == {"01.html", "found.csv", "index.html"}
    page = index.with_name("01.html").read_text()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (900, 150)
    assert "the map" not in page
    for text in (page, index.read_text()):
        assert "They are 42." in text
        targets = set(re.findall(r'href="([^"#:]+)"', text))
        assert all((index.parent / x).is_file() for x in targets)


def test_the_sample_takes_smaller_pictures_until_it_has_room(sample_report, full, tmp_path, monkeypatch):
    whole = sum(x.stat().st_size for x in sample_report.write(full, tmp_path / "sample").parent.iterdir())
    monkeypatch.setattr(sample_report, "LARGEST", whole - 1)
    smaller = sample_report.write(full, tmp_path / "sample").parent
    assert sum(x.stat().st_size for x in smaller.iterdir()) < whole
    monkeypatch.setattr(sample_report, "LARGEST", 1)
    with pytest.raises(InvalidValueError, match="must have at most 1"):
        sample_report.write(full, tmp_path / "sample")
    assert not smaller.exists()


def test_a_report_that_is_not_whole_is_no_sample(sample_report, full, tmp_path):
    with pytest.raises(MissingFileError, match="make run PROFILE=absent"):
        sample_report.write(tmp_path / "absent", tmp_path / "sample")
    _reports.write(full, Report("full", chapters=(Chapter("01", "failed"),)))
    with pytest.raises(MissingFileError, match="no whole report"):
        sample_report.write(full, tmp_path / "sample")
