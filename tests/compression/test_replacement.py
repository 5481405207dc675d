import copy
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save
from torch import nn

from kclib import kernels
from kclib.clustering import cluster
from kclib.clustering._clustering import quantized
from kclib.compression import _packing, _precisions, compress, expand, replaced
from kclib.compression._layers import ClusteredConv2d, by_codebook, clustered
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import extract

HOW = [{}, {"scaled": True}, {"turned": True}, {"scaled": True, "turned": True}]
EACH = pytest.mark.parametrize("how", HOW, ids=["plain", "scaled", "turned", "both"])


pytestmark = pytest.mark.usefixtures("one_thread")


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


def inserted(network, clustering):
    """Return a network whose kernels are what a clustering puts in their place, by way of its bank."""
    return kernels.insert(network, kernels.KernelBank(quantized(clustering), clustering.layers, {}))


def assert_same_bits(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(value, other[name]), name


def distinct(network, *names):
    weights = [network.get_submodule(name).weight.detach().reshape(-1, 9) for name in names]
    return len(torch.unique(torch.cat(weights), dim=0))


def placed(network):
    """Return the places in memory of everything a network holds."""
    return {x.data_ptr() for x in [*network.parameters(), *network.buffers()] if x.numel()}


@st.composite
def networks(draw, dtype=torch.float32):
    modules = []
    for _ in range(draw(st.integers(1, 4))):
        kind, groups = (
            draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d])),
            draw(st.sampled_from([1, 2, 4])),
        )
        size = 3 if not modules else draw(st.sampled_from([1, 3, 3, 3]))
        channels = draw(st.sampled_from([4, 8]))
        modules.append(kind(4, channels, size, groups=groups, bias=draw(st.booleans())))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    for module in modules:
        module.weight.data = torch.randn(module.weight.shape, generator=seeded)
    if draw(st.booleans()):
        modules.append(modules[0])
    if draw(st.booleans()):
        twin, bias = copy.deepcopy(modules[0]), modules[0].bias
        twin.weight, twin.bias, twin.dilation = modules[0].weight, bias, (2, 2)
        modules.append(twin)
    return nn.Sequential(*draw(st.permutations(modules)), nn.BatchNorm2d(4)).to(dtype)


