import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from kclib import clustering, compression, kernels, models
from kclib.compression import byte_counts
from kclib.datasets import ImageSet
from kclib.evaluation import _methods, peers


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return models.Model("small", nn.Sequential(*layers).eval(), lambda x: x.float() / 255, ())


@pytest.fixture
def data(model):
    """Images labelled as the model answers them, but for every tenth."""
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model.network(model.preprocess(images)).argmax(1).clone()
    labels[::10] = (labels[::10] + 1) % 4
    return ImageSet("made up", images, labels, tuple("abcd"), "made up")


def test_every_network_is_compared_with_the_dense_one_on_the_same_images(model, data):
    broken = kernels.insert(model.network, kernels.extract(model.network))
    with torch.no_grad():
        broken[2].bias += torch.tensor([0.0, 0.0, 0.0, 1000.0])  # always answers the last class
    made = [peers.Peer("broken", "bias", broken, 100), _methods.quantized(model.network, 8)]
    table = peers.compare(model, data, made, progress=False).set_index("method")
    assert table.index.tolist() == ["dense", "broken", "quantization"]
    assert table.loc["dense", ["top1", "drop", "ratio"]].tolist() == pytest.approx([90, 0, 1])
    last = 100 * float((data.labels == 3).float().mean())
    assert table.loc["broken", "top1"] == pytest.approx(last, abs=1e-4)
    assert table.loc["broken", "drop"] == pytest.approx(90 - last, abs=1e-4)
    assert table.loc["broken", "ratio"] == table.loc["dense", "bytes"] / 100
    assert table.loc["dense", "bytes"] == 4 * sum(x.numel() for x in model.network.parameters())


def test_a_compressed_network_is_a_peer_with_its_stored_bytes(model, data):
    found = clustering.cluster(kernels.extract(model.network), 4)
    packed = compression.compress(model.network, found, precision="fp16")
    peer = peers.Peer("clustering", "K=4", packed, byte_counts.stored_bytes(packed))
    row = peers.compare(model, data, [peer], progress=False).iloc[1]
    dense = compression.replaced(model.network, found)
    expected = peers.compare(model, data, [peers.Peer("same", "", dense, 1)], progress=False).iloc[1]
    assert row.top1 == pytest.approx(expected.top1)
    assert np.isclose(row.ratio, 4 * sum(x.numel() for x in model.network.parameters()) / row.bytes)


def test_the_front_is_what_no_other_row_beats():
    draw = np.random.default_rng(0)
    points = draw.integers(1, 9, (40, 2))
    table = pd.DataFrame(points, draw.permutation(40), ["ratio", "drop"])
    unbeaten = {
        (ratio, drop)
        for ratio, drop in points.tolist()
        if not any(r >= ratio and d <= drop and (r, d) != (ratio, drop) for r, d in points.tolist())
    }
    front = peers.undominated(table)
    assert front.index.equals(table.index)
    kept = list(map(tuple, table[front].to_numpy().tolist()))
    assert sorted(kept) == sorted(unbeaten)
