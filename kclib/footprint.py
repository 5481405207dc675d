"""The ledger of bytes: what dense weights take, what codebooks and indices take, where that stops paying."""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from kclib.clustering import Clustering, grouping
from kclib.kernels import KernelBank


@dataclass(frozen=True)
class Savings:
    """Shares removed, 0 to 1; negative where codebook and indices take more than the dense kernels.

    Attributes
    ----------
    kernels : float
        1 - K/N, over the clustered kernels: what the IPSJ report calls removed.
    bytes, bytes_fp16 : float
        Of all convolutions (weights of every size, and biases), with an fp32 and an fp16 codebook.
    model_bytes : float
        Of the whole model, with an fp32 codebook.
    """

    kernels: float
    bytes: float
    bytes_fp16: float
    model_bytes: float


def index_bits(n_clusters: int) -> int:
    """Return the bits of a fixed-width index into K entries, ceil(log2 K); 0 for a single entry."""
    return (n_clusters - 1).bit_length()


def index_bytes(n_kernels: int, n_clusters: int) -> int:
    """Return the bytes of `n_kernels` packed fixed-width indices, rounded up to a whole byte."""
    return -(-n_kernels * index_bits(n_clusters) // 8)


def ledger(network: nn.Module, clustering: Clustering) -> pd.DataFrame:
    """Return where the bytes go, dense and clustered.

    Returns
    -------
    pandas.DataFrame
        Indexed by item, columns ``dense``, ``codebook_fp32`` and ``codebook_fp16`` in bytes. The items:
        ``kernels`` (the clustered kernels, dense), ``indices`` (fixed width), ``codebooks``, ``other
        convolution weights`` (the sizes left out), ``convolution biases``, ``rest`` (all other parameters
        and buffers); then the sums ``convolutions`` and ``model``. Shared tensors count once.
    """
    dense = sum(x.n_kernels * int(np.prod(x.shape[2:])) * x.itemsize for x in clustering.layers)
    indices = sum(index_bytes(len(g.indices), g.n_clusters) for g in clustering.groups)
    values = sum(group.codebook.size for group in clustering.groups)
    clustered = {f"{layer.name}.weight" for layer in clustering.layers}
    other, biases, rest = _others(network, clustered)
    items = {
        "kernels": (dense, 0, 0),
        "indices": (0, indices, indices),
        "codebooks": (0, 4 * values, 2 * values),
        "other convolution weights": (other,) * 3,
        "convolution biases": (biases,) * 3,
        "rest": (rest,) * 3,
    }
    table = pd.DataFrame.from_dict(
        items, orient="index", columns=["dense", "codebook_fp32", "codebook_fp16"], dtype="int64"
    )
    model = table.sum()
    table.loc["convolutions"] = table.drop(index="rest").sum()
    table.loc["model"] = model
    return table


def savings(network: nn.Module, clustering: Clustering) -> Savings:
    """Return what a clustering removes, from its `ledger`."""
    table = ledger(network, clustering)
    removed = 1 - table.loc[["convolutions", "model"]].div(
        table.loc[["convolutions", "model"], "dense"], axis=0
    )
    return Savings(
        float(clustering.kernels_removed),
        float(removed.loc["convolutions", "codebook_fp32"]),
        float(removed.loc["convolutions", "codebook_fp16"]),
        float(removed.loc["model", "codebook_fp32"]),
    )


def break_even(bank: KernelBank, *, scope: str | Mapping[str, str] = "layer", itemsize: int = 4) -> int:
    """Return the largest K a group at which codebooks and fixed-width indices take fewer bytes than dense.

    Groups with fewer than K kernels have as many clusters as kernels. 0 if clustering never pays.

    Parameters
    ----------
    itemsize : int
        Bytes of a codebook value (4 for fp32, 2 for fp16).
    """
    counts = [sum(x.n_kernels for x in group) for group in grouping(bank, scope).values()]
    area = int(np.prod(bank.size))
    dense = sum(layer.n_kernels * area * layer.itemsize for layer in bank.layers)

    def clustered(k: int) -> int:
        return sum(index_bytes(n, min(k, n)) + min(k, n) * area * itemsize for n in counts)

    return bisect.bisect_left(range(1, max(counts) + 1), dense, key=clustered)


def _others(network: nn.Module, clustered: set[str]) -> tuple[int, int, int]:
    """Return bytes of convolution weights not clustered, of convolution biases, and of the rest."""
    convolutions = {
        name
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    other = biases = rest = 0
    seen = {id(p) for n, p in network.named_parameters(remove_duplicate=False) if n in clustered}
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        owner, leaf = _owner(name)
        if id(value) in seen:
            continue
        seen.add(id(value))
        n_bytes = value.numel() * value.element_size()
        if owner not in convolutions:
            rest += n_bytes
        elif leaf == "bias":
            biases += n_bytes
        else:
            other += n_bytes
    return other, biases, rest


def _owner(name: str) -> tuple[str, str]:
    """Split a parameter's name into its module's and its own, also where the module is parametrized."""
    owner, parametrized, rest = name.partition(".parametrizations.")
    if parametrized:
        return owner, rest.partition(".")[0]
    owner, _, leaf = name.rpartition(".")
    return owner, leaf