@EACH
@given(networks(), st.integers(1, 20), st.sampled_from(["layer", "global"]), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_expanded_network_holds_the_quantized_kernels_to_the_bit(how, network, n_clusters, scope, seed):
    n_clusters = min(n_clusters, len(extract(network)) if scope == "global" else 4)
    result = cluster(extract(network), n_clusters, scope=scope, seed=seed, **how)
    before = copy.deepcopy(network.state_dict())
    expanded = expand(compress(network, result, inputs=False), inputs=False)  # some run on no input at all
    assert_same_bits(expanded.state_dict(), inserted(network, result).state_dict())
    assert str(expanded) == str(network)
    assert_same_bits(network.state_dict(), before)


@given(
    st.sampled_from([torch.float16, torch.bfloat16]).flatmap(lambda dtype: networks(dtype)),
    st.integers(1, 4),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_expanded_half_network_holds_the_rounded_kernels_to_the_bit(network, n_clusters, turned):
    result = cluster(extract(network), n_clusters, scope="global", turned=turned)
    expanded = expand(compress(network, result, inputs=False), inputs=False)
    assert_same_bits(expanded.state_dict(), inserted(network, result).state_dict())


@EACH
@pytest.mark.parametrize(
    ("scope", "dtype"),
    [
        ("layer", torch.float32),
        ("global", torch.bfloat16),
        ({"0": "ends", "3": "middle", "5": "ends"}, torch.float16),
    ],
)
def test_packed_network_answers_like_its_expansion_to_the_bit(network, images, how, scope, dtype):
    network, images = network.to(dtype), images.to(dtype)
    packed = compress(network, cluster(extract(network), 3, scope=scope, **how))
    answer = packed(images)
    assert torch.equal(answer, expand(packed)(images))
    assert answer.dtype == dtype
    assert not torch.equal(answer, network(images))
    in_blocks = compress(network, cluster(extract(network), 3, scope=scope, **how), block_bytes=1)
    close = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(in_blocks(images), answer, rtol=close, atol=close)


@EACH
@pytest.mark.parametrize("n_clusters", [1, 2, 5, 8])
def test_packed_network_has_k_entries_a_codebook_the_most_used_first(network, n_clusters, how):
    bank = extract(network)
    result = cluster(bank, n_clusters, **how)
    alone = compress(network, result)
    assert list(clustered(alone)) == ["0", "3", "5"]
    for group, (codebook, _) in zip(result.groups, by_codebook(alone), strict=True):
        assert codebook.values.shape == (group.n_clusters, 3, 3)
        assert (codebook.group, codebook.precision, codebook.seed) == (group.name, "fp32", 0)
        assert codebook.turned == how.get("turned", False)
        members = alone.get_submodule(group.name).members()
        used = np.bincount(members // 8 if codebook.turned else members, minlength=group.n_clusters)
        assert (np.diff(used) <= 0).all()
        assert sorted(used) == sorted(np.bincount(group.indices))
    shared = compress(network, cluster(bank, n_clusters, scope="global", **how))
    ((codebook, layers),) = by_codebook(shared)
    assert (codebook.group, list(layers)) == ("global", ["0", "3", "5"])


@pytest.mark.parametrize("n_clusters", [1, 2, 5, 8])
def test_expanded_network_has_k_distinct_kernels_a_group(network, n_clusters):
    bank = extract(network)
    alone = expand(compress(network, cluster(bank, n_clusters)))
    assert [distinct(alone, name) for name in ("0", "3", "5")] == [n_clusters] * 3
    shared = expand(compress(network, cluster(bank, n_clusters, scope="global")))
    assert distinct(shared, "0", "3", "5") == n_clusters


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_many_clusters_as_kernels_answer_like_the_dense_model_to_the_bit(network, images, scope, dtype):
    network, images = network.to(dtype), images.to(dtype)
    bank = extract(network)
    kept = compress(network, cluster(bank, {"layer": 24, "global": len(bank)}[scope], scope=scope))
    assert torch.equal(kept(images), network(images))


@pytest.mark.parametrize("use", [lambda network: network, expand], ids=["packed", "expanded"])
def test_callers_network_stays_as_it_is_and_shares_nothing(network, images, use):
    before, hooks = copy.deepcopy(network.state_dict()), []
    network[0].register_forward_hook(lambda *_: hooks.append(0))
    packed = compress(network, cluster(extract(network), 2))
    kept = copy.deepcopy(packed.state_dict())
    result = use(packed)
    assert not placed(result) & placed(network)
    assert result is packed or not placed(result) & placed(packed)
    for value in [*result.parameters(), *result.buffers()]:
        value.data.zero_()
    hooks.clear()
    result(images)
    assert hooks == [0]
    assert_same_bits(network.state_dict(), before)
    if result is not packed:
        assert_same_bits(packed.state_dict(), kept)
    assert list(clustered(network)) == []


def test_fewer_clusters_change_the_answers_but_only_through_the_clustered_weights(network, images):
    bank = extract(network)
    expanded = expand(compress(network, cluster(bank, 2)))
    assert not torch.equal(expanded(images), network(images))
    names = {f"{layer.name}.weight" for layer in bank.layers}
    for name, value in expanded.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]) == (name not in names)


def test_kernels_of_the_expanded_model_are_the_quantized_rows(network):
    result = cluster(extract(network), 3, scope={"0": "ends", "3": "middle", "5": "ends"})
    np.testing.assert_array_equal(extract(expand(compress(network, result))).kernels, quantized(result))


def test_one_layer_may_be_compressed_alone(network):
    packed = compress(network, cluster(extract(network).only("3"), 2))
    assert list(clustered(packed)) == ["3"]
    assert [distinct(expand(packed), name) for name in ("0", "3", "5")] == [24, 2, 8]


def test_a_network_may_be_one_convolution():
    convolution = nn.Conv2d(2, 4, 3)
    packed = compress(convolution, cluster(extract(convolution), 3))
    assert isinstance(packed, ClusteredConv2d)
    assert type(expand(packed)) is nn.Conv2d


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_clusters", [1, 3, 20])
def test_no_dense_copy_is_kept(network, how, dtype, n_clusters):
    network = network.to(dtype)
    result = cluster(extract(network), n_clusters, scope="global", **how)
    (group,), item = result.groups, dtype.itemsize
    bits = _packing.index_bits(group.n_clusters * (8 if "turned" in how else 1))
    expected = sum(_packing.index_bytes(layer.n_kernels, bits) for layer in result.layers)
    expected += group.n_clusters * 9 * item
    expected += len(group.indices) * item if "scaled" in how else 0
    expected += 8 * 9 * 8 if "turned" in how else 0
    weights = {f"{layer.name}.weight" for layer in result.layers}
    expected += sum(value.nbytes for name, value in network.state_dict().items() if name not in weights)
    packed = compress(network, result)
    held = {id(x): x.untyped_storage().nbytes() for x in [*packed.parameters(), *packed.buffers()]}
    assert sum(held.values()) == expected
    hidden = [
        value for module in packed.modules() for value in vars(module).values() if torch.is_tensor(value)
    ]
    assert not hidden


@EACH
def test_state_of_a_packed_network_is_loaded_into_one_made_of_other_weights(network, images, how):
    packed = compress(network, cluster(extract(network), 3, scope="global", **how))
    torch.manual_seed(5)
    for module in network:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    other = compress(network, cluster(extract(network), 3, scope="global", **how))
    assert not torch.equal(other(images), packed(images))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(images), packed(images))
    assert_same_bits(expand(other).state_dict(), expand(packed).state_dict())


