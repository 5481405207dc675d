import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kclib import clustering, compression, kernels
from kclib.compression import _precisions
from kclib.compression._layers import ClusteredConv2d
from kclib.compression._precisions import PRECISIONS, codebook_bytes, pack, restore, store, unpack
from kclib.errors import DamagedFileError, InvalidValueError, UnknownNameError
from kclib.kernels import _copying

EACH = pytest.mark.parametrize("precision", PRECISIONS)


def codebook(n_clusters=20, area=9, lowest=-2, highest=2, seed=0):
    """Return representatives of magnitudes from 10**lowest to 10**highest, one of zeros among them."""
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.uniform(lowest, highest, n_clusters)
    values = draw.uniform(-1, 1, (n_clusters, area)) * sizes[:, None]
    values[n_clusters // 2] = 0
    return torch.from_numpy(values.astype(np.float32)).reshape(n_clusters, -1, 1)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))


@EACH
@given(st.integers(1, 30), st.sampled_from([1, 4, 9, 25]), st.integers(0, 9999))
@settings(deadline=None, max_examples=25)
def test_what_is_restored_is_stored_again_to_the_bit(precision, n_clusters, area, seed):
    span = (-9, 4) if precision == "fp16" else (-30, 30)
    stored = store(codebook(n_clusters, area, *span, seed), precision)
    assert_same_bits(store(restore(stored), precision), stored)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("exponent", [-149, -140, -133, -126, -24, -20, -14])
def test_smallest_magnitudes_are_stored_again_to_the_bit(precision, exponent):
    stored = store(torch.arange(-9.0, 9).reshape(2, 3, 3) * 2.0**exponent, precision)
    assert_same_bits(store(restore(stored), precision), stored)


def test_smallest_magnitudes_are_stored_as_int8_again_to_the_bit():
    values = (
        np.random.default_rng(0).uniform(-1, 1, (5000, 3, 3))
        * 2.0 ** np.arange(-130, -110).repeat(250)[:, None, None]
    )
    stored = store(torch.from_numpy(values.astype(np.float32)), "int8")
    assert_same_bits(store(restore(stored), "int8"), stored)


@given(st.integers(1, 30), st.sampled_from([1, 4, 9, 25]), st.integers(0, 9999))
@settings(deadline=None, max_examples=25)
def test_int8_is_off_by_half_a_step_and_a_step_is_a_127th_of_the_largest_weight(n_clusters, area, seed):
    values = codebook(n_clusters, area, -30, 30, seed)
    stored = store(values, "int8")
    steps = stored["steps"].double()
    largest = values.flatten(1).abs().amax(1).double()
    np.testing.assert_allclose(steps, largest / 127, rtol=2**-8)
    off = (restore(stored).double() - values.double()).abs().flatten(1).amax(1)
    assert (off <= (0.5 + 1e-4) * steps).all()
    whole = stored["values"].flatten(1).to(torch.int32).abs().amax(1)
    assert (whole == torch.where(largest > 0, 127, 0)).all()


@pytest.mark.parametrize("exponent", range(-132, -115, 2))
def test_int8_of_the_smallest_magnitudes_is_off_by_half_a_step_or_nothing_is_left(exponent):
    values = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (500, 3, 3)).astype("f"))
    values = values * 2.0**exponent
    stored = store(values, "int8")
    steps, largest = stored["steps"].double(), values.double().abs().flatten(1).amax(1)
    none = largest / 127 < 2.0**-126 * (1 - 2.0**-9)  # steps would be subnormal
    assert (none | (steps > 0)).all()
    off = (restore(stored).double() - values.double()).abs().flatten(1).amax(1)
    assert (off <= torch.where(steps > 0, (0.5 + 1e-4) * steps, 127 * 2.0**-126)).all()


def test_int8_by_hand():
    values = torch.tensor([[[127.0, -63.5, 0.4]], [[0.0, 0.0, 0.0]], [[-254.0, 2.9, 3.1]]])
    stored = store(values, "int8")
    assert stored["steps"].tolist() == [1, 0, 2]
    assert stored["values"].tolist() == [[[127, -64, 0]], [[0, 0, 0]], [[-127, 1, 2]]]
    assert restore(stored).tolist() == [[[127, -64, 0]], [[0, 0, 0]], [[-254, 2, 4]]]


