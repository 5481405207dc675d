import copy

import numpy as np
import pytest
import torch
from torch import nn

from kclib.clustering import cluster, quantized
from kclib.compression import compress
from kclib.errors import InvalidValueError
from kclib.kernels import extract


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, groups=2),
        nn.Conv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 2, 3),
        nn.Flatten(),
        nn.Linear(2 * 6 * 6, 5),
    ).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def distinct(network, *names):
    kernels = torch.cat([network.get_submodule(name).weight.detach().reshape(-1, 9) for name in names])
    return len(torch.unique(kernels, dim=0))


@pytest.mark.parametrize("n_clusters", [1, 2, 5, 8])
def test_compressed_model_has_k_distinct_kernels_a_group(network, n_clusters):
    bank = extract(network)
    alone = compress(network, cluster(bank, n_clusters))
    assert [distinct(alone, name) for name in ("0", "3", "5")] == [n_clusters] * 3
    shared = compress(network, cluster(bank, n_clusters, scope="global"))
    assert distinct(shared, "0", "3", "5") == n_clusters


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_as_many_clusters_as_kernels_answer_like_the_dense_model_to_the_bit(network, images, scope):
    bank = extract(network)
    kept = compress(network, cluster(bank, {"layer": 24, "global": len(bank)}[scope], scope=scope))
    assert torch.equal(kept(images), network(images))


def test_fewer_clusters_change_the_answers_but_only_through_the_clustered_weights(network, images):
    bank = extract(network)
    before = copy.deepcopy(network.state_dict())
    compressed = compress(network, cluster(bank, 2))
    assert not torch.equal(compressed(images), network(images))
    clustered = {f"{layer.name}.weight" for layer in bank.layers}
    for name, value in compressed.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in clustered)
        assert torch.equal(network.state_dict()[name], before[name])


def test_kernels_of_the_compressed_model_are_the_quantized_rows(network):
    result = cluster(extract(network), 3, scope={"0": "ends", "3": "middle", "5": "ends"})
    np.testing.assert_array_equal(extract(compress(network, result)).weights, quantized(result))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_in_half_precision_keeps_it_with_its_codebook_rounded(network, images, dtype):
    network.to(dtype)
    bank = extract(network)
    result = cluster(bank, 4, scope="global")
    compressed = compress(network, result)
    assert {p.dtype for p in compressed.parameters()} == {dtype}
    rounded = torch.from_numpy(quantized(result)).to(dtype).float()
    np.testing.assert_array_equal(extract(compressed).weights, rounded)
    kept = compress(network, cluster(bank, len(bank), scope="global"))
    assert torch.equal(kept(images.to(dtype)), network(images.to(dtype)))


def test_one_layer_may_be_compressed_alone(network):
    alone = compress(network, cluster(extract(network).only("3"), 2))
    assert [distinct(alone, name) for name in ("0", "3", "5")] == [24, 2, 8]


def test_clustering_of_another_architecture_is_refused(network):
    result = cluster(extract(nn.Sequential(nn.Conv2d(3, 9, 3))), 2)
    with pytest.raises(
        InvalidValueError, match=r"layer 0 of shape \(9, 3, 3, 3\), the network has shape \(8, 3"
    ):
        compress(network, result)
