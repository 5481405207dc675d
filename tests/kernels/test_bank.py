from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import DeformConv2d

from kclib import clustering, compression, kernels, models
from kclib.errors import InvalidValueError
from kclib.kernels import _bank

DTYPES = {
    torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: None
}  # fmt: skip


def bits(network):
    return {name: x.reshape(-1).view(torch.uint8).tolist() for name, x in network.state_dict().items()}


@st.composite
def convolutions(draw, size=None):
    kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
    size = size or draw(st.sampled_from([(1, 1), (1, 7), (3, 3), (4, 2)]))
    groups, dilation = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    module = kind(4, draw(st.sampled_from([4, 8])), size, groups=groups, dilation=dilation)
    dtype = draw(st.sampled_from(list(DTYPES)))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype == torch.float64:
        values = torch.randn(module.weight.shape, generator=seeded, dtype=dtype)
    else:
        info = torch.iinfo(DTYPES[dtype])
        values = torch.randint(
            info.min, info.max, module.weight.shape, generator=seeded, dtype=DTYPES[dtype]
        ).view(dtype)
    module.to(dtype).weight.data = torch.where(values.isfinite(), values, 0)
    if draw(st.booleans()):
        module.to(memory_format=torch.channels_last)
    return module


@st.composite
def networks(draw):
    modules = [draw(convolutions(size=(3, 3))), *draw(st.lists(convolutions(), max_size=3))]
    if draw(st.booleans()):
        modules.append(modules[0])
    return nn.Sequential(*draw(st.permutations(modules)), nn.BatchNorm2d(4))


@given(networks())
@settings(deadline=None, max_examples=25)
def test_extract_then_insert_is_the_identity_to_the_bit(network):
    assert bits(kernels.insert(network, kernels.extract(network))) == bits(network)


@given(networks(), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_inserted_kernels_are_extracted_again_and_nothing_else_changes(network, seed):
    bank, before = kernels.extract(network), bits(network)
    other = np.random.default_rng(seed).integers(-8, 9, bank.kernels.shape).astype(np.float32)
    changed = kernels.insert(network, replace(bank, kernels=other))
    np.testing.assert_array_equal(kernels.extract(changed).kernels, other)
    assert bits(network) == before
    owners = dict(network.named_modules(remove_duplicate=False))
    mine = {id(owners[layer.name].weight) for layer in bank.layers}
    rest = {n for n, p in network.state_dict(keep_vars=True).items() if id(p) not in mine}
    assert {n: bits(changed)[n] for n in rest} == {n: before[n] for n in rest}


def test_bank_keeps_its_values_when_the_network_trains_on():
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    bank = kernels.extract(network)
    nn.init.zeros_(network[0].weight)
    assert bank.kernels.all()


def test_rows_are_the_slices_of_each_weight_in_module_order():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3))
    bank = kernels.extract(network)
    assert [(x.name, x.start, x.transposed) for x in bank.layers] == [("0", 0, False), ("2", 6, True)]
    np.testing.assert_array_equal(bank.kernels[3], network[0].weight[1, 1].detach())
    np.testing.assert_array_equal(bank.kernels[6 + 5], network[2].weight[2, 1].detach())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(2, 2, 1), "1×1 kernels, not 3×3"),
        (nn.Conv2d(2, 2, (5, 1)), "5×1 kernels, not 3×3"),
        (nn.Conv1d(2, 2, 3), "Conv1d: its kernels are not 2D"),
        (nn.ConvTranspose3d(2, 2, 3), "ConvTranspose3d: its kernels are not 2D"),
        (prune.l1_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5), "pruned"),
    ],
)
def test_convolution_left_out_is_named_with_its_reason(module, reason):
    bank = kernels.extract(nn.ModuleDict({"kept": nn.Conv2d(2, 2, 3), "other": module}))
    assert [layer.name for layer in bank.layers] == ["kept"]
    assert list(bank.left_out) == ["other"]
    assert reason in bank.left_out["other"]


def test_shared_weight_counts_once_and_names_its_owner():
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, dilation=2))
    network[1].weight = network[0].weight
    bank = kernels.extract(network)
    assert (len(bank), bank.left_out) == (4, {"1": "shares its weight with 0"})


def test_commonest_size_larger_than_1x1_is_chosen():
    network = nn.Sequential(nn.Conv2d(9, 9, 1), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5), nn.Conv2d(1, 7, 3))
    assert (kernels.extract(network).size, len(kernels.extract(network))) == ((5, 5), 16)
    assert len(kernels.extract(network, size=3)) == 8 + 7
    assert kernels.extract(network, size=(1, 1)).layers[0].n_kernels == 81


