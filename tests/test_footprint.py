import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations

from kclib.clustering import Clustering, Group, cluster
from kclib.footprint import break_even, index_bits, index_bytes, ledger, savings
from kclib.kernels import KernelBank, Layer, extract


def tiny():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3)
    )


def clustered(layers, n_clusters, size=(3, 3), scope="global"):
    """Return a clustering of the right shapes and no meaning, in one group."""
    n = sum(layer.n_kernels for layer in layers)
    group = Group("all", tuple(layers), np.zeros((n_clusters, *size), "f"), np.zeros(n, "i4"), 0.0)
    return Clustering((group,), scope, 0)


def test_ledger_of_a_tiny_network_is_as_by_hand():
    network = tiny()
    table = ledger(network, cluster(extract(network), 3))
    rest = 4 * 4 * 4 + 8 + 4 * (2 * 3 + 3)  # batch norm, its counter of batches, linear
    assert table.T.to_dict("list") == {
        "kernels": [8 * 9 * 4, 0, 0],
        "indices": [0, 2, 2],
        "codebooks": [0, 3 * 9 * 4, 3 * 9 * 2],
        "other convolution weights": [8 * 4] * 3,
        "convolution biases": [(4 + 2) * 4] * 3,
        "rest": [rest] * 3,
        "convolutions": [288 + 32 + 24, 2 + 108 + 56, 2 + 54 + 56],
        "model": [288 + 56 + rest, 2 + 108 + 56 + rest, 2 + 54 + 56 + rest],
    }


def test_savings_are_shares_of_the_ledgers_sums():
    network = tiny()
    saved = savings(network, cluster(extract(network), 3))
    assert saved.kernels == 1 - 3 / 8
    assert saved.bytes == pytest.approx(1 - 166 / 344)
    assert saved.bytes_fp16 == pytest.approx(1 - 112 / 344)
    assert saved.model_bytes == pytest.approx(1 - (166 + 108) / (344 + 108))


def test_savings_are_negative_where_codebook_and_indices_take_more():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False))
    assert savings(network, cluster(extract(network), 8)).bytes == pytest.approx(1 - (288 + 3) / 288)


def test_dense_column_is_the_bytes_of_the_state_dict():
    for network in (tiny(), tiny().half(), nn.Sequential(nn.ConvTranspose2d(4, 2, 5), nn.Conv1d(2, 2, 3))):
        dense = sum(x.numel() * x.element_size() for x in network.state_dict().values())
        assert ledger(network, cluster(extract(network), 2)).loc["model", "dense"] == dense


def test_indices_of_each_layer_are_packed_to_a_whole_byte():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 1, 3))
    bank = extract(network)
    assert ledger(network, cluster(bank, 2)).loc["indices"].tolist() == [0, 2, 2]
    assert ledger(network, cluster(bank, 2, scope="global")).loc["indices"].tolist() == [0, 1, 1]


def test_shared_tensors_are_counted_once():
    network = tiny()
    network.append(network[0])
    network.append(nn.Conv2d(2, 4, 3, dilation=2))
    network[-1].weight, network[-1].bias = network[0].weight, network[0].bias
    network.append(nn.Linear(2, 3, bias=False))
    network[-1].weight = network[4].weight
    expected = ledger(tiny(), cluster(extract(tiny()), 3))
    assert ledger(network, cluster(extract(network), 3)).equals(expected)


def test_weight_of_a_parametrized_convolution_is_a_convolution_weight():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), parametrizations.weight_norm(nn.Conv2d(1, 2, 3)))
    table = ledger(network, cluster(extract(network), 2))
    assert table.loc["other convolution weights", "dense"] == 4 * (2 + 2 * 9)
    assert table.loc["rest", "dense"] == 0


@pytest.mark.parametrize(
    ("n_clusters", "bits"),
    [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (235_367, 18), (262_144, 18), (262_145, 19)],
)
def test_index_bits(n_clusters, bits):
    assert index_bits(n_clusters) == bits


@pytest.mark.parametrize(
    ("n_kernels", "n_clusters", "expected"), [(7, 1, 0), (8, 2, 1), (9, 2, 2), (3, 200, 3), (5, 8, 2)]
)
def test_index_bytes(n_kernels, n_clusters, expected):
    assert index_bytes(n_kernels, n_clusters) == expected


def test_the_reports_figures_are_kernels_and_bytes_removed():
    network = nn.Sequential(nn.Conv2d(1, 1_634_496, 3, bias=False, device="meta"))
    layer = Layer("0", tuple(network[0].weight.shape), 0)
    saved = savings(network, clustered([layer], 235_367))
    assert round(100 * saved.kernels, 1) == 85.6
    assert round(100 * saved.bytes, 2) == 79.35


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from(["layer", "global", "pairs"]),
    st.sampled_from([(3, 3), (1, 2)]),
    st.sampled_from([(4, 4), (4, 2), (2, 4), (2, 2)]),
)
@settings(deadline=None, max_examples=40)
def test_break_even_is_the_largest_k_that_takes_fewer_bytes_than_dense(counts, scope, size, itemsizes):
    stored, itemsize = itemsizes
    starts = np.cumsum([0, *counts])
    layers = [Layer(str(i), (n, 1, *size), int(starts[i]), False, stored) for i, n in enumerate(counts)]
    bank = KernelBank(np.zeros((sum(counts), *size), "f"), tuple(layers), {})
    groups = {"layer": counts, "global": [sum(counts)], "pairs": [sum(counts[:2]), sum(counts[2:])]}[scope]

    def n_bytes(n, k):
        return math.ceil(n * math.ceil(math.log2(k)) / 8) + k * math.prod(size) * itemsize if n else 0

    paying = [
        k
        for k in range(1, max(groups) + 1)
        if sum(n_bytes(n, min(k, n)) for n in groups) < sum(counts) * math.prod(size) * stored
    ]
    if scope == "pairs":
        scope = {layer.name: str(i // 2) for i, layer in enumerate(layers)}
    assert break_even(bank, scope=scope, itemsize=itemsize) == max(paying, default=0)


def test_ledger_turns_where_break_even_says():
    network = nn.Sequential(nn.Conv2d(4, 30, 3, bias=False))
    turn = break_even(extract(network), scope="global")
    dense = ledger(network, clustered(extract(network).layers, turn)).loc["model"]
    beyond = ledger(network, clustered(extract(network).layers, turn + 1)).loc["model"]
    assert dense["codebook_fp32"] < dense["dense"] <= beyond["codebook_fp32"]


def test_half_precision_network_has_half_the_dense_bytes():
    network = tiny()
    single = ledger(network, cluster(extract(network), 3)).loc["kernels", "dense"]
    network.to(torch.float16)
    assert ledger(network, cluster(extract(network), 3)).loc["kernels", "dense"] == single / 2
