"""The notebooks: their anatomy, and that they run to their last cell on real and on made-up models."""

import html
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from kclib import compression, datasets, models, training
from kclib.compression import byte_counts
from kclib.experiments import _batch, _profiles, _reports

NOTEBOOKS = sorted(_profiles.NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_nine_notebooks_in_run_order():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, 10)]


def test_committed_without_outputs(notebook):
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_one_parameters_cell_of_annotated_literals_with_help(notebook):
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: \w+(\[\w+\])? = .+  # .+", line), line


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook):
        assert cell.source.count("\n") <= 20
        assert not re.search(r"^\s*(def |class |!|%)|\blambda\b", cell.source, re.MULTILINE)
        assert "sys.path" not in cell.source


def test_begins_with_its_question_and_ends_with_claims_and_a_headline(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert _reports.read_question(notebook).endswith("?")
    assert "**Reads**" in notebook.cells[0].source
    assert "assert " in notebook.cells[-1].source
    assert "reports.headline(" in notebook.cells[-1].source


@pytest.mark.parametrize("name", _profiles.names())
def test_every_profile_names_the_notebooks_in_order_with_known_parameters(name):
    expected = [path.stem for path in NOTEBOOKS]
    if name == "imagenet":
        expected = expected[:6]  # no training images there
    assert list(_profiles.load(name).parameters) == expected


SMALL = """
import torch
from safetensors.torch import load_file
from torch import nn

from kclib import models


def network():
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def model():
    made = network()
    made.load_state_dict(load_file(r"{path}"))
    return models.Model("small", made.eval(), models.fashion_preprocess(), {classes})
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with module `smallnet`, whose factory `model` gives a small network trained for a moment."""
    folder = tmp_path_factory.mktemp("small")
    data = datasets.load_data("fashion-mnist", "train", limit=6000)
    source = SMALL.replace("{path}", str(folder / "weights.safetensors")).replace(
        "{classes}", repr(data.classes)
    )
    (folder / "smallnet.py").write_text(source)
    names = {}
    exec(source, names)
    torch.manual_seed(0)
    recipe = training.Recipe(epochs=2, peak_rate=1e-2, held_back=500)
    fit = training.train(
        names["network"](), data, models.fashion_preprocess(), recipe, folder / "training.pt"
    )
    save_file({k: v.contiguous() for k, v in fit.model.state_dict().items()}, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, small):
    """The smoke profile with fewer K and images; on the shipped model 01 and 05, on a small one the others.

    In `make soak` the shipped model has all up to recovery.
    """
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCLIB_STORE", str(folder / "store"))
        patch.setenv("PYTHONPATH", str(small))
        changes = {"limit": 200, "clusters": [16, 4096], "per_layer": 60, "batches": [1, 2]}
        profile = _profiles.load("smoke", changes=changes | {"held_back": 1000, "images": 1280})
        own = {
            "02-similarity": {},
            "03-embedding": {"per_layer": 40},
            "04-clustering": {"n_clusters": 64},
            "06-memory": {"n_clusters": 256},
            "07-recovery": {"limit": 2000, "shares": [12, 16]},
            "08-orthogonality": {
                "limit": 500,
                "clusters": [None, 32, 256],
                "scopes": ["layer", "global"],
                "seeds": [0, 1],
            },
            "09-damage": {"limit": 1000, "n_clusters": 24, "restored": 400},
        }
        own = {
            stem: {"model": "smallnet:model"} | changed
            for stem, changed in own.items()
            if "SOAK" not in os.environ or stem > "07"
        }
        parameters = {stem: given | own.get(stem, {}) for stem, given in profile.parameters.items()}
        timeouts = dict.fromkeys(parameters, 900)  # a cell that hangs fails
        _batch.run(replace(profile, parameters=parameters, timeouts=timeouts), folder)
    return folder / "smoke"


def test_the_smoke_profile_runs_to_every_headline(smoke):
    for path in NOTEBOOKS:
        executed = nbformat.read(smoke / path.name, as_version=4)
        assert _reports.read_headline(executed)
        assert (smoke / f"{path.stem}.html").stat().st_size > 10_000
    index = (smoke / "index.html").read_text()
    assert index.count("<img") == len(NOTEBOOKS)
    assert "failed" not in re.sub(r"<style>.*</style>", "", index, flags=re.DOTALL)


def test_the_accuracy_table_of_the_run_makes_sense(smoke):
    table = pd.read_csv(smoke / "accuracy.csv")
    dense = table[table.scope == "dense"].iloc[0]
    assert dense.top1 > 85
    at = table.set_index(["scope", "k"])
    assert at.loc[("global", 4096)].top1 > at.loc[("global", 16)].top1 + 20
    assert at.loc[("global", 4096)].kernels_removed == pytest.approx(100 * (1 - 4096 / 1_634_496))
    assert at.loc[("layer", 4096)].inertia < at.loc[("global", 4096)].inertia


def test_what_recovery_wins_at_equal_bytes_is_in_its_table_and_its_file(smoke, small, monkeypatch):
    table = pd.read_csv(smoke / "recovery.csv").set_index(["method", "setting"])
    assert table.loc[("dense", np.nan), "top1"].item() > 60
    for share in ("1/12", "1/16"):
        plain, best = (table.loc[(f"clustering, {step}", share)] for step in ("same K everywhere", "trained"))
        assert best["drop"] < plain["drop"]
        assert best.ratio >= float(share[2:])
    assert {"pruning", "product quantization"} <= set(table.index.get_level_values("method"))
    monkeypatch.syspath_prepend(small)
    found = compression.load(smoke / "recovered.safetensors", architecture="smallnet:model")
    assert byte_counts.stored_bytes(found.network) == table.loc[("clustering, trained", "1/16"), "bytes"]


def test_the_best_combination_is_a_file_of_the_bytes_that_its_table_says(smoke, small, monkeypatch):
    table = pd.read_csv(smoke / "combinations.csv", keep_default_na=False)
    assert len(table) == (1 + 2 * 2 * 2) * 2 * 2 + 2 * 2 * 2 * 2  # both orders where kernels are pruned too
    monkeypatch.syspath_prepend(small)
    found = compression.load(smoke / "combined.safetensors", architecture="smallnet:model")
    best = table[(table.clustering != "none") & (table.bytes == byte_counts.stored_bytes(found.network))]
    assert best["drop"].min() <= max(1, table.loc[table.clustering != "none", "drop"].min())
    excess = pd.read_csv(smoke / "excess.csv", keep_default_na=False)
    assert excess.excess.tolist() == pytest.approx((excess["drop"] - excess.predicted).tolist())


def test_damage_is_told_for_each_layer_both_ways(smoke):
    table = pd.read_csv(smoke / "damage.csv").set_index("way")
    assert table.loc["alone", "layer"].tolist() == table.loc["all but", "layer"].tolist() == ["0", "3", "6"]
    assert table.loc["all", "drop"] > 0


def test_only_2d_kernels_are_called_kernels(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"running\s+kernel", text), "a notebook's process is called so"


def test_pictures_of_widgets_stand_beside_them_for_readers_without_a_kernel(smoke):
    page = (smoke / "04-clustering.html").read_text()
    assert not re.search(r'<img(?![^>]* alt="[^"]{5})', page), "each picture has a text"
    executed = json.loads((smoke / "04-clustering.ipynb").read_text())
    pictures = sum(
        "image/png" in output.get("data", ())
        for cell in executed["cells"]
        for output in cell.get("outputs", ())
    )
    assert pictures >= 5
    assert page.count('src="data:image/png') == pictures


@pytest.mark.parametrize("stem", ["02-similarity", "03-embedding", "04-clustering", "05-accuracy"])
def test_the_executed_notebook_keeps_its_widgets_with_the_picture_they_show(smoke, stem):
    executed = json.loads((smoke / f"{stem}.ipynb").read_text())
    kept = executed["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    texts = [x["state"].get("value", "") for x in kept.values() if x["model_name"] == "HTMLModel"]
    assert any(re.search("<svg|<img[^>]* src=.data:image/png;base64,", text) for text in texts)
    shown = [o.get("data", {}) for cell in executed["cells"] for o in cell.get("outputs", ())]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)


def test_the_interactive_map_is_in_the_page_and_asks_no_network(smoke):
    page = (smoke / "03-embedding.html").read_text()
    assert page.count("<iframe") == 1
    assert "Bokeh" in page
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?https?:""", html.unescape(page))


def test_papermill_alone_runs_a_notebook_from_any_folder(tmp_path, small):
    command = [sys.executable, "-m", "papermill", _profiles.NOTEBOOKS / "05-accuracy.ipynb", "out.ipynb"]
    options = ["-p", "limit", "50", "-p", "report_dir", "found", "-y", "{clusters: [16]}"]
    options += ["-p", "model", "smallnet:model", "-p", "n_clusters", "32"]
    path = os.pathsep.join([str(small), os.environ.get("PYTHONPATH", "")])
    store = {"KCLIB_STORE": str(tmp_path / "store"), "PYTHONPATH": path}
    subprocess.run([*command, *options], cwd=tmp_path, env=os.environ | store, check=True)
    assert _reports.read_headline(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert set(pd.read_csv(tmp_path / "found" / "accuracy.csv").k) == {0, 16}