def test_origin_is_layer_out_and_in_of_each_row():
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(1, 1, 3)
    )
    frame = kernels.extract(network).origin([0, 3, 5, 7, 9, 12, 15, 20])
    assert "".join(frame["layer"]) == "00011223"
    assert frame["out"].tolist() == [0, 1, 2, 1, 0, 0, 1, 0]
    assert frame["in"].tolist() == [0, 1, 1, 0, 1, 0, 1, 0]


def test_rows_of_layers_follow_one_another_in_the_order_given():
    layers = kernels.Layer("a", (2, 1, 3, 3), 0), kernels.Layer("b", (1, 3, 3, 3), 2)
    assert _bank.rows_of(reversed(layers)).tolist() == [2, 3, 4, 0, 1]
    assert _bank.rows_of([]).tolist() == []


def test_only_is_the_bank_of_one_layer_with_rows_from_zero():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)))
    alone = bank.only("1")
    np.testing.assert_array_equal(alone.kernels, bank.kernels[6:])
    assert alone.origin([5])[["out", "in"]].values.tolist() == [[1, 2]]
    with pytest.raises(InvalidValueError, match=r"no layer 'x' .* it has 0, 1"):
        bank.only("x")


def test_only_is_the_bank_of_several_layers_in_its_own_order():
    bank = kernels.extract(nn.Sequential(*(nn.Conv2d(i, 2, 3) for i in (1, 2, 3, 4)), nn.Conv2d(1, 1, 1)))
    some = bank.only("3", "0", "3")
    assert [(layer.name, layer.start, layer.shape) for layer in some.layers] == [
        ("0", 0, (2, 1, 3, 3)),
        ("3", 2, (2, 4, 3, 3)),
    ]
    np.testing.assert_array_equal(some.kernels, np.concatenate([bank.kernels[:2], bank.kernels[12:]]))
    assert some.origin([2, 9])["layer"].tolist() == ["3", "3"]
    assert [layer.start for layer in bank.layers] == [0, 2, 6, 12]
    for part in (some, bank.only("1")):
        assert part.left_out == {}
        with pytest.raises(ValueError, match="read-only"):
            part.kernels[0] = 0


def test_only_of_all_layers_is_the_bank_and_of_none_is_refused():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(1, 1, 1)))
    whole = bank.only("1", "0")
    assert (whole.layers, whole.left_out) == (bank.layers, bank.left_out)
    np.testing.assert_array_equal(whole.kernels, bank.kernels)
    with pytest.raises(InvalidValueError, match="no layer is named; name at least one"):
        bank.only()
    with pytest.raises(InvalidValueError, match=r"no layer 'x' .* it has 0, 1"):
        bank.only("0", "x")


def test_only_leaves_weights_that_may_be_written_so():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)))
    bank = replace(bank, kernels=bank.kernels.copy())
    bank.only("0")
    assert bank.kernels.flags.writeable


@given(st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_sample_is_stratified_seeded_sorted_and_distinct(per_layer, seed):
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(4, 4, 3)))
    rows = kernels.sample(bank, per_layer, seed=seed)
    assert (np.diff(rows) > 0).all()
    first = np.sum((rows >= 0) & (rows < 6))
    assert (first, len(rows) - first, rows.max() < 22) == (min(per_layer, 6), min(per_layer, 16), True)
    np.testing.assert_array_equal(rows, kernels.sample(bank, per_layer, seed=seed))


