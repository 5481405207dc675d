"""Make convolutions small by other methods, and compare these with kernel clustering at equal bytes.

Each method returns the network as it would be decoded from its stored form (`stored`), and the bytes of all
convolutions in that form. All change the same layers, those of `kernels.extract`; every other convolution and
all biases count dense, as in `compression.footprint`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats
from torch import nn

from kclib import compression, datasets, kernels, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, Group, cluster
from kclib.compression import _formats, byte_counts
from kclib.datasets import ImageSet
from kclib.evaluation import _accuracy
from kclib.evaluation._accuracy import Evaluation
from kclib.kernels import KernelBank
from kclib.models import Model

_PRODUCT_KS = tuple(1 << bits for bits in range(1, 13))
_WIDTHS = (2, 4, 8, 16)
_SON_KS = (64, 128, 256, 512, 1024)


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
    form = partial(_formats.Sparse, _ranks(bank), precision)
    return _pruned(network, bank, form, max(1, round(keep * bank.weights.size)))


def son(network: Model | nn.Module, n_clusters: int, *, turned: bool, seed: int = 0) -> Peer:
    """Cluster all layers' kernels up to a signed scale each, and up to flips and rotations if `turned` (TIC).

    Son, Nah and Lee 2018, *Clustering Convolutional Kernels to Compress Deep Neural Networks*, before
    fine-tuning; codebook and scales are fp16, indices of a fixed width.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    n_clusters, turned, seed
        As in `clustering.cluster`.

    Raises
    ------
    InvalidValueError
        K out of range, kernels to be turned that are not square, values beyond fp16.
    """
    network = models.network_of(network)
    bank = kernels.extract(network)
    found = cluster(bank, n_clusters, scope="global", scaled=True, turned=turned, seed=seed)
    (group,) = found.groups
    halved = replace(group, codebook=_formats.half(group.codebook), scales=_formats.half(group.scales))
    small = compression.inserted(network, replace(found, groups=(halved,)))
    name = "Son et al. 2018" + ", turned" * turned
    return Peer(
        name, f"K={n_clusters}", small, byte_counts.clustered_bytes(network, found, coding="fixed"), found
    )


def at_bytes(network: Model | nn.Module, budget: int, *, seed: int = 0) -> list[Peer]:
    """Return each way at its largest setting that takes at most `budget` bytes.

    Palettes of each kind and granularity, quantization, Son et al. 2018 with and without turns (K from 64 to
    1024, powers of 2). Of product quantization (widths 2 to 16, K up to 4096, powers of 2) and of pruning
    (both precisions) the one that moves the weights least, by squared error. A way that cannot get so small,
    or not with these kernels, is not in the list: its absence is the answer.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged.
    budget : int
        Bytes of all convolutions, at least 1.
    seed : int

    Raises
    ------
    InvalidValueError
        Budget or seed out of range; weights beyond fp16.
    """
    network = models.network_of(network)
    checks.check_whole("budget", budget, 1)
    checks.check_seed(seed)
    bank, best = kernels.extract(network), {}
    for way in tqdm(_ways(network, bank, seed), desc="peers", unit="way", delay=2, leave=False):
        if peer := way.largest(budget):
            best[peer.name] = min(best.get(peer.name, peer), peer, key=partial(_moved, bank))
    return list(best.values())


@dataclass(frozen=True)
class _Way:
    """A way's settings, from the fewest bytes to the most."""

    make: Callable[[int], Peer]
    settings: Sequence[int]
    bytes: Callable[[int], int]

    def largest(self, budget: int) -> Peer | None:
        """Return the peer of the largest setting that fits; None if none does."""
        fitting = bisect_right(self.settings, budget, key=self.bytes)
        if fitting and self.bytes(self.settings[-1]) <= budget:  # a mask of all weights takes nothing
            fitting = len(self.settings)
        return self.make(self.settings[fitting - 1]) if fitting else None


def _ways(network: nn.Module, bank: KernelBank, seed: int) -> list[_Way]:
    def way(
        make: Callable[[int], Peer], settings: Sequence[int], form: Callable[[int], _formats.Form]
    ) -> _Way:
        return _Way(make, settings, lambda setting: _total(network, bank, form(setting)))

    ways = [way(partial(quantized, network), range(2, 9), _formats.Rounded)]
    for how in ({"kind": kind, "per": per} for kind in _formats.KINDS for per in _formats.PER):
        ways.append(way(partial(palettized, network, **how), range(1, 9), partial(_formats.Palette, **how)))
    for width in _WIDTHS:
        form = partial(_formats.Product, width=width)
        if any(form(1).fits(layer) for layer in bank.layers):
            make = partial(product_quantized, network, width=width, seed=seed)
            ways.append(way(make, _PRODUCT_KS, form))
    ranks = _ranks(bank)
    for precision in _formats.PRECISIONS:
        form = partial(_formats.Sparse, ranks, precision)
        ways.append(way(partial(_pruned, network, bank, form), range(1, ranks.size + 1), form))
    return ways + _son_ways(network, bank, seed)


