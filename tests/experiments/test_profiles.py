import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import v4

from kclib.errors import DamagedFileError, InvalidValueError, KclibError, MissingFileError, UnknownNameError
from kclib.experiments import _profiles
from kclib.experiments._cell import METHODS
from kclib.experiments._profiles import Grid, ModelSource

SWEEP = """
note: Two models.
sweep:
  models: [vgg16-fashion, {name: "nets:small", weights: small.safetensors}]
  data: [fashion-mnist, "folder:images"]
  limit: 10
  scopes: [layer]
  clusters: [2, 16.0]
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of two notebooks with parameters."""
    for stem, source in {"good": 'greeting: str = "hello"\ncount: int = 1', "other": "greeting = 1"}.items():
        cells = [v4.new_code_cell(source, metadata={"tags": ["parameters"]})]
        kernel = {"name": "python3", "display_name": "Python", "language": "python"}
        found = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(found, tmp_path / f"{stem}.ipynb")
    return tmp_path


def load(folder: Path, text: str, **options):
    (folder / "p.yaml").write_text(text)
    return _profiles.load(str(folder / "p.yaml"), **options)


def load_notebooks(folder: Path, notebooks, parameters=None, **options):
    content = {"notebooks": notebooks, "parameters": parameters, "folder": "."}
    return load(folder, yaml.safe_dump(content, sort_keys=False), **options)


def test_a_change_wins_over_a_notebooks_own_value_and_that_over_the_shared_one(folder):
    given = {"good": {"parameters": {"count": 2}}, "other": None}, {"greeting": "ahoy", "count": 3}
    loaded = load_notebooks(folder, *given).parameters
    assert loaded == {"good": {"greeting": "ahoy", "count": 2}, "other": {"greeting": "ahoy"}}
    changed = load_notebooks(folder, *given, changes={"count": 4})
    assert changed.parameters["good"]["count"] == 4
    assert "count = 4" in changed.note


def test_paths_in_a_profile_are_beside_it_and_those_of_a_change_where_one_works(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = (
        'weights: str = ""\ndata: str = "fashion-mnist"\nreport_dir: str = ""\nmodel: str = "a:b"\nn: int = 1'
    )
    cell = v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "own.ipynb")

    def given(shared, changes):
        return load_notebooks(tmp_path, {"own": None}, shared, changes=changes).parameters["own"]

    relative = {"weights": "w.pt::ema", "data": "folder:images", "report_dir": "out", "model": "a:b", "n": 2}
    for folder, found in ((tmp_path, given(relative, {})), (here, given({}, relative))):
        assert found == relative | {
            "weights": f"{folder}/w.pt::ema", "data": f"folder:{folder}/images", "report_dir": f"{folder}/out"
        }  # fmt: skip
    home = {"weights": "~/w.pt", "data": "folder:~/images"}
    at_home = {"weights": f"{tmp_path}/home/w.pt", "data": f"folder:{tmp_path}/home/images"}
    assert given(home, {}) == given({}, home) == at_home
    plain = {"weights": "", "data": "cifar10", "model": "vgg16"}
    assert given(plain, {}) == given({}, plain) == plain
    (tmp_path / "home").mkdir()
    (tmp_path / "p.yaml").rename(tmp_path / "home" / "p.yaml")
    (tmp_path / "home" / "p.yaml").write_text("folder: ..\nnotebooks: {own: }")
    assert _profiles.load("~/p.yaml").folder == tmp_path


def test_a_notebook_has_its_expected_seconds_and_its_timeout(folder):
    loaded = load_notebooks(folder, {"good": {"seconds": 5, "timeout": 7}, "other": None})
    assert dict(loaded.seconds) == {"good": 5.0, "other": 60.0}
    assert dict(loaded.timeouts) == {"good": 7, "other": None}


def test_a_sweep_is_every_level_as_written_and_knows_what_paths_are_relative_to(tmp_path):
    assert load(tmp_path, SWEEP).sweep == Grid(
        (ModelSource("vgg16-fashion"), ModelSource("nets:small", "small.safetensors")),
        ("fashion-mnist", "folder:images"),
        limit=10,
        scopes=("layer",),
        clusters=(2, 16),
        folder=str(tmp_path),
    )


@pytest.mark.parametrize("name", _profiles.names())
def test_a_shipped_profile_sweeps_over_the_cells_of_its_notebook_05(name):
    loaded = _profiles.load(name)
    shown = loaded.parameters["05-accuracy"]
    assert list(loaded.sweep.clusters) == shown["clusters"]
    assert loaded.sweep.limit == shown["limit"]
    assert loaded.sweep.models == (ModelSource(shown["model"]),)
    assert loaded.sweep.data == (shown["data"],)


def test_the_schema_knows_all_methods():
    assert (
        list(METHODS) == _profiles._schema()["properties"]["sweep"]["properties"]["methods"]["items"]["enum"]
    )


