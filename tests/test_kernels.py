from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations, prune

from kclib import kernels
from kclib.errors import InvalidValueError

DTYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


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
@settings(deadline=None, max_examples=40)
def test_extract_then_insert_is_the_identity_to_the_bit(network):
    assert bits(kernels.insert(network, kernels.extract(network))) == bits(network)


@given(networks(), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_inserted_kernels_are_extracted_again_and_nothing_else_changes(network, seed):
    bank, before = kernels.extract(network), bits(network)
    other = np.random.default_rng(seed).integers(-8, 9, bank.weights.shape).astype(np.float32)
    changed = kernels.insert(network, replace(bank, weights=other))
    np.testing.assert_array_equal(kernels.extract(changed).weights, other)
    assert bits(network) == before
    owners = dict(network.named_modules(remove_duplicate=False))
    mine = {id(owners[layer.name].weight) for layer in bank.layers}
    rest = {n for n, p in network.state_dict(keep_vars=True).items() if id(p) not in mine}
    assert {n: bits(changed)[n] for n in rest} == {n: before[n] for n in rest}


def test_bank_keeps_its_values_when_the_network_trains_on():
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    bank = kernels.extract(network)
    nn.init.zeros_(network[0].weight)
    assert bank.weights.all()


def test_rows_are_the_slices_of_each_weight_in_module_order():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3))
    bank = kernels.extract(network)
    assert [(x.name, x.start, x.transposed) for x in bank.layers] == [("0", 0, False), ("2", 6, True)]
    np.testing.assert_array_equal(bank.weights[3], network[0].weight[1, 1].detach())
    np.testing.assert_array_equal(bank.weights[6 + 5], network[2].weight[2, 1].detach())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(2, 2, 1), "1×1 kernels, not 3×3"),
        (nn.Conv2d(2, 2, (5, 1)), "5×1 kernels, not 3×3"),
        (nn.Conv1d(2, 2, 3), "Conv1d: its kernels are not 2D"),
        (nn.ConvTranspose3d(2, 2, 3), "ConvTranspose3d: its kernels are not 2D"),
        (nn.Conv2d(2, 2, 3, dtype=torch.float64), "float64 weights are not exact in float32"),
        (parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "parametrized"),
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


def test_only_is_the_bank_of_one_layer_with_rows_from_zero():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)))
    alone = bank.only("1")
    np.testing.assert_array_equal(alone.weights, bank.weights[6:])
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
    np.testing.assert_array_equal(some.weights, np.concatenate([bank.weights[:2], bank.weights[12:]]))
    assert some.origin([2, 9])["layer"].tolist() == ["3", "3"]
    assert [layer.start for layer in bank.layers] == [0, 2, 6, 12]
    for part in (some, bank.only("1")):
        assert part.left_out == {}
        with pytest.raises(ValueError, match="read-only"):
            part.weights[0] = 0


def test_only_of_all_layers_is_the_bank_and_of_none_is_refused():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(1, 1, 1)))
    whole = bank.only("1", "0")
    assert (whole.layers, whole.left_out) == (bank.layers, bank.left_out)
    np.testing.assert_array_equal(whole.weights, bank.weights)
    with pytest.raises(InvalidValueError, match="no layer is named; name at least one"):
        bank.only()
    with pytest.raises(InvalidValueError, match=r"no layer 'x' .* it has 0, 1"):
        bank.only("0", "x")


def test_only_leaves_weights_that_may_be_written_so():
    bank = kernels.extract(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)))
    bank = replace(bank, weights=bank.weights.copy())
    bank.only("0")
    assert bank.weights.flags.writeable


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
        (lambda: nn.Linear(2, 2), None, r"no 2D kernels larger than 1×1 \(found: none\)"),
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
        (nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 2, 3))), "layer 0"),
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
    changed = kernels.insert(network, replace(bank, weights=np.ones_like(bank.weights)))
    assert (changed[0].weight == 1).all()
    assert torch.equal(changed[1].weight, network[1].weight)
