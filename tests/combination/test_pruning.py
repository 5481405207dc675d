import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune as reference

from kclib import kernels, models
from kclib.combination import _pruning
from kclib.compression import _formats, byte_counts
from kclib.errors import InvalidValueError, UnknownNameError

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 99)


def model_of(network):
    return models.Model("tiny", network, lambda x: x.float() / 128 - 1)


def random_network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)]
    network = nn.Sequential(*body, nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(125, 2)).eval()
    with torch.no_grad():
        network[1].bias.normal_()
        network[1].running_mean.normal_()
    return network


def prune(network, sparsity, kind="kernels", **options):
    return _pruning.prune(model_of(network), sparsity, kind=kind, **options)


def convolution(values, bias=None):
    """Return a convolution of kernels ``(out, in)`` that are these values at all of 1×2 taps."""
    values = torch.tensor(values, dtype=torch.float32)
    made = nn.Conv2d(values.shape[1], values.shape[0], (1, 2), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(values[..., None, None].expand(made.weight.shape))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


def taps(convolution):
    """Return the first tap of each kernel."""
    return convolution.weight[..., 0, 0].tolist()


def test_kernels_of_the_least_squares_go_and_one_stays_in_each_layer():
    network = nn.Sequential(convolution([[1, 2], [-3, 4]]), convolution([[0.1, 0.3], [0.2, 0.3]]))
    before = copy.deepcopy(network.state_dict())
    found = prune(network, 0.5)
    assert taps(found.network[0]) == [[0, 2], [-3, 4]]
    np.testing.assert_allclose(taps(found.network[1]), [[0, 0.3], [0, 0]])
    assert (found.kind, found.sparsity, found.kept) == ("kernels", 0.5, 0.5)
    assert found.masks["0"][:, :, 0, 1].tolist() == [[False, True], [True, True]]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_count_and_the_first_of_equals_stay():
    network = nn.Sequential(convolution([[1, 1, 1, 1]]))
    assert taps(prune(network, 0.5).network[0]) == [[1, 1, 0, 0]]
    weighted = prune(network, 0.5, sample_weight=np.array([1, 3, 2, 0.5], np.float32))
    assert taps(weighted.network[0]) == [[0, 1, 1, 0]]
    single = prune(network, 3 / 8, kind="weights", sample_weight=np.array([1, 3, 2, 0.5], np.float32))
    assert single.network[0].weight.flatten().tolist() == [1, 0, 1, 1, 1, 1, 0, 0]


def test_filters_are_compared_by_the_mean_of_their_squares():
    narrow, wide = convolution([[3], [2]]), convolution([[2.5, 2.5], [1.5, 1.5], [0, 0.5]])
    network = nn.Sequential(narrow, nn.ReLU(), wide)
    found = prune(network, 2 / 5, kind="filters")
    assert taps(found.network[0]) == [[3], [2]]
    assert taps(found.network[2]) == [[2.5, 2.5], [0, 0], [0, 0]]
    weighted = np.array([1, 0.1, 1, 1, 0, 5, 1, 1], np.float32)  # means: 9, 0.4, 6.25, 5.6, 0.1
    found = prune(network, 2 / 5, kind="filters", sample_weight=weighted)
    assert taps(found.network[0]) == [[3], [0]]
    assert taps(found.network[2]) == [[2.5, 2.5], [1.5, 1.5], [0, 0]]


@given(SEEDS, st.floats(0, 0.98), st.sampled_from(_pruning.KINDS))
@settings(deadline=None, max_examples=20)
def test_as_many_go_as_asked_for_and_what_stays_is_as_it_was(seed, sparsity, kind):
    network = random_network(seed)
    n = {"kernels": 42, "filters": 10, "weights": 378}[kind]
    gone = min(round(sparsity * n), n - 2)
    found = prune(network, gone / n, kind=kind)
    for name, mask in found.masks.items():
        before, after = (x.get_submodule(name).weight.detach().numpy() for x in (network, found.network))
        np.testing.assert_array_equal(after, np.where(mask, before, 0))
    masks = list(found.masks.values())
    axes = {"kernels": (2, 3), "filters": (1, 2, 3), "weights": ()}[kind]
    assert all(np.array_equal(mask.any(axis=axes), mask.all(axis=axes)) for mask in masks)
    parts = [mask.any(axis=axes) for mask in masks]
    assert sum(np.count_nonzero(~x) for x in parts) == gone
    assert all(x.any() for x in parts)
    assert found.kept == pytest.approx(1 - sum(np.count_nonzero(~mask) for mask in masks) / 378)


@pytest.mark.parametrize("kind", _pruning.KINDS)
def test_nothing_goes_at_no_sparsity(kind):
    network = random_network()
    found = prune(network, 0, kind=kind)
    assert found.kept == 1
    for name, value in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value)


@given(SEEDS, st.floats(0.01, 0.6))
@settings(deadline=None, max_examples=20)
def test_single_weights_are_those_of_torchs_global_pruning(seed, sparsity):
    network = random_network(seed)
    theirs = copy.deepcopy(network)
    layers = [(theirs[0], "weight"), (theirs[3], "weight")]
    reference.global_unstructured(layers, reference.L1Unstructured, amount=round(sparsity * 378))
    mine = prune(network, sparsity, kind="weights").network
    for name in ("0", "3"):
        assert torch.equal(mine.get_submodule(name).weight, theirs.get_submodule(name).weight)