@pytest.mark.parametrize(
    ("own", "shared", "changes", "message"),
    [
        ({"cuont": 1}, {}, {}, "parameter of good in line 4 of p.yaml 'cuont'.* mean 'count'"),
        ({}, {"cuont": 1}, {}, "parameter in line . of p.yaml 'cuont'.* mean 'count'"),
        ({}, {}, {"cuont": 1}, "parameter 'cuont'.* mean 'count'"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(folder, own, shared, changes, message):
    with pytest.raises(UnknownNameError, match=message):
        load_notebooks(folder, {"good": {"parameters": own}}, shared, changes=changes)


def test_a_torn_notebook_is_named(tmp_path):
    (tmp_path / "torn.ipynb").write_text('{"cells": [')
    with pytest.raises(DamagedFileError, match=r"torn\.ipynb"):
        load_notebooks(tmp_path, {"torn": None})


def test_an_unknown_profile_or_notebook_is_named(folder):
    with pytest.raises(UnknownNameError, match=r"mean 'smoke'.*known: full"):
        _profiles.load("smok")
    with pytest.raises(MissingFileError, match=r"absent\.ipynb does not exist"):
        load_notebooks(folder, {"absent": None})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("notebooks: [", 1),
        ("notebooks:\n  a: b: c", 2),
        ("\t", 1),
        ("notebooks: \x00", None),
        ("note: x\nnotebooks: !!python/object/apply:os.mkdir ['exploded']", 2),
        ("note: x\nnote: y\nnotebooks: {good: }", 2),
        ("note: &a x\nsweep: *a", 1),
        ("1: x\nnotebooks: {good: }", 1),
        ("note: !!int soon", None),
        ("[" * 5000, None),
        ("note: 2021-13-45", None),
    ],
)
def test_a_profile_that_is_not_plain_yaml_is_damaged_and_runs_no_code(folder, monkeypatch, text, line):
    monkeypatch.chdir(folder)
    where = f"line {line} of .*p.yaml" if line else "p.yaml"
    with pytest.raises(DamagedFileError, match=where) as found:
        load(folder, text)
    assert len(str(found.value).splitlines()) == 1
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1 of p.yaml: the whole is None; it must be a mapping with notebooks, a sweep, or both."),
        ("- good", "line 1 of p.yaml: the whole is .*; it must be a mapping with notebooks, .*"),
        (
            "note: a",
            "line 1 of p.yaml: the whole is .*; it must be a mapping with notebooks, a sweep, or both.",
        ),
        ("notebooks: [good]", "line 1 of p.yaml: notebooks is .*; it must be a mapping of notebooks, .*"),
        ("notebook: {good: }", "unknown key in line 1 of p.yaml 'notebook' .did you mean 'notebooks'.*"),
        (
            "notebooks:\n  good: {parameter: {}}",
            "unknown key in line 2 of p.yaml 'parameter' .*'parameters'.*",
        ),
        (
            "notebooks:\n  good:\n    seconds: soon",
            "line 3 of p.yaml: notebooks.good.seconds is 'soon'; it must be a finite number of .*",
        ),
        (
            "notebooks:\n  good: {seconds: .nan}",
            "line 2 of p.yaml: notebooks.good.seconds is nan; it must be a finite number .*",
        ),
        (
            "parameters:\n  a: [1, -.inf]\nnotebooks: {good: }",
            "line 2 .* parameters.a.1 is -inf; .* finite .*",
        ),
        ("notebooks:\n  good: 5", "line 2 of p.yaml: notebooks.good is 5; it must be a mapping with .*"),
        ("notebooks:\n  ../good: ", "line 2 of p.yaml: notebooks.../good is '../good'; it must be a note.*"),
        ("note: x\nnotebooks:\n  index: ", "line 3 of p.yaml: notebooks.index is 'index'; it must .*"),
        ("parameters: [count]\nnotebooks: {good: }", "line 1 of p.yaml: parameters is .*"),
        ("sweep: {}", "line 1 of p.yaml: sweep has no models; it must have one."),
        (SWEEP + "  seed: [0]", "unknown key in line 9 of p.yaml 'seed' .did you mean 'seeds'.*"),
        (
            SWEEP + "  seeds: []",
            "line 9 of p.yaml: sweep.seeds is .*; it must be a list of seeds, at least one.",
        ),
        (
            SWEEP + "  seeds: [-1]",
            "line 9 of p.yaml: sweep.seeds.0 is -1; it must be a whole number, 0 to .*",
        ),
        (
            SWEEP.replace("16.0", "0"),
            "line 8 of p.yaml: sweep.clusters.1 is 0; it must be a whole number, .*",
        ),
        (SWEEP.replace("16.0", "true"), "line 8 of p.yaml: sweep.clusters.1 is True; it must be a whole .*"),
        (SWEEP.replace("[layer]", "[layers]"), ".*scopes.0 is 'layers'; it must be one of layer, global."),
        (SWEEP + "  methods: [turn]", ".*methods.0 is 'turn'; it must be one of plain, scaled, turned, .*"),
        (SWEEP + "  precision: int8", ".*precision is 'int8'; it must be one of fp32, bf16, fp16."),
    ],
)
def test_a_profile_with_a_wrong_key_or_value_is_refused_with_its_line(folder, text, sentence):
    with pytest.raises(KclibError) as found:
        load(folder, text)
    assert isinstance(found.value, (InvalidValueError, UnknownNameError))
    assert re.fullmatch(sentence, str(found.value))


def test_a_profile_that_is_a_folder_or_absent_or_huge_is_named(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "huge.yaml").write_text("#" * (2 << 20))
    for name, error in (
        ("folder", MissingFileError),
        ("absent", MissingFileError),
        ("huge", DamagedFileError),
    ):
        with pytest.raises(error, match=f"{name}.yaml"):
            _profiles.load(str(tmp_path / f"{name}.yaml"))