@EACH
@pytest.mark.parametrize("trained", [True, False])
def test_what_was_trained_is_trained_on_and_what_was_frozen_stays(network, images, how, trained):
    network[0].weight.requires_grad_(trained)
    network[0].bias.requires_grad_(trained)
    packed = compress(network, cluster(extract(network).only("0"), 3, **how))
    assert {x.requires_grad for x in (packed[0].codebook.values, expand(packed)[0].weight)} == {trained}
    assert packed[0].scales is None or packed[0].scales.requires_grad == trained
    assert packed[0].bias.requires_grad == expand(packed)[0].bias.requires_grad == trained
    packed.train()(images).square().sum().backward()
    assert (packed[0].codebook.values.grad is not None) == trained
    assert packed[7].weight.grad is not None
    assert all(x.grad is None for x in network.parameters())


def test_training_flags_are_carried(network):
    network[3].train()
    packed = compress(network, cluster(extract(network), 3))
    for result in (packed, expand(packed)):
        assert [result[place].training for place in (0, 3, 5)] == [False, True, False]


def twice(kind=nn.Conv2d):
    module = kind(4, 4, 3, padding=1)
    return nn.Sequential(module, nn.ReLU(), module)


def one_weight():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2))
    network[1].weight = network[0].weight
    return network


def one_bias():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    network[1].bias = network[2].bias = network[3].bias = network[0].bias
    return network


def back_and_forth(groups=1):
    network = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(6, 4, 3, groups=groups))
    network[1].weight = network[0].weight
    return network


def one_weight_in_groups():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    network[1].weight = network[0].weight
    return network


def one_transposed_weight_in_groups():
    network = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3), nn.ConvTranspose2d(2, 2, 3)
    )
    network[1].weight = network[0].weight
    return network


SHARING = pytest.mark.parametrize(
    "make",
    [
        twice,
        lambda: twice(nn.ConvTranspose2d),
        one_weight,
        one_bias,
        back_and_forth,
        lambda: back_and_forth(groups=2),
        one_weight_in_groups,
        one_transposed_weight_in_groups,
    ],
    ids=["twice", "twice transposed", "weight", "bias", "both kinds", "both kinds in groups", "groups",
         "transposed groups"],
)  # fmt: skip


@SHARING
@EACH
def test_layers_that_share_answer_like_the_dense_ones(make, how):
    torch.manual_seed(0)
    network = make().eval()
    x = torch.randn(2, 4, 9, 9)
    result = cluster(extract(network), 3, scope="global", **how)
    packed, dense = compress(network, result), inserted(network, result)
    expanded = expand(packed)
    assert_same_bits(expanded.state_dict(), dense.state_dict())
    assert torch.equal(packed(x), expanded(x))
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-5)
    small = compress(network, result, block_bytes=1)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-5, atol=1e-5)
    held = len(list(packed.buffers())), len(list(packed.parameters()))
    again = copy.deepcopy(packed)
    assert (len(list(again.buffers())), len(list(again.parameters()))) == held
    assert torch.equal(again(x), packed(x))


def test_a_module_used_twice_is_one_module():
    dense = twice()
    packed = compress(dense, cluster(extract(dense), 3))
    for network in (packed, expand(packed), copy.deepcopy(packed)):
        assert network[0] is network[2]


