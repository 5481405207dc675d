"""Count the bytes of a group of layers at any K, without making its clustering."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kclib.clustering import Clustering, Group
from kclib.compression._layers import N_TURNS
from kclib.compression._packing import index_bits, index_bytes
from kclib.compression._precisions import codebook_bytes, scale_type
from kclib.kernels import Layer


@dataclass(frozen=True)
class Count:
    """How many bytes a group of layers takes at K clusters."""

    precision: str
    exact: bool = True  # whole bits an index, whole bytes a layer
    scale_bits: int = 0
    orbit: int = 1

    @classmethod
    def of(cls, clustering: Clustering, precision: str, exact: bool) -> "Count":
        """Return the count for groups with the scales and turns of a clustering's."""
        group = clustering.groups[0]
        bits = 0 if group.scales is None else 8 * scale_type(precision).itemsize
        return cls(precision, exact, bits, orbit(group))

    def bytes(self, layers: Iterable[Layer], k: int) -> float:
        """Return codebook, indices and scales."""
        total = codebook_bytes(k, math.prod(next(iter(layers)).shape[2:]), self.precision)
        for layer in layers:
            if self.exact:
                total += index_bytes(layer.n_kernels, index_bits(k * self.orbit))
            else:
                total += layer.n_kernels * math.log2(k * self.orbit) / 8
            total += layer.n_kernels * self.scale_bits / 8
        return total


def pays_up_to(groups: Sequence[Sequence[Layer]], count: Count) -> int:
    """Return the largest K a group at which these groups of layers take fewer bytes than dense; 0 if none."""
    sizes = [sum(layer.n_kernels for layer in layers) for layers in groups]
    dense = sum(math.prod(layer.shape) * layer.itemsize for layers in groups for layer in layers)

    def clustered(k: int) -> float:
        return sum(count.bytes(layers, min(k, n)) for layers, n in zip(groups, sizes, strict=True))

    return bisect.bisect_left(range(1, max(sizes) + 1), dense, key=clustered)


def orbit(group: Group) -> int:
    """Return how many indices one representative of a group has."""
    return 1 if group.turns is None else N_TURNS
