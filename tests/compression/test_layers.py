import copy
import pickle
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kclib.compression import _packing, expand
from kclib.compression._layers import BLOCK_BYTES, ClusteredConv2d, Codebook, by_codebook, clustered
from kclib.errors import InvalidValueError
from kclib.kmeans import symmetric

HOW = [{"scaled": scaled, "turned": turned} for scaled, turned in [(0, 0), (1, 0), (0, 1), (1, 1)]]
EACH = pytest.mark.parametrize("how", HOW, ids=["plain", "scaled", "turned", "both"])
HALVES = [torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(
    convolution, n_clusters=5, *, scaled=False, turned=False, seed=0, codebook=None, block_bytes=BLOCK_BYTES
):
    """Return a clustered layer with a convolution's geometry, its indices, scales and codebook drawn."""
    draw, dtype = np.random.default_rng(seed), convolution.weight.dtype
    n = convolution.weight.shape[0] * convolution.weight.shape[1]
    if codebook is None:
        values = torch.from_numpy(draw.normal(size=(n_clusters, *convolution.kernel_size))).to(dtype)
        codebook = Codebook(values, group="all", precision="fp32", turned=turned)
    indices = draw.integers(0, codebook.n_members, n)
    scales = nn.Parameter(torch.from_numpy(draw.normal(size=n)).to(dtype)) if scaled else None
    packed = torch.from_numpy(_packing.pack(indices, codebook.bits))
    return ClusteredConv2d(
        convolution, codebook, packed, scales=scales, bias=convolution.bias, block_bytes=block_bytes
    )


def dense_weight(layer):
    """Return the weight that a layer's indices mean, kernel by kernel, as torch stores it."""
    values, members = layer.codebook.values, layer.members()
    fan_in, group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    first = layer.in_channels if layer.transposed else layer.out_channels
    kernels = [[None] * (group_out if layer.transposed else fan_in) for _ in range(first)]
    for out in range(layer.out_channels):
        for within in range(fan_in):
            place = out * fan_in + within
            member, turn = divmod(int(members[place]), 8) if layer.codebook.turned else (members[place], 0)
            kernel = values[member]
            if turn:
                order = torch.from_numpy(symmetric.transforms(kernel.shape[0])[turn])
                kernel = kernel.reshape(-1)[order].reshape(kernel.shape)
            if layer.scales is not None:
                kernel = layer.scales[place] * kernel
            if layer.transposed:
                kernels[out // group_out * fan_in + within][out % group_out] = kernel
            else:
                kernels[out][within] = kernel
    return torch.stack([torch.stack(row) for row in kernels])


def ordinary(convolution, weight):
    """Return a copy of a convolution with another weight."""
    result = copy.deepcopy(convolution)
    result.weight = nn.Parameter(weight.detach())
    return result


def images(layer, *shape, seed=1):
    drawn = torch.randn(*shape, layer.in_channels, 12, 11, generator=torch.Generator().manual_seed(seed))
    return drawn.to(layer.codebook.values.dtype)


@st.composite
def convolutions(draw, sizes=((1, 1), (3, 3), (5, 5), (1, 3), (4, 2)), dtypes=(torch.float32, *HALVES)):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 4)) for _ in range(2))
    size, dilation = draw(st.sampled_from(sizes)), draw(st.sampled_from([1, 2, (1, 2)]))
    stride, padding = draw(st.sampled_from([1, 2, (2, 1)])), draw(st.sampled_from([0, 1, (1, 2)]))
    options = {"groups": groups, "dilation": dilation, "bias": draw(st.booleans())}
    options["dtype"] = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        grown = draw(st.sampled_from([0, 1])) if stride == 2 or dilation == 2 else 0
        return nn.ConvTranspose2d(
            inputs, outputs, size, stride=stride, padding=padding, output_padding=grown, **options
        )
    if draw(st.booleans()) and size != (4, 2):  # torch warns of even kernels
        stride, padding = 1, "same"
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, padding_mode=mode, **options)


def squared(module):
    return module.kernel_size[0] == module.kernel_size[1]


