"""Indices of any width packed without gaps, and back: in numpy, and as a torch operator for any device."""

import numpy as np
import torch
from torch import Tensor

from kclib._util import checks
from kclib._util.compiled import njit
from kclib.errors import InvalidValueError

MAX_BITS = 24


def index_bits(n_clusters: int) -> int:
    """Return the bits of a fixed-width index into K entries, ceil(log2 K); 0 for a single entry."""
    return (int(n_clusters) - 1).bit_length()


def index_bytes(n: int, bits: int) -> int:
    """Return the bytes of n packed indices, rounded up to a whole byte."""
    return -(-n * bits // 8)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Pack indices into `bits` bits each, the lowest bit first.

    Parameters
    ----------
    indices : numpy.ndarray
        Whole numbers ``(n,)`` from 0 to 2**bits - 1.
    bits : int
        0 to 24.

    Returns
    -------
    numpy.ndarray
        uint8 ``(ceil(n * bits / 8),)``.
    """
    indices = np.ascontiguousarray(indices)
    bits = _check_bits(bits)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise InvalidValueError(
            f"indices are {indices.dtype} {indices.shape}; they must be whole numbers (n,)."
        )
    if indices.size and not 0 <= indices.min() <= indices.max() < 1 << bits:
        raise InvalidValueError(
            f"indices run from {indices.min()} to {indices.max()}; "
            f"in {bits} bits they must be 0 to {(1 << bits) - 1}."
        )
    packed = np.zeros(index_bytes(len(indices), bits), np.uint8)
    step = 8 << 13  # whole bytes whatever the width
    for start in range(0, len(indices), step):
        part = indices[start : start + step].astype("<u4").view(np.uint8).reshape(-1, 4)
        lanes = np.unpackbits(part, axis=1, bitorder="little")[:, :bits]
        filled = np.packbits(lanes, bitorder="little")
        packed[start * bits // 8 : start * bits // 8 + len(filled)] = filled
    return packed


@torch.library.custom_op("kclib::unpack", mutates_args=(), device_types="cpu")
def unpack(packed: Tensor, bits: int, start: int, count: int) -> Tensor:
    """Return the indices `start` to `start + count` of a packed sequence.

    An operator of torch's own kind: it can be compiled and exported.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, from `pack`.
    bits : int
        0 to 24.
    start, count : int

    Returns
    -------
    torch.Tensor
        int32 ``(count,)``. What lies beyond the end of `packed` is 0.
    """
    _check_window(bits, start, count)
    result = np.empty(count, np.int32)
    _unpack(packed.contiguous().numpy(), bits, start, result)
    return torch.from_numpy(result)


@unpack.register_kernel(None)
def _unpack_anywhere(packed: Tensor, bits: int, start: int, count: int) -> Tensor:
    """Do as `unpack` with torch's own operators."""
    _check_window(bits, start, count)
    bit = (start + torch.arange(count, dtype=torch.int64, device=packed.device)) * bits
    padded = torch.nn.functional.pad(packed, (0, max(0, int((start + count) * bits // 8) + 4 - len(packed))))
    word = sum(padded[(bit >> 3) + byte].to(torch.int64) << (8 * byte) for byte in range(4))
    return ((word >> (bit & 7)) & ((1 << bits) - 1)).to(torch.int32)


@unpack.register_fake
def _unpack_shape(packed: Tensor, bits: int, start: int, count: int) -> Tensor:
    return packed.new_empty((count,), dtype=torch.int32)


@njit(nogil=True, cache=True)
def _unpack(packed, bits, start, result):
    """Read four bytes at each index; the last few, where there are no four, byte by byte."""
    mask, bits, start = np.uint32((1 << bits) - 1), np.uint64(bits), np.uint64(start)
    whole = len(result)
    while whole > 0 and ((start + np.uint64(whole - 1)) * bits >> np.uint64(3)) + np.uint64(4) > len(packed):
        whole -= 1
    for i in range(
        whole
    ):  # unsigned places: numba then has no negative ones to care for, and is 4 times as fast
        bit = (start + np.uint64(i)) * bits
        byte = bit >> np.uint64(3)
        word = (
            np.uint32(packed[byte])
            | np.uint32(packed[byte + np.uint64(1)]) << np.uint32(8)
            | np.uint32(packed[byte + np.uint64(2)]) << np.uint32(16)
            | np.uint32(packed[byte + np.uint64(3)]) << np.uint32(24)
        )
        result[i] = (word >> np.uint32(bit & np.uint64(7))) & mask
    for i in range(whole, len(result)):
        bit = (start + np.uint64(i)) * bits
        byte = bit >> np.uint64(3)
        word = np.uint32(0)
        for ahead in range(4):
            if byte + np.uint64(ahead) < len(packed):
                word |= np.uint32(packed[byte + np.uint64(ahead)]) << np.uint32(8 * ahead)
        result[i] = (word >> np.uint32(bit & np.uint64(7))) & mask


def _check_bits(bits: int) -> int:
    return checks.check_whole("bits of an index", bits, 0, MAX_BITS)


def _check_window(bits: int, start: int, count: int) -> None:
    _check_bits(bits)
    if start < 0 or count < 0:
        raise InvalidValueError(f"{count} indices from {start} on; neither may be negative.")
