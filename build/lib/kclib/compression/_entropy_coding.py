"""Entropy-coded indices: their frequencies, the bound that entropy sets, and an ANS coder that meets it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import constriction
import numpy as np

from kclib.compression._packing import index_bits, index_bytes
from kclib.errors import DamagedFileError, reason
from kclib.kmeans import _entropy


@dataclass(frozen=True)
class Coded:
    """The indices of the layers of one group, entropy-coded.

    Attributes
    ----------
    words : tuple of numpy.ndarray
        uint32: each layer's compressed words.
    tables : tuple of numpy.ndarray
        uint8: each layer's own frequencies (`packed_counts`), empty where it is coded with the group's.
    table : numpy.ndarray
        uint8: the group's frequencies; empty if no layer is coded with them.
    """

    words: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    table: np.ndarray

    @property
    def index_bytes(self) -> int:
        """Bytes of the words."""
        return sum(words.nbytes for words in self.words)

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tables) + self.table.nbytes


def coded(parts: Sequence[np.ndarray], n_symbols: int) -> Coded:
    """Code the indices of a group's layers, each with its own frequencies where their table pays.

    A codebook that many layers share is used unevenly: with few representatives a table for each layer costs
    less than it saves, with many it is the group's table that costs next to nothing.

    Parameters
    ----------
    parts : sequence of numpy.ndarray
        Whole numbers ``(n,)``, a layer each.
    n_symbols : int
        Entries of the codebook. Ordered by use, their table is smallest.
    """
    each = [_entropy.counts(part, n_symbols) for part in parts]
    whole = np.sum(each, axis=0)
    words, tables = [], []
    for part, own in zip(parts, each, strict=True):
        choices = ((encode(part, whole), np.empty(0, np.uint8)), (encode(part, own), packed_counts(own)))
        chosen, table = min(choices, key=lambda pair: pair[0].nbytes + pair[1].nbytes)
        words.append(chosen)
        tables.append(table)
    shared = all(table.size for table in tables)
    return Coded(tuple(words), tuple(tables), np.empty(0, np.uint8) if shared else packed_counts(whole))


def smaller(parts: Sequence[np.ndarray], n_symbols: int) -> Coded | None:
    """Return the coded indices of a group's layers; None where fixed width takes no more bytes."""
    result, bits = coded(parts, n_symbols), index_bits(n_symbols)
    fixed = sum(index_bytes(len(part), bits) for part in parts)
    return result if result.index_bytes + result.table_bytes < fixed else None


def encode(indices: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return indices as the words of an asymmetric-numeral-systems coder, uint32.

    Parameters
    ----------
    indices : numpy.ndarray
        Whole numbers ``(n,)``.
    frequencies : numpy.ndarray
        int64 ``(n_symbols,)``: how often each symbol occurs (here, or in a larger sequence that this is part
        of). Nothing is coded where only one does.
    """
    if np.count_nonzero(frequencies) < 2:
        return np.empty(0, np.uint32)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(np.ascontiguousarray(indices, np.int32), _model(frequencies))
    return coder.get_compressed()


def decode(words: np.ndarray, frequencies: np.ndarray, n: int) -> np.ndarray:
    """Return the n indices that `encode` was given, int32 ``(n,)``.

    Raises
    ------
    DamagedFileError
        If the words are none that `encode` made.
    """
    if np.count_nonzero(frequencies) < 2:
        if len(words):
            raise DamagedFileError("the entropy-coded indices are damaged: one symbol needs no words.")
        return np.full(n, np.argmax(frequencies), np.int32)
    try:
        coder = constriction.stream.stack.AnsCoder(np.ascontiguousarray(words, np.uint32))
        indices = coder.decode(_model(frequencies), n)
    except ValueError as error:
        raise DamagedFileError(f"the entropy-coded indices are damaged ({reason(error)}).") from error
    if not coder.is_empty():
        raise DamagedFileError("the entropy-coded indices are damaged: some are left over.")
    return indices


def packed_counts(frequencies: np.ndarray) -> np.ndarray:
    """Return counts in few bytes, uint8 ``(m,)``: deflated, the bytes of equal weight together.

    Where symbols are ordered by frequency, runs of equal counts all but vanish.
    """
    planes = frequencies.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return np.frombuffer(zlib.compress(planes.tobytes(), 9), np.uint8)


def unpacked_counts(table: np.ndarray, n_symbols: int) -> np.ndarray:
    """Return the int64 ``(n_symbols,)`` counts of a table."""
    reader = zlib.decompressobj()
    try:
        planes = reader.decompress(table.tobytes(), 4 * n_symbols + 1)
    except zlib.error as error:
        raise DamagedFileError(f"a table of frequencies is damaged ({reason(error)}).") from error
    if len(planes) != 4 * n_symbols or not reader.eof:
        raise DamagedFileError(f"a table of frequencies is damaged: it is not that of {n_symbols} symbols.")
    rows = np.frombuffer(planes, np.uint8).reshape(4, n_symbols).T
    return np.ascontiguousarray(rows).view("<u4").ravel().astype(np.int64)


def _model(frequencies: np.ndarray):
    shares = frequencies / frequencies.sum()
    return constriction.stream.model.Categorical(shares, perfect=False)