@given(SEEDS, st.integers(0, 5))
@settings(deadline=None, max_examples=10)
def test_filters_of_one_layer_are_those_of_torchs_structured_pruning(seed, gone):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 6, 3))
    theirs = copy.deepcopy(network)
    reference.ln_structured(theirs[0], "weight", amount=gone, n=2, dim=0)
    assert torch.equal(prune(network, gone / 6, kind="filters").network[0].weight, theirs[0].weight)


def test_a_pruned_filter_is_zero_and_its_channel_stays():
    network = random_network()
    with torch.no_grad():
        network[0].weight[2] *= 1e-3
    found = prune(network, 1 / 10, kind="filters")
    assert not found.network[0].weight[2].any()
    for name, value in network.state_dict().items():
        others = [0, 1, 3, 4, 5] if name == "0.weight" else ...
        assert torch.equal(found.network.state_dict()[name][others], value[others]), name


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_convolutions_are_their_output_channels(groups):
    torch.manual_seed(0)
    make = nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.Conv2d(6, 4, 3, groups=groups)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), *make, nn.Conv2d(4, 2, 3))
    dead = 4  # in the second group, the second of its three
    with torch.no_grad():
        inputs = slice(2, 4) if groups == 2 else slice(None)
        network[1].weight[inputs, dead % (6 // groups)] *= 1e-3
    found = prune(network, 1 / 12, kind="filters")
    small = found.network
    assert not small[1].weight[inputs, dead % (6 // groups)].any()
    assert torch.equal(small[1].bias, network[1].bias)
    gone = {"1": 4 // groups, "2": 0, "3": 0}
    assert {name: int((~mask.any(axis=(2, 3))).sum()) for name, mask in found.masks.items()} == gone


def test_bytes_are_those_of_masks_kernels_and_what_is_not_pruned():
    network = random_network()
    found = prune(network, 30 / 42)
    kept = [int(mask.any(axis=(2, 3)).sum()) for mask in found.masks.values()]
    assert sum(kept) == 12
    rest = 4 * (6 + 4 + 5 * 4 + 5)
    masks = 0
    for n, m in zip(kept, (18, 24), strict=True):
        masks += math.ceil(sum(-x * math.log2(x / m) for x in (n, m - n) if x) / 8)
    for precision, values in {
        "fp32": 4 * 12 * 9,
        "fp16": 2 * 12 * 9,
        "int8": 12 * 9 + 2 * (6 + 4),
        "int4": sum(math.ceil(n * 9 / 2) for n in kept) + 2 * (6 + 4),
    }.items():
        assert _pruning.sparse_bytes(found.network, precision=precision) == rest + masks + values
    assert _pruning.sparse_bytes(network, precision="fp32") == byte_counts.convolution_bytes(network)


def test_bytes_by_hand_of_each_kind_of_mask():
    network = nn.Sequential(convolution([[1, 0], [0, 0], [2, 3], [0, 0]]))  # 4 filters, 8 kernels, 16 weights
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = 0  # 5 weights of 3 kernels of 2 filters are left
    entropies = {"kernels": (3, 8), "filters": (2, 4), "weights": (5, 16)}
    values = {"kernels": 3 * 2, "filters": 2 * 4, "weights": 5}
    for kind, (n, m) in entropies.items():
        mask = math.ceil(-(n * math.log2(n / m) + (m - n) * math.log2(1 - n / m)) / 8)
        assert mask == {"kernels": 1, "filters": 1, "weights": 2}[kind]
        assert _pruning.sparse_bytes(network, kind=kind, precision="fp16") == mask + 2 * values[kind]
        assert _pruning.sparse_bytes(network, kind=kind, precision="int8") == mask + values[kind] + 4 * 2
        assert _pruning.sparse_bytes(network, kind=kind, precision="fp32") == mask + 4 * values[kind]


@given(SEEDS, st.floats(0.1, 0.9), st.sampled_from(_formats.PRECISIONS))
@settings(deadline=None, max_examples=10)
def test_bytes_of_single_weights_are_those_of_the_sparse_form(seed, sparsity, precision):
    network = prune(random_network(seed), sparsity, kind="weights").network
    bank = kernels.extract(network)
    form = _formats.Sparse((bank.kernels == 0).astype(int), precision, 1)
    others = 4 * (6 + 4 + 5 * 4 + 5)
    expected = others + sum(form.bytes(layer) for layer in bank.layers)
    assert _pruning.sparse_bytes(network, kind="weights", precision=precision) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1}, "sparsity is 1;"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"sparsity": 0.98}, "41 of 42 kernels are to go; at most 40 can, as each layer keeps one"),
        ({"sample_weight": np.ones(41)}, r"sample_weight has shape \(41,\); it must be \(42,\)"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        prune(random_network(), **{"sparsity": 0.5} | options)


def test_unknown_kinds_and_precisions_are_refused():
    network = random_network()
    with pytest.raises(UnknownNameError, match=r"'kernel'.*'kernels'\?"):
        prune(network, 0.5, "kernel")
    with pytest.raises(UnknownNameError, match="unknown precision 'int2'"):
        _pruning.sparse_bytes(network, precision="int2")
    with pytest.raises(UnknownNameError, match="kind of pruning 'layers'"):
        _pruning.sparse_bytes(network, kind="layers")
