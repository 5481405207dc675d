import copy

import numpy as np
import pytest
import torch
from torch import nn

from kclib.clustering import cluster
from kclib.compression import compress, latency
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
