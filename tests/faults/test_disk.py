"""What was changed on disk behind our back: each is noticed, and what the user sees is on the page."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from tiny import tiny_data, tiny_model
from what_happens import told

from kclib import clustering, compression, kernels, training
from kclib.errors import DamagedFileError
from kclib.experiments._cell import Subject, forget
from kclib.store import Entry, Store

KIND = "Disk"
KEY = {"kind": "evaluation", "scope": "layer", "k": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    store = Store()
    for k in (2, 3):
        store.put(Entry(KEY | {"k": k}, {"images": 9}, {"hits": torch.arange(9).numpy()}))
    return store


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_result(store, kclib, caplog, seen):
    path = store.path(KEY)
    flip(path, -3)
    code, out, _ = kclib("results", "--columns", "k")
    assert (code, out.split()) == (0, ["k", "3"])
    (said,) = [x.getMessage() for x in caplog.records]
    said = re.sub(r"[0-9a-f]{64}", "…", said.replace(str(store.root), "STORE"))
    seen(
        KIND,
        "a bit of a stored result has flipped, and `kclib results` lists it",
        f"it is left out; `{said}`",
    )
    caplog.clear()
    assert store.once(KEY, lambda: Entry(KEY, {"images": 9}, {})).row == {"images": 9}
    said = re.sub(r"[0-9a-f]{64}", "…", caplog.records[0].getMessage().replace(str(store.root), "STORE"))
    seen(KIND, "the same, when a sweep needs it", f"`{said}`")


def test_a_result_under_the_name_of_another(store, kclib, seen):
    os.replace(store.path(KEY), store.path(KEY | {"k": 3}))
    assert store.get(KEY | {"k": 3}) is None
    code, out, _ = kclib("results")
    assert (code, "has nothing like that" in out) == (0, True)
    seen(
        KIND,
        "a stored result lies under the name of another",
        "not listed, and computed again",
    )


def test_a_number_in_the_table_that_the_store_keeps(store, kclib, seen, monkeypatch):
    monkeypatch.setattr("kclib.store._TICK", 0)
    store.table("evaluation")
    path = store.root / "evaluation.parquet"
    pd.read_parquet(path).assign(images=99).to_parquet(path)
    assert kclib("results", "--columns", "images")[1].split() == ["images", "9", "9"]
    seen(
        KIND,
        "a number in the table that the store keeps beside its results is changed",
        "the table is made again",
    )


def test_a_compressed_file(tmp_path, kclib, seen):
    path = tmp_path / "small.safetensors"
    network = tiny_model().network
    found = clustering.cluster(kernels.extract(network), 3, progress=False)
    compression.save(compression.compress(network, found), path)
    flip(path, -3)
    code, _, said = kclib("inspect", path)
    assert code == 2
    seen(KIND, "a bit of a compressed file has flipped", told(code, said, **{"small.safetensors": path}))
    path.write_bytes(path.read_bytes()[:-20])
    code, _, said = kclib("inspect", path)
    assert code == 2
    sentence = re.sub(r"\(.*\)\.`", "(…).`", told(code, said, **{"small.safetensors": path}))
    seen(KIND, "the end of a compressed file is missing", sentence)


def test_the_state_of_a_training(tmp_path, seen):
    network, recipe = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6)), None
    recipe = training.Recipe(epochs=1, batch_size=8, held_back=8, images=8, shift=0, square=1)
    arguments = (network, tiny_data(), tiny_model().preprocess, recipe, tmp_path / "x.pt")
    training.train(*arguments)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-500])
    with pytest.raises(DamagedFileError) as found:
        training.train(*arguments)
    sentence = re.sub(r"\(.*\)", "(…)", str(found.value).replace(str(tmp_path), "FOLDER"))
    seen(KIND, "the state that a training goes on from is cut off", f"`{sentence}`")


def test_results_that_vanish_during_a_sweep(tmp_path, monkeypatch, kclib, caplog, seen):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    monkeypatch.chdir(tmp_path)
    tiny.write_pictures(tmp_path / "pictures")
    (tmp_path / "small.yaml").write_text(
        'sweep: {models: ["tiny:photo_model"], data: ["folder:pictures"], limit: 0, '
        "scopes: [layer], clusters: [2]}"
    )
    forget()
    genuine, times = Subject.entry, []

    def vanishing(subject, cell, **options):
        entry = genuine(subject, cell, **options)
        times.append(cell)
        if len(times) == 1:
            subject.store.path(entry.key).unlink()
        return entry

    monkeypatch.setattr(Subject, "entry", vanishing)
    assert kclib("sweep", "small.yaml")[0] == 0
    assert "gone from the store, or damaged; computed again" in caplog.text
    assert (len(times), len(pd.read_parquet("reports/small/results.parquet"))) == (3, 2)
    seen(KIND, "a result vanishes while the sweep goes on", "it is computed again, and that is said")
    monkeypatch.setattr(Store, "put", lambda self, entry: None)
    code, _, said = kclib("sweep", "small.yaml", "--rerun")
    assert code == 1
    seen(KIND, "it vanishes again and again", told(code, said, PATH=tmp_path))
