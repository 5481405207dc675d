"""What the benchmark gives the standard for coding networks, so that it has the help that ours has."""

import copy

import pytest
import torch
from tiny import tiny_data
from torch import nn

import kclib
from benchmarks import nnc


def network(norm: bool) -> kclib.Model:
    """A network of two convolutions, with a batch norm behind each or with none."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(5), nn.BatchNorm2d(6)] if norm else [nn.Identity(), nn.Identity()]
    layers = [nn.Conv2d(3, 5, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(5, 6, 3), norms[1], nn.ReLU()]
    return kclib.Model("two", nn.Sequential(*layers).eval(), lambda images: images.float() / 255)


@pytest.mark.parametrize("norm", [False, True])
def test_filters_that_coding_made_weaker_get_their_strength_and_mean_back(norm):
    dense, images = network(norm), tiny_data()
    weaker = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, factors in ((0, [0.5, 1, 2, 0.25, 1]), (3, [1, 4, 0.5, 0.5, 1, 2])):
            weaker.network[layer].weight *= torch.tensor(factors)[:, None, None, None]
            weaker.network[layer].bias += 3
    before = copy.deepcopy(weaker.network.state_dict())
    corrected, n_bytes = nnc.corrected(weaker, dense, images)
    assert n_bytes == 2 * (5 + 6)
    inputs = dense.preprocess(images.images)
    torch.testing.assert_close(corrected.network(inputs), dense.network(inputs), atol=2e-3, rtol=2e-3)
    assert not torch.allclose(weaker.network(inputs), dense.network(inputs), atol=0.1)
    assert all(torch.equal(x, before[name]) for name, x in weaker.network.state_dict().items())
