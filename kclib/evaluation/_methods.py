"""Networks made small by methods other than kernel clustering.

Each method returns the network as it would be decoded from its stored form, and the bytes of all convolutions
in that form. All change the same layers, those of `kernels.extract`; every other convolution and all biases
count dense, as in `compression.footprint`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import stats
from torch import nn

from kclib import kernels, models
from kclib._util import checks
from kclib.clustering import Clustering
from kclib.compression import _formats, byte_counts
from kclib.kernels import KernelBank
from kclib.models import Model


@dataclass(frozen=True)
class Peer:
    """A network made small in one way.

    Attributes
    ----------
    name, setting : str
        The way, and how it was set.
    network : Model or torch.nn.Module
        A copy with ordinary dense weights, those that the stored form decodes to.
    bytes : int
        Of all convolutions in the stored form; compare with `byte_counts.convolution_bytes`.
    clustering : Clustering, optional
        Where the way is one, for `compression.compress` and `training`.
    """

    name: str
    setting: str
    network: Model | nn.Module
    bytes: int
    clustering: Clustering | None = None


def palettized(network: Model | nn.Module, bits: int, *, kind: str = "kmeans", per: str = "tensor") -> Peer:
    """Give each weight tensor, or each of its output channels, a look-up table of 2**bits fp16 values.

    As ``OpPalettizerConfig`` of coremltools does: ``mode`` kmeans or uniform, ``granularity`` per_tensor, or
    per_grouped_channel on the output axis with a ``group_size`` of 1. coremltools knows 1, 2, 3, 4, 6 and 8
    bits. A table has all its entries, also where a tensor has fewer weights.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    bits : int
        1 to 8, of an index.
    kind : {"kmeans", "uniform"}
        k-means on a line (`palettes.palette`), which needs no seed; or evenly from the smallest weight to the
        largest.
    per : {"tensor", "channel"}

    Raises
    ------
    InvalidValueError, UnknownNameError
        Bits out of range, weights beyond fp16, an unknown kind or granularity.
    """
    network = models.network_of(network)
    return _peer(f"{kind} palette per {per}", f"{bits}-bit", network, _formats.Palette(bits, kind, per))


def product_quantized(network: Model | nn.Module, n_clusters: int, width: int, *, seed: int = 0) -> Peer:
    """Cluster each layer's sub-vectors, `width` consecutive input channels at each tap of each filter.

    Stock et al. 2020, *And the Bit Goes Down*, and Martinez et al. 2021, *Permute, Quantize, and Fine-tune*,
    without their weighing by activations, permutation and fine-tuning: a codebook of fp16 vectors a layer,
    and indices of ceil(log2 K) bits. As in the former, K is at most a quarter of a layer's sub-vectors. A
    layer whose inputs `width` does not divide keeps its weights, in fp16, as these papers spare the first.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    n_clusters : int
        K, at least 1.
    width : int
        At least 1.
    seed : int
        Of `kmeans.fit`.

    Raises
    ------
    InvalidValueError
        K, width or seed out of range; weights beyond fp16.
    """
    network = models.network_of(network)
    form = _formats.Product(n_clusters, width, seed)
    return _peer("product quantization", f"K={n_clusters}, width {width}", network, form)


def quantized(network: Model | nn.Module, bits: int) -> Peer:
    """Round weights to multiples of a scale for each output channel, an fp16 number.

    Symmetric, between -(2**(bits - 1) - 1) and as much above zero (Jacob et al. 2018, *Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, equation 1, zero point 0).
    The scale is rounded up, so that no weight is cut off and none moves by more than half of it.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    bits : int
        2 to 8, of a weight.

    Raises
    ------
    InvalidValueError
        Bits out of range, weights beyond fp16.
    """
    network = models.network_of(network)
    return _peer("quantization", f"{bits}-bit", network, _formats.Rounded(bits))


def pruned(network: Model | nn.Module, keep: float, *, precision: str = "fp16") -> Peer:
    """Keep the weights of largest magnitude over all layers, and set the others to zero (Han et al. 2015).

    Counted to its favour: where the zeros lie takes the entropy of each layer's mask, the bound that an
    arithmetic coder reaches, without the tables it needs; a bitmap never takes less.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    keep : float
        Share of the weights that stay, above 0 to 1; at least one weight does.
    precision : {"fp16", "int8"}
        Of those; int8 with an fp16 scale for each output channel, as in `quantized`.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A share out of range, weights beyond fp16, an unknown precision.
    """
    network = models.network_of(network)
    checks.check_real("keep", keep, lambda x: 0 < x <= 1, "a share of the weights, above 0 to 1")
    bank = kernels.extract(network)
    form = partial(_formats.Sparse, ranks_of(bank), precision)
    return pruned_to(network, bank, form, max(1, round(keep * bank.kernels.size)))


def pruned_to(
    network: nn.Module, bank: KernelBank, form: Callable[[int], _formats.Sparse], kept: int
) -> Peer:
    sparse = form(kept)
    zeroed = replace(bank, kernels=np.where(sparse.ranks < kept, bank.kernels, 0))
    small = kernels.insert(network, _formats.decoded(zeroed, sparse))
    setting = f"{kept / bank.kernels.size:.3g} kept, {sparse.precision}"
    return Peer("pruning", setting, small, total_bytes(network, bank, sparse))


def total_bytes(network: nn.Module, bank: KernelBank, form: _formats.Form) -> int:
    """Return the bytes of all convolutions where those of the bank have a form."""
    dense = sum(_formats.size(layer) * layer.itemsize for layer in bank.layers)
    return byte_counts.convolution_bytes(network) - dense + sum(map(form.bytes, bank.layers))


def ranks_of(bank: KernelBank) -> np.ndarray:
    """Return each weight's place by magnitude, 0 the largest, int64 in the shape of the bank's weights."""
    return stats.rankdata(-np.abs(bank.kernels), "ordinal").reshape(bank.kernels.shape) - 1


def _peer(name: str, setting: str, network: nn.Module, form: _formats.Form) -> Peer:
    bank = kernels.extract(network)
    small = kernels.insert(network, _formats.decoded(bank, form))
    return Peer(name, setting, small, total_bytes(network, bank, form))
