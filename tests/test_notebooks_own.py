"""The documented batch on four networks of other people and 200 pictures in a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import four_networks
import nbformat
import pandas as pd
import pytest
import yaml

from kclib import kernels
from kclib.experiments import _reports

HERE = Path(__file__).parent
STEMS = [path.stem for path in sorted((HERE.parent / "notebooks").glob("*.ipynb"))]
CHAPTERS = {  # of each network, the notebooks in which its kind matters; all of them in `make soak`
    "lenet": "123456789",  # one channel, an input shape of its own, fewer kernels than K
    "mobilenet": "17",  # depthwise layers; most bytes lie in layers that are left out
    "resnet": "15678",  # as many kernels as K; a layer of 7×7; sums of branches
    "convolutional": "589",  # answers of one pixel
}
NETWORKS = list(CHAPTERS)
READ = {
    name: [stem for stem in STEMS if "SOAK" in os.environ or stem[1] in chapters]
    for name, chapters in CHAPTERS.items()
}
PAGES = [(name, stem) for name, stems in READ.items() for stem in stems]


def reading(stem: str) -> list[str]:
    """Return the networks that a notebook runs on."""
    return [name for name in NETWORKS if stem in READ[name]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folders of the reports by network, and how the batches that wrote them ended."""
    folder = tmp_path_factory.mktemp("own")
    base = yaml.safe_load((HERE / "four_networks.yaml").read_text()) | {
        "folder": str(HERE.parent / "notebooks")
    }
    pictures, calls = four_networks.write_pictures(folder / "pictures"), []
    for name in NETWORKS:
        given = {"model": f"four_networks:{name}", "data": f"folder:{pictures}"}
        given |= {"input_shape": [1, 28, 28]} if name == "lenet" else {}
        changes = [part for item in given.items() for part in ("--set", "{}={}".format(*item))]
        profile = folder / f"{name}.yaml"
        chosen = {stem: base["notebooks"][stem] for stem in READ[name]}
        profile.write_text(yaml.safe_dump(base | {"notebooks": chosen}, sort_keys=False))
        calls.append(["batch", "--profile", str(profile), "--out", str(folder), "--jobs", "1", *changes])
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "KCLIB_STORE": str(folder / "store")}
    command = [sys.executable, HERE / "one_process.py", json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = dict(zip(NETWORKS, json.loads(done.stdout.splitlines()[-1]), strict=True))
    print(ended)
    return {name: folder / name for name in NETWORKS}, ended, done.stderr


def text_of(folder: Path, stem: str) -> str:
    """Return what the cells of an executed notebook say."""
    cells = nbformat.read(folder / f"{stem}.ipynb", as_version=4).cells
    outputs = (output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
    return "\n".join(data["text/markdown"] for data in outputs if "text/markdown" in data)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_on_ones_own_network_and_folder_ends_with_exit_code_0(ran, name):
    folders, ended, said = ran
    assert ended[name][0] == 0, [line for line in said.splitlines() if line.startswith("kclib:")]
    for stem in READ[name]:
        executed = nbformat.read(folders[name] / f"{stem}.ipynb", as_version=4)
        assert f"four_networks:{name}" in str(executed.cells)
        assert _reports.read_headline(executed)
    assert (folders[name] / "index.html").read_text().count("<img") == len(READ[name])


@pytest.mark.parametrize(("name", "stem"), PAGES)
def test_a_page_says_nothing_that_is_not_a_number_nor_of_another_network(ran, name, stem):
    text = text_of(ran[0][name], stem)
    assert not re.search(r"\bnan\b|\binf\b|VGG|1,634,496", text)


@pytest.mark.parametrize(("name", "stem"), [page for page in PAGES if page[1][1] in "5789"])
def test_a_page_says_how_classes_were_matched_and_what_there_was_less_of(ran, name, stem):
    text = text_of(ran[0][name], stem)
    assert "test images were asked for" in text
    assert "class 0, class 1" in text
    assert ("divided by the content" in text) == (stem != "05-accuracy")


@pytest.mark.parametrize("name", reading("08-orthogonality"))
def test_a_page_says_which_clusters_there_are_no_kernels_for(ran, name):
    folder, n = ran[0][name], len(kernels.extract(getattr(four_networks, name)()))
    enough = n >= 4096
    assert (4096 in set(pd.read_csv(folder / "accuracy.csv").k)) == enough
    assert pd.read_csv(folder / "combinations.csv").clusters.max() == (4096 if enough else n // 4)


@pytest.mark.parametrize("name", reading("06-memory"))
def test_the_first_page_counts_the_kernels_and_memorys_says_for_how_many_clusters(ran, name):
    folder, n = ran[0][name], len(kernels.extract(getattr(four_networks, name)()))
    assert f"**{n:,}** kernels" in text_of(folder, "01-kernels")
    assert ("K = 4,096" in text_of(folder, "06-memory")) != (n >= 4096)


def test_convolutions_that_are_left_out_are_named_with_the_reason(ran):
    assert "1×1 kernels, not 5×5: `features" in text_of(ran[0]["mobilenet"], "01-kernels")
    assert "7×7 kernels, not 3×3: `conv1`" in text_of(ran[0]["resnet"], "01-kernels")
    assert "No convolution was left out" in text_of(ran[0]["lenet"], "01-kernels")


def test_bytes_are_kept_to_where_other_convolutions_take_most(ran):
    assert "share of the bytes above that" in text_of(ran[0]["mobilenet"], "07-recovery")
    for name in reading("07-recovery"):
        table = pd.read_csv(ran[0][name] / "recovery.csv").set_index("method")
        assert (table.loc[["clustering, trained"], "bytes"] < table.loc["dense", "bytes"]).all()
