"""Stored forms of a convolution's weights: the bytes that each takes, and the weights that it decodes to.

Bytes are those of one layer, its indices, values and mask each rounded up to whole bytes. Decoded weights are
float32 in the shape that goes in, output channels first, whatever the kind of convolution; a transposed one's
channels are those of one group.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kclib import kmeans
from kclib._util import threads
from kclib._util.checks import check_known, check_whole
from kclib._util.progress_bars import tqdm
from kclib.compression._packing import MAX_BITS, index_bits, index_bytes
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer
from kclib.kmeans import _entropy, _palettes

KINDS, PER, PRECISIONS = ("kmeans", "uniform"), ("tensor", "channel"), ("fp16", "int8")
_HALF = 2  # bytes of an fp16 number
_OVERFLOW = 65520  # from here on, fp16 rounds to infinity


class Form(Protocol):
    """A way to store a layer's weights."""

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the float32 weights ``(out, in, kh, kw)`` that stand for those given."""


@dataclass(frozen=True)
class Half:
    """Every weight in fp16."""

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""
        return size(layer) * _HALF

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the weights as fp16 stores them."""
        return half(weights)


@dataclass(frozen=True)
class Palette:
    """Indices into a table of 2**bits fp16 values, one for the tensor or for each output channel."""

    n_bits: int
    kind: str
    per: str

    def __post_init__(self):
        object.__setattr__(self, "n_bits", check_whole("bits", self.n_bits, 1, 8))
        check_known("kind of palette", self.kind, KINDS)
        check_known("granularity", self.per, PER)

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""
        tables = 1 if self.per == "tensor" else channels(layer)[0]
        return index_bytes(size(layer), self.n_bits) + tables * 2**self.n_bits * _HALF

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the nearest value of its table for each weight."""
        rows = weights.reshape(1 if self.per == "tensor" else len(weights), -1)

        def row(i: int) -> np.ndarray:
            table = half(self._table(rows[i]))
            return table[np.searchsorted((table[1:].astype(np.float64) + table[:-1]) / 2, rows[i])]

        return np.reshape(threads.side_by_side(row, len(rows), threads.threads()), weights.shape)

    def _table(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "kmeans":
            return _palettes.palette(half(values), 2**self.n_bits)  # at most 63,487 distinct ones
        return np.linspace(values.min(), values.max(), 2**self.n_bits, dtype=np.float64)


@dataclass(frozen=True)
class Product:
    """Indices into a codebook of fp16 sub-vectors; fp16 weights where the inputs cannot be divided."""

    n_clusters: int
    width: int
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "n_clusters", check_whole("n_clusters", self.n_clusters, 1, 1 << MAX_BITS))
        object.__setattr__(self, "width", check_whole("width", self.width, 1))

    def fits(self, layer: Layer) -> bool:
        """Tell whether a layer's inputs can be divided."""
        return channels(layer)[1] % self.width == 0

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""
        if not self.fits(layer):
            return Half().bytes(layer)
        n = size(layer) // self.width
        k = self._clusters(n)
        return index_bytes(n, index_bits(k)) + k * self.width * _HALF

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the representative of each sub-vector of consecutive inputs at one tap."""
        n_out, n_in, *taps = weights.shape
        if n_in % self.width:
            return half(weights)
        vectors = np.moveaxis(weights.reshape(n_out, n_in // self.width, self.width, *taps), 2, -1)
        points = vectors.reshape(-1, self.width)
        found = kmeans.fit(points, self._clusters(len(points)), seed=self.seed)
        decoded = half(found.centres)[found.labels].reshape(vectors.shape)
        return np.moveaxis(decoded, -1, 2).reshape(weights.shape)

    def _clusters(self, n: int) -> int:
        return max(1, min(self.n_clusters, n // 4))


@dataclass(frozen=True)
class Rounded:
    """Whole numbers of some bits, times an fp16 scale for each output channel."""

    n_bits: int

    def __post_init__(self):
        object.__setattr__(self, "n_bits", check_whole("bits", self.n_bits, 2, 8))

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""
        return index_bytes(size(layer), self.n_bits) + channels(layer)[0] * _HALF

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the nearest multiple of its channel's scale for each weight."""
        rows = weights.reshape(len(weights), -1).astype(np.float64)
        exact = np.abs(rows).max(1, keepdims=True) / (2 ** (self.n_bits - 1) - 1)
        scales = half(exact)
        above = np.nextafter(scales, np.inf, dtype=np.float16)
        scales = half(np.where(scales < exact, above, scales))
        decoded = np.round(rows / np.where(scales > 0, scales, 1)) * scales
        return decoded.astype(np.float32).reshape(weights.shape)


@dataclass(frozen=True, eq=False)
class Sparse:
    """The weights of the lowest ranks in fp16 or int8, and the entropy of the mask that tells where they lie.

    What it decodes are weights whose others are already zero.
    """

    ranks: np.ndarray  # of all weights of a bank, in their shape
    precision: str
    kept: int

    def __post_init__(self):
        check_known("precision", self.precision, PRECISIONS)

    def bytes(self, layer: Layer) -> int:
        """Return what a layer takes."""
        kept = int(np.count_nonzero(self.ranks[layer.rows] < self.kept))
        mask = _entropy.entropy_bytes(np.array([kept, size(layer) - kept]))
        values = kept * _HALF if self.precision == "fp16" else kept + channels(layer)[0] * _HALF
        return values + math.ceil(mask)

    def decoded(self, weights: np.ndarray) -> np.ndarray:
        """Return the weights in their precision."""
        return (Half() if self.precision == "fp16" else Rounded(8)).decoded(weights)


def decoded(bank: KernelBank, form: Form) -> KernelBank:
    """Return the bank whose layers are stored in a form, and decoded."""
    rows = np.empty_like(bank.weights)
    for layer in tqdm(bank.layers, desc="layers", unit="layer", delay=2, leave=False):
        axes = (1, 0, 2, 3) if layer.transposed else (0, 1, 2, 3)
        weights = np.ascontiguousarray(bank.weights[layer.rows].reshape(layer.shape).transpose(axes))
        rows[layer.rows] = form.decoded(weights).transpose(axes).reshape(-1, *bank.size)
    return replace(bank, weights=rows)


def half(values: np.ndarray) -> np.ndarray:
    """Return values as fp16 stores them, in float32.

    Raises
    ------
    InvalidValueError
        If one is beyond fp16.
    """
    largest = np.abs(values).max()
    if largest >= _OVERFLOW:
        raise InvalidValueError(
            f"a value of {largest:.3g} is to be stored in fp16; it must be 65504 at most."
        )
    return values.astype(np.float16).astype(np.float32)


def size(layer: Layer) -> int:
    """Return the number of a layer's weights."""
    return math.prod(layer.shape)


def channels(layer: Layer) -> tuple[int, int]:
    """Return a layer's output and input channels, of those that its weight has."""
    first, second = layer.shape[:2]
    return (second, first) if layer.transposed else (first, second)
