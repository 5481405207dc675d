import re
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from nbformat import v4

from kclib import batch, errors, reports

PARAMETERS = 'greeting: str = "hello"  # what to say\ncount: int = 1  # how many\nreport_dir: str = ""'
PICTURE = 'import sys, PIL.Image\nprint("halfway", file=sys.stderr)\ndisplay(PIL.Image.new("L", (900, 90)))'
HEADLINE = 'from kclib import reports\nreports.headline(f"{greeting} {count}: {report_dir}")'
NOTEBOOKS = {
    "good": [PARAMETERS, PICTURE, HEADLINE],
    "other": ['greeting: str = "hello"', "import kclib.reports as r\nr.headline(greeting)"],
    "broken": ["x = 0", "1 / x", "y = 1"],
    "exits": ["x = 0", "import os\nos._exit(0)", "y = 1"],
    "no_headline": ["x = 0", "y = 1"],
    "foreign_kernel": ["x = 0", "y = 1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of notebooks named for their behaviour; the first cell of each holds its parameters."""
    folder = tmp_path_factory.mktemp("notebooks")
    for stem, sources in NOTEBOOKS.items():
        cells = [v4.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = ["parameters"]
        name = "elsewhere" if stem == "foreign_kernel" else "python3"
        kernel = {"name": name, "display_name": "Python", "language": "python"}
        notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder


def profile_file(folder: Path, notebooks, parameters=None) -> str:
    content = {"note": "A <tiny> profile.", "notebooks": notebooks, "parameters": parameters, "folder": "."}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The report of a batch that ends well."""
    notebooks = {"good": {"parameters": {"count": 2}}, "other": None}
    path = profile_file(folder, notebooks, {"greeting": "ahoy", "count": 3})
    profile = batch.load_profile(path, changes={"greeting": "moin"})
    return batch.run(profile, tmp_path_factory.mktemp("out")).parent


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]


def test_a_batch_leaves_an_executed_copy_and_a_page_of_each_notebook_and_an_index(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "good.html", "good.ipynb", "index.html", "other.html", "other.ipynb",
    ]  # fmt: skip


def test_parameters_reach_the_notebooks_that_have_them(finished):
    good, other = (nbformat.read(finished / f"{stem}.ipynb", 4) for stem in ("good", "other"))
    assert reports.read_headline(good) == f"moin 2: {finished.resolve()}"
    assert reports.read_headline(other) == "moin"


def test_a_change_wins_over_a_notebooks_own_value_and_that_over_the_shared_one(folder):
    notebooks = {"good": {"parameters": {"count": 2}}, "other": None}
    path = profile_file(folder, notebooks, {"greeting": "ahoy", "count": 3})
    loaded = batch.load_profile(path).parameters
    assert loaded == {"good": {"count": 2, "greeting": "ahoy"}, "other": {"greeting": "ahoy"}}
    assert batch.load_profile(path, changes={"count": 4}).parameters["good"]["count"] == 4


def test_the_index_shows_headlines_pictures_and_links(finished):
    index = (finished / "index.html").read_text()
    assert f"moin 2: {finished.resolve()}" in index
    assert index.count('src="data:image/png;base64,') == 1
    assert {"good.html", "good.ipynb", "other.html", "other.ipynb"} <= set(re.findall('href="(.*?)"', index))
    assert "A &lt;tiny&gt; profile." in index
    assert "greeting = moin" in index


def test_the_page_for_readers_shows_results_without_code_or_progress(finished):
    page = (finished / "good.html").read_text()
    assert f"moin 2: {finished.resolve()}" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"headline\(|Image\.new|what to say|halfway", page)


def test_the_notebooks_themselves_stay_without_outputs(finished, folder):
    assert not any(outputs(folder / f"{stem}.ipynb") for stem in ("good", "other"))


@pytest.mark.parametrize(
    ("stem", "error"),
    [
        ("broken", "ZeroDivisionError: division by zero"),
        ("exits", "died"),
        ("no_headline", "headline"),
        ("foreign_kernel", ""),
    ],
)
def test_a_notebook_that_fails_ends_the_batch_and_is_kept_with_its_error(folder, tmp_path, stem, error):
    profile = batch.load_profile(profile_file(folder, {stem: None, "other": None}))
    with pytest.raises(errors.NotebookError, match=f"notebook {stem} failed.*{error}.*{stem}.ipynb"):
        batch.run(profile, tmp_path)
    assert {path.stem for path in (tmp_path / "tiny").iterdir()} == {stem, "index"}
    index = (tmp_path / "tiny" / "index.html").read_text()
    assert re.search(f"{stem} failed:</b> .*{error}", index)
    assert re.search('other\n.*"not run">not run<', index, re.DOTALL)
    kept = [output.ename for output in outputs(tmp_path / "tiny" / f"{stem}.ipynb") if "ename" in output]
    assert kept == (["ZeroDivisionError"] if stem == "broken" else [])


def test_an_interrupted_batch_leaves_an_index_with_its_finished_part(folder, tmp_path, monkeypatch):
    def execute(source, target, parameters, **options):
        if Path(source).stem == "other":
            raise KeyboardInterrupt
        data = {"application/vnd.kclib.headline+json": {"text": "forty-two"}, "text/plain": "42"}
        shown = v4.new_output("display_data", data)
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("", outputs=[shown])]), target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    profile = batch.load_profile(profile_file(folder, dict.fromkeys(["good", "other", "broken"])))
    with pytest.raises(KeyboardInterrupt):
        batch.run(profile, tmp_path)
    index = (tmp_path / "tiny" / "index.html").read_text()
    assert "<p>forty-two</p>" in index
    assert re.findall('<p class="(interrupted|not run)">', index) == ["interrupted", "not run"]


@pytest.mark.parametrize(
    ("own", "shared", "changes", "message"),
    [
        ({"cuont": 1}, {}, {}, "parameter of good 'cuont'.* mean 'count'"),
        ({}, {"cuont": 1}, {}, "parameter 'cuont'.* mean 'count'"),
        ({}, {}, {"cuont": 1}, "parameter 'cuont'.* mean 'count'"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(folder, own, shared, changes, message):
    path = profile_file(folder, {"good": {"parameters": own}}, shared)
    with pytest.raises(errors.UnknownNameError, match=message):
        batch.load_profile(path, changes=changes)


def test_a_torn_notebook_is_named(tmp_path):
    (tmp_path / "torn.ipynb").write_text('{"cells": [')
    with pytest.raises(errors.DamagedFileError, match=r"torn\.ipynb"):
        batch.load_profile(profile_file(tmp_path, {"torn": None}))


def test_an_unknown_profile_or_notebook_is_named(folder):
    with pytest.raises(errors.UnknownNameError, match=r"known: .*full.* mean 'smoke'"):
        batch.load_profile("smok")
    with pytest.raises(errors.MissingFileError, match=r"absent\.ipynb does not exist"):
        batch.load_profile(profile_file(folder, {"absent": None}))


@pytest.mark.parametrize("text", ["notebooks: [", "notebooks:\n  a: b: c", "\t", "notebooks: \x00"])
def test_a_profile_that_is_not_yaml_is_damaged(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(errors.DamagedFileError, match=r"p\.yaml is not valid YAML"):
        batch.load_profile(str(tmp_path / "p.yaml"))


def test_a_profile_that_would_run_code_is_refused_and_runs_none(tmp_path):
    target = tmp_path / "exploded"
    (tmp_path / "p.yaml").write_text(f"notebooks: !!python/object/apply:os.mkdir ['{target}']")
    with pytest.raises(errors.DamagedFileError, match="not valid YAML"):
        batch.load_profile(str(tmp_path / "p.yaml"))
    assert not target.exists()


@pytest.mark.parametrize("text", ["", "- good", "note: a", "notebooks: [good]"])
def test_a_profile_without_a_mapping_of_notebooks_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(errors.InvalidValueError, match="mapping with the key 'notebooks'"):
        batch.load_profile(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "notebook: {good: }\nnotebooks: {good: }",
        "notebooks: {good: {parameter: {count: 2}}}",  # for parameters
        "notebooks: {good: {seconds: soon}}",
        "notebooks: {good: 5}",
        "parameters: [count]\nnotebooks: {good: }",
    ],
)
def test_a_profile_with_a_wrong_key_or_value_is_refused(folder, text):
    (folder / "p.yaml").write_text(f"folder: .\n{text}")
    with pytest.raises(errors.KclibError, match=r"good|p\.yaml"):
        batch.load_profile(str(folder / "p.yaml"))