@given(convolutions(), st.integers(1, 9), st.sampled_from(HOW), st.sampled_from([(), (1,), (2,)]))
@settings(deadline=None, max_examples=25)
def test_a_layer_of_one_block_answers_like_the_dense_one_to_the_bit(convolution, n_clusters, how, batch):
    assume(squared(convolution) or not how["turned"])
    layer = layer_of(convolution, n_clusters, **how)
    x, expected = images(layer, *batch), dense_weight(layer)
    assert torch.equal(layer.weight, expected)
    assert layer.shape == tuple(expected.shape) == tuple(convolution.weight.shape)
    assert layer.n_kernels == len(layer.members()) == expected.shape[0] * expected.shape[1]
    answer = layer(x)
    assert answer.dtype == convolution.weight.dtype
    assert torch.equal(answer, expand(layer)(x))
    assert torch.equal(answer, ordinary(convolution, expected)(x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_of_one_block_answers_like_the_dense_one_on_two_threads_too(kind, groups):
    layer = layer_of(kind(16, 32, 3, groups=groups), 50, scaled=True)
    x, expanded = images(layer, 3), expand(layer)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x), expanded(x))
        torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(1)


@given(convolutions(dtypes=[torch.float32]), st.sampled_from(HOW), st.integers(1, 3000), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_layer_in_blocks_answers_like_the_dense_one(convolution, how, block_bytes, batched):
    assume(squared(convolution) or not how["turned"])
    layer = layer_of(convolution, **how, block_bytes=block_bytes)
    x = images(layer, 2) if batched else images(layer)
    answer, expected = layer(x), ordinary(convolution, dense_weight(layer))(x)
    assert answer.shape == expected.shape
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]),
    st.sampled_from([1, 2, 3, 8, 40]),
    st.integers(1, 50),
    st.integers(1, 12),
    st.sampled_from(HOW),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 40_000),
)
@settings(deadline=None, max_examples=40)
def test_blocks_hold_each_channel_once_and_fit(kind, groups, out, fan_in, how, dtype, block_bytes):
    convolution = kind(groups * fan_in, groups * out, 3, groups=groups, dtype=dtype)
    layer = layer_of(convolution, **how, block_bytes=block_bytes)
    blocks = list(layer.blocks())
    assert [x for first, last in blocks for x in range(first, last)] == list(range(groups * out))
    whole_groups = [first % out == 0 and last % out == 0 for first, last in blocks]
    within_a_group = [first // out == (last - 1) // out for first, last in blocks]
    assert all(whole_groups) or all(within_a_group)
    kernel = 4 + 9 * dtype.itemsize  # what must be there at the least: an index and what it means
    for first, last in blocks:
        assert last == first + 1 or (last - first) * fan_in * kernel <= block_bytes


@pytest.mark.parametrize(
    ("out", "groups", "block_bytes", "expected"),
    [
        (8, 1, 1, [(x, x + 1) for x in range(8)]),
        (8, 1, 2 * 40 * 3, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (8, 1, 3 * 40 * 3 - 1, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (8, 1, 3 * 40 * 3, [(0, 3), (3, 6), (6, 8)]),
        (8, 1, 8 * 40 * 3, [(0, 8)]),
        (8, 1, 8 * 40 * 3 - 1, [(0, 7), (7, 8)]),
        (40, 1, 35 * 40 * 3, [(0, 32), (32, 40)]),  # a multiple of the channels computed at once
        (8, 4, 5 * 40 * 3, [(0, 4), (4, 8)]),  # whole groups of two
        (9, 3, 2 * 40 * 3, [(0, 2), (2, 3), (3, 5), (5, 6), (6, 8), (8, 9)]),
    ],
)
def test_blocks_by_hand(out, groups, block_bytes, expected):
    layer = layer_of(nn.Conv2d(3 * groups, out, 3, groups=groups), block_bytes=block_bytes)
    assert list(layer.blocks()) == expected


class Peak(TorchDispatchMode):
    """Follows the bytes of tensors that come to be, but for the answers of convolutions."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kept = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        if torch.is_tensor(result) and not any(word in func.__name__ for word in ("conv", "cat")):
            place = result.untyped_storage().data_ptr()
            if place not in kept | self.live.keys():
                self.bytes += result.untyped_storage().nbytes()
                self.peak = max(self.peak, self.bytes)
                self.live[place] = 0
            if place in self.live:
                self.live[place] += 1
                weakref.finalize(result, self._left, place, result.untyped_storage().nbytes())
        return result

    def _left(self, place, size):
        self.live[place] -= 1
        if not self.live[place]:
            self.bytes -= size
            del self.live[place]


@EACH
@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (nn.Conv2d, 1),
        (nn.Conv2d, 4),
        (nn.ConvTranspose2d, 1),
        (nn.ConvTranspose2d, 4),
    ],
)
def test_what_is_decoded_at_a_time_takes_no_more_than_told(kind, groups, how):
    layer = layer_of(kind(64, 64, 3, groups=groups, bias=False), **how, block_bytes=40_000)
    x = torch.randn(1, 64, 5, 5)
    with torch.no_grad(), Peak() as taken:
        layer(x)
    assert 10_000 < taken.peak <= 40_000
    layer.block_bytes = 1 << 30
    with torch.no_grad(), Peak() as whole:
        layer(x)
    assert whole.peak >= layer.n_kernels * 36


@pytest.mark.parametrize("wanted", [(23, 21), (24, 22), [24, 21]])
@pytest.mark.parametrize("block_bytes", [1, BLOCK_BYTES])
def test_output_size_of_a_transposed_convolution_is_the_one_wanted(wanted, block_bytes):
    convolution = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
    layer = layer_of(convolution, block_bytes=block_bytes)
    x, dense = images(layer, 2), ordinary(convolution, dense_weight(layer))
    answer = layer(x, output_size=wanted)
    assert answer.shape == (2, 6, *wanted)
    torch.testing.assert_close(answer, dense(x, output_size=wanted), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=(30, 30))


@EACH
def test_codebook_gives_the_kernels_that_indices_mean(how):
    values = torch.randn(5, 3, 3)
    codebook = Codebook(values, group="all", precision="fp32", turned=how["turned"])
    assert codebook.n_members == (40 if how["turned"] else 5)
    assert codebook.bits == (6 if how["turned"] else 3)
    assert torch.equal(codebook.table(), values.reshape(5, 9))
    every = codebook(torch.arange(codebook.n_members, dtype=torch.int32))
    if how["turned"]:
        for kernel, orbit in zip(values, every.reshape(5, 8, 9), strict=True):
            faces = [torch.rot90(face, quarter) for face in (kernel, kernel.flip(1)) for quarter in range(4)]
            assert sorted(orbit.tolist()) == sorted(face.reshape(-1).tolist() for face in faces)
            assert torch.equal(orbit[0], kernel.reshape(-1))
    else:
        assert torch.equal(every, values.reshape(5, 9))


@EACH
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("block_bytes", [1, BLOCK_BYTES])
def test_gradients_are_those_of_the_dense_weight_looked_up(kind, how, block_bytes):
    convolution = kind(4, 6, 3, groups=2, dtype=torch.float64)
    layer = layer_of(convolution, **how, block_bytes=block_bytes)
    x = images(layer, 2).requires_grad_()
    wanted = [x, *layer.parameters()]
    assert len(wanted) == 3 + how["scaled"]
    convolved = F.conv_transpose2d if layer.transposed else F.conv2d
    dense = convolved(x, dense_weight(layer), layer.bias, groups=2)
    toward = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, wanted, toward)
    for mine, theirs in zip(torch.autograd.grad(layer(x), wanted, toward), expected, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("how", [HOW[0], HOW[3]], ids=["plain", "both"])
def test_compiled_and_exported_layers_answer_alike(how):
    first = layer_of(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), **how, block_bytes=300)
    second = layer_of(nn.ConvTranspose2d(6, 4, 3, groups=2), codebook=first.codebook, **how)
    network = nn.Sequential(first, second).eval()
    assert [len(list(layer.blocks())) > 1 for layer in network] == [True, False]
    x = images(first, 2)
    expected = network(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(network, backend="aot_eager", fullgraph=True)(x), expected)
    exported = torch.export.export(network, (x,))
    assert torch.equal(exported.module()(x), expected)
    stored = {name: value.nbytes for name, value in exported.state_dict.items()}
    assert stored == {name: value.nbytes for name, value in network.state_dict().items()}


def pair(**how):
    """Return a network of two layers that share a codebook."""
    first = layer_of(nn.Conv2d(3, 4, 3), **how)
    return nn.Sequential(first, layer_of(nn.Conv2d(4, 2, 3), codebook=first.codebook, seed=1, **how))


@EACH
@pytest.mark.parametrize(
    "moved",
    [
        copy.deepcopy,
        lambda network: pickle.loads(pickle.dumps(network)),
        lambda network: network.half(),
        lambda network: network.double(),
        lambda network: network.bfloat16(),
        lambda network: network.to(torch.float64),
        lambda network: network.to("cpu", torch.float16),
    ],
    ids=["copied", "pickled", "half", "double", "bfloat16", "to", "to cpu"],
)
def test_layers_share_one_codebook_wherever_they_go(how, moved):
    network = pair(**how)
    members = [layer.members() for layer in network]
    result = moved(network)
    assert result[0].codebook is result[1].codebook
    assert result[0].codebook.values is result[1].codebook.values
    assert len(list(result.parameters())) == 3 + 2 * how["scaled"]
    for layer, before in zip(result, members, strict=True):
        np.testing.assert_array_equal(layer.members(), before)
        assert layer.indices.dtype == torch.uint8
    x = torch.randn(2, 3, 9, 9).to(result[0].codebook.values.dtype)
    assert torch.equal(result(x), expand(result)(x))


def test_a_copy_trains_apart_from_its_original():
    network = pair()
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].codebook.values.zero_()
    assert network[0].codebook.values.abs().sum() > 0
    assert not other[1].weight.any()


@EACH
def test_state_is_loaded_into_another_network_of_the_kind(how):
    network, other = pair(**how), pair(**how)
    with torch.no_grad():
        for value in [*other.parameters(), *other.buffers()]:
            if value.dtype != torch.int64:
                value.zero_()
    x = torch.randn(2, 3, 9, 9)
    assert not other(x).any()
    state = network.state_dict()
    kinds = {"indices", "bias", "codebook.values"} | ({"scales"} if how["scaled"] else set())
    assert set(state) == {f"{place}.{kind}" for place in range(2) for kind in kinds}
    other.load_state_dict(state)
    assert torch.equal(other(x), network(x))


@EACH
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("block_bytes", [1, BLOCK_BYTES])
def test_indices_that_the_codebook_lacks_are_an_error_and_no_crash(how, kind, block_bytes):
    layer = layer_of(kind(4, 6, 3), **how, block_bytes=block_bytes)
    state = layer.state_dict()
    state["indices"] = torch.full_like(state["indices"], 255)
    layer.load_state_dict(state)
    assert layer.members().max() >= layer.codebook.n_members
    with pytest.raises(IndexError):
        layer(images(layer, 1))
    with pytest.raises(IndexError):
        layer.weight  # noqa: B018


@EACH
def test_short_indices_of_another_layer_are_not_loaded(how):
    layer = layer_of(nn.Conv2d(4, 6, 3), **how)
    state = layer.state_dict()
    state["indices"] = state["indices"][:-1]
    with pytest.raises(RuntimeError, match="size mismatch for indices"):
        layer.load_state_dict(state)


def test_a_codebook_of_one_takes_no_indices():
    layer = layer_of(nn.Conv2d(4, 6, 3), 1)
    assert (layer.codebook.bits, layer.indices.nbytes) == (0, 0)
    assert torch.equal(layer.weight, layer.codebook.values.expand(6, 4, 3, 3))
    turned = layer_of(nn.Conv2d(4, 6, 3), 1, turned=True)
    assert (turned.codebook.bits, turned.indices.nbytes) == (3, 9)


def test_layers_are_found_by_name_and_codebook():
    network, alone = pair(), layer_of(nn.Conv2d(2, 2, 1))
    again = copy.copy(network[0])
    network = nn.ModuleDict({"two": network, "act": nn.ReLU(), "one": alone, "again": again})
    assert list(clustered(network)) == ["two.0", "two.1", "one", "again"]
    found = by_codebook(network)
    assert [codebook for codebook, _ in found] == [network["two"][0].codebook, alone.codebook]
    assert [list(layers) for _, layers in found] == [["two.0", "two.1"], ["one"]]


def test_layers_in_blocks_follow_the_training_flag_and_describe_themselves():
    assert not layer_of(nn.Conv2d(2, 2, 3).eval()).training
    layer = layer_of(nn.ConvTranspose2d(2, 4, 3), scaled=True, turned=True)
    assert layer.training
    assert "(2, 4, 3, 3), transposed=True, 6 bits a kernel, scaled" in repr(layer)
    assert "'all', 5×3×3, fp32, turned" in repr(layer)


@pytest.mark.parametrize("block_bytes", [0, -1, True, 1.5, "1", None])
def test_block_bytes_that_are_no_positive_whole_number_are_refused(block_bytes):
    with pytest.raises(InvalidValueError, match=r"block_bytes is .*;"):
        layer_of(nn.Conv2d(2, 2, 3), block_bytes=block_bytes)


def test_block_bytes_may_be_numpys():
    assert list(layer_of(nn.Conv2d(2, 2, 3), block_bytes=np.int64(1)).blocks()) == [(0, 1), (1, 2)]


def test_layers_answer_like_dense_ones_under_autocast():
    layer = layer_of(nn.Conv2d(3, 8, 3), scaled=True)
    x = images(layer, 2)
    with torch.autocast("cpu", torch.bfloat16):
        answer, expected = layer(x), expand(layer)(x)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, expected)
