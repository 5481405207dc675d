"""Numbers are what they are: no whole number is made of 2.7, "23" or True, and numpy's count as Python's."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_data, tiny_model
from torch import nn

from kclib import (
    clustering,
    combination,
    datasets,
    evaluation,
    experiments,
    kernels,
    kmeans,
    models,
    plots,
    similarity,
    training,
)
from kclib.combination import factorial
from kclib.compression import _formats, _packing, latency
from kclib.errors import InvalidValueError
from kclib.experiments import _cell
from kclib.experiments._pool import Workers
from kclib.kernels import KernelBank
from kclib.kmeans import symmetric
from kclib.models import _state_dicts
from kclib.recovery import _sequential
from kclib.similarity import _neighbours, embedding
from kclib.store import Entry, Store

pytestmark = pytest.mark.usefixtures("one_thread")


class Given:
    """What is computed once for all."""

    model, data = tiny_model(), tiny_data()
    bank: KernelBank = kernels.extract(model.network)
    points = bank.points


@pytest.fixture
def given(tmp_path):
    given = Given()
    given.store = Store(tmp_path)
    given.subject = _cell.Subject(given.model, given.data, given.store)
    return given


# What is called with a whole number, and one that is right.
WHOLE = {
    "cluster, K": (lambda g, x: clustering.cluster(g.bank, x, progress=False), 3),
    "cluster, K of a group": (lambda g, x: clustering.cluster(g.bank, {"0": x, "2": 2}, progress=False), 3),
    "cluster, seed": (lambda g, x: clustering.cluster(g.bank, 3, seed=x, progress=False), 1),
    "cluster, threads": (lambda g, x: clustering.cluster(g.bank, 3, n_threads=x, progress=False), 1),
    "clusterings, K": (lambda g, x: _cell.stored_clustering(g.bank, x, store=g.store, progress=False), 3),
    "clusterings, seed": (
        lambda g, x: _cell.stored_clustering(g.bank, 3, seed=x, store=g.store, progress=False), 1,
    ),
    "kmeans, K": (lambda g, x: kmeans.fit(g.points, x), 3),
    "kmeans, max_iter": (lambda g, x: kmeans.fit(g.points, 3, max_iter=x), 3),
    "tree, leaves": (lambda g, x: kmeans.tree(g.points, leaves=x), 3),
    "tree, K": (lambda g, x: kmeans.tree(g.points).cut(x), 3),
    "symmetry, K": (lambda g, x: symmetric.fit(g.points, x, turned=True), 3),
    "neighbours": (lambda g, x: _neighbours.nearest(g.points, k=x), 3),
    "graph": (lambda g, x: embedding.graph(g.points, n_neighbors=x, store=g.store), 4),
    "sweep, K": (lambda g, x: g.subject.entry(g.subject.cells([x], ["layer"])[1]), 3),
    "sweep, seed": (lambda g, x: g.subject.entry(g.subject.cells([3], ["layer"], seeds=[x])[1]), 1),
    "factorial, K": (lambda g, x: factorial.cells([0], [x], ["layer"], [None], factorial.ORDERS, [0]), 3),
    "factorial, seed": (lambda g, x: factorial.cells([0], [3], ["layer"], [None], factorial.ORDERS, [x]), 3),
    "Cluster": (lambda g, x: combination.Cluster(x), 64),
    "Cluster, K of a group": (lambda g, x: combination.Cluster({"0": x}), 64),
    "Workers": (lambda g, x: Workers(x), 2),
    "batches": (lambda g, x: list(datasets.batches(g.data, g.model.preprocess, x)), 9),
    "batches, workers": (lambda g, x: list(datasets.batches(g.data, g.model.preprocess, 40, workers=x)), 0),
    "limit": (lambda g, x: datasets.limited(g.data, x), 9),
    "evaluate": (lambda g, x: evaluation.evaluate(g.model, g.data, batch_size=x, progress=False), 20),
    "sequential, seed": (
        lambda g, x: _sequential.correct(g.model, g.data, 3, seed=x, progress=False).network, 1,
    ),
    "latency, batch": (lambda g, x: latency.of_network(g.model, (3, 8, 8), [x]), 1),
    "ways, batch": (lambda g, x: latency.ways(g.model, (3, 8, 8), x), 1),
    "latency, side": (lambda g, x: latency.of_network(g.model, (3, x, 8), [1], seed=x), 8),
    "figures": (lambda g, x: plots.kernel_sheet(g.bank.kernels[:5], columns=x), 2),
    "pack": (lambda g, x: _packing.pack(np.arange(4), x), 3),
    "palette": (lambda g, x: _formats.Palette(x, "kmeans", "tensor"), 3),
    "product": (lambda g, x: _formats.Product(x, 1).bytes(g.bank.layers[0]), 3),
    "Recipe, epochs": (lambda g, x: training.Recipe(epochs=x), 3),
    "Recipe, seed": (lambda g, x: training.Recipe(seed=x), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_numpys_whole_numbers_are_whole_numbers(given, monkeypatch, name):
    monkeypatch.setattr(latency, "_SECONDS", 0.0)
    call, right = WHOLE[name]
    for kind in (np.int64, np.uint8):
        call(given, kind(right))


@pytest.mark.parametrize("name", WHOLE)
def test_no_whole_number_is_made_of_what_is_none(given, name):
    call, right = WHOLE[name]
    without_axes = np.array(right), torch.tensor(right)
    for wrong in (right + 0.7, float(right), str(right), True, np.float32(2.7), -1, None, *without_axes):
        if wrong is None and name in ("cluster, threads", "factorial, K", "kmeans, max_iter"):
            continue  # by default
        with pytest.raises(InvalidValueError):
            call(given, wrong)


def test_numpys_small_whole_numbers_do_not_overflow():
    layers = nn.Sequential(nn.Conv2d(3, 60, 3), nn.Conv2d(60, 4, 3))
    found = similarity.explained(layers, np.uint8(150), progress=False)
    pd.testing.assert_frame_equal(found, similarity.explained(layers, 150, progress=False))
    shape = models.plain("", layers, (np.uint8(3), np.uint8(200), np.uint8(200))).input_shape
    assert [type(x) for x in shape] == [int] * 3


@pytest.mark.parametrize("ks", ["23", b"23", 3, None])
def test_what_is_no_list_is_no_list_of_one_digit_numbers(given, ks, seen):
    with pytest.raises(InvalidValueError, match="ks is") as found:
        experiments.sweep(given.model, given.data, ks, store=given.store)
    if ks == "23":
        seen("Numbers", '`kclib.sweep(model, data, "23")`', f"`{found.value}`")


CALLS = {
    "kclib.sweep(model, data, [2.7])": lambda g: experiments.sweep(g.model, g.data, [2.7], store=g.store),
    "Workers(1.5)": lambda g: Workers(1.5),
    "Workers(True)": lambda g: Workers(True),
    'combination.Cluster("64")': lambda g: combination.Cluster("64"),
    "combination.Cluster(0)": lambda g: combination.Cluster(0),
    "kclib.insert of 1e9 into a float16 network": lambda g: kernels.insert(
        tiny_model().network.half(), replace(g.bank, kernels=np.full_like(g.bank.kernels, 1e9))
    ),
    "kclib.load_model of weights of 1e6 into a float16 network": lambda g: _state_dicts.fill(
        tiny_model().network.half(),
        {"": {name: x * 1e6 for name, x in tiny_model().network.state_dict().items()}},
        "weights.pt",
    ),
    "kclib.load_model of 2.7 into a buffer of whole numbers": lambda g: _state_dicts.fill(
        nn.BatchNorm2d(1),
        {"": nn.BatchNorm2d(1).state_dict() | {"num_batches_tracked": torch.tensor(2.7)}},
        "weights.pt",
    ),
    "kclib.evaluate of 1,000 answers an image on 6 classes": lambda g: evaluation.evaluate(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 1000)), g.data, progress=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_made_of_what_it_is_not(given, call, seen):
    with pytest.raises(InvalidValueError) as found:
        CALLS[call](given)
    seen("Numbers", f"`{call}`" if "(" in call else call, f"`{found.value}`")


def test_text_is_no_list_of_its_letters(given):
    with pytest.raises(InvalidValueError, match="scopes is 'layer'"):
        experiments.sweep(given.model, given.data, [3], scopes="layer", store=given.store)
    with pytest.raises(InvalidValueError, match="methods is 'plain'"):
        experiments.sweep(given.model, given.data, [3], methods="plain", store=given.store)
    with pytest.raises(InvalidValueError, match="clusters is '64'"):
        factorial.cells([0], "64", ["layer"], [None], factorial.ORDERS, [0])


def test_a_key_with_numpys_numbers_is_that_with_pythons(given):
    key = {"kind": "evaluation", "k": 3, "x": 0.5}
    given.store.put(Entry(key, {"top1": np.float32(0.5), "n": np.int64(3)}, {}))
    found = given.store.get({"kind": "evaluation", "k": np.int64(3), "x": np.float64(0.5)})
    assert found.row == {"top1": 0.5, "n": 3}
    with pytest.raises(TypeError):
        given.store.put(Entry(key, {"top1": torch.zeros(2)}, {}))