@pytest.mark.parametrize(("precision", "unit"), [("fp32", 2**-24), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_floats_are_rounded_to_their_precision_and_no_further(precision, unit):
    values = codebook(200)
    back = restore(store(values, precision))
    off = (back.double() - values.double()).abs()
    assert (off <= unit * values.double().abs()).all()
    assert back.dtype == _precisions.float_type(precision)
    assert (off.sum() == 0) == (precision == "fp32")


@EACH
def test_stored_bytes_are_those_predicted(precision):
    for n in (20, 21):
        stored = pack(store(codebook(n, 25), precision), precision)
        assert sum(value.nbytes for value in stored.values()) == codebook_bytes(n, 25, precision)


@pytest.mark.parametrize(
    ("precision", "n_bytes"), [("fp32", 36), ("fp16", 18), ("bf16", 18), ("int8", 11), ("int4", 7)]
)
def test_bytes_of_3x3_representatives(precision, n_bytes):
    assert codebook_bytes(1, 9, precision) == n_bytes
    half = precision == "int4"  # a byte is shared by two representatives of odd area
    assert codebook_bytes(101, 9, precision) == 101 * n_bytes - 50 * half


@EACH
def test_stored_values_have_the_codebooks_shape_and_lie_in_one_piece(precision):
    values = codebook(20, 9).reshape(20, 3, 3).transpose(1, 2).requires_grad_()
    stored = store(values, precision)
    assert not values.is_contiguous()
    assert all(value.is_contiguous() and not value.requires_grad for value in stored.values())
    assert stored["values"].shape == restore(stored).shape == (20, 3, 3)
    assert set(stored) == ({"values", "steps"} if precision in ("int8", "int4") else {"values"})
    largest = values.detach().abs().amax()
    np.testing.assert_allclose(
        restore(stored).float(), values.detach(), atol=float(largest) / (13 if precision == "int4" else 100)
    )


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(precision, value):
    values = codebook()
    values[3, 2] = value
    with pytest.raises(InvalidValueError, match=f"no finite {precision}"):
        store(values, precision)


@pytest.mark.parametrize(("precision", "value"), [("fp16", 65520.0), ("fp16", -1e30), ("bf16", 3.4e38)])
def test_values_beyond_the_precision_are_refused(precision, value):
    values = torch.full((2, 1, 1), value)
    assert values.isfinite().all()
    with pytest.raises(InvalidValueError, match=f"{precision}; use fp32 or bf16"):
        store(values, precision)


def test_largest_values_of_each_precision_are_kept():
    for precision, value in (("fp16", 65504.0), ("fp32", 3.4e38), ("bf16", 3.3e38), ("int8", 3.4e38)):
        back = restore(store(torch.full((2, 1, 1), value), precision))
        np.testing.assert_allclose(back.double(), value, rtol=2**-8)


def test_unknown_precision_is_refused_with_the_nearest_known_one():
    for use in (lambda: store(codebook(), "int3"), lambda: _precisions.float_type("int3")):
        with pytest.raises(UnknownNameError, match=r"'int3'.*'int8'\?"):
            use()


def test_scales_beside_a_codebook_have_its_type_and_fp16_beside_whole_numbers():
    assert [_precisions.scale_type(precision) for precision in PRECISIONS] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float16,
        torch.float16,
    ]


def test_own_precision_is_that_of_the_weights():
    for precision in ("fp32", "fp16", "bf16"):
        assert _precisions.of_dtype(_precisions.float_type(precision)) == precision


# ---- int4


def test_int4_by_hand():
    values = torch.tensor([[[7.0, -3.5, 0.4]], [[0.0, 0.0, 0.0]], [[-14.0, 2.9, 3.1]]])
    stored = store(values, "int4")
    assert stored["steps"].tolist() == [1, 0, 2]
    assert stored["values"].tolist() == [[[7, -4, 0]], [[0, 0, 0]], [[-7, 1, 2]]]
    packed = pack(stored, "int4")
    assert [f"{byte:02x}" for byte in packed["values"].tolist()] == ["c7", "00", "00", "19", "02"]
    assert_same_bits(unpack(packed, "int4", (3, 1, 3)), stored)


@given(st.integers(1, 30), st.sampled_from([1, 4, 9, 25]), st.integers(0, 9999))
@settings(deadline=None, max_examples=30)
def test_int4_is_off_by_half_a_step_and_comes_out_of_its_bytes(n_clusters, area, seed):
    values = codebook(n_clusters, area, -30, 30, seed)
    stored = store(values, "int4")
    largest = values.flatten(1).abs().amax(1).double()
    np.testing.assert_allclose(stored["steps"].double(), largest / 7, rtol=2**-8)
    off = (restore(stored).double() - values.double()).abs().flatten(1).amax(1)
    assert (off <= (0.5 + 2**-6) * stored["steps"].double()).all()
    assert_same_bits(unpack(pack(stored, "int4"), "int4", values.shape), stored)


@pytest.mark.parametrize(
    "values", [torch.zeros(5, dtype=torch.uint8), torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)]
)
def test_int4_values_that_are_not_of_the_shape_are_damage(values):
    with pytest.raises(DamagedFileError, match=r"int4.*\(2, 4\).* 4 bytes"):
        unpack({"values": values}, "int4", (2, 4))


