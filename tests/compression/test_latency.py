import copy

import numpy as np
import pytest
import torch
from torch import nn

from kclib.clustering import cluster
from kclib.compression import _code_convolution, compress, expand, latency
from kclib.compression._layers import ClusteredConv2d
from kclib.kernels import extract


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 0.003)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Flatten()
    )


def test_a_network_is_timed_packed_and_dense_at_each_batch():
    network = small_network().eval()
    table = latency.of_network(compress(network, cluster(extract(network), 3)), (3, 8, 8), (1, 3))
    assert (table.index.name, table.index.tolist()) == ("batch", [1, 3])
    assert table.columns.tolist() == ["dense", "packed", "ratio", "ratio_low", "ratio_high"]
    assert (table.ratio_low <= table.ratio_high).all()
    assert ((table > 0) & (table < 1000)).to_numpy().all()
    np.testing.assert_allclose(table.ratio, table.packed / table.dense)


def test_both_networks_see_the_same_images_of_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        latency, "_alternating", lambda calls: {x: [call().numel()] for x, call in calls.items()}
    )
    network = compress(small_network().eval(), cluster(extract(small_network()), 3))
    network.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    for seed in (0, 0, 1):
        assert latency.of_network(network, (3, 8, 8), [2], seed=seed).ratio.tolist() == [1]
    packed = [any(isinstance(x, ClusteredConv2d) for x in module.modules()) for module, _ in seen]
    assert packed == [False, True] * 3
    assert [images.shape for _, images in seen] == [(2, 3, 8, 8)] * 6
    assert [torch.equal(seen[0][1], images) for _, images in seen] == [True] * 4 + [False] * 2


def test_a_ratio_is_of_medians_and_has_the_least_and_the_most_of_its_turns(monkeypatch):
    turns = {"dense": [2.0, 4.0, 3.0], "packed": [2.0, 12.0, 3.0]}
    monkeypatch.setattr(latency, "_alternating", lambda calls: turns)
    network = compress(small_network().eval(), cluster(extract(small_network()), 3))
    found = latency.of_network(network, (3, 8, 8), [2]).loc[2]
    assert found.tolist() == [3, 3, 1, 1, 3]


def test_calls_are_timed_in_milliseconds_and_in_turn(monkeypatch):
    order = []
    seconds = iter([0.001, 0.5, 0.004, 0.6, 0.002, 9.0])

    def timer(stmt, globals, num_threads):
        globals["call"]()
        measured = type("Measured", (), {"median": next(seconds)})
        return type("Timer", (), {"blocked_autorange": lambda self, min_run_time: measured})()

    monkeypatch.setattr("torch.utils.benchmark.Timer", timer)
    times = latency._alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert times == {"a": pytest.approx([1, 4, 2]), "b": pytest.approx([500, 600, 9000])}
    assert order == ["a", "b"] * 3


def test_a_network_in_training_is_left_as_it_was():
    network = compress(small_network().train(), cluster(extract(small_network()), 3))
    before = copy.deepcopy(network.state_dict())
    latency.of_network(network, (3, 8, 8), [2])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_ways_tell_how_each_layer_answers():
    torch.manual_seed(0)
    layers = [nn.Conv2d(n_inputs, 4, 3, padding=1) for n_inputs in (3, 4, 4)]
    network = nn.Sequential(layers[0], nn.MaxPool2d(4), *layers[1:]).eval()
    packed = compress(network, cluster(extract(network), 3))
    packed[0].way, packed[2].way = "indices", "decoded"
    table = latency.ways(packed, (3, 4, 4))
    assert table.index.tolist() == ["0", "2", "3"]
    assert table.pixels.tolist() == [16, 1, 1]
    assert table.way.tolist()[:2] == ["indices", "decoded"]
    assert table.way["3"] in ("indices", "cropped")
    assert not packed[0]._forward_hooks
    assert latency.ways(network, (3, 4, 4)).empty


def test_a_way_can_be_forced(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 8, 8)
    packed = compress(nn.Sequential(layer), cluster(extract(nn.Sequential(layer)), 3), inputs=False)
    dense = packed[0].weight
    assert not hasattr(expand(packed)[0], "way")
    with torch.no_grad():
        for way, is_faster in [("decoded", True), ("faster", False)]:
            monkeypatch.setattr(_code_convolution, "is_faster", lambda plan, is_faster=is_faster: is_faster)
            packed[0].way = way
            assert torch.equal(packed(x), torch.conv2d(x, dense, layer.bias, padding=1))
        monkeypatch.setattr(_code_convolution, "convolved", lambda *_: x)
        packed[0].way = "indices"
        assert packed(x) is x