def test_sample_of_another_seed_differs_and_every_kernel_can_be_drawn():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(4, 4, 3)))
    drawn = [tuple(kernels.sample(bank, 4, seed=seed)) for seed in range(40)]
    assert (len(set(drawn)) > 30, set(np.concatenate(drawn))) == (True, set(range(16)))
    with pytest.raises(InvalidValueError, match="per_layer is 0"):
        kernels.sample(bank, 0)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "size", "sentence"),
    [
        (lambda: nn.Linear(2, 2), None, r"no 2D kernels larger than 1×1 \(found: none; .*linear layers\)"),
        (lambda: nn.Conv2d(2, 3, 1), None, r"found: 6 of 1×1\); give size=1"),
        (lambda: nn.Conv2d(2, 3, 3), 5, r"no 5×5 kernels \(found: 6 of 3×3\)"),
        (lambda: nn.Conv2d(2, 3, 3, device="meta"), None, "has no values yet"),
        (lambda: nn.LazyConv2d(3, 3), None, "has no values yet"),
    ],
)
def test_network_without_the_kernels_wanted_is_refused(make, size, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        kernels.extract(nn.Sequential(make()), size=size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_layer(value):
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    network[1].weight.data[0, 0, 2, 1] = value
    with pytest.raises(InvalidValueError, match="layer 1 has NaN or infinite weights"):
        kernels.extract(network)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            nn.Sequential(nn.Conv2d(2, 5, 3)),
            r"layer 0 was .* of shape \(2, 4, 3, 3\), .* \(5, 2, 3, 3\); use the architecture",
        ),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3)), "layer 0 .* no such layer"),
        (nn.Sequential(nn.ConvTranspose2d(2, 4, 3)), "layer 0"),
        (nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 2, 3))), "layer 0 .*SpectralNorm"),
    ],
    ids=["shape", "missing", "transposed", "parametrized"],
)
def test_bank_is_not_inserted_into_another_architecture(other, sentence):
    bank = kernels.extract(nn.Sequential(nn.Conv2d(4, 2, 3)))
    with pytest.raises(InvalidValueError, match=sentence):
        kernels.insert(other, bank)


def test_network_with_a_pruned_layer_takes_the_kernels_of_its_other_layers():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(network[1], "weight", 0.5)
    bank = kernels.extract(network)
    changed = kernels.insert(network, replace(bank, kernels=np.ones_like(bank.kernels)))
    assert (changed[0].weight == 1).all()
    assert torch.equal(changed[1].weight, network[1].weight)


NORMS = {
    "parametrization": parametrizations.weight_norm,
    "hook": pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normed_convolution_is_taken_and_given_back(norm, kind, dim):
    network = nn.Sequential(norm(kind(3, 4, 3), dim=dim))
    with torch.no_grad():
        dict(network[0].named_parameters())[GAINS[norm.__module__]].mul_(3)
        dense = network[0](torch.zeros(1, 3, 5, 5)) is not None and network[0].weight.clone()
    bank, before = kernels.extract(network), bits(network)
    np.testing.assert_array_equal(bank.kernels, dense.reshape(-1, 3, 3))
    assert bits(kernels.insert(network, bank)) == before
    other = np.random.default_rng(0).normal(size=bank.kernels.shape).astype(np.float32)
    other[:8] = 0  # filters, or all but a part of some, are zero
    changed = kernels.insert(network, replace(bank, kernels=other))
    np.testing.assert_allclose(kernels.extract(changed).kernels, other, rtol=1e-6)
    assert set(bits(changed)) == set(before)
    assert bits(network) == before
    inputs = torch.rand(1, 3, 7, 7)
    convolve = nn.functional.conv2d if kind is nn.Conv2d else nn.functional.conv_transpose2d
    expected = convolve(inputs, torch.from_numpy(other).reshape(network[0].weight.shape), network[0].bias)
    torch.testing.assert_close(changed(inputs), expected)


GAINS = {
    "torch.nn.utils.parametrizations": "parametrizations.weight.original0",
    "torch.nn.utils.weight_norm": "weight_g",
}


def test_weights_behind_a_weight_norm_hook_are_those_of_now():
    with pytest.warns(FutureWarning):
        network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 2, 3)))
    before = kernels.extract(network).kernels
    network[0].weight_g.data *= 2  # as load_state_dict does; torch computes the weight when it runs next
    np.testing.assert_allclose(kernels.extract(network).kernels, 2 * before, rtol=1e-6)


def test_extract_leaves_spectral_norm_and_its_estimate_alone():
    network = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3)).train()
    before = bits(network)
    bank = kernels.extract(network)
    assert bits(network) == before
    assert "SpectralNorm" in bank.left_out["0"]
    assert "remove_parametrizations" in bank.left_out["0"]


def test_float64_kernels_are_clustered_in_float32_and_the_others_kept():
    network = nn.Sequential(nn.Conv2d(2, 3, 3)).double()
    bank = kernels.extract(network)
    assert (bank.kernels.dtype, bank.layers[0].itemsize) == (np.float32, 8)
    other = bank.kernels.copy()
    other[4] = 0.5
    changed = kernels.insert(network, replace(bank, kernels=other))[0].weight.reshape(-1, 3, 3)
    own = network[0].weight.reshape(-1, 3, 3)
    assert (changed[4] == 0.5).all()
    assert [torch.equal(a, b) for a, b in zip(changed, own, strict=True)] == [i != 4 for i in range(6)]