# ---- Linear layers and biases


def network():
    """Return a network of every kind that is rounded and some that are not, two of one weight."""
    torch.manual_seed(0)
    head = nn.Linear(4, 4)
    result = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, nn.LayerNorm(4), nn.Linear(4, 4, bias=False),
    )  # fmt: skip
    result[-1].weight = head.weight
    found = clustering.cluster(kernels.extract(result), 3, scaled=True, n_threads=1, progress=False)
    return compression.compress(result, found, precision="fp16")


def test_linear_layers_and_biases_are_rounded_and_nothing_else():
    before = network()
    original = copy.deepcopy(before.state_dict())
    after = _precisions.quantize(before, linear="int4", biases="bf16")
    wanted = {"6.weight": "int4", "8.weight": "int4"} | dict.fromkeys(
        ("0.bias", "2.bias", "3.bias", "6.bias"), "bf16"
    )
    for name, value in after.state_dict().items():
        old = original[name]
        expected = _precisions.rounded(old, wanted[name]) if name in wanted else old
        assert torch.equal(value, expected)
        assert torch.equal(value, old) == (name not in wanted)
        assert torch.equal(before.state_dict()[name], old)
    assert after[6].weight is after[8].weight
    noted = {
        f"{owner}.{name}": precision
        for owner, module in after.named_modules()
        for name, precision in getattr(module, "stored_as", {}).items()
    }
    assert noted == wanted
    assert not _precisions.precisions(before)


def test_what_is_noted_is_kept_by_copies_and_added_to():
    first = _precisions.quantize(network(), linear=None)
    assert _precisions.precisions(first)
    again = _precisions.quantize(_copying.copied(first), linear="int8", biases=None)
    assert again[6].stored_as == {"weight": "int8", "bias": "fp16"}
    assert first[6].stored_as == {"bias": "fp16"}
    assert isinstance(again[0], ClusteredConv2d)
    assert again[0].stored_as == {"bias": "fp16"}
    assert set(_precisions.precisions(again)) == {
        id(x) for x in (again[0].bias, again[2].bias, again[3].bias, again[6].bias, again[6].weight)
    }


def test_unknown_precisions_and_other_types_are_refused():
    with pytest.raises(UnknownNameError, match="unknown precision of linear layers 'int5'"):
        _precisions.quantize(network(), linear="int5")
    with pytest.raises(UnknownNameError, match="biases 'int8'"):
        _precisions.quantize(network(), biases="int8")
    with pytest.raises(InvalidValueError, match=r"0\.weight.*float16.*\.float\(\)"):
        _precisions.quantize(nn.Sequential(nn.Linear(2, 2)).half())
    large = nn.Linear(1, 1)
    nn.init.constant_(large.bias, 1e6)
    with pytest.raises(InvalidValueError, match="no finite fp16"):
        _precisions.quantize(large)


# ---- Linear weights, entropy-coded

ROWS = torch.tensor([[0.0, 0, 0, 0], [-3, -3, -3, -3], [7, -7, 3.4, -3.6], [1e-3, 0, -1e-3, 0]])


