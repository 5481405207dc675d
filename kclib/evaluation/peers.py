"""Compare kernel clustering with other methods that make convolutions small, at equal bytes.

`at_bytes` makes a network small by each method, and `compare` evaluates what comes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from torch import nn

from kclib import datasets, kernels, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, Group, cluster
from kclib.compression import _formats, _replacement, byte_counts
from kclib.datasets import ImageSet
from kclib.evaluation import _accuracy, _methods
from kclib.evaluation._accuracy import Evaluation
from kclib.evaluation._methods import Peer
from kclib.kernels import KernelBank
from kclib.models import Model, _model

_PRODUCT_KS = tuple(1 << bits for bits in range(1, 13))
_WIDTHS = (2, 4, 8, 16)
_SON_KS = (64, 128, 256, 512, 1024)


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
    result = cluster(bank, n_clusters, scope="global", scaled=True, turned=turned, seed=seed)
    (group,) = result.groups
    halved = replace(group, codebook=_formats.half(group.codebook), scales=_formats.half(group.scales))
    small = _replacement.inserted(network, replace(result, groups=(halved,)))
    name = "Son et al. 2018" + ", turned" * turned
    return Peer(
        name, f"K={n_clusters}", small, byte_counts.clustered_bytes(network, result, coding="fixed"), result
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
    budget = checks.check_whole("budget", budget, 1)
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


def undominated(table: pd.DataFrame) -> pd.Series:
    """Return which rows are on the Pareto front: none that keeps as few bytes loses as little.

    Parameters
    ----------
    table : pandas.DataFrame
        ``ratio``, how many times fewer bytes, and ``drop``, in points. Of equal rows the first is taken.

    Returns
    -------
    pandas.Series
        bool, in the rows of the table.

    Examples
    --------
    >>> import pandas as pd
    >>> from kclib.evaluation import peers
    >>> peers.undominated(pd.DataFrame({"ratio": [8, 8, 4], "drop": [3, 2, 2.5]})).tolist()
    [False, True, False]
    """
    checks.check_columns(table, ("ratio", "drop"))
    ordered = table.sort_values(["ratio", "drop"], ascending=[False, True], kind="stable")
    fewest = ordered["drop"].astype(float)
    return (fewest < fewest.cummin().shift(fill_value=np.inf)).reindex(table.index)


def _ways(network: nn.Module, bank: KernelBank, seed: int) -> list[_Way]:
    def way(
        make: Callable[[int], Peer], settings: Sequence[int], form: Callable[[int], _formats.Form]
    ) -> _Way:
        return _Way(make, settings, lambda setting: _methods.total_bytes(network, bank, form(setting)))

    ways = [way(partial(_methods.quantized, network), range(2, 9), _formats.Rounded)]
    for how in ({"kind": kind, "per": per} for kind in _formats.KINDS for per in _formats.PER):
        ways.append(
            way(
                partial(_methods.palettized, network, **how),
                range(1, 9),
                partial(_formats.Palette, **how),
            )
        )
    for width in _WIDTHS:
        form = partial(_formats.Product, width=width)
        if any(form(1).fits(layer) for layer in bank.layers):
            make = partial(_methods.product_quantized, network, width=width, seed=seed)
            ways.append(way(make, _PRODUCT_KS, form))
    ranks = _methods.ranks_of(bank)
    for precision in _formats.PRECISIONS:
        form = partial(_formats.Sparse, ranks, precision)
        ways.append(way(partial(_methods.pruned_to, network, bank, form), range(1, ranks.size + 1), form))
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


def _moved(bank: KernelBank, peer: Peer) -> float:
    """Return the sum of squared changes of all weights."""
    return float(np.square(kernels.extract(peer.network).kernels - bank.kernels).sum(dtype=np.float64))


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
    model, data = _model.as_model(model), datasets.as_image_set(data)
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
