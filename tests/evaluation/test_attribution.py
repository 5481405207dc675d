from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kclib import clustering, evaluation, kernels
from kclib.clustering import Clustering, Group, _clustering
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.evaluation import Evaluation, attribution
from kclib.kernels import KernelBank
from kclib.models import Model

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"progress": False}


class Branches(nn.Module):
    """A convolution for each channel; their answers are added."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 2, 3, bias=False) for _ in range(3))
        for layer in self.children():
            layer.weight.data.copy_(torch.tensor([1.0, -1])[:, None, None, None].expand(2, 1, 3, 3))

    def forward(self, x):
        parts = zip(self.children(), x.split(1, dim=1), strict=True)
        return sum(layer(part) for layer, part in parts).flatten(1)


def additive():
    """A model, a clustering and ten images, of which one, two and seven depend on one layer each.

    The clustering swaps the answers of the first two layers and leaves the third's.
    """
    network = Branches().eval()
    bank = kernels.extract(network)
    groups = tuple(
        Group(x.name, (x,), bank.kernels[x.rows][::step].copy(), np.arange(2, dtype=np.int32), 0.0)
        for x, step in zip(bank.layers, (-1, -1, 1), strict=True)
    )
    images = torch.zeros(10, 3, 3, 3, dtype=torch.uint8)
    images[torch.arange(10), torch.tensor([0, 1, 1, *[2] * 7])] = 1
    data = ImageSet("ten/test", images, torch.zeros(10, dtype=torch.int64), ("x", "y"), "f" * 64)
    return Model("branches", network, torch.Tensor.float), Clustering(groups, "layer", 0), data


def test_layers_that_do_not_meet_lose_what_all_lose_together():
    table = attribution.by_layer(*additive(), batch_size=3, **QUIET).set_index(["way", "layer"])
    assert table.loc["alone", "drop"].to_dict() == pytest.approx({"a": 10, "b": 20, "c": 0})
    assert table.loc["all but", "drop"].to_dict() == pytest.approx({"a": 20, "b": 10, "c": 30})
    assert table.loc["alone", "agreement"].to_dict() == pytest.approx({"a": 90, "b": 80, "c": 100})
    assert table.loc["alone", "top1"].to_dict() == pytest.approx({"a": 90, "b": 80, "c": 100})
    whole = table.loc[("all", "all layers")]
    assert whole["drop"] == pytest.approx(table.loc["alone", "drop"].sum())
    assert table.index[-1] == ("all", "all layers")


class Tied(nn.Module):
    """A residual network in whose middle two convolutions share a weight and a third is called twice."""

    def __init__(self):
        super().__init__()
        self.end, self.start = nn.Conv2d(6, 4, 3), nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.two.weight = self.one.weight
        self.twice = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.twice(self.start(x))
        x += self.two(self.twice(self.one(x)))
        return self.end(x).sum((2, 3))


def vgg():
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)]
    features = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Centred(nn.Module):
    """A network whose answers differ from image to image."""

    def __init__(self, network, inputs):
        super().__init__()
        self.network, self.mean = network.eval(), 0
        self.mean = network(inputs).mean(0).detach()

    def forward(self, x):
        return self.network(x) - self.mean


def random_case(make):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 3, 3), dtype=torch.uint8)
    images = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    network = Centred(make(), images.float() / 99)
    answers = network(images.float() / 99).argmax(1)
    data = ImageSet("random/test", images, answers, tuple("abcd"), "f" * 64)
    made = clustering.cluster(kernels.extract(network), 3, progress=False)
    return Model("random", network, lambda x: x.float() / 99), made, data


@pytest.mark.parametrize("make", [vgg, Tied])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_row_is_a_whole_evaluation(make, precision):
    model, made, data = random_case(make)
    options = {"batch_size": 20, "precision": precision, **QUIET}
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    table = attribution.by_layer(model, made, data, **options)
    bank, small = kernels.extract(model.network), _clustering.quantized(made)
    dense = evaluation.evaluate(model, data, **options)
    for row in table.itertuples():
        chosen = np.zeros(len(bank), bool)
        for layer in bank.layers:
            chosen[layer.rows] = row.way == "all" or (layer.name == row.layer) == (row.way == "alone")
        weights = np.where(chosen[:, None, None], small, bank.kernels)
        network = kernels.insert(model.network, KernelBank(weights, bank.layers, {}))
        after = evaluation.evaluate(replace(model, network=network), data, **options)
        points = evaluation.drop(dense, after).points
        assert (row.top1, row.drop, row.drop_low, row.drop_high) == (
            after.top1.estimate, points.estimate, points.low, points.high
        )  # fmt: skip
        assert row.agreement == 100 * (after.predictions == dense.predictions).mean()
    assert len(table) == 2 * len(bank.layers) + 1
    assert table["drop"].nunique() > 3
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])


class Counted(nn.Conv2d):
    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


@pytest.mark.parametrize("ways", [("alone",), ("all but",), attribution._WAYS])
def test_dense_answers_are_computed_once_for_all_layers(ways):
    def chain():
        layers = [Counted(3, 3, 3, padding=1) for _ in range(4)]
        return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    model, made, data = random_case(chain)
    Counted.runs = 0
    table = attribution.by_layer(model, made, data, ways=ways, batch_size=50, **QUIET)
    tried = 2 * 4  # that the replaced layers run, on one image
    networks = 2 + 4 * len(ways)  # the dense one, the clustered one, and those in between
    assert Counted.runs == tried + 4 * networks
    assert list(table.way) == [*ways] * 4 + ["all"]


def test_wrong_ways_and_architectures_are_refused():
    model, made, data = additive()
    with pytest.raises(UnknownNameError, match="'al'"):
        attribution.by_layer(model, made, data, ways=["al"])
    with pytest.raises(UnknownNameError, match="precision"):
        attribution.by_layer(model, made, data, precision="fp8")
    with pytest.raises(InvalidValueError, match="use the architecture"):
        attribution.by_layer(replace(model, network=vgg()), made, data)


def answered(predictions, labels, classes=("cat", "dog", "owl", "none")):
    predictions, labels = np.array(predictions), np.array(labels)
    return Evaluation(predictions, labels, predictions == labels, classes, 0.0)


LABELS = [0, 0, 0, 0, 1, 1, 2, 2]
BEFORE = answered([0, 0, 0, 1, 1, 0, 2, 0], LABELS)
AFTER = answered([0, 1, 2, 0, 1, 2, 2, 0], LABELS)


def test_classes_lose_what_is_counted_by_hand():
    table = attribution.by_class(BEFORE, AFTER)
    rows = table[["name", "images", "before", "after", "drop", "lost", "won"]]
    expected = [("cat", 4, 75, 50, 25, 2, 1), ("dog", 2, 50, 50, 0, 0, 0), ("owl", 2, 50, 50, 0, 0, 0)]
    assert list(rows.itertuples(index=False, name=None)) == expected
    cats = evaluation.drop(answered([0, 0, 0, 1], [0] * 4), answered([0, 1, 2, 0], [0] * 4)).points
    assert tuple(table.loc[0, ["drop_low", "drop_high"]]) == (cats.low, cats.high)
    assert cats.low < 25 < cats.high
    assert (table.images * table["drop"]).sum() / 8 == evaluation.drop(BEFORE, AFTER).points.estimate


def test_images_that_flipped_are_told_with_both_answers_the_lost_ones_first():
    table = attribution.flipped(BEFORE, AFTER)
    expected = [
        (1, "cat", "cat", "dog", "lost"),
        (2, "cat", "cat", "owl", "lost"),
        (3, "cat", "dog", "cat", "won"),
        (5, "dog", "cat", "owl", "wrong"),
    ]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert attribution.flipped(BEFORE, BEFORE).empty
    assert isinstance(table.way.dtype, pd.CategoricalDtype)


@pytest.mark.parametrize("compare", [attribution.by_class, attribution.flipped])
def test_evaluations_of_other_images_are_refused(compare):
    with pytest.raises(InvalidValueError, match="different images"):
        compare(BEFORE, answered([0, 1], [0, 1]))
