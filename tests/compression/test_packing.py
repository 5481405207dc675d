import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kclib.compression._packing import MAX_BITS, _unpack_anywhere, index_bits, index_bytes, pack, unpack
from kclib.errors import InvalidValueError

WIDTHS = st.integers(0, MAX_BITS)


def drawn(n, bits, seed=0):
    """Return n indices of `bits` bits, the largest among them."""
    indices = np.random.default_rng(seed).integers(0, 1 << bits, n)
    indices[n // 2 : n // 2 + 1] = (1 << bits) - 1
    return indices


def as_one_number(indices, bits):
    """Return the bytes of the number whose digits the indices are, the first the lowest."""
    number = sum(int(index) << (bits * place) for place, index in enumerate(indices))
    return number.to_bytes(-(-len(indices) * bits // 8), "little")


@pytest.mark.parametrize(
    ("indices", "bits", "packed"),
    [
        ([1, 2, 3], 3, [1 + (2 << 3) + (3 & 3) * 64, 3 >> 2]),
        ([0xABC, 0x123], 12, [0xBC, 0x3A, 0x12]),
        ([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, [0b10000001, 1]),
        ([0xFEDCBA, 0x123456], 24, [0xBA, 0xDC, 0xFE, 0x56, 0x34, 0x12]),
        ([0, 0, 0], 0, []),
    ],
)
def test_lowest_bits_come_first(indices, bits, packed):
    assert pack(np.array(indices), bits).tolist() == packed
    assert unpack(torch.tensor(packed, dtype=torch.uint8), bits, 0, len(indices)).tolist() == indices


@given(WIDTHS, st.integers(0, 70), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_packed_is_one_number_of_the_indices_and_unpacked_they_are_back(bits, n, seed):
    indices = drawn(n, bits, seed)
    packed = pack(indices, bits)
    assert (packed.dtype, packed.tobytes()) == (np.uint8, as_one_number(indices, bits))
    back = unpack(torch.from_numpy(packed), bits, 0, n)
    assert (back.dtype, back.tolist()) == (torch.int32, indices.tolist())


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
@pytest.mark.parametrize("n", [65536, 2 * 65536 + 3])
def test_long_sequences_have_no_seam(bits, n):
    indices = drawn(n, bits, seed=bits)
    packed = pack(indices, bits)
    assert packed.nbytes == index_bytes(n, bits)
    np.testing.assert_array_equal(unpack(torch.from_numpy(packed), bits, 0, n), indices)
    around = unpack(torch.from_numpy(packed), bits, 65533, 3)
    np.testing.assert_array_equal(around, indices[65533:65536])


@given(WIDTHS, st.integers(0, 40), st.integers(0, 60), st.integers(0, 60), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_any_window_is_read_and_beyond_the_end_there_is_nothing(bits, n, start, count, seed):
    indices = drawn(n, bits, seed)
    expected = np.concatenate([indices, np.zeros(200, int)])[start : start + count]
    packed = torch.from_numpy(pack(indices, bits))
    for read in (unpack, _unpack_anywhere):
        window = read(packed, bits, start, count)
        assert (window.dtype, window.tolist()) == (torch.int32, expected.tolist())


@given(st.binary(max_size=40), WIDTHS, st.integers(0, 200), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_operator_of_the_processor_reads_any_bytes_as_the_generic_one_does(content, bits, start, count):
    longer = torch.tensor([*content, *[255] * 8], dtype=torch.uint8)
    packed = longer[: len(content)]  # what comes after is not its own
    assert torch.equal(unpack(packed, bits, start, count), _unpack_anywhere(packed, bits, start, count))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, ">i4"])
def test_whole_numbers_of_every_type_are_packed_and_stay_as_they_are(dtype):
    indices = np.arange(100).astype(dtype)[::2]
    kept = indices.copy()
    assert pack(indices, 7).tobytes() == as_one_number(np.arange(0, 100, 2), 7)
    np.testing.assert_array_equal(indices, kept)


def test_packed_bytes_need_not_be_contiguous():
    packed = torch.from_numpy(pack(np.arange(40), 6))
    doubled = torch.stack([packed, packed + 1], dim=1)[:, 0]
    assert not doubled.is_contiguous()
    assert unpack(doubled, 6, 3, 30).tolist() == list(range(3, 33))


@pytest.mark.parametrize(
    ("n_clusters", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (1 << 24, 24)]
)
def test_bits_are_the_fewest_that_tell_all_entries_apart(n_clusters, bits):
    assert index_bits(n_clusters) == bits


@pytest.mark.parametrize(
    ("n", "bits", "n_bytes"), [(0, 7, 0), (9, 0, 0), (8, 3, 3), (3, 3, 2), (1, 24, 3), (1000, 10, 1250)]
)
def test_bytes_are_those_of_the_bits_rounded_up(n, bits, n_bytes):
    assert index_bytes(n, bits) == n_bytes == len(pack(np.zeros(n, int), bits))


@pytest.mark.parametrize(
    ("indices", "bits", "sentence"),
    [
        ([0, 8, 1], 3, "indices run from 0 to 8; in 3 bits they must be 0 to 7"),
        ([1], 0, "indices run from 1 to 1; in 0 bits they must be 0 to 0"),
        ([3, -1], 8, "indices run from -1 to 3"),
        ([1 << 24], 24, "in 24 bits they must be 0 to 16777215"),
        ([1], 25, "bits of an index is 25;"),
        ([0], -1, "bits of an index is -1"),
        ([[0, 1]], 1, r"indices are int64 \(1, 2\);"),
        ([0.0, 1.0], 1, r"indices are float64 \(2,\)"),
        ([True, False], 1, "indices are bool"),
    ],
)
def test_what_cannot_be_packed_is_refused(indices, bits, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        pack(np.array(indices), bits)


@pytest.mark.parametrize("read", [unpack, _unpack_anywhere])
@pytest.mark.parametrize("bits", [-1, 25])
def test_widths_that_cannot_be_packed_are_not_read_either(read, bits):
    with pytest.raises(InvalidValueError, match=f"bits of an index is {bits}"):
        read(torch.zeros(8, dtype=torch.uint8), bits, 0, 1)


@pytest.mark.parametrize(("bits", "start", "count"), [(0, 0, 5), (3, 0, 20), (11, 4, 7), (24, 2, 0)])
def test_operator_is_one_that_torch_can_trace(bits, start, count):
    packed = torch.from_numpy(pack(drawn(20, bits), bits))
    torch.library.opcheck(unpack, (packed, bits, start, count))


def test_operator_takes_its_shape_where_there_are_no_values():
    window = unpack(torch.empty(30, dtype=torch.uint8, device="meta"), 5, 3, 7)
    assert (window.shape, window.dtype, window.device.type) == ((7,), torch.int32, "meta")


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (-1, 3), (-9, 12), (0, -1)])
def test_windows_before_the_beginning_are_refused(start, count):
    packed = torch.from_numpy(pack(np.arange(16), 4))
    for read in (unpack, _unpack_anywhere):
        with pytest.raises(InvalidValueError):
            read(packed, 4, start, count)