def test_rows_of_linear_weights_are_rounded_as_by_hand():
    network = _precisions.quantize(layer_of(ROWS), linear="int4")
    whole = [[0, 0, 0, 0], [-7, -7, -7, -7], [7, -7, 3, -4], [7, 0, -7, 0]]
    steps = torch.tensor([0, 3 / 7, 1, 1e-3 / 7]).bfloat16()
    stored = store(ROWS, "int4")
    assert stored["values"].tolist() == whole
    assert torch.equal(stored["steps"], steps)
    assert torch.equal(network.weight, torch.tensor(whole) * steps.float()[:, None])
    stored = store(ROWS, "int8")
    assert stored["values"].tolist() == [[0] * 4, [-127] * 4, [127, -127, 62, -65], [127, 0, -127, 0]]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(300, 40), torch.full((300, 40), -2.5), torch.eye(200), ROWS, torch.ones(1, 1),
        torch.randn(64, 500, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["zeros", "one value", "eye", "rows", "one", "normal"],
)  # fmt: skip
def test_coded_weights_come_back_to_the_bit_and_take_no_more_than_packed_ones(precision, values):
    stored = store(values, precision)
    packed, found = pack(stored, precision), _precisions.coded(stored, precision)
    taken = [sum(x.nbytes for x in parts.values()) for parts in (found, packed)]
    assert taken[0] <= taken[1]
    assert ("frequencies" in found) == (taken[0] < taken[1]) == (values.numel() > 16)
    assert_same_bits(unpack(found, precision, tuple(values.shape)), stored)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["int8", "int4"]), st.floats(0.05, 3))
@settings(deadline=None, max_examples=25)
def test_coded_weights_take_about_their_entropy(n_out, n_in, precision, skew):
    draw = np.random.default_rng(0)
    values = draw.normal(size=(n_out, n_in)) * (draw.random((n_out, n_in)) < skew)
    stored = store(torch.from_numpy(values.astype("f")), precision)
    found = _precisions.coded(stored, precision)
    assert_same_bits(unpack(found, precision, (n_out, n_in)), stored)
    if "frequencies" in found:
        counts = np.unique(stored["values"].numpy(), return_counts=True)[1]
        bound = -(counts * np.log2(counts / counts.sum())).sum() / 8
        assert bound <= found["values"].numel() <= 1.01 * bound + 8


def test_coded_weights_that_are_damaged_are_refused():
    stored = _precisions.coded(store(torch.eye(100), "int8"), "int8")
    with pytest.raises(DamagedFileError, match="table of 10000"):
        unpack(stored, "int8", (100, 101))
    with pytest.raises(DamagedFileError, match="fp16 weights"):
        unpack(stored, "fp16", (100, 100))
    for part in ("values", "frequencies"):
        with pytest.raises(DamagedFileError, match="damaged"):
            unpack(stored | {part: stored[part][:-4]}, "int8", (100, 100))


def test_compressing_rounds_linear_weights_alone_where_asked():
    dense = network_of_two_kinds()
    found = clustering.cluster(kernels.extract(dense), 3, n_threads=1, progress=False)
    plain = compression.compress(dense, found)
    assert torch.equal(plain[3].weight, dense[3].weight)
    assert not _precisions.precisions(plain)
    small = compression.compress(dense, found, linear="int8")
    assert torch.equal(small[3].weight, _precisions.rounded(dense[3].weight, "int8"))
    assert torch.equal(small[3].bias, dense[3].bias)
    assert _precisions.precisions(small) == {id(small[3].weight): "int8"}
    assert not _precisions.precisions(dense)


def test_compressing_refuses_linear_weights_that_cannot_be_rounded():
    dense = network_of_two_kinds()
    found = clustering.cluster(kernels.extract(dense), 3, n_threads=1, progress=False)
    with pytest.raises(UnknownNameError, match="unknown precision of linear layers 'int5'"):
        compression.compress(dense, found, linear="int5")
    half = network_of_two_kinds().half()
    found = clustering.cluster(kernels.extract(half), 3, n_threads=1, progress=False)
    with pytest.raises(InvalidValueError, match=r"3\.weight is torch\.float16; call \.float\(\)"):
        compression.compress(half, found, linear="int8")
    with pytest.raises(InvalidValueError, match="weight has no shape yet"):
        _precisions.quantize(nn.Sequential(nn.LazyLinear(3)), linear="int8")
    nn.init.constant_(dense[3].weight, torch.nan)
    with pytest.raises(InvalidValueError, match="no finite int8"):
        _precisions.quantize(dense, linear="int8")


def layer_of(weights):
    result = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    with torch.no_grad():
        result.weight.copy_(weights)
    return result


def network_of_two_kinds():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