def test_kernels_that_float32_cannot_hold_are_refused_by_layer():
    network = nn.Sequential(nn.Conv2d(1, 1, 3)).double()
    network[0].weight.data[0, 0, 0, 0] = 1e300
    with pytest.raises(InvalidValueError, match=r"layer 0 has weights up to 1e\+300"):
        kernels.extract(network)


@pytest.mark.parametrize("value", [1e9, np.nan, -np.inf])
def test_kernels_that_half_precision_cannot_hold_are_not_inserted(value):
    network = nn.Sequential(nn.Conv2d(1, 1, 3)).half()
    bank = kernels.extract(network)
    with pytest.raises(InvalidValueError, match=r"layer 0 .* finite in torch\.float16, up to 65504"):
        kernels.insert(network, replace(bank, kernels=np.full_like(bank.kernels, value)))


def test_a_model_is_taken_and_comes_back_as_a_model():
    model = models.plain("mine", nn.Sequential(nn.Conv2d(3, 2, 3)))
    bank = kernels.extract(model)
    changed = kernels.insert(model, replace(bank, kernels=np.ones_like(bank.kernels)))
    assert (type(changed), changed.name) == (models.Model, "mine")
    assert (changed.network[0].weight == 1).all()
    assert list(_bank.matched(model, bank.layers).values()) == [model.network[0]]


def compressed():
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    return compression.compress(network, clustering.cluster(kernels.extract(network), 4, progress=False))


def quantized():
    return nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3, 3, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.w)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = {"a": [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)]}


def conv(kind=nn.Conv2d, **options):
    return nn.Sequential(kind(3, 8, 3, **options))


@pytest.mark.filterwarnings("ignore:.*(jit|quantiz|TypedStorage)", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (compressed, "0: compressed already; use compression.expand first"),
        (lambda: conv(nn.Conv1d), "0: Conv1d: its kernels are not 2D"),
        (lambda: conv(nn.Conv3d), "0: Conv3d: its kernels are not 2D"),
        (lambda: torch.jit.trace(conv(), torch.rand(1, 3, 8, 8)), "0: traced or scripted"),
        (lambda: torch.jit.script(conv()), "0: traced or scripted"),
        (lambda: torch.jit.freeze(torch.jit.script(conv().eval())), "it is traced"),
        (quantized, "0: Conv2d: quantized already"),
        (lambda: conv(DeformConv2d), "0: DeformConv2d: no torch.nn.Conv2d"),
        (lambda: conv(dtype=torch.complex64), "0: its weights are torch.complex64"),
        (lambda: nn.Sequential(*(nn.Conv1d(3, 3, 3) for _ in range(40))), "0, 1 and 38 more: Conv1d"),
        (Functional, "parameters of four axes: w"),
        (Hidden, "2 Conv2d lie in lists"),
        (lambda: nn.LSTM(3, 4), r"it has no convolution\)"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "no convolution, but 2 linear layers"),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))), "computed .SpectralNorm"),
        (lambda: nn.Sequential(prune.identity(nn.Conv2d(3, 4, 3), "weight")), "0: pruned.*prune.remove"),
    ],
)
def test_no_kernels_says_which_convolutions_there_are_and_why_not(make, says):
    with pytest.raises(InvalidValueError, match=says) as found:
        kernels.extract(make())
    assert len(str(found.value)) < 500
    assert "size=1" not in str(found.value)


@pytest.mark.parametrize("size", [True, "3x3", (3,), 3.0, np.zeros(2)])
def test_size_of_another_kind_is_refused(size):
    with pytest.raises(InvalidValueError, match=r"8 of 1×1, 6 of 3×3"):
        kernels.extract(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(2, 3, 3)), size=size)


@pytest.mark.parametrize("make", [torch.from_numpy, lambda x: x.astype(float), lambda x: x.tolist()])
def test_bank_with_kernels_of_another_kind_is_inserted(make):
    network = nn.Sequential(nn.Conv2d(2, 3, 3))
    bank = kernels.extract(network)
    changed = kernels.insert(network, replace(bank, kernels=make(bank.kernels + 1)))
    np.testing.assert_array_equal(kernels.extract(changed).kernels, bank.kernels + 1)
    with pytest.raises(InvalidValueError, match=r"kernels have shape \(9,\); layer 0 has \(3, 3\)"):
        kernels.insert(network, replace(bank, kernels=bank.points))