def _son_ways(network: nn.Module, bank: KernelBank, seed: int) -> list[_Way]:
    ks = [k for k in _SON_KS if k <= len(bank)]
    return [
        _Way(partial(son, network, turned=turned, seed=seed), ks, partial(_son_bytes, network, bank, turned))
        for turned in (False, True)
        if not turned or bank.size[0] == bank.size[1]
    ]


def _son_bytes(network: nn.Module, bank: KernelBank, turned: bool, n_clusters: int) -> int:
    n = len(bank)
    codebook, scales = np.zeros((n_clusters, *bank.size), np.float32), np.zeros(n, np.float32)
    turns = np.zeros(n, np.uint8) if turned else None
    group = Group("global", bank.layers, codebook, np.zeros(n, np.int32), 0.0, scales, turns)
    return byte_counts.clustered_bytes(network, Clustering((group,), "global", 0), coding="fixed")


def _total(network: nn.Module, bank: KernelBank, form: _formats.Form) -> int:
    """Return the bytes of all convolutions where those of the bank have a form."""
    dense = sum(_formats.size(layer) * layer.itemsize for layer in bank.layers)
    return byte_counts.convolution_bytes(network) - dense + sum(map(form.bytes, bank.layers))


def _peer(name: str, setting: str, network: nn.Module, form: _formats.Form) -> Peer:
    bank = kernels.extract(network)
    small = kernels.insert(network, _formats.decoded(bank, form))
    return Peer(name, setting, small, _total(network, bank, form))


def _pruned(network: nn.Module, bank: KernelBank, form: Callable[[int], _formats.Sparse], kept: int) -> Peer:
    sparse = form(kept)
    zeroed = replace(bank, weights=np.where(sparse.ranks < kept, bank.weights, 0))
    small = kernels.insert(network, _formats.decoded(zeroed, sparse))
    setting = f"{kept / bank.weights.size:.3g} kept, {sparse.precision}"
    return Peer("pruning", setting, small, _total(network, bank, sparse))


def _ranks(bank: KernelBank) -> np.ndarray:
    """Return each weight's place by magnitude, 0 the largest, int64 in the shape of the bank's weights."""
    return stats.rankdata(-np.abs(bank.weights), "ordinal").reshape(bank.weights.shape) - 1


def _moved(bank: KernelBank, peer: Peer) -> float:
    """Return the sum of squared changes of all weights."""
    return float(np.square(kernels.extract(peer.network).weights - bank.weights).sum(dtype=np.float64))


def compare(
    model: Model,
    data: ImageSet,
    peers: Iterable[Peer],
    *,
    dense: Evaluation | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Evaluate networks that stand for a model's, all on the same images.

    Parameters
    ----------
    model : Model
        Dense; its preprocessing serves all.
    data : ImageSet
    peers : iterable of Peer
        `at_bytes` makes some; any other network is one too, with its bytes
        (`byte_counts.stored_bytes`).
    dense : Evaluation, optional
        Of the model on these images, if it is there already.
    precision, device
        As in `_accuracy.evaluate`.
    progress : bool

    Returns
    -------
    pandas.DataFrame
        A row for the dense model and one for each peer: ``method``, ``setting``, ``bytes`` of all
        convolutions, ``ratio`` of the dense ones' to them, and what `_accuracy.accuracy` says.
    """
    model, data = models.as_model(model), datasets.as_image_set(data)
    options = {"precision": precision, "device": device, "progress": False}
    dense = dense or _accuracy.evaluate(model, data, **(options | {"progress": progress}))
    n_bytes, peers = byte_counts.convolution_bytes(model.network), list(peers)
    rows = [
        {"method": "dense", "setting": "", "bytes": n_bytes, "ratio": 1.0} | _accuracy.accuracy(dense, dense)
    ]
    for peer in tqdm(peers, desc="evaluating", unit="network", delay=2, leave=False, disable=not progress):
        answers = _accuracy.evaluate(replace(model, network=models.network_of(peer.network)), data, **options)
        what = {"method": peer.name, "setting": peer.setting, "bytes": peer.bytes}
        rows.append(what | {"ratio": n_bytes / peer.bytes} | _accuracy.accuracy(answers, dense))
    return pd.DataFrame(rows)