def test_convolutions_of_one_weight_share_indices_scales_and_weight():
    network = one_weight()
    packed = compress(network, cluster(extract(network), 3, scaled=True))
    for result in (packed, copy.deepcopy(packed)):
        assert result[0] is not result[1]
        assert result[0].indices is result[1].indices
        assert result[0].scales is result[1].scales
    assert [list(layers) for _, layers in by_codebook(packed)] == [["0"]]
    expanded = expand(packed)
    assert expanded[0].weight is expanded[1].weight


@pytest.mark.parametrize("use", [lambda network: network, expand], ids=["packed", "expanded"])
def test_a_shared_bias_stays_one(use):
    network = one_bias()
    result = use(compress(network, cluster(extract(network), 3)))
    assert result[0].bias is result[1].bias is result[2].bias is result[3].bias
    assert result[0].bias is not network[0].bias


def test_expanded_weights_lie_in_one_piece_as_files_want_them(network):
    expanded = expand(compress(network, cluster(extract(network), 3)))
    assert all(x.is_contiguous() for x in expanded.parameters())
    assert save(expanded.state_dict())


@pytest.mark.parametrize("how", [{}, {"scaled": True}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_whose_weight_was_cut_is_refused(kind, how):
    network = nn.Sequential(kind(8, 8, 3, bias=False))
    network[0].weight = nn.Parameter(network[0].weight[:4])  # as structured pruning may leave it
    result = cluster(extract(network), 12, **how)
    with pytest.raises(InvalidValueError, match=r"layer 0.*\(8, 8, 3, 3\).*\(4, 8, 3, 3\)"):
        compress(network, result)


class Standardised(nn.Conv2d):
    """A convolution that computes with its weight less the mean, as some networks do."""

    def forward(self, x):
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, centred, self.bias)


def test_a_convolution_with_a_forward_of_its_own_is_refused_but_its_kernels_are_replaced():
    network = nn.Sequential(Standardised(3, 4, 3))
    x, result = torch.randn(1, 3, 6, 6), cluster(extract(network), 3)
    with pytest.raises(InvalidValueError, match="layer 0 is a Standardised"):
        compress(network, result)
    dense = replaced(network, result)
    np.testing.assert_array_equal(extract(dense).kernels, quantized(result))
    weight = dense[0].weight - dense[0].weight.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.equal(dense(x), nn.functional.conv2d(x, weight, network[0].bias))


class Doubled(nn.Conv2d):
    """A convolution whose way of its own is in another method than its forward."""

    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


@pytest.mark.parametrize("where", ["method", "instance"])
def test_a_way_of_its_own_is_refused_wherever_it_is(where):
    network = nn.Sequential(Doubled(3, 4, 3) if where == "method" else nn.Conv2d(3, 4, 3))
    if where == "instance":
        network[0].forward = lambda x: 2 * nn.Conv2d.forward(network[0], x)
    with pytest.raises(InvalidValueError, match="a way of its own"):
        compress(network, cluster(extract(network), 3))


@EACH
def test_replaced_kernels_are_those_of_the_expanded_network_also_where_layers_share(how):
    network = back_and_forth(groups=2)
    before = copy.deepcopy(network.state_dict())
    result = cluster(extract(network), 3, scope="global", **how)
    dense = replaced(network, result)
    assert dense[0].weight is dense[1].weight
    assert_same_bits(dense.state_dict(), expand(compress(network, result)).state_dict())
    assert_same_bits(network.state_dict(), before)
    assert not placed(dense) & placed(network)


@pytest.mark.parametrize("precision", _precisions.PRECISIONS)
@EACH
def test_precision_rounds_the_codebook_and_scales_as_a_file_will(network, how, precision):
    result = cluster(extract(network), 4, scope="global", **how)
    (group,) = result.groups
    values = torch.from_numpy(group.codebook)
    rounded = _precisions.restore(_precisions.store(values, precision)).float()
    packed = compress(network, result, precision=precision)
    ((codebook, _),) = by_codebook(packed)
    assert codebook.precision == precision
    assert {x.dtype for x in packed.parameters()} == {torch.float32}
    assert sorted(codebook.values.tolist()) == sorted(rounded.tolist())
    scales = group.scales
    if scales is not None:
        kind = {"fp32": np.float32, "bf16": None}.get(precision, np.float16)
        scales = torch.from_numpy(scales).bfloat16().float().numpy() if kind is None else scales.astype(kind)
    coarse = replace(group, codebook=rounded.numpy(), scales=None if scales is None else scales.astype("f"))
    dense = inserted(network, replace(result, groups=(coarse,)))
    assert_same_bits(expand(packed).state_dict(), dense.state_dict())
    assert (precision == "fp32") == torch.equal(expand(packed)[0].weight, inserted(network, result)[0].weight)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_precision_is_the_networks_own_by_default(network, dtype, precision):
    network = network.to(dtype)
    packed = compress(network, cluster(extract(network), 4))
    assert {codebook.precision for codebook, _ in by_codebook(packed)} == {precision}
    assert {x.dtype for x in packed.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_of_a_half_network_is_refused(network, dtype):
    network = network.to(dtype)
    with pytest.raises(InvalidValueError, match=r"int8.*float32.*\.float\(\)"):
        compress(network, cluster(extract(network), 4), precision="int8")


def test_values_that_the_precision_cannot_hold_are_refused(network):
    network[0].weight.data *= 1e6
    result = cluster(extract(network), 4)
    for precision in ("fp32", "bf16", "int8"):
        compress(network, result, precision=precision)
    with pytest.raises(InvalidValueError, match="no finite fp16; use fp32 or bf16"):
        compress(network, result, precision="fp16")
    scaled = cluster(extract(network), 4, scaled=True)
    for precision in ("fp16", "int8"):  # int8 has its scales in fp16
        with pytest.raises(InvalidValueError, match=f"finite {precision}"):
            compress(network, scaled, precision=precision)


def test_unknown_precision_is_refused(network):
    with pytest.raises(UnknownNameError, match=r"'fp8'"):
        compress(network, cluster(extract(network), 4), precision="fp8")


@pytest.mark.parametrize("block_bytes", [0, True, 1.5])
def test_block_bytes_that_are_no_positive_whole_number_are_refused(network, block_bytes):
    with pytest.raises(InvalidValueError, match="block_bytes is"):
        compress(network, cluster(extract(network), 4), block_bytes=block_bytes)


def test_block_bytes_are_those_of_every_layer(network):
    packed = compress(network, cluster(extract(network), 4), block_bytes=1)
    assert [len(list(layer.blocks())) for layer in clustered(packed).values()] == [8, 4, 2]


def test_layers_of_several_types_cannot_share_a_codebook_but_have_their_own(network):
    network[3].half()
    bank = extract(network)
    with pytest.raises(InvalidValueError, match=r"global.*float16.*float32"):
        compress(network, cluster(bank, 3, scope="global"))
    packed = compress(network, cluster(bank, 3))
    assert [codebook.precision for codebook, _ in by_codebook(packed)] == ["fp32", "fp16", "fp32"]


class Projection(nn.Module):
    """Has a weight like a convolution's and is none."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.flatten(1).T


@pytest.mark.parametrize("other", [Projection, lambda weight: nn.ParameterList([weight])])
def test_a_weight_that_something_else_shares_is_refused(other):
    convolution = nn.Conv2d(2, 4, 3)
    network = nn.ModuleDict({"conv": convolution, "other": other(convolution.weight)})
    with pytest.raises(InvalidValueError, match=r"conv shares .* with other"):
        compress(network, cluster(extract(network), 2))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (nn.Conv2d(3, 9, 3), r"layer 0 was a convolution of shape \(9, 3, 3, 3\), the network has .* \(8, 3"),
        (nn.Conv2d(3, 8, 5), r"shape \(8, 3, 5, 5\), the network has shape \(8, 3, 3, 3\)"),
        (nn.ConvTranspose2d(8, 3, 3), r"shape \(8, 3, 3, 3\) \(transposed\), the network has shape"),
    ],
    ids=["channels", "size", "transposed"],
)
def test_clustering_of_another_architecture_is_refused(network, other, sentence):
    result = cluster(extract(nn.Sequential(other)), 2)
    with pytest.raises(InvalidValueError, match=sentence):
        compress(network, result)


def test_a_packed_network_has_no_convolutions_left_to_compress(network):
    result = cluster(extract(network), 2)
    with pytest.raises(InvalidValueError, match=r"layer 0 .*compressed already"):
        compress(compress(network, result), result)


def test_a_network_without_clustered_layers_is_expanded_to_a_copy(network, images):
    result = expand(network)
    assert_same_bits(result.state_dict(), network.state_dict())
    assert not placed(result) & placed(network)
    assert torch.equal(result(images), network(images))
